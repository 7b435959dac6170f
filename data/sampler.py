"""Which images go into which batch: P x K batches for losses that compare images, plain shuffling for the others.

A sampler is a pure function of (seed, epoch): the batches of an epoch are known before it starts, are the same on every
machine and for every number of threads, and a resumed run meets the batches it would have met.
"""

import random

import torch
from torch import Tensor


class PKSampler:
    """P identities with K images each in every batch (Hermans et al., "In Defense of the Triplet Loss", 2017, Sec. 2).

    Identities come from a shuffled queue, and the images of an identity from a shuffled queue of its own; a queue that
    runs dry is filled with a new shuffle. So within an epoch all identities are used equally often (to within one),
    and so are the images of an identity. No identity is twice in a batch; no image either, unless its identity has
    fewer than K. `len` is the number of images // (P * K), exactly.
    """

    def __init__(self, labels: list[int] | Tensor, p: int, k: int, seed: int):
        """labels (N,): identity of each training image, any integers. Raises ValueError if no batch can be made."""
        if p < 1 or k < 1:
            raise ValueError(f"A batch needs at least one identity and one image of each, not p={p} and k={k}.")
        self.p, self.k, self.seed = p, k, seed
        self.images = {}  # label -> indices of its images
        for index, label in enumerate(torch.as_tensor(labels).tolist()):
            self.images.setdefault(label, []).append(index)
        self.labels = sorted(self.images)
        num_images = sum(map(len, self.images.values()))
        self.steps = num_images // (p * k)
        if len(self.labels) < p:
            raise ValueError(
                f"A batch of p={p} identities needs as many in training, but there are {len(self.labels)}: "
                "lower --p or use a larger data set."
            )
        if self.steps == 0:
            raise ValueError(
                f"{num_images} training images do not fill one batch of {p} x {k}: "
                "lower --p or --k, or use a larger data set."
            )

    def __len__(self) -> int:
        return self.steps

    def batches(self, epoch: int) -> Tensor:
        """Indices into labels (steps, P * K) int64; the K images of an identity stand side by side."""
        rng = random.Random(f"batches {self.seed} {epoch}")  # a text: torch would use the low 32 bits of a number only
        queue, image_queues = [], {label: [] for label in self.labels}
        batches = []
        for _ in range(self.steps):
            labels = draw(self.labels, queue, self.p, rng)
            drawn = [draw(self.images[label], image_queues[label], self.k, rng) for label in labels]
            batches.append([index for images in drawn for index in images])
        return torch.tensor(batches)


class RandomSampler:
    """Every image at most once per epoch, in random order; the images that fill no batch are left out."""

    def __init__(self, num_images: int, batch_size: int, seed: int):
        """Raises ValueError if the images do not fill one batch."""
        if batch_size < 1:
            raise ValueError(f"A batch needs at least one image, not batch_size={batch_size}.")
        if num_images < batch_size:
            raise ValueError(
                f"{num_images} training images do not fill one batch of {batch_size}: "
                "lower --batch-size or use a larger data set."
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed

    def __len__(self) -> int:
        return self.num_images // self.batch_size

    def batches(self, epoch: int) -> Tensor:
        """Indices 0..num_images-1 (steps, B) int64."""
        order = list(range(self.num_images))
        random.Random(f"batches {self.seed} {epoch}").shuffle(order)
        return torch.tensor(order[: len(self) * self.batch_size]).view(len(self), self.batch_size)


def draw(items: list[int], queue: list[int], count: int, rng: random.Random) -> list[int]:
    """Take `count` items off the queue, which is refilled with a shuffle of all items when it runs dry.

    Items are distinct; only where there are fewer than `count`, all of them are taken before one is repeated.
    """
    drawn = []
    while count > 0:
        size = min(count, len(items))
        part = queue[:size]
        del queue[:size]
        if len(part) < size:
            shuffled = rng.sample(items, len(items))
            seen = set(part)
            part += [item for item in shuffled if item not in seen][: size - len(part)]
            seen = set(part) - seen  # taken from the new shuffle; those skipped wait for the next draw
            queue += [item for item in shuffled if item not in seen]
        drawn += part
        count -= size
    return drawn
