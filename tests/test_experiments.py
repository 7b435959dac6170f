"""The script of all experiments: what it would run, and what it does when a run ends, fails or is stopped.

A stand-in takes the place of the interpreter: it notes every training and writes the result that the test asks for.
Plan and table are the project's own, but where only what the script does with them is tested. With nothing replaced:
the last test.
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

import utils.plan
from data import load_dataset
from losses import LOSSES, ROWS, TWELVE, row_name
from tests.conftest import write_tiny_market
from utils.flags import DEFAULTS, build_parser, new_run, run_name
from utils.plan import ASSUMED, ASSUMED_SMALL, SET_BY, commands, estimate, plan

ROOT = Path(__file__).resolve().parent.parent

STAND_IN = f"""#!{sys.executable} -S
import json, os, sys, time
written = dict([("utils.plan", "plan.txt"), ("utils.results", "table.txt")]).get(sys.argv[2], "")
if sys.argv[1] == "-m" and os.path.exists(written):
    print(open(written).read(), end="")
    sys.exit()
if sys.argv[1] == "-m":
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
loss = value("--loss")
with open("calls.txt", "a") as file:
    file.write(" ".join([os.environ.get("OMP_NUM_THREADS", "-"), *sys.argv[1:]]) + "\\n")
if loss in os.environ.get("FAILING", "").split():
    sys.exit("train.py: no good")
if loss in os.environ.get("HANGING", "").split():
    try:
        open("hanging", "w").close()
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(int(os.environ["EXIT_CODE"]))
folder = "runs/synthetic_" + loss.replace("*", "x") + "_s" + value("--seed")
os.makedirs(folder, exist_ok="--resume" in sys.argv)
result = json.load(open("results.json"))[loss]
result["args"]["seed"] = int(value("--seed"))
with open(folder + "/result.json", "w") as file:
    json.dump(result, file)
"""
SETTINGS = ("DATASETS", "LOSSES", "SEEDS", "DRY_RUN", "DATA_DIR", "JOBS", "SHARE", "PYTHON")


def made_up(loss, seed=0, seconds=30.0):
    """What train.py writes at the end of a run on the generated set."""
    args = new_run({"loss": loss, "dataset": "synthetic", "seed": seed}) | {"environment": {}}
    log = [{"epoch": 1, "loss": 1.0, "seconds": seconds}]
    return {"rank1": 0.5, "mAP": 0.25, "row": row_name(loss), "args": args, "log": log}


@pytest.fixture
def checkout(tmp_path):
    """What someone has who cloned the project, with two finished runs that are checked in, of arcface, of 100 and
    200 s; `python` is the stand-in."""
    folder = tmp_path / "check out"
    (folder / "results/runs").mkdir(parents=True)
    for seed, seconds in ((0, 100.0), (1, 200.0)):
        (folder / f"results/runs/{seed}.json").write_text(json.dumps(made_up("arcface", seed, seconds)))
    shutil.copy(ROOT / "experiments.sh", folder)
    for name in ("utils", "losses", "models", "data"):
        (folder / name).symlink_to(ROOT / name)
    losses = ("softmax", "triplet", "npair", "arcface", "softmax+0.5*triplet")
    (folder / "results.json").write_text(json.dumps({loss: made_up(loss) for loss in losses}))
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    return folder


def write_plan(checkout, losses, seeds="0"):
    """Instead of the project's plan: these commands; and instead of the table the words "the table"."""
    lines = [f"./python train.py --loss '{loss}' --dataset synthetic --seed {seed}\n"
             for seed in seeds.split() for loss in losses.split()]  # fmt: skip
    (checkout / "plan.txt").write_text("".join(lines))
    (checkout / "table.txt").write_text("the table")


def clean_environment(**more):
    return {key: value for key, value in os.environ.items() if key not in (*SETTINGS, "OMP_NUM_THREADS")} | more


