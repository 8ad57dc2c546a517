"""The masked-diffusion LM: mask, sampler, loss and bound against exact enumeration, its base model."""

import itertools
import json
import math
from functools import partial
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanoreward as nr
import train_small
from data.arithmetic import Arithmetic
from notebooks import steps
from tests.conftest import TINY, random_batch, rough

FULL = nr.replace(TINY, causal=False)
# three ids can be produced: BOS, EOS and 4; PAD and MASK never
THREE = nr.replace(FULL, vocab=5, response=3, block=3, block_steps=3, t_min=1e-3)
WORDS = (1, 2, 4)
PROMPT = torch.tensor([[1, 4, 4]])


def logps(model, canvas):
    """log p of the ids at every place of the canvases (n, 3), untempered: (n, 3, V)."""
    prompt = PROMPT.expand(len(canvas), -1)
    with torch.no_grad():
        states = nr.predictive_states(model, prompt, canvas)
        return nr.log_softmax(model.lm_head(states), 1.0, model.config)


# ---- the mask ----------------------------------------------------------------------------------


def test_looking_ahead_goes_from_gpt_to_diffusion_without_a_jump():
    gpt, both = rough(TINY), rough(FULL)
    ids = random_batch(TINY)[0]
    logits = []
    for both.ahead in (0.0, 1e-12, 0.5, 1 - 1e-6, 1.0):
        logits.append(both(ids).detach())
        padded = torch.nn.functional.pad(ids, (2, 0))  # PAD stays unseen all the way
        assert (both(padded)[:, 2:] - logits[-1])[ids != 0].abs().max() < 1e-4
    assert torch.equal(logits[0], gpt(ids))
    assert (logits[1] - logits[0]).abs().max() < 1e-3 and (logits[3] - logits[4]).abs().max() < 1e-3
    assert (logits[2] - logits[0]).abs().max() > 1e-2 and (logits[2] - logits[4]).abs().max() > 1e-2


# ---- the loss and the bound --------------------------------------------------------------------


def subset_nll(model, y):
    """-log p of the hidden tokens given the rest, for every non-empty set of hidden places."""
    found = {}
    for n in (1, 2, 3):
        for places in itertools.combinations(range(3), n):
            canvas = y.clone()
            canvas[:, list(places)] = 3
            logp = logps(model, canvas)[0].gather(-1, y[0, :, None])[:, 0]
            found[places] = -float(logp[list(places)].sum())
    return found


def exact_bound(model, y):
    """(1) by hand: E over a uniform number of hidden places, then over which: L/l times their NLL."""
    weight = {n: 3 / n / (3 * math.comb(3, n)) for n in (1, 2, 3)}
    return sum(weight[len(places)] * nll for places, nll in subset_nll(model, y).items())


def any_order_probability(model, y):
    """p(y) of the model that writes one place after the other in a uniformly random order."""
    total = 0.0
    for order in itertools.permutations(range(3)):
        canvas, p = torch.full((1, 3), 3), 1.0
        for k in order:
            p *= float(logps(model, canvas)[0, k, y[0, k]].exp())
            canvas[0, k] = y[0, k]
        total += p / 6
    return total


def test_the_bound_equals_enumeration_in_both_forms_and_bounds_the_likelihood():
    model = rough(THREE)
    total = 0.0
    for y in torch.cartesian_prod(*[torch.tensor(WORDS)] * 3)[:, None]:
        exact, p = exact_bound(model, y), any_order_probability(model, y)
        total += p
        assert exact >= -math.log(p) - 1e-6
    assert total == pytest.approx(1, abs=1e-5)  # the enumeration is itself a distribution
    y = torch.tensor([[4, 2, 1]])
    rate = partial(nr.rate_masks, t_min=1e-4)
    estimates = {}
    for masks in (rate, steps.count_masks):
        one = [
            steps.likelihood_bound(model, PROMPT, y, masks, 1000, nr.rng(i, "bound"))
            for i in range(20)
        ]
        one = torch.cat(one).double()
        error = float(one.std() / 20**0.5)
        assert abs(float(one.mean()) - exact_bound(model, y)) < 4 * error + 1e-3, masks
        estimates[masks] = float(one.std())
    assert estimates[steps.count_masks] < estimates[rate]  # the lower variance that it is there for


