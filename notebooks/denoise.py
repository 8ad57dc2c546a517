"""Paid along the way: python notebooks/denoise.py [ARM ...] [--seeds 0 1 2 3 4] [--threads 1]

The masked-diffusion LM under policy gradient: how its likelihood is estimated, who judges a canvas
half way (the prover), and what of the gain is the prover's (the controls). Accuracy, what is right
half way, what fewer passes cost, whether right answers have right steps; arithmetic and countdown,
test problems. The rule, made before the runs: what a prover tells is worth something if its arm
beats the outcome alone and the best of its controls, both by a 95 % interval that is above zero
(pairs of equal seeds, equal updates), in greedy accuracy or in the answer at once after 62 % of the
passes. Each run is kept in runs/denoise/ARM-SEED.json and not run again; all together make
notebooks/results/denoise.json and denoise.png. Needs the extra `notebooks`.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
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

JOBS = ROOT / "runs" / "denoise"
OUT = ROOT / "notebooks" / "results" / "denoise.json"
# Every arm has so many updates; those that start with "long_" have so many times as many, and
# `outcome_more` twice as many: about as many samples as the process reward draws with its branches.
UPDATES = 25
MORE = 2
LONGER = 4
# What an arm trains on, by the start of its name.
LONG = "long_"
COUNTDOWN = "countdown_"
TASKS = {
    "": "arithmetic",
    COUNTDOWN: "countdown",
    LONG + COUNTDOWN: f"countdown, {LONGER * UPDATES} updates",
}
SIZES = LAPTOP | {"denoise": {"updates": UPDATES}}
PROCESS = {"arm": "process"}
CANVAS = {"prover": "same_canvas"}
ONCE = {"prover": "at_once", "branches": 1}
PAID = {"process_weight": 2.0}
ARMS: dict[str, dict[str, Any]] = {
    "outcome": {},
    "outcome_more": {"updates": MORE * UPDATES},
    # How the likelihood is estimated, under the outcome alone.
    "mean_field": {},
    "coupled": {},
    "with_place": {},
    "mu8": {"epochs": 8},
    "bound": {},
    "bounds": {"arm": "bounds"},
    # (7), with several provers.
    "tail": PROCESS,
    "canvas": PROCESS | CANVAS,
    "base": PROCESS | {"prover": "frozen_base"},
    "once": PROCESS | ONCE,
    "n1": PROCESS | {"branches": 1},
    "n9": PROCESS | {"branches": 9},
    # (7) with D against what the prover itself makes of the empty canvas.
    "own_tail": {"arm": "own"},
    "own_once": ONCE | {"arm": "own"},
    # The prospects as a part of the reward.
    "paid_once": PAID | ONCE | {"arm": "paid"},
    # Controls of (7): the same weight without the prover's word.
    "tail_constant": {"arm": "constant"},
    "tail_shuffled": {"arm": "shuffled"},
    "own_shuffled": {"arm": "own_shuffled"},
    "own_once_shuffled": ONCE | {"arm": "own_shuffled"},
    "paid_shuffled": PAID | ONCE | {"arm": "paid_shuffled"},
    "right_more": {"arm": "right_more"},
    "right_only": {"arm": "right_only"},
    "short": {"arm": "short"},
    # Other credits.
    "no_indicator": CANVAS | {"arm": "no_indicator"},
    "segments": CANVAS | {"arm": "segments"},
}
TITLES = {
    "outcome": "the outcome alone",
    "outcome_more": "the outcome alone, twice the updates",
    "mean_field": "mean field: all tokens on a canvas of MASKs",
    "coupled": "coupled masks: half of it beside half of the others",
    "with_place": "on the sampler's own canvas, and that it was written there",
    "mu8": "mean field, eight passes over a batch",
    "bound": "a lower bound from two orders",
    "bounds": "the same, an upper bound for wrong answers",
    "tail": "(7), short tail: the paper's",
    "canvas": "(7), same canvas: the null prover",
    "base": "(7), the frozen base on the same canvas",
    "once": "(7), all at once, nothing drawn",
    "n1": "(7), short tail, N = 1",
    "n9": "(7), short tail, N = 9",
    "own_tail": "(7), short tail, D against its own start",
    "own_once": "(7), all at once, D against its own start",
    "paid_once": "r (1 + 2 V), all at once",
    "tail_constant": "control: short tail, V replaced by its mean",
    "tail_shuffled": "control: short tail, V shuffled",
    "own_shuffled": "control: short tail, D against its own start, V shuffled",
    "own_once_shuffled": "control: all at once, D against its own start, V shuffled",
    "paid_shuffled": "control: r (1 + 2 V), all at once, V shuffled",
    "right_more": "control: 1.5 A for right answers",
    "right_only": "control: A for right answers, nothing for wrong ones",
    "short": "control: more for short right answers",
    "no_indicator": "same canvas, without the indicator",
    "segments": "same canvas, each stretch its own",
}
LIKELIHOODS = ("mean_field", "coupled", "outcome", "with_place")
# The controls of each arm that asks a prover, beside those of all of them. What a prover tells is
# worth something if the arm beats the best of its controls.
OF_ALL = ("right_more", "right_only", "short")
CONTROLS = {
    "tail": ("tail_constant", "tail_shuffled", *OF_ALL),
    "own_tail": ("own_shuffled", *OF_ALL),
    "own_once": ("own_once_shuffled", *OF_ALL),
    "paid_once": ("paid_shuffled", *OF_ALL),
}
CONTROLS |= dict.fromkeys(("canvas", "base", "once", "no_indicator", "segments"), OF_ALL)
# Arms that `claims.py` runs, at sizes of its own.
SMALL_ONLY = ("mu8", "bound", "bounds")
EVERY = ("provers", *(arm for arm in ARMS if arm not in SMALL_ONLY))
EVERY += tuple(COUNTDOWN + arm for arm in EVERY if arm == "outcome" or arm not in LIKELIHOODS)
EVERY += tuple(LONG + COUNTDOWN + arm for arm in ("outcome", "own_once"))


# ---- credits that only stand here ---------------------------------------------------------------

Credit = Callable[[nr.PPOState, nr.Task, nr.Rollout, Tensor, nr.DenoiseConfig], Tensor]


def own_start(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, rows: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """What the prover itself makes of the empty canvas (B,), 0 but for the rows asked for.

    So a weak prover is measured by what it does itself. That is the baseline of arXiv 2410.08146,
    though not its credit, which pays every step of every response. The responses of a group share
    the empty canvas, and so their mean.
    """
    found = torch.zeros(rows.shape)
    if rows.any():
        part = b.select(rows)
        start = torch.zeros_like(part.group)
        generator = nr.rng(c.seed, "empty", state.update)
        more = nr.PROVERS[c.prover](state, part, start, c, generator)
        state.samples += len(more.mask)
        empty = nr.grades(task, more).view(len(start), -1).mean(1)
        found[rows] = empty - nr.group_advantage(empty, part.group, "mean")
    return found


# What stands in the place of V: (V of the responses that beat their group, c, state) -> as many.
Change = Callable[[Tensor, nr.DenoiseConfig, Any], Tensor]


def unchanged(value: Tensor, c: nr.DenoiseConfig, state: nr.PPOState) -> Tensor:
    """What the prover says of each."""
    return value


def constant(value: Tensor, c: nr.DenoiseConfig, state: nr.PPOState) -> Tensor:
    """A control: the mean of V to all of them."""
    return value.mean().expand_as(value)


def shuffled(value: Tensor, c: nr.DenoiseConfig, state: nr.PPOState) -> Tensor:
    """A control: the same numbers, each to another response."""
    generator = nr.rng(c.seed, "shuffle", state.update)
    return value[torch.randperm(len(value), generator=generator)]


def changed_process(change: Change, own: bool = False) -> Credit:
    """(7) with D = change(V(x_t)) - V(x_T), for the responses that beat their group.

    V(x_T) is the accuracy of the group, as in (6), or the prover's own.
    """

    def credit(
        state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
    ) -> Tensor:
        adv = nr.group_advantage(reward, b.group, "mean")
        better = adv > 0
        _, value = nr.prospects(state, task, b, better, c)
        if better.any():
            value[better] = change(value[better], c, state)
        start = own_start(state, task, b, better, c) if own else nr.group_accuracy(reward, b.group)
        progress = (value - start).nan_to_num()
        return (adv + c.process_weight * progress)[:, None] * b.mask

    return credit


def paid_by_prospects(change: Change) -> Credit:
    """r (1 + weight change(V)) against the mean of the group.

    Other than in (7) the prospects can only add to what a right answer earns.
    """

    def credit(
        state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
    ) -> Tensor:
        right = reward > 0
        _, value = nr.prospects(state, task, b, right, c)
        if right.any():
            value[right] = change(value[right], c, state)
        paid = reward + c.process_weight * value.nan_to_num()
        return nr.group_advantage(paid, b.group, "mean")[:, None] * b.mask

    return credit


def short(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """A control that asks nobody: a right answer earns up to thrice as much, the shorter it is."""
    free = 1 - b.mask.sum(1) / c.response
    paid = reward + 2 * free * (reward > 0)
    return nr.group_advantage(paid, b.group, "mean")[:, None] * b.mask


def right_more(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """A control that draws nothing: right answers weigh half as much again."""
    adv = nr.group_advantage(reward, b.group, "mean")
    return torch.where(adv > 0, 1.5 * adv, adv)[:, None] * b.mask


def right_only(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """A control: wrong answers are not pushed down."""
    return nr.group_advantage(reward, b.group, "mean").clamp(min=0)[:, None] * b.mask


def no_indicator(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """A + D for all: E[D] = 0 then, and on the tokens after t it only adds variance."""
    every = torch.ones_like(b.group, dtype=torch.bool)
    _, value = nr.prospects(state, task, b, every, c)
    adv = nr.group_advantage(reward, b.group, "mean")
    progress = value - nr.group_accuracy(reward, b.group)
    return (adv + c.process_weight * progress)[:, None] * b.mask


def segments(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """To each token what its own stretch achieved: before t V(x_t) - V(x_T), then r - V(x_t)."""
    every = torch.ones_like(b.group, dtype=torch.bool)
    p, value = nr.prospects(state, task, b, every, c)
    before = value - nr.group_accuracy(reward, b.group)
    after = reward - value
    return torch.where(b.order < p[:, None], before[:, None], after[:, None]) * b.mask


nr.DENOISE_ARMS |= {
    "constant": changed_process(constant),
    "shuffled": changed_process(shuffled),
    "own": changed_process(unchanged, own=True),
    "own_shuffled": changed_process(shuffled, own=True),
    "paid": paid_by_prospects(unchanged),
    "paid_shuffled": paid_by_prospects(shuffled),
    "short": short,
    "right_more": right_more,
    "right_only": right_only,
    "no_indicator": no_indicator,
    "segments": segments,
}


# ---- provers that only stand here ----------------------------------------------------------------


def frozen_base(
    state: nr.PPOState,
    b: nr.Rollout,
    p: Tensor,
    c: nr.DenoiseConfig,
    generator: torch.Generator,
) -> nr.Rollout:
    """The policy as it was at the start goes on with the same canvas."""
    return nr.same_canvas(replace(state, policy=state.reference), b, p, c, generator)


def at_once(
    state: nr.PPOState,
    b: nr.Rollout,
    p: Tensor,
    c: nr.DenoiseConfig,
    generator: torch.Generator | None = None,
) -> nr.Rollout:
    """The likeliest token in every open place, all in one pass: nothing is drawn."""
    canvas = nr.canvas_before(b.response, b.order, p, c)
    said = nr.fill_at_once(state.policy, b.prompt, canvas, c)
    return nr.Rollout(b.prompt, said, nr.up_to_eos(said, c), b.order, b.group)


nr.PROVERS |= {"frozen_base": frozen_base, "at_once": at_once}


# ---- estimates and a loop that only stand here ---------------------------------------------------


def mean_field(model: nr.Transformer, b: nr.Rollout, c: nr.Config) -> tuple[Tensor, Tensor]:
    """(2) as in arXiv 2504.12216: one pass over a canvas of MASKs, each token as if it were alone.

    Returns log-probs (B, R) and the vectors (B, R, C) they were read from.
    """
    hidden = nr.predictive_hidden(model, b.prompt, torch.full_like(b.response, c.mask_id))
    return nr.gather_logprobs(model, hidden, b.response, c.temperature), hidden


def coupled(model: nr.Transformer, b: nr.Rollout, c: nr.Config) -> tuple[Tensor, Tensor]:
    """Half of it mean field, half what each token has beside some of the others.

    Those are seen by a mask and its complement, as in arXiv 2506.20639, whose mask is random; here
    it is the tokens of even passes. The weight 2 makes that half a bound.
    """
    logp, hidden = mean_field(model, b, c)
    partly = torch.zeros_like(logp)
    for is_mask in (b.order % 2 == 0, b.order % 2 == 1):
        canvas = b.response.masked_fill(is_mask | (b.response == c.pad_id), c.mask_id)
        seen = nr.predictive_hidden(model, b.prompt, canvas)
        beside = nr.gather_logprobs(model, seen, b.response, c.temperature)
        partly = partly + 2 * is_mask * beside
    return (logp + partly) / 2, hidden


def with_place(model: nr.Transformer, b: nr.Rollout, c: nr.DenoiseConfig) -> tuple[Tensor, None]:
    """What the sampler did in each pass, whole: which token it wrote, and that it wrote it there.

    It drew a token for every open place of the block and kept the surest. So a pass has the
    log-prob of the tokens that it wrote, plus that of drawing less sure tokens everywhere else. The
    probabilities of all that a pass can do add up to 1, so that the expected gradient of their
    log-probs is zero. Without the second part it is not. It counts with the least sure token.
    """
    R = b.response.shape[1]
    block = min(c.block, R)
    counts = (b.mask > 0) & (b.order >= 0)
    pairs = counts.nonzero()
    pairs[:, 1] = b.order[counts]
    which_row, p = pairs.unique(dim=0).T
    response, order = b.response[which_row], b.order[which_row]
    canvas = nr.canvas_before(response, order, p, c)
    written = order == p[:, None]
    begin = written.int().argmax(1, keepdim=True) // block * block
    place = begin.clamp(max=R - block) + torch.arange(block)
    hidden, which = nr.read_once(model, b.prompt[which_row], canvas)
    logits = model.lm_head(hidden[which[:, None], place])
    logp = nr.log_softmax(logits, c.temperature, model.config)
    sure = nr.log_softmax(logits, 1.0, model.config).detach()

    here = written.gather(1, place)
    open_still = (canvas.gather(1, place) == c.mask_id) & ~here
    token = response.gather(1, place).masked_fill(~here, 0)
    mine = nr.of_tokens(logp, token).masked_fill(~here, 0.0)
    least, who = nr.of_tokens(sure, token).masked_fill(~here, torch.inf).min(1)
    # Of equally sure tokens the sampler keeps the first.
    later = torch.arange(block) > who[:, None]
    lower = (sure < least[:, None, None]) | ((sure == least[:, None, None]) & later[..., None])
    less_sure = (logp.exp() * lower).sum(-1)
    others = less_sure.clamp(min=1e-9).log().masked_fill(~open_still, 0.0).sum(1)
    mine = mine + F.one_hot(who, block) * others[:, None]
    found = torch.zeros_like(b.mask)
    at = (which_row[:, None].expand_as(place)[here], place[here])
    return found.index_put(at, mine[here]) * b.mask, None


def in_two_orders(model: nr.Transformer, b: nr.Rollout, c: nr.DenoiseConfig) -> Tensor:
    """The log-probs of the tokens (2, B, R) in the order they were written, and in the reverse.

    Reverse within each block: the tokens of its first pass are read beside all others, and so on.
    """
    first_pass = b.order // c.block_passes * c.block_passes  # of the token's block
    reverse = 2 * first_pass + c.block_passes - 1 - b.order
    found = []
    for order in (b.order, torch.where(b.order >= 0, reverse, b.order)):
        logp, _ = nr.estimate_diffusion(model, replace(b, order=order, logp=None), c)
        found.append(logp)
    return torch.stack(found)


def lower_bound(model: nr.Transformer, b: nr.Rollout, c: nr.DenoiseConfig) -> tuple[Tensor, None]:
    """The mean of both orders' log-probs: at most the logarithm of their mean probability."""
    return in_two_orders(model, b, c).mean(0), None


