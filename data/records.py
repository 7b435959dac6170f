"""The two types every reader returns, and what several readers share.

A reader is a function `reader(root, report=stop, *, option=default, ...) -> Split`. Whatever it finds it hands to
`report(kind, text)`, one sentence at a time, and goes on: `stop` makes an error of it, data.check a line of its list.
"""

import os
import random
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")  # of images, in any case
CLUTTER = ("thumbs.db", "desktop.ini")  # and hidden files: left by file managers, not worth a word
INFORMATION = ("title", "note")  # the data set's exact name, and what else to know about it
REMARKS = ("left out", "ignored")  # files
WARNINGS = ("count", "similar names")
Report = Callable[[str, str], None]  # kind, text; any other kind is a problem


class Record(NamedTuple):
    """One image: where it lies, who it shows, which camera took it."""

    path: Path
    pid: int  # identity number in the file name (-1 junk, 0 distractor on Market-1501)
    camid: int  # camera number in the file name; -1 if it is not known
    label: int = -1  # class index 0..C-1, training images only


class Split(NamedTuple):
    """Three lists of records, each sorted by path."""

    train: list[Record]
    query: list[Record]
    gallery: list[Record]


def stop(kind: str, text: str) -> None:
    """A problem is an error, an incomplete copy a warning; what is only to be told is left to others."""
    if kind in WARNINGS:
        warnings.warn(text, stacklevel=3)
    elif kind in ("missing folder", "empty folder"):
        raise FileNotFoundError(text)
    elif kind not in (*INFORMATION, *REMARKS):
        raise ValueError(text)


def find_folder(root: str | Path, places: Sequence[str], names: Sequence[str], report: Report = stop) -> Path:
    """The place below root that holds all the folders (or files) of these names, or else most of them."""
    candidates = [Path(root) / place for place in places]
    missing = {c: [name for name in names if not (c / name).exists()] for c in candidates}
    best = min(candidates, key=lambda c: len(missing[c]))  # the first of the best
    if len(missing[best]) == len(names):
        wanted, tried = ", ".join(names), ", ".join(map(str, candidates))
        report("missing folder", f"No {wanted} in any of {tried}: put them into the first, or pass --data-dir.")
    elif missing[best]:
        report("missing folder", f"{best} has no {' and no '.join(missing[best])}: copy it there.")
    return best


def list_images(folder: Path, report: Report = stop) -> list[str]:
    """The names of the images that lie in a folder itself, sorted; hidden files are none."""
    if not folder.exists():
        return []  # find_folder has told it
    names = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name.startswith(".") or entry.name.lower() in CLUTTER:
                continue
            if entry.is_dir() or not entry.name.lower().endswith(SUFFIXES):
                report("ignored", f"{entry.path} is not an image.")
            else:
                names.append(entry.name)
    if not names:
        text = f"{folder} holds no images ({', '.join(SUFFIXES)}): copy the data set's images there."
        report("empty folder", text)
    return names


def read_folder(folder: Path, pattern: re.Pattern[str], example: str, report: Report = stop) -> list[Record]:
    """A record for each image, sorted by path. The pattern's groups are identity and camera of a file name."""
    records = []
    for name in list_images(folder, report):
        if match := pattern.match(name):
            records.append(Record(folder / name, pid=int(match[1]), camid=int(match[2])))
        else:
            text = f"Cannot parse the file name {str(folder / name)!r}: expected a name such as {example}."
            report("file name", text)
    return records


def add_labels(records: list[Record]) -> list[Record]:
    """The same records, their identities numbered 0..C-1 in the order of the pids."""
    labels = {pid: label for label, pid in enumerate(sorted({r.pid for r in records}))}
    return [r._replace(label=labels[r.pid]) for r in records]


def compare_counts(
    title: str, folder: Path, split: Split, counts: dict[str, tuple[int, int]], cameras: range, report: Report = stop
) -> None:
    """Tells the title, and with it in one sentence all that differs from a complete copy.

    counts: train, query and gallery -> (identities, images). An empty list is not compared: it was told as such.
    """
    found = {name: (len({r.pid for r in records}), len(records)) for name, records in split._asdict().items()}
    differences = [
        f"{name} {images:,} images of {pids:,} identities instead of {counts[name][1]:,} of {counts[name][0]:,}"
        for name, (pids, images) in found.items()
        if images and (pids, images) != counts[name]
    ]
    if others := sorted({r.camid for records in split for r in records} - set(cameras)):
        differences.append(f"cameras {', '.join(map(str, others))} beside {cameras[0]} to {cameras[-1]}")
    if differences:
        report("count", f"{title} in {folder} is not the complete data set: {'; '.join(differences)}.")
    report("title", f"{title} (incomplete)" if differences else title)


def has_cameras(records: Sequence[Record]) -> bool:
    """Whether the cameras of all images are known; if not, scoring must ignore cameras."""
    return all(r.camid >= 0 for r in records)


def camera(record: Record, ignore_cameras: bool = False) -> int | Path:
    """What a true match must differ in: the camera, or if it is unknown or ignored, the file."""
    return record.path if ignore_cameras or record.camid < 0 else record.camid


def choose_queries(people: dict, draw: str, ignore_cameras: bool = False) -> tuple[list[Record], list[Record]]:
    """Test people's images -> query and gallery: one image per camera is a query, the others are the gallery.

    people: anything that names a person -> the records of this person. draw: a text that says which draw it is; each
    person has one of his own, so that another one more does not change it. An image stays in the gallery where a query
    would otherwise lose its last true match.
    """
    query, gallery = [], []
    for name, records in people.items():
        rng = random.Random(f"{draw} {name}")
        chosen, rest = [], records
        for camid in sorted({r.camid for r in records}):
            record = rng.choice([r for r in records if r.camid == camid])
            others = [r for r in rest if r is not record]
            cameras = {camera(r, ignore_cameras) for r in others}
            if all(cameras - {camera(r, ignore_cameras)} for r in [*chosen, record]):  # every query keeps a match
                chosen, rest = [*chosen, record], others
        query += chosen
        gallery += rest
    return sorted(query, key=lambda r: r.path), sorted(gallery, key=lambda r: r.path)