def test_diffusion_loss_is_the_bound_over_all_places():
    model = rough(THREE)
    y = torch.tensor([[4, 4, 2]])
    with torch.no_grad():
        losses = [
            float(
                nr.diffusion_loss(
                    model, PROMPT.expand(4000, -1), y.expand(4000, -1), nr.rng(i, "loss")
                )
            )
            for i in range(30)
        ]
    error = torch.tensor(losses).std() / 30**0.5
    assert error < 0.01 and abs(sum(losses) / 30 - exact_bound(model, y) / 3) < 3.5 * error


def test_hidden_share_is_the_rate_and_the_weight_is_its_inverse():
    like = torch.zeros(64, 4000)
    hidden, weight = nr.rate_masks(like, nr.rng(0, "m"), t_min=0.05)
    assert torch.allclose(hidden.float().mean(1), 1 / weight[:, 0], atol=0.04)
    assert (1 / weight).min() >= 0.05
    strata = ((1 / weight[:, 0] - 0.05) / 0.95 * 64).floor()
    assert strata.sort().values.tolist() == list(range(64))  # one rate in each 64th
    assert strata.tolist() != list(range(64))  # and not in the order of the rows
    hidden, weight = steps.count_masks(torch.zeros(64, 16), nr.rng(0, "m"))
    counts = hidden.sum(1)
    assert torch.allclose(weight[:, 0], 16 / counts.float())
    assert counts.bincount(minlength=17).tolist() == [0] + [4] * 16


def test_a_rows_rate_does_not_depend_on_where_it_stands():
    first = [
        float(1 / nr.rate_masks(torch.zeros(8, 2), nr.rng(i, "m"), 0.0)[1][0, 0])
        for i in range(400)
    ]
    assert sum(first) / 400 == pytest.approx(0.5, abs=0.06)  # sorted rows would give 1/16


def test_the_prompt_is_never_hidden_and_padding_is_trained_as_eos(monkeypatch):
    model, (prompt, response) = rough(FULL), random_batch(TINY)
    seen = []
    inner = model.embed_tokens.forward
    monkeypatch.setattr(
        model.embed_tokens, "forward", lambda ids: (seen.append(ids), inner(ids))[1]
    )
    loss = nr.diffusion_loss(model, prompt, response, nr.rng(0, "l"))
    assert torch.equal(seen[0][:, : prompt.shape[1]], prompt)
    canvas = seen[0][:, prompt.shape[1] :]
    assert (canvas == FULL.mask).any() and not (canvas == FULL.pad).any()
    filled = response.masked_fill(response == FULL.pad, FULL.eos)
    assert torch.equal(loss, nr.diffusion_loss(model, prompt, filled, nr.rng(0, "l")))
    assert torch.equal(canvas[canvas != FULL.mask], filled[canvas != FULL.mask])


def test_only_hidden_tokens_carry_loss():
    model, (prompt, response) = rough(FULL), random_batch(TINY)
    response = response.masked_fill(response == 0, 2)
    nothing = torch.zeros(response.shape, dtype=torch.bool)
    assert (nr.masked_nll(model, prompt, response, nothing, torch.ones(6, 1)) == 0).all()
    one = nothing.clone()
    one[:, 3] = True
    nll = nr.masked_nll(model, prompt, response, one, torch.full((6, 1), 2.0))
    canvas = response.masked_fill(one, 3)
    logp = nr.gather_logprobs(model, nr.predictive_states(model, prompt, canvas), response, 1.0)
    assert torch.allclose(nll, -2 * logp[:, 3])


def test_parts_of_a_batch_sum_up_to_the_whole():
    model, (prompt, response) = rough(FULL), random_batch(TINY)
    whole = nr.diffusion_loss(model, prompt, response, nr.rng(0, "l"))
    parts = [
        nr.diffusion_loss(model, prompt, response, nr.rng(0, "l"), r)
        for r in torch.arange(6).split(4)
    ]
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), rel=1e-5)


# ---- the sampler -------------------------------------------------------------------------------


