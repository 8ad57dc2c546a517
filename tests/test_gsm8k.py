"""GSM8K: the grader, the steps and the files; every loop on a folder with a real vocabulary."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

import nanoreward as nr
import train_small as front
from data import gsm8k
from tests.conftest import ROOT, check_conversation, check_transcripts, write_word_folder

REAL = ROOT.parent / "shared" / "gsm8k"
NAMES = ["Ann", "Bo", "Cem", "Dee", "Eva", "Flo"]


def row(i):
    """A little problem with two marked steps."""
    name, boxes, eggs, sold = NAMES[i % 6], 2 + i % 7, 3 + i % 5, 1 + i % 4
    total, left = boxes * eggs, boxes * eggs - sold
    question = (
        f"{name} has {boxes} boxes of {eggs} eggs and sells {sold} on day {i}.  How many are left?"
    )
    lines = [
        f"There are {boxes}*{eggs}=<<{boxes}*{eggs}={total}>>{total} eggs.",
        f"{total}-{sold}=<<{total}-{sold}={left}>>{left} are left.",
        f"#### {left}",
    ]
    return {"question": question, "answer": "\n".join(lines)}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Files as GSM8K's, and the folder of a tiny Llama with a byte-level vocabulary."""
    path = tmp_path_factory.mktemp("gsm8k")
    for name, rows in (("train", range(60)), ("test", range(60, 72))):
        lines = [json.dumps(row(i)) + "\n" for i in rows]
        (path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    lines = [row(i)["question"] + "\n" + row(i)["answer"] + ".\n\n" for i in range(60)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|spare|>"]
    write_word_folder(path, lines, special, 700, pad_id=2, bos_id=1, eos_id=2)
    return path


def config(folder):
    """A config that names this folder for the model and for the rows."""
    about = vars(nr.Transformer.load(folder).config)
    return nr.PPOConfig(**about, task="gsm8k", model=str(folder), data=str(folder))


@pytest.fixture(scope="session")
def task(folder):
    c = config(folder)
    assert (c.bos_id, c.eos_id) == (1, 2) and c.pad_id not in (1, 2)
    return gsm8k.make(c)


def draw(seed=0):
    return nr.rng(seed, "gsm8k")


@pytest.mark.parametrize(
    "text,number",
    [
        ("18", "18"),
        (" 1,234 ", "1234"),
        ("$1,234.50", "1234.5"),
        ("-5", "-5"),
        ("-$5.00", "-5"),
        ("$-5", "-5"),
        ("+7", "7"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("18 dollars", "18"),
        ("18.", "18"),
        ("5%", "5"),
        ("€20", "20"),
        ("007", "7"),
        ("-0", "0"),
        ("", None),
        ("none", None),
        ("٣", None),
        ("1" * 40, "1" * 40),
        ("\u22123", "-3"),
        ("\uff0d3", "-3"),
        ("- 5", "-5"),
        ("= -5", "-5"),
        ("Answer - 18", "18"),
        ("12-15", "12"),
        ("x2-15", "2"),
        ("3,4", None),
        ("1,23", None),
        ("1234,567", None),
        ("1.2.3", None),
        ("1,234,567", "1234567"),
        ("9" * 10_000, "9" * 10_000),
    ],
)
def test_numbers_have_one_spelling(text, number):
    assert gsm8k.canonical(text) == number


@given(st.decimals(-(10**9), 10**9, places=3))
def test_a_number_keeps_its_value_whatever_its_commas(value):
    assert Fraction(gsm8k.canonical(f"${value:,}".replace("$-", "-$"))) == Fraction(value)


# What a person reads behind ####. In doubt it is nothing.
ANSWERS = {
    # Signs, and dashes that are none. A range is no number.
    "-3": "-3",
    "\u22123": "-3",
    "\uff0d3": "-3",
    "\u20133": "-3",
    "- 3": "-3",
    "$-18": "-18",
    "-$18": "-18",
    "+18": "18",
    "Answer: -18": "-18",
    "Answer -18": "-18",
    "Answer - 18": "18",
    "**Total (in dollars)** – 18": "18",
    "Answer-18": None,
    "x = y - 18": None,
    "x + 18": None,
    "12-15": None,
    "12–15": None,
    "12 - 15": None,
    "12 to 15": None,
    "±18": None,
    "--18": None,
    "minus 18": None,
    # Thousands, decimals and powers of ten.
    "1,234,567": "1234567",
    "1 234": "1234",
    "1\u00a0234\u00a0567": "1234567",
    "1\u202f234.50": "1234.5",
    "3,4": None,
    "1,23": None,
    "1234,567": None,
    "1,2345": None,
    "0,123": None,
    "1,234 567": None,
    "1.234.567": None,
    "1'234": None,
    "1_234": None,
    "1\u200b8": None,
    "18, 19": None,
    "18,": "18",
    "18.": "18",
    "18...": None,
    ".5": "0.5",
    "007": "7",
    "1e1": "10",
    "1.5e3": "1500",
    "2e": None,
    "1e999": None,
    "9" * 999: "9" * 999,
    "9" * 10_000: None,
    # Sums are what they are, if their value is clear.
    "3/3": "1",
    "3/4": "0.75",
    "1/3": None,
    "24/7": None,
    "1/2/2000": None,
    "1 1/2": None,
    "10:10": None,
    "3*3": "9",
    "9+9": "18",
    "4×4": "16",
    "4 x 4": None,
    "4 by 4": None,
    "2(9)": None,
    "(10+8)*2": "36",
    "10 + 8 = 18 eggs": "18",
    "20 - 2 = 18": "18",
    "10 + 8 = 19": None,
    "5 eggs + 3": None,
    "1/0": None,
    "10^2": None,
    "2**3": None,
    "2 **300**": None,
    "2**300**2": None,
    "10²": None,
    "√16": None,
    "sqrt(16)": None,
    r"\sqrt{16}": None,
    r"\frac{3}{4}": None,
    "5!": None,
    "|18|": None,
    "<18": None,
    "!= 18": None,
    # Words and letters at a number.
    "18 dollars": "18",
    "18 eggs!": "18",
    "18" + " eggs" * 999: None,
    "$18 per hour": "18",
    "18kg": "18",
    "5k": None,
    "5 k": None,
    "3 million": None,
    "2 dozen": None,
    "18 and a half": None,
    "18th": None,
    "x2": None,
    "B12": None,
    "less than 18": None,
    "not 18": None,
    "12 or 13": None,
    "12 or 12": None,
    "18 out of 20": None,
    "eighteen": None,
    # Digits that are not ASCII.
    "٣": None,
    "１８": None,
    "2²": None,
    "½": None,
    "1½": None,
    # Decoration.
    "": None,
    "18%": "18",
    "$18.00": "18",
    "18 €": "18",
    "≈18": "18",
    "**18**": "18",
    "*18*": "18",
    "`18`": "18",
    "$18$": "18",
    "x = 18": "18",
    "=> 18": "18",
    r"\boxed{18}": "18",
    r"-\boxed{\$18}": "-18",
    r"\boxed{1}\boxed{8}": None,
    "18 (10 + 8)": "18",
    "18 eggs (20 - 2 of them)": "18",
    "18 (9 each)": None,
    "18<|im_end|>": "18",
    # Headings, and several of ####.
    "Step 1: add\n10+8=18\n#### Answer: 18": "18",
    "Day 3: she adds\n#### 18": "18",
    "1. Add\n#### 2. Sell\n#### 18": "18",
    "(1) Add the eggs": None,
    "Step 3": None,
    "\n18": "18",
    "\n\n18 eggs\n19": "18",
    "Final answer:\n18": "18",
    "18\nand 7 more": "18",
    "18\n#### 18.0": "18",
    "18 #### 18": "18",
    "18\n#### 19": None,
    "18\n#### 18 or 19": None,
}


@pytest.mark.parametrize("line", ANSWERS)
def test_answers(task, line):
    for begin in ("####", "#### ", "so 3*4=12\n####  ", "#####"):
        assert task.answer(f"{begin}{line}<eos>") == ANSWERS[line]


def test_only_one_end_at_the_very_end_makes_an_answer(task):
    for response in (
        "#### 12",
        "12<eos>",
        "#### 12<eos> ",
        "#### 12<eos>3<eos>",
        "<eos>#### 12<eos>",
    ):
        assert task.answer(response) is None
    assert task.answer("#" * 10_000 + "<eos>") is None


@pytest.mark.parametrize(
    "piece", ["#", "9", " ", ",", "1,", "1 ", "(", "-", "1/7+", "1=", "**a**", "#### 1\n", "w - "]
)
def test_long_texts_take_no_long_time(task, piece):
    text = piece * (100_000 // len(piece))
    begin = time.process_time()
    for response in (f"{text}<eos>", f"#### {text}<eos>", f"#### 18 {text}18!<eos>"):
        assert task.answer(response) in (None, "1", "18")
        task.rubric(task.prompts(1, draw())[0], response)
        task.result(response)
    with pytest.raises(ValueError):
        gsm8k.calculate(text)
    short = text[: gsm8k.LONGEST - 20]
    gsm8k.holds(short, short)
    task.answer(f"#### {short}18!<eos>")
    assert time.process_time() - begin < 5


def test_listing_answers_copying_the_question_and_garbage_do_not_pay(task):
    prompt, gold = task.demo(draw())
    assert task.grade(prompt, gold) == 1
    right = task.answer(gold)
    for bad in [
        "",
        "<eos>",
        gold.removesuffix("<eos>"),
        f"#### {right} {int(right) + 1}<eos>",
        prompt + "<eos>",
        "x" * 10_000 + "<eos>",
        f"#### {right}1<eos>",
        "".join(f"#### {i}\n" for i in range(99)) + "<eos>",
    ]:
        assert task.grade(prompt, bad) == 0
    with pytest.raises(ValueError, match="not a question of GSM8K"):
        task.grade("Question: Who?\nAnswer:", gold)


NUMBERS = st.integers(0, 999).map(str) | st.decimals(0, 99, places=2).map(str)
SUMS = st.recursive(
    NUMBERS,
    lambda x: (
        st.builds("({}{}{})".format, x, st.sampled_from("+-*"), x)
        | st.builds("{}%".format, NUMBERS)
    ),
    max_leaves=8,
)


def fractions(text):
    """The same by Python's own parser, with each number made a fraction. Only for tests."""
    import ast

    def value(node):
        if isinstance(node, ast.BinOp):
            a, b = value(node.left), value(node.right)
            return {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}[type(node.op)]
        return Fraction(ast.get_source_segment(text, node))

    return value(ast.parse(text, mode="eval").body)


@given(SUMS.filter(lambda x: "%" not in x))
def test_the_parser_agrees_with_pythons(text):
    stripped = gsm8k.re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # Python has no 007
    assert gsm8k.calculate(text) == fractions(stripped)


@pytest.mark.parametrize(
    "text",
    [
        *["", "1+", "(1", "1)", "1/0", "2**3", "a+1", "__import__('os')", "1..2", "*3"],
        *["3,4", "1 2", "5$3", "٣", "2²", "1,2345", "(" * 60 + "1" + ")" * 60, "1+" * 9999 + "1"],
    ],
)
def test_what_is_no_sum_is_an_error_and_no_equation_holds(text):
    with pytest.raises(ValueError):
        gsm8k.calculate(text)
    assert not gsm8k.holds(text, "1")


def test_equations_hold_to_the_last_digit_written():
    assert (
        gsm8k.holds("$1,000 x 3", "3,000")
        and gsm8k.holds("50%*8", "4")
        and gsm8k.holds("10÷4", "2.5")
        and gsm8k.holds("2/3", "0.67")
    )
    assert (
        gsm8k.holds("3\u22125", "\u22122")
        and gsm8k.holds("-(-(2))", "2")
        and gsm8k.holds("+-3", "-3")
    )
    assert (
        not gsm8k.holds("2/3", "0.66")
        and not gsm8k.holds("2/3", "1")
        and not gsm8k.holds("1+1", "3")
    )


def test_texts_come_back_and_ends_stand_where_they_stood(task):
    for prompt in task.prompts(5, draw()):
        ids = task.encode([prompt])[0]
        assert (
            task.decode([task.pad_id] * 3 + [task.bos_id, *ids]) == prompt
            and ids.count(task.eos_id) == gsm8k.SHOTS
        )
    response = task.encode([" a step\n#### 7<eos>"])[0]
    assert (
        task.decode([*response, task.pad_id, task.pad_id])
        == task.decode([*response, *response])
        == " a step\n#### 7<eos>"
    )
    assert task.encode(["<bad>", "<sep>"]) == task.encode(
        [gsm8k.MARKS["<bad>"], gsm8k.MARKS["<sep>"]]
    )
    assert task.decode([]) == task.decode([task.pad_id] * 4) == ""


def other(task, **numbers):
    """The same task with other ids."""
    ids = {"pad_id": task.pad_id, "bos_id": task.bos_id, "eos_id": task.eos_id} | numbers
    return gsm8k.GSM8K(task.folder, task.tokenizer_file, **ids)


def test_what_begins_with_bos_is_a_problem_only_if_the_examples_follow(task):
    response = task.encode(["#### 7<eos> and more"])[0]
    assert task.decode([task.bos_id, *response]) == "#### 7<eos>"
    # In many folders BOS is EOS. A canvas may begin with it, and ends there.
    same = other(task, bos_id=task.eos_id)
    assert same.decode([same.eos_id, *response]) == "<eos>"
    prompt = same.prompts(1, draw())[0]
    ids = [same.bos_id, *same.encode([prompt])[0]]
    assert same.decode(ids) == prompt
    # One other token in the examples, and it is a response.
    assert same.decode([*ids[:3], ids[3] + 1, *ids[4:]]) == "<eos>"


def test_a_text_ends_at_any_end(task):
    several = other(task, eos_id=2, other_ends="0 3")
    prompt, _ = several.demo(draw())
    right = several.truth(prompt)
    line, answer, wrong = several.encode(["3*4=12\n", f"#### {right}", f"\n#### {right}1"])
    for end in (0, 2, 3):
        response = [*line, *answer, end, *wrong, 2]
        assert several.decode(response) == f"3*4=12\n#### {right}<eos>"
        assert several.grade(prompt, several.decode(response)) == 1
        assert several.steps([end, *response]) == []
        assert several.steps([*line, end, *line]) == several.steps(line) != []
        judged = several.judge_prompt([1, *line], [*answer, end])
        assert several.decode(judged) == f"3*4=12\n#### {right}" + gsm8k.JUDGE


@pytest.mark.parametrize("mark", ["<eos>", "<sep>", "<bad>"])
def test_tokens_that_spell_a_mark_are_none(task, mark):
    spelled = task.tokenizer.encode(f"#### 1{mark}8{mark}", add_special_tokens=False).ids
    assert task.decode(spelled) == "#### 1 8 "
    assert task.answer(task.decode(spelled)) is None
    assert task.answer(task.decode([*spelled, task.eos_id])) is None
    nested = task.tokenizer.encode(f"{mark[:2]}{mark}{mark[2:]}", add_special_tokens=False).ids
    assert mark not in task.decode(nested)


def test_steps_are_the_lines_before_the_answer(task):
    _, response = task.demo(draw())
    ids = task.encode([response])[0]
    steps = task.steps(ids)
    assert [text for text, _ in steps] == response.strip().split("\n")[:-1] and len(steps) == 2
    for (_, end), after in zip(steps, (*[e for _, e in steps[1:]], len(ids) - 1), strict=True):
        assert "\n" in task.tokenizer.decode([ids[end]]) and end < after
    assert (
        task.steps(task.encode(["a\n\nb 3*4=12.\n"])[0])[1][0] == "b 3*4=12."
        and task.steps([task.eos_id, *ids]) == []
    )
    assert task.result(steps[0][0]) == gsm8k.canonical(steps[0][0].split("=")[1])


def test_which_lines_are_true(task):
    prompt, response = task.demo(draw())
    lines = [text for text, _ in task.steps(task.encode([response])[0])]
    assert task.step_ok(prompt, lines) == [True, True]
    wrong = lines[0].replace("=", "=9")
    known = task.result(lines[0])
    assert task.step_ok(prompt, [wrong, lines[1], "nothing", f"1+1={known}"]) == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "line,pairs",
    [
        ("box 3+4=7", [("3+4", "7")]),
        ("So 5. 3*4 = 12 eggs, 7-2=5.", [("3*4 ", " 12"), ("7-2", "5")]),
        ("of 4, .5*2=1", [(".5*2", "1")]),
        ("2*2=4=4", [("2*2", "4"), ("4", "4")]),
        ("2–5=-$3", [("2-5", "-$3")]),
        ("x=3 and y = z", []),
    ],
)
def test_the_equations_of_a_line(line, pairs):
    assert gsm8k.equations(line) == pairs


def test_what_goes_on_from_a_line(task):
    assert task.uses("3*400=1,200 eggs", "then 1200-1=1199<eos>")
    assert not task.uses("3*400=1,200 eggs", "then 12000-1=11999<eos>")
    assert task.uses("She counts them.", "#### 3<eos>")


def test_splits_are_disjoint_and_no_example_is_asked(task):
    asked = {
        split: {task.question(x) for x in task.prompts(200, draw(), split)}
        for split in ("train", "dev", "test")
    }
    assert (
        all(asked.values())
        and not asked["train"] & asked["dev"]
        and not asked["test"] & (asked["train"] | asked["dev"])
    )
    assert all(task.split(x) == split for split in asked for x in asked[split])
    assert not any(x in task.shown for xs in asked.values() for x in xs)
    x = next(iter(asked["train"]))
    assert task.problem(f" Question: {x}<eos>".strip()).endswith(f"{x}\nAnswer:")
    assert task.problem(next(iter(asked["test"]))) is None and task.problem("Who?") is None


def test_pairs_scores_and_proposals(task):
    for prompt, good, bad in task.preferences(20, draw()):
        assert (
            task.grade(prompt, good) == 1
            and task.grade(prompt, bad) == 0
            and task.answer(bad) is not None
        )
        assert (
            task.rubric(prompt, good) == 5
            and task.rubric(prompt, bad) < 4
            and task.rubric(prompt, "") == 0
        )
    scores = set()
    for seed in range(12):
        read, written = task.judge_demo(draw(seed))
        scores.add(nr.parse_score(written))
        assert read.endswith(gsm8k.JUDGE) and "<eos>" not in read
    assert len(scores) > 1 and None not in scores
    prompt, response = task.encode(["p"])[0], task.encode(["r<eos>"])[0]
    assert (
        task.decode(task.judge_prompt([task.pad_id, task.bos_id, *prompt], response))
        == "pr" + gsm8k.JUDGE
    )
    shown, new = task.propose_demo(draw())
    assert (
        shown.count("Question:") == 4
        and task.problem(new.strip().removesuffix("<eos>")) is not None
    )


def test_dev_and_test_give_different_problems_and_train_repeats_if_it_has_to(task):
    for split in ("dev", "test"):
        there = len(task.by_split[split])
        few, all_of_them = task.prompts(3, draw(), split), task.prompts(999, draw(), split)
        assert len(set(few)) == len(few) == 3
        assert len(set(all_of_them)) == len(all_of_them) == there < 999
    there = len(task.by_split["train"])
    assert len(set(task.prompts(there, draw()))) == there
    assert len(task.prompts(999, draw())) == 999


def test_a_spoiled_answer_is_exact_whatever_its_length(task):
    right = 10**60 + 7
    for shown in (str(right), f"{right:,}"):
        spoiled = task.spoiled(
            f" so 1*{shown}={shown}, that is all\n#### {shown}<eos>", gsm8k.draws(draw())
        )
        wrong = int(task.answer(spoiled))
        assert (
            0 < abs(wrong - right) <= 10 and spoiled.count(str(wrong)) == 3 and shown not in spoiled
        )


def test_a_question_that_was_shown_is_no_new_problem(task, monkeypatch):
    c = nr.SelfRewardingConfig(prompts=2)

    def copies(model, task, shown, config, generator=None):
        old = [x.split("Question:")[1].strip() for x in shown]
        new = next(x for x in sorted(task.by_split["train"]) if not any(x in y for y in shown))
        return [f" {x}<eos>" for x in old[:3]] + [f" {new}<eos>"]

    monkeypatch.setattr(nr, "respond", copies)
    state = nr.SelfRewardingState(policy=None, optimizers=[], judge=None)
    _, about = nr.pose_problems(state, task, c, 0)
    assert about == {"valid": 0.25, "proposed": 0.5} and len(state.posed) == 1


GOOD = '{"question": "a", "answer": "#### 1"}\n'


@pytest.mark.parametrize(
    "text,word",
    [
        (None, "is not there"),
        ("", "line 1: .*empty line"),
        (GOOD + '{"question": "a", "answer"', "line 2"),
        (GOOD + '{"q": 1}', "line 2: .*'question'"),
        (GOOD + '{"question": "a"}', "line 2: .*'answer'"),
        (GOOD + '{"question": "a", "answer": 3}', "line 2: .*'answer'"),
        (GOOD + '["question", "answer"]', "line 2: .*object"),
        (GOOD + "\n" + GOOD, "line 2: .*empty line"),
        (GOOD + "\r\n", "line 2: .*empty line"),
        (GOOD + '{"n": ' + "9" * 5000 + "}", "line 2"),
        (GOOD + "[" * 100_000, "line 2"),
        ('{"question": " ", "answer": "#### 1"}', "line 1: .*question is empty"),
        ('{"question": "\\ud800", "answer": "#### 1"}', "line 1"),
        ('{"question": "a", "answer": "no number"}', "####"),
        ('{"question": "a", "answer": "#### 3,4"}', "####"),
        ('{"question": "a", "answer": "#### 1<eos>8"}', "####"),
        (GOOD + "\udcff", "line 2: .*utf-8"),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, text, word):
    path = tmp_path / "train.jsonl"
    if text is not None:
        path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(ValueError, match=word) as error:
        gsm8k.read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_folder_in_place_of_a_file_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        gsm8k.read(tmp_path)


def test_rows_end_at_a_line_feed_only_and_lose_the_marks_of_the_loops(tmp_path):
    rows = [
        {"question": f"Ann{sign} has\nQuestion: 3?", "answer": f"a{sign}b\n#### 3"}
        for sign in ("\u2028", "\u0085", "\x0b", "\x0c", "\x1c", "<eos>", "<sep>", "<bad>")
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "train.jsonl"
    for begin, end in (("", "\n"), ("", "\r\n"), ("\ufeff", "\n")):
        path.write_bytes((begin + end.join(lines) + end).encode())
        read = gsm8k.read(path)
        assert [question for question, _ in read] == ["Ann has 3?"] * len(rows)
        assert [y for _, y in read] == [row["answer"] for row in rows[:5]] + ["a b\n#### 3"] * 3


@pytest.fixture
def copy(folder, tmp_path):
    """The config of a copy of the folder that a test may damage."""
    shutil.copytree(folder, tmp_path / "copy")
    return config(tmp_path / "copy")


def rows_of(path):
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


@pytest.mark.parametrize(
    "name,kept,word",
    [
        ("train.jsonl", 3, "train.jsonl has too few rows: 3 solved examples"),
        (
            "train.jsonl",
            5,
            "train.jsonl has too few rows: 4 solved examples and then [01] problems",
        ),
        ("test.jsonl", 0, "test.jsonl, line 1: .*empty line"),
    ],
)
def test_a_file_with_too_few_rows_is_one_clear_line(copy, tmp_path, name, kept, word):
    path = tmp_path / "copy" / name
    path.write_text("".join(rows_of(path)[:kept]), encoding="utf-8")
    with pytest.raises(ValueError, match=word) as error:
        gsm8k.make(copy)
    assert "\n" not in str(error.value)


def test_a_file_of_long_solutions_has_no_examples(copy, tmp_path):
    path = tmp_path / "copy" / "train.jsonl"
    rows = [json.loads(line) for line in rows_of(path)]
    for row in rows:
        row["answer"] = "She counts them.\n" * 4 + row["answer"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match="train.jsonl has too few rows: 0 solved examples"):
        gsm8k.make(copy)


def test_a_split_without_a_problem_is_one_clear_line(copy, tmp_path, monkeypatch):
    """By chance no row of a small file is dev."""
    monkeypatch.setattr(gsm8k, "bucket", lambda question: "9" * 8)
    with pytest.raises(ValueError, match="train.jsonl .* 0 problems of dev"):
        gsm8k.make(copy)


def test_a_question_has_one_place_and_one_answer(copy, tmp_path):
    train, test = (tmp_path / "copy" / name for name in ("train.jsonl", "test.jsonl"))
    rows = rows_of(train)
    # Once more with the same answer is no harm.
    train.write_text("".join([*rows, rows[7]]), encoding="utf-8")
    before = gsm8k.make(copy)
    assert len(before.gold) == 72
    changed = json.loads(rows[7]) | {"answer": "#### 12345"}
    train.write_text("".join([*rows, json.dumps(changed)]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"train.jsonl, line 61: .* of train.jsonl, line 8"):
        gsm8k.make(copy)
    train.write_text("".join(rows), encoding="utf-8")
    spaced = json.loads(rows[7])["question"].replace(" ", "  ")
    again = json.loads(rows[7]) | {"question": spaced}
    test.write_text("".join([*rows_of(test), json.dumps(again)]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"test.jsonl, line 13: .* of train.jsonl, line 8"):
        gsm8k.make(copy)


def test_a_tokenizer_that_loses_letters_is_one_clear_line(copy, tmp_path):
    path = tmp_path / "copy" / "tokenizer.json"
    words = Tokenizer.from_file(str(path))
    words.normalizer = normalizers.Lowercase()
    words.save(str(path))
    with pytest.raises(ValueError, match="cannot write a question") as error:
        gsm8k.make(copy)
    assert "\n" not in str(error.value)


def test_the_file_runs_on_its_own(tmp_path):
    argv = [sys.executable, str(ROOT / "data" / "gsm8k.py")]
    run = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "error: python data/gsm8k.py FOLDER\n")


def test_a_download_is_kept_only_if_it_is_the_right_file(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for name in gsm8k.SHA256:
        (source / name).write_text(name)
    with pytest.raises(ValueError, match="nothing was written"):
        gsm8k.download(tmp_path / "here", source.as_uri() + "/")
    assert list((tmp_path / "here").iterdir()) == []
    monkeypatch.setattr(
        gsm8k, "SHA256", {name: hashlib.sha256(name.encode()).hexdigest() for name in gsm8k.SHA256}
    )
    gsm8k.download(tmp_path / "here", source.as_uri() + "/")
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["test.jsonl", "train.jsonl"]


@pytest.mark.skipif(not REAL.exists(), reason="no local copy of GSM8K beside the checkout")
def test_the_real_files(folder):
    for name, digest in gsm8k.SHA256.items():
        assert hashlib.sha256((REAL / name).read_bytes()).hexdigest() == digest
    task = gsm8k.GSM8K(REAL, folder / "tokenizer.json", pad_id=3, bos_id=1, eos_id=2)
    assert {k: len(v) for k, v in task.by_split.items()} == {
        "train": 6671,
        "dev": 798,
        "test": 1319,
    }
    marks = [pair for y in task.gold.values() for pair in gsm8k.MARK.findall(y)]
    assert len(marks) == 27_998 and sum(gsm8k.holds(*m) for m in marks) >= len(marks) - 2
    lines = right = 0
    for question, solution in task.gold.items():
        behind = solution.rpartition("####")[2].strip()
        assert task.truth(question) == behind.replace(",", "")
        assert task.grade(question, gsm8k.written(solution)) == 1
    for x in list(task.gold)[::7]:
        prompt, response = gsm8k.ASK + x + gsm8k.ANSWER, gsm8k.written(task.gold[x])
        assert (
            task.grade(prompt, response) == 1
            and task.grade(prompt, task.spoiled(response, gsm8k.draws(draw()))) == 0
        )
        ok = task.step_ok(prompt, [line for line in response.split("\n") if "####" not in line])
        lines, right = lines + len(ok), right + sum(ok)
    assert 0.85 < right / lines < 0.95  # lines without a result cannot be judged and count as wrong


def test_every_loop_runs_unchanged_on_a_folder(folder, tmp_path, monkeypatch, capsys):
    """Nothing can be learned from random weights. This is the way from ids to saved folders."""
    shared = """--config hf --device cpu --threads 1 --response 24 --prompts 3 --samples 4 --micro 6
        --minibatch 12 --updates 1 --eval-problems 3 --start-data 12 --start-updates 2 --demos 12
        --base-batch 4 --workers 1""".split()
    shared += ["--model", str(folder), "--data", str(folder), "--cache", str(tmp_path / "cache")]
    rounds = "--rounds 2 --judgements 3 --reward-data 6 --reward-updates 2".split()
    loops = [name for name in nr.METHODS if name != "refine"]
    assert front.main([*loops, *shared, *rounds, "--out", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    assert [r["loop"] for r in results] == loops and "ceiling" not in results[0]
    check_transcripts(tmp_path / "run")
    check_conversation(tmp_path / "run", tmp_path / "cache", monkeypatch, capsys)
    # The student of refine learns from its right responses. Without any, one line says so.
    refine = ["refine", *shared, "--continuations", "2"]
    assert front.main([*refine, "--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "no response was right" in error and error.strip().count("\n") == 0
    # With some of them it runs.
    monkeypatch.setattr(
        gsm8k.GSM8K, "grade", lambda self, prompt, response: float(len(response) % 2)
    )
    assert front.main([*refine, "--out", str(tmp_path / "some")]) == 0
    again = nr.Transformer.load(tmp_path / "run" / "models" / "ppo-0").config
    assert again.vocab == nr.Transformer.load(folder).config.vocab
    grown = nr.Transformer.load(tmp_path / "run" / "models" / "denoise-0").config
    assert grown.vocab == again.vocab + 1 == grown.mask_id + 1 and not grown.causal


@pytest.mark.parametrize(
    "flags,word",
    [
        (["--task", "gsm8k"], "--model FOLDER"),
        (["--model", "nowhere", "--task", "gsm8k"], "nowhere"),
        (["--config", "hf"], "--model FOLDER"),
    ],
)
def test_a_missing_folder_is_one_line(flags, word, capsys, tmp_path):
    assert front.main(["ppo", *flags, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_gpt_with_a_mask_row_predicts_as_before(folder, tmp_path):
    """The grown vocabulary changes no logit of the words that were there."""
    old = nr.Transformer.load(folder)
    c = nr.DenoiseConfig(
        **vars(old.config),
        model=str(folder),
        task="gsm8k",
        data=str(folder),
        threads=1,
        device="cpu",
        start_updates=1,
        demos=4,
        base_batch=2,
        response=64,
        start_lr=1e-9,
        start_muon_lr=0.0,
    )
    model = nr.diffusion_base(
        nr.gpt_base(front.make_task(c), c, front.CachedTrainer(tmp_path)),
        front.make_task(c),
        c,
        front.CachedTrainer(tmp_path),
    )
    model.future_weight = 0.0
    ids = torch.randint(4, c.vocab, (2, 9), generator=draw())
    assert torch.allclose(model(ids)[..., :-1], old(ids), atol=1e-4)
    assert torch.allclose(model.embed_tokens.weight[-1], old.embed_tokens.weight.mean(0), atol=1e-4)


def test_parentheses_may_be_nested_fifty_deep_and_no_deeper():
    assert gsm8k.calculate("(" * 50 + "7" + ")" * 50) == 7
    with pytest.raises(ValueError, match="nested"):
        gsm8k.calculate("(" * 51 + "7" + ")" * 51)
