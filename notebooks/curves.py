"""Dev accuracy over the updates of one or several runs, as a picture. Reads a run's JSON alone."""

import json
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

# loop -> run -> update -> the accuracies of all seeds
Panels = dict[str, dict[Path, dict[int, list[float]]]]


def read_curves(runs: list[Path]) -> Panels:
    """What metrics.jsonl of each run says about dev. A torn last line is left out."""
    panels: Panels = {}
    for run in runs:
        for text in (run / "metrics.jsonl").read_text().splitlines():
            if not text.endswith("}"):
                continue
            m = json.loads(text)
            if "dev_greedy" in m:
                curve = panels.setdefault(m["loop"], {}).setdefault(run, {})
                curve.setdefault(m["step"], []).append(m["dev_greedy"])
    return panels


def draw_levels(axes, results: list[dict]) -> None:
    """Dashed lines at chance, base, start and ceiling, with their names at the right."""
    for name in ("chance", "base", "start", "ceiling"):
        if results and name in results[0]:
            level = mean(r[name] for r in results)
            axes.axhline(level, color="0.5", lw=0.8, ls="--")
            axes.text(
                0.98,
                level,
                name,
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="top" if name == "start" else "bottom",
                color="0.4",
            )


def picture(runs: list[Path], path: Path) -> None:
    """A panel for each loop: the mean over seeds in a band that holds them all."""
    panels = read_curves(runs)
    results = []
    if len(runs) == 1 and (runs[0] / "summary.json").exists():
        results = json.loads((runs[0] / "summary.json").read_text())["results"]
    columns = min(3, len(panels)) or 1
    rows = -(-len(panels) // 3) or 1
    figure = Figure(figsize=(1 + 3 * columns, 0.6 + 2.4 * rows), layout="tight")
    flat = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (loop, curves) in zip(flat, panels.items(), strict=False):
        for i, (run, curve) in enumerate(curves.items()):
            seeds = max(len(ys) for ys in curve.values())
            x = [u for u, ys in curve.items() if len(ys) == seeds]  # all seeds came so far
            low, middle, high = ([f(curve[u]) for u in x] for f in (min, mean, max))
            axes.fill_between(x, low, high, color=f"C{i}", alpha=0.25, lw=0)
            axes.plot(x, middle, color=f"C{i}", lw=2, label=run)
        draw_levels(axes, [r for r in results if r["loop"] == loop])
        axes.set(title=loop, xlabel="update", ylabel="greedy accuracy (dev)", ylim=(0, 1.12))
        # One run needs no name.
        axes.legend(frameon=False, loc="lower right").set_visible(len(runs) > 1)
    figure.savefig(path, format="png", dpi=150)
