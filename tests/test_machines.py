"""The front door on real machines: odd terminals and environments, full disks, kills, edits."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nanoreward as nr
import train_small as front
from data import arithmetic
from data.arithmetic import Arithmetic
from tests.conftest import CHOICES, ROOT, tiny

SCRIPT = str(ROOT / "train_small.py")
RUN = ["ppo", "--config", "smoke", "--eval-every", "3", "--updates", "3"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cache):
    """A finished run of three updates; tests work on copies of it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert inside(*RUN, "--out", out, "--cache", cache) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run."""
    return copy_of(finished, tmp_path / "copy")


@pytest.fixture(scope="session")
def stopped(tmp_path_factory, cache):
    """The run as it was when all updates were made, but nothing measured."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front.Job, "finish", lambda job: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert inside(*RUN, "--out", out, "--cache", cache) == 130
    return out


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of the stopped run."""
    return copy_of(stopped, tmp_path / "half")


def copy_of(folder, to):
    subprocess.run(["cp", "-r", str(folder), str(to)], check=True)
    return to


def inside(*argv):
    """main() in this process: exit code."""
    return front.main([str(a) for a in argv])


def refused(capsys, *argv):
    """The one line that main() says when it refuses."""
    capsys.readouterr()
    assert inside(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def started(*argv, env=None, drop=(), **more):
    """The script as a process of its own."""
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, argv)], env=kept | (env or {}), **pipes
    )


def ended(*argv, **more):
    """Exit code, output and errors of the script."""
    process = started(*argv, **more)
    said, errors = process.communicate(timeout=200)
    return process.returncode, said or b"", errors or b""


def steps_of(out):
    return [m["step"] for m in front.read_lines(out / "metrics.jsonl")]


# ---- terminals and environments ------------------------------------------------------------------


def test_a_terminal_that_lacks_a_character_gets_a_question_mark(half, cache):
    env = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    code, said, errors = ended("--resume", half, "--cache", cache, env=env)
    assert (code, errors) == (0, b"")
    assert b" ? base models" in said and b"An accuracy is that of" in said


def test_every_text_file_is_opened_as_utf_8(half, cache, tmp_path):
    code = (
        "import warnings, train_small, notebooks.curves, notebooks.collect\n"
        "warnings.simplefilter('error', EncodingWarning)\n"
        f"assert train_small.main(['--resume', {str(half)!r}, '--cache', {str(cache)!r}]) == 0\n"
        f"assert train_small.main(['sample', {str(half)!r}, '--prompt', '1+1=']) == 0\n"
        f"assert train_small.main(['plot', {str(half)!r}, '--png', {str(tmp_path / 'a.png')!r}]) == 0\n"
    )
    argv = [sys.executable, "-X", "warn_default_encoding", "-c", code]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs unshare and root")
def test_a_user_without_a_name_or_a_home_needs_a_cache_alone(finished, tmp_path):
    tmp_path.chmod(0o777)
    nobody = ["unshare", "--user", "--map-user=12345", sys.executable, SCRIPT]
    if subprocess.run([*nobody[:3], "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine has no user namespaces")
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    run = [*nobody, *RUN[:-1], "1", "--base-updates", "2", "--out", str(tmp_path / "x")]
    without = subprocess.run(run, env=env, capture_output=True, text=True)
    assert without.returncode == 2 and "give --cache FOLDER" in without.stderr
    assert without.stderr.count("\n") == 1 and not (tmp_path / "x").exists()
    cache = ["--cache", str(tmp_path / "cache")]
    given = subprocess.run([*run, *cache], env=env, capture_output=True, text=True)
    assert given.returncode == 0, given.stderr


@pytest.mark.parametrize(
    "left", [{"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": ""}], ids=str
)
def test_variables_that_another_program_left_behind_change_nothing(left, copy, monkeypatch):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(front, "join_processes", lambda: pytest.fail("nobody is there to join"))
    assert inside("--resume", copy) == 0


def test_several_processes_that_cannot_meet_are_one_line(copy, monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(front, "join_processes", lambda: pytest.fail("it would wait for ever"))
    assert inside("--resume", copy) == 2
    error = capsys.readouterr().err
    assert "MASTER_ADDR" in error and "unset RANK" in error and error.count("\n") == 1


def test_main_runs_in_a_thread_that_hears_no_signals(half, cache):
    codes = []
    run = threading.Thread(target=lambda: codes.append(inside("--resume", half, "--cache", cache)))
    run.start()
    run.join()
    assert codes == [0]


def test_a_reader_that_leaves_is_no_error(half, cache):
    reads, writes = os.pipe()
    os.close(reads)
    code, _, errors = ended("--resume", half, "--cache", cache, stdout=writes)
    os.close(writes)
    assert (code, errors) == (0, b"")
    assert (half / "summary.json").exists()


def test_a_closed_output_is_no_error(half, cache):
    shell = ["sh", "-c", '"$@" >&- 2>&-', "sh", sys.executable, SCRIPT, "--resume", str(half)]
    assert subprocess.run([*shell, "--cache", str(cache)]).returncode == 0
    assert (half / "summary.json").exists()


# ---- disks and kills -----------------------------------------------------------------------------


@contextmanager
def full_disk(size):
    """No file may have more bytes, which fails as a full disk does."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize(
    "size, file", [(0, "config.json"), (9000, "state.pt"), (60_000, "state.pt")]
)
def test_a_full_disk_is_one_line_that_names_the_file(size, file, cache, tmp_path, capsys):
    """And with room again the run goes on."""
    out = tmp_path / "x"
    argv = [*RUN, "--eval-every", 1, "--out", out, "--cache", cache]
    with full_disk(size):
        error = refused(capsys, *argv)
    assert str(out) in error and file in error and "is the disk full?" in error
    assert not list(out.rglob("*.tmp"))
    assert inside(*argv) == 0 and steps_of(out) == [1, 2, 3]


