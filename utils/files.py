"""Files that are whole or absent, and JSON."""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Calls `write(file)` on a temporary file beside `path`, flushes it to the disk and renames it.

    Whatever happens, `path` is the old file or the new one, whole; a failed write leaves no half file behind (only a
    killed one does, under the temporary name, until the folder is `locked` again). OSError says what was not written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # a full disk's own message names no file
            reason = error.strerror or error
            raise OSError(f"{path} could not be written ({reason}); what was there before is kept") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Writes text (UTF-8) atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def save_json(path: Path, content: dict) -> None:
    """Writes readable JSON atomically; NaN and infinity are errors, since JSON has neither."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_text(path, text)


def load_json(path: Path, keys: Iterable[str] = ()) -> dict:
    """UserError in one sentence if it is no JSON object or lacks one of the keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    missing = sorted(key for key in keys if key not in content)
    if missing:
        raise UserError(f"{path} was not written by this version of train.py: it lacks {', '.join(missing)}")
    return content
