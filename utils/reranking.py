"""Re-ranking with k-reciprocal encoding: two images are alike if they have the same neighbours.

Zhong, Zheng, Cao & Li, "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017,
https://arxiv.org/abs/1701.08398, as in the authors' released code. Of all A = Q + G images:

    d(i, j)  = squared Euclidean distance (cosine: of the unit vectors), divided by the largest one of image i
    N(i, k)  = the k + 1 nearest images: i itself, then by distance, then by index
    R(i, k)  = those j of N(i, k) that have i in N(j, k)
    R*(i)    = R(i, k1) and each R(j, round(k1 / 2)), j in R(i, k1), of which more than 2/3 lie in R(i, k1)
    v(i)     = exp(-d(i, j)) for j in R*(i), else 0; divided by its sum
    V(i)     = mean of v over the k2 nearest images of i, itself among them
    s(i, g)  = sum over j of min(V(i)_j, V(g)_j)
    distance = (1 - lambda) (1 - s / (2 - s)) + lambda d(i, g), for queries i and gallery images g

Deviation from the authors' code: which of equally distant images comes first, which there is left to the sort.
(torchreid hands that code distances that are squared already, and it squares them again: its numbers are others.)

How it works. No matrix of all distances is built, only tables of about block x block numbers. The product passes by in
squares, half of them, since it is symmetric; what is no farther than the k-th nearest so far is kept, and in the end
sorted by distances that lack the product's error. V has about 100 entries per image and is kept as lists; s adds up,
for each entry of a query, the gallery images that have the same entry.
"""

import torch
from torch import Tensor

ERROR = 32  # error of the product that is allowed for, in roundings of the squared lengths


def rerank(
    query, gallery, metric: str = "cosine", k1: int = 20, k2: int = 6, lambda_: float = 0.3,
    block: int | None = None, progress=lambda steps, description: steps,
):  # fmt: skip
    """Re-ranked distances of query (Q, D) to gallery (G, D): an iterator over (slice of the queries, distances (q, G)).

    Embeddings: tensors or arrays, also memory-mapped ones. The work is done on the query's device in float32, or in
    float64 if one of them is; so are the distances, from 0 to 1, small = alike. k1, k2, lambda_: see above; k2 = 1: no
    mean. block: 2048 on a CPU, 4096 elsewhere; of no influence on the numbers. progress(steps, description): an
    iterator over the list of steps, for each of three parts of the work; tqdm.tqdm is one. Raises ValueError for
    embeddings that are not finite or do not fit together, and for a metric, k1, k2 or lambda_ that does not exist.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"Unknown metric {metric!r}: choose cosine or euclidean.")
    if not (k1 >= 1 and k2 >= 1 and 0 <= lambda_ <= 1):
        raise ValueError(f"k1 and k2 must be at least 1, lambda from 0 to 1: not k1 {k1}, k2 {k2}, lambda {lambda_}.")
    one, other = tuple(query.shape), tuple(gallery.shape)
    if not len(one) == len(other) == 2 or one[1] != other[1] or 0 in one + other:
        raise ValueError(f"Query and gallery embeddings must be tables (Q, D) and (G, D), not {one} and {other}.")
    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    block = block or (2048 if device.type == "cpu" else 4096)
    return _blocks(query, gallery, device, metric, k1, k2, lambda_, block, progress)


@torch.no_grad()
def _blocks(query, gallery, device, metric, k1, k2, lambda_, block, progress):
    num_query, num_gallery, total = len(query), len(gallery), len(query) + len(gallery)
    embeddings, square = _together(query, gallery, device, metric)  # (A, D), (A,)
    near, largest = _neighbours(embeddings, square, max(k1 + 1, k2), block, progress)  # (A, K), (A,)
    image, entry, value = _vectors(embeddings, near, largest, k1, k2, block, progress)  # (V,) each, by image
    end = torch.searchsorted(image, torch.arange(num_query + 1, device=device)).tolist()
    order = end[-1] + entry[end[-1] :].argsort(stable=True)  # the gallery's entries, by entry
    owner, weight, count = image[order] - num_query, value[order], torch.bincount(entry[order], minlength=total)
    for here in progress(_slices(num_query, block * block // num_gallery), "re-ranking"):
        mine = slice(end[here.start], end[here.stop])
        row, place = _places(entry[mine], count)
        least = torch.minimum(value[mine][row], weight[place])
        cell = (image[mine][row] - here.start) * num_gallery + owner[place]
        s = least.new_zeros((here.stop - here.start) * num_gallery).index_add_(0, cell, least).view(-1, num_gallery)
        distance = _distances(embeddings, square, here, slice(num_query, total)) / largest[here, None]
        yield here, torch.lerp(1 - s / (2 - s), distance.clamp_(0, 1), lambda_)


def _together(query, gallery, device: torch.device, metric: str) -> tuple[Tensor, Tensor]:
    """A copy of all embeddings (A, D), of length 1 for cosine, and their squared lengths (A,)."""
    dtypes = _tensor(query[:1]).dtype, _tensor(gallery[:1]).dtype
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    embeddings = torch.empty(len(query) + len(gallery), query.shape[1], dtype=dtype, device=device)
    for table, whole in ((query, embeddings[: len(query)]), (gallery, embeddings[len(query) :])):
        for here in _slices(len(table), 1024):
            whole[here] = _tensor(table[here])
    square = torch.cat([rows.square().sum(1) for rows in embeddings.split(1024)])
    bad = (~torch.isfinite(square)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"Embeddings {bad[:10]} (from 0, queries first) hold NaN, infinite or too large values.")
    if metric == "cosine":
        embeddings /= square.sqrt().clamp(min=torch.finfo(dtype).tiny)[:, None]
        square = torch.cat([rows.square().sum(1) for rows in embeddings.split(1024)])
    return embeddings, square


def _tensor(rows) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.as_tensor(rows.astype(rows.dtype.newbyteorder("=")))


def _slices(number: int, size: int) -> list[slice]:
    """0 .. number - 1 in slices of that size, at least of 1."""
    return [slice(first, min(first + max(size, 1), number)) for first in range(0, number, max(size, 1))]


def _places(keys: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Where each key stands in a list that is sorted by key, with each key's count: (index of the key, place)."""
    times, start = count[keys], count.cumsum(0) - count
    index = torch.arange(len(keys), device=keys.device).repeat_interleave(times)
    return index, torch.arange(len(index), device=keys.device) + (start[keys] + times - times.cumsum(0))[index]


