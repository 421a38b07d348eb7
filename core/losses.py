"""Training losses: logits (B, K, H, W) float32 and labels (B, H, W) int64 to a scalar."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


class CrossEntropyDice:
    """Cross-entropy plus 1 - soft Dice of the classes but the background, in the mean of frames and classes.

    smooth   pixels added to both sides of the Dice, so that a frame without a class is judged by its false pixels
    """

    def __init__(self, smooth: float = 100.0) -> None:
        self._loss = DiceCELoss(
            include_background=False, to_onehot_y=True, softmax=True, smooth_nr=smooth, smooth_dr=smooth
        )

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        # MONAI leaves the background out of the cross-entropy's weights only: all classes count there.
        return self._loss(logits, labels[:, None])


def boundary_dou(logits: Tensor, labels: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Boundary difference over union (Sun et al., MICCAI 2023), as the public code computes it; 0 to 1.

    For each class, over the batch, with t the class's pixels as 0 or 1, p its softmax, and sums I = p t, Y = t^2,
    Z = p^2:

        loss = (Z + Y - 2 I + e) / (Z + Y - (1 + a) I + e),   a = min(2 (1 - (C + e) / (S + e)) - 1, 0.8)

    S the class's pixels, C those of them with a 4-neighbour outside the class or the frame. Mean over classes.
    """
    classes = logits.shape[1]
    truth = F.one_hot(labels, classes).permute(0, 3, 1, 2).to(logits.dtype)  # (B, H, W, K) -> (B, K, H, W)
    padded = F.pad(truth, (1, 1, 1, 1))
    inside = padded[..., :-2, 1:-1] * padded[..., 2:, 1:-1] * padded[..., 1:-1, :-2] * padded[..., 1:-1, 2:] * truth
    size = truth.sum((0, 2, 3))
    boundary = size - inside.sum((0, 2, 3))
    alpha = (2 * (1 - (boundary + epsilon) / (size + epsilon)) - 1).clamp(max=0.8)
    p = logits.softmax(1)
    overlap, y, z = (p * truth).sum((0, 2, 3)), truth.square().sum((0, 2, 3)), p.square().sum((0, 2, 3))
    loss = (z + y - 2 * overlap + epsilon) / (z + y - (1 + alpha) * overlap + epsilon)
    return loss.mean()


LOSSES: dict[str, Callable[[], Loss]] = {"ce+dice": CrossEntropyDice, "boundary-dou": lambda: boundary_dou}
