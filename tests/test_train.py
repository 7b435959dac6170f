"""train.py and evaluate.py, for real, on a tiny data set: run folder, resuming, stopping, flags."""

import itertools
import json
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_market

import evaluate
import train
from data.holdout import holdout
from data.market1501 import market1501
from losses import ROWS, build_loss

pytestmark = pytest.mark.filterwarnings("ignore:Market-1501 in")  # the tiny set has other counts, and says so
ROOT = Path(__file__).resolve().parent.parent
METRICS = ["rank1", "rank5", "rank10", "rank20", "mAP", "mAP_trapezoid", "mINP", "num_queries"]
TIMES = ("seconds", "images_per_second")


def run(*flags):
    train.main([str(flag) for flag in flags])


def read_log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def read_state(folder):
    """Every tensor of last.pt, the loss's with a prefix."""
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    return {**checkpoint["model"], **{f"loss.{key}": value for key, value in checkpoint["loss"].items()}}


def test_a_run_from_images_to_metrics(flags, tmp_path, capsys):
    run("--loss", "softmax+triplet", "--epochs", 2, "--eval-every", 1, *flags)
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == [
        "args.json", "last.pt", "log.jsonl", "result.json"]  # fmt: skip
    args = json.loads((folder / "args.json").read_text())
    assert args["epochs"] == 2 and args["milestones"] == [1, 2] and args["environment"]["torch"] == torch.__version__
    log = read_log(folder)
    assert [line["epoch"] for line in log] == [1, 2]
    assert log[0]["lr"] == 3.5e-4 and log[1]["lr"] == pytest.approx(3.5e-5)
    result = json.loads((folder / "result.json").read_text())
    assert all(0 <= result[key] <= 1 for key in METRICS[:-1]) and result["num_queries"] == 18
    assert result["row"] == "softmax+triplet" and len(result["log"]) == 2
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    assert sorted(checkpoint) == ["args", "epoch", "loss", "model"]  # a finished run keeps no optimizer
    out = capsys.readouterr().out
    assert "54 training images of 6 identities" in out and "rank-1" in out

    evaluate.main(["--run", str(folder)])  # the same network, the same numbers
    again = json.loads((folder / "evaluation_market_cosine.json").read_text())
    assert {key: again[key] for key in METRICS} == {key: result[key] for key in METRICS}
    assert again["metric"] == "cosine" and not again["ignore_cameras"]


def test_features_saved_and_scored_without_the_network(small_network, flags, tmp_path, capsys):
    run("--loss", "softmax", "--epochs", 0, *flags)
    expected = json.loads((tmp_path / "run" / "result.json").read_text())["mAP"]
    for target in ("features.npz", "features"):
        evaluate.main(["--run", str(tmp_path / "run"), "--save-features", str(tmp_path / target)])
        capsys.readouterr()
        evaluate.main(["--features", str(tmp_path / target)])
        assert f"{100 * expected:.2f}" in capsys.readouterr().out


def test_training_learns(flags, tmp_path):
    run("--loss", "softmax", "--epochs", 10, *flags, "--save-every", 60)
    log = read_log(tmp_path / "run")
    assert len(log) == 10 and log[-1]["loss"] < log[0]["loss"] / 4


def test_same_seed_same_weights_other_seed_others(small_network, flags, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("--loss", "triplet", "--epochs", 1, *flags, "--run-dir", tmp_path / name, "--seed", seed)
    a, b, c = (read_state(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["conv1.weight"], c["conv1.weight"])


class Killed(BaseException):
    """Stands in for a process that ends at once."""


@pytest.mark.parametrize("loss", ["softmax+center", "sphereface"])
@pytest.mark.parametrize("moment", ["before any checkpoint", "after a log line", "after a checkpoint", "at the end"])
def test_a_resumed_run_is_the_uninterrupted_one(small_network, flags, tmp_path, monkeypatch, loss, moment):
    """Weights, centers, SphereFace's step, log and result are equal bit for bit."""
    run("--loss", loss, "--epochs", 3, "--eval-every", 1, *flags, "--run-dir", tmp_path / "whole")
    save, calls = train.save_checkpoint, []

    def dying_save(path, content):
        calls.append(path)
        if moment == "before any checkpoint" or (moment == "after a log line" and len(calls) == 2):
            raise Killed
        save(path, content)
        if moment == "after a checkpoint" and len(calls) == 2 or len(calls) == 3:
            raise Killed

    monkeypatch.setattr(train, "save_checkpoint", dying_save)
    with pytest.raises(Killed):
        run("--loss", loss, "--epochs", 3, "--eval-every", 1, *flags)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "result.json").exists()
    run("--resume", "--run-dir", tmp_path / "run")
    whole, resumed = read_state(tmp_path / "whole"), read_state(tmp_path / "run")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "run")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "run")]
    assert [results[0][key] for key in METRICS] == [results[1][key] for key in METRICS]


