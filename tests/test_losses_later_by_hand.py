"""The eight later losses: one example each that can be checked with a pencil, their limits and their invariances."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from losses import (
    AdaFaceLoss,
    AdaSPLoss,
    ArcFaceLoss,
    CircleLoss,
    CosFaceLoss,
    ProxyAnchorLoss,
    SmoothAPLoss,
    SubCenterArcFaceLoss,
    SupConLoss,
    TripletLoss,
    WeightedTripletLoss,
)
from tests.test_losses_by_hand import clusters, double, gradient, points_at, rotation, with_weight
from utils.ranking import metrics_from_distance

ROOT3 = math.sqrt(3)


def softplus(z):
    return math.log(1 + math.exp(z))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def with_statistics(loss_fn, mean, std):
    """AdaFace with these running statistics."""
    loss_fn.mean.fill_(mean)
    loss_fn.std.fill_(std)
    return loss_fn


@pytest.mark.parametrize(
    "loss_fn",
    [CircleLoss(), SupConLoss(), SmoothAPLoss(), AdaSPLoss(), ProxyAnchorLoss(4, 6), SubCenterArcFaceLoss(4, 6)],
    ids=lambda loss_fn: type(loss_fn).__name__,
)
def test_losses_on_the_sphere_ignore_the_length_of_each_embedding(loss_fn):
    """And that of each class vector or proxy. (AdaFace looks at lengths: that is its point.)"""
    (x, y), loss_fn = clusters(spread=1.5), loss_fn.double()
    before = loss_fn(x, y)
    for parameter in loss_fn.parameters():
        parameter.data *= torch.linspace(0.1, 50, parameter[..., 0].numel()).view_as(parameter[..., 0])[..., None]
    assert before > 0.1
    assert_close(loss_fn(x * torch.linspace(0.1, 50, len(x), dtype=torch.float64)[:, None], y), before)


# -------------------------------------------------------------------------------------------------------------- circle


def test_circle_by_hand():
    """Images at 0, 60 and 90 degrees, the first two one identity; scale 4, margin 1/4.
    First: s_p = 1/2, a_p = 3/4, exponent -4 * 3/4 * (1/2 - 3/4) = 3/4; s_n = 0, a_n = 1/4, 4 * 1/4 * (0 - 1/4) = -1/4.
    Second: the same positive; s_n^2 = 3/4, 4 (s_n + 1/4) (s_n - 1/4) = 4 (3/4 - 1/16) = 11/4. The third has none."""
    loss = CircleLoss(scale=4.0, margin=0.25)(points_at(0, 60, 90), torch.tensor([0, 0, 1]))
    assert_close(loss, double((softplus(3 / 4 - 1 / 4) + softplus(3 / 4 + 11 / 4)) / 2).squeeze())


def test_circle_of_separated_identities():
    """s_p = 1 and s_n = -margin are the optima: |P| positives with -scale margin^2 each, |N| negatives with 0."""
    angle = math.degrees(math.acos(-0.25))
    x, y = points_at(0, 0, 0, angle, angle, angle), torch.tensor([0, 0, 0, 1, 1, 1])
    loss = CircleLoss(scale=32.0, margin=0.25)(x, y)
    assert_close(loss, double(softplus(math.log(3) + math.log(2) - 32 / 16)).squeeze())


def test_circle_does_not_overflow():
    """Opposite positives and an equal negative, in float32, with the defaults. First: 128 (2.25 * 1.75 + 1.25 * 0.75)
    = 624. Second: s_n = -1 is beyond its optimum, weight 0: 128 * 2.25 * 1.75 = 504. The loss is the exponent."""
    x, y = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0, 1])
    assert_close(CircleLoss()(x, y), torch.tensor((624.0 + 504.0) / 2))
    assert gradient(CircleLoss(), x, y).isfinite().all()


# -------------------------------------------------------------------------------------------------------------- supcon


def test_supcon_by_hand():
    """Images at 0, 60 and 90 degrees, the first two one identity; temperature 1/2 makes 1, 0 and sqrt 3 of the
    similarities 1/2, 0 and sqrt(3)/2. First: -ln e / (e + 1); second: -ln e / (e + e^sqrt 3); the third has none."""
    loss = SupConLoss(temperature=0.5)(points_at(0, 60, 90), torch.tensor([0, 0, 1]))
    assert_close(loss, double((softplus(-1) + softplus(ROOT3 - 1)) / 2).squeeze())


def test_supcon_sums_over_positives_outside_the_logarithm():
    """One identity at 0, 0 and 90 degrees, temperature 1, no negatives. First and second: e/(e+1) for one positive and
    1/(e+1) for the other; third: 1/2 each. Eq. 3 of the paper would take the logarithm of their mean, 1/2 for all."""
    first = (softplus(-1) + softplus(1)) / 2
    loss = SupConLoss(temperature=1.0)(points_at(0, 0, 90), torch.tensor([0, 0, 0]))
    assert_close(loss, double((2 * first + math.log(2)) / 3).squeeze())


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 2], [3, 3, 3, 3, 3, 3]])
def test_supcon_of_collapsed_embeddings_is_log_of_the_other_images(labels):
    assert_close(SupConLoss()(torch.ones(6, 5), torch.tensor(labels)), torch.tensor(math.log(5)))


# ---------------------------------------------------------------------------------------------------- weighted_triplet


def test_weighted_triplet_by_hand():
    """On a line: identity 0 at 0, 1 and 3; two others, alone, at 5 and 6. Weighted means of the distances (a, b):
    far (a e^a + b e^b) / (e^a + e^b), near (a e^-a + b e^-b) / (e^-a + e^-b) = a + 1 / (e + 1) for b = a + 1."""

    def far(a, b):
        return (a * math.exp(a) + b * math.exp(b)) / (math.exp(a) + math.exp(b))

    one_on = 1 / (math.e + 1)
    expected = softplus(far(1, 3) - 5 - one_on) + softplus(far(1, 2) - 4 - one_on) + softplus(far(2, 3) - 2 - one_on)
    loss = WeightedTripletLoss()(double([0.0], [1.0], [3.0], [5.0], [6.0]), torch.tensor([0, 0, 0, 1, 2]))
    assert_close(loss, double(expected / 3).squeeze())


def test_weighted_triplet_with_one_pair_of_each_kind_is_the_soft_margin_triplet():
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 0, 1])
    assert_close(WeightedTripletLoss()(x, y), TripletLoss(margin=None)(x, y))
    assert_close(gradient(WeightedTripletLoss(), x, y), gradient(TripletLoss(margin=None), x, y))


def test_weighted_triplet_lies_below_the_hardest_and_is_invariant_to_translation_and_rotation():
    (x, y), loss_fn = clusters(spread=2.0), WeightedTripletLoss()
    assert 0.1 < loss_fn(x, y) < TripletLoss(margin=None)(x, y)
    assert_close(loss_fn(x + 5, y), loss_fn(x, y))
    assert_close(loss_fn(x @ rotation(6), y), loss_fn(x, y))
    total = gradient(loss_fn, x, y)
    assert total.abs().max() > 0.01
    assert_close(total.sum(dim=0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_weighted_triplet_does_not_lose_far_images():
    """On a line, in float32: positives 5000 apart, a negative at 1000: e^-1000 is 0 and e^5000 infinite there."""
    x, y = torch.tensor([[0.0], [5000.0], [1000.0]]), torch.tensor([0, 0, 1])
    assert_close(WeightedTripletLoss()(x, y), torch.tensor((4000.0 + 1000.0) / 2))
    assert gradient(WeightedTripletLoss(), x, y).isfinite().all()


def test_weighted_triplet_of_collapsed_embeddings():
    loss = WeightedTripletLoss()(torch.ones(6, 5), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert_close(loss, torch.tensor(math.log(2)))


# -------------------------------------------------------------------------------------------------------- proxy_anchor


def test_proxy_anchor_by_hand():
    """Two images of identity 0 at 0 and 60 degrees; proxies on the axes, of any length; scale 2, margin 0.1.
    Pull, identity 0 alone: similarities 1 and 1/2: ln(1 + e^-1.8 + e^-0.8). Push, a mean over both identities: none for
    identity 0; identity 1: similarities 0 and sqrt(3)/2: ln(1 + e^0.2 + e^(sqrt 3 + 0.2)) / 2."""
    loss_fn = with_weight(ProxyAnchorLoss(2, 2, scale=2.0, margin=0.1), [[5.0, 0.0], [0.0, 0.2]])
    pull = math.log(1 + math.exp(-1.8) + math.exp(-0.8))
    push = math.log(1 + math.exp(0.2) + math.exp(ROOT3 + 0.2)) / 2
    assert_close(loss_fn(points_at(0, 60), torch.tensor([0, 0])), double(pull + push).squeeze())


def test_proxies_start_as_the_authors_do():
    torch.manual_seed(5)
    expected = torch.nn.init.kaiming_normal_(torch.empty(7, 16), mode="fan_out")
    torch.manual_seed(5)
    assert torch.equal(ProxyAnchorLoss(7, 16).weight, expected)


def test_proxies_that_are_not_in_the_batch_are_pushed_away_from_it():
    """Identities 2 to 4 have no image: a step down their gradient lowers the similarity to the images, on the whole."""
    loss_fn, x = ProxyAnchorLoss(5, 6).double(), F.normalize(torch.randn(4, 6, dtype=torch.float64))
    slope = torch.autograd.grad(loss_fn(x, torch.tensor([0, 0, 1, 1])), loss_fn.weight)[0]
    before = (x @ F.normalize(loss_fn.weight[2:]).T).logsumexp(dim=0)
    after = (x @ F.normalize(loss_fn.weight[2:] - 1e-3 * slope[2:]).T).logsumexp(dim=0)
    assert (after < before).all()


# ----------------------------------------------------------------------------------------------------------- smooth_ap


def test_smooth_ap_by_hand():
    """Images at 0, 60 and 90 degrees, the first two one identity; temperature 1/2. One positive, so r+ = 1.
    First: s_n - s_p = -1/2, r = 1 + 1 / (1 + e); second: (sqrt 3 - 1) / 2, r = 1 + 1 / (1 + e^(1 - sqrt 3))."""
    loss = SmoothAPLoss(temperature=0.5)(points_at(0, 60, 90), torch.tensor([0, 0, 1]))
    first, second = 1 + 1 / (1 + math.e), 1 + 1 / (1 + math.exp(1 - ROOT3))
    assert_close(loss, double((1 - 1 / first + 1 - 1 / second) / 2).squeeze())


def test_smooth_ap_counts_the_other_positives_in_both_ranks():
    """Identity 0 at 0, 30 and 100 degrees, a negative at 60, a steep sigmoid. Anchor 0: 30+, 60-, 100+: (1 + 2/3) / 2.
    Anchor 30: 0+ and 60- are equally near, G(0) = 1/2: r = 3/2 for 0; 100+ is third: (2/3 + 2/3) / 2. Anchor 100: 60-,
    30+, 0+: (1/2 + 2/3) / 2."""
    loss = SmoothAPLoss(temperature=1e-4)(points_at(0, 30, 100, 60), torch.tensor([0, 0, 0, 1]))
    precision = (5 / 6 + 2 / 3 + 7 / 12) / 3
    assert_close(loss, double(1 - precision).squeeze())


def test_smooth_ap_of_a_perfect_order_is_zero():
    x, y = points_at(0, 10, 180, 190), torch.tensor([0, 0, 1, 1])
    assert SmoothAPLoss()(x, y).abs() < 1e-12
    assert not gradient(SmoothAPLoss(), x, y).abs().max() > 1e-12


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 1.0])
def test_smooth_ap_lies_in_0_1(temperature):
    (x, y), loss_fn = clusters(spread=2.0), SmoothAPLoss(temperature)
    opposite = torch.where(torch.arange(len(y)) % 3 == 0, -1.0, 1.0).double()[:, None] * torch.ones_like(x)
    for embeddings in (x, torch.ones_like(x), opposite):
        assert 0 <= loss_fn(embeddings, y) < 1


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1, 2, 2, 2], [3, 0, 2, 0, 1, 3, 5, 0, 2, 3]])
def test_smooth_ap_tends_to_the_map_of_the_evaluator(labels):
    """Each image a query, all others its gallery: the evaluator drops the one with the query's pid and camera."""
    for _ in range(5):
        x, images = torch.randn(len(labels), 4, dtype=torch.float64), torch.arange(len(labels))
        distance = 1 - F.normalize(x) @ F.normalize(x).T
        scored = metrics_from_distance(distance, labels, images, labels, images)
        loss = SmoothAPLoss(temperature=1e-7)(x, torch.tensor(labels))
        assert 0.1 < scored["mAP"] < 0.95
        assert_close(1 - loss, double(scored["mAP"]).squeeze())


