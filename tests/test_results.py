"""The results table: its statistics by hand and against slow forms, its files, and that the README's is the current."""

import csv
import json
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import scipy.stats

import train
from losses import TWELVE
from utils import results

ROOT = Path(__file__).resolve().parent.parent
QUICK = {"arch": "resnet18", "weights": "none", "height": 128, "width": 64, "epochs": 2, "amp": True}


def result(loss="softmax", seed=0, mAP=0.5, rank1=0.7, dataset="synthetic", seconds=60.0, **flags):
    """What train.py writes: its own resolved flags, a log of as many epochs, made-up scores."""
    explicit = {"loss": loss, "dataset": dataset, **QUICK, "seed": seed, "data_dir": "/home/me/data", **flags}
    args = train.resolve_flags(explicit)
    args["loss_args"] = [f"{key}={value}" for key, value in args["loss_args"].items()]
    environment = {"commit": "c0ffee", "python": "3.11.7", "torch": "2.9.0", "device": "cpu (x86_64)", "threads": 2}
    args |= {"explicit": explicit, "environment": environment, "num_classes": 150, "val_pids": [3, 5]}
    epochs = args["epochs"]
    log = [{"epoch": epoch, "loss": 4.0 / epoch, "lr": 3.5e-4, "seconds": seconds / epochs, "images_per_second": 210.0}
           for epoch in range(1, epochs + 1)]  # fmt: skip
    scores = {"rank1": rank1, "rank5": 0.8, "rank10": 0.9, "rank20": 0.95, "mAP": mAP, "mAP_trapezoid": mAP - 0.01}
    return {**scores, "mINP": 0.2, "num_queries": 600, "row": results_row(loss), "args": args, "log": log}


def results_row(loss):
    return re.sub(r"[0-9.e-]+\*", "", loss)


def save(folder, *runs):
    """The runs as files results/runs/NAME.json."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs):
        (folder / "runs" / f"{number:03}.json").write_text(json.dumps(results.compact(run)))
    return folder


def cells(table):
    """Rows of a markdown table by their first cell: {column: text}."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    header = lines[0]
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines[2:]}


# ---------------------------------------------------------------------------------------------------------- statistics


def test_interval_by_hand():
    """0.70 0.72 0.74: mean 0.72, s = 0.02, t(0.975, 2) = 4.302653: 4.302653 * 0.02 / sqrt(3) = 0.049683."""
    assert results.interval([0.70, 0.72, 0.74]) == pytest.approx((0.72, 0.0496828), rel=1e-5)


def test_one_value_has_no_interval():
    assert results.interval([0.7]) == (0.7, None)
    assert results.percent(0.7, None) == "70.0" and results.percent(0.7, 0.0123) == "70.0 ± 1.2"


def test_interval_holds_the_mean_in_95_of_100_draws():
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        mean, half = results.interval([draw.gauss(3, 2) for _ in range(4)])
        hits += abs(mean - 3) <= half
    assert 0.935 < hits / 2000 < 0.965


def test_paired_test_by_hand():
    """Differences 1, 2, 3: mean 2, s = 1, t = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    = 1 - sqrt(12 / 14) = 0.0741799."""
    assert results.paired_p([11, 22, 33], [10, 20, 30]) == pytest.approx(0.0741799, rel=1e-5)
    assert results.paired_p([10, 20, 30], [11, 22, 33]) == pytest.approx(0.0741799, rel=1e-5)


def test_paired_test_agrees_with_scipy():
    draw = random.Random(1)
    for n in (2, 3, 5, 9):
        first, second = ([draw.random() for _ in range(n)] for _ in range(2))
        assert results.paired_p(first, second) == pytest.approx(scipy.stats.ttest_rel(first, second).pvalue, rel=1e-9)


def test_paired_test_without_spread():
    assert results.paired_p([0.5, 0.25], [0.5, 0.25]) == 1.0
    assert results.paired_p([0.75, 0.5], [0.5, 0.25]) == 0.0


def test_holm_by_hand():
    """Sorted 0.005 0.01 0.03 0.04 times 4 3 2 1: 0.02 0.03 0.06 0.04, the last raised to the one before it."""
    assert results.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert results.holm([0.6, 0.7]) == [1.0, 1.0]
    assert results.holm([]) == []


