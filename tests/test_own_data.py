"""Trainings on what people bring themselves, from images to metrics: a folder of their own, two data sets at once, one
camera, and what can't be scored, which is said before anything is trained."""

import json
import shutil

import numpy as np
import pytest
from conftest import QUICK, write_tiny_market
from PIL import Image

import evaluate
import train
from utils.results import markdown
from utils.runs import load_groups

pytestmark = [pytest.mark.usefixtures("small_network"), pytest.mark.filterwarnings("ignore:Market-1501 in")]


def run(*flags):
    train.main(["--loss", "softmax", *QUICK, "--epochs", "1", "--p", "2", "--k", "2", *map(str, flags)])


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_folder(root, people=("anna", "bo li", "Çetin", "dan", "eva"), images=3, cameras=2):
    """A folder per person, no other split; cameras=0: names that say nothing about them."""
    rng = np.random.default_rng(1)
    for person in people:
        (root / person).mkdir(parents=True)
        colour = rng.integers(0, 255, 3)
        for index in range(images):
            pixels = np.clip(colour + rng.normal(0, 20, (40, 20, 3)), 0, 255).astype(np.uint8)
            camera = f"_c{index % cameras + 1}" if cameras else ""
            Image.fromarray(pixels).save(root / person / f"IMG {index}{camera}.png")
    return root


@pytest.fixture
def untrained(monkeypatch):
    """Nothing may be decoded, still less trained."""
    monkeypatch.setattr(train, "TrainingImages", lambda *_, **__: pytest.fail("the images were decoded"))


# ------------------------------------------------------------------------------------------------ a folder of one's own


