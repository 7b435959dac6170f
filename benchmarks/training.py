"""Training speed: images/s of train.py beside the bare loop (the limit) and beside the way torchreid trains.

    python benchmarks/training.py             # ResNet-18 128x64 and ResNet-50 256x128: some 15 minutes on two cores
    python benchmarks/training.py --quick     # does everything run? tiny images, one turn, nothing is written

Each network and precision has a process of its own, on generated pedestrians. By turns, so that all see the same
machine, as many batches of

  train.py               a real second epoch, as log.jsonl has it: images from the store, augmentation, loss, log
  bare loop              forward, loss, backward and Adam on one ready batch, as train.py builds them
  bare loop, NCHW        the same without channels_last
  the way torchreid does it   its engine's steps, written here from their description: float32, NCHW, a DataLoader that
                         decodes, resizes, flips and normalises each image anew with Pillow, Adam as it is by default,
                         loss and accuracy fetched with .item() in every step

Ratios are those of neighbouring turns. The stages of a step are timed apart, and so are decoding (once into the store,
by number of threads; and an epoch of that DataLoader) and writing a checkpoint. Peak memory: of a process that has done
nothing else, resident on a CPU, allocated by torch on a GPU.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, which has a losses.py of its own

from benchmarks.machine import in_a_process, machine_name, milliseconds, spread, write_result  # noqa: E402
from benchmarks.steps import (  # noqa: E402
    PRECISIONS,
    THREADS,
    Job,
    bare_loop,
    bare_step,
    checkpoint_cost,
    data_stage,
    decoding_speed,
    peak_memory,
    real_epochs,
    small_set,
    stage_times,
)
from data.images import MEAN, STD, default_workers  # noqa: E402
from data.market1501 import market1501  # noqa: E402
from data.records import Record  # noqa: E402
from data.synthetic import generate  # noqa: E402
from models import build_model  # noqa: E402
from utils.environment import find_device  # noqa: E402
from utils.errors import script  # noqa: E402
from utils.seed import set_backends  # noqa: E402

TRAIN, BARE, NCHW, PEER = "train.py", "bare loop", "bare loop, NCHW", "the way torchreid does it"
SIZES = {"resnet18": (128, 64), "resnet50": (256, 128)}  # height, width: of the generated data set, of the others
STEPS = {"resnet18": 10, "resnet50": 3}  # per epoch on a CPU: some seconds
GOAL = 0.95  # of the bare loop


class DecodedEveryTime(Dataset):
    """Image files as torchreid's datasets give them: decoded, resized, flipped and normalised one by one."""

    def __init__(self, records: Sequence[Record], height: int, width: int, flip: bool = True):
        self.records = records
        steps = [transforms.Resize((height, width)), *[transforms.RandomHorizontalFlip()] * flip]
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(3, H, W) float32, label."""
        record = self.records[index]
        return self.transform(Image.open(record.path).convert("RGB")), record.label


def peer_loader(records: Sequence[Record], job: Job) -> DataLoader:
    """Its workers live on from epoch to epoch, though torchreid starts them anew: that would weigh too much here."""
    return DataLoader(DecodedEveryTime(records, job.height, job.width), job.batch_size, shuffle=True, drop_last=True,
                      num_workers=job.workers, persistent_workers=job.workers > 0, pin_memory=job.device != "cpu")


def build_peer(job: Job, records: Sequence[Record]) -> Callable[[], None]:
    """An epoch as torchreid trains it: float32, NCHW, a linear classifier, Adam without options."""
    device = torch.device(job.device)
    model = build_model(job.arch).to(device).train()
    classifier = nn.Linear(model.embedding_dim, 1 + max(record.label for record in records)).to(device)
    optimizer = torch.optim.Adam([*model.parameters(), *classifier.parameters()], lr=3e-4, weight_decay=5e-4)
    loader = peer_loader(records, job)

    def epoch() -> None:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            logits = classifier(model(images))  # (B, C)
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            (logits.argmax(dim=1) == labels).float().mean().item()

    return epoch


def measure(job: Job, source: Path) -> dict:
    """A row of the table."""
    device, num_images = torch.device(job.device), job.steps * job.batch_size
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        records = small_set(source, images, num_images)
        first, second = real_epochs(job, images)  # before anything else takes memory
        row = {"warm_up_seconds": first["seconds"] - second["seconds"], "peak_memory_mib": peak_memory(device)}
        num_classes = 1 + max(record.label for record in records)
        bare = bare_step(job, num_classes)
        loops = {BARE: partial(bare_loop, bare, job.steps, device), PEER: build_peer(job, records)}
        if not job.compile:
            loops[NCHW] = partial(bare_loop, bare_step(job, num_classes, torch.contiguous_format), job.steps, device)
        seconds = {way: [] for way in (TRAIN, *loops)}
        for turn in range(job.repeats + 1):
            for way in seconds:
                set_backends(False, None if way == PEER else "--tf32" in PRECISIONS[job.precision])
                if way != TRAIN:
                    elapsed = milliseconds(loops[way], device) / 1000
                elif turn:
                    elapsed = num_images / real_epochs(job, images)[1]["images_per_second"]
                seconds[way] += [elapsed] if turn else []  # the first is the loops' warm-up
        data = data_stage([record.path for record in records], job)
        row["stages_ms"] = stage_times({"data": data, **bare.stages}, max(job.steps, 5), device)
        return {**summarise(job, seconds), **row, **checkpoint_cost(bare)}


def summarise(job: Job, seconds: dict[str, list[float]]) -> dict:
    """Speeds, and the ratios of neighbouring turns: medians, smallest and largest."""
    num_images = job.steps * job.batch_size
    share, times = (
        spread([other / own for own, other in zip(seconds[TRAIN], seconds[way], strict=True)]) for way in (BARE, PEER)
    )
    keys = ("arch", "height", "width", "batch_size", "steps", "repeats", "precision", "compile", "device")
    return {
        **{key: getattr(job, key) for key in keys},
        "images_per_second": {way: spread([num_images / value for value in own]) for way, own in seconds.items()},
        "share_of_bare_loop": share["median"], "share_of_bare_loop_spread": [share["min"], share["max"]],
        "times_torchreid": times["median"], "times_torchreid_spread": [times["min"], times["max"]],
    }  # fmt: skip


def measure_peer_memory(job: Job, source: Path) -> float:
    """MiB of torchreid's way, its workers not counted."""
    with tempfile.TemporaryDirectory() as folder:
        build_peer(job, small_set(source, Path(folder) / "images", 2 * job.batch_size))()
    return peak_memory(torch.device(job.device))


