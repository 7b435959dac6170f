"""What benchmarks/training.py and gpu.py both time: a real epoch of train.py, and the parts of a step by themselves."""

import contextlib
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import train
from benchmarks.machine import milliseconds, synchronize
from data.augment import flip
from data.images import TrainingImages, normalise
from data.market1501 import FOLDERS, market1501
from data.records import Record
from losses import build_loss
from models import build_model
from utils.checkpoint import save_checkpoint

PRECISIONS = {"float32": ["--no-tf32"], "TF32": ["--tf32"], "bfloat16": ["--amp"]}  # train.py's flags
THREADS = (1, 2, 4, 8, 16)  # that decode
K = 4  # images per identity in a batch


class Job(NamedTuple):
    """What one process measures."""

    arch: str
    height: int
    width: int
    precision: str
    compile: bool = False
    device: str = "cpu"
    p: int = 16  # identities per batch; a batch has p * K images
    steps: int = 100  # per epoch
    repeats: int = 3
    workers: int = 4  # threads that decode for train.py, processes of the DataLoader
    cache: str = "auto"

    def __str__(self) -> str:
        how = " compiled" * self.compile + ", decoded each epoch" * (self.cache == "off")
        return f"{self.arch} {self.height}x{self.width} {self.precision}{how}"

    @property
    def batch_size(self) -> int:
        return self.p * K


def small_set(source: Path, folder: Path, num_train: int | None = None, test_people: int = 2) -> list[Record]:
    """Links in Market's layout to num_train (or all) training images and to the test images of some people.

    Returns the training records: one of each identity, a second of each, and so on, until there are enough.
    """
    split = market1501(source, check_counts=False)
    seen, turns = Counter(), []
    for record in split.train:
        turns.append(seen[record.pid])
        seen[record.pid] += 1
    chosen = {"train": [split.train[i] for i in sorted(range(len(turns)), key=turns.__getitem__)[:num_train]]}
    test_pids = sorted({record.pid for record in split.query})[:test_people]
    chosen |= {part: [r for r in getattr(split, part) if r.pid in test_pids] for part in ("query", "gallery")}
    for part, records in chosen.items():
        (folder / FOLDERS[part]).mkdir(parents=True)
        for record in records:
            (folder / FOLDERS[part] / record.path.name).symlink_to(record.path.resolve())
    return market1501(folder, check_counts=False).train


def decoding_speed(paths: list[Path], size: tuple[int, int], threads: int, device: torch.device) -> float:
    """Images/s of decoding them once into the store."""
    start = time.perf_counter()
    TrainingImages(paths, *size, device, workers=threads)
    synchronize(device)
    return round(len(paths) / (time.perf_counter() - start), 1)


def data_stage(paths: list[Path], job: Job) -> Callable[[], Tensor]:
    """What a step's images cost: a batch out of the store, augmented and normalised."""
    device = torch.device(job.device)
    store = TrainingImages(paths, job.height, job.width, device, workers=job.workers).stores[0]
    order = torch.randint(len(paths), (job.batch_size,)).to(store.device)
    draws = torch.rand(job.batch_size, 4).to(device)
    return lambda: normalise(flip(store.index_select(0, order).to(device), draws[:, 0]))


def real_epochs(job: Job, images: Path, epochs: int = 2) -> list[dict]:
    """The lines of log.jsonl of a training by train.py in this process; the first epoch is the warm-up.

    What it prints comes with the error if it fails. Its TF32 setting stays, for what is timed next.
    """
    flags = {"loss": "softmax", "dataset": "market", "data-dir": images, "epochs": epochs, "arch": job.arch,
             "weights": "none", "height": job.height, "width": job.width, "sampler": "pk", "p": job.p, "k": K,
             "device": job.device, "workers": job.workers, "cache": job.cache}  # fmt: skip
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    words += [*PRECISIONS[job.precision], *["--compile"] * job.compile]
    with tempfile.TemporaryDirectory() as folder:
        run_dir, printed = Path(folder) / "run", Path(folder) / "printed.txt"
        try:
            with open(printed, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                train.main([*words, "--run-dir", str(run_dir)])
        except Exception as error:
            error.add_note(printed.read_text(encoding="utf-8")[-2000:])
            raise
        return [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]


class Step(NamedTuple):
    """A training step on a ready batch: what takes part in it, and its stages as functions."""

    parts: dict[str, nn.Module | torch.optim.Optimizer]  # model, loss, optimizer: those of a checkpoint
    stages: dict[str, Callable[[], object]]


def bare_step(job: Job, num_classes: int, memory_format: torch.memory_format = torch.channels_last) -> Step:
    """As train.py builds it, on random pixels."""
    device = torch.device(job.device)
    model = build_model(job.arch).to(device, memory_format=memory_format).train()
    loss_fn = build_loss("softmax", num_classes, model.embedding_dim).to(device).train()
    parameters = [*model.parameters(), *loss_fn.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3.5e-4, weight_decay=5e-4, fused=True)
    images = torch.randn(job.batch_size, 3, job.height, job.width).to(device, memory_format=memory_format)
    labels = (torch.arange(job.p).repeat_interleave(K) % num_classes).to(device)
    network, now = torch.compile(model) if job.compile else model, {}

    def forward() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bfloat16"):
            now["embeddings"] = network(images)  # (B, D)

    def loss() -> None:
        now["loss"] = loss_fn(now["embeddings"], labels)

    def backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        now["loss"].backward()

    stages = {"forward": forward, "loss": loss, "backward": backward, "optimizer": optimizer.step}
    return Step({"model": model, "loss": loss_fn, "optimizer": optimizer}, stages)


def bare_loop(step: Step, steps: int, device: torch.device) -> float:
    """Seconds of so many steps."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        for stage in step.stages.values():
            stage()
    synchronize(device)
    return time.perf_counter() - start


def stage_times(stages: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each stage, medians, each waited for."""
    times = {name: [] for name in stages}
    for _ in range(repeats):
        for name, stage in stages.items():
            times[name].append(milliseconds(stage, device))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def checkpoint_cost(step: Step) -> dict[str, float]:
    """Seconds and size of a checkpoint as train.py writes it between two epochs."""
    with tempfile.TemporaryDirectory() as folder:
        path, seconds = Path(folder) / "last.pt", []
        for _ in range(3):
            start = time.perf_counter()
            save_checkpoint(path, {name: part.state_dict() for name, part in step.parts.items()})
            seconds.append(time.perf_counter() - start)
        size = round(path.stat().st_size / 2**20, 1)
    return {"checkpoint_seconds": round(statistics.median(seconds), 3), "checkpoint_mib": size}


def peak_memory(device: torch.device) -> float:
    """MiB: the most this process has had resident, or on a GPU allocated, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if not status.is_file():  # no Linux
        return 0.0
    return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 2**10
