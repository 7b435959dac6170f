"""Trains one loss on one data set and scores it: flags, data, model and loss, train, evaluate.

    python train.py --loss arcface --dataset synthetic          # generated pedestrians, a small network, some minutes
    python train.py --loss arcface --dataset market
    python train.py --loss softmax+triplet --dataset market --amp --loss-args triplet.margin=None
    python train.py --resume --run-dir runs/market_arcface_s0
    torchrun --standalone --nproc_per_node=4 -- train.py --loss arcface --dataset market     # four GPUs share a batch

The run folder (default runs/DATASET_LOSS_sSEED) gets args.json, log.jsonl (a line per epoch), last.pt and result.json.
"""

import json
import math
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import check_true_matches, load_datasets
from data.folder import write_split_csv
from data.holdout import holdout
from data.images import BadImage, TrainingImages, find_bad_images
from data.sampler import PKSampler, RandomSampler
from evaluate import METRICS, metrics_table, score_all
from losses import build_loss, row_name
from models import build_model, model_options
from utils import distributed
from utils.checkpoint import check_writable, locked, resume_run, save_checkpoint, save_log
from utils.environment import change_of, check_bfloat16, digest_of_names, environment, find_device
from utils.errors import UserError, user_input
from utils.files import load_json, save_json
from utils.flags import (
    FREE,
    SCORING,
    build_parser,
    command_line,
    load_args,
    new_run,
    resumed_run,
    run_name,
    show_flags,
    work_out,
)
from utils.seed import seed_everything, set_backends
from utils.tensorboard import open_board

LOG_EVERY = 20  # steps between two looks at the loss; between them nothing waits for the device
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def learning_rate_factor(epoch: float, milestones: list[int], warmup: float = 0) -> float:
    """0.1 for every milestone that lies behind; from 0.1 to 1 in equal steps in the first `warmup` epochs.

    epoch, milestones, warmup: numbers of finished epochs; epoch has a fraction within one.
    """
    rise = 0.1 + 0.9 * epoch / warmup if epoch < warmup else 1.0
    return rise * 0.1 ** sum(epoch >= milestone for milestone in milestones)


@contextmanager
def without_traces(model: nn.Module, device: torch.device):
    """Inside, passes leave running statistics and random numbers as they were: the next pass draws the same dropout."""
    norms = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True


