"""Sub-center ArcFace: ArcFace with several class vectors per identity, of which the nearest one counts.

Deng, Guo, Liu, Gong & Zafeiriou, "Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces",
ECCV 2020, https://www.ecva.net/papers/eccv_2020/papers_ECCV/html/1445_ECCV_2020_paper.php, section 3:

    cos theta_j = max over sub-centers k of   <x, W_jk> / (|x| |W_jk|)
    z_j = scale cos theta_j  for j != y,   z_y = scale cos(theta_y + margin)
    L = mean over images of   - log softmax(z)_y

margin: in radians. The paper drops, late in training, sub-centers that few images use and images far from the rest;
whether that helps on cleaner sets is disputed, and it is not part of the loss.

Deviation from the paper: where theta_y + margin > pi, z_y = scale (cos theta_y - margin sin margin), as in ArcFace's
code, so that a larger angle never costs less.

Normalises embeddings: yes.  Owns class weights: yes.  Needs P x K batches: no.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SubCenterArcFaceLoss(nn.Module):
    """Cross entropy over scaled cosines to the nearest rows of weight (C, K, D), the target's angle enlarged."""

    def __init__(
        self, num_classes: int, embedding_dim: int, sub_centers: int = 3, scale: float = 64.0, margin: float = 0.5
    ):
        super().__init__()
        if not (scale > 0 and 0 <= margin < math.pi):
            raise ValueError(f"scale must be above 0 and margin in [0, pi) radians, got {scale} and {margin}")
        if sub_centers < 1:
            raise ValueError(f"sub_centers must be at least 1, got {sub_centers}")
        weight = nn.init.xavier_normal_(torch.empty(num_classes * sub_centers, embedding_dim))
        self.weight = nn.Parameter(weight.view(num_classes, sub_centers, embedding_dim))
        self.scale = scale
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer in 0..C-1 -> scalar; another label is an error (on a CPU)."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            labels = labels.long()
            unit = F.normalize(embeddings, eps=1e-6)  # (B, D)
            weight = self.weight.flatten(0, 1)  # (C K, D)
            norm = torch.linalg.vector_norm(weight, dim=1).clamp(min=1e-6)  # (C K,)
            cosine = F.linear(unit, weight) / norm  # (B, C K)
            cosine, nearest = cosine.view(len(labels), *self.weight.shape[:2]).max(dim=2)  # (B, C) each

            # sin theta is the length of what is left of x without its part along W_y. Unlike acos or sqrt(1 - cos^2)
            # it keeps its digits, and a gradient of at most 1, where x points along W_y or away from it.
            target_cosine = cosine.gather(1, labels[:, None])  # (B, 1)
            row = labels * self.weight.shape[1] + nearest.gather(1, labels[:, None])[:, 0]  # (B,)
            target_unit = weight.index_select(0, row) / norm.index_select(0, row)[:, None]  # (B, D)
            sine = torch.linalg.vector_norm(unit - target_cosine * target_unit, dim=1, keepdim=True)  # (B, 1)
            target = torch.where(
                target_cosine >= -math.cos(self.margin),  # theta + margin <= pi
                target_cosine * math.cos(self.margin) - sine * math.sin(self.margin),  # cos(theta + margin)
                target_cosine - self.margin * math.sin(self.margin),
            )
            return F.cross_entropy(self.scale * cosine.scatter(1, labels[:, None], target), labels)
