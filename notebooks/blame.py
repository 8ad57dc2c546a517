"""Where each loop puts the blame in the same response: python notebooks/blame.py [--cache FOLDER]

One seed, laptop config, everything trained here or taken from the cache. For a few written responses the signal of
every loop for every token, from the loops' own functions -> notebooks/results/blame.json, which
02_where_the_blame_goes.ipynb draws. About ten minutes on one thread from an empty cache.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402

OUT = ROOT / "notebooks" / "results" / "blame.json"
WRITTEN = (  # problem, response; in the first one the last step forgets to borrow
    ("26+1*2-7=", "26+1=27;27*2=54;54-7=57;#57<eos>"),
    ("26+1*2-7=", "26+1=37;37*2=74;74-7=67;#67<eos>"),
    ("90*3*2=", "#90<eos>"),
    ("26+1*2-7=", "26+1=27;27*2=54;54-7=47;#47<eos>"),
)


def spread(task: nr.Task, response: list[int], per_step: list[float]) -> list[float]:
    """A number of each step on its tokens, that of the whole on the rest."""
    found, begin = [], 0
    for (_, end), x in zip(task.steps(response), per_step, strict=False):
        found += [x] * (end + 1 - begin)
        begin = end + 1
    return found + [per_step[-1]] * (len(response) - begin)


def signals(c: nr.Config, cache: Path) -> list[dict]:
    """For each written response: its tokens, and what every loop says of each of them."""
    task, rounded = front.make_task(c), lambda x: [round(v, 3) for v in x.tolist()]
    trained = {
        name: start(front.STARTS.get(name, front.base_model)(c, cache), c)
        for name, (start, _) in nr.LOOPS.items()
    }
    trained["seq2seq"] |= front.reward_models("seq2seq", c, cache)
    for _ in range(10):  # the critic of ppo has seen some rewards
        next(nr.ppo(trained["ppo"], task, c))
    for _ in nr.refine(trained["refine"], task, c):
        pass
    shown = []
    for x, y in WRITTEN:
        prompt, ids = nr.encode_prompts(task, [x], c), task.encode([y])[0]
        response = nr.right_pad([ids], c.pad, c.response)
        mask, place = nr.up_to_eos(response, c), torch.arange(c.response)[None]
        b = nr.Rollout(prompt, response, mask, place, torch.zeros(1, dtype=torch.long))
        truth, n, found = nr.grades(task, b), len(ids), {}
        # ppo: the verifier, and the critic's advantages before whitening
        seen = nr.annotate(trained["ppo"], b, c)
        reward = nr.verifier({}, task, b, truth, c)
        found["ppo: reward"] = rounded(reward[0, :n])
        found["ppo gae: advantage"] = rounded(
            nr.gae(reward, seen.value, mask, c.gamma, c.lam)[0][0, :n]
        )
        # ppo grpo: against seven samples of the base
        base = front.base_model(c, cache)
        others = nr.sample(base, prompt.repeat(7, 1), c, generator=nr.rng(c.seed, "others"))
        scores = torch.cat([truth, nr.grades(task, others)])
        found["ppo grpo: advantage"] = [
            round(float(nr.group_advantage(scores, scores.long() * 0, "grpo")[0]), 3)
        ] * n
        # iterative_dpo: the gradient's weight on this response as the rejected (or chosen) one of a pair
        side = 1 if truth[0] else -1
        found["iterative_dpo: weight"] = [side * c.dpo_beta / 2] * n
        # self_rewarding: the judge's y or n after each step, its score for the rest
        judge = nr.sample(
            trained["self_rewarding"]["judge"],
            torch.tensor([[c.bos, *task.judge_prompt(prompt[0].tolist(), ids)]]),
            nr.replace(c, temperature=0.0),
        )
        said = task.decode(judge.response[0].tolist())
        score = nr.parse_score(said)
        marks = [1.0 if mark == "y" else 0.0 for mark in said if mark in "yn"] + [(score or 0) / 5]
        found["self_rewarding: judge"] = spread(task, ids, marks)
        # seq2seq: the rewriter's agreement, token by token
        found["seq2seq: agreement"] = rounded(
            nr.agreement(trained["seq2seq"], task, b, truth * 0, c)[0, :n]
        )
        # refine: ORM and SORM behind every step
        ends = nr.prefix_ends(task, b)
        with torch.no_grad():
            scores = nr.step_scores(trained["refine"], prompt, response, ends).sigmoid()
        for name, s in zip(("ORM", "SORM"), scores[:, 0], strict=True):
            found[f"refine: {name}"] = spread(task, ids, rounded(s[ends[0] > 0]))
        # denoise: what the state before each token was worth, written from left to right; and what each token added
        many, order = (
            nr.replace(c, branches=64),
            place.clamp(max=n),
        )  # what follows the end comes last
        b = nr.Rollout(prompt, response.masked_fill(mask == 0, c.eos), mask, order, b.group)
        _, _, value = front.trajectory(trained["denoise"], task, b, many)
        value = torch.cat([value[0, :n], truth])  # the end is worth what it is
        found["denoise: V(x_t)"] = rounded(value[:-1])
        found["denoise: added"] = rounded(value.diff())
        shown.append(
            {
                "problem": x,
                "response": y,
                "right": bool(truth[0]),
                "judgement": said,
                "tokens": [task.tokenizer.id_to_token(i) for i in ids],
                "signals": found,
            }
        )
    return shown


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=front.CACHE)
    a = parser.parse_args()
    torch.set_num_threads(1)
    c = nr.Config(threads=1, device="cpu")
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)[
        :7
    ]
    about = {
        "command": "python notebooks/blame.py",
        "seed": c.seed,
        "commit": commit,
        "threads": 1,
        "machine": f"{platform.machine()}, 2 cores",
        "torch": torch.__version__,
    }
    front.write_text(OUT, json.dumps(about | {"responses": signals(c, a.cache)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
