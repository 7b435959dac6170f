"""What every loss keeps: the contract of its call, its state and its numerics, and how losses are named and built."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import losses
from losses import LOSSES, TWELVE, SumLoss, build_loss, parse_expression, row_name, with_default_weights

C, D = 7, 16
# every row of the table, every loss on its own, and the variants with code of their own
EXPRESSIONS = {expression: () for expression in dict.fromkeys((*TWELVE, *LOSSES))}
EXPRESSIONS |= {
    "triplet, soft margin": ("triplet", "margin=None"),
    "softmax, smoothed": ("softmax", "label_smoothing=0.1"),
    "focal, gamma 0": ("focal", "gamma=0"),
    "focal, gamma 0.5": ("focal", "gamma=0.5"),
    "arcface, wide": ("arcface", "margin=2"),
    "sphereface, no lambda": ("sphereface", "lambda_base=0", "lambda_min=0"),
    "weighted": ("0.5*softmax+0.01*center+0*triplet",),
}
every_loss = pytest.mark.parametrize("case", EXPRESSIONS)
CLASSIFIERS = ("softmax", "focal", "sphereface_m1", "sphereface", "cosface", "arcface", "center", "softmax+triplet")
PAIR_LOSSES = ("triplet", "npair", "histogram", "multi_similarity")


def make(case, num_classes=C, embedding_dim=D):
    expression, *loss_args = EXPRESSIONS[case] or (case,)
    return build_loss(expression, num_classes, embedding_dim, loss_args)


def batch(dtype=torch.float32):
    """Three identities of three images, shuffled, and a single image: (10, D) and (10,)."""
    labels = torch.tensor([0, 2, 5, 0, 2, 5, 3, 5, 2, 0])
    return torch.randn(C, D, dtype=dtype)[labels] + 2 * torch.randn(10, D, dtype=dtype), labels


def backward(loss_fn, embeddings, labels):
    """loss, gradient of the embeddings, gradients of the parameters."""
    embeddings = embeddings.detach().clone().requires_grad_()
    loss = loss_fn(embeddings, labels)
    gradients = torch.autograd.grad(loss, [embeddings, *loss_fn.parameters()])
    return loss.detach(), gradients[0], gradients[1:]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------------ the call


@every_loss
def test_a_loss_is_a_finite_scalar_and_leaves_its_inputs_alone(case):
    embeddings, labels = batch()
    before = embeddings.clone(), labels.clone()
    loss = make(case)(embeddings, labels)
    assert isinstance(loss, torch.Tensor) and loss.shape == () and loss.dtype == torch.float32
    assert loss.isfinite() and loss > 0
    assert torch.equal(embeddings, before[0]) and torch.equal(labels, before[1])


@every_loss
def test_gradients_are_the_derivative(case):
    """By finite differences in float64, for embeddings and parameters, in eval mode: state moves in training."""
    loss_fn = make(case).double().eval()
    for name, buffer in loss_fn.named_buffers():
        if "centers" in name:
            buffer.normal_()
    embeddings, labels = batch(torch.float64)
    names = [name for name, _ in loss_fn.named_parameters()]

    def function(embeddings, *parameters):
        return torch.func.functional_call(loss_fn, dict(zip(names, parameters, strict=True)), (embeddings, labels))

    inputs = [embeddings, *(parameter.detach() for parameter in loss_fn.parameters())]
    assert torch.autograd.gradcheck(function, [tensor.clone().requires_grad_() for tensor in inputs], fast_mode=True)


@every_loss
def test_every_parameter_gets_a_gradient_and_moves(case):
    loss_fn = make(case)
    before = copy.deepcopy(dict(loss_fn.named_parameters()))
    optimizer = torch.optim.Adam([*loss_fn.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        embeddings, labels = batch()
        loss_fn(embeddings.requires_grad_(), labels).backward()
        optimizer.step()
    for name, parameter in loss_fn.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
        assert not torch.equal(parameter, before[name]), name


@every_loss
def test_only_centers_and_steps_are_buffers_and_only_training_moves_them(case):
    loss_fn = make(case)
    buffers = {name: buffer.clone() for name, buffer in loss_fn.named_buffers()}
    assert {name.split(".")[-1] for name in buffers} <= {"centers", "step"}
    assert ("centers" in "".join(buffers)) == ("center" in case or case == "weighted")
    assert ("step" in buffers) == ("sphereface" in case)

    loss_fn.eval()(*batch())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loss_fn.named_buffers())
    loss_fn.train()(*batch())
    for name, buffer in loss_fn.named_buffers():
        assert not torch.equal(buffer, buffers[name]), name
        assert not buffer.requires_grad


@every_loss
def test_state_survives_a_checkpoint(case, tmp_path):
    """Train two steps, save, load into a fresh loss, train on: the same values as without the break."""
    loss_fn, batches = make(case), [batch() for _ in range(4)]
    for embeddings, labels in batches[:2]:
        loss_fn(embeddings, labels)
    torch.save(loss_fn.state_dict(), tmp_path / "loss.pt")
    resumed = make(case)
    resumed.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    for embeddings, labels in batches[2:]:
        assert torch.equal(resumed(embeddings, labels), loss_fn(embeddings, labels))
    assert all(torch.equal(a, b) for a, b in zip(resumed.buffers(), loss_fn.buffers(), strict=True))


@every_loss
def test_nothing_waits_for_the_device(case):
    """On fake tensors, which have shapes but no values, .item(), a Python `if` on a tensor, nonzero and indexing by a
    mask all raise: whatever would make a GPU wait for its results."""
    with FakeTensorMode():
        loss_fn = make(case)
        embeddings, labels = torch.randn(8, D, requires_grad=True), torch.randint(0, C, (8,))
        loss = loss_fn(embeddings, labels)
        loss.backward()
    assert loss.shape == () and embeddings.grad.shape == (8, D)


def test_fake_tensors_do_notice_a_wait():
    for waits in (torch.Tensor.item, torch.nonzero, lambda x: x[x > 0], bool):
        with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            waits(torch.randn(1))


# ------------------------------------------------------------------------------------------------------------- numbers


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_also_under_autocast(case, dtype):
    loss_fn = make(case).eval()
    embeddings, labels = batch()
    embeddings = embeddings.to(dtype)
    expected, gradient, _ = backward(loss_fn, embeddings.float(), labels)
    embeddings.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn(embeddings, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and embeddings.grad.dtype == dtype
    assert torch.equal(loss, expected)
    assert torch.equal(embeddings.grad, gradient.to(dtype))


class RecordAutocast(TorchFunctionMode):
    """Whether autocast was on, for every function that returned a tensor."""

    def __init__(self):
        super().__init__()
        self.states = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.states.append(torch.is_autocast_enabled("cpu"))
        return result


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_is_off_inside_a_loss(name):
    """Also where today's autocast would leave every function of it alone."""
    loss_fn, (embeddings, labels) = make(name), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16), RecordAutocast() as record:
        loss_fn(embeddings, labels)
        assert len(record.states) > 5 and not any(record.states)
        embeddings + 1
        assert record.states[-1]


