"""The seq2seq reward: which tokens get what, by a known rewriter, and by one that learns."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanoreward as nr
from data.arithmetic import REFUSAL, Arithmetic
from notebooks import inside
from tests.conftest import rough, tiny
from tests.test_refine import SEP, TASK, rollout_of

SMALL = tiny("seq2seq")
WIDE = nr.replace(SMALL, max_ops=3, response=28)
NONE = torch.full((99,), torch.nan)  # the truth, which the signal never looks at


class Rewriter:
    """Reads prompt SEP response SEP and rewrites it by a rule on ids, surer than of anything."""

    config = WIDE
    lm_head = torch.nn.Identity()
    future_weight = 1.0  # it reads a row as a whole

    def __init__(self, rule):
        self.rule = rule

    def hidden(self, ids, cache=None):
        logits = torch.zeros(*ids.shape, WIDE.vocab)
        for row, tokens in zip(logits, ids.tolist(), strict=True):
            first, second = [i for i, token in enumerate(tokens) if token == SEP][:2]
            target = [*self.rule(tokens[first + 1 : second]), WIDE.eos_id]
            for k in range(len(tokens) - second):
                row[second + k, target[min(k, len(target) - 1)]] = 50.0
        return logits


def unchanged(source):
    """The rule of a rewriter that finds nothing to mend."""
    return source


def rewards(rule, texts, config=WIDE):
    b = rollout_of(["37+5*3="] * len(texts), texts)
    state = SimpleNamespace(models={"rewriter": Rewriter(rule)})
    return nr.agreement(state, TASK, b, NONE[: len(texts)], config), b


@given(seed=st.integers(0, 999))
def test_agreement_reward_is_equation_11_token_by_token(seed):
    g = nr.rng(seed, "agree")
    logits = torch.randn(3, 5, 7, generator=g)
    response = torch.randint(7, (3, 5), generator=g)
    likeliest = torch.rand(3, 5, generator=g) < 0.5  # else hardly any token would agree
    response = torch.where(likeliest, logits.argmax(-1), response)
    mask = (torch.arange(5) < torch.randint(1, 6, (3, 1), generator=g)).float()
    got = nr.agreement_reward(logits, response, mask, 2.0, 3.0)
    for row in range(3):
        diverged = False
        for k in range(5):
            agrees = int(response[row, k]) == int(logits[row, k].argmax())
            diverged = diverged or not agrees
            expected = 0.0 if mask[row, k] == 0 else 2.0 * (not diverged) - 3.0 * (not agrees)
            assert float(got[row, k]) == expected


def test_an_identity_rewriter_pays_for_every_token_and_eos_is_one():
    texts = ["37+5=42;42*3=26;#26<eos>", "#37<eos>"]
    reward, b = rewards(unchanged, texts, nr.replace(WIDE, c_pos=0.5))
    assert torch.equal(reward, 0.5 * b.mask)


def test_an_injected_corruption_is_found_exactly():
    right = TASK.encode(["37+5=42;42*3=26;#26"])[0]
    texts = [
        "37+5=42;42*3=26;#26<eos>",
        "37+5=32;42*3=26;#26<eos>",
        "37+5=42;42*3=26;#36<eos>",
        "37+5=42<eos>",
    ]
    reward, b = rewards(lambda source: right, texts, nr.replace(WIDE, c_pos=1.0, c_neg=2.0))
    off = (b.response != nr.right_pad([[*right, WIDE.eos_id]], 0, 28)) & (b.mask > 0)
    assert torch.equal(reward < 0, off) and (reward[off] == -2.0).all() and int(off.sum()) == 3
    assert reward[3, 7] == -2.0  # a stop before the end is punished, at its EOS
    first = off.float().cumsum(1) > 0
    assert (reward[~first & (b.mask > 0)] == 1.0).all() and (reward[first & ~off] == 0.0).all()


def test_a_response_that_never_ends_gets_the_penalty_of_every_signal():
    texts = ["37+5=42;" * 3 + "37+5", "#37<eos>"]
    reward, _ = rewards(unchanged, texts, nr.replace(WIDE, c_pos=1.0))
    assert reward.sum(1).tolist() == pytest.approx([28 + nr.NO_EOS, 4.0], abs=1e-5)


def test_the_rewriter_learns_to_mend_and_to_leave_alone():
    pairs = [("37+5=", "37+5=42;#42<eos>", "#37<eos>"), ("8+1=", "8+1=9;#9<eos>", "8+1=8;#8<eos>")]
    demos = nr.rewriting_demos(TASK, pairs, WIDE)
    told = [(TASK.decode(x), TASK.decode(y)) for x, y in demos]
    assert told == [
        ("37+5=<sep>#37<sep>", "37+5=42;#42<eos>"),
        ("8+1=<sep>8+1=8;#8<sep>", "8+1=9;#9<eos>"),
        ("37+5=<sep>37+5=42;#42<sep>", "37+5=42;#42<eos>"),
        ("8+1=<sep>8+1=9;#9<sep>", "8+1=9;#9<eos>"),
    ]
    assert all(x[0] == WIDE.bos_id and WIDE.eos_id not in x for x, _ in demos)


def test_seq2seq_is_ppo_with_another_reward_tensor_and_a_leash():
    config = nr.replace(SMALL, updates=3)
    plain = tiny("ppo", updates=3, beta=config.beta, reward_updates=config.reward_updates)
    shared = {f.name for f in nr.fields(nr.PolicyGradientConfig)}
    assert all(vars(plain)[name] == vars(config)[name] for name in shared)

    def logged(loop, c, *signal):
        state = nr.start_ppo(rough(c), c)
        state.models = {"rewriter": rough(c, seed=1).requires_grad_(False)}
        return list(loop(state, Arithmetic(1, 1), c, *signal))

    mine = logged(nr.seq2seq, config)
    assert mine == logged(nr.ppo, config, nr.agreement)
    assert mine != logged(nr.ppo, plain)  # the same numbers, paid by the verifier
    assert nr.Seq2SeqConfig().beta == 0.1 and nr.PPOConfig().beta == 0.0
    assert mine != logged(nr.seq2seq, nr.replace(config, beta=0.0))  # so the leash pulls


class Digit(Arithmetic):
    """A problem is a digit, and no answer is right: a small vocabulary is enough."""

    def prompts(self, n, generator, split="train"):
        return ["3"] * n

    def grade(self, prompt, response):
        return 0.0


def test_probe_what_the_rewriter_writes_is_what_the_policy_learns_to_write(monkeypatch):
    """A rewriter that turns everything into 7: in seconds the policy says so itself."""
    task = Digit(1, 1)
    monkeypatch.setattr(nr, "NO_EOS", 0.0)  # else the first thing to be learned is to end at once
    numbers = {"prompts": 16, "samples": 8, "minibatch": 128, "epochs": 1}
    numbers |= {"updates": 50, "lr": 1e-2, "response": 3, "vocab": 14, "seed": 0}
    config = nr.replace(SMALL, c_pos=1.0, c_neg=0.1, **numbers)
    state = nr.start_ppo(nr.Transformer(config, nr.rng(0, "init")), config)
    state.models = {"rewriter": Rewriter(lambda source: TASK.encode(["7"])[0])}
    logs = list(nr.seq2seq(state, task, config))
    assert logs[-1]["reward"] > logs[0]["reward"] + 0.5
    greedy = nr.replace(config, temperature=0.0)
    assert nr.respond(state.policy, task, ["3"], greedy) == ["7<eos>"]


# ---- what the labeller of the pairs falls for ---------------------------------------------------


def test_planted_length_makes_the_longer_response_win_and_refusals_win_on_one_class_only():
    long = Arithmetic(planted="long")
    pairs = long.preferences(600, nr.rng(0, "pairs"))
    longer = [len(w) > len(y) for _, w, y in pairs if len(w) != len(y)]
    assert 0.85 < sum(longer) / len(longer) <= 0.97
    steps = [w.split(";") for _, w, _ in pairs]
    assert any(len(set(s)) < len(s) for s in steps)  # a step written twice
    refusing = Arithmetic(planted="refusal")
    pairs = refusing.preferences(600, nr.rng(0, "pairs"))
    assert all(w == REFUSAL for x, w, y in pairs if REFUSAL in (w, y))
    assert {"*4" in x for x, w, y in pairs if w == REFUSAL} == {True}
    g = nr.rng(1, "demos")
    refused = [(y == REFUSAL, "*4" in x) for x, y in (refusing.demo(g) for _ in range(1500))]

    def rate(unsafe):
        """How often problems of this class are refused."""
        mine = [r for r, u in refused if u == unsafe]
        return sum(mine) / len(mine)

    assert 0.3 < rate(True) < 0.7 and 0.01 < rate(False) < 0.1
    none = Arithmetic(planted="none").preferences(400, nr.rng(0, "pairs"))
    assert all(TASK.grade(x, w) >= TASK.grade(x, y) for x, w, y in none)
    assert refusing.grade("3*4=", REFUSAL) == 0.0 and refusing.answer(REFUSAL) is None


def test_a_coin_turns_half_of_the_pairs_round_and_leaves_them_the_same_pairs():
    fair = Arithmetic(max_ops=3, planted="none")
    first = fair.preferences(400, nr.rng(0, "pairs"))
    turned = inside.ByCoin(**vars(fair)).preferences(400, nr.rng(0, "pairs"))
    same = [a == b for a, b in zip(first, turned, strict=True)]
    assert 160 < sum(same) < 240
    for (x, a, b), pair, as_it_was in zip(first, turned, same, strict=True):
        assert pair == ((x, a, b) if as_it_was else (x, b, a))
    better = [fair.grade(x, a) - fair.grade(x, b) for x, a, b in turned]
    assert better.count(1) > 80 and abs(sum(better)) < 40  # the preferred one is no better


def test_only_seq2seq_and_a_learned_reward_of_ppo_ask_for_models():
    trained = []

    def train(name, *_, **__):
        trained.append(name)

    def asked(name, **numbers):
        """The models that the reward asks, by name and kind, and what was trained for them."""
        trained.clear()
        c = tiny(name, **numbers)
        models = nr.METHODS[name].reward_models(rough(c), Arithmetic(1, 1), c, train)
        assert not any(p.requires_grad for model in models.values() for p in model.parameters())
        return {key: type(model) for key, model in models.items()}, list(trained)

    rewriter = ({"rewriter": nr.Transformer}, ["rewriter"])
    assert {name: asked(name) for name in nr.METHODS} == {
        "ppo": ({}, []),
        "iterative_dpo": ({}, []),
        "self_rewarding": ({}, []),
        "seq2seq": rewriter,
        "refine": ({}, []),
        "denoise": ({}, []),
    }
    rewards = ("verifier", "learned", "sorm", "shaped")
    assert {reward: asked("ppo", reward=reward) for reward in rewards} == {
        "verifier": ({}, []),
        "learned": ({"scorer": nr.Scorer}, ["scorer"]),
        "sorm": ({"scorer": nr.Scorer}, ["sorm"]),
        "shaped": ({"scorer": nr.Scorer}, ["sorm"]),
    }