def test_a_log_on_a_full_disk_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with full_disk(5), pytest.raises(nr.UserError, match="metrics.jsonl cannot be written"):
        front.append(path, LINE)
    assert path.stat().st_size == 5 and front.read_lines(path) == []


def test_what_a_killed_process_left_half_written_goes_away_at_the_next_start(
    half, cache, tmp_path, monkeypatch
):
    ours = [half / "config.json.77.tmp", half / "jobs" / "ppo-0" / "state.pt.77.tmp"]
    ours += [half / "models" / "ppo-0" / "model.safetensors.77.tmp"]
    ours[-1].parent.mkdir(parents=True)
    theirs = half / "notes.tmp"  # no number of a process: a file of somebody's own
    base = next(path for path in cache.iterdir() if path.name.startswith("gpt-"))
    for path in (*ours, theirs, base / "state.pt.77.tmp"):
        path.write_text("half")
    assert inside("--resume", half, "--cache", cache) == 0
    assert not any(path.exists() for path in ours) and theirs.read_text() == "half"
    assert not list(base.glob("*.tmp"))


@pytest.mark.parametrize("what, told", [("base", "waiting for gpt"), ("job", "ppo/0: waiting for")])
def test_a_base_or_job_that_another_process_works_on_is_waited_for(half, cache, what, told):
    base = next(path for path in cache.iterdir() if path.name.startswith("gpt-"))
    folder = base if what == "base" else half / "jobs" / "ppo-0"
    with front.take_lock(folder):
        writing = folder / "state.pt.77.tmp"
        writing.write_text("half")
        run = started("--resume", half, "--cache", cache, text=True)
        while not run.stdout.readline().startswith(told):
            assert run.poll() is None
        time.sleep(2 * front.LOCK_PATIENCE)
        assert run.poll() is None and writing.exists()
    said, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (0, "") and "waiting" not in said
    assert not writing.exists()


def test_ctrl_c_ends_the_waiting_for_a_base(half, cache):
    base = next(path for path in cache.iterdir() if path.name.startswith("gpt-"))
    with front.take_lock(base):
        run = started("--resume", half, "--cache", cache, text=True)
        while not run.stdout.readline().startswith("waiting for gpt"):
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        said, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (130, "") and "go on with" in said


