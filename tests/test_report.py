"""The report: one page made from a run's JSON alone, and what a reader can do with it."""

import json
import random
import re
import shutil
import sys
from html import unescape
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from notebooks import report  # noqa: E402

METHODS = ("ppo", "iterative_dpo", "self_rewarding", "seq2seq", "refine", "denoise")
LOOKS = (0, 5, 10, 20, 30, 40)
START, END = 0.44, 0.94


# ==== a run that nothing has trained ====


def solve(problem):
    """The right way of `26+1*2-7=`: from left to right, all mod 100."""
    numbers = re.findall(r"\d+", problem)
    left = int(numbers[0])
    steps = []
    for sign, right in re.findall(r"([-+*])(\d+)", problem):
        result = {"+": left + int(right), "-": left - int(right), "*": left * int(right)}[sign]
        steps.append(f"{left}{sign}{right}={result % 100}")
        left = result % 100
    return ";".join([*steps, f"#{left}"])


def habit(problem, dice):
    """What the base writes instead: it copies the start, or it forgets a carry at the end."""
    start = re.match(r"\d+", problem)[0]
    right = solve(problem)
    if dice.random() < 0.4 and right.split("#")[1] != start:
        return f"#{start}"
    body, answer = right.rsplit("#", 1)
    wrong = str((int(answer) + 10) % 100)
    return f"{body.rsplit('=', 1)[0]}={wrong};#{wrong}"


def write(problem, right, response, dice):
    if response:
        return response if right else f"{response}?"
    return (solve(problem) if right else habit(problem, dice)) + "<eos>"


def cut(text):
    return re.findall(r"<eos>|.", text, re.DOTALL)


def inside(loop, response, right, dice):
    """What the reward of a method says of a response."""
    tokens = cut(response)
    count = len(tokens)
    found = {"tokens": tokens}
    if loop in ("ppo", "seq2seq"):
        found["token_rewards"] = [0.0] * (count - 1) + [1.0 if right else 0.0]
        if loop == "seq2seq":
            found["token_rewards"] = [round(dice.choice([0.2, -0.3]), 2) for _ in tokens]
        found["shift"] = [round(dice.gauss(0, 1), 3) for _ in tokens]
        found["value"] = [round((i + 1) / count * (0.9 if right else 0.3), 3) for i in range(count)]
    if loop in ("iterative_dpo", "self_rewarding"):
        found["logp"] = [round(-dice.expovariate(4), 3) for _ in tokens]
    if loop == "self_rewarding":
        found |= {"judgements": ["!4<eos>", "!5<eos>", "?<eos>"], "scores": [4.0, 5.0, None]}
    if loop == "refine":
        ends = [i + 1 for i, token in enumerate(tokens) if token == ";"] + [count]
        truths = [right or i < len(ends) - 2 for i in range(len(ends) - 1)]
        low_high = [0.9 if truth else 0.2 for truth in [*truths, right]]
        found |= {"step_ends": ends, "orm": [0.5] * len(ends), "sorm": low_high}
        found["steps_right"] = truths
    if loop == "denoise":
        places = 28
        order = [4 * (i // 4) + (i * 3) % 4 for i in range(places)]
        found |= {"order": order, "sure": [round(dice.uniform(0.6, 1), 3) for _ in range(places)]}
        found["said"] = [response] * (places - 5) + ["#1<eos>"] * 5
        found["prospects"] = [round(dice.random(), 3) for _ in range(places)]
        found["branches"] = [[[response, right], ["#1<eos>", False]] for _ in range(places)]
    return found


def dump(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_run(
    folder, loops=METHODS, seeds=1, answers=60, response=None, detailed=8, **config_changes
):
    """The folder of a finished run; response: a text that every response is, in place of sums."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(7)
    problems = []
    while len(problems) < answers:
        signs = [f"{dice.choice('+-*')}{dice.randint(1, 9)}" for _ in range(dice.randint(1, 3))]
        problems.append(f"{dice.randint(1, 99)}{''.join(signs)}=")
    logs = {name: [] for name in ("metrics", "samples", "answers", "pairs")}
    results = []
    for loop in loops:
        for seed in range(seeds):
            kinds = [
                dice.choices(["mended", "broken", "right", "wrong"], [52, 2, 42, 4])[0]
                for _ in problems
            ]
            for at, (problem, kind) in enumerate(zip(problems, kinds)):
                line = {"loop": loop, "seed": seed, "step": 40, "prompt": problem}
                line["solution"] = solve(problem)
                both = {"before": kind in ("right", "broken"), "after": kind in ("right", "mended")}
                for when, right in both.items():
                    text = write(problem, right, response, dice)
                    line[when] = {"response": text, "reward": float(right)}
                    if at < detailed:
                        line[when] |= inside(loop, text, right, dice)
                logs["answers"].append(line)
            for problem, kind in list(zip(problems, kinds))[:4]:
                for step in LOOKS:
                    right = kind == "right" or (kind == "mended" and step >= 10)
                    text = write(problem, right, response, dice)
                    line = {"loop": loop, "seed": seed, "step": step, "prompt": problem}
                    line |= {"response": text, "reward": float(right)}
                    logs["samples"].append(line | inside(loop, text, right, dice))
            for step in range(1, 41):
                share = START + (END - START) * (1 - 0.9**step) + dice.uniform(-0.02, 0.02)
                line = {"loop": loop, "seed": seed, "step": step, "seconds": step * 0.9}
                line |= {"samples": step * 512, "truth": share, "grad_norm": 0.3, "entropy": None}
                if loop in ("ppo", "seq2seq", "denoise"):
                    line |= {"reward": share, "kl": step / 10, "entropy": 0.06 - step / 1000}
                    line |= {"clipfrac": 0.3 if step == 3 else 0.05, "ended": 1.0}
                    line |= {"flat_groups": share / 2, "length": 17.0}
                if loop in ("iterative_dpo", "self_rewarding"):
                    line |= {"chosen": -1 + step / 60, "rejected": -2 - step / 8, "pairs": 400}
                if loop == "self_rewarding":
                    line |= {"score": 3.2, "spread": 1.5, "unread": 0.0, "quoted": 0.0}
                if loop == "refine":
                    line |= {"orm": 0.5 + step / 110, "sorm": 0.5 + step / 100}
                if step in LOOKS or step == 1:
                    line["dev_greedy"] = share
                if loop == "ppo" and step == 7:
                    line["note"] = "KL runs away, 21 nats a response; <b>another</b>"
                logs["metrics"].append(line)
            if loop in ("iterative_dpo", "self_rewarding"):
                for problem in problems[:5]:
                    sides = {}
                    for side, right in (("chosen", True), ("rejected", False)):
                        text = (
                            response
                            or (solve(problem) if right else habit(problem, dice)) + "<eos>"
                        )
                        logp = [round(-dice.expovariate(3), 3) for _ in cut(text)]
                        gain = 1.2 if right else -3.4
                        sides[side] = {"response": text, "tokens": cut(text), "logp": logp}
                        sides[side]["gain"] = gain
                    if loop == "self_rewarding":  # what it judges is its problem
                        problem = f"{problem}<sep>{solve(problem)}<sep>?"
                    place = {"loop": loop, "seed": seed, "step": 20, "prompt": problem}
                    logs["pairs"].append(place | sides | {"margin": 0.46})
            own = {"start": 0.41} if loop in ("self_rewarding", "refine", "denoise") else {}
            results.append(
                {"loop": loop, "seed": seed, "chance": 0.012, "problems": 500, "base": 0.434}
                | own
                | {"start_dev": kinds.count("right") / answers + kinds.count("broken") / answers}
                | {"final": 0.978 - 0.01 * seed, "dev_problems": answers, "samples": 20480}
                | {"mended": kinds.count("mended"), "broken": kinds.count("broken")}
                | {"samples_to_80": 2560, "updates": 40, "seconds": 36.0, "ceiling": 0.998}
            )
    for name, lines in logs.items():
        dump(folder / f"{name}.jsonl", lines)
    configs = {loop: {"task": "arithmetic", "beta": 0.0} for loop in loops}
    config = {"configs": configs, "preset": "laptop", "seeds": seeds, "commit": "abc1234"}
    config |= {"command": f"python train_small.py --seeds {seeds}"} | config_changes
    (folder / "config.json").write_text(json.dumps(config))
    summary = {"config": "laptop", "threads": 1, "torch": "2.13.0", "machine": "x86_64, 2 cores"}
    summary |= {"changed": {}, "results": results}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def read_data(html):
    """The JSON that a page holds for its script."""
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])


def words(html):
    """A page's text without tags, styles and scripts, with plain spaces."""
    html = re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]+>", "", html)).replace("\u00a0", " ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tour")


@pytest.fixture(scope="module")
def html(folder):
    return report.page([folder], report.REFERENCE)


def change(path, **values):
    """Other values at the top of a JSON file; None takes a name away."""
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (old | values).items() if v is not None}))


