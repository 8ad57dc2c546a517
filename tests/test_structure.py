"""What the design promises of the source; the README as a user meets it."""

import ast
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import nanoreward as nr
import train_small
from data.arithmetic import Arithmetic
from notebooks import denoise, inside, preferences
from tests import check_mutations
from tests.conftest import ROOT

MAIN = (ROOT / "nanoreward.py").read_text()
README = (ROOT / "README.md").read_text()
TASK = Arithmetic(1, 3)
RESULTS = (ROOT / "notebooks" / "results" / "README.md").read_text()
FAQ = (ROOT / "notebooks" / "results" / "FAQ.md").read_text()


def imported(nodes):
    """The top-level modules that these nodes import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def imports_of(path):
    """What a file imports: when it is imported itself, and later, inside its functions."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    late = {id(n) for f in functions for n in ast.walk(f)}
    at_once = [n for n in ast.walk(tree) if id(n) not in late]
    return imported(at_once), imported(n for f in functions for n in ast.walk(f))


def test_imports_point_one_way():
    allowed = {"torch", "numpy", "tokenizers", "tqdm", "safetensors"} | set(sys.stdlib_module_names)
    at_once, late = imports_of(ROOT / "nanoreward.py")
    assert at_once <= allowed
    assert late - allowed == {"data"}  # model folders, and the task of the example
    for path in (ROOT / "data").glob("*.py"):
        at_once, late = imports_of(path)
        assert at_once <= allowed | {"data"}, path  # what it shares with another task or a folder
        assert late - allowed <= {"data", "jinja2"}, path  # only chat templates need jinja2
    at_once, late = imports_of(ROOT / "train_small.py")
    assert at_once - allowed == {"nanoreward", "data", "workers"}
    assert imports_of(ROOT / "workers.py")[0] - allowed == {"nanoreward"}
    assert late - allowed == {"notebooks"}  # pictures need matplotlib, training does not


def test_no_code_is_run_from_text_and_no_bare_except():
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "hasattr"), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node)
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), path


def test_every_public_name_has_a_docstring_and_types():
    for node in ast.parse(MAIN).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, node.name
            assert all(a.annotation is not None for a in node.args.args), node.name


def commented(kind):
    """The fields of a class that have a comment above them, or above the fields they follow."""
    found = set()
    above = False
    comments = train_small.field_comments(kind)
    for line in inspect.getsource(kind).splitlines():
        field = re.match(r"    (\w+): \w+ = ", line)
        if field:
            above = above or bool(comments[field[1]])
            found |= {field[1]} if above else set()
        elif not line.strip().startswith("# "):
            above = False  # an empty line ends what a comment is about
    return found


def test_every_config_field_carries_its_reason():
    for name, method in nr.METHODS.items():
        kinds = [kind for kind in method.config.__mro__ if kind is not object]
        assert nr.Config in kinds and nr.Architecture in kinds
        told = set().union(*(commented(kind) for kind in kinds))
        assert {f.name for f in nr.fields(method.config)} - told == set(), name


PHASES = ["1. sample", "2. score", "3. credit", "4. update"]


def section_of(function):
    """The section of nanoreward.py that a function stands in, and its name."""
    lines = MAIN.splitlines()
    at = function.__code__.co_firstlineno
    begin = max(n for n, line in enumerate(lines[:at]) if line.startswith("# ===="))
    rest = itertools.takewhile(lambda line: not line.startswith("# ===="), lines[begin + 1 :])
    return lines[begin].strip("# ="), "\n".join(rest)


def test_loops_share_their_four_phases_in_the_same_words():
    complete = set()
    for name, method in nr.METHODS.items():
        _, section = section_of(method.loop)
        source = inspect.getsource(method.loop)
        found = [
            phase
            for line in section.splitlines()
            if line.strip().startswith("# ")
            for phase in re.findall(r"[1-4]\. \w+", line)
            if phase in PHASES
        ]
        if found:
            # A function that draws and labels may show its own three; the loop names all four.
            assert found[-4:] == PHASES and found[:-4] in ([], PHASES[:3]), name
            complete.add(name)
        else:  # the loop is another method's, whose phases it has
            other = re.search(r"return (\w+)\(state, task, c, ", source)[1]
            assert other in complete, name
        assert not re.search(r"print|tqdm|save|open\(", source), name
        assert method.start.__doc__ and method.loop.__doc__, name
    assert {"ppo", "iterative_dpo", "refine", "denoise"} <= complete


def test_every_method_has_a_section_of_its_own():
    """Its numbers, its loop and its entry stand in one section, whose title names it."""
    for name, method in nr.METHODS.items():
        title, section = section_of(method.loop)
        assert re.search(rf"\b{name}\b", title), (name, title)
        assert f'METHODS["{name}"] = Method(' in section
        if name != "denoise":  # its numbers stand with the model that it trains
            assert f"class {method.config.__name__}(" in section


