"""self_rewarding: scores in text, judging, proposing, the grader out of reach, a known world."""

import math
import random
import re
from itertools import combinations, cycle, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanoreward as nr
import train_small
from data.arithmetic import Arithmetic
from notebooks import preferences
from tests.conftest import rough, tiny

TASK = Arithmetic(1, 1)
SMALL = tiny(
    "self_rewarding",
    rounds=2,
    updates=3,
    prompts=16,
    samples=4,
    minibatch=16,
    lr=3e-3,
    start_data=1500,
    start_updates=150,
    base_batch=32,
    judgements=3,
)


@pytest.fixture(autouse=True)
def full_rate_at_once(monkeypatch):
    """The few updates of a round here are no time to warm up."""
    monkeypatch.setattr(nr, "WARMUP", 1)


def taught(model, demos, updates):
    """Train the model on these ids, with large steps."""
    state = nr.Fit([model], nr.optimizers([model], 0.01, 0.02))
    list(nr.fit(state, nr.gpt_batches(model, demos, SMALL), updates, SMALL))


@pytest.fixture(scope="module")
def m1():
    """A small M1 whose judgements can mostly be read, and whose proposals are mostly problems."""
    model = rough(SMALL)
    demos = nr.encode_demos(TASK, nr.m1_demos(TASK, SMALL), SMALL)
    taught(model, demos, SMALL.start_updates)
    return model.state_dict()


def start(m1, config=SMALL):
    policy = nr.Transformer(config)
    policy.load_state_dict(m1)
    return nr.start_self_rewarding(policy, config)


def same_policies(a, b):
    both = zip(a.policy.parameters(), b.policy.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in both)


# ---- scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,score",
    [
        ("3", 3),
        ("3.5", 3.5),
        ("Score: 4/5", 4),
        ("score 4 / 5.", 4),
        ("SCORE=0", 0),
        ("!5<eos>", 5),
        ("42y26n!4<eos>", 4),
        ("It adds up. Score: 2.", 2),
        ("  5 \n", 5),
        ("0.0", 0),
        ("", None),
        ("none", None),
        ("!", None),
        ("!<eos>", None),
        ("Score:", None),
        ("nan", None),
        ("Score: nan", None),
        ("inf", None),
        ("-1", None),
        ("Score: -1", None),
        ("6", None),
        ("5.01", None),
        ("4/10", None),
        ("10/5", None),
        ("1e0", None),
        ("3,5", None),
        ("!5", 5),
        ("!55", None),
        ("Score: 3. Score: 4", 4),
        ("3 4", None),
        ("!3!4", 4),
        ("the response says Score: 5, which is wrong", None),
        ("the response says Score: 5, which is wrong. Score: 1", 1),
        ("42y26n", None),
        ("#26", None),
        ("٣", None),
        ("Score: ３", None),
        ("!४", None),
        ("3" * 10_000, None),
        ("x" * 10_000 + "!2", 2),
        ("score " * 2000, None),
        ("Score:" + " " * 10_000 + "4", 4),
        ("!" * 10_000, None),
        ("\x00!1", 1),
    ],
)
def test_scores_are_read_from_the_very_end(text, score):
    assert nr.parse_score(text) == score


@given(st.text(max_size=200))
def test_reading_a_score_never_raises_and_stays_in_range(text):
    score = nr.parse_score(text)
    assert score is None or 0 <= score <= 5


def test_best_against_worst_drops_ties_and_ignores_what_has_no_score():
    nan = math.nan
    score = torch.tensor([3.0, 5, 1, 1, 2, 2, 2, nan, nan, nan, nan, 4, nan, 0, 4, 2.5])
    group = torch.arange(16) // 4
    # 0: first best 1, first worst 2.  1: 2, 2, 2, none: a tie.  2: one score.  3: 4 against 0
    assert nr.best_and_worst(score, group, SMALL).tolist() == [[1, 2], [14, 13]]
    assert nr.best_and_worst(torch.full((4,), nan), group[:4], SMALL).shape == (0, 2)
    assert nr.best_and_worst(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), SMALL).shape == (0, 2)


# ---- judging and proposing ---------------------------------------------------------------------


