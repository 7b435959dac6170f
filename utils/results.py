"""Finished runs -> the results table, in markdown and CSV.

    python -m utils.results                                 # your own runs, in runs/
    python -m utils.results results                         # those of this repository
    python -m utils.results results --csv results.csv --update results/README.md
    python -m utils.results results --short --update README.md
    python -m utils.results --collect runs/market_arcface_s0 --into results      # keep a finished run's numbers there

A folder holds run folders (*/result.json) or collected runs (runs/*.json). Runs are grouped by setting: data set,
recipe and every flag that differs from what the recipe gives the loss, however it was given. In a group a row is a
loss, and its runs differ in the seed only.

Statistics, over seeds: mean and 95 % interval (Student's t); the published losses against the one of them with the
highest mean mAP by a paired t-test over common seeds, the p values corrected for the number of comparisons by Holm; the
later losses against the same one, with a correction of their own.
"""

import argparse
import csv
import io
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from losses import ROWS, row_name
from utils.errors import UserError
from utils.files import load_json, write_text
from utils.flags import DEFAULTS, FREE, command_line, new_run
from utils.statistics import LEVEL, holm, interval, paired_p

# Rank-1 and mAP in percent of "Person re-identification based on deep metric learning": one run per cell.
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
LOCAL = ("data_dir", "run_dir", "val_pids", "notes")  # what belongs to one machine: never collected

Groups = dict[str, dict[str, dict[int, dict]]]  # setting -> row -> seed -> run


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
    """A finished run's JSON in its compact form, flags that it lacks with their defaults. UserError if it is none."""
    try:
        run = compact(json.loads(path.read_text(encoding="utf-8")))
        run["args"] = {**DEFAULTS, **run["args"]}
        if not all(isinstance(run.get(key), float) for key in ("rank1", "mAP")):
            raise KeyError("rank1 or mAP")
        row_name(run["args"]["loss"])
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as a run ({error}): remove it, or collect the run again") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the result of a finished run ({error!r}): remove it") from None
    return run


def collect(run_dir: Path, folder: Path) -> Path:
    """Writes folder/runs/NAME.json, the compact form of run_dir/result.json (NAME: the run folder's name)."""
    if not (run_dir / "result.json").is_file():
        raise UserError(f"{run_dir} has no result.json: only a finished run can be collected")
    read_run(run_dir / "result.json")  # is it one?
    run = compact(load_json(run_dir / "result.json"))
    path = folder / "runs" / f"{run_dir.resolve().name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in run.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def load_groups(folder: Path) -> Groups:
    """All runs of a folder. Of two that agree in every flag one is left out, and said on stderr."""
    paths = sorted(folder.glob("runs/*.json")) or sorted(folder.glob("*/result.json"))
    if not paths:
        raise UserError(f"{folder} holds no finished runs (*/result.json or runs/*.json): train some first")
    groups: Groups = {}
    sources = {}
    for path in paths:
        run = read_run(path)
        setting, row, seed = describe(run["args"]), run["row"], run["args"]["seed"]
        cell = groups.setdefault(setting, {}).setdefault(row, {})
        if seed in cell:
            print(f"{path} is left out: the same run as {sources[setting, row, seed]}", file=sys.stderr)
        else:
            cell[seed], sources[setting, row, seed] = run, path
    return dict(sorted(groups.items(), key=lambda group: order_of(group[1])))


def own_flags(args: dict) -> dict:
    """The flags of a run in which it differs from what its recipe gives this loss on this data set."""
    given = {"loss": row_name(args["loss"]), "dataset": args["dataset"], "recipe": args["recipe"]}
    plain = new_run(given)
    for key in DEFAULTS:  # in an order in which what follows from others (milestones from epochs, ...) comes after them
        if key not in (*FREE, "recipe", "seed") and args[key] != plain[key]:
            given[key] = args[key]
            plain = new_run(given)
    own = {key: value for key, value in given.items() if key not in ("loss", "dataset", "recipe")}
    if args["loss"] != plain["loss"]:
        own = {"loss": args["loss"], **own}
    explicit = args["explicit"].get("loss_args", [])
    by_steps = {key for key in plain["loss_args_by_steps"] if not any(pair.startswith(f"{key}=") for pair in explicit)}
    pairs = [pair for pair in args["loss_args"] if pair.partition("=")[0] not in by_steps]
    if sorted(pairs) != sorted(plain["loss_args"]):
        own["loss_args"] = [pair for pair in pairs if pair not in plain["loss_args"]] or ["other"]
    return own


