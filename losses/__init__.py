"""The losses by name, and sums of them: `arcface`, `softmax+triplet`, `softmax+0.0005*center`.

A new loss is one file, its import and its line in LOSSES below, and one test; the results tables then show its runs
under "other losses". A line in ROWS puts it among the later ones, and asks for more, which the tests name: candidates
in benchmarks/tune.py, pinned numbers, a place in losses/README.md. To use a loss elsewhere, copy its file.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from losses.adaface import AdaFaceLoss
from losses.adasp import AdaSPLoss
from losses.arcface import ArcFaceLoss
from losses.center import CenterLoss
from losses.circle import CircleLoss
from losses.cosface import CosFaceLoss
from losses.focal import FocalLoss
from losses.histogram import HistogramLoss
from losses.multi_similarity import MultiSimilarityLoss
from losses.npair import NPairLoss
from losses.proxy_anchor import ProxyAnchorLoss
from losses.smooth_ap import SmoothAPLoss
from losses.softmax import SoftmaxLoss
from losses.sphereface import SphereFaceLoss
from losses.subcenter_arcface import SubCenterArcFaceLoss
from losses.supcon import SupConLoss
from losses.triplet import TripletLoss
from losses.weighted_triplet import WeightedTripletLoss


def sphereface_m1(num_classes: int, embedding_dim: int) -> SphereFaceLoss:
    """A-softmax without a margin: lambda has no effect, so it has no argument of its own."""
    return SphereFaceLoss(num_classes, embedding_dim, margin=1)


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "softmax": SoftmaxLoss,
    "triplet": TripletLoss,
    "center": CenterLoss,
    "npair": NPairLoss,
    "histogram": HistogramLoss,
    "focal": FocalLoss,
    "multi_similarity": MultiSimilarityLoss,
    "sphereface_m1": sphereface_m1,
    "sphereface": SphereFaceLoss,
    "cosface": CosFaceLoss,
    "arcface": ArcFaceLoss,
    "circle": CircleLoss,
    "supcon": SupConLoss,
    "weighted_triplet": WeightedTripletLoss,
    "proxy_anchor": ProxyAnchorLoss,
    "smooth_ap": SmoothAPLoss,
    "subcenter_arcface": SubCenterArcFaceLoss,
    "adasp": AdaSPLoss,
    "adaface": AdaFaceLoss,
}


class Row(NamedTuple):
    """What a row of the results tables is: which part it stands in, and what its loss compares an image with."""

    part: str  # published (the twelve of the published comparison) or later
    kind: str  # classifier, pairs, proxies or ranking; a sum has the kind of its first term


# The one list of the rows, in their order: tables, experiments and tests read it.
ROWS: dict[str, Row] = {
    "softmax": Row("published", "classifier"),
    "triplet": Row("published", "pairs"),
    "softmax+triplet": Row("published", "classifier"),
    "softmax+center": Row("published", "classifier"),
    "npair": Row("published", "pairs"),
    "histogram": Row("published", "pairs"),
    "focal": Row("published", "classifier"),
    "multi_similarity": Row("published", "pairs"),
    "sphereface_m1": Row("published", "classifier"),
    "sphereface": Row("published", "classifier"),
    "cosface": Row("published", "classifier"),
    "arcface": Row("published", "classifier"),
    "circle": Row("later", "pairs"),
    "supcon": Row("later", "pairs"),
    "weighted_triplet": Row("later", "pairs"),
    "proxy_anchor": Row("later", "proxies"),
    "smooth_ap": Row("later", "ranking"),
    "subcenter_arcface": Row("later", "classifier"),
    "adasp": Row("later", "pairs"),
    "adaface": Row("later", "classifier"),
}
TWELVE = tuple(row for row, facts in ROWS.items() if facts.part == "published")


class SumLoss(nn.Module):
    """Weighted sum of losses on the same embeddings; each term is a submodule named after its loss (softmax.weight)"""

    def __init__(self, terms: dict[str, nn.Module], weights: dict[str, float]):
        super().__init__()
        for name, term in terms.items():
            self.add_module(name, term)
        self.weights = dict(weights)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer -> scalar."""
        # cast once, so that the gradients of the terms are added in float32
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return sum(weight * self.get_submodule(name)(embeddings, labels) for name, weight in self.weights.items())


