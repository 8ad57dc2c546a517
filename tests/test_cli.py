"""The scripts as a user meets them: runs, resume, bad input, outputs, and the smallest example."""

import ast
import functools
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nanoreward as nr
import train_small as front
from data import arithmetic
from data.arithmetic import Arithmetic, CharacterTask
from tests.conftest import ROOT, tiny


def call(*argv, **kwargs):
    """Run the script as a user does; one thread, no picture of the user's own cache."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train_small.py"), *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, cache):
    """One finished smoke run with two seeds, from nothing."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    done = call(
        "ppo",
        "--config",
        "smoke",
        "--out",
        out,
        "--cache",
        cache,
        "--seeds",
        2,
        "--target",
        "ppo=0.0",
        "--ceiling",
        "--workers",
        1,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def inside(*argv):
    """main() in this process: exit code."""
    return front.main([str(a) for a in argv])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(path):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(path)]


def test_a_run_leaves_what_the_design_promises(smoke):
    out, text = smoke
    names = {p.name for p in out.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "answers.jsonl",
        "summary.json",
        "models",
        "curves.png",
        "report.html",
    } <= names and not {"jobs", "pairs.jsonl"} & names
    about = json.loads((out / "config.json").read_text())
    assert set(about) == set(
        "configs preset seeds targets inputs ceiling command commit cache sha256".split()
    )
    assert set(about["configs"]) == {"ppo"} and about["inputs"] == {}
    config = about["configs"]["ppo"]
    assert set(config) == {f.name for f in fields(nr.PPOConfig)} and config["width"] == 32
    metrics = lines(out / "metrics.jsonl")
    assert [(m["loop"], m["seed"], m["step"]) for m in metrics] == [
        ("ppo", s, u) for s in (0, 1) for u in (1, 2, 3, 4)
    ]
    assert all(v is None or isinstance(v, str) or abs(v) < 1e9 for m in metrics for v in m.values())
    assert {
        "seconds",
        "reward",
        "truth",
        "kl",
        "entropy",
        "clipfrac",
        "samples",
        "loss",
        "lr",
    } <= set(metrics[0])
    samples = lines(out / "samples.jsonl")
    head = {"loop", "seed", "step", "prompt", "response", "reward", "tokens", "steps_right"}
    assert head | {"token_rewards", "shift", "value"} == set(samples[0])
    for s in samples:  # the verifier pays at the end only
        assert s["token_rewards"][:-1] == [0.0] * (len(s["token_rewards"]) - 1)
    assert {s["step"] for s in samples} == {0, 1, 2, 4}
    summary = json.loads((out / "summary.json").read_text())
    wanted = {
        "loop",
        "seed",
        "base",
        "final",
        "chance",
        "ceiling",
        "seconds",
        "samples",
        "updates",
        "final_sampled",
    }
    assert all(wanted <= set(r) for r in summary["results"]) and summary["threads"] == 1
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    for word in (
        "chance",
        "base",
        "ppo",
        "careful twin",
        "what to watch",
        "target ppo 0.0: reached",
        "±",
    ):
        assert word in text
    assert not list(out.rglob("*.tmp"))


def written(out):
    """How many lines of metrics a run has logged, with those of jobs at work."""
    while True:
        try:
            logs = [out / "metrics.jsonl", *out.glob("jobs/*/metrics.jsonl")]
            return sum(path.read_text().count("\n") for path in logs if path.exists())
        except FileNotFoundError:  # a job has ended at this moment, and its folder is gone
            continue


def test_help_shows_every_flag_with_its_comment_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")  # no line is broken
    assert set(nr.METHODS) == set(front.flag_groups()) - {"all methods"}
    with pytest.raises(SystemExit) as stopped:
        inside("--help")
    assert stopped.value.code == 0
    groups = dict(re.findall(r"^([a-z][\w ]*):\n((?: .*\n?)+)", capsys.readouterr().out, re.M))
    owner = {}
    for group in ("all methods", *nr.METHODS):
        flags = re.findall(r"^  --([\w-]+) ([A-Z]+)\s+(.*)\[(.*)\]$", groups.get(group, ""), re.M)
        for name, kind, comment, default in flags:
            name = name.replace("-", "_")
            assert name not in owner, name
            owner[name] = group
            assert len(comment.split()) > 1, f"--{name} says nothing about itself"
            for method in nr.METHODS.values():
                for f in fields(method.config):
                    if f.name == name:
                        assert kind == f.type.upper() and str(f.default) in default, name
    all_of_them = {f.name for m in nr.METHODS.values() for f in fields(m.config)}
    assert set(owner) == all_of_them - front.NO_FLAG and all_of_them > front.NO_FLAG
    shared = {f.name for f in fields(nr.Config)}
    for name, group in owner.items():
        if group == "all methods":
            assert name in shared
        else:
            assert name not in shared
            assert name in {f.name for f in fields(nr.METHODS[group].config)}


