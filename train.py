"""Trains one loss on one data set and scores it: flags, data, model and loss, train, evaluate.

    python train.py --loss arcface --dataset market
    python train.py --loss softmax+triplet --dataset market --loss-args triplet.margin=None
    python train.py --loss arcface --dataset synthetic --arch resnet18 --weights none --height 128 --width 64 --amp
    python train.py --resume --run-dir runs/market_arcface_s0

The run folder (default runs/DATASET_LOSS_sSEED) gets args.json, log.jsonl (a line per epoch), last.pt and result.json.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from data import DATASETS, load_dataset
from data.holdout import holdout
from data.images import TrainingImages, find_bad_images
from data.sampler import PKSampler, RandomSampler
from evaluate import embed_split, metrics_table, score
from losses import LOSSES, build_loss, row_name, with_default_weights
from models import ARCHS, build_model
from utils.checkpoint import check_fit, load_checkpoint, load_json, locked, save_checkpoint, save_json, write_atomically
from utils.environment import environment
from utils.recipes import RECIPES, command_line, recipe_defaults, resolve_loss_args
from utils.seed import seed_everything, set_determinism

# ---------------------------------------------------------------------------------------------------------------- flags

DEFAULTS = {  # a recipe's row replaces some of these, an explicit flag replaces both
    "recipe": "controlled",
    "data_dir": "datasets",
    "synthetic_ids": 150,
    "eval_on": "test",
    "metric": "cosine",
    "ignore_cameras": False,
    "arch": "resnet50",
    "weights": "imagenet",
    "height": 256,
    "width": 128,
    "epochs": 60,
    "lr": 3.5e-4,
    "loss_lr": None,  # the same as lr
    "weight_decay": 5e-4,
    "milestones": None,  # after 1/3 and 2/3 of the epochs
    "sampler": "pk",
    "batch_size": None,  # of the random sampler; p * k of the other
    "p": 16,
    "k": 4,
    "random_crop": False,
    "amp": False,
    "compile": False,
    "deterministic": False,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "workers": os.cpu_count() or 1,
    "cache": "auto",
    "skip_bad_images": False,
    "seed": 0,
    "eval_every": 0,
}
HARMLESS = {"data_dir", "workers", "cache"}  # may differ when a run is resumed: they change no number
LOG_EVERY = 20  # steps between two looks at the loss; between them nothing waits for the device


def number(kind: type, zero: bool = False):
    """An argparse type: a finite int or float above zero (or zero, if allowed)."""

    def convert(text: str):
        value = kind(text)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise ValueError
        return value

    convert.__name__ = f"{'whole ' if kind is int else ''}number {'of 0 or more' if zero else 'above 0'}"
    return convert


def build_parser() -> argparse.ArgumentParser:
    """The parser of the explicit flags only: a flag not given is absent from the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    # loss
    add("--loss", help=f"a loss or a sum of losses such as softmax+0.5*triplet; losses: {', '.join(LOSSES)}")
    add("--loss-args", nargs="+", metavar="[LOSS.]KEY=VALUE", help="arguments of the loss, e.g. scale=30 margin=0.35")
    add("--loss-lr", type=number(float), help="learning rate of the loss's own parameters (default: --lr)")
    # data
    add("--dataset", choices=DATASETS, help="data set to train and test on (synthetic: generated on first use)")
    add("--data-dir", help="folder that holds the data sets' folders, or one data set's own folder (default: datasets)")
    add("--synthetic-ids", type=number(int), help="generated people in training, and as many in test (default: 150)")
    add("--skip-bad-images", action="store_true", help="go on without training images that can't be decoded")
    # model
    add("--arch", choices=ARCHS, help="backbone (default: resnet50)")
    add("--weights", help="imagenet, none, or the file of a torchvision state dict (default: imagenet)")
    add("--height", type=number(int), help="image height in pixels (default: 256)")
    add("--width", type=number(int), help="image width in pixels (default: 128)")
    # recipe
    add("--recipe", choices=RECIPES, help="table of default values for the flags below (default: controlled)")
    add("--show-recipe", action="store_true", help="print the resulting flags and stop")
    add("--epochs", type=number(int, zero=True), help="passes over the training images (default: the recipe's, 60)")
    add("--lr", type=number(float), help="Adam's learning rate (default: the recipe's)")
    add("--weight-decay", type=number(float, zero=True), help="Adam's L2 penalty (default: the recipe's, 5e-4)")
    add("--milestones", type=int, nargs="*", help="epochs after which lr falls to a tenth (default: 1/3, 2/3)")
    add("--sampler", choices=("random", "pk"), help="random images, or P identities x K images (default: the recipe's)")
    add("--batch-size", type=number(int), help="images per batch of the random sampler (default: p * k)")
    add("--p", type=number(int), help="identities per batch of the pk sampler (default: 16)")
    add("--k", type=number(int), help="images per identity of the pk sampler (default: 4)")
    add("--random-crop", action=argparse.BooleanOptionalAction, help="half of the images: 1.125x larger, cropped back")
    # speed and device
    add("--amp", action="store_true", help="bfloat16 autocast for the backbone; losses stay in float32")
    add("--compile", action="store_true", help="torch.compile the backbone: about a minute of warm-up, pays on a GPU")
    add("--deterministic", action="store_true", help="the same bits on every run of one GPU, at some cost in speed")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--workers", type=number(int, zero=True), help="threads that decode images (default: all cores)")
    add("--cache", choices=("auto", "off"), help="auto: keep the decoded training images in memory if they fit")
    # run
    add("--seed", type=number(int, zero=True), help="seed of weights, batches and augmentation (default: 0)")
    add("--eval-on", choices=("test", "val"), help="val: a third of the training identities is held out and scored")
    add("--eval-every", type=number(int, zero=True), help="score every N epochs, too (default: 0, only at the end)")
    add("--metric", choices=("cosine", "euclidean"), help="distance of the scoring (default: cosine)")
    add("--ignore-cameras", action="store_true", help="scoring drops only the query image itself, not its whole camera")
    add("--run-dir", type=Path, help="the run folder itself (default: runs/DATASET_LOSS_sSEED)")
    add("--resume", action="store_true", help="go on with the run in the run folder; flags come from its args.json")
    return parser