@pytest.mark.parametrize("cameras", [2, 0])
def test_a_folder_of_ones_own_from_images_to_metrics(tmp_path, capsys, cameras):
    """Trained, scored, its split kept in the run folder; and what the reader found is printed."""
    place = write_folder(tmp_path / "my photos", cameras=cameras)
    run("--dataset", "folder", "--data-dir", place, "--run-dir", tmp_path / "run")
    out = capsys.readouterr().out
    assert "folder: a folder per person: 5 people, 15 images" in out and "split by seed 0" in out
    assert ("cameras unknown" in out) == (cameras == 0)
    result, args = load(tmp_path / "run/result.json"), load(tmp_path / "run/args.json")
    assert result["num_queries"] > 0 and 0 <= result["mAP"] <= 1
    assert args["notes"][0].startswith("folder: a folder per person") and args["num_classes"] == 3
    lines = (tmp_path / "run/split.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 16 and any("Çetin/IMG 0" in line for line in lines)


def test_the_split_stays_when_files_are_added(tmp_path, monkeypatch, capsys):
    """A new person and a new image after the first epoch: the resumed run and evaluate.py go by the split that was
    kept, and give what they would have given; a new run takes the new files."""
    place, run_dir = write_folder(tmp_path / "photos"), tmp_path / "run"
    flags = ["--dataset", "folder", "--data-dir", place, "--epochs", "2"]
    run(*flags, "--run-dir", tmp_path / "whole")
    save = train.save_checkpoint

    def save_and_die(*content):
        save(*content)
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(train, "save_checkpoint", save_and_die)
        run(*flags, "--run-dir", run_dir)
    write_folder(place, people=["aaron", "zoe"])
    shutil.copy(place / "anna" / "IMG 0_c1.png", place / "anna" / "IMG 9_c2.png")
    capsys.readouterr()
    train.main(["--resume", "--run-dir", str(run_dir)])
    assert "going on after epoch 1 of 2" in capsys.readouterr().out
    whole, resumed = (load(folder / "result.json") for folder in (tmp_path / "whole", run_dir))
    assert [line["loss"] for line in whole["log"]] == [line["loss"] for line in resumed["log"]]
    assert all(whole[key] == resumed[key] for key in evaluate.METRICS)
    evaluate.main(["--run", str(run_dir), "--device", "cpu"])
    assert "trained on some" not in capsys.readouterr().out
    again = load(run_dir / "evaluation_folder-photos_cosine.json")
    assert all(again[key] == resumed[key] for key in evaluate.METRICS)
    evaluate.main(["--run", str(run_dir), "--device", "cpu", "--split-seed", "3"])  # another split, of all files
    out = capsys.readouterr().out
    assert "folder: a folder per person: 7 people, 22 images" in out and "it was trained on some of the people" in out
    run(*flags, "--run-dir", tmp_path / "new")
    assert len((tmp_path / "new/split.csv").read_text(encoding="utf-8").splitlines()) == 1 + 22


def test_the_folder_may_have_moved(tmp_path):
    """The kept split holds paths relative to --data-dir."""
    place = write_folder(tmp_path / "photos")
    run("--dataset", "folder", "--data-dir", place, "--run-dir", tmp_path / "run")
    moved = place.rename(tmp_path / "moved")
    evaluate.main(["--run", str(tmp_path / "run"), "--data-dir", str(moved), "--device", "cpu"])
    found, before = (load(tmp_path / "run" / name) for name in ("evaluation_folder-moved_cosine.json", "result.json"))
    assert found["mAP"] == before["mAP"]


def test_the_kept_split_of_one_of_two_data_sets(tmp_path, monkeypatch, capsys):
    """A run on both, scored on the folder alone, to which a person was added since: nobody whom it trained on."""
    place = write_folder(tmp_path / "data/folder")
    write_tiny_market(tmp_path / "data/market1501")
    run("--dataset", "market+folder", "--data-dir", tmp_path / "data", "--run-dir", tmp_path / "run")
    write_folder(place, people=["aaron"])
    capsys.readouterr()
    evaluate.main(["--run", str(tmp_path / "run"), "--dataset", "folder", "--device", "cpu"])
    assert f"the split kept in {tmp_path / 'run/split.csv'}: 5 people" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    for words in (["market+folder", "--data-dir", "data/"], ["folder", "--data-dir", "data/folder"]):  # the same
        evaluate.main(["--run", "run", "--dataset", *words, "--device", "cpu"])
        assert "the split kept in run/split.csv: 5 people" in capsys.readouterr().out, words


def test_a_run_with_held_out_people_on_other_people(tmp_path):
    """Of another draw the test set counts, not a third of its people for training."""
    flags = ["--dataset", "synthetic", "--synthetic-ids", "6", "--data-dir", tmp_path / "data"]
    run(*flags, "--eval-on", "val", "--run-dir", tmp_path / "run")
    evaluate.main(["--run", str(tmp_path / "run"), "--synthetic-seed", "1", "--device", "cpu"])
    (path,) = (tmp_path / "run").glob("evaluation_*synthetic-seed-1*.json")
    assert load(path)["eval_on"] == "test"


def test_few_pictures_make_smaller_batches(tmp_path, capsys):
    """Four people with three pictures each are no batch of 4 x 4: fewer of each, said; a typed --k stays an error."""
    place = write_folder(tmp_path / "photos", people=[f"p{i}" for i in range(8)])
    flags = ["--loss", "softmax", *QUICK, "--dataset", "folder", "--data-dir", str(place), "--epochs", "1"]
    train.main([*flags, "--run-dir", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "batches of 4 people" in out and "batches of 3 images of each" in out and "1 step x 12 images" in out
    with pytest.raises(ValueError, match="12 training images do not fill one batch of 4 x 4: lower"):
        train.main([*flags, "--k", "4", "--run-dir", str(tmp_path / "typed")])


def test_other_pictures_have_a_split_and_a_name_of_their_own(tmp_path, capsys):
    """A run on one folder, scored on another: by that one's split; and neither takes the other's place in a table."""
    for name, people in (("zoo", 6), ("shop", 8)):
        write_folder(tmp_path / name, people=[f"{name}{i}" for i in range(people)])
        run("--dataset", "folder", "--data-dir", tmp_path / name, "--run-dir", tmp_path / "runs" / name)
    capsys.readouterr()
    flags = ["--dataset", "folder", "--data-dir", str(tmp_path / "shop"), "--device", "cpu"]
    evaluate.main(["--run", str(tmp_path / "runs/zoo"), *flags])
    assert "folder: a folder per person: 8 people" in capsys.readouterr().out
    assert load(tmp_path / "runs/zoo/evaluation_folder-shop_cosine.json")["titles"] == {"folder": "folder shop"}
    write_folder(tmp_path / "zoo", people=["zoo6", "zoo7"])  # a folder that grows is another one, of the same name
    run("--dataset", "folder", "--data-dir", tmp_path / "zoo", "--run-dir", tmp_path / "runs/zoo more")
    assert "--dataset folder --data-dir PICTURES" in markdown(load_groups(tmp_path / "runs"))
    settings = {setting.data for setting in load_groups(tmp_path / "runs")}
    assert settings == {f"folder {name} training images" for name in ("shop, 12", "zoo, 9", "zoo, 12")}


def test_a_folder_of_people_is_left_alone(tmp_path):
    """What is not in it is looked for in its usual place, and own pictures beside other data sets have theirs."""
    write_folder(tmp_path / "zoo")
    run("--dataset", "folder", "--data-dir", tmp_path / "zoo", "--run-dir", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="(?s)^(?!.*zoo).*datasets"):
        evaluate.main(["--run", str(tmp_path / "run"), "--device", "cpu", "--dataset", "duke"])
    with pytest.raises(ValueError, match="own pictures lie in .*zoo/folder"):
        run("--dataset", "synthetic+folder", "--data-dir", tmp_path / "zoo", "--run-dir", tmp_path / "two")
    assert not [path for path in (tmp_path / "zoo").iterdir() if "synthetic" in path.name]
    write_tiny_market(tmp_path / "zoo/market1501/Market-1501-v15.09.15")
    with pytest.raises(ValueError, match="zoo/market1501 is a data set and no person"):
        run("--dataset", "folder", "--data-dir", tmp_path / "zoo", "--run-dir", tmp_path / "three")


def test_the_seed_of_the_split_is_the_readers_own(tmp_path):
    place = write_folder(tmp_path / "photos", people=[f"person {i}" for i in range(12)])
    for name, flags in (("a", []), ("b", ["--seed", 5]), ("c", ["--split-seed", 5, "--test-share", 0.25])):
        run("--dataset", "folder", "--data-dir", place, *flags, "--epochs", 0, "--run-dir", tmp_path / name)
    a, b, c = ((tmp_path / name / "split.csv").read_text(encoding="utf-8") for name in "abc")
    assert a == b != c and load(tmp_path / "c/args.json")["num_classes"] == 9


# ------------------------------------------------------------------------------------------------------ several at once


@pytest.fixture
def two_sets(tmp_path):
    write_tiny_market(tmp_path / "data/market1501")
    write_folder(tmp_path / "data/folder")
    return tmp_path / "data"


def test_two_data_sets_are_trained_on_together_and_scored_apart(two_sets, tmp_path, capsys):
    """result.json has the means, and under "tests" what each of them gives alone."""
    run("--dataset", "market+folder", "--data-dir", two_sets, "--run-dir", tmp_path / "run", "--eval-every", 1,
        "--epochs", 2)  # fmt: skip
    out = capsys.readouterr().out
    result, args = load(tmp_path / "run/result.json"), load(tmp_path / "run/args.json")
    assert args["num_classes"] == 6 + 3 and args["titles"] == {"market": "Market-1501 (incomplete)", "folder": "folder"}
    tests = result["tests"]
    assert list(tests) == ["market", "folder"] and "tests" in result["log"][0]
    assert result["mAP"] == pytest.approx((tests["market"]["mAP"] + tests["folder"]["mAP"]) / 2)
    assert result["num_queries"] == tests["market"]["num_queries"] + tests["folder"]["num_queries"]
    assert "market+folder softmax, mean" in out and "\nmarket " in out and "\nfolder " in out
    for name in tests:
        evaluate.main(["--run", str(tmp_path / "run"), "--dataset", name, "--device", "cpu"])
        alone = load(tmp_path / f"run/evaluation_{name}_cosine.json")
        assert all(alone[key] == tests[name][key] for key in evaluate.METRICS), name
    evaluate.main(["--run", str(tmp_path / "run"), "--device", "cpu"])
    assert load(tmp_path / "run/evaluation_market+folder_cosine.json")["tests"] == tests
    with pytest.raises(ValueError, match="--save-features takes one test set: name it with --dataset"):
        evaluate.main(["--run", str(tmp_path / "run"), "--device", "cpu", "--save-features", str(tmp_path / "f.npz")])


def test_the_kept_split_of_a_folder_among_others(two_sets, tmp_path):
    run("--dataset", "market+folder", "--data-dir", two_sets, "--run-dir", tmp_path / "run")
    assert len((tmp_path / "run/split.csv").read_text(encoding="utf-8").splitlines()) == 16
    write_folder(two_sets / "folder", people=["zoe"])
    evaluate.main(["--run", str(tmp_path / "run"), "--device", "cpu"])
    found, before = (load(tmp_path / "run" / name) for name in
                     ("evaluation_market+folder_cosine.json", "result.json"))  # fmt: skip
    assert found["tests"] == before["tests"]


@pytest.mark.parametrize("sets, words", [("market+market", "stands twice"), ("market+marked", "Unknown data set")])
def test_unions_that_are_none(two_sets, tmp_path, sets, words, capsys):
    with pytest.raises((ValueError, SystemExit)) as stopped:
        run("--dataset", sets, "--data-dir", two_sets, "--run-dir", tmp_path / "run")
    assert words in f"{stopped.value} {capsys.readouterr().err}" and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- cameras, and nothing to score


def test_held_out_people_of_one_camera(tmp_path, monkeypatch):
    """Without --ignore-cameras there is nothing to search for, and the sentence says so; with it it is scored."""
    root = write_tiny_market(tmp_path / "market1501", num_cameras=1)
    flags = ["--dataset", "market", "--data-dir", root, "--eval-on", "val", "--run-dir", tmp_path / "run"]
    with pytest.raises(ValueError, match="No held-out identity was seen by two cameras.*--ignore-cameras"):
        run(*flags)
    assert not (tmp_path / "run").exists()
    run(*flags, "--ignore-cameras")
    assert load(tmp_path / "run/result.json")["num_queries"] == 2
    evaluate.main(["--run", str(tmp_path / "run"), "--device", "cpu"])
    name = "evaluation_market_cosine_ignore-cameras.json"
    assert load(tmp_path / "run" / name)["mAP"] == load(tmp_path / "run/result.json")["mAP"]
    monkeypatch.setattr(evaluate, "embed", lambda *_, **__: pytest.fail("images were embedded"))
    with pytest.raises(ValueError, match="No query has a true match: .* by one camera only"):  # by cameras again
        evaluate.main(["--run", str(tmp_path / "run"), "--device", "cpu", "--dataset", "market", "--no-ignore-cameras",
                       "--data-dir", str(write_tiny_market(tmp_path / "other", num_cameras=1))])  # fmt: skip


def test_no_true_match_is_said_before_the_first_epoch(tmp_path, untrained):
    """Every person of the queries by one camera only: the way out is named, and is taken before anything is decoded."""
    root = write_tiny_market(tmp_path / "market1501", num_cameras=1)
    flags = ["--dataset", "market", "--data-dir", root, "--run-dir", tmp_path / "run"]
    with pytest.raises(ValueError, match="No query has a true match: .* by one camera only.*With --ignore-cameras"):
        run(*flags)
    assert not (tmp_path / "run").exists()
    with pytest.raises(pytest.fail.Exception, match="were decoded"):
        run(*flags, "--ignore-cameras")


def test_no_true_match_in_one_of_two_sets(two_sets, tmp_path, untrained):
    for path in (two_sets / "market1501/bounding_box_test").iterdir():
        path.rename(path.with_name(f"9{path.name}"))
    with pytest.raises(ValueError, match="none of the 6 people of the queries is in the gallery"):
        run("--dataset", "market+folder", "--data-dir", two_sets, "--run-dir", tmp_path / "run")


def test_scoring_may_be_asked_for_otherwise_on_resume(tmp_path, monkeypatch):
    """Trained by the protocol, then the same weights scored without cameras: its own result, without training again."""
    root = write_tiny_market(tmp_path / "market1501")
    run("--dataset", "market", "--data-dir", root, "--run-dir", tmp_path / "run")
    first = load(tmp_path / "run/result.json")
    (tmp_path / "run/result.json").unlink()
    monkeypatch.setattr(train, "backward_step", lambda *_, **__: pytest.fail("trained again"))
    train.main(["--resume", "--run-dir", str(tmp_path / "run"), "--ignore-cameras", "--metric", "euclidean"])
    second = load(tmp_path / "run/result.json")
    assert second["args"]["ignore_cameras"] and second["args"]["metric"] == "euclidean"
    assert second["mAP"] != first["mAP"] and second["log"] == first["log"]
