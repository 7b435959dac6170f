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
and no sort: the cost is that of the product, and memory does not grow with the gallery, but for its ids.

How exact it is. The similarities of true matches are computed in float64. A wrong image is counted by the float32
product only if its similarity is beyond the product's error; the few closer ones are compared again in float64. So the
numbers are those of a float64 computation, whatever the size of the blocks, the device and the precision of its float32
product (with TF32, only more images are compared again). That error is estimated, not bounded: 4 to 8 times the largest
one that the true matches and SAMPLE other pairs of each block show, and at least TOLERANCE. Two similarities are equal
if float64 cannot tell them apart: if they differ by less than 2 (D + 8) 2^-53, 5e-13 for D = 2,048, times the lengths
of the vectors where these are not 1. A wrong image with the embedding of a true match, because it is the same picture,
say, therefore counts against the system wherever the two stand in the gallery.

Several processes: give each a share of the queries and the whole gallery (a memory-mapped one is read, not copied), and
average their numbers with num_queries as weights. No query's result depends on the other queries.
"""

import math

import torch
from torch import Tensor

JUNK = -1  # pid of gallery images that are dropped
TOLERANCE = 2**-19  # error of the float32 product for vectors of length 1; raised where 4 x the error seen is more
SAMPLE = 64  # pairs of a block, beside the true matches, whose error is looked at
FAR = 1 / 64  # true matches behind more than this share of the gallery are compared with every image of a block
CHUNK = 16  # images of a block whose largest similarity alone is compared with the farthest of the other true matches
CROWDED = 1 / 64  # share of close calls from which a part is computed again in float64
LEAD = 128  # gallery images looked at before the first guess of which matches are far
SLICE = 256  # queries handled at a time on a CPU, so that they stay in its cache,
FAR_SLICE = 64  # and when far matches are compared with every image, again and again


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
    on the query's device, gallery_block rows (2048 on a CPU, 8192 elsewhere) against query_block at a time; only if
    memory runs out are both halved, which is said. An embedding of zeros has cosine similarity 0 to everything.
    Returns rank1, rank5, ... (one per entry of ranks), mAP, mAP_trapezoid, mINP: fractions from 0 to 1; num_queries:
    queries that have a true match. Raises ValueError if embeddings are not finite, empty or do not fit together, and
    if no query has a true match.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"Unknown metric {metric!r}: choose cosine or euclidean.")
    _refuse_no_numbers("query embeddings", query)
    _refuse_no_numbers("gallery embeddings", gallery)
    if len(query.shape) != 2 or len(gallery.shape) != 2 or not query.shape[1] == gallery.shape[1] > 0:
        raise ValueError(
            "Query and gallery embeddings must be tables of the same width, (Q, D) and (G, D), "
            f"not {tuple(query.shape)} and {tuple(gallery.shape)}."
        )
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    ids = _ids(query_pids, query_camids, gallery_pids, gallery_camids, len(query), len(gallery), device)
    gallery_block = gallery_block or (2048 if device.type == "cpu" else 8192)
    while True:
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                results = [
                    _rank_queries(query, gallery, ids, slice(first, first + query_block), metric, gallery_block)
                    for first in range(0, len(query), query_block)
                ]
            return _metrics(results, ranks)
        except (RuntimeError, MemoryError) as error:
            memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
            if not memory or max(query_block, gallery_block) <= 64:
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
    _refuse_no_numbers("distances", distance)
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
                    tally.count(score)
                else:
                    tally.count_float64(score, 0)
            results.append(tally.results())
    return _metrics(results, ranks)


def _rank_queries(all_queries, gallery, ids, here: slice, metric: str, gallery_block: int) -> Tensor:
    """The results of the queries in the slice `here`: (valid queries, 4), see _Tally.results."""
    device = ids[0].device
    query = _rows(all_queries, here, device)
    q, q_weight, q_size, _ = _vectors(query, metric, torch.float32)
    if not torch.isfinite(q_size).all():  # not finite, or only their squares are not, in float32
        _refuse_not_finite("query", all_queries, _magnitude(query, metric))
    q = q * q_weight[:, None]
    pairs = _Pairs(ids[0][here], ids[1][here], *ids[2:])
    if not pairs.match.any():
        return torch.empty(0, 4, dtype=torch.float64)
    pair_score = _pair_scores(query, gallery, pairs, metric)
    _refuse_not_finite("gallery", gallery, pair_score)
    tally = _Tally(pairs.query[pairs.match], pair_score[pairs.match], len(query))
    buffer = torch.empty(len(query), _round_up(min(gallery_block, len(gallery))), device=device)
    tolerance, seen = TOLERANCE, 0

    for begin, end in pairs.blocks(len(gallery), gallery_block):
        rows = _rows(gallery, slice(begin, end), device)
        g, g_weight, g_size, g_half = _vectors(rows, metric, torch.float32)
        if not torch.isfinite(g_size).all():
            _refuse_not_finite("gallery", gallery, _magnitude(rows, metric))
        width = len(rows)
        score = buffer[:, : _round_up(width)]  # (Q, width), and some columns that fill the last chunk
        torch.mm(q, g.T, out=score[:, :width])  # the product: all the rest is to cost little beside it
        if metric == "cosine":
            score[:, :width] *= g_weight
        else:
            score[:, :width] -= g_half

        # How far the product can be trusted: its error where the similarity is known, relative to the lengths.
        scale = q_size.double() * _power_of_two(g_size) + _power_of_two(g_half)
        inside = pairs.inside(begin, width)
        known = score[pairs.query[inside], pairs.item[inside] - begin]
        error = (known - pair_score[inside]).abs() / scale[pairs.query[inside]]
        row = torch.arange(SAMPLE, device=device)
        row, item = row * 7919 % len(query), row * 104729 % width  # spread over the block
        other = _similarity(query, row, rows, item, metric, 0)
        error = torch.cat([error, (score[row, item] - other).abs() / scale[row]])
        trusted = bool(scale.min() > 1e-30 and scale.max() < 1e30)
        if trusted and not 4 * error.max() <= tolerance:
            tolerance = 8 * error.max().item()
        trusted = trusted and tolerance < 1e-2

        if not trusted:
            score.zero_()
        pairs.drop(score, begin, width)
        tally.prepare(tolerance * scale, seen)
        close = tally.count(score) if trusted else None
        if close is not None:
            row, item, low, high = close
            tally.settle(_similarity(query, row, rows, item, metric, +1), low, high)
        else:  # too many close calls: the block again, in float64
            for first in range(0, len(query), SLICE):
                exact = _similarities(query[first : first + SLICE], rows, metric)
                exact.masked_fill_(score[first : first + SLICE, :width] == -torch.inf, -torch.inf)
                tally.count_float64(exact, first)
        seen += width
    return tally.results()


class _Pairs:
    """All P pairs of a query and a gallery image of the same person (junk aside), person by person.

    query, item (P,): indices. match (P,): whether the cameras differ; if not, the pair is dropped from the ranking.
    order (Q,), items (K,): the queries, and the gallery images of their people, by pid; row, place (P,): where a pair's
    images stand in them; people (N, 4): first and number of a person's queries in order, and of its images in items.
    item_sorted, by_item (P,): the pairs by gallery image. junk (J,): gallery images of pid -1.
    """

    def __init__(self, query_pids: Tensor, query_camids: Tensor, gallery_pids: Tensor, gallery_camids: Tensor):
        items = torch.isin(gallery_pids, query_pids).logical_and_(gallery_pids != JUNK).nonzero().squeeze(1)
        pids, order = gallery_pids[items].sort(stable=True)
        self.items = items[order]
        self.order = query_pids.argsort(stable=True)
        first = torch.searchsorted(pids, query_pids[self.order])
        count = torch.searchsorted(pids, query_pids[self.order], right=True) - first
        row = torch.arange(len(count), device=count.device).repeat_interleave(count)
        place = torch.arange(len(row), device=count.device) - (count.cumsum(0) - count - first)[row]
        self.query, self.item = self.order[row], self.items[place]
        self.match = query_camids[self.query] != gallery_camids[self.item]
        self.item_sorted, self.by_item = self.item.sort(stable=True)
        self.junk = (gallery_pids == JUNK).nonzero().squeeze(1)
        self.row, self.place = row, place
        queries = torch.unique_consecutive(query_pids[self.order], return_counts=True)[1]
        start = queries.cumsum(0) - queries
        self.people = torch.stack([start, queries, first[start], count[start]], 1)

    def inside(self, begin: int, width: int) -> Tensor:
        """Pairs whose gallery image is one of begin .. begin + width - 1."""
        return self.by_item[_between(self.item_sorted, begin, width)]

    def drop(self, score: Tensor, begin: int, width: int) -> None:
        """Take the pairs, the junk and what lies beyond the width out of the ranking: nothing is farther than -inf."""
        inside = self.inside(begin, width)
        score[self.query[inside], self.item[inside] - begin] = -torch.inf
        score[:, self.junk[_between(self.junk, begin, width)] - begin] = -torch.inf
        score[:, width:] = -torch.inf

    def blocks(self, num_gallery: int, size: int) -> list[tuple[int, int]]:
        """The gallery's blocks (begin, end). The one with most pairs, which shows the product's error, comes first, and
        of that a short piece, which shows the far matches."""
        lead = int(torch.bincount(self.item // size).argmax()) * size
        cuts = sorted({*range(0, num_gallery, size), min(lead + LEAD, lead + size, num_gallery), num_gallery})
        return sorted(zip(cuts[:-1], cuts[1:], strict=True), key=lambda block: not lead <= block[0] < lead + size)


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
        self.margin, self.looked = None, 0

    def prepare(self, margin: Tensor, seen: int) -> None:
        """Set the margin of doubt of each query (Q,) and choose the far matches, after `seen` gallery images."""
        if seen > 2 * self.looked:
            self.looked = seen
            is_far = self.counts() > FAR * seen
            self.far = torch.bincount(self.query[is_far], minlength=len(self.far))
        if self.margin is not None and torch.equal(margin, self.margin):
            return
        self.margin = margin
        lowest = torch.finfo(torch.float32).min  # what is dropped is lower still
        self.low = (self.score - margin[self.query]).float().clamp(min=lowest)  # from here on an image may be nearer,
        self.high = (self.score + margin[self.query]).float().clamp(min=lowest)  # from here on it is
        self.edges, order = torch.cat([_key(self.query, self.low), _key(self.query, self.high)]).sort()
        self.highs = torch.zeros(len(order) + 1, dtype=torch.int64, device=order.device)
        self.highs[1:] = (order >= len(self.low)).cumsum(0)

    def count(self, score: Tensor):
        """Count the images in score (Q, W), float32 similarities to the queries; what is not to be ranked is -inf.

        W is a multiple of CHUNK. Returns the close calls, to be settled: query and image, and the matches
        low .. high - 1 that may be farther or not. If they are too many, returns None and has counted nothing.
        """
        start, end = self.start[:-1], self.start[1:]
        far, rows = self.far.sort(descending=True)
        far = far.clamp(max=far[min(15, len(far) - 1)])  # it does not pay for a few queries alone
        far_row, far_match, sure, maybe = self._compare(score, far, rows)
        first = start.index_add(0, rows, far)  # (Q,) the matches from here on are not far

        # The others: only images above the farthest of them, sorted in among the matches.
        cut = torch.where(first < end, self.low[first.clamp(max=len(self.low) - 1)], torch.inf)
        row, item = _above(score, cut)
        at = torch.searchsorted(self.edges, _key(row, score[row, item]), right=True)
        low = self.highs[at]  # beyond the query's matches before this one for certain,
        high = torch.maximum(at - low, first[row])  # not beyond those from this one on
        low = torch.maximum(low, first[row])

        close, far_close = (low < high).nonzero().squeeze(1), (sure < maybe).nonzero().squeeze(1)
        if len(close) + (maybe - sure).sum() > CROWDED * score.numel():
            return None
        self.above.index_add_(0, low + row, torch.ones_like(row))
        found = torch.bincount(row, minlength=len(score))  # these are above the far matches, too, and counted there
        self.wrong.index_add_(0, far_match, sure.long() - found[far_row])

        calls = [(row[close], item[close], low[close], high[close])]
        for part in far_close.split(-(-len(score) // 4)):  # a quarter of a block at a time
            rows, match = far_row[part], far_match[part]
            value = score[rows]
            which, item = ((value >= self.low[match, None]) & (value < self.high[match, None])).nonzero().unbind(1)
            calls.append((rows[which], item, match[which], match[which] + 1))
        return tuple(torch.cat(column) for column in zip(*calls, strict=True))

    def _compare(self, score: Tensor, far: Tensor, rows: Tensor):
        """Compare far matches with every image: (query, match, number of images nearer for certain, and maybe).

        far (Q,): number of far matches, descending; rows (Q,): their queries.
        """
        sizes = (far[:, None] > torch.arange(int(far[0]), device=far.device)).sum(0).tolist()  # queries per level
        far_row = torch.cat([rows[:0], *(rows[:size] for size in sizes)])
        far_match = torch.cat([rows[:0], *(self.start[rows[:size]] + level for level, size in enumerate(sizes))])
        low, high = self.low[far_match, None], self.high[far_match, None]
        sure, maybe = score.new_empty(len(far_row)), score.new_empty(len(far_row))
        piece = FAR_SLICE if score.device.type == "cpu" else len(score)
        passed = score.new_empty(min(piece, len(score)), score.shape[1])  # 0.0 or 1.0: as floats, these are fastest
        for first in range(0, max(sizes, default=0), piece):
            part = score.index_select(0, rows[first : min(first + piece, sizes[0])])
            offset = first
            for size in sizes:
                count = min(size - first, piece)
                if count <= 0:
                    break
                these = slice(offset, offset + count)
                torch.sum(torch.ge(part[:count], high[these], out=passed[:count]), 1, out=sure[these])
                torch.sum(torch.ge(part[:count], low[these], out=passed[:count]), 1, out=maybe[these])
                offset += size
        return far_row, far_match, sure, maybe

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
            "images come from one camera, give each a camera of its own (--ignore-cameras does)."
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
        if not isinstance(column, Tensor):
            try:
                column = torch.tensor(_native(column))
            except (TypeError, ValueError, RuntimeError):  # text, objects, rows of different lengths, beyond 64 bits
                raise ValueError(f"{name} must be integers that fit 64 bits.") from None
        if column.is_floating_point() or column.is_complex() or column.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, not {column.dtype}.")
        if column.dtype == torch.uint64 and (column.view(torch.int64) < 0).any():
            raise ValueError(f"{name} must be integers below 2**63.")
        if column.shape != (length,):
            raise ValueError(f"{name} must hold an integer per image, shape ({length},), not {tuple(column.shape)}.")
        columns.append(column.to(device, torch.int64))
    return columns


def _native(array):
    """The array in the byte order of this machine, which torch asks for; anything else as it is."""
    foreign = hasattr(array, "dtype") and not array.dtype.isnative
    return array.astype(array.dtype.newbyteorder("=")) if foreign else array


def _refuse_no_numbers(name: str, table) -> None:
    """ValueError unless a tensor or array holds real numbers of at most 64 bits."""
    dtype = table[:0].dtype if len(table.shape) else table.dtype
    if isinstance(dtype, torch.dtype):
        good = not dtype.is_complex and dtype != torch.bool
    else:
        good = dtype.kind in "fiu" and dtype.itemsize <= 8
    if not good:
        raise ValueError(f"The {name} must be numbers (float16, float32 or float64), not {dtype}.")


def _rows(table, index, device) -> Tensor:
    """Rows of a tensor or array, by slice or index tensor, as a tensor on the device."""
    if isinstance(table, Tensor):
        part = table.index_select(0, index.to(table.device)) if isinstance(index, Tensor) else table[index]
        return part.to(device)
    rows = _native(table[index.cpu().numpy() if isinstance(index, Tensor) else index])
    return (torch.as_tensor(rows) if rows.flags.writeable else torch.tensor(rows)).to(device)


def _vectors(rows: Tensor, metric: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors x (n, D) and, each (n,), weight, size, half: similarity = product of x * weights - half of the gallery's.

    cosine: weight 1 / length, size 1 (both 0 for zeros), half 0. euclidean: weight 1, size = length, half =
    length^2 / 2. The rounding error of a similarity is relative to size * size + half.
    """
    x = rows.to(dtype)
    length = torch.linalg.vector_norm(x, dim=1)
    if metric == "euclidean":
        return x, torch.ones_like(length), length, length.square() / 2
    if dtype == torch.float32 and not ((length > 1e-15) & (length < 1e15)).all():  # zeros, or too far from 1 to square
        x, weight, size, half = _vectors(rows, metric, torch.float64)
        return (x * weight[:, None]).float(), size.float(), size.float(), half.float()
    odd = (length < 1e-100) | (length > 1e100)
    if odd.any():  # zeros, which stay zeros, or rows whose squares or weights leave the range of float64
        largest = x[odd].abs().amax(1, keepdim=True)
        x = x.index_put((odd,), x[odd] / torch.where(largest > 0, largest, 1))
        length = torch.linalg.vector_norm(x, dim=1)
    weight = torch.where(length > 0, 1 / length, length)
    return x, weight, weight * length, torch.zeros_like(length)


