"""Histogram loss: the probability that a random negative pair is more similar than a random positive pair.

Ustinova & Lempitsky, "Learning Deep Embeddings with Histogram Loss", NIPS 2016, https://arxiv.org/abs/1611.00822,
section 3:

    h_r = mean over similarities s of   max(0, 1 - |s - t_r| / width),   t_r = -1 + r width,   r = 0..num_bins
    L = sum over r of   h-_r  sum over q <= r of h+_q

h+, h-: histograms of the cosine similarities of all pairs of one identity and of two. width = 2 / num_bins.

Deviation from the paper: none. The default of 150 bins is that of the authors' PyTorch code.

Normalises embeddings: yes.  Owns class weights: no.  Needs P x K batches: yes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HistogramLoss(nn.Module):
    """Overlap of the similarity histograms of positive and negative pairs, over num_bins + 1 nodes on [-1, 1]."""

    def __init__(self, num_bins: int = 150):
        super().__init__()
        if num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, got {num_bins}")
        if num_bins > 5000:
            raise ValueError(f"num_bins must be at most 5000, since its square is kept in memory, got {num_bins}")
        self.num_bins = num_bins

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer -> scalar in [0, 1]; 0 without positive or negative pairs."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            unit = F.normalize(embeddings, eps=1e-6)  # (B, D)
            i, j = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)  # every pair once
            similarity = (unit @ unit.T)[i, j].clamp(-1, 1)  # (pairs,)
            same = (labels[i] == labels[j]).long()  # (pairs,): 0 negative, 1 positive

            # each similarity lies between two nodes and is shared among them by its distance to each
            position = (similarity + 1) * (self.num_bins / 2)  # (pairs,), in 0..num_bins
            node = position.detach().floor().clamp(max=self.num_bins - 1)  # the lower one
            upper = position - node  # (pairs,): the share of node + 1, with the gradient
            index = node.long() + same * (self.num_bins + 1)  # negatives first, then positives
            histogram = position.new_zeros(2 * (self.num_bins + 1))
            histogram = histogram.scatter_add(0, index, 1 - upper).scatter_add(0, index + 1, upper)
            positives = same.sum()
            negative = histogram[: self.num_bins + 1] / (len(same) - positives).clamp(min=1)  # (nodes,)
            positive = histogram[self.num_bins + 1 :] / positives.clamp(min=1)
            return torch.outer(negative, positive).tril().sum()  # h-_r times every h+_q with q <= r
