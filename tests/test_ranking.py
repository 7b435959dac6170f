"""utils/ranking.py beside a slow loop typed from the protocol, by hand, and where equal embeddings could go wrong."""

import bisect
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from utils import ranking
from utils.ranking import average, metrics_from_distance, rank_metrics, rank_queries, rank_queries_from_distance

RANKS = (1, 5, 10, 20)
KEYS = [*(f"rank{k}" for k in RANKS), "mAP", "mAP_trapezoid", "mINP", "num_queries"]


def slow(nearness, query_pids, query_camids, gallery_pids, gallery_camids):
    """The protocol, query by query and image by image; None if no query has a true match. nearness: large = near."""
    query_pids, query_camids, gallery_pids, gallery_camids = (
        np.asarray(ids).tolist() for ids in (query_pids, query_camids, gallery_pids, gallery_camids))  # fmt: skip
    nearness = nearness if isinstance(nearness, list) else np.asarray(nearness).tolist()
    found = []
    for q, row in enumerate(nearness):
        matches, wrong = [], []
        for g, near in enumerate(row):
            if gallery_pids[g] == -1 or (gallery_pids[g] == query_pids[q] and gallery_camids[g] == query_camids[q]):
                continue
            (matches if gallery_pids[g] == query_pids[q] else wrong).append(near)
        if not matches:
            continue
        wrong.sort()
        ranks = [i + len(wrong) - bisect.bisect_left(wrong, near)
                 for i, near in enumerate(sorted(matches, reverse=True), start=1)]  # fmt: skip
        n = len(ranks)
        ap = sum(i / rank for i, rank in enumerate(ranks, start=1)) / n
        before = [(i - 1) / (rank - 1) if rank > 1 else 1 for i, rank in enumerate(ranks, start=1)]
        trapezoid = sum((b + i / rank) / 2 for b, (i, rank) in zip(before, enumerate(ranks, start=1), strict=True)) / n
        found.append((*(ranks[0] <= k for k in RANKS), ap, trapezoid, n / ranks[-1]))
    if not found:
        return None
    return dict(zip(KEYS, [*np.mean(np.array(found, dtype=float), axis=0), len(found)], strict=True))


