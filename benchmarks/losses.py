"""Time and memory of each loss, beside pytorch-metric-learning and as a share of a training step of ResNet-50.

    python benchmarks/losses.py            # batch 32, 64, 128, 160 x 2048; 751 and 10,000 classes; CPU, GPU if present
    python benchmarks/losses.py --quick    # batch 64, 751 classes, fewer repeats
    python benchmarks/losses.py --show results/benchmarks/losses_MACHINE.json    # the table of losses/README.md

Forward and backward of the loss alone, float32, on random non-negative embeddings of length 30: the median of the
repeats with its quartiles, ours and the peer's by turns in the same run. Peak memory: what the step allocates on top
of embeddings and parameters, gradients included. pytorch-metric-learning (pip install pytorch-metric-learning) is timed
where it defines the same loss; tests/test_losses_peers.py checks that. The step of ResNet-50 is forward, backward and
Adam on ready 256x128 images, batch 64, channels_last, without a loss.

Prints a table and writes results/benchmarks/losses_MACHINE.json, with the commit.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, which holds a losses.py of its own

from benchmarks.machine import machine_name, write_result  # noqa: E402
from losses import ROWS, build_loss, parse_expression  # noqa: E402
from models import build_model  # noqa: E402

K = 4  # images per identity in a batch


def peer_loss(name: str, num_classes: int, embedding_dim: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """pytorch-metric-learning's loss(embeddings, labels) that equals ours with its defaults; None if it has none.

    How its parameters map: triplet: BatchHardMiner, distances not normalised, mean over all triplets. npair: dot
    products not normalised, no penalty (ours: l2=0), the pairs given, as it would draw them at random. sphereface:
    scale 1, lambda 0. arcface, subcenter_arcface: the margin in degrees. histogram: n_bins. circle: gamma is our scale,
    proxy_anchor: alpha is. circle and supcon: with the default reducer. Class weights are (D, C), ours transposed, but
    for proxies. Its SmoothAPLoss is another one: an anchor is in its own list.
    """
    from pytorch_metric_learning import distances, losses, miners, reducers

    sizes = {"num_classes": num_classes, "embedding_size": embedding_dim}
    if name == "triplet":
        distance = distances.LpDistance(normalize_embeddings=False)
        miner = miners.BatchHardMiner(distance=distance)
        loss_fn = losses.TripletMarginLoss(margin=0.3, distance=distance, reducer=reducers.MeanReducer())
        return lambda embeddings, labels: loss_fn(embeddings, labels, miner(embeddings, labels))
    if name == "npair":
        loss_fn = losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False))
        return lambda embeddings, labels: loss_fn(embeddings, labels, first_pairs(labels))
    if name == "histogram":
        return losses.HistogramLoss(n_bins=150)
    if name == "multi_similarity":
        miner = miners.MultiSimilarityMiner(epsilon=0.1)
        loss_fn = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
        return lambda embeddings, labels: loss_fn(embeddings, labels, miner(embeddings, labels))
    if name == "sphereface":
        return losses.SphereFaceLoss(margin=4, scale=1, **sizes)
    if name == "cosface":
        return losses.CosFaceLoss(margin=0.35, scale=30, **sizes)
    if name == "arcface":
        return losses.ArcFaceLoss(margin=0.5 * 180 / torch.pi, scale=64, **sizes)
    if name == "circle":
        return losses.CircleLoss(m=0.25, gamma=128)
    if name == "supcon":
        return losses.SupConLoss(temperature=0.1)
    if name == "proxy_anchor":
        return losses.ProxyAnchorLoss(margin=0.1, alpha=32, **sizes)
    if name == "subcenter_arcface":
        return losses.SubCenterArcFaceLoss(margin=0.5 * 180 / torch.pi, scale=64, sub_centers=3, **sizes)
    return None


def first_pairs(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first two images of each identity, as the (anchors, positives, none, none) that a miner would return."""
    same = labels[:, None] == labels
    earlier = same.tril(diagonal=-1).sum(dim=1)
    anchors = ((earlier == 0) & (same.sum(dim=1) > 1)).nonzero()[:, 0]
    positives = (same & (earlier == 1))[anchors].int().argmax(dim=1)
    nothing = anchors[:0]
    return anchors, positives, nothing, nothing


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(steps: list[Callable[[], None]], device: torch.device, repeats: int) -> list[dict[str, float]]:
    """Median and quartiles of each step's time; the steps take turns, so that all see the same machine."""
    times: list[list[float]] = [[] for _ in steps]
    for repeat in range(-3, repeats):  # three rounds to warm up
        for step, own in zip(steps, times, strict=True):
            if device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(10**7)  # some ms, in which the step is queued: else Python's time would be measured
                begin.record()
                step()
                end.record()
                end.synchronize()
                elapsed = begin.elapsed_time(end)
            else:
                start = time.perf_counter()
                step()
                elapsed = 1000 * (time.perf_counter() - start)
            if repeat >= 0:
                own.append(elapsed)
    quartiles = [statistics.quantiles(own, n=4, method="inclusive") for own in times]
    return [{"q1": round(low, 4), "median": round(mid, 4), "q3": round(high, 4)} for low, mid, high in quartiles]


