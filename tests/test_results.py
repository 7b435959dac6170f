"""The results table: its statistics by hand and against slow forms, which runs it sets side by side, and its files."""

import csv
import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats

from data import reader_options
from losses import TWELVE, all_arguments, row_name
from utils import figure, results
from utils.errors import UserError
from utils.flags import DEFAULTS, FREE, WORKED_OUT, build_parser, new_run, work_out
from utils.runs import collect, compact, describe, load_groups, own_flags
from utils.statistics import holm, interval, paired_p

ROOT = Path(__file__).resolve().parent.parent


def result(loss="softmax", seed=0, mAP=0.5, rank1=0.7, dataset="synthetic", seconds=60.0, titles=None, **flags):
    """What train.py writes: its own flags, a log of as many epochs, made-up scores."""
    explicit = {"loss": loss, "dataset": dataset, "seed": seed, "data_dir": "/home/me/data", **flags}
    args = work_out(new_run(explicit), 39 * 5, 100)
    environment = {"commit": "c0ffee", "python": "3.11.7", "torch": "2.9.0", "device": "cpu (x86_64)", "threads": 2}
    args |= {"environment": environment, "num_classes": 150, "val_pids": [3, 5], "notes": ["/home/me/data: a folder"]}
    args |= {"titles": titles} if titles else {}
    epochs = args["epochs"]
    log = [{"epoch": epoch, "loss": 4.0 / epoch, "lr": 3.5e-4, "seconds": seconds / epochs, "images_per_second": 210.0}
           for epoch in range(1, epochs + 1)]  # fmt: skip
    scores = {"rank1": rank1, "rank5": 0.8, "rank10": 0.9, "rank20": 0.95, "mAP": mAP, "mAP_trapezoid": mAP - 0.01}
    return {**scores, "mINP": 0.2, "num_queries": 600, "row": row_name(loss), "args": args, "log": log}


def older(run, *keys):
    """The same run by a version that had not these flags yet."""
    return {**run, "args": {key: value for key, value in run["args"].items() if key not in keys}}


