"""Searches a loss's own numbers on held-out training identities of the generated data set; never on the test set.

    python benchmarks/tune.py                        # the project's losses; goes on where it was stopped
    python benchmarks/tune.py --losses arcface triplet
    python benchmarks/tune.py --loss mine --candidates "scale=16 loss_lr=1e-3" "scale=32"
    python benchmarks/tune.py --loss softmax+mine --candidates @candidates.txt --epochs 8 --milestones 6

Any registered loss or sum is tuned by --loss and --candidates: [LOSS.]ARGUMENT=VALUE, loss_lr=VALUE and, of a sum,
loss_weights.LOSS=VALUE, separated by spaces; @FILE holds one candidate a line. Flags that are not listed below go to
train.py; with another --dataset among them, its own epochs hold instead of those of a trial.

Everything else is the controlled recipe's. One short run of one seed (TRIAL_FLAGS) for each candidate, three for each
of the project's losses. A finished trial is a line of the log (the first line holds the settings) and is never run
again; several processes may share the work, each with losses of its own. The log of the project's losses is
results/tuning/synthetic.jsonl, that of others runs/tune_LOSS.jsonl. At the end: all trials, and the winners by mAP as
rows for utils/recipes.py.

The project's log holds one trial more: N-pair with l2 = 1, the largest value of a first list whose place 0.002 then
took, because mAP fell with l2. It is shown, and lost.
"""

import argparse
import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from losses import parse_expression, row_name, with_default_weights  # noqa: E402
from utils.flags import FREE, build_parser, new_run  # noqa: E402

BUDGET = 3  # candidates per loss
TRIAL_FLAGS = ["--epochs", "4", "--milestones", "3"]  # instead of the 5 and 4 of the generated data set

