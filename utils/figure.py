"""Draws a folder of finished runs: for each setting mAP with its interval, loss over epochs, mAP over epochs.

    python -m utils.figure results --out results/comparison.png          # needs matplotlib
"""

import argparse
import statistics
import sys
from pathlib import Path

from losses import ROWS
from utils.errors import UserError
from utils.files import write_atomically
from utils.results import summarise
from utils.runs import Groups, load_groups


def draw(groups: Groups, path: Path) -> None:
    """Three panels for each group. The curve of mAP is that of the runs scored on the way (--eval-every), if any."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the figure needs matplotlib, which nothing else does: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    size = (15, 4.5 * len(groups))
    figure, axes = pyplot.subplots(len(groups), 3, figsize=size, squeeze=False, layout="constrained")
    for (setting, rows), (scores, losses, curves) in zip(groups.items(), axes, strict=True):
        summary, shown = summarise(rows), set()  # seeds whose mAP is drawn over the epochs
        colours = dict(zip(dict.fromkeys([*ROWS, *rows]), matplotlib.colormaps["tab20"].colors * 2, strict=False))
        for place, entry in enumerate(summary):
            row, (mean, half) = entry["row"], entry["mAP"]
            style = "--" if list(colours).index(row) % 2 else "-"  # colours come in pairs of dark and pale
            scores.errorbar(100 * mean, place, xerr=100 * (half or 0), fmt="o", capsize=3, color=colours[row])
            epochs, values = mean_curve(entry["runs"], "loss")
            first = values[0] if values else 0
            losses.plot(epochs, [value / first if first > 0 else value for value in values], style, color=colours[row])
            scored = [run for run in entry["runs"] if any("mAP" in line for line in run["log"])] or entry["runs"]
            shown |= {run["args"]["seed"] for run in scored}
            epochs, values = mean_curve(scored, "mAP")
            curves.plot(epochs, [100 * v for v in values], style, marker=".", color=colours[row], label=row)
        scores.set_yticks(range(len(summary)), [f"{e['row']} (n = {len(e['seeds'])})" for e in summary])
        scores.invert_yaxis()
        scores.set_xlabel("mAP, % (bar: 95 % interval over n seeds)")
        losses.set_ylabel("training loss / that of the first epoch")
        curves.set_ylabel(f"mAP, % (seed{'s' * (len(shown) > 1)} {', '.join(map(str, sorted(shown)))})")
        for axis in (losses, curves):
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
        for axis in (scores, losses, curves):
            axis.grid(alpha=0.3)
        curves.set_xlim(losses.get_xlim())
        legend = curves.get_legend_handles_labels()
        on_the_way = any("mAP" in line for entry in summary for run in entry["runs"] for line in run["log"])
        if not on_the_way:  # points at the last epoch are no curves: the legend takes their room
            curves.clear()
            curves.set_axis_off()
        curves.legend(*legend, fontsize="small", loc="center left", bbox_to_anchor=(1 if on_the_way else 0, 0.5))
        scores.set_title(setting, fontsize="medium", loc="left")
    kind = path.suffix[1:] or "png"
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format=kind))
    pyplot.close(figure)


def mean_curve(runs: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Epochs that every run has a value of, and the means over the runs; of mAP the last value is the final score."""
    values: dict[int, list[float]] = {}
    for run in runs:
        final = [{"epoch": run["args"]["epochs"], "mAP": run["mAP"]}] if key == "mAP" else []
        for line in [*run["log"], *final]:
            if key in line:
                values.setdefault(line["epoch"], []).append(line[key])
    epochs = sorted(epoch for epoch, found in values.items() if len(found) == len(runs))
    return epochs, [statistics.fmean(values[epoch]) for epoch in epochs]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="folder with runs (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="default: comparison.png")
    args = parser.parse_args(argv)
    draw(load_groups(args.folder), args.out)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"figure: {error}")
