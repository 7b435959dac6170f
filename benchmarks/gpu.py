"""Everything that needs a GPU, in one command: is it right, how fast is it, and the comparison at Market's size.

    python benchmarks/gpu.py --minutes 12                             # all parts
    python benchmarks/gpu.py --parts evaluator losses --minutes 2
    python benchmarks/gpu.py --small --device cpu --minutes 3         # every part once, on tiny data, without a GPU

    check        the tests marked gpu: the CPU's numbers, memory that runs out, resuming bit for bit, no waiting
    evaluator    rank_metrics beside the product alone, a sort on the GPU and torchreid's way, at three sizes; memory
    decoding     images/s into the store, by number of threads
    training     images/s of real epochs of train.py beside the bare loop: precisions, decoding, compiling, checkpoints
    losses       forward + backward of each loss at 64 x 2,048, and their share of a step of ResNet-50
    reranking    k-reciprocal re-ranking at Market's size and MSMT17's
    distributed  a step of ResNet-50 on all GPUs beside one, if there are several; micro-batches: time and memory
    comparison   every row of the results table on generated pedestrians, several trainings at a time on the one GPU

Each part runs in a process of its own and gets its share of the minutes that are left; one that fails or takes longer
is reported, and the next one runs. Writes results/benchmarks/gpu-PART_MACHINE.json as rows come in, so that a stopped
part keeps what it has; finished trainings go to runs/*.json beside it. Times: events of the GPU, medians after a
warm-up, random numbers; float32 is whole float32 unless TF32 is named.
"""

import argparse
import gc
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, which has a losses.py of its own

from benchmarks import distributed, steps  # noqa: E402
from benchmarks.evaluator import SIZES, by_sort, draw, product  # noqa: E402
from benchmarks.losses import by_turns, one_step  # noqa: E402
from benchmarks.machine import RESULTS, machine_name, milliseconds, synchronize, write_result  # noqa: E402
from benchmarks.machine import peak_mib as peak_of  # noqa: E402
from data.images import default_workers  # noqa: E402
from data.synthetic import generate  # noqa: E402
from evaluate import RERANK, score  # noqa: E402
from losses import LOSSES, ROWS, build_loss  # noqa: E402
from utils.features import Features  # noqa: E402
from utils.files import load_json  # noqa: E402
from utils.ranking import rank_metrics  # noqa: E402
from utils.runs import collect  # noqa: E402
from utils.seed import set_backends  # noqa: E402

# Shares of the time; in seconds, what each took on an H100 or a little more: the test of --compile alone takes half a
# minute, a training row 10 to 25 s, drawing 751 people 17 s and 14 trainings at a time 75 s.
SHARES = {"check": 110, "evaluator": 40, "decoding": 25, "training": 210, "losses": 50, "reranking": 25,
          "distributed": 60, "comparison": 300}  # fmt: skip
DEFAULT_EPOCHS = 5  # of the generated data set, whose recipe has its own milestones
SMALL_SIZES = {"market": (40, 300, 10, 6, 30, 0.8), "msmt17": (60, 400, 20, 15, 0, 1.1)}
GOALS = {"market": 25, "msmt17": 250}  # milliseconds, on an H100 or H200
GOAL_SHARE, GOAL_SPEED = 0.95, 3000  # of the bare loop; images/s of ResNet-50 in bfloat16


def say(text: str) -> None:
    """A line of the log, with the seconds since this process began."""
    print(f"{time.perf_counter() - START:6.1f} s  {text}", flush=True)


START = time.perf_counter()


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """The most memory of the GPU that a call holds on top of what was there; None on a CPU."""
    return round(peak_of(call, device), 2) if device.type == "cuda" else None


# ---------------------------------------------------------------------------------------------------------------- check


def check(args: argparse.Namespace, write: Callable[[dict], None]) -> str:
    """The tests say themselves what failed; a stopped part shows how far they came."""
    environment = {**os.environ, "REID_TEST_DEVICE": args.device}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-rs", "--tb=short", "--durations=8"]
    only = ["-k", "not killed"] if args.small else []
    code = subprocess.run([*command, *only], cwd=ROOT, env=environment).returncode
    write({"passed": code == 0})
    if code:
        raise RuntimeError("tests failed, see above")
    return "all tests passed"


