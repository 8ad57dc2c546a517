"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems in English, for a model that can read.

    problem    four solved examples, then  Question: Ann has 3 boxes of 4 eggs. ...\\nAnswer:
    response    There are 3*4=12 eggs.\\nShe sells 2, so 12-2=10 are left.\\n#### 10<eos>

The rows are read from train.jsonl and test.jsonl of a folder. None of them is in this repository.

    python data/gsm8k.py FOLDER        downloads both (5 MB, MIT) and checks their SHA-256

The task supports every method. It needs the folder of a model with a real vocabulary (`--model`).

A step is a line of a response. The original solutions hold marks such as <<3*4=12>>. They are not
shown to a model, but their results say which steps are true. No text is ever run as code: equations
are parsed and computed in fractions.
"""

import hashlib
import json
import os
import random
import re
import sys
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import torch
from tokenizers import Tokenizer

SOURCE = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}

# Each question comes behind so many solved examples. They show a model the form of a response, and
# how an answer ends.
SHOTS = 4
ASK = "Question: "
ANSWER = "\nAnswer:"
JUDGE = "\n\nScore from 0 to 5:"
# A real vocabulary has no ids for these marks of the loops, so they become ordinary text.
MARKS = {"<sep>": "\n\nRewritten:", "<bad>": " (wrong from here on)"}

# A mark of the original solutions, a number, what stands behind ####, and an equation in a text.
MARK = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
NUMBER = re.compile(r"[-+]?\s?[$€£]?\s?((?:[0-9][0-9,]*)?\.?[0-9]+)", re.ASCII)
FINAL = re.compile(r"####([^\n]*)")
EQUATION = re.compile(r"([-+*/x×÷().,$€£%\d\s]*\d[)%\s]*)=\s*([-+]?[$€£]?[\d.,]*\d)", re.ASCII)
# No more than so many characters of a line are searched for numbers and equations.
LONGEST = 2000


# ---- numbers and equations -----------------------------------------------------------------------


def canonical(text: str) -> str | None:
    """The first number of a text in its one spelling, such as 1234, -5 or 0.5; None without one.

    It has no currency sign, no commas and no needless zeros.
    """
    match = NUMBER.search(text[:200])
    if not match:
        return None
    value = Decimal(match[1].replace(",", ""))
    if match[0].startswith("-"):
        value = value.copy_negate()
    plain = f"{value:f}"
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain in ("-0", "") else plain.lstrip("+")


def numbers_of(text: str) -> list[str]:
    """All numbers of a text, each in its one spelling."""
    return [canonical(match[0]) for match in NUMBER.finditer(text)]


def calculate(text: str) -> Fraction:
    """The exact value of a sum with + - * / and parentheses.

    x, × and ÷ are understood too, and % is a hundredth. Anything else raises a ValueError. There is
    one inner function for each level of the grammar: a total is made of products, a product of
    values, and a value may be a total in parentheses.
    """
    text = re.sub(r"[\s,$€£]", "", text).replace("x", "*").replace("×", "*").replace("÷", "/")
    tokens = re.findall(r"\d+\.?\d*|\.\d+|.", text)

    def value() -> Fraction:
        token = tokens.pop(0) if tokens else ""
        if token == "-":
            return -value()
        if token == "+":
            return value()
        if token == "(":
            inner = total()
            if not tokens or tokens.pop(0) != ")":
                raise ValueError(f"no closing parenthesis in {text!r:.60}")
        elif token[:1].isdigit() or token[:1] == ".":
            inner = Fraction(token)
        else:
            raise ValueError(f"no number in {text!r:.60} at {token!r}")
        while tokens and tokens[0] == "%":
            tokens.pop(0)
            inner /= 100
        return inner

    def product() -> Fraction:
        found = value()
        while tokens and tokens[0] in "*/":
            op = tokens.pop(0)
            other = value()
            if op == "*":
                found *= other
            elif other != 0:
                found /= other
            else:
                raise ValueError(f"a division by zero in {text!r:.60}")
        return found

    def total() -> Fraction:
        found = product()
        while tokens and tokens[0] in "+-":
            op = tokens.pop(0)
            other = product()
            found = found + other if op == "+" else found - other
        return found

    found = total()
    if tokens:
        raise ValueError(f"{tokens[0]!r} is left over in {text!r:.60}")
    return found


def holds(left: str, right: str) -> bool:
    """Whether an equation is true, to the last digit that is written."""
    try:
        difference = abs(calculate(left) - calculate(right))
    except (ValueError, RecursionError):
        return False
    # A number with digits behind the point may be rounded; a whole number has to be exact.
    digits = len(right.replace(",", "").strip("$€£+ ").partition(".")[2])
    return difference <= (Fraction(1, 2 * 10**digits) if digits > 0 else 0)


# ---- the files -----------------------------------------------------------------------------------


def read(path: Path) -> list[tuple[str, str]]:
    """The (question, solution) rows of a .jsonl file.

    A file that is missing or damaged raises a ValueError with a message of one line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ValueError(
            f"{path} is not there; python data/gsm8k.py {path.parent} downloads it"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(read_row(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a row of GSM8K ({error!r:.60}); download it again"
            ) from None
    return rows


def read_row(line: str) -> tuple[str, str]:
    """The question and the solution of one line. A solution without an answer is an error."""
    row = json.loads(line)
    question = " ".join(row["question"].replace("<eos>", "").split())
    solution = row["answer"].strip()
    _, mark, answer = row["answer"].rpartition("####")
    if not mark or canonical(answer) is None:
        raise ValueError("no number behind ####")
    return question, solution


def bucket(question: str) -> str:
    """Eight digits that depend on the question alone and are evenly spread."""
    return f"{int(hashlib.sha256(question.encode()).hexdigest(), 16) % 10**8:08d}"


def written(solution: str) -> str:
    """A solution as a model should write it: without marks, and with an end."""
    return " " + MARK.sub("", solution) + "<eos>"


def draws(generator: torch.Generator) -> random.Random:
    """Python's own generator, seeded by the caller's, because tensors of one number are slow."""
    return random.Random(int(torch.randint(2**62, (), generator=generator)))


# ---- the task ------------------------------------------------------------------------------------


@dataclass
class GSM8K:
    """The task: the problems of `folder`, written with the tokenizer and the ids of a model."""

    folder: Path
    tokenizer_file: Path
    pad_id: int
    bos_id: int
    eos_id: int
    # From each question to its solution, which still has its marks.
    gold: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        train, test = (read(Path(self.folder) / name) for name in SHA256)
        self.tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        self.gold = dict(train) | dict(test)
        self.tests = set(dict(test))

        # The solved examples have short solutions. They are never asked.
        short = [question for question, solution in train if solution.count("\n") <= 3]
        examples = sorted(short, key=bucket)[:SHOTS]
        self.shown = ""
        for question in examples:
            self.shown += f"{ASK}{question}{ANSWER}{written(self.gold[question])}\n\n"

        self.by_split: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        for question in self.gold:
            if question not in examples:
                self.by_split[self.split(question)].append(question)

    # ---- text and tokens ------------------------------------------------------------------------

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Turn texts into ids, without BOS.

        `<eos>` becomes the end token of the model, and the other marks become words.
        """
        found = []
        for text in texts:
            for mark, words in MARKS.items():
                text = text.replace(mark, words)
            ids: list[int] = []
            for k, part in enumerate(text.split("<eos>")):
                if k > 0:
                    ids.append(self.eos_id)
                ids += self.tokenizer.encode(part, add_special_tokens=False).ids
            found.append(ids)
        return found

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text, without PAD and BOS.

        A response ends at its first <eos>. What begins with BOS is a problem. Its examples end with
        <eos> too, so all of it stays.
        """
        ids = [i for i in ids if i != self.pad_id]
        # In some models BOS is EOS. An empty response is then this one token, and no problem.
        is_problem = len(ids) > 1 and ids[0] == self.bos_id
        if is_problem:
            ids = ids[1:]
        parts: list[list[int]] = [[]]
        for i in ids:
            if i == self.eos_id:
                parts.append([])
            elif is_problem or len(parts) == 1:
                parts[-1].append(i)
        texts = [self.tokenizer.decode(part, skip_special_tokens=False) for part in parts]
        return "<eos>".join(texts if is_problem else texts[:2])

    # ---- problems and demonstrations ------------------------------------------------------------

    def split(self, prompt: str) -> str:
        """The split of a problem: test is what test.jsonl holds, and a tenth of the rest is dev."""
        question = self.question(prompt)
        if question in self.tests:
            return "test"
        return "dev" if bucket(question) < "1" * 8 else "train"

    def question(self, prompt: str) -> str:
        """The question that is asked last. One that is not of GSM8K raises a ValueError."""
        last = prompt.rpartition(ASK)[2].removesuffix(ANSWER).strip()
        if last not in self.gold:
            raise ValueError(f"not a question of GSM8K, so its answer is not known: {last!r:.60}")
        return last

    def prompts(self, n: int, generator: torch.Generator, split: str = "train") -> list[str]:
        """Draw n problems of a split, all of them different as long as there are so many."""
        pool = self.by_split[split]
        draw = draws(generator)
        chosen = draw.sample(pool, n) if n <= len(pool) else draw.choices(pool, k=n)
        return [f"{self.shown}{ASK}{question}{ANSWER}" for question in chosen]

    def problem(self, text: str) -> str | None:
        """The problem that a text holds, or None if it must not be trained on.

        It must be a question of the split train, because the answer is known only then.
        """
        question = " ".join(text.removesuffix("<eos>").removeprefix(ASK).split())
        if question not in self.gold or self.split(question) != "train":
            return None
        return f"{self.shown}{ASK}{question}{ANSWER}"

    def demo(self, generator: torch.Generator) -> tuple[str, str]:
        """A problem and its solution, without the marks."""
        prompt = self.prompts(1, generator)[0]
        return prompt, written(self.gold[self.question(prompt)])

    # ---- grading: outcome, steps, truth ---------------------------------------------------------

    def answer(self, response: str) -> str | None:
        """The number behind ####, in its one spelling.

        It is None without an <eos> at the end, or if two different numbers are given.
        """
        if not response.endswith("<eos>"):
            return None
        found = set()
        for line in FINAL.findall(response):
            found |= set(numbers_of(line.replace("<eos>", "")[:200]))
        return found.pop() if len(found) == 1 else None

    def grade(self, prompt: str, response: str) -> float:
        """1.0 if the response ends and gives the one right answer, else 0.0."""
        return float(self.answer(response) == self.truth(prompt))

    def truth(self, prompt: str) -> str:
        """The right answer, in its one spelling."""
        return canonical(self.gold[self.question(prompt)].rpartition("####")[2])

    def steps(self, response: list[int]) -> list[tuple[str, int]]:
        """The lines before the answer of a response given as ids.

        Each one comes as its text and the place of the token that ends the line.
        """
        found = []
        begin = 0
        for end, i in enumerate(response):
            if i == self.eos_id:
                break
            if "\n" in self.tokenizer.decode([i], skip_special_tokens=False):
                text = self.decode(response[begin : end + 1]).strip()
                if text and "####" not in text:
                    found.append((text, end))
                begin = end + 1
        return found

    def result(self, step: str) -> str | None:
        """The last number of a line, in its one spelling, or None if it holds none."""
        numbers = numbers_of(step[:LONGEST])
        return numbers[-1] if numbers else None

    def step_ok(self, prompt: str, steps: list[str]) -> list[bool]:
        """Which lines are right.

        In such a line every equation is true, and one of its numbers is a result in the marks of
        the original solution. A wrong reason for a right number is not seen. This is ground truth.
        It is there to measure, and nothing may be trained on it.
        """
        marks = MARK.findall(self.gold[self.question(prompt)])
        known = {canonical(result) for _, result in marks} | {self.truth(prompt)}
        found = []
        for step in steps:
            step = step[:LONGEST]
            true = all(holds(left, right) for left, right in EQUATION.findall(step))
            found.append(true and not known.isdisjoint(numbers_of(step)))
        return found

    def chance(self) -> float:
        """The accuracy of the best constant answer on the test problems."""
        answers = Counter(self.truth(question) for question in self.by_split["test"])
        return max(answers.values()) / sum(answers.values())

    # ---- preferences, judging, proposing: the text that other methods learn from ----------------

    def spoiled(self, response: str, draw: random.Random) -> str:
        """A solution whose last result, and so its answer, is another number."""
        right = self.answer(response)
        wrong = str(Decimal(right) + draw.choice([-10, -2, -1, 1, 2, 10]))
        body, _, _ = response.rpartition("####")
        lines = body.rstrip("\n").split("\n")
        lines[-1] = re.sub(rf"(?<![\d.,]){re.escape(right)}(?![\d,]|\.\d)", wrong, lines[-1])
        return "\n".join(lines) + f"\n#### {wrong}<eos>"

    def preferences(self, n: int, generator: torch.Generator) -> list[tuple[str, str, str]]:
        """Draw n of (problem, preferred, other): a solution, and the same one spoiled."""
        demos = [self.demo(generator) for _ in range(n)]
        return [(x, y, self.spoiled(y, draws(generator))) for x, y in demos]

    def rubric(self, prompt: str, response: str) -> int:
        """The score of a response, 0 to 5.

        It earns one point for an end, one for a single answer, two if that answer is right, and one
        if there are lines before it and all of them are right.
        """
        steps = [line for line in response.split("\n") if line.strip() and "####" not in line]
        ended = response.endswith("<eos>")
        answered = self.answer(response) is not None
        right = self.grade(prompt, response) == 1
        all_right = bool(steps) and all(self.step_ok(prompt, steps))
        return ended + answered + 2 * right + all_right

    def judge_prompt(self, prompt: list[int], response: list[int]) -> list[int]:
        """What the judge reads, ids in and ids out: problem, response, the question for a score."""
        special = (self.pad_id, self.bos_id, self.eos_id)
        shown = [i for i in [*prompt, *response] if i not in special]
        return shown + self.encode([JUDGE])[0]

    def judge_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """What a judge reads and the score that it should write.

        The response is a whole solution, a spoiled one, or one that was cut before its answer.
        """
        prompt, response = self.demo(generator)
        draw = draws(generator)
        kind = draw.randrange(3)
        if kind == 1:
            response = self.spoiled(response, draw)
        elif kind == 2:
            response, _, _ = response.partition("\n####")
        score = self.rubric(prompt, response)
        asked = prompt.replace("<eos>", "") + response.removesuffix("<eos>") + JUDGE
        return asked, f" {score}<eos>"

    def propose_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """Three questions, and a fourth one as the response."""
        *shown, new = draws(generator).sample(self.by_split["train"], 4)
        asked = "".join(f"{ASK}{question}\n\n" for question in shown)
        return asked + ASK.rstrip(), f" {new}<eos>"


def make(c, careful: bool = False) -> GSM8K:
    """The task as a `nanoreward.Config` asks for it. Its demonstrator makes no errors anyway."""
    return GSM8K(Path(c.data), Path(c.model) / "tokenizer.json", c.pad_id, c.bos_id, c.eos_id)


def rules(c) -> list[tuple[bool, str]]:
    """What a `nanoreward.Config` must keep to, and what to say if it does not."""
    both_there = all((Path(c.data) / name).exists() for name in SHA256)
    words = Path(c.model) / "tokenizer.json"
    return [
        (bool(c.model), "--task gsm8k needs a model that can read: --model FOLDER"),
        (
            words.exists(),
            f"{words} is not there: --task gsm8k writes with the tokenizer of --model",
        ),
        (
            both_there,
            f"{c.data} holds no train.jsonl and test.jsonl: python data/gsm8k.py {c.data} "
            "downloads them",
        ),
    ]


# ---- the download --------------------------------------------------------------------------------


def download(folder: Path, source: str = SOURCE) -> None:
    """Download both files. One whose SHA-256 is not right raises a ValueError and is not kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, wanted in SHA256.items():
        with urllib.request.urlopen(source + name) as answer:
            content = answer.read()
        found = hashlib.sha256(content).hexdigest()
        if found != wanted:
            raise ValueError(
                f"{source}{name} has SHA-256 {found[:16]}..., not {wanted[:16]}...: "
                "nothing was written"
            )
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        temporary.write_bytes(content)
        temporary.replace(folder / name)


if __name__ == "__main__":
    try:
        download(Path(sys.argv[1]))
    except IndexError:
        sys.exit("error: python data/gsm8k.py FOLDER")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
