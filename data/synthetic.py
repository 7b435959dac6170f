"""Generated pedestrians: a data set in Market-1501's layout, drawn on first use with numpy and Pillow.

    folder = generate("datasets", num_ids=150)  # datasets/synthetic-v2-150
    python -m data.synthetic --contact-sheet results/synthetic_contact_sheet.png

An identity is a body and clothes from shared vocabularies, so that many people look alike, and a share of them are near
twins: two people who differ in one detail. A figure is a small skeleton in metres, turned and seen from a slightly
raised camera, then drawn as tapered limbs and columns. Six cameras add a background, a light, a colour cast, a gamma,
a blur and a resolution of their own. Every tracklet and every image has its own random generator, seeded by
(seed, stream, pid, camera, index): the pixels do not depend on the number of workers.

No person was photographed. What holds on these images is no claim about Market-1501.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import uuid
from functools import lru_cache
from math import cos, hypot, pi, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

VERSION = 2  # raised whenever a pixel changes, so that an older folder is never taken for the new one
WIDTH, HEIGHT = 64, 128
SCALE = 2  # figures are drawn at twice the size and averaged down
FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
TRAIN, TEST, JUNK, DISTRACTOR = range(4)  # streams of random numbers

# ---------------------------------------------------------------------------------------------------- identities

COLOURS = {
    "black": (40, 40, 44),
    "white": (238, 236, 230),
    "grey": (132, 134, 138),
    "navy": (44, 56, 100),
    "blue": (58, 112, 196),
    "denim": (92, 118, 156),
    "red": (196, 52, 54),
    "ginger": (160, 86, 50),
    "green": (62, 134, 84),
    "yellow": (234, 192, 72),
    "pink": (230, 148, 170),
    "beige": (208, 188, 154),
    "brown": (122, 84, 58),
    "blond": (214, 176, 104),
    "pale": (244, 208, 180),
    "tan": (206, 156, 118),
    "dark": (128, 86, 62),
}
VOCABULARY = {  # a name that is listed twice is twice as common
    "build": ("slim", "medium", "medium", "broad"),
    "height": ("short", "medium", "tall"),
    "skin": ("pale", "pale", "tan", "dark"),
    "hair": ("short", "short", "long", "ponytail", "bun", "bald", "cap"),
    "hair_colour": ("black", "brown", "brown", "blond", "grey", "ginger"),
    "top": ("t-shirt", "t-shirt", "shirt", "hoodie", "jacket", "coat", "vest"),
    "top_colour": ("black", "black", "white", "white", "grey", "navy", "blue", "red", "green", "yellow", "pink"),
    "second_colour": ("black", "white", "grey", "navy", "red", "yellow"),
    "pattern": ("plain", "plain", "plain", "stripes", "checks", "print", "yoke"),
    "bottom": ("trousers", "trousers", "trousers", "shorts", "skirt"),
    "bottom_colour": ("black", "black", "navy", "denim", "denim", "grey", "beige", "brown"),
    "shoes": ("black", "white", "brown", "red"),
    "bag": ("none", "none", "backpack", "backpack", "shoulder bag", "tote"),
    "bag_colour": ("black", "brown", "red", "blue"),
}
TWIN_SHARE = 0.4  # of all people
TWIN_DETAILS = (
    "hair", "hair_colour", "top", "top_colour", "second_colour", "pattern",
    "bottom", "bottom_colour", "shoes", "bag", "bag_colour",
)  # fmt: skip


class Person(NamedTuple):
    build: str
    height: str
    skin: str
    hair: str
    hair_colour: str  # of the cap, for someone who wears one
    top: str
    top_colour: str
    second_colour: str
    pattern: str
    bottom: str
    bottom_colour: str
    shoes: str
    bag: str
    bag_colour: str


def visible(person: Person) -> Person:
    """The person without the details that cannot be seen: the colour of no bag, say."""
    hidden = {}
    if person.bag == "none":
        hidden["bag_colour"] = ""
    if person.hair == "bald":
        hidden["hair_colour"] = ""
    if person.pattern == "plain" and person.top not in ("jacket", "coat"):
        hidden["second_colour"] = ""
    if person.second_colour == person.top_colour:
        hidden["pattern"] = ""
    return person._replace(**hidden)


def draw_person_from_vocabulary(rng: np.random.Generator) -> Person:
    person = Person(*(words[rng.integers(len(words))] for words in VOCABULARY.values()))
    others = [colour for colour in VOCABULARY["second_colour"] if colour != person.top_colour]
    return person._replace(second_colour=others[rng.integers(len(others))])


def near_twin(person: Person, rng: np.random.Generator) -> Person:
    """The same person but for one detail that can be seen."""
    while True:
        detail = TWIN_DETAILS[rng.integers(len(TWIN_DETAILS))]
        twin = person._replace(**{detail: VOCABULARY[detail][rng.integers(len(VOCABULARY[detail]))]})
        seen = [a != b for a, b in zip(visible(twin), visible(person), strict=True)]
        if twin != person and sum(seen) >= 1 and twin.second_colour != twin.top_colour:
            return twin


def people(num_ids: int, seed: int, stream: int) -> list[Person]:
    """num_ids different people; the last TWIN_SHARE / 2 of them are twins of the first ones."""
    rng = np.random.default_rng([seed, stream])
    twins = int(num_ids * TWIN_SHARE / 2)
    group, known = [], set()
    while len(group) < num_ids:
        source = len(group) - (num_ids - twins)
        person = near_twin(group[source], rng) if source >= 0 else draw_person_from_vocabulary(rng)
        if visible(person) not in known:
            known.add(visible(person))
            group.append(person)
    return group


# ------------------------------------------------------------------------------------------------------- cameras


class Camera(NamedTuple):
    scene: str
    light: float  # where the light comes from: -1 left, 1 right
    contrast: float  # how dark the side in the shade is
    cast: tuple[float, float, float]
    gamma: float
    saturation: float
    haze: float
    blur: float  # pixels
    resolution: float  # share of the final size
    noise: float
    pitch: float  # radians: how far the camera looks down
    views: tuple[float, float, float, float]  # how often it sees a front, a left side, a back, a right side


CAMERAS = (
    Camera("plaza", -0.9, 0.45, (1.03, 1.00, 0.94), 0.97, 1.00, 0.00, 0.3, 1.00, 0.010, 0.10, (5, 2, 3, 2)),
    Camera("bricks", 0.7, 0.25, (0.92, 0.98, 1.07), 1.06, 0.90, 0.02, 0.45, 0.90, 0.012, 0.16, (2, 4, 2, 4)),
    Camera("shop", 0.2, 0.35, (1.07, 0.98, 0.87), 1.03, 0.97, 0.00, 0.35, 0.95, 0.015, 0.06, (4, 1, 5, 1)),
    Camera("park", -0.5, 0.50, (0.95, 1.02, 0.91), 1.10, 1.00, 0.00, 0.5, 0.85, 0.012, 0.14, (2, 4, 3, 3)),
    Camera("hall", 0.0, 0.20, (1.04, 1.02, 1.00), 0.90, 0.85, 0.04, 0.4, 0.92, 0.010, 0.20, (5, 1, 5, 1)),
    Camera("road", 0.9, 0.55, (0.88, 0.92, 1.04), 1.12, 0.88, 0.03, 0.55, 0.80, 0.018, 0.12, (2, 5, 2, 3)),
)


@lru_cache
def scene(name: str) -> Image.Image:
    """The wide background of one camera, (8 * WIDTH, HEIGHT) in supersampled pixels; the ground begins at 45 %."""
    width, height = 8 * WIDTH * SCALE, HEIGHT * SCALE
    horizon = int(0.45 * height)
    rng = np.random.default_rng(list(name.encode()))
    ground = {
        "plaza": (196, 188, 176), "bricks": (150, 150, 154), "shop": (112, 108, 108),
        "park": (188, 172, 140), "hall": (176, 170, 160), "road": (104, 106, 112),
    }[name]  # fmt: skip
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)

    def box(x, y, w, h, colour):
        draw.rectangle((x, y, x + w, y + h), fill=colour)

    def tone(colour, spread=14):
        return tuple(int(c) for c in np.clip(np.array(colour) + rng.integers(-spread, spread + 1), 0, 255))

    if name == "plaza":
        box(0, 0, width, horizon, (176, 206, 232))
        for x in range(0, width, 70):
            top = int(rng.integers(0, horizon // 2))
            box(x, top, 68, horizon, tone((198, 186, 170)))
            for wx in range(x + 8, x + 60, 18):
                for wy in range(top + 10, horizon - 16, 24):
                    box(wx, wy, 9, 13, (112, 130, 150))
        box(0, horizon - 8, width, 16, (110, 150, 84))
    elif name == "bricks":
        box(0, 0, width, horizon, (150, 92, 76))
        for row, y in enumerate(range(0, horizon, 8)):
            for x in range(-(row % 2) * 10, width, 20):
                box(x, y, 18, 6, tone((164, 94, 76)))
        for x in range(120, width, 240):
            box(x, 20, 44, horizon, (84, 92, 98))
            box(x + 90, 16, 50, 40, tone((220, 214, 190), 30))
    elif name == "shop":
        box(0, 0, width, horizon, (88, 84, 82))
        for x in range(0, width, 130):
            box(x + 6, 24, 112, horizon, tone((214, 204, 172), 20))
            for k in range(5):
                box(x + 14 + 21 * k, horizon - 44 - int(rng.integers(0, 34)), 14, 60, tone((150, 110, 100), 70))
            for k in range(7):
                box(x + 6 + 16 * k, 8, 8, 22, ((190, 50, 50), (236, 230, 220))[k % 2])
    elif name == "park":
        box(0, 0, width, horizon, (168, 190, 160))
        box(0, int(0.6 * horizon), width, int(0.5 * height), (128, 152, 100))
        for _ in range(26):
            x, r = int(rng.integers(0, width)), int(rng.integers(22, 44))
            box(x - 4, 40, 8, horizon, (96, 72, 52))
            draw.ellipse((x - r, 30 - r, x + r, 30 + r), fill=tone((86, 122, 74), 20))
        draw.polygon([(0, int(0.72 * height)), (width, int(0.62 * height)), (width, height), (0, height)], fill=ground)
    elif name == "hall":
        box(0, 0, width, horizon, (222, 214, 196))
        for x in range(40, width, 150):
            box(x, 20, 50, horizon, tone((150, 120, 92)))
            box(x + 38, 70, 5, 5, (220, 210, 160))
            box(x + 74, 30, 46, 34, tone((120, 150, 170), 40))
        box(0, horizon - 6, width, 8, (120, 112, 104))
    else:
        box(0, 0, width, horizon, (140, 150, 160))
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

    if name in ("plaza", "hall", "bricks", "shop"):  # paving in perspective
        seam = tuple(int(0.88 * c) for c in ground)
        for k in range(9):
            y = horizon + 10 + int((height - horizon) * (k / 9) ** 1.6)
            draw.line((0, y, width, y), fill=seam)
        for x in range(-width, 2 * width, 40):
            draw.line((width / 2 + (x - width / 2) * 0.7, horizon + 10, x, height), fill=seam)
    image = Image.blend(image, Image.new("RGB", image.size, (186, 186, 182)), 0.5)  # pale: the people stand out
    grain = np.asarray(image, np.float32) + rng.normal(0, 4, (height, width, 1))
    return Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------- figures


BLACK = (0, 0, 0)


def mix(a: tuple, b: tuple, share: float = 0.5) -> tuple:
    return tuple(int(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def between(a: tuple, b: tuple, share: float) -> tuple:
    return tuple(x + share * (y - x) for x, y in zip(a, b, strict=True))


class Pose(NamedTuple):
    """How a figure stands in the box: yaw 0 faces the camera; x, ground in supersampled pixels; size in boxes."""

    yaw: float
    phase: float
    stride: float
    x: float
    ground: float
    size: float


class Figure:
    """One person drawn on two layers: flat colours, and apart from them the light, so that patterns are shaded too."""

    def __init__(self, person: Person, pose: Pose, camera: Camera):
        self.person, self.pose, self.side = person, pose, camera.light
        self.tones = tuple(int(255 * (1 - camera.contrast * dark)) for dark in (1.0, 0.45, 0.0))
        self.colour = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE))
        self.light = Image.new("L", self.colour.size)  # 0 where there is nobody
        self.draw_colour, self.draw_light = ImageDraw.Draw(self.colour), ImageDraw.Draw(self.light)
        self.cos, self.sin, self.pitch = cos(pose.yaw), sin(pose.yaw), sin(camera.pitch)
        self.tall = {"short": 1.58, "medium": 1.70, "tall": 1.84}[person.height]
        self.girth = {"slim": 0.88, "medium": 1.0, "broad": 1.2}[person.build]
        self.loose = self.girth * (1.12 if person.top in ("hoodie", "jacket", "coat") else 1.0)
        self.unit = pose.size * HEIGHT * SCALE / self.tall  # supersampled pixels per metre
        self.lean = 0.04 * pose.stride
        self.skin, self.hair = COLOURS[person.skin], COLOURS[person.hair_colour]
        self.top, self.second = COLOURS[person.top_colour], COLOURS[person.second_colour]
        self.bottom, self.shoes = COLOURS[person.bottom_colour], COLOURS[person.shoes]
        self.bag = COLOURS[person.bag_colour]

        legs = [self.bend_leg(side) for side in (-1, 1)]
        self.hip_y = 0.055 - min(ankle[1] for _, _, ankle, _ in legs)  # the lower foot stands on the ground
        self.waist_y, self.chest_y = self.hip_y + 0.12 * self.tall, self.hip_y + 0.24 * self.tall
        self.shoulder_y, self.neck_y = self.hip_y + 0.325 * self.tall, self.hip_y + 0.345 * self.tall

        legs.sort(key=lambda leg: self.depth(0.08 * leg[0], leg[2][2]))
        for leg, dim in zip(legs, (0.86, 1.0), strict=True):  # the far leg lies in the shade of the near one
            self.draw_leg(*leg, dim)
        self.draw_hips()
        parts = [(0.0, self.draw_top), (0.0005, self.draw_head), self.arm(-1), self.arm(1)]
        if person.bag == "backpack":
            parts.append((self.depth(0, self.lean - 0.1 * self.loose - 0.07), self.draw_backpack))
        if person.bag == "shoulder bag":
            parts.append((self.depth(0.2 * self.loose, 0) + 0.001, self.draw_shoulder_bag))
        for _, draw in sorted(parts, key=lambda part: part[0]):  # the nearest comes last
            draw()

    def point(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Body coordinates in metres (x to the left hand, y up, z forward) to pixels."""
        across, depth = x * self.cos + z * self.sin, z * self.cos - x * self.sin
        return self.pose.x + self.unit * across, self.pose.ground - self.unit * (y - depth * self.pitch)

    def depth(self, x: float, z: float) -> float:
        return z * self.cos - x * self.sin

    def limb(self, joints: list[tuple], radii: list[float], colours: list[tuple], dim: float = 1.0):
        """Tapered capsules from joint to joint, shaded as one: no seam at a knee."""
        ends = [(*self.point(*joint), radius * self.unit) for joint, radius in zip(joints, radii, strict=True)]
        for tone, size, shift in zip(self.tones, (1.0, 0.78, 0.4), (0.0, 0.2, 0.45), strict=True):
            discs = [(x + self.side * shift * r, y, r * size) for x, y, r in ends]
            for k in reversed(range(len(colours))):  # the upper part lies over the lower one
                outline = capsule(*discs[k], *discs[k + 1])
                if size == 1.0:
                    self.draw_colour.polygon(outline, fill=colours[k])
                self.draw_light.polygon(outline, fill=int(tone * dim))

    def row(self, y: float, a: float, b: float, x: float = 0.0, z: float = 0.0) -> tuple:
        """A level of a column: an ellipse of half axes a (across) and b (along), centred at (x, y, z)."""
        cx, cy = self.point(x, y, z)
        return cx, cy, self.unit * hypot(a * self.cos, b * self.sin), a, b

    def column(self, rows: list[tuple], colour: tuple):
        for tone, size, shift in zip(self.tones, (1.0, 0.8, 0.4), (0.0, 0.18, 0.45), strict=True):
            left = [(cx + (self.side * shift - size) * w, cy) for cx, cy, w, _, _ in rows]
            right = [(cx + (self.side * shift + size) * w, cy) for cx, cy, w, _, _ in rows]
            outline = left + right[::-1]
            if size == 1.0:
                self.draw_colour.polygon(outline, fill=colour)
            self.draw_light.polygon(outline, fill=tone)

    def band(self, rows: list[tuple], low: float, high: float, colour: tuple):
        """The part of a column between two heights, 0 at the first row and 1 at the last; no change of the light."""
        a, b = level(rows, low), level(rows, high)
        self.draw_colour.polygon(
            [(a[0] - a[2], a[1]), (a[0] + a[2], a[1]), (b[0] + b[2], b[1]), (b[0] - b[2], b[1])], fill=colour
        )

    def patch(self, rows: list[tuple], low: float, high: float, start: float, stop: float, colour: tuple):
        """The part of a column between two heights and two angles (0 is the front), as far as it can be seen."""
        edges = []
        for angle in np.linspace(start, stop, 5).tolist():
            s, c = sin(angle), cos(angle)
            points = []
            for share in (low, (low + high) / 2, high):
                cx, cy, _, a, b = level(rows, share)
                if b * c * self.cos - a * s * self.sin > 0:
                    points.append((cx + self.unit * (a * s * self.cos + b * c * self.sin), cy))
            if len(points) == 3:
                edges.append(points)
        if len(edges) > 1:
            middle = [edge[0] for edge in edges]
            self.draw_colour.polygon(
                middle + edges[-1][1:] + [edge[2] for edge in edges[-2::-1]] + [edges[0][1]], fill=colour
            )

    def strap(self, rows: list[tuple], start: float, stop: float, colour: tuple):
        """A line over a column, from an angle at its first row to an angle at its last, as far as it can be seen."""
        points = []
        for k in range(9):
            angle = start + (stop - start) * k / 8
            s, c = sin(angle), cos(angle)
            cx, cy, _, a, b = level(rows, k / 8)
            if b * c * self.cos - a * s * self.sin > 0:
                points.append((cx + self.unit * (a * s * self.cos + b * c * self.sin), cy))
        if len(points) > 1:
            self.draw_colour.line(points, fill=colour, width=max(2, round(0.04 * self.unit)), joint="curve")

    def ring(self, a: tuple, b: tuple, radius: float, colour: tuple):
        """A ring around a limb at joint a, on the way to b."""
        (ax, ay), (bx, by) = self.point(*a), self.point(*b)
        length = max(1e-6, hypot(bx - ax, by - ay))
        r = radius * self.unit
        ux, uy = r * (bx - ax) / length, r * (by - ay) / length
        corners = ((-1, -0.45), (1, -0.45), (1, 0.45), (-1, 0.45))
        self.draw_colour.polygon([(ax - uy * i + ux * j, ay + ux * i + uy * j) for i, j in corners], colour)

    def oval(self, cx: float, cy: float, a: float, b: float, colour: tuple):
        """An ellipse at a pixel, with half axes in metres."""
        a, b = a * self.unit, b * self.unit
        self.draw_colour.ellipse((cx - a, cy - b, cx + a, cy + b), fill=colour)
        for tone, size, shift in zip(self.tones, (1.0, 0.8, 0.45), (0.0, 0.18, 0.35), strict=True):
            x = cx + self.side * shift * a
            self.draw_light.ellipse((x - a * size, cy - b * size, x + a * size, cy + b * size), fill=tone)

    # the parts of a body

    def bend_leg(self, side: int) -> tuple:
        """side, knee and ankle seen from a hip at height 0, tilt of the foot."""
        phase, part = self.pose.phase + (pi if side < 0 else 0), 0.235 * self.tall
        swing = 0.48 * self.pose.stride * sin(phase)
        tilt = swing - 0.08 - 0.75 * self.pose.stride * max(0.0, cos(phase))
        knee = (0.082 * side * self.girth, -part * cos(swing), part * sin(swing))
        ankle = (0.075 * side * self.girth, knee[1] - part * cos(tilt), knee[2] + part * sin(tilt))
        return side, knee, ankle, tilt

    def draw_leg(self, side: int, knee: tuple, ankle: tuple, tilt: float, dim: float):
        g, kind = self.girth, self.person.bottom
        hip, knee = (0.085 * side * g, self.hip_y, 0.0), (knee[0], knee[1] + self.hip_y, knee[2])
        x, y, z = ankle[0], ankle[1] + self.hip_y, ankle[2]
        toe = (x + 0.02 * side, max(0.03, y - 0.05 + 0.15 * sin(tilt)), z + 0.15 * cos(tilt))
        self.limb([(x, max(0.035, y - 0.05), z - 0.02), toe], [0.045, 0.036], [self.shoes], dim)
        if kind == "trousers":
            self.limb([hip, knee, (x, y, z)], [0.092 * g, 0.074, 0.056], [self.bottom] * 2, dim)
        else:
            self.limb([hip, knee, (x, y, z)], [0.088 * g, 0.058, 0.038], [self.skin] * 2, dim)
        if kind == "shorts":
            self.limb([hip, between(hip, knee, 0.85)], [0.1 * g, 0.086], [self.bottom], dim)

    def draw_hips(self):
        g, waist = self.girth, self.row(self.waist_y, 0.14 * self.girth, 0.1 * self.girth)
        if self.person.bottom == "skirt":
            hem = self.row(self.hip_y - 0.2 * self.tall, 0.2 * g, 0.17 * g + 0.04 * self.pose.stride)
            self.column([waist, self.row(self.hip_y, 0.175 * g, 0.13 * g), hem], self.bottom)
        else:
            self.column([waist, self.row(self.hip_y - 0.05, 0.165 * g, 0.115 * g)], self.bottom)

    def draw_top(self):
        g, lean, top, second, kind = self.loose, self.lean, self.top, self.second, self.person.top
        rows = [
            self.row(self.neck_y + 0.02, 0.07, 0.065, z=lean),
            self.row(self.shoulder_y + 0.012, 0.145 * g, 0.085 * g, z=lean),
            self.row(self.shoulder_y - 0.04, 0.178 * g, 0.105 * g, z=lean),
            self.row(self.chest_y, 0.17 * g, 0.12 * g, z=0.8 * lean),
            self.row(self.waist_y, 0.145 * g, 0.108 * g, z=0.3 * lean),
            self.row(self.hip_y + 0.01, 0.168 * g, 0.122 * g),
        ]
        if kind == "coat":
            rows.append(self.row(self.hip_y - 0.17 * self.tall, 0.19 * g, 0.16 * g))
        self.column(rows, top)
        if self.person.pattern == "stripes":
            for k in range(1, 5):
                self.band(rows, 0.2 * k - 0.02, 0.2 * k + 0.07, second)
        elif self.person.pattern == "checks":
            for k in range(1, 6):
                self.band(rows, 0.17 * k - 0.06, 0.17 * k + 0.01, mix(top, second, 0.6))
            for k in range(-5, 6):
                self.patch(rows, 0.06, 1.0, 0.55 * k - 0.1, 0.55 * k + 0.1, second)
        elif self.person.pattern == "yoke":
            self.band(rows, 0.0, 0.22, second)
            self.band(rows, 0.2, 0.42, second)
        elif self.person.pattern == "print":
            self.patch(rows, 0.3, 0.62, -0.75, 0.75, second)
            self.patch(rows, 0.38, 0.54, -0.4, 0.4, mix(second, top, 0.7))
        if kind in ("jacket", "coat"):  # worn open
            self.patch(rows, 0.0, 1.0, -0.3, 0.3, second)
        elif kind == "hoodie":  # a pocket
            self.patch(rows, 0.68, 0.92, -0.8, 0.8, mix(top, BLACK, 0.18))
        if self.person.bag == "backpack":
            for angle in (-0.75, 0.75):
                self.patch(rows, 0.05, 0.62, angle - 0.16, angle + 0.16, self.bag)
        elif self.person.bag == "shoulder bag":
            self.strap(rows[1:6], -0.5, 1.2, self.bag)
            self.strap(rows[1:6], pi + 0.5, pi - 1.2, self.bag)

    def arm(self, side: int) -> tuple:
        """How near the arm is, and a function that draws it."""
        phase, stride, g = self.pose.phase + (pi if side < 0 else 0), self.pose.stride, self.loose
        swing = -0.55 * stride * sin(phase)  # against the leg
        turn = swing + 0.3 + 0.2 * stride
        upper, fore = 0.165 * self.tall, 0.15 * self.tall
        shoulder = (0.158 * side * g, self.shoulder_y - 0.04, self.lean)
        x, y, z = side * (0.195 * g + 0.02), shoulder[1] - upper * cos(swing), self.lean + upper * sin(swing)
        elbow, wrist = (x, y, z), (side * (0.2 * g + 0.015), y - fore * cos(turn), z + fore * sin(turn))
        hand = (wrist[0], wrist[1] - 0.04 * cos(turn), wrist[2] + 0.04 * sin(turn))
        return self.depth(x, (z + wrist[2]) / 2), lambda: self.draw_arm(side, shoulder, elbow, wrist, hand)

    def draw_arm(self, side: int, shoulder: tuple, elbow: tuple, wrist: tuple, hand: tuple):
        dim = 0.88 if self.depth(shoulder[0], shoulder[2]) < -0.08 else 1.0
        sleeve = {"vest": 0.0, "t-shirt": 0.6}.get(self.person.top, 1.0)  # share of the upper arm
        thick = 0.012 if self.loose > self.girth else 0.0
        self.limb([wrist, hand], [0.03, 0.036], [self.skin], dim)
        if self.person.bag == "tote" and side > 0:
            x, y, z = hand
            for handle in (-1, 1):
                end = (x, y - 0.12, z + 0.09 * handle)
                self.limb([(x, y, z + 0.02 * handle), end], [0.012, 0.012], [self.bag], dim)
            self.column([self.row(y - 0.12, 0.05, 0.14, x, z), self.row(y - 0.42, 0.06, 0.16, x, z)], self.bag)
        thickness = [0.054 + thick, 0.044 + thick, 0.031 + thick]
        self.limb([shoulder, elbow, wrist], thickness, [self.top if sleeve == 1 else self.skin] * 2, dim)
        if sleeve == 0.6:
            self.limb([shoulder, between(shoulder, elbow, sleeve)], [0.057, 0.058], [self.top], dim)
        if self.person.pattern == "stripes" and sleeve:
            for share in (0.25, 0.55, 0.9)[: 1 if sleeve < 1 else 3]:
                self.ring(between(shoulder, elbow, share), elbow, 0.056 + thick, self.second)

    def draw_backpack(self):
        z = self.lean - 0.1 * self.loose - 0.07
        rows = [
            self.row(self.shoulder_y + 0.01, 0.08, 0.05, z=z + 0.04),
            self.row(self.shoulder_y - 0.05, 0.135, 0.085, z=z),
            self.row(self.waist_y - 0.02, 0.15, 0.1, z=z),
            self.row(self.waist_y - 0.08, 0.13, 0.08, z=z + 0.01),
        ]
        self.column(rows, self.bag)
        self.patch(rows, 0.55, 0.9, pi - 0.9, pi + 0.9, mix(self.bag, BLACK, 0.25))
        self.patch(rows, 0.5, 0.55, pi - 1.1, pi + 1.1, mix(self.bag, (255, 255, 255), 0.4))

    def draw_shoulder_bag(self):
        x = 0.2 * self.loose
        rows = [self.row(self.hip_y + 0.1, 0.045, 0.13, x=x), self.row(self.hip_y - 0.12, 0.055, 0.15, x=x)]
        self.column(rows, self.bag)
        self.band(rows, 0.4, 0.5, mix(self.bag, BLACK, 0.3))

    def draw_head(self):
        style, lean = self.person.hair, self.lean
        rx, ry = 0.088, 0.122
        y, z = self.neck_y + 0.05 + ry, lean + 0.02  # of the middle of the head
        neck = [(0, self.neck_y - 0.01, lean), (0, self.neck_y + 0.08, lean + 0.01)]
        self.limb(neck, [0.052, 0.05], [self.skin], 0.85)
        long_hair = [
            self.row(y + 0.5 * ry, 0.9 * rx, 0.7 * rx, z=z - 0.02),
            self.row(y - 0.3 * ry, 1.2 * rx, 0.8 * rx, z=z - 0.05),
            self.row(y - 1.7 * ry, 1.25 * rx, 0.7 * rx, z=z - 0.07),
        ]
        if style == "long" and self.cos > 0:
            self.column(long_hair, self.hair)
        cx, cy = self.point(0, y, z)
        behind = {"bald": self.skin, "cap": COLOURS["brown"]}.get(style, self.hair)
        self.oval(cx, cy, rx * 1.04, ry * 1.03, behind)
        if self.cos > -0.5:  # the face looks where the person walks
            wide = rx * min(1.0, 0.62 + 0.34 * max(0.0, self.cos))
            low = 0.0 if style == "bald" else 0.2 * ry
            x = cx + 1.02 * self.unit * (rx - wide) * self.sin
            self.oval(x, cy + self.unit * low, wide, ry - 0.95 * low, self.skin)
            for eye in (self.pose.yaw - 0.42, self.pose.yaw + 0.42):
                if cos(eye) > 0.25:
                    ex, ey, r = cx + self.unit * 0.95 * rx * sin(eye), cy + self.unit * 0.12 * ry, 0.011 * self.unit
                    self.draw_colour.ellipse((ex - r, ey - 1.2 * r, ex + r, ey + 1.2 * r), fill=(40, 30, 30))
            if abs(self.sin) > 0.6:  # a nose in profile
                nose = self.unit * rx * (0.97 if self.sin > 0 else -0.97)
                self.oval(cx + nose, cy + self.unit * 0.3 * ry, 0.02, 0.024, self.skin)
        if style == "long" and self.cos <= 0:
            self.column(long_hair, self.hair)
        elif style == "bun":
            self.oval(*self.point(0, y + 0.9 * ry, z - 0.6 * rx), 0.05, 0.05, self.hair)
        elif style == "ponytail" and self.cos <= 0.35:
            tail = [(0, y + 0.4 * ry, z - rx), (0, y - 1.2 * ry, z - 1.5 * rx)]
            self.limb(tail, [0.035, 0.025], [self.hair])
        elif style == "cap":
            crown = [self.row(y + 1.1 * ry, 0.03, 0.03, z=z), self.row(y + 0.9 * ry, 0.075, 0.075, z=z)]
            self.column([*crown, self.row(y + 0.35 * ry, 0.096, 0.1, z=z)], self.hair)
            if self.cos > -0.4:
                visor = self.row(y + 0.45 * ry, 0.06, 0.07, z=z + 0.08), self.row(y + 0.3 * ry, 0.07, 0.07, z=z + 0.09)
                self.column(visor, mix(self.hair, BLACK, 0.25))
        if self.person.top == "hoodie" and self.cos < 0.3:
            hood = [self.row(self.neck_y + 0.07, 0.075, 0.06, z=lean - 0.05)]
            self.column([*hood, self.row(self.neck_y - 0.03, 0.11, 0.075, z=lean - 0.07)], mix(self.top, BLACK, 0.12))

    # the whole

    def paste_on(self, image: Image.Image):
        mask = self.light.point(lambda value: 255 if value else 0)
        soft = self.light.filter(ImageFilter.BoxBlur(1))  # the blur also darkens the outline a little
        image.paste(ImageChops.multiply(self.colour, Image.merge("RGB", (soft, soft, soft))), mask=mask)


