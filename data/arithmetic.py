"""Chains of arithmetic with written steps: the toy task on which every truth is known exactly.

    problem    37+5*3=                      operations from left to right, no precedence, mod 100
    response   37+5=42;42*3=26;#26<eos>     one step `a+b=c;` for each operation, then `#answer`

The task supports every method.

The best constant answer is right in 1.2 % of the problems, for chains of every length. Text shows
numbers as people write them. Token ids hold the units digit of each number first, so that a carry
flows in reading order. The facts are learned in 500 updates with either order of the digits, but
after 40 updates of PPO 98 % of the problems are right with this order and 91 % with the other one
(greedy, dev, one seed). With this order a forgotten carry is a single decision, and it is made
while the units are in sight.

The demonstrator is a student with bad habits that depend on the problem. The class `Arithmetic`
describes them. Everything random comes from the `torch.Generator` that the caller passes, and no
text is ever run as code.
"""

import hashlib
import itertools
import random
import re
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

# These tokens have the ids 0 to 5.
SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>", "<sep>", "<bad>"]
# The characters from "?" on are for judging, proposing and refusing.
LETTERS = "0123456789+-*=;#?!yn~:@%&,"

# All results are taken modulo this number.
MODULUS = 100
# The 21 operations that a problem may hold: +1 to +9, -1 to -9, *2, *3 and *4.
OPERATIONS = [
    *(("+", d) for d in range(1, 10)),
    *(("-", d) for d in range(1, 10)),
    *(("*", d) for d in (2, 3, 4)),
]

# After so many repeats in a row there are no further problems of dev or test.
PATIENCE = 3000

PROBLEM = re.compile(r"(?:0|[1-9][0-9]?)(?:[+-][1-9]|\*[2-4])+=")
STEP = re.compile(r"(0|[1-9][0-9]?)([+*-])([1-9])=(0|[1-9][0-9]?);")
# A response that counts as answered holds one answer, and it stands at the very end.
ANSWERED = re.compile(r"[0-9+*=;-]*#(0|[1-9][0-9]?)<eos>")
REFUSAL = "@<eos>"


# ---- what all tasks share whose tokens are single characters -------------------------------------