def _distances(embeddings: Tensor, square: Tensor, rows: slice, columns: slice) -> Tensor:
    """Squared distances |x|^2 + |y|^2 - 2 x y; not in TF32 or bfloat16, whatever the caller has set."""
    device, matmul, name, exact = embeddings.device.type, torch.backends.cuda.matmul, "allow_tf32", False
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9
        matmul, name, exact = matmul if device == "cuda" else torch.backends.mkldnn.matmul, "fp32_precision", "ieee"
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        with torch.autocast(device, enabled=False):
            distance = torch.addmm(square[columns], embeddings[rows], embeddings[columns].T, alpha=-2)
    finally:
        setattr(matmul, name, before)
    return distance.add_(square[rows, None])


def _pair_distances(embeddings: Tensor, one: Tensor, other: Tensor, block: int) -> Tensor:
    """Squared distances (P,) by subtraction: equal for equal pairs, from either side."""
    size = max(block * block // (4 * embeddings.shape[1]), 1)
    found, tables = embeddings.new_empty(len(one)), embeddings.new_empty(2, size, embeddings.shape[1])
    for here in _slices(len(one), size):
        x, y = tables[:, : here.stop - here.start]  # the same memory again: new memory takes longer than the sum
        torch.index_select(embeddings, 0, one[here], out=x)
        torch.index_select(embeddings, 0, other[here], out=y)
        torch.sum(x.sub_(y).square_(), 1, out=found[here])
    return found


def _neighbours(embeddings: Tensor, square: Tensor, k: int, block: int, progress) -> tuple[Tensor, Tensor]:
    """The k nearest of each image, itself first (A, k), and its largest distance (A,); k: all if there are fewer."""
    total, k, error = len(embeddings), min(k, len(embeddings)), ERROR * torch.finfo(square.dtype).eps
    largest, limit = torch.full_like(square, torch.finfo(square.dtype).tiny), torch.empty_like(square)
    best = square.new_full((total, k), torch.inf)  # the k smallest distances so far
    found = []  # pairs within the limit, the largest of these: image, other, distance
    parts = _slices(total, block)
    for rows, columns in progress([(a, b) for i, a in enumerate(parts) for b in parts[i:]], "neighbours"):
        tile = _distances(embeddings, square, rows, columns)
        for here, there in ((rows, columns), (columns, rows))[: 1 if rows == columns else 2]:
            table = tile if here is rows else tile.T.contiguous()
            largest[here] = torch.maximum(largest[here], table.amax(1))
            nearest = table.topk(min(k, table.shape[1]), largest=False).values
            best[here] = torch.cat([best[here], nearest], 1).topk(k, largest=False).values
            limit[here] = best[here, -1] + error * (best[here, -1] + square[here])
            row, column = (table <= limit[here, None]).nonzero(as_tuple=True)
            found.append((row + here.start, column + there.start, table[row, column]))
        if columns.stop == total:  # many are beyond the limit by now
            image, other, distance = (torch.cat(column) for column in zip(*found, strict=True))
            keep = distance <= limit[image]
            found = [(image[keep], other[keep], distance[keep])]
    image, other, _ = found[0]  # the others of an image by index
    distance = _pair_distances(embeddings, image, other, block)
    distance[image == other] = -1
    order = distance.argsort(stable=True)
    order = order[image[order].argsort(stable=True)]  # by image, then distance, then index
    start = torch.searchsorted(image[order], torch.arange(total, device=order.device))
    return other[order[start[:, None] + torch.arange(k, device=order.device)]], largest


def _vectors(embeddings, near, largest, k1: int, k2: int, block: int, progress) -> tuple[Tensor, ...]:
    """What is not 0 in V, image by image: its image, its entry, its value, (V,) each."""
    total, device = len(near), near.device
    lists, half = near[:, : k1 + 1], near[:, : round(k1 / 2) + 1]  # (A, K), (A, H); round: a half to the even number
    slices = _slices(total, block * block // total)
    half_mutual = torch.cat([_mutual(half, here) for here in slices])  # (A, H)
    found = []
    for here in progress(slices, "vectors"):
        mine, mutual = lists[here], _mutual(lists, here)  # (a, K)
        inside = torch.zeros(len(mine), total, dtype=torch.bool, device=device)  # (a, A): R, then R*
        inside.scatter_(1, mine, mutual)
        theirs = half[mine]  # (a, K, H): the half list of each neighbour
        member = half_mutual[mine] & mutual[:, :, None]  # is it in R of the neighbour, and that in R of the image?
        shared = inside.gather(1, theirs.flatten(1)).view_as(theirs) & member
        member &= (3 * shared.sum(2) > 2 * member.sum(2))[:, :, None]
        inside[member.nonzero()[:, 0], theirs[member]] = True
        row, entry = inside.nonzero(as_tuple=True)
        image = row + here.start
        weight = torch.exp(-_pair_distances(embeddings, image, entry, block) / largest[image])
        found.append((image, entry, weight / weight.new_zeros(len(mine)).index_add_(0, row, weight)[row]))
    image, entry, value = (torch.cat(column) for column in zip(*found, strict=True))
    count, found = torch.bincount(image, minlength=total), []
    for here in slices:
        nearest = near[here, :k2]  # (a, k2)
        index, place = _places(nearest.flatten(), count)
        table = value.new_zeros(len(nearest), total)  # (a, A)
        cell = index // nearest.shape[1] * total + entry[place]
        table.view(-1).index_add_(0, cell, value[place] / nearest.shape[1])
        row, column = table.nonzero(as_tuple=True)
        found.append((row + here.start, column, table[row, column]))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def _mutual(lists: Tensor, here: slice) -> Tensor:
    """Which of an image's neighbours have the image in their list: (a, K), of the images `here` of lists (A, K)."""
    image = torch.arange(here.start, here.stop, device=lists.device)
    return (lists[lists[here]] == image[:, None, None]).any(2)
