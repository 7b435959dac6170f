"""benchmarks/tune.py: candidates, also of one's own; its log; what it does when a trial ends, fails or is stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tune
from losses import ROWS, TWELVE, row_name
from utils.flags import build_parser, new_run
from utils.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "results/tuning/synthetic.jsonl"


def flags_of(words):
    return new_run(vars(build_parser().parse_args(words)))


def test_every_loss_has_the_same_small_budget():
    """But for one that has no number to choose."""
    assert {*TWELVE} <= {*tune.CANDIDATES} <= {*ROWS}
    assert [row for row, of_row in tune.CANDIDATES.items() if len(of_row) != tune.BUDGET] == ["weighted_triplet"]
    names = [tune.trial_name(row, values) for row, candidates in tune.CANDIDATES.items() for values in candidates]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", tune.CANDIDATES)
def test_a_winner_in_the_recipe_is_the_trial_that_won(row, monkeypatch):
    """Every candidate parses; put into the controlled recipe as it is printed, it gives the same flags as the trial."""
    common = tune.common_flags(seed=0)
    for values in tune.CANDIDATES[row]:
        trial = flags_of([*tune.trial_flags(row, values), *common])
        assert row_name(trial["loss"]) == row and trial["eval_on"] == "val" and trial["arch"] == "resnet18"
        printed = eval("{" + tune.source({row: {"values": values}}) + "}")
        with monkeypatch.context() as patch:
            patch.setitem(RECIPES["controlled"], f"{row}@synthetic", printed[f"{row}@synthetic"])
            plain = flags_of(["--loss", row, *common])
        assert {key: plain[key] for key in ("loss", "loss_lr")} == {key: trial[key] for key in ("loss", "loss_lr")}
        assert set(trial["explicit"].get("loss_args", [])) <= set(plain["loss_args"])


@pytest.mark.parametrize("part", ["published", "later"])
def test_the_recipe_has_the_winners_of_the_log(part):
    """Of all losses of a part; one without candidates of its own has no row."""
    best = tune.winners(tune.read_log(LOG, tune.common_flags(seed=0)))
    best = {row: trial["values"] for row, trial in best.items() if trial["values"] and ROWS[row].part == part}
    rows = {row: RECIPES["controlled"][f"{row}@synthetic"] for row, facts in ROWS.items()
            if facts.part == part and f"{row}@synthetic" in RECIPES["controlled"]}  # fmt: skip
    assert rows == best
    lacks = {row for row, facts in ROWS.items() if facts.part == part} - {"weighted_triplet"} - rows.keys()
    assert not lacks, f"{lacks}: candidates in benchmarks/tune.py, trials in results/tuning, then utils/recipes.py"


def test_the_recorded_log_was_made_with_these_settings_in_other_words(tmp_path):
    """Its first line names arch and size, which are the defaults of the generated set now; other epochs are refused."""
    recorded = json.loads(LOG.read_text().splitlines()[0])["settings"]["flags"]
    assert recorded != tune.common_flags(seed=0) and tune.read_log(LOG, tune.common_flags(seed=0))
    with pytest.raises(ValueError, match="other settings"):
        tune.read_log(LOG, tune.common_flags(seed=0, more=["--epochs", "3"]))


def test_candidates_of_ones_own_as_they_are_typed():
    assert tune.candidate("arcface", "scale=16 loss_lr=1e-3") == {"loss_args": {"arcface.scale": 16}, "loss_lr": 1e-3}
    assert tune.candidate("softmax+triplet", "triplet.margin=None loss_weights.triplet=0.5") == {
        "loss_args": {"triplet.margin": None}, "loss_weights": {"triplet": 0.5}}  # fmt: skip
    for loss, text, message in [
        ("arcface", "scale", "'scale' in --candidates is not KEY=VALUE"),
        ("arcface", "scale=large", "not KEY=VALUE with a number"),
        ("arcface", "scales=16", "arcface: scale="),  # the allowed ones
        ("softmax+triplet", "margin=0.3", "margin"),  # whose?
        ("no_loss", "scale=1", "unknown loss"),
    ]:
        with pytest.raises(ValueError, match=message):
            tune.candidate(loss, text)


# ------------------------------------------------------------------------------------------ trainings that do not train


@pytest.fixture
def search(tmp_path, monkeypatch, capsys):
    """Runs tune.py in an empty folder; trainings only write a result: mAP rises with the number of calls."""
    monkeypatch.setattr(tune, "ROOT", tmp_path)
    commands, codes = [], {}

    def train_instead(command, cwd):
        commands.append(command)
        run_dir = cwd / command[command.index("--run-dir") + 1]
        code = codes.get(run_dir.name, 0)
        if not code:
            run_dir.mkdir(parents=True, exist_ok=True)
            result = {"rank1": 0.5, "mAP": 0.01 * len(commands), "num_queries": 9, "log": [{"seconds": 2.0}]}
            (run_dir / "result.json").write_text(json.dumps({**result, "args": {"environment": {"commit": "c0ffee"}}}))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(tune.subprocess, "run", train_instead)

    def call(*flags):
        commands.clear()
        return tune.main([str(flag) for flag in flags]), list(commands), capsys.readouterr().out

    call.codes, call.log = codes, tmp_path / "results/tuning/synthetic.jsonl"
    return call


def test_trials_are_logged_once_and_the_best_is_printed(search):
    code, commands, out = search("--losses", "histogram")
    assert code == 0 and len(commands) == tune.BUDGET and "--resume" not in commands[0]
    assert '"histogram@synthetic": {"loss_args": {"histogram.num_bins": 150}},' in out  # the last was the best
    settings, *trials = map(json.loads, search.log.read_text().splitlines())
    assert settings["settings"]["flags"] == tune.common_flags(seed=0)
    assert [trial["values"] for trial in trials] == tune.CANDIDATES["histogram"]
    assert trials[1]["mAP"] == 0.02 and trials[1]["seconds"] == 2.0 and trials[1]["environment"] == {"commit": "c0ffee"}
    before = search.log.read_text()
    code, commands, again = search("--losses", "histogram")
    assert code == 0 and commands == [] and '"histogram@synthetic"' in again and search.log.read_text() == before


def test_ones_own_loss_has_its_own_log_and_may_have_its_own_data(search, tmp_path):
    code, commands, out = search("--loss", "arcface", "--candidates", "scale=16 loss_lr=1e-3", "margin=0.2")
    assert code == 0 and len(commands) == 2 and not search.log.exists()
    assert '"arcface@synthetic": {"loss_args": {"arcface.margin": 0.2}},' in out
    assert (tmp_path / "runs/tune_arcface.jsonl").is_file()
    file = tmp_path / "candidates.txt"
    file.write_text("scale=16 loss_lr=1e-3\nscale=8\n")
    more = ["--dataset", "market", "--epochs", "9"]
    code, commands, out = search("--loss", "cosface", "--candidates", f"@{file}", *more)
    assert code == 0 and len(commands) == 2 and '"cosface@market": {"loss_args": {"cosface.scale": 8}},' in out
    flags = flags_of(commands[0][2:])
    assert (flags["epochs"], flags["eval_on"], flags["arch"]) == (9, "val", "resnet50")
    assert flags["loss_args"] == ["cosface.scale=16"] and flags["loss_lr"] == 1e-3
    for wrong in (["--loss", "cosface"], ["--loss", "0.5*cosface", "--candidates", "scale=8"]):
        with pytest.raises(SystemExit):
            search(*wrong)


def test_the_search_goes_on_after_a_stop_in_the_middle_of_a_line(search):
    search("--losses", "histogram")
    lines = search.log.read_text().splitlines(keepends=True)
    search.log.write_text("".join(lines[:3]) + lines[3][:20])
    code, commands, _ = search("--losses", "histogram")
    assert code == 0 and len(commands) == 1 and "--resume" in commands[0]
    assert [json.loads(line)["trial"] for line in search.log.read_text().splitlines()[1:]] == [
        tune.trial_name("histogram", values) for values in tune.CANDIDATES["histogram"]
    ]


def test_a_failing_trial_stops_nothing_and_is_tried_again(search):
    name = tune.trial_name("triplet", tune.CANDIDATES["triplet"][2])
    search.codes[f"tune_s0_{name}"] = 1
    code, commands, out = search("--losses", "triplet")
    assert code == 1 and len(commands) == tune.BUDGET and f"FAILED (run again by the same command): {name}" in out
    assert "@synthetic" not in out  # no winner before all are done
    search.codes.clear()
    code, commands, out = search("--losses", "triplet")
    assert code == 0 and len(commands) == 1 and '"triplet@synthetic"' in out


def test_ctrl_c_stops_the_search(search):
    search.codes[f"tune_s0_{tune.trial_name('triplet', tune.CANDIDATES['triplet'][1])}"] = 130
    code, commands, _ = search()
    assert code == 130 and len(commands) == tune.BUDGET + 2  # the trials of softmax, and two
    assert len(search.log.read_text().splitlines()) == 1 + tune.BUDGET + 1


def test_a_log_of_other_settings_is_refused(search):
    search("--losses", "npair")
    with pytest.raises(ValueError, match="other settings"):
        search("--losses", "npair", "--seed", "1")


def test_dry_run_of_the_search_runs_nothing(search):
    code, commands, out = search("--dry-run")
    assert code == 0 and commands == [] and not search.log.exists()
    assert out.count(sys.executable) == sum(map(len, tune.CANDIDATES.values()))
