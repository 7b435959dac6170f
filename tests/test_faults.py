"""What goes wrong on real machines: killed processes, full disks, broken images, files from strangers, NaN.

After each fault: a clear sentence, no half file, nothing older destroyed, and a run that goes on as if nothing was.
The long form of the first test is benchmarks/kill.py, which kills one training twenty times.

Most tests train a network of two layers, so that a run takes a fraction of a second.
"""

import contextlib
import fcntl
import io
import json
import os
import pickle
import resource
import runpy
import shutil
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from benchmarks.kill import differences, finished_epochs, kill_at
from benchmarks.machine import write_result
from data.images import BadImage, decode
from losses import LOSSES
from models.backbone import build_model
from utils.checkpoint import (
    check_fit_optimizer,
    load_checkpoint,
    load_log,
    locked,
    save_checkpoint,
    save_log,
)
from utils.errors import UserError
from utils.features import Features, load_features, save_features
from utils.files import load_json, save_json, write_atomically
from utils.flags import DEFAULTS, FREE, SCORING, resumed_run
from utils.results import BEGIN, END, update

pytestmark = pytest.mark.filterwarnings("ignore:Market-1501 in")  # the tiny set has other counts, and says so
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def surroundings(small_network):
    """Every test trains the small network."""


def run(*flags):
    train.main([str(flag) for flag in flags])


def script(*argv):
    """A script as it is started from a shell, but in this process: (exit code, what it printed on stderr)."""
    error, before, show = io.StringIO(), sys.argv, warnings.showwarning
    sys.argv = [str(word) for word in argv]
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
        return 0, error.getvalue()
    except SystemExit as end:
        text = end.code if isinstance(end.code, str) else ""
        return (1 if text else end.code), error.getvalue() + text
    finally:
        sys.argv, warnings.showwarning = before, show


def replaced(flags, flag, value):
    return [value if before == flag else word for before, word in zip([None, *flags], flags, strict=False)]


def contents(folder):
    """Every file of a folder with its bytes, the lock aside."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


@contextlib.contextmanager
def file_size_limit(num_bytes):
    """A disk that is full after so many bytes: writing further fails in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Killed(BaseException):
    """Stands in for a process that ends at once."""


