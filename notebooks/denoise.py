"""Paid along the way: python notebooks/denoise.py [ARM ...] [--seeds 0 1 2 3 4] [--threads 1]

The masked-diffusion LM under the outcome alone and under the denoising process reward: accuracy,
what is right half way, what fewer passes cost, whether right answers have right steps; and the arms
of both. Test problems. Each run is kept in runs/denoise/ARM-SEED.json and not run again; all
together make notebooks/results/denoise.json and denoise.png. Needs the extra `notebooks`.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import mean
from typing import Any

import torch
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
    read_arms,
    read_jobs,
    row,
    run,
    write_arms,
)
from notebooks.preferences import band  # noqa: E402

JOBS = ROOT / "runs" / "denoise"
OUT = ROOT / "notebooks" / "results" / "denoise.json"
SUDOKU = front.PRESETS["sudoku"]["all"] | front.PRESETS["sudoku"]["denoise"]
OUTCOME = {"arm": "outcome"}
# With so many times the updates the outcome alone draws about as many samples as `process` does.
MORE = 2
ARMS: dict[str, dict[str, Any]] = {
    "outcome": OUTCOME,
    "process": {},
    "outcome_more": OUTCOME | {"updates": MORE * nr.DenoiseConfig.updates},
    "n1": {"branches": 1},
    "n2": {"branches": 2},
    "n8": {"branches": 8},
    "shared": {"arm": "shared"},
    "no_indicator": {"arm": "no_indicator"},
    "leave_one_out": {"arm": "leave_one_out"},
    "segments": {"arm": "segments"},
    "fixed_t": {"arm": "fixed_t"},
    "p05": OUTCOME,
    "p15": OUTCOME,
    "p50": OUTCOME,
    "mu1": OUTCOME | {"epochs": 1},
    "mu8": OUTCOME | {"epochs": 8},
    "coupled": OUTCOME,
}
# The share of the prompt that is masked in every estimate of the likelihood.
MASKED = {"p05": 0.05, "p15": 0.15, "p50": 0.5}
TITLES = {
    "outcome": "the outcome alone",
    "process": "process reward, N = 4",
    "n1": "N = 1",
    "n2": "N = 2",
    "n8": "N = 8",
    "outcome_more": "the outcome alone, samples of the process reward",
    "shared": "shared states, nothing more drawn",
    "no_indicator": "without the indicator",
    "leave_one_out": "V(x_T) without the response itself",
    "segments": "each stretch its own",
    "fixed_t": "t half way",
    "p05": "outcome, 5 % of the prompt hidden",
    "p15": "outcome, 15 %",
    "p50": "outcome, 50 %",
    "mu1": "outcome, one pass a batch",
    "mu8": "outcome, eight passes",
    "coupled": "outcome, coupled masks",
}
MAIN = ("outcome", "outcome_more", "process", "shared")
EVERY = (*ARMS, *("sudoku_" + arm for arm in ARMS))


# ---- credits that only stand here ---------------------------------------------------------------


def value_of_all(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, c: nr.DenoiseConfig
) -> tuple[Tensor, Tensor]:
    """t and V(x_t) of all responses, right or wrong."""
    return nr.prospects(state, task, b, torch.ones_like(b.group, dtype=torch.bool), c)


def no_indicator(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """A + D for all: E[D] = 0 then, and on the tokens after t it only adds variance."""
    _, value = value_of_all(state, task, b, c)
    adv = nr.group_advantage(reward, b.group, "mean")
    progress = value - (reward - adv)
    return (adv + c.process_weight * progress)[:, None] * b.mask


def leave_one_out(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """(7) with V(x_0) = the mean of the others in the group, which r_i itself does not raise."""
    adv = nr.group_advantage(reward, b.group, "rloo")
    _, value = nr.prospects(state, task, b, adv > 0, c)
    progress = value - (reward - adv)
    return torch.where(adv > 0, adv + c.process_weight * progress, adv)[:, None] * b.mask


def segments(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """To each token what its own stretch achieved: before t V(x_t) - V(x_0), then r - V(x_t)."""
    t, value = value_of_all(state, task, b, c)
    before = value - (reward - nr.group_advantage(reward, b.group, "mean"))
    after = reward - value
    return torch.where(b.order < t[:, None], before[:, None], after[:, None]) * b.mask


def fixed_t(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """(7) with the state half way to the end in place of a random one."""
    better = nr.group_advantage(reward, b.group, "mean") > 0
    last = (b.order * b.mask).amax(1)
    t = 1 + (0.5 * last).long()
    value = torch.full_like(reward, torch.nan)
    if better.any():
        generator = nr.rng(c.seed, "branch", state.update)
        more = nr.branch(state.policy, b.select(better), t[better], c.branches, c, generator)
        score = nr.verifier(state, task, more, nr.grades(task, more), c).sum(1)
        value[better] = score.view(-1, c.branches).mean(1)
        state.samples += len(score)
    return nr.denoise_advantage(reward, value, b.group, c.process_weight)[:, None] * b.mask


def shared(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.DenoiseConfig
) -> Tensor:
    """(7) without more samples: V(x_t) = the mean of the others that share the state."""
    n = c.branches
    total = reward.view(-1, n).sum(1).repeat_interleave(n)
    value = (total - reward) / (n - 1)
    return nr.denoise_advantage(reward, value, b.group, c.process_weight)[:, None] * b.mask


for credit in (no_indicator, leave_one_out, segments, fixed_t, shared):
    nr.DENOISE_ARMS[credit.__name__] = credit


# ---- a sampler, an estimate and a loop that only stand here --------------------------------------


def sample_tree(
    policy: nr.Transformer,
    prompt: Tensor,
    c: nr.DenoiseConfig,
    group: Tensor,
    generator: torch.Generator,
) -> nr.Rollout:
    """As `nr.sample`, but `branches` rows in a row share a state, which the first of them drew."""
    n = c.branches
    b = nr.sample(policy, prompt[::n], c, group=group[::n], generator=generator)
    more = nr.branch(policy, b, nr.some_pass(b, generator), n - 1, c, generator)
    # What is older than the shared state was written when the first row wrote it.
    older = b.order.repeat_interleave(n - 1, 0)
    more.order = torch.where(more.order < 0, older, more.order)

    def in_turn(first: Tensor, others: Tensor) -> Tensor:
        return torch.cat([first[:, None], others.view(len(first), n - 1, -1)], 1).flatten(0, 1)

    response = in_turn(b.response, more.response)
    order = in_turn(b.order, more.order)
    return nr.Rollout(prompt, response, nr.up_to_eos(response, c), order, group)


def coupled(model: nr.Transformer, b: nr.Rollout, c: nr.DenoiseConfig) -> tuple[Tensor, Tensor]:
    """Half of it mean field, half what each token has beside some of the others.

    Those are seen by a mask and its complement, as in arXiv 2506.20639, whose mask is random; here
    it is the tokens of even passes. The weight 2 makes that half a bound.
    """
    logp, hidden = nr.estimate_diffusion(model, b, c)
    partly = torch.zeros_like(logp)
    for is_mask in (b.order % 2 == 0, b.order % 2 == 1):
        canvas = b.response.masked_fill(is_mask | (b.response == c.pad_id), c.mask_id)
        seen = nr.predictive_hidden(model, b.prompt, canvas)
        beside = nr.gather_logprobs(model, seen, b.response, c.temperature)
        partly = partly + 2 * is_mask * beside
    return (logp + partly) / 2, hidden


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

        # 2. score
        truth = nr.grades(task, b)
        reward = nr.verifier(state, task, b, truth, c).sum(1)

        # 3. credit
        b.adv = nr.DENOISE_ARMS[c.arm](state, task, b, reward, c)

        # 4. update
        views = []
        for i in range(c.epochs):
            masked = mask_prompt(b, share, c, nr.rng(c.seed, "hidden", u * c.epochs + i))
            views.append(nr.annotate(state, masked, c, nr.estimate_diffusion))
        for view in views:
            grpo = nr.PPO_ARMS["grpo"]
            metrics = nr.policy_update(state, view, grpo, one_pass, nr.estimate_diffusion)
        state.update += 1
        state.samples += len(prompt)
        yield metrics | {"truth": float(truth.mean()), "samples": state.samples}


def loop_of(
    arm: str, state: nr.PPOState, task: nr.Task, c: nr.DenoiseConfig, share: float
) -> Iterator[dict[str, Any]]:
    """The loop that an arm trains with."""
    if share > 0:
        return denoise_masked(state, task, c, share)
    if arm == "coupled":
        return nr.denoise(state, task, c, estimate=coupled)
    if arm == "shared":
        return nr.denoise(state, task, c, roll=sample_tree)
    return nr.denoise(state, task, c)


# ---- what is measured ---------------------------------------------------------------------------


def fewer(c: nr.DenoiseConfig) -> dict[str, nr.DenoiseConfig]:
    """The same sampler with a half, a quarter and an eighth of the passes."""

    def share(n: int) -> nr.DenoiseConfig:
        return replace(c, block_passes=max(1, ceil(c.block_passes / n)))

    # Blocks of one pass each can only become longer.
    longer = replace(c, block=2 * c.block, block_passes=1)
    eighth = share(8) if c.block == c.response else longer
    return {"1": c, "1/2": share(2), "1/4": share(4), "1/8": eighth}


@torch.no_grad()
def halfway(
    policy: nr.Transformer,
    task: nr.Task,
    test: list[str],
    b: nr.Rollout,
    share: float,
    c: nr.DenoiseConfig,
) -> float:
    """Accuracy of what the model would write at once after this share of each response's passes."""
    last = (b.order * b.mask).amax(1)
    canvas = nr.canvas_before(b.response, b.order, (share * (last + 1)).long(), c)
    logits = policy.lm_head(nr.predictive_hidden(policy, b.prompt, canvas))
    likeliest = nr.log_softmax(logits, 1.0, c).argmax(-1)
    said = torch.where(canvas == c.mask_id, likeliest, canvas)
    return mean(task.grade(x, task.decode(y)) for x, y in zip(test, said.tolist(), strict=True))


