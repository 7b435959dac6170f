"""Batch-hard triplet loss: per anchor, the farthest positive must be nearer than the nearest negative by a margin.

Hermans, Beyer & Leibe, "In Defense of the Triplet Loss for Person Re-Identification", 2017,
https://arxiv.org/abs/1703.07737, the batch hard loss L_BH of section 2, and its soft margin:

    d+ = max over p != a, y_p = y_a of d_ap,   d- = min over y_n != y_a of d_an
    L = mean over anchors a of   max(0, margin + d+ - d-)         with a margin
                                 log(1 + exp(d+ - d-))            margin = None, the soft margin

d: Euclidean distance, not squared.

Deviation from the paper: the mean is over the anchors that have a positive and a negative in the batch, so that
any batch will do; P x K batches, which the paper uses, have no others. The paper sums; it prefers the soft margin.

Normalises embeddings: no.  Owns class weights: no.  Needs P x K batches: yes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TripletLoss(nn.Module):
    """Triplet loss with the hardest positive and negative of each anchor; margin None is the soft margin."""

    def __init__(self, margin: float | None = 0.3):
        super().__init__()
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer -> scalar; 0 for a batch without a valid anchor."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            same = labels[:, None] == labels  # (B, B), row = anchor
            positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
            valid = positive.any(dim=1) & ~same.all(dim=1)  # (B,)

            with torch.no_grad():  # choose first: only the chosen distances get a gradient
                distance = embeddings.new_zeros(len(labels), len(labels))
                i, j = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
                # pdist subtracts the vectors; |x|^2 + |y|^2 - 2xy has no digit left where d is small beside |x|
                distance[i, j] = distance[j, i] = F.pdist(embeddings)
                farthest = distance.masked_fill(~positive, -1).argmax(dim=1)  # (B,)
                nearest = distance.masked_fill(same, torch.inf).argmin(dim=1)  # (B,)

            # the gradient of vector_norm is 0, not infinite, where two embeddings are equal
            to_positive = torch.linalg.vector_norm(embeddings - embeddings.index_select(0, farthest), dim=1)  # (B,)
            to_negative = torch.linalg.vector_norm(embeddings - embeddings.index_select(0, nearest), dim=1)  # (B,)
            gap = to_positive - to_negative
            losses = F.softplus(gap) if self.margin is None else F.relu(self.margin + gap)
            return (losses * valid).sum() / valid.sum().clamp(min=1)
