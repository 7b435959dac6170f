"""What a coarser distance product would change: in which digit of which metric, for evaluators that trust it.

    python benchmarks/precision.py             # Market size
    python benchmarks/precision.py --size quick

Cosine similarities of generated embeddings (those of benchmarks/evaluator.py) are computed as a full matrix in several
ways, and each matrix is ranked as it is. utils/ranking.py is the truth: it compares close calls again in float64.

float32                  the plain product (never TF32)
TF32, bfloat16           vectors of length 1 rounded to 11 and 8 significant bits, multiplied and summed in float32, as
                         tensor cores do
3 x TF32, 3 x bfloat16   float32 emulated on tensor cores: each vector as the sum of two rounded ones,
                         high * high + high * low + low * high

On a CPU rounding is emulated, which says nothing about speed; on a GPU the products are those of the tensor cores, and
are timed (torch 2.8 or newer). Prints a table and writes results/benchmarks/precision_MACHINE.json.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.evaluator import SIZES, generate, load  # noqa: E402
from benchmarks.machine import machine_name, write_result  # noqa: E402
from utils.ranking import metrics_from_distance, rank_metrics  # noqa: E402

METRICS = ("rank1", "mAP", "mINP")


def round_mantissa(values: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 values rounded to the nearest with that many significant bits (float32 has 24, TF32 11, bfloat16 8)."""
    drop = 24 - bits
    whole = values.contiguous().view(torch.int32)
    return ((whole + (1 << (drop - 1))) & -(1 << drop)).view(torch.float32)


def multiply(query: torch.Tensor, gallery: torch.Tensor, bits: int) -> torch.Tensor:
    """query @ gallery.T of values that have that many significant bits, with float32 sums."""
    if not query.is_cuda or bits == 24:
        return query @ gallery.T
    if bits == 11:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return query @ gallery.T
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    return torch.mm(query.bfloat16(), gallery.bfloat16().T, out_dtype=torch.float32)


def similarities(query: torch.Tensor, gallery: torch.Tensor, bits: int, products: int) -> torch.Tensor:
    """(Q, G) from embeddings of length 1, (Q, D) and (G, D), in one product or three."""
    if bits == 24:
        return multiply(query, gallery, 24)
    high = round_mantissa(query, bits), round_mantissa(gallery, bits)
    if products == 1:
        return multiply(*high, bits)
    low = round_mantissa(query - high[0], bits), round_mantissa(gallery - high[1], bits)
    small = multiply(high[0], low[1], bits) + multiply(low[0], high[1], bits)  # summed first: less is rounded away
    return small + multiply(*high, bits)


WAYS = {"float32": (24, 1), "TF32": (11, 1), "bfloat16": (8, 1), "3 x TF32": (11, 3), "3 x bfloat16": (8, 3)}


def seconds_on_gpu(query: torch.Tensor, gallery: torch.Tensor, bits: int, products: int) -> float:
    """Median of ten, by events, of the whole matrix: rounding and products."""
    found = []
    for turn in range(13):
        events = [torch.cuda.Event(enable_timing=True) for _ in "ab"]
        events[0].record()
        similarities(query, gallery, bits, products)
        events[1].record()
        torch.cuda.synchronize()
        if turn >= 3:
            found.append(events[0].elapsed_time(events[1]) / 1000)
    return statistics.median(found)


def measure(arrays: list[torch.Tensor]) -> dict:
    """Per way: the error of a similarity, the changes of the metrics, on a GPU the seconds of the product."""
    query, query_pids, query_camids, gallery, gallery_pids, gallery_camids = arrays
    exact = rank_metrics(*arrays)
    query, gallery = F.normalize(query), F.normalize(gallery)
    some = torch.arange(0, len(query), max(1, len(query) // 64), device=query.device)
    truth = query[some].double() @ gallery.double().T
    result = {"exact": {key: exact[key] for key in METRICS}, "ways": {}}
    for way, (bits, products) in WAYS.items():
        distance = similarities(query, gallery, bits, products).neg_()
        error = (distance[some].double() + truth).abs().max().item()
        metrics = metrics_from_distance(distance, query_pids, query_camids, gallery_pids, gallery_camids)
        row = {"largest_error": error, "change": {key: metrics[key] - exact[key] for key in METRICS}}
        if query.is_cuda:
            row["product_seconds"] = seconds_on_gpu(query, gallery, bits, products)
        result["ways"][way] = row
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=("quick", "market"), default="market", help="number of images")
    add("--dim", type=int, default=2048, help="width of the embeddings")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default: cuda if there is one")
    add("--out", type=Path, help="folder for the result (default: results/benchmarks)")
    args = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    queries, images = SIZES[args.size][:2]
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), args.dim, *SIZES[args.size])
        arrays = [array.to(args.device) for array in load(Path(folder))]
    result = measure(arrays)
    table = [
        [way, f"{row['largest_error']:.1e}", *(f"{100 * row['change'][key]:+.5f}" for key in METRICS),
         *([f"{1000 * row['product_seconds']:.2f}"] if "product_seconds" in row else [])]
        for way, row in result["ways"].items()
    ]  # fmt: skip
    headers = ["product", "largest error", *(f"{key}, points" for key in METRICS)]
    headers += ["ms on the GPU"] * (args.device == "cuda")
    exact = ", ".join(f"{key} {100 * value:.4f} %" for key, value in result["exact"].items())
    print(f"{args.size}: {queries:,} x {images:,} x {args.dim:,}; exact: {exact}")
    print(tabulate(table, headers=headers, disable_numparse=True))
    payload = {"size": args.size, "query": queries, "gallery": images, "dim": args.dim, "device": args.device, **result}
    folder = {"folder": args.out} if args.out else {}
    print(f"-> {write_result('precision', payload, machine_name(args.device), **folder).name}")


if __name__ == "__main__":
    main()
