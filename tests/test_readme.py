"""The READMEs can't rot: commands parse, files exist, tables and findings are those of results/, blocks work."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

import evaluate
import train
from losses import ROWS
from utils import plan, results
from utils.flags import build_parser, least_scale, new_run
from utils.orders import changes_from, one_trick_more, signed
from utils.runs import describe, load_groups
from utils.statistics import interval

ROOT = Path(__file__).resolve().parent.parent
READMES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
           for path in [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]}  # fmt: skip
README, RESULTS, TESTS = READMES["README.md"], READMES["results/README.md"], READMES["tests/README.md"]
NAMES = {"LOSS": "softmax", "SEED": "0"}  # what a command leaves to the reader


def commands(text):
    """Every shell line of the code blocks, continuation lines joined, comments cut off, and every command in a line."""
    found = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S)
    found += re.findall(r"(?:^    (?:python|pip|bash|[A-Z_]+=) ?.*\n)+", text, flags=re.M)
    lines = "\n".join(found).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:[A-Z]+=\S+ )*(?:python|bash) [^`]+)`", text)
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def calls(program):
    """(environment, arguments, README) wherever one gives words to a program such as `python train.py`."""
    found = []
    for name, text in READMES.items():
        for part in [part for line in commands(text) for part in line.split("&&")]:
            words = [NAMES.get(word, word) for word in shlex.split(part)]
            environment = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=.*", word))
            words = words[len(environment) :]
            if words[: len(program.split())] == program.split():
                found.append((environment, words[len(program.split()) :], name))
    return found


# ------------------------------------------------------------------------------------------------------------ commands


def test_the_two_set_up_commands_are_there_once_and_continuous_integration_finds_them():
    for file, rest in {"requirements.txt": "python train.py --loss arcface --dataset synthetic",
                       "tests/requirements.txt": "python -m pytest -n auto --dist loadfile"}.items():  # fmt: skip
        lines = [line for line in README.splitlines() if f"pip install -r {file} &&" in line]
        assert lines == [f"pip install -r {file} && {rest}"]  # no comment behind: .ci/run appends flags
    script = (ROOT / ".ci/run").read_text()
    assert 'grep -m 1 -F "pip install -r $1 &&" README.md' in script
    flags = re.search(r'eval "\$training (.*)"', script)[1].replace("$work", "w").replace("${EPOCHS:-3}", "3")
    words = shlex.split(f"--loss arcface --dataset synthetic {flags}")
    explicit = vars(build_parser().parse_args(words))
    assert new_run({key: value for key, value in explicit.items() if key != "run_dir"})["epochs"] == 3


def test_every_training_command_resolves():
    found = calls("python train.py")
    assert len([name for _, _, name in found if name == "README.md"]) >= 6
    for _, words, _ in found:
        explicit = vars(build_parser().parse_args(words))
        if not explicit.pop("resume", False):
            new_run({key: value for key, value in explicit.items() if key not in ("run_dir", "show_recipe")})


def test_every_evaluation_command_parses():
    found = calls("python evaluate.py")
    assert len(found) >= 4
    for _, words, _ in found:
        evaluate.parse_flags(words)


def test_every_experiment_can_be_planned():
    found = calls("bash experiments.sh")
    assert len(found) >= 2
    for environment, words, _ in found:
        environment = {name: text.replace("$SLURM_ARRAY_TASK_ID", "1") for name, text in environment.items()}
        assert plan.plan(words, {"DATASETS": "market", **environment})


def test_every_script_module_link_and_heading_exists():
    missing = []
    for name, text in READMES.items():
        for line in commands(text):
            missing += [line for file in re.findall(r"(?:python|bash) ((?:\w+/)*\w+\.(?:py|sh))", line)
                        if not (ROOT / file).is_file()]  # fmt: skip
            for module in re.findall(r"python -m ((?:data|utils|tools)\.\w+)", line):
                missing += [] if (ROOT / (module.replace(".", "/") + ".py")).is_file() else [line]
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            file, _, heading = link.partition("#")
            target = (ROOT / name).parent / file
            if not target.exists():
                missing.append(f"{name}: {link}")
            elif heading:
                headings = [line.strip("# ").lower().replace(" ", "-") for line in target.read_text().splitlines()]
                missing += [] if heading in headings else [f"{name}: {link}"]
    assert not missing, missing


def test_the_tests_of_the_tables_exist():
    rows = [row for row in TESTS.splitlines() if row.startswith("| ") and "test_" in row]
    assert len(rows) > 30
    for row in rows:
        file = None
        for name in re.findall(r"test_\w+\.py|`\w+`", row.strip("|").split("|")[-1]):
            if name.startswith("`"):
                assert re.search(rf"^def test_\w*{name[1:-1]}", (ROOT / "tests" / file).read_text(), flags=re.M), row
            else:
                file = name
                assert (ROOT / "tests" / file).is_file(), row


# ------------------------------------------------------------------------------------------------------------- numbers


def test_short():
    """A few screens and short paragraphs."""
    lines = README.splitlines()
    table = README.partition(results.BEGIN)[2].partition(results.END)[0].strip().splitlines()
    assert len(lines) - len(table) <= 138, "README.md: a line too many beside its table"
    assert max(map(len, lines)) <= 200


@pytest.mark.parametrize("name, options", [("README.md", ["--short"]), ("results/README.md", [])])
def test_a_readme_shows_the_runs_in_results(name, options, tmp_path, capsys):
    shutil.copy(ROOT / name, tmp_path / "README.md")
    results.main([str(ROOT / "results"), *options, "--update", str(tmp_path / "README.md")])
    assert "is left out" not in capsys.readouterr().err, "two runs of one cell: remove one"
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == READMES[name], (
        f"run: python -m utils.results results {' '.join(options)} --update {name}, "
        "then: python -m utils.figure results --out results/comparison.png"
    )


def findings():
    return " ".join(RESULTS.partition("## What was found")[2].partition("![Mean mAP")[0].split())


def groups_by_recipe():
    """The runs of the controlled recipe, of others, and of the large set: loss -> seed -> run."""
    groups, plain = load_groups(ROOT / "results"), {"loss": "softmax", "dataset": "synthetic"}
    settings = {
        "controlled": {},
        "published": {"recipe": "published"},
        "tricks": {"recipe": "tricks"},
        "large": {"synthetic_ids": 751, "amp": True},
    }
    found = {name: groups[describe(new_run({**plain, **flags}))] for name, flags in settings.items()}
    for loss, pair in (("circle", "scale=128"), ("supcon", "temperature=0.1")):
        found["large"] |= groups[describe(new_run({**plain, **settings["large"], "loss": loss, "loss_args": [pair]}))]
    return groups, found


def test_the_trials_behind_each_losss_own_numbers():
    trials = [json.loads(line) for line in (ROOT / "results/tuning/synthetic.jsonl").read_text().splitlines()[1:]]
    counts = sorted(sum(trial["row"] == row for trial in trials) for row in ROWS)
    assert counts == [1, *[3] * 18, 4] and "about three trials each, one seed (`tuning/`)" in findings()


def by_map(rows, seed=0):
    """The losses by mAP with this seed, the highest first."""
    return sorted((loss for loss in rows if seed in rows[loss]), key=lambda loss: -rows[loss][seed]["mAP"])


def test_findings_of_the_controlled_recipe():
    """Each number as the sentence gives it, worked out from the runs."""
    found, controlled = findings(), groups_by_recipe()[1]["controlled"]
    summary = {entry["row"]: entry for entry in results.summarise(controlled)}
    twelve = {loss: entry for loss, entry in summary.items() if entry["part"] == "published"}
    n, comparisons = {len(entry["seeds"]) for entry in twelve.values()}, twelve["softmax"]["comparisons"]
    assert f"twelve losses** (n = {n.pop()}, {comparisons} comparisons)" in found and not n
    tied = sorted((loss for loss, entry in twelve.items() if entry["p"] and entry["p"] > 0.05),
                  key=lambda loss: -twelve[loss]["mAP"][0])  # fmt: skip
    assert twelve["multi_similarity"]["best"] and tied == ["softmax+triplet", "softmax+center", "triplet"]
    p_values = ", ".join(f"{twelve[loss]['p']:.2f}" for loss in tied)
    assert f"(p = {p_values}), which is no proof of being equal" in found

    assert [by_map({loss: controlled[loss] for loss in twelve}, seed)[0] for seed in range(5)] == [
        *["multi_similarity"] * 3, *["softmax+triplet"] * 2]  # fmt: skip
    three = results.summarise({loss: {seed: controlled[loss][seed] for seed in range(3)} for loss in twelve})
    p_values = {entry["row"]: entry["p"] for entry in three if entry["p"] is not None}
    assert p_values.pop("npair") < 0.05 and f"the others' p is {min(p_values.values()):.2f} or more" in found

    later = {loss: entry for loss, entry in summary.items() if entry["part"] == "later"}
    assert [loss for loss, entry in later.items() if entry["higher"]] == ["adasp"] and len(later) == 8
    n, comparisons = {len(entry["seeds"]) for entry in later.values()}, later["adasp"]["comparisons"]
    assert f"same recipe** (n = {n.pop()}, {comparisons} comparisons with multi-similarity" in found and not n
    adasp, highest = (100 * summary[loss]["mAP"][0] for loss in ("adasp", "multi_similarity"))
    assert f"(mAP {adasp:.1f} against {highest:.1f}, not shown to be higher, p = {later['adasp']['p']:.2f})" in found
    seconds = groups_by_recipe()[0][describe(new_run({"loss": "adasp", "dataset": "synthetic", "synthetic_seed": 1}))]
    across = [test["mAP"] for run in seconds["adasp"].values() for test in run["across"]]
    assert f"has {100 * np.mean(across):.1f} on the same test instead of {adasp:.1f}" in found and len(across) == 3
    lower = {loss for loss, entry in later.items() if entry["p"] < 0.05}
    p_values = [entry["p"] for loss, entry in later.items() if loss not in {*lower, "adasp"}]
    assert lower == {"circle", "weighted_triplet"} and len(p_values) == 5
    assert f"(p = {min(p_values):.2f}, just above, to {max(p_values):.2f})" in found and 0.05 < min(p_values) < 0.051
    for loss in ("adasp", "adaface"):
        ranked = [json.loads((ROOT / f"results/reranking/{loss}_s{seed}.json").read_text()) for seed in range(5)]
        assert all((run["k1"], run["k2"], run["lambda_"]) == (20, 6, 0.3) for run in ranked)
        gains = [signed(*interval([run[key] - controlled[loss][seed][key] for seed, run in enumerate(ranked)]))
                 for key in ("rank1", "mAP")]  # fmt: skip
        assert f"{loss} {gains[0]} and {gains[1]}" in found


def test_findings_of_other_recipes():
    found, (groups, rows) = findings(), groups_by_recipe()
    controlled = rows["controlled"]
    changed = {name: changes_from(controlled, rows[name]) for name in ("published", "tricks")}
    published = {entry["row"]: entry for entry in results.summarise(rows["published"])}
    assert {tuple(entry["seeds"]) for entry in published.values()} == {(0, 1, 2)} and len(published) == 12
    shown = {loss: signed(mean, None) for loss, (mean, *_, p) in changed["published"].items() if p < 0.05}
    assert sorted(shown) == ["multi_similarity", "softmax", "softmax+triplet", "sphereface"]
    assert "Published recipe** (n = 3, 12 comparisons with the controlled recipe): softmax (" in found
    assert f"softmax ({shown['softmax']} points of mAP) and sphereface ({shown['sphereface']}) are higher" in found
    triplet, multi_similarity = shown["softmax+triplet"], shown["multi_similarity"]
    assert f"higher, softmax+triplet ({triplet}) and multi-similarity ({multi_similarity}) lower" in found
    rest = [p for loss, (*_, p) in changed["published"].items() if loss not in shown]
    assert len(rest) == 8 and f"other eight not shown to differ (p = {min(rest):.2f} to {max(rest):.2f})" in found
    first = sorted(published, key=lambda loss: -published[loss]["mAP"][0])[:3]
    assert "{} has the highest mean, before {} and {}, and".format(*first) in found
    p_values = {loss: entry["p"] for loss, entry in published.items() if loss != first[0]}
    lower = [p_values.pop(loss) for loss in ("cosface", "multi_similarity", "softmax+triplet", "npair")]
    assert max(lower) < 0.05 < min(p_values.values())
    least = min(p_values.values())
    assert f"N-pair are lower than it (11 comparisons; the others' p is {least:.2f} or more)" in found
    two = {loss: {seed: runs[seed] for seed in (0, 1)} for loss, runs in rows["published"].items()}
    assert min(p for *_, p in changes_from(controlled, two).values()) > 0.05
    assert "Two seeds with them showed no difference" in found

    tricks = {entry["row"]: entry for entry in results.summarise(rows["tricks"])}
    assert {tuple(entry["seeds"]) for entry in tricks.values()} == {(0, 1, 2)} and len(tricks) == 12
    means = sorted(tricks, key=lambda loss: -tricks[loss]["mAP"][0])
    assert means[:3] == ["histogram", "focal", "softmax+center"]
    shown = "{}, {} and {} come first instead, with all tricks (n = 3) {}.".format(*first, means[0])
    assert f"recipe (n = 3) {shown}" in " ".join(README.split())
    p_values = {loss: p for loss, (*_, p) in changed["tricks"].items()}
    assert f"N-pair is not shown to differ (p = {p_values.pop('npair'):.2f})" in found
    lost = sorted((-100 * changed["tricks"][loss][0], loss) for loss in p_values)
    assert max(p_values.values()) < 0.05 and len(lost) == 11 and lost[0][0] > 0
    (least, first), *_, (most, last) = lost
    assert (first, last) == ("histogram", "multi_similarity")
    assert f"by {least:.0f} (histogram) to {most:.0f} points of mAP (multi-similarity)" in found
    p_values = {loss: entry["p"] for loss, entry in tricks.items() if loss != "histogram"}
    assert p_values.pop("npair") < 0.05 and min(p_values.values()) > 0.05
    assert f"(11 comparisons; the others' p is {min(p_values.values()):.2f} or more)" in found
    assert "(`--recipe tricks`, n = 3, 12 comparisons with the controlled recipe): eleven losses are lower" in found
    alone = one_trick_more(groups, describe(new_run({"loss": "softmax", "dataset": "synthetic"})))
    changes = {flag: [each[0] for _, each in sorted(changes_from(controlled, runs).items(), reverse=True)]
               for flag, runs in alone.items()}  # fmt: skip
    for flag in ("--milestones 2 3", "--neck bn", "--last-stride 1"):
        softmax, multi_similarity = (signed(each, None) for each in changes.pop(flag))
        assert f"({softmax} and {multi_similarity})" in found, flag
    low, high = (signed(find(each for pair in changes.values() for each in pair), None) for find in (min, max))
    assert f"the others between {low} and {high};" in found
    assert {len(runs) for rows in alone.values() for runs in rows.values()} == {2}
    assert "(softmax and multi-similarity, n = 2, no test)" in found

    medians = {
        "two seeds of controlled": "two seeds of the controlled recipe {},",
        "two seeds of published": "of the published {},",
        "two seeds of tricks": "of tricks {}, so",
        "controlled and published": "controlled and published {},",
        "controlled and tricks": "controlled and tricks {},",
        "published and tricks": "published and tricks {};",
        "controlled and Market-1501 as published": "with Market-1501 as published {},",
        "published and Market-1501 as published": ", {} and ",
        "tricks and Market-1501 as published": "and {} (controlled, published, tricks)",
    }
    for name, words in medians.items():
        median = re.search(rf"^\| {re.escape(name)} +\| (\S+)", RESULTS, flags=re.M)[1]
        assert words.format(median) in found, name

    large = rows["large"]
    assert by_map(large)[:4] == ["softmax+triplet", "triplet", "circle", "arcface"] and len(large) == 14
    for loss in by_map(large)[:4]:
        assert f"{loss} {100 * large[loss][0]['rank1']:.1f} / {100 * large[loss][0]['mAP']:.1f}" in found
    for loss in ("sphereface", "sphereface_m1"):
        assert f"{loss} ({100 * large[loss][0]['rank1']:.1f} / {100 * large[loss][0]['mAP']:.1f})" in found

    tables = " ".join(RESULTS.partition("## Tables")[2].split())
    for loss, name in (("softmax", "softmax"), ("multi_similarity", "multi-similarity;")):
        again = json.loads((ROOT / f"results/again/{loss}_s0.json").read_text())["mAP"]
        assert f"{100 * again:.1f} instead of {100 * controlled[loss][0]['mAP']:.1f} ({name}" in tables

    untrained = json.loads((ROOT / "results/benchmarks/synthetic.json").read_text())["found"]["untrained"]
    assert f"rank-1 {100 * untrained['rank1']:.1f}, mAP {100 * untrained['mAP']:.1f}" in found
    assert f"Untrained: {100 * untrained['rank1']:.1f} / {100 * untrained['mAP']:.1f}." in README
    npair = 100 * (results.summarise({"npair": controlled["npair"]})[0]["rank1"][0] - untrained["rank1"])
    assert f"N-pair ends {npair:.0f} points of rank-1 above" in found
    for path in (ROOT / "results/npair/runs").glob("*.json"):
        run = json.loads(path.read_text())
        assert f"{100 * run['rank1']:.1f} / {100 * run['mAP']:.1f}" in found


SMALL = {  # what was tried for few people, as the table of results/README.md names it: part of the files' names
    "arcface, scale 64, margin 0.1 (elsewhere)": "arcface.default",
    "arcface, scale 16, margin 0.1, head 1e-3": "arcface.16",
    "arcface, least scale, margin 0.1, head 1e-3": "arcface.bound",
    "cosface, scale 30, margin 0.35 (elsewhere)": "cosface.default",
    "cosface, scale 16, margin 0.1, head 1e-3": "cosface.16",
    "cosface, least scale, margin 0.1, head 1e-3": "cosface.bound",
    "softmax (elsewhere)": "softmax.default",
    "softmax, head 1e-3": "softmax.head",
}


def test_the_table_of_small_sets():
    """Mean mAP and the number of seeds, from the runs; a cell is empty where nothing was run."""
    shown = RESULTS.partition("## Small sets")[2].partition("\n## ")[0]
    for name, variant in SMALL.items():
        cells = []
        for people in (20, 40, 150, 751):
            files = sorted((ROOT / "results/small_sets/runs").glob(f"small{people}_{variant}_s*.json"))
            runs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
            assert all(run["args"]["synthetic_ids"] == people for run in runs)
            scores = [100 * run["mAP"] for run in runs]
            cells.append(f"{sum(scores) / len(scores):.1f} ({len(scores)})" if scores else "")
        assert f"| {' | '.join([name, *cells])} |\n" in shown
    scales = [f"{least_scale(people):.1f}" for people in (20, 40, 150, 751)]
    assert f"{', '.join(scales[:3])} and {scales[3]}" in " ".join(shown.split())


def test_the_output_is_that_of_the_recorded_run():
    """Number for number; the speed is the mean of the run, since single epochs' are not kept."""
    run = json.loads((ROOT / "results/runs/synthetic_arcface_s0_quick.json").read_text())
    output = re.search(r"```\n(synthetic: .*?)```", README, flags=re.S)[1]
    steps, batch = map(int, re.search(r"5 epochs x (\d+) steps x (\d+) images", output).groups())
    speed = 5 * steps * batch / run["seconds"]
    for line in run["log"]:
        assert f"\nepoch {line['epoch']}/5: loss {line['loss']:.4f}, {speed:.0f} images/s\n" in output
    assert output.strip().endswith(evaluate.metrics_table(run, "synthetic arcface"))


