"""What the papers say, tested here: python notebooks/claims.py [ID ...] [--seeds 0 1 2 3 4] [--threads 1]

A claim is a sentence of a paper, its own numbers, a metric here, the arms that it compares, and a rule for the
verdict that was written before the run. An arm is a loop with a few fields changed, by the functions of the loops
and of the other experiments in this folder, at `--config claims` size (about 20 s, bases and reward models apart).
Arms are shared between claims; each run is kept in runs/claims/ARM-SEED.json and not run again; all together make
notebooks/results/claims.json. Needs the extra `notebooks`.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

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
    policy = front.base_model(c, cache)
    found = {"base": nr.accuracy(policy, task, test, c), "curve": []}
    state = nr.start_ppo(policy, c) | front.reward_models("ppo", c, cache)
    for m in nr.ppo(state, task, c):
        found["curve"].append({k: round(m[k], 4) for k in ("reward", "truth", "kl", "entropy", "clipfrac", "length")})
    found |= {"greedy": nr.accuracy(policy, task, test, c), "sampled": nr.accuracy(policy, task, test, c, 1.0)}
    return {"seconds": round(time.time() - began, 1), "found": found}


def measure_groups(arm: str, seed: int, threads: int, cache: Path, /, **fields: object) -> dict:
    """No training: whose advantages are large, with the deviation of the group and without; and how far apart two
    estimates of the margin of a diffusion LM lie when policy and reference see the same masks, and when not."""
    c, began = nr.Config(seed=seed, threads=threads, device="cpu", **fields), time.time()
    task, policy = front.make_task(c), front.base_model(c, cache)
    texts = task.prompts(128, nr.rng(seed, "groups"))
    prompt, group = nr.in_groups(task, texts, c)
    b = nr.sample(policy, prompt, c, group=group, generator=nr.rng(seed, "groups", 1))
    truth = nr.grades(task, b)
    rate = truth.view(-1, c.samples).mean(1)
    extreme = ((rate - 0.5).abs() >= 0.5 - 1 / c.samples).repeat_interleave(c.samples)  # all but one alike
    found = {}
    for kind in ("grpo", "mean"):
        adv = nr.group_advantage(truth, group, kind).abs()
        found[kind] = float(adv[extreme].sum() / adv.sum())
    now, ref = (front.diffusion_base(c, cache), front.diffusion_base(replace(c, diffusion_updates=450), cache))
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


TWICE = dict(rounds=1, round_prompts=2 * SMALL["round_prompts"], round_updates=2 * SMALL["round_updates"])
MORE = dict(denoise_updates=2 * SMALL["denoise_updates"])
FOUR = dict(epochs=4, minibatch=64)
ARMS: dict[str, tuple[Callable, str, dict]] = {
    "gae": (measure_ppo, "", {}), "grpo": (measure_ppo, "", dict(arm="grpo")),
    "rloo": (measure_ppo, "", dict(arm="rloo")), "four_passes": (measure_ppo, "", FOUR),
    "four_passes_no_clip": (measure_ppo, "", FOUR | dict(value_clip=0.0)),
    "tenfold": (measure_ppo, "", dict(reward="tenfold")),
    "tenfold_whitened": (measure_ppo, "", dict(reward="tenfold", whiten_reward=True)),
    "learned": (measure_ppo, "", dict(reward="learned")),
    "learned_kl": (measure_ppo, "", dict(reward="learned", beta=0.5)),
    "learned_target": (measure_ppo, "", dict(reward="learned", beta=0.1, kl_target=1.0, kl_horizon=500)),
    "small_eps": (measure_ppo, "", dict(adam_eps=1e-8)), "groups": (measure_groups, "", {}),
    **{arm: (preferences.measure, arm, {}) for arm in (
        "dpo_nll", "dpo", "sft", "lucky_dpo_nll", "lucky_sft", "self_rewarding", "frozen_judge", "no_eft",
        "one_judgement", "top_sft", "own_dpo")},
    "one_round": (preferences.measure, "one_round", TWICE),
    "refine": (inside.measure, "refine", {}),
    **{arm: (inside.measure, arm, {}) for arm in ("none", "round", "long", "refusal", "short")},
    "positive_only": (inside.measure, "none", dict(c_neg=0.0)),
    "negative_only": (inside.measure, "none", dict(c_pos=0.0)),
    **{f"d_{arm}": (denoise.measure, arm, {}) for arm in (
        "outcome", "process", "n1", "n8", "no_indicator", "segments", "coupled")},
    "d_mu8": (denoise.measure, "mu8", {}), "d_mu8_p15": (denoise.measure, "mu8", dict(hide_prompt=0.15)),
    "d_outcome_more": (denoise.measure, "outcome_more", MORE),
    "sudoku_outcome": (denoise.measure, "sudoku_outcome", {}),
    "sudoku_process": (denoise.measure, "sudoku_process", {}),
    "sudoku_outcome_more": (denoise.measure, "sudoku_outcome_more", MORE),
}  # fmt: skip


def measure(arm: str, seed: int, threads: int, cache: Path) -> dict:
    """One arm with one seed, at the size of `claims`."""
    how, name, fields = ARMS[arm]
    found = how(name, seed, threads, cache, **{k: v for k, v in (SMALL | fields).items() if k != "threads"})
    seconds = found["seconds"] if isinstance(found["seconds"], float) else sum(found["seconds"].values())
    return found | {"arm": arm, "seed": seed, "seconds": round(seconds, 1)}


# ---- claims: what is compared, and the rule -----------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """effect(arm's findings, ...) is one number a seed. `above`: reproduced if the 95 % interval lies above 0; not
    reproduced if it lies below `least`, the smallest effect that would matter; else undecided. `equal`: reproduced if
    it lies within +-least, not reproduced if it lies outside, else undecided."""

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
        if self.rule == "equal":
            outside = low > self.least or high < -self.least
            return ("not reproduced" if outside else
                    "reproduced" if -self.least < low and high < self.least else "undecided")  # fmt: skip
        return "reproduced" if low > 0 else "not reproduced" if high < self.least else "undecided"


def greedy(a: dict, b: dict) -> float:
    return a["found"]["greedy"] - b["found"]["greedy"]


def after(n: int) -> Callable[[dict, dict], float]:
    return lambda a, b: a["rounds"][n]["greedy"] - b["rounds"][n]["greedy"]


def moved(key: str) -> Callable[[dict], float]:
    """How far a logged number has moved within the first round."""
    i, n = preferences.WATCHED.index(key), SMALL["round_updates"]
    return lambda a: mean(u[i] for u in a["logs"][n - 5 : n]) - mean(u[i] for u in a["logs"][:5])


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
CLAIMS = [
    # PPO practice
    Claim("P1", PPO, "clipping the value loss has little or no effect at small scale", "no numbers",
          "greedy, four passes a batch: with minus without", ("four_passes", "four_passes_no_clip"), greedy, 0.05,
          "equal"),
    Claim("P2", PPO, "whitening rewards helps with rewards that are not scaled", "no numbers",
          "greedy with rewards of 10: whitened minus not", ("tenfold_whitened", "tenfold"), greedy),
    Claim("P3", PPO, "without a KL penalty a learned reward is over-optimized: it rises", "no numbers",
          "learned reward, last minus first five updates", ("learned",),
          lambda a: last(a, "reward") - first(a, "reward")),
    Claim("P4", PPO, "without a KL penalty a learned reward is over-optimized: the truth falls", "no numbers",
          "true reward, first minus last five updates", ("learned",), lambda a: first(a, "truth") - last(a, "truth")),
    Claim("P5", PPO, "a KL penalty holds the truth up", "no numbers", "greedy: beta 0.5 minus 0",
          ("learned_kl", "learned"), greedy),
    Claim("P6", PPO, "an adaptive KL coefficient holds the KL near its target", "target 6 nats a response",
          "KL over its target of 1 nat, last five updates, minus 1", ("learned_target",),
          lambda a: last(a, "kl") - 1, 0.5, "equal"),
    Claim("P7", PPO, "dividing by the group's deviation weights very easy and very hard prompts up", "no numbers",
          "share of |A| in groups with all but one alike: divided minus not", ("groups",),
          lambda a: a["found"]["grpo"] - a["found"]["mean"]),
    Claim("P8", PPO, "RLOO does as well as PPO with a critic", "2402.14740: RLOO ahead", "greedy: rloo minus gae",
          ("rloo", "gae"), greedy, 0.05, "equal"),
    Claim("P9", PPO, "RLOO and GRPO differ by little", "a factor G/(G-1)", "greedy: rloo minus grpo",
          ("rloo", "grpo"), greedy, 0.05, "equal"),
    Claim("P10", PPO, "Adam's eps of 1e-8 in place of 1e-5 moves the policy further at first", "approx. KL 6 x",
          "KL over the first five updates: 1e-8 minus 1e-5", ("small_eps", "gae"),
          lambda a, b: first(a, "kl") - first(b, "kl"), 0.01),
    Claim("P11", PPO, "a verifier's reward alone improves a base that knows the facts", "no numbers",
          "greedy: ppo minus base", ("gae",), lambda a: a["found"]["greedy"] - a["found"]["base"]),
    # iterative reasoning preference optimization
    Claim("C5.1", IRPO, "DPO + NLL beats DPO on the same pairs", "73.1 against 61.8 (GSM8K)", "greedy after round 1",
          ("dpo_nll", "dpo"), after(1)),
    Claim("C5.1b", IRPO, "DPO alone is no better than SFT on the chosen", "61.8 against 65.2",
          "greedy after round 1: SFT minus DPO", ("sft", "dpo"), after(1)),
    Claim("C5.2", IRPO, "under DPO the log-prob of the chosen falls", "figs. 3, 4",
          "log-prob of the chosen within round 1: first minus last five updates", ("dpo",),
          lambda a: -moved("chosen")(a)),
    Claim("C5.2b", IRPO, "with the NLL it rises", "figs. 3, 4", "log-prob of the chosen: last minus first",
          ("dpo_nll",), moved("chosen")),
    Claim("C5.2c", IRPO, "the margin widens in both", "figs. 3, 4", "the smaller growth of the two margins",
          ("dpo", "dpo_nll"), lambda a, b: min(moved("margin")(a), moved("margin")(b))),
    Claim("C5.3", IRPO, "SFT on the chosen raises the rejected too", "fig. 2",
          "log-prob of the rejected within round 1: last minus first five updates", ("sft",), moved("rejected")),
    Claim("C5.4", IRPO, "two rounds beat one with twice the pairs", "78.0 against 74.8", "greedy",
          ("dpo_nll", "one_round"), lambda a, b: a["rounds"][2]["greedy"] - b["rounds"][1]["greedy"]),
    Claim("C5.5", IRPO, "gains shrink from round to round", "17.5, 4.9, 3.1, 0.5",
          "gain of round 1 minus gain of round 2", ("dpo_nll",),
          lambda a: 2 * a["rounds"][1]["greedy"] - a["rounds"][0]["greedy"] - a["rounds"][2]["greedy"]),
    Claim("C5.7", IRPO, "it works although some winners have wrong reasoning", "ARC, chance 25 %",
          "four answers: greedy after two rounds minus before", ("lucky_dpo_nll",),
          lambda a: a["rounds"][2]["greedy"] - a["rounds"][0]["greedy"]),
    Claim("C5.7b", IRPO, "and then the rejected side is needed", "86.7 against 79.8 (ARC)",
          "four answers, after two rounds: DPO + NLL minus SFT", ("lucky_dpo_nll", "lucky_sft"), after(2)),
    # GLoRe
    Claim("C4.1", GLORE, "the SORM judges steps better than the ORM", "81 against 73 %", "step accuracy",
          ("refine",), steps("SORM", "step accuracy", "ORM")),
    Claim("C4.1b", GLORE, "the ORM judges whole responses better than the SORM", "about 5 points",
          "accuracy on whole responses: ORM minus SORM", ("refine",), steps("ORM", "final accuracy", "SORM")),
    Claim("C4.1c", GLORE, "the SORM finds the first error more often", "no numbers", "first error of wrong drafts",
          ("refine",), steps("SORM", "first error", "ORM")),
    Claim("C4.2", GLORE, "the ORM is pessimistic where the student is weak", "qualitative",
          "right steps called wrong where the student mostly fails: ORM minus SORM", ("refine",),
          steps("ORM", "missed, V^pi below 1/2", "SORM")),
    Claim("C4.3", GLORE, "global and local refinement mend partly different drafts", "41 against 28 and 28 %",
          "mended by either minus by the better one", ("refine",),
          lambda a: mended(a, "either") - max(mended(a, "global"), mended(a, "local"))),
    Claim("C4.3b", GLORE, "with the ORM choosing, both mend more than each", "41 against 28 and 28 %",
          "mended: chosen minus the better one", ("refine",),
          lambda a: mended(a, "chosen") - max(mended(a, "global"), mended(a, "local"))),
    Claim("C4.3c", GLORE, "refinement with the ORM beats the best of three", "65 against 58", "greedy", ("refine",),
          lambda a: a["found"]["global + local + ORM"] - a["found"]["best of 3"]),
    Claim("C4.3d", GLORE, "the best of three beats greedy", "58 against 53", "greedy", ("refine",),
          lambda a: a["found"]["best of 3"] - a["found"]["greedy"]),
    Claim("C4.4", GLORE, "refining every draft breaks right ones", "qualitative", "right drafts broken, global",
          ("refine",), lambda a: a["found"]["broken"]["global"]),
    Claim("C4.4b", GLORE, "the ORM's choice repairs that", "qualitative", "broken: global minus chosen", ("refine",),
          lambda a: a["found"]["broken"]["global"] - a["found"]["broken"]["chosen"]),
    Claim("C4.5", GLORE, "without balancing the score follows the position", "qualitative",
          "correlation of score and position: balanced minus not", ("refine",),
          steps("balanced", "correlation with position", "not balanced"), 0.05),
    Claim("C4.6", GLORE, "a refiner told the true place mends more than with the SORM's", "qualitative",
          "mended: by the truth minus by SORM", ("refine",),
          lambda a: mended(a, "local, place by the truth") - mended(a, "local, place by SORM")),
    Claim("C4.6b", GLORE, "the SORM's place is better than a random one", "qualitative",
          "mended: by SORM minus by chance", ("refine",),
          lambda a: mended(a, "local, place by SORM") - mended(a, "local, place by chance")),
    Claim("C4.7", GLORE, "few continuations miss good steps", "8 continuations", "recall of labels: K = 16 minus 1",
          ("refine",), lambda a: a["found"]["labels"]["K = 16"]["recall"] - a["found"]["labels"]["K = 1"]["recall"]),
    Claim("C4.7b", GLORE, "many continuations call bad steps good", "8 continuations",
          "precision of labels: K = 1 minus 16", ("refine",),
          lambda a: a["found"]["labels"]["K = 1"]["precision"] - a["found"]["labels"]["K = 16"]["precision"]),
    # sequence-to-sequence reward
    Claim("C6.1", S2S, "ppo with the seq2seq reward beats ppo with a scalar model at the same KL", "76.9 % wins",
          "greedy, labeller without a weakness", ("none",), policy(SEQ, "greedy", LEVEL)),
    Claim("C6.1b", S2S, "and more so where the preferences mislead", "76.9 % wins",
          "greedy, labeller that falls for round answers", ("round",), policy(SEQ, "greedy", LEVEL)),
    Claim("C6.2", S2S, "less bias to long responses", "abstract", "tokens, long ones liked: scalar minus seq2seq",
          ("long",), policy(LEVEL, "length", SEQ), 0.5),
    Claim("C6.3", S2S, "fewer harmless problems refused", "abstract", "refused: scalar minus seq2seq", ("refusal",),
          policy(LEVEL, "refused", SEQ)),
    Claim("C6.4", S2S, "the gain carries over to new kinds of prompts better", "abstract",
          "right on chains of three after training on one and two: seq2seq minus scalar", ("short",),
          policy(SEQ, "longer chains", LEVEL)),
    Claim("C6.5", S2S, "a rewriter of identities only misses errors", "no numbers",
          "injected errors found: both minus identity only", ("round",), steps("argmax", "recall", "identity only")),
    Claim("C6.5b", S2S, "a rewriter of corrections only mends what is right", "no numbers",
          "right responses untouched: both minus corrections only", ("round",),
          steps("argmax", "clean untouched", "correction only")),
    Claim("C6.6", S2S, "its token scores find the error, a scalar model's do not", "no numbers",
          "the first negative token is the error: seq2seq minus scalar", ("round",),
          steps("argmax", "first", "scalar")),
    Claim("C6.7", S2S, "positive and negative scores together beat positive ones", "no numbers", "greedy",
          ("none", "positive_only"), lambda a, b: a["found"][SEQ]["greedy"] - b["found"][SEQ]["greedy"]),
    Claim("C6.7b", S2S, "and negative ones", "no numbers", "greedy", ("none", "negative_only"),
          lambda a, b: a["found"][SEQ]["greedy"] - b["found"][SEQ]["greedy"]),
    # self-rewarding
    Claim("C7.1", SRLM, "M2 wins against M1", "55.5 to 11.7", "wins minus 1/2", ("self_rewarding",),
          lambda a: a["rounds"][1]["over M1"]["win"] - 0.5),
    Claim("C7.1b", SRLM, "M3 wins against M2", "47.7 to 12.5", "wins minus 1/2", ("self_rewarding",),
          lambda a: a["rounds"][2]["over the last"]["win"] - 0.5),
    Claim("C7.2", SRLM, "the judge gets better without judge data", "78.7, 80.4, 81.7 %",
          "pairs in order: M3 minus M1", ("self_rewarding",), lambda a: judged(a, 2) - judged(a, 0)),
    Claim("C7.3", SRLM, "seed data for judging multiplies the pairs", "541 against 3,964",
          "pairs of round 1, of all problems: with minus without", ("self_rewarding", "no_eft"),
          lambda a, b: (a["rounds"][1]["pairs"] - b["rounds"][1]["pairs"]) / SMALL["round_prompts"]),
    Claim("C7.3b", SRLM, "and does not hurt solving", "30.5 to 30.9", "greedy of M1: with minus without",
          ("self_rewarding", "no_eft"), after(0), 0.05, "equal"),
    Claim("C7.5", SRLM, "pairs beat SFT on the best", "30 against 29: no gain by SFT", "greedy of M3",
          ("self_rewarding", "top_sft"), after(2)),
    Claim("C7.6", SRLM, "responses grow longer", "1092, 1552, 2552", "tokens: round 2 minus round 1",
          ("self_rewarding",), lambda a: a["rounds"][2]["length"] - a["rounds"][1]["length"], 0.25),
    Claim("C7.7", SRLM, "three judgements order pairs better than one", "no numbers", "pairs in order, M1: 3 minus 1",
          ("self_rewarding", "one_judgement"), lambda a, b: judged(a, 0) - judged(b, 0)),
    Claim("C7.8", SRLM, "a judge that learns along teaches more than a frozen one", "not in the paper",
          "greedy of M3", ("self_rewarding", "frozen_judge"), after(2)),
    Claim("C7.9", SRLM, "DPO, the paper's loss, holds over the rounds", "wins rise", "greedy of M3 minus M1: DPO",
          ("own_dpo",), lambda a: a["rounds"][2]["greedy"] - a["rounds"][0]["greedy"]),
    # denoising process reward, and its baseline
    Claim("C3.1", SAPO, "the process reward beats the outcome alone at equal updates: arithmetic",
          "marginal to strong", "greedy", ("d_process", "d_outcome"), greedy),
    Claim("C3.1b", SAPO, "at equal updates: a planning task", "Countdown 56 against 37", "greedy, 4x4 Sudoku",
          ("sudoku_process", "sudoku_outcome"), greedy),
    Claim("C3.1c", SAPO, "and at equal samples: arithmetic", "not reported", "greedy",
          ("d_process", "d_outcome_more"), greedy),
    Claim("C3.1d", SAPO, "and at equal samples: a planning task", "not reported", "greedy, 4x4 Sudoku",
          ("sudoku_process", "sudoku_outcome_more"), greedy),
    Claim("C3.2", SAPO, "the answer half way is better", "qualitative", "right if read after half of the steps",
          ("d_process", "d_outcome"),
          lambda a, b: a["found"]["answer after"]["0.5"] - b["found"]["answer after"]["0.5"]),
    Claim("C3.3", SAPO, "fewer sampling steps cost less", "Table 3, not seen",
          "lost with half of the passes: outcome minus process", ("d_outcome", "d_process"),
          lambda a, b: lost("1/2")(a) - lost("1/2")(b)),
    Claim("C3.4", SAPO, "more branches help", "N ablation, not seen", "greedy: N = 8 minus 1", ("d_n8", "d_n1"),
          greedy),
    Claim("C3.5", SAPO, "the indicator is needed", "not reported", "greedy: with minus without",
          ("d_process", "d_no_indicator"), greedy),
    Claim("C3.6", SAPO, "credit for each stretch beats credit for all tokens", "not in the paper", "greedy",
          ("d_segments", "d_process"), greedy),
    Claim("C3.8", SAPO, "right answers have right steps more often", "qualitative",
          "right answers with only right steps: process minus outcome", ("d_process", "d_outcome"),
          lambda a, b: a["found"]["right answers with right steps"] - b["found"]["right answers with right steps"]),
    Claim("C2.1", D1, "hiding prompt tokens at random allows many passes over a batch", "mu = 12",
          "greedy with eight passes: 15 % hidden minus none", ("d_mu8_p15", "d_mu8"), greedy),
    Claim("C2.2", "2506.20639", "coupled masks estimate better than the mean field", "EvalPlus + 4.4 %", "greedy",
          ("d_coupled", "d_outcome"), greedy),
    Claim("C2.3", "2505.19223", "sharing masks between policy and reference lowers the margin's variance",
          "a theorem", "1 - deviation with shared masks over that with own ones", ("groups",),
          lambda a: 1 - a["found"]["shared masks"] / a["found"]["own masks"]),
]  # fmt: skip

# Why a claim does not hold here, or cannot be decided; and the experiment that says so
WHY: dict[str, str] = {}


# ---- what is kept -------------------------------------------------------------------------------


def judge(claim: Claim, found: dict[str, dict[int, dict]]) -> dict | None:
    """A line of claims.json; None while two seeds have not all arms."""
    seeds = sorted(set.intersection(*(set(found.get(arm, ())) for arm in claim.arms)))
    if len(seeds) < 2:
        return None
    effects = [claim.effect(*(found[arm][seed] for arm in claim.arms)) for seed in seeds]
    half = front.T95[len(seeds) - 2] * stdev(effects) / len(seeds) ** 0.5
    low, high = mean(effects) - half, mean(effects) + half
    some = found[claim.arms[0]][seeds[0]]
    command = f"python notebooks/claims.py {claim.id} --seeds {' '.join(map(str, seeds))} --threads {some['threads']}"
    rule = f"within +-{claim.least}" if claim.rule == "equal" else f"above 0; at least {claim.least} would matter"
    return {"id": claim.id, "paper": claim.paper, "claim": claim.claim, "paper_numbers": claim.paper_numbers,
            "metric": claim.metric, "rule": rule, "effect": round(mean(effects), 4), "low": round(low, 4),
            "high": round(high, 4), "by_seed": [round(x, 4) for x in effects], "seeds": seeds,
            "verdict": claim.verdict(low, high), "why": WHY.get(claim.id, ""), "command": command,
            "commit": some["commit"], "machine": some["machine"], "torch": some["torch"]}  # fmt: skip


def collect() -> list[dict]:
    """All jobs -> OUT; a claim whose arms are not there keeps its line."""
    found: dict[str, dict[int, dict]] = {}
    for path in sorted(JOBS.glob("*.json")):
        job = json.loads(path.read_text())
        found.setdefault(job["arm"], {})[job["seed"]] = job
    before = {line["id"]: line for line in json.loads(OUT.read_text())} if OUT.exists() else {}
    lines = [judge(claim, found) or before.get(claim.id) for claim in CLAIMS]
    lines = [line for line in lines if line]
    front.write_text(OUT, "[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")
    return lines


def table(lines: list[dict]) -> str:
    """All claims as Markdown."""
    rows = ["| id | claim | the paper | here | effect | verdict |", "|---|---|---|---|---|---|"]
    rows += [f"| {x['id']} | {x['claim']} | {x['paper_numbers']} | {x['metric']} | "
             f"{x['effect']:.3f} [{x['low']:.3f}, {x['high']:.3f}] | {x['verdict']} |" for x in lines]  # fmt: skip
    return "\n".join(rows)


def main() -> None:
    """Run what is not there yet, then judge all there is."""
    run(__doc__, ARMS, JOBS, measure, {claim.id: claim.arms for claim in CLAIMS})
    print(table(collect()))


if __name__ == "__main__":
    main()
