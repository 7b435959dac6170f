"""How a person is drawn: a small skeleton in metres, turned, seen from slightly above, as tapered limbs and columns."""

from collections import namedtuple
from math import cos, hypot, pi, sin

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from data.synthetic.people import COLOURS, Person
from data.synthetic.scenes import HEIGHT, WIDTH, Camera

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
CIRCLE = [(cos(2 * pi * k / 12), sin(2 * pi * k / 12)) for k in range(16)]  # a third of it twice
# A shape is drawn three times, from its dark outline to a small bright core: size, and shift towards the light.
LIMB_LAYERS = ((1.0, 0.0), (0.78, 0.2), (0.4, 0.45))
COLUMN_LAYERS = ((1.0, 0.0), (0.8, 0.18), (0.4, 0.45))
OVAL_LAYERS = ((1.0, 0.0), (0.8, 0.18), (0.45, 0.35))

# size: share of the canvas' height; yaw: 0 faces the camera; phase, stride: of the walk; x, ground: pixels of the feet
Pose = namedtuple("Pose", "size yaw phase stride x ground")


def between(a: tuple, b: tuple, share: float) -> tuple:
    return tuple(x + share * (y - x) for x, y in zip(a, b, strict=True))


def mix(a: tuple, b: tuple, share: float) -> tuple:
    """A colour between two colours."""
    return tuple(map(int, between(a, b, share)))


