"""What the papers say, tested here: python notebooks/claims.py [ID ...] [--seeds 0 1 2 3 4]

A claim is a sentence of a paper, its own numbers, a metric here, the arms that it compares, and a
rule for the verdict that was written before the run (one whose id ends in w: after the claim of its
number had not held). An arm is a method with a few numbers changed, by the functions of the loops
and of the other experiments in this folder, at the sizes of SMALL (10 s to 4 minutes). Arms are
shared between claims; each run is kept in runs/claims/ARM-SEED.json and not run again; all together
make notebooks/results/claims.json. Claims with `laptop_runs` are judged by the runs of the
experiments that make them. Needs the extra `notebooks`.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import StatisticsError, mean
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402
from notebooks import denoise, inside, preferences  # noqa: E402
from notebooks.jobs import config, head, row, run  # noqa: E402

JOBS = ROOT / "runs" / "claims"
OUT = ROOT / "notebooks" / "results" / "claims.json"
# What differs from the laptop's sizes. There are more test problems, because they cost little and
# 300 of them made half of the noise.
SMALL: dict[str, dict[str, Any]] = {
    "all": {"eval_problems": 1000},
    "ppo": {"prompts": 32, "updates": 20, "reward_data": 2000, "reward_updates": 60},
    "seq2seq": {"prompts": 32, "updates": 20, "reward_data": 2000, "reward_updates": 100},
    "iterative_dpo": {"rounds": 2, "prompts": 256, "updates": 20},
    "self_rewarding": {"prompts": 256, "updates": 20},
    "denoise": {"prompts": 16, "updates": 25, "eval_problems": 500},
}


# ---- ppo, and what its arms change ---------------------------------------------------------------


def tenfold(
    state: nr.PPOState, task: nr.Task, b: nr.Rollout, truth: Tensor, c: nr.PPOConfig
) -> Tensor:
    """The verifier's reward, not scaled to the critic's liking."""
    return 10 * nr.verifier(state, task, b, truth, c)


def whitened_credit(b: nr.Rollout, reward: Tensor, c: nr.PPOConfig) -> tuple[Tensor, Tensor]:
    """As `nr.gae_credit`, on token rewards scaled to variance 1.

    They keep their mean: a shifted one would pay for length.
    """
    reward = (reward - c.beta * nr.k1(b.logp, b.ref_logp)) * b.mask
    average = reward.sum() / b.mask.sum()
    scaled = nr.whiten(reward, b.mask) + average * b.mask
    return nr.gae_credit(b, scaled, replace(c, beta=0.0))


def free_values(
    logp: Tensor, value: Tensor, b: nr.Rollout, denom: Tensor, c: nr.PPOConfig
) -> Tensor:
    """(14) without the band in which a value may move."""
    policy_part = nr.ppo_loss(logp, b.logp, b.adv, b.mask, denom, c.clip)
    critic_part = nr.value_loss(value, b.value, b.ret, b.mask, denom, clip=None)
    return policy_part + c.value_coef * critic_part


nr.REWARDS["tenfold"] = nr.RewardSource(tenfold)
nr.PPO_ARMS["gae_free_values"] = nr.Arm(nr.gae_credit, free_values, critic=True)
# No band either: it is made for rewards of 1, and would be absurd after another scaling.
nr.PPO_ARMS["gae_whitened"] = nr.Arm(whitened_credit, free_values, critic=True)

# What the controller below steers to, in nats a response.
KL_TARGET = 1.0


def adapt_beta(beta: float, kl: float, episodes: int, horizon: int) -> float:
    """The KL controller of arXiv 1909.08593; a larger horizon makes it slower."""
    # beta <- beta (1 + clip(KL / target - 1, -.2, .2) n / horizon)
    error = max(-0.2, min(0.2, kl / KL_TARGET - 1))
    return beta * (1 + error * episodes / horizon)


def ppo_to_target(
    state: nr.PPOState, task: nr.Task, c: nr.PPOConfig, horizon: int
) -> Iterator[dict[str, Any]]:
    """`nr.ppo` with a beta that is adapted after every update."""
    beta = c.beta
    while state.update < c.updates:
        # The state holds the number of the update, so a new loop goes on with the next one.
        m = next(nr.ppo(state, task, replace(c, beta=beta)))
        yield m
        beta = adapt_beta(beta, m["kl"], c.prompts * c.samples, horizon)


CURVE = ("reward", "truth", "kl", "entropy", "clipfrac", "length")


def measure_ppo(
    arm: str,
    seed: int,
    threads: int,
    cache: Path,
    /,
    sizes: dict[str, dict] = SMALL,
    adam_eps: float = nr.ADAM_EPS,
    horizon: int = 0,
    **numbers: Any,
) -> dict:
    """ppo with these numbers.

    adam_eps: of the policy's optimizers. horizon: of the controller of beta, 0 for none.
    """
    c = config("ppo", seed, threads, sizes, **numbers)
    began = time.time()
    task = front.make_task(c)
    train = front.CachedTrainer(cache)
    test = task.prompts(c.eval_problems, nr.rng(0, "test"), "test")
    policy = nr.gpt_base(task, c, train)
    found: dict[str, Any] = {"base": nr.accuracy(policy, task, test, c), "curve": []}
    state = nr.start_ppo(policy, c)
    state.models = nr.ppo_reward_models(policy, task, c, train)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["eps"] = adam_eps
    loop = ppo_to_target(state, task, c, horizon) if horizon else nr.ppo(state, task, c)
    for m in loop:
        found["curve"].append({key: round(m[key], 4) for key in CURVE})
    found["greedy"] = nr.accuracy(policy, task, test, c)
    found["sampled"] = nr.accuracy(policy, task, test, c, 1.0)
    return {"seconds": round(time.time() - began, 1), "found": found}


# ---- groups, and M1 without a judge's training ---------------------------------------------------


def shares_of_extremes(
    policy: nr.Transformer, task: nr.Task, prompt: Tensor, b: nr.Rollout, c: nr.DenoiseConfig
) -> dict[str, float]:
    """Whose advantages are large, with the deviation of the group and without.

    The share of all |A| in groups that are all alike but for one at most.
    """
    truth = nr.grades(task, b)
    rate = truth.view(-1, c.samples).mean(1)
    extreme = (rate - 0.5).abs() >= 0.5 - 1 / c.samples
    extreme = extreme.repeat_interleave(c.samples)
    found = {}
    for kind in ("grpo", "mean"):
        adv = nr.group_advantage(truth, b.group, kind).abs()
        found[kind] = float(adv[extreme].sum() / adv.sum())
    return found


def spread_of_estimates(
    now: nr.Transformer, ref: nr.Transformer, prompt: Tensor, canvas: Tensor, c: nr.DenoiseConfig
) -> dict[str, float]:
    """How far apart 16 estimates of a diffusion LM's log-ratio to its reference lie.

    Once both see the same masks, once each has its own.
    """

    @torch.no_grad()
    def bound(model: nr.Transformer, i: int) -> Tensor:
        is_mask, weight = nr.rate_masks(canvas, nr.rng(c.seed, "bound", i), c.t_min)
        return nr.masked_nll(model, prompt, canvas, is_mask, weight)

    found = {}
    for name, apart in (("shared masks", 0), ("own masks", 1000)):
        gaps = torch.stack([bound(ref, i + apart) - bound(now, i) for i in range(16)])
        found[name] = float(gaps.std(0).mean())
    return found


def measure_groups(
    arm: str,
    seed: int,
    threads: int,
    cache: Path,
    /,
    sizes: dict[str, dict] = SMALL,
    **numbers: Any,
) -> dict:
    """What needs no training of its own: advantages within groups, and two kinds of masks."""
    c = config("denoise", seed, threads, sizes, **numbers)
    began = time.time()
    task = front.make_task(c)
    train = front.CachedTrainer(cache)
    policy = nr.gpt_base(task, c, train)
    prompt, group = nr.in_groups(task, task.prompts(128, nr.rng(seed, "groups")), c)
    generator = nr.rng(seed, "groups", 1)
    b = nr.sample(policy, prompt, c, group=group, generator=generator)
    found = shares_of_extremes(policy, task, prompt, b, c)

    now, ref = (nr.diffusion_base(nr.gpt_base(task, c, train), task, c, train) for _ in range(2))
    few = replace(c, updates=4, arm="outcome")
    for _ in nr.denoise(nr.start_ppo(now, few), task, few):
        pass
    canvas = b.response.masked_fill(b.response == c.pad_id, c.eos_id)
    one = slice(None, None, c.samples)  # a response to each problem
    found |= spread_of_estimates(now, ref, prompt[one], canvas[one], c)
    return {"seconds": round(time.time() - began, 1), "found": found}


# The share of M1's data that does not judge.
REST = 0.3


def never_judging(
    base: nr.Transformer, task: nr.Task, c: nr.SelfRewardingConfig, train: nr.Trainer
) -> nr.Transformer:
    """M1 with as much solving and posing as M1 has, and nothing in place of the judging."""
    model = deepcopy(base)

    def batches() -> nr.Batches:
        generator = nr.rng(c.seed, "seed data")
        demos = []
        for kind in torch.rand(c.start_data, generator=generator).tolist():
            poses = kind > 1 - nr.POSING / REST
            demos.append((task.propose_demo if poses else task.demo)(generator))
        return nr.gpt_batches(model, nr.encode_demos(task, demos, c), c)

    rates = c.start_lr, c.start_muon_lr
    train("m1-solving", [model], batches, c.start_updates, c, *rates, reads="start_data")
    return model


# ---- arms: how they are run ---------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A measuring function, what it calls the arm, and what is changed beside."""

    measure: Callable[..., dict]
    name: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


