"""One example per loss that can be checked with a pencil, and what each loss promises: its limits and invariances."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from losses import (
    ArcFaceLoss,
    CenterLoss,
    CosFaceLoss,
    FocalLoss,
    HistogramLoss,
    MultiSimilarityLoss,
    NPairLoss,
    SoftmaxLoss,
    SphereFaceLoss,
    TripletLoss,
    build_loss,
)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def with_weight(loss_fn, weight, bias=None):
    """The loss with these class weights, in float64 and eval mode."""
    loss_fn.weight.data = torch.tensor(weight, dtype=torch.float64)
    if bias is not None:
        loss_fn.bias.data = torch.tensor(bias, dtype=torch.float64)
    return loss_fn.double().eval()


def gradient(loss_fn, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss_fn(x, torch.as_tensor(y)), x)[0]


def clusters(num_ids=4, k=3, dim=6, spread=0.5):
    """Random embeddings (num_ids * k, dim) in float64, and their labels."""
    y = torch.arange(num_ids).repeat_interleave(k)
    return torch.randn(num_ids, dim, dtype=torch.float64)[y] + spread * torch.randn(len(y), dim, dtype=torch.float64), y


def rotation(dim):
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0]


def points_at(*degrees):
    """Unit vectors in the plane, (B, 2)."""
    angles = torch.deg2rad(double(*degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------------- softmax


def test_softmax_by_hand():
    """Logits ln 1, ln 2, ln 5, so p = 1/8, 1/4, 5/8; the label is the middle one: -ln 1/4 = ln 4."""
    loss_fn = with_weight(SoftmaxLoss(3, 1), [[0.0], [math.log(2)], [0.0]], [0.0, 0.0, math.log(5)])
    assert_close(loss_fn(double([1.0]), torch.tensor([1])), double(math.log(4)).squeeze())


def test_softmax_smoothing_by_hand():
    """p = 1/4, 3/4, smoothing 0.2, so q = 0.1, 0.9 for label 1: 0.1 ln 4 + 0.9 ln 4/3. The target keeps its eps/C."""
    loss_fn = with_weight(SoftmaxLoss(2, 1, label_smoothing=0.2), [[0.0], [math.log(3)]], [0.0, 0.0])
    expected = 0.1 * math.log(4) + 0.9 * math.log(4 / 3)
    assert_close(loss_fn(double([1.0]), torch.tensor([1])), double(expected).squeeze())


def test_softmax_without_knowledge_is_log_c():
    loss_fn = with_weight(SoftmaxLoss(5, 3), [[0.0] * 3] * 5, [0.0] * 5)
    assert_close(loss_fn(torch.randn(4, 3).double(), torch.tensor([0, 1, 4, 4])), double(math.log(5)).squeeze())


def test_softmax_ignores_a_constant_on_all_logits():
    loss_fn, (x, y) = SoftmaxLoss(4, 6).double(), clusters()
    before = loss_fn(x, y)
    loss_fn.bias.data += 100
    assert_close(loss_fn(x, y), before)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_softmax_is_torchs_cross_entropy(smoothing):
    loss_fn, (x, y) = SoftmaxLoss(4, 6, label_smoothing=smoothing).double(), clusters()
    logits = x @ loss_fn.weight.T + loss_fn.bias
    assert_close(loss_fn(x, y), F.cross_entropy(logits, y, label_smoothing=smoothing))


def test_softmax_and_focal_start_like_nn_linear():
    for loss_class in (SoftmaxLoss, FocalLoss):
        torch.manual_seed(5)
        linear = torch.nn.Linear(16, 7)
        torch.manual_seed(5)
        loss_fn = loss_class(7, 16)
        assert torch.equal(loss_fn.weight, linear.weight) and torch.equal(loss_fn.bias, linear.bias)


def test_angular_losses_start_with_xavier_normal_weights():
    for loss_class in (SphereFaceLoss, CosFaceLoss, ArcFaceLoss):
        torch.manual_seed(5)
        expected = torch.nn.init.xavier_normal_(torch.empty(7, 16))
        torch.manual_seed(5)
        assert torch.equal(loss_class(7, 16).weight, expected)


# ------------------------------------------------------------------------------------------------------------- triplet


def test_triplet_by_hand():
    """On a line: identity 0 at 0 and 2, identity 1 at 3 and 7, identity 2 (one image) at 20; margin 0.5.
    at 0: d+ 2, d- 3 -> 0        at 2: d+ 2, d- 1 -> 1.5
    at 3: d+ 4, d- 1 -> 3.5      at 7: d+ 4, d- 5 -> 0
    at 20: no positive, not an anchor. Mean over the four anchors, zeros included: 5 / 4."""
    x, y = double([0.0], [2.0], [3.0], [7.0], [20.0]), torch.tensor([0, 0, 1, 1, 2])
    assert_close(TripletLoss(margin=0.5)(x, y), double(1.25).squeeze())
    # the anchor at 2 pulls with (-1, 2, -1, 0), the one at 3 with (0, 1, -2, 1)
    assert_close(gradient(TripletLoss(margin=0.5), x, y), double([-1.0], [3.0], [-3.0], [1.0], [0.0]) / 4)


def test_triplet_soft_margin_by_hand():
    """On a line: 0 and 1 of one identity, 3 of another. Anchors: d+ - d- = 1 - 3 and 1 - 2."""
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    loss = TripletLoss(margin=None)(double([0.0], [1.0], [3.0]), torch.tensor([4, 4, 9]))
    assert_close(loss, double(expected).squeeze())


def test_triplet_excludes_the_anchor_by_index_not_by_distance():
    """An exact duplicate is a positive at distance 0: 0.3 + 0 - 0.1 for both anchors, exactly."""
    loss = TripletLoss(margin=0.3)(double([1.0], [1.0], [1.1]), torch.tensor([0, 0, 1]))
    assert_close(loss, double(0.2).squeeze(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("margin", [0.3, None])
def test_triplet_is_invariant_to_translation_and_rotation(margin):
    (x, y), loss_fn = clusters(spread=2.0), TripletLoss(margin)
    assert_close(loss_fn(x + 5, y), loss_fn(x, y))
    assert_close(loss_fn(x @ rotation(6), y), loss_fn(x, y))


@pytest.mark.parametrize("margin", [0.3, None])
def test_triplet_gradients_sum_to_zero(margin):
    x, y = clusters(spread=2.0)
    total = gradient(TripletLoss(margin), x, y)
    assert total.abs().max() > 0.01
    assert_close(total.sum(dim=0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_triplet_scales_with_its_margin():
    x, y = clusters(spread=2.0)
    assert_close(TripletLoss(margin=7 * 0.3)(7 * x, y), 7 * TripletLoss(margin=0.3)(x, y))


@pytest.mark.parametrize(("margin", "expected"), [(0.3, 0.3), (None, math.log(2))])
def test_triplet_of_collapsed_embeddings(margin, expected):
    loss = TripletLoss(margin)(torch.ones(6, 5), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert_close(loss, torch.tensor(expected))


def test_triplet_of_separated_identities_is_zero_without_gradient():
    x, y = clusters(spread=1e-3)
    assert TripletLoss(margin=0.3)(x, y) == 0
    assert not gradient(TripletLoss(margin=0.3), x, y).any()


def test_triplet_grows_with_the_margin_at_most_as_fast():
    x, y = clusters(spread=1.0)
    values = torch.stack([TripletLoss(margin=m / 10)(x, y) for m in range(50)])
    steps = values.diff()
    assert (steps >= 0).all() and (steps <= 0.1 + 1e-12).all() and steps[0] < steps[-1]


def test_triplet_is_finite_at_ties():
    """A square: both neighbours of a corner are equally far, and so are its negatives."""
    x, y = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1, 1, 0])
    assert_close(TripletLoss(margin=0.3)(x, y), torch.tensor(0.3 + math.sqrt(2) - 1))
    assert gradient(TripletLoss(margin=0.3), x, y).isfinite().all()


def test_soft_margin_does_not_overflow():
    x, y = torch.tensor([[0.0], [1e6], [1.0]]), torch.tensor([0, 0, 1])
    assert_close(TripletLoss(margin=None)(x, y), torch.tensor((1e6 - 1 + 1e6 - (1e6 - 1)) / 2))


# ---------------------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("expression", ["softmax+triplet", "0.3*softmax+2*triplet", "softmax+0*triplet"])
def test_a_sum_is_the_weighted_sum_of_its_losses(expression):
    x, y = clusters(spread=2.0)
    loss_fn = build_loss(expression, 4, 6).double()
    weight = {"softmax": 0.3 if "0.3" in expression else 1.0, "triplet": {"s": 1.0, "0": 2.0}[expression[0]]}
    weight["triplet"] = 0.0 if "0*triplet" in expression else weight["triplet"]
    softmax = SoftmaxLoss(4, 6).double()
    softmax.load_state_dict(loss_fn.get_submodule("softmax").state_dict())
    triplet = TripletLoss()
    assert_close(loss_fn(x, y), weight["softmax"] * softmax(x, y) + weight["triplet"] * triplet(x, y))
    expected = weight["softmax"] * gradient(softmax, x, y) + weight["triplet"] * gradient(triplet, x, y)
    assert_close(gradient(loss_fn, x, y), expected)


# -------------------------------------------------------------------------------------------------------------- center


def test_center_by_hand():
    """Identity 0 at (2, 0) and (0, 2), identity 1 at (3, 0); centers start at zero: (4 + 4 + 9) / (2 * 3) = 17/6.
    The centers then move by alpha = 1/2 times sum (x - c) / (1 + n): (2, 2) / 3 / 2 and (3, 0) / 2 / 2."""
    loss_fn = CenterLoss(3, 2, alpha=0.5).double()
    x, y = double([2.0, 0.0], [0.0, 2.0], [3.0, 0.0]), torch.tensor([0, 0, 1])
    assert_close(loss_fn(x, y), double(17 / 6).squeeze())
    assert_close(loss_fn.centers, double([1 / 3, 1 / 3], [0.75, 0.0], [0.0, 0.0]))
    # a second step starts there: identity 1 at (3, 0) again moves by (3 - 0.75) / 2 / 2
    assert_close(loss_fn(x[2:], y[2:]), double((3 - 0.75) ** 2 / 2).squeeze())
    assert_close(loss_fn.centers, double([1 / 3, 1 / 3], [0.75 + 2.25 / 4, 0.0], [0.0, 0.0]))


def test_center_loss_and_gradient_vanish_at_the_centers():
    loss_fn = CenterLoss(4, 6).double().eval()
    loss_fn.centers.normal_()
    x, y = loss_fn.centers.clone(), torch.arange(4)
    assert loss_fn(x, y) == 0
    assert not gradient(loss_fn, x, y).any()


def test_center_loss_is_quadratic_with_gradient_offset_over_b():
    loss_fn, (x, y) = CenterLoss(4, 6).double().eval(), clusters()
    loss_fn.centers.normal_()
    offset = x - loss_fn.centers[y]
    assert_close(loss_fn(loss_fn.centers[y] + 3 * offset, y), 9 * loss_fn(x, y))
    assert_close(gradient(loss_fn, x, y), offset / len(x))


def test_centers_follow_the_rule_of_the_paper():
    """Identity by identity: delta = sum (c - x) / (1 + n), c - alpha delta. An absent identity stays."""
    loss_fn, (x, y) = CenterLoss(5, 6, alpha=0.3).double(), clusters()
    loss_fn.centers.normal_()
    expected = loss_fn.centers.clone()
    for j in range(5):
        members = x[y == j]
        expected[j] -= 0.3 * (expected[j] - members).sum(dim=0) / (1 + len(members))
    stays = loss_fn.centers[4].clone()
    loss_fn(x, y)
    assert_close(loss_fn.centers, expected)
    assert torch.equal(loss_fn.centers[4], stays)


def test_centers_do_not_feel_the_weight_of_the_loss_or_the_optimizer():
    x, y = clusters()
    moved = []
    for expression in ("center", "softmax+0*center", "softmax+7*center"):
        loss_fn = build_loss(expression, 4, 6).double()
        optimizer = torch.optim.SGD(
            [*loss_fn.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9, weight_decay=0.1
        )
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn(x.clone().requires_grad_(), y).backward()
            optimizer.step()
        moved.append(next(value for key, value in loss_fn.state_dict().items() if key.endswith("centers")))
    assert moved[0].abs().max() > 0.1
    assert_close(moved[1], moved[0])
    assert_close(moved[2], moved[0])


# --------------------------------------------------------------------------------------------------------------- npair


def test_npair_by_hand():
    """Two pairs on a line: identity 0: a = 1, p = 2; identity 1: a = 3, p = 1 (then a third image, not used).
    Pair 0: ln(1 + e^(1*1 - 1*2)), pair 1: ln(1 + e^(3*2 - 3*1)); l2/4 = 0.1 times mean a^2 = 5 and mean p^2 = 2.5."""
    x, y = double([1.0], [3.0], [2.0], [1.0], [50.0], [-9.0]), torch.tensor([0, 1, 0, 1, 1, 2])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2 + 0.1 * (5 + 2.5)
    loss_fn = NPairLoss(l2=0.4)
    assert_close(loss_fn(x, y), double(expected).squeeze())
    assert not gradient(loss_fn, x, y)[4:].any()  # the third image of identity 1 and the single one play no part


def test_npair_of_zero_embeddings_is_log_n():
    assert_close(NPairLoss()(torch.zeros(10, 4), torch.arange(5).repeat(2)), torch.tensor(math.log(5)))


def test_npair_without_l2_is_never_negative_and_vanishes_when_separated():
    (x, y), loss_fn = clusters(), NPairLoss(l2=0.0)
    assert loss_fn(x, y) > 0
    separated = 100 * torch.eye(4, dtype=torch.float64)[y]
    assert loss_fn(separated, y) == 0


def test_npair_depends_on_the_length_but_not_on_rotation():
    (x, y), loss_fn = clusters(), NPairLoss()
    assert_close(loss_fn(x @ rotation(6), y), loss_fn(x, y))
    assert (loss_fn(2 * x, y) - loss_fn(x, y)).abs() > 0.01


def test_npair_with_one_pair_keeps_its_penalty():
    """a = (3, 0), p = (0, 4): no negatives; 0.002 / 4 (9 + 16)."""
    x = double([3.0, 0.0], [0.0, 4.0], [1.0, 1.0])
    assert_close(NPairLoss()(x, torch.tensor([7, 7, 8])), double(0.0125).squeeze())


def test_npair_does_not_overflow():
    """Dot products of 1e10 on the wrong side: the loss is their gap."""
    x, y = torch.tensor([[1e5], [0.0], [0.0], [1e5]]), torch.tensor([0, 0, 1, 1])
    assert_close(NPairLoss(l2=0.0)(x, y), torch.tensor((1e10 + math.log(2)) / 2))


# ----------------------------------------------------------------------------------------------------------- histogram


def test_histogram_by_hand():
    """Four bins: nodes -1, -0.5, 0, 0.5, 1. Images at 0, 60 and 90 degrees; the first two are one identity.
    Positive: cos 60 = 0.5, all on node 3. Negatives: cos 90 = 0, all on node 2; cos 30 = 0.866, of which
    (0.866 - 0.5) / 0.5 = 0.732 on node 4 and 0.268 on node 3. A negative counts if its node is at or above a
    positive's: (0 + 1) / 2."""
    x, y = points_at(0, 60, 90), torch.tensor([0, 0, 1])
    assert_close(HistogramLoss(num_bins=4)(x, y), double(0.5).squeeze())