def start(checkout, *flags, cwd=None, **environment):
    return subprocess.Popen(
        ["bash", str(checkout / "experiments.sh"), *flags],
        cwd=cwd or checkout,
        env=clean_environment(**{"PYTHON": str(checkout / "python"), **environment}),
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
    """The words of each training that was begun: (threads, train.py, flags)."""
    file = checkout / "calls.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def trained(checkout):
    """Which losses, in their order."""
    return [words[words.index("--loss") + 1] for words in calls(checkout)]


def finished(checkout):
    return sorted(path.parent.name for path in (checkout / "runs").glob("*/result.json"))


def flags_of(line):
    """The flags in a printed command, as train.py understands them; and that it is one."""
    words = [word for word in shlex.split(line) if not word.startswith(("OMP_NUM_THREADS=", "CUDA_VISIBLE_DEVICES="))]
    assert words[1] == "train.py"
    explicit = vars(build_parser().parse_args(words[2:]))
    explicit.pop("resume", None)
    return explicit


def names(out):
    """The run folders of the commands that a dry run prints."""
    return [run_name(new_run(flags_of(line))) for line in out.splitlines()]


@pytest.fixture
def dry(checkout, monkeypatch, capsys):
    """What `DRY_RUN=1 bash experiments.sh` prints in that checkout, but without a shell and a second interpreter."""
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(utils.plan, "__file__", str(checkout / "utils/plan.py"))
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHON", str(checkout / "python"))

    def printed(*flags, **environment):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["plan", *flags])
            for name, value in environment.items():
                patch.setenv(name, value)
            utils.plan.main()
        return capsys.readouterr()

    return printed


def planned(*flags, **environment):
    """The names of the runs that utils.plan makes of flags and environment."""
    return [run_name(args) for args in plan(list(flags), environment)]


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


def test_the_full_table_for_market_and_duke(checkout, dry, market_and_duke):
    """With both data sets and nothing else: every loss x data set x 5 seeds, each command understood by train.py, its
    flags resolved and its data found."""
    out, err = dry(DATA_DIR=str(market_and_duke))
    seen = []
    for line in out.splitlines():
        assert shlex.split(line)[0] == str(checkout / "python") and "--resume" not in line
        args = new_run(flags_of(line))
        assert (args["arch"], args["height"], args["epochs"], args["recipe"]) == ("resnet50", 256, 60, "controlled")
        seen.append((args["seed"], args["dataset"], row_name(args["loss"])))
    assert seen == [(seed, dataset, row) for seed in range(5) for dataset in ("market", "duke") for row in TWELVE]
    for dataset in ("market", "duke"):
        with pytest.warns(UserWarning, match="not the complete data set"):
            assert len(load_dataset(dataset, args["data_dir"]).train) == 2
    assert "120 runs, 0 of them finished before; 120 to do: about 40.0 h of training" in err
    assert "(120 by assumption: 20 minutes a run" in err and ASSUMED[0] == 1200
    assert not (checkout / "runs").exists()


def test_one_of_the_two_is_enough(market_and_duke):
    shutil.rmtree(market_and_duke / "market1501")
    assert planned(DATA_DIR=str(market_and_duke), SEEDS="0", LOSSES="arcface") == ["duke_arcface_s0"]


def test_a_fresh_clone_trains(dry):
    """Without any data set: the generated one by its own recipe, and one seed. What others have trained is looked at
    for the estimate only: their two runs are of arcface, but of the same setting as all."""
    out, err = dry()
    assert "Neither Market-1501 nor DukeMTMC-reID is there: generated pedestrians, one seed." in err
    assert names(out) == [f"synthetic_{row}_s0" for row in TWELVE]
    assert all(flags_of(line).keys() == {"loss", "dataset", "seed"} for line in out.splitlines())
    assert "12 runs, 0 of them finished before; 12 to do: about 30.0 min of training (12 by finished runs" in err


