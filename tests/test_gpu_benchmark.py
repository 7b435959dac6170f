"""One turn of benchmarks/gpu.py on the CPU: its files, its table, and what it says of a part that fails."""

import json

import pytest

from benchmarks import gpu


def test_a_turn_of_two_parts(tmp_path, capfd):
    flags = ["--small", "--device", "cpu", "--minutes", "3", "--machine", "box", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--parts", "evaluator", "losses", *flags])
    out = capfd.readouterr().out
    assert stopped.value.code == 0, out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu-evaluator-small_box.json", "gpu-losses-small_box.json"]  # fmt: skip
    rows = json.loads((tmp_path / "gpu-evaluator-small_box.json").read_text())["rows"]
    assert {row["size"] for row in rows} == {"market", "msmt17"}
    assert all(row["n"] > 0 and row["largest_difference"] < 1e-5 for row in rows)
    scored = [row["metrics"]["mAP"] for row in rows if row["size"] == "market" and row["metrics"]]
    assert len(scored) == 3 and 0 < scored[0] < 1
    losses = json.loads((tmp_path / "gpu-losses-small_box.json").read_text())["rows"]
    assert {row["loss"] for row in losses} == set(gpu.LOSSES)
    assert "torchreid's way" in out and "arcface" in out


def test_a_part_that_fails_or_takes_too_long_is_said(tmp_path, capfd):
    flags = ["--small", "--device", "no-device", "--out", str(tmp_path)]
    fine, text = gpu.run_part("evaluator", flags, 60, tmp_path)
    assert not fine and "no-device" in text + capfd.readouterr().err
    fine, text = gpu.run_part("evaluator", flags, 0.1, tmp_path)
    assert not fine and "STOPPED after its 0 s" in text
