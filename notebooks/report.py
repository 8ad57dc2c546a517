"""A run as one page: python notebooks/report.py runs/x [runs/y ...] [--out file].

Reads nothing but the JSON of the run's folder and writes one HTML file that needs no network:
what training changed, its curves, its transcripts. What does not move is written here, so that it
is there without JavaScript; report_page/page.js adds what a reader chooses: filters, colours,
sliders. Several runs are compared.
"""

import argparse
import base64
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
from itertools import zip_longest
from pathlib import Path
from statistics import mean, median
from typing import Any
from urllib.parse import quote

PARTS = Path(__file__).resolve().parent / "report_page"
REFERENCE = Path(__file__).resolve().parent / "results" / "tour.json"
LOGS = ("metrics", "samples", "answers", "pairs")
LINKED = (
    ("config.json", "every number of every method"),
    ("summary.json", "the results"),
    ("metrics.jsonl", "a line for each update"),
    ("samples.jsonl", "the same problems at every look"),
    ("answers.jsonl", "every dev problem before and after"),
    ("pairs.jsonl", "pairs that were learned from"),
    ("curves.png", "the curves as a picture"),
)
KINDS = {
    "mended": "wrong → right",
    "broken": "right → wrong",
    "right": "always right",
    "wrong": "always wrong",
}
PAGE_BYTES = 1_800_000  # the page stays below 2 MB, whatever the run
ITEM_BYTES = 50_000  # what is longer is shown as texts, without its numbers
KEPT_OF_A_KIND = 40  # answers of one kind, method, seed and run
DRAWN = 100  # points of a drawn line
ROWS = 25  # rows of a curve's table
OTHERS = 24  # curves of numbers that WATCH does not know
OTHERS_BYTES = 60_000  # of all these curves of one method
OWN_LISTS = 6  # lists of a transcript, a number for each token, that the page does not know
OWN = "own:"  # how their names begin in the data of the page

ANY = math.inf  # no bound

# update -> the values of all seeds
Points = dict[int, list[float]]


# ==== what healthy numbers look like ====


