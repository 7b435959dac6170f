"""Exact CMC, mAP and mINP for re-identification (Market-1501 protocol, single query), by counting instead of sorting.

For each query, gallery images that are junk (pid -1) or have the query's pid and camera are dropped; all others stay.

    rank of the i-th nearest true match = i + number of wrong images that are nearer or equally near

so equal distances count against the system, and no result depends on the order of the gallery. From the ranks of
the n true matches of a query:

    AP            = mean of i / rank_i                             (torchreid, fast-reid, sklearn >= 0.19)
    AP_trapezoid  = mean of ((i - 1) / (rank_i - 1) + i / rank_i) / 2, the first fraction being 1 where rank_i = 1
                    (the MATLAB code of Market-1501; lower)
    INP           = n / rank_n                                     (AGW, fast-reid)
    rank-k        = 1 if rank_1 <= k, else 0

mAP, mAP_trapezoid, mINP and rank-k are means over the queries that have a true match; the others are left out.

How it works. The similarities of the few true matches are computed first. Then the gallery passes by in blocks: a
float32 product with the queries, and per true match the wrong images above it are counted. No matrix of all distances
and no sort: the cost is that of the product, and memory does not grow with the gallery.

How exact it is. The similarities of true matches are computed in float64. A wrong image is counted by the float32
product only if that is beyond the product's error; the few closer ones are compared again in float64. So the numbers
are those of a float64 computation, whatever the size of the blocks, the device and the precision of its float32
product (TF32, too, changes no digit, it only has more images compared again). Two similarities that differ by less
than ROUNDING are equal: a wrong image with the embedding of a true match, the same picture, say, counts against the
system wherever the two stand in the gallery.
"""

import math

import torch
from torch import Tensor

JUNK = -1  # pid of gallery images that are dropped
ROUNDING = 1e-12  # similarities this close are equal; relative to the lengths of the vectors
TOLERANCE = 2**-18  # error of the float32 product, likewise relative; widened to 4 x what true matches show
FAR = 1 / 128  # a true match behind more than this share of the gallery is compared with every image,
CHUNK = 16  # the others only with chunks of images whose largest similarity is above
CROWDED = 1 / 128  # share of close calls from which a part is computed again in float64
SLICE = 512  # queries counted at a time on a CPU: what its cache holds


