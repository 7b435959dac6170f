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
"""

import torch
from torch import Tensor

JUNK = -1
ROUNDING = 1e-12  # similarities this close, relative to the embeddings' size, are equal


def rank_metrics(
    query,
    query_pids,
    query_camids,
    gallery,
    gallery_pids,
    gallery_camids,
    metric: str = "cosine",
    ranks=(1, 5, 10, 20),
    query_block: int = 256,
    gallery_block: int = 4096,
) -> dict[str, float]:
    """Score the retrieval of query (Q, D) in gallery (G, D), compared by "cosine" or "euclidean" distance.

    Embeddings are tensors or arrays; pids and camids (Q,), (G,) any integers. The work is done on the query's device,
    gallery rows are read a block at a time. An embedding of zeros has cosine similarity 0 to everything.
    Returns {rank1, rank5, ..., mAP, mAP_trapezoid, mINP: fractions from 0 to 1, num_queries: queries with a match}.
    Raises ValueError for features that are not finite, empty or do not fit together, and if no query has a match.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"Unknown metric {metric!r}: choose cosine or euclidean.")
    if len(query.shape) != 2 or len(gallery.shape) != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"Query and gallery embeddings must be two tables of one width (Q, D) and (G, D), "
            f"not {tuple(query.shape)} and {tuple(gallery.shape)}."
        )
    query = torch.as_tensor(query)
    ids = _ids(query_pids, query_camids, gallery_pids, gallery_camids, len(query), len(gallery), query.device)
    pair_query, pair_item, match = _same_person(*ids)
    junk = ids[2] == JUNK
    q = _vectors(query, metric, "query", 0)
    pair_score = torch.empty(len(pair_query), dtype=torch.float64, device=query.device)
    for first in range(0, len(pair_query), 4096):
        part = slice(first, first + 4096)
        g = _vectors(_rows(gallery, pair_item[part], query.device), metric, "gallery", 0)
        pair_score[part] = _row_similarity(q[pair_query[part]], g, metric)
    tables = _Table.of(pair_query[match], pair_score[match], len(query))
    for begin in range(0, len(gallery), gallery_block):
        g = _vectors(_rows(gallery, slice(begin, begin + gallery_block), query.device), metric, "gallery", begin)
        for first in range(0, len(query), query_block):
            last = min(first + query_block, len(query))
            score = q[first:last] @ g.T
            if metric == "euclidean":
                score -= g.pow(2).sum(1) / 2
            score[:, junk[begin : begin + len(g)]] = -torch.inf
            here = (pair_query >= first) & (pair_query < last) & (pair_item >= begin) & (pair_item < begin + len(g))
            score[pair_query[here] - first, pair_item[here] - begin] = -torch.inf
            tables.count(score, first)
    return tables.metrics(ranks)


def metrics_from_distance(
    distance, query_pids, query_camids, gallery_pids, gallery_camids, ranks=(1, 5, 10, 20)
) -> dict[str, float]:
    """The same numbers from a ready distance matrix (Q, G), small = alike."""
    distance = torch.as_tensor(distance)
    if distance.ndim != 2:
        raise ValueError(f"The distance matrix must have two dimensions (Q, G), not the shape {tuple(distance.shape)}.")
    ids = _ids(query_pids, query_camids, gallery_pids, gallery_camids, *distance.shape, distance.device)
    pair_query, pair_item, match = _same_person(*ids)
    junk = ids[2] == JUNK
    score = -distance.double()
    if not torch.isfinite(score).all():
        raise ValueError("The distance matrix holds NaN or infinite values.")
    tables = _Table.of(pair_query[match], score[pair_query[match], pair_item[match]], len(distance), slack=0.0)
    score[:, junk] = -torch.inf
    score[pair_query, pair_item] = -torch.inf
    for first in range(0, len(distance), 256):
        tables.count(score[first : first + 256], first)
    return tables.metrics(ranks)


