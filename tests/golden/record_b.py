"""Record golden numbers from verl 0.9.1, torchtune 0.6.1 and trl 0.28.0 (torch 2.13.0, CPU).

    python -m venv envB
    envB/bin/pip install torch==2.13.0
    envB/bin/pip install transformers==4.57.6 trl==0.28.0 torchtune==0.6.1 torchao==0.11.0 \\
        ray tensordict hydra-core codetiming pandas pyarrow datasets orjson
    envB/bin/pip install --no-deps verl==0.9.1
    envB/bin/python tests/golden/record_b.py   # writes verl.json, torchtune.json and trl0.json

Everything is float64. Each claim in a note (variance, factor 1/2, clamp) is asserted numerically.
"""

from types import SimpleNamespace

import numpy as np
import torch
from golden_io import make, numbers, ragged, write
from torchtune import rlhf
from torchtune.rlhf.loss import DPOLoss, PPOLoss
from trl import DPOTrainer
from trl.trainer.dpo_trainer import FDivergenceType
from verl.trainer.ppo import core_algos as verl
from verl.utils.torch_functional import masked_whiten

LENGTHS, R = [6, 4, 1, 5], 6
MASK = ragged(LENGTHS, R)


def close(a, b, tolerance=1e-12):
    return bool((torch.as_tensor(a) - torch.as_tensor(b)).abs().max() < tolerance)


def whitened(x, shift=True, unbiased=True, mask=MASK):
    """The formula, on counted tokens only: which variance does a library use?"""
    values = x[mask.bool()]
    mean, var = values.mean(), values.var(unbiased=unbiased)
    return (x - mean) / (var + 1e-8).sqrt() + (0 if shift else mean)


def which_variance(x, out, shift=True):
    gaps = [
        ((whitened(x, shift, unbiased) - out) * MASK).abs().max().item()
        for unbiased in (True, False)
    ]
    assert gaps[0] < 1e-7 < 1e-3 < gaps[1]
    return (
        f"UNBIASED variance (gap to that formula {gaps[0]:.1e}, to the population variance "
        f"{gaps[1]:.1e}); + 1e-8 under the root, and denominators are count + 1e-8"
    )


def gae_data():
    """Rewards and values; zero behind the end of each row."""
    return numbers(1, 4, R, scale=0.5) * MASK, numbers(2, 4, R) * MASK


def verl_gae():
    reward, value = gae_data()
    value = value + numbers(3, 4, R) * (1 - MASK)  # junk behind the end must not matter
    out = []
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5)):
        adv, ret = verl.compute_gae_advantage_return(reward, value, MASK, gamma, lam)
        out.append(
            make(
                "verl",
                f"gae_{gamma}_{lam}",
                "compute_gae_advantage_return(token_level_rewards=reward, values=value, "
                "response_mask=mask, gamma, lam)",
                {"reward": reward, "value": value, "mask": MASK, "gamma": gamma, "lam": lam},
                {"returns": ret, "advantages": adv},
                [
                    "returns: unwhitened advantage + value; read where mask is 1 (behind the end "
                    "it is the junk value)",
                    "advantages are whitened: " + which_variance(ret - value, adv),
                ],
            )
        )
    return out


def verl_whiten():
    x = numbers(4, 4, R, scale=2, shift=1.5)
    got = masked_whiten(x, MASK, shift_mean=True)
    mean = got[MASK.bool()].mean().item()
    return [
        make(
            "verl",
            "masked_whiten_shift_True",
            "verl.utils.torch_functional.masked_whiten(x, mask, shift_mean=True)",
            {"x": x, "mask": MASK},
            {"whitened": got},
            [
                which_variance(x, got),
                f"mean over counted tokens {mean:.3g}: shift_mean=True removes the mean",
                "masked positions are transformed too, not zeroed",
            ],
        )
    ]


def policy_data():
    logp = numbers(5, 4, R, scale=0.8, shift=-2)
    old = (logp - numbers(6, 4, R, scale=0.3)).round(decimals=3)
    adv = numbers(7, 4, R)
    old[1, 2], adv[1, 2] = logp[1, 2] - 1.5, -1.2  # ratio 4.5, negative: the dual clip would act
    return logp, old.round(decimals=3), adv


