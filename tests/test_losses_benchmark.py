"""The benchmark of the losses runs; its file holds what READMEs show, and of the machine nothing but its name."""

import json
import re

import pytest
import torch

from benchmarks.losses import first_pairs, main, one_step
from benchmarks.machine import machine_name, peak_mib
from losses import ROWS, build_loss

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:__array_wrap__")  # the peer's own


def test_the_benchmark_writes_its_file(tmp_path, capsys):
    peers = pytest.importorskip("pytorch_metric_learning")
    main(["--batch-sizes", "8", "--num-classes", "5", "11", "--embedding-dim", "16", "--repeats", "2",
          "--device", "cpu", "--arch", "resnet18", "--height", "32", "--width", "32", "--network-batch", "8",
          "--network-repeats", "2", "--machine", "my box/1", "--out", str(tmp_path)])  # fmt: skip
    (path,) = tmp_path.iterdir()
    assert path.name == "losses_my-box-1.json"
    result = json.loads(path.read_text())
    assert result["pytorch_metric_learning"] == peers.__version__ and result["machine"] == "my-box-1"
    assert "commit" in result
    assert not re.search(r"/(home|tmp|root|work)", path.read_text())

    rows = {(row["loss"], row["num_classes"]): row for row in result["rows"]}
    assert {loss for loss, _ in rows} == {*ROWS, "center"}
    assert {c for loss, c in rows if loss == "arcface"} == {5, 11}
    assert {c for loss, c in rows if loss == "triplet"} == {None}  # owns no class weights: timed once
    with_peer = {loss for (loss, _), row in rows.items() if "peer_milliseconds" in row}
    assert with_peer == {"triplet", "npair", "histogram", "multi_similarity", "sphereface", "cosface", "arcface",
                         "circle", "supcon", "proxy_anchor", "subcenter_arcface"}  # fmt: skip
    for row in rows.values():
        assert 0 < row["milliseconds"]["q1"] <= row["milliseconds"]["median"] <= row["milliseconds"]["q3"]
    assert set(result["network"]["milliseconds"]["cpu"]) == {"float32", "bfloat16"}
    printed = capsys.readouterr().out
    assert re.search(r"cpu +8 +11 +arcface .* % ", printed) and "resnet18 32x32, batch 8, on cpu: float32" in printed


def test_peak_memory_counts_what_is_held_at_once():
    """Two temporary tensors of 4 MiB one after the other, then one of 1 MiB: never more than 4 MiB."""

    def step():
        for size in (2**20, 2**20, 2**18):
            torch.empty(size)

    assert peak_mib(step, torch.device("cpu")) == pytest.approx(4, abs=0.1)


def test_peak_memory_of_a_loss_counts_its_gradients():
    """Class weights of 2 MiB: every step has their gradient anew, and leaves none behind."""
    embeddings, loss_fn = torch.randn(4, 512, requires_grad=True), build_loss("softmax", 1024, 512)
    step = one_step(loss_fn, embeddings, torch.arange(4))
    step()
    assert peak_mib(step, torch.device("cpu")) > 2 and embeddings.grad is None


def test_first_pairs():
    anchors, positives, *none = first_pairs(torch.tensor([3, 1, 3, 2, 1, 3]))
    assert anchors.tolist() == [0, 1] and positives.tolist() == [2, 4] and all(len(n) == 0 for n in none)


def test_the_name_of_the_machine_is_fit_for_a_file():
    assert re.fullmatch(r"[a-z0-9-]+", machine_name(torch.device("cpu")))
