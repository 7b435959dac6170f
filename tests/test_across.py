"""Runs scored on other data sets: the tables by hand, which scores count, what is kept of them, the real programs."""

import json
from dataclasses import replace

import pytest
from conftest import QUICK, write_tiny_market

import evaluate
import train
from tests.test_results import cells, result
from utils import results
from utils.across import markdown_across
from utils.runs import collect, compact, describe, load_groups

HEAD = "trained on \\ tested on"
ZERO, ONE = "synthetic, 150 + 150 people", "synthetic, 150 + 150 people, --synthetic-seed 1"


def run_folder(place, run, *evaluations):
    """A finished run with what evaluate.py wrote, in files of any names."""
    place.mkdir(parents=True)
    (place / "result.json").write_text(json.dumps(run))
    for number, evaluation in enumerate(evaluations):
        (place / f"evaluation_{number}.json").write_text(json.dumps(evaluation))
    return place


def scored_on(dataset, rank1=0.3, mAP=0.2, titles=None, options=None, **changes):
    """What evaluate.py writes: scores, how it scored, on what."""
    names = dataset.split("+")
    scores = {"rank1": rank1, "rank5": 0.5, "mAP": mAP, "mAP_trapezoid": mAP, "mINP": 0.1, "num_queries": 400}
    how = {"metric": "cosine", "ignore_cameras": False, "flip_test": False}
    defaults = {"synthetic_ids": 150, "synthetic_seed": 0} if "synthetic" in names else {}
    defaults |= {"split_seed": 0, "test_share": 0.5} if "folder" in names else {}
    about = {"dataset": dataset, "options": defaults | (options or {}), "titles": titles or {n: n for n in names}}
    return {**scores, **how, **about, "eval_on": "test", "finished": True, **changes}


def synthetic(seed, **changes):
    return scored_on("synthetic", options={"synthetic_seed": seed}, **changes)


MARKET, DUKE = {"market": "Market-1501"}, {"duke": "DukeMTMC-reID"}


def tables(folder):
    """The tables on a folder of runs, by heading, and after them a caption; [] if there is none."""
    found = markdown_across(load_groups(folder))
    assert not found or found[-1].startswith("Across data sets: ")
    return {text.partition("\n")[0].strip("*"): cells(text) for text in found[:-1]}


def table(folder):
    ((_, found),) = tables(folder).items()
    return found


# --------------------------------------------------------------------------------------------------------------- table


def test_cells_by_hand(tmp_path):
    """Three seeds on one data set, scored on another: 0.30 0.32 0.34 has mean 0.32, s = 0.02, so half the interval is
    4.302653 * 0.02 / sqrt(3) = 0.0497; 0.20 0.21 0.22 half of that. One seed on the other, which was not scored
    elsewhere."""
    for seed in range(3):
        own = result(seed=seed, rank1=0.7 + 0.01 * seed, mAP=0.5)
        other = synthetic(1, rank1=0.30 + 0.02 * seed, mAP=0.20 + 0.01 * seed)
        run_folder(tmp_path / f"zero{seed}", own, other)
    run_folder(tmp_path / "one0", result(synthetic_seed=1, rank1=0.66, mAP=0.44))
    ((heading, found),) = tables(tmp_path).items()
    assert heading == "Across data sets: softmax, controlled recipe, resnet18, from scratch, 128x64, 5 epochs"
    assert found == {
        ZERO: {HEAD: ZERO, ZERO: "71.0 ± 2.5 / 50.0 ± 0.0 (n = 3)", ONE: "32.0 ± 5.0 / 21.0 ± 2.5 (n = 3)"},
        ONE: {HEAD: ONE, ZERO: "not run", ONE: "66.0 / 44.0 (n = 1)"},
    }


def test_a_table_for_each_training_and_loss_that_was_scored_elsewhere(tmp_path):
    """The loss and the setting that were scored on their own data only have none; known data sets come first."""
    run_folder(tmp_path / "a", result(dataset="duke"), scored_on("market", titles=MARKET))
    run_folder(tmp_path / "b", result(dataset="market"))
    run_folder(tmp_path / "c", result("triplet", dataset="market"))
    run_folder(tmp_path / "d", result("triplet", dataset="market", epochs=9), scored_on("duke", titles=DUKE))
    run_folder(tmp_path / "e", result(dataset="market", flip_test=True))
    found = tables(tmp_path)
    assert [heading.split(": ")[1].split(", ")[0] for heading in found] == ["triplet", "softmax"]
    assert list(found.values())[1] == {
        "Market-1501": {HEAD: "Market-1501", "Market-1501": "70.0 / 50.0 (n = 1)", "DukeMTMC-reID": "not run"},
        "DukeMTMC-reID": {HEAD: "DukeMTMC-reID", "Market-1501": "30.0 / 20.0 (n = 1)",
                          "DukeMTMC-reID": "70.0 / 50.0 (n = 1)"},
    }  # fmt: skip
    assert [row["DukeMTMC-reID"] for row in list(found.values())[0].values()] == ["30.0 / 20.0 (n = 1)"]


