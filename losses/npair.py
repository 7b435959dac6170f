"""Multi-class N-pair loss: an anchor must be more similar to its own positive than to those of all other identities.

Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016,
https://papers.nips.cc/paper/6200-improved-deep-metric-learning-with-multi-class-n-pair-loss-objective,
the loss L_N-pair-mc of section 3.2 with its penalty on the length of the embeddings:

    L = mean over pairs i of   log(1 + sum over j != i of exp(a_i . p_j - a_i . p_i))  +  l2 / 4 (|a_i|^2 + |p_i|^2)

(a_i, p_i): the first two images, in batch order, of each identity with at least two. Further images are not used.

Deviation from the paper: no mining of hard classes. The paper gives no l2; 0.002 / 4 is the TensorFlow form of it.

Normalises embeddings: no.  Owns class weights: no.  Needs P x K batches: yes (K = 2 uses every image).
"""

import torch
from torch import Tensor, nn


class NPairLoss(nn.Module):
    """Softmax over the dot products of each anchor with all positives, plus l2 / 4 times the squared lengths."""

    def __init__(self, l2: float = 0.002):
        super().__init__()
        if l2 < 0:
            raise ValueError(f"l2 must not be negative, got {l2}")
        self.l2 = l2

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer -> scalar; 0 for a batch without a pair of one identity."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            same = labels[:, None] == labels  # (B, B)
            earlier = same.tril(diagonal=-1).sum(dim=1)  # (B,): earlier images of the same identity
            second = (same & (earlier == 1)).int().argmax(dim=1)  # (B,): the second image of one's identity, if any
            is_anchor = (earlier == 0) & (same.sum(dim=1) > 1)  # (B,): N of them; the other rows are idle

            product = embeddings @ embeddings.T  # (B, B)
            squared_length = product.diagonal()  # (B,)
            # column j: the positive of j. Columns of idle rows are hidden, but each row keeps its own, to stay finite.
            hidden = ~is_anchor & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
            log_softmax = product.index_select(1, second).masked_fill(hidden, -torch.inf).log_softmax(dim=1)
            penalty = self.l2 / 4 * (squared_length + squared_length.index_select(0, second))  # (B,)
            losses = penalty - log_softmax.diagonal()
            return (losses * is_anchor).sum() / is_anchor.sum().clamp(min=1)