def describe(args: dict) -> str:
    """The setting of a run in words: all that its rows have in common. Recipes may set other values for each row."""
    own, people = own_flags(args), args["synthetic_ids"]
    titles = {**NAMES, **args.get("titles", {})}  # what a copy was exactly: incomplete, say
    words = [" + ".join(titles.get(name, name) for name in args["dataset"].split("+"))]
    words += [f"{people} + {people} people"] if args["dataset"] == "synthetic" else []
    words += ["scored on held-out training identities"] if args["eval_on"] == "val" else []
    words += [f"{args['recipe']} recipe", args["arch"]]
    words += [{"none": "from scratch", "imagenet": "ImageNet weights"}.get(args["weights"], args["weights"])]
    words += [f"{args['height']}x{args['width']}", f"{args['epochs']} epochs"]
    words += ["bfloat16"] if args["amp"] else []
    said = {"synthetic_ids", "eval_on", "arch", "weights", "height", "width", "epochs", "amp"}
    words += [command_line({key: own[key]}) for key in own if key not in said]
    return ", ".join(words)


def order_of(rows: dict[str, dict[int, dict]]) -> tuple:
    """Sort key of a group: data sets that people know first, then the recipe that compares, then the plain settings."""
    args = next(iter(next(iter(rows.values())).values()))["args"]
    datasets = [*NAMES, args["dataset"]]
    return datasets.index(args["dataset"]), args["recipe"] != "controlled", len(describe(args)), describe(args)


# ------------------------------------------------------------------------------------------------------------- summary


def summarise(rows: dict[str, dict[int, dict]]) -> list[dict]:
    """One dict per loss, in the order of the table: means, intervals (fractions), n, and the test against the best.

    The best is the published loss with the highest mean; with one seed only if no other has more. `p` is None for the
    best itself and where fewer than two seeds are common to both; `higher`: over the common seeds, above the best.
    """
    order = [row for row in ROWS if row in rows] + sorted(row for row in rows if row not in ROWS)
    scores = {row: {seed: run["mAP"] for seed, run in rows[row].items()} for row in order}
    parts = {row: ROWS[row].part if row in ROWS else "other" for row in order}
    published = [row for row in order if parts[row] == "published"] or order
    candidates = [row for row in published if len(rows[row]) > 1] or published
    best = max(candidates, key=lambda row: statistics.fmean(scores[row].values()))
    p_values, higher, comparisons = {}, set(), {}
    for part in dict.fromkeys(parts.values()):
        found = {}
        for row in order:
            common = sorted(scores[row].keys() & scores[best].keys())
            if parts[row] == part and row != best and len(common) > 1:
                pair = [[scores[name][seed] for seed in common] for name in (best, row)]
                found[row] = paired_p(*pair)
                if statistics.fmean(pair[1]) > statistics.fmean(pair[0]):
                    higher.add(row)
        comparisons[part] = len(found)
        p_values |= dict(zip(found, holm(list(found.values())), strict=True))
    summary = []
    for row in order:
        runs = [rows[row][seed] for seed in sorted(rows[row])]
        summary.append(
            {
                "row": row,
                "part": parts[row],
                "runs": runs,
                "seeds": sorted(rows[row]),
                "rank1": interval([run["rank1"] for run in runs]),
                "mAP": interval([run["mAP"] for run in runs]),
                "seconds": statistics.fmean(run["seconds"] for run in runs),
                "best": row == best,
                "p": p_values.get(row),
                "higher": row in higher,
                "comparisons": comparisons[parts[row]],
            }
        )
    return summary