# Flag values as in a row of utils/recipes.py. Every number is written out, so that a change of the recipe's rows does
# not change the meaning of a trial. The model's learning rate is 3.5e-4.
CANDIDATES: dict[str, list[dict]] = {
    # a classifier has no number of its own but the speed of its head
    "softmax": [{"loss_lr": 3.5e-4}, {"loss_lr": 1e-3}, {"loss_lr": 3.5e-3}],
    "triplet": [
        {"loss_args": {"triplet.margin": 0.3}},  # torchreid's
        {"loss_args": {"triplet.margin": 1.0}},
        {"loss_args": {"triplet.margin": None}},  # the paper's soft margin
    ],
    "softmax+triplet": [
        {"loss_args": {"triplet.margin": 0.3}, "loss_lr": 3.5e-4},
        {"loss_args": {"triplet.margin": 0.3}, "loss_lr": 1e-3},
        {"loss_args": {"triplet.margin": None}, "loss_lr": 1e-3},
    ],
    "softmax+center": [
        {"loss_weights": {"center": 5e-4}, "loss_lr": 3.5e-4},  # reid-strong-baseline's weight
        {"loss_weights": {"center": 5e-4}, "loss_lr": 1e-3},
        {"loss_weights": {"center": 3e-3}, "loss_lr": 1e-3},  # the paper's weight, for faces
    ],
    # the weight of the squared lengths, which keep the inner products from running away
    "npair": [
        {"loss_args": {"npair.l2": 2e-3}},  # the default
        {"loss_args": {"npair.l2": 2e-2}},
        {"loss_args": {"npair.l2": 2e-1}},
    ],
    # 16 x 4 images give 96 positive pairs: fewer bins than the authors' 150 or 200 may be enough for so few
    "histogram": [
        {"loss_args": {"histogram.num_bins": 25}},
        {"loss_args": {"histogram.num_bins": 50}},
        {"loss_args": {"histogram.num_bins": 150}},
    ],
    "focal": [
        {"loss_args": {"focal.gamma": 2.0}, "loss_lr": 3.5e-4},
        {"loss_args": {"focal.gamma": 2.0}, "loss_lr": 1e-3},
        {"loss_args": {"focal.gamma": 1.0}, "loss_lr": 1e-3},
    ],
    # steepness beta and threshold base of the negatives; (50, 0.5) authors, (50, 1) paper, (10, 1) published table
    "multi_similarity": [
        {"loss_args": {"multi_similarity.beta": 50.0, "multi_similarity.base": 0.5}},
        {"loss_args": {"multi_similarity.beta": 50.0, "multi_similarity.base": 1.0}},
        {"loss_args": {"multi_similarity.beta": 10.0, "multi_similarity.base": 1.0}},
    ],
    "sphereface_m1": [{"loss_lr": 3.5e-4}, {"loss_lr": 1e-3}, {"loss_lr": 3.5e-3}],
    # the margin's final share of the target logit is 1 / (1 + lambda_min): 17 %, 6 %, 2 %
    "sphereface": [
        {"loss_args": {"sphereface.lambda_min": 5.0}, "loss_lr": 1e-3},
        {"loss_args": {"sphereface.lambda_min": 15.0}, "loss_lr": 1e-3},
        {"loss_args": {"sphereface.lambda_min": 50.0}, "loss_lr": 1e-3},
    ],
    # 100 classes want a scale of 11.4 or more for a probability of 0.999 (the lower bound in the CosFace paper)
    "cosface": [
        {"loss_args": {"cosface.scale": 30.0, "cosface.margin": 0.35}, "loss_lr": 3.5e-4},  # the defaults
        {"loss_args": {"cosface.scale": 30.0, "cosface.margin": 0.1}, "loss_lr": 1e-3},
        {"loss_args": {"cosface.scale": 16.0, "cosface.margin": 0.1}, "loss_lr": 1e-3},
    ],
    "arcface": [
        {"loss_args": {"arcface.scale": 64.0, "arcface.margin": 0.1}, "loss_lr": 3.5e-4},  # the published table's
        {"loss_args": {"arcface.scale": 30.0, "arcface.margin": 0.1}, "loss_lr": 1e-3},
        {"loss_args": {"arcface.scale": 16.0, "arcface.margin": 0.1}, "loss_lr": 1e-3},
    ],
    # (128, 0.25) the paper for person re-identification, (80, 0.4) the paper for fine-grained retrieval
    "circle": [
        {"loss_args": {"circle.scale": 128.0, "circle.margin": 0.25}},
        {"loss_args": {"circle.scale": 80.0, "circle.margin": 0.4}},
        {"loss_args": {"circle.scale": 32.0, "circle.margin": 0.25}},
    ],
    "supcon": [
        {"loss_args": {"supcon.temperature": 0.07}},  # the default of the authors' code
        {"loss_args": {"supcon.temperature": 0.1}},  # the paper's
        {"loss_args": {"supcon.temperature": 0.2}},
    ],
    "weighted_triplet": [{}],  # has no number to choose: one trial
    # the authors' proxies learn 100 times as fast as their network
    "proxy_anchor": [
        {"loss_args": {"proxy_anchor.scale": 32.0, "proxy_anchor.margin": 0.1}, "loss_lr": 3.5e-2},
        {"loss_args": {"proxy_anchor.scale": 32.0, "proxy_anchor.margin": 0.1}, "loss_lr": 3.5e-3},
        {"loss_args": {"proxy_anchor.scale": 16.0, "proxy_anchor.margin": 0.1}, "loss_lr": 3.5e-2},
    ],
    # in lists of 63 images, with few pairs to compare, a smoother step may pass more gradient
    "smooth_ap": [
        {"loss_args": {"smooth_ap.temperature": 0.01}},  # the authors'
        {"loss_args": {"smooth_ap.temperature": 0.03}},
        {"loss_args": {"smooth_ap.temperature": 0.1}},
    ],
    # the authors' scale and margin, then those of arcface's rows
    "subcenter_arcface": [
        {"loss_args": {"subcenter_arcface.scale": 64.0, "subcenter_arcface.margin": 0.5}, "loss_lr": 1e-3},
        {"loss_args": {"subcenter_arcface.scale": 30.0, "subcenter_arcface.margin": 0.1}, "loss_lr": 1e-3},
        {"loss_args": {"subcenter_arcface.scale": 16.0, "subcenter_arcface.margin": 0.1}, "loss_lr": 1e-3},
    ],
    "adasp": [
        {"loss_args": {"adasp.temperature": 0.04}},  # the authors'
        {"loss_args": {"adasp.temperature": 0.08}},
        {"loss_args": {"adasp.temperature": 0.16}},
    ],
    # the authors' values; those of arcface's row; the same with statistics that follow a short training
    "adaface": [
        {"loss_args": {"adaface.scale": 64.0, "adaface.margin": 0.4, "adaface.momentum": 0.01}, "loss_lr": 1e-3},
        {"loss_args": {"adaface.scale": 16.0, "adaface.margin": 0.1, "adaface.momentum": 0.01}, "loss_lr": 1e-3},
        {"loss_args": {"adaface.scale": 16.0, "adaface.margin": 0.1, "adaface.momentum": 0.1}, "loss_lr": 1e-3},
    ],
}


