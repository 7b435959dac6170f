"""What a recipe changes: losses by recipes, how well their orders agree, and the tricks one at a time.

Sections of `python -m utils.results`, in markdown, below its tables; each only where there are runs for it.
"""

from collections.abc import Sequence
from itertools import combinations, product

from losses import ROWS, row_name
from utils.flags import DEFAULTS, new_run
from utils.recipes import RECIPES
from utils.runs import NAMES, PUBLISHED, Groups, Setting
from utils.statistics import FEWEST, LEVEL, holm, interval, kendall_range, paired_p
from utils.words import markdown_table, p_in_words, percent

BASE = DEFAULTS["recipe"]  # the recipe that the others are compared with

Rows = dict[str, dict[int, dict]]  # loss -> seed -> run


def orders_and_ablations(groups: Groups) -> list[str]:
    """For each setting of the controlled recipe: its losses by recipes, the orders of these, its tricks in turn."""
    sections = []
    for setting, rows in groups.items():
        if setting.recipe == BASE:
            columns, settings = by_recipe(groups, setting), one_trick_more(groups, setting)
            data = str(setting).replace(f", {BASE} recipe", "", 1)
            if len(columns) > 1:
                sections += [recipes_section(data, columns), orders_section(data, columns)]
            if len(settings) > 1:
                sections.append(ablation_section(data, {BASE: rows, **settings}, columns))
    return [section for section in sections if section]


# ------------------------------------------------------------------------------------------ which settings go together


def further_flags(setting: Setting, base: Setting) -> dict[str, str] | None:
    """The flags that a setting has beside those of `base`, as typed, whatever their recipes; None: not of that kind."""
    alike = (setting.data, setting.training) == (base.data, base.training) and {*base.flags} <= {*setting.flags}
    return {name: typed for name, typed in setting.flags if (name, typed) not in base.flags} if alike else None


def by_recipe(groups: Groups, base: Setting) -> dict[str, Rows]:
    """Columns beside a setting of the controlled recipe, itself first: what other recipes gave with the same data,
    network and flags; of a recipe without such runs those with further flags, which are then in the column's name."""
    columns = {BASE: groups[base]}
    for recipe in [name for name in RECIPES if name != BASE]:
        found = {}
        for setting, rows in groups.items():
            further = further_flags(setting, base)
            if setting.recipe == recipe and further is not None:
                found[f"{recipe} ({', '.join(further.values())})" if further else recipe] = rows
        columns |= {recipe: found[recipe]} if recipe in found else found
    return columns


def one_trick_more(groups: Groups, base: Setting) -> dict[str, Rows]:
    """Settings of the controlled recipe that differ from `base` in one flag, which the tricks recipe sets, too."""
    found = {}
    for setting, rows in groups.items():
        more = further_flags(setting, base)
        args = next(iter(next(iter(rows.values())).values()))["args"]
        if setting.recipe == BASE and more and len(more) == 1 and more.keys() <= tricks_for(args):
            found[", ".join(more.values())] = rows
    return found


def tricks_for(args: dict) -> set[str]:
    """The flags that the tricks recipe sets otherwise than the controlled one, for a run's loss on its data set."""
    plain, tricks = (
        new_run({"loss": row_name(args["loss"]), "dataset": args["dataset"], "recipe": recipe})
        for recipe in (BASE, "tricks")
    )
    return {key for key in (*DEFAULTS, "loss_args") if key != "recipe" and plain[key] != tricks[key]}


# ------------------------------------------------------------------------------------------------------------ sections


def recipes_section(data: str, columns: dict[str, Rows]) -> str:
    """A row for each loss that another recipe has, a column for each recipe, and what each changes."""
    others = [name for name in columns if name != BASE]
    changes = {name: changes_from(columns[BASE], columns[name]) for name in others}
    header = ["loss", *columns, *(f"{name} against {BASE}" for name in others)]
    lines = []
    for loss in compared_losses(columns):
        line = [loss, *(mean_of(rows.get(loss)) for rows in columns.values())]
        lines.append(line + [in_cell(changes[name].get(loss)) for name in others])
    caption = (
        "mAP (n). Against the controlled recipe: mean difference over the seeds that both have (how many) ± half of "
        "its 95 % interval, uncorrected; p: paired t-test, Holm-corrected for the losses of a column, at 5 %. "
    )
    caption += " ".join(gains_and_losses(name, changes[name]) for name in others)
    return f"**Losses by recipes: {data}**\n\n{markdown_table(header, lines)}\n\n{caption}\n"


def compared_losses(columns: dict[str, Rows]) -> list[str]:
    """The losses that a recipe beside the controlled one was run with, in the order of the tables."""
    found = {loss for name, rows in columns.items() if name != BASE for loss in rows}
    return [loss for loss in ROWS if loss in found] + sorted(found - ROWS.keys())


def mean_of(runs: dict[int, dict] | None, intervals: bool = True) -> str:
    mean, half = interval([run["mAP"] for run in runs.values()]) if runs else (0, None)
    return f"{percent(mean, half if intervals else None)} ({len(runs)})" if runs else ""


