"""The masked-diffusion LM: its mask, sampler, loss and bound against enumeration, its training."""

import itertools
import math
from functools import partial
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanoreward as nr
import train_small as front
from data.arithmetic import Arithmetic
from notebooks import steps
from tests.conftest import TINY, random_batch, rough, tiny

TASK = Arithmetic(1, 1)
FULL = tiny("denoise", causal=False)
# Three ids can be produced: BOS, EOS and 4. PAD and MASK never are.
# BOS is EOS here, so that the id 1 is a word like any other.
THREE = nr.replace(FULL, vocab=5, bos_id=2, response=3, block=3, block_passes=3, t_min=1e-3)
WORDS = (1, 2, 4)
PROMPT = torch.tensor([[1, 4, 4]])


def logps(model, canvas):
    """log p of the ids at every place of the canvases (n, 3), untempered: (n, 3, V)."""
    prompt = PROMPT.expand(len(canvas), -1)
    with torch.no_grad():
        hidden = nr.predictive_hidden(model, prompt, canvas)
        return nr.log_softmax(model.lm_head(hidden), 1.0, model.config)


# ---- the mask ----------------------------------------------------------------------------------


def test_looking_ahead_goes_from_gpt_to_diffusion_without_a_jump():
    both = rough(FULL)
    ids = random_batch(TINY)[0]
    logits = []
    for weight in (0.0, 1e-12, 0.5, 1 - 1e-6, 1.0):
        both.future_weight = weight
        logits.append(both(ids).detach())
        padded = torch.nn.functional.pad(ids, (2, 0))  # PAD stays unseen all the way
        assert (both(padded)[:, 2:] - logits[-1])[ids != 0].abs().max() < 1e-4
    assert torch.equal(logits[0], rough(TINY)(ids))
    assert (logits[1] - logits[0]).abs().max() < 1e-3
    assert (logits[3] - logits[4]).abs().max() < 1e-3
    assert (logits[2] - logits[0]).abs().max() > 1e-2
    assert (logits[2] - logits[4]).abs().max() > 1e-2


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
    """(1) by hand: 3 / n times the NLL of n hidden places.

    It is averaged over n, which is uniform, and then over which places are hidden.
    """
    weight = {n: 3 / n / (3 * math.comb(3, n)) for n in (1, 2, 3)}
    return sum(weight[len(places)] * nll for places, nll in subset_nll(model, y).items())


def any_order_probability(model, y):
    """p(y) of the model that writes one place after the other in a uniformly random order."""
    total = 0.0
    for order in itertools.permutations(range(3)):
        canvas = torch.full((1, 3), 3)
        p = 1.0
        for k in order:
            p *= float(logps(model, canvas)[0, k, y[0, k]].exp())
            canvas[0, k] = y[0, k]
        total += p / 6
    return total


def test_the_bound_equals_enumeration_in_both_forms_and_bounds_the_likelihood():
    model = rough(THREE)
    total = 0.0
    for y in torch.cartesian_prod(*[torch.tensor(WORDS)] * 3)[:, None]:
        p = any_order_probability(model, y)
        total += p
        assert exact_bound(model, y) >= -math.log(p) - 1e-6
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
    many = PROMPT.expand(4000, -1), y.expand(4000, -1)
    with torch.no_grad():
        losses = torch.stack(
            [nr.diffusion_loss(model, *many, nr.rng(i, "loss"), THREE.t_min) for i in range(30)]
        )
    error = losses.std() / 30**0.5
    assert error < 0.01
    assert abs(losses.mean() - exact_bound(model, y) / 3) < 3.5 * error


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
    first = []
    for i in range(400):
        _, weight = nr.rate_masks(torch.zeros(8, 2), nr.rng(i, "m"), 0.0)
        first.append(float(1 / weight[0, 0]))
    assert sum(first) / 400 == pytest.approx(0.5, abs=0.06)  # sorted rows would give 1/16


