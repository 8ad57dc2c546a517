"""Preference rounds and their controls: python notebooks/preferences.py [ARM ...] [--seeds 0 1 2 3 4] [--threads 1]

Each arm is a loop with a few fields changed (or, for SPIN, another function for the pairs). After every round
the policy, and for self_rewarding the judge, is measured on the test problems; the true grader is used here
only. Each run is kept in runs/preferences/ARM-SEED.json and not run again; all of them together make
notebooks/results/preferences.json and preferences.png. Needs the extra `notebooks`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from scipy.stats import kendalltau, spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
from notebooks.jobs import run  # noqa: E402

JOBS = ROOT / "runs" / "preferences"
OUT = ROOT / "notebooks" / "results" / "preferences.json"
LUCKY = {"answers": 4}  # right by luck in one case of four
ARMS = {
    "dpo_nll": ("iterative_dpo", {}),
    "dpo": ("iterative_dpo", {"alpha": 0.0}),
    "sft": ("iterative_dpo", {"preference": "sft_chosen"}),
    "rest_em": ("iterative_dpo", {"preference": "sft_chosen", "restart": True}),
    "one_round": ("iterative_dpo", {"rounds": 1, "round_prompts": 1024, "round_updates": 60}),
    "spin": ("spin", {}),
    "lucky_dpo_nll": ("iterative_dpo", LUCKY),
    "lucky_dpo": ("iterative_dpo", LUCKY | {"alpha": 0.0}),
    "lucky_sft": ("iterative_dpo", LUCKY | {"preference": "sft_chosen"}),
    "self_rewarding": ("self_rewarding", {}),
    "frozen_judge": ("self_rewarding", {"judge": "frozen"}),
    "no_eft": ("self_rewarding", {"judging": 0.0}),
    "one_judgement": ("self_rewarding", {"judgements": 1}),
    "top_sft": ("self_rewarding", {"preference": "sft_chosen"}),
    "own_dpo": ("self_rewarding", {"alpha": 0.0}),
    "task_problems": ("task_problems", {}),
}
DRAWN = ("truth", "score", "spread", "unread", "quoted", "valid", "proposed", "pairs", "length")
WATCHED = (
    "chosen",
    "rejected",
    "chosen_per_token",
    "rejected_per_token",
    "margin",
    "pair_accuracy",
)


def spin(state: dict, task: nr.Task, config: nr.Config) -> Iterator[dict]:
    """SPIN, arXiv 2401.01335: the winner is a careful demonstration, the loser one's own sample."""
    teacher = front.make_task(config, careful=True)

    def against_teacher(
        state, task, rollout, c, u
    ):  # "right" is each prompt's first row, now the teacher's
        first = torch.cat([torch.tensor([True]), rollout.group[1:] != rollout.group[:-1]])
        prompts = [task.decode(x) for x in rollout.prompt[first].tolist()]
        careful = task.encode([teacher.respond(x, nr.rng(c.seed, "teacher", u)) for x in prompts])
        rollout.response[first] = nr.right_pad(careful, c.pad, c.response)
        return first.float(), {"truth": float(nr.grades(task, rollout)[~first].mean())}

    return nr.iterative_dpo(state, task, config, judge=against_teacher)


def task_problems(state: dict, task: nr.Task, config: nr.Config) -> Iterator[dict]:
    """`self_rewarding` on the task's problems: its own scores alone."""
    c = replace(config, samples=config.candidates)
    return nr.iterative_dpo(state, task, c, nr.posed, nr.judged, nr.best_and_worst)


def win_rate(mine: list[float], theirs: list[float]) -> dict[str, float]:
    """Score against score on the same problems; a tie is half a win."""
    ties = mean(a == b for a, b in zip(mine, theirs, strict=True))
    return {"win": mean(a > b for a, b in zip(mine, theirs, strict=True)) + ties / 2, "ties": ties}


