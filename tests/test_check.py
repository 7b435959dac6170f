"""python -m data.check against a folder with every fault: each is listed once, and nothing else is."""

import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import DATASETS, dukemtmc, load_dataset, market1501
from data.check import check, examine, main
from data.images import BadImage, decode
from data.records import CLUTTER

ROOT = Path(__file__).parent.parent
MARKET, DUKE = sys.modules[market1501.__module__], sys.modules[dukemtmc.__module__]
TRAIN, QUERY, GALLERY = MARKET.FOLDERS.values()
CLEAN = {
    TRAIN: ["0002_c1s1_000001_00.jpg", "0002_c2s1_000001_00.jpg", "0007_c3s1_000001_00.jpg"],
    QUERY: ["0001_c1s1_000001_00.jpg", "0005_c2s1_000001_00.jpg"],
    GALLERY: [
        "0001_c1s1_000002_00.jpg",
        "0001_c2s1_000001_00.jpg",
        "0005_c6s1_000001_00.jpg",
        "0000_c1s1_000001_00.jpg",
        "0000_c1s1_000002_00.jpg",
        "-1_c1s1_000001_00.jpg",
    ],
}
CLEAN_COUNTS = {"train": (2, 3), "query": (2, 2), "gallery": (3, 5)}


def pixels(seed: int, height: int = 32, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(seed: int, height: int = 32, width: int = 16) -> Image.Image:
    return Image.fromarray(pixels(seed, height, width))


@pytest.fixture
def folder(tmp_path):
    """A data set without a fault, no two images alike."""
    seed = 0
    for name, files in CLEAN.items():
        (tmp_path / name).mkdir()
        for file in files:
            picture(seed).save(tmp_path / name / file)
            seed += 1
    return tmp_path


@pytest.fixture(autouse=True)
def clean_counts(monkeypatch):
    monkeypatch.setattr(MARKET, "COUNTS", CLEAN_COUNTS)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    return exif


# Files of training, each the only one of its name; what each of them is, and how to write it

BAD_FILES = {
    "empty file": lambda path: path.write_bytes(b""),
    "not an image": lambda path: path.write_text("<html>404: no such image</html>"),
    "unreadable file": lambda path: path.symlink_to("nowhere"),
    "broken image": lambda path: (picture(100).save(path), cut(path, 0.5)),
    "broken image, a PNG": lambda path: (
        picture(101).save(path.with_suffix(".png")),
        cut(path.with_suffix(".png"), 0.5),
    ),
    "giant image": lambda path: Image.new("1", (9460, 9460)).save(path.with_suffix(".png")),
    "giant image, refused by Pillow": lambda path: Image.new("1", (13400, 13400)).save(path.with_suffix(".png")),
    "not an image, a TIFF": lambda path: picture(104).save(path, "TIFF"),
}
UNUSUAL_FILES = {
    "wrong suffix, PNG": lambda path: picture(102).save(path, "PNG"),
    "wrong suffix, JPEG": lambda path: picture(103).save(path.with_suffix(".png"), "JPEG"),
    "ignored": lambda path: picture(105).save(path.with_suffix(".tif")),
    "grey": lambda path: picture(200).convert("L").save(path),
    "grey, one bit": lambda path: picture(201).convert("1").save(path.with_suffix(".png")),
    "grey, transparent": lambda path: picture(202).convert("LA").save(path.with_suffix(".png")),
    "palette": lambda path: picture(203).convert("P").save(path.with_suffix(".png")),
    "transparent": lambda path: picture(204).convert("RGBA").save(path.with_suffix(".png")),
    "CMYK": lambda path: picture(205).convert("CMYK").save(path),
    "16 bits": lambda path: Image.fromarray(pixels(206)[..., 0].astype(np.uint16) * 257).save(path.with_suffix(".png")),
    "tiny": lambda path: picture(207, 1, 1).save(path),
    "tiny, narrow": lambda path: picture(208, 40, 7).save(path),
    "turned": lambda path: picture(209, 16, 32).save(path, exif=turned()),  # upright to the eye
    "wide": lambda path: picture(210, 16, 32).save(path),
}


def write_each(folder: Path, writers: dict) -> dict[str, Path]:
    """Fault -> the one file that was added to training for it, which is of identity 7."""
    written = {}
    for number, (kind, write) in enumerate(writers.items()):
        before = set((folder / TRAIN).iterdir())
        write(folder / TRAIN / f"0007_c1s1_{number:06d}_09.jpg")
        (written[kind],) = set((folder / TRAIN).iterdir()) - before
    return written


def test_a_clean_folder(folder, capsys):
    assert check(folder, market1501).findings == []
    assert main(["market", "--data-dir", str(folder)]) == 0
    output = capsys.readouterr().out
    assert output.endswith("problems: 0, remarks: 0\n") and "problem:" not in output
    rows = [line.split() for line in output.splitlines()]
    assert ["Market-1501"] in rows and ["train", "2", "3", "3"] in rows  # identities, images, cameras
    assert ["gallery", "3", "5", "3"] in rows  # with distractors, without junk


@pytest.mark.parametrize("label", [lambda r: -1, lambda r: r.pid, lambda r: 0])
def test_labels_of_a_reader_of_ones_own(folder, label):
    """add_labels forgotten, identities in their place, one label for all."""

    def mine(root, report):
        split = market1501(root, report=report)
        return split._replace(train=[r._replace(label=label(r)) for r in split.train])

    assert [finding.kind for finding in check(folder, mine).findings] == ["labels"]


def test_every_fault_is_listed_once(folder, capsys):
    written = write_each(folder, {**BAD_FILES, **UNUSUAL_FILES})
    expected = Counter({(kind.split(",")[0], str(path)): 1 for kind, path in written.items()})

    train, query, gallery = folder / TRAIN, folder / QUERY, folder / GALLERY
    picture(300).save(train / "holiday.jpg")
    expected["file name", f"Cannot parse the file name {str(train / 'holiday.jpg')!r}"] += 1
    picture(301).save(gallery / "0002_c3s1_000001_00.jpg")  # 2 is a person of the training set
    expected["train and test", "identity 2 "] += 1
    picture(302).save(query / "0005_c6s1_000001_00.jpg")  # the gallery has 5 by camera 6 only
    expected["no true match", str(query / "0005_c6s1_000001_00.jpg")] += 1
    picture(303).save(query / "0099_c1s1_000001_00.jpg")  # the gallery has nobody 99
    expected["no true match", str(query / "0099_c1s1_000001_00.jpg")] += 1
    shutil.copy(train / "0002_c1s1_000001_00.jpg", gallery / "0001_c3s1_000001_00.jpg")
    expected["two splits", str(gallery / "0001_c3s1_000001_00.jpg")] += 1
    shutil.copy(query / "0001_c1s1_000001_00.jpg", gallery / "0001_c1s1_000009_00.jpg")
    expected["two splits", str(gallery / "0001_c1s1_000009_00.jpg")] += 1
    shutil.copy(gallery / "0005_c6s1_000001_00.jpg", gallery / "0000_c6s1_000001_00.jpg")
    expected["two identities", str(gallery / "0000_c6s1_000001_00.jpg")] += 1
    shutil.copy(train / "0002_c2s1_000001_00.jpg", train / "0002_c2s1_000001_00 (1).jpg")
    expected["copies", str(train / "0002_c2s1_000001_00 (1).jpg")] += 1
    picture(304).save(train / "-1_c1s1_000001_00.jpg")
    expected["left out", str(train / "-1_c1s1_000001_00.jpg")] += 1
    picture(305).save(query / "0000_c1s1_000001_00.jpg")
    expected["left out", str(query / "0000_c1s1_000001_00.jpg")] += 1
    (train / "readme.txt").touch()
    expected["ignored", str(train / "readme.txt")] += 1
    (train / "0009_c1s1_000001_00.jpg").mkdir()
    expected["ignored", str(train / "0009_c1s1_000001_00.jpg")] += 1
    expected["count", f"Market-1501 in {folder} "] += 1  # by the files above, in one sentence

    shutil.copy(train / "0007_c3s1_000001_00.jpg", gallery / "-1_c1s1_000009_00.jpg")  # junk is never used: no problem
    (gallery / "-1_c1s1_000001_00.jpg").unlink()
    for file in (*CLUTTER, "Thumbs.db", ".DS_Store", "._0002_c1s1_000001_00.jpg"):
        (train / file).write_bytes(b"")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check(folder, market1501, workers=2)
    found = Counter()
    for kind, text in report.findings:
        matches = [
            key for key in expected if key[0] == kind and (key[1] + " " in text + " " or text.startswith(key[1]))
        ]
        assert len(matches) == 1, (kind, text)
        found[matches[0]] += 1
    assert found == expected

    assert main(["market", "--data-dir", str(folder), "--all-remarks"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("problem: ") for line in lines) == len(report.problems)
    assert sum(line.startswith("remark: ") for line in lines) == len(report.remarks)
    assert lines[-1] == f"problems: {len(report.problems)}, remarks: {len(report.remarks)}"
    assert ["problem", "two", "splits", "2"] in [line.split() for line in lines]


@pytest.mark.parametrize("kind", BAD_FILES)
def test_training_stops_where_the_check_finds_a_bad_image(folder, kind):
    """What the check calls bad, decoding refuses."""
    (path,) = write_each(folder, {kind: BAD_FILES[kind]}).values()
    problems = [finding.kind for finding in check(folder, market1501, check_counts=False).problems]
    assert problems == [kind.split(",")[0]]
    with warnings.catch_warnings(), pytest.raises(BadImage):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        decode(path, [(8, 4)])


@pytest.mark.parametrize("kind", UNUSUAL_FILES)
def test_training_goes_on_where_the_check_has_a_remark(folder, kind, capsys):
    (path,) = write_each(folder, {kind: UNUSUAL_FILES[kind]}).values()
    report = check(folder, market1501, check_counts=False)
    assert report.problems == [] and [finding.kind for finding in report.remarks] == [kind.split(",")[0]]
    if kind != "ignored":
        assert decode(path, [(8, 4)])[0].shape == (8, 4, 3)
    main(["market", "--data-dir", str(folder)])
    assert f"remark: {kind.split(',')[0]}: {path}" in capsys.readouterr().out


def test_remarks_alone_are_exit_code_0(folder):
    (folder / TRAIN / "readme.txt").touch()
    assert [finding.kind for finding in check(folder, market1501).remarks] == ["ignored"]
    assert main(["market", "--data-dir", str(folder)]) == 0


def test_a_pipe_does_not_stop_the_check(tmp_path):
    """To open it would mean to wait for somebody who writes into it."""
    os.mkfifo(tmp_path / "0007_c1s1_000001_00.jpg")
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(examine(tmp_path / "0007_c1s1_000001_00.jpg")[1]), daemon=True
    )
    thread.start()
    thread.join(timeout=20)
    assert [finding.kind for finding in found] == ["unreadable file"]


def test_a_decoder_that_raises_anything(folder, monkeypatch):
    def decode(path, sizes):
        raise RuntimeError("surprise")

    monkeypatch.setattr("data.check.decode", decode)
    report = check(folder, market1501, workers=2)
    assert {finding.kind for finding in report.findings} == {"broken image"}
    assert len(report.findings) == sum(map(len, CLEAN.values())) - 1 and "surprise" in report.findings[0].text


def test_a_file_that_may_not_be_read(folder, monkeypatch):
    """As the superuser runs tests too, the refusal is played."""
    path, real = folder / QUERY / CLEAN[QUERY][0], Path.open

    def refuse(self, *args, **kwargs):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert check(folder, market1501).findings == [("unreadable file", f"{path} cannot be read: Permission denied")]


def test_bad_copies_are_no_copies(folder):
    """Two empty files in two splits are two empty files, not one image in two splits."""
    for path in (folder / TRAIN / CLEAN[TRAIN][0], folder / QUERY / CLEAN[QUERY][0]):
        path.write_bytes(b"")
    assert [finding.kind for finding in check(folder, market1501).findings] == ["empty file"] * 2


@pytest.mark.parametrize("missing", [[TRAIN], [QUERY], [GALLERY], [TRAIN, GALLERY], [TRAIN, QUERY, GALLERY]])
def test_missing_and_empty_folders(folder, missing, capsys):
    """Nothing follows from a missing folder but itself: no counts, no queries without a match."""
    for name in missing:
        shutil.rmtree(folder / name)
    ((kind, text),) = check(folder, market1501).findings
    assert kind == "missing folder" and all(name in text for name in missing)
    assert main(["market", "--data-dir", str(folder)]) == 1
    for name in missing:
        (folder / name).mkdir()
        (folder / name / "Thumbs.db").touch()
    assert [finding.kind for finding in check(folder, market1501).findings] == ["empty folder"] * len(missing)


def test_a_folder_of_junk_only(folder):
    (folder / TRAIN / "-1_c1s1_000001_00.jpg").write_bytes((folder / TRAIN / CLEAN[TRAIN][0]).read_bytes())
    for file in CLEAN[TRAIN]:
        (folder / TRAIN / file).unlink()
    kinds = [finding.kind for finding in check(folder, market1501, check_counts=False).findings]
    assert sorted(kinds) == ["empty folder", "left out"]


@pytest.mark.parametrize(
    "removed, row",
    [
        ((TRAIN, 0), "train 2 images of 2 identities instead of 3 of 2"),
        ((GALLERY, 0), "gallery 4 images of 3 identities instead of 5 of 3"),
        ((GALLERY, 3), "gallery 4 images of 3 identities instead of 5 of 3"),  # a distractor
    ],
)
def test_a_lost_image_is_counted_once(folder, removed, row):
    name, number = removed
    (folder / name / CLEAN[name][number]).unlink()
    text = f"Market-1501 in {folder} is not the complete data set: {row}."
    result = check(folder, market1501)
    assert result.findings == [("count", text)] and result.told == ["Market-1501 (incomplete)"]
    assert check(folder, market1501, check_counts=False).findings == []


def test_the_published_counts(monkeypatch):
    monkeypatch.undo()
    assert MARKET.COUNTS == {"train": (751, 12936), "query": (750, 3368), "gallery": (751, 13115 + 2798)}
    assert DUKE.COUNTS == {"train": (702, 16522), "query": (702, 2228), "gallery": (1110, 17661)}


def test_the_layouts_and_names_are_those_of_the_reader(tmp_path, monkeypatch):
    """Also DukeMTMC-reID's: cameras 1 to 8, people of the gallery who are in no query, no junk."""
    content = {TRAIN: "0001_c8_f0000001.jpg", QUERY: "0010_c3_f0000001.jpg"}
    for seed, (name, file) in enumerate(
        [*content.items(), (GALLERY, "0010_c4_f0000001.jpg"), (GALLERY, "7139_c2_f0000001.jpg")]
    ):
        path = tmp_path / "dukemtmc-reid" / "DukeMTMC-reID" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    monkeypatch.setattr(DUKE, "COUNTS", {"train": (1, 1), "query": (1, 1), "gallery": (2, 2)})
    report = check(tmp_path, dukemtmc)
    assert report.findings == [] and [row[0] for row in report.counts] == ["train", "query", "gallery"]
    assert main(["duke", "--data-dir", str(tmp_path)]) == 0
    path.rename(path.with_name("7139_c9_f0000001.jpg"))
    ((kind, text),) = check(tmp_path, dukemtmc).findings
    assert kind == "count" and text.endswith("is not the complete data set: cameras 9 beside 1 to 8.")
    path.with_name("0000_c2_f0000001.jpg").write_bytes(b"")  # the reader refuses it: there is no 0000 in this set
    assert sorted(finding.kind for finding in check(tmp_path, dukemtmc).findings) == ["count", "file name"]


def test_remarks_are_cut_short_problems_are_not(folder, capsys):
    for number in range(5):
        picture(number + 50).convert("L").save(folder / TRAIN / f"0007_c1s1_{number:06d}_09.jpg")
        (folder / TRAIN / f"0007_c2s1_{number:06d}_09.jpg").touch()
    main(["market", "--data-dir", str(folder)])
    output = capsys.readouterr().out
    assert output.count("remark: grey") == 3 and output.count("problem: empty file") == 5
    assert ["remark", "grey", "5"] in [line.split() for line in output.splitlines()]
    main(["market", "--data-dir", str(folder), "--all-remarks"])
    assert capsys.readouterr().out.count("remark: grey") == 5


def test_threads_change_nothing(folder):
    write_each(folder, {**BAD_FILES, **UNUSUAL_FILES})
    assert check(folder, market1501, workers=1) == check(folder, market1501, workers=7)


def test_synthetic(folder, monkeypatch, capsys):
    """Generated where it is not there yet, then checked without the counts of Market-1501."""
    asked = []

    def generate(data_dir, num_ids, seed):
        asked.append((data_dir, num_ids, seed))
        return folder

    monkeypatch.setattr("data.synthetic.generate", generate)
    monkeypatch.setattr(MARKET, "COUNTS", {**CLEAN_COUNTS, "train": (751, 12936)})
    assert main(["synthetic", "--data-dir", "somewhere", "--synthetic-ids", "7"]) == 0
    assert asked == [(Path("somewhere"), 7, 0)] and "problems: 0" in capsys.readouterr().out


def test_generated_pedestrians_are_clean(tmp_path):
    load_dataset("synthetic", tmp_path, synthetic_ids=2)
    (folder,) = tmp_path.glob("synthetic*")
    assert check(folder, market1501, check_counts=False, workers=2).problems == []


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "synthetic"])
def test_every_data_set_can_be_checked(name, tmp_path, capsys):
    """A new reader is known here by its line in DATASETS, and what it misses is a finding, not an error."""
    assert main([name, "--data-dir", str(tmp_path / "nowhere")]) == 1
    output = capsys.readouterr().out
    assert output.startswith("problem: missing folder: ") and "two splits" not in output


