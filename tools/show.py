"""Shows what a trained run finds: one page that opens from the disk, needs no network and can be sent to others.

    python -m tools.show --run runs/X                   -> runs/X/show.html
    python -m tools.show --run runs/X runs/Y            two runs side by side, the queries on which they differ most
    python -m tools.show --run runs/X --png             also runs/X/show.png and show_maps.png

On the page: scores and flags, the CMC curve, the similarities of right and wrong images, and queries with their ten
nearest images (junk and the query's person in its own camera left out, as in the scoring). Pictures are as the network
sees them. "What the embedding looks at": the length of the last feature map's vectors, before they are averaged.
Shown are the hardest queries and as many from easy to hard, --queries in all, or fewer if the page would exceed 15 MB.
"""

import argparse
import base64
import io
import json
import os
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import add_reader_flags, reader_options
from data.images import decode, stream_images
from evaluate import METRICS, cameras, load_tests
from tools.charts import cmc_chart, histogram_bars, similarity_chart
from tools.drawing import draw_rows
from tools.embedding import Run, add_flags, open_run, pairs_of, split_features
from utils.errors import UserError, script, user_input
from utils.features import Features
from utils.files import write_atomically, write_text
from utils.flags import FREE, command_line, number
from utils.ranking import SLACK, average, rank_queries
from utils.verification import Pairs, at_rate, similarities

NEAR, MOST_BYTES = 10, 14_000_000
SIDE = 160  # height of a picture on the page, in pixels of the file


class Shown(NamedTuple):
    """A run and what it found on a test set."""

    run: Run
    features: Features
    camids: tuple  # those that count, of queries (Q,) and gallery (G,)
    results: dict[str, Tensor]  # of utils.ranking.rank_queries
    metrics: dict[str, float]
    pairs: Pairs

    @property
    def name(self) -> str:
        return self.run.name


def look(run: Run, features: Features) -> Shown:
    camids = cameras(features, run.args["ignore_cameras"])
    query = features.query, features.query_pids, camids[0]
    with user_input():
        results = rank_queries(*query, features.gallery, features.gallery_pids, camids[1], run.args["metric"])
        return Shown(run, features, camids, results, average(results), pairs_of(run, features))


