"""Every loop in one run: killed in each of them, it ends with the numbers of a whole one."""

import json

import pytest
from safetensors.torch import load_file

import nanoreward as nr
import train_small as front

# Uneven sizes: several rounds and optimizer steps, and states in the middle of them.
FLAGS = "--config smoke --updates 3 --eval-every 1 --eval-problems 20 --seed 3".split()


class Killed(BaseException):
    """Stands in for a SIGKILL: nothing of the program catches it."""


def run_of(out, cache, *argv):
    """One call of the front door, which has to end well."""
    return front.main([*argv, "--cache", str(cache)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    out, cache = folder / "run", folder / "cache"
    assert run_of(out, cache, *nr.METHODS, *FLAGS, "--out", str(out)) == 0
    return out, cache


def logged(out, name):
    """The lines of a log, without the times."""
    lines = (out / name).read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


def results(out):
    """The results in summary.json, without the times."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return [{k: v for k, v in r.items() if k != "seconds"} for r in summary["results"]]


def test_all_loops_killed_in_the_middle_end_as_the_whole_run(whole, tmp_path, monkeypatch):
    expected, cache = whole
    out = tmp_path / "run"
    jobs = [(name, 3) for name in nr.METHODS]
    append = front.append
    killed = []

    def dies_once_a_job(path, line):
        append(path, line)
        job = (line.get("loop"), line.get("seed"))
        # In the middle of a job: at its second update, after a state was saved at the first.
        if path.name == "metrics.jsonl" and line["step"] >= 2 and job not in killed:
            killed.append(job)
            raise Killed

    monkeypatch.setattr(front, "append", dies_once_a_job)
    argv = [*nr.METHODS, *FLAGS, "--out", str(out)]
    for _ in range(len(jobs) + 1):
        try:
            assert run_of(out, cache, *argv) == 0
            break
        except Killed:
            argv = ["--resume", str(out)]
    # Loops of several rounds may pass their second update at once, in a round without pairs.
    assert killed == jobs
    for log in front.LOGS:
        assert logged(out, log) == logged(expected, log), log
    assert results(out) == results(expected) and len(results(out)) == len(jobs)
    for name, seed in jobs:
        folder = f"models/{name}-{seed}/model.safetensors"
        mine, theirs = load_file(out / folder), load_file(expected / folder)
        assert mine.keys() == theirs.keys()
        assert all((mine[key] == theirs[key]).all() for key in mine), name
    assert not list(tmp_path.rglob("*.tmp")) and (out / "curves.png").exists()