def run_killed_after(epochs, monkeypatch, *flags):
    """A run that ends at once after so many checkpoints."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        calls, save = [], train.save_checkpoint

        def dying_save(path, content):
            save(path, content)
            calls.append(path)
            if len(calls) == epochs:
                raise Killed

        patch.setattr(train, "save_checkpoint", dying_save)
        run(*flags)


@pytest.fixture(scope="module")
def whole(tiny_market, tmp_path_factory):
    """The run that nothing happens to, and its flags but for --run-dir. Three epochs of three steps."""
    from conftest import QUICK, small_models

    flags = ["--loss", "softmax+center", "--epochs", 3, "--eval-every", 1, "--dataset", "market", "--data-dir"]
    flags += [tiny_market, *QUICK, "--p", 4, "--k", 4]
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with warnings.catch_warnings(), small_models():
        warnings.simplefilter("ignore")
        run(*flags, "--run-dir", folder)
    return folder, flags


# -------------------------------------------------------------------------------------------------- a process that dies


def test_killed_three_times_and_resumed(whole, tmp_path, monkeypatch):
    """SIGKILL after a line of the log (the checkpoint is being written), after a checkpoint (in a step), and in the
    last scoring; other threads and cache each time. The network is the real one."""
    folder, run_dir = tmp_path / "whole", tmp_path / "run"
    monkeypatch.setattr(train, "build_model", build_model)
    flags = [*whole[1], "--epochs", 4]
    run(*flags, "--run-dir", folder)
    flags = [*flags, "--run-dir", run_dir]
    first = kill_at([*flags, "--cache", "off"], run_dir, 2, saved=False, delay=0)
    assert first["epochs_logged"] >= 2 and not first["has_result"]
    kept = first["epochs_kept"]
    second = kill_at([*flags, "--resume", "--workers", 3], run_dir, kept + 1, saved=True, delay=0.005)
    assert second["epochs_kept"] >= kept + 1
    third = kill_at([*flags, "--resume", "--workers", 0], run_dir, 4, saved=True, delay=0)
    assert third["epochs_kept"] == 4
    run(*flags, "--resume")
    assert differences(folder, run_dir) == []


def test_the_comparison_sees_one_bit(whole, tmp_path):
    """What the tests here rely on: a weight in the last place, a line of the log, a metric, a file too many."""
    folder, _ = whole

    def changed(change):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "copy")
        change(tmp_path / "copy")
        return differences(folder, tmp_path / "copy")

    def flip(copy):
        checkpoint = load_checkpoint(copy / "last.pt")
        checkpoint["model"]["conv1.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1
        save_checkpoint(copy / "last.pt", checkpoint)

    def edit(name):
        return lambda copy: (copy / name).write_text((copy / name).read_text().replace('"mAP": 0.', '"mAP": 1.', 1))

    assert changed(lambda copy: None) == []
    assert changed(flip) == ["last.pt: model conv1.weight"]
    assert changed(edit("log.jsonl")) == ["log.jsonl"]
    assert changed(edit("result.json")) == ["result.json"]
    assert "files" in changed(lambda copy: (copy / "x").touch())[0]


@pytest.mark.parametrize("moment", ["before writing", "half-way", "before fsync", "before renaming", "after renaming"])
def test_sigkill_while_a_file_is_written(tmp_path, monkeypatch, moment):
    """The file is the old one or the new one, whole; the lock of the next process removes the half one."""
    path = tmp_path / "last.pt"
    path.write_bytes(b"old" * 1000)
    child = os.fork()
    if not child:

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def write(file):
            if moment == "before writing":
                die()
            file.write(b"new" * 500)
            if moment == "half-way":
                file.flush()
                die()
            file.write(b"new" * 500)

        rename = os.replace
        if moment == "before fsync":
            os.fsync = die
        if moment == "before renaming":
            os.replace = die
        if moment == "after renaming":
            os.replace = lambda *names: (rename(*names), die())
        write_atomically(path, write)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == (b"new" if moment == "after renaming" else b"old") * 1000
    assert len(list(tmp_path.iterdir())) == (1 if moment == "after renaming" else 2)
    with locked(tmp_path):
        assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "last.pt"]


def send_at(monkeypatch, name, call, number=signal.SIGTERM):
    """This process gets a signal at the beginning of the n-th call of train.NAME."""
    function, calls = getattr(train, name), []

    def signalled(*args, **settings):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args, **settings)

    monkeypatch.setattr(train, name, signalled)


@pytest.mark.parametrize(
    "name, call, goes_on, kept",
    [
        ("save_log", 1, "from epoch 2", 1),  # the checkpoint is still written
        ("score_all", 2, "from epoch 3", 2),  # scoring after epoch 2: it ends, the epoch is kept
        ("save_checkpoint", 3, "with the scoring", 3),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_sentence(whole, tmp_path, monkeypatch, capsys, name, call, goes_on, kept, number):
    folder, flags = whole
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        send_at(patch, name, call, number)
        run(*flags, "--run-dir", run_dir)
    assert stopped.value.code == 128 + number
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert sentence == f"stopped by {number.name}: --resume --run-dir {run_dir} goes on {goes_on}"
    assert finished_epochs(run_dir) == kept
    if number == signal.SIGTERM:
        run("--resume", "--run-dir", run_dir)
        assert differences(folder, run_dir) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_the_last_step_and_the_scoring(whole, tmp_path, monkeypatch, capsys, number):
    """In the instant in which the handlers are changed: it is not lost."""
    folder, flags = whole
    run_dir, set_handler = tmp_path / "run", signal.signal

    def late(which, handler):
        if handler is train.interrupt and which == number:
            os.kill(os.getpid(), number)
        return set_handler(which, handler)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train.signal, "signal", late)
        run(*flags, "--run-dir", run_dir)
    assert stopped.value.code == 128 + number and not (run_dir / "result.json").exists()
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"--resume --run-dir {run_dir} goes on with the scoring")
    run("--resume", "--run-dir", run_dir)
    assert differences(folder, run_dir) == []


def test_a_signal_or_a_kill_loses_what_was_not_saved(whole, tmp_path, monkeypatch, capsys):
    """With an hour between two saves: a signal within epoch 2 goes on from the beginning; one after an epoch saves."""
    folder, flags = whole
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        send_at(patch, "backward_step", 5)
        run(*flags, "--save-every", 3600, "--run-dir", run_dir)
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert sentence == f"stopped by SIGTERM: --resume --run-dir {run_dir} goes on from epoch 1"
    assert finished_epochs(run_dir) == 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        send_at(patch, "save_log", 2)
        run("--resume", "--run-dir", run_dir)
    assert capsys.readouterr().out.splitlines()[-1].endswith("goes on from epoch 3")
    run("--resume", "--run-dir", run_dir, "--save-every", 0)
    assert "going on after epoch 2 of 3" in capsys.readouterr().out
    assert contents(folder)["log.jsonl"].count(b"\n") == contents(run_dir)["log.jsonl"].count(b"\n") == 3
    assert [name for name in differences(folder, run_dir) if name.startswith("last.pt:")] == []


def test_a_signal_before_the_first_step_and_in_the_last_scoring(whole, tmp_path, monkeypatch):
    """Nothing waits for a step there: it ends at once, with a sentence, and --resume goes on."""
    folder, flags = whole
    run_dir = tmp_path / "run"
    decode = train.TrainingImages._fill
    with monkeypatch.context() as patch:
        patch.setattr(train.TrainingImages, "_fill", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        code, error = script("train.py", *flags, "--run-dir", run_dir)
    assert decode is train.TrainingImages._fill
    assert code == 143 and error.splitlines()[-1].startswith("train.py: stopped") and not run_dir.exists()

    run_killed_after(3, monkeypatch, *flags, "--run-dir", run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "embed", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        code, error = script("train.py", "--resume", "--run-dir", run_dir)
    assert code == 143 and "--resume goes on" in error.splitlines()[-1] and not (run_dir / "result.json").exists()
    run("--resume", "--run-dir", run_dir)
    assert differences(folder, run_dir) == []


# ------------------------------------------------------------------------------------------ disks and folders that fail


@pytest.mark.parametrize("fails", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("kind", ["checkpoint", "json", "log", "README", "benchmark"])
def test_a_failed_write_keeps_the_file_before(tmp_path, monkeypatch, fails, kind):
    """No space left on the device, at each step of writing: one sentence with the path, no half file."""
    save, old, new = {
        "checkpoint": (save_checkpoint, {"a": torch.zeros(3)}, {"a": torch.ones(100_000)}),
        "json": (save_json, {"a": 0}, {"a": "1" * 100_000}),
        "log": (save_log, [{"epoch": 1}], [{"epoch": 1}, {"epoch": 2, "a": "1" * 100_000}]),
        "README": (update, "old", "new" * 100_000),
        "benchmark": (lambda path, rows: write_result("speed", rows, "x", path.parent), {"a": 0}, {"a": [1] * 100_000}),
    }[kind]
    path = tmp_path / ("speed_x.json" if kind == "benchmark" else "file")
    if kind == "README":
        path.write_text(f"# Title\n{BEGIN}\n{END}\n")
    save(path, old)
    before = contents(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if fails == "open":
            patch.setattr("builtins.open", full)
        elif fails != "write":
            patch.setattr(os, fails, full)
        limit = file_size_limit(50_000) if fails == "write" else contextlib.nullcontext()
        with limit, pytest.raises(OSError, match="could not be written") as caught:
            save(path, new)
    reason = "File too large" if fails == "write" else "No space left on device"
    assert str(caught.value) == f"{path} could not be written ({reason}); what was there before is kept"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("size, name", [(60_000, "last.pt"), (500, "log.jsonl")])
def test_a_disk_that_fills_up_while_training(whole, tmp_path, monkeypatch, size, name):
    """In the second epoch; the first one's checkpoint stays as it is, and after making room the run goes on."""
    folder, flags = whole
    run_dir = tmp_path / "run"
    run_killed_after(1, monkeypatch, *flags, "--run-dir", run_dir)
    before = contents(run_dir)
    with file_size_limit(size):
        code, error = script("train.py", "--resume", "--run-dir", run_dir)
    assert code == 1 and len(error.splitlines()) <= 2  # the warning about the counts of the tiny set is the other line
    assert error.endswith(f"train.py: {run_dir / name} could not be written (File too large); "
                          "what was there before is kept")  # fmt: skip
    after = contents(run_dir)
    assert after.keys() == before.keys() and after["last.pt"] == before["last.pt"]
    run("--resume", "--run-dir", run_dir)
    assert differences(folder, run_dir) == []


