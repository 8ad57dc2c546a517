"""Preference rounds and their controls: python notebooks/preferences.py [ARM ...]

Each arm is a method with a few numbers changed, or with a loop of its own that only stands here.
After every round the policy, and for self_rewarding the judge, is measured on the test problems;
the true grader is used here only. Each run is kept in runs/preferences/ARM-SEED.json and not run
again; all of them together make notebooks/results/preferences.json and preferences.png. Needs the
extra `notebooks`.

The judge's rule, written before the runs: it gets better if M3 puts more pairs in order than M1 by
the mean of three judgements, it is worth something if M3 with its own judge is right more often
than with M1 as a judge, and agreement teaches what is true if its pairs beat the same pairs turned
round by a coin; each by an interval above zero. What one judgement says, and what eight say
together, was looked at beside it.
"""

import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
from data.arithmetic import Arithmetic  # noqa: E402
from notebooks.jobs import (  # noqa: E402
    LAPTOP,
    about_arm,
    config,
    head,
    parted,
    read_arms,
    read_jobs,
    row,
    run,
    write_arms,
)

JOBS = ROOT / "runs" / "preferences"
OUT = ROOT / "notebooks" / "results" / "preferences.json"


# ---- loops that only stand here -----------------------------------------------------------------


def any_judgements(
    state: nr.SelfRewardingState, task: nr.Task, c: nr.SelfRewardingConfig
) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    """The pairs of `nr.judgement_pairs` without what they say: a coin tells which is the better."""
    [pairs], metrics = nr.judgement_pairs(state, task, c)
    heads = torch.rand(len(pairs["prompt"]), generator=nr.rng(c.seed, "coin", state.update)) < 0.5
    pairs["response"][heads] = pairs["response"][heads].flip(1)
    return [pairs], metrics


def other_problem(problem: str, draw: random.Random) -> str | None:
    """The problem with another operand behind one of its + and -; None if it has none."""
    places = [match.start() for match in re.finditer("(?<=[+-])[1-9]", problem)]
    if not places:
        return None
    at = draw.choice(places)
    return problem[:at] + draw.choice("123456789".replace(problem[at], "")) + problem[at + 1 :]


