"""What a recipe changes: Kendall's tau by hand, gains and losses against explicit tests, which runs stand together."""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import scipy.stats

from losses import TWELVE
from tests.test_results import cells, groups_of, result, save, seeds_of
from utils import results
from utils.orders import changes_from, one_trick_more, orders_and_ablations
from utils.runs import describe, load_groups
from utils.statistics import kendall, kendall_range

ROOT = Path(__file__).resolve().parent.parent
FIVE = ("softmax", "triplet", "npair", "focal", "arcface")


def scored(*values):
    return dict(zip("abcdefgh", values, strict=False))


def runs_of(scores, **flags):
    """loss -> mAP of the seeds 0, 1, ... -> runs."""
    return [run for loss, values in scores.items() for run in seeds_of(loss, values, **flags)]


def sections_of(folder, *runs):
    """Heading without the setting -> section."""
    found = orders_and_ablations(groups_of(folder, *runs))
    return {section.partition(":")[0].partition("?")[0].strip("*"): section for section in found}


# ---------------------------------------------------------------------------------------------------------- statistics


def test_kendall_by_hand():
    """Of ten pairs: none, one, all in the other order; with one tie 9 / sqrt(10 * 9)."""
    order = scored(1, 2, 3, 4, 5)
    assert kendall(order, scored(10, 20, 30, 40, 50)) == pytest.approx(1)
    assert kendall(order, scored(2, 1, 3, 4, 5)) == pytest.approx((9 - 1) / 10)
    assert kendall(order, scored(5, 4, 3, 2, 1)) == pytest.approx(-1)
    assert kendall(order, scored(1, 1, 2, 3, 4)) == pytest.approx(9 / 90**0.5)


def test_kendall_is_over_what_both_score():
    """By name, not by place: c is missing in the one, z in the other. Of ten pairs only d and e are reversed."""
    first, second = scored(1, 2, 9, 4, 5, 6), {"f": 6, "e": 3, "d": 4, "b": 2, "a": 1, "z": -7}
    assert kendall(first, second) == pytest.approx((9 - 1) / 10)


def test_an_order_of_few_or_of_equals_has_no_tau():
    assert kendall(scored(1, 2, 3, 4), scored(1, 2, 3, 4, 5)) is None
    assert kendall(scored(1, 2, 3, 4, 5), scored(7, 7, 7, 7, 7)) is None
    assert kendall_range([(scored(1, 2, 3), scored(1, 2, 3))]) is None and kendall_range([]) is None


def test_range_over_pairs_by_hand():
    """1, 0.8 and -1, and a pair with too little in common: median 0.8. Of two the median is their mean."""
    order, few = scored(1, 2, 3, 4, 5), scored(1, 2)
    others = [scored(5, 4, 3, 2, 1), order, scored(2, 1, 3, 4, 5), few]
    assert kendall_range((order, other) for other in others) == pytest.approx((0.8, -1, 1, 3))
    assert kendall_range([(order, order), (order, others[2])]) == pytest.approx((0.9, 0.8, 1, 2))


# --------------------------------------------------------------------------------------------------- losses by recipes


