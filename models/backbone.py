"""torchvision's classifiers as backbones: images (B, 3, H, W) -> embeddings (B, D), no head.

One rule for all of them: the embedding is what the last linear layer receives, without the dropout right before it.
Everything else is torchvision's own, parameter names included, so that its state dicts load as they are.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

# two outputs in training; other layers after loading; no linear layer; square images only
LEFT_OUT = ("googlenet", "inception", "mnasnet", "squeezenet", "maxvit")
CLASSIFIERS = [name for name in torchvision.models.list_models(torchvision.models) if not name.startswith(LEFT_OUT)]
# one of your own: a function without arguments that builds a backbone with an attribute embedding_dim
ARCHS: dict[str, Callable[[], nn.Module] | None] = {
    **dict.fromkeys(CLASSIFIERS),
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)  # that can be in a file of weights
# what DataParallel, torch.compile and other projects put in front of every name
PREFIXES = ("module.", "_orig_mod.", "model.", "base.", "backbone.")
# what a single NumPy number in a file is made of (torchreid keeps a score beside the tensors), by either version's name
scalar = np.float64(0).__reduce__()[0]
NUMBERS = [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype,
           np.dtypes.Float32DType, np.dtypes.Float64DType, np.dtypes.Int64DType]  # fmt: skip
HEADS = ("fc.", "classifier.", "heads.", "pixel_")  # ignored in a file unless the network has a tensor of that name


class GlobalAveragePool(nn.Module):
    """Feature map (B, D, h, w) -> (B, D, 1, 1), in float32 also under autocast (retrieval sees every digit)."""

    def forward(self, feature_map: Tensor) -> Tensor:
        dtype = torch.float64 if feature_map.dtype == torch.float64 else torch.float32
        return feature_map.mean(dim=(2, 3), keepdim=True, dtype=dtype)


class GeneralizedMeanPool(nn.Module):
    """(mean of x^p)^(1/p) over the feature map's places, p learned: (B, D, h, w) -> (B, D, 1, 1), in float32.

    Radenovic, Tolias & Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019, Eq. 3, with one p
    for all channels, as AGW has it. p = 1 is the average, p = infinity the maximum.
    """

    def __init__(self, p: float = 3.0):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))

    def forward(self, feature_map: Tensor) -> Tensor:
        with torch.autocast(feature_map.device.type, enabled=False):
            x = feature_map.to(torch.promote_types(feature_map.dtype, torch.float32)).clamp(min=1e-6)
            return x.pow(self.p).mean(dim=(2, 3), keepdim=True).pow(1 / self.p)


class InFloat32(nn.Module):
    """Embeddings (B, D) in float32 also under autocast, in the place of the last linear layer."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


class VisionTransformer(torchvision.models.VisionTransformer):
    """torchvision's for images of any height and width: its position embeddings are interpolated (bicubic)."""

    def _process_input(self, images: Tensor) -> Tensor:
        return self.conv_proj(images).flatten(2).transpose(1, 2)  # (B, patches, D)

    def fit_positions(self, positions: Tensor) -> Tensor:
        """Those of a square image (1, 1 + n * n, D) -> (1, 1 + rows * columns, D); the class token's, the first, stays.

        Others come back as they are.
        """
        patches = positions.shape[1] - 1 if positions.ndim == 3 else 0
        side = math.isqrt(max(patches, 0))
        if patches == math.prod(self.grid) or side * side != patches or not patches:
            return positions
        grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, n, n)
        grid = F.interpolate(grid, self.grid, mode="bicubic", align_corners=False)
        return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def build_model(
    arch: str = "resnet50",
    weights: str = "none",
    height: int = 256,
    width: int = 128,
    last_stride: int = 2,
    pool: str = "avg",
    neck: str = "none",
) -> nn.Module:
    """A backbone with the attribute `embedding_dim`.

    arch: one of ARCHS. weights: `imagenet` (torchvision's IMAGENET1K_V1), `none`, or the path of a state dict. height,
    width: of the images, for those that must know (ViT). last_stride: 1 doubles both sides of a ResNet's last feature
    map. pool: `avg`, or `gem` (ResNets). neck: `bn` normalises the embedding by batch statistics, without a bias.
    Raises ValueError or FileNotFoundError with one sentence if that can't be built or the weights don't fit.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}; known: {', '.join(ARCHS)}")
    if (build := ARCHS[arch]) is None:
        network = torchvision.models.get_model(arch, weights=None)
        fit_to_images(network, arch, height, width)
        change_last_stage(network, arch, last_stride, pool)
        head = remove_head(network, neck)
    elif (last_stride, pool, neck) != (2, "avg", "none"):
        raise ValueError(f"{arch} is as its own function builds it: leave --last-stride, --pool and --neck out")
    elif weights == "imagenet":
        raise ValueError(f"there are no ImageNet weights of {arch}: pass --weights none or a file")
    else:
        network, head = build(), None
        if not isinstance(getattr(network, "embedding_dim", None), int):
            raise ValueError(f"the network of {arch} lacks the attribute embedding_dim, the width of its embeddings")
    if weights == "imagenet":
        load_state_dict(network, imagenet_state_dict(arch), head, f"torchvision's ImageNet weights of {arch}")
    elif weights != "none":
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"--weights {weights}: no such file; allowed are imagenet, none or a file")
        print(f"{path}, for {arch}: {load_state_dict(network, read_state_dict(path), head, str(path))}")
    return network


def fit_to_images(network: nn.Module, arch: str, height: int, width: int) -> None:
    """For a network that knows the size of its images, which are squares of 224 pixels as torchvision builds it."""
    if isinstance(network, torchvision.models.VisionTransformer):
        if height % network.patch_size or width % network.patch_size:
            raise ValueError(f"{arch} needs --height and --width that are multiples of {network.patch_size}")
        network.__class__ = VisionTransformer  # torchvision's functions, vit_b_16 and so on, build only their own
        network.grid = height // network.patch_size, width // network.patch_size
        positions = network.fit_positions(network.encoder.pos_embedding.detach())
        network.encoder.pos_embedding = nn.Parameter(positions)


def change_last_stage(network: nn.Module, arch: str, last_stride: int, pool: str) -> None:
    if (last_stride, pool) != (2, "avg") and not isinstance(network, torchvision.models.ResNet):
        raise ValueError(f"a last stride of 1 and GeM are for ResNets: with --arch {arch} --last-stride 2 --pool avg")
    if last_stride == 1:
        for layer in network.layer4[0].modules():  # its strided convolution and the one of the shortcut
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
    if pool == "gem":
        network.avgpool = GeneralizedMeanPool()
    elif getattr(getattr(network, "avgpool", None), "output_size", None) in (1, (1, 1)):
        network.avgpool = GlobalAveragePool()


def remove_head(network: nn.Module, neck: str) -> str:
    """Puts the embedding, and a neck, in the place of the last linear layer, whose name is returned."""
    modules = list(network.named_modules())
    last = max(i for i, (_, module) in enumerate(modules) if isinstance(module, nn.Linear))
    head, linear = modules[last]
    if isinstance(modules[last - 1][1], nn.Dropout):
        network.set_submodule(modules[last - 1][0], nn.Identity())
    network.embedding_dim = linear.in_features
    layers = {"embedding": InFloat32()}
    if neck == "bn":
        layers["neck"] = nn.BatchNorm1d(linear.in_features)
        layers["neck"].bias = None
    network.set_submodule(head, nn.Sequential(OrderedDict(layers)))
    return head


def model_options(args: dict) -> dict:
    """The keyword arguments of `build_model` that a run's flags set, but arch and weights."""
    return {key: args[key] for key in ("height", "width", "last_stride", "pool", "neck")}


