"""CMC, mAP and mINP for re-identification (Market-1501 protocol, single query), by counting instead of sorting.

For each query, gallery images that are junk (pid -1) or have the query's pid and camera are dropped; all others stay.

    rank of the i-th nearest true match = i + number of wrong images that are nearer or equally near

so equal distances count against the system, whatever the order of the gallery. For n true matches:

    AP            = mean of i / rank_i                                              (torchreid, fast-reid, sklearn)
    AP_trapezoid  = mean of ((i - 1) / (rank_i - 1) + i / rank_i) / 2, 0/0 being 1  (Market's MATLAB code; lower)
    INP           = n / rank_n                                                      (AGW, fast-reid)
    rank-k        = 1 if rank_1 <= k, else 0

and the metrics are means over the queries with a true match. First come the similarities of the few true matches, then
the gallery in blocks: a product with the queries, and counting.
Precision: whole float32, metrics equal to those of float64 to 1e-5; with float64 embeddings float64 throughout.
Similarities within SLACK x (sum of the lengths)^2 are equal: rounding differs from block to block, and a copy of a true
match under another name counts against the system wherever it stands."""

import torch
from torch import Tensor

JUNK = -1  # pid of gallery images that are dropped
SLACK = {torch.float32: 1e-7, torch.float64: 2.5e-13}
SLICE = 256  # queries whose comparisons stay in a processor's cache


def rank_metrics(query, query_pids, query_camids, gallery, gallery_pids, gallery_camids, metric: str = "cosine",
                 ranks=(1, 5, 10, 20), query_block: int = 4096, gallery_block: int | None = None) -> dict[str, float]:
    """Score the retrieval of query (Q, D) in gallery (G, D): rank_queries and average, where more is said."""
    columns = query, query_pids, query_camids, gallery, gallery_pids, gallery_camids
    return average(rank_queries(*columns, metric, query_block, gallery_block), ranks)


def metrics_from_distance(distance, query_pids, query_camids, gallery_pids, gallery_camids, ranks=(1, 5, 10, 20)):
    """The same numbers from a matrix of distances (Q, G), small = alike: rank_queries_from_distance and average."""
    return average(rank_queries_from_distance(distance, query_pids, query_camids, gallery_pids, gallery_camids), ranks)


def average(results: dict[str, Tensor], ranks=(1, 5, 10, 20)) -> dict[str, float]:
    """Means over the queries with a true match, 0..1: rank1, ... (of ranks), mAP, mAP_trapezoid, mINP; num_queries."""
    if not (valid := results["num_matches"] > 0).any():
        raise ValueError("No query has a true match by another camera; with one camera only, use --ignore-cameras.")
    num_matches, first, last, ap, ap_trapezoid = (column[valid].double() for column in results.values())
    means = {f"rank{k}": (first <= k).double() for k in ranks}
    means |= {"mAP": ap, "mAP_trapezoid": ap_trapezoid, "mINP": num_matches / last}
    return {**{key: value.mean().item() for key, value in means.items()}, "num_queries": len(first)}


