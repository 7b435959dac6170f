"""Training speed: images/s of train.py beside the bare loop (the limit) and beside the way torchreid trains.

    python benchmarks/training.py                     # ResNet-18 128x64 and ResNet-50 256x128: 11 minutes on two cores
    python benchmarks/training.py --quick             # does everything run? two steps each, nothing is written
    python benchmarks/training.py --archs resnet18 --precisions bfloat16 --repeats 5
    python benchmarks/training.py --whole --compile   # a whole training at Market size, for a GPU: under 9 minutes

For each network and precision a process of its own runs train.py on generated pedestrians. After each of its epochs,
the first one excepted, the loops it is compared with take their turn on as many batches, so that all of them see the
same machine. Medians over the repeats, with the smallest and the largest value:

  train.py               a real epoch, as log.jsonl has it: batches from the image store, augmentation, loss, log
  bare loop              forward, loss, backward and Adam on one ready batch; model, precision, memory format,
                         optimizer and loss are train.py's. What is missing to it is what the data cost.
  bare loop, NCHW        the same without channels_last
  the way torchreid does it   its engine's steps, written here from their description: float32, NCHW, a DataLoader that
                         decodes, resizes, flips and normalises each image anew with Pillow, Adam as it is by default,
                         loss and accuracy fetched with .item() in every step. Same network, same batch size.

The stages of a step are timed apart, and so is decoding: once into the image store, and in an epoch of that DataLoader.
Peak memory is that of a process that does nothing else: resident on a CPU, allocated by torch on a GPU.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(place for place in sys.path if place != str(ROOT / "benchmarks"))]  # has a losses.py, too

import train  # noqa: E402
from benchmarks.machine import machine_name, write_result  # noqa: E402
from data.augment import flip  # noqa: E402
from data.images import MEAN, STD, TrainingImages, normalise  # noqa: E402
from data.market1501 import FOLDERS, market1501  # noqa: E402
from data.records import Record  # noqa: E402
from data.synthetic import generate  # noqa: E402
from losses import build_loss  # noqa: E402
from models import build_model  # noqa: E402
from utils.seed import set_backends  # noqa: E402

TRAIN, BARE, NCHW, PEER = "train.py", "bare loop", "bare loop, NCHW", "the way torchreid does it"
SIZES = {"resnet18": (128, 64), "resnet50": (256, 128)}  # height, width: the README's quick flags and the defaults
STEPS = {"resnet18": 10, "resnet50": 3}  # per epoch on a CPU: some seconds
STEPS_ON_GPU = 100
K = 4  # images per identity in a batch
MARKET_IMAGES = 12_936  # an epoch of Market-1501
MARKET_IDS = 751
TARGET_SHARE = 0.95
TARGET_TIMES = {"resnet50": 3.0, "resnet18": 1.9}  # of torchreid's images/s, on a CPU


class Job(NamedTuple):
    """What one process measures."""

    arch: str
    height: int
    width: int
    precision: str  # float32 or bfloat16
    compile: bool
    device: str
    p: int  # identities per batch; a batch has p * K images
    steps: int  # per epoch
    repeats: int
    loss: str
    workers: int  # threads that decode for train.py
    peer_workers: int  # processes of the DataLoader
    images: str  # folder with the generated pedestrians

    @property
    def name(self) -> str:
        return f"{self.arch} {self.height}x{self.width} {self.precision}{' compiled' if self.compile else ''}"

    def flags(self, data_dir: Path, run_dir: Path, epochs: int) -> list[str]:
        """Those of train.py."""
        flags = {
            "loss": self.loss, "dataset": "market", "data-dir": data_dir, "run-dir": run_dir, "epochs": epochs,
            "arch": self.arch, "weights": "none", "height": self.height, "width": self.width, "sampler": "pk",
            "p": self.p, "k": K, "device": self.device, "workers": self.workers,
        }  # fmt: skip
        switches = ["--amp"] * (self.precision == "bfloat16") + ["--compile"] * self.compile
        return [text for key, value in flags.items() for text in (f"--{key}", str(value))] + switches


# ------------------------------------------------------------------------------------------------------------- the data


def pick(records: Sequence[Record], count: int) -> list[Record]:
    """`count` of the records: one of each identity, then a second one of each, and so on."""
    if len(records) < count:
        raise ValueError(f"{count} images are needed and {len(records)} are there: lower --steps or --p")
    seen, turns = {}, []
    for record in records:
        turns.append(seen.setdefault(record.pid, 0))
        seen[record.pid] += 1
    return [records[i] for i in sorted(range(len(records)), key=turns.__getitem__)[:count]]


def copy_dataset(source: Path, folder: Path, num_train: int) -> list[Record]:
    """A small data set in Market's layout: num_train training images, the test images of two identities.

    Returns the training records. So an epoch has the wanted number of steps, and the scoring at the end is short.
    """
    split = market1501(source, check_counts=False)
    test_pids = sorted({record.pid for record in split.query})[:2]
    chosen = {"train": pick(split.train, num_train)}
    chosen |= {part: [r for r in getattr(split, part) if r.pid in test_pids] for part in ("query", "gallery")}
    for part, records in chosen.items():
        (folder / FOLDERS[part]).mkdir(parents=True)
        for record in records:
            shutil.copy(record.path, folder / FOLDERS[part])
    return market1501(folder, check_counts=False).train


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
    return DataLoader(
        DecodedEveryTime(records, job.height, job.width),
        batch_size=job.p * K,
        shuffle=True,
        drop_last=True,
        num_workers=job.peer_workers,
        persistent_workers=job.peer_workers > 0,
        pin_memory=job.device != "cpu",
    )


# ------------------------------------------------------------------------------------------------------------ the loops


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bare(NamedTuple):
    """All that a step needs, ready on the device."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]  # the model or its compiled form
    loss_fn: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,)
    amp: bool


