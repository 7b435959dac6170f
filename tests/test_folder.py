"""Anybody's own images: the four shapes, and everything that can be wrong with them."""

import csv
import os
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import check_true_matches, folder, load_datasets, reader_options
from data.folder import read_split_csv, title_of, write_split_csv
from data.records import Split, stop

OPTIONS = {key: option.default for key, option in reader_options().items()}


def write(root: Path, *paths: str) -> Path:
    """Empty files: a reader looks at names only."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def people(*names: str, images: int = 3, cameras: int = 0) -> list[str]:
    """name/0.jpg, ... or with cameras name/0_c1.jpg, name/1_c2.jpg, ..."""
    suffix = [f"_c{1 + i % cameras}" if cameras else "" for i in range(images)]
    return [f"{name}/{i}{suffix[i]}.jpg" for name in names for i in range(images)]


def read(root: Path, **options) -> tuple[Split, list[str]]:
    """The split, and what is said about it."""
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = folder(root, lambda kind, text: told.append(text) if kind == "note" else stop(kind, text), **options)
    return split, told


def persons(records) -> list[str]:
    return [r.path.parent.name for r in records]


def write_csv(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


# 1. A folder per person


def test_names_of_folders():
    assert title_of("/x/photos") == "folder photos" and title_of("/x/New folder") == "folder New folder"
    assert title_of("/x/folder") == "folder" and title_of("/x/zoo.csv") == "folder zoo"


def test_a_picture_without_a_common_start_is_kept_as_it_is(tmp_path, monkeypatch):
    """As on another drive of Windows, where os.path.relpath raises."""
    split, _ = read(write(tmp_path, *people("anna", "bob", "cleo", "dan")))

    def fails(*_):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    with monkeypatch.context() as patch:
        patch.setattr(os.path, "relpath", fails)
        write_split_csv(split, tmp_path / "split.csv", tmp_path)
    assert str(split.query[0].path) in (tmp_path / "split.csv").read_text()


def test_a_folder_per_person(tmp_path):
    """8 people, 40 images: half of the people are for testing, one image of each is a query, the rest the gallery."""
    write(tmp_path, *people(*"abcdefgh", images=5))
    split, told = read(tmp_path)
    test = set(persons(split.query))
    assert len(test) == 4 and set(persons(split.gallery)) == test and not set(persons(split.train)) & test
    assert [len(records) for records in split] == [20, 4, 16]
    assert sorted(r.path for records in split for r in records) == sorted(tmp_path.glob("*/*"))
    assert all(r.pid == 1 + "abcdefgh".index(r.path.parent.name) for records in split for r in records)  # sorted
    assert sorted({r.label for r in split.train}) == [0, 1, 2, 3] and {r.camid for rs in split for r in rs} == {-1}
    assert [r.label for r in split.train] == sorted(r.label for r in split.train)
    assert {r.label for r in [*split.query, *split.gallery]} == {-1}
    assert all(records == sorted(records, key=lambda r: r.path) for records in split)
    check_true_matches(split)
    assert told == [
        "a folder per person: 8 people, 40 images, cameras unknown (none is given for 40 images) and so ignored",
        "split by seed 0: 4 people for training (20 images), "
        "4 for testing (4 queries, each 25 points of rank-1, 16 gallery images)",
    ]
    assert load_datasets("folder", tmp_path, OPTIONS).notes == [f"folder: {line}" for line in told]


def test_the_split_follows_seed_and_share(tmp_path):
    write(tmp_path, *people(*"abcdefghij"))
    splits = [read(tmp_path, split_seed=seed)[0] for seed in range(6)]
    assert splits[0] == read(tmp_path)[0] and len({frozenset(persons(split.query)) for split in splits}) > 3
    for share, count in [(0.5, 5), (0.3, 3), (0.01, 2), (0.99, 8)]:  # two people at least remain on either side
        assert len(read(tmp_path, test_share=share)[0].query) == count
    for share in (0, 1, -1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            folder(tmp_path, test_share=share)


def test_cameras_are_known_if_every_name_holds_one(tmp_path):
    write(tmp_path, *people(*"abcd", images=6, cameras=2))
    split, told = read(tmp_path)
    test = sorted({*persons(split.query)})
    assert sorted((r.path.parent.name, r.camid) for r in split.query) == [(p, c) for p in test for c in (1, 2)]
    assert told[0].endswith("24 images, 2 cameras")
    (tmp_path / "a" / "0_c1.jpg").rename(tmp_path / "a" / "0.jpg")
    split, told = read(tmp_path)
    assert {r.camid for records in split for r in records} == {-1} and len(split.query) == 2
    assert "cameras unknown (none is given for 1 image) and so ignored" in told[0]
    write(tmp_path / "folders", *people("a_c1", "b_c2", "c_c1/x_c3", "d_c4"))  # names of images, not of folders
    assert "cameras unknown (none is given for 12 images" in read(tmp_path / "folders")[1][0]


def test_one_camera_is_no_camera(tmp_path):
    """Where nobody was seen by two cameras, the rule of other cameras leaves nothing to find."""
    write(tmp_path, *people(*"abcd", cameras=1))
    split, told = read(tmp_path)
    assert len(split.query) == 2 and {r.camid for records in split for r in records} == {-1}
    assert "seen by two cameras: 0 people, too few for a test, so cameras are ignored" in told
    check_true_matches(split)


def test_who_cannot_be_searched_for_is_in_training(tmp_path):
    write(tmp_path, *people(*"abcdef", images=2), "single/1.jpg", "other/1.jpg")
    for seed in range(5):
        split, told = read(tmp_path, split_seed=seed)
        assert {"single", "other"} <= set(persons(split.train)) and len(split.query) == 4
        assert told[-1] == "in training, since there is nothing to search for: 2 people with one image only"
    write(tmp_path / "cameras", *people(*"abcd", images=2, cameras=2), *people("once", images=2, cameras=1))
    _, told = read(tmp_path / "cameras")
    assert told[-1] == "in training, since there is nothing to search for: 1 person seen by one camera only"


@pytest.mark.parametrize(
    "paths, message",
    [
        (people("anna"), r"one person only \(anna\).*or pass the folder whose folders are people"),
        (people("a", "b", "c"), "only 3 people, and two for training and two for testing are the least"),
        (people(*"abcde", images=1), "nobody has two images or more.*add images"),
        ([*people(*"abcd", images=1), *people("e")], "only e has two images or more"),
        (["1.jpg", "2.jpg"], "1.jpg lies in no person's folder: make a folder per person"),
        ([*people(*"abcd"), "loose.jpg"], "loose.jpg lies beside folders of people: move it into the folder"),
        (["a/1.heic", "a/2.heic", "b/readme.txt"], "2 files of type .heic, 1 file of type .txt there can't"),
        ([], "holds no images"),
        (people("train/a", "test/a"), "holds test and train, but a split is the three folders train, query"),
        (people("train/a", "test/a", "more/b"), "holds test and train, but a split is the three folders train, query"),
        (people("query/a"), "holds query, but a split is the three folders"),
    ],
)
def test_what_is_wrong_with_a_folder_of_people(tmp_path, paths, message):
    write(tmp_path, *paths)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        folder(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder or CSV file .*nowhere: --data-dir"):
        folder(tmp_path / "nowhere")


def test_nested_folders_other_files_and_formats(tmp_path):
    write(tmp_path, *people(*"abcd"), "a/2019/may/4.JPG", "b/x/5.webp", "c/6.gif", "c/7.bmp", "d/8.jpeg", "d/9.png")
    clean = read(tmp_path)
    assert sum(map(len, clean[0])) == 18 and clean[0].train[0].path.parts[: len(tmp_path.parts)] == tmp_path.parts
    write(tmp_path, "a/.hidden.jpg", ".git/1.jpg", "Thumbs.db", "a/._1.jpg", "b/Desktop.ini")
    assert read(tmp_path) == clean
    write(tmp_path, "a/notes.txt", "readme.txt", "b/raw.heic", "b/LICENSE")
    split, told = read(tmp_path)
    assert split == clean[0]
    assert told[0] == "left out: 2 files of type .txt, 1 file of no type, 1 file of type .heic"


NAMES = [
    "0007",
    "7",
    " ",
    "a b",
    "Zoë",
    "日本",
    "🙂",
    "o'n",
    'quote"',
    "comma,semi;",
    "new\nline",
    "-x",
    "=1+1",
    "c_c1",
]


def test_names_are_any_text(tmp_path):
    write(tmp_path, *people(*NAMES))
    split, _ = read(tmp_path)
    numbers = {r.path.parent.name: r.pid for records in split for r in records}
    assert numbers == {name: number for number, name in enumerate(sorted(NAMES), 1)}


def test_names_of_any_bytes(tmp_path):
    try:
        write(tmp_path, *people(*"abc", os.fsdecode(b"\xff\xfe")))
    except OSError:
        pytest.skip("a file system of text names")
    split, _ = read(tmp_path)
    write_split_csv(split, tmp_path / "split.csv", tmp_path)
    assert read_split_csv(tmp_path / "split.csv", tmp_path) == split


def test_names_that_cannot_be_told_apart(tmp_path):
    write(tmp_path / "case", *people("anna", "Anna", "b", "c"))
    if len(list((tmp_path / "case").iterdir())) == 4:  # a file system that tells them apart
        with pytest.warns(UserWarning, match="'Anna' and 'anna' count as two people.*case only"):
            assert len({r.pid for records in folder(tmp_path / "case") for r in records}) == 4
    forms = [unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD")]
    write(tmp_path / "form", *people(*forms, "b", "c"))
    if len(list((tmp_path / "form").iterdir())) == 4:
        with pytest.raises(ValueError, match="two Unicode forms of one text: rename"):
            folder(tmp_path / "form")


def test_links(tmp_path):
    """Links to images and to folders are followed; one that leads into itself stops the scan."""
    write(tmp_path / "store", *people("x", "y"))
    root = write(tmp_path / "root", *people("a", "b"))
    (root / "x").symlink_to(tmp_path / "store/x")
    (root / "y").mkdir()
    for number in range(2):
        (root / f"y/{number}.jpg").symlink_to(tmp_path / f"store/y/{number}.jpg")
    split, told = read(root)
    assert "4 people, 11 images" in told[0] and {"a", "b", "x", "y"} == {*persons(split.train), *persons(split.query)}
    (root / "a/loop").symlink_to(root)
    with pytest.raises(ValueError, match="loop is a link to a folder that it lies in: remove it"):
        folder(root)


def test_a_link_to_nothing_is_an_image(tmp_path):
    """It stops the run with its path, when it is decoded."""
    write(tmp_path, *people(*"abcd"))
    (tmp_path / "a/9.jpg").symlink_to("nowhere")
    assert "13 images" in read(tmp_path)[1][0]


def test_an_unreadable_folder(tmp_path, monkeypatch):
    """As the superuser runs tests too, the refusal is played."""
    write(tmp_path, *people(*"abcd"))
    real = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="Permission denied: .*/b'"):
        folder(tmp_path)


# 2. and 3. A given split

MARKET = ("bounding_box_train", "query", "bounding_box_test")


@pytest.mark.parametrize("train, query, gallery", [("train", "query", "gallery"), MARKET])
def test_a_given_split_with_folders_of_people(tmp_path, train, query, gallery):
    write(tmp_path, *people(f"{train}/a", f"{train}/b"), f"{query}/c/1.jpg", f"{query}/d/1.jpg", f"{gallery}/c/x/2.jpg",
          f"{gallery}/e/2.jpg")  # fmt: skip
    split, told = read(tmp_path)
    assert [(r.pid, r.label) for r in split.train] == [(1, 0)] * 3 + [(2, 1)] * 3
    assert [r.pid for r in split.query] == [3, 4] and [r.pid for r in split.gallery] == [3, 5]
    known = "cameras unknown (none is given for 10 images) and so ignored"
    assert told == [f"train, query and gallery: 5 people, 10 images, {known}"]
    check_true_matches(split)
    write(tmp_path, f"{gallery}/a/2.jpg", "val/a/1.jpg", "gt_bbox/1.jpg")
    told = read(tmp_path)[1]
    assert told[0] == "left out: the folders gt_bbox, val" and told[2] == "both in training and in the test: 1 person"


@pytest.mark.parametrize("train, query, gallery", [("train", "query", "gallery"), MARKET])
def test_a_given_split_by_file_names(tmp_path, train, query, gallery):
    """PERSON_cCAMERA or Market's names; -1 is junk; 0000, who is in no query, a wrong answer."""
    write(tmp_path, f"{train}/anna_c1_07.jpg", f"{train}/0002_c3s1_000451_03.jpg", f"{train}/0002_c12.png",
          f"{query}/0005_c2s1_000001_00.jpg", f"{gallery}/0005_c1s1_000001_00.jpg", f"{gallery}/-1_c1s1_000401_03.jpg",
          f"{gallery}/0000_c1s1_000151_01.jpg")  # fmt: skip
    split, told = read(tmp_path)
    assert [(r.path.name, r.pid, r.camid, r.label) for r in split.train] == [
        ("0002_c12.png", 2, 12, 0), ("0002_c3s1_000451_03.jpg", 2, 3, 0), ("anna_c1_07.jpg", 4, 1, 1)]  # fmt: skip
    assert [(r.pid, r.camid) for r in [*split.query, *split.gallery]] == [(3, 2), (1, 1), (3, 1)]
    assert "4 people, 6 images, 4 cameras" in told[0]
    write(tmp_path, f"{query}/anna.jpg")
    with pytest.raises(ValueError, match="anna.jpg.*expected PERSON_cCAMERA, such as anna_c2_07.jpg"):
        folder(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda root: write(root, "query/loose_c1.jpg"), "loose_c1.jpg lies beside folders of people"),
        (lambda root: (root / "query/c/1.jpg").unlink(), "query holds no images"),
        (lambda root: [path.unlink() for path in (root / "train/a").iterdir()], "has one person for training"),
    ],
)
def test_what_is_wrong_with_a_given_split(tmp_path, change, message):
    write(tmp_path, *people("train/a", "train/b"), "query/c/1.jpg", "gallery/c/2.jpg")
    folder(tmp_path)
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        folder(tmp_path)


