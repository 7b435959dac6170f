"""What a number depends on besides the flags: commit, versions, device."""

import platform
import subprocess
from pathlib import Path

import torch


def environment(device: torch.device) -> dict[str, str | int | None]:
    """For args.json. `commit` ends in -changed if tracked files differ from it, and is None outside a checkout."""
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
    }
