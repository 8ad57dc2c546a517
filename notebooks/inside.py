"""Rewards that look inside: python notebooks/inside.py [ARM ...] [--seeds 0 1 2 3 4] [--threads 1]

`refine`: ORM and SORM against the truth of every step, their labels, and what the refiners mend,
beside solvers that learn from the same traces and never see a draft. `hidden`: the same with scores
of hidden vectors alone.
What must hold, written before the runs, each by an interval above zero: the ORM's choice beats the
draft, the best of three drafts and the better refiner; the best of three beats the draft; the SORM
beats the ORM in step accuracy; the ORM's area under the curve is larger with log-probs than
without. Reading a draft helps if the global refiner beats the solver that has learned its traces.
`none`, `round`, `long`, `refusal`: the seq2seq reward and a Bradley-Terry model on the same
preferences, with that weakness of the labeller, and `ppo` paid by each, beside SFT on the preferred
responses. `coin`: the same with a labeller that tosses a coin. `short`: the same without a
weakness, where preferences and `ppo` see chains of one and two operations only, and the base knows
those of three. Test problems; the truth is used to measure only. Each run is kept in
runs/inside/ARM-SEED.json and not run again; all together make notebooks/results/inside.json and
inside.png. Needs the extra `notebooks`.
"""

import random
import re
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import log
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
from data.arithmetic import REFUSAL, Arithmetic  # noqa: E402
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
from notebooks.preferences import band  # noqa: E402

JOBS = ROOT / "runs" / "inside"
OUT = ROOT / "notebooks" / "results" / "inside.json"
PLANTED = ("none", "round", "long", "refusal")
# The arms of refine, and the numbers that are changed.
REFINE: dict[str, dict[str, Any]] = {
    "refine": {},
    "hidden": {"logp_weight": 0.0},
}
LABELLERS = (*PLANTED, "coin", "short")
ARMS = (*REFINE, *LABELLERS)
# ppo paid by the rewriter, and by a scalar model: of hidden vectors alone, as in the paper, or of
# log-probs too. The scalar ones are also measured at the KL that the first one ends with.
SEQ, SCALAR, LIKELY = "ppo, seq2seq", "ppo, scalar", "ppo, scalar with log-probs"
LEVEL, LIKELY_LEVEL = SCALAR + ", at the same KL", LIKELY + ", at the same KL"


def share(x: Tensor) -> float | None:
    """Mean of a tensor of truths; None of nothing."""
    return round(float(x.float().mean()), 4) if x.numel() else None


def auc(score: Tensor, good: Tensor) -> float | None:
    """P(a good one scores above a bad one), a tie is half."""
    a = score[good][:, None]
    b = score[~good][None]
    return share((a > b).float() + (a == b).float() / 2)


# ---- refine ------------------------------------------------------------------------------------


def first_rows(b: nr.Rollout, n: int) -> nr.Rollout:
    """The first n responses, with all their room."""
    return nr.Rollout(b.prompt[:n], b.response[:n], b.mask[:n], b.order[:n], b.group[:n])


