"""The readers against folders of tiny JPEGs with everything that real copies of the data sets hold."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from data import (
    DATASETS,
    add_reader_flags,
    check_options,
    check_true_matches,
    load_dataset,
    load_datasets,
    reader_options,
)
from data.dukemtmc import dukemtmc
from data.holdout import holdout
from data.images import FORMATS
from data.market1501 import MORE_COUNTS, market500k, market1501
from data.records import SUFFIXES, Record, Split

MARKET = {
    "bounding_box_train": ["0007_c3s3_077419_03.jpg", "0002_c1s1_000451_03.jpg", "0002_c2s1_000451_01.jpg"],
    "query": ["0005_c2s1_000001_00.jpg", "0001_c1s1_001051_00.jpg"],
    "bounding_box_test": [
        "0001_c2s1_000301_00.jpg",
        "-1_c1s1_000401_03.jpg",
        "0000_c1s1_000151_01.jpg",
        "0005_c6s4_000301_02.jpg",
    ],
}
DUKE = {
    "bounding_box_train": ["0005_c2_f0046985.jpg", "0001_c8_f0046182.jpg"],
    "query": ["0010_c3_f0046985.jpg"],
    "bounding_box_test": ["0010_c4_f0046985.jpg", "7139_c2_f0160815.jpg"],  # 7139: a distractor, in no query
}
CLUTTER = ("Thumbs.db", ".DS_Store", "._0009_c1s1_000451_03.jpg", "readme.txt", "0009_c1s1_000451_03.jpg.part")


def write(folder: Path, content: dict[str, list[str]]) -> Path:
    """Tiny JPEGs with the given names, in the given subfolders of `folder`."""
    for name, files in content.items():
        (folder / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (2, 4)).save(folder / name / file, "JPEG")
    return folder


def names(records: list[Record]) -> list[str]:
    return [r.path.name for r in records]


@pytest.fixture(autouse=True)
def silent(capsys):
    """A reader prints nothing."""
    yield
    assert capsys.readouterr() == ("", "")


# Market-1501


def test_market_records(tmp_path):
    folder = write(tmp_path, MARKET)
    train, query, gallery = market1501(folder, check_counts=False)
    train_folder, gallery_folder = folder / "bounding_box_train", folder / "bounding_box_test"
    assert train == [  # sorted by path; labels in the order of the pids
        Record(train_folder / "0002_c1s1_000451_03.jpg", pid=2, camid=1, label=0),
        Record(train_folder / "0002_c2s1_000451_01.jpg", pid=2, camid=2, label=0),
        Record(train_folder / "0007_c3s3_077419_03.jpg", pid=7, camid=3, label=1),
    ]
    assert [(r.pid, r.camid, r.label) for r in query] == [(1, 1, -1), (5, 2, -1)]
    assert gallery == [  # the distractor is there, the junk is not
        Record(gallery_folder / "0000_c1s1_000151_01.jpg", pid=0, camid=1, label=-1),
        Record(gallery_folder / "0001_c2s1_000301_00.jpg", pid=1, camid=2, label=-1),
        Record(gallery_folder / "0005_c6s4_000301_02.jpg", pid=5, camid=6, label=-1),
    ]


def test_market_junk_and_distractors_belong_to_the_gallery_only(tmp_path):
    folder = write(tmp_path, MARKET)
    clean = market1501(folder, check_counts=False)
    for name in ("bounding_box_train", "query"):
        for file in ("-1_c1s1_000451_03.jpg", "0000_c1s1_000451_03.jpg"):
            (folder / name / file).write_bytes(b"")
    assert market1501(folder, check_counts=False) == clean


@pytest.mark.parametrize("name", MARKET)
def test_market_folder_of_junk_only(tmp_path, name):
    folder = write(tmp_path, {**MARKET, name: ["-1_c1s1_000401_03.jpg"]})
    with pytest.raises(FileNotFoundError, match=f"{name} holds junk or distractor images only"):
        market1501(folder)


# The readers of folders in Market's style


@pytest.mark.parametrize(
    "reader, content, places",
    [
        (market1501, MARKET, ["market1501/Market-1501-v15.09.15", "market1501", "Market-1501-v15.09.15", "."]),
        (dukemtmc, DUKE, ["dukemtmc-reid/DukeMTMC-reID", "dukemtmc-reid", "DukeMTMC-reID", "."]),
    ],
)
def test_every_layout_from_every_root(tmp_path, reader, content, places):
    for number, place in enumerate(places):
        root = tmp_path / str(number)
        folder = write(root / place, content)
        expected = reader(folder, check_counts=False)
        assert len(expected.train) == len(content["bounding_box_train"])
        while folder != tmp_path:
            assert reader(folder, check_counts=False) == expected
            assert reader(str(folder), check_counts=False) == expected
            folder = folder.parent


def test_duke_records(tmp_path):
    train, query, gallery = dukemtmc(write(tmp_path, DUKE), check_counts=False)
    assert [(r.path.name, r.pid, r.camid, r.label) for r in train] == [
        ("0001_c8_f0046182.jpg", 1, 8, 0),
        ("0005_c2_f0046985.jpg", 5, 2, 1),
    ]
    assert [(r.pid, r.camid, r.label) for r in query] == [(10, 3, -1)]
    assert [(r.pid, r.camid, r.label) for r in gallery] == [(10, 4, -1), (7139, 2, -1)]


@pytest.mark.parametrize("reader, content", [(market1501, MARKET), (dukemtmc, DUKE)])
def test_other_files_are_ignored(tmp_path, reader, content):
    folder = write(tmp_path, content)
    clean = reader(folder, check_counts=False)
    for name in content:
        for file in CLUTTER:
            (folder / name / file).write_bytes(b"clutter")
        (folder / name / "0009_c1s1_000451_03.jpg").mkdir()
        (folder / name / "old").mkdir()
    (folder / "Thumbs.db").write_bytes(b"clutter")
    assert reader(folder, check_counts=False) == clean


def test_suffixes(tmp_path):
    """Those of the formats that the image pipeline reads, in any case, are images; nothing else is."""
    files = [f"000{number}_c1s1_a.{suffix}" for number, suffix in
             enumerate(["jpg", "JPG", "jpeg", "Png", "bmp", "GIF", "webp", "tif", "txt"], 1)]  # fmt: skip
    split = market1501(write(tmp_path, {**MARKET, "query": [*files, "jpg"]}), check_counts=False)
    assert names(split.query) == files[:7]
    assert {suffix[1:].upper().replace("JPG", "JPEG") for suffix in SUFFIXES} == set(FORMATS)


def test_a_link_to_nothing_is_an_image(tmp_path):
    """Left out silently it would be missed by nobody; as a record it stops the run, with its path."""
    folder = write(tmp_path, MARKET)
    (folder / "query" / "0009_c1s1_000451_03.jpg").symlink_to("nowhere")
    assert names(market1501(folder, check_counts=False).query)[-1] == "0009_c1s1_000451_03.jpg"


MARKET_NAMES = ["holiday.jpg", "0002c1s1.jpg", "_c1s1_a.jpg", "0005_c2_f0046985.jpg", "-2_c1s1_a.jpg", "a0002_c1s1.jpg"]
DUKE_NAMES = ["holiday.jpg", "0002_c1s1_000451_03.jpg", "-1_c2_f0046985.jpg", "0000_c2_f0046985.jpg"]


@pytest.mark.parametrize(
    "reader, content, file, example",
    [(market1501, MARKET, file, "0002_c1s1_000451_03.jpg") for file in MARKET_NAMES]
    + [(market1501, MARKET, "9" * 19 + "_c1s1_a.jpg", "0002_c1s1_000451_03.jpg")]  # more than an int64 holds
    + [(dukemtmc, DUKE, file, "0005_c2_f0046985.jpg") for file in DUKE_NAMES],
)
def test_a_name_that_cannot_be_parsed(tmp_path, reader, content, file, example):
    for name in content:
        folder = write(tmp_path / name, content)
        (folder / name / file).write_bytes(b"")
        with pytest.raises(ValueError) as error:
            reader(folder)
        assert str(folder / name / file) in str(error.value) and example in str(error.value)


@pytest.mark.parametrize("reader, content", [(market1501, MARKET), (dukemtmc, DUKE)])
def test_missing_and_empty_folders(tmp_path, reader, content):
    with pytest.raises(FileNotFoundError) as error:  # nothing there at all: what was looked for, and where
        reader(tmp_path / "nothing")
    for word in (*content, str(tmp_path / "nothing"), "put them into the first", "--data-dir"):
        assert word in str(error.value)

    for name in content:
        folder = write(tmp_path / name, content)
        for file in (folder / name).iterdir():
            file.unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} holds no images"):
            reader(folder)
        (folder / name).rmdir()
        with pytest.raises(FileNotFoundError) as error:
            reader(folder)
        assert f"has no {name}:" in str(error.value)
        assert not any(other in str(error.value) for other in set(content) - {name})


def test_two_missing_folders_are_both_named(tmp_path):
    folder = write(tmp_path, {"query": MARKET["query"]})
    with pytest.raises(FileNotFoundError, match="has no bounding_box_train and no bounding_box_test"):
        market1501(folder)


@pytest.mark.parametrize("reader, content", [(market1501, MARKET), (dukemtmc, DUKE)])
def test_a_partial_copy_is_told(tmp_path, reader, content, monkeypatch):
    folder = write(tmp_path, content)
    with pytest.warns(UserWarning) as caught:
        reader(folder)
    (message,) = [str(w.message) for w in caught]  # one sentence with all counts
    expected = {market1501: ("12,936 of 751", "3,368 of 750", "15,913 of 751")}
    expected[dukemtmc] = ("16,522 of 702", "2,228 of 702", "17,661 of 1,110")
    assert str(folder) in message and message.count("instead of") == 3
    for split, counts, records in zip(
        ("train", "query", "gallery"), expected[reader], reader(folder, check_counts=False), strict=True
    ):
        found = f"{split} {len(records)} images of {len({r.pid for r in records})} identities"
        assert f"{found} instead of {counts}" in message

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader(folder, check_counts=False)
        counts = {name: (len({r.pid for r in rs}), len(rs)) for name, rs in reader(folder, False)._asdict().items()}
        module = sys.modules[reader.__module__]
        monkeypatch.setattr(module, "COUNTS", counts)
        reader(folder)  # a complete copy: no warning
    monkeypatch.setattr(module, "COUNTS", {**counts, "query": (counts["query"][0], 99)})
    with pytest.warns(UserWarning) as caught:
        reader(folder)
    assert str(caught[0].message).count("instead of") == 1


FILE_NAMES = st.from_regex(r"-?[0-9]{0,20}_?c[0-9]{1,2}s?_?[a-z0-9 ]{0,4}\.(jpg|jpeg|PNG|db)", fullmatch=True)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=FILE_NAMES)
def test_any_file_name_gives_a_record_or_a_sentence(tmp_path_factory, file):
    folder = tmp_path_factory.mktemp("fuzz")
    for name, files in MARKET.items():
        (folder / name).mkdir()
        (folder / name / files[-1]).touch()
    (folder / "bounding_box_test" / file).touch()
    try:
        gallery = market1501(folder, check_counts=False).gallery
    except ValueError as error:
        assert "Cannot parse" in str(error) and file in str(error)
        return
    found = [r for r in gallery if r.path.name == file]
    if file.endswith(".db") or file.startswith("-1_"):
        assert not found
    else:
        pid, camera = file.split("_c")[0], file.split("_c")[1][0]
        assert [(r.pid, r.camid) for r in found] == [(int(pid), int(camera))]


# Market-1501 + 500k


def test_market500k(tmp_path):
    """The folder `images` holds distractors only, whatever their names; all else is Market-1501."""
    folder = write(tmp_path, MARKET)
    with pytest.raises(FileNotFoundError, match="has no images, the folder of the 500,000 distractors"):
        market500k(folder)
    market = market1501(folder, check_counts=False)
    write(folder, {"images": ["0000_c3s2_000151_01.jpg", "7777_c1s1_000151_01.jpg", "distractor.jpg"]})
    split = market500k(tmp_path, check_counts=False)
    assert split == market._replace(gallery=split.gallery) and split.gallery[:3] == market.gallery
    assert [(r.path.parent.name, r.pid, r.camid) for r in split.gallery[3:]] == [
        ("images", 0, 3),
        ("images", 0, 1),
        ("images", 0, 0),
    ]
    assert split.gallery == sorted(split.gallery, key=lambda r: r.path)
    assert MORE_COUNTS["gallery"][1] == 515913
    with pytest.warns(UserWarning, match="gallery 6 images of 3 identities instead of 515,913 of 751"):
        market500k(tmp_path)


# By name


def test_load_dataset(tmp_path, monkeypatch):
    write(tmp_path / "market1501", MARKET)
    write(tmp_path / "dukemtmc-reid", DUKE)
    with pytest.warns(UserWarning, match="Market-1501 .* not the complete"):
        assert load_dataset("market", tmp_path) == market1501(tmp_path, check_counts=False)
    with pytest.warns(UserWarning, match="DukeMTMC-reID .* not the complete"):
        assert load_dataset("duke", tmp_path) == dukemtmc(tmp_path, check_counts=False)


def test_load_synthetic(tmp_path, monkeypatch):
    """Generated with the number of identities asked for, then read without a word about Market-1501's counts."""
    asked = []

    def generate(data_dir, num_ids, seed):
        asked.append((data_dir, num_ids, seed))
        return write(tmp_path / str(num_ids), MARKET)

    monkeypatch.setitem(sys.modules, "data.synthetic", type(sys)("data.synthetic"))
    sys.modules["data.synthetic"].generate = generate
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_dataset("synthetic", tmp_path, synthetic_ids=7) == market1501(tmp_path / "7", check_counts=False)
        load_dataset("synthetic", tmp_path, synthetic_seed=3)
    assert asked == [(tmp_path, 7, 0), (tmp_path, 150, 3)]
    with pytest.raises(ValueError, match="At most 100,000"):
        load_dataset("synthetic", tmp_path, synthetic_ids=100_001)