def test_holm_rejects_what_the_step_down_rule_rejects():
    """Holm's rule as he put it: go up the sorted p values, reject while p <= level / (how many are left)."""
    draw = random.Random(2)
    for _ in range(300):
        p_values = [draw.random() ** 4 for _ in range(11)]
        rejected, left = set(), len(p_values)
        for index in sorted(range(len(p_values)), key=lambda i: p_values[i]):
            if p_values[index] > 0.05 / left:
                break
            rejected.add(index)
            left -= 1
        assert {i for i, p in enumerate(results.holm(p_values)) if p <= 0.05} == rejected


def test_summary_against_explicit_tests(tmp_path):
    """Best: triplet. Softmax shares seeds 0 to 2 with it, npair 1 and 2; two comparisons, the smaller p doubled."""
    scores = {"softmax": {0: 0.50, 1: 0.53, 2: 0.51}, "triplet": {0: 0.60, 1: 0.61, 2: 0.65}, "npair": {1: 0.6, 2: 0.6}}
    runs = [result(loss, seed, mAP) for loss, by_seed in scores.items() for seed, mAP in by_seed.items()]
    (rows,) = results.load_groups(save(tmp_path, *runs)).values()
    summary = {entry["row"]: entry for entry in results.summarise(rows)}
    assert list(summary) == ["softmax", "triplet", "npair"]  # the order of the table
    softmax = scipy.stats.ttest_rel([0.60, 0.61, 0.65], [0.50, 0.53, 0.51]).pvalue
    npair = scipy.stats.ttest_rel([0.61, 0.65], [0.6, 0.6]).pvalue
    assert softmax < npair
    assert [entry["best"] for entry in summary.values()] == [False, True, False]
    assert summary["softmax"]["p"] == pytest.approx(2 * softmax) and summary["triplet"]["p"] is None
    assert summary["npair"]["p"] == pytest.approx(max(npair, 2 * softmax))
    low, high = scipy.stats.t.interval(0.95, 2, loc=1.54 / 3, scale=scipy.stats.sem([0.50, 0.53, 0.51]))
    assert summary["softmax"]["mAP"] == pytest.approx((1.54 / 3, (high - low) / 2))


def test_a_loss_that_is_higher_on_the_common_seeds_is_not_called_lower(tmp_path):
    scores = {"softmax": [0.60, 0.61, 0.70, 0.70, 0.70], "triplet": [0.65, 0.661]}
    runs = [result(loss, seed, mAP) for loss, values in scores.items() for seed, mAP in enumerate(values)]
    (rows,) = results.load_groups(save(tmp_path, *runs)).values()
    softmax, triplet = results.summarise(rows)
    assert softmax["best"] and triplet["p"] < 0.05
    assert results.verdict(triplet).startswith("higher on common seeds, p = ")


def test_one_lucky_seed_is_not_the_best(tmp_path):
    runs = [result("softmax", 0, 0.5), result("softmax", 1, 0.52), result("arcface", 0, 0.9)]
    (rows,) = results.load_groups(save(tmp_path, *runs)).values()
    assert [entry["row"] for entry in results.summarise(rows) if entry["best"]] == ["softmax"]


# --------------------------------------------------------------------------------------------------------------- table


def test_published_numbers_and_order():
    """Column sums, added from the published table: a typing error would show."""
    assert tuple(results.PUBLISHED) == TWELVE
    for dataset, sums in {"market": (981.2, 767.9), "duke": (875.3, 654.6)}.items():
        assert [sum(row[dataset][i] for row in results.PUBLISHED.values()) for i in (0, 1)] == pytest.approx(sums)