def test_beside_other_data_sets(tmp_path):
    """As theirs, the root may hold the folder of images, which is then called `folder`."""
    write(tmp_path / "folder", *people(*"abcd"))
    write(tmp_path / "market1501/query", "0001_c1s1_000001_00.jpg")
    assert folder(tmp_path) == folder(tmp_path / "folder")


# 4. A CSV file


def test_a_csv_file(tmp_path):
    write(tmp_path, "x/1.jpg", "x/2.jpg", "x/3_c9.jpg", "y/4.jpg", "y/5.jpg")
    file = write_csv(
        tmp_path / "list.csv",
        "path,pid,camid,split,remark\nx/2.jpg,anna,1,train,a\nx/1.jpg,007 ,2 , train ,\n\ny/4.jpg,ben ,1,query,\n"
        '"y/5.jpg","ben",3,gallery,\nx/3_c9.jpg,"-1",1,gallery,junk\n',
    )
    split, told = read(file)
    assert [(r.path, r.pid, r.camid, r.label) for r in split.train] == [
        (tmp_path / "x/1.jpg", 1, 2, 0), (tmp_path / "x/2.jpg", 2, 1, 1)]  # fmt: skip
    assert [(r.path.name, r.pid, r.camid) for r in [*split.query, *split.gallery]] == [("4.jpg", 3, 1), ("5.jpg", 3, 3)]
    assert told == ["CSV file: 3 people, 4 images, 3 cameras"]


