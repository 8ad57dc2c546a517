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
import unicodedata
import urllib.request
from collections import Counter
from dataclasses import dataclass, field, fields
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

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

# A mark of the original solutions.
MARK = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
# No sum and no line of an answer is longer, and no parentheses are nested deeper.
LONGEST = 2000
DEEPEST = 50


# ---- numbers and equations -----------------------------------------------------------------------

# Hyphens, dashes and minus signs of all kinds are a minus, and the signs of school are operators.
DASHES = "\u02d7\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u207b\u2212\u2796\ufe58\ufe63\uff0d"
PLAIN = str.maketrans(dict.fromkeys(DASHES, "-") | {"×": "*", "÷": "/"})

# A comma stands in front of exactly three digits. What stands beside a whole number must not belong
# to it, so 3,4 and 1.2.3 are no numbers.
DIGITS = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
WHOLE = rf"(?<![0-9.])(?<![0-9],)(?:{DIGITS})(?![0-9]|[.,][0-9])"
# A minus belongs to the number behind it, unless it stands right behind a number or a word. With a
# space behind it, it must not follow them at all: 12 - 5 holds 12 and 5.
SIGN = r"(?:(?<![\w)%.])(?:-|(?<![\w)%.] )- ))?"
NUMBER = re.compile(rf"{SIGN}[$€£]?{SIGN}({WHOLE})")
TOKEN = re.compile(rf"{WHOLE}|.", re.DOTALL)
# What the left side of an equation is made of, and the right side of one.
SUM = "-+*/x().,$€£% 0123456789"
RIGHT = re.compile(rf" ?\+?{NUMBER.pattern}")


def canonical(text: str) -> str | None:
    """The first number of a text in its one spelling, such as 1234, -5 or 0.5; None without one.

    It has no currency sign, no commas and no needless zeros.
    """
    match = NUMBER.search(text.translate(PLAIN))
    if not match:
        return None
    plain = f"{Decimal(match[1].replace(',', '')):f}"
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return f"-{plain}" if "-" in match[0] and plain != "0" else plain


def numbers_of(text: str) -> list[str]:
    """All numbers of a text, each in its one spelling."""
    return [canonical(match[0]) for match in NUMBER.finditer(text.translate(PLAIN))]


def spell(value: Fraction) -> str:
    """The one spelling of a value. A ValueError if its digits never end, as those of 1/3."""
    # If 2 and 5 alone divide the denominator, so many digits behind the point are enough.
    digits = value.denominator.bit_length()
    shifted = value * 10**digits
    if shifted.denominator > 1:
        raise ValueError("the digits never end")
    return canonical(f"{Decimal(f'{shifted.numerator}e-{digits}'):f}")


def calculate(text: str) -> Fraction:
    """The exact value of a sum with + - * / and parentheses.

    x, × and ÷ are understood too, and % is a hundredth. Anything else raises a ValueError, and so
    does a sum that is too long. There is one inner function for each level of the grammar: a total
    is made of products, a product of values, and a value may be a total in parentheses.
    """
    if len(text) > LONGEST:
        raise ValueError(f"more than {LONGEST} characters in {text!r:.60}")
    tokens = TOKEN.findall(text.translate(PLAIN).replace("x", "*"))
    # The next token is the last of this list. The end is an empty one.
    tokens = ["", *(token for token in reversed(tokens) if not re.match(r"[\s$€£]", token))]

    def value(depth: int) -> Fraction:
        sign = 1
        while tokens[-1] in ("-", "+"):
            if tokens.pop() == "-":
                sign = -sign
        if tokens[-1] == "(":
            tokens.pop()
            inner = total(depth + 1)
            if tokens[-1] != ")":
                raise ValueError(f"no closing parenthesis in {text!r:.60}")
            tokens.pop()
        elif re.fullmatch(DIGITS, tokens[-1]):
            inner = Fraction(tokens.pop().replace(",", ""))
        else:
            raise ValueError(f"no number in {text!r:.60} at {tokens[-1]!r}")
        while tokens[-1] == "%":
            tokens.pop()
            inner /= 100
        return sign * inner

    def product(depth: int) -> Fraction:
        found = value(depth)
        while tokens[-1] in ("*", "/"):
            op = tokens.pop()
            other = value(depth)
            if op == "*":
                found *= other
            elif other != 0:
                found /= other
            else:
                raise ValueError(f"a division by zero in {text!r:.60}")
        return found

    def total(depth: int) -> Fraction:
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} nested parentheses in {text!r:.60}")
        found = product(depth)
        while tokens[-1] in ("+", "-"):
            op = tokens.pop()
            other = product(depth)
            found = found + other if op == "+" else found - other
        return found

    found = total(0)
    if tokens != [""]:
        raise ValueError(f"{tokens[-1]!r} is left over in {text!r:.60}")
    return found


