"""Scores a finished run, a run on another data set, or saved features of any system: rank-k, mAP, mINP.

    python evaluate.py --run runs/market_arcface_s0
    python evaluate.py --run runs/market_arcface_s0 --dataset duke
    python evaluate.py --run runs/market_arcface_s0 --save-features features.npz
    python evaluate.py --features features.npz

The numbers of a run are printed and kept in its folder, in evaluation_DATASET_METRIC.json.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from data import DATASETS, add_reader_flags, check_options, load_datasets, reader_options
from data.holdout import holdout
from data.images import stream_images
from data.records import Record, Split
from models import build_model, model_options
from utils.checkpoint import check_fit, check_same_run, load_checkpoint
from utils.environment import find_device
from utils.errors import UserError, user_input
from utils.features import Features, load_features, path_cameras, save_features
from utils.files import save_json
from utils.flags import DEFAULTS, load_args, number
from utils.ranking import rank_metrics
from utils.seed import set_backends

BATCH_SIZE, BATCH_SIZE_GPU = 128, 512  # images embedded at a time
METRICS = ("rank1", "rank5", "rank10", "rank20", "mAP", "mAP_trapezoid", "mINP", "num_queries")


@torch.inference_mode()
def embed(
    model: nn.Module,
    records: Sequence[Record],
    *,
    height: int,
    width: int,
    device: torch.device,
    amp: bool = False,
    workers: int = 4,
    flip_test: bool = False,
    description: str = "embedding",
) -> Tensor:
    """Embeddings (N, D) float32 of N images, in their order, on `device`; the images are streamed, never kept.

    flip_test: an image's embedding is the mean of its own and its mirror image's.
    """
    was_training = model.training
    model.eval()
    batch_size = BATCH_SIZE if device.type == "cpu" else BATCH_SIZE_GPU
    embeddings = []
    with tqdm(total=len(records), desc=description, unit="image", leave=False, disable=None) as bar:
        paths = [record.path for record in records]
        for images in stream_images(paths, height, width, device, batch_size, workers):
            count = len(images)
            if device.type != "cpu" and count < batch_size:  # one shape: cuDNN tunes once
                images = F.pad(images, (0, 0) * 3 + (0, batch_size - count))
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                batch = model(images).float()  # (B, D)
                if flip_test:
                    batch = (batch + model(images.flip(3)).float()) / 2
            embeddings.append(batch[:count])
            bar.update(count)
    model.train(was_training)
    return torch.cat(embeddings)


def embed_split(model: nn.Module, split: Split, **settings) -> Features:
    """Query and gallery of a split with their embeddings; settings: those of `embed`."""
    fields = {}
    for name, records in (("query", split.query), ("gallery", split.gallery)):
        fields[name] = embed(model, records, description=f"embedding {name}", **settings)
        fields[f"{name}_pids"] = torch.tensor([record.pid for record in records])
        fields[f"{name}_camids"] = torch.tensor([record.camid for record in records])
        fields[f"{name}_paths"] = [str(record.path) for record in records]
    return Features(**fields)


def score(features: Features, metric: str = "cosine", ignore_cameras: bool = False) -> dict[str, float]:
    """The metrics of the README's "Protocol", as fractions (0..1), under the names of `rank_metrics`.

    ignore_cameras: every distinct path is a camera of its own, so that only the query image itself is dropped; the
    same holds where a camera is unknown (-1).
    """
    query_camids, gallery_camids = features.query_camids, features.gallery_camids
    if ignore_cameras or min(query_camids.min(), gallery_camids.min()) < 0:
        query_camids, gallery_camids = path_cameras(features.query_paths, features.gallery_paths)
    query = features.query, features.query_pids, query_camids
    gallery = features.gallery, features.gallery_pids, gallery_camids
    block = None  # the default
    while True:
        try:
            return rank_metrics(*query, *gallery, metric=metric, gallery_block=block)
        except torch.OutOfMemoryError:
            if block == 64:
                raise
        block = max((block or 8192) // 2, 64)
        print(f"out of memory: ranking again by blocks of {block} gallery images")


def score_all(model: nn.Module, tests: dict[str, Split], metric: str, ignore_cameras: bool, **settings) -> dict:
    """The metrics of a test set; of several their means, and under "tests" those of each. settings: of `embed`."""
    found = {}
    for name, split in tests.items():
        features = embed_split(model, split, **settings)
        with user_input():
            found[name] = score(features, metric, ignore_cameras)
    if len(found) == 1:
        return next(iter(found.values()))
    means = {key: sum(metrics[key] for metrics in found.values()) / len(found) for key in METRICS[:-1]}
    return {**means, "num_queries": sum(metrics["num_queries"] for metrics in found.values()), "tests": found}


def metrics_table(metrics: dict, title: str) -> str:
    """Percents under the metrics' names in prose: a row, or one of the means and one of each test set."""
    names = {"rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10", "rank20": "rank-20"}
    rows = {f"{title}, mean" if "tests" in metrics else title: metrics, **metrics.get("tests", {})}
    lines = [[name, *(100 * row[key] for key in METRICS[:-1]), row["num_queries"]] for name, row in rows.items()]
    headers = ["", *(names.get(key, key) for key in METRICS[:-1]), "valid queries"]
    return tabulate(lines, headers, floatfmt=".2f")


