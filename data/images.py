"""From image files to normalised batches: decoded once to uint8, the rest for the whole batch on the device.

Decoding (Pillow: RGB, bilinear resize, the same pixels as torchvision's `Resize`) runs in threads. What is left for
every step is a gather, the augmentation (augment.py) and the normalisation, done on the device for the batch at once
and drawn from (seed, epoch, step), so that caching, workers and prefetching never change a pixel.

Where the decoded training images are kept (`--cache auto`): on the device if they take at most half of its free
memory, else in main memory if they take at most half of what is available, else nowhere: then, as with `--cache off`,
every epoch decodes again, a few batches ahead of the training step. Test images are never kept.
"""

import functools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from data.augment import ATTEMPTS, erasing_boxes, flip, pad_crop, random_crop, random_erasing
from utils.distributed import local_world_size
from utils.errors import UserError
from utils.seed import mix_seed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB, for pixels in 0..1
ENLARGE = 1.125  # --random-crop: half of the images are resized to 1.125x and cropped back at a random place
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")  # told by the content; Pillow knows others, some of which run programs
MAX_PIXELS = 89_478_485  # Pillow's own limit, above which it only warns: a "decompression bomb"


class BadImage(UserError):
    """An image file that can't be decoded; says which and why in one sentence."""


def decode(path: Path, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """One image file as RGB uint8 arrays (height, width, 3), one for each (height, width) of `sizes`.

    The EXIF orientation is applied, 16-bit grey is scaled to 8 bits, transparency is dropped. Raises BadImage.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{path}: {image.width} x {image.height} is more than the {MAX_PIXELS:,} pixels allowed")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # Pillow would clip 16-bit values to 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
            image = image.convert("RGB")
            return [np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) for height, width in sizes]
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{path} can't be read as an image: it is no {', '.join(FORMATS)}") from None
    except Exception as error:  # a broken file makes a decoder raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split(" <", 1)[0]
        reason = reason.replace(repr(str(path)), "the file").partition("\n")[0] or type(error).__name__
        raise BadImage(f"{path} can't be read as an image: {reason}") from None


def default_workers() -> int:
    """Threads that decode, unless a flag says otherwise: the cores this process may use, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)  # Pillow holds Python's lock for part of the work: 8 or 16 threads of 16 cores gained nothing


def decode_batches(
    batches: Iterable[Sequence[Path]], sizes: Sequence[tuple[int, int]], workers: int, pinned: bool = False
) -> Iterator[list[Tensor]]:
    """For each batch of paths a list with one uint8 tensor (B, height, width, 3) per size, in order.

    `workers` threads decode up to two batches ahead of the one being used; 0 decodes in the calling thread.
    pinned: the tensors lie in page-locked memory, from which a GPU copies while the program goes on.
    """

    def empty(paths: Sequence[Path]) -> list[Tensor]:
        return [torch.empty(len(paths), h, w, 3, dtype=torch.uint8, pin_memory=pinned) for h, w in sizes]

    def fill(images: list[Tensor], row: int, path: Path) -> None:
        for same_size, pixels in zip(images, decode(path, sizes), strict=True):
            same_size.numpy()[row] = pixels

    if workers == 0:
        for paths in batches:
            images = empty(paths)
            for row, path in enumerate(paths):
                fill(images, row, path)
            yield images
        return

    def finished(images: list[Tensor], futures: list[Future]) -> list[Tensor]:
        for future in futures:
            future.result()  # raises what the thread raised
        return images

    executor = ThreadPoolExecutor(workers)
    try:
        pending = deque()
        for paths in batches:
            images = empty(paths)
            pending.append((images, [executor.submit(fill, images, row, path) for row, path in enumerate(paths)]))
            del images  # a batch lives as long as it is used
            if len(pending) > 2:
                yield finished(*pending.popleft())
        while pending:
            yield finished(*pending.popleft())
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Both (3,), for pixels in 0..255; made once per device, since making them waits for the device."""
    return torch.tensor(MEAN, device=device) * 255, torch.tensor(STD, device=device) * 255


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in channels_last order, ImageNet mean and standard deviation."""
    mean, std = _mean_and_std(images.device)
    return images.float().sub_(mean).div_(std).permute(0, 3, 1, 2)