class _Table:
    """True matches of every query, nearest last, (Q, P) padded in front with +inf, and the wrong images counted."""

    @classmethod
    def of(cls, match_query: Tensor, match_score: Tensor, num_queries: int, slack: float = ROUNDING):
        if len(match_query) == 0:
            raise ValueError(
                "No query has a true match under another camera, so there is nothing to score: with images of one "
                "camera only, use --ignore-cameras (every image then counts as a camera of its own)."
            )
        self = cls()
        order = torch.argsort(match_score, stable=True)
        order = order[torch.argsort(match_query[order], stable=True)]
        match_query, match_score = match_query[order], match_score[order]
        self.matches = torch.bincount(match_query, minlength=num_queries)  # (Q,)
        width = int(self.matches.max())
        place = torch.arange(len(order), device=order.device) - (self.matches.cumsum(0) - self.matches)[match_query]
        self.threshold = match_score.new_full((num_queries, width), torch.inf)
        self.threshold[match_query, place] = match_score - slack * match_score.abs().clamp(min=1)
        self.beaten = torch.zeros(num_queries, width + 1, dtype=torch.int64, device=order.device)
        return self

    def count(self, score: Tensor, first: int) -> None:
        rows = slice(first, first + len(score))
        beaten = torch.searchsorted(self.threshold[rows].contiguous(), score.contiguous(), right=True)
        beaten[score == -torch.inf] = 0
        self.beaten[rows].scatter_add_(1, beaten, torch.ones_like(beaten))

    def metrics(self, ranks) -> dict[str, float]:
        wrong = self.beaten[:, 1:].flip(1).cumsum(1)
        wrong = wrong.flip(1)  # a wrong image that beats k matches beats the k farthest
        valid = self.matches > 0
        place = torch.arange(wrong.shape[1], device=wrong.device)
        i = (self.matches[:, None] - place).double()  # 1 = nearest
        real = place < self.matches[:, None]
        rank = torch.where(real, i + wrong, 1.0)
        n = self.matches[valid].double()
        precision = torch.where(real, i / rank, 0.0)
        before = torch.where(rank > 1, (i - 1) / (rank - 1).clamp(min=1), 1.0)
        trapezoid = torch.where(real, (before + i / rank) / 2, 0.0)
        best = torch.where(real, rank, torch.inf).amin(1)[valid]
        metrics = {f"rank{k}": (best <= k).double().mean().item() for k in ranks}
        metrics["mAP"] = (precision.sum(1)[valid] / n).mean().item()
        metrics["mAP_trapezoid"] = (trapezoid.sum(1)[valid] / n).mean().item()
        metrics["mINP"] = (n / rank[valid, 0]).mean().item()
        metrics["num_queries"] = int(valid.sum())
        return metrics


def _ids(query_pids, query_camids, gallery_pids, gallery_camids, num_query, num_gallery, device):
    """The four columns as int64 on one device, their lengths checked."""
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
        if column.shape != (length,):
            raise ValueError(f"{name} must hold one integer per image, shape ({length},), not {tuple(column.shape)}.")
        if column.is_floating_point() or column.is_complex():
            raise ValueError(f"{name} must be integers, not {column.dtype}.")
        columns.append(column.to(device, torch.int64))
    return columns


def _same_person(query_pids, query_camids, gallery_pids, gallery_camids):
    """All pairs of one pid (junk aside): query index, gallery index, and whether the cameras differ (a true match)."""
    sorted_pids, order = torch.sort(gallery_pids, stable=True)
    first = torch.searchsorted(sorted_pids, query_pids)
    count = torch.searchsorted(sorted_pids, query_pids, right=True) - first
    count[query_pids == JUNK] = 0
    pair_query = torch.repeat_interleave(torch.arange(len(query_pids), device=query_pids.device), count)
    within = torch.arange(len(pair_query), device=query_pids.device) - (count.cumsum(0) - count)[pair_query]
    pair_item = order[first[pair_query] + within]
    return pair_query, pair_item, query_camids[pair_query] != gallery_camids[pair_item]


def _rows(table, index, device) -> Tensor:
    """Rows of a tensor or array as a tensor on the device."""
    if isinstance(index, Tensor) and not isinstance(table, Tensor):
        index = index.cpu().numpy()
    elif isinstance(index, Tensor):
        index = index.to(table.device)
    return torch.as_tensor(table[index]).to(device)


def _vectors(block: Tensor, metric: str, name: str, begin: int) -> Tensor:
    """float64 vectors, unit length for cosine."""
    block = block.double()
    finite = torch.isfinite(block).all(1)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten() + begin
        raise ValueError(
            f"{len(bad)} {name} embeddings are not finite (NaN or infinite): images "
            f"{', '.join(map(str, bad[:10].tolist()))}{', ...' if len(bad) > 10 else ''}."
        )
    return torch.nn.functional.normalize(block) if metric == "cosine" else block


def _row_similarity(a: Tensor, b: Tensor, metric: str) -> Tensor:
    score = (a * b).sum(1)
    return score if metric == "cosine" else score - b.pow(2).sum(1) / 2