def results_of(folder):
    return json.loads((folder / "summary.json").read_text())["results"]


# ==== what the page says ====


def test_the_sentence_says_the_numbers_of_the_summary(tmp_path):
    folder = write_run(tmp_path / "x", loops=("ppo",))
    result = results_of(folder)[0] | {"mended": 259, "broken": 7, "dev_problems": 500}
    change(folder / "summary.json", results=[result])
    assert (
        "Before training the base model answered 43 % of 500 held-out problems right; after 40 "
        "updates of ppo it is 98 %. On dev 259 problems that were wrong are right now, and 7 that "
        "were right are wrong."
    ) in words(report.page([folder]))
    change(folder / "summary.json", results=[result | {"mended": 1, "broken": 1, "updates": 1}])
    assert (
        "after 1 update of ppo it is 98 %. On dev 1 problem that was wrong is right now, and 1 "
        "that was right is wrong."
    ) in words(report.page([folder]))


def test_several_seeds_give_their_mean_and_their_spread(tmp_path):
    folder = write_run(tmp_path / "x", loops=("ppo", "refine"), seeds=5, answers=10)
    told = words(report.page([folder]))
    assert "ppo and refine ended too close to tell apart. Before training" in told
    assert "The line is the mean over seeds, in a band that holds them all." in told
    assert "mended and broken of dev; means over seeds" in told
    assert "after 40 updates of ppo it is 96 % (mean of 5 seeds)" in told
    assert "refine starts from another model, at 41 %" in told
    assert "94 to 98 over 5 seeds" in told and "0.938 to 0.978" in told


def test_every_part_is_written_without_a_script(html):
    told = words(html)
    for loop in METHODS:
        section = html[html.index(f'id="{loop}"') :]
        section = section[: section.index("</section>")]
        assert "Greedy accuracy on dev" in section and 'role="img"' in section
        assert "five seeds of the project" in section
        assert re.search(r"A flat start is normal until update \d+: only then", section)
        assert f'href="#{loop}"' in html
    assert "clipfrac is outside at 1 of 40 updates, first at update 3 (0.3)" in told
    assert "ppo, seed 0, update 7: KL runs away" in told and "No warning was printed." in told
    assert "Marked: the first token that differs." in told and "<mark" in html
    assert "python train_small.py --seeds 1" in told and "abc1234" in told


def test_titles_of_charts_have_ids_that_are_unique(html):
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    named = [x for both in re.findall(r'aria-labelledby="([^"]+)"', html) for x in both.split()]
    assert set(named) <= set(ids) and len(named) > 50


def test_headings_come_in_order(html):
    levels = [int(x) for x in re.findall(r"<h([1-6])", html)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:]))


def test_the_projects_own_run_is_drawn_only_behind_its_own_numbers(folder, tmp_path):
    for values in ({"changed": {"ppo": {"beta": 0.1}}}, {"changed": None}):
        other = shutil.copytree(folder, tmp_path / str(values["changed"]))
        change(other / "summary.json", **values)
        page = report.page([other], report.REFERENCE)
        ppo = page[page.index('id="ppo"') : page.index('id="iterative_dpo"')]
        assert "five seeds of the project" not in ppo and "expected" not in ppo
        assert "flat start" not in ppo
    change(other / "summary.json", changed={})
    change(other / "config.json", preset="smoke")
    assert "five seeds of the project" not in report.page([other], report.REFERENCE)


def test_patience_is_the_first_look_that_stands_higher():
    told = report.patience({1: [0.4, 0.5], 5: [0.49], 10: [0.5], 20: [0.9]})
    assert told == (
        "A flat start is normal until update 10: only then had the project's own run gained 5 "
        "points."
    )
    told = report.patience({1: [0.4], 5: [0.44]})
    assert told == "A flat start is normal: the project's own run never gained 5 points."


