"""Sums in words: problems, the grader, prompts by a chat template; every loop on a tiny folder."""

import json
import shutil
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

import nanoreward as nr
import train_small as front
from data import gsm8k, sums
from tests.conftest import check_conversation, check_transcripts, write_word_folder

# It writes BOS, names a special token, and shows the roles as Llama and SmolLM2 do.
TEMPLATE = """\
{% if messages[0]['role'] == 'system' %}
  {{ raise_exception('no system here') }}
{% endif %}
{{ bos_token }}{% for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
  {% if add_generation_prompt %}
<|im_start|>assistant
  {% endif %}
"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>"]


def write_chat_folder(path):
    """The folder of a tiny Llama with a byte-level vocabulary and a chat template."""
    lines = [f"Question: What is {i} + {i}?\nAnswer: assistant user system\n" for i in range(60)]
    write_word_folder(path, lines, SPECIAL, 400, pad_id=401, bos_id=3, eos_id=2)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<|begin|>"},
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_chat_folder(tmp_path_factory.mktemp("sums"))


def config(folder, **numbers):
    """A config that names this folder."""
    about = vars(nr.Transformer.load(folder).config)
    numbers = {"max_ops": 1, "response": 64} | numbers
    return nr.PPOConfig(**about, task="sums", model=str(folder), **numbers)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder that a test may change."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="session")
def task(folder):
    return sums.make(config(folder))


@pytest.fixture(scope="session")
def longer(folder):
    """Problems of two and three operations."""
    return sums.make(config(folder, min_ops=2, max_ops=3))


@pytest.fixture(scope="session")
def plain(folder, tmp_path_factory):
    """The same folder without a template."""
    path = tmp_path_factory.mktemp("plain") / "folder"
    shutil.copytree(folder, path)
    (path / "tokenizer_config.json").unlink()
    return sums.make(config(path))


def draw(seed=0):
    return nr.rng(seed, "sums")


# ---- problems ------------------------------------------------------------------------------------

NUMBER = st.integers(0, 9999)
CHAIN = st.tuples(NUMBER, st.lists(st.tuples(st.sampled_from("+-"), NUMBER), min_size=1))


def written(start, operations):
    """A sum as a question writes it."""
    return " ".join([str(start), *(f"{op} {number}" for op, number in operations)])


@given(CHAIN)
def test_results_are_those_of_python(chain):
    start, operations = chain
    text = written(start, operations)
    found = sums.results(f"What is {text}?")
    for length, result in enumerate(found, 1):
        assert result == eval(written(start, operations[:length]))
    assert len(found) == len(operations)


@given(CHAIN, st.randoms())
def test_the_order_of_a_sum_changes_no_split(chain, random):
    start, operations = chain
    terms = [("+", start), *operations]
    first = random.choice([i for i, (op, _) in enumerate(terms) if op == "+"])
    (_, begin) = terms.pop(first)
    random.shuffle(terms)
    again = sums.bucket(f"What is {written(begin, terms)}?")
    assert again == sums.bucket(f"What is {written(start, operations)}?")


def test_other_signs_and_numbers_are_other_problems():
    """Among twenty pairs some would be in different splits by chance."""
    for other in ("- 7", "+ 8"):
        found = [
            sums.bucket(f"What is {i} + 7?") == sums.bucket(f"What is {i} {other}?")
            for i in range(20, 40)
        ]
        assert not all(found)


@pytest.mark.parametrize(
    "text",
    [
        *["", "Who?", "What is 5?", "What is 5 + ?", "What is 05 + 1?", "What is 5 + 1"],
        *["What is 5  + 1?", "What is -5 + 1?", "What is 5 * 1?", "What is 5 + 1? ", "5 + 1"],
        *["What is ٣ + 1?", "What is 5 + 1?\nWhat is", "What is 5 + 1.0?"],
    ],
)
def test_what_is_no_problem_is_an_error(task, text):
    for whole in (text, task.prompt(text)):
        with pytest.raises(ValueError, match="not a problem") as error:
            task.grade(whole, "6<eos>")
        assert "\n" not in str(error.value)
    assert task.problem(f"{text}<eos>".replace("? <", "?? <")) is None


def test_splits_are_disjoint_and_dev_and_test_never_repeat(folder):
    task = sums.make(config(folder, largest=20))
    asked = {
        split: [task.question(x) for x in task.prompts(400, draw(), split)]
        for split in ("train", "dev", "test")
    }
    for split, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not set(asked[split]) & set(asked[other])
    for split in ("dev", "test"):
        # A tenth of 400 additions and 210 subtractions is all that there is.
        assert 30 < len(asked[split]) == len(set(asked[split])) < 100
    assert len(asked["train"]) == 400
    assert all(task.split(task.prompt(x)) == split for split in asked for x in asked[split])
    for a in range(1, 21):
        for b in range(1, 21):
            assert task.split(f"What is {a} + {b}?") == task.split(f"What is {b} + {a}?")


def test_no_solved_problem_is_asked(folder):
    task = sums.make(config(folder, largest=9, shots=32))
    assert len(set(task.examples)) == 32
    assert all(task.split(x) == "train" for x in task.examples)
    asked = {task.question(x) for x in task.prompts(500, draw())}
    assert not asked & set(task.examples) and len(asked) > 30
    assert all(task.problem(x) is None for x in task.examples)


@pytest.mark.parametrize("least,most,largest", [(1, 1, 9), (2, 2, 99), (1, 4, 30)])
def test_problems_have_the_size_that_is_asked_for(folder, least, most, largest):
    task = sums.make(config(folder, min_ops=least, max_ops=most, largest=largest, response=99))
    lengths, signs, numbers = set(), set(), set()
    for prompt in task.prompts(400, draw()):
        question = task.question(prompt)
        start, operations = sums.parse(question)
        assert min(sums.results(question)) >= 0
        lengths.add(len(operations))
        signs |= {op for op, _ in operations}
        numbers |= {start, *(number for _, number in operations)}
        assert task.problem(f" {question}<eos>") == prompt
    assert lengths == set(range(least, most + 1)) and signs == {"+", "-"}
    assert min(numbers) == 1 and max(numbers) == largest


def test_a_problem_that_is_posed_has_the_size_of_the_tasks_own(task):
    for bad in ("40 + 100", "3 - 4", "1 + 2 + 3", "0 + 9", "9 + 0"):
        # That it belongs to dev or test is not the reason.
        assert task.split(f"What is {bad}?") == "train"
        assert task.problem(f"What is {bad}?") is None
    assert task.problem(f"What is 1 + {'9' * 5000}?") is None
    heldout = task.question(task.prompts(1, draw(), "dev")[0])
    assert task.problem(heldout) is None


# ---- the grader ----------------------------------------------------------------------------------

# What the last line gives, for the question What is 50 - 25 + 3?, whose answer is 28.
LINES = {
    "28": 1,
    " 28": 1,
    "28.": 1,
    "28.0": 1,
    "**28**": 1,
    "The answer is 28.": 1,
    "25 + 3 = 28": 1,
    "50 - 25 + 3 = 28": 1,
    "50 - 25 = 25\n25 + 3 = 28": 1,
    "50 - 25 = 26\n28": 1,
    "28\n": 1,
    # A sum that is not worked out is no answer, and a false equation is none either.
    "50 - 25 + 3": 0,
    "25 + 3": 0,
    "What is 50 - 25 + 3?": 0,
    "28 + 0": 0,
    "0 + 28": 0,
    "25 + 4 = 28": 0,
    "28 = 25 + 3": 0,
    # One number, and only in the last line.
    "": 0,
    "27": 0,
    "-28": 0,
    "280": 0,
    "27 28": 0,
    "28 28": 0,
    "28 or 29": 0,
    "27, 28": 0,
    "28\n29": 0,
    "28\nThat is it.": 0,
    "not 28": 0,
    "28th": 0,
    "2 8": 0,
    "28e0": 0,
    "twenty-eight": 0,
    "٢٨": 0,
    "28 = ": 0,
}


@pytest.mark.parametrize("line", LINES)
def test_the_last_line_gives_one_number(task, line):
    assert task.grade("What is 50 - 25 + 3?", f"{line}<eos>") == LINES[line]


@given(CHAIN, st.integers(-5, 5))
def test_the_grader_agrees_with_pythons_arithmetic(task, chain, off):
    text = written(*chain)
    given = eval(text) + off
    for response in (f"{given}<eos>", f" The answer is {given}.<eos>", f"{text} = {given}<eos>"):
        assert task.grade(f"What is {text}?", response) == (off == 0)
    for bad in (f"{text}<eos>", f"{given}", f"{given}<eos>{given}<eos>", f"<eos>{given}"):
        assert task.grade(f"What is {text}?", bad) == 0


def test_long_texts_take_no_long_time(task):
    for piece in ("9", "1 + ", "1\n", "=", "= 1", "(", "<eos>"):
        assert task.grade("What is 1 + 1?", piece * 100_000 + "<eos>") == 0


@pytest.mark.parametrize("name", ["task", "longer", "plain"])
def test_the_demonstrator_is_right_and_the_spoiled_solution_is_wrong(name, request):
    task = request.getfixturevalue(name)
    for prompt, good, bad in task.preferences(50, draw()):
        assert task.grade(prompt, good) == 1 and task.grade(prompt, bad) == 0
        assert good != bad and bad.endswith("<eos>") and "-" not in bad.rpartition("=")[2]
        assert task.rubric(prompt, good) == 5
        assert task.rubric(prompt, bad) < 3 and task.rubric(prompt, "") == 0
        lines = good.strip().split("\n")
        assert task.step_ok(prompt, lines[:-1]) == [True] * (len(lines) - 1)


# ---- prompts and ids -----------------------------------------------------------------------------


def oracle(folder, task, prompt):
    """The ids of a problem as transformers writes them."""
    from transformers import AutoTokenizer

    messages = []
    for question in task.examples:
        answer = task.solution(question).removesuffix("<eos>")
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": task.question(prompt)})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    how = {"add_generation_prompt": True, "enable_thinking": False}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how)
    return text, ids


@pytest.mark.parametrize("shots", [0, 4])
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "a list"])
def test_a_chat_has_the_text_and_the_ids_of_transformers(copy, shots, place):
    path = copy / "tokenizer_config.json"
    about = json.loads(path.read_text())
    if place == "chat_template.jinja":
        # The file wins over what stands elsewhere.
        (copy / place).write_text(about["chat_template"].replace("assistant", "helper"))
    elif place == "a list":
        about["chat_template"] = [
            {"name": "other", "template": "nothing"},
            {"name": "default", "template": about["chat_template"]},
        ]
    path.write_text(json.dumps(about))
    c = config(copy, shots=shots)
    task = sums.make(c)
    for prompt in task.prompts(5, draw()):
        text, ids = oracle(copy, task, prompt)
        assert prompt == text
        found = nr.encode_prompts(task, [prompt], c)[0].tolist()
        assert found == ids
        assert found.count(3) == 1 and found.count(1) == 2 * shots + 2
        assert found.count(2) == 2 * shots + 1


def test_bos_stands_in_front_once_whether_the_template_writes_it_or_not(copy):
    path = copy / "tokenizer_config.json"
    about = json.loads(path.read_text())
    about["chat_template"] = about["chat_template"].replace("{{ bos_token }}", "")
    path.write_text(json.dumps(about))
    c = config(copy)
    task = sums.make(c)
    prompt = task.prompts(1, draw())[0]
    _, ids = oracle(copy, task, prompt)
    assert 3 not in ids
    assert nr.encode_prompts(task, [prompt], c)[0].tolist() == [3, *ids]


def test_only_a_whole_problem_can_write_special_tokens(task):
    prompt, response = task.demo(draw())
    for text in (response, f"{prompt}x", f"x{prompt}", "<|im_start|><|im_end|><|begin|>"):
        ids = task.encode([text.removesuffix("<eos>")])[0]
        assert not {0, 1, 2, 3} & set(ids)
    assert task.encode([response])[0].count(2) == 1
    sneaked = task.prompt("What is 1 + 1?<|im_end|>")
    assert not {0, 1, 2, 3} & set(task.encode([sneaked])[0])


@pytest.mark.parametrize("name", ["task", "longer", "plain"])
def test_problems_come_back_from_their_ids(name, request):
    task = request.getfixturevalue(name)
    for split in ("train", "dev", "test"):
        for prompt in task.prompts(10, draw(), split):
            ids = [task.pad_id] * 3 + [task.bos_id, *task.encode([prompt])[0]]
            assert task.decode(ids) == prompt
            right = task.solution(task.question(prompt))
            assert task.grade(task.decode(ids), right) == 1
            # One other id, and it is no problem.
            assert task.decode([*ids[:-1], 50]) != prompt
    with pytest.raises(ValueError, match="not a problem"):
        task.grade(prompt.replace(task.tail, task.tail * 2), right)


def test_the_question_that_counts_is_the_last_one(plain):
    asked = plain.prompts(1, draw())[0]
    assert asked.count("What is") == 5 and asked.count("<eos>") == 4
    assert plain.question(asked) == sums.QUESTION.findall(asked)[-1].join(["What is ", "?"])
    assert plain.encode([asked])[0].count(plain.eos_id) == 4


def test_a_response_ends_at_its_first_end(task):
    ids = task.encode([" 7<eos>"])[0]
    assert task.decode([*ids, *ids, task.pad_id]) == task.decode([task.bos_id, *ids]) == " 7<eos>"
    assert task.decode([]) == task.decode([task.pad_id] * 4) == ""
    several = sums.Sums(task.folder, pad_id=task.pad_id, bos_id=3, eos_id=2, other_ends="0")
    assert several.decode([*ids[:-1], 0, *ids]) == " 7<eos>"
    # In many folders BOS is EOS.
    same = sums.Sums(task.folder, pad_id=task.pad_id, bos_id=2, eos_id=2)
    assert same.decode([2, *ids]) == "<eos>"
    prompt = same.prompts(1, draw())[0]
    assert same.decode([2, *same.encode([prompt])[0]]) == prompt


@pytest.mark.parametrize("mark", ["<eos>", "<sep>", "<bad>"])
def test_tokens_that_spell_a_mark_are_none(task, mark):
    spelled = task.tokenizer.encode(f"1{mark}8{mark}", add_special_tokens=False).ids
    assert task.decode(spelled) == "1 8 "
    words = task.encode([mark])[0]
    assert words == ([2] if mark == "<eos>" else task.encode([gsm8k.MARKS[mark]])[0])


def test_without_a_template_or_jinja2_the_prompt_is_plain_and_the_note_says_so(
    task, plain, folder, monkeypatch
):
    assert task.template and task.note.startswith("prompts: the chat template of the folder")
    assert "no chat template" in plain.note and plain.prompts(1, draw())[0].startswith("Question:")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    without = sums.make(config(folder))
    assert "jinja2 is missing" in without.note
    assert without.prompts(3, draw()) == plain.prompts(3, draw())


@pytest.mark.parametrize(
    "template,word",
    [
        ("{{ raise_exception('never') }}", "chat template cannot be used: never"),
        ("{% for %}", "chat template cannot be used"),
        ("{{ messages.append(1) }}", "chat template cannot be used"),
        ("{{ ''.__class__.__mro__ }}", "chat template cannot be used"),
        ("{{ 1 // 0 }}", "chat template cannot be used"),
        ("hello", "does not show the question"),
        (7, "is no text"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_clear_line(copy, template, word):
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ValueError, match=word) as error:
        sums.make(config(copy))
    assert "\n" not in str(error.value)


def test_templates_have_the_helpers_of_transformers():
    messages = [{"role": "user", "content": "<é>"}]
    text = "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}"
    assert sums.render(text, messages, {}) == '{"role": "user", "content": "<é>"}'
    assert (
        sums.render("{{ strftime_now is defined }}{{ x_token }}", [], {"x_token": "y"}) == "Falsey"
    )
    marked = "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}.{% endfor %}"
    assert sums.render(marked, messages * 2, {}) == "user.user."
    asked = "{{ add_generation_prompt }} {{ enable_thinking }}"
    assert sums.render(asked, [], {}) == "True False"


def test_a_tokenizer_that_loses_letters_is_one_clear_line(copy):
    path = copy / "tokenizer.json"
    words = Tokenizer.from_file(str(path))
    words.normalizer = normalizers.Lowercase()
    words.save(str(path))
    with pytest.raises(ValueError, match="cannot write") as error:
        sums.make(config(copy))
    assert "\n" not in str(error.value)


def test_a_template_whose_tokens_lie_behind_the_vocabulary_is_one_clear_line(copy):
    path = copy / "tokenizer.json"
    words = Tokenizer.from_file(str(path))
    words.add_special_tokens(["<|extra|>"])
    words.save(str(path))
    about = {"chat_template": "<|extra|>{{ messages[-1]['content'] }}<|extra|>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="the vocabulary of the model has only"):
        sums.make(config(copy))


# ---- steps, judging, proposing, chance -----------------------------------------------------------


def test_steps_are_the_lines_before_the_last(longer):
    for seed in range(5):
        prompt, response = longer.demo(draw(seed))
        ids = longer.encode([response])[0]
        steps = longer.steps(ids)
        lines = response.strip().split("\n")
        assert [text for text, _ in steps] == lines[:-1] and 1 <= len(steps) <= 2
        for (text, end), line in zip(steps, lines):
            assert "\n" in longer.tokenizer.decode([ids[end]])
            assert longer.uses(text, longer.decode(ids[end + 1 :]))
            assert longer.result(text) == line.split("= ")[1]
    assert longer.steps([longer.eos_id, *ids]) == []
    assert not longer.uses("40 + 2 = 42", "420 - 1 = 419<eos>")
    assert longer.uses("Let us see.", "7<eos>")


def test_which_lines_are_true(longer):
    lines = ["40 + 2 = 42", "40 + 2 = 43", "21 + 21 = 42", "42", "1 + 1 = 2", "42 - 1 = 41"]
    lines.append("40 + 3 = 42")
    right = [True, False, True, False, False, True, False]
    assert longer.step_ok("What is 40 + 2 - 1?", lines) == right


def test_scores_and_what_the_judge_reads(task, longer):
    assert longer.rubric("What is 40 + 2 - 1?", "40 + 2 = 43\n41<eos>") == 4
    assert longer.rubric("What is 40 + 2 - 1?", "40 + 2 = 42\n41<eos>") == 5
    assert longer.rubric("What is 40 + 2 - 1?", "40 + 2 = 42\n40<eos>") == 2
    assert longer.rubric("What is 40 + 2 - 1?", "40 + 2 = 42<eos> ") == 0
    for one in (task, longer):
        scores = set()
        for seed in range(12):
            read, judgement = one.judge_demo(draw(seed))
            scores.add(nr.parse_score(judgement))
            assert read.startswith("What is") and read.endswith(sums.JUDGE) and "<eos>" not in read
        assert len(scores) > 1 and 5 in scores and None not in scores
    prompt, response = task.demo(draw())
    ids = [task.pad_id, task.bos_id, *task.encode([prompt])[0]]
    shown = task.judge_prompt(ids, [*task.encode([response])[0], task.pad_id])
    question = task.question(prompt)
    body = response.removesuffix("<eos>")
    assert task.decode(shown) == f"{question}\nAnswer:\n{body}\n\nScore from 0 to 5:"
    assert shown == task.encode([task.decode(shown)])[0]


def test_proposals_are_problems_of_train(task):
    shown, new = task.propose_demo(draw())
    questions = [f"What is {x}?" for x in sums.QUESTION.findall(shown)]
    assert len(questions) == 3 and all(task.problem(x) for x in questions)
    assert task.problem(new) and new.strip().removesuffix("<eos>") not in questions


@pytest.mark.parametrize("least,most", [(1, 1), (1, 2), (2, 2)])
def test_chance_is_that_of_all_problems(folder, least, most):
    """All problems are drawn by hand, each with its probability."""
    task = sums.make(config(folder, largest=9, min_ops=least, max_ops=most))
    best = 0
    answers = {i: 1 / 9 for i in range(1, 10)}
    for length in range(1, most + 1):
        after = {}
        for value, share in answers.items():
            plus = [value + number for number in range(1, 10)]
            minus = [value - number for number in range(1, 10) if number <= value]
            for ways, weight in ((plus, 0.5 if minus else 1), (minus, 0.5)):
                for result in ways:
                    after[result] = after.get(result, 0) + share * weight / len(ways)
        answers = after
        if length >= least:
            best = max(best, *answers.values())
    assert task.chance() == pytest.approx(best, abs=1e-12)


# ---- the front door ------------------------------------------------------------------------------


def test_a_folder_at_the_rate_of_a_small_model_is_told_so(folder, tmp_path, capsys):
    argv = ["ppo", "--task", "sums", "--model", str(folder), "--max-ops", "1", "--shots", "1"]
    argv += ["--updates", "1", "--prompts", "3", "--response", "12", "--eval-problems", "4"]
    argv += ["--threads", "1", "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    notes = []
    for more in ([], ["--config", "sums"], ["--lr", "1e-5"]):
        assert front.main([*argv, *more, "--out", str(tmp_path / f"run-{len(notes)}")]) == 0
        notes.append("a folder wants --config sums or hf" in capsys.readouterr().out)
    assert notes == [True, False, False]


def test_every_loop_runs_unchanged_on_a_folder(folder, tmp_path, monkeypatch, capsys):
    """Nothing can be learned from random weights. This is the way from ids to saved folders."""
    shared = """--config sums --device cpu --threads 1 --prompts 3 --samples 4 --micro 6
        --minibatch 12 --updates 1 --eval-problems 3 --start-data 12 --start-updates 2 --demos 12
        --base-batch 4 --max-ops 2 --response 24 --shots 1 --workers 1""".split()
    shared += ["--model", str(folder), "--cache", str(tmp_path / "cache")]
    rounds = "--rounds 2 --judgements 3 --reward-data 6 --reward-updates 2".split()
    loops = [name for name in nr.METHODS if name != "refine"]
    assert front.main([*loops, *shared, *rounds, "--out", str(tmp_path / "run")]) == 0
    note = "prompts: the chat template of the folder; solved problems in front: 1\n"
    assert capsys.readouterr().out.count(note) == 1
    results = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    assert [r["loop"] for r in results] == loops
    check_transcripts(tmp_path / "run")
    check_conversation(tmp_path / "run", tmp_path / "cache", monkeypatch, capsys)
    # The student of refine needs some right responses to learn from.
    monkeypatch.setattr(sums.Sums, "grade", lambda self, prompt, response: float(len(response) % 2))
    refine = ["refine", *shared, "--continuations", "2", "--out", str(tmp_path / "some")]
    assert front.main(refine) == 0
    # Its scorers keep their adapters, and the policy that they stand beside is merged.
    assert front.main([*refine[:-1], str(tmp_path / "thin-refine"), "--lora", "2"]) == 0
    trained = front.open_trained(tmp_path / "thin-refine", "refine", None, 0.0)
    saved = nr.Transformer.load(tmp_path / "thin-refine" / "models" / "refine-0")
    assert not nr.adapters(trained.state.policy) and nr.adapters(trained.state.orm.trunk)
    for name, p in saved.named_parameters():
        assert torch.equal(p, trained.state.policy.state_dict()[name])

    # The same with adapters. The folder's weights stay, and what is saved can be talked to.
    out = tmp_path / "thin"
    thin = [name for name in loops if name != "denoise"]
    lora = ["--lora", "2", "--lr", "0.01", "--out", str(out)]
    assert front.main([*thin, *shared, *rounds, *lora]) == 0
    for name in thin:
        model = out / "models" / f"{name}-0"
        assert (model / "adapters" / "adapter_model.safetensors").exists()
        assert (model / "model.safetensors").exists()
    capsys.readouterr()
    problem = "What is 4 + 5?"
    talk = ["sample", str(out), "--loop", "ppo", "--prompt", problem]
    assert front.main([*talk, "--cache", str(tmp_path / "cache")]) == 0
    assert problem in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags,word",
    [
        (["--task", "sums"], "--model FOLDER"),
        (["--config", "sums", "--model", "nowhere"], "nowhere"),
        (["--largest", "8"], "--largest must lie in 9..9999"),
        (["--largest", "10000"], "--largest must lie in 9..9999"),
        (["--shots", "33"], "--shots must be at most 32"),
        (["--shots", "-1"], "--shots must be 0 or more"),
        (["--min-ops", "2", "--max-ops", "1"], "--min-ops must not be above --max-ops"),
        (["--max-ops", "11"], "--max-ops must be at most 10"),
        (["--response", "3"], "--response must be at least"),
        (["--data", "x"], "read only with --task gsm8k"),
        (["--lora", "-1"], "--lora must be 0 or more"),
        (["--config", "smoke", "--task", "arithmetic", "--lora", "4"], "--model FOLDER"),
        (["--answers", "4"], "read only with --task arithmetic"),
        (
            ["--config", "smoke", "--task", "arithmetic", "--largest", "50"],
            "read only with --task sums",
        ),
    ],
)
def test_a_mistake_is_one_line(folder, flags, word, capsys, tmp_path):
    if "--model" not in flags and "--task" not in flags:
        flags = ["--config", "sums", "--model", str(folder), *flags]
    flags = [*flags, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "x")]
    assert front.main(["ppo", *flags]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_zero_shot_prompt_shows_no_solved_problem(folder):
    c = front.make_config("ppo", "sums", shots=0)
    front.check_number("shots", c.shots)
    task = sums.make(config(folder, shots=0))
    assert task.examples == [] and task.prompts(1, draw())[0].count("What is") == 1


def test_denoise_takes_no_adapters(folder, tmp_path, capsys):
    argv = ["denoise", "--config", "sums", "--model", str(folder), "--lora", "4", "--out"]
    assert front.main([*argv, str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]) == 2
    assert "denoise trains all weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
