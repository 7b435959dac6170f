"""Everything that needs a GPU, in one command: is it right, how fast is it, and the comparison at Market's size.

    python benchmarks/gpu.py --minutes 12                             # all parts
    python benchmarks/gpu.py --parts evaluator losses --minutes 2
    python benchmarks/gpu.py --small --device cpu --minutes 3         # every line once, on tiny data, without a GPU

    check        the tests marked gpu: the CPU's numbers, memory that runs out, resuming bit for bit, no waiting
    evaluator    rank_metrics beside the product alone, a sort on the GPU and torchreid's way, at three sizes; memory
    training     images/s of real epochs of train.py beside the bare loop: precisions, decoding, compiling, checkpoints
    losses       forward + backward of each loss at 64 x 2,048, and their share of a step of ResNet-50
    reranking    k-reciprocal re-ranking at Market's size
    comparison   every row of the results table on generated pedestrians, several trainings at a time on the one GPU

Each part runs in a process of its own and gets its share of the minutes that are left; one that fails or takes longer
is reported, and the next one runs. Writes results/benchmarks/gpu-PART_MACHINE.json as rows come in, so that a stopped
part keeps what it has; finished trainings go to runs/*.json beside it. Times: events of the GPU, medians after a
warm-up, random numbers; float32 is whole float32 unless TF32 is named.
"""

import argparse
import gc
import json
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
sys.path[:] = [str(ROOT), *(place for place in sys.path if place != str(ROOT / "benchmarks"))]  # has a losses.py, too

import train  # noqa: E402
from benchmarks.evaluator import SIZES, by_sort, product  # noqa: E402
from benchmarks.losses import milliseconds as in_turns  # noqa: E402
from benchmarks.losses import one_step, synchronize  # noqa: E402
from benchmarks.machine import RESULTS, machine_name, write_result  # noqa: E402
from data.augment import flip  # noqa: E402
from data.images import TrainingImages, default_workers, normalise  # noqa: E402
from data.market1501 import FOLDERS, market1501  # noqa: E402
from data.synthetic import generate  # noqa: E402
from losses import LOSSES, ROWS, build_loss  # noqa: E402
from models import build_model  # noqa: E402
from utils.ranking import average, rank_metrics, rank_queries_from_distance  # noqa: E402
from utils.reranking import rerank  # noqa: E402
from utils.results import collect  # noqa: E402
from utils.seed import set_backends  # noqa: E402

SHARES = {"check": 80, "evaluator": 40, "training": 180, "losses": 45, "reranking": 25, "comparison": 300}  # of time
DEFAULT_EPOCHS = 5  # of the generated data set, whose recipe has its own milestones
SMALL_SIZES = {"market": (40, 300, 10, 6, 30, 0.8), "msmt17": (60, 400, 20, 15, 0, 1.1)}
GOALS = {"market": 25, "msmt17": 250}  # milliseconds, on an H100 or H200
GOAL_SHARE, GOAL_SPEED = 0.95, 3000  # of the bare loop; images/s of ResNet-50 in bfloat16
PRECISIONS = {"float32": ["--no-tf32"], "TF32": ["--tf32"], "bfloat16": ["--amp"]}  # train.py's flags


def say(text: str) -> None:
    """A line of the log, with the seconds since this process began."""
    print(f"{time.perf_counter() - START:6.1f} s  {text}", flush=True)


START = time.perf_counter()


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the waiting for its results included."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """The most memory of the GPU that a call holds on top of what was there; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 2)


