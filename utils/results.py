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
later losses against the same one, with a correction of their own. Below the tables: utils/orders.py.
"""

import argparse
import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from losses import ROWS
from utils.across import markdown_across
from utils.errors import UserError, script
from utils.files import write_text
from utils.flags import new_run
from utils.orders import orders_and_ablations
from utils.runs import NAMES, PUBLISHED, Groups, Setting, collect, command, describe, load_groups
from utils.statistics import LEVEL, holm, interval, paired_p
from utils.words import markdown_table, p_in_words, percent

NOT_RUN = "not run"
BEGIN, END = "<!-- results -->", "<!-- end -->"


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
    side = "higher" if entry["higher"] else "lower"
    return f"{side if entry['p'] < LEVEL else f'not shown to be {side}'}, {p_in_words(entry['p'])}"


# ----------------------------------------------------------------------------------------------------- markdown and CSV


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def seed_list(seeds: Sequence[int]) -> str:
    """[0, 1, 2] -> 0-2; [0, 1, 5] -> 0, 1, 5."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}-{seeds[-1]}"
    return ", ".join(map(str, seeds))


def markdown_group(setting: Setting, rows: dict[str, dict[int, dict]]) -> str:
    """Heading, tables and caption of one group; for Market and Duke with all twelve rows and the published numbers."""
    summary = summarise(rows)
    args = summary[0]["runs"][0]["args"]
    dataset, tested = args["dataset"], any(entry["comparisons"] for entry in summary)
    published = has_published(args)
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
    loss = {"loss": "LOSS"} if len(summary) > 1 else {}
    caption = f"A row: `{command({**args, 'seed': 0}, **loss)}`. Trained on {'; '.join(devices)}."
    caption += " Rank-1 and mAP: mean of the test sets, each counting once." if "+" in dataset else ""
    if tested:
        best = next(entry["row"] for entry in summary if entry["best"])
        counts = {entry["part"]: entry["comparisons"] for entry in summary}
        caption += f" Compared with {best}: " + ", ".join(f"{n} {part} losses" for part, n in counts.items()) + "."
    if any(len(entry["seeds"]) == 1 for entry in summary):
        caption += " A row with n = 1 has neither an interval nor a test: it says nothing about differences."
    return f"**{setting}**\n\n" + "\n\n".join([*tables, caption]) + "\n"


def has_published(args: dict) -> bool:
    """Whether the published comparison was scored on the same: a complete copy, and its test people."""
    dataset = args["dataset"]
    return dataset in NAMES and args.get("titles", NAMES)[dataset] == NAMES[dataset] and args["eval_on"] == "test"


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
    every = [run["args"] for rows in groups.values() for runs in rows.values() for run in runs.values()]
    missing = [dataset for dataset in NAMES if dataset not in {a["dataset"] for a in every if has_published(a)}]
    parts += [markdown_not_run(missing)] if missing else []
    parts += orders_and_ablations(groups)
    parts += markdown_across(groups)
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
            scores = PUBLISHED.get(entry["row"], {}) if has_published(args) else {}
            line += [cell(v) for v in scores.get(args["dataset"], (None, None))]
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
        print(text, flush=True)


if __name__ == "__main__":
    script("results", main)
