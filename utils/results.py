"""Finished runs -> the results table, in markdown and CSV, and the figure.

    python -m utils.results results/                                    # prints the table
    python -m utils.results results/ --csv results.csv --figure results.png
    python -m utils.results results/ --update README.md                 # the part between the two results markers
    python -m utils.results results/ --collect runs/market_arcface_s0   # keep a finished run's numbers in results/runs

A folder is searched for runs/*.json, *.json and */result.json, in this order: the first kind found is read, so that a
folder of run folders works, too. Runs are grouped by data set and setting (recipe, backbone, image size, epochs, ...);
within a group a row is a loss, and its runs may differ in nothing but the seed.

Statistics, over seeds: mean and 95 % interval (Student's t); every other loss against the one with the highest mean
mAP by a paired t-test over their common seeds, the p values corrected for the number of comparisons by Holm (1979).
"""

import argparse
import csv
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.files import write_atomically, write_text
from utils.recipes import command_line

# Rank-1 and mAP in percent of the published comparison: one run per cell. Also the order of the rows.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "softmax": {"market": (82.3, 64.6), "duke": (72.6, 54.9)},
    "triplet": {"market": (77.9, 59.2), "duke": (70.4, 52.6)},
    "softmax+triplet": {"market": (83.7, 66.8), "duke": (75.1, 57.3)},
    "softmax+center": {"market": (84.2, 66.1), "duke": (73.3, 55.9)},
    "npair": {"market": (79.8, 62.2), "duke": (75.0, 57.2)},
    "histogram": {"market": (75.9, 59.6), "duke": (68.3, 50.1)},
    "focal": {"market": (82.8, 64.2), "duke": (72.8, 54.1)},
    "multi_similarity": {"market": (72.8, 55.9), "duke": (66.0, 47.3)},
    "sphereface_m1": {"market": (85.6, 69.2), "duke": (75.6, 58.1)},
    "sphereface": {"market": (86.2, 70.0), "duke": (76.0, 58.1)},
    "cosface": {"market": (84.9, 65.1), "duke": (75.0, 54.7)},
    "arcface": {"market": (85.1, 65.0), "duke": (75.2, 54.3)},
}
NAMES = {"market": "Market-1501", "duke": "DukeMTMC-reID"}
NOT_RUN = "not run"
BEGIN, END = "<!-- results -->", "<!-- end -->"
LEVEL = 0.05  # of the tests; the intervals are those of 1 - LEVEL

# What may differ between runs of one experiment, and what belongs to one machine: neither is part of a setting.
SAME_EXPERIMENT = {"seed", "workers", "cache", "device", "eval_every", "compile", "deterministic"}
LOCAL = {"data_dir", "run_dir", "val_pids"}

# Without a finished run to go by, a training is assumed to take this long.
ASSUMED_QUICK = (180, "3 minutes a run, for resnet18 at 128x64 on two CPU cores")
ASSUMED = (1200, "20 minutes a run, for resnet50 at 256x128 on a recent GPU; without a GPU it is about a day")


# ------------------------------------------------------------------------------------------------------- files to runs


def compact(result: dict) -> dict:
    """A result.json without what belongs to one machine, and with the log in short; of a compact one, the same again.

    Keeps metrics, row, all flags ("explicit" and "environment" among them) and per epoch the loss and, where the run
    was scored, rank1 and mAP. `seconds` is the time of all training epochs, without decoding and scoring.
    """

    def portable(flags: dict) -> dict:
        flags = {key: value for key, value in flags.items() if key not in LOCAL}
        if "weights" in flags:  # a file: its name without the way to it
            flags["weights"] = flags["weights"].replace("\\", "/").rpartition("/")[2]
        return flags

    args = portable(result["args"])
    args["explicit"] = portable(args["explicit"])
    seconds = result["seconds"] if "seconds" in result else round(sum(line["seconds"] for line in result["log"]), 1)
    log = []
    for line in result["log"]:
        scores = {key: round(line[key], 4) for key in ("rank1", "mAP") if key in line}
        log.append({"epoch": line["epoch"], "loss": float(f"{line['loss']:.5g}"), **scores})
    metrics = {key: value for key, value in result.items() if key not in ("row", "seconds", "args", "log")}
    return {**metrics, "row": result["row"], "seconds": seconds, "args": args, "log": log}


def read_run(path: Path) -> dict:
    """A finished run's JSON in its compact form. ValueError, in one sentence, if it is none."""
    try:
        result = json.loads(path.read_text())
        run = compact(result)
        missing = [key for key in ("rank1", "mAP") if not isinstance(result.get(key), float)]
        if missing:
            raise KeyError(missing[0])
        for key in ("dataset", "recipe", "seed", "arch", "weights", "height", "width", "epochs", "amp"):
            run["args"][key]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): remove it and collect the run again") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the result of a finished run ({error!r}): remove it") from None
    return run