def rank_metrics(
    query,
    query_pids,
    query_camids,
    gallery,
    gallery_pids,
    gallery_camids,
    metric: str = "cosine",
    ranks=(1, 5, 10, 20),
    query_block: int = 4096,
    gallery_block: int | None = None,
) -> dict[str, float]:
    """Score the retrieval of query (Q, D) in gallery (G, D), compared by "cosine" or "euclidean" distance.

    Embeddings: tensors or arrays, also memory-mapped ones; pids and camids (Q,), (G,): any integers. The work is done
    on the query's device, gallery_block rows (1024 on a CPU, 8192 elsewhere) against query_block at a time; only if
    memory runs out are both halved, which is said. An embedding of zeros has cosine similarity 0 to everything.
    Returns rank1, rank5, ... (one per entry of ranks), mAP, mAP_trapezoid, mINP: fractions from 0 to 1; num_queries:
    queries that have a true match. Raises ValueError if embeddings are not finite, empty or do not fit together, and
    if no query has a true match.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"Unknown metric {metric!r}: choose cosine or euclidean.")
    if len(query.shape) != 2 or len(gallery.shape) != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            "Query and gallery embeddings must be tables of the same width, (Q, D) and (G, D), "
            f"not {tuple(query.shape)} and {tuple(gallery.shape)}."
        )
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    ids = _ids(query_pids, query_camids, gallery_pids, gallery_camids, len(query), len(gallery), device)
    gallery_block = gallery_block or (1024 if device.type == "cpu" else 8192)
    while True:
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                results = [
                    _rank_queries(query, gallery, ids, slice(first, first + query_block), metric, gallery_block)
                    for first in range(0, len(query), query_block)
                ]
            return _metrics(results, ranks)
        except (torch.OutOfMemoryError, MemoryError):
            if max(query_block, gallery_block) <= 64:
                raise
            query_block, gallery_block = max(query_block // 2, 64), max(gallery_block // 2, 64)
        print(f"Out of memory: ranking again by blocks of {query_block} queries x {gallery_block} gallery images.")


def metrics_from_distance(
    distance, query_pids, query_camids, gallery_pids, gallery_camids, ranks=(1, 5, 10, 20)
) -> dict[str, float]:
    """The same numbers from a ready matrix of distances (Q, G), small = alike: tensor or array, compared as it is.

    Returns what rank_metrics returns. Raises ValueError for NaN or infinite distances, for ids that do not fit the
    matrix, and if no query has a true match.
    """
    if len(distance.shape) != 2:
        raise ValueError(f"The distances must be a matrix (Q, G), not of shape {tuple(distance.shape)}.")
    device = distance.device if isinstance(distance, Tensor) else torch.device("cpu")
    ids = _ids(query_pids, query_camids, gallery_pids, gallery_camids, *distance.shape, device)
    results = []
    with torch.no_grad():
        for first in range(0, len(distance), SLICE):
            rows = _rows(distance, slice(first, first + SLICE), device)
            rows = rows if rows.dtype == torch.float32 else rows.double()
            pairs = _Pairs(*(column[first : first + SLICE] for column in ids[:2]), *ids[2:])
            if not pairs.match.any():
                continue
            known = -rows[pairs.query, pairs.item].double()
            tally = _Tally(pairs.query[pairs.match], known[pairs.match], len(rows))
            for begin in range(0, rows.shape[1], 4096):
                part = rows[:, begin : begin + 4096]
                if not torch.isfinite(part).all():
                    raise ValueError("Some distances are NaN or infinite: all of them must be finite numbers.")
                score = part.new_empty(len(part), _round_up(part.shape[1]))
                score[:, : part.shape[1]] = -part
                pairs.drop(score, begin, part.shape[1])
                if score.dtype == torch.float32:
                    tally.prepare(torch.zeros(len(rows), dtype=torch.float64, device=device), seen=begin)
                    tally.count(score, 0)
                else:
                    tally.count_float64(score, 0)
            results.append(tally.results())
    return _metrics(results, ranks)


def _rank_queries(query, gallery, ids, here: slice, metric: str, gallery_block: int) -> Tensor:
    """The results of the queries in the slice `here`: (valid queries, 4), see _Tally.results."""
    device = ids[0].device
    all_queries, query = query, _rows(query, here, device)
    q, q_size, _ = _vectors(query, metric, torch.float32)
    if not torch.isfinite(q_size).all():
        _refuse_not_finite("query", all_queries, query)
    pairs = _Pairs(ids[0][here], ids[1][here], *ids[2:])
    if not pairs.match.any():
        return torch.empty(0, 4, dtype=torch.float64)
    pair_score, slack = _pair_scores(query, gallery, pairs, metric)
    tally = _Tally(pairs.query[pairs.match], (pair_score - slack)[pairs.match], len(query))
    buffer = torch.empty(len(query), _round_up(min(gallery_block, len(gallery))), device=device)
    slice_rows = SLICE if device.type == "cpu" else len(query)
    tolerance, seen = TOLERANCE, 0

    for begin in pairs.blocks(len(gallery), gallery_block):
        rows = _rows(gallery, slice(begin, begin + gallery_block), device)
        g, g_size, g_half = _vectors(rows, metric, torch.float32)
        if not torch.isfinite(g_size).all():
            _refuse_not_finite("gallery", gallery, rows)
        width = len(rows)
        score = buffer[:, : _round_up(width)]  # (Q, width), and some columns that fill the last chunk
        torch.mm(q, g.T, out=score[:, :width])  # the product: all the rest is to cost little beside it
        if metric == "euclidean":
            score[:, :width] -= g_half

        # How far the product can be trusted: its error where the similarity is known, relative to the lengths.
        scale = q_size.double() * _power_of_two(g_size) + _power_of_two(g_half)
        inside = pairs.inside(begin, width)
        known = score[pairs.query[inside], pairs.item[inside] - begin]
        error = (known - pair_score[inside]).abs() / scale[pairs.query[inside]]
        if len(error) and not 4 * error.max() <= tolerance:
            tolerance = 8 * error.max().item()
        trusted = bool(tolerance < 1e-2 and scale.min() > 1e-30 and scale.max() < 1e30)

        if not trusted:
            score.zero_()
        pairs.drop(score, begin, width)
        tally.prepare(tolerance * scale, seen)
        close = []
        for first in range(0, len(query), slice_rows):
            part = score[first : first + slice_rows]
            found = tally.count(part, first) if trusted else None
            if found is None:  # too many close calls: this part again, in float64
                exact = _similarities(query[first : first + slice_rows], rows, metric)
                tally.count_float64(exact.masked_fill_(part[:, :width] == -torch.inf, -torch.inf), first)
            else:
                close.append(found)
        if close:
            row, item, low, high = (torch.cat(column) for column in zip(*close, strict=True))
            tally.settle(_similarity(query, row, rows, item, metric), low, high)
        seen += width
    return tally.results()


class _Pairs:
    """All pairs of a query and a gallery image of the same person (junk aside), person by person.

    query, item (P,): indices. match (P,): whether the cameras differ; if not, the pair is dropped from the ranking.
    """

    def __init__(self, query_pids: Tensor, query_camids: Tensor, gallery_pids: Tensor, gallery_camids: Tensor):
        items = torch.isin(gallery_pids, query_pids).logical_and_(gallery_pids != JUNK).nonzero().squeeze(1)
        pids, order = gallery_pids[items].sort(stable=True)
        self.items = items[order]  # (K,) gallery images of the queries' people, by pid
        self.order = query_pids.argsort(stable=True)  # (Q,) queries by pid; the r-th one's: items[first[r] : last[r]]
        self.first = torch.searchsorted(pids, query_pids[self.order])
        self.last = torch.searchsorted(pids, query_pids[self.order], right=True)
        count = self.last - self.first
        self.start = count.cumsum(0) - count  # (Q,) the r-th one's first pair
        row = torch.arange(len(count), device=count.device).repeat_interleave(count)
        self.place = torch.arange(len(row), device=count.device) + (self.first - self.start)[row]  # (P,) in items
        self.query, self.item = self.order[row], self.items[self.place]
        self.match = query_camids[self.query] != gallery_camids[self.item]
        self.row = row
        self.item_sorted, self.by_item = self.item.sort(stable=True)
        self.junk = (gallery_pids == JUNK).nonzero().squeeze(1)

    def inside(self, begin: int, width: int) -> Tensor:
        """Pairs whose gallery image is one of begin .. begin + width - 1."""
        return self.by_item[_between(self.item_sorted, begin, width)]

    def drop(self, score: Tensor, begin: int, width: int) -> None:
        """Take the pairs, the junk and what lies beyond the width out of the ranking: nothing is farther than -inf."""
        inside = self.inside(begin, width)
        score[self.query[inside], self.item[inside] - begin] = -torch.inf
        score[:, self.junk[_between(self.junk, begin, width)] - begin] = -torch.inf
        score[:, width:] = -torch.inf

    def blocks(self, num_gallery: int, size: int) -> list[int]:
        """First rows of the gallery's blocks; the block with most pairs, which shows the product's error, leads."""
        begins = list(range(0, num_gallery, size))
        if len(self.item):
            begins.insert(0, begins.pop(int(torch.bincount(self.item // size).argmax())))
        return begins


class _Tally:
    """The true matches of some queries and how many wrong images are above each.

    Matches are numbered query by query, farthest first: those of query r are start[r] .. start[r + 1] - 1.
    """

    def __init__(self, match_query: Tensor, match_score: Tensor, num_queries: int):
        device = match_query.device
        order = match_score.argsort(stable=True)
        order = order[match_query[order].argsort(stable=True)]
        self.query, self.score = match_query[order], match_score[order]  # (M,), (M,) float64
        self.start = torch.zeros(num_queries + 1, dtype=torch.int64, device=device)
        self.start[1:] = torch.bincount(self.query, minlength=num_queries).cumsum(0)
        self.wrong = torch.zeros(len(order), dtype=torch.int64, device=device)  # (M,) counted one by one, and
        self.above = torch.zeros(len(order) + num_queries, dtype=torch.int64, device=device)  # images above n matches
        self.far = torch.zeros(num_queries, dtype=torch.int64, device=device)
        self.margin = None

    def prepare(self, margin: Tensor, seen: int) -> None:
        """Set the margin of doubt (Q,) and choose the far matches, after `seen` gallery images."""
        if seen:
            is_far = self.counts() > FAR * seen
            self.far = torch.bincount(self.query[is_far], minlength=len(self.far))
        if self.margin is not None and torch.equal(margin, self.margin):
            return
        self.margin = margin
        self.low = (self.score - margin[self.query]).float()  # from here on an image may be nearer than the match,
        self.high = (self.score + margin[self.query]).float()  # from here on it is
        self.edges, order = torch.cat([_key(self.query, self.low), _key(self.query, self.high)]).sort()
        self.highs = torch.zeros(len(order) + 1, dtype=torch.int64, device=order.device)
        self.highs[1:] = (order >= len(self.low)).cumsum(0)

    def count(self, score: Tensor, first: int):
        """Count the images in score (R, W), float32, similarities to the queries from the first on.

        What is not to be ranked is -inf; W is a multiple of CHUNK. Returns the close calls, to be settled: query and
        image, and the matches low .. high - 1 that may be farther or not. If they are too many, returns None and has
        counted nothing.
        """
        rows = torch.arange(first, first + len(score), device=score.device)
        start, num = self.start[rows], self.start[rows + 1] - self.start[rows]
        far = self.far[rows]
        far = far.clamp(max=far.sort(descending=True).values[min(15, len(far) - 1)])  # not for a few queries alone
        far_row, far_match, sure, maybe = self._compare(score, start, far)

        # All other matches: only images above the farthest of them, sorted in among the matches.
        cut = torch.where(far < num, self.low[(start + far).clamp(max=len(self.low) - 1)], torch.inf)
        row, item = _above(score, cut)
        edges = slice(2 * int(self.start[first]), 2 * int(self.start[first + len(score)]))
        at = torch.searchsorted(self.edges[edges], _key(row + first, score[row, item]), right=True) + edges.start
        low = torch.maximum(self.highs[at], (start + far)[row])  # beyond the matches before low for certain,
        high = torch.maximum(at - self.highs[at], (start + far)[row])  # not beyond those from high on

        close, far_close = (low < high).nonzero().squeeze(1), (sure < maybe).nonzero().squeeze(1)
        if len(close) + (maybe - sure).sum() > CROWDED * score.numel():
            return None
        self.above.index_add_(0, low + row + first, torch.ones_like(row))
        found = torch.bincount(row, minlength=len(score))  # these are above the far matches, too, and counted there
        self.wrong.index_add_(0, far_match, sure.long() - found[far_row])

        match = far_match[far_close]
        value = score[far_row[far_close]]
        which, far_item = ((value >= self.low[match, None]) & (value < self.high[match, None])).nonzero().unbind(1)
        match, far_query = match[which], far_row[far_close][which]
        return (
            torch.cat([row[close], far_query]) + first,
            torch.cat([item[close], far_item]),
            torch.cat([low[close], match]),
            torch.cat([high[close], match + 1]),
        )

    def _compare(self, score: Tensor, start: Tensor, far: Tensor):
        """Compare every far match with every image: row, match, number of images nearer for certain, and maybe."""
        far, rows = far.sort(descending=True, stable=True)
        sizes = (far[:, None] > torch.arange(int(far[0]), device=far.device)).sum(0).tolist()  # queries per level
        far_row = torch.cat([rows[:0], *(rows[:size] for size in sizes)])
        far_match = torch.cat([rows[:0], *(start[rows[:size]] + level for level, size in enumerate(sizes))])
        part = score[rows[: max(sizes, default=0)]]
        passed = torch.empty_like(part)  # 0.0 or 1.0: floats are what compares and sums fastest
        sure, maybe = [score[:0, 0]], [score[:0, 0]]
        for size, match in zip(sizes, far_match.split(sizes), strict=True):
            sure.append(torch.ge(part[:size], self.high[match, None], out=passed[:size]).sum(1))
            maybe.append(torch.ge(part[:size], self.low[match, None], out=passed[:size]).sum(1))
        return far_row, far_match, torch.cat(sure), torch.cat(maybe)

    def count_float64(self, score: Tensor, first: int) -> None:
        """Count the images in score (R, W), float64, similarities to the queries from the first on; dropped: -inf."""
        start, end = self.start[first : first + len(score)], self.start[first + 1 : first + len(score) + 1]
        place = torch.arange(int((end - start).max()), device=score.device)
        match = (start[:, None] + place).clamp(max=len(self.score) - 1)
        matches = torch.where(start[:, None] + place < end[:, None], self.score[match], torch.inf)
        passed = torch.searchsorted(matches, score, right=True)  # (R, W) number of matches that are not nearer
        row = torch.arange(first, first + len(score), device=score.device)
        bins = (start + row)[:, None] + passed
        self.above += torch.bincount(bins.flatten(), minlength=len(self.above))

    def settle(self, score: Tensor, low: Tensor, high: Tensor) -> None:
        """Count images of similarity score (N,), float64, each against its query's matches low .. high - 1."""
        image = torch.arange(len(score), device=score.device).repeat_interleave(high - low)
        offset = (high - low).cumsum(0) - (high - low)
        match = low[image] + torch.arange(len(image), device=score.device) - offset[image]
        self.wrong.index_add_(0, match, (score[image] >= self.score[match]).long())

    def counts(self) -> Tensor:
        """Wrong images above each match so far, (M,)."""
        at_least = torch.zeros(len(self.above) + 1, dtype=torch.int64, device=self.above.device)
        at_least[:-1] = self.above.flip(0).cumsum(0).flip(0)
        query = torch.arange(len(self.far), device=self.above.device)
        next_query = at_least[self.start[1:] + query + 1]  # images of the queries behind this one
        match = torch.arange(len(self.query), device=self.above.device)
        return self.wrong + at_least[match + self.query + 1] - next_query[self.query]

    def results(self) -> Tensor:
        """Per query with a match, (valid, 4) float64 on the CPU: first rank, AP, AP_trapezoid, INP."""
        start, query, wrong = self.start.cpu(), self.query.cpu(), self.counts().cpu()
        num = start.diff()
        i = (start[1:][query] - torch.arange(len(query))).double()  # 1 for the nearest match
        rank = i + wrong
        before = torch.where(rank > 1, (i - 1) / (rank - 1), 1.0)
        valid = num > 0
        n = num[valid].double()

        def mean(value: Tensor) -> Tensor:
            return torch.zeros(len(num), dtype=torch.float64).index_add_(0, query, value)[valid] / n

        return torch.stack(
            [rank[start[1:][valid] - 1], mean(i / rank), mean((before + i / rank) / 2), n / rank[start[:-1][valid]]], 1
        )


