"""Market-1501: 1,501 people seen by six cameras, with distractor and junk images among the gallery.

Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.
File names such as 0002_c1s1_000451_03.jpg: identity 2, camera 1 (1 to 6). Identity 0000 is a distractor (a wrong
answer for every query; 2,798 images), -1 is junk (a bad box that counts neither as right nor as wrong; 3,819 images).
"""

import re
from pathlib import Path

from data.records import Record, Report, Split, add_labels, compare_counts, find_folder, list_images, read_folder, stop

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
PLACES = ("market1501/Market-1501-v15.09.15", "market1501", "Market-1501-v15.09.15", ".")  # below the root
NAME = re.compile(r"(-1|[0-9]{1,18})_c([0-9])s")  # identity, camera; 18 digits fit an int64
EXAMPLE = "0002_c1s1_000451_03.jpg"
CAMERAS = range(1, 7)
COUNTS = {"train": (751, 12936), "query": (750, 3368), "gallery": (751, 15913)}  # identities (distractors: 1), images

MORE = "images"  # the folder of the 500,000 distractors
MORE_COUNTS = {**COUNTS, "gallery": (751, 515913)}


def market1501(root: str | Path, check_counts: bool = True, report: Report = stop) -> Split:
    """Read the file names of Market-1501, or of any folder in its layout.

    root: the folder that holds market1501/, or any folder further in, down to the one with the three image folders.
    Junk (-1) is in no list. Distractors (0000) are in the gallery only. Labels follow the order of the pids.
    Warns if the counts are not those of a complete copy, unless check_counts is False.
    Raises FileNotFoundError if a folder is missing or without images, ValueError if a file name cannot be parsed.
    """
    folder = find_folder(root, PLACES, [*FOLDERS.values()], report)
    lists = {}
    for part, name in FOLDERS.items():
        records = read_folder(folder / name, NAME, EXAMPLE, report)
        least = 0 if part == "gallery" else 1
        lists[part] = [r for r in records if r.pid >= least]
        for r in records if part != "gallery" else ():
            if r.pid < least:
                report("left out", f"{r.path} is junk or a distractor.")
        if records and not lists[part]:
            report("empty folder", f"{folder / name} holds junk or distractor images only: copy it again.")
    split = Split(**{**lists, "train": add_labels(lists["train"])})
    if check_counts:
        compare_counts("Market-1501", folder, split, COUNTS, CAMERAS, report)
    return split


def market500k(root: str | Path, check_counts: bool = True, report: Report = stop) -> Split:
    """Market-1501 with 500,000 distractors more in the gallery: its folder `images`, beside the three others.

    All of them have pid 0, whatever their names; their camera is 0 where the name does not begin as Market-1501's.
    Otherwise as market1501.
    """
    split = market1501(root, check_counts=False, report=report)
    folder = find_folder(root, PLACES, [*FOLDERS.values()], lambda *_: None)
    if not (folder / MORE).is_dir():
        report("missing folder", f"{folder} has no {MORE}, the folder of the 500,000 distractors: copy it there.")
    more = []
    for name in list_images(folder / MORE, report):
        match = NAME.match(name)
        more.append(Record(folder / MORE / name, pid=0, camid=int(match[2]) if match else 0))
    split = split._replace(gallery=split.gallery + more)  # bounding_box_test comes before images
    if check_counts:
        compare_counts("Market-1501 + 500k", folder, split, MORE_COUNTS, range(7), report)
    return split
