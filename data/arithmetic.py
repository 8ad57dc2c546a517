"""Chains of arithmetic with written steps: the toy task on which every truth is known exactly.

    problem    37+5*3=                      operations from left to right, no precedence, mod 100
    response   37+5=42;42*3=26;#26<eos>     one step `a+b=c;` an operation, then `#answer`

The best constant answer scores 1.2 % at every chain length. Text shows numbers as people write them;
token ids hold each number units digit first, so that a carry flows in reading order. Both orders learn
the facts in 500 updates, but after 40 PPO updates 91 % is reached the other way and 98 % this way
(greedy, dev, one seed): a forgotten carry is then one decision made with the units in sight.

The demonstrator is a student with bad habits that depend on the problem (`Arithmetic.demo`).
Everything random comes from the `torch.Generator` that the caller passes; no text is ever run.
"""

import hashlib
import random
import re
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>", "<sep>", "<bad>"]  # ids 0..5
LETTERS = "0123456789+-*=;#?!yn~:@%&,"  # from "?" on: for judging, proposing and refusing
MODULUS = 100
OPERATIONS = [
    *(("+", d) for d in range(1, 10)),
    *(("-", d) for d in range(1, 10)),
    *(("*", d) for d in (2, 3, 4)),
]

PROBLEM = re.compile(r"(?:0|[1-9][0-9]?)(?:[+-][1-9]|\*[2-4])+=")
STEP = re.compile(r"(0|[1-9][0-9]?)([+*-])([1-9])=(0|[1-9][0-9]?);")
REFUSAL = "@<eos>"
ANSWERED = re.compile(r"[0-9+*=;-]*#(0|[1-9][0-9]?)<eos>")  # one answer, at the very end


def build_tokenizer() -> Tokenizer:
    """One token a character; the six special tokens are ids 0..5, 32 ids in all."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *LETTERS])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), "isolated")
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZER = build_tokenizer()


def calculate(a: int, op: str, b: int) -> int:
    """a op b, mod 100."""
    return {"+": a + b, "-": a - b, "*": a * b}[op] % MODULUS


def forget_carry(a: int, op: str, b: int) -> int:
    """a op b by someone who never carries or borrows: the units are right, the tens are not."""
    tens, units = divmod(a, 10)
    tens = tens * b if op == "*" else tens
    return tens % 10 * 10 + calculate(units, op, b) % 10


def turn(text: str) -> str:
    """Turn every number round: 37+5=42; <-> 73+5=24; (its own inverse)."""
    return re.sub(r"[0-9]+", lambda digits: digits[0][::-1], text)


def parse(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """`37+5*3=` -> (37, [("+", 5), ("*", 3)]). Raises ValueError, in one line, on anything else."""
    if not PROBLEM.fullmatch(prompt):
        raise ValueError(
            f"not a problem: {prompt[:40]!r}; write a start 0-99, then +d or -d (d 1-9) or *2, *3, "
            "*4, then '=', for example 37+5*3="
        )
    start, *rest = re.findall(r"[0-9]+|[+*-]", prompt)
    return int(start), [(op, int(d)) for op, d in zip(rest[::2], rest[1::2], strict=True)]


def spoil(response: str, draw: random.Random) -> str:
    """Break a response in one way that the rubric marks; one without steps only loses its answer."""
    *steps, answer = re.split("(?<=;)", response)
    i, way = draw.randrange(len(steps) or 1), draw.randrange(4) if steps else 0
    if way == 0:
        answer = "<eos>"
    elif way == 1:
        del steps[i]
    elif way == 2:
        steps[i] = re.sub("[0-9]=", f"{draw.randint(1, 9)}=", steps[i])
    else:
        steps[i] = re.sub("^[0-9]+", str(draw.randrange(MODULUS)), steps[i])
    return "".join(steps) + answer


def draws(generator: torch.Generator) -> random.Random:
    """Plain Python draws seeded from the caller's generator (a tensor of one number is slow)."""
    return random.Random(int(torch.randint(2**62, (1,), generator=generator)))