def _metrics(results: list[Tensor], ranks) -> dict[str, float]:
    """Means over all valid queries."""
    results = torch.cat([torch.empty(0, 4, dtype=torch.float64), *results])
    if not len(results):
        raise ValueError(
            "No query has a true match in the gallery under another camera, so there is nothing to score: if all "
            "images come from one camera, use --ignore-cameras (every image then counts as a camera of its own)."
        )
    first, precision, trapezoid, inverse_penalty = results.unbind(1)
    return {
        **{f"rank{k}": (first <= k).double().mean().item() for k in ranks},
        "mAP": precision.mean().item(),
        "mAP_trapezoid": trapezoid.mean().item(),
        "mINP": inverse_penalty.mean().item(),
        "num_queries": len(results),
    }


def _ids(query_pids, query_camids, gallery_pids, gallery_camids, num_query: int, num_gallery: int, device):
    """The four columns as int64 on the device, checked."""
    if num_query == 0 or num_gallery == 0:
        raise ValueError(f"Nothing to rank: {num_query} query and {num_gallery} gallery images.")
    columns = []
    for name, column, length in (
        ("query_pids", query_pids, num_query),
        ("query_camids", query_camids, num_query),
        ("gallery_pids", gallery_pids, num_gallery),
        ("gallery_camids", gallery_camids, num_gallery),
    ):
        column = torch.as_tensor(column)
        if column.is_floating_point() or column.is_complex() or column.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, not {column.dtype}.")
        if column.shape != (length,):
            raise ValueError(f"{name} must hold an integer per image, shape ({length},), not {tuple(column.shape)}.")
        columns.append(column.to(device, torch.int64))
    return columns