def collect(run_dir: Path, folder: Path) -> Path:
    """Writes folder/runs/NAME.json, the compact form of run_dir/result.json (NAME: the run folder's name)."""
    if not (run_dir / "result.json").is_file():
        raise FileNotFoundError(f"{run_dir} has no result.json: only a finished run can be collected")
    run = read_run(run_dir / "result.json")
    path = folder / "runs" / f"{run_dir.resolve().name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in run.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")  # whole: experiments.sh takes it for a finished run
    return path


def find_runs(folder: Path) -> list[Path]:
    for pattern in ("runs/*.json", "*.json", "*/result.json"):
        paths = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
        if paths:
            return paths
    return []


def load_groups(folder: Path) -> dict[str, dict[str, dict[int, dict]]]:
    """Setting -> row -> seed -> run, for all runs of a folder. ValueError if runs of one cell are not alike."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: pass the one that holds runs/*.json")
    paths = find_runs(folder)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no runs (runs/*.json): train some with experiments.sh first")
    groups, sources = {}, {}
    for path in paths:
        run = read_run(path)
        setting, row, seed = describe(run["args"]), run["row"], run["args"]["seed"]
        cell = groups.setdefault(setting, {}).setdefault(row, {})
        if seed in cell:
            print(f"{path} is left out: the same run as {sources[setting, row, seed]}", file=sys.stderr)
            continue
        for other_seed, other in cell.items():
            different = differing(run["args"], other["args"])
            if different:
                raise ValueError(
                    f"{path} and {sources[setting, row, other_seed]} belong to one row, but differ in "
                    f"{', '.join(different)}: remove those of the older setting, or give the flags explicitly"
                )
        cell[seed], sources[setting, row, seed] = run, path
    return dict(sorted(groups.items(), key=lambda group: order_of(group[1])))


def differing(args: dict, other: dict) -> list[str]:
    """Names of the flags in which two runs of one row differ but should not."""
    ignored = SAME_EXPERIMENT | LOCAL | {"explicit", "environment"}
    return sorted(key for key in args.keys() & other.keys() - ignored if args[key] != other[key])


def describe(args: dict) -> str:
    """The setting of a run in words: all that its rows have in common. Recipes may set other values for each row."""
    explicit = {key: value for key, value in args["explicit"].items() if key not in SAME_EXPERIMENT | LOCAL}
    people = args.get("synthetic_ids")
    words = [NAMES.get(args["dataset"], args["dataset"])]
    words += [f"{people} + {people} people"] if args["dataset"] == "synthetic" else []
    words += ["scored on held-out training identities"] if args.get("eval_on") == "val" else []
    words += [f"{args['recipe']} recipe", args["arch"]]
    words += [{"none": "from scratch", "imagenet": "ImageNet weights"}.get(args["weights"], args["weights"])]
    words += [f"{args['height']}x{args['width']}", f"{args['epochs']} epochs"]
    words += ["bfloat16"] if args["amp"] else []
    if "*" in explicit.pop("loss", ""):
        words.append(f"--loss {args['explicit']['loss']}")
    said = {"dataset", "synthetic_ids", "eval_on", "recipe", "arch", "weights", "height", "width", "epochs", "amp"}
    words += [command_line({key: explicit[key]}) for key in sorted(explicit.keys() - said)]
    return ", ".join(word for word in words if word)


def order_of(rows: dict[str, dict[int, dict]]) -> tuple:
    """Sort key of a group: data sets that people know first, then the recipe that compares, then the plain settings."""
    args = next(iter(next(iter(rows.values())).values()))["args"]
    datasets = [*NAMES, args["dataset"]]
    return datasets.index(args["dataset"]), args["recipe"] != "controlled", len(describe(args)), describe(args)


# ---------------------------------------------------------------------------------------------------------- statistics


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % interval: t(0.975, n - 1) s / sqrt(n); None for a single value."""
    from scipy.special import stdtrit  # imported late: the shell script asks this file quick questions

    if len(values) < 2:
        return values[0], None
    quantile = float(stdtrit(len(values) - 1, 1 - LEVEL / 2))
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p value of the paired t-test, for at least two pairs."""
    from scipy.special import stdtr

    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * float(stdtr(len(differences) - 1, -abs(mean) / (spread / math.sqrt(len(differences)))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values: the i-th smallest of m times m - i + 1, at most 1, never below the one before it."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def summarise(rows: dict[str, dict[int, dict]]) -> list[dict]:
    """One dict per loss, in the order of the table: means, intervals (fractions), n, and the test against the best.

    `p` is None for the best itself and where fewer than two seeds are common to both; `higher`: over the common seeds,
    its mean is above that of the best. A loss with one seed can't be the best while another has more.
    """
    order = [row for row in PUBLISHED if row in rows] + sorted(row for row in rows if row not in PUBLISHED)
    scores = {row: {seed: run["mAP"] for seed, run in rows[row].items()} for row in order}
    candidates = [row for row in order if len(rows[row]) > 1] or order
    best = max(candidates, key=lambda row: statistics.fmean(scores[row].values()))
    p_values, higher = {}, set()
    for row in order:
        common = sorted(scores[row].keys() & scores[best].keys())
        if row != best and len(common) > 1:
            pair = [[scores[name][seed] for seed in common] for name in (best, row)]
            p_values[row] = paired_p(*pair)
            if statistics.fmean(pair[1]) > statistics.fmean(pair[0]):  # possible where the rows have other seeds
                higher.add(row)
    p_values = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    summary = []
    for row in order:
        runs = [rows[row][seed] for seed in sorted(rows[row])]
        summary.append(
            {
                "row": row,
                "runs": runs,
                "seeds": sorted(rows[row]),
                "rank1": interval([run["rank1"] for run in runs]),
                "mAP": interval([run["mAP"] for run in runs]),
                "seconds": statistics.fmean(run["seconds"] for run in runs),
                "best": row == best,
                "p": p_values.get(row),
                "higher": row in higher,
                "comparisons": len(p_values),
            }
        )
    return summary


# ----------------------------------------------------------------------------------------------------- markdown and CSV


def command(run: dict) -> str:
    """The command of a run, as someone else would type it."""
    explicit = {key: value for key, value in run["args"]["explicit"].items() if key not in LOCAL}
    first = {key: explicit.pop(key) for key in ("loss", "dataset") if key in explicit}
    seed = {"seed": explicit.pop("seed", run["args"]["seed"])}
    for key in ("workers", "cache", "device", "eval_every"):
        explicit.pop(key, None)
    return f"python train.py {command_line({**first, **explicit, **seed})}"


def percent(mean: float, half: float | None) -> str:
    return f"{100 * mean:.1f}" if half is None else f"{100 * mean:.1f} ± {100 * half:.1f}"


def duration(seconds: float) -> str:
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60)):
        if seconds < limit:
            return f"{seconds / size:.0f} s" if unit == "s" else f"{seconds / size:.1f} min"
    return f"{seconds / 3600:.1f} h"


def seed_list(seeds: Sequence[int]) -> str:
    """[0, 1, 2] -> 0-2; [0, 1, 5] -> 0, 1, 5."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}-{seeds[-1]}"
    return ", ".join(map(str, seeds))


