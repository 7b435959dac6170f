"""Lists every problem of a data set in one pass: python -m data.check market --data-dir datasets

A problem stops a run or makes its scores wrong; exit code 1 if there is one, 0 if there is none (2: wrong usage).
A remark is something unusual that training and evaluation handle.

Problems: what the data set's reader finds (missing or empty folders, file names that cannot be parsed, counts or
cameras other than the published ones, ...); files that cannot be read, are empty, no image, broken (truncated) or
giant; people both in training and in test (but in a folder of one's own); queries without a true match by another
camera in the gallery; one image in two splits or under two identities.
Remarks: grey, palette, transparent, CMYK and 16-bit images, images turned by their EXIF orientation, tiny ones, copies
within one split, files whose suffix is not that of their content, files that are left out or ignored.

Files are copies if their bytes are the same: an image that was saved again is not found.
"""

import argparse
import hashlib
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from tabulate import tabulate
from tqdm import tqdm

from data import DATASETS, add_reader_flags, check_options
from data.images import FORMATS, MAX_PIXELS, BadImage, decode, default_workers
from data.records import INFORMATION, Record, Split, camera, has_cameras
from data.records import REMARKS as READER_REMARKS

JPEG = ("JPEG", "MPO")  # MPO: a JPEG with a second picture
CONTENT = {".jpg": JPEG, ".jpeg": JPEG}  # of the other suffixes: the format of that name
TINY = 8  # pixels
MODES = {"1": "grey", "L": "grey", "LA": "grey", "P": "palette", "RGBA": "transparent", "CMYK": "CMYK"}
REMARKS = {*READER_REMARKS, *MODES.values(), "similar names", "16 bits", "tiny", "wide", "turned", "copies",
           "wrong suffix"}  # fmt: skip


class Finding(NamedTuple):
    kind: str  # a remark if in REMARKS, else a problem
    text: str


class Result(NamedTuple):
    findings: list[Finding]
    told: list[str]  # what the data set is
    counts: list[tuple[str, int, int, int]]  # row, identities, images, cameras

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind not in REMARKS]

    @property
    def remarks(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind in REMARKS]


def check(root: str | Path, reader: Callable[..., Split], workers: int = 1, **options) -> Result:
    """All that is wrong or unusual with the data set below root. options: those of the reader."""
    findings, told = [], []

    def report(kind: str, text: str) -> None:
        if kind in INFORMATION:
            told.append(text)
        else:
            findings.append(Finding(kind, text))

    split = reader(root, report=report, **options)
    digests, found = examine_all([r.path for records in split for r in records], workers)
    findings += found
    findings += check_identities(*split, overlap=reader is DATASETS["folder"])
    findings += check_copies(split, digests)
    counts = []
    for name, records in split._asdict().items():
        cameras = {r.camid for r in records} - {-1}
        counts.append((name, len({r.pid for r in records}), len(records), len(cameras)))
    return Result(findings, told, counts)


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
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return None, [Finding("giant image", f"{path} has {image.width:,} x {image.height:,} pixels")]
            suffix = path.suffix.lower()
            if image.format not in CONTENT.get(suffix, (suffix[1:].upper(),)):
                findings.append(Finding("wrong suffix", f"{path} is in truth a {image.format} file"))
            if image.mode in MODES:
                findings.append(Finding(MODES[image.mode], f"{path} is of mode {image.mode}"))
            if image.format == "PNG" and header[24] == 16:  # Pillow's modes do not tell for colour images
                findings.append(Finding("16 bits", f"{path} has 16 bits per value"))
            if min(image.size) < TINY:
                findings.append(Finding("tiny", f"{path} has {image.width} x {image.height} pixels"))
            width, height = image.size
            if (orientation := image.getexif().get(0x0112, 1)) != 1:
                findings.append(Finding("turned", f"{path} is turned, as its EXIF orientation {orientation} says"))
                width, height = image.size if orientation < 5 else image.size[::-1]
            if width > height:
                text = f"{path} is wider than high ({width} x {height}): is it cut out around the person?"
                findings.append(Finding("wide", text))
        decode(path, [])  # exactly what training and evaluation do
    except Image.DecompressionBombError:
        return None, [Finding("giant image", f"{path} has more than {2 * MAX_PIXELS:,} pixels")]
    except UnidentifiedImageError:
        return None, [Finding("not an image", f"{path} is no {', '.join(FORMATS)} image")]
    except BadImage as error:
        return None, [*findings, Finding("broken image", str(error))]
    except Exception as error:  # a broken file can make a decoder raise anything
        return None, [*findings, Finding("broken image", f"{path} cannot be decoded: {error!r}")]
    return digest.hexdigest(), findings