@pytest.mark.skipif(not os.environ.get("CI"), reason="a check of style, made where CI is set")
@pytest.mark.parametrize("command", ["format --check", "check"])
def test_ruff_is_content(command):
    argv = [sys.executable, "-m", "ruff", *command.split(), "."]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_numbers_come_from_committed_results():
    """Every number of a result row stands in the table that its JSON file gives."""
    both = ((README, ROOT), (RESULTS, ROOT / "notebooks" / "results"))
    rows = [
        (line, at)
        for text, at in both
        for line in text.splitlines()
        if line.startswith("|") and "[json](" in line
    ]
    assert len(rows) >= 7
    for row, at in rows:
        _, *cells, command, numbers = (c.strip() for c in row.strip("|").split("|"))
        kept = json.loads((at / re.search(r"\[json\]\((\S+)\)", numbers)[1]).read_text())
        assert {"command", "commit", "threads", "machine", "results"} <= set(kept)
        printed = " ".join(train_small.table(kept["results"]).split())
        for cell in filter(None, cells):
            assert f" {cell} " in f" {printed} ", (cell, printed)
        assert command.strip("`") in ("", kept["command"]), row


def test_the_readmes_transcripts_are_what_they_say():
    """Wrong before and right after, as in the committed run."""
    kept = json.loads((ROOT / "notebooks" / "results" / "main.json").read_text())["transcripts"]
    shown = re.findall(r"^problem +(\S+).*\nbefore +(\S+) .*\nafter +(\S+) ", README, re.M)
    assert len(shown) == 1
    for problem, *both in shown:
        assert [TASK.grade(problem, text + "<eos>") for text in both] == [0.0, 1.0]
        assert [problem, *(text + "<eos>" for text in both)] in kept["texts"]


def test_every_decimal_of_the_readme_stands_in_a_committed_result():
    kept = (
        json.loads(path.read_text()) for path in (ROOT / "notebooks" / "results").glob("*.json")
    )
    runs = (k["results"] for k in kept if isinstance(k, dict) and "results" in k)
    tables = [train_small.table(results) for results in runs if "loop" in results[0]]
    begin, end = RESULTS.index("## The tour"), RESULTS.index("## Claims")
    known = RESULTS[:begin] + RESULTS[end:] + "\n".join(tables)
    for text, at_least in ((README, 20), (FAQ, 4), (RESULTS[begin:end], 40)):
        told = re.sub(r"```.*?```", "", text, flags=re.S)
        numbers = re.findall(r"-?\b\d\.\d{3}\b(?: ± \d\.\d{3})?", told)
        assert len(numbers) >= at_least
        assert [x for x in numbers if x not in known] == []
    assert len(tables) >= 5


def test_the_table_at_the_head_of_the_file_is_that_of_the_tour():
    kept = json.loads((ROOT / "notebooks" / "results" / "tour.json").read_text())["results"]
    shown = re.findall(r"^    (\w+) +(\d\.\d\d) -> (\d\.\d\d) ", nr.__doc__, re.M)
    assert [name for name, *_ in shown] == list(nr.METHODS)
    for name, *both in shown:
        mine = [{"start": r["base"]} | r for r in kept if r["loop"] == name]
        means = [sum(r[key] for r in mine) / len(mine) for key in ("start", "final")]
        assert both == [f"{x:.2f}" for x in means], name


def test_links_into_the_file_lead_to_the_sections_that_they_name():
    """`[ppo](nanoreward.py#L1409)` leads to the title of the section on ppo."""
    lines = MAIN.splitlines()
    links = re.findall(r"\[([^\]]+)\]\(nanoreward\.py#L(\d+)\)", README)
    assert len(links) >= 15
    for words, number in links:
        title = lines[int(number) - 1]
        assert title.startswith("# ==== "), (words, title)
        section, name = re.fullmatch(r"# ==== (\d+)\. (.+?) =+", title).groups()
        first = re.search(r"\w+", words)[0]
        if words.startswith("section "):
            first = words.split()[1]
        assert first == section or first in name, (words, title)
    linked = {name for words, _ in links for name in nr.METHODS if f"`{name}`" in words}
    assert linked == set(nr.METHODS)


def table_below(words):
    """The cells of the table that follows these words in the full results, header left out."""
    lines = RESULTS[RESULTS.index(words) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[c.strip() for c in row.strip("|").split("|")] for row in rows]


def test_the_readmes_table_of_passes_is_the_committed_one():
    kept = json.loads((ROOT / "notebooks" / "results" / "diffusion.json").read_text())
    assert kept["command"] in RESULTS and len(kept["results"]) >= 5
    rows = table_below("What passes and blocks do")
    assert len(rows) >= 6
    for block, steps, passes, *cells in rows:
        assert int(passes) == 28 // int(block) * int(steps)
        both = zip(*(r[f"{block}/{steps}"] for r in kept["results"]), strict=True)
        assert cells == [train_small.interval(list(x)) for x in both]