@pytest.mark.parametrize("name", ["features.npz", "features"])
def test_a_disk_that_fills_up_while_features_are_saved(tmp_path, name):
    numbers = np.zeros((100, 100), np.float32), np.arange(100), np.arange(100)
    with file_size_limit(10_000), pytest.raises(OSError, match=f"{name} could not be written"):
        save_features(tmp_path / name, Features(*numbers, *numbers))
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_made(whole, tmp_path, monkeypatch):
    """Said before the images are decoded."""
    _, flags = whole
    (tmp_path / "file").write_text("older")
    monkeypatch.setattr(train, "load_datasets", None)  # never reached
    for place in (tmp_path / "file" / "run", tmp_path / "file" / "deeper" / "run"):
        with pytest.raises(ValueError, match=f"since {tmp_path / 'file'} is a file"):
            run(*flags, "--run-dir", place)
    with pytest.raises(ValueError, match="since .*file is a file"):
        run(*flags, "--run-dir", tmp_path / "file", "--resume")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # a read-only disk
    with pytest.raises(ValueError, match="does not allow it: name another --run-dir"):
        run(*flags, "--run-dir", tmp_path / "new" / "run")
    assert contents(tmp_path) == {"file": b"older"} and len(list(tmp_path.iterdir())) == 1


def test_a_run_folder_that_vanishes_while_training(whole, tmp_path, monkeypatch):
    _, flags = whole
    monkeypatch.setattr(train, "score_all", lambda *_, **__: shutil.rmtree(tmp_path / "run") or {})
    with pytest.raises(OSError, match=r"log.jsonl could not be written \(No such file or directory\)"):
        run(*flags, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_features_are_not_overwritten_and_that_is_said_first(whole, tmp_path, capsys):
    folder, _ = whole
    (tmp_path / "old.npz").write_text("older")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--run", str(folder), "--save-features", str(tmp_path / "old.npz")])
    assert stopped.value.code == 2 and "old.npz exists" in capsys.readouterr().err
    assert contents(tmp_path) == {"old.npz": b"older"}


def test_two_processes_begin_in_one_folder_at_once(whole, tmp_path, monkeypatch):
    """Both found no folder; the second one, after decoding, leaves the first one's run alone."""
    folder, flags = whole
    run_dir = tmp_path / "run"
    load, calls = train.load_datasets, []

    def overtaken(*args, **settings):
        if not calls:
            calls.append(1)
            run(*flags, "--run-dir", run_dir)
        return load(*args, **settings)

    monkeypatch.setattr(train, "load_datasets", overtaken)
    with pytest.raises(ValueError, match="was begun by another process meanwhile"):
        run(*flags, "--run-dir", run_dir)
    assert differences(folder, run_dir) == []


def test_a_second_process_changes_nothing(whole, tmp_path, monkeypatch):
    _, flags = whole
    run_dir = tmp_path / "run"
    run_killed_after(1, monkeypatch, *flags, "--run-dir", run_dir)
    (run_dir / ".last.pt.1.tmp").write_text("the other process is writing")
    before = contents(run_dir)
    with locked(tmp_path / "other"), pytest.raises(ValueError, match="in use"):
        with locked(tmp_path / "other"):
            pass
    held = os.open(run_dir / ".lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="is in use by another process: wait, or choose another --run-dir"):
        run("--resume", "--run-dir", run_dir)
    os.close(held)
    assert contents(run_dir) == before


# --------------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def market(tiny_market, tmp_path):
    """A copy of the tiny data set to break."""
    return Path(shutil.copytree(tiny_market, tmp_path / "market"))


def with_data(flags, root, *more):
    return [*replaced(flags, "--data-dir", root), *more]


def bad_images(folder):
    """Seven files that are no images, under names of identity 1; returns their paths."""
    whole = next(folder.glob("0001_*.png")).read_bytes()
    paths = [folder / f"0001_c1s1_9{number:05}_00.{ending}" for number, ending in enumerate(["png"] * 6 + ["jpg"])]
    cut, empty, text, linked, giant, noise, half = paths
    cut.write_bytes(whole[: len(whole) // 2])
    empty.write_bytes(b"")
    text.write_text("<html>404</html>")
    linked.symlink_to("nowhere")
    Image.new("1", (13400, 13400)).save(giant)
    noise.write_bytes(whole[:40] + np.random.default_rng(0).bytes(len(whole) - 40))
    Image.new("RGB", (64, 128), "red").save(half, quality=95)
    half.write_bytes(half.read_bytes()[:-200])
    return paths


def unusual_images(folder):
    """Nine files that are images all the same: 1x1, grey, transparent, CMYK, 16 bits, turned, of another format."""
    grey = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [
        ("png", Image.new("RGB", (1, 1)), {}),
        ("png", grey, {}),
        ("png", grey.convert("RGBA"), {}),
        ("png", Image.fromarray(np.full((20, 10), 999, np.uint16)), {}),
        ("png", Image.new("P", (9, 9)), {}),
        ("jpg", Image.new("CMYK", (9, 9)), {}),
        ("jpg", Image.new("RGB", (9, 20)), {"exif": exif}),
        ("jpg", Image.new("RGB", (9, 20)), {"format": "PNG"}),
        ("png", Image.new("RGB", (9, 20)), {"format": "WEBP"}),
    ]
    for number, (ending, image, options) in enumerate(images):
        image.save(folder / f"0002_c1s1_9{number:05}_00.{ending}", **options)


def test_the_first_bad_training_image_stops_the_run_with_its_path(whole, market, tmp_path):
    first, *others = bad_images(market / "bounding_box_train")
    flags = with_data(whole[1], market, "--run-dir", tmp_path / "run")
    code, error = script("train.py", *flags)
    assert code == 1 and error.splitlines()[-1].startswith(f"train.py: {first} can't be read as an image: ")
    assert not (tmp_path / "run").exists()
    for path in others:
        path.unlink()
    with pytest.raises(BadImage, match=str(first)):  # when it is drawn
        run(*flags, "--epochs", 20, "--cache", "off")


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_bad_training_images_are_skipped_on_request(whole, market, tmp_path, capsys, cache):
    """The numbers are those of a data set without them: bit for bit the same run. Unusual images are trained on."""
    unusual_images(market / "bounding_box_train")
    flags = with_data(whole[1], market, "--epochs", 1, "--skip-bad-images")
    run(*flags, "--run-dir", tmp_path / "clean")
    assert "\n0 of 63 training images are bad and skipped" in "\n" + capsys.readouterr().out
    bad = bad_images(market / "bounding_box_train")
    run(*flags, "--run-dir", tmp_path / "run", "--cache", cache)
    out = capsys.readouterr().out
    assert "7 of 70 training images are bad and skipped" in out and "63 training images of 6 identities" in out
    skipped = [line for line in out.splitlines() if line.startswith("skipped: ")]
    assert all(line.startswith(f"skipped: {path}") for path, line in zip(bad, skipped, strict=True))
    assert differences(tmp_path / "clean", tmp_path / "run") == []


def test_formats_that_no_photograph_comes_in_are_never_opened(tmp_path, monkeypatch):
    """By their content, whatever the suffix. Pillow would hand PostScript to another program."""
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *words, **_: started.append(words))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 20\n%%EndComments\nshowpage\n")
    Image.new("RGB", (9, 20)).save(tmp_path / "b.jpg", format="TIFF")
    Image.new("RGB", (9, 20)).save(tmp_path / "c.png", format="PPM")
    for name in ("a.jpg", "b.jpg", "c.png"):
        with pytest.raises(BadImage, match=f"{name} can't be read as an image: it is no JPEG, PNG"):
            decode(tmp_path / name, [(8, 4)])
    assert not started


def test_only_bad_images(whole, market, tmp_path):
    for path in (market / "bounding_box_train").iterdir():
        path.write_bytes(b"")
    flags = with_data(whole[1], market, "--run-dir", tmp_path / "run", "--skip-bad-images")
    with pytest.raises(ValueError, match="as many in training, but there are 0"):
        run(*flags)


def test_a_bad_test_image_stops_the_scoring_and_the_training_is_kept(whole, market, tmp_path):
    folder, flags = whole
    flags = with_data(flags, market, "--run-dir", tmp_path / "run")
    image = sorted((market / "query").iterdir())[7]
    good = image.read_bytes()
    image.write_bytes(good[:50])
    flags = replaced(flags, "--eval-every", 0)
    with pytest.raises(BadImage, match=str(image)):
        run(*flags, "--skip-bad-images")  # of training: a score without a query would be another score
    assert finished_epochs(tmp_path / "run") == 3 and not (tmp_path / "run" / "result.json").exists()
    image.write_bytes(good)
    run("--resume", "--run-dir", tmp_path / "run")
    a, b = (load_json(path / "result.json") for path in (folder, tmp_path / "run"))
    assert a["mAP"] == b["mAP"]


def test_an_image_that_vanishes_while_training(whole, market, tmp_path, monkeypatch):
    """Without a cache, after the first epoch; put back, the run goes on as if nothing had been."""
    folder, flags = whole
    flags = with_data(flags, market, "--run-dir", tmp_path / "run", "--cache", "off")
    image = sorted((market / "bounding_box_train").iterdir())[20]
    good, save = image.read_bytes(), train.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(BadImage, match=f"{image}.*No such file"):
        patch.setattr(train, "save_checkpoint", lambda *content: (save(*content), image.unlink(missing_ok=True)))
        run(*flags)
    kept = finished_epochs(tmp_path / "run")
    assert kept in (1, 2)  # as soon as it is drawn
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="began with other training images"):
        run("--resume", "--run-dir", tmp_path / "run")
    assert contents(tmp_path / "run") == before
    image.write_bytes(good)
    run("--resume", "--run-dir", tmp_path / "run")
    assert differences(folder, tmp_path / "run") == []


def test_a_file_name_that_is_no_text(whole, market, tmp_path):
    """Bytes that are no UTF-8: named in the message, trained on where the image is good."""
    name = os.fsdecode(b"0001_c1s1_900000_\xff.png")
    shutil.copy(next((market / "bounding_box_train").iterdir()), market / "bounding_box_train" / name)
    (market / "bounding_box_train" / name.replace("9", "8")).write_bytes(b"")
    flags = with_data(whole[1], market, "--run-dir", tmp_path / "run", "--epochs", 1)
    code, error = script("train.py", *flags)
    assert code == 1 and "0001_c1s1_800000_" in error and "can't be read as an image" in error
    assert script("train.py", *flags, "--skip-bad-images")[0] == 0
    untrained = with_data(whole[1], market, "--run-dir", tmp_path / "untrained", "--epochs", 0)
    assert script("train.py", *untrained)[0] == 0  # nothing is trained, so nothing of it is decoded


# ------------------------------------------------------------------------------------------------- files from strangers


class Evil:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def write_evil(path, kind, marker):
    if kind == "a bare pickle":
        path.write_bytes(pickle.dumps({"model": Evil(marker), "epoch": 1}, protocol=2))
    elif kind == "in a zip file of torch":
        torch.save({"model": {"a": torch.zeros(1)}, "loss": {}, "epoch": 1, "args": Evil(marker)}, path)
    else:
        torch.save({"model": {"a": Evil(marker)}, "loss": {}}, path, _use_new_zipfile_serialization=False)


def test_the_malicious_pickles_are_real(tmp_path):
    """Read without care, they do run their code: else the tests below would show nothing."""
    for number, kind in enumerate(EVIL):
        write_evil(tmp_path / "file", kind, tmp_path / f"marker{number}")
        with contextlib.suppress(RuntimeError):  # "corrupt file", too late
            torch.load(tmp_path / "file", weights_only=False)
        assert (tmp_path / f"marker{number}").exists()


EVIL = ["a bare pickle", "in a zip file of torch", "in an old file of torch"]


@pytest.mark.parametrize("kind", EVIL)
def test_no_code_of_a_checkpoint_runs(whole, tmp_path, kind):
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (folder / "result.json").unlink()
    write_evil(folder / "last.pt", kind, tmp_path / "marker")
    before = contents(folder)
    for flags in (["train.py", "--resume", "--run-dir", folder], ["evaluate.py", "--run", folder, "--device", "cpu"]):
        code, error = script(*flags)
        sentence = error.splitlines()[-1]
        assert code == 1 and f"{folder / 'last.pt'} was refused: it is not a whole checkpoint" in sentence
    assert contents(folder) == before and not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", EVIL)
def test_no_code_of_a_weights_file_runs(whole, tmp_path, kind):
    write_evil(tmp_path / "weights.pth", kind, tmp_path / "marker")
    flags = [flag for flag in whole[1] if flag not in ("--weights", "none")]
    code, error = script("train.py", *flags, "--weights", tmp_path / "weights.pth", "--run-dir", tmp_path / "run")
    assert code == 1 and "weights.pth is no file of plain tensors" in error.splitlines()[-1]
    assert not (tmp_path / "marker").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("layout", ["npz", "npy in a folder", "a bare npy", "a bare pickle"])
def test_no_code_of_a_features_file_runs(tmp_path, layout):
    objects = np.array([Evil(tmp_path / "marker")], dtype=object)
    path = tmp_path / ("features" if layout == "npy in a folder" else "features.npz")
    arrays = {name: objects for name in Features._fields}
    if layout == "npz":
        np.savez(path, **arrays)
    elif layout == "npy in a folder":
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    elif layout == "a bare npy":
        with open(path, "wb") as file:
            np.save(file, objects)
    else:
        path.write_bytes(pickle.dumps(Evil(tmp_path / "marker")))
    (tmp_path / "marker").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="pickled objects are refused|holds a single array"):
        load_features(path)
    code, error = script("evaluate.py", "--features", path)
    assert code == 1 and len(error.splitlines()) == 1 and not (tmp_path / "marker").exists()


def test_imagenet_weights_are_read_as_plain_tensors_too(monkeypatch):
    """torch's own download does not ask for that by itself."""
    import torchvision

    asked = {}

    def download(url, **settings):
        asked.update(settings)
        raise EOFError

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", download)
    with pytest.raises(ValueError, match="could not be downloaded.*--weights FILE"):
        build_model("resnet18", "imagenet")
    assert asked["weights_only"] is True and asked["check_hash"] is True


@pytest.fixture(scope="module")
def after_one_epoch(whole, tmp_path_factory):
    from conftest import small_models

    folder = tmp_path_factory.mktemp("runs") / "half"
    with warnings.catch_warnings(), small_models(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        run_killed_after(1, patch, *whole[1], "--run-dir", folder)
    return folder


@pytest.fixture
def half_way(after_one_epoch, tmp_path):
    """A run folder after the first of three epochs."""
    return Path(shutil.copytree(after_one_epoch, tmp_path / "run"))


def edit_args(run_dir, change):
    """Changes args.json and the copy of the flags in last.pt alike."""
    args = change(load_json(run_dir / "args.json"))
    save_json(run_dir / "args.json", args)
    checkpoint = load_checkpoint(run_dir / "last.pt")
    save_checkpoint(run_dir / "last.pt", {**checkpoint, "args": json.dumps(args)})


def test_flags_that_an_older_run_lacks_take_their_defaults(half_way, whole):
    """Those that came later: the run goes on, and is scored, as if they had been there."""
    later = ("tf32", "deterministic", "compile", "synthetic_seed", "split_seed", "save_every", "metric", "eval_on")
    assert {*later} <= DEFAULTS.keys()
    edit_args(half_way, lambda args: {key: value for key, value in args.items() if key not in later})
    model, args = evaluate.load_run(half_way, torch.device("cpu"))
    assert all(args[key] == DEFAULTS[key] for key in later) and not model.training
    run("--resume", "--run-dir", half_way)
    evaluate.main(["--run", str(half_way), "--device", "cpu"])
    assert [name for name in differences(whole[0], half_way) if name.startswith("last.pt:")] == []


def test_what_a_resumed_run_may_change(half_way, whole, tiny_market, tmp_path):
    """Where the data lie, workers, cache, device, how often it is scored and saved, and how it is scored."""
    moved = shutil.copytree(tiny_market, tmp_path / "elsewhere")
    changed = {"data_dir": str(moved), "workers": 3, "cache": "off", "device": "cpu", "eval_every": 2,
               "save_every": 9.0, "metric": "euclidean", "ignore_cameras": True}  # fmt: skip
    assert changed.keys() <= {*FREE, *SCORING}
    flags = [word for key, value in changed.items() for word in
             (f"--{key.replace('_', '-')}", *([] if value is True else [value]))]  # fmt: skip
    run("--resume", "--run-dir", half_way, *flags)
    result = load_json(half_way / "result.json")
    assert {key: result["args"][key] for key in changed} == changed
    assert load_json(half_way / "args.json")["metric"] == "euclidean"  # evaluate.py goes by it, too
    assert [name for name in differences(whole[0], half_way) if name.startswith("last.pt:")] == []
    before = load_json(whole[0] / "result.json")
    assert result["mAP"] != before["mAP"] and result["log"][0]["mAP"] == before["log"][0]["mAP"]


def test_a_resumed_run_keeps_where_its_images_lie_now(half_way, tiny_market, tmp_path):
    """The next command finds them there, without --data-dir."""
    moved = str(shutil.copytree(tiny_market, tmp_path / "elsewhere"))
    run("--resume", "--run-dir", half_way, "--data-dir", moved)
    assert load_json(half_way / "args.json")["data_dir"] == moved


@pytest.mark.parametrize("key", [key for key in DEFAULTS if key not in (*FREE, *SCORING)])
def test_what_a_resumed_run_may_not_change(half_way, key):
    """Everything else: said with the value before. The value that it began with may be typed again."""
    before = load_json(half_way / "args.json")
    value = before["explicit"].get(key, before[key])
    assert resumed_run(half_way, {key: value})[key] == before[key]
    with pytest.raises(ValueError, match=f"began with --{key.replace('_', '-')} .*, not other: leave it out"):
        resumed_run(half_way, {key: "other"})


def test_another_device_is_said(half_way, capsys):
    """As it would be on a GPU: the run began elsewhere."""
    edit_args(half_way, lambda args: args | {"environment": {**args["environment"], "device": "cuda (a card)"}})
    run("--resume", "--run-dir", half_way, "--device", "cpu")
    out = capsys.readouterr().out
    assert "began with device cuda (a card) and goes on with device cpu" in out and "not bit for bit" in out


def refused(run_dir):
    """The sentence with which --resume refuses last.pt; nothing in the folder may change."""
    before = contents(run_dir)
    with pytest.raises(ValueError) as caught:
        run("--resume", "--run-dir", run_dir)
    assert contents(run_dir) == before
    return str(caught.value)


def test_a_frozen_parameter_has_no_state_and_fits(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    check_fit_optimizer(tmp_path, optimizer.state_dict(), optimizer)
    state = optimizer.state_dict()
    state["state"][2]["exp_avg"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"2.exp_avg is .*\(3,\)"):
        check_fit_optimizer(tmp_path, state, optimizer)


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(half_way, whole, tiny_market, tmp_path, monkeypatch):
    """Another loss (of the same shapes, too), architecture, size of image; then another number of identities."""
    for flag, value, sentence in [
        ("--loss", "softmax+triplet", "its loss is softmax+triplet, not softmax+0.0005*center"),
        ("--arch", "resnet34", "its arch is resnet34, not resnet18"),
        ("--height", "48", "its height is 48, not 32"),
    ]:
        run_killed_after(1, monkeypatch, *replaced(whole[1], flag, value), "--run-dir", tmp_path / value)
        shutil.copy(tmp_path / value / "last.pt", half_way / "last.pt")
        assert f"last.pt belongs to another run than args.json: {sentence}" in refused(half_way)
    fewer = Path(shutil.copytree(tiny_market, tmp_path / "market"))
    for image in (fewer / "bounding_box_train").glob("0006_*"):
        image.unlink()
    run_killed_after(1, monkeypatch, *replaced(whole[1], "--data-dir", fewer), "--run-dir", tmp_path / "fewer")
    shutil.copy(tmp_path / "fewer" / "last.pt", half_way / "last.pt")
    assert "its num_classes is 5, not 6" in refused(half_way)


def test_losses_whose_weights_look_alike_are_told_apart(whole, tmp_path, monkeypatch):
    """CosFace and ArcFace both have one weight (C, D)."""
    for loss in ("cosface", "arcface"):
        run_killed_after(1, monkeypatch, *replaced(whole[1], "--loss", loss), "--run-dir", tmp_path / loss)
    shutil.copy(tmp_path / "cosface" / "last.pt", tmp_path / "arcface" / "last.pt")
    assert "its loss is cosface, not arcface" in refused(tmp_path / "arcface")
    code, error = script("evaluate.py", "--run", tmp_path / "arcface", "--device", "cpu")
    assert code == 1 and "its loss is cosface, not arcface" in error


def edited(change, *keys):
    """Replaces checkpoint[key][key]... by what `change` makes of it; None: removes it."""

    def edit(path):
        place = root = {"": load_checkpoint(path)}
        for key in ("", *keys[:-1]) if keys else ():
            place = place[key]
        last = keys[-1] if keys else ""
        place[last] = change(place.get(last))
        if place[last] is None:
            del place[last]
        torch.save(root[""], path)

    return edit


def becomes(value, *keys):
    return edited(lambda _: value, *keys)


@pytest.mark.parametrize(
    "edit, sentence",
    [
        (lambda path: path.write_bytes(b""), "was refused: it is not a whole checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:10_000]), "was refused: it is not a whole checkpoint"),
        (edited(lambda c: c["model"]), "model, loss, epoch, args missing"),
        (becomes(None, "epoch"), "epoch missing"),
        (becomes("1", "epoch"), "its epoch is no whole number"),
        (becomes(-1, "epoch"), "its epoch is no whole number"),
        (becomes(4, "epoch"), "its epoch is 4 of 3"),
        (becomes(2, "epoch"), "log.jsonl does not hold the epochs 1 to 2"),
        (becomes("{", "args"), "its args are not the flags of a run"),
        (becomes(torch.zeros(1), "args"), "its args are not the flags of a run"),
        (becomes([], "model"), "its model is not a state dict"),
        (becomes(None, "model", "conv1.weight"), "in its model, conv1.weight is missing"),
        (becomes(torch.zeros(2), "model", "fc.weight"), "fc.weight is unknown here"),
        (becomes("x", "model", 3), "3 is unknown here"),
        (becomes(torch.zeros(65), "model", "bn1.bias"), "bn1.bias is float32 (65,) instead of float32 (64,)"),
        (becomes(torch.zeros(64, dtype=torch.complex64), "model", "bn1.bias"), "bn1.bias is complex64 (64,)"),
        (becomes(torch.zeros(64, device="meta"), "model", "bn1.bias"), "bn1.bias is empty float32 (64,)"),
        (becomes(torch.zeros(64).to_sparse(), "model", "bn1.bias"), "bn1.bias is sparse float32 (64,)"),
        (becomes("text", "model", "bn1.bias"), "bn1.bias is no tensor but str"),
        (becomes(torch.zeros(7, 64), "loss", "softmax.weight"),
         "of another arch, loss or number of identities: in its loss, softmax.weight is float32 (7, 64) instead of"),
        (becomes(None, "optimizer"), "its optimizer is not a state of Adam"),
        (becomes({"state": [], "param_groups": []}, "optimizer"), "its optimizer is not a state of Adam"),
        (becomes(None, "optimizer", "state", 0), "in its optimizer, 0.exp_avg is missing"),
        (becomes(torch.zeros(2), "optimizer", "state", 0, "exp_avg"), "0.exp_avg is float32 (2,) instead of"),
        (edited(lambda groups: groups[:1], "optimizer", "param_groups"), "other settings or groups of parameters"),
        (edited(lambda groups: [{**g, "weight_decay": 0.1} for g in groups], "optimizer", "param_groups"),
         "other settings or groups of parameters"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_the_runs_own_is_refused(half_way, edit, sentence):
    edit(half_way / "last.pt")
    assert sentence in refused(half_way)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "was not written by this version of train.py: it lacks dataset, environment"),
        (b"\xff\xfe", "is not valid JSON"),
    ],
)
def test_broken_flags_of_a_run(half_way, content, sentence):
    (half_way / "args.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = contents(half_way)
    code, error = script("train.py", "--resume", "--run-dir", half_way)
    assert code == 2 and sentence in error.splitlines()[-1] and contents(half_way) == before
    with pytest.raises(ValueError, match="args.json is not valid|does not hold|was not written by"):
        evaluate.main(["--run", str(half_way)])


@pytest.mark.parametrize("lines", [None, "", '{"epoch": 2}\n', '{"epo', "[]\n", "1\n"])
def test_a_log_that_lost_lines(half_way, lines):
    """The lines of finished epochs are part of the result: without them there would be a hole in it."""
    (half_way / "log.jsonl").unlink() if lines is None else (half_way / "log.jsonl").write_text(lines)
    assert "log.jsonl does not hold the epochs 1 to 1 of last.pt: start another run" in refused(half_way)


def test_lines_of_an_epoch_without_a_checkpoint_are_cut_off(tmp_path):
    save_log(tmp_path / "log.jsonl", [{"epoch": 1}, {"epoch": 2}])
    assert load_log(tmp_path / "log.jsonl", 1) == [{"epoch": 1}] and load_log(tmp_path / "log.jsonl", 0) == []


def test_a_result_without_metrics_and_a_folder_that_is_no_run(whole, tmp_path):
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    save_json(folder / "result.json", {"mAP": 0.5})
    assert "result.json was not written by this version" in refused(folder)
    with pytest.raises(ValueError, match="is not a run folder: it has no args.json"):
        evaluate.main(["--run", str(tmp_path)])
    (folder / "last.pt").unlink()
    with pytest.raises(FileNotFoundError, match="last.pt: no such checkpoint"):
        evaluate.main(["--run", str(folder)])


@pytest.mark.parametrize(
    "content, sentence",
    [
        ([1, 2], "holds no state dict"),
        ({1: torch.zeros(1)}, "holds no state dict"),
        ({"conv1.weight": "text"}, "holds no state dict"),
        ({"bn1.bias": torch.full((64,), float("nan"))}, "bn1.bias holds no finite numbers"),
        ({"bn1.bias": torch.zeros(64, dtype=torch.complex64)}, "bn1.bias holds no finite numbers"),
        ({"bn1.bias": torch.zeros(64, device="meta")}, "bn1.bias holds no finite numbers"),
        ({"bn1.bias": torch.zeros(64).to_sparse()}, "bn1.bias holds no finite numbers"),
        ({"bn1.bias": torch.zeros(65)}, "bn1.bias has shape (65,) instead of (64,)"),
        ({"module.bn1.bias": torch.zeros(64)}, "bn1.bias is there twice"),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence(tmp_path, content, sentence):
    if "bias" in sentence:  # in an otherwise whole state
        content = {**build_model("resnet18").state_dict(), **content}
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError) as caught:
        build_model("resnet18", str(tmp_path / "weights.pth"))
    assert sentence in str(caught.value) and len(str(caught.value).splitlines()) == 1


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("amp", [[], ["--amp"]])
@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_and_the_epoch_before_is_kept(whole, tmp_path, monkeypatch, what, step, amp):
    """In the second epoch. A gradient of its last step is told by no later loss, but by the weights before a save."""
    build = train.build_loss

    def build_failing(*args):
        loss_fn, calls = build(*args), []
        forward = loss_fn.forward

        def failing(embeddings, labels):
            calls.append(1)
            loss = forward(embeddings, labels)
            if len(calls) != 3 + step:
                return loss
            return loss * float("inf") if what == "loss" else loss + (embeddings.sum() * 0).sqrt()

        loss_fn.forward = failing
        return loss_fn

    monkeypatch.setattr(train, "build_loss", build_failing)
    with pytest.raises(FloatingPointError) as caught:
        run(*replaced(whole[1], "--eval-every", 0), "--run-dir", tmp_path / "run", *amp)
    if what == "gradient" and step == 3:
        assert str(caught.value) == "the weights are not finite after epoch 2: they were not saved"
    else:
        assert "the loss is not finite at epoch 2, step 1 to 3: try a smaller --lr" in str(caught.value)
        assert "keeps the state after epoch 1" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert finished_epochs(tmp_path / "run") == 1
    assert sorted(contents(tmp_path / "run")) == ["args.json", "last.pt", "log.jsonl"]


def test_workers_cache_and_threads_change_no_batch(whole, tmp_path, monkeypatch):
    """The same images in the same batches with the same pixels; with one thread of torch the same weights, too."""
    folder, flags = whole
    batches = train.TrainingImages.batches
    seen = []

    def recorded(self, *args, **settings):
        for images in batches(self, *args, **settings):
            seen.append(images.clone())
            yield images

    monkeypatch.setattr(train.TrainingImages, "batches", recorded)
    first = None
    for number, (more, threads) in enumerate([
        (["--workers", 0], 1), (["--workers", 3], 1), (["--workers", 2, "--cache", "off"], 1), (["--workers", 2], 2),
    ]):  # fmt: skip
        torch.set_num_threads(threads)
        try:
            run(*flags, *more, "--run-dir", tmp_path / f"run{number}")
        finally:
            torch.set_num_threads(1)
        first = first or list(seen)
        assert len(seen) == 9 and all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))
        seen.clear()
        if threads == 1:
            assert differences(folder, tmp_path / f"run{number}") == []


@pytest.mark.parametrize("flag", [[], ["--deterministic"]])
def test_deterministic(whole, tmp_path, monkeypatch, flag):
    """The flag switches torch's own guard on, which refuses every operation whose bits may vary, for the whole run; and
    only the flag does."""
    seen, step = [], train.backward_step

    def look(*args, **settings):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return step(*args, **settings)

    monkeypatch.setattr(train, "backward_step", look)
    before = torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(not flag)
        run(*whole[1], *flag, "--run-dir", tmp_path / "run")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = before
    assert seen == [(bool(flag), not flag)] * 9


@pytest.mark.parametrize("device", ["", "gpu", "cuda:99", "cuda:-1", "meta", "hpu", "mps:3", "cpu:x"])
def test_a_device_that_is_not_there(whole, tmp_path, device):
    with pytest.raises(ValueError, match="can't be used here") as caught:
        run(*whole[1], "--device", device, "--run-dir", tmp_path / "run")
    assert "choose cpu" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()
    code, error = script("evaluate.py", "--run", whole[0], "--device", device)
    assert code == (1 if device else 0)  # "": the default
    assert "Traceback" not in error


def test_out_of_memory_on_the_device_is_one_sentence(whole, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr("torch.optim.Adam.step", full)
    code, error = script("train.py", *whole[1], "--run-dir", tmp_path / "run")
    assert code == 1 and error.splitlines()[-1].startswith("train.py: out of memory on the device: fewer images")
    monkeypatch.setattr("evaluate.embed", full)
    monkeypatch.setattr("data.images.stream_images", full)
    code, error = script("evaluate.py", "--run", whole[0], "--device", "cpu")
    assert code == 1 and error.splitlines()[-1].startswith("evaluate.py: out of memory on the device")


def test_less_memory_for_the_ranking_halves_its_blocks(whole, monkeypatch, capsys):
    """Said each time, down to blocks of 64; the numbers stay the same, and where even these are too large it ends."""
    rank, asked = evaluate.rank_queries, []

    def short_of_memory(*args, gallery_block=None, **settings):
        asked.append(gallery_block)
        if (gallery_block or 8192) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return rank(*args, gallery_block=gallery_block, **settings)

    monkeypatch.setattr(evaluate, "rank_queries", short_of_memory)
    limit = 1024
    evaluate.main(["--run", str(whole[0]), "--device", "cpu"])
    assert asked == [None, 4096, 2048, 1024]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("out of memory")]
    assert said == [f"out of memory: ranking again by blocks of {n} gallery images" for n in asked[1:]]
    found, result = (load_json(whole[0] / f"{name}.json") for name in ("evaluation_market_cosine", "result"))
    (whole[0] / "evaluation_market_cosine.json").unlink()
    assert all(found[key] == result[key] for key in evaluate.METRICS)
    asked.clear()
    limit = 1
    with pytest.raises(torch.OutOfMemoryError):
        evaluate.main(["--run", str(whole[0]), "--device", "cpu"])
    assert asked == [None, 4096, 2048, 1024, 512, 256, 128, 64]
    asked.clear()
    monkeypatch.setattr(evaluate, "rerank", lambda *args, block, **settings: short_of_memory(gallery_block=block))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate.main(["--run", str(whole[0]), "--device", "cpu", "--rerank"])
    assert asked == [None, 2048, 1024, 512, 256, 128, 64]  # it begins with 4096


# -------------------------------------------------------------------------------------------- faults of the user's code


def loss_that(raises):
    """A loss as someone may write it, with a fault in it."""

    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()

        def forward(self, embeddings, labels):
            raises(embeddings)

    return Mine


@pytest.mark.parametrize(
    "fault, words",
    [
        (lambda embeddings: int("mine"), "invalid literal for int"),
        (lambda embeddings: embeddings.view(-1, 7), "is invalid for input of size"),
        (lambda embeddings: torch.distributions.Normal(0.0, torch.tensor(-1.0)), "Expected parameter scale"),
    ],
    ids=["its own", "torch's", "torch's ValueError"],
)
def test_a_fault_in_ones_own_loss_keeps_its_traceback(whole, tmp_path, monkeypatch, fault, words):
    """One line without a place would be of no help; a user's wrong flag is one line."""
    monkeypatch.setitem(LOSSES, "mine", loss_that(fault))
    flags = replaced(whole[1], "--loss", "mine")
    with pytest.raises((ValueError, RuntimeError), match=words) as caught:
        script("train.py", *flags, "--run-dir", tmp_path / "run")
    assert not isinstance(caught.value, UserError)
    assert any("test_faults.py" in str(entry.path) for entry in caught.traceback[2:])
    code, error = script("train.py", *flags, "--run-dir", tmp_path / "other", "--p", 4, "--loss-args", "a=1")
    assert code == 2 and "mine: no arguments" in error.splitlines()[-1]


def test_json_has_no_nan(tmp_path):
    for save, content in [(save_json, {"mAP": float("nan")}), (save_log, [{"epoch": 1, "loss": float("inf")}])]:
        with pytest.raises(ValueError):
            save(tmp_path / "x", content)
    assert list(tmp_path.iterdir()) == []
    save_json(tmp_path / "x", {"mAP": 0.5})
    assert json.loads((tmp_path / "x").read_text()) == {"mAP": 0.5}
