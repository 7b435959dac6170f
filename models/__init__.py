"""Backbones: images (B, 3, H, W) -> embeddings (B, D). `build_model(arch, weights, ...)` is all a script needs."""

from models.backbone import ARCHS, build_model, model_options

__all__ = ["ARCHS", "build_model", "model_options"]
