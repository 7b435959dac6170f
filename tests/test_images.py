"""The image pipeline: the same pixels as torchvision's, whatever the cache, workers and prefetching."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data.augment import random_crop
from data.images import (
    BadImage,
    TrainingImages,
    _room_in_control_groups,
    decode,
    default_workers,
    find_bad_images,
    normalise,
    stream_images,
)

CPU = torch.device("cpu")


@pytest.fixture
def paths(tmp_path):
    """Twelve JPEGs of several sizes, Market's 128 x 64 among them."""
    rng = np.random.default_rng(0)
    for i in range(12):
        height, width = [(128, 64), (77, 41), (300, 150)][i % 3]
        coarse = Image.fromarray(rng.integers(0, 255, (16, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / f"{i:02}.jpg", quality=90)
    return sorted(tmp_path.glob("*.jpg"))


def torchvisions(path, height, width):
    """torchvision's plain path: PIL resize, ToTensor, Normalize."""
    steps = [
        transforms.Resize((height, width)),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    with Image.open(path) as image:
        return transforms.Compose(steps)(image.convert("RGB"))


def test_test_images_are_torchvisions_pixels(paths):
    """The uint8 pixels are the same; normalising 0..255 instead of 0..1 differs in float32's last digits only."""
    images = torch.cat(list(stream_images(paths, 96, 48, CPU, batch_size=5, workers=2)))
    expected = torch.stack([torchvisions(path, 96, 48) for path in paths])
    assert images.shape == (12, 3, 96, 48)
    torch.testing.assert_close(images, expected, atol=2e-6, rtol=0)


def test_training_images_are_torchvisions_pixels_flipped_or_not(paths):
    images_of = TrainingImages(paths, 96, 48, CPU)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(3, 4)
    flipped = 0
    for step, images in enumerate(images_of.batches(order, seed=0, epoch=0)):
        for image, index in zip(images, order[step].tolist(), strict=True):
            expected = torchvisions(paths[index], 96, 48)
            plain = torch.allclose(image, expected, atol=2e-6, rtol=0)
            mirrored = torch.allclose(image, expected.flip(2), atol=2e-6, rtol=0)
            assert plain != mirrored
            flipped += mirrored
    assert 2 <= flipped <= 10  # a fair coin, thrown 12 times from a fixed seed


def test_random_crop_is_a_window_of_the_enlarged_image(paths):
    """Half of the images come from 1.125 times the size, as in torchvision: Resize((108, 54)), then a 96 x 48 crop."""
    images_of = TrainingImages(paths, 96, 48, CPU, random_crop=True)
    order = torch.arange(12).repeat(8).view(8, 12)
    kinds = {"plain": 0, "cropped": 0}
    for images in images_of.batches(order, seed=0, epoch=0):
        for image, path in zip(images, paths, strict=True):
            candidates = [image, image.flip(2)]
            if any(torch.allclose(c, torchvisions(path, 96, 48), atol=2e-6, rtol=0) for c in candidates):
                kinds["plain"] += 1
                continue
            windows = torchvisions(path, 108, 54).unfold(1, 96, 1).unfold(2, 48, 1)  # (3, 13, 7, 96, 48)
            distances = [(windows - c[:, None, None]).abs().amax((0, 3, 4)).min() for c in candidates]
            assert min(distances) <= 2e-6
            kinds["cropped"] += 1
    assert kinds["plain"] > 30 and kinds["cropped"] > 30


def test_crops_reach_every_border():
    images = torch.zeros(1000, 8, 8, 3, dtype=torch.uint8)
    enlarged = torch.arange(9)[None, :, None, None].expand(1000, 9, 9, 3).to(torch.uint8)  # a pixel holds its row
    draws = torch.rand(1000, 4, generator=torch.Generator().manual_seed(0))
    draws[:, 1] = 0  # all cropped
    assert set(random_crop(images, enlarged, draws[:, 1:])[:, 0, 0, 0].tolist()) == {0, 1}


@pytest.mark.parametrize("random_crop", [False, True])
def test_cache_and_workers_never_change_a_pixel(paths, random_crop):
    order = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5], [0, 11, 7]])

    def epoch_of(cache, workers):
        images_of = TrainingImages(paths, 64, 32, CPU, random_crop=random_crop, cache=cache, workers=workers)
        return torch.stack(list(images_of.batches(order, seed=3, epoch=2)))

    reference = epoch_of("auto", 2)
    for cache, workers in [("auto", 0), ("off", 0), ("off", 1), ("off", 3)]:
        assert torch.equal(epoch_of(cache, workers), reference)


def test_augmentation_depends_on_seed_epoch_and_step_only(paths):
    images_of = TrainingImages(paths, 64, 32, CPU)
    order = torch.arange(12).view(1, 12)

    def first(seed, epoch):
        return next(images_of.batches(order, seed, epoch))

    assert torch.equal(first(0, 0), first(0, 0))
    assert not torch.equal(first(0, 0), first(1, 0))
    assert not torch.equal(first(0, 0), first(0, 1))
    steps = list(images_of.batches(order.repeat(3, 1), 0, 0))
    assert torch.equal(steps[0], first(0, 0)) and not torch.equal(steps[0], steps[1])