def altered_problems(
    state: nr.SelfRewardingState, task: nr.Task, c: nr.SelfRewardingConfig
) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    """Self-Taught Evaluators, arXiv 2408.02666: a response to another problem is known to be worse.

    The response of each problem that has the highest score, from 4.5 on, is judged once more beside
    a problem with another operand. Of these judgements the lowest score is the better one, of those
    of the response itself the highest. The latter are repeated until they are as many.
    """
    u = state.update
    draw = random.Random(f"{c.seed} altered {u}")
    kept = state.judgements
    mean_score = readable(kept["score"]).nanmean(1).nan_to_num(-1.0)
    b = state.judged
    rows, problems = [], []
    for group in b.group.unique().tolist():
        at = (b.group == group).nonzero()[:, 0]
        best = int(at[mean_score[at].argmax()])
        problem = other_problem(task.decode(b.prompt[best].tolist()), draw)
        if mean_score[best] >= 4.5 and problem and task.problem(problem):
            rows.append(best)
            problems.append(problem)
    if not rows:
        return [], {"judgement_pairs": 0}
    prompt = nr.encode_prompts(task, problems, c)
    worse = nr.Rollout(prompt, b.response[rows], b.mask[rows], b.order[rows], b.group[rows])
    nr.judged(state, task, worse, c, u + 1_000_000)
    asked_again, state.judgements = state.judgements, kept
    itself = {name: x[rows] for name, x in kept.items()}
    low = by_score(asked_again, lowest=True)
    high = by_score(itself, lowest=False)
    times = -(-len(low["prompt"]) // max(1, len(high["prompt"])))
    high = {name: x.repeat(times, *[1] * (x.dim() - 1)) for name, x in high.items()}
    high = {name: x[: len(low["prompt"])] for name, x in high.items()}
    return [low, high], {"judgement_pairs": len(low["prompt"]) + len(high["prompt"])}


def readable(score: Tensor) -> Tensor:
    """Scores as the state has them, but NaN where none could be read."""
    return score.masked_fill(score < 0, torch.nan)


def by_score(judgements: dict[str, Tensor], lowest: bool) -> dict[str, Tensor]:
    """Pairs of judgements of one response: the lowest score against the highest, or vice versa.

    Judgements that cannot be read are left out.
    """
    score = readable(judgements["score"])
    none = score.isnan()
    least, low = score.masked_fill(none, torch.inf).min(1)
    most, high = score.masked_fill(none, -torch.inf).max(1)
    differ = least < most
    row = torch.arange(len(score))[:, None]
    order = torch.stack([low, high] if lowest else [high, low], 1)
    return {
        "prompt": judgements["prompt"][differ],
        "response": judgements["response"][row, order][differ],
    }


nr.PAIRED |= {"any": any_judgements, "altered": altered_problems}


def watching(
    state: nr.SelfRewardingState, task: nr.Task, c: nr.SelfRewardingConfig
) -> Iterator[dict[str, Any]]:
    """`self_rewarding`, whose state also knows what was judged."""

    def judge(state: Any, task: nr.Task, b: nr.Rollout, c: Any, u: int) -> tuple:
        state.judged = b
        return nr.judged(state, task, b, c, u)

    more_pairs = nr.PAIRED[c.paired]
    return nr.iterative_dpo(state, task, c, nr.pose_problems, judge, nr.best_and_worst, more_pairs)


def first_rejects(
    state: nr.SelfRewardingState, task: nr.Task, c: nr.SelfRewardingConfig
) -> Iterator[dict[str, Any]]:
    """Temporal self-rewarding, arXiv 2508.06026: the worse response is M1's.

    The second half of each group is drawn from M1, and the first half holds the better response.
    """
    first = nr.frozen_copy(state.policy)
    half = c.samples // 2

    def judge(state: Any, task: nr.Task, b: nr.Rollout, c: Any, u: int) -> tuple:
        old = torch.arange(len(b.group)) % c.samples >= half
        drawn = nr.sample(first, b.prompt[old], c, generator=nr.rng(c.seed, "of M1", u))
        b.response[old] = drawn.response
        b.mask[old] = drawn.mask
        return nr.judged(state, task, b, c, u)

    def pair(score: Tensor, group: Tensor, c: nr.DPOConfig) -> Tensor:
        pairs = []
        for rows in torch.arange(len(group)).split(c.samples):
            new = rows[:half][~score[rows[:half]].isnan()]
            old = rows[half:][~score[rows[half:]].isnan()]
            if len(new) and len(old):
                best, worst = new[score[new].argmax()], old[score[old].argmin()]
                if score[best] > score[worst]:
                    pairs.append((int(best), int(worst)))
        return torch.tensor(pairs, dtype=torch.long).view(-1, 2)

    more_pairs = nr.PAIRED[c.paired]
    return nr.iterative_dpo(state, task, c, nr.pose_problems, judge, pair, more_pairs)


@dataclass(frozen=True)
class SolvesFirst(Arithmetic):
    """Arithmetic whose judge writes its own solution in front of its judgement."""

    def judgement(self, prompt: str, response: str) -> str:
        """What a judge should write: `37+5=42;42*3=26;#26` and behind it what it writes anyway."""
        careful = replace(self, careful=True, planted="none")
        solution = Arithmetic.respond(careful, prompt, nr.rng(0, "careful"))
        return solution.removesuffix("<eos>") + super().judgement(prompt, response)


@dataclass(frozen=True)
class OneChoice(Arithmetic):
    """Arithmetic whose judge writes its score at once, as one answer of a multiple choice."""

    def judgement(self, prompt: str, response: str) -> str:
        """What a judge should write: `!4`, and no check of the steps in front of it."""
        return f"!{self.rubric(prompt, response)}<eos>"


def m1_called(called: str) -> Callable[..., nr.Transformer]:
    """M1 of a task whose judge writes something else, under a name of its own.

    The cache does not know the task's class.
    """

    def start(
        base: nr.Transformer, task: nr.Task, c: nr.SelfRewardingConfig, train: nr.Trainer
    ) -> nr.Transformer:
        def trained(name: str, *about: Any, **more: Any) -> None:
            train(called, *about, **more)

        return nr.m1(base, task, c, trained)

    return start


# ---- arms ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A method, the numbers that are changed, and the loop if it is not the method's own."""

    method: str
    numbers: dict[str, Any] = field(default_factory=dict)
    loop: Callable | None = None
    # What is changed of the task, and of the model that the loop starts from.
    task: Callable[[Any], nr.Task] = front.make_task
    starts_from: Callable | None = None


SFT = {"arm": "sft_chosen"}
# Right by luck in one case of four.
LUCKY = {"answers": 4}
# As in the paper pairs of solutions alone, and three judgements of each; the loss is ours.
PLAIN = {"paired": "solutions", "judgements": 3, "updates": 30}
ARMS = {
    "dpo_nll": Arm("iterative_dpo"),
    "dpo": Arm("iterative_dpo", {"alpha": 0.0}),
    "sft": Arm("iterative_dpo", SFT),
    "one_round": Arm("iterative_dpo", {"rounds": 1, "prompts": 1024, "updates": 60}),
    "lucky_dpo_nll": Arm("iterative_dpo", LUCKY),
    "lucky_dpo": Arm("iterative_dpo", LUCKY | {"alpha": 0.0}),
    "lucky_sft": Arm("iterative_dpo", LUCKY | SFT),
    "self_rewarding": Arm("self_rewarding"),
    "frozen_judge": Arm("self_rewarding", {"judge": "frozen"}),
    "any_judgements": Arm("self_rewarding", {"paired": "any"}),
    "solutions": Arm("self_rewarding", {"paired": "solutions"}),
    "altered": Arm("self_rewarding", {"paired": "altered"}, watching),
    "first_rejects": Arm("self_rewarding", {}, first_rejects),
    "solves_first": Arm(
        "self_rewarding",
        {"response": 44},
        task=lambda c: SolvesFirst(**vars(front.make_task(c))),
        starts_from=m1_called("m1-solves-first"),
    ),
    "plain": Arm("self_rewarding", PLAIN),
    "plain_frozen": Arm("self_rewarding", PLAIN | {"judge": "frozen"}),
    "no_eft": Arm("self_rewarding", PLAIN | {"judging": 0.0}),
    "one_judgement": Arm("self_rewarding", PLAIN | {"judgements": 1}),
    "top_sft": Arm("self_rewarding", PLAIN | SFT),
    "own_dpo": Arm("self_rewarding", PLAIN | {"alpha": 0.0}),
    "one_choice": Arm(
        "self_rewarding",
        PLAIN,
        task=lambda c: OneChoice(**vars(front.make_task(c))),
        starts_from=m1_called("m1-one-choice"),
    ),
}
# Arms whose judge stands in the tables.
LOOKED_AT = (
    "self_rewarding",
    "frozen_judge",
    "any_judgements",
    "solutions",
    "altered",
    "first_rejects",
    "solves_first",
    "plain",
    "plain_frozen",
)
# What is kept of a round, and of an update.
DRAWN = (
    "truth",
    "score",
    "spread",
    "unread",
    "quoted",
    "valid",
    "proposed",
    "pairs",
    "judgement_pairs",
    "length",
)
WATCHED = (
    "chosen",
    "rejected",
    "chosen_per_token",
    "rejected_per_token",
    "margin",
    "pair_accuracy",
)


# ---- what is measured ---------------------------------------------------------------------------


def win_rate(mine: list[float], theirs: list[float]) -> dict[str, float]:
    """Score against score on the same problems; a tie is half a win."""
    ties = mean(a == b for a, b in zip(mine, theirs, strict=True))
    return {"win": mean(a > b for a, b in zip(mine, theirs, strict=True)) + ties / 2, "ties": ties}


def in_true_order(score: Tensor, truth: Tensor) -> float:
    """Scores and true scores (problems, responses) -> how many pairs the scores order truly.

    It is a share of the pairs of one problem whose true scores differ. A tie of the scores is half.
    """
    i, j = torch.triu_indices(*[truth.shape[1]] * 2, offset=1)
    true = (truth[:, i] - truth[:, j]).sign()
    said = (score[:, i] - score[:, j]).sign()
    return float((0.5 + 0.5 * true * said)[true != 0].mean())


class Judged:
    """What the judges of all rounds read: eight responses of M1 to each test problem.

    One look is noisy: with four responses to each of 200 problems, which are 370 to 410 pairs, five
    looks at one judge differed by 0.010 to 0.019 (standard deviation, two seeds of dev). With eight
    responses to each of 800 problems, which are 7,500 pairs, it was 0.003. Here there are up to 500
    problems, and two looks with three judgements each are averaged.
    """

    PROBLEMS = 500
    EACH = 8
    JUDGEMENTS = 8

    def __init__(self, first: nr.Transformer, task: nr.Task, test: list[str], c: nr.Config):
        test = test[: self.PROBLEMS]
        problems = [x for x in test for _ in range(self.EACH)]
        prompt = nr.encode_prompts(task, problems, c)
        group = torch.arange(len(problems)) // self.EACH
        generator = nr.rng(c.seed, "judged responses")
        self.b = nr.sample(first, prompt, c, group=group, generator=generator)
        both = zip(problems, self.b.response.tolist(), strict=True)
        truth = [task.rubric(x, task.decode(y)) for x, y in both]
        self.truth = torch.tensor(truth).view(len(test), self.EACH).float()

    def statistics(
        self, state: nr.SelfRewardingState, task: nr.Task, c: nr.SelfRewardingConfig
    ) -> dict[str, Any]:
        """How well the policy judges them as it is now, with each number of judgements.

        Several disjoint sets of so many judgements are asked, and their shares averaged. Beside it,
        for four responses to each of 200 problems and the first c.judgements: the same share, and
        how many problems have one score for all.
        """
        look = replace(state, judge=state.policy)
        nr.judged(look, task, self.b, replace(c, judgements=self.JUDGEMENTS), 0)
        score = readable(look.judgements["score"])  # (responses, 8)

        def average(part: Tensor) -> Tensor:
            """The mean score of each response by these judgements, (problems, responses)."""
            return part.nanmean(1).nan_to_num(0.0).view_as(self.truth)

        found: dict[str, Any] = {"ordered pairs": int(self.count()), "in order": {}}
        for J in (1, 3, 8):
            looks = []
            for part in score.split(J, dim=1):
                if part.shape[1] == J:
                    looks.append(in_true_order(average(part), self.truth))
            found["in order"][str(J)] = round(mean(looks), 4)
        few = average(score[:, : c.judgements])[:200, :4]
        found["pairwise"] = round(in_true_order(few, self.truth[:200, :4]), 4)
        found["tied"] = round(float((few == few[:, :1]).all(1).float().mean()), 4)
        return found

    def count(self) -> Tensor:
        """How many pairs have a true order."""
        i, j = torch.triu_indices(self.EACH, self.EACH, offset=1)
        return (self.truth[:, i] != self.truth[:, j]).sum()


def rightly_right(task: nr.Task, problem: str, response: str, ids: list[int]) -> bool:
    """Whether the answer is right and all written steps are, of which there is at least one."""
    steps = [step for step, _ in task.steps(ids)]
    honest = len(steps) > 0 and all(task.step_ok(problem, steps))
    return honest and task.grade(problem, response) == 1


def known(x: float) -> float | None:
    """Four decimals of it; None of the scores of a judge of whom nothing can be read."""
    return None if isnan(x) else round(x, 4)


def measure(
    arm: str,
    seed: int,
    threads: int,
    cache: Path,
    /,
    sizes: dict[str, dict] = LAPTOP,
    starts_from: Callable | None = None,
    **more: Any,
) -> dict:
    """One arm with one seed: accuracy after each round, the judge's statistics, what was logged.

    starts_from: makes the model that the loop starts from, in place of the method's own function.
    """
    method = nr.METHODS[ARMS[arm].method]
    changed = ARMS[arm].numbers | more
    c = config(ARMS[arm].method, seed, threads, sizes, **changed)
    task = ARMS[arm].task(c)
    began = time.time()
    test = task.prompts(c.eval_problems, nr.rng(0, "test"), "test")
    train = front.CachedTrainer(cache)
    policy = nr.gpt_base(task, c, train)
    if start := starts_from or ARMS[arm].starts_from or method.starts_from:
        policy = start(policy, task, c, train)
    seconds = {"before": round(time.time() - began, 1)}

    began = time.time()
    own = ARMS[arm].method == "self_rewarding"
    state = method.start(policy, c)
    fixed = Judged(policy, task, test, c) if own else None
    rubrics: list[list[float]] = []

    def look() -> dict[str, Any]:
        texts = nr.respond(policy, task, test, replace(c, temperature=0.0))
        all_ids = task.encode(texts)
        rubrics.append([task.rubric(x, y) for x, y in zip(test, texts, strict=True)])
        each = list(zip(test, texts, all_ids, strict=True))
        found = {
            "greedy": mean(task.grade(x, y) for x, y, _ in each),
            "right for the right reasons": mean(rightly_right(task, *one) for one in each),
            "sampled": nr.accuracy(policy, task, test, c, c.temperature),
            "samples": state.samples,
            "tokens": mean(len(ids) for ids in all_ids),
        }
        if own:
            found["judge"] = fixed.statistics(state, task, c)
            found["over M1"] = win_rate(rubrics[-1], rubrics[0])
            found["over the last"] = (
                win_rate(rubrics[-1], rubrics[-2]) if len(rubrics) > 1 else None
            )
        return found

    rounds = [look()]
    logs = []
    loop = ARMS[arm].loop or method.loop
    for m in loop(state, task, c):
        if "loss" in m:
            logs.append([round(m[key], 4) for key in WATCHED])
        if state.update % c.updates == 0:
            rounds.append(look() | {key: known(m[key]) for key in DRAWN if key in m})
    seconds["loop and measuring"] = round(time.time() - began, 1)
    return {
        "arm": arm,
        "seed": seed,
        "fields": changed,
        "problems": c.prompts,
        "seconds": seconds,
        "rounds": rounds,
        "logs": logs,
    }


# ---- what the README shows ----------------------------------------------------------------------


def average(curves: list[list[float]]) -> list[float]:
    """Mean over seeds, update by update, as far as all seeds have one."""
    return [round(mean(column), 4) for column in zip(*curves, strict=False)]


def collect() -> dict:
    """All jobs -> OUT: seeds as they are, the curves of each update as means over seeds."""
    kept = read_arms(OUT)
    for arm in ARMS:
        if jobs := read_jobs(JOBS, arm):
            curves = {}
            for i, key in enumerate(WATCHED):
                seeds = [[update[i] for update in job["logs"]] for job in parted(jobs)[0]]
                curves[key] = average(seeds)
            each = [{k: job[k] for k in ("seed", "commit", "seconds", "rounds")} for job in jobs]
            shown, more = parted(each)
            kept[arm] = {"fields": jobs[0]["fields"]} | about_arm("preferences", arm, jobs)
            kept[arm] |= {"seeds": shown, "more seeds": more, "curves": curves}
    write_arms(OUT, kept)
    return kept


def over_seeds(kept: dict, arm: str, of: Callable[[list[dict]], float]) -> dict[int, float]:
    """seed -> a number of its rounds."""
    return {job["seed"]: of(job["rounds"]) for job in kept[arm]["seeds"]}


def difference(a: dict[int, float], b: dict[int, float]) -> str:
    """Mean and 95 % interval of the differences by seed."""
    return front.interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def greedy(i: int) -> Callable[[list[dict]], float]:
    """Greedy accuracy after round i."""
    return lambda rounds: rounds[i]["greedy"]


def in_order(i: int, J: str = "3") -> Callable[[list[dict]], float]:
    """The judge's share of pairs in order after round i, by the mean of J judgements."""
    return lambda rounds: rounds[i]["judge"]["in order"][J]


def tables(kept: dict) -> str:
    """The README's tables of preference rounds, as Markdown: mean and 95 % interval over seeds."""

    def cell(arm: str, of: Callable[[list[dict]], float]) -> str:
        try:
            return front.interval(list(over_seeds(kept, arm, of).values()))
        except (IndexError, KeyError, TypeError):
            return ""

    def rows(named: dict[str, str], columns: list[Callable[[list[dict]], float]]) -> list[str]:
        there = [(arm, title) for arm, title in named.items() if arm in kept]
        return [row(title, *(cell(arm, of) for of in columns)) for arm, title in there]

    rounds = [greedy(1), greedy(2), greedy(3), greedy(4), lambda rounds: rounds[-1]["sampled"]]
    named = {
        "dpo_nll": "DPO + NLL (`iterative_dpo`)",
        "sft": "SFT on the chosen",
        "dpo": "DPO alone (`--alpha 0`)",
        "one_round": "one round, twice the pairs and updates",
        "lucky_dpo_nll": "4 answers: DPO + NLL",
        "lucky_sft": "4 answers: SFT",
        "lucky_dpo": "4 answers: DPO alone",
    }
    lines = head("greedy after round", "1", "2", "3", "4", "sampled at the end")
    lines += rows(named, rounds)

    own = {
        "M1 greedy": greedy(0),
        "M2": greedy(1),
        "M3": greedy(2),
        "M2 wins over M1": lambda rounds: rounds[1]["over M1"]["win"],
        "M3 over M2": lambda rounds: rounds[2]["over the last"]["win"],
    }
    named = {
        "self_rewarding": "pairs of judgements too, the default",
        "frozen_judge": "the same, M1 judges",
        "any_judgements": "the same, a coin pairs the judgements",
        "solutions": "solutions alone, as many updates",
        "altered": "responses to an altered problem are worse",
        "first_rejects": "the worse response is M1's",
        "solves_first": "the judge solves first",
        "plain": "solutions alone, J = 3, a quarter of the updates",
        "plain_frozen": "the same, M1 judges",
        "one_judgement": "J = 1",
        "top_sft": "SFT on the best",
        "own_dpo": "DPO alone",
        "no_eft": "no EFT",
    }
    lines += head("`self_rewarding`", *own)
    lines += rows(named, list(own.values()))

    looked = {f"M{i + 1}": in_order(i) for i in range(3)}
    looked |= {f"M{i + 1}, J = {J}": in_order(i, J) for J in ("1", "8") for i in (0, 2)}
    lines += head("judge's pairs in order", *looked)
    lines += rows({arm: named[arm] for arm in LOOKED_AT}, list(looked.values()))

    differences = [
        ("DPO + NLL minus DPO alone, round 1", "dpo_nll", 1, "dpo", 1),
        ("DPO + NLL minus SFT on the chosen, round 4", "dpo_nll", 4, "sft", 4),
        ("the same with four answers, round 1", "lucky_dpo_nll", 1, "lucky_sft", 1),
        ("the same with four answers, round 4", "lucky_dpo_nll", 4, "lucky_sft", 4),
        ("two rounds minus one with twice the pairs", "dpo_nll", 2, "one_round", 1),
        ("M3: own judge minus M1 as judge", "self_rewarding", 2, "frozen_judge", 2),
        ("M3: pairs of judgements minus as many updates", "self_rewarding", 2, "solutions", 2),
        (
            "M3: pairs of judgements by agreement minus by a coin",
            "self_rewarding",
            2,
            "any_judgements",
            2,
        ),
        ("M3 minus M2", "self_rewarding", 2, "self_rewarding", 1),
        ("solutions alone, M3: own judge minus M1 as judge", "plain", 2, "plain_frozen", 2),
        ("solutions alone, M3: J = 3 minus J = 1", "plain", 2, "one_judgement", 2),
        ("solutions alone, M3: pairs minus SFT on the best", "plain", 2, "top_sft", 2),
    ]
    lines += head("differences paired by seed", "greedy")
    for title, a, i, b, j in differences:
        if a in kept and b in kept:
            gap = difference(over_seeds(kept, a, greedy(i)), over_seeds(kept, b, greedy(j)))
            lines.append(row(title, gap))

    lines += head("judge's pairs in order, paired by seed", *(f"J = {J}" for J in (1, 3, 8)))
    compared = [(f"{named[arm]}: M3 minus M1", arm, arm, 0) for arm in LOOKED_AT]
    compared.append(
        ("M3: pairs by agreement minus by a coin", "self_rewarding", "any_judgements", 2)
    )
    compared.append(("M3: own judge minus M1 as judge", "self_rewarding", "frozen_judge", 2))
    for title, a, b, i in compared:
        if a in kept and b in kept:
            cells = []
            for J in ("1", "3", "8"):
                last = over_seeds(kept, a, in_order(2, J))
                cells.append(difference(last, over_seeds(kept, b, in_order(i, J))))
            lines.append(row(title, *cells))
    return "\n".join(lines).strip()


def band(axes: Any, x: Any, seeds: list[list[float]], color: str, label: str, **style: Any) -> None:
    """A curve: mean over seeds, and its 95 % interval as a band. seeds: each seed's values at x."""
    points = list(zip(*seeds, strict=True))
    middle = [mean(y) for y in points]
    half = [front.half_width(y) for y in points]
    low = [y - h for y, h in zip(middle, half, strict=True)]
    high = [y + h for y, h in zip(middle, half, strict=True)]
    axes.plot(x, middle, color=color, label=label, **style)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def level(axes: Any, y: float, words: str) -> None:
    """A dashed line with its name at the right."""
    axes.axhline(y, color="0.4", ls="--", lw=1)
    place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "top"}
    axes.text(0.99, y - 0.015, words, fontsize=9, **place)