def equations(line: str) -> list[tuple[str, str]]:
    """The equations of a line: the sum on the left and the number on the right of each `=`."""
    found = []
    sides = " ".join(line.translate(PLAIN).split()).split("=")
    for before, after in pairwise(sides):
        left = before[len(before.rstrip(SUM)) :]
        # The sum begins behind the last comma or full stop. The x of `box 3+4` is no operator.
        left = re.split(r"[.,] ", left)[-1]
        left = re.sub(r"^(?:[*/x),% ]|\.(?![0-9]))+", "", left)
        right = RIGHT.match(after)
        if right and re.search(r"[0-9][)% ]*$", left):
            found.append((left, right[0]))
    return found


def holds(left: str, right: str) -> bool:
    """Whether an equation is true, to the last digit that is written."""
    try:
        difference = abs(calculate(left) - calculate(right))
    except ValueError:
        return False
    # A number with digits behind the point may be rounded; a whole number has to be exact.
    digits = len(right.replace(",", "").strip("$€£+ ").partition(".")[2])
    return difference <= (Fraction(1, 2 * 10**digits) if digits > 0 else 0)


# ---- what stands behind #### ---------------------------------------------------------------------

# A line such as `Step 1: add`, `Day 3: sell` or `2. Add` says what comes. Its number is no answer.
HEADING = re.compile(
    r"[\s*_]*(?:step|part|case|section|stage|phase)[\s#]*[0-9]"
    r"|[^0-9]*[0-9]+[\s*_]*[:：]"
    r"|[\s*_]*\(?[1-9][.)]\s+[^\W\d_]",
    re.I,
)
# Here the answer follows in the next line, as behind a #### that stands alone.
ANSWER_FOLLOWS = re.compile(r"answer\W*$", re.I)
# Words that change the value of a number, and those that do so right behind one.
DOUBT = re.compile(
    r"\b(?:not|cannot|minus|negative|plus|half|twice|double|triple|squared|cubed|factorial|root"
    r"|dozens?|hundreds?|thousands?|millions?|billions?|trillions?|lakhs?|crores?)\b"
    r"|n['’]t\b|\bthan\W*[0-9]|!="
    r"|[0-9][\s*_]*\b(?:[kmbx]|[mbt]n|mil|score|gross|point|quarters?|thirds?|fourths|fifths|tenths"
    r"|hundredths|thousandths|and\s+(?:an?|one|two|three))\b",
    re.I,
)
UNITS = set("kg g mg lb lbs oz km cm mm ft in mph kph hr hrs h min mins sec ml cl l".split())