def peak_mib(step: Callable[[], None], device: torch.device) -> float:
    """The most memory that a step holds at once on top of what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


def one_step(loss_fn: Callable, embeddings: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward and backward from no gradients."""
    parameters = list(loss_fn.parameters()) if isinstance(loss_fn, nn.Module) else []

    def step() -> None:
        for tensor in (embeddings, *parameters):
            tensor.grad = None
        loss_fn(embeddings, labels).backward()

    return step


def free(embeddings: Tensor, loss_fn: Callable) -> None:
    """Drops the gradients, so that the next step's are counted as its own."""
    for tensor in (embeddings, *(loss_fn.parameters() if isinstance(loss_fn, nn.Module) else ())):
        tensor.grad = None


def time_losses(device: torch.device, args: argparse.Namespace, with_peer: bool) -> list[dict]:
    rows = []
    for batch_size in args.batch_sizes:
        for num_classes in args.num_classes:
            generator = torch.Generator().manual_seed(0)
            embeddings = torch.rand(batch_size, args.embedding_dim, generator=generator)
            embeddings = (30 * F.normalize(embeddings)).to(device).requires_grad_()
            labels = (torch.arange(batch_size) // K).to(device)
            for expression in (*ROWS, "center"):
                names = [name for name, _ in parse_expression(expression)]
                loss_fn = build_loss(expression, num_classes, args.embedding_dim).to(device)
                has_classes = bool(loss_fn.state_dict())
                if not has_classes and num_classes != args.num_classes[0]:
                    continue  # the same as with the first number of classes
                functions = [loss_fn]
                if with_peer and (peer := peer_loss(names[0], num_classes, args.embedding_dim)) and len(names) == 1:
                    functions.append(peer.to(device) if isinstance(peer, nn.Module) else peer)
                steps = [one_step(function, embeddings, labels) for function in functions]
                times = milliseconds(steps, device, args.repeats)
                peaks = []
                for function, step in zip(functions, steps, strict=True):
                    free(embeddings, function)
                    peaks.append(round(peak_mib(step, device), 2))
                row = {"device": device.type, "loss": expression, "batch_size": batch_size,
                       "num_classes": num_classes if has_classes else None,
                       "milliseconds": times[0], "peak_mib": peaks[0]}  # fmt: skip
                if len(functions) == 2:
                    row |= {"peer_milliseconds": times[1], "peer_peak_mib": peaks[1]}
                rows.append(row)
                print(f"\r{device.type} {batch_size} {num_classes} {expression:20}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return rows


def time_network(device: torch.device, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step of the backbone alone at batch 64, by precision."""
    images = torch.randn(args.network_batch, 3, args.height, args.width, device=device)
    images = images.to(memory_format=torch.channels_last)
    times = {}
    for name, amp in (("float32", False), ("bfloat16", True)):
        model = build_model(args.arch).to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=5e-4, fused=True)
        gradient = torch.randn(len(images), model.embedding_dim, device=device)

        def step(model=model, optimizer=optimizer, gradient=gradient, amp=amp) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                embeddings = model(images)
            embeddings.backward(gradient)
            optimizer.step()

        (times[name],) = milliseconds([step], device, args.network_repeats)
    return times


def table(rows: list[dict], network: dict[str, dict[str, dict[str, float]]], network_batch: int) -> str:
    lines = []
    for row in rows:
        ours, peer = row["milliseconds"], row.get("peer_milliseconds")
        steps = network.get(row["device"], {}) if row["batch_size"] == network_batch else {}
        shares = [f"{100 * ours['median'] / steps[key]['median']:.2f} %" if steps else ""
                  for key in ("float32", "bfloat16")]  # fmt: skip
        lines.append([
            row["device"], row["batch_size"], row["num_classes"] or "", row["loss"],
            f"{ours['median']:.2f} ({ours['q1']:.2f}-{ours['q3']:.2f})",
            f"{peer['median']:.2f} ({peer['q1']:.2f}-{peer['q3']:.2f})" if peer else "",
            f"{ours['median'] / peer['median']:.2f}" if peer else "",
            f"{row['peak_mib']:.1f}", f"{row['peer_peak_mib']:.1f}" if peer else "", *shares,
        ])  # fmt: skip
    headers = ["device", "batch", "classes", "loss", "ms (quartiles)", "PML ms", "ratio", "MiB", "PML MiB",
               "of a float32 step", "of a bfloat16 step"]  # fmt: skip
    return tabulate(lines, headers, disable_numparse=True)


def readme_table(result: dict) -> str:
    """What losses/README.md shows of a recorded file: batches of 64 and 160, 751 classes, on the CPU."""
    head = "| loss | batch | ms | pytorch-metric-learning, ms | MiB | pytorch-metric-learning, MiB |"
    lines = [head, "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        if row["device"] != "cpu" or row["num_classes"] not in (None, 751) or row["batch_size"] not in (64, 160):
            continue
        ours, peer = row["milliseconds"]["median"], row.get("peer_milliseconds")
        cells = [f"`{row['loss']}`", row["batch_size"], f"{ours:.2g}", f"{peer['median']:.2g}" if peer else "",
                 f"{row['peak_mib']:.1f}", f"{row['peer_peak_mib']:.1f}" if peer else ""]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="batch 64, 751 classes, few repeats, where no other flag says otherwise")
    add("--batch-sizes", type=int, nargs="+", help="default: 32 64 128 160")
    add("--num-classes", type=int, nargs="+", help="default: 751 10000")
    add("--embedding-dim", type=int, default=2048, help="width of the embeddings (default: 2048)")
    add("--devices", nargs="+", help="default: cpu, and cuda if there is one")
    add("--repeats", type=int, help="timed rounds of each loss (default: 30)")
    add("--threads", type=int, help="threads on the CPU (default: torch's)")
    add("--arch", default="resnet50", help="backbone of the training step, or none")
    add("--height", type=int, default=256, help="pixels, of the training step's images (default: 256)")
    add("--width", type=int, default=128, help="the same (default: 128)")
    add("--network-batch", type=int, default=64, help="batch size of the training step")
    add("--network-repeats", type=int, help="timed training steps (default: 5)")
    add("--machine", help="name of this machine in the file (default: that of the processor or GPU)")
    add("--show", type=Path, metavar="FILE", help="print the table of losses/README.md of a recorded file, and stop")
    add("--out", type=Path, default=ROOT / "results" / "benchmarks", help="folder of the JSON file")
    args = parser.parse_args(argv)
    if args.show:
        print(readme_table(json.loads(args.show.read_text(encoding="utf-8"))))
        return
    args.batch_sizes = args.batch_sizes or ([64] if args.quick else [32, 64, 128, 160])
    args.num_classes = args.num_classes or ([751] if args.quick else [751, 10_000])
    args.repeats = args.repeats or (10 if args.quick else 30)
    args.network_repeats = args.network_repeats or (3 if args.quick else 5)
    if args.threads:
        torch.set_num_threads(args.threads)
    devices = [torch.device(name) for name in args.devices or ["cpu", *["cuda"] * torch.cuda.is_available()]]

    try:
        import pytorch_metric_learning

        peer_version = pytorch_metric_learning.__version__
    except ImportError:
        peer_version = None
        print("pytorch-metric-learning is not installed: its columns stay empty", file=sys.stderr)

    rows, network = [], {}
    torch.backends.cudnn.benchmark = True  # as in train.py
    for device in devices:
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # events and memory are those of the current device
        rows += time_losses(device, args, with_peer=peer_version is not None)
        if args.arch != "none":
            network[device.type] = time_network(device, args)
        synchronize(device)
    print(table(rows, network, args.network_batch))
    for device, times in network.items():
        shown = ", ".join(f"{name} {value['median']:.0f} ms" for name, value in times.items())
        print(f"{args.arch} {args.height}x{args.width}, batch {args.network_batch}, on {device}: {shown} a step")

    result = {
        "threads": torch.get_num_threads(),
        "pytorch_metric_learning": peer_version, "embedding_dim": args.embedding_dim, "images_per_identity": K,
        "repeats": args.repeats, "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32, "rows": rows,
        "network": {"arch": args.arch, "height": args.height, "width": args.width, "batch_size": args.network_batch,
                    "repeats": args.network_repeats, "milliseconds": network},
    }  # fmt: skip
    write_result("losses", result, args.machine or machine_name(devices[-1]), args.out)


if __name__ == "__main__":
    main()