def every_loss():
    return [*ROWS, *sorted({*LOSSES} - {*ROWS, "center"})]  # somebody may have added one


def test_all_losses_and_other_seeds(tmp_path, monkeypatch):
    nowhere = {"DATA_DIR": str(tmp_path), "LOSSES": "npair"}
    assert planned(**nowhere, SEEDS="1 2") == ["synthetic_npair_s1", "synthetic_npair_s2"]
    assert planned(LOSSES="all", DATASETS="synthetic", SEEDS="0") == [f"synthetic_{loss}_s0" for loss in every_loss()]
    monkeypatch.setitem(LOSSES, "mine", LOSSES["softmax"])  # somebody's own: in no row of the tables
    assert planned(LOSSES="all", DATASETS="synthetic", SEEDS="0") == [f"synthetic_{loss}_s0" for loss in every_loss()]
    assert every_loss()[:20] == [*ROWS] and "mine" in every_loss()
    assert planned(DATASETS="synthetic", SEEDS="0") == [f"synthetic_{row}_s0" for row in TWELVE]


def test_lists_from_the_environment(checkout):
    """Through the shell, which must not take the * of an expression for file names."""
    (checkout / "softmax+0.5 or triplet").touch()  # a file that a shell would take the expression for
    lists = {"DATASETS": "synthetic market+duke", "LOSSES": "softmax+0.5*triplet npair", "SEEDS": "3"}
    code, out, err = run(checkout, DRY_RUN="1", **lists)
    assert code == 0 and not calls(checkout) and not (checkout / "runs").exists()
    assert names(out) == [f"{dataset}_{loss}_s3" for dataset in ("synthetic", "market+duke")
                          for loss in ("softmax+0.5xtriplet", "npair")]  # fmt: skip
    assert "Neither" not in err


def test_further_flags_reach_train(dry):
    given = ["--recipe", "published", "--milestones", "4", "8", "--amp", "--loss-args", "margin=0.2", "--workers", "2"]
    (line,) = dry(*given, DATASETS="market", LOSSES="arcface", SEEDS="0").out.splitlines()
    explicit = flags_of(line)
    wanted = {"loss": "arcface", "dataset": "market", "seed": 0, **vars(build_parser().parse_args(given))}
    assert explicit == wanted
    assert run_name(new_run(explicit)) == "market_arcface_s0_published_milestones-4-8_amp_loss-args-margin=0.2"


@pytest.mark.parametrize("share", range(1, 9))
def test_machines_that_share_the_work(share):
    """Each run belongs to exactly one of them, and their numbers differ by one at most."""
    settings = {"DATASETS": "market duke", "SEEDS": "0 1", "LOSSES": "all"}
    parts = [planned(**settings, SHARE=f"{part}/{share}") for part in range(1, share + 1)]
    wanted = [f"{dataset}_{row}_s{seed}" for dataset in ("market", "duke") for row in every_loss() for seed in (0, 1)]
    assert sorted(name for part in parts for name in part) == sorted(planned(**settings)) == sorted(wanted)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("share", ["0/8", "9/8", "2", "2/", "/8", "a/b", "-1/8", "1/8/8", " 1/8"])
def test_a_share_that_is_none(share, capsys):
    with pytest.raises(SystemExit) as stopped:
        planned(DATASETS="market", SHARE=share)
    assert stopped.value.code == 2 and f"SHARE={share} is not of the form 2/8" in capsys.readouterr().err