def choose(aps: list[Tensor], valid: Tensor, count: int) -> list[int]:
    """Which queries: of one run the hardest and as many evenly from hard to easy, of two those that differ most."""
    places = valid.nonzero().flatten()
    if len(aps) == 2:
        return places[(aps[0] - aps[1])[places].abs().argsort(descending=True, stable=True)][:count].tolist()
    order = places[aps[0][places].argsort(stable=True)].tolist()
    count = min(count, len(order))
    hardest, rest = order[: -(-count // 2)], order[-(-count // 2) :]
    further = count - len(hardest)
    return hardest + [rest[round((i + 1) * len(rest) / further) - 1] for i in range(further)]


def nearest(shown: Shown, query: int) -> list[tuple[int, float, bool]]:
    """The first NEAR gallery images of a query: place, similarity, right?; equally near wrong ones first."""
    f, metric = shown.features, shown.run.args["metric"]
    pid, camid = int(f.query_pids[query]), int(shown.camids[0][query])
    same = f.gallery_pids == pid
    other_camera = torch.as_tensor(shown.camids[1]) != camid
    found = similarities(f.query[query : query + 1], f.gallery, metric)[0].cpu()
    found[(f.gallery_pids == -1) | (same & ~other_camera)] = -torch.inf
    order = (found - 4 * SLACK[torch.float32] * same).topk(min(NEAR, len(found))).indices.tolist()
    return [(i, found[i].item(), bool(same[i])) for i in order if found[i] > -torch.inf]


@torch.inference_mode()
def activation_maps(run: Run, paths: list[str]) -> np.ndarray:
    """(N, h, w) uint8: length of the feature map's vector at each place, from 0, the image's shortest, to 255.

    The feature map is the last output of a module with more than one place; of a ViT its last tokens but the first.
    """
    maps, last, s = [], [], run.settings

    def look(_, __, output) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            last[:] = [output.float().norm(dim=1)]  # (B, h, w)
        elif isinstance(output, Tensor) and output.ndim == 3 and hasattr(run.model, "grid"):
            last[:] = [output[:, 1:].float().norm(dim=2).unflatten(1, run.model.grid)]

    hooks = [module.register_forward_hook(look) for module in run.model.modules()]
    try:
        for images in stream_images([Path(p) for p in paths], s["height"], s["width"], s["device"], 64, s["workers"]):
            with torch.autocast(s["device"].type, torch.bfloat16, enabled=s["amp"]):
                run.model(images)
            maps += last
    finally:
        for hook in hooks:
            hook.remove()
    lengths = torch.cat(maps)
    lengths -= lengths.amin((1, 2), keepdim=True)
    return (255 * lengths / lengths.amax((1, 2), keepdim=True).clamp(min=1e-12)).round().byte().cpu().numpy()


def thumbnail(path: str, height: int, width: int) -> str:
    (pixels,) = decode(Path(path), [(SIDE, round(SIDE * width / height))])
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=82)
    return base64.b64encode(file.getvalue()).decode()


def collect(runs: list[Shown], chosen: list[int], most_bytes: int = MOST_BYTES) -> tuple[dict, list[str]]:
    """What the page's script reads: images (each once), maps, and queries as long as there is room; and the files."""
    f, args = runs[0].features, runs[0].run.args
    places, images, queries, size = {}, [], [], 0
    base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in [*f.query_paths, *f.gallery_paths]])

    def add(path: str, pid: int, camid: int) -> int:
        nonlocal size
        if path not in places:
            places[path] = len(images)
            source = thumbnail(path, args["height"], args["width"])
            images.append({"source": source, "path": os.path.relpath(path, base), "pid": pid, "camid": camid})
            size += len(source) + len(path) + 60 + 200 * len(runs)
        return places[path]

    for query in chosen:
        if size > most_bytes:
            break
        image = add(f.query_paths[query], int(f.query_pids[query]), int(f.query_camids[query]))
        found = []
        for shown in runs:
            near = [[add(f.gallery_paths[i], int(f.gallery_pids[i]), int(f.gallery_camids[i])), round(value, 4), right]
                    for i, value, right in nearest(shown, query)]  # fmt: skip
            first, ap = int(shown.results["first_rank"][query]), round(shown.results["ap"][query].item(), 5)
            found.append({"first": first, "ap": ap, "near": near})
        queries.append({"image": image, "matches": int(runs[0].results["num_matches"][query]), "found": found})
    described = []
    for shown in runs:
        maps = activation_maps(shown.run, list(places))
        of = [base64.b64encode(values.tobytes()).decode() for values in maps]
        described.append({"name": shown.name, "maps": {"height": maps.shape[1], "width": maps.shape[2], "of": of}})
    return {"runs": described, "images": images, "queries": queries}, list(places)