def test_cells_of_a_group_with_several_seeds(tmp_path):
    runs = [result("softmax", seed, 0.50 + 0.01 * seed, 0.70 + 0.02 * seed) for seed in range(3)]
    runs += [result("arcface", seed, 0.60 + 0.01 * seed, 0.80, seconds=120) for seed in (0, 1, 4)]
    text = results.markdown_group(*results.load_groups(save(tmp_path, *runs)).popitem())
    table = cells(text)
    assert list(table) == ["softmax", "arcface"]
    assert table["softmax"]["rank-1"] == "72.0 ± 5.0" and table["softmax"]["mAP"] == "51.0 ± 2.5"
    assert table["softmax"]["n (seeds)"] == "3 (0-2)" and table["arcface"]["n (seeds)"] == "3 (0, 1, 4)"
    assert table["softmax"]["training time"] == "60 s" and table["arcface"]["training time"] == "2.0 min"
    assert table["arcface"]["mAP against the best"] == "best"
    assert table["softmax"]["mAP against the best"] == "lower, p < 0.001"  # common seeds 0 and 1: constant difference
    assert "1 comparisons with arcface" in text and "cpu (x86_64), 2 threads, torch 2.9.0" in text
    assert "not run" not in text and "published rank-1" not in table["softmax"]


def test_indistinguishable_losses_say_so(tmp_path):
    """Differences 0.01, -0.01, 0.02: t = 0.00667 / (0.01528 / sqrt(3)) = 0.756, p = 1 - t / sqrt(t^2 + 2) = 0.529."""
    runs = [result("softmax", seed, mAP) for seed, mAP in enumerate((0.50, 0.52, 0.50))]
    runs += [result("arcface", seed, mAP) for seed, mAP in enumerate((0.51, 0.51, 0.52))]
    table = cells(results.markdown_group(*results.load_groups(save(tmp_path, *runs)).popitem()))
    assert table["softmax"]["mAP against the best"] == "= best, p = 0.529"


def test_one_seed_says_that_nothing_can_be_said(tmp_path):
    text = results.markdown_group(*results.load_groups(save(tmp_path, result(), result("triplet"))).popitem())
    assert "neither an interval nor a test" in text
    assert cells(text)["softmax"]["mAP"] == "50.0" and "mAP against the best" not in cells(text)["softmax"]


def test_market_shows_all_rows_beside_the_published_numbers(tmp_path):
    text = results.markdown(results.load_groups(save(tmp_path, result("arcface", dataset="market"))))
    market, duke = text.split("**DukeMTMC-reID**")
    table = cells(market)
    assert list(table) == list(TWELVE)
    assert table["arcface"]["mAP"] == "50.0" and table["arcface"]["published mAP"] == "65.0"
    assert table["npair"]["rank-1"] == table["npair"]["mAP"] == "not run"
    assert (table["npair"]["published rank-1"], table["npair"]["published mAP"]) == ("79.8", "62.2")
    assert table["npair"]["command"] == "" and len(cells(duke)) == 12


def test_data_sets_that_nobody_ran_share_one_table(tmp_path):
    text = results.markdown(results.load_groups(save(tmp_path, result())))
    table = cells(text.split("**Market-1501 and DukeMTMC-reID**")[1])
    assert list(table) == list(TWELVE)
    row = table["sphereface"]
    assert row["Market-1501 mAP"] == row["DukeMTMC-reID rank-1"] == "not run"
    assert row["Market-1501 published rank-1"] == "86.2" and row["DukeMTMC-reID published mAP"] == "58.1"


def test_the_command_of_a_row_gives_that_run(tmp_path):
    run = result("softmax+0.01*center", seed=3, lr=1e-3, workers=2, loss_args=["center.alpha=0.25"])
    group = results.load_groups(save(tmp_path, run)).popitem()
    command = cells(results.markdown_group(*group))["softmax+center"]["command"].strip("`")
    assert "/home/me" not in command and "--workers" not in command
    words = shlex.split(command)
    assert words[:2] == ["python", "train.py"]
    explicit = vars(train.build_parser().parse_args(words[2:]))
    again = train.resolve_flags(explicit)
    wanted = {**run["args"], "loss_args": []}
    ignored = {"loss_args", "data_dir", "workers"}
    assert {k: v for k, v in again.items() if k not in ignored} == {k: wanted[k] for k in again.keys() - ignored}
    assert explicit["loss_args"] == ["center.alpha=0.25"]