def two_bounds(model: nr.Transformer, b: nr.Rollout, c: nr.DenoiseConfig) -> tuple[Tensor, None]:
    """As arXiv 2510.09541: a lower bound for right answers, an upper one for wrong answers.

    Who pushes a lower bound down need not push down what lies above it. The upper bound of a token
    is the logarithm of its mean probability.
    """
    logp = in_two_orders(model, b, c)
    lower = logp.mean(0)
    if b.adv is None:
        return lower, None
    upper = logp.logsumexp(0) - math.log(2)
    return torch.where(b.adv < 0, upper, lower), None


def credit_of_two_bounds(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """The outcome alone. The log-probs are read again, now that it is known who was wrong."""
    b.adv = nr.outcome(state, task, b, reward, c)
    again = nr.annotate(state, replace(b, logp=None), c, two_bounds)
    b.logp, b.ref_logp = again.logp, again.ref_logp
    return b.adv


nr.DENOISE_ARMS["bounds"] = credit_of_two_bounds
ESTIMATES = {
    "mean_field": mean_field,
    "coupled": coupled,
    "with_place": with_place,
    "mu8": mean_field,
    "bound": lower_bound,
    "bounds": two_bounds,
}


def mask_prompt(
    b: nr.Rollout, share: float, c: nr.DenoiseConfig, generator: torch.Generator
) -> nr.Rollout:
    """The rollouts with a random share of their prompts masked, but for PAD and BOS."""
    is_mask = torch.rand(b.prompt.shape, generator=generator).to(b.prompt.device) < share
    is_mask &= (b.prompt != c.pad_id) & (b.prompt != c.bos_id)
    return replace(b, prompt=b.prompt.masked_fill(is_mask, c.mask_id))


def denoise_masked(
    state: nr.PPOState, task: nr.Task, c: nr.DenoiseConfig, share: float
) -> Iterator[dict[str, Any]]:
    """`nr.denoise` with a share of the prompt masked in every estimate, as (2) has it.

    It is a loop of its own because each pass over a batch has masks of its own, and so its own
    log-probs of policy and reference, all of them taken before the first pass. Apart from that it
    differs in one thing: the passes over a batch visit its rows in the same order, which matters
    only where a pass has several optimizer steps.
    """
    one_pass = replace(c, epochs=1)
    while state.update < c.updates:
        u = state.update

        # 1. sample
        texts = task.prompts(c.prompts, nr.rng(c.seed, "prompts", u))
        prompt, group = nr.in_groups(task, texts, c)
        generator = nr.rng(c.seed, "sample", u)
        b = nr.sample(state.policy, prompt, c, group=group, generator=generator)
        b.logp = None

        # 2. score
        truth = nr.grades(task, b)
        reward = nr.verifier(state, task, b, truth, c).sum(1)

        # 3. credit
        b.adv = nr.DENOISE_ARMS[c.arm](state, task, b, reward, c)

        # 4. update
        views = []
        for i in range(c.epochs):
            masked = mask_prompt(b, share, c, nr.rng(c.seed, "hidden", u * c.epochs + i))
            views.append(nr.annotate(state, masked, c, mean_field))
        for view in views:
            grpo = nr.PPO_ARMS["grpo"]
            metrics = nr.policy_update(state, view, grpo, one_pass, mean_field)
        state.update += 1
        state.samples += len(prompt)
        yield metrics | {"truth": float(truth.mean()), "samples": state.samples}


def loop_of(
    arm: str, state: nr.PPOState, task: nr.Task, c: nr.DenoiseConfig, share: float
) -> Iterator[dict[str, Any]]:
    """The loop that an arm trains with; share: of the prompt, masked in the mean field."""
    if share > 0:
        return denoise_masked(state, task, c, share)
    return nr.denoise(state, task, c, estimate=ESTIMATES.get(arm, nr.estimate_diffusion))


def begin(
    arm: str, seed: int, threads: int, cache: Path, sizes: dict[str, dict], /, **numbers: Any
) -> tuple[nr.DenoiseConfig, nr.Task, nr.Transformer]:
    """The config of an arm, its task, and the trained diffusion LM."""
    if COUNTDOWN in arm:
        preset = front.PRESETS["countdown"]
        numbers = preset["all"] | preset["denoise"] | numbers
    c = config("denoise", seed, threads, sizes, **numbers)
    task = front.make_task(c)
    train = front.CachedTrainer(cache)
    return c, task, nr.diffusion_base(nr.gpt_base(task, c, train), task, c, train)


# ---- provers before any training ----------------------------------------------------------------

# What is asked of each prover on the same canvases: its name, and so many tries at each.
ASKED = {"same_canvas": 8, "short_tail": 8, "at_once": 1}


def about_prospects(value: Tensor, tries: int, reward: Tensor, group: Tensor) -> dict[str, float]:
    """Whether V (B,) can tell the responses of a problem apart, and what (6) makes of it.

    spread: the deviation of V within a problem, without the part that is the noise of so many
    tries. with A: the correlation of that with the reward, 0 if there is no spread. A and D: of the
    responses that beat their group, which (7) adds.
    """
    adv = nr.group_advantage(reward, group, "mean")
    inside = nr.group_advantage(value, group, "mean")
    degrees = len(value) - len(group.unique())
    variance = float((inside**2).sum()) / degrees
    if tries > 1:
        variance -= float((value * (1 - value)).mean()) / (tries - 1)
    spread = max(variance, 0.0) ** 0.5
    spread_of_reward = (float((adv**2).sum()) / degrees) ** 0.5
    covariance = float((inside * adv).sum()) / degrees
    progress = value - nr.group_accuracy(reward, group)
    return {
        "V": float(value.mean()),
        "spread": spread,
        "with A": covariance / (spread * spread_of_reward) if spread * spread_of_reward else 0.0,
        "A": float(adv[adv > 0].mean()),
        "D": float(progress[adv > 0].mean()),
    }


def measure_provers(arm: str, seed: int, threads: int, cache: Path, /) -> dict:
    """What the provers say of the base's own canvases, 64 problems x 8 responses.

    The responses of a problem are looked at after the same share of their passes, so that what
    tells them apart is not how much of each is written.
    """
    began = time.time()
    c, task, policy = begin(arm, seed, threads, cache, SIZES)
    state = nr.start_ppo(policy, c)
    prompt, group = nr.in_groups(task, task.prompts(64, nr.rng(seed, "provers")), c)
    generator = nr.rng(seed, "provers", 1)
    b = nr.sample(policy, prompt, c, group=group, generator=generator)
    reward = nr.verifier(state, task, b, nr.grades(task, b), c).sum(1)
    last = (b.order * b.mask).amax(1)
    share = torch.rand(64, generator=generator)[group]
    p = 1 + (share * (last + 1)).long()
    found = {}
    for prover, tries in ASKED.items():
        asked = replace(c, branches=tries)
        more = nr.PROVERS[prover](state, b, p, asked, generator)
        value = nr.grades(task, more).view(len(p), tries).mean(1)
        found[prover] = about_prospects(value, tries, reward, group)
    return {"arm": arm, "seed": seed, "seconds": round(time.time() - began, 1), "found": found}


# ---- what is measured ---------------------------------------------------------------------------


def fewer(c: nr.DenoiseConfig) -> dict[str, nr.DenoiseConfig]:
    """The same sampler, by how many passes it makes for as many places as a block has now."""
    found = {str(n): replace(c, block_passes=n) for n in (c.block_passes, 2, 1)}
    # Blocks of one pass each can only become longer.
    found["1/2"] = replace(c, block=2 * c.block, block_passes=1)
    return found


def answers_at_once(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, c: nr.DenoiseConfig
) -> dict[str, dict[str, float]]:
    """Accuracy of what the model would write at once after a share of the passes.

    after: of all passes of the canvas, the paper's measure, where a short answer is early. own
    passes: of those that the response itself needed, where its length does not count.
    """
    every = math.ceil(c.response / min(c.block, c.response)) * c.block_passes
    needed = {"answer after": torch.full_like(b.group, every)}
    needed["answer after, own passes"] = 1 + (b.order * b.mask).amax(1).long()
    found: dict[str, dict[str, float]] = {}
    for key, passes in needed.items():
        found[key] = {}
        for share in (0.25, 0.375, 0.5, 0.625, 0.75):
            p = (share * passes).round().long()
            found[key][str(share)] = mean(nr.grades(task, at_once(state, b, p, c)).tolist())
    return found


def direction_of_own(arm: str, policy: nr.Transformer, task: nr.Task, c: nr.DenoiseConfig) -> float:
    """The cosine of the gradients of E[log q] by two batches of own samples, without any reward.

    If the estimate were the log-prob of what the sampler does, the expected gradient would be zero,
    and two batches would agree by chance only.
    """
    estimate = ESTIMATES.get(arm, nr.estimate_diffusion)
    found = []
    for i in range(2):
        texts = task.prompts(4 * c.prompts, nr.rng(c.seed, "own", i))
        prompt, group = nr.in_groups(task, texts, c)
        generator = nr.rng(c.seed, "own sample", i)
        b = nr.sample(policy, prompt, c, group=group, generator=generator)
        for rows in torch.arange(len(group)).split(c.micro):
            part = replace(b.select(rows), logp=None)
            logp, _ = estimate(policy, part, c)
            (logp * part.mask).sum().backward()
        weights = [p for p in policy.parameters() if p.grad is not None]
        found.append(torch.cat([p.grad.flatten() for p in weights]))
        policy.zero_grad()
    return float(F.cosine_similarity(*found, dim=0))


def with_right_steps(task: nr.Task, test: list[str], b: nr.Rollout) -> float:
    """Of right answers the share whose steps hold a whole right way."""
    found = []
    for x, y in zip(test, b.response.tolist(), strict=True):
        text = task.decode(y)
        if task.grade(x, text) == 1:
            steps = [step for step, _ in task.steps(task.encode([text])[0])]
            # Aimless steps may stand between the others.
            found.append(sum(task.step_ok(x, steps)) == len(task.truth(x)))
    return mean(found or [math.nan])


def transcripts(
    state: nr.PPOState, task: nr.Task, problems: list[str], b: nr.Rollout, c: nr.DenoiseConfig
) -> list[dict[str, Any]]:
    """Greedy responses, and how each was written."""
    texts = [task.decode(y) for y in b.response[: len(problems)].tolist()]
    asked = front.as_rollout(task, problems, texts, c)
    shown = nr.explain_denoising(state, task, asked, replace(c, branches=16))
    each = zip(problems, texts, shown, strict=True)
    return [{"prompt": x, "response": y, **more} for x, y, more in each]


def measure(
    arm: str,
    seed: int,
    threads: int,
    cache: Path,
    /,
    sizes: dict[str, dict] = SIZES,
    masked: float = 0.0,
    **more: Any,
) -> dict:
    """One arm with one seed. masked: the share of the prompt that the mean field may not see."""
    name = arm.removeprefix(LONG).removeprefix(COUNTDOWN)
    if name == "provers":
        return measure_provers(arm, seed, threads, cache)
    if arm.startswith(LONG):
        more["updates"] = LONGER * UPDATES
    c, task, policy = begin(arm, seed, threads, cache, sizes, **ARMS[name] | more)
    dev, test = (task.prompts(c.eval_problems, nr.rng(0, s), s) for s in ("dev", "test"))
    began = time.time()
    found: dict[str, Any] = {
        "base": nr.accuracy(policy, task, test, c),
        "base sampled": nr.accuracy(policy, task, test, c, 1.0),
    }

    if arm in LIKELIHOODS:
        found["own samples agree"] = direction_of_own(name, policy, task, c)

    training = time.time()
    state = nr.start_ppo(policy, c)
    curve = []
    for m in loop_of(name, state, task, c, masked):
        look = state.update % c.eval_every == 0
        looked = nr.accuracy(policy, task, dev, c) if look else None
        curve.append([state.samples, round(m["truth"], 4), looked])
    found["nats above the base"] = m["kl"]
    found["seconds of training"] = round(time.time() - training, 1)
    found["samples"] = state.samples
    found["curve"] = curve

    by_passes = {k: nr.accuracy(policy, task, test, each) for k, each in fewer(c).items()}
    found["greedy, passes a block"] = by_passes
    found["greedy"] = by_passes[str(c.block_passes)]
    found["sampled"] = nr.accuracy(policy, task, test, c, 1.0)
    b = nr.sample(policy, nr.encode_prompts(task, test, c), replace(c, temperature=0.0))
    found |= answers_at_once(state, task, b, c)
    found["tokens"] = float(b.mask.sum(1).mean())
    found["right answers with right steps"] = with_right_steps(task, test, b)
    if arm == "outcome":  # collect keeps those of its first seed
        found["transcripts"] = transcripts(state, task, test[:12], b, c)
    return {"arm": arm, "seed": seed, "seconds": round(time.time() - began, 1), "found": found}


# ---- what the README shows ----------------------------------------------------------------------


def collect() -> dict:
    """All jobs -> OUT; an arm that was not run here keeps its line.

    Transcripts of the outcome's first seed only.
    """
    kept = read_arms(OUT)
    for arm in EVERY:
        if jobs := read_jobs(JOBS, arm):
            transcripts = [job["found"].pop("transcripts", None) for job in jobs]
            each = [{k: job[k] for k in ("seed", "commit", "seconds", "found")} for job in jobs]
            shown, more = parted(each)
            kept[arm] = about_arm("denoise", arm, jobs) | {"seeds": shown, "more seeds": more}
            if arm == "outcome":
                kept[arm]["transcripts"] = transcripts[0]
    write_arms(OUT, kept)
    return kept


def by_seed(kept: dict, arm: str, *path: str) -> dict[int, Any]:
    """One number of every seed; none of an arm that was not run."""
    jobs = kept[arm]["seeds"] if arm in kept else []
    found = {job["seed"]: job["found"] for job in jobs}
    for key in path:
        found = {seed: x[key] for seed, x in found.items()}
    return found


def cell(kept: dict, arm: str, *path: str, places: int = 3) -> str:
    """One number of an arm, over its seeds."""
    return front.interval(list(by_seed(kept, arm, *path).values()), places)


def minus(kept: dict, arm: str, other: str, *path: str) -> list[float]:
    """The difference of two arms for every seed that has both."""
    one = by_seed(kept, arm, *path)
    two = by_seed(kept, other, *path)
    return [x - two[seed] for seed, x in one.items() if seed in two]


def best_control(kept: dict, task: str, arm: str, *path: str) -> str | None:
    """Of the controls of an arm that were run, the one that is best on average."""
    there = [task + x for x in CONTROLS.get(arm, ()) if task + x in kept]
    means = {x: mean(by_seed(kept, x, *path).values()) for x in there}
    return max(means, key=means.__getitem__, default=None)


def likelihood_table(kept: dict) -> list[str]:
    """The estimates of the likelihood, under the outcome alone."""
    titles = ["greedy", "minus mean field", "sampled", "own samples agree", "nats", "seconds"]
    lines = head("log-prob of a token", *titles)
    for arm in (arm for arm in LIKELIHOODS if arm in kept):
        title = "each token on the sampler's own canvas" if arm == "outcome" else TITLES[arm]
        gap = minus(kept, arm, "mean_field", "greedy") if arm != "mean_field" else []
        cells = [cell(kept, arm, "greedy"), front.interval(gap)]
        for key in ("sampled", "own samples agree", "nats above the base"):
            cells.append(cell(kept, arm, key))
        seconds = mean(by_seed(kept, arm, "seconds of training").values())
        lines.append(row(title, *cells, f"{seconds:.0f}"))
    return lines


def provers_table(kept: dict) -> list[str]:
    """What the provers say of the base's canvases."""
    titles = ["mean V", "spread in a problem", "correlation with A", "A where A > 0", "D there"]
    lines = head("prover", *titles)
    for task in (task for task in TASKS if task + "provers" in kept):
        for prover in ASKED:
            keys = ("V", "spread", "with A", "A", "D")
            cells = [cell(kept, task + "provers", prover, key) for key in keys]
            lines.append(row(f"{TASKS[task]}, {prover}", *cells))
    return lines


def credits_of(kept: dict, task: str) -> list[str]:
    """The arms of a task that the tables of credits show, without the task's prefix."""
    return [arm for arm in ARMS if arm not in ESTIMATES and task + arm in kept]


def beside_others(kept: dict, task: str, arm: str, *path: str) -> list[str]:
    """Three cells: a number of an arm, minus the outcome's, minus that of its best control."""
    cells = [cell(kept, task + arm, *path)]
    for other in (task + "outcome", best_control(kept, task, arm, *path)):
        gap = [] if other in (None, task + arm) else minus(kept, task + arm, other, *path)
        cells.append(front.interval(gap))
    return cells


def final_table(kept: dict, task: str) -> list[str]:
    """What each credit ends with."""
    titles = ["greedy", "minus outcome", "minus best control", "sampled", "worst seed", "samples"]
    lines = head(TASKS[task], *titles)
    greedy, sampled = (cell(kept, task + "outcome", key) for key in ("base", "base sampled"))
    worst = min(by_seed(kept, task + "outcome", "base").values())
    lines.append(row("the base", greedy, "", "", sampled, f"{worst:.3f}", ""))
    for arm in credits_of(kept, task):
        cells = beside_others(kept, task, arm, "greedy")
        cells.append(cell(kept, task + arm, "sampled"))
        cells.append(f"{min(by_seed(kept, task + arm, 'greedy').values()):.3f}")
        drawn = mean(by_seed(kept, task + arm, "samples").values())
        lines.append(row(TITLES[arm], *cells, f"{drawn:,.0f}"))
    return lines


def on_the_way_table(kept: dict, task: str) -> list[str]:
    """What each credit does to the answer at once, and to what the responses look like."""
    titles = ["at once after 50 %", "after 62 %", "minus outcome", "minus best control"]
    titles += ["after 75 %", "after 62 % of its own", "two passes a block"]
    titles += ["right with right steps", "tokens"]
    lines = head(TASKS[task], *titles)
    more = [("answer after", "0.75"), ("answer after, own passes", "0.625")]
    more += [("greedy, passes a block", "2"), ("right answers with right steps",)]
    for arm in credits_of(kept, task):
        cells = [cell(kept, task + arm, "answer after", "0.5")]
        cells += beside_others(kept, task, arm, "answer after", "0.625")
        cells += [cell(kept, task + arm, *path) for path in more]
        cells.append(cell(kept, task + arm, "tokens", places=1))
        lines.append(row(TITLES[arm], *cells))
    return lines


def tables(kept: dict) -> str:
    """The README's tables, as Markdown: mean and 95 % interval over seeds."""
    lines = likelihood_table(kept) + provers_table(kept)
    for task in (task for task in TASKS if task + "outcome" in kept):
        lines += final_table(kept, task) + on_the_way_table(kept, task)
    return "\n".join(lines).strip()


def draw_gains(kept: dict, task: str, axes: Any) -> None:
    """Greedy accuracy of each arm minus that of the outcome alone; controls in grey."""
    gaps = {}
    for arm in reversed(credits_of(kept, task)):
        gap = minus(kept, task + arm, task + "outcome", "greedy")
        if gap and arm != "outcome":
            gaps[arm] = gap
    controls = {control for names in CONTROLS.values() for control in names}
    for y, (arm, gap) in enumerate(gaps.items()):
        color = "0.6" if arm in controls else "C0"
        axes.errorbar(mean(gap), y, xerr=front.half_width(gap), fmt="o", ms=4, color=color)
    axes.set_yticks(range(len(gaps)), [TITLES[arm] for arm in gaps], fontsize=7)
    axes.axvline(0, color="0.4", lw=1)
    axes.set_title(f"{TASKS[task]}: greedy minus the outcome's", fontsize=10)


def draw_early(kept: dict, task: str, axes: Any) -> None:
    """What is right if the rest is written at once."""
    main = [
        arm for arm in ("outcome", "tail", "own_once", "paid_once", "short") if task + arm in kept
    ]
    for i, arm in enumerate(main):
        seeds = list(by_seed(kept, task + arm, "answer after").values())
        shares = [float(share) for share in seeds[0]]
        band(axes, shares, [list(s.values()) for s in seeds], f"C{i}", TITLES[arm], marker="o")
    axes.set_title(f"{TASKS[task]}: the answer at once, 95 % over seeds", fontsize=10)
    axes.set(
        xlabel="share of the passes taken", ylabel="right, test", xticks=shares, ylim=(0, None)
    )
    axes.legend(frameon=False, fontsize=7, loc="upper left")


def draw_response(shown: dict, top: Any, low: Any) -> Any:
    """How one response was written; returns the dots of `low`, whose colours want a bar.

    Above: V(x_t), filled where what would be written now is right. Below: which token at which
    pass, and how sure the model was of it.
    """
    task = front.make_task(nr.Config())
    tokens = [task.decode([i]) for i in task.encode([shown["response"]])[0]]
    order, sure = (shown[key][: len(tokens)] for key in ("order", "sure"))
    last = max(order) + 1
    right = [task.grade(shown["prompt"], said) == 1 for said in shown["said"][:last]]
    top.plot(range(last), shown["prospects"][:last], color="C2")
    colors = ["C2" if x else "white" for x in right]
    top.scatter(range(last), shown["prospects"][:last], c=colors, edgecolors="C2", zorder=3)
    ends = "right" if task.grade(shown["prompt"], shown["response"]) == 1 else "wrong"
    response = shown["response"].removesuffix("<eos>")
    top.set_title(f"{shown['prompt']}  answered {response} ({ends})", fontsize=10)
    top.set(xlabel="pass", ylabel="V, 16 branches", ylim=(-0.05, 1.05))
    says = "what would be written at once:\nfilled if right, white if wrong"
    top.text(0.98, 0.05, says, transform=top.transAxes, ha="right", va="bottom", fontsize=8)

    dots = low.scatter(order, range(len(tokens)), c=sure, cmap="viridis", s=150, vmin=0, vmax=1)
    centred = {"ha": "center", "va": "center", "fontsize": 7}
    for place, (step, token, p) in enumerate(zip(order, tokens, sure, strict=True)):
        low.text(step, place, token.strip("<>")[:3], color="wk"[p > 0.6], **centred)
    low.set_title("which token in which pass", fontsize=10)
    low.set(xlabel="pass", ylabel="place in the response")
    low.set(xlim=top.get_xlim(), ylim=(len(tokens), -1))
    return dots


def picture(kept: dict) -> None:
    """A row for each task: gains beside controls; how a response was written, or early answers."""
    from matplotlib.figure import Figure

    tasks = [task for task in ("", COUNTDOWN) if task + "outcome" in kept]
    figure = Figure(figsize=(12, 4.6 * len(tasks)), layout="constrained")
    parts = figure.subfigures(len(tasks), 2, squeeze=False)
    for task, (left, right) in zip(tasks, parts, strict=True):
        draw_gains(kept, task, left.subplots())
        if task == COUNTDOWN:
            draw_early(kept, task, right.subplots())
    top, low = parts[0, 1].subplots(2)
    # The response whose prospects change most.
    transcripts = kept["outcome"]["transcripts"]
    shown = max(transcripts, key=lambda t: max(t["prospects"]) - min(t["prospects"]))
    dots = draw_response(shown, top, low)
    parts[0, 1].colorbar(dots, ax=low, label="probability of the token")
    nr.write_whole(OUT.with_suffix(".png"), lambda p: figure.savefig(p, format="png", dpi=100))


def main() -> None:
    """Run what is not there yet, then tables and picture of all there is."""
    run(__doc__, EVERY, JOBS, measure)
    kept = collect()
    print(tables(kept))
    picture(kept)


if __name__ == "__main__":
    main()
