"""ppo --reward sorm and --reward shaped: a step is paid by how it changes what the SORM expects."""

import runpy
from types import SimpleNamespace

import pytest
import torch

import nanoreward as nr
from data.arithmetic import Arithmetic
from tests.conftest import ROOT, rough, tiny
from tests.test_refine import TASK, Ones, rollout_of

SMALL = tiny("ppo", reward="sorm", reward_data=40)
WIDE = nr.replace(SMALL, max_ops=3, response=28)
PROMPTS = ["37+5*3=", "8+1=", "90*2-7+1=", "37+5*3=", "37+5*3="]
TEXTS = [
    "37+5=42;42*3=26;#26<eos>",
    "#9<eos>",
    "90*2=80;80-7=73;73+1=74;#74<eos>",
    "37+5=42;42*3=26;",  # no end, and its last token ends a step
    "37+5=42;" * 3 + "37+5",  # no end: the room is full
]
ENDED = torch.tensor([True, True, True, False, False])


class Blind(Arithmetic):
    """Whoever asks for the truth gets an exception."""

    def grade(self, *_):
        raise AssertionError("the true grader was asked")

    rubric = truth = step_ok = answer = grade


@pytest.fixture
def state():
    """A SORM that says something else of every prefix."""
    scorer = nr.Scorer(rough(WIDE), 0.05, nr.rng(0, "sorm"))
    torch.nn.init.normal_(scorer.head.linear.weight, generator=nr.rng(1, "sorm"))
    return SimpleNamespace(models={"scorer": scorer})


def paid(state, rows=range(5), truth=torch.nan, task=TASK, **numbers):
    b = rollout_of([PROMPTS[i] for i in rows], [TEXTS[i] for i in rows])
    truth = torch.full((len(b.mask),), truth)
    return nr.step_progress(state, task, b, truth, nr.replace(WIDE, **numbers)), b


@torch.no_grad()
def believed(state, prompt, response):
    """The SORM's probability of a prefix that is read alone, without PAD on either side."""
    prompt = prompt[prompt != WIDE.pad_id][None]
    scorer = state.models["scorer"]
    hidden = scorer.trunk.hidden(torch.cat([prompt, response[None]], 1))[:, -1]
    logp = nr.token_logprobs(scorer.trunk, prompt, response[None], 1.0).sum(1)
    return float((scorer.head(hidden) + scorer.logp_weight * logp).sigmoid())


def test_a_reward_stands_where_a_step_ends_and_is_the_change_that_the_step_made(state):
    reward, b = paid(state)
    ends = [[8, 16, 20], [3], [8, 16, 24, 28], [8, 16], [8, 16, 24, 28]]
    expected = torch.zeros_like(reward)
    for i, row in enumerate(ends):
        before = believed(state, b.prompt[i], b.response[i, :0])
        for end in row:
            after = believed(state, b.prompt[i], b.response[i, :end])
            expected[i, end - 1] = after - before
            before = after
        expected[i, row[-1] - 1] += 0.0 if ENDED[i] else nr.NO_EOS
    assert torch.allclose(reward, expected, atol=1e-5)
    assert torch.equal(reward != 0, expected != 0)  # and nowhere else, not even by rounding
    assert (expected[:3].abs() > 1e-3).sum() == 8  # no step of these is without a say


def test_the_rewards_of_a_response_add_up_to_its_end_minus_its_beginning(state):
    reward, b = paid(state)
    ends = nr.prefix_ends(TASK, b)
    with torch.no_grad():
        p = state.models["scorer"].at(b.prompt, b.response, ends).sigmoid()
    whole = p.gather(1, ends.argmax(1, keepdim=True))[:, 0]
    penalty = torch.where(ENDED, 0.0, nr.NO_EOS)
    assert torch.allclose(reward.sum(1), whole - p[:, 0] + penalty, rtol=0, atol=1e-6)
    assert (whole - p[:, 0]).abs().min() > 1e-3


def test_with_the_verifier_at_the_end_the_rewards_add_up_to_the_truth_minus_the_beginning(state):
    """So for every response to a problem the sum differs from the truth by the same number."""
    alone, b = paid(state)
    ends = nr.prefix_ends(TASK, b)
    truth = nr.grades(TASK, b)
    assert sorted(set(truth.tolist())) == [0.0, 1.0]
    reward = nr.shaped_progress(state, TASK, b, truth, WIDE)
    with torch.no_grad():
        empty = state.models["scorer"].at(b.prompt, b.response, ends).sigmoid()[:, 0]
    penalty = torch.where(ENDED, 0.0, nr.NO_EOS)
    assert torch.allclose(reward.sum(1), truth - empty + penalty, rtol=0, atol=1e-6)
    last = b.mask.sum(1, keepdim=True).long() - 1
    elsewhere = torch.ones_like(reward).scatter(1, last, 0.0) > 0
    assert torch.equal(reward[elsewhere], alone[elsewhere])  # on the way it is the SORM's alone
    other = nr.shaped_progress(state, TASK, b, 1 - truth, WIDE)
    assert torch.allclose((other - reward).sum(1), 1 - 2 * truth, atol=1e-6)


