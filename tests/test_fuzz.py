"""Thousands of odd inputs: each gives the right answer or one sentence, raised by this project and not inside torch.

File names, label arrays, feature arrays, bytes of files, flag values. Every test below tries EXAMPLES inputs;
FUZZ_EXAMPLES=10000 in the environment tries more, other ones each time.
"""

import contextlib
import io
import json
import math
import os
import random
import shlex
import struct
import tempfile
import traceback
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import evaluate
import train
from data import DATASETS, load_dataset
from data.images import BadImage, decode, find_bad_images
from data.sampler import PKSampler, RandomSampler
from losses import LOSSES, ROWS, build_loss, parse_expression, row_name, with_default_weights
from models import ARCHS
from models.backbone import read_state_dict
from utils.checkpoint import load_checkpoint, load_log
from utils.environment import find_device
from utils.features import Features, load_features, save_features
from utils.files import load_json
from utils.flags import FREE, build_parser, new_run
from utils.ranking import metrics_from_distance, rank_metrics

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 50))
ROOT = Path(__file__).resolve().parent.parent
KEYS = ["rank1", "rank5", "rank10", "rank20", "mAP", "mAP_trapezoid", "mINP", "num_queries"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is not the complete data set"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
]
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip


def outcome(function, *args, errors=(ValueError, FileNotFoundError), **settings):
    """What the function returns, or None and the sentence of an error that this project itself raised."""
    try:
        return function(*args, **settings), None
    except errors as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        assert Path(raised_in).is_relative_to(ROOT), f"raised in {raised_in}: {error!r}"
        sentence = str(error)
        assert sentence and "\n" not in sentence and "Traceback" not in sentence
        return None, sentence


# ----------------------------------------------------------------------------------------------------------- file names

ANY_NAME = st.one_of(
    st.from_regex(r"-?[0-9]{0,20}_?c[0-9]{0,2}[sf_]?[0-9_]{0,4}\.(jpg|jpeg|png|PNG|db)", fullmatch=True),
    st.binary(min_size=1, max_size=30).map(lambda name: os.fsdecode(name.replace(b"/", b"_").replace(b"\0", b"_"))),
    st.text(min_size=1, max_size=20).map(lambda name: name.replace("/", "_").replace("\0", "_") + ".jpg"),
).filter(lambda name: name not in (".", "..") and len(encoded(name)) < 200)


def encoded(name):
    return name.encode(errors="surrogatepass")


def parse(dataset, name):
    """(pid, camid) of an image, None for what is no image, "?" for what cannot be parsed; without a regex."""
    if not name.lower().endswith((".jpg", ".jpeg", ".png")) or name.startswith("."):
        return None
    pid, _, rest = name.partition("_c")
    digits = all(letter in "0123456789" for letter in pid) and 1 <= len(pid) <= 18
    camera = rest[:1] != "" and rest[0] in "0123456789"
    if dataset == "duke":
        return (int(pid), int(rest[0])) if digits and int(pid) and camera and rest[1:3] == "_f" else "?"
    return (int(pid), int(rest[0])) if (digits or pid == "-1") and camera and rest[1:2] == "s" else "?"


@fuzz
@given(names=st.lists(ANY_NAME, max_size=3), dataset=st.sampled_from(["market", "duke"]),
       place=st.sampled_from(["bounding_box_train", "query", "bounding_box_test"]))  # fmt: skip
def test_file_names(names, dataset, place):
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = "0007_c1s1_000001_00.jpg" if dataset == "market" else "0007_c1_f0000001.jpg"
        for folder in ("bounding_box_train", "query", "bounding_box_test"):
            Path(root, folder).mkdir()
            Path(root, folder, known).touch()
        written = []
        for name in names:
            with contextlib.suppress(OSError, UnicodeEncodeError):  # what the file system does not take
                Path(root, place, name).touch()
                written.append(name)
        split, sentence = outcome(load_dataset, dataset, root)
        parsed = {name: parse(dataset, name) for name in {*written, known}}
    if "?" in parsed.values():
        assert "Cannot parse the file name" in sentence
        return
    records = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}[place]
    found = {record.path.name: (record.pid, record.camid) for record in getattr(split, records)}
    lowest = 0 if records == "gallery" else 1
    assert found == {name: ids for name, ids in parsed.items() if ids and (dataset == "duke" or ids[0] >= lowest)}
    assert sorted({record.label for record in split.train}) == list(range(len({record.pid for record in split.train})))


