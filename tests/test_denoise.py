"""The denoising process reward: log-probs, shared and fresh continuations, credits, the loop."""

from itertools import product
from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanoreward as nr
import train_small as front
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
    b = nr.sample(model, prompt, config, group=group, generator=nr.rng(seed, "s"))
    # Its log-probs are known since it was written; here they are to be found again.
    return model, nr.replace(b, logp=None)


def started(config=FULL, seed=0):
    """A fresh state of the loop around a rough diffusion LM."""
    return nr.start_ppo(rough(config, seed), config)


@pytest.fixture
def no_penalty(monkeypatch):
    """A response without an end earns nothing, and costs nothing."""
    monkeypatch.setattr(nr, "NO_EOS", 0.0)


ESTIMATES = [
    nr.estimate_diffusion,
    denoise.mean_field,
    denoise.coupled,
    denoise.with_place,
    denoise.lower_bound,
]


# ---- estimates of the likelihood ---------------------------------------------------------------


def alone(model, prompt, canvas, config):
    """Log-probs (R, V) of one canvas, read without PAD and without other rows."""
    prompt = prompt[prompt != config.pad_id]
    logits = model(torch.cat([prompt, canvas])[None])[0, len(prompt) - 1 : -1] / config.temperature
    logits[:, [config.pad_id, config.mask_id, config.bos_id]] = -torch.inf
    return logits.log_softmax(-1)


# two tokens a pass, and a temperature
HOT = nr.replace(FULL, block_passes=2, temperature=0.7)


@pytest.mark.parametrize("config", [FULL, HOT])
def test_each_token_is_read_on_the_canvas_that_the_sampler_had_before_it(config):
    model, b = rolled(config)
    logp = nr.estimate_diffusion(model, b, config)[0].detach()
    assert torch.equal(logp == 0, b.mask == 0)
    for i in range(len(b.prompt)):
        for k in b.mask[i].nonzero()[:, 0].tolist():
            written = b.order[i] < b.order[i, k]
            canvas = torch.where(written, b.response[i], config.mask_id)
            expected = alone(model, b.prompt[i], canvas, config)[k, b.response[i, k]].detach()
            assert float(logp[i, k]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("config", [FULL, HOT])
def test_the_sampler_knows_the_log_probs_of_what_it_writes(config):
    model, b = rolled(config)
    found = nr.estimate_diffusion(model, b, config)[0]
    again = nr.sample(model, b.prompt, config, group=b.group, generator=nr.rng(0, "s"))
    assert torch.equal(again.response, b.response)
    assert torch.allclose(again.logp * b.mask, found, atol=1e-5) and found.min() < -0.1


def test_a_canvas_that_several_tokens_or_responses_share_is_read_once(monkeypatch):
    model, b = rolled()
    read = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids: read.append(ids) or hidden(ids))
    nr.estimate_diffusion(model, b, FULL)
    every = set()
    for i in range(len(b.prompt)):
        for k in b.mask[i].nonzero()[:, 0].tolist():
            canvas = torch.where(b.order[i] < b.order[i, k], b.response[i], FULL.mask_id)
            every.add((*b.prompt[i].tolist(), *canvas.tolist()))
    (ids,) = read
    assert sorted(map(tuple, ids.tolist())) == sorted(every)
    assert len(every) < int(b.mask.sum())


def test_tokens_without_a_rival_keep_the_log_prob_that_is_known():
    model, b = rolled()
    known = nr.estimate_diffusion(model, b, FULL)[0].detach()
    sure = (b.mask > 0) & (torch.rand(b.mask.shape, generator=nr.rng(0, "sure")) < 0.5)
    sure[0, 0] = False  # which is always read
    old = torch.where(sure, -0.01, known)  # 0.99005 of the probability
    again = nr.estimate_diffusion(model, nr.replace(b, logp=old), FULL)[0]
    assert torch.equal(again[sure], old[sure]) and sure.any()
    assert torch.allclose(again[~sure], known[~sure], atol=1e-5)
    doubtful = torch.where(sure, -0.0101, known)  # 0.98995
    again = nr.estimate_diffusion(model, nr.replace(b, logp=doubtful), FULL)[0]
    assert torch.allclose(again, known, atol=1e-5)


