"""train_small.py as a user meets it: runs, resume, bad input, outputs, the README's commands."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import nanoreward as nr
import train_small
from tests.conftest import ROOT


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
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def inside(*argv):
    """main() in this process: exit code."""
    return train_small.main([str(a) for a in argv])


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
        "summary.json",
        "state",
        "models",
        "curves.png",
    } <= names
    config = json.loads((out / "config.json").read_text())["config"]
    assert set(config) == {f.name for f in fields(nr.Config)} and config["width"] == 32
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
    assert {"loop", "seed", "step", "prompt", "response", "reward", "token_rewards"} == set(
        samples[0]
    )
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


def test_smoke_has_at_least_three_updates_and_every_flag_is_a_field(capsys):
    assert nr.CONFIGS["smoke"]["updates"] >= 3
    with pytest.raises(SystemExit):
        train_small.build_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert all("--" + f.name.replace("_", "-") in text for f in fields(nr.Config))


def trained(state):
    """Copies of all weights that a loop trains."""
    parts = [state, *state.get("fits", {}).values()]
    groups = [g for part in parts for o in part.get("optimizers", []) for g in o.param_groups]
    return [p.detach().clone() for g in groups for p in g["params"]]


@pytest.mark.parametrize(
    "loop, flags",
    [
        ("ppo", ["--arm", "gae"]),
        ("ppo", ["--arm", "grpo"]),
        ("ppo", ["--arm", "rloo"]),
        ("ppo", ["--reward", "learned"]),
        ("iterative_dpo", ["--preference", "dpo_nll"]),
        ("iterative_dpo", ["--preference", "sft_chosen"]),
        ("self_rewarding", ["--judge", "own"]),
        ("self_rewarding", ["--judge", "frozen"]),
        ("seq2seq", []),
        ("refine", []),
        ("denoise", ["--credit", "process"]),
        ("denoise", ["--credit", "outcome"]),
    ],
    ids=lambda x: "-".join(x).replace("--", "") if isinstance(x, list) else x,
)
def test_smoke_takes_real_steps_in_every_loop_and_arm(cache, tmp_path, monkeypatch, loop, flags):
    """The preset is what most tests run: with no pair or no right response it would test nothing."""
    start, go = nr.LOOPS[loop]
    seen = {}

    def watched(policy, c):
        seen["state"] = start(policy, c)
        seen["before"] = trained(seen["state"])
        return seen["state"]

    monkeypatch.setitem(
        nr.LOOPS, loop, (watched, lambda state, *rest: seen.update(state=state) or go(state, *rest))
    )
    assert inside(loop, "--config", "smoke", *flags, "--out", tmp_path, "--cache", cache) == 0
    metrics = lines(tmp_path / "metrics.jsonl")
    assert len(metrics) >= 3
    for m in metrics:
        losses = [v for k, v in m.items() if k == "loss" or k.endswith("_loss")]
        assert losses and all(math.isfinite(v) for v in losses) and m.get("pairs", 1) > 0
    after = trained(seen["state"])
    assert len(after) == len(seen["before"]) > 5
    moved = [not torch.equal(a, b) for a, b in zip(seen["before"], after, strict=True)]
    # nothing else stays: the scorer's output matrix that no head reads; the value head of an arm without a critic
    idle = 1 if loop == "refine" else 2 if loop == "denoise" or {"grpo", "rloo"} & set(flags) else 0
    assert moved.count(False) == idle


def test_a_finished_run_says_so_and_changes_nothing(smoke, cache):
    out, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    for argv in (
        ["--resume", out],
        ["ppo", "--config", "smoke", "--out", out, "--seeds", 2, "--target", "ppo=0.0"],
    ):
        again = call(*argv, "--cache", cache)
        assert again.returncode == 0 and "finished" in again.stdout
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_a_learned_reward_is_trained_cached_and_logged_beside_the_truth(cache, tmp_path):
    run = ["ppo", "--config", "smoke", "--reward", "learned", "--updates", 2, "--cache", cache]
    for name in ("a", "b"):  # the second run finds the scorer in the cache
        assert inside(*run, "--out", tmp_path / name) == 0
    first, second = (without_time(tmp_path / name / "metrics.jsonl") for name in ("a", "b"))
    assert first == second and all(m["reward"] != m["truth"] for m in first)
    assert len(list(cache.glob("scorer-*"))) == 1


def test_sudoku_runs_through_the_same_door(cache, tmp_path):
    sudoku = [
        "--task",
        "sudoku",
        "--response",
        17,
        "--block",
        17,
        "--block-steps",
        17,
        "--look-ahead",
        0,
    ]
    run = [
        "denoise",
        "--config",
        "smoke",
        *sudoku,
        "--denoise-updates",
        2,
        "--out",
        tmp_path,
        "--cache",
        cache,
    ]
    assert inside(*run) == 0
    shown = lines(tmp_path / "samples.jsonl")[-1]
    assert (
        len(shown["prompt"]) == 17
        and sorted(shown["order"]) == list(range(17))
        and len(shown["said"]) == 17
    )


def test_a_missed_target_exits_one(smoke, cache, tmp_path):
    out = tmp_path / "x"
    run = ["ppo", "--config", "smoke", "--updates", 1, "--out", out, "--cache", cache]
    assert inside(*run, "--target", "ppo=1.0") == 1
    assert json.loads((out / "summary.json").read_text())["results"][0]["updates"] == 1


@pytest.mark.parametrize(
    "loop, flags",
    [
        ("ppo", ["--arm", "gae", "--updates", 12]),
        ("ppo", ["--arm", "grpo", "--updates", 12]),
        ("ppo", ["--arm", "rloo", "--updates", 12]),
        # its base knows a little, so that there are pairs
        ("iterative_dpo", ["--base-updates", 200, "--round-updates", 4, "--round-prompts", 64]),
        (
            "self_rewarding",
            [
                "--base-updates",
                200,
                "--seed-updates",
                200,
                "--seed-demos",
                1500,
                "--own-rounds",
                3,
                "--round-updates",
                4,
                "--round-prompts",
                32,
            ],
        ),
        ("seq2seq", ["--updates", 12]),
        ("refine", ["--base-updates", 200, "--drafts", 200, "--refine-updates", 12]),
        (
            "denoise",
            [
                "--base-updates",
                200,
                "--diffusion-updates",
                150,
                "--denoise-updates",
                12,
                "--hide-prompt",
                0.2,
            ],
        ),
    ],
)
def test_killed_anywhere_and_resumed_bit_for_bit(cache, tmp_path, loop, flags):
    """A real SIGKILL at a moment nobody chose, twice; then the outputs equal those of a quiet run."""
    more = ["--config", "smoke", *flags, "--save-every", 3, "--seeds", 2, "--cache", cache]
    assert inside(loop, *more, "--out", tmp_path / "quiet") == 0
    out = tmp_path / "killed"
    argv = [sys.executable, str(ROOT / "train_small.py"), loop, *map(str, more), "--out", str(out)]
    kills = 0
    for step in (5, 17):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None:
            written = (
                (out / "metrics.jsonl").read_text().count("\n")
                if (out / "metrics.jsonl").exists()
                else 0
            )
            if written >= step:
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
        with (out / "metrics.jsonl").open("a") as f:
            f.write('{"loop": "ppo", "se')  # a torn line, as a full disk or a power cut leaves it
        argv = [
            sys.executable,
            str(ROOT / "train_small.py"),
            "--resume",
            str(out),
            "--cache",
            str(cache),
        ]
    assert kills == 2, process.stderr.read()
    assert subprocess.run(argv, capture_output=True).returncode == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_time(out / name) == without_time(tmp_path / "quiet" / name)
    for seed in (0, 1):
        name = f"models/{loop}-{seed}/model.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()
    shown = lines(out / "samples.jsonl")[0]  # what the per-token pictures are drawn from
    inner = {
        "ppo": {"token_rewards"},
        "seq2seq": {"token_rewards"},
        "refine": {"orm", "sorm"},
        "denoise": {"order", "sure", "said", "value"},
    }.get(loop, set())
    assert inner <= set(shown) and all(len(shown[k]) > 0 for k in inner)
    if loop not in ("ppo", "seq2seq", "denoise"):
        assert min(m["pairs"] for m in lines(out / "metrics.jsonl")) > 0
    results = [
        json.loads((f / "summary.json").read_text())["results"] for f in (out, tmp_path / "quiet")
    ]
    assert [r | {"seconds": 0} for r in results[0]] == [r | {"seconds": 0} for r in results[1]]


def test_ctrl_c_saves_prints_the_resume_command_and_exits_130(cache, tmp_path):
    out = tmp_path / "x"
    more = [
        "--config",
        "smoke",
        "--updates",
        400,
        "--eval-every",
        400,
        "--save-every",
        400,
        "--cache",
        cache,
    ]
    argv = [sys.executable, str(ROOT / "train_small.py"), "ppo", *map(str, more), "--out", str(out)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and f"--resume {out}" in text
    saved = nr.load_state(out / "state")["update"]
    assert 0 < saved < 400 and lines(out / "metrics.jsonl")[-1]["step"] == saved


def test_an_interrupted_base_goes_on_to_the_same_weights(tmp_path):
    c = nr.replace(nr.Config(), device="cpu", **nr.CONFIGS["smoke"] | dict(base_updates=40))
    whole = train_small.base_model(c, tmp_path / "a")
    fit = nr.fit

    def killed(state, *rest):
        for metrics in fit(state, *rest):
            yield metrics
            if state["update"] == 23:
                raise KeyboardInterrupt

    nr.fit = killed
    try:
        with pytest.raises(KeyboardInterrupt):
            train_small.base_model(c, tmp_path / "b")
    finally:
        nr.fit = fit
    assert nr.load_state(next((tmp_path / "b").iterdir()))["update"] == 20
    again = train_small.base_model(c, tmp_path / "b")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )


def test_the_base_cache_is_reused_and_never_stale(tmp_path, monkeypatch):
    def key(c, careful=False):
        before = set(tmp_path.iterdir())
        train_small.base_model(c, tmp_path, careful)
        return set(tmp_path.iterdir()) - before

    c = nr.replace(
        nr.Config(),
        **nr.CONFIGS["smoke"] | dict(base_updates=2, demos=50, response=20, device="cpu"),
    )
    assert key(c) and not key(c)  # trained once
    assert not key(nr.replace(c, lr=0.5, updates=9, beta=1.0))  # what the base does not read
    for change in (
        dict(seed=1),
        dict(width=64),
        dict(base_lr=0.1),
        dict(demos=51),
        dict(response=24),
        dict(max_ops=2),
        dict(answers=7),
        dict(planted="none"),
        dict(planted="refusal"),
    ):  # the last four: only the task reads them
        assert key(nr.replace(c, **change)), change
    assert key(c, careful=True)
    source = Path(nr.__file__).read_text()
    edits = [
        ('"""A scalar per position', '"""One number per position', False),  # a docstring
        ("# ---- ppo:", "# ---- PPO:", False),  # a comment
        (
            "objective = torch.minimum(ratio * adv",
            "objective = torch.maximum(ratio * adv",
            False,
        ),  # ppo's loss
        ("x = 3.4445 * x", "x = 3.4446 * x", True),  # Muon
        ("F.silu(self.gate_proj(x))", "F.gelu(self.gate_proj(x))", True),  # the model
        ("* (1 - update / updates)", "* (1 - update / updates / 2)", True),  # the schedule of fit
        ("return x[:, P - 1 : -1]", "return x[:, P:]", True),  # the shift, four calls deep
    ]
    for i, (old, new, retrains) in enumerate(edits):
        assert source.count(old) == 1, old
        (tmp_path / f"edited{i}.py").write_text(source.replace(old, new))
        monkeypatch.setattr(nr, "__file__", str(tmp_path / f"edited{i}.py"))
        assert bool(key(c)) == retrains, new


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
        (["self_rewarding", "--judging", "0.9", "--posing", "0.2"], "at most 1 together"),
        (["self_rewarding", "--candidates", "1"], "--candidates must be at least 2"),
        (["iterative_dpo", "--restart", "maybe"], "--restart"),
        (["refine", "--threshold", "1.5"], "--threshold and --least are probabilities"),
        (["refine", "--continuations", "0"], "--continuations must be above 0"),
        (
            ["seq2seq", "--planted", "flattery"],
            "--planted must be one of none, round, long, refusal",
        ),
        (["seq2seq", "--planted", "long"], "--response must be at least 52"),
        (["seq2seq", "--top", "0"], "--top must be above 0"),
        (["denoise", "--credit", "blame"], "--credit must be one of outcome, process"),
        (["denoise", "--earliest", "0.6", "--latest", "0.4"], "--earliest and --latest are shares"),
        (["denoise", "--latest", "1.5"], "--earliest and --latest are shares"),
        (["denoise", "--hide-prompt", "1.5"], "shares, at most 1"),
        (["iterative_dpo", "--late-temperature", "0.001"], "at least 0.01"),
        (["ppo", "--answers", "1"], "--answers must lie in"),
        (["ppo", "--look-ahead", "1.5"], "at most 1"),
        (["ppo", "--arm", "grpo", "--samples", "1"], "--samples 2 or more"),
        (["ppo", "--response", "10"], "--response must be at least 12"),
        (["denoise", "--task", "sudoku", "--response", "16"], "--response must be at least 17"),
        (["ppo", "--task", "chess"], "--task must be one of arithmetic, sudoku"),
        (["ppo", "--heads", "3", "--kv-heads", "2"], "--heads must be a multiple"),
        (["ppo", "--min-ops", "5"], "--min-ops must not be above"),
        (["ppo", "--lam", "1.5"], "0..1"),
        (["ppo", "--kl-target", "6"], "--beta above 0"),
        (["ppo", "--eos", "0"], "--pad, --bos, --eos"),
        (["ppo", "--whiten-reward", "maybe"], "true_or_false"),
        (["ppo", "--config", "huge"], "no config is called 'huge'"),
        (["ppo", "--device", "tpu"], "--device tpu is not here"),
        (["ppo", "--seeds", "0"], "--seeds must lie in"),
        (["ppo", "--target", "ppo"], "as ppo=0.8"),
        (["ppo", "--target", "ppo=2"], "0..1"),
        (["ppo", "--target", "dpo=0.5"], "a loop of this run"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", "nowhere", "--lr", "1"], "takes all numbers from its folder"),
        (["ppo", "--device", "cpu:zzz"], "is not here"),
        (["ppo", "--temperature", "1e-40"], "at least 0.01"),
        (["ppo", "--beta", "1", "--kl-target", "6", "--kl-horizon", "1"], "--kl-horizon"),
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


@pytest.mark.parametrize("damage", ["config.json", "summary.json", "state.pt", "other version"])
def test_a_damaged_run_folder_is_one_line(cache, tmp_path, capsys, damage):
    out = tmp_path / "x"
    argv = ["ppo", "--config", "smoke", "--updates", 2, "--cache", cache, "--out", out]
    assert inside(*argv) == 0
    (out / "summary.json").write_text(json.dumps({"results": []}))  # as if killed before the end
    if damage == "other version":
        about = json.loads((out / "config.json").read_text())
        about["config"]["colour"] = "red"
        (out / "config.json").write_text(json.dumps(about))
    else:
        path = out / "state" / "state.pt" if damage == "state.pt" else out / damage
        path.write_bytes(path.read_bytes()[:9])
    capsys.readouterr()
    assert inside("--resume", out, "--cache", cache) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(out) in error


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
        ([], "--prompt"),
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
    png.unlink()
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
    train_small.picture([tmp_path], tmp_path / "curves.png")
    curve, base = (x.get_xydata().tolist() for x in drawn["ppo"].lines)
    assert curve == [[1, pytest.approx(0.3)], [5, pytest.approx(0.6)]] and base[0][
        1
    ] == pytest.approx(0.2)
    band = drawn["ppo"].collections[0].get_datalim(drawn["ppo"].transData)
    assert (band.x0, band.x1, band.y0, band.y1) == pytest.approx((1, 5, 0.2, 0.8))
    assert drawn["refine"].lines[0].get_xydata().tolist() == [[1, pytest.approx(0.6)]]


def test_notes_say_in_plain_words_why_nothing_is_learned():
    fine, c = (
        dict(flat_groups=0.2, ended=1.0, kl=1.0, entropy=0.5),
        nr.replace(nr.Config(), arm="grpo"),
    )
    assert train_small.notes(fine, c) == {}
    for change, word in [
        (dict(flat_groups=1.0), "equal rewards"),
        (dict(ended=0.0), "EOS"),
        (dict(kl=50.0), "KL runs away"),
        (dict(entropy=1e-5), "all samples are the same"),
        (dict(pairs=0), "teaches nothing"),
        (dict(chosen_per_token=-2.0), "chosen log-prob falls"),
    ]:
        assert word in " ".join(train_small.notes(fine | change, c).values())
    assert not train_small.notes(
        fine | dict(flat_groups=1.0), nr.Config()
    )  # a critic compares across prompts


def test_intervals_are_student_t():
    # mean 2, deviation 1, n = 3: 4.303 / sqrt(3) = 2.484
    assert (
        train_small.interval([1.0, 2.0, 3.0]) == "2.000 ± 2.484"
        and train_small.interval([0.5]) == "0.500"
    )


def test_numbers_that_are_not_finite_become_null(tmp_path):
    train_small.append(
        tmp_path / "m.jsonl", {"a": float("nan"), "b": float("inf"), "c": 1.5, "d": None}
    )
    assert lines(tmp_path / "m.jsonl") == [{"a": None, "b": None, "c": 1.5, "d": None}]