@fuzz
@given(name=st.one_of(st.text(max_size=10), st.sampled_from([*DATASETS, "Market", "market "])),
       place=st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=10))  # fmt: skip
def test_data_set_names_and_places(name, place):
    with tempfile.TemporaryDirectory() as root:
        options = {"synthetic_ids": 1} if name == "synthetic" else {}
        assert outcome(load_dataset, name, os.path.join(root, "x" + place), **options)[1]


# ------------------------------------------------------------------------------------------------------- labels: losses

LABELS = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=9),
    st.integers(1, 9).map(lambda n: [0] * n),
    st.integers(1, 4).map(lambda n: list(range(n))),
)
DTYPES = st.sampled_from([torch.int64, torch.int64, torch.int32, torch.int16, torch.uint8])


@fuzz
@given(data=st.data(), row=st.sampled_from([*ROWS]), labels=LABELS, dtype=DTYPES, train_mode=st.booleans())
def test_any_batch_of_labels_has_a_finite_loss_and_gradient(data, row, labels, dtype, train_mode):
    """One image, one identity, no pair, equal embeddings, zeros, huge ones: a finite number and finite gradients."""
    torch.manual_seed(0)
    loss_fn = build_loss(row, 4, 5).train(train_mode)
    kind = data.draw(st.sampled_from(["normal", "zeros", "equal", "huge", "tiny"]))
    embeddings = {
        "normal": torch.randn(len(labels), 5),
        "zeros": torch.zeros(len(labels), 5),
        "equal": torch.ones(len(labels), 5),
        "huge": torch.randn(len(labels), 5) * 1e6,
        "tiny": torch.randn(len(labels), 5) * 1e-20,
    }[kind].requires_grad_()
    labels = torch.tensor(labels, dtype=dtype)
    before = labels.clone()
    loss, sentence = outcome(loss_fn, embeddings, labels)
    assert sentence is None and loss.shape == () and loss.isfinite()
    loss.backward()
    assert embeddings.grad.isfinite().all() and torch.equal(labels, before)
    assert all(parameter.grad.isfinite().all() for parameter in loss_fn.parameters() if parameter.grad is not None)


@fuzz
@given(
    row=st.sampled_from([*ROWS]),
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=9),
    seed=st.integers(0, 99),
)
def test_the_order_of_a_batch_does_not_matter(row, labels, seed):
    """But to N-pair, which takes the first two images of an identity: there, each identity's own order is kept."""
    torch.manual_seed(seed)
    loss_fn = build_loss(row, 4, 5).double().eval()
    embeddings, labels = torch.randn(len(labels), 5, dtype=torch.float64), torch.tensor(labels)
    order = labels.argsort(stable=True) if row == "npair" else torch.randperm(len(labels))
    torch.testing.assert_close(loss_fn(embeddings[order], labels[order]), loss_fn(embeddings, labels))


@fuzz
@given(
    row=st.sampled_from([*ROWS]),
    labels=st.lists(st.one_of(st.integers(-(2**63), -1), st.integers(4, 2**63 - 1)), min_size=2, max_size=4),
    place=st.integers(0, 3),
)
def test_labels_out_of_range(row, labels, place):
    """A loss that compares labels takes any integers; one with class vectors refuses what is no class."""
    torch.manual_seed(0)
    loss_fn = build_loss(row, 4, 5)
    embeddings = torch.randn(len(labels), 5)
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    if not loss_fn.state_dict():
        again = torch.tensor([numbers[label] for label in labels])
        assert torch.equal(loss_fn(embeddings, torch.tensor(labels)), loss_fn(embeddings, again))
    else:
        state = {name: value.clone() for name, value in loss_fn.state_dict().items() if not name.endswith("step")}
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            loss_fn(embeddings, torch.tensor(labels))
        assert all(torch.equal(loss_fn.state_dict()[name], value) for name, value in state.items())


# ----------------------------------------------------------------------------------------------------- labels: samplers


