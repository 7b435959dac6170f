"""Time and memory of utils/ranking.py beside the distance product alone, a full sort, and other evaluators.

    python benchmarks/evaluator.py                   # market, msmt17, market500k, and a memory-mapped gallery
    python benchmarks/evaluator.py --quick           # a tenth of Market, a small curve: a minute
    python benchmarks/evaluator.py --sizes market --repeats 5

Embeddings are generated: people with a look of their own among similar ones, cameras, bad pictures, distractors; mAP
between 0.3 and 0.9. All ways are timed by turns in one process, in float32; then each is run alone in a new process for
its memory: the highest anonymous memory while it runs, minus that before it, the embeddings loaded. "After the product"
is the time beyond that of the product in the same turn. Numbers of the same protocol are compared in the same run.

The peers are timed where they are installed, at Market size and below (they need a matrix of all distances):
torchreid (its Cython where that is built, otherwise numpy), torchmetrics' average precision per query, and
pytorch-metric-learning's calculator (needs faiss; no cameras, so another protocol and other numbers).
With a GPU, the product, our evaluator and the sort are timed there, too, with and without TF32.

Prints tables and writes results/benchmarks/evaluator_MACHINE.json.
"""

import argparse
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine_name, sanitised, write_result  # noqa: E402
from utils.ranking import rank_metrics  # noqa: E402

SIZES = {  # query and gallery images, people, cameras, distractors, and how bad the pictures are
    "quick": (337, 1591, 75, 6, 280, 0.8),
    "market": (3368, 15913, 750, 6, 2798, 0.8),
    "msmt17": (11659, 82161, 3060, 15, 0, 1.1),
    "market500k": (3368, 515913, 750, 6, 502798, 0.8),
}
SLOW = 60  # seconds of all turns of a way, after which it gets no further one
MIB = 2**20
NAMES = ("query", "query_pids", "query_camids", "gallery", "gallery_pids", "gallery_camids")


def generate(
    folder: Path, dim: int, queries: int, images: int, people: int, cameras: int, distractors: int, noise: float
):
    """Write the six arrays, a block at a time."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    looks = 0.8 * normal(40, 48)[torch.randint(40, (people + 1,), generator=rng)] + normal(people + 1, 48)
    camera, to_embedding = 0.35 * normal(cameras, 48), normal(48, dim) / math.sqrt(48)
    pids = {
        "query": torch.arange(queries) % people + 1,
        "gallery": torch.cat(
            [torch.zeros(distractors, dtype=torch.int64), torch.arange(images - distractors) % people + 1]
        ).sort()[0],
    }
    for name, pid in pids.items():
        camid = torch.randint(cameras, (len(pid),), generator=rng)
        table = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (len(pid), dim))
        for first in range(0, len(pid), 8192):
            part = slice(first, first + 8192)
            look = torch.where((pid[part] > 0)[:, None], looks[pid[part]], 1.3 * normal(len(pid[part]), 48))
            bad = noise * (0.45 * normal(len(look), 1)).exp()
            look = look + camera[camid[part]] + bad * normal(len(look), 48)
            table[part] = torch.relu(look @ to_embedding + 0.5 + 0.3 * normal(len(look), dim)).numpy()
        np.save(folder / f"{name}_pids.npy", pid.numpy())
        np.save(folder / f"{name}_camids.npy", camid.numpy())


def load(folder: Path, mapped: int = 0) -> list:
    """The six arrays as tensors; mapped: that many rows of the gallery, memory-mapped instead."""
    arrays = {name: torch.from_numpy(np.load(folder / f"{name}.npy")) for name in NAMES if name != "gallery"}
    arrays["gallery"] = np.load(folder / "gallery.npy", mmap_mode="r" if mapped else None)
    if not mapped:
        arrays["gallery"] = torch.from_numpy(arrays["gallery"])
    return [arrays[name][: mapped or None] if name.startswith("gallery") else arrays[name] for name in NAMES]


# ---- The ways: functions of the six arrays, returning metrics or None ----


def product(query, _qp, _qc, gallery, *_):
    """The distance product and nothing else, by the evaluator's blocks, into the same memory each time."""
    block = 8192 if query.is_cuda else 2048
    out = torch.empty(len(query), block, device=query.device)
    for first in range(0, len(gallery), block):
        rows = torch.as_tensor(gallery[first : first + block])
        torch.mm(query, rows.T, out=out[:, : len(rows)])


def ours(*arrays):
    return rank_metrics(*arrays)