@every_loss
def test_float64_stays_float64(case):
    loss, gradient, _ = backward(make(case).double(), *batch(torch.float64))
    assert loss.dtype == gradient.dtype == torch.float64


@every_loss
def test_int32_labels_work(case):
    loss_fn = make(case).eval()
    embeddings, labels = batch()
    assert torch.equal(loss_fn(embeddings, labels.int()), loss_fn(embeddings, labels))
    loss_fn.train()(embeddings, labels.int())


DEGENERATE = {
    "identical embeddings": lambda x, y: (torch.ones_like(x), y),
    "zero embeddings": lambda x, y: (torch.zeros_like(x), y),
    "one zero embedding": lambda x, y: (x * (torch.arange(10) != 4)[:, None], y),
    "duplicates within identities": lambda x, y: (x[[0, 1, 2, 0, 1, 2, 6, 2, 1, 0]], y),
    "duplicates across identities": lambda x, y: (x[[0, 0, 0, 3, 3, 3, 6, 7, 7, 7]], y),
    "opposite embeddings": lambda x, y: (x[:1] * torch.tensor([1, -1] * 5)[:, None], y),
    "one identity": lambda x, y: (x, torch.full_like(y, 3)),
    "no positive": lambda x, y: (x[:C], torch.arange(C)),
    "one image": lambda x, y: (x[:1], y[:1]),
    "one zero image": lambda x, y: (torch.zeros(1, D), y[:1]),
    "two images of one identity": lambda x, y: (x[[0, 3]], y[[0, 3]]),
    "a short batch": lambda x, y: (x[:3], y[:3]),
}


