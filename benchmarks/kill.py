"""Kills a training with SIGKILL at 20 random moments, resumes it each time, and looks for a bit that differs.

    python benchmarks/kill.py                       # 20 kills: about 5 minutes; writes results/benchmarks/kill.json
    python benchmarks/kill.py --kills 6 --seed 1 --loss sphereface   # another chain, printed only

One run is killed over and over: while it decodes images, during a step, while a checkpoint is written, while it scores
(after an epoch, and at the very end), and while result.json is written. A moment is drawn from the seed: the n-th time
that a phase begins after the (re)start, and a share of the time the phase usually takes. Each restart is
`train.py --resume` with another number of decoding threads, with or without the cache, which change no number.

Then the run folder is compared with that of a run nobody killed: every tensor of last.pt bit for bit, every line of
log.jsonl but for the times, result.json but for the times and for what the restarts changed. On a CPU, one thread.
Each kill reports what lay in the folder: the checkpoint's epoch, and the half file of a write that was cut short.
"""

import argparse
import json
import os
import platform
import random
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(place for place in sys.path if place != str(ROOT / "benchmarks"))]

from utils.checkpoint import load_checkpoint  # noqa: E402
from utils.files import load_json, save_json  # noqa: E402

PHASES = ("decoding", "step", "checkpoint", "scoring")  # drawn in turn; the last kills are those of the end
TIMES = ("seconds", "images_per_second")
HARMLESS = ("data_dir", "workers", "cache")  # may be changed by a restart
EPOCHS = 32


class Moment(NamedTuple):
    phase: str
    nth: int  # the n-th time the phase begins after the start; of "last scoring" and "result": of the whole run's last
    share: float  # of the phase's usual time


# ---------------------------------------------------------------------------------------------- the process that dies


def announced_training(pipe: int, flags: list[str]) -> None:
    """train.py, which writes a line into the pipe whenever it enters a phase."""
    import train

    def announce(phase: str) -> None:
        os.write(pipe, f"{phase}\n".encode())

    def announced(function, phase_of):
        def call(*args, **settings):
            announce(phase_of(*args))
            result = function(*args, **settings)
            announce("between")
            return result

        return call

    class AnnouncedImages(train.TrainingImages):
        def __init__(self, *args, **settings):
            announce("decoding")
            super().__init__(*args, **settings)
            announce("between")

        def batches(self, *args):
            announce("between" if self.stores else "decoding")
            for images in super().batches(*args):
                announce("step")
                yield images
                announce("between" if self.stores else "decoding")
            announce("between")

    train.TrainingImages = AnnouncedImages
    train.save_checkpoint = announced(train.save_checkpoint, lambda *_: "checkpoint")
    train.save_log = announced(train.save_log, lambda *_: "log")
    train.save_json = announced(train.save_json, lambda path, _: path.stem)  # args or result
    train.embed_split = announced(train.embed_split, lambda *_: "scoring")
    train.main(flags)
    announce("finished")


# ------------------------------------------------------------------------------------------------ the one that kills


class Child:
    """A training in a process of its own, and the phases it has announced: (phase, when) in seconds."""

    def __init__(self, flags: Sequence[str]):
        read_end, write_end = os.pipe()
        command = [sys.executable, str(Path(__file__).resolve()), "--announce", str(write_end), "--", *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, pass_fds=[write_end], stdout=self.output, stderr=self.output, env=environment
        )
        os.close(write_end)
        self.pipe = open(read_end, "rb", buffering=0)
        self.phases, self.rest = [], b""

    def read(self, seconds: float | None = None) -> bool:
        """Waits until something is announced; False at the end of the process or after so many seconds."""
        if seconds is not None and not select.select([self.pipe], [], [], max(seconds, 0))[0]:
            return False
        data = self.pipe.read(4096)
        *lines, self.rest = (self.rest + data).split(b"\n")
        now = time.monotonic()
        self.phases += [(line.decode(), now) for line in lines]
        return bool(data)

    def end(self) -> str:
        """Reads to the end, reaps the process and returns what it printed."""
        while self.read():
            pass
        self.pipe.close()
        self.process.wait()
        self.output.seek(0)
        return self.output.read()

    def count(self, phase: str) -> int:
        return sum(name == phase for name, _ in self.phases)