def verdict(entry: dict) -> str:
    if entry["best"]:
        return "best"
    if entry["p"] is None:
        return "no test"
    p = "p < 0.001" if entry["p"] < 0.001 else f"p = {entry['p']:.3f}"
    if entry["p"] >= LEVEL:
        return f"= best, {p}"
    return f"higher on common seeds, {p}" if entry["higher"] else f"lower, {p}"


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    from tabulate import tabulate

    return tabulate(lines, header, tablefmt="pipe", disable_numparse=True)


def markdown_group(setting: str, rows: dict[str, dict[int, dict]]) -> str:
    """Heading, table and caption of one group; for Market and Duke with all twelve rows and the published numbers."""
    summary = summarise(rows)
    comparisons = summary[0]["comparisons"]
    dataset = summary[0]["runs"][0]["args"]["dataset"]
    published = dataset in NAMES
    header = ["loss", "rank-1", "mAP", "n (seeds)", "training time"]
    header += ["mAP against the best"] if comparisons else []
    header += ["published rank-1", "published mAP"] if published else []
    entries = {entry["row"]: entry for entry in summary}
    lines = []
    for row in dict.fromkeys([*PUBLISHED, *entries] if published else entries):
        entry = entries.get(row)
        line = [row]
        if entry:
            n = f"{len(entry['seeds'])} ({seed_list(entry['seeds'])})"
            line += [percent(*entry["rank1"]), percent(*entry["mAP"]), n, duration(entry["seconds"])]
            line += [verdict(entry)] if comparisons else []
        else:
            line += [NOT_RUN] * (len(header) - (3 if published else 1))
        if published:
            line += [f"{value:.1f}" for value in PUBLISHED[row][dataset]] if row in PUBLISHED else ["", ""]
        lines.append([*line, f"`{command(entry['runs'][0])}`" if entry else ""])
    devices = dict.fromkeys(device_of(run) for entry in summary for run in entry["runs"])
    caption = f"Trained on {'; '.join(devices)}."
    if comparisons:
        caption += f" Tests: {comparisons} comparisons with {next(e['row'] for e in summary if e['best'])}."
    if any(len(entry["seeds"]) == 1 for entry in summary):
        caption += " A row with n = 1 has neither an interval nor a test: it says nothing about differences."
    return f"**{setting}**\n\n{markdown_table([*header, 'command'], lines)}\n\n{caption}\n"


