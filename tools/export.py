"""Writes a trained run's network as an ONNX file, which runs without this project and without torch.

    python -m tools.export --run runs/X model.onnx              pictures in, uint8 (B, height, width, 3), RGB
    python -m tools.export --run runs/X model.onnx --floats     normalised floats in, (B, 3, height, width)

Out comes `embedding` (B, D) float32; B is free. The normalisation is inside unless --floats. The file's
metadata: height, width, mean, std, arch, loss, dataset, run, epoch, commit. It is written only if onnxruntime's
embeddings of random pictures are those of torch. Needs pip install onnx onnxscript onnxruntime.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.images import MEAN, STD
from tools.embedding import Run, open_run
from utils.checkpoint import load_checkpoint
from utils.errors import UserError, script
from utils.files import write_atomically

TOLERANCE = 1e-4  # largest difference from torch, in parts of the longest embedding
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class FromPictures(nn.Module):
    """uint8 (B, H, W, 3) RGB -> embeddings (B, D): data.images.normalise and the network."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(MEAN))
        self.register_buffer("std", 255 * torch.tensor(STD))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.model(((pictures.float() - self.mean) / self.std).permute(0, 3, 1, 2))


def to_onnx(run: Run, floats: bool):
    """The run's network on the CPU as an onnx.ModelProto, with its metadata."""
    height, width = run.args["height"], run.args["width"]
    network = run.model.float().to("cpu", memory_format=torch.contiguous_format)
    network = (network if floats else FromPictures(network)).eval()
    example = torch.zeros(2, 3, height, width) if floats else torch.zeros(2, height, width, 3, dtype=torch.uint8)
    program = torch.onnx.export(
        network, (example,), dynamo=True, verbose=False, input_names=["pictures"], output_names=["embedding"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )  # fmt: skip
    proto = program.model_proto
    values = {key: run.args[key] for key in ("height", "width", "arch", "loss", "dataset", "metric", "flip_test")}
    values |= {"mean": MEAN, "std": STD, "run": run.name, "epoch": load_checkpoint(run.folder / "last.pt")["epoch"]}
    values["commit"] = run.args["environment"].get("commit")
    values["input"] = "normalised floats (B, 3, H, W)" if floats else "uint8 (B, H, W, 3), RGB"
    for key, value in values.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    return proto, network


def difference(proto, network: nn.Module, floats: bool, height: int, width: int) -> float:
    """Largest difference of onnxruntime's embeddings from torch's, random pictures in batches of 1 and 5; relative."""
    import onnxruntime

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    rng, worst = np.random.default_rng(0), 0.0
    for batch in (1, 5):
        pictures = rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
        if floats:
            pictures = ((pictures / 255 - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2).copy()
        (found,) = session.run(None, {"pictures": pictures})
        with torch.inference_mode():
            wanted = network(torch.from_numpy(pictures)).numpy()
        worst = max(worst, float(np.abs(found - wanted).max() / np.linalg.norm(wanted, axis=1).max()))
    return worst


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     prog="python -m tools.export")  # fmt: skip
    parser.add_argument("out", type=Path, help="the .onnx file to write")
    parser.add_argument("--floats", action="store_true", help="take normalised floats instead of uint8 pictures")
    parser.add_argument("--run", type=Path, required=True, help="a run folder made by train.py")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"{args.out} exists: delete it or choose another name")
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"the export needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    run = open_run(args.run, "cpu", workers=0)
    proto, network = to_onnx(run, args.floats)
    worst = difference(proto, network, args.floats, run.args["height"], run.args["width"])
    if not worst <= TOLERANCE:
        raise UserError(f"onnxruntime's embeddings differ from torch's by {worst:.1e} of their length: nothing written")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, lambda file: file.write(proto.SerializeToString()))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, within {worst:.1e} of torch's embeddings")
    if run.args["flip_test"]:
        print("The run was scored with --flip-test: the mean of two embeddings, a picture's and its mirror image's, of "
              "which this file makes one.")  # fmt: skip


if __name__ == "__main__":
    script("tools.export", main)