def resolve_flags(explicit: dict) -> dict:
    """All flags of a new run: DEFAULTS, then the recipe's row, then the explicit flags. ValueError if they clash."""
    row = row_name(explicit["loss"])
    recipe = recipe_defaults(explicit.get("recipe", DEFAULTS["recipe"]), row, explicit["dataset"])
    loss_args, loss_weights = recipe.pop("loss_args", {}), recipe.pop("loss_weights", {})
    args = {**DEFAULTS, **recipe, **explicit}
    if args["sampler"] == "pk":
        if "batch_size" in explicit:
            raise ValueError("--batch-size belongs to --sampler random; with --sampler pk a batch is --p x --k images")
        args["batch_size"] = None
    elif args["batch_size"] is None:
        args["batch_size"] = args["p"] * args["k"]
    if (args["batch_size"] or args["p"] * args["k"]) < 2:
        raise ValueError("a batch must have at least 2 images (batch normalisation)")
    if args["milestones"] is None:
        args["milestones"] = [math.ceil(args["epochs"] / 3), math.ceil(args["epochs"] * 2 / 3)]
    args["loss_lr"] = args["loss_lr"] or args["lr"]
    args["loss"] = with_default_weights(explicit["loss"], loss_weights)
    args["loss_args"] = loss_args  # the recipe's, by name; the explicit ones are added when the steps are counted
    build_loss(args["loss"], 2, 2, resolve_loss_args(loss_args, 1) + explicit.get("loss_args", []))  # is all known?
    return args


