"""MSMT17: 4,101 people seen by 15 cameras. V1 and V2 are different images: in V2 the faces are masked.

Wei et al., "Person Transfer GAN to Bridge Domain Gap for Person Re-identification", CVPR 2018. Four lists with lines
such as `0000/0000_000_01_0303morning_0008_0.jpg 0`: path below the image folder and identity. The camera (1 to 15) is
the third field of the file name.

Trained on list_train and list_val, the paper's 32,621 images; some toolboxes leave list_val's 2,373 out. The lists
number the people of training and test both from 0, though they are different people: here those of the test set
are numbered from 1,041, after those of training.
"""

import re
from pathlib import Path

from data.records import Record, Report, Split, add_labels, compare_counts, find_folder, stop

VERSIONS = {"MSMT17_V1": ("train", "test"), "MSMT17_V2": ("mask_train_v2", "mask_test_v2")}  # and their image folders
LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
LINE = re.compile(r"((?:.*/)?[^/_]+_[^/_]+_([0-9]{1,9})_[^/]*) ([0-9]{1,9})")  # path, camera, identity
EXAMPLE = "0000/0000_000_01_0303morning_0008_0.jpg 0"
CAMERAS = range(1, 16)
COUNTS = {"train": (1041, 32621), "query": (3060, 11659), "gallery": (3060, 82161)}  # identities, images


def msmt17(root: str | Path, check_counts: bool = True, report: Report = stop) -> Split:
    """Read the lists of MSMT17_V1 or MSMT17_V2, whichever is there.

    root: the folder that holds msmt17/, or a folder further in, down to the one with the lists.
    Warns if the counts are not those of a complete copy, unless check_counts is False.
    Raises FileNotFoundError if a folder or list is missing, ValueError for a line that cannot be parsed, and if both
    versions are there.
    """
    places = [f"{place}{version}" for version in VERSIONS for place in ("msmt17/", "MSMT17/", "")]
    found = [Path(root) / place for place in places if (Path(root) / place).is_dir()]
    versions = sorted({folder.name for folder in found})
    if len(versions) > 1:
        report("two versions", f"{found[0]} and {found[-1]} are different images: pass one of them as --data-dir.")
    folder = find_folder(root, [*places, "."], LISTS, report)
    version = next((v for v, names in VERSIONS.items() if all((folder / name).is_dir() for name in names)), None)
    if not version:
        wanted = " nor ".join(" and ".join(names) for names in VERSIONS.values())
        report("missing folder", f"{folder} holds neither the folders {wanted}: copy the images there.")
        version = "MSMT17_V1"
    train_images, test_images = (folder / name for name in VERSIONS[version])
    train = [r for name in LISTS[:2] for r in read_list(folder / name, train_images, report)]
    query, gallery = (
        [r._replace(pid=r.pid + COUNTS["train"][0]) for r in read_list(folder / name, test_images, report)]
        for name in LISTS[2:]
    )
    split = Split(*(sorted(records, key=lambda r: r.path) for records in (add_labels(train), query, gallery)))
    if check_counts:
        compare_counts(version.replace("_", " "), folder, split, COUNTS, CAMERAS, report)
        report("note", "trained on list_train and list_val")
    return split


def read_list(file: Path, images: Path, report: Report) -> list[Record]:
    """A record for each line of a list, in the list's order."""
    if not file.exists():
        return []  # find_folder has told it
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        if match := LINE.fullmatch(line.strip()):
            records.append(Record(images / match[1], pid=int(match[3]), camid=int(match[2])))
        elif line.strip():
            report("file name", f"Cannot parse line {number} of {file}: {line!r}, expected such as {EXAMPLE!r}.")
    if not records:
        report("empty folder", f"{file} lists no images: copy it again.")
    return records
