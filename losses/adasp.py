"""AdaSP (adaptive sparse pairwise loss): one positive and one negative term per identity, made for re-identification.

Zhou, Zhong, Cheng, Liang & Ma, "Adaptive Sparse Pairwise Loss for Object Re-Identification", CVPR 2023,
https://arxiv.org/abs/2303.18247, section 3. For each identity, over its images a, b (a = b included), with t the
temperature:

    h = -t log sum over a, b of exp(-s_ab / t)                          the hardest pair
    e =  t log sum over a of 1 / (sum over b of exp(-s_ab / t))         the hardest pair of the easiest image
    w = 2 h e / (h + e) if h > 0, else 0                                (a constant: no gradient through it)
    n = log sum over a, and b of other identities, of exp(s_ab / t)
    L = mean over identities of   log(1 + exp(n - (w h + (1 - w) e) / t))

s: cosine similarity. An identity of much variety (small h) is pulled by its easy pairs, another by its hard ones.

Deviation from the paper: none. Unlike in the authors' code, identities need be neither sorted nor of equal size, and
log-sum-exp takes the place of sums of exponentials, which overflow in half precision at s / t = 25.

Normalises embeddings: yes.  Owns class weights: no.  Needs P x K batches: yes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaSPLoss(nn.Module):
    """Soft gap between an identity's most similar negative and a mix of its hardest and its easiest positive."""

    def __init__(self, temperature: float = 0.04):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer -> scalar; 0 for a batch of one identity."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            unit = F.normalize(embeddings, eps=1e-6)  # (B, D)
            scaled = unit @ unit.T / self.temperature  # (B, B)
            same = labels[:, None] == labels
            lowest = torch.finfo(scaled.dtype).min  # not -inf: with one identity a row of negatives has nothing else

            def over_identity(values: Tensor) -> Tensor:  # (B,) -> (B,): log-sum-exp over the images of one's identity
                return values.expand_as(scaled).masked_fill(~same, lowest).logsumexp(dim=1)

            hard = (-scaled).masked_fill(~same, lowest).logsumexp(dim=1)  # (B,): each image's hardest pair
            hardest = -over_identity(hard)  # (B,): h / t, the same for all images of an identity; so are the next ones
            easiest = over_identity(-hard)  # e / t
            negative = over_identity(scaled.masked_fill(same, lowest).logsumexp(dim=1))

            with torch.no_grad():
                h, e = self.temperature * hardest, self.temperature * easiest
                weight = torch.where(h > 0, 2 * h * e / (h + e), 0)
            losses = F.softplus(negative - weight * hardest - (1 - weight) * easiest)
            first = ~same.tril(diagonal=-1).any(dim=1)  # (B,): one image of each identity
            return (losses * first).sum() / first.sum()