@pytest.mark.parametrize(
    "lines, found",
    [
        ({"reward": [0.1, 0.9], "truth": [0.5, 0.2]}, "reward rises and truth falls"),
        ({"reward": [0.1, 0.9], "truth": [0.1, 0.9]}, ""),
        ({"chosen": [-1, -9], "rejected": [-1, -9]}, "chosen has changed by -8.0 nats"),
        ({"chosen": [-9, -1]}, ""),
        ({"grad_norm": [1, 1, 1, 50]}, "50 at update 3"),
        ({"grad_norm": [1, 2, 1, 2]}, ""),
        ({"length": [10, 30]}, "length has grown by 20"),
        ({"length": [10, 11]}, ""),
    ],
)
def test_a_trend_that_is_not_healthy_is_said(lines, found):
    drawn = {name: {step: [x] for step, x in enumerate(values)} for name, values in lines.items()}
    told = report.CHECKS[next(iter(lines))](drawn)
    assert (found in told) if found else told == ""


def test_the_table_of_what_is_healthy_is_whole():
    names = [name for watch in report.WATCH for name in watch.names]
    faq = (report.PARTS.parent / "results" / "FAQ.md").read_text()
    table = faq[faq.index("| metric | healthy |") : faq.index("## It learns nothing")]
    told = re.findall(
        r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines() if line)
    )
    assert sorted(told) == sorted(names)  # the same metrics are explained in words
    assert len(names) == len(set(names)) and set(report.CHECKS) <= set(names)
    for watch in report.WATCH:
        assert watch.low < watch.high and watch.healthy and watch.advice
    high = {watch.names[0]: watch.high for watch in report.WATCH}
    assert high["clipfrac"] == 0.2 and high["kl"] == 10 and high["flat_groups"] < 1


def finals(folder, **ends):
    """Write other accuracies for the ends of the methods into a run's summary."""
    results = results_of(folder)
    for result in results:
        result["final"] = ends.get(result["loop"], result["final"])
    change(folder / "summary.json", results=results)


def test_methods_that_end_close_to_each_other_are_not_told_apart(tmp_path):
    folder = write_run(tmp_path / "x", ("ppo", "iterative_dpo", "refine"), answers=8)
    finals(folder, ppo=0.90, iterative_dpo=0.857, refine=0.6)  # 500 problems: ± 4.4 points
    lead = "Of three methods ppo and iterative_dpo ended highest, too close to tell apart. Before"
    told = words(report.page([folder]))
    assert lead in told and "of ppo it is 90 %" in told
    finals(folder, iterative_dpo=0.855)
    assert "Of three methods ppo ended highest. Before" in words(report.page([folder]))
    finals(folder, iterative_dpo=0.91)
    told = words(report.page([folder]))
    assert "Of three methods iterative_dpo and ppo ended highest, too close" in told
    assert "Of three" not in words(report.page([write_run(tmp_path / "y", ("ppo",), answers=8)]))


def test_of_two_methods_one_ends_higher(tmp_path):
    folder = write_run(tmp_path / "x", ("ppo", "refine"), answers=8)
    finals(folder, ppo=0.9, refine=0.8)
    told = words(report.page([folder]))
    assert "Of two methods ppo ended higher. Before" in told and "ended highest" not in told


def test_the_picture_says_what_its_dots_and_its_bar_count(tmp_path):
    folder = write_run(tmp_path / "x", ("ppo",), answers=12)
    told = words(report.page([folder]))
    assert (
        "Dots: 500 held-out test problems, greedy. Bar: 12 other held-out problems (dev), before "
        "and after. Dev is asked during the training too, test only before and after it. "
        "500 problems leave an accuracy uncertain by up to ± 4.4 points."
    ) in told
    results = [{k: v for k, v in r.items() if k != "mended"} for r in results_of(folder)]
    change(folder / "summary.json", results=results)
    told = words(report.page([folder]))
    assert "Dots: 500 held-out" in told and "Bar:" not in told  # there is no bar


def test_what_is_said_once_is_enough(tmp_path):
    one = write_run(tmp_path / "one", ("ppo",), answers=8)
    assert words(report.page([one])).count("Before training the base model") == 1
    two = write_run(tmp_path / "two", ("ppo", "refine"), answers=8)
    assert words(report.page([two])).count("Before training the base model") == 3
    assert words(report.page([one, two])).count("Before training the base model") == 4


def test_one_seed_is_not_called_a_mean(html):
    assert "over seeds" not in words(html[: html.index('<script type="application/json"')])


def test_an_axis_says_what_it_counts(html):
    ends = re.findall(r'<span class="x" style="left:(\d+)%">([^<]*)</span>', html)
    assert {at: text for at, text in ends[:2]} == {"0": "update 0", "100": "update 40"}
    assert len(ends) > 40 and all(re.fullmatch(r"update \d+", text) for _, text in ends)


def test_a_caption_stands_outside_of_the_box_that_scrolls(html):
    boxes = re.findall(
        r'<p class="caption" id="([^"]+)">[^<]+</p><div class="scroll" role="region" '
        r'aria-labelledby="([^"]+)" tabindex="0">',
        html,
    )
    assert len(boxes) == html.count('<div class="scroll"') > 30 and "<caption" not in html
    assert all(caption == named for caption, named in boxes)


def test_headings_tell_the_parts_apart(html):
    part = html[html.index("<h3>Warnings</h3>") :]
    part = part[: part.index('<div class="moving"')]
    assert "<h3>Answers and what the reward says of them</h3>" in part
    told = words(html[html.index("What this page cannot show") :])
    assert "No file is missing." in told and "Nothing is missing" not in html
    assert "stand in" not in html


def test_right_by_luck_is_said_of_the_first_problem(tmp_path):
    folder = write_run(tmp_path / "x", ("ppo",), answers=8)
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert "by luck" not in report.example(report.read_run(folder, "x"), "ppo")
    for line in lines:
        line["after"]["steps_right"] = [False, True]
        line["before"]["steps_right"] = [False, True]
    dump(folder / "answers.jsonl", lines)
    told = words(report.example(report.read_run(folder, "x"), "ppo"))
    assert "✗ wrong" in told and told.count("✓ right by luck") == 1
    assert "Right by luck: the answer is right although a step is wrong." in told


@pytest.mark.parametrize("arm, judged", [("gae", False), ("grpo", True)])
def test_flat_groups_are_not_judged_where_a_critic_compares(tmp_path, arm, judged):
    folder = write_run(tmp_path / arm, ("ppo",), answers=8)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    dump(folder / "metrics.jsonl", [line | {"flat_groups": 1.0} for line in lines])
    change(folder / "config.json", configs={"ppo": {"arm": arm, "samples": 1}})
    html = report.page([folder])
    told = words(html)
    silent = "Says nothing about this arm, which compares with a critic."
    assert ("flat_groups is outside at 40" in told) == judged
    assert ("Look at clipfrac and flat_groups" in told) == judged
    assert (silent in told) == (not judged) == ("all groups are dead" not in told)
    assert 'id="ppo-flat_groups-t"' in html  # the curve is there all the same


