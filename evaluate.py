"""Scores a finished run, a run on another data set, or saved features of any system: rank-k, mAP, mINP.

    python evaluate.py --run runs/market_arcface_s0
    python evaluate.py --run runs/market_arcface_s0 --dataset duke
    python evaluate.py --run runs/synthetic_arcface_s0 --synthetic-seed 1
    python evaluate.py --run runs/market_arcface_s0 --rerank
    python evaluate.py --run runs/market_arcface_s0 --verification
    python evaluate.py --run runs/market_arcface_s0 --save-features features.npz
    python evaluate.py --features features.npz

The numbers of a run are printed and kept in its folder, in evaluation_DATASET_METRIC.json; of those on
another data set `python -m utils.results` makes a table.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from data import DATASETS, add_reader_flags, check_options, check_true_matches, load_datasets, reader_options
from data.holdout import holdout
from data.images import stream_images
from data.records import Split
from models import build_model, model_options
from utils import distributed
from utils.checkpoint import check_fit, check_same_run, load_checkpoint
from utils.environment import digest_of_names, find_device
from utils.errors import UserError, script, user_input
from utils.features import Features, load_features, path_cameras, save_features
from utils.files import save_json
from utils.flags import DEFAULTS, SCORING, data_name, load_args, number
from utils.ranking import average, rank_queries, rank_queries_from_distance
from utils.reranking import rerank
from utils.seed import set_backends
from utils.verification import count_pairs, verification, verification_table

BATCH_SIZE, BATCH_SIZE_GPU = 128, 512  # images embedded at a time
RERANK = {"k1": 20, "k2": 6, "lambda_": 0.3}  # of the paper
METRICS = ("rank1", "rank5", "rank10", "rank20", "mAP", "mAP_trapezoid", "mINP", "num_queries")


@torch.inference_mode()
def embed(
    model: nn.Module,
    paths: Sequence[str | Path],
    *,
    height: int,
    width: int,
    device: torch.device,
    amp: bool = False,
    workers: int = 4,
    flip_test: bool = False,
    description: str = "embedding",
) -> Tensor:
    """Embeddings (N, D) float32 of N image files, in their order, on `device`; images are streamed, never kept.

    flip_test: an image's embedding is the mean of its own and its mirror image's.
    Under torchrun every process embeds its share of them and returns all.
    """
    paths, total = [Path(path) for path in paths], len(paths)
    if not paths:
        raise UserError("there are no images to embed")
    distributed.check_same("the list of test images", digest_of_names(paths))
    paths = paths[distributed.share(total)]
    was_training = model.training
    model.eval()
    batch_size = BATCH_SIZE if device.type == "cpu" else BATCH_SIZE_GPU
    embeddings = []
    with tqdm(total=len(paths), desc=description, unit="image", leave=False, disable=None) as bar:
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
    return distributed.gather_rows(torch.cat(embeddings), total)


def embed_split(model: nn.Module, split: Split, **settings) -> Features:
    """Query and gallery of a split with their embeddings; settings: those of `embed`."""
    tables = {}
    for name, records in (("query", split.query), ("gallery", split.gallery)):
        tables[name] = embed(model, [r.path for r in records], description=f"embedding {name}", **settings)
    return features_of(split, **tables)


def features_of(split: Split, query: Tensor, gallery: Tensor) -> Features:
    """The embeddings (Q, D) and (G, D) of a split, in its order, with identities, cameras and paths."""
    fields = {"query": query, "gallery": gallery}
    for name, records in (("query", split.query), ("gallery", split.gallery)):
        fields[f"{name}_pids"] = torch.tensor([r.pid for r in records])
        fields[f"{name}_camids"] = torch.tensor([r.camid for r in records])
        fields[f"{name}_paths"] = [str(r.path) for r in records]
    return Features(**fields)


def cameras(features: Features, ignore: bool = False) -> tuple:
    """The camids of queries (Q,) and gallery (G,) that count: each path its own if ignored, or if one is unknown (-1),
    so that only the query image itself is dropped."""
    query_camids, gallery_camids = features.query_camids, features.gallery_camids
    if not ignore and (query_camids is None or gallery_camids is None):
        raise ValueError(
            "The features hold no cameras: add query_camids and gallery_camids, or query_paths and gallery_paths and "
            "pass --ignore-cameras."
        )
    if ignore or unknown_cameras(features):
        return path_cameras(features.query_paths, features.gallery_paths)
    return query_camids, gallery_camids


def unknown_cameras(features: Features) -> bool:
    """Whether a camera that counts is unknown (-1): of a query, or of a gallery image of somebody (pid above 0)."""
    return bool((features.query_camids < 0).any() or (features.gallery_camids[features.gallery_pids > 0] < 0).any())


def score(
    features: Features, metric: str = "cosine", ignore_cameras: bool = False, reranking: dict | None = None,
    verify: bool = False,
) -> dict:  # fmt: skip
    """The metrics of the README's "Protocol", as fractions (0..1), under the names of `rank_metrics`.

    ignore_cameras: every distinct path is a camera of its own, so that only the query image itself is dropped; the
    same holds where a camera is unknown (-1). reranking: k1, k2 and lambda_ of utils/reranking.py, by whose distances
    is ranked. verify: further, under "verification", what utils/verification.py says of the pairs. Under torchrun every
    process ranks its share of the queries; re-ranking, which compares them with each other, takes all of them in each.
    """
    query_camids, gallery_camids = cameras(features, ignore_cameras)
    queries = features.query, features.query_pids, query_camids
    mine = slice(None) if reranking else distributed.share(len(features.query))
    query = tuple(column[mine] for column in queries)
    gallery = features.gallery, features.gallery_pids, gallery_camids

    def rank(block: int | None) -> dict[str, Tensor]:
        if not reranking:
            return rank_queries(*query, *gallery, metric=metric, gallery_block=block)
        bar, parts = partial(tqdm, leave=False, disable=None), []
        for here, distance in rerank(query[0], gallery[0], metric, **reranking, block=block, progress=bar):
            parts.append(rank_queries_from_distance(distance, query[1][here], query[2][here], *gallery[1:]))
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    block, default = None, 4096 if reranking else 8192
    while True:
        try:
            results = rank(block)
            break
        except torch.OutOfMemoryError:
            if block == 64:
                raise
        block = max((block or default) // 2, 64)
        print(f"out of memory: ranking again by blocks of {block} gallery images")
    if not reranking:
        results = {key: distributed.gather_rows(column, len(queries[0])) for key, column in results.items()}
    further = {"verification": verification(count_pairs(*queries, *gallery, metric))} if verify else {}
    return average(results) | further


def score_all(
    model: nn.Module, tests: dict[str, Split], metric: str, ignore_cameras: bool, reranking: dict | None = None,
    verify: bool = False, **settings,
) -> dict:  # fmt: skip
    """The metrics of a test set; of several their means, and under "tests" those of each. settings: of `embed`."""
    found = {}
    for name, split in tests.items():
        features = embed_split(model, split, **settings)
        with user_input():
            found[name] = score(features, metric, ignore_cameras, reranking, verify)
    if len(found) == 1:
        return next(iter(found.values()))
    means = {key: sum(metrics[key] for metrics in found.values()) / len(found) for key in METRICS[:-1]}
    return {**means, "num_queries": sum(metrics["num_queries"] for metrics in found.values()), "tests": found}


def metrics_table(metrics: dict, title: str) -> str:
    """Percents under the metrics' names in prose: a row, or one of the means and one of each test set."""
    rows = {f"{title}, mean" if "tests" in metrics else title: metrics, **metrics.get("tests", {})}
    lines = [[name, *(100 * row[key] for key in METRICS[:-1]), row["num_queries"]] for name, row in rows.items()]
    headers = ["", *(key.replace("rank", "rank-") for key in METRICS[:-1]), "valid queries"]
    return tabulate(lines, headers, floatfmt=".2f")


