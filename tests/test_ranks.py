"""Several processes, one run, on a CPU (gloo).

Two of them give the numbers of one, are killed, resume and stop together.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

import nanoreward as nr
import train_small as front
from tests.conftest import ROOT

LOOPS = list(nr.METHODS)  # what they start from and their reward models are trained by `fit`
# micro-batches of 6: each process has several, of unequal number
FLAGS = (
    "--config smoke --micro 6 --base-updates 60 --updates 3 --min-ops 1 --eval-problems 10".split()
)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


# Processes that begin when torch is loaded already, which takes longer than most of these runs.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "train_small", "notebooks.curves"])


def rank(argv, env, folder):
    """One of the processes of torchrun; it writes what it says into this folder."""
    os.environ.update(env)
    for stream, name in ((1, "said"), (2, "errors")):
        with open(folder / f"{name}-{env['RANK']}", "w") as file:
            os.dup2(file.fileno(), stream)
    sys.argv = ["train_small.py", *argv]
    code = front.main()
    assert not dist.is_initialized()  # one that is still in the group is aborted now and then
    sys.exit(code)


def start(folder, out, cache, resume=False, loops=LOOPS, more=()):
    """Two processes of one run, as torchrun starts them; out and cache may be a list of two."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    started = []
    for i in (0, 1):
        mine, cached = (str(x[i] if isinstance(x, list) else x) for x in (out, cache))
        argv = ["--resume", mine] if resume else [*loops, *FLAGS, *more, "--out", mine]
        env = meet | {"RANK": str(i), "LOCAL_RANK": str(i), "OMP_NUM_THREADS": "1"}
        args = ([*argv, "--cache", cached], env, folder)
        process = FORKS.Process(target=rank, args=args, daemon=True)  # it ends with the tests
        process.start()
        started.append(process)
    return started


def ended(both, folder):
    """The exit codes of the two processes, and what each has said and complained of."""
    for process in both:
        process.join(300)
    names = [(f"said-{i}", f"errors-{i}") for i in (0, 1)]
    texts = [[(folder / name).read_text() for name in each] for each in names]
    return [process.exitcode for process in both], texts


