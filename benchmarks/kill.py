"""Kills a training with SIGKILL at 20 random moments, resumes it each time, and looks for a bit that differs.

    python benchmarks/kill.py                       # 20 kills: some 5 minutes; writes results/benchmarks/kill.json
    python benchmarks/kill.py --quick               # 4 kills, printed only; so are --kills 6 --seed 1 --loss sphereface

One run is killed over and over, a random while after its start, after a line of log.jsonl (its checkpoint is being
written), or after a new last.pt (the next epoch, or at the end the scoring). Only the run folder is watched: train.py
knows nothing of it. Each restart is `train.py --resume` with another number of decoding threads, with or without the
cache, which change no number. Then the folder is compared with that of a run nobody killed: every tensor of last.pt bit
for bit, every line of log.jsonl but for the times, result.json but for the times and what the restarts changed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS  # noqa: E402
from utils.checkpoint import load_checkpoint  # noqa: E402
from utils.environment import current_commit  # noqa: E402
from utils.files import load_json, save_json  # noqa: E402

TIMES = ("seconds", "images_per_second")
HARMLESS = ("data_dir", "workers", "cache", "explicit")  # may be changed by a restart
EPOCHS = 32


def start(flags: Sequence, output=subprocess.DEVNULL) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def kill_at(flags: Sequence, run_dir: Path, epoch: int, saved: bool, delay: float) -> dict:
    """Starts a training and kills it `delay` seconds after it has logged, or saved, so many epochs (0: its start).

    Returns what the folder then holds. Raises RuntimeError with the output if the training ended before.
    """
    log, checkpoint, earlier = run_dir / "log.jsonl", run_dir / "last.pt", set(run_dir.glob(".*.tmp"))
    began = time.time_ns()

    def reached() -> bool:
        if len(read_log(run_dir)) < epoch or log.stat().st_mtime_ns < began:  # an old line may have lost its epoch
            return False
        return not saved or (checkpoint.exists() and checkpoint.stat().st_mtime_ns >= log.stat().st_mtime_ns)

    with tempfile.TemporaryFile("w+") as output:
        child = start(flags, output)
        while epoch and not reached() and child.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        child.kill()
        if child.wait() != -signal.SIGKILL:
            output.seek(0)
            raise RuntimeError(f"the training ended before it was killed:\n{output.read()}")
    kept, logged = finished_epochs(run_dir), len(read_log(run_dir))
    half = {path.name.rsplit(".", 2)[0][1:] for path in set(run_dir.glob(".*.tmp")) - earlier}
    return {"epochs_kept": kept, "epochs_logged": logged, "half_files": sorted(half),
            "has_result": (run_dir / "result.json").exists()}  # fmt: skip


def finished_epochs(run_dir: Path) -> int:
    return load_checkpoint(run_dir / "last.pt")["epoch"] if (run_dir / "last.pt").exists() else 0


def without_times(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def read_log(run_dir: Path) -> list[dict]:
    """log.jsonl without the times; every line must be whole."""
    path = run_dir / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return without_times([json.loads(line) for line in lines])


def read_result(run_dir: Path) -> dict:
    """result.json without the times, and without what a restart may change."""
    result = load_json(run_dir / "result.json")
    args = {key: value for key, value in result["args"].items() if key not in HARMLESS}
    args["environment"] = {key: value for key, value in args["environment"].items() if key != "commit"}
    return {**result, "log": without_times(result["log"]), "args": args}


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished run folders; nothing, if the tensors are equal bit for bit."""
    names = [sorted(path.name for path in folder.iterdir() if path.name != ".lock") for folder in (one, other)]
    found = [f"files: {names[0]} and {names[1]}"] if names[0] != names[1] else []
    a, b = load_checkpoint(one / "last.pt"), load_checkpoint(other / "last.pt")
    if a.keys() != b.keys() or a["epoch"] != b["epoch"]:
        found.append(f"last.pt: {sorted(a)} of epoch {a['epoch']} and {sorted(b)} of epoch {b['epoch']}")
    for part in ("model", "loss"):
        if a[part].keys() != b[part].keys():
            found.append(f"last.pt: names of tensors in {part}")
        both = a[part].keys() & b[part].keys()
        found += [f"last.pt: {part} {name}" for name in both if not same_bits(a[part][name], b[part][name])]
    found += ["log.jsonl"] if read_log(one) != read_log(other) else []
    return found + (["result.json"] if read_result(one) != read_result(other) else [])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def chain(kills: int, seed: int, loss: str, folder: Path) -> dict:
    """Kills a run so many times, the last time in the scoring at the end, and compares it with a whole one."""
    rng, begin, run_dir, moments = random.Random(f"kill {seed}"), time.monotonic(), folder / "killed", []
    flags = ["--loss", loss, "--dataset", "synthetic", "--synthetic-ids", 8, "--data-dir", folder, "--random-crop"]
    flags += ["--height", 64, "--width", 32, "--device", "cpu", "--p", 4, "--k", 8]
    flags += ["--epochs", EPOCHS, "--milestones", 24, "--eval-every", 1, "--save-every", 0]
    if start([*flags, "--run-dir", folder / "whole"]).wait():
        raise RuntimeError("the training that nobody kills failed: python train.py " + " ".join(map(str, flags)))
    whole = time.monotonic() - begin
    print(f"nobody killed this one: {whole:.0f} s", flush=True)
    longest = {"started": whole / 5, "logged": 0.2, "saved": whole / EPOCHS, "saved all": 0.1}
    for number in range(kills):
        after, kept = rng.choice(["started", "logged", "logged", "saved"]), finished_epochs(run_dir)
        epoch = 0 if after == "started" else kept + rng.randint(1, 2)
        if number == kills - 1:
            after, epoch = "saved all", EPOCHS
        elif kept + 3 > EPOCHS:
            continue  # fewer kills, and said: none of them may outlast the run
        flags_now = [*flags, "--workers", rng.randint(0, 3), "--cache", rng.choice(["auto", "off"])]
        flags_now += ["--run-dir", run_dir, *["--resume"] * (number > 0)]
        delay = rng.uniform(0, longest[after])
        found = kill_at(flags_now, run_dir, epoch, after.startswith("saved"), delay)
        moments.append({"after": after, "delay": round(delay, 3), **found})
        print(f"{number + 1:2}: {moments[-1]}", flush=True)
    if start([*flags, "--resume", "--run-dir", run_dir]).wait():
        raise RuntimeError("the last restart failed")
    return {
        "kills": len(moments), "after": Counter(moment["after"] for moment in moments),
        "half_files_left": sum(bool(moment["half_files"]) for moment in moments),
        "differences": differences(folder / "whole", run_dir),
        "tensors_compared": sum(len(load_checkpoint(run_dir / "last.pt")[part]) for part in ("model", "loss")),
        "log_lines_compared": len(read_log(run_dir)), "loss": loss, "epochs": EPOCHS, "seed": seed,
        "seconds": round(time.monotonic() - begin), "torch": torch.__version__, "commit": current_commit(),
        "device": "cpu, 1 thread", "moments": moments,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, choices=range(2, 25), metavar="2..24", help="default: 20")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (default: 0)")
    parser.add_argument("--loss", default="softmax+center", help="default: softmax+center, which has buffers, too")
    parser.add_argument("--quick", action="store_true", help="4 kills")
    args = parser.parse_args(argv)
    recorded = args == parser.parse_args([])
    with tempfile.TemporaryDirectory(prefix="kill") as folder:
        report = chain(4 if args.quick else args.kills, args.seed, args.loss, Path(folder))
    print(f"{report['kills']} kills in {report['seconds']} s; differences: {report['differences'] or 'none'}")
    if recorded:
        RESULTS.mkdir(parents=True, exist_ok=True)
        save_json(RESULTS / "kill.json", report)
    return 1 if report["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
