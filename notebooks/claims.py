"""What the papers say, tested here: python notebooks/claims.py [ID ...] [--seeds 0 1 2 3 4] [--threads 1]

A claim is a sentence of a paper, its own numbers, a metric here, the arms that it compares, and a rule for the
verdict that was written before the run (one whose id ends in w: after the claim of its number had not held). An arm
is a loop with a few fields changed, by the functions of the loops and of the other experiments in this folder, at
`--config claims` size (about 20 s, bases and reward models apart). Arms are shared between claims; each run is kept
in runs/claims/ARM-SEED.json and not run again; all together make notebooks/results/claims.json. Needs the extra
`notebooks`.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import StatisticsError, mean

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
from notebooks import denoise, inside, preferences  # noqa: E402
from notebooks.jobs import run  # noqa: E402

JOBS = ROOT / "runs" / "claims"
OUT = ROOT / "notebooks" / "results" / "claims.json"
SMALL = nr.CONFIGS["claims"]


# ---- arms: how they are run ---------------------------------------------------------------------


def tenfold(state: dict, task: nr.Task, b: nr.Rollout, truth: Tensor, c: nr.Config) -> Tensor:
    """The verifier's reward, not scaled to the critic's liking."""
    return 10 * nr.verifier(state, task, b, truth, c)


nr.SIGNALS["tenfold"] = tenfold


def measure_ppo(arm: str, seed: int, threads: int, cache: Path, /, **fields: object) -> dict:
    """ppo with these fields."""
    c, began = nr.Config(seed=seed, threads=threads, device="cpu", **fields), time.time()
    task = front.make_task(c)
    test = task.prompts(c.eval_problems, nr.rng(0, "test"), "test")
    usual = replace(c, adam_eps=nr.Config.adam_eps)  # the same base for all arms
    policy = front.base_model(usual, cache)
    found = {"base": nr.accuracy(policy, task, test, c), "curve": []}
    state = nr.start_ppo(policy, c) | front.reward_models("ppo", usual, cache)
    for m in nr.ppo(state, task, c):
        found["curve"].append(
            {k: round(m[k], 4) for k in ("reward", "truth", "kl", "entropy", "clipfrac", "length")}
        )
    found |= {
        "greedy": nr.accuracy(policy, task, test, c),
        "sampled": nr.accuracy(policy, task, test, c, 1.0),
    }
    return {"seconds": round(time.time() - began, 1), "found": found}


def measure_groups(arm: str, seed: int, threads: int, cache: Path, /, **fields: object) -> dict:
    """Whose advantages are large, with the deviation of the group and without; and how far apart the estimates of a
    diffusion LM's log-ratio to its reference lie when both see the same masks, and when not."""
    c, began = nr.Config(seed=seed, threads=threads, device="cpu", **fields), time.time()
    task, policy = front.make_task(c), front.base_model(c, cache)
    texts = task.prompts(128, nr.rng(seed, "groups"))
    prompt, group = nr.in_groups(task, texts, c)
    b = nr.sample(policy, prompt, c, group=group, generator=nr.rng(seed, "groups", 1))
    truth = nr.grades(task, b)
    rate = truth.view(-1, c.samples).mean(1)
    extreme = ((rate - 0.5).abs() >= 0.5 - 1 / c.samples).repeat_interleave(
        c.samples
    )  # all but one alike
    found = {}
    for kind in ("grpo", "mean"):
        adv = nr.group_advantage(truth, group, kind).abs()
        found[kind] = float(adv[extreme].sum() / adv.sum())
    now, ref = front.diffusion_base(c, cache), front.diffusion_base(c, cache)
    few = replace(c, denoise_updates=4, credit="outcome")
    for _ in nr.denoise(nr.start_denoise(now, few), task, few):
        pass
    one = torch.arange(0, len(prompt), c.samples)
    x, y = prompt[one], b.response[one].masked_fill(b.response[one] == c.pad, c.eos)

    @torch.no_grad()
    def bound(model: nr.Transformer, i: int) -> Tensor:
        hidden, weight = nr.rate_masks(y, nr.rng(seed, "bound", i), c.t_min)
        return nr.masked_nll(model, x, y, hidden, weight)

    for name, apart in (("shared masks", 0), ("own masks", 1000)):
        gaps = torch.stack([bound(ref, i + apart) - bound(now, i) for i in range(16)])
        found[name] = float(gaps.std(0).mean())
    return {"seconds": round(time.time() - began, 1), "found": found}