def test_several_at_a_time_are_bound_to_gpus_or_cores(monkeypatch):
    runs = plan([], {"DATASETS": "market", "LOSSES": "npair arcface triplet", "SEEDS": "0"})
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    for gpus, jobs, wanted in [
        (0, 1, ["", "", ""]),
        (0, 3, ["OMP_NUM_THREADS=2 "] * 3),
        (0, 99, ["OMP_NUM_THREADS=1 "] * 3),
        (1, 3, ["", "", ""]),
        (2, 1, ["", "", ""]),
        (2, 3, ["CUDA_VISIBLE_DEVICES=0 ", "CUDA_VISIBLE_DEVICES=1 ", "CUDA_VISIBLE_DEVICES=0 "]),
    ]:
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        lines = commands(runs, jobs, "my python")
        assert [line.split("'my python' train.py ")[0] for line in lines] == wanted


@pytest.mark.parametrize("key", [*SET_BY, "run_dir", "resume", "show_recipe"])
def test_flags_that_the_script_sets_are_refused(key, capsys):
    flag = f"--{key.replace('_', '-')}"
    value = ["1"] if key == "seed" else [] if key in ("resume", "show_recipe") else ["x"]
    with pytest.raises(SystemExit) as stopped:
        planned(flag, *value, DATASETS="market")
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and flag in sentence and SET_BY.get(key, "use train.py") in sentence


@pytest.mark.parametrize(
    "flags, environment, sentence",
    [
        (["--no-flag"], {}, "unrecognized arguments: --no-flag"),
        ([], {"LOSSES": "arcface no_loss"}, "unknown loss 'no_loss'"),
        ([], {"DATASETS": "marked"}, "Unknown data set 'marked'"),
        ([], {"SEEDS": "0 one"}, "--seed: invalid whole number of 0 or more value: 'one'"),
        (["--sampler", "random", "--p", "3"], {}, "--p and --k belong to --sampler pk"),
    ],
)
def test_a_wrong_call_is_one_sentence(flags, environment, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        planned(*flags, **{"DATASETS": "synthetic", **environment})
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_call_trains_nothing(checkout):
    """Said before the first training, with exit code 2, not after the ones before it."""
    code, out, err = run(checkout, DATASETS="synthetic", LOSSES="arcface no_loss")
    assert code == 2 and out == "" and "unknown loss 'no_loss'" in err.splitlines()[-1] and "Traceback" not in err
    assert not calls(checkout) and not (checkout / "runs").exists()


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_a_number_of_jobs_that_is_none(jobs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plan"])
    for name, value in {"DATASETS": "synthetic", "LOSSES": "npair", "JOBS": jobs}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"JOBS={jobs} is not a number of trainings"):
        utils.plan.main()


def test_paths_are_meant_from_where_it_is_called(checkout, market_and_duke):
    here = market_and_duke.parent
    environment = {"DATA_DIR": "data sets", "PYTHON": os.path.relpath(checkout / "python", here)}
    code, out, _ = run(checkout, cwd=here, DRY_RUN="1", SEEDS="0", LOSSES="npair", **environment)
    assert code == 0 and names(out) == ["market_npair_s0", "duke_npair_s0"]
    line = out.splitlines()[0]
    assert shlex.split(line)[0] == str(checkout / "python") and flags_of(line)["data_dir"] == str(market_and_duke)


def test_a_missing_interpreter_is_named(checkout):
    code, _, err = run(checkout, PYTHON="no-such-python")
    assert code == 2 and "no program no-such-python" in err


def test_help_is_the_head_of_the_file(checkout):
    code, out, _ = run(checkout, "--help")
    assert code == 0 and "DRY_RUN=1 bash experiments.sh" in out and "Exit code" in out and "set -uf" not in out
    assert all(f"{name}=" in out or f"{name}," in out or f"{name} (" in out for name in SETTINGS)


def test_the_estimate_says_what_it_is_based_on(checkout, monkeypatch):
    """By runs of the same data set and flags, of any loss; the user's own count, too; else an assumption."""
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(utils.plan, "__file__", str(checkout / "utils/plan.py"))

    def of(**explicit):
        return new_run({"loss": "npair", "dataset": "synthetic", **explicit})

    assert estimate([of()]) == "about 2.5 min of training (1 by finished runs of the same setting)"
    assert estimate([of(seed=5), of(workers=9)]) == "about 5.0 min of training (2 by finished runs of the same setting)"
    text = estimate([of(), of(epochs=9), of(dataset="market")])
    assert text.startswith("about 26.5 min of training (1 by finished runs") and text.count("1 by assumption: ") == 2
    assert (150 + ASSUMED_SMALL[0] + ASSUMED[0]) / 60 == 26.5
    mine = made_up("triplet", seconds=100.0)
    mine["args"] = of(loss="triplet", epochs=9) | {"environment": {}}
    for name, text in (("mine", json.dumps(mine)), ("broken", "{")):
        (checkout / "runs" / name).mkdir(parents=True)
        (checkout / "runs" / name / "result.json").write_text(text)
    assert estimate([of(epochs=9)]) == "about 1.7 min of training (1 by finished runs of the same setting)"


# -------------------------------------------------------------------------------------- skipped, failed, resumed, ended


def everything(folder):
    """All files but those that a user's runs may leave, with their bytes."""
    mine = ("runs", "__pycache__", "calls.txt", "hanging")
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not {*mine} & {*path.parts}}


