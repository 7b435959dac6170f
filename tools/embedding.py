"""What the tools share: images found, embedded by a run's network, and kept beside the run; flags.

Kept are the embeddings of galleries, test sets and what tools.embed reads, in RUN/embeddings: CHECKPOINT.f32, a row of
D float32 for each line of CHECKPOINT.jsonl, which says for which file (path, size, time of change). CHECKPOINT: a
digest of last.pt, and whether images are mirrored.
Rows are only ever added, so whatever stops a tool, what it has embedded stays; the folder may be deleted at any time.
"""

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from data import check_true_matches
from data.folder import describe, read_table, scan
from data.images import BadImage, find_bad_images
from data.records import Split, stop
from evaluate import cameras, embed, features_of, load_run
from utils.checkpoint import locked
from utils.environment import find_device
from utils.errors import UserError, user_input
from utils.features import Features
from utils.flags import DEFAULTS, number
from utils.seed import set_backends
from utils.verification import Pairs, count_pairs

CHUNK = 2048  # pictures embedded between two additions to what is kept


class Run(NamedTuple):
    """A trained run, ready to embed."""

    folder: Path
    model: nn.Module
    args: dict  # the run's flags
    settings: dict  # of evaluate.embed
    digest: str = ""  # of the network as it was read, and of what else an embedding depends on

    @property
    def name(self) -> str:
        return self.folder.resolve().name


class Kept(NamedTuple):
    """Embeddings on the disk: of path[i] it is rows[place[i]]."""

    rows: np.ndarray  # (M, D) float32, memory-mapped
    place: np.ndarray  # (N,)
    paths: list[Path]  # N

    def __getitem__(self, here) -> np.ndarray:
        return self.rows[self.place[here]]


def add_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """--run (with `several` one or two), --device, --workers."""
    parser.add_argument("--run", type=Path, nargs="+" if several else None, required=True,
                        help=f"a run folder made by train.py{', or two' if several else ''}")  # fmt: skip
    parser.add_argument("--device", default=DEFAULTS["device"], help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--workers", type=number(int, zero=True), default=DEFAULTS["workers"],
                        help="threads that decode images (default: the cores, at most 4)")  # fmt: skip


def open_run(folder: Path, device: str, workers: int) -> Run:
    """UserError, or FileNotFoundError, in one sentence if it is no run folder with a checkpoint."""
    place, file = find_device(device), folder / "last.pt"
    digest = hashlib.sha256(file.read_bytes() if file.is_file() else b"")  # before it is read: a run may still train
    model, args = load_run(folder, place)
    digest.update(b"flip_test" * args["flip_test"])
    set_backends(args["deterministic"], args["tf32"])
    settings = {key: args[key] for key in ("height", "width", "amp", "flip_test")}
    settings |= {"device": place, "workers": workers}
    return Run(folder, model, args, settings, digest.hexdigest()[:16])


def find_images(place: Path) -> list[Path]:
    """All images below a folder; those that a CSV file (UTF-8) lists under `path`, relative to it; or the one file."""
    if place.is_dir():
        others = Counter()
        with user_input():
            paths = [Path(path) for path in scan(str(place), others, stop)]
        if others:
            print(f"left out: {describe(others)}")
    elif place.suffix.lower() == ".csv" and place.is_file():
        with user_input():
            columns, rows = read_table(place)
        if "path" not in columns:
            raise UserError(f"{place} has no column path: its first line must name one so")
        paths = [Path(os.path.normpath(place.parent / row["path"])) for _, row in rows if row["path"]]
    else:
        paths = [place]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} does not exist{f', but stands in {place}' if path != place else ''}")
    if not paths:
        raise UserError(f"{place} holds no images")
    return paths


def embed_paths(run: Run, paths: Sequence[Path], description: str = "embedding") -> np.ndarray:
    """Embeddings (N, D) float32 of N image files, in their order, in memory. BadImage if one can't be decoded."""
    return embed(run.model, paths, description=description, **run.settings).cpu().numpy()