def learning_rate_factor(epoch: int, milestones: list[int]) -> float:
    """0.1 for every milestone that lies behind; a milestone is a number of finished epochs."""
    return 0.1 ** sum(epoch >= milestone for milestone in milestones)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    explicit = vars(parser.parse_args(argv))
    resume, run_dir = explicit.pop("resume", False), explicit.pop("run_dir", None)
    show_recipe = explicit.pop("show_recipe", False)
    saved = {}
    if resume and run_dir and (run_dir / "args.json").is_file():
        saved = load_json(run_dir / "args.json")
    elif "loss" not in explicit or "dataset" not in explicit:
        parser.error("--loss and --dataset are needed (or --resume with the --run-dir of a run that began)")
    try:
        args = saved or resolve_flags(explicit)
    except ValueError as error:
        parser.error(str(error))
    if show_recipe:
        own = [f"{key}={value}" for key, value in args["loss_args"].items()] + explicit.get("loss_args", [])
        print(command_line({**args, "loss_args": own, "recipe": None}))
        return
    row = row_name(args["loss"])
    run_dir = run_dir or Path("runs") / f"{args['dataset']}_{row}_s{args['seed']}"
    if run_dir.exists() and not resume:
        raise ValueError(f"{run_dir} exists: go on with it (--resume), name another (--run-dir), or remove it")
    if not saved and (run_dir / "args.json").is_file():
        saved = load_json(run_dir / "args.json")
    if saved:
        for key, value in explicit.items():
            before = saved["explicit"].get(key, saved[key])
            if value != before and key not in HARMLESS:
                flag = f"--{key.replace('_', '-')}"
                parser.error(f"{run_dir} began with {flag} {before}, not {value}: leave it out or start another run")
        args = {**saved, **{key: value for key, value in explicit.items() if key in HARMLESS}}
        explicit = saved["explicit"]
    if (run_dir / "result.json").is_file():
        print(metrics_table(load_json(run_dir / "result.json"), f"{run_dir.name} (finished)"))
        return
    device = torch.device(args["device"])
    set_determinism(args["deterministic"])

    # ------------------------------------------------------------------------------------------------------------ data
    split = load_dataset(args["dataset"], args["data_dir"], args["synthetic_ids"])
    if args["eval_on"] == "val":
        split = holdout(split.train, args["seed"])
    records = split.train
    num_classes = 1 + max(record.label for record in records)
    if args["skip_bad_images"]:
        bad = find_bad_images([record.path for record in records], args["workers"])
        for sentence in bad.values():
            print(f"skipped: {sentence}")
        print(f"{len(bad)} of {len(records):,} training images are bad and skipped")
        records = [record for position, record in enumerate(records) if position not in bad]
    all_labels = torch.tensor([record.label for record in records])
    if args["sampler"] == "pk":
        sampler = PKSampler(all_labels.tolist(), args["p"], args["k"], args["seed"])
    else:
        sampler = RandomSampler(len(records), args["batch_size"], args["seed"])
    num_steps = len(sampler) * args["epochs"]
    images_of = TrainingImages(
        [record.path for record in records],
        args["height"],
        args["width"],
        device,
        random_crop=args["random_crop"],
        cache=args["cache"],
        workers=args["workers"],
    )

    # -------------------------------------------------------------------------------------------------- model and loss
    seed_everything(args["seed"])
    model = build_model(args["arch"], args["weights"]).to(device, memory_format=torch.channels_last)
    if not saved:
        args["loss_args"] = resolve_loss_args(args["loss_args"], max(num_steps, 1)) + explicit.get("loss_args", [])
    loss_fn = build_loss(args["loss"], num_classes, model.embedding_dim, args["loss_args"]).to(device)
    groups = [{"params": list(model.parameters()), "lr": args["lr"]}]
    if any(True for _ in loss_fn.parameters()):
        groups.append({"params": list(loss_fn.parameters()), "lr": args["loss_lr"]})
    optimizer = torch.optim.Adam(groups, weight_decay=args["weight_decay"], fused=True)
    first_rates = [group["lr"] for group in groups]
    forward = torch.compile(model) if args["compile"] else model

    # ----------------------------------------------------------------------------------------------------------- train
    run_dir.mkdir(parents=True, exist_ok=resume)
    with locked(run_dir):
        if not saved:
            args |= {"explicit": explicit, "environment": environment(device), "num_classes": num_classes}
            args["val_pids"] = sorted({record.pid for record in split.query}) if args["eval_on"] == "val" else []
            save_json(run_dir / "args.json", args)
        first_epoch, log = 0, []
        if (run_dir / "last.pt").is_file():
            checkpoint = load_checkpoint(run_dir / "last.pt", keys=("model", "loss", "optimizer", "epoch", "args"))
            check_fit(run_dir / "last.pt", "model", checkpoint["model"], model.state_dict())
            check_fit(run_dir / "last.pt", "loss", checkpoint["loss"], loss_fn.state_dict())
            model.load_state_dict(checkpoint["model"])
            loss_fn.load_state_dict(checkpoint["loss"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            first_epoch = checkpoint["epoch"]
            print(f"{run_dir}: going on after epoch {first_epoch} of {args['epochs']}")
        if (run_dir / "log.jsonl").is_file():  # lines of epochs that the checkpoint does not know are cut off
            lines = (run_dir / "log.jsonl").read_text().splitlines()[:first_epoch]
            log = [json.loads(line) for line in lines]
            write_atomically(run_dir / "log.jsonl", lambda file: file.write("".join(f"{e}\n" for e in lines).encode()))
        print(f"{args['dataset']}: {len(records):,} training images of {num_classes:,} identities (kept in "
              f"{images_of.where}), {len(split.query):,} queries, {len(split.gallery):,} gallery images")  # fmt: skip
        print(f"{' '.join([args['loss'], *args['loss_args']])} on {args['arch']} {args['height']}x{args['width']}, "
              f"{args['device']}{' bfloat16' if args['amp'] else ''}, {args['epochs']} epochs x {len(sampler)} steps x "
              f"{sampler.batches(0).shape[1]} images ({args['sampler']}) -> {run_dir}")  # fmt: skip

        def evaluate() -> dict:
            settings = {key: args[key] for key in ("height", "width", "amp", "workers")}
            features = embed_split(model, split, device=device, **settings)
            return score(features, args["metric"], args["ignore_cameras"])

        stop_signals = []  # SIGINT and SIGTERM end the run after the step; a second one at once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda got, _: stop_signals.append(got) if not stop_signals else sys.exit(128 + got))

        for epoch in range(first_epoch, args["epochs"]):
            seed_everything(args["seed"], epoch)  # a resumed run goes on exactly as it would have
            factor = learning_rate_factor(epoch, args["milestones"])
            for group, rate in zip(optimizer.param_groups, first_rates, strict=True):
                group["lr"] = rate * factor
            model.train()
            loss_fn.train()
            order = sampler.batches(epoch)  # (steps, B)
            epoch_labels = all_labels[order].to(device)  # (steps, B)
            loss_sum = torch.zeros((), device=device)
            first_bad = torch.tensor(math.inf, device=device)
            start = time.perf_counter()
            with tqdm(total=order.numel(), desc=f"epoch {epoch + 1}/{args['epochs']}", unit="image", leave=False,
                      disable=None) as bar:  # fmt: skip
                for step, images in enumerate(images_of.batches(order, args["seed"], epoch)):
                    with torch.autocast(device.type, torch.bfloat16, enabled=args["amp"]):
                        embeddings = forward(images)  # (B, D)
                    loss = loss_fn(embeddings, epoch_labels[step])  # in float32
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    loss_sum += loss.detach()
                    first_bad = torch.where(torch.isfinite(loss.detach()), first_bad, first_bad.clamp(max=step))
                    if (step + 1) % LOG_EVERY == 0 or step + 1 == len(order):  # only here it waits for the device
                        total, bad_step = torch.stack([loss_sum, first_bad]).tolist()
                        if bad_step < math.inf:
                            raise FloatingPointError(
                                f"the loss is not finite at epoch {epoch + 1}, step {int(bad_step) + 1}: try a smaller "
                                f"--lr or --loss-lr; {run_dir} keeps the state after epoch {epoch}"
                            )
                        bar.set_postfix(loss=f"{total / (step + 1):.4f}", refresh=False)
                    bar.update(len(images))
                    if stop_signals:
                        print(f"stopped by {signal.Signals(stop_signals[0]).name} in epoch {epoch + 1}: "
                              f"--resume --run-dir {run_dir} goes on from epoch {epoch + 1}")  # fmt: skip
                        sys.exit(128 + stop_signals[0])
            seconds = time.perf_counter() - start
            tensors = [*model.state_dict().values(), *loss_fn.state_dict().values()]
            if not all(tensor.isfinite().all() for tensor in tensors):
                raise FloatingPointError(f"the weights are not finite after epoch {epoch + 1}: nothing was saved of it")
            line = {"epoch": epoch + 1, "loss": total / len(order), "lr": args["lr"] * factor,
                    "seconds": round(seconds, 3), "images_per_second": round(order.numel() / seconds, 1)}  # fmt: skip
            if args["eval_every"] and (epoch + 1) % args["eval_every"] == 0 and epoch + 1 < args["epochs"]:
                line |= evaluate()
            log.append(line)
            with open(run_dir / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            state = {"model": model.state_dict(), "loss": loss_fn.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(run_dir / "last.pt", {**state, "epoch": epoch + 1, "args": json.dumps(args)})
            scores = f", rank-1 {line['rank1']:.1%}, mAP {line['mAP']:.1%}" if "mAP" in line else ""
            speed = f"{line['images_per_second']:.0f} images/s"
            print(f"epoch {epoch + 1}/{args['epochs']}: loss {line['loss']:.4f}, {speed}{scores}")

        # ---------------------------------------------------------------------------------------------------- evaluate
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        metrics = evaluate()
        save_json(run_dir / "result.json", {**metrics, "row": row, "args": args, "log": log})
        state = {"model": model.state_dict(), "loss": loss_fn.state_dict()}
        save_checkpoint(run_dir / "last.pt", {**state, "epoch": args["epochs"], "args": json.dumps(args)})
        print(metrics_table(metrics, f"{args['dataset']} {row}"))


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped")