def test_the_prompt_is_never_hidden_and_padding_is_trained_as_eos(monkeypatch):
    model = rough(FULL)
    prompt, response = random_batch(TINY)
    seen = []
    inner = model.embed_tokens.forward

    def embed(ids):
        seen.append(ids)
        return inner(ids)

    monkeypatch.setattr(model.embed_tokens, "forward", embed)
    loss = nr.diffusion_loss(model, prompt, response, nr.rng(0, "l"), FULL.t_min)
    assert torch.equal(seen[0][:, : prompt.shape[1]], prompt)
    canvas = seen[0][:, prompt.shape[1] :]
    assert (canvas == FULL.mask_id).any() and not (canvas == FULL.pad_id).any()
    filled = response.masked_fill(response == FULL.pad_id, FULL.eos_id)
    again = nr.diffusion_loss(model, prompt, filled, nr.rng(0, "l"), FULL.t_min)
    assert torch.equal(loss, again)
    kept = canvas != FULL.mask_id
    assert torch.equal(canvas[kept], filled[kept])


def test_only_hidden_tokens_carry_loss():
    model = rough(FULL)
    prompt, response = random_batch(TINY)
    response = response.masked_fill(response == 0, 2)
    nothing = torch.zeros(response.shape, dtype=torch.bool)
    assert (nr.masked_nll(model, prompt, response, nothing, torch.ones(6, 1)) == 0).all()
    one = nothing.clone()
    one[:, 3] = True
    nll = nr.masked_nll(model, prompt, response, one, torch.full((6, 1), 2.0))
    canvas = response.masked_fill(one, 3)
    logp = nr.gather_logprobs(model, nr.predictive_hidden(model, prompt, canvas), response, 1.0)
    assert torch.allclose(nll, -2 * logp[:, 3])


def test_parts_of_a_batch_sum_up_to_the_whole():
    model = rough(FULL)
    prompt, response = random_batch(TINY)

    def loss(*rows):
        generator = nr.rng(0, "l")
        return float(
            nr.diffusion_loss(model, prompt, response, generator, FULL.t_min, *rows).detach()
        )

    parts = [loss(rows) for rows in torch.arange(6).split(4)]
    assert sum(parts) == pytest.approx(loss(), rel=1e-5)


# ---- the sampler -------------------------------------------------------------------------------


def exact_law(model, temperature):
    """P(canvas) when each pass draws every open place and keeps the surest draw, by enumeration."""
    law = {}
    states = {(3, 3, 3): 1.0}
    while states:
        after = {}
        for canvas, p in states.items():
            places = [k for k in range(3) if canvas[k] == 3]
            end = canvas.index(2) if 2 in canvas else 3
            if 3 not in canvas[:end]:  # what is open behind the end becomes PAD
                whole = tuple(0 if word == 3 else word for word in canvas)
                law[whole] = law.get(whole, 0) + p
                continue
            logp = logps(model, torch.tensor([canvas]))[0]
            tempered = (logp / temperature).softmax(-1)
            for words in itertools.product(WORDS, repeat=len(places)):
                chance = math.prod(
                    float(tempered[k, w]) for k, w in zip(places, words, strict=True)
                )
                surest = max(range(len(places)), key=lambda i: float(logp[places[i], words[i]]))
                new = tuple(words[surest] if k == places[surest] else canvas[k] for k in range(3))
                after[new] = after.get(new, 0) + p * chance
        states = after
    return law


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_block_one_token_a_step_equals_enumeration(temperature):
    model = rough(THREE, seed=3)
    n = 30_000
    config = nr.replace(THREE, temperature=temperature)
    law = exact_law(model, temperature)
    assert sum(law.values()) == pytest.approx(1, abs=1e-4)
    got = nr.sample(model, PROMPT.expand(n, -1), config, generator=nr.rng(0, "s")).response
    for canvas, p in law.items():
        share = float((got == torch.tensor(canvas)).all(1).float().mean())
        assert abs(share - p) < 4.5 * (p * (1 - p) / n) ** 0.5 + 1e-4, canvas


def test_ten_places_in_four_steps_are_three_three_two_two():
    assert nr.open_places(10, 4) == [10, 7, 4, 2, 0]
    config = nr.replace(FULL, response=20, block=10, block_passes=4)
    prompt, _ = random_batch(TINY)
    b = nr.sample(rough(FULL), prompt, config, generator=nr.rng(0, "s"))
    endless = b.order[~nr.is_end(b.response, FULL).any(1)]
    assert len(endless) > 1
    for row in endless:
        assert row[:10].bincount().tolist() == [3, 3, 2, 2]  # then the second block, passes 4 to 7
        assert row[10:].bincount(minlength=8).tolist() == [0, 0, 0, 0, 3, 3, 2, 2]


