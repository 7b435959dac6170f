"""Smooth-AP: one minus the average precision of each image as a query in the batch, with sigmoids as comparisons.

Brown, Xie, Kalogeiton & Zisserman, "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval", ECCV 2020,
https://arxiv.org/abs/2007.12163, section 4:

    G(z) = 1 / (1 + exp(-z / temperature))
    r+_ij = 1 + sum over positives k != j of i of G(s_ik - s_ij)
    r_ij  = r+_ij + sum over negatives n of i of G(s_in - s_ij)
    L = mean over anchors i of   1 - mean over positives j of i of   r+_ij / r_ij

s: cosine similarity. r_ij is the rank of j in the list of i, r+_ij its rank among the positives. With a temperature
towards 0, 1 - L is the mAP of the batch. Larger batches do better, say the authors
(github.com/Andrew-Brown1/Smooth_AP/issues/3); a user of theirs found it below CosFace on people (issues/1 there). It
takes memory for (pairs of one identity) x B numbers, not for B^3. To know how many pairs there are, it waits for a GPU.

Deviation from the paper: an anchor is not in its own list, which the authors' code has; any number of images per
identity will do, where that code wants as many of each. Anchors without a positive are left out.

Normalises embeddings: yes.  Owns class weights: no.  Needs P x K batches: yes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmoothAPLoss(nn.Module):
    """1 - smooth average precision, in [0, 1); a small temperature is near the true ranks, a large one is smooth."""

    def __init__(self, temperature: float = 0.01):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer -> scalar; 0 for a batch without a pair of one identity."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            unit = F.normalize(embeddings, eps=1e-6)  # (B, D)
            similarity = unit @ unit.T  # (B, B)
            same = labels[:, None] == labels
            positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)

            i, j = positive.nonzero(as_tuple=True)  # (pairs,) each: anchor and positive
            rows = similarity.index_select(0, i)  # (pairs, B)
            above = torch.sigmoid((rows - rows.gather(1, j[:, None])) / self.temperature)  # how far k is above j
            others = positive.index_select(0, i).scatter(1, j[:, None], False)  # (pairs, B): the positives but j
            rank_in_positives = 1 + (above * others).sum(dim=1)  # (pairs,)
            rank = rank_in_positives + (above * ~same.index_select(0, i)).sum(dim=1)

            count = positive.sum(dim=1)  # (B,)
            losses = (1 - rank_in_positives / rank) / count.index_select(0, i)  # (pairs,)
            return losses.sum() / (count > 0).sum().clamp(min=1)