def test_duration_and_seeds_in_words():
    assert [results.duration(s) for s in (45, 89, 90, 5399, 5400)] == ["45 s", "89 s", "1.5 min", "90.0 min", "1.5 h"]
    assert [results.seed_list(s) for s in ([4], [0, 1], [1, 2, 3], [0, 2, 3])] == ["4", "0, 1", "1-3", "0, 2, 3"]


# -------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    "flags",
    [{"recipe": "published"}, {"arch": "resnet34"}, {"epochs": 3}, {"width": 32}, {"amp": False}, {"lr": 0.1},
     {"synthetic_ids": 20}, {"eval_on": "val"}, {"metric": "euclidean"}, {"weights": "imagenet"}, {"p": 8},
     {"ignore_cameras": True}, {"loss_args": ["label_smoothing=0.1"]}, {"milestones": [1]}, {"dataset": "market"}],
    ids=lambda flags: next(iter(flags)),
)  # fmt: skip
def test_other_settings_are_other_groups(tmp_path, flags):
    groups = results.load_groups(save(tmp_path, result(), result(**flags)))
    assert len(groups) == 2 and all(len(rows) == 1 for rows in groups.values())


def test_a_written_loss_weight_is_a_group_of_its_own(tmp_path):
    runs = [result("softmax+center"), result("softmax+0.1*center")]
    groups = results.load_groups(save(tmp_path, *runs))
    assert len(groups) == 2 and any("--loss softmax+0.1*center" in setting for setting in groups)


def test_machine_and_seed_do_not_make_a_group(tmp_path):
    runs = [result(), result(seed=1, workers=1, device="cpu", eval_every=1, data_dir="/elsewhere")]
    (rows,) = results.load_groups(save(tmp_path, *runs)).values()
    assert list(rows["softmax"]) == [0, 1]


def test_the_setting_in_words():
    assert results.describe(result(lr=0.1)["args"]) == (
        "synthetic, 150 + 150 people, controlled recipe, resnet18, from scratch, 128x64, 2 epochs, bfloat16, --lr 0.1"
    )


def test_groups_start_with_market_and_the_controlled_recipe(tmp_path):
    runs = [result(recipe="published"), result(), result(dataset="duke"), result(dataset="market", p=8),
            result(dataset="market")]  # fmt: skip
    starts = [" ".join(setting.split()[:2]) for setting in results.load_groups(save(tmp_path, *runs))]
    assert [start.split(",")[0] for start in starts] == ["Market-1501"] * 2 + ["DukeMTMC-reID"] + ["synthetic"] * 2
    groups = list(results.load_groups(tmp_path))
    assert "--p 8" not in groups[0] and "controlled" in groups[3] and "published" in groups[4]


def test_runs_of_one_row_with_other_settings_are_refused(tmp_path):
    changed = result(seed=1)
    changed["args"]["loss_lr"] = 0.5  # the recipe's row was changed between the two
    with pytest.raises(ValueError, match="000.json and .*differ in loss_lr|001.json and .*differ in loss_lr"):
        results.load_groups(save(tmp_path, result(), changed))


def test_the_same_run_counts_once(tmp_path, capsys):
    (rows,) = results.load_groups(save(tmp_path, result(mAP=0.5), result(mAP=0.6, device="cpu"))).values()
    assert rows["softmax"][0]["mAP"] == 0.5
    assert "001.json is left out: the same run as" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- files


def strings(value):
    """Every string in a JSON value, keys too."""
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def test_collected_runs_are_small_and_name_no_machine(tmp_path):
    run_dir = tmp_path / "runs" / "market_softmax_s0"
    run_dir.mkdir(parents=True)
    run = result(dataset="market", epochs=60, weights="/home/me/resnet18.pth", eval_every=1)
    for line in run["log"]:
        line |= {key: 0.123456789 for key in ("rank1", "rank5", "mAP", "mINP")}
    (run_dir / "result.json").write_text(json.dumps(run))
    path = results.collect(run_dir, tmp_path / "results")
    assert path == tmp_path / "results/runs/market_softmax_s0.json" and path.stat().st_size < 10_000
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file
    kept = json.loads(path.read_text())
    assert not any("/home" in text for text in strings(kept))
    assert kept["args"]["weights"] == kept["args"]["explicit"]["weights"] == "resnet18.pth"
    assert kept["args"]["environment"] == run["args"]["environment"] and kept["args"]["explicit"]["eval_every"] == 1
    assert (kept["mAP"], kept["rank20"], kept["num_queries"], kept["row"]) == (0.5, 0.95, 600, "softmax")
    assert kept["seconds"] == pytest.approx(60.0) and len(kept["log"]) == 60
    assert kept["log"][2] == {"epoch": 3, "loss": 1.3333, "rank1": 0.1235, "mAP": 0.1235}
    assert results.compact(kept) == kept