@every_loss
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-4])
def test_degenerate_batches_are_finite(case, kind, scale):
    loss_fn = make(case)
    embeddings, labels = batch()
    embeddings, labels = DEGENERATE[kind](30 * torch.nn.functional.normalize(embeddings), labels)
    for _ in range(2):  # the second time with moved centers
        loss, gradient, parameter_gradients = backward(loss_fn, embeddings * scale, labels)
        assert loss.isfinite() and gradient.isfinite().all()
        assert all(g.isfinite().all() for g in parameter_gradients)
    assert all(buffer.isfinite().all() for buffer in loss_fn.buffers())


@pytest.mark.parametrize("case", [*CLASSIFIERS[:6]])
def test_embeddings_on_the_class_vectors_are_finite(case):
    """cos theta = 1 and -1 exactly, up to rounding, where angles have no derivative; also class vectors of zero."""
    loss_fn = make(case)
    for embeddings in (loss_fn.weight.detach().clone(), -loss_fn.weight.detach()):
        loss, gradient, parameter_gradients = backward(loss_fn, embeddings, torch.arange(C))
        assert loss.isfinite() and gradient.isfinite().all() and parameter_gradients[0].isfinite().all()
    loss_fn.weight.data[:3] = 0
    loss, gradient, parameter_gradients = backward(loss_fn, *batch())
    assert loss.isfinite() and gradient.isfinite().all() and parameter_gradients[0].isfinite().all()


@pytest.mark.parametrize("case", ["triplet", "triplet, soft margin", "npair", "histogram", "multi_similarity"])
@pytest.mark.parametrize("kind", ["one identity", "no positive", "one image"])
def test_a_batch_without_a_term_is_a_zero_joined_to_the_graph(case, kind):
    embeddings, labels = DEGENERATE[kind](*batch())
    if (case, kind) == ("npair", "one identity"):
        labels = torch.arange(len(labels))  # one identity is a pair without negatives: the penalty of its length stays
    loss, gradient, _ = backward(make(case), embeddings, labels)  # would raise without a graph
    assert loss == 0 and not gradient.any()


@every_loss
def test_the_order_of_the_images_does_not_matter(case):
    """First identities change places and the images of each keep their order, on which N-pair depends; then all do."""
    loss_fn = make(case).double().eval()
    embeddings, labels = batch(torch.float64)
    order = torch.tensor([2, 0, 6, 5, 1, 7, 3, 4, 8, 9])
    loss, gradient, parameter_gradients = backward(loss_fn, embeddings, labels)
    moved_loss, moved_gradient, moved_parameter_gradients = backward(loss_fn, embeddings[order], labels[order])
    assert_close(moved_loss, loss)
    assert_close(moved_gradient, gradient[order])
    for moved, expected in zip(moved_parameter_gradients, parameter_gradients, strict=True):
        assert_close(moved, expected)
    if "npair" not in case:
        order = torch.arange(10).flip(0)
        assert_close(loss_fn(embeddings[order], labels[order]), loss)


