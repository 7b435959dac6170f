"""Runs that were scored on other data sets, too: tables that utils/results.py shows after its own.

A table for each way to train and each loss: rows are what was trained on, columns what was tested on, in the run's own
way of scoring. The runs of a cell differ in the seed only.
"""

from dataclasses import replace

from utils.runs import Groups, Setting, describe_data, describe_set
from utils.statistics import interval
from utils.words import markdown_table, percent

NOT_RUN = "not run"


def name_of(test: dict) -> str:
    """The column of a test set. Own pictures all have one name: the number of queries tells most of them apart."""
    words = describe_set(test["dataset"], test["options"], test["title"])
    return f"{words}, {test['num_queries']:,} queries" if test["dataset"] == "folder" else words


def own_scores(run: dict) -> dict[str, dict]:
    """Column -> rank1 and mAP on a run's own test sets: of several data sets each, or the people that were held out."""
    args = run["args"]
    if args["eval_on"] == "val":
        return {describe_data(args): run}
    titles = args.get("titles", {})
    tests = run.get("tests", {args["dataset"]: run})
    about = {name: {"dataset": name, "options": args, "title": titles.get(name), **tests[name]} for name in tests}
    return {name_of(test): test for test in about.values()}


def other_scores(run: dict) -> dict[str, dict]:
    """The same of the test sets of other data."""
    return {name_of(test): test for test in run.get("across", [])}


def cell(scores: list[dict]) -> str:
    """rank-1 / mAP in percent: mean ± half of the interval over seeds, and their number."""
    if not scores:
        return NOT_RUN
    texts = [percent(*interval([score[key] for score in scores])) for key in ("rank1", "mAP")]
    return f"{' / '.join(texts)} (n = {len(scores)})"


def table_across(trained: dict[str, list[dict]]) -> str:
    """trained: what was trained on -> the runs, one a seed. Own test sets come first, in the order of the rows."""
    scores = {name: [other_scores(run) | own_scores(run) for run in runs] for name, runs in trained.items()}
    columns = dict.fromkeys(column for runs in trained.values() for run in runs for column in own_scores(run))
    columns |= dict.fromkeys(column for runs in scores.values() for run in runs for column in run)
    lines = []
    for name, runs in scores.items():
        lines.append([name, *(cell([run[column] for run in runs if column in run]) for column in columns)])
    return markdown_table(["trained on \\ tested on", *columns], lines)


def markdown_across(groups: Groups) -> list[str]:
    """The tables of the settings and losses of which a run was scored on another data set, and what they show."""
    tables: dict[tuple[str, Setting], dict[str, list[dict]]] = {}
    for setting, rows in groups.items():
        for row, runs in rows.items():
            trained = tables.setdefault((row, replace(setting, data="")), {})
            trained[setting.data] = [runs[seed] for seed in sorted(runs)]
    parts = [
        f"**Across data sets: {row}, {setting}**\n\n{table_across(trained)}\n"
        for (row, setting), trained in tables.items()
        if any(run.get("across") for runs in trained.values() for run in runs)
    ]
    caption = (
        "Across data sets: a row is trained on what it names and tested on what the columns name, rank-1 / mAP; the "
        "recipe may hold other numbers for each. `python evaluate.py --run RUN --dataset DATASET` fills a cell.\n"
    )
    return [*parts, caption] if parts else []