def test_of_two_arms_only_the_one_without_a_critic_is_judged(tmp_path):
    runs = [write_run(tmp_path / arm, ("ppo",), answers=8) for arm in ("gae", "grpo")]
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        dump(run / "metrics.jsonl", [line | {"flat_groups": 1.0} for line in lines])
        change(run / "config.json", configs={"ppo": {"arm": run.name}})
    told = words(report.page(runs))
    assert "grpo flat_groups is outside at 40" in told
    assert "gae flat_groups is outside" not in told
    assert "gae flat_groups: Says nothing about this arm" in told


def test_numbers_of_ones_own_get_small_curves(tmp_path):
    folder = write_run(tmp_path / "x", ("ppo",), answers=8)
    assert "Other numbers" not in report.page([folder])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = {"<b>surprise": 0.25, "note_of_mine": "text", "lr": 0.1}
    dump(folder / "metrics.jsonl", [line | own for line in lines])
    html = report.page([folder])
    part = html[html.index("Other numbers (1)") :]
    part = part[: part.index("<h3>Warnings")]
    assert part.count("<figure>") == 1 and "<figcaption>&lt;b&gt;surprise</figcaption>" in part
    assert "&lt;b&gt;surprise: 0.25 at update 1, 0.25 at update 40." in part
    own = {f"own_{at}": 1.5 * at for at in range(30)}
    dump(folder / "metrics.jsonl", [line | own for line in lines])
    html = report.page([folder])
    part = html[html.index("Other numbers (30)") :]
    part = part[: part.index("<h3>Warnings")]
    kept = part.count("<figure>")
    assert 8 <= kept <= 24 and len(part) < 70_000
    assert f"{30 - kept} more are left out of this page and are in metrics.jsonl." in part


def test_lists_of_ones_own_are_kept_for_their_tokens():
    line = {"response": "abc", "reward": 1.0, "tokens": ["a", "b", "c"], "length": [1, 2]}
    line |= {"doubt": [0.5, None, -0.25], "words": ["x", "y", "z"], "empty": [None] * 3}
    kept = report.transcript(line, path=True)
    assert kept["own:doubt"] == [0.5, None, -0.25]
    assert [name for name in kept if name.startswith("own:")] == ["own:doubt"]
    assert report.texts_of(kept) == {"response": "abc", "right": True}
    many = report.transcript(line | {f"own {at}": [1, 2, 3] for at in range(9)}, path=True)
    assert sum(name.startswith("own:") for name in many) == 6


# ==== several runs ====


def two_runs(tmp_path, loops=("ppo",), **changed):
    """Two runs, ppo-1 with the defaults and ppo-2 with other numbers."""
    runs = [write_run(tmp_path / name, loops, answers=8) for name in ("ppo-1", "ppo-2")]
    change(runs[0] / "summary.json", changed={loop: {} for loop in loops})
    change(runs[1] / "summary.json", changed={loop: {} for loop in loops} | changed)
    return runs


def test_what_differs_between_runs_is_said_and_labels_them(tmp_path):
    runs = two_runs(tmp_path, ppo={"arm": "grpo"})
    finals(runs[0], ppo=0.5)
    html = report.page(runs)
    told = words(html)
    assert "ppo-2 differs from ppo-1: arm is grpo." in told
    assert "Of two results ppo of ppo-2 (arm grpo) ended higher." in told
    assert '<th scope="row">ppo-1 ppo</th>' in html
    assert '<th scope="row">ppo-2 (arm grpo) ppo</th>' in html
    assert '<li class="hue-0">ppo-1</li><li class="hue-1">ppo-2 (arm grpo)</li>' in html
    assert ">ppo, ppo-2 (arm grpo)</a>" in html
    assert read_data(html)["ppo"][1]["name"] == "ppo-2 (arm grpo), seed 0"
    change(runs[0] / "config.json", configs={"ppo": {"arm": "gae"}})
    told = words(report.page(runs[::-1]))  # the default stands in the configuration
    assert "ppo-1 differs from ppo-2: arm is gae." in told


def test_a_long_difference_is_said_but_is_no_label(tmp_path):
    runs = two_runs(tmp_path, ppo={"arm": "grpo", "beta": 0.1, "lr": 0.001})
    told = words(report.page(runs))
    assert "ppo-2 differs from ppo-1: arm is grpo, beta is 0.1 and lr is 0.001." in told
    assert "ppo-2 (" not in told


def test_the_method_that_differs_is_named(tmp_path):
    html = report.page(two_runs(tmp_path, ("ppo", "refine"), refine={"beta": 0.5}))
    assert "ppo-2 differs from ppo-1: beta of refine is 0.5." in words(html)
    assert ">refine, ppo-2 (beta 0.5)</a>" in html and ">ppo, ppo-2</a>" in html


def test_it_is_said_that_nothing_differs_or_that_it_is_not_known(tmp_path):
    runs = two_runs(tmp_path)
    assert "No number differs between ppo-1 and ppo-2." in words(report.page(runs))
    assert "differs between" not in words(report.page(runs[:1]))
    change(runs[1] / "config.json", seeds=3)
    told = words(report.page(runs))
    assert "ppo-2 differs from ppo-1: its number of seeds is 3." in told
    change(runs[0] / "summary.json", changed=None)
    told = words(report.page(runs))
    assert "Whether numbers of ppo differ between ppo-1 and ppo-2 is not said." in told
    assert "No number differs between" not in told


# ==== other people's text ====

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028\u202e\x00\x07\ud800🙂"


def test_text_of_models_is_harmless(tmp_path):
    folder = write_run(tmp_path / "<b>x", loops=("ppo", HOSTILE[:20]), response=HOSTILE)
    html = report.page([folder])
    html.encode()
    assert html.count("<script") == 2 and html.count("</script") == 2
    assert "<img" not in html and "<b>x" not in html and "onerror=alert(2)&gt;" in html
    assert not re.search("[\x00\x07\u2028\u202e\ud800]", html)
    assert read_data(html)["ppo"][0]["answers"][0]["after"]["response"] == HOSTILE
    assert read_data(html)["ppo"][0]["kinds"] == report.KINDS


def test_control_characters_can_be_seen():
    assert report.visible("a\x00\n\u202eb\x7f\ud800") == "a␀↵\n⟨U+202E⟩b⟨U+007F⟩⟨U+D800⟩"
    assert report.shown("<&>") == "&lt;&amp;&gt;"


