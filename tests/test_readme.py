"""The README can't rot: its commands parse, its files exist, it stays short."""

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
    assert len(README.splitlines()) < 290