def exact_law(model, temperature):
    """P(canvas) when each step draws every open place and keeps the surest draw, by enumeration."""
    law, states = {}, {(3, 3, 3): 1.0}
    while states:
        after = {}
        for canvas, p in states.items():
            places = [k for k in range(3) if canvas[k] == 3]
            if not places:
                law[canvas] = law.get(canvas, 0) + p
                continue
            logp = logps(model, torch.tensor([canvas]))[0]
            tempered = (logp / temperature).softmax(-1)
            for words in itertools.product(WORDS, repeat=len(places)):
                chance = math.prod(float(tempered[k, w]) for k, w in zip(places, words))
                surest = max(range(len(places)), key=lambda i: float(logp[places[i], words[i]]))
                new = tuple(words[surest] if k == places[surest] else canvas[k] for k in range(3))
                after[new] = after.get(new, 0) + p * chance
        states = after
    return law


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_block_one_token_a_step_equals_enumeration(temperature):
    model, n = rough(THREE, seed=3), 30_000
    config = nr.replace(THREE, temperature=temperature)
    law = exact_law(model, temperature)
    assert sum(law.values()) == pytest.approx(1, abs=1e-4)
    got = nr.sample(model, PROMPT.expand(n, -1), config, generator=nr.rng(0, "s")).response
    for canvas, p in law.items():
        share = float((got == torch.tensor(canvas)).all(1).float().mean())
        assert abs(share - p) < 4.5 * (p * (1 - p) / n) ** 0.5 + 1e-4, canvas


def test_ten_places_in_four_steps_are_three_three_two_two():
    assert nr.open_places(10, 4) == [10, 7, 4, 2, 0]
    config = nr.replace(FULL, response=20, block=10, block_steps=4)
    prompt, _ = random_batch(TINY)
    order = nr.sample(rough(FULL), prompt, config, generator=nr.rng(0, "s")).order
    for row in order:
        assert row[:10].bincount().tolist() == [3, 3, 2, 2]  # then the second block, steps 4 to 7
        assert row[10:].bincount(minlength=8).tolist() == [0, 0, 0, 0, 3, 3, 2, 2]


@given(block=st.integers(1, 40), steps=st.integers(1, 40))
def test_a_block_is_open_then_full_and_no_step_takes_less_than_a_later_one(block, steps):
    ladder = nr.open_places(block, steps)
    taken = [a - b for a, b in itertools.pairwise(ladder)]
    assert ladder[0] == block and ladder[-1] == 0 and len(ladder) == steps + 1
    assert taken == sorted(taken, reverse=True) and max(taken) - min(taken) <= 1


def run(config, start=None, temperature=1.0, seed=0, generator=0):
    prompt, _ = random_batch(TINY, B=8)
    config = nr.replace(config, temperature=temperature)
    rollout = nr.sample(rough(FULL, seed), prompt, config, start, generator=nr.rng(generator, "s"))
    return prompt, rollout


RAGGED = nr.replace(FULL, response=11, block=4, block_steps=3)


@pytest.mark.parametrize("config", [FULL, RAGGED, nr.replace(RAGGED, block=64, block_steps=5)])
def test_the_canvas_is_written_whole_without_mask_or_padding(config):
    for seed in range(3):
        _, r = run(config, seed=seed, temperature=3.0)
        assert not ((r.response == FULL.mask) | (r.response == FULL.pad)).any()
        assert (r.order >= 0).all()
        assert torch.equal(r.mask, nr.up_to_eos(r.response, FULL))  # the canvas itself stays raw
        assert ((r.mask == 0) & (r.response != FULL.eos)).any()


def test_a_full_canvas_comes_back_and_a_half_one_is_kept():
    full = torch.randint(4, 32, (8, 11), generator=nr.rng(0, "full"))
    _, r = run(RAGGED, full)
    assert torch.equal(r.response, full) and (r.order == -1).all()
    keep = torch.rand(8, 11, generator=nr.rng(1, "half")) < torch.arange(8)[:, None] / 8
    half = full.where(keep, torch.tensor(FULL.mask))
    half[::2] = full[::2].where(keep[::2], torch.tensor(FULL.pad))  # PAD is open as well
    _, r = run(RAGGED, half)  # every row has another number of open places
    assert torch.equal(r.response[keep], full[keep]) and (r.order[keep] == -1).all()
    assert (r.order[~keep] >= 0).all() and not (r.response == FULL.mask).any()


