"""The denoising process reward: likelihood estimates, shared and fresh continuations, credits, the loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanoreward as nr
import train_small
from data.arithmetic import Arithmetic
from notebooks import denoise
from tests.conftest import TINY, rough

TASK = Arithmetic(1, 1)
# a canvas of 12 in three blocks of four, one token a pass
FULL = nr.replace(TINY, causal=False, response=12, branches=3, samples=6, denoise_prompts=4, mu=2)


class Odd(Arithmetic):
    """Right is what begins with an odd id, and then ends: what every policy can learn in seconds."""

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
    return nr.start_denoise(rough(config, seed), config)


# ---- estimates of the likelihood ---------------------------------------------------------------


def test_mean_field_sees_the_prompt_and_none_of_the_response():
    model, b = rolled()
    b.hidden = nr.hide(b, FULL, nr.rng(0, "h"))
    logp, states = nr.likelihood(model, b, FULL)
    for i in range(len(b.prompt)):  # one row at a time, without PAD, all places MASK
        prompt = b.prompt[i][b.prompt[i] != 0]
        ids = torch.cat([prompt, torch.full((12,), FULL.mask)])[None]
        logits = model(ids)[0, len(prompt) - 1 : -1]
        logits[:, [FULL.pad, FULL.mask]] = -torch.inf
        assert torch.allclose(logp[i], logits.log_softmax(-1)[range(12), b.response[i]], atol=1e-5)
    other = nr.replace(b, response=b.response.flip(0))
    assert torch.equal(nr.likelihood(model, other, FULL)[1], states)  # only what is scored differs


def test_half_of_coupled_is_each_token_beside_the_other_steps():
    model, b = rolled()
    b.hidden = nr.hide(b, FULL, nr.rng(0, "h"))
    P, expected = b.prompt.shape[1], torch.zeros_like(b.mask)
    for i in range(len(b.prompt)):
        for k in range(12):
            mine = b.order[i] % 2 == b.order[i, k] % 2
            canvas = torch.where(mine, FULL.mask, b.response[i])
            logits = model(torch.cat([b.prompt[i], canvas])[None])[0, P - 1 + k]
            logits[[FULL.pad, FULL.mask]] = -torch.inf
            expected[i, k] = 2 * logits.log_softmax(-1)[b.response[i, k]]
    got = 2 * denoise.coupled(model, b, FULL)[0] - nr.likelihood(model, b, FULL)[0]
    assert torch.allclose(got, expected, atol=1e-4)


@settings(max_examples=12)
@given(share=st.sampled_from([0.0, 0.15, 0.5]), seed=st.integers(0, 99))
def test_what_is_hidden_is_never_padding_or_bos_and_as_much_as_asked(share, seed):
    _, b = rolled(n=1)
    wide = nr.replace(b, prompt=torch.randint(0, 30, (2000, 9), generator=nr.rng(seed, "x")))
    hidden = nr.hide(wide, nr.replace(FULL, hide_prompt=share), nr.rng(seed, "h"))
    assert (
        hidden.shape == wide.prompt.shape and not hidden[wide.prompt < 2].any()
    )  # PAD is 0, BOS is 1
    assert abs(float(hidden[wide.prompt > 1].float().mean()) - share) < 0.02


@pytest.mark.parametrize("estimate", [nr.likelihood, denoise.coupled])
def test_the_ratio_is_one_under_the_same_mask_and_not_under_another(estimate):
    config = nr.replace(FULL, hide_prompt=0.5, mu=1, denoise_updates=1, minibatch=100)
    state = started(config)
    logs = list(nr.denoise(state, TASK, config, estimate))
    model, b = rolled(config)
    views = []
    for i in range(2):
        views.append(
            nr.annotate(
                state, nr.replace(b, hidden=nr.hide(b, config, nr.rng(0, "h", i))), config, estimate
            )
        )
    now = estimate(state["policy"], views[0], config)[0]
    assert torch.allclose(now, views[0].logp, atol=1e-5) and not torch.allclose(
        now, views[1].logp, atol=1e-2
    )
    assert logs[0]["clipfrac"] == 0.0 and logs[0]["kl"] == 0.0


def test_each_pass_over_a_batch_reads_the_log_probs_of_its_own_mask(monkeypatch):
    config, seen = (
        nr.replace(FULL, hide_prompt=0.5, mu=3, minibatch=100, micro=100, denoise_updates=1),
        [],
    )

    def objective(logp, value, b, denom, c):
        rows = torch.cat(
            [b.prompt, b.response, b.hidden], 1
        ).tolist()  # each pass has an order of its own
        seen.append((sorted(rows), float((logp - b.logp).detach().abs().max())))
        return 0.0 * logp.sum()  # nothing moves: every pass must find the ratio at 1

    monkeypatch.setattr(nr, "grpo_objective", objective)
    list(nr.denoise(started(config), TASK, config))
    assert len(seen) == 3 and all(off < 1e-4 for _, off in seen)
    assert seen[0][0] != seen[1][0] != seen[2][0] != seen[0][0]


def test_a_canvas_is_never_cut_behind_its_end():
    model, b = rolled()
    assert b.mask.sum(1).min() < 12  # some end early, and what follows is still read as MASK
    few = b[b.mask.sum(1).argsort()[:2]]
    assert few.response.shape[1] == 12
    more = nr.go_on(
        model, few, torch.full((2,), 6), 1, FULL, nr.rng(0, "more")
    )  # written last: not the first places
    written = int((more.order >= 0).any(0).nonzero().max()) + 1
    assert more[torch.arange(2)].response.shape[1] >= written


# ---- states and continuations ------------------------------------------------------------------


@settings(max_examples=30)
@given(low=st.integers(0, 20), high=st.integers(0, 20), seed=st.integers(0, 99))
def test_t_is_a_step_in_which_the_response_was_written(low, high, seed):
    low, high = min(low, high) / 20, max(low, high) / 20
    _, b = rolled()
    t = nr.some_step(b, nr.replace(FULL, earliest=low, latest=high), nr.rng(seed, "t"))
    last = (b.order * b.mask).amax(1)
    assert (t >= 1 + (low * last).long()).all() and (t <= 1 + (high * last).long()).all()
    assert (t <= last + 1).all() and (high == 1 or last.min() == 0 or (t <= last).all())


def test_the_first_of_a_tree_is_an_ordinary_sample_and_its_siblings_keep_its_state():
    model, b = rolled()
    generator = nr.rng(0, "tree")
    tree = denoise.sample_tree(model, b.prompt, FULL, b.group, generator)
    trunk = nr.sample(model, b.prompt[::3], FULL, generator=nr.rng(0, "tree"))
    assert torch.equal(tree.response[::3], trunk.response) and torch.equal(
        tree.order[::3], trunk.order
    )
    assert torch.equal(tree.group, b.group) and torch.equal(tree.prompt, b.prompt)
    assert len(tree.mask) == len(b.mask) and torch.equal(
        tree.mask, nr.up_to_eos(tree.response, FULL)
    )
    replay = nr.rng(0, "tree")
    nr.sample(model, b.prompt[::3], FULL, generator=replay)
    t = nr.some_step(trunk, FULL, replay).repeat_interleave(3)[:, None]
    own = tree.response.view(-1, 3, 12)
    before = (tree.order < t).view(-1, 3, 12)
    assert torch.equal(before, before[:, :1].expand_as(before))
    assert (own == own[:, :1])[before].all() and not (own == own[:, :1])[~before].all()
    assert ((tree.order.sort(1).values) == torch.arange(12)).all()  # one place a step, none lost


def test_v_is_the_mean_reward_of_fresh_continuations_and_only_of_the_rows_asked(monkeypatch):
    state, b = started(), rolled()[1]
    calls = []
    monkeypatch.setattr(
        nr, "grades", lambda task, rollout: calls.append(rollout) or rollout.response[:, -1].float()
    )
    rows = torch.arange(len(b.mask)) % 4 == 1
    t, value = nr.probe(state, TASK, b, rows, nr.replace(FULL, no_eos=0.0))
    assert (
        torch.equal(value.isnan(), ~rows)
        and state["samples"] == 3 * int(rows.sum())
        and len(calls) == 1
    )
    more = calls[0]
    kept = nr.state_at(b.response, b.order, t, FULL)[rows].repeat_interleave(3, 0)
    assert torch.equal(more.response[kept != FULL.mask], kept[kept != FULL.mask])
    assert not torch.equal(more.response[0], more.response[1])  # fresh, not one of them three times
    next_place = (b.order == t[:, None])[rows].repeat_interleave(3, 0)
    old = b.response[rows].repeat_interleave(3, 0)
    assert not torch.equal(
        more.response[next_place], old[next_place]
    )  # step t itself is drawn again
    ended = (more.response == FULL.eos).any(1)
    expected = (more.response[:, -1].float() * ended).view(-1, 3).mean(1)
    assert torch.allclose(value[rows], expected)
    assert not torch.equal(
        t, nr.probe(state | {"update": 1}, TASK, b, rows, FULL)[0]
    )  # t is drawn anew


def test_a_trajectory_says_what_was_seen_said_and_expected_before_every_step():
    model, b = rolled()
    state, greedy = (
        {"policy": model, "update": 0},
        nr.replace(FULL, temperature=0.0, no_eos=0.0, device="cpu"),
    )
    b = nr.sample(model, b.prompt, greedy)
    sure, said, value = train_small.trajectory(state, Odd(1, 1), b, greedy)
    assert (
        said.shape == (len(b.mask), 12, 12)
        and value.shape == said.shape[:2]
        and sure.shape == b.mask.shape
    )
    for s in range(12):  # replay: what the sampler read before step s
        canvas = nr.state_at(b.response, b.order, torch.full((len(b.mask),), s), FULL)
        logits = model(torch.cat([b.prompt, canvas], 1))[:, b.prompt.shape[1] - 1 : -1]
        logits[..., [FULL.pad, FULL.mask]] = -torch.inf
        assert torch.equal(said[:, s], torch.where(canvas == FULL.mask, logits.argmax(-1), canvas))
        p = logits.softmax(-1).gather(-1, b.response[..., None])[..., 0]
        assert torch.allclose(sure[b.order == s], p[b.order == s], atol=1e-5)
    ended = (b.response == FULL.eos).any(1)
    assert torch.equal(
        value, (nr.grades(Odd(1, 1), b) * ended)[:, None].expand(-1, 12)
    )  # greedy: no doubt


# ---- credits ------------------------------------------------------------------------------------

FOUR = torch.tensor([1.0, 1.0, 0.0, 0.0])
GROUP = torch.zeros(4, dtype=torch.long)


@given(v=st.floats(0, 1), right=st.integers(1, 3))
def test_a_right_answer_gets_1_plus_v_minus_2_mu_and_may_turn_negative(v, right):
    reward = (torch.arange(4) < right).float()
    branch = torch.where(reward > 0, v, torch.nan)  # the others are never read
    got = nr.denoise_advantage(reward, branch, GROUP, 1.0)
    mu = right / 4
    assert torch.allclose(got, torch.where(reward > 0, 1 + v - 2 * mu, -mu), atol=1e-6)
    if abs(v - (2 * mu - 1)) > 1e-6:
        assert (float(got[0]) < 0) == (v < 2 * mu - 1)
    assert torch.equal(
        nr.denoise_advantage(reward, branch, GROUP, 0.0), nr.group_advantage(reward, GROUP, "mean")
    )


def test_all_right_and_all_wrong_give_no_signal():
    nothing = torch.full((4,), torch.nan)
    for value in (0.0, 1.0):
        assert (nr.denoise_advantage(torch.full((4,), value), nothing, GROUP, 1.0) == 0).all()


def test_the_mean_bonus_of_right_answers_is_the_variance_of_v_over_its_mean():
    """V drawn for each state, r of it: E[D | r = 1] = Var(V) / mu (papers.md 3.3)."""
    g = nr.rng(0, "V")
    value = torch.rand(400_000, generator=g) ** 2
    reward = (torch.rand(400_000, generator=g) < value).float()
    group = torch.zeros(400_000, dtype=torch.long)
    got = nr.denoise_advantage(reward, value, group, 1.0)
    bonus = (got - nr.group_advantage(reward, group, "mean"))[reward > 0].mean()
    assert float(bonus) == pytest.approx(float(value.var() / value.mean()), rel=0.02)
    assert (
        abs(float((value - reward.mean()).mean())) < 2e-3
    )  # without the indicator: nothing on average


def credited(name, value, t, reward=FOUR, config=FULL):
    """The advantages of a credit when V(x_t) and t are known; which rows it asked V for."""
    order = torch.arange(12).expand(4, -1)
    b = nr.Rollout(order, order, (order < 9).float(), order, GROUP)
    asked = []

    def known(state, task, b, rows, c):
        asked.append(rows)
        return torch.full((4,), t), torch.where(rows, value, torch.nan)

    nr.probe, old = known, nr.probe
    try:
        return nr.CREDITS[name]({"update": 0}, TASK, b, reward, config), asked
    finally:
        nr.probe = old


def test_segments_telescope_each_token_gets_its_own_stretch():
    value = torch.tensor([0.75, 0.25, 0.5, 0.0])
    adv, asked = credited("segments", value, t=4)
    first, rest = adv[:, 0], adv[:, 8]
    assert torch.allclose(first, value - 0.5) and torch.allclose(rest, FOUR - value)
    assert torch.allclose(first + rest, FOUR - 0.5)  # together r - V(x_T): nothing is added
    assert (
        (adv[:, :4] == first[:, None]).all()
        and (adv[:, 4:9] == rest[:, None]).all()
        and (adv[:, 9:] == 0).all()
    )
    assert asked[0].all()


def test_process_asks_for_right_answers_only_and_broadcasts_over_counted_tokens():
    value = torch.tensor([1.0, 0.25, 0.5, 0.0])
    adv, asked = credited("process", value, t=4)
    assert asked[0].tolist() == [True, True, False, False]
    assert (
        torch.allclose(adv[:, 0], torch.tensor([1.0, 0.25, -0.5, -0.5])) and not adv.isnan().any()
    )
    assert (adv[:, :9] == adv[:, :1]).all() and (adv[:, 9:] == 0).all()
    half, _ = credited("process", value, t=4, config=nr.replace(FULL, process_weight=0.5))
    assert torch.allclose(half[:2, 0], torch.tensor([0.75, 0.375]))
    plain, asked = credited("outcome", value, t=4)
    assert torch.allclose(plain[:, 0], FOUR - 0.5) and asked == [] and (plain[:, 9:] == 0).all()


def test_leave_one_out_and_no_indicator_on_numbers_done_by_hand():
    value = torch.tensor([1.0, 0.25, 0.5, 0.0])
    alone, asked = credited("leave_one_out", value, t=4)  # V(x_T) of a right one: 1/3
    assert torch.allclose(
        alone[:, 0], torch.tensor([2 / 3 + 2 / 3, 2 / 3 - 1 / 12, -2 / 3, -2 / 3])
    )
    assert asked[0].tolist() == [True, True, False, False]
    every, asked = credited("no_indicator", value, t=4)
    assert torch.allclose(every[:, 0], torch.tensor([1.0, 0.25, -0.5, -1.0])) and asked[0].all()


def test_shared_states_take_v_from_the_siblings_without_the_response_itself():
    config = nr.replace(FULL, branches=2)
    adv, asked = credited(
        "shared", FOUR, t=4, reward=torch.tensor([1.0, 0.0, 1.0, 1.0]), config=config
    )
    # siblings (1, 0), (1, 1): V = 0, 1, 1, 1; the mean is 3/4
    assert torch.allclose(adv[:, 0], torch.tensor([0.25 - 0.75, -0.75, 0.5, 0.5])) and asked == []


def test_branching_where_nothing_is_left_doubles_positive_advantages():
    """earliest = latest = 1: t lies behind the last step, the continuation is the response itself, D = A."""
    config = nr.replace(FULL, earliest=1.0, latest=1.0, branches=2)
    model, b = rolled(config)
    reward = (b.response[:, 0] % 2).float()
    assert 0 < reward.mean() < 1
    state, config = started(config), nr.replace(config, no_eos=0.0)
    ended = (b.response == FULL.eos).any(1)
    reward = reward * ended
    t, value = nr.probe(state, Odd(1, 1), b, ended, config)
    assert torch.equal(value[ended], reward[ended])
    base = nr.outcome(state, Odd(1, 1), b, reward, config)
    assert torch.allclose(nr.process(state, Odd(1, 1), b, reward, config), base + base.clamp(min=0))


# ---- the loop -----------------------------------------------------------------------------------


def learned(estimate=nr.likelihood, **more):
    """First and last line of a quick run: two places, paid for an odd id and an end."""
    config = nr.replace(
        FULL,
        response=2,
        block=2,
        block_steps=2,
        denoise_prompts=16,
        denoise_updates=12,
        lr=2e-2,
        no_eos=0.0,
        minibatch=48,
        **more,
    )
    logs = list(nr.denoise(started(config), Odd(1, 1), config, estimate))
    return logs[0], logs[-1]


@pytest.mark.parametrize("credit", [*nr.CREDITS])
def test_probe_every_credit_learns_what_is_paid(credit):
    first, last = learned(credit=credit)
    assert first["reward"] < 0.2 and last["reward"] > 0.8
    extra = last["samples"] - 12 * 16 * 6
    assert extra == 0 if credit in ("outcome", "shared") else extra > 0


def test_probe_coupled_masks_learn_it_too():
    assert learned(denoise.coupled)[1]["reward"] > 0.8


def test_shared_groups_are_drawn_as_trees():
    config, drawn = nr.replace(FULL, credit="shared", denoise_updates=1), []
    roll = lambda *a, **k: drawn.append(denoise.sample_tree(*a, **k)) or drawn[-1]  # noqa: E731
    assert len(list(nr.denoise(started(config), TASK, config, roll=roll))) == 1 and len(drawn) == 1


def test_micro_batches_change_nothing_but_rounding():
    weights = []
    for micro in (5, 100):
        config = nr.replace(FULL, micro=micro, denoise_updates=2, hide_prompt=0.3)
        state = started(config)
        list(nr.denoise(state, Odd(1, 1), config))
        weights.append(torch.cat([p.detach().flatten() for p in state["policy"].parameters()]))
    assert torch.allclose(*weights, atol=1e-4) and not torch.equal(weights[0], torch.zeros(()))