# --------------------------------------------------------------------------------------------------- subcenter_arcface


def test_subcenter_arcface_by_hand():
    """x at 30 degrees; identity 0 at 0 and 200 degrees, identity 1 at 90 and 250; margin 30 degrees, scale 10. The
    nearest are 30 and 60 degrees away: for label 0, z = 10 cos 60 twice, ln 2; for label 1, 10 cos 30 and 10 cos 90."""
    loss_fn = with_weight(
        SubCenterArcFaceLoss(2, 2, sub_centers=2, scale=10.0, margin=math.pi / 6),
        (torch.tensor([[5.0], [1.0], [0.2], [1.0]]) * points_at(0, 200, 90, 250)).view(2, 2, 2).tolist(),
    )
    x = 7 * points_at(30)
    assert_close(loss_fn(x, torch.tensor([0])), double(math.log(2)).squeeze())
    assert_close(loss_fn(x, torch.tensor([1])), double(softplus(10 * math.cos(math.pi / 6))).squeeze())


@pytest.mark.parametrize("margin", [0.0, 0.5, 2.0])
def test_subcenter_arcface_with_one_sub_center_is_arcface(margin):
    x, y = clusters(spread=2.0)
    torch.manual_seed(5)
    arcface = ArcFaceLoss(4, 6, margin=margin).double()
    torch.manual_seed(5)
    loss_fn = SubCenterArcFaceLoss(4, 6, sub_centers=1, margin=margin).double()
    assert torch.equal(loss_fn.weight[:, 0], arcface.weight)  # drawn alike
    assert_close(loss_fn(x, y), arcface(x, y))
    assert_close(gradient(loss_fn, x, y), gradient(arcface, x, y))


