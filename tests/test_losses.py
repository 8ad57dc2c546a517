"""Losses against independent libraries, by hand and by property; Muon against torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanoreward as nr
from tests.conftest import golden, tensors


def gradient(loss, x):
    (g,) = torch.autograd.grad(loss, x)
    return g


def test_ppo_loss_and_gradient_equal_verl():
    record = golden("verl")["policy_loss_token_mean"]
    logp, old, adv, mask = tensors(record, "logp", "old_logp", "advantages", "mask")
    loss = nr.ppo_loss(logp.requires_grad_(), old, adv, mask, mask.sum(), record["inputs"]["clip"])
    assert float(loss.detach()) == pytest.approx(record["output"]["loss"], abs=1e-9)
    theirs = torch.tensor(record["output"]["grad_logp"], dtype=torch.float64)
    assert (gradient(loss, logp) - theirs).abs().max() < 1e-9


def test_ppo_and_value_loss_equal_torchtune():
    record = golden("torchtune")["ppo_loss"]
    logp, old, adv, mask = tensors(record, "logp", "old_logp", "advantages", "mask")
    value, old_value, ret = tensors(record, "value", "old_value", "ret")
    clip = record["inputs"]["clip"]
    out = record["output"]
    logp.requires_grad_()
    value.requires_grad_()
    policy = nr.ppo_loss(logp, old, adv, mask, mask.sum(), clip)
    critic = nr.value_loss(value, old_value, ret, mask, mask.sum(), record["inputs"]["value_clip"])
    assert float(policy.detach()) == pytest.approx(out["policy_loss"], abs=1e-7)
    assert float(critic.detach()) == pytest.approx(out["value_loss"], abs=1e-7)
    theirs = torch.tensor(out["grad_logp"], dtype=torch.float64)
    assert (gradient(policy, logp) - theirs).abs().max() < 1e-7
    theirs = torch.tensor(out["grad_value"], dtype=torch.float64) / record["inputs"]["value_coeff"]
    assert (gradient(critic, value) - theirs).abs().max() < 1e-7


def test_value_loss_equals_verl_and_without_clip_is_half_the_mean_square():
    record = golden("verl")["value_loss"]
    value, old, ret, mask = tensors(record, "value", "old_value", "ret", "mask")
    loss = nr.value_loss(
        value.requires_grad_(), old, ret, mask, mask.sum(), record["inputs"]["clip"]
    )
    assert float(loss.detach()) == pytest.approx(record["output"]["loss"], abs=1e-9)
    theirs = torch.tensor(record["output"]["grad_value"], dtype=torch.float64)
    assert (gradient(loss, value) - theirs).abs().max() < 1e-9
    value = value.detach()
    plain = nr.value_loss(value, old, ret, mask, mask.sum(), None)
    assert float(plain) == pytest.approx(float(((value - ret) ** 2 * mask).sum() / mask.sum() / 2))
    assert float(loss.detach()) >= float(plain)  # pessimistic


@pytest.mark.parametrize("kind", ["bnpo", "dapo"])
def test_grpo_objective_equals_trl_token_mean(kind):
    record = golden("trl1")[f"grpo_loss_{kind}"]
    logp, old, ref, adv, mask = tensors(
        record, "logp", "old_logp", "ref_logp", "advantages", "mask"
    )
    logp.requires_grad_()
    b = rollout(mask, logp=old, ref_logp=ref, adv=adv[:, None] * mask)
    config = nr.PPOConfig(clip=record["inputs"]["clip"], beta=record["inputs"]["beta"])
    loss = nr.grpo_objective(logp, None, b, mask.sum(), config)
    assert float(loss.detach()) == pytest.approx(record["output"]["loss"], abs=1e-9)
    theirs = torch.tensor(record["output"]["grad_logp"], dtype=torch.float64)
    assert (gradient(loss, logp) - theirs).abs().max() < 1e-9


def rollout(mask, **more):
    zero = torch.zeros_like(mask)
    return nr.Rollout(zero.long(), zero.long(), mask, zero.long(), torch.arange(len(mask)), **more)


@pytest.mark.parametrize("name", ["dpo_0.1", "dpo_0.3", "dpo_scaled_logits_0_1_2"])
def test_dpo_loss_equals_torchtune(name):
    check_dpo(golden("torchtune")[name])


@pytest.mark.parametrize("name", ["dpo_sigmoid_0.1", "dpo_sigmoid_0.3", "dpo_by_hand"])
def test_dpo_loss_equals_trl(name):
    check_dpo(golden("trl0")[name])


def check_dpo(record):
    w, lo, rw, rl = tensors(record, "chosen", "rejected", "ref_chosen", "ref_rejected")
    beta = record["inputs"]["beta"]
    out = record["output"]
    loss, margin = nr.dpo_loss(w, lo, rw, rl, torch.ones_like(w), beta, 0.0)
    assert float(loss) == pytest.approx(sum(out["losses"]) / len(w), abs=1e-6)
    theirs = torch.tensor(out["chosen_rewards"]) - torch.tensor(out["rejected_rewards"])
    assert (beta * margin - theirs).abs().max() < 1e-6


def test_dpo_with_nll_equals_trl_where_lengths_agree_and_differs_where_not():
    """(9) divides each chosen sequence by its own length.

    TRL's sft term is one mean over all tokens.
    """
    for name, equal in (
        ("dpo_sigmoid_sft_equal_chosen_lengths", True),
        ("dpo_sigmoid_sft_ragged", False),
    ):
        record = golden("trl1")[name]
        logp, ref, mask = tensors(record, "logp", "ref_logp", "mask")
        total, ref_total, length = (logp * mask).sum(1), (ref * mask).sum(1), mask.sum(1)
        n = len(total) // 2
        chosen = total[:n], total[n:], ref_total[:n], ref_total[n:], length[:n]
        loss, _ = nr.dpo_loss(*chosen, record["inputs"]["beta"], 1.0)
        assert (abs(float(loss) - record["output"]["loss"]) < 1e-6) == equal


def test_dpo_at_the_reference_is_log_two_with_gradient_half_beta_and_swapping_flips_the_margin():
    w = torch.tensor([-5.0, -2.0], requires_grad=True)
    lo = torch.tensor([-4.0, -6.0], requires_grad=True)
    length = torch.tensor([4.0, 2.0])
    loss, margin = nr.dpo_loss(w, lo, w.detach(), lo.detach(), length, 0.1, 0.0)
    assert float(loss.detach()) == pytest.approx(math.log(2)) and margin.abs().max() == 0
    gw, gl = torch.autograd.grad(loss, [w, lo])
    assert torch.allclose(gw, torch.full((2,), -0.1 / 2 / 2))  # the loss is a mean of 2
    assert torch.allclose(gl, -gw)
    a = nr.dpo_loss(w, lo, w * 0.9, lo * 1.1, length, 0.1, 0.0)[1]
    b = nr.dpo_loss(lo, w, lo * 1.1, w * 0.9, length, 0.1, 0.0)[1]
    assert torch.allclose(a, -b) and not a.requires_grad


def test_nine_by_hand():
    # margin = (-3 - -4) - (-5 - -4) = 2; -log sigma(.5 * 2) + 2 * 3 / 6 = .313262 + 1
    pair = torch.tensor([[-3.0], [-5.0], [-4.0], [-4.0], [6.0]])
    loss, margin = nr.dpo_loss(*pair, 0.5, 2.0)
    assert float(loss) == pytest.approx(1.313262, abs=1e-6) and float(margin) == 2


def test_preference_loss_equals_trl_bradley_terry():
    record = golden("trl1")["bradley_terry"]
    w, lo = tensors(record, "chosen", "rejected")
    loss = nr.preference_loss(w.requires_grad_(), lo)
    assert float(loss.detach()) == pytest.approx(record["output"]["loss"], abs=1e-6)
    theirs = torch.tensor(record["output"]["grad_chosen"], dtype=torch.float64)
    assert (gradient(loss, w) - theirs).abs().max() < 1e-6


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_losses_reach_counted_tokens_only_and_change_no_argument(seed):
    g = nr.rng(seed, "loss")
    logp, old, ref, adv, value, ret = torch.randn(6, 5, 6, generator=g) * 0.1
    mask = (torch.arange(6) < torch.randint(1, 7, (5, 1), generator=g)).float()
    b = rollout(mask, logp=old, ref_logp=ref, adv=adv, value=old, ret=ret)
    config = nr.PPOConfig(beta=0.1)
    for objective in (nr.critic_objective, nr.grpo_objective, nr.rloo_objective):
        leaf = logp.clone().requires_grad_()
        v = value.clone().requires_grad_()
        before = [x.clone() for x in (old, ref, adv, ret, mask)]
        loss = objective(leaf, v, b, mask.sum(), config)
        grad = gradient(loss, leaf)
        assert (grad[mask == 0] == 0).all()
        pairs = zip(before, (old, ref, adv, ret, mask), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
        assert torch.equal(leaf.detach(), logp)
        # What stands behind EOS does not matter.
        junk = logp.clone().masked_fill(mask == 0, 3.0)
        assert torch.allclose(objective(junk, v, b, mask.sum(), config), loss, atol=1e-6)
    # EOS is a token that counts: REINFORCE, which is the loss at ratio 1, reaches it.
    last = mask.sum(1).long() - 1
    leaf = old.clone().requires_grad_()
    grad = gradient(nr.ppo_loss(leaf, old, adv, mask, mask.sum(), 0.2), leaf)
    assert torch.allclose(grad, -adv * mask / mask.sum(), atol=1e-6)
    assert (grad[torch.arange(5), last] != 0).all()


def test_ppo_clip_stops_the_gain_but_not_the_pain_by_hand():
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)

    def loss(ratio, adv):
        logp = torch.tensor([[math.log(ratio)]])
        return float(nr.ppo_loss(logp, zero, adv * one, one, one.sum(), 0.2))

    assert loss(1.5, 1) == pytest.approx(-1.2) and loss(1.5, -1) == pytest.approx(1.5)
    assert loss(0.5, 1) == pytest.approx(-0.5) and loss(0.5, -1) == pytest.approx(0.8)


def test_nll_loss_by_hand():
    logp, mask = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert float(nr.nll_loss(logp, mask, mask.sum())) == 2.0


@pytest.mark.parametrize("name", ["muon_8x24", "muon_24x8"])
def test_muon_follows_torch(name):
    """torch runs Newton-Schulz in bfloat16 and we in float32.

    After 5 steps they are 1 % apart; a wrong one is off by 5 % or more.
    """
    record = golden("torch")[name]
    start, grads = (torch.tensor(record["inputs"][n]) for n in ("start", "grads"))
    a, b = (torch.nn.Parameter(start.clone()) for _ in range(2))
    muon = nr.Muon([a, b], lr=0.02)
    for g in grads:
        a.grad = g.clone()
        b.grad = g.clone()
        muon.step()
    theirs = torch.tensor(record["output"]["weight_original"])
    error = (a.detach() - theirs).norm() / (theirs - start).norm()
    assert float(error) < 0.025
    assert torch.equal(a, b)  # equal shapes are computed together


def test_muon_keeps_matrices_of_one_shape_apart():
    a, b = (torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(2))
    muon = nr.Muon([a, b], lr=0.1)
    a.grad, b.grad = (torch.randn(4, 6, generator=nr.rng(seed, "m")) for seed in range(2))
    muon.step()
    alone = torch.nn.Parameter(torch.zeros(4, 6))
    alone.grad = a.grad
    nr.Muon([alone], lr=0.1).step()
    assert torch.allclose(a, alone, atol=1e-6) and not torch.allclose(a, b, atol=1e-3)
    assert torch.linalg.svdvals(a.detach() / 0.1).min() > 0.5  # made orthogonal, roughly


def test_grpo_without_a_kl_weight_asks_for_no_kl():
    """A policy that has left its reference by far has an infinite k3, and 0 times that is NaN."""
    c = nr.PPOConfig(arm="grpo")
    logp = torch.full((1, 2), -200.0, requires_grad=True)
    mask = torch.ones(1, 2)
    ids = torch.zeros(1, 2, dtype=torch.long)
    b = nr.Rollout(ids, ids, mask, ids, torch.zeros(1, dtype=torch.long))
    b.logp, b.ref_logp, b.adv = logp.detach().clone(), torch.zeros(1, 2), torch.ones(1, 2)
    loss = nr.grpo_objective(logp, None, b, mask.sum(), c)
    assert float(loss.detach()) == -1.0
    assert torch.equal(gradient(loss, logp), torch.full((1, 2), -0.5))
    with_kl = nr.grpo_objective(logp, None, b, mask.sum(), nr.replace(c, beta=0.1))
    assert with_kl.isinf() or with_kl > 1e6