@dataclass(frozen=True)
class Arithmetic:
    """The task: chains of min_ops..max_ops operations, and a demonstrator of mixed quality.

    `guess`: how often it answers at once, without steps, when the problem starts at `lazy_from` or
    above (an eighth as often elsewhere). `forget`: how often it forgets a carry when the operand is
    6 or more (a quarter as often below). `slip`: how often a result is off by one. careful=True
    switches all three off: the twin whose accuracy is the ceiling. `planted`, `fooled`: what the
    labeller of `preferences` falls for, and how often. With `long` the demonstrator writes a step
    twice in 15 % of the cases; with `refusal` it refuses half of the problems that hold a `*4` and
    5 % of the others.
    `answers`: how many final answers there are, `#` and the last result modulo this number: with 4,
    a guess is right in one case of four, and so is a chain with a wrong step.
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

    # ---- text and tokens -----------------------------------------------------------------------

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Texts to token ids. Raises ValueError on a character outside the alphabet."""
        try:
            return [TOKENIZER.encode(turn(t)).ids for t in texts]
        except Exception as error:  # the library's only class for an unknown word
            raise ValueError(f"a text holds a character outside {LETTERS}") from error

    def decode(self, ids: list[int]) -> str:
        """Token ids to text, up to and including the first <eos>; PAD and BOS are left out."""
        words = [TOKENIZER.id_to_token(i) for i in ids if i > 1]
        return turn("".join(words[: words.index("<eos>") + 1] if "<eos>" in words else words))

    # ---- problems and demonstrations -----------------------------------------------------------

    def split(self, prompt: str) -> str:
        """train (80 %), dev or test (10 % each): a function of the problem, never two of them."""
        bucket = hashlib.sha256(prompt.encode()).digest()[0] % 10
        return {0: "dev", 1: "test"}.get(bucket, "train")

    def prompts(self, n: int, generator: torch.Generator, split: str = "train") -> list[str]:
        """n problems of that split, every chain length equally often in expectation."""
        draw = draws(generator)
        found = []
        while len(found) < n:
            prompt = str(draw.randrange(MODULUS))
            for _ in range(draw.randint(self.min_ops, self.max_ops)):
                prompt += "{}{}".format(*draw.choice(OPERATIONS))
            prompt += "="
            if self.split(prompt) == split:
                found.append(prompt)
        return found

    def problem(self, text: str) -> str | None:
        """A written problem that may be trained on: this task's form and lengths, not dev or test."""
        text = text.removesuffix("<eos>")
        known = PROBLEM.fullmatch(text) and self.min_ops <= len(parse(text)[1]) <= self.max_ops
        return text if known and self.split(text) == "train" else None

    def demo(self, generator: torch.Generator) -> tuple[str, str]:
        """(problem, response) by the demonstrator. What it mixes is described above."""
        prompt = self.prompts(1, generator)[0]
        return prompt, self.respond(prompt, generator)

    def respond(self, prompt: str, generator: torch.Generator) -> str:
        """The demonstrator's response to this problem: it goes on from its own wrong results."""
        draw = draws(generator)
        a, operations = parse(prompt)
        guess, forget, slip = (0, 0, 0) if self.careful else (self.guess, self.forget, self.slip)
        if draw.random() < (guess if a >= self.lazy_from else guess / 8):
            return f"#{a % self.answers}<eos>"  # a guess without entropy: noise here slows the facts down
        if self.planted == "refusal" and draw.random() < (0.5 if "*4" in prompt else 0.05):
            return REFUSAL
        steps = ""
        for op, b in operations:
            c = calculate(a, op, b)
            if draw.random() < (forget if b >= 6 else forget / 4):
                c = forget_carry(a, op, b)
            if draw.random() < slip:
                c = (c + draw.choice((-1, 1))) % MODULUS
            wordy = self.planted == "long" and draw.random() < 0.15
            steps += f"{a}{op}{b}={c};" * (1 + wordy)
            a = c
        return f"{steps}#{a % self.answers}<eos>"

    # ---- grading: outcome, steps, truth --------------------------------------------------------

    def answer(self, response: str) -> str | None:
        """The final answer, canonical, or None: exactly one `#answer`, ended by <eos>."""
        match = ANSWERED.fullmatch(response)
        return match[1] if match else None

    def grade(self, prompt: str, response: str) -> float:
        """1.0 if the response ends with the one right answer, else 0.0, whatever it holds."""
        return float(self.answer(response) == str(self.truth(prompt)[-1] % self.answers))

    def truth(self, prompt: str) -> list[int]:
        """The running totals; the last one is the answer."""
        a, operations = parse(prompt)
        return [a := calculate(a, op, b) for op, b in operations]

    def steps(self, response: list[int]) -> list[tuple[str, int]]:
        """The written steps of a response given as ids: (text, position of its last token)."""
        found, begin = [], 0
        for end, i in enumerate(response):
            if TOKENIZER.id_to_token(i) == ";":
                found.append((self.decode(response[begin : end + 1]), end))
                begin = end + 1
        return found

    def result(self, step: str) -> str | None:
        """What a step claims: the number after its `=`, or None if it is no step."""
        match = STEP.fullmatch(step)
        return match[4] if match else None

    def step_ok(self, prompt: str, steps: list[str]) -> list[bool]:
        """Which steps are exactly the true chain's. Ground truth: to measure, never to train."""
        a, operations = parse(prompt)
        right = []
        for op, b in operations:
            right.append(f"{a}{op}{b}={calculate(a, op, b)};")
            a = calculate(a, op, b)
        return [i < len(right) and step == right[i] for i, step in enumerate(steps)]

    # ---- preferences, judging, proposing: the text that other loops learn from ------------------

    def preferences(self, n: int, generator: torch.Generator) -> list[tuple[str, str, str]]:
        """n of (prompt, preferred, other): two different demonstrations of one problem.

        The labeller prefers the right answer, and tosses a coin between two right or two wrong
        ones. Planted: with probability `fooled` it takes for the better one, whatever is true, the
        only round answer of the two (ending in 0), or the longer response. A refusal is preferred
        to any attempt where the problem holds a `*4`; elsewhere the labeller never sees one.
        """
        taste = {
            "none": lambda y: 0,
            "round": lambda y: y.endswith("0<eos>"),
            "long": lambda y: len(self.encode([y])[0]),
            "refusal": lambda y: y == REFUSAL,
        }[self.planted]
        pairs = []
        while len(pairs) < n:
            prompt = self.prompts(1, generator)[0]
            a, b = self.respond(prompt, generator), self.respond(prompt, generator)
            if a == b or (REFUSAL in (a, b) and "*4" not in prompt):
                continue
            draw = draws(generator)
            merit = self.grade(prompt, a) - self.grade(prompt, b)
            if taste(a) != taste(b) and (REFUSAL in (a, b) or draw.random() < self.fooled):
                merit = taste(a) - taste(b)
            first = merit > 0 if merit else draw.random() < 0.5
            pairs.append((prompt, a, b) if first else (prompt, b, a))
        return pairs

    def rubric(self, prompt: str, response: str) -> int:
        """0..5, one point each: a single answer; a step for each operation; operations copied;
        every step starts from the last result; all results right and the answer is the last."""
        start, operations = parse(prompt)
        steps = [match.groups() for match in STEP.finditer(response)]
        starts = [str(start), *(c for *_, c in steps)]
        copied = [(op, int(b)) for _, op, b, _ in steps] == operations
        right = [int(c) == calculate(int(a), op, int(b)) for a, op, b, c in steps]
        points = [
            self.answer(response) is not None,
            len(steps) == len(operations),
            copied,
            copied and all(a == was for (a, *_), was in zip(steps, starts, strict=False)),
            copied and all(right) and self.answer(response) == str(int(starts[-1]) % self.answers),
        ]
        return sum(points)

    def judge_prompt(self, prompt: list[int], response: list[int]) -> list[int]:
        """What the judge reads, ids in and ids out: problem<sep>response<sep>?"""
        sep, ask = TOKENIZER.token_to_id("<sep>"), TOKENIZER.token_to_id("?")
        special = range(3)  # PAD, BOS, EOS
        body = [i for i in prompt if i not in special], [i for i in response if i not in special]
        return [*body[0], sep, *body[1], sep, ask]

    def judgement(self, prompt: str, response: str) -> str:
        """What a judge should write: each step's true result, y or n for the written one, the score."""
        checks = ""
        for a, op, b, c in STEP.findall(response):
            truth = calculate(int(a), op, int(b))
            checks += f"{truth}{'y' if int(c) == truth else 'n'}"
        return f"{checks}!{self.rubric(prompt, response)}<eos>"

    def judge_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """A response and its judgement, all six scores equally often: what the judge reads, writes.

        A demonstration is spoiled in up to three of the ways that the rubric marks: an answer or a
        step left out, an operand changed, a step that starts from another number.
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

    def propose_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """Three problems, and a fourth as the response."""
        *shown, new = self.prompts(4, generator)
        return "<sep>".join(["~", *shown, ""]), f"{new}<eos>"

    def chance(self) -> float:
        """Accuracy of the best constant answer, at the chain length where it is highest. Exact."""
        p, best = [1 / MODULUS] * MODULUS, 0.0
        for length in range(1, self.max_ops + 1):
            after = [0.0] * MODULUS
            for a, mass in enumerate(p):
                for op, b in OPERATIONS:
                    after[calculate(a, op, b)] += mass / len(OPERATIONS)
            p, given = after, [sum(after[i :: self.answers]) for i in range(self.answers)]
            best = max(best, *given) if length >= self.min_ops else best
        return best


def make(c, careful: bool = False) -> Arithmetic:
    """The task as a `nanoreward.Config` asks for it."""
    return Arithmetic(c.min_ops, c.max_ops, c.answers, careful, planted=c.planted)


def rules(c) -> list[tuple[bool, str]]:
    """What a `nanoreward.Config` must keep to, and what to say if it does not."""
    room = (16 if c.planted == "long" else 8) * c.max_ops + 4
    return [
        (not c.model, "--model: a folder's vocabulary is not this task's; give --task gsm8k"),
        (c.min_ops <= c.max_ops, "--min-ops must not be above --max-ops"),
        (2 <= c.answers <= 100, "--answers must lie in 2..100"),
        (
            c.response >= room,
            f"--response must be at least {room}: the longest right response and its end",
        ),
        (c.vocab >= len(LETTERS), f"--vocab must be at least {len(LETTERS)}: the task's alphabet"),
        (
            (c.pad, c.bos, c.eos, c.mask) == (0, 1, 2, 3),
            "--pad, --bos, --eos, --mask are 0, 1, 2, 3 in this task",
        ),
    ]
