"""The reader of CUHK03 against its two sources: the folders of CUHK03-NP, and the authors' file, written by h5py."""

import builtins
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data import cuhk03, load_datasets, reader_options
from data.records import Record

h5py = pytest.importorskip("h5py")
OPTIONS = {key: option.default for key, option in reader_options().items()}
PEOPLE = (3, 2)  # of the first and the second pair of cameras
NAMES = [f"{pair}_{person:03d}_{1 if image <= 5 else 2}_{image:02d}" for pair, people in enumerate(PEOPLE, 1)
         for person in range(1, people + 1) for image in (1, 2, 6, 7)]  # fmt: skip
LISTS = {"train": NAMES[:8], "query": [NAMES[8], NAMES[10]], "gallery": [NAMES[9], *NAMES[11:]]}


def pixels(boxes: str, name: str) -> np.ndarray:
    """Another picture, and another size, for each image: (H, W, 3)."""
    seed = NAMES.index(name) + 100 * (boxes == "labeled")
    return np.random.default_rng(seed).integers(0, 256, (6 + seed % 5, 3, 3), dtype=np.uint8)


def write_mat(folder, boxes=("detected", "labeled")):
    """cuhk-03.mat as MATLAB 7.3 writes it: HDF5 after a header of 512 bytes; every array transposed, cells are
    references; the configurations as older MATLAB files."""
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "cuhk-03.mat", "w", userblock_size=512) as file:
        hidden = file.create_group("#refs#")
        for kind in boxes:
            pairs = file.create_dataset(kind, (1, len(PEOPLE)), dtype=h5py.ref_dtype)
            for pair, people in enumerate(PEOPLE):
                cells = hidden.create_dataset(f"{kind}{pair}", (10, people), dtype=h5py.ref_dtype)
                for person in range(people):
                    for image in range(10):
                        name = f"{pair + 1}_{person + 1:03d}_{1 if image < 5 else 2}_{image + 1:02d}"
                        content = pixels(kind, name).T if name in NAMES else np.zeros(2, np.uint64)  # an empty cell
                        cell = hidden.create_dataset(f"{kind}_{name}", data=content)
                        cells[image, person] = cell.ref
                pairs[0, pair] = cells.ref
            index = {f"{part}_idx": np.array([[NAMES.index(n) + 1] for n in names]) for part, names in LISTS.items()}
            filelist = np.array([[f"{name}.png"] for name in NAMES], dtype=object)
            labels = np.repeat(np.arange(1, sum(PEOPLE) + 1), 4)[:, None].astype(np.uint16)
            savemat(folder / f"cuhk03_new_protocol_config_{kind}.mat",
                    {**index, "filelist": filelist, "labels": labels, "camId": np.zeros((1, 1))})  # fmt: skip
    with open(folder / "cuhk-03.mat", "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    return folder


def write_folders(folder, boxes):
    content = {"bounding_box_train": ["0003_c2_7.png", "0001_c1_3.png"], "query": ["0005_c1_21.png"],
               "bounding_box_test": ["0005_c2_26.png", "0012_c1_1.png"]}  # fmt: skip
    for name, files in content.items():
        (folder / boxes / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (2, 4)).save(folder / boxes / name / file)
    return folder / boxes


def test_folders(tmp_path):
    detected, labeled = (write_folders(tmp_path / "cuhk03-np", boxes) for boxes in ("detected", "labeled"))
    split = cuhk03(tmp_path, check_counts=False)
    assert split.train == [
        Record(detected / "bounding_box_train/0001_c1_3.png", pid=1, camid=1, label=0),
        Record(detected / "bounding_box_train/0003_c2_7.png", pid=3, camid=2, label=1),
    ]
    assert [(r.pid, r.camid) for r in [*split.query, *split.gallery]] == [(5, 1), (5, 2), (12, 1)]
    assert cuhk03(tmp_path / "cuhk03-np", check_counts=False) == split
    split = cuhk03(tmp_path, check_counts=False, cuhk03_boxes="labeled")
    assert split.query == [Record(labeled / "query/0005_c1_21.png", pid=5, camid=1)]


@pytest.mark.parametrize("boxes, train", [("detected", "7,365"), ("labeled", "7,368")])
def test_the_boxes_are_named(tmp_path, boxes, train):
    write_folders(tmp_path, boxes)
    with pytest.warns(UserWarning, match=f"CUHK03 {boxes} in .* instead of {train} of 767"):
        loaded = load_datasets("cuhk03", tmp_path, {**OPTIONS, "cuhk03_boxes": boxes})
    assert loaded.titles == {"cuhk03": f"CUHK03 {boxes} (incomplete)"}


@pytest.mark.parametrize("boxes", ["detected", "labeled"])
@pytest.mark.parametrize("place", ["cuhk03/cuhk03_release", "cuhk03", "."])
def test_the_authors_file(tmp_path, boxes, place):
    """Image, person and camera of every record are those of the file and its protocol; it is read once."""
    folder = write_mat(tmp_path / place)
    split = cuhk03(tmp_path, check_counts=False, cuhk03_boxes=boxes)
    for part, records in split._asdict().items():
        assert sorted(r.path.stem.split("_", 2)[2] for r in records) == sorted(LISTS[part])
        for r in records:
            name = r.path.stem.split("_", 2)[2]
            assert (r.pid, r.camid) == (1 + NAMES.index(name) // 4, int(name.split("_")[2]))
            assert np.array_equal(np.asarray(Image.open(r.path)), pixels(boxes, name))
    (folder / "cuhk-03.mat").write_bytes(b"")
    assert cuhk03(tmp_path, check_counts=False, cuhk03_boxes=boxes) == split
    assert {path.name for path in (folder / "cuhk03-np").iterdir()} == {boxes}  # nothing temporary, nothing else


def test_the_protocol_may_lie_above(tmp_path):
    folder = write_mat(tmp_path / "cuhk03/cuhk03_release")
    config = folder / "cuhk03_new_protocol_config_detected.mat"
    config.rename(tmp_path / "cuhk03" / config.name)
    assert len(cuhk03(tmp_path, check_counts=False).train) == 8
    with pytest.raises(FileNotFoundError, match="has no cuhk03_new_protocol_config_labeled.mat"):
        (folder / "cuhk03_new_protocol_config_labeled.mat").unlink()
        cuhk03(tmp_path, cuhk03_boxes="labeled")


def test_without_h5py(tmp_path, monkeypatch):
    write_mat(tmp_path)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError("no h5py")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="cuhk-03.mat is read by h5py: pip install h5py"):
        cuhk03(tmp_path)


@pytest.mark.parametrize("name", ["cuhk-03.mat", "cuhk03_new_protocol_config_detected.mat"])
def test_a_broken_file(tmp_path, name):
    write_mat(tmp_path)
    (tmp_path / name).write_bytes(b"no MATLAB file" * 100)
    with pytest.raises(ValueError, match="is not the authors' file .*: copy it again"):
        cuhk03(tmp_path)
    with pytest.raises(ValueError, match="is not the authors' file"):
        write_mat(tmp_path, boxes=["detected"])
        (tmp_path / "cuhk03_new_protocol_config_labeled.mat").unlink(missing_ok=True)
        (tmp_path / "cuhk03_new_protocol_config_detected.mat").rename(
            tmp_path / "cuhk03_new_protocol_config_labeled.mat")  # fmt: skip
        cuhk03(tmp_path, cuhk03_boxes="labeled")


def test_an_extraction_that_is_cut_short_leaves_nothing(tmp_path, monkeypatch):
    write_mat(tmp_path)
    real, saved = Image.Image.save, []

    def save(self, path, **kwargs):
        saved.append(path)
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        real(self, path, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left"):
        cuhk03(tmp_path)
    assert not list((tmp_path / "cuhk03-np").iterdir())
    assert len(cuhk03(tmp_path, check_counts=False).train) == 8


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="cuhk03-np/detected.*pass --data-dir"):
        cuhk03(tmp_path)


def test_the_published_counts():
    """Both sum up to the boxes of the protocol's file lists: 14,097 detected ones, 14,096 drawn by hand."""
    counts = sys.modules["data.cuhk03"].COUNTS
    assert [sum(images for _, images in counts[boxes].values()) for boxes in ("detected", "labeled")] == [14097, 14096]