def use_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


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
    """The six arrays of rank_metrics as benchmarks/evaluator.py makes them, on the device, where it takes seconds."""
    Q, G, people, cameras, strange, noise = size
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def numbers(most: int, count: int) -> Tensor:
        return torch.randint(most, (count,), generator=generator, device=device)

    looks = 0.8 * normal(40, 48)[numbers(40, people + 1)] + normal(people + 1, 48)  # families of similar people
    camera, to_embedding = 0.35 * normal(cameras, 48), normal(48, D) / math.sqrt(48)
    arrays = []
    for count, strangers in ((Q, 0), (G, strange)):
        pids = torch.cat([numbers(1, strangers), torch.arange(count - strangers, device=device) % people + 1])
        pids = pids[torch.randperm(count, generator=generator, device=device)]
        camids, embeddings = numbers(cameras, count), torch.empty(count, D, device=device)
        for first in range(0, count, 32768):
            part = slice(first, first + 32768)
            look = torch.where((pids[part] > 0)[:, None], looks[pids[part]], 1.3 * normal(len(pids[part]), 48))
            bad = noise * (0.45 * normal(len(look), 1)).exp()
            look = look + camera[camids[part]] + bad * normal(len(look), 48)
            embeddings[part] = torch.relu(look @ to_embedding + 0.5 + 0.3 * normal(len(look), D))
        arrays += [embeddings, pids, camids]
    return arrays


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

                use_tf32("TF32" in way)
                elapsed = milliseconds(once, device)
                times[way] += [elapsed] if turn else []
    use_tf32(False)
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


def part_of_pedestrians(args: argparse.Namespace, folder: Path) -> tuple[Path, int]:
    """Generated training images for about 100 steps in Market's layout, 8 people in test, and the batch's people."""
    p, num_ids = (2, 6) if args.small else (16, 400)
    source = generate(args.data_dir or folder, num_ids=num_ids)
    split = market1501(source, check_counts=False)
    test_pids = sorted({record.pid for record in split.query})[:8]
    for part in ("train", "query", "gallery"):
        (folder / "part" / FOLDERS[part]).mkdir(parents=True)
        for record in getattr(split, part):
            if part == "train" or record.pid in test_pids:
                (folder / "part" / FOLDERS[part] / record.path.name).symlink_to(record.path.resolve())
    return folder / "part", p


