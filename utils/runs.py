"""A finished run's result.json in short, what belongs to its setting, and folders of runs in groups.

Runs are grouped by setting: data set, recipe and every flag that differs from what the recipe gives the loss, however
it was given. In a group a row is a loss, and its runs differ in the seed only.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from data import reader_options
from losses import all_arguments, row_name
from utils.errors import UserError
from utils.files import load_json, write_text
from utils.flags import DEFAULTS, FREE, SCORING, WORKED_OUT, command_line, new_run

NAMES = {"market": "Market-1501", "duke": "DukeMTMC-reID"}  # the data sets of the published comparison
# Rank-1 and mAP in percent of "Person re-identification based on deep metric learning": one run per cell.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "softmax": {"market": (82.3, 64.6), "duke": (72.6, 54.9)},
    "triplet": {"market": (77.9, 59.2), "duke": (70.4, 52.6)},
    "softmax+triplet": {"market": (83.7, 66.8), "duke": (75.1, 57.3)},
    "softmax+center": {"market": (84.2, 66.1), "duke": (73.3, 55.9)},
    "npair": {"market": (79.8, 62.2), "duke": (75.0, 57.2)},
    "histogram": {"market": (75.9, 59.6), "duke": (68.3, 50.1)},
    "focal": {"market": (82.8, 64.2), "duke": (72.8, 54.1)},
    "multi_similarity": {"market": (72.8, 55.9), "duke": (66.0, 47.3)},
    "sphereface_m1": {"market": (85.6, 69.2), "duke": (75.6, 58.1)},
    "sphereface": {"market": (86.2, 70.0), "duke": (76.0, 58.1)},
    "cosface": {"market": (84.9, 65.1), "duke": (75.0, 54.7)},
    "arcface": {"market": (85.1, 65.0), "duke": (75.2, 54.3)},
}
LOCAL = ("data_dir", "val_pids", "notes")  # what belongs to one machine: never collected


@dataclass(frozen=True)
class Setting:
    """All that the rows of a table have in common. Recipes may set other values for each row."""

    data: str  # what it was trained on, in words, and whether people of it were held out
    recipe: str
    training: tuple[str, ...]  # backbone, weights, size, epochs, bfloat16, processes, in words
    flags: tuple[tuple[str, str], ...]  # further ones in which it differs from the recipe: (name, as one would type it)

    def __str__(self) -> str:
        words = [self.data, f"{self.recipe} recipe", *self.training, *(typed for _, typed in self.flags)]
        return ", ".join(word for word in words if word)


Groups = dict[Setting, dict[str, dict[int, dict]]]  # setting -> row -> seed -> run


def compact(result: dict) -> dict:
    """A result.json without what belongs to one machine, and with the log in short; of a compact one, the same again.

    Keeps metrics, row, all flags ("explicit" and "environment" among them) and per epoch the loss and, where the run
    was scored, rank1 and mAP. `seconds` is the time of all training epochs, without decoding and scoring.
    """

    def portable(flags: dict) -> dict:
        flags = {key: value for key, value in flags.items() if key not in LOCAL}
        if "weights" in flags:  # a file: its name without the way to it
            *_, folder, name = ["", "", *flags["weights"].replace("\\", "/").split("/")]
            flags["weights"] = f"{folder}/{name}" if name == "last.pt" else name  # the name of that run
        return flags

    args = portable(result["args"])
    args["explicit"] = portable(args["explicit"])
    seconds = result["seconds"] if "seconds" in result else round(sum(line["seconds"] for line in result["log"]), 1)
    log = []
    for line in result["log"]:
        scores = {key: round(line[key], 4) for key in ("rank1", "mAP") if key in line}
        log.append({"epoch": line["epoch"], "loss": float(f"{line['loss']:.5g}"), **scores})
    metrics = {key: value for key, value in result.items() if key not in ("row", "seconds", "args", "log")}
    return {**metrics, "row": result["row"], "seconds": seconds, "args": args, "log": log}


def read_run(path: Path) -> dict:
    """A finished run's JSON in its compact form, flags that it lacks with their defaults. UserError if it is none."""
    try:
        run = compact(json.loads(path.read_text(encoding="utf-8")))
        run["args"] = {**DEFAULTS, **run["args"]}
        if not all(isinstance(run.get(key), float) for key in ("rank1", "mAP")):
            raise KeyError("rank1 or mAP")
        if not {"loss", "dataset"} <= run["args"].keys():
            raise KeyError("loss or dataset")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as a run ({error}): remove it, or collect the run again") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the result of a finished run ({error!r}): remove it") from None
    return run


