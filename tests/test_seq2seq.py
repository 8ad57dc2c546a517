"""The seq2seq reward: which tokens get what, by a rewriter that is known, and by one that learns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanoreward as nr
import train_small
from data.arithmetic import REFUSAL, Arithmetic
from tests.conftest import TINY, rough
from tests.test_refine import SEP, TASK, WIDE, rollout_of

NONE = torch.full((99,), torch.nan)  # the truth, which the signal never looks at


class Rewriter:
    """Reads prompt SEP response SEP and rewrites it by a rule on ids; surer of it than of anything."""

    config, lm_head = WIDE, torch.nn.Identity()

    def __init__(self, rule):
        self.rule = rule

    def hidden(self, ids):
        logits = torch.zeros(*ids.shape, WIDE.vocab)
        for row, tokens in zip(logits, ids.tolist(), strict=True):
            first, second = [i for i, token in enumerate(tokens) if token == SEP][:2]
            target = [*self.rule(tokens[first + 1 : second]), WIDE.eos]
            for k in range(len(tokens) - second):
                row[second + k, target[min(k, len(target) - 1)]] = 50.0
        return logits


def rewards(rule, texts, config=WIDE):
    b = rollout_of(["37+5*3="] * len(texts), texts)
    return nr.agreement({"rewriter": Rewriter(rule)}, TASK, b, NONE[: len(texts)], config), b


@given(seed=st.integers(0, 999), top=st.integers(1, 3))
def test_agreement_reward_is_equation_11_token_by_token(seed, top):
    g = nr.rng(seed, "agree")
    logits, response = torch.randn(3, 5, 7, generator=g), torch.randint(7, (3, 5), generator=g)
    mask = (torch.arange(5) < torch.randint(1, 6, (3, 1), generator=g)).float()
    got = nr.agreement_reward(logits, response, mask, top, 0.0, 2.0, 3.0)
    for row in range(3):
        diverged = False
        for k in range(5):
            agrees = int(response[row, k]) in logits[row, k].topk(top).indices.tolist()
            diverged = diverged or not agrees
            expected = 0.0 if mask[row, k] == 0 else 2.0 * (not diverged) - 3.0 * (not agrees)
            assert float(got[row, k]) == expected
    likely = nr.agreement_reward(logits, response, mask, 1, 0.1, 2.0, 3.0)
    p = logits.softmax(-1).gather(-1, response[..., None])[..., 0]
    assert torch.equal(likely < 0, (p < 0.1) & (mask > 0))


def test_an_identity_rewriter_pays_for_every_token_and_eos_is_one():
    texts = ["37+5=42;42*3=26;#26<eos>", "#37<eos>"]
    reward, b = rewards(lambda source: source, texts, nr.replace(WIDE, c_pos=0.5))
    assert torch.equal(reward, 0.5 * b.mask)
    reward, b = rewards(lambda source: source, texts, nr.replace(WIDE, per_token=True, c_pos=0.5))
    assert torch.allclose(
        reward.sum(1), torch.full((2,), 0.5)
    )  # over the length: long ones do not collect more


def test_an_injected_corruption_is_found_exactly():
    right = TASK.encode(["37+5=42;42*3=26;#26"])[0]
    texts = [
        "37+5=42;42*3=26;#26<eos>",
        "37+5=32;42*3=26;#26<eos>",
        "37+5=42;42*3=26;#36<eos>",
        "37+5=42<eos>",
    ]
    reward, b = rewards(lambda source: right, texts, nr.replace(WIDE, c_pos=1.0, c_neg=2.0))
    off = (b.response != nr.right_pad([[*right, WIDE.eos]], 0, 28)) & (b.mask > 0)
    assert torch.equal(reward < 0, off) and (reward[off] == -2.0).all() and int(off.sum()) == 3
    assert reward[3, 7] == -2.0  # a stop before the end is punished, at its EOS
    first = off.float().cumsum(1) > 0
    assert (reward[~first & (b.mask > 0)] == 1.0).all() and (reward[first & ~off] == 0.0).all()


def test_a_response_that_never_ends_gets_the_penalty_of_every_signal():
    texts = ["37+5=42;" * 3 + "37+5", "#37<eos>"]
    reward, _ = rewards(lambda source: source, texts, nr.replace(WIDE, c_pos=1.0))
    assert reward.sum(1).tolist() == pytest.approx([28 + WIDE.no_eos, 4.0], abs=1e-5)


def test_padding_and_batch_order_change_no_token_reward():
    state = {"rewriter": rough(WIDE)}
    prompts = ["37+5*3=", "8+1=", "90*2-7+1="]
    texts = ["37+5=42;42*3=26;#26<eos>", "#9<eos>", "90*2=80;80-7=73;73+1=74;#74<eos>"]

    def scored(rows, micro):
        b = rollout_of([prompts[i] for i in rows], [texts[i] for i in rows])
        return nr.agreement(state, TASK, b, NONE[: len(rows)], nr.replace(WIDE, micro=micro, top=3))

    whole = scored([0, 1, 2], 64)
    assert torch.allclose(scored([2, 0, 1], 2), whole[[2, 0, 1]])
    for i in range(3):
        assert torch.allclose(scored([i], 64)[0], whole[i])
    assert not whole.isnan().any() and not torch.equal(whole[0], whole[2])


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
    assert all(x[0] == WIDE.bos and WIDE.eos not in x for x, _ in demos)


def test_seq2seq_is_ppo_with_another_reward_tensor():
    config = nr.replace(TINY, updates=3)
    logs = []
    for loop, c in (
        (nr.seq2seq, config),
        (nr.ppo, nr.replace(config, reward="seq2seq")),
        (nr.ppo, config),
    ):
        state = nr.start_ppo(rough(config), c) | {
            "rewriter": rough(config, seed=1).requires_grad_(False)
        }
        logs.append(list(loop(state, Arithmetic(1, 1), c)))
    assert logs[0] == logs[1] and logs[0] != logs[2]
    leashed = nr.start_seq2seq(rough(config), nr.replace(config, rewriter_beta=0.3))
    assert leashed["beta"] == 0.3 and leashed.keys() == state.keys() - {"rewriter"}


def test_probe_what_the_rewriter_writes_is_what_the_policy_learns_to_write():
    """A rewriter that turns everything into #5: in seconds the policy says so itself."""
    task, config = (
        Arithmetic(1, 1),
        nr.replace(TINY, updates=40, lr=5e-3, prompts=16, samples=4, response=4),
    )
    config = nr.replace(config, c_pos=1.0, c_neg=0.3)  # else an early end is the safest
    state = nr.start_seq2seq(rough(config), config) | {
        "rewriter": Rewriter(lambda source: TASK.encode(["#5"])[0])
    }
    logs = list(nr.seq2seq(state, task, config))
    assert logs[-1]["reward"] > logs[0]["reward"] + 0.5
    assert "#5<eos>" in nr.respond(
        state["policy"], task, ["3+4="], nr.replace(config, temperature=0.0)
    )


