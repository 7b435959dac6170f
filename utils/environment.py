"""What a number depends on besides the flags: commit, versions, device, images."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from utils.distributed import world_size
from utils.errors import UserError


def find_device(name: str) -> torch.device:
    """The device of this name; UserError in one sentence if nothing can be computed there."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device, dtype=torch.float64).add(1).item()  # the ranking needs 64 bits
    except Exception as error:  # each kind of device that is not there has its own
        known = f"cpu{', cuda' if torch.cuda.is_available() else ' (there is no usable GPU)'}"
        raise UserError(f"--device {name} can't be used here ({type(error).__name__}): choose {known}") from None
    return device


def check_bfloat16(device: torch.device) -> None:
    """UserError in one sentence on a CUDA card without bfloat16 units, where --amp would be slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                name = torch.cuda.get_device_name(device)
                raise UserError(f"--amp needs bfloat16 units, which {name} lacks: leave it out")


def digest_of_names(paths: Iterable[Path]) -> str:
    """Number and digest of the file names, in their order: another list of images has another one."""
    paths = list(paths)
    names = [os.fsencode(path.name) for path in paths]
    if len(set(names)) < len(names):  # 1.jpg in each person's folder
        names = [os.fsencode(f"{path.parent.name}/{path.name}") for path in paths]
    return f"{len(names)} {hashlib.sha256(b'/'.join(names)).hexdigest()[:16]}"


def current_commit() -> str | None:
    """Of this checkout, ending in -changed if tracked scripts differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
        difference = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", "*.sh"], capture_output=True)
    except OSError:  # no git
        return None
    return f"{commit}-changed" if commit and difference.returncode else commit


def environment(device: torch.device, images: str, tf32: bool | None) -> dict[str, str | int | None]:
    """For args.json; images: the digest of their names; tf32: the flag."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": current_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "tf32": {None: "convolutions", True: "on", False: "off"}[tf32] if device.type == "cuda" else "off",
        "images": images,
    }


def change_of(before: dict, here: dict) -> str:
    """Two environments, compared: `began with torch 2.6.0 and goes on with torch 2.9.0`; empty if they are alike."""
    keys = [key for key in before if before[key] != here.get(key)]
    began, now = (", ".join(f"{key} {place.get(key)}" for key in keys) for place in (before, here))
    return f"began with {began} and goes on with {now}" if keys else ""