def read_evaluations(run_dir: Path, args: dict) -> list[dict]:
    """What evaluate.py found for a finished run on other test sets than its own, one dict each, scored as the run was.

    Each: dataset, title, options (of its reader), rank1, mAP, num_queries. Left out: files that do not say what was
    scored (older ones), other ways of scoring, held-out people, scores before the run was finished, and own pictures
    for a run trained on own pictures, since another split of the same ones may hold people that it was trained on.
    UserError for a file that can't be read.
    """
    own, titles, found = args["dataset"].split("+"), args.get("titles", {}), {}
    known = {describe_set(name, args, titles.get(name)) for name in own} if args["eval_on"] == "test" else set()
    for path in sorted(run_dir.glob("evaluation_*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("dataset") is None or content["eval_on"] == "val" or not content["finished"]:
                continue
            as_the_run = all(content.get(key, DEFAULTS[key]) == args[key] for key in SCORING)
            if "k1" in content or not as_the_run:  # k1: re-ranked
                continue
            for name, metrics in content.get("tests", {content["dataset"]: content}).items():
                options = {key: content["options"].get(key, default) for key, default in options_of(name).items()}
                scores = {"rank1": float(metrics["rank1"]), "mAP": float(metrics["mAP"])}
                test = {"dataset": name, "title": content["titles"][name], "options": options, **scores}
                test["num_queries"] = int(metrics["num_queries"])
                words = describe_set(name, options, test["title"])
                if words not in known and not (name == "folder" and "folder" in own):
                    found.setdefault(words, test)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} can't be read as an evaluation ({error!r}): remove it and score again") from None
    return [*found.values()]


def collect(run_dir: Path, folder: Path) -> Path:
    """Writes folder/runs/NAME.json, the compact form of run_dir/result.json (NAME: the run folder's name).

    If the run was scored on other test sets, too, these scores are under "across" (`read_evaluations`).
    """
    if not (run_dir / "result.json").is_file():
        raise UserError(f"{run_dir} has no result.json: only a finished run can be collected")
    across = read_evaluations(run_dir, read_run(run_dir / "result.json")["args"])
    run = compact(load_json(run_dir / "result.json")) | ({"across": across} if across else {})
    path = folder / "runs" / f"{run_dir.resolve().name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in run.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def load_groups(folder: Path) -> Groups:
    """All runs of a folder. Left out, and said on stderr: one of two that agree in every flag, and what has flags that
    are not known here."""
    paths = sorted(folder.glob("runs/*.json")) or sorted(folder.glob("*/result.json"))
    if not paths:
        raise UserError(f"{folder} holds no finished runs (*/result.json or runs/*.json): train some first")
    groups: Groups = {}
    sources = {}
    for path in paths:
        run = read_run(path)
        if path.name == "result.json":
            run["across"] = read_evaluations(path.parent, run["args"])
        try:
            setting, row, seed = describe(run["args"]), run["row"], run["args"]["seed"]
        except ValueError as error:  # a loss or data set that is no longer there, say
            print(f"{path} is left out: {error}", file=sys.stderr)
            continue
        cell = groups.setdefault(setting, {}).setdefault(row, {})
        if seed in cell:
            print(f"{path} is left out: it has the flags of {sources[setting, row, seed]}", file=sys.stderr)
        else:
            cell[seed], sources[setting, row, seed] = run, path
    return dict(sorted(groups.items(), key=lambda group: order_of(*group)))


def own_flags(args: dict) -> dict:
    """The flags of a run in which it differs from what its recipe gives this loss on this data set."""
    given = {"loss": row_name(args["loss"]), "dataset": args["dataset"], "recipe": args["recipe"]}
    plain = new_run(given)
    for key in DEFAULTS:  # in an order in which what follows from others (milestones from epochs, ...) comes after them
        if key not in (*FREE, "recipe", "seed") and args[key] != plain[key]:
            given[key] = args[key]
            plain = new_run(given)
    own = {key: value for key, value in given.items() if key not in ("loss", "dataset", "recipe")}
    if args["loss"] != plain["loss"]:
        own = {"loss": args["loss"], **own}
    explicit = args["explicit"].get("loss_args", [])
    typed = {pair.partition("=")[0].rpartition(".")[2] for pair in explicit}
    later = {key for kind in WORKED_OUT for key in plain[kind] if key.rpartition(".")[2] not in typed}
    before, values = (all_arguments(flags["loss"], flags["loss_args"]) for flags in (plain, args))
    pairs = [f"{key}={value!r}" for key, value in values.items() if key not in later and value != before[key]]
    return own | ({"loss_args": pairs} if pairs else {})


def options_of(name: str) -> dict:
    """The options of a data set's reader, with their defaults."""
    return {key: option.default for key, option in reader_options().items() if name in option.datasets}


def describe_set(name: str, options: dict, title: str | None = None) -> str:
    """One data set in words: its title (incomplete, say), generated people, the reader's options that are not defaults.

    options: of its reader, others may be among them; one that is absent counts as its default.
    """
    defaults = options_of(name)
    options = {key: options.get(key, default) for key, default in defaults.items()}
    people = options.pop("synthetic_ids", None)
    own = command_line({key: value for key, value in options.items() if value != defaults[key]})
    words = [title or NAMES.get(name, name), f"{people} + {people} people" if people else "", own]
    return ", ".join(word for word in words if word)


def describe_data(args: dict) -> str:
    """What a run was trained on, in words, and whether people of it were held out."""
    titles = args.get("titles", {})
    words = " + ".join(describe_set(name, args, titles.get(name)) for name in args["dataset"].split("+"))
    if args["eval_on"] == "val":
        return f"{words}, scored on held-out training identities"
    count = args.get("environment", {}).get("images", "").partition(" ")[0]  # own pictures grow, under one name
    return f"{words}, {int(count):,} training images" if count and "folder" in args["dataset"].split("+") else words


def describe(args: dict) -> Setting:
    """The setting of a run."""
    words = [args["arch"]]
    words += [{"none": "from scratch", "imagenet": "ImageNet weights"}.get(args["weights"], args["weights"])]
    words += [f"{args['height']}x{args['width']}", f"{args['epochs']} epochs"]
    words += ["bfloat16"] if args["amp"] else []
    processes = args.get("environment", {}).get("processes", 1)  # each with batch-norm statistics of its own
    words += [f"{processes} processes"] if processes > 1 else []
    said = {*reader_options(), "eval_on", "arch", "weights", "height", "width", "epochs", "amp"}
    flags = [(key, command_line({key: value})) for key, value in own_flags(args).items() if key not in said]
    return Setting(describe_data(args), args["recipe"], tuple(words), tuple(flags))


def order_of(setting: Setting, rows: dict[str, dict[int, dict]]) -> tuple:
    """Sort key of a group: data sets that people know first, then the recipe that compares, then the plain settings."""
    dataset = next(iter(next(iter(rows.values())).values()))["args"]["dataset"]
    datasets = [*NAMES, dataset]
    return datasets.index(dataset), setting.recipe != DEFAULTS["recipe"], len(str(setting)), str(setting)


def command(args: dict, **changes) -> str:
    """The command of a run, as someone else would type it; changes: words in the place of flags (loss="LOSS")."""
    recipe = {"recipe": args["recipe"]} if args["recipe"] != DEFAULTS["recipe"] else {}
    place = {"data_dir": "PICTURES"} if args["dataset"] == "folder" else {}
    flags = {"loss": row_name(args["loss"]), "dataset": args["dataset"], **place, **recipe, **own_flags(args)}
    return f"python train.py {command_line({**flags, 'seed': args['seed'], **changes})}"