def test_gains_and_losses_against_explicit_tests(tmp_path):
    """Three differences, the p values times 3, 2, 1 by size; a loss with one common seed has none and counts for none;
    one that the controlled recipe was not run with stands there without a change."""
    base = {"softmax": (0.40, 0.41, 0.43), "triplet": (0.50, 0.52, 0.51), "npair": (0.60, 0.60, 0.60), "focal": (0.3,)}
    new = {"softmax": (0.50, 0.512, 0.531), "triplet": (0.48, 0.54, 0.50), "npair": (0.50, 0.51, 0.50),
           "focal": (0.4, 0.5), "arcface": (0.7, 0.7)}  # fmt: skip
    runs = [*runs_of({**base, "circle": (0.1, 0.1)}), *runs_of(new, recipe="tricks")]
    groups = groups_of(tmp_path, *runs)
    changes = changes_from(*groups.values())
    p = {loss: scipy.stats.ttest_rel(new[loss], base[loss]).pvalue for loss in ("softmax", "triplet", "npair")}
    assert p["softmax"] < p["npair"] < p["triplet"]
    assert {loss: change[3] for loss, change in changes.items()} == {
        "softmax": pytest.approx(3 * p["softmax"]), "npair": pytest.approx(2 * p["npair"]),
        "triplet": pytest.approx(p["triplet"]), "focal": None}  # fmt: skip
    # 10.0 10.2 10.1: s = 0.1, half = 4.302653 * 0.1 / sqrt(3) = 0.248
    assert changes["softmax"][:3] == (pytest.approx(0.101), pytest.approx(0.00248414), 3)
    assert changes["focal"][:3] == (pytest.approx(0.1), None, 1)
    section = sections_of(tmp_path, *runs)["Losses by recipes"]
    table = cells(section)
    assert list(table) == ["softmax", "triplet", "npair", "focal", "arcface"]  # circle has nothing to compare
    assert table["softmax"] == {"loss": "softmax", "controlled": "41.3 ± 3.8 (3)", "tricks": "51.4 ± 3.9 (3)",
        "tricks against controlled": "+10.1 ± 0.2 (3), p < 0.001"}  # fmt: skip
    assert table["npair"]["tricks against controlled"] == f"-9.7 ± 1.4 (3), p = {2 * p['npair']:.3f}"
    assert table["focal"]["controlled"] == "30.0 (1)"
    assert table["focal"]["tricks against controlled"] == "+10.0 (1), no test"
    assert table["arcface"]["controlled"] == table["arcface"]["tricks against controlled"] == ""
    words = "higher: softmax; lower: npair; not shown to differ: triplet; no test: focal."
    assert f"Tricks against controlled (3 tests), {words}" in section


def test_a_column_for_each_recipe_in_their_order(tmp_path):
    runs = [*runs_of({"softmax": (0.5, 0.6)}, recipe="tricks"), *runs_of({"softmax": (0.5,)}, recipe="published")]
    section = sections_of(tmp_path, *runs, *runs_of({"softmax": (0.4, 0.5)}))["Losses by recipes"]
    columns = ["loss", "controlled", "published", "tricks", "published against controlled", "tricks against controlled"]
    assert list(cells(section)["softmax"]) == columns
    assert section.startswith("**Losses by recipes: synthetic, 150 + 150 people, resnet18, ")
    assert "Too few common seeds to test published against controlled." in section
    assert "Tricks against controlled (1 tests), higher: softmax; lower: none; not shown to differ: none." in section


def test_runs_with_further_flags_stand_in_for_a_recipe_only_while_it_has_no_others(tmp_path):
    old = runs_of({"softmax": (0.7,)}, recipe="published", micro_batches=1)
    table = cells(sections_of(tmp_path, *old, result())["Losses by recipes"])
    assert table["softmax"]["published (--micro-batches 1)"] == "70.0 (1)"
    plain = result(recipe="published", mAP=0.6)
    table = cells(sections_of(tmp_path / "plain", *old, result(), plain)["Losses by recipes"])
    assert table["softmax"]["published"] == "60.0 (1)" and not any("micro" in column for column in table["softmax"])


@pytest.mark.parametrize(
    "flags",
    [{"dataset": "market"}, {"synthetic_ids": 20}, {"arch": "resnet34"}, {"eval_on": "val"}, {"epochs": 50}],
    ids=lambda flags: next(iter(flags)),
)
def test_other_data_and_networks_do_not_stand_side_by_side(tmp_path, flags):
    other = {"recipe": "published", **flags}
    assert sections_of(tmp_path, result(), result(**other)) == {}
    assert list(sections_of(tmp_path / "both", result(**flags), result(**other))) == ["Losses by recipes"]


def test_one_recipe_has_no_section(tmp_path):
    groups = groups_of(tmp_path, *runs_of(dict.fromkeys(FIVE, (0.4, 0.5))))
    assert orders_and_ablations(groups) == []
    assert "Losses by recipes" not in results.markdown(groups)