def test_a_resume_elsewhere_says_so(small_network, flags, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_checkpoint", lambda *_: (_ for _ in ()).throw(Killed))
        run("--loss", "triplet", "--epochs", 1, *flags)
    run("--resume", "--run-dir", tmp_path / "run", "--epochs", 1)
    assert "bit for bit" not in capsys.readouterr().out
    (tmp_path / "run" / "result.json").unlink()
    torch.set_num_threads(2)
    try:
        run("--resume", "--run-dir", tmp_path / "run")
    finally:
        torch.set_num_threads(1)
    assert "began with threads 1 and goes on with threads 2: not bit for bit" in capsys.readouterr().out


def test_the_weights_file_is_read_before_any_image_and_not_again(flags, tmp_path, monkeypatch):
    torch.save(train.build_model("resnet18", "none").state_dict(), tmp_path / "weights.pth")
    save = train.save_checkpoint

    def dying_save(path, content):
        save(path, content)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", dying_save)
        with pytest.raises(Killed):
            run("--loss", "triplet", "--epochs", 2, *flags, "--weights", tmp_path / "weights.pth")
    (tmp_path / "weights.pth").unlink()
    run("--resume", "--run-dir", tmp_path / "run")
    assert (tmp_path / "run" / "result.json").is_file()
    monkeypatch.setattr(train, "TrainingImages", lambda *_, **__: pytest.fail("decoded before the weights were read"))
    with pytest.raises((ValueError, OSError), match="weights.pth"):
        run("--loss", "triplet", *flags, "--weights", tmp_path / "weights.pth", "--run-dir", tmp_path / "other")


def test_resuming_a_finished_run_prints_its_result(small_network, flags, tmp_path, capsys):
    run("--loss", "softmax", "--epochs", 0, *flags)
    capsys.readouterr()
    run("--loss", "softmax", "--epochs", 0, *flags, "--resume")
    assert "(finished)" in capsys.readouterr().out


def test_resume_refuses_a_contradicting_flag(small_network, flags, tmp_path, capsys):
    run("--loss", "softmax", "--epochs", 0, *flags)
    for flag, value, before in [("--lr", 0.01, 0.00035), ("--epochs", 5, 0), ("--loss", "triplet", "softmax")]:
        with pytest.raises(SystemExit) as stopped:
            run("--resume", "--run-dir", tmp_path / "run", flag, value)
        assert stopped.value.code == 2
        assert f"began with {flag} {before}, not {value}" in capsys.readouterr().err
    run("--resume", "--run-dir", tmp_path / "run", "--workers", 2)  # changes no number: test_faults.py tries them all


def test_a_finished_run_says_how_to_score_it_otherwise(small_network, flags, tmp_path, capsys):
    run("--loss", "softmax", "--epochs", 0, *flags)
    assert "otherwise" not in capsys.readouterr().out
    run("--resume", "--run-dir", tmp_path / "run", "--metric", "euclidean", "--ignore-cameras")
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown == (
        f"to score it otherwise: python evaluate.py --run {tmp_path / 'run'} --metric euclidean --ignore-cameras"
    )
    evaluate.main(shown.split()[6:])
    assert (tmp_path / "run" / "evaluation_market_euclidean_ignore-cameras.json").exists()


def test_an_existing_run_folder_stops_the_script(small_network, flags, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="exists: go on with it"):
        run("--loss", "softmax", *flags)
    run("--loss", "softmax", "--epochs", 0, *flags, "--resume")  # nothing there yet: it begins
    assert (tmp_path / "run" / "result.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run(small_network, flags, tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite at epoch 1, step 1 to 3: try a smaller --lr"):
        run("--loss", "softmax", "--epochs", 2, "--lr", 1e30, *flags)
    assert not (tmp_path / "run" / "last.pt").exists() and not (tmp_path / "run" / "result.json").exists()


def test_weights_that_are_not_finite_are_not_saved(small_network, flags, tmp_path, monkeypatch):
    """The last step of the second epoch ruins the weights, which no loss has seen yet."""
    step, calls = torch.optim.Adam.step, []

    def ruin(self, *args):
        step(self, *args)
        calls.append(1)
        if len(calls) == 6:
            self.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.Adam, "step", ruin)
    with pytest.raises(FloatingPointError, match="weights are not finite after epoch 2"):
        run("--loss", "softmax", "--epochs", 3, *flags)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1


def test_checkpoints_by_the_minute(small_network, flags, tmp_path, monkeypatch, capsys):
    """With --save-every 60 an epoch is saved once a minute has passed since the last save, and the last one always."""
    clock, saved, save = itertools.count(0, 25), [], train.save_checkpoint

    def noted(path, content):
        saved.append(content["epoch"])
        save(path, content)

    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(train, "save_checkpoint", noted)
    run("--loss", "softmax", "--epochs", 7, *flags, "--save-every", 60)
    assert saved == [3, 6, 7]  # a look at the clock of 25 s at the start, after each epoch and after each save


