"""Dev accuracy over the updates of one or several runs, as a picture or as lines of text.

`python notebooks/curves.py PICTURE.png RESULT.json ...` draws committed results.
"""

import json
import sys
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

# loop -> run -> update -> the accuracies of all seeds
Panels = dict[str, dict[Path, dict[int, list[float]]]]
# name of a row -> the accuracies of all seeds
Rows = dict[str, list[float]]
# The committed run of all six loops with five seeds.
TOUR = Path(__file__).parent / "results" / "tour.json"


def find_curves(logs: dict[Path, list[dict]]) -> Panels:
    """What the metrics.jsonl of each run says about dev."""
    panels: Panels = {}
    for run, lines in logs.items():
        for m in lines:
            if "dev_greedy" in m:
                curve = panels.setdefault(m["loop"], {}).setdefault(run, {})
                curve.setdefault(m["step"], []).append(m["dev_greedy"])
    return panels


def draw_levels(axes, results: list[dict]) -> None:
    """Dashed lines at chance, base, start and ceiling, each with its name at a place of its own."""
    for name, right in {"chance": 0.98, "base": 0.78, "start": 0.64, "ceiling": 0.5}.items():
        if results and name in results[0]:
            level = mean(r[name] for r in results)
            axes.axhline(level, color="0.5", lw=0.8, ls="--")
            axes.text(
                right,
                level,
                name,
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="bottom",
                color="0.4",
            )


def picture(logs: dict[Path, list[dict]], results: list[dict], path: Path, kind: str) -> None:
    """A panel for each loop: the mean over seeds in a band that holds them all.

    logs: the lines of each run's metrics.jsonl; results: those of summary.json, for its levels;
    kind: of the file, as "png".
    """
    panels = find_curves(logs)
    columns = min(3, len(panels)) or 1
    rows = -(-len(panels) // 3) or 1
    figure = Figure(figsize=(1 + 3 * columns, 0.6 + 2.4 * rows), layout="tight")
    flat = figure.subplots(rows, columns, squeeze=False).flat
    for axes in flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (loop, curves) in zip(flat, panels.items(), strict=False):
        for i, (run, curve) in enumerate(curves.items()):
            seeds = max(len(ys) for ys in curve.values())
            x = [u for u, ys in curve.items() if len(ys) == seeds]  # all seeds came so far
            low, middle, high = ([f(curve[u]) for u in x] for f in (min, mean, max))
            axes.fill_between(x, low, high, color=f"C{i}", alpha=0.25, lw=0)
            axes.plot(x, middle, color=f"C{i}", lw=2, label=str(run).replace("$", r"\$"))
        draw_levels(axes, [r for r in results if r["loop"] == loop])
        axes.set(title=loop, xlabel="update", ylabel="greedy accuracy (dev)", ylim=(0, 1.12))
        # One run needs no name.
        axes.legend(frameon=False, loc="upper left").set_visible(len(logs) > 1)
    figure.savefig(path, format=kind, dpi=150)


def kept_lines(result: Path) -> list[dict]:
    """What a committed result keeps of metrics.jsonl: the lines in which dev was looked at."""
    lines = []
    for name, curve in json.loads(result.read_text())["curves"].items():
        for m in curve:
            lines.append({"loop": name.split("/")[0]} | m)
    return lines


def of_tour(loop: str) -> Rows:
    """Dev accuracy of a loop in the committed tour, a row for each update that was measured."""
    rows: Rows = {}
    for m in kept_lines(TOUR):
        if m["loop"] == loop:
            rows.setdefault(f"update {m['step']:3d}", []).append(m["dev_greedy"])
    return rows


def first_and_last(loops: list[str]) -> Rows:
    """The first and the last row of each loop in the committed tour."""
    rows: Rows = {}
    for loop in loops:
        curve = of_tour(loop)
        for name in (min(curve), max(curve)):
            rows[f"{loop.ljust(14)} {name}"] = curve[name]
    return rows


def band(rows: Rows, width: int = 50) -> str:
    """A line of text for each row: the mean of its seeds, and where they lie between 0 and 1.

    The letter o stands at the mean, and the line around it reaches from the worst to the best seed.
    """
    longest = max(len(name) for name in rows)
    scale = "0" + "accuracy".center(width - 2) + "1"
    lines = [" " * longest + "   mean  " + scale]
    for name, values in rows.items():
        low, middle, high = (round((width - 1) * f(values)) for f in (min, mean, max))
        drawn = " " * low + "-" * (high - low + 1)
        drawn = drawn[:middle] + "o" + drawn[middle + 1 :]
        lines.append(f"{name.ljust(longest)}  {mean(values):5.3f}  {drawn}")
    return "\n".join(lines)


def main(path: str, *results: str) -> None:
    """Draw the curves of committed results, each under the name of its file."""
    logs = {Path(Path(result).stem): kept_lines(Path(result)) for result in results}
    kept = [r for result in results for r in json.loads(Path(result).read_text())["results"]]
    picture(logs, kept, Path(path), Path(path).suffix[1:])


if __name__ == "__main__":
    main(*sys.argv[1:])
