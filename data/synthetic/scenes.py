"""Where people are seen: six cameras, each with a background, a light, a colour cast, a blur and a noise of its own."""

from collections import namedtuple
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SCALE = 2  # everything is drawn at twice the size and averaged down
WIDTH, HEIGHT = 64 * SCALE, 128 * SCALE  # pixels of the canvas
SCENES = {  # colours of the ground and of what is behind everything else
    "plaza": ((196, 188, 176), (176, 206, 232)), "bricks": ((150, 150, 154), (150, 92, 76)),
    "shop": ((112, 108, 108), (88, 84, 82)), "park": ((188, 172, 140), (168, 190, 160)),
    "hall": ((176, 170, 160), (222, 214, 196)), "road": ((104, 106, 112), (140, 150, 160)),
}  # fmt: skip

# light: where it comes from, -1 left, 1 right; contrast: how dark the shaded side is; red, green, blue: factors of the
# channels; resolution: share of the final size; pitch: how far it looks down, in radians; front, left, back, right: how
# often it sees a person so; seed: of the scene
Camera = namedtuple(
    "Camera",
    "scene light contrast red green blue gamma saturation haze blur resolution noise pitch front left back right seed",
    defaults=[0],
)
CAMERAS = (
    Camera("plaza", -0.9, 0.45, 1.03, 1.00, 0.94, 0.97, 1.00, 0.00, 0.3, 1.00, 0.010, 0.10, 5, 2, 3, 2),
    Camera("bricks", 0.7, 0.25, 0.92, 0.98, 1.07, 1.06, 0.90, 0.02, 0.45, 0.90, 0.012, 0.16, 2, 4, 2, 4),
    Camera("shop", 0.2, 0.35, 1.07, 0.98, 0.87, 1.03, 0.97, 0.00, 0.35, 0.95, 0.015, 0.06, 4, 1, 5, 1),
    Camera("park", -0.5, 0.50, 0.95, 1.02, 0.91, 1.10, 1.00, 0.00, 0.5, 0.85, 0.012, 0.14, 2, 4, 3, 3),
    Camera("hall", 0.0, 0.20, 1.04, 1.02, 1.00, 0.90, 0.85, 0.04, 0.4, 0.92, 0.010, 0.20, 5, 1, 5, 1),
    Camera("road", 0.9, 0.55, 0.88, 0.92, 1.04, 1.12, 0.88, 0.03, 0.55, 0.80, 0.018, 0.12, 2, 5, 2, 3),
)


@lru_cache
def cameras(seed: int) -> tuple[Camera, ...]:
    """Six cameras: CAMERAS for seed 0; for another one, scenes of other layouts and numbers between their extremes."""
    if seed == 0:
        return CAMERAS
    rng = np.random.default_rng([seed, 1000])  # a stream of its own: people and images have the numbers below
    names, numbers = rng.permutation(list(SCENES)), np.array([camera[1:-1] for camera in CAMERAS])
    drawn = rng.uniform(numbers.min(axis=0), numbers.max(axis=0), numbers.shape)
    return tuple(Camera(str(name), *row, seed) for name, row in zip(names, drawn.tolist(), strict=True))


@lru_cache
def scene(name: str, seed: int = 0) -> Image.Image:
    """The wide background of one camera, (8 * WIDTH, HEIGHT) pixels of the canvas; the ground begins at 45 %."""
    width, height, horizon = 8 * WIDTH, HEIGHT, int(0.45 * HEIGHT)
    rng = np.random.default_rng([*name.encode(), seed] if seed else list(name.encode()))
    ground, wall = SCENES[name]
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)

    def box(x, y, w, h, colour):
        draw.rectangle((x, y, x + w, y + h), fill=colour)

    def tone(colour, spread=14):
        return tuple(int(c) for c in np.clip(np.array(colour) + rng.integers(-spread, spread + 1), 0, 255))

    box(0, 0, width, horizon, wall)
    if name == "plaza":
        for x in range(0, width, 70):
            top = int(rng.integers(0, horizon // 2))
            box(x, top, 68, horizon, tone((198, 186, 170)))
            for wx in range(x + 8, x + 60, 18):
                for wy in range(top + 10, horizon - 16, 24):
                    box(wx, wy, 9, 13, (112, 130, 150))
        box(0, horizon - 8, width, 16, (110, 150, 84))
    elif name == "bricks":
        for row, y in enumerate(range(0, horizon, 8)):
            for x in range(-(row % 2) * 10, width, 20):
                box(x, y, 18, 6, tone((164, 94, 76)))
        for x in range(120, width, 240):
            box(x, 20, 44, horizon, (84, 92, 98))
            box(x + 90, 16, 50, 40, tone((220, 214, 190), 30))
    elif name == "shop":
        for x in range(0, width, 130):
            box(x + 6, 24, 112, horizon, tone((214, 204, 172), 20))
            for k in range(5):
                box(x + 14 + 21 * k, horizon - 44 - int(rng.integers(0, 34)), 14, 60, tone((150, 110, 100), 70))
            for k in range(7):
                box(x + 6 + 16 * k, 8, 8, 22, ((190, 50, 50), (236, 230, 220))[k % 2])
    elif name == "park":
        box(0, int(0.6 * horizon), width, int(0.5 * height), (128, 152, 100))
        for _ in range(26):
            x, r = int(rng.integers(0, width)), int(rng.integers(22, 44))
            box(x - 4, 40, 8, horizon, (96, 72, 52))
            draw.ellipse((x - r, 30 - r, x + r, 30 + r), fill=tone((86, 122, 74), 20))
        draw.polygon([(0, int(0.72 * height)), (width, int(0.62 * height)), (width, height), (0, height)], fill=ground)
    elif name == "hall":
        for x in range(40, width, 150):
            box(x, 20, 50, horizon, tone((150, 120, 92)))
            box(x + 38, 70, 5, 5, (220, 210, 160))
            box(x + 74, 30, 46, 34, tone((120, 150, 170), 40))
        box(0, horizon - 6, width, 8, (120, 112, 104))
    else:
        for _ in range(60):
            x, r = int(rng.integers(0, width)), int(rng.integers(14, 30))
            draw.ellipse((x - r, 30 - r, x + r, 70 + r), fill=tone((70, 96, 70), 18))
        for x in range(30, width, 190):
            car = tone((130, 120, 130), 90)
            box(x + 28, horizon - 44, 70, 24, tuple(c * 3 // 4 for c in car))
            box(x, horizon - 24, 130, 28, car)
            for wheel in (x + 24, x + 104):
                draw.ellipse((wheel - 11, horizon - 8, wheel + 11, horizon + 14), fill=(36, 36, 40))
        for x in range(0, width, 90):
            box(x, int(0.7 * height), 50, 12, (206, 206, 200))

    if name not in ("park", "road"):  # paving in perspective
        seam = tuple(int(0.88 * c) for c in ground)
        for k in range(9):
            y = horizon + 10 + int((height - horizon) * (k / 9) ** 1.6)
            draw.line((0, y, width, y), fill=seam)
        for x in range(-width, 2 * width, 40):
            draw.line((width / 2 + (x - width / 2) * 0.7, horizon + 10, x, height), fill=seam)
    image = Image.blend(image, Image.new("RGB", image.size, (186, 186, 182)), 0.5)  # pale: the people stand out
    tint = rng.uniform(0.88, 1.12, 3) if seed else 1
    grain = np.asarray(image, np.float32) * tint + rng.normal(0, 4, (height, width, 1))
    return Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8))
