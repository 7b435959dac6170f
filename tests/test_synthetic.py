"""Generated pedestrians: same seed, same pixels; Market's layout and proportions; near twins; only whole folders."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import synthetic as benchmark
from data import synthetic
from data.synthetic import DIGESTS, FOLDERS, RECORDED, TEST, TRAIN, digest, generate, people, tasks, versions
from data.synthetic.__main__ import contact_sheet, main
from data.synthetic.figures import Figure, Pose
from data.synthetic.people import TWIN_SHARE, near_twin, visible
from data.synthetic.scenes import CAMERAS, cameras, scene
from utils.flags import new_run
from utils.runs import describe

SEED_1_DIGESTS = ("1f4de4c9d4b1b244", "19a55b49799fc48e")  # with AVX-512, and without
NAME = re.compile(r"(-1|\d{4,})_c([1-6])s([1-6])_(\d{6})_(\d{2})\.jpg")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("small"), num_ids=4)


def test_layout(small):
    assert small.name == f"synthetic-v{synthetic.VERSION}-4"
    assert sorted(path.name for path in small.iterdir()) == sorted(FOLDERS)
    pids, cameras = {}, {}
    for folder in FOLDERS:
        names = [path.name for path in (small / folder).iterdir()]
        assert all(NAME.fullmatch(name) for name in names), names
        pids[folder] = {int(NAME.fullmatch(name)[1]) for name in names}
        cameras[folder] = Counter((int(NAME.fullmatch(name)[1]), NAME.fullmatch(name)[2]) for name in names)
    train, query, gallery = (pids[folder] for folder in FOLDERS)
    assert len(train) == len(query) == 4 and min(train | query) > 0
    assert not train & query
    assert gallery == query | {-1, 0}
    assert set(cameras["query"].values()) == {1}, "one query per person and camera"
    assert all(cameras["bounding_box_test"][key] for key in cameras["query"]), "and something to find beside it"
    assert all(len({cam for pid, cam in cameras["query"] if pid == one}) >= 2 for one in query)


def test_images(small):
    for path in small.rglob("*.jpg"):
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.size == (64, 128) and image.mode == "RGB"
            assert np.asarray(image).std() > 8, f"{path.name} shows nothing"


@pytest.mark.parametrize("num_ids", [150, 751])
def test_market_proportions(num_ids):
    names = [task.path for task in tasks(num_ids, seed=0)]
    assert len(set(names)) == len(names), "two images of one name"
    folders = Counter(name.split("/")[0] for name in names)
    junk = sum("/-1_" in name for name in names)
    distractors = sum("/0000_" in name for name in names)
    true = folders["bounding_box_test"] - junk - distractors
    share = num_ids / 751
    found = (folders["bounding_box_train"], folders["query"], true, distractors, junk)
    for count, market in zip(found, (12936, 3368, 13115, 2798, 3819), strict=True):
        tolerance = 0.04 if num_ids == 751 else 0.08
        assert abs(count / (market * share) - 1) < tolerance, (found, share)


def test_same_pixels_whatever_the_number_of_workers(small, tmp_path):
    three = generate(tmp_path, num_ids=4, workers=3)
    assert contents(three) == contents(small)


def test_drawn_pixels_are_the_recorded_ones():
    """Digests of the arrays, since JPEG encoders differ; recorded with one set of versions."""
    drawn = tasks(10, seed=0)[::3]
    assert {task.stream for task in drawn} == {0, 1, 2, 3} and {task.camera for task in drawn} == {1, 2, 3, 4, 5, 6}
    assert {task.path.split("/")[0] for task in drawn} == set(FOLDERS)
    if versions() != RECORDED:
        pytest.skip(f"the digest was recorded with {RECORDED}, here are {versions()}")
    assert digest() in DIGESTS
    assert digest(seed=1) in SEED_1_DIGESTS


def test_other_pixels_are_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "DIGESTS", ())
    with pytest.warns(UserWarning, match=rf"^some pixels .*\({RECORDED}\), and so will numbers") as said:
        folder = generate(tmp_path / "new", num_ids=2)
    assert len(said) == 1
    monkeypatch.setattr(synthetic, "DIGESTS", (digest(),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert contents(generate(tmp_path / "again", num_ids=2)) == contents(folder)
        monkeypatch.setattr(synthetic, "DIGESTS", ())
        assert generate(tmp_path / "new", num_ids=2) == folder  # it is there: nothing is drawn, nothing said


def test_another_seed_gives_other_people_and_cameras(small):
    other = generate(small.parent, num_ids=4, seed=1)
    assert other.name == f"{small.name}-seed1" and small.is_dir()
    assert not set(contents(other).values()) & set(contents(small).values())
    for stream in (TRAIN, TEST):
        seen = [{visible(person) for person in people(150, seed, stream)} for seed in (0, 1, 2)]
        assert max(len(a & b) for a, b in itertools.combinations(seen, 2)) < 5  # from one vocabulary: hardly any
    assert cameras(0) is CAMERAS
    for a, b in itertools.combinations((cameras(seed) for seed in (0, 1, 2)), 2):
        assert sorted(camera.scene for camera in a) == sorted(camera.scene for camera in b)
        for field in ("light", "red", "gamma", "blur", "pitch"):
            assert not {getattr(camera, field) for camera in a} & {getattr(camera, field) for camera in b}
    views = [np.stack([np.asarray(scene(c.scene, seed), float) for c in CAMERAS]) for seed in (0, 1)]
    assert abs(views[0] - views[1]).mean() > 10  # the grain alone: 4.5


@pytest.mark.parametrize("seed", [1, 2, 12345])
def test_cameras_of_another_seed_lie_between_the_extremes(seed):
    bounds = np.array([camera[1:-1] for camera in CAMERAS])
    drawn = np.array([camera[1:-1] for camera in cameras(seed)])
    assert (drawn >= bounds.min(axis=0)).all() and (drawn <= bounds.max(axis=0)).all()
    assert (drawn.std(axis=0) > 0.1 * bounds.std(axis=0)).all()
    assert {camera.seed for camera in cameras(seed)} == {seed}


@pytest.mark.parametrize("seed", [-1, 0.5])
def test_impossible_seed(tmp_path, seed):
    with pytest.raises(ValueError, match=f"seed of the generated pedestrians .* at least 0, not {seed}"):
        generate(tmp_path, num_ids=4, seed=seed)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no processor affinity")
def test_as_many_processes_as_this_one_may_use_processors(tmp_path, monkeypatch):
    """A container's share, not the machine's processors; a tiny set needs no other process."""
    started = []

    class Process(subprocess.Popen):
        def __init__(self, command, **options):
            started.append(command)
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    generate(tmp_path, num_ids=2)
    assert started == [] and len(tasks(2, 0)) < synthetic.FEW
    monkeypatch.setattr(synthetic, "FEW", len(tasks(4, 0)))
    monkeypatch.chdir(tmp_path)
    folder = generate("relative", num_ids=4)
    assert len(started) == 3 and len(contents(folder)) == len(tasks(4, 0))


def test_other_version_other_folder(small, monkeypatch):
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    new = generate(small.parent, num_ids=2)
    assert new.name == f"synthetic-v{synthetic.VERSION}-2" and new != small
    assert not (small.parent / f"synthetic-v{synthetic.VERSION}-4").exists()


def test_generated_once(small, monkeypatch):
    monkeypatch.setattr(synthetic, "render", lambda *_: pytest.fail("drawn again"))
    assert generate(small.parent, num_ids=4) == small


def test_everybody_is_somebody_else():
    for stream in (TRAIN, TEST):
        group = people(751, seed=0, stream=stream)
        assert len({visible(person) for person in group}) == 751
    assert set(people(150, 0, TRAIN)) != set(people(150, 0, TEST))


def test_near_twins_differ_in_one_detail():
    group = people(150, seed=0, stream=TRAIN)
    twins = int(150 * TWIN_SHARE / 2)
    assert twins >= 15
    details = set()
    for original, twin in zip(group, group[-twins:], strict=False):
        different = [name for name in original._fields if getattr(original, name) != getattr(twin, name)]
        assert len(different) == 1, different
        details.update(different)
        assert visible(original) != visible(twin)
    assert len(details) > 5, details


def test_hidden_details_make_no_twin():
    """Someone without a bag, in a plain T-shirt: no twin has another colour of the bag or of the pattern only."""
    rng = np.random.default_rng(0)
    person = people(1, 0, TRAIN)[0]._replace(
        bag="none", bag_colour="red", pattern="plain", top="t-shirt", top_colour="blue", second_colour="black"
    )
    for _ in range(200):
        twin = near_twin(person, rng)
        assert (twin.bag_colour, twin.second_colour) == ("red", "black")


def test_a_view_shows_what_it_should():
    """The same walker from in front and from behind: the chest print only in front, the backpack mostly behind."""
    plain = people(1, 0, TRAIN)[0]._replace(
        top="t-shirt", top_colour="white", second_colour="black", pattern="plain", bag="none", bag_colour="red",
        bottom="trousers", bottom_colour="black", hair="short", shoes="black",
    )  # fmt: skip

    def pixels(person, yaw):
        pose = Pose(size=0.9, yaw=yaw, phase=0.5, stride=0.5, x=64, ground=245)
        return np.asarray(Figure(person, pose, CAMERAS[0]).colour).astype(int)

    def changed(person, yaw):
        return int((pixels(person, yaw) != pixels(plain, yaw)).any(axis=2).sum())

    printed, packed = plain._replace(pattern="print"), plain._replace(bag="backpack")
    assert changed(printed, yaw=0.0) > 200 and changed(printed, yaw=np.pi) == 0
    assert changed(packed, yaw=np.pi) > 2 * changed(packed, yaw=0.0) > 0


@pytest.mark.parametrize("num_ids", [0, 1, -3, 2.5])
def test_too_few_people(tmp_path, num_ids):
    with pytest.raises(ValueError, match=f"number of generated identities .* at least 2, not {num_ids}"):
        generate(tmp_path, num_ids=num_ids)
    assert not list(tmp_path.iterdir())


def test_an_attempt_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail_late(*args, draw_tasks=synthetic.draw_tasks):
        for task in draw_tasks(*args):
            if task.path.startswith("query"):
                raise OSError("No space left on device")
            yield task

    monkeypatch.setattr(synthetic, "draw_tasks", fail_late)
    with pytest.raises(OSError, match="No space"):
        generate(tmp_path, num_ids=2)
    assert not list(tmp_path.iterdir())


def test_a_worker_that_fails_stops_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(OSError, match="could not be drawn"):
        generate(tmp_path, num_ids=2, workers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="kills by a signal")
def test_a_killed_attempt_is_not_taken_for_a_whole_folder(tmp_path, small):
    code = f"from data.synthetic import generate; generate({str(tmp_path)!r}, num_ids=40, workers=2)"
    root = Path(synthetic.__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not list(tmp_path.rglob("*.jpg")) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (leftover,) = tmp_path.iterdir()  # under a temporary name
    assert leftover.name.startswith(".") and any(leftover.rglob("*.jpg"))
    while True:  # the workers end by themselves
        before = len(list(leftover.rglob("*.jpg")))
        time.sleep(0.5)
        if len(list(leftover.rglob("*.jpg"))) == before:
            break
    assert before < len(tasks(40, 0))

    # the next attempt for the same folder does not use it, and removes it once it is old
    stale, young = tmp_path / f".{small.name}.stale", tmp_path / f".{small.name}.young"
    for copy in (stale, young):
        shutil.copytree(leftover, copy)
    for path in (stale, *stale.glob("*")):
        os.utime(path, (0, 0))
    folder = generate(tmp_path, num_ids=4)
    assert contents(folder) == contents(small)
    assert not stale.exists() and young.exists()


def test_two_at_once_end_well(tmp_path, small, monkeypatch):
    """Another process finishes first while this one still draws: its folder is used, and nothing is left over."""

    def overtaken(folder, *args, draw_all=synthetic.draw_all):
        draw_all(folder, *args)
        shutil.copytree(small, tmp_path / small.name)

    monkeypatch.setattr(synthetic, "draw_all", overtaken)
    assert generate(tmp_path, num_ids=4) == tmp_path / small.name
    assert [path.name for path in tmp_path.iterdir()] == [small.name]


@pytest.mark.parametrize("flag", ["--num-ids", "--seed"])
def test_wrong_numbers_on_the_command_line_are_one_sentence(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.synthetic", flag, "-1", "--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "error: --num-ids must be at least 2, and --seed at least 0" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_what_the_system_refuses_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["synthetic", "--contact-sheet", str(tmp_path / "none/sheet.png")])
    with pytest.raises(SystemExit):
        main()
    assert re.fullmatch("data.synthetic: .*No such file or directory.*\n", capsys.readouterr().err)


def test_contact_sheet(tmp_path):
    contact_sheet(tmp_path / "sheet.png", num_people=1)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (128 + 4 + 128, 12 * 64 + 11 * 4 + 5 * 12, 3)


def test_benchmark_names_the_commit_of_each_part(tmp_path, monkeypatch, capsys):
    """Parts that are not asked for are kept with their commit; figures of another version of the images are not."""
    output = tmp_path / "synthetic.json"
    quick = describe(new_run({"loss": "arcface", "dataset": "synthetic"}))
    runs = {"c": {0: {"rank1": 0.5, "mAP": 0.3, "seconds": 1}}, "a+b": {0: {"rank1": 0.7, "mAP": 0.3}}, "d": {1: {}}}
    monkeypatch.setattr(benchmark, "load_groups", {benchmark.ROOT / "results": {quick: runs}}.get)
    monkeypatch.setattr(benchmark, "measure_hsv", lambda _: {"rank1": 0.4, "mAP": 0.1})
    monkeypatch.setattr(benchmark, "measure_softmax", lambda _: {"rank1": 0.6, "mAP": 0.4})

    def written(commit, *parts):
        monkeypatch.setattr(sys, "argv", ["synthetic.py", "--parts", *parts, "--output", str(output)])
        monkeypatch.setattr(benchmark, "current_commit", lambda: commit)
        benchmark.main()
        return json.loads(output.read_text())

    first = written("first", "hsv", "losses")
    assert first["commit"] == {"hsv": "first", "losses": "first"}
    assert first["found"]["losses"] == {"a+b": {"rank1": 0.7, "mAP": 0.3}, "c": {"rank1": 0.5, "mAP": 0.3}}
    monkeypatch.setattr(benchmark.torch, "__version__", "9.9")
    second = written("second", "softmax")
    assert second["torch"] == {**first["torch"], "softmax": "9.9"} and "9.9" not in first["torch"].values()
    assert second["commit"] == {"hsv": "first", "losses": "first", "softmax": "second"}
    found = [(row["value"], row["holds"]) for row in second["checks"]]
    assert found == [("40.0", False), ("60.0", True), ("20.0", True), ("20.0", False)]
    assert "HSV histograms, rank-1 %" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "VERSION", -1)
    assert written("third", "softmax")["commit"] == {"softmax": "third"}
