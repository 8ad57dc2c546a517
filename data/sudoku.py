"""Sudoku, four by four: a toy task on which the order of writing is free and every truth is known.

    problem    1..4.23......1.2=        the cells in reading order, and `.` is an empty one
    response   1324423124133142<eos>    the whole grid in reading order

The task supports every method. It is made for `denoise`, because a masked-diffusion LM chooses for
itself which cell it writes next.

Each row, each column and each of the four boxes of 2x2 cells holds 1, 2, 3 and 4 once. There are
only 288 such grids: 12 patterns, each with 24 ways to name its digits. So solutions repeat, and
the best constant answer scores 1/288. Problems do not repeat: no test problem is a training problem
whose digits were renamed.

The demonstrator is a student with bad habits that depend on the problem. The class `Sudoku`
describes them. Everything random comes from the `torch.Generator` that the caller passes, and no
text is ever run as code.
"""

import random
import re
from dataclasses import dataclass
from itertools import permutations, product

import torch

from data.arithmetic import CharacterTask, build_tokenizer, draws

# The characters from "0" on are for judging and proposing.
LETTERS = "1234.=05?!~"
DIGITS = "1234"

PROBLEM = re.compile(r"[1-4.]{16}=")
ROW = re.compile(r"[1-4]{4}")
# A response that counts as answered holds the grid and nothing else.
ANSWERED = re.compile(r"([1-4]{16})<eos>")


TOKENIZER = build_tokenizer(LETTERS)

# ---- all grids -----------------------------------------------------------------------------------

# The places of the cells of each unit, in reading order.
ROWS = [range(i, i + 4) for i in range(0, 16, 4)]
COLUMNS = [range(i, 16, 4) for i in range(4)]
BOXES = [(i, i + 1, i + 4, i + 5) for i in (0, 2, 8, 10)]


def whole(cells: str, units: list) -> bool:
    """Whether each of these units (ROWS, COLUMNS or BOXES) holds each digit once."""
    return all({cells[k] for k in unit} == set(DIGITS) for unit in units)


def rows(cells: str) -> list[str]:
    """The four rows of 16 cells. More may stand behind the cells."""
    return [cells[row.start : row.stop] for row in ROWS]


def all_grids() -> list[str]:
    """All 288 grids, each as its 16 digits."""
    lines = ["".join(digits) for digits in permutations(DIGITS)]
    # Two rows that fill two boxes are half a grid. There are 96 of them.
    halves = [a + b for a, b in product(lines, repeat=2) if whole(a + b, BOXES[:2])]
    return [a + b for a, b in product(halves, repeat=2) if whole(a + b, COLUMNS)]


GRIDS = all_grids()
# For each place and digit, the grids that have this digit there.
HOLDS = {(k, d): {grid for grid in GRIDS if grid[k] == d} for k in range(16) for d in DIGITS}


def solutions(cells: str) -> list[str]:
    """All grids that agree with the clues."""
    found = set(GRIDS)
    for k, d in enumerate(cells):
        if d != ".":
            found &= HOLDS[k, d]
    return sorted(found)


def solve(prompt: str) -> str:
    """The one grid that agrees with the clues.

    Anything else than a problem with one solution raises a ValueError with a message of one line.
    """
    if PROBLEM.fullmatch(prompt):
        found = solutions(prompt[:16])
        why = f"it has {len(found)} solutions"
    else:
        found = []
        why = "not 16 cells and '='"
    if len(found) != 1:
        raise ValueError(
            f"not a problem: {prompt[:40]!r}, {why}; write the rows of a 4x4 Sudoku that has one "
            "solution, '.' for an empty cell, then '=', for example 1..4.23......1.2="
        )
    return found[0]


def first_names(prompt: str) -> str:
    """The same problem with its digits renamed in the order in which they first appear.

    For example 3..1..2. becomes 1..2..3.
    """
    seen = dict.fromkeys(re.findall("[1-4]", prompt))
    return prompt.translate(str.maketrans("".join(seen), DIGITS[: len(seen)]))


# ---- mistakes ------------------------------------------------------------------------------------


def in_order(row: str) -> str:
    """The row as someone fills it who looks at nothing else.

    The missing digits are written from small to large.
    """
    missing = iter([d for d in DIGITS if d not in row])
    return "".join(next(missing) if d == "." else d for d in row)


def spoil(grid: str, draw: random.Random) -> str:
    """Break a grid in one of the ways that the rubric marks."""
    i = draw.randrange(16)
    j = 4 * draw.randrange(4)
    a, b = draw.sample(DIGITS, 2)
    above, row, below = grid[:j], grid[j : j + 4], grid[j + 4 :]
    ways = [
        # A cell is left out.
        grid[:i] + grid[i + 1 :],
        # Another digit stands in a cell.
        grid[:i] + a + grid[i + 1 :],
        # A row is turned round. The rows stay whole.
        above + row[::-1] + below,
        # A row is moved to the end. The rows and the columns stay whole.
        above + below + row,
        # Two digits are swapped everywhere. The boxes stay whole too.
        grid.translate(str.maketrans(a + b, b + a)),
    ]
    return draw.choice(ways)


