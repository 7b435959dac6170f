"""Do two pictures show one person? Their similarity, and where it lies among pairs of people the network never saw.

    python -m tools.compare --run runs/X a.jpg b.jpg
    python -m tools.compare --run runs/X a.jpg b.jpg --false-match-rate 0.01

The decision is that of the smallest threshold at which at most this share of the pairs of two people is taken for one
person. The pairs are all that the protocol keeps (one person: seen by two cameras) of people that were not trained on:
those of --eval-on val if the run was trained so, otherwise those of its test set, which the threshold then describes.
"""

import argparse
from pathlib import Path

import torch

from evaluate import load_tests
from tools.embedding import add_flags, embed_paths, find_images, open_run, pairs_of, split_features, to_device
from utils.errors import script
from utils.flags import number
from utils.verification import Pairs, at_rate, rates, similarities


def describe(similarity: float, pairs: Pairs, rate: float, whose: str) -> str:
    """What the tool says, from one similarity and the two histograms."""
    edges, tpr, fpr = rates(pairs)
    place = int(torch.searchsorted(edges, similarity).clamp(max=len(edges) - 1))
    found = at_rate(pairs, rate)
    same, others = int(pairs.positive.sum()), int(pairs.negative.sum())
    one = similarity >= found["threshold"]
    lines = [
        f"similarity {similarity:.4f}",
        f"of {same:,} pairs of one person {1 - tpr[place]:.2%} are less alike",
        f"of {others:,} pairs of two people {fpr[place]:.2%} are as alike or more",
        f"the threshold {found['threshold']:.4f} takes at most {100 * rate:g} % of the latter for one person (here "
        f"{found['false_matches']:,}) and finds {found['tpr']:.1%} of the former",
        f"-> {'one person' if one else 'two people'}, by that threshold",
        f"pairs: {whose}",
    ]
    if rate * others < 1:
        lines.append(f"only {others:,} pairs of two people: too few to speak of a rate of {rate:g}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     prog="python -m tools.compare")  # fmt: skip
    parser.add_argument("images", type=Path, nargs=2, help="two pictures")
    parser.add_argument("--false-match-rate", type=number(float, most=1), default=1e-3, metavar="RATE",
                        help="share of the pairs of two people that may pass (default: 0.001: 0.1 %%)")  # fmt: skip
    parser.add_argument("--data-dir", help="the folder that holds the data sets (default: the run's own)")
    add_flags(parser)
    args = parser.parse_args(argv)
    paths = [path for image in args.images for path in find_images(image)]
    if len(paths) != 2:
        parser.error(f"two pictures are compared, not {len(paths):,}")
    run = open_run(args.run, args.device, args.workers)
    tests, title, about = load_tests(args.run, run.args, data_dir=args.data_dir)
    name, split = next(iter(tests.items()))
    pairs = pairs_of(run, split_features(run, split))
    one, other = to_device(embed_paths(run, paths), run).split(1)
    similarity = similarities(one, other, run.args["metric"]).item()
    whose = f"people of the test set of {name}: the threshold describes them, and was not found on others"
    if about["eval_on"] == "val":
        whose = f"people of {title}, held out from training and no part of the test"
    print(describe(similarity, pairs, args.false_match_rate, whose))


if __name__ == "__main__":
    script("tools.compare", main)