def steps_and_answers(task: nr.Task, test: list[str], b: nr.Rollout) -> dict[str, float]:
    """Of right answers, how many have only right steps, all of them; of wrong answers the same."""
    found: dict[bool, list[bool]] = {True: [], False: []}
    for x, y in zip(test, b.response.tolist(), strict=True):
        text = task.decode(y)
        steps = [step for step, _ in task.steps(task.encode([text])[0])]
        whole = len(steps) == len(task.truth(x)) and all(task.step_ok(x, steps))
        found[task.grade(x, text) == 1].append(whole)
    return {
        "right answers with right steps": mean(found[True] or [0]),
        "wrong answers with right steps": mean(found[False] or [0]),
    }


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
    sizes: dict[str, dict] = LAPTOP,
    masked: float | None = None,
    **more: Any,
) -> dict:
    """One arm with one seed. masked: the share of the prompt that estimates may not see."""
    name = arm.removeprefix("sudoku_")
    task_numbers = {} if name == arm else SUDOKU
    c = config("denoise", seed, threads, sizes, **task_numbers | ARMS[name] | more)
    share = MASKED.get(name, 0.0) if masked is None else masked
    task = front.make_task(c)
    dev, test = (task.prompts(c.eval_problems, nr.rng(0, s), s) for s in ("dev", "test"))
    train = front.CachedTrainer(cache)
    policy = nr.diffusion_base(nr.gpt_base(task, c, train), task, c, train)
    began = time.time()
    found: dict[str, Any] = {
        "base": nr.accuracy(policy, task, test, c),
        "base sampled": nr.accuracy(policy, task, test, c, 1.0),
    }

    state = nr.start_ppo(policy, c)
    curve = []
    for m in loop_of(name, state, task, c, share):
        look = state.update % c.eval_every == 0
        looked = nr.accuracy(policy, task, dev, c) if look else None
        curve.append([state.samples, round(m["truth"], 4), looked])
    seen = [x[2] for x in curve if x[2] is not None]
    found["seconds of training"] = round(time.time() - began, 1)
    found["samples"] = state.samples
    found["curve"] = curve
    found["largest drop"] = max(max(seen[: i + 1]) - x for i, x in enumerate(seen))

    by_passes = {k: nr.accuracy(policy, task, test, each) for k, each in fewer(c).items()}
    found["greedy, passes"] = by_passes
    found["greedy"] = by_passes["1"]
    found["sampled"] = nr.accuracy(policy, task, test, c, 1.0)
    b = nr.sample(policy, nr.encode_prompts(task, test, c), replace(c, temperature=0.0))
    shares = (0.0, 0.25, 0.5, 0.75)
    found["answer after"] = {str(s): halfway(policy, task, test, b, s, c) for s in shares}
    found |= steps_and_answers(task, test, b)
    found["transcripts"] = transcripts(state, task, test[:4], b, c)
    return {"arm": arm, "seed": seed, "seconds": round(time.time() - began, 1), "found": found}


