"""Time and memory of utils/ranking.py beside the distance product alone, a full sort, and other evaluators.

    python benchmarks/evaluator.py                   # market, msmt17, market500k, and a memory-mapped gallery
    python benchmarks/evaluator.py --quick           # a tenth of Market, a small curve: a minute; nothing is written
    python benchmarks/evaluator.py --sizes market --repeats 5

Embeddings are generated: people with a look of their own among similar ones, cameras, bad pictures, distractors; mAP
between 0.3 and 0.9. All ways are timed by turns in one process, in float32; then each is run alone in a new process for
its memory: the highest anonymous memory while it runs, minus that before it, the embeddings loaded. "After the product"
is the time beyond that of the product in the same turn. Numbers of the same protocol are compared in the same run.

The peers are timed where they are installed, at Market size and below (they need a matrix of all distances):
torchreid (its Cython where that is built, otherwise numpy), torchmetrics' average precision per query, and
pytorch-metric-learning's calculator (needs faiss; no cameras, so another protocol and other numbers).

Prints tables and writes results/benchmarks/evaluator_MACHINE.json. On a GPU: benchmarks/gpu.py.
"""

import argparse
import importlib.util
import math
import resource
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import in_a_process, machine_name, spread, write_result  # noqa: E402
from utils.ranking import rank_metrics  # noqa: E402

SIZES = {  # query and gallery images, people, cameras, distractors, and how bad the pictures are
    "quick": (337, 1591, 75, 6, 280, 0.8),
    "market": (3368, 15913, 750, 6, 2798, 0.8),
    "msmt17": (11659, 82161, 3060, 15, 0, 1.1),
    "market500k": (3368, 515913, 750, 6, 502798, 0.8),
}
SLOW = 60  # seconds of all turns of a way, after which it gets no further one
NAMES = ("query", "query_pids", "query_camids", "gallery", "gallery_pids", "gallery_camids")


def draw(
    dim: int, queries: int, images: int, people: int, cameras: int, distractors: int, noise: float,
    device: str | torch.device = "cpu", mixed: bool = False,
):  # fmt: skip
    """Yields query and gallery: name, pids, camids and an iterator of the embeddings, a block at a time.

    mixed: every part of the gallery has its share of people; otherwise the distractors come first.
    """
    rng = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, device=device)

    def numbers(most, count):
        return torch.randint(most, (count,), generator=rng, device=device)

    looks = 0.8 * normal(40, 48)[numbers(40, people + 1)] + normal(people + 1, 48)  # families of similar people
    camera, to_embedding = 0.35 * normal(cameras, 48), normal(48, dim) / math.sqrt(48)

    def embed(pids, camids):
        for first in range(0, len(pids), 8192):
            part = slice(first, first + 8192)
            look = torch.where((pids[part] > 0)[:, None], looks[pids[part]], 1.3 * normal(len(pids[part]), 48))
            bad = noise * (0.45 * normal(len(look), 1)).exp()
            look = look + camera[camids[part]] + bad * normal(len(look), 48)
            yield torch.relu(look @ to_embedding + 0.5 + 0.3 * normal(len(look), dim))

    strangers = torch.zeros(distractors, dtype=torch.int64, device=device)
    gallery_pids = torch.cat([strangers, torch.arange(images - distractors, device=device) % people + 1]).sort()[0]
    if mixed:
        gallery_pids = gallery_pids[torch.randperm(images, generator=rng, device=device)]
    for name, pids in (("query", torch.arange(queries, device=device) % people + 1), ("gallery", gallery_pids)):
        camids = numbers(cameras, len(pids))
        yield name, pids, camids, embed(pids, camids)


def generate(folder: Path, dim: int, *size, mixed: bool = False) -> None:
    """Writes the six arrays, a block at a time; size: a value of SIZES."""
    for name, pids, camids, blocks in draw(dim, *size, mixed=mixed):
        table, first = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (len(pids), dim)), 0
        for block in blocks:
            table[first : first + len(block)] = block.numpy()
            first += len(block)
        np.save(folder / f"{name}_pids.npy", pids.numpy())
        np.save(folder / f"{name}_camids.npy", camids.numpy())