def test_a_response_without_an_end_pays_for_it_at_its_last_token(state, monkeypatch):
    dear, b = paid(state)
    monkeypatch.setattr(nr, "NO_EOS", 0.0)
    free, _ = paid(state)
    last = torch.zeros_like(dear).scatter(1, b.mask.sum(1, keepdim=True).long() - 1, 1.0)
    assert torch.allclose(free - dear, last * ~ENDED[:, None], rtol=0, atol=1e-6)


def test_neither_fewer_prefixes_nor_other_rows_nor_micro_batches_change_a_reward(state):
    whole, b = paid(state)
    assert (nr.prefix_ends(TASK, b) < 0).any(1).tolist() == [True, True, False, True, False]
    for micro in (1, 2, 3):
        assert torch.allclose(paid(state, micro=micro)[0], whole, atol=1e-6)
    for i in range(5):  # alone a row has no prefixes that are padding
        assert torch.allclose(paid(state, rows=[i])[0][0], whole[i], atol=1e-5)
    assert (whole[:, 0] == 0).all()  # where the padding would be added


def test_the_truth_never_enters(state):
    reward, _ = paid(state)
    for truth in (0.0, 1.0):
        assert torch.equal(paid(state, truth=truth)[0], reward)
    assert torch.equal(paid(state, task=Blind(1, 3))[0], reward)
    assert not reward.isnan().any()


def test_a_step_that_is_clearly_bad_costs_exactly_at_its_end(state):
    """The SORM's head is solved for: +6 as long as all steps are right, -6 from the bad one on."""
    right = "90*2=80;80-7=73;73+1=74;#74<eos>"
    texts = [right]
    for step, broken in (("=80;", "=82;"), ("=73;", "=71;"), ("=74;", "=75;")):
        texts.append(right.replace(step, broken, 1))
    b = rollout_of(["90*2-7+1="] * 4, texts)
    ends = nr.prefix_ends(TASK, b)
    bad = torch.tensor([[9], [1], [2], [3]])  # the first prefix that holds the error
    logit = torch.where(torch.arange(5) < bad, 6.0, -6.0)
    scorer = state.models["scorer"]
    with torch.no_grad():
        hidden = scorer.trunk.hidden(torch.cat([b.prompt, b.response], 1))
        at = (b.prompt.shape[1] + ends - 1)[..., None].expand(-1, -1, WIDE.width)
        known = hidden.gather(1, at).flatten(0, 1).double()
        weight = torch.linalg.pinv(known, rtol=1e-6) @ logit.flatten().double()
        scorer.logp_weight.zero_()
        scorer.head.linear.weight.copy_(weight[None])
        scorer.head.linear.bias.zero_()
    reward = nr.step_progress(state, TASK, b, torch.zeros(4), WIDE)
    expected = torch.zeros_like(reward)
    for row in (1, 2, 3):
        expected[row, 8 * row - 1] = torch.tensor(-6.0).sigmoid() - torch.tensor(6.0).sigmoid()
    assert torch.allclose(reward, expected, rtol=0, atol=1e-3)
    assert torch.equal(reward < -1e-3, expected < 0)