def verl_policy():
    logp, old, adv = policy_data()
    ratio = (logp - old).exp()
    formula = torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    x = logp.clone().requires_grad_()
    loss, clipped, kl, low = verl.compute_policy_loss(
        old, x, adv, MASK, cliprange=0.2, clip_ratio_c=1e9, loss_agg_mode="token-mean"
    )
    loss.backward()
    assert close(loss, (formula * MASK).sum() / MASK.sum(), 1e-8)
    return [
        make(
            "verl",
            "policy_loss_token_mean",
            "compute_policy_loss(old_logp, logp, advantages, mask, cliprange=0.2, "
            "clip_ratio_c=1e+09, loss_agg_mode='token-mean')",
            {"logp": logp, "old_logp": old, "advantages": adv, "mask": MASK, "clip": 0.2},
            {
                "loss": loss,
                "grad_logp": x.grad,
                "clip_fraction": clipped,
                "approx_kl": kl,
                "dual_clip_fraction": low,
            },
            [
                "the dual clip is switched off",
                "log-ratio is clamped to +-20; approx_kl = masked mean of old - new",
                "clip_fraction counts tokens where clipping RAISES the loss; its denominator "
                "and that of approx_kl is count + 1e-8, the loss divides by the plain count",
            ],
        )
    ]


def verl_value():
    value = numbers(8, 4, R)
    old, ret = (value + numbers(9, 4, R, scale=0.3)).round(decimals=3), numbers(10, 4, R)
    x = value.clone().requires_grad_()
    loss, clipped = verl.compute_value_loss(x, ret, old, MASK, cliprange_value=0.2)
    loss.backward()
    near = torch.max(torch.min(value, old + 0.2), old - 0.2)
    whole = (torch.max((value - ret) ** 2, (near - ret) ** 2) * MASK).sum() / MASK.sum()
    assert close(loss, 0.5 * whole)
    return [
        make(
            "verl",
            "value_loss",
            "compute_value_loss(vpreds=value, returns=ret, "
            "values=old_value, response_mask=mask, cliprange_value=0.2)",
            {"value": value, "old_value": old, "ret": ret, "mask": MASK, "clip": 0.2},
            {"loss": loss, "grad_value": x.grad, "clip_fraction": clipped},
            [
                f"HAS the 1/2: loss / masked mean of max(squares) = {(loss / whole).item():.12f}",
                "token-mean, max (not min) of the two squares",
            ],
        )
    ]


def verl_kl():
    logp = numbers(11, 4, R, scale=0.8, shift=-2)
    ref = (logp + numbers(12, 4, R, scale=0.5)).round(decimals=3)
    k1, k3 = (verl.kl_penalty(logp, ref, kind) for kind in ("kl", "low_var_kl"))
    assert close(k1, logp - ref) and close(k3, (ref - logp).exp() - 1 - (ref - logp))
    return [
        make(
            "verl",
            f"kl_{short}",
            f"kl_penalty(logp, ref_logp, {kind!r})",
            {"logp": logp, "ref_logp": ref},
            {"kl": kl},
            [note],
        )
        for short, kind, kl, note in (
            ("k1", "kl", k1, "logp - ref_logp, no clamp"),
            ("k3", "low_var_kl", k3, "exp(ref - logp) - 1 - (ref - logp); clamps do not act"),
        )
    ]


