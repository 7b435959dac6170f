"""Verification: do two images show one person? True and false match rates over all pairs that the protocol keeps.

Pairs are query x gallery without junk (pid -1) and without the query's own person in its own camera; distractors
(pid 0) are other people. Two images are taken for one person if their similarity reaches a threshold:

    TPR = share of the pairs of one person that reach it       FPR = share of the pairs of two people that reach it

The similarities are counted in a histogram so fine that a threshold is right to 1e-4; no table of all pairs is built. A
threshold found on a test set describes that set; one for use has to be found on other people (train.py --eval-on val).
"""

import math
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from utils.ranking import JUNK, integer_ids, rows_of

WIDTH, MOST = 2e-5, 2**22  # of a bin of the histogram; most bins
RATES = (1e-2, 1e-3, 1e-4)  # false positive rates that are reported


class Pairs(NamedTuple):
    """Two histograms of similarities: bin i holds those from low + i * width to low + (i + 1) * width."""

    low: float
    width: float
    positive: Tensor  # (N,) int64, pairs of one person
    negative: Tensor  # (N,) int64, pairs of two people


def similarities(query: Tensor, gallery: Tensor, metric: str = "cosine") -> Tensor:
    """(Q, D), (G, D) -> (Q, G) float64, large = alike: the cosine, or for "euclidean" minus the distance."""
    query, gallery = query.double(), gallery.double()
    if metric == "euclidean":
        return -torch.cdist(query, gallery, compute_mode="use_mm_for_euclid_dist")
    query, gallery = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30) for rows in (query, gallery))
    return query @ gallery.T


@torch.no_grad()
def count_pairs(
    query, query_pids, query_camids, gallery, gallery_pids, gallery_camids, metric: str = "cosine", block: int = 2048
) -> Pairs:
    """Counts all pairs of query (Q, D) and gallery (G, D), tensors or arrays, on the query's device, block by block.

    pids and camids (Q,), (G,): integers. Raises ValueError if there is no pair of one person, or none of two people.
    """
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    ids = integer_ids(device, len(query), len(gallery), query_pids, query_camids, gallery_pids, gallery_camids)
    query_pids, query_camids, gallery_pids, gallery_camids = ids
    query = rows_of(query, slice(None), device)
    slices = [slice(first, first + block) for first in range(0, len(gallery), block)]
    low, high = -1.0, 1.0
    if metric == "euclidean":
        longest = max(rows_of(gallery, here, device).double().norm(dim=1).max().item() for here in slices)
        low, high = -(query.double().norm(dim=1).max().item() + longest), 0.0
    num_bins = min(math.ceil((high - low) / WIDTH) + 1, MOST)
    width = max((high - low) / (num_bins - 1), 1e-30)
    counts = torch.zeros(2, num_bins, dtype=torch.int64, device=device)  # all others, those of one person
    for here in slices:
        used = gallery_pids[here] != JUNK
        pids, camids, table = gallery_pids[here][used], gallery_camids[here][used], rows_of(gallery, here, device)[used]
        for mine in (slice(first, first + block) for first in range(0, len(query), block)):
            place = ((similarities(query[mine], table, metric) - low) / width).long().clamp_(0, num_bins - 1)  # (q, g)
            same = query_pids[mine, None] == pids
            match = same & (query_camids[mine, None] != camids)
            counts[0] += torch.bincount(place.flatten(), minlength=num_bins)
            counts[0] -= torch.bincount(place[same], minlength=num_bins)
            counts[1] += torch.bincount(place[match], minlength=num_bins)
    for count, whom in zip(counts, ("two people", "one person under two cameras"), strict=True):
        if not count.any():
            raise ValueError(f"Verification needs pairs of {whom}, and there is none.")
    return Pairs(low, width, counts[1].cpu(), counts[0].cpu())


def rates(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds (N + 1,), rising, and the TPR and FPR of each."""
    edges = pairs.low + pairs.width * torch.arange(len(pairs.positive) + 1, dtype=torch.float64)
    reached = [torch.cat([count.flip(0).cumsum(0).flip(0), count.new_zeros(1)]) for count in pairs[2:]]
    return edges, *(count.double() / count[0] for count in reached)


def at_rate(pairs: Pairs, rate: float) -> dict[str, float]:
    """The smallest threshold with an FPR of at most `rate`; its TPR, and the number of pairs it takes wrongly."""
    edges, tpr, fpr = rates(pairs)
    place = int((fpr <= rate).nonzero()[0])
    wrong = int(pairs.negative[place:].sum())
    return {"threshold": edges[place].item(), "tpr": tpr[place].item(), "false_matches": wrong}


def verification(pairs: Pairs) -> dict:
    """TPR at each of RATES, the equal error rate (FPR = 1 - TPR), their thresholds, and the numbers of pairs."""
    edges, tpr, fpr = rates(pairs)
    gap = (fpr - (1 - tpr)).abs()
    equal = (gap == gap.min()).nonzero().flatten()
    place = equal[len(equal) // 2]  # in the middle, where no pair lies between
    return {
        "positive_pairs": int(pairs.positive.sum()),
        "negative_pairs": int(pairs.negative.sum()),
        "equal_error_rate": ((fpr + 1 - tpr) / 2)[place].item(),
        "equal_error_threshold": edges[place].item(),
        "at_fpr": {f"{rate:g}": at_rate(pairs, rate) for rate in RATES},
    }


def verification_table(metrics: dict) -> str:
    """What `verification` found, under that name in the metrics of one test set or of several ("tests"); percents."""
    lines = []
    for name, found in metrics.get("tests", {"": metrics}).items():
        found = found["verification"]
        pairs = f"{found['positive_pairs']:,} pairs of one person, {found['negative_pairs']:,} of two people"
        rows = [[f"{100 * float(rate):g}", 100 * at["tpr"], at["threshold"], f"{at['false_matches']:,}"]
                for rate, at in found["at_fpr"].items()]  # fmt: skip
        headers = ["FPR at most, %", "TPR, %", "threshold", "false matches"]
        equal = f"{100 * found['equal_error_rate']:.2f} % at the threshold {found['equal_error_threshold']:.4f}"
        lines += [f"{name}{name and ': '}{pairs}", tabulate(rows, headers, floatfmt=("", ".2f", ".4f", ""))]
        lines += [f"equal error rate {equal}"]
    return "\n".join(lines)