@pytest.mark.parametrize("case", PAIR_LOSSES)
def test_pair_losses_compare_labels_and_nothing_else(case):
    """Any integers will do: renumbering changes nothing."""
    loss_fn, (embeddings, labels) = make(case).double(), batch(torch.float64)
    names = torch.tensor([-5, 3, 10**12, 0, 1, -100, 2])
    assert_close(loss_fn(embeddings, names[labels]), loss_fn(embeddings, labels))


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classes_have_no_order(case):
    """Renumbering the identities together with the rows of weight, bias and centers changes nothing."""
    loss_fn, (embeddings, labels) = make(case).double().eval(), batch(torch.float64)
    for buffer in loss_fn.buffers():
        if buffer.ndim:
            buffer.normal_()
    expected = loss_fn(embeddings, labels)
    order = torch.randperm(C)
    for tensor in loss_fn.state_dict().values():
        if tensor.ndim:
            tensor[order] = tensor.clone()
    assert_close(loss_fn(embeddings, order[labels]), expected)


@pytest.mark.parametrize("case", CLASSIFIERS)
@pytest.mark.parametrize("label", [C, C + 100, -1, -100])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_label_that_is_no_class_is_an_error(case, label, dtype):
    """Also -1, which indexing would wrap to the last class, and -100, which F.cross_entropy would ignore."""
    embeddings, labels = batch()
    labels[4] = label
    with pytest.raises((IndexError, RuntimeError), match="(?i)out of (range|bounds)"):
        make(case)(embeddings, labels.to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_loss
def test_the_gpu_agrees_with_the_cpu(case):
    loss_fn, (embeddings, labels) = make(case), batch()
    on_gpu = copy.deepcopy(loss_fn).cuda()
    loss, gradient, parameter_gradients = backward(loss_fn, embeddings, labels)
    gpu_loss, gpu_gradient, gpu_parameter_gradients = backward(on_gpu, embeddings.cuda(), labels.cuda())
    assert_close(gpu_loss.cpu(), loss, rtol=1e-4, atol=1e-6)
    for ours, expected in zip((gpu_gradient, *gpu_parameter_gradients), (gradient, *parameter_gradients), strict=True):
        assert (ours.cpu() - expected).abs().max() <= 2e-3 * expected.abs().max()
    for ours, expected in zip(on_gpu.buffers(), loss_fn.buffers(), strict=True):
        assert_close(ours.cpu(), expected)


# --------------------------------------------------------------------------------------------------------------- names


def test_losses_by_name():
    assert all(name in LOSSES for expression in TWELVE for name in expression.split("+"))
    assert len(TWELVE) == len(set(TWELVE)) == 12


def test_expressions():
    assert parse_expression("arcface") == [("arcface", None)]
    assert parse_expression("softmax+triplet") == [("softmax", None), ("triplet", None)]
    assert parse_expression("softmax + 0.0005 * center") == [("softmax", None), ("center", 0.0005)]
    assert parse_expression("1e+05*softmax+1e-05*center") == [("softmax", 1e5), ("center", 1e-5)]
    assert parse_expression("1.E+2*softmax+0*triplet") == [("softmax", 100.0), ("triplet", 0.0)]
    assert parse_expression("-2*npair") == [("npair", -2.0)]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("arcfac", r"unknown loss 'arcfac' in 'arcfac' \(did you mean arcface\?\); use one of softmax, .*arcface"),
        ("softmax+", "unknown loss '' in 'softmax\\+'; use one of softmax, "),
        ("softmax+tripplet", r"unknown loss 'tripplet' .*did you mean triplet"),
        ("softmax*0.5", "unknown loss '0.5'"),
        ("", "unknown loss ''"),
        ("softmax+softmax", "stands twice"),
        ("x*softmax", "weight of softmax .* must be a finite number, got 'x'"),
        ("nan*softmax", "must be a finite number"),
        ("inf*softmax", "must be a finite number"),
        ("*softmax", "must be a finite number"),
        ("2*3*softmax", "must be a finite number"),
    ],
)
def test_wrong_expressions_are_answered_in_one_sentence(expression, message):
    with pytest.raises(ValueError, match=message) as error:
        build_loss(expression, C, D)
    assert "\n" not in str(error.value)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_default_weights_are_filled_in_exactly(first, second):
    filled = with_default_weights("softmax+center", {"center": first, "triplet": second})
    assert parse_expression(filled) == [("softmax", None), ("center", first)]
    filled = with_default_weights(f"{second!r}*center+softmax", {"center": first, "softmax": first})
    assert parse_expression(filled) == [("center", second), ("softmax", first)]
    assert with_default_weights(filled, {"center": 1.0}) == filled
    assert row_name(filled) == "center+softmax"