def judge_statistics(score: list[list[float]], truth: list[list[float]]) -> dict[str, float]:
    """Scores and true scores of several responses a problem -> how well the judge orders them.

    pairwise: share of truly ordered pairs that it orders the same way, a tie is half; exact: problems with all of
    them right; best5: how often a response that it gives exactly 5 is truly a best one of its problem.
    """
    pairs, exact, best, rho, tau, tied = [], [], [], [], [], []
    for s, t in zip(score, truth, strict=True):
        mine = [
            0.5 + 0.5 * ((s[i] > s[j]) - (s[i] < s[j])) * (1 if t[i] > t[j] else -1)
            for i, j in combinations(range(len(s)), 2)
            if t[i] != t[j]
        ]
        best += [t[i] == max(t) for i in range(len(s)) if s[i] == 5]
        tied.append(len(set(s)) == 1)
        if mine:
            pairs += mine
            exact.append(min(mine) == 1)
            rho.append(0.0 if tied[-1] else spearmanr(s, t).statistic)
            tau.append(0.0 if tied[-1] else kendalltau(s, t).statistic)
    named = {
        "pairwise": pairs,
        "exact": exact,
        "best5": best,
        "spearman": rho,
        "kendall": tau,
        "tied": tied,
    }
    return {name: round(mean(map(float, x)), 4) if x else None for name, x in named.items()}


def measure(arm: str, seed: int, threads: int, cache: Path, **more: Any) -> dict:
    """One arm with one seed: accuracy after each round, the judge's statistics, what was logged."""
    name, fields = ARMS[arm]
    fields = fields | more
    c = replace(nr.Config(), seed=seed, threads=threads, device="cpu", **fields)
    task, began = front.make_task(c), time.time()
    test = task.prompts(c.eval_problems, nr.rng(0, "test"), "test")
    own = name in ("self_rewarding", "task_problems")
    policy = front.seed_model(c, cache) if own else front.base_model(c, cache)
    mine = {
        "spin": (nr.start_rounds, spin),
        "task_problems": (nr.start_self_rewarding, task_problems),
    }
    start, loop = (mine | nr.LOOPS)[name]
    first = nr.frozen_copy(policy)
    seconds, began = {"before": round(time.time() - began, 1)}, time.time()
    state, rounds, logs, texts = start(policy, c), [], [], []
    # what the judges of all rounds read: four responses of M1 to each of 200 problems
    asked = nr.encode_prompts(task, test[:200], c).repeat_interleave(4, 0)
    group = torch.arange(200).repeat_interleave(4)
    fixed = nr.sample(first, asked, c, group=group, generator=nr.rng(seed, "judged responses"))
    problems = [x for x in test[:200] for _ in range(4)]
    truth = [
        task.rubric(x, task.decode(y))
        for x, y in zip(problems, fixed.response.tolist(), strict=True)
    ]

    def look() -> None:
        greedy = nr.respond(policy, task, test, replace(c, temperature=0.0))
        steps = [[step for step, _ in task.steps(ids)] for ids in task.encode(greedy)]
        honest = [
            len(s) > 0 and all(task.step_ok(x, s)) and task.grade(x, y) == 1
            for x, y, s in zip(test, greedy, steps, strict=True)
        ]
        texts.append([task.rubric(x, y) for x, y in zip(test, greedy, strict=True)])
        found = {
            "greedy": mean(task.grade(x, y) for x, y in zip(test, greedy, strict=True)),
            "right for the right reasons": mean(honest),
            "sampled": nr.accuracy(policy, task, test, c, c.temperature),
            "samples": state["samples"],
            "tokens": mean(len(ids) for ids in task.encode(greedy)),
        }
        if own:
            score, _ = nr.judged(state | {"judge": policy}, task, fixed, c, 0)
            rows = lambda flat: [flat[i : i + 4] for i in range(0, len(flat), 4)]  # noqa: E731
            found["judge"] = judge_statistics(rows(score.nan_to_num(0.0).tolist()), rows(truth))
            found["over M1"] = win_rate(texts[-1], texts[0])
            found["over the last"] = win_rate(texts[-1], texts[-2]) if len(texts) > 1 else None
        rounds.append(found)

    look()
    for m in loop(state, task, c):
        if "loss" in m:
            logs.append([round(m[k], 4) for k in WATCHED])
        if state["update"] % c.round_updates == 0:
            look()
            rounds[-1] |= {k: round(m[k], 4) for k in DRAWN if k in m}
    seconds["loop and measuring"] = round(time.time() - began, 1)
    found = {"arm": arm, "seed": seed, "fields": fields, "seconds": seconds, "rounds": rounds}
    return found | {"logs": logs}


def average(curves: list[list[float]]) -> list[float]:
    """Mean over seeds, update by update, as far as all seeds have one."""
    return [round(mean(column), 4) for column in zip(*curves)]  # noqa: B905


