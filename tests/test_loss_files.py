"""A loss file is meant to be copied: it must work alone and import nothing but torch and math.

That is asked of every file in losses/, and a failure says what it lacks. The header, its facts, the table in
losses/README.md and the finer points of style are asked of the project's own losses only.
"""

import ast
import inspect
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from losses import LOSSES, ROWS, describe_arguments

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "losses" / "README.md").read_text()
TABLE = README.partition("\n## ")[0]
CLASSES = {loss.__module__.rpartition(".")[2]: loss for loss in LOSSES.values() if inspect.isclass(loss)}  # by file
FILES = sorted(path for path in (ROOT / "losses").glob("*.py") if path.name != "__init__.py")
OWN_FILES = [path for path in FILES if path.stem in "+".join(ROWS).split("+")]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
every_own_file = pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.stem)

# python -I: nothing of the caller's folder or environment on the path. Each file is alone in its folder.
ALONE = """
import inspect
import sys
import torch

for folder, class_name in zip(sys.argv[1::2], sys.argv[2::2]):
    known = set(sys.modules)
    sys.path.insert(0, folder)
    name = folder.rsplit("/", 1)[-1]
    try:
        loss_class = getattr(__import__(name), class_name)
        sizes = (5, 8) if "num_classes" in inspect.signature(loss_class).parameters else ()
        loss_fn = loss_class(*sizes)
        embeddings = torch.randn(8, 8, requires_grad=True)
        loss_fn(embeddings, torch.tensor([0, 0, 1, 1, 2, 2, 4, 4])).backward()
        assert embeddings.grad.isfinite().all()
    except Exception as error:
        print(name, "breaks:", repr(error))
        continue
    sys.path.remove(folder)
    loaded = {key.split(".")[0] for key in set(sys.modules) - known} - set(sys.stdlib_module_names) - {"torch", name}
    print(name, *loaded)
"""


def test_every_file_works_alone_in_a_new_process(tmp_path):
    arguments = []
    for path in FILES:
        folder = tmp_path / path.stem
        folder.mkdir()
        (folder / path.name).write_bytes(path.read_bytes())
        arguments += [folder.as_posix(), CLASSES[path.stem].__name__] if path.stem in CLASSES else []
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needs = [line for line in done.stdout.splitlines() if " " in line]
    assert not needs, f"copied alone into an empty folder, these break or need more than torch: {'; '.join(needs)}"
    assert done.stdout.split() == [path.stem for path in FILES if path.stem in CLASSES]


@every_file
def test_every_file_is_a_loss_by_its_name(path):
    assert path.stem in CLASSES, (
        f"losses/{path.name} holds no loss of LOSSES: in losses/__init__.py, import its class and add the line "
        f'"{path.stem}": ItsClass. (A helper belongs in the file that uses it, so that the file can be copied.)'
    )
    assert CLASSES[path.stem] is LOSSES.get(path.stem), f"the key in LOSSES must be the file's name, {path.stem!r}"


@every_file
def test_imports_torch_and_math_only(path):
    lacks = "a loss file imports torch and math only, so that it can be copied alone, not"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            inside = all(alias.name.split(".")[0] in ("torch", "math") for alias in node.names)
            assert inside, f"{lacks} {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom):
            future = node.module == "__future__"
            inside = node.level == 0 and node.module.split(".")[0] in ("torch", "math")
            assert inside or future, f"{lacks} {ast.unparse(node)}"


@every_file
def test_signature_is_the_contract(path):
    loss_class = CLASSES.get(path.stem) or pytest.skip("no loss")
    name = loss_class.__name__
    given = list(inspect.signature(loss_class.forward).parameters)
    assert given == ["self", "embeddings", "labels"], f"{name}.forward must take (embeddings, labels), not {given[1:]}"
    parameters = inspect.signature(loss_class, eval_str=True).parameters
    if {"num_classes", "embedding_dim"} & parameters.keys():
        first = list(parameters)[:2]
        assert first == ["num_classes", "embedding_dim"], f"{name}() must begin with num_classes, embedding_dim"
    kinds = (int, float, bool, int | None, float | None, bool | None)
    for key, parameter in parameters.items():
        if key in ("num_classes", "embedding_dim"):
            continue
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, f"{name}() must name its arguments: no *, ** or /"
        assert parameter.default is not parameter.empty, f"{name}({key}) needs a default: train.py builds it without"
        kind = type(parameter.default) if parameter.annotation is parameter.empty else parameter.annotation
        assert kind in kinds, f"{name}({key}) must be a number or a switch (int, float or bool, | None), not {kind}"