def test_where_no_token_has_a_rival_one_is_read():
    """So that there is always something to take a gradient of."""
    state, b = started(), rolled()[1]
    b.logp = torch.full_like(b.mask, -1e-3) * b.mask
    logp, _ = nr.estimate_diffusion(state.policy, b, FULL)
    logp.sum().backward()
    assert (logp != b.logp).nonzero().tolist() == [[0, 0]]
    assert any(p.grad.any() for p in state.policy.parameters())


def test_the_reference_reads_every_token_also_those_without_a_rival():
    state, b = started(), rolled()[1]
    other = rough(FULL, seed=1)
    state.reference = other
    expected = nr.estimate_diffusion(other, b, FULL)[0].detach()
    b.logp = torch.full_like(b.mask, -1e-3) * b.mask
    found = nr.annotate(state, b, FULL, nr.estimate_diffusion)
    assert torch.equal(found.logp, b.logp)
    assert torch.allclose(found.ref_logp, expected, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_responses_without_an_advantage_are_read_only_if_their_kl_counts(beta):
    model, b = rolled()
    config = nr.replace(FULL, beta=beta)
    known = nr.estimate_diffusion(model, b, config)[0].detach()
    b.logp = known - 0.5 * b.mask
    b.adv = b.mask * (b.group == 1)[:, None]
    read = nr.estimate_diffusion(model, b, config)[0] != b.logp
    expected = (b.mask > 0) if beta > 0 else (b.adv != 0)
    expected[0, 0] = True
    assert torch.equal(read, expected)


def test_mean_field_sees_the_prompt_and_none_of_the_response():
    model, b = rolled()
    logp, hidden = denoise.mean_field(model, b, FULL)
    for i in range(len(b.prompt)):
        every = alone(model, b.prompt[i], torch.full((12,), FULL.mask_id), FULL)
        expected = every[range(12), b.response[i]]
        expected = expected.masked_fill(b.response[i] == FULL.pad_id, 0.0)
        assert torch.allclose(logp[i], expected, atol=1e-5)
    other = nr.replace(b, response=b.response.flip(0))
    # only what is scored differs
    assert torch.equal(denoise.mean_field(model, other, FULL)[1], hidden)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_log_probs_of_all_that_a_pass_can_do_add_up_to_one(passes):
    """A block of three places, five tokens: every draw, and what the sampler does with it."""
    config = nr.replace(FULL, response=3, block=3, block_passes=passes, vocab=9, mask_id=3)
    model = nr.Transformer(config, nr.rng(0, "init"))
    prompt = torch.tensor([[4, 5]])
    canvas = torch.full((1, 3), config.mask_id)
    chances = alone(model, prompt[0], canvas[0], config).exp().detach()
    tokens = [v for v in range(9) if chances[0, v] > 0]
    n = nr.open_places(3, passes)[0] - nr.open_places(3, passes)[1]
    by_enumeration = {}
    for drawn in product(tokens, repeat=3):
        p = [float(chances[k, v]) for k, v in enumerate(drawn)]
        kept = tuple(sorted(sorted(range(3), key=lambda k: -p[k])[:n]))
        key = (kept, tuple(drawn[k] for k in kept))
        by_enumeration[key] = by_enumeration.get(key, 0.0) + p[0] * p[1] * p[2]
    assert sum(by_enumeration.values()) == pytest.approx(1, abs=1e-5)
    total = 0.0
    for (kept, ids), chance in by_enumeration.items():
        # the tokens of this pass; the others come later, and are not asked for
        response = torch.full((1, 3), tokens[0])
        response[0, list(kept)] = torch.tensor(ids)
        order = torch.ones(1, 3, dtype=torch.long)
        order[0, list(kept)] = 0
        mask = (order == 0).float()
        b = nr.Rollout(prompt, response, mask, order, torch.zeros(1, dtype=torch.long))
        logp = float(denoise.with_place(model, b, config)[0].detach().sum())
        assert logp == pytest.approx(log(chance), abs=1e-4)
        total = total + exp(logp)
    assert total == pytest.approx(1, abs=1e-4) and len(by_enumeration) > 5


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
    mean_field = denoise.mean_field(model, b, FULL)[0]
    got = 2 * denoise.coupled(model, b, FULL)[0] - mean_field
    assert torch.allclose(got, expected, atol=1e-4)


def test_two_bounds_read_each_block_forwards_and_backwards():
    model, b = rolled()  # 12 places in blocks of 4, one token a pass
    backwards = b.order.clone()
    for old, new in zip(range(12), (3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8), strict=True):
        backwards[b.order == old] = new
    each = []
    for order in (b.order, backwards):
        b_in_order = nr.replace(b, order=order, logp=None)
        each.append(nr.estimate_diffusion(model, b_in_order, FULL)[0])
    assert not torch.allclose(each[0], each[1], atol=1e-3)
    lower = (each[0] + each[1]) / 2
    upper = ((each[0].exp() + each[1].exp()) / 2).log()
    assert torch.allclose(denoise.lower_bound(model, b, FULL)[0], lower, atol=1e-5)
    b.adv = torch.where(b.group == 0, -1.0, 1.0)[:, None] * b.mask
    found = denoise.two_bounds(model, b, FULL)[0]
    assert torch.allclose(found[b.group == 0], (upper * b.mask)[b.group == 0], atol=1e-5)
    assert torch.allclose(found[b.group != 0], lower[b.group != 0], atol=1e-5)
    assert (upper >= lower - 1e-6).all() and (b.group == 0).any() and (b.group != 0).any()


def test_the_credit_of_two_bounds_leaves_the_first_ratio_at_one():
    config = nr.replace(FULL, epochs=1, updates=1, minibatch=100, arm="bounds")
    [log] = nr.denoise(started(config), TASK, config, denoise.two_bounds)
    assert log["clipfrac"] == 0.0 and log["kl"] == 0.0
    state, b = started(config), rolled(config)[1]
    b = nr.annotate(state, nr.replace(b, logp=None), config, denoise.two_bounds)
    before = b.logp
    reward = torch.arange(len(b.group)).float() % 3
    b.adv = denoise.credit_of_two_bounds(state, TASK, b, reward, config)
    assert torch.equal(b.adv, nr.outcome(state, TASK, b, reward, config))
    wrong = b.adv < 0
    assert (b.logp[wrong] > before[wrong]).any() and torch.equal(b.logp[~wrong], before[~wrong])
    now = denoise.two_bounds(state.policy, b, config)[0]
    assert torch.allclose(now, b.logp, atol=1e-5)


@pytest.mark.parametrize("estimate", ESTIMATES)
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


@pytest.mark.parametrize("estimate", ESTIMATES)
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


def test_a_canvas_is_never_cut_behind_its_end():
    model, b = rolled()
    assert b.mask.sum(1).min() < 12  # some end early, and what follows is still read as MASK
    few = b.select(b.mask.sum(1).argsort()[:2])
    assert few.response.shape[1] == 12
    # written last: not the first places
    one = nr.replace(FULL, branches=1)
    more = nr.same_canvas(
        nr.start_ppo(model, one), few, torch.full((2,), 6), one, nr.rng(0, "more")
    )
    written = int((more.order >= 0).any(0).nonzero().max()) + 1
    assert more.select(torch.arange(2)).response.shape[1] >= written


# ---- provers --------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(seed=st.integers(0, 999))
def test_t_is_a_pass_in_which_the_response_was_written_or_the_one_behind(seed):
    _, b = rolled()
    t = nr.some_pass(b, nr.rng(seed, "t"))
    last = (b.order * b.mask).amax(1)
    assert (t >= 1).all() and (t <= last + 1).all()


def test_every_canvas_but_the_empty_one_is_drawn_as_often():
    _, b = rolled()
    row = int((b.order * b.mask).amax(1).argmax())
    last = int((b.order * b.mask)[row].max())
    many = b.select(torch.full((6000,), row))
    counts = nr.some_pass(many, nr.rng(0, "t")).bincount(minlength=last + 2)
    n = last + 1
    assert last > 3 and counts[0] == 0 and len(counts) == last + 2
    assert ((counts[1:] / 6000 - 1 / n).abs() < 4 * (1 / n / 6000) ** 0.5).all()


@pytest.mark.parametrize("prover", [*nr.PROVERS])
def test_v_is_the_share_of_right_branches_and_only_of_the_rows_asked(monkeypatch, prover):
    state, b = started(), rolled()[1]
    config = nr.replace(FULL, prover=prover)
    calls = []

    def last_id(task, rollout):
        calls.append(rollout)
        return rollout.response[:, -1].float()

    monkeypatch.setattr(nr, "grades", last_id)
    rows = torch.arange(len(b.mask)) % 4 == 1
    t, value = nr.prospects(state, TASK, b, rows, config)
    assert torch.equal(value.isnan(), ~rows)
    each = 1 if prover == "at_once" else 3
    assert state.samples == each * int(rows.sum()) and len(calls) == 1
    # Only whether they are right counts: what never ends costs nothing here.
    expected = calls[0].response[:, -1].float().view(-1, each).mean(1)
    assert torch.allclose(value[rows], expected)
    later = nr.replace(state, update=1)
    assert not torch.equal(t, nr.prospects(later, TASK, b, rows, config)[0])  # drawn anew


def test_the_same_canvas_is_gone_on_with_in_fresh_ways():
    state, b = started(), rolled()[1]
    t = nr.some_pass(b, nr.rng(0, "t")).clamp(max=6)
    more = nr.same_canvas(state, b, t, FULL, nr.rng(0, "more"))
    kept = nr.canvas_before(b.response, b.order, t, FULL).repeat_interleave(3, 0)
    assert torch.equal(more.prompt, b.prompt.repeat_interleave(3, 0))
    assert torch.equal(more.response[kept != FULL.mask_id], kept[kept != FULL.mask_id])
    assert not torch.equal(more.response[0], more.response[1])  # fresh, not one of them three times
    next_place = (b.order == t[:, None]).repeat_interleave(3, 0)
    old = b.response.repeat_interleave(3, 0)
    # pass t itself is drawn again
    assert not torch.equal(more.response[next_place], old[next_place])
    assert torch.equal(more.group, b.group.repeat_interleave(3, 0))


@pytest.mark.parametrize("length", [1, 4, 5])
def test_a_short_tail_reads_what_is_written_close_together_and_a_few_masks(monkeypatch, length):
    """Never the old places: neither what stood open between tokens nor the rest of the canvas."""
    config = nr.replace(FULL, tail=length)
    state, b = started(config), rolled(config)[1]
    t = nr.some_pass(b, nr.rng(0, "t"))
    read = []
    unmask = nr.unmask

    def watched(model, prompt, canvas, c, uniform):
        read.append((prompt.clone(), canvas.clone()))
        return unmask(model, prompt, canvas, c, uniform)

    monkeypatch.setattr(nr, "unmask", watched)
    more = nr.short_tail(state, b, t, config, nr.rng(0, "more"))
    ((prompt, canvas),) = read
    assert canvas.shape == (3 * len(b.mask), length) and (canvas == config.mask_id).all()
    fresh = 0
    for i in range(len(more.mask)):
        row = i // 3
        begun = b.response[row][b.order[row] < t[row]].tolist()
        problem = nr.without(b.prompt[row].tolist(), config.pad_id)
        assert nr.without(prompt[i].tolist(), config.pad_id) == problem + begun
        assert more.prompt[i].tolist() == b.prompt[row].tolist()
        assert more.response[i, : len(begun)].tolist() == begun
        end = nr.without(more.response[i, len(begun) :].tolist(), config.pad_id)
        assert len(end) <= length
        fresh += i % 3 > 0 and not torch.equal(more.response[i], more.response[i - 1])
    assert fresh > 3
    gaps = [(b.order[i] < t[i]).int().diff().clamp(min=0).sum() for i in range(len(t))]
    assert max(gaps) > 0  # somewhere a token stands behind an open place
    assert torch.equal(more.mask, nr.up_to_eos(more.response, config))
    assert torch.equal(more.group, b.group.repeat_interleave(3, 0))


def test_what_a_short_tail_writes_is_what_the_model_expects_there():
    """One place left, one place missing: the chances of `unmask` on the joined text."""
    config = nr.replace(FULL, tail=1, branches=4000)
    model, b = rolled(config)
    state = nr.start_ppo(model, config)
    one = b.select(b.mask.sum(1).argmax()[None])
    p = torch.tensor([6])
    more = nr.short_tail(state, one, p, config, nr.rng(0, "more"))
    begun = one.response[0][one.order[0] < 6]
    text = torch.cat([begun, torch.tensor([config.mask_id])])
    chances = alone(model, one.prompt[0], text, config)[-1].exp().detach()
    counts = more.response[:, len(begun)].bincount(minlength=len(chances)) / 4000
    assert len(begun) == 6 and float((counts - chances).abs().max()) < 0.035


def test_a_trajectory_says_what_was_seen_said_and_expected_before_every_pass():
    model, b = rolled()
    greedy = nr.replace(FULL, temperature=0.0, device="cpu")
    state = nr.start_ppo(model, greedy)
    found = nr.explain_denoising(state, Odd(1, 1), b, greedy)
    b = nr.sample(model, b.prompt, greedy)  # it answers the problems again, greedily
    assert len(found) == len(b.mask)
    assert [x["order"] for x in found] == b.order.tolist()
    passes = [1 + int(order[mask > 0].max()) for order, mask in zip(b.order, b.mask, strict=True)]
    assert max(passes) == 12 > min(passes)
    for s in range(12):  # replay: what the sampler read before pass s
        canvas = nr.canvas_before(b.response, b.order, torch.full((len(b.mask),), s), FULL)
        logits = model(torch.cat([b.prompt, canvas], 1))[:, b.prompt.shape[1] - 1 : -1]
        logits[..., [FULL.pad_id, FULL.mask_id, FULL.bos_id]] = -torch.inf
        said = torch.where(canvas == FULL.mask_id, logits.argmax(-1), canvas)
        for x, y, own in zip(found, said.tolist(), passes, strict=True):
            assert s >= own or x["said"][s] == TASK.decode(y)
        p = logits.softmax(-1).gather(-1, b.response[..., None])[..., 0]
        sure = torch.tensor([x["sure"] for x in found])  # three decimals
        assert torch.allclose(sure[b.order == s], p[b.order == s], rtol=0, atol=5.1e-4)
    right = nr.grades(Odd(1, 1), b).tolist()
    texts = nr.texts_of(TASK, b.response, b.mask)
    for x, truth, text, own in zip(found, right, texts, passes, strict=True):
        assert x["prospects"] == [truth] * own  # greedy: no doubt
        assert x["branches"] == [[(text, truth == 1)] * greedy.branches] * own
        assert len(x["said"]) == own and len(x["sure"]) == 12


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


def test_progress_is_measured_against_the_share_of_right_answers_of_the_group():
    """Not against the mean reward, in which a response without an end counts -1."""
    reward = torch.tensor([1.0, 0.0, -1.0, 0.0])
    got = nr.denoise_advantage(reward, torch.full((4,), 0.75), GROUP, 1.0)
    assert torch.allclose(got, torch.tensor([1.0 + 0.75 - 0.25, 0.0, -1.0, 0.0]))


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

    def credit(name, value, t, reward=FOUR, config=FULL, group=GROUP):
        order = torch.arange(12).expand(len(reward), -1)
        b = nr.Rollout(order, order, (order < 9).float(), order, group)
        asked = []

        def known(state, task, b, rows, c):
            asked.append(rows)
            return torch.full(rows.shape, t), torch.where(rows, value, torch.nan)

        monkeypatch.setattr(nr, "prospects", known)
        return nr.DENOISE_ARMS[name](started(), TASK, b, reward, config), asked

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


def test_the_controls_on_numbers_done_by_hand(credited):
    value = torch.tensor([1.0, 0.25, 0.5, 0.0])  # D is 1/2 and -1/4, A is 1/2
    for name, first, second in (
        ("constant", 0.625, 0.625),
        ("right_more", 0.75, 0.75),
        ("right_only", 0.5, 0.5),
    ):
        adv, asked = credited(name, value, t=4)
        wrong = 0.0 if name == "right_only" else -0.5
        assert torch.allclose(adv[:, 0], torch.tensor([first, second, wrong, wrong]))
        assert (adv[:, :9] == adv[:, :1]).all() and (adv[:, 9:] == 0).all()
        assert [rows.tolist() for rows in asked] in ([], [[True, True, False, False]])


def test_a_control_keeps_the_accuracy_that_each_response_is_compared_with(credited):
    """Only V goes astray. A response without an end counts -1 in the reward, 0 in the accuracy."""
    group = torch.tensor([0, 0, 1, 1, 1, 1])
    reward = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, -1.0])  # A is 1/2 and 1, accuracy 1/2 and 1/4
    value = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])

    def of_right_ones(name, **more):
        adv, _ = credited(name, value, t=4, reward=reward, group=group, **more)
        return tuple(adv[[0, 2], 0].tolist())

    assert of_right_ones("process") == (1.0, 0.75)
    assert of_right_ones("constant") == (0.5, 1.25)
    seen = {of_right_ones("shuffled", config=nr.replace(FULL, seed=seed)) for seed in range(9)}
    assert seen == {(1.0, 0.75), (0.0, 1.75)}