# ------------------------------------------------------------------------------------------------------------ evaluator


def draw_embeddings(device: torch.device, D: int, size: tuple) -> list[Tensor]:
    """The six arrays of rank_metrics, drawn on the device, where it takes seconds."""
    parts = draw(D, *size, device=device, mixed=True)
    return [array for _, pids, camids, blocks in parts for array in (torch.cat(list(blocks)), pids, camids)]


def torchreids_way(query, query_pids, query_camids, gallery, gallery_pids, gallery_camids) -> dict[str, float]:
    """One matrix of all distances, sorted on the device; then numpy, query by query, as its eval_market1501 does."""
    order = (1 - F.normalize(query) @ F.normalize(gallery).T).argsort(1).cpu().numpy()
    q_pids, q_camids, g_pids, g_camids = (
        ids.cpu().numpy() for ids in (query_pids, query_camids, gallery_pids, gallery_camids)
    )
    found = []
    for row, pid, camid in zip(order, q_pids, q_camids, strict=True):
        match = (g_pids[row] == pid)[~((g_pids[row] == pid) & (g_camids[row] == camid))]
        if match.any():
            precision = match.cumsum() / np.arange(1, len(match) + 1)
            found.append(((precision * match).sum() / match.sum(), float(match[0])))
    ap, rank1 = np.mean(found, axis=0).tolist()
    return {"mAP": ap, "rank1": rank1}


def time_ranking(size: str, numbers: tuple, D: int, device: torch.device) -> list[dict]:
    """A row for each way, in turns; TF32 is allowed in the product that says so, and nowhere else."""
    arrays = draw_embeddings(device, D, numbers)
    synchronize(device)
    say(f"{size}: embeddings are drawn")
    ids_on_cpu = [array if array.is_floating_point() else array.cpu() for array in arrays]  # as evaluate.py has them
    ways = {"product alone": product, "product alone, TF32": product, "rank_metrics": rank_metrics}
    ways |= {"a sort on the device": by_sort} | ({"torchreid's way": torchreids_way} if size == "market" else {})
    times, found, rows = {way: [] for way in ways}, {}, []
    for turn in range(8):  # the first is the warm-up
        for way, call in ways.items():
            if sum(times[way]) < 2000:

                def once(way=way, call=call) -> None:
                    found[way] = call(*(ids_on_cpu if call is rank_metrics else arrays)) or {}

                set_backends(False, "TF32" in way)
                elapsed = milliseconds(once, device)
                times[way] += [elapsed] if turn else []
    set_backends(False, False)
    mine, alone = found["rank_metrics"], statistics.median(times["product alone"])
    for way, call in ways.items():
        median, metrics = statistics.median(times[way]), {key: found[way][key] for key in mine if key in found[way]}
        rows.append({
            "size": size, "query": numbers[0], "gallery": numbers[1], "dim": D, "way": way,
            "milliseconds": round(median, 3), "min": round(min(times[way]), 3), "max": round(max(times[way]), 3),
            "n": len(times[way]), "times_product": round(median / alone, 3),
            "extra_mib": peak_mib(lambda: call(*arrays), device),  # noqa: B023
            "metrics": metrics, "largest_difference": max((abs(metrics[k] - mine[k]) for k in metrics), default=0.0),
        })  # fmt: skip
    say(f"{size}: rank_metrics {statistics.median(times['rank_metrics']):.1f} ms")
    return rows


def evaluator(args: argparse.Namespace, write: Callable[[dict], None]) -> str:
    rows = []
    for size in SMALL_SIZES if args.small else ("market", "msmt17", "market500k"):
        numbers, D = (SMALL_SIZES[size], 64) if args.small else (SIZES[size], 2048)
        rows += time_ranking(size, numbers, D, torch.device(args.device))
        write({"goals_ms": GOALS, "rows": rows})
    lines = [[*(row[key] for key in ("size", "way", "milliseconds", "times_product", "extra_mib")),
              row["metrics"].get("mAP")] for row in rows]  # fmt: skip
    headers = ["size", "way", "ms", "x product", "extra MiB", "mAP"]
    table = tabulate(lines, headers, floatfmt=("", "", ".1f", ".2f", ".0f", ".4f"))
    for row in rows:
        if row["way"] == "rank_metrics" and row["size"] in GOALS and not args.small:
            met = "met" if row["milliseconds"] < GOALS[row["size"]] else "missed"
            table += f"\n{row['size']}: goal of {GOALS[row['size']]} ms {met}"
    if max(row["largest_difference"] for row in rows) > 1e-5:
        raise RuntimeError(f"the ways disagree by more than 1e-5:\n{table}")
    return table