@pytest.mark.parametrize("mark, start", [(",", ""), (";", ""), (", ", ""), (",", "\ufeff")])
def test_a_csv_file_without_a_split(tmp_path, mark, start):
    """Split as a folder per person is; as Excel or a person writes it; absolute paths, too."""
    write(tmp_path, *people(*"abcd"))
    rows = [(path if path[0] < "c" else str(tmp_path / path), path[0]) for path in people(*"abcd")]
    text = "\n".join(mark.join(row) for row in [("path", "pid"), *rows])
    file = write_csv(tmp_path / "list.csv", start + text)
    assert folder(file) == folder(tmp_path)


def test_cameras_in_a_csv_file(tmp_path):
    write(tmp_path, *(f"{i}_c{i}.jpg" for i in range(8)))
    names = "\n".join(f"{i}_c{i}.jpg,{i // 2}" for i in range(8))
    split = folder(write_csv(tmp_path / "a.csv", f"path,pid\n{names}"))
    assert sorted(r.camid for records in split for r in records) == list(range(8))  # from the names
    given = names.replace(",", ",7,")
    split = folder(write_csv(tmp_path / "b.csv", f"path,camid,pid\n{given}"))
    assert {r.camid for records in split for r in records} == {-1}  # one camera only is ignored, as in folders
    split = folder(write_csv(tmp_path / "c.csv", f"path,camid,pid\n{given.replace(',7,', ',,', 1)}"))
    assert {r.camid for records in split for r in records} == {-1}