def test_histogram_shares_a_similarity_between_two_nodes():
    """Two bins: nodes -1, 0, 1. Positive cos 60 = 0.5: half on node 1, half on node 2; negatives at 180 - 60 = 120
    degrees, cos = -0.5, and 180 degrees, -1: on average 3/4 on node 0 and 1/4 on node 1. Only 1/4 * 1/2 overlaps."""
    x, y = points_at(0, 60, 180), torch.tensor([0, 0, 1])
    assert_close(HistogramLoss(num_bins=2)(x, y), double(0.125).squeeze())


@pytest.mark.parametrize("num_bins", [2, 7, 150])
def test_histogram_extremes(num_bins):
    loss_fn, y = HistogramLoss(num_bins), torch.tensor([0, 0, 1, 1])
    separated = double([1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [-3.0, 0.0])
    assert loss_fn(separated, y) == 0
    assert not gradient(loss_fn, separated, y).any()
    assert_close(loss_fn(torch.ones(4, 3), y), torch.tensor(1.0))  # identical: all pairs on the last node
    reversed_ = double([1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0])  # positives -1, negatives half -1, half 1
    assert_close(loss_fn(reversed_, y), double(1.0).squeeze())


@pytest.mark.parametrize("num_bins", [3, 20, 150])
def test_histogram_is_the_probability_of_a_reversed_pair(num_bins):
    """P(s- >= s+ + width) <= L <= P(s- > s+ - 2 width), over all couples of a negative and a positive pair."""
    (x, y), width = clusters(num_ids=5, k=4, spread=1.5), 2 / num_bins
    unit = F.normalize(x)
    pairs = [(i, j) for j in range(len(x)) for i in range(j)]
    positives = torch.stack([unit[i] @ unit[j] for i, j in pairs if y[i] == y[j]])
    negatives = torch.stack([unit[i] @ unit[j] for i, j in pairs if y[i] != y[j]])
    loss = HistogramLoss(num_bins)(x, y)
    gap = negatives[:, None] - positives
    assert 0 <= (gap >= width).double().mean() <= loss <= (gap > -2 * width).double().mean() <= 1
    assert 0 < loss < 1


def test_histogram_derivatives():
    """dL/ds+ = -h-_k / (width |S+|) and dL/ds- = h+_(k+1) / (width |S-|), k the node below s. In the plane, with four
    images at known angles: L depends on the angle of image 0 through three similarities."""
    degrees, y, num_bins = (10.0, 47.0, 33.0, 101.0), [0, 0, 1, 1], 9
    angles = torch.deg2rad(double(*degrees)).requires_grad_()
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    HistogramLoss(num_bins)(x, torch.tensor(y)).backward()

    width = 2 / num_bins
    a = [math.radians(d) for d in degrees]
    pairs = [(i, j) for j in range(4) for i in range(j)]

    def histogram(pairs):
        nodes = [-1 + r * width for r in range(num_bins + 1)]
        return [sum(max(0, 1 - abs(math.cos(a[i] - a[j]) - t) / width) for i, j in pairs) / len(pairs) for t in nodes]

    positives, negatives = [p for p in pairs if y[p[0]] == y[p[1]]], [p for p in pairs if y[p[0]] != y[p[1]]]
    h_positive, h_negative = histogram(positives), histogram(negatives)
    expected = [0.0] * 4
    for i, j in pairs:
        k = math.floor((math.cos(a[i] - a[j]) + 1) / width)
        if y[i] == y[j]:
            slope = -h_negative[k] / (width * len(positives))
        else:
            slope = h_positive[k + 1] / (width * len(negatives))
        expected[i] -= slope * math.sin(a[i] - a[j])
        expected[j] += slope * math.sin(a[i] - a[j])
    assert any(abs(number) > 0.1 for number in expected)
    assert_close(angles.grad, double(*expected))


# --------------------------------------------------------------------------------------------------------------- focal


def test_focal_by_hand():
    """p = 3/4 for label 1, gamma 2: -(1/4)^2 ln 3/4."""
    loss_fn = with_weight(FocalLoss(2, 1), [[0.0], [math.log(3)]], [0.0, 0.0])
    assert_close(loss_fn(double([1.0]), torch.tensor([1])), double(math.log(4 / 3) / 16).squeeze())


def test_focal_with_gamma_zero_is_softmax():
    (x, y), softmax = clusters(), SoftmaxLoss(4, 6).double()
    focal = with_weight(FocalLoss(4, 6, gamma=0.0), softmax.weight.tolist(), softmax.bias.tolist())
    assert_close(focal(x, y), softmax(x, y))
    assert_close(gradient(focal, x, y), gradient(softmax, x, y))


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_focal_without_knowledge(gamma):
    loss_fn = with_weight(FocalLoss(5, 3, gamma=gamma), [[0.0] * 3] * 5, [0.0] * 5)
    expected = (1 - 1 / 5) ** gamma * math.log(5)
    assert_close(loss_fn(torch.randn(4, 3).double(), torch.tensor([0, 1, 4, 4])), double(expected).squeeze())


def test_focal_falls_with_gamma():
    (x, y), losses = clusters(), []
    for gamma in (0.0, 0.5, 1.0, 2.0, 5.0):
        torch.manual_seed(1)
        losses.append(FocalLoss(4, 6, gamma=gamma).double()(x, y))
    assert (torch.stack(losses).diff() < 0).all()


@pytest.mark.parametrize("gap", [20.0, 150.0, 5000.0])
def test_focal_of_a_confident_mistake_is_the_gap(gap):
    loss_fn = with_weight(FocalLoss(2, 1), [[0.0], [1.0]], [0.0, 0.0]).float()
    assert_close(loss_fn(torch.tensor([[gap]]), torch.tensor([0])), torch.tensor(gap))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("gap", [-30.0, -1.0, 0.0, 1.0, 30.0])
def test_focal_gradient_includes_the_modulating_factor(gap, gamma):
    """z_y = gap, z = 0 for the other: dL/dz_y = (1 - p)^gamma (gamma p log p + p - 1), also where p rounds to 1."""
    loss_fn = with_weight(FocalLoss(2, 1, gamma=gamma), [[0.0], [1.0]], [0.0, 0.0]).float()
    rest = 1 / (1 + math.exp(gap))  # 1 - p
    expected = rest**gamma * (gamma * (1 - rest) * math.log1p(-rest) - rest)
    assert_close(gradient(loss_fn, torch.tensor([[gap]]), [1]), torch.tensor([[expected]]), rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------- multi-similarity


def test_multi_similarity_by_hand():
    """Images at 0, 60 and 90 degrees, the first two one identity; alpha 2, beta 10, base 0.5, epsilon 0.1.
    Similarities: positive 0.5; negatives of the first 0, of the second 0.866. The third has no positive: 0.
    First: 0.5 - 0.1 < 0 is false: nothing mined, 0. Second: 0.5 - 0.1 < 0.866 and 0.866 + 0.1 > 0.5: both mined,
    1/2 ln(1 + e^0) + 1/10 ln(1 + e^(10 * 0.366)). Mean over all three."""
    x, y = points_at(0, 60, 90), torch.tensor([0, 0, 1])
    second = math.log(2) / 2 + math.log(1 + math.exp(10 * (math.sqrt(3) / 2 - 0.5))) / 10
    assert_close(MultiSimilarityLoss(2.0, 10.0, 0.5, 0.1)(x, y), double(second / 3).squeeze())


def test_multi_similarity_mines_nothing_when_separated():
    loss_fn, y = MultiSimilarityLoss(), torch.tensor([0, 0, 1, 1])
    x = points_at(0, 10, 180, 190)
    assert loss_fn(x, y) == 0
    assert not gradient(loss_fn, x, y).any()


def test_multi_similarity_with_a_wide_epsilon_mines_everything():
    x, y = clusters(spread=1.0)
    unit = F.normalize(x)
    loss_fn, total = MultiSimilarityLoss(epsilon=2.1), 0.0
    for i in range(len(x)):
        positives = [unit[i] @ unit[j] for j in range(len(x)) if j != i and y[i] == y[j]]
        negatives = [unit[i] @ unit[j] for j in range(len(x)) if y[i] != y[j]]
        total += (1 + sum((-2 * (s - 0.5)).exp() for s in positives)).log() / 2
        total += (1 + sum((50 * (s - 0.5)).exp() for s in negatives)).log() / 50
    assert_close(loss_fn(x, y), total / len(x))
    assert (loss_fn(x, y) - MultiSimilarityLoss()(x, y)).abs() > 1e-3  # epsilon 0.1 does leave pairs out


def test_multi_similarity_counts_exact_duplicates_as_positives():
    """Three equal images of one identity and a negative at the same place: each anchor of the three has two positives
    at similarity 1 and one negative at 1; the single image has no positive."""
    x, y = torch.ones(4, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 1])
    expected = 3 / 4 * (math.log(1 + 2 * math.exp(-1)) / 2 + math.log(1 + math.exp(25)) / 50)
    assert_close(MultiSimilarityLoss()(x, y), double(expected).squeeze())


def test_multi_similarity_differentiates_both_ends_of_a_pair():
    """Turning all images together changes nothing, so the gradient has no component along a common rotation: it
    would have one if anchors were detached."""
    angles = torch.deg2rad(double(0, 40, 65, 100, 130)).requires_grad_()
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    MultiSimilarityLoss()(x, torch.tensor([0, 0, 1, 1, 2])).backward()
    assert angles.grad.abs().max() > 0.01
    assert abs(angles.grad.sum()) < 1e-12


@pytest.mark.parametrize("loss_fn", [HistogramLoss(), MultiSimilarityLoss()], ids=["histogram", "multi_similarity"])
def test_spherical_pair_losses_ignore_the_length_of_each_embedding(loss_fn):
    x, y = clusters(spread=1.5)
    lengths = torch.linspace(0.1, 50, len(x), dtype=torch.float64)[:, None]
    assert loss_fn(x, y) > 0.1
    assert_close(loss_fn(x * lengths, y), loss_fn(x, y))


# ---------------------------------------------------------------------------------------------------------- sphereface


def own_logit(loss_fn, length, angle):
    """The target logit of an embedding at this angle to its class vector; the other class is orthogonal to both."""
    loss_fn = with_weight(loss_fn, [[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    x = length * double([math.cos(angle), math.sin(angle), 0.0])
    return -(loss_fn(x, torch.tensor([0])).exp() - 1).log().item()  # the other logit is 0: L = log(1 + exp(-z))


def test_sphereface_m1_by_hand():
    """x = (3, 4); W = (10, 0) and (0, 0.1), so z = 3 and 4 whatever their lengths: for label 0, ln(1 + e)."""
    loss_fn = with_weight(build_loss("sphereface_m1", 2, 2), [[10.0, 0.0], [0.0, 0.1]])
    assert_close(loss_fn(double([3.0, 4.0]), torch.tensor([0])), double(math.log(1 + math.e)).squeeze())


def test_sphereface_by_hand():
    """x = (1, 1) at 45 degrees from W_y = (2, 0) and from the other class (0, 1): |x| = sqrt 2, psi(pi/4) = -1.
    lambda = 1: z_y = sqrt 2 (cos 45 - 1) / 2 = (1 - sqrt 2) / 2, and z = 1 for the other."""
    loss_fn = with_weight(SphereFaceLoss(2, 2, lambda_base=0.0, lambda_min=1.0), [[2.0, 0.0], [0.0, 1.0]])
    expected = math.log(1 + math.exp(1 - (1 - math.sqrt(2)) / 2))
    assert_close(loss_fn(double([1.0, 1.0]), torch.tensor([0])), double(expected).squeeze())


def test_psi_at_the_ends_of_its_pieces():
    psi = [own_logit(SphereFaceLoss(2, 3, lambda_base=0, lambda_min=0), 1.0, k * math.pi / 4) for k in range(5)]
    assert psi == pytest.approx([1, -1, -3, -5, -7])


@pytest.mark.parametrize("margin", [2, 3, 4])
def test_psi_is_continuous_smooth_and_falling(margin):
    def z(angle):
        return own_logit(SphereFaceLoss(2, 3, margin=margin, lambda_base=0, lambda_min=0), 2.0, angle)

    values = [z(math.pi * i / 200) for i in range(201)]
    assert all(later < earlier for earlier, later in zip(values, values[1:], strict=False))
    for k in range(1, margin):
        end, step = k * math.pi / margin, 1e-4
        before, after = (z(end) - z(end - step)) / step, (z(end + step) - z(end)) / step
        assert abs(before) < 1e-2 and abs(after) < 1e-2  # flat on both sides: the pieces join with slope 0


def test_sphereface_annealing_follows_its_schedule():
    loss_fn = SphereFaceLoss(3, 4)
    assert loss_fn.annealing(1).item() == pytest.approx(1000 / 1.12)
    assert loss_fn.annealing(100).item() == pytest.approx(1000 / 13)
    assert loss_fn.annealing(1657).item() > 5
    assert loss_fn.annealing(1659).item() == 5
    assert loss_fn.annealing(torch.tensor(100)).item() == pytest.approx(1000 / 13)
    other = SphereFaceLoss(3, 4, lambda_base=100.0, lambda_gamma=1.0, lambda_power=2.0, lambda_min=0.5)
    assert [other.annealing(t).item() for t in (1, 9, 1000)] == pytest.approx([25, 1, 0.5])
    assert SphereFaceLoss(3, 4, lambda_base=0.0, lambda_min=7.0).annealing(1).item() == 7


def test_sphereface_uses_the_lambda_of_the_first_step_at_the_first_forward():
    """lambda(1) = 3 / (1 + 1 * 1) = 1.5 and lambda(2) = 1: the target at 45 degrees, |x| = 2, cos = c, psi = -1."""
    c = math.sqrt(0.5)
    loss_fn = SphereFaceLoss(2, 3, lambda_base=3.0, lambda_gamma=1.0, lambda_min=0.0)
    loss_fn = with_weight(loss_fn, [[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]).train()
    x, y = double([2 * c, 2 * c, 0.0]), torch.tensor([0])
    for lam in (1.5, 1.0):
        z = 2 * (lam * c - 1) / (1 + lam)
        assert_close(loss_fn(x, y), double(math.log(1 + math.exp(-z))).squeeze())
    assert loss_fn.step == 2
    assert_close(loss_fn.eval()(x, y), double(math.log(1 + math.exp(-z))).squeeze())  # lambda(2), and stays there
    assert loss_fn.step == 2


def test_sphereface_is_sphereface_m1_at_infinite_lambda_or_margin_1():
    (x, y), m1 = clusters(), build_loss("sphereface_m1", 4, 6).double()
    for other in (
        SphereFaceLoss(4, 6, margin=1),
        SphereFaceLoss(4, 6, margin=1, lambda_base=0, lambda_min=0),
        SphereFaceLoss(4, 6, lambda_min=1e12),
        SphereFaceLoss(4, 6, lambda_min=math.inf),
    ):
        other = with_weight(other, m1.weight.tolist())
        assert_close(other(x, y), m1.eval()(x, y))
        assert_close(gradient(other, x, y), gradient(m1, x, y))


def test_sphereface_falls_as_lambda_grows():
    (x, y), losses = clusters(), []
    for lam in (0.0, 1.0, 5.0, 50.0, 1000.0):
        torch.manual_seed(1)
        losses.append(SphereFaceLoss(4, 6, lambda_base=0.0, lambda_min=lam).double()(x, y))
    assert (torch.stack(losses).diff() < 0).all()


def test_sphereface_m1_depends_on_the_direction_of_the_weights_only():
    (x, y), loss_fn = clusters(), build_loss("sphereface_m1", 4, 6).double()
    before = loss_fn(x, y)
    before.backward()
    along = (loss_fn.weight.grad * loss_fn.weight).sum(dim=1)
    assert loss_fn.weight.grad.abs().max() > 0.01
    assert_close(along, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    loss_fn.weight.data *= double([0.1], [1.0], [7.0], [100.0])
    assert_close(loss_fn(x, y), before)


def test_sphereface_m1_logits_grow_with_the_embedding():
    (x, y), loss_fn = clusters(), build_loss("sphereface_m1", 4, 6).double()
    logits = x @ F.normalize(loss_fn.weight).T
    assert_close(loss_fn(x, y), F.cross_entropy(logits, y))
    assert_close(loss_fn(2 * x, y), F.cross_entropy(2 * logits, y))


@pytest.mark.parametrize("name", ["sphereface_m1", "sphereface"])
def test_sphereface_of_zero_features_is_log_c(name):
    loss_fn = build_loss(name, 7, 6)
    assert_close(loss_fn(torch.zeros(3, 6), torch.tensor([0, 1, 6])), torch.tensor(math.log(7)))
    assert gradient(loss_fn, torch.zeros(3, 6), [0, 1, 6]).isfinite().all()


# ---------------------------------------------------------------------------------------------------- cosface, arcface


def test_cosface_by_hand():
    """x = (3, 4) has cosines 0.6 and 0.8 to the axes, whatever its and their lengths; scale 10, margin 0.2, label 1:
    z = 6 and 10 (0.8 - 0.2) = 6: ln 2."""
    loss_fn = with_weight(CosFaceLoss(2, 2, scale=10.0, margin=0.2), [[10.0, 0.0], [0.0, 0.1]])
    assert_close(loss_fn(double([3.0, 4.0]), torch.tensor([1])), double(math.log(2)).squeeze())


def test_arcface_by_hand():
    """x at 30 degrees from its class, 60 from the other; margin 30 degrees = pi/6, scale 10: z = 10 cos 60 for both."""
    loss_fn = with_weight(ArcFaceLoss(2, 2, scale=10.0, margin=math.pi / 6), [[5.0, 0.0], [0.0, 0.2]])
    x = 7 * points_at(30)
    assert_close(loss_fn(x, torch.tensor([0])), double(math.log(2)).squeeze())
    assert_close(loss_fn(x, torch.tensor([1])), double(math.log(1 + math.exp(10 * math.cos(math.pi / 6)))).squeeze())


def test_without_margin_cosface_and_arcface_are_the_normalised_softmax():
    x, y = clusters()
    cosface, arcface = CosFaceLoss(4, 6, scale=12.0, margin=0.0).double(), ArcFaceLoss(4, 6, scale=12.0, margin=0.0)
    arcface = with_weight(arcface, cosface.weight.tolist())
    expected = F.cross_entropy(12 * F.normalize(x) @ F.normalize(cosface.weight).T, y)
    assert_close(cosface(x, y), expected)
    assert_close(arcface(x, y), expected)
    assert_close(gradient(arcface, x, y), gradient(cosface, x, y))


def test_cosface_margin_scales_the_odds_of_each_image():
    """p' = p e^(-sm) / (p e^(-sm) + 1 - p), image by image."""
    (x, y), weight = clusters(), torch.randn(4, 6).tolist()
    without = with_weight(CosFaceLoss(4, 6, scale=8.0, margin=0.0), weight)
    with_margin = with_weight(CosFaceLoss(4, 6, scale=8.0, margin=0.35), weight)
    factor = math.exp(-8 * 0.35)
    for i in range(len(x)):
        p = (-without(x[i : i + 1], y[i : i + 1])).exp()
        assert_close((-with_margin(x[i : i + 1], y[i : i + 1])).exp(), p * factor / (p * factor + 1 - p))


@pytest.mark.parametrize("p", [0.9, 0.999])
def test_the_scale_bounds_the_probability_a_cosine_softmax_can_reach(p):
    """Three class vectors at 120 degrees and embeddings on them: the best case reaches p exactly at the scale
    (C - 1) / C ln((C - 1) p / (1 - p)); 13.5 for C = 751 and p = 0.999."""

    def least_scale(c):
        return (c - 1) / c * math.log((c - 1) * p / (1 - p))

    loss_fn = with_weight(CosFaceLoss(3, 2, scale=least_scale(3), margin=0.0), points_at(0, 120, 240).tolist())
    assert_close((-loss_fn(points_at(120), torch.tensor([1]))).exp(), double(p).squeeze())
    if p == 0.999:
        assert least_scale(751) == pytest.approx(13.5, abs=0.05)


@pytest.mark.parametrize("loss_class", [CosFaceLoss, ArcFaceLoss])
def test_angular_margins_only_make_it_harder(loss_class):
    (x, y), weight = clusters(), torch.randn(4, 6).tolist()
    losses = [with_weight(loss_class(4, 6, scale=8.0, margin=m / 10), weight)(x, y) for m in range(6)]
    assert (torch.stack(losses).diff() > 0).all()


@pytest.mark.parametrize("loss_class", [CosFaceLoss, ArcFaceLoss])
def test_cosface_and_arcface_ignore_lengths(loss_class):
    (x, y), loss_fn = clusters(), loss_class(4, 6).double()
    before = loss_fn(x, y)
    loss_fn.weight.data *= double([0.1], [1.0], [7.0], [100.0])
    assert_close(loss_fn(x * torch.linspace(0.1, 50, len(x), dtype=torch.float64)[:, None], y), before)


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.5])
def test_arcface_logit_falls_over_all_angles_and_steps_down_at_pi_minus_margin(margin):
    def z(angle):
        return own_logit(ArcFaceLoss(2, 3, scale=4.0, margin=margin), 3.0, angle)

    values = [z(math.pi * i / 300) for i in range(301)]
    assert all(later < earlier for earlier, later in zip(values, values[1:], strict=False))
    assert values[0] == pytest.approx(4 * math.cos(margin))
    assert z(math.pi - margin - 1e-9) == pytest.approx(-4)
    assert z(math.pi - margin + 1e-9) == pytest.approx(-4 * (math.cos(margin) + margin * math.sin(margin)))
    assert values[-1] == pytest.approx(4 * (-1 - margin * math.sin(margin)))


@pytest.mark.parametrize("angle", [0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1.0, *(math.pi - d for d in (0.5, 1e-4, 1e-8, 0.0))])
def test_arcface_gradient_is_bounded_at_every_angle_in_float32(angle):
    """|dL/dx| |x| <= 2 scale: acos and sqrt(1 - cos^2) break this where x points along its class vector or away."""
    loss_fn = ArcFaceLoss(9, 512)
    own = F.normalize(loss_fn.weight.detach()[3].double(), dim=0)
    aside = torch.randn(512, dtype=torch.float64)
    aside = F.normalize(aside - (aside @ own) * own, dim=0)
    x = (25 * (math.cos(angle) * own + math.sin(angle) * aside)).float()[None]
    loss = loss_fn(x, torch.tensor([3]))
    slope = gradient(loss_fn, x, [3])
    assert loss.isfinite() and slope.isfinite().all()
    assert slope.norm() * x.norm() <= 2 * 64 * (1 + 1e-5)
    x_on_weight = loss_fn.weight.detach()[3:4].clone() * (1 if angle < 1 else -1)  # exactly along it
    assert gradient(loss_fn, x_on_weight, [3]).norm() * x_on_weight.norm() <= 2 * 64 * (1 + 1e-5)
    weight_slope = torch.autograd.grad(loss_fn(x, torch.tensor([3])), loss_fn.weight)[0]
    assert (weight_slope.norm(dim=1) * loss_fn.weight.norm(dim=1) <= 2 * 64 * (1 + 1e-5)).all()