TWICE = dict(
    rounds=1, round_prompts=2 * SMALL["round_prompts"], round_updates=2 * SMALL["round_updates"]
)
# as many samples as `process` draws in all: measured at laptop size, 14,692 and 11,958 where the outcome has 6,400
MORE, SUDOKU_MORE = (
    dict(denoise_updates=round(x * SMALL["denoise_updates"])) for x in (14692 / 6400, 11958 / 6400)
)
SOLVING = dict(
    posing=0.07 / 0.3, seed_demos=2400, seed_updates=90
)  # no_eft: the same solving data, nothing instead
FOUR = dict(epochs=4, minibatch=64)
ARMS: dict[str, tuple[Callable, str, dict]] = {
    "gae": (measure_ppo, "", {}),
    "grpo": (measure_ppo, "", dict(arm="grpo")),
    "rloo": (measure_ppo, "", dict(arm="rloo")),
    "four_passes": (measure_ppo, "", FOUR),
    "four_passes_no_clip": (measure_ppo, "", FOUR | dict(value_clip=0.0)),
    "tenfold": (measure_ppo, "", dict(reward="tenfold")),
    "tenfold_whitened": (measure_ppo, "", dict(reward="tenfold", whiten_reward=True)),
    "learned": (measure_ppo, "", dict(reward="learned")),
    "learned_kl": (measure_ppo, "", dict(reward="learned", beta=0.5)),
    "learned_fixed": (measure_ppo, "", dict(reward="learned", beta=0.1)),
    "learned_target": (
        measure_ppo,
        "",
        dict(reward="learned", beta=0.1, kl_target=1.0, kl_horizon=500),
    ),
    "learned_fast": (
        measure_ppo,
        "",
        dict(reward="learned", beta=0.1, kl_target=1.0, kl_horizon=100),
    ),
    "small_eps": (measure_ppo, "", dict(adam_eps=1e-8)),
    "large_eps": (measure_ppo, "", dict(adam_eps=1e-3)),
    "gentle": (measure_ppo, "", FOUR | dict(lr=1e-4)),
    "gentle_no_clip": (measure_ppo, "", FOUR | dict(lr=1e-4, value_clip=0.0)),
    "groups": (measure_groups, "", {}),
    **{
        arm: (preferences.measure, arm, {})
        for arm in (
            "dpo_nll",
            "dpo",
            "sft",
            "lucky_dpo_nll",
            "lucky_dpo",
            "lucky_sft",
            "self_rewarding",
            "frozen_judge",
            "one_judgement",
            "top_sft",
            "own_dpo",
        )
    },
    "no_eft": (preferences.measure, "no_eft", SOLVING),
    "one_round": (preferences.measure, "one_round", TWICE),
    "sft_one_round": (preferences.measure, "sft", TWICE),
    "refine": (inside.measure, "refine", {}),
    **{arm: (inside.measure, arm, {}) for arm in ("none", "round", "long", "refusal", "short")},
    "positive_only": (inside.measure, "none", dict(c_neg=0.0)),
    "negative_only": (inside.measure, "none", dict(c_pos=0.0)),
    **{
        f"d_{arm}": (denoise.measure, arm, {})
        for arm in (
            "outcome",
            "process",
            "shared",
            "n1",
            "n8",
            "no_indicator",
            "segments",
            "fixed_t",
            "coupled",
        )
    },
    "d_mu8": (denoise.measure, "mu8", {}),
    "d_mu8_p15": (denoise.measure, "mu8", dict(hide_prompt=0.15)),
    "d_mu8_p50": (denoise.measure, "mu8", dict(hide_prompt=0.5)),
    "d_outcome_more": (denoise.measure, "outcome_more", MORE),
    "sudoku_outcome": (denoise.measure, "sudoku_outcome", {}),
    "sudoku_process": (denoise.measure, "sudoku_process", {}),
    "sudoku_outcome_more": (denoise.measure, "sudoku_outcome_more", SUDOKU_MORE),
}


def measure(arm: str, seed: int, threads: int, cache: Path) -> dict:
    """One arm with one seed, at the size of `claims`."""
    how, name, fields = ARMS[arm]
    found = how(
        name, seed, threads, cache, **{k: v for k, v in (SMALL | fields).items() if k != "threads"}
    )
    seconds = (
        found["seconds"] if isinstance(found["seconds"], float) else sum(found["seconds"].values())
    )
    return found | {"arm": arm, "seed": seed, "seconds": round(seconds, 1)}


# ---- claims: what is compared, and the rule -----------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """effect(arm's findings, ...) is one number a seed; `least` is the smallest effect that would matter.
    above: reproduced if the 95 % interval lies above 0, unless all of it lies below `least`; then, and if it lies
    below 0, not reproduced.   at least: above (reproduced) or below (not reproduced) `least`.   no worse: the same
    with -`least`.   equal: within (reproduced) or outside (not) +-`least`.   Everything else is undecided."""

    id: str
    paper: str
    claim: str
    paper_numbers: str
    metric: str
    arms: tuple[str, ...]
    effect: Callable[..., float]
    least: float = 0.02
    rule: str = "above"

    def verdict(self, low: float, high: float) -> str:
        """By the rule."""
        least = self.least
        yes, no = {
            "above": (low > 0, high < least),
            "at least": (low > least, high < least),
            "no worse": (low > -least, high < -least),
            "equal": (-least < low and high < least, low > least or high < -least),
        }[self.rule]
        return "not reproduced" if no else "reproduced" if yes else "undecided"


def greedy(a: dict, b: dict) -> float:
    return a["found"]["greedy"] - b["found"]["greedy"]


def after(n: int) -> Callable[[dict, dict], float]:
    return lambda a, b: a["rounds"][n]["greedy"] - b["rounds"][n]["greedy"]


def moved(key: str) -> Callable[[dict], float]:
    """How far a logged number has moved within the first round."""
    i, n = preferences.WATCHED.index(key), SMALL["round_updates"]
    return lambda a: mean(u[i] for u in a["logs"][n - 5 : n]) - mean(u[i] for u in a["logs"][:5])


def posed(a: dict) -> int:
    """Problems of a round."""
    return a.get("fields", {}).get("round_prompts", nr.Config.round_prompts)


def judged(a: dict, i: int, key: str = "pairwise") -> float:
    return a["rounds"][i]["judge"][key]


def steps(head: str, key: str, other: str) -> Callable[[dict], float]:
    return lambda a: a["found"][head][key] - a["found"][other][key]


def policy(reward: str, key: str, other: str) -> Callable[[dict], float]:
    """Two learned rewards; where the scalar one never reaches the other's KL, its end counts."""
    of = lambda a, name: a["found"].get(name, a["found"][SCALAR])[key]  # noqa: E731
    return lambda a: of(a, reward) - of(a, other)


def lost(passes: str) -> Callable[[dict], float]:
    """What fewer passes cost."""
    return lambda a: a["found"]["greedy, passes"]["1"] - a["found"]["greedy, passes"][passes]