def collect() -> dict:
    """All jobs -> OUT: seeds as they are, the curves of each update as means over seeds."""
    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    for arm in ARMS:
        if jobs := [json.loads(path.read_text()) for path in sorted(JOBS.glob(f"{arm}-?.json"))]:
            about = {k: jobs[0][k] for k in ("fields", "threads", "machine", "torch")}
            seeds = " ".join(str(job["seed"]) for job in jobs)
            about["command"] = (
                f"python notebooks/preferences.py {arm} --seeds {seeds} --threads {about['threads']}"
            )
            curves = {
                k: average([[u[i] for u in job["logs"]] for job in jobs])
                for i, k in enumerate(WATCHED)
            }
            each = [{k: job[k] for k in ("seed", "commit", "seconds", "rounds")} for job in jobs]
            kept[arm] = about | {"seeds": each, "curves": curves}
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items())
    front.write_text(OUT, "{\n" + lines + "\n}\n")
    return kept


def over_seeds(kept: dict, arm: str, of: Callable[[list[dict]], float]) -> dict[int, float]:
    """seed -> a number of its rounds."""
    return {job["seed"]: of(job["rounds"]) for job in kept[arm]["seeds"]}


def paired(a: dict[int, float], b: dict[int, float]) -> str:
    """Mean and 95 % interval of the differences by seed."""
    return front.interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def tables(kept: dict) -> str:
    """The README's tables of preference rounds, as Markdown: test problems, mean and 95 % interval over seeds."""

    def cell(arm: str, of: Callable[[list[dict]], float]) -> str:
        try:
            return front.interval(list(over_seeds(kept, arm, of).values()))
        except (IndexError, KeyError, TypeError):
            return ""

    def row(arm: str, title: str, *parts: Callable[[list[dict]], float]) -> str:
        return " | ".join([f"| {title}", *(cell(arm, of) for of in parts)]) + " |"

    def head(*titles: str) -> list[str]:
        return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]

    def greedy(i: int) -> Callable[[list[dict]], float]:
        return lambda rounds: rounds[i]["greedy"]

    rounds = [*map(greedy, (1, 2, 3, 4)), lambda rounds: rounds[-1]["sampled"]]
    named = {
        "dpo_nll": "DPO + NLL (`iterative_dpo`)",
        "sft": "SFT on the chosen",
        "dpo": "DPO alone (`--alpha 0`)",
        "one_round": "one round, twice the pairs and updates",
        "spin": "SPIN",
        "lucky_dpo_nll": "4 answers: DPO + NLL",
        "lucky_sft": "4 answers: SFT",
        "lucky_dpo": "4 answers: DPO alone",
    }
    lines = head("greedy after round", "1", "2", "3", "4", "sampled at the end")
    lines += [row(arm, title, *rounds) for arm, title in named.items() if arm in kept]
    own = [
        greedy(0),
        greedy(1),
        greedy(2),
        lambda rounds: rounds[1]["over M1"]["win"],
        lambda rounds: rounds[2]["over the last"]["win"],
        *((lambda rounds, i=i: rounds[i]["judge"]["pairwise"]) for i in (0, 1, 2)),
    ]
    titles = (
        "M1 greedy",
        "M2",
        "M3",
        "M2 wins over M1",
        "M3 over M2",
        "judge's pairs M1",
        "M2",
        "M3",
    )
    lines += ["", *head("`self_rewarding`", *titles)]
    named = {
        "self_rewarding": "own judge, J = 3",
        "frozen_judge": "judge frozen at M1",
        "one_judgement": "J = 1",
        "top_sft": "SFT on the best",
        "own_dpo": "DPO alone",
        "no_eft": "no EFT",
    }
    lines += [row(arm, title, *own) for arm, title in named.items() if arm in kept]

    differences = [
        ("DPO + NLL minus DPO alone, round 1", "dpo_nll", 1, "dpo", 1),
        ("DPO + NLL minus SFT on the chosen, round 4", "dpo_nll", 4, "sft", 4),
        ("the same with four answers, round 1", "lucky_dpo_nll", 1, "lucky_sft", 1),
        ("the same with four answers, round 4", "lucky_dpo_nll", 4, "lucky_sft", 4),
        ("two rounds minus one with twice the pairs", "dpo_nll", 2, "one_round", 1),
        ("M3: own judge minus judge frozen at M1", "self_rewarding", 2, "frozen_judge", 2),
        ("M3: J = 3 minus J = 1", "self_rewarding", 2, "one_judgement", 2),
        ("M3: pairs minus SFT on the best", "self_rewarding", 2, "top_sft", 2),
    ]
    lines += ["", *head("differences paired by seed", "greedy")]
    for title, a, i, b, j in differences:
        if a in kept and b in kept:
            lines.append(
                f"| {title} | {paired(over_seeds(kept, a, greedy(i)), over_seeds(kept, b, greedy(j)))} |"
            )
    if "self_rewarding" in kept:
        pairs = [
            over_seeds(kept, "self_rewarding", lambda r, i=i: r[i]["judge"]["pairwise"])
            for i in (2, 0)
        ]
        lines.append(f"| judge's pairs in order, M3 minus M1 | {paired(*pairs)} |")
    return "\n".join(lines)