@fuzz
@given(data=st.data(), p=st.integers(-1, 9), k=st.one_of(st.integers(-1, 6), st.integers(2**40, 2**70)),
       seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))  # fmt: skip
def test_pk_batches(data, p, k, seed, epoch):
    ids = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6))
    labels = data.draw(st.lists(st.sampled_from(ids), max_size=40))
    form = data.draw(st.sampled_from([list, np.array, torch.tensor]))
    sampler, sentence = outcome(PKSampler, form(labels) if labels else [], p, k, seed)
    possible = p >= 1 and k >= 1 and len(set(labels)) >= p and len(labels) >= p * k
    assert (sentence is None) == possible
    if not possible:
        return
    batches = sampler.batches(epoch)
    assert batches.shape == (len(labels) // (p * k), p * k) and torch.equal(batches, sampler.batches(epoch))
    for batch in batches.tolist():
        groups = [[labels[index] for index in batch[start : start + k]] for start in range(0, p * k, k)]
        assert all(len(set(group)) == 1 for group in groups) and len({group[0] for group in groups}) == p
        assert all(batch.count(index) == 1 or labels.count(labels[index]) < k for index in batch)


@fuzz
@given(num_images=st.integers(0, 200), batch_size=st.one_of(st.integers(-1, 60), st.just(2**70)),
       seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))  # fmt: skip
def test_random_batches(num_images, batch_size, seed, epoch):
    sampler, sentence = outcome(RandomSampler, num_images, batch_size, seed)
    assert (sentence is None) == (1 <= batch_size <= num_images)
    if sampler:
        batches = sampler.batches(epoch)
        assert batches.shape == (num_images // batch_size, batch_size) and batches.unique().numel() == batches.numel()
        assert batches.min() >= 0 and batches.max() < num_images


# ------------------------------------------------------------------------------------------------------- feature arrays


def slow_metrics(nearness, query_pids, query_camids, gallery_pids, gallery_camids):
    """The protocol, image by image, on exact numbers (large = near); None if no query has a true match."""
    found = []
    for row, pid, camid in zip(nearness, query_pids, query_camids, strict=True):
        ranked = [
            (near, other == pid)
            for near, other, camera in zip(row, gallery_pids, gallery_camids, strict=True)
            if other != -1 and not (other == pid and camera == camid)
        ]
        matches = sorted((near for near, same in ranked if same), reverse=True)
        if not matches:
            continue
        ranks = [i + sum(near >= match for near, same in ranked if not same) for i, match in enumerate(matches, 1)]
        precision = [i / rank for i, rank in enumerate(ranks, 1)]
        before = [1 if rank == 1 else (i - 1) / (rank - 1) for i, rank in enumerate(ranks, 1)]
        ap, n = sum(precision) / len(ranks), len(ranks)
        trapezoid = sum((a + b) / 2 for a, b in zip(before, precision, strict=True)) / n
        found.append([*(ranks[0] <= k for k in (1, 5, 10, 20)), ap, trapezoid, n / ranks[-1]])
    return dict(zip(KEYS, [*np.mean(np.array(found, float), 0), len(found)], strict=True)) if found else None


def exact_similarity(query, gallery, metric):
    """Orders as the metric does, without rounding: signed squared cosines, or minus squared distances."""
    table = []
    for q in query.tolist():
        q, row = [Fraction(value) for value in q], []
        for g in gallery.tolist():
            g = [Fraction(value) for value in g]
            dot, square = sum(a * b for a, b in zip(q, g, strict=True)), sum(a * a for a in g)
            if metric == "cosine":
                row.append(dot * abs(dot) / square if square else Fraction(0))
            else:
                row.append(2 * dot - square)
        table.append(row)
    return table


def assert_metrics(found, expected):
    assert list(found) == KEYS and found == pytest.approx(expected, rel=0, abs=1e-9)


def draw_ids(data, length, wild=False):
    values = [-1, 0, 1, 2, 3]
    if wild:
        values += [-5, 2**31 - 1, 2**31, -(2**63), 2**63 - 1]
    return data.draw(st.lists(st.sampled_from(values), min_size=length, max_size=length))


def as_ids(data, ids):
    """The same integers as an array, a list or a tensor, in a type that holds them."""
    forms = [
        dtype for dtype in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64, ">i4", ">i8")
        if all(np.iinfo(dtype).min <= value <= np.iinfo(dtype).max for value in ids)
    ]  # fmt: skip
    form = data.draw(st.sampled_from([*forms, list, torch.tensor]))
    if form is list:
        return ids
    return torch.tensor(ids, dtype=torch.int64) if form is torch.tensor else np.array(ids, dtype=form)