def test_a_second_process_with_the_same_folder_is_refused(cache, tmp_path, capsys):
    out = tmp_path / "x"
    argv = [*RUN[:-1], 400, "--eval-every", 400, "--cache", cache, "--out", out]
    first = started(*argv)
    while not (out / "jobs" / "ppo-0" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    for again in (argv, ["--resume", out, "--cache", cache]):
        assert "another process is at work" in refused(capsys, *again)
    first.kill()  # its lock dies with it
    first.communicate()
    front.take_lock(out).close()
    seen = steps_of(out / "jobs" / "ppo-0")
    assert seen == list(range(1, len(seen) + 1))


def test_a_disk_without_locks_refuses_nobody(half, cache, monkeypatch):
    if front.os.name == "nt":
        pytest.skip("Windows locks otherwise")

    def no_locks(*_):
        raise OSError(front.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(front.fcntl, "flock", no_locks)
    # Another process may be writing this at the moment.
    (half / "state.pt.4242.tmp").touch()
    assert inside("--resume", half, "--cache", cache) == 0
    assert (half / "state.pt.4242.tmp").exists()


def test_a_finished_run_whose_picture_is_missing_draws_it(copy):
    before = (copy / "curves.png").read_bytes()
    (copy / "curves.png").unlink()
    assert inside("--resume", copy) == 0
    assert (copy / "curves.png").read_bytes() == before


def test_stopped_before_anything_was_saved_it_goes_on_from_the_beginning(
    cache, finished, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "x"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(front, "run_job", stop)
        assert inside(*RUN, "--out", out, "--cache", cache) == 130
        patch.setattr(front, "find_run", stop)
        assert inside(*RUN, "--out", out, "--cache", cache) == 130
    assert re.search(r"go on with: python \S+ --resume ", capsys.readouterr().out)
    assert inside("--resume", out, "--cache", cache) == 0
    assert steps_of(out) == [1, 2, 3]


@pytest.mark.parametrize(
    "lost", ["state.pt", "metrics.jsonl", "samples.jsonl", "lock", "", "../../lock", ".."]
)
def test_a_run_that_has_lost_a_part_goes_on(half, cache, lost):
    path = (half / "jobs" / "ppo-0" / lost).resolve()
    subprocess.run(["rm", "-r", str(path)], check=True)
    assert inside("--resume", half, "--cache", cache) == 0
    assert (half / "models" / "ppo-0" / "model.safetensors").exists()
    assert steps_of(half) == ([] if lost == "metrics.jsonl" else [1, 2, 3])


def test_a_folder_that_holds_no_run_is_one_line_and_stays_as_it_is(tmp_path, capsys):
    for name in (None, "metrics.jsonl", "state"):
        if name:
            (tmp_path / name).mkdir()
        before = list(tmp_path.iterdir())
        assert str(tmp_path) in refused(capsys, "--resume", tmp_path, "--cache", tmp_path / "c")
        assert list(tmp_path.iterdir()) == before


# ---- files that were changed or torn -------------------------------------------------------------


def changed(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) > 0
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("config.json", '"lr": 0.0005', '"lr": 0.005'),
        ("config.json", '"seeds": 1', '"seeds": 2'),
        ("config.json", '"targets": {}', '"targets": {"ppo": 0.5}'),
        ("summary.json", '"updates": 3', '"updates": 4'),
        ("summary.json", '"sha256": "', '"sha256": "0'),
    ],
)
def test_numbers_that_were_changed_by_hand_are_refused(copy, capsys, file, old, new):
    changed(copy / file, old, new)
    error = refused(capsys, "--resume", copy)
    assert "changed by hand or damaged" in error and str(copy / file) in error
    changed(copy / file, new, old)
    text = json.dumps(json.loads((copy / file).read_text()), sort_keys=True)
    (copy / file).write_text(text)  # other order and line breaks say the same
    assert inside("--resume", copy) == 0


def test_a_run_without_checksums_is_read_as_before(half, cache):
    about = json.loads((half / "config.json").read_text())
    del about["sha256"], about["inputs"]
    (half / "config.json").write_text(json.dumps(about))
    assert inside("--resume", half, "--cache", cache) == 0
    assert inside(*RUN, "--out", half, "--cache", cache) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"configs": {}},
        {"configs": None},
        {"configs": {"ppo": 3}},
        {"configs": {"nobody": {}}},
        {"configs": {"ppo": {"lr": "fast"}}},
        {"configs": {"ppo": {"updates": 2.5}}},
        {"configs": {"ppo": {"bf16": 1}}},
        {"seeds": "x"},
        {"seeds": None},
        {"targets": [1]},
    ],
    ids=str,
)
def test_a_config_that_nobody_can_use_is_one_line(copy, capsys, change):
    about = json.loads((copy / "config.json").read_text())
    del about["sha256"]
    (copy / "config.json").write_text(json.dumps(about | change))
    refused(capsys, "--resume", copy)
    refused(capsys, "sample", copy, "--prompt", "1+1=")


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[]", b"null", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "summary.json"])
def test_a_file_that_is_no_json_object_is_one_line(copy, capsys, file, content):
    (copy / file).write_bytes(content)
    assert str(copy / file) in refused(capsys, "--resume", copy)


