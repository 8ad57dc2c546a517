"""Measure one GPU: python tests/bench/gpu.py [PART ...] [--model FOLDER --data FOLDER]

    agree     greedy tokens, log-probs and two updates of each method, the GPU beside the CPU
    train     a supervised step beside a plain loop with transformers, and its share of the measured
              rate of matrix products
    decode    forced lengths beside `generate` at batch 1, 64 and 512, and the share of the measured
              memory bandwidth
    loops     an update of each method from end to end, and how much of it is sampling

Without --model `train` and `decode` take random weights of the sizes that --config says (gpu), and
`loops` trains its own base models in the cache. With --config gpu it trains them only a little,
because nothing but the time of an update is asked. After every measurement it prints and writes
gpu.json beside this file, so that a call that is cut short has lost nothing; --limit says after how
many seconds nothing new is begun. `--config smoke` is a dry run on a CPU. It needs the extra
`bench`. What a method gains is another question:

    python train_small.py METHOD --config hf --model FOLDER --data FOLDER
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from copy import deepcopy
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


def agree_sampling(device: str, bf16: bool) -> dict:
    """What a model with random weights writes on the device and on the CPU, and its log-probs."""
    c = front.make_config("ppo", vocab=64, kv_heads=2, response=40, temperature=0.0, bf16=bf16)
    on_cpu = nr.Transformer(c)
    generator = nr.rng(0, "weights")
    with torch.no_grad():
        for p in on_cpu.parameters():
            if p.dim() == 2:
                p.normal_(std=0.1, generator=generator)
    there = deepcopy(on_cpu).to(device)
    prompt = torch.randint(6, 64, (65, 12), generator=nr.rng(0, "prompts"))
    prompt[::3, :4] = c.pad_id
    b = nr.sample(on_cpu, prompt, c)
    other = nr.sample(there, prompt.to(device), c)
    with torch.no_grad():
        logp = nr.token_logprobs(on_cpu, prompt, b.response, 1.0)
        other_logp = nr.token_logprobs(there, prompt.to(device), b.response.to(device), 1.0)
    return {
        "greedy tokens": int(b.mask.sum()),
        "of them others": int((b.response != other.response.cpu()).sum()),
        "largest difference of log-probs": float((logp - other_logp.cpu()).abs().max()),
    }


def agree_updates(name: str, device: str) -> dict:
    """The largest difference of any metric in two updates of a method at smoke size, in float32."""
    method = nr.METHODS[name]
    c = front.make_config(name, "smoke", device="cpu")
    task = front.make_task(c)
    base = nr.gpt_base(task, c)
    models = method.reward_models(base, task, c, nr.train_now)
    policy = base
    if method.starts_from is not None:
        policy = method.starts_from(base, task, c, nr.train_now)
    runs = []
    for where in ("cpu", device):
        state = method.start(deepcopy(policy).to(where), c)
        if models:
            state.models = {key: deepcopy(model).to(where) for key, model in models.items()}
        runs.append(list(islice(method.loop(state, task, nr.replace(c, device=where)), 2)))
    differences = {}
    for mine, other in zip(*runs, strict=True):
        for key, value in mine.items():
            # Before the first step of a round all margins are 0, and rounding gives their sign.
            if isinstance(value, int | float) and key != "pair_accuracy":
                differences[key] = max(differences.get(key, 0.0), abs(value - other[key]))
    worst = max(differences, key=differences.__getitem__)
    return {"metrics": len(differences), "worst": worst, "difference": differences[worst]}


def agree(device: str) -> dict:
    """The device beside the CPU, without TF32."""
    torch.set_float32_matmul_precision("highest")
    found = {
        "float32": agree_sampling(device, bf16=False),
        "bfloat16": agree_sampling(device, bf16=True),
    }
    for name in nr.METHODS:
        found[name] = agree_updates(name, device)
    torch.set_float32_matmul_precision("high")
    return found


def train(model: nr.Transformer, c: nr.Config, rows: int, T: int, peak: float) -> dict:
    """One step over `rows` sequences of T tokens in a single backward pass."""
    c = nr.replace(c, micro=rows)
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
    flops = training_flops(model, ids.numel(), T)
    found = {
        "tokens/s": ids.numel() / mine,
        "of the matrix rate": flops / mine / peak,
        "transformers, tokens/s": ids.numel() / timed(theirs, c.device),
    }
    # What compiling the blocks would gain, and how long that takes.
    for layer in model.layers:
        layer.compile(dynamic=True)
    began = time.perf_counter()
    ours()
    found["seconds of compiling"] = time.perf_counter() - began
    found["compiled, of the matrix rate"] = flops / timed(ours, c.device) / peak
    for layer in model.layers:
        layer._compiled_call_impl = None
    return found


@torch.no_grad()
def decode(model: nr.Transformer, c: nr.Config, batch: int, length: int, bandwidth: float) -> dict:
    """`length` tokens for each of `batch` prompts of 64 tokens.

    Each token has to read the weights, and the keys and values so far.
    """
    never = nr.replace(c, eos_id=c.vocab - 2, other_ends="", response=length)
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


def loops(name: str, c: Any, cache: Path) -> dict:
    """Seconds of an update of a method, and the share of `sample` in them.

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

    method = nr.METHODS[name]
    task = front.make_task(c)
    trainer = front.CachedTrainer(cache)
    policy = nr.gpt_base(task, c, trainer)
    models = method.reward_models(policy, task, c, trainer)
    if method.starts_from is not None:
        policy = method.starts_from(policy, task, c, trainer)
    state = method.start(policy, c)
    if models:
        state.models = models

    spent.clear()
    nr.sample = watched
    began = time.perf_counter()
    try:
        first = c.updates if isinstance(c, nr.DPOConfig) else 5
        updates = len(list(islice(method.loop(state, task, c), first)))
    finally:
        nr.sample = plain
    passed = time.perf_counter() - began
    return {"seconds an update": passed / updates, "of it sampling": sum(spent) / passed}


