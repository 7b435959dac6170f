"""Backbones: torchvision's networks up to their last linear layer, options, weights files that fit or are refused."""

import inspect
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from models import ARCHS, build_model, model_options
from models.backbone import GeneralizedMeanPool, VisionTransformer, imagenet_state_dict, read_state_dict
from utils.flags import DEFAULTS

ZOO = {  # arch -> D
    "resnet18": 512,
    "resnet50": 2048,
    "resnext50_32x4d": 2048,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 1024,
    "efficientnet_b0": 1280,
    "efficientnet_v2_s": 1280,
    "regnet_y_400mf": 440,
    "densenet121": 1024,
    "shufflenet_v2_x0_5": 1024,
    "convnext_tiny": 768,
    "swin_t": 768,
    "swin_v2_t": 768,
    "alexnet": 4096,
}


@pytest.fixture(scope="module")
def vit():
    """A small one, so that the tests take no minute: torchvision's builder with fewer layers."""
    with pytest.MonkeyPatch.context() as patch:
        build = torchvision.models.get_model

        def small(arch, **kwargs):
            if arch != "vit_b_16":
                return build(arch, **kwargs)
            torch.manual_seed(0)
            return torchvision.models.VisionTransformer(224, 16, 2, 4, 64, 128, dropout=0.1)

        patch.setattr(torchvision.models, "get_model", small)
        yield small


# ------------------------------------------------------------------------------------------------------- the one rule


@pytest.mark.parametrize("arch", ZOO)
def test_the_embedding_is_what_the_last_linear_layer_receives(arch):
    """Same weights, same images: torchvision's last layer applied to our embedding gives torchvision's logits."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(arch).eval()
    torch.manual_seed(0)
    model = build_model(arch, height=128, width=64).eval()
    images = torch.rand(2, 3, 128, 64)
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.inference_mode():
        embeddings = model(images)
        torch.testing.assert_close(linear(embeddings), network(images))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images).dtype == torch.float32
    assert embeddings.shape == (2, ZOO[arch]) == (2, model.embedding_dim)
    lost = network.state_dict().keys() - model.state_dict().keys()
    assert len(lost) == 2 and model.state_dict().keys() < network.state_dict().keys()  # a weight and a bias


@pytest.mark.parametrize("arch", ["resnet18", *(arch for arch, build in ARCHS.items() if build is not None)])
def test_one_embedding_per_image(arch):
    """Those of one's own, too."""
    model = build_model(arch).eval()
    with torch.inference_mode():
        embeddings = model(torch.rand(2, 3, 64, 32))
    assert embeddings.shape == (2, model.embedding_dim) and embeddings.dtype == torch.float32


@pytest.mark.parametrize("arch", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_no_dropout_right_before_the_embedding(arch):
    """In training, too, what comes to the end of the classifier leaves it unchanged."""
    assert any(isinstance(module, nn.Dropout) for module in torchvision.models.get_model(arch).modules())
    model = build_model(arch).train()
    values = torch.rand(4, model.embedding_dim)
    assert torch.equal(model.classifier[-2:](values), values)


def test_every_arch_of_the_list_can_be_built_and_has_weights(monkeypatch):
    """Built on no device, where torchvision can (RegNet can't); the weights' names without a download."""
    urls = {}
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda url, **_: urls.update({arch: url}))
    archs = [arch for arch, build in ARCHS.items() if build is None]
    for arch in archs:
        imagenet_state_dict(arch)
        with torch.device("cpu" if arch == "regnet_y_400mf" else "meta"):
            if not arch.startswith("regnet") or arch == "regnet_y_400mf":
                assert build_model(arch, height=224, width=224).embedding_dim > 100
    assert len(urls) == len(archs) > 60
    assert {arch for arch, url in urls.items() if "swag" in url} == {"vit_h_14", "regnet_y_128gf"}


def test_unknown_arch_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown arch 'vgg'; known: .*resnet50"):
        build_model("vgg")


# ------------------------------------------------------------------------------------------------------------ options


def test_model_options_are_the_keywords_of_build_model_and_the_flags_defaults():
    parameters = list(inspect.signature(build_model).parameters.values())
    assert model_options(DEFAULTS) == {parameter.name: parameter.default for parameter in parameters[2:]}
    assert [parameter.name for parameter in parameters[:2]] == ["arch", "weights"]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_last_stride(arch):
    """The strided convolutions of the last stage keep every place: each second one is what stride 2 gives."""
    torch.manual_seed(0)
    two = build_model(arch).eval()
    torch.manual_seed(0)
    one = build_model(arch, last_stride=1).eval()
    sizes = []
    for model in (two, one):
        model.avgpool.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
        with torch.inference_mode():
            model(torch.rand(1, 3, 256, 128))
    assert sizes == [(8, 4), (16, 8)]
    changed = 0
    for (name, a), (_, b) in zip(two.named_modules(), one.named_modules(), strict=True):
        if isinstance(a, nn.Conv2d) and a.stride != b.stride:
            x = torch.rand(1, a.in_channels, 8, 4)
            with torch.inference_mode():
                torch.testing.assert_close(b(x)[:, :, ::2, ::2], a(x))
            changed += name.startswith("layer4.0.")
    assert changed == 2  # the block's own and its shortcut's