def test_only_the_nearest_sub_centers_learn():
    (x, y), loss_fn = clusters(), SubCenterArcFaceLoss(4, 6, sub_centers=5, scale=4.0).double()
    slope = torch.autograd.grad(loss_fn(x, y), loss_fn.weight)[0].abs().sum(dim=2)  # (C, K)
    cosine = torch.einsum("bd,ckd->bck", F.normalize(x), F.normalize(loss_fn.weight, dim=2))
    winners = F.one_hot(cosine.argmax(dim=2), 5).any(dim=0)  # (C, K)
    assert 4 <= winners.sum() < 20
    assert torch.equal(slope > 0, winners)


# --------------------------------------------------------------------------------------------------------------- adasp


def adasp_terms(s, t):
    """h and e of an identity of two images with similarity s: four pairs (two of an image with itself)."""
    hardest = -t * math.log(2 * math.exp(-1 / t) + 2 * math.exp(-s / t))
    easiest = t * math.log(2 / (math.exp(-1 / t) + math.exp(-s / t)))
    return hardest, easiest


def test_adasp_by_hand():
    """Identity 0 at 0 and 30 degrees, identity 1 at 90 alone; temperature 1/2. n of both: ln(e^0 + e^(2 cos 60)).
    Identity 0: h = 0.24 > 0, so w = 2 h e / (h + e). Identity 1: only itself, h = e = 1."""
    h, e = adasp_terms(ROOT3 / 2, 0.5)
    w, n = 2 * h * e / (h + e), math.log(1 + math.e)
    assert 0 < h < e and 0 < w < 1
    expected = (softplus(n - (w * h + (1 - w) * e) / 0.5) + softplus(n - 1 / 0.5)) / 2
    assert_close(AdaSPLoss(temperature=0.5)(points_at(0, 30, 90), torch.tensor([0, 0, 1])), double(expected).squeeze())


