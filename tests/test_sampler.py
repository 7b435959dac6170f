"""The samplers: which images go into which batch, and nothing but (seed, epoch) decides it."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.sampler import PKSampler, RandomSampler

ROOT = Path(__file__).parent.parent
PK_GOLDEN = [[6, 7, 4, 3], [2, 0, 3, 4]]
RANDOM_GOLDEN = [[0, 6, 1], [3, 4, 2]]

# labels of training images: 1 to 12 identities with 1 to 9 images each, in any order
LABELS = (
    st.lists(st.integers(1, 9), min_size=1, max_size=12)
    .map(lambda sizes: [label for label, size in enumerate(sizes) for _ in range(size)])
    .flatmap(st.permutations)
)


@settings(max_examples=300, deadline=None)
@given(labels=LABELS, p=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_pk_batches(labels, p, k, seed, epoch):
    assume(len(set(labels)) >= p and len(labels) >= p * k)
    sampler = PKSampler(labels, p, k, seed)
    batches = sampler.batches(epoch)
    assert batches.shape == (len(sampler), p * k) and batches.dtype == torch.int64
    assert len(sampler) == len(labels) // (p * k)
    size = Counter(labels)  # images of each identity
    uses = dict.fromkeys(labels, 0)
    image_uses = [0] * len(labels)
    for batch in batches.view(-1, p, k).tolist():
        identities = [labels[images[0]] for images in batch]
        assert len(set(identities)) == p
        for label, images in zip(identities, batch, strict=True):
            assert {labels[index] for index in images} == {label}
            assert len(set(images)) == min(k, size[label])  # repeated only if there are fewer than k
            assert max(Counter(images).values()) == -(-k // size[label])
            for index in images:
                image_uses[index] += 1
            of_label = [n for n, owner in zip(image_uses, labels, strict=True) if owner == label]
            assert max(of_label) - min(of_label) <= 1  # all used before one is used again
            uses[label] += 1
        assert max(uses.values()) - min(uses.values()) <= 1


def test_pk_queue_that_runs_dry_within_a_batch():
    """5 identities, 3 in a batch: of the second batch two end the first shuffle and one begins the next; over five
    batches each identity is used exactly three times."""
    labels = [label for label in range(5) for _ in range(6)]
    for seed in range(20):
        batches = PKSampler(labels, p=3, k=2, seed=seed).batches(0).view(5, 3, 2)
        identities = torch.tensor(labels)[batches[:, :, 0]].tolist()  # (5, 3)
        assert set(identities[0] + identities[1][:2]) == set(range(5))
        assert Counter(sum(identities, [])) == dict.fromkeys(range(5), 3)
        assert Counter(batches.flatten().tolist()) == dict.fromkeys(range(30), 1)


def test_pk_fewer_images_than_k():
    """3 images, k = 7: each of them twice, and one a third time."""
    batch = PKSampler([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], p=1, k=7, seed=0)
    for epoch in range(10):
        counts = Counter(batch.batches(epoch)[0].tolist())
        assert sorted(counts.values()) in ([2, 2, 3], [1] * 7)


@pytest.mark.parametrize(
    "num_images, p, k, steps", [(12936, 16, 4, 202), (64, 16, 4, 1), (127, 16, 4, 1), (128, 16, 4, 2)]
)
def test_pk_length(num_images, p, k, steps):
    labels = [index % 32 for index in range(num_images)]
    sampler = PKSampler(labels, p, k, seed=0)
    assert len(sampler) == len(sampler.batches(0)) == steps


def test_pk_labels_may_be_a_tensor_and_any_numbers():
    labels = [7, 7, -3, -3, 1000, 1000]
    from_list = PKSampler(labels, p=2, k=2, seed=0).batches(0)
    assert torch.equal(PKSampler(torch.tensor(labels), p=2, k=2, seed=0).batches(0), from_list)
    assert len({labels[index] for index in from_list[0]}) == 2


def samplers(seed: int):
    return [PKSampler([index % 10 for index in range(60)], p=4, k=3, seed=seed), RandomSampler(60, 12, seed)]


@pytest.mark.parametrize("which", [0, 1])
def test_batches_are_a_function_of_seed_and_epoch(which):
    """Every seed and epoch has its own batches; (1, 0) and (0, 1), seeds a multiple of 2^32 apart and -1 and 1 too."""
    drawn = {}
    for seed in (0, 1, 2, -1, 2**32, 2**32 + 1, 12, 1):
        for epoch in (0, 1, 2, 20):
            sampler = samplers(seed)[which]
            batches = sampler.batches(epoch)
            assert torch.equal(batches, sampler.batches(epoch))  # asked twice
            assert torch.equal(batches, drawn.setdefault((seed, epoch), batches))
    assert len({tuple(batches.flatten().tolist()) for batches in drawn.values()}) == len(drawn)


@pytest.mark.parametrize("which", [0, 1])
def test_no_other_generator_matters_or_moves(which):
    torch.manual_seed(0)
    expected_draw = torch.rand(1)
    torch.manual_seed(0)
    first = samplers(3)[which].batches(5)
    assert torch.equal(torch.rand(1), expected_draw)
    torch.manual_seed(1)
    assert torch.equal(samplers(3)[which].batches(5), first)


def test_batches_are_the_same_everywhere():
    """Written down once: a change of these numbers would change every published run."""
    assert PKSampler([0, 0, 0, 1, 1, 2, 2, 2], p=2, k=2, seed=0).batches(0).tolist() == PK_GOLDEN
    assert RandomSampler(7, 3, seed=0).batches(0).tolist() == RANDOM_GOLDEN


def test_batches_do_not_depend_on_threads_or_hashing():
    """In another process, with four threads and a hash seed of its own, as in this one."""
    code = """