@given(block=st.integers(1, 40), passes=st.integers(1, 40))
def test_a_block_is_open_then_full_and_no_pass_takes_less_than_a_later_one(block, passes):
    ladder = nr.open_places(block, passes)
    taken = [a - b for a, b in itertools.pairwise(ladder)]
    assert ladder[0] == block and ladder[-1] == 0 and len(ladder) == passes + 1
    assert taken == sorted(taken, reverse=True) and max(taken) - min(taken) <= 1


def run(config, start=None, temperature=1.0, seed=0, generator=0):
    prompt, _ = random_batch(TINY, B=8)
    config = nr.replace(config, temperature=temperature)
    rollout = nr.sample(rough(FULL, seed), prompt, config, start, generator=nr.rng(generator, "s"))
    return prompt, rollout


RAGGED = nr.replace(FULL, response=11, block=4, block_passes=3)


@pytest.mark.parametrize("config", [FULL, RAGGED, nr.replace(RAGGED, block=64, block_passes=5)])
def test_the_canvas_is_written_to_its_end_and_what_is_open_behind_it_becomes_padding(config):
    written_behind_the_end = open_behind_the_end = 0
    block = min(config.block, config.response)
    passes = math.ceil(config.response / block) * config.block_passes
    for seed in range(6):
        _, r = run(config, seed=seed, temperature=3.0)
        is_pad = r.response == FULL.pad_id
        assert not (r.response == FULL.mask_id).any() and not (is_pad & (r.mask > 0)).any()
        assert (r.order[is_pad] == passes).all()
        assert (r.order[~is_pad] >= 0).all() and (r.order[~is_pad] < passes).all()
        assert torch.equal(r.mask, nr.up_to_eos(r.response, FULL))  # the canvas itself stays raw
        assert (r.mask.sum(1)[~nr.is_end(r.response, FULL).any(1)] == config.response).all()
        written_behind_the_end += int(((r.mask == 0) & ~is_pad).sum())
        open_behind_the_end += int(is_pad.sum())
    assert written_behind_the_end > 0 and open_behind_the_end > 0


def test_no_pass_is_made_for_a_response_that_has_its_end(monkeypatch):
    """The second row ends in the first block, so the other two blocks are not written for it."""
    start = torch.full((2, 12), FULL.mask_id)
    start[1, :4] = torch.tensor([9, 9, FULL.eos_id, FULL.mask_id])
    prompt = torch.tensor([[1, 9], [1, 10]])
    seen = ids_that_are_read(monkeypatch)
    b = nr.sample(rough(FULL), prompt, FULL, start, generator=nr.rng(0, "s"))
    assert b.response[1].tolist() == [9, 9, FULL.eos_id] + 9 * [FULL.pad_id]
    assert len(seen) > 1 and all(ids[:, 1].tolist() == [9] for ids in seen)


def test_a_full_canvas_comes_back_and_a_half_one_is_kept():
    full = torch.randint(4, 32, (8, 11), generator=nr.rng(0, "full"))
    _, r = run(RAGGED, full)
    assert torch.equal(r.response, full) and (r.order == -1).all()
    keep = torch.rand(8, 11, generator=nr.rng(1, "half")) < torch.arange(8)[:, None] / 8
    half = full.where(keep, torch.tensor(FULL.mask_id))
    half[::2] = full[::2].where(keep[::2], torch.tensor(FULL.pad_id))  # PAD is open as well
    _, r = run(RAGGED, half)  # every row has another number of open places
    assert torch.equal(r.response[keep], full[keep]) and (r.order[keep] == -1).all()
    assert (r.order[~keep] >= 0).all() and not (r.response == FULL.mask_id).any()


def ids_that_are_read(monkeypatch):
    """A list that gets the ids of every call of `Transformer.hidden` from now on."""
    seen = []
    inner = nr.Transformer.hidden

    def hidden(model, ids, *cache):
        seen.append(ids.clone())
        return inner(model, ids, *cache)

    monkeypatch.setattr(nr.Transformer, "hidden", hidden)
    return seen