@pytest.mark.parametrize(
    "results", [3, [3], [{"loop": "ppo", "seed": 7}], [{"loop": "ppo", "seed": 0}]]
)
def test_results_that_are_not_the_runs_are_one_line(copy, capsys, results):
    front.write_json(copy / "summary.json", {"results": results})
    assert str(copy / "summary.json") in refused(capsys, "--resume", copy)


LINE = {"loop": "ppo", "seed": 0, "step": 1, "response": "ä€😀 }\u2028\u0085 \\boxed{18}"}


def test_a_line_torn_anywhere_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    text = json.dumps(LINE, ensure_ascii=False).encode()
    for end in range(len(text)):
        path.write_bytes(text + b"\n" + text[:end])
        assert front.read_lines(path) == [LINE], text[:end]
    path.write_bytes(text + b"\n" + b"\0" * 9)
    assert front.read_lines(path) == [LINE]
    path.write_bytes(text + b"\n" + text)  # it lacks its end of line alone
    assert front.read_lines(path) == [LINE, LINE]


@pytest.mark.parametrize(
    "line",
    [
        b"3",
        b"[]",
        b"null",
        b"{}",
        b"\0\0",
        b"\xff",
        b'{"loop": "ppo", "seed": 0}',
        b'{"loop": "ppo", "step": 1}',
        b'{"seed": 0, "step": 1}',
        b'{"loop": "ppo", "seed": 0, "step": "1"}',
        b'{"loop": "ppo", "seed": 0, "step": 1, "dev_greedy": "high"}',
        b'{"loop": "ppo", "seed": 0, "step": 1}{"loop": "ppo"}',
        b'{"loop": "ppo", "seed": 0, "step": 1',
    ],
)
def test_a_broken_line_is_named(half, cache, capsys, line):
    job = half / "jobs" / "ppo-0"
    for folder in (job, half):
        for file in ("metrics.jsonl", "samples.jsonl"):
            before = (job / file).read_bytes()
            first, rest = before.split(b"\n", 1)
            (folder / file).write_bytes(first + b"\n" + line + b"\n" + rest)
            error = refused(capsys, "--resume", half, "--cache", cache)
            assert f"{folder / file}, line 2:" in error
            if file == "metrics.jsonl":
                assert f"{folder / file}, line 2:" in refused(capsys, "plot", half)
            (folder / file).write_bytes(before)


def test_a_broken_last_line_that_has_its_end_was_not_torn(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(LINE) + "\n{}\n")
    with pytest.raises(nr.UserError, match="log.jsonl, line 2:"):
        front.read_lines(path)


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "state/state.pt", "picture", "a.txt", ".png"])
def test_plot_writes_pictures_alone(copy, capsys, name):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert "no picture's name" in refused(capsys, "plot", copy, "--png", copy / name)
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}


def test_a_picture_has_the_format_of_its_name(finished, tmp_path):
    for name, begins in [("a.svg", b"<?xml"), ("a.PDF", b"%PDF"), ("a.jpg", b"\xff\xd8")]:
        assert inside("plot", finished, "--png", tmp_path / name) == 0
        assert (tmp_path / name).read_bytes().startswith(begins)


def test_the_name_of_a_run_is_no_formula(finished, tmp_path):
    odd = copy_of(finished, tmp_path / "$_$")
    assert inside("plot", finished, odd, "--png", tmp_path / "a.png") == 0


def test_only_a_missing_matplotlib_is_called_missing(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "notebooks.curves", raising=False)
    for module, says in [
        ("matplotlib.figure", "pip install matplotlib"),
        ("statistics", "statistics"),
    ]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert inside("plot", finished, "--png", tmp_path / "a.png") == 0
        said = capsys.readouterr().out
        assert said.startswith("no picture: ") and says in said
        assert ("matplotlib" in said) == (module == "matplotlib.figure")


# ---- odd numbers ---------------------------------------------------------------------------------

ODD = ["0", "-1", "1e308", "nan", "inf", "", "none", "x", "²", "1e-320", "1e30"]
ODD += [str(10**9), str(10**19), str(2**63), "9" * 5000]