def test_a_flag_reaches_the_methods_that_read_it_and_no_other():
    configs = front.configs_of(["ppo", "refine", "denoise"], "smoke", {"epochs": 3, "prompts": 9})
    assert (configs["ppo"].epochs, configs["denoise"].epochs) == (3, 3)
    assert not hasattr(configs["refine"], "epochs")
    assert {c.prompts for c in configs.values()} == {9}
    without = front.make_config("refine", "smoke")
    assert configs["refine"] == replace(without, prompts=9) and without.prompts != 9


def trained(state):
    """Copies of all weights that a loop trains."""
    parts = [state, *getattr(state, "fits", {}).values()]
    groups = [g for part in parts for o in part.optimizers for g in o.param_groups]
    return [p.detach().clone() for g in groups for p in g["params"]]


@pytest.mark.parametrize("loop", nr.METHODS)
def test_smoke_takes_real_steps_in_every_loop(cache, tmp_path, monkeypatch, loop):
    """Most tests run this preset: with no pair or no right response it would test nothing."""
    method = nr.METHODS[loop]
    seen = {}

    def watched(policy, c):
        seen["state"] = method.start(policy, c)
        seen["before"] = trained(seen["state"])
        return seen["state"]

    monkeypatch.setitem(nr.METHODS, loop, replace(method, start=watched))
    assert inside(loop, "--config", "smoke", "--out", tmp_path, "--cache", cache) == 0
    metrics = lines(tmp_path / "metrics.jsonl")
    assert len(metrics) >= 3
    for m in metrics:
        losses = [v for k, v in m.items() if k == "loss" or k.endswith("_loss")]
        assert losses and all(math.isfinite(v) for v in losses) and m.get("pairs", 1) > 0
    after = trained(seen["state"])
    assert len(after) == len(seen["before"]) > 5
    moved = [not torch.equal(a, b) for a, b in zip(seen["before"], after, strict=True)]
    assert all(moved)


def test_the_smallest_example_shows_a_problem_wrong_before_and_right_after(monkeypatch, capsys):
    """`python nanoreward.py`, with a smaller model and easier problems."""
    usual = nr.PPOConfig

    def smaller(**numbers):
        small = dict(numbers, max_ops=1, response=12, layers=1, width=32, head_dim=8, mlp_width=64)
        return usual(**small | dict(threads=1, prompts=32, minibatch=256))

    monkeypatch.setattr(nr, "PPOConfig", smaller)
    nr.main()
    said = capsys.readouterr().out
    before, after = re.search(r"greedy accuracy (\d\.\d\d) -> (\d\.\d\d)\n", said).groups()
    assert float(before) < float(after)
    shown = re.search(r"problem   (\S+)\nbefore    (\S*)\nafter     (\S+)\n", said).groups()
    problem, *both = shown
    task = front.make_task(usual(max_ops=1))
    assert [task.grade(problem, text) for text in both] == [0.0, 1.0]
    assert len(re.findall(r"^update +\d+   right \d\.\d\d$", said, re.M)) >= 3
    last = ast.parse((ROOT / "nanoreward.py").read_text()).body[-1]
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main()"


def test_a_finished_run_says_so_and_changes_nothing(smoke, cache, capsys):
    out, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    for argv in (
        ["--resume", out],
        "ppo --config smoke --seeds 2 --target ppo=0.0 --ceiling --out".split() + [out],
    ):
        assert inside(*argv, "--cache", cache) == 0
        assert "finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_sudoku_runs_through_the_same_door(cache, tmp_path):
    run = ["denoise", "--config", "smoke", "--task", "sudoku", "--response", 17, "--updates", 2]
    run += ["--block", 17, "--block-passes", 17, "--look-ahead", 0]
    assert inside(*run, "--out", tmp_path, "--cache", cache) == 0
    shown = lines(tmp_path / "samples.jsonl")[-1]
    assert len(shown["prompt"]) == 17
    assert sorted(shown["order"]) == list(range(17)) and len(shown["said"]) == 17


def test_a_missed_target_exits_one(smoke, cache, tmp_path):
    out = tmp_path / "x"
    run = ["ppo", "--config", "smoke", "--updates", 1, "--out", out, "--cache", cache]
    assert inside(*run, "--target", "ppo=1.0") == 1
    assert json.loads((out / "summary.json").read_text())["results"][0]["updates"] == 1


