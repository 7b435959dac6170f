"""Finds the pictures that look most like one: a ranked list as a table and as a PNG.

    python -m tools.search --run runs/X --query a.jpg --gallery photos/ --top 10

The gallery's embeddings are kept beside the run (RUN/embeddings), so a second search embeds the query and whatever is
new or has changed. The similarity is the cosine of the embeddings (1: the same direction), or for a run that is scored
with --metric euclidean minus their distance. A query that lies in the gallery is not found itself.
"""

import argparse
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from tools.drawing import draw_rows
from tools.embedding import Kept, Run, add_flags, embed_kept, embed_paths, find_images, open_run, to_device
from utils.errors import script
from utils.files import write_atomically
from utils.flags import number
from utils.verification import similarities

BLOCK = 2048  # gallery images compared at a time


def search(run: Run, query: Tensor, own: list[Path], gallery: Kept, top: int) -> tuple[Tensor, Tensor]:
    """query (Q, D), own: its files -> similarities (Q, top) and places in gallery.paths (Q, top), the nearest first."""
    best, place = (torch.empty(len(query), 0, dtype=kind, device=query.device) for kind in (torch.float64, torch.int64))
    where = {}  # a file -> its places in the gallery, which may hold it under several names
    for i, path in enumerate(gallery.paths):
        where.setdefault(path.resolve(), []).append(i)
    for first in range(0, len(gallery.paths), BLOCK):
        found = similarities(query, to_device(gallery[slice(first, first + BLOCK)], run), run.args["metric"])  # (Q, n)
        for row, path in enumerate(own):
            itself = [i - first for i in where.get(path.resolve(), ())]
            found[row, [i for i in itself if 0 <= i < found.shape[1]]] = -torch.inf
        here = first + torch.arange(found.shape[1], device=found.device)
        best, place = torch.cat([best, found], 1), torch.cat([place, here.expand_as(found)], 1)
        best, order = best.topk(min(top, best.shape[1]), dim=1)
        place = place.gather(1, order)
    return best.cpu(), place.cpu()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     prog="python -m tools.search")  # fmt: skip
    parser.add_argument("--query", type=Path, nargs="+", required=True, help="the picture to look for, or several")
    parser.add_argument("--gallery", type=Path, required=True, help="where to look: a folder, or a CSV file of paths")
    parser.add_argument("--top", type=number(int), default=10, help="how many to find (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("search.png"), help="the PNG to write (default: search.png)")
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out what can't be decoded, and say so")
    add_flags(parser)
    args = parser.parse_args(argv)
    paths = [path for query in args.query for path in find_images(query)]
    run = open_run(args.run, args.device, args.workers)
    gallery = embed_kept(run, find_images(args.gallery), args.skip_bad_images)
    best, place = search(run, to_device(embed_paths(run, paths), run), paths, gallery, args.top)
    rows = []
    for query, found, places in zip(paths, best.tolist(), place.tolist(), strict=True):
        pairs = [(s, gallery.paths[i]) for s, i in zip(found, places, strict=True) if s > -torch.inf]
        table = [[n, s, path] for n, (s, path) in enumerate(pairs, 1)]
        print(f"\n{query}\n{tabulate(table, ['', 'similarity', 'image'], floatfmt='.3f')}")
        rows.append([(query, "query", None, None), *((path, f"{n}: {s:.3f}", None, None) for n, s, path in table)])
    picture = draw_rows(rows, run.args["height"], run.args["width"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, lambda file: picture.save(file, "PNG"))
    print(f"\n{args.out}")


if __name__ == "__main__":
    script("tools.search", main)
