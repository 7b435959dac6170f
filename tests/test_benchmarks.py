"""benchmarks/training.py: what it compares is alike, and its rows say what was timed."""

import json
from collections import Counter

import pytest
import torch

import train
from benchmarks import training, tricks
from data.images import stream_images
from data.market1501 import market1501
from utils.recipes import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore:Market-1501 in")  # of its counts


@pytest.fixture
def job(tiny_market):
    return training.Job(
        "resnet18", 32, 16, "float32", compile=False, device="cpu", p=4, steps=2, repeats=1, loss="softmax",
        workers=1, peer_workers=0, images=str(tiny_market),
    )  # fmt: skip


def test_a_row(job):
    """One repeat: every ratio is that of the two speeds."""
    row = training.measure(job)
    speed = {way: value["median"] for way, value in row["images_per_second"].items()}
    assert set(speed) == {training.TRAIN, training.BARE, training.NCHW, training.PEER}
    assert row["share_of_bare_loop"] == pytest.approx(speed[training.TRAIN] / speed[training.BARE])
    assert row["times_torchreid"] == pytest.approx(speed[training.TRAIN] / speed[training.PEER])
    assert list(row["stages_ms"]) == [
        "gather and move", "augment, normalise", "forward", "loss", "backward", "optimizer step"
    ]  # fmt: skip
    assert row["store_mib"] * 2**20 == 32 * 32 * 16 * 3  # two batches of 16 images
    assert row["between_epochs_seconds"] > row["saving_seconds"] > 0
    assert row["peak_memory_mib"] > 100
    decoding = training.measure_decoding(job)
    assert decoding["images"] == 54
    text = training.tables([json.loads(json.dumps(row))], [decoding])
    assert f"{row['share_of_bare_loop']:.3f} of the bare loop" in text and "torchreid's way" in text


def test_ratios_are_those_of_neighbouring_turns(job):
    """32 images in 2, 1 and 4 s, and in the bare loop in 0.5, 2 and 3 s: shares of 1/4, 2 and 3/4."""
    seconds = {training.TRAIN: [2.0, 1.0, 4.0], training.BARE: [0.5, 2.0, 3.0], training.PEER: [4.0, 2.0, 12.0]}
    row = training.summarise(job, seconds, {"between_epochs_seconds": 1.0})
    assert row["share_of_bare_loop"] == 0.75 and row["share_of_bare_loop_spread"] == [0.25, 2.0]
    assert row["times_torchreid"] == 2.0 and row["times_torchreid_spread"] == [2.0, 3.0]
    assert row["images_per_second"][training.TRAIN] == {"median": 16.0, "min": 8.0, "max": 32.0}
    assert row["between_epochs_share_at_market_size"] == pytest.approx(16 / 12936)


def test_the_peer_sees_the_same_pixels(job, tiny_market):
    records = market1501(tiny_market, check_counts=False).train[:8]
    (ours,) = stream_images([r.path for r in records], 32, 16, torch.device("cpu"), batch_size=8, workers=0)
    theirs = torch.stack([image for image, _ in training.DecodedEveryTime(records, 32, 16, flip=False)])
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_loops_take_the_steps_they_are_timed_for(job, tiny_market):
    records = market1501(tiny_market, check_counts=False).train
    bare, loops = training.build_loops(job, records)  # each loop has made its one step of warm-up
    assert bare.images.is_contiguous(memory_format=torch.channels_last)
    loops[training.BARE]()
    assert {int(state["step"]) for state in bare.optimizer.state.values()} == {1 + job.steps}
    peer = training.build_peer(job, records)
    before = peer.classifier.weight.detach().clone()
    training.peer_loop(peer, job.steps)
    assert {int(state["step"]) for state in peer.optimizer.state.values()} == {job.steps}
    assert not torch.equal(before, peer.classifier.weight)


def test_small_data_set_has_the_wanted_number_of_images(tiny_market, tmp_path):
    source = market1501(tiny_market, check_counts=False)
    records = training.copy_dataset(tiny_market, tmp_path / "small", num_train=14)
    assert sorted(Counter(record.pid for record in records).values()) == [2, 2, 2, 2, 3, 3]  # six people by turns
    small = market1501(tmp_path / "small", check_counts=False)
    assert len({record.pid for record in small.query}) == 2 < len({record.pid for record in source.query})
    with pytest.raises(ValueError, match="55 images are needed and 54 are there"):
        training.pick(source.train, 55)


def test_whole_training_says_whether_it_ended(job):
    save = train.save_checkpoint
    whole = training.measure_whole(job, epochs=2, time_limit=1e6, bare_steps=1)
    assert whole["epochs_done"] == len(whole["images_per_second"]) == 2 and whole["rank1"] is not None
    assert whole["seconds"] >= whole["seconds_at_epoch"][-1]
    stopped = training.measure_whole(job, epochs=4, time_limit=0.0, bare_steps=1)
    assert stopped["epochs_done"] == 2 and stopped["epochs_wanted"] == 4  # after the second it knows how long one takes
    assert stopped["rank1"] is None
    assert train.save_checkpoint is save


def test_one_job_for_each_row():
    args = training.parse_flags(["--archs", "resnet50", "--device", "cpu"])
    assert [(job.precision, job.p, job.steps, job.height) for job in training.jobs_of(args, "")] == [
        ("float32", 8, 3, 256), ("bfloat16", 8, 3, 256)
    ]  # fmt: skip
    args = training.parse_flags(["--device", "cpu", "--precisions", "bfloat16", "--compile"])
    args.device = "cuda"  # larger batches and longer epochs
    jobs = [(job.arch, job.compile, job.p, job.steps) for job in training.jobs_of(args, "")]
    assert jobs == [(arch, compiled, 16, 100) for arch in ("resnet18", "resnet50") for compiled in (False, True)]
    for wrong in (["--repeats", "0"], ["--loss", "foo"], ["--device", "abacus"]):
        with pytest.raises(SystemExit):
            training.parse_flags(wrong)


def test_what_tricks_cost(tmp_path, capsys):
    """The ratios are those of neighbouring turns; the file names no folder."""
    tricks.main(["--quick", "--height", "64", "--batch-size", "8", "--steps", "1", "--repeats", "1", "--device", "cpu",
                 "--machine", "box", "--out", str(tmp_path)])  # fmt: skip
    result = json.loads((tmp_path / "tricks_box.json").read_text())
    assert [row["name"] for row in result["rows"]] == list(tricks.SETTINGS) and result["rows"][0]["ratio"] == 1
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["milliseconds"] / result["rows"][0]["milliseconds"])
    assert "all of them" in capsys.readouterr().out and str(tmp_path) not in (tmp_path / "tricks_box.json").read_text()


def test_the_tricks_benchmark_knows_every_trick_of_the_recipe():
    """Each alone, but for the schedule and the flip at test time, which are no part of a step."""
    alone = {key for own in tricks.SETTINGS.values() for key in own} - {"recipe", "loss_args"}
    assert alone == RECIPES["tricks"]["*"].keys() - {"warmup", "milestones", "flip_test"}