def test_killed_anywhere_and_resumed_bit_for_bit(cache, tmp_path):
    """A real SIGKILL at a moment nobody chose, twice; the outputs equal those of a quiet run.

    It comes in the first method, and in the second. A kill that is imitated is tried in every loop
    by test_resume.py.
    """
    run = ["ppo", "denoise", "--config", "smoke", "--updates", 12, "--eval-every", 3, "--seeds", 2]
    run += ["--cache", cache, "--workers", 1]
    assert inside(*run, "--out", tmp_path / "quiet") == 0
    out = tmp_path / "killed"
    argv = [sys.executable, str(ROOT / "train_small.py"), *map(str, run), "--out", str(out)]
    kills = 0
    for step in (5, 17):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None:
            if written(out) >= step:
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
        for log in out.glob("jobs/*/metrics.jsonl"):
            with log.open("a") as f:
                f.write('{"loop": "ppo", "se')  # torn, as a full disk or a power cut leaves it
        resume = ["--resume", str(out), "--cache", str(cache), "--workers", "1"]
        argv = [sys.executable, str(ROOT / "train_small.py"), *resume]
    assert kills == 2, process.stderr.read()
    assert inside(*resume) == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_time(out / name) == without_time(tmp_path / "quiet" / name)
    for job in ("ppo-0", "denoise-0", "ppo-1", "denoise-1"):
        name = f"models/{job}/model.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()
    drawn = {"ppo": ["token_rewards"], "denoise": ["order", "sure", "said", "prospects"]}
    for loop, inner in drawn.items():  # what the per-token pictures are drawn from
        shown = next(line for line in lines(out / "samples.jsonl") if line["loop"] == loop)
        assert all(len(shown[k]) > 0 for k in inner)
    results = [
        json.loads((f / "summary.json").read_text())["results"] for f in (out, tmp_path / "quiet")
    ]
    assert [r | {"seconds": 0} for r in results[0]] == [r | {"seconds": 0} for r in results[1]]


