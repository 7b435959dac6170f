"""Center loss: pull each embedding towards the running center of its identity; used beside a classifier.

Wen, Zhang, Li & Qiao, "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016,
https://doi.org/10.1007/978-3-319-46478-7_31, Eq. 2 (the loss) and Eq. 4 (the centers):

    L = mean over images of   1/2 |x_i - c_{y_i}|^2
    delta c_j = sum over images of j of (c_j - x_i) / (1 + n_j),   c_j <- c_j - alpha delta c_j

n_j: images of identity j in the batch. The centers start at zero and are moved by this rule, in training mode,
not by the optimizer: neither its learning rate nor the weight of the loss in a sum touches them.

Deviation from the paper: the mean over the batch instead of the sum.

Normalises embeddings: no.  Owns class weights: no, but centers (a buffer).  Needs P x K batches: no.
"""

import torch
from torch import Tensor, nn


class CenterLoss(nn.Module):
    """Half the mean squared distance to the centers (C, D), a buffer that forward moves in training mode."""

    def __init__(self, num_classes: int, embedding_dim: int, alpha: float = 0.5):
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        self.alpha = alpha
        self.register_buffer("centers", torch.zeros(num_classes, embedding_dim))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, D) float, labels (B,) integer in 0..C-1 -> scalar; another label is an error (on a CPU)."""
        with torch.autocast(embeddings.device.type, enabled=False):  # float32 also inside a caller's autocast
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            labels = labels.long()
            offset = embeddings - self.centers.index_select(0, labels)  # (B, D)
            loss = 0.5 * offset.pow(2).sum(dim=1).mean()
            if self.training:
                with torch.no_grad():
                    count = (labels[:, None] == labels).sum(dim=1, keepdim=True)  # (B, 1): n_j, image by image
                    self.centers.index_add_(0, labels, offset / (1 + count), alpha=self.alpha)
            return loss
