"""benchmarks/training.py, steps.py: what is compared is alike, and the rows say what was timed. kill.py: one kill.

gpu.py: one turn on the CPU, its files, its table, and what it says of a part that fails.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, kill, steps, training, tricks
from data.images import stream_images
from data.market1501 import market1501
from utils.recipes import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore:Market-1501 in")  # of its counts
CPU = torch.device("cpu")


@pytest.fixture
def job():
    return steps.Job("resnet18", 32, 16, "float32", p=4, steps=2, repeats=2, workers=0)


def test_a_row(job, tiny_market):
    """The ways, the stages and the costs of a small job, and the tables that they make."""
    row = training.measure(job, tiny_market)
    assert set(row["images_per_second"]) == {training.TRAIN, training.BARE, training.NCHW, training.PEER}
    assert all(value["n"] == 2 and value["min"] > 0 for value in row["images_per_second"].values())
    low, high = row["share_of_bare_loop_spread"]
    assert 0 < low <= row["share_of_bare_loop"] <= high
    assert list(row["stages_ms"]) == ["data", "forward", "loss", "backward", "optimizer"]
    assert row["peak_memory_mib"] > 100 and row["checkpoint_seconds"] > 0
    assert row["checkpoint_mib"] == pytest.approx(3 * 4 * 11_176_512 / 2**20, rel=0.01)  # ResNet-18, and Adam's two
    decoding = training.measure_decoding(job, tiny_market)
    assert decoding["images"] == 54 and set(decoding["images_per_second_by_threads"]) == set(map(str, steps.THREADS))
    row["peer_peak_memory_mib"] = 1234.5
    text = training.tables([json.loads(json.dumps(row))], [decoding])
    for part in (f"{row['share_of_bare_loop']:.3f} of the bare loop", "torchreid's way", "1234.50"):
        assert part in text


def test_ratios_are_those_of_neighbouring_turns(job):
    """32 images in 2, 1 and 4 s, and in the bare loop in 0.5, 2 and 3 s: shares of 1/4, 2 and 3/4."""
    seconds = {training.TRAIN: [2.0, 1.0, 4.0], training.BARE: [0.5, 2.0, 3.0], training.PEER: [4.0, 2.0, 12.0]}
    row = training.summarise(job, seconds)
    assert row["share_of_bare_loop"] == 0.75 and row["share_of_bare_loop_spread"] == [0.25, 2.0]
    assert row["times_torchreid"] == 2.0 and row["times_torchreid_spread"] == [2.0, 3.0]
    assert row["images_per_second"][training.TRAIN] == {"median": 16.0, "min": 8.0, "max": 32.0, "n": 3}


def test_the_peer_sees_the_same_pixels(tiny_market):
    records = market1501(tiny_market, check_counts=False).train[:8]
    (ours,) = stream_images([r.path for r in records], 32, 16, CPU, batch_size=8, workers=0)
    theirs = torch.stack([image for image, _ in training.DecodedEveryTime(records, 32, 16, flip=False)])
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_loops_take_the_steps_they_are_timed_for(job, tiny_market):
    step = steps.bare_step(job, num_classes=6)
    assert step.parts["model"].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert steps.bare_loop(step, 3, CPU) > 0
    assert {int(state["step"]) for state in step.parts["optimizer"].state.values()} == {3}
    (line, second) = steps.real_epochs(job, tiny_market)
    assert second["epoch"] == 2 and second["images_per_second"] == pytest.approx(48 / second["seconds"], rel=0.01)
    with pytest.raises(FileNotFoundError, match="bounding_box_train"):
        steps.real_epochs(job, tiny_market / "nowhere")


def test_small_data_set_has_the_wanted_number_of_images(tiny_market, tmp_path):
    records = steps.small_set(tiny_market, tmp_path / "small", num_train=14)
    assert sorted(Counter(record.pid for record in records).values()) == [2, 2, 2, 2, 3, 3]  # six people by turns
    assert len({record.pid for record in market1501(tmp_path / "small", check_counts=False).query}) == 2


def test_one_job_for_each_row():
    _, jobs = training.parse_flags(["--archs", "resnet50", "--device", "cpu"])
    assert [(job.precision, job.p, job.steps, job.height) for job in jobs] == [
        ("float32", 8, 3, 256), ("bfloat16", 8, 3, 256)
    ]  # fmt: skip
    _, jobs = training.parse_flags(["--device", "cpu", "--precisions", "bfloat16", "--compile", "--p", "3"])
    assert [(job.arch, job.compile, job.p) for job in jobs] == [
        (arch, compiled, 3) for arch in ("resnet18", "resnet50") for compiled in (False, True)
    ]


def test_a_run_that_ends_before_its_kill_is_shown(tmp_path, monkeypatch):
    """Where kills hit: tests/test_faults.py."""
    monkeypatch.setattr(kill, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("import sys; sys.exit(f'not {sys.argv[1:]}')")
    with pytest.raises(RuntimeError, match=r"ended before it was killed:\s+not \['--p', '99'\]"):
        kill.kill_at(["--p", 99], tmp_path / "run", epoch=4, saved=True, delay=0)


def test_recorded_files_say_which_commit_measured():
    """But for the first ones, which are older than that rule."""
    older = {"synthetic", "training_intel-xeon-processor-2-threads", "training_intel-xeon-processor-2-threads-resnet18"}
    for path in Path(__file__).parent.parent.glob("results/benchmarks/*.json"):
        assert path.stem in older or json.loads(path.read_text()).get("commit"), f"{path.name} has no commit"


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


def test_a_turn_of_two_parts(tmp_path, capfd, monkeypatch):
    """In this process; .ci/run takes all parts as they are."""

    def run_part(part, argv, seconds, folder):
        gpu.main([*argv, "--one", part, "--seconds", f"{seconds:.0f}", "--table", str(folder / "table.txt")])
        return True, (folder / "table.txt").read_text()

    monkeypatch.setattr(gpu, "run_part", run_part)
    flags = ["--small", "--device", "cpu", "--minutes", "3", "--machine", "box", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--parts", "evaluator", "losses", *flags])
    out = capfd.readouterr().out
    assert stopped.value.code == 0, out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu-evaluator-small_box.json", "gpu-losses-small_box.json"]  # fmt: skip
    rows = json.loads((tmp_path / "gpu-evaluator-small_box.json").read_text())["rows"]
    assert {row["size"] for row in rows} == {"market", "msmt17"}
    assert all(row["n"] > 0 and row["largest_difference"] < 1e-5 for row in rows)
    scored = [row["metrics"]["mAP"] for row in rows if row["size"] == "market" and row["metrics"]]
    assert len(scored) == 3 and 0 < scored[0] < 1
    losses = json.loads((tmp_path / "gpu-losses-small_box.json").read_text())["rows"]
    assert {row["loss"] for row in losses} == set(gpu.LOSSES)
    assert "torchreid's way" in out and "arcface" in out


def test_a_part_that_fails_or_takes_too_long_is_said(tmp_path, capfd):
    flags = ["--small", "--device", "no-device", "--out", str(tmp_path)]
    fine, text = gpu.run_part("evaluator", flags, 60, tmp_path)
    assert not fine and "no-device" in text + capfd.readouterr().err
    fine, text = gpu.run_part("evaluator", flags, 0.1, tmp_path)
    assert not fine and "STOPPED after its 0 s" in text