def load(folder: Path, mapped: int = 0) -> list:
    """The six arrays as tensors; mapped: that many rows of the gallery, memory-mapped instead."""
    arrays = {name: torch.from_numpy(np.load(folder / f"{name}.npy")) for name in NAMES if name != "gallery"}
    arrays["gallery"] = np.load(folder / "gallery.npy", mmap_mode="c" if mapped else None)
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
    file = root / f"reid/{name}.py"
    file = file if file.exists() else root / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"torchreid_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its Cython is not built
        spec.loader.exec_module(module)
    return module


def torchreid(query, query_pids, query_camids, gallery, gallery_pids, gallery_camids):
    distance = torchreid_module("metrics/distance").compute_distance_matrix(query, gallery, "cosine").numpy()
    ids = [x.numpy() for x in (query_pids, gallery_pids, query_camids, gallery_camids)]
    cmc, ap = torchreid_module("metrics/rank").evaluate_rank(distance, *ids, max_rank=20)
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
    "this evaluator": rank_metrics,
    "full sort, torch": by_sort,
    "torchreid": torchreid,
    "torchmetrics": torchmetrics,
    "pytorch-metric-learning (other protocol)": pytorch_metric_learning,
}
PEERS = list(WAYS)[3:]


# ---- Measuring: in processes of their own ----


class Memory:
    """Highest memory of the process's own (not pages of mapped files) in a with block, minus that before; bytes."""

    def now(self) -> int:
        try:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
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


def load_libraries(arrays: list, ways: list[str]) -> dict[str, str]:
    """Calls each way on a few rows, so that none loads or starts anything later; what is missing, by way."""
    small = [torch.as_tensor(x[:n] * 1) for x, n in zip(arrays, (64, 64, 64, 512, 512, 512), strict=True)]
    small[1][:], small[4][:], small[2][:], small[5][:] = 1, 1, 1, 2  # one person, two cameras
    missing = {}
    for way in ways:
        try:
            WAYS[way](*small)
        except ImportError as error:
            missing[way] = f"not installed ({getattr(error, 'name', None) or error})"
    return missing


def times_of(ways: list[str], folder: Path, mapped: int, repeats: int) -> dict[str, dict]:
    """The ways by turns: their seconds and metrics, or what is missing."""
    arrays = load(folder, mapped)
    found = {way: {"missing": text} for way, text in load_libraries(arrays, ways).items()}
    found |= {way: {"seconds": []} for way in ways if way not in found}
    for _ in range(repeats):
        for way in ways:
            if sum(found[way].get("seconds", [SLOW + 1])) <= SLOW:
                start = time.perf_counter()
                found[way]["metrics"] = WAYS[way](*arrays)
                found[way]["seconds"].append(time.perf_counter() - start)
    return found


def memory_of(way: str, folder: Path, mapped: int) -> float:
    """MiB of one way alone; watching takes time, so it is not timed here."""
    arrays = load(folder, mapped)
    load_libraries(arrays, [way])
    with Memory() as memory:
        WAYS[way](*arrays)
    return memory.extra / 2**20


def measure(size: str, dim: int, repeats: int) -> dict:
    """All ways at one size."""
    queries, images = SIZES[size][:2]
    ways = [way for way in WAYS if way not in PEERS or images <= SIZES["market"][1]]
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), dim, *SIZES[size])
        rows = in_a_process(times_of, ways, Path(folder), 0, repeats)
        product_seconds = rows["product alone"]["seconds"]
        for way, row in rows.items():
            if "seconds" in row:
                after = [total - alone for total, alone in zip(row["seconds"], product_seconds, strict=False)]
                row["times_product"] = median(row["seconds"]) / median(product_seconds)
                row["seconds"], row["after_product_seconds"] = spread(row["seconds"]), spread(after)
                row["extra_mib"] = in_a_process(memory_of, way, Path(folder), 0)
    return {"size": size, "query": queries, "gallery": images, "dim": dim, "ways": rows,
            "largest_difference": agreement(rows)}  # fmt: skip


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


