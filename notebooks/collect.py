"""Keep what runs say: python notebooks/collect.py NAME "the command" RUN_FOLDER ...

Writes notebooks/results/NAME.json: the summary, the curves of dev accuracy, the command, the commit,
threads and machine, and transcripts before and after `ppo`. Several folders are the parts of one command
(some seeds or loops each). Every number in the README's results comes from such a file; a test compares them.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanoreward as nr  # noqa: E402
import train_small as front  # noqa: E402

KEPT = ("step", "samples", "seconds", "dev_greedy", "reward", "truth", "kl", "entropy", "length")


def transcripts(folder: Path) -> dict:
    """Greedy on dev before and after `ppo` (the run's first seed): how many got right, how many wrong; all of the
    wrong and a few of the right ones as (problem, before, after)."""
    run = front.open_run(folder, front.CACHE)
    c = replace(run.config, temperature=0.0)
    task = front.make_task(c)
    dev = task.prompts(c.eval_problems, nr.rng(0, "dev"), "dev")
    models = (
        front.base_model(run.config, run.cache),
        nr.Transformer.load(folder / "models" / f"ppo-{c.seed}"),
    )
    both = list(zip(dev, *(nr.respond(model, task, dev, c) for model in models), strict=True))
    changed = [x for x in both if task.grade(x[0], x[1]) != task.grade(x[0], x[2])]
    mended, broken = ([x for x in changed if task.grade(x[0], x[2]) == after] for after in (1, 0))
    return {
        "problems": len(dev),
        "mended": len(mended),
        "broken": len(broken),
        "texts": mended[:40] + broken,
    }


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
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    kept = {"command": command, "commit": commit, **about[0], "results": results, "curves": curves}
    if any(result["loop"] == "ppo" for result in about[0]["results"]):
        kept["transcripts"] = transcripts(Path(folders[0]))
    path = ROOT / "notebooks" / "results" / f"{name}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
