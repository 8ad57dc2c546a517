"""data/sudoku.py: grids, splits, demonstrator, grader, ground truth."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanoreward as nr
import train_small as front
from data import arithmetic, sudoku
from data.sudoku import (
    GRIDS,
    Sudoku,
    draws,
    first_names,
    in_order,
    rows,
    solutions,
    solve,
    spoil,
)
from tests.conftest import rough

TASK, CAREFUL = Sudoku(), Sudoku(careful=True)
PROMPT = "1..4.23......1.2="  # its only solution, by hand:
GRID = "1324423124133142"
SEEDS = st.integers(0, 2**32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def brute_force(cells):
    """All solutions, by trying each digit in each empty cell. It shares nothing with the file."""
    if "." not in cells:
        return [cells]
    k, found = cells.index("."), []
    seen = {
        cells[j]
        for j in range(16)
        if j // 4 == k // 4 or j % 4 == k % 4 or (j // 8, j % 4 // 2) == (k // 8, k % 4 // 2)
    }
    for d in "1234":
        if d not in seen:
            found += brute_force(cells[:k] + d + cells[k + 1 :])
    return found


def renamed(text, names):
    return text.translate(str.maketrans("1234", names))


def test_the_grids_are_all_288():
    assert sorted(GRIDS) == brute_force("." * 16) and len(set(GRIDS)) == 288


@given(SEEDS, st.integers(0, 10))
@settings(max_examples=100, deadline=None)
def test_the_solver_agrees_with_brute_force(seed, clues):
    draw = draws(generator(seed))
    grid, given_cells = draw.choice(GRIDS), draw.sample(range(16), clues)
    cells = "".join(d if k in given_cells else "." for k, d in enumerate(grid))
    assert sorted(solutions(cells)) == brute_force(cells)
    if clues and draw.random() < 0.5:  # perhaps contradictory
        cells = cells.replace(next(d for d in cells if d != "."), draw.choice("1234"), 1)
        units = [
            [cells[j] for j in range(16) if key(j) == i]
            for i in range(4)
            for key in (lambda j: j // 4, lambda j: j % 4, lambda j: j // 8 * 2 + j % 4 // 2)
        ]
        legal = all(unit.count(d) < 2 for unit in units for d in "1234")
        assert sorted(solutions(cells)) == (brute_force(cells) if legal else [])


@given(SEEDS, st.integers(5, 12), st.integers(0, 7), st.sampled_from(["train", "dev", "test"]))
@settings(max_examples=60, deadline=None)
def test_problems_have_one_solution_the_clues_asked_for_and_their_split(seed, fewest, more, split):
    most = min(12, fewest + more)
    for prompt in Sudoku(fewest, most).prompts(3, generator(seed), split):
        assert len(brute_force(prompt[:16])) == 1 and len(prompt) == 17 and prompt[16] == "="
        assert fewest <= 16 - prompt.count(".") <= most and TASK.split(prompt) == split


@given(SEEDS, st.permutations("1234"))
@settings(max_examples=100, deadline=None)
def test_a_problem_and_the_same_one_renamed_are_in_one_split(seed, names):
    prompt = TASK.prompts(1, generator(seed), ["train", "dev", "test"][seed % 3])[0]
    other = renamed(prompt, "".join(names))
    assert TASK.split(other) == TASK.split(prompt) and solve(other) == renamed(
        solve(prompt), "".join(names)
    )
    assert first_names(other) == first_names(prompt) and first_names(
        first_names(other)
    ) == first_names(other)


def test_the_first_digit_to_appear_is_called_1():
    assert first_names("3..1..2.....3...=") == "1..2..3.....1...="


def test_a_tenth_of_the_problems_is_for_dev_and_a_tenth_for_test():
    classes = {first_names(g) for g in GRIDS}
    assert len(classes) == 12
    counts = dict.fromkeys(product(classes, ["train", "dev", "test"]), 0)
    for grid in classes:  # the fewest clues that are allowed
        for given_cells in combinations(range(16), 5):
            cells = "".join(d if k in given_cells else "." for k, d in enumerate(grid))
            if len(solutions(cells)) == 1:
                counts[grid, TASK.split(cells + "=")] += 1
    assert min(counts.values()) > 0  # so `prompts` ends for each grid and split
    total = sum(counts.values())

    def share(split):
        return sum(n for (_, s), n in counts.items() if s == split) / total

    # four standard errors of a share of .1 in 11,840 are .011; 26 values of a byte make .102
    assert total == 11_840 and abs(share("dev") - 0.1) < 0.015 and abs(share("test") - 0.1) < 0.015


@pytest.mark.parametrize("split", ["train", "test"])
def test_grids_and_numbers_of_clues_are_equally_likely_so_chance_is_exact(split):
    prompts = Sudoku(5, 8).prompts(6000, generator(3), split)
    assert TASK.chance() == 1 / 288
    classes = [first_names(solve(p)) for p in prompts]
    clues = [16 - p.count(".") for p in prompts]
    # a share of 1/12 or 1/4 in 6000 draws, five standard errors: a false alarm in 50,000 runs
    for seen, kinds in ((classes, 12), (clues, 4)):
        p = 1 / kinds
        assert len(set(seen)) == kinds
        assert all(
            abs(seen.count(x) / 6000 - p) < 5 * (p * (1 - p) / 6000) ** 0.5 for x in set(seen)
        )
    grids = [solve(p) for p in prompts]
    # 20.8 of each are expected, with a standard deviation of 4.6.
    assert len(set(grids)) == 288 and max(map(grids.count, set(grids))) < 50


def test_everything_repeats_with_its_generator():
    for make in (
        lambda g: TASK.prompts(5, g),
        TASK.demo,
        TASK.judge_demo,
        TASK.propose_demo,
        lambda g: TASK.preferences(5, g),
    ):
        assert make(generator(4)) == make(generator(4)) != make(generator(5))
    assert TASK.prompts(5, g := generator(4)) != TASK.prompts(5, g)


@given(SEEDS)
@settings(max_examples=50, deadline=None)
def test_careful_demonstrations_are_right_and_text_survives_tokens(seed):
    prompt, response = CAREFUL.demo(generator(seed))
    assert TASK.split(prompt) == "train" and [response[:16]] == brute_force(prompt[:16])
    assert TASK.grade(prompt, response) == 1.0 and TASK.rubric(prompt, response) == 5
    ids = TASK.encode([response])[0]
    assert (
        len(ids) == 17
        and TASK.decode(ids) == response
        and TASK.decode([0, 1, *ids, 0, 9, 9]) == response
    )
    assert TASK.decode(TASK.encode([prompt])[0]) == prompt
    steps = TASK.steps(ids)
    assert [s for s, _ in steps] == TASK.truth(prompt) and [end for _, end in steps] == [
        3,
        7,
        11,
        15,
    ]
    assert all(TASK.step_ok(prompt, [s for s, _ in steps]))
    assert all(TASK.decode(ids[: end + 1]).endswith(s) for s, end in steps)


def test_a_tempted_student_counts_on():
    assert [in_order(row) for row in ("1..4", "....", ".1..", "3.1.")] == [
        "1234",
        "1234",
        "2134",
        "3214",
    ]


def test_habits_depend_on_the_problem():
    right, hasty = rows(GRID), [in_order(row) for row in rows(PROMPT)]
    assert hasty == ["1234", "1234", "1234", "3142"]  # the first and the last row show a 1
    written = [rows(TASK.respond(PROMPT, generator(i))) for i in range(1000)]

    def share(k, row):
        return sum(w[k] == row for w in written) / 1000

    # five standard errors of a share of .6 or .075 in 1000: .077, .042
    assert abs(share(0, hasty[0]) - 0.6) < 0.08 and abs(share(0, right[0]) - 0.4) < 0.08
    assert abs(share(1, hasty[1]) - 0.075) < 0.045 and abs(share(2, hasty[2]) - 0.075) < 0.045
    assert share(3, hasty[3]) > 0.98  # tempted, and right by luck


def test_slips_are_rare_and_change_one_cell():
    slipping = [rows(Sudoku(haste=0.0, slip=0.4).respond(PROMPT, generator(i))) for i in range(500)]
    wrong = [(a, b) for w in slipping for a, b in zip(w, rows(GRID), strict=True) if a != b]
    assert all(sum(x != y for x, y in zip(a, b, strict=True)) == 1 for a, b in wrong)
    assert abs(len(wrong) / 2000 - 0.3) < 0.05  # .4, of which a quarter writes the same digit again
    assert {next(i for i in range(4) if a[i] != b[i]) for a, b in wrong} == {0, 1, 2, 3}


def test_the_mix_leaves_room_above_and_below():
    prompts = TASK.prompts(400, generator(1), "test")

    def row(given, right):
        return in_order(given) if "1" in given else right

    likeliest = ["".join(map(row, rows(p), TASK.truth(p))) + "<eos>" for p in prompts]
    once = [TASK.respond(p, generator(i)) for i, p in enumerate(prompts)]
    assert 0.3 < sum(TASK.grade(p, y) for p, y in zip(prompts, likeliest, strict=True)) / 400 < 0.7
    assert 0.3 < sum(TASK.grade(p, y) for p, y in zip(prompts, once, strict=True)) / 400 < 0.7


GRADED = [
    (GRID + "<eos>", 1.0, "right"),
    (GRID, 0.0, "no EOS"),
    ("1324423124133124<eos>", 0.0, "two cells swapped"),
    (GRIDS[0] + "<eos>", 0.0, "a whole grid, but of another problem"),
    (GRID[:-1] + "<eos>", 0.0, "a cell short"),
    (GRID + "4<eos>", 0.0, "a cell more"),
    (GRID + "<eos><eos>", 0.0, "two EOS: decode never gives that"),
    (GRID + "<eos>1", 0.0, "text after the end"),
    ("<sep>" + GRID + "<eos>", 0.0, "a special token inside"),
    ("<mask>" + GRID[1:] + "<eos>", 0.0, "a mask inside"),
    (PROMPT[:16] + "<eos>", 0.0, "the prompt again"),
    (PROMPT + GRID + "<eos>", 0.0, "the prompt, then the grid"),
    ("", 0.0, "nothing"),
    ("<eos>", 0.0, "the end alone"),
    (" " + GRID + "<eos>", 0.0, "a space"),
    (GRID + "\n<eos>", 0.0, "a newline"),
    ("٣" + GRID[1:] + "<eos>", 0.0, "an Arabic-Indic digit"),
    ("__import__('os')" + "<eos>", 0.0, "code"),
    (GRID * 600 + "<eos>", 0.0, "ten thousand characters"),
]


@pytest.mark.parametrize("response,score,why", GRADED, ids=[w[:40] for _, _, w in GRADED])
def test_grader(response, score, why):
    assert TASK.grade(PROMPT, response) == score
    assert (TASK.answer(response) == GRID) == bool(score)


@given(
    SEEDS, st.text(alphabet="1234.<eos>", max_size=24), st.integers(0, 15), st.sampled_from("1234")
)
@settings(max_examples=100, deadline=None)
def test_the_grader_accepts_the_one_solution_and_nothing_else(seed, text, place, digit):
    prompt = TASK.prompts(1, generator(seed))[0]
    (right,) = brute_force(prompt[:16])
    other = right[:place] + digit + right[place + 1 :]
    for response in (right + "<eos>", other + "<eos>", text, text + "<eos>", right + text):
        assert TASK.grade(prompt, response) == float(response == right + "<eos>")
        assert 0 <= TASK.rubric(prompt, response) <= 5
        assert (TASK.rubric(prompt, response) == 5) == (response == right + "<eos>")


@pytest.mark.parametrize(
    "bad,why",
    [
        ("", "16 cells"),
        (PROMPT[:16], "16 cells"),
        (PROMPT[1:], "16 cells"),
        ("." + PROMPT, "16 cells"),
        (PROMPT + "=", "16 cells"),
        (PROMPT.replace("4", "5"), "16 cells"),
        (PROMPT.replace("4", "４"), "16 cells"),
        (PROMPT + "\n", "16 cells"),
        ("." * 16 + "=", "288 solutions"),
        ("11" + "." * 14 + "=", "0 solutions"),
        ("123...4........" + ".=", "[0-9]+ solutions"),
    ],
)
def test_a_prompt_that_is_no_problem_gets_one_clear_line(bad, why):
    for call in (
        lambda: TASK.grade(bad, GRID + "<eos>"),
        lambda: TASK.truth(bad),
        lambda: TASK.respond(bad, generator()),
    ):
        with pytest.raises(ValueError, match=f"not a problem.*{why}.*for example 1") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert TASK.problem(bad) is None


@pytest.mark.parametrize("fewest,most", [(4, 8), (8, 7), (6, 13)])
def test_a_range_of_clues_that_cannot_be_drawn_is_refused(fewest, most):
    with pytest.raises(ValueError, match="clues must lie in 5..12"):
        Sudoku(fewest, most)


def test_step_truth_and_rubric_by_hand():
    assert TASK.truth(PROMPT) == ["1324", "4231", "2413", "3142"]

    def ok(*steps):
        return TASK.step_ok(PROMPT, list(steps))

    assert ok("1324", "4231", "1234", "3142") == [True, True, False, True]
    assert ok(*rows(GRID), "1324") == [True] * 4 + [False] and ok("4231") == [False] and ok() == []

    def steps(text):
        return TASK.steps(TASK.encode([text])[0])

    assert (
        steps("1324423<eos>") == [("1324", 3)] and steps("132<eos>1234") == [] and steps("") == []
    )
    assert steps("13244.211234") == [("1324", 3)] and len(steps(GRID + "1234")) == 4
    assert TASK.uses("1324", "4231<eos>")  # no row claims a result: any continuation uses it
    points = {
        y: TASK.rubric(PROMPT, y + "<eos>")
        for y in [
            GRID,
            "1324423124133124",
            "1234" * 4,
            "1234341221434321",
            "2314413214233241",
            "1..4.23......1.2".replace(".", "1"),
            "123",
        ]
    }
    assert list(points.values()) == [5, 3, 2, 4, 4, 2, 0]
    assert TASK.rubric(PROMPT, GRID) == 0  # no end


def test_preferences_are_two_demonstrations_right_before_wrong():
    pairs = TASK.preferences(1000, generator())
    assert all(TASK.split(p) == "train" and w != lo for p, w, lo in pairs)
    grades = [(TASK.grade(p, w), TASK.grade(p, lo)) for p, w, lo in pairs]
    assert (
        (0.0, 1.0) not in grades
        and grades.count((1.0, 0.0)) > 300
        and grades.count((0.0, 0.0)) > 100
    )
    # Between two wrong ones a coin: in the order of texts each is first half of the time, within
    # five standard errors.
    both = [w < lo for (_, w, lo), g in zip(pairs, grades, strict=True) if g == (0.0, 0.0)]
    assert abs(sum(both) / len(both) - 0.5) < 2.5 / len(both) ** 0.5


def test_the_judge_reads_ids_and_writes_the_score_each_equally_often():
    asked, answered = TASK.encode([PROMPT, GRID + "<eos>"])
    read = TASK.judge_prompt([0, 0, 1, *asked], [*answered, 0, 0])  # as a rollout holds them
    assert TASK.decode(read) == f"{PROMPT}<sep>{GRID}<sep>?"
    demos = [TASK.judge_demo(generator(i)) for i in range(600)]
    scores = [int(judged[1]) for _, judged in demos]
    assert all(70 <= scores.count(s) <= 130 for s in range(6))  # 100 expected, sd 9.1
    for read, judged in demos[:100]:
        prompt, response, ask = read.split("<sep>")
        assert ask == "?" and TASK.split(prompt) == "train"
        assert judged == f"!{TASK.rubric(prompt, response + '<eos>')}<eos>"
        assert nr.parse_score(judged) == TASK.rubric(prompt, response + "<eos>")
        assert all(TASK.decode(TASK.encode([text])[0]) == text for text in (read, judged))


def test_spoiled_grids_lose_points_in_every_way():
    draw = draws(generator())
    spoiled = {spoil(GRID, draw) for _ in range(400)} - {GRID}
    assert {TASK.rubric(PROMPT, y + "<eos>") for y in spoiled} == {0, 1, 2, 3, 4}
    assert (
        "4231" + GRID[4:] in spoiled
        and GRID[4:] + GRID[:4] in spoiled
        and renamed(GRID, "2134") in spoiled
    )


def test_proposals_are_filtered_for_form_clues_solution_and_split():
    shown, new = TASK.propose_demo(generator())
    assert (
        TASK.problem(new) == new.removesuffix("<eos>")
        and shown.count("<sep>") == 4
        and shown[0] == "~"
    )
    assert TASK.decode(TASK.encode([shown])[0]) == shown and new[:-5] not in shown
    train = TASK.prompts(20, generator())
    assert [TASK.problem(x) for x in train] == train
    for split in ("dev", "test"):
        assert [TASK.problem(x) for x in TASK.prompts(20, generator(), split)] == [None] * 20
    few, many = (
        Sudoku(k, k).prompts(20, generator()) for k in (TASK.min_clues - 1, TASK.max_clues + 1)
    )
    open_ones = [
        p
        for p in (p.replace("1", ".") for p in Sudoku(9, 9).prompts(99, generator()))
        if len(solutions(p[:16])) > 1
    ]
    assert open_ones and [TASK.problem(x) for x in few + many + open_ones] == [None] * len(
        few + many + open_ones
    )


def test_special_tokens_are_those_of_the_other_task_and_no_id_crashes():
    assert [TASK.encode([w])[0] for w in arithmetic.SPECIAL] == [[i] for i in range(6)]
    assert TASK.tokenizer.get_vocab_size() <= 32
    with pytest.raises(ValueError, match="outside"):
        TASK.encode(["1 2"])
    ids = TASK.encode([GRID + "<eos>"])[0]
    # An id that the task does not know cannot vanish.
    assert TASK.decode([*ids[:3], 31, *ids[3:]]) == GRID[:3] + "<bad>" + GRID[3:] + "<eos>"


@pytest.mark.parametrize("name", nr.METHODS)
def test_loops_run_on_it(name):
    """One update from a rough model, which rarely writes a grid.

    No call of the protocol is missing.
    """
    c = front.make_config(
        name,
        "smoke",
        task="sudoku",
        response=17,
        prompts=4,
        updates=1,
        rounds=1,
        epochs=1,
        block=17,
        block_passes=5,
    )
    method = nr.METHODS[name]
    state = method.start(rough(nr.replace(c, causal=name != "denoise")), c)
    if name == "seq2seq":
        state.models = {"rewriter": rough(c, seed=1)}
    metrics = next(method.loop(state, TASK, c))
    assert state.update == 1
    assert 0 <= metrics["truth"] <= 1 if "truth" in metrics else metrics


@pytest.mark.parametrize("split", ["dev", "test"])
def test_held_out_problems_are_all_different(split, monkeypatch):
    few = GRIDS[:2]
    monkeypatch.setattr(sudoku, "GRIDS", few)
    many_clues = Sudoku(min_clues=11, max_clues=11)
    generator = torch.Generator().manual_seed(0)
    held_out = many_clues.prompts(400, generator, split)
    assert len(set(held_out)) == 400 and {many_clues.split(x) for x in held_out} == {split}
    train = many_clues.prompts(3000, generator)
    assert len(set(train)) < len(train)


def test_the_task_is_made_with_habits_and_asks_for_room():
    c = front.make_config("ppo", "sudoku")
    assert not sudoku.make(c).careful and sudoku.make(c, careful=True).careful
    assert all(holds for holds, _ in sudoku.rules(c))
    said = [message for holds, message in sudoku.rules(nr.replace(c, response=16)) if not holds]
    assert len(said) == 1 and "17" in said[0]