def save(folder, *runs):
    """The runs as files FOLDER/runs/NAME.json."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs):
        (folder / "runs" / f"{number:03}.json").write_text(json.dumps(compact(run)))
    return folder


def groups_of(folder, *runs):
    return load_groups(save(folder, *runs))


def one_group(folder, *runs):
    """Rows of runs that must fall into one group."""
    (rows,) = groups_of(folder, *runs).values()
    return rows


def table_of(folder, *runs):
    """The markdown of runs that must fall into one group."""
    ((setting, rows),) = groups_of(folder, *runs).items()
    return results.markdown_group(setting, rows)


def seeds_of(loss, values, **flags):
    """A run for each value of mAP, with the seeds 0, 1, ..."""
    return [result(loss, seed, mAP, **flags) for seed, mAP in enumerate(values)]


def cells(text):
    """The rows of all tables of a markdown text, by their first cell: {column: text}."""
    found, header = {}, None
    for line in text.splitlines():
        line = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else None
        if line and header and not set(line[0]) <= set(":-"):
            found[line[0]] = dict(zip(header, line, strict=True))
        header = (header or line) if line else None
    return found


# ---------------------------------------------------------------------------------------------------------- statistics


def test_interval_by_hand():
    """0.70 0.72 0.74: mean 0.72, s = 0.02, t(0.975, 2) = 4.302653: 4.302653 * 0.02 / sqrt(3) = 0.049683."""
    assert interval([0.70, 0.72, 0.74]) == pytest.approx((0.72, 0.0496828), rel=1e-5)


def test_one_value_has_no_interval():
    assert interval([0.7]) == (0.7, None)
    assert results.percent(0.7, None) == "70.0" and results.percent(0.7, 0.0123) == "70.0 ± 1.2"


def test_interval_holds_the_mean_in_95_of_100_draws():
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        mean, half = interval([draw.gauss(3, 2) for _ in range(4)])
        hits += abs(mean - 3) <= half
    assert 0.935 < hits / 2000 < 0.965


def test_paired_test_by_hand():
    """Differences 1, 2, 3: mean 2, s = 1, t = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    = 1 - sqrt(12 / 14) = 0.0741799."""
    assert paired_p([11, 22, 33], [10, 20, 30]) == pytest.approx(0.0741799, rel=1e-5)
    assert paired_p([10, 20, 30], [11, 22, 33]) == pytest.approx(0.0741799, rel=1e-5)


def test_paired_test_agrees_with_scipy():
    draw = random.Random(1)
    for n in (2, 3, 5, 9):
        first, second = ([draw.random() for _ in range(n)] for _ in range(2))
        assert paired_p(first, second) == pytest.approx(scipy.stats.ttest_rel(first, second).pvalue, rel=1e-9)


def test_paired_test_without_spread():
    assert paired_p([0.5, 0.25], [0.5, 0.25]) == 1.0
    assert paired_p([0.75, 0.5], [0.5, 0.25]) == 0.0


def test_holm_by_hand():
    """Sorted 0.005 0.01 0.03 0.04 times 4 3 2 1: 0.02 0.03 0.06 0.04, the last raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


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
        assert {i for i, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


def test_summary_against_explicit_tests(tmp_path):
    """Best: triplet. Softmax shares seeds 0 to 2 with it, npair 1 and 2; two comparisons, the smaller p doubled."""
    scores = {"softmax": {0: 0.50, 1: 0.53, 2: 0.51}, "triplet": {0: 0.60, 1: 0.61, 2: 0.65}, "npair": {1: 0.6, 2: 0.6}}
    runs = [result(loss, seed, mAP) for loss, by_seed in scores.items() for seed, mAP in by_seed.items()]
    summary = {entry["row"]: entry for entry in results.summarise(one_group(tmp_path, *runs))}
    assert list(summary) == ["softmax", "triplet", "npair"]  # the order of the table
    softmax = scipy.stats.ttest_rel([0.60, 0.61, 0.65], [0.50, 0.53, 0.51]).pvalue
    npair = scipy.stats.ttest_rel([0.61, 0.65], [0.6, 0.6]).pvalue
    assert softmax < npair
    assert [entry["best"] for entry in summary.values()] == [False, True, False]
    assert summary["softmax"]["p"] == pytest.approx(2 * softmax) and summary["triplet"]["p"] is None
    assert summary["npair"]["p"] == pytest.approx(max(npair, 2 * softmax))
    low, high = scipy.stats.t.interval(0.95, 2, loc=1.54 / 3, scale=scipy.stats.sem([0.50, 0.53, 0.51]))
    assert summary["softmax"]["mAP"] == pytest.approx((1.54 / 3, (high - low) / 2))


def test_later_losses_have_a_correction_of_their_own(tmp_path):
    """Two published losses beside the best of them, one later loss: p doubled for the former, as it is for the latter.
    A later loss is compared with the best published one, and is never the best itself."""
    scores = {"softmax": [0.50, 0.53, 0.51], "npair": [0.52, 0.52, 0.50], "arcface": [0.60, 0.61, 0.65]}
    scores |= {"circle": [0.70, 0.68, 0.71]}
    runs = [run for loss, values in scores.items() for run in seeds_of(loss, values)]
    summary = {entry["row"]: entry for entry in results.summarise(one_group(tmp_path, *runs))}
    p = {row: scipy.stats.ttest_rel(scores["arcface"], scores[row]).pvalue for row in ("softmax", "npair", "circle")}
    first, second = sorted((p["softmax"], p["npair"]))
    assert summary["circle"]["p"] == pytest.approx(p["circle"]) and summary["circle"]["higher"]
    found = sorted(summary[row]["p"] for row in ("softmax", "npair"))
    assert found == pytest.approx([2 * first, max(second, 2 * first)])
    assert [row for row, entry in summary.items() if entry["best"]] == ["arcface"]
    assert {row: entry["comparisons"] for row, entry in summary.items()} == {
        "softmax": 2, "npair": 2, "arcface": 2, "circle": 1}  # fmt: skip


def test_later_losses_alone_are_compared_with_the_best_of_them(tmp_path):
    runs = [*seeds_of("circle", [0.5, 0.6]), *seeds_of("supcon", [0.7, 0.71])]
    summary = results.summarise(one_group(tmp_path, *runs))
    assert [entry["row"] for entry in summary if entry["best"]] == ["supcon"]


@pytest.mark.parametrize(
    "p, higher, words",
    [
        (0.5291, False, "not shown to be lower, p = 0.529"),
        (0.5291, True, "not shown to be higher, p = 0.529"),
        (0.05, False, "not shown to be lower, p = 0.050"),
        (0.0499, False, "lower, p = 0.050"),
        (0.0021, True, "higher, p = 0.002"),
        (0.0009, False, "lower, p < 0.001"),
        (None, False, "no test"),
    ],
)
def test_a_verdict_claims_what_was_tested(p, higher, words):
    assert results.verdict({"best": False, "p": p, "higher": higher}) == words
    assert results.verdict({"best": True, "p": None, "higher": False}) == "highest mean"


def test_a_loss_that_is_higher_on_the_common_seeds_is_not_called_lower(tmp_path):
    runs = [*seeds_of("softmax", [0.60, 0.61, 0.70, 0.70, 0.70]), *seeds_of("triplet", [0.65, 0.661])]
    softmax, triplet = results.summarise(one_group(tmp_path, *runs))
    assert softmax["best"] and triplet["p"] < 0.05
    assert results.verdict(triplet).startswith("higher, p = ")


def test_one_lucky_seed_is_not_the_best(tmp_path):
    runs = [*seeds_of("softmax", [0.5, 0.52]), result("arcface", 0, 0.9)]
    assert [entry["row"] for entry in results.summarise(one_group(tmp_path, *runs)) if entry["best"]] == ["softmax"]


# --------------------------------------------------------------------------------------------------------------- table


def test_published_numbers_and_order():
    """Column sums, added from the published table: a typing error would show."""
    assert tuple(results.PUBLISHED) == TWELVE
    for dataset, sums in {"market": (981.2, 767.9), "duke": (875.3, 654.6)}.items():
        assert [sum(row[dataset][i] for row in results.PUBLISHED.values()) for i in (0, 1)] == pytest.approx(sums)


def test_cells_of_a_group_with_several_seeds(tmp_path):
    runs = [result("softmax", seed, 0.50 + 0.01 * seed, 0.70 + 0.02 * seed) for seed in range(3)]
    runs += [result("arcface", seed, 0.60 + 0.01 * seed, 0.80, seconds=120) for seed in (0, 1, 4)]
    text = table_of(tmp_path, *runs)
    table = cells(text)
    assert list(table) == ["softmax", "arcface"]
    assert table["softmax"]["rank-1"] == "72.0 ± 5.0" and table["softmax"]["mAP"] == "51.0 ± 2.5"
    assert table["softmax"]["n (seeds)"] == "3 (0-2)" and table["arcface"]["n (seeds)"] == "3 (0, 1, 4)"
    assert table["softmax"]["training time"] == "60 s" and table["arcface"]["training time"] == "2.0 min"
    assert table["arcface"]["mAP against the highest"] == "highest mean"
    assert table["softmax"]["mAP against the highest"] == "lower, p < 0.001"  # seeds 0 and 1: constant difference
    assert "Compared with arcface: 1 published losses." in text
    assert "cpu (x86_64), 2 threads, torch 2.9.0" in text and "n = 1" not in text
    assert "not run" not in text and "published rank-1" not in table["softmax"]


def test_losses_that_are_not_told_apart_are_not_called_equal(tmp_path):
    """Differences 0.01, -0.01, 0.02: t = 0.00667 / (0.01528 / sqrt(3)) = 0.756, p = 1 - t / sqrt(t^2 + 2) = 0.529."""
    text = table_of(tmp_path, *seeds_of("softmax", (0.50, 0.52, 0.50)), *seeds_of("arcface", (0.51, 0.51, 0.52)))
    assert cells(text)["softmax"]["mAP against the highest"] == "not shown to be lower, p = 0.529"
    whole = results.markdown(load_groups(tmp_path))
    assert '"not shown to be lower" is no proof of being equal' in whole
    assert "The highest of several means is chosen by the same seeds that it is tested with" in whole


def test_later_and_other_losses_stand_in_parts_of_their_own(tmp_path):
    runs = [run for loss in ("circle", "center", "softmax", "arcface") for run in seeds_of(loss, (0.5, 0.6))]
    text = table_of(tmp_path, *runs)
    first, later = text.split("Later losses:")
    later, others = later.split("Other losses:")
    assert [list(cells(part)) for part in (first, later, others)] == [["softmax", "arcface"], ["circle"], ["center"]]
    assert "Compared with softmax: 1 published losses, 1 later losses, 1 other losses." in text


def test_one_seed_says_that_nothing_can_be_said(tmp_path):
    text = table_of(tmp_path, result(), result("triplet"))
    assert "neither an interval nor a test" in text
    assert cells(text)["softmax"]["mAP"] == "50.0" and "mAP against the highest" not in cells(text)["softmax"]


def test_market_shows_all_rows_beside_the_published_numbers(tmp_path):
    text = results.markdown(groups_of(tmp_path, result("arcface", dataset="market")))
    market, duke = text.split("**DukeMTMC-reID**")
    table = cells(market)
    assert list(table) == list(TWELVE)
    assert table["arcface"]["mAP"] == "50.0" and table["arcface"]["published mAP"] == "65.0"
    assert table["npair"]["rank-1"] == table["npair"]["mAP"] == "not run"
    assert (table["npair"]["published rank-1"], table["npair"]["published mAP"]) == ("79.8", "62.2")
    assert len(cells(duke)) == 12


def test_an_incomplete_copy_is_named_and_stands_beside_no_published_number(tmp_path):
    """It is another group than a complete copy, and shows what was run only."""
    titles = {"market": "Market-1501 (incomplete)"}
    groups = groups_of(tmp_path, result(dataset="market"), result(dataset="market", titles=titles),
                       result(dataset="duke", titles={"duke": "DukeMTMC-reID"}))  # fmt: skip
    whole, partial, duke = (results.markdown_group(*group) for group in groups.items())
    assert partial.startswith("**Market-1501 (incomplete), controlled recipe") and list(cells(partial)) == ["softmax"]
    assert "published mAP" not in cells(partial)["softmax"] and "not run" not in partial
    assert whole.startswith("**Market-1501, ") and duke.startswith("**DukeMTMC-reID, ")
    assert all("published mAP" in cells(text)["softmax"] for text in (whole, duke))
    save(tmp_path / "other", result(dataset="market", titles=titles))
    text = results.markdown(load_groups(tmp_path / "other"))
    assert "**Market-1501 and DukeMTMC-reID**" in text  # the complete ones were not run
    text = results.markdown(groups_of(tmp_path / "val", result(dataset="market", eval_on="val")))
    assert "**Market-1501 and DukeMTMC-reID**" in text  # nor were their test people scored


def test_several_data_sets_are_a_group_of_their_own(tmp_path):
    titles = {"market": "Market-1501", "msmt17": "MSMT17 V2"}
    text = table_of(tmp_path, result(dataset="market+msmt17", titles=titles))
    assert text.startswith("**Market-1501 + MSMT17 V2, controlled recipe") and list(cells(text)) == ["softmax"]
    assert "published" not in text and "--dataset market+msmt17" in text
    assert "mean of the test sets" in text and "mean of the test sets" not in table_of(tmp_path / "one", result())
    text = table_of(tmp_path / "other", result(dataset="market+duke"))
    assert text.startswith("**Market-1501 + DukeMTMC-reID, ") and "published" not in text


def test_data_sets_that_nobody_ran_share_one_table(tmp_path):
    text = results.markdown(groups_of(tmp_path, result())).split("**Market-1501 and DukeMTMC-reID**")[1]
    assert list(cells(text)) == list(TWELVE)
    (line,) = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("| sphereface ")]
    assert line == ["sphereface", "not run", "not run", "86.2", "70.0", "not run", "not run", "76.0", "58.1"]