def test_adasp_with_a_negative_hardest_pair_pulls_the_easiest():
    """The same with 120 degrees, where h < 0: w = 0. The images of identity 0 are cos 90 and cos 30 from the other."""
    h, e = adasp_terms(-0.5, 0.5)
    n = math.log(1 + math.exp(ROOT3))
    assert h < 0
    expected = (softplus(n - e / 0.5) + softplus(n - 1 / 0.5)) / 2
    assert_close(AdaSPLoss(temperature=0.5)(points_at(0, 120, 90), torch.tensor([0, 0, 1])), double(expected).squeeze())


def test_adasp_does_not_overflow():
    """s / t = 1000, in float32: log-sum-exp before exp. Opposite positives, h = -1: the easiest, e = -1, too; n = 1."""
    x, y = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 0, 1, 1])
    assert_close(AdaSPLoss(temperature=1e-3)(x, y), torch.tensor(2000.0))
    assert gradient(AdaSPLoss(temperature=1e-3), x, y).isfinite().all()


# ------------------------------------------------------------------------------------------------------------- adaface


def test_adaface_by_hand():
    """x at 60 degrees from its class, 30 from the other, |x| = 25; mean 20, std 10 (less the 0.001): q = 0.4 * 5 / 10
    = 0.2. margin 0.5: g = -0.1, g' = 0.6; scale 2: z_y = 2 (cos(pi/3 - 0.1) - 0.6), z = 2 cos 30."""
    loss_fn = AdaFaceLoss(2, 2, scale=2.0, margin=0.5, concentration=0.4).double()
    loss_fn = with_statistics(with_weight(loss_fn, [[3.0, 0.0], [0.0, 0.1]]), 20.0, 10.0 - 1e-3)
    expected = softplus(ROOT3 - 2 * (math.cos(math.pi / 3 - 0.1) - 0.6))
    assert_close(loss_fn(25 * points_at(60), torch.tensor([0])), double(expected).squeeze())


