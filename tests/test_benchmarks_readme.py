"""benchmarks/README.md and losses/README.md: tables are those of recorded files, sentences agree, scripts are named."""

import re
from pathlib import Path

import pytest

from benchmarks import tables

TEXTS = [readme.read_text(encoding="utf-8") for readme in tables.READMES]
README = TEXTS[0]


def test_the_tables_are_those_of_the_recorded_files():
    assert [tables.filled(text) for text in TEXTS] == TEXTS, "python benchmarks/tables.py writes them"
    shown = [name for text in TEXTS for name in re.findall(r"<!-- (?!end)(\w+) -->", text)]
    assert sorted(shown) == sorted(function.__name__ for function in tables.TABLES)


def test_another_number_in_a_file_is_another_number_in_its_table(monkeypatch, tmp_path):
    """Not the table itself is kept, and a second machine's files change nothing."""
    for path in tables.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / f"{path.stem.partition('_')[0]}_another-machine.json").write_text("{}")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.filled(README) == README
    changed = tmp_path / f"gpu-training_{tables.H100}.json"
    changed.write_text(changed.read_text().replace("2717.8", "2817.8"))
    assert tables.filled(README) == README.replace("| bfloat16 | 2,718 |", "| bfloat16 | 2,818 |") != README


@pytest.mark.parametrize(("arch", "precision", "speed", "stages"), [
    ("resnet50", "bfloat16", "2,718 images/s", "9.9 and 14.6 ms"), ("resnet50", "TF32", "(3,147)", "6.8 and 13.5 ms"),
])  # fmt: skip
def test_sentences_about_a_network_on_the_gpu(arch, precision, speed, stages):
    (row,) = [row for row in tables.plain(tables.load(f"gpu-training_{tables.H100}")["rows"])
              if (row["arch"], row["precision"]) == (arch, precision)]  # fmt: skip
    assert f"{row['images_per_second']:,.0f}" in speed and speed in README
    assert " and ".join(f"{row['stages_ms'][key]:.1f}" for key in ("forward", "backward")) + " ms" == stages
    assert stages in README


def test_sentences_about_shares_and_goals():
    rows = tables.plain(tables.load(f"gpu-training_{tables.H100}")["rows"])
    low, *shares = sorted((round(row["share_of_bare_loop"], 2), row["arch"], row["precision"]) for row in rows)
    assert low == (0.84, "resnet18", "TF32") and (shares[0][0], shares[-1][0]) == (0.98, 1.08)
    assert "0.98 to 1.08, and once 0.84: ResNet-18 in TF32" in README
    losses = tables.load(f"gpu-losses_{tables.H100}")["rows"]
    over = [(row["loss"], row["num_classes"]) for row in losses if row["share_of_step"] > 0.05]
    assert over == [("smooth_ap", 751), ("subcenter_arcface", 10_000)]
    assert "`smooth_ap` misses it, and so does `subcenter_arcface` with 10,000 classes" in README
    market = tables.load(f"gpu-evaluator_{tables.H100}")["rows"][2]
    assert market["way"] == "rank_metrics" and market["milliseconds"] < 25 < market["max"]
    for arch, goal in (("resnet18", 1.9), ("resnet50", 3.0)):
        rows = tables.load(f"training_{tables.XEON}")["rows"]
        assert max(row["times_torchreid"] for row in rows if row["arch"] == arch) < goal
        for stages in (row["stages_ms"] for row in rows):
            network = sum(stages[name] for name in ("forward", "loss", "backward", "optimizer step"))
            assert network > 0.99 * sum(stages.values())


def test_every_script_is_named():
    scripts = {path.name for path in Path(tables.__file__).parent.glob("*.py")}
    assert {name for name in scripts if f"| `{name}` |" not in README} <= {"machine.py", "steps.py", "tables.py"}
