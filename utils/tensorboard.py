"""TensorBoard, for those who have it installed: the numbers of log.jsonl as curves."""

from collections.abc import Callable
from pathlib import Path

from utils.errors import UserError


def open_board(folder: Path) -> Callable[[dict], None]:
    """A function that writes a line of the log, {"epoch": 3, "loss": 0.5, ...}, as points of curves in the folder.

    What an earlier process wrote of that epoch (of its training, if this line is its scores) and of later ones is
    hidden. UserError, one sentence, without the package.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package of that name: pip install tensorboard") from None
    writers = []  # made by the first line, so that nothing is written before the run has begun

    def write(line: dict) -> None:
        if not writers:
            writers.append(SummaryWriter(str(folder), purge_step=line["epoch"] + ("loss" not in line)))
        for key, value in line.items():
            if key != "epoch" and isinstance(value, int | float):
                writers[0].add_scalar(key, value, line["epoch"])
        writers[0].flush()

    return write