@pytest.mark.parametrize(
    "flags",
    [
        {"loss": "softmax+0.01*center", "lr": 1e-3, "workers": 2, "loss_args": ["center.alpha=0.25"]},
        {"loss": "sphereface", "recipe": "published", "dataset": "market", "amp": True},
        {"loss": "sphereface", "epochs": 7, "tf32": False, "milestones": []},
        {"loss": "circle", "sampler": "random", "batch_size": 9, "random_crop": True, "synthetic_ids": 20},
    ],
    ids=["weight", "published", "steps", "sampler"],
)
def test_the_command_of_a_row_gives_that_run(flags):
    run = result(seed=3, **flags)
    words = shlex.split(results.command(run["args"]))
    assert words[:2] == ["python", "train.py"] and not {"--workers", "--data-dir"} & {*words}
    again = work_out(new_run(vars(build_parser().parse_args(words[2:]))), 39 * 5, 100)
    assert {k: again[k] for k in DEFAULTS.keys() - {*FREE}} == {k: run["args"][k] for k in DEFAULTS.keys() - {*FREE}}
    assert again["loss"] == run["args"]["loss"] and sorted(again["loss_args"]) == sorted(run["args"]["loss_args"])


def test_the_caption_says_how_a_row_is_run(tmp_path):
    runs = [result(loss, seed=4, epochs=9, data_dir="/home/me") for loss in ("arcface", "softmax")]
    for number, loss in [(1, "arcface"), (2, "LOSS")]:
        text = table_of(tmp_path / loss, *runs[:number])
        assert f"A row: `python train.py --loss {loss} --dataset synthetic --epochs 9 --seed 0`." in text