def candidate(loss: str, text: str) -> dict:
    """"scale=16 loss_lr=1e-3" as the values of a recipe's row. ValueError, one sentence, if it can't be read."""
    values, names = {}, [name for name, _ in parse_expression(loss)]
    for pair in text.split():
        key, equals, value = pair.partition("=")
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            equals = ""
        if not equals:
            raise ValueError(f"{pair!r} in --candidates is not KEY=VALUE with a number, None, True or False")
        first, _, last = key.rpartition(".")
        if key == "loss_lr":
            values[key] = value
        elif first == "loss_weights" and last in names:
            values.setdefault(first, {})[last] = value
        else:
            values.setdefault("loss_args", {})[key if first or len(names) > 1 else f"{names[0]}.{key}"] = value
    new_run(parsed([*trial_flags(loss, values), "--dataset", "synthetic"]))  # does the loss take them?
    return values


def parsed(flags: list[str]) -> dict:
    return vars(build_parser().parse_args(flags))


def in_effect(flags: list[str]) -> dict:
    """All flags of a run that may change a number, however they were given."""
    args = new_run(parsed(["--loss", "softmax", *flags]))
    return {key: value for key, value in args.items() if key not in ("explicit", *FREE)}


def common_flags(seed: int, more: list[str] = ()) -> list[str]:
    """The flags that all trials share."""
    trial = [] if "--dataset" in more else ["--dataset", "synthetic", *TRIAL_FLAGS]
    return [*trial, "--eval-on", "val", "--seed", str(seed), *more]


def trial_flags(row: str, values: dict) -> list[str]:
    """The flags of train.py that a candidate stands for."""
    flags = ["--loss", with_default_weights(row, values.get("loss_weights", {}))]
    if "loss_args" in values:
        flags += ["--loss-args", *(f"{key}={value!r}" for key, value in values["loss_args"].items())]
    if "loss_lr" in values:
        flags += ["--loss-lr", repr(values["loss_lr"])]
    return flags


def trial_name(row: str, values: dict) -> str:
    """A name for the run folder: arcface_scale=16.0_margin=0.1."""
    own = {**values.get("loss_args", {}), **values.get("loss_weights", {})}
    own |= {"loss_lr": values["loss_lr"]} if "loss_lr" in values else {}
    return "_".join([row, *(f"{key.rpartition('.')[2]}={value!r}" for key, value in own.items())])