def band(axes: Any, x: Any, seeds: list[list[float]], color: str, label: str, **style: Any) -> None:
    """A curve: mean over seeds, and its 95 % interval as a band. seeds: each seed's values at x."""
    points = list(zip(*seeds, strict=True))
    half = list(map(front.half_width, points))
    low, high = (
        [mean(y) + sign * h for y, h in zip(points, half, strict=True)] for sign in (-1, 1)
    )
    axes.plot(x, [mean(y) for y in points], color=color, label=label, **style)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def picture(kept: dict) -> None:
    """Above the rounds paid by the verifier, below those with an own judge; bands where the JSON has seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1)
    (left, right), (own, judge) = (part.subplots(1, 2) for part in (above, below))

    def rounds(axes, arm: str, label: str, color: str, of, **style) -> None:
        each = [[of(r) for r in job["rounds"]] for job in kept[arm]["seeds"]]
        band(axes, range(len(each[0])), each, color, label, **style)

    def at(axes, y: float, words: str) -> None:
        axes.axhline(y, color="0.4", ls="--", lw=1)
        axes.text(
            0.99,
            y - 0.015,
            words,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="top",
            fontsize=9,
        )

    for arm, label, color in (
        ("dpo_nll", "DPO + NLL", "C0"),
        ("sft", "SFT on the chosen", "C1"),
        ("dpo", "DPO alone", "C2"),
    ):
        rounds(left, arm, label, color, lambda r: r["greedy"])
        right.plot(kept[arm]["curves"]["chosen_per_token"], color=color)
    for arm, label, color, ls in (
        ("self_rewarding", "own judge", "C3", "-"),
        ("frozen_judge", "judge frozen at M1", "C4", (0, (4, 4))),
    ):
        rounds(own, arm, label, color, lambda r: r["greedy"], ls=ls, lw=2)
        rounds(judge, arm, label, color, lambda r: r["judge"]["pairwise"], ls=ls, lw=2)
    at(left, mean(over_seeds(kept, "dpo_nll", lambda r: r[0]["greedy"]).values()), "base")
    at(own, mean(over_seeds(kept, "self_rewarding", lambda r: r[0]["greedy"]).values()), "M1")
    at(judge, 0.5, "chance")
    for update in (30, 60, 90):
        right.axvline(update, color="0.8", lw=1, zorder=0)
    left.set(
        xlabel="round",
        ylabel="greedy accuracy, test",
        ylim=(0, 1),
        xticks=range(5),
        title="iterative_dpo",
    )
    right.set(
        xlabel="update (a line where a round starts)",
        ylabel="log-prob, nats a token",
        ylim=(-0.35, 0.01),
        title="the chosen responses, mean over seeds",
    )
    own.set(ylabel="greedy accuracy, test", title="self_rewarding: the policy")
    judge.set(
        ylabel="share of pairs in the true order", title="self_rewarding: the policy as a judge"
    )
    for axes in (own, judge):
        axes.set(ylim=(0, 1), xlim=(-0.15, 2.15), xticks=range(3), xticklabels=["M1", "M2", "M3"])
    for part, axes in ((above, left), (below, own)):
        part.legend(
            *axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
        )
    nr.write_whole(OUT.with_suffix(".png"), lambda p: figure.savefig(p, format="png", dpi=110))


def main() -> None:
    """Run what is not there yet, then tables and picture of all there is."""
    run(__doc__, ARMS, JOBS, measure)
    kept = collect()
    print(tables(kept))
    picture(kept)


if __name__ == "__main__":
    main()