def test_shuffled_gives_each_number_to_a_right_answer(credited):
    value = torch.tensor([1.0, 0.25, 0.5, 0.0])
    seen = set()
    for seed in range(9):
        config = nr.replace(FULL, seed=seed)
        adv, _ = credited("shuffled", value, t=4, config=config)
        seen.add(tuple(adv[:, 0].tolist()))
    assert seen == {(1.0, 0.25, -0.5, -0.5), (0.25, 1.0, -0.5, -0.5)}


def test_own_measures_progress_against_what_the_prover_makes_of_the_empty_canvas(
    credited, monkeypatch
):
    """Three responses are right. The prover ends 1, 0 and 0 of their empty canvases well."""
    asked = []

    def prover(state, b, p, c, generator):
        asked.append(p)
        response = torch.tensor([[3], [2], [2]])  # Odd pays for an odd id
        return nr.Rollout(b.prompt, response, torch.ones(3, 1), response, b.group)

    monkeypatch.setitem(nr.PROVERS, "short_tail", prover)
    monkeypatch.setattr(nr, "grades", lambda task, b: (b.response[:, 0] % 2).float())
    reward = torch.tensor([1.0, 1.0, 1.0, 0.0])
    value = torch.tensor([1.0, 1 / 3, 2 / 3, 0.0])  # and 1/3 at the start
    config = nr.replace(FULL, branches=1)
    adv, _ = credited("own", value, t=4, reward=reward, config=config)
    assert torch.allclose(adv[:, 0], torch.tensor([0.25 + 2 / 3, 0.25, 0.25 + 1 / 3, -0.75]))
    assert (adv[:, :9] == adv[:, :1]).all() and (adv[:, 9:] == 0).all()
    assert len(asked) == 1 and (asked[0] == 0).all()
    seen = set()
    for seed in range(30):
        one = nr.replace(config, seed=seed)
        other, _ = credited("own_shuffled", value, t=4, reward=reward, config=one)
        seen.add(tuple(round(x, 4) for x in other[:3, 0].tolist()))
    assert len(seen) == 6 and all(sum(x) == pytest.approx(1.75, abs=1e-3) for x in seen)