# Several passes over a batch, so that values can move out of their band, and a rate that bears it.
GENTLE = {"epochs": 4, "minibatch": 64, "lr": 1e-4}
FREE = {"arm": "gae_free_values"}
# A score of hidden vectors alone, as the papers have it.
HIDDEN = {"reward": "learned", "logp_weight": 0.0}
LEARNED = HIDDEN | {"beta": 0.1}
TWICE = {
    "rounds": 1,
    "prompts": 2 * SMALL["iterative_dpo"]["prompts"],
    "updates": 2 * SMALL["iterative_dpo"]["updates"],
}
# The updates of a round of self_rewarding at this size, whatever the arm has at laptop size.
SHORT = {"updates": SMALL["self_rewarding"]["updates"]}
SOLVING = {
    "starts_from": never_judging,
    "start_data": round(REST * nr.SelfRewardingConfig.start_data),
    "start_updates": round(REST * nr.SelfRewardingConfig.start_updates),
}
ARMS: dict[str, Arm] = {
    "gae": Arm(measure_ppo),
    "tenfold": Arm(measure_ppo, numbers={"reward": "tenfold"}),
    "tenfold_whitened": Arm(measure_ppo, numbers={"reward": "tenfold", "arm": "gae_whitened"}),
    "learned": Arm(measure_ppo, numbers=HIDDEN),
    "learned_kl": Arm(measure_ppo, numbers=HIDDEN | {"beta": 0.5}),
    "learned_fixed": Arm(measure_ppo, numbers=LEARNED),
    "learned_target": Arm(measure_ppo, numbers=LEARNED | {"horizon": 500}),
    "learned_fast": Arm(measure_ppo, numbers=LEARNED | {"horizon": 100}),
    "small_eps": Arm(measure_ppo, numbers={"adam_eps": 1e-8}),
    "large_eps": Arm(measure_ppo, numbers={"adam_eps": 1e-3}),
    "gentle": Arm(measure_ppo, numbers=GENTLE),
    "gentle_no_clip": Arm(measure_ppo, numbers=GENTLE | FREE),
    "groups": Arm(measure_groups),
    "dpo_nll": Arm(preferences.measure, "dpo_nll"),
    "dpo": Arm(preferences.measure, "dpo"),
    "sft": Arm(preferences.measure, "sft"),
    "lucky_dpo_nll": Arm(preferences.measure, "lucky_dpo_nll"),
    "lucky_sft": Arm(preferences.measure, "lucky_sft"),
    "plain": Arm(preferences.measure, "plain", SHORT),
    "one_judgement": Arm(preferences.measure, "one_judgement", SHORT),
    "top_sft": Arm(preferences.measure, "top_sft", SHORT),
    "own_dpo": Arm(preferences.measure, "own_dpo", SHORT),
    "one_choice": Arm(preferences.measure, "one_choice", SHORT),
    "never_judging": Arm(preferences.measure, "no_eft", SHORT | SOLVING),
    "one_round": Arm(preferences.measure, "one_round", TWICE),
    "sft_one_round": Arm(preferences.measure, "sft", TWICE),
    "none": Arm(inside.measure, "none"),
    "round": Arm(inside.measure, "round"),
    "long": Arm(inside.measure, "long"),
    "refusal": Arm(inside.measure, "refusal"),
    "positive_only": Arm(inside.measure, "none", {"c_neg": 0.0}),
    "negative_only": Arm(inside.measure, "none", {"c_pos": 0.0}),
    "round_positive_only": Arm(inside.measure, "round", {"c_neg": 0.0}),
    "d_mu8": Arm(denoise.measure, "mu8"),
    "d_mu8_p15": Arm(denoise.measure, "mu8", {"masked": 0.15}),
    "d_mu8_p50": Arm(denoise.measure, "mu8", {"masked": 0.5}),
    "d_bound": Arm(denoise.measure, "bound"),
    "d_bounds": Arm(denoise.measure, "bounds"),
}


def measure(
    arm: str,
    seed: int,
    threads: int,
    cache: Path,
    /,
    sizes: dict[str, dict] = SMALL,
    **more: Any,
) -> dict:
    """One arm with one seed, at the sizes of SMALL."""
    of = ARMS[arm]
    found = of.measure(of.name, seed, threads, cache, sizes=sizes, **of.numbers | more)
    seconds = found["seconds"]
    seconds = sum(seconds.values()) if isinstance(seconds, dict) else seconds
    return found | {"arm": arm, "seed": seed, "seconds": round(seconds, 1)}


