"""Paid along the way: python notebooks/denoise.py [ARM ...] [--seeds 0 1 2 3 4] [--threads 1]

The masked-diffusion LM under the outcome alone and under the denoising process reward: accuracy, what is right half
way, what fewer passes cost, whether right answers have right steps; and the arms of both. Test problems. Each run is
kept in runs/denoise/ARM-SEED.json and not run again; all together make notebooks/results/denoise.json and
denoise.png. Needs the extra `notebooks`.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
from notebooks.jobs import run  # noqa: E402
from notebooks.preferences import band  # noqa: E402

JOBS = ROOT / "runs" / "denoise"
OUT = ROOT / "notebooks" / "results" / "denoise.json"
OUTCOME = dict(credit="outcome")
MORE = 2  # outcome_more: with so many times the updates it draws about as many samples as `process` does in all
ARMS: dict[str, dict] = {
    "outcome": OUTCOME,
    "process": {},
    "outcome_more": OUTCOME | dict(denoise_updates=MORE * nr.Config.denoise_updates),
    "n1": dict(branches=1),
    "n2": dict(branches=2),
    "n8": dict(branches=8),
    "shared": dict(credit="shared"),
    "no_indicator": dict(credit="no_indicator"),
    "leave_one_out": dict(credit="leave_one_out"),
    "segments": dict(credit="segments"),
    "fixed_t": dict(earliest=0.5, latest=0.5),
    "p05": OUTCOME | dict(hide_prompt=0.05),
    "p15": OUTCOME | dict(hide_prompt=0.15),
    "p50": OUTCOME | dict(hide_prompt=0.5),
    "mu1": OUTCOME | dict(mu=1),
    "mu8": OUTCOME | dict(mu=8),
    "coupled": OUTCOME,
}
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


# ---- arms that only stand here: other credits, another estimate of the likelihood ---------------


def both(state: dict, task: nr.Task, b: nr.Rollout, c: nr.Config) -> nr.Pair:
    """t and V(x_t) of all responses, right or wrong."""
    return nr.probe(state, task, b, torch.ones_like(b.group, dtype=torch.bool), c)


def no_indicator(state: dict, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.Config) -> Tensor:
    """A + D for all: E[D] = 0 then, and on the tokens after t it only adds variance."""
    _, value = both(state, task, b, c)
    base = nr.group_advantage(reward, b.group, "mean")
    return (base + c.process_weight * (value - (reward - base)))[:, None] * b.mask


def leave_one_out(
    state: dict, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.Config
) -> Tensor:
    """(7) with V(x_T) = the mean of the others in the group, which r_i itself does not raise."""
    base = nr.group_advantage(reward, b.group, "rloo")
    _, value = nr.probe(state, task, b, base > 0, c)
    return (
        torch.where(base > 0, base + c.process_weight * (value - (reward - base)), base)[:, None]
        * b.mask
    )


def segments(state: dict, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.Config) -> Tensor:
    """To each token what its own stretch achieved: before t V(x_t) - V(x_T), then r - V(x_t)."""
    t, value = both(state, task, b, c)
    first = value - (reward - nr.group_advantage(reward, b.group, "mean"))
    return torch.where(b.order < t[:, None], first[:, None], (reward - value)[:, None]) * b.mask


def sample_tree(
    policy: nr.Transformer, prompt: Tensor, c: nr.Config, group: Tensor, generator: torch.Generator
) -> nr.Rollout:
    """As `sample`, but `branches` rows in a row share a state, which the first of them drew."""
    n = c.branches
    b = nr.sample(policy, prompt[::n], c, group=group[::n], generator=generator)
    more = nr.go_on(policy, b, nr.some_step(b, c, generator), n - 1, c, generator)
    before = b.order.repeat_interleave(n - 1, 0)
    more.order = torch.where(more.order < 0, before, more.order)
    response, order = (
        torch.cat([x[:, None], y.view(len(x), n - 1, -1)], 1).flatten(0, 1)
        for x, y in ((b.response, more.response), (b.order, more.order))
    )
    return nr.Rollout(prompt, response, nr.up_to_eos(response, c), order, group)


def shared(state: dict, task: nr.Task, b: nr.Rollout, reward: Tensor, c: nr.Config) -> Tensor:
    """(7) without more samples: V(x_t) = the mean of the others that share the state."""
    n = c.branches
    value = (reward.view(-1, n).sum(1).repeat_interleave(n) - reward) / (n - 1)
    return nr.denoise_advantage(reward, value, b.group, c.process_weight)[:, None] * b.mask


nr.CREDITS.update(
    no_indicator=no_indicator, leave_one_out=leave_one_out, segments=segments, shared=shared
)


def coupled(model: nr.Transformer, b: nr.Rollout, c: nr.Config) -> nr.Pair:
    """Half of it mean field, half what each token has beside some of the others, by a mask and its complement (as
    arXiv 2506.20639, whose mask is random; here the tokens of even steps). The weight 2 makes that half a bound."""
    logp, states = nr.likelihood(model, b, c)
    partly = torch.zeros_like(logp)
    for hidden in (b.order % 2 == 0, b.order % 2 == 1):
        half = nr.predictive_states(model, b.prompt, b.response.masked_fill(hidden, c.mask))
        partly = partly + 2 * hidden * nr.gather_logprobs(model, half, b.response, c.temperature)
    return (logp + partly) / 2, states


# ---- what is measured ---------------------------------------------------------------------------


def fewer(c: nr.Config) -> dict[str, nr.Config]:
    """The same sampler with a half, a quarter and an eighth of the passes."""
    whole = c.block == c.response
    few = lambda n: dict(block_steps=max(1, -(-c.block_steps // n)))  # noqa: E731
    eighth = few(8) if whole else dict(block=2 * c.block, block_steps=1)
    return {
        "1": c,
        "1/2": replace(c, **few(2)),
        "1/4": replace(c, **few(4)),
        "1/8": replace(c, **eighth),
    }


@torch.no_grad()
def halfway(
    policy: nr.Transformer,
    task: nr.Task,
    test: list[str],
    b: nr.Rollout,
    share: float,
    c: nr.Config,
) -> float:
    """Accuracy of what the model would write at once after this share of the steps of each response."""
    last = (b.order * b.mask).amax(1)
    canvas = nr.state_at(b.response, b.order, (share * (last + 1)).long(), c)
    logits = policy.lm_head(nr.predictive_states(policy, b.prompt, canvas))
    said = torch.where(canvas == c.mask, nr.log_softmax(logits, 1.0, c).argmax(-1), canvas)
    return mean(task.grade(x, task.decode(y)) for x, y in zip(test, said.tolist(), strict=True))


def steps_and_answers(task: nr.Task, test: list[str], b: nr.Rollout) -> dict:
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


def measure(arm: str, seed: int, threads: int, cache: Path, **more: Any) -> dict:
    """One arm with one seed."""
    config = nr.CONFIGS["sudoku"] if arm.startswith("sudoku_") else {}
    c = nr.Config(seed=seed, threads=threads, device="cpu", **config)
    c = replace(c, **ARMS[arm.removeprefix("sudoku_")] | more)
    task, greedy = front.make_task(c), replace(c, temperature=0.0)
    dev, test = (task.prompts(c.eval_problems, nr.rng(0, s), s) for s in ("dev", "test"))
    policy, began = front.diffusion_base(c, cache), time.time()
    found = {
        "base": nr.accuracy(policy, task, test, c),
        "base sampled": nr.accuracy(policy, task, test, c, 1.0),
    }
    state, curve = nr.start_denoise(policy, c), []
    estimate = coupled if arm.endswith("coupled") else nr.likelihood
    for m in nr.denoise(
        state, task, c, estimate, sample_tree if arm.endswith("shared") else nr.sample
    ):
        looked = nr.accuracy(policy, task, dev, c) if state["update"] % c.eval_every == 0 else None
        curve.append([state["samples"], round(m["truth"], 4), looked])
    seen = [x[2] for x in curve if x[2] is not None]
    found |= {
        "seconds of training": round(time.time() - began, 1),
        "samples": state["samples"],
        "curve": curve,
        "largest drop": max(max(seen[: i + 1]) - x for i, x in enumerate(seen)),
    }
    found |= {
        "greedy, passes": {k: nr.accuracy(policy, task, test, each) for k, each in fewer(c).items()}
    }
    found |= {
        "greedy": found["greedy, passes"]["1"],
        "sampled": nr.accuracy(policy, task, test, c, 1.0),
    }
    prompt = nr.encode_prompts(task, test, c)
    b = nr.sample(policy, prompt, greedy)
    found["answer after"] = {
        str(s): halfway(policy, task, test, b, s, c) for s in (0.0, 0.25, 0.5, 0.75)
    }
    found |= steps_and_answers(task, test, b)
    texts = [task.decode(y) for y in b.response[:4].tolist()]
    shown = front.inside("denoise", state, task, test[:4], texts, replace(c, branches=16))
    each = zip(test, texts, shown, strict=False)
    found["transcripts"] = [{"prompt": x, "response": y, **more} for x, y, more in each]
    return {"arm": arm, "seed": seed, "seconds": round(time.time() - began, 1), "found": found}


# ---- what the README shows ----------------------------------------------------------------------


def collect() -> dict:
    """All jobs -> OUT; transcripts of the first seed only."""
    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    for arm in EVERY:
        if jobs := [json.loads(path.read_text()) for path in sorted(JOBS.glob(f"{arm}-?.json"))]:
            about = {k: jobs[0][k] for k in ("threads", "machine", "torch")}
            seeds = " ".join(str(job["seed"]) for job in jobs)
            about["command"] = (
                f"python notebooks/denoise.py {arm} --seeds {seeds} --threads {about['threads']}"
            )
            about["transcripts"] = [job["found"].pop("transcripts") for job in jobs][0]
            each = [{k: job[k] for k in ("seed", "commit", "seconds", "found")} for job in jobs]
            kept[arm] = about | {"seeds": each}
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items())
    front.write_text(OUT, "{\n" + lines + "\n}\n")
    return kept


def numbers(kept: dict, arm: str, *path: str) -> dict[int, Any]:
    """One number of every seed."""
    found = {job["seed"]: job["found"] for job in kept[arm]["seeds"]}
    for key in path:
        found = {seed: x[key] for seed, x in found.items()}
    return found


def minus(kept: dict, arm: str, other: str, *path: str) -> list[float]:
    """The difference of two arms for every seed that has both."""
    one, two = numbers(kept, arm, *path), numbers(kept, other, *path)
    return [x - two[seed] for seed, x in one.items() if seed in two]


def tables(kept: dict) -> str:
    """The README's tables, as Markdown: mean and 95 % interval over seeds."""
    lines: list[str] = []

    def row(*cells: str) -> None:
        lines.append("| " + " | ".join(cells) + " |")

    def head(*titles: str) -> None:
        lines.append("")
        row(*titles)
        lines.append("|---" * len(titles) + "|")

    def cell(arm: str, *path: str) -> str:
        return front.interval(list(numbers(kept, arm, *path).values()))

    for task in ("", "sudoku_"):
        main = [task + arm for arm in MAIN]
        head(
            task[:-1] or "arithmetic",
            "greedy",
            "sampled",
            "worst seed",
            "largest drop on dev",
            "samples",
        )
        row("the base", cell(main[0], "base"), cell(main[0], "base sampled"), "", "", "")
        for arm in main:
            drawn, worst = (numbers(kept, arm, key).values() for key in ("samples", "greedy"))
            row(
                TITLES[arm.removeprefix(task)],
                cell(arm, "greedy"),
                cell(arm, "sampled"),
                f"{min(worst):.3f}",
                cell(arm, "largest drop"),
                f"{mean(drawn):,.0f}",
            )
    head(
        "process minus outcome",
        *(
            f"{task}, equal {what}"
            for task in ("arithmetic", "sudoku")
            for what in ("updates", "samples")
        ),
    )
    reads = {
        f"read after {float(at):.0%} of the steps": ("answer after", at)
        for at in ("0.25", "0.5", "0.75")
    }
    fewer = {
        f"greedy, {passes} of the passes": ("greedy, passes", passes)
        for passes in ("1/2", "1/4", "1/8")
    }
    steps = {
        key: (key,) for key in ("right answers with right steps", "wrong answers with right steps")
    }
    for title, path in {
        "greedy": ("greedy",),
        "sampled": ("sampled",),
        **reads,
        **fewer,
        **steps,
    }.items():
        pairs = [
            (task, task + arm) for task in ("", "sudoku_") for arm in ("outcome", "outcome_more")
        ]
        row(
            title,
            *(
                ""
                if task and title in steps
                else front.interval(minus(kept, task + "process", arm, *path))
                for task, arm in pairs
            ),
        )
    head(
        "arms, arithmetic",
        "greedy",
        "minus process",
        "minus outcome",
        "worst seed",
        "dev after 5",
        "15",
        "25 updates",
        "seeds",
    )
    for arm in (arm for arm in ARMS if arm in kept):
        looked = [
            [x[2] for x in curve if x[2] is not None]
            for curve in numbers(kept, arm, "curve").values()
        ]
        less = [
            front.interval(minus(kept, arm, x, "greedy")) if x != arm else ""
            for x in ("process", "outcome")
        ]
        dev = [f"{mean(seen[i] for seen in looked):.3f}" for i in (0, 2, 4)]
        row(
            TITLES[arm],
            cell(arm, "greedy"),
            *less,
            f"{min(numbers(kept, arm, 'greedy').values()):.3f}",
            *dev,
            str(len(looked)),
        )
    return "\n".join(lines).strip()