def test_paid_adds_the_prospects_of_right_answers_to_the_reward(credited):
    value = torch.tensor([1.0, 0.25, 0.5, 0.0])  # rewards 2, 1 1/4, 0 and 0
    told = (1.1875, 0.4375, -0.8125, -0.8125)
    adv, asked = credited("paid", value, t=4)
    assert adv[:, 0].tolist() == list(told)
    assert [rows.tolist() for rows in asked] == [[True, True, False, False]]
    assert (adv[:, :9] == adv[:, :1]).all() and (adv[:, 9:] == 0).all()
    seen = set()
    for seed in range(9):
        other, _ = credited("paid_shuffled", value, t=4, config=nr.replace(FULL, seed=seed))
        seen.add(tuple(other[:, 0].tolist()))
    assert seen == {told, (0.4375, 1.1875, -0.8125, -0.8125)}
    none, _ = credited("paid", value, t=4, reward=torch.zeros(4))
    assert (none == 0).all()


def test_short_answers_are_paid_more_without_a_prover(credited):
    adv, asked = credited("short", torch.zeros(4), t=4)  # 3 of 12 places are free
    assert adv[:, 0].tolist() == [0.75, 0.75, -0.75, -0.75] and asked == []
    assert (adv[:, 9:] == 0).all()