def load_run(run_dir: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """The trained backbone of a run folder, in eval mode, and the run's flags."""
    if not (run_dir / "args.json").is_file():
        where = "train.py prints a run's folder behind ->"
        raise UserError(f"{run_dir} is not a run folder: it has no args.json ({where})")
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


def load_tests(
    run_dir: Path, run: dict, dataset: str | None = None, data_dir: str | None = None, options: dict | None = None
) -> tuple[dict[str, Split], str, dict]:
    """The run's own test sets (people that it did not train on), or those of another data set; their name; and what
    they are: dataset, the options of its readers, the titles that these gave, eval_on (test or val).

    run: the run's flags; options: those of the readers (reader_options). Prints what the readers have to say.
    """
    options = options or {}
    homes = [Path(run["data_dir"]), *([Path(run["data_dir"], "folder")] if dataset == "folder" else [])]
    if data_dir and Path(data_dir).resolve() in [home.resolve() for home in homes]:
        data_dir = None  # the run's own, spelled otherwise
    own = not options and (dataset is None or data_dir is None)  # pictures that may have moved
    dataset = dataset or run["dataset"]
    if run["dataset"] == "folder" and dataset != "folder" and not Path(run["data_dir"], "folder").is_dir():
        data_dir = data_dir or DEFAULTS["data_dir"]  # the run's own holds its pictures and nothing else
    with user_input():
        check_options(dataset, options)
        kept = run_dir / "split.csv" if own else None
        with distributed.one_first():  # generated pedestrians are drawn once
            data = load_datasets(dataset, data_dir or run["data_dir"], {**run, **options}, kept)
        tests, name = data.tests, dataset
        taken = [key for key, option in reader_options().items() if {*dataset.split("+")} & {*option.datasets}]
        about = {"dataset": dataset, "options": {key: {**run, **options}[key] for key in taken}}
        about |= {"titles": data.titles, "eval_on": "test"}
        if dataset == run["dataset"] and run["eval_on"] == "val" and not options:
            tests = {"val": holdout(data.train, run["seed"], ignore_cameras=run["ignore_cameras"])}
            name, about["eval_on"] = f"{dataset} val", "val"
    print("".join(f"{note}\n" for note in data.notes), end="")
    if not own and "folder" in dataset.split("+") and "folder" in run["dataset"].split("+"):
        print("another split than the run's: if these are pictures that it knows, it was trained on some of the people")
    return tests, name, about


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to score: one of the two
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="a run folder made by train.py")
    source.add_argument("--features", type=Path, help="an .npz file or a folder of .npy files (data/README.md)")
    # on what
    parser.add_argument("--dataset", help=f"the test set (default: the run's own): {', '.join(DATASETS)}, or a+b")
    parser.add_argument("--data-dir", help="the folder that holds the data sets (default: the run's own)")
    parser.add_argument("--eval-on", choices=["test"],
                        help="of a run with --eval-on val: its test set, not the people that it held out")  # fmt: skip
    add_reader_flags(parser)
    # how
    parser.add_argument("--metric", choices=("cosine", "euclidean"), help="distance (default: the run's, or cosine)")
    parser.add_argument(
        "--ignore-cameras", action=argparse.BooleanOptionalAction, default=None,
        help="drop only the query image itself, not its whole camera (default: as the run was scored)",
    )
    parser.add_argument("--flip-test", action=argparse.BooleanOptionalAction, default=None,
                        help="mean of an image's and its mirror image's embedding (default: the run's)")  # fmt: skip
    parser.add_argument("--rerank", action="store_true",
                        help="rank by k-reciprocal re-ranking (utils/reranking.py): numbers of their own")  # fmt: skip
    for key, default in RERANK.items():
        kind = number(int) if key != "lambda_" else number(float, zero=True, most=1)
        parser.add_argument(f"--{key.strip('_')}", dest=key, type=kind, help=f"of --rerank (default: {default})")
    parser.add_argument("--verification", action="store_true",
                        help="also: true match rates at three false match rates, over all pairs")  # fmt: skip
    parser.add_argument("--save-features", type=Path, help="write the embeddings to this .npz file or .npy folder")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--workers", type=number(int, zero=True), default=DEFAULTS["workers"],
                        help="threads that decode images (default: the cores, at most 4)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.save_features and args.save_features.exists():  # said now rather than after all images were embedded
        parser.error(f"--save-features: {args.save_features} exists; delete it or choose another name")
    given = [f"--{key.strip('_')}" for key in RERANK if getattr(args, key) is not None]
    if given and not args.rerank:
        parser.error(f"{given[0]} belongs to --rerank")
    if args.rerank and args.verification:
        parser.error("--verification is about similarities, which --rerank replaces: give one of the two")
    options = [key for key in vars(args) if key in reader_options()]
    images = args.dataset, args.data_dir, args.eval_on, args.flip_test, args.save_features, options
    if args.features and any(images):
        parser.error("--features needs no images: leave the flags that are about images out")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    device = find_device(distributed.own_device(args.device or DEFAULTS["device"]))
    given = {key: getattr(args, key) for key in RERANK if getattr(args, key) is not None}
    further = {"reranking": {**RERANK, **given} if args.rerank else None, "verify": args.verification}
    if args.features:
        features = load_features(args.features)
        query = torch.from_numpy(features.query.astype(features.query.dtype.newbyteorder("=")))  # ranked where it is
        features = features._replace(query=query.to(device))
        if not args.ignore_cameras and features.query_camids is not None and features.gallery_camids is not None:
            if unknown_cameras(features):
                print("a camera is unknown (-1): only the query image itself is dropped (as with --ignore-cameras)")
        with user_input():
            metrics = score(features, args.metric or "cosine", args.ignore_cameras, **further)
        how = f"{args.metric or 'cosine'}{', re-ranked' if args.rerank else ''}"
        print(metrics_table(metrics, f"{args.features}, {how}"))
        if args.verification:
            print(verification_table(metrics))
        return
    model, run = load_run(args.run, device)
    set_backends(run["deterministic"], run["tf32"])  # as the run was scored
    run["eval_on"] = args.eval_on or run["eval_on"]
    options = {key: value for key, value in vars(args).items() if key in reader_options()}
    tests, title, about = load_tests(args.run, run, args.dataset, args.data_dir, options)
    scoring = {key: run[key] if getattr(args, key) is None else getattr(args, key) for key in SCORING}
    how = {key: scoring[key] for key in ("metric", "ignore_cameras")}
    with user_input():
        for split in tests.values():
            check_true_matches(split, how["ignore_cameras"])
    settings = {key: run[key] for key in ("height", "width", "amp")} | {"device": device, "workers": args.workers}
    settings["flip_test"] = scoring["flip_test"]
    if args.save_features:
        if len(tests) > 1:
            raise UserError("--save-features takes one test set: name it with --dataset")
        features = embed_split(model, next(iter(tests.values())), **settings)
        if distributed.rank() == 0:
            save_features(args.save_features, features)
        with user_input():
            metrics = score(features, **how, **further)
    else:
        metrics = score_all(model, tests, **how, **further, **settings)
    print(metrics_table(metrics, f"{args.run.name} on {title}, {how['metric']}{', re-ranked' if args.rerank else ''}"))
    if args.verification:
        print(verification_table(metrics))
        people = "held out, none of the test" if about["eval_on"] == "val" else "of the test set, which they describe"
        print(f"thresholds found on the people {people}")
    words = [data_name(args.dataset or run["dataset"], args.data_dir or run["data_dir"])]
    words += [*(f"{key.replace('_', '-')}-{value}" for key, value in options.items())]
    words += [args.eval_on] if args.eval_on else []
    words += [scoring["metric"], *(key.replace("_", "-") for key in SCORING if scoring[key] is True)]
    words += [f"{key.strip('_')}-{value}" for key, value in given.items()]
    words += [word for word in ("rerank", "verification") if getattr(args, word)]
    about["finished"] = (args.run / "result.json").is_file()  # otherwise the network may still change
    if distributed.rank() == 0:
        content = {**metrics, **scoring, **(further["reranking"] or {}), **about}
        save_json(args.run / f"evaluation_{'_'.join(words)}.json", content)


if __name__ == "__main__":
    script("evaluate.py", distributed.processes()(main))