OPTIONS = {key: option.default for key, option in reader_options().items()}  # as a script has them: every flag


@pytest.fixture
def read_anew(monkeypatch):
    """The options of readers, where a test adds one."""
    reader_options.cache_clear()
    yield
    reader_options.cache_clear()


def test_options_come_from_the_signatures(read_anew, monkeypatch, capsys):
    options = reader_options()
    assert options["cuhk03_boxes"] == (
        str, ("detected", "labeled"), "detected", ["cuhk03"], "boxes by a detector or by hand")  # fmt: skip
    assert options["synthetic_ids"][:4] == (int, None, 150, ["synthetic"])
    assert options["test_share"][:4] == (float, None, 0.5, ["folder"])

    def mine(root, report=print, *, split_seed: int = 0, mine_part: Literal["a", "b"] = "b") -> Split: ...

    monkeypatch.setitem(data.DATASETS, "mine", mine)
    reader_options.cache_clear()
    assert reader_options()["split_seed"].datasets == ["folder", "mine"]
    assert reader_options()["mine_part"] == (str, ("a", "b"), "b", ["mine"], "")
    parser = argparse.ArgumentParser()
    add_reader_flags(parser)
    assert vars(parser.parse_args([])) == {}  # explicit flags only
    assert vars(parser.parse_args(["--mine-part", "a", "--test-share", "0.3", "--split-seed", "4"])) == {
        "mine_part": "a", "test_share": 0.3, "split_seed": 4}  # fmt: skip
    with pytest.raises(SystemExit):
        parser.parse_args(["--mine-part", "c"])
    assert "choose from" in capsys.readouterr().err
    assert "(default: 150)" in parser.format_help()