def backward_step(
    model: nn.Module, loss_fn: nn.Module, images: Tensor, labels: Tensor, micro_batches: int = 1, amp: bool = False
) -> Tensor:
    """Passes a batch forward and backward; returns the loss without its graph.

    images (B / N, 3, H, W): the share of this one of N processes; labels (B,): of the whole batch, for all of which the
    loss is computed. micro_batches: the images pass in as many parts, so that memory need hold one part's activations
    only: first for the embeddings, then, with the loss's gradient at the embeddings, once more.
    """

    def embed(part: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            return model(part)  # (b, D)

    if micro_batches == 1:
        embeddings = embed(images)  # (B / N, D)
    else:
        parts = images.tensor_split(micro_batches)
        with without_traces(model, images.device):
            embeddings = torch.cat([embed(part) for part in parts])
        embeddings.requires_grad_()
    loss = loss_fn(distributed.gather(embeddings), labels)  # in float32
    loss.backward()
    if micro_batches > 1:
        for number, gradient in enumerate(embeddings.grad.tensor_split(micro_batches), start=1):
            with nullcontext() if number == micro_batches else distributed.apart(model):
                embed(parts[number - 1]).backward(gradient)
    return loss.detach()


def interrupt(number: int, _) -> None:
    """Handler of SIGINT and SIGTERM outside the epochs, where nothing has to be finished first."""
    raise KeyboardInterrupt(number)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    explicit = vars(parser.parse_args(argv))
    resume, show_recipe, run_dir = (explicit.pop(key, None) for key in ("resume", "show_recipe", "run_dir"))
    try:
        if resume and run_dir and not {"loss", "dataset"} & explicit.keys() and not (run_dir / "args.json").is_file():
            parser.error(f"--resume: {run_dir} is no folder of a run that began (it has no args.json)")
        run_dir = run_dir or Path("runs") / run_name(new_run(explicit))
        resumed = bool(resume) and (run_dir / "args.json").is_file()
        args = resumed_run(run_dir, explicit) if resumed else new_run(explicit)
    except ValueError as error:
        parser.error(str(error))
    if show_recipe:
        print(show_flags(args))
        return
    if run_dir.exists() and not resume:
        raise UserError(f"{run_dir} exists: go on with it (--resume), name another (--run-dir), or remove it")
    distributed.check_same(f"what --resume finds in {run_dir}", resumed)
    distributed.check_same("the set of flags", {key: args[key] for key in args.keys() - {*FREE, "explicit"}})
    if (run_dir / "result.json").is_file():
        print(metrics_table(load_json(run_dir / "result.json", METRICS), f"{run_dir.name} (finished)"))
        otherwise = command_line({key: args[key] for key in SCORING if args[key] != load_args(run_dir)[key]})
        if otherwise:
            print(f"to score it otherwise: python evaluate.py --run {run_dir} {otherwise}")
        return
    row = row_name(args["loss"])
    device = find_device(distributed.own_device(args["device"]))
    if args["amp"]:
        check_bfloat16(device)
    if args["sync_bn"] and device.type != "cuda":
        raise UserError("--sync-bn works on GPUs only: leave it out")
    check_writable(run_dir)
    writes = distributed.rank() == 0
    board = open_board(run_dir / "tensorboard") if args["tensorboard"] and writes else lambda line: None
    set_backends(args["deterministic"], args["tf32"])

    # ------------------------------------------------------------------------------------------------------------ data
    with user_input(), distributed.one_first():  # generated pedestrians are drawn once
        data = load_datasets(args["dataset"], args["data_dir"], args, kept=run_dir / "split.csv")
        records, tests = data.train, data.tests
        if args["eval_on"] == "val":
            tests = {"val": holdout(data.train, args["seed"], ignore_cameras=args["ignore_cameras"])}
            records = tests["val"].train
        for split in tests.values():
            check_true_matches(split, args["ignore_cameras"])
    print("".join(f"{note}\n" for note in data.notes), end="")
    num_classes = 1 + max(record.label for record in records)
    if args["skip_bad_images"]:
        bad = find_bad_images([record.path for record in records], args["workers"])
        print("".join(f"skipped: {sentence}\n" for sentence in bad.values()), end="")
        print(f"{len(bad)} of {len(records):,} training images are bad and skipped")
        records = [record for position, record in enumerate(records) if position not in bad]
    here = environment(device, digest_of_names(record.path for record in records), args["tf32"])
    distributed.check_same("the list of training images", here["images"])
    if resumed and args["environment"].get("images") != here["images"]:
        raise UserError(f"{run_dir} began with other training images than those in {args['data_dir']}: put them back")
    if resumed and (change := change_of(args["environment"], here)):
        print(f"{run_dir} {change}: not bit for bit as without a break")
    all_labels = torch.tensor([record.label for record in records])
    if args["p"] > num_classes and "p" not in args["explicit"] and args["sampler"] == "pk":
        print(f"batches of {num_classes} people, since there are no more (--p)")
        args["p"] = num_classes
    if args["p"] * args["k"] > len(records) and "k" not in args["explicit"] and args["sampler"] == "pk":
        args["k"] = max(len(records) // args["p"], 2)
        print(f"batches of {args['k']} images of each, since there are no more (--k)")
    with user_input():
        if args["sampler"] == "pk":
            sampler = PKSampler(all_labels.tolist(), args["p"], args["k"], args["seed"])
        else:
            sampler = RandomSampler(len(records), args["batch_size"], args["seed"])
    batch_size = sampler.batches(0).shape[1]
    if batch_size % (count := distributed.world_size()):
        raise UserError(f"{count} processes can't share a batch of {batch_size} images equally: other --p, --k, "
                        "--batch-size, or number of processes")  # fmt: skip
    rows = distributed.share(batch_size)  # of a batch, for this process
    if count > 1 < args["micro_batches"] and not resumed and "micro_batches" not in args["explicit"]:
        args["micro_batches"] = max(args["micro_batches"] // count, 1)  # the recipe means parts of the whole batch
        print(f"--micro-batches {args['micro_batches']} in each of {count} processes (the recipe's: of a whole batch)")
    if batch_size // count // args["micro_batches"] < 2:
        raise UserError(f"of {batch_size} images {count} processes with {args['micro_batches']} --micro-batches would "
                        "see fewer than 2 at a time (batch normalisation): larger batches or fewer parts")  # fmt: skip

    # -------------------------------------------------------------------------------------------------- model and loss
    if not resumed:
        args = work_out(args, len(sampler) * args["epochs"], num_classes)
        args |= {"environment": here, "num_classes": num_classes}
        held_out = tests["val"].query + tests["val"].gallery if args["eval_on"] == "val" else []
        args |= {"val_pids": sorted({r.pid for r in held_out}), "titles": data.titles, "notes": data.notes}
    seed_everything(args["seed"])
    with user_input():
        weights = "none" if (run_dir / "last.pt").exists() else args["weights"]  # last.pt has all of them
        model = build_model(args["arch"], weights, **model_options(args))
        model = model.to(device, memory_format=torch.channels_last)
        if args["sync_bn"] and distributed.world_size() > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        loss_fn = build_loss(args["loss"], num_classes, model.embedding_dim, args["loss_args"]).to(device)
    groups = [{"params": list(model.parameters()), "lr": args["lr"]}]
    if any(True for _ in loss_fn.parameters()):
        groups.append({"params": list(loss_fn.parameters()), "lr": args["loss_lr"]})
    optimizer = torch.optim.Adam(groups, weight_decay=args["weight_decay"], fused=True)
    first_rates = [group["lr"] for group in groups]
    forward = distributed.parallel(torch.compile(model) if args["compile"] else model)
    whole_loss = distributed.parallel(loss_fn)
    how = {key: args[key] for key in ("random_crop", "pad_crop", "random_erasing", "cache", "workers")}
    how["cache"] = how["cache"] if args["epochs"] else "off"  # nothing is trained, so nothing is decoded
    images_of = TrainingImages([record.path for record in records], args["height"], args["width"], device, **how)

    # ----------------------------------------------------------------------------------------------------------- train
    def evaluate() -> dict:
        how = {key: args[key] for key in ("height", "width", "amp", "workers", "flip_test")}
        return score_all(model, tests, args["metric"], args["ignore_cameras"], device=device, **how)

    def save(epoch: int) -> None:
        if not writes:
            return
        tensors = [*model.state_dict().values(), *loss_fn.state_dict().values()]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            raise FloatingPointError(f"the weights are not finite after epoch {epoch}: they were not saved")
        parts = {"model": model, "loss": loss_fn} | ({"optimizer": optimizer} if epoch < args["epochs"] else {})
        state = {name: part.state_dict() for name, part in parts.items()}
        save_checkpoint(run_dir / "last.pt", {**state, "epoch": epoch, "args": json.dumps(args)})

    stop_signals = []  # SIGINT and SIGTERM end the run after the step; a second one at once

    def stop_if_asked(saved: int) -> None:
        if number := distributed.largest(stop_signals[0] if stop_signals else 0):  # all processes stop at one step
            what = "with the scoring" if saved == args["epochs"] else f"from epoch {saved + 1}"
            print(f"stopped by {signal.Signals(number).name}: --resume --run-dir {run_dir} goes on {what}")
            sys.exit(128 + number)

    with locked(run_dir, new=not resumed) if writes else nullcontext():
        if "folder" in data.tests and writes and not (run_dir / "split.csv").exists():
            write_split_csv(data.tests["folder"], run_dir / "split.csv", args["data_dir"])  # it outlives added files
        if writes and (not resumed or any(args[key] != load_args(run_dir)[key] for key in (*SCORING, "data_dir"))):
            save_json(run_dir / "args.json", args)
        same = args.keys() - {*FREE, *SCORING, "explicit", "environment"}
        first_epoch, log = resume_run(run_dir, args, same, model, loss_fn, optimizer)
        print(f"{args['dataset']}: {len(records):,} training images of {num_classes:,} identities (kept in "
              f"{images_of.where}), {sum(len(split.query) for split in tests.values()):,} queries, "
              f"{sum(len(split.gallery) for split in tests.values()):,} gallery images")  # fmt: skip
        print(f"{' '.join([args['loss'], *args['loss_args']])} on {args['arch']} {args['height']}x{args['width']}, "
              f"{args['device']}{' bfloat16' if args['amp'] else ''}, {args['epochs']} epochs x {len(sampler)} "
              f"step{'s' * (len(sampler) != 1)} x "
              f"{batch_size} images ({args['sampler']}) -> {run_dir}")  # fmt: skip
        for each in SIGNALS:
            signal.signal(each, lambda got, _: stop_signals.append(got) if not stop_signals else sys.exit(128 + got))
        saved, saved_at = first_epoch, time.monotonic()
        for epoch in range(first_epoch, args["epochs"]):
            seed_everything(args["seed"], epoch, distributed.rank())  # a resumed run goes on exactly as it would have
            model.train()
            loss_fn.train()
            order = sampler.batches(epoch)  # (steps, B)
            labels = all_labels[order].to(device)  # (steps, B)
            loss_sum = torch.zeros((), device=device)
            start = time.perf_counter()
            with tqdm(total=order.numel(), desc=f"epoch {epoch + 1}/{args['epochs']}", unit="image", leave=False,
                      disable=None) as bar:  # fmt: skip
                for step, images in enumerate(images_of.batches(order, args["seed"], epoch, rows)):
                    factor = learning_rate_factor(epoch + step / len(order), args["milestones"], args["warmup"])
                    for group, rate in zip(optimizer.param_groups, first_rates, strict=True):
                        group["lr"] = rate * factor
                    optimizer.zero_grad(set_to_none=True)
                    loss = backward_step(forward, whole_loss, images, labels[step], args["micro_batches"], args["amp"])
                    loss_sum += loss
                    optimizer.step()
                    if (step + 1) % LOG_EVERY == 0 or step + 1 == len(order):  # only here it waits for the device
                        mean = loss_sum.item() / (step + 1)
                        if not math.isfinite(mean):
                            raise FloatingPointError(
                                f"the loss is not finite at epoch {epoch + 1}, step {step // LOG_EVERY * LOG_EVERY + 1}"
                                f" to {step + 1}: try a smaller --lr or --loss-lr; "
                                + (f"{run_dir} keeps the state after epoch {saved}" if saved else "nothing was saved")
                            )
                        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                    bar.update(batch_size)
                    stop_if_asked(saved)
            distributed.average_buffers(model, loss_fn)  # batch-norm statistics above all
            seconds = time.perf_counter() - start
            line = {"epoch": epoch + 1, "loss": mean, "lr": args["lr"] * factor,
                    "seconds": round(seconds, 3), "images_per_second": round(order.numel() / seconds, 1)}  # fmt: skip
            if args["eval_every"] and (epoch + 1) % args["eval_every"] == 0 and epoch + 1 < args["epochs"]:
                line |= evaluate()
            log.append(line)
            if writes:
                save_log(run_dir / "log.jsonl", log)
            board(line)
            due = time.monotonic() - saved_at >= args["save_every"] or stop_signals
            if due or epoch + 1 == args["epochs"]:
                save(epoch + 1)
                saved, saved_at = epoch + 1, time.monotonic()
            speed = f"{line['images_per_second']:.0f} images/s"
            scores = f", rank-1 {line['rank1']:.1%}, mAP {line['mAP']:.1%}" if "mAP" in line else ""
            print(f"epoch {epoch + 1}/{args['epochs']}: loss {mean:.4f}, {speed}{scores}")
            stop_if_asked(saved)

        # ---------------------------------------------------------------------------------------------------- evaluate
        if not args["epochs"]:
            save(0)
        for each in SIGNALS:
            signal.signal(each, interrupt)
        stop_if_asked(args["epochs"])  # a signal since the last look
        metrics = evaluate()
        if writes:
            save_json(run_dir / "result.json", {**metrics, "row": row, "args": args, "log": log})
        board({"epoch": args["epochs"], **metrics})
        print(metrics_table(metrics, f"{args['dataset']} {row}"))


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    for each in SIGNALS:
        signal.signal(each, interrupt)
    try:
        with distributed.processes():
            main()
    except BadImage as error:
        sys.exit(f"train.py: {error} (python -m data.check lists all; --skip-bad-images leaves out those of training)")
    except (UserError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError:
        ways = "fewer images per batch (--p, --k, --batch-size), --micro-batches 4, or --amp"
        sys.exit(f"train.py: out of memory on the device: {ways}")
    except KeyboardInterrupt as error:
        print("train.py: stopped: the same command with --resume goes on from here", file=sys.stderr)
        sys.exit(128 + (error.args or [signal.SIGINT])[0])
    except torch._dynamo.exc.TorchDynamoException as error:  # imported only now
        sys.exit(f"train.py: --compile does not work here ({' '.join(str(error).split()[:30])}): leave it out")