def build_loss(expression: str, num_classes: int, embedding_dim: int, loss_args: Sequence[str] = ()) -> nn.Module:
    """The loss that `expression` names: a loss class for a plain name, else a SumLoss.

    loss_args: constructor arguments as text, "KEY=VALUE" or "LOSS.KEY=VALUE" (the latter form only, in a sum);
    later ones win. Raises ValueError, in one sentence that lists what is allowed, for an unknown name, key or type.
    """
    terms = parse_expression(expression)
    arguments = _parse_loss_args([name for name, _ in terms], loss_args)
    built = {}
    for name, _ in terms:
        sizes = {"num_classes": num_classes, "embedding_dim": embedding_dim}
        sizes = {key: value for key, value in sizes.items() if key in inspect.signature(LOSSES[name]).parameters}
        try:
            built[name] = LOSSES[name](**sizes, **arguments[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if len(terms) == 1 and terms[0][1] is None:
        return built[terms[0][0]]
    return SumLoss(built, {name: 1.0 if weight is None else weight for name, weight in terms})


def parse_expression(expression: str) -> list[tuple[str, float | None]]:
    """"softmax+0.5*triplet" -> [("softmax", None), ("triplet", 0.5)]: names with the weights that are written.

    Raises ValueError for an unknown or repeated name and for a weight that is no finite number.
    """
    terms = []
    for term in re.split(r"(?<![\d.][eE])\+", expression):  # not at the plus of 1e+05
        weight, star, name = term.rpartition("*")
        name = name.strip()
        if name not in LOSSES:
            near = difflib.get_close_matches(name, LOSSES, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"unknown loss {name!r} in {expression!r}{hint}; use one of {', '.join(LOSSES)}, "
                "or a sum such as softmax+triplet or softmax+0.0005*center"
            )
        if name in [other for other, _ in terms]:
            raise ValueError(f"the loss {name} stands twice in {expression!r}; write it once, with a weight")
        try:
            terms.append((name, _convert(weight, float) if star else None))
        except ValueError as error:
            raise ValueError(f"the weight of {name} in {expression!r} must be {error}") from None
    return terms


def row_name(expression: str) -> str:
    """The expression without its weights: the name of its row in tables and of its run folder."""
    return "+".join(name for name, _ in parse_expression(expression))


def with_default_weights(expression: str, weights: dict[str, float]) -> str:
    """The expression with `weights` filled in where no weight is written: a written one, 0 included, stays."""
    terms = []
    for name, weight in parse_expression(expression):
        weight = weights.get(name) if weight is None else weight
        terms.append(name if weight is None else f"{float(weight)!r}*{name}")
    return "+".join(terms)


def settable_arguments(name: str) -> dict[str, inspect.Parameter]:
    """The constructor arguments of a loss that loss_args may set: all but the two sizes."""
    parameters = inspect.signature(LOSSES[name], eval_str=True).parameters
    return {key: value for key, value in parameters.items() if key not in ("num_classes", "embedding_dim")}


def describe_arguments(name: str) -> str:
    """"arcface: scale=64.0, margin=0.5", as shown in help texts and error messages."""
    allowed = ", ".join(
        f"{key}={parameter.default}{' (or None)' if type(None) in get_args(parameter.annotation) else ''}"
        for key, parameter in settable_arguments(name).items()
    )
    return f"{name}: {allowed or 'no arguments'}"


def all_arguments(expression: str, loss_args: Sequence[str] = ()) -> dict[str, object]:
    """LOSS.KEY -> value of every argument of a loss or sum: the defaults of the loss files, over them loss_args."""
    names = [name for name, _ in parse_expression(expression)]
    given = _parse_loss_args(names, loss_args)
    return {f"{name}.{key}": given[name].get(key, parameter.default)
            for name in names for key, parameter in settable_arguments(name).items()}  # fmt: skip


def _parse_loss_args(names: list[str], loss_args: Sequence[str]) -> dict[str, dict[str, object]]:
    """Loss name -> keyword arguments, checked against the constructor signatures."""
    allowed = "allowed are " + "; ".join(describe_arguments(name) for name in names)
    arguments: dict[str, dict[str, object]] = {name: {} for name in names}
    for text in loss_args:
        target, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"the loss argument {text!r} is not of the form [LOSS.]KEY=VALUE; {allowed}")
        name, dot, key = target.strip().rpartition(".")
        if not dot:
            if len(names) > 1:
                raise ValueError(
                    f"the loss argument {text!r} does not say which loss of {'+'.join(names)} it is for; "
                    f"write LOSS.KEY=VALUE ({allowed})"
                )
            name = names[0]
        if name not in names or key not in settable_arguments(name):
            raise ValueError(f"unknown loss argument {target.strip()!r}; {allowed}")
        parameter = settable_arguments(name)[key]
        annotation = type(parameter.default) if parameter.annotation is parameter.empty else parameter.annotation
        try:
            arguments[name][key] = _convert(value.strip(), annotation)
        except ValueError as error:
            raise ValueError(f"{target.strip()} must be {error}; {allowed}") from None
    return arguments


def _convert(text: str, annotation: type) -> bool | int | float | None:
    """The text as the annotation's type: bool, int, float, or one of them | None. ValueError says what it must be."""
    kinds = get_args(annotation) or (annotation,)
    if text == "None" and type(None) in kinds:
        return None
    if bool in kinds:
        value, wanted = {"True": True, "False": False}.get(text, math.nan), "True or False"
    else:
        kind, wanted = (int, "a whole number") if int in kinds else (float, "a finite number")
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{wanted}{' or None' if type(None) in kinds else ''}, got {text!r}")
    return value