def measure_decoding(job: Job, source: Path) -> dict:
    """All training images: once into the store, by number of threads, and in an epoch of the DataLoader."""
    records = market1501(source, check_counts=False).train
    paths, loader = [record.path for record in records], peer_loader(records, job)
    turns = []
    for _ in range(job.repeats + 1):  # the first to warm up
        speeds = {n: decoding_speed(paths, (job.height, job.width), n, torch.device("cpu")) for n in THREADS}
        start = time.perf_counter()
        speeds["DataLoader"] = sum(len(images) for images, _ in loader) / (time.perf_counter() - start)
        turns.append(speeds)
    medians = {str(key): round(statistics.median(turn[key] for turn in turns[1:]), 1) for key in turns[0]}
    epoch = medians.pop("DataLoader")
    return {"height": job.height, "width": job.width, "images": len(records), "images_per_second_by_threads": medians,
            "loader_workers": job.workers, "epoch_images_per_second": epoch}  # fmt: skip


def tables(rows: Sequence[dict], decoding: Sequence[dict]) -> str:
    speed, parts, text = [], [], ""
    for r in rows:
        name = f"{r['arch']} {r['height']}x{r['width']}, {r['precision']}{', compiled' * r['compile']}"
        share, times = r["share_of_bare_loop"], r["times_torchreid"]
        speed += [[name, way, *list(value.values())[:3]] for way, value in r["images_per_second"].items()]
        parts.append([name, *r["stages_ms"].values(), r["peak_memory_mib"], r["peer_peak_memory_mib"],
                      r["checkpoint_seconds"]])  # fmt: skip
        text += f"\n{name}: {share:.3f} of the bare loop (goal {GOAL}: {'met' if share >= GOAL else 'MISSED'}), "
        text += f"{times:.2f} x torchreid's way"
    for d in decoding:
        speeds = ", ".join(f"{value:,.0f} with {n}" for n, value in d["images_per_second_by_threads"].items())
        text += f"\n{d['height']}x{d['width']} decoded once, images/s by threads: {speeds}; an epoch of a DataLoader "
        text += f"with {d['loader_workers']} processes: {d['epoch_images_per_second']:,.0f}"
    heads = [*(f"{stage} ms" for stage in rows[0]["stages_ms"]), "MiB", "MiB, torchreid's way", "checkpoint s"]
    first = tabulate(speed, ["", "images/s", "median", "min", "max"], floatfmt=".1f")
    return f"{first}\n\n{tabulate(parts, ['', *heads], floatfmt='.2f')}\n{text}"


