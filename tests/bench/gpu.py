"""Time one GPU: python tests/bench/gpu.py [train decode loops] [--model FOLDER --data FOLDER] [--config gpu]

`train`: a supervised step beside a plain transformers loop, and its share of the measured rate of matrix products.
`decode`: forced lengths beside `generate` at batch 1, 64 and 512, and the share of the measured memory bandwidth.
`loops`: an update of each loop from end to end, and how much of it is sampling. Without --model the sizes of the config
with random weights. Prints a table and writes gpu.json beside this file. `--config smoke` is a dry run on a CPU.
Needs the extra `bench`. What a loop gains: python train_small.py LOOP --config hf --model FOLDER --data FOLDER
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from bench import in_transformers, training_flops

import nanoreward as nr
import train_small as front

OUT = Path(__file__).with_name("gpu.json")


def timed(call, device: str, reps: int = 3) -> float:
    """Median seconds of a call after one to warm up, the device's queue empty before and after."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(reps + 1):
        wait()
        began = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def rates(device: str) -> tuple[float, float]:
    """Operations a second of a bf16 product of 8192 x 8192 (CPU: 512), bytes a second of reading 4 GB (CPU: 64 MB)."""
    n, words = (8192, 2**31) if device == "cuda" else (512, 2**25)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    big = torch.ones(words, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / timed(lambda: a @ a, device), 2 * words / timed(big.max, device)


def train(model: nr.Transformer, c: nr.Config, rows: int, T: int, peak: float) -> dict:
    """One step over `rows` sequences of T tokens."""
    ids = torch.randint(6, c.vocab, (rows, T), device=c.device)
    state = {"optimizers": nr.optimizers([model], 1e-6, c)}
    other = in_transformers(model).to(c.device, torch.bfloat16).train()
    adamw = torch.optim.AdamW(other.parameters(), 1e-6, fused=c.device == "cuda")

    def loss(micro: torch.Tensor):
        logp = nr.token_logprobs(model, ids[micro, :1], ids[micro, 1:], 1.0)
        return nr.nll_loss(logp, torch.ones_like(logp), ids.numel()), {}

    def theirs() -> None:
        for micro in ids.split(c.micro):
            other(micro, labels=micro).loss.backward()
        adamw.step()
        adamw.zero_grad()

    mine = timed(lambda: nr.step(state, loss, torch.arange(rows), c), c.device)
    return {
        "tokens/s": ids.numel() / mine,
        "of the matrix rate": training_flops(model, ids.numel(), T) / mine / peak,
        "transformers, tokens/s": ids.numel() / timed(theirs, c.device),
    }


@torch.no_grad()
def decode(model: nr.Transformer, c: nr.Config, batch: int, length: int, bandwidth: float) -> dict:
    """`length` tokens for each of `batch` prompts of 64; a step reads the weights and the keys and values so far."""
    never = replace(c, eos=c.vocab - 2, response=length)
    prompt = torch.randint(6, c.vocab - 3, (batch, 64), device=c.device)
    other = in_transformers(model).to(c.device, torch.bfloat16).eval()
    kwargs = dict(
        max_new_tokens=length, min_new_tokens=length, do_sample=True, top_k=0, pad_token_id=c.pad
    )
    mine = timed(lambda: nr.sample(model, prompt, never, generator=nr.rng(0, "s")), c.device)
    theirs = timed(
        lambda: other.generate(prompt, attention_mask=torch.ones_like(prompt), **kwargs), c.device
    )
    weights = sum(p.numel() for p in model.parameters())
    past = batch * (64 + length / 2) * 2 * c.layers * c.kv_heads * c.head_dim
    return {
        "tokens/s": batch * length / mine,
        "generate, tokens/s": batch * length / theirs,
        "ratio": theirs / mine,
        "of the bandwidth": 2 * (weights + past) * length / mine / bandwidth,
    }


def loops(c: nr.Config, cache: Path) -> dict:
    """Seconds an update of each loop's first round (or first five updates), and the share of `sample`."""
    found, spent, plain = {}, [], nr.sample

    def watched(*args, **kwargs):
        began = time.perf_counter()
        b = plain(*args, **kwargs)
        b.response.cpu()
        spent.append(time.perf_counter() - began)
        return b

    for name, (start, loop) in nr.LOOPS.items():
        task, policy = front.make_task(c), front.STARTS.get(name, front.base_model)(c, cache)
        state = start(policy, c) | front.reward_models(name, c, cache)
        spent.clear()
        nr.sample, began = watched, time.perf_counter()
        try:
            updates = loop(state, task, c, **({"roll": watched} if name == "denoise" else {}))
            n = len(
                list(
                    islice(
                        updates,
                        c.round_updates if name in ("iterative_dpo", "self_rewarding") else 5,
                    )
                )
            )
        finally:
            nr.sample = plain
        passed = time.perf_counter() - began
        found[name] = {"seconds an update": passed / n, "of it sampling": sum(spent) / passed}
    return found


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="train, decode, loops; none: all")
    parser.add_argument("--config", default="gpu", choices=nr.CONFIGS)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--cache", type=Path, default=front.CACHE)
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    c = replace(nr.Config(), **nr.CONFIGS[a.config], data=a.data, device=front.pick_device("auto"))
    model = nr.Transformer.load(a.model) if a.model else nr.Transformer(c, nr.rng(0, "bench"))
    if a.model:
        c = replace(c, model=str(a.model), **{k: getattr(model.config, k) for k in nr.HF_KEYS})
    torch.set_float32_matmul_precision("high")
    model, small = front.ready(model, c), c.device == "cpu"
    peak, bandwidth = rates(c.device)
    chip = torch.cuda.get_device_name() if c.device == "cuda" else platform.machine()
    found = {
        "machine": chip,
        "torch": torch.__version__,
        "config": a.config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrix products, TFLOP/s": peak / 1e12,
        "bandwidth, GB/s": bandwidth / 1e9,
    }
    parts = a.parts or ["train", "decode", "loops"]
    if "train" in parts:
        found["train"] = train(model, c, *((4, 16) if small else (64, 512)), peak)
    if "decode" in parts:
        found["decode"] = {
            n: decode(model, c, n, 4 if small else 128, bandwidth)
            for n in (1, 64, 512)[: 2 if small else 3]
        }
    if "loops" in parts:
        found["loops"] = loops(c, a.cache)
    print(json.dumps(found, indent=1))
    front.write_text(a.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