def build_bare(job: Job, num_classes: int, memory_format: torch.memory_format) -> Bare:
    """Model, loss and optimizer as train.py builds them, with random pixels."""
    device = torch.device(job.device)
    model = build_model(job.arch).to(device, memory_format=memory_format).train()
    loss_fn = build_loss(job.loss, num_classes, model.embedding_dim).to(device).train()
    parameters = [*model.parameters(), *loss_fn.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3.5e-4, weight_decay=5e-4, fused=True)
    images = torch.randn(job.p * K, 3, job.height, job.width).to(device, memory_format=memory_format)
    labels = (torch.arange(job.p).repeat_interleave(K) % num_classes).to(device)
    forward = torch.compile(model) if job.compile else model
    return Bare(model, forward, loss_fn, optimizer, images, labels, amp=job.precision == "bfloat16")


def bare_loop(bare: Bare, steps: int) -> float:
    """Seconds of forward, loss, backward and step on the ready batch, nothing else."""
    device = bare.images.device
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=bare.amp):
            embeddings = bare.forward(bare.images)  # (B, D)
        loss = bare.loss_fn(embeddings, bare.labels)
        bare.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        bare.optimizer.step()
    synchronize(device)
    return time.perf_counter() - start


class Peer(NamedTuple):
    model: nn.Module
    classifier: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader


def build_peer(job: Job, records: Sequence[Record]) -> Peer:
    """The same network as torchreid would train it: float32, NCHW, a linear classifier, Adam without options."""
    device = torch.device(job.device)
    model = build_model(job.arch).to(device).train()
    classifier = nn.Linear(model.embedding_dim, 1 + max(record.label for record in records)).to(device)
    optimizer = torch.optim.Adam([*model.parameters(), *classifier.parameters()], lr=3e-4, weight_decay=5e-4)
    return Peer(model, classifier, optimizer, peer_loader(records, job))


def peer_loop(peer: Peer, steps: int) -> float:
    """Seconds of `steps` steps of an epoch."""
    device = peer.classifier.weight.device
    synchronize(device)
    start = time.perf_counter()
    for step, (images, labels) in enumerate(peer.loader):
        if step == steps:
            break
        images, labels = images.to(device), labels.to(device)
        logits = peer.classifier(peer.model(images))  # (B, C)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        peer.optimizer.zero_grad()
        loss.backward()
        peer.optimizer.step()
        loss.item()
        (logits.argmax(dim=1) == labels).float().mean().item()
    synchronize(device)
    return time.perf_counter() - start


# ----------------------------------------------------------------------------------------------------------- the stages