def test_gem_is_its_formula():
    """Place by place; p = 1 is the average, a large p nearly the maximum; p learns."""
    x = torch.rand(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    pool = GeneralizedMeanPool(2.5).double()
    slow = torch.tensor([[(sum(v.item() ** 2.5 for v in m.flatten()) / 8) ** (1 / 2.5) for m in image] for image in x])
    torch.testing.assert_close(pool(x)[:, :, 0, 0], slow.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(GeneralizedMeanPool(1.0)(x.detach()), x.detach().mean((2, 3), keepdim=True))
    torch.testing.assert_close(GeneralizedMeanPool(300.0)(x)[..., 0, 0], x.amax((2, 3)), rtol=2e-2, atol=0)
    assert torch.autograd.gradcheck(pool, x)
    pool(x).sum().backward()
    assert pool.p.grad.abs() > 1e-3


def test_gem_in_a_resnet():
    torch.manual_seed(0)
    model = build_model("resnet18", pool="gem").eval()
    maps = []
    model.layer4.register_forward_hook(lambda *hook: maps.append(hook[2]))
    with torch.inference_mode():
        embeddings = model(torch.rand(2, 3, 64, 32))
    assert model.avgpool.p.tolist() == [3.0]
    torch.testing.assert_close(embeddings, maps[0].clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3))


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small"])
def test_neck_is_batch_normalisation_without_a_bias(arch):
    torch.manual_seed(0)
    plain = build_model(arch).train()
    torch.manual_seed(0)
    model = build_model(arch, neck="bn").train()
    neck = next(module for name, module in model.named_modules() if name.endswith(".neck"))
    with torch.no_grad():
        neck.weight.uniform_(0.5, 2)
    images = torch.rand(6, 3, 64, 32)
    before, after = plain(images), model(images)
    mean, variance = before.mean(0), before.var(0, unbiased=False)
    expected = (before - mean) / (variance + 1e-5).sqrt() * neck.weight
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)
    after.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert neck.bias is None and sum(".neck." in name for name in model.state_dict()) == 4
    torch.testing.assert_close(neck.running_mean, 0.1 * mean, rtol=1e-3, atol=1e-4)
    model.eval()
    with torch.inference_mode():  # by the running statistics: an image's embedding does not depend on its neighbours
        torch.testing.assert_close(model(images)[:2], model(images[:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"last_stride": 1}, {"pool": "gem"}])
def test_last_stride_and_gem_are_for_resnets(options):
    with pytest.raises(ValueError, match="are for ResNets: with --arch swin_t --last-stride 2 --pool avg"):
        build_model("swin_t", **options)


# ---------------------------------------------------------------------------------------------------------------- ViT


def test_vit_at_its_own_size_is_torchvisions(vit):
    network, model = vit("vit_b_16").eval(), build_model("vit_b_16", height=224, width=224).eval()
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(network.heads(model(images)), network(images))


def test_vit_takes_images_of_any_height_and_width(vit):
    model = build_model("vit_b_16", height=256, width=128)
    assert model.encoder.pos_embedding.shape == (1, 1 + 16 * 8, 64)
    assert model(torch.rand(2, 3, 256, 128)).shape == (2, 64)
    with pytest.raises(ValueError, match="vit_b_16 needs --height and --width that are multiples of 16"):
        build_model("vit_b_16", height=250, width=128)


def test_positions_are_interpolated_row_by_row_and_column_by_column(vit):
    """A ramp along the rows and one along the columns of 14 x 14 stay ramps; the class token's stays as it is."""
    model = build_model("vit_b_16", height=256, width=128)
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    grid = torch.stack([rows.flatten(), columns.flatten()], dim=1)  # (196, 2)
    positions = torch.cat([torch.full((1, 2), 77.0), grid])[None]
    fitted = model.fit_positions(positions)[0]
    assert fitted[0].tolist() == [77, 77]
    fitted = fitted[1:].view(16, 8, 2)
    down, across = (torch.arange(16) + 0.5) * 14 / 16 - 0.5, (torch.arange(8) + 0.5) * 14 / 8 - 0.5  # centres of places
    inside = slice(2, -2)  # at the border cubic interpolation bends; elsewhere it waves around a ramp, a little
    torch.testing.assert_close(fitted[inside, :, 0], down[inside, None].expand(12, 8), atol=0.06, rtol=0)
    torch.testing.assert_close(fitted[:, inside, 1], across[None, inside].expand(16, 4), atol=0.06, rtol=0)


