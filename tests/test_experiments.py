"""The script of all experiments and the search: what they would run, and what they do when a run ends, fails or hangs.

Where only the script's own logic is tested, a stand-in takes the place of the interpreter: it notes every call and
writes the result that the test asks for. What train.py itself makes of the commands is tested with train.py.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from benchmarks import tune
from data import load_dataset
from losses import TWELVE, row_name
from tests.conftest import write_tiny_market
from utils.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent

STAND_IN = f"""#!{sys.executable} -S
import json, os, sys, time
if sys.argv[1] == "-m":
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
with open("calls.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
if value("--loss") in os.environ.get("FAILING", "").split():
    sys.exit("train.py: no good")
if value("--loss") in os.environ.get("HANGING", "").split():
    try:
        open("hanging", "w").close()
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(int(os.environ["EXIT_CODE"]))
os.makedirs(value("--run-dir"), exist_ok=True)
args = dict(dataset=value("--dataset"), recipe="controlled", seed=int(value("--seed")), arch="resnet18", weights="none",
            height=128, width=64, epochs=1, amp=True, synthetic_ids=150)
args |= dict(explicit=dict(loss=value("--loss"), dataset=value("--dataset")), environment=dict(device="none"))
log = [dict(epoch=1, loss=1.0, seconds=30.0)]
row = value("--loss").replace("0.5*", "")
with open(value("--run-dir") + "/result.json", "w") as file:
    json.dump(dict(rank1=0.5, mAP=0.25, row=row, args=args, log=log), file)
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the script and what it calls, and no results; `python` is the stand-in."""
    folder = tmp_path / "check out"
    (folder / "utils").mkdir(parents=True)
    for name in ("experiments.sh", "utils/results.py", "utils/recipes.py", "utils/files.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    return folder


def start(checkout, *flags, cwd=None, **environment):
    names = ("DATASETS", "LOSSES", "SEEDS", "QUICK", "DRY_RUN", "DATA_DIR")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    return subprocess.Popen(
        ["bash", str(checkout / "experiments.sh"), *flags],
        cwd=cwd or checkout,
        env={**clean, "PYTHON": str(checkout / "python"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # also where it was ignored
    )


def run(checkout, *flags, **options):
    process = start(checkout, *flags, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def calls(checkout):
    return (checkout / "calls.txt").read_text().splitlines() if (checkout / "calls.txt").exists() else []


def finished(checkout):
    return sorted(path.stem for path in (checkout / "results/runs").glob("*.json"))


def names(out):
    """Run names in the commands that a dry run prints."""
    return [Path(shlex.split(line)[shlex.split(line).index("--run-dir") + 1]).name for line in out.splitlines()]


def dry(checkout, *flags, **environment):
    code, out, err = run(checkout, *flags, DRY_RUN="1", **environment)
    assert code == 0, err
    return out, err


# ---------------------------------------------------------------------------------------------------- what is to be run


@pytest.fixture
def market_and_duke(tmp_path):
    """Folders in both layouts, with names that the readers take, below a path with a space."""
    root = tmp_path / "data sets"
    places = {"market1501/Market-1501-v15.09.15": "{:04}_c{}s1_000001_00.jpg",
              "dukemtmc-reid/DukeMTMC-reID": "{:04}_c{}_f0000001.jpg"}  # fmt: skip
    for place, name in places.items():
        for folder in ("bounding_box_train", "query", "bounding_box_test"):
            (root / place / folder).mkdir(parents=True)
            for pid in (1, 2):
                (root / place / folder / name.format(pid, pid)).touch()
    return root


def test_the_full_table_for_market_and_duke_parses(checkout, market_and_duke):
    """With both data sets and nothing else: every loss x data set x 5 seeds, each command understood by train.py, its
    flags resolved and its data found."""
    out, err = dry(checkout, DATA_DIR=str(market_and_duke))
    seen = []
    for line in out.splitlines():
        words = shlex.split(line)
        assert words[0] == str(checkout / "python") and words[1] == "train.py"
        explicit = vars(train.build_parser().parse_args(words[2:]))
        args = train.resolve_flags({key: value for key, value in explicit.items() if key != "run_dir"})
        assert (args["arch"], args["height"], args["epochs"], args["recipe"]) == ("resnet50", 256, 60, "controlled")
        row = row_name(args["loss"])
        assert explicit["run_dir"] == Path(f"runs/{args['dataset']}_{row}_s{args['seed']}")
        seen.append((args["seed"], args["dataset"], row))
    assert seen == [(seed, dataset, row) for seed in range(5) for dataset in ("market", "duke") for row in TWELVE]
    for dataset in ("market", "duke"):
        with pytest.warns(UserWarning, match="not the complete data set"):
            assert len(load_dataset(dataset, args["data_dir"]).train) == 2
    assert "120 runs, about 40.0 h of training" in err and "120 by assumption: 20 minutes" in err
    assert not calls(checkout) and not (checkout / "results").exists()


def test_one_of_the_two_is_enough(checkout, market_and_duke):
    shutil.rmtree(market_and_duke / "market1501")
    out, _ = dry(checkout, DATA_DIR=str(market_and_duke), SEEDS="0", LOSSES="arcface")
    assert names(out) == ["duke_arcface_s0"]


def test_without_market_and_duke_it_says_so_and_takes_the_generated_set(checkout):
    out, err = dry(checkout)
    assert "Neither Market-1501 nor DukeMTMC-reID is under datasets" in err
    assert names(out) == [f"synthetic_{row}_s0_quick" for row in TWELVE]
    for line in out.splitlines():
        args = train.resolve_flags(vars(train.build_parser().parse_args(shlex.split(line)[2:])))
        assert (args["dataset"], args["arch"], args["weights"]) == ("synthetic", "resnet18", "none")
        assert (args["height"], args["width"], args["data_dir"]) == (128, 64, "datasets")
        assert args["epochs"] < 60
    assert "12 by assumption: 3 minutes" in err
    out, _ = dry(checkout, SEEDS="1 2", LOSSES="npair")
    assert names(out) == ["synthetic_npair_s1_quick", "synthetic_npair_s2_quick"]


def test_lists_from_the_environment(checkout):
    (checkout / "softmax+0.5 or triplet").touch()  # a file that a shell would take the expression for
    out, err = dry(checkout, DATASETS="synthetic market", LOSSES="softmax+0.5*triplet npair", SEEDS="3")
    assert names(out) == [f"{dataset}_{loss}_s3" for dataset in ("synthetic", "market")
                          for loss in ("softmax+0.5xtriplet", "npair")]  # fmt: skip
    assert "--loss softmax+0.5\\*triplet" in out and "resnet18" not in out and "Neither" not in err


@pytest.mark.parametrize(
    "flags, quick, suffix",
    [
        ([], "0", ""),
        ([], "1", "_quick"),
        (["--recipe", "controlled"], "0", ""),
        (["--recipe", "published"], "0", "_published"),
        (["--recipe=published"], "1", "_quick_published"),
        (["--epochs", "20", "--amp"], "0", "_epochs-20_amp"),
        (["--milestones", "4", "8", "--p", "8"], "1", "_quick_milestones-4-8_p-8"),
        (["--loss-args", "margin=0.2"], "0", "_loss-args-margin=0.2"),
        (["--workers", "2", "--amp", "--device=cpu", "--cache", "off", "--eval-every", "3"], "0", "_amp"),
    ],
)
def test_run_names_tell_flags(checkout, flags, quick, suffix):
    out, _ = dry(checkout, *flags, DATASETS="market", LOSSES="arcface", SEEDS="0", QUICK=quick)
    assert names(out) == [f"market_arcface_s0{suffix}"]
    explicit = vars(train.build_parser().parse_args(shlex.split(out)[2:]))  # the flags reach train.py, its own last
    given = vars(train.build_parser().parse_args(flags))
    assert {key: explicit[key] for key in given} == given and explicit["seed"] == 0
    assert ("width" in explicit) == (quick == "1")


def test_unwieldy_flags_give_names_that_differ_and_can_be_files(checkout):
    found = set()
    for weights in ("/a/b.pth", "/a-b.pth", "a b.pth", "x" * 300 + "1", "x" * 300 + "2"):
        (name,) = names(dry(checkout, "--weights", weights, DATASETS="market", LOSSES="npair", SEEDS="0")[0])
        assert "/" not in name and " " not in name and len(name) < 200
        found.add(name)
    assert len(found) == 5


@pytest.mark.parametrize("flag", ["--loss", "--seed=3", "--dataset", "--data-dir", "--run-dir", "--resume"])
def test_flags_that_the_script_sets_are_refused(checkout, flag):
    code, out, err = run(checkout, flag, "x", DRY_RUN="1")
    assert code == 2 and out == "" and flag.split("=")[0] in err and len(err.splitlines()) == 1


def test_paths_are_meant_from_where_it_is_called(checkout, market_and_duke):
    here = market_and_duke.parent
    environment = {"DATA_DIR": "data sets", "PYTHON": os.path.relpath(checkout / "python", here)}
    code, out, _ = run(checkout, cwd=here, DRY_RUN="1", SEEDS="0", LOSSES="npair", **environment)
    assert code == 0 and names(out) == ["market_npair_s0", "duke_npair_s0"]
    words = shlex.split(out.splitlines()[0])
    assert words[0] == str(checkout / "python") and words[words.index("--data-dir") + 1] == str(market_and_duke)


def test_a_missing_interpreter_is_named(checkout):
    code, _, err = run(checkout, PYTHON="no-such-python")
    assert code == 2 and "no program no-such-python" in err


def test_help_is_the_head_of_the_file(checkout):
    code, out, _ = run(checkout, "--help")
    assert code == 0 and "DRY_RUN=1 bash experiments.sh" in out and "Exit code" in out and "set -uf" not in out


# -------------------------------------------------------------------------------------- skipped, failed, resumed, ended


def test_runs_are_collected_and_the_table_comes_last(checkout):
    code, out, err = run(checkout, LOSSES="arcface softmax+0.5*triplet", SEEDS="0 1", cwd="/")
    assert code == 0
    assert finished(checkout) == sorted(f"synthetic_{loss}_s{seed}_quick" for loss in ("arcface", "softmax+0.5xtriplet")
                                        for seed in (0, 1))  # fmt: skip
    assert "4 runs finished now, 0 skipped (finished before), 0 failed" in err
    table = out[out.index("| loss") :]
    assert "25.0 ± 0.0" in table and "2 (0, 1)" in table and table.index("arcface") < table.index("Percent; mean")


def test_finished_runs_are_skipped_and_half_ones_resumed(checkout):
    environment = {"LOSSES": "arcface npair triplet", "SEEDS": "0"}
    assert run(checkout, **environment, FAILING="npair triplet")[0] == 1
    (checkout / "runs/synthetic_npair_s0_quick").mkdir()  # it began
    (checkout / "calls.txt").unlink()
    code, out, err = run(checkout, **environment)
    assert code == 0
    assert [(call.split()[2], "--resume" in call) for call in calls(checkout)] == [("npair", True), ("triplet", False)]
    assert "3 runs, 1 of them finished before" in err and "2 runs, about 60 s of training" in err
    assert "2 runs finished now, 1 skipped (finished before), 0 failed" in err
    assert "skipped: synthetic_arcface_s0_quick\n" in err
    assert dry(checkout, **environment)[0] == ""  # nothing is left


def test_the_collected_file_alone_counts_as_finished(checkout):
    run(checkout, LOSSES="arcface", SEEDS="0")
    shutil.rmtree(checkout / "runs")
    assert run(checkout, LOSSES="arcface", SEEDS="0")[0] == 0
    assert len(calls(checkout)) == 1 and not (checkout / "runs").exists()


def test_one_failing_run_does_not_stop_the_others(checkout):
    code, out, err = run(checkout, LOSSES="softmax triplet npair", SEEDS="0 1", FAILING="triplet")
    assert code == 1
    assert len(calls(checkout)) == 6 and len(finished(checkout)) == 4
    assert "4 runs finished now, 0 skipped (finished before), 2 failed" in err and "no good" in err
    assert "FAILED: synthetic_triplet_s0_quick\nFAILED: synthetic_triplet_s1_quick\n" in err
    assert "| softmax" in out and "| npair" in out  # the table, nevertheless


def test_a_run_without_a_result_has_failed(checkout):
    """Exit code 0, but no result.json: the stand-in of train.py is replaced by one that does nothing."""
    text = (checkout / "python").read_text()
    assert "/result.json" in text
    (checkout / "python").write_text(text.replace("/result.json", "/nothing"))
    code, _, err = run(checkout, LOSSES="softmax", SEEDS="0")
    assert code == 1 and "FAILED: synthetic_softmax_s0_quick" in err and "no result.json" in err


@pytest.mark.parametrize("exit_code", ["130", "1"])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_everything(checkout, exit_code, signal_number):
    """As a terminal does it, the signal goes to the script and to the training; SIGTERM here to the script alone, which
    then waits for the training. Nothing more is begun, whatever the training's exit code."""
    process = start(checkout, LOSSES="softmax triplet npair", SEEDS="0", HANGING="triplet", EXIT_CODE=exit_code)
    deadline = time.monotonic() + 60
    while not (checkout / "hanging").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    if signal_number == signal.SIGTERM:
        os.kill(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert [call.split()[2] for call in calls(checkout)] == ["softmax", "triplet"]
    assert finished(checkout) == ["synthetic_softmax_s0_quick"]
    assert "1 runs finished now, 0 skipped (finished before), 0 failed" in err and "goes on from here" in err
    assert "Traceback" not in err


def test_with_train_py_itself(checkout, tmp_path):
    """Nothing stands in here: one loss trains for an epoch on a tiny data set, one does not exist."""
    for name in ("train.py", "evaluate.py", "losses", "models", "data"):
        (checkout / name).symlink_to(ROOT / name)
    shutil.rmtree(checkout / "utils")
    (checkout / "utils").symlink_to(ROOT / "utils")
    data = write_tiny_market(tmp_path / "data/market1501").parent
    flags = "--arch resnet18 --weights none --height 32 --width 16 --epochs 1 --p 4 --k 2 --workers 1 --device cpu"
    environment = {"DATA_DIR": str(data), "LOSSES": "no_loss arcface", "SEEDS": "0", "PYTHON": sys.executable}
    code, out, err = run(checkout, *flags.split(), **environment)
    assert code == 1 and "unknown loss 'no_loss'" in err and "Traceback" not in err
    suffix = "_arch-resnet18_weights-none_height-32_width-16_epochs-1_p-4_k-2"
    assert finished(checkout) == [f"market_arcface_s0{suffix}"]
    assert f"FAILED: market_no_loss_s0{suffix}" in err and "1 runs finished now" in err
    kept = json.loads((checkout / f"results/runs/market_arcface_s0{suffix}.json").read_text())
    made = json.loads((checkout / f"runs/market_arcface_s0{suffix}/result.json").read_text())
    assert kept["mAP"] == made["mAP"] and kept["args"]["explicit"]["epochs"] == 1 and str(tmp_path) not in str(kept)
    assert f"| {100 * made['rank1']:.1f}" in out and "not run" in out


# ----------------------------------------------------------------------------------------------------------- the search


def every_trial():
    return [(row, values) for row, candidates in tune.CANDIDATES.items() for values in candidates]


def test_every_loss_has_the_same_small_budget():
    assert tuple(tune.CANDIDATES) == TWELVE
    assert all(len(candidates) == tune.BUDGET for candidates in tune.CANDIDATES.values())
    assert len({tune.trial_name(row, values) for row, values in every_trial()}) == tune.BUDGET * len(TWELVE)


@pytest.mark.parametrize("row", TWELVE)
def test_a_winner_in_the_recipe_is_the_trial_that_won(row, monkeypatch):
    """Every candidate parses; put into the controlled recipe as it is printed, it gives the same flags as the trial."""
    common = ["--dataset", "synthetic", "--eval-on", "val", *tune.quick_flags()]
    own = ("loss", "loss_lr")
    for values in tune.CANDIDATES[row]:
        explicit = vars(train.build_parser().parse_args([*tune.trial_flags(row, values), *common]))
        trial = train.resolve_flags(explicit)
        assert row_name(trial["loss"]) == row and trial["eval_on"] == "val"
        printed = tune.source({row: {"values": values}})
        with monkeypatch.context() as patch:
            patch.setitem(RECIPES["controlled"], f"{row}@synthetic", eval("{" + printed + "}")[f"{row}@synthetic"])
            plain = train.resolve_flags(vars(train.build_parser().parse_args(["--loss", row, *common])))
        assert {key: plain[key] for key in own} == {key: trial[key] for key in own}
        given = [f"{key}={value!r}" for key, value in plain["loss_args"].items()]
        assert set(explicit.get("loss_args", [])) <= set(given)


def test_the_recipe_has_the_winners_of_the_log():
    trials = tune.read_log(ROOT / "results/tuning/synthetic.jsonl", {"flags": tune.common_flags(seed=0)})
    best = {f"{row}@synthetic": trial["values"] for row, trial in tune.winners(trials).items()}
    assert {key: row for key, row in RECIPES["controlled"].items() if "@synthetic" in key} == best
    assert len(best) == len(TWELVE)


def test_quick_flags_are_those_of_the_script(checkout):
    out, _ = dry(checkout, LOSSES="npair")
    assert " ".join(tune.quick_flags()) in out


@pytest.fixture
def search(tmp_path, monkeypatch, capsys):
    """Runs tune.py in an empty folder; trainings only write a result: mAP rises with the number of calls."""
    shutil.copy(ROOT / "experiments.sh", tmp_path)
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
        monkeypatch.setattr(sys, "argv", ["tune.py", "--log", str(tmp_path / "log/tune.jsonl"), *flags])
        return tune.main(), list(commands), capsys.readouterr().out

    call.codes, call.log = codes, tmp_path / "log/tune.jsonl"
    return call


def test_trials_are_logged_once_and_the_best_is_printed(search):
    code, commands, out = search("--losses", "histogram")
    assert code == 0 and len(commands) == tune.BUDGET and "--resume" not in commands[0]
    assert '"histogram@synthetic": {"loss_args": {"histogram.num_bins": 150}},' in out  # the last was the best
    settings, *trials = map(json.loads, search.log.read_text().splitlines())
    assert settings["settings"]["flags"][:4] == ["--dataset", "synthetic", "--eval-on", "val"]
    assert [trial["values"] for trial in trials] == tune.CANDIDATES["histogram"]
    assert trials[1]["mAP"] == 0.02 and trials[1]["seconds"] == 2.0 and trials[1]["environment"] == {"commit": "c0ffee"}
    before = search.log.read_text()
    code, commands, again = search("--losses", "histogram")
    assert code == 0 and commands == [] and '"histogram@synthetic"' in again and search.log.read_text() == before


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
    assert out.count("train.py") == tune.BUDGET * len(TWELVE)