def picture(kept: dict) -> None:
    """Accuracy over samples, what is right half way, and a reward that flows along one denoising."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.8), layout="constrained")
    (left, top), (middle, low) = figure.subplots(2, 2, width_ratios=(1, 1.2))
    for i, arm in enumerate(arm for arm in MAIN if arm in kept):
        curves = numbers(kept, arm, "curve").values()
        looked = [[x for x in curve if x[2] is not None] for curve in curves]
        drawn = [mean(x[0] for x in looks) / 1000 for looks in zip(*looked, strict=True)]
        band(left, drawn, [[x[2] for x in looks] for looks in looked], f"C{i}", TITLES[arm])
        shares = list(numbers(kept, arm, "answer after").values())
        band(
            middle,
            [float(k) for k in shares[0]],
            [list(s.values()) for s in shares],
            f"C{i}",
            arm,
            marker="o",
        )
    base = mean(numbers(kept, "outcome", "base").values())
    left.axhline(base, color="0.4", ls="--", lw=1)
    left.text(
        0.99, base - 0.015, "base, test", transform=left.get_yaxis_transform(), ha="right", va="top"
    )
    left.set(
        xlabel="thousand samples drawn",
        ylabel="greedy accuracy, dev",
        xlim=(0, None),
        ylim=(0, 0.8),
        title="learning, bands: 95 % over seeds",
    )
    middle.set(
        xlabel="share of the steps taken",
        ylabel="right if read now, test",
        xticks=(0, 0.25, 0.5, 0.75),
        ylim=(0, 0.4),
        title="intermediate answers",
    )
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    # one response: V(x_t), filled where what would be written now is right; which token when, how surely
    shown = max(kept["process"]["transcripts"], key=lambda t: max(t["value"]) - min(t["value"]))
    task = front.make_task(nr.Config())
    tokens = [task.tokenizer.id_to_token(i) for i in task.encode([shown["response"]])[0]]
    order, sure = (shown[key][: len(tokens)] for key in ("order", "sure"))
    last = max(order) + 1
    right = [task.grade(shown["prompt"], said) == 1 for said in shown["said"][:last]]
    top.plot(range(last), shown["value"][:last], color="C2")
    colors = ["C2" if x else "white" for x in right]
    top.scatter(range(last), shown["value"][:last], c=colors, edgecolors="C2", zorder=3)
    ends = "right" if task.grade(shown["prompt"], shown["response"]) == 1 else "wrong"
    top.set(
        ylabel="V(x_t), mean of 16 branches",
        xlabel="step",
        ylim=(-0.05, 1.05),
        title=f"{shown['prompt']}  answered {shown['response'].removesuffix('<eos>')} ({ends})",
    )
    says = "what would be written now:\nfilled if right, white if wrong"
    top.text(0.98, 0.95, says, transform=top.transAxes, ha="right", va="top")
    dots = low.scatter(order, range(len(tokens)), c=sure, cmap="viridis", s=150, vmin=0, vmax=1)
    for place, (step, token, p) in enumerate(zip(order, tokens, sure, strict=True)):
        low.text(
            step,
            place,
            token.strip("<>")[:3],
            ha="center",
            va="center",
            fontsize=7,
            color="wk"[p > 0.6],
        )
    low.set(
        xlabel="step",
        ylabel="place in the response",
        xlim=top.get_xlim(),
        ylim=(len(tokens), -1),
        title="which token at which step",
    )
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
