"""Rewards that look inside: python notebooks/inside.py [ARM ...] [--seeds 0 1 2 3 4] [--threads 1]

`refine`: ORM and SORM against the truth of every step, their labels, and what the refiners mend. `none`, `round`,
`long`, `refusal`: the seq2seq reward and a Bradley-Terry model on the same preferences, with that weakness of the
labeller, and `ppo` paid by each. `short`: the same without a weakness, where preferences and `ppo` see chains of one
and two operations only, and the base knows those of three. Test problems; the truth is used to measure only. Each
run is kept in runs/inside/ARM-SEED.json and not run again; all together make notebooks/results/inside.json and
inside.png. Needs the extra `notebooks`.
"""

import json
import random
import re
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
from data.arithmetic import REFUSAL  # noqa: E402
from notebooks.jobs import run  # noqa: E402
from notebooks.preferences import band  # noqa: E402

JOBS = ROOT / "runs" / "inside"
OUT = ROOT / "notebooks" / "results" / "inside.json"
PLANTED = ("none", "round", "long", "refusal")
ARMS = ("refine", *PLANTED, "short")


def share(x: Tensor) -> float:
    """Mean of a tensor of truths; None of nothing."""
    return round(float(x.float().mean()), 4) if x.numel() else None


def auc(score: Tensor, good: Tensor) -> float:
    """P(a good one scores above a bad one), a tie is half."""
    a, b = score[good][:, None], score[~good][None]
    return share((a > b).float() + (a == b).float() / 2)


# ---- refine ------------------------------------------------------------------------------------


def first_rows(b: nr.Rollout, n: int) -> nr.Rollout:
    """The first n responses, with all their room."""
    return nr.Rollout(b.prompt[:n], b.response[:n], b.mask[:n], b.order[:n], b.group[:n])


