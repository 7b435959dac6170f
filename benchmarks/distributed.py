"""What it costs to share a batch between processes, and what micro-batches save and cost.

    python benchmarks/distributed.py                    # two processes on a CPU, ResNet-18 128x64: some 2 minutes
    python benchmarks/distributed.py --quick            # does everything run? one step each, nothing is written
    python benchmarks/distributed.py --device cuda --processes 4 --arch resnet50 --height 256 --width 128

Steps of train.py (forward, gather, loss, backward, all-reduce, Adam) on one ready batch, P x K = 16 x 4 by default:

  processes       one process with all threads beside N with a share of the threads (or a GPU each) and of the batch.
                  Of N on one CPU no speed-up is to be expected, so the parts that only they have are timed apart: the
                  gather of the embeddings, the all-reduce of the gradients (a step with it less one without), and the
                  look at the other processes' stop signals.
  micro-batches   one process, the same batch in 1, 4 and 16 parts, and 4 times the batch in 1 and 16: time and memory.

Medians over the steps, each run in processes of its own; memory: resident on a CPU, allocated by torch on a GPU.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine_name, synchronize, write_result  # noqa: E402
from benchmarks.steps import peak_memory  # noqa: E402
from losses import build_loss  # noqa: E402
from models import build_model  # noqa: E402
from train import backward_step  # noqa: E402
from utils import distributed  # noqa: E402

NUM_CLASSES, K = 751, 4  # people in training, images of each in a batch


def measure(number: int, count: int, port: int, path: str, args: argparse.Namespace, p: int, parts: int) -> None:
    """One of `count` processes; number 0 writes what it measured, in milliseconds and MiB."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count), "MASTER_PORT": str(port),
                   "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    torch.set_num_threads(max(args.threads // count, 1))
    with distributed.processes():
        device = torch.device(distributed.own_device(args.device))
        torch.manual_seed(0)
        model = build_model(args.arch).to(device, memory_format=torch.channels_last)
        loss_fn = build_loss("softmax+triplet", NUM_CLASSES, model.embedding_dim).to(device)
        forward, whole_loss = distributed.parallel(model), distributed.parallel(loss_fn)
        optimizer = torch.optim.Adam([*model.parameters(), *loss_fn.parameters()], lr=1e-4, fused=True)
        rows = distributed.share(p * K)
        images = torch.randn(p * K, 3, args.height, args.width)[rows].to(device, memory_format=torch.channels_last)
        labels = torch.arange(p * K, device=device) // K
        embeddings = torch.randn(len(images), model.embedding_dim, device=device)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            backward_step(forward, whole_loss, images, labels, parts, args.amp)
            optimizer.step()

        def step_apart() -> None:
            with distributed.apart(forward):
                step()

        calls = {"step": step}
        if count > 1:
            calls |= {"without all-reduce": step_apart, "gather": lambda: distributed.gather(embeddings),
                      "stop signals": lambda: distributed.largest(0)}  # fmt: skip
        times = {name: [] for name in calls}
        for turn in range(args.steps + 1):
            for name, call in calls.items():
                distributed.largest(0)  # all begin together
                synchronize(device)
                start = time.perf_counter()
                call()
                synchronize(device)
                if turn:  # the first one is the warm-up
                    times[name].append(1000 * (time.perf_counter() - start))
        found = {name: round(statistics.median(values), 3) for name, values in times.items()}
        if number == 0:
            spread = [round(value, 3) for value in (min(times["step"]), max(times["step"]))]
            row = {"processes": count, "images": p * K, "parts": parts, "ms": found, "step_spread_ms": spread,
                   "peak_memory_mib": round(peak_memory(device), 1)}  # fmt: skip
            Path(path).write_text(json.dumps(row), encoding="utf-8")


def run(args: argparse.Namespace, count: int, p: int, parts: int) -> dict:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        torch.multiprocessing.spawn(measure, (count, port, str(path), args, p, parts), nprocs=count)
        return json.loads(path.read_text(encoding="utf-8"))


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--processes", type=int, default=2, help="how many share a batch (default: 2)")
    add("--arch", default="resnet18")
    add("--height", type=int, default=128)
    add("--width", type=int, default=64)
    add("--p", type=int, default=16, help="people per batch, four images each (default: 16)")
    add("--amp", action="store_true", help="bfloat16 autocast for the network")
    add("--device", default="cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="of all processes together (default: torch's)")
    add("--steps", type=int, default=10, help="that count, after one that does not (default: 10)")
    add("--quick", action="store_true", help="one step of tiny images each; nothing is written")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.height, args.width, args.p = 1, 32, 16, 8
    if args.p * K % args.processes or args.p < 8:
        parser.error("--p must be at least 8, and --processes must divide the batch")
    return args


def measure_all(args: argparse.Namespace) -> dict:
    """Both tables' rows, with what they were measured at."""
    shared = [run(args, count, args.p, 1) for count in dict.fromkeys((1, args.processes))]
    plans = [(args.p, 1), (args.p, 4), (args.p, 16), (4 * args.p, 1), (4 * args.p, 16)]
    parts = [run(args, 1, p, number) for p, number in plans]
    for row in shared[1:]:
        row["ms"]["all-reduce"] = round(row["ms"]["step"] - row["ms"].pop("without all-reduce"), 3)
    facts = {key: getattr(args, key) for key in ("arch", "height", "width", "amp", "threads", "steps")}
    return {**facts, "processes": shared, "micro_batches": parts}


def tables(result: dict) -> str:
    headers = ["processes", "images", "step ms", "images/s", "gather ms", "all-reduce ms", "stop signals ms"]
    shared = [[row["processes"], row["images"], row["ms"]["step"], 1000 * row["images"] / row["ms"]["step"],
               *(row["ms"].get(key) for key in ("gather", "all-reduce", "stop signals"))]
              for row in result["processes"]]  # fmt: skip
    parts = [[row["images"], row["parts"], row["ms"]["step"], 1000 * row["images"] / row["ms"]["step"],
              row["peak_memory_mib"]] for row in result["micro_batches"]]  # fmt: skip
    second = tabulate(parts, ["images", "parts", "step ms", "images/s", "peak MiB"], floatfmt=".1f")
    return f"{tabulate(shared, headers, floatfmt='.2f')}\n\n{second}"


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    result = measure_all(args)
    print(tables(result))
    if args.quick:
        print("\n--quick: nothing was written")
        return
    print(f"\n-> {write_result('distributed', result, machine_name(args.device)).name}")


if __name__ == "__main__":
    main()
