"""How much memory training a model folder takes, with all weights and with adapters (LoRA).

    python tests/bench/memory.py --model FOLDER --out tests/bench/memory.json

Each peak is that of two updates of ppo on sums in a process of its own, on the CPU. Freed memory
is given back at once there, so that the peak is what is needed and not what glibc keeps. Beside it
stands what weights, gradients, Adam and reference need by their shapes. Two larger models are
counted on the device "meta", which holds shapes and no numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402

# Qwen2.5 of 0.5 and 1.5 billion parameters: width, layers, heads, key heads, inner width.
SHAPES = {
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864),
    "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960),
}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
RUN = """
import resource, sys
import train_small as front
code = front.main(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)  # it is in KiB
sys.exit(code)
"""


def needed(model: nr.Transformer, rank: int) -> dict[str, float]:
    """Bytes by shapes: 4 for a weight and 16 for a trained one, which has gradient and Adam.

    The reference is 4 bytes for each trained weight; what is not trained it shares.
    """
    c = nr.Config(lora=rank)
    if rank:
        with torch.device("meta"):
            for module in list(model.layers.modules()):
                for name, child in list(module.named_children()):
                    if type(child) is torch.nn.Linear:
                        setattr(module, name, nr.LoRA(child, c.lora, None))
    weights = sum(p.numel() for p in model.parameters())
    thin = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    trained = thin if rank else weights
    return {"weights": weights, "trained": trained, "MB": (4 * weights + 16 * trained) / 1e6}


def run(folder: str, rank: int, bf16: bool) -> float:
    """The peak of a process that trains, in MB."""
    with tempfile.TemporaryDirectory() as out:
        argv = "ppo --config sums --updates 2 --eval-problems 8 --threads 1".split()
        argv += ["--model", folder, "--out", f"{out}/run", "--cache", f"{out}/cache"]
        argv += ["--bf16", str(bf16), "--lora", str(rank)]
        done = subprocess.run(
            [sys.executable, "-c", RUN, *argv],
            cwd=ROOT,
            env=os.environ | GIVE_BACK,
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return float(done.stdout.rpartition("PEAK ")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    a = parser.parse_args()
    rows = []
    for rank in (0, a.rank):
        with torch.device("meta"):
            model = nr.Transformer(nr.Transformer.load(a.model).config)
        row = {"model": "SmolLM2-135M", "lora": rank, **needed(model, rank)}
        row["peak_MB"] = {
            "float32": run(a.model, rank, False),
            "bfloat16": run(a.model, rank, True),
        }
        rows.append(row)
        for name, (width, layers, heads, kv_heads, inner) in SHAPES.items():
            shape = nr.Architecture(
                vocab=151_936,
                width=width,
                layers=layers,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=width // heads,
                mlp_width=inner,
                family="qwen2",
                tied=True,
            )
            with torch.device("meta"):
                model = nr.Transformer(shape)
            rows.append({"model": name, "lora": rank, **needed(model, rank)})
    found = {
        "command": f"python tests/bench/memory.py --model FOLDER --rank {a.rank}",
        "commit": front.commit_of(ROOT),
        "torch": torch.__version__,
        "rows": rows,
    }
    a.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