def lines(out):
    found = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process: what all others must repeat."""
    folder = tmp_path_factory.mktemp("alone")
    places = ["--out", str(folder / "run"), "--cache", str(folder / "cache")]
    assert front.main([*LOOPS, *FLAGS, "--workers", "1", *places]) == 0
    return folder / "run"


def assert_same(one, other, least=18):
    """The same numbers but for rounding: sums over two processes are added in another order."""
    assert len(lines(one)) == len(lines(other)) > least
    for x, y in zip(lines(one), lines(other), strict=True):
        assert (x["loop"], x["step"]) == (y["loop"], y["step"])
        if x.get("pairs", 0) > 0 and abs(x.get("margin", 1)) < 1e-5:
            # At the first update of a round the policy is its own reference: all margins are 0, and
            # how many of them lie above it is rounding.
            assert 0 <= x.pop("pair_accuracy") <= 1 and 0 <= y.pop("pair_accuracy") <= 1
        assert {
            k: pytest.approx(v, rel=1e-4, abs=1e-4) if isinstance(v, float) else v
            for k, v in x.items()
        } == y


def test_something_was_learned_in_every_loop(alone):
    """Otherwise the comparison with two processes would compare nothing."""
    for name in LOOPS:
        mine = [m for m in lines(alone) if m["loop"] == name]
        assert len(mine) >= 3, name
        if name in ("iterative_dpo", "self_rewarding"):
            assert all(m["pairs"] > 0 and m["loss"] > 0 for m in mine)
        elif name == "refine":
            assert all(
                m["orm_loss"] > 0 and m["sorm_loss"] > 0 and m["local_loss"] > 0 for m in mine
            )
        else:
            assert any(m["grad_norm"] > 0 and m["flat_groups"] < 1 for m in mine), mine


def test_two_processes_killed_and_resumed_give_the_numbers_of_one(alone, tmp_path):
    out, cache = tmp_path / "run", tmp_path / "cache"
    both = start(tmp_path, out, cache)
    log = out / "jobs" / "self_rewarding-0" / "metrics.jsonl"
    deadline = time.time() + 600
    while not (log.exists() and b"\n" in log.read_bytes()):
        assert time.time() < deadline and all(p.is_alive() for p in both)
        time.sleep(0.02)
    for p in both:
        p.kill()
        p.join()
    codes, (said, silent) = ended(start(tmp_path, out, cache, resume=True), tmp_path)
    assert codes == [0, 0], (said, silent)
    assert "An accuracy is that of" in said[0] and silent == ["", ""]
    assert_same(alone, out)
    a, b = (json.loads((folder / "summary.json").read_text())["results"] for folder in (alone, out))
    assert [x["loop"] for x in a] == LOOPS
    for x, y in zip(a, b, strict=True):
        for key in ("loop", "base", "final", "samples", "updates"):
            assert x[key] == y[key], (x["loop"], key)
    assert not list(tmp_path.rglob("*.tmp"))


def test_ctrl_c_heard_by_one_process_stops_all_of_them(tmp_path):
    out = tmp_path / "run"
    more = ["--updates", "200"]
    both = start(tmp_path, out, tmp_path / "cache", loops=["ppo"], more=more)
    deadline = time.time() + 600
    while not (out / "jobs" / "ppo-0" / "metrics.jsonl").exists():
        assert time.time() < deadline and all(p.is_alive() for p in both)
        time.sleep(0.02)
    os.kill(both[1].pid, signal.SIGINT)
    codes, (said, _) = ended(both, tmp_path)
    assert codes == [130, 130] and "go on with" in said[0], said


def test_a_run_of_several_processes_needs_a_folder(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert front.main(["ppo"]) == 2
    error = capsys.readouterr().err
    assert "--out" in error and error.count("\n") == 1


# ---- two machines --------------------------------------------------------------------------------


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them: the names of the two."""
    names = [f"nr{os.getpid()}-{i}" for i in (1, 2)]
    cable = [f"v{os.getpid() % 10**7}-{i}" for i in (1, 2)]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        near, far = cable
        ip("link", "add", near, "netns", names[0], "type", "veth", "peer", "name", far)
        ip("link", "set", far, "netns", names[1])
        for i, (name, end) in enumerate(zip(names, cable, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(
            f"two machines are imitated by network namespaces, and none can be made: {error}"
        )
    else:
        yield list(zip(names, cable, strict=True))
    finally:
        for name in names:
            kill_all(name)  # what a failed test left running would keep the namespace alive
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def kill_all(name):
    """Kill what runs on this machine: torchrun, and the processes that would outlive it."""
    running = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    pids = [int(pid) for pid in running.stdout.split()]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return len(pids)


def on_hosts(hosts, *flags):
    """torchrun on each of two machines."""
    port = free_port()
    started = []
    for i, (name, cable) in enumerate(hosts):
        argv = f"ip netns exec {name} {sys.executable} -m torch.distributed.run --nnodes 2".split()
        argv += f"--node-rank {i} --nproc-per-node 1 --master-addr 10.77.0.1".split()
        argv += ["--master-port", port, "train_small.py", *map(str, flags)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": cable}
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        started.append(subprocess.Popen(argv, env=env, **pipe))
    return started


def test_two_machines_killed_and_resumed_give_the_numbers_of_one(hosts, alone, tmp_path):
    out, cache = tmp_path / "run", tmp_path / "cache"
    loops = ["ppo", "iterative_dpo", "denoise"]
    both = on_hosts(hosts, *loops, *FLAGS, "--out", out, "--cache", cache)
    deadline = time.time() + 600
    while not (out / "jobs" / "iterative_dpo-0" / "metrics.jsonl").exists():
        assert time.time() < deadline and all(p.poll() is None for p in both)
        time.sleep(0.02)
    assert [kill_all(name) for name, _ in hosts] == [2, 2]
    for p in both:
        p.communicate()
    both = on_hosts(hosts, "--resume", out, "--cache", cache)
    said = [p.communicate(timeout=900) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert "ppo/0    1" not in said[0][0] and "denoise/0    3" in said[0][0], said
    expected = tmp_path / "expected"
    expected.mkdir()
    text = (alone / "metrics.jsonl").read_text().splitlines(keepends=True)
    mine = [line for line in text if json.loads(line)["loop"] in loops]
    (expected / "metrics.jsonl").write_text("".join(mine))
    assert len(lines(expected)) >= 9
    assert_same(expected, out, least=8)


@pytest.mark.parametrize("unshared", ["--out", "--cache"])
def test_processes_that_share_no_disk_are_told_so_in_a_line(unshared, tmp_path):
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    places = {"--out": tmp_path / "run", "--cache": tmp_path / "cache"}
    places[unshared] = [one, other]
    both = start(tmp_path, places["--out"], places["--cache"], loops=["ppo"])
    codes, said = ended(both, tmp_path)
    assert codes == [2, 2], said
    message = f"1 of 2 processes do not see {one}: {unshared} must name a folder on a disk"
    assert message in said[0][1]
    assert not list(tmp_path.rglob("state.pt")) and not list(tmp_path.rglob("*.tmp"))


def test_a_late_process_removes_nothing_that_the_first_one_is_writing(tmp_path, monkeypatch):
    half_written = tmp_path / f"config.json.{os.getpid()}.tmp"
    half_written.touch()
    monkeypatch.setattr(nr, "is_first", lambda: False)
    front.remove_left_behind(tmp_path)
    assert half_written.exists()
    monkeypatch.undo()
    front.remove_left_behind(tmp_path)
    assert not half_written.exists()
