"""Weighted triplet loss of AGW: softmax-weighted mean distances instead of the hardest ones, and no margin to choose.

Ye, Shen, Lin, Xiang, Shao & Hoi, "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI 2021,
https://arxiv.org/abs/2001.04193, the weighted regularization triplet loss of section 4.2:

    w_ip = softmax of  d_ip over the positives p of i,   w_in = softmax of -d_in over the negatives n of i
    L = mean over anchors i of   log(1 + exp(sum over p of w_ip d_ip - sum over n of w_in d_in))

d: Euclidean distance, not squared. The weights are differentiated, too, as in the authors' code.

Deviation from the paper: the mean is over the anchors that have a positive and a negative in the batch. Unlike in the
authors' code an anchor is not its own positive, and far negatives keep their weight: its softmax is not shifted.

Normalises embeddings: no.  Owns class weights: no.  Needs P x K batches: yes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightedTripletLoss(nn.Module):
    """Soft-margin triplet loss in which far positives and near negatives weigh more."""

    def __init__(self):
        super().__init__()

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer -> scalar; 0 for a batch without a valid anchor."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            same = labels[:, None] == labels  # (B, B), row = anchor
            positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
            valid = positive.any(dim=1) & ~same.all(dim=1)  # (B,)

            # subtracts the vectors: |x|^2 + |y|^2 - 2xy has no digit left where d is small beside |x|. Its gradient is
            # 0, not infinite, where two embeddings are equal.
            distance = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")  # (B, B)
            lowest = torch.finfo(distance.dtype).min  # not -inf: a row may have nothing else
            positive_weight = distance.masked_fill(~positive, lowest).softmax(dim=1)  # (B, B)
            negative_weight = (-distance).masked_fill(same, lowest).softmax(dim=1)
            gap = ((positive_weight - negative_weight) * distance).sum(dim=1)  # (B,)
            return (F.softplus(gap) * valid).sum() / valid.sum().clamp(min=1)