def _rows(table, index, device) -> Tensor:
    """Rows of a tensor or array, by slice or index tensor, as a tensor on the device."""
    if isinstance(table, Tensor):
        return table[index.to(table.device) if isinstance(index, Tensor) else index].to(device)
    rows = table[index.cpu().numpy() if isinstance(index, Tensor) else index]
    return (torch.as_tensor(rows) if rows.flags.writeable else torch.tensor(rows)).to(device)


def _vectors(rows: Tensor, metric: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (n, D) whose products rank the gallery, their lengths (n,), and half their squares (0 for cosine)."""
    x = rows.to(dtype)
    size = torch.linalg.vector_norm(x, dim=1)
    if metric == "euclidean":
        return x, size, size.square() / 2
    if not ((size > 1e-15) & (size < 1e15)).all():  # zeros, and what float32 cannot square
        x = rows.double()
        x = x / x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        size = torch.linalg.vector_norm(x, dim=1)
        x, size = x.div_(torch.where(size > 0, size, 1.0)[:, None]).to(dtype), torch.where(size > 0, 1.0, size)
        return x, size.to(dtype), torch.zeros_like(size, dtype=dtype)
    return x / size[:, None], torch.ones_like(size), torch.zeros_like(size)


def _pair_scores(query: Tensor, gallery, pairs: _Pairs, metric: str) -> tuple[Tensor, Tensor]:
    """Similarity of each pair and its rounding, (P,) float64: products of a few people's queries and images."""
    step, reach = (16, 256) if query.device.type == "cpu" else (512, 4096)
    score = torch.empty(len(pairs.query), dtype=torch.float64, device=query.device)
    slack = torch.empty_like(score)
    bounds = torch.stack([pairs.first, pairs.last, pairs.start], 1).tolist()
    bounds.append((0, 0, len(score)))
    for r in range(0, len(query), step):
        stop = min(r + step, len(query))
        begin, end = bounds[r][0], bounds[stop - 1][1]
        x, x_size, _ = _vectors(query[pairs.order[r:stop]], metric, torch.float64)
        part = torch.arange(bounds[r][2], bounds[stop][2], device=query.device)
        for place in range(begin, end, reach):
            y, y_size, y_half = _vectors(
                _rows(gallery, pairs.items[place : min(place + reach, end)], query.device), metric, torch.float64
            )
            inside = part[(pairs.place[part] >= place) & (pairs.place[part] < place + reach)]
            row, column = pairs.row[inside] - r, pairs.place[inside] - place
            score[inside] = (x @ y.T)[row, column] - y_half[column]
            slack[inside] = ROUNDING * (x_size[row] * y_size[column] + y_half[column])
    return score, slack


def _similarity(query: Tensor, row: Tensor, gallery: Tensor, item: Tensor, metric: str) -> Tensor:
    """Similarity, rounded up, of query row[n] and gallery image item[n], (N,) float64."""
    step = 64 if query.device.type == "cpu" else 8192
    score = [torch.empty(0, dtype=torch.float64, device=query.device)]
    for x, y in zip(row.split(step), item.split(step), strict=True):
        x, x_size, _ = _vectors(query[x], metric, torch.float64)
        y, y_size, y_half = _vectors(gallery[y], metric, torch.float64)
        score.append((x * y).sum(1) - y_half + ROUNDING * (x_size * y_size + y_half))
    return torch.cat(score)


def _similarities(query: Tensor, gallery: Tensor, metric: str) -> Tensor:
    """Similarities, rounded up, of all queries and gallery images given, (R, W) float64."""
    x, x_size, _ = _vectors(query, metric, torch.float64)
    y, y_size, y_half = _vectors(gallery, metric, torch.float64)
    return x @ y.T - y_half + ROUNDING * (x_size[:, None] * y_size + y_half)


def _above(score: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the entries of score (R, W) that are at least their row's cut (R,)."""
    chunks = score.view(len(score), CHUNK, score.shape[1] // CHUNK)  # chunk c: columns c, c + W / CHUNK, ...
    row, chunk = (chunks.amax(1) >= cut[:, None]).nonzero().unbind(1)
    which, lane = (chunks[row, :, chunk] >= cut[row, None]).nonzero().unbind(1)
    return row[which], lane * chunks.shape[2] + chunk[which]


def _key(row: Tensor, value: Tensor) -> Tensor:
    """An int64 that sorts by row, then by value (float32)."""
    bits = (value + 0.0).view(torch.int32)  # + 0.0: no negative zero
    return (row << 32) + (bits ^ ((bits >> 31) & 0x7FFFFFFF))


def _between(values: Tensor, begin: int, width: int) -> slice:
    """Where begin .. begin + width - 1 stand in the sorted values."""
    return slice(*torch.searchsorted(values, values.new_tensor([begin, begin + width])).tolist())


def _round_up(width: int) -> int:
    return -(-width // CHUNK) * CHUNK


def _power_of_two(values: Tensor) -> float:
    """The power of two at or above the largest value; 0 for 0."""
    largest = values.max().item()
    return 2.0 ** math.ceil(math.log2(largest)) if 0 < largest < math.inf else largest


def _refuse_not_finite(name: str, table, rows: Tensor) -> None:
    """Raise a ValueError that names all embeddings of the table that are NaN or infinite, if the rows hold any."""
    if torch.isfinite(rows).all():
        return
    bad = []
    for first in range(0, len(table), 4096):
        part = _rows(table, slice(first, first + 4096), rows.device)
        bad += (first + (~torch.isfinite(part).all(1)).nonzero().squeeze(1)).tolist()
    raise ValueError(
        f"{len(bad)} of {len(table)} {name} embeddings hold NaN or infinite values: images "
        f"{', '.join(map(str, bad[:10]))}{', ...' if len(bad) > 10 else ''} (counted from 0)."
    )