SEQ, SCALAR, LEVEL = "ppo, seq2seq", "ppo, scalar", "ppo, scalar, at the same KL"
IRPO, GLORE, SRLM = "2404.19733", "2402.10963", "2401.10020"
S2S, SAPO, D1 = "2409.00162", "2510.01544", "2504.12216"
PPO = "PPO practice (1707.06347, 2402.14740, the N+ details)"
last = lambda a, key: mean(u[key] for u in a["found"]["curve"][-5:])  # noqa: E731
first = lambda a, key: mean(u[key] for u in a["found"]["curve"][:5])  # noqa: E731
mended = lambda a, key: a["found"]["mended"][key]  # noqa: E731
labelled = lambda a, name, key: a["found"]["labels"][name][key]  # noqa: E731
honest = lambda a, i: a["rounds"][i]["right for the right reasons"]  # noqa: E731
missed = lambda a, head, side: a["found"][head][f"missed, V^pi {side} 1/2"]  # noqa: E731
pessimism = lambda a, head: missed(a, head, "below") - missed(a, head, "above")  # noqa: E731
CLAIMS = [
    # PPO practice
    Claim(
        "P1",
        PPO,
        "clipping the value loss has little or no effect at small scale",
        "no numbers",
        "greedy, four passes a batch: with minus without",
        ("four_passes", "four_passes_no_clip"),
        greedy,
        0.05,
        "equal",
    ),
    Claim(
        "P2",
        PPO,
        "whitening rewards helps with rewards that are not scaled",
        "no numbers",
        "greedy with rewards of 10: whitened minus not",
        ("tenfold_whitened", "tenfold"),
        greedy,
    ),
    Claim(
        "P3",
        PPO,
        "without a KL penalty a learned reward rises while the truth falls",
        "no numbers",
        "the smaller of its rise and the truth's fall, first to last five updates",
        ("learned",),
        lambda a: min(last(a, "reward") - first(a, "reward"), first(a, "truth") - last(a, "truth")),
    ),
    Claim(
        "P5",
        PPO,
        "a KL penalty holds the truth up",
        "no numbers",
        "greedy: beta 0.5 minus 0",
        ("learned_kl", "learned"),
        greedy,
    ),
    Claim(
        "P6",
        PPO,
        "an adaptive KL coefficient holds the KL near its target",
        "target 6 nats a response",
        "distance of the KL from 1 nat, last five updates: fixed beta minus adaptive",
        ("learned_fixed", "learned_target"),
        lambda a, b: abs(last(a, "kl") - 1) - abs(last(b, "kl") - 1),
        0.1,
    ),
    Claim(
        "P7",
        PPO,
        "dividing by the group's deviation weights very easy and very hard prompts up",
        "algebra",
        "share of |A| in groups with all but one alike: divided minus not (a check)",
        ("groups",),
        lambda a: a["found"]["grpo"] - a["found"]["mean"],
    ),
    Claim(
        "P8",
        PPO,
        "RLOO is no worse than PPO with a critic",
        "2402.14740: RLOO ahead",
        "greedy: rloo minus gae",
        ("rloo", "gae"),
        greedy,
        0.03,
        "no worse",
    ),
    Claim(
        "P9",
        PPO,
        "RLOO and GRPO differ by little",
        "no numbers",
        "greedy: rloo minus grpo",
        ("rloo", "grpo"),
        greedy,
        0.05,
        "equal",
    ),
    Claim(
        "P10",
        PPO,
        "a smaller eps in Adam (1e-8, not 1e-5) moves the policy further at first",
        "no numbers",
        "KL over the first five updates: 1e-8 minus 1e-5",
        ("small_eps", "gae"),
        lambda a, b: first(a, "kl") - first(b, "kl"),
        0.01,
    ),
    Claim(
        "P11",
        PPO,
        "a verifier's reward alone improves a base that knows the facts",
        "no numbers",
        "greedy: ppo minus base (a check)",
        ("gae",),
        lambda a: a["found"]["greedy"] - a["found"]["base"],
    ),
    # w, why: one more experiment where a claim did not hold, registered after that and before its own run, but for
    # P2w, C5.3w and C7.1w, which read runs that were there
    Claim(
        "P1w",
        PPO,
        "P1 was lost in damage by the rate: at a fifth of it value clipping has no effect",
        "ours",
        "greedy, four passes a batch, lr 1e-4: with minus without",
        ("gentle", "gentle_no_clip"),
        greedy,
        0.05,
        "equal",
    ),
    Claim(
        "P2w",
        PPO,
        "P2: there is nothing to help, the scale of a reward does no harm here",
        "ours",
        "greedy: rewards of 1 minus rewards of 10",
        ("gae", "tenfold"),
        greedy,
        0.05,
        "equal",
    ),
    Claim(
        "P6w",
        PPO,
        "P6: beta moved too slowly; with a horizon of 100 episodes it holds the KL",
        "ours",
        "distance of the KL from 1 nat, last five updates: fixed beta minus adaptive",
        ("learned_fixed", "learned_fast"),
        lambda a, b: abs(last(a, "kl") - 1) - abs(last(b, "kl") - 1),
        0.1,
    ),
    Claim(
        "P10w",
        PPO,
        "P10: 1e-5 is already far below the gradients; an eps that is not (1e-3) does slow",
        "ours",
        "KL over the first five updates: 1e-5 minus 1e-3",
        ("gae", "large_eps"),
        lambda a, b: first(a, "kl") - first(b, "kl"),
        0.01,
    ),
    # iterative reasoning preference optimization
    Claim(
        "C5.1",
        IRPO,
        "DPO + NLL beats DPO on the same pairs",
        "73.1 against 61.8 (GSM8K)",
        "greedy after round 1",
        ("dpo_nll", "dpo"),
        after(1),
    ),
    Claim(
        "C5.1b",
        IRPO,
        "SFT on the chosen is no worse than DPO alone",
        "65.2 against 61.8 (GSM8K)",
        "greedy after round 1: SFT minus DPO",
        ("sft", "dpo"),
        after(1),
        0.03,
        "no worse",
    ),
    Claim(
        "C5.1c",
        IRPO,
        "where winners are often lucky DPO alone beats SFT",
        "82.8 against 79.8 (ARC)",
        "four answers, round 1: DPO minus SFT",
        ("lucky_dpo", "lucky_sft"),
        after(1),
    ),
    Claim(
        "C5.2",
        IRPO,
        "under DPO the log-prob of the chosen falls",
        "figs. 3, 4",
        "log-prob of the chosen, nats, within round 1: first minus last five updates",
        ("dpo",),
        lambda a: -moved("chosen")(a),
        0.2,
    ),
    Claim(
        "C5.2b",
        IRPO,
        "with the NLL it rises",
        "figs. 3, 4",
        "log-prob of the chosen, nats: last minus first",
        ("dpo_nll",),
        moved("chosen"),
        0.2,
    ),
    Claim(
        "C5.3",
        IRPO,
        "SFT on the chosen raises the rejected too",
        "fig. 2",
        "log-prob of the rejected, nats, within round 1: last minus first five updates",
        ("sft",),
        moved("rejected"),
        0.2,
    ),
    Claim(
        "C5.4",
        IRPO,
        "two rounds beat one with twice the pairs",
        "78.0 against 74.8",
        "greedy",
        ("dpo_nll", "one_round"),
        lambda a, b: a["rounds"][2]["greedy"] - b["rounds"][1]["greedy"],
    ),
    Claim(
        "C5.4b",
        IRPO,
        "SFT gains little from twice the data",
        "65.2 to 66.9",
        "greedy after one round: twice the data minus once",
        ("sft_one_round", "sft"),
        after(1),
        0.05,
        "equal",
    ),
    Claim(
        "C5.5",
        IRPO,
        "gains shrink from round to round",
        "17.5, 4.9, 3.1, 0.5",
        "gain of round 1 minus gain of round 2",
        ("dpo_nll",),
        lambda a: (
            2 * a["rounds"][1]["greedy"] - a["rounds"][0]["greedy"] - a["rounds"][2]["greedy"]
        ),
    ),
    Claim(
        "C5.7",
        IRPO,
        "it works although some winners have wrong reasoning",
        "ARC, chance 25 %",
        "four answers: right with only right steps, after two rounds minus before",
        ("lucky_dpo_nll",),
        lambda a: honest(a, 2) - honest(a, 0),
    ),
    Claim(
        "C5.7b",
        IRPO,
        "and then the rejected side is needed",
        "84.8 against 79.8 (ARC, round 1)",
        "four answers, round 1: DPO + NLL minus SFT",
        ("lucky_dpo_nll", "lucky_sft"),
        after(1),
    ),
    Claim(
        "C5.3w",
        IRPO,
        "C5.3: rejected responses fall as they look unlike the chosen; less so with four answers",
        "ours",
        "log-prob of the rejected under SFT, nats, round 1, last minus first: four answers minus hundred",
        ("lucky_sft", "sft"),
        lambda a, b: moved("rejected")(a) - moved("rejected")(b),
        0.2,
    ),
    # GLoRe
    Claim(
        "C4.1",
        GLORE,
        "the SORM judges steps better than the ORM",
        "81 against 73 %",
        "step accuracy",
        ("refine",),
        steps("SORM", "step accuracy", "ORM"),
    ),
    Claim(
        "C4.1b",
        GLORE,
        "the ORM judges whole responses better than the SORM",
        "about 5 points",
        "accuracy on whole responses: ORM minus SORM",
        ("refine",),
        steps("ORM", "final accuracy", "SORM"),
    ),
    Claim(
        "C4.1c",
        GLORE,
        "the SORM finds the first error more often",
        "no numbers",
        "first error of wrong drafts",
        ("refine",),
        steps("SORM", "first error", "ORM"),
    ),
    Claim(
        "C4.1d",
        GLORE,
        "the ORM ranks whole responses better",
        "no numbers",
        "area under the curve: ORM minus SORM",
        ("refine",),
        steps("ORM", "final auc", "SORM"),
    ),
    Claim(
        "C4.2",
        GLORE,
        "the ORM is pessimistic where the student is weak, the SORM is not",
        "qualitative",
        "right steps called wrong, where the student mostly fails minus where not: ORM minus SORM",
        ("refine",),
        lambda a: pessimism(a, "ORM") - pessimism(a, "SORM"),
    ),
    Claim(
        "C4.3",
        GLORE,
        "global and local refinement mend partly different drafts",
        "qualitative",
        "mended by either minus by the better one",
        ("refine",),
        lambda a: mended(a, "either") - max(mended(a, "global"), mended(a, "local")),
        0.05,
        "at least",
    ),
    Claim(
        "C4.3b",
        GLORE,
        "with the ORM choosing, both mend more than each",
        "41 against 28 and 28 %",
        "mended: chosen minus the better one",
        ("refine",),
        lambda a: mended(a, "chosen") - max(mended(a, "global"), mended(a, "local")),
    ),
    Claim(
        "C4.3c",
        GLORE,
        "refinement with the ORM beats the best of three",
        "65 against 58",
        "greedy",
        ("refine",),
        lambda a: a["found"]["global + local + ORM"] - a["found"]["best of 3"],
    ),
    Claim(
        "C4.3d",
        GLORE,
        "the best of three beats greedy",
        "58 against 53",
        "greedy",
        ("refine",),
        lambda a: a["found"]["best of 3"] - a["found"]["greedy"],
    ),
    Claim(
        "C4.4",
        GLORE,
        "refining every draft breaks right ones",
        "qualitative",
        "right drafts broken, global",
        ("refine",),
        lambda a: a["found"]["broken"]["global"],
        0.02,
        "at least",
    ),
    Claim(
        "C4.4b",
        GLORE,
        "the ORM's choice repairs that",
        "qualitative",
        "broken: global minus chosen",
        ("refine",),
        lambda a: a["found"]["broken"]["global"] - a["found"]["broken"]["chosen"],
    ),
    Claim(
        "C4.5",
        GLORE,
        "without balancing the score follows the position",
        "ours, not the paper's",
        "correlation of score and position: balanced minus not",
        ("refine",),
        steps("balanced", "correlation with position", "not balanced"),
        0.05,
    ),
    Claim(
        "C4.5b",
        GLORE,
        "without the consistency check more bad steps are called good",
        "ours, not the paper's",
        "precision of labels, K = 8: with minus without",
        ("refine",),
        lambda a: labelled(a, "K = 8", "precision") - labelled(a, "no consistency", "precision"),
        0.01,
    ),
    Claim(
        "C4.6",
        GLORE,
        "a refiner told the true place mends more than with the SORM's",
        "ours, not the paper's",
        "mended: by the truth minus by SORM",
        ("refine",),
        lambda a: mended(a, "local, place by the truth") - mended(a, "local, place by SORM"),
    ),
    Claim(
        "C4.6b",
        GLORE,
        "the SORM's place is better than a random one",
        "ours, not the paper's",
        "mended: by SORM minus by chance",
        ("refine",),
        lambda a: mended(a, "local, place by SORM") - mended(a, "local, place by chance"),
    ),
    Claim(
        "C4.6c",
        GLORE,
        "and than the ORM's",
        "ours, not the paper's",
        "mended: by SORM minus by ORM",
        ("refine",),
        lambda a: mended(a, "local, place by SORM") - mended(a, "local, place by ORM"),
    ),
    Claim(
        "C4.7",
        GLORE,
        "many continuations call bad steps good",
        "ours; the paper has 8",
        "precision of labels: K = 1 minus 16",
        ("refine",),
        lambda a: labelled(a, "K = 1", "precision") - labelled(a, "K = 16", "precision"),
        0.01,
    ),
    # sequence-to-sequence reward
    Claim(
        "C6.1",
        S2S,
        "ppo with the seq2seq reward beats ppo with a scalar model at the same KL",
        "76.9 % wins on average",
        "greedy, labeller without a weakness",
        ("none",),
        policy(SEQ, "greedy", LEVEL),
    ),
    Claim(
        "C6.1b",
        S2S,
        "and more so where the preferences mislead",
        "abstract",
        "that difference: labeller who falls for round answers minus labeller without a weakness",
        ("round", "none"),
        lambda a, b: policy(SEQ, "greedy", LEVEL)(a) - policy(SEQ, "greedy", LEVEL)(b),
    ),
    Claim(
        "C6.2",
        S2S,
        "less bias to long responses",
        "abstract",
        "tokens, long ones liked: scalar minus seq2seq",
        ("long",),
        policy(LEVEL, "length", SEQ),
        0.5,
    ),
    Claim(
        "C6.3",
        S2S,
        "fewer harmless problems refused",
        "abstract",
        "refused: scalar minus seq2seq",
        ("refusal",),
        policy(LEVEL, "refused", SEQ),
    ),
    Claim(
        "C6.4",
        S2S,
        "smaller losses on new kinds of prompts",
        "abstract",
        "right on chains of three, trained on one and two, minus right on these: seq2seq minus scalar",
        ("short",),
        lambda a: policy(SEQ, "longer chains", LEVEL)(a) - policy(SEQ, "greedy", LEVEL)(a),
    ),
    Claim(
        "C6.5",
        S2S,
        "a rewriter of identities only misses errors",
        "ours, not the paper's",
        "injected errors found: both minus identity only",
        ("round",),
        steps("argmax", "recall", "identity only"),
    ),
    Claim(
        "C6.5b",
        S2S,
        "a rewriter of corrections only mends what is right",
        "ours, not the paper's",
        "right responses untouched: both minus corrections only",
        ("round",),
        steps("argmax", "clean untouched", "correction only"),
    ),
    Claim(
        "C6.6",
        S2S,
        "its token scores find the error better than a scalar model's",
        "ours, not the paper's",
        "the first negative token is the error, minus: the scalar score's largest fall is",
        ("round",),
        steps("argmax", "first", "scalar, largest fall"),
    ),
    Claim(
        "C6.7",
        S2S,
        "positive and negative scores together beat positive ones",
        "ours, not the paper's",
        "greedy (the reward's size changes too)",
        ("none", "positive_only"),
        lambda a, b: a["found"][SEQ]["greedy"] - b["found"][SEQ]["greedy"],
    ),
    Claim(
        "C6.7b",
        S2S,
        "and negative ones",
        "ours, not the paper's",
        "greedy (the reward's size changes too)",
        ("none", "negative_only"),
        lambda a, b: a["found"][SEQ]["greedy"] - b["found"][SEQ]["greedy"],
    ),
    # self-rewarding; with DPO + NLL (alpha 5) but for C7.1c
    Claim(
        "C7.1",
        SRLM,
        "M2 wins against M1",
        "55.5 to 11.7",
        "wins minus 1/2, DPO + NLL",
        ("self_rewarding",),
        lambda a: a["rounds"][1]["over M1"]["win"] - 0.5,
    ),
    Claim(
        "C7.1b",
        SRLM,
        "M3 wins against M2",
        "47.7 to 12.5",
        "wins minus 1/2, DPO + NLL",
        ("self_rewarding",),
        lambda a: a["rounds"][2]["over the last"]["win"] - 0.5,
    ),
    Claim(
        "C7.1c",
        SRLM,
        "and with DPO alone, the paper's loss",
        "47.7 to 12.5",
        "wins of M3 over M2 minus 1/2, DPO",
        ("own_dpo",),
        lambda a: a["rounds"][2]["over the last"]["win"] - 0.5,
    ),
    Claim(
        "C7.1w",
        SRLM,
        "C7.1c: it is the NLL that keeps self-rewarding from losing accuracy",
        "ours",
        "greedy of M3: DPO + NLL minus DPO",
        ("self_rewarding", "own_dpo"),
        after(2),
    ),
    Claim(
        "C7.2",
        SRLM,
        "the judge gets better without judge data",
        "78.7, 80.4, 81.7 %",
        "pairs in order: M3 minus M1",
        ("self_rewarding",),
        lambda a: judged(a, 2) - judged(a, 0),
    ),
    Claim(
        "C7.3",
        SRLM,
        "seed data for judging multiplies the pairs",
        "541 against 3,964",
        "pairs of round 1, of all problems: with minus without",
        ("self_rewarding", "no_eft"),
        lambda a, b: a["rounds"][1]["pairs"] / posed(a) - b["rounds"][1]["pairs"] / posed(b),
    ),
    Claim(
        "C7.3b",
        SRLM,
        "and does not hurt solving",
        "30.5 to 30.9",
        "greedy of M1, the same solving data: with minus without",
        ("self_rewarding", "no_eft"),
        after(0),
        0.03,
        "no worse",
    ),
    Claim(
        "C7.5",
        SRLM,
        "pairs beat SFT on the best",
        "30 against 29: no gain by SFT",
        "greedy of M3",
        ("self_rewarding", "top_sft"),
        after(2),
    ),
    Claim(
        "C7.6",
        SRLM,
        "responses grow longer",
        "1092, 1552, 2552",
        "tokens, greedy, test: M3 minus M1",
        ("self_rewarding",),
        lambda a: a["rounds"][2]["tokens"] - a["rounds"][0]["tokens"],
        0.25,
    ),
    Claim(
        "C7.7",
        SRLM,
        "three judgements order pairs better than one",
        "three are averaged, no ablation",
        "pairs in order, M1: 3 minus 1",
        ("self_rewarding", "one_judgement"),
        lambda a, b: judged(a, 0) - judged(b, 0),
    ),
    Claim(
        "C7.7b",
        SRLM,
        "and tie less often",
        "three are averaged, no ablation",
        "problems with one score for all, M1: 1 minus 3",
        ("self_rewarding", "one_judgement"),
        lambda a, b: judged(b, 0, "tied") - judged(a, 0, "tied"),
    ),
    Claim(
        "C7.8",
        SRLM,
        "a judge that learns along teaches more than a frozen one",
        "ours, not the paper's",
        "greedy of M3",
        ("self_rewarding", "frozen_judge"),
        after(2),
    ),
    # denoising process reward, and its baseline
    Claim(
        "C3.1",
        SAPO,
        "the process reward beats the outcome alone at equal updates: arithmetic",
        "82.1 against 81.9 (GSM8K, best of lengths)",
        "greedy",
        ("d_process", "d_outcome"),
        greedy,
    ),
    Claim(
        "C3.1b",
        SAPO,
        "at equal updates: a planning task",
        "Sudoku 22.4 against 18.4, Countdown 56.3 against 37.1",
        "greedy, 4x4 Sudoku",
        ("sudoku_process", "sudoku_outcome"),
        greedy,
    ),
    Claim(
        "C3.1c",
        SAPO,
        "and at equal samples: arithmetic",
        "not reported",
        "greedy",
        ("d_process", "d_outcome_more"),
        greedy,
    ),
    Claim(
        "C3.1d",
        SAPO,
        "and at equal samples: a planning task",
        "not reported",
        "greedy, 4x4 Sudoku",
        ("sudoku_process", "sudoku_outcome_more"),
        greedy,
    ),
    Claim(
        "C3.1e",
        SAPO,
        "and more so in planning",
        "Countdown 19 points, GSM8K 0.2",
        "that gain at equal updates: Sudoku minus arithmetic",
        ("sudoku_process", "sudoku_outcome", "d_process", "d_outcome"),
        lambda a, b, c, d: greedy(a, b) - greedy(c, d),
    ),
    Claim(
        "C3.2",
        SAPO,
        "the answer half way is better",
        "qualitative",
        "right if read after half of the steps",
        ("d_process", "d_outcome"),
        lambda a, b: a["found"]["answer after"]["0.5"] - b["found"]["answer after"]["0.5"],
    ),
    Claim(
        "C3.3",
        SAPO,
        "fewer sampling steps cost less",
        "Table 3, not seen",
        "lost with half of the passes: outcome minus process",
        ("d_outcome", "d_process"),
        lambda a, b: lost("1/2")(a) - lost("1/2")(b),
    ),
    Claim(
        "C3.4",
        SAPO,
        "more branches help",
        "N ablation, not seen",
        "greedy: N = 8 minus 1",
        ("d_n8", "d_n1"),
        greedy,
    ),
    Claim(
        "C3.5",
        SAPO,
        "the indicator is needed",
        "not reported",
        "greedy: with minus without",
        ("d_process", "d_no_indicator"),
        greedy,
    ),
    Claim(
        "C3.5b",
        SAPO,
        "a t drawn at random beats a fixed one",
        "not reported",
        "greedy: random minus half way",
        ("d_process", "d_fixed_t"),
        greedy,
    ),
    Claim(
        "C3.6",
        SAPO,
        "credit for each stretch beats credit for all tokens",
        "ours, not the paper's",
        "greedy",
        ("d_segments", "d_process"),
        greedy,
    ),
    Claim(
        "C3.7",
        SAPO,
        "shared states beat the outcome alone with the same samples",
        "v2 may do so",
        "greedy",
        ("d_shared", "d_outcome"),
        greedy,
    ),
    Claim(
        "C3.8",
        SAPO,
        "right answers have right steps more often",
        "examples only",
        "right answers with only right steps: process minus outcome",
        ("d_process", "d_outcome"),
        lambda a, b: (
            a["found"]["right answers with right steps"]
            - b["found"]["right answers with right steps"]
        ),
    ),
    Claim(
        "C2.1",
        D1,
        "hiding prompt tokens at random allows many passes over a batch",
        "mu = 12",
        "greedy with eight passes: 15 % hidden minus none",
        ("d_mu8_p15", "d_mu8"),
        greedy,
    ),
    Claim(
        "C2.1b",
        D1,
        "hiding half of them is too much",
        "0.1 to 0.3 best, 0.5 unstable",
        "greedy with eight passes: 15 % minus 50 % hidden",
        ("d_mu8_p15", "d_mu8_p50"),
        greedy,
    ),
    Claim(
        "C2.4",
        "2506.20639",
        "a coupled estimate of the likelihood trains better than the mean field",
        "EvalPlus + 4.4 % by the whole method",
        "greedy",
        ("d_coupled", "d_outcome"),
        greedy,
    ),
    Claim(
        "C2.3",
        "2505.19223",
        "sharing masks between policy and reference lowers the margin's variance",
        "a theorem",
        "1 - deviation with shared masks over that with own ones (a check)",
        ("groups",),
        lambda a: 1 - a["found"]["shared masks"] / a["found"]["own masks"],
    ),
]