FLOATS = st.sampled_from([np.float16, np.float32, np.float64, ">f4", ">f8"])


@fuzz
@given(data=st.data(), Q=st.integers(1, 5), G=st.integers(1, 12), D=st.integers(1, 4),
       metric=st.sampled_from(["cosine", "euclidean"]))  # fmt: skip
def test_finite_features_are_ranked_exactly(data, Q, G, D, metric):
    """Ties, zeros, junk, huge and negative ids, one row, any type of float, rows scaled by powers of two. Numbers whose
    differences are larger than what counts as equal."""
    dtype = data.draw(FLOATS)
    wide = metric == "euclidean" and np.dtype(dtype).itemsize == 8 and data.draw(st.booleans())
    cells = st.integers(-1000, 1000) if wide else st.integers(-3, 3)
    limit = {2: 3, 4: 20, 8: 60}[np.dtype(dtype).itemsize]
    tables = []
    for rows in (Q, G):
        table = np.array(data.draw(st.lists(st.lists(cells, min_size=D, max_size=D), min_size=rows, max_size=rows)))
        if metric == "cosine":
            scales = data.draw(st.lists(st.integers(-limit, limit), min_size=rows, max_size=rows))
            table = table * 2.0 ** np.array(scales)[:, None]
        tables.append(table.astype(dtype))
    if data.draw(st.booleans()):
        tables = [torch.tensor(table.astype(table.dtype.newbyteorder("="))) for table in tables]
    elif data.draw(st.booleans()):
        tables = [np.asfortranarray(table) for table in tables]
    ids = [draw_ids(data, length, wild=True) for length in (Q, Q, G, G)]
    expected = slow_metrics(exact_similarity(*tables, metric), *ids)
    columns = [as_ids(data, column) for column in ids]
    found, sentence = outcome(rank_metrics, tables[0], *columns[:2], tables[1], *columns[2:], metric=metric)
    if expected is None:
        assert "No query has a true match" in sentence
    else:
        assert_metrics(found, expected)


ODD = [0.0, -0.0, 1.0, -1.5, 1e-45, 1e-310, 1e-160, 1e30, 1e38, -1e200, 1e308, math.nan, math.inf, -math.inf]


@fuzz
@given(data=st.data(), Q=st.integers(0, 3), G=st.integers(0, 5), D=st.integers(0, 3),
       metric=st.sampled_from(["cosine", "euclidean"]))  # fmt: skip
def test_odd_features(data, Q, G, D, metric):
    """NaN, infinity, subnormal and giant numbers, nothing at all: the exact answer, or a sentence."""
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    query, gallery = (
        np.array(data.draw(st.lists(st.sampled_from(ODD), min_size=n * D, max_size=n * D))).reshape(n, D)
        for n in (Q, G)
    )
    with np.errstate(over="ignore"):
        query, gallery = query.astype(dtype), gallery.astype(dtype)
    ids = [draw_ids(data, length) for length in (Q, Q, G, G)]
    found, sentence = outcome(rank_metrics, query, *ids[:2], gallery, *ids[2:], metric=metric)
    if sentence is None:
        assert all(0 <= found[key] <= 1 for key in KEYS[:-1])
    if not Q or not G or not D or not np.isfinite(query).all() or not np.isfinite(gallery).all():
        assert sentence
        return
    expected = slow_metrics([[0] * G] * Q, *ids)
    sizes = np.abs(np.concatenate([query, gallery]).astype(float))  # squares must fit the type
    giant, tiny = (1e150, 1e-150) if dtype is np.float64 else (1e18, 1e-15)
    if sizes.max() > giant:
        assert "giant values" in sentence
    elif expected is None:
        assert "No query has a true match" in sentence
    else:
        assert sentence is None
        sizes = sizes.max(1)
        unit = [np.array([row / (np.abs(row).max() or 1) for row in table.astype(float)]) for table in (query, gallery)]
        unit = [np.where(np.abs(table) < 1e-6, 0, table) for table in unit]
        if metric == "cosine" and all(set(np.abs(table).flat) <= {0, 1} for table in unit) and sizes[sizes > 0].min(
                initial=1) > tiny:  # fmt: skip
            assert_metrics(found, slow_metrics(exact_similarity(*unit, metric), *ids))  # else rounding decides