def test_duration_and_seeds_in_words():
    assert [results.duration(s) for s in (45, 89, 90, 5399, 5400)] == ["45 s", "89 s", "1.5 min", "90.0 min", "1.5 h"]
    assert [results.seed_list(s) for s in ([4], [0, 1], [1, 2, 3], [0, 2, 3])] == ["4", "0, 1", "1-3", "0, 2, 3"]


# -------------------------------------------------------------------------------------------------------------- groups

SETTINGS = [
    {"recipe": "published"}, {"arch": "resnet34"}, {"epochs": 3}, {"width": 32}, {"amp": True}, {"lr": 0.1},
    {"synthetic_ids": 20}, {"synthetic_seed": 1}, {"eval_on": "val"}, {"metric": "euclidean"}, {"weights": "imagenet"},
    {"p": 8}, {"ignore_cameras": True}, {"loss_args": ["label_smoothing=0.1"]}, {"milestones": [1]}, {"tf32": True},
    {"tf32": False}, {"compile": True}, {"deterministic": True}, {"loss_lr": 0.5}, {"skip_bad_images": True},
    {"sampler": "random"}, {"random_crop": True}, {"dataset": "market"}, {"dataset": "market+duke"},
]  # fmt: skip


@pytest.mark.parametrize("flags", SETTINGS, ids=lambda flags: "-".join(map(str, *flags.items())))
def test_other_settings_are_other_groups(tmp_path, flags):
    groups = groups_of(tmp_path, result(), result(**flags))
    assert len(groups) == 2 and all(len(rows) == 1 for rows in groups.values())