def _pair_scores(query: Tensor, gallery, pairs: _Pairs, metric: str) -> Tensor:
    """Similarity of each pair, rounded down, (P,) float64."""
    score = torch.empty(len(pairs.query), dtype=torch.float64, device=query.device)
    if query.device.type != "cpu":  # all pairs alike; on a CPU a small product per person is faster
        for part in torch.arange(len(score), device=query.device).split(8192):
            items, place = pairs.item[part].unique(return_inverse=True)
            rows = _rows(gallery, items, query.device)
            score[part] = _similarity(query, pairs.query[part], rows, place, metric, -1)
        return score

    tiles, done = [], 0  # a person's queries x up to 1024 of the person's images
    for start, queries, first, images in pairs.people.tolist():
        product = score[done : done + queries * images].view(queries, images)
        for k in range(0, images, 1024):
            tiles.append((start, start + queries, first + k, first + min(k + 1024, images), product[:, k : k + 1024]))
        done += queries * images
    x_weight, x_size = torch.empty(2, len(query), dtype=torch.float64)
    y_weight, y_size, y_half = torch.empty(3, len(pairs.items), dtype=torch.float64)
    while tiles:  # the vectors of some people at a time
        group = [tile for tile in tiles[:32] if tile[3] - tiles[0][2] <= 128] or tiles[:1]
        tiles = tiles[len(group) :]
        a, b, c, d = group[0][0], group[-1][1], group[0][2], group[-1][3]
        x, x_weight[a:b], x_size[a:b], _ = _vectors(query.index_select(0, pairs.order[a:b]), metric, torch.float64)
        rows = _rows(gallery, pairs.items[c:d], query.device)
        y, y_weight[c:d], y_size[c:d], y_half[c:d] = _vectors(rows, metric, torch.float64)
        for start, stop, first, last, product in group:
            product.copy_(x[start - a : stop - a] @ y[first - c : last - c].T)
    score *= x_weight[pairs.row] * y_weight[pairs.place]
    half = y_half[pairs.place]
    return score - half - _rounding(query) * (x_size[pairs.row] * y_size[pairs.place] + half)


