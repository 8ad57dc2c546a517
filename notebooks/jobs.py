"""Arms times seeds, each measured once and kept: what the experiments of this folder share."""

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import nanoreward as nr
import train_small as front

ROOT = Path(__file__).resolve().parent.parent
# The size of an experiment, laid out as a preset of train_small.py.
LAPTOP = front.PRESETS["laptop"]


def config(method: str, seed: int, threads: int, sizes: dict, /, **numbers: Any) -> Any:
    """The config of a method on the CPU: the sizes, then these numbers.

    A number that this method has not is left out; one that no method has is a TypeError.
    """
    known = {f.name for entry in nr.METHODS.values() for f in fields(entry.config)}
    if unknown := numbers.keys() - known:
        raise TypeError(f"no method has a number called {', '.join(sorted(unknown))}")
    chosen = sizes.get("all", {}) | sizes.get(method, {}) | numbers
    chosen |= {"seed": seed, "threads": threads, "device": "cpu"}
    return front.make_config(method, **chosen)


def about(threads: int) -> dict[str, Any]:
    """What stands beside every result: where and with what it was measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "commit": subprocess.check_output(command, cwd=ROOT, text=True)[:7],
        "threads": threads,
        "machine": f"{platform.machine()}, 2 cores",
        "torch": torch.__version__,
    }


def run(
    doc: str,
    arms: Iterable[str],
    folder: Path,
    measure: Callable[[str, int, int, Path], dict],
    groups: dict[str, Iterable[str]] | None = None,
) -> None:
    """measure(arm, seed, threads, cache) -> folder/ARM-SEED.json, for what is asked and not there.

    groups: names that stand for several arms.
    """
    named = groups or {arm: [arm] for arm in arms}
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(named)}; none: all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=front.CACHE)
    a = parser.parse_args()
    if unknown := [name for name in a.names if name not in named]:
        parser.error(f"{unknown[0]} is not one of {', '.join(named)}")
    # As many as an interval is known for.
    if not all(0 <= seed <= len(front.T95) for seed in a.seeds):
        parser.error(f"--seeds must lie in 0..{len(front.T95)}")
    torch.set_num_threads(a.threads)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = dict.fromkeys(arm for name in a.names or named for arm in named[name])
    for seed in a.seeds:
        for arm in chosen:
            path = folder / f"{arm}-{seed}.json"
            if path.exists():
                continue
            found = about(a.threads) | measure(arm, seed, a.threads, a.cache)
            front.write_text(path, json.dumps(found) + "\n")
            print(arm, seed, found["seconds"], flush=True)


def read_jobs(folder: Path, arm: str) -> list[dict]:
    """What was measured of an arm, by seed."""
    jobs = [json.loads(path.read_text()) for path in folder.glob(f"{arm}-*.json")]
    return sorted(jobs, key=lambda job: job["seed"])


def parted(jobs: list[dict]) -> tuple[list[dict], list[dict]]:
    """The first five seeds, which tables and pictures show, and those that only claims read.

    If none of the five is there, what there is is shown.
    """
    shown = [job for job in jobs if job["seed"] < 5] or jobs
    return shown, [job for job in jobs if job not in shown]


def about_arm(script: str, arm: str, jobs: list[dict]) -> dict[str, Any]:
    """What all seeds of an arm have in common, and the command that measures those shown."""
    common = {key: jobs[0][key] for key in ("threads", "machine", "torch")}
    seeds = " ".join(str(job["seed"]) for job in parted(jobs)[0])
    command = f"python notebooks/{script}.py {arm} --seeds {seeds} --threads {common['threads']}"
    return common | {"command": command}


def read_arms(path: Path) -> dict[str, Any]:
    """The arms that are kept so far."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_arms(path: Path, kept: dict[str, Any]) -> None:
    """One arm a line."""
    lines = [f"{json.dumps(arm)}: {json.dumps(about)}" for arm, about in kept.items()]
    front.write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def row(*cells: str) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def head(*titles: str) -> list[str]:
    """The first two lines of a Markdown table, behind an empty one."""
    return ["", row(*titles), "|---" * len(titles) + "|"]