# ---- claims: what is compared, and the rule -----------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """effect(arm's findings, ...) is one number a seed; `least` is the smallest that would matter.

    The rules, on the 95 % interval of the effects:
    above      reproduced if it lies above 0, unless all of it lies below `least`; then, and if it
               lies below 0, not reproduced
    at least   reproduced if it lies above `least`, not reproduced if it lies below
    no worse   the same with -`least`
    equal      reproduced if it lies within +-`least`, not reproduced if outside
    Everything else is undecided.

    A claim is judged by runs of its own at the sizes of SMALL, or, with laptop_runs, by those that
    another experiment has made at laptop size; the arms of denoise.py have the prefix `d_` here.
    C4, C7.2, C7.8, P8 and P9 went there after small runs had been seen: the methods of C4 and C7
    changed, and P8 was undecided. So did C2.4, C5.1c, C6.1 and C6.4, by a rule: what five small
    runs leave undecided is judged at laptop size, if its arms have run there, or has more seeds.
    """

    id: str
    paper: str
    claim: str
    paper_numbers: str
    metric: str
    arms: tuple[str, ...]
    effect: Callable[..., float]
    least: float = 0.02
    rule: str = "above"
    laptop_runs: bool = False

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


# ---- what effects are made of: findings of an arm -> a number ------------------------------------


def last(a: dict, key: str) -> float:
    """A number that ppo has logged: the mean of its last five updates."""
    return mean(u[key] for u in a["found"]["curve"][-5:])


def first(a: dict, key: str) -> float:
    """The mean of its first five."""
    return mean(u[key] for u in a["found"]["curve"][:5])


def rise(a: dict, key: str) -> float:
    """How much it has risen from these to those."""
    return last(a, key) - first(a, key)


def off_target(a: dict) -> float:
    """The distance of the KL from 1 nat at the end."""
    return abs(last(a, "kl") - KL_TARGET)


def greedy(a: dict, b: dict) -> float:
    """Greedy accuracy, one arm minus the other."""
    return a["found"]["greedy"] - b["found"]["greedy"]


def early(a: dict, b: dict) -> float:
    """What is right if the rest is written at once after 62 % of the passes, likewise."""
    return a["found"]["answer after"]["0.625"] - b["found"]["answer after"]["0.625"]


def after(n: int) -> Callable[[dict, dict], float]:
    """The same after round n."""
    return lambda a, b: a["rounds"][n]["greedy"] - b["rounds"][n]["greedy"]


def moved(key: str) -> Callable[[dict], float]:
    """How far a logged number has moved within the first round."""
    i = preferences.WATCHED.index(key)
    n = SMALL["iterative_dpo"]["updates"]
    return lambda a: mean(u[i] for u in a["logs"][n - 5 : n]) - mean(u[i] for u in a["logs"][:5])


def honest(a: dict, i: int) -> float:
    """Right answers with right steps only, after round i."""
    return a["rounds"][i]["right for the right reasons"]


def pairs_each(a: dict) -> float:
    """Pairs of round 1, of all its problems."""
    return a["rounds"][1]["pairs"] / a.get("problems", nr.SelfRewardingConfig.prompts)


def judged(a: dict, i: int, key: str = "pairwise") -> float:
    """A number of the judge after round i."""
    return a["rounds"][i]["judge"][key]


def in_order(a: dict, i: int) -> float:
    """The share of pairs in their true order by three judgements each, after round i."""
    return judged(a, i, "in order")["3"]


def steps(one: str, key: str, other: str) -> Callable[[dict], float]:
    """A number of one, ORM or SORM for example, minus that of another."""
    return lambda a: a["found"][one][key] - a["found"][other][key]


def pessimism(a: dict, head: str) -> float:
    """Right steps called wrong: where the student mostly fails, minus where not."""
    found = a["found"][head]
    return found["missed, V^pi below 1/2"] - found["missed, V^pi above 1/2"]


def mended(a: dict, key: str) -> float:
    """The share of wrong drafts that somebody mended."""
    return a["found"]["mended"][key]


def better_refiner(a: dict) -> float:
    """What the better one of the two refiners mends alone."""
    return max(mended(a, "global"), mended(a, "local"))


def precision(a: dict, name: str) -> float:
    """The precision of step labels."""
    return a["found"]["labels"][name]["precision"]


SEQ, SCALAR, LEVEL = inside.SEQ, inside.SCALAR, inside.LEVEL


def policy(reward: str, key: str, other: str) -> Callable[[dict], float]:
    """Two learned rewards; where the scalar one never reaches the other's KL, its end counts."""

    def of(a: dict, name: str) -> float:
        return a["found"].get(name, a["found"][SCALAR])[key]

    return lambda a: of(a, reward) - of(a, other)


def paid_by_rewriters(a: dict, b: dict) -> float:
    """Greedy accuracy of ppo paid by a rewriter, one arm minus the other."""
    return a["found"][SEQ]["greedy"] - b["found"][SEQ]["greedy"]


def lost(a: dict) -> float:
    """The greedy accuracy that is lost with two passes a block."""
    return a["found"]["greedy"] - a["found"]["greedy, passes a block"]["2"]


