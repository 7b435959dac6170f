"""The two charts of tools.show as SVG, for the page: CMC curves, and the similarities of right and wrong images."""

from utils.verification import Pairs, at_rate

WIDTH, HEIGHT = 440, 260  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 14, 40  # margins
BARS = 60  # of a histogram


def cmc_chart(curves: list[list[float]]) -> str:
    """Of one or two runs the share of the queries with a right image among the first 1, 2, ... (0..1)."""
    most = max(map(len, curves))
    low = min(int(5 * min(curve[0] for curve in curves)), 4)  # fifths
    ticks, low = [(i / 5, f"{20 * i}") for i in range(low, 6)], low / 5
    parts = _axes([(k, str(k)) for k in (1, 5, 10, 20, 50) if k <= most], (1, max(most, 2)), "rank k",
                  ticks, (low, 1), "queries, %")  # fmt: skip
    for i, curve in enumerate(curves):
        points = " ".join(f"{_x(k, 1, max(most, 2)):.1f},{_y(share, low, 1):.1f}" for k, share in enumerate(curve, 1))
        parts.append(f'<polyline class="line{i}" points="{points}"/>')
    return _svg(parts, "CMC curve")


def histogram_bars(pairs: Pairs) -> tuple[float, float, list[float], list[float]]:
    """First and last similarity, and of BARS parts between them the share of pairs of one person, and of two people."""
    used = (pairs.positive + pairs.negative).nonzero().flatten()
    first, step = int(used[0]), -(-(int(used[-1]) + 1 - int(used[0])) // BARS)
    low, high = (pairs.low + pairs.width * (first + i * step) for i in (0, BARS))
    shares = []
    for count in (pairs.positive, pairs.negative):
        padded = count.new_zeros(BARS * step)
        here = count[first : first + BARS * step]
        padded[: len(here)] = here
        shares.append((padded.view(BARS, step).sum(1) / count.sum()).tolist())
    return low, high, *shares


def similarity_chart(pairs: Pairs) -> str:
    low, high, same, other = histogram_bars(pairs)
    top = max(*same, *other)
    ticks = [(low + i * (high - low) / 4, f"{low + i * (high - low) / 4:.2f}") for i in range(5)]
    parts = _axes(ticks, (low, high), "similarity", [(0, "0")], (0, top), "share of the pairs")
    for name, kind, shares in (("two people", "other", other), ("one person", "same", same)):
        steps = [(low + (i + side) * (high - low) / BARS, share) for i, share in enumerate(shares) for side in (0, 1)]
        points = " ".join(f"{_x(x, low, high):.1f},{_y(share, 0, top):.1f}" for x, share in steps)
        base = HEIGHT - BOTTOM
        parts.append(f'<polygon class="{kind}" points="{LEFT},{base} {points} {WIDTH - RIGHT},{base}"/>')
        peak = max(range(BARS), key=shares.__getitem__)
        side = -1 if peak > BARS // 3 else 1  # beside the peak
        x, y = _x(low + (peak + 0.5) * (high - low) / BARS, low, high) + 22 * side, _y(shares[peak], 0, top) + 8
        anchor = "end" if side < 0 else "start"
        parts.append(f'<text class="halo" text-anchor="{anchor}" x="{x:.0f}" y="{y:.0f}">{name}</text>')
    x = _x(min(max(at_rate(pairs, 1e-3)["threshold"], low), high), low, high)
    parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    return _svg(parts, "similarities of pairs of one person and of two people")


def _x(value: float, low: float, high: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / ((high - low) or 1)


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / ((high - low) or 1)


def _axes(x_ticks, x_range, x_label, y_ticks, y_range, y_label) -> list[str]:
    base = HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{base}H{WIDTH - RIGHT}"/>']
    for value, text in x_ticks:
        parts.append(f'<text text-anchor="middle" x="{_x(value, *x_range):.1f}" y="{base + 15}">{text}</text>')
    for value, text in y_ticks:
        y = _y(value, *y_range)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>')
    parts.append(f'<text text-anchor="middle" x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}">{x_label}</text>')
    turned = f"translate(12 {(base + TOP) / 2}) rotate(-90)"
    parts.append(f'<text text-anchor="middle" transform="{turned}">{y_label}</text>')
    return parts


def _svg(parts: list[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
