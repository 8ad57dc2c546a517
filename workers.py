"""Processes that do jobs side by side, for train_small.py: one terminal and one Ctrl-C for all.

The parent starts the processes, its workers, hands out the jobs and is the only one that writes to
the terminal. A worker sends what it prints, how far its bars are and how its jobs ended through a
pipe. Whatever comes the other way while a worker has a job tells it to stop, and so does the end of
the pipe: a worker whose parent was killed saves its state and ends.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanoreward import UserError

# A job, as the arguments of the function that does it.
Job = tuple[Any, ...]
# The name of the process of every worker. A script that starts a run while it is imported by a
# worker is known by it.
NAME = "nanoreward worker"
# The parent looks so often, in seconds, whether Ctrl-C was pressed.
PATIENCE = 0.1
# Each process draws its bars alone. A lock that processes share, as tqdm has it, would be left
# behind by one that is killed.
tqdm.set_lock(threading.RLock())


def is_worker() -> bool:
    """Whether this process is a worker of another one."""
    return multiprocessing.current_process().name == NAME


def physical_cores(system: Path = Path("/sys")) -> int:
    """How many cores this process may use: threads that share a core count once.

    system: where Linux describes the machine; other systems count by themselves.
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        siblings = system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return min(len(cores), cores_of_container(system))