def imagenet_state_dict(arch: str) -> dict[str, Tensor]:
    """torchvision's IMAGENET1K_V1, or what it recommends for the few that have none of that name."""
    choices = torchvision.models.get_model_weights(arch)
    weights = choices.__members__.get("IMAGENET1K_V1", choices.DEFAULT)
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
        with torch.serialization.safe_globals(NUMBERS):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever is wrong with a foreign file, no code of it has run
        remedy = "where it was made, save the tensors alone, torch.save(model.state_dict(), 'weights.pth')"
        if "GLOBAL numpy" in str(error):
            text = f"{path} holds NumPy values beside its tensors (a best score, say), which are not read: {remedy}"
        else:
            text = f"{path} is no file of plain tensors, read safely ({type(error).__name__}): {remedy}"
        raise ValueError(text) from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()):
        raise ValueError(f"{path} holds no state dict (a dict of names and tensors)")
    return loaded


def own_name(name: str, wanted: dict[str, Tensor], head: str | None) -> str:
    """The name that a file's tensor has here, `wanted` being those of the network. Known are the names of

    torchvision; torchreid (`module.conv1.weight`, `module.classifier.weight`); reid-strong-baseline
    (`base.conv1.weight`, `bottleneck.weight`, `classifier.weight`); fast-reid (`backbone.conv1.weight`,
    `heads.bottleneck.0.weight`, `heads.pool_layer.p`, `heads.weight`); and a last.pt of train.py.
    """
    while name not in wanted and name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    if name in wanted or head is None:
        return name
    name = re.sub(r"^(heads\.)?(bottleneck(\.0)?|bnneck)\.", f"{head}.neck.", name)
    name = re.sub(r"^heads\.pool_layer\.", "avgpool.", name)
    return re.sub(r"(denselayer\d+\.(norm|conv))\.([12])\.", r"\1\3.", name)  # torchvision's own old files


def load_state_dict(network: nn.Module, state_dict: dict[str, Tensor], head: str | None, source: str) -> str:
    """Copies a file's tensors into `network` and says how many; changes nothing if any differs.

    A classifier in the file is left out, and so are a neck and GeM's exponent that the network lacks; those that only
    the network has keep their first values. head: the name of the layer in its classifier's place, if any.
    """
    found, left_out, problems = {}, [], []
    wanted = network.state_dict()
    for given, tensor in state_dict.items():
        name = own_name(given, wanted, head)
        embeds = re.match(r"fc\.\d", given.removeprefix("module."))  # torchreid's resnet50_fc512: not a classifier
        if name not in wanted and name.startswith((f"{head}.", *HEADS, "avgpool.")) and not embeds:
            left_out.append(given)
            continue
        if name in found:
            problems.append(f"{name} is there twice")
        if isinstance(network, VisionTransformer) and name == "encoder.pos_embedding":
            tensor = network.fit_positions(tensor)
        found[name] = tensor
    new = [name for name in wanted.keys() - found.keys() if name.startswith((f"{head}.neck.", "avgpool."))]
    optional = {*new, *(name for name in wanted if name.endswith("num_batches_tracked"))}  # absent from old files
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
    network.load_state_dict(found, strict=False)
    text = f"{len(found)} tensors loaded"
    for what, names in (("left out", left_out), ("not in the file", new)):
        text += f", {what}: {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}" if names else ""
    return text