@pytest.mark.parametrize("seeds", [[0], [0, 1], [3]])
def test_tables_and_picture_of_a_few_seeds(seeds, tmp_path, monkeypatch):
    """What a reader has who runs some arms with some seeds, `tail` with others than the rest."""
    monkeypatch.setattr(denoise, "OUT", tmp_path / "denoise.json")
    few = denoise.read_arms(denoise.ROOT / "notebooks" / "results" / "denoise.json")
    del few["mean_field"]
    for arm, told in few.items():
        chosen = seeds if arm == "tail" else [0, 1]
        told["seeds"] = [job for job in told["seeds"] if job["seed"] in chosen]
    greedy = list(denoise.by_seed(few, "tail", "greedy").values())
    assert len(greedy) == len(seeds)
    shown = next(x for x in denoise.tables(few).split("\n") if denoise.TITLES["tail"] in x)
    assert f"| {front.interval(greedy)} |" in shown
    assert ("|  |" in shown) == (seeds == [3])  # there the outcome has no such seed
    pytest.importorskip("matplotlib")
    denoise.picture(few)
    assert (tmp_path / "denoise.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_said_of_prospects_is_without_the_noise_of_tries():
    """True prospects of 0.2 or 0.8, eight tries each."""
    generator = nr.rng(0, "tries")
    group = torch.arange(80_000) // 8
    prospects = 0.2 + 0.6 * (torch.rand(80_000, generator=generator) < 0.5).float()
    reward = torch.bernoulli(prospects, generator=generator)
    value = torch.bernoulli(prospects[:, None].expand(-1, 8), generator=generator).mean(1)
    found = denoise.about_prospects(value, 8, reward, group)
    assert found["V"] == pytest.approx(0.5, abs=0.01)
    assert found["spread"] == pytest.approx(0.3, abs=0.005)
    # covariance 0.09, deviations 0.3 and 0.5
    assert found["with A"] == pytest.approx(0.6, abs=0.01)
    assert found["A"] == pytest.approx(1 - (1 + 7 * 0.5) / 8, abs=0.01)
    # V of a right one is 0.68; of its group it is one of eight, the others are right in 0.5
    assert found["D"] == pytest.approx(0.68 - (1 + 7 * 0.5) / 8, abs=0.01)
    assert denoise.about_prospects(prospects, 1, reward, group)["spread"] == pytest.approx(
        0.3, abs=5e-3
    )


def test_prospects_that_are_alike_have_no_spread_and_no_correlation():
    reward, group = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.zeros(4, dtype=torch.long)
    found = denoise.about_prospects(torch.full((4,), 0.5), 8, reward, group)
    assert found == {"V": 0.5, "spread": 0.0, "with A": 0.0, "A": 0.5, "D": 0.0}


def test_fewer_passes_are_told_by_how_many_a_block_has():
    config = nr.replace(FULL, block=3, block_passes=3)
    found = {k: (x.block, x.block_passes) for k, x in denoise.fewer(config).items()}
    assert found == {"3": (3, 3), "2": (3, 2), "1": (3, 1), "1/2": (6, 1)}


def test_only_the_process_reward_makes_room_for_branches():
    config = nr.DenoiseConfig(prompts=2, samples=3, branches=5)
    assert config.responses_at_once() == 6
    assert nr.replace(config, arm="process").responses_at_once() == 30


def test_equal_canvases_are_read_once_and_in_parts(monkeypatch):
    model = started().policy
    seen = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids: seen.append(len(ids)) or hidden(ids))
    prompt = torch.tensor([[5], [6], [5], [7], [6]])
    canvas = torch.tensor([[8, 9], [8, 9], [8, 9], [8, 9], [9, 9]])
    found, which = nr.read_once(model, prompt, canvas, 3)
    assert seen == [3, 1] and found.shape[:2] == (4, 2) and which[0] == which[2]
    whole = nr.response_part(hidden(torch.cat([prompt, canvas], dim=1)), 1)
    assert torch.allclose(found[which], whole, atol=1e-5)
    nr.read_once(model, prompt, canvas)
    assert seen == [3, 1, 4]