def test_default_weights_leave_written_ones_alone():
    assert with_default_weights("softmax+center", {"center": 5e-4}) == "softmax+0.0005*center"
    assert with_default_weights("softmax+0*center", {"center": 5e-4}) == "softmax+0.0*center"
    assert with_default_weights("softmax+center", {}) == "softmax+center"
    assert row_name("1e+05*softmax+0.5*center") == "softmax+center"


def test_a_plain_name_builds_the_loss_itself_and_anything_else_a_sum():
    assert type(build_loss("arcface", C, D)) is losses.ArcFaceLoss
    assert type(build_loss("0.5*arcface", C, D)) is SumLoss
    loss_fn = build_loss("softmax+0.0005*center", C, D)
    assert loss_fn.weights == {"softmax": 1.0, "center": 0.0005}
    assert {key: tuple(value.shape) for key, value in loss_fn.state_dict().items()} == {
        "softmax.weight": (C, D), "softmax.bias": (C,), "center.centers": (C, D)
    }  # fmt: skip


def test_state_dicts_have_the_documented_keys():
    keys = {
        "softmax": {"weight", "bias"}, "focal": {"weight", "bias"}, "center": {"centers"},
        "cosface": {"weight"}, "arcface": {"weight"},
        "sphereface": {"weight", "step"}, "sphereface_m1": {"weight", "step"},
        "triplet": set(), "npair": set(), "histogram": set(), "multi_similarity": set(),
    }  # fmt: skip
    assert keys == {name: set(build_loss(name, C, D).state_dict()) for name in keys}


# ----------------------------------------------------------------------------------------------------------- arguments


def test_defaults():
    arguments = {
        "softmax": "softmax: label_smoothing=0.0",
        "triplet": "triplet: margin=0.3 (or None)",
        "center": "center: alpha=0.5",
        "npair": "npair: l2=0.002",
        "histogram": "histogram: num_bins=150",
        "focal": "focal: gamma=2.0",
        "multi_similarity": "multi_similarity: alpha=2.0, beta=50.0, base=0.5, epsilon=0.1",
        "sphereface_m1": "sphereface_m1: no arguments",
        "sphereface": "sphereface: margin=4, lambda_base=1000.0, lambda_gamma=0.12, lambda_power=1.0, lambda_min=5.0",
        "cosface": "cosface: scale=30.0, margin=0.35",
        "arcface": "arcface: scale=64.0, margin=0.5",
    }
    assert arguments == {name: losses.describe_arguments(name) for name in arguments}
    assert build_loss("sphereface_m1", C, D).margin == 1