def capsule(a: tuple, b: tuple) -> list[tuple[float, float]]:
    """The outline of two discs (x, y, radius) and of what lies between them: half of one, then half of the other."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = hypot(dx, dy) or 1.0
    dx, dy = dx / length, dy / length
    halves = [(a, CIRCLE[3:10]), (b, CIRCLE[9:16])]
    return [(x + r * (c * dx - s * dy), y + r * (c * dy + s * dx)) for (x, y, r), half in halves for c, s in half]


def level(rows: list[tuple], share: float) -> tuple:
    """The row at a share of the way from the first row of a column to its last, by height."""
    y = rows[0][1] + share * (rows[-1][1] - rows[0][1])
    below = next((k for k in range(1, len(rows) - 1) if y <= rows[k][1]), len(rows) - 1)
    above, below = rows[below - 1], rows[below]
    return between(above, below, (y - above[1]) / max(1e-6, below[1] - above[1]))


class Figure:
    """One person on two layers: flat colours, and apart from them the light, so that patterns are shaded, too.

    Body coordinates are metres: x to the left hand, y up, z forward.
    """

    def __init__(self, person: Person, pose: Pose, camera: Camera):
        self.person, self.pose, self.side = person, pose, camera.light
        self.tones = tuple(int(255 * (1 - camera.contrast * dark)) for dark in (1.0, 0.45, 0.0))
        self.colour = Image.new("RGB", (WIDTH, HEIGHT))
        self.light = Image.new("L", self.colour.size)  # 0 where there is nobody
        self.draw_colour, self.draw_light = ImageDraw.Draw(self.colour), ImageDraw.Draw(self.light)
        self.cos, self.sin, self.pitch = cos(pose.yaw), sin(pose.yaw), sin(camera.pitch)
        self.tall = {"short": 1.58, "medium": 1.70, "tall": 1.84}[person.height]
        self.girth = {"slim": 0.88, "medium": 1.0, "broad": 1.2}[person.build]
        self.loose = self.girth * (1.12 if person.top in ("hoodie", "jacket", "coat") else 1.0)
        self.unit = pose.size * HEIGHT / self.tall  # pixels per metre
        self.lean = 0.04 * pose.stride
        self.skin, self.hair = COLOURS[person.skin], COLOURS[person.hair_colour]
        self.top, self.second = COLOURS[person.top_colour], COLOURS[person.second_colour]
        self.bottom, self.shoes = COLOURS[person.bottom_colour], COLOURS[person.shoes]
        self.bag = COLOURS[person.bag_colour]

        legs = [self.bend_leg(side) for side in (-1, 1)]
        self.hip_y = 0.055 - min(ankle[1] for _, _, ankle, _ in legs)  # the lower foot stands on the ground
        self.waist_y, self.chest_y = self.hip_y + 0.12 * self.tall, self.hip_y + 0.24 * self.tall
        self.shoulder_y, self.neck_y = self.hip_y + 0.325 * self.tall, self.hip_y + 0.345 * self.tall
        self.back_z = self.lean - 0.1 * self.loose - 0.07  # of a backpack

        legs.sort(key=lambda leg: self.depth(0.08 * leg[0], leg[2][2]))
        for leg, dim in zip(legs, (0.86, 1.0), strict=True):  # the far leg lies in the shade of the near one
            self.draw_leg(*leg, dim)
        self.draw_hips()
        parts = [(0.0, self.draw_top), (0.0005, self.draw_head), self.arm(-1), self.arm(1)]
        if person.bag == "backpack":
            parts.append((self.depth(0, self.back_z), self.draw_backpack))
        if person.bag == "shoulder bag":
            parts.append((self.depth(0.2 * self.loose, 0) + 0.001, self.draw_shoulder_bag))
        for _, draw in sorted(parts, key=lambda part: part[0]):  # the nearest comes last
            draw()

    def paste_on(self, image: Image.Image):
        mask = self.light.point(lambda value: 255 if value else 0)
        soft = self.light.filter(ImageFilter.BoxBlur(1))  # the blur also darkens the outline a little
        image.paste(ImageChops.multiply(self.colour, Image.merge("RGB", (soft, soft, soft))), mask=mask)

    # shapes

    def depth(self, x: float, z: float) -> float:
        """How much nearer to the camera a point is than the body's axis, in metres."""
        return z * self.cos - x * self.sin

    def point(self, x: float, y: float, z: float) -> tuple[float, float]:
        """The pixel of a point of the body."""
        across = x * self.cos + z * self.sin
        return self.pose.x + self.unit * across, self.pose.ground - self.unit * (y - self.depth(x, z) * self.pitch)

    def limb(self, joints: list[tuple], radii: list[float], colour: tuple, dim: float = 1.0):
        """Tapered capsules from joint to joint, shaded as one: no seam at a knee."""
        ends = [(*self.point(*joint), radius * self.unit) for joint, radius in zip(joints, radii, strict=True)]
        for tone, (size, shift) in zip(self.tones, LIMB_LAYERS, strict=True):
            discs = [(x + self.side * shift * r, y, r * size) for x, y, r in ends]
            for k in reversed(range(len(discs) - 1)):  # the upper part lies over the lower one
                outline = capsule(discs[k], discs[k + 1])
                if size == 1:
                    self.draw_colour.polygon(outline, fill=colour)
                self.draw_light.polygon(outline, fill=int(tone * dim))

    def column(self, colour: tuple, *levels: tuple) -> list[tuple]:
        """A solid of elliptic levels from the top down: x, y, z of the centre, half axes across and along.

        Returns a row per level, for what is drawn on the column: pixel x, y, half a width, the half axes.
        """
        rows = [(*self.point(x, y, z), self.unit * hypot(a * self.cos, b * self.sin), a, b) for x, y, z, a, b in levels]
        for tone, (size, shift) in zip(self.tones, COLUMN_LAYERS, strict=True):
            left = [(x + (self.side * shift - size) * w, y) for x, y, w, _, _ in rows]
            right = [(x + (self.side * shift + size) * w, y) for x, y, w, _, _ in rows]
            if size == 1:
                self.draw_colour.polygon(left + right[::-1], fill=colour)
            self.draw_light.polygon(left + right[::-1], fill=tone)
        return rows

    def band(self, rows: list[tuple], low: float, high: float, colour: tuple):
        """The part of a column between two heights, 0 at the first row and 1 at the last; no change of the light."""
        (ax, ay, aw, *_), (bx, by, bw, *_) = level(rows, low), level(rows, high)
        self.draw_colour.polygon([(ax - aw, ay), (ax + aw, ay), (bx + bw, by), (bx - bw, by)], fill=colour)

    def surface(self, rows: list[tuple], share: float, angle: float) -> tuple[float, float] | None:
        """The pixel of a column's surface at a height and an angle (0: the front); None on the far side."""
        x, y, _, a, b = level(rows, share)
        s, c = sin(angle), cos(angle)
        if b * c * self.cos - a * s * self.sin > 0:
            return x + self.unit * (a * s * self.cos + b * c * self.sin), y

    def patch(self, rows: list[tuple], low: float, high: float, start: float, stop: float, colour: tuple):
        """The part of a column between two heights and two angles, as far as it can be seen."""
        angles, shares = np.linspace(start, stop, 5).tolist(), (low, (low + high) / 2, high)
        edges = [[self.surface(rows, share, angle) for share in shares] for angle in angles]
        edges = [edge for edge in edges if None not in edge]
        if len(edges) > 1:
            above, below = [edge[0] for edge in edges], [edge[2] for edge in reversed(edges)]
            self.draw_colour.polygon([*above, edges[-1][1], *below, edges[0][1]], fill=colour)

    def strap(self, rows: list[tuple], start: float, stop: float, colour: tuple):
        """A line over a column, from an angle at its first row to an angle at its last, as far as it can be seen."""
        points = [self.surface(rows, k / 8, start + (stop - start) * k / 8) for k in range(9)]
        points = [point for point in points if point]
        if len(points) > 1:
            self.draw_colour.line(points, fill=colour, width=max(2, round(0.04 * self.unit)), joint="curve")

    def ring(self, a: tuple, b: tuple, radius: float, colour: tuple):
        """A ring around a limb at joint a, on the way to b."""
        (ax, ay), (bx, by) = self.point(*a), self.point(*b)
        r, length = radius * self.unit, hypot(bx - ax, by - ay) or 1.0
        ux, uy = r * (bx - ax) / length, r * (by - ay) / length
        corners = ((-1, -0.45), (1, -0.45), (1, 0.45), (-1, 0.45))
        self.draw_colour.polygon([(ax - uy * i + ux * j, ay + ux * i + uy * j) for i, j in corners], fill=colour)

    def oval(self, x: float, y: float, a: float, b: float, colour: tuple):
        """An ellipse at a pixel, with half axes in metres."""
        a, b = a * self.unit, b * self.unit
        self.draw_colour.ellipse((x - a, y - b, x + a, y + b), fill=colour)
        for tone, (size, shift) in zip(self.tones, OVAL_LAYERS, strict=True):
            middle = x + self.side * shift * a
            self.draw_light.ellipse((middle - a * size, y - b * size, middle + a * size, y + b * size), fill=tone)

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
        self.limb([(x, max(0.035, y - 0.05), z - 0.02), toe], [0.045, 0.036], self.shoes, dim)
        if kind == "trousers":
            self.limb([hip, knee, (x, y, z)], [0.092 * g, 0.074, 0.056], self.bottom, dim)
        else:
            self.limb([hip, knee, (x, y, z)], [0.088 * g, 0.058, 0.038], self.skin, dim)
        if kind == "shorts":
            self.limb([hip, between(hip, knee, 0.85)], [0.1 * g, 0.086], self.bottom, dim)

    def draw_hips(self):
        g = self.girth
        if self.person.bottom == "skirt":
            hem = (0, self.hip_y - 0.2 * self.tall, 0, 0.2 * g, 0.17 * g + 0.04 * self.pose.stride)
            lower = [(0, self.hip_y, 0, 0.175 * g, 0.13 * g), hem]
        else:
            lower = [(0, self.hip_y - 0.05, 0, 0.165 * g, 0.115 * g)]
        self.column(self.bottom, (0, self.waist_y, 0, 0.14 * g, 0.1 * g), *lower)

    def draw_top(self):
        g, lean, top, second, kind = self.loose, self.lean, self.top, self.second, self.person.top
        levels = [
            (0, self.neck_y + 0.02, lean, 0.07, 0.065),
            (0, self.shoulder_y + 0.012, lean, 0.145 * g, 0.085 * g),
            (0, self.shoulder_y - 0.04, lean, 0.178 * g, 0.105 * g),
            (0, self.chest_y, 0.8 * lean, 0.17 * g, 0.12 * g),
            (0, self.waist_y, 0.3 * lean, 0.145 * g, 0.108 * g),
            (0, self.hip_y + 0.01, 0, 0.168 * g, 0.122 * g),
        ]
        if kind == "coat":
            levels.append((0, self.hip_y - 0.17 * self.tall, 0, 0.19 * g, 0.16 * g))
        rows = self.column(top, *levels)
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
        sleeve = {"vest": "none", "t-shirt": "short"}.get(self.person.top, "long")
        thick = 0.012 if self.loose > self.girth else 0.0
        self.limb([wrist, hand], [0.03, 0.036], self.skin, dim)
        if self.person.bag == "tote" and side > 0:
            x, y, z = hand
            for handle in (-1, 1):
                self.limb([(x, y, z + 0.02 * handle), (x, y - 0.12, z + 0.09 * handle)], [0.012, 0.012], self.bag, dim)
            self.column(self.bag, (x, y - 0.12, z, 0.05, 0.14), (x, y - 0.42, z, 0.06, 0.16))
        radii = [0.054 + thick, 0.044 + thick, 0.031 + thick]
        self.limb([shoulder, elbow, wrist], radii, self.top if sleeve == "long" else self.skin, dim)
        if sleeve == "short":
            self.limb([shoulder, between(shoulder, elbow, 0.6)], [0.057, 0.058], self.top, dim)
        if self.person.pattern == "stripes":
            for share in {"none": (), "short": (0.25,), "long": (0.25, 0.55, 0.9)}[sleeve]:
                self.ring(between(shoulder, elbow, share), elbow, 0.056 + thick, self.second)

    def draw_backpack(self):
        z = self.back_z
        upper = [(0, self.shoulder_y + 0.01, z + 0.04, 0.08, 0.05), (0, self.shoulder_y - 0.05, z, 0.135, 0.085)]
        lower = [(0, self.waist_y - 0.02, z, 0.15, 0.1), (0, self.waist_y - 0.08, z + 0.01, 0.13, 0.08)]
        rows = self.column(self.bag, *upper, *lower)
        self.patch(rows, 0.55, 0.9, pi - 0.9, pi + 0.9, mix(self.bag, BLACK, 0.25))
        self.patch(rows, 0.5, 0.55, pi - 1.1, pi + 1.1, mix(self.bag, WHITE, 0.4))

    def draw_shoulder_bag(self):
        x, y = 0.2 * self.loose, self.hip_y
        rows = self.column(self.bag, (x, y + 0.1, 0, 0.045, 0.13), (x, y - 0.12, 0, 0.055, 0.15))
        self.band(rows, 0.4, 0.5, mix(self.bag, BLACK, 0.3))

    def draw_head(self):
        style, lean, rx, ry = self.person.hair, self.lean, 0.088, 0.122
        y, z = self.neck_y + 0.05 + ry, lean + 0.02  # of the middle of the head
        px, py = self.point(0, y, z)
        self.limb([(0, self.neck_y - 0.01, lean), (0, self.neck_y + 0.08, lean + 0.01)], [0.052, 0.05], self.skin, 0.85)
        long_hair = [
            (0, y + 0.5 * ry, z - 0.02, 0.9 * rx, 0.7 * rx),
            (0, y - 0.3 * ry, z - 0.05, 1.2 * rx, 0.8 * rx),
            (0, y - 1.7 * ry, z - 0.07, 1.25 * rx, 0.7 * rx),
        ]
        if style == "long" and self.cos > 0:
            self.column(self.hair, *long_hair)
        behind = {"bald": self.skin, "cap": COLOURS["brown"]}.get(style, self.hair)
        self.oval(px, py, rx * 1.04, ry * 1.03, behind)
        if self.cos > -0.5:  # the face looks where the person walks
            wide = rx * min(1.0, 0.62 + 0.34 * max(0.0, self.cos))
            low = 0.0 if style == "bald" else 0.2 * ry
            face = px + 1.02 * self.unit * (rx - wide) * self.sin
            self.oval(face, py + self.unit * low, wide, ry - 0.95 * low, self.skin)
            for eye in (self.pose.yaw - 0.42, self.pose.yaw + 0.42):
                if cos(eye) > 0.25:
                    ex, ey, r = px + self.unit * 0.95 * rx * sin(eye), py + self.unit * 0.12 * ry, 0.011 * self.unit
                    self.draw_colour.ellipse((ex - r, ey - 1.2 * r, ex + r, ey + 1.2 * r), fill=(40, 30, 30))
            if abs(self.sin) > 0.6:  # a nose in profile
                nose = self.unit * rx * (0.97 if self.sin > 0 else -0.97)
                self.oval(px + nose, py + self.unit * 0.3 * ry, 0.02, 0.024, self.skin)
        if style == "long" and self.cos <= 0:
            self.column(self.hair, *long_hair)
        elif style == "bun":
            self.oval(*self.point(0, y + 0.9 * ry, z - 0.6 * rx), 0.05, 0.05, self.hair)
        elif style == "ponytail" and self.cos <= 0.35:
            self.limb([(0, y + 0.4 * ry, z - rx), (0, y - 1.2 * ry, z - 1.5 * rx)], [0.035, 0.025], self.hair)
        elif style == "cap":
            crown = [(0, y + 1.1 * ry, z, 0.03, 0.03), (0, y + 0.9 * ry, z, 0.075, 0.075)]
            self.column(self.hair, *crown, (0, y + 0.35 * ry, z, 0.096, 0.1))
            if self.cos > -0.4:
                visor = (0, y + 0.45 * ry, z + 0.08, 0.06, 0.07), (0, y + 0.3 * ry, z + 0.09, 0.07, 0.07)
                self.column(mix(self.hair, BLACK, 0.25), *visor)
        if self.person.top == "hoodie" and self.cos < 0.3:
            hood = (0, self.neck_y + 0.07, lean - 0.05, 0.075, 0.06), (0, self.neck_y - 0.03, lean - 0.07, 0.11, 0.075)
            self.column(mix(self.top, BLACK, 0.12), *hood)
