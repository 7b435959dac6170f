"""What experiments.sh has to run: the commands of all runs that are not finished, one on each line.

    DATASETS=market SEEDS="0 1" python -m utils.plan --epochs 30

Reads DATASETS, LOSSES, SEEDS, DATA_DIR, JOBS and SHARE from the environment (experiments.sh says what they mean);
further flags are train.py's. A run is finished if runs/NAME/result.json is there, and goes on if runs/NAME is.
"""

import os
import shlex
import statistics
import sys
import warnings
from pathlib import Path

import torch

from data import load_dataset
from losses import LOSSES, ROWS, TWELVE
from utils.errors import script
from utils.flags import build_parser, command_line, new_run, run_name
from utils.results import duration
from utils.runs import NAMES, own_flags, read_run

SET_BY = {"loss": "LOSSES", "dataset": "DATASETS", "seed": "SEEDS", "data_dir": "DATA_DIR"}
# without a finished run to go by, a training is assumed to take this long
ASSUMED_SMALL = (240, "4 minutes a run, for resnet18 at 128x64 on one CPU core")
ASSUMED = (1200, "20 minutes a run, for resnet50 at 256x128 on a recent GPU; without a GPU it is about a day")


def datasets_here(data_dir: str) -> list[str]:
    """Market-1501 and DukeMTMC-reID, if they can be read."""
    found = []
    for name in NAMES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_dataset(name, data_dir)
            found.append(name)
        except (ValueError, OSError):
            pass
    return found


def plan(argv: list[str], environment: dict[str, str]) -> list[dict]:
    """All flags of all runs, seed after seed, so that the table is complete early and only gets sharper."""
    parser = build_parser()
    explicit = vars(parser.parse_args(argv))
    for key, name in SET_BY.items():
        if key in explicit:
            parser.error(f"--{key.replace('_', '-')} is set by experiments.sh: use {name}")
    for key in ("run_dir", "resume", "show_recipe"):
        if key in explicit:
            parser.error(f"--{key.replace('_', '-')} is for single runs: use train.py")
    explicit |= {"data_dir": environment["DATA_DIR"]} if environment.get("DATA_DIR") else {}
    datasets, seeds = environment.get("DATASETS", "").split(), environment.get("SEEDS", "").split()
    if not datasets:
        datasets = datasets_here(explicit.get("data_dir", "datasets"))
        if not datasets:
            print("Neither Market-1501 nor DukeMTMC-reID is there: generated pedestrians, one seed.", file=sys.stderr)
            datasets, seeds = ["synthetic"], seeds or ["0"]
    losses = environment.get("LOSSES", "").split() or TWELVE
    losses = [*ROWS, *sorted(LOSSES.keys() - ROWS.keys() - {"center"})] if losses == ["all"] else losses
    runs = []
    for seed in seeds or ["0", "1", "2", "3", "4"]:
        for dataset in datasets:
            for loss in losses:
                words = ["--loss", loss, "--dataset", dataset, "--seed", seed]
                try:
                    runs.append(new_run({**vars(parser.parse_args(words)), **explicit}))
                except ValueError as error:
                    parser.error(str(error))
    part, _, parts = environment.get("SHARE", "1/1").partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        parser.error(f"SHARE={environment['SHARE']} is not of the form 2/8, the second eighth")
    return runs[int(part) - 1 :: int(parts)]


def estimate(runs: list[dict]) -> str:
    """How long the runs will train, one after the other, and what that is based on."""
    finished: dict[str, list[float]] = {}
    for path in [*Path("runs").glob("*/result.json"), *Path(__file__).parent.parent.glob("results/runs/*.json")]:
        try:
            run = read_run(path)
            finished.setdefault(setting(run["args"]), []).append(run["seconds"])
        except ValueError:  # the table at the end will say so
            continue
    total, reasons = 0.0, {}
    for args in runs:
        times = finished.get(setting(args))
        seconds, reason = ASSUMED_SMALL if args["dataset"] == "synthetic" else ASSUMED
        total += statistics.fmean(times) if times else seconds
        reason = "by finished runs of the same setting" if times else f"by assumption: {reason}"
        reasons[reason] = reasons.get(reason, 0) + 1
    return f"about {duration(total)} of training ({'; '.join(f'{n} {reason}' for reason, n in reasons.items())})"


def setting(args: dict) -> str:
    """What decides how long a training takes, but for the loss."""
    own = {key: value for key, value in own_flags(args).items() if key not in ("loss", "loss_args")}
    return str([args["dataset"], args["recipe"], own])


def commands(runs: list[dict], jobs: int, python: str) -> list[str]:
    """The commands of the runs; several at a time are bound to the GPUs by turns, or to a share of the cores."""
    lines, gpus = [], [str(number) for number in range(torch.cuda.device_count())]
    if gpus and os.environ.get("CUDA_VISIBLE_DEVICES"):  # a batch system's share of the machine
        gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    for i, args in enumerate(runs):
        first = {"loss": args["explicit"]["loss"], "dataset": args["dataset"]}
        flags = {**first, **args["explicit"]}
        line = f"{shlex.quote(python)} train.py {command_line(flags)}"
        line += " --resume" if (Path("runs") / run_name(args)).exists() else ""
        if jobs > 1 and len(gpus) > 1:
            line = f"CUDA_VISIBLE_DEVICES={gpus[i % len(gpus)]} {line}"
        if jobs > 1 and not gpus:
            line = f"OMP_NUM_THREADS={max(torch.get_num_threads() // jobs, 1)} {line}"
        lines.append(line)
    return lines


def main() -> None:
    runs = plan(sys.argv[1:], dict(os.environ))
    left = [args for args in runs if not (Path("runs") / run_name(args) / "result.json").is_file()]
    text = f"{len(runs)} runs, {len(runs) - len(left)} of them finished before"
    print(f"{text}; {len(left)} to do: {estimate(left)}." if left else f"{text}.", file=sys.stderr)
    jobs = os.environ.get("JOBS", "1")
    if not jobs.isdigit() or jobs == "0":
        sys.exit(f"plan: JOBS={jobs} is not a number of trainings at a time")
    print("".join(f"{line}\n" for line in commands(left, int(jobs), os.environ.get("PYTHON", "python"))), end="")


if __name__ == "__main__":
    script("plan", main)