def test_loss_args():
    loss_fn = build_loss("arcface", C, D, ["margin=0.1", "arcface.scale=16"])
    assert (loss_fn.margin, loss_fn.scale) == (0.1, 16.0) and type(loss_fn.scale) is float
    assert build_loss("arcface", C, D, ["margin=0.1", "arcface.margin=0.2"]).margin == 0.2  # the later one
    assert build_loss("arcface", C, D, ["arcface.margin=0.2", "margin=1e-1"]).margin == 0.1
    assert build_loss("triplet", C, D, ["margin=None"]).margin is None
    assert build_loss("sphereface", C, D, ["margin=3"]).margin == 3
    sum_loss = build_loss("softmax+0.5*triplet", C, D, ["triplet.margin=None", "softmax.label_smoothing=0.1"])
    assert sum_loss.triplet.margin is None and sum_loss.softmax.label_smoothing == 0.1


@pytest.mark.parametrize(
    ("expression", "loss_arg", "message"),
    [
        ("arcface", "marginn=1", "unknown loss argument 'marginn'; allowed are arcface: scale=64.0, margin=0.5"),
        ("arcface", "triplet.margin=1", "unknown loss argument 'triplet.margin'; allowed are arcface: scale=64.0"),
        ("arcface", "num_classes=3", "unknown loss argument 'num_classes'; allowed are arcface: scale=64.0"),
        ("arcface", "embedding_dim=3", "unknown loss argument 'embedding_dim'"),
        ("arcface", "margin", "'margin' is not of the form"),
        ("arcface", "margin=wide", "margin must be a finite number, got 'wide'; allowed are arcface: scale=64.0"),
        ("arcface", "margin=None", "margin must be a finite number, got 'None'"),
        ("arcface", "margin=nan", "margin must be a finite number, got 'nan'"),
        ("arcface", "arcface.scale=inf", "arcface.scale must be a finite number, got 'inf'"),
        ("triplet", "margin=none", "margin must be a finite number or None, got 'none'; .* margin=0.3 \\(or None\\)"),
        ("sphereface", "margin=2.5", "margin must be a whole number, got '2.5'; allowed are sphereface: margin=4"),
        ("histogram", "num_bins=1e2", "num_bins must be a whole number, got '1e2'"),
        ("sphereface_m1", "margin=2", "unknown loss argument 'margin'; allowed are sphereface_m1: no arguments"),
        ("softmax+triplet", "margin=1", "does not say which loss of softmax\\+triplet .*LOSS.KEY=VALUE .*margin=0.3"),
        ("softmax+triplet", "arcface.margin=1", "unknown .*allowed are softmax: label_smoothing=0.0; triplet: margin="),
        # values that the constructor refuses
        ("histogram", "num_bins=1", "histogram: num_bins must be at least 2, got 1"),
        ("sphereface", "margin=0", "sphereface: margin must be a whole number from 1 up, got 0"),
        ("sphereface", "lambda_min=-1", "sphereface: lambda_base, .* must not be negative"),
        ("arcface", "margin=4", "arcface: .* margin in \\[0, pi\\) radians, got 64.0 and 4.0"),
        ("arcface", "scale=0", "arcface: scale must be above 0"),
        ("cosface", "margin=-0.1", "cosface: scale must be above 0 and margin not negative"),
        ("softmax", "label_smoothing=1.5", "softmax: label_smoothing must lie in \\[0, 1\\], got 1.5"),
        ("center", "alpha=-1", "center: alpha must lie in \\[0, 1\\], got -1.0"),
        ("focal", "gamma=-1", "focal: gamma must not be negative, got -1.0"),
        ("npair", "l2=-1", "npair: l2 must not be negative, got -1.0"),
        ("multi_similarity", "beta=0", "multi_similarity: alpha and beta must be above 0"),
    ],
)
def test_wrong_loss_args_are_answered_in_one_sentence(expression, loss_arg, message):
    with pytest.raises(ValueError, match=message) as error:
        build_loss(expression, C, D, [loss_arg])
    assert "\n" not in str(error.value)


def test_sphereface_refuses_a_fractional_margin_from_code_as_well():
    with pytest.raises(ValueError, match="whole number"):
        losses.SphereFaceLoss(C, D, margin=2.5)
    assert losses.SphereFaceLoss(C, D, margin=2)(*batch()).isfinite()