# Something in bold or italics. The power 2**3 is not.
EMPHASIS = re.compile(r"(?<![\w)*])(\*{1,3})(?=\S)([^*]+)(?<=\S)\1(?![\w(*])")
# The pieces of a line. Here a space may separate thousands, too, and 1e3 is a number. Signs of
# currency and of typesetting mean nothing.
PIECE = re.compile(
    r"""
      (?P<number>
        (?:
          (?:[1-9][0-9]{0,2}(?P<gap>[,\ \u00a0\u2007\u2009\u202f])[0-9]{3}(?:(?P=gap)[0-9]{3})*
            |[0-9]+)
          (?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,2})?
          |\.[0-9]+
        )
        (?![0-9]|[.,][0-9]|\.\.|…)
      )
    | (?P<word>[^\W\d_]+)
    | (?P<equals>=+>?|-+>|[→⇒∴])
    | (?P<nothing>
        \\(?:boxed|fbox|text|textbf|mathbf|mathrm)\b|\\[()\[\]$%,;\ ]
        |</?\|?[A-Za-z_]+\|?>
        |[{}\[\]_`$€£¥₹¢]
      )
    | (?P<operator>[-+*/()])
    | (?P<space>\s+)
    | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)

# The outline of a line that gives one number: words, the number or a sum, words, and perhaps the
# same once more in parentheses.
TERM = r"(?:\(+ ?-?)?[0-9.]+(?: ?\))*"
TOTAL = rf"[-+]? ?{TERM}(?: ?[-+*/] ?{TERM})*"
# The dash of `Answer - 18` is no minus. In `x = y - 18` it is one, and the answer is not known.
BEFORE = r"(?:[w, ]*w ?- |[w, ]*w (?=-[0-9(])|[w,= ]*w (?![-+])|(?:[w,= ]*[,=])? ?)"
AFTER = r"(?!w)(?:/w)?[w,= ]*"
GIVEN = rf"{BEFORE}({TOTAL}(?: ?= ?{TOTAL})*){AFTER}"
OUTLINE = re.compile(rf"{GIVEN}(?:(?<=[ ,])\({GIVEN}\)[w, ]*)?")


def outline(line: str) -> str:
    """A line with plain numbers, `w` for words and `,` for other signs: `w - 18, (10 + 8 w)`.

    Whatever could be part of a number and is not understood raises a ValueError.
    """
    found = ""
    line = EMPHASIS.sub(r"`\2`", line.translate(PLAIN))
    for match in PIECE.finditer(line):
        kind, text = match.lastgroup, match[0]
        if kind == "number":
            if found[-1:].isdigit():
                raise ValueError(f"{text!r} stands right behind a number")
            found += f"{Decimal(re.sub('[^0-9.eE+-]', '', text)):f}"
        elif kind == "word":
            is_unit = found[-1:].isdigit() and text.lower() in UNITS
            found += " w" if is_unit else "w"
        elif kind == "equals":
            found += "="
        elif kind == "operator":
            found += text
        elif kind == "space":
            found += " "
        elif kind == "other":
            if unicodedata.category(text) in ("Nd", "Nl", "No", "Sm") and text not in "~≈≅":
                raise ValueError(f"{text!r} may be part of a number")
            if text in "^\\‰" or (text == "!" and found.rstrip()[-1:] in tuple("0123456789)")):
                raise ValueError(f"{text!r} may be an operator")
            found += ","
    found = re.sub(r"\([^()0-9]*\)", "w", found)
    found = re.sub(r"w[^0-9=]*w", "w", found)
    return re.sub(r" +", " ", found).strip()


def number_of(line: str) -> str | None:
    """The one number that a line gives, in its one spelling; None if it gives none at all.

    All digits of the line must belong to that number. When in doubt it raises a ValueError.
    """
    if HEADING.match(line) or not any(unicodedata.category(sign)[0] == "N" for sign in line):
        return None
    line = line.strip()
    if len(line) > LONGEST or DOUBT.search(line):
        raise ValueError(f"not one clear number: {line!r:.60}")
    match = OUTLINE.fullmatch(outline(line))
    if not match:
        raise ValueError(f"not one clear number: {line!r:.60}")
    sums = "=".join(found for found in match.groups() if found).split("=")
    values = {calculate(found) for found in sums}
    # 12-15 may be a range, and 1/2/2020 is a date.
    is_range = all(re.search(r"[0-9)] ?-", found) for found in sums)
    is_date = any(re.search(r"/[0-9. ]*/", found) for found in sums)
    if len(values) > 1 or is_range or is_date:
        raise ValueError(f"not one clear number: {line!r:.60}")
    return spell(values.pop())


def answer_of(text: str) -> str | None:
    """What a person reads behind ####, in its one spelling; None when in doubt.

    It may stand in the next line. If there are several ####, those that give a number must agree.
    """
    lines = set()
    for part in re.split("#{4,}", text)[1:]:
        first, *rest = [line for line in part.split("\n") if line.strip()] or [""]
        lines.add(rest[0] if rest and ANSWER_FOLLOWS.search(first) else first)
    try:
        numbers = {number_of(line) for line in lines} - {None}
    except ValueError:
        return None
    return numbers.pop() if len(numbers) == 1 else None


# ---- the files -----------------------------------------------------------------------------------


def read(path: Path) -> list[tuple[str, str]]:
    """The (question, solution) rows of a .jsonl file.

    A file that is missing or damaged raises a ValueError with a message of one line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{path} is not there; python data/gsm8k.py {path.parent} downloads it"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    rows = []
    # Only \n ends a row. Inside of one there may be other characters that end a line elsewhere.
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        try:
            rows.append(read_row(line.decode("utf-8-sig")))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: not a row of GSM8K ({error!s:.80}); download it again"
            ) from None
    return rows


