"""SphereFace (A-softmax): classify by angle and length, with the angle to an image's own class multiplied by a margin.

Liu, Wen, Yu, Li, Raj & Song, "SphereFace: Deep Hypersphere Embedding for Face Recognition", CVPR 2017,
https://arxiv.org/abs/1704.08063, the loss L_ang with psi of section 3, annealed by lambda as in the authors' code:

    z_j = |x| cos theta_j for j != y,   z_y = |x| (lambda cos theta_y + psi(theta_y)) / (1 + lambda)
    psi(theta) = (-1)^k cos(margin theta) - 2 k   for theta in [k pi / margin, (k + 1) pi / margin]
    lambda(t) = max(lambda_min, lambda_base (1 + lambda_gamma t)^(-lambda_power)),   t = 1, 2, ... training steps
    L = mean over images of   - log softmax(z)_y

theta_j: angle between x and W_j. margin = 1 is the modified softmax without a margin, z_j = |x| cos theta_j.

Deviation from the paper: none in the value. Its gradient is the derivative, which the authors' layer rescales.

Normalises embeddings: no (the class weights only).  Owns class weights: yes.  Needs P x K batches: no.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SphereFaceLoss(nn.Module):
    """A-softmax with weight (C, D) and the buffer step, which counts the forward passes in training mode."""

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        margin: int = 4,
        lambda_base: float = 1000.0,
        lambda_gamma: float = 0.12,
        lambda_power: float = 1.0,
        lambda_min: float = 5.0,
    ):
        super().__init__()
        if margin < 1 or margin != int(margin):
            raise ValueError(f"margin must be a whole number from 1 up, got {margin}")
        if margin > 16:
            raise ValueError(f"margin must be at most 16, got {margin}")
        if min(lambda_base, lambda_gamma, lambda_power, lambda_min) < 0:
            raise ValueError("lambda_base, lambda_gamma, lambda_power and lambda_min must not be negative")
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_classes, embedding_dim)))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.margin = int(margin)
        self.lambda_base = lambda_base
        self.lambda_gamma = lambda_gamma
        self.lambda_power = lambda_power
        self.lambda_min = lambda_min

    def annealing(self, step: int | Tensor) -> Tensor:
        """lambda at a training step (1 is the first); scalar. lambda_base = 0 fixes it at lambda_min."""
        decay = (1.0 + self.lambda_gamma * torch.as_tensor(step)) ** -self.lambda_power
        return (self.lambda_base * decay).clamp(min=self.lambda_min)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer in 0..C-1 -> scalar; another label is an error (on a CPU)."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            labels = labels.long()
            if self.training:
                with torch.no_grad():
                    self.step.add_(1)

            norm = torch.linalg.vector_norm(self.weight, dim=1).clamp(min=1e-6)  # (C,)
            logits = F.linear(embeddings, self.weight) / norm  # (B, C) = |x| cos theta
            length = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)  # (B, 1)
            target = logits.gather(1, labels[:, None])  # (B, 1)
            cosine = target / length.clamp(min=1e-6)

            before, multiple = torch.ones_like(cosine), cosine  # cos(0 theta), cos(1 theta)
            for _ in range(self.margin - 1):  # cos((n + 1) theta) = 2 cos theta cos(n theta) - cos((n - 1) theta)
                before, multiple = multiple, 2 * cosine * multiple - before
            theta = cosine.detach().clamp(-1, 1).acos()
            k = (theta * (self.margin / math.pi)).floor().clamp(max=self.margin - 1)  # (B, 1), no gradient
            psi = (1 - 2 * (k % 2)) * multiple - 2 * k

            # (lambda cos + psi) / (1 + lambda), in the form that also holds for an infinite lambda
            target = target + length * (psi - cosine) / (1 + self.annealing(self.step.to(cosine.dtype)))
            return F.cross_entropy(logits.scatter(1, labels[:, None], target), labels)