def by_sort(query, query_pids, query_camids, gallery, gallery_pids, gallery_camids):
    """Sort every row, by blocks of queries; plain torch."""
    gallery, results = F.normalize(gallery), []
    for first in range(0, len(query), 128):
        part = slice(first, first + 128)
        order = (F.normalize(query[part]) @ gallery.T).argsort(1, descending=True)
        same = gallery_pids[order] == query_pids[part, None]
        keep = ~(same & (gallery_camids[order] == query_camids[part, None])) & (gallery_pids[order] != -1)
        match = same & keep
        rank, i, n = keep.cumsum(1), match.cumsum(1), match.sum(1)
        ap = (match * i / rank.clamp(min=1)).sum(1) / n
        results.append(torch.stack([ap, (match & (rank == 1)).any(1).float()], 1)[n > 0])
    ap, rank1 = torch.cat(results).double().mean(0).tolist()
    return {"mAP": ap, "rank1": rank1}


def torchreid_module(name: str):
    """A file of torchreid on its own: the package imports tensorboard, OpenCV and others that evaluation needs not."""
    found = importlib.util.find_spec("torchreid")
    if found is None:
        raise ModuleNotFoundError("torchreid")
    root = Path(found.submodule_search_locations[0])
    file = root / f"reid/metrics/{name}.py"
    file = file if file.exists() else root / f"metrics/{name}.py"
    spec = importlib.util.spec_from_file_location(f"torchreid_{name}", file)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its Cython is not built
        spec.loader.exec_module(module)
    return module


def torchreid(query, query_pids, query_camids, gallery, gallery_pids, gallery_camids):
    distance = torchreid_module("distance").compute_distance_matrix(query, gallery, "cosine").numpy()
    ids = [x.numpy() for x in (query_pids, gallery_pids, query_camids, gallery_camids)]
    cmc, ap = torchreid_module("rank").evaluate_rank(distance, *ids, max_rank=20)
    return {"mAP": float(ap), "rank1": float(cmc[0])}


def torchmetrics(query, query_pids, query_camids, gallery, gallery_pids, gallery_camids):
    from torchmetrics.functional.retrieval import retrieval_average_precision

    gallery, found = F.normalize(gallery), []
    for q, pid, camid in zip(F.normalize(query), query_pids, query_camids, strict=True):
        same = gallery_pids == pid
        keep = ~(same & (gallery_camids == camid)) & (gallery_pids != -1)
        if (same & keep).any():
            found.append(retrieval_average_precision((gallery @ q)[keep], same[keep]))
    return {"mAP": torch.stack(found).double().mean().item()}


def pytorch_metric_learning(query, query_pids, _qc, gallery, gallery_pids, _gc):
    import faiss  # noqa: F401  its nearest neighbours
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(include=("mean_average_precision",), k=len(gallery), device=torch.device("cpu"))
    calculator.get_accuracy(F.normalize(query), query_pids, F.normalize(gallery), gallery_pids)


WAYS = {
    "product alone": product,
    "this evaluator": ours,
    "full sort, torch": by_sort,
    "torchreid": torchreid,
    "torchmetrics": torchmetrics,
    "pytorch-metric-learning (other protocol)": pytorch_metric_learning,
}
PEERS = list(WAYS)[3:]


def way_title(way: str) -> str:
    if way == "torchreid":
        try:
            return f"torchreid, {'Cython' if torchreid_module('rank').IS_CYTHON_AVAI else 'numpy'}"
        except ModuleNotFoundError:
            return way
    return way


# ---- Measuring: in processes of their own ----


class Memory:
    """Highest memory of the process's own (not pages of mapped files) in a with block, minus that before; bytes."""

    def now(self) -> int:
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("RssAnon:")[1].split()[0]) * 1024
        except (OSError, IndexError):  # not Linux
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def watch(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.now())

    def __enter__(self):
        self.before = self.peak = self.now()
        self.done, self.thread = threading.Event(), threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.extra = max(self.peak, self.now()) - self.before


def work(task: dict) -> dict:
    """In a new process: the ways by turns, with their times, or one way alone, with its memory."""
    torch.set_num_threads(task["threads"])
    arrays = load(Path(task["folder"]), task["mapped"])
    small = [x[:64] for x in arrays[:3]] + [arrays[3][:512], arrays[4][:512], arrays[5][:512]]
    small[1][:], small[4][:] = 1, 1  # libraries are loaded and threads started before anything is measured
    small[2][:], small[5][:] = 1, 2
    arrays = load(Path(task["folder"]), task["mapped"])
    found = {}
    for way in task["ways"]:
        try:
            WAYS[way](*small)
            found[way] = {"seconds": []}
        except ImportError as error:
            found[way] = {"missing": f"not installed ({getattr(error, 'name', None) or error})"}
    for _ in range(task["repeats"]):
        for way, row in found.items():
            if "missing" in row or sum(row["seconds"]) > SLOW:
                continue
            if task["memory"]:  # it takes time to watch
                with Memory() as memory:
                    WAYS[way](*arrays)
                row["extra_bytes"] = memory.extra
            else:
                start = time.perf_counter()
                row["metrics"] = WAYS[way](*arrays)
                row["seconds"].append(time.perf_counter() - start)
    return found


