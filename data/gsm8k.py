"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems in English, for a model that can read.

    problem    four solved examples, then  Question: Ann has 3 boxes of 4 eggs. ...\\nAnswer:
    response    There are 3*4=12 eggs.\\nShe sells 2, so 12-2=10 are left.\\n#### 10<eos>

Rows are read from train.jsonl and test.jsonl of a folder; none is in this repository.

    python data/gsm8k.py FOLDER        downloads both (5 MB, MIT) and checks their SHA-256

A step is a line. The marks <<3*4=12>> of the original solutions are not shown to a model: their results say
which steps are true. No text is ever run: equations are parsed and computed in fractions.
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
SHOTS = 4  # solved examples before each question: a model sees the form, and how an answer ends
ASK, ANSWER = "Question: ", "\nAnswer:"
# a real vocabulary has no such ids, so the marks that the loops write are ordinary text
MARKS = {"<sep>": "\n\nRewritten:", "<bad>": " (wrong from here on)"}
JUDGE = "\n\nScore from 0 to 5:"
MARK = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
NUMBER = re.compile(r"[-+]?\s?[$€£]?\s?((?:[0-9][0-9,]*)?\.?[0-9]+)", re.ASCII)
FINAL = re.compile(r"####([^\n]*)")
EQUATION = re.compile(r"([-+*/x×÷().,$€£%\d\s]*\d[)%\s]*)=\s*([-+]?[$€£]?[\d.,]*\d)", re.ASCII)


def canonical(text: str) -> str | None:
    """The first number of a text as 1234, -5 or 0.5, without sign of money, commas or needless zeros."""
    match = NUMBER.search(text[:200])
    if not match:
        return None
    value = Decimal(match[1].replace(",", ""))
    plain = f"{value.copy_negate() if match[0].startswith('-') else value:f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain in ("-0", "") else plain.lstrip("+")


def calculate(text: str) -> Fraction:
    """+ - * / and parentheses, exact; x, × and ÷ too; % is a hundredth. ValueError on anything else."""
    text = re.sub(r"[\s,$€£]", "", text).replace("x", "*").replace("×", "*").replace("÷", "/")
    tokens = re.findall(r"\d+\.?\d*|\.\d+|.", text)

    def value() -> Fraction:
        token = tokens.pop(0) if tokens else ""
        if token in ("-", "+"):
            return -value() if token == "-" else value()
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
            if tokens.pop(0) == "*":
                found *= value()
            elif (by := value()) != 0:
                found /= by
            else:
                raise ValueError(f"a division by zero in {text!r:.60}")
        return found

    def total() -> Fraction:
        found = product()
        while tokens and tokens[0] in "+-":
            found = found + product() if tokens.pop(0) == "+" else found - product()
        return found

    found = total()
    if tokens:
        raise ValueError(f"{tokens[0]!r} is left over in {text!r:.60}")
    return found


def holds(left: str, right: str) -> bool:
    """Whether an equation is true, to the last digit that is written."""
    try:
        shown = right.replace(",", "").strip("$€£+ ")
        digits = len(shown.partition(".")[2])
        return abs(calculate(left) - calculate(right)) <= Fraction(1, 2 * 10**digits) * (digits > 0)
    except (ValueError, RecursionError):
        return False


def read(path: Path) -> list[tuple[str, str]]:
    """(question, solution) of a .jsonl file. ValueError, in one line, on a file that is missing or damaged."""
    try:
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):  # noqa: B007
            row = json.loads(line)
            rows.append(
                (" ".join(row["question"].replace("<eos>", "").split()), row["answer"].strip())
            )
            if (
                canonical(row["answer"].rpartition("####")[2]) is None
                or "####" not in row["answer"]
            ):
                raise ValueError("no number behind ####")
        return rows
    except OSError:
        raise ValueError(
            f"{path} is not there; python data/gsm8k.py {path.parent} downloads it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}, line {number}: not a row of GSM8K ({error!r:.60}); download it again"
        ) from None


