"""What each trick costs: the time of a training step with it, beside the step without any.

    python benchmarks/tricks.py            # ResNet-50 256x128, batch 64; bfloat16; the GPU if there is one
    python benchmarks/tricks.py --quick    # ResNet-18 128x64, float32, few repeats: the generated pedestrians' setting

A step: batch out of the store, augmentation, forward, softmax over 751 people, backward, Adam, as train.py does it. The
settings take turns in one run; a ratio is the median over the turns of a setting's time by that of "no trick" in the
same turn. The last row is about scoring: images embedded with and without --flip-test. The images are noise, which
changes no time. Warm-up has no row: it is one product of numbers in Python per step.

Prints a table and writes results/benchmarks/tricks_MACHINE.json, with the commit.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine_name, milliseconds, write_result  # noqa: E402
from data.images import TrainingImages  # noqa: E402
from evaluate import embed  # noqa: E402
from losses import build_loss  # noqa: E402
from models import build_model, model_options  # noqa: E402
from train import backward_step  # noqa: E402
from utils.environment import find_device  # noqa: E402
from utils.errors import script  # noqa: E402
from utils.flags import new_run  # noqa: E402

PLAIN, ALL = "no trick", "all of them"
SETTINGS = {
    PLAIN: {},
    "random erasing": {"random_erasing": 0.5},
    "pad and crop": {"pad_crop": 10},
    "last stride 1": {"last_stride": 1},
    "neck": {"neck": "bn"},
    "GeM": {"pool": "gem"},
    "label smoothing": {"loss_args": ["label_smoothing=0.1"]},
    ALL: {"recipe": "tricks"},
}
PEOPLE = 751


def write_noise(folder: Path, count: int, height: int, width: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:03}.bmp" for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return paths


def training_loop(args: dict, paths: list[Path], steps: int, device: torch.device) -> Callable[[], None]:
    """A function that trains `steps` steps, each on all images."""
    model = build_model(args["arch"], "none", **model_options(args)).to(device, memory_format=torch.channels_last)
    loss_fn = build_loss("softmax", PEOPLE, model.embedding_dim, args["loss_args"]).to(device)
    optimizer = torch.optim.Adam([*model.parameters(), *loss_fn.parameters()], lr=3.5e-4, weight_decay=5e-4, fused=True)
    how = {key: args[key] for key in ("pad_crop", "random_erasing", "workers")}
    images_of = TrainingImages(paths, args["height"], args["width"], device, **how)
    order = torch.arange(len(paths)).repeat(steps, 1)
    labels = torch.arange(len(paths), device=device) // 4 % PEOPLE

    def loop() -> None:
        for images in images_of.batches(order, seed=0, epoch=0):
            optimizer.zero_grad(set_to_none=True)
            backward_step(model.train(), loss_fn, images, labels, amp=args["amp"])
            optimizer.step()

    return loop


def scoring_loop(args: dict, paths: list[Path], flip_test: bool, device: torch.device) -> Callable[[], None]:
    """A function that embeds all images once, decoding included, as scoring does."""
    model = build_model(args["arch"], "none", **model_options(args)).to(device, memory_format=torch.channels_last)
    settings = {key: args[key] for key in ("height", "width", "amp", "workers")}
    return lambda: embed(model, paths, device=device, flip_test=flip_test, **settings)


def by_turns(loops: dict[str, Callable], repeats: int, per: int, device: torch.device) -> list[dict]:
    """Milliseconds of a `per`-th of each loop (median, least, most) and its ratio to the first one, after a warm-up."""
    times = {name: [] for name in loops}
    for repeat in range(-1, repeats):
        for name, loop in loops.items():
            elapsed = milliseconds(loop, device) / per
            if repeat >= 0:
                times[name].append(elapsed)
    first = next(iter(times.values()))
    return [
        {"name": name, "milliseconds": statistics.median(own), "min": min(own), "max": max(own),
         "ratio": statistics.median(a / b for a, b in zip(own, first, strict=True))}
        for name, own in times.items()
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="resnet18 at 128x64, float32, 3 turns, where no other flag says otherwise")
    add("--arch", help="a ResNet of torchvision (default: resnet50)")
    add("--height", type=int, help="pixels; images are half as wide (default: 256)")
    add("--batch-size", type=int, default=64, help="images a step (default: 64)")
    add("--steps", type=int, help="steps of a turn (default: 20 on a GPU, 2 on a CPU)")
    add("--repeats", type=int, help="turns (default: 7)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one")  # fmt: skip
    add("--machine", help="name of this machine in the file (default: that of the processor or GPU)")
    add("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    flags = parser.parse_args(argv)
    device = find_device(flags.device)
    height = flags.height or (128 if flags.quick else 256)
    common = {"loss": "softmax", "dataset": "market", "arch": flags.arch or ("resnet18" if flags.quick else "resnet50"),
              "height": height, "width": height // 2, "amp": not flags.quick}  # fmt: skip
    steps, repeats = flags.steps or (20 if device.type == "cuda" else 2), flags.repeats or (3 if flags.quick else 7)
    torch.backends.cudnn.benchmark = True  # as in train.py
    with tempfile.TemporaryDirectory() as folder:
        paths = write_noise(Path(folder), flags.batch_size, height, height // 2)
        runs = {name: new_run({**common, **own}) for name, own in SETTINGS.items()}
        rows = by_turns({name: training_loop(args, paths, steps, device) for name, args in runs.items()},
                        repeats, steps, device)  # fmt: skip
        flips = {"scoring": False, "flip": True}
        scores = by_turns({name: scoring_loop(runs[PLAIN], paths, flip, device) for name, flip in flips.items()},
                          repeats, 1, device)  # fmt: skip
    lines = [[f"a step, {row['name']}", *(row[key] for key in ("milliseconds", "min", "max", "ratio"))] for row in rows]
    lines += [[f"embedding {flags.batch_size} images{', --flip-test' if row['name'] == 'flip' else ''}",
               *(row[key] for key in ("milliseconds", "min", "max", "ratio"))] for row in scores]  # fmt: skip
    print(tabulate(lines, ["", "ms", "min", "max", "ratio"], floatfmt=("", ".1f", ".1f", ".1f", ".3f")))
    result = {**{key: common[key] for key in ("arch", "height", "width", "amp")}, "batch_size": flags.batch_size,
              "device": device.type, "threads": torch.get_num_threads(), "steps": steps, "repeats": repeats,
              "rows": rows, "scoring": scores}  # fmt: skip
    write_result("tricks", result, flags.machine or machine_name(device), flags.out)


if __name__ == "__main__":
    script("tricks.py", main)