# ------------------------------------------------------------------------------------------------------------- training


def pedestrians(args: argparse.Namespace, folder: Path) -> tuple[Path, list]:
    """Generated training images for about 100 steps in Market's layout, and 8 people in test: folder, train records."""
    source = generate(args.data_dir or folder, num_ids=6 if args.small else 400)
    return folder / "part", steps.small_set(source, folder / "part", 40 if args.small else None, test_people=8)


def archs_of(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    return {"resnet18": (64, 32)} if args.small else {"resnet50": (256, 128), "resnet18": (128, 64)}


def decoding(args: argparse.Namespace, write: Callable[[dict], None]) -> str:
    device, rows = torch.device(args.device), []
    with tempfile.TemporaryDirectory() as folder:
        paths = [record.path for record in pedestrians(args, Path(folder))[1][:2000]]
        for H, W in archs_of(args).values():
            for threads in steps.THREADS:
                speeds = [steps.decoding_speed(paths, (H, W), threads, device) for _ in range(3)]
                row = {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)}
                rows.append({"height": H, "width": W, "threads": threads, **row})
                write({"cores": os.cpu_count(), "images": len(paths), "rows": rows})
    return tabulate([list(row.values()) for row in rows], ["height", "width", "threads", "images/s", "min", "max"])


def training_row(job: steps.Job, images: Path, records: list) -> dict:
    """Real epochs, and beside them the bare loop and its stages."""
    device = torch.device(job.device)
    torch.compiler.reset()  # as in a new process
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    first, *later = steps.real_epochs(job, images, job.repeats + 1)
    row = {
        "images_per_second": statistics.median(line["images_per_second"] for line in later),
        "warm_up_seconds": round(first["seconds"] - statistics.median(line["seconds"] for line in later), 2),
        "peak_mib": round(steps.peak_memory(device)),
        "total_seconds": round(time.perf_counter() - start, 1),
    }
    if job.cache == "off":
        return row
    step = steps.bare_step(job, 1 + max(record.label for record in records))
    steps.bare_loop(step, min(5, job.steps), device)  # the warm-up
    bare = job.steps * job.batch_size / steps.bare_loop(step, job.steps, device)
    stages = {"data": steps.data_stage([record.path for record in records], job), **step.stages}
    return {**row, "bare_images_per_second": round(bare, 1), "share_of_bare_loop": row["images_per_second"] / bare,
            "stages_ms": steps.stage_times(stages, min(20, job.steps), device),
            **steps.checkpoint_cost(step)}  # fmt: skip


def training(args: argparse.Namespace, write: Callable[[dict], None]) -> str:
    rows, lines, failed, archs = [], [], [], archs_of(args)
    keys = ("images_per_second", "bare_images_per_second", "share_of_bare_loop", "peak_mib", "warm_up_seconds",
            "checkpoint_seconds")  # fmt: skip
    ways = [(precision, False, "auto") for precision in reversed(steps.PRECISIONS)]
    ways += [("bfloat16", False, "off")] + ([] if args.small else [("bfloat16", True, "auto")])
    with tempfile.TemporaryDirectory() as folder:
        images, records = pedestrians(args, Path(folder))
        p = 2 if args.small else 16
        num_steps = len(records) // (p * steps.K)
        say(f"{num_steps} steps an epoch")
        for (precision, compiled, cache), arch in [(way, arch) for way in ways for arch in archs]:
            repeats = 1 if args.small or cache == "off" else 2
            job = steps.Job(arch, *archs[arch], precision, compiled, args.device, p, num_steps, repeats, args.workers,
                            cache)  # fmt: skip
            try:
                row = training_row(job, images, records)
            except (Exception, SystemExit):  # a wrong flag ends in SystemExit
                failed.append(str(job))
                print(f"{job} failed:\n{traceback.format_exc()[-1500:]}", flush=True)
                continue
            rows.append({**job._asdict(), "batch_size": job.batch_size, **row})
            write({"rows": rows})
            stages = " ".join(f"{key} {value:.2f}" for key, value in row.get("stages_ms", {}).items())
            lines.append([str(job), *(row.get(key) for key in keys), stages])
            say(f"{job}: {row['images_per_second']:.0f} images/s")
    headers = ["", "images/s", "bare loop", "share", "peak MiB", "warm-up s", "checkpoint s", "ms of each stage"]
    table = tabulate(lines, headers, floatfmt=("", ".0f", ".0f", ".3f", ".0f", ".1f", ".2f"))
    table += f"\ngoals: {GOAL_SHARE} of the bare loop; ResNet-50 in bfloat16 more than {GOAL_SPEED:,} images/s"
    if failed:
        raise RuntimeError(f"{', '.join(failed)} failed, see above\n{table}")
    return table


