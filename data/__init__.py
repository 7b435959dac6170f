"""Data sets by name. A new one = one file with a reader, one line in DATASETS, one test."""

from difflib import SequenceMatcher
from pathlib import Path

from data.dukemtmc import dukemtmc
from data.market1501 import market1501
from data.records import Record, Split

__all__ = ["DATASETS", "Record", "Split", "load_dataset"]


def generated(data_dir: str | Path, synthetic_ids: int = 150, synthetic_seed: int = 0) -> Split:
    """Generated pedestrians: written under data_dir on first use, in the layout of Market-1501."""
    from data.synthetic import generate  # the renderer is loaded by those who use it

    return market1501(generate(data_dir, num_ids=synthetic_ids, seed=synthetic_seed), check_counts=False)


DATASETS = {
    "market": market1501,
    "duke": dukemtmc,
    "synthetic": generated,
}


def load_dataset(name: str, data_dir: str | Path, synthetic_ids: int = 150, synthetic_seed: int = 0) -> Split:
    """The three lists of a data set.

    data_dir: the folder that holds the data sets' folders, or the data set's own folder.
    synthetic_ids: people in training, and as many in test; `synthetic` only.
    synthetic_seed: another one gives other people and other cameras; `synthetic` only.
    Raises ValueError for an unknown name, and what the readers raise.
    """
    if name not in DATASETS:
        known = sorted(DATASETS, key=lambda key: -SequenceMatcher(None, name, key).ratio())
        raise ValueError(f"Unknown data set {name!r}: choose one of {', '.join(known)}.")
    return generated(data_dir, synthetic_ids, synthetic_seed) if name == "synthetic" else DATASETS[name](data_dir)
