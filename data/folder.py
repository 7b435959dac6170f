"""Anybody's own images, in one of four shapes, which is recognised by looking:

1. ROOT/PERSON/*.jpg                          a folder per person, nothing else: the people are split by a seed
2. ROOT/{train,query,gallery}/PERSON/*.jpg    the split is given, a folder per person
3. ROOT/{train,query,gallery}/*.jpg           the same; names begin with PERSON_cCAMERA, such as anna_c2_07.jpg
4. FILE.csv                                   columns path,pid[,camid][,split], paths relative to the file

In 2 and 3 the folders may also have Market-1501's names. People's names are any text and are numbered in sorted order;
a person called -1 is junk and left out. Images may lie in folders further in. Cameras are known if every image's name
holds _cN (or the CSV file says so), of a given split every test image's; otherwise every camid is -1, and scoring has
to ignore cameras.
"""

import csv
import os
import random
import re
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

from data.records import (
    CLUTTER,
    SUFFIXES,
    Record,
    Report,
    Split,
    add_labels,
    camera,
    choose_queries,
    has_cameras,
    stop,
)

FOLDERS = (  # of shapes 2 and 3
    {"train": "train", "query": "query", "gallery": "gallery"},
    {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"},
)
SIMILAR = {"train", "val", "valid", "test", "query", "gallery", "bounding_box_train", "bounding_box_test"}
NAME = re.compile(r"(.+?)_c([0-9]{1,9})(?![0-9])")  # person, camera
CAMERA = re.compile(r"_c([0-9]{1,9})(?![0-9])")
LEAST = 2  # people on either side of a split that is made here


class Found(NamedTuple):
    """One image before people are numbered."""

    path: str
    person: str
    camid: int = -1
    part: str = ""  # train, query, gallery; empty if the split is to be made


def folder(
    root: str | Path,
    report: Report = stop,
    *,
    split_seed: Annotated[int, "seed that draws the test people of a folder without a split"] = 0,
    test_share: Annotated[float, "share of its people who are for testing"] = 0.5,
) -> Split:
    """Find the images below root (or root/folder, if there is one) and, if no split is given, split the people.

    For testing are round(test_share * people) of those who can be searched for: who have images by two cameras, or
    without cameras two images. Of each one image (per camera) is a query, the others are the gallery.
    Raises FileNotFoundError if root or an image of the CSV file does not exist, ValueError for whatever else is wrong.
    """
    root = Path(root)
    root = root / "folder" if (root / "folder").is_dir() else root
    if not 0 < test_share < 1:
        raise ValueError(f"The share of test people must be between 0 and 1, not {test_share}.")
    if root.is_file():
        shape, found = "CSV file", read_csv(root, root.parent, report)
    elif not root.is_dir():
        report("missing folder", f"There is no folder or CSV file {root}: --data-dir names it.")
        return Split([], [], [])
    else:
        shape, found = read_folders(root, report)
    if not found:
        return Split([], [], [])
    report("title", title_of(root))
    return build(found, shape, str(root), split_seed, test_share, report)


def title_of(data_dir: str | Path) -> str:
    """What tells one folder of pictures from another: "folder photos"; "folder" alone if it is called that itself."""
    place = Path(data_dir).resolve()
    if (place / "folder").is_dir():
        return "folder"
    name = place.stem if place.suffix == ".csv" else place.name
    return name if name == "folder" else f"folder {name}"


def read_folders(root: Path, report: Report) -> tuple[str, list[Found]]:
    """Which of the shapes 1 to 3 it is, in words, and the images."""
    with os.scandir(root) as entries:
        names = {entry.name for entry in entries if entry.is_dir()}
    parts = next((parts for parts in FOLDERS if parts.keys() <= names), None)
    if not parts and (len(names & SIMILAR) > 1 or names and names <= SIMILAR):
        text = f"{root} holds {' and '.join(sorted(names & SIMILAR))}, but a split is the three folders train, "
        report("layout", f"{text}query (what is searched for) and gallery (what is searched).")
        return "", []
    found, others = [], Counter()
    for name, part in parts.items() if parts else [(".", "")]:
        place = str(root / name)
        images = scan(place, others, report)
        start = len(os.path.join(place, ""))  # a drive of Windows ends in its separator as it is
        pieces = [path[start:].split(os.sep) for path in images]  # person's folder, ..., file
        if sets := sorted({piece[0] for piece in pieces if "bounding_box_train" in piece[1:-1]}):
            report("layout", f"{os.path.join(place, sets[0])} is a data set and no person: see --data-dir, or move it.")
            continue
        nested = any(len(piece) > 1 for piece in pieces)
        for path, piece in zip(images, pieces, strict=True):
            match = NAME.match(piece[0])
            if len(piece) > 1:
                cam = CAMERA.search(piece[-1])
                found.append(Found(path, piece[0], int(cam[1]) if cam else -1, part))
            elif nested:
                report("layout", f"{path} lies beside folders of people: move it into the folder of its person.")
            elif not part:
                text = f"{path} lies in no person's folder: make a folder per person in {root}"
                report("layout", f"{text} and move the images there.")
            elif match:
                found.append(Found(path, match[1], int(match[2]), part))
            else:
                text = f"Cannot parse the file name {path!r}: expected PERSON_cCAMERA, such as anna_c2_07.jpg."
                report("file name", text)
        if not images:
            also = f"; {describe(others)} there can't be read, convert them" if others else ""
            report("empty folder", f"{place} holds no images ({', '.join(SUFFIXES)}){also}.")
    if others:
        report("note", f"left out: {describe(others)}")
    if parts and names - parts.keys():
        report("note", f"left out: the folders {', '.join(sorted(names - parts.keys()))}")
    return "train, query and gallery" if parts else "a folder per person", found


def describe(others: Counter) -> str:
    """Of {".heic": 12, "": 1}: "12 files of type .heic, 1 file of no type"."""
    kinds = others.most_common()
    return ", ".join(f"{number_of(n, 'file')} of {'type ' + suffix if suffix else 'no type'}" for suffix, n in kinds)


def number_of(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def scan(place: str, others: Counter, report: Report, links: tuple[str, ...] = ()) -> list[str]:
    """The paths of all images below a folder, sorted as paths are; the suffixes of other files are counted.

    Links to folders are followed. links: where those lead that were followed on the way to this folder.
    """
    images = []
    with os.scandir(place) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or entry.name.lower() in CLUTTER:
                continue
            if entry.is_dir():
                further = (*links, os.path.realpath(entry.path)) if entry.is_symlink() else links
                if len(set(further)) < len(further):
                    report("link", f"{entry.path} is a link to a folder that it lies in: remove it.")
                else:
                    images += scan(entry.path, others, report, further)
            elif suffix in SUFFIXES:
                images.append(entry.path)
            else:
                others[suffix] += 1
                report("ignored", f"{entry.path} is not an image.")
    return images


def read_table(file: Path) -> tuple[list[str], list[tuple[int, dict]]]:
    """Columns, and number and values of each line, of a CSV file (UTF-8) with commas or semicolons, else ValueError."""
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as text:  # Excel's begin with a mark
            first = text.readline()
            dialect = {"delimiter": ";" if first.count(";") > first.count(",") else ",", "skipinitialspace": True}
            columns = [name.strip() for name in next(csv.reader([first], **dialect), [])]
            rows = csv.DictReader(text, columns, **dialect)
            return columns, [(rows.line_num + 1, row) for row in rows]
    except csv.Error as error:  # a value that is too long, say
        raise ValueError(f"{file} can't be read as a CSV file ({error}): is a quotation mark not closed?") from None


def read_csv(file: Path, base: Path, report: Report = stop) -> list[Found]:
    """The images of a CSV file with the columns path,pid[,camid][,split].

    base: the folder that the paths are relative to. Without camid, cameras are looked for in the names of the images.
    """
    (columns, rows), found, seen = read_table(file), [], {}
    if missing := [name for name in ("path", "pid") if name not in columns]:
        wrong = f"{file} has no column {' and no column '.join(missing)}"
        report("table", f"{wrong}: its first line must be path,pid[,camid][,split], not {','.join(columns)[:80]!r}.")
        return []
    for line, row in rows:
        where = f"{file}, line {line}:"
        path, pid, camid, part = (row.get(name) or "" for name in ("path", "pid", "camid", "split"))
        pid = pid.strip()
        if not path or not pid or None in row:
            report("table", f"{where} as many values as in the first line are needed, path and pid among them.")
            continue
        if "camid" not in columns:
            match = CAMERA.search(os.path.basename(path))
            camid = match[1] if match else ""
        if not re.fullmatch("[0-9]{0,9}", camid.strip()):
            report("table", f"{where} the camera must be a whole number of 0 or more, or empty, not {camid!r}.")
            continue
        if "split" in columns and part.strip() not in Split._fields:
            report("table", f"{where} the split must be train, query or gallery, not {part!r}.")
            continue
        path = os.path.normpath(base / path)
        if path in seen:
            report("two rows", f"{where} {path} was in line {seen[path]} already: an image belongs to one split.")
            continue
        if not os.path.exists(path):
            advice = "put it there, or remove this line"
            if base != file.parent:  # the split that a run keeps
                advice = "put it there, or pass --data-dir if the pictures have moved"
            report("missing file", f"{where} there is no {path}: paths are relative to {base}; {advice}.")
            continue
        seen[path] = line
        found.append(Found(path, pid, int(camid) if camid.strip() else -1, part.strip()))
    for part in Split._fields if "split" in columns else [""]:
        if not any(one.part == part for one in found):
            report("empty folder", f"{file} lists no images{part and ' with the split ' + part}.")
    return found


def build(found: list[Found], shape: str, where: str, split_seed: int, test_share: float, report: Report) -> Split:
    """Number the people and make the lists; report what there is in words."""
    for one in found:
        if one.person == "-1":
            report("left out", f"{one.path} is junk.")
    found = [one for one in found if one.person != "-1"]
    names = sorted({one.person for one in found})
    check_names(names, report)
    without = any(one.camid < 0 and one.part != "train" for one in found)  # training does not ask for cameras
    pids = {name: pid for pid, name in enumerate(names, 1)}
    records = [Record(Path(one.path), pids[one.person], -1 if without else one.camid) for one in found]
    cameras = len({record.camid for record in records} - {-1})
    known = number_of(cameras, "camera")
    if without:
        lacking = number_of(sum(one.camid < 0 for one in found), "image")
        known = f"cameras unknown (none is given for {lacking}) and so ignored"
    report("note", f"{shape}: {number_of(len(names), 'person', 'people')}, {number_of(len(found), 'image')}, {known}")

    if found and not found[0].part:
        split = split_people(names, records, where, split_seed, test_share, report)
    else:
        lists = {part: [r for r, one in zip(records, found, strict=True) if one.part == part] for part in Split._fields}
        split = Split(**lists)
    split = Split(*(sorted(part, key=lambda r: r.path.parts) for part in split))
    split = split._replace(train=add_labels(split.train))
    train, test = {r.pid for r in split.train}, {r.pid for r in [*split.query, *split.gallery]}
    if len(train) < LEAST and test:
        who = "one person" if train else "nobody"
        report("people", f"{where} has {who} for training: a loss needs two people or more.")
    if both := train & test:
        report("note", f"both in training and in the test: {number_of(len(both), 'person', 'people')}")
    return split


def check_names(names: list[str], report: Report) -> None:
    """People's names that one cannot tell apart."""
    alike = {}
    for name in names:
        composed = unicodedata.normalize("NFC", name)
        other = alike.setdefault(composed.casefold(), name)
        if other != name and unicodedata.normalize("NFC", other) == composed:
            report("names", f"Two people are called {name!r}, in two Unicode forms of one text: rename one of them.")
        elif other != name:
            report("similar names", f"{other!r} and {name!r} count as two people: their names differ in case only.")


def split_people(names: list[str], records: list[Record], where: str, seed: int, share: float, report: Report) -> Split:
    """Draw the people for testing, and of each of them the queries. All are in training if that cannot be done."""
    people = {name: [] for name in names}
    for record in records:
        people[names[record.pid - 1]].append(record)
    wanted = min(max(round(share * len(names)), LEAST), len(names) - LEAST)
    several = [name for name, images in people.items() if len(images) > 1]
    candidates = [name for name, images in people.items() if len({camera(r) for r in images}) > 1]
    lacking = "seen by one camera only" if has_cameras(records) else "with one image only"
    if len(candidates) < LEAST <= len(several):
        seen = number_of(len(candidates), "person", "people")
        report("note", f"seen by two cameras: {seen}, too few for a test, so cameras are ignored")
        people = {name: [r._replace(camid=-1) for r in images] for name, images in people.items()}
        candidates, lacking = several, "with one image only"
    if len(names) < 2 * LEAST:
        who = f"one person only ({names[0]})" if len(names) == 1 else f"only {len(names)} people"
        text = f"{where} shows {who}, and two for training and two for testing are the least"
        report("people", f"{text}: add people, or pass the folder whose folders are people.")
    elif len(candidates) < LEAST:
        who = f"only {candidates[0]} has" if candidates else "nobody has"
        report("people", f"In {where} {who} two images or more, and with one nobody can be searched for: add images.")
    else:
        drawn = set(random.Random(f"folder {seed}").sample(candidates, min(wanted, len(candidates))))
        query, gallery = choose_queries({name: people[name] for name in sorted(drawn)}, f"folder {seed}")
        train = [r for name in names if name not in drawn for r in people[name]]
        queries = number_of(len(query), "query", "queries")
        queries += f", each {100 / len(query):.0f} points of rank-1" if len(query) < 50 else ""
        made = f"split by seed {seed}: {len(names) - len(drawn):,} people for training ({len(train):,} images), "
        report("note", f"{made}{len(drawn):,} for testing ({queries}, {number_of(len(gallery), 'gallery image')})")
        if rest := len(names) - len(candidates):
            who = number_of(rest, "person", "people")
            report("note", f"in training, since there is nothing to search for: {who} {lacking}")
        return Split(train, query, gallery)
    return Split(records, [], [])


def write_split_csv(split: Split, file: Path, data_dir: str | Path) -> None:
    """Keep a split as a CSV file of shape 4, with paths relative to data_dir; pid holds the numbers.

    Copied into data_dir it is a data set by itself; from where it lies, `read_split_csv` reads it.
    """
    base, whole = folder_of(data_dir), file.with_name(f".{file.name}")
    with whole.open("w", newline="", encoding="utf-8", errors="surrogateescape") as text:
        rows = csv.writer(text, quoting=csv.QUOTE_ALL)
        rows.writerow(("path", "pid", "camid", "split"))
        for part, records in split._asdict().items():
            for r in records:
                camid, path = r.camid if r.camid >= 0 else "", r.path
                with suppress(ValueError):  # on another drive of Windows: as it is
                    path = os.path.relpath(path, base)
                rows.writerow((path, f"{r.pid:09d}", camid, part))
    os.replace(whole, file)  # never half a split


def read_split_csv(file: Path, data_dir: str | Path, report: Report = stop) -> Split:
    """The split that `write_split_csv` kept: the same records, if the images still lie as they did below data_dir."""
    found = read_csv(file, folder_of(data_dir), report)
    report("title", title_of(data_dir))
    return build(found, f"the split kept in {file}", str(file), 0, 0.5, report) if found else Split([], [], [])


def folder_of(data_dir: str | Path) -> Path:
    return Path(data_dir).parent if Path(data_dir).is_file() else Path(data_dir)
