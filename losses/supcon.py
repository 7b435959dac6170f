"""Supervised contrastive loss: each positive must stand out in a softmax over all other images of the batch.

Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu & Krishnan, "Supervised Contrastive Learning", NeurIPS 2020,
https://arxiv.org/abs/2004.11362, Eq. 2 (the sum over positives outside the logarithm):

    L = mean over anchors i of   - mean over positives p of i of   log(exp(s_ip / t) / sum over a != i of exp(s_ia / t))

s: cosine similarity, t: temperature.

Deviation from the paper: one view of each image, so the positives are the other images of its identity; the mean is
over the anchors that have one. The authors' code multiplies by t over a base temperature, which is not done here.

Normalises embeddings: yes.  Owns class weights: no.  Needs P x K batches: yes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SupConLoss(nn.Module):
    """Cross entropy of the positives in a softmax over scaled cosine similarities, without the anchor itself."""

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer -> scalar; 0 for a batch without a pair of one identity."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            unit = F.normalize(embeddings, eps=1e-6)  # (B, D)
            logits = unit @ unit.T / self.temperature  # (B, B), row = anchor
            itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
            positive = (labels[:, None] == labels) & ~itself
            count = positive.sum(dim=1)  # (B,)

            # not -inf: a batch of one image has nothing else in its row
            log_p = logits.masked_fill(itself, torch.finfo(logits.dtype).min).log_softmax(dim=1)
            losses = -log_p.masked_fill(~positive, 0).sum(dim=1) / count.clamp(min=1)  # (B,)
            return losses.sum() / (count > 0).sum().clamp(min=1)