def test_odd_values_of_every_flag_are_taken_or_refused_in_one_line(monkeypatch):
    """What is taken has passed every check, and has room in memory."""
    monkeypatch.setattr(front, "make_task", lambda c, careful=False: Arithmetic(1, 1))
    parser = front.build_parser()
    taken = set()
    for group, its_fields in front.flag_groups().items():
        method = "ppo" if group == "all methods" else group
        for f in its_fields:
            for value in ODD:
                argv = [method, "--config", "smoke", "--seeds", "1"]
                argv += [f"{front.flag(f.name)}={value}"]
                if f.name.startswith("reward_") or f.name == "continuations":
                    argv += ["--reward", "sorm"] if method == "ppo" else []
                try:
                    front.checked_configs(parser.parse_args(argv), [method])
                    taken.add((f.name, value))
                except nr.UserError as error:
                    assert "\n" not in str(error) and len(str(error)) < 6000
                    # a text that is no number has a longer way to its line
                    assert front.flag(f.name) in str(error) or "lower" in str(error), (argv, error)
    numbers = {
        f.name for fs in front.flag_groups().values() for f in fs if f.type in ("int", "float")
    }
    assert {value for name, value in taken if name in numbers - {"seed"}} == {"0"}
    assert ("seed", "0") in taken and ("muon_lr", "0") in taken


