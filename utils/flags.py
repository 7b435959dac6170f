"""train.py's flags, and how they become one dict: `new_run` and `resumed_run`. The loop never asks where one came from.

A new run: DEFAULTS, over them the recipe's values (utils/recipes.py), over these the explicit flags. A resumed run:
what its args.json holds; a flag that an older run lacks has its default, and only those of FREE and SCORING may change.
"""

import argparse
import math
import re
import shlex
import zlib
from fractions import Fraction
from pathlib import Path

import torch

from data import DATASETS, add_reader_flags, check_options, find_reader, reader_options
from data.folder import title_of
from data.images import default_workers
from losses import LOSSES, all_arguments, build_loss, describe_arguments, row_name
from losses import with_default_weights as with_weights
from utils.errors import UserError
from utils.files import load_json
from utils.recipes import RECIPES, recipe_values

# In the order of a run's name; what is worked out from another flag stands after it.
DEFAULTS = {
    "recipe": "controlled",
    "data_dir": "datasets",
    **{key: option.default for key, option in reader_options().items()},
    "eval_on": "test",
    "metric": "cosine",
    "ignore_cameras": False,
    "flip_test": False,
    "arch": "resnet50",
    "weights": "imagenet",
    "height": 256,
    "width": 128,
    "last_stride": 2,
    "pool": "avg",
    "neck": "none",
    "epochs": 60,
    "lr": 3.5e-4,
    "loss_lr": None,  # the same as lr
    "weight_decay": 5e-4,
    "milestones": None,  # after 1/3 and 2/3 of the epochs
    "warmup": 0,
    "sampler": "pk",
    "batch_size": None,  # of the random sampler; p * k of the other
    "p": 16,
    "k": 4,
    "random_crop": False,
    "pad_crop": 0,
    "random_erasing": 0,
    "micro_batches": 1,
    "sync_bn": False,
    "amp": False,
    "tf32": None,  # PyTorch's own: on for convolutions, off for other products
    "compile": False,
    "deterministic": False,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "workers": default_workers(),
    "cache": "auto",
    "skip_bad_images": False,
    "seed": 0,
    "eval_every": 0,
    "save_every": 60,
    "tensorboard": False,
}
FREE = ("data_dir", "workers", "cache", "device", "eval_every", "save_every", "tensorboard")  # change no number
OPPOSITES = ("random_crop", "tf32", "flip_test")  # switches that --no-... turns off
WORKED_OUT = {"loss_args_by_steps": "/ number of training steps",
              "loss_args_by_people": "x the least scale for the number of people"}  # fmt: skip
SCORING = ("metric", "ignore_cameras", "flip_test")  # change no number of a training but its score


def number(kind: type, zero: bool = False, most: float = math.inf):
    """An argparse type: a finite int (that fits 63 bits) or float above zero (or zero, if allowed), at most `most`."""

    def convert(text: str):
        value = kind(text)
        if not 0 <= value < (2**63 if kind is int else math.inf) or (value == 0 and not zero) or value > most:
            raise ValueError
        return value

    convert.__name__ = f"{'whole ' if kind is int else ''}number {'of 0 or more' if zero else 'above 0'}"
    convert.__name__ += f" and at most {most:,}" if most < math.inf else ""
    return convert


