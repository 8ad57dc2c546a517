"""Jobs side by side: the bytes of one process, one Ctrl-C, failures and kills that take no other."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

import nanoreward as nr
import train_small as front
import workers
from tests.conftest import ROOT, tiny

# Two methods with two seeds. Their states are saved in the middle.
FLAGS = "ppo iterative_dpo --config smoke --seeds 2 --eval-every 2 --eval-problems 20".split()
JOBS = [("ppo", 0), ("iterative_dpo", 0), ("ppo", 1), ("iterative_dpo", 1)]
# Long enough to be stopped in the middle.
LONG = [*FLAGS, "--updates", "25", "--rounds", "2"]


GROUPS = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    """A test that fails must not leave jobs behind, which would go on for minutes."""
    yield
    while GROUPS:
        with suppress(ProcessLookupError):
            os.killpg(GROUPS.pop(), signal.SIGKILL)


def started(*argv, script=ROOT / "train_small.py"):
    """The script as a group of processes of its own, as a terminal starts it."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    argv = [sys.executable, str(script), *map(str, argv)]
    process = subprocess.Popen(argv, env=env, start_new_session=True, **pipes)
    GROUPS.append(process.pid)
    return process


def ended(*argv, **more):
    """Exit code, output and errors of the script."""
    process = started(*argv, **more)
    said, errors = process.communicate(timeout=300)
    return process.returncode, said, errors


def logged(out, name):
    """The lines of a log, without the times; not every method writes all of them."""
    if name == "pairs.jsonl" and not (out / name).exists():
        return []
    lines = (out / name).read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


def results(out):
    """The results in summary.json, without the times."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in front.read_results(out)]


def assert_same(out, other):
    """Logs, results, weights and the folder's files are the same, and nothing is left over."""
    for name in front.LOGS:
        assert logged(out, name) == logged(other, name)
    assert results(out) == results(other)
    names = [
        sorted(p.relative_to(f) for f, p in ((f, p) for p in f.rglob("*"))) for f in (out, other)
    ]
    assert names[0] == names[1] and not (out / "jobs").exists()
    for path in (other / "models").rglob("*.*"):
        assert (out / path.relative_to(other)).read_bytes() == path.read_bytes(), path


def wait_until(holds, process):
    deadline = time.time() + 120
    while not holds():
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)


def at_work(out):
    """The jobs that have logged an update and are not done."""
    try:
        return {path.parent.name for path in out.glob("jobs/*/metrics.jsonl")}
    except FileNotFoundError:  # the last job has ended at this moment
        return set()