def check(expected, call, *arguments, tolerance=1e-9, **options):
    if expected is None:
        with pytest.raises(ValueError, match="--ignore-cameras"):
            call(*arguments, **options)
        return
    metrics = call(*arguments, **options)
    assert list(metrics) == KEYS
    assert metrics == pytest.approx(expected, rel=0, abs=tolerance)
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
    for case in range(300):
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
    assert 5 < empty < 240


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_people(metric, dtype):
    """A hundred times larger, floats: far matches, close ones, junk, copies of pictures, many blocks."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        arguments = people(rng, 30, 1500, width=16, num_people=25, noise=(0.3, 1.0, 5.0)[seed])
        arguments = tuple(x.astype(dtype) if x.ndim == 2 else x for x in arguments)
        expected = slow_of(arguments, metric)
        how = {"metric": metric, "query_block": 20, "gallery_block": 200}
        check(expected, rank_metrics, *arguments, **how, tolerance=1e-9 if dtype == np.float64 else 1e-5)
        distance = -float64_nearness(arguments[0], arguments[3], metric)
        check(expected, metrics_from_distance, distance, *arguments[1:3], *arguments[4:])


def test_distance_matrix_of_many_columns_in_float32():
    rng = np.random.default_rng(0)
    ids = random_ids(rng, 8, 9000, people=30)
    distance = rng.integers(0, 3000, (8, 9000)).astype(np.float32)
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
    scale = 2.0 ** data.draw(st.integers(-30, 30))  # exact
    arguments = (query * scale).astype(np.float32), *ids[:2], (gallery * scale).astype(np.float32), *ids[2:]
    check(slow(exact_nearness(query, gallery, metric), *ids), rank_metrics, *arguments, metric=metric, **blocks)


def test_the_way_of_the_gpu_counts_the_same(monkeypatch):
    monkeypatch.setattr(ranking, "_compare_in_turn", ranking._search_at_once)
    test_thousands_of_small_cases(chunk=0)
    test_people("cosine", np.float64)


# ---- The same whatever the blocks, the order, the caller's precision ----


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
        gallery, query = pictures[rng.integers(0, 60, 1500)], rng.normal(size=(20, 24)).astype(np.float32)
        ids = random_ids(rng, 20, 1500, people=6)
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
def test_collapsed_embeddings(spread):
    """Nearly (or quite) the same embedding for all: float64 tells them apart, and copies still count against."""
    rng = np.random.default_rng(3)
    arguments = list(people(rng, 300, 600, width=8, num_people=60))
    arguments[0], arguments[3] = (1 + spread * x.astype(np.float64) for x in (arguments[0], arguments[3]))
    check(slow_of(arguments), rank_metrics, *arguments, gallery_block=256)
    arguments[0], arguments[3] = (np.ones_like(x, dtype=np.float32) for x in (arguments[0], arguments[3]))
    check(slow_of(arguments), rank_metrics, *arguments, gallery_block=256)


PRECISIONS = {
    "nothing": "pass",
    "one setting for all": "torch.set_float32_matmul_precision('medium')",
    "the GPU's switch": "torch.backends.cuda.matmul.allow_tf32 = True",
    "both": "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.allow_tf32 = False",
    "per place": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
}


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't copy a process")
def test_the_product_is_float32_whatever_the_caller_allows():
    """TF32, bfloat16 and autocast are off inside, and the caller's setting is as before; in processes of their own."""
    code = f"""
import os, sys, torch
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from utils.ranking import rank_metrics
for name, setting in {PRECISIONS}.items():
    if os.fork() == 0:
        exec(setting)
        break
    assert os.wait()[1] == 0, name
else:
    os._exit(0)
state = lambda: [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
before, seen, addmm = state(), set(), torch.addmm
def spy(*arguments, **options):
    seen.add((state()[1], torch.is_autocast_enabled("cpu")))
    return addmm(*arguments, **options)
torch.addmm = spy
with torch.autocast("cpu", torch.bfloat16):
    ids = torch.arange(100) % 10
    rank_metrics(torch.randn(10, 4), ids[:10], ids[:10], torch.randn(100, 4), ids, ids + 1)
    try:
        rank_metrics(torch.ones(1, 2), [1], [1], torch.full((1, 2), torch.nan), [1], [2])
    except ValueError:
        seen.add("refused")
assert seen == {{("ieee", False), "refused"}}, seen
assert state() == before, (before, state())
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_lengths_of_all_sizes(metric):
    """Embeddings of zeros, tiny, huge, and one giant among the gallery."""
    rng = np.random.default_rng(6)
    query, gallery = rng.integers(-3, 4, (30, 3)), rng.integers(-3, 4, (200, 3))
    gallery[:20], query[0], gallery[7] = 0, 0, 10**6
    ids = random_ids(rng, 30, 200, people=8)
    expected = slow(exact_nearness(query, gallery, metric), *ids)
    for scale in (1.0, 2.0**-30, 2.0**30):
        arguments = (query * scale).astype(np.float32), *ids[:2], (gallery * scale).astype(np.float32), *ids[2:]
        check(expected, rank_metrics, *arguments, metric=metric, gallery_block=64)


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
    assert 300 in mapped.reads and max(mapped.reads) < 1500  # a block, and the images of the queries' people
    assert not recwarn.list


def test_inputs_are_left_as_they_are():
    arguments = people(np.random.default_rng(9), 10, 100, 4, 5)
    before = [x.copy() for x in arguments]
    distance = torch.rand(10, 100)
    copy = distance.clone()
    rank_metrics(*arguments, metric="euclidean")
    metrics_from_distance(distance, *arguments[1:3], *arguments[4:])
    assert all((a == b).all() for a, b in zip(arguments, before, strict=True)) and torch.equal(distance, copy)


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
        ({"gallery": np.ones((0, 3)), "gallery_pids": [], "gallery_camids": []}, r"not \(2, 3\) and \(0, 3\)"),
        ({"query": np.ones((0, 3)), "query_pids": [], "query_camids": []}, "must be 0 integers here"),
        ({"gallery_pids": [1, 2]}, r"pids and camids must be 3 integers here, not \(2,\)"),
        ({"query_camids": [[1], [1]]}, r"must be 2 integers here, not \(2, 1\)"),
        ({"query_pids": [1.0, 2.0]}, r"must be 2 integers here, not \(2,\) torch.float32"),
        ({"metric": "manhattan"}, "'manhattan': choose cosine or euclidean"),
        ({"gallery_camids": [1, 1, 1]}, "No query has a true match .*--ignore-cameras"),
        ({"query": np.array([[1, 1, 1], [1, np.nan, 1]])}, r"query embeddings hold NaN.* images \[1\],"),
        ({"gallery": np.array([[np.inf] * 3, [1] * 3, [-np.inf] * 3])}, r"gallery embeddings .* images \[0[,\]]"),
    ],
)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_refused(changes, words, metric):
    with pytest.raises(ValueError, match=words) as error:
        rank_metrics(**arguments_of(**{"metric": metric, **changes}))
    assert "\n" not in str(error.value)


def test_shares_of_the_queries_give_the_numbers_of_all():
    """What a process finds for its share is what one process finds: exactly in float64, in float32 to 1e-5."""
    arguments = people(np.random.default_rng(12), 90, 1500, width=32, num_people=200, noise=0.5)
    for dtype, tolerance in ((np.float64, 0), (np.float32, 1e-5)):
        arguments = arguments[0].astype(dtype), *arguments[1:3], arguments[3].astype(dtype), *arguments[4:]
        parts = slice(31), slice(31, 90)
        shares = [rank_queries(*(column[part] for column in arguments[:3]), *arguments[3:]) for part in parts]
        joined = {key: torch.cat([share[key] for share in shares]) for key in shares[0]}
        assert average(joined) == pytest.approx(rank_metrics(*arguments), rel=0, abs=tolerance)


def test_each_query_by_itself():
    """The example by hand, per query: two matches at ranks 2 and 4; a query without a match in zeros."""
    distance = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    ids = [5, 6], [1, 1], [9, 5, 9, 5], [2, 2, 2, 3]
    expected = {"num_matches": [2, 0], "first_rank": [2, 0], "last_rank": [4, 0], "ap": [0.5, 0],
                "ap_trapezoid": [((0 + 1 / 2) / 2 + (1 / 3 + 1 / 2) / 2) / 2, 0]}  # fmt: skip
    found = rank_queries_from_distance(distance, *ids)
    assert {key: pytest.approx(value.tolist()) for key, value in found.items()} == expected
    again = rank_queries(torch.zeros(2, 1), *ids[:2], -distance[:1].T, *ids[2:], "euclidean")
    assert {key: value[0] for key, value in again.items()} == {key: value[0] for key, value in found.items()}


@pytest.mark.parametrize("name", ["query", "gallery"])
def test_giant_embeddings(name):
    """A square beyond the range of the type is refused; float64 has more room."""
    arguments = arguments_of(metric="cosine")
    large = {**arguments, name: arguments[name] * np.float32(1e30)}
    with pytest.raises(ValueError, match=f"{name} embeddings hold NaN, infinite or giant"):
        rank_metrics(**large)
    assert rank_metrics(**{**large, name: large[name].astype(np.float64)}) == rank_metrics(**arguments)


def test_not_finite_embeddings_are_named_wherever_they_stand():
    query, query_pids, query_camids, gallery, gallery_pids, gallery_camids = people(
        np.random.default_rng(11), 10, 9000, 4, 500
    )
    for bad in ([8999], list(range(5, 9000, 500))):
        table = gallery.copy()
        table[bad, 1] = np.nan
        with pytest.raises(ValueError, match=rf"gallery.*images \[({'|'.join(map(str, bad))})[,\]]"):
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
    with pytest.raises(ValueError, match="must be 3 integers"):
        metrics_from_distance(distance, [1, 2], [1, 1], [1, 2], [2, 2, 2])