IRPO, GLORE, SRLM = "2404.19733", "2402.10963", "2401.10020"
S2S, SAPO, D1 = "2409.00162", "2510.01544", "2504.12216"
PPO = "PPO practice (1707.06347, 2402.14740, the N+ details)"
CLAIMS = [
    # PPO practice
    Claim(
        id="P1",
        paper=PPO,
        claim="clipping the value loss has little or no effect at small scale",
        paper_numbers="no numbers",
        metric="greedy, four passes a batch, lr 1e-4: with minus without",
        arms=("gentle", "gentle_no_clip"),
        effect=greedy,
        least=0.05,
        rule="equal",
    ),
    Claim(
        id="P2",
        paper=PPO,
        claim="whitening rewards helps with rewards that are not scaled",
        paper_numbers="no numbers",
        metric="greedy with rewards of 10: whitened minus not",
        arms=("tenfold_whitened", "tenfold"),
        effect=greedy,
    ),
    Claim(
        id="P3",
        paper=PPO,
        claim="without a KL penalty a learned reward rises while the truth falls",
        paper_numbers="no numbers",
        metric="the smaller of its rise and the truth's fall, first to last five updates",
        arms=("learned",),
        effect=lambda a: min(rise(a, "reward"), -rise(a, "truth")),
    ),
    Claim(
        id="P5",
        paper=PPO,
        claim="a KL penalty holds the truth up",
        paper_numbers="no numbers",
        metric="greedy: beta 0.5 minus 0",
        arms=("learned_kl", "learned"),
        effect=greedy,
    ),
    Claim(
        id="P6",
        paper=PPO,
        claim="an adaptive KL coefficient holds the KL near its target",
        paper_numbers="target 6 nats a response",
        metric="distance of the KL from 1 nat, last five updates: fixed beta minus adaptive",
        arms=("learned_fixed", "learned_target"),
        effect=lambda a, b: off_target(a) - off_target(b),
        least=0.1,
    ),
    Claim(
        id="P7",
        paper=PPO,
        claim="dividing by the group's deviation weights very easy and very hard prompts up",
        paper_numbers="algebra",
        metric="share of the advantages in groups with all but one alike: divided minus not",
        arms=("groups",),
        effect=lambda a: a["found"]["grpo"] - a["found"]["mean"],
    ),
    Claim(
        id="P8",
        paper=PPO,
        claim="RLOO is no worse than PPO with a critic",
        paper_numbers="2402.14740: RLOO ahead",
        metric="greedy: rloo minus gae",
        arms=("rloo", "gae"),
        effect=greedy,
        least=0.03,
        rule="no worse",
        laptop_runs=True,
    ),
    Claim(
        id="P9",
        paper=PPO,
        claim="RLOO and GRPO differ by little",
        paper_numbers="no numbers",
        metric="greedy: rloo minus grpo",
        arms=("rloo", "grpo"),
        effect=greedy,
        least=0.05,
        rule="equal",
        laptop_runs=True,
    ),
    Claim(
        id="P10",
        paper=PPO,
        claim="a smaller eps in Adam (1e-8, not 1e-5) moves the policy further at first",
        paper_numbers="no numbers",
        metric="KL over the first five updates: 1e-8 minus 1e-5",
        arms=("small_eps", "gae"),
        effect=lambda a, b: first(a, "kl") - first(b, "kl"),
        least=0.01,
    ),
    Claim(
        id="P11",
        paper=PPO,
        claim="a verifier's reward alone improves a base that knows the facts",
        paper_numbers="82.9 to 88.2 (GSM8K, GRPO)",
        metric="greedy: ppo minus base",
        arms=("gae",),
        effect=lambda a: a["found"]["greedy"] - a["found"]["base"],
    ),
    # w, why: one more experiment where a claim did not hold, registered after that and before its
    # own run, but for C5.3w, C5.4w and C7.1w, which read runs that were there
    Claim(
        id="P6w",
        paper=PPO,
        claim="P6: beta moved too slowly; with a horizon of 100 episodes it holds the KL",
        paper_numbers="ours",
        metric="distance of the KL from 1 nat, last five updates: fixed beta minus adaptive",
        arms=("learned_fixed", "learned_fast"),
        effect=lambda a, b: off_target(a) - off_target(b),
        least=0.1,
    ),
    Claim(
        id="P10w",
        paper=PPO,
        claim="P10: a larger one shows it better: 1e-5 moves it further than 1e-3",
        paper_numbers="ours",
        metric="KL over the first five updates: 1e-5 minus 1e-3",
        arms=("gae", "large_eps"),
        effect=lambda a, b: first(a, "kl") - first(b, "kl"),
        least=0.01,
    ),
    # iterative reasoning preference optimization
    Claim(
        id="C5.1",
        paper=IRPO,
        claim="DPO + NLL beats DPO on the same pairs",
        paper_numbers="73.1 against 61.8 (GSM8K)",
        metric="greedy after round 1",
        arms=("dpo_nll", "dpo"),
        effect=after(1),
    ),
    Claim(
        id="C5.1b",
        paper=IRPO,
        claim="SFT on the chosen is no worse than DPO alone",
        paper_numbers="65.2 against 61.8 (GSM8K)",
        metric="greedy after round 1: SFT minus DPO",
        arms=("sft", "dpo"),
        effect=after(1),
        least=0.03,
        rule="no worse",
    ),
    Claim(
        id="C5.1c",
        paper=IRPO,
        claim="where winners are often lucky DPO alone beats SFT",
        paper_numbers="82.8 against 79.8 (ARC)",
        metric="four answers, round 1: DPO minus SFT",
        arms=("lucky_dpo", "lucky_sft"),
        effect=after(1),
        laptop_runs=True,
    ),
    Claim(
        id="C5.2",
        paper=IRPO,
        claim="under DPO the log-prob of the chosen falls",
        paper_numbers="figs. 3, 4",
        metric="log-prob of the chosen, nats, within round 1: first minus last five updates",
        arms=("dpo",),
        effect=lambda a: -moved("chosen")(a),
        least=0.2,
    ),
    Claim(
        id="C5.2b",
        paper=IRPO,
        claim="with the NLL it rises",
        paper_numbers="figs. 3, 4",
        metric="log-prob of the chosen, nats: last minus first",
        arms=("dpo_nll",),
        effect=moved("chosen"),
        least=0.2,
    ),
    Claim(
        id="C5.3",
        paper=IRPO,
        claim="SFT on the chosen raises the rejected too",
        paper_numbers="fig. 2",
        metric="log-prob of the rejected, nats, within round 1: last minus first five updates",
        arms=("sft",),
        effect=moved("rejected"),
        least=0.2,
    ),
    Claim(
        id="C5.4",
        paper=IRPO,
        claim="two rounds beat one with twice the pairs",
        paper_numbers="78.0 against 74.8",
        metric="greedy",
        arms=("dpo_nll", "one_round"),
        effect=lambda a, b: a["rounds"][2]["greedy"] - b["rounds"][1]["greedy"],
    ),
    Claim(
        id="C5.4b",
        paper=IRPO,
        claim="SFT gains little from twice the data",
        paper_numbers="65.2 to 66.9",
        metric="greedy after one round: twice the data minus once",
        arms=("sft_one_round", "sft"),
        effect=after(1),
        least=0.05,
        rule="equal",
    ),
    Claim(
        id="C5.5",
        paper=IRPO,
        claim="gains shrink from round to round",
        paper_numbers="17.5, 4.9, 3.1, 0.5",
        metric="gain of round 1 minus gain of round 2",
        arms=("dpo_nll",),
        effect=lambda a: (
            2 * a["rounds"][1]["greedy"] - a["rounds"][0]["greedy"] - a["rounds"][2]["greedy"]
        ),
    ),
    Claim(
        id="C5.7",
        paper=IRPO,
        claim="it works although some winners have wrong reasoning",
        paper_numbers="ARC, chance 25 %",
        metric="four answers: right with only right steps, after two rounds minus before",
        arms=("lucky_dpo_nll",),
        effect=lambda a: honest(a, 2) - honest(a, 0),
    ),
    Claim(
        id="C5.7b",
        paper=IRPO,
        claim="and then the rejected side is needed",
        paper_numbers="84.8 against 79.8 (ARC, round 1)",
        metric="four answers, round 1: DPO + NLL minus SFT",
        arms=("lucky_dpo_nll", "lucky_sft"),
        effect=after(1),
    ),
    Claim(
        id="C5.3w",
        paper=IRPO,
        claim=(
            "C5.3: rejected responses fall as they look unlike the chosen; less so with four "
            "answers"
        ),
        paper_numbers="ours",
        metric=(
            "log-prob of the rejected under SFT, nats, round 1, last minus first: four answers "
            "minus hundred"
        ),
        arms=("lucky_sft", "sft"),
        effect=lambda a, b: moved("rejected")(a) - moved("rejected")(b),
        least=0.2,
    ),
    Claim(
        id="C5.4w",
        paper=IRPO,
        claim="C5.4b: twice the data give SFT less than a second round gives DPO + NLL",
        paper_numbers="1.7 against 4.9 points",
        metric="greedy: round 2 minus round 1, minus twice the data minus once",
        arms=("dpo_nll", "sft_one_round", "sft"),
        effect=lambda a, b, c: a["rounds"][2]["greedy"] - a["rounds"][1]["greedy"] - after(1)(b, c),
    ),
    # GLoRe
    Claim(
        id="C4.1",
        paper=GLORE,
        claim="the SORM judges steps better than the ORM",
        paper_numbers="81 against 73 %",
        metric="step accuracy",
        arms=("refine",),
        effect=steps("SORM", "step accuracy", "ORM"),
        laptop_runs=True,
    ),
    Claim(
        id="C4.1b",
        paper=GLORE,
        claim="the ORM judges whole responses better than the SORM",
        paper_numbers="about 5 points",
        metric="accuracy on whole responses: ORM minus SORM",
        arms=("refine",),
        effect=steps("ORM", "final accuracy", "SORM"),
        laptop_runs=True,
    ),
    Claim(
        id="C4.1c",
        paper=GLORE,
        claim="the SORM finds the first error more often",
        paper_numbers="no numbers",
        metric="first error of wrong drafts",
        arms=("refine",),
        effect=steps("SORM", "first error", "ORM"),
        laptop_runs=True,
    ),
    Claim(
        id="C4.1d",
        paper=GLORE,
        claim="the ORM ranks whole responses better",
        paper_numbers="no numbers",
        metric="area under the curve: ORM minus SORM",
        arms=("refine",),
        effect=steps("ORM", "final auc", "SORM"),
        laptop_runs=True,
    ),
    Claim(
        id="C4.2",
        paper=GLORE,
        claim="the ORM is pessimistic where the student is weak, the SORM is not",
        paper_numbers="qualitative",
        metric=(
            "right steps called wrong, where the student mostly fails minus where not: ORM minus "
            "SORM"
        ),
        arms=("refine",),
        effect=lambda a: pessimism(a, "ORM") - pessimism(a, "SORM"),
        laptop_runs=True,
    ),
    Claim(
        id="C4.3",
        paper=GLORE,
        claim="global and local refinement mend partly different drafts",
        paper_numbers="qualitative",
        metric="mended by either minus by the better one",
        arms=("refine",),
        effect=lambda a: mended(a, "either") - better_refiner(a),
        least=0.05,
        rule="at least",
        laptop_runs=True,
    ),
    Claim(
        id="C4.3b",
        paper=GLORE,
        claim="with the ORM choosing, both mend more than each",
        paper_numbers="41 against 28 and 28 %",
        metric="mended: chosen minus the better one",
        arms=("refine",),
        effect=lambda a: mended(a, "chosen") - better_refiner(a),
        laptop_runs=True,
    ),
    Claim(
        id="C4.3c",
        paper=GLORE,
        claim="refinement with the ORM beats the best of three",
        paper_numbers="65 against 58",
        metric="greedy",
        arms=("refine",),
        effect=lambda a: a["found"]["global + local + ORM"] - a["found"]["best of 3"],
        laptop_runs=True,
    ),
    Claim(
        id="C4.3d",
        paper=GLORE,
        claim="the best of three beats greedy",
        paper_numbers="58 against 53",
        metric="greedy",
        arms=("refine",),
        effect=lambda a: a["found"]["best of 3"] - a["found"]["greedy"],
        laptop_runs=True,
    ),
    Claim(
        id="C4.4",
        paper=GLORE,
        claim="refining every draft breaks right ones",
        paper_numbers="qualitative",
        metric="right drafts broken, global",
        arms=("refine",),
        effect=lambda a: a["found"]["broken"]["global"],
        least=0.02,
        rule="at least",
        laptop_runs=True,
    ),
    Claim(
        id="C4.4b",
        paper=GLORE,
        claim="the ORM's choice repairs that",
        paper_numbers="qualitative",
        metric="broken: global minus chosen",
        arms=("refine",),
        effect=lambda a: a["found"]["broken"]["global"] - a["found"]["broken"]["chosen"],
        laptop_runs=True,
    ),
    Claim(
        id="C4.5",
        paper=GLORE,
        claim="without balancing the score follows the position",
        paper_numbers="ours, not the paper's",
        metric="correlation of score and position: balanced minus not",
        arms=("refine",),
        effect=steps("balanced", "correlation with position", "not balanced"),
        least=0.05,
        laptop_runs=True,
    ),
    Claim(
        id="C4.5b",
        paper=GLORE,
        claim="without the consistency check more bad steps are called good",
        paper_numbers="ours, not the paper's",
        metric="precision of labels, K = 8: with minus without",
        arms=("refine",),
        effect=lambda a: precision(a, "K = 8") - precision(a, "no consistency"),
        least=0.01,
        laptop_runs=True,
    ),
    Claim(
        id="C4.6",
        paper=GLORE,
        claim="a refiner told the true place mends more than with the SORM's",
        paper_numbers="ours, not the paper's",
        metric="mended: by the truth minus by SORM",
        arms=("refine",),
        effect=lambda a: mended(a, "local, place by the truth") - mended(a, "local, place by SORM"),
        laptop_runs=True,
    ),
    Claim(
        id="C4.6b",
        paper=GLORE,
        claim="the SORM's place is better than a random one",
        paper_numbers="ours, not the paper's",
        metric="mended: by SORM minus by chance",
        arms=("refine",),
        effect=lambda a: mended(a, "local, place by SORM") - mended(a, "local, place by chance"),
        laptop_runs=True,
    ),
    Claim(
        id="C4.6c",
        paper=GLORE,
        claim="and than the ORM's",
        paper_numbers="ours, not the paper's",
        metric="mended: by SORM minus by ORM",
        arms=("refine",),
        effect=lambda a: mended(a, "local, place by SORM") - mended(a, "local, place by ORM"),
        laptop_runs=True,
    ),
    Claim(
        id="C4.7",
        paper=GLORE,
        claim="many continuations call bad steps good",
        paper_numbers="ours; the paper has 8",
        metric="precision of labels: K = 1 minus 16",
        arms=("refine",),
        effect=lambda a: precision(a, "K = 1") - precision(a, "K = 16"),
        least=0.01,
        laptop_runs=True,
    ),
    Claim(
        id="C4.8",
        paper=GLORE,
        claim="a refiner does better than a solver that learns its traces and sees no draft",
        paper_numbers="ours; no such control in the paper",
        metric="greedy: global refiner minus solver",
        arms=("refine",),
        effect=lambda a: a["found"]["global alone"] - a["found"]["control"],
        laptop_runs=True,
    ),
    Claim(
        id="C4.9",
        paper=GLORE,
        claim="a score needs the log-probs of what it reads, hidden vectors are not enough",
        paper_numbers="ours, after 2412.01981",
        metric="area under the curve of the ORM, whole responses: with minus without",
        arms=("refine", "hidden"),
        effect=lambda a, b: a["found"]["ORM"]["final auc"] - b["found"]["ORM"]["final auc"],
        laptop_runs=True,
    ),
    # sequence-to-sequence reward
    Claim(
        id="C6.1",
        paper=S2S,
        claim="ppo with the seq2seq reward beats ppo with a scalar model at the same KL",
        paper_numbers="76.9 % wins on average",
        metric="greedy, labeller without a weakness",
        arms=("none",),
        effect=policy(SEQ, "greedy", LEVEL),
        laptop_runs=True,
    ),
    Claim(
        id="C6.1b",
        paper=S2S,
        claim="and more so where the preferences mislead",
        paper_numbers="abstract",
        metric=(
            "that difference: labeller who falls for round answers minus labeller without a "
            "weakness"
        ),
        arms=("round", "none"),
        effect=lambda a, b: policy(SEQ, "greedy", LEVEL)(a) - policy(SEQ, "greedy", LEVEL)(b),
    ),
    Claim(
        id="C6.2",
        paper=S2S,
        claim="less bias to long responses",
        paper_numbers="abstract",
        metric="tokens, long ones liked: scalar minus seq2seq",
        arms=("long",),
        effect=policy(LEVEL, "length", SEQ),
        least=0.5,
    ),
    Claim(
        id="C6.3",
        paper=S2S,
        claim="fewer harmless problems refused",
        paper_numbers="abstract",
        metric="refused: scalar minus seq2seq",
        arms=("refusal",),
        effect=policy(LEVEL, "refused", SEQ),
    ),
    Claim(
        id="C6.4",
        paper=S2S,
        claim="smaller losses on new kinds of prompts",
        paper_numbers="abstract",
        metric=(
            "right on chains of three, trained on one and two, minus right on these: seq2seq minus "
            "scalar"
        ),
        arms=("short",),
        effect=lambda a: policy(SEQ, "longer chains", LEVEL)(a) - policy(SEQ, "greedy", LEVEL)(a),
        laptop_runs=True,
    ),
    Claim(
        id="C6.5",
        paper=S2S,
        claim="a rewriter of identities only misses errors",
        paper_numbers="ours, not the paper's",
        metric="injected errors found: both minus identity only",
        arms=("round",),
        effect=steps("argmax", "recall", "identity only"),
    ),
    Claim(
        id="C6.5b",
        paper=S2S,
        claim="a rewriter of corrections only mends what is right",
        paper_numbers="ours, not the paper's",
        metric="right responses untouched: both minus corrections only",
        arms=("round",),
        effect=steps("argmax", "clean untouched", "correction only"),
    ),
    Claim(
        id="C6.6",
        paper=S2S,
        claim="its token scores find the error better than a scalar model's",
        paper_numbers="ours, not the paper's",
        metric="the first negative token is the error, minus: the scalar score's largest fall is",
        arms=("round",),
        effect=steps("argmax", "first", "scalar, largest fall"),
    ),
    Claim(
        id="C6.7",
        paper=S2S,
        claim="positive and negative scores together beat positive ones",
        paper_numbers="ours, not the paper's",
        metric="greedy (the reward's size changes too)",
        arms=("none", "positive_only"),
        effect=paid_by_rewriters,
    ),
    Claim(
        id="C6.7b",
        paper=S2S,
        claim="and negative ones",
        paper_numbers="ours, not the paper's",
        metric="greedy (the reward's size changes too)",
        arms=("none", "negative_only"),
        effect=paid_by_rewriters,
    ),
    Claim(
        id="C6.7w",
        paper=S2S,
        claim="C6.7: they do where the preferences mislead",
        paper_numbers="ours",
        metric="greedy, labeller who falls for round answers",
        arms=("round", "round_positive_only"),
        effect=paid_by_rewriters,
    ),
    # self-rewarding; with DPO + NLL (alpha 5) but for C7.1c
    Claim(
        id="C7.1",
        paper=SRLM,
        claim="M2 wins against M1",
        paper_numbers="55.5 to 11.7",
        metric="wins minus 1/2, DPO + NLL",
        arms=("plain",),
        effect=lambda a: a["rounds"][1]["over M1"]["win"] - 0.5,
    ),
    Claim(
        id="C7.1b",
        paper=SRLM,
        claim="M3 wins against M2",
        paper_numbers="47.7 to 12.5",
        metric="wins minus 1/2, DPO + NLL",
        arms=("plain",),
        effect=lambda a: a["rounds"][2]["over the last"]["win"] - 0.5,
    ),
    Claim(
        id="C7.1c",
        paper=SRLM,
        claim="and with DPO alone, the paper's loss",
        paper_numbers="47.7 to 12.5",
        metric="wins of M3 over M2 minus 1/2, DPO",
        arms=("own_dpo",),
        effect=lambda a: a["rounds"][2]["over the last"]["win"] - 0.5,
    ),
    Claim(
        id="C7.1w",
        paper=SRLM,
        claim="C7.1c: it is the NLL that keeps self-rewarding from losing accuracy",
        paper_numbers="ours",
        metric="greedy of M3: DPO + NLL minus DPO",
        arms=("plain", "own_dpo"),
        effect=after(2),
    ),
    Claim(
        id="C7.2",
        paper=SRLM,
        claim="the judge gets better without judge data",
        paper_numbers="78.7, 80.4, 81.7 %",
        metric="pairs in order: M3 minus M1",
        arms=("plain",),
        effect=lambda a: in_order(a, 2) - in_order(a, 0),
        laptop_runs=True,
    ),
    Claim(
        id="C7.2w",
        paper=SRLM,
        claim="C7.2: with pairs of its own judgements it does",
        paper_numbers="ours, after 2411.04109",
        metric="pairs in order: M3 minus M1",
        arms=("self_rewarding",),
        effect=lambda a: in_order(a, 2) - in_order(a, 0),
        laptop_runs=True,
    ),
    Claim(
        id="C7.2x",
        paper=SRLM,
        claim="and it is the agreement that teaches, not the practice",
        paper_numbers="ours",
        metric="pairs in order, M3: pairs by agreement minus pairs by a coin",
        arms=("self_rewarding", "any_judgements"),
        effect=lambda a, b: in_order(a, 2) - in_order(b, 2),
        laptop_runs=True,
    ),
    Claim(
        id="C7.3",
        paper=SRLM,
        claim="seed data for judging multiplies the pairs",
        paper_numbers="541 against 3,964",
        metric="pairs of round 1, of all problems: with minus without",
        arms=("plain", "never_judging"),
        effect=lambda a, b: pairs_each(a) - pairs_each(b),
    ),
    Claim(
        id="C7.3b",
        paper=SRLM,
        claim="and does not hurt solving",
        paper_numbers="30.5 to 30.9",
        metric="greedy of M1, the same solving data: with minus without",
        arms=("plain", "never_judging"),
        effect=after(0),
        least=0.03,
        rule="no worse",
    ),
    Claim(
        id="C7.4",
        paper=SRLM,
        claim="a judge that gives points with reasons is better than one that makes one choice",
        paper_numbers="65.1 against 26.6 %",
        metric="pairs in order, M1: steps checked before the score minus the score at once",
        arms=("plain", "one_choice"),
        effect=lambda a, b: in_order(a, 0) - in_order(b, 0),
    ),
    Claim(
        id="C7.5",
        paper=SRLM,
        claim="pairs beat SFT on the best",
        paper_numbers="30 against 29: no gain by SFT",
        metric="greedy of M3",
        arms=("plain", "top_sft"),
        effect=after(2),
    ),
    Claim(
        id="C7.6",
        paper=SRLM,
        claim="responses grow longer",
        paper_numbers="1092, 1552, 2552",
        metric="tokens, greedy, test: M3 minus M1",
        arms=("plain",),
        effect=lambda a: a["rounds"][2]["tokens"] - a["rounds"][0]["tokens"],
        least=0.25,
    ),
    Claim(
        id="C7.7",
        paper=SRLM,
        claim="three judgements order pairs better than one",
        paper_numbers="three are averaged, no ablation",
        metric="pairs in order, M1: 3 minus 1",
        arms=("plain", "one_judgement"),
        effect=lambda a, b: judged(a, 0) - judged(b, 0),
    ),
    Claim(
        id="C7.7b",
        paper=SRLM,
        claim="and tie less often",
        paper_numbers="three are averaged, no ablation",
        metric="problems with one score for all, M1: 1 minus 3",
        arms=("plain", "one_judgement"),
        effect=lambda a, b: judged(b, 0, "tied") - judged(a, 0, "tied"),
    ),
    Claim(
        id="C7.8",
        paper=SRLM,
        claim="a judge that learns along teaches more than a frozen one",
        paper_numbers="ours, not the paper's",
        metric="greedy of M3",
        arms=("plain", "plain_frozen"),
        effect=after(2),
        laptop_runs=True,
    ),
    Claim(
        id="C7.8w",
        paper=SRLM,
        claim="C7.8: with pairs of judgements it does",
        paper_numbers="ours",
        metric="greedy of M3",
        arms=("self_rewarding", "frozen_judge"),
        effect=after(2),
        laptop_runs=True,
    ),
    # denoising process reward, and its baseline
    Claim(
        id="C3.0",
        paper=SAPO,
        claim="a prover that is the policy itself adds nothing but noise",
        paper_numbers="a theorem of 2410.08146, without the indicator",
        metric="greedy",
        arms=("d_canvas", "d_outcome"),
        effect=greedy,
        least=0.03,
        rule="equal",
        laptop_runs=True,
    ),
    Claim(
        id="C3.1",
        paper=SAPO,
        claim="the process reward beats the outcome alone at equal updates: arithmetic",
        paper_numbers="82.1 against 81.9 (GSM8K, best of lengths)",
        metric="greedy",
        arms=("d_tail", "d_outcome"),
        effect=greedy,
        laptop_runs=True,
    ),
    Claim(
        id="C3.1b",
        paper=SAPO,
        claim="the process reward beats the outcome alone at equal updates: a planning task",
        paper_numbers="Sudoku 22.4 against 18.4, Countdown 56.3 against 37.1",
        metric="greedy, countdown",
        arms=("d_countdown_tail", "d_countdown_outcome"),
        effect=greedy,
        laptop_runs=True,
    ),
    Claim(
        id="C3.1c",
        paper=SAPO,
        claim="and at equal samples: arithmetic",
        paper_numbers="not reported",
        metric="greedy",
        arms=("d_tail", "d_outcome_more"),
        effect=greedy,
        laptop_runs=True,
    ),
    Claim(
        id="C3.1f",
        paper=SAPO,
        claim="what the prover tells beats the same weight without it",
        paper_numbers="no such control",
        metric="greedy: (7) minus (7) with V shuffled",
        arms=("d_tail", "d_tail_shuffled"),
        effect=greedy,
        laptop_runs=True,
    ),
    Claim(
        id="C3.1w",
        paper=SAPO,
        claim="a weak prover should be compared with its own start, not with the policy",
        paper_numbers="ours, after 2410.08146",
        metric="greedy: V - V(empty canvas) minus V - accuracy",
        arms=("d_own_tail", "d_tail"),
        effect=greedy,
        laptop_runs=True,
    ),
    Claim(
        id="C3.1x",
        paper=SAPO,
        claim="and then beats the outcome alone",
        paper_numbers="ours, after 2410.08146",
        metric="greedy",
        arms=("d_own_tail", "d_outcome"),
        effect=greedy,
        laptop_runs=True,
    ),
    Claim(
        id="C3.2",
        paper=SAPO,
        claim="the answer half way is better",
        paper_numbers="Countdown, 32 of 64 steps: 27.3 against 6.6",
        metric="right at once after 62 % of the passes, countdown",
        arms=("d_countdown_tail", "d_countdown_outcome"),
        effect=early,
        laptop_runs=True,
    ),
    Claim(
        id="C3.3",
        paper=SAPO,
        claim="fewer sampling steps cost less",
        paper_numbers="Table 3, not seen",
        metric="lost with two passes a block for three, countdown: outcome minus process",
        arms=("d_countdown_outcome", "d_countdown_tail"),
        effect=lambda a, b: lost(a) - lost(b),
        laptop_runs=True,
    ),
    Claim(
        id="C3.4",
        paper=SAPO,
        claim="more branches help",
        paper_numbers="N = 1, 3, 6, 9: about 47, 52, 57, 51 (Countdown)",
        metric="greedy: N = 9 minus 1",
        arms=("d_n9", "d_n1"),
        effect=greedy,
        laptop_runs=True,
    ),
    Claim(
        id="C3.5",
        paper=SAPO,
        claim="the indicator is needed",
        paper_numbers="Countdown 51.6, 52.0, 56.3 against 41.0, 41.4, 50.4",
        metric="greedy, the same canvas: with minus without",
        arms=("d_canvas", "d_no_indicator"),
        effect=greedy,
        laptop_runs=True,
    ),
    Claim(
        id="C3.6",
        paper=SAPO,
        claim="credit for each stretch beats credit for all tokens",
        paper_numbers="ours, not the paper's",
        metric="greedy, the same canvas",
        arms=("d_segments", "d_canvas"),
        effect=greedy,
        laptop_runs=True,
    ),
    Claim(
        id="C3.8",
        paper=SAPO,
        claim="right answers have right steps more often",
        paper_numbers="Countdown 56.8 against 51.2 (judged)",
        metric="right answers whose steps hold a right way, countdown: process minus outcome",
        arms=("d_countdown_tail", "d_countdown_outcome"),
        effect=lambda a, b: (
            a["found"]["right answers with right steps"]
            - b["found"]["right answers with right steps"]
        ),
        laptop_runs=True,
    ),
    Claim(
        id="C2.1",
        paper=D1,
        claim="hiding prompt tokens at random allows many passes over a batch",
        paper_numbers="mu = 12",
        metric="greedy with eight passes: 15 % hidden minus none",
        arms=("d_mu8_p15", "d_mu8"),
        effect=greedy,
    ),
    Claim(
        id="C2.1b",
        paper=D1,
        claim="hiding half of them is too much",
        paper_numbers="0.1 to 0.3 best, 0.5 unstable",
        metric="greedy with eight passes: 15 % minus 50 % hidden",
        arms=("d_mu8_p15", "d_mu8_p50"),
        effect=greedy,
    ),
    Claim(
        id="C2.2",
        paper="2510.09541",
        claim="a lower bound must not stand for the likelihood of wrong answers",
        paper_numbers="Countdown + 18.4, Sudoku + 27.0 by the whole method",
        metric="greedy: an upper bound for wrong answers minus the lower one for all",
        arms=("d_bounds", "d_bound"),
        effect=greedy,
    ),
    Claim(
        id="C2.4",
        paper="2506.20639",
        claim="a coupled estimate of the likelihood trains better than the mean field",
        paper_numbers="EvalPlus + 4.4 % by the whole method",
        metric="greedy",
        arms=("d_coupled", "d_mean_field"),
        effect=greedy,
        laptop_runs=True,
    ),
    Claim(
        id="C2.5",
        paper=D1,
        claim="log-probs on the sampler's own canvases train better than the mean field",
        paper_numbers="ours; the paper has the mean field",
        metric="greedy",
        arms=("d_outcome", "d_mean_field"),
        effect=greedy,
        laptop_runs=True,
    ),
    Claim(
        id="C2.3",
        paper="2505.19223",
        claim="sharing masks between policy and reference lowers the margin's variance",
        paper_numbers="a theorem",
        metric="1 - deviation with shared masks over that with own ones",
        arms=("groups",),
        effect=lambda a: 1 - a["found"]["shared masks"] / a["found"]["own masks"],
    ),
]