@pytest.mark.parametrize("config", [RAGGED, nr.replace(RAGGED, block=11, block_passes=7)])
def test_the_state_rebuilt_from_order_is_the_one_the_sampler_saw(config, monkeypatch):
    seen = ids_that_are_read(monkeypatch)
    _, r = run(config)
    last = r.order.masked_fill(r.response == FULL.pad_id, -1).amax(1)  # each row's last pass
    assert len(seen) == int(last.max()) + 1
    for t, canvas in enumerate(seen):
        state = nr.canvas_before(r.response, r.order, torch.full((8,), t), FULL)
        rebuilt = torch.cat([r.prompt, state], 1)[last >= t]
        assert set(map(tuple, rebuilt.tolist())) == set(map(tuple, canvas.tolist()))


@pytest.mark.parametrize("config", [RAGGED, nr.replace(RAGGED, block=10, block_passes=4)])
def test_from_any_state_with_the_same_numbers_the_same_canvas_follows(config):
    """So the passes that are left, and their random numbers, are those of the whole run.

    Each row starts from another pass.
    """
    _, whole = run(config)
    t = torch.arange(8) % (int(whole.order.max()) + 1)
    start = nr.canvas_before(whole.response, whole.order, t, FULL)
    _, again = run(config, start)
    assert torch.equal(again.response, whole.response)
    left = whole.order.where(whole.order >= t[:, None], torch.tensor(-1))
    assert torch.equal(again.order, left)


def test_equal_rows_are_read_once_and_drawn_apart(monkeypatch):
    prompt = random_batch(TINY, B=8)[0].repeat_interleave(4, 0)
    seen = ids_that_are_read(monkeypatch)
    r = nr.sample(rough(FULL), prompt, RAGGED, generator=nr.rng(0, "s"))
    assert len(seen[0]) == 8 and len(seen[-1]) > 8
    assert len(r.response.unique(dim=0)) > 8


def test_a_row_does_not_depend_on_the_others():
    prompt, whole = run(RAGGED)
    full = torch.full((8, 11), 7)
    full[3] = FULL.mask_id  # all others are done from the start and leave the batch
    _, alone = run(RAGGED, full)
    assert torch.equal(alone.response[3], whole.response[3])


def test_temperature_zero_is_deterministic_and_takes_the_surest_argmax():
    _, first = run(RAGGED, temperature=0, generator=1)
    _, second = run(RAGGED, temperature=0)
    assert torch.equal(first.response, second.response)
    model = rough(THREE)
    config = nr.replace(THREE, temperature=0)
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
        FULL, response=4, block=4, block_passes=4, start_updates=120, look_ahead=0.3
    )
    task = Echo(1, 1)
    model = nr.Transformer(config, nr.rng(0, "init"))
    state = nr.Fit([model], nr.optimizers([model], 0.01, 0.02))
    batches = nr.diffusion_batches(model, nr.task_demos(task, config), config)
    list(nr.fit(state, batches, 120, config, warmup=5))
    assert model.future_weight == 1  # the last update is one of the diffusion LM
    prompts = task.prompts(100, nr.rng(0, "dev"), "dev")
    assert nr.accuracy(model, task, prompts, config) > 0.9
    assert nr.accuracy(nr.Transformer(config, nr.rng(0, "init")), task, prompts, config) < 0.2


def test_every_second_update_rehearses_as_a_gpt_and_the_others_look_further_and_further():
    config = nr.replace(FULL, demos=40, start_updates=10, look_ahead=0.5)
    model = rough(FULL)
    demos = nr.task_demos(TASK, config)
    batches = nr.diffusion_batches(model, demos, config)
    seen = []
    for u in range(10):
        rows, loss = batches(u)
        value = loss(rows)[0]
        seen.append(model.future_weight)
        if u == 8:  # a GPT of these weights has the same loss
            gpt = nr.Transformer(nr.replace(config, causal=True))
            gpt.load_state_dict(model.state_dict())
            again, theirs = nr.gpt_batches(gpt, demos, config)(8)
            assert torch.equal(value, theirs(again)[0])
    assert seen[::2] == [0] * 5
    assert seen[1::2] == pytest.approx([(2 / 5) ** 2, (4 / 5) ** 2, 1, 1, 1])