def available_memory(device: torch.device) -> int:
    """Bytes free on a CUDA device, or available to this process in main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        if hasattr(os, "sysconf"):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        return 4 * 2**30  # Windows does not tell
    return max(min([free, *_room_in_control_groups()]), 0)


def _room_in_control_groups(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left under each memory limit of this process (a container, a batch system), cached files not counted.

    Version 2: memory.max and memory.current; version 1: memory/memory.limit_in_bytes and memory.usage_in_bytes.
    """
    try:
        lines = [line.split(":", 2) for line in (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    rooms = []
    for _, controllers, name in lines:
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = top / name.lstrip("/")
        for place in (group, *group.parents[: len(group.parts) - len(top.parts)]):  # an outer limit holds, too
            try:
                stat = dict(line.split() for line in (place / "memory.stat").read_text(encoding="utf-8").splitlines())
                cached = int(stat["total_inactive_file" if controllers else "inactive_file"])
                most, used = (int((place / f"memory.{what}").read_text(encoding="utf-8")) for what in (limit, usage))
            except (OSError, ValueError, KeyError):  # no limit ("max"), or no such group in this container
                continue
            rooms.append(most - used + cached)
    return rooms


def find_bad_images(paths: Sequence[Path], workers: int) -> dict[int, str]:
    """Decodes every image once; position in `paths` -> the sentence that says what is wrong, for the bad ones."""

    def problem(path: Path) -> str | None:
        try:
            decode(path, [])
        except BadImage as error:
            return str(error)

    with ThreadPoolExecutor(max(workers, 1)) as executor:
        found = executor.map(problem, paths)
        bar = tqdm(found, "checking images", len(paths), unit="image", leave=False, disable=None)
        return {position: sentence for position, sentence in enumerate(bar) if sentence}


class TrainingImages:
    """The training images, ready to be drawn in batches on the device; `where` says where they are kept."""

    def __init__(
        self,
        paths: Sequence[Path],
        height: int,
        width: int,
        device: torch.device,
        random_crop: bool = False,
        cache: str = "auto",
        workers: int = 4,
        pad_crop: int = 0,
        random_erasing: float = 0.0,
    ):
        """cache: `auto` or `off`, see the top of this file. Raises BadImage at the first file that can't be decoded.

        pad_crop: pixels of the border at a height of 256; other heights have a border in proportion. random_erasing:
        its probability.
        """
        self.border, self.erasing = round(pad_crop * height / 256), random_erasing
        self.paths, self.device, self.workers = list(paths), device, workers
        self.sizes = [(height, width)]
        if random_crop:
            self.sizes.append((round(height * ENLARGE), round(width * ENLARGE)))
        self.num_bytes = len(paths) * sum(3 * h * w for h, w in self.sizes)
        self.stores, self.where = None, "files, decoded every epoch"
        cpu = torch.device("cpu")
        if cache == "auto":
            if device.type != "cpu" and self.num_bytes <= available_memory(device) // 2:
                self._fill(device)
            elif self.num_bytes <= available_memory(cpu) // 2 // local_world_size():  # main memory is for all processes
                self._fill(cpu)

    def _fill(self, place: torch.device) -> None:
        self.where = "main memory" if place.type == "cpu" else str(place)
        self.stores = [torch.empty(len(self.paths), h, w, 3, dtype=torch.uint8, device=place) for h, w in self.sizes]
        chunks = [self.paths[start : start + 256] for start in range(0, len(self.paths), 256)]
        with tqdm(total=len(self.paths), desc="decoding", unit="image", leave=False, disable=None) as bar:
            start = 0
            for chunk in decode_batches(chunks, self.sizes, self.workers, pinned=place.type == "cuda"):
                for store, images in zip(self.stores, chunk, strict=True):
                    store[start : start + len(images)].copy_(images, non_blocking=True)
                start += len(chunk[0])
                bar.update(len(chunk[0]))

    def batches(self, order: Tensor, seed: int, epoch: int, rows: slice = slice(None)) -> Iterator[Tensor]:
        """Normalised, augmented batches (B, 3, H, W) on the device, for the image numbers `order` (steps, B).

        Everything random is drawn from (seed, epoch) in one block whose row is the step: nothing in the loop waits
        for the device, and a step's pixels don't depend on how or when they were fetched.
        rows: the images of each batch that are wanted, as if the others were cut off: one process's share.
        """

        def draw(which: int, count: int) -> Tensor:  # a generator for each kind: one more never moves another's draws
            generator = torch.Generator().manual_seed(mix_seed(seed, epoch, which))
            return torch.rand(*order.shape, count, generator=generator)[:, rows]  # (steps, B, count)

        plain = draw(1, 4).to(self.device)
        places = draw(2, 2).to(self.device) if self.border else None
        if self.erasing:  # (steps, B, 4)
            boxes = erasing_boxes(draw(3, 3 + 2 * ATTEMPTS), self.erasing, *self.sizes[0]).to(self.device)
        for step, (images, *enlarged) in enumerate(self._raw_batches(order[:, rows])):
            if enlarged:
                images = random_crop(images, enlarged[0], plain[step, :, 1:])
            if self.border:
                images = pad_crop(images, self.border, places[step])
            images = normalise(flip(images, plain[step, :, 0]))
            if self.erasing:
                images = random_erasing(images, boxes[step])
            yield images

    def _raw_batches(self, order: Tensor) -> Iterator[list[Tensor]]:
        pinned = self.device.type == "cuda"
        if self.stores is None:
            batches = ([self.paths[i] for i in step] for step in order.tolist())
            for images in decode_batches(batches, self.sizes, self.workers, pinned):
                yield [size.to(self.device, non_blocking=True) for size in images]
            return
        place = self.stores[0].device
        for step in order.to(place):
            if place.type == self.device.type:
                yield [store.index_select(0, step) for store in self.stores]
            else:
                shapes = [(len(step), *store.shape[1:]) for store in self.stores]
                images = [torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for shape in shapes]
                for store, out in zip(self.stores, images, strict=True):
                    torch.index_select(store, 0, step, out=out)
                yield [out.to(self.device, non_blocking=True) for out in images]


def stream_images(
    paths: Sequence[Path], height: int, width: int, device: torch.device, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """Normalised batches (B, 3, H, W) of all images in order, the last one short; keeps none of them."""
    chunks = (paths[start : start + batch_size] for start in range(0, len(paths), batch_size))
    for (images,) in decode_batches(chunks, [(height, width)], workers, pinned=device.type == "cuda"):
        yield normalise(images.to(device, non_blocking=True))
