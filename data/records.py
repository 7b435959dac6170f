"""The two types every dataset reader returns."""

from pathlib import Path
from typing import NamedTuple


class Record(NamedTuple):
    """One image: where it lies, who it shows, which camera took it."""

    path: Path
    pid: int  # identity number in the file name (-1 junk, 0 distractor on Market-1501)
    camid: int  # camera number in the file name
    label: int = -1  # class index 0..C-1, training images only


class Split(NamedTuple):
    """Three lists of records, each sorted by path."""

    train: list[Record]
    query: list[Record]
    gallery: list[Record]