def stages(bare: Bare, store: TrainingImages, steps: int) -> dict[str, float]:
    """Milliseconds of each part of a real step, medians; on a GPU between events, all of them read at the end."""
    device = bare.images.device
    B = len(bare.images)
    order = torch.randint(len(store.paths), (steps, B)).to(store.stores[0].device)
    draws = torch.rand(steps, B, 4).to(device)
    names = ("gather and move", "augment, normalise", "forward", "loss", "backward", "optimizer step")
    marks = []

    def mark() -> None:
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    for step in range(steps):
        mark()
        raw = store.stores[0][order[step]].to(device)
        mark()
        images = normalise(flip(raw, draws[step, :, 0]))
        mark()
        with torch.autocast(device.type, torch.bfloat16, enabled=bare.amp):
            embeddings = bare.forward(images)
        mark()
        loss = bare.loss_fn(embeddings, bare.labels)
        mark()
        bare.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mark()
        bare.optimizer.step()
        mark()
    synchronize(device)
    times = {name: [] for name in names}
    for step in range(steps):
        for i, name in enumerate(names):
            a, b = marks[step * (len(names) + 1) + i :][:2]
            times[name].append(a.elapsed_time(b) if device.type == "cuda" else 1000 * (b - a))
    return {name: statistics.median(values) for name, values in times.items()}


def flops(bare: Bare) -> float:
    """Floating point operations of the forward and the backward pass of one batch (convolutions and products)."""
    with FlopCounterMode(display=False) as counter:
        with torch.autocast(bare.images.device.type, torch.bfloat16, enabled=bare.amp):
            embeddings = bare.model(bare.images)
        bare.loss_fn(embeddings, bare.labels).backward()
    return counter.get_total_flops()