@pytest.mark.parametrize("key", [key for key, value in DEFAULTS.items() if isinstance(value, int | float)
                                 and key not in reader_options()])  # fmt: skip
def test_every_number_and_switch_makes_a_group_unless_it_changes_no_number(key):
    """Also one that is new: its value is made up here."""
    args = result()["args"]
    value = not args[key] if isinstance(args[key], bool) else args[key] * 1.5 + 1
    own = own_flags({**args, key: type(args[key])(value)})
    assert (key in own) == (key not in (*FREE, "seed"))


def test_a_written_loss_weight_is_a_group_of_its_own(tmp_path):
    groups = groups_of(tmp_path, result("softmax+center"), result("softmax+0.1*center"))
    assert len(groups) == 2 and any("--loss 'softmax+0.1*center'" in str(setting) for setting in groups)


def test_machine_and_seed_do_not_make_a_group(tmp_path):
    changed = {"workers": 1, "device": "cpu", "eval_every": 1, "data_dir": "/else", "cache": "off", "save_every": 0}
    assert changed.keys() <= {*FREE}
    assert list(one_group(tmp_path, result(), result(seed=1, **changed))["softmax"]) == [0, 1]


@pytest.mark.parametrize("recipe", ["controlled", "published"])
@pytest.mark.parametrize("loss", ["softmax", "sphereface", "cosface", "softmax+center", "circle"])
def test_flags_that_say_what_the_recipe_says_change_nothing(tmp_path, loss, recipe):
    """A run with the quick setting typed in full, and one that left it to the recipe, beside another loss, to which
    the recipe gives other numbers."""
    quick = {"arch": "resnet18", "weights": "none", "height": 128, "width": 64, "epochs": 5, "milestones": [4]}
    rows = one_group(tmp_path, result(loss, recipe=recipe), result(loss, seed=1, recipe=recipe, **quick),
                     result("arcface", recipe=recipe))  # fmt: skip
    assert list(rows[loss]) == [0, 1] and list(rows["arcface"]) == [0]


def test_milestones_that_follow_from_other_epochs_are_the_recipes_own(tmp_path):
    """With 12 epochs, published keeps its milestones and controlled derives them: neither is a flag of its own."""
    for recipe, milestones in [("published", [20, 40]), ("controlled", [4, 8])]:
        run = result(dataset="market", recipe=recipe, epochs=12)
        assert run["args"]["milestones"] == milestones
        assert own_flags(run["args"]) == {"epochs": 12}
        assert "--milestones" not in str(describe(run["args"]))