def load_run(run_dir: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """The trained backbone of a run folder, in eval mode, and the run's flags."""
    if not (run_dir / "args.json").is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no args.json")
    args = load_args(run_dir)
    checkpoint = load_checkpoint(run_dir / "last.pt")
    check_same_run(run_dir / "last.pt", checkpoint, args, ("arch", "loss", "dataset", "seed", *model_options(args)))
    with user_input():
        model = build_model(args["arch"], "none", **model_options(args))
    check_fit(run_dir / "last.pt", "model", checkpoint["model"], model.state_dict())
    model.load_state_dict(checkpoint["model"])
    if checkpoint["epoch"] < args["epochs"]:
        print(f"{run_dir} is not finished: this is the network after epoch {checkpoint['epoch']} of {args['epochs']}")
    return model.to(device, memory_format=torch.channels_last).eval(), args


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to score: one of the two
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="a run folder made by train.py")
    source.add_argument("--features", type=Path, help="saved features: an .npz file or a folder of .npy files (README)")
    # on what
    parser.add_argument("--dataset", help=f"the test set (default: the run's own): {', '.join(DATASETS)}, or a+b")
    parser.add_argument("--data-dir", help="the folder that holds the data sets (default: the run's own)")
    add_reader_flags(parser)
    # how
    parser.add_argument("--metric", choices=("cosine", "euclidean"), help="distance (default: the run's, or cosine)")
    parser.add_argument(
        "--ignore-cameras", action="store_true", help="drop only the query image itself, not its whole camera"
    )
    parser.add_argument("--flip-test", action=argparse.BooleanOptionalAction, default=None,
                        help="mean of an image's and its mirror image's embedding (default: the run's)")  # fmt: skip
    parser.add_argument("--save-features", type=Path, help="write the embeddings to this .npz file or .npy folder")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--workers", type=number(int, zero=True), default=DEFAULTS["workers"],
                        help="threads that decode images (default: the cores, at most 16)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.save_features and args.save_features.exists():  # said now rather than after all images were embedded
        parser.error(f"--save-features: {args.save_features} exists; delete it or choose another name")
    options = [key for key in vars(args) if key in reader_options()]
    if args.features and (args.dataset or args.data_dir or args.save_features or options or args.flip_test):
        parser.error("--features needs no images: leave --dataset, --data-dir, --flip-test and --save-features out")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    device = find_device(args.device or DEFAULTS["device"])
    if args.features:
        features = load_features(args.features)
        query = torch.from_numpy(features.query.astype(features.query.dtype.newbyteorder("=")))  # ranked where it is
        features = features._replace(query=query.to(device))
        with user_input():
            metrics = score(features, args.metric or "cosine", args.ignore_cameras)
        print(metrics_table(metrics, str(args.features)))
        return
    model, run = load_run(args.run, device)
    set_backends(run["deterministic"], run["tf32"])  # as the run was scored
    dataset = args.dataset or run["dataset"]
    held_out = dataset == run["dataset"] and run["eval_on"] == "val"
    options = {key: value for key, value in vars(args).items() if key in reader_options()}
    with user_input():
        check_options(dataset, options)
        kept = args.run / "split.csv" if dataset == run["dataset"] and not options else None
        data = load_datasets(dataset, args.data_dir or run["data_dir"], {**run, **options}, kept)
        tests = data.tests
        if held_out:
            tests = {"val": holdout(data.train, run["seed"], ignore_cameras=run["ignore_cameras"])}
    print("".join(f"{note}\n" for note in data.notes), end="")
    how = {"metric": args.metric or run["metric"], "ignore_cameras": args.ignore_cameras or run["ignore_cameras"]}
    settings = {key: run[key] for key in ("height", "width", "amp")} | {"device": device, "workers": args.workers}
    settings["flip_test"] = run["flip_test"] if args.flip_test is None else args.flip_test
    if args.save_features:
        if len(tests) > 1:
            raise UserError("--save-features takes one test set: name it with --dataset")
        features = embed_split(model, next(iter(tests.values())), **settings)
        save_features(args.save_features, features)
        with user_input():
            metrics = score(features, **how)
    else:
        metrics = score_all(model, tests, **how, **settings)
    print(metrics_table(metrics, f"{args.run.name} on {dataset}{' val' if held_out else ''}"))
    words = [dataset, *(f"{key.replace('_', '-')}-{value}" for key, value in options.items()), how["metric"]]
    how["flip_test"] = settings["flip_test"]
    words += [key.replace("_", "-") for key in ("ignore_cameras", "flip_test") if how[key]]
    save_json(args.run / f"evaluation_{'_'.join(words)}.json", {**metrics, **how})


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("evaluate.py: out of memory on the device: try --device cpu")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped")
