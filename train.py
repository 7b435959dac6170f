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
from evaluate import METRICS, embed_split, metrics_table, score
from losses import LOSSES, build_loss, describe_arguments, row_name, with_default_weights
from models import ARCHS, build_model
from utils.checkpoint import check_writable, locked, resume_run, save_checkpoint, save_log
from utils.environment import change_of, digest_of_names, environment, find_device
from utils.files import load_json, save_json
from utils.flags import number
from utils.recipes import RECIPES, recipe_defaults, resolve_loss_args, show_flags
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
RUN_KEYS = {*DEFAULTS, "loss", "dataset", "loss_args", "explicit", "environment", "num_classes"}  # of args.json
LOG_EVERY = 20  # steps between two looks at the loss; between them nothing waits for the device


def build_parser() -> argparse.ArgumentParser:
    """The parser of the explicit flags only: a flag not given is absent from the result."""
    epilog = "arguments of the losses and their defaults:\n  " + "\n  ".join(map(describe_arguments, LOSSES))
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    # loss
    add("--loss", help=f"a loss or a sum of losses such as softmax+0.5*triplet; losses: {', '.join(LOSSES)}")
    add("--loss-args", nargs="+", metavar="[LOSS.]KEY=VALUE", help="arguments of the loss, e.g. scale=30 margin=0.35")
    add("--loss-lr", type=number(float), help="learning rate of the loss's own parameters (default: --lr)")
    # data
    add("--dataset", choices=DATASETS, help="data set to train and test on (synthetic: generated on first use)")
    add("--data-dir", help="folder that holds the data sets' folders, or one data set's own folder (default: datasets)")
    add("--synthetic-ids", type=number(int, most=10**5), help="people in training, and in test (default: 150)")
    add("--skip-bad-images", action="store_true", help="go on without training images that can't be decoded")
    # model
    add("--arch", choices=ARCHS, help="backbone (default: resnet50)")
    add("--weights", help="imagenet, none, or the file of a torchvision state dict (default: imagenet)")
    add("--height", type=number(int, most=4096), help="image height in pixels (default: 256)")
    add("--width", type=number(int, most=4096), help="image width in pixels (default: 128)")
    # recipe
    add("--recipe", choices=RECIPES, help="default values, also of loss arguments (default: controlled)")
    add("--show-recipe", action="store_true", help="print the resulting flags and stop")
    add("--epochs", type=number(int, zero=True), help="passes over the training images (default: the recipe's, 60)")
    add("--lr", type=number(float), help="Adam's learning rate (default: the recipe's)")
    add("--weight-decay", type=number(float, zero=True), help="Adam's L2 penalty (default: the recipe's, 5e-4)")
    add("--milestones", type=number(int, zero=True), nargs="*", help="epochs after which lr falls to 1/10")
    add("--sampler", choices=("random", "pk"), help="random images, or P identities x K images (default: the recipe's)")
    add("--batch-size", type=number(int), help="images per batch of the random sampler (default: p * k)")
    add("--p", type=number(int), help="identities per batch of the pk sampler (default: 16)")
    add("--k", type=number(int), help="images per identity of the pk sampler (default: 4)")
    add("--random-crop", action=argparse.BooleanOptionalAction, help="enlarge half of the images 1.125x and crop them")
    # speed and device
    add("--amp", action="store_true", help="bfloat16 autocast for the backbone; losses stay in float32")
    add("--compile", action="store_true", help="torch.compile the backbone: 20 s of warm-up or more")
    add("--deterministic", action="store_true", help="the same bits on every run of one GPU, at some cost in speed")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--workers", type=number(int, zero=True), help="threads that decode images (default: all cores)")
    add("--cache", choices=("auto", "off"), help="auto: keep decoded images if they take at most half of the memory")
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
    elif {"p", "k"} & explicit.keys():
        raise ValueError("--p and --k belong to --sampler pk; with --sampler random a batch is --batch-size images")
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