# -------------------------------------------------------------------------------------------------------------- blocks


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def test_copy_a_loss(tmp_path):
    """The lines under "Copy a loss", as they stand, beside a copied file in an otherwise empty folder."""
    (block,) = [block for block in blocks(README) if block.startswith("from arcface")]
    assert len(block.splitlines()) == 4
    shutil.copy(ROOT / "losses/arcface.py", tmp_path)
    before = "import torch\nembeddings = torch.randn(8, 2048, requires_grad=True)\nlabels = torch.arange(8) % 4\n"
    after = "assert loss.isfinite() and embeddings.grad.abs().sum() > 0 and loss_fn.weight.grad.abs().sum() > 0\n"
    (tmp_path / "loop.py").write_text(before + block + after)
    subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, check=True, timeout=120)


def test_a_finished_run_in_ones_own_script(flags, small_network, tmp_path, monkeypatch):
    (block,) = [block for block in blocks(README) if "load_run" in block]
    monkeypatch.chdir(tmp_path)
    train.main(["--loss", "arcface", *flags[:-1], "runs/synthetic_arcface_s0", "--epochs", "0"])
    for name in ("anna/1.jpg", "anna/2.jpg", "ben.jpg"):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 90), "red").save(Path("photos", name))
    Path("script.py").write_text(block)
    found = runpy.run_path("script.py")
    assert found["embeddings"].shape == (3, found["model"].embedding_dim) and len(found["paths"]) == 3