def check_identities(
    train: list[Record], query: list[Record], gallery: list[Record], overlap: bool = False
) -> list[Finding]:
    """Labels, people in training and in test, unless that overlap is allowed, queries that nobody could answer."""
    findings = []
    labels = {r.label for r in train}
    if labels != {*range(len(labels))} or len({(r.pid, r.label) for r in train}) != len(labels):
        findings.append(Finding("labels", "the labels of training are not 0, 1, ..., one for each person: add_labels"))
    test_pids = {r.pid for r in [*query, *gallery]}
    for pid, images in sorted(Counter(r.pid for r in train if r.pid in test_pids and not overlap).items()):
        findings.append(Finding("train and test", f"identity {pid} is in training ({images} images) and in test"))
    ignored = not has_cameras([*query, *gallery])
    seen = defaultdict(set)  # what the gallery images of an identity differ in
    for r in gallery:
        seen[r.pid].add(camera(r, ignored))
    alone = {}  # (pid, camera) -> one of its queries
    for r in query if gallery else ():  # an empty gallery is reported as such
        if not seen[r.pid] - {camera(r, ignored)}:
            alone.setdefault((r.pid, camera(r)), r)
    for (pid, _), r in alone.items():
        what = "another image" if ignored else "an image by another camera"
        findings.append(Finding("no true match", f"{r.path} as a query of identity {pid} lacks {what} in the gallery"))
    return findings


def check_copies(split: Split, digests: dict[Path, str]) -> list[Finding]:
    """One finding for each group of files with the same bytes. Junk is not looked at: it is never used."""
    groups = defaultdict(list)  # digest -> (part of the split, record)
    for part, records in split._asdict().items():
        for r in records:
            if r.path in digests:
                groups[digests[r.path]].append((part, r))
    findings = []
    for group in groups.values():
        if len(group) > 1:
            kind = "copies"
            if len({r.pid for _, r in group}) > 1:
                kind = "two identities"
            if len({part for part, _ in group}) > 1:
                kind = "two splits"
            findings.append(Finding(kind, " = ".join(str(r.path) for _, r in group)))
    return findings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=DATASETS, help="synthetic: generated first, if it is not there yet")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("datasets"),
        metavar="ROOT",
        help="folder that holds the data sets' folders, or the data set's own (default: datasets)",
    )
    add_reader_flags(parser)
    parser.add_argument("--all-remarks", action="store_true", help="list every remark, not three of a kind")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), metavar="N", help="threads (default: the cores, at most 4)"
    )
    options = vars(parser.parse_args(argv))
    dataset, data_dir, all_remarks, workers = map(options.pop, ("dataset", "data_dir", "all_remarks", "workers"))
    if workers < 1:
        parser.error("--workers: at least one thread is needed")
    try:
        check_options(dataset, options)
        result = check(data_dir, DATASETS[dataset], workers, **options)
    except (OSError, ValueError) as error:  # a folder that may not be read, a wrong number of identities, ...
        parser.error(str(error))
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    print_result(result, all_remarks)
    return 1 if result.problems else 0


def print_result(result: Result, all_remarks: bool = False) -> None:
    """Problems, remarks, then the tables: the end of the output is the summary."""
    for kind, text in sorted(result.problems):
        print(f"problem: {kind}: {text}")
    shown = Counter()
    for kind, text in sorted(result.remarks):
        shown[kind] += 1
        if all_remarks or shown[kind] <= 3:
            print(f"remark: {kind}: {text}")
    print()
    print("".join(f"{text}\n" for text in result.told), end="")
    print(tabulate(result.counts, ["", "identities", "images", "cameras"], intfmt=","))
    numbers = Counter(finding.kind for finding in result.findings)
    if numbers:
        print()
        rows = sorted(numbers.items(), key=lambda item: (item[0] in REMARKS, item[0]))
        print(tabulate([("remark" if k in REMARKS else "problem", k, n) for k, n in rows], ["", "what", "number"]))
    print(f"\nproblems: {len(result.problems):,}, remarks: {len(result.remarks):,}")


if __name__ == "__main__":
    sys.exit(main())