def write_page(runs: list[Shown], title: str, data: dict) -> str:
    """The page, from page.html beside this file."""
    several, valid = len(runs) > 1, runs[0].metrics["num_queries"]
    rows = "".join(
        f"<tr><td>{escape(s.name)}</td>"
        + "".join(f"<td>{100 * s.metrics[key]:.1f}</td>" for key in METRICS[:-1])
        + f"<td>{s.metrics['num_queries']:,}</td></tr>"
        for s in runs
    )
    head = "".join(f"<th>{key.replace('rank', 'rank-').removeprefix('num_')}</th>" for key in METRICS)
    flags = "".join(
        f"<details><summary>flags{' of ' + escape(s.name) if several else ''}</summary><pre>python train.py "
        f"{escape(command(s))}</pre><pre>{escape(json.dumps(all_flags(s), indent=1))}</pre></details>"
        for s in runs
    )
    caption = "CMC: how often a right image is among the first k"
    if several:
        caption += f"; solid: {escape(runs[0].name)}, dashed: {escape(runs[1].name)}"
    charts = f"<figure>{cmc_chart([cmc(s) for s in runs])}<figcaption>{caption}</figcaption></figure>"
    for s in runs:
        found = at_rate(s.pairs, 1e-3)["tpr"]
        caption = (f"what the loss pushes apart: right of the dotted line lie {100 * found:.0f} % of the pairs of one "
                   "person and 0.1 % of those of two people")  # fmt: skip
        caption = f"{escape(s.name)}: {caption}" if several else caption
        charts += f"<figure>{similarity_chart(s.pairs)}<figcaption>{caption}</figcaption></figure>"
    orders = [("hardest", "hardest first"), ("easiest", "easiest first"), ("person", "by person")]
    chosen = "the hardest, and as many from hard to easy"
    if several:
        orders = [("differ", "largest difference first"), ("one", "first run better"),
                  ("two", "second run better"), *orders]  # fmt: skip
        chosen = "those on which the runs differ most"
    if len(data["queries"]) == valid:
        chosen = "all"
    f = runs[0].features
    parts = {
        "title": escape(f"What {' and '.join(s.name for s in runs)} find{'' if several else 's'}"),
        "subtitle": escape(f"{title}: {len(f.query):,} queries, {len(f.gallery):,} gallery images, "
                           f"{runs[0].run.args['metric']} distance; percents"),
        "metrics": f"<table><tr><th></th>{head}</tr>{rows}</table>",
        "flags": flags,
        "charts": charts,
        "chosen": f"Shown are {len(data['queries']):,} of {valid:,} queries: {chosen}. Junk, and the query's person in "
                  "the query's own camera, are left out, as in the scoring.",
        "orders": "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in orders),
        "height": str(runs[0].run.args["height"]),
        "width": str(runs[0].run.args["width"]),
        "data": json.dumps(data).replace("<", "\\u003c"),
    }  # fmt: skip
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    before, *pieces = page.split("{{")
    for piece in pieces:  # in one pass: what is put in is never read again
        name, _, after = piece.partition("}}")
        before += parts[name] + after
    return before.encode("utf-8", "backslashreplace").decode()  # file names may hold anything


def command(shown: Shown) -> str:
    """The flags that were given, without those of the machine."""
    return command_line({key: value for key, value in shown.run.args["explicit"].items() if key not in FREE})


def all_flags(shown: Shown) -> dict:
    return {key: value for key, value in shown.run.args.items() if key not in (*FREE, "explicit", "val_pids", "notes")}


def cmc(shown: Shown, most: int = 50) -> list[float]:
    first = shown.results["first_rank"][shown.results["num_matches"] > 0]
    return [(first <= k).double().mean().item() for k in range(1, min(most, len(shown.features.gallery)) + 1)]