def test_batches_are_channels_last(paths):
    assert next(stream_images(paths, 32, 16, CPU, 4, 0)).is_contiguous(memory_format=torch.channels_last)


def test_too_little_memory_falls_back_to_the_files(paths, monkeypatch):
    """Kept only if the decoded images take at most half of what is available."""
    num_bytes = 12 * 3 * 64 * 32
    monkeypatch.setattr("data.images.available_memory", lambda device: 2 * num_bytes)
    assert TrainingImages(paths, 64, 32, CPU).where == "main memory"
    monkeypatch.setattr("data.images.available_memory", lambda device: 2 * num_bytes - 1)
    assert TrainingImages(paths, 64, 32, CPU).where == "files, decoded every epoch"


@pytest.mark.parametrize(
    "room, place", [({"meta": 2}, "meta"), ({"meta": 1, "cpu": 2}, "main memory"), ({"meta": 1, "cpu": 1}, "files")]
)
def test_the_device_comes_before_main_memory(monkeypatch, room, place):
    """Main memory is asked only where the device has no room; no image here, so that a device without memory does."""
    monkeypatch.setattr(TrainingImages, "num_bytes", property(lambda _: 1, lambda *_: None), raising=False)
    monkeypatch.setattr("data.images.available_memory", lambda device: room[device.type])
    assert TrainingImages([], 8, 4, torch.device("meta")).where.startswith(place)


def save(tmp_path, name, image, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_unusual_images_are_read(tmp_path):
    grey = Image.fromarray(np.full((20, 10), 100, np.uint8))
    cases = {
        "grey.jpg": (grey, {}, 100),
        "rgba.png": (Image.new("RGBA", (10, 20), (100, 100, 100, 7)), {}, 100),
        "palette.png": (Image.new("RGB", (10, 20), (100, 100, 100)).quantize(4), {}, 100),
        "one.png": (Image.new("RGB", (1, 1), (100, 100, 100)), {}, 100),
        "sixteen.png": (Image.fromarray(np.full((20, 10), 100 * 256 + 13, np.uint16)), {}, 100),
        "cmyk.jpg": (Image.new("CMYK", (10, 20), (155, 155, 155, 0)), {"quality": 100}, 100),
    }
    for name, (image, options, value) in cases.items():
        (array,) = decode(save(tmp_path, name, image, **options), [(16, 8)])
        assert array.shape == (16, 8, 3) and array.dtype == np.uint8
        assert abs(array.astype(int) - value).max() <= 4, name


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 10, 0).repeat(10, 1))  # black above white
    exif = Image.Exif()
    exif[0x0112] = 3  # rotated by 180 degrees
    (array,) = decode(save(tmp_path, "turned.jpg", image, exif=exif), [(20, 10)])
    assert array[0].mean() > 200 and array[-1].mean() < 55


def test_bad_images_say_which_and_why(tmp_path, paths):
    whole = paths[0].read_bytes()
    bad = {"cut.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "text.jpg": b"hello"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage, match=name):
            decode(tmp_path / name, [(8, 4)])
    with pytest.raises(BadImage, match="No such file"):
        decode(tmp_path / "absent.jpg", [(8, 4)])
    found = find_bad_images([paths[0], tmp_path / "cut.jpg", paths[1], tmp_path / "text.jpg"], workers=2)
    assert list(found) == [1, 3]
    with pytest.raises(BadImage, match="cut.jpg"):
        TrainingImages([*paths, tmp_path / "cut.jpg"], 8, 4, CPU)


def test_giant_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("data.images.MAX_PIXELS", 199)
    with pytest.raises(BadImage, match="20 x 10 is more than the 199 pixels allowed"):
        decode(save(tmp_path, "giant.png", Image.new("RGB", (20, 10))), [(8, 4)])


def test_normalise_by_hand():
    """Pixel 255 in every channel: (1 - mean) / std."""
    pixel = normalise(torch.full((1, 1, 1, 3), 255, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(pixel, torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_limits_of_containers_count(tmp_path, version):
    """An outer group allows 1000 bytes and uses 700, 300 of them for cached files; the inner one has no limit."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/job/step\n" if version == 2 else "9:cpu:/\n4:memory:/job/step\n0::/\n")
    outer = root / "job" if version == 2 else root / "memory" / "job"
    (outer / "step").mkdir(parents=True)
    for folder, limit in [(outer, "1000"), (outer / "step", "max" if version == 2 else str(2**60))]:
        (folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(f"{limit}\n")
        (folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")).write_text("700\n")
        (folder / "memory.stat").write_text(f"anon 400\n{'' if version == 2 else 'total_'}inactive_file 300\n")
    assert min(_room_in_control_groups(proc, root)) == 600
    assert _room_in_control_groups(tmp_path / "nowhere", root) == []
    assert _room_in_control_groups(proc, tmp_path / "nowhere") == []


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (3, 3), (4, 4), (64, 4)])
def test_as_many_threads_decode_as_there_are_cores_but_no_more_than_gain_anything(monkeypatch, cores, threads):
    """The cores are those that this process may use, not those of the machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert default_workers() == threads
