"""What passes and block size do to the diffusion LM: python notebooks/steps.py 0 1 2 3 4

For each seed: the base GPT, the masked-diffusion LM that starts from it and its careful twin, all
from the cache; accuracy on the test problems at several (block, passes a block); nats of 500
demonstrations, exact for the GPT, the bound for the diffusion LM.
-> notebooks/results/diffusion.json
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
from notebooks.jobs import LAPTOP, about, config  # noqa: E402

OUT = ROOT / "notebooks" / "results" / "diffusion.json"
# Places of a block, and its passes; the response has 28 places.
SCHEDULES = [(1, 1), (4, 4), (7, 7), (28, 28), (4, 2), (7, 4), (28, 14), (4, 1), (7, 2), (28, 7)]
# Seeds whose careful twin, the ceiling, is trained as well.
TWINS = 2


def count_masks(like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mask exactly n tokens of each row of `like` (B, R) -> is_mask (B, R) and R / n (B, 1).

    n is stratified over 1..R. The bound is the one of `nr.rate_masks`, with less variance.
    """
    B, R = like.shape
    t = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    count = (t[:, None] * R).long() + 1
    rank = torch.rand(B, R, generator=generator).argsort(1).argsort(1)
    return (rank < count).to(like.device), (R / count).to(like.device)


@torch.no_grad()
def likelihood_bound(
    model: nr.Transformer,
    prompt: Tensor,
    response: Tensor,
    masks: Callable = count_masks,
    draws: int = 128,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate of the diffusion LM's upper bound on -log p(y | x), (B,), nats, from `draws` masks.

    masks: count_masks, or partial(nr.rate_masks, t_min=0.001); 128 draws as LLaDA. `response` is
    taken as it is: a whole canvas, without PAD.
    """
    x = prompt.repeat(draws, 1)
    y = response.repeat(draws, 1)
    is_mask, weight = masks(y, generator)
    parts = zip(*(z.split(1024) for z in (x, y, is_mask, weight)), strict=True)
    nll = [nr.masked_nll(model, *part) for part in parts]
    return torch.cat(nll).view(draws, len(prompt)).mean(0)


def measure(
    seed: int, threads: int, cache: Path, sizes: dict[str, dict] = LAPTOP, **more: float
) -> dict:
    """One seed's numbers."""
    c = config("denoise", seed, threads, sizes, **more)
    task = front.make_task(c)
    train = front.CachedTrainer(cache)
    test = task.prompts(c.eval_problems, nr.rng(0, "test"), "test")
    gpt = nr.gpt_base(task, c, train)
    model = nr.diffusion_base(gpt, task, c, train)
    found = {"seed": seed, "gpt": nr.accuracy(gpt, task, test, c)}
    if seed < TWINS:
        careful = front.make_task(c, careful=True)
        train = front.CachedTrainer(cache, "careful-")
        twin = nr.diffusion_base(nr.gpt_base(careful, c, train), careful, c, train)
        found["twin"] = nr.accuracy(twin, task, test, c)
    for block, passes in SCHEDULES:
        at = replace(c, block=block, block_passes=passes)
        found[f"{block}/{passes}"] = [nr.accuracy(model, task, test, at, t) for t in (0.0, 1.0)]

    generator = nr.rng(seed, "held-out demonstrations")
    demos = [task.demo(generator) for _ in range(500)]
    prompt = nr.encode_prompts(task, [x for x, _ in demos], c)
    ids = task.encode([y for _, y in demos])
    response = nr.right_pad(ids, c.pad_id, c.response)
    with torch.no_grad():
        logp = nr.token_logprobs(gpt, prompt, response, 1.0)
    found["gpt_nats"] = -float(logp.sum(1).mean())
    canvas = nr.right_pad(ids, c.eos_id, c.response)
    bound = likelihood_bound(model, prompt, canvas, generator=nr.rng(seed, "bound"))
    found["bound_nats"] = float(bound.mean())
    logs = sorted(cache.glob("diffusion-*/fit.jsonl"), key=lambda path: path.stat().st_mtime)
    found["seconds"] = front.read_lines(logs[-1], named=False)[-1]["seconds"]
    return found


def main() -> None:
    """Measure the seeds named and put them beside those that are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=front.CACHE)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    for seed in a.seeds:
        new = measure(seed, a.threads, a.cache)
        there = json.loads(OUT.read_text())["results"] if OUT.exists() else []
        results = sorted([r for r in there if r["seed"] != seed] + [new], key=lambda r: r["seed"])
        kept = {"command": "python notebooks/steps.py 0 1 2 3 4 --threads 1"}
        kept |= about(a.threads) | {"results": results}
        front.write_text(OUT, json.dumps(kept, indent=1))
        print(json.dumps(new), flush=True)


if __name__ == "__main__":
    main()