def cores_of_container(system: Path) -> int:
    """How many cores' worth of time a container gives to this process; a large number if all."""
    try:
        share, period = (system / "fs/cgroup/cpu.max").read_text().split()
        return max(1, int(share) // int(period))
    except (OSError, ValueError):  # the first word is "max" where there is no limit
        return sys.maxsize


# ---- the terminal, from near and from afar -------------------------------------------------------


def in_main_thread() -> bool:
    """Whether this is the only thread that Python lets listen to signals."""
    return threading.current_thread() is threading.main_thread()


# Work that takes longer than FIRST_WORD seconds prints a line, then one every NEXT_WORD seconds.
FIRST_WORD = 1.5
NEXT_WORD = 20.0


@contextmanager
def saying(text: Callable[[float], str], first: float | None = None) -> Iterator[None]:
    """As long as the block lasts, print now and then what is at work: no output is no hang.

    text: how many seconds it has taken so far -> what to print; if it is empty nothing is. first:
    the seconds until the first line, if they are not FIRST_WORD.
    """
    over = threading.Event()
    began = time.monotonic()

    def speak() -> None:
        wait = FIRST_WORD if first is None else first
        while not over.wait(wait):
            if line := text(time.monotonic() - began):
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
            wait = NEXT_WORD

    thread = threading.Thread(target=speak, daemon=True)
    try:
        thread.start()
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


class Terminal:
    """The console of a process that has the terminal for itself."""

    def shows_bars(self) -> bool:
        """Whether there is somebody to see a bar move; a pipe or a file has none."""
        return sys.stderr.isatty()

    @contextmanager
    def bar(self, title: str, total: int, done: int) -> Iterator[Callable[[], Any]]:
        """A bar, as long as the block lasts: the function that moves it on by one."""
        with tqdm(total=total, initial=done, desc=title, disable=None, leave=False) as bar:
            yield bar.update

    @contextmanager
    def listening(self) -> Iterator[Callable[[], bool]]:
        """As long as the block lasts, Ctrl-C only asks to stop: the function that says whether.

        A second Ctrl-C stops at once.
        """
        listens = in_main_thread()
        asked = []

        def ask(*_: Any) -> None:
            asked.append(True)
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = signal.signal(signal.SIGINT, ask) if listens else None
        try:
            yield lambda: bool(asked)
        finally:
            if listens:
                signal.signal(signal.SIGINT, before)


class Wire:
    """The console of a worker: all goes through the pipe to the parent."""

    def __init__(self, pipe: Connection, bars: bool):
        self.pipe = pipe
        self.bars = bars
        self.sending = threading.Lock()

    def shows_bars(self) -> bool:
        """Whether the parent draws them."""
        return self.bars

    def send(self, *message: Any) -> None:
        """Tell the parent. If it is gone nobody hears it, and `stop_asked` says so."""
        try:
            with self.sending:
                self.pipe.send(message)
        except OSError:
            return

    def receive(self) -> Any:
        """What the parent sends; None if it is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def stop_asked(self) -> bool:
        """Whether the parent wants this worker to stop, or is gone."""
        try:
            return self.pipe.poll()
        except OSError:
            return True

    @contextmanager
    def bar(self, title: str, total: int, done: int) -> Iterator[Callable[[], Any]]:
        """A bar that the parent draws: the function that moves it on by one."""

        def advance() -> None:
            nonlocal done
            done += 1
            self.send("bar", title, total, done)

        self.send("bar", title, total, done)
        try:
            yield advance
        finally:
            self.send("no bar")

    @contextmanager
    def listening(self) -> Iterator[Callable[[], bool]]:
        """The function that says whether to stop."""
        yield self.stop_asked


# What this process shows its bars on. A worker puts its wire here.
console: Terminal | Wire = Terminal()


class Lines(io.TextIOBase):
    """Standard output or error of a worker: each whole line goes to the parent."""

    def __init__(self, wire: Wire, is_error: bool):
        self.wire = wire
        self.is_error = is_error
        # What each thread has written of a line that is not whole yet.
        self.begun = threading.local()

    def writable(self) -> bool:
        """Python asks that of a stream."""
        return True

    def write(self, text: str) -> int:
        """Send the lines that are whole now."""
        rest = getattr(self.begun, "text", "")
        *whole, self.begun.text = (rest + text).split("\n")
        for line in whole:
            self.wire.send("line", line, self.is_error)
        return len(text)


def keep_output(path: Path) -> None:
    """Let what this process writes past Python, as a crash does, go to this file from now on."""
    with path.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def serve(pipe: Connection, do: Callable[..., str], bars: bool) -> None:
    """All that a worker does: one job after the other, until the parent has no more of them.

    do(*job): what went wrong, in a line; empty if the job is done. KeyboardInterrupt: it stopped.
    bars: whether the parent draws any.
    """
    global console
    if in_main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    console = wire = Wire(pipe, bars)
    sys.stdout = Lines(wire, is_error=False)
    sys.stderr = Lines(wire, is_error=True)
    wire.send("ready")
    while (job := wire.receive()) is not None:
        try:
            why = do(*job)
        except KeyboardInterrupt:
            if wire.stop_asked():
                wire.send("stopped")
                return
            why = "it raised KeyboardInterrupt"
        wire.send("ended", why)


# ---- the parent ----------------------------------------------------------------------------------


@dataclass
class Worker:
    """What the parent knows of a worker."""

    process: BaseProcess
    pipe: Connection
    # Whether it has told that it is there.
    ready: bool = False
    # What it is doing.
    job: Job | None = None
    bar: tqdm | None = None

    def show(self, title: str, total: int, done: int) -> None:
        """Draw its bar."""
        if self.bar is None:
            self.bar = tqdm(total=total, initial=done, desc=title, disable=None, leave=False)
        self.bar.update(done - self.bar.n)

    def hide(self) -> None:
        """Take its bar away."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None


def how_it_ended(code: int | None) -> str:
    """What an exit code says of a process that did not say anything itself."""
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"


@dataclass
class Pool:
    """Some workers, and the jobs that they are given."""

    # How many workers there are at most.
    size: int
    # What they do with a job, see `serve`. It must be importable by its name.
    do: Callable[..., str]
    # Called in the parent for every job that has ended, with what went wrong; empty: it is done.
    # The last argument says whether the process died of it.
    ended: Callable[[Job, str, bool], None]
    workers: list[Worker] = field(default_factory=list)

    def run(self, jobs: list[Job]) -> None:
        """Do all jobs. Ctrl-C stops the workers between two updates, then it is raised."""
        left = list(jobs)
        stopping = False
        with Terminal().listening() as stop_asked:
            try:
                while left or any(worker.job for worker in self.workers):
                    if stop_asked() and not stopping:
                        stopping = True
                        left.clear()
                        self.stop()
                    self.hand_out(left)
                    for pipe in wait([worker.pipe for worker in self.workers], PATIENCE):
                        self.hear(next(w for w in self.workers if w.pipe is pipe))
            except KeyboardInterrupt:  # the second one
                self.kill()
                raise
            finally:
                self.close()
        if stopping:
            raise KeyboardInterrupt

    def start(self) -> None:
        """Start one more worker."""
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        bars = Terminal().shows_bars()
        process = spawn.Process(target=serve, args=(theirs, self.do, bars), name=NAME)
        # A worker inherits that Ctrl-C is ignored, so that none can end it while it is loading.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread() else None
        try:
            process.start()
        finally:
            if in_main_thread():
                signal.signal(signal.SIGINT, before)
            theirs.close()  # so that the pipe ends when the worker does
        self.workers.append(Worker(process, ours))

    def hand_out(self, left: list[Job]) -> None:
        """Give jobs to all workers that have none, and start workers that are missing."""
        for worker in self.workers:
            if left and worker.ready and worker.job is None:
                worker.job = left.pop(0)
                self.tell(worker, worker.job)
        loading = sum(not worker.ready for worker in self.workers)
        for _ in range(min(self.size - len(self.workers), len(left) - loading)):
            self.start()

    def tell(self, worker: Worker, message: Any) -> None:
        """Send something to a worker. If it has died, `hear` will find out."""
        try:
            worker.pipe.send(message)
        except OSError:
            return

    def hear(self, worker: Worker) -> None:
        """Take what one worker has sent."""
        try:
            kind, *rest = worker.pipe.recv()
        except (EOFError, OSError):
            self.bury(worker)
            return
        if kind == "ready":
            worker.ready = True
        elif kind == "line":
            line, is_error = rest
            stream = sys.stderr if is_error else sys.stdout
            tqdm.write(line, file=stream)
            stream.flush()
        elif kind == "bar":
            worker.show(*rest)
        elif kind == "no bar":
            worker.hide()
        elif worker.job is not None:
            job = worker.job
            worker.job = None
            if kind != "stopped":
                self.ended(job, rest[0], False)

    def bury(self, worker: Worker) -> None:
        """A worker has died: so did its job, and the others go on.

        Raises UserError if it never began and was the last one.
        """
        worker.hide()
        worker.process.join()
        self.workers.remove(worker)
        code = worker.process.exitcode
        if not worker.ready:
            # Perhaps there is no memory for so many of them.
            self.size -= 1
            why = f"a process for jobs could not begin: {how_it_ended(code)}"
            if self.size == 0:
                raise UserError(f"{why}; --workers 1 does all jobs in one process")
            tqdm.write(f"note: {why}; going on with {self.size} of them", file=sys.stderr)
        if worker.job is not None:
            self.ended(worker.job, how_it_ended(code), True)

    def stop(self) -> None:
        """Ask all workers to save and stop."""
        tqdm.write("stopping after the updates at hand; a second Ctrl-C stops at once")
        sys.stdout.flush()
        for worker in self.workers:
            self.tell(worker, None)

    def close(self) -> None:
        """End all workers: with the pipe's end each one saves and stops."""
        for worker in self.workers:
            worker.hide()
            worker.pipe.close()
        try:
            for worker in self.workers:
                worker.process.join()
        except KeyboardInterrupt:
            self.kill()
            raise

    def kill(self) -> None:
        """End all workers at once, whatever they are doing."""
        for worker in self.workers:
            worker.process.kill()