def test_answers_at_once_open_what_is_written_late_by_either_clock(monkeypatch):
    """Of 12 passes, or of those up to the last token that counts."""
    order = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]] * 2)
    mask = torch.tensor([[1.0] * 12, [1.0] * 4 + [0.0] * 8])
    b = nr.Rollout(order, torch.full_like(order, 7), mask, order, GROUP[:2])
    still_open = []

    def at_once(policy, prompt, canvas, c):
        still_open.append((canvas == c.mask_id).sum(1).tolist())
        return torch.stack([torch.full((12,), 3), torch.full((12,), 2)])

    monkeypatch.setattr(nr, "fill_at_once", at_once)
    config = nr.replace(FULL, block=4, block_passes=4)
    found = denoise.answers_at_once(started(config), Odd(1, 1), b, config)
    assert still_open[:5] == [[9, 9], [8, 8], [6, 6], [4, 4], [3, 3]]
    assert still_open[5:] == [[9, 11], [8, 10], [6, 10], [4, 10], [3, 9]]
    assert set(found) == {"answer after", "answer after, own passes"}
    assert all(list(each.values()) == [0.5] * 5 for each in found.values())


def test_no_indicator_on_numbers_done_by_hand(credited):
    value = torch.tensor([1.0, 0.25, 0.5, 0.0])
    every, asked = credited("no_indicator", value, t=4)
    assert torch.allclose(every[:, 0], torch.tensor([1.0, 0.25, -0.5, -1.0])) and asked[0].all()


