"""utils/ranking.py beside a slow loop typed from the protocol, by hand, and where float32 alone would go wrong."""

import multiprocessing
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from utils import ranking
from utils.ranking import metrics_from_distance, rank_metrics

RANKS = (1, 5, 10, 20)
KEYS = [*(f"rank{k}" for k in RANKS), "mAP", "mAP_trapezoid", "mINP", "num_queries"]


def slow(nearness, query_pids, query_camids, gallery_pids, gallery_camids):
    """The protocol, query by query and image by image; None if no query has a true match. nearness: large = near."""
    found = []
    for q, row in enumerate(nearness):
        matches, wrong = [], []
        for g, near in enumerate(row):
            if gallery_pids[g] == -1 or (gallery_pids[g] == query_pids[q] and gallery_camids[g] == query_camids[q]):
                continue
            (matches if gallery_pids[g] == query_pids[q] else wrong).append(near)
        if not matches:
            continue
        ranks = [i + sum(w >= near for w in wrong) for i, near in enumerate(sorted(matches, reverse=True), start=1)]
        n = len(ranks)
        ap = sum(i / rank for i, rank in enumerate(ranks, start=1)) / n
        before = [(i - 1) / (rank - 1) if rank > 1 else 1 for i, rank in enumerate(ranks, start=1)]
        trapezoid = sum((b + i / rank) / 2 for b, (i, rank) in zip(before, enumerate(ranks, start=1), strict=True)) / n
        found.append((*(ranks[0] <= k for k in RANKS), ap, trapezoid, n / ranks[-1]))
    if not found:
        return None
    return dict(zip(KEYS, [*np.mean(np.array(found, dtype=float), axis=0), len(found)], strict=True))


def check(expected, call, *arguments, **options):
    if expected is None:
        with pytest.raises(ValueError, match="--ignore-cameras"):
            call(*arguments, **options)
        return
    metrics = call(*arguments, **options)
    assert list(metrics) == KEYS
    assert metrics == pytest.approx(expected, rel=0, abs=1e-9)
    assert isinstance(metrics["num_queries"], int) and isinstance(metrics["rank1"], float)


def exact_nearness(query, gallery, metric):
    """Integer vectors: minus the squared distance, or the signed square of the cosine times the query's length."""
    table = []
    for q in query.tolist():
        row = []
        for g in gallery.tolist():
            dot = sum(a * b for a, b in zip(q, g, strict=True))
            square = sum(b * b for b in g)
            if metric == "euclidean":
                row.append(-sum((a - b) ** 2 for a, b in zip(q, g, strict=True)))
            else:
                row.append(Fraction(dot * abs(dot), square) if square else Fraction(0))
        table.append(row)
    return table


def float64_nearness(query, gallery, metric):
    query, gallery = np.asarray(query, dtype=np.float64), np.asarray(gallery, dtype=np.float64)
    if metric == "euclidean":
        return -((query[:, None] - gallery) ** 2).sum(-1)
    query = query / np.linalg.norm(query, axis=1, keepdims=True)
    gallery = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    return (query[:, None] * gallery).sum(-1)


def random_ids(rng, num_query, num_gallery, people, cameras=3):
    """Junk (-1) and distractors (0) among them; one camera in some cases."""
    return [rng.integers(low, high, n) for n in (num_query, num_gallery) for low, high in ((-1, people), (0, cameras))]