def test_ctrl_c_saves_prints_the_resume_command_and_exits_130(cache, tmp_path):
    out = tmp_path / "x"
    more = ["--config", "smoke", "--updates", 400, "--eval-every", 400, "--cache", cache]
    argv = [sys.executable, str(ROOT / "train_small.py"), "ppo", *map(str, more), "--out", str(out)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while written(out) == 0:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and f"--resume {out}" in text
    job = out / "jobs" / "ppo-0"
    saved = nr.load_state(job)["state"]["update"]
    assert 0 < saved < 400 and lines(job / "metrics.jsonl")[-1]["step"] == saved


def test_the_base_cache_is_reused_and_never_stale(tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def retrained(c, careful=False):
        """What had to be trained for M1 of self_rewarding and for the base model below it."""
        before = set(cache.glob("*-*"))
        train = front.CachedTrainer(cache, "careful-" if careful else "")
        task = front.make_task(c, careful)
        nr.m1(nr.gpt_base(task, c, train), task, c, train)
        return {path.name.rsplit("-", 1)[0] for path in set(cache.glob("*-*")) - before}

    small = dict(base_updates=2, demos=50, response=20, start_updates=2, start_data=60)
    c = tiny("self_rewarding", device="cpu", **small)
    both, neither = {"gpt", "m1"}, set()
    assert retrained(c) == both and retrained(c) == neither  # trained once
    # what neither of them reads
    assert retrained(replace(c, lr=0.5, updates=9, beta=1.0, rounds=7, judge="frozen")) == neither
    for change in (
        dict(seed=1),
        dict(width=64),
        dict(base_lr=0.1),
        dict(demos=51),
        dict(base_updates=3),
        dict(response=24),
        dict(max_ops=2),
        dict(answers=7),
        dict(planted="none"),
        dict(planted="refusal"),
    ):  # the last four: only the task reads them
        assert retrained(replace(c, **change)) == both, change
    for change in (
        dict(start_data=61),
        dict(judging=0.5),
        dict(start_updates=3),
        dict(start_lr=0.02),
        dict(start_muon_lr=0.02),
    ):
        assert retrained(replace(c, **change)) == {"m1"}, change
    assert retrained(c, careful=True) == {"careful-gpt", "careful-m1"}

    source = Path(nr.__file__).read_text()
    edits = [
        (
            '"""A number for each hidden vector: (',
            '"""One number for each hidden vector: (',
            neither,
        ),  # a docstring
        ("# ==== 9. ppo ====", "# ==== 9. PPO ====", neither),  # a comment
        ("\nfrom __future__", "\n" + "# More.\n" * 300 + "from __future__", neither),  # all moves
        ("# Usual in RLHF;", "# What RLHF takes;", neither),  # a comment of Part I
        ("    updates: int = 40\n", "    updates: int = 41\n", neither),  # defaults: a config ...
        (
            "    base_updates: int = 400\n",
            "    base_updates: int = 401\n",
            neither,
        ),  # ... has values
        ("    width: int = 64\n", "    width: int = 65\n", neither),
        ("    judging: float = 0.7\n", "    judging: float = 0.6\n", neither),
        ("torch.minimum(ratio * adv", "torch.maximum(ratio * adv", neither),  # ppo's loss
        ("x = 3.4445 * x", "x = 3.4446 * x", both),  # Muon
        ("F.silu(self.gate_proj(x))", "F.gelu(self.gate_proj(x))", both),  # the model
        ("* (1 - update / updates)", "* (1 - update / updates / 2)", both),  # the schedule of fit
        ("return x[:, P - 1 : -1]", "return x[:, P:]", both),  # the shift, four calls deep
        ("CLIP_GRAD = 1.0", "CLIP_GRAD = 2.0", both),  # a number that no config holds
        ("elif chance > 1 - POSING:", "elif chance >= 1 - POSING:", {"m1"}),  # m1_demos
        ("\nPOSING = 0.07", "\nPOSING = 0.08", {"m1"}),
    ]
    for i, (old, new, expected) in enumerate(edits):
        assert source.count(old) == 1, old
        edited = tmp_path / f"edit{i}" / "nanoreward.py"
        edited.parent.mkdir()
        edited.write_text(source.replace(old, new))
        monkeypatch.setattr(nr, "__file__", str(edited))
        assert retrained(c) == expected, old


def test_a_base_is_keyed_by_the_code_that_was_imported_and_not_by_what_is_saved_later(
    tmp_path, monkeypatch
):
    path = tmp_path / "own.py"
    path.write_text("before")
    monkeypatch.setitem(front.TASKS, "own", SimpleNamespace(__file__=str(path)))
    assert front.code_of_task("own") == "before"
    path.write_text("after")
    assert front.code_of_task("own") == "before"
    # A task that takes something from another one is keyed by both.
    texts = {name: front.source_of(task.__file__) for name, task in front.TASKS.items()}
    assert front.code_of_task("arithmetic") == texts["arithmetic"]
    assert front.code_of_task("sums").startswith(texts["sums"])
    assert texts["gsm8k"] in front.code_of_task("sums")


def test_a_task_of_ones_own_is_keyed_by_what_lies_beside_it(tmp_path, monkeypatch):
    """However it takes something from there, and whatever that takes in turn; nothing else."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_a.py").write_text("import json, own_b\nfrom own_c import C\n")
    (tmp_path / "own_b.py").write_text("from own_d import f as g\n")
    (tmp_path / "own_c.py").write_text("class C:\n    pass\n")
    (tmp_path / "own_d.py").write_text("def f():\n    pass\n")
    (tmp_path / "own_e.py").write_text("nobody = 'uses this'\n")
    monkeypatch.setitem(front.TASKS, "own", importlib.import_module("own_a"))
    texts = [(tmp_path / f"own_{x}.py").read_text() for x in "abcd"]
    assert front.code_of_task("own") == "".join(texts)


def test_two_runs_that_begin_at_once_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [front.free_folder("ppo") for _ in range(2)]
    assert [str(path) for path in found] == ["runs/ppo-1", "runs/ppo-2"]
    assert all(path.is_dir() for path in found)


def test_a_method_in_another_file_is_keyed_by_that_file():
    code = front.code_of(lambda: None)
    assert code.endswith(Path(__file__).read_text()) and Path(nr.__file__).read_text() in code


def spied(c, seen):
    """The same config; the names of the numbers that are read of it go into `seen`."""
    names = {f.name for f in fields(c)}

    def look(self, name):
        if name in names:
            seen.add(name)
        return object.__getattribute__(self, name)

    return type("Spied", (type(c),), {"__getattribute__": look})(**vars(c))


def trained_models():
    """All functions that train a model before a loop, with the config of their method."""
    found = {nr.gpt_base: front.make_config("ppo", "smoke", device="cpu")}
    for name, method in nr.METHODS.items():
        c = front.make_config(name, "smoke", device="cpu")
        if method.starts_from is not None:
            found[method.starts_from] = c
        if method.reward_models is nr.ppo_reward_models:
            found |= {s.models: replace(c, reward=key) for key, s in nr.REWARDS.items()}
        else:
            found[method.reward_models] = c
    del found[nr.no_models]
    return found


def given_base(models, task, c):
    """What the function is given first: a base that knows a little, but for the base itself."""
    return [] if models is nr.gpt_base else [deepcopy(base_of(task, c.seed))]


@functools.cache
def base_of(task, seed):
    """The base of a smoke run."""
    return nr.gpt_base(task, tiny("ppo", seed=seed))


def test_the_key_of_a_trained_model_holds_every_number_that_its_training_reads(monkeypatch):
    """`reads` is written by hand: with a number missing, the cache would give an outdated model."""
    covered = {f.name for f in fields(nr.Config)} - front.NOT_OF_A_BASE
    checked = set()
    for models, c in trained_models().items():
        seen = set()
        task = front.make_task(c)

        def quietly(record, seen=seen, **numbers):
            before = set(seen)
            changed = replace(record, **numbers)  # reads all of them, and says nothing by that
            seen.intersection_update(before)
            return changed

        def train(name, modules, batches, updates, c, lr, muon_lr=0.0, **more):
            more_few = {k: v for k, v in more.items() if k != "reads"}
            nr.train_now(name, modules, batches, 2, c, lr, muon_lr, **more_few)
            found[name] = (set(seen), set(more.get("reads", "").split()))
            given[name] = (updates, lr, muon_lr, more.get("warmup"))

        def note(name, modules, batches, updates, c, lr, muon_lr=0.0, **more):
            given[name] = (updates, lr, muon_lr, more.get("warmup"))

        found, given = {}, {}
        with monkeypatch.context() as patch:
            patch.setattr(nr, "replace", quietly)
            models(*given_base(models, task, c), task, spied(c, seen), train)
        usual = given
        assert found, models
        for name, (read, reads) in found.items():
            assert reads <= read, (name, "is said to be read, but is not")
            for number in read - covered - reads:  # it has to be one that the trainer is given
                given = {}
                value = getattr(c, number)
                assert isinstance(value, int | float), (name, number)
                base = given_base(models, task, c)
                models(*base, task, replace(c, **{number: value * 2}), note)
                assert given[name] != usual[name], (name, number)
            checked.add(name)
    assert checked == {"gpt", "m1", "student", "scorer", "rewriter", "sorm", "diffusion"}


@pytest.mark.parametrize(
    "argv,says",
    [
        (["nothing"], "no loop is called 'nothing'"),
        (["ppo", "--nonsense", "1"], "nonsense"),
        (["ppo", "--lr", "fast"], "--lr"),
        (["ppo", "--lr", "nan"], "--lr must be a finite number"),
        (["ppo", "--lr", "inf"], "--lr must be a finite number"),
        (["ppo", "--lr", "-1"], "--lr must be above 0"),
        (["ppo", "--updates", "0"], "--updates must be above 0"),
        (["ppo", "--updates", "2.5"], "--updates"),
        (["ppo", "--temperature", "0"], "--temperature must be above 0"),
        (["ppo", "--seed", "-1"], "--seed must be 0 or more"),
        (["ppo", "--arm", "a2c"], "--arm must be one of gae, grpo, rloo"),
        (["ppo", "--reward", "vibes"], "--reward must be one of"),
        (["self_rewarding", "--judge", "vibes"], "--judge must be one of own, frozen"),
        (["self_rewarding", "--judging", "0.95"], "at most 0.93"),
        (["self_rewarding", "--samples", "1"], "--samples must be at least 2"),
        (["self_rewarding", "--judgements", "0"], "--judgements must be above 0"),
        (["self_rewarding", "--judgements", "2"], "--judgements must be at least 3"),
        (["self_rewarding", "--alpha", "-1"], "--alpha must be 0 or more"),
        (["self_rewarding", "--arm", "grpo"], "--arm must be one of dpo_nll, sft_chosen"),
        (["iterative_dpo", "--arm", "gae"], "--arm must be one of dpo_nll, sft_chosen"),
        (["iterative_dpo", "ppo", "--arm", "grpo"], "--arm must be one of dpo_nll, sft_chosen"),
        (["iterative_dpo", "--bf16", "maybe"], "--bf16"),
        (["refine", "--continuations", "0"], "--continuations must be above 0"),
        (["refine", "--threshold", "0.4"], "--threshold"),
        (
            ["seq2seq", "--planted", "flattery"],
            "--planted must be one of none, round, long, refusal",
        ),
        (["seq2seq", "--planted", "long"], "--response must be at least 52"),
        (["seq2seq", "--reward-data", "0"], "--reward-data must be above 0"),
        (["seq2seq", "--arm", "dpo_nll"], "--arm must be one of gae, grpo, rloo"),
        (["denoise", "--arm", "blame"], "--arm must be one of outcome, process"),
        (["denoise", "--t-min", "0"], "--t-min must be above 0"),
        (["denoise", "--t-min", "1.5"], "--t-min is a rate, at most 1"),
        (["denoise", "--look-ahead", "1.5"], "--look-ahead is a share of --start-updates"),
        (["denoise", "--samples", "1"], "--samples 2 or more"),
        (["iterative_dpo", "--temperature", "0.001"], "at least 0.01"),
        (["ppo", "--answers", "1"], "--answers must lie in"),
        (["ppo", "--arm", "grpo", "--samples", "1"], "--samples 2 or more"),
        (["ppo", "--response", "10"], "--response must be at least 12"),
        (["denoise", "--task", "sudoku", "--response", "16"], "--response must be at least 17"),
        (["ppo", "--task", "chess"], "--task must be one of arithmetic, countdown, sudoku"),
        (["ppo", "--heads", "3", "--kv-heads", "2"], "--heads must be a multiple"),
        (["ppo", "--min-ops", "5"], "--min-ops must not be above"),
        (["ppo", "--lam", "1.5"], "0..1"),
        (["ppo", "--eos-id", "0"], "--eos-id"),
        (["ppo", "--bf16", "maybe"], "true_or_false"),
        # what would change nothing: no method that is named has the number,
        (["iterative_dpo", "--epochs", "5"], "--epochs would change nothing: iterative_dpo does"),
        (["refine", "--beta", "1"], "--beta would change nothing: refine does not read it"),
        (["seq2seq", "--reward", "learned"], "--reward would change nothing: seq2seq does not"),
        (["refine", "iterative_dpo", "--clip", "1"], "--clip would change nothing"),
        (["ppo", "--pairs", "5"], "--pairs"),
        # its arm or reward does not read it,
        (["ppo", "--arm", "grpo", "--lam", "0.5"], "--lam would change nothing"),
        (["ppo", "--arm", "rloo", "--value-coef", "1"], "read only with --arm gae"),
        (["ppo", "--reward-updates", "9"], "read only with --reward learned or sorm or shaped"),
        (
            ["ppo", "--reward", "learned", "--continuations", "9"],
            "read only with --reward sorm or shaped",
        ),
        (["iterative_dpo", "--arm", "sft_chosen", "--alpha", "1"], "only with --arm dpo_nll"),
        (["self_rewarding", "--arm", "sft_chosen", "--beta", "1"], "only with --arm dpo_nll"),
        (["denoise", "--arm", "outcome", "--branches", "3"], "--branches would change nothing"),
        # or its task does not.
        (
            ["ppo", "--task", "sudoku", "--response", "17", "--max-ops", "2"],
            "--max-ops would change nothing: it is read only with --task arithmetic",
        ),
        (["ppo", "--data", "elsewhere"], "--data would change nothing"),
        (["ppo", "--model", "elsewhere"], "only with --task gsm8k"),
        (["ppo", "--config", "huge"], "no config is called 'huge'"),
        (["ppo", "--device", "tpu"], "--device tpu is not here"),
        (["ppo", "--seeds", "0"], "--seeds must lie in"),
        (["ppo", "--target", "ppo"], "as ppo=0.8"),
        (["ppo", "--target", "ppo=2"], "0..1"),
        (["ppo", "--target", "dpo=0.5"], "a loop of this run"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", "nowhere", "--lr", "1"], "takes all numbers from its folder"),
        (["--resume", "nowhere", "--ceiling"], "takes all numbers from its folder"),
        (["ppo", "--workers", "0"], "--workers must be above 0"),
        (["ppo", "--workers", "1000"], "--workers must be at most 256"),
        (["ppo", "--device", "cpu:zzz"], "is not here"),
        (["ppo", "--temperature", "1e-40"], "at least 0.01"),
        (["sample", "nowhere", "--prompt", "1+1="], "nowhere"),
        (["plot", "nowhere"], "nowhere"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_line_exit_two_and_no_file(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # a preset flag comes first, so that a later one in argv wins
    smoke = (
        ["--config", "smoke", "--cache", "cache"]
        if argv[0] == "ppo" and "--config" not in argv
        else []
    )
    assert inside(*argv[:1], *smoke, *argv[1:]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_an_out_folder_that_is_not_ours_is_left_alone(smoke, cache, tmp_path, capsys):
    out, _ = smoke
    before = (out / "config.json").read_bytes()
    assert inside("ppo", "--config", "smoke", "--out", out, "--cache", cache, "--lr", 0.5) == 2
    assert "another config; choose another --out" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == before
    (tmp_path / "letter.txt").write_text("mine")
    assert inside("ppo", "--config", "smoke", "--out", tmp_path, "--cache", cache) == 2
    assert "not a run's folder" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1
    file = tmp_path / "letter.txt"
    assert inside("ppo", "--config", "smoke", "--out", file, "--cache", cache) == 2
    assert "cannot write" in capsys.readouterr().err and file.read_text() == "mine"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_out_is_one_line(cache, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert inside("ppo", "--config", "smoke", "--out", tmp_path / "x", "--cache", cache) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", ["config.json", "summary.json", "state.pt", "other version", "other state"]
)
def test_a_damaged_run_folder_is_one_line(cache, tmp_path, monkeypatch, capsys, damage):
    out = tmp_path / "x"
    argv = "ppo iterative_dpo --config smoke --updates 2 --eval-every 1".split()
    argv += ["--cache", cache, "--out", out]

    def stop(job):
        if job.name == "iterative_dpo":
            raise KeyboardInterrupt
        finish(job)

    finish = front.Job.finish
    with monkeypatch.context() as patch:
        patch.setattr(front.Job, "finish", stop)
        assert inside(*argv) == 130
    state = out / "jobs" / "iterative_dpo-0" / "state.pt"
    if damage == "other version":
        about = json.loads((out / "config.json").read_text())
        about["configs"]["ppo"]["colour"] = "red"
        (out / "config.json").write_text(json.dumps(about))
    elif damage == "other state":
        nr.save_state(state.parent, {"update": 1})
    else:
        path = state if damage == "state.pt" else out / damage
        path.write_bytes(path.read_bytes()[:9])
    capsys.readouterr()
    assert inside("--resume", out, "--cache", cache) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(out) in error
    assert "state" not in damage or str(state) in error


def test_sample_answers_and_says_what_is_wrong_with_a_prompt(smoke, capsys):
    out, _ = smoke
    assert inside("sample", out, "--loop", "ppo", "--prompt", "3+4=", "--temperature", 1) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == 1
        and printed[0].startswith("3+4= ")
        and printed[0].endswith(("right", "wrong"))
    )
    for argv, says in [
        (["--prompt", "3+4"], "not a problem"),
        (["--prompt", "3+4=", "--seed", 9], "does not exist"),
        (["--prompt", "3+4=", "--temperature", "nan"], "--temperature"),
        (["--prompt", "3+4=", "--loop", "dpo"], "has no method 'dpo'; it has ppo"),
        (["--prompt", "3+4=", "--seed", "9"], "there are ppo-0, ppo-1"),
    ]:
        assert inside("sample", out, *argv) == 2
        assert says in capsys.readouterr().err


def test_plot_draws_two_runs_and_says_when_matplotlib_is_missing(
    smoke, tmp_path, monkeypatch, capsys
):
    out, _ = smoke
    png = tmp_path / "both.png"
    assert inside("plot", out, out, "--png", png) == 0
    assert inside("plot", out, "--png", out / "config.json" / "a.png") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert png.read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "metrics.jsonl").write_text('{"loop" "ppo"}\n')
    assert inside("plot", tmp_path, "--png", png) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "metrics.jsonl") in error
    png.unlink()
    monkeypatch.delitem(sys.modules, "notebooks.curves")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert inside("plot", out, "--png", png) == 0
    assert "pip install matplotlib" in capsys.readouterr().out and not png.exists()


def test_the_picture_has_a_panel_a_loop_with_the_mean_of_the_seeds_in_a_band(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    seen = [
        ("ppo", 0, 1, 0.2),
        ("ppo", 0, 5, 0.4),
        ("ppo", 1, 1, 0.4),
        ("ppo", 1, 5, 0.8),
        ("refine", 0, 1, 0.5),
    ]
    seen += [
        ("refine", 0, 9, 0.6),
        ("refine", 1, 1, 0.7),
    ]  # a seed that has not come to update 9 yet
    keys = "loop", "seed", "step", "dev_greedy"
    metrics = [dict(zip(keys, x, strict=True)) for x in seen] + [
        {"loop": "ppo", "seed": 0, "step": 2}
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    results = [{"loop": "ppo", "seed": seed, "base": base} for seed, base in ((0, 0.1), (1, 0.3))]
    (tmp_path / "summary.json").write_text(json.dumps({"results": results}))
    drawn = {}
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, path, **_: (drawn.update({a.get_title(): a for a in self.axes}), path.touch()),
    )
    front.draw_picture([tmp_path], tmp_path / "curves.png")
    curve, base = (x.get_xydata().tolist() for x in drawn["ppo"].lines)
    assert curve == [[1, pytest.approx(0.3)], [5, pytest.approx(0.6)]] and base[0][
        1
    ] == pytest.approx(0.2)
    band = drawn["ppo"].collections[0].get_datalim(drawn["ppo"].transData)
    assert (band.x0, band.x1, band.y0, band.y1) == pytest.approx((1, 5, 0.2, 0.8))
    assert drawn["refine"].lines[0].get_xydata().tolist() == [[1, pytest.approx(0.6)]]


def test_notes_say_in_plain_words_why_nothing_is_learned():
    fine = dict(flat_groups=0.2, ended=1.0, kl=1.0, entropy=0.5)
    c = tiny("ppo", arm="grpo")
    assert front.notes(fine, c) == {}
    for change, word in [
        (dict(flat_groups=1.0), "equal rewards"),
        (dict(ended=0.0), "EOS"),
        (dict(kl=50.0), "KL runs away"),
        (dict(entropy=1e-5), "all samples are the same"),
        (dict(pairs=0), "teaches nothing"),
        (dict(chosen_per_token=-2.0), "chosen log-prob falls"),
    ]:
        assert word in " ".join(front.notes(fine | change, c).values())
    # a critic compares across prompts
    assert not front.notes(fine | dict(flat_groups=1.0), tiny("ppo", arm="gae"))


@pytest.mark.parametrize(
    "argv, lacks",
    [
        (["ppo"], "chance"),
        (["ppo", "--reward", "learned"], "preferences"),
        (["ppo", "--reward", "sorm"], "uses"),
        (["self_rewarding"], "judge_demo"),
        (["seq2seq"], "preferences"),
        (["refine"], "steps"),
    ],
)
def test_a_task_that_lacks_what_a_method_asks_of_it_is_one_line(
    argv, lacks, tmp_path, monkeypatch, capsys
):
    every = vars(CharacterTask) | vars(Arithmetic)
    every = {k: v for k, v in every.items() if not k.startswith("_") and k != lacks}
    lacking = type("Lacking", (), every)
    task = SimpleNamespace(**vars(arithmetic) | {"make": lambda c, careful=False: lacking()})
    monkeypatch.setitem(front.TASKS, "arithmetic", task)
    assert inside(*argv, "--config", "smoke", "--out", tmp_path / "x", "--cache", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"a method {lacks!r}; Lacking has none" in error and error.count("\n") == 1


def test_why_a_number_is_not_read_is_said_in_words():
    """Also where no run shows it: arms of denoise and seq2seq, and models that are folders."""

    def why(name, number, **numbers):
        return front.why_unread(name, number, tiny(name, **numbers))

    for number in ("prover", "branches", "process_weight", "tail"):
        assert why("denoise", number, arm="outcome") == "it is read only with --arm process"
        assert why("denoise", number, arm="process") == ""
    told = why("denoise", "tail", arm="process", prover="same_canvas")
    assert told == "it is read only with --prover short_tail"
    for name in ("ppo", "seq2seq"):
        for number in ("lam", "value_coef"):
            assert why(name, number, arm="rloo") == "it is read only with --arm gae"
            assert why(name, number, arm="gae") == ""
    for number in ("beta", "alpha"):
        for name in ("iterative_dpo", "self_rewarding"):
            assert why(name, number, arm="sft_chosen") == "it is read only with --arm dpo_nll"
            assert why(name, number, arm="dpo_nll") == ""
    assert why("refine", "epochs").startswith("refine does not read it, but ppo, seq2seq")
    assert why("ppo", "width", model="folder") == "the folder of --model decides it"
    assert why("ppo", "width") == "" and why("ppo", "lr", model="folder") == ""
    for number in front.OF_TRAINING:
        assert why("ppo", number) == why("iterative_dpo", number) == ""
        for name in ("ppo", "iterative_dpo"):
            told = f"{name} takes the folder of --model as it is"
            assert why(name, number, model="folder") == told
        assert why("ppo", number, model="folder", reward="learned") == ""
        for name in ("self_rewarding", "seq2seq", "refine", "denoise"):
            assert why(name, number, model="folder") == ""


def test_a_trained_model_is_keyed_by_the_source_of_its_task(tmp_path, monkeypatch):
    c = tiny("ppo")
    trainer = front.CachedTrainer(tmp_path)

    def key():
        return trainer.folder("gpt", nr.gpt_base, c, reads="")

    before = key()
    edited = tmp_path / "arithmetic.py"
    edited.write_text(Path(arithmetic.__file__).read_text() + "# More.\n")
    monkeypatch.setattr(arithmetic, "__file__", str(edited))
    assert key() != before
    assert trainer.folder("gpt", nr.gpt_base, replace(c, task="sudoku"), reads="") != before


def test_what_adapters_have_learned_is_keyed_by_their_code(tmp_path, monkeypatch):
    trainer = front.CachedTrainer(tmp_path)

    def keys():
        return [
            trainer.folder("m1", nr.gpt_base, tiny("ppo", lora=rank), reads="") for rank in (0, 4)
        ]

    whole, adapted = keys()
    source = Path(nr.__file__).read_text()
    assert source.count("\nLORA_SCALE = 2") == 1
    (tmp_path / "nanoreward.py").write_text(source.replace("\nLORA_SCALE = 2", "\nLORA_SCALE = 8"))
    monkeypatch.setattr(nr, "__file__", str(tmp_path / "nanoreward.py"))
    assert keys()[0] == whole and keys()[1] != adapted