import torch
from data.sampler import PKSampler, RandomSampler
torch.set_num_threads(4)
print(PKSampler([i % 10 for i in range(60)], 4, 3, 0).batches(2).tolist())
print(RandomSampler(60, 12, 0).batches(2).tolist())"""
    environment = {**os.environ, "PYTHONHASHSEED": "4"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    here = PKSampler([i % 10 for i in range(60)], 4, 3, 0), RandomSampler(60, 12, 0)
    assert done.stdout.splitlines() == [str(sampler.batches(2).tolist()) for sampler in here], done.stderr


@settings(max_examples=200, deadline=None)
@given(num_images=st.integers(1, 200), batch_size=st.integers(1, 50), epoch=st.integers(0, 5))
def test_random_batches(num_images, batch_size, epoch):
    assume(num_images >= batch_size)
    sampler = RandomSampler(num_images, batch_size, seed=0)
    batches = sampler.batches(epoch)
    assert batches.shape == (len(sampler), batch_size) and batches.dtype == torch.int64
    assert len(sampler) == num_images // batch_size
    images = batches.flatten().tolist()
    assert len(set(images)) == len(images) and set(images) <= set(range(num_images))


def test_random_batches_leave_out_others_each_epoch():
    sampler = RandomSampler(10, 4, seed=0)
    left_out = {
        index for epoch in range(30) for index in set(range(10)) - set(sampler.batches(epoch).flatten().tolist())
    }
    assert left_out == set(range(10))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PKSampler([0, 0, 1, 1, 1, 1], 3, 2, 0), "p=3 identities .* there are 2: lower --p"),
        (lambda: PKSampler([0, 0, 1], 2, 2, 0), "3 training images do not fill one batch of 2 x 2: lower --p or --k"),
        (lambda: PKSampler([], 1, 1, 0), "there are 0"),
        (lambda: PKSampler([0, 0], 0, 2, 0), "p=0"),
        (lambda: PKSampler([0, 0], 1, -1, 0), "k=-1"),
        (lambda: RandomSampler(7, 8, 0), "7 training images do not fill one batch of 8: lower --batch-size"),
        (lambda: RandomSampler(0, 1, 0), "0 training images"),
        (lambda: RandomSampler(7, 0, 0), "batch_size=0"),
    ],
)
def test_what_cannot_be_sampled(make, message):
    with pytest.raises(ValueError, match=message):
        make()
