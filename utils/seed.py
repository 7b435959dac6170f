"""Seeds as functions of (seed, epoch): a resumed run draws exactly what the uninterrupted one would have drawn."""

import os
import random

import numpy as np
import torch


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several non-negative numbers, well mixed: (1, 2) and (2, 1) share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int, epoch: int = 0, process: int = 0) -> None:
    """Seeds the global generators of random, numpy and torch (all devices) from the three numbers."""
    mixed = mix_seed(seed, epoch, 0, process)  # (seed, epoch, 1) and on: augmentation; zeros at the end do nothing
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)


def set_backends(deterministic: bool, tf32: bool | None = None) -> None:
    """deterministic: the same bits on every run of one GPU, at some cost; otherwise cuDNN picks its fastest kernels.

    tf32: whether float32 products of a GPU may round to TF32; None: PyTorch's own, convolutions only.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it set before its first call
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = tf32 is not False
    torch.backends.cuda.matmul.allow_tf32 = tf32 is True
