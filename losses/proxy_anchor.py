"""Proxy-anchor loss: a learned proxy per identity is the anchor, the images of the batch its positives and negatives.

Kim, Kim, Cho & Kwak, "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, https://arxiv.org/abs/2003.13911, Eq. 4:

    L = mean over identities c of the batch of   log(1 + sum over x of c     of exp(-scale (s(x, w_c) - margin)))
      + mean over all C identities c of          log(1 + sum over x not of c of exp( scale (s(x, w_c) + margin)))

s: cosine similarity, w_c: proxy of c. The authors train the proxies with 100 times the learning rate of the network
(github.com/tjddus9597/Proxy-Anchor-CVPR2020): give loss_fn.parameters() a group of their own in the optimizer.

Deviation from the paper: none.

Normalises embeddings: yes.  Owns class weights: yes (the proxies).  Needs P x K batches: no.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProxyAnchorLoss(nn.Module):
    """Log-sum-exp over the images that are near the wrong proxy or far from their own, a row of weight (C, D)."""

    def __init__(self, num_classes: int, embedding_dim: int, scale: float = 32.0, margin: float = 0.1):
        super().__init__()
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(num_classes, embedding_dim), mode="fan_out"))
        self.scale = scale
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer in 0..C-1 -> scalar; another label is an error (on a CPU)."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            unit = F.normalize(embeddings, eps=1e-6)  # (B, D)
            norm = torch.linalg.vector_norm(self.weight, dim=1).clamp(min=1e-6)  # (C,)
            cosine = F.linear(unit, self.weight) / norm  # (B, C); cheaper than a normalised copy of the weight
            own = torch.zeros_like(cosine, dtype=torch.bool).scatter(1, labels.long()[:, None], True)  # (B, C)

            pull = (-self.scale * (cosine - self.margin)).masked_fill(~own, -torch.inf)
            push = (self.scale * (cosine + self.margin)).masked_fill(own, -torch.inf)
            # the padded row of zeros is the 1 inside the logarithm
            pull = F.pad(pull, (0, 0, 1, 0)).logsumexp(dim=0)  # (C,): 0 for an identity that is not in the batch
            push = F.pad(push, (0, 0, 1, 0)).logsumexp(dim=0)
            return pull.sum() / own.any(dim=0).sum() + push.mean()