def test_a_diffusion_lm_starts_with_the_weights_of_its_base_and_a_mean_row_for_mask():
    gpt = rough(nr.replace(FULL, causal=True, vocab=20, mask_id=20))
    seen = []

    def train(name, modules, *numbers, **more):
        seen.append({k: x.clone() for k, x in modules[0].state_dict().items()})

    c = nr.replace(FULL, causal=True, vocab=20, mask_id=20, look_ahead=0.5)
    made = nr.diffusion_base(gpt, TASK, c, train)
    assert (made.config.vocab, made.config.causal) == (21, False)
    for name, before in gpt.state_dict().items():
        after = seen[0][name]
        assert torch.equal(after[: len(before)], before), name
        if len(after) > len(before):
            assert torch.allclose(after[-1], before.mean(0)) and len(after) == 21
    assert sum(len(x) == 21 for x in seen[0].values()) == 2  # embedding and output


def test_without_looking_ahead_slowly_everything_is_seen_from_scratch(monkeypatch):
    config = nr.replace(FULL, demos=40, start_updates=10, look_ahead=0.0)
    model = rough(FULL)
    batches = nr.diffusion_batches(model, nr.task_demos(TASK, config), config)
    calls = []
    inner = nr.diffusion_loss

    def counted(*arguments):
        calls.append(arguments)
        return inner(*arguments)

    monkeypatch.setattr(nr, "diffusion_loss", counted)
    for u in range(4):
        rows, loss = batches(u)
        loss(rows)
        # Nothing is rehearsed: each of the updates is one of the diffusion LM.
        assert model.future_weight == 1.0 and len(calls) == u + 1
    monkeypatch.setattr(nr, "gpt_base", lambda *a: pytest.fail("a GPT was trained"))
    first = nr.Transformer(config, nr.rng(config.seed, "init"))
    trained = []

    def train(name, *numbers, **more):
        trained.append(name)

    made = nr.diffusion_base(
        rough(config),  # the weights of the base are not even looked at
        TASK,
        nr.replace(config, causal=True),
        train,
    )
    assert trained == ["diffusion"] and not made.config.causal
    assert torch.equal(made.lm_head.weight, first.lm_head.weight)


def test_fit_gives_every_update_of_a_base_the_micro_batches_of_one_batch():
    config = nr.replace(FULL, demos=40)
    losses = []
    for micro in (32, 5):
        model = rough(config)
        rows, loss = nr.diffusion_batches(model, nr.task_demos(TASK, config), config)(39)
        losses.append(float(sum(loss(r)[0] for r in rows.split(micro)).detach()))
        assert model.future_weight == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_interrupted_diffusion_base_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Stopped in the middle of looking ahead, then resumed: same weights, one whole log."""
    config = tiny("denoise")
    task = front.make_task(config)
    cut = front.CachedTrainer(tmp_path / "cut")
    whole = nr.diffusion_base(
        nr.gpt_base(task, config, front.CachedTrainer(tmp_path / "whole")),
        task,
        config,
        front.CachedTrainer(tmp_path / "whole"),
    )
    assert not whole.config.causal and whole.future_weight == 1
    base = nr.gpt_base(task, config, cut)
    fit = nr.fit

    def stops(*arguments):
        yield from islice(fit(*arguments), 14)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nr, "fit", stops)
        with pytest.raises(KeyboardInterrupt):
            nr.diffusion_base(nr.gpt_base(task, config, cut), task, config, cut)
    again = nr.diffusion_base(nr.gpt_base(task, config, cut), task, config, cut)
    pairs = zip(whole.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(base.parameters(), again.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
    log = front.read_lines(next((tmp_path / "cut").glob("diffusion-*")) / "fit.jsonl", named=False)
    assert [m["step"] for m in log] == list(range(1, config.start_updates + 1))


def test_a_saved_diffusion_lm_is_loaded_as_one(tmp_path):
    model = rough(FULL)
    model.save(tmp_path)
    again = nr.Transformer.load(tmp_path)
    ids = random_batch(TINY)[0]
    assert again.future_weight == 1 and torch.equal(again(ids), model(ids))
