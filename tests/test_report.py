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
        found["value"] = [round(dice.random(), 3) for _ in range(places)]
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
    """A page's text without tags, with plain spaces."""
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
    assert "Of two methods ppo ended highest." in told
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
        assert re.search(r"Flat until update \d+ is normal", section)
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
    change(other / "summary.json", changed={})
    change(other / "config.json", preset="smoke")
    assert "five seeds of the project" not in report.page([other], report.REFERENCE)


def test_patience_is_the_first_look_that_stands_higher():
    assert "until update 10 " in report.patience({1: [0.4, 0.5], 5: [0.49], 10: [0.5], 20: [0.9]})
    assert "never" in report.patience({1: [0.4], 5: [0.44]})


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
    assert '<li class="hue-0">gae</li><li class="hue-1">grpo</li>' in ppo
    names = [job["name"] for job in read_data(html)["ppo"]]
    assert names == ["gae, seed 0", "gae, seed 1", "grpo, seed 0"]
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
    assert "update 40" in part.locator("h4").inner_text()
    slider.focus()
    visit.keyboard.press("Home")
    assert "update 0" in part.locator("h4").inner_text()
    visit.keyboard.press("ArrowRight")
    assert "update 5" in part.locator("h4").inner_text()


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