def embed_kept(run: Run, paths: Sequence[Path], skip_bad: bool = False) -> Kept:
    """Embeddings of any number of image files in bounded memory; only files that are new or have changed are embedded.

    skip_bad: files that can't be decoded are named and left out; otherwise BadImage, in one sentence, for the first.
    """
    digest = run.digest
    folder, width = run.folder / "embeddings", run.model.embedding_dim
    lines, table = folder / f"{digest}.jsonl", folder / f"{digest}.f32"
    keys = [key_of(path) for path in paths]
    with locked(folder):
        for old in folder.glob("*.*"):
            if old.stem != digest and old.suffix in (".jsonl", ".f32"):  # of the network before it was trained further
                old.unlink()
        with open(lines, "ab+") as names, open(table, "ab+") as rows:
            known = read_keys(names, rows, width)
            new = {key: path for key, path in zip(keys, paths, strict=True) if key not in known}
            order, bad = list(new), {}
            for first in range(0, len(new), CHUNK):
                chunk, what = order[first : first + CHUNK], f"embedding {len(new):,} new images"
                try:
                    found = embed_paths(run, [new[key] for key in chunk], what)
                except BadImage:
                    if not skip_bad:
                        raise
                    here = find_bad_images([new[key] for key in chunk], run.settings["workers"])
                    bad |= {chunk[i]: sentence for i, sentence in here.items()}
                    chunk = [key for key in chunk if key not in bad]
                    paths_left = [new[key] for key in chunk]
                    found = embed_paths(run, paths_left, what) if chunk else np.empty((0, width), np.float32)
                rows.write(found.tobytes())
                rows.flush()  # before the lines that speak of them
                for key in chunk:
                    known[key] = len(known)
                    names.write((json.dumps(key) + "\n").encode())
                names.flush()
    for sentence in bad.values():
        print(f"left out: {sentence}")
    pairs = [(path, key) for path, key in zip(paths, keys, strict=True) if key not in bad]
    if not pairs:
        raise UserError("none of the images can be decoded")
    print(f"{len(pairs) - len(new) + len(bad):,} of {len(pairs):,} embeddings were kept in {folder}")
    memory = np.memmap(table, np.float32, mode="r").reshape(-1, width)
    return Kept(memory, np.array([known[key] for _, key in pairs]), [path for path, _ in pairs])


def key_of(path: Path) -> tuple[str, int, int]:
    """What tells a file from another, or from itself after a change: absolute path, size, time of change."""
    status = path.stat()
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def read_keys(names, rows, width: int) -> dict[tuple, int]:
    """Key -> row of two open files; what a stopped tool left half is cut off."""
    names.seek(0)
    whole = names.read().split(b"\n")[:-1]
    whole = whole[: os.fstat(rows.fileno()).st_size // (4 * width)]
    names.truncate(sum(len(line) + 1 for line in whole))
    rows.truncate(4 * width * len(whole))
    return {tuple(json.loads(line)): row for row, line in enumerate(whole)}


def to_device(rows: np.ndarray, run: Run) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).to(run.settings["device"])


def split_features(run: Run, split: Split) -> Features:
    """As evaluate.embed_split, but with the embeddings that are kept beside the run; asks for a true match first."""
    with user_input():
        check_true_matches(split, run.args["ignore_cameras"])
    kept, Q = embed_kept(run, [record.path for record in [*split.query, *split.gallery]]), len(split.query)
    return features_of(split, to_device(kept[:Q], run), to_device(kept[Q:], run))


def pairs_of(run: Run, features: Features) -> Pairs:
    """The similarities of all pairs of a test set, in two histograms."""
    query_camids, gallery_camids = cameras(features, run.args["ignore_cameras"])
    query = features.query, features.query_pids, query_camids
    with user_input():
        return count_pairs(*query, features.gallery, features.gallery_pids, gallery_camids, run.args["metric"])
