"""Optimizer steps, fit, evaluation, states, rewards, and ppo in worlds with a known answer."""

import math
import os
import pickle
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

import nanoreward as nr
from data.arithmetic import Arithmetic, CharacterTask
from tests.conftest import TINY, random_batch, rough, tiny

TASK = Arithmetic(1, 1)

# ---- optimizer_step and fit ---------------------------------------------------------------------


def sft_loss(model, prompt, response, denom):
    def loss(rows):
        logp = nr.token_logprobs(model, prompt[rows], response[rows], 1.0)
        return nr.nll_loss(logp, response[rows] != TINY.pad_id, denom), {}

    return loss


def test_micro_batches_of_unequal_length_give_the_gradient_of_the_whole(monkeypatch):
    monkeypatch.setattr(nr, "CLIP_GRAD", 1e9)
    prompt, response = random_batch(TINY)
    denom = (response != TINY.pad_id).sum()
    after = []
    for micro in (6, 4, 1):
        m = rough(TINY)
        sgd = torch.optim.SGD(m.parameters(), lr=0.1)
        sgd.param_groups[0]["peak_lr"] = 0.1
        config = nr.replace(TINY, micro=micro)
        loss = sft_loss(m, prompt, response, denom)
        metrics = nr.optimizer_step([sgd], loss, torch.arange(6), config)
        after.append((torch.cat([p.flatten() for p in m.parameters()]), metrics["loss"]))
    for weights, loss in after[1:]:
        assert (weights - after[0][0]).abs().max() < 1e-6
        assert loss == pytest.approx(after[0][1], abs=1e-5)


def test_step_clips_schedules_and_reports_what_it_used(model, monkeypatch):
    monkeypatch.setattr(nr, "CLIP_GRAD", 1e-3)
    prompt, response = random_batch(TINY)
    muon, adamw = nr.optimizers([model], 0.01, muon_lr=0.02)
    before = {n: p.clone() for n, p in model.named_parameters()}
    loss = sft_loss(model, prompt, response, (response != 0).sum())
    metrics = nr.optimizer_step([muon, adamw], loss, torch.arange(6), TINY, lr_share=0.25)
    assert metrics["lr"] == 0.0025
    assert {g["lr"] for g in muon.param_groups} == {0.005}
    assert adamw.param_groups[0]["lr"] == 0.0025
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    held = sum(len(g["params"]) for o in (muon, adamw) for g in o.param_groups)
    assert held == len(list(model.parameters()))
    assert {p.dim() for g in muon.param_groups for p in g["params"]} == {2}


def test_a_gradient_that_is_not_finite_stops_before_any_weight_is_lost(model):
    def loss(rows):
        return model(torch.tensor([[7]])).sum() * torch.inf, {}

    before = [p.clone() for p in model.parameters()]
    with pytest.raises(nr.UserError, match="diverged"):
        nr.optimizer_step(nr.optimizers([model], 0.01), loss, torch.arange(2), TINY)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_prompt_tokens_and_padding_are_not_trained(model):
    prompt, response = random_batch(TINY)
    loss = sft_loss(model, prompt, response, (response != 0).sum())(torch.arange(6))[0]
    wide = torch.nn.functional.pad(response, (0, 3))
    again = sft_loss(model, prompt, wide, (response != 0).sum())(torch.arange(6))[0]
    assert float(loss.detach()) == pytest.approx(float(again.detach()), abs=1e-5)
    hidden = nr.predictive_hidden(model, prompt, response)
    hidden.retain_grad()
    logp = nr.gather_logprobs(model, hidden, response, 1.0)
    nr.nll_loss(logp, response != 0, torch.tensor(1.0)).backward()
    eos = response == TINY.eos_id
    assert (hidden.grad[response == 0] == 0).all()
    assert (hidden.grad[eos].abs().sum(-1) > 0).all()


def test_demonstrations_train_response_tokens_incl_eos():
    config = nr.replace(TINY, demos=50)
    model = rough(config)
    rows, loss = nr.gpt_batches(model, nr.task_demos(TASK, config), config)(3)
    g = nr.rng(config.seed, "demonstrations")
    demos = [TASK.demo(g) for _ in range(50)]
    total = count = 0.0
    drawn = torch.randint(50, (config.base_batch,), generator=nr.rng(config.seed, "batch", 3))
    for i in drawn.tolist():
        ids = torch.tensor(TASK.encode([demos[i][1]]))
        prompt = nr.encode_prompts(TASK, [demos[i][0]], config)
        assert ids[0, -1] == config.eos_id and prompt[0, 0] == config.bos_id
        total -= float(nr.token_logprobs(model, prompt, ids, 1.0).sum().detach())
        count += ids.numel()
    assert float(loss(rows)[0].detach()) == pytest.approx(total / count, rel=1e-4)