@pytest.mark.parametrize("config", [RAGGED, nr.replace(RAGGED, block=11, block_steps=7)])
def test_the_state_rebuilt_from_order_is_the_one_the_sampler_saw(config, monkeypatch):
    seen, inner = [], nr.Transformer.hidden
    monkeypatch.setattr(
        nr.Transformer, "hidden", lambda m, ids: (seen.append(ids.clone()), inner(m, ids))[1]
    )
    _, r = run(config)
    assert len(seen) == int(r.order.max()) + 1
    for step, canvas in enumerate(seen):
        state = nr.state_at(r.response, r.order, torch.full((8,), step), FULL)
        assert set(map(tuple, torch.cat([r.prompt, state], 1).tolist())) == set(
            map(tuple, canvas.tolist())
        )


@pytest.mark.parametrize("config", [RAGGED, nr.replace(RAGGED, block=10, block_steps=4)])
def test_from_any_state_with_the_same_numbers_the_same_canvas_follows(config):
    """So the steps that are left, and their random numbers, are those of the whole run; each row
    starts from another step."""
    _, whole = run(config)
    step = torch.arange(8) % (int(whole.order.max()) + 1)
    start = nr.state_at(whole.response, whole.order, step, FULL)
    _, again = run(config, start)
    assert torch.equal(again.response, whole.response)
    assert torch.equal(
        again.order, whole.order.where(whole.order >= step[:, None], torch.tensor(-1))
    )


def test_equal_rows_are_read_once_and_drawn_apart(monkeypatch):
    prompt, sizes, inner = random_batch(TINY, B=8)[0], [], nr.Transformer.hidden
    monkeypatch.setattr(
        nr.Transformer, "hidden", lambda m, ids: (sizes.append(len(ids)), inner(m, ids))[1]
    )
    r = nr.sample(rough(FULL), prompt.repeat_interleave(4, 0), RAGGED, generator=nr.rng(0, "s"))
    assert sizes[0] == 8 and sizes[-1] > 8 and len(r.response.unique(dim=0)) > 8


def test_a_row_does_not_depend_on_the_others():
    prompt, whole = run(RAGGED)
    full = torch.full((8, 11), 7)
    full[3] = FULL.mask  # all others are done from the start and leave the batch
    _, alone = run(RAGGED, full)
    assert torch.equal(alone.response[3], whole.response[3])


def test_temperature_zero_is_deterministic_and_takes_the_surest_argmax():
    assert torch.equal(
        run(RAGGED, temperature=0, generator=1)[1].response, run(RAGGED, temperature=0)[1].response
    )
    model, config = rough(THREE), nr.replace(THREE, temperature=0)
    canvas = torch.full((1, 3), 3)
    for _ in range(3):
        logp = logps(model, canvas)[0].masked_fill(canvas[0, :, None] != 3, -torch.inf)
        place, word = divmod(int(logp.argmax()), 5)
        canvas[0, place] = word
    assert torch.equal(nr.sample(model, PROMPT, config).response, canvas)


# ---- learning ----------------------------------------------------------------------------------


class Echo(Arithmetic):
    """Answer with the start: nothing to calculate, learned in seconds."""

    def demo(self, generator):
        prompt = self.prompts(1, generator)[0]
        return prompt, f"#{prompt[0]}<eos>"

    def grade(self, prompt, response):
        return float(response == f"#{prompt[0]}<eos>")


