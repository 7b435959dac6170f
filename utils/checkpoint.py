"""Files that are whole or absent: checkpoints, JSON, and the lock of a run folder."""

import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Calls `write(file)` on a temporary file beside `path`, flushes it to the disk and renames it.

    Whatever happens, `path` is the old file or the new one, whole; a failed write leaves no half file behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_json(path: Path, content: dict) -> None:
    """Writes readable JSON atomically; NaN and infinity are errors, since JSON has neither."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def load_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """torch.save, atomically. Content: tensors, str and numbers only, so that `load_checkpoint` can read it safely."""
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path, keys: tuple[str, ...] = ("model", "loss", "epoch", "args")) -> dict[str, Any]:
    """Reads a checkpoint on the CPU without running any code of it; ValueError in one sentence if it is not one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a pickle with code, a cut file, no zip file: all refused before anything runs
        kind = type(error).__name__
        raise ValueError(f"{path} was refused: it is not a whole checkpoint of plain tensors ({kind})") from None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of train.py: {', '.join(missing)} missing")
    return content


def check_fit(path: Path, part: str, found: Any, wanted: dict[str, torch.Tensor]) -> None:
    """ValueError with what differs unless `found` has exactly the names and shapes of `wanted`; changes nothing."""
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not fit: its {part} is not a state dict")
    differences = []
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            differences.append(f"{name} is {'missing' if name not in found else 'unknown here'}")
        elif getattr(found[name], "shape", None) != wanted[name].shape:
            shape = tuple(getattr(found[name], "shape", ()))
            differences.append(f"{name} has shape {shape} instead of {tuple(wanted[name].shape)}")
    if differences:
        raise ValueError(
            f"{path} is of another arch, loss or number of identities: {part}: {'; '.join(differences[:3])} "
            f"({len(differences)} differences)"
        )


@contextmanager
def locked(folder: Path):
    """Holds the run folder for this process; a second one is told so. The lock ends with the process."""
    try:
        import fcntl
    except ImportError:  # no POSIX locks on Windows
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder} is in use by another process: wait, or choose another --run-dir") from None
        yield