def gone(group):
    """Whether no process of the group is left, after a moment."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, cache):
    """The long run, one job after another and undisturbed."""
    out = tmp_path_factory.mktemp("quiet") / "run"
    assert front.main([*LONG, "--out", str(out), "--cache", str(cache)]) == 0
    return out


# ---- the numbers ---------------------------------------------------------------------------------


def test_two_workers_give_the_bytes_of_one_in_the_order_of_the_jobs(tmp_path):
    for n in (1, 2):
        where = ["--out", tmp_path / f"{n}", "--cache", tmp_path / f"cache{n}"]
        argv = [*FLAGS, "--base-updates", 30, "--demos", 300, "--ceiling", "--workers", n, *where]
        if n == 1:
            assert front.main([str(x) for x in argv]) == 0
        else:
            code, _, errors = ended(*argv)
            assert (code, errors) == (0, "")
    assert_same(tmp_path / "2", tmp_path / "1")
    done = front.read_results(tmp_path / "2")
    assert [(r["loop"], r["seed"]) for r in done] == JOBS and all("ceiling" in r for r in done)
    files = [sorted(p.name for p in (tmp_path / f"cache{n}").iterdir()) for n in (1, 2)]
    assert files[0] == files[1]


def test_a_base_is_trained_once_and_the_others_wait_for_it(tmp_path):
    more = ["--seeds", 1, "--base-updates", 100, "--cache", tmp_path / "cache"]
    code, said, errors = ended(*FLAGS, *more, "--out", tmp_path / "x", "--workers", 2)
    assert (code, errors) == (0, "")
    assert said.count("training gpt") == said.count("waiting for gpt") == 1
    assert "careful twin" not in said and "ceiling" not in front.read_results(tmp_path / "x")[0]


def test_processes_take_one_job_of_each_seed_first_and_the_longest_methods_before_the_others():
    jobs = [(name, seed) for seed in (0, 1) for name in ("ppo", "refine", "denoise")]
    longest = [("denoise", 0), ("denoise", 1)]
    others = [("refine", 0), ("refine", 1), ("ppo", 0), ("ppo", 1)]
    assert front.in_good_order(jobs) == longest + others
    # Seed 0 has only its shortest job left, and still it comes before the second one of seed 1.
    left = [("ppo", 0), ("refine", 1), ("denoise", 1)]
    assert front.in_good_order(left) == [("denoise", 1), ("ppo", 0), ("refine", 1)]


# ---- stopped and killed --------------------------------------------------------------------------


def test_ctrl_c_stops_and_saves_all_while_loading_and_at_work_and_one_worker_goes_on(
    quiet, cache, tmp_path
):
    out = tmp_path / "run"
    argv = [*LONG, "--out", out]
    for moment in ("loading", "at work"):
        run = started(*argv, "--cache", cache, "--workers", 2)
        if moment == "loading":
            while "nothing" not in run.stdout.readline():
                assert run.poll() is None
            time.sleep(0.3)
        else:
            wait_until(lambda: len(at_work(out)) == 2, run)
        os.killpg(run.pid, signal.SIGINT)  # all of them hear it, as in a terminal
        said, errors = run.communicate(timeout=120)
        assert (run.returncode, errors) == (130, "") and f"--resume {out}" in said
        assert gone(run.pid)
        argv = ["--resume", out]
    steps = []
    for name in at_work(out):
        steps.append(nr.load_state(out / "jobs" / name)["state"]["update"])
        assert logged(out / "jobs" / name, "metrics.jsonl")[-1]["step"] == steps[-1]
    assert steps
    assert front.main(["--resume", str(out), "--cache", str(cache)]) == 0
    assert_same(out, quiet)


def test_without_their_parent_workers_save_and_end(quiet, cache, tmp_path):
    """Killed, gone on with by two workers, terminated, gone on with by one."""
    out = tmp_path / "run"
    argv = [*LONG, "--out", out]
    for how in (signal.SIGKILL, signal.SIGTERM):
        run = started(*argv, "--cache", cache, "--workers", 2)
        wait_until(lambda: len(at_work(out)) == 2, run)
        run.send_signal(how)
        run.communicate(timeout=60)
        argv = ["--resume", out]
    assert front.main(["--resume", str(out), "--cache", str(cache)]) == 0
    assert gone(run.pid)
    assert_same(out, quiet)


class Killed(BaseException):
    """Stands in for a SIGKILL: nothing of the program catches it."""


def test_killed_while_the_files_of_a_job_are_taken_over(cache, tmp_path, monkeypatch):
    argv = ["ppo", *FLAGS[2:], "--updates", "1", "--cache", str(cache), "--out"]
    quiet = tmp_path / "quiet"
    assert front.main([*argv, str(quiet)]) == 0
    write = front.write_text
    names = {"result": front.RESULT, "metrics": front.LOGS[0], "samples": front.LOGS[1]}
    names |= {"answers": "answers.jsonl", "summary": "summary.json"}

    def dies(path, text):
        write(path, text)
        if path.name == names.get(moment) and (moment == "result" or path.parent == out):
            raise Killed

    def dies_half_removed(folder):
        (folder / front.RESULT).unlink(missing_ok=True)
        raise Killed

    for moment in (*names, "folder"):
        out = tmp_path / moment
        for _ in range(2):  # in each of the two jobs
            with monkeypatch.context() as patch:
                patch.setattr(front, "write_text", dies)
                if moment == "folder":
                    patch.setattr(front, "remove_folder", dies_half_removed)
                with pytest.raises(Killed):
                    front.main([*argv, str(out)])
        assert front.main([*argv, str(out)]) == 0
        assert_same(out, quiet)


# ---- jobs that fail ------------------------------------------------------------------------------

OWN_METHODS = """
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path
import nanoreward as nr
import train_small as front
import workers

def fails(state, task, c):
    for m in nr.ppo(state, task, c):
        if state.update == 3 and Path("broken").exists():
            raise ValueError("three is\\ntoo much")
        yield m

def dies(state, task, c):
    for m in nr.ppo(state, task, c):
        if state.update == 3 and Path("broken").exists():
            os.write(2, b"last words\\n")
            os.kill(os.getpid(), signal.SIGKILL)
        yield m

def interrupts(state, task, c):
    for m in nr.ppo(state, task, c):
        if state.update == 3 and Path("broken").exists():
            raise KeyboardInterrupt
        yield m

def sleeps(state, task, c):
    Path(f"asleep-{c.seed}").touch()
    time.sleep(600)
    yield {}

def register():
    for loop in (fails, dies, interrupts, sleeps):
        nr.METHODS[loop.__name__] = replace(nr.METHODS["ppo"], loop=loop)