# Why a claim does not hold here, or cannot be decided, and the experiment that says so: a claim
# whose id ends in w, or the same metric at laptop size (a column of the table).
WHY: dict[str, str] = {
    "P6": (
        "Closer to the target in seven seeds of twenty, further in the others: the KL starts at 0, "
        "so beta falls first, and has no time to come back within 20 updates. P6w takes a faster "
        "controller."
    ),
    "P6w": (
        "Further from the target in every seed of ten, by 0.6 to 11 nats: beta halves in each "
        "update until the KL has passed its target, and is then too small to hold it. The "
        "controller was made for runs of thousands of updates; a fixed beta is the better choice "
        "for 20."
    ),
    "C5.3": (
        "In the paper both sides are long texts that differ late; here a wrong response often "
        "shows its habit in the first tokens, and loses what the chosen gain. C5.3w: where the "
        "sides are more alike it loses less."
    ),
    "C4.1b": (
        "No difference: both have read the same drafts, and of a whole response they have the "
        "same label."
    ),
    "C4.1d": "As C4.1b.",
    "C4.5b": (
        "The student never ignores a result that it has written, so the check rejects nothing."
    ),
    "C4.8": (
        "On average the opposite: in a chain this short the problem says all, and reading a draft"
        " is one more thing to learn."
    ),
    "C6.1": (
        "At neither size: a labeller without a weakness leaves the scalar model nothing wrong to "
        "learn. C6.1b asks about one with a weakness."
    ),
    "C6.4": (
        "At neither size: the base knows chains of three already, so they are new to the rewards "
        "only."
    ),
    "C6.7": (
        "No difference: the positive scores end at the first disagreement and so say nearly all. "
        "Without them (C6.7b) much is lost. C6.7w asks about preferences that mislead."
    ),
    "C6.7w": "As C6.7: they end there too.",
    "C7.1c": (
        "DPO alone pushes the chosen down too (C5.2). C7.1w: with the NLL the same rounds end far"
        " higher."
    ),
    "C7.2": (
        "Rounds pay for solutions, not for judgements, and the seed data of judging is all there "
        "is. C7.2w pairs judgements too."
    ),
    "C7.8": "No difference: a judge that does not get better (C7.2) may as well be frozen.",
    "C7.8w": (
        "No difference: M1 with eight judgements is about as good a judge as M2, and M2, whose "
        "judgements agree more often, finds fewer pairs."
    ),
    "C3.1": (
        "(6) compares a weak prover with the policy's own accuracy: D is -0.39 for right answers "
        "whose advantage is 0.35, and nothing is left of it. C3.1f asks whether what the prover "
        "tells makes up for some of that, C3.1w measures it by its own start."
    ),
    "C3.1b": (
        "Below in every seed of eight, by 0.6 to 20 points. Who is paid more for right answers "
        "learns to write the expression alone: two seeds end with 8 tokens where the outcome alone "
        "has 22 and 41."
    ),
    "C3.1c": "As C3.1; twice the updates of the outcome alone gain five points besides.",
    "C3.1f": (
        "In the first five seeds it ends below its twin, by 0.4 to 52 points, in four of the next "
        "five above it, once by 57: both break down now and then. What is told does not mend the "
        "harm of the weight."
    ),
    "C3.1x": "No difference: without the harm there is no gain either.",
    "C3.2": (
        "On average 3 points, nearly all from a seed that writes the expression alone; in two of "
        "eight it is below."
    ),
    "C3.3": "On average the opposite; seeds differ by 32 points.",
    "C3.4": (
        "Nine tries are no better than one: 1 point worse on average, by the seed between 12 worse "
        "and 10 better."
    ),
    "C3.6": "The same on average and noisier: each token is paid by the noise of its own stretch.",
    "C3.8": "On average the opposite: who writes the expression alone has no steps.",
    "C2.1": (
        "A prompt has ten tokens here, so hiding 15 % hides a digit and asks another problem; and "
        "without it eight passes are no better than two."
    ),
    "C2.2": "By the seed between 6 points worse and 19 better.",
    "C2.4": (
        "Better in nine seeds of ten, by 1 to 15 points, and in one 14 points worse; small runs "
        "are as unclear. C2.5 gains more by another estimate."
    ),
}