def behind_the_last(b, generator):
    """A pass at which nothing is left to write."""
    return (b.order * b.mask).amax(1) + 1


def test_branching_where_nothing_is_left_doubles_positive_advantages(monkeypatch, no_penalty):
    """If t lies behind the last pass, the continuation is the response itself, and D = A."""
    monkeypatch.setattr(nr, "some_pass", behind_the_last)
    config = nr.replace(FULL, branches=2, prover="same_canvas")
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


FREE = ("outcome", "right_more", "right_only", "short", "bounds")
# Where wrong answers get D too, its mean has to be zero, so that the policy has to be its own
# prover. And where no answer is right at first, as with seed 1, its noise is all that they follow.
FOR_ALL = ("segments", "no_indicator")


@pytest.mark.parametrize(
    "arm, seed",
    [(arm, seed) for arm in nr.DENOISE_ARMS for seed in range(1 + (arm in ("outcome", "process")))],
)
def test_probe_every_credit_learns_what_is_paid(arm, seed, no_penalty):
    prover = "same_canvas" if arm in FOR_ALL else "short_tail"
    first, last = learned(arm=arm, seed=seed, prover=prover)
    assert first["reward"] < 0.2 and last["reward"] > 0.7
    extra = last["samples"] - 16 * 16 * 6
    assert extra == 0 if arm in FREE else extra > 0


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_probe_every_likelihood_learns_it_too(estimate, no_penalty):
    assert learned(estimate, seed=0)[1]["reward"] > 0.8
