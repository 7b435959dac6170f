"""What only a GPU can show: the CPU's numbers, no waiting in the loop, memory that runs out, bit for bit resuming.

    pytest -m gpu tests/test_gpu.py                           # skipped where there is no GPU
    REID_TEST_DEVICE=cpu pytest -m gpu tests/test_gpu.py      # the same lines on a CPU, before they meet a GPU
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import evaluate
import train
from data import load_dataset
from data.images import TrainingImages
from losses import LOSSES, build_loss
from utils.features import Features
from utils.ranking import rank_metrics
from utils.seed import set_backends

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Market-1501 in")]
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SUMS = ("softmax+triplet", "softmax+0.0005*center")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, at its first product


@pytest.fixture
def cuda():
    """The device under test; numbers are compared in whole float32."""
    name = os.environ.get("REID_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield torch.device(name)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    set_backends(False)
    if name == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def train_flags(cuda, tiny_market, tmp_path):
    """train.py's flags for 13 steps an epoch on tiny images, in tmp_path/NAME."""

    def build(name, *more):
        flags = ["--dataset", "market", "--data-dir", tiny_market, "--arch", "resnet18", "--weights", "none",
                 "--p", 2, "--k", 2, "--height", 64, "--width", 32, "--workers", 2, "--save-every", 0,
                 "--device", cuda]  # fmt: skip
        return [str(flag) for flag in (*flags, "--run-dir", tmp_path / name, *more)]

    return build


@contextlib.contextmanager
def no_synchronisation(device):
    """Every wait for the GPU is an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def batch(device, D=2048, B=64, K=4):
    """Embeddings as a ReLU makes them, of length 30, and labels."""
    embeddings = torch.rand(B, D, generator=torch.Generator().manual_seed(0))
    return (30 * F.normalize(embeddings)).to(device), (torch.arange(B) // K).to(device)


def build(expression, device, C=751, D=2048):
    torch.manual_seed(0)
    return build_loss(expression, C, D).to(device)


def value_and_gradients(loss_fn, embeddings, labels, autocast=False):
    embeddings = embeddings.detach().clone().requires_grad_()
    with torch.autocast(embeddings.device.type, torch.bfloat16, enabled=autocast):
        loss = loss_fn(embeddings, labels)
    loss.backward()
    gradients = {name: p.grad for name, p in loss_fn.named_parameters()}
    return {"loss": loss.detach(), "embeddings": embeddings.grad, **gradients, **dict(loss_fn.named_buffers())}


# --------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("expression", [*LOSSES, *SUMS])
def test_losses_are_those_of_the_cpu(cuda, expression, autocast):
    """Value, gradients and buffers; under autocast of bfloat16 embeddings, too, which the losses take as float32."""
    found = []
    for device in (CPU, cuda):
        embeddings, labels = batch(device)
        embeddings = embeddings.bfloat16() if autocast else embeddings
        found.append(value_and_gradients(build(expression, device), embeddings, labels, autocast))
    for name, expected in found[0].items():
        size = expected.abs().max().item() if expected.numel() else 0
        step = 2**-7 if expected.dtype == torch.bfloat16 else 1e-4  # of the largest element
        torch.testing.assert_close(found[1][name].cpu(), expected, rtol=step, atol=step * size)


@pytest.mark.parametrize("expression", [*LOSSES, *SUMS])
def test_losses_never_wait_for_the_device(cuda, expression):
    if expression == "smooth_ap":
        pytest.skip("asks the device for the number of pairs, once a step, and says so")
    embeddings, labels = batch(cuda)
    loss_fn = build(expression, cuda)
    value_and_gradients(loss_fn, embeddings, labels)
    with no_synchronisation(cuda):
        value_and_gradients(loss_fn, embeddings, labels)


@pytest.mark.parametrize("expression", [*LOSSES, *SUMS])
def test_losses_give_the_same_bits_again_with_deterministic(cuda, expression):
    set_backends(True)
    embeddings, labels = batch(cuda)
    first, second = (value_and_gradients(build(expression, cuda), embeddings, labels) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# -------------------------------------------------------------------------------------------------------------- ranking


def retrieval(D, Q, G, people=40, seed=0):
    """Six arrays with ties (every sixth gallery image is a copy of the one before it), junk, and six cameras."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(most, count):
        return torch.randint(most, (count,), generator=generator)

    query_pids, gallery_pids = numbers(people, Q), numbers(people + 1, G) - 1  # -1: junk
    looks = torch.randn(people + 1, D, generator=generator)
    query = looks[query_pids] + 4 * torch.randn(Q, D, generator=generator)
    gallery = looks[gallery_pids] + 4 * torch.randn(G, D, generator=generator)
    gallery[5::6] = gallery[4::6][: len(gallery[5::6])]
    return [query, query_pids, numbers(6, Q), gallery, gallery_pids, numbers(6, G)]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_ranking_is_that_of_the_cpu_in_float64(cuda, metric):
    """Several blocks of both; whatever the caller's TF32 setting."""
    arrays = retrieval(D=2048, Q=200, G=1500)
    exact = [a.double() if a.is_floating_point() else a for a in arrays]
    expected = rank_metrics(*exact, metric=metric)
    assert 0.05 < expected["mAP"] < 0.95
    torch.backends.cuda.matmul.allow_tf32 = True
    found = rank_metrics(*[a.to(cuda) for a in arrays], metric=metric, query_block=64, gallery_block=512)
    assert torch.backends.cuda.matmul.allow_tf32
    assert found == pytest.approx(expected, abs=1e-5)


