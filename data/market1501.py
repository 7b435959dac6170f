"""Market-1501: 1,501 people seen by six cameras, with distractor and junk images among the gallery.

Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.
File names such as 0002_c1s1_000451_03.jpg: identity 2, camera 1 (1 to 6). Identity 0000 is a distractor (a wrong
answer for every query), -1 is junk (a bad box that counts neither as right nor as wrong).
"""

import os
import re
import warnings
from pathlib import Path

from data.records import Record, Split

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
PLACES = ("market1501/Market-1501-v15.09.15", "market1501", "Market-1501-v15.09.15", ".")  # below the root
NAME = re.compile(r"(-1|[0-9]{1,18})_c([0-9])s")  # identity, camera; 18 digits fit an int64
EXAMPLE = "0002_c1s1_000451_03.jpg"
CAMERAS = range(1, 7)
COUNTS = {  # (identities, images) of a complete copy; gallery: without junk, the distractors being one "identity"
    "train": (751, 12936),
    "query": (750, 3368),
    "gallery": (751, 15913),
    "distractors": (1, 2798),  # part of the gallery
    "junk": (1, 3819),  # in the gallery's folder, but not in the gallery
}


def market1501(root: str | Path, check_counts: bool = True) -> Split:
    """Read the file names of Market-1501, or of any folder in its layout.

    root: the folder that holds market1501/, or any folder further in, down to the one with the three image folders.
    Junk (-1) is in no list. Distractors (0000) are in the gallery only. Labels follow the order of the pids.
    Warns if the counts are not those of a complete copy, unless check_counts is False.
    Raises FileNotFoundError if a folder is missing or without images, ValueError if a file name cannot be parsed.
    """
    folder = find_folder(root, PLACES, FOLDERS)
    train = [r for r in read_folder(folder / FOLDERS["train"], NAME, EXAMPLE) if r.pid > 0]
    query = [r for r in read_folder(folder / FOLDERS["query"], NAME, EXAMPLE) if r.pid > 0]
    gallery = [r for r in read_folder(folder / FOLDERS["gallery"], NAME, EXAMPLE) if r.pid >= 0]
    split = Split(add_labels(train), query, gallery)
    for name, records in split._asdict().items():
        if not records:
            raise FileNotFoundError(f"{folder / FOLDERS[name]} holds junk or distractor images only: copy it again.")
    if check_counts:
        warn_if_partial("Market-1501", folder, split, COUNTS)
    return split


# The helpers below are the same in every reader with folders of images, so that each file can be read on its own.


def find_folder(root: str | Path, places: tuple[str, ...], folders: dict[str, str]) -> Path:
    """The place below root that holds all the folders; FileNotFoundError says what is missing, and from where."""
    candidates = [Path(root) / place for place in places]
    missing = {c: [name for name in folders.values() if not (c / name).is_dir()] for c in candidates}
    best = min(candidates, key=lambda c: len(missing[c]))  # the first of the best
    if len(missing[best]) == len(folders):
        wanted, tried = ", ".join(folders.values()), ", ".join(map(str, candidates))
        raise FileNotFoundError(f"No folders {wanted} in any of {tried}: put them into the first, or pass --data-dir.")
    if missing[best]:
        raise FileNotFoundError(f"{best} has no folder {' and no folder '.join(missing[best])}: copy it there.")
    return best


def read_folder(folder: Path, pattern: re.Pattern[str], example: str) -> list[Record]:
    """A record for each image, sorted by path. Images end in .jpg, .jpeg or .png (any case); hidden files are none."""
    records = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if not entry.name.lower().endswith((".jpg", ".jpeg", ".png")) or entry.name.startswith("."):
                continue
            if entry.is_dir():
                continue
            match = pattern.match(entry.name)
            if not match:
                raise ValueError(f"Cannot parse the file name {entry.path!r}: expected a name such as {example}.")
            records.append(Record(folder / entry.name, pid=int(match[1]), camid=int(match[2])))
    if not records:
        raise FileNotFoundError(f"{folder} holds no images (.jpg, .jpeg, .png): copy the data set's images there.")
    return records


def add_labels(records: list[Record]) -> list[Record]:
    """The same records, their identities numbered 0..C-1 in the order of the pids."""
    labels = {pid: label for label, pid in enumerate(sorted({r.pid for r in records}))}
    return [r._replace(label=labels[r.pid]) for r in records]


def warn_if_partial(title: str, folder: Path, split: Split, counts: dict[str, tuple[int, int]]) -> None:
    """One warning with all the differences between the split and the published counts (identities, images)."""
    found = {name: (len({r.pid for r in records}), len(records)) for name, records in split._asdict().items()}
    differences = [
        f"{name} {images:,} images of {pids:,} identities instead of {counts[name][1]:,} of {counts[name][0]:,}"
        for name, (pids, images) in found.items()
        if (pids, images) != counts[name]
    ]
    if differences:
        warnings.warn(f"{title} in {folder} is not the complete data set: {'; '.join(differences)}.", stacklevel=3)