# What is changed of --config gpu so that `loops` begins soon.
LITTLE = {"demos": 20_000, "base_updates": 100, "start_updates": 40, "reward_updates": 20}


def all_configs(a: argparse.Namespace, model: nr.Transformer | None) -> dict[str, Any]:
    """The config of each method on this machine, for the folder of the model if there is one."""
    numbers = {"data": a.data, "device": nr.pick_device("auto")}
    if a.config == "gpu":
        numbers |= LITTLE
    configs = {name: front.make_config(name, a.config, **numbers) for name in nr.METHODS}
    if model is not None:
        for name, c in configs.items():
            shape = vars(model.config) | {"bf16": c.bf16}
            configs[name] = nr.replace(c, model=str(a.model), **shape)
    return configs


def main() -> int:
    """Measure what is asked for. Exit 1 if a part has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="agree, train, decode, loops; none: all")
    parser.add_argument("--config", default="gpu", choices=front.PRESETS)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--cache", type=Path, default=front.CACHE)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--limit", type=float, default=240.0)
    a = parser.parse_args()
    parts = a.parts or ["agree", "train", "decode", "loops"]

    began = time.perf_counter()
    folder = nr.Transformer.load(a.model) if a.model else None
    configs = all_configs(a, folder)
    c = configs["ppo"]
    model = nr.on_device(folder or nr.Transformer(c, nr.rng(0, "bench")), c)
    small = c.device == "cpu"
    torch.set_float32_matmul_precision("high")
    found: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "machine": platform.machine() if small else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "config": a.config,
        "parameters": sum(p.numel() for p in model.parameters()),
    }

    def note(part: str, measure: Callable, *arguments: Any) -> Any:
        """Measure one thing and write all that is known so far."""
        if time.perf_counter() - began > a.limit:
            found[part] = "no time was left"
        else:
            try:
                found[part] = measure(*arguments)
            except Exception as error:  # one failure must not hide the other numbers
                found[part] = f"failed: {error!r:.300}"
        print(f"{time.perf_counter() - began:6.1f} s  {part}: {found[part]}", flush=True)
        front.write_text(a.out, json.dumps(found, indent=1) + "\n")
        return found[part]

    rows, T, batches, length = 64, 512, (1, 64, 512), 128
    if small:
        rows, T, batches, length = 4, 16, (1, 64), 4
    if "agree" in parts:
        note("agree", agree, c.device)
    measured = note("operations/s and bytes/s", rates, c.device)
    peak, bandwidth = measured if isinstance(measured, tuple) else (math.nan, math.nan)
    if "decode" in parts:
        for n in batches:
            note(f"decode {n}", decode, model, c, n, length, bandwidth)
    if "train" in parts:
        note("train", train, model, c, rows, T, peak)
    if "loops" in parts:
        del model
        for name, its_config in configs.items():
            note(f"loops {name}", loops, name, its_config, a.cache)
    return int(any(str(part).startswith("failed") for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