def changes_from(base: Rows, rows: Rows) -> dict[str, tuple[float, float | None, int, float | None]]:
    """Loss -> mean difference of mAP over common seeds, half of its interval, number of seeds, p value or None."""
    changes, p_values = {}, {}
    for loss in rows.keys() & base.keys():
        seeds = sorted(rows[loss].keys() & base[loss].keys())
        pair = [[runs[loss][seed]["mAP"] for seed in seeds] for runs in (rows, base)]
        if seeds:
            changes[loss] = (*interval([a - b for a, b in zip(*pair, strict=True)]), len(seeds))
        if len(seeds) > 1:
            p_values[loss] = paired_p(*pair)
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return {loss: (*change, adjusted.get(loss)) for loss, change in changes.items()}


def in_cell(change: tuple[float, float | None, int, float | None] | None) -> str:
    if change is None:
        return ""
    mean, half, n, p = change
    return f"{signed(mean, half)} ({n}), {'no test' if p is None else p_in_words(p)}"


def signed(mean: float, half: float | None) -> str:
    return f"{'+' if mean >= 0 else ''}{percent(mean, half)}"


def gains_and_losses(name: str, changes: dict) -> str:
    """Which losses were shown to gain and which to lose, which neither, and which were not tested."""
    parts: dict[str, list[str]] = {"higher": [], "lower": [], "not shown to differ": [], "no test": []}
    for loss in sorted(changes, key=[*ROWS, *sorted(changes)].index):
        mean, _, _, p = changes[loss]
        shown = "higher" if mean > 0 else "lower"
        parts["no test" if p is None else shown if p < LEVEL else "not shown to differ"].append(loss)
    if len(parts["no test"]) == len(changes):
        return f"Too few common seeds to test {name} against {BASE}."
    words = [f"{part}: {', '.join(losses) or 'none'}" for part, losses in parts.items() if losses or part != "no test"]
    tested = len(changes) - len(parts["no test"])
    return f"{name[0].upper()}{name[1:]} against {BASE} ({tested} tests), {'; '.join(words)}."


def orders_section(data: str, columns: dict[str, Rows]) -> str:
    """Kendall's tau of the orders of the losses by mAP: between seeds of a recipe, recipes, and published tables."""
    losses = compared_losses(columns)
    orders = {name: orders_by_seed(rows, losses) for name, rows in columns.items()}
    pairs = {f"two seeds of {name}": list(combinations(found, 2)) for name, found in orders.items()}
    pairs |= {f"{a} and {b}": list(product(orders[a], orders[b])) for a, b in combinations(columns, 2)}
    for dataset, title in NAMES.items():
        order = {loss: scores[dataset][1] for loss, scores in PUBLISHED.items()}
        pairs |= {f"{name} and {title} as published": [(seed, order) for seed in orders[name]] for name in orders}
    lines = []
    for name, both in pairs.items():
        if found := kendall_range(both):
            median, lowest, highest, n = found
            common = sorted({len(a.keys() & b.keys()) for a, b in both if len(a.keys() & b.keys()) >= FEWEST})
            span = f"{lowest:.2f} to {highest:.2f}" if n > 1 else ""
            lines.append([name, f"{median:.2f}", span, str(n), " or ".join(map(str, common))])
    if not lines:
        return ""
    table = markdown_table(["orders by mAP", "tau, median", "lowest to highest", "pairs", "losses"], lines)
    caption = (
        "Kendall's tau-b: 1 for the same order, -1 for the reverse, about 0 for unrelated ones. A pair: a seed of the "
        "one and a seed of the other, or a seed and the published table of photographs, one run per cell. Pairs that "
        "share a seed depend on each other: the range is no confidence interval, and nothing is tested. How far two "
        "seeds of one recipe agree says how firm its own order is."
    )
    return f"**Do the orders agree? {data}**\n\n{table}\n\n{caption}\n"


def orders_by_seed(rows: Rows, losses: Sequence[str]) -> list[dict[str, float]]:
    """For each seed the mAP of the losses that were run with it."""
    seeds = sorted({seed for loss in losses for seed in rows.get(loss, {})})
    return [{loss: rows[loss][seed]["mAP"] for loss in losses if seed in rows.get(loss, {})} for seed in seeds]


def ablation_section(data: str, settings: dict[str, Rows], columns: dict[str, Rows]) -> str:
    """A row for the controlled recipe, for each trick alone, and for all of them; a column for each loss."""
    losses = compared_losses(settings)
    settings = {**settings, **{name: rows for name, rows in columns.items() if name.startswith("tricks")}}
    lines = []
    for name, rows in settings.items():
        changes = changes_from(settings[BASE], rows)
        cells = [mean_of(rows.get(loss), intervals=False) for loss in losses]
        if name != BASE:
            cells = [f"{cell}, {signed(*changes[loss][:2])}" if loss in changes else cell
                     for loss, cell in zip(losses, cells, strict=True)]  # fmt: skip
        lines.append([f"`{name}`" if name.startswith("--") else name, *cells])
    caption = (
        "mAP (n), mean difference from the controlled recipe over the seeds that both have. A row with a flag: the "
        "controlled recipe and this flag; tricks: all of them. ±: half of a difference's paired 95 % interval, not "
        "corrected for the number of cells; nothing is tested."
    )
    return f"**One trick at a time: {data}**\n\n{markdown_table(['setting', *losses], lines)}\n\n{caption}\n"
