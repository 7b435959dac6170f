"""Lists every problem of a data set in one pass: python -m data.check market --data-dir datasets

A problem stops a run or makes its scores wrong; exit code 1 if there is one, 0 if there is none (2: wrong usage).
A remark is something unusual that training and evaluation handle.

Problems: missing or empty folders; file names that cannot be parsed; cameras the data set does not have; counts other
than the published ones; files that cannot be read, are empty, no image, broken (truncated) or giant; files whose suffix
is not that of their content, or not one the readers take; people both in training and in test; queries without a true
match by another camera in the gallery; one image in two splits or under two identities.
Remarks: grey, palette, transparent, CMYK and 16-bit images, images turned by their EXIF orientation, tiny ones, copies
within one split, junk or distractors outside the gallery's folder (left out), other files (ignored).

Files are copies if their bytes are the same: an image that was saved again is not found.
"""

import argparse
import hashlib
import os
import sys
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from tabulate import tabulate
from tqdm import tqdm

from data import dukemtmc, market1501
from data.images import MAX_PIXELS, BadImage, decode
from data.records import Record

SUFFIXES = {".jpg": ("JPEG", "MPO"), ".jpeg": ("JPEG", "MPO"), ".png": ("PNG",)}  # MPO: a JPEG with a second picture
CLUTTER = ("thumbs.db", "desktop.ini")  # and hidden files: left by file managers, not worth a remark
READERS = {"market": market1501, "duke": dukemtmc, "synthetic": market1501}  # synthetic: in Market-1501's layout
TINY = 8  # pixels
MODES = {"1": "grey", "L": "grey", "LA": "grey", "P": "palette", "RGBA": "transparent", "CMYK": "CMYK"}
PROBLEMS = (
    "missing folder",
    "empty folder",
    "file name",
    "file suffix",
    "camera number",
    "count",
    "unreadable file",
    "empty file",
    "not an image",
    "broken image",
    "giant image",
    "wrong suffix",
    "train and test",
    "no true match",
    "two splits",
    "two identities",
)


class Finding(NamedTuple):
    kind: str  # a problem if in PROBLEMS, else a remark
    text: str


class Report(NamedTuple):
    findings: list[Finding]
    counts: list[tuple[str, int, int, int | None, int | None]]  # row, identities, images, and how many there should be

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind in PROBLEMS]

    @property
    def remarks(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind not in PROBLEMS]


def check(root: str | Path, reader: ModuleType, check_counts: bool = True, workers: int = 1) -> Report:
    """All that is wrong or unusual with the data set below root.

    reader: the module of a reader with folders of images (its FOLDERS, PLACES, NAME, CAMERAS, COUNTS are used).
    """
    places = [Path(root) / place for place in reader.PLACES]
    folder = max(places, key=lambda place: sum((place / name).is_dir() for name in reader.FOLDERS.values()))
    findings, files, records = [], [], {}
    for split, name in reader.FOLDERS.items():
        found, paths, records[split] = scan(folder / name, reader)
        findings += found
        files += paths
    digests, found = examine_all(files, workers)
    findings += found

    usable = {
        "train": [r for r in records["train"] if r.pid > 0],
        "query": [r for r in records["query"] if r.pid > 0],
        "gallery": [r for r in records["gallery"] if r.pid >= 0],
    }
    for split in ("train", "query"):
        findings += [Finding("left out", f"{r.path} is junk or a distractor") for r in records[split] if r.pid < 1]
    for split, name in reader.FOLDERS.items():
        if records[split] and not usable[split]:
            findings.append(Finding("empty folder", f"{folder / name} holds junk or distractors only"))
    findings += check_identities(**usable)
    findings += check_copies(usable, digests)
    counts, found = check_counted(records, reader.COUNTS if check_counts else {})
    return Report(findings + found, counts)