# -------------------------------------------------------------------------------------------------------------- orders


def test_orders_by_hand(tmp_path):
    """Controlled: seed 0 in the order of FIVE, seed 1 with the first two swapped (0.8), seed 2 as seed 0. Tricks: one
    seed in reverse: -1, -0.8, -1. circle is in the controlled runs only, and counts nowhere. Market's order of mAP:
    triplet, npair, focal, softmax, arcface; against FIVE's 3 of 10 pairs are reversed (softmax with three): 0.4; with
    softmax and triplet swapped 2: 0.6."""
    rising = {loss: 0.1 * place for place, loss in enumerate(FIVE, 1)}
    swapped = {**rising, "softmax": 0.2, "triplet": 0.1}
    base = {loss: (rising[loss], swapped[loss], rising[loss]) for loss in FIVE}
    market = sorted(FIVE, key=lambda loss: results.PUBLISHED[loss]["market"][1])
    assert market == ["triplet", "npair", "focal", "softmax", "arcface"]
    tricks = {loss: (1 - rising[loss],) for loss in FIVE}
    runs = [*runs_of({**base, "circle": (0.9, 0.0, 0.9)}), *runs_of(tricks, recipe="tricks")]
    section = sections_of(tmp_path, *runs)["Do the orders agree"]
    table = {name: list(line.values())[1:] for name, line in cells(section).items()}
    assert table["two seeds of controlled"] == ["0.80", "0.80 to 1.00", "3", "5"]
    assert "two seeds of tricks" not in table
    assert table["controlled and tricks"] == ["-1.00", "-1.00 to -0.80", "3", "5"]
    assert table["controlled and Market-1501 as published"] == ["0.40", "0.40 to 0.60", "3", "5"]
    assert table["tricks and Market-1501 as published"] == ["-0.40", "", "1", "5"]
    assert "controlled and DukeMTMC-reID as published" in table
    assert "no confidence interval, and nothing is tested" in section


def test_few_losses_have_no_order(tmp_path):
    runs = runs_of(dict.fromkeys(FIVE[:4], (0.4, 0.5)))
    assert list(sections_of(tmp_path, *runs, *runs_of(dict.fromkeys(FIVE, (0.4,)), recipe="tricks"))) == [
        "Losses by recipes"]  # fmt: skip


def test_orders_of_the_recorded_runs_by_a_slow_form():
    """Tau-b from its definition, over all pairs of losses and of seeds."""
    groups = load_groups(ROOT / "results")
    rows = next(rows for setting, rows in groups.items() if "150 + 150 people, controlled" in str(setting))
    market = {loss: results.PUBLISHED[loss]["market"][1] for loss in TWELVE}

    def sign(scores, pair):
        return (scores[pair[0]] > scores[pair[1]]) - (scores[pair[0]] < scores[pair[1]])

    taus = []
    for seed in range(5):
        scores = {loss: rows[loss][seed]["mAP"] for loss in TWELVE}
        signs = [(sign(scores, pair), sign(market, pair)) for pair in combinations(TWELVE, 2)]
        norm = (sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs)) ** 0.5
        taus.append(sum(a * b for a, b in signs) / norm)
    orders = [{loss: rows[loss][seed]["mAP"] for loss in TWELVE} for seed in range(5)]
    found = kendall_range((order, market) for order in orders)
    assert found == pytest.approx((sorted(taus)[2], min(taus), max(taus), 5))
    text = "\n".join(orders_and_ablations(groups))
    line = cells(text)["controlled and Market-1501 as published"]
    assert line["tau, median"] == f"{found[0]:.2f}" and line["lowest to highest"] == f"{found[1]:.2f} to {found[2]:.2f}"


# ------------------------------------------------------------------------------------------------------------ ablation