def device_of(run: dict) -> str:
    environment = run["args"].get("environment", {})
    threads = environment.get("threads")
    words = [environment.get("device", "an unknown device")]
    words += [f"{threads} thread{'s' if threads != 1 else ''}"] if threads and words[0].startswith("cpu") else []
    return ", ".join([*words, f"torch {environment['torch']}"] if "torch" in environment else words)


def markdown_not_run(datasets: Sequence[str]) -> str:
    """One table for all data sets without any run: the published numbers beside cells that say so."""
    header, lines = ["loss"], [[row] for row in PUBLISHED]
    for dataset in datasets:
        name = NAMES[dataset]
        header += [f"{name} rank-1", f"{name} mAP", f"{name} published rank-1", f"{name} published mAP"]
        for line in lines:
            line += [NOT_RUN, NOT_RUN, *(f"{value:.1f}" for value in PUBLISHED[line[0]][dataset])]
    caption = f"To run them: `DATASETS=\"{' '.join(datasets)}\" bash experiments.sh`."
    return f"**{' and '.join(NAMES[d] for d in datasets)}**\n\n{markdown_table(header, lines)}\n\n{caption}\n"


def markdown(groups: dict[str, dict[str, dict[int, dict]]]) -> str:
    """All tables, the captions that hold for all of them last."""
    parts = [markdown_group(setting, rows) for setting, rows in groups.items()]
    run = {next(iter(next(iter(rows.values())).values()))["args"]["dataset"] for rows in groups.values()}
    missing = [dataset for dataset in NAMES if dataset not in run]
    parts += [markdown_not_run(missing)] if missing else []
    parts.append(
        "Percent; mean ± half of the 95 % interval over n seeds (Student's t). Training time: mean of the training "
        "epochs of a run, without decoding and scoring. The commands are those of the first seed. Against the best: "
        "paired t-test of mAP over common seeds, Holm-corrected; = best: not distinguishable at 5 %. "
        "Published: one run per cell, other settings for some rows.\n"
    )
    return "\n".join(parts)


def write_csv(groups: dict[str, dict[str, dict[int, dict]]], path: Path) -> None:
    """A line per setting and loss; scores in percent, times in seconds, empty where there is no number."""

    def cell(value: float | None, factor: float = 1) -> str:
        return "" if value is None else f"{value * factor:.6g}"

    header = ["dataset", "setting", "loss", "n", "seeds", "rank1", "rank1_half_interval", "mAP", "mAP_half_interval"]
    header += ["training_seconds", "best", "p_against_best_holm", "comparisons", "published_rank1", "published_mAP"]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*header, "command"])
    for setting, rows in groups.items():
        for entry in summarise(rows):
            run = entry["runs"][0]
            dataset = run["args"]["dataset"]
            line = [dataset, setting, entry["row"], len(entry["seeds"]), " ".join(map(str, entry["seeds"]))]
            line += [cell(value, 100) for value in (*entry["rank1"], *entry["mAP"])]
            line += [cell(entry["seconds"]), int(entry["best"]), cell(entry["p"]), entry["comparisons"]]
            line += [cell(v) for v in PUBLISHED.get(entry["row"], {}).get(dataset, (None, None))]
            writer.writerow([*line, command(run)])
    write_text(path, text.getvalue())


