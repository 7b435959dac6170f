"""What every loss keeps: the contract of its call, its state and its numerics, and how losses are named and built.

A loss that somebody adds to LOSSES is tested by itself, without a line here; where it breaks the contract, the failure
says what it lacks. A few points are asked of the project's own losses only (OWN).
"""

import copy
import inspect

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
from losses import LOSSES, ROWS, TWELVE, SumLoss, build_loss, parse_expression, row_name, with_default_weights

C, D = 7, 16
OWN = list(dict.fromkeys(name for row in ROWS for name in row.split("+")))
# every row of the table, every loss on its own, and the variants with code of their own
EXPRESSIONS = {expression: () for expression in dict.fromkeys((*ROWS, *LOSSES))}
EXPRESSIONS |= {
    "triplet, soft margin": ("triplet", "margin=None"),
    "softmax, smoothed": ("softmax", "label_smoothing=0.1"),
    "focal, gamma 0": ("focal", "gamma=0"),
    "focal, gamma 0.5": ("focal", "gamma=0.5"),
    "arcface, wide": ("arcface", "margin=2"),
    "sphereface, no lambda": ("sphereface", "lambda_base=0", "lambda_min=0"),
    "subcenter_arcface, wide": ("subcenter_arcface", "margin=2", "sub_centers=2"),
    "adaface, quick": ("adaface", "momentum=1", "concentration=1"),
    "weighted": ("0.5*softmax+0.01*center+0*triplet",),
}
OWN_CASES = [case for case, expression in EXPRESSIONS.items() if case in ROWS or case in OWN or expression]
every_loss = pytest.mark.parametrize("case", EXPRESSIONS)
DETACHED = ("circle", "adasp")  # by definition a weight has no gradient: that is in tests/test_losses_formulas.py


def owns_classes(name):
    return "num_classes" in inspect.signature(LOSSES[name]).parameters


CLASSIFIERS = [*filter(owns_classes, OWN), "softmax+triplet"]


def make(case, num_classes=C, embedding_dim=D):
    expression, *loss_args = EXPRESSIONS[case] or (case,)
    return build_loss(expression, num_classes, embedding_dim, loss_args)


def batch(dtype=torch.float32):
    """Three identities of three images, shuffled, and a single image: (10, D) and (10,)."""
    labels = torch.tensor([0, 2, 5, 0, 2, 5, 3, 5, 2, 0])
    return torch.randn(C, D, dtype=dtype)[labels] + 2 * torch.randn(10, D, dtype=dtype), labels