# Why a claim does not hold here, or cannot be decided, and the experiment that says so: a claim whose id ends in w,
# or the same metric at laptop size (a column of the table)
WHY: dict[str, str] = {
    "P1": "Four passes in minibatches of 64 damage the policy at this rate, clipped or not: greedy 0.37 to 0.56 "
    "where one pass ends at 0.81 to 0.88, and seeds differ by twenty points. P1w lowers the rate.",
    "P2": "Advantages are whitened and Adam divides by the size of gradients, so the scale reaches the critic "
    "alone. P2w: there is little to repair.",
    "P6": "The KL starts at 0, so beta falls first, by a tenth an update, and has no time to come back within 20 "
    "updates. P6w takes a faster controller.",
    "P6w": "Faster is worse: beta halves in each update until the KL has passed its target, and is then too small "
    "to hold it. The controller winds up; it was made for runs of thousands of updates, and a fixed beta is "
    "the better choice for 20.",
    "P8": "The noise of seeds is as wide as the margin; at laptop size it holds.",
    "P10": "The sign is the paper's, the size is not: gradients are far above either eps. P10w takes one that is "
    "not.",
    "C5.1c": "Positive on average at both sizes, clear at neither: how lucky the winners are differs from base to "
    "base.",
    "C5.3": "In the paper both sides are long texts that differ late; here a wrong response often shows its habit "
    "in the first tokens, and loses what the chosen gain. C5.3w: where the sides are more alike it loses "
    "less.",
    "C5.4b": "The gain is about as large as the margin, and seeds differ more than that.",
    "C4.1": "A fourth of the drafts and half of the updates are too few for either head; at laptop size it holds, "
    "with a third of the paper's eight points.",
    "C4.1b": "No difference at either size. ORM and SORM are two heads of one trunk here (a DEVIATION), which reads "
    "both kinds of labels.",
    "C4.1d": "As C4.1b.",
    "C4.2": "As C4.1: too few drafts; it holds at laptop size.",
    "C4.3": "As C4.1: too few drafts; it holds at laptop size.",
    "C4.3b": "At neither size. The refiners do mend different drafts (C4.3), but an ORM of this quality (area under "
    "the curve 0.8 at laptop size, inside.json) loses more by its choices than the second refiner brings.",
    "C4.3c": "Refiners of 80 updates break a third of the right drafts (C4.4). At laptop size they break an eighth, "
    "and it holds.",
    "C4.3d": "At neither size: samples are worse than the greedy draft, and the ORM is too weak to make that up.",
    "C4.4b": "At neither size clear: the ORM takes a broken draft for a mended one about as often as the other way "
    "round.",
    "C4.5b": "The student never ignores a result that it has written, so the check rejects nothing, at either size.",
    "C4.6b": "As C4.1: too few drafts; clear at laptop size.",
    "C4.6c": "Clear at neither size: two heads of one trunk, see C4.1b.",
    "C6.1": "At neither size: a labeller without a weakness leaves the scalar model nothing wrong to learn. C6.1b "
    "asks about one with a weakness.",
    "C6.1b": "Positive on average; clear at laptop size.",
    "C6.4": "At neither size: the base knows chains of three already, so they are new to the rewards only.",
    "C6.7": "Better in every seed, but by less than the two points asked for: the positive scores end at the first "
    "disagreement and so say nearly all. Without them (C6.7b) much is lost.",
    "C7.1c": "DPO alone pushes the chosen down too (C5.2). C7.1w: with the NLL the same rounds end 20 to 30 points "
    "higher.",
    "C7.2": "At neither size: rounds pay for solutions, not for judgements, and the seed data of judging is all "
    "there is.",
    "C7.3b": "Seeds differ by more than the margin; at laptop size it costs 3.5 points (three seeds): a model this "
    "small shares its room.",
    "C7.5": "Positive on average at both sizes, clear at neither.",
    "C7.8": "No difference at either size: a judge that does not get better (C7.2) may as well be frozen.",
    "C3.1": "Positive on average at both sizes, and smaller than what seeds do.",
    "C3.1b": "At laptop size there is no difference. (7) speaks of responses that beat their group, a fifth of all "
    "on Sudoku (denoise.json), and pushes those unequally that go up anyway.",
    "C3.1c": "What four branches cost is as well spent on more updates, at either size.",
    "C3.1d": "As C3.1b and C3.1c; no difference at laptop size.",
    "C3.1e": "As C3.1b; no difference at laptop size.",
    "C3.2": "At neither size. At laptop size what is read after a quarter of the steps is better (denoise.json), "
    "but few answers are there so early: this model writes from left to right.",
    "C3.3": "At neither size: several tokens a pass are drawn independently, whoever was paid for what.",
    "C3.4": "At neither size: how well V is known does not matter where D adds this little.",
    "C3.5": "Clear at neither size; on average the indicator helps, by less than seeds differ.",
    "C3.5b": "At neither size: any state between the first and the last says the same.",
    "C3.6": "At neither size: a stretch of one response is judged by four samples, and that noise is paid for too.",
    "C3.7": "At neither size: a group of eight with shared states has fewer different responses.",
    "C3.8": "Clear at neither size: of the right answers most have right steps already.",
    "C2.1": "A prompt has ten tokens here, so hiding 15 % hides a digit and asks another problem; and eight passes "
    "do no harm without it (denoise.json: 0.542 with eight, 0.540 with two).",
    "C2.4": "Twelve updates are too few to tell; at laptop size it gains eleven points.",
}