@fuzz
@given(data=st.data(), Q=st.integers(0, 4), G=st.integers(0, 6))
def test_any_matrix_of_distances(data, Q, G):
    values = [0, 1, 2, 0.5, -3, 1e30, -1e300, 1e-300] + data.draw(st.sampled_from([[], [math.nan], [math.inf]]))
    cells = data.draw(st.lists(st.sampled_from(values), min_size=Q * G, max_size=Q * G))
    distance = np.array(cells, dtype=float).reshape(Q, G)
    if data.draw(st.booleans()) and not (np.abs(distance) > 1e38).any():
        distance = torch.tensor(distance, dtype=torch.float32)
    ids = [draw_ids(data, length, wild=True) for length in (Q, Q, G, G)]
    columns = [as_ids(data, column) for column in ids]
    found, sentence = outcome(metrics_from_distance, distance, *columns)
    finite = bool(np.isfinite(np.asarray(distance)).all())
    expected = slow_metrics([[-value for value in row] for row in distance.tolist()], *ids) if finite else None
    if sentence is None and finite:
        assert_metrics(found, expected)
    else:
        assert sentence and (not finite or not Q or not G or "No query has a true match" in sentence)


@fuzz
@given(data=st.data())
def test_features_that_do_not_fit(data):
    """Every way to be wrong in shape or type, one at a time, is a sentence; and so is a file that holds it."""
    good = [np.ones((2, 3), np.float32), np.array([1, 2]), np.array([1, 1]), np.ones((4, 3), np.float32)]
    good += [np.array([1, 2, 1, 2]), np.array([2, 2, 1, 1])]
    which = data.draw(st.integers(0, 5))
    wrong = data.draw(hnp.arrays(
        st.one_of(hnp.integer_dtypes(), hnp.floating_dtypes(), hnp.boolean_dtypes(), hnp.complex_number_dtypes(),
                  hnp.unicode_string_dtypes(), hnp.byte_string_dtypes(), hnp.datetime64_dtypes()),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))  # fmt: skip
    arrays = [*good[:which], wrong, *good[which + 1 :]]
    fits = wrong.shape == good[which].shape and wrong.dtype.kind in ("f" if which in (0, 3) else "iu")
    try:
        scored, sentence = rank_metrics(*arrays), None
    except (ValueError, TypeError, RuntimeError, IndexError) as error:  # of the evaluator itself, or torch's
        scored, sentence = None, str(error)
    finite = wrong.dtype.kind not in "fc" or bool(np.isfinite(wrong).all())
    if not fits and not (wrong.shape == good[which].shape and wrong.dtype.kind in "biuc"):
        assert sentence, (which, wrong)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, data.draw(st.sampled_from(["features.npz", "features"])))
        saved, refused = outcome(save_features, path, Features(arrays[0], *arrays[1:3], arrays[3], *arrays[4:]))
        assert (refused is None) == fits
        if saved:
            loaded = load_features(path)
            score, again = outcome(evaluate.score, loaded)
            unknown = min(loaded.query_camids.min(), loaded.gallery_camids.min()) < 0  # cameras: ignored
            assert (score, again) == (scored, sentence) or not finite or wrong.dtype.itemsize > 8 or unknown
        else:
            assert list(Path(folder).iterdir()) == []


# ------------------------------------------------------------------------------------------------------- bytes of files