def product_flops_per_second(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 0.5) -> float:
    """What a plain product of two square matrices reaches here: a yardstick for the network's arithmetic."""
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as in the network's convolutions
    torch.mm(a, b)
    synchronize(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            torch.mm(a, b)
        synchronize(device)
        count += 5
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 * count / (time.perf_counter() - start)


# ----------------------------------------------------------------------------------------------------- memory, decoding


def peak_memory(device: torch.device) -> float:
    """MiB: the most this process has had resident, or on a GPU allocated, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 2**10
    except (OSError, StopIteration):  # no Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_peer_memory(job: Job) -> float:
    """MiB of torchreid's way, its workers not counted; in a process of its own."""
    set_backends(False)  # as in the timed loop
    records = pick(market1501(job.images, check_counts=False).train, 2 * job.p * K)
    peer_loop(build_peer(job, records), steps=2)
    return peak_memory(torch.device(job.device))


def measure_decoding(job: Job) -> dict:
    """All generated training images: once into the store, and in one epoch of a DataLoader with running workers."""
    records = market1501(job.images, check_counts=False).train
    paths = [record.path for record in records]
    loader = peer_loader(records, job)
    once, epoch = [], []
    for _ in range(job.repeats + 1):
        start = time.perf_counter()
        TrainingImages(paths, job.height, job.width, torch.device("cpu"), workers=job.workers)
        once.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in loader:
            pass
        epoch.append(time.perf_counter() - start)
    full = len(loader) * job.p * K  # without the last, short batch
    return {
        "height": job.height,
        "width": job.width,
        "images": len(records),
        "threads": job.workers,
        "loader_workers": job.peer_workers,
        "once_images_per_second": len(records) / statistics.median(once[1:]),  # the first of each is a warm-up
        "epoch_images_per_second": full / statistics.median(epoch[1:]),
        "once_over_epoch": statistics.median(
            (a / len(records)) / (b / full) for a, b in zip(once[1:], epoch[1:], strict=True)
        ),
    }


# -------------------------------------------------------------------------------------------------------------- one row


@contextlib.contextmanager
def after_each_epoch(call: Callable[[int, float], None]):
    """While it lasts, train.py calls `call(finished epochs, seconds)` where it has just saved its checkpoint.

    seconds: since the last call returned, without those of saving. Yields the seconds of saving, a list that grows.
    """
    save, saving, left = train.save_checkpoint, [], time.perf_counter()

    def save_and_call(path: Path, content: dict) -> None:
        nonlocal left
        start = time.perf_counter()
        save(path, content)
        saving.append(time.perf_counter() - start)
        call(content["epoch"], start - left)
        left = time.perf_counter()

    train.save_checkpoint = save_and_call
    try:
        yield saving
    finally:
        train.save_checkpoint = save


@contextlib.contextmanager
def quiet(log: Path):
    """What train.py prints goes to a file; if it fails, to the terminal after all."""
    with open(log, "w") as file:
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        except BaseException:
            file.flush()
            print(log.read_text()[-2000:], file=sys.stderr)
            raise


def build_loops(job: Job, records: Sequence[Record]) -> tuple[Bare, dict[str, Callable[[], float]]]:
    """The loops that train.py is compared with, warmed up, each returning the seconds of job.steps steps."""
    num_classes = 1 + max(record.label for record in records)
    warm_up = 1 if job.device == "cpu" else 3
    bare = build_bare(job, num_classes, torch.channels_last)
    bare_loop(bare, warm_up)
    loops = {BARE: lambda: bare_loop(bare, job.steps)}
    if not job.compile:
        plain = build_bare(job, num_classes, torch.contiguous_format)
        bare_loop(plain, warm_up)
        loops[NCHW] = lambda: bare_loop(plain, job.steps)
    peer = build_peer(job, records)
    peer_loop(peer, warm_up)
    loops[PEER] = lambda: peer_loop(peer, job.steps)
    return bare, loops


def measure(job: Job) -> dict:
    """One row; see the top of this file."""
    device = torch.device(job.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # whose events are to be timed
    row, built, rest, seconds = {}, [], [], {TRAIN: []}
    bar = tqdm(total=1 + job.repeats, desc=f"{job.name}, in turns", unit="turn", leave=False, disable=None)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        records = copy_dataset(Path(job.images), folder / "images", job.steps * job.p * K)

        def compare(epoch: int, since: float) -> None:
            if not built:  # after the first epoch, which warms up what the process shares
                row["peak_memory_mib"] = peak_memory(device)  # of a GPU: with what cuDNN needs to try its kernels
                built.extend(build_loops(job, records))
            else:
                rest.append(since)
                for way, loop in built[1].items():
                    seconds.setdefault(way, []).append(loop())
            bar.update()

        with quiet(folder / "log.txt"), after_each_epoch(compare) as saving:
            train.main(job.flags(folder / "images", folder / "run", epochs=1 + job.repeats))
        bar.close()
        log = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
        seconds[TRAIN] = [line["seconds"] for line in log[1:]]
        store = TrainingImages([r.path for r in records], job.height, job.width, device, workers=job.workers)

    bare = built[0]
    row["stages_ms"] = stages(bare, store, job.steps)
    row["gflop_per_batch"] = flops(bare) / 1e9
    dtype = torch.bfloat16 if bare.amp else torch.float32
    size = 2048 if device.type == "cpu" else 8192
    row["matrix_product_gflop_per_second"] = product_flops_per_second(device, dtype, size) / 1e9
    row["store_mib"] = store.num_bytes / 2**20
    row["warm_up_seconds"] = log[0]["seconds"] - statistics.median(seconds[TRAIN])
    row["saving_seconds"] = statistics.median(saving[:-1])  # the last one holds no optimizer
    between = statistics.median(a - b for a, b in zip(rest, seconds[TRAIN], strict=True))
    row["between_epochs_seconds"] = between + row["saving_seconds"]
    return summarise(job, seconds, row)


def summarise(job: Job, seconds: dict[str, list[float]], measured: dict) -> dict:
    """The row as it is written: images/s of every way, and the ratios of turns that lie beside each other."""
    images = job.steps * job.p * K
    speed = {way: [images / value for value in values] for way, values in seconds.items()}

    def spread(values: Sequence[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def ratio(to: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(speed[TRAIN], speed[to], strict=True)])

    share, times = ratio(BARE), ratio(PEER)
    epoch = MARKET_IMAGES / statistics.median(speed[TRAIN])
    return {
        "arch": job.arch, "height": job.height, "width": job.width, "batch_size": job.p * K, "steps": job.steps,
        "repeats": job.repeats, "precision": job.precision, "compile": job.compile, "loss": job.loss,
        "device": job.device, "images_per_second": {way: spread(values) for way, values in speed.items()},
        "share_of_bare_loop": share["median"], "share_of_bare_loop_spread": [share["min"], share["max"]],
        "times_torchreid": times["median"], "times_torchreid_spread": [times["min"], times["max"]],
        "between_epochs_share_at_market_size": measured["between_epochs_seconds"] / epoch, **measured,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- a whole training


class TimeIsUp(Exception):
    pass


def measure_whole(job: Job, epochs: int, time_limit: float, bare_steps: int = 50) -> dict:
    """A whole training and scoring, the bare loop in between for some steps; stopped at the limit, and says so.

    Seconds are those of everything but the bare loop: reading names, decoding, compiling, checkpoints, scoring.
    """
    start, aside = time.perf_counter(), 0.0
    train_images = market1501(job.images, check_counts=False).train
    num_classes = 1 + max(record.label for record in train_images)
    built, bare_speed, times = [], [], []
    bar = tqdm(total=epochs, desc=f"{job.name}, {epochs} epochs", unit="epoch", leave=False, disable=None)

    def look(epoch: int, since: float) -> None:
        nonlocal aside
        entered = time.perf_counter()
        times.append(entered - start - aside)
        bar.update()
        if not built:
            built.append(build_bare(job, num_classes, torch.channels_last))
            bare_loop(built[0], steps=3)
        if epoch % 10 == 1 or epoch == epochs:
            bare_speed.append(bare_steps * job.p * K / bare_loop(built[0], bare_steps))
        aside += time.perf_counter() - entered
        if len(times) > 1 and epoch < epochs and 2 * times[-1] - times[-2] > time_limit:
            raise TimeIsUp

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        with quiet(Path(folder) / "log.txt"), after_each_epoch(look) as saving, contextlib.suppress(TimeIsUp):
            train.main(job.flags(Path(job.images), run_dir, epochs))
        total = time.perf_counter() - start - aside
        bar.close()
        log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
        finished = run_dir / "result.json"
        result = json.loads(finished.read_text()) if finished.is_file() else {}
    speed = [line["images_per_second"] for line in log]
    epoch_images = len(train_images) // (job.p * K) * job.p * K
    return {
        "arch": job.arch, "height": job.height, "width": job.width, "batch_size": job.p * K, "loss": job.loss,
        "precision": job.precision, "compile": job.compile, "training_images": len(train_images),
        "identities": num_classes, "epochs_wanted": epochs, "epochs_done": len(log), "time_limit_seconds": time_limit,
        "seconds": total, "seconds_at_epoch": times, "images_per_second": speed,
        "bare_loop_images_per_second": bare_speed, "saving_seconds": statistics.median(saving),
        "share_of_bare_loop": statistics.median(speed[1:] or speed) / statistics.median(bare_speed),
        "images_per_second_with_all_else": len(log) * epoch_images / total,
        **{key: result.get(key) for key in ("rank1", "mAP")},
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the tables


def tables(rows: Sequence[dict], decoding: Sequence[dict]) -> str:
    def name(row: dict) -> str:
        return f"{row['arch']} {row['height']}x{row['width']}, batch {row['batch_size']}"

    def precision(row: dict) -> str:
        return row["precision"] + (", compiled" if row["compile"] else "")

    speed, parts, limits, memory, verdicts = [], [], [], [], []
    for row in rows:
        peer = row["images_per_second"][PEER]["median"]
        for way, value in row["images_per_second"].items():
            shown = f"{way} (float32, NCHW)" if way == PEER else way
            share = [row["share_of_bare_loop"], *row["share_of_bare_loop_spread"]] if way == TRAIN else [None] * 3
            speed.append([name(row), precision(row), shown, *value.values(), value["median"] / peer, *share])
        stage = row["stages_ms"]
        whole = sum(stage.values())
        for title, values in (("ms", stage.values()), ("%", [100 * value / whole for value in stage.values()])):
            parts.append([name(row), precision(row), title, *values, sum(values)])
        network = stage["forward"] + stage["backward"]
        reached = row["gflop_per_batch"] / network * 1000
        product = row["matrix_product_gflop_per_second"]
        limits.append([name(row), precision(row), row["gflop_per_batch"], reached, product, 100 * reached / product])
        memory.append([name(row), precision(row), row["peak_memory_mib"], row.get("peer_peak_memory_mib"),
                       row["store_mib"], row["saving_seconds"], row["between_epochs_seconds"],
                       100 * row["between_epochs_share_at_market_size"]])  # fmt: skip
        share, target = row["share_of_bare_loop"], TARGET_TIMES.get(row["arch"])
        verdict = f"{name(row)}, {precision(row)}: a real epoch runs at {share:.3f} of the bare loop "
        verdict += f"(target {TARGET_SHARE}, {'met' if share >= TARGET_SHARE else 'MISSED'})"
        if row["device"] == "cpu" and row["precision"] == "bfloat16" and target:
            met = "met" if row["times_torchreid"] >= target else "MISSED"
            verdict += f" and {row['times_torchreid']:.2f} x torchreid's way (target {target}, {met})"
        else:
            verdict += f" and {row['times_torchreid']:.2f} x torchreid's way"
        verdict += f"; forward and backward are {network / whole:.1%} of a step, the images "
        verdict += f"{(stage['gather and move'] + stage['augment, normalise']) / whole:.1%}."
        verdicts.append(verdict)
    decoded = [
        [f"{d['height']}x{d['width']}", d["images"], d["once_images_per_second"], d["threads"],
         d["epoch_images_per_second"], d["loader_workers"], d["once_over_epoch"]]
        for d in decoding
    ]  # fmt: skip
    blocks = [
        ("Images/s", speed, ["network", "precision", "way", "median", "min", "max", "x torchreid's way",
                             "share of bare loop", "min", "max"], (*[".1f"] * 6, ".2f", *[".3f"] * 3)),
        ("Where a step's time goes", parts, ["network", "precision", "", *rows[0]["stages_ms"], "sum"], ".1f"),
        ("The network's arithmetic: convolutions and products of forward and backward, beside a square matrix product",
         limits, ["network", "precision", "GFLOP per batch", "GFLOP/s", "GFLOP/s of a product", "%"], ".0f"),
        ("Peak memory (MiB), and what happens between two epochs", memory,
         ["network", "precision", "train.py", "torchreid's way", "of it the image store", "checkpoint s",
          "between epochs s", "% of an epoch at Market size"], (*[".1f"] * 5, *[".2f"] * 3)),
        ("Decoding, images/s", decoded,
         ["size", "images", "once, into the store", "threads", "an epoch of a DataLoader", "workers",
          "time once / epoch"], (*[".0f"] * 6, ".2f")),
    ]  # fmt: skip
    text = [f"{title}\n\n{tabulate(table, heads, floatfmt=form)}\n" for title, table, heads, form in blocks if table]
    return "\n".join(text) + "\n" + "\n".join(verdicts)


# ------------------------------------------------------------------------------------------------------------ the file


def cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


# ---------------------------------------------------------------------------------------------------------------- flags


def in_a_process(function: Callable, *arguments) -> dict | float:
    """Runs it in a fresh process, so that its memory is its own and nothing is warm from the row before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cores = os.cpu_count() or 1
    # what
    add("--archs", nargs="+", choices=SIZES, help="networks, with their sizes (default: both; --whole: resnet50)")
    add("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"],
        help="bfloat16 is train.py's --amp; it pays where the processor or GPU multiplies it faster (default: both)")
    add("--compile", action=argparse.BooleanOptionalAction, help="a row with torch.compile, too (default: on a GPU)")
    add("--loss", default="softmax", help="train.py's --loss (default: softmax, the cheapest to compare)")
    # how long
    add("--steps", type=int, help="batches per epoch and loop: more = steadier (default: resnet18 10, resnet50 3; "
        f"on a GPU {STEPS_ON_GPU})")
    add("--repeats", type=int, default=3, help="epochs that count, after one that does not (default: 3)")
    add("--p", type=int, help="identities per batch, 4 images each (default: 16; resnet50 on a CPU 8, to save time)")
    add("--quick", action="store_true", help="two steps, one repeat: shows that all runs, its numbers mean nothing")
    # where
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--workers", type=int, default=cores, help="threads that decode for train.py (default: all cores)")
    add("--peer-workers", type=int, default=min(4, cores), help="processes of the DataLoader in torchreid's way "
        "(default: 4, as there, but not more than cores)")
    add("--data-dir", type=Path, help="folder for the generated pedestrians, kept (default: a temporary one)")
    add("--machine", help="name of this machine in the file's name (default: that of the processor or GPU)")
    # the whole training
    add("--whole", action="store_true", help="instead: one whole training, in the last of --precisions, with "
        "images/s over time and beside the bare loop")
    add("--ids", type=int, default=MARKET_IDS, help="--whole: generated training identities (default: as Market, 751)")
    add("--epochs", type=int, default=60, help="--whole: epochs (default: 60)")
    add("--time-limit", type=float, default=480, help="--whole: no epoch is begun that would end later than this many "
        "seconds; then fewer epochs are reported, and no score (default: 480)")  # fmt: skip
    args = parser.parse_args(argv)
    args.compile = args.device != "cpu" and not args.whole if args.compile is None else args.compile
    args.archs = args.archs or (["resnet50"] if args.whole else list(SIZES))
    if min(args.repeats, args.steps or 1, args.p or 1, args.ids, args.epochs) < 1:
        parser.error("--steps, --repeats, --p, --ids and --epochs must be at least 1")
    try:
        build_loss(args.loss, 2, 2)
        torch.empty(0, device=args.device)
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    return args


def jobs_of(args: argparse.Namespace, images: str) -> list[Job]:
    """One for each row."""
    on_cpu, jobs = args.device == "cpu", []
    for arch in args.archs:
        steps = args.steps or (2 if args.quick else STEPS[arch] if on_cpu else STEPS_ON_GPU)
        p = args.p or (8 if on_cpu and arch == "resnet50" else 16)
        for precision in args.precisions:
            for compiled in [False, True] if args.compile else [False]:
                jobs.append(Job(
                    arch, *SIZES[arch], precision, compiled, args.device, p, steps, 1 if args.quick else args.repeats,
                    args.loss, args.workers, args.peer_workers, images,
                ))  # fmt: skip
    return jobs


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    device = torch.device(args.device)
    machine = args.machine or machine_name(device)
    facts = {
        "command": f"python benchmarks/training.py {' '.join(sys.argv[1:] if argv is None else argv)}".strip(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx_bf16": "amx_bf16" in cpuinfo(),
    }
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        }
    print(", ".join(f"{key} {value}" for key, value in facts.items() if key != "command"))
    if device.type == "cpu" and "bfloat16" in args.precisions and not facts["amx_bf16"]:
        print("No matrix unit for bfloat16 (AMX) here; the targets of the bfloat16 rows come from one that has it.")
    with tempfile.TemporaryDirectory() as temporary:
        data_dir = args.data_dir or Path(temporary)
        if args.whole:
            job = jobs_of(args, str(generate(data_dir, num_ids=args.ids)))[-1]
            whole = in_a_process(measure_whole, job, args.epochs, args.time_limit)
            print(tabulate([[key, value] for key, value in whole.items() if not isinstance(value, list)]))
            speed, slow = whole["images_per_second"], whole["epochs_done"] < whole["epochs_wanted"]
            print(f"images/s of every fifth epoch: {', '.join(f'{value:.0f}' for value in speed[::5])}")
            print(f"{whole['epochs_done']} of {whole['epochs_wanted']} epochs in {whole['seconds']:.0f} s"
                  f"{': the time limit stopped it, there is no score' if slow else ''}")  # fmt: skip
            if not args.quick:
                print(f"-> {write_result('training_whole', {**facts, 'rows': [whole]}, machine).name}")
            return
        largest = max(job.steps * job.p * K for job in jobs_of(args, ""))
        images = str(generate(data_dir, num_ids=max(64, largest // 15)))  # some 18 training images each
        jobs = jobs_of(args, images)
        decoding, rows, memory = [], [], {}
        for job in {job.arch: job for job in jobs}.values():
            decoding.append(in_a_process(measure_decoding, job))
            memory[job.arch] = in_a_process(measure_peer_memory, job)
        for job in jobs:
            row = in_a_process(measure, job)
            rows.append({**row, "peer_peak_memory_mib": memory[job.arch]})
            print(f"{job.name}: train.py {row['images_per_second'][TRAIN]['median']:.1f} images/s, "
                  f"{row['share_of_bare_loop']:.3f} of the bare loop", flush=True)  # fmt: skip
            if not args.quick:  # what is there is kept, whatever comes
                write_result("training", {**facts, "rows": rows, "decoding": decoding}, machine)
    print(f"\n{tables(rows, decoding)}")
    if args.quick:
        print("\n--quick: nothing was written")
    else:
        result = {**facts, "rows": rows, "decoding": decoding}
        print(f"\n-> {write_result('training', result, machine).name}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks/training.py: {error}")
    except KeyboardInterrupt:
        sys.exit("benchmarks/training.py: stopped")