def test_ppo_takes_a_step_by_it_and_leaves_the_scorer_alone():
    task = Arithmetic(1, 1)
    c = nr.replace(SMALL, updates=1, base_updates=40)
    method = nr.METHODS["ppo"]
    policy = nr.gpt_base(task, c)
    state = method.start(policy, c)
    state.models = method.reward_models(policy, task, c, nr.train_now)
    before = [p.clone() for p in policy.parameters()]
    judge = [p.clone() for p in state.models["scorer"].parameters()]
    (line,) = method.loop(state, task, c)
    assert any(not torch.equal(x, y) for x, y in zip(before, policy.parameters(), strict=True))
    after = state.models["scorer"].parameters()
    assert all(torch.equal(x, y) for x, y in zip(judge, after, strict=True))
    # what it was paid for: the same rollouts again
    texts = task.prompts(c.prompts, nr.rng(c.seed, "prompts", 0))
    prompt, group = nr.in_groups(task, texts, c)
    sampled = nr.rng(c.seed, "sample", 0)
    b = nr.sample(state.reference, prompt, c, group=group, generator=sampled)
    reward = nr.step_progress(state, task, b, nr.grades(task, b), c)
    assert line["reward"] == pytest.approx(float(reward.sum(1).mean()), abs=1e-6)
    assert line["reward"] != line["truth"]
    # What was drawn to train the judge counts too.
    drafts = nr.label_drafts(state.reference, task, c.reward_data, c)
    assert drafts.samples > c.reward_data
    assert line["samples"] == c.prompts * c.samples + drafts.samples
    shown = method.explain(state, task, b, c)
    assert [len(x["token_rewards"]) for x in shown] == b.mask.sum(1).tolist()


def test_probe_a_trained_sorm_punishes_the_token_that_is_the_error():
    """In a world of digits where a 9 is the error, the reward falls at the first 9."""
    task = Ones(1, 1)
    numbers = {"reward_data": 500, "reward_updates": 150, "continuations": 6}
    c = nr.replace(SMALL, response=5, seed=0, **numbers)
    digits = task.encode(["1", "2", "9"])
    never = [i for i in range(c.vocab) if [i] not in digits and i != c.eos_id]
    bias = torch.zeros(c.vocab).index_fill_(0, torch.tensor(never), -30.0)

    # The base writes 1, 2 and 9 and the end, untrained.
    base = nr.Transformer(c, nr.rng(0, "init"))
    torch.nn.init.zeros_(base.lm_head.weight)
    base.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    state = SimpleNamespace(models=nr.sorm_models(base, task, c, nr.train_now))
    prompt = nr.encode_prompts(task, task.prompts(800, nr.rng(1, "held out")), c)
    b = nr.sample(base, prompt, c, generator=nr.rng(2, "held out"))
    reward = nr.step_progress(state, task, b, nr.grades(task, b), c)
    ended = (b.response == c.eos_id).any(1, keepdim=True)
    nine = (b.response == digits[2][0]).cumsum(1)
    first = (nine == 1) & (b.response == digits[2][0]) & ended
    # What the first token earns depends on the empty prefix, of which there are no examples.
    first[:, 0] = False
    assert first.sum() > 50
    assert (reward[first] < -0.5).float().mean() > 0.9
    rest = (b.mask > 0) & ~first & ended
    rest[:, 0] = False
    assert (reward[rest] > -0.5).float().mean() > 0.9


def test_the_coin_that_controls_ppo_is_tossed_without_a_look_at_the_response(monkeypatch):
    monkeypatch.setattr(nr, "REWARDS", dict(nr.REWARDS))  # no other test shall see the coin
    coin = runpy.run_path(str(ROOT / "notebooks" / "coin.py"))["coin"]
    assert nr.REWARDS["coin"].signal is coin
    b = rollout_of(PROMPTS[:1] * 400, TEXTS[:1] * 400)
    tosses = []
    for update in (0, 0, 1):
        for truth in (torch.zeros(400), torch.ones(400)):
            reward = coin(SimpleNamespace(update=update), Blind(), b, truth, WIDE)
            tosses.append(reward.sum(1))
            assert torch.equal(reward, nr.at_end(tosses[-1], b, WIDE))
    assert set(tosses[0].tolist()) == {0.0, 1.0} and 150 < tosses[0].sum() < 250
    assert all(torch.equal(tosses[0], toss) for toss in tosses[:4])
    assert torch.equal(tosses[4], tosses[5]) and not torch.equal(tosses[0], tosses[4])


@pytest.mark.parametrize("name", ["sorm", "shaped"])
def test_the_drafts_that_train_the_judge_are_written_at_once_and_counted(name, monkeypatch):
    """What `train_small.py` says of memory counts the most responses that are written at once."""
    c = nr.replace(tiny("ppo"), reward=name, reward_data=600, reward_updates=1, continuations=2)
    task = Arithmetic(1, 1)
    written = []
    sample = nr.sample

    def counted(model, prompt, *rest, **more):
        written.append(len(prompt))
        return sample(model, prompt, *rest, **more)

    monkeypatch.setattr(nr, "sample", counted)
    nr.ppo_reward_models(rough(c), task, c, nr.train_now)
    assert max(written) == c.responses_at_once() == 600
    assert nr.replace(c, reward="verifier").responses_at_once() == c.prompts * c.samples < 600