# ---- what the README shows ----------------------------------------------------------------------


def collect() -> dict:
    """All jobs -> OUT; transcripts of the first seed only."""
    kept = read_arms(OUT)
    for arm in EVERY:
        if jobs := read_jobs(JOBS, arm):
            shown = [job["found"].pop("transcripts") for job in jobs][0]
            each = [{k: job[k] for k in ("seed", "commit", "seconds", "found")} for job in jobs]
            kept[arm] = about_arm("denoise", arm, jobs) | {"transcripts": shown, "seeds": each}
    write_arms(OUT, kept)
    return kept


def numbers(kept: dict, arm: str, *path: str) -> dict[int, Any]:
    """One number of every seed."""
    found = {job["seed"]: job["found"] for job in kept[arm]["seeds"]}
    for key in path:
        found = {seed: x[key] for seed, x in found.items()}
    return found


def minus(kept: dict, arm: str, other: str, *path: str) -> list[float]:
    """The difference of two arms for every seed that has both."""
    one = numbers(kept, arm, *path)
    two = numbers(kept, other, *path)
    return [x - two[seed] for seed, x in one.items() if seed in two]


def dev_curves(kept: dict, arm: str) -> list[list[list[float]]]:
    """The points of each seed's curve at which dev was looked at."""
    curves = numbers(kept, arm, "curve").values()
    return [[point for point in curve if point[2] is not None] for curve in curves]


