"""Embeddings of a test set on disk, so that the output of any system can be scored: save, load, and cameras from paths.

Up to eight arrays, in one NAME.npz or as a folder of .npy files with the same names:

    query          (Q, D) float     gallery          (G, D) float     embeddings, a row per image
    query_pids     (Q,) integer     gallery_pids     (G,) integer     identity; -1 junk, dropped from the ranking
    query_camids   (Q,) integer     gallery_camids   (G,) integer     camera; optional where cameras are ignored
    query_paths    (Q,) text        gallery_paths    (G,) text        optional; tells a query's own image in the gallery

The files of a folder are memory-mapped: a gallery larger than the memory is read as it is used. Nothing is unpickled.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.errors import UserError

Array = np.ndarray | torch.Tensor  # from a file; as embedded


class Features(NamedTuple):
    query: Array  # (Q, D)
    query_pids: Array  # (Q,)
    query_camids: Array | None  # (Q,)
    gallery: Array  # (G, D)
    gallery_pids: Array  # (G,)
    gallery_camids: Array | None  # (G,)
    query_paths: Sequence[str] | np.ndarray | None = None  # (Q,)
    gallery_paths: Sequence[str] | np.ndarray | None = None  # (G,)


PATHS = ("query_paths", "gallery_paths")
NEEDED = ("query", "query_pids", "gallery", "gallery_pids")


def save_features(path: str | Path, features: Features) -> Path:
    """Write features to path: one file if it ends in .npz, otherwise a folder of .npy files. Returns the path.

    Fields may be arrays, tensors or lists (of Path, too). Written under another name first, then renamed.
    Raises UserError if the path exists or the arrays do not fit together.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists: delete it or choose another name for the features.")
    arrays = {}
    for name, value in features._asdict().items():
        if value is None:
            continue
        if name in PATHS:
            arrays[name] = np.array([os.fspath(item) for item in value], dtype=np.str_)
        else:
            if hasattr(value, "detach"):  # a tensor; numpy has no bfloat16
                value = value.detach().cpu()
                value = value.float() if value.dtype == torch.bfloat16 else value
            arrays[name] = np.asarray(value)
    _check(arrays, path)

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished{path.suffix}")  # np.savez wants the ending
    try:
        if path.suffix == ".npz":
            np.savez(unfinished, **arrays)
        else:
            if unfinished.exists():
                shutil.rmtree(unfinished)
            unfinished.mkdir()
            for name, array in arrays.items():
                np.save(unfinished / f"{name}.npy", array)
        unfinished.rename(path)
    except BaseException as error:  # nothing half is left behind, on a full disk above all
        shutil.rmtree(unfinished, ignore_errors=True)
        if unfinished.is_file():
            unfinished.unlink()
        if isinstance(error, OSError):
            raise OSError(f"{path} could not be written ({error.strerror or error}).") from error
        raise
    return path


def load_features(path: str | Path) -> Features:
    """Features from a .npz file or a folder of .npy files; those of a folder are memory-mapped, read-only.

    Raises FileNotFoundError if there is nothing at the path, UserError if an array is missing, cannot be read or
    does not fit the others.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No features at {path}: a .npz file or a folder of .npy files was expected there.")
    arrays = {}
    if path.is_dir():
        for name in Features._fields:
            file = path / f"{name}.npy"
            if file.exists():
                arrays[name] = _read(file, mmap_mode="r")
    else:
        archive = _read(path)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{path} holds a single array: features are a .npz file or a folder of .npy files.")
        with archive:
            for name in Features._fields:
                if name in archive.files:
                    arrays[name] = _read(path, archive, name)
    _check(arrays, path)
    return Features(**{name: arrays.get(name) for name in Features._fields})


def path_cameras(query_paths, gallery_paths) -> tuple[np.ndarray, np.ndarray]:
    """A camera of its own for every distinct path: (Q,) and (G,) int64.

    With these camids a query's own image is dropped from its ranking, and nothing else.
    Raises UserError without paths.
    """
    if query_paths is None or gallery_paths is None:
        raise UserError(
            "Ignoring cameras needs the paths of the images, by which a query's own image is known in the gallery: add "
            "query_paths and gallery_paths (any text, the same for the same picture)."
        )
    names = np.array([os.fspath(path) for path in (*query_paths, *gallery_paths)], dtype=np.str_)
    cameras = np.unique(names, return_inverse=True)[1].astype(np.int64)
    return cameras[: len(query_paths)], cameras[len(query_paths) :]


def _read(path: Path, archive=None, name: str = "", mmap_mode: str | None = None):
    """An array (or an open archive) without unpickling; one sentence if it cannot be read."""
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False) if archive is None else archive[name]
    except Exception as error:  # a damaged file makes numpy and zipfile raise anything
        what = f"{name} in {path}" if name else f"{path}"
        raise UserError(
            f"Cannot read {what}: it is damaged, or no plain array of numbers or text (pickled objects are refused)."
        ) from error


def _check(arrays: dict[str, np.ndarray], path: Path) -> None:
    """The arrays are there and fit together, or a UserError says which does not."""
    missing = [name for name in NEEDED if name not in arrays]
    if missing:
        more = ", ".join(name for name in Features._fields if name not in NEEDED)
        raise UserError(f"{path} lacks {', '.join(missing)}: features are {', '.join(NEEDED)}, and optionally {more}.")
    for name, array in arrays.items():
        kinds, what = ("f", "numbers (float)") if name in ("query", "gallery") else ("iu", "integers")
        kinds, what = ("U", "text") if name in PATHS else (kinds, what)
        shape = (len(arrays[name.split("_")[0]]),) if array.ndim and arrays[name.split("_")[0]].ndim else ()
        known = array.dtype.kind in kinds and (kinds == "U" or array.dtype.itemsize <= 8)  # torch knows 64 bits at most
        if not known or array.ndim != (2 if kinds == "f" else 1) or array.shape[:1] != shape:
            table = "(rows, D)" if kinds == "f" else f"({shape[0] if shape else 'rows'},)"
            raise UserError(
                f"{name} in {path} must hold {what} of shape {table}, not {array.dtype} of shape {array.shape}."
            )
    if arrays["query"].shape[1] != arrays["gallery"].shape[1]:
        raise UserError(
            f"The embeddings in {path} differ in width: query {arrays['query'].shape}, gallery "
            f"{arrays['gallery'].shape}."
        )
