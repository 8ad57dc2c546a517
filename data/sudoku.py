"""Sudoku, four by four: a toy task on which the order of writing is free and every truth is known.

    problem    1..4.23......1.2=        the cells in reading order, `.` is an empty one
    response   1324423124133142<eos>    the whole grid in reading order

Each row, each column and each of the four 2x2 boxes holds 1, 2, 3 and 4 once. There are only 288 such
grids, so solutions repeat (24 names of the digits for each of 12 patterns); problems do not: no test
problem is a training problem with its digits renamed. The best constant answer scores 1/288.

The demonstrator is a student with bad habits that depend on the problem (`Sudoku.respond`).
Everything random comes from the `torch.Generator` that the caller passes; no text is ever run.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from itertools import permutations, product

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>", "<sep>", "<bad>"]  # ids 0..5
LETTERS = "1234.=05?!~"  # from "0" on: for judging and proposing
DIGITS = "1234"

PROBLEM = re.compile(r"[1-4.]{16}=")
ROW = re.compile(r"[1-4]{4}")
ANSWERED = re.compile(r"([1-4]{16})<eos>")  # the grid and nothing else


def build_tokenizer() -> Tokenizer:
    """One token a character; the six special tokens are ids 0..5, 17 ids in all."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *LETTERS])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), "isolated")
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZER = build_tokenizer()
ROWS = [range(i, i + 4) for i in range(0, 16, 4)]
COLUMNS = [range(i, 16, 4) for i in range(4)]
BOXES = [(i, i + 1, i + 4, i + 5) for i in (0, 2, 8, 10)]


def whole(cells: str, units: list) -> bool:
    """Whether each unit (ROWS, COLUMNS or BOXES) holds each digit once."""
    return all({cells[k] for k in unit} == set(DIGITS) for unit in units)


def rows(cells: str) -> list[str]:
    """16 cells, and perhaps more behind -> the four rows."""
    return [cells[row.start : row.stop] for row in ROWS]


# the two upper rows, with whole boxes, then all four: 96 and 288
HALVES = [
    a + b
    for a, b in product(map("".join, permutations(DIGITS)), repeat=2)
    if whole(a + b, BOXES[:2])
]
GRIDS = [a + b for a, b in product(HALVES, repeat=2) if whole(a + b, COLUMNS)]
HOLDS = {(k, d): {grid for grid in GRIDS if grid[k] == d} for k in range(16) for d in DIGITS}


def solutions(cells: str) -> list[str]:
    """All grids that agree with the clues."""
    return sorted(set(GRIDS).intersection(*(HOLDS[k, d] for k, d in enumerate(cells) if d != ".")))


def solve(prompt: str) -> str:
    """The one grid that agrees with the clues. Raises ValueError, in one line, on anything else."""
    found = solutions(prompt[:16]) if PROBLEM.fullmatch(prompt) else []
    if len(found) != 1:
        why = (
            f"it has {len(found)} solutions"
            if PROBLEM.fullmatch(prompt)
            else "not 16 cells and '='"
        )
        raise ValueError(
            f"not a problem: {prompt[:40]!r}, {why}; write the rows of a 4x4 Sudoku that has one "
            "solution, '.' for an empty cell, then '=', for example 1..4.23......1.2="
        )
    return found[0]


def first_names(prompt: str) -> str:
    """The same problem with its digits renamed by first appearance: 3..1..2. -> 1..2..3."""
    seen = dict.fromkeys(re.findall("[1-4]", prompt))
    return prompt.translate(str.maketrans("".join(seen), DIGITS[: len(seen)]))


def in_order(row: str) -> str:
    """The row filled by someone who looks at nothing else: the missing digits from small to large."""
    missing = iter([d for d in DIGITS if d not in row])
    return "".join(next(missing) if d == "." else d for d in row)


def spoil(grid: str, draw: random.Random) -> str:
    """Break a grid in one way that the rubric marks: leave a cell out, write another digit, turn a row
    round (rows stay whole), move a row to the end (columns too), swap two digits (boxes too)."""
    i, j, (a, b) = draw.randrange(16), 4 * draw.randrange(4), draw.sample(DIGITS, 2)
    row, others = grid[j : j + 4], (grid[:j], grid[j + 4 :])
    ways = [
        grid[:i] + grid[i + 1 :],
        grid[:i] + a + grid[i + 1 :],
        row[::-1].join(others),
        "".join(others) + row,
        grid.translate(str.maketrans(a + b, b + a)),
    ]
    return draw.choice(ways)