def test_runs_end_with_the_table_and_change_no_tracked_file(checkout):
    """The table is that of one's own runs: those that are checked in, of arcface, are not in it."""
    before = everything(checkout)
    code, out, err = run(checkout, LOSSES="npair softmax+0.5*triplet", SEEDS="0 1", cwd="/")
    assert code == 0
    assert finished(checkout) == sorted(f"synthetic_{loss}_s{seed}" for loss in ("npair", "softmax+0.5xtriplet")
                                        for seed in (0, 1))  # fmt: skip
    assert "4 runs, 0 of them finished before; 4 to do" in err
    table = out[out.index("| loss") :]
    assert "25.0 ± 0.0" in table and "2 (0, 1)" in table and table.index("npair") < table.index("Percent; mean")
    assert "| arcface | " not in table.split("**Market")[0]
    assert everything(checkout) == before


def test_finished_runs_are_skipped_and_half_ones_go_on(checkout, dry):
    """Also one that failed before its first epoch; and a run is repeated by removing one folder."""
    environment = {"DATASETS": "synthetic", "LOSSES": "arcface npair triplet", "SEEDS": "0"}
    folders = {loss: checkout / f"runs/synthetic_{loss}_s0" for loss in environment["LOSSES"].split()}
    for loss in ("arcface", "npair"):
        folders[loss].mkdir(parents=True)
    (folders["arcface"] / "result.json").write_text(json.dumps(made_up("arcface")))
    out, err = dry(**environment)
    assert [(name, "--resume" in line) for name, line in zip(names(out), out.splitlines(), strict=True)] == [
        ("synthetic_npair_s0", True), ("synthetic_triplet_s0", False)]  # fmt: skip
    assert "3 runs, 1 of them finished before; 2 to do" in err
    for loss in ("npair", "triplet"):
        folders[loss].mkdir(exist_ok=True)
        (folders[loss] / "result.json").write_text(json.dumps(made_up(loss)))
    out, err = dry(**environment)
    assert out == "" and "3 runs, 3 of them finished before." in err  # nothing is left
    shutil.rmtree(folders["arcface"])
    out, err = dry(**environment)
    assert names(out) == ["synthetic_arcface_s0"] and "--resume" not in out


def test_one_failing_run_does_not_stop_the_others(checkout):
    write_plan(checkout, "softmax triplet npair", seeds="0 1")
    code, out, err = run(checkout, FAILING="triplet")
    assert code == 1 and out == "the table"
    assert trained(checkout) == ["softmax", "triplet", "npair"] * 2 and len(finished(checkout)) == 4
    assert err.count("train.py: no good") == 2
    failed = [line for line in err.splitlines() if line.startswith("FAILED: ")]
    assert [names(line.removeprefix("FAILED: ")) for line in failed] == [["synthetic_triplet_s0"],
                                                                         ["synthetic_triplet_s1"]]  # fmt: skip