# --------------------------------------------------------------------------------------------------------- house style


@every_own_file
def test_says_what_it_is(path):
    source = path.read_text()
    header = ast.get_docstring(ast.parse(source))
    first = header.splitlines()[0]
    assert ": " in first and first.endswith(".") and header.splitlines()[1] == ""
    assert re.search(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|doi\.org/10\.\S+|papers\.nips\.cc/\S+|www\.ecva\.net/\S+)",
                     header)  # fmt: skip
    assert re.search(r"\b(Eq\. \d+|section \d)", header)
    assert re.search(r"^    L = mean over|^    L = sum over", header, flags=re.M)  # the formula
    assert re.search(r"^Deviation from the paper: \S", header, flags=re.M)
    facts = ("Normalises embeddings", "Owns class weights", "Needs P x K batches")
    assert re.fullmatch("  ".join(rf"{fact}: (yes|no)\b.*\." for fact in facts), header.splitlines()[-1])
    assert header.isascii()
    forward = LOSSES[path.stem].forward.__doc__
    assert "->" in forward and "(B, D)" in forward
    assert LOSSES[path.stem].__name__.endswith("Loss")


def facts_of(name):
    """(normalises, owns class weights, needs P x K batches) and the header's text, as the header of a loss says."""
    file = inspect.getmodule(LOSSES[name] if inspect.isclass(LOSSES[name]) else type(LOSSES[name](2, 2))).__file__
    header = ast.get_docstring(ast.parse(Path(file).read_text()))
    return [fact == "yes" for fact in re.findall(r": (yes|no)\b", header.splitlines()[-1])], header


@every_own_file
def test_facts_of_the_header_are_true(path):
    normalises, owns_weights, needs_pk = facts_of(path.stem)[0]
    loss_class = LOSSES[path.stem]
    parameters = list(inspect.signature(loss_class).parameters)
    loss_fn = loss_class(5, 8) if "num_classes" in parameters else loss_class()
    assert owns_weights == (len(list(loss_fn.parameters())) > 0)
    assert normalises == ("normalize(embeddings" in path.read_text())
    assert needs_pk == ("num_classes" not in parameters)


def test_the_table_has_every_row_in_order():
    assert re.findall(r"^\| `([\w+]+)` \|", TABLE, flags=re.M) == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_the_table_agrees_with_headers_and_signatures(row):
    cells = [cell.strip() for cell in re.search(rf"^\| `{re.escape(row)}` \|(.*)\|$", TABLE, flags=re.M)[1].split("|")]
    source, normalises, weights, batches, arguments, deviation = cells
    names = row.split("+")
    facts, headers = zip(*map(facts_of, names), strict=True)
    said = ["no" if cell == "weights only" else cell.split(",")[0] for cell in (normalises, weights, batches)]
    assert [word == "yes" for word in said] == [any(fact) for fact in zip(*facts, strict=True)]
    assert set(said) <= {"yes", "no"} and (normalises == "weights only") == ("weights only" in headers[0])
    if link := re.search(r"\((https://[^)]+)\)", source):
        assert link[1] in headers[-1]
    assert bool(link) or len(names) > 1
    last = describe_arguments(names[-1])
    assert arguments in (last.partition(": ")[2], "theirs", f"theirs; {last}")
    if len(names) == 1:
        assert ("Deviation from the paper: none" in headers[0]) == deviation.startswith("none")


@every_own_file
def test_no_device_no_data_no_uint8(path):
    """Tensors follow their inputs; nothing is edited behind autograd's back; masks are bool; nothing is printed. One
    loss asks how many pairs there are (tests/test_losses.py, test_nothing_waits_for_the_device)."""
    tree = ast.parse(path.read_text())
    words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    forbidden = {"cuda", "cpu", "is_cuda", "data", "item", "tolist", "numpy", "uint8", "byte", "nonzero", "print"}
    assert words & forbidden == ({"nonzero"} if path.stem == "smooth_ap" else set())


@every_own_file
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
    assert helpers_that_differ(path.read_text() for path in OWN_FILES) == set()
    assert helpers_that_differ(["def f(x): return x", "def f(x): return x + 1", "def g(): pass"]) == {"f"}


def test_the_names_of_losses_come_with_torch_alone():
    """`train.py --help` lists the losses: importing them must not bring anything slow."""
    program = "import torch, sys; known = set(sys.modules); import losses; print(*(set(sys.modules) - known))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extra = {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    assert extra == {"losses"}, f"importing the losses must bring torch and math only, not {', '.join(extra)}"
