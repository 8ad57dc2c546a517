"""Helpers of the two recorders: seeded short numbers, ragged masks, readable JSON."""

import json
from importlib.metadata import version
from pathlib import Path

import torch

torch.set_num_threads(1)


def numbers(seed, *shape, scale=1.0, shift=0.0, digits=3):
    """Normal float64 numbers with few decimals, so that the JSON holds exactly the inputs."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(shape, generator=generator, dtype=torch.float64).flatten() * scale + shift
    return torch.tensor([round(x, digits) for x in flat.tolist()], dtype=torch.float64).view(shape)


def ragged(lengths, width):
    """float64 mask, row i is lengths[i] ones and then zeros."""
    return (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).double()


def plain(x):
    """Tensors become lists of Python numbers; 0/1 masks are written as integers."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach() + 0  # no -0.0
    whole = x.numel() > 1 and bool(((x == 0) | (x == 1)).all())
    return (x.long() if whole else x).tolist()


def make(package, name, call, inputs, output, notes=()):
    return {
        "name": name,
        "package": package,
        "version": version(package),
        "call": call,
        "notes": list(notes),
        "inputs": plain(inputs),
        "output": plain(output),
    }


def _block(fields):
    return "{" + ",".join(f"\n   {json.dumps(k)}: {json.dumps(v)}" for k, v in fields.items()) + "}"


def write(file, records):
    """One record per few lines: every input and output on its own line."""
    texts = []
    for r in records:
        lines = [
            f"{json.dumps(k)}: {_block(v) if isinstance(v, dict) else json.dumps(v)}"
            for k, v in r.items()
        ]
        texts.append(" {" + ",\n  ".join(lines) + "}")
    path = Path(__file__).parent / file
    path.write_text("[\n" + ",\n".join(texts) + "\n]\n")
    assert json.loads(path.read_text()) == records
    print(file, len(records), "records", path.stat().st_size, "bytes")