CIRCLE = [(cos(2 * pi * k / 12), sin(2 * pi * k / 12)) for k in range(12)]


def capsule(ax: float, ay: float, ra: float, bx: float, by: float, rb: float) -> list[tuple[float, float]]:
    """The outline of two discs and of what lies between them."""
    dx, dy = bx - ax, by - ay
    length = hypot(dx, dy)
    if length < 1e-6:
        return [(ax + ra * c, ay + ra * s) for c, s in CIRCLE]
    dx, dy = dx / length, dy / length
    outline = []
    for k in range(7):  # half a disc around a, then half a disc around b
        c, s = CIRCLE[(k + 3) % 12]
        outline.append((ax + ra * (c * dx - s * dy), ay + ra * (c * dy + s * dx)))
    for k in range(7):
        c, s = CIRCLE[(k + 9) % 12]
        outline.append((bx + rb * (c * dx - s * dy), by + rb * (c * dy + s * dx)))
    return outline


def level(rows: list[tuple], share: float) -> tuple:
    """The row at a share of the way from the first row of a column to its last, by height."""
    first, last = rows[0][1], rows[-1][1]
    y = first + share * (last - first)
    for above, below in zip(rows, rows[1:], strict=False):
        if y <= below[1] or below is rows[-1]:
            t = (y - above[1]) / max(1e-6, below[1] - above[1])
            return tuple(a + t * (b - a) for a, b in zip(above, below, strict=True))