# --------------------------------------------------------------------------------------------------------------- losses


def time_losses(args: argparse.Namespace, write: Callable[[dict], None]) -> str:
    device, rows = torch.device(args.device), []
    B, D = (8, 16) if args.small else (64, 2048)
    arch, size = ("resnet18", (64, 32)) if args.small else ("resnet50", (256, 128))
    repeats = 3 if args.small else 15
    step = steps.bare_step(steps.Job(arch, *size, "bfloat16", device=args.device, p=B // 4), 751)
    steps.bare_loop(step, 3, device)  # the warm-up
    network = 1000 * steps.bare_loop(step, repeats, device) / repeats
    say(f"a bfloat16 step of {arch} takes {network:.2f} ms")
    embeddings = (30 * F.normalize(torch.rand(B, D, device=device))).requires_grad_()
    labels = torch.arange(B, device=device) // 4
    for C in (5, 11) if args.small else (751, 10_000):
        for name in LOSSES:
            loss_fn = build_loss(name, C, D).to(device)
            if not loss_fn.state_dict() and rows and C != rows[0]["num_classes"]:
                continue  # the same as before

            step = one_step(loss_fn, embeddings, labels)
            (on_device,) = by_turns([step], device, repeats)  # queued behind a pause: Python's time is not in it
            alone = statistics.median([milliseconds(step, device) for _ in range(repeats)])
            rows.append({"loss": name, "batch_size": B, "dim": D, "num_classes": C, "milliseconds": on_device,
                         "milliseconds_with_launches": round(alone, 4),
                         "share_of_step": round(on_device["median"] / network, 4),
                         "peak_mib": peak_mib(step, device)})  # fmt: skip
    what = f"{arch} {size[0]}x{size[1]} bfloat16, batch {B}"
    write({"step": what, "step_milliseconds": round(network, 3), "rows": rows})
    lines = [[r["loss"], r["num_classes"], r["milliseconds"]["median"], r["milliseconds_with_launches"],
              f"{r['share_of_step']:.1%}", r["peak_mib"]] for r in rows]  # fmt: skip
    headers = ["loss", "classes", "ms", "ms with launches", f"of a step, {what}", "peak MiB"]
    return tabulate(lines, headers, floatfmt=".3f")


# ------------------------------------------------------------------------------------------------------------ reranking


def time_reranking(args: argparse.Namespace, write: Callable[[dict], None]) -> str:
    device, rows = torch.device(args.device), []
    for size in SMALL_SIZES if args.small else ("market", "msmt17"):
        arrays = draw_embeddings(device, 64 if args.small else 2048, (SMALL_SIZES if args.small else SIZES)[size])
        features, found = Features(*arrays), {}

        def ranked() -> None:
            found.update(score(features, reranking=RERANK))  # noqa: B023

        times = [milliseconds(ranked, device) for _ in range(4 if size == "market" else 2)][1:]
        rows.append({"size": size, "query": len(arrays[0]), "gallery": len(arrays[3]), "dim": arrays[0].shape[1],
                     "milliseconds": round(statistics.median(times), 1), "n": len(times),
                     "extra_mib": peak_mib(ranked, device), "mAP": found["mAP"],
                     "mAP_plain": rank_metrics(*arrays)["mAP"]})  # fmt: skip
        write({"goal_ms": 1000, "rows": rows})
        say(f"{size}: re-ranked and scored in {rows[-1]['milliseconds']:.0f} ms")
    keys = ("size", "milliseconds", "extra_mib", "mAP_plain", "mAP")
    lines = [[row[key] for key in keys] for row in rows]
    headers = ["size", "ms, ranking included (goal for market: 1,000)", "extra MiB", "mAP", "mAP re-ranked"]
    return tabulate(lines, headers, floatfmt=("", ".0f", ".0f", ".4f", ".4f"))


# ---------------------------------------------------------------------------------------------------------- distributed


def time_distributed(args: argparse.Namespace, write: Callable[[dict], None]) -> str:
    """The rows of benchmarks/distributed.py: as many processes as there are GPUs (on a CPU two)."""
    count = torch.cuda.device_count() if args.device.startswith("cuda") else 2
    size = ["--quick"] if args.small else ["--arch", "resnet50", "--height", "256", "--width", "128", "--amp"]
    result = distributed.measure_all(
        distributed.parse_flags(["--device", args.device, "--processes", str(count), "--steps", "20", *size])
    )
    write(result)
    alone = "\none GPU here: several processes are not measured" if count == 1 else ""
    return distributed.tables(result) + alone


# ----------------------------------------------------------------------------------------------------------- comparison


def wave(jobs: list[tuple[str, int]], epochs: int, args: argparse.Namespace, data_dir: Path, folder: Path, end: float):
    """Trains (row, seed) after (row, seed), args.jobs at a time; yields (row, seed, run folder, seconds) as they end.

    None is started that would not end in time, as long as the slowest so far took; what overruns is killed.
    """
    arch = "resnet18" if args.small else args.comparison_arch
    H, W = (64, 32) if args.small else (256, 128) if arch == "resnet50" else (128, 64)
    num_ids, thirds = 6 if args.small else 751, [str(math.ceil(epochs * part / 3)) for part in (1, 2)]
    flags = {"dataset": "synthetic", "synthetic-ids": num_ids, "data-dir": data_dir, "arch": arch, "weights": "none",
             "height": H, "width": W, "epochs": epochs, "workers": 2, "device": args.device}  # fmt: skip
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    words += ["--amp"] if epochs == DEFAULT_EPOCHS else ["--amp", "--milestones", *thirds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if args.small else "2"}
    waiting, running, slowest = list(jobs), {}, 0.0
    try:
        while waiting or running:
            if waiting and time.perf_counter() + slowest > end:
                say(f"no time for {len(waiting)} more trainings of {slowest:.0f} s")
                waiting.clear()
            while waiting and len(running) < args.jobs:
                row, seed = waiting.pop(0)
                run_dir = folder / f"synthetic{num_ids}_{row}_s{seed}"
                command = [sys.executable, str(ROOT / "train.py"), "--loss", row, "--seed", str(seed), "--run-dir",
                           str(run_dir), *words]  # fmt: skip
                with open(folder / f"{run_dir.name}.txt", "w", encoding="utf-8") as log:
                    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                running[process] = row, seed, run_dir, time.perf_counter()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                row, seed, run_dir, start = running.pop(process)
                if process.returncode:
                    text = (folder / f"{run_dir.name}.txt").read_text(encoding="utf-8")[-1500:]
                    print(f"{row}, seed {seed} failed ({process.returncode}):\n{text}", flush=True)
                    continue
                slowest = max(slowest, time.perf_counter() - start)
                yield row, seed, run_dir, time.perf_counter() - start
            if running and time.perf_counter() > end:
                names = ", ".join(f"{row} s{seed}" for row, seed, *_ in running.values())
                say(f"time is up: {names} stopped")
                return
    finally:
        for process in running:
            process.kill()
            process.wait()


def comparison(args: argparse.Namespace, write: Callable[[dict], None]) -> str:
    rows = list(ROWS)[:2] if args.small else list(ROWS)
    deadline = START + args.seconds - 10
    found: dict[str, dict[int, dict]] = {row: {} for row in rows}
    epochs = 1 if args.small else args.comparison_epochs
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data_dir = args.data_dir or folder / "datasets"
        generate(data_dir, num_ids=6 if args.small else 751)
        say("the pedestrians are drawn")
        seeds = 1 if args.small else 20  # as many as fit
        jobs = [(row, seed) for seed in range(seeds) for row in rows]
        for row, seed, run_dir, seconds in wave(jobs, epochs, args, data_dir, folder, deadline):
            run = load_json(collect(run_dir, args.out))
            shutil.rmtree(run_dir)
            found[row][seed] = {key: run[key] for key in ("rank1", "mAP", "seconds")}
            say(f"{row}, seed {seed}: rank-1 {run['rank1']:.1%}, mAP {run['mAP']:.1%}, {seconds:.0f} s")
            write({"epochs": epochs, "jobs": args.jobs, "arch": args.comparison_arch, "runs": found})
    lines = []
    for row, by_seed in found.items():
        means = [100 * statistics.fmean(run[key] for run in by_seed.values()) for key in ("rank1", "mAP") if by_seed]
        lines.append([row, len(by_seed), *(means or ["not run", ""])])
    lines.sort(key=lambda line: -line[3] if line[1] else 0.0)
    table = tabulate(lines, ["loss", "seeds", "rank-1", "mAP"], floatfmt=".1f")
    if not any(found.values()):
        raise RuntimeError("no training ended in time")
    return f"{table}\n{epochs} epochs, {args.jobs} trainings at a time; runs in runs/"


# ----------------------------------------------------------------------------------------------------------------- main

PARTS = {"check": check, "evaluator": evaluator, "decoding": decoding, "training": training, "losses": time_losses,
         "reranking": time_reranking, "distributed": time_distributed, "comparison": comparison}  # fmt: skip


def run_part(part: str, argv: list[str], seconds: float, folder: Path) -> tuple[bool, str]:
    """A part in a process of its own that ends, with all it started, when its time is up: did it, and its table."""
    table = folder / f"{part}.txt"
    command = [sys.executable, __file__, *argv, "--one", part, "--seconds", f"{seconds:.0f}", "--table", str(table)]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    text = table.read_text(encoding="utf-8") if table.is_file() else ""
    if code is None:
        return False, f"STOPPED after its {seconds:.0f} s; what it measured until then is in its file"
    return code == 0, text or f"FAILED with exit code {code}, see above"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--minutes", type=float, default=9, help="for all parts together (default: 9)")
    add("--small", action="store_true", help="tiny sizes, to try every part")
    add("--device", default="cuda", help="default: cuda")
    add("--workers", type=int, default=default_workers(), help="threads that decode (default: the cores, at most 4)")
    add("--data-dir", type=Path, help="where the generated pedestrians are kept (default: drawn anew)")
    add("--jobs", type=int, default=6, help="trainings at a time in the comparison (default: 6)")
    add("--comparison-epochs", type=int, default=DEFAULT_EPOCHS, help=f"default: {DEFAULT_EPOCHS}")
    add("--comparison-arch", default="resnet18", choices=("resnet18", "resnet50"), help="default: resnet18, 128x64")
    add("--machine", help="name in the files (default: the GPU's)")
    add("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    for hidden in ("--one", "--seconds", "--table"):
        add(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        args.seconds = float(args.seconds)
        name = f"gpu-{args.one}" + "-small" * args.small

        def write(payload: dict) -> None:
            write_result(name, payload, args.machine or machine_name(args.device), args.out)

        set_backends(False, False)
        try:
            text = PARTS[args.one](args, write)
        except Exception as error:
            traceback.print_exc()
            Path(args.table).write_text(f"FAILED: {error}\n", encoding="utf-8")
            sys.exit(1)
        Path(args.table).write_text(text + "\n", encoding="utf-8")
        return
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu --small tries every part without one")
    if args.small:  # on a busy machine two threads that wait for each other took 20 times as long as one
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"  # torch 2.14's bfloat16 by AMX holds NaN now and then
    deadline, texts, fine = time.perf_counter() + 60 * args.minutes, {}, True
    for number, part in enumerate(args.parts):
        share = 1 if args.small else SHARES[part] / sum(SHARES[other] for other in args.parts[number:])
        seconds = (deadline - time.perf_counter()) * share
        say(f"---- {part}: at most {seconds:.0f} s")
        with tempfile.TemporaryDirectory() as folder:
            ended_well, texts[part] = run_part(part, argv, seconds, Path(folder))
        fine &= ended_well
        say(f"---- {part}: {'done' if ended_well else 'NOT DONE'}")
    for part, text in texts.items():
        print(f"\n{part}\n{text}", flush=True)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
