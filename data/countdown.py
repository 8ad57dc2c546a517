"""Countdown: a toy task with aimless steps and lucky guesses, where every truth is known exactly.

    problem    7,25,3=54:                        three or four numbers, then the target
    response   25-7=18;18*3=54;#25-7*3<eos>      one step `a+b=c;` for each operation, then
                                                 `#` and the expression

The expression uses each given number exactly once. It is read from left to right, without
precedence, and gives the target. All its results lie in 0..99, and there is no modulus.

The task supports every method. It is made for rewards that look inside a response: a true
calculation may lead nowhere, and a guess may be right without a single step. The grader reads the
expression alone, so it cannot tell the right way from a lucky jump. `step_ok` can.

One number of a problem is large, and the others have one digit. With three numbers from 1 to 9
there are only 1,860 problems. A small model learns those of train by heart and solves a third of
the others. With a large number from 10 to 50 there are 14,549, and it solves seven in ten of the
others. For this the careful demonstrator writes always the same solution of a problem, the one that
begins with the largest numbers. When any solution was as likely, the model solved 54 % in place of
75 (600 updates, greedy, dev, one seed).

Text shows numbers as people write them. Token ids hold the units digit of each number first, so
that a carry flows in reading order.

The demonstrator is a student with bad habits that depend on the problem. The class `Countdown`
describes them. Everything random comes from the `torch.Generator` that the caller passes, and no
text is ever run as code.
"""

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement, permutations

import torch

from data.arithmetic import CharacterTask, build_tokenizer, draws

# The characters from "?" on are for judging and proposing.
LETTERS = "0123456789+-*=;#,:?!~"

OPERATIONS = "*+-"
# Every result lies in 0..LARGEST, and every target in 1..LARGEST.
LARGEST = 99
# The numbers of a problem that are not large.
SMALL = range(1, 10)
# The demonstrator wanders for at most so many steps.
AIMLESS = 3

PROBLEM = re.compile(r"[1-9][0-9]?(?:,[1-9][0-9]?){2,3}=[1-9][0-9]?:")
STEP = re.compile(r"(0|[1-9][0-9]?)([+*-])(0|[1-9][0-9]?)=(0|[1-9][0-9]?);")
# A response that counts as answered holds one expression, and it stands at the very end.
ANSWERED = re.compile(r"[0-9+*=;-]*#([1-9][0-9]?(?:[+*-][1-9][0-9]?)+)<eos>")


TOKENIZER = build_tokenizer(LETTERS)


# ---- calculations and expressions ---------------------------------------------------------------


def calculate(a: int, op: str, b: int) -> int:
    """The result of a op b."""
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def split_up(expression: str) -> tuple[list[int], list[str]]:
    """The numbers and the operations of an expression: `25-3+7` gives [25, 3, 7] and ["-", "+"]."""
    numbers = [int(number) for number in re.findall("[0-9]+", expression)]
    return numbers, re.findall("[+*-]", expression)


def results(expression: str) -> list[int]:
    """The result after each operation, read from left to right: `25-3+7` gives [22, 29]."""
    (a, *numbers), operations = split_up(expression)
    found = []
    for op, b in zip(operations, numbers, strict=True):
        a = calculate(a, op, b)
        found.append(a)
    return found


def written(expression: str) -> list[str]:
    """The steps that lead to an expression: `25-3+7` gives `25-3=22;` and `22+7=29;`."""
    (a, *numbers), operations = split_up(expression)
    steps = []
    for op, b, c in zip(operations, numbers, results(expression), strict=True):
        steps.append(f"{a}{op}{b}={c};")
        a = c
    return steps


def others(numbers: tuple[int, ...], number: int) -> tuple[int, ...]:
    """The numbers that are left when this one is used once."""
    i = numbers.index(number)
    return numbers[:i] + numbers[i + 1 :]


@lru_cache(maxsize=4096)
def legal(numbers: tuple[int, ...]) -> dict[str, int]:
    """Every expression that uses each number once, if its results lie in 0..99: its value."""
    # What is written so far, its value, and the numbers that are left.
    begun = [(str(a), a, others(numbers, a)) for a in dict.fromkeys(numbers)]
    for _ in numbers[1:]:
        longer = []
        for text, a, left in begun:
            for b in dict.fromkeys(left):
                for op in OPERATIONS:
                    c = calculate(a, op, b)
                    if 0 <= c <= LARGEST:
                        longer.append((f"{text}{op}{b}", c, others(left, b)))
        begun = longer
    return {text: value for text, value, _ in begun}