def read_log(path: Path, common: list[str]) -> dict[str, dict]:
    """Finished trials by name. ValueError if their flags differ in effect; a cut last line is dropped."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):  # stopped while writing: that trial is run again
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    try:
        first, *lines = map(json.loads, text.splitlines() or ["{}"])
    except ValueError as error:
        raise ValueError(f"{path} holds a line that is not JSON ({error}): remove that line") from None
    if text:
        before = first["settings"]["flags"]
        if in_effect(before) != in_effect(common):
            before = shlex.join(before)
            raise ValueError(f"{path} was made with other settings, {before}: move it away, or name another --log")
    return {line["trial"]: line for line in lines}


def append(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def winners(trials: dict[str, dict], candidates: dict[str, list[dict]] = CANDIDATES) -> dict[str, dict]:
    """The best trial (mAP on val) of every loss whose candidates are all done."""
    best = {}
    for row, of_row in candidates.items():
        done = [trials[name] for name in (trial_name(row, values) for values in of_row) if name in trials]
        if len(done) == len(of_row):
            best[row] = max(done, key=lambda trial: trial["mAP"])
    return best


def report(trials: dict[str, dict], candidates: dict[str, list[dict]], dataset: str) -> str:
    """All trials as a table, and the winners as Python source: rows LOSS@DATASET of the controlled recipe."""
    best, lines = winners(trials, candidates), []
    for row in candidates:
        for t in trials.values():
            if t["row"] == row:
                won = "best" if best.get(row) is t else ""
                scores = [f"{100 * t['rank1']:.1f}", f"{100 * t['mAP']:.1f}", f"{t['seconds']:.0f}"]
                lines.append([t["trial"], *scores, won])
    table = tabulate(lines, ["trial", "rank-1", "mAP", "seconds", ""], disable_numparse=True)
    rows = source(best, dataset) or "(none yet)"
    return f"{table}\n\nFor the controlled recipe (losses with all candidates done):\n\n{rows}"


def source(best: dict[str, dict], dataset: str = "synthetic") -> str:
    """Winners as rows of utils/recipes.py, with its double quotes."""
    rows = [f'"{row}@{dataset}": {trial["values"]!r},'.replace("'", '"') for row, trial in best.items()]
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@",
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--losses", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="of the project's (default: all)")
    add("--loss", help="one loss or sum, with candidates of one's own")
    add("--candidates", nargs="+", metavar="'KEY=VALUE ...'", help="those of --loss, each one argument; or @FILE")
    add("--seed", type=int, default=0, help="seed of split, weights and batches (default: 0)")
    add("--data-dir", help="folder that holds the data sets (default: datasets)")
    add("--log", type=Path, help="file of the trials (default: see above)")
    add("--dry-run", action="store_true", help="print the commands that are left, run nothing")
    args, more = parser.parse_known_args(argv)
    if bool(args.loss) != bool(args.candidates):
        parser.error("--loss and --candidates belong together")
    candidates, log = {row: CANDIDATES[row] for row in args.losses}, ROOT / "results/tuning/synthetic.jsonl"
    if args.loss:
        if row_name(args.loss) != args.loss:
            parser.error("--loss takes no weights here: give them as candidates, loss_weights.LOSS=VALUE")
        candidates, log = {args.loss: [candidate(args.loss, text) for text in args.candidates]}, None
    log = args.log or log or ROOT / "runs" / f"tune_{args.loss}.jsonl"
    common = common_flags(args.seed, more)
    dataset = in_effect(common)["dataset"]
    trials, failed = read_log(log, common), []
    for row, values in [(row, values) for row, of_row in candidates.items() for values in of_row]:
        name = trial_name(row, values)
        if name in trials:
            continue
        run_dir = Path("runs/tune") / f"tune_s{args.seed}_{re.sub(r'[^A-Za-z0-9_.=+-]', 'x', name)}"
        command = [sys.executable, "train.py", *trial_flags(row, values), *common, "--run-dir", str(run_dir)]
        command += ["--data-dir", str(Path(args.data_dir).resolve())] if args.data_dir else []
        command += ["--resume"] if (ROOT / run_dir).exists() else []
        print(shlex.join(command), flush=True)
        if args.dry_run:
            continue
        status = subprocess.run(command, cwd=ROOT).returncode
        if status in (130, 143):  # Ctrl-C, or told to end
            return status
        if status:
            failed.append(name)
            continue
        result = json.loads((ROOT / run_dir / "result.json").read_text(encoding="utf-8"))
        if not log.exists() or log.stat().st_size == 0:
            append(log, {"settings": {"flags": common}})
        trials[name] = {"trial": name, "row": row, "values": values}
        trials[name] |= {key: result[key] for key in ("rank1", "mAP", "num_queries")}
        trials[name]["seconds"] = round(sum(line["seconds"] for line in result["log"]), 1)
        trials[name]["environment"] = result["args"]["environment"]
        append(log, trials[name])
    if not args.dry_run:
        print(report(trials, candidates, dataset))
        if failed:
            print(f"FAILED (run again by the same command): {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"tune.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
