"""Who imports whom, and which names stay where, read from the source."""

import ast
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest

from data import DATASETS

ROOT = Path(__file__).resolve().parent.parent
OURS = ("losses", "models", "data", "utils", "evaluate", "train", "benchmarks")
SOURCES = sorted(
    path
    for place in ("losses", "models", "data", "utils", "benchmarks", "tests", ".")
    for path in (ROOT / place).glob("*.py")
)


def imports(path):
    """Every module that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module)
    return modules


def ours(path):
    return {module for module in imports(path) if module.split(".")[0] in OURS}


def files(pattern):
    found = [path for path in sorted(ROOT.glob(pattern)) if path.name != "__init__.py"]
    assert found, pattern
    return found


@pytest.mark.parametrize("path", [*files("losses/*.py"), ROOT / "utils/ranking.py"], ids=lambda path: path.stem)
def test_files_to_copy_import_torch_and_math_only(path):
    assert {module.split(".")[0] for module in imports(path)} <= {"torch", "math"}


def test_losses_package_imports_its_neighbours_only():
    assert all(module.startswith("losses.") for module in ours(ROOT / "losses/__init__.py"))


READERS = {Path(inspect.getfile(reader)) for reader in DATASETS.values()} - {ROOT / "data/__init__.py"}


@pytest.mark.parametrize("path", sorted(READERS), ids=lambda path: path.stem)
def test_readers_import_what_readers_share_and_the_standard_library(path):
    """And whatever else a file format needs only where it is read: importing data stays fast."""
    assert ours(path) == {"data.records"}
    for node in ast.parse(path.read_text()).body:
        for name in [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]:
            assert name == "data.records" or name.split(".")[0] in sys.stdlib_module_names


def test_models_import_nothing_of_ours_but_themselves():
    for path in ROOT.glob("models/*.py"):
        assert all(module.startswith("models") for module in ours(path))


def test_nobody_imports_train():
    for path in SOURCES:
        if path.parent.name not in ("tests", "benchmarks"):
            assert not any(module.split(".")[0] == "train" for module in imports(path)), path


def test_evaluate_knows_no_loss():
    assert not any(module.split(".")[0] == "losses" for module in imports(ROOT / "evaluate.py"))


def test_torchvision_only_in_models_and_the_image_pipeline():
    for path in SOURCES:
        if any(module.split(".")[0] == "torchvision" for module in imports(path)):
            assert path.parent.name in ("models", "benchmarks", "tests") or path == ROOT / "data/images.py", path


def test_no_loss_name_in_train_models_or_data():
    """In code, not in docstrings and comments: strings and names that are a loss."""
    from losses import LOSSES

    for path in [ROOT / "train.py", ROOT / "evaluate.py", *ROOT.glob("models/*.py"), *ROOT.glob("data/*.py")]:
        tree = ast.parse(path.read_text())
        docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree)
                      if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)}  # fmt: skip
        for node in ast.walk(tree):
            words = getattr(node, "value", None) if isinstance(node, ast.Constant) else getattr(node, "id", None)
            if isinstance(words, str) and words not in docstrings and not words.startswith("a loss or a sum"):
                assert not set(re.split(r"[^a-z0-9_]+", words.lower())) & set(LOSSES), f"{path}: {words}"


def test_requirements_are_what_the_code_imports():
    """To train and evaluate: six packages, and Pillow, which torchvision brings."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {re.split(r"[<>=]", line)[0].strip() for line in lines}
    found = set()
    for path in SOURCES:
        if path.parent.name not in ("tests", "benchmarks"):
            found |= {module.split(".")[0] for module in imports(path)} - set(OURS) - set(sys.stdlib_module_names)
    assert wanted == {"torch", "torchvision", "numpy", "scipy", "tqdm", "tabulate"}
    assert wanted <= found <= wanted | {"PIL", "matplotlib", "h5py"}  # optional: for the figure, for cuhk-03.mat


def test_train_is_one_readable_script():
    assert len((ROOT / "train.py").read_text().splitlines()) < 350


def test_pyproject_holds_settings_only():
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"tool"}