def scan(folder: Path, reader: ModuleType) -> tuple[list[Finding], list[Path], list[Record]]:
    """What the file names of one folder tell: findings, the paths of all images, and a record for each parsed name."""
    if not folder.is_dir():
        return [Finding("missing folder", f"{folder} does not exist")], [], []
    findings, paths, records = [], [], []
    for path in sorted(folder.iterdir()):
        match = reader.NAME.match(path.name)
        if path.name.startswith(".") or path.name.lower() in CLUTTER:
            continue
        if path.is_dir():
            findings.append(Finding("ignored", f"{path} is a folder"))
        elif path.suffix.lower() not in SUFFIXES and match:
            findings.append(Finding("file suffix", f"{path} is left out: images end in {', '.join(SUFFIXES)}"))
        elif path.suffix.lower() not in SUFFIXES:
            findings.append(Finding("ignored", f"{path} is not an image"))
        else:
            paths.append(path)
            if not match:
                findings.append(Finding("file name", f"{path} cannot be parsed: expected {reader.EXAMPLE}, say"))
                continue
            records.append(Record(path, pid=int(match[1]), camid=int(match[2])))
            if records[-1].camid not in reader.CAMERAS:
                cameras = f"{reader.CAMERAS[0]} to {reader.CAMERAS[-1]}"
                findings.append(Finding("camera number", f"{path} is by camera {records[-1].camid}, not {cameras}"))
    if not paths:
        findings.append(Finding("empty folder", f"{folder} holds no images"))
    return findings, paths, records


def examine_all(paths: list[Path], workers: int) -> tuple[dict[Path, str], list[Finding]]:
    """Reads and decodes every file in threads; returns the digests of the whole images and all findings."""
    digests, findings = {}, []
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as executor:
        warnings.simplefilter("ignore")  # Pillow's: what matters becomes a finding
        with tqdm(total=len(paths), desc="checking", unit="image", leave=False, disable=None) as bar:
            for start in range(0, len(paths), 1024):  # in blocks, so that a keystroke can stop it
                block = paths[start : start + 1024]
                for path, (digest, found) in zip(block, executor.map(examine, block), strict=True):
                    findings += found
                    if digest is not None:
                        digests[path] = digest
                    bar.update()
    return digests, findings


def examine(path: Path) -> tuple[str | None, list[Finding]]:
    """Digest (None for a bad file) and findings of one image file."""
    if not path.is_file():
        return None, [Finding("unreadable file", f"{path} is no file, or a link that leads nowhere")]
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            if file.tell() == 0:
                return None, [Finding("empty file", f"{path} has 0 bytes")]
            file.seek(0)
            header = file.read(32)
    except OSError as error:
        return None, [Finding("unreadable file", f"{path} cannot be read: {error.strerror}")]

    findings = []
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                return None, [Finding("giant image", f"{path} has {image.width:,} x {image.height:,} pixels")]
            if image.format not in SUFFIXES[path.suffix.lower()]:
                findings.append(Finding("wrong suffix", f"{path} is in truth a {image.format} file"))
            if image.format not in ("JPEG", "MPO", "PNG"):
                return None, findings
            if image.mode in MODES:
                findings.append(Finding(MODES[image.mode], f"{path} is of mode {image.mode}"))
            if image.format == "PNG" and header[24] == 16:  # Pillow's modes do not tell for colour images
                findings.append(Finding("16 bits", f"{path} has 16 bits per value"))
            if min(image.size) < TINY:
                findings.append(Finding("tiny", f"{path} has {image.width} x {image.height} pixels"))
            if (orientation := image.getexif().get(0x0112, 1)) != 1:
                findings.append(Finding("turned", f"{path} has the EXIF orientation {orientation}"))
        decode(path, [])  # exactly what training and evaluation do
    except Image.DecompressionBombError:
        return None, [Finding("giant image", f"{path} has more than {2 * MAX_PIXELS:,} pixels")]
    except UnidentifiedImageError:
        return None, [Finding("not an image", f"{path} does not begin as an image does")]
    except BadImage as error:
        return None, [*findings, Finding("broken image", str(error))]
    except Exception as error:  # a broken file can make a decoder raise anything
        return None, [*findings, Finding("broken image", f"{path} cannot be decoded: {error!r}")]
    return digest.hexdigest(), findings


def check_identities(train: list[Record], query: list[Record], gallery: list[Record]) -> list[Finding]:
    """People in training and in test, and queries that nobody could answer."""
    findings = []
    test_pids = {r.pid for r in [*query, *gallery]}
    for pid, images in sorted(Counter(r.pid for r in train if r.pid in test_pids).items()):
        findings.append(Finding("train and test", f"identity {pid} is in training ({images} images) and in test"))
    cameras = defaultdict(set)  # of an identity in the gallery
    for r in gallery:
        cameras[r.pid].add(r.camid)
    for pid, camid in sorted({(r.pid, r.camid) for r in query if gallery}):  # an empty gallery is reported as such
        if not cameras[pid] - {camid}:
            text = f"identity {pid} as a query of camera {camid} has no image by another camera in the gallery"
            findings.append(Finding("no true match", text))
    return findings