def test_vit_weights_of_another_image_size(vit, tmp_path, capsys):
    network = vit("vit_b_16")
    torch.save(network.state_dict(), tmp_path / "square.pth")
    model = build_model("vit_b_16", str(tmp_path / "square.pth"))
    assert isinstance(model, VisionTransformer)
    assert torch.equal(model.encoder.pos_embedding, model.fit_positions(network.encoder.pos_embedding))
    with torch.no_grad():
        model.encoder.pos_embedding += 1
    torch.save(model.state_dict(), tmp_path / "own.pth")
    again = build_model("vit_b_16", str(tmp_path / "own.pth"))
    assert torch.equal(again.encoder.pos_embedding, model.encoder.pos_embedding)
    with pytest.raises(ValueError, match=r"encoder.pos_embedding has shape \(1, 129, 64\) instead of \(1, 33, 64\)"):
        build_model("vit_b_16", str(tmp_path / "own.pth"), height=128, width=64)


# ------------------------------------------------------------------------------------------------------ weights files


def prefixed(state_dict, prefix):
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def without(state_dict, *starts):
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(starts)}


def batch_norm(prefix, D=2048):
    values = {name: torch.rand(D) + 0.5 for name in ("weight", "running_mean", "running_var")}
    return prefixed({**values, "bias": torch.zeros(D), "num_batches_tracked": torch.tensor(7)}, prefix)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: without(state, "fc."),
        lambda state: prefixed(state, "module."),
        lambda state: prefixed(state, "model."),
        lambda state: prefixed(state, "module.model."),
        lambda state: {"state_dict": prefixed(state, "module.")},
        lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    ],
    ids=["whole", "no classifier", "module.", "model.", "module.model.", "state_dict", "no num_batches_tracked"],
)
def test_weights_from_a_file(tmp_path, capsys, wrap):
    state = torchvision.models.resnet18().state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    model = build_model("resnet18", str(tmp_path / "w.pth"))
    assert torch.equal(model.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    tensors = 120 if "num_batches_tracked" in "".join(wrap(state).get("state_dict", wrap(state))) else 100
    assert f"{tensors} tensors loaded" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trunk():
    """Tensors of a ResNet-50 under torchvision's names, no two alike, without its classifier: 318 with the counters."""
    torch.manual_seed(1)
    state = without(torchvision.models.resnet50().state_dict(), "fc.")
    return {name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def torchreid(trunk):
    """`{"state_dict", "epoch", ...}`, under DataParallel, the classifier of Market's 751 people."""
    head = {"classifier.weight": torch.rand(751, 2048), "classifier.bias": torch.rand(751)}
    return {"state_dict": prefixed({**trunk, **head}, "module."), "epoch": 60, "rank1": np.float32(0.8)}


def reid_strong_baseline(trunk):
    return {**prefixed(trunk, "base."), **batch_norm("bottleneck."), "classifier.weight": torch.rand(751, 2048)}


def fast_reid(trunk):
    head = {"heads.weight": torch.rand(751, 2048), "heads.pool_layer.p": torch.tensor([2.5])}
    pixels = {"pixel_mean": torch.rand(1, 3, 1, 1), "pixel_std": torch.rand(1, 3, 1, 1)}
    model = {**pixels, **prefixed(trunk, "backbone."), **batch_norm("heads.bottleneck.0."), **head}
    return {"model": model, "iteration": 17999}


@pytest.mark.parametrize(
    "project, left_out",
    [
        (torchreid, "module.classifier.bias, module.classifier.weight"),
        (reid_strong_baseline, "bottleneck.bias, bottleneck.num_batches_tracked, bottleneck.running_mean"),
        (fast_reid, "heads.bottleneck.0.bias, heads.bottleneck.0.num_batches_tracked, heads.bottleneck.0.running_mean"),
    ],
)
def test_other_projects_files(tmp_path, capsys, trunk, project, left_out):
    torch.save(project(trunk), tmp_path / "w.pth")
    model = build_model("resnet50", str(tmp_path / "w.pth"))
    assert f"for resnet50: 318 tensors loaded, left out: {left_out}" in capsys.readouterr().out
    state = model.state_dict()
    assert state.keys() == trunk.keys() and all(torch.equal(state[name], trunk[name]) for name in trunk)


@pytest.mark.parametrize("project, prefix", [(reid_strong_baseline, "bottleneck."), (fast_reid, "heads.bottleneck.0.")])
def test_other_projects_necks_are_loaded_where_the_network_has_one(tmp_path, capsys, trunk, project, prefix):
    torch.save(project(trunk), tmp_path / "w.pth")
    model = build_model("resnet50", str(tmp_path / "w.pth"), last_stride=1, pool="gem", neck="bn")
    content, state = read_state_dict(tmp_path / "w.pth"), model.state_dict()
    for name in ("weight", "running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(state[f"fc.neck.{name}"], content[prefix + name])
    assert model.avgpool.p.tolist() == ([2.5] if project is fast_reid else [3.0])
    missing = "" if project is fast_reid else ", not in the file: avgpool.p"
    assert capsys.readouterr().out.endswith(f"{missing}\n")


def test_a_neck_that_the_file_lacks_starts_new(tmp_path, capsys, trunk):
    torch.save(trunk, tmp_path / "w.pth")
    model = build_model("resnet50", str(tmp_path / "w.pth"), neck="bn")
    assert model.fc.neck.weight.eq(1).all() and torch.equal(model.conv1.weight, trunk["conv1.weight"])
    wanted = "318 tensors loaded, not in the file: fc.neck.num_batches_tracked, fc.neck.running_mean, fc.neck."
    assert wanted in capsys.readouterr().out


def test_densenet_under_the_names_of_torchvisions_files(tmp_path):
    state = torchvision.models.densenet121().state_dict()
    old = {name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): tensor for name, tensor in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "w.pth")
    model = build_model("densenet121", str(tmp_path / "w.pth"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    for change, message in [
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"conv1.weight has shape \(64, 3, 3, 3\) instead of"),
        ({"layer5.weight": torch.zeros(1)}, "layer5.weight is not part of this arch"),
        ({"module.conv1.weight": state["conv1.weight"]}, "conv1.weight is there twice"),
        ({"bn1.weight": state["bn1.weight"] * torch.nan}, "bn1.weight holds no finite numbers"),
    ]:
        torch.save({**state, **change}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=message):
            build_model("resnet18", str(tmp_path / "w.pth"))
    del state["bn1.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="bn1.bias is missing"):
        build_model("resnet18", str(tmp_path / "w.pth"))


def test_weights_file_absent_or_no_state_dict(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        build_model("resnet18", str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="read safely"):
        build_model("resnet18", str(tmp_path / "text.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        build_model("resnet18", str(tmp_path / "list.pth"))


def test_numpy_values_beside_the_weights(tmp_path):
    """A number, as training scripts keep a best score, is read; of an array the sentence says how to save again."""
    state = {"state_dict": torchvision.models.resnet18().state_dict(), "best": np.zeros(3)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth holds NumPy values .* torch.save\(model.state_dict\(\), 'weights"):
        build_model("resnet18", str(tmp_path / "w.pth"))
    for best in (np.float64(0.5), np.float32(0.5), np.int64(3)):
        torch.save({**state, "best": best}, tmp_path / "w.pth")
        build_model("resnet18", str(tmp_path / "w.pth"))


def test_layers_of_an_embedding_are_no_classifier(tmp_path):
    """torchreid's resnet50_fc512 would be another network without them."""
    state = {**torchvision.models.resnet18().state_dict(), "fc.0.weight": torch.zeros(8, 512)}
    torch.save(without(state, "fc.weight"), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"fc\.0\.weight is not part of this arch"):
        build_model("resnet18", str(tmp_path / "w.pth"))


def test_a_backbone_of_ones_own(tmp_path, monkeypatch):
    """A function in the dict. Its weights are read by the names that it gives them; ImageNet's there are none of."""

    def tiny():
        layers = {"base": nn.Conv2d(3, 8, 7, stride=4), "pool": nn.AdaptiveAvgPool2d(1), "bottleneck": nn.Flatten()}
        model = nn.Sequential(OrderedDict(layers))
        model.embedding_dim = 8
        return model

    monkeypatch.setitem(ARCHS, "tiny", tiny)
    model = build_model("tiny")
    assert model.embedding_dim == 8 and model(torch.rand(2, 3, 64, 32)).shape == (2, 8)
    torch.save(prefixed(model.state_dict(), "module."), tmp_path / "w.pth")
    assert torch.equal(build_model("tiny", str(tmp_path / "w.pth"))[0].weight, model[0].weight)
    with pytest.raises(ValueError, match="tiny is as its own function builds it: leave --last-stride, --pool"):
        build_model("tiny", neck="bn")
    with pytest.raises(ValueError, match="no ImageNet weights of tiny: pass --weights none or a file"):
        build_model("tiny", "imagenet")
    monkeypatch.setitem(ARCHS, "tiny", lambda: nn.Flatten())
    with pytest.raises(ValueError, match="the network of tiny lacks the attribute embedding_dim"):
        build_model("tiny")


def test_imagenet_weights_that_cannot_be_downloaded(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match=r"fetch https://\S+resnet18-\S+\.pth .* --weights FILE, .* --weights none"):
        build_model("resnet18", "imagenet")
