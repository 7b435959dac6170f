"""Measures how hard the generated pedestrians are: neither solvable by colour nor saturated, and like re-ID otherwise.

    python benchmarks/synthetic.py                           # every part; goes on where it was stopped
    python benchmarks/synthetic.py --parts hsv untrained     # a minute or two; the others train
    python benchmarks/synthetic.py --parts softmax long cameras seeds losses

    hsv        HSV histograms over six stripes, nothing learnt
    untrained  the network of the quick setting before its first step, the mean over three seeds
    softmax    trained in the quick setting, seed 0
    long       the same with three times the epochs
    cameras    trained on the images of cameras 1 to 3, half of all, for twice the epochs: as many steps; scored
               within cameras 1 to 3 and within 4 to 6, beside the network trained on all six
    seeds      softmax with five seeds
    losses     seed 0 of every loss in results/runs (this script trains none of them)

Runs are train.py's own, in runs/: a finished one (in runs/ or, under the same name, in results/runs/) is used as it is,
one that began is resumed. Ends with the table of what is wanted and what was found, and writes both, with the commit
and the torch of each part, to results/benchmarks/synthetic.json; parts that are not asked for are kept from that file.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Record, load_dataset  # noqa: E402
from data.synthetic import VERSION, generate  # noqa: E402
from evaluate import embed_split, load_run  # noqa: E402
from models import build_model  # noqa: E402
from utils.environment import current_commit  # noqa: E402
from utils.errors import script  # noqa: E402
from utils.files import load_json, save_json  # noqa: E402
from utils.flags import new_run  # noqa: E402
from utils.ranking import rank_metrics  # noqa: E402
from utils.runs import describe, load_groups  # noqa: E402
from utils.seed import seed_everything  # noqa: E402

PARTS = ("hsv", "untrained", "softmax", "long", "cameras", "seeds", "losses")
KEYS = ("rank1", "mAP")
NEAR, FAR = (1, 2, 3), (4, 5, 6)  # cameras
HEIGHT, WIDTH, EPOCHS, MILESTONE = 128, 64, 5, 4  # the quick setting


def flags_for(times: int = 1) -> list[str]:
    """The quick setting, written out: trained for so many times its epochs."""
    size = ["--height", str(HEIGHT), "--width", str(WIDTH)]
    length = ["--epochs", str(times * EPOCHS), "--milestones", str(times * MILESTONE)]
    return ["--arch", "resnet18", "--weights", "none", *size, *length]


# ------------------------------------------------------------------------------------------------- without training


def hsv_histograms(records: list[Record]) -> np.ndarray:
    """(N, 768): in each of six horizontal stripes the share of pixels in 8 x 4 x 4 bins of hue, saturation, value."""
    rows = []
    for record in records:
        pixels = np.asarray(Image.open(record.path).convert("HSV"))
        for stripe in np.array_split(pixels, 6):
            h, s, v = stripe.reshape(-1, 3).T // np.array([[32], [64], [64]], np.uint8)
            rows.append(np.bincount((h.astype(int) * 4 + s) * 4 + v, minlength=128))
    counts = np.array(rows, np.float32).reshape(len(records), 6, 128)
    return (counts / counts.sum(2, keepdims=True)).reshape(len(records), 768)


def ids(records: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([r.pid for r in records]), np.array([r.camid for r in records])


def measure_hsv(args) -> dict:
    """The better of two common ways to compare histograms: as they are, and by their square roots (Hellinger)."""
    split = load_dataset("synthetic", args.data_dir)
    query, gallery = hsv_histograms(split.query), hsv_histograms(split.gallery)
    found = {}
    for name, change in (("plain", np.asarray), ("square root", np.sqrt)):
        metrics = rank_metrics(change(query), *ids(split.query), change(gallery), *ids(split.gallery))
        found[name] = {key: metrics[key] for key in KEYS}
    best = max(found, key=lambda name: found[name]["rank1"])
    return {**found[best], "compared_by": best, "all": found}


def measure_untrained(args) -> dict:
    split = load_dataset("synthetic", args.data_dir)
    seeds = []
    for seed in range(3):
        seed_everything(seed)
        model = build_model("resnet18").to(memory_format=torch.channels_last).eval()
        features = embed_split(model, split, height=HEIGHT, width=WIDTH, device=torch.device("cpu"))
        metrics = rank_metrics(features.query, *ids(split.query), features.gallery, *ids(split.gallery))
        seeds.append({key: metrics[key] for key in KEYS})
    return {**{key: float(np.mean([s[key] for s in seeds])) for key in KEYS}, "seeds": seeds}


# ---------------------------------------------------------------------------------------------------- with training


def trained(name: str, flags: list[str], checkpoint: bool = False) -> dict:
    """The result of the run of this name, trained now unless it is there; checkpoint: its network is needed too."""
    run_dir = ROOT / "runs" / name
    saved = ROOT / "results/runs" / f"{name}.json"
    if saved.is_file() and not checkpoint:
        return load_json(saved, KEYS)
    if not (run_dir / "result.json").is_file() or (checkpoint and not (run_dir / "last.pt").is_file()):
        command = [sys.executable, "train.py", *flags, "--run-dir", str(run_dir.relative_to(ROOT))]
        command += ["--resume"] if run_dir.exists() else []
        print(shlex.join(["python", *command[1:]]), flush=True)
        status = subprocess.run(command, cwd=ROOT).returncode
        if status:
            raise OSError(f"the training above failed (exit code {status})")
    return load_json(run_dir / "result.json", KEYS)


def quick_run(args, seed: int = 0, suffix: str = "", times: int = 1, checkpoint: bool = False) -> dict:
    flags = ["--loss", "softmax", "--dataset", "synthetic", *flags_for(times), "--seed", str(seed)]
    flags += ["--data-dir", str(args.data_dir)]
    result = trained(f"synthetic_softmax_s{seed}_quick{suffix}", flags, checkpoint)
    return {key: result[key] for key in KEYS}


def measure_softmax(args) -> dict:
    return quick_run(args)


def measure_long(args) -> dict:
    return {**quick_run(args, suffix="_long", times=3), "flags": flags_for(3)[-4:]}


def measure_seeds(args) -> dict:
    runs = [quick_run(args, seed) for seed in range(5)]
    return {key: [run[key] for run in runs] for key in KEYS}


def measure_losses(args) -> dict:
    quick = load_groups(ROOT / "results")[describe(new_run({"loss": "softmax", "dataset": "synthetic"}))]
    return {loss: {key: runs[0][key] for key in KEYS} for loss, runs in sorted(quick.items()) if 0 in runs}


def measure_cameras(args) -> dict:
    """Rank-1 and mAP within cameras 1 to 3 and within 4 to 6, of two networks."""
    quick_run(args, checkpoint=True)
    name = "synthetic_softmax_s0_quick_cameras-1-2-3"
    source, copy = generate(args.data_dir), ROOT / "runs" / f".{name}"  # a Market-layout folder, half of it left out
    shutil.rmtree(copy, ignore_errors=True)
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (copy / folder).mkdir(parents=True)
        for path in (source / folder).glob("*.jpg"):
            if folder != "bounding_box_train" or int(re.search(r"_c(\d)s", path.name)[1]) in NEAR:
                shutil.copyfile(path, copy / folder / path.name)
    try:
        flags = ["--loss", "softmax", "--loss-lr", "1e-3", "--dataset", "market", *flags_for(2), "--seed", "0"]
        trained(name, [*flags, "--data-dir", str(copy.relative_to(ROOT))], checkpoint=True)
    finally:
        shutil.rmtree(copy, ignore_errors=True)

    split = load_dataset("synthetic", args.data_dir)
    found = {}
    for trained_on, run in (("cameras 1-3", name), ("cameras 1-6", "synthetic_softmax_s0_quick")):
        model, flags = load_run(ROOT / "runs" / run, torch.device("cpu"))
        settings = {key: flags[key] for key in ("height", "width", "amp")}
        features = embed_split(model, split, device=torch.device("cpu"), **settings)
        for scored_on, cameras in (("cameras 1-3", NEAR), ("cameras 4-6", FAR)):
            q, g = (np.isin(ids(records)[1], cameras) for records in (split.query, split.gallery))
            q_ids, g_ids = [x[q] for x in ids(split.query)], [x[g] for x in ids(split.gallery)]
            q, g = torch.from_numpy(q), torch.from_numpy(g)
            metrics = rank_metrics(features.query[q], *q_ids, features.gallery[g], *g_ids)
            found.setdefault(trained_on, {})[scored_on] = {key: metrics[key] for key in KEYS}
    return found


# ----------------------------------------------------------------------------------------------------------- the table


def checks(found: dict) -> list[tuple[str, str, str, bool]]:
    """Rows of (figure, value, wanted, holds), for the parts that were measured."""
    rows = []

    def add(figure: str, value: float, wanted: str, holds: bool):
        rows.append((figure, f"{100 * value:.1f}", wanted, holds))

    if hsv := found.get("hsv"):
        add("HSV histograms, rank-1 %", hsv["rank1"], "< 35", hsv["rank1"] < 0.35)
    if untrained := found.get("untrained"):
        add("untrained network, rank-1 %", untrained["rank1"], "< 20", untrained["rank1"] < 0.20)
    if softmax := found.get("softmax"):
        rank1, gap = softmax["rank1"], softmax["rank1"] - softmax["mAP"]
        add("softmax, rank-1 %", rank1, "55 to 85", 0.55 <= rank1 <= 0.85)
        add("softmax, rank-1 less mAP, points", gap, ">= 10", gap >= 0.10)
        if hsv:
            add("softmax less HSV, rank-1, points", rank1 - hsv["rank1"], ">= 25", rank1 - hsv["rank1"] >= 0.25)
        if long := found.get("long"):
            gain = long["mAP"] - softmax["mAP"]
            add("three times the epochs, gain in mAP, points", gain, ">= 3", gain >= 0.03)
    if cameras := found.get("cameras"):
        narrow, wide = (cameras[f"cameras {name}"] for name in ("1-3", "1-6"))
        for key, name in (("rank1", "rank-1"), ("mAP", "mAP")):
            lost = narrow["cameras 1-3"][key] - narrow["cameras 4-6"][key]
            more = lost - (wide["cameras 1-3"][key] - wide["cameras 4-6"][key])
            add(f"trained on cameras 1-3: {name} on 1-3 less 4-6, points", lost, ">= 5", lost >= 0.05)
            add(f"... less the same difference of the network trained on all, {name}", more, ">= 5", more >= 0.05)
    if (seeds := found.get("seeds")) and len(losses := found.get("losses") or {}) > 1:
        for key, name in (("rank1", "rank-1"), ("mAP", "mAP")):
            over_seeds = max(seeds[key]) - min(seeds[key])
            over_losses = max(x[key] for x in losses.values()) - min(x[key] for x in losses.values())
            wanted = f"< {100 * over_losses:.1f}, over the losses"
            add(f"spread of {name} over five seeds, points", over_seeds, wanted, over_seeds < over_losses)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all of them")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "datasets", help="where the images are generated")
    default = ROOT / "results/benchmarks/synthetic.json"
    parser.add_argument("--output", type=Path, default=default, help="default: results/benchmarks/synthetic.json")
    args = parser.parse_args()
    args.data_dir = args.data_dir.resolve()
    settings = {"version": VERSION, "quick_flags": flags_for()}
    report = load_json(args.output, (*settings, "torch", "commit", "found")) if args.output.is_file() else {}
    same = all(report.get(key) == value for key, value in settings.items())
    found, commits, versions = (report[key] if same else {} for key in ("found", "commit", "torch"))
    header = ("figure", "value", "wanted", "holds")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        found[part], commits[part] = globals()[f"measure_{part}"](args), current_commit()
        versions[part] = torch.__version__
        rows = checks(found)
        table = [dict(zip(header, row, strict=True)) for row in rows]
        report = {**settings, "torch": versions, "commit": commits, "found": found, "checks": table}
        save_json(args.output, report)
    print(tabulate([(*row[:3], "yes" if row[3] else "NO") for row in rows], header))


if __name__ == "__main__":
    script("synthetic.py", main)