def check_copies(records: dict[str, list[Record]], digests: dict[Path, str]) -> list[Finding]:
    """One finding for each group of files with the same bytes. Junk is not looked at: it is never used."""
    groups = defaultdict(list)  # digest -> (split, record)
    for split, split_records in records.items():
        for r in split_records:
            if r.path in digests:
                groups[digests[r.path]].append((split, r))
    findings = []
    for group in groups.values():
        if len(group) > 1:
            kind = "copies"
            if len({r.pid for _, r in group}) > 1:
                kind = "two identities"
            if len({split for split, _ in group}) > 1:
                kind = "two splits"
            findings.append(Finding(kind, " = ".join(str(r.path) for _, r in group)))
    return findings


def check_counted(
    records: dict[str, list[Record]], expected: dict[str, tuple[int, int]]
) -> tuple[list[tuple[str, int, int, int | None, int | None]], list[Finding]]:
    """The rows of the table of counts, and a finding for each that differs; `expected` may be empty.

    Each image counts in one row: distractors and junk are not part of the gallery's row.
    """
    counted = {split: [r for r in records[split] if r.pid > 0] for split in ("train", "query", "gallery")}
    counted["distractors"] = [r for r in records["gallery"] if r.pid == 0]
    counted["junk"] = [r for r in records["gallery"] if r.pid == -1]
    if "distractors" in expected:
        people = tuple(a - b for a, b in zip(expected["gallery"], expected["distractors"], strict=True))
        expected = {**expected, "gallery": people}

    rows, findings = [], []
    for name, images in counted.items():
        found = (len({r.pid for r in images}), len(images))
        wanted = expected.get(name)
        if not images and wanted is None and name not in records:
            continue  # no distractors or junk, and none expected
        rows.append((name, *found, *(wanted or (None, None))))
        folder_records = records.get(name, records["gallery"])  # none: a missing folder, and reported as such
        if folder_records and wanted not in (None, found):
            text = f"{name}: {found[1]:,} images of {found[0]:,} identities instead of {wanted[1]:,} of {wanted[0]:,}"
            findings.append(Finding("count", text))
    return rows, findings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=READERS, help="synthetic: generated first, if it is not there yet")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("datasets"),
        metavar="ROOT",
        help="folder that holds the data sets' folders, or the data set's own (default: datasets)",
    )
    parser.add_argument("--synthetic-ids", type=int, default=150, metavar="N", help="synthetic only (default: 150)")
    parser.add_argument("--all-remarks", action="store_true", help="list every remark, not three of a kind")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="threads (default: one for each core)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers: at least one thread is needed")
    reader = sys.modules[READERS[args.dataset].__module__]
    try:
        root = args.data_dir
        if args.dataset == "synthetic":
            from data.synthetic import generate

            root = generate(args.data_dir, num_ids=args.synthetic_ids)
        if not root.is_dir():
            raise FileNotFoundError(f"--data-dir: there is no folder {root}")
        report = check(root, reader, check_counts=args.dataset != "synthetic", workers=args.workers)
    except (OSError, ValueError) as error:  # a folder that may not be read, a wrong number of identities, ...
        parser.error(str(error))
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    print_report(report, args.all_remarks)
    return 1 if report.problems else 0


def print_report(report: Report, all_remarks: bool = False) -> None:
    """Problems, remarks, then the tables: the end of the output is the summary."""
    for kind, text in sorted(report.problems, key=lambda finding: PROBLEMS.index(finding.kind)):
        print(f"problem: {kind}: {text}")
    shown = Counter()
    for kind, text in sorted(report.remarks):
        shown[kind] += 1
        if all_remarks or shown[kind] <= 3:
            print(f"remark: {kind}: {text}")
    print()
    print(tabulate(report.counts, ["", "identities", "images", "expected identities", "expected images"], intfmt=","))
    numbers = Counter(finding.kind for finding in report.findings)
    if numbers:
        print()
        rows = sorted(numbers.items(), key=lambda item: (item[0] not in PROBLEMS, item[0]))
        print(tabulate([("problem" if k in PROBLEMS else "remark", k, n) for k, n in rows], ["", "what", "number"]))
    print(f"\nproblems: {len(report.problems):,}, remarks: {len(report.remarks):,}")


if __name__ == "__main__":
    sys.exit(main())
