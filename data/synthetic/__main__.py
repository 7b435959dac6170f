"""python -m data.synthetic: draws the generated pedestrians, or a sheet of examples."""

import argparse
from pathlib import Path

from PIL import Image

from data.synthetic import TEST, Task, generate, people, render

PEOPLE, GAP, GROUP_GAP = 60, 4, 12  # gaps in pixels: between images, and more between cameras and between pairs


def contact_sheet(path: str | Path, seed: int = 0, num_people: int = 3):
    """A picture to look at: rows are people, each with its near twin below; columns are cameras, two images each."""
    group, pairs = people(PEOPLE, seed, TEST), {}
    for original, twin in zip(group, group[-PEOPLE // 5 :], strict=False):  # the last fifth are twins of the first
        detail = next(name for name in original._fields if getattr(original, name) != getattr(twin, name))
        pairs.setdefault(detail, (original, twin))  # each pair differs in another detail
    rows = [person for pair in list(pairs.values())[:num_people] for person in pair]

    def corner(row: int, column: int) -> tuple[int, int]:
        return column * (64 + GAP) + column // 2 * GROUP_GAP, row * (128 + GAP) + row // 2 * GROUP_GAP

    right, bottom = corner(len(rows) - 1, 11)
    sheet = Image.new("RGB", (right + 64, bottom + 128), "white")
    for row, person in enumerate(rows):
        for column in range(12):
            image, _ = render(Task("", TEST, 2000 + row, column // 2 + 1, column % 2, person), seed)
            sheet.paste(image, corner(row, column))
    sheet.save(path, "PNG")


def main():
    parser = argparse.ArgumentParser(prog="python -m data.synthetic", description=__doc__.partition(": ")[2])
    parser.add_argument("--data-dir", default="datasets", help="folder that holds the data sets")
    parser.add_argument("--num-ids", type=int, default=150, help="people in training, and as many in test")
    parser.add_argument("--seed", type=int, default=0, help="another one: other people, other cameras")
    parser.add_argument("--contact-sheet", metavar="FILE", help="write a PNG of examples instead")
    args = parser.parse_args()
    if args.num_ids < 2 or args.seed < 0:
        parser.error("--num-ids must be at least 2, and --seed at least 0")
    try:
        if args.contact_sheet:
            contact_sheet(args.contact_sheet, args.seed)
        else:
            print(generate(args.data_dir, args.num_ids, args.seed))
    except OSError as error:
        parser.exit(1, f"data.synthetic: {error}\n")


if __name__ == "__main__":
    main()