def mutated(content, rng):
    """A few bytes changed, a piece removed, doubled or cut off."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, size = rng.randrange(len(content) + 1), rng.randint(0, 20)
        kind = rng.randrange(5)
        if kind == 0:
            del content[place:]
        elif kind == 1:
            del content[place : place + size]
        elif kind == 2:
            content[place:place] = content[place : place + size]
        elif kind == 3:
            content[place : place + size] = rng.randbytes(len(content[place : place + size]))
        elif content:
            content[place % len(content)] ^= 1 << rng.randrange(8)
    return bytes(content)


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0"  # EXIF: to be rotated


def image_bytes():
    """The same picture in every format that is read, and some that are not."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 12, 3), dtype=np.uint8))
    kinds = [("JPEG", {}), ("JPEG", {"progressive": True, "exif": TURNED})]
    kinds += [(name, {}) for name in ("PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "ICO", "TGA")]
    found = []
    for name, options in kinds:
        file = io.BytesIO()
        picture.save(file, name, **options)
        found.append(file.getvalue())
    bomb = struct.pack(">II5B", 20_000, 20_000, 8, 2, 0, 0, 0)
    return [*found, b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bomb + struct.pack(">I", zlib.crc32(b"IHDR" + bomb))]


IMAGES = image_bytes()


@fuzz
@given(seed=st.integers(0, 2**32), content=st.sampled_from(IMAGES))
def test_broken_image_files(seed, content):
    """Decoded, or BadImage with the path; and --skip-bad-images judges alike."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "0001_c1s1_000001_00.jpg")
        path.write_bytes(mutated(content, random.Random(seed)))
        arrays, sentence = outcome(decode, path, [(16, 8), (18, 9)], errors=BadImage)
        assert sentence is None or str(path) in sentence
        assert sentence is not None or [array.shape for array in arrays] == [(16, 8, 3), (18, 9, 3)]
        assert list(find_bad_images([path], 1)) == ([0] if sentence else [])


def saved_bytes(save, suffix=""):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"file{suffix}")
        save(path)
        return path.read_bytes()


NUMBERS = np.arange(12.0).reshape(4, 3).astype(np.float32), np.arange(4), np.arange(4)
NPZ = saved_bytes(lambda path: save_features(path, Features(*NUMBERS, *NUMBERS)), ".npz")
NPY = [saved_bytes(lambda path, array=array: np.save(path, array), ".npy") for array in NUMBERS]
STATE = {"a.weight": torch.ones(3, 2), "a.bias": torch.zeros(3), "step": torch.tensor(1)}
CHECKPOINT = saved_bytes(lambda path: torch.save({"model": STATE, "loss": {}, "epoch": 1, "args": "{}"}, path))
OLD_CHECKPOINT = saved_bytes(lambda path: torch.save(
    {"model": STATE, "loss": {}, "epoch": 1, "args": "{}"}, path, _use_new_zipfile_serialization=False))  # fmt: skip


@fuzz
@given(seed=st.integers(0, 2**32), layout=st.sampled_from(["npz", "folder"]))
def test_broken_feature_files(seed, layout):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "features.npz" if layout == "npz" else "features")
        if layout == "npz":
            path.write_bytes(mutated(NPZ, rng))
        else:
            path.mkdir()
            for index, name in enumerate(Features._fields[:6]):
                array = NPY[index % 3]
                (path / f"{name}.npy").write_bytes(mutated(array, rng) if rng.random() < 0.3 else array)
        features, sentence = outcome(load_features, path)
        if features:
            outcome(evaluate.score, features)


@fuzz
@given(seed=st.integers(0, 2**32), content=st.sampled_from([CHECKPOINT, OLD_CHECKPOINT]))
def test_broken_checkpoints_and_weights(seed, content):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "last.pt")
        path.write_bytes(mutated(content, random.Random(seed)))
        checkpoint, sentence = outcome(load_checkpoint, path)
        assert sentence or {"model", "loss", "epoch", "args"} <= checkpoint.keys()
        outcome(read_state_dict, path)


@fuzz
@given(content=st.one_of(
    st.binary(max_size=40), st.text(max_size=40).map(lambda text: text.encode(errors="surrogatepass")),
    st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
    .map(lambda value: json.dumps(value).encode())), epochs=st.integers(0, 3))  # fmt: skip
@example(content=b'{"epoch": 1}\n{"epoch": 2}\n{"ep', epochs=2)
def test_broken_json(content, epochs):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "args.json")
        path.write_bytes(content)
        found, sentence = outcome(load_json, path, ("loss",))
        assert sentence or "loss" in found
        log, sentence = outcome(load_log, path, epochs)
        assert sentence or [line["epoch"] for line in log] == list(range(1, epochs + 1))


# ---------------------------------------------------------------------------------------------------------------- flags

NUMBER = st.one_of(
    st.sampled_from("0 1 2 16 1e-3 0.5 -1 -0 nan inf -inf 1e999 None 1_0 0x1".split() + ["", " "]),
    st.integers().map(str),
    st.floats().map(str),
    st.integers(10**300, 10**330).map(str),
)  # fmt: skip
LOSS = st.one_of(
    st.sampled_from([*ROWS, "", *"arcfac + softmax+ softmax+softmax 0*softmax+1e-5*center 1e999*softmax".split()]),
    st.lists(st.tuples(NUMBER, st.sampled_from(list(LOSSES))), min_size=1, max_size=3)
    .map(lambda terms: "+".join(f"{weight}*{name}" for weight, name in terms)),
    st.text(max_size=12),
)  # fmt: skip
ARGUMENT = st.builds(
    "{}{}={}".format, st.sampled_from(["", "", "", "arcface.", "triplet.", "x."]),
    st.sampled_from(["", *"margin scale gamma alpha num_bins l2 label_smoothing num_classes lambda_base".split()]),
    NUMBER) | st.text(max_size=8)  # fmt: skip
VALUES = {
    "--loss": LOSS, "--dataset": st.sampled_from([*DATASETS, "marked", ""]), "--data-dir": st.text(max_size=5),
    "--loss-lr": NUMBER, "--synthetic-ids": NUMBER, "--arch": st.sampled_from([*ARCHS, "vgg"]), "--height": NUMBER,
    "--weights": st.sampled_from(["none", "imagenet", "file"]), "--width": NUMBER, "--epochs": NUMBER, "--lr": NUMBER,
    "--recipe": st.sampled_from(["controlled", "published", "best"]), "--weight-decay": NUMBER, "--p": NUMBER,
    "--sampler": st.sampled_from(["pk", "random", "all"]), "--batch-size": NUMBER, "--k": NUMBER, "--seed": NUMBER,
    "--workers": NUMBER, "--cache": st.sampled_from(["auto", "off", "on"]), "--eval-every": NUMBER,
    "--eval-on": st.sampled_from(["test", "val", "train"]), "--metric": st.sampled_from(["cosine", "euclidean", "l1"]),
}  # fmt: skip
SWITCHES = ["--skip-bad-images", "--random-crop", "--no-random-crop", "--amp", "--compile", "--deterministic"]
SWITCHES += ["--ignore-cameras", "--resume", "--unknown"]


@st.composite
def command_lines(draw):
    words = ["--loss", draw(LOSS), "--dataset", draw(VALUES["--dataset"])] if draw(st.integers(0, 9)) else []
    for flag in draw(
        st.lists(st.sampled_from([*VALUES, *SWITCHES, "--loss-args", "--milestones"]), max_size=4, unique=True)
    ):
        words.append(flag)
        if flag in VALUES:
            words.append(draw(VALUES[flag]))
        elif flag in ("--loss-args", "--milestones"):
            words += draw(st.lists(ARGUMENT if flag == "--loss-args" else NUMBER, max_size=3))
    return words


def refused_flags(function, *args):
    """(result, None), or (None, sentence) where argparse ended the script with code 2."""
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            return function(*args), None
    except SystemExit as end:
        sentence = error.getvalue().splitlines()[-1]
        assert end.code == 2 and ": error: " in sentence
        return None, sentence


class Reached(Exception):
    """The flags were accepted."""


@fuzz
@given(words=command_lines())
@example(words=["--loss", "softmax", "--dataset", "market", "--seed", "1" + "0" * 310])
@example(words=["--loss", "softmax", "--dataset", "market", "--milestones", "-1"])
@example(words=["--loss", "softmax", "--dataset", "market", "--milestones"])
@example(words=["--loss", "histogram", "--dataset", "market", "--loss-args", "num_bins=1"])
def test_flags_of_train(words):
    """Accepted or refused with one sentence; --show-recipe shows what is accepted in a form that means the same."""
    reached = []

    def stop(*args, **settings):
        reached.append(args)
        raise Reached

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_datasets", stop)
        arguments = [*words, "--run-dir", f"{folder}/run", "--device", "cpu"]
        with contextlib.suppress(Reached):
            _, sentence = refused_flags(train.main, arguments)
            assert sentence
        assert not Path(folder, "run").exists()
    if not reached:
        return
    flags = vars(build_parser().parse_args(words))
    flags.pop("resume", None)
    args = new_run(flags)
    for key in ("epochs", "p", "k", "height", "width", "seed", "workers"):  # a reader judges its own options
        assert isinstance(args[key], int) and 0 <= args[key] < 2**63
    assert math.isfinite(args["lr"]) and args["lr"] > 0 and all(m >= 0 for m in args["milestones"])
    assert {key: args[key] for key in flags if key not in ("loss", "loss_args", "loss_lr")} == {
        key: value for key, value in flags.items() if key not in ("loss", "loss_args", "loss_lr")
    }
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        train.main([*(word for word in words if word != "--resume"), "--show-recipe"])
    typed = shlex.split(shown.getvalue(), comments=True)
    again, sentence = refused_flags(lambda: vars(build_parser().parse_args(typed)))
    assert sentence is None
    again = new_run(again)
    same = args.keys() - {"recipe", "loss_args", "explicit", *FREE}
    assert {key: again[key] for key in same} == {key: args[key] for key in same}


EVALUATE = {
    "--run": st.sampled_from(["missing", "."]), "--features": st.sampled_from(["missing.npz", "."]),
    "--workers": NUMBER,
    "--dataset": VALUES["--dataset"], "--data-dir": st.text(max_size=4), "--metric": VALUES["--metric"],
    "--save-features": st.sampled_from(["new.npz", "old.npz"]),
    "--device": st.sampled_from(["cpu", "gpu", "cuda:77", ""]),
}  # fmt: skip


@fuzz
@given(data=st.data())
def test_flags_of_evaluate(data):
    """Nothing to score is there: every command line ends with code 2, or with the sentence of a script's code 1."""
    words = []
    for flag in data.draw(
        st.lists(st.sampled_from([*EVALUATE, "--ignore-cameras", "--what"]), max_size=5, unique=True)
    ):
        words += [flag, data.draw(EVALUATE[flag])] if flag in EVALUATE else [flag]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("old.npz").touch()
        _, sentence = outcome(lambda: refused_flags(evaluate.main, words)[1])
        assert sentence is not None or refused_flags(evaluate.main, words)[1]
        assert sorted(os.listdir()) == ["old.npz"]


@fuzz
@given(name=st.one_of(
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8),
    st.from_regex(r"(cuda|cpu|mps|meta|xla|hip|ve|hpu|vulkan)(:-?[0-9]{1,20})?", fullmatch=True)))  # fmt: skip
def test_devices(name):
    device, sentence = outcome(find_device, name)
    assert sentence or torch.ones(1, device=device).item() == 1


@fuzz
@given(
    expression=LOSS,
    arguments=st.lists(ARGUMENT, max_size=2),
    weights=st.dictionaries(st.sampled_from(list(LOSSES)), st.floats(0, 1)),
)
@example(expression="histogram", arguments=["num_bins=100000000000000"], weights={})
@example(expression="sphereface", arguments=["margin=1000000000000"], weights={})
def test_expressions_of_losses(expression, arguments, weights):
    terms, sentence = outcome(parse_expression, expression)
    loss_fn, refused = outcome(build_loss, expression, 3, 4, arguments)
    if sentence:
        assert refused == sentence
        return
    assert row_name(expression) == "+".join(name for name, _ in terms)
    filled = parse_expression(with_default_weights(expression, weights))
    assert filled == [(name, weights.get(name) if weight is None else weight) for name, weight in terms]
    if loss_fn is not None:
        loss, wrong = outcome(loss_fn, torch.ones(4, 4), torch.tensor([0, 0, 1, 1]))
        assert wrong is None and loss.shape == ()
