"""ArcFace: classify by angle, with the angle to an image's own class made larger by a margin.

Deng, Guo, Xue & Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019,
https://arxiv.org/abs/1801.07698, Eq. 3:

    cos theta_j = <x, W_j> / (|x| |W_j|),   z_j = scale cos theta_j  for j != y,   z_y = scale cos(theta_y + margin)
    L = mean over images of   - log softmax(z)_y

margin: in radians.

Deviation from the paper: where theta_y + margin > pi, where Eq. 3 would fall again, z_y = scale (cos theta_y - margin
sin margin), as in the authors' code, so that a larger angle never costs less.

Normalises embeddings: yes.  Owns class weights: yes.  Needs P x K batches: no.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ArcFaceLoss(nn.Module):
    """Cross entropy over scaled cosines to weight (C, D), the target's angle enlarged by margin (radians)."""

    def __init__(self, num_classes: int, embedding_dim: int, scale: float = 64.0, margin: float = 0.5):
        super().__init__()
        if not (scale > 0 and 0 <= margin < math.pi):
            raise ValueError(f"scale must be above 0 and margin in [0, pi) radians, got {scale} and {margin}")
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_classes, embedding_dim)))
        self.scale = scale
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer in 0..C-1 -> scalar; another label is an error (on a CPU)."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            labels = labels.long()
            unit = F.normalize(embeddings, eps=1e-6)  # (B, D)
            norm = torch.linalg.vector_norm(self.weight, dim=1).clamp(min=1e-6)  # (C,)
            cosine = F.linear(unit, self.weight) / norm  # (B, C); cheaper than a normalised copy of the weight

            # sin theta is the length of what is left of x without its part along W_y. Unlike acos or sqrt(1 - cos^2)
            # it keeps its digits, and a gradient of at most 1, where x points along W_y or away from it.
            target_cosine = cosine.gather(1, labels[:, None])  # (B, 1)
            target_unit = self.weight.index_select(0, labels) / norm.index_select(0, labels)[:, None]  # (B, D)
            sine = torch.linalg.vector_norm(unit - target_cosine * target_unit, dim=1, keepdim=True)  # (B, 1)
            target = torch.where(
                target_cosine >= -math.cos(self.margin),  # theta + margin <= pi
                target_cosine * math.cos(self.margin) - sine * math.sin(self.margin),  # cos(theta + margin)
                target_cosine - self.margin * math.sin(self.margin),
            )
            return F.cross_entropy(self.scale * cosine.scatter(1, labels[:, None], target), labels)