# ---- the task ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sudoku(CharacterTask):
    """The task: grids with some cells given, and a demonstrator of mixed quality.

    min_clues, max_clues: how many cells a problem gives.
    careful: whether both habits of the demonstrator are switched off. The accuracy of such a
        careful twin is the ceiling for a model that imitates.
    haste: how often a row that shows a 1 tempts the demonstrator to count on, that is, to fill in
        the missing digits from small to large without a look at the other rows. Another row does so
        an eighth as often. This is one decision for each row, so that some half-written grids have
        better prospects than others.
    slip: how often it writes any digit into one cell of a row.
    """

    min_clues: int = 6
    max_clues: int = 9
    careful: bool = False
    haste: float = 0.6
    slip: float = 0.01

    tokenizer = TOKENIZER
    letters = LETTERS
    units_first = False

    def __post_init__(self) -> None:
        # With 4 clues there are grids that have no test problem.
        if not 5 <= self.min_clues <= self.max_clues <= 12:
            raise ValueError(f"clues must lie in 5..12: {self.min_clues} to {self.max_clues}")

    # ---- problems and demonstrations ------------------------------------------------------------

    def one_of_its_kind(self, prompt: str) -> str:
        """The same text for a problem whose digits were renamed."""
        return first_names(prompt)

    def prompts(self, n: int, generator: torch.Generator, split: str = "train") -> list[str]:
        """Draw n problems of a split. All grids and all numbers of clues are equally likely.

        Only the places of the clues are drawn again until the problem fits. All sets of places that
        fit are equally likely, too. Those of dev and test are all different.
        """
        draw = draws(generator)
        found = []
        seen = set()
        while len(found) < n:
            grid = draw.choice(GRIDS)
            clues = draw.randint(self.min_clues, self.max_clues)
            prompt = "." * 16 + "="
            while self.split(prompt) != split or len(solutions(prompt[:16])) > 1:
                given = draw.sample(range(16), clues)
                cells = [d if k in given else "." for k, d in enumerate(grid)]
                prompt = "".join(cells) + "="
            if split == "train" or prompt not in seen:
                seen.add(prompt)
                found.append(prompt)
        return found

    def problem(self, text: str) -> str | None:
        """The problem that a text holds, or None if it must not be trained on.

        It must have one solution and as many clues as this task's problems, and must not belong to
        dev or test.
        """
        text = text.removesuffix("<eos>")
        if not PROBLEM.fullmatch(text):
            return None
        clues = 16 - text.count(".")
        if not self.min_clues <= clues <= self.max_clues:
            return None
        if len(solutions(text[:16])) != 1:
            return None
        return text if self.split(text) == "train" else None

    def respond(self, prompt: str, generator: torch.Generator) -> str:
        """The demonstrator's response to this problem, row by row."""
        draw = draws(generator)
        haste, slip = self.haste, self.slip
        if self.careful:
            haste, slip = 0, 0
        grid = ""
        for given, row in zip(rows(prompt), rows(solve(prompt)), strict=True):
            if draw.random() < (haste if "1" in given else haste / 8):
                row = in_order(given)
            if draw.random() < slip:
                i = draw.randrange(4)
                row = row[:i] + draw.choice(DIGITS) + row[i + 1 :]
            grid += row
        return grid + "<eos>"

    # ---- grading: outcome, steps, truth ---------------------------------------------------------

    def answer(self, response: str) -> str | None:
        """The grid, or None unless the response is exactly 16 digits, ended by <eos>."""
        match = ANSWERED.fullmatch(response)
        return match[1] if match else None

    def grade(self, prompt: str, response: str) -> float:
        """1.0 if the response is the right grid and then the end, else 0.0."""
        return float(response == solve(prompt) + "<eos>")

    def truth(self, prompt: str) -> list[str]:
        """The four rows of the right grid."""
        return rows(solve(prompt))

    def solution(self, prompt: str) -> str:
        """The right grid, and the end."""
        return solve(prompt) + "<eos>"

    def steps(self, response: list[int]) -> list[tuple[str, int]]:
        """The whole rows that a response given as ids begins with.

        Each one comes as its text and the place of its last token.
        """
        found = []
        for end in range(3, 16, 4):
            row = self.decode(response[end - 3 : end + 1])
            if not ROW.fullmatch(row):
                break
            found.append((row, end))
        return found

    def uses(self, step: str, rest: str) -> bool:
        """Always True, because no row claims a result that later rows would have to take up."""
        return True

    def step_ok(self, prompt: str, steps: list[str]) -> list[bool]:
        """Which rows are exactly those of the right grid.

        This is ground truth. It is there to measure, and nothing may be trained on it.
        """
        right = self.truth(prompt)
        return [i < 4 and step == right[i] for i, step in enumerate(steps)]

    # ---- judging ---------------------------------------------------------------------------------

    def rubric(self, prompt: str, response: str) -> int:
        """The score of a response, 0 to 5. What is not 16 digits with an end has 0.

        It earns one point if it is, one if all clues are kept, and one each if all rows, all
        columns and all boxes are whole.
        """
        cells = self.answer(response)
        if cells is None:
            return 0
        kept = all(clue in (".", d) for clue, d in zip(prompt, cells, strict=False))
        return 1 + kept + sum(whole(cells, units) for units in (ROWS, COLUMNS, BOXES))

    def spoil(self, response: str, draw: random.Random) -> str:
        """Break a response in one of the ways that the rubric marks."""
        return spoil(response, draw)

    def chance(self) -> float:
        """The exact accuracy of the best constant answer, as all grids are equally likely."""
        return 1 / len(GRIDS)


def make(c, careful: bool = False) -> Sudoku:
    """The task as a `nanoreward.Config` asks for it."""
    return Sudoku(careful=careful)


def rules(c) -> list[tuple[bool, str]]:
    """What a `nanoreward.Config` must keep to, and what to say if it does not."""
    return [
        (
            not c.model,
            "--model: a folder's vocabulary is not this task's; give --task gsm8k or sums",
        ),
        (
            c.response >= 17,
            "--response must be at least 17: the longest right response and its end",
        ),
        (
            c.vocab >= TOKENIZER.get_vocab_size(),
            "--vocab must be at least that of the task's alphabet",
        ),
    ]