def test_adaface_moves_its_statistics_before_it_uses_them():
    """Lengths 10 and 30: mean 20, sample deviation sqrt 200. Momentum 1/4 from 20 and 100, then one image of length 40,
    which has no deviation, then one of length 1000, which counts as 100."""
    loss_fn = AdaFaceLoss(3, 2, momentum=0.25).double()
    x, y = torch.tensor([[10.0], [30.0]]) * points_at(20, 70), torch.tensor([0, 1])
    std = 0.75 * 100 + 0.25 * math.sqrt(200)
    loss = loss_fn(x, y)
    assert_close(loss_fn.mean, double(20.0).squeeze())
    assert_close(loss_fn.std, double(std).squeeze())
    assert_close(loss_fn.eval()(x, y), loss)  # used as moved, and still the same: eval moves nothing
    assert_close(loss_fn.std, double(std).squeeze())
    loss_fn.train()(40 * points_at(20), y[:1])
    assert_close(loss_fn.mean, double(25.0).squeeze())
    assert_close(loss_fn.std, double(std).squeeze())
    loss_fn(1000 * points_at(20), y[:1])
    assert_close(loss_fn.mean, double(0.75 * 25 + 0.25 * 100).squeeze())


def test_adaface_of_short_embeddings_is_arcface():
    """q = -1. Below the clip only: ArcFace goes on beyond pi - margin, AdaFace stays."""
    x, y = clusters()
    arcface = ArcFaceLoss(4, 6, scale=8.0, margin=0.4).double()
    adaface = with_weight(AdaFaceLoss(4, 6, scale=8.0, margin=0.4), arcface.weight.tolist())
    adaface = with_statistics(adaface, 1e6, 1.0)
    angles = (F.normalize(x) @ F.normalize(arcface.weight).T).gather(1, y[:, None]).acos()
    below = (angles < math.pi - 0.4)[:, 0]
    assert below.sum() > 8
    assert_close(adaface(x[below], y[below]), arcface(x[below], y[below]))
    assert_close(gradient(adaface, x[below], y[below]), gradient(arcface, x[below], y[below]))


