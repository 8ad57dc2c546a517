"""Sums in words, short enough that a CPU can train a pre-trained model on them.

    problem    What is 47 + 35 - 16?                 one operation or several, from left to right
    response   47 + 35 = 82\\n82 - 16 = 66<eos>      an equation for each of them

The task supports every method. It needs the folder of a model with a real vocabulary (`--model`).

A problem comes behind a few solved ones. If the folder has a chat template, they are earlier turns
of a chat, and the question is its last turn. Otherwise all of it is plain text. The attribute
`note` says which of the two it is.

A response gives its answer in its last line. Each line before it is a step. The solved problems
write an equation even for a single operation: behind results alone SmolLM2-135M-Instruct gets 4 %
of the additions and subtractions right in its chat template, and behind equations 22 %. No result
is negative, and no text is ever run as code.
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from data.folders import read_json, read_text, read_tokenizer
from data.gsm8k import (
    WordTask,
    canonical,
    draws,
    equations,
    holds,
    ids_of,
    number_of,
    numbers_of,
    unmarked,
)

# What stands in front of a question and behind it in plain text.
ASK = "Question: "
ANSWER = "\nAnswer:"
JUDGE = "\n\nScore from 0 to 5:"

# The solved problems are the first that this seed draws. They are the same in every run.
SHOTS_SEED = 0
# After so many useless draws in a row there are no further problems of dev or test.
PATIENCE = 3000
# Sizes of problems. With one operation and numbers up to 9 there are 126 of them.
SMALLEST, LARGEST = 9, 9999
MOST_OPERATIONS = 10
MOST_SHOTS = 32

QUESTION = re.compile(r"What is ((?:0|[1-9][0-9]*)(?: [+-] (?:0|[1-9][0-9]*))+)\?")


# ---- problems ------------------------------------------------------------------------------------


def parse(question: str) -> tuple[int, list[tuple[str, int]]]:
    """Split a question: `What is 47 + 35 - 16?` gives 47 and [("+", 35), ("-", 16)].

    Anything that is not a question raises a ValueError with a message of one line.
    """
    match = QUESTION.fullmatch(question)
    if not match:
        raise ValueError(f"not a problem: {question!r:.60}; write it as What is 47 + 35 - 16?")
    start, *rest = match[1].split(" ")
    numbers = [int(number) for number in rest[1::2]]
    return int(start), list(zip(rest[::2], numbers, strict=True))


def results(question: str) -> list[int]:
    """The right result after each operation of a question, from left to right."""
    value, operations = parse(question)
    found = []
    for op, number in operations:
        value = value + number if op == "+" else value - number
        found.append(value)
    return found


def bucket(question: str) -> int:
    """A number from 0 to 9 that is the same for all orders of the same numbers and signs.

    So 47 + 35 and 35 + 47 are in the same split.
    """
    start, operations = parse(question)
    added = [start]
    taken = []
    for op, number in operations:
        numbers = added if op == "+" else taken
        numbers.append(number)
    key = f"{sorted(added)} {sorted(taken)}"
    return hashlib.sha256(key.encode()).digest()[0] % 10


# ---- the chat template of a folder ---------------------------------------------------------------


def read_template(folder: Path) -> str:
    """The text of a folder's chat template. It is empty if the folder has none.

    A file of its own wins over tokenizer_config.json, as it does in transformers.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    template = read_settings(folder).get("chat_template") or ""
    if isinstance(template, list):
        # Some folders have several templates, each with a name.
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default") or ""
    if not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'} has a chat_template that is no text")
    return template


def read_settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says. It is empty if the folder has none."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a template may name, such as bos_token."""
    found = {}
    for name, token in read_settings(folder).items():
        # Some folders give the token itself, others say more about it.
        if isinstance(token, dict):
            token = token.get("content")
        if name.endswith("_token") and isinstance(token, str):
            found[name] = token
    return found


def render(template: str, messages: list[dict[str, str]], tokens: dict[str, str]) -> str:
    """The text of a chat whose next turn is the assistant's, by a template of Hugging Face.

    The sandbox keeps a template of a stranger from doing anything but write text. The function
    `strftime_now` is left out, since a prompt must not depend on the day.
    """
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **how: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False} | how)

    class Generation(jinja2.ext.Extension):
        """The tag that marks what an assistant has written; here it changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    # Some models would think aloud first, and a response has no room for that.
    about = {"add_generation_prompt": True, "enable_thinking": False}
    try:
        return environment.from_string(template).render(messages=messages, **tokens, **about)
    except Exception as error:  # a template is a program and may fail in any way
        raise ValueError(f"the chat template cannot be used: {error!s:.200}") from None


def has_jinja() -> bool:
    """Whether the package is installed that renders chat templates."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        return False
    return True


