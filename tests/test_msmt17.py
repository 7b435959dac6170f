"""The reader of MSMT17 against its two layouts: lists, and folders that only the version tells apart."""

import sys

import pytest

from data import load_datasets, reader_options
from data.msmt17 import COUNTS, LISTS, VERSIONS, msmt17
from data.records import Record

LINES = {  # as in the authors' lists: not sorted, people from 0 in training and in test
    "list_train.txt": ["0001/0001_000_14_0302noon_0466_0.jpg 1", "0000/0000_000_01_0303morning_0008_0.jpg 0"],
    "list_val.txt": ["0000/0000_045_05_0303morning_0008_0_ex.jpg 0"],
    "list_query.txt": ["0000/0000_007_02_0303afternoon_1072_0.jpg 0"],
    "list_gallery.txt": ["0001/0001_003_15_0303noon_0018_2.jpg 1", "0000/0000_008_04_0303noon_0018_2.jpg 0"],
}
OPTIONS = {key: option.default for key, option in reader_options().items()}


def write(folder, version, lines=LINES):
    for name in VERSIONS[version]:
        (folder / name).mkdir(parents=True)
    for name, text in lines.items():
        (folder / name).write_text("".join(f"{line}\n" for line in text))
    return folder


@pytest.mark.parametrize("version, train, test", [("MSMT17_V1", "train", "test"),
                                                  ("MSMT17_V2", "mask_train_v2", "mask_test_v2")])  # fmt: skip
def test_records(tmp_path, version, train, test):
    folder = write(tmp_path / "msmt17" / version, version)
    split = msmt17(tmp_path, check_counts=False)
    assert split.train == [  # both lists, sorted by path
        Record(folder / train / "0000/0000_000_01_0303morning_0008_0.jpg", pid=0, camid=1, label=0),
        Record(folder / train / "0000/0000_045_05_0303morning_0008_0_ex.jpg", pid=0, camid=5, label=0),
        Record(folder / train / "0001/0001_000_14_0302noon_0466_0.jpg", pid=1, camid=14, label=1),
    ]
    assert split.query == [Record(folder / test / "0000/0000_007_02_0303afternoon_1072_0.jpg", pid=1041, camid=2)]
    assert [(r.pid, r.camid) for r in split.gallery] == [(1041, 4), (1042, 15)]
    for root in (folder, folder.parent, str(tmp_path)):
        assert msmt17(root, check_counts=False) == split


@pytest.mark.parametrize("version", VERSIONS)
def test_the_version_is_named(tmp_path, monkeypatch, version):
    write(tmp_path / version, version)
    with pytest.warns(UserWarning, match="train 3 images of 2 identities instead of 32,621 of 1,041"):
        loaded = load_datasets("msmt17", tmp_path, OPTIONS)
    assert loaded.titles == {"msmt17": f"{version.replace('_', ' ')} (incomplete)"}
    assert loaded.notes == ["msmt17: trained on list_train and list_val"]
    complete = {"train": (2, 3), "query": (1, 1), "gallery": (2, 2)}
    monkeypatch.setattr(sys.modules["data.msmt17"], "COUNTS", {**complete, "train": (2, 3)})
    assert load_datasets("msmt17", tmp_path, OPTIONS).titles == {"msmt17": version.replace("_", " ")}


def test_both_versions_are_one_too_many(tmp_path):
    for version in VERSIONS:
        write(tmp_path / "msmt17" / version, version)
    with pytest.raises(ValueError, match="MSMT17_V1 and .*MSMT17_V2 are different images: pass one of them"):
        msmt17(tmp_path)
    assert msmt17(tmp_path / "msmt17/MSMT17_V2", check_counts=False).train[0].path.parts[-3] == "mask_train_v2"


@pytest.mark.parametrize("name", LISTS)
def test_missing_empty_and_broken_lists(tmp_path, name):
    folder = write(tmp_path, "MSMT17_V1")
    for line in ("0000/holiday.jpg 0", "0000/0000_000_xx_0303morning_0008_0.jpg 0", "0000/0000_000_01_a.jpg", "1 2 3"):
        (folder / name).write_text(f"{LINES[name][0]}\n{line}\n")
        with pytest.raises(ValueError) as error:
            msmt17(folder)
        assert f"line 2 of {folder / name}" in str(error.value) and line in str(error.value)
    (folder / name).write_text("\n")
    with pytest.raises(FileNotFoundError, match=f"{name} lists no images"):
        msmt17(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}: copy it there"):
        msmt17(folder)


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="msmt17/MSMT17_V1.*put them into the first, or pass --data-dir"):
        msmt17(tmp_path)
    folder = write(tmp_path, "MSMT17_V1")
    (folder / "test").rmdir()
    with pytest.raises(FileNotFoundError, match="neither the folders train and test nor mask_train_v2 and"):
        msmt17(folder)


def test_the_published_counts():
    assert COUNTS == {"train": (1041, 30248 + 2373), "query": (3060, 11659), "gallery": (3060, 82161)}