def interrupt(number: int, _) -> None:
    """Handler of SIGINT and SIGTERM outside the epochs, where nothing has to be finished first."""
    raise KeyboardInterrupt(number)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    explicit = vars(parser.parse_args(argv))
    resume, run_dir, show_recipe = (explicit.pop(key, None) for key in ("resume", "run_dir", "show_recipe"))
    saved = {}
    if resume and run_dir and (run_dir / "args.json").is_file():
        saved = load_json(run_dir / "args.json", keys=RUN_KEYS)
    elif "loss" not in explicit or "dataset" not in explicit:
        parser.error("--loss and --dataset are needed (or --resume with the --run-dir of a run that began)")
    try:
        args = saved or resolve_flags(explicit)
    except ValueError as error:
        parser.error(str(error))
    if show_recipe:
        own = [] if saved else explicit.get("loss_args", [])  # those of a run that began are in args
        print(show_flags({key: args[key] for key in ("loss", "dataset", "loss_args", *DEFAULTS)}, own))
        return
    row = row_name(args["loss"])
    run_dir = run_dir or Path("runs") / f"{args['dataset']}_{row}_s{args['seed']}"
    if run_dir.exists() and not resume:
        raise ValueError(f"{run_dir} exists: go on with it (--resume), name another (--run-dir), or remove it")
    if not saved and (run_dir / "args.json").is_file():
        saved = load_json(run_dir / "args.json", keys=RUN_KEYS)
    if saved:
        for key, value in explicit.items():
            before = saved["explicit"].get(key, saved[key])
            if value != before and key not in HARMLESS:
                flag = f"--{key.replace('_', '-')}"
                parser.error(f"{run_dir} began with {flag} {before}, not {value}: leave it out or start another run")
        args = {**saved, **{key: value for key, value in explicit.items() if key in HARMLESS}}
        explicit = saved["explicit"]
    if (run_dir / "result.json").is_file():
        print(metrics_table(load_json(run_dir / "result.json", METRICS), f"{run_dir.name} (finished)"))
        return
    device = find_device(args["device"])
    check_writable(run_dir)
    set_determinism(args["deterministic"])

    # ------------------------------------------------------------------------------------------------------------ data
    split = load_dataset(args["dataset"], args["data_dir"], args["synthetic_ids"])
    if args["eval_on"] == "val":
        split = holdout(split.train, args["seed"])
    records = split.train
    num_classes = 1 + max(record.label for record in records)
    if args["skip_bad_images"]:
        bad = find_bad_images([record.path for record in records], args["workers"])
        print("".join(f"skipped: {sentence}\n" for sentence in bad.values()), end="")
        print(f"{len(bad)} of {len(records):,} training images are bad and skipped")
        records = [record for position, record in enumerate(records) if position not in bad]
    names = digest_of_names(record.path for record in records)
    if saved and saved["environment"].get("images") != names:
        raise ValueError(f"{run_dir} began with other training images than those in {args['data_dir']}: put them back")
    here = environment(device, names)
    if saved and (change := change_of(saved["environment"], here)):
        print(f"{run_dir} {change}: not bit for bit as without a break")
    all_labels = torch.tensor([record.label for record in records])
    if args["sampler"] == "pk":
        sampler = PKSampler(all_labels.tolist(), args["p"], args["k"], args["seed"])
    else:
        sampler = RandomSampler(len(records), args["batch_size"], args["seed"])
    num_steps = len(sampler) * args["epochs"]
    settings = {key: args[key] for key in ("random_crop", "cache", "workers")}

    # -------------------------------------------------------------------------------------------------- model and loss
    seed_everything(args["seed"])
    weights = "none" if (run_dir / "last.pt").exists() else args["weights"]  # last.pt has all of them
    model = build_model(args["arch"], weights).to(device, memory_format=torch.channels_last)
    if not saved:
        args["loss_args"] = resolve_loss_args(args["loss_args"], max(num_steps, 1)) + explicit.get("loss_args", [])
    loss_fn = build_loss(args["loss"], num_classes, model.embedding_dim, args["loss_args"]).to(device)
    groups = [{"params": list(model.parameters()), "lr": args["lr"]}]
    if any(True for _ in loss_fn.parameters()):
        groups.append({"params": list(loss_fn.parameters()), "lr": args["loss_lr"]})
    optimizer = torch.optim.Adam(groups, weight_decay=args["weight_decay"], fused=True)
    first_rates = [group["lr"] for group in groups]
    forward = torch.compile(model) if args["compile"] else model
    images_of = TrainingImages([record.path for record in records], args["height"], args["width"], device, **settings)

    # ----------------------------------------------------------------------------------------------------------- train
    with locked(run_dir, new=not saved):
        if not saved:
            args |= {"explicit": explicit, "environment": here, "num_classes": num_classes}
            args["val_pids"] = sorted({r.pid for r in split.query + split.gallery}) if args["eval_on"] == "val" else []
            save_json(run_dir / "args.json", args)
        first_epoch, log = resume_run(run_dir, args, {*args} - {*HARMLESS, "explicit"}, model, loss_fn, optimizer)
        print(f"{args['dataset']}: {len(records):,} training images of {num_classes:,} identities (kept in "
              f"{images_of.where}), {len(split.query):,} queries, {len(split.gallery):,} gallery images")  # fmt: skip
        print(f"{' '.join([args['loss'], *args['loss_args']])} on {args['arch']} {args['height']}x{args['width']}, "
              f"{args['device']}{' bfloat16' if args['amp'] else ''}, {args['epochs']} epochs x {len(sampler)} steps x "
              f"{sampler.batches(0).shape[1]} images ({args['sampler']}) -> {run_dir}")  # fmt: skip

        def evaluate() -> dict:
            settings = {key: args[key] for key in ("height", "width", "amp", "workers")}
            return score(embed_split(model, split, device=device, **settings), args["metric"], args["ignore_cameras"])

        def save(epoch: int) -> None:
            parts = {"model": model, "loss": loss_fn} | ({"optimizer": optimizer} if epoch < args["epochs"] else {})
            state = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(run_dir / "last.pt", {**state, "epoch": epoch, "args": json.dumps(args)})

        stop_signals = []  # SIGINT and SIGTERM end the run after the step; a second one at once
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda got, _: stop_signals.append(got) if not stop_signals else sys.exit(128 + got))

        def stop_if_asked(epoch: int) -> None:
            if stop_signals:
                what = f"from epoch {epoch}" if epoch <= args["epochs"] else "with the scoring"
                print(f"stopped by {signal.Signals(stop_signals[0]).name}: --resume --run-dir {run_dir} goes on {what}")
                sys.exit(128 + stop_signals[0])

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
                    size = torch.nn.utils.get_total_norm(
                        [loss.detach(), *(p.grad for group in groups for p in group["params"] if p.grad is not None)]
                    )  # the 2-norm is a tenth of the price of the largest element
                    first_bad = torch.where(size.isfinite(), first_bad, first_bad.clamp(max=step))
                    if (step + 1) % LOG_EVERY == 0 or step + 1 == len(order):  # only here it waits for the device
                        total, bad_step = torch.stack([loss_sum, first_bad]).tolist()
                        if bad_step < math.inf:
                            raise FloatingPointError(
                                f"the loss or its gradient is not finite at epoch {epoch + 1}, step {int(bad_step) + 1}"
                                f": try a smaller --lr or --loss-lr; "
                                + (f"{run_dir} keeps the state after epoch {epoch}" if epoch else "nothing was saved")
                            )
                        bar.set_postfix(loss=f"{total / (step + 1):.4f}", refresh=False)
                    bar.update(len(images))
                    stop_if_asked(epoch + 1)
            seconds = time.perf_counter() - start
            tensors = [*model.state_dict().values(), *loss_fn.state_dict().values()]
            if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
                raise FloatingPointError(f"the weights are not finite after epoch {epoch + 1}: nothing was saved of it")
            line = {"epoch": epoch + 1, "loss": total / len(order), "lr": args["lr"] * factor,
                    "seconds": round(seconds, 3), "images_per_second": round(order.numel() / seconds, 1)}  # fmt: skip
            if args["eval_every"] and (epoch + 1) % args["eval_every"] == 0 and epoch + 1 < args["epochs"]:
                line |= evaluate()
            log.append(line)
            save_log(run_dir / "log.jsonl", log)
            save(epoch + 1)
            scores = f", rank-1 {line['rank1']:.1%}, mAP {line['mAP']:.1%}" if "mAP" in line else ""
            speed = f"{line['images_per_second']:.0f} images/s"
            print(f"epoch {epoch + 1}/{args['epochs']}: loss {line['loss']:.4f}, {speed}{scores}")
            stop_if_asked(epoch + 2)

        # ---------------------------------------------------------------------------------------------------- evaluate
        if not args["epochs"]:
            save(0)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, interrupt)
        metrics = evaluate()
        save_json(run_dir / "result.json", {**metrics, "row": row, "args": args, "log": log})
        print(metrics_table(metrics, f"{args['dataset']} {row}"))


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("train.py: out of memory on the device: fewer images per batch (--p, --k, --batch-size), or --amp")
    except KeyboardInterrupt as error:
        print("train.py: stopped: the same command with --resume goes on from here", file=sys.stderr)
        sys.exit(128 + (error.args or [signal.SIGINT])[0])
    except torch._dynamo.exc.TorchDynamoException as error:  # imported only now
        sys.exit(f"train.py: --compile does not work here ({' '.join(str(error).split()[:30])}): leave it out")