def test_the_score_is_the_mean_of_the_judgements_that_can_be_read(m1, monkeypatch):
    state = start(m1)
    prompt = nr.encode_prompts(TASK, ["3+4=", "50-1="], SMALL)
    rollout = nr.sample(state.policy, prompt, SMALL, generator=nr.rng(0, "s"))
    asked = []

    def written(model, prompt, config, generator=None):
        asked.append((model, prompt))
        # three for each response
        texts = ["7y!5<eos>", "!2<eos>", "7y<eos>", "!4<eos>", "7y", "!9<eos>"]
        ids = nr.right_pad(TASK.encode(texts), config.pad_id, config.response)
        return nr.Rollout(prompt, ids, nr.up_to_eos(ids, config), ids, torch.arange(6))

    monkeypatch.setattr(nr, "sample", written)
    three = nr.replace(SMALL, judgements=3)
    score, seen = nr.judged(state, TASK, rollout, three, 0)
    assert score[0] == 3.5 and score[1] == 4.0  # 5, 2, none -> 3.5; 4, none, none -> 4
    assert seen["unread"] == 0.5 and seen["score"] == pytest.approx(11 / 3)
    ((model, read),) = asked
    assert model is state.policy and len(read) == 6
    for i, row in enumerate(read.tolist()):
        problem, response = rollout.prompt[i // 3].tolist(), rollout.response[i // 3].tolist()
        wanted = TASK.judge_prompt(problem, response)
        assert row[row.index(SMALL.bos_id) :] == [SMALL.bos_id, *wanted]


def test_judging_in_parts_sees_every_response_once(m1, monkeypatch):
    monkeypatch.setattr(nr, "SAMPLED_AT_ONCE", 5)
    state = start(m1)
    prompt = nr.encode_prompts(TASK, TASK.prompts(12, nr.rng(0, "p")), SMALL)
    rollout = nr.sample(state.policy, prompt, SMALL, generator=nr.rng(0, "s"))
    score, seen = nr.judged(state, TASK, rollout, SMALL, 3)
    assert score.shape == (12,) and seen["unread"] < 0.5
    score = score.nan_to_num(9)
    other = nr.judged(state, TASK, rollout, SMALL, 4)[0].nan_to_num(9)
    assert not torch.equal(score, other)  # sampled anew in another update
    assert torch.equal(score, nr.judged(state, TASK, rollout, SMALL, 3)[0].nan_to_num(9))


def test_the_frozen_judge_stays_m1_and_the_own_one_is_the_policy(m1):
    own = start(m1)
    assert own.judge is own.policy
    config = nr.replace(SMALL, judge="frozen")
    frozen = start(m1, config)
    list(nr.self_rewarding(frozen, TASK, config))
    assert all(torch.equal(x, m1[name]) for name, x in frozen.judge.state_dict().items())
    assert not torch.equal(frozen.policy.lm_head.weight, m1["lm_head.weight"])


def test_proposals_are_training_problems_new_and_filled_up(m1, monkeypatch):
    state = start(m1)
    config = nr.replace(SMALL, prompts=4)
    dev = TASK.prompts(1, nr.rng(0, "d"), "dev")[0]
    good = [x for x in TASK.prompts(40, nr.rng(1, "p")) if x not in ("3+4=", "9*2=")]
    shown = []

    def answers(model, task, prompts, config, generator=None):
        shown.extend(prompts)
        own = prompts[4].split("<sep>")[1]  # one that it was shown
        ended = [f"{x}<eos>" for x in (good[0], good[0], dev, "3+4+5=", own)]
        return [*ended, "", "<sep>", good[1]]

    monkeypatch.setattr(nr, "respond", answers)
    texts, seen = nr.pose_problems(state, TASK, config, 0)
    assert texts[:2] == good[:2] and len(set(texts)) == len(texts) == 4
    assert seen == {"valid": 3 / 8, "proposed": 0.5}
    assert len(shown) == 8  # two attempts a problem, no more
    assert all(TASK.split(x) == "train" for x in texts)
    again, seen = nr.pose_problems(state, TASK, config, 0)
    assert seen["proposed"] == 0 and len(again) == 4  # posed before: not new; the task fills up
    assert list(state.posed) == good[:2]


def test_a_problem_is_copied_only_if_it_was_shown_whole():
    prompt = "~<sep>53+4=<sep>2*3+4-1=<sep>9*2=<sep>"
    for shown in ("53+4=", "2*3+4-1=", "9*2="):
        assert nr.is_shown(shown, prompt)
    # The ends and the beginnings of longer ones.
    for new in ("3+4=", "4-1=", "3+4-1=", "53+4", "2*3+4=", "2="):
        assert not nr.is_shown(new, prompt)
    words = "Question: Ann has 3 eggs?\n\nQuestion: Bo has 4?\n\nQuestion:"
    assert nr.is_shown("Bo has 4?", words) and not nr.is_shown("o has 4?", words)


def test_everything_that_is_drawn_counts_as_samples(m1):
    c = nr.replace(SMALL, rounds=2, prompts=5, samples=3, judgements=2)
    lines = list(nr.self_rewarding(start(m1, c), TASK, c))
    proposals, responses = 2 * 5, 5 * 3
    each_round = proposals + responses + responses * 2
    assert [m["samples"] for m in lines] == [each_round] * c.updates + [2 * each_round] * c.updates


def task_problems(state, task, c):
    """`nr.self_rewarding` on the task's problems: its own scores alone."""
    return nr.iterative_dpo(state, task, c, nr.new_problems, nr.judged, nr.best_and_worst)


def test_problems_may_come_from_the_task_instead(m1, monkeypatch):
    monkeypatch.setattr(nr, "pose_problems", None)
    config = nr.replace(SMALL, rounds=1)
    assert "valid" not in next(task_problems(start(m1, config), TASK, config))


# ---- pairs of judgements -----------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=2), min_size=1, max_size=8))
def test_the_better_judgement_is_one_that_no_other_kind_outnumbers(judgements):
    pair = nr.agreed(judgements)
    times = [judgements.count(ids) for ids in judgements]
    if max(times) in (1, len(times)):
        assert pair is None
        return
    chosen, rejected = pair
    assert times[chosen] == max(times) and judgements[chosen] != judgements[rejected]
    # both are the first of their kind
    assert judgements.index(judgements[chosen]) == chosen
    assert all(ids == judgements[chosen] for ids in judgements[:rejected])


def test_pairs_of_judgements_by_hand(m1):
    state = start(m1)
    texts = [
        ["!4", "!5", "!4"],  # the first and the second
        ["!2", "!2", "!2"],  # nobody disagrees
        ["!1", "!2", "!3"],  # nobody agrees
        ["?", "?", "!3"],  # what most say cannot be read
        ["!1", "!3", "!3"],  # the second and the first
    ]
    ids = [[nr.right_pad(TASK.encode([f"{t}<eos>"]), 0, 12)[0] for t in row] for row in texts]
    scores = [[nr.parse_score(t) for t in row] for row in texts]
    judgements = {
        "prompt": torch.arange(10).view(5, 2),
        "response": torch.stack([torch.stack(row) for row in ids]),
        "score": torch.tensor([[-1 if s is None else s for s in row] for row in scores]),
    }
    state.judgements = dict(judgements)
    [pairs], metrics = nr.judgement_pairs(state, TASK, SMALL)
    assert metrics == {"judgement_pairs": 2} and state.judgements == {}
    assert pairs["prompt"].tolist() == [[0, 1], [8, 9]]
    said = [[TASK.decode(y) for y in both] for both in pairs["response"].tolist()]
    assert said == [["!4<eos>", "!5<eos>"], ["!3<eos>", "!1<eos>"]]
    state.judgements = {name: x[1:3] for name, x in judgements.items()}
    [pairs], metrics = nr.judgement_pairs(state, TASK, SMALL)
    assert metrics == {"judgement_pairs": 0} and pairs["response"].shape == (0, 2, 12)


def test_sets_of_pairs_come_together_without_a_change_of_any_log_prob(m1):
    policy = start(m1).policy
    sets = []
    for prompts, answer in (
        (["3+4=", "9*2="], "#7<eos>"),
        (["12+5=<sep>12+5=17;#17<sep>?"], "!5<eos>"),
    ):
        response = nr.right_pad(TASK.encode([answer, "#1<eos>"] * len(prompts)), 0, 12)
        prompt = nr.encode_prompts(TASK, prompts, SMALL)
        sets.append({"prompt": prompt, "response": response.view(len(prompts), 2, 12)})
    together = nr.pairs_together(sets, SMALL.pad_id)
    assert together["prompt"].shape[1] == sets[1]["prompt"].shape[1] > sets[0]["prompt"].shape[1]
    with torch.no_grad():
        each = [nr.pair_logprobs(policy, x, torch.arange(len(x["prompt"]))) for x in sets]
        assert torch.allclose(
            nr.pair_logprobs(policy, together, torch.arange(3)), torch.cat(each), atol=1e-4
        )


def test_probe_the_judge_learns_what_most_of_its_judgements_say():
    """Taught to say 4 in two cases of three and else 2, it says 4 nearly always in the end."""
    config = nr.replace(SMALL, updates=25, judgements=8, alpha=1.0, lr=2e-3, seed=0)
    policy = rough(config, 0)
    demos = []
    for i, x in enumerate(TASK.prompts(90, nr.rng(0, "shown"))):
        answer = f"#{i % 10}<eos>"
        asked = TASK.judge_prompt(*TASK.encode([x, answer]))
        demos += [(x, answer), (TASK.decode(asked), f"!{2 if i % 3 == 0 else 4}<eos>")]
    taught(policy, nr.encode_demos(TASK, demos, config), 100)
    state = nr.start_self_rewarding(policy, config)
    problems = TASK.prompts(100, nr.rng(0, "judged"))
    b = nr.sample(policy, nr.encode_prompts(TASK, problems, config), config)

    def fours():
        nr.judged(state, TASK, b, config, 99)
        return float((state.judgements["score"] == 4).float().mean())

    assert 0.5 < fours() < 0.8
    own = (nr.new_problems, nr.judged, nr.best_and_worst, nr.judgement_pairs)
    logs = list(nr.iterative_dpo(state, TASK, config, *own))
    assert logs[0]["judgement_pairs"] > 50
    assert fours() > 0.9


# ---- the loop ----------------------------------------------------------------------------------


class Blind(Arithmetic):
    """Whoever asks for the truth gets an exception."""

    def grade(self, *_):
        raise AssertionError("the true grader was asked")

    rubric = truth = step_ok = answer = judgement = judge_demo = grade


def test_the_true_grader_is_never_asked(m1):
    seeing, blind = start(m1), start(m1)
    logs = list(nr.self_rewarding(seeing, TASK, SMALL))
    assert len(logs) == 6 and all(m["pairs"] > 0 for m in logs)
    assert all(m["judgement_pairs"] > 0 for m in logs)  # and they did take part
    assert list(nr.self_rewarding(blind, Blind(1, 1), SMALL)) == logs
    assert same_policies(seeing, blind)
    with pytest.raises(AssertionError, match="asked"):  # the other loop does ask
        config = tiny("iterative_dpo")
        next(nr.iterative_dpo(nr.start_rounds(rough(config), config), Blind(1, 1), config))


def test_a_judge_that_cannot_be_read_ends_the_rounds_at_once(m1, monkeypatch):
    monkeypatch.setattr(nr, "parse_score", lambda text: None)
    lines = list(nr.self_rewarding(start(m1), TASK, SMALL))
    assert [m["pairs"] for m in lines] == [0, 0] and all(m["unread"] == 1 for m in lines)
    assert "pairs" in train_small.notes(lines[0], SMALL)


def test_resume_in_the_middle_is_bit_exact_and_the_judge_is_the_policy(m1, tmp_path):
    stop = 4
    whole = start(m1)
    logs = list(nr.self_rewarding(whole, TASK, SMALL))
    part = start(m1)
    list(islice(nr.self_rewarding(part, TASK, SMALL), stop))
    nr.save_state(tmp_path, part)
    fresh = nr.start_self_rewarding(rough(SMALL, seed=9), SMALL)
    again = nr.load_state(tmp_path, into=fresh)
    assert again.judge is again.policy
    assert list(nr.self_rewarding(again, TASK, SMALL)) == logs[stop:]
    assert same_policies(whole, again)


class Lengths(Arithmetic):
    """The judge reads how long a response is, up to 9; long ones deserve more."""

    def judge_prompt(self, prompt, response):
        return self.encode([f"{min(9, sum(i > 2 for i in response))}??"])[0]


def test_probe_what_the_own_judgement_prefers_is_learned():
    """Taught in seconds to score lengths, the weights learn from their own scores to write more."""
    task = Lengths(1, 1)
    config = nr.replace(SMALL, rounds=4, updates=12, prompts=32, alpha=1.0, lr=1e-3, seed=0)
    policy = rough(config, 0)
    demos = [(f"{n}??", f"!{1 + n // 2}<eos>") for n in range(10)] * 5
    # And to answer with one to nine digits, so that there is something to prefer.
    lengths = cycle(range(1, 10))
    demos += [(x, f"{'7' * next(lengths)}<eos>") for x in task.prompts(50, nr.rng(0, "answers"))]
    taught(policy, nr.encode_demos(task, demos, config), 200)
    state = nr.start_self_rewarding(policy, config)
    logs = list(task_problems(state, task, config))
    assert logs[-1]["length"] > 1.3 * logs[0]["length"]
    assert logs[-1]["score"] > logs[0]["score"] + 0.5


def test_a_collapsed_judge_and_responses_that_talk_to_it_are_said_in_words():
    fine = {"spread": 1.2, "quoted": 0.0, "unread": 0.0, "pairs": 9}
    assert not train_small.notes(fine, SMALL)
    assert "judge" in train_small.notes(fine | {"spread": 0.0}, SMALL)
    assert "judge" in train_small.notes(fine | {"unread": 0.9}, SMALL)
    assert "quoted" in train_small.notes(fine | {"quoted": 0.2}, SMALL)


# ---- statistics --------------------------------------------------------------------------------


def pair_order(score, truth):
    """1 for each truly ordered pair that the score orders the same way, 0 if not; a tie is half."""
    found = []
    for i, j in combinations(range(len(score)), 2):
        if truth[i] != truth[j]:
            side = 1 if truth[i] > truth[j] else -1
            found.append(0.5 + 0.5 * side * ((score[i] > score[j]) - (score[i] < score[j])))
    return found


def test_many_pairs_in_order_are_the_mean_of_the_pairs_of_each_problem():
    g = nr.rng(0, "pairs")
    truth = torch.randint(0, 4, (30, 5), generator=g).float()
    score = torch.randint(0, 4, (30, 5), generator=g).float()
    each = [pair_order(*both) for both in zip(score.tolist(), truth.tolist(), strict=True)]
    flat = [x for pairs in each for x in pairs]
    assert len(flat) > 100
    assert preferences.in_true_order(score, truth) == pytest.approx(sum(flat) / len(flat))


def test_a_look_at_a_judge_by_one_by_three_and_by_eight_judgements(m1, monkeypatch):
    """A judge that says the truth in seven judgements of eight, and the contrary in the last."""
    state = start(m1)
    test = TASK.prompts(6, nr.rng(0, "test"), "test")
    fixed = preferences.Judged(state.policy, TASK, test, SMALL)
    assert fixed.truth.shape == (6, 8) and len(fixed.b.response) == 48
    fixed.truth = torch.arange(48).view(6, 8).float() % 5

    def judged(look, task, b, c, u):
        assert c.judgements == 8 and look.judge is state.policy and b is fixed.b
        score = fixed.truth.view(-1, 1).repeat(1, 8)
        score[:, 7] = 5 - score[:, 7]
        score[4, 0] = -1  # one of the best response that cannot be read
        look.judgements = {"score": score}
        return score.mean(1), {}

    monkeypatch.setattr(nr, "judged", judged)
    found = fixed.statistics(state, TASK, SMALL)
    pairs = sum(len(pair_order(t, t)) for t in fixed.truth.tolist())
    assert found["ordered pairs"] == pairs > 100
    one, three, eight = (found["in order"][J] for J in ("1", "3", "8"))
    assert 0.85 < one < 0.9 and three == eight == 1


def test_the_score_of_a_judge_that_says_nothing_is_kept_as_none():
    assert preferences.known(float("nan")) is None
    assert preferences.known(3.14159) == 3.1416 and preferences.known(0) == 0


def test_pairs_by_score_leave_out_what_cannot_be_read():
    judgements = {
        "prompt": torch.arange(4)[:, None],
        "response": torch.arange(12).view(4, 3, 1),
        "score": torch.tensor([[-1.0, 3, 5], [4, 4, -1], [2, 5, 4], [-1, -1, -1]]),
    }
    low = preferences.by_score(judgements, lowest=True)
    high = preferences.by_score(judgements, lowest=False)
    assert low["prompt"].tolist() == high["prompt"].tolist() == [[0], [2]]
    assert low["response"][..., 0].tolist() == [[1, 2], [6, 7]]
    assert high["response"][..., 0].tolist() == [[2, 1], [7, 6]]


def test_an_altered_problem_has_one_other_operand_and_none_is_held_out(m1):
    draw = random.Random(0)
    assert preferences.other_problem("12*3=", draw) is None
    for _ in range(30):
        other = preferences.other_problem("12+5*3-4=", draw)
        assert sum(a != b for a, b in zip(other, "12+5*3-4=", strict=True)) == 1
        assert other[:3] == "12+" and other[4:7] == "*3-"
    state = start(m1)
    c = nr.replace(SMALL, prompts=60, paired="altered")
    texts = TASK.prompts(60, nr.rng(0, "p"))
    prompt, group = nr.in_groups(TASK, texts, c, "cpu")
    state.judged = nr.sample(state.policy, prompt, c, group=group, generator=nr.rng(0, "s"))
    nr.judged(state, TASK, state.judged, c, 0)
    state.judgements["score"][:] = torch.tensor([5.0, 4.0, 5.0])
    [low, high], metrics = preferences.altered_problems(state, TASK, c)
    assert len(high["prompt"]) == len(low["prompt"]) > 0
    assert metrics == {"judgement_pairs": 2 * len(low["prompt"])}
    asked = [TASK.decode(ids).split("<sep>")[0] for ids in low["prompt"].tolist()]
    assert {TASK.split(x) for x in asked} == {"train"} and not set(asked) <= set(texts)
    state.judgements["score"][:] = 4.0  # nobody is trusted
    assert preferences.altered_problems(state, TASK, c) == ([], {"judgement_pairs": 0})


def test_where_the_first_model_is_rejected_every_worse_response_is_its_own(m1):
    state = start(m1)
    with torch.no_grad():  # another policy by now
        state.policy.lm_head.weight.mul_(1.1)
    drawn = []
    real = nr.sample

    def sample(model, prompt, c, *more, **numbers):
        b = real(model, prompt, c, *more, **numbers)
        drawn.append((model, b))
        return b

    c = nr.replace(SMALL, rounds=1, updates=1)
    loop = preferences.first_rejects(state, TASK, c)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nr, "sample", sample)
        metrics = next(loop)
    mine = [b for model, b in drawn if model is not state.policy and len(b.response) == 32]
    assert metrics["pairs"] > 0 and len(mine) == 1  # half of the 16 x 4 responses
    theirs = {tuple(ids) for ids in mine[0].response.tolist()}
    pairs = state.pairs["response"][: metrics["pairs"]]
    assert {tuple(ids) for ids in pairs[:, 1].tolist()} <= theirs


def test_win_rate_counts_ties_half():
    assert preferences.win_rate([5, 4, 1, 3], [4, 4, 2, 3]) == {"win": 0.5, "ties": 0.5}
    assert preferences.win_rate([5, 5], [1, 1]) == {"win": 1.0, "ties": 0.0}


def test_a_judge_of_one_choice_is_taught_the_same_scores_and_no_checks():
    task = Arithmetic(1, 3)
    one_choice = preferences.OneChoice(1, 3)
    for seed in range(20):
        asked, told = task.judge_demo(nr.rng(seed, "judge"))
        same, short = one_choice.judge_demo(nr.rng(seed, "judge"))
        assert asked == same and re.fullmatch("![0-5]<eos>", short) and told.endswith(short)
        assert told != short or "=" not in asked.split("<sep>")[1]
