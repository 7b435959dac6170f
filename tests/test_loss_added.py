"""Somebody adds a loss: one file, its import and its line in LOSSES. The tests find it, and say what it lacks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# as one would write it: no header, no link, indexing by a mask, a switch, an argument without an annotation
NATURAL = '''
import torch
from torch import nn


class Contrastive(nn.Module):
    def __init__(self, margin=1.0, squared: bool = True):
        super().__init__()
        self.margin = margin
        self.squared = squared

    def forward(self, embeddings, labels):
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            i, j = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
            if len(i) == 0:
                return (embeddings * 0).sum()
            same = labels[i] == labels[j]
            distance = torch.linalg.vector_norm(embeddings[i] - embeddings[j], dim=1)
            terms = torch.cat([distance[same], (self.margin - distance[~same]).clamp(min=0)])
            return (terms**2 if self.squared else terms).mean()
'''

CARELESS = '''
import torch
from torch import nn


class Contrastive(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 1

    def forward(self, embeddings, labels):
        embeddings = embeddings / embeddings.norm(dim=1, keepdim=True).detach()
        same = labels[:, None] == labels
        if same.all():
            return torch.tensor(0.0)
        self.count += 1
        distance = (2 - 2 * embeddings @ embeddings.T).clamp(min=0).sqrt()
        return distance[same].mean() - distance[~same].min() / self.count
'''


def add_losses(folder, sources, keys=None):
    """A copy of the losses and their tests, with losses/NAME.py for each name and its two lines in losses/__init__.py.

    keys: name -> key in LOSSES where it is not the name; None: no lines."""
    shutil.copytree(ROOT / "losses", folder / "losses", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    for name in ("test_losses.py", "test_loss_files.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "losses" / "__init__.py"
    for name, source in sources.items():
        (folder / "losses" / f"{name}.py").write_text(source.replace("Contrastive", f"{name.title()}"))
        key = (keys or {}).get(name, name)
        if key:
            begin, first, end = path.read_text().partition("from losses.cosface import")
            begin += f"from losses.{name} import {name.title()}\n"
            middle, line, end = (first + end).partition('    "cosface": ')
            assert first and line
            path.write_text(f'{begin}{middle}    "{key}": {name.title()},\n{line}{end}')


def run_tests(folder, *arguments):
    """The tests that passed, and (test, message) of each that failed."""
    options = ["-rfp", "--tb=line", "--assert=plain", "-p", "no:cacheprovider", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    environment = {**os.environ, "COLUMNS": "600"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    failures = re.findall(r"^FAILED \S+?::(.+?) - (.*)$", done.stdout, flags=re.M)
    return re.findall(r"^PASSED \S+?::(.+)$", done.stdout, flags=re.M), failures


def check(failures, wanted):
    """Every failure speaks in a sentence of its own, and each loss is told what it lacks."""
    said = {name: "" for name in wanted}
    for test, message in failures:
        message = re.sub(r"^(AssertionError|Failed): ", "", message)
        assert re.match(r"\w+\W+\w+\W+\w+", message), (test, message)  # a sentence, and none of Python's
        assert not re.match(r"assert\b|\w*(Error|Exception)\b", message), (test, message)
        for name in wanted:
            if name in test or name in message:
                said[name] += message + "\n"
    for name, sentences in wanted.items():
        assert all(sentence in said[name] for sentence in sentences), (name, sentences, said[name])


UNUSED = "self.count = torch.ones(1)\n        self.scale = nn.Parameter(torch.ones(2))"
CARELESS_ONES = {
    "careless": CARELESS,
    "inplace": CARELESS.replace("embeddings = embeddings /", "embeddings /="),
    "unused": CARELESS.replace("self.count = 1", UNUSED),
    "graph": NATURAL.replace("self.margin = margin", 'self.register_buffer("length", torch.ones(()))').replace(
        "self.margin -", "self.length -").replace("            i, j", """            if self.training:
                self.length = embeddings.norm(dim=1).mean()
            i, j"""),
    "onehot": CARELESS.replace("labels[:, None] == labels", "torch.eye(9)[labels] @ torch.eye(9)[labels].T > 0"),
}
ODD_FILES = {
    "unlisted": NATURAL,
    "otherkey": NATURAL,
    "othercall": NATURAL.replace("forward(self, embeddings, labels)", "forward(self, embeddings, labels, weight)"),
    "nodefault": NATURAL.replace("margin=1.0", "margin: float"),
    "text": NATURAL.replace("squared: bool = True", 'squared="yes"'),
    "imports": NATURAL.replace("import torch\n", "import numpy\nimport torch\n", 1),
    "sizes": NATURAL.replace("margin=1.0", "margin=1.0, num_classes=1"),
}


def test_a_natural_loss_passes_and_what_others_lack_is_said(tmp_path):
    """All in one copy. That the tests of all losses together pass with a new one: test_readme.py `literally`."""
    losses = {"contrastive": NATURAL, **CARELESS_ONES, **ODD_FILES}
    add_losses(tmp_path, losses, keys={"unlisted": None, "otherkey": "other"})
    chosen = " or ".join(["contrastive", *CARELESS_ONES, "test_loss_files and not names_of"])
    passed, failures = run_tests(tmp_path, "-k", chosen)
    assert sum("contrastive" in test for test in passed) > 40
    assert not [failure for failure in failures if "contrastive" in " ".join(failure)]
    check(failures, {
        "careless": ("where there is nothing to learn from, return (embeddings * 0).sum()",
                     "the loss of a batch with",
                     "the gradient is not the derivative of the returned value",
                     "is not computed in float32: begin forward with `with torch.autocast(",
                     "a loss restored from its state_dict goes on with other values"),
        "inplace": ("forward changes its embeddings in place",),
        "unused": ("scale plays no part in the loss: no gradient reaches it",),
        "graph": ("length is part of the graph: change it under torch.no_grad()",),
        "onehot": ("forward breaks on labels like",),
        "unlisted": ('import its class and add the line "unlisted": ItsClass',),
        "otherkey": ("the key in LOSSES must be the file's name, 'otherkey'",),
        "othercall": ("forward must take (embeddings, labels), not ['embeddings', 'labels', 'weight']",
                      "copied alone into an empty folder, these break or need more than torch"),
        "nodefault": ("Nodefault(margin) needs a default",),
        "text": ("Text(squared) must be a number or a switch (int, float or bool, | None), not <class 'str'>",),
        "imports": ("a loss file imports torch and math only, so that it can be copied alone, not import numpy",),
        "sizes": ("Sizes() must begin with num_classes, embedding_dim",),
    })  # fmt: skip