def curve(rows: int, dim: int, points: int = 5) -> list[dict]:
    """A memory-mapped gallery of growing size: our time and memory, and the product's."""
    found, mine = [], "this evaluator"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        generate(folder, dim, 1000, rows, 750, 6, rows - min(rows // 4, 13115), 0.8, mixed=True)
        for images in [rows >> shift for shift in reversed(range(points))]:
            timed = in_a_process(times_of, ["product alone", mine], folder, images, 3)
            seconds = {way: median(row["seconds"]) for way, row in timed.items()}
            found.append({
                "gallery": images, "dim": dim, "query": 1000, "product_seconds": seconds["product alone"],
                "seconds": seconds[mine], "extra_mib": in_a_process(memory_of, mine, folder, images),
                "mAP": timed[mine]["metrics"]["mAP"],
            })  # fmt: skip
    return found


# ---- Tables ----


def table(result: dict) -> str:
    rows = []
    for way, row in result["ways"].items():
        if "missing" in row:
            rows.append([way, row["missing"]])
            continue
        seconds, metrics = row["seconds"], row["metrics"] or {}
        rows.append([
            way, f"{seconds['median']:.3f} ({seconds['min']:.3f} to {seconds['max']:.3f})",
            f"{row['after_product_seconds']['median']:.3f}", f"{row['times_product']:.2f}", f"{row['extra_mib']:.0f}",
            *(f"{100 * metrics[key]:.4f}" if key in metrics else "" for key in ("rank1", "mAP")),
        ])  # fmt: skip
    headers = ["", "seconds (min to max)", "after the product s", "x product", "extra MiB", "rank-1 %", "mAP %"]
    title = f"{result['size']}: {result['query']:,} x {result['gallery']:,} x {result['dim']:,}"
    worst = f"Largest difference from our mAP and rank-1: {max(result['largest_difference'].values(), default=0):.1e}"
    return f"{title}\n{tabulate(rows, headers=headers, disable_numparse=True)}\n{worst}\n"


def curve_table(points: list[dict]) -> str:
    rows = [[f"{p['gallery']:,}", f"{p['product_seconds']:.2f}", f"{p['seconds']:.2f}", f"{p['extra_mib']:.0f}",
             f"{100 * p['mAP']:.2f}"] for p in points]  # fmt: skip
    headers = ["gallery, memory-mapped", "product s", "evaluator s", "extra MiB", "mAP %"]
    title = f"{points[0]['query']:,} queries x {points[0]['dim']}"
    return f"{title}\n{tabulate(rows, headers=headers, disable_numparse=True)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", nargs="*", choices=SIZES, default=["market", "msmt17", "market500k"], help="sizes to measure")
    add("--repeats", type=int, default=7, help=f"turns of each way, fewer once it took {SLOW} s in all")
    add("--dim", type=int, default=2048, help="width of the embeddings")
    add("--curve", type=int, default=1_000_000, help="rows of the memory-mapped gallery, 512 wide; 0: no curve")
    add("--quick", action="store_true", help="a tenth of Market and a small curve, 2 turns")
    add("--machine", help="name of this machine in the file's name (default: that of the processor)")
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.repeats, args.curve, args.dim = ["quick"], 2, min(args.curve, 16384), min(args.dim, 512)
    payload = {"threads": torch.get_num_threads(), "repeats": args.repeats, "cpu": [], "curve": []}
    for size in args.sizes:
        payload["cpu"].append(measure(size, args.dim, args.repeats))
        print(table(payload["cpu"][-1]), flush=True)
        if not args.quick:  # what is there is kept, whatever comes
            write_result("evaluator", payload, args.machine or machine_name())
    if args.curve:
        payload["curve"] = curve(args.curve, min(args.dim, 512))
        print(curve_table(payload["curve"]))
    if not args.quick:
        print(f"-> {write_result('evaluator', payload, args.machine or machine_name()).name}")


if __name__ == "__main__":
    main()