@contextlib.contextmanager
def little_memory(device, room):
    """The GPU's memory but for `room` bytes is taken."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    taken = torch.empty(torch.cuda.mem_get_info(device)[0] - room, dtype=torch.uint8, device=device)
    try:
        yield
    finally:
        del taken
        torch.cuda.empty_cache()


def test_ranking_goes_on_in_smaller_blocks_when_memory_runs_out(cuda):
    """A block of 4,096 x 8,192 is 128 MiB, and there are 100."""
    small = cuda.type == "cpu"
    arrays = [a.to(cuda) for a in retrieval(D=64, Q=300 if small else 4096, G=2000 if small else 32768, people=400)]
    expected = rank_metrics(*arrays)
    names = ("query", "query_pids", "query_camids", "gallery", "gallery_pids", "gallery_camids")
    features = Features(**dict(zip(names, arrays, strict=True)))
    with little_memory(cuda, room=100 * 2**20):
        if not small:
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(4096, 8192, device=cuda)
        found = evaluate.score(features)
    assert found == pytest.approx(expected, abs=1e-5)


def test_training_says_in_one_sentence_that_memory_ran_out(cuda, train_flags):
    if cuda.type == "cpu":
        pytest.skip("takes the memory of a GPU")
    with little_memory(cuda, room=3 * 2**30):  # 16 images of 1024 x 512 take ten times as much
        flags = train_flags("run", "--loss", "softmax", "--arch", "resnet50", "--height", 1024, "--width", 512,
                            "--p", 4, "--k", 4, "--epochs", 1, "--cache", "off")  # fmt: skip
        done = subprocess.run([sys.executable, ROOT / "train.py", *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "train.py: out of memory on the device: " in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------ images, network


@pytest.mark.parametrize("how", [{}, {"random_crop": True}, {"pad_crop": 20, "random_erasing": 0.5}])
def test_images_are_the_same_wherever_they_are_kept(cuda, tiny_market, monkeypatch, how):
    paths = sorted((tiny_market / "bounding_box_train").glob("*.png"))
    order = torch.randperm(54, generator=torch.Generator().manual_seed(0))[:48].view(6, 8)

    def pixels(device, room, cache="auto"):
        with monkeypatch.context() as patch:
            patch.setattr("data.images.available_memory", lambda place: room[place.type])
            images_of = TrainingImages(paths, 48, 24, device, cache=cache, workers=3, **how)
        return images_of.where, torch.stack(list(images_of.batches(order, seed=1, epoch=2))).cpu()

    plenty = 2**40
    where, expected = pixels(cuda, {cuda.type: plenty})
    assert where == ("main memory" if cuda.type == "cpu" else str(cuda))
    for room, cache, place in [
        ({"cuda": 0, "cpu": plenty}, "auto", "main memory"),
        ({"cuda": 0, "cpu": 0}, "auto", "files, decoded every epoch"),
        ({"cuda": plenty, "cpu": plenty}, "off", "files, decoded every epoch"),
    ]:
        where, found = pixels(cuda, room, cache)
        assert where == place and torch.equal(found, expected)
    torch.testing.assert_close(pixels(CPU, {"cpu": plenty})[1], expected, rtol=0, atol=1e-6)


def test_the_last_short_batch_changes_no_embedding(cuda, tiny_market, monkeypatch):
    """36 images 16 at a time, the last 4 with 12 black ones beside them on a GPU; and one by one."""
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 16)
    monkeypatch.setattr(evaluate, "BATCH_SIZE_GPU", 16)
    paths = [record.path for record in load_dataset("market", tiny_market).gallery]
    model = evaluate.build_model("resnet18").to(cuda, memory_format=torch.channels_last)
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    found = evaluate.embed(model, paths, height=32, width=16, device=cuda, workers=2)
    assert found.shape == (36, 512) and sizes == ([16, 16, 4] if cuda.type == "cpu" else [16, 16, 16])
    alone = [evaluate.embed(model, paths[i : i + 1], height=32, width=16, device=cuda) for i in (0, 35)]
    torch.testing.assert_close(found[[0, 35]], torch.cat(alone), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- training


def read_state(folder):
    checkpoint = torch.load(folder / "last.pt", weights_only=True, map_location="cpu")
    return {**checkpoint["model"], **{f"loss.{key}": value for key, value in checkpoint["loss"].items()}}


def read_log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["epoch"], line["loss"], line["lr"]) for line in lines]


def test_training_never_waits_for_the_device_between_two_looks_at_the_loss(train_flags, cuda, monkeypatch):
    """From the second batch of an epoch to the last but one; fewer steps than LOG_EVERY."""
    watched, batches = [], TrainingImages.batches

    def watched_batches(self, order, *which):
        source = batches(self, order, *which)
        for step in range(len(order)):
            if 0 < step < len(order) - 1:
                watched.append(step)
                with no_synchronisation(cuda):
                    yield next(source)  # the loop's body runs while this waits here
            else:
                yield next(source)

    monkeypatch.setattr(TrainingImages, "batches", watched_batches)
    train.main(train_flags("run", "--loss", "softmax+triplet", "--epochs", 2))
    assert watched == [*range(1, 12)] * 2 and len(watched) / 2 < train.LOG_EVERY


def test_amp_and_channels_last_reach_the_network(train_flags, tmp_path, monkeypatch):
    seen, build_model = set(), train.build_model

    def watched_model(*args, **options):
        model = build_model(*args, **options)

        def look(layer, inputs, output):
            seen.add((output.dtype, output.is_contiguous(memory_format=torch.channels_last), layer.training))

        model.layer2.register_forward_hook(look)
        return model

    monkeypatch.setattr(train, "build_model", watched_model)
    train.main(train_flags("run", "--loss", "arcface", "--epochs", 1, "--amp"))
    assert seen == {(torch.bfloat16, True, True), (torch.bfloat16, True, False)}  # training, then scoring
    assert all(value.isfinite().all() for value in read_state(tmp_path / "run").values())


def test_all_tricks_train_and_are_scored_the_same_later(train_flags, tmp_path):
    train.main(train_flags("run", "--loss", "softmax", "--epochs", 2, "--recipe", "tricks", "--amp"))
    state = read_state(tmp_path / "run")
    assert all(value.isfinite().all() for value in state.values()) and "fc.neck.weight" in state
    evaluate.main(["--run", str(tmp_path / "run")])
    (again,) = (tmp_path / "run").glob("evaluation_*flip-test.json")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert json.loads(again.read_text())["mAP"] == pytest.approx(result["mAP"], abs=5e-3)  # cuDNN may choose anew


def test_a_killed_run_goes_on_bit_for_bit_with_deterministic(train_flags, tmp_path):
    flags = ["--loss", "softmax+triplet", "--epochs", 6, "--deterministic", "--random-crop"]
    train.main(train_flags("whole", *flags))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(ROOT / "train.py"), *train_flags("run", *flags)]
    with open(tmp_path / "out.txt", "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    while process.poll() is None and not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "result.json").exists(), (tmp_path / "out.txt").read_text()[-2000:]
    train.main(train_flags("run", *flags, "--resume"))
    whole, resumed = read_state(tmp_path / "whole"), read_state(tmp_path / "run")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "run")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "run")]
    assert all(results[0][key] == results[1][key] for key in evaluate.METRICS)


def test_a_compiled_run_is_scored_without_compiling(train_flags, tmp_path, cuda):
    if cuda.type == "cpu" and "REID_TEST_COMPILE" not in os.environ:
        pytest.skip("takes a compiler minutes: REID_TEST_COMPILE=1")
    train.main(train_flags("plain", "--loss", "softmax", "--epochs", 1))
    train.main(train_flags("run", "--loss", "softmax", "--epochs", 1, "--compile", "--amp"))
    assert read_state(tmp_path / "run").keys() == read_state(tmp_path / "plain").keys()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    evaluate.main(["--run", str(tmp_path / "run"), "--device", str(cuda)])
    again = json.loads((tmp_path / "run" / "evaluation_market_cosine.json").read_text())
    assert again["mAP"] == pytest.approx(result["mAP"], abs=1e-3)