def test_the_readmes_benchmarks_are_the_committed_ones():
    kept = json.loads((ROOT / "tests" / "bench" / "bench.json").read_text())
    rows = {row["name"]: row for part in kept.values() for row in part["rows"]}
    shown = table_below("## Benchmarks")
    assert len(shown) >= 8
    for name, ours, theirs, unit, ratio, *_ in shown:
        row = rows[name]
        assert [ours, theirs] == [f"{row[k]:,.0f}" for k in ("ours", "theirs")] and unit == row[
            "unit"
        ]
        assert ratio == f"{row['ratio']:.1f}"


def test_the_readmes_table_of_growth_is_the_committed_one():
    kept = json.loads((ROOT / "tests" / "bench" / "bench.json").read_text())
    rows = {row["name"]: row for row in kept["growth"]["rows"]}
    shown = table_below("What grows, from")
    assert len(shown) == len(rows) / 2 >= 9
    for name, *cells in shown:
        rollouts = rows[f"rollouts, {name}"]
        step = rows[f"SFT step, {name}, forced lengths"]
        expected = []
        for row in (rollouts, step):
            expected += [f"{row['ours']:,.0f}", f"{row['theirs']:,.0f}", f"{row['ratio']:.1f}"]
        assert cells == [*expected, f"{step['share of matmul']:.2f}"], name


def test_the_readmes_last_lines_are_those_of_the_main_job():
    kept = json.loads((ROOT / "notebooks" / "results" / "main.json").read_text())
    assert train_small.table(kept["results"]) in RESULTS
    seconds = kept["whole command"]
    assert f"{seconds['seconds from an empty cache']:.0f} s" in README
    assert f"done after {seconds['seconds of ppo alone']:.0f} seconds" in README
    assert f"{seconds['seconds from an empty cache']:.0f} s" in RESULTS
    assert f"{seconds['seconds to the first trained result']:.0f} s" in RESULTS


def test_ci_runs_exactly_the_readmes_test_command():
    command = re.search(r"<!-- tests -->\s+```sh\n(.+?)\n```", README, re.S)[1]
    assert command in (ROOT / ".ci" / "run").read_text()


def test_nothing_of_a_machine_or_a_registry_is_in_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so nothing says which files are the repository's")
    for path in (ROOT / name for name in listed.stdout.split() if not name.endswith(".png")):
        if path != Path(__file__).resolve():
            text = path.read_text()
            assert not re.search(r"/tmp/\w|/root/|/home/\w|pypi\.org|files\.pythonhosted", text), (
                path
            )


def test_a_committed_result_is_json_that_any_language_reads():
    """Python writes and reads NaN, which JSON has not."""

    def refuse(word):
        raise AssertionError(word)

    paths = sorted((ROOT / "notebooks" / "results").glob("*.json"))
    assert len(paths) >= 10
    for path in paths:
        json.loads(path.read_text(), parse_constant=refuse)


def test_the_readmes_preference_tables_are_those_of_the_committed_runs():
    kept = json.loads(preferences.OUT.read_text())
    lines = preferences.tables(kept).splitlines()
    assert len(lines) >= 12 and all(line in RESULTS for line in lines)
    for arm in kept.values():
        assert arm["command"] and all(
            len(job["rounds"]) >= 2 and job["commit"] for job in arm["seeds"]
        )


@pytest.mark.parametrize("part", [inside, denoise])
def test_the_tables_of_inside_rewards_and_of_denoise_are_those_of_the_committed_runs(part):
    kept = json.loads(part.OUT.read_text())
    lines = [line for line in part.tables(kept).splitlines() if line]
    assert len(lines) >= 20 and all(line in RESULTS for line in lines)
    for arm in kept.values():
        assert arm["command"] and all(job["commit"] and job["found"] for job in arm["seeds"])


def test_every_relative_link_leads_to_a_file():
    pages = ["README.md", "data/README.md", "notebooks/results/README.md"]
    for path in (ROOT / name for name in [*pages, "notebooks/results/FAQ.md"]):
        text = path.read_text()
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(
            r"^\[\w+\]: ([^#\s]+)", text, re.M
        )
        assert links
        for link in links:
            assert link.startswith("http") or (path.parent / link).exists(), (path, link)


def test_links_to_a_heading_of_a_page_lead_to_one():
    """As the sites that show Markdown make them: small letters, words joined by hyphens."""

    def headings(path):
        found = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}

    pages = ["README.md", "data/README.md", "notebooks/results/README.md"]
    checked = 0
    for path in (ROOT / name for name in [*pages, "notebooks/results/FAQ.md"]):
        for link, heading in re.findall(r"\]\(([^)#]*)#([\w-]+)\)", path.read_text()):
            target = path.parent / link if link else path
            if target.suffix == ".md":
                checked += 1
                assert heading in headings(target), (path, link, heading)
    assert checked >= 20


def test_every_row_of_the_mutations_names_a_line_and_a_test_that_are_there():
    found = list(check_mutations.rows())
    assert len(found) > 600
    read = cache(lambda path: (ROOT / path).read_text())
    for file, line, broken, test in found:
        assert read(file).count(line) == 1 and line != broken, (file, line)
        name, _, function = test.partition("::")
        assert f"def {function.partition('[')[0]}" in read(f"tests/{name}"), test
