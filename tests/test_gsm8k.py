"""GSM8K: the grader, the steps and the files; every loop on a folder with a real vocabulary."""

import hashlib
import json
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import nanoreward as nr
import train_small as front
from data import gsm8k
from tests.conftest import ROOT

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
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in rows))
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|spare|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words.train_from_iterator(
        [row(i)["question"] + "\n" + row(i)["answer"] + ".\n\n" for i in range(60)], trainer
    )
    vocab = words.get_vocab_size()
    shape = nr.Architecture(
        vocab=vocab,
        width=32,
        layers=1,
        heads=2,
        kv_heads=1,
        mlp_width=48,
        pad_id=2,
        bos_id=1,
        eos_id=2,
        mask_id=vocab,
    )
    nr.Transformer(shape, nr.rng(0, "hf")).save(path)
    words.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def task(folder):
    c = nr.Transformer.load(folder).config
    assert (c.pad_id, c.bos_id, c.eos_id) == (3, 1, 2)
    return gsm8k.GSM8K(folder, folder / "tokenizer.json", c.pad_id, c.bos_id, c.eos_id)


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
    ],
)
def test_numbers_have_one_spelling(text, number):
    assert gsm8k.canonical(text) == number


@given(st.decimals(-(10**9), 10**9, places=3))
def test_a_number_keeps_its_value_whatever_its_commas(value):
    assert Fraction(gsm8k.canonical(f"${value:,}".replace("$-", "-$"))) == Fraction(value)


@pytest.mark.parametrize(
    "response,answer",
    [
        ("so 3*4=12\n#### 12<eos>", "12"),
        ("#### 12", None),
        ("12<eos>", None),
        ("#### 12\n#### 13<eos>", None),
        ("#### 12\n#### 12.0<eos>", "12"),
        ("#### 12 or 13<eos>", None),
        ("#### 1,200 eggs<eos>", "1200"),
        ("#### 12\nand 7 more<eos>", "12"),
        ("#### $12.50<eos>", "12.5"),
        ("#### twelve<eos>", None),
        ("####<eos>", None),
        ("#### -3<eos>", "-3"),
        ("#" * 10_000 + "<eos>", None),
        ("#### " + "9" * 10_000 + "<eos>", "9" * 199),
    ],
)
def test_answers(task, response, answer):
    assert task.answer(response) == answer


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
    "text", ["", "1+", "(1", "1)", "1/0", "2**3", "a+1", "__import__('os')", "1..2", "*3"]
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


@pytest.mark.parametrize(
    "text,word",
    [
        (None, "is not there"),
        ('{"question": "a", "answer"', "line 1"),
        ('{"question": "a", "answer": "#### 1"}\n{"q": 1}', "line 2"),
        ('{"question": "a", "answer": "no number"}', "####"),
        ("\udcff", "utf-8"),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, text, word):
    if text is not None:
        (tmp_path / "train.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=word) as error:
        gsm8k.read(tmp_path / "train.jsonl")
    assert "\n" not in str(error.value)


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
    task = gsm8k.GSM8K(REAL, folder / "tokenizer.json", 3, 1, 2)
    assert {k: len(v) for k, v in task.by_split.items()} == {
        "train": 6671,
        "dev": 798,
        "test": 1319,
    }
    marks = [pair for y in task.gold.values() for pair in gsm8k.MARK.findall(y)]
    assert len(marks) == 27_998 and sum(gsm8k.holds(*m) for m in marks) >= len(marks) - 2
    lines = right = 0
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
    shared = """--config hf --device cpu --threads 1 --response 40 --prompts 3 --samples 4 --micro 6
        --minibatch 12 --updates 2 --eval-problems 6 --start-data 12 --start-updates 2 --demos 12
        --base-batch 4""".split()
    shared += ["--model", str(folder), "--data", str(folder), "--cache", str(tmp_path / "cache")]
    rounds = "--rounds 2 --judgements 1 --reward-data 6 --reward-updates 2".split()
    loops = [name for name in nr.METHODS if name != "refine"]
    argv = [sys.executable, "train_small.py", *loops, *shared, *rounds]
    argv += ["--out", str(tmp_path / "run")]
    run = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    assert [r["loop"] for r in results] == loops and "ceiling" not in results[0]
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
