"""Time and memory of each loss, beside pytorch-metric-learning and as a share of a training step of ResNet-50.

    python benchmarks/losses.py            # batch 32, 64, 128, 160 x 2048; 751 and 10,000 classes
    python benchmarks/losses.py --quick    # batch 64, 751 classes, fewer repeats

Forward and backward of the loss alone, float32, on random non-negative embeddings of length 30: the median of the
repeats with its quartiles, ours and the peer's by turns in the same run. Peak memory: what the step allocates on top
of embeddings and parameters, gradients included. pytorch-metric-learning (pip install pytorch-metric-learning) is timed
where it defines the same loss; tests/test_losses_peers.py checks that. The step of ResNet-50 is forward, backward and
Adam on ready 256x128 images, batch 64, channels_last, without a loss.

Prints a table and writes results/benchmarks/losses_MACHINE.json, with the commit.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, which holds a losses.py of its own

from benchmarks.machine import RESULTS, machine_name, milliseconds, peak_mib, write_result  # noqa: E402
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


def by_turns(steps: list[Callable[[], None]], device: torch.device, repeats: int) -> list[dict[str, float]]:
    """Median and quartiles of each step's milliseconds; the steps take turns, so that all see the same machine."""
    times: list[list[float]] = [[] for _ in steps]
    for repeat in range(-3, repeats):  # three rounds to warm up
        for step, own in zip(steps, times, strict=True):
            if device.type == "cuda":
                torch.cuda._sleep(10**7)  # some ms, in which the step is queued: else Python's time would be measured
            elapsed = milliseconds(step, device)
            if repeat >= 0:
                own.append(elapsed)
    quartiles = [statistics.quantiles(own, n=4, method="inclusive") for own in times]
    return [{"q1": round(low, 4), "median": round(mid, 4), "q3": round(high, 4)} for low, mid, high in quartiles]


def one_step(loss_fn: Callable, embeddings: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward and backward, from no gradients to none, so that their memory is the step's own."""
    parameters = list(loss_fn.parameters()) if isinstance(loss_fn, nn.Module) else []

    def step() -> None:
        loss_fn(embeddings, labels).backward()
        for tensor in (embeddings, *parameters):
            tensor.grad = None

    return step


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
                times = by_turns(steps, device, args.repeats)
                peaks = [round(peak_mib(step, device), 2) for step in steps]
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

        (times[name],) = by_turns([step], device, args.network_repeats)
    return times


def table(rows: list[dict], network: dict[str, dict[str, float]], network_batch: int) -> str:
    lines = []
    for row in rows:
        ours, peer = row["milliseconds"], row.get("peer_milliseconds")
        shares = [f"{100 * ours['median'] / step['median']:.2f} %" if row["batch_size"] == network_batch else ""
                  for step in network.values()]  # fmt: skip
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="batch 64, 751 classes, few repeats, where no other flag says otherwise")
    add("--batch-sizes", type=int, nargs="+", help="default: 32 64 128 160")
    add("--num-classes", type=int, nargs="+", help="default: 751 10000")
    add("--embedding-dim", type=int, default=2048, help="width of the embeddings (default: 2048)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one")  # fmt: skip
    add("--repeats", type=int, help="timed rounds of each loss (default: 30)")
    add("--arch", default="resnet50", help="backbone of the training step (default: resnet50)")
    add("--height", type=int, default=256, help="pixels, of the training step's images (default: 256)")
    add("--width", type=int, default=128, help="the same (default: 128)")
    add("--network-batch", type=int, default=64, help="batch size of the training step")
    add("--network-repeats", type=int, help="timed training steps (default: 5)")
    add("--machine", help="name of this machine in the file (default: that of the processor or GPU)")
    add("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args(argv)
    args.batch_sizes = args.batch_sizes or ([64] if args.quick else [32, 64, 128, 160])
    args.num_classes = args.num_classes or ([751] if args.quick else [751, 10_000])
    args.repeats = args.repeats or (10 if args.quick else 30)
    args.network_repeats = args.network_repeats or (3 if args.quick else 5)
    device = torch.device(args.device)

    try:
        import pytorch_metric_learning

        peer_version = pytorch_metric_learning.__version__
    except ImportError:
        peer_version = None
        print("pytorch-metric-learning is not installed: its columns stay empty", file=sys.stderr)

    torch.backends.cudnn.benchmark = True  # as in train.py
    rows, network = time_losses(device, args, with_peer=peer_version is not None), time_network(device, args)
    print(table(rows, network, args.network_batch))
    shown = ", ".join(f"{name} {value['median']:.0f} ms" for name, value in network.items())
    print(f"{args.arch} {args.height}x{args.width}, batch {args.network_batch}, on {device}: {shown} a step")

    result = {
        "threads": torch.get_num_threads(),
        "pytorch_metric_learning": peer_version, "embedding_dim": args.embedding_dim, "images_per_identity": K,
        "repeats": args.repeats, "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32, "rows": rows,
        "network": {"arch": args.arch, "height": args.height, "width": args.width, "batch_size": args.network_batch,
                    "repeats": args.network_repeats, "milliseconds": {device.type: network}},
    }  # fmt: skip
    write_result("losses", result, args.machine or machine_name(device), args.out)


if __name__ == "__main__":
    main()