def picture(kept: dict) -> None:
    """Above the rounds paid by the verifier, below those with an own judge; bands over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1)
    left, right = above.subplots(1, 2)
    own, judge = below.subplots(1, 2)

    def rounds(axes: Any, arm: str, label: str, color: str, of: Callable, **style: Any) -> None:
        each = [[of(r) for r in job["rounds"]] for job in kept[arm]["seeds"]]
        band(axes, range(len(each[0])), each, color, label, **style)

    named = {"dpo_nll": "DPO + NLL", "sft": "SFT on the chosen", "dpo": "DPO alone"}
    for i, (arm, label) in enumerate(named.items()):
        rounds(left, arm, label, f"C{i}", lambda r: r["greedy"])
        right.plot(kept[arm]["curves"]["chosen_per_token"], color=f"C{i}")
    for arm, label, color, ls in (
        ("self_rewarding", "judgements are paired too", "C3", "-"),
        ("frozen_judge", "the same, M1 judges", "C4", (0, (4, 4))),
        ("plain", "solutions alone", "0.5", "-"),
    ):
        rounds(own, arm, label, color, lambda r: r["greedy"], ls=ls, lw=2)
        rounds(judge, arm, label, color, lambda r: r["judge"]["in order"]["3"], ls=ls, lw=2)
    level(left, mean(over_seeds(kept, "dpo_nll", greedy(0)).values()), "base")
    level(own, mean(over_seeds(kept, "self_rewarding", greedy(0)).values()), "M1")
    for update in (30, 60, 90):
        right.axvline(update, color="0.8", lw=1, zorder=0)

    left.set(title="iterative_dpo", xlabel="round", xticks=range(5))
    left.set(ylabel="greedy accuracy, test", ylim=(0, 1))
    right.set(title="the chosen responses, mean over seeds", ylim=(-0.35, 0.01))
    right.set(xlabel="update (a line where a round starts)", ylabel="log-prob, nats a token")
    own.set(title="self_rewarding: the policy", ylabel="greedy accuracy, test")
    judge.set(title="self_rewarding: the policy as a judge")
    judge.set(ylabel="share of pairs in the true order")
    for axes in (own, judge):
        axes.set(xlim=(-0.15, 2.15), xticks=range(3), xticklabels=["M1", "M2", "M3"])
    own.set(ylim=(0, 1))
    judge.set(ylim=(0.8, 1))  # chance is 0.5
    for part, axes in ((above, left), (below, own)):
        handles = axes.get_legend_handles_labels()
        part.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
    nr.write_whole(OUT.with_suffix(".png"), lambda p: figure.savefig(p, format="png", dpi=110))


def main() -> None:
    """Run what is not there yet, then tables and picture of all there is."""
    run(__doc__, ARMS, JOBS, measure)
    kept = collect()
    print(tables(kept))
    picture(kept)


if __name__ == "__main__":
    main()