def update(readme: Path, text: str) -> None:
    """Replaces what stands between the two markers of a markdown file."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no {BEGIN} followed by {END}: put these two lines where the table belongs")
    write_text(readme, f"{before}{BEGIN}\n{text}{END}{after}")


# -------------------------------------------------------------------------------------------------------------- figure


def draw(groups: dict[str, dict[str, dict[int, dict]]], path: Path) -> None:
    """For each group three panels: mAP with its interval, loss over epochs, mAP over epochs (means over seeds).

    The curve of mAP is that of the runs that were scored on the way (--eval-every), if there are any.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--figure needs matplotlib, which nothing else does: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(groups), 3, figsize=(15, 5 * len(groups)), squeeze=False, layout="constrained")
    for (setting, rows), (scores, losses, curves) in zip(groups.items(), axes, strict=True):
        summary, shown = summarise(rows), set()  # seeds whose mAP is drawn over the epochs
        colours = dict(zip(dict.fromkeys([*PUBLISHED, *rows]), matplotlib.colormaps["tab20"].colors * 2, strict=False))
        for place, entry in enumerate(summary):
            row, (mean, half) = entry["row"], entry["mAP"]
            scores.errorbar(100 * mean, place, xerr=100 * (half or 0), fmt="o", capsize=3, color=colours[row])
            for axis, key in ((losses, "loss"), (curves, "mAP")):
                lines = {}  # epoch -> values of the seeds
                scored = [run for run in entry["runs"] if any("mAP" in line for line in run["log"])]
                drawn = scored if key == "mAP" and scored else entry["runs"]
                shown |= {run["args"]["seed"] for run in drawn} if key == "mAP" else set()
                for run in drawn:
                    last = [{"epoch": run["args"]["epochs"], "mAP": run["mAP"]}] if key == "mAP" else []
                    for line in [*run["log"], *last]:
                        if key in line:
                            lines.setdefault(line["epoch"], []).append(line[key])
                epochs = sorted(epoch for epoch, values in lines.items() if len(values) == len(drawn))
                values = [statistics.fmean(lines[epoch]) for epoch in epochs]
                if key == "loss" and values and values[0] > 0:
                    values = [value / values[0] for value in values]
                if key == "mAP":
                    values = [100 * value for value in values]
                style = "--" if list(colours).index(row) % 2 else "-"  # colours come in pairs of dark and pale
                axis.plot(epochs, values, style, marker="." if key == "mAP" else "", color=colours[row], label=row)
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
        curves.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        scores.set_title(setting, fontsize="medium", loc="left")
    kind = path.suffix[1:] or "png"
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format=kind))
    pyplot.close(figure)


# -------------------------------------------------------------------------------------------------------- command line


def estimate(names: Sequence[str], folder: Path) -> str:
    """How long the runs of these names (DATASET_LOSS_sSEED[_VARIANT]) will train, and what that is based on."""

    def parts(name: str) -> tuple[str, ...]:  # data set, loss, variant
        match = re.fullmatch(r"([^_]+)_(.+?)_s\d+(?:_(.*))?", name)
        return tuple(part or "" for part in match.groups()) if match else (name, "", "")

    finished: dict[tuple[str, str], dict[str, list[float]]] = {}
    for path in (folder / "runs").glob("*.json"):
        dataset, loss, variant = parts(path.stem)
        finished.setdefault((dataset, variant), {}).setdefault(loss, []).append(read_run(path)["seconds"])
    total, known, assumed = 0.0, 0, {}
    for name in names:
        dataset, loss, variant = parts(name)
        losses = finished.get((dataset, variant))
        if losses:
            total += statistics.fmean(losses.get(loss) or sum(losses.values(), []))
            known += 1
        else:
            seconds, reason = ASSUMED_QUICK if variant.startswith("quick") else ASSUMED
            total += seconds
            assumed[reason] = assumed.get(reason, 0) + 1
    reasons = [f"{known} by finished runs of the same setting"] if known else []
    reasons += [f"{count} by assumption: {reason}" for reason, count in assumed.items()]
    return f"{len(names)} runs, about {duration(total)} of training, decoding and scoring aside ({'; '.join(reasons)})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with runs/*.json (results/)")
    # output; the table is printed unless it is written to a file
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--csv", type=Path, help="write the numbers to this file")
    parser.add_argument("--figure", type=Path, help="draw mAP, loss and mAP over epochs into this file (matplotlib)")
    parser.add_argument("--update", type=Path, help=f"put the tables between {BEGIN} and {END} of this file")
    # for experiments.sh
    parser.add_argument("--collect", type=Path, nargs="+", help="copy these run folders' results to FOLDER/runs")
    parser.add_argument("--estimate", nargs="+", metavar="NAME", help="print how long runs of these names will take")
    args = parser.parse_args(argv)
    if args.collect:
        for run_dir in args.collect:
            print(collect(run_dir, args.folder))
        return
    if args.estimate:
        print(estimate(args.estimate, args.folder))
        return
    groups = load_groups(args.folder)
    if args.csv:
        write_csv(groups, args.csv)
    if args.figure:
        draw(groups, args.figure)
    if args.markdown:
        write_text(args.markdown, markdown(groups))
    if args.update:
        update(args.update, markdown(groups))
    if not (args.csv or args.figure or args.markdown or args.update):
        print(markdown(groups))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"results: {error}")
