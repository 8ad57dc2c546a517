"""What passes and block size do to the diffusion LM: python notebooks/steps.py 0 1 2 3 4 [--threads 1]

For each seed: the base GPT, the masked-diffusion LM that starts from it and its careful twin, all from the
cache; accuracy on the test problems at several (block, passes a block); nats of 500 demonstrations,
exact for the GPT, the bound for the diffusion LM. -> notebooks/results/diffusion.json
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402

OUT = ROOT / "notebooks" / "results" / "diffusion.json"
# places a block, passes a block; the response has 28 places
SCHEDULES = [(1, 1), (4, 4), (7, 7), (28, 28), (4, 2), (7, 4), (28, 14), (4, 1), (7, 2), (28, 7)]

TWINS = 2  # seeds whose careful twin, the ceiling, is trained as well


def count_masks(
    like: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exactly l tokens of each row, l stratified over 1..R: the same bound, less variance.
    -> hidden (B, R), R/l (B, 1)."""
    (B, R), device = like.shape, like.device
    t = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    count = (t[:, None] * R).long() + 1
    rank = torch.rand(B, R, generator=generator).argsort(1).argsort(1)
    return (rank < count).to(device), (R / count).to(device)


@torch.no_grad()
def likelihood_bound(
    model: nr.Transformer,
    prompt: torch.Tensor,
    response: torch.Tensor,
    masks: Callable = count_masks,
    draws: int = 128,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Estimate of the diffusion LM's upper bound on -log p(y | x), (B,), nats, from `draws` masks.

    masks: count_masks, or partial(rate_masks, t_min=0.001); 128 draws as LLaDA. `response` is
    taken as it is: raw canvas, without PAD.
    """
    x, y = prompt.repeat(draws, 1), response.repeat(draws, 1)
    hidden, weight = masks(y, generator)
    parts = zip(*(z.split(1024) for z in (x, y, hidden, weight)), strict=True)
    nll = [nr.masked_nll(model, *part) for part in parts]
    return torch.cat(nll).view(draws, len(prompt)).mean(0)


def measure(seed: int, threads: int, cache: Path) -> dict:
    """One seed's numbers."""
    c = replace(nr.Config(), seed=seed, threads=threads, device="cpu")
    task = front.make_task(c)
    test = task.prompts(c.eval_problems, nr.rng(0, "test"), "test")
    gpt, model = front.base_model(c, cache), front.diffusion_base(c, cache)
    found = {"seed": seed, "gpt": nr.accuracy(gpt, task, test, c)}
    if seed < TWINS:
        found["twin"] = nr.accuracy(front.diffusion_base(c, cache, careful=True), task, test, c)
    for block, steps in SCHEDULES:
        at = replace(c, block=block, block_steps=steps)
        found[f"{block}/{steps}"] = [nr.accuracy(model, task, test, at, t) for t in (0.0, 1.0)]
    generator = nr.rng(seed, "held-out demonstrations")
    demos = [task.demo(generator) for _ in range(500)]
    x = nr.encode_prompts(task, [x for x, _ in demos], c)
    ids = task.encode([y for _, y in demos])
    y = nr.right_pad(ids, c.pad, c.response)
    with torch.no_grad():
        found["gpt_nats"] = -float(nr.token_logprobs(gpt, x, y, 1.0).sum(1).mean())
    y = nr.right_pad(ids, c.eos, c.response)
    found["bound_nats"] = float(
        likelihood_bound(model, x, y, generator=nr.rng(seed, "bound")).mean()
    )
    logs = sorted(cache.glob("diffusion-*/fit.jsonl"), key=lambda path: path.stat().st_mtime)
    found["seconds"] = front.read_lines(logs[-1])[-1]["seconds"]
    return found


def main() -> None:
    """Measure the seeds named and put them beside those that are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=front.CACHE)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    for seed in a.seeds:
        new = measure(seed, a.threads, a.cache)
        there = json.loads(OUT.read_text())["results"] if OUT.exists() else []
        results = sorted([r for r in there if r["seed"] != seed] + [new], key=lambda r: r["seed"])
        about = {
            "command": "python notebooks/steps.py 0 1 2 3 4 --threads 1",
            "commit": subprocess.check_output(
                ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True
            ).strip(),
            "threads": a.threads,
            "machine": f"{platform.machine()}, 2 cores",
            "torch": torch.__version__,
        }
        front.write_text(OUT, json.dumps(about | {"results": results}, indent=1))
        print(json.dumps(new), flush=True)


if __name__ == "__main__":
    main()
