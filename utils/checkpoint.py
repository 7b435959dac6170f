"""A run folder: its checkpoint and log, what must fit before a run goes on, and its lock."""

import json
import os
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.errors import UserError
from utils.files import write_atomically, write_text
from utils.flags import DEFAULTS


def save_log(path: Path, log: list[dict]) -> None:
    """Writes a line of JSON per epoch, atomically: no kill leaves half a line."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in log)
    write_text(path, text)


def load_log(path: Path, num_epochs: int) -> list[dict]:
    """The lines of epochs 1 to num_epochs; a later one, of an epoch without a checkpoint, is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if num_epochs else []
        log = [json.loads(line) for line in lines[:num_epochs]]
        if [line["epoch"] for line in log] != list(range(1, num_epochs + 1)):
            raise ValueError
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not hold the epochs 1 to {num_epochs} of last.pt: start another run") from None
    return log


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """torch.save, atomically. Content: tensors, str and numbers only, so that `load_checkpoint` can read it safely."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides a full disk behind an error of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint on the CPU without running any code of it; UserError in one sentence if it is not one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a pickle with code, a cut file, no zip file: all refused before anything runs
        kind = type(error).__name__
        raise UserError(f"{path} was refused: it is not a whole checkpoint of plain tensors ({kind})") from None
    missing = [key for key in ("model", "loss", "epoch", "args") if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path} is not a checkpoint of train.py: {', '.join(missing)} missing")
    if type(content["epoch"]) is not int or content["epoch"] < 0:
        raise UserError(f"{path} is not a checkpoint of train.py: its epoch is no whole number")
    return content


def check_same_run(path: Path, checkpoint: dict[str, Any], args: dict, keys: Iterable[str]) -> None:
    """UserError with what differs unless the checkpoint's own `args` (JSON) have the values of `args` at `keys`.

    Two losses may have weights of the same names and shapes: `check_fit` alone would take one for the other.
    """
    try:
        found = json.loads(checkpoint["args"])
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a checkpoint of train.py: its args are not the flags of a run")
    found = {**DEFAULTS, **found}  # a flag that is newer than the run
    differences = [
        f"its {key} is {found.get(key, 'missing')}, not {args[key]}"
        for key in sorted(keys)
        if key not in found or found[key] != args[key]
    ]
    if checkpoint["epoch"] > args["epochs"]:
        differences.append(f"its epoch is {checkpoint['epoch']} of {args['epochs']}")
    if differences:
        raise UserError(f"{path} belongs to another run than args.json: {_first(differences)}")


def check_fit(path: Path, part: str, found: Any, wanted: dict[str, torch.Tensor]) -> None:
    """UserError with what differs unless `found` has the names, shapes and types of `wanted`; changes nothing."""
    if not isinstance(found, dict):
        raise UserError(f"{path} does not fit: its {part} is not a state dict")
    differences = []
    for name in sorted(found.keys() | wanted.keys(), key=str):
        if name not in found or name not in wanted:
            differences.append(f"{name} is {'missing' if name not in found else 'unknown here'}")
        elif _kind(found[name]) != _kind(wanted[name]):
            differences.append(f"{name} is {_kind(found[name])} instead of {_kind(wanted[name])}")
    if differences:
        raise UserError(
            f"{path} is of another arch, loss or number of identities: in its {part}, {_first(differences)}"
        )


def check_fit_optimizer(path: Path, found: Any, optimizer: torch.optim.Adam) -> None:
    """UserError with what differs unless `found` is a state of this optimizer; changes nothing."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        trained = [i for i, p in enumerate(parameters) if p.requires_grad]  # Adam keeps nothing of a frozen one
        wanted = {f"{i}.step": torch.zeros(()) for i in trained}
        wanted |= {f"{i}.{name}": parameters[i] for i in trained for name in ("exp_avg", "exp_avg_sq")}
        state = {f"{i}.{name}": value for i, entry in found["state"].items() for name, value in entry.items()}
        pairs = list(zip(found["param_groups"], groups, strict=True))
        same = all(a[key] == b[key] for a, b in pairs for key in a.keys() & b.keys() - {"lr"})
        same = same and all(a["params"] == b["params"] for a, b in pairs)
    except ValueError:
        same = False
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} does not fit: its optimizer is not a state of Adam") from None
    if not same:
        raise UserError(f"{path} does not fit: its optimizer has other settings or groups of parameters")
    check_fit(path, "optimizer", state, wanted)


def _kind(value: Any) -> str:
    """What has to be alike: a whole tensor's type and shape."""
    if not isinstance(value, torch.Tensor):
        return f"no tensor but {type(value).__name__}"
    special = "sparse " if value.layout != torch.strided else "empty " if value.is_meta else ""
    return f"{special}{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _first(differences: list[str]) -> str:
    more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more


def resume_run(
    run_dir: Path,
    args: dict,
    keys: Iterable[str],
    model: torch.nn.Module,
    loss_fn: torch.nn.Module,
    optimizer: torch.optim.Adam,
) -> tuple[int, list[dict]]:
    """Loads last.pt, all of it or, with a UserError that says what differs, nothing. Without one nothing happens.

    keys: the flags that the checkpoint must share with args. Returns the number of finished epochs and their log.
    """
    path = run_dir / "last.pt"
    if not path.exists():
        return 0, []
    checkpoint = load_checkpoint(path)
    check_same_run(path, checkpoint, args, keys)
    check_fit(path, "model", checkpoint["model"], model.state_dict())
    check_fit(path, "loss", checkpoint["loss"], loss_fn.state_dict())
    log = load_log(run_dir / "log.jsonl", checkpoint["epoch"])
    if checkpoint["epoch"] < args["epochs"]:  # after the last epoch the optimizer is not kept
        check_fit_optimizer(path, checkpoint.get("optimizer"), optimizer)
        optimizer.load_state_dict(checkpoint["optimizer"])
    model.load_state_dict(checkpoint["model"])
    loss_fn.load_state_dict(checkpoint["loss"])
    print(f"{run_dir}: going on after epoch {checkpoint['epoch']} of {args['epochs']}")
    return checkpoint["epoch"], log


def check_writable(folder: Path) -> None:
    """UserError at once, rather than after all images were decoded, if the run folder can't be made or written."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{folder} can't be a run folder, since {place} is a file: name another --run-dir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{folder} can't be written, since {place} does not allow it: name another --run-dir")


@contextmanager
def locked(folder: Path, new: bool = False):
    """Makes the run folder and holds it for this process; a second one is told so. The lock ends with the process.

    new: nobody has begun a run there. Temporary files that a killed process left behind are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process: wait, or choose another --run-dir") from None
        except (ImportError, OSError):  # Windows, or a file system without locks: nothing to hold on to
            pass
        if new and (folder / "args.json").exists():
            raise UserError(f"{folder} was begun by another process meanwhile: go on with it by --resume")
        for name in ("args.json", "log.jsonl", "last.pt", "result.json"):
            for leftover in folder.glob(f".{name}.*.tmp"):
                leftover.unlink()
        yield