@dataclass
class GSM8K:
    """The task: problems of `folder`, written with the tokenizer of a model's folder and its special ids."""

    folder: Path
    tokenizer_file: Path
    pad: int
    bos: int
    eos: int
    gold: dict[str, str] = field(init=False, repr=False)  # question -> solution, with its marks

    def __post_init__(self) -> None:
        train, test = (read(Path(self.folder) / name) for name in SHA256)
        self.tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        self.gold = dict(train) | dict(test)
        self.tests = set(dict(test))
        short = sorted((x for x, y in train if y.count("\n") <= 3), key=bucket)[:SHOTS]
        self.shown = "".join(f"{ASK}{x}{ANSWER}{written(self.gold[x])}\n\n" for x in short)
        self.by_split: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        for x in self.gold:
            if x not in short:
                self.by_split[self.split(x)].append(x)

    # ---- text and tokens -----------------------------------------------------------------------

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Texts to ids, without BOS; `<eos>` is the model's end, the other marks are words."""
        found = []
        for text in texts:
            for mark, words in MARKS.items():
                text = text.replace(mark, words)
            parts = [
                self.tokenizer.encode(part, add_special_tokens=False).ids
                for part in text.split("<eos>")
            ]
            found.append([i for k, part in enumerate(parts) for i in ([self.eos] * (k > 0) + part)])
        return found

    def decode(self, ids: list[int]) -> str:
        """Ids to text without PAD and BOS; nothing behind the first <eos>. What begins with BOS is a problem: its
        examples end too, so all of it stays."""
        ids = [i for i in ids if i != self.pad]
        asked = len(ids) > 1 and ids[0] == self.bos
        parts: list[list[int]] = [[]]
        for i in ids[asked:]:
            if i == self.eos:
                parts.append([])
            elif asked or len(parts) == 1:
                parts[-1].append(i)
        texts = [self.tokenizer.decode(part, skip_special_tokens=False) for part in parts]
        return "<eos>".join(texts if asked else texts[:2])

    # ---- problems and demonstrations -----------------------------------------------------------

    def split(self, prompt: str) -> str:
        """test: the file's; of the rest a tenth is dev, by a hash of the question."""
        question = self.question(prompt)
        return (
            "test" if question in self.tests else "dev" if bucket(question) < "1" * 8 else "train"
        )

    def question(self, prompt: str) -> str:
        """The question that is asked last. ValueError if it is none of GSM8K."""
        last = prompt.rpartition(ASK)[2].removesuffix(ANSWER).strip()
        if last not in self.gold:
            raise ValueError(f"not a question of GSM8K, so its answer is not known: {last!r:.60}")
        return last

    def prompts(self, n: int, generator: torch.Generator, split: str = "train") -> list[str]:
        """n problems of that split, all different as long as there are so many."""
        pool, draw = self.by_split[split], draws(generator)
        chosen = draw.sample(pool, n) if n <= len(pool) else draw.choices(pool, k=n)
        return [f"{self.shown}{ASK}{x}{ANSWER}" for x in chosen]

    def problem(self, text: str) -> str | None:
        """A proposal that may be trained on: a training question, as only then its answer is known."""
        question = " ".join(text.removesuffix("<eos>").removeprefix(ASK).split())
        known = question in self.gold and self.split(question) == "train"
        return f"{self.shown}{ASK}{question}{ANSWER}" if known else None

    def demo(self, generator: torch.Generator) -> tuple[str, str]:
        """A problem and its solution, without the marks."""
        prompt = self.prompts(1, generator)[0]
        return prompt, written(self.gold[self.question(prompt)])

    # ---- grading: outcome, steps, truth --------------------------------------------------------

    def answer(self, response: str) -> str | None:
        """The number behind ####, canonical; None without <eos>, or if two different ones are given."""
        if not response.endswith("<eos>"):
            return None
        lines = [line.replace("<eos>", "") for line in FINAL.findall(response)]
        found = {canonical(match[0]) for line in lines for match in NUMBER.finditer(line[:200])}
        return found.pop() if len(found) == 1 else None

    def grade(self, prompt: str, response: str) -> float:
        """1.0 if the response ends and gives the one right answer, else 0.0."""
        return float(self.answer(response) == self.truth(prompt))

    def truth(self, prompt: str) -> str:
        """The right answer, canonical."""
        return canonical(self.gold[self.question(prompt)].rpartition("####")[2])

    def steps(self, response: list[int]) -> list[tuple[str, int]]:
        """The lines before the answer, of a response given as ids: (text, position of the token with its end)."""
        found, begin = [], 0
        for end, i in enumerate(response):
            if i == self.eos:
                break
            if "\n" in self.tokenizer.decode([i], skip_special_tokens=False):
                text = self.decode(response[begin : end + 1]).strip()
                if text and "####" not in text:
                    found.append((text, end))
                begin = end + 1
        return found

    def result(self, step: str) -> str | None:
        """The last number of a line, canonical."""
        numbers = [match[0] for match in NUMBER.finditer(step[:2000])]
        return canonical(numbers[-1]) if numbers else None

    def step_ok(self, prompt: str, steps: list[str]) -> list[bool]:
        """Which lines hold: every equation is true and one of its numbers is a result of the solution's marks.
        It cannot see a wrong reason for a right number. Ground truth: to measure, never to train."""
        gold = self.gold[self.question(prompt)]
        known = {canonical(result) for _, result in MARK.findall(gold)} | {self.truth(prompt)}
        said = lambda step: {canonical(m[0]) for m in NUMBER.finditer(step[:2000])}  # noqa: E731
        true = lambda step: all(holds(*pair) for pair in EQUATION.findall(step[:2000]))  # noqa: E731
        return [true(step) and bool(said(step) & known) for step in steps]

    def chance(self) -> float:
        """Accuracy of the best constant answer on test problems."""
        answers = Counter(self.truth(x) for x in self.by_split["test"])
        return max(answers.values()) / sum(answers.values())

    # ---- preferences, judging, proposing: the text that other loops learn from ------------------

    def spoiled(self, response: str, draw: random.Random) -> str:
        """A solution whose last result, and so its answer, is another number."""
        right = self.answer(response)
        wrong = str(Decimal(right) + draw.choice([-10, -2, -1, 1, 2, 10]))
        body, _, _ = response.rpartition("####")
        lines = body.rstrip("\n").split("\n")
        lines[-1] = re.sub(rf"(?<![\d.,]){re.escape(right)}(?![\d,]|\.\d)", wrong, lines[-1])
        return "\n".join(lines) + f"\n#### {wrong}<eos>"

    def preferences(self, n: int, generator: torch.Generator) -> list[tuple[str, str, str]]:
        """n of (prompt, solution, the solution spoiled)."""
        demos = [self.demo(generator) for _ in range(n)]
        return [(x, y, self.spoiled(y, draws(generator))) for x, y in demos]

    def rubric(self, prompt: str, response: str) -> int:
        """0..5: a point for an end, one for a single answer, two for its being right, one if all lines hold."""
        steps = [line for line in response.split("\n") if line.strip() and "####" not in line]
        whole = bool(steps) and all(self.step_ok(prompt, steps))
        answered = self.answer(response) is not None
        return response.endswith("<eos>") + answered + 2 * int(self.grade(prompt, response)) + whole

    def judge_prompt(self, prompt: list[int], response: list[int]) -> list[int]:
        """What the judge reads, ids in and ids out: problem, response, the question for a score."""
        special = (self.pad, self.bos, self.eos)
        keep = lambda ids: [i for i in ids if i not in special]  # noqa: E731
        return keep(prompt) + keep(response) + self.encode([JUDGE])[0]

    def judge_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """A response, whole, spoiled or cut, and its score by `rubric`: what the judge reads, writes."""
        (prompt, response), draw = self.demo(generator), draws(generator)
        kind = draw.randrange(3)
        response = self.spoiled(response, draw) if kind == 1 else response
        response = response.partition("\n####")[0] if kind == 2 else response
        score = self.rubric(prompt, response)
        return prompt.replace("<eos>", "") + response.removesuffix(
            "<eos>"
        ) + JUDGE, f" {score}<eos>"

    def propose_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """Three questions, and a fourth as the response."""
        pool, draw = self.by_split["train"], draws(generator)
        *shown, new = draw.sample(pool, 4)
        return "".join(f"{ASK}{x}\n\n" for x in shown) + ASK.rstrip(), f" {new}<eos>"