def run(**task) -> dict:
    """work(task) in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--work", json.dumps(task)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(task["threads"])},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{', '.join(task['ways'])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def measure(size: str, dim: int, repeats: int, threads: int) -> dict:
    """All ways at one size."""
    queries, images = SIZES[size][:2]
    ways = [way for way in WAYS if way not in PEERS or images <= SIZES["market"][1]]
    result = {"size": size, "query": queries, "gallery": images, "dim": dim, "ways": {}}
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), dim, *SIZES[size])
        common = {"folder": folder, "mapped": 0, "threads": threads}
        timed = run(ways=ways, repeats=repeats, memory=False, **common)
        alone = statistics.median(timed["product alone"]["seconds"])
        for way, row in timed.items():
            if "missing" in row:
                result["ways"][way_title(way)] = row
                continue
            beside = zip(row["seconds"], timed["product alone"]["seconds"], strict=False)
            after = [total - alone for total, alone in beside]
            extra = run(ways=[way], repeats=1, memory=True, **common)[way]["extra_bytes"]
            result["ways"][way_title(way)] = {
                "seconds": spread(row["seconds"]),
                "after_product_seconds": spread(after),
                "times_product": statistics.median(row["seconds"]) / alone,
                "extra_mib": extra / MIB,
                "metrics": row["metrics"],
            }
    result["largest_difference"] = agreement(result["ways"])
    return result


def agreement(ways: dict) -> dict:
    """The largest difference of any way's mAP and rank-1 from ours; stops if they do not agree."""
    mine, differences = ways["this evaluator"]["metrics"], {}
    for way, row in ways.items():
        for key, value in (row.get("metrics") or {}).items():
            if way != "this evaluator":
                differences[f"{way}: {key}"] = abs(value - mine[key])
    if max(differences.values(), default=0.0) > 1e-5:
        raise RuntimeError(f"The evaluators do not agree: {differences}, ours {mine}")
    return differences


