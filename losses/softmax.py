"""Softmax cross entropy: classify the training identities with a linear layer, keep the embedding for retrieval.

Zheng, Yang & Hauptmann, "Person Re-identification: Past, Present and Future", 2016, https://arxiv.org/abs/1610.02984
(identities as classes); label smoothing: Szegedy et al., CVPR 2016, https://arxiv.org/abs/1512.00567, section 7:

    z = W x + b,   p = softmax(z),   q_k = (1 - eps) [k = y] + eps / C
    L = mean over images of   - sum_k q_k log p_k

eps: label_smoothing, off by default.

Deviation from the paper: none.

Normalises embeddings: no.  Owns class weights: yes.  Needs P x K batches: no.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftmaxLoss(nn.Module):
    """Linear classifier (weight (C, D), bias (C,), initialised as nn.Linear does) with cross entropy."""

    def __init__(self, num_classes: int, embedding_dim: int, label_smoothing: float = 0.0):
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        linear = nn.Linear(embedding_dim, num_classes)
        self.weight, self.bias = linear.weight, linear.bias  # (C, D), (C,)
        self.label_smoothing = label_smoothing

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer in 0..C-1 -> scalar; another label is an error (on a CPU)."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            log_p = F.linear(embeddings, self.weight, self.bias).log_softmax(dim=1)  # (B, C)
            # gather, unlike F.cross_entropy, knows no ignored label: -100 is an error like any other
            target_log_p = log_p.gather(1, labels.long()[:, None])  # (B, 1)
            return -(1 - self.label_smoothing) * target_log_p.mean() - self.label_smoothing * log_p.mean()
