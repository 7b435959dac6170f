"""Data sets by name. A new one = one file with a reader, one line in DATASETS, one test."""

import argparse
import functools
import inspect
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

from data.cuhk03 import cuhk03
from data.dukemtmc import dukemtmc
from data.folder import folder, read_split_csv
from data.market1501 import market500k, market1501
from data.msmt17 import msmt17
from data.records import Record, Report, Split, camera, has_cameras, stop

__all__ = ["DATASETS", "Record", "Split", "load_dataset", "load_datasets"]


def generated(
    root: str | Path,
    report: Report = stop,
    *,
    synthetic_ids: Annotated[int, "people in training, and as many in test"] = 150,
    synthetic_seed: Annotated[int, "seed of the people and cameras"] = 0,
) -> Split:
    """Generated pedestrians: written under root on first use, in the layout of Market-1501."""
    from data.synthetic import generate  # the renderer is loaded by those who use it

    if synthetic_ids > 10**5:
        raise ValueError(f"At most 100,000 people can be generated for training, not {synthetic_ids:,}.")
    place = generate(root, num_ids=synthetic_ids, seed=synthetic_seed)
    return market1501(place, check_counts=False, report=report)


DATASETS = {
    "market": market1501,
    "duke": dukemtmc,
    "cuhk03": cuhk03,
    "msmt17": msmt17,
    "market500k": market500k,
    "synthetic": generated,
    "folder": folder,
}


class Option(NamedTuple):
    """What a reader takes beyond the folder: a keyword-only argument, and so a flag of the scripts."""

    type: type
    choices: tuple[str, ...] | None
    default: object
    datasets: list[str]  # those that have it
    help: str


class Data(NamedTuple):
    """One or several data sets, for training and scoring."""

    train: list[Record]  # of all, with joint labels
    tests: dict[str, Split]  # data set -> its own three lists
    titles: dict[str, str]  # data set -> what it was exactly: "MSMT17 V2", "Market-1501 (incomplete)"
    notes: list[str]  # what else to know about them, a line each


def find_reader(name: str):
    """The reader of this name; ValueError lists the known ones, the most similar first."""
    if name not in DATASETS:
        known = sorted(DATASETS, key=lambda key: (not name.startswith(key), -SequenceMatcher(None, name, key).ratio()))
        raise ValueError(f"Unknown data set {name!r}: choose one of {', '.join(known)}.")
    return DATASETS[name]


@functools.cache
def reader_options() -> dict[str, Option]:
    """The options of all readers by name, read from their signatures."""
    options = {}
    for name, reader in DATASETS.items():
        hints = get_type_hints(reader, include_extras=True)
        for key, parameter in inspect.signature(reader).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                hint = hints.get(key)
                kind, text = get_args(hint) if get_origin(hint) is Annotated else (hint, "")
                choices = get_args(kind) if get_origin(kind) is Literal else None
                option = Option(type(parameter.default), choices, parameter.default, [], text)
                if option.type not in (int, float, str) or options.setdefault(key, option)[:3] != option[:3]:
                    raise TypeError(f"{name}: {key} needs a number or a text as default, the same in every reader")
                options[key].datasets.append(name)
    return options


def add_reader_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each option; one that is not given is absent from the result."""
    for key, option in reader_options().items():
        parser.add_argument(
            f"--{key.replace('_', '-')}",
            type=option.type,
            choices=option.choices,
            metavar=None if option.choices else "N",
            default=argparse.SUPPRESS,
            help=f"{', '.join(option.datasets)}: {option.help} (default: {option.default})",
        )


def check_options(names: str, given: Iterable[str]) -> None:
    """ValueError if one of the given flags is an option of other data sets only; any other flags may be among them."""
    options = reader_options()
    for key in given:
        if key in options and not set(names.split("+")) & set(options[key].datasets):
            owners = " or ".join(options[key].datasets)
            raise ValueError(f"--{key.replace('_', '-')} belongs to --dataset {owners}, not to {names}")


def load_dataset(name: str, data_dir: str | Path, **options) -> Split:
    """The three lists of a data set.

    data_dir: the folder that holds the data sets' folders, or the data set's own folder.
    options: those of its reader (`reader_options`).
    Raises ValueError for an unknown name, and what the readers raise.
    """
    reader = find_reader(name)
    check_options(name, options)
    return reader(data_dir, **options)


def load_datasets(names: str, data_dir: str | Path, options: dict, kept: Path | None = None) -> Data:
    """Several data sets, such as "market+duke": trained on together, scored each by itself.

    options: whatever flags there are; each reader takes its own. kept: a CSV file with the split that `folder` was
    given before, if it exists (data.folder.write_split_csv). Of several data sets, the people of training are
    renumbered from 1 and the cameras from 0, so that neither are mixed up; a single one stays as it is.
    Raises what `load_dataset` raises, and ValueError for a name that stands twice, and for own pictures that are not
    in data_dir/folder, where they have to be beside others.
    """
    tests, titles, notes = {}, {}, []
    if {"folder"} < {*names.split("+")} and not Path(data_dir, "folder").is_dir():
        place = Path(data_dir, "folder")
        raise ValueError(f"Beside other data sets own pictures lie in {place} (a link will do), and it is no folder.")
    for name in names.split("+"):
        reader = find_reader(name)
        if name in tests:
            raise ValueError(f"The data set {name} stands twice in {names!r}.")
        titles[name] = name

        def listen(kind: str, text: str, name: str = name) -> None:
            if kind == "title":
                titles[name] = text
            elif kind == "note":
                notes.append(f"{name}: {text}")
            else:
                stop(kind, text)

        if name == "folder" and kept and kept.is_file():
            tests[name] = read_split_csv(kept, data_dir, report=listen)
        else:
            own = {key: options[key] for key, option in reader_options().items() if name in option.datasets}
            tests[name] = reader(data_dir, report=listen, **own)
    return Data(join([split.train for split in tests.values()]), tests, titles, notes)


def join(trains: list[list[Record]]) -> list[Record]:
    """One list of training records with joint labels; people and cameras of different data sets are different ones."""
    if len(trains) == 1:
        return trains[0]
    joined, cameras, first_label = [], {}, 0
    for index, records in enumerate(trains):
        for r in records:
            label = first_label + r.label
            camid = cameras.setdefault((index, r.camid), len(cameras)) if r.camid >= 0 else -1
            joined.append(Record(r.path, label + 1, camid, label))
        first_label += 1 + max(r.label for r in records)
    return joined


def check_true_matches(split: Split, ignore_cameras: bool = False) -> None:
    """ValueError that names the cause and the way out if no query has a true match; to be asked before training."""
    query, gallery = split.query, split.gallery
    ignored = ignore_cameras or not has_cameras([*query, *gallery])
    seen = {}  # pid -> what its gallery images differ in
    for r in gallery:
        seen.setdefault(r.pid, set()).add(camera(r, ignored))
    if any(seen.get(r.pid, set()) - {camera(r, ignored)} for r in query):
        return
    if not {r.pid for r in query} & seen.keys():
        raise ValueError(
            f"No query has a true match: none of the {len({r.pid for r in query}):,} people of the queries is in the "
            f"gallery, which shows {len(seen):,} others. A person must have the same name in both."
        )
    if ignored:
        raise ValueError(
            "No query has a true match: of the people of the queries, the gallery holds the query images themselves "
            "and nothing else. Add further images of them to the gallery."
        )
    raise ValueError(
        "No query has a true match: each person of the queries was seen by one camera only, and by the protocol images "
        "of the query's own camera do not count. With --ignore-cameras, train.py and evaluate.py count all but the "
        "query image itself."
    )