def test_features_of_another_project(tmp_path, monkeypatch, capsys):
    """pytorch_result.mat as it is written there: features, and lists of labels and cameras. A single query, too."""
    (block,) = [block for block in blocks(READMES["data/README.md"]) if "loadmat" in block]
    monkeypatch.chdir(tmp_path)
    gallery, query = np.eye(4, 6, dtype=np.float32), np.array([[0.0, 2, 1, 0, 0, 0]], np.float32)
    result = {"gallery_f": gallery, "gallery_label": [1, 2, 3, -1], "gallery_cam": [1, 2, 3, 1]}
    scipy.io.savemat("pytorch_result.mat", {**result, "query_f": query, "query_label": [3], "query_cam": [1]})
    exec(block, {})
    evaluate.main(["--features", "features.npz"])
    scores = capsys.readouterr().out.splitlines()[2].split()  # the true match is second behind person 2
    assert scores[2:4] == ["0.00", "100.00"] and scores[6] == "50.00"


def copy_tree(folder):
    kept = ("losses", "models", "data", "utils", "tests", "benchmarks", "tools")
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "requirements.txt"]:
        shutil.copy(path, folder)
    return folder


def apply(block, folder):
    """`# PATH` begins a new file; in one that exists, imports go to the others and the line to the dict named last."""
    new = []
    for piece in re.split(r"^(?=# \S+\.py\b)", block, flags=re.M)[1:]:
        head, _, body = piece.partition("\n")
        path = folder / re.match(r"# (\S+\.py)", head)[1]
        if not path.exists():
            path.write_text(body)
            new.append(path)
            continue
        text, name = path.read_text(), head.split()[-1]
        imports = "".join(line for line in body.splitlines(keepends=True) if line.startswith("from "))
        (entry,) = [line for line in body.splitlines(keepends=True) if line.startswith("    ")]
        text = re.sub(r"^(?=from )", imports, text, count=1, flags=re.M)
        text, times = re.subn(rf"^({name}\b.*\{{\n)", rf"\g<1>{entry}", text, flags=re.M)
        assert times == 1, name
        path.write_text(text)
    return new