def write_people(root: Path, *paths: str) -> Path:
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(root / path)
    return root


def test_a_folder_of_ones_own(tmp_path, capsys):
    write_people(tmp_path, *(f"{name}/{i}.png" for name in "abcd" for i in range(3)))
    assert main(["folder", "--data-dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "a folder per person: 4 people, 12 images, cameras unknown" in output
    assert ["train", "2", "6", "0"] in [line.split() for line in output.splitlines()]  # people, images, cameras
    shutil.copy(tmp_path / "a/0.png", tmp_path / "b/0.png")
    (tmp_path / "c/1.png").write_text("<html>")
    (tmp_path / "loose.png").touch()
    picture(99).convert("RGB").save(tmp_path / "d/3.jpg", "WEBP")
    (tmp_path / "A").mkdir()
    picture(98).save(tmp_path / "A/1.png")
    (tmp_path / "notes.txt").touch()
    kinds = Counter(finding.kind for finding in check(tmp_path, DATASETS["folder"], split_seed=3).findings)
    (copied,) = {"two identities", "two splits"} & kinds.keys()
    assert kinds == {copied: 1, "not an image": 1, "layout": 1, "wrong suffix": 1, "similar names": 1, "ignored": 1}


def test_a_given_split_of_ones_own(tmp_path):
    """The same people in training and in test are allowed; cameras unknown, another image is a true match."""
    root = write_people(tmp_path, "train/a/1.png", "train/b/1.png", "query/a/2.png", "query/c/2.png", "gallery/a/3.png")
    result = check(root, DATASETS["folder"])
    assert result.findings == [
        ("no true match", f"{root / 'query/c/2.png'} as a query of identity 3 lacks another image in the gallery")
    ]
    assert "both in training and in the test: 1 person" in result.told


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: dataset"),
        (["markt"], "invalid choice: 'markt'"),
        (["market", "--cuhk03-boxes", "labeled"], "--cuhk03-boxes belongs to --dataset cuhk03, not to market"),
        (["cuhk03", "--cuhk03-boxes", "drawn"], "invalid choice: 'drawn'"),
        (["folder", "--data-dir", ".", "--test-share", "2"], "between 0 and 1"),
        (["market", "--workers", "0"], "at least one thread"),
        (["synthetic", "--synthetic-ids", "0"], "number of generated identities"),
    ],
)
def test_wrong_usage(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_code:
        main(arguments)
    assert exit_code.value.code == 2 and message in capsys.readouterr().err


def test_as_a_command(folder):
    """Exit codes, and names of any bytes, in a terminal that knows ASCII only."""
    name = os.fsdecode(b"\xff\xfeholiday.jpg")
    picture(50).save(folder / TRAIN / "caf\u00e9.jpg")
    command = [sys.executable, "-m", "data.check", "market", "--data-dir", str(folder)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    try:
        picture(51).save(folder / TRAIN / name)
    except OSError:  # a file system of text names
        name = "caf\u00e9.jpg"
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "caf\\xe9.jpg': expected a name such as" in run.stdout


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert "Problems:" in out and "Remarks:" in out
