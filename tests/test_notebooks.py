"""The notebooks as a reader meets them: thin, in order, asking before they show; and they run."""

import ast
import json
import re
import sys

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

import nanoreward as nr
import train_small
from notebooks import claims, jobs
from tests.conftest import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {
    "00_the_whole_thing",
    "01_walkthrough",
    "02_where_the_blame_goes",
    "03_dpo_and_nll",
    "04_steps",
    "05_denoising",
    "06_judge",
    "07_break_it",
    "08_your_own_reward",
    "09_it_learns_nothing",
}


def test_there_are_ten():
    assert {p.stem for p in PATHS} == NAMES


def statements(source):
    """How many statements a cell has, those inside of its functions and loops too."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(source)))


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_a_notebook_is_thin_asks_first_and_fails_on_purpose(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    code = [c for c in nb.cells if c.cell_type == "code"]
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    source = "\n".join(c.source for c in code)

    # Thin: a cell calls what there is and builds nothing again.
    assert len(code) <= 15 and all(statements(c.source) <= 40 for c in code)
    defined = set(re.findall(r"^(?:def|class) (\w+)", source, re.M))
    assert not defined & (set(vars(nr)) | set(vars(train_small)))

    # It was run from top to bottom, and shows what came out.
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    assert sum(bool(c.outputs) for c in code) >= len(code) - 2

    # It asks, fails on purpose, and has an exercise with a check and a solution.
    assert text.count("**Predict**") >= 3
    assert "deliberate failure" in text.lower() or path.stem == "07_break_it"
    assert "**Exercise**" in text and "**Solution**" in text and "Check" in text
    assert source.count("assert ") >= 4

    # It says at once how long it takes and what curve to expect; 1 to 8 show the measured one.
    assert "**Time**" in nb.cells[0].source and "**What to expect" in nb.cells[0].source
    assert "print(band(" in source or path.stem in ("00_the_whole_thing", "09_it_learns_nothing")


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_what_the_text_of_a_notebook_names_is_there(path):
    nb = nbformat.read(path, as_version=4)
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    sources = [*ROOT.glob("*.py")]
    sources += [*(ROOT / "data").glob("*.py"), *(ROOT / "notebooks").glob("*.py")]
    texts = [p.read_text() for p in sources]
    texts += [c.source + str(c.outputs) for c in nb.cells if c.cell_type == "code"]
    words = set(re.findall(r"\w+", "\n".join(texts)))
    named = re.findall(r"`([A-Za-z_][\w.]*)[(`]", text)
    assert {word for name in named for word in name.split(".")} <= words
    assert set(re.findall(r"\bnr\.(\w+)", text)) <= set(vars(nr))
    flags = re.findall(r"--[a-z-]+", train_small.build_parser().format_help())
    assert set(re.findall(r"--[a-z][a-z-]*", text)) <= set(flags)


# What takes a minute there learns as clearly with a small model, from problems of one operation.
SMALL_MODEL = "width=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp_width=128"
SMALLER = {
    "00_the_whole_thing": {
        "max_ops=2": "max_ops=1",
        "response=20": "response=12",
        "base_updates=400": f"base_updates=400, base_batch=64, demos=10_000, {SMALL_MODEL}",
        "lr=5e-4": "lr=1e-3",
    }
}


@pytest.fixture(scope="module")
def kernel():
    """One process that runs all notebooks: to load torch takes as long as most of them."""
    manager, client = start_new_kernel(cwd=str(ROOT / "notebooks"))
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_a_notebook_runs_from_top_to_bottom(path, kernel):
    """Its own assertions are the test; what it reads from committed runs is printed as it was."""

    def printed(nb):
        return [
            "".join(o["text"] for o in c.get("outputs", []) if o.get("name") == "stdout")
            for c in nb.cells
        ]

    nb = nbformat.read(path, as_version=4)
    before = printed(nb)
    for cell in nb.cells:
        for number, smaller in SMALLER.get(path.stem, {}).items():
            cell.source = cell.source.replace(f"{number},", f"{smaller},")
    forget = nbformat.v4.new_code_cell("%reset -f")  # the names of the notebook before it
    before.insert(0, "")
    nb.cells.insert(0, forget)
    NotebookClient(nb, km=kernel, timeout=300).execute()
    assert all(c.execution_count for c in nb.cells if c.cell_type == "code")
    if "smoke" not in path.read_text():  # numbers of committed runs: the same to the last digit
        assert printed(nb) == before


def line(**more):
    about = dict(id="T", paper="p", claim="c", paper_numbers="n", metric="m", arms=("a", "b"))
    return claims.Claim(**about | dict(effect=lambda a, b: a["x"] - b["x"]) | more)


YES, NO, OPEN = "reproduced", "not reproduced", "undecided"


@pytest.mark.parametrize(
    "low, high, above, at_least, no_worse, equal",
    [
        (0.03, 0.05, YES, YES, YES, NO),
        (0.01, 0.05, YES, OPEN, YES, OPEN),
        (0.005, 0.01, NO, NO, YES, YES),
        (-0.01, 0.05, OPEN, OPEN, YES, OPEN),
        (-0.01, 0.01, NO, NO, YES, YES),
        (-0.05, 0.01, NO, NO, OPEN, OPEN),
        (-0.05, -0.03, NO, NO, NO, NO),
        (-0.05, 0.05, OPEN, OPEN, OPEN, OPEN),
    ],
)
def test_verdicts_follow_the_rule(low, high, above, at_least, no_worse, equal):
    rules = {"above": above, "at least": at_least, "no worse": no_worse, "equal": equal}
    assert {rule: line(least=0.02, rule=rule).verdict(low, high) for rule in rules} == rules


def test_effects_are_paired_by_seed():
    about = {"threads": 1, "commit": "c", "machine": "m", "torch": "t"}
    found = {
        "a": {i: {"x": i + 0.1 + i / 100, **about} for i in (0, 1, 2, 4)},
        "b": {i: {"x": float(i), **about} for i in (2, 1, 3, 4)},
    }
    told = claims.judge(line(), found)
    assert told["seeds"] == [1, 2, 4] and told["effect"] == pytest.approx(0.1 + 7 / 300, abs=1e-4)
    assert told["verdict"] == "reproduced" and told["low"] < told["effect"] < told["high"]
    found["b"][4]["x"] = None  # not defined for this seed: two are too few for a verdict
    assert claims.judge(line(), found) is None and claims.judge(line(), {"a": found["a"]}) is None


def test_every_claim_compares_arms_that_there_are_by_a_rule_of_its_own():
    assert len(claims.CLAIMS) >= 30 and len({c.id for c in claims.CLAIMS}) == len(claims.CLAIMS)
    papers = {c.paper for c in claims.CLAIMS}
    assert {claims.IRPO, claims.GLORE, claims.SRLM, claims.S2S, claims.SAPO, claims.PPO} <= papers
    for claim in claims.CLAIMS:
        assert claim.rule in claims.RULES and claim.least > 0
    own = [claim for claim in claims.CLAIMS if not claim.laptop_runs]
    used = {arm for claim in own for arm in claim.arms}
    assert set(claims.ARMS) == used  # an arm that nobody asks for is time for nothing
    there = set(claims.at_laptop_size())
    assert all(set(claim.arms) <= there for claim in claims.CLAIMS if claim.laptop_runs)


def test_the_claims_at_laptop_size_are_those_of_the_committed_runs():
    large = claims.at_laptop_size()
    assert set(large["gae"]) == set(large["grpo"]) == set(large["rloo"]) == set(range(5))
    lines = {x["id"]: x for x in json.loads(claims.OUT.read_text())}
    compared = [c for c in claims.CLAIMS if c.laptop_runs or lines[c.id]["laptop"]]
    assert len(compared) >= 59
    for claim in compared:
        x = lines[claim.id]
        told = claims.weigh(claim, claims.effects(claim, large))
        kept = {key: x[key] for key in told} if claim.laptop_runs else x["laptop"]
        assert kept == told, claim.id


@pytest.mark.parametrize("seed", ["-1", "20"])
def test_a_seed_that_no_file_and_no_interval_has_is_refused(seed, tmp_path, monkeypatch, capsys):
    measured = []

    def measure(arm, seed, threads, cache):
        measured.append((arm, seed))
        return {"arm": arm, "seed": seed, "seconds": 0.0}

    command = ["x.py", "one", "--cache", str(tmp_path), "--seeds", "12", "9"]
    monkeypatch.setattr(sys, "argv", command)
    jobs.run("", ["one"], tmp_path, measure)
    assert [job["seed"] for job in jobs.read_jobs(tmp_path, "one")] == [9, 12]
    monkeypatch.setattr(sys, "argv", [*command, seed])
    with pytest.raises(SystemExit) as stop:
        jobs.run("", ["one"], tmp_path, measure)
    assert stop.value.code == 2 and "--seeds must lie in 0..19" in capsys.readouterr().err
    assert measured == [("one", 12), ("one", 9)]


def test_the_first_five_seeds_are_shown_and_claims_read_all():
    each = [{"seed": seed} for seed in (0, 4, 5, 12)]
    assert jobs.parted(each) == (each[:2], each[2:])
    assert jobs.parted(each[2:]) == (each[2:], [])


def test_the_committed_verdicts_are_those_of_the_rule():
    if not claims.OUT.exists():
        pytest.skip("claims.json is not there yet")
    lines = json.loads(claims.OUT.read_text())
    kept = {x["id"]: x for x in lines}
    told = (ROOT / "notebooks" / "results" / "README.md").read_text()
    assert claims.headlines(lines) in told and set(claims.HEADLINES) >= {"GLoRe, 2402.10963"}
    assert claims.table(lines) in told and list(kept) == [claim.id for claim in claims.CLAIMS]
    for claim in claims.CLAIMS:
        x = kept[claim.id]
        assert (
            x["verdict"] == claim.verdict(x["low"], x["high"])
            and x["low"] <= x["effect"] <= x["high"]
        )
        assert (x["claim"], x["paper"], x["metric"]) == (claim.claim, claim.paper, claim.metric)
        assert x["verdict"] == "reproduced" or x["why"], claim.id
        assert x["why"] == claims.why(claim, x["verdict"])