def test_a_response_longer_than_its_room_is_one_clear_line():
    with pytest.raises(nr.UserError, match="--response"):
        nr.right_pad([[1, 2, 3]], 0, 2)


# ---- evaluation --------------------------------------------------------------------------------


def test_accuracy_grades_the_text_of_its_own_samples(model):
    prompts = TASK.prompts(20, nr.rng(0, "p"))
    texts = nr.respond(model, TASK, prompts, nr.replace(TINY, temperature=0))
    truth = sum(TASK.grade(p, t) for p, t in zip(prompts, texts, strict=True)) / 20
    assert nr.accuracy(model, TASK, prompts, TINY) == truth

    class Generous(Arithmetic):
        def grade(self, prompt, response):
            return float(prompt in prompts and response in texts)

    assert nr.accuracy(model, Generous(1, 1), prompts, TINY) == 1.0


# ---- state -------------------------------------------------------------------------------------


def test_what_is_loaded_comes_to_the_device_that_is_named(tmp_path, model):
    nr.save_state(tmp_path, {"policy": model, "data": {"rows": torch.arange(3)}})

    def loaded(*device):
        into = {"policy": rough(TINY, 5).to(*device), "data": {}}
        return nr.load_state(tmp_path, into, *device)

    elsewhere = loaded("meta")
    assert elsewhere["data"]["rows"].is_meta and elsewhere["policy"].lm_head.weight.is_meta
    assert loaded("cpu")["data"]["rows"].is_cpu
    assert nr.load_state(tmp_path)["data"]["rows"].is_cpu


def test_nothing_to_learn_from_is_a_clear_line():
    class Hopeless(Arithmetic):
        def grade(self, prompt, response):
            return 0.0

    def train(name, modules, batches, *numbers, **more):
        if name == "student":  # the base model stays as it was drawn
            batches()

    with pytest.raises(nr.UserError, match="no response was right.*--start-data"):
        nr.student(
            nr.gpt_base(Hopeless(1, 1), tiny("refine"), train),
            Hopeless(1, 1),
            tiny("refine"),
            train,
        )


