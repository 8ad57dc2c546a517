"""data/countdown.py: solver, splits, demonstrator, grader, ground truth of steps."""

import random
import re
from collections import Counter
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanoreward as nr
import train_small as front
from data import arithmetic, countdown
from data.countdown import (
    Countdown,
    aimless,
    draws,
    legal,
    off_by_one,
    results,
    slipped,
    solutions,
    solve,
    spoil,
    written,
)
from tests.conftest import rough

TASK, CAREFUL = Countdown(), Countdown(careful=True)
BOTH = Countdown(2, 3)
PROMPT = "7,25,3=54:"  # its only solution:
RIGHT = "25-7=18;18*3=54;#25-7*3<eos>"
SEEDS = st.integers(0, 2**32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ids_of(text):
    return TASK.encode([text])[0]


def steps_of(response):
    return [step for step, _ in TASK.steps(ids_of(response))]


def grades(prompts, responses):
    return [TASK.grade(x, y) for x, y in zip(prompts, responses, strict=True)]


# ---- an independent truth: other words for the rules, nothing of the file -----------------------


def fold(numbers, operations):
    """The value of a chain from the left, or None if a result leaves 0..99."""
    value = numbers[0]
    for op, b in zip(operations, numbers[1:], strict=True):
        if op == "+":
            value += b
        elif op == "-":
            value -= b
        else:
            value *= b
        if value not in range(100):
            return None
    return value


def brute_force(numbers):
    """The value of each expression: all orders and all operations, thrown out at the end."""
    found = {}
    for order in permutations(numbers):
        for operations in product("+-*", repeat=len(order) - 1):
            value = fold(order, operations)
            if value is not None:
                text = str(order[0])
                for op, b in zip(operations, order[1:], strict=True):
                    text += op + str(b)
                found[text] = value
    return found


def asked(prompt):
    left, right = prompt[:-1].split("=")
    return [int(x) for x in left.split(",")], int(right)


def judged(prompt, response):
    """The grade, with the expression taken apart by hand."""
    numbers, target = asked(prompt)
    if response.count("<eos>") != 1 or not response.endswith("<eos>") or response.count("#") != 1:
        return 0.0
    steps, expression = response.removesuffix("<eos>").split("#")
    if set(steps) - set("0123456789+-*=;"):
        return 0.0
    if set(expression) - set("0123456789+-*"):
        return 0.0
    parts = re.split(r"([+*-])", expression)
    if any(not p.isdigit() or p != str(int(p)) for p in parts[::2]):
        return 0.0
    used = [int(p) for p in parts[::2]]
    right = sorted(used) == sorted(numbers) and fold(used, parts[1::2]) == target
    return float(right)


def reachable(chain, left, target):
    """Whether a chain that stands at this value can still reach the target."""
    if not left:
        return chain == target
    return any(
        0 <= value < 100 and reachable(value, left[:i] + left[i + 1 :], target)
        for i, b in enumerate(left)
        for value in (chain + b, chain - b, chain * b)
    )


def pool_ok(prompt, steps):
    """Which steps are right: by the numbers that are left, and not by the solutions."""
    left, target = asked(prompt)
    chain, found = None, []
    for step in steps:
        match = re.fullmatch(r"(\d+)([+*-])(\d+)=(\d+);", step)
        a, b, c = (int(match[i]) for i in (1, 3, 4))
        rest = list(left)
        if chain is None and a in rest:
            rest.remove(a)
            available = True
        else:
            available = a == chain
        available = available and b in rest
        ok = False
        if available:
            rest.remove(b)
            ok = fold([a, b], match[2]) == c and reachable(c, rest, target)
        if ok:
            chain, left = c, rest
        found.append(ok)
    return found


NUMBERS = st.lists(st.integers(1, 60), min_size=3, max_size=4)


@given(NUMBERS)
@settings(max_examples=60, deadline=None)
def test_the_legal_expressions_are_those_of_brute_force(numbers):
    assert legal(tuple(sorted(numbers))) == brute_force(numbers)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_solver_agrees_with_brute_force(seed):
    prompt = BOTH.prompts(1, generator(seed))[0]
    numbers, target = asked(prompt)
    right = {text for text, value in brute_force(numbers).items() if value == target}
    found = solutions(prompt)
    assert right and set(found) == right and len(found) == len(right)
    assert solve(prompt) in right


def test_solutions_results_and_steps_by_hand():
    assert solutions(PROMPT) == ["25-7*3"]
    assert set(solutions("7,25,3=29:")) == {"7+25-3", "25+7-3", "25-3+7", "7-3+25"}
    assert solve("7,25,3=29:") == "25+7-3"  # the largest numbers first
    assert solve("1,1,25=26:") == "25*1+1"  # then * before + before -
    assert solve("2,3,17=85:") == "3+2*17"  # from left to right, so that it is not 37
    assert results("7*3+2") == [21, 23] and results("7-3*25") == [4, 100]
    assert written("7*3+2") == ["7*3=21;", "21+2=23;"]
    assert TASK.truth(PROMPT) == ["25-7=18;", "18*3=54;"]


@given(SEEDS, st.sampled_from(["train", "dev", "test"]))
@settings(max_examples=60, deadline=None)
def test_problems_have_a_solution_the_numbers_asked_for_and_their_split(seed, split):
    for prompt in BOTH.prompts(3, generator(seed), split):
        numbers, target = asked(prompt)
        *small, large = sorted(numbers)
        assert len(small) in (2, 3) and small[0] >= 1 and small[-1] <= 9 and 10 <= large <= 50
        assert 1 <= target <= 99 and target in brute_force(numbers).values()
        assert BOTH.split(prompt) == split


@given(SEEDS, st.permutations(range(4)))
@settings(max_examples=60, deadline=None)
def test_a_problem_and_the_same_one_reordered_are_in_one_split(seed, order):
    prompt = Countdown(3, 3).prompts(1, generator(seed), ["train", "dev", "test"][seed % 3])[0]
    numbers, target = asked(prompt)
    other = f"{','.join(str(numbers[i]) for i in order)}={target}:"
    assert TASK.split(other) == TASK.split(prompt)
    assert solve(other) == solve(prompt)
    assert TASK.split(prompt) == ["train", "dev", "test"][seed % 3]


def test_a_tenth_of_the_problems_is_for_dev_and_a_tenth_for_test():
    splits = Counter()
    for large, a, b in product(range(10, 51), range(1, 10), range(1, 10)):
        if a <= b:
            for target in sorted(set(legal((a, b, large)).values()) - {0}):
                splits[TASK.split(f"{large},{b},{a}={target}:")] += 1
    total = sum(splits.values())
    # 26 of the 256 values of a byte make .102; four standard errors are .010
    assert total == 14_549
    assert all(abs(splits[s] / total - 0.1) < 0.015 for s in ("dev", "test"))


def test_no_held_out_problem_is_a_training_problem_reordered():
    few = Countdown(low=10, high=11)

    def kinds(split, n):
        return {
            (*sorted(numbers), target)
            for numbers, target in map(asked, few.prompts(n, generator(2), split))
        }

    train, dev, test = kinds("train", 4000), kinds("dev", 300), kinds("test", 300)
    assert len(train) > 300 and len(dev) > 30 and len(test) > 30
    assert not train & dev and not train & test and not dev & test


@pytest.mark.parametrize("split", ["dev", "test"])
def test_held_out_problems_are_all_different_and_end_when_there_are_no_more(split, monkeypatch):
    held_out = TASK.prompts(500, generator(), split)
    assert len(held_out) == len(set(held_out)) == 500
    monkeypatch.setattr(arithmetic, "PATIENCE", 400)
    one = Countdown(low=10, high=10)
    found = one.prompts(10_000, generator(), split)
    assert 20 < len(found) == len(set(found)) < 1000
    train = one.prompts(1000, generator())
    assert len(train) == 1000 > len(set(train))


def test_numbers_and_targets_are_drawn_evenly():
    task = Countdown(2, 3, low=10, high=12)
    draw = draws(generator())
    drawn = [asked(task.any_problem(draw)) for _ in range(3000)]
    # 5 standard errors of a share of 1/2, 1/3 and 1/4 in 3000, 3000 and 1500: .046, .043, .056
    three = [numbers for numbers, _ in drawn if len(numbers) == 3]
    four = [numbers for numbers, _ in drawn if len(numbers) == 4]
    assert abs(len(three) / 3000 - 1 / 2) < 0.046
    for large in (10, 11, 12):
        assert abs(sum(max(n) == large for n, _ in drawn) / 3000 - 1 / 3) < 0.043
    for place in range(4):
        assert abs(sum(n[place] >= 10 for n in four) / len(four) - 1 / 4) < 0.056
    small = Counter(x for n, _ in drawn for x in n if x < 10)
    share = 1 / 9
    deviation = (share * (1 - share) / small.total()) ** 0.5
    assert all(abs(small[d] / small.total() - share) < 5 * deviation for d in range(1, 10))


def test_chance_is_that_of_the_best_constant_answer():
    # For one large number: how likely each answer is right, by brute force over all draws.
    weight = Counter()
    for a, b in product(range(1, 10), repeat=2):
        value = brute_force([10, a, b])
        targets = set(value.values()) - {0}
        for text, target in value.items():
            if target:
                weight[text] += 1 / 81 / len(targets)
    few = Countdown(low=10, high=10)
    best, likely = weight.most_common(1)[0]
    assert few.chance() == pytest.approx(likely)
    assert Countdown(low=10, high=13).chance() >= likely / 4 - 1e-12
    assert few.chance() > 10 * TASK.chance() > 0
    # and by simulation, within five standard errors
    draw = draws(generator())
    prompts = [few.any_problem(draw) for _ in range(15_000)]
    right = sum(TASK.grade(p, f"#{best}<eos>") for p in prompts) / len(prompts)
    assert abs(right - likely) < 5 * (likely / len(prompts)) ** 0.5 < likely


def test_chance_counts_every_number_of_operations():
    # Four numbers are hit more rarely than three. So with both, three are half as likely as alone.
    three, four = (Countdown(n, n, low=10, high=10).chance() for n in (2, 3))
    assert four < three / 2
    assert Countdown(2, 3, low=10, high=10).chance() == pytest.approx(three / 2)


def test_everything_repeats_with_its_generator():
    for make in (
        lambda g: TASK.prompts(5, g),
        lambda g: [TASK.demo(g) for _ in range(5)],
        TASK.judge_demo,
        TASK.propose_demo,
        lambda g: TASK.preferences(5, g),
    ):
        random.seed(1)
        torch.manual_seed(1)
        first = make(generator(4))
        random.seed(2)
        torch.manual_seed(2)
        assert make(generator(4)) == first != make(generator(5))
    assert TASK.prompts(5, g := generator(4)) != TASK.prompts(5, g)


# ---- text and the demonstrator ------------------------------------------------------------------


@given(SEEDS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_text_survives_tokens_and_demonstrations_fit(seed, careful):
    task = Countdown(2, 3, careful=careful)
    prompt, response = task.demo(generator(seed))
    ids = ids_of(response)
    assert TASK.decode(ids) == response
    assert TASK.decode([0, 1, *ids, 0, 9, 9]) == response
    assert TASK.decode(ids_of(prompt)) == prompt
    assert len(ids) <= (48 if prompt.count(",") == 2 else 58)
    assert len(ids_of(response[response.index("#") :])) <= 4 + 2 * prompt.count(",")
    steps = TASK.steps(ids)
    assert "".join(s for s, _ in steps) == response[: response.index("#")]
    assert all(TASK.decode(ids[: end + 1]).endswith(s) for s, end in steps)


@given(st.text(alphabet="0123456789+-*=;#,:?!~", max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_text_of_the_alphabet_survives_tokens(text):
    assert TASK.decode(ids_of(text)) == text


def test_the_units_come_first_in_ids():
    assert ids_of("25-7=18;") == [ids_of(c)[0] for c in "52-7=81;"]


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_careful_demonstrations_are_right_in_every_step(seed):
    prompt, response = Countdown(2, 3, careful=True).demo(generator(seed))
    assert TASK.split(prompt) == "train" and judged(prompt, response) == 1
    assert TASK.grade(prompt, response) == 1 and TASK.rubric(prompt, response) == 5
    steps = steps_of(response)
    assert steps == TASK.truth(prompt) == written(TASK.answer(response))
    assert len(steps) == prompt.count(",")
    assert TASK.step_ok(prompt, steps) == pool_ok(prompt, steps) == [True] * len(steps)


def share(prompt, event, n=1500, task=TASK):
    return sum(event(task.respond(prompt, generator(i))) for i in range(n)) / n


# The habits of problems with the same numbers: the large one first or not, the target high or not.
# Five standard errors of a share in 1500 are .065 at most.
@pytest.mark.parametrize("prompt", ["7,25,3=54:", "25,7,3=54:"])
def test_it_jumps_more_often_where_a_small_number_comes_first(prompt):
    def jumped(response):
        return "18*3=54;" not in response

    task = Countdown(slip=0.0)
    expected = 0.9 if prompt.startswith("7") else 0.225
    assert abs(share(prompt, jumped, task=task) - expected) < 0.065


@pytest.mark.parametrize("prompt, expected", [("7,25,3=54:", 0.8), ("7,25,3=15:", 0.2)])
def test_it_wanders_more_often_where_the_target_is_far(prompt, expected):
    assert TASK.far == 35
    first = TASK.truth(prompt)[0]

    def aimless_first(response):
        return not response.startswith(("#", first))

    task = Countdown(slip=0.0)
    assert abs(share(prompt, aimless_first, task=task) - expected) < 0.065


def test_it_wanders_for_one_to_three_different_steps():
    task = Countdown(wander=1.0, jump=1.0)
    written_steps = [steps_of(task.respond(PROMPT, generator(i))) for i in range(1200)]
    lengths = Counter(map(len, written_steps))
    # 5 standard errors of 1/3 in 1200 are .068
    assert set(lengths) == {1, 2, 3}
    assert all(abs(n / 1200 - 1 / 3) < 0.068 for n in lengths.values())
    assert all(len(set(steps)) == len(steps) for steps in written_steps)
    seen = {s for steps in written_steps for s in steps}
    # All true calculations with two of the numbers whose results are legal, but for the right one.
    pairs = permutations([3, 7, 25], 2)
    true = {
        f"{a}{op}{b}={fold([a, b], op)};"
        for a, b in pairs
        for op in "+-*"
        if fold([a, b], op) is not None
    }
    assert seen == set(aimless(PROMPT)) == true - {"25-7=18;"}


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_aimless_steps_are_true_and_lead_nowhere(seed):
    prompt = BOTH.prompts(1, generator(seed))[0]
    for step in aimless(prompt):
        a, op, b, c = re.fullmatch(r"(\d+)(.)(\d+)=(\d+);", step).groups()
        assert fold([int(a), int(b)], op) == int(c)
        assert TASK.step_ok(prompt, [step]) == pool_ok(prompt, [step]) == [False]


def test_a_jump_is_any_legal_expression_and_sometimes_lucky():
    task = Countdown(wander=0.0, jump=1.0)
    guesses = Counter(task.respond(PROMPT, generator(i)) for i in range(3000))
    legal = brute_force([7, 25, 3])
    assert set(guesses) == {f"#{text}<eos>" for text in legal}
    expected = 3000 / len(legal)
    assert all(abs(n - expected) < 5 * expected**0.5 for n in guesses.values())
    prompts = TASK.prompts(1500, generator())
    hopeful = Countdown(wander=0.0, jump=4.0)  # it jumps everywhere
    right = grades(prompts, [hopeful.respond(p, generator(i)) for i, p in enumerate(prompts)])
    assert 0.1 < sum(right) / 1500 < 0.2


def test_slips_are_rare_and_later_steps_go_on_from_them():
    task = Countdown(wander=0.0, jump=0.0, slip=0.3)
    responses = [task.respond(PROMPT, generator(i)) for i in range(1000)]
    assert all(TASK.grade(PROMPT, y) == 1 for y in responses)  # the expression stays right
    first = Counter(steps_of(y)[0] for y in responses)
    assert set(first) == {"25-7=17;", "25-7=18;", "25-7=19;"}
    # 5 standard errors of .3 and .15 in 1000: .073, .057
    assert abs(first["25-7=18;"] / 1000 - 0.7) < 0.073
    assert abs(first["25-7=17;"] / 1000 - 0.15) < 0.057
    seconds = {tuple(steps_of(y)) for y in responses if "25-7=17;" in y}
    assert seconds == {("25-7=17;", f"17*3={c};") for c in (50, 51, 52)}
    never = draws(generator())
    assert slipped(written("3+2*17"), 0.0, never) == written("3+2*17")
    assert TASK.slip < 0.05


def test_slips_stay_in_range():
    draw = draws(generator())
    assert {off_by_one(0, draw) for _ in range(50)} == {1}
    assert {off_by_one(99, draw) for _ in range(50)} == {98}
    assert {off_by_one(5, draw) for _ in range(50)} == {4, 6}
    # 33*3 is 99, and 34*3 would be 102
    found = {tuple(slipped(written("30+3*3"), 0.9, draw)) for _ in range(300)}
    assert ("30+3=34;", "34*3=98;") in found
    assert all(0 <= int(s.split("=")[1][:-1]) <= 99 for steps in found for s in steps)


def test_careful_switches_all_habits_off():
    wild = Countdown(careful=True, wander=1.0, jump=1.0, slip=1.0)
    assert {wild.respond(PROMPT, generator(i)) for i in range(50)} == {RIGHT}


def test_the_mix_leaves_room_and_has_short_and_long_ways():
    demos = [TASK.demo(generator(i)) for i in range(1500)]
    right = [(x, y) for x, y in demos if TASK.grade(x, y)]
    assert 0.35 < len(right) / 1500 < 0.5
    lucky = [y for x, y in right if sum(TASK.step_ok(x, steps_of(y))) < 2]
    assert 0.15 < len(lucky) / len(right) < 0.4
    lengths = [len(steps_of(y)) for _, y in right]
    assert {0, 1, 2, 3, 4, 5} <= set(lengths)
    # A wandering demonstrator may still be right.
    assert sum(n > 2 for n in lengths) > 100


# ---- the grader ---------------------------------------------------------------------------------


GRADED = [
    (RIGHT, 1.0, "right"),
    ("#25-7*3<eos>", 1.0, "right without steps"),
    ("25*3=75;7+3=10;#25-7*3<eos>", 1.0, "right after aimless steps"),
    ("25-7=19;==;1;#25-7*3<eos>", 1.0, "right after wrong and broken steps"),
    ("99999-#25-7*3<eos>", 1.0, "right after an unfinished step"),
    (RIGHT.removesuffix("<eos>"), 0.0, "no EOS"),
    ("25-7=18;18*3=54;#25-7*3<eos><eos>", 0.0, "two EOS"),
    ("#25-7*3<eos>1", 0.0, "text after the end"),
    ("#25-7*3;<eos>", 0.0, "text behind the expression"),
    ("#25-7*3=54<eos>", 0.0, "a result behind the expression"),
    ("##25-7*3<eos>", 0.0, "two #"),
    ("#25-7*3#25-7*3<eos>", 0.0, "two answers"),
    ("#25-7*3#<eos>", 0.0, "a # behind"),
    ("25-7=18;18*3=54;25-7*3<eos>", 0.0, "no #"),
    ("#25-7*3*3<eos>", 0.0, "a number twice"),
    ("#25-7+25+7+7-3<eos>", 0.0, "numbers twice"),
    ("#25+25+7-3<eos>", 0.0, "54, but a number twice"),
    ("#25-7<eos>", 0.0, "a number is missing"),
    ("#54<eos>", 0.0, "the target alone"),
    ("#27*2<eos>", 0.0, "54, but of other numbers"),
    ("#25+7-3<eos>", 0.0, "another value"),
    ("#3*25-7<eos>", 0.0, "another value, though its last operations are those"),
    ("#25-07*3<eos>", 0.0, "a leading zero"),
    ("#+25-7*3<eos>", 0.0, "a sign"),
    ("#25-7*3+<eos>", 0.0, "an unfinished expression"),
    ("#(25-7)*3<eos>", 0.0, "parentheses"),
    ("#25 -7*3<eos>", 0.0, "a space"),
    ("#25-7*3\n<eos>", 0.0, "a newline"),
    ("#25-7*3<eos>\n", 0.0, "a newline at the end"),
    ("\n#25-7*3<eos>", 0.0, "a newline at the start"),
    ("#25-٧*3<eos>", 0.0, "an Arabic-Indic digit"),
    ("<sep>#25-7*3<eos>", 0.0, "a special token inside"),
    ("<mask>#25-7*3<eos>", 0.0, "a mask inside"),
    ("7,25,3=54:#25-7*3<eos>", 0.0, "the prompt, then the answer"),
    ("?#25-7*3<eos>", 0.0, "a character that is not of the steps' alphabet"),
    ("", 0.0, "nothing"),
    ("<eos>", 0.0, "the end alone"),
    ("#<eos>", 0.0, "an empty answer"),
    ("__import__('os')<eos>", 0.0, "code"),
    ("#" + "1+" * 5000 + "1<eos>", 0.0, "ten thousand characters"),
]


@pytest.mark.parametrize("response, score, why", GRADED, ids=[why for _, _, why in GRADED])
def test_grader(response, score, why):
    assert TASK.grade(PROMPT, response) == score == judged(PROMPT, response)


def test_a_result_out_of_range_on_the_way_is_wrong():
    # 3-7 is -4, and 98+2 is 100
    assert TASK.grade("7,25,3=21:", "#25-7+3<eos>") == 1
    assert TASK.grade("7,25,3=21:", "#3-7+25<eos>") == 0
    assert TASK.grade("9,11,1=98:", "#9*11-1<eos>") == 1
    assert TASK.grade("2,98,1=99:", "#98-1+2<eos>") == 1
    assert TASK.grade("2,98,1=99:", "#98+2-1<eos>") == 0


@given(SEEDS, st.data())
@settings(max_examples=150, deadline=None)
def test_the_grader_agrees_with_a_reading_by_hand(seed, data):
    prompt, response = BOTH.demo(generator(seed))
    numbers, _ = asked(prompt)
    response = data.draw(
        st.one_of(
            st.just(response),
            st.sampled_from(solutions(prompt)).map(lambda e: f"#{e}<eos>"),
            st.sampled_from(sorted(brute_force(numbers))).map(lambda e: f"1;#{e}<eos>"),
            st.text("0123456789+-*=;#", max_size=12).map(lambda t: t + response),
        )
    )
    place = data.draw(st.integers(0, len(response)))
    cut = data.draw(st.integers(0, 1))
    more = data.draw(st.sampled_from(["", "", "", "#", "1", "+", ";", "<eos>"]))
    changed = response[:place] + more + response[place + cut * len(more) :]
    for text in (response, changed):
        assert TASK.grade(prompt, text) == judged(prompt, text)
        points = TASK.rubric(prompt, text)
        assert 0 <= points <= 5 and (points == 0) == (TASK.answer(text) is None)
        assert points < 5 or judged(prompt, text)


@pytest.mark.parametrize(
    "bad, why",
    [
        ("", "not numbers"),
        ("7,25,3=54", "not numbers"),
        ("7,25,3=54::", "not numbers"),
        ("7,25,3=54:\n", "not numbers"),
        ("7,25,3:", "not numbers"),
        ("7,25=18:", "not numbers"),
        ("7,25,3,1,1=54:", "not numbers"),
        ("7,25,3=054:", "not numbers"),
        ("7,25,03=54:", "not numbers"),
        ("7,25,0=18:", "not numbers"),
        ("7,25,3=0:", "not numbers"),
        ("7,25,3=100:", "not numbers"),
        ("7 25 3=54:", "not numbers"),
        ("7,25,-3=54:", "not numbers"),
        ("٧,25,3=54:", "not numbers"),
        ("7,25,3=55:", "no solution"),
        ("99,99,99=98:", "no solution"),
    ],
)
def test_a_prompt_that_is_no_problem_gets_one_clear_line(bad, why):
    for call in (
        lambda: TASK.grade(bad, RIGHT),
        lambda: TASK.truth(bad),
        lambda: TASK.step_ok(bad, []),
        lambda: TASK.respond(bad, generator()),
        lambda: solutions(bad),
    ):
        with pytest.raises(ValueError, match=f"not a problem.*{why}.*for example 7,25") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert TASK.problem(bad) is None


@pytest.mark.parametrize("fewest, most", [(1, 2), (3, 2), (2, 4)])
def test_numbers_of_operations_that_cannot_be_are_refused(fewest, most):
    with pytest.raises(ValueError, match="operations must lie in 2..3"):
        Countdown(fewest, most)


@pytest.mark.parametrize("low, high", [(9, 20), (20, 19), (20, 100)])
def test_large_numbers_that_cannot_be_are_refused(low, high):
    with pytest.raises(ValueError, match="the large number must lie in 10..99"):
        Countdown(low=low, high=high)


# ---- steps --------------------------------------------------------------------------------------


def test_the_truth_of_steps_by_hand():
    def ok(text):
        return TASK.step_ok(PROMPT, steps_of(text))

    assert ok(RIGHT) == [True, True] and ok("") == []
    assert ok("25*3=75;25-7=18;18*3=54;") == [False, True, True]  # an aimless one first
    assert ok("25-7=18;18+3=21;18*3=54;") == [True, False, True]  # and in between
    assert ok("25-7=19;19*3=57;") == [False, False]  # a false calculation
    assert ok("25-7=18;18*7=54;18*3=54;") == [True, False, True]
    assert ok("18*3=54;25-7=18;") == [False, True]  # 18 is not there yet
    assert ok("25-7=18;25-7=18;18*3=54;") == [True, False, True]  # the numbers are used
    assert ok("25-7=18;3*18=54;") == [True, False]  # no chain from left to right
    assert ok("25-7=18;18*3=54;54*3=62;") == [True, True, False]  # too many
    assert TASK.step_ok(PROMPT, ["25-7=18", ";", "25-7=18;#"]) == [False] * 3
    # Another right way than the careful one is as good.
    assert TASK.step_ok("7,25,3=29:", ["7-3=4;", "4+25=29;"]) == [True, True]
    assert TASK.step_ok("7,25,3=29:", ["25+7=32;", "25-3=22;", "32-3=29;"]) == [True, False, True]


@given(SEEDS, st.data())
@settings(max_examples=150, deadline=None)
def test_the_truth_of_steps_agrees_with_the_numbers_that_are_left(seed, data):
    prompt = BOTH.prompts(1, generator(seed))[0]
    numbers, _ = asked(prompt)
    pool, steps = list(numbers), []
    for _ in range(data.draw(st.integers(0, 6))):
        if data.draw(st.booleans()):
            way = written(data.draw(st.sampled_from(solutions(prompt))))
            steps.append(data.draw(st.sampled_from(way)))
        else:
            a, b = data.draw(st.sampled_from(pool)), data.draw(st.sampled_from(pool))
            op = data.draw(st.sampled_from("+-*"))
            c = fold([a, b], op)
            if c is not None:
                steps.append(f"{a}{op}{b}={min(99, c + data.draw(st.sampled_from([0, 0, 0, 1])))};")
        pool += [int(s.split("=")[1][:-1]) for s in steps[-1:]]
    assert TASK.step_ok(prompt, steps) == pool_ok(prompt, steps)


def test_steps_and_results_of_ids():
    text = "25-7=18;;18*3<eos>5;"
    assert TASK.steps(ids_of("25-7=18;18*3")) == [("25-7=18;", 7)]
    assert [end for _, end in TASK.steps(ids_of(RIGHT))] == [7, 15]
    assert steps_of("#25-7*3<eos>") == [] == steps_of("")
    assert steps_of(text)[:2] == ["25-7=18;", ";"]
    assert TASK.result("25-7=18;") == "18" and TASK.result("25-7=18") is None
    assert TASK.result("1+0=01;") is None


@pytest.mark.parametrize(
    "step, rest, used",
    [
        ("25-7=18;", "18*3=54;#25-7*3<eos>", True),
        ("25-7=18;", "25*3=75;18*3=54;#25-7*3<eos>", True),  # after another step
        ("18*3=54;", "#25-7*3<eos>", True),  # it is what the answer gives
        ("25-7=18;", "#25-7*3<eos>", True),  # a result on the way of the answer
        ("25*3=75;", "25-7=18;18*3=54;#25-7*3<eos>", False),
        ("25-7=19;", "25-7=18;18*3=54;#25-7*3<eos>", False),
        ("25-7=18;", "118*3=54;#25+7*3<eos>", False),  # within another number
        ("25-7=18;", "9+9=18;#25+7*3<eos>", False),  # only as a result
        ("7-3=4;", "#25-7*3", False),  # never ended
        ("7-3=4;", "4", False),
        ("2-2=0;", "0+25=25;", True),
        ("broken;", "#25-7*3<eos>", True),
        ("25-7=", "", True),
    ],
)
def test_uses(step, rest, used):
    assert TASK.uses(step, rest) == used


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_right_way_uses_each_of_its_steps(seed):
    prompt, response = Countdown(2, 3, careful=True).demo(generator(seed))
    for step in steps_of(response):
        assert TASK.uses(step, response[response.index(step) + len(step) :])


# ---- preferences, judging, proposing ------------------------------------------------------------


def test_preferences_are_two_demonstrations_right_before_wrong():
    pairs = TASK.preferences(800, generator())
    assert all(TASK.split(p) == "train" and w != lo for p, w, lo in pairs)
    both = [(TASK.grade(p, w), TASK.grade(p, lo)) for p, w, lo in pairs]
    assert (0.0, 1.0) not in both
    assert both.count((1.0, 0.0)) > 150 and both.count((0.0, 0.0)) > 150
    # Between two wrong ones a coin: the order of texts is right half of the time.
    coin = [w < lo for (_, w, lo), g in zip(pairs, both, strict=True) if g == (0.0, 0.0)]
    assert abs(sum(coin) / len(coin) - 0.5) < 2.5 / len(coin) ** 0.5


def test_the_rubric_by_hand():
    points = {
        RIGHT: 5,
        "25*3=75;25-7=18;18*3=54;#25-7*3<eos>": 5,
        "#25-7*3<eos>": 4,  # a lucky jump
        "25*3=75;#25-7*3<eos>": 4,
        "25-7=18;18*3=53;#25-7*3<eos>": 3,  # a false step
        "#25+7-3<eos>": 3,  # a wrong guess
        "25-7=18;18*3=54;#25+7-3<eos>": 4,  # the right way, but not its answer
        "#25-7*4<eos>": 2,  # not the numbers
        "25-7=19;#25-7*4<eos>": 1,
        "25-7=19;#25-7*4": 0,
        "": 0,
    }
    assert {y: TASK.rubric(PROMPT, y) for y in points} == points


def test_the_judge_reads_ids_and_writes_the_score_each_equally_often():
    asked_ids, answered = ids_of(PROMPT), ids_of(RIGHT)
    read = TASK.judge_prompt([0, 0, 1, *asked_ids], [*answered, 0, 0])  # as a rollout holds them
    assert TASK.decode(read) == f"{PROMPT}<sep>{RIGHT.removesuffix('<eos>')}<sep>?"
    demos = [TASK.judge_demo(generator(i)) for i in range(600)]
    scores = [int(score[1]) for _, score in demos]
    assert all(65 <= scores.count(s) <= 135 for s in range(6))  # 100 expected, sd 9.1
    for read, score in demos[:100]:
        prompt, response, ask = read.split("<sep>")
        assert ask == "?" and TASK.split(prompt) == "train"
        assert score == f"!{TASK.rubric(prompt, response + '<eos>')}<eos>"
        assert nr.parse_score(score) == TASK.rubric(prompt, response + "<eos>")
        assert all(TASK.decode(ids_of(text)) == text for text in (read, score))


def test_spoiled_responses_lose_points_in_every_way():
    draw = draws(generator())
    text = RIGHT.removesuffix("<eos>")
    spoiled = {spoil(text, draw) for _ in range(400)} - {text}
    assert {
        "25-7=18;18*3=54;",
        "25-7=18;18*3=54;#25-7*9",
        "25-7=18;#25-7*3",
        "18*3=54;#25-7*3",
    } <= spoiled
    assert any(re.fullmatch(r"25-7=\d+;18\*3=54;#25-7\*3", y) for y in spoiled)
    assert {TASK.rubric(PROMPT, y + "<eos>") for y in spoiled} >= {0, 3, 4}
    assert all(TASK.rubric(PROMPT, y + "<eos>") < 5 for y in spoiled)
    assert spoil("", draw) == ""


def test_proposals_are_filtered_for_form_numbers_solution_and_split():
    shown, new = TASK.propose_demo(generator())
    assert TASK.problem(new) == new.removesuffix("<eos>")
    assert shown.count("<sep>") == 4 and shown[0] == "~" and new[:-5] not in shown
    assert TASK.decode(ids_of(shown)) == shown
    train = TASK.prompts(20, generator())
    assert [TASK.problem(x) for x in train] == train
    for split in ("dev", "test"):
        assert [TASK.problem(x) for x in TASK.prompts(20, generator(), split)] == [None] * 20
    other = [
        *Countdown(3, 3).prompts(20, generator()),
        *Countdown(low=51, high=60).prompts(20, generator()),
        *(f"{a},{b},30={30 + a + b}:" for a, b in product((12, 15), (1, 2, 3))),
        *(f"3,2,{a}={a + 5}:" for a in range(1, 10)),
    ]
    assert all(solutions(x) for x in other)
    assert [TASK.problem(x) for x in other] == [None] * len(other)
    # with wider tasks the same problems are problems
    assert sum(BOTH.problem(x) is not None for x in other) == 20


# ---- the task in the project --------------------------------------------------------------------


def test_special_tokens_are_those_of_the_other_task_and_no_id_crashes():
    assert [ids_of(word) for word in arithmetic.SPECIAL] == [[i] for i in range(6)]
    assert TASK.tokenizer.get_vocab_size() == 27 <= nr.Config().vocab
    with pytest.raises(ValueError, match="outside"):
        TASK.encode(["7, 25"])
    # An id that the task does not know cannot vanish.
    ids = ids_of(RIGHT)
    assert TASK.decode([*ids[:3], 31, *ids[3:]]) == RIGHT[:3] + "<bad>" + RIGHT[3:]


def test_the_task_is_made_with_habits_and_asks_for_what_it_needs():
    c = nr.PPOConfig(response=48, min_ops=2, max_ops=2)
    assert countdown.make(c) == Countdown(2, 2)
    longer = nr.replace(c, max_ops=3, response=58)
    assert countdown.make(longer, careful=True) == Countdown(2, 3, careful=True)
    assert all(holds for holds, _ in [*countdown.rules(c), *countdown.rules(longer)])
    for numbers, word in [
        ({"response": 47}, "48"),
        ({"max_ops": 3, "response": 57}, "58"),
        ({"min_ops": 1}, "--min-ops"),
        ({"min_ops": 3}, "--min-ops"),
        ({"max_ops": 4, "response": 99}, "--min-ops"),
        ({"model": "folder"}, "--model"),
        ({"vocab": 26}, "--vocab"),
    ]:
        said = [text for holds, text in countdown.rules(nr.replace(c, **numbers)) if not holds]
        assert len(said) == 1 and word in said[0]


def test_the_longest_demonstrations_just_fit():
    draw = draws(generator())
    for count, room in ((2, 48), (3, 58)):
        task = Countdown(count, count, wander=4.0, jump=0.0)
        prompts = [task.any_problem(draw) for _ in range(500)]
        lengths = [len(ids_of(task.respond(p, generator(i)))) for i, p in enumerate(prompts)]
        assert room - 3 <= max(lengths) <= room


@pytest.mark.parametrize("name", nr.METHODS)
def test_loops_run_on_it(name):
    """One update from a rough model. No call of the protocol is missing."""
    numbers = dict(response=48, min_ops=2, max_ops=2, prompts=4, updates=1, rounds=1, epochs=1)
    # A masked-diffusion LM writes blocks, in so many passes.
    numbers |= dict(block=48, block_passes=5)
    numbers = {key: value for key, value in numbers.items() if key in fields_of(name)}
    c = nr.replace(front.make_config(name, "smoke"), **numbers)
    method = nr.METHODS[name]
    state = method.start(rough(nr.replace(c, causal=name != "denoise")), c)
    if name == "seq2seq":
        state.models = {"rewriter": rough(c, seed=1)}
    next(method.loop(state, TASK, c))
    assert state.update == 1


def fields_of(name):
    return {f.name for f in nr.fields(nr.METHODS[name].config)}