@pytest.mark.parametrize("reader", [
    lambda root, *, flip=True: None,
    lambda root, *, part=None: None,
    lambda root, *, part: None,
    lambda root, *, split_seed=1: None,
], ids=["switch", "None", "no default", "another default"])  # fmt: skip
def test_an_option_that_makes_no_flag_is_refused(read_anew, monkeypatch, reader):
    """Nor two readers with one name and other defaults: a flag has one."""
    monkeypatch.setitem(data.DATASETS, "mine", reader)
    with pytest.raises(TypeError, match="mine: .* needs a number or a text as default, the same in every reader"):
        reader_options()


def test_an_option_of_another_data_set_is_refused(tmp_path):
    check_options("market+cuhk03", ["cuhk03_boxes", "loss", "epochs"])
    with pytest.raises(ValueError, match="--cuhk03-boxes belongs to --dataset cuhk03, not to market"):
        check_options("market", ["cuhk03_boxes"])
    with pytest.raises(ValueError, match="--split-seed belongs to --dataset folder, not to market"):
        load_dataset("market", write(tmp_path, MARKET), split_seed=1)


def test_a_single_data_set_stays_as_it_is(tmp_path):
    folder = write(tmp_path, MARKET)
    with pytest.warns(UserWarning, match="not the complete"):
        loaded = load_datasets("market", folder, {**OPTIONS, "loss": "arcface"})
    split = market1501(folder, check_counts=False)
    assert loaded.train == split.train and loaded.tests == {"market": split}
    assert loaded.titles == {"market": "Market-1501 (incomplete)"} and loaded.notes == []