def test_nothing_but_failures_is_no_table(checkout):
    write_plan(checkout, "softmax")
    (checkout / "table.txt").unlink()
    code, out, err = run(checkout, FAILING="softmax")
    assert code == 1 and out == "" and "holds no finished runs" in err and "Traceback" not in err


def test_several_at_a_time(checkout):
    """Two that wait for each other end; and one that fails stops none of the others."""
    text = (checkout / "python").read_text()
    wait = """
while loss in ("softmax", "triplet") and open("calls.txt").read().count("\\n") < 2:
    time.sleep(0.01)
if loss in"""
    (checkout / "python").write_text(text.replace("\nif loss in", wait.replace("\\\\", "\\"), 1))
    write_plan(checkout, "softmax triplet npair arcface")
    code, out, err = run(checkout, FAILING="softmax", JOBS="2")
    assert code == 1 and sorted(trained(checkout)) == ["arcface", "npair", "softmax", "triplet"]
    assert len(finished(checkout)) == 3 and out == "the table"


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("exit_code", ["130", "143"])
def test_ctrl_c_stops_everything(checkout, exit_code, jobs):
    """As a terminal sends it, to the script and to the trainings: nothing more is begun."""
    write_plan(checkout, "softmax triplet npair arcface", seeds="0 1")
    process = start(checkout, HANGING="triplet npair", EXIT_CODE=exit_code, JOBS=jobs)
    deadline = time.monotonic() + 60
    while len(calls(checkout)) < 1 + int(jobs) or not (checkout / "hanging").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == ""
    assert sorted(trained(checkout)) == sorted(["softmax", "triplet", "npair"][: 1 + int(jobs)])
    assert finished(checkout) == ["synthetic_softmax_s0"]
    assert "Stopped. The same command goes on from here." in err and "Traceback" not in err


@pytest.mark.parametrize("exit_code", ["130", "143"])
def test_a_training_that_was_ended_alone_stops_the_script(checkout, exit_code):
    """SIGTERM to one training, say: no other is begun."""
    text = (checkout / "python").read_text()
    (checkout / "python").write_text(text.replace("time.sleep(60)", "raise KeyboardInterrupt"))
    write_plan(checkout, "softmax triplet npair")
    code, out, err = run(checkout, HANGING="triplet", EXIT_CODE=exit_code)
    assert code == 130 and trained(checkout) == ["softmax", "triplet"] and "goes on from here" in err and out == ""


def test_with_train_py_itself(checkout, tmp_path):
    """Nothing stands in here: a loss trains for an epoch on a tiny data set."""
    for name in ("train.py", "evaluate.py"):
        (checkout / name).symlink_to(ROOT / name)
    data = write_tiny_market(tmp_path / "data/market1501").parent
    flags = "--arch resnet18 --weights none --height 32 --width 16 --epochs 1 --p 4 --k 2 --workers 1 --device cpu"
    before = everything(checkout)
    environment = {"DATA_DIR": str(data), "LOSSES": "arcface", "SEEDS": "0", "JOBS": "2", "PYTHON": sys.executable}
    code, out, err = run(checkout, *flags.split(), **environment)
    assert code == 0 and "Traceback" not in err
    name = "market_arcface_s0_arch-resnet18_weights-none_height-32_width-16_epochs-1_p-4_k-2"
    assert finished(checkout) == [name] and everything(checkout) == before
    made = json.loads((checkout / "runs" / name / "result.json").read_text())
    assert f"| {100 * made['rank1']:.1f} " in out and "**Market-1501 (incomplete), controlled recipe" in out
    assert made["args"]["explicit"]["epochs"] == 1 and made["args"]["data_dir"] == str(data)
    assert DEFAULTS["epochs"] == 60
