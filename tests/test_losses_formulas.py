"""Every loss beside a second implementation: slow float64 loops, typed from the formulas of the papers.

The loops know nothing of masks, matrices or stable rewritings: they take one image, one pair, one class at a time. What
a paper treats as a constant is detached in them, so that the gradients say whether the loss detaches just that.
Value and gradient must agree to 1e-6 in float64, and in float32 to 1e-4 (value) and 2e-3 of the largest gradient
component at the size of a real embedding: 2048 non-negative numbers, lengths from 20 to 40.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import (
    AdaFaceLoss,
    AdaSPLoss,
    ArcFaceLoss,
    CenterLoss,
    CircleLoss,
    CosFaceLoss,
    FocalLoss,
    HistogramLoss,
    MultiSimilarityLoss,
    NPairLoss,
    ProxyAnchorLoss,
    SmoothAPLoss,
    SoftmaxLoss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
    SupConLoss,
    TripletLoss,
    WeightedTripletLoss,
)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def cosine(a, b):
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def cross_entropy(z, y):
    """z: list of logits of one image."""
    return -(z[y] - torch.stack(z).logsumexp(0))


def softmax_by_loop(x, y, loss_fn):
    def one(x_i, y_i):
        z = [w @ x_i + b for w, b in zip(loss_fn.weight, loss_fn.bias, strict=True)]
        q = [loss_fn.label_smoothing / len(z) + (1 - loss_fn.label_smoothing) * (k == y_i) for k in range(len(z))]
        return sum(q_k * cross_entropy(z, k) for k, q_k in enumerate(q))

    return mean(one(x_i, y_i) for x_i, y_i in zip(x, y, strict=True))


def triplet_by_loop(x, y, loss_fn):
    losses = []
    for a in range(len(x)):
        positives = [(x[a] - x[p]).pow(2).sum().sqrt() for p in range(len(x)) if p != a and y[p] == y[a]]
        negatives = [(x[a] - x[n]).pow(2).sum().sqrt() for n in range(len(x)) if y[n] != y[a]]
        if positives and negatives:
            gap = max(positives) - min(negatives)
            losses.append((1 + gap.exp()).log() if loss_fn.margin is None else (loss_fn.margin + gap).clamp(min=0))
    return mean(losses)


def center_by_loop(x, y, loss_fn):
    return sum((x_i - loss_fn.centers[y_i]).pow(2).sum() for x_i, y_i in zip(x, y, strict=True)) / (2 * len(x))


def npair_by_loop(x, y, loss_fn):
    members = {label: [i for i in range(len(y)) if y[i] == label] for label in y}
    pairs = [(x[images[0]], x[images[1]]) for images in members.values() if len(images) >= 2]
    losses = []
    for i, (a, p) in enumerate(pairs):
        others = [(a @ other - a @ p).exp() for j, (_, other) in enumerate(pairs) if j != i]
        losses.append((1 + sum(others)).log() if others else 0 * a.sum())
    lengths = mean(a @ a for a, _ in pairs) + mean(p @ p for _, p in pairs)
    return mean(losses) + loss_fn.l2 / 4 * lengths


def histogram_by_loop(x, y, loss_fn):
    width = 2 / loss_fn.num_bins
    nodes = [-1 + r * width for r in range(loss_fn.num_bins + 1)]
    pairs = [(i, j) for j in range(len(x)) for i in range(j)]
    positives = torch.stack([cosine(x[i], x[j]) for i, j in pairs if y[i] == y[j]])
    negatives = torch.stack([cosine(x[i], x[j]) for i, j in pairs if y[i] != y[j]])

    def histogram(similarities):
        return [(1 - (similarities - t).abs() / width).clamp(min=0).mean() for t in nodes]

    h_positive, h_negative = histogram(positives), histogram(negatives)
    return sum(h_negative[r] * sum(h_positive[: r + 1]) for r in range(len(nodes)))


def focal_by_loop(x, y, loss_fn):
    def one(x_i, y_i):
        z = [w @ x_i + b for w, b in zip(loss_fn.weight, loss_fn.bias, strict=True)]
        log_p = -cross_entropy(z, y_i)
        return -((1 - log_p.exp()) ** loss_fn.gamma) * log_p

    return mean(one(x_i, y_i) for x_i, y_i in zip(x, y, strict=True))


def multi_similarity_by_loop(x, y, loss_fn, mining=True):
    alpha, beta, base, epsilon = loss_fn.alpha, loss_fn.beta, loss_fn.base, loss_fn.epsilon
    losses = []
    for i in range(len(x)):
        positives = [cosine(x[i], x[p]) for p in range(len(x)) if p != i and y[p] == y[i]]
        negatives = [cosine(x[i], x[n]) for n in range(len(x)) if y[n] != y[i]]
        if not positives or not negatives:
            losses.append(0 * x[i].sum())
            continue
        if mining:
            hardest_positive, hardest_negative = min(positives), max(negatives)
            positives = [s for s in positives if s - epsilon < hardest_negative]
            negatives = [s for s in negatives if s + epsilon > hardest_positive]
        pull = sum(((-alpha * (s - base)).exp() for s in positives), start=torch.tensor(0.0))
        push = sum(((beta * (s - base)).exp() for s in negatives), start=torch.tensor(0.0))
        losses.append((1 + pull).log() / alpha + (1 + push).log() / beta)
    return mean(losses)


def sphereface_by_loop(x, y, loss_fn):
    m = loss_fn.margin
    lam = max(
        loss_fn.lambda_min,
        loss_fn.lambda_base * (1 + loss_fn.lambda_gamma * loss_fn.step.item()) ** -loss_fn.lambda_power,
    )

    def one(x_i, y_i):
        length = (x_i @ x_i).sqrt()
        angles = [cosine(x_i, w).acos() for w in loss_fn.weight]
        k = next(k for k in range(m) if angles[y_i].item() <= (k + 1) * math.pi / m)
        psi = (-1) ** k * (m * angles[y_i]).cos() - 2 * k
        z = [length * angle.cos() for angle in angles]
        z[y_i] = length * (lam * angles[y_i].cos() + psi) / (1 + lam)
        return cross_entropy(z, y_i)

    return mean(one(x_i, y_i) for x_i, y_i in zip(x, y, strict=True))


def cosface_by_loop(x, y, loss_fn):
    def one(x_i, y_i):
        z = [loss_fn.scale * (cosine(x_i, w) - loss_fn.margin * (j == y_i)) for j, w in enumerate(loss_fn.weight)]
        return cross_entropy(z, y_i)

    return mean(one(x_i, y_i) for x_i, y_i in zip(x, y, strict=True))


def arcface_by_loop(x, y, loss_fn):
    m = loss_fn.margin

    def one(x_i, y_i):
        angles = [cosine(x_i, w).acos() for w in loss_fn.weight]
        z = [loss_fn.scale * angle.cos() for angle in angles]
        own = angles[y_i]
        z[y_i] = loss_fn.scale * ((own + m).cos() if own.item() + m <= math.pi else own.cos() - m * math.sin(m))
        return cross_entropy(z, y_i)

    return mean(one(x_i, y_i) for x_i, y_i in zip(x, y, strict=True))


def others_of(i, y):
    """Indices of the positives and of the negatives of image i."""
    positives = [p for p in range(len(y)) if p != i and y[p] == y[i]]
    return positives, [n for n in range(len(y)) if y[n] != y[i]]


def circle_by_loop(x, y, loss_fn):
    m, losses = loss_fn.margin, []
    for i in range(len(x)):
        positives, negatives = ([cosine(x[i], x[j]) for j in group] for group in others_of(i, y))
        if positives and negatives:
            push = [(s.detach() + m).clamp(min=0) * loss_fn.scale * (s - m) for s in negatives]
            pull = [-(1 + m - s.detach()).clamp(min=0) * loss_fn.scale * (s - (1 - m)) for s in positives]
            # log(1 + sum exp(a) sum exp(b)) = log sum over all couples, and one 0, of exp(a + b)
            couples = [a + b for a in push for b in pull]
            losses.append(torch.stack([0 * couples[0], *couples]).logsumexp(0))
    return mean(losses)


def supcon_by_loop(x, y, loss_fn):
    losses = []
    for i in range(len(x)):
        s = {a: cosine(x[i], x[a]) / loss_fn.temperature for a in range(len(x)) if a != i}
        positives, _ = others_of(i, y)
        if positives:
            losses.append(mean(-(s[p].exp() / sum(value.exp() for value in s.values())).log() for p in positives))
    return mean(losses)


def weighted_triplet_by_loop(x, y, loss_fn):
    losses = []
    for i in range(len(x)):
        positives, negatives = ([(x[i] - x[j]).pow(2).sum().sqrt() for j in group] for group in others_of(i, y))
        if positives and negatives:
            far = sum(d.exp() * d for d in positives) / sum(d.exp() for d in positives)
            near = sum((-d).exp() * d for d in negatives) / sum((-d).exp() for d in negatives)
            losses.append((1 + (far - near).exp()).log())
    return mean(losses)


def proxy_anchor_by_loop(x, y, loss_fn):
    pull, push = [], []
    for c, proxy in enumerate(loss_fn.weight):
        own = [cosine(x_i, proxy) for x_i, y_i in zip(x, y, strict=True) if y_i == c]
        others = [cosine(x_i, proxy) for x_i, y_i in zip(x, y, strict=True) if y_i != c]
        if own:
            pull.append((1 + sum((-loss_fn.scale * (s - loss_fn.margin)).exp() for s in own)).log())
        push.append((1 + sum((loss_fn.scale * (s + loss_fn.margin)).exp() for s in others)).log())
    return mean(pull) + mean(push)


def smooth_ap_by_loop(x, y, loss_fn):
    losses = []
    for i in range(len(x)):
        positives, negatives = others_of(i, y)
        s = [cosine(x[i], other) for other in x]

        def rank(j, group, s=s):
            return sum(torch.sigmoid((s[k] - s[j]) / loss_fn.temperature) for k in group if k != j)

        if positives:
            among_positives = {j: 1 + rank(j, positives) for j in positives}
            losses.append(1 - mean(r / (r + rank(j, negatives)) for j, r in among_positives.items()))
    return mean(losses)


def subcenter_arcface_by_loop(x, y, loss_fn):
    m = loss_fn.margin

    def one(x_i, y_i):
        angles = [min(cosine(x_i, w).acos() for w in centers) for centers in loss_fn.weight]
        z = [loss_fn.scale * angle.cos() for angle in angles]
        own = angles[y_i]
        z[y_i] = loss_fn.scale * ((own + m).cos() if own.item() + m <= math.pi else own.cos() - m * math.sin(m))
        return cross_entropy(z, y_i)

    return mean(one(x_i, y_i) for x_i, y_i in zip(x, y, strict=True))


def adasp_by_loop(x, y, loss_fn):
    t, losses = loss_fn.temperature, []

    def one_image():
        return torch.tensor(1.0, dtype=x.dtype)  # the cosine similarity of an image with itself

    for label in dict.fromkeys(y):
        own = [i for i in range(len(y)) if y[i] == label]
        s = {(a, b): cosine(x[a], x[b]) if a != b else one_image() for a in own for b in own}
        others = [cosine(x[a], x[b]) / t for a in own for b in range(len(y)) if y[b] != label]
        h = -t * torch.stack([-value / t for value in s.values()]).logsumexp(0)
        hard = [torch.stack([-s[a, b] / t for b in own]).logsumexp(0) for a in own]
        e = t * torch.stack([-value for value in hard]).logsumexp(0)
        w = (2 * h * e / (h + e)).detach() if h > 0 else 0
        gap = torch.stack(others).logsumexp(0) - (w * h + (1 - w) * e) / t
        losses.append(torch.stack([0 * gap, gap]).logsumexp(0))
    return mean(losses)


def adaface_by_loop(x, y, loss_fn):
    m = loss_fn.margin

    def one(x_i, y_i):
        length = min(max(x_i.detach().pow(2).sum().sqrt().item(), 0.001), 100)
        q = (length - loss_fn.mean.item()) / (loss_fn.std.item() + 1e-3) * loss_fn.concentration
        q = min(max(q, -1), 1)
        angles = [cosine(x_i, w).acos() for w in loss_fn.weight]
        z = [loss_fn.scale * angle.cos() for angle in angles]
        z[y_i] = loss_fn.scale * ((angles[y_i] - m * q).clamp(0, math.pi).cos() - (m + m * q))
        return cross_entropy(z, y_i)

    return mean(one(x_i, y_i) for x_i, y_i in zip(x, y, strict=True))


def filled(loss_fn, centers=False, step=0, mean=None, std=None):
    """The loss in eval mode with the state of a run that is under way."""
    if mean is not None:
        loss_fn.mean.fill_(mean)
        loss_fn.std.fill_(std)
    if centers:
        loss_fn.centers.normal_()
    if step:
        loss_fn.step.fill_(step)
    return loss_fn.eval()


# name -> (the loss for C classes and D dimensions, its loop)
CASES = {
    "softmax": (lambda c, d: SoftmaxLoss(c, d), softmax_by_loop),
    "softmax, smoothed": (lambda c, d: SoftmaxLoss(c, d, label_smoothing=0.1), softmax_by_loop),
    "triplet": (lambda c, d: TripletLoss(), triplet_by_loop),
    "triplet, wide margin": (lambda c, d: TripletLoss(margin=3.0), triplet_by_loop),
    "triplet, soft margin": (lambda c, d: TripletLoss(margin=None), triplet_by_loop),
    "center": (lambda c, d: filled(CenterLoss(c, d), centers=True), center_by_loop),
    "npair": (lambda c, d: NPairLoss(), npair_by_loop),
    "npair, l2 = 0.1": (lambda c, d: NPairLoss(l2=0.1), npair_by_loop),
    "histogram": (lambda c, d: HistogramLoss(), histogram_by_loop),
    "histogram, odd": (lambda c, d: HistogramLoss(num_bins=7), histogram_by_loop),
    "histogram, two bins": (lambda c, d: HistogramLoss(num_bins=2), histogram_by_loop),
    "focal": (lambda c, d: FocalLoss(c, d), focal_by_loop),
    "focal, gamma = 0.5": (lambda c, d: FocalLoss(c, d, gamma=0.5), focal_by_loop),
    "focal, gamma = 0": (lambda c, d: FocalLoss(c, d, gamma=0.0), focal_by_loop),
    "multi_similarity": (lambda c, d: MultiSimilarityLoss(), multi_similarity_by_loop),
    "multi_similarity, other": (lambda c, d: MultiSimilarityLoss(3.0, 10.0, 0.8, 0.3), multi_similarity_by_loop),
    "sphereface, margin 1": (lambda c, d: filled(SphereFaceLoss(c, d, margin=1)), sphereface_by_loop),
    "sphereface": (lambda c, d: filled(SphereFaceLoss(c, d), step=3), sphereface_by_loop),
    "sphereface, late": (lambda c, d: filled(SphereFaceLoss(c, d), step=10**6), sphereface_by_loop),
    "sphereface, no lambda": (lambda c, d: SphereFaceLoss(c, d, lambda_base=0, lambda_min=0), sphereface_by_loop),
    "sphereface, margin 3": (lambda c, d: SphereFaceLoss(c, d, 3, 10.0, 1.0, 2.0, 0.5).eval(), sphereface_by_loop),
    "cosface": (lambda c, d: CosFaceLoss(c, d), cosface_by_loop),
    "cosface, other": (lambda c, d: CosFaceLoss(c, d, scale=5.0, margin=0.1), cosface_by_loop),
    "arcface": (lambda c, d: ArcFaceLoss(c, d), arcface_by_loop),
    "arcface, other": (lambda c, d: ArcFaceLoss(c, d, scale=5.0, margin=0.2), arcface_by_loop),
    "arcface, wide margin": (lambda c, d: ArcFaceLoss(c, d, scale=5.0, margin=2.0), arcface_by_loop),
    "circle": (lambda c, d: CircleLoss(), circle_by_loop),
    "circle, other": (lambda c, d: CircleLoss(scale=10.0, margin=0.4), circle_by_loop),
    "supcon": (lambda c, d: SupConLoss(), supcon_by_loop),
    "supcon, other": (lambda c, d: SupConLoss(temperature=0.5), supcon_by_loop),
    "weighted_triplet": (lambda c, d: WeightedTripletLoss(), weighted_triplet_by_loop),
    "proxy_anchor": (lambda c, d: ProxyAnchorLoss(c, d), proxy_anchor_by_loop),
    "proxy_anchor, other": (lambda c, d: ProxyAnchorLoss(c, d, scale=8.0, margin=0.3), proxy_anchor_by_loop),
    "smooth_ap": (lambda c, d: SmoothAPLoss(), smooth_ap_by_loop),
    "smooth_ap, smoother": (lambda c, d: SmoothAPLoss(temperature=0.3), smooth_ap_by_loop),
    "subcenter_arcface": (lambda c, d: SubCenterArcFaceLoss(c, d), subcenter_arcface_by_loop),
    "subcenter_arcface, other": (lambda c, d: SubCenterArcFaceLoss(c, d, 2, 5.0, 2.0), subcenter_arcface_by_loop),
    "adasp": (lambda c, d: AdaSPLoss(), adasp_by_loop),
    "adasp, other": (lambda c, d: AdaSPLoss(temperature=0.3), adasp_by_loop),
    "adaface": (lambda c, d: filled(AdaFaceLoss(c, d)), adaface_by_loop),
    # lengths of 1 to 3 and of 20 to 40: qualities on both sides of 0, some of them clipped
    "adaface, short": (lambda c, d: filled(AdaFaceLoss(c, d, 8.0), mean=1.9, std=0.5), adaface_by_loop),
    "adaface, long": (lambda c, d: filled(AdaFaceLoss(c, d, 8.0), mean=30.0, std=2.0), adaface_by_loop),
    "adaface, wide": (lambda c, d: filled(AdaFaceLoss(c, d, 5.0, 1.5), mean=1.9, std=0.5), adaface_by_loop),
}

LABELS = {
    "p x k": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "shuffled, with single images": [3, 0, 2, 0, 1, 3, 5, 0, 2, 3],
    "two images": [1, 1, 4],
}


def value_and_gradients(function, x, loss_fn):
    x = x.clone().requires_grad_()
    parameters = list(loss_fn.parameters())
    value = function(x)
    return value.detach(), torch.autograd.grad(value, [x, *parameters])


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("case", CASES)
def test_float64_is_the_formula(case, labels):
    torch.manual_seed(0)
    build, by_loop = CASES[case]
    loss_fn = build(6, 4).double()
    for _ in range(3):
        x = torch.randn(len(labels), 4, dtype=torch.float64)
        value, gradients = value_and_gradients(lambda x: loss_fn(x, torch.tensor(labels)), x, loss_fn)
        expected, expected_gradients = value_and_gradients(lambda x: by_loop(x, labels, loss_fn), x, loss_fn)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-12)
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_float32_is_accurate_at_the_size_of_real_embeddings(case):
    torch.manual_seed(1)
    build, by_loop = CASES[case]
    loss_fn = build(12, 2048)
    labels = [0, 0, 0, 0, 7, 7, 7, 7, 11, 11, 11, 11, 3, 3, 3, 3]
    # loose clusters, as a network under training makes them, so that no loss is 0 or saturated
    x = torch.rand(12, 2048)[labels] + torch.linspace(0.5, 4, 16)[torch.randperm(16), None] * torch.rand(16, 2048)
    x = F.normalize(x) * torch.linspace(20, 40, 16)[torch.randperm(16), None]
    value, gradients = value_and_gradients(lambda x: loss_fn(x, torch.tensor(labels)), x, loss_fn)
    assert value.dtype == torch.float32

    double = loss_fn.double()
    expected, expected_gradients = value_and_gradients(lambda x: by_loop(x, labels, double), x.double(), double)
    assert expected > 0.1
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert wanted.abs().max() > 0
        assert (gradient - wanted).abs().max() <= 2e-3 * wanted.abs().max()


@pytest.mark.parametrize("case", ["triplet", "triplet, soft margin", "weighted_triplet"])
def test_triplet_is_accurate_when_distances_are_small_beside_the_embeddings(case):
    """Lengths around 3000, distances around 1: |x|^2 + |y|^2 - 2xy would be wrong in float32 by its whole value.
    A far outlier keeps the batch from being centred: the digits must come from the differences."""
    torch.manual_seed(2)
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    x = 65 + 0.02 * torch.randn(10, 2048)
    x[-1] = -65
    loss_fn, by_loop = CASES[case][0](10, 2048), CASES[case][1]
    value, gradients = value_and_gradients(lambda x: loss_fn(x, torch.tensor(labels)), x, loss_fn)
    expected, wanted = value_and_gradients(lambda x: by_loop(x, labels, loss_fn), x.double(), loss_fn)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    assert (gradients[0] - wanted[0]).abs().max() <= 2e-3 * wanted[0].abs().max()


def test_arcface_is_accurate_near_the_class_direction():
    """Angles from 1e-1 down to 1e-6 to the own class, and as near to its opposite: sqrt(1 - cos^2) has no digit left
    of the sine there in float32. The opposite side is compared at a small scale, where the loss is not saturated."""
    torch.manual_seed(3)
    loss_fn = ArcFaceLoss(5, 2048, scale=8.0)
    double = ArcFaceLoss(5, 2048, scale=8.0).double()
    double.load_state_dict(loss_fn.state_dict())
    own = F.normalize(double.weight.detach()[0], dim=0)
    aside = torch.randn(2048, dtype=torch.float64)
    aside = F.normalize(aside - (aside @ own) * own, dim=0)
    for sign in (1, -1):
        for angle in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            x = (30 * (sign * math.cos(angle) * own + math.sin(angle) * aside)).float()[None]
            value = loss_fn(x, torch.tensor([0])).double()
            cosine_y = F.normalize(x.double()) @ F.normalize(double.weight.detach()).T
            left = F.normalize(x.double())[0] - cosine_y[0, 0] * own
            true_angle = math.atan2(left.norm().item(), cosine_y[0, 0].item())
            z = 8 * cosine_y
            m = loss_fn.margin
            fits = true_angle + m <= math.pi
            z[0, 0] = 8 * (math.cos(true_angle + m) if fits else math.cos(true_angle) - m * math.sin(m))
            torch.testing.assert_close(value, F.cross_entropy(z, torch.tensor([0])), rtol=1e-5, atol=1e-6)
