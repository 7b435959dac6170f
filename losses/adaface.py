"""AdaFace: classify by angle, with a margin that asks more of images with long embeddings, taken for good ones.

Kim, Jain & Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022, https://arxiv.org/abs/2204.00964,
section 3.3:

    q = clip((|x| - mean) / std * concentration, -1, 1)                   (a constant: no gradient through it)
    z_j = scale cos theta_j  for j != y,   z_y = scale (cos(clip(theta_y + g, 0, pi)) - g')
    g = -margin q,   g' = margin + margin q
    L = mean over images of   - log softmax(z)_y

theta_j: angle between x and W_j. q = -1 is ArcFace, q = 0 CosFace. mean and std of the lengths |x| (from 0.001 to 100)
are running statistics: they start at 20 and 100, and each training step moves them by momentum towards those of its
batch, before they are used. So q means little in the first 1 / momentum steps or more, and where several processes
train, each must be given the whole batch, or their statistics and margins differ.

Deviation from the paper: none in the formula. The authors also keep all cosines within 0.999 and angles 0.001 away from
0 and pi, against infinite gradients, which this form does not have.

Normalises embeddings: yes.  Owns class weights: yes.  Needs P x K batches: no.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaFaceLoss(nn.Module):
    """Cross entropy over scaled cosines to weight (C, D); buffers mean and std follow the lengths of the embeddings."""

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        scale: float = 64.0,
        margin: float = 0.4,
        concentration: float = 0.333,
        momentum: float = 0.01,
    ):
        super().__init__()
        if not (scale > 0 and 0 <= margin < math.pi):
            raise ValueError(f"scale must be above 0 and margin in [0, pi) radians, got {scale} and {margin}")
        if not (concentration >= 0 and 0 <= momentum <= 1):
            raise ValueError(f"concentration must be >= 0, momentum in [0, 1], got {concentration} and {momentum}")
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_classes, embedding_dim)))
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))
        self.scale = scale
        self.margin = margin
        self.concentration = concentration
        self.momentum = momentum

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer in 0..C-1 -> scalar; another label is an error (on a CPU)."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            labels = labels.long()
            unit = F.normalize(embeddings, eps=1e-6)  # (B, D)
            norm = torch.linalg.vector_norm(self.weight, dim=1).clamp(min=1e-6)  # (C,)
            cosine = F.linear(unit, self.weight) / norm  # (B, C)
            target_cosine = cosine.gather(1, labels[:, None])  # (B, 1)

            with torch.no_grad():
                length = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True).clamp(0.001, 100)  # (B, 1)
                if self.training:
                    self.mean.lerp_(length.mean(), self.momentum)
                    if len(labels) > 1:  # one image has no standard deviation
                        self.std.lerp_(length.std(), self.momentum)
                quality = ((length - self.mean) / (self.std + 1e-3) * self.concentration).clamp(-1, 1)
                g = -self.margin * quality  # (B, 1), radians

            target_unit = self.weight.index_select(0, labels) / norm.index_select(0, labels)[:, None]  # (B, D)
            # sin theta as a length keeps its digits and a bounded gradient where x points along W_y or away from it
            sine = torch.linalg.vector_norm(unit - target_cosine * target_unit, dim=1, keepdim=True)  # (B, 1)
            shifted = target_cosine * g.cos() - sine * g.sin()  # cos(theta + g)
            shifted = torch.where((g < 0) & (target_cosine > g.cos()), 1, shifted)  # theta + g < 0
            shifted = torch.where((g > 0) & (target_cosine < -g.cos()), -1, shifted)  # theta + g > pi
            target = shifted - (self.margin + self.margin * quality)
            return F.cross_entropy(self.scale * cosine.scatter(1, labels[:, None], target), labels)