def verdict(entry: dict) -> str:
    """What the test against the best says, in words that claim no more."""
    if entry["best"]:
        return "highest mean"
    if entry["p"] is None:
        return "no test"
    p = "p < 0.001" if entry["p"] < 0.001 else f"p = {entry['p']:.3f}"
    if entry["p"] >= LEVEL:
        return f"not shown to be {'higher' if entry['higher'] else 'lower'}, {p}"
    return f"{'higher' if entry['higher'] else 'lower'}, {p}"


# ----------------------------------------------------------------------------------------------------- markdown and CSV


def command(args: dict, **changes) -> str:
    """The command of a run, as someone else would type it; changes: words in the place of flags (loss="LOSS")."""
    recipe = {"recipe": args["recipe"]} if args["recipe"] != DEFAULTS["recipe"] else {}
    flags = {"loss": row_name(args["loss"]), "dataset": args["dataset"], **recipe, **own_flags(args)}
    return f"python train.py {command_line({**flags, 'seed': args['seed'], **changes})}"


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


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    from tabulate import tabulate

    return tabulate(lines, header, tablefmt="pipe", disable_numparse=True)


def markdown_group(setting: str, rows: dict[str, dict[int, dict]]) -> str:
    """Heading, tables and caption of one group; for Market and Duke with all twelve rows and the published numbers."""
    summary = summarise(rows)
    args = summary[0]["runs"][0]["args"]
    dataset, tested = args["dataset"], any(entry["comparisons"] for entry in summary)
    published = dataset in NAMES and args.get("titles", NAMES)[dataset] == NAMES[dataset]  # a complete copy
    header = ["loss", "rank-1", "mAP", "n (seeds)", "training time"]
    header += ["mAP against the highest"] if tested else []
    header += ["published rank-1", "published mAP"] if published else []
    entries = {entry["row"]: entry for entry in summary}
    parts: dict[str, list[list[str]]] = {}
    for row in dict.fromkeys([*PUBLISHED, *entries] if published else entries):
        entry = entries.get(row)
        line = [row]
        if entry:
            n = f"{len(entry['seeds'])} ({seed_list(entry['seeds'])})"
            line += [percent(*entry["rank1"]), percent(*entry["mAP"]), n, duration(entry["seconds"])]
            line += [verdict(entry)] if tested else []
        else:
            line += [NOT_RUN] * (len(header) - 3)
        if published:
            line += [f"{value:.1f}" for value in PUBLISHED[row][dataset]] if row in PUBLISHED else ["", ""]
        parts.setdefault(ROWS[row].part if row in ROWS else "other", []).append(line)
    titles = {"published": "", "later": "Later losses:\n\n", "other": "Other losses:\n\n"}
    tables = [titles[part] + markdown_table(header, lines) for part, lines in parts.items()]
    devices = dict.fromkeys(device_of(run) for entry in summary for run in entry["runs"])
    caption = f"A row: `{command({**args, 'seed': 0}, loss='LOSS')}`. Trained on {'; '.join(devices)}."
    if tested:
        best = next(entry["row"] for entry in summary if entry["best"])
        counts = {entry["part"]: entry["comparisons"] for entry in summary}
        caption += f" Compared with {best}: " + ", ".join(f"{n} {part} losses" for part, n in counts.items()) + "."
    if any(len(entry["seeds"]) == 1 for entry in summary):
        caption += " A row with n = 1 has neither an interval nor a test: it says nothing about differences."
    return f"**{setting}**\n\n" + "\n\n".join([*tables, caption]) + "\n"


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
        header += [f"{name} rank-1", f"{name} mAP", "published rank-1", "published mAP"]
        for line in lines:
            line += [NOT_RUN, NOT_RUN, *(f"{value:.1f}" for value in PUBLISHED[line[0]][dataset])]
    caption = f"To run them: `DATASETS=\"{' '.join(datasets)}\" bash experiments.sh`."
    return f"**{' and '.join(NAMES[d] for d in datasets)}**\n\n{markdown_table(header, lines)}\n\n{caption}\n"