def trend(points: Points) -> float:
    """The mean of the last fifth of the updates minus that of the first fifth."""
    means = [mean(values) for _, values in sorted(points.items())]
    fifth = max(1, len(means) // 5)
    return mean(means[-fifth:]) - mean(means[:fifth])


def is_fooled(drawn: dict[str, Points]) -> str:
    """Whether `reward` rises alone."""
    if len(drawn) == 2 and trend(drawn["reward"]) > 0.05 and trend(drawn["truth"]) < -0.02:
        return "reward rises and truth falls"
    return ""


def falls(drawn: dict[str, Points]) -> str:
    """Whether the log-prob of the chosen responses falls by more than a nat."""
    if "chosen" in drawn and trend(drawn["chosen"]) < -1:
        return f"chosen has changed by {trend(drawn['chosen']):.1f} nats"
    return ""


def grows(drawn: dict[str, Points]) -> str:
    """Whether responses became half as long again."""
    points = drawn["length"]
    first = mean(next(iter(points.values())))
    return f"length has grown by {trend(points):.0f}" if trend(points) > first / 2 else ""


def jumps(drawn: dict[str, Points]) -> str:
    """Whether a gradient is far larger than the others."""
    points = drawn["grad_norm"]
    usual = median(mean(values) for values in points.values())
    update, largest = max(((u, max(v)) for u, v in points.items()), key=lambda pair: pair[1])
    if usual > 0 and largest > 10 * usual:
        return f"{largest:.3g} at update {update}, ten times the usual {usual:.3g}"
    return ""


@dataclass(frozen=True)
class Watch:
    """A metric, or two on the same axes, with its healthy range in numbers and in words."""

    names: tuple[str, ...]
    low: float
    high: float
    healthy: str
    advice: str


CHECKS: dict[str, Callable[[dict[str, Points]], str]] = {
    "reward": is_fooled,
    "chosen": falls,
    "grad_norm": jumps,
    "length": grows,
}


def read_watch(line: str) -> Watch:
    """A line of the table below."""
    names, low, high, healthy, advice = (cell.strip() for cell in line.split("|"))
    return Watch(tuple(names.split()), float(low), float(high), healthy, advice)


# metrics | lowest | highest healthy value | what healthy is | what it means otherwise, what to do
WATCH = [
    read_watch(line)
    for line in """\
reward truth | -inf | inf | They rise together. | Only reward rises: it is fooled; raise --beta.
kl | -inf | 10 | A few nats a response. | Tens: the policy has left; raise --beta or lower --lr.
entropy | 0.001 | inf | Falls slowly. | Near 0: nothing new can be found.
clipfrac | 0 | 0.2 | Below 0.2; 0 with one step a batch. | Higher: steps are too large; lower --lr.
ended | 0.9 | 1 | Near 1. | 0: no response ends by itself, so all get the same penalty.
flat_groups | 0 | 0.99 | Below 1. | 1: all groups are dead (equal rewards) and teach nothing.
grad_norm | -inf | inf | Steady. | Jumps: lower --lr.
chosen rejected | -inf | inf | The gap grows, chosen does not fall. | chosen falls: raise --alpha.
pairs | 64 | inf | Enough for a round's updates. | Few: they are overfitted; more --prompts.
score | -inf | inf | Rises, dev with it. | Alone: only the judge is pleased; see --judge frozen.
spread | 0.5 | inf | Near 1 or above. | 0: one score for everything, the judge has collapsed.
unread quoted | 0 | 0.05 | Near 0. | Judgements without a score; responses that hold a score.
orm sorm | 0.4 | 0.97 | Rise from 0.5 to 0.8. | 0.5: nothing learned; near 1: more --prompts.
length | -inf | inf | As the demonstrations'. | Grows without truth: length is being paid for.
""".splitlines()
]


# ==== reading a run ====


@dataclass
class Run:
    """What one run's folder holds. Whatever is not there is empty, and `missing` says so."""

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    logs: dict[str, list[dict]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)  # method -> the name with what differs

    def label(self, loop: str) -> str:
        """The run's name in rows and curves of a method, with what differs if that is short."""
        return self.labels.get(loop, self.name)

    def results(self, loop: str = "") -> list[dict]:
        """The finished jobs, of one method or of all."""
        lines = as_list(self.summary.get("results"))
        found = [r for r in lines if isinstance(r, dict) and isinstance(r.get("loop"), str)]
        return [r for r in found if loop in ("", r["loop"])]

    def lines(self, log: str, loop: str) -> list[dict]:
        """The lines that a log holds of one method."""
        return [line for line in self.logs[log] if line["loop"] == loop]

    def loops(self) -> list[str]:
        """The run's methods, in the order of its configuration."""
        configured = list(as_dict(self.config.get("configs")))
        told = [line["loop"] for line in [*self.results(), *self.logs["metrics"]]]
        return list(dict.fromkeys([*configured, *told]))

    def preset(self) -> str:
        """What the run was sized by, as "laptop"."""
        return str(self.config.get("preset") or self.summary.get("config") or "unknown")


class BadRun(Exception):
    """A folder that no page can be made from; the text says why."""


def as_dict(value: Any) -> dict:
    """The value if it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """The value as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e300 else None


def numbers(results: list[dict], name: str) -> list[float]:
    """What the finished jobs say under a name, where they say something."""
    found = (number(r.get(name)) for r in results)
    return [x for x in found if x is not None]


def average(results: list[dict], *names: str) -> float | None:
    """The mean over seeds of the first of these names that each job holds."""
    found = (next((x for n in names if (x := number(r.get(n))) is not None), None) for r in results)
    held = [x for x in found if x is not None]
    return mean(held) if held else None


def read_object(path: Path, run: Run) -> dict:
    """A JSON file's object; if it cannot be read, nothing, and the run says why."""
    try:
        return as_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        run.missing.append(f"{path.name} is not there")
    except (OSError, ValueError):
        run.missing.append(f"{path.name} cannot be read")
    return {}


def read_lines(path: Path, run: Run) -> list[dict]:
    """The lines of a log. A torn last line, of a job at work, is left out without a word."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    found = []
    for at, text in enumerate(texts):
        try:
            line = as_dict(json.loads(text))
        except ValueError:
            if text and at < len(texts) - 1:
                run.missing.append(f"line {at + 1} of {path.name} cannot be read")
            continue
        line = {"seed": 0, "step": 0, **line}
        placed = number(line["seed"]) is not None and number(line["step"]) is not None
        if isinstance(line.get("loop"), str) and placed:
            found.append(line)
        else:
            run.missing.append(f"line {at + 1} of {path.name} cannot be read: it is no entry")
    return found


def read_run(folder: Path, name: str) -> Run:
    """What a run's folder holds, the parts of jobs that are still at work included."""
    if not folder.is_dir():
        raise BadRun(f"{folder} is not a folder")
    run = Run(folder, name)
    run.config = read_object(folder / "config.json", run)
    run.summary = read_object(folder / "summary.json", run)
    for log in LOGS:
        lines = read_lines(folder / f"{log}.jsonl", run)
        merged = {(line["loop"], line["seed"]) for line in lines}
        try:
            at_work = sorted(folder.glob(f"jobs/*/{log}.jsonl"))
        except FileNotFoundError:  # the last job has ended at this moment
            at_work = []
        for path in at_work:
            part = read_lines(path, run)
            lines += [line for line in part if (line["loop"], line["seed"]) not in merged]
        run.logs[log] = lines
    if not (run.config or run.summary or any(run.logs.values())):
        raise BadRun(f"{folder} holds no run: no config.json, summary.json or metrics.jsonl")
    run.missing += gaps(run)
    return run


def gaps(run: Run) -> list[str]:
    """What the page cannot show of a run, and why."""
    jobs = len(as_dict(run.config.get("configs"))) * int(number(run.config.get("seeds")) or 0)
    done = len(run.results())
    found = [f"{done} of {jobs} jobs are finished"] if done < jobs else []
    if not run.logs["metrics"]:
        found.append("no curves: metrics.jsonl holds nothing")
    if not run.logs["answers"]:
        found.append(
            "answers.jsonl holds nothing (an older run, or no job has finished), so the "
            "transcripts are the few problems that samples.jsonl follows"
        )
    if not run.logs["samples"]:
        found.append("no problem can be followed over training: samples.jsonl holds nothing")
    elif not any(as_list(line.get("tokens")) for line in run.logs["samples"]):
        found.append("samples.jsonl names no tokens (an older run): texts are cut into letters")
    if {"iterative_dpo", "self_rewarding"} & set(run.loops()) and not run.logs["pairs"]:
        found.append("no pairs can be shown: pairs.jsonl holds nothing")
    return found


def points_of(run: Run, loop: str, metric: str) -> Points:
    """A metric's values at each update, those of all seeds together."""
    found: Points = {}
    for line in run.lines("metrics", loop):
        value = number(line.get(metric))
        if value is not None:
            found.setdefault(int(line["step"]), []).append(value)
    return dict(sorted(found.items()))


# ==== text ====


def visible(text: Any) -> str:
    """Text with its control characters made visible, those that turn the writing included."""

    def show(match: re.Match) -> str:
        code = ord(match[0])
        if match[0] == "\n":
            return "↵\n"
        return chr(0x2400 + code) if code < 32 else f"⟨U+{code:04X}⟩"

    hidden = r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
    return re.sub(hidden, show, str(text))


def shown(text: Any) -> str:
    """Text of a model or a log, as harmless HTML."""
    return escape(visible(text))


def percent(share: float | None) -> str:
    """0.434 -> 43 %"""
    return "unknown" if share is None else f"{100 * share:.0f}\u00a0%"


def short(value: float | None) -> str:
    """A number as a table shows it."""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def listed(words: Iterable[str]) -> str:
    """ "a", "b", "c" -> "a, b and c" """
    *others, last = list(words) or [""]
    return f"{', '.join(others)} and {last}" if others else last


def table(key: str, caption: str, head: list[str], rows: list[list[str]]) -> str:
    """An HTML table of escaped cells in a box that scrolls sideways; the first cell is a header.

    The caption stands above the box, so that it does not scroll away. key: an id of its own.
    """
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = ""
    for first, *cells in rows:
        rest = "".join(f"<td>{cell}</td>" for cell in cells)
        body += f'<tr><th scope="row">{first}</th>{rest}</tr>\n'
    return (
        f'<p class="caption" id="{key}">{caption}</p>'
        f'<div class="scroll" role="region" aria-labelledby="{key}" tabindex="0">'
        f'<table aria-labelledby="{key}"><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody>'
        "</table></div>\n"
    )


def slug(text: str) -> str:
    """A name as part of an id."""
    return re.sub(r"\W", "-", text) or "unnamed"


# ==== pictures ====


def ticks(low: float, high: float) -> list[float]:
    """A few round numbers between low and high."""
    unit = 10 ** math.floor(math.log10(high - low))
    step = next(unit * part for part in (1, 0.5, 0.2, 0.1) if (high - low) / (unit * part) >= 3)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Points, kept: int) -> Points:
    """At most about so many of the updates, the first and the last among them."""
    every = -(-len(points) // kept) or 1
    steps = list(points)
    chosen = {*steps[::every], *steps[-1:]}
    return {step: points[step] for step in steps if step in chosen}


def spread_labels(levels: dict[str, float]) -> list[tuple[str, float]]:
    """Names at heights (0 to 100), moved apart so that none covers another."""
    placed: list[tuple[str, float]] = []
    for name, height in sorted(levels.items(), key=lambda level: level[1]):
        below = placed[-1][1] if placed else -ANY
        placed.append((name, max(height, below + 8)))
    over = max([0.0, *(height - 98 for _, height in placed)])
    return [(name, height - over) for name, height in placed]


@dataclass
class Chart:
    """Lines over updates as a picture, in words and as a table.

    lines: name -> points; levels: name -> height of a dashed line; healthy: a shaded range;
    expected: points of another run as a grey band; fixed: the ends of the upright axis; unjudged:
    lines to which the healthy range does not apply; drawn, rows: how much is drawn and told.
    """

    title: str
    lines: dict[str, Points]
    levels: dict[str, float] = field(default_factory=dict)
    healthy: tuple[float, float] = (-ANY, ANY)
    expected: Points = field(default_factory=dict)
    fixed: tuple[float, float] | None = None
    unjudged: frozenset[str] = frozenset()
    drawn: int = DRAWN
    rows: int = ROWS

    def __post_init__(self) -> None:
        """Find the ends of both axes."""
        everything = [*self.lines.values(), self.expected]
        steps = [step for points in everything for step in points]
        values = [x for points in everything for xs in points.values() for x in xs]
        self.last = max([1, *steps])
        low, high = self.fixed or (min(values, default=0), max(values, default=1))
        room = (high - low) or abs(high) or 1
        for bound in self.healthy:  # a bound that is near the values is worth seeing
            if not self.fixed and low - room <= bound <= high + room:
                low, high = min(low, bound), max(high, bound)
        if not self.fixed:
            room = 0.06 * (high - low) or abs(high) / 2 or 1
            low, high = low - room if low else 0, high + room
        self.low, self.high = low, high

    def x(self, step: float) -> str:
        """Where an update stands, from 0 at the left to 100."""
        return f"{100 * step / self.last:.5g}"

    def height(self, value: float) -> float:
        """How high a value stands, from 0 at the bottom to 100."""
        share = (value - self.low) / (self.high - self.low)
        return 100 * min(1.0, max(0.0, share))

    def y(self, value: float) -> str:
        """Where a value stands, from 0 at the top to 100."""
        return f"{100 - self.height(value):.5g}"

    def band(self, points: Points, style: str) -> str:
        """The area between the lowest and the highest seed."""
        there = [f"{self.x(step)},{self.y(max(values))}" for step, values in points.items()]
        back = [f"{self.x(step)},{self.y(min(values))}" for step, values in points.items()]
        return f'<polygon class="{style}" points="{" ".join(there + back[::-1])}"/>'

    def outside(self) -> dict[str, Points]:
        """The values of each line that are not in the healthy range."""
        low, high = self.healthy
        found: dict[str, Points] = {}
        judged = {n: points for n, points in self.lines.items() if n not in self.unjudged}
        for name, points in judged.items():
            for step, values in points.items():
                bad = [x for x in values if not low <= x <= high]
                if bad:
                    found.setdefault(name, {})[step] = bad
        return found

    def drawing(self) -> str:
        """The shapes of the picture, from back to front."""
        shapes = ""
        if any(map(math.isfinite, self.healthy)):
            low, high = (self.height(bound) for bound in self.healthy)
            shapes += f'<rect class="healthy" width="100" y="{100 - high:.5g}" '
            shapes += f'height="{high - low:.5g}"/>'
        if self.expected:
            shapes += self.band(self.expected, "expected")
        for level in self.levels.values():
            shapes += f'<path class="level" d="M0 {self.y(level)}H100"/>'
        for at, points in enumerate(self.lines.values()):
            drawn = thinned(points, self.drawn)
            middle = [f"{self.x(step)} {self.y(mean(values))}" for step, values in drawn.items()]
            if any(len(values) > 1 for values in drawn.values()):
                shapes += self.band(drawn, f"band hue-{at % 6}")
            shapes += f'<path class="line hue-{at % 6}" d="M{"L".join(middle)}"/>'
            if len(middle) <= 20:  # a look is a dot: a line without length and with a round end
                dots = "".join(f"M{point}h0" for point in middle)
                shapes += f'<path class="dot hue-{at % 6}" d="{dots}"/>'
        for points in self.outside().values():
            marked = "".join(
                f"M{self.x(step)} {self.y(max(values, key=abs))}h0"
                for step, values in thinned(points, self.drawn).items()
            )
            shapes += f'<path class="outside" d="{marked}"/>'
        return shapes

    def words(self) -> str:
        """The picture in a sentence for each line."""
        told = []
        for name, points in self.lines.items():
            steps = list(points)
            first, last = (mean(points[step]) for step in (steps[0], steps[-1]))
            told.append(
                f"{name}: {short(first)} at update {steps[0]}, {short(last)} at update {steps[-1]}."
            )
        return " ".join(told)

    def html(self, key: str) -> str:
        """The figure; key: an id that no other figure has."""
        marks = ""
        for value in ticks(self.low, self.high):
            marks += f'<span class="y" style="top:{self.y(value)}%">{value:.3g}</span>'
        for name, height in spread_labels({n: self.height(v) for n, v in self.levels.items()}):
            marks += f'<span class="name" style="top:{100 - height:.4g}%">{escape(name)}</span>'
        for step in (0, self.last):
            marks += f'<span class="x" style="left:{self.x(step)}%">update {step}</span>'
        legend = "".join(
            f'<li class="hue-{at % 6}">{shown(name)}</li>' for at, name in enumerate(self.lines)
        )
        if self.expected:
            legend += '<li class="grey">five seeds of the project\'s own run</li>'
        if any(map(math.isfinite, self.healthy)):
            legend += '<li class="green">healthy</li>'
        if self.outside():
            legend += '<li class="square">outside</li>'
        rows = []
        for name, points in self.lines.items():
            for step, values in thinned(points, self.rows).items():
                cells = (mean(values), min(values), max(values))
                rows.append([str(step), shown(name), *(short(float(x)) for x in cells)])
        head = ["update", "line", "mean", "lowest", "highest"]
        data = table(f"{key}-n", shown(self.title), head, rows)
        named = "named" if self.levels else ""
        return (
            f'<figure><figcaption>{shown(self.title)}</figcaption><ul class="legend">{legend}</ul>'
            f'<div class="plot {named}"><svg role="img" aria-labelledby="{key}-t {key}-d" '
            f'viewBox="0 0 100 100" preserveAspectRatio="none"><title id="{key}-t">'
            f'{shown(self.title)}</title><desc id="{key}-d">{shown(self.words())}</desc>'
            f'{self.drawing()}</svg><div aria-hidden="true">{marks}</div></div>'
            f"<details><summary>The curve in numbers</summary>{data}</details></figure>\n"
        )


# ==== the first screen ====


def kind_of(before: float | None, after: float | None) -> str:
    """What training did to an answer: one of KINDS, or nothing if a reward is missing."""
    if before is None or after is None:
        return ""
    if before >= 0.5:
        return "right" if after >= 0.5 else "broken"
    return "mended" if after >= 0.5 else "wrong"


def answers_of(run: Run, loop: str) -> list[dict]:
    """Problems before and after. Without answers.jsonl: the first and last look of the samples."""
    found = run.lines("answers", loop)
    if not found:
        looks: dict[tuple, list[dict]] = {}
        for line in run.lines("samples", loop):
            looks.setdefault((line["seed"], str(line.get("prompt"))), []).append(line)
        for several in looks.values():
            first, *_, last = sorted([*several, several[-1]], key=lambda line: line["step"])
            if first["step"] < last["step"]:
                found.append({**last, "before": first, "after": last})
    kept = []
    for line in found:
        before, after = as_dict(line.get("before")), as_dict(line.get("after"))
        kind = kind_of(number(before.get("reward")), number(after.get("reward")))
        if kind:
            kept.append({**line, "before": before, "after": after, "kind": kind})
    return kept


def start_of(results: list[dict]) -> float | None:
    """Where a method started on test: its own start, or else the base."""
    return average(results, "start", "base")


def over_seeds(results: list[dict]) -> str:
    """How to read a number that is a mean."""
    return f" (mean of {len(results)} seeds)" if len(results) > 1 else ""


def plural(count: float, word: str) -> str:
    """1 update, 2 updates"""
    return f"{count:.0f} {word}{'' if count == 1 else 's'}"


def counted(count: int, what: str) -> str:
    """Two methods, 12 methods: a small number in words."""
    small = ("no", "one", "two", "three", "four", "five", "six")
    return f"{small[count] if count < len(small) else count} {what}"


def mended_and_broken(results: list[dict]) -> str:
    """What happened to dev problems, as a sentence; nothing if it was not counted."""
    mended, broken = average(results, "mended"), average(results, "broken")
    if mended is None or broken is None:
        return ""
    seeds = f", on average over {len(results)} seeds," if len(results) > 1 else ""
    wrong = (
        "problem that was wrong is" if f"{mended:.0f}" == "1" else "problems that were wrong are"
    )
    right = "that was right is" if f"{broken:.0f}" == "1" else "that were right are"
    return f"On dev{seeds} {mended:.0f} {wrong} right now, and {broken:.0f} {right} wrong."


def sentence(loop: str, results: list[dict]) -> str:
    """The result of one method in plain English."""
    if not results:
        return f"No job of {loop} is finished yet: what it has logged so far is below."
    updates = plural(average(results, "updates") or 0, "update")
    problems = short(next(iter(numbers(results, "problems")), None))
    told = f"Before training the base model answered {percent(average(results, 'base'))} of "
    told += f"{problems} held-out problems right; "
    start = average(results, "start")
    if start is not None:
        told += f"{loop} starts from another model, at {percent(start)}; "
    told += f"after {updates} of {loop} it is {percent(average(results, 'final'))}"
    return f"{told}{over_seeds(results)}. {mended_and_broken(results)}".strip()


def strip(results: list[dict]) -> str:
    """A bar of all dev problems: always right, mended, broken, always wrong."""
    names = ("start_dev", "dev_problems", "mended", "broken")
    start, total, mended, broken = (average(results, name) for name in names)
    if start is None or not total or mended is None or broken is None:
        return ""
    right = start * total - broken
    shares = {"right": right, "mended": mended, "broken": broken}
    shares["wrong"] = total - sum(shares.values())
    parts = "".join(
        f'<span class="{kind}" style="width:{100 * max(0, count) / total:.4g}%"></span>'
        for kind, count in shares.items()
    )
    words = [f"{KINDS[kind]} {max(0, count):.0f}" for kind, count in shares.items()]
    keys = "".join(
        f'<li class="{kind}">{text}</li>' for kind, text in zip(shares, words, strict=True)
    )
    return f'<span class="strip" aria-hidden="true">{parts}</span><ul class="keys">{keys}</ul>'


def dumbbell(run: Run, loop: str, name: str) -> str:
    """A method's way from its start to its end, as a row that leads to its section."""
    results = run.results(loop)
    link = f'<a href="#{slug(loop)}">{shown(name)}</a>'
    start, end = start_of(results), average(results, "final")
    if start is None or end is None:
        return f'<li class="way"><b>{link}</b><span class="told">not finished</span></li>\n'
    marks = ""
    for level in ("chance", "base", "ceiling"):
        value = average(results, level)
        if value is not None:
            marks += f'<i class="{level}" style="left:{100 * value:.4g}%"></i>'
    ends = numbers(results, "final")
    low, high = 100 * min(ends), 100 * max(ends)
    left, right = sorted((100 * start, 100 * end))
    marks += f'<i class="way-line" style="left:{left:.4g}%;width:{right - left:.4g}%"></i>'
    marks += f'<i class="spread" style="left:{low:.4g}%;width:{high - low:.4g}%"></i>'
    marks += f'<i class="from" style="left:{100 * start:.4g}%"></i>'
    marks += f'<i class="to" style="left:{100 * end:.4g}%"></i>'
    seeds = ""
    if len(ends) > 1:
        seeds = f" <small>{low:.0f} to {high:.0f} over {len(ends)} seeds</small>"
    return (
        f'<li class="way"><b>{link}</b><span class="track" aria-hidden="true">{marks}</span>'
        f'<span class="told">{percent(start)} → <strong>{percent(end)}</strong>{seeds}</span>'
        f"{strip(results)}</li>\n"
    )


def split(transcript: dict) -> list[str]:
    """A response's tokens; where none are named, its letters."""
    tokens = [str(token) for token in as_list(transcript.get("tokens"))]
    return tokens or re.findall(r"<eos>|.", str(transcript.get("response", "")), re.DOTALL)


def marked(transcript: dict, at: int, note: str) -> str:
    """A response around its token number `at`, which is marked."""
    tokens = split(transcript)
    first = max(0, at - 60)
    parts = (tokens[first:at], tokens[at : at + 1], tokens[at + 1 : at + 60])
    before, spot, after = (shown("".join(part)) for part in parts)
    before = f"… {before}" if first else before
    after += " …" if len(tokens) > at + 60 else ""
    return (
        f'<code><bdi>{before}<mark title="{note}">{spot or "(nothing)"}</mark>{after}</bdi></code>'
    )


def example(run: Run, loop: str) -> str:
    """One problem before and after, with the first token that differs marked."""
    answers = answers_of(run, loop)
    changed = [
        a for a in answers if str(a["before"].get("response")) != str(a["after"].get("response"))
    ]

    def taste(a: dict) -> tuple:
        """Mended first, a difference inside the response, not too long to read."""
        both = zip(split(a["before"]), split(a["after"]), strict=False)
        same = next((i for i, (x, y) in enumerate(both) if x != y), 0)
        return list(KINDS).index(a["kind"]), same < 3, len(split(a["after"])) > 80

    if not changed:
        return ""
    chosen = min(changed, key=taste)
    both = [split(chosen["before"]), split(chosen["after"])]
    at = next(i for i, (x, y) in enumerate(zip_longest(*both)) if x != y)
    prompt = str(chosen.get("prompt", ""))
    prompt = prompt if len(prompt) <= 400 else f"… {prompt[-400:]}"
    lucky = ""
    rows = f"<dt>problem</dt><dd><code><bdi>{shown(prompt)}</bdi></code></dd>"
    for when in ("before", "after"):
        right = (number(chosen[when].get("reward")) or 0) >= 0.5
        luck = " by luck" if False in as_list(chosen[when].get("steps_right")) else ""
        verdict = f'<b class="good">✓ right{luck}</b>' if right else '<b class="bad">✗ wrong</b>'
        lucky = lucky or (luck if right else "")
        note = "the first token that differs"
        rows += f"<dt>{when}</dt><dd>{marked(chosen[when], at, note)} {verdict}</dd>"
    told = "Marked: the first token that differs."
    if lucky:
        told += " Right by luck: the answer is right although a step is wrong."
    return (
        f'<div class="example"><h2>One problem, before and after {shown(loop)}</h2><dl>{rows}</dl>'
        f'<p class="quiet">{told}</p></div>'
    )


def ranked(runs: list[Run], loops: list[str]) -> list[tuple[Run, str, float]]:
    """The finished runs and methods with the accuracy at their ends, the highest first."""
    found = []
    for run in runs:
        for loop in loops:
            if results := run.results(loop):
                found.append((run, loop, average(results, "final") or 0))
    return sorted(found, key=lambda rival: -rival[2])


def uncertainty(problems: float) -> float:
    """By how many points so many problems leave an accuracy uncertain, at most."""
    return 98 / problems**0.5


def verdict_of(rivals: list[tuple[Run, str, float]]) -> str:
    """Which of several results is the best, and which are too close to it to tell."""
    run, loop, highest = rivals[0]
    problems = next(iter(numbers(run.results(loop), "problems")), 0)
    points = uncertainty(problems) if problems > 0 else 0
    several = len({one.name for one, _, _ in rivals}) > 1
    close = [
        f"{name} of {one.label(name)}" if several else name
        for one, name, end in rivals
        if 100 * (highest - end) <= points + 1e-9
    ]
    what = counted(len(rivals), "results" if several else "methods")
    if len(close) == len(rivals):
        return f"{listed(close)} ended too close to tell apart."
    if len(close) > 1:
        return f"Of {what} {listed(close)} ended highest, too close to tell apart."
    return f"Of {what} {close[0]} ended {'higher' if len(rivals) == 2 else 'highest'}."


def comparison(runs: list[Run], loops: list[str]) -> str:
    """A row for each run and method that has a result."""
    rows = []
    for loop in loops:
        for run in runs:
            results = run.results(loop)
            if not results:
                continue
            shares = (average(results, "base"), start_of(results), average(results, "final"))
            base, start, end = ("" if x is None else f"{x:.3f}" for x in shares)
            ends = numbers(results, "final")
            if len(ends) > 1:
                end += f" ({min(ends):.3f} to {max(ends):.3f})"
            names = ("mended", "broken", "samples", "seconds")
            counts = [average(results, name) for name in names]
            mended, broken, samples, seconds = (
                "unknown" if x is None else f"{x:,.0f}" for x in counts
            )
            reached = numbers(results, "samples_to_80")
            late = f"{mean(reached):,.0f}" if len(reached) == len(results) else "not by all"
            late = late if reached else "never"
            name = f"{run.label(loop)} {loop}" if len(runs) > 1 else loop
            cells = [str(len(results)), base, start, end, mended, broken, samples, late, seconds]
            rows.append([shown(name), *cells])
    head = ["method", "seeds", "base", "start", "end"]
    head += ["mended", "broken", "samples", "to 80 %", "seconds"]
    caption = "Accuracies are of test, mended and broken of dev"
    if any(len(run.results(loop)) > 1 for run in runs for loop in loops):
        caption += "; means over seeds"
    return table("table-results", caption, head, rows) if rows else ""


def dots_and_bar(results: list[dict], barred: bool) -> str:
    """Which problems the picture counts. barred: whether it has bars of dev problems."""
    total = next(iter(numbers(results, "problems")), 0)
    told = f"Dots: {total:.0f} held-out test problems, greedy." if total > 0 else ""
    told = told or "Dots: held-out test problems, greedy."
    if barred:
        dev = next(iter(numbers(results, "dev_problems")), 0)
        told += f" Bar: {dev:.0f} other held-out problems (dev), before and after."
        told += " Dev is asked during the training too, test only before and after it."
    if total > 0:
        told += f" {total:.0f} problems leave an accuracy uncertain by up to"
        told += f" ± {uncertainty(total):.1f} points."
    return told


def differences(first: Run, run: Run, loop: str) -> dict[str, str] | None:
    """What differs between two runs of a method: name -> the second run's; None if not known."""
    both = [as_dict(one.summary.get("changed")).get(loop) for one in (first, run)]
    if not all(isinstance(changed, dict) for changed in both):
        return None
    before, now = map(as_dict, both)
    config = as_dict(as_dict(run.config.get("configs")).get(loop))
    found = {}
    for name in dict.fromkeys([*now, *before]):
        if name not in now or name not in before or now[name] != before[name]:
            value = now.get(name, config.get(name, "the default"))
            found[name] = short(value) if number(value) is not None else str(value)
    return found


def apart(first: Run, run: Run) -> dict[str, str]:
    """What differs between two runs outside of the numbers of a method."""
    found = {"preset": run.preset()} if run.preset() != first.preset() else {}
    seeds = run.config.get("seeds")
    return found | ({"seeds": str(seeds)} if seeds != first.config.get("seeds") else {})


def name_differences(runs: list[Run]) -> None:
    """Give each run its labels: its name and what differs from the first run, if it is short."""
    for run in runs[1:]:
        for loop in [x for x in run.loops() if x in runs[0].loops()]:
            told = apart(runs[0], run) | (differences(runs[0], run, loop) or {})
            if 0 < len(told) <= 2:
                words = listed(f"{name} {value}" for name, value in told.items())
                run.labels[loop] = f"{run.name} ({words})" if len(words) <= 40 else run.name


def differing(runs: list[Run]) -> str:
    """What differs between the first run and each of the others, as paragraphs."""
    paragraphs = ""
    for run in runs[1:]:
        first = runs[0]
        shared = [loop for loop in run.loops() if loop in first.loops()]
        words = {"preset": "its preset", "seeds": "its number of seeds"}
        told = [f"{words[name]} is {value}" for name, value in apart(first, run).items()]
        unknown = []
        for loop in shared:
            found = differences(first, run, loop)
            if found is None:
                unknown.append(loop)
            of = f" of {loop}" if len(shared) > 1 else ""
            told += [f"{name}{of} is {value}" for name, value in (found or {}).items()]
        if set(run.loops()) != set(first.loops()):
            told.append(f"its methods are {listed(run.loops())}")
        sentences = []
        if told:
            sentences.append(f"{run.name} differs from {first.name}: {listed(told)}.")
        if unknown:
            what = f"numbers of {listed(unknown)}"
            between = f"between {first.name} and {run.name}"
            sentences.append(f"Whether {what} differ {between} is not said.")
        if not sentences:
            sentences.append(f"No number differs between {first.name} and {run.name}.")
        paragraphs += f'<p class="apart">{shown(" ".join(sentences))}</p>\n'
    return paragraphs


def first_screen(runs: list[Run], loops: list[str]) -> str:
    """The result as a sentence, a picture and one problem."""
    rivals = ranked(runs, loops)
    if not rivals:
        waiting = "No job is finished yet: what is logged so far is below."
        return f'<p class="lead">{waiting}</p>{differing(runs)}'
    run, loop, _ = rivals[0]
    label = f"{verdict_of(rivals)} " if len(rivals) > 1 else ""
    told = f'<p class="lead">{shown(label)}'
    told += f"{shown(sentence(loop, run.results(loop)))}</p>\n"
    if len(runs) > 1:
        told = f"<div>{told}{differing(runs)}</div>"
    ways = ""
    for loop_of_row in loops:
        for one in runs:
            if loop_of_row in one.loops():
                name = f"{loop_of_row}, {one.label(loop_of_row)}" if len(runs) > 1 else loop_of_row
                ways += dumbbell(one, loop_of_row, name)
    results = [r for one in runs for r in one.results()]
    lines = []
    for level in ("chance", "base", "ceiling"):
        value = average(results, level)
        if value is not None:
            lines.append(f'<li class="{level}">{level} {percent(value)}</li>')
    return (
        f'<div class="top">{told}{example(run, loop)}</div>\n'
        '<div class="picture"><h2>From start to end</h2><ul class="levels">'
        '<li class="from">before training</li><li class="to">after training</li>'
        f'{"".join(lines)}</ul><ul class="ways">{ways}</ul>'
        f'<p class="quiet">{dots_and_bar(results, "strip" in ways)}</p></div>\n'
        + (comparison(runs, loops) if len(runs) > 1 else "")
    )


# ==== a method's section ====


def is_usual(run: Run, loop: str) -> bool:
    """Whether the project's own run had the same numbers: laptop, arithmetic, nothing changed."""
    changed = run.summary.get("changed")
    config = as_dict(as_dict(run.config.get("configs")).get(loop))
    same = isinstance(changed, dict) and not changed.get(loop)
    return run.preset() == "laptop" and config.get("task", "arithmetic") == "arithmetic" and same


def expected_points(reference: dict, loop: str) -> Points:
    """The dev accuracies of a method in the project's own run."""
    found: Points = {}
    for name, curve in as_dict(reference.get("curves")).items():
        if name.rpartition("/")[0] == loop:
            for point in filter(as_dict, as_list(curve)):
                step, value = number(point.get("step")), number(point.get("dev_greedy"))
                if step is not None and value is not None:
                    found.setdefault(int(step), []).append(value)
    return dict(sorted(found.items()))


def patience(expected: Points) -> str:
    """Until when a flat curve is normal, by the project's own run."""
    means = {step: mean(values) for step, values in expected.items()}
    start = next(iter(means.values()))
    for step, value in means.items():
        if value >= start + 0.05:
            return (
                f"A flat start is normal until update {step}: only then had the project's own run "
                "gained 5 points."
            )
    return "A flat start is normal: the project's own run never gained 5 points."


def accuracy(runs: list[Run], loop: str, reference: dict) -> str:
    """Dev accuracy over the updates of all runs."""
    lines = {}
    for run in runs:
        points = points_of(run, loop, "dev_greedy")
        starts = numbers(run.results(loop), "start_dev")
        if starts and points:
            points = {0: starts, **points}
        if points:
            seeds = max(map(len, points.values()))
            complete = {step: xs for step, xs in points.items() if len(xs) == seeds}
            lines[run.label(loop) if len(runs) > 1 else loop] = complete
    if not lines:
        return '<p class="quiet">No look at dev is logged yet, so there is no curve.</p>'
    results = [r for run in runs for r in run.results(loop)]
    names = ("chance", "base", "start", "ceiling")
    levels = {n: x for n in names if (x := average(results, n)) is not None}
    usual = any(is_usual(run, loop) for run in runs)
    expected = expected_points(reference, loop) if usual else {}
    chart = Chart("Greedy accuracy on dev", lines, levels, expected=expected, fixed=(0, 1))
    words = ""
    if any(len(values) > 1 for points in lines.values() for values in points.values()):
        words = "The line is the mean over seeds, in a band that holds them all. "
    words += patience(expected) if expected else ""
    if not expected:
        words += "The project's own run is drawn behind it only where it is known that preset, "
        words += "task and all numbers are the defaults."
    return f'<div class="wide">{chart.html(slug(loop) + "-dev")}</div><p>{shown(words)}</p>'


def has_critic(run: Run, loop: str) -> bool:
    """Whether the arm compares with a critic, so that groups with equal rewards teach as well."""
    return as_dict(as_dict(run.config.get("configs")).get(loop)).get("arm") == "gae"


def watched(runs: list[Run], loop: str, folded: bool) -> str:
    """A small curve for each metric that is there, and whether it is healthy, in words."""
    figures: dict[bool, list[str]] = {True: [], False: []}
    unusual = []
    for watch in WATCH:
        lines = {}
        told = []
        unjudged = set()
        for run in runs:
            drawn = {name: points_of(run, loop, name) for name in watch.names}
            drawn = {name: points for name, points in drawn.items() if points}
            check = CHECKS.get(watch.names[0])
            label = f"{run.label(loop)} " if len(runs) > 1 else ""
            if "flat_groups" in drawn and has_critic(run, loop):
                unjudged.add(f"{label}flat_groups")
            if check and watch.names[0] in drawn and check(drawn):
                told.append(label + check(drawn))
            lines |= {label + name: points for name, points in drawn.items()}
        if not lines:
            continue
        title = " and ".join(watch.names)
        silent = unjudged == set(lines)
        healthy = (-ANY, ANY) if silent else (watch.low, watch.high)
        chart = Chart(title, lines, healthy=healthy, unjudged=frozenset(unjudged))
        for name, points in chart.outside().items():
            step, values = next(iter(points.items()))
            count = f"{len(points)} of {plural(len(lines[name]), 'update')}"
            told.append(f"{name} is outside at {count}, first at update {step} ({values[0]:.3g})")
        verdict = '<b class="good">✓ Nothing unusual.</b>'
        if told:
            verdict = f'<b class="bad">▲ Look here:</b> {shown("; ".join(told))}.'
            unusual.append(title)
        figure = chart.html(f"{slug(loop)}-{'-'.join(watch.names)}")
        flag = r'<code class="flag">\g<0></code>'
        advice = re.sub(r"--\w+", flag, shown(watch.advice))
        words = f"<p>{verdict} <b>Healthy:</b> {watch.healthy} <b>If not:</b> {advice}</p>"
        critic = "Says nothing about this arm, which compares with a critic."
        if silent:
            words = f"<p>{critic}</p>"
        elif unjudged:
            words += f"<p>{shown(listed(sorted(unjudged)))}: {critic}</p>"
        figures[bool(told)].append(f'<div class="watch">{figure}{words}</div>\n')
    calm = len(figures[False])
    if not calm and not unusual:
        return '<p class="quiet">No watched number is logged yet.</p>'
    told_first = f"▲ Look at {listed(unusual)}." if unusual else "✓ All of them look healthy."
    opened = "" if folded else " open"
    rest = f'<details class="calm"{opened}><summary>{plural(calm, "watched number")} with nothing '
    rest += f'unusual</summary><div class="grid">{"".join(figures[False])}</div></details>\n'
    strange = f'<div class="grid">{"".join(figures[True])}</div>\n'
    return f"<p>{shown(told_first)}</p>\n{strange}{rest if calm else ''}"


def others(runs: list[Run], loop: str) -> str:
    """Folded small curves of the numbers that WATCH does not know, as a researcher's own."""
    known = {name for watch in WATCH for name in watch.names}
    known |= {"loop", "seed", "step", "seconds", "samples", "dev_greedy", "lr"}
    lines = [line for run in runs for line in run.lines("metrics", loop)]
    names = dict.fromkeys(name for line in lines for name in line if name not in known)
    names = [name for name in names if numbers(lines, name)]
    figures = ""
    kept = 0
    for name in names[:OTHERS]:
        drawn = {}
        for run in runs:
            label = f"{run.label(loop)} {name}" if len(runs) > 1 else name
            drawn[label] = points_of(run, loop, name)
        drawn = {label: points for label, points in drawn.items() if points}
        figure = Chart(name, drawn, drawn=40, rows=10).html(f"{slug(loop)}-other-{kept}")
        if len(figures) + len(figure) > OTHERS_BYTES:
            break
        figures += figure
        kept += 1
    if not names:
        return ""
    left = len(names) - kept
    more = f"<p>{left} more are left out of this page and are in metrics.jsonl.</p>" if left else ""
    return (
        f'<details class="others"><summary>Other numbers ({len(names)})</summary>'
        f'<div class="grid">{figures}</div>{more}</details>\n'
    )


def warnings(runs: list[Run], loop: str) -> str:
    """The notes that were printed while the method learned."""
    told = ""
    for run in runs:
        for line in run.lines("metrics", loop):
            if line.get("note"):
                where = f"{run.label(loop)}, " if len(runs) > 1 else ""
                where += f"{loop}, seed {line['seed']}, update {line['step']}"
                told += f"<li><b>{shown(where)}:</b> {shown(str(line['note'])[:1000])}</li>\n"
    if not told:
        return "<p>No warning was printed.</p>"
    items = told.splitlines(keepends=True)
    more = f"<p>{len(items) - 50} more are in metrics.jsonl.</p>" if len(items) > 50 else ""
    return f'<ul class="warnings">{"".join(items[:50])}</ul>{more}'


def method_section(runs: list[Run], loop: str, reference: dict, folded: bool, alone: bool) -> str:
    """Everything about one method that does not move, and the place for what does.

    alone: whether the page has no other result, so that the first screen has said it already.
    """
    own = [run for run in runs if loop in run.loops()]
    told = [
        f"{run.label(loop)}: {sentence(loop, run.results(loop))}"
        if len(runs) > 1
        else sentence(loop, run.results(loop))
        for run in own
    ]
    key = slug(loop)
    return (
        f'<section class="method" id="{key}" aria-labelledby="{key}-title">'
        f'<h2 id="{key}-title">{shown(loop)}</h2>\n'
        + "".join(f"<p>{shown(text)}</p>\n" for text in ([] if alone else told))
        + f"<h3>How it learned</h3>\n{accuracy(own, loop, reference)}\n"
        f"<h3>What to watch</h3>\n{watched(own, loop, folded)}{others(own, loop)}\n"
        f"<h3>Warnings</h3>\n{warnings(own, loop)}\n"
        "<h3>Answers and what the reward says of them</h3>\n"
        f'<div class="moving" data-method="{escape(loop, quote=True)}">'
        "<noscript><p>The transcripts need JavaScript.</p></noscript></div></section>\n"
    )


# ==== what the reader's choices are made from ====

INSIDE = (
    "tokens token_rewards value shift logp judgements scores step_ends orm sorm steps_right "
    "order sure said prospects branches"
).split()


def plain(value: Any) -> Any:
    """A JSON value with its numbers rounded, and null for those that JSON has not."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, list):
        return [plain(x) for x in value]
    if isinstance(value, dict):
        return {str(key): plain(x) for key, x in value.items()}
    return value


def own_lists(line: dict) -> dict[str, list]:
    """Lists that the page does not know and that hold a number for each token."""
    count = len(as_list(line.get("tokens")))
    found: dict[str, list] = {}
    for name, values in line.items():
        several = as_list(values)
        if name in INSIDE or not several or len(several) != count or len(found) == OWN_LISTS:
            continue
        told = [x for x in several if x is not None]
        if told and all(number(x) is not None for x in told):
            found[OWN + name] = several
    return found


def transcript(line: dict, path: bool) -> dict:
    """What the page shows of a response. path: with what was drawn on the way, which is long."""
    kept = {name: line[name] for name in INSIDE if as_list(line.get(name))}
    if len(kept.keys() - {"tokens"}) and "tokens" not in kept:
        kept["tokens"] = split(line)  # an older run names none
    if not path:
        long = ("said", "branches", "prospects")
        kept = {name: x for name, x in kept.items() if name not in long}
    kept |= own_lists(line)
    right = (number(line.get("reward")) or 0) >= 0.5
    return plain({"response": str(line.get("response", "")), "right": right, **kept})


def job_data(run: Run, loop: str, seed: float) -> dict:
    """What is shown of one job: its answers, followed problems and pairs, in order of interest."""
    answers = [a for a in answers_of(run, loop) if a["seed"] == seed]
    counts = {kind: sum(a["kind"] == kind for a in answers) for kind in KINDS}
    by_kind: list[list[dict]] = []
    for kind in KINDS:
        some = [a for a in answers if a["kind"] == kind]
        some.sort(key=lambda a: not as_list(a["after"].get("tokens")))
        by_kind.append(some[:KEPT_OF_A_KIND])
    mixed = [a for row in zip_longest(*by_kind) for a in row if a]
    shown_answers = []
    for a in mixed:
        item = {"prompt": str(a.get("prompt", "")), "kind": a["kind"]}
        if a.get("solution"):
            item["solution"] = str(a["solution"])
        item |= {when: transcript(a[when], path=True) for when in ("before", "after")}
        shown_answers.append(item)
    looks: dict[str, dict[float, dict]] = {}  # a resumed job may have looked twice at a step
    for line in run.lines("samples", loop):
        if line["seed"] == seed:
            looks.setdefault(str(line.get("prompt", "")), {})[line["step"]] = line
    followed = [
        {
            "prompt": prompt,
            "looks": [
                {"step": at, **transcript(x, path=False)} for at, x in sorted(several.items())
            ],
        }
        for prompt, several in looks.items()
    ]
    followed.sort(key=lambda problem: problem["looks"][0]["right"] == problem["looks"][-1]["right"])
    pairs = [plain(x) for x in run.lines("pairs", loop) if x["seed"] == seed]
    return {"counts": counts, "answers": shown_answers, "followed": followed, "pairs": pairs}


def packed(value: Any) -> str:
    """JSON that is harmless inside a page: nothing in it can end the script."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # all but ASCII is escaped
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def texts_of(item: Any) -> Any:
    """An answer, problem or pair without all that is said of its inside."""
    if isinstance(item, list):
        return [texts_of(x) for x in item]
    if isinstance(item, dict):
        texts = {n: x for n, x in item.items() if n not in INSIDE and not n.startswith(OWN)}
        return {name: texts_of(x) for name, x in texts.items()}
    return item


def page_data(runs: list[Run], loops: list[str], room: int) -> dict:
    """Everything that page.js reads, in at most `room` bytes: of each job the first few first."""
    data: dict[str, list[dict]] = {}
    queue = []
    for loop in loops:
        for run in runs:
            lines = [line for log in LOGS for line in run.lines(log, loop)]
            for seed in sorted({line["seed"] for line in lines}):
                job = job_data(run, loop, seed)
                name = f"{run.label(loop)}, seed {seed}" if len(runs) > 1 else f"seed {seed}"
                kept = {"name": name, "counts": job["counts"], "kinds": KINDS, "left_out": {}}
                data.setdefault(loop, []).append(kept)
                # Of four answers, a followed problem and two pairs each comes in its turn.
                for part, first, slower in (("answers", 0, 1), ("followed", 2, 4), ("pairs", 3, 2)):
                    kept[part] = []
                    for at, item in enumerate(job[part]):
                        queue.append((first + at * slower, len(queue), kept, part, item))
    queue.sort(key=lambda entry: entry[:2])
    for _, _, kept, part, item in queue:
        sizes = ((len(packed(version)) + 1, version) for version in (item, texts_of(item)))
        found = next((both for both in sizes if both[0] <= min(room, ITEM_BYTES)), None)
        if found is None:
            kept["left_out"][part] = kept["left_out"].get(part, 0) + 1
            continue
        room -= found[0]
        kept[part].append(found[1])
    return data


# ==== the foot and the page ====


def foot(runs: list[Run], loops: list[str], at: Path | None) -> str:
    """How each run was made, what is missing of it, and links to its files from the folder at."""
    told = ""
    for at_run, run in enumerate(runs):
        facts = {
            "command": run.config.get("command"),
            "preset": run.preset(),
            "seeds": run.config.get("seeds"),
            "commit": run.config.get("commit"),
            "machine": run.summary.get("machine"),
            "threads": run.summary.get("threads"),
            "torch": run.summary.get("torch"),
        }
        rows = ""
        for name, value in facts.items():
            text = shown(value) if value else "not said"
            if name == "command" and value:
                text = f"<code>{text}</code>"
            rows += f"<dt>{name}</dt><dd>{text}</dd>"
        changed = run.summary.get("changed")
        words = "Which numbers differ from the defaults is not said (an older run)."
        if isinstance(changed, dict):
            words = "No number differs from the methods' defaults."
        cells = [
            [shown(loop), shown(name), shown(short(value) if number(value) else value)]
            for loop, several in as_dict(changed).items()
            for name, value in as_dict(several).items()
        ]
        if cells:
            words = table(
                f"table-changed-{at_run}",
                "Numbers that differ",
                ["method", "number", "value"],
                cells,
            )
        missing = "".join(f"<li>{shown(text)}</li>" for text in run.missing[:30])
        if len(run.missing) > 30:
            missing += f"<li>and {len(run.missing) - 30} more of the same kinds</li>"
        missing = f"<ul>{missing}</ul>" if missing else "<p>No file is missing.</p>"
        links = ""
        for file, what in LINKED if at else ():
            if (run.folder / file).exists():
                path = quote(Path(os.path.relpath(run.folder / file, at)).as_posix())
                links += f'<li><a href="{escape(path)}">{file}</a>: {what}</li>'
        told += (
            f"<h3>{shown(run.name)}</h3><dl>{rows}</dl><div>{words}</div>"
            f"<h4>What this page cannot show</h4>{missing}"
            + (f"<h4>Its files</h4><ul>{links}</ul>\n" if links else "\n")
        )
    numbers_of_all = comparison(runs, loops) if len(runs) == 1 else ""
    return f"<h2>How it was made</h2>{numbers_of_all}{told}"


def names_of(folders: list[Path]) -> list[str]:
    """A short name for each folder, longer where two would be the same."""
    last = [folder.resolve().parts[-1] for folder in folders]
    if len(set(last)) == len(last):
        return last
    longer = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    if len(set(longer)) == len(longer):
        return longer
    return [f"{name} ({i})" for i, name in enumerate(longer, 1)]


def page(runs: list[Path], reference: Path | None = None, at: Path | None = None) -> str:
    """The HTML of one or several runs.

    runs: their folders; reference: the curves of the project's own run, as tour.json; at: the
    folder that the page will stand in, for its links to the files of the runs; without it there
    are none.
    """
    several = [read_run(*both) for both in zip(runs, names_of(runs), strict=True)]
    if not several:
        raise BadRun("no run is named")
    loops = list(dict.fromkeys(loop for run in several for loop in run.loops()))
    own: dict = {}
    if reference is not None:
        own = read_object(reference, Run(reference.parent, "reference"))
    name_differences(several)
    alone = len(several) == len(loops) == 1
    seeds = max(int(number(run.config.get("seeds")) or 1) for run in several)
    presets = listed(dict.fromkeys(run.preset() for run in several))
    script = (PARTS / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    names = [run.name for run in several]
    what = listed(loops) or "No method yet"
    which = f"{'run' if len(names) == 1 else 'runs'} {listed(names)}"
    links = "".join(f'<li><a href="#{slug(loop)}">{shown(loop)}</a></li>' for loop in loops)
    filled = {
        "title": shown(f"{listed(names)}: {listed(loops)}"),
        "heading": shown(
            f"What {loops[0] if len(loops) == 1 else counted(len(loops), 'methods')} changed"
        ),
        "under": shown(f"{what}. Preset {presets}, {plural(seeds, 'seed')}, {which}."),
        "links": links + '<li><a href="#made">How it was made</a></li>',
        "first": first_screen(several, loops),
        "methods": "".join(
            method_section(several, loop, own, len(loops) > 2, alone) for loop in loops
        ),
        "foot": foot(several, loops, at),
        "css": (PARTS / "page.css").read_text(encoding="utf-8"),
        "script": script,
        "hash": f"'sha256-{digest}'",
    }
    room = PAGE_BYTES - sum(len(text.encode()) for text in filled.values())
    if room < 0:
        raise BadRun(f"{plural(len(runs), 'run')} are too many for one page")
    filled["data"] = packed(page_data(several, loops, room))
    template = (PARTS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], template)


def main(argv: list[str] | None = None) -> int:
    """Write the page of the runs that the command line names; 1 and a line if it cannot be."""
    words = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="report.py", description=words)
    parser.add_argument("runs", nargs="+", type=Path, help="the folders of one or several runs")
    parser.add_argument("--out", type=Path, help="the file to write (default: in the first run)")
    a = parser.parse_args(argv)
    out = a.out or a.runs[0] / "report.html"
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        text = page(a.runs, REFERENCE if REFERENCE.exists() else None, out.parent)
        beside.write_text(text, encoding="utf-8")
        beside.replace(out)
    except (BadRun, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"report: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