def draws(generator: torch.Generator) -> random.Random:
    """Plain Python draws seeded from the caller's generator (a tensor of one number is slow)."""
    return random.Random(int(torch.randint(2**62, (1,), generator=generator)))


@dataclass(frozen=True)
class Sudoku:
    """The task: grids with min_clues..max_clues cells given, and a demonstrator of mixed quality.

    `haste`: how often a row that shows a 1 tempts it to count on, to fill in the missing digits from
    small to large without a look at the other rows (an eighth as often elsewhere). `slip`: how often
    it writes any digit into one cell of a row. careful=True switches both off: the twin whose accuracy
    is the ceiling. A habit is one decision a row: some half-written grids are better than others.
    """

    min_clues: int = 6
    max_clues: int = 9
    careful: bool = False
    haste: float = 0.6
    slip: float = 0.01

    tokenizer = TOKENIZER

    def __post_init__(self):
        if (
            not 5 <= self.min_clues <= self.max_clues <= 12
        ):  # not every grid has a test problem of 4
            raise ValueError(f"clues must lie in 5..12: {self.min_clues} to {self.max_clues}")

    # ---- text and tokens -----------------------------------------------------------------------

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Texts to token ids. Raises ValueError on a character outside the alphabet."""
        try:
            return [TOKENIZER.encode(t).ids for t in texts]
        except Exception as error:  # the library's only class for an unknown word
            raise ValueError(f"a text holds a character outside {LETTERS}") from error

    def decode(self, ids: list[int]) -> str:
        """Token ids to text, up to and including the first <eos>; PAD and BOS are left out."""
        words = [
            TOKENIZER.id_to_token(i) or "<bad>" for i in ids if i > 1
        ]  # Config.vocab may be larger
        return "".join(words[: words.index("<eos>") + 1] if "<eos>" in words else words)

    # ---- problems and demonstrations -----------------------------------------------------------

    def split(self, prompt: str) -> str:
        """train (80 %), dev or test (10 % each): the same for a problem with its digits renamed."""
        bucket = hashlib.sha256(first_names(prompt).encode()).digest()[0] % 10
        return {0: "dev", 1: "test"}.get(bucket, "train")

    def prompts(self, n: int, generator: torch.Generator, split: str = "train") -> list[str]:
        """n problems of that split. Each grid and each number of clues is equally likely: what is
        drawn again until it fits are the cells, all sets of them that fit being equally likely."""
        draw = draws(generator)
        found = []
        for _ in range(n):
            grid, clues = draw.choice(GRIDS), draw.randint(self.min_clues, self.max_clues)
            prompt = "." * 16 + "="
            while self.split(prompt) != split or len(solutions(prompt[:16])) > 1:
                given = draw.sample(range(16), clues)
                prompt = "".join(d if k in given else "." for k, d in enumerate(grid)) + "="
            found.append(prompt)
        return found

    def problem(self, text: str) -> str | None:
        """A written problem that may be trained on: one solution, this task's clues, not dev or test."""
        text = text.removesuffix("<eos>")
        known = PROBLEM.fullmatch(text) and self.min_clues <= 16 - text.count(".") <= self.max_clues
        return (
            text
            if known and len(solutions(text[:16])) == 1 and self.split(text) == "train"
            else None
        )

    def demo(self, generator: torch.Generator) -> tuple[str, str]:
        """(problem, response) by the demonstrator. What it mixes is described above."""
        prompt = self.prompts(1, generator)[0]
        return prompt, self.respond(prompt, generator)

    def respond(self, prompt: str, generator: torch.Generator) -> str:
        """The demonstrator's response to this problem, row by row."""
        draw = draws(generator)
        haste, slip = (0, 0) if self.careful else (self.haste, self.slip)
        grid = ""
        for given, row in zip(rows(prompt), rows(solve(prompt)), strict=True):
            if draw.random() < (haste if "1" in given else haste / 8):
                row = in_order(given)
            if draw.random() < slip:
                i = draw.randrange(4)
                row = row[:i] + draw.choice(DIGITS) + row[i + 1 :]
            grid += row
        return grid + "<eos>"

    # ---- grading: outcome, steps, truth --------------------------------------------------------

    def answer(self, response: str) -> str | None:
        """The grid, or None: exactly 16 digits, ended by <eos>."""
        return match[1] if (match := ANSWERED.fullmatch(response)) else None

    def grade(self, prompt: str, response: str) -> float:
        """1.0 if the response is the right grid and then the end, else 0.0."""
        return float(response == solve(prompt) + "<eos>")

    def truth(self, prompt: str) -> list[str]:
        """The four rows of the right grid."""
        return rows(solve(prompt))

    def steps(self, response: list[int]) -> list[tuple[str, int]]:
        """The whole rows that a response given as ids begins with: (text, position of its last token)."""
        found = []
        for end in range(3, 16, 4):
            if not ROW.fullmatch(row := self.decode(response[end - 3 : end + 1])):
                break
            found.append((row, end))
        return found

    def result(self, step: str) -> str | None:
        """None: no row claims a result that later rows would have to take up."""
        return None

    def step_ok(self, prompt: str, steps: list[str]) -> list[bool]:
        """Which rows are exactly the right grid's. Ground truth: to measure, never to train."""
        right = self.truth(prompt)
        return [i < 4 and step == right[i] for i, step in enumerate(steps)]

    # ---- preferences, judging, proposing: the text that other loops learn from ------------------

    def preferences(self, n: int, generator: torch.Generator) -> list[tuple[str, str, str]]:
        """n of (prompt, preferred, other): two different demonstrations of one problem. The labeller
        prefers the right grid, and tosses a coin between two wrong ones; nothing is planted."""
        pairs = []
        while len(pairs) < n:
            prompt = self.prompts(1, generator)[0]
            a, b = self.respond(prompt, generator), self.respond(prompt, generator)
            if a != b:
                coin = draws(generator).random() < 0.5
                first = self.grade(prompt, a) > self.grade(prompt, b) - coin
                pairs.append((prompt, a, b) if first else (prompt, b, a))
        return pairs

    def rubric(self, prompt: str, response: str) -> int:
        """0..5: 0 if it is no grid of 16 digits with an end; one point for that, and one each for all
        clues kept, all rows, all columns and all boxes whole."""
        if (cells := self.answer(response)) is None:
            return 0
        kept = all(clue in (".", d) for clue, d in zip(prompt, cells, strict=False))
        return 1 + kept + sum(whole(cells, units) for units in (ROWS, COLUMNS, BOXES))

    def judge_prompt(self, prompt: list[int], response: list[int]) -> list[int]:
        """What the judge reads, ids in and ids out: problem<sep>response<sep>?"""
        sep, ask = TOKENIZER.token_to_id("<sep>"), TOKENIZER.token_to_id("?")
        x, y = ([i for i in ids if i > 2] for ids in (prompt, response))  # without PAD, BOS, EOS
        return [*x, sep, *y, sep, ask]

    def judge_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """A demonstration, spoiled up to three times, and its score `!s`: what the judge reads and
        writes. All six scores equally often."""
        draw = draws(generator)
        wanted, score = draw.randrange(6), -1
        while score != wanted:
            prompt = self.prompts(1, generator)[0]
            grid = self.respond(prompt, generator).removesuffix("<eos>")
            for _ in range(draw.randrange(4)):
                grid = spoil(grid, draw)
            score = self.rubric(prompt, grid + "<eos>")
        return self.decode(self.judge_prompt(*self.encode([prompt, grid]))), f"!{score}<eos>"

    def propose_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """Three problems, and a fourth as the response."""
        *shown, new = self.prompts(4, generator)
        return "<sep>".join(["~", *shown, ""]), f"{new}<eos>"

    def chance(self) -> float:
        """Accuracy of the best constant answer: each grid is as likely as any other. Exact."""
        return 1 / len(GRIDS)


def make(c, careful: bool = False) -> Sudoku:
    """The task as a `nanoreward.Config` asks for it."""
    return Sudoku(careful=careful)


def rules(c) -> list[tuple[bool, str]]:
    """What a `nanoreward.Config` must keep to, and what to say if it does not."""
    return [
        (not c.model, "--model: a folder's vocabulary is not this task's; give --task gsm8k"),
        (
            c.response >= 17,
            "--response must be at least 17: the longest right response and its end",
        ),
        (
            c.vocab >= TOKENIZER.get_vocab_size(),
            "--vocab must be at least that of the task's alphabet",
        ),
        (
            (c.pad, c.bos, c.eos, c.mask) == (0, 1, 2, 3),
            "--pad, --bos, --eos, --mask are 0, 1, 2, 3 in this task",
        ),
    ]
