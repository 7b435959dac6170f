"""torchvision trunks with global average pooling: one tensor (B, D) out, no neck, no head, last stride 2.

The parameter names are torchvision's own, so a torchvision state dict loads as it is.
"""

from collections import OrderedDict
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

# D of torchvision's networks; or a function without arguments that builds a backbone with an attribute embedding_dim
ARCHS = {
    "resnet50": 2048,
    "resnet18": 512,
    "resnet34": 512,
    "resnet101": 2048,
    "mobilenet_v2": 1280,
}
CLASSIFIERS = ("fc.", "classifier.")  # the ImageNet heads of these trunks: never built, ignored in a weights file
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)  # that can be in such a file
PREFIXES = ("module.", "model.")  # what DataParallel and common training scripts put in front of every name


class GlobalAveragePool(nn.Module):
    """Feature map (B, D, h, w) -> embeddings (B, D), in float32 also under autocast (retrieval sees every digit)."""

    def forward(self, feature_map: Tensor) -> Tensor:
        dtype = torch.float64 if feature_map.dtype == torch.float64 else torch.float32
        return feature_map.mean(dim=(2, 3), dtype=dtype)


def build_model(arch: str = "resnet50", weights: str = "none") -> nn.Module:
    """A backbone with the attribute `embedding_dim`.

    arch: a key of ARCHS. weights: `imagenet` (torchvision's IMAGENET1K_V1), `none`, or the path of a state dict.
    Raises ValueError or FileNotFoundError with one sentence if the weights can't be had or don't fit.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}; known: {', '.join(ARCHS)}")
    if callable(ARCHS[arch]):
        model = ARCHS[arch]()
    else:
        network = torchvision.models.get_model(arch, weights=None)
        heads = ("avgpool", "fc", "classifier")
        layers = [(name, layer) for name, layer in network.named_children() if name not in heads]
        model = nn.Sequential(OrderedDict([*layers, ("pool", GlobalAveragePool())]))
        model.embedding_dim = ARCHS[arch]
    if weights == "imagenet" and callable(ARCHS[arch]):
        raise ValueError(f"there are no ImageNet weights of {arch}: pass --weights none or a file")
    if weights == "imagenet":
        load_state_dict(model, imagenet_state_dict(arch), source=f"torchvision's ImageNet weights of {arch}")
    elif weights != "none":
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"--weights {weights}: no such file; allowed are imagenet, none or a file")
        num_tensors = load_state_dict(model, read_state_dict(path), source=str(path))
        print(f"{path}: {num_tensors} tensors loaded into {arch}")
    return model


def imagenet_state_dict(arch: str) -> dict[str, Tensor]:
    weights = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # no network; the wrong hash of a broken download; a broken file in torch's cache
        raise ValueError(
            f"the ImageNet weights of {arch} could not be downloaded ({error}): fetch {weights.url} on another machine "
            f"and pass --weights FILE, or train from random weights with --weights none"
        ) from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name: a plain state dict, or one under the key `state_dict` or `model`."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever is wrong with a foreign file, no code of it has run
        if "GLOBAL numpy" in str(error):
            raise ValueError(
                f"{path} holds NumPy values beside its tensors (a best score, say), which can't be read safely: where "
                "it was made, save the tensors alone, torch.save(model.state_dict(), 'weights.pth')"
            ) from None
        raise ValueError(f"{path} is no file of plain tensors, read safely ({type(error).__name__})") from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()):
        raise ValueError(f"{path} holds no state dict (a dict of names and tensors)")
    return loaded


def load_state_dict(model: nn.Module, state_dict: dict[str, Tensor], source: str) -> int:
    """Copies the trunk's tensors into `model` and returns their number; changes nothing if any differs."""
    found, problems = {}, []
    for name, tensor in state_dict.items():
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if name in found:
            problems.append(f"{name} is there twice")
        if not name.startswith(CLASSIFIERS):
            found[name] = tensor
    wanted = model.state_dict()
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}  # absent from old files
    problems += [f"{name} is missing" for name in wanted.keys() - found.keys() - optional]
    problems += [f"{name} is not part of this arch" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    problems += [
        f"{name} holds no finite numbers"
        for name, tensor in found.items()
        if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in DTYPES or not tensor.isfinite().all()
    ]
    if problems:
        raise ValueError(f"{source} does not fit: {'; '.join(sorted(problems)[:3])} ({len(problems)} differences)")
    model.load_state_dict(found, strict=False)
    return len(found)