@pytest.mark.parametrize("row", ["triplet", *(row for row in ROWS if build_loss(row, 2, 2).state_dict())])
def test_every_parameter_and_buffer_moves(small_network, flags, tmp_path, row):
    """One epoch of three real steps: class weights, biases, centers, counted steps and statistics all change."""
    run("--loss", row, "--epochs", 0, *flags, "--run-dir", tmp_path / "before")
    run("--loss", row, "--epochs", 1, *flags)
    before, after = read_state(tmp_path / "before"), read_state(tmp_path / "run")
    assert before.keys() == after.keys()
    still = [key for key in before if torch.equal(before[key], after[key])]
    assert not still


def test_random_sampler_and_random_crop(small_network, flags, tmp_path):
    flags = [flag for flag in flags if flag not in ("--p", "--k", "4")]
    run("--loss", "softmax", "--recipe", "published", "--epochs", 1, "--batch-size", 25, *flags)
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["sampler"] == "random" and args["random_crop"] and args["milestones"] == [20, 40]


def test_held_out_identities(small_network, flags, tmp_path):
    """A third of the six training identities is scored; the others are trained on."""
    flags = ["2" if before == "--p" else flag for before, flag in zip([None, *flags], flags, strict=False)]
    run("--loss", "softmax", "--eval-on", "val", "--epochs", 0, *flags)
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["num_classes"] == 4 and len(args["val_pids"]) == 2 and max(args["val_pids"]) <= 6
    assert json.loads((tmp_path / "run" / "result.json").read_text())["num_queries"] == 6
    evaluate.main(["--run", str(tmp_path / "run")])


def test_held_out_identities_that_are_no_query_are_listed(small_network, flags, tmp_path):
    """Nine training identities, three of them held out, one of these seen by one camera: in the gallery only."""
    root = write_tiny_market(tmp_path / "nine", num_ids=9)
    held_out = sorted({record.pid for record in holdout(market1501(root).train, 0).query})
    for path in root.glob(f"bounding_box_train/{held_out[0]:04}_c[23]*"):
        path.unlink()
    run("--loss", "softmax", "--eval-on", "val", "--epochs", 0, *flags, "--data-dir", root)
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["val_pids"] == held_out and len(held_out) == 3 and args["num_classes"] == 6
    assert json.loads((tmp_path / "run" / "result.json").read_text())["num_queries"] == 6


@pytest.mark.parametrize(
    "bad, message",
    [
        (["--loss", "arcfac"], "arcface"),
        (["--loss", "arcface", "--loss-args", "marginn=1"], "margin"),
        (["--loss", "arcface", "--loss-args", "margin=large"], "margin"),
        (["--loss", "softmax", "--batch-size", "8"], "--batch-size belongs to --sampler random"),
        (["--loss", "softmax", "--lr", "-1"], "--lr"),
        (["--loss", "softmax", "--lr", "nan"], "--lr"),
        (["--loss", "softmax", "--epochs", "1.5"], "--epochs"),
        (["--loss", "softmax", "--height", "9000000000000000000"], "--height: invalid whole number above 0"),
        (["--loss", "softmax", "--synthetic-ids", "1000000"], "--synthetic-ids"),
        (["--loss", "softmax", "--arch", "vgg"], "resnet50"),
        (["--loss", "softmax", "--dataset", "marked"], "duke"),
        (["--loss", "softmax", "--p", "1", "--k", "1"], "at least 2 images"),
        ([], "--loss and --dataset are needed"),
    ],
)
def test_wrong_flags_are_answered_with_one_sentence(flags, tmp_path, capsys, bad, message):
    with pytest.raises(SystemExit) as stopped:
        run(*flags, *bad)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_not_there_is_not_resumed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--resume", "--run-dir", str(tmp_path / "rum")])
    assert "rum is no folder of a run that began" in capsys.readouterr().err and not (tmp_path / "rum").exists()


def test_missing_data_set_is_one_sentence(tmp_path, monkeypatch):
    words = ["--loss", "softmax", "--dataset", "market", "--data-dir", str(tmp_path / "nowhere")]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the script has its own
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^train.py: No bounding_box_train.*") as stopped:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert len(stopped.value.code.splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_compile_without_a_compiler_is_one_sentence(small_network, flags, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/no/compiler",))
    monkeypatch.setattr(config, "compile_threads", 1)  # no pool of processes that would outlive the test
    monkeypatch.setattr(sys, "argv", ["train.py", "--loss", "softmax", "--epochs", "1", "--compile", *flags])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit, match=r"^train.py: --compile does not work here \(.*ompiler.*\): leave it out$"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_two_processes_in_one_run_folder(small_network, flags, tmp_path):
    (tmp_path / "run").mkdir()
    with train.locked(tmp_path / "run"), pytest.raises(ValueError, match="in use by another process"):
        run("--loss", "softmax", "--epochs", 0, "--resume", *flags)