def test_the_title_of_a_complete_copy(tmp_path, monkeypatch):
    split = market1501(write(tmp_path, MARKET), check_counts=False)
    counts = {name: (len({r.pid for r in rs}), len(rs)) for name, rs in split._asdict().items()}
    monkeypatch.setattr(sys.modules["data.market1501"], "COUNTS", counts)
    assert load_datasets("market", tmp_path, OPTIONS).titles == {"market": "Market-1501"}
    (tmp_path / "query" / MARKET["query"][0]).rename(tmp_path / "query" / "0001_c9s1_001051_00.jpg")
    with pytest.warns(UserWarning, match="cameras 9 beside 1 to 6"):
        assert load_datasets("market", tmp_path, OPTIONS).titles == {"market": "Market-1501 (incomplete)"}


@pytest.mark.filterwarnings("ignore:.*not the complete data set")
def test_a_union(tmp_path):
    """Person 2 of Market is not person 2 of a folder, nor is camera 1: all of them get numbers of their own."""
    write(tmp_path / "market1501", MARKET)
    write(tmp_path / "dukemtmc-reid", DUKE)
    people = {f"folder/{name}": ["1.jpg", "2.jpg", "3.jpg"] for name in "abcd"}
    write(tmp_path, people)
    loaded = load_datasets("market+duke+folder", tmp_path, OPTIONS)
    market, duke = load_dataset("market", tmp_path), load_dataset("duke", tmp_path)
    own = load_dataset("folder", tmp_path)
    assert loaded.tests == {"market": market, "duke": duke, "folder": own}
    assert [r.path for r in loaded.train] == [r.path for r in [*market.train, *duke.train, *own.train]]
    assert [r.label for r in loaded.train] == [0, 0, 1, 2, 3, 4, 4, 4, 5, 5, 5]
    assert [r.pid for r in loaded.train] == [r.label + 1 for r in loaded.train]
    assert [r.camid for r in loaded.train] == [0, 1, 2, 3, 4] + [-1] * 6  # Market's 1, 2, 3, Duke's 8 and 2, unknown
    assert loaded.titles["duke"] == "DukeMTMC-reID (incomplete)" and loaded.titles["folder"] == "folder"
    assert all(note.startswith("folder: ") for note in loaded.notes) and loaded.notes
    assert load_datasets("duke+market", tmp_path, OPTIONS).train[0].path == duke.train[0].path
    with pytest.raises(ValueError, match="market stands twice"):
        load_datasets("market+market", tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="Unknown data set 'marked'"):
        load_datasets("duke+marked", tmp_path, OPTIONS)


