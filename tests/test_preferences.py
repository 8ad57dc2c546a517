"""iterative_dpo: pairs, the losses on them, rounds, and a world with a known answer."""

import math
from itertools import islice
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanoreward as nr
import train_small
from data.arithmetic import Arithmetic
from tests.conftest import TINY, random_batch, rough, tiny

TASK = Arithmetic(1, 1)
DPO = tiny("iterative_dpo")


@pytest.fixture(autouse=True)
def full_rate_at_once(monkeypatch):
    """The few updates of a round here are no time to warm up."""
    monkeypatch.setattr(nr, "WARMUP", 1)


# ---- pairs -------------------------------------------------------------------------------------


def test_pairs_walk_through_both_lists_and_restart_the_shorter(monkeypatch):
    right = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0])
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    # prompt 0: right 0, 2; wrong 1, 3, 4.  prompt 1 has no wrong one, prompt 2 no right one
    monkeypatch.setattr(nr, "PAIRS_EACH", 4)
    assert nr.pair_up(right, group, DPO).tolist() == [[0, 1], [2, 3], [0, 4], [2, 1]]
    assert nr.pair_up(torch.ones(8), group, DPO).shape == (0, 2)
    monkeypatch.setattr(nr, "PAIRS_EACH", 1)
    assert nr.pair_up(right, group, DPO).tolist() == [[0, 1]]


@given(seed=st.integers(0, 1000), K=st.integers(1, 9))
def test_a_pair_is_one_right_and_one_wrong_response_of_one_prompt(seed, K):
    g = nr.rng(seed, "pairs")
    right = torch.rand(24, generator=g) < 0.4
    group = torch.randint(5, (24,), generator=g)
    with patch.object(nr, "PAIRS_EACH", K):
        pairs = nr.pair_up(right.float(), group, DPO)
    both = {x for x in group.tolist() if len(set(right[group == x].tolist())) == 2}
    assert len(pairs) == K * len(both)
    assert right[pairs[:, 0]].all() and not right[pairs[:, 1]].any()
    assert torch.equal(group[pairs[:, 0]], group[pairs[:, 1]])
    for x in both:  # no list is left before all of it was used
        mine = pairs[group[pairs[:, 0]] == x]
        for side, of in ((0, right), (1, ~right)):
            assert len(mine[:, side].unique()) == min(K, int((of & (group == x)).sum()))


def test_log_probs_of_pairs_are_sums_over_their_own_tokens(model):
    prompt, response = random_batch(TINY)
    pairs = {"prompt": prompt[:3], "response": torch.stack([response[:3], response[3:]], 1)}
    logp = nr.pair_logprobs(model, pairs, torch.tensor([2, 0]))
    for row, i in zip(logp, (2, 0), strict=True):
        for side, j in ((0, i), (1, i + 3)):
            alone = response[j : j + 1, : int((response[j] != 0).sum())]
            one = nr.token_logprobs(model, prompt[i : i + 1], alone, 1.0).sum()
            assert float((row[side] - one).detach()) == pytest.approx(0, abs=1e-4)


# ---- losses ------------------------------------------------------------------------------------


def test_dpo_nll_is_equation_9_by_hand():
    logp = torch.tensor([[-3.0, -5.0], [-8.0, -4.0]])
    ref = torch.tensor([[-4.0, -4.5], [-6.0, -6.0]])
    length = torch.tensor([[6, 4], [2, 9]])
    config = nr.replace(DPO, beta=0.5, alpha=2.0)
    by_hand = 0.0
    for (w, v), (rw, rv), (n, _) in zip(logp.tolist(), ref.tolist(), length.tolist(), strict=True):
        margin = (w - rw) - (v - rv)
        by_hand += -math.log(1 / (1 + math.exp(-0.5 * margin))) - 2.0 * w / n
    loss, margin = nr.dpo_nll(logp, ref, length, config)
    assert float(loss) == pytest.approx(by_hand / 2, rel=1e-6)
    assert margin.tolist() == [1.5, -4.0]
    loss, margin = nr.sft_chosen(logp, ref, length, config)
    assert float(loss) == pytest.approx((3 / 6 + 8 / 2) / 2)
    assert margin.tolist() == [1.5, -4.0]