TRICKS = [{"warmup": 0.8333}, {"random_erasing": 0.5}, {"pad_crop": 10}, {"last_stride": 1}, {"pool": "gem"},
          {"neck": "bn"}, {"flip_test": True}, {"milestones": [2, 3]},
          {"loss_args": ["softmax.label_smoothing=0.1"]}]  # fmt: skip


def test_every_trick_alone_is_a_row_of_the_ablation(tmp_path):
    runs = [*seeds_of("softmax", (0.40, 0.41, 0.5)), *seeds_of("triplet", (0.5, 0.6))]
    for flags in TRICKS:
        runs += seeds_of("softmax", (0.42, 0.44), **flags)
    runs += [*seeds_of("softmax", (0.5, 0.6), recipe="tricks"), *seeds_of("triplet", (0.7, 0.7), pool="gem")]
    section = sections_of(tmp_path, *runs)["One trick at a time"]
    table = cells(section)
    assert len(table) == 1 + len(TRICKS) + 1 and list(table)[0] == "controlled" and list(table)[-1] == "tricks"
    assert list(table["controlled"]) == ["setting", "softmax", "triplet"]
    assert table["controlled"]["softmax"] == "43.7 (3)"
    # differences 2 and 3: mean 2.5, half = 12.7062 * 0.707107 / sqrt(2) = 6.35
    assert table["`--random-erasing 0.5`"]["softmax"] == "43.0 (2), +2.5 ± 6.4"
    assert table["`--loss-args softmax.label_smoothing=0.1`"]["triplet"] == ""
    assert table["`--pool gem`"]["triplet"] == "70.0 (2), +15.0 ± 63.5"
    assert table["tricks"]["softmax"] == "55.0 (2), +14.5 ± 57.2"


def test_two_flags_and_flags_that_are_no_trick_are_no_rows_of_it(tmp_path):
    others = [{"lr": 0.1}, {"amp": True}, {"p": 8}, {"epochs": 3}, {"pool": "gem", "neck": "bn"},
              {"pool": "gem", "amp": True}, {"loss_args": ["triplet.margin=0.5"]}]  # fmt: skip
    runs = [result("triplet"), result("triplet", neck="bn"), *(result("triplet", **flags) for flags in others)]
    groups = groups_of(tmp_path, *runs)
    assert list(one_trick_more(groups, describe(runs[0]["args"]))) == ["--neck bn"]
    assert sections_of(tmp_path / "again", *runs) == {}  # a single one makes no table


def test_tricks_of_another_base_are_its_own(tmp_path):
    """Under bfloat16, say: the base has that flag, too."""
    runs = [result(), result(amp=True), *(result(amp=True, **flags) for flags in TRICKS[:2])]
    section = sections_of(tmp_path, *runs)["One trick at a time"]
    assert "5 epochs, bfloat16**" in section
    assert list(cells(section)) == ["controlled", "`--warmup 0.8333`", "`--random-erasing 0.5`"]


# -------------------------------------------------------------------------------------------------------- command line


def test_sections_follow_the_tables(tmp_path):
    scores = {loss: (0.1 * place, 0.1 * place) for place, loss in enumerate(FIVE)}
    runs = [*runs_of(scores), *runs_of(scores, recipe="tricks")]
    text = results.markdown(groups_of(tmp_path, *runs))
    headings = ("Market-1501 and", "Losses by recipes: ", "Do the orders agree? ")
    places = [text.index(f"\n**{words}") for words in headings]
    assert places == sorted(places) and text.index("\nPercent; mean") > places[-1]


@pytest.mark.skipif(os.name == "nt", reason="pipes of a shell")
@pytest.mark.parametrize("options", [[], ["--short"]], ids=["more than a buffer", "less"])
def test_a_closed_pipe_ends_the_tables_quietly(tmp_path, options):
    folder = save(tmp_path, *runs_of(dict.fromkeys(TWELVE, (0.4, 0.5))))
    command = [sys.executable, "-m", "utils.results", str(folder), *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # as it is for most people
    how = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **how) as process:
        process.stdout.close()  # before it has begun to write
        assert process.stderr.read() == b""
    assert process.returncode == 0