# Of each paper the sentence that it is known for: the id of its claim, and what goes with it.
HEADLINES: dict[str, tuple[str, str]] = {
    "PPO, GRPO and RLOO, 1707.06347, 2402.03300, 2402.14740": (
        "P11",
        "The three arms cannot be told apart here (P8, P9).",
    ),
    "Iterative reasoning preference optimization, 2404.19733": (
        "C5.1",
        "SFT on the chosen alone ends as high ([rounds](#preference-rounds)); the rejected side is "
        "needed where right answers are often lucky (C5.7b).",
    ),
    "GLoRe, 2402.10963": (
        "C4.3c",
        "It takes scores that read log-probs (C4.9). That reading a draft helps does not show: a "
        "solver that sees none does better (C4.8).",
    ),
    "Sequence-to-sequence reward modelling, 2409.00162": (
        "C6.1",
        "A labeller without a weakness leaves a scalar model nothing wrong to learn. With one the "
        "rewriter refuses less, stays shorter and is right more often (C6.1b to C6.3).",
    ),
    "Self-rewarding language models, 2401.10020": (
        "C7.1",
        "With the NLL; by DPO alone, as in the paper, M3 loses to M2 (C7.1c). The judge gets "
        "better only if its judgements are paired too (C7.2, C7.2w).",
    ),
    "Diffu-GRPO (d1), 2504.12216": (
        "C2.1",
        "A prompt of ten tokens has none to spare. What its likelihood leaves out matters more: "
        "log-probs on the sampler's own canvases gain far more (C2.5).",
    ),
    "Denoising process reward (SAPO), 2510.01544": (
        "C3.1b",
        "(6) compares a weak prover with the policy. By its own start it is measured rightly, and "
        "then, on arithmetic, it does no harm and no good (C3.1w, C3.1x). Notebook 5 has a task "
        "where a process reward must win, and does.",
    ),
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
    half = front.half_width(values)
    low = mean(values) - half
    high = mean(values) + half
    return {
        "effect": round(mean(values), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "seeds": list(told),
        "by_seed": [round(x, 4) for x in values],
        "verdict": claim.verdict(low, high),
    }


def why(claim: Claim, verdict: str) -> str:
    """What is said of a claim that does not hold, or not yet."""
    return "" if verdict == "reproduced" else WHY.get(claim.id, "")


def judge(claim: Claim, found: dict[str, dict[int, dict]]) -> dict | None:
    """A line of claims.json; None while fewer than three seeds have all arms."""
    said = weigh(claim, effects(claim, found))
    if not said:
        return None
    runs = [found[arm][seed] for arm in claim.arms for seed in said["seeds"]]
    seeds = " ".join(str(seed) for seed in said["seeds"])
    threads = runs[0]["threads"]
    if "command" in runs[0]:  # the tour says it whole
        command = "; ".join(dict.fromkeys(run["command"] for run in runs))
    else:
        script = f"notebooks/claims.py {claim.id}"
        if claim.laptop_runs:
            script = " ".join([runs[0]["script"], *(arm.removeprefix("d_") for arm in claim.arms)])
        command = f"python {script} --seeds {seeds} --threads {threads}"
    return {
        "id": claim.id,
        "paper": claim.paper,
        "claim": claim.claim,
        "paper_numbers": claim.paper_numbers,
        "metric": claim.metric,
        "rule": RULES[claim.rule].format(claim.least),
        **said,
        "why": why(claim, said["verdict"]),
        "command": command,
        "commit": " ".join(sorted({run["commit"] for run in runs})),
        "machine": runs[0]["machine"],
        "torch": runs[0]["torch"],
    }


def read_result(name: str) -> dict:
    """A file of notebooks/results."""
    return json.loads((OUT.parent / f"{name}.json").read_text())


def at_laptop_size() -> dict[str, dict[int, dict]]:
    """The arms that the other experiments have run at `--config laptop`: a look at scale."""
    found: dict[str, dict[int, dict]] = {}
    # The tour's ppo has the arm gae.
    for name, file in (("gae", "tour"), ("grpo", "ppo_grpo"), ("rloo", "ppo_rloo")):
        kept = read_result(file)
        common = {key: kept[key] for key in ("threads", "machine", "torch", "commit", "command")}
        found[name] = {}
        for result in kept["results"]:
            if result["loop"] == "ppo":
                both = {"greedy": result["final"], "base": result["base"]}
                found[name][result["seed"]] = common | {"found": both}
    for part, prefix in (("preferences", ""), ("inside", ""), ("denoise", "d_")):
        for arm, kept in read_result(part).items():
            common = {key: kept[key] for key in ("threads", "machine", "torch")}
            common["script"] = kept["command"].split()[1]
            jobs = kept["seeds"] + kept.get("more seeds", [])
            found[prefix + arm] = {job["seed"]: common | job for job in jobs}
    return found


def collect() -> list[dict]:
    """All jobs -> OUT; a claim whose arms are not there keeps its line."""
    found: dict[str, dict[int, dict]] = {}
    for path in sorted(JOBS.glob("*.json")):
        job = json.loads(path.read_text())
        found.setdefault(job["arm"], {})[job["seed"]] = job
    before = {line["id"]: line for line in json.loads(OUT.read_text())} if OUT.exists() else {}
    lines = []
    large = at_laptop_size()
    for claim in CLAIMS:
        line = judge(claim, large if claim.laptop_runs else found)
        if line is None and claim.id in before:
            line = before[claim.id]
            line["why"] = why(claim, line["verdict"])
        if line:
            try:
                again = None if claim.laptop_runs else weigh(claim, effects(claim, large))
            except KeyError:  # what was not kept there
                again = None
            line["laptop"] = again
            lines.append(line)
    front.write_text(OUT, "[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")
    return lines


def interval(x: dict | None) -> str:
    """An effect with its interval, if there is one."""
    return f"{x['effect']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" if x else ""


def table(lines: list[dict]) -> str:
    """All claims as Markdown, and why those do not hold that do not."""
    titles = ["id", "claim", "the paper", "here", "effect", "verdict", "at laptop size"]
    rows = head(*titles)
    for x in lines:
        cells = [x["id"], x["claim"], x["paper_numbers"], x["metric"]]
        cells += [interval(x), x["verdict"], interval(x["laptop"])]
        rows.append(row(*cells))
    counted = Counter(x["verdict"] for x in lines).most_common()
    summary = ", ".join(f"{n} {verdict}" for verdict, n in counted)
    whys = []
    for x in lines:
        if x["verdict"] != "reproduced":
            whys.append(f"- **{x['id']}**, {x['verdict']}. {x['why']}")
    return "\n".join([summary, *rows, "", *whys])


def headlines(lines: list[dict]) -> str:
    """What each paper is known for, and what it is here, as Markdown: a line for each."""
    known = {x["id"]: x for x in lines}
    rows = head("paper", "claim", "there", "here", "verdict", "what it takes")
    for paper, (claim, words) in HEADLINES.items():
        x = known[claim]
        here = f"{interval(x)} ({claim})"
        rows.append(row(paper, x["claim"], x["paper_numbers"], here, f"**{x['verdict']}**", words))
    return "\n".join(rows).strip()


def main() -> None:
    """Run what is not there yet, then judge all there is."""
    own = {claim.id: claim.arms for claim in CLAIMS if not claim.laptop_runs}
    run(__doc__, ARMS, JOBS, measure, own)
    lines = collect()
    print(headlines(lines))
    print(table(lines))


if __name__ == "__main__":
    main()