def people(rng, num_query, num_gallery, width, num_people, noise=0.7):
    """Embeddings that look like people: (query, pids, camids, gallery, pids, camids), some pictures twice."""
    centers = rng.normal(size=(num_people, width))
    query_pids, gallery_pids = rng.integers(0, num_people, num_query), rng.integers(-1, num_people, num_gallery)
    query = centers[query_pids] + noise * rng.normal(size=(num_query, width))
    gallery = centers[gallery_pids] + noise * rng.normal(size=(num_gallery, width))
    copies = rng.integers(0, num_gallery, (2, num_gallery // 10))
    gallery[copies[0]] = gallery[copies[1]]
    camids = rng.integers(0, 4, num_query), rng.integers(0, 4, num_gallery)
    return (
        query.astype(np.float32), query_pids, camids[0], gallery.astype(np.float32), gallery_pids, camids[1],
    )  # fmt: skip


def slow_of(arguments, metric="cosine"):
    query, query_pids, query_camids, gallery, gallery_pids, gallery_camids = arguments
    nearness = float64_nearness(query, gallery, metric)
    return slow(nearness, query_pids, query_camids, gallery_pids, gallery_camids)


# ---- The definitions ----


def test_by_hand():
    """Distances 1 (match), 2 (wrong), 2 (match), 3 (wrong), 4 (match): the tie at 2 counts against the second match.
    Ranks 1, 3, 5. AP = (1/1 + 2/3 + 3/5) / 3 = 34/45. Trapezoid: (1 + (1/2 + 2/3) / 2 + (2/4 + 3/5) / 2) / 3 = 32/45.
    INP = 3/5. Left out: a picture of the same camera at distance 0, junk at 0, and a query of nobody in the gallery."""
    distance = np.array([[1, 2, 2, 3, 4, 0, 0], [1, 1, 1, 1, 1, 1, 1]], dtype=np.float32)
    ids = [7, 9], [1, 1], [7, 8, 7, 0, 7, 7, -1], [2, 1, 2, 2, 3, 1, 2]
    metrics = metrics_from_distance(distance, *ids)
    assert metrics == pytest.approx(
        {"rank1": 1, "rank5": 1, "rank10": 1, "rank20": 1, "mAP": 34 / 45, "mAP_trapezoid": 32 / 45, "mINP": 3 / 5,
         "num_queries": 1}
    )  # fmt: skip
    assert rank_metrics(np.zeros((2, 1)), *ids[:2], -distance[:1].T, *ids[2:], metric="euclidean") == metrics


def test_trapezoid_of_a_first_match_at_rank_two():
    """One match at rank 2: AP = 1/2, trapezoid (0/1 + 1/2) / 2 = 1/4."""
    metrics = metrics_from_distance(torch.tensor([[2.0, 1.0]]), [1], [1], [1, 2], [2, 2], ranks=(1, 2))
    assert (metrics["rank1"], metrics["rank2"], metrics["mAP"], metrics["mAP_trapezoid"]) == (0, 1, 0.5, 0.25)


def test_ap_is_that_of_sklearn_where_nothing_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, match = rng.permutation(50), rng.random(50) < 0.2
        match[0] = True
        metrics = metrics_from_distance(-score[None].astype(float), [1], [0], np.where(match, 1, 2), np.ones(50, int))
        assert metrics["mAP"] == pytest.approx(average_precision_score(match, score))


# ---- Beside the slow loop ----


@pytest.mark.parametrize("chunk", range(4))
def test_thousands_of_small_cases(chunk):
    """Small integers: many equal distances, also of vectors of different length; all numbers of the slow loop exact."""
    rng = np.random.default_rng(chunk)
    empty = 0
    for case in range(500):
        num_query, num_gallery, width = rng.integers(1, 7), rng.integers(1, 30), rng.integers(1, 4)
        query, gallery = (rng.integers(-3, 4, (n, width)) for n in (num_query, num_gallery))
        ids = random_ids(rng, num_query, num_gallery, people=rng.integers(1, 6), cameras=rng.integers(1, 4))
        metric = ("euclidean", "cosine")[case % 2]
        nearness = exact_nearness(query, gallery, metric)
        expected = slow(nearness, *ids)
        empty += expected is None
        blocks = {"query_block": int(rng.integers(1, 5)), "gallery_block": int(rng.integers(1, 40))} if case % 5 else {}
        arguments = query.astype(np.float32), *ids[:2], gallery.astype(np.float32), *ids[2:]
        check(expected, rank_metrics, *arguments, metric=metric, **blocks)
        order = np.unique([[float(x) for x in row] for row in nearness], return_inverse=True)[1]  # only order counts
        distance = -order.reshape(num_query, num_gallery)
        check(expected, metrics_from_distance, distance.astype((np.float32, np.float64, np.int64)[case % 3]), *ids)
    assert 5 < empty < 400


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_people(metric, dtype):
    """A hundred times larger, floats: far matches, close ones, junk, copies of pictures, many blocks."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        arguments = people(rng, 60, 1500, width=16, num_people=25, noise=(0.3, 1.0, 5.0)[seed])
        arguments = tuple(x.astype(dtype) if x.ndim == 2 else x for x in arguments)
        expected = slow_of(arguments, metric)
        check(expected, rank_metrics, *arguments, metric=metric, query_block=40, gallery_block=200)
        distance = -float64_nearness(arguments[0], arguments[3], metric)
        check(expected, metrics_from_distance, distance, *arguments[1:3], *arguments[4:])


def test_distance_matrix_of_many_columns_in_float32():
    rng = np.random.default_rng(0)
    ids = random_ids(rng, 20, 9000, people=30)
    distance = rng.integers(0, 3000, (20, 9000)).astype(np.float32)
    check(slow(-distance, *ids), metrics_from_distance, distance, *ids)


def test_distances_in_float64_are_compared_in_float64():
    distance = np.array([[1.0, 1.0 + 1e-12], [1.0, 1.0 - 1e-12], [1.0, 1.0]])
    metrics = metrics_from_distance(distance, [5, 5, 5], [0, 0, 0], [5, 6], [1, 1])
    assert metrics["rank1"] == pytest.approx(1 / 3)


def test_a_person_of_a_thousand_images():
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(4, 6)), rng.normal(size=(1600, 6))
    gallery_pids = np.where(rng.random(1600) < 0.8, 1, 2)
    arguments = query, np.array([1, 1, 2, 1]), np.zeros(4, int), gallery, gallery_pids, rng.integers(0, 3, 1600)
    check(slow_of(arguments), rank_metrics, *arguments, gallery_block=500)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_arrays(data):
    """Whatever hypothesis draws: vectors of a grid, ids, blocks."""
    sizes = {"min_size": 1, "max_size": 8}
    width = data.draw(st.integers(1, 3))
    vectors = st.lists(st.tuples(*[st.integers(-2, 2)] * width), **sizes)
    query, gallery = np.array(data.draw(vectors)), np.array(data.draw(vectors))
    pids, camids = st.sampled_from([-1, 0, 5, -(2**62), 2**62]), st.integers(0, 1)
    ids = [
        np.array(data.draw(st.lists(kind, min_size=len(table), max_size=len(table))))
        for table in (query, gallery)
        for kind in (pids, camids)
    ]
    metric = data.draw(st.sampled_from(["cosine", "euclidean"]))
    blocks = {"query_block": data.draw(st.integers(1, 9)), "gallery_block": data.draw(st.integers(1, 9))}
    scale = 2.0 ** data.draw(st.integers(-60, 60))  # exact, and far beyond what float32 can square
    arguments = (query * scale).astype(np.float32), *ids[:2], (gallery * scale).astype(np.float32), *ids[2:]
    check(slow(exact_nearness(query, gallery, metric), *ids), rank_metrics, *arguments, metric=metric, **blocks)


# ---- Exact whatever the blocks, the order, the device's precision ----


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_blocks_change_nothing(metric):
    arguments = people(np.random.default_rng(1), 150, 3000, width=64, num_people=40, noise=2.0)
    whole = rank_metrics(*arguments, metric=metric, query_block=10**6, gallery_block=10**6)
    assert 0.1 < whole["mAP"] < 0.9
    for query_block, gallery_block in ((150, 512), (7, 3000), (64, 33), (4096, 2048)):
        blocks = {"query_block": query_block, "gallery_block": gallery_block}
        assert rank_metrics(*arguments, metric=metric, **blocks) == whole


def test_order_changes_nothing():
    rng = np.random.default_rng(2)
    query, query_pids, query_camids, gallery, gallery_pids, gallery_camids = people(rng, 50, 800, 32, 20)
    metrics = rank_metrics(query, query_pids, query_camids, gallery, gallery_pids, gallery_camids, gallery_block=100)
    for _ in range(5):
        g, q = rng.permutation(800), rng.permutation(50)
        again = rank_metrics(
            query[q], query_pids[q], query_camids[q], gallery[g], gallery_pids[g], gallery_camids[g], gallery_block=100
        )
        assert again == pytest.approx(metrics, rel=1e-14)  # the mean over queries is summed in another order


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("width", [3, 511, 2048])
def test_same_picture_counts_against_wherever_it_stands(metric, width):
    """The nearest image is a true match; one copy of it has another name. Rank 2, in every block and position."""
    rng = np.random.default_rng(width)
    gallery = rng.normal(size=(700, width)).astype(np.float32)
    gallery_pids = np.arange(700)
    for _ in range(12):
        match, copy = rng.choice(700, 2, replace=False)
        table = gallery.copy()
        table[copy] = table[match]
        query = table[match : match + 1] * np.float32(1.37 if metric == "cosine" else 1)
        metrics = rank_metrics(
            query, [match], [0], table, gallery_pids, np.ones(700, int), metric, ranks=(1, 2),
            gallery_block=int(rng.integers(1, 800)),
        )  # fmt: skip
        assert (metrics["rank1"], metrics["rank2"], metrics["mAP"]) == (0, 1, 0.5)


def test_float32_alone_would_order_these_wrongly():
    """Cosines that differ by 1e-9: the match of query 0 is the nearer image, that of query 1 the farther one."""
    angle = np.array([0.3, 0.3 + 3e-9])
    gallery = np.stack([np.cos(angle), np.sin(angle)], 1)  # image 0 is the nearer one, in float64
    query = np.array([[1.0, 0.0]] * 2)
    metrics = rank_metrics(query, [5, 6], [0, 0], gallery, [5, 6], [1, 1])
    assert metrics["rank1"] == 0.5 and metrics["mAP"] == 0.75
    query, gallery = query.astype(np.float32), gallery.astype(np.float32)  # here the two images are the same
    assert rank_metrics(query, [5, 6], [0, 0], gallery, [5, 6], [1, 1])["mAP"] == 0.5


def test_many_copies_of_every_picture():
    """Sixty pictures under many names, far and near: matches as near as each other and as wrong images."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        pictures = rng.normal(size=(60, 24)).astype(np.float32)
        gallery, query = pictures[rng.integers(0, 60, 1500)], rng.normal(size=(40, 24)).astype(np.float32)
        ids = random_ids(rng, 40, 1500, people=6)
        arguments = query, *ids[:2], gallery, *ids[2:]
        check(slow_of(arguments), rank_metrics, *arguments, gallery_block=(100, 256, 700, 2048)[seed])


def test_copies_among_far_matches():
    """Every picture two or three times, a fifth of them under a wrong name; people who look like anybody."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        picture = rng.integers(0, 1000, 3000)
        gallery = rng.normal(size=(1000, 24)).astype(np.float32)[picture]
        gallery_pids = np.where(rng.random(3000) < 0.8, picture % 150, rng.integers(0, 150, 3000))
        query, camids = rng.normal(size=(50, 24)).astype(np.float32), rng.integers(0, 3, 3050)
        arguments = query, rng.integers(0, 20, 50), camids[:50], gallery, gallery_pids, camids[50:]
        check(slow_of(arguments), rank_metrics, *arguments, gallery_block=500)


@pytest.mark.parametrize("spread", [1e-3, 0.0])
def test_collapsed_embeddings(monkeypatch, spread):
    """Nearly (or quite) the same embedding for all: every comparison is a close call, decided in float64."""
    rng = np.random.default_rng(3)
    arguments = list(people(rng, 300, 600, width=8, num_people=60))
    arguments[0], arguments[3] = (1 + spread * x for x in (arguments[0], arguments[3]))
    calls = count_calls(monkeypatch, ranking._Tally, "count_float64")
    check(slow_of(arguments), rank_metrics, *arguments, gallery_block=256)
    assert calls


def multiply_roughly(monkeypatch, bits=10) -> list:
    """From now on products are those of vectors rounded to so many bits behind the point: 10 as TF32 does, 7 as
    bfloat16. Returns the list of its calls."""
    exact, calls, step = torch.mm, [], 1 << (23 - bits)

    def rounded(x):
        return ((x.contiguous().view(torch.int32) + step // 2) & -step).view(torch.float32)

    def rough(a, b, out):
        calls.append(None)
        return exact(rounded(a), rounded(b), out=out)

    monkeypatch.setattr(torch, "mm", rough)
    return calls


def test_a_rough_product_is_noticed_without_many_true_matches(monkeypatch):
    """A single match may have no error by chance: other pairs of the block are looked at, too."""
    rng = np.random.default_rng(0)
    draws = [rng.normal(size=(4097, 64)).astype(np.float32) for _ in range(150)]
    cases = [(draw[:1], [5], [1], draw[1:], np.arange(4096), np.full(4096, 2)) for draw in draws]
    expected = [rank_metrics(*case) for case in cases]
    assert multiply_roughly(monkeypatch) == []
    assert [rank_metrics(*case) for case in cases] == expected


@pytest.mark.parametrize("bits", [10, 7])
def test_a_rough_product_changes_nothing(monkeypatch, bits):
    """More comparisons are made again, the same numbers."""
    arguments = people(np.random.default_rng(4), 80, 2000, width=64, num_people=300, noise=1.0)
    expected = rank_metrics(*arguments, gallery_block=512)
    calls = multiply_roughly(monkeypatch, bits)
    again = count_calls(monkeypatch, ranking._Tally, "settle")
    assert rank_metrics(*arguments, gallery_block=512) == expected
    assert calls and sum(len(call[1]) for call in again) > 300


def test_far_matches_are_compared_one_by_one(monkeypatch):
    """The faster way of counting for matches behind many images is used, and only for them."""
    levels = []
    compare = ranking._Tally._compare

    def spy(self, score, far, rows):
        levels.append(int(far.max()))
        return compare(self, score, far, rows)

    monkeypatch.setattr(ranking._Tally, "_compare", spy)
    rank_metrics(*people(np.random.default_rng(5), 60, 2000, 16, 400, noise=0.05), gallery_block=256)
    assert max(levels) <= 1
    levels.clear()
    rank_metrics(*people(np.random.default_rng(5), 60, 2000, 16, 20, noise=3.0), gallery_block=256)
    assert levels[0] == 0 and min(levels[1:]) > 10


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_lengths_of_all_sizes(metric):
    """Embeddings of zeros, tiny, huge, and one giant among the gallery."""
    rng = np.random.default_rng(6)
    query, gallery = rng.integers(-3, 4, (30, 3)), rng.integers(-3, 4, (200, 3))
    gallery[:20], query[0], gallery[7] = 0, 0, 10**6
    ids = random_ids(rng, 30, 200, people=8)
    expected = slow(exact_nearness(query, gallery, metric), *ids)
    for scale in (1.0, 2.0**-90, 2.0**90):
        arguments = (query * scale).astype(np.float32), *ids[:2], (gallery * scale).astype(np.float32), *ids[2:]
        check(expected, rank_metrics, *arguments, metric=metric, gallery_block=64)


def test_a_true_match_beyond_float32():
    """Euclidean: a true match at a distance whose square float32 does not hold is the last one, and junk stays out."""
    gallery = np.zeros((50, 2), np.float32)
    gallery[:, 0], gallery[20] = np.arange(50), 1e25
    pids = np.array([*range(10, 30), 7, *range(31, 50), *[-1] * 10])
    for block in (8, 50):
        metrics = rank_metrics(gallery[:1], [7], [0], gallery, pids, np.ones(50, int), "euclidean", gallery_block=block)
        assert metrics["mAP"] == 1 / 40


def test_the_block_with_most_true_matches_comes_first():
    """It shows how exact the product is before anything is counted; of that block a short piece, to see what is far."""
    pids = torch.zeros(1000, dtype=torch.int64)
    pids[[10, 620, 640, 650]] = 3
    pairs = ranking._Pairs(torch.tensor([3]), torch.tensor([1]), pids, pids)
    blocks = pairs.blocks(1000, 300)
    assert blocks == [(600, 728), (728, 900), (0, 300), (300, 600), (900, 1000)]


# ---- What it takes ----


def test_types():
    query, query_pids, query_camids, gallery, gallery_pids, gallery_camids = people(
        np.random.default_rng(7), 20, 300, width=8, num_people=10
    )
    expected = rank_metrics(query, query_pids, query_camids, gallery, gallery_pids, gallery_camids)
    shift = 2**62
    arguments = (
        torch.from_numpy(query).requires_grad_(), query_pids + shift, query_camids.astype(np.int32).tolist(), gallery,
        torch.from_numpy(np.where(gallery_pids == -1, -1, gallery_pids + shift)), gallery_camids.astype(np.uint8),
    )  # fmt: skip
    assert rank_metrics(*arguments) == expected
    half = [torch.from_numpy(query).bfloat16(), torch.from_numpy(gallery).half()]
    check(
        slow_of((half[0].float(), query_pids, query_camids, half[1].float(), gallery_pids, gallery_camids)),
        rank_metrics, half[0], query_pids, query_camids, half[1], gallery_pids, gallery_camids,
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        assert rank_metrics(*arguments) == expected


class Streamed:
    """A gallery that notes how many rows are read at once."""

    def __init__(self, table):
        self.table, self.shape, self.reads = table, table.shape, []

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        rows = self.table[index]
        self.reads.append(len(rows))
        return rows


def test_memory_mapped_gallery_is_streamed(tmp_path, recwarn):
    query, query_pids, query_camids, gallery, gallery_pids, gallery_camids = people(
        np.random.default_rng(8), 30, 5000, width=8, num_people=100
    )
    np.save(tmp_path / "gallery.npy", gallery)
    mapped = Streamed(np.load(tmp_path / "gallery.npy", mmap_mode="r"))
    metrics = rank_metrics(query, query_pids, query_camids, mapped, gallery_pids, gallery_camids, gallery_block=300)
    assert metrics == rank_metrics(query, query_pids, query_camids, gallery, gallery_pids, gallery_camids)
    assert max(mapped.reads) == 300
    assert not recwarn.list


def test_inputs_are_left_as_they_are():
    arguments = people(np.random.default_rng(9), 10, 100, 4, 5)
    before = [x.copy() for x in arguments]
    distance = torch.rand(10, 100)
    copy = distance.clone()
    rank_metrics(*arguments, metric="euclidean")
    metrics_from_distance(distance, *arguments[1:3], *arguments[4:])
    assert all((a == b).all() for a, b in zip(arguments, before, strict=True)) and torch.equal(distance, copy)


def test_out_of_memory_is_met_with_smaller_blocks(monkeypatch, capsys):
    arguments = people(np.random.default_rng(10), 50, 600, 4, 5)
    expected = rank_metrics(*arguments)
    assert capsys.readouterr().out == ""
    rank_queries = ranking._rank_queries

    def short_of_memory(query, gallery, ids, here, metric, gallery_block):
        if gallery_block > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return rank_queries(query, gallery, ids, here, metric, gallery_block)

    monkeypatch.setattr(ranking, "_rank_queries", short_of_memory)
    assert rank_metrics(*arguments, gallery_block=600) == expected
    assert "1024 queries x 150 gallery images" in capsys.readouterr().out
    monkeypatch.setattr(ranking, "_rank_queries", lambda *_: torch.empty(2**60))
    with pytest.raises(RuntimeError, match="memory"):
        rank_metrics(*arguments)


def test_works_copied_alone(tmp_path):
    shutil.copy(Path(ranking.__file__), tmp_path / "ranking.py")
    code = (
        "from ranking import rank_metrics; import torch;"
        "print(rank_metrics(torch.eye(2), [1, 2], [0, 0], torch.eye(2), [1, 2], [1, 1])['mAP'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "1.0", done.stderr


# ---- What it refuses ----


def arguments_of(**changes):
    defaults = {
        "query": np.ones((2, 3), np.float32), "query_pids": [1, 2], "query_camids": [1, 1],
        "gallery": np.ones((3, 3), np.float32), "gallery_pids": [1, 2, 3], "gallery_camids": [2, 2, 2],
    }  # fmt: skip
    return {**defaults, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": np.ones((2, 4), np.float32)}, r"\(2, 4\) and \(3, 3\)"),
        ({"gallery": np.ones(3, np.float32)}, r"not \(2, 3\) and \(3,\)"),
        ({"query": np.ones((2, 0)), "gallery": np.ones((3, 0))}, "same width"),
        ({"gallery": np.ones((0, 3)), "gallery_pids": [], "gallery_camids": []}, "2 query and 0 gallery"),
        ({"gallery_pids": [1, 2]}, r"gallery_pids .* shape \(3,\), not \(2,\)"),
        ({"query_camids": [[1], [1]]}, r"query_camids .* not \(2, 1\)"),
        ({"query_pids": [1.0, 2.0]}, "query_pids must be integers, not torch.float32"),
        ({"metric": "manhattan"}, "'manhattan': choose cosine or euclidean"),
        ({"gallery_camids": [1, 1, 1]}, "No query has a true match .*--ignore-cameras"),
        ({"query": np.array([[1, 1, 1], [1, np.nan, 1]])}, "1 of 2 query embeddings .* images 1 "),
        ({"gallery": np.array([[np.inf] * 3, [1] * 3, [-np.inf] * 3])}, "2 of 3 gallery embeddings .* images 0, 2 "),
    ],
)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_refused(changes, words, metric):
    with pytest.raises(ValueError, match=words) as error:
        rank_metrics(**arguments_of(**{"metric": metric, **changes}))
    assert "\n" not in str(error.value)


def test_two_processes_give_the_numbers_of_one():
    """Each scores half of the queries; one of them has queries without a match, too."""
    arguments = people(np.random.default_rng(12), 90, 1500, width=32, num_people=200, noise=0.5)
    whole = rank_metrics(*arguments)
    halves = [[*(column[part] for column in arguments[:3]), *arguments[3:]] for part in (slice(0, 45), slice(45, 90))]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        parts = [process.result() for process in [processes.submit(rank_metrics, *half) for half in halves]]
    count = [part.pop("num_queries") for part in parts]
    assert whole.pop("num_queries") == sum(count)
    for key, value in whole.items():
        mean = sum(n * part[key] for n, part in zip(count, parts, strict=True)) / sum(count)
        assert mean == pytest.approx(value, rel=0, abs=1e-15)


@pytest.mark.parametrize("name", ["query", "gallery"])
def test_giant_embeddings(name):
    """The cosine does not depend on the length; a squared distance beyond the range of float64 is refused."""
    arguments = arguments_of(metric="cosine")
    expected = rank_metrics(**arguments)
    large = {**arguments, name: arguments[name].astype(np.float64) * 1e250}
    assert rank_metrics(**large) == expected
    with pytest.raises(ValueError, match=f"The {name} embeddings are too large"):
        rank_metrics(**{**large, "metric": "euclidean"})


def test_not_finite_embeddings_are_named_wherever_they_stand():
    query, query_pids, query_camids, gallery, gallery_pids, gallery_camids = people(
        np.random.default_rng(11), 10, 9000, 4, 500
    )
    for bad in ([8999], list(range(5, 9000, 500))):
        table = gallery.copy()
        table[bad, 1] = np.nan
        with pytest.raises(ValueError, match=f"{len(bad)} of 9000 gallery.*images {', '.join(map(str, bad[:10]))}"):
            rank_metrics(query, query_pids, query_camids, table, gallery_pids, gallery_camids, gallery_block=1000)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distances_that_are_not_finite(value, dtype):
    distance = np.ones((2, 3), dtype)
    distance[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        metrics_from_distance(distance, [1, 2], [1, 1], [1, 2, 3], [2, 2, 2])
    with pytest.raises(ValueError, match="matrix"):
        metrics_from_distance(distance[0], [1, 2], [1, 1], [1, 2, 3], [2, 2, 2])
    with pytest.raises(ValueError, match="gallery_pids"):
        metrics_from_distance(distance, [1, 2], [1, 1], [1, 2], [2, 2, 2])


def count_calls(monkeypatch, owner, name):
    """The arguments of every call of owner.name, from now on."""
    calls, original = [], getattr(owner, name)

    def spy(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(owner, name, spy)
    return calls
