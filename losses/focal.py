"""Focal loss: cross entropy over the training identities in which well classified images count less.

Lin, Goyal, Girshick, He & Dollar, "Focal Loss for Dense Object Detection", ICCV 2017,
https://arxiv.org/abs/1708.02002, Eq. 4, with p from a softmax:

    z = W x + b,   p = softmax(z)_y
    L = mean over images of   - (1 - p)^gamma log p

Deviation from the paper: a softmax over identities instead of a sigmoid per class, so no alpha, which balances the
two sides of a detector; the mean over images instead of a sum over the positive ones.

Normalises embeddings: no.  Owns class weights: yes.  Needs P x K batches: no.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FocalLoss(nn.Module):
    """Linear classifier (weight (C, D), bias (C,), initialised as nn.Linear does) with focal cross entropy."""

    def __init__(self, num_classes: int, embedding_dim: int, gamma: float = 2.0):
        super().__init__()
        if gamma < 0:
            raise ValueError(f"gamma must not be negative, got {gamma}")
        linear = nn.Linear(embedding_dim, num_classes)
        self.weight, self.bias = linear.weight, linear.bias  # (C, D), (C,)
        self.gamma = gamma

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer in 0..C-1 -> scalar; another label is an error (on a CPU)."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            labels = labels.long()[:, None]  # (B, 1)
            log_p = F.linear(embeddings, self.weight, self.bias).log_softmax(dim=1)  # (B, C)
            target_log_p = log_p.gather(1, labels)[:, 0]  # (B,)
            # log(1 - p) from the other classes, as 1 - exp(log p) has no digits left where p is near 1
            others = log_p.scatter(1, labels, torch.finfo(log_p.dtype).min)  # (B, C)
            log_1_minus_p = others.logsumexp(dim=1)  # (B,)
            return -((self.gamma * log_1_minus_p).exp() * target_log_p).mean()