def known_arch(name: str) -> str:
    """--arch's argparse type. Only here, since importing torchvision takes as long as all else that a table needs."""
    from models import ARCHS

    if name not in ARCHS:
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(ARCHS)})")
    return name


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser of the explicit flags only: a flag that is not given is absent from the result."""
    epilog = "arguments of the losses and their defaults (a recipe may set others: --show-recipe):\n  "
    epilog += "\n  ".join(map(describe_arguments, LOSSES))
    parser = argparse.ArgumentParser(description=description, epilog=epilog, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    # loss
    add("--loss", help=f"a loss or a sum of losses such as softmax+0.5*triplet; losses: {', '.join(LOSSES)}")
    add("--loss-args", nargs="+", metavar="[LOSS.]KEY=VALUE", help="arguments of the loss, e.g. scale=30 margin=0.35")
    add("--loss-lr", type=number(float), help="learning rate of the loss's parameters (default: the recipe's, or --lr)")
    # data
    add("--dataset", help=f"what to train and test on, or a+b for several: {', '.join(DATASETS)} (synthetic: generated "
        "on first use; folder: your own pictures)")
    add("--data-dir", help="folder that holds the data sets' folders, or one data set's own folder (default: datasets)")
    add_reader_flags(parser)
    add("--skip-bad-images", action="store_true", help="go on without training images that can't be decoded")
    # model
    add("--arch", type=known_arch, help="backbone, a classifier of torchvision: resnet50, convnext_tiny, "
        "swin_t, vit_b_16, efficientnet_b0, mobilenet_v3_large, ... (default: resnet50; on synthetic: resnet18)")
    add("--weights", help="imagenet, none, or a file: torchvision's, torchreid's, fast-reid's, reid-strong-baseline's, "
        "or the last.pt of a run (default: imagenet; on synthetic: none)")
    add("--height", type=number(int, most=4096), help="image height in pixels (default: 256; on synthetic: 128)")
    add("--width", type=number(int, most=4096), help="image width in pixels (default: 128; on synthetic: 64)")
    add("--last-stride", type=int, choices=(1, 2), help="1: a ResNet's last feature map is twice as high and wide")
    add("--pool", choices=("avg", "gem"), help="gem: the generalised mean with a learned exponent (ResNets)")
    add("--neck", choices=("none", "bn"), help="bn: batch normalisation without a bias on the embedding")
    # recipe
    add("--recipe", choices=RECIPES, help="default values, also of loss arguments (default: controlled)")
    add("--show-recipe", action="store_true", help="print the resulting flags and stop")
    add("--epochs", type=number(int, zero=True), help="passes over the training images (default: 60; on synthetic: 5)")
    add("--lr", type=number(float), help="Adam's learning rate (default: the recipe's)")
    add("--weight-decay", type=number(float, zero=True), help="Adam's L2 penalty (default: the recipe's, 5e-4)")
    add("--milestones", type=number(int, zero=True), nargs="*",
        help="epochs after which lr falls to 1/10 (default: a third and two thirds of the epochs; on synthetic: 4)")
    add("--warmup", type=number(float, zero=True), metavar="EPOCHS",
        help="epochs in which lr rises from a tenth, step by step (default: 0)")
    add("--sampler", choices=("random", "pk"), help="random images, or P identities x K images (default: the recipe's)")
    add("--batch-size", type=number(int), help="images per batch of the random sampler (default: the recipe's)")
    add("--p", type=number(int), help="identities per batch of the pk sampler (default: the recipe's, 16)")
    add("--k", type=number(int), help="images per identity of the pk sampler (default: the recipe's, 4)")
    add("--random-crop", action=switch, help="enlarge half of the images 1.125x and crop them")
    add("--pad-crop", type=number(int, zero=True), metavar="PIXELS",
        help="a black border and a random crop of the old size; for a height of 256, others in proportion (default: 0)")
    add("--random-erasing", type=number(float, zero=True, most=1), metavar="P",
        help="a random rectangle is set to the mean colour with this probability (default: 0)")
    # several processes, parts of a batch: the loss is over the whole batch, batch normalisation is not
    add("--micro-batches", type=number(int), help="pass a process's batch in N parts, which saves memory and takes one "
        "more forward pass; batch normalisation sees a part at a time (default: the recipe's, 1)")
    add("--sync-bn", action="store_true", help="under torchrun on GPUs: batch normalisation over all processes")
    # speed and device
    add("--amp", action="store_true", help="bfloat16 autocast for the backbone; losses stay in float32")
    add("--tf32", action=switch, help="TF32 products on a GPU, also the loss's (default: PyTorch's own, convolutions)")
    add("--compile", action="store_true", help="torch.compile the backbone: 20 s of warm-up or more")
    add("--deterministic", action="store_true", help="the same bits on every run of one GPU, at some cost in speed")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--workers", type=number(int, zero=True), help="threads that decode images (default: the cores, at most 4)")
    add("--cache", choices=("auto", "off"), help="auto: keep decoded images if they take at most half of the memory")
    # run
    add("--seed", type=number(int, zero=True), help="seed of weights, batches, augmentation (default: the recipe's, 0)")
    add("--eval-on", choices=("test", "val"),
        help="val: a third of the training identities, which ones --seed says, is held out and scored")
    add("--eval-every", type=number(int, zero=True), help="score every N epochs, too (default: 0, only at the end)")
    add("--save-every", type=number(float, zero=True), metavar="SECONDS",
        help="save after an epoch if the last save is older (default: 60; 0: after each); a killed run loses the rest")
    add("--tensorboard", action="store_true", help="the log as curves in RUN/tensorboard, too, if it is installed")
    add("--metric", choices=("cosine", "euclidean"), help="distance of the scoring (default: cosine)")
    add("--ignore-cameras", action="store_true", help="scoring drops only the query image itself, not its whole camera")
    add("--flip-test", action=switch, help="scoring takes the mean of an image's and its mirror image's embedding")
    add("--run-dir", type=Path, help="the run folder itself (default: runs/DATASET_LOSS_sSEED and flags that differ)")
    add("--resume", action="store_true", help="go on with the run in the run folder; flags come from its args.json")
    return parser


def new_run(explicit: dict) -> dict:
    """All flags of a new run, the explicit ones under "explicit", too. ValueError, one sentence, if they clash."""
    if not {"loss", "dataset"} <= explicit.keys():
        raise ValueError("--loss and --dataset are needed (or --resume with the --run-dir of a run that began)")
    for name in explicit["dataset"].split("+"):
        find_reader(name)
    check_options(explicit["dataset"], explicit)
    recipe = explicit.get("recipe", DEFAULTS["recipe"])
    values = recipe_values(recipe, row_name(explicit["loss"]), explicit["dataset"])
    args = {**DEFAULTS, **values, **explicit}
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
        args["milestones"] = [Fraction(1, 3), Fraction(2, 3)]
    if any(isinstance(milestone, Fraction) for milestone in args["milestones"]):
        args["milestones"] = [math.ceil(part * args["epochs"]) for part in args["milestones"]]
    if isinstance(args["warmup"], Fraction):
        args["warmup"] = round(float(args["warmup"] * args["epochs"]), 4)
    args["loss_lr"] = args["loss_lr"] or args["lr"]
    args["loss"] = with_weights(explicit["loss"], args.pop("loss_weights", {}))
    args["loss_args"] = [f"{key}={value!r}" for key, value in values.get("loss_args", {}).items()]
    args["loss_args"] += explicit.get("loss_args", [])
    build_loss(args["loss"], 2, 2, args["loss_args"])  # is all of it known?
    return {**{kind: {} for kind in WORKED_OUT}, **args, "explicit": explicit}


def least_scale(num_people: int) -> float:
    """The scale at which a softmax over cosines can just give one class of C (2 or more) the probability P = 0.999:
    (C - 1) / C * ln((C - 1) P / (1 - P)), the lower bound of CosFace (Wang et al. 2018, section 3.3)."""
    return (num_people - 1) / num_people * math.log((num_people - 1) * 0.999 / 0.001)


def work_out(args: dict, num_steps: int, num_people: int) -> dict:
    """The flags with the loss arguments that depend on the number of training steps, or of people in training."""
    found = {key: value / max(num_steps, 1) for key, value in args["loss_args_by_steps"].items()}
    found |= {key: round(value * least_scale(num_people), 1) for key, value in args["loss_args_by_people"].items()}
    worked_out = [f"{key}={value!r}" for key, value in found.items()]
    args = {key: value for key, value in args.items() if key not in WORKED_OUT}
    return {**args, "loss_args": worked_out + args["loss_args"]}


def resumed_run(run_dir: Path, explicit: dict) -> dict:
    """All flags of a run that began; explicit ones must be those that it began with, or of FREE or SCORING."""
    args = load_args(run_dir)
    for key, value in explicit.items():
        before = args["explicit"].get(key, args[key])
        if value != before and key not in FREE + SCORING:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"{run_dir} began with {flag} {before}, not {value}: leave it out or start another run")
    return {**args, **{key: value for key, value in explicit.items() if key in FREE + SCORING}}


def load_args(run_dir: Path) -> dict:
    """args.json of a run folder; what an older run lacks has its default."""
    keys = ("loss", "dataset", "loss_args", "explicit", "environment")
    return {**DEFAULTS, **load_json(run_dir / "args.json", keys)}


def data_name(dataset: str, data_dir: str) -> str:
    """The data set in a file name: folder-photos for --dataset folder --data-dir photos: that says what the data is."""
    folder = title_of(data_dir).replace(" ", "-")
    return "+".join(folder if name == "folder" else name for name in dataset.split("+"))


def run_name(args: dict) -> str:
    """DATASET_LOSS_sSEED, and _FLAG-VALUE for each explicit flag that may change a number."""
    data, loss = data_name(args["dataset"], args["data_dir"]), args["explicit"]["loss"].replace("*", "x")
    name = f"{data}_{loss}_s{args['seed']}"
    for key in sorted(args["explicit"].keys() - {"loss", "dataset", "seed", *FREE}, key=list(args).index):
        value = args["explicit"][key]
        words = value if isinstance(value, list) else [] if value is True else [value]
        if key != "recipe" or value != DEFAULTS["recipe"]:
            name += "_" + "-".join([*([] if key == "recipe" else [key.replace("_", "-")]), *map(str, words)])
    clean = re.sub(r"[^A-Za-z0-9_.=+-]", "-", name)
    if clean == name and len(name) <= 120:
        return name
    return f"{clean[:110]}-{zlib.crc32(name.encode()):08x}"  # a path, say: shortened, so a checksum tells them apart


def show_flags(args: dict) -> str:
    """What --show-recipe prints: all flags but those of the machine, as one would type them, and every loss argument.

    What depends on the number of training steps or people can't be typed: it follows in a line of its own.
    """
    typed = {pair.partition("=")[0].rpartition(".")[2] for pair in args["loss_args"]}  # a value that was given wins
    later = {key: f"{value} {words}" for kind, words in WORKED_OUT.items() for key, value in args.get(kind, {}).items()
             if key.rpartition(".")[2] not in typed}  # fmt: skip
    pairs = [f"{key}={value!r}" for key, value in all_arguments(args["loss"], args["loss_args"]).items()
             if key not in later]  # fmt: skip
    others = [key for key, option in reader_options().items() if not {*args["dataset"].split("+")} & {*option.datasets}]
    left_out = ["recipe", "explicit", *FREE, *others, *(["p", "k"] if args["sampler"] == "random" else [])]
    keys = ["loss", "dataset", "loss_args", *(key for key in DEFAULTS if key not in left_out)]
    line = command_line({key: args[key] for key in keys} | {"loss_args": pairs})
    notes = [f"# {key}={text}" for key, text in later.items()]
    return "\n".join([line, *notes])


def command_line(args: dict) -> str:
    """Flags (by name; None and switches that are off left out) as one would type them."""
    words = []
    for key, value in args.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True or (value is False and key in OPPOSITES):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)] if value or key == "milestones" else []  # without any: lr never falls
        elif value is not False and value is not None:
            words += [flag, str(value)]
    return shlex.join(words)
