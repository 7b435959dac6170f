"""One image: a box cut from a camera's scene, a figure in it, now and then something in front, and the camera's faults.

Every image, and every track (one person in one camera), has a random generator of its own, seeded by
(seed, stream, pid, camera, index): the pixels do not depend on what else is drawn, or in which order.
"""

from collections import namedtuple
from functools import lru_cache
from math import pi

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data.synthetic.figures import Figure, Pose, mix
from data.synthetic.people import COLOURS, random_person
from data.synthetic.scenes import HEIGHT, SCALE, WIDTH, Camera, cameras, scene

TRAIN, TEST, JUNK, DISTRACTOR = range(4)  # streams of random numbers

# One image to draw; path: folder/name.jpg; camera: 1 to 6; person: None for a stranger of the image's own
Task = namedtuple("Task", "path stream pid camera index person")


def random_pose(rng: np.random.Generator, yaw: float, error: float) -> Pose:
    """A walker near the middle; error: how badly the box fits."""
    return Pose(
        size=rng.normal(0.92, 0.02 + 0.03 * error),
        yaw=yaw + rng.normal(0, 0.25),
        phase=rng.uniform(0, 2 * pi),
        stride=rng.uniform(0.3, 1.0) if rng.random() < 0.85 else 0.1,
        x=WIDTH * (0.5 + rng.normal(0, 0.02 + 0.03 * error)),
        ground=HEIGHT * (0.965 + rng.normal(0, 0.01 + 0.015 * error)),
    )


def occlude(image: Image.Image, camera: Camera, rng: np.random.Generator):
    """Something between the camera and the person: a post, a bicycle, a hedge or another person."""
    draw = ImageDraw.Draw(image)
    kind, side = rng.integers(4), rng.choice((-1, 1))
    if kind == 0:
        x, w = WIDTH * (0.5 + side * rng.uniform(0.05, 0.35)), WIDTH * rng.uniform(0.05, 0.1)
        draw.rectangle((x, 0, x + w, HEIGHT), fill=(92, 96, 98))
        draw.rectangle((x + 0.3 * w, 0, x + 0.5 * w, HEIGHT), fill=(128, 132, 134))
    elif kind == 1:
        x, y, r = WIDTH * (0.5 + side * 0.15), HEIGHT * 0.87, 0.13 * HEIGHT
        frame = COLOURS[("red", "blue", "black", "green")[rng.integers(4)]]
        for wheel in (x - 1.5 * r, x + 1.2 * r):
            draw.ellipse((wheel - r, y - r, wheel + r, y + r), outline=(34, 34, 36), width=2 * SCALE)
        corners = [(x - 1.5 * r, y), (x - 0.9 * r, y - 1.3 * r), (x + 0.7 * r, y - 1.3 * r), (x, y), (x - 1.5 * r, y)]
        seat = [(x, y), (x - 0.9 * r, y - 1.3 * r), (x - 1.0 * r, y - 1.7 * r)]
        fork = [(x + 1.2 * r, y), (x + 0.6 * r, y - 1.8 * r), (x + 0.3 * r, y - 1.9 * r)]
        for tube in (corners, seat, fork):
            draw.line(tube, fill=frame, width=2 * SCALE)
    elif kind == 2:
        y = HEIGHT * rng.uniform(0.68, 0.85)
        for k in range(14):
            x, r = WIDTH * k / 13, WIDTH * rng.uniform(0.08, 0.13)
            draw.ellipse((x - r, y - r, x + r, HEIGHT + r), fill=mix((62, 104, 56), (88, 132, 70), rng.random()))
    else:
        stranger, pose = random_person(rng), random_pose(rng, yaw=rng.uniform(0, 2 * pi), error=1.0)
        pose = pose._replace(x=pose.x + side * rng.uniform(0.38, 0.6) * WIDTH, size=pose.size * 1.04)
        Figure(stranger, pose, camera).paste_on(image)


@lru_cache
def shadow() -> Image.Image:
    """A soft dark ellipse, to lie under the feet."""
    y, x = np.mgrid[-1:1:24j, -1:1:64j]
    return Image.fromarray((150 * np.clip(1.15 - np.hypot(x, y), 0, 1)).astype(np.uint8))


def render(task: Task, seed: int) -> tuple[Image.Image, int]:
    """One image (64 x 128) and the JPEG quality it is saved with."""
    camera = cameras(seed)[task.camera - 1]
    key = [seed, task.stream, abs(task.pid), task.camera]
    track = np.random.default_rng(key)  # what the images of one person in one camera share
    rng = np.random.default_rng([*key, task.index + 1])
    person = task.person or random_person(rng)

    views = np.array([camera.front, camera.left, camera.back, camera.right])
    views = views / views.sum()
    yaw = track.choice(4, p=views) * pi / 2
    if rng.random() < 0.3:
        yaw = rng.choice(4, p=views) * pi / 2
    place, exposure = track.uniform(0.0, 1.0), track.normal(1.0, 0.08)

    # the box: which part of the scene, and where in it the person stands
    backdrop = scene(camera.scene, camera.seed)
    zoom = rng.uniform(0.8, 1.0)
    w, h = WIDTH * zoom, HEIGHT * zoom
    left = np.clip(place + rng.normal(0, 0.05), 0, 1) * (backdrop.width - w)
    upper = rng.uniform(0, backdrop.height - h)
    image = backdrop.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, (left, upper, left + w, upper + h))
    pose = random_pose(rng, yaw, error=2.0 if rng.random() < 0.15 else 0.7)
    if task.stream == JUNK:  # a box that caught a part of a person only
        pose = pose._replace(
            size=rng.uniform(0.9, 1.6),
            x=pose.x + WIDTH * rng.choice((-1, 1)) * rng.uniform(0.3, 0.6),
            ground=HEIGHT * rng.uniform(0.9, 1.5),
        )
    elif rng.random() < 0.08:  # cut feet
        pose = pose._replace(ground=pose.ground + HEIGHT * rng.uniform(0.05, 0.2), size=pose.size * 1.08)
    if task.stream != DISTRACTOR or rng.random() < 0.6:  # the other distractors are boxes around nothing
        length = int(0.5 * pose.size * WIDTH * 1.3)
        corner = (int(pose.x - length / 2 - camera.light * 0.3 * length), int(pose.ground - length / 8))
        image.paste((24, 24, 30), corner, shadow().resize((length, max(4, length // 4))))
        Figure(person, pose, camera).paste_on(image)
    if rng.random() < (0.4 if task.stream == DISTRACTOR else 0.1):
        occlude(image, camera, rng)
    image = image.reduce(SCALE)

    # the camera
    if camera.resolution < 1:
        share = camera.resolution * rng.uniform(0.85, 1.0)
        small = image.resize((int(image.width * share), int(image.height * share)), Image.Resampling.BOX)
        image = small.resize(image.size, Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.8, 1.3)))
    pixels = np.asarray(image, np.float32) / 255
    if rng.random() < 0.2:  # motion blur, along the way
        reach = int(rng.integers(2, 5))
        pixels = np.mean([np.roll(pixels, k - reach // 2, axis=1) for k in range(reach)], axis=0)
    cast = np.array([camera.red, camera.green, camera.blue], np.float32)
    pixels = pixels**camera.gamma * (cast * (exposure * rng.normal(1.0, 0.05)))
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + camera.saturation * (pixels - grey)
    pixels = camera.haze + (1 - camera.haze) * pixels + rng.normal(0, camera.noise, pixels.shape)
    quality = int(rng.integers(60, 93))
    return Image.fromarray((255 * np.clip(pixels, 0, 1)).astype(np.uint8)), quality