def draws(generator: torch.Generator) -> random.Random:
    """Python's generator, seeded by the caller's."""
    return random.Random(int(torch.randint(2**62, (), generator=generator)))


def bucket(question: str) -> str:
    """A function of the question alone: digits, evenly spread."""
    return f"{int(hashlib.sha256(question.encode()).hexdigest(), 16) % 10**8:08d}"


def written(solution: str) -> str:
    """A solution as a model should write it: no marks, then the end."""
    return " " + MARK.sub("", solution) + "<eos>"


def make(c, careful: bool = False) -> GSM8K:
    """The task as a `nanoreward.Config` asks for it."""
    return GSM8K(Path(c.data), Path(c.model) / "tokenizer.json", c.pad, c.bos, c.eos)


def rules(c) -> list[tuple[bool, str]]:
    """What a `nanoreward.Config` must keep to, and what to say if it does not."""
    here = all((Path(c.data) / name).exists() for name in SHA256)
    words = Path(c.model) / "tokenizer.json"
    return [
        (bool(c.model), "--task gsm8k needs a model that can read: --model FOLDER"),
        (
            words.exists(),
            f"{words} is not there: --task gsm8k writes with the tokenizer of --model",
        ),
        (
            here,
            f"{c.data} holds no train.jsonl and test.jsonl: python data/gsm8k.py {c.data} downloads them",
        ),
    ]


def download(folder: Path, source: str = SOURCE) -> None:
    """Both files, each under its name only when its SHA-256 is right. Raises ValueError on another one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, wanted in SHA256.items():
        with urllib.request.urlopen(source + name) as answer:
            content = answer.read()
        if (found := hashlib.sha256(content).hexdigest()) != wanted:
            raise ValueError(
                f"{source}{name} has SHA-256 {found[:16]}..., not {wanted[:16]}...: nothing was written"
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
