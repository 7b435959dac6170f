"""A second opinion: pytorch-metric-learning, where it defines the same loss. The mapping of its parameters is in
`peer_loss` of benchmarks/losses.py, which times what is compared here."""

import math

import pytest
import torch
from torch.testing import assert_close

from benchmarks.losses import peer_loss
from losses import ROWS, build_loss

pytest.importorskip("pytorch_metric_learning")
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:__array_wrap__")  # the peer's own
C, D = 12, 64
# name -> the arguments of ours that the peer has no counterpart for, and the tolerance
PEERS = {
    "triplet": ([], 1e-5),
    "npair": (["l2=0"], 1e-5),
    "histogram": ([], 1e-5),
    "multi_similarity": ([], 1e-5),
    "sphereface": (["lambda_base=0", "lambda_min=0"], 1e-4),
    "cosface": ([], 1e-5),
    "arcface": ([], 1e-5),
    "circle": ([], 1e-5),
    "supcon": ([], 1e-5),
    "proxy_anchor": ([], 1e-5),
    "subcenter_arcface": ([], 1e-5),
}
LABELS = {"p x k": torch.arange(24) // 4, "shuffled": torch.arange(24).remainder(6), "pairs": torch.arange(24) // 2}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("name", PEERS)
def test_value_and_gradient_agree_with_the_peer(name, labels):
    torch.manual_seed(0)
    loss_args, tolerance = PEERS[name]
    ours, peer = build_loss(name, C, D, loss_args), peer_loss(name, C, D)
    if weights := list(ours.parameters()):
        (peer_weight,) = peer.parameters()
        weight = weights[0].detach().reshape(-1, D)  # sub-center by sub-center
        peer_weight.data = (weight if name == "proxy_anchor" else weight.T).clone()  # (C, D) or (D, C)

    # loose clusters: the peer's multi-similarity returns 0 where a whole batch mines a single pair
    for spread in (2.0, 3.0, 5.0):
        x = torch.randn(C, D)[labels] + spread * torch.randn(24, D)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss, peer_value = ours(mine, labels), peer(other, labels)
        loss.backward()
        peer_value.backward()
        assert_close(loss, peer_value, rtol=tolerance, atol=1e-6)
        assert_close(mine.grad, other.grad, rtol=10 * tolerance, atol=10 * tolerance * other.grad.abs().max().item())
    assert loss > 0.01


def test_arcface_agrees_with_the_peer_past_pi_minus_margin():
    """Embeddings nearly opposite to their class vectors: both continue linearly."""
    torch.manual_seed(0)
    ours, peer = build_loss("arcface", C, D), peer_loss("arcface", C, D)
    peer.W.data = ours.weight.detach().T.clone()
    x = -ours.weight.detach() + 0.02 * torch.randn(C, D)
    cosine = torch.cosine_similarity(x, ours.weight)
    assert (cosine < -math.cos(0.5)).all()
    assert_close(ours(x, torch.arange(C)), peer(x, torch.arange(C)), rtol=1e-5, atol=0)


def test_the_rest_has_no_counterpart():
    names = ("softmax", "center", "focal", "sphereface_m1", "weighted_triplet", "smooth_ap", "adasp", "adaface")
    assert {*names, *PEERS} == set("+".join(ROWS).split("+")), "name a loss here or give it a counterpart in PEERS"
    assert [name for name in names if peer_loss(name, C, D)] == []