def backward(loss_fn, embeddings, labels, on="a batch"):
    """loss, gradient of the embeddings, gradients of the parameters."""
    embeddings = embeddings.detach().clone().requires_grad_()
    try:
        loss = loss_fn(embeddings, labels)
    except Exception as error:
        pytest.fail(f"forward breaks on {on}: {error!r}")
    if not (isinstance(loss, torch.Tensor) and loss.requires_grad):
        pytest.fail(f"on {on} forward returns {loss!r}, through which no gradient flows to the embeddings; where there "
                    "is nothing to learn from, return (embeddings * 0).sum()")  # fmt: skip
    names, parameters = zip(("embeddings", embeddings), *loss_fn.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    unused = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    assert not unused, f"on {on} {', '.join(unused)} plays no part in the loss: no gradient reaches it"
    return loss.detach(), gradients[0], gradients[1:]


def assert_finite(loss_fn, embeddings, labels, on):
    loss, *gradients, parameter_gradients = backward(loss_fn, embeddings, labels, on)
    assert loss.isfinite(), f"the loss of {on} is {loss.item()}"
    names = ["embeddings", *dict(loss_fn.named_parameters())]
    for name, g in zip(names, [*gradients, *parameter_gradients], strict=True):
        assert g.isfinite().all(), f"the gradient of {name} is not finite on {on} (sqrt or a division by 0?)"
    for name, buffer in loss_fn.named_buffers():
        assert buffer.isfinite().all(), f"{name} is not finite after {on}"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------------ the call


@every_loss
def test_a_loss_is_a_finite_scalar_and_leaves_its_inputs_alone(case):
    embeddings, labels = batch()
    before = embeddings.clone(), labels.clone()
    loss = make(case)(embeddings, labels)
    assert isinstance(loss, torch.Tensor), f"forward must return one tensor, not {type(loss).__name__}"
    assert loss.shape == (), f"forward must return a scalar (a mean over the batch, say), not shape {tuple(loss.shape)}"
    assert loss.dtype == torch.float32, f"the loss of float32 embeddings must be float32, not {loss.dtype}"
    assert loss.isfinite(), f"the loss of a random batch is {loss.item()}"
    assert loss > 0 or case not in OWN_CASES
    assert torch.equal(embeddings, before[0]), "forward changes its embeddings in place: work on a copy"
    assert torch.equal(labels, before[1]), "forward changes its labels in place: work on a copy"


@pytest.mark.parametrize("case", [case for case in EXPRESSIONS if case not in DETACHED])
def test_gradients_are_the_derivative(case):
    """By finite differences in float64, for embeddings and parameters, in eval mode: state moves in training."""
    loss_fn = make(case).double().eval()
    for name, buffer in loss_fn.named_buffers():
        if "centers" in name:
            buffer.normal_()
        if "adaface" in case:  # where the detached quality is constant, -1
            buffer.fill_({"mean": 1e6, "std": 1.0}[name])
    embeddings, labels = batch(torch.float64)
    backward(loss_fn, embeddings, labels)  # says it if there is no gradient at all
    names = [name for name, _ in loss_fn.named_parameters()]

    def function(embeddings, *parameters):
        return torch.func.functional_call(loss_fn, dict(zip(names, parameters, strict=True)), (embeddings, labels))

    inputs = [embeddings, *(parameter.detach() for parameter in loss_fn.parameters())]
    right = torch.autograd.gradcheck(
        function, [tensor.clone().requires_grad_() for tensor in inputs], fast_mode=True, raise_exception=False
    )
    assert right, (
        "the gradient is not the derivative of the returned value (torch.autograd.gradcheck, in float64): is something "
        "detached, rounded, or computed in float32? If by definition, add the loss to DETACHED and test its gradient"
    )


@every_loss
def test_every_parameter_gets_a_gradient_and_moves(case):
    loss_fn = make(case)
    before = copy.deepcopy(dict(loss_fn.named_parameters()))
    optimizer = torch.optim.Adam([*loss_fn.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        *_, gradients = backward(loss_fn, *batch())
        for parameter, gradient in zip(loss_fn.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for name, parameter in loss_fn.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), f"the gradient of {name} is zero or not finite"
        assert not torch.equal(parameter, before[name]), f"{name} does not learn"


@every_loss
def test_only_training_moves_the_buffers(case):
    loss_fn = make(case)
    buffers = {name: buffer.clone() for name, buffer in loss_fn.named_buffers()}
    loss_fn.eval()(*batch())
    for name, buffer in loss_fn.named_buffers():
        assert torch.equal(buffer, buffers[name]), f"{name} moves in eval mode: change it only `if self.training`"
    embeddings, labels = batch()
    loss_fn.train()(embeddings.requires_grad_() * 1, labels)  # as of a network
    for name, buffer in loss_fn.named_buffers():
        assert not buffer.requires_grad, f"{name} is part of the graph: change it under torch.no_grad()"
        if case in OWN_CASES:
            assert not torch.equal(buffer, buffers[name]), name


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
        assert torch.equal(resumed(embeddings, labels), loss_fn(embeddings, labels)), (
            "a loss restored from its state_dict goes on with other values: what it learns or counts must be a "
            "Parameter or a buffer (register_buffer), and nothing in forward may be random"
        )
    assert all(torch.equal(a, b) for a, b in zip(resumed.buffers(), loss_fn.buffers(), strict=True))


@pytest.mark.parametrize("case", [case for case in OWN_CASES if case != "smooth_ap"])
def test_nothing_waits_for_the_device(case):
    """On fake tensors, which have shapes but no values, .item(), a Python `if` on a tensor, nonzero and indexing by a
    mask all raise: whatever would make a GPU wait for its results. Smooth-AP waits once, for the number of its pairs,
    which saves it from a tensor of B^3 numbers."""
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
    lacks = (
        "is not computed in float32: begin forward with `with torch.autocast(embeddings.device.type, enabled=False):` "
        "and, in it, `embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))`"
    )
    loss_fn = make(case).eval()
    embeddings, labels = batch()
    embeddings = embeddings.to(dtype)
    expected, gradient, _ = backward(loss_fn, embeddings.float(), labels)
    embeddings.requires_grad_()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_fn(embeddings, labels)
        loss.backward()
    except RuntimeError as error:
        pytest.fail(f"the loss of {dtype} embeddings breaks ({error}): it {lacks}")
    assert loss.dtype == torch.float32, f"the loss of {dtype} embeddings {lacks}"
    assert embeddings.grad.dtype == dtype, f"the gradient has another dtype than the embeddings ({dtype})"
    assert torch.equal(loss, expected), f"the loss of {dtype} embeddings {lacks}"
    assert torch.equal(embeddings.grad, gradient.to(dtype)), f"the gradient of {dtype} embeddings {lacks}"


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


@pytest.mark.parametrize("name", OWN)
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
    loss, gradient, _ = backward(make(case).double(), *batch(torch.float64), "float64 embeddings")
    assert loss.dtype == gradient.dtype == torch.float64, (
        f"float64 embeddings give a loss in {loss.dtype}: a cast to float32, or a tensor made without dtype, in between"
    )


@every_loss
def test_int32_labels_work(case):
    loss_fn = make(case).eval()
    embeddings, labels = batch()
    expected, *_ = backward(loss_fn, embeddings, labels)
    loss, *_ = backward(loss_fn, embeddings, labels.int(), "labels of dtype int32 (labels = labels.long() helps)")
    assert torch.equal(loss, expected), "labels of dtype int32 give another loss than the same ones in int64"
    backward(loss_fn.train(), embeddings, labels.int(), "labels of dtype int32 (labels = labels.long() helps)")


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
    for _ in range(2):  # the second time with moved buffers
        assert_finite(loss_fn, embeddings * scale, labels, f"a batch with {kind}, lengths of about {30 * scale:g}")


@pytest.mark.parametrize("case", [case for case in CLASSIFIERS if case not in ("center", "softmax+triplet")])
def test_embeddings_on_the_class_vectors_are_finite(case):
    """cos theta = 1 and -1 exactly, up to rounding, where angles have no derivative; also class vectors of zero."""
    loss_fn = make(case)
    own = loss_fn.weight.detach().reshape(C, -1, D)[:, 0].clone()  # the first one, where a class has several
    assert_finite(loss_fn, own, torch.arange(C), "embeddings on their class vectors")
    assert_finite(loss_fn, -own, torch.arange(C), "embeddings opposite to their class vectors")
    loss_fn.weight.data[:3] = 0
    assert_finite(loss_fn, *batch(), "class vectors of zero")


NO_TERM = {
    "triplet": ("one identity", "no positive", "one image"),
    "npair": ("no positive", "one image"),  # one identity is a pair without negatives: the penalty of its length stays
    "histogram": ("one identity", "no positive", "one image"),
    "multi_similarity": ("one identity", "no positive", "one image"),
    "circle": ("one identity", "no positive", "one image"),
    "supcon": ("no positive", "one image"),  # the positives of one identity still stand beside each other
    "weighted_triplet": ("one identity", "no positive", "one image"),
    "smooth_ap": ("no positive", "one image"),  # one identity is in perfect order
    "adasp": ("one identity", "one image"),  # an image is a pair with itself
}


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, kind) for case in NO_TERM for kind in NO_TERM[case]), *(
        ("triplet, soft margin", kind) for kind in NO_TERM["triplet"])]
)  # fmt: skip
def test_a_batch_without_a_term_is_a_zero_joined_to_the_graph(case, kind):
    loss, gradient, _ = backward(make(case), *DEGENERATE[kind](*batch()), kind)  # fails without a graph
    assert loss == 0 and not gradient.any()


