"""Time and memory of utils/reranking.py beside its distance products alone, a dense form, and torchreid's.

    python benchmarks/reranking.py                   # a quarter, a half and all of Market, and MSMT17
    python benchmarks/reranking.py --quick           # a tenth of Market: half a minute, nothing is written
    python benchmarks/reranking.py --sizes market --repeats 5
    python benchmarks/reranking.py --device cuda

k1 = 20, k2 = 6, lambda = 0.3, cosine, float32; the generated embeddings of benchmarks/evaluator.py. All ways by turns
in one process; then each alone in a new process for its memory, the highest while it runs minus that before it, with
the embeddings loaded (on a GPU: memory of the device). The product alone is what any way must compute: each distance
of two images once, and those of queries and gallery again, since they are not kept.

The dense forms hold several matrices of all images x all images and are run up to Market size, on a CPU:
torchreid's (its wheel's file alone, if it is installed: NumPy; it squares what it is given, so it gets distances that
are not squared yet, as in the authors' code), and one in PyTorch, typed from the definition.

mAP, and the distances of each query's first 100 places, are compared with ours in the same run. Where two distances
are equal but for float32's error, the order is open, and a few queries may differ.

Prints tables and writes results/benchmarks/reranking_MACHINE.json.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import evaluator  # noqa: E402
from benchmarks.machine import in_a_process, machine_name, peak_mib, spread, write_result  # noqa: E402
from utils.ranking import average, rank_queries_from_distance  # noqa: E402
from utils.reranking import rerank  # noqa: E402

SIZES = {  # as in benchmarks/evaluator.py: query and gallery images, people, cameras, distractors, how bad they are
    "quick": evaluator.SIZES["quick"],
    "market/4": (842, 3978, 188, 6, 700, 0.8),
    "market/2": (1684, 7957, 375, 6, 1399, 0.8),
    "market": evaluator.SIZES["market"],
    "msmt17": evaluator.SIZES["msmt17"],
}
SLOW = 60  # seconds of all turns of a way, after which it gets no further one
PLACES = 100  # the first places whose distances are compared

# ---- The ways: functions of query (Q, D) and gallery (G, D); iterators over (slice of queries, distances) ----


def product(query, gallery):
    """The products of `rerank` at its block, and nothing else."""
    images = torch.cat([F.normalize(query), F.normalize(gallery)])
    block = 4096 if query.is_cuda else 2048
    for first in range(0, len(images), block):
        for other in range(first, len(images), block):
            images[first : first + block] @ images[other : other + block].T
    size = block * block // len(gallery)
    for first in range(0, len(query), size):
        images[first : min(first + size, len(query))] @ images[len(query) :].T
        yield slice(first, first + size), None


def dense(query, gallery, k1=20, k2=6, lambda_=0.3):
    """The definition with whole matrices, and a loop over the images."""
    images = torch.cat([F.normalize(query), F.normalize(gallery)])
    distance = (images @ images.T).mul_(-2).add_(2).clamp_(min=0).fill_diagonal_(0)  # (A, A)
    distance /= distance.amax(1)[:, None]
    order = distance.argsort(1)[:, : max(k1 + 1, k2)]

    def reciprocal(i, k):
        near = order[i, : k + 1]
        return near[(order[near, : k + 1] == i).any(1)]

    half = [reciprocal(i, round(k1 / 2)) for i in range(len(images))]
    v = torch.zeros_like(distance)  # (A, A)
    for i in range(len(images)):
        own = reciprocal(i, k1)
        more = [half[j] for j in own.tolist() if 3 * int(torch.isin(half[j], own).sum()) > 2 * len(half[j])]
        members = torch.cat([own, *more]).unique()
        v[i, members] = (-distance[i, members]).softmax(0)
    v = torch.cat([v[near].mean(1) for near in order[:, :k2].split(64)])
    result = distance[: len(query), len(query) :].mul_(lambda_)
    for i, row in enumerate(v[: len(query)]):
        entries = row.nonzero().squeeze(1)
        s = torch.minimum(row[entries], v[len(query) :, entries]).sum(1)
        result[i] += (1 - lambda_) * (1 - s / (2 - s))
    yield slice(0, len(query)), result


def torchreid(query, gallery):
    module = evaluator.torchreid_module("utils/rerank")
    query, gallery = F.normalize(query), F.normalize(gallery)
    pairs = (query, gallery), (query, query), (gallery, gallery)
    tables = [(x @ y.T).mul_(-2).add_(2).clamp_(min=0).sqrt_() for x, y in pairs]
    for table in tables[1:]:
        table.fill_diagonal_(0)
    yield slice(0, len(query)), torch.from_numpy(module.re_ranking(*(table.numpy() for table in tables)))


WAYS = {"products alone": product, "this re-ranking": rerank, "dense, PyTorch": dense, "torchreid, NumPy": torchreid}
DENSE = ("dense, PyTorch", "torchreid, NumPy")


# ---- Measuring: in processes of their own ----


def timed(way: str, arrays: list, scored: bool = True) -> dict:
    """Seconds and seconds of processors of a way, scoring not counted; metrics and the first distances if scored."""
    query, query_pids, query_camids, gallery, gallery_pids, gallery_camids = arrays
    seconds, cpu_seconds, results, first = 0.0, 0.0, [], []
    blocks = iter(WAYS[way](query, gallery))
    while True:
        start, cpu_start = time.perf_counter(), time.process_time()
        block = next(blocks, None)
        if query.is_cuda:
            torch.cuda.synchronize()
        seconds, cpu_seconds = seconds + time.perf_counter() - start, cpu_seconds + time.process_time() - cpu_start
        if block is None:
            break
        here, distance = block
        if scored and distance is not None:
            ids = query_pids[here], query_camids[here], gallery_pids, gallery_camids
            results.append(rank_queries_from_distance(distance, *ids))
            first.append(distance.topk(min(PLACES, distance.shape[1]), largest=False).values.sort(1)[0].cpu())
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    if results:
        metrics = average({key: torch.cat([part[key] for part in results]) for key in results[0]})
        found["metrics"] = {key: metrics[key] for key in ("rank1", "mAP")}
        found["first"] = torch.cat(first)  # (Q, 100)
    return found


def times_of(ways: list[str], folder: Path, device: str, repeats: int) -> dict[str, dict]:
    """The ways by turns, with their times and numbers, or what is missing."""
    arrays = [array.to(device) for array in evaluator.load(folder)]
    found, first = {}, {}
    for way in ways:
        try:
            timed(way, [array[:300] for array in arrays], scored=False)  # libraries are loaded, threads started
            found[way] = {"seconds": [], "cpu_seconds": []}
        except ImportError as error:
            found[way] = {"missing": f"not installed ({getattr(error, 'name', None) or error})"}
    warm_up = device != "cpu"
    for turn in range(repeats + warm_up):
        for way, row in found.items():
            if "missing" in row or sum(row["seconds"]) > SLOW:
                continue
            result = timed(way, arrays, scored=turn == 0)
            if turn == 0 and "metrics" in result:
                row["metrics"], first[way] = result["metrics"], result["first"]
            if turn >= warm_up:
                row["seconds"].append(result["seconds"])
                row["cpu_seconds"].append(result["cpu_seconds"])
    mine = first["this re-ranking"]
    for way, theirs in first.items():
        found[way]["queries_that_differ"] = int(((theirs - mine).abs().amax(1) > 1e-6).sum())
    return found


def memory_of(way: str, folder: Path, device: str) -> float:
    """GiB of one way alone."""
    arrays = [array.to(device) for array in evaluator.load(folder)]
    timed(way, [array[:300] for array in arrays], scored=False)
    if device != "cpu":
        return peak_mib(lambda: timed(way, arrays, scored=False), torch.device(device)) / 2**10
    with evaluator.Memory() as memory:
        timed(way, arrays, scored=False)
    return memory.extra / 2**30


def measure(size: str, device: str = "cpu", repeats: int = 3, dim: int = 2048, chosen=tuple(WAYS)) -> dict:
    """A row of results for one of SIZES on "cpu" or "cuda"."""
    queries, images = SIZES[size][:2]
    ways = [way for way in chosen if way not in DENSE or (device == "cpu" and images <= SIZES["market"][1])]
    with tempfile.TemporaryDirectory() as folder:
        evaluator.generate(Path(folder), dim, *SIZES[size])
        rows = in_a_process(times_of, ways, Path(folder), device, repeats)
        for way, row in rows.items():
            if "seconds" in row:
                row["extra_gib"] = in_a_process(memory_of, way, Path(folder), device)
                row["seconds"], row["cpu_seconds"] = spread(row["seconds"]), spread(row["cpu_seconds"])
    mine = rows["this re-ranking"]
    for row in rows.values():
        if "seconds" in row:
            row["times_ours"] = row["seconds"]["median"] / mine["seconds"]["median"]
    return {"size": size, "query": queries, "gallery": images, "dim": dim, "device": device, "ways": rows}


# ---- Tables ----


def table(result: dict) -> str:
    rows = []
    for way, row in result["ways"].items():
        if "missing" in row:
            rows.append([way, row["missing"]])
            continue
        seconds, metrics = row["seconds"], row.get("metrics", {})
        rows.append(
            [
                way, f"{seconds['median']:.3f} ({seconds['min']:.3f} to {seconds['max']:.3f})",
                f"{row['cpu_seconds']['median']:.2f}", f"{row['times_ours']:.2f}", f"{row['extra_gib']:.2f}",
                *(f"{100 * metrics[key]:.4f}" if key in metrics else "" for key in ("rank1", "mAP")),
                f"{row['queries_that_differ']} of {result['query']}" if metrics else "",
            ]
        )  # fmt: skip
    headers = ["", "seconds (min to max)", "of processors", "x ours", "extra GiB", "rank-1 %", "mAP %",
               f"queries whose first {PLACES} differ by 1e-6"]  # fmt: skip
    title = f"{result['size']} on {result['device']}: {result['query']:,} x {result['gallery']:,} x {result['dim']:,}"
    return f"{title}\n{tabulate(rows, headers=headers, disable_numparse=True)}"


def verdict(result: dict) -> str:
    """One line: the targets that the size and the device have."""
    mine, peer = result["ways"]["this re-ranking"], result["ways"].get("torchreid, NumPy", {})
    parts = []
    if result["size"] == "market" and "seconds" in peer:
        share = mine["seconds"]["median"] / peer["seconds"]["median"]
        parts.append(f"{share:.2f} of torchreid's time (target 0.25, {'met' if share <= 0.25 else 'MISSED'})")
    if result["size"] == "market" and result["device"] != "cpu":
        seconds = mine["seconds"]["median"]
        parts.append(f"{seconds:.2f} s (target 1 s, {'met' if seconds < 1 else 'MISSED'})")
    target = {"market": 1, "msmt17": 4}.get(result["size"]) if result["device"] == "cpu" else None
    if target:
        met = "met" if mine["extra_gib"] < target else "MISSED"
        parts.append(f"{mine['extra_gib']:.2f} GiB (target {target} GiB, {met})")
    return f"{result['size']}: {', '.join(parts)}" if parts else ""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    default = [size for size in SIZES if size != "quick"]
    add("--sizes", nargs="+", choices=SIZES, default=default, help="sizes to measure")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ours must be among them (default: all)")
    add("--repeats", type=int, default=3, help=f"turns of each way, fewer once it took {SLOW} s in all")
    add("--dim", type=int, default=2048, help="width of the embeddings")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    add("--quick", action="store_true", help="a tenth of Market, one turn; writes nothing")
    add("--machine", help="name of this machine in the file's name (default: that of the processor or GPU)")
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.repeats, args.dim = ["quick"], 1, min(args.dim, 512)
    payload = {"threads": torch.get_num_threads(), "repeats": args.repeats, "results": []}
    for size in args.sizes:
        payload["results"].append(measure(size, args.device, args.repeats, args.dim, args.ways))
        print(table(payload["results"][-1]), "\n", flush=True)
        if not args.quick:  # what is there is kept, whatever comes
            path = write_result("reranking", payload, args.machine or machine_name(args.device))
    print("\n".join(filter(None, map(verdict, payload["results"]))))
    if not args.quick:
        print(f"-> {path.name}")


if __name__ == "__main__":
    main()