def curve(rows: int, dim: int, points: int, threads: int) -> list[dict]:
    """A memory-mapped gallery of growing size: our time and memory, and the product's."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), dim, 1000, rows, 750, 6, rows - min(rows // 4, 13115), 0.8)
        # the people's rows stand last: spread them, so that every size has its share
        order = np.random.default_rng(0).permutation(rows)
        for name in ("gallery_pids", "gallery_camids", "gallery"):
            table = np.load(Path(folder) / f"{name}.npy", mmap_mode="r")
            shuffled = np.lib.format.open_memmap(Path(folder) / "new.npy", "w+", table.dtype, table.shape)
            for first in range(0, rows, 65536):
                shuffled[first : first + 65536] = table[order[first : first + 65536]]
            del table, shuffled
            (Path(folder) / "new.npy").replace(Path(folder) / f"{name}.npy")
        for images in [rows >> shift for shift in reversed(range(points))]:
            task = {"folder": folder, "mapped": images, "threads": threads, "repeats": 3}
            timed = run(ways=["product alone", "this evaluator"], memory=False, **task)
            alone = run(ways=["this evaluator"], memory=True, **{**task, "repeats": 1})["this evaluator"]
            seconds = {way: statistics.median(row["seconds"]) for way, row in timed.items()}
            found.append(
                {
                    "gallery": images, "dim": dim, "query": 1000, "product_seconds": seconds["product alone"],
                    "seconds": seconds["this evaluator"], "extra_mib": alone["extra_bytes"] / MIB,
                    "mAP": timed["this evaluator"]["metrics"]["mAP"],
                }
            )  # fmt: skip
    return found


def measure_gpu(size: str, dim: int, repeats: int) -> dict:
    """The product, our evaluator and the sort on the GPU: seconds by events, peak memory of the device."""
    queries, images = SIZES[size][:2]
    result = {"size": size, "query": queries, "gallery": images, "dim": dim, "ways": {}}
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), dim, *SIZES[size])
        arrays = [array.cuda() for array in load(Path(folder))]
    before = torch.backends.cuda.matmul.allow_tf32
    cases = [(way, tf32) for way in ("product alone", "this evaluator") for tf32 in (False, True)]
    cases += [("full sort, torch", False)] if images < 100_000 else []
    seconds = {case: [] for case in cases}
    try:
        for turn in range(repeats + 2):  # two to warm up
            for way, tf32 in cases:
                torch.backends.cuda.matmul.allow_tf32 = tf32
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                memory, events = torch.cuda.memory_allocated(), [torch.cuda.Event(enable_timing=True) for _ in "ab"]
                events[0].record()
                metrics = WAYS[way](*arrays)
                events[1].record()
                torch.cuda.synchronize()
                if turn >= 2:
                    seconds[way, tf32].append(events[0].elapsed_time(events[1]) / 1000)
                    result["ways"][f"{way}, {'TF32' if tf32 else 'float32'}"] = {
                        "extra_mib": (torch.cuda.max_memory_allocated() - memory) / MIB, "metrics": metrics,
                    }  # fmt: skip
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    for (way, tf32), values in seconds.items():
        alone = statistics.median(seconds["product alone", tf32])
        row = result["ways"][f"{way}, {'TF32' if tf32 else 'float32'}"]
        row["seconds"], row["times_product"] = spread(values), statistics.median(values) / alone
        row["after_product_seconds"] = spread([value - alone for value in values])
    mine = result["ways"]["this evaluator, float32"]["metrics"]
    if result["ways"]["this evaluator, TF32"]["metrics"] != mine:
        raise RuntimeError("TF32 changed a number of ours.")
    return result


# ---- Tables ----


def table(result: dict) -> str:
    rows = []
    for way, row in result["ways"].items():
        if "missing" in row:
            rows.append([way, row["missing"]])
            continue
        seconds, after, metrics = row["seconds"], row["after_product_seconds"], row["metrics"] or {}
        rows.append(
            [
                way, f"{seconds['median']:.3f} ({seconds['min']:.3f} to {seconds['max']:.3f})",
                "" if way.startswith("product") else f"{after['median']:.3f}", f"{row['times_product']:.2f}",
                f"{row['extra_mib']:.0f}",
                *(f"{100 * metrics[key]:.4f}" if key in metrics else "" for key in ("rank1", "mAP")),
            ]
        )  # fmt: skip
    headers = ["", "seconds (min to max)", "after the product s", "x product", "extra MiB", "rank-1 %", "mAP %"]
    title = f"{result['size']}: {result['query']:,} x {result['gallery']:,} x {result['dim']:,}"
    return f"{title}\n{tabulate(rows, headers=headers, disable_numparse=True)}"


def curve_table(points: list[dict]) -> str:
    rows = [
        [f"{p['gallery']:,}", f"{p['product_seconds']:.2f}", f"{p['seconds']:.2f}", f"{p['extra_mib']:.0f}",
         f"{100 * p['mAP']:.2f}"] for p in points
    ]  # fmt: skip
    headers = ["gallery, memory-mapped", "product s", "evaluator s", "extra MiB", "mAP %"]
    title = f"{points[0]['query']:,} queries x {points[0]['dim']}"
    return f"{title}\n{tabulate(rows, headers=headers, disable_numparse=True)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", nargs="*", choices=SIZES, default=["market", "msmt17", "market500k"], help="sizes to measure")
    add("--repeats", type=int, default=7, help=f"turns of each way, fewer once it took {SLOW} s in all")
    add("--dim", type=int, default=2048, help="width of the embeddings")
    add("--curve", type=int, default=1_000_000, help="rows of the memory-mapped gallery, 512 wide; 0: no curve")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    add("--devices", nargs="+", choices=("cpu", "cuda"), default=devices, help="default: cpu, and cuda if there is one")
    add("--quick", action="store_true", help="a tenth of Market and a small curve, 2 turns")
    add("--machine", help="name of this machine in the file's name (default: that of the processor or GPU)")
    add("--out", type=Path, help="folder for the result (default: results/benchmarks)")
    add("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        print(json.dumps(work(json.loads(args.work))))
        return
    if args.quick:
        args.sizes, args.repeats, args.curve, args.dim = ["quick"], 2, min(args.curve, 16384), min(args.dim, 512)
    torch.set_num_threads(args.threads)
    payload = {"threads": args.threads, "repeats": args.repeats, "cpu": [], "curve": [], "gpu": []}
    machine = sanitised(args.machine or machine_name(args.devices[-1]))
    folder = {"folder": args.out} if args.out else {}
    for size in args.sizes if "cpu" in args.devices else []:
        payload["cpu"].append(measure(size, args.dim, args.repeats, args.threads))
        print(table(payload["cpu"][-1]), flush=True)
        worst = max(payload["cpu"][-1]["largest_difference"].values(), default=0)
        print(f"Largest difference from our mAP and rank-1: {worst:.1e}\n", flush=True)
        write_result("evaluator", payload, machine, **folder)  # what is there is kept, whatever comes
    if args.curve and "cpu" in args.devices:
        payload["curve"] = curve(args.curve, min(args.dim, 512), 5, args.threads)
        print(curve_table(payload["curve"]), "\n", flush=True)
    for size in args.sizes if "cuda" in args.devices else []:
        payload["gpu"].append(measure_gpu(size, args.dim, max(args.repeats, 5)))
        print(f"On the GPU, {table(payload['gpu'][-1])}\n", flush=True)
        write_result("evaluator", payload, machine, **folder)
    print(f"-> {write_result('evaluator', payload, machine, **folder).name}")


if __name__ == "__main__":
    main()
