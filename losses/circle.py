"""Circle loss: push every similarity towards its optimum, the harder the farther it is from there.

Sun, Cheng, Zhang, Zhang, Zheng, Wang & Wei, "Circle Loss: A Unified Perspective of Pair Similarity Optimization",
CVPR 2020, https://arxiv.org/abs/2002.10857, Eq. 5 and 6, with the paper's choice of optima and margins:

    a_p = max(0, 1 + margin - s_ip),   a_n = max(0, s_in + margin)         (constants: no gradient through them)
    L = mean over anchors i of   log(1 + sum over negatives n of exp(scale a_n (s_in - margin))
                                       * sum over positives p of exp(-scale a_p (s_ip - 1 + margin)))

s: cosine similarity. The exponents reach scale (2 + margin) (2 - margin), 504 with the defaults: exp before log
overflows in float32, the nan that peers report (github.com/qianjinhao/circle-loss/issues/2). And a mask that multiplies
the exponents leaves exp(0) = 1 for every pair that is none. Hence log-sum-exp, with the mask inside. The authors of
fast-reid recommend few identities per batch (github.com/JDAI-CV/fast-reid/issues/99).

Deviation from the paper: the mean is over the anchors that have a positive and a negative in the batch. The defaults
are those of the paper for person re-identification.

Normalises embeddings: yes.  Owns class weights: no.  Needs P x K batches: yes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CircleLoss(nn.Module):
    """Soft gap between all negatives and all positives of an anchor, each weighted by its distance to its optimum."""

    def __init__(self, scale: float = 128.0, margin: float = 0.25):
        super().__init__()
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.scale = scale
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer -> scalar; 0 for a batch without a valid anchor."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            unit = F.normalize(embeddings, eps=1e-6)  # (B, D)
            similarity = unit @ unit.T  # (B, B), row = anchor
            same = labels[:, None] == labels
            positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
            valid = positive.any(dim=1) & ~same.all(dim=1)  # (B,)

            positive_weight = F.relu(1 + self.margin - similarity.detach())  # (B, B)
            negative_weight = F.relu(similarity.detach() + self.margin)
            pull = -self.scale * positive_weight * (similarity - 1 + self.margin)
            push = self.scale * negative_weight * (similarity - self.margin)
            lowest = torch.finfo(similarity.dtype).min  # not -inf: a row may have nothing else
            pull = pull.masked_fill(~positive, lowest).logsumexp(dim=1)  # (B,)
            push = push.masked_fill(same, lowest).logsumexp(dim=1)
            return (F.softplus(pull + push) * valid).sum() / valid.sum().clamp(min=1)