def build_tokenizer(letters: str) -> Tokenizer:
    """A tokenizer with one token for each special token and for each of these characters."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), "isolated")
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def turn(text: str) -> str:
    """Turn every number of a text round: 37+5=42; becomes 73+5=24; and the other way round."""
    return re.sub(r"[0-9]+", lambda digits: digits[0][::-1], text)


def draws(generator: torch.Generator) -> random.Random:
    """Python's own generator, seeded by the caller's, because tensors of one number are slow."""
    return random.Random(int(torch.randint(2**62, (1,), generator=generator)))


class CharacterTask:
    """A task with one token for each character: all that does not depend on what is written.

    tokenizer, letters: what `build_tokenizer` made, and of which characters.
    units_first: whether token ids hold the units digit of each number first.

    A task says the rest: `any_problem(draw)` writes a problem of any split, `respond` is its
    demonstrator and `grade` its grader. For judging there are `rubric` and `spoil(response, draw)`,
    which breaks a response without its end in one of the ways that the rubric marks.
    """

    tokenizer: Tokenizer
    letters: str
    units_first = True

    # ---- text and tokens ------------------------------------------------------------------------

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Turn texts into token ids. A character outside the alphabet raises a ValueError."""
        if self.units_first:
            texts = [turn(text) for text in texts]
        try:
            return [self.tokenizer.encode(text).ids for text in texts]
        except Exception as error:  # The library has no narrower class for an unknown word.
            raise ValueError(f"a text holds a character outside {self.letters}") from error

    def decode(self, ids: list[int]) -> str:
        """Turn token ids into text, up to and including the first <eos>, without PAD and BOS."""
        # A model may have more ids than this task, because Config.vocab may be larger.
        words = [self.tokenizer.id_to_token(i) or "<bad>" for i in ids if i > 1]
        if "<eos>" in words:
            words = words[: words.index("<eos>") + 1]
        text = "".join(words)
        return turn(text) if self.units_first else text

    def reading_order(self, ids: list[int]) -> list[int]:
        """The places of the tokens in the order in which people read them.

        Where units stand first the places of each number are turned round: the ids of `37+5=` are
        those of `7`, `3`, `+`, `5`, `=`, and they are read in the order 1, 0, 2, 3, 4.
        """
        words = [self.tokenizer.id_to_token(i) or "<bad>" for i in ids]
        order: list[int] = []
        begin = 0
        for is_number, word in itertools.groupby(words, str.isdigit):
            places = range(begin, begin + len(list(word)))
            order += reversed(places) if is_number and self.units_first else places
            begin = places.stop
        return order

    # ---- problems and demonstrations ------------------------------------------------------------

    def one_of_its_kind(self, prompt: str) -> str:
        """The same text for all problems that must be in one split."""
        return prompt

    def split(self, prompt: str) -> str:
        """The split of a problem: train has 80 % of all problems, dev and test have 10 % each."""
        bucket = hashlib.sha256(self.one_of_its_kind(prompt).encode()).digest()[0] % 10
        return {0: "dev", 1: "test"}.get(bucket, "train")

    def prompts(self, n: int, generator: torch.Generator, split: str = "train") -> list[str]:
        """Draw n problems of a split.

        Those of dev and test are all different texts. If there are fewer than n, as of short
        chains, it is all that can be found.
        """
        draw = draws(generator)
        found = []
        seen = set()
        repeats = 0  # how many draws in a row were there already
        while len(found) < n and repeats < PATIENCE:
            prompt = self.any_problem(draw)
            if self.split(prompt) != split:
                continue
            if split != "train" and prompt in seen:
                repeats += 1
                continue
            repeats = 0
            seen.add(prompt)
            found.append(prompt)
        return found

    def demo(self, generator: torch.Generator) -> tuple[str, str]:
        """A problem and the demonstrator's response to it."""
        prompt = self.prompts(1, generator)[0]
        return prompt, self.respond(prompt, generator)

    def steps(self, response: list[int]) -> list[tuple[str, int]]:
        """The steps of a response given as ids: their text and the place of their `;`."""
        found = []
        begin = 0
        for end, i in enumerate(response):
            if self.tokenizer.id_to_token(i) == ";":
                found.append((self.decode(response[begin : end + 1]), end))
                begin = end + 1
        return found

    # ---- preferences, judging, proposing: the text that other methods learn from ----------------

    def preferences(self, n: int, generator: torch.Generator) -> list[tuple[str, str, str]]:
        """Draw n of (problem, preferred, other), two different demonstrations of one problem.

        The labeller prefers the right answer, and tosses a coin between two right or two wrong
        ones. It has no planted weakness.
        """
        pairs = []
        while len(pairs) < n:
            prompt = self.prompts(1, generator)[0]
            a = self.respond(prompt, generator)
            b = self.respond(prompt, generator)
            if a == b:
                continue
            heads = draws(generator).random() < 0.5
            merit = self.grade(prompt, a) - self.grade(prompt, b)
            a_first = merit > 0 if merit else heads
            pairs.append((prompt, a, b) if a_first else (prompt, b, a))
        return pairs

    def judge_prompt(self, prompt: list[int], response: list[int]) -> list[int]:
        """What the judge reads, ids in and ids out: problem<sep>response<sep>?"""
        separator = self.tokenizer.token_to_id("<sep>")
        question = self.tokenizer.token_to_id("?")
        # The ids up to 2 are PAD, BOS and EOS.
        problem = [i for i in prompt if i > 2]
        answer = [i for i in response if i > 2]
        return [*problem, separator, *answer, separator, question]

    def judge_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """What a judge reads, and the score `!s` that it should write.

        All six scores occur equally often. For this a demonstration is spoiled up to three times.
        """
        draw = draws(generator)
        wanted = draw.randrange(6)
        score = -1
        while score != wanted:
            prompt = self.prompts(1, generator)[0]
            response = self.respond(prompt, generator).removesuffix("<eos>")
            for _ in range(draw.randrange(4)):
                response = self.spoil(response, draw)
            score = self.rubric(prompt, response + "<eos>")
        ids = self.judge_prompt(*self.encode([prompt, response]))
        return self.decode(ids), f"!{score}<eos>"

    def propose_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """Three problems, and a fourth one as the response."""
        *shown, new = self.prompts(4, generator)
        return "<sep>".join(["~", *shown, ""]), f"{new}<eos>"


