"""Keep what runs say: python notebooks/collect.py NAME "the command" RUN_FOLDER ...

Writes notebooks/results/NAME.json: the summary, the curves of dev accuracy, the command, the
commit, threads and machine, and transcripts before and after `ppo`. Several folders are the parts
of one command (some seeds or methods each). Every number in the README's results comes from such a
file; a test compares them. Where NAME.html is there, the page of the first folder takes its place.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_small as front  # noqa: E402
from notebooks import report  # noqa: E402

KEPT = ("step", "samples", "seconds", "dev_greedy", "reward", "truth", "kl", "entropy", "length")


def transcripts(folder: Path) -> dict:
    """Greedy on dev before and after `ppo`, of the run's first seed.

    How many got right and how many wrong; some of both as (problem, before, after).
    """
    lines = [x for x in front.lines_there(folder / "answers.jsonl") if x["loop"] == "ppo"]
    lines = [x for x in lines if x["seed"] == lines[0]["seed"]]
    mended = []
    broken = []
    for x in lines:
        change = x["after"]["reward"] - x["before"]["reward"]
        if change:
            texts = (x["prompt"], x["before"]["response"], x["after"]["response"])
            (mended if change > 0 else broken).append(texts)
    return {
        "problems": len(lines),
        "mended": len(mended),
        "broken": len(broken),
        "texts": mended[:40] + broken[:40],
    }


def dev_curves(folders: list[Path]) -> dict[str, list[dict]]:
    """ "ppo/0" -> what was logged whenever dev was looked at."""
    curves: dict[str, list[dict]] = {}
    for folder in folders:
        for line in front.read_lines(folder / "metrics.jsonl"):
            if "dev_greedy" in line:
                point = {key: round(line[key], 4) for key in KEPT if line.get(key) is not None}
                curves.setdefault(f"{line['loop']}/{line['seed']}", []).append(point)
    return curves


def main(name: str, command: str, *folders: str) -> None:
    """summary.json and metrics.jsonl of the folders -> notebooks/results/name.json."""
    paths = [Path(folder) for folder in folders]
    summaries = [front.read_json(path / "summary.json") for path in paths]
    results = [result for summary in summaries for result in summary["results"]]
    # A run of an older version does not say its commit.
    commit = front.read_json(paths[0] / "config.json").get("commit") or front.commit_of(ROOT)
    kept = {"command": command, "commit": commit, **summaries[0]}
    kept |= {"results": results, "curves": dev_curves(paths)}
    for numbers in kept["changed"].values():
        if "model" in numbers:  # where a folder lies on this machine says nothing on another
            numbers["model"] = Path(numbers["model"]).name
    if any(result["loop"] == "ppo" for result in summaries[0]["results"]):
        kept["transcripts"] = transcripts(paths[0])
    path = ROOT / "notebooks" / "results" / f"{name}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    page = path.with_suffix(".html")
    if page.exists():
        page.write_text(report.page(paths[:1], report.REFERENCE), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
