"""Draws finished runs: the mAP of each loss with its interval, by kind of loss.

    python -m utils.figure results --out results/comparison.png    # of the first setting with several seeds
    python -m utils.figure results --all --out all.png              # of every setting with several seeds
    python -m utils.figure results --curves --out curves.png        # instead: training losses, a line for each seed

Needs matplotlib.
"""

import argparse
import itertools
import math
import textwrap
from pathlib import Path

from losses import ROWS
from utils.errors import UserError, script, user_input
from utils.files import write_atomically
from utils.results import summarise, verdict
from utils.runs import Groups, load_groups

# name and colour of a kind; colours of Okabe and Ito, told apart with any colour vision
KINDS = {
    "classifier": ("classifiers", "#0072B2"),
    "pairs": ("pairs", "#D55E00"),
    "proxies": ("proxies", "#009E73"),
    "ranking": ("ranking", "#CC79A7"),
    "other": ("others", "#666666"),
}
COLUMNS = 5  # of the small panels


def kind_of(loss: str) -> str:
    return ROWS[loss].kind if loss in ROWS else "other"


def several_seeds(groups: Groups) -> Groups:
    """The settings in which some loss has more than one seed; all of them if none has."""
    found = {setting: rows for setting, rows in groups.items() if max(map(len, rows.values())) > 1}
    return found or groups


def new_figure(width: float, height: float):
    """An empty one, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the figure needs matplotlib, which nothing else does: pip install matplotlib") from None
    return Figure((width, height), layout="constrained")


def draw_scores(groups: Groups):
    """A panel for each setting: losses by kind, the highest mean of a kind first."""
    summaries = [summarise(rows) for rows in groups.values()]
    places = [len(summary) + len({kind_of(entry["row"]) for entry in summary}) for summary in summaries]
    heights = [0.24 * count + 1.1 for count in places]
    figure = new_figure(8, sum(heights))
    axes = figure.subplots(len(groups), squeeze=False, height_ratios=heights)
    for setting, summary, axis in zip(groups, summaries, axes[:, 0], strict=True):
        labels = []  # (text, colour, weight) of each place from the top
        for kind, (title, colour) in KINDS.items():
            entries = [entry for entry in summary if kind_of(entry["row"]) == kind]
            labels += [(title, colour, "bold")] if entries else []
            for entry in sorted(entries, key=lambda entry: -entry["mAP"][0]):
                mean, half = entry["mAP"]
                face = "white" if verdict(entry).startswith("lower") else colour
                axis.errorbar(100 * mean, len(labels), xerr=100 * (half or 0), fmt="o", capsize=3, color=colour,
                              markerfacecolor=face, label=entry["row"])  # fmt: skip
                axis.annotate(f"{100 * mean:.1f}", (100 * (mean + (half or 0)), len(labels)), (6, 0), va="center",
                              textcoords="offset points", fontsize="small")  # fmt: skip
                labels.append((f"{entry['row']} (n = {len(entry['seeds'])})", "black", "normal"))
        axis.set_yticks(range(len(labels)), [text for text, _, _ in labels])
        for tick, (_, colour, weight) in zip(axis.get_yticklabels(), labels, strict=True):
            tick.set(color=colour, weight=weight)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_xlim(0, 1.08 * axis.get_xlim()[1])  # room for the numbers
        axis.tick_params("y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(textwrap.fill(str(setting), 75), fontsize="medium", loc="left")
        note = "mAP in percent: mean over n seeds, 95 % interval"
        if any(entry["comparisons"] for entry in summary):
            best = next(entry["row"] for entry in summary if entry["best"])
            note += f"\nhollow: lower than {best} by the paired test; filled: not shown to be lower"
        axis.set_xlabel(note)
    return figure


def draw_curves(groups: Groups):
    """A small panel for each setting and loss: the mean training loss of each epoch, a line for each seed."""
    heights = [math.ceil(len(rows) / COLUMNS) for rows in groups.values()]
    figure = new_figure(2.2 * COLUMNS, 1.8 * sum(heights))
    parts = figure.subfigures(len(groups), squeeze=False, height_ratios=heights)[:, 0]
    for part, height, (setting, rows) in zip(parts, heights, groups.items(), strict=True):
        part.suptitle(f"Training loss over the epochs: {setting}", fontsize="medium")
        axes = part.subplots(height, COLUMNS, squeeze=False).flat
        for axis, entry in itertools.zip_longest(axes, summarise(rows)):
            if entry is None:
                axis.set_axis_off()
                continue
            for run in entry["runs"]:
                epochs, losses = ([line[key] for line in run["log"]] for key in ("epoch", "loss"))
                axis.plot(epochs, losses, color=KINDS[kind_of(entry["row"])][1], alpha=0.7)
            axis.set_title(entry["row"], fontsize="small")
            axis.tick_params(labelsize="x-small")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_ylim(bottom=min([0, *(line["loss"] for run in entry["runs"] for line in run["log"])]))
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="folder with runs (default: runs)")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="default: comparison.png")
    parser.add_argument("--all", action="store_true", help="not only the first setting that has more than one seed")
    parser.add_argument("--curves", action="store_true", help="training losses over the epochs instead")
    args = parser.parse_args(argv)
    groups = several_seeds(load_groups(args.folder))
    groups = groups if args.all else dict(list(groups.items())[:1])
    figure = (draw_curves if args.curves else draw_scores)(groups)
    with user_input():  # a format that matplotlib can't write
        write_atomically(args.out, lambda file: figure.savefig(file, dpi=120, format=args.out.suffix[1:] or "png"))


if __name__ == "__main__":
    script("figure", main)