def parse(prompt: str) -> tuple[tuple[int, ...], int]:
    """Split a problem: `7,25,3=54:` gives the sorted numbers (3, 7, 25) and the target 54.

    Anything else than a problem with a solution raises a ValueError with a message of one line.
    """
    why = "not numbers, '=', a target and ':'"
    if PROBLEM.fullmatch(prompt):
        *numbers, target = [int(number) for number in re.findall("[0-9]+", prompt)]
        numbers = tuple(sorted(numbers))
        if target in legal(numbers).values():
            return numbers, target
        why = "it has no solution"
    raise ValueError(
        f"not a problem: {prompt[:40]!r}, {why}; write three or four numbers 1-99, '=', a target "
        "1-99 that they can make from left to right, then ':', for example 7,25,3=54:"
    )


def solutions(prompt: str) -> list[str]:
    """All expressions that solve a problem."""
    numbers, target = parse(prompt)
    return [expression for expression, value in legal(numbers).items() if value == target]


def preference(expression: str) -> tuple[list[int], list[str]]:
    """What the careful demonstrator sorts solutions by: large numbers first, then `*`, `+`, `-`."""
    numbers, operations = split_up(expression)
    return [-number for number in numbers], operations


def solve(prompt: str) -> str:
    """The solution that the careful demonstrator writes."""
    return min(solutions(prompt), key=preference)


def aimless(prompt: str) -> list[str]:
    """All true calculations with two of the given numbers that begin no right way."""
    numbers, _ = parse(prompt)
    right = {written(expression)[0] for expression in solutions(prompt)}
    found = []
    for a, b in sorted(set(permutations(numbers, 2))):
        for op in OPERATIONS:
            c = calculate(a, op, b)
            step = f"{a}{op}{b}={c};"
            if 0 <= c <= LARGEST and step not in right:
                found.append(step)
    return found


# ---- mistakes -----------------------------------------------------------------------------------


def off_by_one(c: int, draw: random.Random) -> int:
    """A neighbour of this result that is itself a legal result."""
    return draw.choice([d for d in (c - 1, c + 1) if 0 <= d <= LARGEST])


def slipped(steps: list[str], slip: float, draw: random.Random) -> list[str]:
    """The steps of a right way, in which some results are off by one. Later steps go on from them.

    slip: how often a result is off. What would lie outside 0..99 then is left as it was.
    """
    found = []
    before = None
    for step in steps:
        a, op, b, c = STEP.fullmatch(step).groups()
        a = a if before is None else before
        there = calculate(int(a), op, int(b))
        if 0 <= there <= LARGEST:
            c = there
        if draw.random() < slip:
            c = off_by_one(int(c), draw)
        found.append(f"{a}{op}{b}={c};")
        before = c
    return found


def spoil(response: str, draw: random.Random) -> str:
    """Break a response without its <eos> in one of the ways that the rubric marks."""
    *steps, answer = re.split("(?<=;)", response)
    way = draw.randrange(4)
    i = draw.randrange(len(steps) or 1)
    if way == 0:
        # The answer is left out.
        answer = ""
    elif way == 1:
        # The last number of the answer is another one.
        answer = re.sub("[0-9]$", str(draw.choice(SMALL)), answer)
    elif way == 2 and steps:
        # A step is left out.
        del steps[i]
    elif way == 3 and steps:
        # A result is another one.
        steps[i] = re.sub("[0-9]+;", f"{draw.randrange(LARGEST + 1)};", steps[i])
    return "".join(steps) + answer