def test_a_step_with_fewer_rows_than_processes_is_a_clear_line(monkeypatch):
    monkeypatch.setattr(nr.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(nr.dist, "get_world_size", lambda: 3)
    with pytest.raises(nr.UserError, match="2 rows"):
        nr.optimizer_step([], None, torch.arange(2), TINY)


def test_load_state_fills_modules_in_place_and_runs_no_code(tmp_path, model):
    state = nr.start_ppo(model, TINY)
    next(nr.ppo(state, TASK, TINY))
    saved = {"state": state, "list": [1, 2.5, None], "pairs": torch.arange(3)}
    nr.save_state(tmp_path, saved)
    other = nr.start_ppo(rough(TINY, 5), TINY)
    parts = {role: vars(other)[role] for role in ("policy", "reference", "head")}
    found = nr.load_state(tmp_path, into={"state": other})
    assert found["state"] is other
    assert other.update == 1 and other.samples == state.samples
    assert found["list"] == [1, 2.5, None] and found["pairs"].tolist() == [0, 1, 2]
    for role, part in parts.items():
        assert vars(other)[role] is part
        mine = vars(state)[role].state_dict()
        assert all(torch.equal(x, mine[name]) for name, x in part.state_dict().items())
    assert not list(tmp_path.glob("*.tmp"))
    # Lists of plain things come back as they were saved, whatever a fresh state has in their place.
    for fresh in ([], [7], [7, 8, 9, 10], None, 5, "text"):
        assert nr.load_state(tmp_path, into={"list": fresh})["list"] == [1, 2.5, None]

    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    for damage in (pickle.dumps(Evil(), 2), b"", b"hello", b"h\x00", b"\x80\x02}q"):
        (tmp_path / "state.pt").write_bytes(damage)
        with pytest.raises(nr.UserError, match="damaged") as caught:
            nr.load_state(tmp_path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(nr.UserError, match="no state.pt"):
        nr.load_state(tmp_path / "nowhere")


def same(a, b):
    """Whether two states that were made plain by `as_plain` are equal, to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(x, b[name]) for name, x in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def fresh_state(name, seed, **numbers):
    """A config of the method, and its state before the first update, from weights of this seed."""
    c = tiny(name, **numbers)
    policy = rough(nr.replace(c, causal=name != "denoise"), seed)
    state = nr.METHODS[name].start(policy, c)
    if name == "seq2seq":
        state.models = {"rewriter": rough(c, seed + 1)}
    return c, state


class Coin(Arithmetic):
    """Random weights are right now and then: what counts is whether the length is even."""

    def grade(self, prompt, response):
        return float(len(response) % 2 == 0)


@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.parametrize(
    "name,numbers",
    [
        *((name, {}) for name in nr.METHODS),
        ("ppo", dict(arm="grpo")),
        ("self_rewarding", dict(judge="frozen")),
    ],
)
def test_load_state_restores_what_save_state_wrote(tmp_path, monkeypatch, name, numbers, updates):
    # What random weights write can always be read as a score, so that every round has pairs.
    monkeypatch.setattr(nr, "parse_score", lambda text: float(len(text) % 6))
    c, state = fresh_state(name, 0, **numbers)
    for _ in islice(nr.METHODS[name].loop(state, Coin(1, 1), c), updates):
        pass
    assert state.update == updates
    nr.save_state(tmp_path, state)
    _, other = fresh_state(name, 5, **numbers)
    assert not same(nr.as_plain(other), nr.as_plain(state))
    assert nr.load_state(tmp_path, into=other) is other
    assert same(nr.as_plain(other), nr.as_plain(state))
    assert same(nr.load_state(tmp_path), nr.as_plain(state))


@pytest.mark.parametrize("arm,cut", [("gae", 1), ("gae", 3), ("grpo", 2), ("rloo", 1)])
def test_a_killed_ppo_resumes_bit_for_bit(tmp_path, arm, cut):
    config = nr.replace(TINY, arm=arm, beta=0.05, updates=4)
    whole = nr.start_ppo(rough(config), config)
    logs = list(nr.ppo(whole, TASK, config))
    first = nr.start_ppo(rough(config), config)
    kept = list(islice(nr.ppo(first, TASK, config), cut))
    nr.save_state(tmp_path, first)
    second = nr.load_state(tmp_path, into=nr.start_ppo(rough(config), config))
    kept += list(nr.ppo(second, TASK, config))
    assert kept == logs  # every number, exactly
    assert same(nr.as_plain(second), nr.as_plain(whole))
    assert not same(nr.as_plain(second), nr.as_plain(first))


def test_a_killed_fit_resumes_bit_for_bit(tmp_path):
    def fresh():
        model = nr.Transformer(TINY, nr.rng(0, "init"))
        state = nr.Fit([model], nr.optimizers([model], 3e-3, 0.02))
        batches = nr.gpt_batches(model, nr.task_demos(TASK, TINY), TINY)
        return state, nr.fit(state, batches, 8, TINY)

    whole, loop = fresh()
    logs = list(loop)
    first, loop = fresh()
    kept = list(islice(loop, 3))
    nr.save_state(tmp_path, first)
    second, loop = fresh()
    nr.load_state(tmp_path, into=second)
    assert kept + list(loop) == logs
    assert same(nr.as_plain(second), nr.as_plain(whole))


# ---- rewards -----------------------------------------------------------------------------------


def rollout_of(texts, config=TINY):
    prompts = nr.encode_prompts(TASK, ["37+5="] * len(texts), config)
    response = nr.right_pad(TASK.encode(texts), config.pad_id, config.response)
    mask = nr.up_to_eos(response, config)
    order = torch.zeros_like(response)
    return nr.Rollout(prompts, response, mask, order, torch.arange(len(texts)))


def test_score_sits_on_the_last_real_token_and_a_missing_eos_gets_the_penalty():
    rollout = rollout_of(["#42<eos>", "37+5=42;#42<eos>", "42", "4" * TINY.response])
    reward = nr.at_end(torch.tensor([0.3, 0.7, 0.9, 0.9]), rollout, TINY)
    expected = torch.zeros(4, TINY.response)
    expected[0, 3] = 0.3
    expected[1, 11] = 0.7
    expected[2, 1] = expected[3, TINY.response - 1] = -1
    assert torch.allclose(reward, expected)
    assert ((reward != 0) <= (rollout.mask > 0)).all()


def scored(model, seed=0, logp_weight=0.7):
    """A scorer whose log-probs count."""
    return nr.Scorer(model, logp_weight, nr.rng(seed, "head"))


@torch.no_grad()
def score_by_hand(scorer, prompt, response, k):
    """The formula for the first k tokens, each read alone: no PAD, no batch, no cumsum."""
    trunk = scorer.trunk
    score = float(scorer.head(trunk.hidden(torch.cat([prompt, response[:k]])[None]))[0, -1])
    never = [TINY.pad_id, TINY.bos_id, TINY.mask_id]
    for i in range(k):
        logits = trunk(torch.cat([prompt, response[:i]])[None])[0, -1].double()
        logits[never] = -math.inf
        score += scorer.logp_weight.item() * float(logits.log_softmax(0)[response[i]])
    return score


@pytest.mark.parametrize("weight", [0.7, -0.2, 0.0])
def test_the_score_of_every_prefix_is_its_formula_whatever_the_padding(model, weight):
    scorer = scored(model, logp_weight=weight)
    b = rollout_of(["#42<eos>", "37+5=42;#42<eos>"])
    with torch.no_grad():
        score = scorer.prefixes(b.prompt, b.response)
    assert score.shape == (2, 1 + b.response.shape[1])
    for i, length in enumerate([4, 12]):
        for k in range(length + 1):
            expected = score_by_hand(scorer, b.prompt[i], b.response[i], k)
            assert float(score[i, k]) == pytest.approx(expected, abs=1e-4)
    # PAD on either side, and other rows in the batch
    prompt = F.pad(b.prompt.flip(0), (3, 0))
    wide = F.pad(b.response.flip(0), (0, 4))
    with torch.no_grad():
        padded = scorer.prefixes(prompt, wide).flip(0)
        whole = scorer(prompt, wide).flip(0)
        at = scorer.at(prompt, wide, torch.tensor([[12, 0, 3], [4, -1, 1]])).flip(0)
    for i, length in enumerate([4, 12]):
        assert torch.allclose(padded[i, : length + 1], score[i, : length + 1], atol=1e-5)
        assert float(whole[i]) == pytest.approx(float(score[i, length]), abs=1e-5)
    assert torch.allclose(at[0, [0, 2]], score[0, [4, 1]], atol=1e-5)
    assert torch.allclose(at[1], score[1, [12, 0, 3]], atol=1e-5)


def test_a_score_of_hidden_vectors_alone_never_learns_a_weight_for_log_probs(model):
    pairs = [("3+4=", "#7<eos>", "#8<eos>"), ("5+4=", "#9<eos>", "#8<eos>")]
    for weight, moves in ((0.0, False), (0.5, True)):
        scorer = scored(rough(TINY), logp_weight=weight)
        state = nr.Fit([scorer], nr.optimizers([scorer], 1e-2))
        logs = list(nr.fit(state, nr.preference_batches(scorer, pairs, TASK, TINY), 5, TINY))
        assert logs[0]["grad_norm"] > 0
        assert (scorer.logp_weight.item() != weight) == moves


def test_normalized_scores_have_mean_zero_and_variance_one(model):
    scorer = scored(model)
    rollout = nr.sample(model, random_batch(TINY, B=40)[0], TINY, generator=nr.rng(0, "s"))
    before = scorer(rollout.prompt, rollout.response)
    scorer.normalize(rollout, nr.replace(TINY, micro=7))
    after = scorer(rollout.prompt, rollout.response)
    assert float(after.mean().detach()) == pytest.approx(0, abs=1e-4)
    assert float(after.std(unbiased=False).detach()) == pytest.approx(1, abs=1e-3)
    assert torch.equal(before.argsort(), after.argsort())


def test_heads_of_reward_models_start_at_one_over_the_root_of_the_width_and_one(model):
    c = tiny("ppo", width=32)
    seen = []

    def train(name, modules, *numbers, **more):
        seen.append(modules[0].head.linear.weight.detach().clone())

    for seed in range(20):
        each = nr.replace(c, seed=seed)
        nr.scorer_models(rough(each), TASK, each, train)
        state = nr.start_refine(rough(each), nr.replace(tiny("refine"), width=32, seed=seed))
        seen += [scorer.head.linear.weight for scorer in (state.orm, state.sorm)]
    assert torch.cat(seen).detach().std() == pytest.approx(33**-0.5, rel=0.1)
    assert len({x[0, 0].item() for x in seen}) == 60


def test_bradley_terry_learns_what_the_pairs_say():
    """Preferred always ends in 0, the other never does: nothing else tells them apart."""
    config = nr.replace(TINY, base_batch=32)
    scorer = scored(nr.Transformer(config, nr.rng(0, "init")))
    prompts = TASK.prompts(200, nr.rng(0, "p"))
    pairs = [
        (p, f"#{i % 9 + 1}0<eos>", f"#{i % 9 + 1}{i % 7 + 1}<eos>") for i, p in enumerate(prompts)
    ]
    state = nr.Fit([scorer], nr.optimizers([scorer], 1e-2))
    batches = nr.preference_batches(scorer, pairs, TASK, config)
    logs = list(nr.fit(state, batches, 40, config, warmup=2))
    assert logs[-1]["pair_accuracy"] > 0.95
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=0.2)


def test_the_learned_signal_never_looks_at_the_truth(model):
    rollout = rollout_of(["#42<eos>", "#41<eos>"])
    state = nr.start_ppo(rough(TINY, 1), TINY)
    state.models = {"scorer": scored(model)}
    a = nr.learned(state, TASK, rollout, torch.tensor([1.0, 0.0]), TINY)
    assert torch.equal(a, nr.learned(state, TASK, rollout, torch.tensor([torch.nan, 5.0]), TINY))
    assert not a.requires_grad


# ---- ppo ---------------------------------------------------------------------------------------


class World(CharacterTask):
    """A task of digits: reward(prompt digit, response text) says all."""

    tokenizer, letters = Arithmetic.tokenizer, Arithmetic.letters

    def __init__(self, reward, digits="34"):
        self.reward, self.digits = reward, digits

    def prompts(self, n, generator, split="train"):
        return [self.digits[i] for i in torch.randint(len(self.digits), (n,), generator=generator)]

    def grade(self, prompt, response):
        return float(self.reward(prompt, response.removesuffix("<eos>")))


def play(world, response=2, no_eos=0.0, **numbers):
    """A run from random weights -> its state and its logs. One optimizer step a batch is usual."""
    usual = dict(prompts=16, samples=8, minibatch=128, epochs=1, updates=50, lr=1e-2)
    config = nr.replace(TINY, response=response, **usual | numbers)
    state = nr.start_ppo(nr.Transformer(config, nr.rng(config.seed, "init")), config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nr, "NO_EOS", no_eos)
        return state, list(nr.ppo(state, world, config))


class Alternating(World):
    """The digits in turn. Who is deaf to the prompt is right in half of the cases at most."""

    def prompts(self, n, generator, split="train"):
        return [self.digits[i % len(self.digits)] for i in range(n)]


def at_the_end(logs, number):
    """The mean of a number over the last five updates."""
    return sum(m[number] for m in logs[-5:]) / 5


# The ids of a small world end with the digit 7. With few of them a reward is soon found.
FEW_IDS = TASK.encode(["7"])[0][0] + 1


@pytest.mark.parametrize("arm", ["gae", "grpo", "rloo"])
def test_probe_one_token(arm):
    """One prompt, one rewarded first token of many: found and kept."""
    world = World(lambda x, y: y[:1] == "7", "3")
    _, logs = play(world, arm=arm, seed=0, vocab=FEW_IDS, updates=40)
    assert logs[0]["truth"] < 0.25 and at_the_end(logs, "truth") > 0.95


@pytest.mark.parametrize("arm", ["gae", "grpo", "rloo"])
def test_probe_reward_depends_on_the_prompt(arm):
    world = Alternating(lambda x, y: y[:1] == x)
    numbers = dict(response=3, vocab=FEW_IDS, updates=100, lr=5e-3)
    _, logs = play(world, arm=arm, **numbers)
    assert at_the_end(logs, "truth") > 0.65


def test_probe_credit_reaches_back_from_the_end():
    """The reward comes with EOS, the deed three tokens earlier."""
    world = World(lambda x, y: y[:1] == "7")
    _, logs = play(world, response=4, vocab=FEW_IDS)
    assert at_the_end(logs, "reward") > 0.9


def test_probe_constant_reward_is_what_the_value_head_learns_and_teaches_nothing_else():
    state, logs = play(World(lambda x, y: 1.0), no_eos=1.0, value_coef=1.0, lam=1.0)
    policy = state.policy
    prompt = torch.tensor([[1, 9], [1, 10]])
    rollout = nr.sample(policy, prompt, policy.config, generator=nr.rng(0, "s"))
    value = state.head(nr.predictive_hidden(policy, prompt, rollout.response))
    assert ((value - 1).abs() * rollout.mask).max() < 0.1
    state, logs = play(World(lambda x, y: 1.0), arm="grpo", no_eos=1.0, updates=3)
    assert all(m["flat_groups"] == 1 and m["loss"] == 0 and m["grad_norm"] == 0 for m in logs)
    # Where all rewards are equal, not one weight moves.
    pairs = zip(state.policy.parameters(), state.reference.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("arm", ["gae", "grpo", "rloo"])
def test_probe_a_huge_kl_weight_keeps_the_policy_at_its_reference(arm):
    world = World(lambda x, y: y[:1] == "7")
    numbers = dict(arm=arm, vocab=FEW_IDS, updates=30)
    _, free = play(world, **numbers)
    _, held = play(world, beta=30.0, epochs=2, **numbers)
    assert free[-1]["kl"] > 1.0 and abs(held[-1]["kl"]) < 0.2


@pytest.mark.parametrize("arm", ["gae", "grpo", "rloo"])
def test_ratio_is_one_before_the_first_update_and_every_weight_gets_a_gradient(arm):
    config = nr.replace(TINY, temperature=0.7, arm=arm, beta=0.1)
    state = nr.start_ppo(rough(config), config)
    policy = state.policy
    assert (state.head is None) == (arm != "gae")
    if arm == "gae":
        torch.nn.init.normal_(state.head.linear.weight, generator=nr.rng(0, "v"))
    prompt, _ = random_batch(config)
    group = torch.arange(6) // 3
    rollout = nr.sample(policy, prompt, config, group=group, generator=nr.rng(0, "s"))
    rollout = nr.annotate(state, rollout, config)
    # A GPT reads them again if it is asked again, since the values come from the same vectors.
    assert torch.equal(nr.annotate(state, rollout, config).value, rollout.value)
    hidden = nr.predictive_hidden(policy, rollout.prompt, rollout.response)
    logp = nr.gather_logprobs(policy, hidden, rollout.response, 0.7)
    assert torch.equal(logp.detach(), rollout.logp) and torch.equal(rollout.logp, rollout.ref_logp)
    value = None if state.head is None else state.head(hidden)
    assert (rollout.value == 0).all() == (arm != "gae")
    reward = nr.at_end(torch.tensor([1.0, 0, 0, 1, 1, 0]), rollout, config)
    how = nr.PPO_ARMS[arm]
    rollout.adv, rollout.ret = how.credit(rollout, reward, config)
    denom = how.denom(rollout.mask)
    how.objective(logp, value, rollout, denom, config).backward()
    trained = [*policy.parameters(), *(state.head.parameters() if state.head else [])]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_without_beta_the_reference_reads_a_few_rollouts_and_the_kl_is_theirs(monkeypatch, beta):
    config = nr.replace(TINY, arm="gae", beta=beta, micro=4)
    state = nr.start_ppo(rough(config), config)
    # The reference is another model, or all of its log-probs would be those of the policy.
    state.reference = rough(nr.replace(config, seed=config.seed + 1))
    for p in state.reference.parameters():
        p.data = p.data * 1.1
    prompt, _ = random_batch(config)
    prompt = prompt.repeat(4, 1)
    group = torch.arange(len(prompt)) // 3
    sampled = nr.sample(state.policy, prompt, config, group=group, generator=nr.rng(0, "s"))

    all_rows = nr.annotate(state, sampled, nr.replace(config, beta=1.0))
    monkeypatch.setattr(nr, "KL_ROWS", 5)
    b = nr.annotate(state, sampled, config)
    read = torch.arange(len(prompt)) < (len(prompt) if beta > 0 else 5)
    assert torch.equal(nr.read_by_reference(b, config), read)
    assert torch.allclose(b.ref_logp[read], all_rows.ref_logp[read], atol=1e-5)
    assert torch.equal(b.ref_logp[~read], b.logp[~read])
    assert torch.equal(b.logp, all_rows.logp) and torch.equal(b.value, all_rows.value)

    b.adv, b.ret = nr.PPO_ARMS["gae"].credit(b, torch.zeros_like(b.mask), config)
    metrics = nr.policy_update(state, b, nr.PPO_ARMS["gae"], config)
    kl = ((all_rows.logp - all_rows.ref_logp) * b.mask).sum(1)[read].mean()
    assert metrics["kl"] == pytest.approx(float(kl), abs=1e-4) and abs(float(kl)) > 0.01


def weights_after(clip, **numbers):
    """All weights after a run in a world where it pays to end, and the run's logs."""
    world = World(lambda x, y: 1.0)
    state, logs = play(world, no_eos=-1.0, updates=6, clip=clip, value_coef=0.0, **numbers)
    return torch.cat([p.detach().flatten() for p in state.policy.parameters()]), logs


def test_ppo_clips_by_default(monkeypatch):
    """Several optimizer steps for a batch of rollouts, or no ratio ever leaves 1 and clip is idle.

    The critic's band is `clip` too. Its loss has no weight here, so only the policy's is left.
    """
    default = nr.PPOConfig()
    prompts, samples = 16, 8
    share = default.minibatch / (default.prompts * default.samples)
    usual = dict(
        prompts=prompts,
        samples=samples,
        minibatch=round(share * prompts * samples),
        epochs=default.epochs,
        arm=default.arm,
    )
    inner = nr.optimizer_step
    steps = []

    def counted(*arguments):
        steps.append(arguments)
        return inner(*arguments)

    monkeypatch.setattr(nr, "optimizer_step", counted)
    clipped, logs = weights_after(default.clip, **usual)
    assert len(steps) / len(logs) > 1
    assert max(m["clipfrac"] for m in logs) > 0
    free, _ = weights_after(1e9, **usual)
    assert not torch.equal(clipped, free)

    # With one step a batch all ratios are 1, and the same comparison finds no difference.
    usual |= dict(minibatch=prompts * samples, epochs=1)
    clipped, logs = weights_after(default.clip, **usual)
    free, _ = weights_after(1e9, **usual)
    assert torch.equal(clipped, free) and all(m["clipfrac"] == 0 for m in logs)


def test_credits_by_hand():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    zero = torch.zeros(2, 3, dtype=torch.long)
    logp = torch.full((2, 3), -1.0)
    ref = torch.full((2, 3), -3.0)  # so k1 is 2 for each token
    r = nr.Rollout(zero, zero, mask, zero, zero[:, 0], logp, ref, torch.zeros(2, 3))
    reward = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    config = nr.replace(TINY, lam=1.0, beta=0.1)
    # (16): R = (1 - .1*4, 0 - .1*6) = (.6, -.6); minus the other one: (1.2, -1.2)
    adv, _ = nr.rloo_credit(r, reward, config)
    assert torch.allclose(adv, mask * torch.tensor([[1.2], [-1.2]]))
    # (15): +-.5 / (.7071 + 1e-4), whatever the KL
    adv, _ = nr.grpo_credit(r, reward, config)
    assert torch.allclose(adv, mask * torch.tensor([[0.70701], [-0.70701]]), atol=1e-4)
    # (12), (13): returns are what is still to come: 1 - .4, 1 - .2 and -.6, -.4, -.2
    adv, ret = nr.gae_credit(r, reward, config)
    assert torch.allclose(ret, torch.tensor([[0.6, 0.8, 0.0], [-0.6, -0.4, -0.2]]))
    assert torch.allclose(adv, nr.whiten(ret, mask), atol=1e-6)


def test_the_value_band_is_the_clip_by_hand():
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    b = nr.Rollout(
        prompt=zero.long(),
        response=zero.long(),
        mask=one,
        order=zero.long(),
        group=torch.zeros(1, dtype=torch.long),
        logp=zero,
        ref_logp=zero,
        value=zero,
        adv=zero,
        ret=one,
    )

    def loss(value, **numbers):
        config = nr.replace(TINY, **numbers)
        return float(nr.critic_objective(zero, value * one, b, one.sum(), config))

    # The old value is 0 and the return 1. For V = 2 the plain (2 - 1)^2 = 1 is larger than the
    # clipped (0.2 - 1)^2 = 0.64, and for V = 0.9 the plain 0.01 is smaller than it.
    assert loss(2.0) == pytest.approx(0.1 * 0.5)
    assert loss(0.9) == pytest.approx(0.1 * 0.5 * 0.64)
    # A wider band holds V = 0.9, and the weight of the loss is value_coef.
    assert loss(0.9, clip=1.0) == pytest.approx(0.1 * 0.5 * 0.01)
    assert loss(0.9, clip=1.0, value_coef=1.0) == pytest.approx(0.5 * 0.01)


def test_metrics_are_masked_and_mean_what_they_say():
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0]])
    response = torch.tensor([[7, 2, 0], [7, 7, 7], [2, 0, 0], [2, 0, 0]])
    logp = torch.tensor([[-1.0, -1.0, 99.0], [-2.0, -2.0, -2.0], [-1.0, 9, 9], [-1.0, 9, 9]])
    r = nr.Rollout(response, response, mask, response, torch.tensor([0, 0, 1, 1]), logp)
    reward = torch.tensor([[0, 1.0, 0], [0, 0, -1.0], [0.5, 0, 0], [0.5, 0, 0]])
    truth = torch.tensor([1.0, 0.0, 0.0, 1.0])
    m = nr.rollout_metrics(r, reward, truth, nr.replace(TINY, samples=2))
    assert m == pytest.approx(
        dict(reward=0.25, truth=0.5, entropy=10 / 7, length=7 / 4, ended=0.75, flat_groups=0.5)
    )


