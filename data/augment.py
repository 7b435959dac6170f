"""Random changes of a training batch, one function each, for the whole batch on its device.

Images are uint8 (B, H, W, 3), but for random erasing. What is random comes in as numbers in 0..1, drawn elsewhere; none
of these functions waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ATTEMPTS = 10  # of random erasing to find a rectangle that fits; at 256x128 one in twenty does not


def window(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Of each image (B, H, W, 3) the part (height, width) whose corner is top, left (B,)."""
    rows = top[:, None] + torch.arange(height, device=images.device)  # (B, height)
    columns = left[:, None] + torch.arange(width, device=images.device)  # (B, width)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return images[each, rows[:, :, None], columns[:, None, :]]  # (B, height, width, 3)


def random_crop(images: Tensor, enlarged: Tensor, draws: Tensor) -> Tensor:
    """Half of the images are replaced by a window of their enlarged copies (B, H', W', 3).

    draws (B, 3): cropped?, vertical and horizontal place.
    """
    _, H, W, _ = images.shape
    top = (draws[:, 1] * (enlarged.shape[1] - H + 1)).long()  # (B,)
    left = (draws[:, 2] * (enlarged.shape[2] - W + 1)).long()
    return torch.where((draws[:, 0] < 0.5)[:, None, None, None], window(enlarged, top, left, H, W), images)


def pad_crop(images: Tensor, pixels: int, draws: Tensor) -> Tensor:
    """A black border of `pixels` on all sides, then a window of the old size. draws (B, 2): its place."""
    _, H, W, _ = images.shape
    top, left = (draws * (2 * pixels + 1)).long().unbind(dim=1)  # (B,), 0..2 * pixels
    return window(F.pad(images, (0, 0, pixels, pixels, pixels, pixels)), top, left, H, W)


def flip(images: Tensor, draws: Tensor) -> Tensor:
    """Half of the images are mirrored. draws (B,)."""
    return torch.where((draws < 0.5)[:, None, None, None], images.flip(2), images)


def erasing_boxes(draws: Tensor, probability: float, H: int, W: int) -> Tensor:
    """Rectangles to erase (..., 4): top, bottom, left, right; without any pixel where nothing is to be erased.

    Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, with the values of reid-strong-baseline: an area of
    0.02 to 0.4 of the image and a height over width of 0.3 to 1/0.3, both uniform, drawn anew until the rectangle is
    smaller than the image. draws (..., 3 + 2 * ATTEMPTS): erased?, place (2), and per attempt area and aspect.
    """
    erased, down, across = draws[..., :3].unbind(dim=-1)
    area, aspect = draws[..., 3:].unflatten(-1, (ATTEMPTS, 2)).unbind(dim=-1)  # (..., ATTEMPTS)
    area = (0.02 + (0.4 - 0.02) * area) * H * W
    aspect = 0.3 + (1 / 0.3 - 0.3) * aspect
    height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (height < H) & (width < W)
    first = fits.int().argmax(dim=-1, keepdim=True)
    erased = (erased < probability) & fits.any(dim=-1)
    height, width = (size.gather(-1, first).squeeze(-1) * erased for size in (height, width))
    top, left = (down * (H - height + 1)).long(), (across * (W - width + 1)).long()
    return torch.stack([top, top + height.long(), left, left + width.long()], dim=-1)


def random_erasing(images: Tensor, boxes: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) with the rectangles `boxes` (B, 4) of `erasing_boxes` set to 0, the mean."""
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    top, bottom, left, right = boxes[:, :, None].unbind(dim=1)  # (B, 1)
    down = (rows >= top) & (rows < bottom)  # (B, H)
    across = (columns >= left) & (columns < right)  # (B, W)
    return images * ~(down[:, None, :, None] & across[:, None, None, :])  # stays channels_last, unlike masked_fill