# ---- what is kept -------------------------------------------------------------------------------


RULES = {
    "above": "above 0, and not all below {}",
    "at least": "above {}",
    "no worse": "above -{}",
    "equal": "within +-{}",
}


def effects(claim: Claim, found: dict[str, dict[int, dict]]) -> dict[int, float]:
    """seed -> effect. A seed whose metric is not defined (no such steps, no pairs) is left out."""
    told = {}
    for seed in sorted(set.intersection(*(set(found.get(arm, ())) for arm in claim.arms))):
        try:
            told[seed] = claim.effect(*(found[arm][seed] for arm in claim.arms))
        except (TypeError, StatisticsError):
            continue
    return told


def weigh(claim: Claim, told: dict[int, float]) -> dict | None:
    """Mean and 95 % interval over the seeds, and the verdict; None of fewer than three."""
    if len(told) < 3:
        return None
    values = list(told.values())
    low, high = (mean(values) + sign * front.half_width(values) for sign in (-1, 1))
    return {
        "effect": round(mean(values), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "seeds": list(told),
        "by_seed": [round(x, 4) for x in values],
        "verdict": claim.verdict(low, high),
    }


def judge(claim: Claim, found: dict[str, dict[int, dict]]) -> dict | None:
    """A line of claims.json; None while fewer than three seeds have all arms."""
    said = weigh(claim, effects(claim, found))
    if not said:
        return None
    runs = [found[arm][seed] for arm in claim.arms for seed in said["seeds"]]
    command = f"python notebooks/claims.py {claim.id} --seeds {' '.join(map(str, said['seeds']))}"
    return {
        "id": claim.id,
        "paper": claim.paper,
        "claim": claim.claim,
        "paper_numbers": claim.paper_numbers,
        "metric": claim.metric,
        "rule": RULES[claim.rule].format(claim.least),
        **said,
        "why": "" if said["verdict"] == "reproduced" else WHY.get(claim.id, ""),
        "command": f"{command} --threads {runs[0]['threads']}",
        "commit": " ".join(sorted({run["commit"] for run in runs})),
        "machine": runs[0]["machine"],
        "torch": runs[0]["torch"],
    }


def at_laptop_size() -> dict[str, dict[int, dict]]:
    """The arms that the other experiments of this folder have run at `--config laptop`: a look at scale."""
    read = lambda name: json.loads((OUT.parent / f"{name}.json").read_text())  # noqa: E731
    found = {
        name: {
            r["seed"]: {"found": {"greedy": r["final"], "base": r["base"]}} for r in kept["results"]
        }
        for name in ("gae", "grpo", "rloo")
        for kept in [read(f"ppo_{name}")]
    }
    for part, before in (("preferences", ""), ("inside", ""), ("denoise", "d_")):
        for arm, kept in read(part).items():
            found[arm if arm.startswith("sudoku") else before + arm] = {
                job["seed"]: job for job in kept["seeds"]
            }
    return found


def collect() -> list[dict]:
    """All jobs -> OUT; a claim whose arms are not there keeps its line."""
    found: dict[str, dict[int, dict]] = {}
    for path in sorted(JOBS.glob("*.json")):
        job = json.loads(path.read_text())
        found.setdefault(job["arm"], {})[job["seed"]] = job
    before = {line["id"]: line for line in json.loads(OUT.read_text())} if OUT.exists() else {}
    lines, large = [], at_laptop_size()
    for claim in CLAIMS:
        if line := judge(claim, found) or before.get(claim.id):
            try:
                line["laptop"] = weigh(claim, effects(claim, large))
            except KeyError:  # what was not kept there
                line["laptop"] = None
            lines.append(line)
    front.write_text(OUT, "[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")
    return lines


def table(lines: list[dict]) -> str:
    """All claims as Markdown, and why those do not hold that do not."""
    rows = [
        "| id | claim | the paper | here | effect | verdict | at laptop size |",
        "|---|---|---|---|---|---|---|",
    ]
    effect = lambda x: f"{x['effect']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" if x else ""  # noqa: E731
    rows += [
        f"| {x['id']} | {x['claim']} | {x['paper_numbers']} | {x['metric']} | {effect(x)} | {x['verdict']} | "
        f"{effect(x['laptop'])} |"
        for x in lines
    ]
    counted = Counter(x["verdict"] for x in lines)
    whys = [
        f"- **{x['id']}**, {x['verdict']}. {x['why']}"
        for x in lines
        if x["verdict"] != "reproduced"
    ]
    return "\n".join(
        [", ".join(f"{n} {verdict}" for verdict, n in counted.most_common()), "", *rows, "", *whys]
    )


def main() -> None:
    """Run what is not there yet, then judge all there is."""
    run(__doc__, ARMS, JOBS, measure, {claim.id: claim.arms for claim in CLAIMS})
    print(table(collect()))


if __name__ == "__main__":
    main()