def test_the_diffusion_lm_learns_to_answer_and_to_stop():
    config = nr.replace(
        FULL,
        response=4,
        block=4,
        block_steps=4,
        base_warmup=5,
        diffusion_updates=120,
        look_ahead=0.3,
    )
    model, task = nr.Transformer(config, nr.rng(0, "init")), Echo(1, 1)
    state = {"optimizers": nr.optimizers([model], 0.01, config, 0.02), "update": 0}
    list(nr.fit(state, nr.demonstrations(model, task, config), 120, config))
    assert model.ahead == 1  # the last update is one of the diffusion LM
    prompts = task.prompts(100, nr.rng(0, "dev"), "dev")
    assert nr.accuracy(model, task, prompts, config) > 0.9
    assert nr.accuracy(nr.Transformer(config, nr.rng(0, "init")), task, prompts, config) < 0.2


def test_every_second_update_rehearses_as_a_gpt_and_the_others_look_further_and_further():
    config, model = nr.replace(FULL, demos=40, diffusion_updates=10, look_ahead=0.5), rough(FULL)
    batch, seen = nr.demonstrations(model, Arithmetic(1, 1), config), []
    for u in range(10):
        rows, loss = batch(u)
        seen.append(model.ahead)
        if u == 8:  # a GPT's loss: the same as of a GPT of these weights
            gpt = nr.Transformer(nr.replace(config, causal=True))
            gpt.load_state_dict(model.state_dict())
            again, theirs = nr.demonstrations(gpt, Arithmetic(1, 1), config)(8)
            assert torch.equal(loss(rows)[0], theirs(again)[0])
    assert seen[::2] == [0] * 5 and seen[1::2] == pytest.approx(
        [(2 / 5) ** 2, (4 / 5) ** 2, 1, 1, 1]
    )


def test_without_looking_ahead_slowly_everything_is_seen_from_scratch(tmp_path, monkeypatch):
    config, model = (
        nr.replace(FULL, demos=40, diffusion_updates=10, look_ahead=0.0, device="cpu"),
        rough(FULL),
    )
    batch = nr.demonstrations(model, Arithmetic(1, 1), config)
    for u in range(4):
        rows, loss = batch(u)
        assert model.ahead == 1.0 and loss.__name__ == "unmasking"  # nothing is rehearsed
    monkeypatch.setattr(train_small, "base_model", lambda *a: pytest.fail("a GPT was trained"))
    first = nr.Transformer(config, nr.rng(config.seed, "init"))
    monkeypatch.setattr(train_small, "cached", lambda kind, root, c, cache, modules, *rest: modules)
    made = train_small.diffusion_base(nr.replace(config, causal=True), tmp_path)
    assert not made.config.causal and torch.equal(made.lm_head.weight, first.lm_head.weight)


def test_fit_gives_every_update_of_a_base_the_micro_batches_of_one_batch():
    config, task = nr.replace(FULL, demos=40), Arithmetic(1, 1)
    losses = []
    for micro in (32, 5):
        model = rough(config)
        rows, loss = nr.demonstrations(model, task, config)(39)
        losses.append(float(sum(loss(r)[0] for r in rows.split(micro)).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_interrupted_diffusion_base_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Stopped in the middle of looking ahead, then resumed: same weights, one whole log."""
    config = nr.replace(TINY, device="cpu")
    whole = train_small.diffusion_base(config, tmp_path / "whole")
    assert not whole.config.causal and whole.ahead == 1
    base, fit = train_small.base_model(config, tmp_path / "cut"), nr.fit

    def stops(state, batch, updates, c):
        yield from islice(fit(state, batch, updates, c), 14)
        raise KeyboardInterrupt

    monkeypatch.setattr(nr, "fit", stops)
    with pytest.raises(KeyboardInterrupt):
        train_small.diffusion_base(config, tmp_path / "cut")
    monkeypatch.setattr(nr, "fit", fit)
    again = train_small.diffusion_base(config, tmp_path / "cut")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )
    assert not all(
        torch.equal(a, b) for a, b in zip(base.parameters(), again.parameters(), strict=True)
    )
    log = next((tmp_path / "cut").glob("diffusion-*/fit.jsonl")).read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(
        range(1, config.diffusion_updates + 1)
    )


def test_a_saved_diffusion_lm_is_loaded_as_one(tmp_path):
    model = rough(FULL)
    model.save(tmp_path)
    again = nr.Transformer.load(tmp_path)
    ids = random_batch(TINY)[0]
    assert again.ahead == 1 and torch.equal(again(ids), model(ids))