def draw_png(runs: list[Shown], title: str, data: dict, files: list[str], rows: int, maps: bool) -> Image.Image:
    """Scores and charts (with matplotlib, if it is installed) above the first queries, with or without their maps."""
    lines = []
    for query in data["queries"][:rows]:
        for found, described in zip(query["found"], data["runs"], strict=True):
            cells = [(query["image"], f"AP {found['ap']:.2f}", None), *found["near"]]
            lines.append([])
            for image, value, right in cells:
                camid = data["images"][image]["camid"]
                caption = value if right is None else f"{value:.2f}{f' cam {camid}' if camid >= 0 else ''}"
                activation = None
                if maps:
                    values = base64.b64decode(described["maps"]["of"][image])
                    activation = np.frombuffer(values, np.uint8).reshape(described["maps"]["height"], -1)
                lines[-1].append((Path(files[image]), caption, right, activation))
    sheet = draw_rows(lines, runs[0].run.args["height"], runs[0].run.args["width"])
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("the PNG has no charts: pip install matplotlib for these")
        return sheet
    figure = Figure((12, 4), dpi=sheet.width / 12, layout="constrained")
    axes = figure.subplots(1, 1 + len(runs))
    words = [f"{s.name}: rank-1 {s.metrics['rank1']:.1%}, mAP {s.metrics['mAP']:.1%}, mINP {s.metrics['mINP']:.1%} "
             f"({command(s)})"[:170] for s in runs]  # fmt: skip
    figure.suptitle("\n".join([title, *words]), fontsize=9)
    for shown, style in zip(runs, ("-", "--"), strict=False):
        curve = [100 * share for share in cmc(shown)]
        axes[0].plot(range(1, len(curve) + 1), curve, style, label=shown.name)
    axes[0].set(xlabel="rank k", ylabel="queries with a right image within k, %")
    axes[0].legend(fontsize=8)
    for shown, axis in zip(runs, axes[1:], strict=True):
        low, high, same, other = histogram_bars(shown.pairs)
        edges = np.linspace(low, high, len(same) + 1)
        axis.stairs(same, edges, fill=True, alpha=0.4, label="one person")
        axis.stairs(other, edges, linestyle="--", linewidth=1.5, label="two people")
        axis.set(xlabel=f"similarity, {shown.name}", ylabel="share of the pairs")
        axis.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    with Image.open(file) as top:
        picture = Image.new("RGB", (sheet.width, top.height + sheet.height), "white")
        picture.paste(top.convert("RGB").resize((sheet.width, top.height)), (0, 0))
    picture.paste(sheet, (0, picture.height - sheet.height))
    return picture


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     prog="python -m tools.show")  # fmt: skip
    add_flags(parser, several=True)
    parser.add_argument("--queries", type=number(int), default=100, help="how many to show (default: 100)")
    parser.add_argument("--png", action="store_true", help="also show.png and show_maps.png, with the first 12 queries")
    parser.add_argument("--out", type=Path, help="the page to write (default: show.html in the first run's folder)")
    parser.add_argument("--dataset", help="another test set than the run's own")
    parser.add_argument("--data-dir", help="the folder that holds the data sets (default: the run's own)")
    add_reader_flags(parser)
    args = parser.parse_args(argv)
    if len(args.run) > 2:
        parser.error("--run takes one run folder, or two")
    options = {key: value for key, value in vars(args).items() if key in reader_options()}
    runs = []
    for folder in args.run:
        run = open_run(folder, args.device, args.workers)
        tests, title, _ = load_tests(folder, run.args, args.dataset, args.data_dir, options)
        name, split = next(iter(tests.items()))
        if len(tests) > 1:
            print(f"of {title}, {name} is shown: --dataset names another")
        runs.append(look(run, split_features(run, split)))
    names = ("query_paths", "gallery_paths")
    if len(runs) == 2 and any(getattr(runs[0].features, key) != getattr(runs[1].features, key) for key in names):
        raise UserError("the two runs were tested on different images: name a test set with --dataset and --data-dir")
    valid = torch.stack([shown.results["num_matches"] > 0 for shown in runs]).all(0)  # one may ignore cameras
    chosen = choose([shown.results["ap"] for shown in runs], valid, args.queries)
    data, files = collect(runs, chosen)
    out = args.out or args.run[0] / "show.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, write_page(runs, title, data))
    print(f"{out}: {len(data['queries']):,} queries, {out.stat().st_size / 1e6:.1f} MB")
    for maps in (False, True) if args.png else ():
        picture = draw_png(runs, title, data, files, 12 // len(runs), maps)
        file = out.with_name(f"{out.stem}{'_maps' if maps else ''}.png")
        write_atomically(file, lambda stream, picture=picture: picture.save(stream, "PNG"))
        print(file)


if __name__ == "__main__":
    script("tools.show", main)