def _similarity(query: Tensor, row: Tensor, gallery: Tensor, item: Tensor, metric: str, sign: int) -> Tensor:
    """Similarity of query row[n] and gallery image item[n], (N,) float64, rounded up (sign 1), down (-1) or not (0)."""
    step = 64 if query.device.type == "cpu" else 8192
    score = [torch.empty(0, dtype=torch.float64, device=query.device)]
    for x, y in zip(row.split(step), item.split(step), strict=True):
        x, x_weight, x_size, _ = _vectors(query.index_select(0, x), metric, torch.float64)
        y, y_weight, y_size, y_half = _vectors(gallery.index_select(0, y), metric, torch.float64)
        score.append((x * y).sum(1) * (x_weight * y_weight) - y_half + sign * _rounding(x) * (x_size * y_size + y_half))
    return torch.cat(score)


def _similarities(query: Tensor, gallery: Tensor, metric: str) -> Tensor:
    """Similarities of all queries and gallery images given, (R, W) float64, rounded up."""
    x, x_weight, x_size, _ = _vectors(query, metric, torch.float64)
    y, y_weight, y_size, y_half = _vectors(gallery, metric, torch.float64)
    score = (x @ y.T).mul_(x_weight[:, None] * y_weight).sub_(y_half)
    return score.add_(_rounding(x) * (x_size[:, None] * y_size + y_half))


def _rounding(vectors: Tensor) -> float:
    """Bound of the error of a float64 similarity of vectors of length 1: D products and sums, and a few operations."""
    return (vectors.shape[1] + 8) * 2.0**-53


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


def _magnitude(rows: Tensor, metric: str) -> Tensor:
    """How large the similarities of each row may become in float64, (n,); NaN or infinite as the row is."""
    _, _, size, half = _vectors(rows, metric, torch.float64)
    return size + half


def _refuse_not_finite(name: str, table, sample: Tensor) -> None:
    """If the sample, similarities or magnitudes, is not finite or nearly so, name the embeddings to blame."""
    if (sample.abs() < 1e300).all():
        return
    bad = []
    for first in range(0, len(table), 4096):
        rows = _rows(table, slice(first, first + 4096), sample.device)
        bad += (first + (~torch.isfinite(rows).all(1)).nonzero().squeeze(1)).tolist()
    if not bad:
        raise ValueError(f"The {name} embeddings are too large to be compared: scale them down.")
    raise ValueError(
        f"{len(bad)} of {len(table)} {name} embeddings hold NaN or infinite values: images "
        f"{', '.join(map(str, bad[:10]))}{', ...' if len(bad) > 10 else ''} (counted from 0)."
    )