# ---- the task -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Countdown(CharacterTask):
    """The task: numbers and a target, and a demonstrator of mixed quality.

    min_ops, max_ops: how many operations a problem takes, one less than it has numbers.
    careful: whether the habits of the demonstrator are switched off, so that it always writes the
        steps of one right way and the expression at once. The accuracy of such a careful twin is
        the ceiling for a model that imitates.
    wander: how often the demonstrator writes one to three aimless steps before anything else, when
        the target is `far` or above. It does so a quarter as often below. Such a step is a true
        calculation with two of the given numbers that begins no right way.
    jump: how often it knows no right way and guesses, when the first number of the problem is a
        small one. It does so a quarter as often when the large one comes first. The guess is any
        expression that uses each number once and has legal results. With three numbers 13 % of the
        guesses are right.
    slip: how often a result on the right way is off by one. The later steps go on from it, and the
        expression stays right.
    low, high: from where to where the large number of a problem lies.
    """

    min_ops: int = 2
    max_ops: int = 2
    careful: bool = False
    wander: float = 0.8
    far: int = 35
    jump: float = 0.9
    slip: float = 0.02
    low: int = 10
    high: int = 50

    tokenizer = TOKENIZER
    letters = LETTERS

    def __post_init__(self) -> None:
        if not 2 <= self.min_ops <= self.max_ops <= 3:
            raise ValueError(f"operations must lie in 2..3: {self.min_ops} to {self.max_ops}")
        if not 10 <= self.low <= self.high <= LARGEST:
            raise ValueError(f"the large number must lie in 10..99: {self.low} to {self.high}")

    # ---- problems and demonstrations ------------------------------------------------------------

    def one_of_its_kind(self, prompt: str) -> str:
        """The same text for a problem whose numbers come in another order."""
        *numbers, target = re.findall("[0-9]+", prompt)
        return f"{sorted(numbers)} {target}"

    def any_problem(self, draw: random.Random) -> str:
        """A problem of any split.

        All numbers of operations are equally likely, then all numbers, then all targets that the
        numbers can make, then all orders.
        """
        count = draw.randint(self.min_ops, self.max_ops)
        numbers = [draw.randint(self.low, self.high)]
        numbers += [draw.choice(SMALL) for _ in range(count)]
        values = set(legal(tuple(sorted(numbers))).values())
        target = draw.choice(sorted(values - {0}))
        draw.shuffle(numbers)
        return f"{','.join(map(str, numbers))}={target}:"

    def problem(self, text: str) -> str | None:
        """The problem that a text holds, or None if it must not be trained on.

        It must have a solution and such numbers as this task's problems, and must not belong to dev
        or test.
        """
        text = text.removesuffix("<eos>")
        try:
            (*small, large), _ = parse(text)
        except ValueError:
            return None
        if not self.min_ops <= len(small) <= self.max_ops:
            return None
        if not self.low <= large <= self.high or max(small) not in SMALL:
            return None
        return text if self.split(text) == "train" else None

    def respond(self, prompt: str, generator: torch.Generator) -> str:
        """The demonstrator's response to this problem."""
        draw = draws(generator)
        numbers, target = parse(prompt)
        first = int(prompt.split(",")[0])
        wander, jump, slip = self.wander, self.jump, self.slip
        if self.careful:
            wander, jump, slip = 0, 0, 0

        steps = []
        if draw.random() < (wander if target >= self.far else wander / 4):
            steps = aimless(prompt)
            # A few problems have fewer aimless steps than that.
            steps = draw.sample(steps, min(draw.randint(1, AIMLESS), len(steps)))
        if draw.random() < (jump if first in SMALL else jump / 4):
            expression = draw.choice(list(legal(numbers)))
        else:
            expression = solve(prompt)
            steps += slipped(written(expression), slip, draw)
        return f"{''.join(steps)}#{expression}<eos>"

    # ---- grading: outcome, steps, truth ---------------------------------------------------------

    def answer(self, response: str) -> str | None:
        """The expression, or None unless there is exactly one `#expression`, ended by <eos>."""
        match = ANSWERED.fullmatch(response)
        return match[1] if match else None

    def grade(self, prompt: str, response: str) -> float:
        """1.0 if the response ends with an expression that solves the problem; else 0.0.

        It makes no difference what its steps are.
        """
        return float(self.answer(response) in solutions(prompt))

    def truth(self, prompt: str) -> list[str]:
        """The steps of the right way that the careful demonstrator writes."""
        return written(solve(prompt))

    def solution(self, prompt: str) -> str:
        """The right way that the careful demonstrator writes."""
        return f"{''.join(self.truth(prompt))}#{solve(prompt)}<eos>"

    def result(self, step: str) -> str | None:
        """What a step claims, which is the number after its `=`, or None if it is no step."""
        match = STEP.fullmatch(step)
        return match[4] if match else None

    def uses(self, step: str, rest: str) -> bool:
        """Whether the rest of a response goes on from the result of the step before it.

        A later step begins with the result, or it is one of the results of the final expression. A
        step without a result has nothing to go on from.
        """
        result = self.result(step)
        if result is None:
            return True
        if re.search(rf"(?:^|;){result}[+*-]", rest):
            return True
        expression = self.answer(rest)
        return expression is not None and int(result) in results(expression)

    def step_ok(self, prompt: str, steps: list[str]) -> list[bool]:
        """Which steps belong to a right way.

        A step does if it and those before it that do are the beginning of the steps of a solution.
        So it is a true calculation with numbers that are still there, and the target can still be
        reached. This is ground truth. It is there to measure, and nothing may be trained on it.
        """
        ways = [written(expression) for expression in solutions(prompt)]
        taken = []
        found = []
        for step in steps:
            longer = [*taken, step]
            ok = any(way[: len(longer)] == longer for way in ways)
            if ok:
                taken = longer
            found.append(ok)
        return found

    # ---- judging ---------------------------------------------------------------------------------

    def rubric(self, prompt: str, response: str) -> int:
        """The score of a response, 0 to 5. What has no single answer has 0. Else it earns a point

        - for the answer;
        - if the answer uses each given number once;
        - if the answer is right;
        - if all its steps are true calculations;
        - if its steps hold a whole right way.
        """
        expression = self.answer(response)
        if expression is None:
            return 0
        numbers, _ = parse(prompt)
        *steps, _ = re.split("(?<=;)", response)
        true = True
        for step in steps:
            match = STEP.fullmatch(step)
            true = true and match is not None
            true = true and calculate(int(match[1]), match[2], int(match[3])) == int(match[4])
        points = [
            True,
            sorted(split_up(expression)[0]) == list(numbers),
            self.grade(prompt, response) == 1,
            true,
            sum(self.step_ok(prompt, steps)) == len(numbers) - 1,
        ]
        return sum(points)

    def spoil(self, response: str, draw: random.Random) -> str:
        """Break a response in one of the ways that the rubric marks."""
        return spoil(response, draw)

    def chance(self) -> float:
        """The exact accuracy of the best constant answer, over the problems of all splits.

        It is right if the numbers are its own and the target is its value. Its large number is
        drawn once, and its small ones may be drawn in any order.
        """
        best = 0.0
        lengths = self.max_ops - self.min_ops + 1
        for count in range(self.min_ops, self.max_ops + 1):
            for small in combinations_with_replacement(SMALL, count):
                orders = len(set(permutations(small)))
                for large in range(self.low, self.high + 1):
                    targets = set(legal((*small, large)).values()) - {0}
                    kinds = lengths * (self.high - self.low + 1) * len(SMALL) ** count
                    best = max(best, orders / kinds / len(targets))
        return best


def make(c, careful: bool = False) -> Countdown:
    """The task as a `nanoreward.Config` asks for it."""
    return Countdown(c.min_ops, c.max_ops, careful)


def rules(c) -> list[tuple[bool, str]]:
    """What a `nanoreward.Config` must keep to, and what to say if it does not."""
    # A step has up to 8 tokens on average: one of 9, as 81-50=31;, comes behind one of 7. The
    # answer has 1 for `#`, 2 for each number and operation that follows, 2 for the large number and
    # 1 for its end.
    room = 8 * (AIMLESS + c.max_ops) + 2 * c.max_ops + 4
    return [
        (
            not c.model,
            "--model: a folder's vocabulary is not this task's; give --task gsm8k or sums",
        ),
        (
            2 <= c.min_ops <= c.max_ops <= 3,
            "--min-ops and --max-ops must be 2 or 3, for three or four numbers, and in this order",
        ),
        (
            c.response >= room,
            f"--response must be at least {room}: the longest demonstration and its end",
        ),
        (
            c.vocab >= TOKENIZER.get_vocab_size(),
            "--vocab must be at least that of the task's alphabet",
        ),
    ]