# ---- what the labeller of the pairs falls for ---------------------------------------------------


def test_planted_length_makes_the_longer_response_win_and_refusals_win_on_one_class_only():
    long = Arithmetic(planted="long")
    pairs = long.preferences(600, nr.rng(0, "pairs"))
    longer = [len(w) > len(y) for _, w, y in pairs if len(w) != len(y)]
    assert 0.85 < sum(longer) / len(longer) <= 0.97
    assert any(
        ";" in w and len(set(w.split(";"))) < len(w.split(";")) for _, w, _ in pairs
    )  # a step written twice
    refusing = Arithmetic(planted="refusal")
    pairs = refusing.preferences(600, nr.rng(0, "pairs"))
    assert all(w == REFUSAL for x, w, y in pairs if REFUSAL in (w, y))
    assert {"*4" in x for x, w, y in pairs if w == REFUSAL} == {True}
    g = nr.rng(1, "demos")
    refused = [(y == REFUSAL, "*4" in x) for x, y in (refusing.demo(g) for _ in range(1500))]
    rate = lambda unsafe: (
        sum(r for r, u in refused if u == unsafe) / sum(u == unsafe for _, u in refused)
    )  # noqa: E731
    assert 0.3 < rate(True) < 0.7 and 0.01 < rate(False) < 0.1
    none = Arithmetic(planted="none").preferences(400, nr.rng(0, "pairs"))
    assert all(TASK.grade(x, w) >= TASK.grade(x, y) for x, w, y in none)
    assert refusing.grade("3*4=", REFUSAL) == 0.0 and refusing.answer(REFUSAL) is None


def test_only_ppo_asks_for_a_learned_reward(monkeypatch):
    monkeypatch.setattr(train_small, "rewriter_model", lambda c, cache: "rewriter")
    monkeypatch.setattr(train_small, "scorer_model", lambda c, cache: "scorer")
    asked = {
        (name, reward): train_small.reward_models(
            name, nr.replace(nr.Config(), reward=reward), None
        )
        for name in nr.LOOPS
        for reward in nr.SIGNALS
    }
    paid = {key: x for key, x in asked.items() if x}
    rewriter = {"rewriter": "rewriter"}
    assert paid == {("ppo", "learned"): "scorer", ("ppo", "seq2seq"): rewriter} | {
        ("seq2seq", x): rewriter for x in nr.SIGNALS
    }