def records(*images: tuple[int, int], place: str = "gallery") -> list[Record]:
    return [Record(Path(f"/{place}/{number}.jpg"), pid, camid) for number, (pid, camid) in enumerate(images)]


def test_no_true_match_names_the_cause():
    """Asked before training: what holds in this data set, and the way out of it."""
    query = records((1, 1), (2, 1), place="query")
    check_true_matches(Split([], query, records((1, 1), (2, 2))))  # one query that counts is enough
    with pytest.raises(ValueError, match="none of the 2 people of the queries is in the gallery, which shows 1 others"):
        check_true_matches(Split([], query, records((3, 2), (3, 3))))
    one_camera = Split([], query, records((1, 1), (2, 1)))
    with pytest.raises(ValueError, match="one camera only.*With --ignore-cameras"):
        check_true_matches(one_camera)
    check_true_matches(one_camera, ignore_cameras=True)
    with pytest.raises(ValueError, match="the query images themselves and nothing else"):
        check_true_matches(Split([], query, query), ignore_cameras=True)
    unknown = Split([], records((1, -1), place="query"), records((1, -1)))
    check_true_matches(unknown)  # cameras are ignored where they are unknown
    with pytest.raises(ValueError, match="the query images themselves"):
        check_true_matches(unknown._replace(gallery=unknown.query))