def test_a_union_has_a_cell_on_each_of_its_sets(tmp_path):
    """Its own numbers are those of each set, not their means; a file on a union is read as its sets, too."""
    union = result(dataset="market+duke", rank1=0.65, mAP=0.45)
    union["tests"] = {"market": {**scored_on("market", 0.8, 0.6)}, "duke": {**scored_on("duke", 0.5, 0.3)}}
    run_folder(tmp_path / "union", union, scored_on("msmt17", 0.2, 0.1, titles={"msmt17": "MSMT17 V2"}))
    both = scored_on("duke+msmt17", titles={**DUKE, "msmt17": "MSMT17 V1"})
    both["tests"] = {"duke": {"rank1": 0.4, "mAP": 0.3, "num_queries": 7}, "msmt17": {**scored_on("", 0.22, 0.12)}}
    run_folder(tmp_path / "market", result(dataset="market"), both)
    columns = ["Market-1501", "DukeMTMC-reID", "MSMT17 V1", "MSMT17 V2"]
    found = {name: [row[column] for column in columns] for name, row in table(tmp_path).items()}
    texts = ["80.0 / 60.0", "50.0 / 30.0", "not run", "20.0 / 10.0"]
    assert found["Market-1501 + DukeMTMC-reID"] == [f"{t} (n = 1)" if t[0] != "n" else t for t in texts]
    texts = ["70.0 / 50.0", "40.0 / 30.0", "22.0 / 12.0", "not run"]
    assert found["Market-1501"] == [f"{t} (n = 1)" if t[0] != "n" else t for t in texts]


def test_held_out_people_are_a_test_set_of_their_own(tmp_path):
    """Beside the test set of the same data, which a file on a union holds."""
    union = scored_on("market+duke", titles={**MARKET, **DUKE})
    union["tests"] = {"market": scored_on("market", 0.4, 0.1), "duke": scored_on("duke", 0.3, 0.2)}
    run_folder(tmp_path / "run", result(dataset="market", eval_on="val"), union,
               scored_on("market", 0.9, 0.9, titles=MARKET, eval_on="val"))  # fmt: skip
    name = "Market-1501, scored on held-out training identities"
    texts = ["70.0 / 50.0 (n = 1)", "40.0 / 10.0 (n = 1)", "30.0 / 20.0 (n = 1)"]
    columns = [name, "Market-1501", "DukeMTMC-reID"]
    assert table(tmp_path) == {name: {HEAD: name, **dict(zip(columns, texts, strict=True))}}


def test_own_pictures_are_told_apart_by_their_queries(tmp_path):
    """Two runs of two folders; that of a run on own pictures is not scored on others of the same name: another split
    may hold people that it was trained on."""
    run_folder(tmp_path / "a", result(dataset="market"), scored_on("folder", num_queries=1200))
    run_folder(tmp_path / "b", result(dataset="duke"), scored_on("folder", num_queries=80))
    split = scored_on("folder", options={"split_seed": 3})
    run_folder(tmp_path / "c", result(dataset="folder"), split, scored_on("duke", titles=DUKE))
    columns = ["Market-1501", "DukeMTMC-reID", "folder, 600 queries", "folder, 1,200 queries", "folder, 80 queries"]
    found = table(tmp_path)
    assert list(found["folder"]) == [HEAD, *columns]
    assert [cell == "not run" for cell in found["folder"].values()] == [False, True, False, False, True, True]
    assert found["Market-1501"]["folder, 1,200 queries"] == found["DukeMTMC-reID"]["folder, 80 queries"] != "not run"


def test_without_scores_elsewhere_nothing_is_shown(tmp_path):
    run_folder(tmp_path / "a", result(), synthetic(0))
    assert markdown_across(load_groups(tmp_path)) == []
    assert "Across" not in results.markdown(load_groups(tmp_path))


def test_tables_stand_after_the_others_and_before_the_caption_of_all(tmp_path, capsys):
    run_folder(tmp_path / "a", result(), synthetic(1))
    results.main([str(tmp_path)])
    text = capsys.readouterr().out
    places = [text.index(part) for part in ("**synthetic,", "bash experiments.sh", "**Across data sets: softmax,",
                                            "Across data sets: a row", "Percent; mean ± half")]  # fmt: skip
    assert places == sorted(places)