@torch.no_grad()
def rank_queries(query, query_pids, query_camids, gallery, gallery_pids, gallery_camids, metric: str = "cosine",
                 query_block: int = 4096, gallery_block: int | None = None) -> dict[str, Tensor]:
    """For each query the number of its true matches, the ranks of the first and the last, and both average precisions.

    query (Q, D), gallery (G, D): tensors or arrays, also memory-mapped ones, compared by "cosine" or "euclidean"
    distance; zeros have cosine similarity 0 to everything. pids and camids (Q,), (G,): integers. The work is done on
    the query's device, gallery_block rows (2048 on a CPU, 8192 elsewhere) against query_block at a time.
    Returns num_matches, first_rank, last_rank (int64), ap, ap_trapezoid (float64), each (Q,) on the CPU; 0 for a query
    without a match. ValueError if embeddings are not finite, empty or do not fit together."""
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"Unknown metric {metric!r}: choose cosine or euclidean.")
    if not len(query.shape) == len(gallery.shape) == 2 or query.shape[1] != gallery.shape[1] or 0 in gallery.shape:
        shapes = f"(Q, D) and (G, D), not {tuple(query.shape)} and {tuple(gallery.shape)}"
        raise ValueError(f"Query and gallery embeddings must be tables of the same width, {shapes}.")
    device, parts = query.device if isinstance(query, Tensor) else torch.device("cpu"), []
    ids = integer_ids(device, len(query), len(gallery), query_pids, query_camids, gallery_pids, gallery_camids)
    double = torch.float64 in [rows_of(table, slice(1), device).dtype for table in (query, gallery)]
    how = dict(device=device, dtype=torch.float64 if double else torch.float32, metric=metric)
    gallery_block = min(gallery_block or (2048 if device.type == "cpu" else 8192), len(gallery))
    products, setting, exact = torch.backends.cuda.matmul, "allow_tf32", False
    if hasattr(products, "fp32_precision"):  # since torch 2.9
        products = products if device.type == "cuda" else torch.backends.mkldnn.matmul
        setting, exact = "fp32_precision", "ieee"
    before = getattr(products, setting)
    setattr(products, setting, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            for first in range(0, len(query), query_block):
                here = slice(first, first + query_block)
                people, vectors = _people(ids[0][here], ids[1][here], *ids[2:]), _vectors("query", query, here, **how)
                parts.append(_count(people, ids[2] == JUNK, *_compare(vectors, gallery, people, gallery_block, how)))
    finally:
        setattr(products, setting, before)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@torch.no_grad()
def rank_queries_from_distance(distance, query_pids, query_camids, gallery_pids, gallery_camids) -> dict[str, Tensor]:
    """What rank_queries returns, from a matrix of distances (Q, G), tensor or array, finite and compared as it is."""
    if len(distance.shape) != 2 or 0 in distance.shape:
        raise ValueError(f"The distances must be a matrix (Q, G), not of shape {tuple(distance.shape)}.")
    device = distance.device if isinstance(distance, Tensor) else torch.device("cpu")
    ids, parts = integer_ids(device, *distance.shape, query_pids, query_camids, gallery_pids, gallery_camids), []
    for here in (slice(first, first + SLICE) for first in range(0, len(distance), SLICE)):
        people = order, images, place, *_ = _people(ids[0][here], ids[1][here], *ids[2:])
        score = rows_of(distance, here, device)[order]
        score = -score.to(torch.float32 if score.dtype == torch.float32 else torch.float64)
        if not score.isfinite().all():
            raise ValueError("Some distances are NaN or infinite: all of them must be finite numbers.")
        parts.append(_count(people, ids[2] == JUNK, score.gather(1, images[place]), [(0, score)]))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _compare(vectors, gallery, people, gallery_block: int, how: dict):
    """Similarities of some queries (Q, D): to their people (Q, M), less the slack, and to the gallery in blocks."""
    order, images, place, same, _ = people
    query, size, _ = (column[order] for column in vectors)
    buffer = query.new_empty(len(query), gallery_block)
    to_person, start, end = query.new_zeros(place.shape), place[:, 0], place[:, 0] + same.sum(1)
    for row in start.argsort().split(128 if query.device.type == "cpu" else -(-gallery_block // 8)):  # by person
        first, last = int(start[row].min()), int(end[row].max())
        rows, length, half = _vectors("gallery", gallery, images[first : last + 1], **how)
        score = torch.addmm(-half, query[row], rows.T) - SLACK[query.dtype] * (size[row, None] + length).square()
        to_person[row] = score.gather(1, (place[row] - first).clamp(max=last - first))

    def block(begin: int) -> Tensor:
        rows, _, half = _vectors("gallery", gallery, slice(begin, begin + gallery_block), **how)
        return torch.addmm(-half, query, rows.T, out=buffer[:, : len(rows)])

    return to_person, ((begin, block(begin)) for begin in range(0, len(gallery), gallery_block))


def _people(query_pids: Tensor, query_camids: Tensor, gallery_pids: Tensor, gallery_camids: Tensor):
    """order (Q,): the queries by falling number of true matches, in which the others stand; images (K + 1,): those of
    all their people, by pid, and one more; place, same, match (Q, M): where in images, is it used, a true match?"""
    images = (torch.isin(gallery_pids, query_pids) & (gallery_pids != JUNK)).nonzero().squeeze(1)
    pids, by_pid = gallery_pids[images].sort(stable=True)
    images = torch.cat([images[by_pid], images.new_zeros(1)])
    first, last = (torch.searchsorted(pids, query_pids, right=right)[:, None] for right in (False, True))
    slot = torch.arange(max(int((last - first).max()), 1), device=first.device)
    place, same = (first + slot).clamp(max=len(pids)), slot < last - first
    match = same & (query_camids[:, None] != gallery_camids[images[place]])
    order = match.sum(1).argsort(descending=True)
    return order, images, place[order], same[order], match[order]


def _count(people, junk: Tensor, to_person: Tensor, blocks) -> dict[str, Tensor]:
    """What rank_queries returns, from similarities to a person's images (Q, M) and blocks: (first image, (Q, n))."""
    order, images, place, same, match = people
    threshold = to_person.masked_fill_(~match, -torch.inf).sort(1, descending=True)[0]  # the nearest match first
    wrong = torch.zeros_like(threshold, dtype=torch.float64)
    row, slot = same.nonzero().unbind(1)
    item, by_item = images[place[row, slot]].sort()
    row, cpu = row[by_item], row.device.type == "cpu"
    step, count = (SLICE, _compare_in_turn) if cpu else (len(order), _search_at_once)
    for begin, similarity in blocks:
        first, last = torch.searchsorted(item, item.new_tensor([begin, end := begin + similarity.shape[1]])).tolist()
        similarity[row[first:last], item[first:last] - begin] = -torch.inf  # not a wrong image, nor is junk
        similarity[:, junk[begin:end]] = -torch.inf
        for part in zip(similarity.split(step), threshold.split(step), wrong.split(step), strict=True):
            count(*part)
    num, i = match.sum(1), torch.arange(1, wrong.shape[1] + 1, device=wrong.device)
    rank = (i + wrong).masked_fill_(i > num[:, None], 0)
    before = torch.where(rank > 1, (i - 1) / (rank - 1), 1.0)
    ap, both = (torch.where(rank > 0, value, 0).sum(1) / num.clamp(min=1) for value in (i / rank, before + i / rank))
    columns = dict(num_matches=num, first_rank=rank[:, 0].long(), last_rank=rank.amax(1).long(), ap=ap)
    columns["ap_trapezoid"] = both / 2
    return {key: torch.empty_like(column).index_copy_(0, order, column).cpu() for key, column in columns.items()}


def _compare_in_turn(score: Tensor, threshold: Tensor, wrong: Tensor) -> None:
    """Adds the number of images of score (q, n) that reach each threshold (q, M, falling; -inf: no match) to wrong."""
    above = torch.empty_like(score)  # 0.0 or 1.0: summed faster than bools
    for j, n in enumerate((threshold > -torch.inf).sum(0).tolist()):  # the first n queries have a j-th match
        wrong[:n, j] += torch.ge(score[:n], threshold[:n, j : j + 1], out=above[:n]).sum(1)


def _search_at_once(score: Tensor, threshold: Tensor, wrong: Tensor) -> None:  # the same: faster on a GPU only
    place = torch.searchsorted(-threshold, -score)  # of the first threshold that an image reaches
    found = score.new_zeros(len(wrong), wrong.shape[1] + 1)
    wrong += found.scatter_add_(1, place, found.new_ones(1, 1).expand_as(place)).cumsum(1)[:, :-1]


def _vectors(name: str, table, index: Tensor | slice, device, dtype: torch.dtype, metric: str):
    """Rows (n, D), their lengths and halves (n,): similarity = query @ row - half. ValueError if one is not finite."""
    rows = rows_of(table, index, device).to(dtype)
    square = rows.square().sum(1) if metric == "euclidean" else torch.linalg.vector_norm(rows, dim=1).square()
    if len(bad := (~square.isfinite()).nonzero().squeeze(1)[:10]):
        images = (index[bad] if isinstance(index, Tensor) else bad + index.start).unique().tolist()
        raise ValueError(f"{name} embeddings hold NaN, infinite or giant values, such as images {images}, from 0 on.")
    if metric == "euclidean":
        return rows, square.sqrt(), square / 2
    return rows / square.sqrt().clamp(min=1e-30)[:, None], torch.ones_like(square), torch.zeros_like(square)


def rows_of(table, index: Tensor | slice, device: torch.device) -> Tensor:
    """Rows of a tensor or of an array (memory-mapped, of any byte order), on the device."""
    if isinstance(table, Tensor):
        return table[index.to(table.device) if isinstance(index, Tensor) else index].to(device)
    rows = table[index.cpu().numpy() if isinstance(index, Tensor) else index]
    return torch.as_tensor(rows.astype(rows.dtype.newbyteorder("="), copy=not rows.flags.writeable), device=device)


def integer_ids(device, num_query: int, num_gallery: int, *columns) -> list[Tensor]:
    """query_pids, query_camids, gallery_pids, gallery_camids as int64 on the device, checked."""
    columns = [torch.as_tensor(c.astype(c.dtype.newbyteorder("=")) if hasattr(c, "astype") else c) for c in columns]
    for column, n in zip(columns, (num_query, num_query, num_gallery, num_gallery), strict=True):
        if column.is_floating_point() or column.dtype == torch.bool or column.shape != (n,) or n == 0:
            raise ValueError(f"pids and camids must be {n} integers here, not {tuple(column.shape)} {column.dtype}.")
    return [column.to(device, torch.int64) for column in columns]