def markdown(groups: Groups) -> str:
    """All tables, the captions that hold for all of them last."""
    parts = [markdown_group(setting, rows) for setting, rows in groups.items()]
    missing = [dataset for dataset, name in NAMES.items() if not any(s.startswith(f"{name},") for s in groups)]
    parts += [markdown_not_run(missing)] if missing else []
    parts.append(
        "Percent; mean ± half of the 95 % interval over n seeds (Student's t). Training time: mean of the training "
        "epochs of a run, without decoding and scoring. Against the highest: paired t-test of mAP over common seeds, "
        "Holm-corrected, at 5 %; \"not shown to be lower\" is no proof of being equal. The highest of several means is "
        "chosen by the same seeds that it is tested with, so it tends to lie above its true value, and differences "
        "from it look a little larger than they are. Published: one run per cell, other settings for some rows.\n"
    )
    return "\n".join(parts)


def markdown_short(groups: Groups) -> str:
    """The README's table: the generated set with the controlled recipe and no further flag, in few columns."""
    plain = new_run({"loss": "softmax", "dataset": "synthetic"})
    rows = groups.get(describe(plain))
    if not rows:
        raise UserError("--short: no runs of --dataset synthetic without further flags among these")
    lines = [
        [entry["row"], percent(*entry["rank1"]), percent(*entry["mAP"]), str(len(entry["seeds"])), verdict(entry)]
        for entry in summarise(rows)
    ]
    return markdown_table(["loss", "rank-1", "mAP", "n", "mAP against the highest"], lines) + "\n"


def write_csv(groups: Groups, path: Path) -> None:
    """A line per setting and loss; scores in percent, times in seconds, empty where there is no number."""

    def cell(value: float | None, factor: float = 1) -> str:
        return "" if value is None else f"{value * factor:.6g}"

    header = ["dataset", "setting", "loss", "n", "seeds", "rank1", "rank1_half_interval", "mAP", "mAP_half_interval"]
    header += ["training_seconds", "highest", "p_against_highest_holm", "comparisons", "published_rank1"]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*header, "published_mAP", "command"])
    for setting, rows in groups.items():
        for entry in summarise(rows):
            args = entry["runs"][0]["args"]
            line = [args["dataset"], setting, entry["row"], len(entry["seeds"]), " ".join(map(str, entry["seeds"]))]
            line += [cell(value, 100) for value in (*entry["rank1"], *entry["mAP"])]
            line += [cell(entry["seconds"]), int(entry["best"]), cell(entry["p"]), entry["comparisons"]]
            line += [cell(v) for v in PUBLISHED.get(entry["row"], {}).get(args["dataset"], (None, None))]
            writer.writerow([*line, command(args)])
    write_text(path, text.getvalue())


def update(path: Path, text: str) -> None:
    """Replaces what stands between the two markers of a markdown file."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path} has no {BEGIN} followed by {END}: put these two lines where the table belongs")
    write_text(path, f"{before}{BEGIN}\n{text}{END}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="folder with runs (default: runs)")
    # output; the table is printed unless it is written to a file
    parser.add_argument("--csv", type=Path, help="write the numbers to this file")
    parser.add_argument("--update", type=Path, help=f"put the tables between {BEGIN} and {END} of this file")
    parser.add_argument("--short", action="store_true", help="only the README's table of the generated set")
    # for those who keep results
    parser.add_argument("--collect", type=Path, nargs="+", help="write these run folders' results to INTO/runs")
    parser.add_argument("--into", type=Path, default=Path("results"), help="folder for --collect (default: results)")
    args = parser.parse_args(argv)
    if args.collect:
        for run_dir in args.collect:
            print(collect(run_dir, args.into))
        return
    groups = load_groups(args.folder)
    if args.csv:
        write_csv(groups, args.csv)
    text = markdown_short(groups) if args.short else markdown(groups)
    if args.update:
        update(args.update, text)
    if not (args.csv or args.update):
        print(text)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"results: {error}")
