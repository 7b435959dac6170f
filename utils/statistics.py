"""Means over seeds with their intervals, paired tests with Holm's correction, and agreement of two orders."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

LEVEL = 0.05  # of the tests; the intervals are those of 1 - LEVEL
FEWEST = 5  # things in common, with fewer an order says next to nothing


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % interval: t(0.975, n - 1) s / sqrt(n); None for a single value."""
    from scipy.special import stdtrit  # imported late: the shell script asks quick questions

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
    """Adjusted p values (Holm, 1979): the i-th smallest of m times m - i + 1, at most 1, never below the one before."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def kendall(first: Mapping[str, float], second: Mapping[str, float]) -> float | None:
    """Kendall's tau-b of two scorings of the same things: 1 the same order, -1 the reverse.

    Over what both score; None for fewer than FEWEST in common, and where one of the two scores everything alike.
    """
    from scipy.stats import kendalltau

    common = sorted(first.keys() & second.keys())
    if len(common) < FEWEST:
        return None
    tau = float(kendalltau([first[name] for name in common], [second[name] for name in common]).statistic)
    return None if math.isnan(tau) else tau


def kendall_range(pairs: Iterable[tuple[Mapping, Mapping]]) -> tuple[float, float, float, int] | None:
    """Median, lowest and highest tau of pairs of scorings, and the number of pairs that have one; None without any."""
    taus = [tau for tau in (kendall(first, second) for first, second in pairs) if tau is not None]
    return (statistics.median(taus), min(taus), max(taus), len(taus)) if taus else None