# -------------------------------------------------------------------------------------------------------- images


class Task(NamedTuple):
    """One image to draw."""

    path: str  # folder/name.jpg
    stream: int
    pid: int
    camera: int  # 1 to 6
    index: int
    person: Person | None  # None: a stranger of the image's own


def random_pose(rng: np.random.Generator, yaw: float, error: float) -> Pose:
    size = rng.normal(0.92, 0.02 + 0.03 * error)
    return Pose(
        yaw=yaw + rng.normal(0, 0.25),
        phase=rng.uniform(0, 2 * pi),
        stride=rng.uniform(0.3, 1.0) if rng.random() < 0.85 else 0.1,
        x=WIDTH * SCALE * (0.5 + rng.normal(0, 0.02 + 0.03 * error)),
        ground=HEIGHT * SCALE * (0.965 + rng.normal(0, 0.01 + 0.015 * error)),
        size=size,
    )


def occlude(image: Image.Image, camera: Camera, rng: np.random.Generator):
    """Something between the camera and the person: a post, a bicycle, a box hedge or another person."""
    draw = ImageDraw.Draw(image)
    width, height = image.size
    kind = rng.integers(4)
    side = rng.choice((-1, 1))
    if kind == 0:
        x, w = width * (0.5 + side * rng.uniform(0.05, 0.35)), width * rng.uniform(0.05, 0.1)
        draw.rectangle((x, 0, x + w, height), fill=(92, 96, 98))
        draw.rectangle((x + 0.3 * w, 0, x + 0.5 * w, height), fill=(128, 132, 134))
    elif kind == 1:
        x, y, r = width * (0.5 + side * 0.15), height * 0.87, 0.13 * height
        frame = COLOURS[("red", "blue", "black", "green")[rng.integers(4)]]
        for wheel in (x - 1.5 * r, x + 1.2 * r):
            draw.ellipse((wheel - r, y - r, wheel + r, y + r), outline=(34, 34, 36), width=2 * SCALE)
        corners = [(x - 1.5 * r, y), (x - 0.9 * r, y - 1.3 * r), (x + 0.7 * r, y - 1.3 * r), (x, y), (x - 1.5 * r, y)]
        draw.line(corners, fill=frame, width=2 * SCALE)
        draw.line([(x, y), (x - 0.9 * r, y - 1.3 * r), (x - 1.0 * r, y - 1.7 * r)], fill=frame, width=2 * SCALE)
        draw.line([(x + 1.2 * r, y), (x + 0.6 * r, y - 1.8 * r), (x + 0.3 * r, y - 1.9 * r)], frame, width=2 * SCALE)
    elif kind == 2:
        y = height * rng.uniform(0.68, 0.85)
        for k in range(14):
            x, r = width * k / 13, width * rng.uniform(0.08, 0.13)
            draw.ellipse((x - r, y - r, x + r, height + r), fill=mix((62, 104, 56), (88, 132, 70), rng.random()))
    else:
        stranger = draw_person_from_vocabulary(rng)
        pose = random_pose(rng, yaw=rng.uniform(0, 2 * pi), error=1.0)
        offset = side * rng.uniform(0.38, 0.6) * width
        Figure(stranger, pose._replace(x=pose.x + offset, size=pose.size * 1.04), camera).paste_on(image)


