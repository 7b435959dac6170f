"""Embeddings of any pictures, by a trained run, into one .npz file.

    python -m tools.embed --run runs/X photos/ out.npz        every image below a folder
    python -m tools.embed --run runs/X photos.csv out.npz     those that a CSV file lists under `path`

The file holds `embeddings` (N, D) float32 as the network gives them and `paths` (N,) text; read it with
np.load("out.npz"). Compare embeddings by their cosine. A picture shows one person, cut out as detectors do.
"""

import argparse
from pathlib import Path

import numpy as np

from tools.embedding import add_flags, embed_kept, find_images, open_run
from utils.errors import UserError, script
from utils.files import write_atomically


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     prog="python -m tools.embed")  # fmt: skip
    parser.add_argument("images", type=Path, help="a folder, a CSV file with a column path, or one image")
    parser.add_argument("out", type=Path, help="the .npz file to write")
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out what can't be decoded, and say so")
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.out.suffix != ".npz":
        parser.error(f"the second name is that of the file to write, and ends in .npz, not {args.out}")
    if args.out.exists():
        raise UserError(f"{args.out} exists: delete it or choose another name")
    paths = find_images(args.images)
    kept = embed_kept(open_run(args.run, args.device, args.workers), paths, args.skip_bad_images)
    names = np.array([str(path) for path in kept.paths], dtype=np.str_)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, lambda file: np.savez(file, embeddings=kept[:], paths=names))
    print(f"{args.out}: {len(names):,} embeddings of {kept.rows.shape[1]} numbers")


if __name__ == "__main__":
    script("tools.embed", main)