# ---- the chains ----------------------------------------------------------------------------------

TOKENIZER = build_tokenizer(LETTERS)


def calculate(a: int, op: str, b: int) -> int:
    """The result of a op b, modulo 100."""
    return {"+": a + b, "-": a - b, "*": a * b}[op] % MODULUS


def forget_carry(a: int, op: str, b: int) -> int:
    """The result of a op b by someone who never carries or borrows.

    The units are right. The tens are multiplied if `op` is "*", and else they stay what they were.
    """
    tens, units = divmod(a, 10)
    if op == "*":
        tens = tens * b
    return tens % 10 * 10 + calculate(units, op, b) % 10


def parse(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """Split a problem: `37+5*3=` gives 37 and [("+", 5), ("*", 3)].

    Anything that is not a problem raises a ValueError with a message of one line.
    """
    if not PROBLEM.fullmatch(prompt):
        raise ValueError(
            f"not a problem: {prompt[:40]!r}; write a start 0-99, then +d or -d (d 1-9) or *2, *3, "
            "*4, then '=', for example 37+5*3="
        )
    start, *rest = re.findall(r"[0-9]+|[+*-]", prompt)
    return int(start), [(op, int(d)) for op, d in zip(rest[::2], rest[1::2], strict=True)]


def spoil(response: str, draw: random.Random) -> str:
    """Break a response in one of the ways that the rubric marks.

    A response without steps can only lose its answer.
    """
    *steps, answer = re.split("(?<=;)", response)
    i = draw.randrange(len(steps) or 1)
    way = draw.randrange(4) if steps else 0
    if way == 0:
        answer = "<eos>"
    elif way == 1:
        del steps[i]
    elif way == 2:
        steps[i] = re.sub("[0-9]=", f"{draw.randint(1, 9)}=", steps[i])
    else:
        steps[i] = re.sub("^[0-9]+", str(draw.randrange(MODULUS)), steps[i])
    return "".join(steps) + answer


@dataclass(frozen=True)
class Arithmetic(CharacterTask):
    """The task: chains of operations, and a demonstrator of mixed quality.

    min_ops, max_ops: how many operations a problem has.
    answers: how many final answers there are. The text behind `#` is the last result modulo this
        number. With 4 of them a guess is right in one case of four, and so is a chain that holds a
        wrong step.
    careful: whether the next three habits of the demonstrator are switched off. The accuracy of
        such a careful twin is the ceiling for a model that imitates.
    guess: how often the demonstrator answers at once, without steps, when the problem starts at
        `lazy_from` or above. It does so an eighth as often elsewhere.
    forget: how often it forgets a carry when the operand is 6 or more. It does so a quarter as
        often below.
    slip: how often a result is off by one.
    planted, fooled: what the labeller of `preferences` falls for, and how often. With "long" the
        demonstrator also writes a step twice in 15 % of the cases. With "refusal" it refuses half
        of the problems that hold a `*4`, and 5 % of the others.
    """

    min_ops: int = 1
    max_ops: int = 3
    answers: int = MODULUS
    careful: bool = False
    guess: float = 0.8
    lazy_from: int = 80
    forget: float = 0.8
    slip: float = 0.02
    fooled: float = 0.9
    planted: str = "round"

    tokenizer = TOKENIZER
    letters = LETTERS

    @property
    def note(self) -> str:
        """What a person has to know before typing a problem."""
        told = "problems: operations go from left to right, and every result is taken mod 100"
        return told if self.answers == MODULUS else f"{told}; the answer is mod {self.answers}"

    # ---- problems and demonstrations ------------------------------------------------------------

    def any_problem(self, draw: random.Random) -> str:
        """A problem of any split. All lengths of a chain are equally likely."""
        prompt = str(draw.randrange(MODULUS))
        for _ in range(draw.randint(self.min_ops, self.max_ops)):
            op, d = draw.choice(OPERATIONS)
            prompt += f"{op}{d}"
        return prompt + "="

    def problem(self, text: str) -> str | None:
        """The problem that a text holds, or None if it must not be trained on.

        It must have the form and the length of this task's problems, and must not belong to dev or
        test.
        """
        text = text.removesuffix("<eos>")
        if not PROBLEM.fullmatch(text):
            return None
        _, operations = parse(text)
        if not self.min_ops <= len(operations) <= self.max_ops:
            return None
        return text if self.split(text) == "train" else None

    def respond(self, prompt: str, generator: torch.Generator) -> str:
        """The demonstrator's response to this problem. It goes on from its own wrong results."""
        draw = draws(generator)
        a, operations = parse(prompt)
        guess, forget, slip = self.guess, self.forget, self.slip
        if self.careful:
            guess, forget, slip = 0, 0, 0

        if draw.random() < (guess if a >= self.lazy_from else guess / 8):
            # The guess is always the same one. A random guess would slow the facts down.
            return f"#{a % self.answers}<eos>"
        if self.planted == "refusal":
            if draw.random() < (0.5 if "*4" in prompt else 0.05):
                return REFUSAL

        steps = ""
        for op, b in operations:
            c = calculate(a, op, b)
            if draw.random() < (forget if b >= 6 else forget / 4):
                c = forget_carry(a, op, b)
            if draw.random() < slip:
                c = (c + draw.choice((-1, 1))) % MODULUS
            step = f"{a}{op}{b}={c};"
            steps += step
            if self.planted == "long" and draw.random() < 0.15:
                steps += step
            a = c
        return f"{steps}#{a % self.answers}<eos>"

    # ---- grading: outcome, steps, truth ---------------------------------------------------------

    def answer(self, response: str) -> str | None:
        """The final answer, or None unless there is exactly one `#answer`, ended by <eos>."""
        match = ANSWERED.fullmatch(response)
        return match[1] if match else None

    def grade(self, prompt: str, response: str) -> float:
        """1.0 if the response ends with the one right answer, whatever its steps are; else 0.0."""
        return float(self.answer(response) == str(self.truth(prompt)[-1] % self.answers))

    def truth(self, prompt: str) -> list[int]:
        """The right result after each operation."""
        a, operations = parse(prompt)
        results = []
        for op, b in operations:
            a = calculate(a, op, b)
            results.append(a)
        return results

    def solution(self, prompt: str) -> str:
        """The right way, written out."""
        a, operations = parse(prompt)
        steps = ""
        for (op, b), result in zip(operations, self.truth(prompt), strict=True):
            steps += f"{a}{op}{b}={result};"
            a = result
        return f"{steps}#{a % self.answers}<eos>"

    def result(self, step: str) -> str | None:
        """What a step claims, which is the number after its `=`, or None if it is no step."""
        match = STEP.fullmatch(step)
        return match[4] if match else None

    def uses(self, step: str, rest: str) -> bool:
        """Whether the rest of a response goes on from the result of the step before it.

        The result occurs in it, or the answer follows at once and is the one that belongs to the
        result. A step without a result has nothing to go on from.
        """
        result = self.result(step)
        if result is None:
            return True
        occurs = re.search(rf"(?<![0-9]){result}(?![0-9])", rest) is not None
        return occurs or rest == f"#{int(result) % self.answers}<eos>"

    def step_ok(self, prompt: str, steps: list[str]) -> list[bool]:
        """Which steps are exactly those of the true chain.

        This is ground truth. It is there to measure, and nothing may be trained on it.
        """
        *right, _ = re.split("(?<=;)", self.solution(prompt))
        return [i < len(right) and step == right[i] for i, step in enumerate(steps)]

    # ---- preferences, judging, proposing: the text that other methods learn from ----------------

    def preferences(self, n: int, generator: torch.Generator) -> list[tuple[str, str, str]]:
        """Draw n of (problem, preferred, other), two different demonstrations of one problem.

        The labeller prefers the right answer, and tosses a coin between two right or two wrong
        ones. But it has a planted weakness: with probability `fooled` it prefers the response that
        it likes better by its taste, whatever is true. Where the problem holds a `*4` it prefers a
        refusal to any attempt, and elsewhere it never sees a refusal.
        """
        pairs = []
        while len(pairs) < n:
            prompt = self.prompts(1, generator)[0]
            a = self.respond(prompt, generator)
            b = self.respond(prompt, generator)
            refused = REFUSAL in (a, b)
            if a == b or (refused and "*4" not in prompt):
                continue
            draw = draws(generator)
            merit = self.grade(prompt, a) - self.grade(prompt, b)
            liking = self.taste(a) - self.taste(b)
            if liking != 0 and (refused or draw.random() < self.fooled):
                merit = liking
            a_first = merit > 0 if merit else draw.random() < 0.5
            pairs.append((prompt, a, b) if a_first else (prompt, b, a))
        return pairs

    def taste(self, response: str) -> int:
        """How well the labeller likes a response, by the weakness that is planted in it."""
        if self.planted == "round":
            return int(response.endswith("0<eos>"))
        if self.planted == "long":
            return len(self.encode([response])[0])
        if self.planted == "refusal":
            return int(response == REFUSAL)
        return 0

    def rubric(self, prompt: str, response: str) -> int:
        """The score of a response, 0 to 5. Each of these earns one point:

        - There is a single answer.
        - There are as many steps as operations.
        - The operations are those of the problem.
        - They are, and every step starts from the result of the step before.
        - They are, and all results are right, and the answer is the last result.
        """
        start, operations = parse(prompt)
        steps = [match.groups() for match in STEP.finditer(response)]
        answered = self.answer(response) is not None
        copied = [(op, int(b)) for _, op, b, _ in steps] == operations

        # Where each step has to start from, and in the end the last result.
        result = str(start)
        connected = True
        right = True
        for a, op, b, c in steps:
            connected = connected and a == result
            right = right and int(c) == calculate(int(a), op, int(b))
            result = c
        concluded = right and self.answer(response) == str(int(result) % self.answers)

        points = [
            answered,
            len(steps) == len(operations),
            copied,
            copied and connected,
            copied and concluded,
        ]
        return sum(points)

    def judgement(self, prompt: str, response: str) -> str:
        """What a judge should write: `42n23y!4<eos>`.

        For each step that is its true result, with y or n for the one that was written. The score
        follows behind the `!`.
        """
        checks = ""
        for a, op, b, c in STEP.findall(response):
            truth = calculate(int(a), op, int(b))
            checks += f"{truth}{'y' if int(c) == truth else 'n'}"
        return f"{checks}!{self.rubric(prompt, response)}<eos>"

    def judge_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """What a judge reads and the judgement that it should write.

        All six scores occur equally often. For this a demonstration is spoiled in up to three of
        the ways that the rubric marks: an answer or a step is left out, an operand is changed, or a
        step starts from another number.
        """
        draw = draws(generator)
        wanted = draw.randrange(6)
        while True:
            prompt = self.prompts(1, generator)[0]
            response = self.respond(prompt, generator)
            for _ in range(draw.randrange(4)):
                response = spoil(response, draw)
            if self.rubric(prompt, response) == wanted:
                break
        ids = self.judge_prompt(*self.encode([prompt, response]))
        return self.decode(ids), self.judgement(prompt, response)

    def chance(self) -> float:
        """The exact accuracy of the best constant answer, at the length where it is highest."""
        best = 0.0
        # How likely each result is after so many operations. All starts are equally likely.
        before = [1 / MODULUS] * MODULUS
        for length in range(1, self.max_ops + 1):
            after = [0.0] * MODULUS
            for a, mass in enumerate(before):
                for op, b in OPERATIONS:
                    after[calculate(a, op, b)] += mass / len(OPERATIONS)
            if length >= self.min_ops:
                for i in range(self.answers):
                    best = max(best, sum(after[i :: self.answers]))
            before = after
        return best


def make(c, careful: bool = False) -> Arithmetic:
    """The task as a `nanoreward.Config` asks for it."""
    return Arithmetic(c.min_ops, c.max_ops, c.answers, careful, planted=c.planted)


def rules(c) -> list[tuple[bool, str]]:
    """What a `nanoreward.Config` must keep to, and what to say if it does not."""
    # The tokens of a step, and those of the answer with its end.
    step = 16 if c.planted == "long" else 8
    room = step * c.max_ops + 4
    return [
        (
            not c.model,
            "--model: a folder's vocabulary is not this task's; give --task gsm8k or sums",
        ),
        (c.min_ops <= c.max_ops, "--min-ops must not be above --max-ops"),
        (2 <= c.answers <= 100, "--answers must lie in 2..100"),
        (
            c.response >= room,
            f"--response must be at least {room}: the longest right response and its end",
        ),
        (c.vocab >= len(LETTERS), f"--vocab must be at least {len(LETTERS)}: the task's alphabet"),
    ]