def test_clipfrac_counts_what_the_clip_stops_and_nothing_else():
    """The same tokens by the gradient: it is 0 exactly where the clip of (14) acts."""
    c = tiny("ppo", arm="grpo")
    model = rough(c)
    b = rollout_of(["37+5=42;#42<eos>", "#2<eos>", "37+5=42;", "#42<eos>"])
    logp = nr.token_logprobs(model, b.prompt, b.response, c.temperature).detach()
    # Ratios of 1.5, 0.5, 1.1 and 1 in turn, advantages of both signs.
    ratio = torch.tensor([1.5, 0.5, 1.1, 1.0]).repeat(c.response)[: c.response]
    b.logp = logp - ratio.log()
    b.ref_logp = logp
    b.adv = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None] * b.mask
    seen = []

    def objective(now, value, part, denom, c):
        now = now.detach().requires_grad_()
        loss = nr.grpo_objective(now, value, part, denom, c)
        (grad,) = torch.autograd.grad(loss, now)
        seen.append(float(((grad == 0) * part.mask).sum()))
        return loss

    state = nr.start_ppo(model, c)
    denom = b.mask.sum()
    loss = nr.rollout_loss(state, b, objective, denom, c, nr.estimate_gpt)
    _, metrics = loss(torch.arange(4))
    assert 4 < seen[0] < float(denom) - 4
    assert float(metrics["clipfrac"]) == pytest.approx(seen[0] / float(denom))


def test_an_optimizer_step_is_divided_by_the_count_that_its_arm_makes_of_all_its_rows(monkeypatch):
    c = tiny("ppo", arm="grpo", updates=1, epochs=1, minibatch=8, micro=3)
    seen = []

    def objective(logp, value, b, denom, c):
        seen.append((float(denom), float(b.mask.sum())))
        return 0.0 * logp.sum()

    def denoms(**changed):
        seen.clear()
        monkeypatch.setitem(nr.PPO_ARMS, "grpo", nr.Arm(nr.grpo_credit, objective, **changed))
        list(nr.ppo(nr.start_ppo(rough(c), c), Arithmetic(1, 1), c))
        steps = [seen[i : i + 3] for i in range(0, len(seen), 3)]  # parts of 3, 3 and 2 rows
        assert len(steps) == c.prompts * c.samples // 8
        return steps

    for step in denoms():  # every token of the step weighs the same
        assert {denom for denom, _ in step} == {sum(tokens for _, tokens in step)}
    for step in denoms(denom=len):  # one's own count: the rows of the step
        assert {denom for denom, _ in step} == {8.0}