@pytest.mark.parametrize("name, closest", [("markt", "market"), ("dukemtmc", "duke"), ("synth", "synthetic")])
def test_unknown_dataset(name, closest):
    with pytest.raises(ValueError) as error:
        load_dataset(name, "datasets")
    known = str(error.value).rsplit("choose one of ")[1].rstrip(".").split(", ")
    assert repr(name) in str(error.value) and known[0] == closest and sorted(known) == sorted(DATASETS)


# Held-out validation identities


def train_records(cameras: dict[int, list[int]]) -> list[Record]:
    """cameras: pid -> the cameras of its images."""
    return [
        Record(Path(f"/train/{pid:04d}_c{camid}s1_{number:06d}.jpg"), pid, camid, label)
        for label, (pid, camids) in enumerate(sorted(cameras.items()))
        for number, camid in enumerate(camids)
    ]


def test_holdout_follows_the_market_protocol():
    train = train_records({pid: [1, 1, 1, 2, 2, 3, 3, 3, 3] for pid in range(10, 40)})
    kept, query, gallery = holdout(train, seed=0)
    held_out = {r.pid for r in query}
    assert len(held_out) == 10 and {r.pid for r in gallery} == held_out
    assert {r.pid for r in kept} == set(range(10, 40)) - held_out
    assert sorted(r.path for r in [*kept, *query, *gallery]) == [r.path for r in train]  # nobody lost, nobody twice
    assert [(r.pid, r.camid) for r in query] == [(pid, camid) for pid in sorted(held_out) for camid in (1, 2, 3)]
    for records in (kept, query, gallery):
        assert records == sorted(records, key=lambda r: r.path)
    labels = {r.pid: r.label for r in kept}
    assert [labels[pid] for pid in sorted(labels)] == list(range(20)) == sorted({r.label for r in kept})
    assert {r.label for r in [*query, *gallery]} == {-1}
    assert all(r._replace(label=0) in {t._replace(label=0) for t in train} for r in [*kept, *query, *gallery])


def test_holdout_is_drawn_by_the_seed_alone():
    train = train_records({pid: [1, 1, 1, 1, 2, 2, 2, 2] for pid in range(1, 31)})
    first = holdout(train, seed=0)
    assert holdout(train[::-1], seed=0) == first
    assert holdout([r._replace(label=-5) for r in train], seed=0) == first
    others = [holdout(train, seed=seed) for seed in range(1, 6)]
    assert len({frozenset(r.pid for r in split.query) for split in [first, *others]}) == 6
    images = [{r.pid: r.path for r in split.query if r.camid == 1} for split in [first, *others]]
    assert any(a[pid] != b[pid] for a in images for b in images for pid in a.keys() & b.keys())
    assert len({r.path.name.split("_")[2] for r in first.query}) > 2  # not always the first image of a camera
    moved = holdout([r._replace(path=Path("/elsewhere") / r.path.name) for r in train], seed=0)
    assert [[r.path.name for r in records] for records in moved] == [[r.path.name for r in rs] for rs in first]


