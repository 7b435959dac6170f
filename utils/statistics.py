"""Means over seeds with their intervals, and paired tests with Holm's correction."""

import math
import statistics
from collections.abc import Sequence

LEVEL = 0.05  # of the tests; the intervals are those of 1 - LEVEL


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