def test_batches_without_a_term_are_tried_for_every_loss_without_classes():
    without = {name for name in OWN if not owns_classes(name)}
    assert without == set(NO_TERM), "say in NO_TERM which batches give no term"


@every_loss
def test_the_order_of_the_images_does_not_matter(case):
    """First identities change places and the images of each keep their order, on which N-pair depends; then all do."""
    moves = "the loss or its gradient depends on the order of the images in the batch"
    loss_fn = make(case).double().eval()
    embeddings, labels = batch(torch.float64)
    order = torch.tensor([2, 0, 6, 5, 1, 7, 3, 4, 8, 9])
    loss, gradient, parameter_gradients = backward(loss_fn, embeddings, labels)
    moved_loss, moved_gradient, moved_parameter_gradients = backward(loss_fn, embeddings[order], labels[order])
    assert_close(moved_loss, loss, msg=moves)
    assert_close(moved_gradient, gradient[order], msg=moves)
    for moved, expected in zip(moved_parameter_gradients, parameter_gradients, strict=True):
        assert_close(moved, expected, msg=moves)
    if "npair" not in case:
        order = torch.arange(10).flip(0)
        assert_close(loss_fn(embeddings[order], labels[order]), loss, msg=moves)


@pytest.mark.parametrize("case", [name for name in LOSSES if not owns_classes(name)])
def test_losses_without_classes_compare_labels_and_nothing_else(case):
    """Any integers will do: renumbering changes nothing."""
    loss_fn, (embeddings, labels) = make(case).double(), batch(torch.float64)
    names = torch.tensor([-5, 3, 10**12, 0, 1, -100, 2])
    expected, *_ = backward(loss_fn, embeddings, labels)
    loss, *_ = backward(loss_fn, embeddings, names[labels], "labels like -100 and 10^12")
    assert_close(loss, expected, msg="other numbers for the same identities give another loss: without num_classes, "
                                     "it may only ask which labels are equal")  # fmt: skip


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
    loss_fn, (embeddings, labels) = make(case), batch()
    before = {name: buffer.clone() for name, buffer in loss_fn.named_buffers() if name != "step"}
    labels[4] = label
    with pytest.raises((IndexError, RuntimeError), match="(?i)out of (range|bounds)"):
        loss_fn(embeddings, labels.to(dtype))
    assert all(torch.equal(loss_fn.get_buffer(name), value) for name, value in before.items())


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