@pytest.mark.parametrize(
    "numbers, flags",
    [
        (dict(width=10_000_000, micro=1), "--width"),
        (dict(prompts=1_000_000, samples=1000), "--prompts"),
        (dict(reward="sorm", continuations=10_000_000, response=100), "--prompts"),
        (dict(eval_problems=10_000_000, response=100), "--eval-problems"),
        (dict(demos=10_000_000, response=10_000), "--demos"),
        (dict(response=1_000_000, micro=1_000_000), "--response"),
    ],
)
def test_sizes_that_no_memory_holds_are_refused_before_anything_is_spent(
    numbers, flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(front, "memory_of", lambda device: 64e9)
    monkeypatch.setattr(front, "finish_run", lambda run: pytest.fail("work has begun"))
    argv = [x for name, value in numbers.items() for x in (front.flag(name), value)]
    error = refused(capsys, *RUN, *argv, "--out", tmp_path / "x", "--cache", tmp_path)
    assert "GB of memory and cpu has 64.0" in error and flags in error.split("lower")[1]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("bf16", [False, True])
def test_the_memory_of_a_response_is_that_of_its_cache_and_its_logits(bf16):
    odd = dict(layers=3, heads=6, kv_heads=2, head_dim=10, response=17, vocab=45, bf16=bf16)
    c = tiny("ppo", **odd)
    cache = nr.Cache(c, 1, c.response, torch.zeros(1)).kv
    few, many = (
        sum(front.memory_needed(replace(c, eval_problems=n)).values()) for n in (9000, 9100)
    )
    assert many - few == 100 * (cache.numel() * cache.element_size() + 12 * 45)


def test_a_resume_with_a_cache_that_cannot_be_written_is_one_line(half, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = refused(capsys, "--resume", half, "--cache", tmp_path / "file")
    assert f"cannot write to {tmp_path / 'file'}" in error


def test_the_memory_of_a_model_is_counted_by_its_parameters():
    """By hand: weights, gradients, two moments and a reference, 4 bytes each."""
    for c in (tiny("ppo"), front.make_config("ppo"), front.make_config("ppo", "gpu")):
        model = nr.Transformer(c) if c.width < 100 else None
        needed = front.memory_needed(c)["--width --layers --heads --head-dim --mlp-width"]
        if model:
            norms = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 1)
            assert needed == 20 * (sum(p.numel() for p in model.parameters()) - norms)
        # every preset fits a machine that it is meant for
        assert sum(front.memory_needed(c).values()) < (70e9 if model is None else 4e9)
    # keys and values of a rollout batch, by the cache that the sampler makes
    c = tiny("ppo")
    rows = c.prompts * c.samples
    cache = nr.Cache(c, max(rows, c.eval_problems), c.response, nr.torch.zeros(1))
    needed = front.memory_needed(c)[
        "--prompts --samples --continuations --judgements --eval-problems --response"
    ]
    assert needed == cache.kv.numel() * 4 + 12 * c.vocab * max(rows, c.eval_problems)


def test_the_memory_of_adapters_is_counted_by_their_parameters():
    odd = dict(layers=2, heads=6, kv_heads=2, head_dim=10, width=24, mlp_width=40)
    c = tiny("ppo", lora=3, **odd)
    model = nr.add_adapters(nr.Transformer(c), c)
    thin = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rest = sum(p.numel() for p in model.parameters() if p.dim() == 2) - thin
    needed = front.memory_needed(c)["--width --layers --heads --head-dim --mlp-width"]
    assert needed == 4 * rest + 20 * thin


def test_an_embedding_that_is_the_output_layer_too_is_counted_once():
    sides = "--width --layers --heads --head-dim --mlp-width"
    tied, apart = (front.memory_needed(tiny("ppo", tied=x))[sides] for x in (True, False))
    c = tiny("ppo")
    assert apart - tied == 20 * c.vocab * c.width


def test_a_folder_that_is_too_large_is_told_of_adapters_and_not_of_its_own_sizes(monkeypatch):
    monkeypatch.setattr(front, "memory_of", lambda device: 64e9)
    large = dict(model="x", width=8192, layers=80, heads=64, head_dim=128, mlp_width=28672)
    for name, given, advice in [
        ("ppo", {}, "; take a smaller folder or --lora 16"),
        ("ppo", {"lora": 8}, "; take a smaller folder"),
        ("denoise", {}, "; take a smaller folder"),
    ]:
        with pytest.raises(nr.UserError, match="GB of memory") as refusal:
            front.check_memory(name, tiny(name, **large, **given))
        assert str(refusal.value).endswith(advice)


def test_where_the_system_does_not_say_how_much_memory_there_is_nothing_is_refused(monkeypatch):
    assert 1e8 < front.memory_of("cpu") < 1e14
    monkeypatch.delattr(front.os, "sysconf")
    assert front.memory_of("cpu") == float("inf")


def test_a_memory_that_runs_out_is_one_line(half, cache, monkeypatch, capsys):
    for error in (MemoryError(), RuntimeError("[enforce fail] can't allocate memory: 9 bytes")):
        monkeypatch.setattr(front, "run_job", lambda *_: (_ for _ in ()).throw(error))
        assert "not enough memory" in refused(capsys, "--resume", half, "--cache", cache)


@pytest.mark.parametrize(
    "inside,lower",
    [
        ("write_forward", "lower --eval-problems:"),
        ("gae_credit", "lower the sizes:"),
        ("clip_grad_norm_", "lower --micro:"),
        ("read_by_reference", "lower --micro:"),
        ("prompts", "lower the sizes:"),
    ],
)
def test_a_memory_that_runs_out_names_what_to_lower(
    inside, lower, cache, tmp_path, monkeypatch, capsys
):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0")

    place = {"clip_grad_norm_": nr.nn.utils, "prompts": Arithmetic}.get(inside, nr)
    if inside == "gae_credit":
        arm = replace(nr.PPO_ARMS["gae"], credit=full)
        monkeypatch.setitem(nr.PPO_ARMS, "gae", arm)
    else:
        monkeypatch.setattr(place, inside, full)
    error = refused(capsys, *RUN, "--out", tmp_path / "x", "--cache", cache)
    assert lower in error
    assert "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0" in error


def test_adapters_are_advised_to_those_who_train_a_whole_folder():
    def optimizer_step():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    advised = []
    for name, given in [("ppo", {}), ("ppo", {"lora": 4}), ("denoise", {})]:
        with pytest.raises(torch.OutOfMemoryError) as full:
            optimizer_step()
        for model in ("", "folder"):
            told = front.in_a_line(full.value, tiny(name, model=model, **given))
            assert told.startswith("there is not enough memory, lower --micro")
            advised.append("--lora 16" in told)
    assert advised == [False, True, False, False, False, False]


def test_every_function_that_is_asked_what_to_lower_is_there():
    source = Path(nr.__file__).read_text(encoding="utf-8")
    assert all(f"def {name}(" in source for name in front.TO_LOWER)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_whole_file_that_has_no_room_is_not_called_damaged(
    error, finished, cache, monkeypatch, capsys
):
    def full(*_, **__):
        raise error

    model = finished / "models" / "ppo-0"
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(type(error)):
        nr.load_state(next(Path(cache).rglob("state.pt")).parent)
    monkeypatch.setattr(nr.Transformer, "load_state_dict", full)
    with pytest.raises(type(error)):
        nr.Transformer.load(model)
    told = refused(capsys, "sample", finished, "--prompt", "1+1=")
    assert "there is not enough memory" in told and "delete" not in told


# ---- the task and its files ----------------------------------------------------------------------


def test_a_task_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    def make(c, careful=False):
        raise ValueError("train.jsonl, line 7: not a row")

    monkeypatch.setitem(
        front.TASKS, "arithmetic", SimpleNamespace(**vars(arithmetic) | {"make": make})
    )
    error = refused(capsys, *RUN, "--out", tmp_path / "x", "--cache", tmp_path)
    assert "line 7: not a row" in error and not (tmp_path / "x").exists()


def test_a_problem_that_the_task_cannot_write_is_one_line(finished, monkeypatch, capsys):
    def answer(*_):
        raise ValueError("no token for 'é'")

    method = replace(nr.METHODS["ppo"], answer=answer)
    monkeypatch.setitem(nr.METHODS, "ppo", method)
    assert "no token" in refused(capsys, "sample", finished, "--prompt", "1+1=")
    for prompt in ("", "é", "1+1", "\u2028"):
        refused(capsys, "sample", finished, "--prompt", prompt)


def with_rows(tmp_path, monkeypatch):
    """A task that reads rows of --data, as gsm8k does."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (rows / name).write_text("a row\n")
    monkeypatch.setitem(front.TASKS, "arithmetic", arithmetic)
    monkeypatch.setitem(front.TASK_ONLY, "data", "task arithmetic")
    return rows


def test_a_run_knows_the_files_that_it_began_with(cache, tmp_path, monkeypatch, capsys):
    rows = with_rows(tmp_path, monkeypatch)
    out = tmp_path / "x"
    argv = [*RUN, "--data", rows, "--out", out, "--cache", tmp_path / "cache"]
    with monkeypatch.context() as patch:
        patch.setattr(front, "run_job", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert inside(*argv) == 130
    about = json.loads((out / "config.json").read_text())
    assert set(about["inputs"]) == {str(rows / "train.jsonl"), str(rows / "test.jsonl")}
    (rows / "test.jsonl").write_text("another row\n")
    for again in (["--resume", out, "--cache", cache], argv):
        error = refused(capsys, *again)
        assert f"{rows / 'test.jsonl'} has changed since" in error
    (rows / "test.jsonl").write_text("a row\n")
    assert inside(*argv) == 0


def test_a_cached_model_is_that_of_the_files_as_they_are_now(tmp_path, monkeypatch):
    rows = with_rows(tmp_path, monkeypatch)
    model = tmp_path / "model"
    nr.Transformer(tiny("ppo")).save(model)
    trainer = front.CachedTrainer(tmp_path)
    c = tiny("ppo", data=str(rows), model=str(model))

    def key():
        return trainer.folder("gpt", nr.gpt_base, c, reads="")

    keys = [key(), key()]
    assert keys[0] == keys[1]
    for path in (rows / "train.jsonl", rows / "test.jsonl", model / "model.safetensors"):
        path.write_bytes(path.read_bytes() + b" ")
        keys.append(key())
    (model / "tokenizer.json").write_text("{}")
    keys.append(key())
    (model / "README.md").write_text("of no weight")
    assert len(set(keys)) == 5 and key() == keys[-1]


def test_each_file_is_hashed_once(tmp_path, monkeypatch):
    rows = with_rows(tmp_path, monkeypatch)
    c = tiny("ppo", data=str(rows))
    front.digest_of.cache_clear()
    assert front.inputs_of(c) == front.inputs_of(c)
    assert front.digest_of.cache_info().misses == 2


# ---- somebody's own methods ----------------------------------------------------------------------


def test_a_loop_that_logs_no_samples_is_counted_by_its_state(cache, tmp_path, monkeypatch):
    def quiet(state, task, c):
        for m in nr.ppo(state, task, c):
            del m["samples"]
            yield m

    monkeypatch.setitem(nr.METHODS, "ppo", replace(nr.METHODS["ppo"], loop=quiet))
    monkeypatch.setattr(Arithmetic, "grade", lambda self, *_: 1.0)
    assert inside(*RUN, "--out", tmp_path / "x", "--cache", cache) == 0
    assert [m["samples"] for m in front.read_lines(tmp_path / "x" / "metrics.jsonl")] == [
        32,
        64,
        96,
    ]
    result = front.read_results(tmp_path / "x")[0]
    assert (result["samples_to_80"], result["samples"]) == (32, 96)


@dataclass(frozen=True)
class Optional(nr.PPOConfig):
    """The numbers of ppo, and one that need not be given."""

    # How far a reward may go.
    limit: float | None = None


def test_a_number_that_need_not_be_given_is_a_flag_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(nr.METHODS, "mine", replace(nr.METHODS["ppo"], config=Optional))
    monkeypatch.setattr(front, "finish_run", lambda run: 0)
    argv = ["mine", "--config", "smoke", "--cache", tmp_path, "--out"]
    assert inside(*argv, tmp_path / "a") == 0
    assert inside(*argv, tmp_path / "b", "--limit", 2.5) == 0
    limits = [front.open_run(tmp_path / name).configs["mine"].limit for name in "ab"]
    assert limits == [None, 2.5]
    assert "--limit must be a finite number" in refused(
        capsys, *argv, tmp_path / "c", "--limit", "nan"
    )
    with pytest.raises(SystemExit):
        inside("--help")
    assert "How far a reward may go. [None]" in " ".join(capsys.readouterr().out.split())


def test_a_type_that_is_no_flag_is_one_line(tmp_path, monkeypatch, capsys):
    config = make_dataclass("Odd", [("stops", list, None)], bases=(nr.PPOConfig,), frozen=True)
    monkeypatch.setitem(nr.METHODS, "mine", replace(nr.METHODS["ppo"], config=config))
    error = refused(capsys, *RUN, "--out", tmp_path / "x", "--cache", tmp_path)
    assert "'stops'" in error and "int, float, str, bool" in error


@pytest.mark.parametrize(
    "entry, word",
    [
        (dict(only_with={"lamb": "arm gae"}), "'lamb'"),
        (dict(only_with={"lam": "arms gae"}), "'arms'"),
        (dict(only_with={"lam": "arm gea"}), "'arm gea'"),
        (dict(only_with={"lam": "arm"}), "'arm'"),
        (dict(only_with={"lam": ""}), "''"),
        (dict(choices={"way": ["a"]}), "'way'"),
    ],
)
def test_an_entry_that_names_what_is_not_there_is_one_line(
    tmp_path, monkeypatch, capsys, entry, word
):
    monkeypatch.setitem(nr.METHODS, "mine", replace(nr.METHODS["ppo"], **entry))
    error = refused(capsys, *RUN, "--out", tmp_path / "x", "--cache", tmp_path)
    assert "METHODS['mine']" in error and word in error


def test_every_arm_that_compares_within_groups_says_when_all_of_them_are_flat():
    said = {}
    for name in ("ppo", "seq2seq", "denoise"):
        for arm in CHOICES[name]["arm"]:
            found = front.notes({"flat_groups": 1.0}, tiny(name, arm=arm))
            said[name, arm] = "equal rewards in every group" in found.get("flat", "")
    assert said == {key: key[1] != "gae" for key in said} and len(said) == 8


@pytest.mark.parametrize("name", list(nr.METHODS))
def test_a_response_that_decodes_to_nothing_is_shown(name):
    """Also where all responses do."""
    method = nr.METHODS[name]
    c = tiny(name, device="cpu")
    task = front.make_task(c)
    policy = nr.Transformer(replace(c, causal=name != "denoise"), nr.rng(0, "init"))
    state = method.start(policy, c)
    state_models = {"rewriter": policy}
    if "models" in {f.name for f in fields(state)}:
        state.models = state_models
    prompts = task.prompts(2, nr.rng(0, "dev"))
    for texts in (["", "<eos>"], ["", ""]):
        b = front.as_rollout(task, prompts, texts, c)
        assert len(method.explain(state, task, b, c)) == 2


def test_a_trained_model_whose_numbers_were_changed_is_not_asked(copy, cache, capsys):
    assert inside("--resume", copy, "--cache", cache) == 0
    ask = ["sample", copy, "--prompt", "3+4="]
    assert inside(*ask) == 0
    path = next((copy / "models").iterdir()) / "config.json"
    whole = json.loads(path.read_text())
    for key, value in (("rope_theta", 20_000.0), ("rms_norm_eps", 2e-5), ("eos_token_id", 7)):
        path.write_text(json.dumps(whole | {key: value}))
        capsys.readouterr()
        assert inside(*ask) == 2
        error = capsys.readouterr().err
        assert "config.json was changed" in error and error.count("\n") == 1
    path.write_text(json.dumps(whole))
    assert inside(*ask) == 0


@pytest.mark.parametrize(
    "more",
    ["ppo", "--out x", "--target ppo=0.5", "--lr 0.001", "--seeds 2", "--config smoke"],
    ids=lambda more: more.split()[0],
)
def test_a_resume_takes_no_other_numbers(more, copy, capsys):
    before = (copy / "config.json").read_bytes()
    assert "takes all numbers from its folder" in refused(capsys, "--resume", copy, *more.split())
    assert (copy / "config.json").read_bytes() == before


def test_a_sample_is_greedy_unless_a_temperature_is_asked_for(copy, cache, monkeypatch):
    assert inside("--resume", copy, "--cache", cache) == 0
    seen = []

    def respond(model, task, prompts, c, generator):
        seen.append(c.temperature)
        return ["#7<eos>"]

    monkeypatch.setattr(nr, "respond", respond)
    ask = ["sample", copy, "--prompt", "3+4="]
    assert inside(*ask) == 0 and inside(*ask, "--temperature", "0.7") == 0
    assert seen == [0.0, 0.7]