def kill_at(flags: Sequence[str], run_dir: Path, phase: str, nth: int, delay: float) -> dict:
    """Starts a training and kills it `delay` seconds after the n-th beginning of a phase; what the folder then holds.

    Raises RuntimeError with the output if the training ended before.
    """
    earlier = set(run_dir.glob(".*.tmp"))  # left by the kill before
    child = Child(flags)
    while child.count(phase) < nth:
        if not child.read():
            raise RuntimeError(f"the training ended before its {phase} {nth}:\n{child.end()}")
    until = time.monotonic() + delay
    while (left := until - time.monotonic()) > 0 and child.read(left):
        pass
    child.process.send_signal(signal.SIGKILL)
    output = child.end()
    if child.process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the training ended before it was killed in its {phase} {nth}:\n{output}")
    return {
        "aimed_at": phase,
        "died_in": child.phases[-1][0],
        "epochs_in_checkpoint": finished_epochs(run_dir),
        "epochs_in_log": len(read_log(run_dir)),
        "half_files": sorted(path.name.rsplit(".", 2)[0][1:] for path in set(run_dir.glob(".*.tmp")) - earlier),
        "has_result": (run_dir / "result.json").exists(),
    }


def train_to_the_end(flags: Sequence[str]) -> tuple[dict[str, float], str]:
    """Median seconds of each phase, and the output, of a training that nobody kills."""
    child = Child(flags)
    output = child.end()
    if child.process.returncode or child.phases[-1][0] != "finished":
        raise RuntimeError(f"the training failed:\n{output}")
    durations = {}
    for (name, begin), (_, end) in zip(child.phases, child.phases[1:], strict=False):
        durations.setdefault(name, []).append(end - begin)
    return {name: statistics.median(times) for name, times in durations.items()}, output


# --------------------------------------------------------------------------------------------------- what is compared


def finished_epochs(run_dir: Path) -> int:
    return load_checkpoint(run_dir / "last.pt")["epoch"] if (run_dir / "last.pt").exists() else 0