# ---- rounds ------------------------------------------------------------------------------------

SMALL = nr.replace(DPO, rounds=2, updates=3, prompts=16, samples=4, minibatch=16, lr=3e-3)


class Short(Arithmetic):
    """Right is any response that ends within three tokens: a habit learned in seconds."""

    def grade(self, prompt, response):
        return float(response.endswith("<eos>") and len(response) <= 2 + len("<eos>"))


def test_a_round_keeps_its_reference_and_the_next_one_starts_where_it_ended():
    state = nr.start_rounds(rough(SMALL), SMALL)
    seen = []
    for m in nr.iterative_dpo(state, Short(1, 1), SMALL):
        with torch.no_grad():
            rows = torch.arange(len(state.pairs["ref"]))
            now = nr.pair_logprobs(state.policy, state.pairs, rows)
        seen.append((m, state.pairs["ref"].clone(), now))
    assert [m["round"] for m, _, _ in seen] == [0, 0, 0, 1, 1, 1]
    assert torch.equal(seen[0][1], seen[2][1])  # computed once
    assert not torch.allclose(seen[2][2], seen[2][1])
    # the first update of a round starts from the reference: margin 0, so the DPO term is log 2
    for m, _, _ in (seen[0], seen[3]):
        assert m["margin"] == pytest.approx(0, abs=1e-4) and m["samples"] in (64, 128)
    assert seen[1][0]["margin"] > 0 and seen[2][0]["pair_accuracy"] > 0.5
    logged = {"chosen", "rejected", "chosen_per_token", "rejected_per_token", "truth", "pairs"}
    assert logged <= set(seen[0][0])


@pytest.mark.parametrize("arm", list(nr.DPO_ARMS))
def test_rounds_learn_a_habit_that_is_rewarded(arm):
    config = nr.replace(SMALL, rounds=4, updates=12, arm=arm, alpha=1.0)
    state = nr.start_rounds(rough(config), config)
    truth = [m["truth"] for m in nr.iterative_dpo(state, Short(1, 1), config)]
    assert truth[0] < 0.35 and truth[-1] > truth[0] + 0.25


def test_a_round_without_pairs_is_one_line_and_over():
    class Never(Arithmetic):
        def grade(self, prompt, response):
            return 0.0

    state = nr.start_rounds(rough(SMALL), SMALL)
    before = [p.clone() for p in state.policy.parameters()]
    lines = list(nr.iterative_dpo(state, Never(1, 1), SMALL))
    assert [m["pairs"] for m in lines] == [0, 0] and [m["round"] for m in lines] == [0, 1]
    after = list(state.policy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "pairs" in train_small.notes(lines[0], SMALL)


@pytest.mark.parametrize("stop", [2, 4])
def test_resume_in_the_middle_of_a_round_is_bit_exact(tmp_path, stop):
    whole = nr.start_rounds(rough(SMALL), SMALL)
    logs = list(nr.iterative_dpo(whole, Short(1, 1), SMALL))
    part = nr.start_rounds(rough(SMALL), SMALL)
    list(islice(nr.iterative_dpo(part, Short(1, 1), SMALL), stop))
    nr.save_state(tmp_path, part)
    again = nr.load_state(tmp_path, into=nr.start_rounds(rough(SMALL, seed=9), SMALL))
    rest = list(nr.iterative_dpo(again, Short(1, 1), SMALL))
    assert rest == logs[stop:]
    both = zip(whole.policy.parameters(), again.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


def test_micro_batches_of_pairs_change_nothing():
    logs, weights = [], []
    for micro in (64, 5):
        config = nr.replace(SMALL, micro=micro)
        state = nr.start_rounds(rough(config), config)
        first, second = islice(nr.iterative_dpo(state, Short(1, 1), config), 2)
        # Before the first step all margins are 0 but for rounding, whose sign says nothing.
        del first["pair_accuracy"]
        logs += [first, second]
        weights.append(state.policy.lm_head.weight.detach())
    assert logs[:2] == [pytest.approx(m, rel=1e-4, abs=1e-5) for m in logs[2:]]
    assert torch.allclose(*weights, atol=1e-6)


# ---- arms of notebooks/preferences.py ------------------------------------------------------------
