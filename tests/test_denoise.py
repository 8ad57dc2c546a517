"""The denoising process reward: log-probs, shared and fresh continuations, credits, the loop."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanoreward as nr
from data.arithmetic import Arithmetic
from notebooks import denoise
from tests.conftest import rough, tiny

TASK = Arithmetic(1, 1)
# a canvas of 12 in three blocks of four, one token a pass
FULL = tiny("denoise", causal=False, branches=3, samples=6, prompts=4)


class Odd(Arithmetic):
    """Right is what begins with an odd id, and then ends: what every policy learns in seconds."""

    def grade(self, prompt, response):
        ids = self.encode([response])[0]
        return float(len(ids) > 1 and ids[0] % 2)


def rolled(config=FULL, n=4, seed=0, model=None):
    """A rough diffusion LM, its groups of responses."""
    model = model or rough(config)
    prompt, group = nr.in_groups(TASK, TASK.prompts(n, nr.rng(seed, "p")), config)
    return model, nr.sample(model, prompt, config, group=group, generator=nr.rng(seed, "s"))


def started(config=FULL, seed=0):
    """A fresh state of the loop around a rough diffusion LM."""
    return nr.start_ppo(rough(config, seed), config)


@pytest.fixture
def no_penalty(monkeypatch):
    """A response without an end earns nothing, and costs nothing."""
    monkeypatch.setattr(nr, "NO_EOS", 0.0)


# ---- estimates of the likelihood ---------------------------------------------------------------


def test_mean_field_sees_the_prompt_and_none_of_the_response():
    model, b = rolled()
    logp, hidden = nr.estimate_diffusion(model, b, FULL)
    for i in range(len(b.prompt)):  # one row at a time, without PAD, all places MASK
        prompt = b.prompt[i][b.prompt[i] != 0]
        ids = torch.cat([prompt, torch.full((12,), FULL.mask_id)])[None]
        logits = model(ids)[0, len(prompt) - 1 : -1]
        logits[:, [FULL.pad_id, FULL.mask_id, FULL.bos_id]] = -torch.inf
        expected = logits.log_softmax(-1)[range(12), b.response[i]]
        expected = expected.masked_fill(b.response[i] == FULL.pad_id, 0.0)
        assert torch.allclose(logp[i], expected, atol=1e-5)
    other = nr.replace(b, response=b.response.flip(0))
    # only what is scored differs
    assert torch.equal(nr.estimate_diffusion(model, other, FULL)[1], hidden)


def test_half_of_coupled_is_each_token_beside_the_other_passes():
    model, b = rolled()
    P, expected = b.prompt.shape[1], torch.zeros_like(b.mask)
    for i in range(len(b.prompt)):
        for k in range(12):
            if b.response[i, k] == FULL.pad_id:
                continue
            mine = b.order[i] % 2 == b.order[i, k] % 2
            mine |= b.response[i] == FULL.pad_id
            canvas = torch.where(mine, FULL.mask_id, b.response[i])
            logits = model(torch.cat([b.prompt[i], canvas])[None])[0, P - 1 + k]
            logits[[FULL.pad_id, FULL.mask_id, FULL.bos_id]] = -torch.inf
            expected[i, k] = 2 * logits.log_softmax(-1)[b.response[i, k]]
    mean_field = nr.estimate_diffusion(model, b, FULL)[0]
    got = 2 * denoise.coupled(model, b, FULL)[0] - mean_field
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("estimate", [nr.estimate_diffusion, denoise.coupled])
def test_the_ratio_is_one_before_the_first_step(estimate):
    config = nr.replace(FULL, epochs=1, updates=1, minibatch=100)
    state = started(config)
    logs = list(nr.denoise(state, TASK, config, estimate))
    b = nr.annotate(state, rolled(config)[1], config, estimate)
    now = estimate(state.policy, b, config)[0]
    assert torch.allclose(now, b.logp, atol=1e-5)
    assert not torch.allclose(now, b.ref_logp, atol=1e-3)  # the policy has moved
    assert logs[0]["clipfrac"] == 0.0 and logs[0]["kl"] == 0.0


@settings(max_examples=12)
@given(share=st.sampled_from([0.0, 0.15, 0.5]), seed=st.integers(0, 99))
def test_what_is_masked_is_never_padding_or_bos_and_as_much_as_asked(share, seed):
    _, b = rolled(n=1)
    wide = nr.replace(b, prompt=torch.randint(0, 30, (2000, 9), generator=nr.rng(seed, "x")))
    wide.prompt[wide.prompt == FULL.mask_id] = 4  # so that a MASK is one of ours
    masked = denoise.mask_prompt(wide, share, FULL, nr.rng(seed, "h")).prompt
    is_mask = masked == FULL.mask_id
    assert masked.shape == wide.prompt.shape
    assert torch.equal(masked[~is_mask], wide.prompt[~is_mask])
    assert not is_mask[wide.prompt < 2].any()  # PAD is 0, BOS is 1
    assert abs(float(is_mask[wide.prompt > 1].float().mean()) - share) < 0.02


@pytest.mark.parametrize("estimate", [nr.estimate_diffusion, denoise.coupled])
def test_the_ratio_is_one_under_the_same_mask_and_not_under_another(estimate):
    config = nr.replace(FULL, epochs=1, updates=1, minibatch=100)
    state = started(config)
    logs = list(denoise.denoise_masked(state, TASK, config, 0.5))
    _, b = rolled(config)
    views = []
    for i in range(2):
        masked = denoise.mask_prompt(b, 0.5, config, nr.rng(0, "h", i))
        views.append(nr.annotate(state, masked, config, estimate))
    now = estimate(state.policy, views[0], config)[0]
    assert torch.allclose(now, views[0].logp, atol=1e-5)
    assert not torch.allclose(now, views[1].logp, atol=1e-2)
    assert logs[0]["clipfrac"] == 0.0 and logs[0]["kl"] == 0.0


def test_each_pass_over_a_batch_reads_the_log_probs_of_its_own_mask(monkeypatch):
    config = nr.replace(FULL, epochs=3, minibatch=100, micro=100, updates=1)
    seen = []

    def objective(logp, value, b, denom, c):
        off = float((logp - b.logp).detach().abs().max())
        seen.append((sorted(b.prompt.tolist()), sorted(b.response.tolist()), off))
        return 0.0 * logp.sum()  # nothing moves: every pass must find the ratio at 1

    grpo = nr.replace(nr.PPO_ARMS["grpo"], objective=objective)
    monkeypatch.setitem(nr.PPO_ARMS, "grpo", grpo)
    list(denoise.denoise_masked(started(config), TASK, config, 0.5))
    prompts, responses, off = zip(*seen, strict=True)
    assert len(seen) == 3 and max(off) < 1e-4
    assert prompts[0] != prompts[1] != prompts[2] != prompts[0]
    assert responses[0] == responses[1] == responses[2]


def test_each_pass_over_a_batch_reads_all_of_it_once(monkeypatch):
    config = nr.replace(FULL, epochs=3, minibatch=9, micro=4, updates=1)
    seen = []

    def objective(logp, value, b, denom, c):
        rows = torch.cat([b.prompt, b.logp[:, :4].detach()], 1)
        seen.append((rows.tolist(), float((logp - b.logp).detach().abs().max())))
        return 0.0 * logp.sum()  # nothing moves: every pass must find the ratio at 1

    grpo = nr.replace(nr.PPO_ARMS["grpo"], objective=objective)
    monkeypatch.setitem(nr.PPO_ARMS, "grpo", grpo)
    list(nr.denoise(started(config), TASK, config))
    assert all(off < 1e-4 for _, off in seen)
    rows = [row for part, _ in seen for row in part]
    passes = [rows[i : i + 24] for i in range(0, len(rows), 24)]
    assert len(passes) == 3 and sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1] != passes[2] != passes[0]  # each has an order of its own


def test_a_canvas_is_never_cut_behind_its_end():
    model, b = rolled()
    assert b.mask.sum(1).min() < 12  # some end early, and what follows is still read as MASK
    few = b.select(b.mask.sum(1).argsort()[:2])
    assert few.response.shape[1] == 12
    # written last: not the first places
    more = nr.branch(model, few, torch.full((2,), 6), 1, FULL, nr.rng(0, "more"))
    written = int((more.order >= 0).any(0).nonzero().max()) + 1
    assert more.select(torch.arange(2)).response.shape[1] >= written


# ---- states and continuations ------------------------------------------------------------------


@settings(max_examples=30)
@given(seed=st.integers(0, 999))
def test_t_is_a_pass_in_which_the_response_was_written(seed):
    _, b = rolled()
    t = nr.some_pass(b, nr.rng(seed, "t"))
    last = (b.order * b.mask).amax(1)
    assert (t >= 1).all() and (t <= last.clamp(min=1)).all()


def test_every_pass_but_the_first_is_drawn_as_often():
    _, b = rolled()
    row = int((b.order * b.mask).amax(1).argmax())
    last = int((b.order * b.mask)[row].max())
    many = b.select(torch.full((6000,), row))
    counts = nr.some_pass(many, nr.rng(0, "t")).bincount(minlength=last + 1)
    assert last > 3 and counts[0] == 0 and len(counts) == last + 1
    assert ((counts[1:] / 6000 - 1 / last).abs() < 4 * (1 / last / 6000) ** 0.5).all()


def test_the_first_of_a_tree_is_an_ordinary_sample_and_its_siblings_keep_its_state():
    model, b = rolled()
    tree = denoise.sample_tree(model, b.prompt, FULL, b.group, nr.rng(0, "tree"))
    trunk = nr.sample(model, b.prompt[::3], FULL, generator=nr.rng(0, "tree"))
    assert torch.equal(tree.response[::3], trunk.response)
    assert torch.equal(tree.order[::3], trunk.order)
    assert torch.equal(tree.group, b.group) and torch.equal(tree.prompt, b.prompt)
    assert len(tree.mask) == len(b.mask)
    assert torch.equal(tree.mask, nr.up_to_eos(tree.response, FULL))
    replay = nr.rng(0, "tree")
    nr.sample(model, b.prompt[::3], FULL, generator=replay)
    t = nr.some_pass(trunk, replay).repeat_interleave(3)[:, None]
    own = tree.response.view(-1, 3, 12)
    before = (tree.order < t).view(-1, 3, 12)
    assert torch.equal(before, before[:, :1].expand_as(before))
    assert (own == own[:, :1])[before].all() and not (own == own[:, :1])[~before].all()
    # one place a pass, none lost; 12 stands for places that were left open behind the end
    for order in tree.order.tolist():
        written = sorted(p for p in order if p < 12)
        assert written == list(range(len(written)))


def test_v_is_the_mean_reward_of_fresh_continuations_and_only_of_the_rows_asked(
    monkeypatch, no_penalty
):
    state, b = started(), rolled()[1]
    calls = []

    def last_id(task, rollout):
        calls.append(rollout)
        return rollout.response[:, -1].float()

    monkeypatch.setattr(nr, "grades", last_id)
    rows = torch.arange(len(b.mask)) % 4 == 1
    t, value = nr.prospects(state, TASK, b, rows, FULL)
    assert torch.equal(value.isnan(), ~rows)
    assert state.samples == 3 * int(rows.sum()) and len(calls) == 1
    more = calls[0]
    kept = nr.canvas_before(b.response, b.order, t, FULL)[rows].repeat_interleave(3, 0)
    assert torch.equal(more.response[kept != FULL.mask_id], kept[kept != FULL.mask_id])
    assert not torch.equal(more.response[0], more.response[1])  # fresh, not one of them three times
    next_place = (b.order == t[:, None])[rows].repeat_interleave(3, 0)
    old = b.response[rows].repeat_interleave(3, 0)
    # pass t itself is drawn again
    assert not torch.equal(more.response[next_place], old[next_place])
    ended = (more.response == FULL.eos_id).any(1)
    expected = (more.response[:, -1].float() * ended).view(-1, 3).mean(1)
    assert torch.allclose(value[rows], expected)
    later = nr.replace(state, update=1)
    assert not torch.equal(t, nr.prospects(later, TASK, b, rows, FULL)[0])  # drawn anew


def test_a_trajectory_says_what_was_seen_said_and_expected_before_every_pass(no_penalty):
    model, b = rolled()
    greedy = nr.replace(FULL, temperature=0.0, device="cpu")
    state = nr.start_ppo(model, greedy)
    found = nr.explain_denoising(state, Odd(1, 1), b, greedy)
    b = nr.sample(model, b.prompt, greedy)  # it answers the problems again, greedily
    assert len(found) == len(b.mask)
    assert [x["order"] for x in found] == b.order.tolist()
    for s in range(12):  # replay: what the sampler read before pass s
        canvas = nr.canvas_before(b.response, b.order, torch.full((len(b.mask),), s), FULL)
        logits = model(torch.cat([b.prompt, canvas], 1))[:, b.prompt.shape[1] - 1 : -1]
        logits[..., [FULL.pad_id, FULL.mask_id, FULL.bos_id]] = -torch.inf
        said = torch.where(canvas == FULL.mask_id, logits.argmax(-1), canvas)
        assert [x["said"][s] for x in found] == [TASK.decode(y) for y in said.tolist()]
        p = logits.softmax(-1).gather(-1, b.response[..., None])[..., 0]
        sure = torch.tensor([x["sure"] for x in found])  # three decimals
        assert torch.allclose(sure[b.order == s], p[b.order == s], rtol=0, atol=5.1e-4)
    ended = (b.response == FULL.eos_id).any(1)
    right = (nr.grades(Odd(1, 1), b) * ended).tolist()
    assert [x["value"] for x in found] == [[x] * 12 for x in right]  # greedy: no doubt
    assert all(len(x["said"]) == len(x["value"]) == len(x["sure"]) == 12 for x in found)


# ---- credits ------------------------------------------------------------------------------------

FOUR = torch.tensor([1.0, 1.0, 0.0, 0.0])
GROUP = torch.zeros(4, dtype=torch.long)


@given(v=st.floats(0, 1), right=st.integers(1, 3))
def test_a_right_answer_gets_1_plus_v_minus_2_mu_and_may_turn_negative(v, right):
    reward = (torch.arange(4) < right).float()
    value = torch.where(reward > 0, v, torch.nan)  # the others are never read
    got = nr.denoise_advantage(reward, value, GROUP, 1.0)
    mu = right / 4
    assert torch.allclose(got, torch.where(reward > 0, 1 + v - 2 * mu, -mu), atol=1e-6)
    if abs(v - (2 * mu - 1)) > 1e-6:
        assert (float(got[0]) < 0) == (v < 2 * mu - 1)
    plain = nr.group_advantage(reward, GROUP, "mean")
    assert torch.equal(nr.denoise_advantage(reward, value, GROUP, 0.0), plain)


def test_all_right_and_all_wrong_give_no_signal():
    nothing = torch.full((4,), torch.nan)
    for value in (0.0, 1.0):
        assert (nr.denoise_advantage(torch.full((4,), value), nothing, GROUP, 1.0) == 0).all()


def test_the_mean_bonus_of_right_answers_is_the_variance_of_v_over_its_mean():
    """V drawn for each state, r of it: E[D | r = 1] = Var(V) / mu."""
    g = nr.rng(0, "V")
    value = torch.rand(400_000, generator=g) ** 2
    reward = (torch.rand(400_000, generator=g) < value).float()
    group = torch.zeros(400_000, dtype=torch.long)
    got = nr.denoise_advantage(reward, value, group, 1.0)
    bonus = (got - nr.group_advantage(reward, group, "mean"))[reward > 0].mean()
    assert float(bonus) == pytest.approx(float(value.var() / value.mean()), rel=0.02)
    # without the indicator: nothing on average
    assert abs(float((value - reward.mean()).mean())) < 2e-3


@pytest.fixture
def credited(monkeypatch):
    """The advantages of a credit when V(x_t) and t are known; which rows it asked V for."""

    def credit(name, value, t, reward=FOUR, config=FULL):
        order = torch.arange(12).expand(4, -1)
        b = nr.Rollout(order, order, (order < 9).float(), order, GROUP)
        asked = []

        def known(state, task, b, rows, c):
            asked.append(rows)
            return torch.full((4,), t), torch.where(rows, value, torch.nan)

        monkeypatch.setattr(nr, "prospects", known)
        return nr.DENOISE_ARMS[name](None, TASK, b, reward, config), asked

    return credit


def test_segments_telescope_each_token_gets_its_own_stretch(credited):
    value = torch.tensor([0.75, 0.25, 0.5, 0.0])
    adv, asked = credited("segments", value, t=4)
    first, rest = adv[:, 0], adv[:, 8]
    assert torch.allclose(first, value - 0.5) and torch.allclose(rest, FOUR - value)
    assert torch.allclose(first + rest, FOUR - 0.5)  # together r - V(x_0): nothing is added
    assert (adv[:, :4] == first[:, None]).all()
    assert (adv[:, 4:9] == rest[:, None]).all() and (adv[:, 9:] == 0).all()
    assert asked[0].all()


def test_process_asks_for_right_answers_only_and_broadcasts_over_counted_tokens(credited):
    value = torch.tensor([1.0, 0.25, 0.5, 0.0])
    adv, asked = credited("process", value, t=4)
    assert asked[0].tolist() == [True, True, False, False]
    assert torch.allclose(adv[:, 0], torch.tensor([1.0, 0.25, -0.5, -0.5]))
    assert not adv.isnan().any()
    assert (adv[:, :9] == adv[:, :1]).all() and (adv[:, 9:] == 0).all()
    half, _ = credited("process", value, t=4, config=nr.replace(FULL, process_weight=0.5))
    assert torch.allclose(half[:2, 0], torch.tensor([0.75, 0.375]))
    plain, asked = credited("outcome", value, t=4)
    assert torch.allclose(plain[:, 0], FOUR - 0.5) and asked == [] and (plain[:, 9:] == 0).all()


def test_leave_one_out_and_no_indicator_on_numbers_done_by_hand(credited):
    value = torch.tensor([1.0, 0.25, 0.5, 0.0])
    alone, asked = credited("leave_one_out", value, t=4)  # V(x_0) of a right one: 1/3
    by_hand = torch.tensor([2 / 3 + 2 / 3, 2 / 3 - 1 / 12, -2 / 3, -2 / 3])
    assert torch.allclose(alone[:, 0], by_hand)
    assert asked[0].tolist() == [True, True, False, False]
    every, asked = credited("no_indicator", value, t=4)
    assert torch.allclose(every[:, 0], torch.tensor([1.0, 0.25, -0.5, -1.0])) and asked[0].all()


def test_shared_states_take_v_from_the_siblings_without_the_response_itself(credited):
    config = nr.replace(FULL, branches=2)
    reward = torch.tensor([1.0, 0.0, 1.0, 1.0])
    adv, asked = credited("shared", FOUR, t=4, reward=reward, config=config)
    # siblings (1, 0), (1, 1): V = 0, 1, 1, 1; the mean is 3/4
    assert torch.allclose(adv[:, 0], torch.tensor([0.25 - 0.75, -0.75, 0.5, 0.5])) and asked == []


def test_fixed_t_values_the_state_half_way_and_only_of_better_answers(monkeypatch, no_penalty):
    state, b = started(), rolled()[1]
    drawn, branch = [], nr.branch

    def watched(policy, b, t, *more):
        drawn.append((b, t, branch(policy, b, t, *more)))
        return drawn[-1][2]

    monkeypatch.setattr(nr, "branch", watched)
    reward = (b.response[:, 0] % 2).float()
    better = nr.group_advantage(reward, b.group, "mean") > 0
    assert 0 < better.sum() < len(better)
    adv = nr.DENOISE_ARMS["fixed_t"](state, Odd(1, 1), b, reward, FULL)
    ((some, t, more),) = drawn
    last = (b.order * b.mask).amax(1)[better]
    assert t.tolist() == [1 + n // 2 for n in last.tolist()] and len(set(t.tolist())) > 1
    assert torch.equal(some.response, b.response[better])
    ended = (more.response == FULL.eos_id).any(1)
    value = torch.full_like(reward, torch.nan)
    value[better] = (nr.grades(Odd(1, 1), more) * ended).view(-1, 3).mean(1)
    expected = nr.denoise_advantage(reward, value, b.group, FULL.process_weight)
    assert torch.allclose(adv, expected[:, None] * b.mask)
    assert state.samples == 3 * int(better.sum())


def behind_the_last(b, generator):
    """A pass at which nothing is left to write."""
    return (b.order * b.mask).amax(1) + 1


def test_branching_where_nothing_is_left_doubles_positive_advantages(monkeypatch, no_penalty):
    """If t lies behind the last pass, the continuation is the response itself, and D = A."""
    monkeypatch.setattr(nr, "some_pass", behind_the_last)
    config = nr.replace(FULL, branches=2)
    _, b = rolled(config)
    reward = (b.response[:, 0] % 2).float()
    assert 0 < reward.mean() < 1
    state = started(config)
    ended = (b.response == FULL.eos_id).any(1)
    reward = reward * ended
    t, value = nr.prospects(state, Odd(1, 1), b, ended, config)
    assert torch.equal(value[ended], reward[ended])
    base = nr.outcome(state, Odd(1, 1), b, reward, config)
    more = nr.process(state, Odd(1, 1), b, reward, config)
    assert torch.allclose(more, base + base.clamp(min=0))


# ---- the loop -----------------------------------------------------------------------------------


class Digits(Odd):
    """Its problems are single digits that a small vocabulary has."""

    def prompts(self, n, generator, split="train"):
        return ["3"] * n


def learned(estimate=nr.estimate_diffusion, seed=0, **more):
    """First and last line of a quick run: two places, paid for an odd id and an end."""
    # With 14 ids, up to the digit 7, and weights that prefer none of them, rewards are soon found.
    config = nr.replace(FULL, response=2, block=2, block_passes=2, prompts=16, updates=16, vocab=14)
    config = nr.replace(config, lr=2e-2, minibatch=48, seed=seed, **more)
    state = nr.start_ppo(nr.Transformer(config, nr.rng(seed, "init")), config)
    logs = list(nr.denoise(state, Digits(1, 1), config, estimate))
    return logs[0], logs[-1]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("arm", [*nr.DENOISE_ARMS])
def test_probe_every_credit_learns_what_is_paid(arm, seed, no_penalty):
    first, last = learned(arm=arm, seed=seed)
    assert first["reward"] < 0.2 and last["reward"] > 0.8
    extra = last["samples"] - 16 * 16 * 6
    assert extra == 0 if arm in ("outcome", "shared") else extra > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_probe_coupled_masks_learn_it_too(seed, no_penalty):
    assert learned(denoise.coupled, seed)[1]["reward"] > 0.8


def test_shared_groups_are_drawn_as_trees():
    config = nr.replace(FULL, arm="shared", updates=1)
    drawn = []

    def roll(*args, **more):
        drawn.append(denoise.sample_tree(*args, **more))
        return drawn[-1]

    assert len(list(nr.denoise(started(config), TASK, config, roll=roll))) == 1 and len(drawn) == 1


@pytest.mark.parametrize("loop", [nr.denoise, partial(denoise.denoise_masked, share=0.3)])
def test_micro_batches_change_nothing_but_rounding(loop):
    weights = []
    for micro in (5, 100):
        config = nr.replace(FULL, micro=micro, updates=2)
        state = started(config)
        list(loop(state, Odd(1, 1), config))
        weights.append(torch.cat([p.detach().flatten() for p in state.policy.parameters()]))
    before = torch.cat([p.detach().flatten() for p in started().policy.parameters()])
    assert torch.allclose(*weights, atol=1e-4)
    assert not torch.allclose(weights[0], before, atol=1e-4)  # though they have moved
