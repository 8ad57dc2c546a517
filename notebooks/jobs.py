"""Arms times seeds, each measured once and kept: the command line that the experiments of this folder share."""

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import train_small as front

ROOT = Path(__file__).resolve().parent.parent


def run(
    doc: str,
    arms: Iterable[str],
    folder: Path,
    measure: Callable[[str, int, int, Path], dict],
    groups: dict[str, Iterable[str]] | None = None,
) -> None:
    """measure(arm, seed, threads, cache) -> folder/ARM-SEED.json, for what the command line asks and is not there.
    groups: names that stand for several arms."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = groups or {arm: [arm] for arm in arms}
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(named)}; none: all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=front.CACHE)
    a = parser.parse_args()
    if unknown := [name for name in a.names if name not in named]:
        parser.error(f"{unknown[0]} is not one of {', '.join(named)}")
    torch.set_num_threads(a.threads)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = dict.fromkeys(arm for name in a.names or named for arm in named[name])
    for seed in a.seeds:
        for arm in chosen:
            path = folder / f"{arm}-{seed}.json"
            if path.exists():
                continue
            about = {
                "commit": subprocess.check_output(
                    ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True
                )[:7],
                "threads": a.threads,
                "machine": f"{platform.machine()}, 2 cores",
                "torch": torch.__version__,
            }
            found = about | measure(arm, seed, a.threads, a.cache)
            front.write_text(path, json.dumps(found) + "\n")
            print(arm, seed, found["seconds"], flush=True)