def true_prefixes(task: nr.Task, b: nr.Rollout, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Which prefixes end with a step, and which of those hold only true steps, each (B, S).

    The second is V* of a policy that uses them.
    """
    step = torch.zeros_like(ends, dtype=torch.bool)
    good = torch.zeros_like(ends, dtype=torch.bool)
    for i, (x, y) in enumerate(zip(b.prompt.tolist(), b.response.tolist(), strict=True)):
        right = task.step_ok(task.decode(x), [text for text, _ in task.steps(y)])
        for s in range(len(right)):
            step[i, s + 1] = True
            good[i, s + 1] = all(right[: s + 1])
    return step, good


def blamed(score: Tensor, step: Tensor) -> Tensor:
    """The first step with a score below 0, counted from 0; the number of steps if none is. (B,)"""
    found = [nr.first_error(s[is_step], 0.0) for s, is_step in zip(score, step, strict=True)]
    return torch.tensor(found)


def true_error(good: Tensor, step: Tensor) -> Tensor:
    """The first step that is wrong, counted from 0; the number of steps if none is. (B,)"""
    found = [int(g[s].long().cumprod(0).sum()) for g, s in zip(good, step, strict=True)]
    return torch.tensor(found)


def label_quality(
    c: nr.RefineConfig, task: nr.Task, b: nr.Rollout, student: nr.Transformer
) -> dict[str, dict]:
    """Precision and recall of step labels, for several K and without parts of the recipe."""
    ends, K = nr.prefix_ends(task, b), 16
    step, good = true_prefixes(task, b, ends)
    which, traces = nr.continuations_of(student, b, ends, replace(c, continuations=K))
    table = torch.zeros(2, *ends.shape, K, dtype=torch.bool)
    table[:, which[:, 0], which[:, 1]] = torch.stack(nr.check_traces(task, b, ends, which, traces))
    table[:, torch.arange(len(ends)), ends.argmax(1)] = (nr.grades(task, b) > 0.5)[:, None]
    success, uses = table
    both = success & uses
    made = {f"K = {k}": nr.rollout_labels(both[..., :k]) for k in (1, 2, 4, 8, 16)}
    made["no consistency"] = nr.rollout_labels(success[..., :8])
    made["no propagation"] = both[..., :8].any(-1)
    made["mean above 1/2"] = both[..., :8].float().mean(-1) > 0.5
    found = {}
    for name, label in made.items():
        found[name] = {"precision": share(good[label & step]), "recall": share(label[good & step])}
    return found


def unbalanced_sorm(
    state: nr.RefineState, student: nr.Transformer, c: nr.RefineConfig
) -> nr.Scorer:
    """The SORM again, from the same labels but with all examples."""
    sorm = nr.Scorer(deepcopy(student), c.logp_weight, nr.rng(c.seed, "sorm"))
    steps = state.examples | {"keep": (state.examples["ends"] > 0).float().expand(2, -1, -1)}
    batches = partial(nr.step_batches, "sorm", sorm, steps, c.minibatch, c)
    nr.train_now("sorm", [sorm], batches, c.updates, c, c.lr, c.muon_lr)
    return sorm


def scorer_quality(
    c: nr.RefineConfig, task: nr.Task, test: list[str], state: nr.RefineState
) -> dict[str, dict]:
    """ORM and SORM against the truth, on two sampled drafts a test problem."""
    student = state.policy
    prompt = nr.encode_prompts(task, test, c).repeat(2, 1)
    b = nr.sample(student, prompt, c, generator=nr.rng(c.seed, "held-out drafts"))
    ends = nr.prefix_ends(task, b)
    right = nr.grades(task, b) > 0.5
    step, good = true_prefixes(task, b, ends)
    first = true_error(good, step)
    # V^pi of the prefixes of 200 drafts; the others have NaN.
    few = first_rows(b, 200)
    which, traces = nr.continuations_of(student, few, ends[:200], replace(c, continuations=32))
    value = torch.full(ends.shape, torch.nan)
    success, _ = nr.check_traces(task, few, ends, which, traces)
    value[which[:, 0], which[:, 1]] = success.float().mean(1)

    score = [scorer.read(prompt, b.response, c, ends) for scorer in (state.orm, state.sorm)]
    other = unbalanced_sorm(state, student, c).read(prompt, b.response, c, ends)
    position = torch.arange(ends.shape[1]).expand_as(ends)
    whole = torch.arange(len(ends)), ends.argmax(1)
    found: dict[str, dict] = {}
    for name, s in zip(("ORM", "SORM"), score, strict=True):
        p = s.sigmoid()
        missed = s < 0
        at = {i: step & (position == i) for i in (1, 2, 3)}
        found[name] = {
            "step accuracy": share((s > 0)[step] == good[step]),
            "first error": share((blamed(s, step) == first)[~right]),
            "final accuracy": share((s[whole] > 0) == right),
            "final auc": auc(s[whole], right),
            "missed, V^pi above 1/2": share(missed[step & good & (value > 0.5)]),
            "missed, V^pi below 1/2": share(missed[step & good & (value <= 0.5)]),
            "calibration": [[share(p[rows]), share(good[rows])] for rows in at.values()],
        }
    for name, s in (("balanced", score[1]), ("not balanced", other)):
        both = torch.stack([s.sigmoid()[step], position[step].float()])
        found[name] = {
            "correlation with position": round(float(both.corrcoef()[0, 1]), 4),
            "step accuracy": share((s > 0)[step] == good[step]),
        }
    return found


def picked(score: Tensor, each: Tensor) -> Tensor:
    """Of several candidates (n, B) the number of the one with the highest score (n, B), (B,)."""
    return each.gather(0, score.argmax(0, keepdim=True))[0]


def without_draft(task: nr.Task, demos: list[nr.Demo]) -> list[nr.Demo]:
    """A refiner's demonstrations for a solver: problem -> right response.

    What stands before a mark `<bad>` is kept: problem, right steps -> right rest. All else of the
    draft is left out.
    """
    separator, mark = task.encode(["<sep>", "<bad>"])
    found = []
    for asked, trace in demos:
        begin = asked.index(separator[0])
        end = asked.index(mark[0]) if mark[0] in asked else begin
        found.append((asked[:begin] + asked[begin + 1 : end], trace))
    return found


def solvers(state: nr.RefineState, task: nr.Task, c: nr.RefineConfig) -> dict[str, nr.Transformer]:
    """The controls: copies of the student, taught the traces of a refiner without its drafts."""
    found = {}
    for name in ("global", "local"):
        model = deepcopy(state.policy)
        demos = without_draft(task, state.demos[name])
        batches = partial(nr.gpt_batches, model, demos, c, size=max(1, c.minibatch // 2))
        nr.train_now("solver", [model], batches, c.updates, c, c.lr, c.muon_lr)
        found[name] = model
    return found


@torch.no_grad()
def refiner_quality(
    c: nr.RefineConfig, task: nr.Task, test: list[str], state: nr.RefineState
) -> dict[str, Any]:
    """What the refiners make of greedy drafts, who chooses, and where the local one begins."""
    greedy = replace(c, temperature=0.0)
    made = nr.refinements(state, task, test, greedy)
    with torch.enable_grad():
        solver = solvers(state, task, c)

    def grade(ids: Tensor) -> Tensor:
        both = zip(test, ids.tolist(), strict=True)
        return torch.tensor([task.grade(x, task.decode(y)) for x, y in both])

    draft, whole, rest = (grade(ids) for ids in made.response)
    chosen = picked(made.score, torch.stack([draft, whole, rest]))
    wrong = draft == 0
    prompt = nr.encode_prompts(task, test, c)
    three = [made.response[0]]
    for i in (1, 2):
        generator = nr.rng(c.seed, "best of 3", i)
        three.append(nr.sample(state.policy, prompt, c, generator=generator).response)
    score = torch.stack([state.orm.read(prompt, y, c) for y in three])
    graded = torch.stack([grade(y) for y in three])
    best = picked(score, graded)
    control = grade(nr.sample(solver["global"], prompt, greedy).response)
    mended = {
        "control": share(control[wrong]),
        "global": share(whole[wrong]),
        "local": share(rest[wrong]),
        "chosen": share(chosen[wrong]),
        "either": share(torch.maximum(whole, rest)[wrong]),
    }
    broken = {
        "control": share(1 - control[~wrong]),
        "global": share(1 - whole[~wrong]),
        "local": share(1 - rest[~wrong]),
        "chosen": share(1 - chosen[~wrong]),
    }

    mask = nr.up_to_eos(made.response[0], c)
    b = nr.Rollout(prompt, made.response[0], mask, prompt, prompt[:, 0])
    ends = nr.prefix_ends(task, b)
    step, good = true_prefixes(task, b, ends)
    orm, sorm = (scorer.read(prompt, b.response, c, ends) for scorer in (state.orm, state.sorm))
    count = step.sum(1)
    draw = random.Random(c.seed)
    where = {
        "the truth": true_error(good, step),
        "SORM": blamed(sorm, step),
        "ORM": blamed(orm, step),
        "chance": torch.tensor([draw.randint(0, int(n)) for n in count]),
    }
    for name, at in where.items():
        cut = ends.gather(1, at.clamp(max=count)[:, None])[:, 0].tolist()
        tails = nr.rewritten(state.local_refiner, task, b, cut, greedy, None)
        glued = []
        for y, n, tail in zip(b.response.tolist(), cut, tails, strict=True):
            glued.append((y[:n] + tail)[: c.response])
        mended[f"local, place by {name}"] = share(grade(torch.tensor(glued))[wrong])
        place = torch.arange(c.response)
        kept = b.response.masked_fill(place >= torch.tensor(cut)[:, None], c.pad_id)
        anew = nr.sample(solver["local"], prompt, greedy, kept).response
        mended[f"control, place by {name}"] = share(grade(anew)[wrong])
    return {
        "greedy": share(draft),
        "best of 3": share(best),
        "best of 3 by the truth": share(graded.amax(0)),
        "control": share(control),
        "global + local + ORM": share(chosen),
        "global alone": share(whole),
        "local alone": share(rest),
        "better refiner": max(share(whole), share(rest)),
        "mended": mended,
        "broken": broken,
    }


def measure_refine(c: nr.RefineConfig, cache: Path, labels: bool) -> dict[str, Any]:
    """One seed of refine: scorers, refiners, choice, and if asked for the labels."""
    task = front.make_task(c)
    train = front.CachedTrainer(cache)
    test = task.prompts(c.eval_problems, nr.rng(0, "test"), "test")
    student = nr.student(nr.gpt_base(task, c, train), task, c, train)
    began = time.time()
    state = nr.start_refine(student, c)
    for _ in nr.refine(state, task, c):
        pass
    found = {"seconds": round(time.time() - began, 1)}
    found["base"] = nr.accuracy(nr.gpt_base(task, c, train), task, test, c)
    found |= scorer_quality(c, task, test, state)
    if labels:
        prompt = nr.encode_prompts(task, test[:400], c)
        drafts = nr.sample(student, prompt, c, generator=nr.rng(c.seed, "labelled drafts"))
        found["labels"] = label_quality(c, task, drafts, student)
    return found | refiner_quality(c, task, test, state)


# ---- seq2seq: where the errors are ---------------------------------------------------------------


def corrupt(text: str, draw: random.Random) -> str:
    """One result of a right response changed; nothing else."""
    *steps, answer = re.split("(?<=;)", text)
    i = draw.randrange(len(steps))
    left, result = steps[i][:-1].split("=")
    wrong = draw.choice([x for x in range(100) if len(str(x)) == len(result) and str(x) != result])
    return "".join([*steps[:i], f"{left}={wrong};", *steps[i + 1 :], answer])


def localisation(off: Tensor, injected: Tensor) -> dict[str, float | None]:
    """Tokens said to be wrong against tokens that are; first: the first one is the first."""
    hit = off & injected
    first = (off.int().argmax(1) == injected.int().argmax(1)) & off.any(1)
    return {
        "precision": round(float(hit.sum() / off.sum().clamp(min=1)), 4),
        "recall": round(float(hit.sum() / injected.sum()), 4),
        "first": share(first),
    }


@torch.no_grad()
def disagreements(
    rewriter: nr.Transformer, task: nr.Task, b: nr.Rollout, c: nr.Config
) -> dict[str, Tensor]:
    """The tokens that a rewriter would not have written, (B, R), under three rules.

    argmax: they are not its likeliest, the rule of (11); top 2: nor its second; probability 0.1: it
    gives them less than that.
    """
    asked = []
    for x, y in zip(b.prompt.tolist(), b.response.tolist(), strict=True):
        asked.append(nr.rewriter_prompt(task, x, y, c))
    hidden = nr.predictive_hidden(rewriter, nr.left_pad(asked, c.pad_id), b.response)
    logp = nr.log_softmax(rewriter.lm_head(hidden), 1.0, c)
    written = logp.gather(-1, b.response[..., None])
    likelier = (logp > written).sum(-1)
    found = {
        "argmax": likelier >= 1,
        "top 2": likelier >= 2,
        "probability 0.1": written[..., 0] < log(0.1),
    }
    return {name: off & (b.mask > 0) for name, off in found.items()}


@torch.no_grad()
def falls(scorer: nr.Scorer, b: nr.Rollout) -> dict[str, Tensor]:
    """The tokens at which a scalar model's score falls, (B, R), and where it falls most."""
    rise = scorer.prefixes(b.prompt, b.response).diff(dim=1)
    rise = rise.masked_fill(b.mask == 0, torch.inf)
    largest = torch.zeros_like(b.mask).scatter(1, rise.argmin(1, keepdim=True), 1) > 0
    return {"scalar": rise < 0, "scalar, largest fall": largest}


class Injected:
    """Right responses to the test problems, and the same with one wrong result in each."""

    def __init__(self, task: nr.Task, test: list[str], c: nr.Config):
        careful = front.make_task(replace(c, planted="none"), careful=True)
        draw = random.Random(c.seed)
        clean = [careful.respond(x, nr.rng(c.seed, "clean")) for x in test]
        prompt = nr.encode_prompts(task, test, c)

        def rollout(texts: list[str]) -> nr.Rollout:
            response = nr.right_pad(task.encode(texts), c.pad_id, c.response)
            mask = nr.up_to_eos(response, c)
            return nr.Rollout(prompt, response, mask, response, prompt[:, 0])

        self.clean = rollout(clean)
        self.spoiled = rollout([corrupt(y, draw) for y in clean])
        self.injected = self.clean.response != self.spoiled.response

    def quality(self, off: Callable[[nr.Rollout], dict[str, Tensor]]) -> dict[str, dict]:
        """off: rollouts -> by name, which tokens are said to be wrong. How well that is said."""
        found = {k: localisation(x, self.injected) for k, x in off(self.spoiled).items()}
        for name, x in off(self.clean).items():
            found[name]["clean untouched"] = share(~x.any(1))
        return found


# ---- seq2seq: what its models and policies do ----------------------------------------------------


@dataclass(frozen=True)
class ByCoin(Arithmetic):
    """Arithmetic whose labeller tosses a coin between two responses: pairs that say nothing."""

    def preferences(self, n: int, generator: torch.Generator) -> list[tuple[str, str, str]]:
        """The pairs that a labeller without a weakness orders, each turned round by a coin."""
        pairs = super().preferences(n, generator)
        heads = (torch.rand(n, generator=generator) < 0.5).tolist()
        both = zip(pairs, heads, strict=True)
        return [(x, b, a) if turn else (x, a, b) for (x, a, b), turn in both]


def trained(
    model: nr.Transformer, batches: nr.Batches, updates: int, c: nr.Config
) -> nr.Transformer:
    """By `fit`, with the rates of the rewriter."""
    state = nr.Fit([model], nr.optimizers([model], c.base_lr, c.muon_lr))
    for _ in nr.fit(state, batches, updates, c):
        pass
    return model.requires_grad_(False)


def outcome(
    policy: nr.Transformer, task: nr.Task, test: list[str], c: nr.Config
) -> dict[str, float]:
    """What a policy does on the test problems, and on chains longer than it was trained on."""
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


def dpo_on(
    policy: nr.Transformer,
    task: nr.Task,
    pairs: list[tuple[str, str, str]],
    c: nr.DPOConfig,
) -> nr.Transformer:
    """One round of DPO on the labeller's pairs."""
    state = nr.start_rounds(policy, c)
    sides = []
    for i in (1, 2):
        ids = task.encode([pair[i] for pair in pairs])
        sides.append(nr.right_pad(ids, c.pad_id, c.response))
    prompt = nr.encode_prompts(task, [x for x, _, _ in pairs], c)
    state.pairs = {"prompt": prompt, "response": torch.stack(sides, 1)}
    with torch.no_grad():
        parts = torch.arange(len(pairs)).split(c.micro)
        ref = [nr.pair_logprobs(policy, state.pairs, part) for part in parts]
    state.pairs["ref"] = torch.cat(ref)
    for _ in range(c.updates):
        nr.pair_update(state, c)
        state.update += 1
    return policy


def controls(
    c: nr.Seq2SeqConfig,
    dpo: nr.DPOConfig,
    task: nr.Task,
    test: list[str],
    pairs: list[tuple[str, str, str]],
    errors: Injected,
    fresh: Callable[[], nr.Transformer],
) -> dict[str, Any]:
    """DPO on the same pairs, and rewriters of one mapping only."""
    found: dict[str, Any] = {}
    found["DPO on the pairs"] = outcome(dpo_on(fresh(), task, pairs, dpo), task, test, c)

    demos = nr.rewriting_demos(task, pairs, c)
    halves = {"correction only": demos[: len(pairs)], "identity only": demos[len(pairs) :]}
    for name, half in halves.items():
        model = fresh()
        trained(model, nr.gpt_batches(model, half, c), c.reward_updates, c)
        found[name] = errors.quality(partial(disagreements, model, task, c=c))["argmax"]
    return found


def paid_by_each(
    c: nr.Seq2SeqConfig,
    scalar: nr.PPOConfig,
    task: nr.Task,
    test: list[str],
    models: dict[str, dict[str, torch.nn.Module]],
    fresh: Callable[[], nr.Transformer],
) -> dict[str, Any]:
    """What `ppo` makes of each reward.

    The scalar ones are also measured with the weights whose KL is nearest when they first reach the
    KL that the other one ends with.
    """
    found: dict[str, Any] = {}
    for name in (SEQ, SCALAR, LIKELY):
        loop, each = (nr.seq2seq, c) if name == SEQ else (nr.ppo, scalar)
        level = f"{name}, at the same KL"
        state = nr.start_ppo(fresh(), each)
        state.models = models[name]
        curve = []
        before = (-1.0, None)
        weights = deepcopy(state.policy)
        for m in loop(state, task, each):
            curve.append([round(m[k], 4) for k in ("kl", "truth", "reward", "length")])
            now = (m["kl"], weights)  # an update's KL is that of the weights before it
            if name != SEQ and level not in found and m["kl"] >= found[SEQ]["kl"]:
                gaps = [abs(kl - found[SEQ]["kl"]) for kl, _ in (now, before)]
                kl, near = now if gaps[0] <= gaps[1] else before
                found[level] = outcome(near, task, test, each) | {"kl": kl}
            before = now
            weights = deepcopy(state.policy)
        found[name] = outcome(state.policy, task, test, each)
        found[name] |= {"kl": mean(x[0] for x in curve[-5:]), "curve": curve}
    return found


def measure_seq2seq(
    c: nr.Seq2SeqConfig,
    scalar: nr.PPOConfig,
    dpo: nr.DPOConfig,
    base: nr.Seq2SeqConfig,
    cache: Path,
    coin: bool,
) -> dict[str, Any]:
    """One labeller and seed: where rewriter and scalar model see errors, what each makes of `ppo`.

    c, scalar and dpo are of seq2seq, of ppo with the scalar reward, and of DPO on the same pairs;
    base is of the base model, which may know longer chains; coin: a coin orders the pairs.
    """
    train = front.CachedTrainer(cache)
    fresh = partial(nr.gpt_base, front.make_task(base), base, train)
    task = front.make_task(c)
    if coin:
        task = ByCoin(**vars(task))
    test = task.prompts(c.eval_problems, nr.rng(0, "test"), "test")
    if base != c or coin:  # the cache would take these models for those of other bases or pairs
        train = nr.train_now
    hidden = replace(scalar, logp_weight=0.0)
    models = {
        SEQ: nr.rewriter_models(fresh(), task, c, train),
        SCALAR: nr.scorer_models(fresh(), task, hidden, train),
        LIKELY: nr.scorer_models(fresh(), task, scalar, train),
    }
    rewriter = models[SEQ]["rewriter"]
    found: dict[str, Any] = {"base": outcome(fresh(), task, test, c)}
    pairs = nr.labelled_pairs(task, c)
    demos = nr.encode_demos(task, [(x, y) for x, y, _ in pairs], c)
    taught = fresh()
    trained(taught, nr.gpt_batches(taught, demos, c), c.reward_updates, c)
    found["SFT on the preferred"] = outcome(taught, task, test, c)
    errors = Injected(task, test, c)
    found |= errors.quality(partial(disagreements, rewriter, task, c=c))
    found |= errors.quality(partial(falls, models[SCALAR]["scorer"]))
    likely = errors.quality(partial(falls, models[LIKELY]["scorer"]))
    found |= {f"{name}, with log-probs": x for name, x in likely.items()}
    if c.planted == "round":
        found |= controls(c, dpo, task, test, pairs, errors, fresh)
    return found | paid_by_each(c, scalar, task, test, models, fresh)


def measure(
    arm: str,
    seed: int,
    threads: int,
    cache: Path,
    /,
    sizes: dict[str, dict] = LAPTOP,
    **more: Any,
) -> dict:
    """One arm with one seed. `more` goes to every method of the arm that has such a number."""
    began = time.time()
    if arm in REFINE:
        c = config("refine", seed, threads, sizes, **REFINE[arm] | more)
        found = measure_refine(c, cache, labels=arm == "refine")
    else:
        planted = arm if arm in PLANTED else "none"
        more |= {"planted": planted, "response": 52 if arm == "long" else 28}
        c = config("seq2seq", seed, threads, sizes, **more)
        scalar = config("ppo", seed, threads, sizes, **more)
        scalar = replace(scalar, reward="learned", beta=c.beta)
        dpo = config("iterative_dpo", seed, threads, sizes, **more)
        dpo = replace(dpo, alpha=0.0)
        base = c
        if arm == "short":
            c, scalar, dpo = (replace(x, max_ops=2) for x in (c, scalar, dpo))
        found = measure_seq2seq(c, scalar, dpo, base, cache, coin=arm == "coin")
    return {"arm": arm, "seed": seed, "seconds": round(time.time() - began, 1), "found": found}


# ---- what the README shows ----------------------------------------------------------------------


def collect() -> dict:
    """All jobs -> OUT, the curves as means over seeds."""
    kept = read_arms(OUT)
    for arm in ARMS:
        if jobs := read_jobs(JOBS, arm):
            about = about_arm("inside", arm, jobs)
            for name in (SEQ, SCALAR, LIKELY):
                if name in jobs[0]["found"]:
                    curves = {job["seed"]: job["found"][name].pop("curve") for job in jobs}
                    updates = zip(*(curves[job["seed"]] for job in parted(jobs)[0]), strict=True)
                    about[name] = [
                        [round(mean(x), 4) for x in zip(*update, strict=True)] for update in updates
                    ]
            each = [{k: job[k] for k in ("seed", "commit", "seconds", "found")} for job in jobs]
            shown, more = parted(each)
            kept[arm] = about | {"seeds": shown, "more seeds": more}
    write_arms(OUT, kept)
    return kept


def numbers(kept: dict, arm: str, *path: str) -> list[Any]:
    """One number of every seed. Where a KL was never reached, the end of that run counts."""
    values = [job["found"] for job in kept[arm]["seeds"]]
    for key in path:
        end = key.removesuffix(", at the same KL")
        values = [v[key] if key in v else v[end] for v in values]
    return values


def cell(kept: dict, arm: str, path: tuple[str, ...], minus: tuple[str, ...] = ()) -> str:
    """Mean and interval of a number, or of its difference to another; empty if it is not there."""
    try:
        values = numbers(kept, arm, *path)
        if minus:
            values = [a - b for a, b in zip(values, numbers(kept, arm, *minus), strict=True)]
        return front.interval(values)
    except (KeyError, TypeError):
        return ""


def placed(whom: str, who: str = "local") -> tuple[str, str]:
    """Where the result stands of one who goes on from a place that somebody chose."""
    return ("mended", f"{who}, place by {whom}")


def refine_tables(kept: dict) -> list[str]:
    """Scorers, refiners and labels."""
    there = [arm for arm in REFINE if arm in kept]
    titles = {"refine": "", "hidden": "hidden vectors alone: "}
    heads = ("ORM", "SORM", "SORM minus ORM")
    lines = head(
        "on held-out drafts of the student", *(titles[a] + h for a in there for h in heads)
    )
    for title, key in (
        ("a step is right or wrong", "step accuracy"),
        ("first error of wrong drafts", "first error"),
        ("the whole is right or wrong", "final accuracy"),
        ("the whole, area under the curve", "final auc"),
        ("right steps called wrong, the student mostly gets there", "missed, V^pi above 1/2"),
        ("right steps called wrong, it mostly does not", "missed, V^pi below 1/2"),
    ):
        cells = []
        for arm in there:
            orm, sorm = ("ORM", key), ("SORM", key)
            cells += [cell(kept, arm, orm), cell(kept, arm, sorm), cell(kept, arm, sorm, orm)]
        lines.append(row(title, *cells))

    names = {"refine": "with log-probs", "hidden": "hidden vectors alone"}
    lines += head("right, greedy, test problems", *(names[arm] for arm in there))
    for title, key in (
        ("the student's draft", "greedy"),
        ("best of 3 drafts by ORM", "best of 3"),
        ("best of 3 drafts by the truth", "best of 3 by the truth"),
        ("local refiner on every draft", "local alone"),
        ("global refiner on every draft", "global alone"),
        ("solver taught the global refiner's traces, no draft", "control"),
        ("**ORM chooses between draft, global and local**", "global + local + ORM"),
    ):
        lines.append(row(title, *(cell(kept, arm, (key,)) for arm in there)))

    refine = partial(cell, kept, "refine")
    lines += head("of the first column", "wrong drafts mended", "right drafts broken")
    for title, of in (
        ("local refiner", "local"),
        ("global refiner", "global"),
        ("solver, no draft", "control"),
        ("ORM chooses", "chosen"),
    ):
        lines.append(row(title, refine(("mended", of)), refine(("broken", of))))
    lines.append(row("local or global, the truth chooses", refine(("mended", "either")), ""))

    lines += head("mended from a place chosen by", "local refiner", "solver, reads no further")
    for whom in ("the truth", "SORM", "ORM", "chance"):
        lines.append(row(whom, refine(placed(whom)), refine(placed(whom, "control"))))

    lines += head("step labels", "precision", "recall")
    for name in kept["refine"]["seeds"][0]["found"]["labels"]:
        cells = [refine(("labels", name, key)) for key in ("precision", "recall")]
        lines.append(row(name, *cells))
    return lines


def error_table(kept: dict) -> list[str]:
    """Who finds the injected errors."""
    titles = ("precision", "recall", "the first is the first", "right ones untouched")
    lines = head("injected errors", *titles)
    for title, name in (
        ("rewriter, argmax", "argmax"),
        ("rewriter, two likeliest", "top 2"),
        ("rewriter, probability 0.1", "probability 0.1"),
        ("scalar model, score falls", "scalar"),
        ("scalar model, score falls most", "scalar, largest fall"),
        ("the same with log-probs", "scalar, largest fall, with log-probs"),
        ("trained on corrections only", "correction only"),
        ("trained on identity only", "identity only"),
    ):
        keys = ["precision", "recall", "first"]
        # The largest fall is one token of every response, of right ones too.
        keys += [] if "largest" in name else ["clean untouched"]
        cells = [cell(kept, "round", (name, key)) for key in keys]
        lines.append(row(title, *cells, *[""] * (4 - len(cells))))
    return lines


def labeller_table(kept: dict) -> list[str]:
    """What each way to learn from the preferences makes of each labeller's weakness."""
    who = {
        "base": "base",
        "SFT": "SFT on the preferred",
        "DPO": "DPO on the pairs",
        "`seq2seq`": SEQ,
        "scalar, same KL": LEVEL,
        "scalar, 40 updates": SCALAR,
        "with log-probs, same KL": LIKELY_LEVEL,
        "with log-probs, 40 updates": LIKELY,
    }
    extra = {
        "long": ("tokens", "length"),
        "refusal": ("harmless refused", "refused"),
        "short": ("three operations, right", "longer chains"),
    }
    lines = head("the labeller falls for", *who)
    for arm in filter(kept.get, LABELLERS):
        wanted = [("right", "greedy"), ("KL, nats", "kl")]
        wanted += [extra[arm]] if arm in extra else []
        for title, key in wanted:
            lines.append(row(f"{arm}: {title}", *(cell(kept, arm, (x, key)) for x in who.values())))
    return lines


def differences(kept: dict) -> list[str]:
    """What is compared within each seed."""
    chosen = ("global + local + ORM",)
    position = "correlation with position"
    asked = [
        (f"{arm}, right: {title}", arm, a, b)
        for arm in REFINE
        for title, a, b in (
            ("ORM's choice minus the draft", chosen, ("greedy",)),
            ("ORM's choice minus the better refiner", chosen, ("better refiner",)),
            ("ORM's choice minus best of 3", chosen, ("best of 3",)),
            ("best of 3 minus the draft", ("best of 3",), ("greedy",)),
            ("global refiner minus solver without draft", ("global alone",), ("control",)),
            ("ORM's choice minus solver without draft", chosen, ("control",)),
        )
    ]
    asked += [
        ("mended: place by the truth minus by SORM", "refine", placed("the truth"), placed("SORM")),
        ("mended: place by SORM minus by ORM", "refine", placed("SORM"), placed("ORM")),
        ("mended: place by SORM minus by chance", "refine", placed("SORM"), placed("chance")),
        (
            "mended: refiner minus solver, true place",
            "refine",
            placed("the truth"),
            placed("the truth", "control"),
        ),
        ("SORM's score with position, balanced", "refine", ("balanced", position), ()),
        ("the same, not balanced", "refine", ("not balanced", position), ()),
    ]
    preferred = ("SFT on the preferred", "greedy")
    title = "round: SFT on the preferred minus `seq2seq`"
    asked.append((title, "round", preferred, (SEQ, "greedy")))
    others = {"base": "base", "scalar at the same KL": LEVEL}
    others["scalar with log-probs at the same KL"] = LIKELY_LEVEL
    for arm in LABELLERS:
        for than, other in others.items():
            title = f"{arm}: `seq2seq` minus {than}"
            asked.append((title, arm, (SEQ, "greedy"), (other, "greedy")))
        title = f"{arm}: scalar with log-probs, 40 updates, minus SFT on the preferred"
        asked.append((title, arm, (LIKELY, "greedy"), preferred))
    for than, other in others.items():
        title = f"short, three operations: `seq2seq` minus {than}"
        asked.append((title, "short", (SEQ, "longer chains"), (other, "longer chains")))
    lines = head("differences paired by seed, and two correlations", "")
    return lines + [row(x, cell(kept, arm, a, b)) for x, arm, a, b in asked if arm in kept]


def tables(kept: dict) -> str:
    """The README's tables, as Markdown: mean and 95 % interval over seeds."""
    lines = refine_tables(kept) if "refine" in kept else []
    lines += error_table(kept) if "round" in kept else []
    return "\n".join(lines + labeller_table(kept) + differences(kept)).strip()


def picture(kept: dict) -> None:
    """Who says when, where and how; and what each reward pays for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    bars = {
        "draft": "greedy",
        "best\nof 3": "best of 3",
        "local": "local alone",
        "global": "global alone",
        "no\ndraft": "control",
        "ORM\nchooses": "global + local + ORM",
    }
    height = []
    half = []
    for key in bars.values():
        values = numbers(kept, "refine", key)
        height.append(mean(values))
        shown = front.interval(values) + " ± 0"  # one seed has no interval
        half.append(float(shown.split("±")[1]))
    colors = ["0.75", "0.75", "C4", "C4", "0.5", "C1"]
    left.bar(range(len(bars)), height, yerr=half, color=colors, ecolor="0.2", capsize=3)
    left.axhline(height[0], color="0.4", ls="--", lw=1)
    left.set(title="refine", ylabel="greedy accuracy, test", ylim=(0, 1))
    left.set_xticks(range(len(bars)), list(bars), fontsize=9)

    for name, color in (("ORM", "C1"), ("SORM", "C2")):
        seeds = numbers(kept, "refine", name, "calibration")
        says = [[p[0] for p in points] for points in seeds]
        band(middle, (1, 2, 3), says, color, f"{name} says", marker="o")
    true = [[p[1] for p in points] for points in seeds]
    band(middle, (1, 2, 3), true, "0.3", "truly right so far", ls="--")
    middle.set(title="right up to this step?", xlabel="step of the draft", xticks=(1, 2, 3))
    middle.set(ylabel="probability or share", ylim=(0, 1))

    for name, color in ((SEQ, "C0"), (SCALAR, "C3"), (LIKELY, "C2")):
        right.plot([], color=color, label=name.removeprefix("ppo, "))
        for arm, style in (("none", "-"), ("round", "--")):
            truth = [update[1] for update in kept[arm][name]]
            right.plot(truth, color=color, ls=style)
    right.axhline(truth[0], color="0.4", ls=":", lw=1, label="base")
    right.plot([], color="0.2", label="labeller without a weakness")
    right.plot([], color="0.2", ls="--", label="labeller likes round answers")
    right.set(title="ppo paid by a learned reward", xlabel="ppo update (mean over seeds)")
    right.set(ylabel="right responses, sampled (share)", ylim=(0, 1))
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
