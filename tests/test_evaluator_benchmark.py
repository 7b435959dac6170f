"""benchmarks/evaluator.py, machine.py: the ways agree, tables read, files carry no host name."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import evaluator, machine
from utils.environment import current_commit

SIZE = (60, 400, 20, 4, 100, 0.8)
MINE = "this evaluator"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    evaluator.generate(folder, 64, *SIZE)
    return folder, evaluator.load(folder)


def test_generated_people_are_neither_trivial_nor_hopeless(arrays):
    query, query_pids, _, gallery, gallery_pids, _ = arrays[1]
    assert query.shape == (60, 64) and gallery.shape == (400, 64) and (gallery_pids == 0).sum() == 100
    assert set(query_pids.tolist()) == set(range(1, 21))
    assert 0.3 < evaluator.WAYS[MINE](*arrays[1])["mAP"] < 0.98


def test_mapped_rows_are_the_first_of_the_gallery(arrays, tmp_path):
    folder, whole = arrays
    mapped = evaluator.load(folder, mapped=150)
    assert [len(x) for x in mapped] == [60, 60, 60, 150, 150, 150]
    assert (torch.as_tensor(mapped[3].copy()) == whole[3][:150]).all()
    assert (whole[4][:100] == 0).all()  # the distractors
    evaluator.generate(tmp_path, 64, *SIZE, mixed=True)
    mixed = evaluator.load(tmp_path, mapped=150)[4]
    assert 20 < (mixed == 0).sum() < 60 and set(mixed.tolist()) == set(range(21))  # 37.5 expected


def test_the_sort_agrees_and_disagreement_stops(arrays):
    ways = {way: {"metrics": evaluator.WAYS[way](*arrays[1])} for way in list(evaluator.WAYS)[:3]}
    assert max(evaluator.agreement(ways).values()) < 1e-6
    ways["full sort, torch"]["metrics"]["mAP"] += 1e-4
    with pytest.raises(RuntimeError, match="do not agree"):
        evaluator.agreement(ways)


def test_turns_memory_and_what_is_missing(arrays, monkeypatch):
    """Each way as often as asked for, one that took long not again; peers that are not installed are said."""

    def absent(*_):
        import no_such_module_at_all  # noqa: F401

    monkeypatch.setitem(evaluator.WAYS, "torchreid", absent)
    ways = ["product alone", MINE, "torchreid"]
    found = evaluator.times_of(ways, arrays[0], 150, repeats=3)
    assert found["torchreid"] == {"missing": "not installed (no_such_module_at_all)"}
    assert len(found[MINE]["seconds"]) == 3 and found["product alone"]["metrics"] is None
    monkeypatch.setattr(evaluator, "SLOW", 0)
    assert len(evaluator.times_of([MINE], arrays[0], 0, repeats=3)[MINE]["seconds"]) == 1
    code = "import torch; from benchmarks.evaluator import Memory\nwith Memory() as memory: kept = torch.ones(2**25)\n"
    code += "print(memory.extra)"  # 128 MiB, in a process with no memory to use again
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 120 <= int(done.stdout) / 2**20 < 140
    assert evaluator.memory_of(MINE, arrays[0], 0) < 64


def test_table():
    seconds = {"median": 2.0, "min": 1.5, "max": 2.5, "n": 3}
    row = {"seconds": seconds, "after_product_seconds": {**seconds, "median": 0.25}, "times_product": 1.14,
           "extra_mib": 60.4, "metrics": {"rank1": 0.5, "mAP": 0.25}}  # fmt: skip
    ways = {MINE: row, "torchreid": {"missing": "not installed (torchreid)"}}
    result = {"size": "market", "query": 3368, "gallery": 15913, "dim": 2048, "ways": ways}
    text = evaluator.table({**result, "largest_difference": {"torchreid: mAP": 2e-9}})
    for part in ("3,368 x 15,913 x 2,048", "2.000 (1.500 to 2.500)", "0.250", "1.14", "60", "50.0000", "not installed",
                 "2.0e-09"):  # fmt: skip
        assert part in text


def test_result_file(tmp_path):
    path = machine.write_result("evaluator", {"cpu": []}, "Some (R) CPU @ 2.00GHz, 4/x", tmp_path)
    assert path.name == "evaluator_some-4-x.json"
    made_by = {"torch": torch.__version__, "commit": current_commit()}
    assert json.loads(path.read_text()) == {"benchmark": "evaluator", "machine": "some-4-x", **made_by, "cpu": []}
    name = machine.machine_name()
    assert name.endswith("threads") and (platform.node() or "?") not in name


def test_a_process_of_its_own():
    assert machine.in_a_process(os.getpid) != os.getpid()