"""
GOOD_END = """
register()
if __name__ == "__main__":
    sys.exit(front.main())
"""


def own_script(folder, end):
    """A user's script that adds methods; two break as long as the file `broken` is there."""
    path = folder / "own.py"
    path.write_text(OWN_METHODS + end)
    return path


def test_a_second_ctrl_c_ends_all_at_once(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = own_script(tmp_path, GOOD_END)
    argv = ["sleeps", "--config", "smoke", "--seeds", 2, "--cache", cache, "--workers", 2]
    run = started(*argv, "--out", "x", script=script)
    wait_until(lambda: (tmp_path / "asleep-0").exists() and (tmp_path / "asleep-1").exists(), run)
    os.killpg(run.pid, signal.SIGINT)
    assert "stopping" in next(line for line in run.stdout if line.startswith("stop"))
    time.sleep(0.5)
    assert run.poll() is None  # the update at hand takes minutes
    os.killpg(run.pid, signal.SIGINT)
    said, errors = run.communicate(timeout=20)
    assert (run.returncode, errors) == (130, "") and "go on with" in said and gone(run.pid)


def test_jobs_that_fail_or_are_killed_take_no_other_with_them(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = own_script(tmp_path, GOOD_END)
    for name in ("fails", "dies", "interrupts", "sleeps"):
        monkeypatch.setitem(nr.METHODS, name, None)  # behind the test they are gone again
    runpy.run_path(str(script))  # this process knows its methods too
    argv = ["fails", "dies", "interrupts", "ppo", "--config", "smoke", "--eval-every", "1"]
    argv += ["--cache", str(cache)]
    assert front.main([*argv, "--out", "whole"]) == 0
    (tmp_path / "broken").touch()
    code, said, errors = ended(*argv, "--out", "x", "--workers", 2, script=script)
    assert code == 2 and errors.count("\n") == 3
    lines = dict(line.split(" failed: ") for line in errors.splitlines())
    error = tmp_path / "x" / "jobs" / "fails-0" / "error.txt"
    assert "ValueError: three is too much" in lines["error: fails/0"]
    assert str(error.relative_to(tmp_path)) in lines["error: fails/0"]
    assert "in fails\n" in error.read_text()
    assert "SIGKILL" in lines["error: dies/0"] and lines["error: dies/0"].endswith("last words")
    assert lines["error: interrupts/0"] == "it raised KeyboardInterrupt"
    assert "not done: fails/0, dies/0, interrupts/0; try again with" in said
    assert [r["loop"] for r in front.read_results(tmp_path / "x")] == ["ppo"]
    assert {m["loop"] for m in front.lines_so_far(tmp_path / "x")} == {
        "ppo",
        "fails",
        "dies",
        "interrupts",
    }
    (tmp_path / "broken").unlink()
    assert front.main(["--resume", "x", "--cache", str(cache)]) == 0
    assert_same(tmp_path / "x", tmp_path / "whole")


def test_a_process_that_dies_while_it_is_loading_takes_no_job_with_it(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stumble = """
if workers.is_worker():
    try:
        Path("stone").unlink()  # one of them succeeds
        os.kill(os.getpid(), signal.SIGKILL)
    except FileNotFoundError:
        pass
"""
    script = own_script(tmp_path, stumble + GOOD_END)
    (tmp_path / "stone").touch()
    argv = ["fails", "ppo", "--config", "smoke", "--cache", cache, "--workers", 2]
    code, _, errors = ended(*argv, "--out", "x", script=script)
    assert code == 0 and not (tmp_path / "stone").exists()
    assert "could not begin" in errors and "SIGKILL" in errors and "on with 1 of" in errors
    assert errors.count("\n") == 1 and len(results(tmp_path / "x")) == 2


def test_a_process_that_has_read_other_code_does_no_job(tmp_path):
    run = SimpleNamespace(out=tmp_path, cache=tmp_path, ceiling=False, configs={"ppo": tiny("ppo")})
    plan = front.plan_of(run)
    plan.code = "another"
    assert "changed after the run began" in front.work(plan, "ppo", 0)
    assert list(tmp_path.iterdir()) == []


def test_one_worker_goes_on_after_a_job_that_fails(cache, tmp_path, monkeypatch, capsys):
    argv = [*FLAGS, "--out", str(tmp_path / "x"), "--cache", str(cache)]
    run_job = front.run_job

    def fails(run, name, seed):
        if (name, seed) == ("iterative_dpo", 0):
            raise nr.UserError("not today")
        run_job(run, name, seed)

    with monkeypatch.context() as patch:
        patch.setattr(front, "run_job", fails)
        assert front.main(argv) == 2
    told = capsys.readouterr()
    assert told.err == "error: iterative_dpo/0 failed: not today\n"
    assert "\nppo " in told.out and "not done: iterative_dpo/0; try" in told.out
    assert len(results(tmp_path / "x")) == 3
    assert front.main(argv) == 0 and len(results(tmp_path / "x")) == 4


@pytest.mark.parametrize(
    "end, says, tried",
    [
        (
            'if __name__ == "__main__":\n    register()\n    sys.exit(front.main())\n',
            "same method",
            False,
        ),
        ("register()\nsys.exit(front.main())\n", "must call main() under", True),
    ],
    ids=["registered late", "no guard"],
)
def test_a_script_that_workers_cannot_repeat_is_told_what_to_do(end, says, tried, cache, tmp_path):
    script = own_script(tmp_path, end)
    argv = ["fails", "ppo", "--config", "smoke", "--out", tmp_path / "x", "--cache", cache]
    code, said, errors = ended(*argv, "--workers", 2, script=script)
    assert code == 2 and says in errors and "--workers 1" in errors and "Traceback" not in errors
    assert "not done: fails/0" in said and "try again with" in said
    if tried:  # whether the advice helps, once
        code, _, errors = ended(*argv, "--workers", 1, script=script)
        assert (code, errors) == (0, "")


# ---- how many ------------------------------------------------------------------------------------


def test_cores_are_counted_once_and_within_what_the_container_gives(tmp_path, monkeypatch):
    for cpu in range(8):  # four cores with two threads each
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    usable = {0, 1, 2, 4, 5}
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: usable, raising=False)
    assert workers.physical_cores(tmp_path) == 3
    limit = tmp_path / "fs" / "cgroup" / "cpu.max"
    limit.parent.mkdir(parents=True)
    for text, cores in (("max 100000\n", 3), ("250000 100000\n", 2), ("5000 100000\n", 1)):
        limit.write_text(text)
        assert workers.physical_cores(tmp_path) == cores
    assert workers.physical_cores(tmp_path / "nowhere") == 5
    monkeypatch.delattr(workers.os, "sched_getaffinity")
    assert workers.physical_cores() == os.cpu_count()


def test_the_usual_number_of_workers_fits_cores_threads_memory_and_device(monkeypatch):
    def usual(**numbers):
        c = tiny("ppo", **{"device": "cpu", "threads": 1} | numbers)
        return front.usual_workers(SimpleNamespace(configs={"ppo": c}, shared=c))

    monkeypatch.setattr(workers, "physical_cores", lambda: 5)
    assert [usual(threads=threads) for threads in (1, 2, 3, 9)] == [5, 2, 1, 1]
    assert usual(device="cuda") == usual(device="mps") == 1
    need = sum(front.memory_needed(tiny("ppo")).values()) + front.PROCESS_MEMORY
    for share, n in ((0.5, 1), (2.5, 2), (90, 5)):
        monkeypatch.setattr(front, "memory_of", lambda device: share * need)
        assert usual() == n
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert usual() == 1
    with pytest.raises(nr.UserError, match="under torchrun"):
        front.check_workers(2)


def test_several_jobs_have_one_thread_each_and_a_single_one_has_the_usual_two(monkeypatch):
    def threads(*loops, seeds=1, preset="laptop", **given):
        found = front.configs_of(list(loops), preset, given, seeds).values()
        return {c.threads for c in found}

    monkeypatch.setattr(workers, "physical_cores", lambda: 8)
    assert threads("ppo") == {nr.Config.threads} == {2}
    assert threads("ppo", "refine") == threads("ppo", seeds=2) == {1}
    assert threads("ppo", "refine", threads=3) == threads("ppo", threads=3) == {3}
    monkeypatch.setattr(workers, "physical_cores", lambda: 1)
    assert threads("ppo") == threads("ppo", preset="smoke") == {1}


def test_the_command_line_has_the_usual_number_of_workers_and_a_call_has_one(monkeypatch):
    runs = [SimpleNamespace(lock=open(os.devnull)) for _ in range(4)]  # noqa: SIM115
    waiting = iter(runs)
    monkeypatch.setattr(front, "find_run", lambda a: next(waiting))
    monkeypatch.setattr(front, "finish_run", lambda run: 0)
    monkeypatch.setattr(front, "usual_workers", lambda run: 7)
    for argv in (["x"], ["x", "--workers", "3"]):
        monkeypatch.setattr(sys, "argv", argv)
        assert front.main() == 0
        assert front.main(argv[1:]) == 0
    assert [run.workers for run in runs] == [7, 1, 3, 3]
