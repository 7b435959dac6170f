"""The README can't rot: its commands parse, its files exist, it stays short."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from losses import TWELVE

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def commands():
    """Every shell line of the README's code blocks, continuation lines joined, comments cut off."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def python_calls(script):
    """The argument lists that the README gives to a script."""
    calls = []
    for line in commands():
        for part in line.split("&&"):
            words = [word for word in shlex.split(part) if not re.fullmatch(r"[A-Z_]+=.*", word)]
            if words[:2] == ["python", script]:
                calls.append(words[2:])
    return calls


def test_the_two_set_up_commands_are_there_once():
    for start in ("pip install -r requirements.txt && python train.py ",
                  "pip install -r tests/requirements.txt && python -m pytest"):  # fmt: skip
        assert sum(line.startswith(start) for line in commands()) == 1, start


def test_every_training_command_resolves():
    calls = python_calls("train.py")
    assert len(calls) >= 3
    for call in calls:
        explicit = vars(train.build_parser().parse_args(call))
        if "resume" not in explicit:
            train.resolve_flags(explicit)


def test_every_evaluation_command_parses():
    import evaluate

    calls = python_calls("evaluate.py")
    assert len(calls) >= 3
    for call in calls:
        evaluate.parse_flags(call)


def test_every_script_and_file_exists():
    for line in commands():
        for name in re.findall(r"(?:python|bash) ((?:\w+/)*\w+\.(?:py|sh))", line):
            assert (ROOT / name).is_file(), line
        for module in re.findall(r"python -m ((?:data|utils)\.\w+)", line):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), line
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_tests_of_the_table_of_faults_exist():
    table = re.search(r"## What happens when things go wrong\n(.*?)\n## ", README, flags=re.S)[1]
    rows = [row for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 12
    for row in rows:
        cell, file = row.split("|")[3], None
        for name in re.findall(r"test_\w+\.py|`\w+`", cell):
            if name.startswith("`"):
                assert re.search(rf"^def test_\w*{name[1:-1]}", (ROOT / "tests" / file).read_text(), flags=re.M), row
            else:
                file = name
        assert (ROOT / "tests" / file).is_file(), row


def row_of(first_cell, second_cell=""):
    """The cells of the README's one table row that begins so."""
    start = f"| {first_cell} | {second_cell}"
    (row,) = [line for line in README.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in row.strip("|").split("|")]


def digits(value):
    """As the README gives it: two digits of what is below 10, else none behind the point."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def test_the_numbers_of_the_training_table():
    names = {("resnet18", "float32"): "ResNet-18, 128x64", ("resnet50", "float32"): "ResNet-50, 256x128"}
    folder = ROOT / "results/benchmarks"
    files = [path for end in ("", "-resnet18") for path in folder.glob(f"training_*-threads{end}.json")]
    rows = [(file, row) for file in files for row in json.loads(file.read_text())["rows"]]
    assert len(rows) == 5
    for file, row in rows:
        name = "the same, nine turns" if file.stem.endswith("resnet18") else names[row["arch"], "float32"]
        cells = row_of(name, row["precision"])
        speed = row["images_per_second"]
        ways = ("train.py", "bare loop", "bare loop, NCHW")
        assert cells[2:5] == [digits(speed[way]["median"]) for way in ways]
        low, high = row["share_of_bare_loop_spread"]
        assert cells[5] == f"{row['share_of_bare_loop']:.2f} ({low:.2f} to {high:.2f})"
        assert cells[6] == f"{row['times_torchreid']:.2f}"


def test_the_numbers_of_the_evaluator_table():
    (file,) = (ROOT / "results/benchmarks").glob("evaluator_*-threads.json")
    sizes = {"market": "Market", "msmt17": "MSMT17", "market500k": "Market+500k"}
    found = json.loads(file.read_text())["cpu"]
    assert [size["size"] for size in found] == list(sizes)
    for size in found:
        cells = row_of(f"{sizes[size['size']]}, {size['query']:,} x {size['gallery']:,}")
        alone, ours, by_sort = (size["ways"][way] for way in ("product alone", "this evaluator", "full sort, torch"))
        product = alone["seconds"]["median"]
        after = ours["after_product_seconds"]["median"] / product
        assert cells[1:] == [
            f"{product:.3g} s", f"{ours['seconds']['median']:.3g} s", f"{ours['times_product']:.2f}", f"{after:.2f}",
            f"{ours['extra_mib']:.0f} MiB", f"{by_sort['seconds']['median']:.3g} s, {by_sort['extra_mib']:,.0f} MiB",
        ]  # fmt: skip


@pytest.mark.parametrize("row", TWELVE)
def test_the_table_of_losses_has_every_row(row):
    assert re.search(rf"^\| `{re.escape(row)}` \|", README, flags=re.M)


def test_copy_a_loss_example_runs(tmp_path):
    """The lines under "Copy a loss", as they stand, beside a copied file in an otherwise empty folder."""
    (block,) = re.findall(r"## Copy a loss.*?```python\n(.*?)```", README, flags=re.S)
    assert len(block.splitlines()) == 4
    shutil.copy(ROOT / "losses/arcface.py", tmp_path)
    before = "import torch\nembeddings = torch.randn(8, 2048, requires_grad=True)\nlabels = torch.arange(8) % 4\n"
    after = "assert loss.isfinite() and embeddings.grad.abs().sum() > 0 and loss_fn.weight.grad.abs().sum() > 0\n"
    (tmp_path / "loop.py").write_text(before + block + after)
    subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, check=True, timeout=120)


def test_copy_the_ranking_example_runs(tmp_path):
    (block,) = re.findall(r"```python\n(from ranking import .*?)```", README, flags=re.S)
    shutil.copy(ROOT / "utils/ranking.py", tmp_path)
    before = "import torch\nquery, gallery = torch.randn(2, 8), torch.randn(6, 8)\ndistance = -query @ gallery.T\n"
    before += "query_pids, query_camids = [1, 2], [1, 1]\ngallery_pids, gallery_camids = [1, 2, 3, 0, -1, 1], [2] * 6\n"
    (tmp_path / "score.py").write_text(before + block)
    subprocess.run([sys.executable, "score.py"], cwd=tmp_path, check=True, timeout=120)


def test_short():
    """Apart from the generated tables."""
    written = re.sub(r"<!-- results -->.*?<!-- end -->", "", README, flags=re.S)
    assert len(written.splitlines()) < 260