def bare_step(arch: str, size: tuple[int, int], p: int, C: int, amp: bool, compiled: bool, device: torch.device):
    """A training step on a ready batch, as train.py builds it: the functions of its stages."""
    model = build_model(arch).to(device, memory_format=torch.channels_last).train()
    loss_fn = build_loss("softmax", C, model.embedding_dim).to(device).train()
    parameters = [*model.parameters(), *loss_fn.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3.5e-4, weight_decay=5e-4, fused=True)
    images = torch.randn(4 * p, 3, *size, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(p, device=device).repeat_interleave(4)
    network = torch.compile(model) if compiled else model
    state = {}

    def forward() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            state["embeddings"] = network(images)

    def loss() -> None:
        state["loss"] = loss_fn(state["embeddings"], labels)

    def backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        state["loss"].backward()

    return {"forward": forward, "loss": loss, "backward": backward, "optimizer": optimizer.step}


def time_bare_loop(stages: dict[str, Callable], steps: int, device: torch.device) -> tuple[float, dict[str, float]]:
    """Seconds of a step; then, in further steps, the milliseconds of each stage, medians between events."""
    for _ in range(5):
        for stage in stages.values():
            stage()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        for stage in stages.values():
            stage()
    synchronize(device)
    seconds = (time.perf_counter() - start) / steps
    times = {name: [] for name in stages}
    for _ in range(min(steps, 20)):
        for name, stage in stages.items():
            times[name].append(milliseconds(stage, device))
    return seconds, {name: round(statistics.median(values), 3) for name, values in times.items()}


def real_epochs(flags: list[str], run_dir: Path, epochs: int, device: torch.device) -> dict:
    """train.py in this process; the first epoch is the warm-up. Its TF32 setting stays for what is timed next."""
    save, saving = train.save_checkpoint, []

    def timed_save(*content) -> None:
        start = time.perf_counter()
        save(*content)
        saving.append(time.perf_counter() - start)

    torch.compiler.reset()  # as in a new process
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start, train.save_checkpoint = time.perf_counter(), timed_save
    try:
        train.main([*flags, "--epochs", str(epochs), "--run-dir", str(run_dir)])
    finally:
        train.save_checkpoint = save
    log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    found = {
        "images_per_second": statistics.median(line["images_per_second"] for line in log[1:]),
        "warm_up_seconds": round(log[0]["seconds"] - statistics.median(line["seconds"] for line in log[1:]), 2),
        "peak_mib": peak and round(peak),
        "checkpoint_seconds": round(statistics.median(saving[:-1]), 3),  # the last one holds no optimizer
        "checkpoint_mib": round((run_dir / "last.pt").stat().st_size / 2**20, 1),
        "total_seconds": round(time.perf_counter() - start, 1),
    }
    shutil.rmtree(run_dir)
    return found


def time_data(paths: list[Path], size: tuple[int, int], B: int, workers: int, device: torch.device) -> dict:
    """Decoding all images once, images/s; and the milliseconds of a batch out of the store."""
    start = time.perf_counter()
    store = TrainingImages(paths, *size, device, workers=workers)
    synchronize(device)
    decoding = time.perf_counter() - start
    place = store.stores[0].device
    order, draws = torch.randint(len(paths), (B,)).to(place), torch.rand(B, 4).to(device)

    def batch() -> None:
        normalise(flip(store.stores[0].index_select(0, order).to(device), draws[:, 0]))

    times = [milliseconds(batch, device) for _ in range(23)][3:]
    return {"decoded_images_per_second": round(len(paths) / decoding), "data": round(statistics.median(times), 3)}


def training(args: argparse.Namespace, write: Callable[[dict], None]) -> str:
    device, rows, epochs = torch.device(args.device), [], 2 if args.small else 3
    archs = {"resnet18": (64, 32)} if args.small else {"resnet50": (256, 128), "resnet18": (128, 64)}
    jobs = [(arch, precision, "auto", False) for precision in reversed(PRECISIONS) for arch in archs]
    jobs += [(arch, "bfloat16", "auto", True) for arch in archs if not args.small]
    jobs += [(arch, "bfloat16", "off", False) for arch in archs]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        images, p = part_of_pedestrians(args, Path(folder))
        records = market1501(images, check_counts=False).train
        steps, C = len(records) // (4 * p), 1 + max(record.label for record in records)
        say(f"{len(records):,} training images: {steps} steps an epoch")
        for arch, precision, cache, compiled in jobs:
            H, W = archs[arch]
            name = f"{arch} {H}x{W} {precision}" + " compiled" * compiled + ", decoded each epoch" * (cache == "off")
            flags = {"loss": "softmax", "dataset": "market", "data-dir": images, "arch": arch, "weights": "none",
                     "height": H, "width": W, "p": p, "k": 4, "device": device, "workers": args.workers,
                     "cache": cache, "save-every": 0}  # fmt: skip
            flags = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
            flags += [*PRECISIONS[precision], *["--compile"] * compiled]
            try:
                row = real_epochs(flags, Path(folder) / "run", 2 if cache == "off" else epochs, device)
                if cache == "auto":
                    bare = bare_step(arch, (H, W), p, C, precision == "bfloat16", compiled, device)
                    seconds, stages = time_bare_loop(bare, steps, device)
                    del bare  # its memory is not the next row's
                    data = time_data([record.path for record in records], (H, W), 4 * p, args.workers, device)
                    decoded = data.pop("decoded_images_per_second")
                    row |= {"bare_images_per_second": round(4 * p / seconds, 1), "stages_ms": {**data, **stages},
                            "share_of_bare_loop": round(row["images_per_second"] * seconds / (4 * p), 4),
                            "decoded_images_per_second": decoded}  # fmt: skip
            except (Exception, SystemExit):  # a wrong flag ends in SystemExit
                failed.append(name)
                print(f"{name} failed:\n{traceback.format_exc()[-1500:]}", flush=True)
                shutil.rmtree(Path(folder) / "run", ignore_errors=True)
                continue
            rows.append({"arch": arch, "height": H, "width": W, "batch_size": 4 * p, "steps": steps,
                         "precision": precision, "cache": cache, "compile": compiled, **row})  # fmt: skip
            write({"workers": args.workers, "rows": rows})
            say(f"{name}: {row['images_per_second']:.0f} images/s, {row.get('share_of_bare_loop')} of the bare loop")
    lines = []
    for r in rows:
        name = f"{r['precision']}{' compiled' * r['compile']}{', decoded each epoch' * (r['cache'] == 'off')}"
        stages = " ".join(f"{key} {value:.2f}" for key, value in r.get("stages_ms", {}).items())
        lines.append([r["arch"], name, r["images_per_second"], r.get("bare_images_per_second"),
                      r.get("share_of_bare_loop"), r["peak_mib"], r["warm_up_seconds"], r["checkpoint_seconds"],
                      r.get("decoded_images_per_second"), stages])  # fmt: skip
    headers = ["arch", "precision", "images/s", "bare loop", "share", "peak MiB", "warm-up s", "checkpoint s",
               "decoded/s", "ms of each stage"]  # fmt: skip
    table = tabulate(lines, headers, floatfmt=("", "", ".0f", ".0f", ".3f", ".0f", ".1f", ".2f", ".0f"))
    table += f"\ngoals: {GOAL_SHARE} of the bare loop; ResNet-50 in bfloat16 more than {GOAL_SPEED:,} images/s"
    if failed:
        raise RuntimeError(f"{', '.join(failed)} failed, see above\n{table}")
    return table


# --------------------------------------------------------------------------------------------------------------- losses


def time_losses(args: argparse.Namespace, write: Callable[[dict], None]) -> str:
    device, rows = torch.device(args.device), []
    B, D = (8, 16) if args.small else (64, 2048)
    arch, size = ("resnet18", (64, 32)) if args.small else ("resnet50", (256, 128))
    set_backends(False)
    repeats = 3 if args.small else 15
    network = 1000 * time_bare_loop(bare_step(arch, size, B // 4, 751, True, False, device), repeats, device)[0]
    say(f"a bfloat16 step of {arch} takes {network:.2f} ms")
    embeddings = (30 * F.normalize(torch.rand(B, D, device=device))).requires_grad_()
    labels = torch.arange(B, device=device) // 4
    for C in (5, 11) if args.small else (751, 10_000):
        for name in LOSSES:
            loss_fn = build_loss(name, C, D).to(device)
            if not loss_fn.state_dict() and rows and C != rows[0]["num_classes"]:
                continue  # the same as before

            step = one_step(loss_fn, embeddings, labels)
            (on_device,) = in_turns([step], device, repeats)  # queued behind a pause: Python's time is not in it
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
        query, query_pids, query_camids, gallery, gallery_pids, gallery_camids = arrays
        found = {}

        def ranked() -> None:
            parts = []
            for here, distance in rerank(query, gallery):  # noqa: B023
                ids = query_pids[here], query_camids[here], gallery_pids, gallery_camids  # noqa: B023
                parts.append(rank_queries_from_distance(distance, *ids))
            found.update(average({key: torch.cat([part[key] for part in parts]) for key in parts[0]}))  # noqa: B023

        times = [milliseconds(ranked, device) for _ in range(4 if size == "market" else 2)][1:]
        rows.append({"size": size, "query": len(query), "gallery": len(gallery), "dim": query.shape[1],
                     "milliseconds": round(statistics.median(times), 1), "n": len(times),
                     "extra_mib": peak_mib(ranked, device), "mAP": found["mAP"],
                     "mAP_plain": rank_metrics(*arrays)["mAP"]})  # fmt: skip
        write({"goal_ms": 1000, "rows": rows})
        say(f"{size}: re-ranked and scored in {rows[-1]['milliseconds']:.0f} ms")
    keys = ("size", "milliseconds", "extra_mib", "mAP_plain", "mAP")
    lines = [[row[key] for key in keys] for row in rows]
    headers = ["size", "ms, ranking included (goal for market: 1,000)", "extra MiB", "mAP", "mAP re-ranked"]
    return tabulate(lines, headers, floatfmt=("", ".0f", ".0f", ".4f", ".4f"))


# ----------------------------------------------------------------------------------------------------------- comparison


def wave(jobs: list[tuple[str, int]], epochs: int, args: argparse.Namespace, data_dir: Path, folder: Path, end: float):
    """Trains (row, seed) after (row, seed), args.jobs at a time; yields (row, seed, run folder, seconds) as they end.

    None is started that would not end in time, as long as the slowest so far took; what overruns is killed.
    """
    arch = "resnet18" if args.small else args.comparison_arch
    H, W = (64, 32) if args.small else (256, 128) if arch == "resnet50" else (128, 64)
    num_ids, thirds = 20 if args.small else 751, [str(math.ceil(epochs * part / 3)) for part in (1, 2)]
    flags = {"dataset": "synthetic", "synthetic-ids": num_ids, "data-dir": data_dir, "arch": arch, "weights": "none",
             "height": H, "width": W, "epochs": epochs, "workers": 2, "device": args.device}  # fmt: skip
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    words += ["--amp"] if epochs == DEFAULT_EPOCHS else ["--amp", "--milestones", *thirds]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
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
                with open(folder / f"{run_dir.name}.txt", "w") as log:
                    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                running[process] = row, seed, run_dir, time.perf_counter()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                row, seed, run_dir, start = running.pop(process)
                if process.returncode:
                    text = (folder / f"{run_dir.name}.txt").read_text()[-1500:]
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
        generate(data_dir, num_ids=20 if args.small else 751)
        say("the pedestrians are drawn")
        if not epochs:  # how many fit, for one seed: from a short wave
            (folder / "short").mkdir()
            ended = list(wave([(row, 0) for row in rows[: args.jobs]], 2, args, data_dir, folder / "short", deadline))
            if not ended:
                raise RuntimeError("not even two epochs were finished")
            logs = [(run_dir / "log.jsonl").read_text().splitlines() for *_, run_dir, _ in ended]
            each = max(json.loads(lines[-1])["seconds"] for lines in logs)
            around = max(seconds for *_, seconds in ended) - 2 * each
            epochs = int(((deadline - time.perf_counter()) / math.ceil(len(rows) / args.jobs) - around) / (1.1 * each))
            epochs = max(1, min(epochs, 60))
            say(f"{each:.1f} s an epoch, {around:.1f} s around them: {epochs} epochs")
        seeds = 1 if args.small else 20  # as many as fit
        jobs = [(row, seed) for seed in range(seeds) for row in rows]
        for row, seed, run_dir, seconds in wave(jobs, epochs, args, data_dir, folder, deadline):
            found[row][seed] = json.loads(collect(run_dir, args.out).read_text())
            shutil.rmtree(run_dir)
            scores = {key: found[row][seed][key] for key in ("rank1", "mAP")}
            say(f"{row}, seed {seed}: rank-1 {scores['rank1']:.1%}, mAP {scores['mAP']:.1%}, {seconds:.0f} s")
            runs = {row: {seed: {key: run[key] for key in ("rank1", "mAP", "seconds")} for seed, run in by_seed.items()}
                    for row, by_seed in found.items()}  # fmt: skip
            write({"epochs": epochs, "jobs": args.jobs, "arch": args.comparison_arch, "runs": runs})
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

PARTS = {"check": check, "evaluator": evaluator, "training": training, "losses": time_losses,
         "reranking": time_reranking, "comparison": comparison}  # fmt: skip


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
    text = table.read_text() if table.is_file() else ""
    if code is None:
        return False, f"STOPPED after its {seconds:.0f} s; what it measured until then is in its file"
    return code == 0, text or f"FAILED with exit code {code}, see above"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--minutes", type=float, default=9, help="for all parts together (default: 9)")
    add("--small", action="store_true", help="tiny sizes, to try every line")
    add("--device", default="cuda", help="default: cuda")
    add("--workers", type=int, default=default_workers(), help="threads that decode (default: all cores, at most 16)")
    add("--data-dir", type=Path, help="where the generated pedestrians are kept (default: drawn anew)")
    add("--jobs", type=int, default=6, help="trainings at a time in the comparison (default: 6)")
    add("--comparison-epochs", type=int, default=DEFAULT_EPOCHS, help="0: as many as fit for one seed")
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

        use_tf32(False)
        try:
            text = PARTS[args.one](args, write)
        except Exception as error:
            traceback.print_exc()
            Path(args.table).write_text(f"FAILED: {error}\n")
            sys.exit(1)
        Path(args.table).write_text(text + "\n")
        return
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu --small tries every line without one")
    deadline, texts, fine = START + 60 * args.minutes, {}, True
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