def test_a_number_by_steps_is_no_setting_of_its_own(tmp_path):
    """Of another number of steps, as another data set has it; a number that was typed is one."""
    other = result("sphereface", seed=1)
    before = other["args"]["loss_args"]
    other["args"]["loss_args"] = [pair.replace("lambda_gamma=", "lambda_gamma=9") for pair in before]
    assert other["args"]["loss_args"] != before
    assert list(one_group(tmp_path, result("sphereface"), other)["sphereface"]) == [0, 1]
    short = result("sphereface", loss_args=["lambda_gamma=0.5"])
    assert "--loss-args sphereface.lambda_gamma=0.5" in str(describe(short["args"]))
    typed = result("sphereface", loss_args=["sphereface.lambda_gamma=0.5"])
    assert len(groups_of(tmp_path / "other", result("sphereface"), typed)) == 2


def test_a_flag_that_an_older_run_lacks_counts_as_its_default(tmp_path):
    new = ("tf32", "deterministic", "compile", "synthetic_seed", "save_every", "split_seed", "skip_bad_images")
    assert {*new} <= DEFAULTS.keys()
    assert list(one_group(tmp_path, result(), older(result(seed=1), *new))["softmax"]) == [0, 1]
    assert len(groups_of(tmp_path / "other", result(deterministic=True), older(result(seed=1), *new))) == 2


def test_checked_in_runs_and_new_plain_ones_share_a_cell(tmp_path):
    """The recorded runs typed their flags; the same runs without flags belong to the same rows."""
    kept = json.loads((ROOT / "results/runs/synthetic_arcface_s0_quick.json").read_text(encoding="utf-8"))
    assert len(kept["args"]["explicit"]) > 3
    rows = one_group(tmp_path, kept, result("arcface", seed=77))
    assert list(rows["arcface"]) == [0, 77]


def test_the_setting_in_words():
    assert str(describe(result(lr=0.1, amp=True)["args"])) == (
        "synthetic, 150 + 150 people, controlled recipe, resnet18, from scratch, 128x64, 5 epochs, bfloat16, --lr 0.1"
    )
    run = result(dataset="market", eval_on="val", compile=True, tf32=False)
    assert str(describe(run["args"])) == (
        "Market-1501, scored on held-out training identities, controlled recipe, resnet50, ImageNet weights, 256x128, "
        "60 epochs, --no-tf32, --compile"
    )


def test_checkpoints_of_two_runs_are_two_settings(tmp_path):
    """Every run's file is called last.pt; of other files the name alone counts, wherever they lie."""
    one, two = (result(weights=f"/somewhere/runs/{name}/last.pt", seed=seed) for seed, name in enumerate(("a", "b")))
    assert len(groups_of(tmp_path / "1", one, two)) == 2 and ", a/last.pt," in str(describe(compact(one)["args"]))
    one, two = (result(weights=f"/{place}/r18.pth", seed=seed) for seed, place in enumerate(("a", "b")))
    assert len(groups_of(tmp_path / "2", one, two)) == 1


def test_groups_start_with_market_and_the_controlled_recipe(tmp_path):
    runs = [result(recipe="published"), result(), result(dataset="duke"), result(dataset="market", p=8),
            result(dataset="market")]  # fmt: skip
    groups = list(map(str, groups_of(tmp_path, *runs)))
    starts = [setting.split(",")[0] for setting in groups]
    assert starts == ["Market-1501"] * 2 + ["DukeMTMC-reID"] + ["synthetic"] * 2
    assert "--p 8" not in groups[0] and "controlled" in groups[3] and "published" in groups[4]


def test_a_reader_that_has_seen_enough(tmp_path):
    """As `| head`: neither a traceback nor a sentence."""
    words = [sys.executable, "-m", "utils.results", str(ROOT / "results")]
    with open(tmp_path / "error", "w") as error:
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=error)
        process.stdout.close()
        assert process.wait(60) == 0
    assert not (tmp_path / "error").read_text()


def test_the_same_run_counts_once(tmp_path, capsys):
    rows = one_group(tmp_path, result(mAP=0.5), result(mAP=0.6, workers=1))
    assert rows["softmax"][0]["mAP"] == 0.5
    assert "001.json is left out: it has the flags of " in capsys.readouterr().err


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
    path = collect(run_dir, tmp_path / "results")
    assert path == tmp_path / "results/runs/market_softmax_s0.json" and path.stat().st_size < 10_000
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file
    kept = json.loads(path.read_text())
    assert not any("/home" in text for text in strings(kept)) and "val_pids" not in kept["args"]
    assert kept["args"]["weights"] == kept["args"]["explicit"]["weights"] == "resnet18.pth"
    assert kept["args"]["environment"] == run["args"]["environment"] and kept["args"]["explicit"]["eval_every"] == 1
    assert (kept["mAP"], kept["rank20"], kept["num_queries"], kept["row"]) == (0.5, 0.95, 600, "softmax")
    assert kept["seconds"] == pytest.approx(60.0) and len(kept["log"]) == 60
    assert kept["log"][2] == {"epoch": 3, "loss": 1.3333, "rank1": 0.1235, "mAP": 0.1235}
    assert compact(kept) == kept


