"""Time one GPU: python tests/bench/gpu.py [train decode loops] [--model FOLDER --data FOLDER]

    train     a supervised step beside a plain loop with transformers, and its share of the measured
              rate of matrix products
    decode    forced lengths beside `generate` at batch 1, 64 and 512, and the share of the measured
              memory bandwidth
    loops     an update of each method from end to end, and how much of it is sampling

Without --model `train` and `decode` take random weights of the sizes that --config says (gpu), and
`loops` trains its own base models in the cache. It prints a table and writes gpu.json beside this
file. `--config smoke` is a dry run on a CPU. It needs the extra `bench`. What a method gains is
another question: python train_small.py METHOD --config hf --model FOLDER --data FOLDER
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import in_transformers, training_flops

import nanoreward as nr
import train_small as front

OUT = Path(__file__).with_name("gpu.json")


def timed(call: Callable, device: str, reps: int = 3) -> float:
    """The median seconds of a call, after one call to warm up.

    The queue of the device is empty before and after each of them.
    """

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(reps + 1):
        wait()
        began = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def rates(device: str) -> tuple[float, float]:
    """What the device can do: operations a second, and bytes a second.

    The first are those of a product of 8192 x 8192 matrices in bfloat16, the second those of
    reading 4 GB. A CPU gets 512 x 512 and 64 MB.
    """
    n, words = (8192, 2**31) if device == "cuda" else (512, 2**25)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    big = torch.ones(words, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / timed(lambda: a @ a, device), 2 * words / timed(big.max, device)


def train(model: nr.Transformer, c: nr.Config, rows: int, T: int, peak: float) -> dict:
    """One step over `rows` sequences of T tokens."""
    ids = torch.randint(6, c.vocab, (rows, T), device=c.device)
    our_optimizers = nr.optimizers([model], 1e-6)
    other = in_transformers(model).to(c.device, torch.bfloat16).train()
    adamw = torch.optim.AdamW(other.parameters(), 1e-6, fused=c.device == "cuda")

    def loss(part: torch.Tensor) -> tuple[torch.Tensor, dict]:
        logp = nr.token_logprobs(model, ids[part, :1], ids[part, 1:], 1.0)
        return nr.nll_loss(logp, torch.ones_like(logp), ids.numel()), {}

    def ours() -> None:
        nr.optimizer_step(our_optimizers, loss, torch.arange(rows), c)

    def theirs() -> None:
        for part in ids.split(c.micro):
            other(part, labels=part).loss.backward()
        adamw.step()
        adamw.zero_grad()

    mine = timed(ours, c.device)
    return {
        "tokens/s": ids.numel() / mine,
        "of the matrix rate": training_flops(model, ids.numel(), T) / mine / peak,
        "transformers, tokens/s": ids.numel() / timed(theirs, c.device),
    }


@torch.no_grad()
def decode(model: nr.Transformer, c: nr.Config, batch: int, length: int, bandwidth: float) -> dict:
    """`length` tokens for each of `batch` prompts of 64 tokens.

    Each token has to read the weights, and the keys and values so far.
    """
    never = nr.replace(c, eos_id=c.vocab - 2, response=length)
    prompt = torch.randint(6, c.vocab - 3, (batch, 64), device=c.device)
    other = in_transformers(model).to(c.device, torch.bfloat16).eval()

    def ours() -> nr.Rollout:
        return nr.sample(model, prompt, never, generator=nr.rng(0, "s"))

    def theirs() -> torch.Tensor:
        return other.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=True,
            top_k=0,
            pad_token_id=c.pad_id,
        )

    our_seconds = timed(ours, c.device)
    their_seconds = timed(theirs, c.device)
    weights = sum(p.numel() for p in model.parameters())
    past = batch * (64 + length / 2) * 2 * c.layers * c.kv_heads * c.head_dim
    return {
        "tokens/s": batch * length / our_seconds,
        "generate, tokens/s": batch * length / their_seconds,
        "ratio": their_seconds / our_seconds,
        "of the bandwidth": 2 * (weights + past) * length / our_seconds / bandwidth,
    }


def loops(configs: dict[str, Any], cache: Path) -> dict:
    """Seconds of an update of each method, and the share of `sample` in them.

    They are measured over the first round of a method with rounds, and over the first five updates
    of another one.
    """
    plain = nr.sample
    spent: list[float] = []

    def watched(*args: Any, **kwargs: Any) -> nr.Rollout:
        began = time.perf_counter()
        b = plain(*args, **kwargs)
        b.response.cpu()
        spent.append(time.perf_counter() - began)
        return b

    found = {}
    for name, c in configs.items():
        method = nr.METHODS[name]
        task = front.make_task(c)
        trainer = front.CachedTrainer(cache)
        state = method.start(method.starts_from(task, c, trainer), c)
        models = method.reward_models(task, c, trainer)
        if models:
            state.models = models

        spent.clear()
        nr.sample = watched
        began = time.perf_counter()
        try:
            # `denoise` takes its sampler as an argument.
            roll = {"roll": watched} if name == "denoise" else {}
            first = c.updates if isinstance(c, nr.DPOConfig) else 5
            updates = len(list(islice(method.loop(state, task, c, **roll), first)))
        finally:
            nr.sample = plain
        passed = time.perf_counter() - began
        found[name] = {
            "seconds an update": passed / updates,
            "of it sampling": sum(spent) / passed,
        }
    return found


def all_configs(a: argparse.Namespace, model: nr.Transformer | None) -> dict[str, Any]:
    """The config of each method on this machine, for the folder of the model if there is one."""
    numbers = {"data": a.data, "device": nr.pick_device("auto")}
    configs = {name: front.make_config(name, a.config, **numbers) for name in nr.METHODS}
    if model is not None:
        for name, c in configs.items():
            shape = vars(model.config) | {"bf16": c.bf16}
            configs[name] = nr.replace(c, model=str(a.model), **shape)
    return configs


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="train, decode, loops; none: all")
    parser.add_argument("--config", default="gpu", choices=front.PRESETS)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--cache", type=Path, default=front.CACHE)
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    parts = a.parts or ["train", "decode", "loops"]

    folder = nr.Transformer.load(a.model) if a.model else None
    configs = all_configs(a, folder)
    c = configs["ppo"]
    model = nr.on_device(folder or nr.Transformer(c, nr.rng(0, "bench")), c)
    small = c.device == "cpu"
    torch.set_float32_matmul_precision("high")
    peak, bandwidth = rates(c.device)
    found = {
        "machine": platform.machine() if small else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "config": a.config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrix products, TFLOP/s": peak / 1e12,
        "bandwidth, GB/s": bandwidth / 1e9,
    }
    if "train" in parts:
        rows, T = (4, 16) if small else (64, 512)
        found["train"] = train(model, c, rows, T, peak)
    if "decode" in parts:
        batches, length = ((1, 64), 4) if small else ((1, 64, 512), 128)
        found["decode"] = {n: decode(model, c, n, length, bandwidth) for n in batches}
    if "loops" in parts:
        found["loops"] = loops(configs, a.cache)
    print(json.dumps(found, indent=1))
    front.write_text(a.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