def verl_groups():
    score = torch.tensor([1, 0, 0, 1, 0.5, -0.25, 0.75, 0.75], dtype=torch.float64)
    group = [0, 0, 0, 0, 1, 1, 2, 2]
    mask = ragged([3, 1, 2, 3, 3, 2, 1, 3], 3)
    reward = torch.zeros(8, 3, dtype=torch.float64)
    reward[torch.arange(8), mask.sum(1).long() - 1] = score
    inputs = {"reward": reward, "mask": mask.long().tolist(), "group": group}
    scores = {"score": score}
    call = (
        "compute_{}_outcome_advantage(token_level_rewards=reward, response_mask=mask, index=group"
    )

    def run(function, **options):
        return function(reward.clone(), mask, np.array(group), **options)[0]

    def first(x):
        assert close(x, x[:, :1] * mask)
        return x[:, 0]

    got = first(run(verl.compute_grpo_outcome_advantage, epsilon=1e-4))
    assert close(got[:4], (score[:4] - 0.5) / (score[:4].std().item() + 1e-4))
    out = [
        make(
            "verl",
            "grpo_advantage_epsilon_0.0001",
            call.format("grpo") + ", epsilon=0.0001)",
            inputs | scores | {"epsilon": 1e-4},
            {"advantage": got},
            [
                "(score - group mean) / (UNBIASED group std + epsilon); verl's default "
                "epsilon is 1e-6, trl's 1e-4",
                "advantage is per row; verl returns it times the mask",
                "group 2 has equal rewards: advantage 0",
            ],
        )
    ]
    got = first(run(verl.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False))
    out.append(
        make(
            "verl",
            "grpo_advantage_no_std",
            call.format("grpo") + ", norm_adv_by_std_in_grpo=False)",
            inputs | scores,
            {"advantage": got},
            ["score - group mean"],
        )
    )
    got = first(run(verl.compute_rloo_outcome_advantage))
    assert close(got[0], score[0] - score[1:4].mean())
    out.append(
        make(
            "verl",
            "rloo_advantage",
            call.format("rloo") + ")",
            inputs | scores,
            {"advantage": got},
            ["score - mean of the OTHERS of the group = G / (G - 1) * (score - group mean)"],
        )
    )
    return out


def torchtune_gae():
    reward, value = gae_data()
    out = []
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5)):
        adv, ret = rlhf.estimate_advantages(value, reward, gamma, lam, masks=MASK.bool())
        raw = ret - value
        other = verl.compute_gae_advantage_return(reward, value, MASK, gamma, lam)[1]
        assert close(ret, other, 1e-14)
        mean = adv[MASK.bool()].mean().item()
        out.append(
            make(
                "torchtune",
                f"estimate_advantages_{gamma}_{lam}",
                "torchtune.rlhf.estimate_advantages(value, reward, gamma, lmbda, "
                "masks=mask.bool())",
                {"reward": reward, "value": value, "mask": MASK, "gamma": gamma, "lam": lam},
                {"returns": ret, "advantages": adv},
                [
                    "TRAP: the mask is used for whitening only, so rewards and values behind the "
                    "end must be zero; then returns equal verl's",
                    f"TRAP: advantages keep their mean ({mean:.6f}) and are zeroed where mask is "
                    "0; " + which_variance(raw, adv, shift=False),
                    "compare advantages to 1e-6: the Bessel factor is float32 inside",
                ],
            )
        )
    return out


def torchtune_ppo():
    logp, old, adv = policy_data()
    value = numbers(8, 4, R)
    old_value = (value + numbers(9, 4, R, scale=0.3)).round(decimals=3)
    ret = numbers(10, 4, R)
    x, v = logp.clone().requires_grad_(), value.clone().requires_grad_()
    loss, policy, values, ratio, clipped = PPOLoss(0.2, 0.2, 0.1)(
        old, x, adv, old_value, v, ret, MASK.bool(), MASK.bool()
    )
    loss.backward()
    assert close(loss, policy + 0.1 * values)
    assert close(
        policy, verl.compute_policy_loss(old, logp, adv, MASK, 0.2, clip_ratio_c=1e9)[0], 1e-8
    )
    assert close(values, verl.compute_value_loss(value, ret, old_value, MASK, 0.2)[0], 1e-8)
    return [
        make(
            "torchtune",
            "ppo_loss",
            "PPOLoss(epsilon=0.2, value_clip_range=0.2, value_coeff=0.1)(old_logp, logp, "
            "advantages, old_value, value, ret, mask.bool(), mask.bool())",
            {
                "logp": logp,
                "old_logp": old,
                "advantages": adv,
                "value": value,
                "old_value": old_value,
                "ret": ret,
                "mask": MASK,
                "clip": 0.2,
                "value_clip": 0.2,
                "value_coeff": 0.1,
            },
            {
                "loss": loss,
                "policy_loss": policy,
                "value_loss": values,
                "ratio_mean": ratio,
                "clip_fraction": clipped,
                "grad_logp": x.grad,
                "grad_value": v.grad,
            },
            [
                "value_loss HAS the 1/2, not the coefficient; loss = policy + 0.1 * value",
                "its 'padding_masks' are True where a token COUNTS",
                "TRAP: ratio_mean is over all positions, padding too",
                "equals verl's two losses up to 1e-8 (denominator is count + 1e-8)",
            ],
        )
    ]