def read_row(line: str) -> tuple[str, str]:
    """The question and the solution of one line. A solution without an answer is an error."""
    if not line.strip():
        raise ValueError("an empty line")
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"no text under {key!r}")
        # What is no Unicode cannot be written with any tokenizer.
        row[key].encode("utf-8")
    # The question that is asked is found by the word in front of it.
    question = " ".join(unmarked(row["question"]).split()).replace(ASK, " ")
    question = " ".join(question.split())
    solution = unmarked(row["answer"]).strip()
    if not question:
        raise ValueError("the question is empty")
    if answer_of(solution) is None:
        raise ValueError("no number behind ####")
    return question, solution


def refuse_repeats(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    """A ValueError if a question is in both files, or twice in one with different answers."""
    seen: dict[str, tuple[str, int, str]] = {}
    for name, rows in (("train.jsonl", train), ("test.jsonl", test)):
        for number, (question, solution) in enumerate(rows, 1):
            if question not in seen:
                seen[question] = (name, number, solution)
            before, line, other = seen[question]
            if before != name or (other != solution and answer_of(other) != answer_of(solution)):
                raise ValueError(
                    f"{folder / name}, line {number}: the question is that of {before}, line "
                    f"{line}; remove one of the two rows"
                )


def unmarked(text: str) -> str:
    """A text with a space in place of each mark of the loops that it spells."""
    return re.sub("|".join(["<eos>", *MARKS]), " ", text)


def bucket(question: str) -> str:
    """Eight digits that depend on the question alone and are evenly spread."""
    return f"{int(hashlib.sha256(question.encode()).hexdigest(), 16) % 10**8:08d}"


def written(solution: str) -> str:
    """A solution as a model should write it: without marks, and with an end."""
    return " " + MARK.sub("", solution) + "<eos>"


def draws(generator: torch.Generator) -> random.Random:
    """Python's own generator, seeded by the caller's, because tensors of one number are slow."""
    return random.Random(int(torch.randint(2**62, (), generator=generator)))


# ---- what tasks in words have in common ----------------------------------------------------------


@dataclass(kw_only=True)
class WordTask:
    """A task whose texts are written with the tokenizer of a model: GSM8K and sums in words.

    A line of a response is a step, and its last number is the result of that step. A subclass says
    what the problems are, which answer a response gives, and which one is right.
    """

    pad_id: int
    bos_id: int
    # The end that is written.
    eos_id: int
    # Further ids that end a text, such as "128008 128009".
    other_ends: str = ""
    # The size of the model's vocabulary.
    vocab: int | None = None
    # It is of the package `tokenizers`.
    tokenizer: Any = field(init=False, repr=False)

    @cached_property
    def ends(self) -> set[int]:
        """All ids that end a text."""
        return {self.eos_id, *(int(i) for i in self.other_ends.split())}

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Turn texts into ids, without BOS.

        `<eos>` becomes the end token of the model, and the other marks become words.
        """
        return [self.encode_text(text) for text in texts]

    def encode_text(self, text: str) -> list[int]:
        """One text as ids, without BOS."""
        for mark, words in MARKS.items():
            text = text.replace(mark, words)
        ids: list[int] = []
        for k, part in enumerate(text.split("<eos>")):
            if k > 0:
                ids.append(self.eos_id)
            ids += self.tokenizer.encode(part, add_special_tokens=False).ids
        return ids

    def grade(self, prompt: str, response: str) -> float:
        """1.0 if the response ends and gives the one right answer, else 0.0."""
        return float(self.answer(response) == self.truth(prompt))

    def steps(self, response: list[int]) -> list[tuple[str, int]]:
        """The lines before the last one of a response given as ids.

        Each one comes as its text and the place of the token that ends the line.
        """
        found = []
        begin = 0
        for end, i in enumerate(response):
            if i in self.ends:
                break
            if "\n" in self.tokenizer.decode([i], skip_special_tokens=False):
                text = self.decode(response[begin : end + 1]).strip()
                if text:
                    found.append((text, end))
                begin = end + 1
        return found

    def result(self, step: str) -> str | None:
        """The last number of a line, in its one spelling, or None if it holds none."""
        numbers = numbers_of(step)
        return numbers[-1] if numbers else None

    def uses(self, step: str, rest: str) -> bool:
        """Whether the rest of a response goes on from the result of the line before it.

        The result must be one of its numbers. A line without a result has nothing to go on from.
        """
        result = self.result(step)
        return result is None or result in numbers_of(rest)

    def preferences(self, n: int, generator: torch.Generator) -> list[tuple[str, str, str]]:
        """Draw n of (problem, preferred, other): a solution, and the same one spoiled."""
        demos = [self.demo(generator) for _ in range(n)]
        return [(x, y, self.spoiled(y, draws(generator))) for x, y in demos]


def ids_of(c) -> dict[str, Any]:
    """What a `nanoreward.Config` says of a model's ids, as `WordTask` takes it."""
    names = [f.name for f in fields(WordTask) if f.init]
    return {name: vars(c)[name] for name in names}


# ---- the task ------------------------------------------------------------------------------------


@dataclass
class GSM8K(WordTask):
    """The task: the problems of `folder`, written with the tokenizer and the ids of a model."""

    folder: Path
    tokenizer_file: Path
    # From each question to its solution, which still has its marks.
    gold: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # The download of `python data/gsm8k.py` has to do without the other files.
        from data.folders import read_tokenizer

        self.folder = Path(self.folder)
        train, test = (read(self.folder / name) for name in SHA256)
        self.gold = dict(train) | dict(test)
        self.tests = set(dict(test))
        refuse_repeats(self.folder, train, test)
        self.tokenizer = read_tokenizer(Path(self.tokenizer_file), self.vocab)
        self.refuse_lost_text()

        # The solved examples have short solutions. They are never asked.
        short = [question for question, solution in train if solution.count("\n") <= 3]
        examples = sorted(dict.fromkeys(short), key=bucket)[:SHOTS]
        self.shown = ""
        for question in examples:
            self.shown += f"{ASK}{question}{ANSWER}{written(self.gold[question])}\n\n"
        # What every problem begins with, up to the end of the last example.
        self.opening = [self.bos_id, *self.encode([self.shown.removesuffix("\n\n")])[0]]

        self.by_split: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
        for question in self.gold:
            if question not in examples:
                self.by_split[self.split(question)].append(question)
        self.refuse_few(len(examples))

    def refuse_lost_text(self) -> None:
        """A ValueError if a question does not come back from its ids as it was.

        Its answer could not be found. A tokenizer that writes all letters small is an example.
        """
        # Questions in plain ASCII are all alike, so the first one is enough.
        first, *others = self.gold
        asked = [first, *(question for question in others if not question.isascii())]
        texts = [f"{ASK}{question}{ANSWER}" for question in asked]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = [found.ids for found in encoded]
        back = self.tokenizer.decode_batch(ids, skip_special_tokens=False)
        for text, found in zip(texts, back, strict=True):
            if found.strip() != text:
                raise ValueError(
                    f"{self.tokenizer_file} cannot write a question of {self.folder}: "
                    f"{text!r:.60} comes back as {found!r:.60}"
                )

    def refuse_few(self, examples: int) -> None:
        """A ValueError if the rows are so few that there are no examples or problems left."""
        # A proposal shows three problems of train, and a fourth one is the response.
        for name, split, needed in (
            ("train.jsonl", "train", 4),
            ("train.jsonl", "dev", 1),
            ("test.jsonl", "test", 1),
        ):
            there = len(self.by_split[split])
            if examples < SHOTS or there < needed:
                raise ValueError(
                    f"{self.folder / name} has too few rows: {examples} solved examples and then "
                    f"{there} problems of {split} are found, and {SHOTS} and {needed} are needed"
                )

    # ---- text and tokens ------------------------------------------------------------------------

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text, without PAD and BOS.

        A response ends at its first <eos>, and nothing behind it is shown. A problem begins with
        BOS and the solved examples. They end with <eos> too, so all of it stays. Words that spell
        <eos> are no end, and a space stands in their place.
        """
        ids = [i for i in ids if i != self.pad_id]
        is_problem = ids[: len(self.opening)] == self.opening
        if is_problem:
            ids = ids[1:]
        parts: list[list[int]] = [[]]
        for i in ids:
            # In some models BOS is EOS.
            if i in self.ends:
                parts.append([])
            elif i != self.bos_id and (is_problem or len(parts) == 1):
                parts[-1].append(i)
        texts = [unmarked(self.tokenizer.decode(part, skip_special_tokens=False)) for part in parts]
        return "<eos>".join(texts if is_problem else texts[:2])

    # ---- problems and demonstrations ------------------------------------------------------------

    def split(self, prompt: str) -> str:
        """The split of a problem: test is what test.jsonl holds, and a ninth of the rest is dev."""
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
        """Draw n problems of a split, all of them different.

        If there are fewer than n, train repeats some of them, and dev and test give all they have.
        """
        pool = self.by_split[split]
        draw = draws(generator)
        if split == "train" and n > len(pool):
            chosen = draw.choices(pool, k=n)
        else:
            chosen = draw.sample(pool, min(n, len(pool)))
        return [self.prompt(question) for question in chosen]

    def prompt(self, question: str) -> str:
        """The whole problem: the solved examples and the question."""
        return f"{self.shown}{ASK}{question}{ANSWER}"

    def problem(self, text: str) -> str | None:
        """The problem that a text holds, or None if it must not be trained on.

        It must be a question of the split train, because the answer is known only then.
        """
        question = " ".join(text.removesuffix("<eos>").removeprefix(ASK).split())
        if question not in self.gold or self.split(question) != "train":
            return None
        return self.prompt(question)

    def demo(self, generator: torch.Generator) -> tuple[str, str]:
        """A problem and its solution, without the marks."""
        prompt = self.prompts(1, generator)[0]
        return prompt, self.solution(prompt)

    # ---- grading: outcome, steps, truth ---------------------------------------------------------

    def answer(self, response: str) -> str | None:
        """The number behind ####, in its one spelling.

        It is None when in doubt, and without an <eos> at the very end.
        """
        text, _, behind = response.partition("<eos>")
        if not response.endswith("<eos>") or behind:
            return None
        return answer_of(text)

    def truth(self, prompt: str) -> str:
        """The right answer, in its one spelling."""
        return answer_of(self.gold[self.question(prompt)])

    def solution(self, prompt: str) -> str:
        """The original solution, without the marks."""
        return written(self.gold[self.question(prompt)])

    def steps(self, response: list[int]) -> list[tuple[str, int]]:
        """The lines before the answer of a response given as ids.

        Each one comes as its text and the place of the token that ends the line.
        """
        return [(text, end) for text, end in super().steps(response) if "####" not in text]

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
            true = all(holds(left, right) for left, right in set(equations(step)))
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
        wrong = spell(Fraction(right) + draw.choice([-10, -2, -1, 1, 2, 10]))
        body, _, _ = response.rpartition("####")
        lines = body.rstrip("\n").split("\n")
        # The last line may write the number with commas.
        spellings = f"(?:{re.escape(right)}|{re.escape(f'{Decimal(right):,}')})"
        lines[-1] = re.sub(rf"(?<![\d.,]){spellings}(?!\d|[.,]\d)", wrong, lines[-1])
        return "\n".join(lines) + f"\n#### {wrong}<eos>"

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
        special = {self.pad_id, self.bos_id, *self.ends}
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
    words = Path(c.model) / "tokenizer.json"
    return GSM8K(Path(c.data), words, **ids_of(c))


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
        with urllib.request.urlopen(source + name, timeout=60) as answer:
            content = answer.read()
        found = hashlib.sha256(content).hexdigest()
        if found != wanted:
            raise ValueError(
                f"{source}{name} has SHA-256 {found[:16]}..., not {wanted[:16]}...: "
                "nothing was written"
            )
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(content)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        download(Path(sys.argv[1]))
    except IndexError:
        sys.exit("error: python data/gsm8k.py FOLDER")
    except (ValueError, OSError, HTTPException) as error:
        sys.exit(f"error: {error}")
