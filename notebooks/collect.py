"""Keep what a run says: python notebooks/collect.py RUN_FOLDER NAME "the command that made it".

Writes notebooks/results/NAME.json: the summary, the curves of dev accuracy, the command, the commit,
threads and machine. Every number in the README comes from such a file; a test compares them.
"""

import json
import subprocess
import sys
from pathlib import Path

KEPT = ("step", "samples", "seconds", "dev_greedy", "dev_sampled", "reward", "truth", "kl", "entropy", "length")


def main(run: Path, name: str, command: str) -> None:
    """run/summary.json and run/metrics.jsonl -> notebooks/results/name.json."""
    about = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves: dict[str, list[dict]] = {}
    for line in lines:
        if "dev_greedy" in line:
            point = {key: round(line[key], 4) for key in KEPT if line.get(key) is not None}
            curves.setdefault(f"{line['loop']}/{line['seed']}", []).append(point)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    kept = {"command": command, "commit": commit, **about, "curves": curves}
    text = json.dumps(kept, indent=1)
    (Path(__file__).parent / "results" / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