def parse_flags(argv: list[str] | None) -> tuple[argparse.Namespace, list[Job]]:
    """The flags, and a job for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--archs", nargs="+", choices=SIZES, default=list(SIZES), help="networks, with their sizes (default: both)")
    add("--precisions", nargs="+", choices=PRECISIONS, default=["float32", "bfloat16"], help="bfloat16 is train.py's "
        "--amp, float32 whole float32, TF32 a GPU's rounding of it (default: float32 bfloat16)")  # fmt: skip
    add("--compile", action="store_true", help="rows with torch.compile, too")
    add("--steps", type=int, help="batches per epoch and loop (default: resnet18 10, resnet50 3; on a GPU 100)")
    add("--repeats", type=int, default=3, help="turns (default: 3)")
    add("--p", type=int, help="identities per batch, 4 images each (default: 16; resnet50 on a CPU 8, to save time)")
    add("--quick", action="store_true", help="one network, tiny images, two steps, one turn: no numbers to keep")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one")  # fmt: skip
    add("--workers", type=int, default=default_workers(), help="threads that decode, and processes of the DataLoader")
    add("--data-dir", type=Path, help="folder for the generated pedestrians, kept (default: a temporary one)")
    add("--machine", help="name of this machine in the file's name (default: that of the processor or GPU)")
    args, jobs = parser.parse_args(argv), []
    find_device(args.device)
    for arch in args.archs[: 1 if args.quick else None]:
        size, on_cpu = SIZES[arch], args.device == "cpu"
        p = args.p or (8 if on_cpu and arch == "resnet50" else 16)
        steps = args.steps or (STEPS[arch] if on_cpu else 100)
        size, p, steps, repeats = ((64, 32), 2, 2, 1) if args.quick else (size, p, steps, args.repeats)
        for precision in args.precisions:
            for compiled in [False, True] if args.compile else [False]:
                jobs.append(Job(arch, *size, precision, compiled, args.device, p, steps, repeats, args.workers))
    return args, jobs


def main(argv: list[str] | None = None) -> None:
    args, jobs = parse_flags(argv)
    cpuinfo = Path("/proc/cpuinfo")
    facts = {
        "command": f"python benchmarks/training.py {' '.join(sys.argv[1:] if argv is None else argv)}".strip(),
        "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        # a CPU's matrix unit for bfloat16
        "amx_bf16": cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text(encoding="utf-8"),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        most = max(job.steps * job.batch_size for job in jobs)
        images = generate(args.data_dir or Path(temporary), num_ids=max(6 if args.quick else 64, most // 15))
        of_arch, rows = {job.arch: job for job in jobs}, []
        decoding = [in_a_process(measure_decoding, job, images) for job in of_arch.values()]
        memory = {arch: in_a_process(measure_peer_memory, job, images) for arch, job in of_arch.items()}
        for job in jobs:
            rows.append({**in_a_process(measure, job, images), "peer_peak_memory_mib": memory[job.arch]})
            print(f"{job}: {rows[-1]['images_per_second'][TRAIN]['median']:.1f} images/s", flush=True)
            result = {**facts, "rows": rows, "decoding": decoding}
            if not args.quick:  # what is there is kept, whatever comes
                path = write_result("training", result, args.machine or machine_name(args.device))
    print(f"\n{tables(rows, decoding)}\n\n{'--quick: nothing was written' if args.quick else f'-> {path.name}'}")


if __name__ == "__main__":
    script("benchmarks/training.py", main)