def test_no_script_runs_but_the_pages_own(html):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/=]+';", policy)
    assert not re.search(r'(src|href)="(https?:)?//', html)


# ==== runs that are not whole ====


def test_a_large_run_stays_below_two_megabytes(tmp_path):
    folder = write_run(
        tmp_path / "x", seeds=5, answers=500, detailed=12, response="1+1=2;" * 67 + "<eos>"
    )
    html = report.page([folder], report.REFERENCE)
    assert 1_000_000 < len(html.encode()) < 2_000_000
    jobs = [job for jobs in read_data(html).values() for job in jobs]
    assert len(jobs) == 30 and all(job["answers"] for job in jobs)
    assert all(sum(job["counts"].values()) == 500 for job in jobs)
    assert all(len(job["answers"]) < 500 for job in jobs)


def test_an_older_run_shows_what_there_is(folder, tmp_path):
    """No answers, no pairs, no tokens, no start on dev, nothing about defaults."""
    old = shutil.copytree(folder, tmp_path / "old")
    (old / "answers.jsonl").unlink()
    (old / "pairs.jsonl").unlink()
    samples = [json.loads(line) for line in (old / "samples.jsonl").read_text().splitlines()]
    newer = ("tokens", "step_ends", "steps_right", "branches")
    dump(
        old / "samples.jsonl",
        [{k: v for k, v in line.items() if k not in newer} for line in samples],
    )
    newer = ("start_dev", "mended", "broken", "dev_problems")
    results = [{k: v for k, v in r.items() if k not in newer} for r in results_of(old)]
    change(old / "summary.json", results=results, changed=None)
    change(old / "config.json", command=None, commit=None, preset=None)
    html = report.page([old], report.REFERENCE)
    told = words(html)
    assert "after 40 updates of ppo it is 98 %." in told and "On dev" not in told
    assert "answers.jsonl holds nothing (an older run" in told
    assert "samples.jsonl names no tokens" in told and "no pairs can be shown" in told
    for loop, jobs in read_data(html).items():
        assert sum(jobs[0]["counts"].values()) == 4, loop
        assert jobs[0]["answers"][0]["after"]["tokens"][-1] == "<eos>", loop


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl", "samples.jsonl"])
def test_a_missing_file_is_named(folder, tmp_path, name):
    other = shutil.copytree(folder, tmp_path / "x")
    (other / name).unlink()
    assert "href=" not in report.page([other]).replace('href="#', "")  # it will stand nowhere
    html = report.page([other], report.REFERENCE, other)
    assert name in words(html[html.index("What this page cannot show") :])
    assert f'href="{name}"' not in html and 'href="answers.jsonl"' in html


def test_a_torn_last_line_is_left_out_and_another_is_named(folder, tmp_path):
    torn = shutil.copytree(folder, tmp_path / "x")
    for name in report.LOGS:
        path = torn / f"{name}.jsonl"
        path.write_text(path.read_text() + path.read_text().splitlines()[0][:40])
    assert report.page([torn]).replace("run x", "run tour") == report.page([folder]).replace(
        "<h3>tour</h3>", "<h3>x</h3>"
    ).replace("<title>tour", "<title>x")
    path = torn / "metrics.jsonl"
    path.write_text("{\n" + path.read_text())
    assert "line 1 of metrics.jsonl cannot be read" in report.page([torn])


@pytest.mark.parametrize(
    "entry", ["[1]", "3", "null", "{}", '{"seed": "0"}', '{"loop": "ppo", "seed": "0"}']
)
def test_a_line_that_is_no_entry_is_named(tmp_path, entry):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loop": "ppo", "step": 1}\n' + entry + "\n")
    run = report.read_run(tmp_path, "x")
    assert "line 2 of metrics.jsonl cannot be read: it is no entry" in run.missing
    assert [line["step"] for line in run.logs["metrics"]] == [1]
    assert "line 2 of metrics.jsonl" in report.page([tmp_path])


def test_what_is_missing_is_counted_where_it_is_long(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "x")
    path = other / "metrics.jsonl"
    path.write_text("[1]\n" * 40 + path.read_text())
    assert "and 10 more of the same kinds" in report.page([other])


def test_jobs_that_are_at_work_are_read_where_they_write(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "x")
    lines = (other / "metrics.jsonl").read_text().splitlines()
    job = other / "jobs" / "ppo-0"
    job.mkdir(parents=True)
    (job / "metrics.jsonl").write_text("\n".join(x for x in lines if '"ppo"' in x))
    (other / "metrics.jsonl").write_text("\n".join(x for x in lines if '"ppo"' not in x))
    change(other / "summary.json", results=[r for r in results_of(other) if r["loop"] != "ppo"])
    html = report.page([other], at=other)
    assert "5 of 6 jobs are finished" in words(html) and "No job of ppo is finished yet" in html
    assert html.count("Greedy accuracy on dev</figcaption>") == 6