def test_add_a_loss_a_data_set_and_a_backbone_literally(tmp_path):
    """Each is one file, its import and its line, one test: these pass, and so do those that find it by themselves."""
    for path in ("losses/norm_softmax.py", "data/mine.py", "models/tiny.py"):
        if (ROOT / path).exists():
            pytest.skip(f"{path} is in this checkout already")
    folder, new = copy_tree(tmp_path), []
    for name in ("README.md", "data/README.md", "models/README.md"):
        (block,) = [block for block in blocks(READMES[name]) if "# tests/" in block]
        new += apply(block, folder)
    names = ["norm_softmax", "mine", "tiny"]
    assert [path.stem for path in new] == [stem for name in names for stem in (name, f"test_{name}")]
    how = {"cwd": folder, "capture_output": True, "text": True, "timeout": 600}
    others = [f"tests/test_{name}.py" for name in ("losses", "loss_files", "structure", "models")]
    others += ["tests/test_experiments.py::test_all_losses_and_other_seeds"]
    of_all = "rows or default or wrong or arguments or state or expressions or all_losses"
    chosen = ["-k", f"{' or '.join(names)} and not convnext or {of_all}"]
    chosen += [f"tests/{path.name}" for path in new[1::2]] + others
    options = ["-v", "--assert=plain", "-p", "no:cacheprovider", "-o", "addopts="]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *chosen], **how)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:  # its own test, and others that find it by themselves
        passed = re.findall(rf"^tests/(\w+)\.py::.*{name}.* PASSED", done.stdout, flags=re.M)
        assert {f"test_{name}"} < {*passed}, passed
    words = ["--loss", "softmax+norm_softmax", "--dataset", "mine+market", "--arch", "tiny", "--show-recipe"]
    done = subprocess.run([sys.executable, "train.py", *words], **how)
    assert done.returncode == 0 and all(word in done.stdout for word in words[:-1]), done.stderr