@lru_cache
def shadow() -> Image.Image:
    """A soft dark ellipse, to lie under the feet."""
    y, x = np.mgrid[-1:1:24j, -1:1:64j]
    return Image.fromarray((150 * np.clip(1.15 - np.hypot(x, y), 0, 1)).astype(np.uint8))


def render(task: Task, seed: int) -> tuple[Image.Image, int]:
    """One image (64 x 128) and the JPEG quality it is saved with."""
    camera = CAMERAS[task.camera - 1]
    key = [seed, task.stream, abs(task.pid), task.camera]
    track = np.random.default_rng(key)  # what the images of one person in one camera share
    rng = np.random.default_rng([*key, task.index + 1])
    person = task.person or draw_person_from_vocabulary(rng)

    views = np.array(camera.views) / sum(camera.views)
    yaw = track.choice(4, p=views) * pi / 2
    if rng.random() < 0.3:
        yaw = rng.choice(4, p=views) * pi / 2
    place, exposure = track.uniform(0.0, 1.0), track.normal(1.0, 0.08)

    # the box: which part of the scene, and where in it the person stands
    backdrop = scene(camera.scene)
    zoom = rng.uniform(0.8, 1.0)
    w, h = WIDTH * SCALE * zoom, HEIGHT * SCALE * zoom
    left = np.clip(place + rng.normal(0, 0.05), 0, 1) * (backdrop.width - w)
    upper = rng.uniform(0, backdrop.height - h)
    box = (left, upper, left + w, upper + h)
    image = backdrop.resize((WIDTH * SCALE, HEIGHT * SCALE), Image.Resampling.BILINEAR, box)
    pose = random_pose(rng, yaw, error=2.0 if rng.random() < 0.15 else 0.7)
    if task.stream == JUNK:  # a box that caught a part of a person only
        pose = pose._replace(
            size=rng.uniform(0.9, 1.6),
            x=pose.x + WIDTH * SCALE * rng.choice((-1, 1)) * rng.uniform(0.3, 0.6),
            ground=HEIGHT * SCALE * rng.uniform(0.9, 1.5),
        )
    elif rng.random() < 0.08:  # cut feet
        pose = pose._replace(ground=pose.ground + HEIGHT * SCALE * rng.uniform(0.05, 0.2), size=pose.size * 1.08)
    if task.stream != DISTRACTOR or rng.random() < 0.6:  # the other distractors are boxes around nothing
        length = int(0.5 * pose.size * WIDTH * SCALE * 1.3)
        patch = shadow().resize((length, max(4, length // 4)))
        corner = (int(pose.x - length / 2 - camera.light * 0.3 * length), int(pose.ground - length / 8))
        image.paste((24, 24, 30), corner, patch)
        Figure(person, pose, camera).paste_on(image)
    if rng.random() < (0.1 if task.stream != DISTRACTOR else 0.4):
        occlude(image, camera, rng)
    image = image.reduce(SCALE)

    # the camera
    if camera.resolution < 1:
        share = camera.resolution * rng.uniform(0.85, 1.0)
        small = image.resize((int(WIDTH * share), int(HEIGHT * share)), Image.Resampling.BOX)
        image = small.resize(image.size, Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.8, 1.3)))
    pixels = np.asarray(image, np.float32) / 255
    if rng.random() < 0.2:  # motion blur, along the way
        reach = int(rng.integers(2, 5))
        pixels = np.mean([np.roll(pixels, k - reach // 2, axis=1) for k in range(reach)], axis=0)
    pixels = pixels**camera.gamma * (np.array(camera.cast, np.float32) * (exposure * rng.normal(1.0, 0.05)))
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + camera.saturation * (pixels - grey)
    pixels = camera.haze + (1 - camera.haze) * pixels + rng.normal(0, camera.noise, pixels.shape)
    quality = int(rng.integers(60, 93))
    return Image.fromarray((255 * np.clip(pixels, 0, 1)).astype(np.uint8)), quality


# ----------------------------------------------------------------------------------------------------- the folder


def tasks(num_ids: int, seed: int) -> list[Task]:
    """Every image of the data set, in a fixed order and in Market-1501's proportions."""
    todo = []
    for stream in (TRAIN, TEST):
        for number, person in enumerate(people(num_ids, seed, stream)):
            pid = 2 * number + (2 if stream == TRAIN else 1)  # training pids are even, test pids odd
            rng = np.random.default_rng([seed, stream, pid, 0])
            count = rng.choice((2, 3, 4, 5, 6), p=(0.08, 0.14, 0.24, 0.29, 0.25))
            for camera in sorted(rng.permutation(6)[:count] + 1):
                sequence, frame = int(rng.integers(1, 7)), int(rng.integers(1, 900))
                for index in range(1 + rng.poisson(2.84) + (stream == TEST)):
                    folder = "bounding_box_train" if stream == TRAIN else "bounding_box_test" if index else "query"
                    name = f"{pid:04d}_c{camera}s{sequence}_{frame * 25 + 25 * index:06d}_{rng.integers(0, 6):02d}.jpg"
                    todo.append(Task(f"{folder}/{name}", stream, pid, int(camera), index, person))
    group = people(num_ids, seed, TEST)
    rng = np.random.default_rng([seed, JUNK])
    for index in range(round(5.09 * num_ids)):
        camera, sequence = int(rng.integers(1, 7)), int(rng.integers(1, 7))
        name = f"-1_c{camera}s{sequence}_{index * 25 + 1:06d}_{rng.integers(0, 6):02d}.jpg"
        todo.append(Task(f"bounding_box_test/{name}", JUNK, -1, camera, index, group[rng.integers(num_ids)]))
    for index in range(round(3.73 * num_ids)):
        camera, sequence = int(rng.integers(1, 7)), int(rng.integers(1, 7))
        name = f"0000_c{camera}s{sequence}_{index * 25 + 1:06d}_{rng.integers(0, 6):02d}.jpg"
        todo.append(Task(f"bounding_box_test/{name}", DISTRACTOR, 0, camera, index, None))
    return todo


def draw_tasks(todo: list[Task], folder: Path, seed: int):
    """Draw and save; yields after every image."""
    for task in todo:
        image, quality = render(task, seed)
        image.save(folder / task.path, quality=quality)
        yield task


def generate(data_dir: str | Path, num_ids: int = 150, seed: int = 0, workers: int | None = None) -> Path:
    """The folder of the data set with num_ids people in training and as many in test; drawn if it is not there yet.

    It is drawn under a temporary name and renamed when it is whole, so a folder of this name is always complete.
    workers: processes that draw, by default one per core; the pixels do not depend on it.
    """
    if num_ids < 2 or num_ids != int(num_ids):
        raise ValueError(f"the number of generated identities must be a whole number of at least 2, not {num_ids}")
    if seed < 0 or seed != int(seed):
        raise ValueError(f"the seed of the generated pedestrians must be a whole number of at least 0, not {seed}")
    data_dir = Path(data_dir)
    name = f"synthetic-v{VERSION}-{num_ids}" + (f"-s{seed}" if seed else "")
    folder = data_dir / name
    if folder.is_dir():
        return folder
    data_dir.mkdir(parents=True, exist_ok=True)
    for leftover in data_dir.glob(f".{name}.*"):  # of a killed attempt; one that still grows belongs to another process
        newest = max((path.stat().st_mtime for path in (leftover, *leftover.glob("*"))), default=0.0)
        if time.time() - newest > 3600:
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = data_dir / f".{name}.{uuid.uuid4().hex}"
    try:
        for part in FOLDERS:
            (temporary / part).mkdir(parents=True)
        draw_all(temporary, num_ids, seed, workers)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same pixels
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def draw_all(folder: Path, num_ids: int, seed: int, workers: int | None):
    """Draw every image into folder, in this process for a tiny set, else in several that import nothing but this file.

    Plain subprocesses rather than multiprocessing: nothing is forked after torch was imported, and the caller's
    script is not imported again. All of them write one byte per image into one pipe; it closes with the last of them.
    """
    todo = tasks(num_ids, seed)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or (1 if len(todo) < 1000 else cores)
    with tqdm(total=len(todo), desc=f"drawing {num_ids} + {num_ids} people", unit="image", disable=None) as bar:
        if workers == 1:
            for _ in draw_tasks(todo, folder, seed):
                bar.update()
            return
        read_end, write_end = os.pipe()
        commands = [worker_command(folder, num_ids, seed, workers, number) for number in range(workers)]
        processes = [subprocess.Popen(command, stdout=write_end) for command in commands]
        os.close(write_end)
        try:
            with open(read_end, "rb", buffering=0) as progress:
                while done := progress.read(4096):
                    bar.update(len(done))
            if any(process.wait() for process in processes):
                raise OSError(f"the generated pedestrians could not be drawn in {folder.parent}: see the message above")
        finally:
            for process in processes:
                process.kill()
                process.wait()


def worker_command(folder: Path, num_ids: int, seed: int, workers: int, number: int) -> list[str]:
    return [sys.executable, __file__, "--worker", str(folder), *(str(n) for n in (num_ids, seed, workers, number))]


def worker(folder: str, num_ids: int, seed: int, workers: int, number: int):
    """Draws every workers-th image, in a process of its own; writes one byte per image."""
    try:
        for _ in draw_tasks(tasks(num_ids, seed)[number::workers], Path(folder), seed):
            os.write(1, b".")
    except BrokenPipeError:  # the process that waits for the images is gone
        pass
    except OSError as error:  # a full disk, say
        sys.exit(str(error))


def contact_sheet(path: str | Path, seed: int = 0, num_people: int = 3):
    """A picture to look at: rows are people, each with its near twin below; columns are cameras, two images each."""
    num_ids, gap, group_gap = 60, 4, 12  # gaps in pixels: between images, and more between cameras and between people
    group, pairs = people(num_ids, seed, TEST), {}
    for original, twin in zip(group, group[-int(num_ids * TWIN_SHARE / 2) :], strict=False):
        detail = next(name for name in Person._fields if getattr(original, name) != getattr(twin, name))
        pairs.setdefault(detail, (original, twin))  # each pair differs in another detail
    rows = [person for pair in list(pairs.values())[:num_people] for person in pair]
    columns = [(camera, index) for camera in range(1, 7) for index in range(2)]

    def corner(row: int, column: int) -> tuple[int, int]:
        across, down = column * (WIDTH + gap), row * (HEIGHT + gap)
        return across + (column // 2) * group_gap, down + (row // 2) * group_gap

    size = tuple(np.add(corner(len(rows) - 1, len(columns) - 1), (WIDTH, HEIGHT)).tolist())
    sheet = Image.new("RGB", size, "white")
    for row, person in enumerate(rows):
        for column, (camera, index) in enumerate(columns):
            image, _ = render(Task("", TEST, 2000 + row, camera, index, person), seed)
            sheet.paste(image, corner(row, column))
    sheet.save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="draw the generated pedestrians, or a sheet of examples")
    parser.add_argument("--data-dir", default="datasets", help="folder that holds the data sets")
    parser.add_argument("--num-ids", type=int, default=150, help="people in training, and as many in test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contact-sheet", metavar="FILE", help="write a PNG of examples instead")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], *(int(number) for number in args.worker[1:]))
    elif args.contact_sheet:
        contact_sheet(args.contact_sheet, args.seed)
    else:
        print(generate(args.data_dir, args.num_ids, args.seed))