def test_an_unfinished_run_is_not_collected(tmp_path):
    with pytest.raises(ValueError, match="only a finished run"):
        collect(tmp_path, tmp_path / "results")


def test_run_folders_are_read_as_they_are(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").write_text(json.dumps(result()))
    assert len(load_groups(tmp_path)) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda run: "{", "can't be read as a run"),
        (lambda run: "[]", "not the result of a finished run"),
        (lambda run: "{}", "not the result of a finished run"),
        (lambda run: b"\xff\xfe", "can't be read as a run"),
        (lambda run: {**run, "mAP": None}, "mAP"),
        (lambda run: {**run, "args": {"explicit": {}}}, "loss"),
    ],
    ids=["cut", "list", "empty", "bytes", "no mAP", "no flags"],
)
def test_broken_files_are_named(tmp_path, change, message):
    save(tmp_path, result())
    content = change(result())
    content = json.dumps(content) if isinstance(content, dict) else content
    path = tmp_path / "runs/broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"broken.json.*{message}.*: remove it") as caught:
        load_groups(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_runs_of_what_is_no_longer_there_stop_nothing(tmp_path, capsys):
    """A loss, a data set, a recipe of a branch that was never merged, say."""
    runs = [result() for _ in range(4)]
    for run, (key, value) in zip(runs[1:], [("loss", "gone"), ("dataset", "gone"), ("recipe", "gone")], strict=True):
        run["args"][key] = value
    assert list(one_group(tmp_path, *runs)) == ["softmax"]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is left out: ")[0][-8:] for line in said] == ["001.json", "002.json", "003.json"]
    assert all("gone" in line for line in said)


def test_folders_without_runs(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="holds no finished runs"):
            load_groups(folder)


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
    assert synthetic["published_mAP"] == synthetic["p_against_highest_holm"] == "" and synthetic["seeds"] == "0 1 2"
    assert float(synthetic["mAP"]) == pytest.approx(51.0)
    assert float(synthetic["mAP_half_interval"]) == pytest.approx(4.302653 / 3**0.5, rel=1e-4)
    assert float(synthetic["training_seconds"]) == 60 and synthetic["command"].startswith("python train.py --loss ")


def test_command_line_writes_what_is_asked_for(tmp_path, capsys):
    folder = save(tmp_path, result())
    text = results.markdown(load_groups(folder))
    results.main([str(folder)])
    assert capsys.readouterr().out.strip() == text.strip()
    (tmp_path / "README.md").write_text(f"{results.BEGIN}\n{results.END}\n")
    results.main([str(folder), "--update", str(tmp_path / "README.md")])
    assert capsys.readouterr().out == ""
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == f"{results.BEGIN}\n{text}{results.END}\n"


def test_collecting_runs_by_the_command_line(tmp_path, capsys, monkeypatch):
    """What maintainers do with finished runs; nothing else writes there."""
    monkeypatch.chdir(tmp_path)
    for name, run in (("a", result()), ("b", result("triplet"))):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "result.json").write_text(json.dumps(run))
    results.main(["--collect", "runs/a", "runs/b", "--into", "kept"])
    assert capsys.readouterr().out.split() == ["kept/runs/a.json", "kept/runs/b.json"]
    results.main([])
    own = capsys.readouterr().out
    results.main(["kept"])
    assert capsys.readouterr().out == own and "| triplet" in own