def test_holdout_share():
    train = train_records({pid: [1, 2, 2] for pid in range(40)})
    for share, count in [(1 / 3, 13), (0.5, 20), (0.1, 4)]:
        assert len({r.pid for r in holdout(train, 0, share).gallery}) == count


@pytest.mark.parametrize(
    "cameras, queries, in_gallery",
    [
        ([4, 4, 4], [], [4, 4, 4]),  # one camera only: nothing to search for
        ([1, 2], [1], [2]),  # as two queries they would have no match left
        ([1, 2, 3], [1, 2], [3]),
        ([1, 2, 2], [1], [2, 2]),  # a query of camera 2 would need the only image of camera 1
        ([1, 1, 2, 2], [1, 2], [1, 2]),
    ],
)
def test_holdout_leaves_every_query_a_match(cameras, queries, in_gallery):
    train = train_records({1: [1, 1, 2, 2], 2: [1, 1, 2, 2], 3: cameras, 4: cameras, 5: cameras, 6: cameras})
    for seed in range(5):
        split = holdout(train, seed, share=0.5)
        for pid in {r.pid for r in split.gallery} & {3, 4, 5, 6}:
            assert [r.camid for r in split.query if r.pid == pid] == queries
            assert [r.camid for r in split.gallery if r.pid == pid] == in_gallery


@settings(max_examples=100, deadline=None)
@given(
    cameras=st.dictionaries(st.integers(0, 50), st.lists(st.integers(1, 3), min_size=1, max_size=6), max_size=12),
    seed=st.integers(0, 9),
)
def test_holdout_in_general(cameras, seed):
    train = train_records(cameras)
    try:
        kept, query, gallery = holdout(train, seed)
    except ValueError:
        count = round(len(cameras) / 3)
        single = sum(len(set(camids)) == 1 for camids in cameras.values())
        assert count < 2 or len(cameras) - count < 2 or single >= count
        return
    assert len(kept) + len(query) + len(gallery) == len(train)
    assert len({r.pid for r in kept}) >= 2 and not {r.pid for r in kept} & {r.pid for r in gallery}
    assert len({(r.pid, r.camid) for r in query}) == len(query)
    for q in query:
        assert any(g.pid == q.pid and g.camid != q.camid for g in gallery)


def test_holdout_refuses_what_it_cannot_split():
    for num_ids, share in [(4, 1 / 3), (0, 1 / 3), (3, 0.5), (10, 0.9), (10, 0.1)]:
        train = train_records({pid: [1, 2, 2] for pid in range(num_ids)})
        with pytest.raises(ValueError, match=f"of {num_ids} training identities"):
            holdout(train, 0, share)
    with pytest.raises(ValueError, match="two cameras"):
        holdout(train_records({pid: [1, 1] for pid in range(9)}), 0)


def test_holdout_without_cameras():
    """Ignored or unknown cameras: one image of a person (of each camera, if there are any) is enough for a query."""
    one_camera = train_records({pid: [1, 1, 1] for pid in range(9)})
    for train, ignore in [(one_camera, True), ([r._replace(camid=-1) for r in one_camera], False)]:
        kept, query, gallery = holdout(train, 0, ignore_cameras=ignore)
        assert len(query) == len({r.pid for r in query}) == 3 and len(gallery) == 6 and len(kept) == 18
    two_cameras = train_records({pid: [1, 2, 2] for pid in range(9)})
    query = holdout(two_cameras, 0, ignore_cameras=True).query
    assert sorted((r.pid, r.camid) for r in query) == [
        (pid, c) for pid in sorted({r.pid for r in query}) for c in (1, 2)
    ]
    single = train_records({pid: [1] for pid in range(9)})
    with pytest.raises(ValueError, match="nothing to search for\\.$"):
        holdout(single, 0, ignore_cameras=True)