def test_the_same_run_counts_once(tmp_path, capsys):
    """As in the other tables: the first of two runs that agree in every flag, with its own scores."""
    run_folder(tmp_path / "a", result(), synthetic(1, rank1=0.25))
    run_folder(tmp_path / "b", result(workers=1), synthetic(1, rank1=0.75))
    assert table(tmp_path)[ZERO][ONE] == "25.0 / 20.0 (n = 1)"
    assert "left out: it has the flags of " in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- which scores count

OLD = {key: value for key, value in synthetic(1).items() if key in ("rank1", "mAP", "num_queries", "metric")}


@pytest.mark.parametrize(
    "evaluation",
    [
        synthetic(1, metric="euclidean"),
        synthetic(1, ignore_cameras=True),
        synthetic(1, flip_test=True),
        synthetic(1, k1=20, k2=6, lambda_=0.3),
        synthetic(1, eval_on="val"),
        synthetic(1, finished=False),
        synthetic(0),
        OLD,
        {},
    ],
    ids=["metric", "cameras", "flip", "reranked", "val", "unfinished", "own", "old", "empty"],
)
def test_what_does_not_count(tmp_path, evaluation):
    run_folder(tmp_path / "a", result(), evaluation)
    assert tables(tmp_path) == {}
    run_folder(tmp_path / "b", result(seed=1), evaluation, synthetic(1))  # not in the way of one that does
    assert table(tmp_path)[ZERO][ONE] == "30.0 / 20.0 (n = 1)"


def test_the_runs_own_way_of_scoring_counts(tmp_path):
    """With --verification beside it, which changes no rank: counted once."""
    how = {"metric": "euclidean", "ignore_cameras": True, "flip_test": True}
    run_folder(tmp_path / "a", result(**how), synthetic(1), synthetic(1, **how),
               synthetic(1, **how, verification={"pairs": 3}))  # fmt: skip
    ((heading, found),) = tables(tmp_path).items()
    assert found[ZERO][ONE] == "30.0 / 20.0 (n = 1)"
    assert heading.endswith(", 5 epochs, --metric euclidean, --ignore-cameras, --flip-test")


def test_a_switch_that_an_older_file_lacks_counts_as_its_default(tmp_path):
    """Of a file from before --flip-test: scored without."""
    evaluation = synthetic(1)
    del evaluation["flip_test"]
    run_folder(tmp_path / "a", result(), evaluation)
    run_folder(tmp_path / "b", result("triplet", flip_test=True), evaluation)
    (found,) = tables(tmp_path).values()  # the other run was scored otherwise
    assert found[ZERO][ONE] == "30.0 / 20.0 (n = 1)"


