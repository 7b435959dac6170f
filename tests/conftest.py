"""A tiny data set in Market's layout for the tests that train: PNG files, so that no JPEG library changes a pixel."""

import contextlib
import functools
import os
import signal
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data.synthetic
import evaluate
import models
import train
import utils.environment
from models.backbone import GlobalAveragePool, build_model

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # so, too, in the processes that tests begin
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"  # no AMX: benchmarks/README.md, last section

# what is the same in every test, and costs a second or two processes each time
data.synthetic.digest = functools.cache(data.synthetic.digest)
utils.environment.current_commit = functools.cache(utils.environment.current_commit)

QUICK = ["--arch", "resnet18", "--weights", "none", "--height", "32", "--width", "16", "--workers", "1",
         "--save-every", "0", "--device", "cpu"]  # fmt: skip


def write_tiny_market(root, num_ids=6, images_per_camera=3, num_cameras=3):
    """num_ids people in training and as many in test, one flat colour and a bar each, seen by num_cameras cameras."""
    rng = np.random.default_rng(0)
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (root / folder).mkdir(parents=True)
    for pid in range(1, 2 * num_ids + 1):
        colour, row = rng.integers(0, 255, 3), rng.integers(0, 28)
        for camid in range(1, num_cameras + 1):
            cast = rng.integers(-40, 40, 3)
            for index in range(images_per_camera):
                pixels = np.clip(colour + cast + rng.normal(0, 20, (32, 16, 3)), 0, 255).astype(np.uint8)
                pixels[row : row + 4] = 255 - pixels[row : row + 4]
                folder = "bounding_box_train" if pid <= num_ids else "bounding_box_test" if index else "query"
                Image.fromarray(pixels).save(root / folder / f"{pid:04}_c{camid}s1_{index:06}_00.png")
    return root


@pytest.fixture(scope="session")
def tiny_market(tmp_path_factory):
    return write_tiny_market(tmp_path_factory.mktemp("tiny"))


def short_run(tiny_market, folder):
    """train.py's flags for a run of seconds: 6 people, 54 images, 3 steps an epoch."""
    return ["--dataset", "market", "--data-dir", str(tiny_market), *QUICK, "--p", "4", "--k", "4",
            "--run-dir", str(folder / "run")]  # fmt: skip


@pytest.fixture
def flags(tiny_market, tmp_path):
    return short_run(tiny_market, tmp_path)


def small_model(arch, weights="none", **options):
    """In the place of build_model: one convolution, wider for another arch. The real one reads files of weights."""
    if weights not in ("none", "imagenet"):
        return build_model(arch, weights, **options)
    width = {"resnet18": 64, "resnet34": 96}[arch]
    layers = {"conv1": nn.Conv2d(3, width, 7, stride=4, padding=3, bias=False), "bn1": nn.BatchNorm2d(width)}
    model = nn.Sequential(OrderedDict([*layers.items(), ("pool", GlobalAveragePool()), ("flat", nn.Flatten())]))
    model.embedding_dim = width
    return model


@contextlib.contextmanager
def small_models():
    with pytest.MonkeyPatch.context() as patch:
        for place in (train, evaluate, models):
            patch.setattr(place, "build_model", small_model)
        yield


@pytest.fixture(autouse=True)
def signals():
    """train.main takes the signals over: every test gives them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def small_network():
    """Trainings of a network of two layers: a run takes a fraction of a second."""
    with small_models():
        yield
