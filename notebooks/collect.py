"""Keep what runs say: python notebooks/collect.py NAME "the command" RUN_FOLDER ...

Writes notebooks/results/NAME.json: the summary, the curves of dev accuracy, the command, the commit,
threads and machine. Several folders are the parts of one command (some seeds each). Every number in
the README's results comes from such a file; a test compares them.
"""

import json
import subprocess
import sys
from pathlib import Path

KEPT = ("step", "samples", "seconds", "dev_greedy", "reward", "truth", "kl", "entropy", "length")


def main(name: str, command: str, *folders: str) -> None:
    """summary.json and metrics.jsonl of the folders -> notebooks/results/name.json."""
    about = [json.loads((Path(folder) / "summary.json").read_text()) for folder in folders]
    results = [result for part in about for result in part["results"]]
    curves: dict[str, list[dict]] = {}
    for folder in folders:
        for line in map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines()):
            if "dev_greedy" in line:
                point = {key: round(line[key], 4) for key in KEPT if line.get(key) is not None}
                curves.setdefault(f"{line['loop']}/{line['seed']}", []).append(point)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    kept = {"command": command, "commit": commit, **about[0], "results": results, "curves": curves}
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