def main_table(kept: dict, prefix: str) -> list[str]:
    """The main arms on one task; its name is the prefix of its arms."""
    main = [prefix + arm for arm in MAIN]
    last = ("worst seed", "largest drop on dev", "samples")
    lines = head(prefix[:-1] or "arithmetic", "greedy", "sampled", *last)

    def cell(arm: str, key: str) -> str:
        return front.interval(list(numbers(kept, arm, key).values()))

    base = cell(main[0], "base"), cell(main[0], "base sampled")
    lines.append(row("the base", *base, "", "", ""))
    for arm in main:
        worst = min(numbers(kept, arm, "greedy").values())
        drawn = mean(numbers(kept, arm, "samples").values())
        cells = [cell(arm, key) for key in ("greedy", "sampled")]
        cells += [f"{worst:.3f}", cell(arm, "largest drop"), f"{drawn:,.0f}"]
        lines.append(row(TITLES[arm.removeprefix(prefix)], *cells))
    return lines


def gain_table(kept: dict) -> list[str]:
    """What the process reward adds to the outcome alone."""
    both = [
        f"{task}, equal {x}" for task in ("arithmetic", "sudoku") for x in ("updates", "samples")
    ]
    lines = head("process minus outcome", *both)
    rows = {"greedy": ("greedy",), "sampled": ("sampled",)}
    for at in ("0.25", "0.5", "0.75"):
        rows[f"read after {float(at):.0%} of the steps"] = ("answer after", at)
    for passes in ("1/2", "1/4", "1/8"):
        rows[f"greedy, {passes} of the passes"] = ("greedy, passes", passes)
    steps = ("right answers with right steps", "wrong answers with right steps")
    rows |= {key: (key,) for key in steps}
    for title, path in rows.items():
        cells = []
        for prefix in ("", "sudoku_"):
            for other in ("outcome", "outcome_more"):
                if prefix and title in steps:  # what is written there has no steps
                    cells.append("")
                else:
                    gap = minus(kept, prefix + "process", prefix + other, *path)
                    cells.append(front.interval(gap))
        lines.append(row(title, *cells))
    return lines