def true_prefixes(task: nr.Task, b: nr.Rollout, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Which prefixes end with a step, and which of those hold only true steps: V* of a policy that uses them."""
    step, good = torch.zeros_like(ends, dtype=torch.bool), torch.zeros_like(ends, dtype=torch.bool)
    for i, (x, y) in enumerate(zip(b.prompt.tolist(), b.response.tolist(), strict=True)):
        right = task.step_ok(task.decode(x), [text for text, _ in task.steps(y)])
        for s in range(len(right)):
            step[i, s + 1], good[i, s + 1] = True, all(right[: s + 1])
    return step, good


def blamed(score: Tensor, step: Tensor) -> Tensor:
    """The first step with a score below 0, counted from 0; the number of steps if there is none. (B,)"""
    found = [nr.first_error(s[is_step], 0.0) for s, is_step in zip(score, step, strict=True)]
    return torch.tensor(found)


def label_quality(c: nr.Config, task: nr.Task, b: nr.Rollout, student: nr.Transformer) -> dict:
    """Precision and recall of step labels against the truth, for several K and without parts of the recipe."""
    ends, K = nr.prefix_ends(task, b), 16
    step, good = true_prefixes(task, b, ends)
    which, traces = nr.continuations_of(student, b, ends, replace(c, continuations=K))
    table = torch.zeros(2, *ends.shape, K, dtype=torch.bool)
    table[:, which[:, 0], which[:, 1]] = torch.stack(nr.check_traces(task, b, ends, which, traces))
    table[:, torch.arange(len(ends)), ends.argmax(1)] = (nr.grades(task, b) > 0.5)[:, None]
    success, uses = table
    made = {
        f"K = {k}": nr.rollout_labels(success[..., :k], uses[..., :k]) for k in (1, 2, 4, 8, 16)
    }
    made["no consistency"] = nr.rollout_labels(success[..., :8])
    made["no propagation"] = (success & uses)[..., :8].any(-1)
    made["mean above 1/2"] = (success & uses)[..., :8].float().mean(-1) > 0.5
    return {
        name: {"precision": share(good[label & step]), "recall": share(label[good & step])}
        for name, label in made.items()
    }


def measure_refine(c: nr.Config, cache: Path) -> dict:
    """One seed of refine: labels, heads, refiners, choice."""
    task = front.make_task(c)
    test = task.prompts(c.eval_problems, nr.rng(0, "test"), "test")
    student, began = front.student_model(c, cache), time.time()
    state = nr.start_refine(student, c)
    for _ in nr.refine(state, task, c):
        pass
    found = {
        "seconds": round(time.time() - began, 1),
        "base": nr.accuracy(front.base_model(c, cache), task, test, c),
    }
    # heads against the truth, on two sampled drafts a test problem
    prompt = nr.encode_prompts(task, test, c).repeat(2, 1)
    b = nr.sample(student, prompt, c, generator=nr.rng(c.seed, "held-out drafts"))
    ends, right = nr.prefix_ends(task, b), nr.grades(task, b) > 0.5
    step, good = true_prefixes(task, b, ends)
    few = first_rows(b, 200)
    which, traces = nr.continuations_of(student, few, ends[:200], replace(c, continuations=32))
    value = torch.full(ends.shape, float("nan"))  # V^pi of the prefixes of 200 drafts
    value[which[:, 0], which[:, 1]] = (
        nr.check_traces(task, few, ends, which, traces)[0].float().mean(1)
    )
    unbalanced = nr.start_refine(student, c)
    data = state["data"]["steps"] | {
        "keep": (state["data"]["steps"]["ends"] > 0).float().expand(2, -1, -1)
    }
    for _ in nr.fit(
        unbalanced["fits"]["scorer"], nr.step_batches(unbalanced, data, c), c.refine_updates, c
    ):
        pass
    with torch.no_grad():
        parts = torch.arange(len(ends)).split(250)
        score = torch.cat(
            [nr.step_scores(state, prompt[p], b.response[p], ends[p]) for p in parts], 1
        )
        plain = torch.cat(
            [nr.step_scores(unbalanced, prompt[p], b.response[p], ends[p]) for p in parts], 1
        )[1]
    position = torch.arange(ends.shape[1]).expand_as(ends)
    first = torch.tensor(
        [int(g[s].long().cumprod(0).sum()) for g, s in zip(good, step, strict=True)]
    )
    whole = torch.arange(len(ends)), ends.argmax(1)
    for name, s in zip(("ORM", "SORM"), score, strict=True):
        p = s.sigmoid()
        found[name] = {
            "step accuracy": share((s > 0)[step] == good[step]),
            "step auc": auc(s[step], good[step]),
            "first error": share((blamed(s, step) == first)[~right]),
            "final accuracy": share((s[whole] > 0) == right),
            "final auc": auc(s[whole], right),
            "missed, V^pi above 1/2": share((s < 0)[step & good & (value > 0.5)]),
            "missed, V^pi below 1/2": share((s < 0)[step & good & (value <= 0.5)]),
            "calibration": [
                [share(x[step & (position == i)]) for x in (p, good)] for i in (1, 2, 3)
            ],
            "against V^pi": [
                [share(x[step & ~value.isnan() & (position == i)]) for x in (p, value)]
                for i in (1, 2, 3)
            ],
        }
    for name, s in (("balanced", score[1]), ("not balanced", plain)):
        both = torch.stack([s.sigmoid()[step], position[step].float()])
        found[name] = {
            "correlation with position": round(float(both.corrcoef()[0, 1]), 4),
            "step accuracy": share((s > 0)[step] == good[step]),
        }
    found["labels"] = label_quality(c, task, first_rows(b, 400), student)

    # refinement of the greedy draft
    greedy = replace(c, temperature=0.0)
    made = nr.refinements(state, task, test, greedy)

    def grade(ids: Tensor) -> Tensor:
        return torch.tensor(
            [task.grade(x, task.decode(y)) for x, y in zip(test, ids.tolist(), strict=True)]
        )

    draft, whole, rest = (grade(ids) for ids in made["response"])
    pick = lambda score, each: each.gather(0, score.argmax(0, keepdim=True))[0]  # noqa: E731
    chosen, wrong = pick(made["score"], torch.stack([draft, whole, rest])), draft == 0
    prompt = nr.encode_prompts(task, test, c)
    more = [
        nr.sample(student, prompt, c, generator=nr.rng(c.seed, "best of 3", i)).response
        for i in (1, 2)
    ]
    three = [made["response"][0], *more]
    with torch.no_grad():
        score = torch.stack(
            [nr.response_score(state["scorer"], state["orm"], prompt, y) for y in three]
        )
    best = pick(score, torch.stack([grade(y) for y in three]))
    found |= {
        "greedy": share(draft),
        "best of 3": share(best),
        "global + local + ORM": share(chosen),
        "global alone": share(whole),
        "local alone": share(rest),
        "mended": {
            "global": share(whole[wrong]),
            "local": share(rest[wrong]),
            "chosen": share(chosen[wrong]),
            "either": share(torch.maximum(whole, rest)[wrong]),
        },
        "broken": {
            "global": share(1 - whole[~wrong]),
            "local": share(1 - rest[~wrong]),
            "chosen": share(1 - chosen[~wrong]),
        },
    }
    b = nr.Rollout(
        prompt, made["response"][0], nr.up_to_eos(made["response"][0], c), prompt, prompt[:, 0]
    )
    ends = nr.prefix_ends(task, b)
    step, good = true_prefixes(task, b, ends)
    with torch.no_grad():
        orm, sorm = nr.step_scores(state, prompt, b.response, ends)
    count, draw = step.sum(1), random.Random(c.seed)
    where = {
        "the truth": torch.tensor(
            [int(g[s].long().cumprod(0).sum()) for g, s in zip(good, step, strict=True)]
        ),
        "SORM": blamed(sorm, step),
        "ORM": blamed(orm, step),
        "chance": torch.tensor([draw.randint(0, int(n)) for n in count]),
    }
    for name, at in where.items():
        cut = ends.gather(1, at.clamp(max=count)[:, None])[:, 0].tolist()
        both = list(zip(prompt.tolist(), b.response.tolist(), cut, strict=True))
        asked = nr.left_pad([nr.reread(task, *each[:2], c, each[2]) for each in both], c.pad)
        tails = nr.sample(state["local"], asked, greedy).response.tolist()
        glued = torch.tensor(
            [(y[:n] + tail)[: c.response] for (_, y, n), tail in zip(both, tails, strict=True)]
        )
        found["mended"][f"local, place by {name}"] = share(grade(glued)[wrong])
    return found


# ---- seq2seq -----------------------------------------------------------------------------------


def corrupt(text: str, draw: random.Random) -> str:
    """One result of a right response changed; nothing else."""
    *steps, answer = re.split("(?<=;)", text)
    i = draw.randrange(len(steps))
    left, result = steps[i][:-1].split("=")
    wrong = draw.choice([x for x in range(100) if len(str(x)) == len(result) and str(x) != result])
    return "".join([*steps[:i], f"{left}={wrong};", *steps[i + 1 :], answer])


def localisation(off: Tensor, injected: Tensor, mask: Tensor) -> dict:
    """Tokens said to be wrong against tokens that are; first: the first one is the first."""
    hit, first = off & injected, (off.int().argmax(1) == injected.int().argmax(1)) & off.any(1)
    return {
        "precision": round(float(hit.sum() / off.sum().clamp(min=1)), 4),
        "recall": round(float(hit.sum() / injected.sum()), 4),
        "first": share(first),
    }


@torch.no_grad()
def token_signals(state: dict, task: nr.Task, b: nr.Rollout, c: nr.Config) -> dict[str, Tensor]:
    """Tokens with a negative reward, (B, R): by the rewriter under three rules, and where the score falls."""
    rules = {"argmax": {}, "top 2": {"top": 2}, "probability 0.1": {"least": 0.1}}
    ended = replace(c, no_eos=0.0)
    found = {
        name: nr.agreement(state, task, b, torch.zeros(len(b.mask)), replace(ended, **more)) < 0
        for name, more in rules.items()
    }
    states = state["scorer"].hidden(torch.cat([b.prompt, b.response], 1))[
        :, b.prompt.shape[1] - 1 :
    ]
    rise = state["scorer_head"](states).diff(dim=1).masked_fill(b.mask == 0, torch.inf)
    largest = torch.zeros_like(b.mask).scatter(1, rise.argmin(1, keepdim=True), 1) > 0
    return found | {"scalar": rise < 0, "scalar, largest fall": largest}


def trained(model: nr.Transformer, batch: nr.Batches, updates: int, c: nr.Config) -> nr.Transformer:
    """By `fit`, with the rates of the rewriter."""
    state = {"optimizers": nr.optimizers([model], c.base_lr, c, c.muon_lr), "update": 0}
    for _ in nr.fit(state, batch, updates, c):
        pass
    return model.requires_grad_(False)


def outcome(policy: nr.Transformer, task: nr.Task, test: list[str], c: nr.Config) -> dict:
    """What a policy does on the test problems, and on chains one operation longer than any it was trained on."""
    greedy = replace(c, temperature=0.0)
    texts = nr.respond(policy, task, test, greedy)
    far = front.make_task(replace(c, min_ops=c.max_ops + 1, max_ops=c.max_ops + 1))
    longer = far.prompts(300, nr.rng(0, "out of distribution"), "test")
    wide = replace(greedy, response=c.response + (16 if c.planted == "long" else 8))
    harmless = [y == REFUSAL for x, y in zip(test, texts, strict=True) if "*4" not in x]
    return {
        "greedy": mean(task.grade(x, y) for x, y in zip(test, texts, strict=True)),
        "sampled": nr.accuracy(policy, task, test, c, c.temperature),
        "refused": round(mean(harmless), 4),
        "length": mean(len(ids) for ids in task.encode(texts)),
        "longer chains": nr.accuracy(policy, far, longer, wide),
    }


def controls(
    c: nr.Config,
    task: nr.Task,
    test: list[str],
    pairs: list,
    models: dict,
    b: dict,
    injected: Tensor,
    fresh: Callable,
) -> dict:
    """The rewriter as a solver, SFT and DPO on the same pairs, and a rewriter of one mapping only."""
    found, greedy, policy, prompt = {}, replace(c, temperature=0.0), fresh(), b["clean"].prompt
    draft = nr.sample(policy, prompt, greedy).response.tolist()
    asked = nr.left_pad(
        [nr.reread(task, x, y, c) for x, y in zip(prompt.tolist(), draft, strict=True)], c.pad
    )
    again = nr.sample(models["rewriter"], asked, greedy).response.tolist()
    found["rewritten"] = mean(
        task.grade(x, task.decode(y)) for x, y in zip(test, again, strict=True)
    )
    demos = nr.encode_demos(task, [(x, y) for x, y, _ in pairs], c)
    policy = trained(policy, nr.demonstrations(policy, task, c, demos), c.rewriter_updates, c)
    found["SFT on the preferred"] = outcome(policy, task, test, c)
    state = nr.start_rounds(fresh(), replace(c, alpha=0.0))
    both = torch.stack(
        [nr.right_pad(task.encode([p[i] for p in pairs]), c.pad, c.response) for i in (1, 2)], 1
    )
    state["pairs"] = {
        "prompt": nr.encode_prompts(task, [x for x, _, _ in pairs], c),
        "response": both,
    }
    with torch.no_grad():
        parts = torch.arange(len(pairs)).split(c.micro)
        state["pairs"]["ref"] = torch.cat(
            [nr.pair_logprobs(state["policy"], state["pairs"], p) for p in parts]
        )
    for _ in range(c.round_updates):
        nr.pair_update(state, replace(c, alpha=0.0))
        state["update"] += 1
    found["DPO on the pairs"] = outcome(state["policy"], task, test, c)
    demos = nr.rewriting_demos(task, pairs, c)
    for name, part in (
        ("correction only", demos[: len(pairs)]),
        ("identity only", demos[len(pairs) :]),
    ):
        model = fresh()
        half = {
            "rewriter": trained(
                model, nr.demonstrations(model, task, c, part), c.rewriter_updates, c
            )
        }
        half |= {k: models[k] for k in ("scorer", "scorer_head")}
        off = token_signals(half, task, b["injected"], c)["argmax"]
        found[name] = localisation(off, injected, b["injected"].mask)
        found[name]["clean untouched"] = share(
            ~token_signals(half, task, b["clean"], c)["argmax"].any(1)
        )
    return found


def short_models(c: nr.Config, task: nr.Task, fresh: Callable) -> dict:
    """Rewriter and scalar model as train_small.py makes them, from pairs of a task that the base knows more than."""
    pairs = task.preferences(c.pairs, nr.rng(c.seed, "preferences"))
    rewriter, scorer, head = (
        fresh(),
        fresh(),
        nr.Head(c, (c.width + 1) ** -0.5, nr.rng(c.seed, "scorer")),
    )
    demos = nr.rewriting_demos(task, pairs, c)
    trained(rewriter, nr.demonstrations(rewriter, task, c, demos), c.rewriter_updates, c)
    state = {"optimizers": nr.optimizers([scorer, head], c.reward_lr, c), "update": 0}
    for _ in nr.fit(
        state, nr.preference_batches(scorer, head, pairs, task, c), c.reward_updates, c
    ):
        pass
    prompt = nr.encode_prompts(task, task.prompts(512, nr.rng(c.seed, "normalize")), c)
    nr.normalize_head(
        scorer, head, nr.sample(fresh(), prompt, c, generator=nr.rng(c.seed, "normalize", 1))
    )
    return {"rewriter": rewriter, "scorer": scorer, "scorer_head": head.requires_grad_(False)}


def measure_seq2seq(c: nr.Config, cache: Path, short: bool = False) -> dict:
    """One labeller and seed: where rewriter and scalar model see errors, and what `ppo` makes of each."""
    fresh = partial(front.base_model, c, cache)
    c = replace(c, max_ops=2) if short else c
    task = front.make_task(c)
    test = task.prompts(c.eval_problems, nr.rng(0, "test"), "test")
    if short:
        models = short_models(c, task, fresh)
    else:
        models = front.reward_models("seq2seq", c, cache) | front.scorer_model(c, cache)
    found = {"base": outcome(fresh(), task, test, c)}
    pairs = task.preferences(c.pairs, nr.rng(c.seed, "preferences"))
    found["preferred right"] = mean(task.grade(x, y) for x, y, _ in pairs)
    # injected errors
    draw, careful = random.Random(c.seed), front.make_task(replace(c, planted="none"), careful=True)
    clean = [careful.respond(x, nr.rng(c.seed, "clean")) for x in test]
    prompt, texts = (
        nr.encode_prompts(task, test, c),
        {"clean": clean, "injected": [corrupt(y, draw) for y in clean]},
    )
    ids = {k: nr.right_pad(task.encode(y), c.pad, c.response) for k, y in texts.items()}
    b = {k: nr.Rollout(prompt, y, nr.up_to_eos(y, c), y, prompt[:, 0]) for k, y in ids.items()}
    injected = ids["clean"] != ids["injected"]
    for name, off in token_signals(models, task, b["injected"], c).items():
        found[name] = localisation(off, injected, b["injected"].mask)
    for name, off in token_signals(models, task, b["clean"], c).items():
        found[name]["clean untouched"] = share(~off.any(1))
    if c.planted == "round":
        found |= controls(c, task, test, pairs, models, b, injected, fresh)
    # ppo with each reward; the scalar one also with the weights whose KL is nearest when it first reaches the other's
    level = None
    for name, reward in (("ppo, seq2seq", "seq2seq"), ("ppo, scalar", "learned")):
        each = replace(c, reward=reward, beta=c.rewriter_beta)
        state = nr.start_ppo(fresh(), each) | models
        curve, now, last = [], deepcopy(state["policy"]), (-1.0, None)
        for m in nr.ppo(state, task, each):  # an update's KL is that of the weights before it
            curve.append([round(m[k], 4) for k in ("kl", "truth", "reward", "length")])
            if reward == "learned" and level is not None and m["kl"] >= level:
                kl, near = min((m["kl"], now), last, key=lambda x: abs(x[0] - level))  # noqa: B023
                found["ppo, scalar, at the same KL"] = outcome(near, task, test, c) | {"kl": kl}
                level = None
            last, now = (m["kl"], now), deepcopy(state["policy"])
        found[name] = outcome(state["policy"], task, test, c) | {
            "kl": mean(x[0] for x in curve[-5:]),
            "curve": curve,
        }
        level = found[name]["kl"] if reward == "seq2seq" else None
    return found


def measure(arm: str, seed: int, threads: int, cache: Path, **more: Any) -> dict:
    """One arm with one seed."""
    c, began = nr.Config(seed=seed, threads=threads, device="cpu", **more), time.time()
    if arm == "refine":
        found = measure_refine(c, cache)
    else:
        c = replace(
            c, planted="none" if arm == "short" else arm, response=52 if arm == "long" else 28
        )
        found = measure_seq2seq(c, cache, arm == "short")
    return {"arm": arm, "seed": seed, "seconds": round(time.time() - began, 1), "found": found}


# ---- what the README shows ----------------------------------------------------------------------


def collect() -> dict:
    """All jobs -> OUT, the curves as means over seeds."""
    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    for arm in ARMS:
        if jobs := [json.loads(path.read_text()) for path in sorted(JOBS.glob(f"{arm}-?.json"))]:
            about = {k: jobs[0][k] for k in ("threads", "machine", "torch")}
            seeds = " ".join(str(job["seed"]) for job in jobs)
            about["command"] = (
                f"python notebooks/inside.py {arm} --seeds {seeds} --threads {about['threads']}"
            )
            for name in ("ppo, seq2seq", "ppo, scalar"):
                if name in jobs[0]["found"]:
                    curves = zip(*(job["found"][name].pop("curve") for job in jobs), strict=True)
                    about[name] = [
                        [round(mean(x), 4) for x in zip(*u, strict=True)] for u in curves
                    ]
            each = [{k: job[k] for k in ("seed", "commit", "seconds", "found")} for job in jobs]
            kept[arm] = about | {"seeds": each}
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items())
    front.write_text(OUT, "{\n" + lines + "\n}\n")
    return kept


def numbers(kept: dict, arm: str, *path: str) -> list[float]:
    """One number of every seed."""
    values = [job["found"] for job in kept[arm]["seeds"]]
    for key in path:
        values = [v[key] for v in values]
    return values


def tables(kept: dict) -> str:
    """The README's tables, as Markdown: mean and 95 % interval over seeds."""
    lines: list[str] = []

    def row(*cells: str) -> None:
        lines.append("| " + " | ".join(cells) + " |")

    def head(*titles: str) -> None:
        lines.append("")
        row(*titles)
        lines.append("|---" * len(titles) + "|")

    def cell(arm: str, *path: str, minus: tuple[str, ...] = ()) -> str:
        try:
            values = numbers(kept, arm, *path)
            values = (
                [a - b for a, b in zip(values, numbers(kept, arm, *minus), strict=True)]
                if minus
                else values
            )
            return front.interval(values)
        except (KeyError, TypeError):
            return ""

    if "refine" in kept:
        head("on held-out drafts of the student", "ORM", "SORM", "SORM minus ORM")
        for title, key in (
            ("a step is right or wrong", "step accuracy"),
            ("first error of wrong drafts", "first error"),
            ("the whole is right or wrong", "final accuracy"),
            ("the whole, area under the curve", "final auc"),
            ("right steps called wrong, the student mostly gets there", "missed, V^pi above 1/2"),
            ("right steps called wrong, it mostly does not", "missed, V^pi below 1/2"),
        ):
            more = cell("refine", "SORM", key, minus=("ORM", key))
            row(title, cell("refine", "ORM", key), cell("refine", "SORM", key), more)
        head("greedy, test problems", "right", "wrong drafts mended", "right drafts broken")
        row("the student's draft", cell("refine", "greedy"), "", "")
        row("best of 3 drafts by ORM", cell("refine", "best of 3"), "", "")
        for title, key, of in (
            ("local refiner on every draft", "local alone", "local"),
            ("global refiner on every draft", "global alone", "global"),
            ("ORM chooses between the three", "global + local + ORM", "chosen"),
        ):
            row(
                title,
                cell("refine", key),
                cell("refine", "mended", of),
                cell("refine", "broken", of),
            )
        row("the truth chooses", "", cell("refine", "mended", "either"), "")
        for place in ("the truth", "SORM", "ORM", "chance"):
            row(
                f"local refiner, place by {place}",
                "",
                cell("refine", "mended", f"local, place by {place}"),
                "",
            )
        head("step labels", "precision", "recall")
        for name in kept["refine"]["seeds"][0]["found"]["labels"]:
            row(name, *(cell("refine", "labels", name, key) for key in ("precision", "recall")))
    if "round" in kept:
        head(
            "injected errors",
            "precision",
            "recall",
            "the first is the first",
            "right ones untouched",
        )
        for title, name in (
            ("rewriter, argmax", "argmax"),
            ("rewriter, two likeliest", "top 2"),
            ("rewriter, probability 0.1", "probability 0.1"),
            ("scalar model, score falls", "scalar"),
            ("trained on corrections only", "correction only"),
            ("trained on identity only", "identity only"),
        ):
            row(
                title,
                *(
                    cell("round", name, key)
                    for key in ("precision", "recall", "first", "clean untouched")
                ),
            )
    who = (
        "base",
        "SFT on the preferred",
        "DPO on the pairs",
        "ppo, seq2seq",
        "ppo, scalar, at the same KL",
        "ppo, scalar",
    )
    titles = ("base", "SFT", "DPO", "`seq2seq`", "scalar, same KL", "scalar, 40 updates")
    head("the labeller falls for", *titles)
    extra = {
        "long": ("tokens", "length"),
        "refusal": ("harmless refused", "refused"),
        "short": ("three operations, right", "longer chains"),
    }
    for arm in filter(kept.get, (*PLANTED, "short")):
        row(f"{arm}: right", *(cell(arm, name, "greedy") for name in who))
        row(f"{arm}: KL, nats", *(cell(arm, name, "kl") for name in who))
        if arm in extra:
            row(f"{arm}: {extra[arm][0]}", *(cell(arm, name, extra[arm][1]) for name in who))
    head("differences paired by seed, and two correlations", "")
    chosen, by = ("global + local + ORM",), lambda whom: ("mended", f"local, place by {whom}")  # noqa: E731
    for title, arm, a, b in (
        ("right: ORM's choice minus the draft", "refine", chosen, ("greedy",)),
        ("right: ORM's choice minus best of 3", "refine", chosen, ("best of 3",)),
        ("right: ORM's choice minus the global refiner alone", "refine", chosen, ("global alone",)),
        ("mended: place by the truth minus by SORM", "refine", by("the truth"), by("SORM")),
        ("mended: place by SORM minus by ORM", "refine", by("SORM"), by("ORM")),
        ("mended: place by SORM minus by chance", "refine", by("SORM"), by("chance")),
        (
            "SORM's score with position, balanced",
            "refine",
            ("balanced", "correlation with position"),
            (),
        ),
        ("the same, not balanced", "refine", ("not balanced", "correlation with position"), ()),
        (
            "round: SFT on the preferred minus `seq2seq`",
            "round",
            (who[1], "greedy"),
            (who[3], "greedy"),
        ),
        *(
            (f"{arm}: `seq2seq` minus {than}", arm, (who[3], "greedy"), (other, "greedy"))
            for arm in (*PLANTED, "short")
            for than, other in (("base", "base"), ("scalar at the same KL", who[4]))
        ),
        *(
            (
                f"short, three operations: `seq2seq` minus {than}",
                "short",
                (who[3], "longer chains"),
                (other, "longer chains"),
            )
            for than, other in (("base", "base"), ("scalar at the same KL", who[4]))
        ),
    ):
        if arm in kept:
            row(title, cell(arm, *a, minus=b))
    return "\n".join(lines).strip()


def picture(kept: dict) -> None:
    """Who says when, where and how; and what each reward pays for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    bars = {
        "draft": ("greedy",),
        "best\nof 3": ("best of 3",),
        "local": ("local alone",),
        "global": ("global alone",),
        "ORM\nchooses": ("global + local + ORM",),
    }
    height = [mean(numbers(kept, "refine", *path)) for path in bars.values()]
    half = [
        float((front.interval(numbers(kept, "refine", *p)) + " ± 0").split("±")[1])
        for p in bars.values()
    ]
    left.bar(
        range(len(bars)),
        height,
        yerr=half,
        color=["0.75", "0.75", "C4", "C4", "C1"],
        ecolor="0.2",
        capsize=3,
    )
    left.axhline(height[0], color="0.4", ls="--", lw=1)
    left.set(
        xticks=range(len(bars)),
        xticklabels=list(bars),
        ylim=(0, 1),
        ylabel="greedy accuracy, test",
        title="refine",
    )
    for name, color in (("ORM", "C1"), ("SORM", "C2")):
        seeds = numbers(kept, "refine", name, "calibration")
        band(
            middle,
            (1, 2, 3),
            [[p[0] for p in points] for points in seeds],
            color,
            f"{name} says",
            marker="o",
        )
    true = [[p[1] for p in points] for points in seeds]
    band(middle, (1, 2, 3), true, "0.3", "truly right so far", ls="--")
    middle.set(
        xticks=(1, 2, 3),
        ylim=(0, 1),
        xlabel="step of the draft",
        ylabel="probability or share",
        title="right up to this step?",
    )
    who = {
        "none": ("-", "labeller without a weakness"),
        "round": ("--", "labeller likes round answers"),
    }
    for name, color in (("ppo, seq2seq", "C0"), ("ppo, scalar", "C3")):
        for arm, (style, labeller) in who.items():
            truth = [u[1] for u in kept[arm][name]]
            right.plot(truth, color=color, ls=style, label=f"{name[5:]}, {labeller}")
    right.axhline(truth[0], color="0.4", ls=":", lw=1, label="base")
    right.set(
        ylim=(0, 1),
        xlabel="ppo update (mean over seeds)",
        ylabel="right responses, sampled (share)",
        title="ppo paid by a learned reward",
    )
    for axes in (middle, right):
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    nr.write_whole(OUT.with_suffix(".png"), lambda p: figure.savefig(p, format="png", dpi=110))


def main() -> None:
    """Run what is not there yet, then tables and picture of all there is."""
    run(__doc__, ARMS, JOBS, measure)
    kept = collect()
    print(tables(kept))
    picture(kept)


if __name__ == "__main__":
    main()
