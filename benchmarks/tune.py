"""Searches each loss's own numbers on held-out training identities of the generated data set; never on the test set.

    python benchmarks/tune.py                        # all losses; goes on where it was stopped
    python benchmarks/tune.py --losses arcface triplet
    python benchmarks/tune.py --dry-run              # prints the commands

Every loss has the same budget: three candidates, one short run each with one seed (TRIAL_FLAGS), everything else by the
controlled recipe and the quick flags of experiments.sh. A finished trial is a line of results/tuning/synthetic.jsonl
(the first line holds the settings) and is never run again; several processes may share the work, each with losses of
its own. At the end: all trials, and the winners by mAP as rows for utils/recipes.py.

The log holds one trial more: N-pair with l2 = 1, the largest value of a first list whose place 0.002 then took, because
mAP fell with l2. It is shown, and lost.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 3  # candidates per loss
TRIAL_FLAGS = ["--epochs", "4", "--milestones", "3"]  # instead of those of the quick flags

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


def quick_flags() -> list[str]:
    """QUICK_FLAGS of experiments.sh, the one place that holds them."""
    return shlex.split(re.search(r"^QUICK_FLAGS=\((.+)\)$", (ROOT / "experiments.sh").read_text(), re.MULTILINE)[1])


def model_flags() -> list[str]:
    """The quick flags without epochs and milestones."""
    flags = quick_flags()
    return flags[: flags.index("--epochs")]


def common_flags(seed: int) -> list[str]:
    """The flags that all trials share."""
    return ["--dataset", "synthetic", "--eval-on", "val", *model_flags(), *TRIAL_FLAGS, "--seed", str(seed)]


def trial_flags(row: str, values: dict) -> list[str]:
    """The flags of train.py that a candidate stands for."""
    weights = values.get("loss_weights", {})
    flags = ["--loss", "+".join(f"{weights[term]!r}*{term}" if term in weights else term for term in row.split("+"))]
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


def read_log(path: Path, settings: dict) -> dict[str, dict]:
    """Finished trials by name. ValueError if the log was made with other settings; a cut last line is dropped."""
    if not path.exists():
        return {}
    text = path.read_text()
    if text and not text.endswith("\n"):  # stopped while writing: that trial is run again
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    try:
        first, *lines = map(json.loads, text.splitlines() or ["{}"])
    except ValueError as error:
        raise ValueError(f"{path} holds a line that is not JSON ({error}): remove that line") from None
    if text and first.get("settings") != settings:
        before = first.get("settings")
        raise ValueError(f"{path} was made with other settings, {before}: move it away, or name another --log")
    return {line["trial"]: line for line in lines}


def append(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(content) + "\n")


def winners(trials: dict[str, dict]) -> dict[str, dict]:
    """The best trial (mAP on val) of every loss whose candidates are all done."""
    best = {}
    for row, candidates in CANDIDATES.items():
        done = [trials[name] for name in (trial_name(row, values) for values in candidates) if name in trials]
        if len(done) == len(candidates):
            best[row] = max(done, key=lambda trial: trial["mAP"])
    return best


def report(trials: dict[str, dict]) -> str:
    """All trials as a table, and the winners as Python source: rows LOSS@synthetic of the controlled recipe."""
    from tabulate import tabulate

    best = winners(trials)
    lines = []
    for row in CANDIDATES:
        for t in trials.values():
            if t["row"] == row:
                won = "best" if best.get(row) is t else ""
                scores = [f"{100 * t['rank1']:.1f}", f"{100 * t['mAP']:.1f}", f"{t['seconds']:.0f}"]
                lines.append([t["trial"], *scores, won])
    table = tabulate(lines, ["trial", "rank-1", "mAP", "seconds", ""], disable_numparse=True)
    return f"{table}\n\nFor the controlled recipe (losses with all candidates done):\n\n{source(best) or '(none yet)'}"


def source(best: dict[str, dict]) -> str:
    """Winners as rows of utils/recipes.py, with its double quotes."""
    rows = [f'"{row}@synthetic": {trial["values"]!r},'.replace("'", '"') for row, trial in best.items()]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), help="default: all twelve")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and batches (default: 0)")
    parser.add_argument("--data-dir", help="folder that holds the data sets (default: datasets)")
    parser.add_argument("--log", type=Path, default=ROOT / "results/tuning/synthetic.jsonl", help="file of the trials")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left, run nothing")
    args = parser.parse_args()
    common = common_flags(args.seed)
    trials = read_log(args.log, settings={"flags": common})
    failed = []
    for row in args.losses:
        for values in CANDIDATES[row]:
            name = trial_name(row, values)
            if name in trials:
                continue
            run_dir = Path("runs") / f"tune_s{args.seed}_{name}"
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
            result = json.loads((ROOT / run_dir / "result.json").read_text())
            if not args.log.exists() or args.log.stat().st_size == 0:
                append(args.log, {"settings": {"flags": common}})
            trials[name] = {"trial": name, "row": row, "values": values}
            trials[name] |= {key: result[key] for key in ("rank1", "mAP", "num_queries")}
            trials[name]["seconds"] = round(sum(line["seconds"] for line in result["log"]), 1)
            trials[name]["environment"] = result["args"]["environment"]
            append(args.log, trials[name])
    if not args.dry_run:
        print(report(trials))
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
