"""PAD, BOS and the ends of a text: what counts, what may be written, and what nobody reads."""

import pytest
import torch

import nanoreward as nr
from data.arithmetic import Arithmetic
from tests.conftest import TINY, random_batch, rough, tiny

TASK = Arithmetic(1, 1)

# The ids 20 and 25 end a text too.
SEVERAL = nr.replace(TINY, other_ends="20 25")

# PAD behind the vocabulary of 32, as in a folder that has no token to spare.
BEHIND = nr.replace(TINY, pad_id=33)


def rollout_of(prompts, response, c):
    prompt = nr.encode_prompts(TASK, prompts, c)
    mask = nr.up_to_eos(response, c)
    return nr.Rollout(prompt, response, mask, response, torch.arange(len(prompts)))


# ---- several ends --------------------------------------------------------------------------------


def test_each_of_several_ends_ends_a_response():
    response = torch.tensor([[7, 20, 9, 2], [7, 8, 9, 25], [2, 20, 0, 0], [7, 8, 9, 10]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert nr.up_to_eos(response, SEVERAL).tolist() == expected
    b = rollout_of(["3+4="] * 4, response, SEVERAL)
    reward = nr.at_end(torch.ones(4), b, SEVERAL)
    assert reward.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, nr.NO_EOS]]
    b.logp = torch.zeros(4, 4)
    metrics = nr.rollout_metrics(b, reward, torch.ones(4), nr.replace(SEVERAL, samples=4))
    assert metrics["ended"] == 0.75


def test_the_sampler_stops_at_each_of_them_and_does_so_as_often_as_the_probabilities_say():
    model = rough(SEVERAL)
    prompt = nr.encode_prompts(TASK, ["3+4="] * 2000, SEVERAL)
    b = nr.sample(model, prompt, SEVERAL, generator=nr.rng(1, "sample"))
    for end in SEVERAL.ends:
        rows, places = (b.response == end).nonzero(as_tuple=True)
        assert len(rows) > 20
        # An end is the last token of its row, and only PAD follows.
        assert (b.mask[rows].sum(1) == places + 1).all()
        assert all((b.response[r, k + 1 :] == SEVERAL.pad_id).all() for r, k in zip(rows, places))
    logp = nr.token_logprobs(model, prompt[:1], torch.tensor([[20]]), 1.0).detach()
    share = float((b.response[:, 0] == 20).float().mean())
    assert share == pytest.approx(float(logp.exp()), abs=0.03)


def test_a_given_start_that_holds_an_end_is_not_gone_on_from():
    start = torch.full((2, TINY.response), TINY.pad_id)
    start[:, :2] = torch.tensor([[9, 25], [9, 10]])
    prompt = nr.encode_prompts(TASK, ["3+4="] * 2, SEVERAL)
    b = nr.sample(rough(SEVERAL), prompt, SEVERAL, start, generator=nr.rng(0, "sample"))
    assert (b.response[0, 2:] == SEVERAL.pad_id).all() and (b.order[0] == -1).all()
    assert b.mask[1].sum() > 2


def test_a_model_that_rewrites_sees_no_end_of_what_it_reads():
    prompt, response = [0, 1, 9, 20, 10], [11, 25, 12, 2]
    read = nr.rewriter_prompt(TASK, prompt, response, SEVERAL)
    assert not set(read) & set(SEVERAL.ends)
    assert [i for i in read if i > 5] == [9, 10, 11, 12]


def test_what_stands_behind_the_end_is_never_graded():
    truth = TASK.encode(["3+4=7;#7<eos>"])[0]
    wrong_then_right = torch.tensor([[2, *truth], [*truth, 2], [1, *truth]])
    b = rollout_of(["3+4="] * 3, wrong_then_right, TINY)
    assert nr.grades(TASK, b).tolist() == [0, 1, 1]
    assert nr.texts_of(TASK, wrong_then_right, nr.up_to_eos(wrong_then_right, TINY)) == [
        "<eos>",
        "3+4=7;#7<eos>",
        "3+4=7;#7<eos>",
    ]

    class Whole(Arithmetic):
        """A task that shows all ids that it is given, whatever ends they hold."""

        def decode(self, ids):
            return " ".join(str(i) for i in ids)

        def grade(self, prompt, response):
            return float(response == "7 25")

    response = torch.tensor([[7, 25, 9, 9]])
    assert nr.texts_of(Whole(1, 1), response, nr.up_to_eos(response, SEVERAL)) == ["7 25"]
    b = rollout_of(["3+4="], response, SEVERAL)
    assert nr.grades(Whole(1, 1), b).tolist() == [1.0]