# ---- the task ------------------------------------------------------------------------------------


@dataclass
class Sums(WordTask):
    """The task: sums in words, written with the tokenizer and the ids of a model.

    min_ops, max_ops: how many operations a problem has.
    largest: the largest number in a problem. A result may be larger.
    shots: how many solved problems stand in front of each question.
    """

    folder: Path
    min_ops: int = 1
    max_ops: int = 1
    largest: int = 99
    shots: int = 4

    def __post_init__(self) -> None:
        path = Path(self.folder) / "tokenizer.json"
        self.tokenizer = read_tokenizer(path, self.vocab)
        # The same, but it reads special tokens where a text spells them. Only templates do.
        self.template_tokenizer = read_tokenizer(path, self.vocab)
        self.template_tokenizer.encode_special_tokens = False

        self.template = read_template(Path(self.folder))
        if not self.template:
            self.prompt_kind = "plain text, because the folder has no chat template"
        elif not has_jinja():
            self.template = ""
            self.prompt_kind = "plain text, because jinja2 is missing (pip install jinja2)"
        else:
            self.prompt_kind = "the chat template of the folder"
        # The front door prints this line.
        self.note = f"prompts: {self.prompt_kind}; solved problems in front: {self.shots}"

        self.examples: list[str] = []
        draw = random.Random(SHOTS_SEED)
        while len(self.examples) < self.shots:
            question = self.draw_question(draw)
            if bucket(question) > 1 and question not in self.examples:
                self.examples.append(question)
        self.head, self.tail = self.chat_frame() if self.template else self.plain_frame()
        self.refuse_lost_text()

    def plain_frame(self) -> tuple[str, str]:
        """What stands in front of a question and behind it in plain text."""
        head = ""
        for question in self.examples:
            head += f"{ASK}{question}{ANSWER}{self.worked_out(question)}\n\n"
        return head + ASK, ANSWER

    def chat_frame(self) -> tuple[str, str]:
        """What stands in front of a question and behind it in a chat."""
        messages = []
        for question in self.examples:
            answer = self.worked_out(question).removesuffix("<eos>")
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        asked = "What is 1 + 1?"
        messages.append({"role": "user", "content": asked})
        text = render(self.template, messages, special_tokens(Path(self.folder)))
        head, found, tail = text.rpartition(asked)
        if not found:
            raise ValueError("the chat template of the folder does not show the question")
        return head, tail

    def refuse_lost_text(self) -> None:
        """A ValueError if a problem does not come back from its ids as it was.

        Its answer could not be found. A tokenizer that writes all letters small is an example.
        """
        prompt = self.prompt("What is 98 + 76 - 54?")
        ids = [self.bos_id, *self.encode([prompt])[0]]
        if self.decode(ids) != prompt:
            raise ValueError(f"{self.folder}: its tokenizer.json cannot write {prompt[-60:]!r}")
        if self.vocab is not None and max(ids[1:]) >= self.vocab:
            raise ValueError(
                f"{self.folder}: its prompts hold the id {max(ids)}, but the vocabulary of the "
                f"model has only {self.vocab} ids"
            )

    # ---- text and tokens ------------------------------------------------------------------------

    def encode_text(self, text: str) -> list[int]:
        """One text as ids, without BOS.

        Only what the template of a problem says can become other special tokens than the end.
        """
        if not self.template or not self.is_prompt(text):
            return super().encode_text(text)
        ids = self.template_tokenizer.encode(text, add_special_tokens=False).ids
        # Many templates write BOS themselves, and whoever calls `encode` puts it in front.
        return ids[1:] if ids[:1] == [self.bos_id] else ids

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text, without PAD and BOS.

        Ids that are exactly those of a problem give the problem. All other texts end at their first
        <eos>. Words that spell <eos> are no end, and a space stands in their place.
        """
        ids = [i for i in ids if i != self.pad_id]
        if ids[:1] == [self.bos_id]:
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            for match in list(QUESTION.finditer(text))[-1:]:
                prompt = self.prompt(match[0])
                if self.encode([prompt])[0] == ids[1:]:
                    return prompt
        written = []
        ended = ""
        for i in ids:
            # In some models BOS is EOS.
            if i in self.ends:
                ended = "<eos>"
                break
            if i != self.bos_id:
                written.append(i)
        return unmarked(self.tokenizer.decode(written, skip_special_tokens=False)) + ended

    # ---- problems and demonstrations ------------------------------------------------------------

    def prompt(self, question: str) -> str:
        """The whole problem: the solved ones, the question, and what stands behind it."""
        return f"{self.head}{question}{self.tail}"

    def question(self, prompt: str) -> str:
        """The question that a problem asks, behind the solved ones.

        A question alone is a problem too. Anything else raises a ValueError.
        """
        question = prompt.removeprefix(self.head).removesuffix(self.tail)
        parse(question)
        return question

    def is_prompt(self, text: str) -> bool:
        """Whether a text is a whole problem."""
        framed = text.startswith(self.head) and text.endswith(self.tail)
        question = text.removeprefix(self.head).removesuffix(self.tail)
        return framed and QUESTION.fullmatch(question) is not None

    def split(self, prompt: str) -> str:
        """The split of a problem: train has 80 % of all problems, dev and test have 10 % each."""
        return {0: "dev", 1: "test"}.get(bucket(self.question(prompt)), "train")

    def draw_question(self, draw: random.Random) -> str:
        """Draw a question of any split. All numbers of operations are equally likely."""
        value = draw.randint(1, self.largest)
        text = f"{value}"
        for _ in range(draw.randint(self.min_ops, self.max_ops)):
            if value > 0 and draw.random() < 0.5:
                number = draw.randint(1, min(value, self.largest))
                text += f" - {number}"
                value -= number
            else:
                number = draw.randint(1, self.largest)
                text += f" + {number}"
                value += number
        return f"What is {text}?"

    def prompts(self, n: int, generator: torch.Generator, split: str = "train") -> list[str]:
        """Draw n problems of a split. The solved ones are never asked.

        Those of dev and test are all different. If there are fewer than n, it is all that can be
        found.
        """
        draw = draws(generator)
        found: list[str] = []
        seen = set(self.examples)
        useless = 0  # how many draws in a row gave nothing new
        while len(found) < n and useless < PATIENCE:
            question = self.draw_question(draw)
            useless += 1
            if self.split(question) != split or question in seen:
                continue
            useless = 0
            if split != "train":
                seen.add(question)
            found.append(self.prompt(question))
        return found

    def problem(self, text: str) -> str | None:
        """The problem that a text holds, or None if it must not be trained on.

        It must have the form and the size of this task's problems, must not belong to dev or test,
        and must not be one of the solved ones.
        """
        question = text.removesuffix("<eos>").strip()
        # Python refuses to read a number of thousands of digits.
        if len(question) > 200 or not QUESTION.fullmatch(question):
            return None
        start, operations = parse(question)
        numbers = [start, *(number for _, number in operations)]
        fits = self.min_ops <= len(operations) <= self.max_ops
        fits = fits and all(1 <= number <= self.largest for number in numbers)
        fits = fits and min(results(question)) >= 0
        if not fits or self.split(question) != "train" or question in self.examples:
            return None
        return self.prompt(question)

    def worked_out(self, question: str) -> str:
        """What the demonstrator writes: an equation for each operation."""
        value, operations = parse(question)
        lines = []
        for (op, number), result in zip(operations, results(question), strict=True):
            lines.append(f"{value} {op} {number} = {result}")
            value = result
        # In plain text a space follows `Answer:`.
        space = "" if self.template else " "
        return space + "\n".join(lines) + "<eos>"

    def demo(self, generator: torch.Generator) -> tuple[str, str]:
        """A problem and its solution."""
        prompt = self.prompts(1, generator)[0]
        return prompt, self.solution(prompt)

    # ---- grading: outcome, steps, truth ---------------------------------------------------------

    def answer(self, response: str) -> str | None:
        """The one number that the last line gives, in its one spelling.

        It is None when in doubt, and without an <eos> at the very end. A sum that is not worked
        out, as in `47 + 35`, gives no number. In `47 + 35 = 82` the number stands behind the last
        `=`, and the equation must be true.
        """
        text, _, behind = response.partition("<eos>")
        if not response.endswith("<eos>") or behind:
            return None
        last = text.strip().rpartition("\n")[2]
        given = numbers_of(last.rpartition("=")[2])
        try:
            number = number_of(last)
        except ValueError:
            return None
        return number if given == [number] else None

    def solution(self, prompt: str) -> str:
        """The right way that the demonstrator writes."""
        return self.worked_out(self.question(prompt))

    def truth(self, prompt: str) -> str:
        """The right answer, in its one spelling."""
        return str(results(self.question(prompt))[-1])

    def step_ok(self, prompt: str, steps: list[str]) -> list[bool]:
        """Which lines are right: they hold true equations only, and end with a result on the way.

        This is ground truth. It is there to measure, and nothing may be trained on it.
        """
        known = {str(result) for result in results(self.question(prompt))}
        found = []
        for step in steps:
            pairs = equations(step)
            true = len(pairs) > 0 and all(holds(left, right) for left, right in pairs)
            found.append(true and canonical(pairs[-1][1]) in known)
        return found

    def chance(self) -> float:
        """The accuracy of the best constant answer, at the number of operations where it is best.

        It is exact for all problems together.
        """
        size = self.largest * (self.max_ops + 1) + 1
        # How likely each result is after so many operations.
        mass = [0.0] * size
        mass[1 : self.largest + 1] = [1 / self.largest] * self.largest
        best = 0.0
        for length in range(1, self.max_ops + 1):
            # By how much each result is likelier than the one before it.
            rises = [0.0] * (size + 1)
            for value, share in enumerate(mass):
                if share == 0:
                    continue
                taken = min(value, self.largest)
                if taken > 0:
                    share /= 2
                    rises[value - taken] += share / taken
                    rises[value] -= share / taken
                rises[value + 1] += share / self.largest
                rises[value + self.largest + 1] -= share / self.largest
            mass = list(accumulate(rises))[:size]
            # What is left of a zero by rounding is no result.
            mass = [share if share > 1e-15 else 0.0 for share in mass]
            if length >= self.min_ops:
                best = max(best, *mass)
        return best

    # ---- preferences, judging, proposing: the text that other methods learn from ----------------

    def spoiled(self, response: str, draw: random.Random) -> str:
        """A solution whose last result is another number."""
        right = int(self.answer(response))
        near = [right + distance for distance in (-10, -2, -1, 1, 2, 10)]
        wrong = draw.choice([number for number in near if number >= 0])
        return response.removesuffix(f"{right}<eos>") + f"{wrong}<eos>"

    def rubric(self, prompt: str, response: str) -> int:
        """The score of a response, 0 to 5.

        It earns one point for an end, one for a single answer, two if that answer is right, and one
        more if all lines before it are right too.
        """
        *steps, _ = response.strip().split("\n")
        ended = response.endswith("<eos>")
        answered = self.answer(response) is not None
        right = self.grade(prompt, response) == 1
        return ended + answered + 2 * right + (right and all(self.step_ok(prompt, steps)))

    def judge_prompt(self, prompt: list[int], response: list[int]) -> list[int]:
        """What the judge reads, ids in and ids out: question, response, the question for a score.

        The solved problems are left out.
        """
        question = self.question(self.decode(prompt))
        special = {self.pad_id, self.bos_id, *self.ends}
        shown = [i for i in response if i not in special]
        asked, judged = self.encode([f"{question}{ANSWER}\n", JUDGE])
        return [*asked, *shown, *judged]

    def judge_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """What a judge reads and the score that it should write.

        The response is a whole solution, a spoiled one, or one that was cut before its last result.
        """
        prompt, response = self.demo(generator)
        draw = draws(generator)
        kind = draw.randrange(3)
        if kind == 1:
            response = self.spoiled(response, draw)
        elif kind == 2:
            response = response.removesuffix(f"{self.truth(prompt)}<eos>")
        score = self.rubric(prompt, response)
        asked = f"{self.question(prompt)}{ANSWER}\n" + response.removesuffix("<eos>") + JUDGE
        return asked, f" {score}<eos>"

    def propose_demo(self, generator: torch.Generator) -> tuple[str, str]:
        """Three questions, and a fourth one as the response."""
        *shown, new = [self.question(prompt) for prompt in self.prompts(4, generator)]
        asked = "".join(f"{ASK}{question}\n\n" for question in shown)
        return asked + ASK.rstrip(), f" {new}<eos>"


def make(c, careful: bool = False) -> Sums:
    """The task as a `nanoreward.Config` asks for it. Its demonstrator makes no errors anyway."""
    task = Sums(Path(c.model), c.min_ops, c.max_ops, c.largest, c.shots, **ids_of(c))
    numbers = " + ".join([str(c.largest)] * (c.max_ops + 1))
    room = len(task.encode([task.worked_out(f"What is {numbers}?")])[0])
    if c.response < room:
        raise ValueError(f"--response must be at least {room}: the longest solution and its end")
    return task


def rules(c) -> list[tuple[bool, str]]:
    """What a `nanoreward.Config` must keep to, and what to say if it does not."""
    words = Path(c.model) / "tokenizer.json"
    return [
        (bool(c.model), "--task sums needs a model that can read: --model FOLDER"),
        (
            words.exists(),
            f"{words} is not there: --task sums writes with the tokenizer of --model",
        ),
        (c.min_ops <= c.max_ops, "--min-ops must not be above --max-ops"),
        (c.max_ops <= MOST_OPERATIONS, f"--max-ops must be at most {MOST_OPERATIONS}"),
        (
            SMALLEST <= c.largest <= LARGEST,
            f"--largest must lie in {SMALLEST}..{LARGEST}: with less there are too few problems",
        ),
        (c.shots <= MOST_SHOTS, f"--shots must be at most {MOST_SHOTS}"),
    ]
