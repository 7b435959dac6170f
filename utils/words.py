"""Numbers in words, and tables, for utils/results.py and utils/orders.py."""


def percent(mean: float, half: float | None) -> str:
    return f"{100 * mean:.1f}" if half is None else f"{100 * mean:.1f} ± {100 * half:.1f}"


def p_in_words(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    from tabulate import tabulate

    return tabulate(lines, header, tablefmt="pipe", disable_numparse=True)