def test_an_option_that_an_older_file_lacks_counts_as_its_default(tmp_path):
    evaluation = synthetic(1)
    del evaluation["options"]["synthetic_ids"]
    run_folder(tmp_path / "a", result(), evaluation)
    assert list(table(tmp_path)[ZERO]) == [HEAD, ZERO, ONE]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        b"\xff\xfe",
        {**synthetic(1), "mAP": None},
        {**synthetic(1), "rank1": "high"},
        {**synthetic(1), "titles": {}},
        {**synthetic(1), "options": 3},
    ],
    ids=["cut", "list", "bytes", "no mAP", "no number", "no title", "options"],
)
def test_a_spoiled_file_is_named_in_one_sentence(tmp_path, content):
    run = run_folder(tmp_path / "a", result())
    content = json.dumps(content) if isinstance(content, dict) else content
    (run / "evaluation_bad.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (lambda: load_groups(tmp_path), lambda: collect(run, tmp_path / "results")):
        with pytest.raises(ValueError, match="evaluation_bad.json can't be read .* score again$") as stop:
            read()
        assert len(str(stop.value).splitlines()) == 1


# --------------------------------------------------------------------------------------------------- words for the data


def test_words_for_the_data_and_for_the_training():
    args = result(dataset="synthetic", synthetic_ids=20, synthetic_seed=3, p=8)["args"]
    assert describe(args).data == "synthetic, 20 + 20 people, --synthetic-seed 3"
    training = "controlled recipe, resnet18, from scratch, 128x64, 5 epochs, --p 8"
    assert str(replace(describe(args), data="")) == training
    assert str(describe(args)) == f"{describe(args).data}, {training}"
    titles = {"cuhk03": "CUHK03 labeled", "synthetic": "synthetic"}
    args = result(dataset="cuhk03+synthetic", cuhk03_boxes="labeled", titles=titles)["args"]
    assert describe(args).data == "CUHK03 labeled, --cuhk03-boxes labeled + synthetic, 150 + 150 people"


# -------------------------------------------------------------------------------------------------------- what is kept


def test_collected_runs_keep_the_scores(tmp_path):
    """The same table without the run folders; what is kept is its own compact form, and collecting again changes
    nothing."""
    run_folder(tmp_path / "runs/a", result(), synthetic(1, rank1=0.25), synthetic(1, k1=20), synthetic(0))
    run_folder(tmp_path / "runs/b", result(seed=1), synthetic(1, rank1=0.35))
    run_folder(tmp_path / "runs/c", result(seed=2))
    paths = [collect(tmp_path / "runs" / name, tmp_path / "results") for name in "abc"]
    kept = [json.loads(path.read_text()) for path in paths]
    assert all(compact(run) == run for run in kept) and "across" not in kept[2]
    assert kept[0]["across"] == [
        {"dataset": "synthetic", "title": "synthetic", "options": {"synthetic_ids": 150, "synthetic_seed": 1},
         "rank1": 0.25, "mAP": 0.2, "num_queries": 400}
    ]  # fmt: skip
    before = [path.read_bytes() for path in paths]
    assert [collect(tmp_path / "runs" / name, tmp_path / "results").read_bytes() for name in "abc"] == before
    shown = results.markdown(load_groups(tmp_path / "results"))
    assert shown == results.markdown(load_groups(tmp_path / "runs")) and "(n = 2)" in shown
    assert table(tmp_path / "results")[ZERO][ONE].startswith("30.0 ± 63.5 / 20.0 ± 0.0")  # t(0.975, 1) = 12.7062


# ------------------------------------------------------------------------------------------------------ real programs


def test_two_draws_of_generated_people(tmp_path, small_network, capsys):
    """Each trained on, each scored on the other: evaluate.py draws what is not there, and the table has its numbers."""
    data, runs = tmp_path / "data", tmp_path / "runs"
    words = ["--dataset", "synthetic", "--data-dir", str(data), "--synthetic-ids", "4", *QUICK, "--p", "4", "--k", "4"]
    for seed in "01":
        how = ["--loss", "softmax", "--epochs", "1", "--synthetic-seed", seed, "--run-dir", str(runs / seed)]
        train.main([*words, *how])
        assert len(list(data.iterdir())) == 1 + int(seed)
    names = ["synthetic, 4 + 4 people", "synthetic, 4 + 4 people, --synthetic-seed 1"]
    found = {}
    for seed, other in ("01", "10"):
        score = ["--run", str(runs / seed), "--synthetic-seed", other, "--device", "cpu", "--workers", "0"]
        evaluate.main([*score, "--dataset", "synthetic"])
        evaluate.main([*score, "--rerank"])
        path = runs / seed / f"evaluation_synthetic_synthetic-seed-{other}_cosine.json"
        scores = {seed: json.loads((runs / seed / "result.json").read_text()), other: json.loads(path.read_text())}
        assert scores[other]["options"] == {"synthetic_ids": 4, "synthetic_seed": int(other)}
        assert scores[other]["titles"] == {"synthetic": "synthetic"} and scores[other]["finished"]
        assert scores[seed]["num_queries"] != scores[other]["num_queries"]  # other people, indeed
        found[names[int(seed)]] = {HEAD: names[int(seed)]} | {
            names[int(tested)]: f"{100 * scores[tested]['rank1']:.1f} / {100 * scores[tested]['mAP']:.1f} (n = 1)"
            for tested in scores
        }
    assert table(runs) == found
    capsys.readouterr()
    results.main([str(runs)])
    shown = cells(capsys.readouterr().out)
    assert {name: shown[name] for name in names} == found


def test_a_run_that_is_not_finished_does_not_count(tmp_path, small_network):
    """Its network may still change; the same file, written once it is finished, does."""
    run, data = tmp_path / "run", write_tiny_market(tmp_path / "data/market1501").parent
    train.main(["--loss", "softmax", "--dataset", "market", "--data-dir", str(data), *QUICK, "--p", "4", "--k", "4",
                "--epochs", "1", "--run-dir", str(run)])  # fmt: skip
    (run / "result.json").rename(tmp_path / "kept.json")
    score = ["--run", str(run), "--dataset", "market+synthetic", "--synthetic-ids", "4", "--device", "cpu"]
    evaluate.main(score)
    (tmp_path / "kept.json").rename(run / "result.json")
    assert tables(tmp_path) == {}
    evaluate.main(score)
    title = "Market-1501 (incomplete)"
    assert list(table(tmp_path)[title]) == [HEAD, title, "synthetic, 4 + 4 people"]


def test_evaluate_says_that_it_scored_held_out_people(tmp_path, small_network, flags):
    run = tmp_path / "run"
    train.main(["--loss", "softmax", *flags, "--epochs", "1", "--eval-on", "val"])
    evaluate.main(["--run", str(run), "--device", "cpu"])
    found = json.loads((run / "evaluation_market_cosine.json").read_text())
    assert (found["dataset"], found["eval_on"], found["options"]) == ("market", "val", {})
    assert found["mAP"] == json.loads((run / "result.json").read_text())["mAP"] and tables(tmp_path) == {}
