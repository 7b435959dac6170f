"""Who imports whom, and which names stay where, read from the source."""

import ast
import functools
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest

from data import DATASETS
from losses import ROWS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("losses", "models", "data", "utils", "tools", "benchmarks", "tests")
OURS = (*FOLDERS, "evaluate", "train")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])


def folder_of(path):
    """The folder of the tree that a file belongs to; of the two scripts their own name."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Every module that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(tree_of(path)):
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


@pytest.mark.parametrize("path", [ROOT / "utils/ranking.py", ROOT / "utils/reranking.py"], ids=lambda path: path.stem)
def test_files_to_copy_import_torch_and_math_only(path):
    assert {module.split(".")[0] for module in imports(path)} <= {"torch", "math"}


def test_losses_package_imports_its_neighbours_only():
    assert all(module.startswith("losses.") for module in ours(ROOT / "losses/__init__.py"))


READERS = {Path(inspect.getfile(reader)) for reader in DATASETS.values()} - {ROOT / "data/__init__.py"}


@pytest.mark.parametrize("path", sorted(READERS), ids=lambda path: path.stem)
def test_readers_import_what_readers_share_and_the_standard_library(path):
    """And whatever else a file format needs only where it is read: importing data stays fast."""
    shared = "a reader imports data.records, and at the top the standard library: the rest where a format needs it"
    assert ours(path) == {"data.records"}, shared
    for node in tree_of(path).body:
        for name in [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]:
            assert name == "data.records" or name.split(".")[0] in sys.stdlib_module_names, shared


# who may import whom, besides itself; benchmarks and tests may import everything
MAY_IMPORT = {
    "losses": (),
    "models": (),
    "data": ("utils.distributed", "utils.errors", "utils.seed"),
    "utils": ("losses", "models", "data", "utils"),
    "evaluate": ("data", "models", "utils"),
    "train": ("losses", "models", "data", "utils", "evaluate"),
    "tools": ("data", "models", "utils", "evaluate"),
}


@pytest.mark.parametrize("path", [path for path in SOURCES if folder_of(path) in MAY_IMPORT],
                         ids=lambda path: path.relative_to(ROOT).as_posix())  # fmt: skip
def test_who_imports_whom(path):
    """Above all: nobody imports train.py, and neither evaluate.py nor a tool knows a loss."""
    folder = folder_of(path)
    for module in ours(path):
        allowed = (folder, *MAY_IMPORT[folder])
        assert any(f"{module}.".startswith(f"{place}.") for place in allowed), f"{path.name} imports {module}"


def test_what_draws_pedestrians_imports_itself_only():
    """data/synthetic is a package of its own, whose files import each other; and is loaded by who asks for it."""
    for path in ROOT.glob("data/synthetic/*.py"):
        assert all(module.startswith("data.synthetic") for module in ours(path)), path
    for path in SOURCES:
        if folder_of(path) not in ("benchmarks", "tests") and path.parent.name != "synthetic":
            names = {node.module for node in tree_of(path).body if isinstance(node, ast.ImportFrom)}
            assert not any(name.startswith("data.synthetic") for name in names), f"{path} imports it at once"


def test_torchvision_only_in_models_and_the_image_pipeline():
    for path in SOURCES:
        if any(module.split(".")[0] == "torchvision" for module in imports(path)):
            assert folder_of(path) in ("models", "benchmarks", "tests", "data"), path
            assert folder_of(path) != "data" or path.name in ("images.py", "augment.py"), path


def text_without_encoding(tree):
    """The lines where a file is opened as text in whatever encoding the machine's locale has."""
    others = ("os", "Image", "fitz", "webbrowser", "gzip", "zipfile", "tarfile")  # whose open takes no encoding
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        place, name = getattr(node.func, "value", None), getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name not in ("open", "read_text", "write_text") or getattr(place, "id", "") in others:
            continue
        if name == "write_text" and place is None:  # utils.files: UTF-8, always
            continue
        if name == "open":
            position = 1 if place is None else 0
            modes = [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
            mode = (modes or node.args[position : position + 1] or [None])[0]
            if isinstance(mode, ast.Constant) and "b" in str(mode.value):
                continue
        if not any(keyword.arg == "encoding" for keyword in node.keywords):
            yield node.lineno


@pytest.mark.parametrize("path", [path for path in SOURCES if folder_of(path) != "tests"],
                         ids=lambda path: path.relative_to(ROOT).as_posix())  # fmt: skip
def test_text_files_are_read_and_written_as_utf_8(path):
    lines = list(text_without_encoding(tree_of(path)))
    assert not lines, f"{path}, lines {lines}: open, read_text and write_text need encoding='utf-8' (or a 'b' mode)"


def test_the_look_at_encodings_sees_what_it_looks_for():
    wrong = ["open(x)", "open(x, 'w')", "x.open()", "x.open('r')", "x.read_text()", "y.x.write_text('a')", "open(x, m)"]
    right = ["open(x, 'rb')", "x.open('wb')", "open(x, mode='ab')", "Image.open(x)", "x.read_text(encoding='utf-8')",
             "open(x, 'w', encoding='utf-8')", "write_text(path, text)", "os.open(x, os.O_RDONLY)"]  # fmt: skip
    assert [len(list(text_without_encoding(ast.parse(line)))) for line in wrong + right] == [1] * 7 + [0] * 8


def test_no_loss_name_in_train_models_or_data():
    """In code, not in docstrings and comments: strings and names that are a loss (CIRCLE, a shape, is none)."""
    names = {*"+".join(ROWS).split("+")}  # a loss of one's own may be called as it likes
    paths = [path for path in SOURCES if folder_of(path) in ("train", "evaluate", "models", "data", "tools")]
    for path in paths:
        tree = tree_of(path)
        docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree)
                      if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)}  # fmt: skip
        for node in ast.walk(tree):
            words = getattr(node, "value", None) if isinstance(node, ast.Constant) else getattr(node, "id", None)
            if isinstance(words, str) and words not in docstrings:
                assert not set(re.split(r"[^a-z0-9_]+", words)) & names, f"{path}: {words}"


def test_requirements_are_what_the_code_imports():
    """To train and evaluate: six packages, and Pillow, which torchvision brings."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = {re.split(r"[<>=]", line)[0].strip() for line in lines}
    found = set()
    for path in SOURCES:
        if folder_of(path) not in ("tests", "benchmarks"):
            found |= {module.split(".")[0] for module in imports(path)} - set(OURS) - set(sys.stdlib_module_names)
    assert wanted == {"torch", "torchvision", "numpy", "scipy", "tqdm", "tabulate"}
    optional = {"matplotlib", "h5py", "onnx", "onnxruntime", "tensorboard"}  # imported late, with a sentence if absent
    assert wanted <= found <= wanted | {"PIL"} | optional, f"one of {found - wanted} is not in `optional`, say"
    for path in SOURCES:
        if folder_of(path) not in ("tests", "benchmarks"):
            body = tree_of(path).body
            at_once = {node.module for node in body if isinstance(node, ast.ImportFrom)}
            at_once |= {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
            assert not {name.split(".")[0] for name in at_once} & optional, f"{path}: import it where it is used"


def test_pyproject_holds_settings_only():
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))) == {"tool"}
