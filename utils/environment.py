"""What a number depends on besides the flags: commit, versions, device, images."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch


def find_device(name: str) -> torch.device:
    """The device of this name; ValueError in one sentence if nothing can be computed there."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device, dtype=torch.float64).add(1).item()  # the ranking needs 64 bits
    except Exception as error:  # each kind of device that is not there has its own
        known = f"cpu{', cuda' if torch.cuda.is_available() else ' (there is no usable GPU)'}"
        raise ValueError(f"--device {name} can't be used here ({type(error).__name__}): choose {known}") from None
    return device


def digest_of_names(paths: Iterable[Path]) -> str:
    """Number and digest of the file names, in their order: another list of images has another one."""
    names = [os.fsencode(path.name) for path in paths]
    return f"{len(names)} {hashlib.sha256(b'/'.join(names)).hexdigest()[:16]}"


def environment(device: torch.device, images: str) -> dict[str, str | int | None]:
    """For args.json; images: the digest of their names.

    `commit` ends in -changed if tracked files differ from it, and is None outside a checkout.
    """
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
        changed = commit and subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode != 0
    except OSError:  # no git
        commit, changed = None, False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": f"{commit}-changed" if changed else commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "images": images,
    }