@pytest.mark.parametrize("unknown, known", [(0, True), (3, False)], ids=["of training", "of the test"])
def test_a_camera_that_is_not_known(tmp_path, unknown, known):
    """With a split of one's own training needs none; one test image without leaves all without."""
    write(tmp_path, *(f"{i}.jpg" for i in range(4)))
    rows = "path,pid,camid,split\n0.jpg,a,0,train\n1.jpg,b,1,train\n2.jpg,c,2,query\n3.jpg,c,3,gallery\n"
    split = folder(write_csv(tmp_path / "list.csv", rows.replace(f",{unknown},", ",,")))
    assert [r.camid for part in (split.query, split.gallery) for r in part] == ([2, 3] if known else [-1, -1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,person\n1.jpg,a\n", "list.csv has no column pid: its first line must be path,pid.*not 'path,person'"),
        ("", "has no column path and no column pid"),
        ("1.jpg,a\n2.jpg,b\n", "has no column path and no column pid"),
        ("path,pid\n", "lists no images"),
        ("path,pid\n1.jpg,a\n9.jpg,b\n", r"line 3: there is no .*9.jpg: paths .* or remove this line"),
        ("path,pid\n1.jpg,a\n./1.jpg,a\n", r"line 3: .*1.jpg was in line 2 already"),
        ("path,pid,split\n1.jpg,a,train\n1.jpg,a,query\n", r"line 3: .*1.jpg was in line 2 already.*one split"),
        ("path,pid\n1.jpg,\n", "line 2: as many values"),
        ("path,pid\n1.jpg\n", "line 2: as many values"),
        ("path,pid\n1.jpg,a,b\n", "line 2: as many values"),
        ("path,pid,camid\n1.jpg,a,left\n", "line 2: the camera must be a whole number .*not 'left'"),
        ("path,pid,camid\n1.jpg,a,-1\n", "line 2: the camera must be"),
        ("path,pid,split\n1.jpg,a,test\n", "line 2: the split must be train, query or gallery, not 'test'"),
        ('path,pid\n"1.jpg,a\n' + "2.jpg,b\n" * 20000, "can't be read as a CSV file .*is a quotation mark not closed"),
        ("path,pid,split\n1.jpg,a,train\n2.jpg,b,train\n", "lists no images with the split query"),
    ],
)
def test_what_is_wrong_with_a_csv_file(tmp_path, text, message):
    write(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        folder(write_csv(tmp_path / "list.csv", text))


# The split that is kept


@pytest.mark.parametrize("cameras", [0, 2])
def test_a_kept_split_stays_when_files_are_added(tmp_path, cameras):
    root = write(tmp_path / "photos", *people(*NAMES, cameras=cameras))
    kept = tmp_path / "run" / "split.csv"
    kept.parent.mkdir()
    split = load_datasets("folder", root, OPTIONS, kept).tests["folder"]
    write_split_csv(split, kept, root)
    write(root, *people("new", "another"), "7/9_c3.jpg")
    assert folder(root) != split
    again = load_datasets("folder", root, OPTIONS, kept)
    assert again.tests["folder"] == split and again.train == split.train and str(kept) in again.notes[0]

    moved = root.rename(tmp_path / "moved")  # the paths are relative to the data set
    assert [len(records) for records in read_split_csv(kept, moved)] == [len(records) for records in split]
    (moved / "split.csv").write_bytes(kept.read_bytes())
    assert folder(moved / "split.csv") == read_split_csv(kept, moved)  # one reader serves it
    (moved / split.train[0].path.relative_to(root)).unlink()
    with pytest.raises(ValueError, match="line 2: there is no .*or pass --data-dir if the pictures have moved"):
        read_split_csv(kept, moved)


def test_a_kept_split_of_a_csv_file(tmp_path):
    write(tmp_path, *people(*"abcd"))
    rows = "\n".join(f"{path},{path[0]}" for path in people(*"abcd"))
    file = write_csv(tmp_path / "list.csv", f"path,pid\n{rows}")
    split = folder(file)
    write_split_csv(split, tmp_path / "split.csv", file)
    assert load_datasets("folder", file, OPTIONS, tmp_path / "split.csv").tests == {"folder": split}
    assert next(csv.reader((tmp_path / "split.csv").open())) == ["path", "pid", "camid", "split"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.dictionaries(st.sampled_from("abcdefg"), st.lists(st.integers(0, 3), min_size=1, max_size=5)),
    known=st.booleans(),
    seed=st.integers(0, 5),
    share=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_any_folder_gives_a_split_or_a_sentence(tmp_path_factory, images, known, seed, share):
    root = tmp_path_factory.mktemp("any")
    for name, cameras in images.items():
        write(root, *(f"{name}/{i}{f'_c{camid}' if known else ''}.jpg" for i, camid in enumerate(cameras)))
    try:
        split = folder(root, split_seed=seed, test_share=share)
    except (ValueError, FileNotFoundError) as error:
        assert len(images) < 4 or Counter(len(cameras) > 1 for cameras in images.values())[True] < 2, error
        return
    check_true_matches(split)
    assert sorted(r.path for records in split for r in records) == sorted(root.glob("*/*"))
    train, test = {r.pid for r in split.train}, {r.pid for r in split.gallery}
    assert not train & test and {r.pid for r in split.query} == test and min(len(train), len(test)) >= 2
    assert {r.label for r in split.train} == set(range(len(train)))
