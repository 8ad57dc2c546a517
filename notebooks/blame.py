"""Where each loop puts the blame in the same response: python notebooks/blame.py [--cache FOLDER]

One seed, laptop config, everything trained here or taken from the cache. For a few written
responses the signal of every loop for every token, from the loops' own functions
-> notebooks/results/blame.json, which 02_where_the_blame_goes.ipynb draws. About ten minutes on one
thread from an empty cache.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
from notebooks.jobs import LAPTOP, about, config  # noqa: E402

OUT = ROOT / "notebooks" / "results" / "blame.json"
# Problem and response; in the first one the last step forgets to borrow.
WRITTEN = (
    ("26+1*2-7=", "26+1=27;27*2=54;54-7=57;#57<eos>"),
    ("26+1*2-7=", "26+1=37;37*2=74;74-7=67;#67<eos>"),
    ("90*3*2=", "#90<eos>"),
    ("26+1*2-7=", "26+1=27;27*2=54;54-7=47;#47<eos>"),
)


def spread(task: nr.Task, response: list[int], per_step: list[float]) -> list[float]:
    """A number of each step on its tokens, that of the whole on the rest."""
    found: list[float] = []
    for (_, end), x in zip(task.steps(response), per_step, strict=False):
        found += [x] * (end + 1 - len(found))
    return found + [per_step[-1]] * (len(response) - len(found))


class Trained:
    """A method after its training: its config and its state."""

    def __init__(self, name: str, task: nr.Task, c: Any, train: nr.Trainer):
        method = nr.METHODS[name]
        self.c = c
        base = nr.gpt_base(task, c, train)
        policy = base
        if method.starts_from is not None:
            policy = method.starts_from(base, task, c, train)
        models = method.reward_models(base, task, c, train)
        self.state = method.start(policy, c)
        if models:
            self.state.models = models


def of_ppo(ppo: Trained, base: nr.Transformer, task: nr.Task, b: nr.Rollout) -> dict[str, list]:
    """The verifier, the critic's advantages before whitening, and GRPO among others of the base."""
    c = ppo.c
    truth = nr.grades(task, b)
    seen = nr.annotate(ppo.state, b, c)
    reward = nr.verifier(ppo.state, task, b, truth, c)
    adv, _ = nr.gae(reward, seen.value, b.mask, 1.0, c.lam)
    n = int(b.mask.sum())
    # Against seven samples of the base.
    others = nr.sample(base, b.prompt.repeat(7, 1), c, generator=nr.rng(c.seed, "others"))
    scores = torch.cat([truth, nr.grades(task, others)])
    group = torch.zeros(len(scores), dtype=torch.long)
    compared = nr.group_advantage(scores, group, "grpo")[0]
    return {
        "ppo: reward": nr.rounded(reward[0, :n]),
        "ppo gae: advantage": nr.rounded(adv[0, :n]),
        "ppo grpo: advantage": [round(float(compared), 3)] * n,
    }


def of_judge(judge: Trained, task: nr.Task, b: nr.Rollout, ids: list[int]) -> tuple[str, list]:
    """What the judge writes, and its y or n for each step with its score for the rest."""
    c = judge.c
    asked = torch.tensor([[c.bos_id, *task.judge_prompt(b.prompt[0].tolist(), ids)]])
    written = nr.sample(judge.state.judge, asked, replace(c, temperature=0.0)).response
    said = task.decode(written[0].tolist())
    marks = [float(mark == "y") for mark in said if mark in "yn"]
    return said, spread(task, ids, [*marks, (nr.parse_score(said) or 0) / 5])


@torch.no_grad()
def of_refine(refine: Trained, task: nr.Task, b: nr.Rollout, ids: list[int]) -> dict[str, list]:
    """ORM and SORM behind every step."""
    ends = nr.prefix_ends(task, b)
    found = {}
    for name, scorer in (("ORM", refine.state.orm), ("SORM", refine.state.sorm)):
        score = scorer.at(b.prompt, b.response, ends).sigmoid()[0]
        found[f"refine: {name}"] = spread(task, ids, nr.rounded(score[ends[0] > 0]))
    return found


@torch.no_grad()
def of_denoise(denoise: Trained, task: nr.Task, b: nr.Rollout) -> dict[str, list]:
    """What the state before each token was worth, and what the token added.

    The response is taken as written from left to right.
    """
    c = replace(denoise.c, branches=64)
    n = int(b.mask.sum())
    truth = nr.grades(task, b)
    # What follows the end comes last.
    order = torch.arange(c.response)[None].clamp(max=n)
    response = b.response.masked_fill(b.mask == 0, c.eos_id)
    b = nr.Rollout(b.prompt, response, b.mask, order, b.group)
    t = torch.arange(int(order.max()) + 1)
    state = denoise.state
    generator = nr.rng(c.seed, "trajectory", state.update)
    more = nr.same_canvas(state, b.select(t * 0), t, c, generator)
    value = nr.grades(task, more).view(len(t), c.branches).mean(1)
    value = torch.cat([value[:n], truth])  # the end is worth what it is
    return {
        "denoise: V(x_t)": nr.rounded(value[:-1]),
        "denoise: added": nr.rounded(value.diff()),
    }


def signals(
    cache: Path, seed: int, threads: int, sizes: dict[str, dict] = LAPTOP, **more: Any
) -> list[dict]:
    """For each written response: its tokens, and what every loop says of each of them."""
    train = front.CachedTrainer(cache)
    trained = {}
    for name in nr.METHODS:
        each = config(name, seed, threads, sizes, **more)
        trained[name] = Trained(name, front.make_task(each), each, train)
    c = trained["ppo"].c
    task = front.make_task(c)
    for _ in range(10):  # the critic of ppo has seen some rewards
        next(nr.ppo(trained["ppo"].state, task, c))
    for _ in nr.refine(trained["refine"].state, task, trained["refine"].c):
        pass
    base = nr.gpt_base(task, c, train)
    seq2seq = trained["seq2seq"]
    beta = trained["iterative_dpo"].c.beta
    shown = []
    for x, y in WRITTEN:
        ids = task.encode([y])[0]
        b = front.as_rollout(task, [x], [y], c)
        b.order = torch.arange(c.response)[None]
        truth = nr.grades(task, b)
        found = of_ppo(trained["ppo"], base, task, b)
        # The gradient's weight on this response as the rejected (or chosen) one of a pair.
        side = 1 if truth[0] else -1
        found["iterative_dpo: weight"] = [side * beta / 2] * len(ids)
        said, marks = of_judge(trained["self_rewarding"], task, b, ids)
        found["self_rewarding: judge"] = marks
        agreement = nr.agreement(seq2seq.state, task, b, truth, seq2seq.c)
        found["seq2seq: agreement"] = nr.rounded(agreement[0, : len(ids)])
        found |= of_refine(trained["refine"], task, b, ids)
        found |= of_denoise(trained["denoise"], task, b)
        shown.append(
            {
                "problem": x,
                "response": y,
                "right": bool(truth[0]),
                "judgement": said,
                "tokens": [task.decode([i]) for i in ids],
                "signals": found,
            }
        )
    return shown


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=front.CACHE)
    a = parser.parse_args()
    torch.set_num_threads(1)
    kept = {"command": "python notebooks/blame.py", "seed": 0} | about(threads=1)
    kept["responses"] = signals(a.cache, seed=0, threads=1)
    front.write_text(OUT, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
