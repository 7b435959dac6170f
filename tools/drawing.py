"""Rows of pictures with frames and captions, with Pillow only: what tools.search and tools.show write as PNG."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.images import decode

RIGHT, WRONG, PLAIN = "#1b7837", "#c51b29", "#777777"  # frames; their form tells them apart, too
COLOURS = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]  # of a map, as on the page
HEIGHT, BORDER, GAP, TEXT = 160, 4, 10, 18  # pixels: of a picture, its frame, between two, of a line of text


def draw_rows(rows: Sequence[Sequence[tuple]], height: int, width: int) -> Image.Image:
    """Rows of (image file, caption, right?, map or None) -> a sheet.

    Frames: solid with a check mark for a right image, broken with a cross for a wrong one, a thin one for None. map:
    uint8 (h, w), laid over the picture. height, width: of what the network sees, whose proportions the pictures have.
    Raises BadImage.
    """
    size = round(HEIGHT * width / height), HEIGHT
    font = ImageFont.load_default(13)
    widest = max(int(font.getlength(caption)) for row in rows for _, caption, *_ in row) + 4
    step = max(size[0] + 2 * BORDER, widest) + GAP, size[1] + 2 * BORDER + TEXT + GAP
    sheet = Image.new("RGB", (GAP + step[0] * max(map(len, rows)), GAP + step[1] * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (path, caption, right, activation) in enumerate(row):
            left, top = GAP + BORDER + j * step[0], GAP + BORDER + i * step[1]
            picture = Image.fromarray(decode(path, [size[::-1]])[0])
            if activation is not None:
                channels = [np.interp(activation, np.linspace(0, 255, 5), c) for c in zip(*COLOURS, strict=True)]
                overlay = Image.fromarray(np.stack(channels, 2).astype(np.uint8))
                overlay = overlay.resize(size, Image.Resampling.BILINEAR)
                picture = Image.blend(picture.convert("L").convert("RGB"), overlay, 0.6)
            sheet.paste(picture, (left, top))
            frame(draw, left, top, left + size[0] - 1, top + size[1] - 1, right)
            draw.text((left, top + size[1] + BORDER + 1), caption, "black", font)
    return sheet


def frame(draw: ImageDraw.ImageDraw, left: int, top: int, right: int, bottom: int, correct: bool | None) -> None:
    if correct is None:
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=PLAIN)
        return
    colour, dash = (RIGHT, 10**6) if correct else (WRONG, 8)
    for x in range(left - BORDER, right + BORDER + 1, 2 * dash):
        for y in (top - BORDER, bottom + 1):
            draw.rectangle((x, y, min(x + dash, right + BORDER), y + BORDER - 1), colour)
    for y in range(top - BORDER, bottom + BORDER + 1, 2 * dash):
        for x in (left - BORDER, right + 1):
            draw.rectangle((x, y, x + BORDER - 1, min(y + dash, bottom + BORDER)), colour)
    x, y = left + 2, top + 2
    draw.rectangle((x, y, x + 17, y + 17), colour)
    marks = [[(4, 9), (8, 13), (14, 4)]] if correct else [[(4, 4), (13, 13)], [(13, 4), (4, 13)]]
    for mark in marks:
        draw.line([(x + a, y + b) for a, b in mark], "white", 3)