def arms_table(kept: dict) -> list[str]:
    """All arms on arithmetic."""
    titles = ["greedy", "minus process", "minus outcome", "worst seed"]
    titles += ["dev after 5", "15", "25 updates", "seeds"]
    lines = head("arms, arithmetic", *titles)
    for arm in (arm for arm in ARMS if arm in kept):
        greedy = list(numbers(kept, arm, "greedy").values())
        cells = [front.interval(greedy)]
        for other in ("process", "outcome"):
            gap = minus(kept, arm, other, "greedy")
            cells.append(front.interval(gap) if other != arm else "")
        cells.append(f"{min(greedy):.3f}")
        looked = dev_curves(kept, arm)
        cells += [f"{mean(points[i][2] for points in looked):.3f}" for i in (0, 2, 4)]
        lines.append(row(TITLES[arm], *cells, str(len(looked))))
    return lines


def tables(kept: dict) -> str:
    """The README's tables, as Markdown: mean and 95 % interval over seeds."""
    lines = main_table(kept, "") + main_table(kept, "sudoku_")
    return "\n".join(lines + gain_table(kept) + arms_table(kept)).strip()


def draw_curves(kept: dict, left: Any, middle: Any) -> None:
    """Accuracy over samples, and what is right half way."""
    for i, arm in enumerate(arm for arm in MAIN if arm in kept):
        looked = dev_curves(kept, arm)
        drawn = [mean(x[0] for x in looks) / 1000 for looks in zip(*looked, strict=True)]
        band(left, drawn, [[x[2] for x in looks] for looks in looked], f"C{i}", TITLES[arm])
        seeds = list(numbers(kept, arm, "answer after").values())
        shares = [float(k) for k in seeds[0]]
        band(middle, shares, [list(s.values()) for s in seeds], f"C{i}", arm, marker="o")
    base = mean(numbers(kept, "outcome", "base").values())
    left.axhline(base, color="0.4", ls="--", lw=1)
    place = {"transform": left.get_yaxis_transform(), "ha": "right", "va": "top"}
    left.text(0.99, base - 0.015, "base, test", **place)
    left.set(title="learning, bands: 95 % over seeds", xlabel="thousand samples drawn")
    left.set(ylabel="greedy accuracy, dev", xlim=(0, None), ylim=(0, 0.8))
    middle.set(title="intermediate answers", xlabel="share of the steps taken")
    middle.set(ylabel="right if read now, test", xticks=(0, 0.25, 0.5, 0.75), ylim=(0, 0.4))


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
    top.plot(range(last), shown["value"][:last], color="C2")
    colors = ["C2" if x else "white" for x in right]
    top.scatter(range(last), shown["value"][:last], c=colors, edgecolors="C2", zorder=3)
    ends = "right" if task.grade(shown["prompt"], shown["response"]) == 1 else "wrong"
    response = shown["response"].removesuffix("<eos>")
    top.set(title=f"{shown['prompt']}  answered {response} ({ends})")
    top.set(xlabel="step", ylabel="V(x_t), mean of 16 branches", ylim=(-0.05, 1.05))
    says = "what would be written now:\nfilled if right, white if wrong"
    top.text(0.98, 0.95, says, transform=top.transAxes, ha="right", va="top")

    dots = low.scatter(order, range(len(tokens)), c=sure, cmap="viridis", s=150, vmin=0, vmax=1)
    centred = {"ha": "center", "va": "center", "fontsize": 7}
    for place, (step, token, p) in enumerate(zip(order, tokens, sure, strict=True)):
        low.text(step, place, token.strip("<>")[:3], color="wk"[p > 0.6], **centred)
    low.set(title="which token at which step", xlabel="step", ylabel="place in the response")
    low.set(xlim=top.get_xlim(), ylim=(len(tokens), -1))
    return dots


def picture(kept: dict) -> None:
    """Accuracy over samples, what is right half way, and a reward that flows along a response."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.8), layout="constrained")
    (left, top), (middle, low) = figure.subplots(2, 2, width_ratios=(1, 1.2))
    draw_curves(kept, left, middle)
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    # The response whose prospects change most.
    shown = max(kept["process"]["transcripts"], key=lambda t: max(t["value"]) - min(t["value"]))
    dots = draw_response(shown, top, low)
    figure.colorbar(dots, ax=low, label="probability of the token")
    nr.write_whole(OUT.with_suffix(".png"), lambda p: figure.savefig(p, format="png", dpi=110))


def main() -> None:
    """Run what is not there yet, then tables and picture of all there is."""
    run(__doc__, EVERY, JOBS, measure)
    kept = collect()
    print(tables(kept))
    picture(kept)


if __name__ == "__main__":
    main()