def test_adaface_of_average_embeddings_is_cosface():
    x, y = clusters()
    cosface = CosFaceLoss(4, 6, scale=8.0, margin=0.4).double()
    adaface = with_weight(AdaFaceLoss(4, 6, scale=8.0, margin=0.4, concentration=0.0), cosface.weight.tolist())
    assert_close(adaface(x, y), cosface(x, y))
    assert_close(gradient(adaface, x, y), gradient(cosface, x, y))


@pytest.mark.parametrize(("mean", "degrees", "own"), [(0.0, 20, 1 - 0.8), (1e6, 170, -1.0)])
def test_adaface_clips_the_shifted_angle(mean, degrees, own):
    """margin 0.4 = 23 degrees: a long embedding (q = 1) at 20 degrees counts as 0 degrees, and loses 2 margin; a short
    one (q = -1) at 170 counts as 180. The angle to the other class, orthogonal to the plane, is 90."""
    loss_fn = AdaFaceLoss(2, 3, scale=3.0, margin=0.4, concentration=1.0)
    loss_fn = with_statistics(with_weight(loss_fn, [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), mean, 1.0)
    x = 20 * F.pad(points_at(degrees), (0, 1))
    assert_close(loss_fn(x, torch.tensor([0])), double(softplus(-3 * own)).squeeze())
    plane = gradient(loss_fn, x, [0])[:, :2]  # constant in the angle to its own class
    assert_close(plane, torch.zeros_like(plane), rtol=0, atol=1e-12)


def test_adaface_asks_more_of_longer_embeddings_but_does_not_make_them_longer():
    """The value depends on the length, the gradient has no part along x: the length is a constant in it. Far from its
    class, a long image is asked for more than a short one."""
    (x, y), loss_fn = clusters(), with_statistics(AdaFaceLoss(4, 6, scale=8.0).double(), 2.0, 1.0).eval()
    assert loss_fn(3 * x, y) > loss_fn(x, y) + 0.01
    slope = gradient(loss_fn, x, y)
    assert slope.abs().max() > 0.01
    assert_close((slope * x).sum(dim=1), torch.zeros(len(x), dtype=torch.float64), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- class directions


@pytest.mark.parametrize("quality", [-1, 0, 1])
@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-3, 1.0, *(math.pi - d for d in (0.5, 1e-4, 0.0))])
@pytest.mark.parametrize("name", ["subcenter_arcface", "adaface"])
def test_angular_gradients_are_bounded_at_every_angle_in_float32(name, angle, quality):
    """|dL/dx| |x| <= 2 scale, as for ArcFace: no acos, no sqrt(1 - cos^2)."""
    if name == "adaface":
        loss_fn = with_statistics(AdaFaceLoss(9, 512), 25 - 1000 * quality, 1.0).eval()
    else:
        loss_fn = SubCenterArcFaceLoss(9, 512, sub_centers=1)
    own = F.normalize(loss_fn.weight.detach()[3].double().flatten(), dim=0)
    aside = torch.randn(512, dtype=torch.float64)
    aside = F.normalize(aside - (aside @ own) * own, dim=0)
    x = (25 * (math.cos(angle) * own + math.sin(angle) * aside)).float()[None]
    slope = gradient(loss_fn, x, [3])
    assert slope.isfinite().all() and slope.norm() * x.norm() <= 2 * 64 * (1 + 1e-5)
    weight_slope = torch.autograd.grad(loss_fn(x, torch.tensor([3])), loss_fn.weight)[0]
    assert (weight_slope.norm(dim=-1) * loss_fn.weight.norm(dim=-1) <= 2 * 64 * (1 + 1e-5)).all()
