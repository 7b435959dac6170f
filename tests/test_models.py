"""Backbones: one tensor out, torchvision's names, weights files that fit or are refused."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from models import ARCHS, build_model


@pytest.mark.parametrize("arch", ARCHS)
def test_one_embedding_per_image(arch):
    model = build_model(arch).eval()
    with torch.inference_mode():
        embeddings = model(torch.rand(2, 3, 64, 32))
    assert embeddings.shape == (2, model.embedding_dim)
    assert callable(ARCHS[arch]) or ARCHS[arch] == model.embedding_dim
    assert embeddings.dtype == torch.float32


def test_resnet_embedding_is_torchvisions_before_its_classifier():
    """Same weights, same images: the classifier of torchvision's network applied to our embedding gives its logits."""
    network = torchvision.models.resnet18().eval()
    model = build_model("resnet18").eval()
    model.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("fc.")})
    images = torch.rand(3, 3, 128, 64)
    with torch.inference_mode():
        torch.testing.assert_close(network.fc(model(images)), network(images))


def test_last_stride_is_two():
    model = build_model("resnet50")
    with torch.inference_mode():
        assert model[:-1](torch.rand(1, 3, 256, 128)).shape[2:] == (8, 4)  # 1/32; stride 1 would give 16 x 8


def test_embeddings_are_float32_under_autocast():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert build_model("mobilenet_v2").eval()(torch.rand(1, 3, 64, 32)).dtype == torch.float32


def prefixed(state_dict, prefix):
    return {prefix + name: tensor for name, tensor in state_dict.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {k: v for k, v in state.items() if not k.startswith("fc.")},
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


def test_weights_that_do_not_fit_are_refused(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    for change, message in [
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"conv1.weight has shape \(64, 3, 3, 3\) instead of"),
        ({"layer5.weight": torch.zeros(1)}, "layer5.weight is not part of this arch"),
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
    """As training scripts keep a best score. They are not read; the sentence says how to save the file again."""
    state = {"state_dict": torchvision.models.resnet18().state_dict(), "best": np.float64(0.5)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth holds NumPy values .* torch.save\(model.state_dict\(\), 'weights"):
        build_model("resnet18", str(tmp_path / "w.pth"))
    torch.save({**state, "best": float(state["best"])}, tmp_path / "w.pth")
    build_model("resnet18", str(tmp_path / "w.pth"))


def test_a_backbone_of_ones_own(tmp_path, monkeypatch):
    """A function in the dict. Its weights are read by the names that it gives them; ImageNet's there are none of."""

    def tiny():
        model = nn.Sequential(nn.Conv2d(3, 8, 7, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model.embedding_dim = 8
        return model

    monkeypatch.setitem(ARCHS, "tiny", tiny)
    model = build_model("tiny")
    assert model.embedding_dim == 8 and model(torch.rand(2, 3, 64, 32)).shape == (2, 8)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert torch.equal(build_model("tiny", str(tmp_path / "w.pth"))[0].weight, model[0].weight)
    with pytest.raises(ValueError, match="no ImageNet weights of tiny: pass --weights none or a file"):
        build_model("tiny", "imagenet")


def test_imagenet_weights_that_cannot_be_downloaded(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match=r"fetch https://\S+resnet18-\S+\.pth .* --weights FILE, .* --weights none"):
        build_model("resnet18", "imagenet")


def test_unknown_arch_lists_the_known_ones():
    with pytest.raises(ValueError, match="resnet50, resnet18, resnet34, resnet101, mobilenet_v2"):
        build_model("vgg")
