"""utils/reranking.py beside a dense NumPy form typed from the definition, by hand, and what may not change a number."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from benchmarks import evaluator
from benchmarks import reranking as benchmark
from utils import reranking
from utils.ranking import metrics_from_distance
from utils.reranking import rerank

FILE = Path(reranking.__file__)


def dense(query, gallery, metric="cosine", k1=20, k2=6, lambda_=0.3):
    """The definition image by image, in float64, with whole matrices: (Q, G)."""
    images = np.concatenate([query, gallery]).astype(np.float64)
    if metric == "cosine":
        length = np.linalg.norm(images, axis=1, keepdims=True)
        images = images / np.where(length > 0, length, 1)
    square = np.array([((images - image) ** 2).sum(1) for image in images])
    largest = square.max(1, keepdims=True)
    d = square / np.where(largest > 0, largest, 1)
    everyone = range(len(images))
    order = [sorted(everyone, key=lambda j: (j != i, square[i, j], j)) for i in everyone]

    def reciprocal(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    v = np.zeros_like(d)
    for i in everyone:
        own = reciprocal(i, k1)
        members = set(own)
        for j in own:
            theirs = reciprocal(j, int(np.around(k1 / 2)))
            if 3 * len(theirs & own) > 2 * len(theirs):
                members |= theirs
        members = sorted(members)
        v[i, members] = np.exp(-d[i, members])
        v[i] /= v[i].sum()
    v = np.array([v[order[i][:k2]].mean(0) for i in everyone])
    q = len(query)
    s = np.array([[np.minimum(a, b).sum() for b in v[q:]] for a in v[:q]])
    return (1 - lambda_) * (1 - s / (2 - s)) + lambda_ * d[:q, q:]


def sparse(query, gallery, *arguments, **options):
    """What `rerank` gives, in one table (Q, G)."""
    slices, tables = zip(*rerank(query, gallery, *arguments, **options), strict=True)
    assert [row for here in slices for row in range(here.start, here.stop)] == list(range(len(query)))
    return torch.cat(tables).numpy()


def people(rng, num_query, num_gallery, width, num_people, noise=1.3, copies=0.1):
    """Pictures of people, some twice (the same person): query, its pids, gallery, its pids; float32."""
    pids = rng.integers(0, num_people, num_query + num_gallery)
    images = rng.normal(size=(num_people, width))[pids] + noise * rng.normal(size=(len(pids), width))
    for _ in range(int(copies * len(pids))):
        one, other = rng.integers(0, len(pids), 2)
        images[one], pids[one] = images[other], pids[other]
    images = images.astype(np.float32)
    return images[:num_query], pids[:num_query], images[num_query:], pids[num_query:]


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


# ---- The definition ----


def test_by_hand():
    """On a line: query 0, gallery 1 and 3; k1 = 1, k2 = 1. Each image's list is itself and the nearest: 01, 10, 21, so
    that R = {0, 1}, {1, 0}, {2}; round(1 / 2) = 0 adds nothing. Squared distances: 0-1 1, 0-2 9, 1-2 4; the largest of
    0 is 9, of 1 it is 4. v(0) ~ (1, e^-1/9), v(1) ~ (e^-1/4, 1), v(2) = (0, 0, 1)."""
    e = np.exp
    s = e(-1 / 4) / (1 + e(-1 / 4)) + e(-1 / 9) / (1 + e(-1 / 9))
    expected = [[0.7 * (1 - s / (2 - s)) + 0.3 / 9, 0.7 + 0.3]]
    points = np.array([[0.0]]), np.array([[1.0], [3.0]])
    assert sparse(*points, metric="euclidean", k1=1, k2=1) == pytest.approx(np.array(expected), abs=1e-15)
    assert dense(*points, metric="euclidean", k1=1, k2=1) == pytest.approx(np.array(expected), abs=1e-15)


def test_half_of_k1_is_rounded_to_the_even_number():
    """k1 = 9: 4 neighbours, k1 = 11: 6; with 5 both would differ."""
    query, _, gallery, _ = people(np.random.default_rng(0), 10, 90, 8, 6)
    for k1, half in ((9, 4), (11, 6)):
        assert int(np.around(k1 / 2)) == half
        np.testing.assert_allclose(sparse(query, gallery, k1=k1), dense(query, gallery, k1=k1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-13)])
@pytest.mark.parametrize(("num_query", "num_gallery", "k1", "k2"), [
    (20, 150, 20, 6), (30, 90, 7, 1), (5, 100, 13, 3), (40, 40, 5, 8), (12, 60, 1, 1), (1, 80, 40, 90),
])  # fmt: skip
def test_equals_the_dense_form(metric, dtype, tolerance, num_query, num_gallery, k1, k2):
    """Also k2 > k1 + 1, and k2 larger than the data."""
    query, _, gallery, _ = people(np.random.default_rng(k1), num_query, num_gallery, 16, 8)
    query, gallery = query.astype(dtype), gallery.astype(dtype)
    for lambda_ in (0.3, 0.0, 1.0):
        found = sparse(query, gallery, metric, k1, k2, lambda_)
        assert found.dtype == dtype and found.shape == (num_query, num_gallery)
        np.testing.assert_allclose(found, dense(query, gallery, metric, k1, k2, lambda_), rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_same_map_and_first_hundred_places(seed):
    rng = np.random.default_rng(seed)
    query, query_pids, gallery, gallery_pids = people(rng, 50, 350, 32, 20)
    ids = query_pids, np.zeros(50, dtype=int), gallery_pids, np.ones(350, dtype=int)
    expected, found = dense(query, gallery), sparse(query, gallery)
    np.testing.assert_allclose(np.sort(found)[:, :100], np.sort(expected)[:, :100], rtol=0, atol=1e-6)
    before = metrics_from_distance(-(query @ gallery.T), *ids)
    assert metrics_from_distance(found, *ids) == pytest.approx(metrics_from_distance(expected, *ids), abs=1e-6)
    assert metrics_from_distance(found, *ids)["mAP"] > before["mAP"] + 0.02  # what it is for


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 6), st.integers(1, 14), st.integers(1, 25), st.integers(1, 9),
       st.integers(1, 12), st.sampled_from([np.float32, np.float64, np.int64]))  # fmt: skip
def test_small_whole_numbers_full_of_ties(seed, num_query, num_gallery, k1, k2, block, dtype):
    """Few images, many of them equal or equally far, k1 and k2 often more than there are; any block."""
    rng = np.random.default_rng(seed)
    query, gallery = (rng.integers(-2, 3, (n, 3)).astype(dtype) for n in (num_query, num_gallery))
    expected = dense(query, gallery, "euclidean", k1, k2)
    np.testing.assert_allclose(sparse(query, gallery, "euclidean", k1, k2, block=block), expected, rtol=0, atol=1e-6)


def test_many_copies_of_one_picture():
    """More copies than neighbours: each comes first in its own list, and then those of the lowest index."""
    rng = np.random.default_rng(0)
    query, _, gallery, _ = people(rng, 10, 80, 24, 5)
    gallery[20:60] = gallery[20]
    images = torch.from_numpy(np.concatenate([query, gallery]))
    for block in (2048, 7):
        near, _ = reranking._neighbours(images, images.square().sum(1), 21, block, lambda steps, _: steps)
        assert near[55].tolist() == [55, *range(30, 50)] and near[35].tolist() == [35, *range(30, 35), *range(36, 51)]
    for metric in ("cosine", "euclidean"):
        np.testing.assert_allclose(sparse(query, gallery, metric), dense(query, gallery, metric), rtol=0, atol=1e-6)


def test_all_pictures_alike_are_equally_far():
    """No division by 0, and no error of the product divided by next to nothing."""
    images = np.ones((12, 4), dtype=np.float32)
    np.testing.assert_allclose(sparse(images[:2], images[2:], "euclidean", 20, 1), 0, rtol=0, atol=1e-6)
    images = np.repeat(np.random.default_rng(0).normal(size=(1, 300)).astype(np.float32), 40, axis=0)
    for metric in ("cosine", "euclidean"):
        found = sparse(images[:2], images[2:], metric)
        assert (found >= 0).all() and (found <= 1).all()
    assert np.isfinite(sparse(np.zeros_like(images[:2]), images[2:])).all()  # a vector without a direction


def test_where_the_product_alone_would_choose_wrong_neighbours():
    """Far from the origin the float32 product has no digit of the distances left; subtraction has all of them."""
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 64, (80, 4)) + 30_000).astype(np.float32)
    images = torch.from_numpy(images)
    square = images.square().sum(1)
    product = square[:, None] + square - 2 * images @ images.T
    exact = torch.cdist(images.double(), images.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert (product - exact.square()).abs().max() > 100
    near, _ = reranking._neighbours(images, square, 6, 16, lambda steps, _: steps)
    assert (exact.gather(1, near) <= exact.sort(1)[0][:, :6] + 1e-9).all()


# ---- What may not change the numbers ----


@pytest.mark.parametrize("block", [1, 2, 9, 40, 64, 1000])
def test_block_does_not_matter(block):
    query, _, gallery, _ = people(np.random.default_rng(1), 15, 60, 12, 6, copies=0.5)
    np.testing.assert_allclose(sparse(query, gallery, block=block), sparse(query, gallery), rtol=0, atol=1e-6)


def test_no_table_of_all_distances():
    """Nothing that is made on the way has half the numbers of a table of queries x gallery."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            tensors = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if torch.is_tensor(x)]
            self.numel = max([self.numel, *(x.numel() for x in tensors)])
            return result

    query, _, gallery, _ = people(np.random.default_rng(0), 100, 900, 8, 50)
    with Largest() as mode:
        for _ in rerank(query, gallery, k1=8, k2=4, block=64):
            pass
    assert 64 * 64 <= mode.numel < 100 * 900 / 2 < 1000 * 1000 / 4