def test_nonsense_in_the_json_is_no_reason_to_stop(folder, tmp_path):
    """Every value of every file in turn: of another kind, or not a number at all."""
    dice = random.Random(3)
    wrong = [None, "text", [], {}, [None], {"a": 1}, True, -1, float("nan"), 10**400, [[1], "x"]]

    def spoil(value, share):
        if dice.random() < share:
            return dice.choice(wrong)
        if isinstance(value, dict):
            return {k: v if k in ("loop", "seed") else spoil(v, share) for k, v in value.items()}
        return [spoil(x, share) for x in value] if isinstance(value, list) else value

    small = write_run(tmp_path / "small", answers=12, detailed=6)
    for share in (0.02, 0.2, 0.6):
        other = shutil.copytree(small, tmp_path / str(share))
        for path in other.glob("*.json"):
            path.write_text(json.dumps(spoil(json.loads(path.read_text()), share)))
        for path in other.glob("*.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            dump(path, [spoil(line, share / 4) for line in lines])
        assert "</html>" in report.page([other], report.REFERENCE)


def test_several_runs_are_compared(tmp_path):
    runs = [write_run(tmp_path / "gae", loops=("ppo",), seeds=2)]
    runs.append(write_run(tmp_path / "grpo", loops=("ppo", "refine"), answers=20))
    html = report.page(runs, report.REFERENCE, runs[0])
    assert html.count('<th scope="row">gae ppo</th>') == 1
    assert html.count('<th scope="row">grpo refine</th>') == 1
    ppo = html[html.index('id="ppo"') : html.index('id="refine"')]
    assert '<li class="hue-0">gae</li><li class="hue-1">grpo (seeds 1)</li>' in ppo
    names = [job["name"] for job in read_data(html)["ppo"]]
    assert names == ["gae, seed 0", "gae, seed 1", "grpo (seeds 1), seed 0"]
    assert 'href="metrics.jsonl"' in html and 'href="../grpo/metrics.jsonl"' in html


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    assert report.names_of([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert report.names_of([tmp_path / "x", tmp_path / "x"])[1].endswith("x (2)")


def test_the_command_line(folder, tmp_path, capsys):
    assert report.main([str(folder)]) == 0
    assert (folder / "report.html").read_text().endswith("</html>\n")
    out = tmp_path / "page.html"
    assert report.main([str(folder), "--out", str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert f'{folder.name}/metrics.jsonl"' in out.read_text()
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "none", out, tmp_path / "empty"):
        assert report.main([str(bad)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(bad) in error


# ==== what a reader can do ====


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        pytest.skip("playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as player:
        try:
            started = player.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield started
        started.close()


class Visit:
    """An open page and all that it complained of or asked for."""

    def __init__(self, browser, file, **options):
        self.page = browser.new_page(**options)
        self.complaints = []
        self.requests = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.file = file

    def close(self):
        self.page.close()
        assert self.complaints == []
        assert self.requests == [self.file.as_uri()]


@pytest.fixture(scope="module")
def file(folder):
    assert report.main([str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture
def visit(browser, file):
    """The page at a desk; in the end nothing was complained of and nothing asked for."""
    visit = Visit(browser, file, viewport={"width": 1280, "height": 900})
    yield visit.page
    visit.close()


def test_every_part_is_there_for_each_method(visit):
    for loop in METHODS:
        root = visit.locator(f"#{loop} .moving")
        assert root.locator(".answers .side").count() == 2, loop
        assert root.locator(".followed input[type=range]").count() == 1, loop
        assert root.locator(".denoise").count() == (loop == "denoise"), loop
        paired = loop in ("iterative_dpo", "self_rewarding")
        assert root.locator(".pairs .side").count() == 2 * paired, loop
        assert root.locator(".answers .steps").count() == 2 * (loop == "refine"), loop
        colours = root.get_by_label("colour tokens by").locator("option").all_inner_texts()
        wanted = ["log-prob"] if paired else []
        wanted = ["sureness when written"] if loop == "denoise" else wanted
        if loop in ("ppo", "seq2seq"):
            wanted = ["token reward", "what training changed", "critic's value"]
        assert colours == wanted, loop
    assert visit.locator("#self_rewarding .answers .side").first.inner_text().count("4.5") == 1
    assert "blamed ▶" in visit.locator("#refine .answers .side").first.inner_text()
    assert "Margin 0.46" in visit.locator("#iterative_dpo .margin").inner_text()


def test_the_filter_shows_what_it_says(visit, folder):
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    rewards = [(x["before"]["reward"], x["after"]["reward"]) for x in lines if x["loop"] == "ppo"]
    part = visit.locator("#ppo .answers")
    ways = {"mended": (0, 1), "broken": (1, 0), "right": (1, 1), "wrong": (0, 0)}
    for kind, way in ways.items():
        part.get_by_label("show").select_option(kind)
        count = rewards.count(way)
        assert f"({count})" in part.locator(f"option[value={kind}]").inner_text()
        options = part.get_by_label("problem").locator("option").all_inner_texts()
        assert len(options) == count
        assert all(f"{'✗✓'[way[0]]}→{'✗✓'[way[1]]}" in text for text in options)
        if count:
            shown = part.locator(".side h4").all_inner_texts()
            assert [("right" in text) for text in shown] == [bool(x) for x in way]
    part.get_by_label("show").select_option("all")
    assert part.get_by_label("problem").locator("option").count() == min(60, len(rewards))
    part.get_by_label("problem").select_option("3")
    prompt = part.get_by_label("problem").locator("option").nth(3).inner_text().split()[-1]
    assert prompt in part.locator(".detail p").first.inner_text()


def fills(part):
    return part.evaluate_all(
        "list => list.map(x => [x.className, x.style.getPropertyValue('--strength')])"
    )


def test_the_colours_follow_the_number_that_is_chosen(visit):
    root = visit.locator("#ppo .moving")
    tokens = root.locator(".answers .side").nth(1).locator(".tokens li")
    chosen = root.get_by_label("colour tokens by")
    assert chosen.input_value() == "shift"  # the reward, paid at the end, tells no tokens apart
    chosen.select_option("token_rewards")
    before = fills(tokens)
    chosen.select_option("shift")
    after = fills(tokens)
    assert before != after
    numbers = tokens.locator("small").all_inner_texts()
    for (name, strength), number in zip(after, numbers, strict=True):
        assert ("down" in name) == ("−" in number) and ("up" in name) == ("−" not in number)
        assert 0 <= float(strength) <= 1
    assert "likelier than before" in root.locator(".detail").inner_text()


def test_every_tokens_numbers_can_be_read(visit):
    root = visit.locator("#ppo .moving")
    side = root.locator(".answers .side").nth(1)
    tokens = side.locator(".tokens li")
    tokens.nth(2).hover()
    assert "token 3 of" in side.locator(".readout").inner_text()
    tokens.first.focus()
    visit.keyboard.press("ArrowRight")
    told = side.locator(".readout").inner_text()
    assert "token 2 of" in told
    for name in ("token reward", "critic's value", "what training changed"):
        assert re.search(rf"{name} −?\d", told)
    small = tokens.first.locator("small")
    assert small.bounding_box()["width"] <= 1  # only a screen reader has it
    root.get_by_label("write the numbers").check()
    assert small.bounding_box()["width"] > 5
    side.locator("summary").click()
    assert side.locator("tbody tr").count() == tokens.count()


def test_a_problem_can_be_followed_over_training(visit):
    part = visit.locator("#refine .followed")
    slider = part.locator("input[type=range]")
    assert part.locator("h3").inner_text() == "A few problems, look by look"
    told = part.locator("p").first.inner_text()
    assert "The same 4 problems were asked before training and at every look at dev since." in told
    assert "At a look training pauses" in told
    assert "update 40" in part.locator("h4").inner_text()
    assert re.fullmatch("update 40, (right|wrong)", slider.get_attribute("aria-valuetext"))
    slider.focus()
    visit.keyboard.press("Home")
    assert "update 0" in part.locator("h4").inner_text()
    visit.keyboard.press("ArrowRight")
    assert "update 5" in part.locator("h4").inner_text()
    verdict = "right" if "✓" in part.locator("h4").inner_text() else "wrong"
    assert slider.get_attribute("aria-valuetext") == f"update 5, {verdict}"


def test_the_canvas_fills_with_the_slider(visit):
    part = visit.locator("#denoise .denoise")
    slider = part.get_by_label("passes done")
    assert part.locator(".cell.masked").count() == part.locator(".cell").count() == 28
    line = part.locator(".now").get_attribute("d")
    slider.focus()
    for passes in (1, 2, 3):
        visit.keyboard.press("ArrowRight")
        assert part.locator(".cell.masked").count() == 28 - passes
        assert part.locator(".cell.fresh").count() == 1
    assert part.locator(".now").get_attribute("d") != line
    assert "After 3 of 28 passes" in part.locator(".state").inner_text()
    assert slider.get_attribute("aria-valuetext") == "after 3 of 28 passes"
    ends = part.locator(".plot .x").all_inner_texts()
    assert ends == ["pass 0", "pass 28"]
    assert re.search(r"V\(x_t\) = \d", part.locator(".state").inner_text())
    assert "✓ right" in part.locator(".said").inner_text()
    assert part.locator(".branches li").count() == 2
    assert part.locator(".right-dot").count() == part.locator(".wrong-dot").count() == 28
    visit.keyboard.press("End")
    assert part.locator(".cell.masked").count() == 0
    assert "It has written" in part.locator(".said").inner_text()
    part.get_by_label("model").select_option("before")
    slider.press("End")
    assert "✗ wrong" in part.locator(".said").inner_text()


def test_no_value_is_said_of_a_canvas(visit, html):
    """What a canvas is worth is called its prospects; a value is what a critic says."""
    for job in read_data(html)["denoise"]:
        sides = [answer[when] for answer in job["answers"] for when in ("before", "after")]
        assert any("prospects" in side for side in sides)
        assert not any("value" in side for side in sides)
    script = (report.PARTS / "page.js").read_text()
    assert not re.search(r"(path|transcript)\??\.value\b|`value`", script)
    options = visit.locator("#denoise").get_by_label("colour tokens by").locator("option")
    assert options.all_inner_texts() == ["sureness when written"]


def test_the_list_of_answers_explains_its_marks(visit):
    note = visit.locator("#ppo .answers [role=status]").inner_text()
    assert "◆: with its tokens and their numbers; ◇: only its texts." in note


def test_right_by_luck_is_said_beside_its_steps(browser, tmp_path):
    folder = write_run(tmp_path / "x", ("ppo",), answers=8)
    for log in ("answers", "samples"):
        path = folder / f"{log}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for side in (line, line.get("before", {}), line.get("after", {})):
                if "tokens" in side:
                    side["steps_right"] = [False, True]
        dump(path, lines)
    assert report.main([str(folder)]) == 0
    visit = Visit(browser, folder / "report.html")
    part = visit.page.locator("#ppo .answers")
    part.get_by_label("show").select_option("mended")
    titles = part.locator(".side h4").all_inner_texts()
    assert titles == ["before ✗ wrong", "after ✓ right by luck"]
    told = part.locator(".detail").inner_text()
    assert "Its steps: 1 ✗ wrong, 2 ✓ right." in told
    assert (
        "Right by luck: the answer is right although a step is wrong. The reward looks only at the "
        "final answer. A step counts as right only if it is that of the true way."
    ) in told
    heard = visit.page.locator("#ppo .followed input").get_attribute("aria-valuetext")
    assert heard in ("update 40, right by luck", "update 40, wrong")
    visit.close()


def test_nobody_is_lucky_whose_steps_are_right(visit):
    titles = visit.locator("#refine .answers .side h4").all_inner_texts()
    assert titles == ["before ✗ wrong", "after ✓ right"]
    told = visit.locator("#refine .answers .detail").inner_text()
    assert "The reward looks only at the final answer." in told and "by luck" not in told
    assert "The reward looks" not in visit.locator("#ppo .answers .detail").inner_text()


def test_tokens_can_be_coloured_by_a_number_of_ones_own(browser, tmp_path):
    folder = write_run(tmp_path / "x", ("ppo",), answers=8)
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    for line in lines:
        for side in (line["before"], line["after"]):
            side["<i>doubt"] = [(-1) ** at / 2 for at, _ in enumerate(side["tokens"])]
            for at in range(9):
                side[f"own {at}"] = [at for _ in side["tokens"]]
    dump(folder / "answers.jsonl", lines)
    assert report.main([str(folder)]) == 0
    visit = Visit(browser, folder / "report.html")
    root = visit.page.locator("#ppo .moving")
    chosen = root.get_by_label("colour tokens by")
    options = chosen.locator("option").all_inner_texts()
    assert options[:3] == ["token reward", "what training changed", "critic's value"]
    assert options[3:] == ["<i>doubt", *(f"own {at}" for at in range(5))]
    chosen.select_option(label="<i>doubt")
    tokens = root.locator(".answers .side").nth(1).locator(".tokens li")
    names = [name for name, _ in fills(tokens)]
    assert len(names) > 3
    assert all(("down" in name) == (at % 2 == 1) for at, name in enumerate(names))
    assert "<i>doubt: full blue 0.5, full orange −0.5." in root.locator(".detail").inner_text()
    visit.close()


def test_on_a_phone_captions_are_whole_and_tables_show_that_they_scroll(browser, file):
    visit = Visit(browser, file, viewport={"width": 360, "height": 800})
    caption = visit.page.locator("#made .caption").first
    box = visit.page.locator("#made .scroll").first
    assert "Accuracies are of test" in caption.inner_text()
    assert caption.evaluate("x => x.scrollWidth <= x.clientWidth && x.clientWidth < 360")
    assert box.evaluate("x => x.scrollWidth > x.clientWidth")  # it does scroll
    style = "x => getComputedStyle(x).backgroundAttachment"
    assert box.evaluate(style) == "local, local, scroll, scroll"
    for place in (".example code", ".answers code.text", "#made dd code"):
        found = visit.page.locator(place).first
        wrap = found.evaluate(
            "x => [getComputedStyle(x).overflowWrap, getComputedStyle(x).wordBreak]"
        )
        assert wrap == ["anywhere", "break-all"], place
    assert "python train_small.py" in visit.page.locator("#made dd code").inner_text()
    visit.close()


def test_what_was_not_graded_is_not_called_wrong(visit):
    """A draft is judged by its number; of an expression there may be others that are right."""
    cases = [
        ("1+1=2;#2", "3-1=2;#2<eos>", True),
        ("1+1=2;#2<eos>", "#3<eos>", False),
        ("1+1=2;#2<eos>", "#2", False),  # it does not end
        ("1+1=2;#2<eos>", "1+1=2;", False),
        ("#(2+3)*4<eos>", "#(3+2)*4<eos>", None),
        ("#(2+3)*4<eos>", "#(2+3)*4<eos>", True),
        (None, "#2<eos>", None),
    ]
    for solution, text, right in cases:
        found = visit.evaluate("x => gradeOf(x[1], { solution: x[0] })", [solution, text])
        assert found == right and (found is None) == (right is None), (solution, text)


def test_play_and_pause(visit):
    part = visit.locator("#denoise .denoise")
    part.get_by_role("button", name="Play").click()
    visit.wait_for_timeout(700)
    part.get_by_role("button", name="Pause").click()
    at = part.get_by_label("passes done").input_value()
    heard = part.get_by_label("passes done").get_attribute("aria-valuetext")
    assert heard == f"after {at} of 28 passes"
    assert int(at) > 0 and part.locator(".cell.masked").count() == 28 - int(at)
    visit.wait_for_timeout(700)
    assert part.get_by_label("passes done").input_value() == at


def test_all_controls_have_names_and_are_reached_by_the_tab_key(visit):
    controls = visit.locator("select, input, button")
    assert controls.count() > 30
    named = controls.evaluate_all(
        "list => list.filter(x => !(x.labels?.length || x.textContent.trim())).length"
    )
    assert named == 0
    visit.keyboard.press("Tab")
    assert visit.evaluate("document.activeElement.className") == "skip"
    visit.locator("#denoise .controls select").first.focus()
    seen = []
    for _ in range(14):
        visit.keyboard.press("Tab")
        seen.append(visit.evaluate("document.activeElement.tagName + document.activeElement.type"))
    for wanted in ("INPUTcheckbox", "SELECTselect-one", "BUTTONbutton", "INPUTrange"):
        assert wanted in seen
    outline = visit.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline not in ("none", "")


CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (colour, under) => {
    context.fillStyle = under;
    context.fillRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const rgb = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((x) => {
      const y = x / 255;
      return y <= 0.04045 ? y / 12.92 : ((y + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2];
  };
  let worst = 99;
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((x) => x.nodeType === 3 && x.data.trim());
    if (!own || !element.checkVisibility() || element.closest("svg, script, option")) {
      continue;
    }
    let under = getComputedStyle(document.body).backgroundColor;
    const above = [];
    for (let x = element; x; x = x.parentElement) {
      above.push(getComputedStyle(x).backgroundColor);
    }
    const solid = above.find((x) => !/, 0\\)|\\/ 0\\)|\\/ 0\\.|color\\(/.test(x)) ?? under;
    const filled = above.find((x) => x !== "rgba(0, 0, 0, 0)") ?? solid;
    const a = light(getComputedStyle(element).color, solid);
    const b = light(filled, solid);
    worst = Math.min(worst, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return worst;
}"""


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_fits_and_can_be_read_by_day_and_by_night(browser, file, width):
    visit = Visit(browser, file, viewport={"width": width, "height": 800})
    page = visit.page
    page.locator("details").evaluate_all("list => list.forEach((x) => { x.open = true; })")
    page.locator("input[type=checkbox]").evaluate_all("list => list.forEach((x) => x.click())")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = max(map(int, re.findall(r"\d+", paper)[:3])) < 60
        assert dark == (scheme == "dark")
        if width == 1280:
            assert page.evaluate(CONTRAST) >= 4.5
    visit.close()


def test_hostile_text_is_shown_as_text(browser, tmp_path):
    folder = write_run(tmp_path / "x", response=HOSTILE, answers=12, detailed=12)
    assert report.main([str(folder)]) == 0
    visit = Visit(browser, folder / "report.html", viewport={"width": 360, "height": 800})
    page = visit.page
    assert page.locator("main img, main script").count() == 0
    for loop in METHODS:
        tokens = page.locator(f"#{loop} .answers .side").first.locator(".tokens bdi")
        shown = "".join(tokens.all_inner_texts()).replace("␣", " ")
        assert "</script><script>alert(1)</script><img src=x onerror" in shown, loop
        assert "⟨U+202E⟩␀␇" in shown, loop
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    visit.close()


def test_spoiled_and_older_data_make_no_error(browser, folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    for name in ("answers.jsonl", "pairs.jsonl", "summary.json"):
        (old / name).unlink()
    dice = random.Random(5)
    lines = [json.loads(line) for line in (old / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        for name in list(line.keys() - {"loop", "seed", "step", "prompt", "reward"}):
            if dice.random() < 0.3:
                line[name] = dice.choice([None, [], [None], [[1]], "text", 3, ["a"]])
    dump(old / "samples.jsonl", lines)
    assert report.main([str(old)]) == 0
    visit = Visit(browser, old / "report.html")
    for slider in visit.page.locator("input[type=range]").all():
        slider.press("Home")
        slider.press("End")
    for select in visit.page.get_by_label("problem").all():
        select.select_option(index=1)
    visit.close()


def test_the_runs_can_be_chosen(browser, tmp_path):
    runs = [write_run(tmp_path / name, loops=("ppo",), answers=12) for name in ("gae", "grpo")]
    lines = (runs[1] / "answers.jsonl").read_text().replace('"prompt": "', '"prompt": "0+')
    (runs[1] / "answers.jsonl").write_text(lines)
    assert report.main([*map(str, runs)]) == 0
    visit = Visit(browser, runs[0] / "report.html")
    root = visit.page.locator("#ppo .moving")
    first = root.locator(".answers .detail p").first
    assert "0+" not in first.inner_text()
    root.get_by_label("run and seed").select_option(label="grpo, seed 0")
    assert "0+" in first.inner_text()
    visit.close()


def test_the_committed_page_is_that_of_the_committed_run():
    """notebooks/results/main.html beside main.json: the same results, and no link that leads away."""
    results = report.PARTS.parent / "results"
    page = (results / "main.html").read_text(encoding="utf-8")
    kept = json.loads((results / "main.json").read_text(encoding="utf-8"))
    told = words(page)
    rows = page[page.index('id="made"') :].split("<tr>")
    assert len(kept["results"]) >= 6
    for result in kept["results"]:
        row = next(x for x in rows if f">{result['loop']}</th>" in x)
        shares = [f"{result[name]:.3f}" for name in ("base", "final")]
        for number in (*shares, result["mended"], result["broken"]):
            assert f"<td>{number}</td>" in row, (result["loop"], number)
    assert kept["commit"] in told and len(page.encode()) < 2_000_000
    assert not re.findall(r'(?:href|src)="(?!#)', page)