def read_log(run_dir: Path) -> list[dict]:
    """log.jsonl without the times; every line must be whole."""
    lines = (run_dir / "log.jsonl").read_text().splitlines() if (run_dir / "log.jsonl").exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def read_result(run_dir: Path) -> dict:
    """result.json without the times, and without the flags that a restart may change."""
    result = load_json(run_dir / "result.json")
    result["log"] = [{key: value for key, value in line.items() if key not in TIMES} for line in result["log"]]
    result["args"] = {key: value for key, value in result["args"].items() if key not in (*HARMLESS, "explicit")}
    result["args"]["environment"] = {
        key: value for key, value in result["args"]["environment"].items() if key != "commit"
    }
    return result


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished run folders; nothing, if the tensors are equal bit for bit."""
    found = []
    names = [sorted(path.name for path in folder.iterdir() if path.name != ".lock") for folder in (one, other)]
    if names[0] != names[1]:
        found.append(f"files: {names[0]} and {names[1]}")
    a, b = load_checkpoint(one / "last.pt"), load_checkpoint(other / "last.pt")
    if a.keys() != b.keys() or a["epoch"] != b["epoch"]:
        found.append(f"last.pt: {sorted(a)} of epoch {a['epoch']} and {sorted(b)} of epoch {b['epoch']}")
    for part in ("model", "loss"):
        if a[part].keys() != b[part].keys():
            found.append(f"last.pt: names of tensors in {part}")
        for name in a[part].keys() & b[part].keys():
            if not same_bits(a[part][name], b[part][name]):
                found.append(f"last.pt: {part} {name}")
    if read_log(one) != read_log(other):
        found.append("log.jsonl")
    if read_result(one) != read_result(other):
        found.append("result.json")
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


# ------------------------------------------------------------------------------------------------------------ the chain


def plan(kills: int, rng: random.Random) -> list[Moment]:
    """The moments in their order: the four phases mixed, then the scoring at the end and the writing of the result."""
    at_the_end = ["last scoring", "last scoring", "result"][-max(1, kills // 6) :]
    phases = [PHASES[i % len(PHASES)] for i in range(kills - len(at_the_end))]
    rng.shuffle(phases)
    times = {"step": 7, "checkpoint": 2, "scoring": 2}  # at most so many, of 3 steps an epoch: the chain must not end
    moments = [Moment(phase, rng.randint(1, times.get(phase, 1)), rng.random()) for phase in phases]
    return moments + [Moment(phase, 1, rng.random()) for phase in at_the_end]


def chain(kills: int, seed: int, loss: str, folder: Path) -> dict:
    rng = random.Random(f"kill {seed}")
    flags = ["--loss", loss, "--dataset", "synthetic", "--synthetic-ids", 8, "--data-dir", folder, "--random-crop"]
    flags += ["--arch", "resnet18", "--weights", "none", "--height", 64, "--width", 32, "--device", "cpu"]
    flags += ["--epochs", EPOCHS, "--eval-every", 1, "--p", 4, "--k", 8]
    start = time.monotonic()
    usual, output = train_to_the_end([*flags, "--workers", 1, "--run-dir", folder / "whole"])
    print(f"nobody killed this one: {time.monotonic() - start:.0f} s")
    run_dir, moments, records = folder / "killed", plan(kills, rng), []
    for number, moment in enumerate(moments):
        phase, nth = moment.phase, moment.nth
        if phase == "last scoring":
            phase, nth = "scoring", max(EPOCHS - finished_epochs(run_dir), 1)
        harmless = ["--workers", rng.randint(0, 3), "--cache", rng.choice(["auto", "off"])]
        if phase == "decoding" and "off" in harmless:
            nth = rng.randint(2, 5)  # of the batches; the first is that of an empty store
        restart = [] if number == 0 else ["--resume"]
        delay = moment.share * usual[phase] if phase != "result" else 0  # written within a millisecond
        record = kill_at([*flags, *harmless, *restart, "--run-dir", run_dir], run_dir, phase, nth, delay)
        record = {"kill": number + 1, **record, "aimed_at": moment.phase, "nth": nth, "share": round(moment.share, 3)}
        records.append(record)
        half = f", left half a {' and a '.join(record['half_files'])}" if record["half_files"] else ""
        print(f"{number + 1:2}: aimed at {moment.phase}, died in {record['died_in']}, "
              f"{record['epochs_in_checkpoint']} of {EPOCHS} epochs kept{half}", flush=True)  # fmt: skip
    train_to_the_end([*flags, "--workers", 1, "--resume", "--run-dir", run_dir])
    died_in = [record["died_in"] for record in records]
    return {
        "kills": len(records),
        "died_in": {phase: died_in.count(phase) for phase in sorted(set(died_in))},
        "half_files_left": sum(bool(record["half_files"]) for record in records),
        "differences": differences(folder / "whole", run_dir),
        "tensors_compared": sum(len(load_checkpoint(run_dir / "last.pt")[part]) for part in ("model", "loss")),
        "log_lines_compared": len(read_log(run_dir)),
        "loss": loss,
        "epochs": EPOCHS,
        "seed": seed,
        "seconds": round(time.monotonic() - start),
        "moments": records,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": "cpu, 1 thread",
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="at least 2 (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (default: 0)")
    parser.add_argument("--loss", default="softmax+center", help="default: softmax+center, which has buffers, too")
    args = parser.parse_args(argv)
    if not 2 <= args.kills <= 24:
        parser.error("--kills must lie in 2 to 24: more would outlast the run")
    folder = Path(tempfile.mkdtemp(prefix="kill"))
    try:
        report = chain(args.kills, args.seed, args.loss, folder)
    finally:
        shutil.rmtree(folder)
    print(f"{report['kills']} kills in {report['seconds']} s; differences: {report['differences'] or 'none'}")
    if argv is None and len(sys.argv) == 1:
        path = ROOT / "results" / "benchmarks" / "kill.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(path, report)
    return 1 if report["differences"] else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--announce"]:
        announced_training(int(sys.argv[2]), sys.argv[4:])
    else:
        sys.exit(main())
