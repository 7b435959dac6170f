"""A loss file is meant to be copied: it must work alone, say what it is, and import nothing but torch and math."""

import ast
import inspect
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from losses import LOSSES

FILES = sorted(path for path in (Path(__file__).parent.parent / "losses").glob("*.py") if path.name != "__init__.py")
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

# python -I: nothing of the caller's folder or environment on the path. Each file is alone in its folder.
ALONE = """
import sys
import torch

for folder in sys.argv[1:]:
    known = set(sys.modules)
    sys.path.insert(0, folder)
    name = folder.rsplit("/", 1)[-1]
    module = __import__(name)
    (loss_class,) = [value for key, value in vars(module).items() if key.endswith("Loss") and isinstance(value, type)]
    sizes = (5, 8) if "num_classes" in loss_class.__init__.__annotations__ else ()
    loss_fn = loss_class(*sizes)
    embeddings = torch.randn(8, 8, requires_grad=True)
    loss_fn(embeddings, torch.tensor([0, 0, 1, 1, 2, 2, 4, 4])).backward()
    assert embeddings.grad.isfinite().all()
    sys.path.remove(folder)
    loaded = {key.split(".")[0] for key in set(sys.modules) - known} - set(sys.stdlib_module_names) - {"torch"}
    print(name, *loaded)
"""


def test_every_file_works_alone_in_a_new_process(tmp_path):
    folders = []
    for path in FILES:
        folder = tmp_path / path.stem
        folder.mkdir()
        (folder / path.name).write_bytes(path.read_bytes())
        folders.append(folder.as_posix())
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *folders], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{path.stem} {path.stem}" for path in FILES]  # loaded nothing but itself


def test_there_is_one_file_for_each_loss():
    own = {loss.__module__ for loss in LOSSES.values() if inspect.isclass(loss)}
    assert own == {f"losses.{path.stem}" for path in FILES}
    for name, loss in LOSSES.items():
        if inspect.isclass(loss):
            assert loss.__module__ == f"losses.{name}"  # the key is the file's name
            assert loss.__name__.endswith("Loss")


@every_file
def test_imports_torch_and_math_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in ("torch", "math") for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] in ("torch", "math"), ast.unparse(node)


@every_file
def test_says_what_it_is(path):
    source = path.read_text()
    header = ast.get_docstring(ast.parse(source))
    first = header.splitlines()[0]
    assert ": " in first and first.endswith(".") and header.splitlines()[1] == ""
    assert re.search(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|doi\.org/10\.\S+|papers\.nips\.cc/\S+)", header)
    assert re.search(r"\b(Eq\. \d+|section \d)", header)
    assert re.search(r"^    L = mean over|^    L = sum over", header, flags=re.M)  # the formula
    assert re.search(r"^Deviation from the paper: \S", header, flags=re.M)
    facts = ("Normalises embeddings", "Owns class weights", "Needs P x K batches")
    assert re.fullmatch("  ".join(rf"{fact}: (yes|no)\b.*\." for fact in facts), header.splitlines()[-1])
    assert header.isascii()
    assert 30 <= len(source.splitlines()) <= 90


@every_file
def test_facts_of_the_header_are_true(path):
    loss_class = LOSSES[path.stem]
    last = ast.get_docstring(ast.parse(path.read_text())).splitlines()[-1]
    owns_weights = "Owns class weights: yes" in last
    parameters = list(inspect.signature(loss_class).parameters)
    loss_fn = loss_class(5, 8) if "num_classes" in parameters else loss_class()
    assert owns_weights == (len(list(loss_fn.parameters())) > 0)
    assert ("Normalises embeddings: yes" in last) == ("normalize(embeddings" in path.read_text())
    assert ("Needs P x K batches: yes" in last) == ("num_classes" not in parameters)


def test_the_table_in_the_readme_agrees_with_the_headers():
    readme = (FILES[0].parent.parent / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", readme, flags=re.M))
    assert {path.stem for path in FILES} - {"center"} <= set(rows)  # center has its row in a sum
    for path in FILES:
        if path.stem in rows:
            header = ast.get_docstring(ast.parse(path.read_text()))
            facts = re.findall(r": (yes|no)\b", header.splitlines()[-1])  # normalises, owns weights, needs P x K
            paper, weights, normalises, batches, deviation = (cell.strip() for cell in rows[path.stem].split("|"))
            assert [cell.split()[0] == "yes" for cell in (normalises, weights, batches)] == [f == "yes" for f in facts]
            assert re.search(r"\((https://[^)]+)\)", paper).group(1) in header
            exact = "Deviation from the paper: none" in header
            assert exact == (deviation.startswith("none") or path.stem == "sphereface")  # there: none in the value


@every_file
def test_signature_is_the_contract(path):
    loss_class = LOSSES[path.stem]
    assert list(inspect.signature(loss_class.forward).parameters) == ["self", "embeddings", "labels"]
    parameters = inspect.signature(loss_class).parameters
    assert "num_classes" not in parameters or list(parameters)[:2] == ["num_classes", "embedding_dim"]
    for name, parameter in parameters.items():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if name not in ("num_classes", "embedding_dim"):
            assert parameter.annotation in (int, float, float | None)
            assert isinstance(parameter.default, int if parameter.annotation is int else float)
    assert "->" in loss_class.forward.__doc__ and "(B, D)" in loss_class.forward.__doc__


@every_file
def test_no_device_no_data_no_uint8(path):
    """Tensors follow their inputs; nothing is edited behind autograd's back; masks are bool; nothing is printed."""
    tree = ast.parse(path.read_text())
    words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    forbidden = {"cuda", "cpu", "is_cuda", "data", "item", "tolist", "numpy", "uint8", "byte", "nonzero", "print"}
    assert not words & forbidden


@every_file
def test_loops_run_over_none_of_images_classes_or_bins(path):
    """The one Python loop there is (the multiples of an angle in sphereface.py) is as long as its margin, 4."""
    nodes = ast.walk(ast.parse(path.read_text()))
    loops = [ast.unparse(node.iter) for node in nodes if isinstance(node, ast.For | ast.comprehension)]
    assert loops == (["range(self.margin - 1)"] if path.stem == "sphereface" else [])


def helpers_that_differ(sources):
    """Names of module-level functions that stand in several of the sources with different code."""
    found = defaultdict(set)
    for source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                found[node.name].add(ast.unparse(node))
    return {name for name, versions in found.items() if len(versions) > 1}


def test_repeated_helpers_are_identical():
    assert helpers_that_differ(path.read_text() for path in FILES) == set()
    assert helpers_that_differ(["def f(x): return x", "def f(x): return x + 1", "def g(): pass"]) == {"f"}


def test_the_names_of_losses_come_with_torch_alone():
    """`train.py --help` lists the losses: importing them must not bring anything slow."""
    program = "import torch, sys; known = set(sys.modules); import losses; print(*(set(sys.modules) - known))"
    done = subprocess.run([sys.executable, "-c", program], cwd=FILES[0].parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extra = {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    assert extra == {"losses"}