def test_arrays_and_tensors_of_any_kind(tmp_path):
    query, _, gallery, _ = people(np.random.default_rng(2), 10, 50, 12, 6)
    expected = sparse(query, gallery)
    np.save(tmp_path / "gallery.npy", gallery)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    given = (query, mapped), (query.astype(">f4"), gallery), tensors(query, gallery), (torch.from_numpy(query), mapped)
    for one, other in given:
        assert (sparse(one, other) == expected).all()
    with_gradient = torch.from_numpy(query).requires_grad_()
    for _, distance in rerank(with_gradient, gallery, block=8):
        assert not distance.requires_grad and torch.is_grad_enabled()
    half = [array.astype(np.float16) for array in (query, gallery)]
    np.testing.assert_allclose(sparse(*half), dense(*half), rtol=0, atol=1e-6)  # in float32
    assert sparse(query, gallery.astype(np.float64)).dtype == np.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert (sparse(*tensors(query, gallery)) == expected).all()
    assert (people(np.random.default_rng(2), 10, 50, 12, 6)[2] == gallery).all()  # which is not edited


def test_coarse_products_of_the_caller_are_not_used(monkeypatch):
    """The switch is at full precision during each product, and afterwards where it was, whatever happens."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("before torch 2.9 there is no such switch for the CPU")
    switch, seen, addmm = torch.backends.mkldnn.matmul, [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **b: seen.append(switch.fp32_precision) or addmm(*a, **b))
    query, _, gallery, _ = people(np.random.default_rng(2), 10, 50, 12, 6)
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "bf16"
        sparse(query, gallery)
        assert set(seen) == {"ieee"} and switch.fp32_precision == "bf16"
        monkeypatch.setattr(torch, "addmm", None)
        with pytest.raises(TypeError):
            sparse(query, gallery)
        assert switch.fp32_precision == "bf16"
    finally:
        switch.fp32_precision = before


def test_progress_sees_every_step(capsys):
    query, _, gallery, _ = people(np.random.default_rng(2), 10, 50, 12, 6)
    seen = {}

    def progress(steps, description):
        seen[description] = [len(steps), 0]
        for step in steps:
            seen[description][1] += 1
            yield step

    assert (sparse(query, gallery, block=25, progress=progress) == sparse(query, gallery, block=25)).all()
    assert seen == {"neighbours": [6, 6], "vectors": [6, 6], "re-ranking": [1, 1]}  # 25 x 25: 10 of 60 rows
    sparse(query, gallery, progress=tqdm)
    assert "neighbours: 100%" in capsys.readouterr().err


# ---- Errors, and the file on its own ----


@pytest.mark.parametrize(("options", "message"), [
    ({"metric": "dot"}, "Unknown metric 'dot'"), ({"k1": 0}, "k1 and k2 must be at least 1"), ({"k2": 0}, "at least 1"),
    ({"lambda_": 1.5}, "lambda from 0 to 1"), ({"lambda_": float("nan")}, "lambda from 0 to 1"),
    ({"lambda_": -0.1}, "lambda from 0 to 1"), ({"gallery": np.ones((3, 5))}, r"\(2, 4\) and \(3, 5\)"),
    ({"gallery": np.ones(4)}, r"not \(2, 4\) and \(4,\)"), ({"query": np.ones((0, 4))}, r"not \(0, 4\)"),
    ({"gallery": np.ones((0, 4))}, r"and \(0, 4\)"),
])  # fmt: skip
def test_wrong_input_is_refused_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        rerank(**{"query": np.ones((2, 4)), "gallery": np.ones((3, 4)), **options})  # nothing is asked of it yet


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_not_finite(value, metric):
    gallery = np.ones((3, 4), dtype=np.float32)
    gallery[1, 2] = value
    with pytest.raises(ValueError, match=r"Embeddings \[3\] .* NaN, infinite or too large"):
        sparse(np.ones((2, 4), dtype=np.float32), gallery, metric)


def test_file_can_be_copied_alone(tmp_path):
    names = {alias.name for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.Import)
             for alias in node.names}  # fmt: skip
    froms = {node.module for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.ImportFrom)}
    assert names | froms <= {"torch", "math"}
    shutil.copy(FILE, tmp_path)
    code = "import torch, reranking; print(len(list(reranking.rerank(torch.eye(3), torch.eye(3)))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


# ---- benchmarks/reranking.py ----


@pytest.mark.parametrize("way", benchmark.DENSE)
def test_dense_ways_of_the_benchmark_agree(way, tmp_path):
    """Among them torchreid's own code, where it is installed: k1 = 20, k2 = 6, data without ties."""
    evaluator.generate(tmp_path, 64, 60, 400, 20, 4, 100, 0.8)
    arrays = evaluator.load(tmp_path)
    mine = benchmark.timed("this re-ranking", arrays)
    try:
        theirs = benchmark.timed(way, arrays)
    except ModuleNotFoundError:
        pytest.skip("torchreid is not installed")
    assert theirs["metrics"] == pytest.approx(mine["metrics"], rel=0, abs=1e-6)
    assert theirs["first"].shape == (60, 100)
    torch.testing.assert_close(theirs["first"], mine["first"], rtol=0, atol=1e-6)


def test_tables_and_targets_of_the_benchmark():
    def way(seconds, gib):
        spread = {"median": seconds, "min": seconds, "max": seconds + 1, "n": 3}
        return {"seconds": spread, "cpu_seconds": spread, "extra_gib": gib, "times_ours": seconds / 4,
                "metrics": {"rank1": 0.5, "mAP": 0.25}, "queries_that_differ": 7}  # fmt: skip

    ways = {"this re-ranking": way(4.0, 0.5), "products alone": way(2.0, 0.25), "torchreid, NumPy": way(15.0, 8.5),
            "dense, PyTorch": {"missing": "not there"}}  # fmt: skip
    result = {"size": "market", "device": "cpu", "query": 3368, "gallery": 15913, "dim": 2048, "ways": ways}
    text = benchmark.table(result)
    for part in ("3,368 x 15,913 x 2,048", "15.000 (15.000 to 16.000)", "3.75", "8.50", "25.0000", "7 of 3368"):
        assert part in text
    assert "0.27 of torchreid's time (target 0.25, MISSED), 0.50 GiB (target 1 GiB, met)" in benchmark.verdict(result)
    result["device"] = "cuda"
    assert "4.00 s (target 1 s, MISSED)" in benchmark.verdict(result)
