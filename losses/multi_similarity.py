"""Multi-similarity loss: soft maxima over the hard positives and the hard negatives of each anchor.

Wang, Han, Huang, Dong & Scott, "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning",
CVPR 2019, https://arxiv.org/abs/1904.06627, the mining and the loss L_MS of section 4:

    P_i = positives with s_ip - epsilon < max over negatives of s_in
    N_i = negatives with s_in + epsilon > min over positives of s_ip
    L = mean over anchors i of   1/alpha log(1 + sum over P_i of exp(-alpha (s_ip - base)))
                               + 1/beta  log(1 + sum over N_i of exp( beta  (s_in - base)))

s: cosine similarity.

Deviation from the paper: base is 0.5, as in the authors' code, where the paper has 1. Unlike that code, exact
duplicates of an anchor are positives like any other. Anchors without a pair count in the mean, with 0, in both.

Normalises embeddings: yes.  Owns class weights: no.  Needs P x K batches: yes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiSimilarityLoss(nn.Module):
    """Log-sum-exp over mined positives (sharpness alpha) and negatives (beta) around the similarity base."""

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, epsilon: float = 0.1):
        super().__init__()
        if not (alpha > 0 and beta > 0):
            raise ValueError(f"alpha and beta must be above 0, got {alpha} and {beta}")
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.epsilon = epsilon

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer -> scalar; 0 for a batch that mines no pair."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            unit = F.normalize(embeddings, eps=1e-6)  # (B, D)
            similarity = unit @ unit.T  # (B, B), row = anchor
            same = labels[:, None] == labels
            positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)

            with torch.no_grad():  # the choice of pairs has no gradient
                hardest_positive = similarity.masked_fill(~positive, torch.inf).amin(dim=1, keepdim=True)  # (B, 1)
                hardest_negative = similarity.masked_fill(same, -torch.inf).amax(dim=1, keepdim=True)
                positive = positive & (similarity - hardest_negative < self.epsilon)
                negative = ~same & (hardest_positive - similarity < self.epsilon)

            pull = (-self.alpha * (similarity - self.base)).masked_fill(~positive, -torch.inf)
            push = (self.beta * (similarity - self.base)).masked_fill(~negative, -torch.inf)
            # the padded column of zeros is the 1 inside the logarithm
            pull = F.pad(pull, (1, 0)).logsumexp(dim=1) / self.alpha  # (B,)
            push = F.pad(push, (1, 0)).logsumexp(dim=1) / self.beta
            return (pull + push).mean()