def test_an_unfinished_run_is_not_collected(tmp_path):
    with pytest.raises(FileNotFoundError, match="only a finished run"):
        results.collect(tmp_path, tmp_path / "results")


def test_run_folders_are_read_as_they_are(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").write_text(json.dumps(result()))
    assert len(results.load_groups(tmp_path)) == 1


@pytest.mark.parametrize(
    "text, message",
    [("{", "not valid JSON"), ("[]", "not the result of a finished run"), ("{}", "not the result of a finished run"),
     (json.dumps({**result(), "mAP": None}), "mAP"), (json.dumps({**result(), "args": {"explicit": {}}}), "dataset")],
    ids=["cut", "list", "empty", "no mAP", "no flags"],
)  # fmt: skip
def test_broken_files_are_named(tmp_path, text, message):
    save(tmp_path, result())
    (tmp_path / "runs/broken.json").write_text(text)
    with pytest.raises(ValueError, match=f"broken.json.*{message}"):
        results.load_groups(tmp_path)


def test_folders_without_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no runs"):
        results.load_groups(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        results.load_groups(tmp_path / "absent")


def test_update_replaces_what_is_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    below = f"below {results.BEGIN} and {results.END}\n"
    readme.write_text(f"above <!-- end -->\n{results.BEGIN}\nold\n{results.END}\n{below}")
    for text in ("first\n", "second\n"):
        results.update(readme, text)
    assert readme.read_text() == f"above <!-- end -->\n{results.BEGIN}\nsecond\n{results.END}\n{below}"
    readme.write_text(f"{results.END} {results.BEGIN}")
    with pytest.raises(ValueError, match="<!-- results --> followed by <!-- end -->"):
        results.update(readme, "text")
    assert readme.read_text() == f"{results.END} {results.BEGIN}"


def test_csv_holds_the_same_numbers(tmp_path):
    runs = [result("softmax", seed, 0.50 + 0.01 * seed) for seed in range(3)]
    folder = save(tmp_path, *runs, *(result("arcface", seed, 0.6, dataset="duke") for seed in range(2)))
    results.main([str(folder), "--csv", str(tmp_path / "table.csv")])
    with open(tmp_path / "table.csv", newline="") as file:
        duke, synthetic = csv.DictReader(file)
    assert (duke["loss"], duke["n"], duke["published_rank1"], duke["published_mAP"]) == ("arcface", "2", "75.2", "54.3")
    assert synthetic["published_mAP"] == synthetic["p_against_best_holm"] == "" and synthetic["seeds"] == "0 1 2"
    assert float(synthetic["mAP"]) == pytest.approx(51.0)
    assert float(synthetic["mAP_half_interval"]) == pytest.approx(4.302653 / 3**0.5, rel=1e-4)
    assert float(synthetic["training_seconds"]) == 60 and synthetic["command"].startswith("python train.py --loss ")


def test_command_line_writes_what_is_asked_for(tmp_path, capsys):
    folder = save(tmp_path, result())
    text = results.markdown(results.load_groups(folder))
    results.main([str(folder)])
    assert capsys.readouterr().out.strip() == text.strip()
    (tmp_path / "README.md").write_text(f"{results.BEGIN}\n{results.END}\n")
    results.main([str(folder), "--markdown", str(tmp_path / "t.md"), "--update", str(tmp_path / "README.md")])
    assert capsys.readouterr().out == "" and (tmp_path / "t.md").read_text() == text
    assert (tmp_path / "README.md").read_text() == f"{results.BEGIN}\n{text}{results.END}\n"


def test_estimate_says_what_it_is_based_on(tmp_path):
    runs = {"synthetic_softmax_s0_quick": 100.0, "synthetic_softmax_s1_quick": 200.0,
            "synthetic_multi_similarity_s0_quick": 30.0, "synthetic_softmax_s0": 1e6}  # fmt: skip
    (tmp_path / "runs").mkdir()
    for name, seconds in runs.items():
        (tmp_path / f"runs/{name}.json").write_text(json.dumps(results.compact(result(seconds=seconds))))
    # the same loss: mean 150 s and 30 s; another loss of that setting: mean of all three, 110 s
    same = [f"synthetic_{loss}_s7_quick" for loss in ("softmax", "multi_similarity", "sphereface_m1")]
    assert "3 runs, about 4.8 min" in results.estimate(same, tmp_path)
    assert "3 by finished runs" in results.estimate(same, tmp_path) and "assum" not in results.estimate(same, tmp_path)
    other = results.estimate(["market_softmax_s0", "market_softmax_s0_quick"], tmp_path)
    assert "about 23.0 min" in other and other.count("1 by assumption") == 2 and "finished" not in other


# -------------------------------------------------------------------------------------------------------------- figure


def test_figure_shows_the_means(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = [result(loss, seed, 0.4 + 0.1 * seed) for loss in ("softmax", "arcface") for seed in (0, 1)]
    for run in runs[:3]:  # the last was not scored after its first epoch
        run["log"][0] |= {"rank1": 0.3, "mAP": 0.2 + 0.1 * run["args"]["seed"]}
    folder = save(tmp_path, *runs, result("triplet", recipe="published"))
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    results.main([str(folder), "--figure", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    axes = pyplot.gcf().axes
    assert len(axes) == 6  # two groups
    scores, losses, curves = axes[:3]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["softmax (n = 2)", "arcface (n = 2)"]
    bar = scores.containers[0]
    assert bar.lines[0].get_xdata()[0] == pytest.approx(45.0)
    left, right = bar.lines[2][0].get_segments()[0][:, 0]
    assert right - left == pytest.approx(2 * 12.7062 * 10 / 2, rel=1e-4)  # t(0.975, 1) s / sqrt(2), s = 10 / sqrt(2)
    assert losses.lines[0].get_xydata().tolist() == [[1, 1.0], [2, 0.5]]
    assert curves.lines[0].get_xydata().tolist() == [pytest.approx([1, 25.0]), pytest.approx([2, 45.0])]
    assert curves.lines[1].get_xydata().tolist() == [pytest.approx([1, 20.0]), pytest.approx([2, 40.0])]  # seed 0 only
    pyplot.switch_backend("agg")  # closes the figures


def test_figure_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        results.main([str(save(tmp_path, result())), "--figure", str(tmp_path / "figure.png")])


# -------------------------------------------------------------------------------------------------- what is checked in


def test_the_readme_shows_the_table_of_the_runs_in_results():
    """If this fails: python -m utils.results results/ --update README.md"""
    text = (ROOT / "README.md").read_text()
    assert results.BEGIN in text, "README.md needs the two markers around its table"
    shown = text.partition(results.BEGIN)[2].partition(results.END)[0]
    assert shown.strip() == results.markdown(results.load_groups(ROOT / "results")).strip()


def test_checked_in_runs_are_compact_and_can_be_repeated():
    paths = results.find_runs(ROOT / "results")
    assert paths, "no runs in results/runs: the README's table needs them"
    for path in paths:
        run = json.loads(path.read_text())
        assert path.stat().st_size < 10_000 and results.compact(run) == run, path
        assert not any(re.match(r"(/|[A-Za-z]:\\)", text) for text in strings(run)), path
        words = shlex.split(results.command(run))[2:]
        again = train.resolve_flags(vars(train.build_parser().parse_args(words)))
        for key in ("loss", "loss_lr", "dataset", "recipe", "arch", "height", "width", "epochs", "amp", "seed", "lr"):
            assert again[key] == run["args"][key], f"{path}: the recipe's {key} has changed since: run it again"
        for key, value in again["loss_args"].items():
            if not str(value).endswith("/steps"):  # worked out when the number of steps is known
                assert f"{key}={value!r}" in run["args"]["loss_args"], f"{path}: the recipe's {key} has changed since"
