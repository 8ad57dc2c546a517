"""data/arithmetic.py: splits, demonstrator, grader, ground truth."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.arithmetic import (
    OPERATIONS,
    SPECIAL,
    Arithmetic,
    calculate,
    draws,
    forget_carry,
    parse,
    spoil,
)

TASK = Arithmetic()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_demonstrations_come_from_the_training_split():
    assert all(TASK.split(TASK.demo(generator(i))[0]) == "train" for i in range(200))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
def test_best_constant_answer_is_at_most_two_percent(length):
    task = Arithmetic(length, length)
    assert 0.01 <= task.chance() <= 0.02
    totals = [task.truth(p)[-1] for p in task.prompts(20_000, generator(length))]
    counted = max(totals.count(c) for c in range(100)) / 20_000
    # four standard errors of a share of .016 in 20,000 draws: .0035; a false alarm in 16,000 runs
    assert abs(counted - task.chance()) < 0.004


@pytest.mark.parametrize(
    "a,op,b,c", [(37, "+", 5, 42), (98, "+", 5, 3), (3, "-", 5, 98), (26, "*", 4, 4)]
)
def test_calculate_by_hand(a, op, b, c):
    assert calculate(a, op, b) == c


@pytest.mark.parametrize(
    "a,op,b,c", [(37, "+", 5, 32), (42, "-", 5, 47), (26, "*", 4, 84), (21, "*", 4, 84)]
)
def test_a_forgotten_carry_by_hand(a, op, b, c):
    assert forget_carry(a, op, b) == c


@given(st.integers(0, 2**32))
@settings(max_examples=50)
def test_careful_demonstrations_are_right_and_text_survives_tokens(seed):
    task = Arithmetic(1, 4, careful=True)
    prompt, response = task.demo(generator(seed))
    assert task.grade(prompt, response) == 1.0 and task.rubric(prompt, response) == 5
    ids = task.encode([response])[0]
    assert task.decode(ids) == response and task.decode([0, 1, *ids, 0, 9, 9]) == response
    steps = task.steps(ids)
    assert all(task.step_ok(prompt, [s for s, _ in steps])) and len(steps) == len(parse(prompt)[1])
    assert [int(task.result(s)) for s, _ in steps] == task.truth(prompt)
    assert all(task.decode(ids[: end + 1]).endswith(s) for s, end in steps)


PROMPT = "37+5*3="  # = 26
GRADED = [
    ("37+5=42;42*3=26;#26<eos>", 1.0, "right"),
    ("#26<eos>", 1.0, "right without steps: the grade is of the outcome"),
    ("37+5=41;41*3=23;#26<eos>", 1.0, "wrong steps, right answer: steps are graded by step_ok"),
    ("37+5=42;42*3=26;#25<eos>", 0.0, "wrong answer"),
    ("37+5=42;42*3=26;<eos>", 0.0, "no answer"),
    ("", 0.0, "nothing"),
    ("#<eos>", 0.0, "an answer without a number"),
    ("#26#26<eos>", 0.0, "two answers, even two right ones"),
    ("#25#26<eos>", 0.0, "two answers"),
    ("".join(f"#{i}" for i in range(100)) + "<eos>", 0.0, "all answers listed"),
    ("37+5*3=<eos>", 0.0, "the prompt again"),
    ("26<eos>", 0.0, "a number without #"),
    ("#126<eos>", 0.0, "the answer inside a longer number"),
    ("#261<eos>", 0.0, "the answer at the head of a longer number"),
    ("#26", 0.0, "no EOS"),
    ("#26<eos><eos>", 0.0, "two EOS: decode never gives that"),
    ("#+26<eos>", 0.0, "a sign"),
    ("#-26<eos>", 0.0, "a sign"),
    ("# 26<eos>", 0.0, "a space"),
    ("#26 <eos>", 0.0, "a space"),
    ("#26\n<eos>", 0.0, "a newline"),
    ("#026<eos>", 0.0, "a leading zero"),
    ("#26;<eos>", 0.0, "text after the answer"),
    ("#26<eos>37", 0.0, "text after the end"),
    ("#26.0<eos>", 0.0, "a decimal"),
    ("#2 6<eos>", 0.0, "a number in two pieces"),
    ("#२६<eos>", 0.0, "Devanagari digits"),
    ("#٢٦<eos>", 0.0, "Arabic-Indic digits"),
    ("#２６<eos>", 0.0, "full-width digits"),
    ("<sep>#26<eos>", 0.0, "a special token inside"),
    ("<mask>#26<eos>", 0.0, "a mask inside"),
    ("__import__('os')#26<eos>", 0.0, "code"),
]


@pytest.mark.parametrize("response,score,why", GRADED, ids=[w[:40] for _, _, w in GRADED])
def test_grader(response, score, why):
    assert TASK.grade(PROMPT, response) == score
    assert (TASK.answer(response) == "26") == bool(score)


def test_grader_survives_ten_thousand_characters_of_garbage():
    draw = random.Random(0)
    for alphabet in [
        "0123456789+-*=;",
        "0123456789+-*=;#",
        "#",
        "ab<eos>#26",
        "\u0660\u0967\x00🙂",
    ]:
        assert TASK.grade(PROMPT, "".join(draw.choice(alphabet) for _ in range(10_000))) == 0.0
    assert TASK.grade(PROMPT, "1" * 10_000 + "#26<eos>") == 1.0  # the last and only answer counts


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_grader_and_rubric_never_raise_and_only_reward_the_exact_form(text):
    score = TASK.grade(PROMPT, text)
    assert score in (0.0, 1.0) and (score == 0.0 or text.endswith("#26<eos>"))
    assert 0 <= TASK.rubric(PROMPT, text) <= 5


@pytest.mark.parametrize(
    "bad", ["", "37", "37+5", "+5=", "100+1=", "07+1=", "3+0=", "3*5=", "3/2=", "3+4==", "３+4="]
)
def test_a_prompt_that_is_no_problem_gets_one_clear_line(bad):
    with pytest.raises(ValueError, match="not a problem.*for example") as caught:
        TASK.grade(bad, "#1<eos>")
    assert "\n" not in str(caught.value)


def test_step_truth_and_rubric_by_hand():
    def ok(*steps):
        return TASK.step_ok(PROMPT, list(steps))

    assert ok("37+5=42;", "42*3=26;") == [True, True]
    # Sound arithmetic on a wrong total is wrong.
    assert ok("37+5=41;", "41*3=23;") == [False, False]
    assert ok("37+5=41;", "42*3=26;") == [False, True]
    assert ok("37+5=42;", "42*3=26;", "26+1=27;") == [True, True, False]
    points = {
        r: TASK.rubric(PROMPT, r)
        for r in [
            "37+5=42;42*3=26;#26<eos>",
            "37+5=41;41*3=23;#23<eos>",
            "37+5=42;41*3=23;#23<eos>",
            "37+5=42;42*2=84;#84<eos>",
            "#26<eos>",
            "37+5=42;42*3=26;",
            "",
        ]
    }
    assert list(points.values()) == [5, 4, 4, 2, 1, 3, 0]


def test_the_judge_reads_ids_and_writes_each_true_result_then_the_score():
    response = "37+5=41;41*3=23;#23<eos>"
    assert TASK.judgement(PROMPT, response) == "42n23y!4<eos>"
    assert TASK.judgement(PROMPT, "#37<eos>") == "!1<eos>"
    asked, answered = TASK.encode([PROMPT, response])
    read = TASK.judge_prompt([0, 0, 1, *asked], [*answered, 0, 0])  # as a rollout holds them
    assert TASK.decode(read) == f"{PROMPT}<sep>{response.removesuffix('<eos>')}<sep>?"


def test_judge_demos_show_every_score_equally_often():
    demos = [TASK.judge_demo(generator(i)) for i in range(600)]
    scores = [int(judged[-6]) for _, judged in demos]
    assert all(80 <= scores.count(s) <= 120 for s in range(6))
    for read, judged in demos[:100]:
        prompt, response, ask = read.split("<sep>")
        assert ask == "?" and TASK.split(prompt) == "train"
        whole = [response, response + "<eos>"]  # the EOS is not shown
        assert judged in [TASK.judgement(prompt, y) for y in whole]
        for text in (read, judged):
            assert TASK.decode(TASK.encode([text])[0]) == text


def test_spoiled_responses_lose_points():
    draw = draws(generator())
    response = "37+5=42;42*3=26;#26<eos>"
    spoiled = {spoil(response, draw) for _ in range(200)}
    # Without an answer two of the five points are lost.
    assert {TASK.rubric(PROMPT, y) for y in spoiled} >= {1, 2, 3}
    assert all(TASK.rubric(PROMPT, y) < 5 for y in spoiled - {response})
    assert spoil("#37<eos>", draw) == "<eos>"


def test_proposals_are_filtered_for_form_length_and_split():
    shown, new = TASK.propose_demo(generator())
    assert TASK.problem(new) == new.removesuffix("<eos>") and shown.count("<sep>") == 4
    assert TASK.decode(TASK.encode([shown])[0]) == shown
    train = TASK.prompts(20, generator())
    assert [TASK.problem(x) for x in train] == train
    for split in ("dev", "test"):
        assert [TASK.problem(x) for x in TASK.prompts(20, generator(), split)] == [None] * 20
    long = next(x for x in Arithmetic(4, 4).prompts(1, generator()))
    for text in (long, "3+4", "", "03+4=", "3+4=<sep>", "3/4=", "3+4=7;"):
        assert TASK.problem(text) is None


@given(st.integers(2, 100), st.integers(0, 1000))
def test_fewer_answers_make_lucky_ones(answers, seed):
    few, g = Arithmetic(answers=answers), generator(seed)
    prompt = few.prompts(1, g)[0]
    response = few.respond(prompt, g)
    assert int(few.answer(response)) < answers
    right = f"{TASK.truth(prompt)[-1] % answers}"
    assert few.grade(prompt, f"#{right}<eos>") == 1.0
    careful = Arithmetic(answers=answers, careful=True).respond(prompt, g)
    assert few.grade(prompt, careful) == 1.0 and few.rubric(prompt, careful) == 5
    if answers == 4:
        assert few.chance() > 0.25


def test_a_person_is_told_how_answers_are_counted():
    assert TASK.note.endswith("every result is taken mod 100")
    assert Arithmetic(answers=4).note == f"{TASK.note}; the answer is mod 4"


def test_special_tokens_are_single_distinct_ids():
    assert [TASK.encode([w])[0] for w in SPECIAL] == [[i] for i in range(6)]
    with pytest.raises(ValueError, match="outside"):
        TASK.encode(["3 + 4"])


@pytest.mark.parametrize("split", ["dev", "test"])
def test_held_out_problems_are_all_different_and_train_problems_are_drawn_freely(split):
    task = Arithmetic(1, 3)
    held_out = task.prompts(500, generator(), split)
    assert len(set(held_out)) == 500 and all(task.split(x) == split for x in held_out)
    train = task.prompts(2000, generator(1))
    assert len(set(train)) < len(train) == 2000
    # All lengths are nearly as likely as each other, though short problems are rare.
    for length in (1, 2, 3):
        assert 100 < sum(len(task.truth(x)) == length for x in held_out) < 230


def test_of_few_held_out_problems_all_are_given_and_none_twice():
    task = Arithmetic(1, 1)
    every = [f"{a}{op}{d}=" for a in range(100) for op, d in OPERATIONS]
    held_out = task.prompts(5000, generator(), "dev")
    assert sorted(held_out) == sorted(x for x in every if task.split(x) == "dev")


def test_a_problem_stays_in_its_split():
    """These belong where they are. Otherwise accuracies of two versions could not be compared."""
    known = {
        "train": ["85*3=", "83*3-8+7=", "44-7=", "13-1+4="],
        "dev": ["20+8-8-8=", "73+4*3=", "63-9-4=", "10-4+8="],
        "test": ["90+2*3*4=", "55+9=", "0*2-1=", "82+4-9-6="],
    }
    for split, problems in known.items():
        assert [TASK.split(x) for x in problems] == [split] * 4