def dpo_data():
    logps = [numbers(13 + i, 5, scale=3, shift=-12) for i in range(2)]
    refs = [(x + numbers(15 + i, 5, scale=2)).round(decimals=3) for i, x in enumerate(logps)]
    return logps + refs


NAMES = ("chosen", "rejected", "ref_chosen", "ref_rejected")
REWARDS = ("losses", "chosen_rewards", "rejected_rewards")


def torchtune_dpo():
    data, out = dpo_data(), []
    for beta in (0.1, 0.3):
        out.append(
            make(
                "torchtune",
                f"dpo_{beta}",
                f"DPOLoss(beta={beta})(chosen, rejected, ref_chosen, ref_rejected)",
                dict(zip(NAMES, data, strict=True)) | {"beta": beta},
                dict(zip(REWARDS, DPOLoss(beta=beta)(*data), strict=True)),
                ["losses per pair"],
            )
        )
    zero = torch.zeros(3, dtype=torch.float64)
    ten = torch.tensor([0.0, 10, 20]).double()
    got = DPOLoss(beta=0.1)(ten, zero, zero, zero)
    assert close(got[0], (1 + (-ten / 10).exp()).log())
    out.append(
        make(
            "torchtune",
            "dpo_scaled_logits_0_1_2",
            "DPOLoss(beta=0.1)(chosen, 0, 0, 0)",
            dict(zip(NAMES, [ten.tolist()] + [[0.0] * 3] * 3, strict=True)) | {"beta": 0.1},
            dict(zip(REWARDS, got, strict=True)),
            ["log 2, -log sigmoid(1), -log sigmoid(2)"],
        )
    )
    return out


def trl_dpo(data, beta, kind="sigmoid", label_smoothing=0.0):
    stub = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        reference_free=False,
        beta=beta,
        f_divergence_type=FDivergenceType.REVERSE_KL.value,
        f_divergence_params=None,
        label_smoothing=label_smoothing,
        args=None,
    )
    return DPOTrainer.dpo_loss(stub, *data, loss_type=kind)


def trl_records():
    data, out = dpo_data(), []
    call = (
        "DPOTrainer.dpo_loss(stub, chosen, rejected, ref_chosen, ref_rejected, loss_type='sigmoid')"
    )
    for beta in (0.1, 0.3):
        got = trl_dpo(data, beta)
        assert close(got[0], DPOLoss(beta=beta)(*data)[0])
        out.append(
            make(
                "trl",
                f"dpo_sigmoid_{beta}",
                call,
                dict(zip(NAMES, data, strict=True)) | {"beta": beta},
                dict(zip(REWARDS, got, strict=True)),
                ["losses per pair, log-probs are sums; equal to torchtune's DPOLoss"],
            )
        )
    hand = [[-5, -7.5, -3], [-6, -7, -9], [-5.5, -7, -3.5], [-5, -7, -8]]
    hand = [torch.tensor(x, dtype=torch.float64) for x in hand]
    got = dict(zip(REWARDS, trl_dpo(hand, 0.1), strict=True))
    assert close(got["losses"], torch.tensor([0.620957, 0.718460, 0.620957]), 1e-6)
    others = {k: trl_dpo(hand, 0.1, k)[0] for k in ("hinge", "ipo", "apo_zero")}
    others["robust_label_smoothing_0.1"] = trl_dpo(hand, 0.1, "robust", 0.1)[0]
    out.append(
        make(
            "trl",
            "dpo_by_hand",
            call + "; the other losses by their loss_type",
            dict(zip(NAMES, hand, strict=True)) | {"beta": 0.1},
            got | others,
            [
                "scaled logits 0.15, -0.05, 0.15: -log sigmoid of them, worked by hand",
                "ipo: (logits - 1 / (2 beta))**2 with SUMMED log-probs; trl >= 1 divides by "
                "the completion length",
            ],
        )
    )
    return out


if __name__ == "__main__":
    write(
        "verl.json",
        verl_gae() + verl_whiten() + verl_policy() + verl_value() + verl_kl() + verl_groups(),
    )
    write(
        "torchtune.json",
        torchtune_gae() + torchtune_ppo() + torchtune_dpo(),
    )
    write("trl0.json", trl_records())