# ---- what may be written -------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_bos_is_never_written_and_has_no_probability(causal):
    c = tiny("denoise", causal=causal)
    model = rough(c)
    with torch.no_grad():
        model.lm_head.weight[c.bos_id] = 50.0  # as likely as can be, or as unlikely
    prompt, _ = random_batch(TINY, B=200)
    b = nr.sample(model, prompt, c, generator=nr.rng(0, "sample"))
    assert not (b.response == c.bos_id).any()
    logp = nr.log_softmax(torch.zeros(32), 1.0, c)
    forbidden = {c.pad_id, c.bos_id, c.mask_id}
    assert {i for i in range(32) if logp[i] == -torch.inf} == forbidden
    assert float(logp.exp().sum()) == pytest.approx(1)


def test_bos_may_be_written_where_it_is_an_end():
    for c in (nr.replace(TINY, bos_id=2), nr.replace(TINY, other_ends="1")):
        logp = nr.log_softmax(torch.zeros(32), 1.0, c)
        assert logp[c.bos_id] > -10 and logp[c.pad_id] == logp[c.mask_id] == -torch.inf


# ---- PAD behind the vocabulary -------------------------------------------------------------------


def test_pad_behind_the_vocabulary_is_pad_and_every_id_of_the_vocabulary_is_a_token():
    inside, behind = rough(TINY), rough(BEHIND)
    prompt, response = random_batch(TINY)
    other_prompt = prompt.masked_fill(prompt == TINY.pad_id, BEHIND.pad_id)
    other_response = response.masked_fill(response == TINY.pad_id, BEHIND.pad_id)
    x = nr.predictive_hidden(inside, prompt, response)
    y = nr.predictive_hidden(behind, other_prompt, other_response)
    counts = nr.up_to_eos(response, TINY) > 0
    assert torch.equal(counts, nr.up_to_eos(other_response, BEHIND) > 0)
    assert torch.equal(x[counts], y[counts])
    logp = nr.token_logprobs(behind, other_prompt, other_response, 1.0)
    assert (logp[~counts] == 0).all() and (logp[counts] < 0).all()
    # The id that was PAD is read like any other.
    ids = torch.tensor([[9, 0, 11]])
    assert not torch.allclose(behind(ids)[:, -1], inside(ids)[:, -1], atol=1e-3)
    assert behind(ids).isfinite().all()


def test_every_loop_runs_with_pad_behind_the_vocabulary():
    for name, method in nr.METHODS.items():
        c = tiny(name, pad_id=33, prompts=4, samples=2, micro=3, updates=1)
        if name in ("iterative_dpo", "self_rewarding"):
            c = nr.replace(c, rounds=1)
        if name == "refine":
            c = nr.replace(c, prompts=20)
        policy = rough(nr.replace(c, causal=name != "denoise"))
        state = method.start(policy, c)
        if name == "seq2seq":
            state.models = {"rewriter": rough(c, 1)}
        logs = list(method.loop(state, TASK, c))
        assert logs, name
        assert all(p.isfinite().all() for p in state.policy.parameters()), name


def test_a_response_without_any_token_has_its_rewards_and_no_crash():
    empty = torch.full((2, TINY.response), TINY.pad_id)
    empty[1, :2] = torch.tensor([9, TINY.eos_id])
    b = rollout_of(["3+4="] * 2, empty, TINY)
    reward = nr.at_end(torch.ones(2), b, TINY)
    assert reward.sum(1).tolist() == [nr.NO_EOS, 1.0]
    state = nr.start_ppo(rough(TINY), TINY)
    found = nr.token_rewards(state, TASK, b, TINY)
    assert found[0] == {"token_rewards": [], "shift": [], "value": []}
    assert [len(numbers) for numbers in found[1].values()] == [2, 2, 2]


@pytest.mark.parametrize("arm", list(nr.PPO_ARMS))
def test_what_stands_behind_the_end_earns_nothing_whoever_gives_the_reward(arm, monkeypatch):
    """A reward of one's own that also pays for PAD is the same as one that does not."""

    def everywhere(state, task, b, truth, c):
        return torch.ones_like(b.mask)

    def for_tokens(state, task, b, truth, c):
        return b.mask.clone()

    c = tiny("ppo", arm=arm, updates=2)
    logs = []
    for signal in (everywhere, for_tokens):
        state = nr.start_ppo(rough(c), c)
        logs.append(list(nr.ppo(state, TASK, c, signal)))
    assert logs[0] == logs[1]
    assert logs[0][0]["reward"] == pytest.approx(logs[0][0]["length"])
    assert 0 < logs[0][0]["length"] < c.response


@pytest.mark.parametrize(
    "reward", [torch.ones(8), torch.ones(32, 3), torch.ones(32, 12, dtype=torch.long)]
)
def test_a_reward_of_another_shape_or_kind_is_one_line(reward):
    c = tiny("ppo")
    state = nr.start_ppo(rough(c), c)
    with pytest.raises(nr.UserError, match=r"tensor of floats with the shape \(32, 12\)"):
        next(nr.ppo(state, TASK, c, lambda *given: reward))
