"""CosFace (large margin cosine loss): classify by angle, with a margin taken off the cosine to an image's own class.

Wang, Wang, Zhou, Ji, Gong, Zhou, Li & Liu, "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018,
https://arxiv.org/abs/1801.09414, Eq. 4:

    cos theta_j = <x, W_j> / (|x| |W_j|),   z_j = scale (cos theta_j - margin [j = y])
    L = mean over images of   - log softmax(z)_y

Deviation from the paper: none. The default scale of 30 is that of public code; the paper uses 64.

Normalises embeddings: yes.  Owns class weights: yes.  Needs P x K batches: no.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosFaceLoss(nn.Module):
    """Cross entropy over scaled cosines to weight (C, D), the target's cosine lowered by margin."""

    def __init__(self, num_classes: int, embedding_dim: int, scale: float = 30.0, margin: float = 0.35):
        super().__init__()
        if not (scale > 0 and margin >= 0):
            raise ValueError(f"scale must be above 0 and margin not negative, got {scale} and {margin}")
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_classes, embedding_dim)))
        self.scale = scale
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer in 0..C-1 -> scalar; another label is an error (on a CPU)."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            labels = labels.long()
            unit = F.normalize(embeddings, eps=1e-6)  # (B, D)
            norm = torch.linalg.vector_norm(self.weight, dim=1).clamp(min=1e-6)  # (C,)
            cosine = F.linear(unit, self.weight) / norm  # (B, C); cheaper than a normalised copy of the weight
            target = cosine.gather(1, labels[:, None]) - self.margin  # (B, 1)
            return F.cross_entropy(self.scale * cosine.scatter(1, labels[:, None], target), labels)