def test_rows():
    """The table's rows: the twelve of the published comparison, then the later ones."""
    parts = [row.part for row in ROWS.values()]
    assert parts[:12] == ["published"] * 12 and set(parts[12:]) == {"later"} and len(parts) >= 20
    assert TWELVE == tuple(ROWS)[:12]
    assert {row.kind for row in ROWS.values()} == {"classifier", "pairs", "proxies", "ranking"}
    for row, facts in ROWS.items():
        names = row.split("+")
        assert all(name in LOSSES for name in names), f"{row} is no loss or sum of losses of LOSSES"
        assert owns_classes(names[0]) == (facts.kind in ("classifier", "proxies")), row


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
        ("arcfac", r"unknown loss 'arcfac' in 'arcfac' \(did you mean arcface\?\); use one of .*softmax, .*arcface"),
        ("softmax+", "unknown loss '' in 'softmax\\+'; use one of .*softmax, "),
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
        "circle": set(), "supcon": set(), "weighted_triplet": set(), "smooth_ap": set(), "adasp": set(),
        "proxy_anchor": {"weight"}, "subcenter_arcface": {"weight"}, "adaface": {"weight", "mean", "std"},
    }  # fmt: skip
    assert not set(OWN) - set(keys), "say here what their state holds"
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
        "circle": "circle: scale=128.0, margin=0.25",
        "supcon": "supcon: temperature=0.1",
        "weighted_triplet": "weighted_triplet: no arguments",
        "proxy_anchor": "proxy_anchor: scale=32.0, margin=0.1",
        "smooth_ap": "smooth_ap: temperature=0.01",
        "subcenter_arcface": "subcenter_arcface: sub_centers=3, scale=64.0, margin=0.5",
        "adasp": "adasp: temperature=0.04",
        "adaface": "adaface: scale=64.0, margin=0.4, concentration=0.333, momentum=0.01",
    }
    assert not set(OWN) - set(arguments), "say here what their arguments are"
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
        ("circle", "scale=0", "circle: scale must be above 0"),
        ("supcon", "temperature=0", "supcon: temperature must be above 0"),
        ("weighted_triplet", "margin=0.3", "unknown .* 'margin'; allowed are weighted_triplet: no arguments"),
        ("proxy_anchor", "scale=-1", "proxy_anchor: scale must be above 0"),
        ("smooth_ap", "temperature=0", "smooth_ap: temperature must be above 0"),
        ("subcenter_arcface", "sub_centers=0", "subcenter_arcface: sub_centers must be at least 1, got 0"),
        ("subcenter_arcface", "margin=4", "subcenter_arcface: .* margin in \\[0, pi\\) radians"),
        ("adasp", "temperature=-1", "adasp: temperature must be above 0"),
        ("adaface", "margin=-1", "adaface: .* margin in \\[0, pi\\) radians"),
        ("adaface", "momentum=2", "adaface: .* momentum in \\[0, 1\\], got 0.333 and 2.0"),
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


class NewLoss(torch.nn.Module):
    """With arguments of every kind, one of them without an annotation."""

    def __init__(self, squared: bool = False, mine: "bool | None" = None, steps: int = 2, hard=True, margin=0.5):
        super().__init__()
        self.arguments = (squared, mine, steps, hard, margin)

    def forward(self, embeddings, labels):
        return embeddings.mean()


def test_boolean_and_unannotated_arguments(monkeypatch):
    monkeypatch.setitem(LOSSES, "new", NewLoss)
    assert build_loss("new", C, D).arguments == (False, None, 2, True, 0.5)
    loss_args = ["squared=True", "mine=False", "steps=3", "hard=False", "margin=1"]
    assert build_loss("new", C, D, loss_args).arguments == (True, False, 3, False, 1.0)
    assert build_loss("softmax+new", C, D, ["new.squared=True", "new.mine=None"]).new.arguments[:2] == (True, None)
    for loss_arg, message in {
        "squared=1": "squared must be True or False, got '1'; allowed are new: squared=False, mine=None \\(or None\\)",
        "squared=true": "squared must be True or False, got 'true'",
        "hard=None": "hard must be True or False, got 'None'",
        "mine=yes": "mine must be True or False or None, got 'yes'",
    }.items():
        with pytest.raises(ValueError, match=message):
            build_loss("new", C, D, [loss_arg])
