"""The GPT, its sampler, log-probs, and statistics of the tokens that count."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanoreward as nr
from tests.conftest import TINY, golden, random_batch, rough, tensors

# ---- model -------------------------------------------------------------------------------------


def test_a_later_token_never_changes_an_earlier_one_and_bidirectional_sees_it(model):
    ids = random_batch(TINY)[0]
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1).clamp(min=6) % 32
    assert torch.equal(model(ids)[:, :-1], model(changed)[:, :-1])
    both = rough(nr.replace(TINY, causal=False))
    assert (both(ids)[:, 0] - both(changed)[:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        dict(heads=4, kv_heads=2, head_dim=8, family="qwen2"),
        dict(heads=4, kv_heads=2, head_dim=8, family="qwen3"),
    ],
)
def test_padding_in_front_changes_nothing(causal, shape):
    model = rough(nr.replace(TINY, causal=causal, layers=2, **shape))
    ids = torch.tensor([[1, 9, 12, 8, 11]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    assert (model(ids) - model(padded)[:, 3:]).abs().max() < 1e-5
    assert model(padded).isfinite().all()


def test_cache_gives_the_logits_of_a_full_pass():
    model = rough(nr.replace(TINY, layers=2, heads=4, kv_heads=2, head_dim=8))
    ids, _ = random_batch(TINY, P=9)
    cache = nr.Cache(model.config, len(ids), 9, model.lm_head.weight)
    pieces = [model.hidden(ids[:, a:b], cache) for a, b in [(0, 5), (5, 6), (6, 9)]]
    real = (ids != 0)[..., None]
    assert ((torch.cat(pieces, 1) - model.hidden(ids)) * real).abs().max() < 1e-5


SHARED = [1, *(int(i) for i in torch.arange(4, 24))]


def prompts_that_begin_alike():
    """(3, 25): rows of several lengths behind the same 21 tokens, padded on the left."""
    rows = [SHARED + [9], SHARED + [9, 12], SHARED + [30, 9, 8, 11]]
    return nr.left_pad(rows, TINY.pad_id)


@given(
    shared=st.lists(st.integers(1, 5), min_size=0, max_size=40),
    ends=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_beginning_and_rest_are_the_rows_again(shared, ends):
    rows = [shared + end for end in ends]
    ids = nr.left_pad(rows, 0)
    beginning, rest = nr.split_beginning(ids, 0)
    assert beginning.numel() == 0 or beginning.shape[1] >= nr.WORTH_SHARING
    assert (beginning.numel() > 0) or len(shared) < nr.WORTH_SHARING
    for row, left in zip(rows, rest.tolist(), strict=True):
        kept = [i for i in left if i != 0]
        assert kept
        assert left[-1] != 0
        assert beginning[0].tolist() + kept == row


@pytest.mark.parametrize(
    "shape", [{}, {"family": "qwen3", "heads": 4, "kv_heads": 2, "head_dim": 8}]
)
def test_a_shared_beginning_is_read_once_with_the_same_vectors_and_gradients(shape, monkeypatch):
    model = rough(nr.replace(TINY, layers=2, **shape))
    prompt = prompts_that_begin_alike()
    response = torch.tensor([[7, 2, 0], [8, 9, 2], [6, 0, 0]])
    read = []
    whole = model.hidden

    def count(ids, cache=None):
        read.append(tuple(ids.shape))
        return whole(ids, cache)

    monkeypatch.setattr(model, "hidden", count)
    weight = torch.linspace(-1, 1, model.config.width)
    found = []
    for least in (10**9, nr.WORTH_SHARING):
        monkeypatch.setattr(nr, "WORTH_SHARING", least)
        hidden = nr.predictive_hidden(model, prompt, response)
        model.zero_grad()
        ((hidden * weight).sum(-1) * (response != 0)).sum().backward()
        found.append(
            [hidden[response != 0].detach()]
            + [p.grad for p in model.parameters() if p.grad is not None]
        )
    assert read == [(3, 28), (1, 21), (3, 7)]
    assert len(found[0]) == len(found[1]) > 10
    for x, y in zip(*found, strict=True):
        assert (x - y).abs().max() <= 1e-4 * max(1.0, float(x.abs().max()))


def test_greedy_responses_behind_a_shared_beginning_are_those_of_whole_prompts(monkeypatch):
    model = rough(nr.replace(TINY, layers=2))
    prompt = prompts_that_begin_alike()
    c = nr.replace(TINY, temperature=0.0, response=9)
    behind = nr.sample(model, prompt, c)
    monkeypatch.setattr(nr, "WORTH_SHARING", 10**9)
    assert torch.equal(behind.response, nr.sample(model, prompt, c).response)
    assert len(behind.response.unique()) > 3


def test_a_model_that_looks_ahead_shares_no_beginning():
    model = rough(nr.replace(TINY, layers=2, causal=False))
    prompt = prompts_that_begin_alike()
    response = torch.tensor([[7, 2, 3], [8, 9, 2], [6, 3, 3]])
    plain = nr.response_part(model.hidden(torch.cat([prompt, response], 1)), prompt.shape[1])
    assert torch.equal(nr.predictive_hidden(model, prompt, response), plain)


def test_tied_output_is_the_embedding_and_a_fresh_block_is_the_identity():
    model = nr.Transformer(nr.replace(TINY, tied=True), nr.rng(0, "init"))
    assert model.lm_head.weight is model.embed_tokens.weight
    x = torch.randn(2, 3, TINY.width)
    cos, sin = nr.rope(torch.arange(3)[None].expand(2, 3), TINY)
    assert torch.equal(model.layers[0](x, cos, sin, None, None), x)


def test_rotary_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, TINY.head_dim)

    def score(i, j):
        query = nr.rotate(q, *nr.rope(torch.tensor([[i]]), TINY))
        key = nr.rotate(k, *nr.rope(torch.tensor([[j]]), TINY))
        return float((query * key).sum())

    assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_frozen_copy_is_equal_separate_and_has_no_gradient(model):
    copy = nr.frozen_copy(model)
    pairs = zip(model.parameters(), copy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(p.requires_grad for p in copy.parameters())
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not torch.equal(next(model.parameters()), next(copy.parameters()))


# ---- log-probs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_probabilities_of_all_next_tokens_sum_to_one(model, temperature):
    """The sum over v of p(v at position k) is 1 only if the shift is right."""
    prompt, response = random_batch(TINY, B=1)
    for k in range(3):
        rows = response.repeat(TINY.vocab, 1)
        rows[:, k] = torch.arange(TINY.vocab)
        logp = nr.token_logprobs(model, prompt.repeat(TINY.vocab, 1), rows, temperature)[:, k]
        keep = [v for v in range(TINY.vocab) if v not in (TINY.pad_id, TINY.mask_id)]
        assert float(logp[keep].exp().sum().detach()) == pytest.approx(1, abs=1e-5)
        # PAD, the other forbidden id, is not scored at all: its log-prob is 0.
        assert logp[TINY.mask_id] == -math.inf


@torch.no_grad()
def test_logprobs_are_those_of_a_pass_over_each_prefix(model):
    prompt, response = random_batch(TINY)
    logp = nr.token_logprobs(model, prompt, response, 0.7)
    for i in range(len(prompt)):
        ids = [t for t in prompt[i].tolist() if t != TINY.pad_id]
        for k, token in enumerate(response[i].tolist()):
            if token == TINY.pad_id:
                assert logp[i, k] == 0
                continue
            logits = model(torch.tensor([ids]))[0, -1] / 0.7
            logits[[TINY.pad_id, TINY.mask_id, TINY.bos_id]] = -math.inf
            expected = float(logits.log_softmax(-1)[token])
            assert float(logp[i, k]) == pytest.approx(expected, abs=1e-4)
            ids.append(token)


@given(st.integers(0, 10_000), st.integers(0, 4), st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_logprobs_ignore_padding_batch_order_and_batch_company(seed, left, right):
    model = rough(TINY, seed)
    prompt, response = random_batch(TINY, seed=seed)
    logp = nr.token_logprobs(model, prompt, response, 1.0)
    wide_prompt = torch.nn.functional.pad(prompt, (left, 0))
    wide_response = torch.nn.functional.pad(response, (0, right))
    wide = nr.token_logprobs(model, wide_prompt, wide_response, 1.0)
    assert (wide[:, : response.shape[1]] - logp).abs().max() < 1e-4
    order = torch.randperm(len(prompt), generator=nr.rng(seed, "order"))
    mixed = nr.token_logprobs(model, prompt[order], response[order], 1.0)
    assert (mixed - logp[order]).abs().max() < 1e-4
    alone = nr.token_logprobs(model, prompt[2:3], response[2:3], 1.0)
    assert (alone - logp[2:3]).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_trl_selective_log_softmax(temperature):
    record = golden("trl1")[f"selective_log_softmax_temperature_{temperature}"]
    (logits,) = tensors(record, "logits")
    index = torch.tensor(record["inputs"]["index"])
    V = logits.shape[-1]
    config = nr.replace(TINY, vocab=V + 2, pad_id=V, bos_id=V, mask_id=V + 1)
    # Two forbidden ids come behind the others. If they counted, it would be loud.
    logits = torch.nn.functional.pad(logits, (0, 2), value=3.0)
    mine = nr.log_softmax(logits, temperature, config).gather(-1, index[..., None])[..., 0]
    assert (mine - torch.tensor(record["output"]["logp"])).abs().max() < 1e-6


def test_mask_counts_up_to_and_including_the_first_eos():
    response = torch.tensor([[7, 2, 0, 0], [2, 0, 0, 0], [7, 8, 9, 7], [7, 2, 2, 9]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert nr.up_to_eos(response, TINY).tolist() == expected


# ---- sampler -----------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_batch(model, monkeypatch):
    prompt, _ = random_batch(TINY, B=12)
    many = nr.sample(model, prompt, TINY, generator=nr.rng(1, "s"))
    uniform = torch.rand(12, TINY.response, dtype=torch.float64, generator=nr.rng(1, "s"))
    for rows in ([0], [5, 3], list(range(11, -1, -1))):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *a, **k: uniform[rows])
            few = nr.sample(model, prompt[rows], TINY)
        assert torch.equal(few.response, many.response[rows])
        assert torch.equal(few.order, many.order[rows])


def test_samplers_own_probabilities_are_token_logprobs(model):
    """What was drawn at each place has the frequency that token_logprobs says."""
    config = nr.replace(TINY, response=2, temperature=0.8)
    prompt = torch.tensor([[1, 9, 12, 8, 11]]).repeat(4000, 1)
    rollout = nr.sample(model, prompt, config, generator=nr.rng(0, "s"))
    pairs, count = torch.unique(rollout.response, dim=0, return_counts=True)
    p = nr.token_logprobs(model, prompt[: len(pairs)], pairs, 0.8).sum(1).exp()
    error = (count / 4000 - p).abs() / (p * (1 - p) / 4000).sqrt().clamp(min=1e-3)
    common = p > 0.005
    assert common.sum() > 5
    # With 5 standard errors and at most 200 cells one run in about 10,000 gives a false alarm.
    assert error[common].max() < 5


def test_mask_and_pad_are_never_produced_even_from_random_weights():
    for seed in range(3):
        model = rough(TINY, seed)
        with torch.no_grad():
            loud = model.lm_head.weight.sum(0) * 5
            model.lm_head.weight[[TINY.pad_id, TINY.mask_id]] = loud
        rollout = nr.sample(model, random_batch(TINY, B=60)[0], TINY, generator=nr.rng(seed, "s"))
        assert (rollout.response != TINY.mask_id).all()
        assert torch.equal(rollout.response != TINY.pad_id, rollout.mask.bool())


def test_greedy_is_argmax_of_a_full_pass_and_needs_no_generator(model):
    config = nr.replace(TINY, temperature=0)
    prompt, _ = random_batch(TINY)
    a, b = (nr.sample(model, prompt, config, generator=g) for g in (None, nr.rng(3, "s")))
    assert torch.equal(a.response, b.response)
    logits = nr.response_part(model(torch.cat([prompt, a.response], 1)), prompt.shape[1])
    best = nr.log_softmax(logits, 1.0, TINY).argmax(-1)
    assert torch.equal(best[a.mask > 0], a.response[a.mask > 0])


def test_a_prefix_is_kept_and_gone_on_from(model):
    prompt, _ = random_batch(TINY, B=12)
    full = nr.sample(model, prompt, TINY, generator=nr.rng(0, "s"))
    again = nr.sample(model, prompt, TINY, start=full.response.clone(), generator=nr.rng(0, "s"))
    unfinished = ~(full.response == TINY.eos_id).any(1) & (full.mask.sum(1) < TINY.response)
    assert not unfinished.any() and torch.equal(again.response, full.response)
    start = full.response.clone()
    for i in range(12):
        start[i, i % 5 :] = TINY.pad_id  # prefixes of 0 to 4 tokens in one batch
    same = nr.sample(model, prompt, TINY, start=start, generator=nr.rng(0, "s"))
    assert torch.equal(same.response, full.response)  # same uniform numbers, so the same ending
    assert ((same.order == -1) == ((start != TINY.pad_id) | (same.mask == 0))).all()
    other = nr.sample(model, prompt, TINY, start=start, generator=nr.rng(7, "s"))
    assert other.response.ne(full.response).any()


def test_order_is_the_step_and_group_defaults_to_the_row(model):
    rollout = nr.sample(model, random_batch(TINY)[0], TINY, generator=nr.rng(0, "s"))
    steps = torch.arange(TINY.response).expand_as(rollout.order)
    assert torch.equal(rollout.order[rollout.mask > 0], steps[rollout.mask > 0])
    assert rollout.group.tolist() == list(range(6))


# ---- KL ----------------------------------------------------------------------------------------


def test_k1_and_k3_have_expectation_kl_on_an_asymmetric_pair():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    kl = float((p * (p / q).log()).sum())
    assert kl == pytest.approx(0.6349, abs=1e-4)
    for k in (nr.k1, nr.k3):
        assert float((p * k(p.log(), q.log())).sum()) == pytest.approx(kl, abs=1e-6)
    assert (nr.k3(p.log(), q.log()) >= 0).all() and (nr.k1(p.log(), q.log()) < 0).any()


def test_gradients_of_k1_and_k3_differ_as_the_docstrings_say():
    theta = torch.tensor([0.5, -0.2, 0.1], requires_grad=True)
    q = torch.tensor([0.2, 0.3, 0.5])

    def expected(k):
        return (theta.softmax(0).detach() * k(theta.log_softmax(0), q.log())).sum()

    (g1,) = torch.autograd.grad(expected(nr.k1), theta)
    (g3,) = torch.autograd.grad(expected(nr.k3), theta)
    (forward,) = torch.autograd.grad((q * (q.log() - theta.log_softmax(0))).sum(), theta)
    assert g1.abs().max() < 1e-6 and torch.allclose(g3, forward, atol=1e-6)


@pytest.mark.parametrize("name,k", [("kl_k1", nr.k1), ("kl_k3", nr.k3)])
def test_kl_estimators_equal_verl(name, k):
    record = golden("verl")[name]
    out = torch.tensor(record["output"]["kl"], dtype=torch.float64)
    assert (k(*tensors(record, "logp", "ref_logp")) - out).abs().max() < 1e-9


# ---- GAE, whitening, groups --------------------------------------------------------------------


@pytest.mark.parametrize("numbers", ["1.0_0.95", "0.9_0.5"])
def test_gae_equals_verl_and_torchtune(numbers):
    for record in (
        golden("verl")[f"gae_{numbers}"],
        golden("torchtune")[f"estimate_advantages_{numbers}"],
    ):
        reward, value, mask = tensors(record, "reward", "value", "mask")
        adv, ret = nr.gae(reward, value, mask, record["inputs"]["gamma"], record["inputs"]["lam"])
        theirs = torch.tensor(record["output"]["returns"], dtype=torch.float64)
        assert ((ret - theirs) * mask).abs().max() < 1e-9
        assert (adv * (1 - mask)).abs().max() == 0 and (ret * (1 - mask)).abs().max() == 0
        assert torch.allclose(adv, (ret - value) * mask)


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_gae_equals_the_double_sum(seed, gamma, lam):
    g = nr.rng(seed, "gae")
    reward, value = torch.randn(2, 4, 5, generator=g, dtype=torch.float64)
    mask = (torch.arange(5) < torch.randint(1, 6, (4, 1), generator=g)).double()
    adv, _ = nr.gae(reward, value, mask, gamma, lam)
    v = torch.nn.functional.pad(value * mask, (0, 1))
    for i in range(4):
        for k in range(int(mask[i].sum())):
            brute = sum(
                (gamma * lam) ** (j - k) * (reward[i, j] + gamma * v[i, j + 1] - v[i, j])
                for j in range(k, int(mask[i].sum()))
            )
            assert float(adv[i, k]) == pytest.approx(float(brute), abs=1e-9)


def test_whiten_equals_verl_after_its_unbiased_variance_is_undone():
    record = golden("verl")["masked_whiten_shift_True"]
    x, mask = tensors(record, "x", "mask")
    n = mask.sum()
    theirs = torch.tensor(record["output"]["whitened"], dtype=torch.float64)
    white = nr.whiten(x, mask)
    assert ((white - theirs * (n / (n - 1)).sqrt()) * mask).abs().max() < 1e-7
    assert (white * (1 - mask)).abs().max() == 0
    centred = (white - (white * mask).sum() / n) * mask
    assert float((centred**2).sum() / n) == pytest.approx(1, abs=1e-6)  # population variance
    assert float((white * mask).sum() / n) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "kind,name",
    [
        ("grpo", "grpo_advantage_epsilon_0.0001"),
        ("mean", "grpo_advantage_no_std"),
        ("rloo", "rloo_advantage"),
    ],
)
def test_group_advantage_equals_verl(kind, name):
    record = golden("verl")[name]
    (score,) = tensors(record, "score")
    group = torch.unique(torch.tensor(record["inputs"]["group"]), return_inverse=True)[1]
    theirs = torch.tensor(record["output"]["advantage"], dtype=torch.float64)
    several = torch.bincount(group)[group] > 1  # verl keeps the raw score of a group of one
    assert ((nr.group_advantage(score, group, kind) - theirs) * several).abs().max() < 1e-6


@given(st.integers(0, 10_000), st.sampled_from(["grpo", "mean", "rloo"]))
@settings(max_examples=40, deadline=None)
def test_group_advantage_follows_group_not_order_and_equal_rewards_give_zero(seed, kind):
    g = nr.rng(seed, "group")
    reward, group = torch.randn(12, generator=g), torch.arange(12) // 4
    adv = nr.group_advantage(reward, group, kind)
    order = torch.randperm(12, generator=g)
    mixed = nr.group_advantage(reward[order], group[order], kind)
    assert torch.allclose(mixed, adv[order], atol=1e-6)
    for x in (0.5, 0.7):
        equal = nr.group_advantage(torch.full((12,), x), group, kind)
        assert torch.equal(equal, torch.zeros(12))
    assert torch.equal(nr.group_advantage(reward[:1], group[:1], kind), torch.zeros(1))
    rloo, mean = (nr.group_advantage(reward, group, k) for k in ("rloo", "mean"))
    assert torch.allclose(rloo, mean * 4 / 3, atol=1e-6)