# -------------------------------------------------------------------------------------------------------------- figure


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws runs with some flags; the panels."""
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    made, new = [], figure.new_figure
    monkeypatch.setattr(figure, "new_figure", lambda *size: made.append(new(*size)) or made[-1])

    def draw(runs, *flags):
        path = tmp_path / "figure.png"
        figure.main([str(save(tmp_path, *runs)), "--out", str(path), *flags])
        assert path.read_bytes().startswith(b"\x89PNG")
        return made[-1].axes

    return draw


def test_figure_shows_means_by_kind_of_loss(drawn):
    """The highest mean of a kind first, hollow what was shown to be lower; a setting with one seed is left out."""
    scores = {"softmax": (0.4, 0.5), "arcface": (0.5, 0.6001), "npair": (0.1, 0.2001), "center": (0.45, 0.5)}
    runs = [run for loss, values in scores.items() for run in seeds_of(loss, values)]
    (axis,) = drawn([*runs, result("triplet", recipe="published")])
    labels = axis.get_yticklabels()
    rows = ["classifiers", "arcface (n = 2)", "softmax (n = 2)", "pairs", "npair (n = 2)", "others", "center (n = 2)"]
    assert [label.get_text() for label in labels] == rows
    colours = [label.get_color() for label in labels]
    assert len({colours[0], colours[3], colours[5], "black"}) == 4 and colours[1] == colours[4] == "black"
    bars = {bar.get_label(): bar for bar in axis.containers}
    point = bars["softmax"].lines[0]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (pytest.approx(45.0), rows.index("softmax (n = 2)"))
    left, right = bars["softmax"].lines[2][0].get_segments()[0][:, 0]
    assert right - left == pytest.approx(2 * 12.7062 * 10 / 2, rel=1e-4)  # t(0.975, 1) s / sqrt(2), s = 10 / sqrt(2)
    hollow = [loss for loss, bar in bars.items() if bar.lines[0].get_markerfacecolor() == "white"]
    assert set(hollow) == {"softmax", "npair"}  # differences 0.1 and 0.1001, 0.4 and 0.4: p < 0.001
    assert bars["npair"].lines[0].get_color() == colours[3]
    assert [text.get_text() for text in axis.texts] == ["55.0", "45.0", "15.0", "47.5"]
    assert "hollow: lower than arcface by the paired test" in axis.get_xlabel()


def test_figure_of_single_seeds_claims_nothing(drawn):
    (axis,) = drawn([result(), result("triplet"), result(recipe="published")])
    assert axis.get_title(loc="left").split(", ")[2] == "controlled recipe" and "hollow" not in axis.get_xlabel()
    assert {bar.lines[0].get_markerfacecolor() for bar in axis.containers} == {"#0072B2", "#D55E00"}


def test_figure_of_all_settings_with_several_seeds(drawn):
    runs = [*seeds_of("softmax", (0.4, 0.5)), *seeds_of("triplet", (0.4, 0.5), recipe="published"), result(amp=True)]
    titles = [axis.get_title(loc="left").split(", ")[2] for axis in drawn(runs, "--all")]
    assert titles == ["controlled recipe", "published recipe"]


def test_curves_are_the_training_losses_of_the_seeds(drawn):
    runs = [*seeds_of("arcface", (0.4, 0.5), epochs=2), *seeds_of("softmax", (0.4, 0.5, 0.6), epochs=2)]
    axes = [axis for axis in drawn(runs, "--curves") if axis.axison]
    assert [axis.get_title() for axis in axes] == ["softmax", "arcface"]
    assert [len(axis.lines) for axis in axes] == [3, 2]
    assert axes[0].lines[0].get_xydata().tolist() == [[1, 4.0], [2, 2.0]] and axes[0].get_ylim()[0] == 0


def test_figure_in_an_unknown_format(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    with pytest.raises(UserError, match="xyz"):
        figure.main([str(save(tmp_path, result())), "--out", str(tmp_path / "figure.xyz")])
    assert not (tmp_path / "figure.xyz").exists()


def test_figure_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        figure.main([str(save(tmp_path, result())), "--out", str(tmp_path / "figure.png")])


# -------------------------------------------------------------------------------------------------- what is checked in


def checked_in():
    paths = sorted(ROOT.glob("results/**/runs/*.json"))
    assert paths, "no runs in results/runs: the tables need them"
    return paths


def test_checked_in_runs_are_compact_and_can_be_repeated():
    """Their command, typed today, gives the flags that they were run with: no recipe has changed since."""
    for path in checked_in():
        run = json.loads(path.read_text(encoding="utf-8"))
        assert path.stat().st_size < 10_000 and compact(run) == run, path
        assert not any(re.match(r"(/|[A-Za-z]:\\)", text) for text in strings(run)), path
        args = {**DEFAULTS, **run["args"]}
        again = new_run(vars(build_parser().parse_args(shlex.split(results.command(args))[2:])))
        for key in ("loss", "dataset", *(key for key in DEFAULTS if key not in FREE)):
            assert again[key] == args[key], f"{path}: the recipe's {key} has changed since: run it again"
        now, then = (all_arguments(flags["loss"], flags["loss_args"]) for flags in (again, args))
        for key in now.keys() - {key for kind in WORKED_OUT for key in again[kind]}:
            assert now[key] == then[key], f"{path}: the recipe's {key} has changed since: run it again"
