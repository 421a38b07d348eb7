"""Augmentation of training frames, from MONAI's transforms: `augmentation(NAME)`.

Works on a dictionary of "image" (C, H, W) float32 in [0, 1] and "label" (1, H, W) float32 class indices.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

from monai.data import set_track_meta
from monai.transforms import (
    Compose,
    MapTransform,
    Rand2DElasticd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandomizableTransform,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SomeOf,
)

set_track_meta(False)  # transforms are never undone here, and the bookkeeping costs more than they do

AUGMENTATIONS = ("none", "light", "full")
_BOTH, _IMAGE = ("image", "label"), ("image",)


class RandContrastd(RandomizableTransform, MapTransform):
    """Contrast changed about mid-grey: x -> 0.5 + f (x - 0.5). MONAI's own changes it about the mean, or is a gamma."""

    def __init__(self, factors: tuple[float, float]) -> None:
        MapTransform.__init__(self, _IMAGE)
        RandomizableTransform.__init__(self, 1.0)
        self._range = factors

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.randomize(None)
        factor = self.R.uniform(*self._range)
        return dict(data) | {key: 0.5 + factor * (data[key] - 0.5) for key in self.key_iterator(dict(data))}


def _affine(**ranges: Any) -> RandAffined:
    return RandAffined(_BOTH, prob=1, mode=("bilinear", "nearest"), padding_mode="zeros", **ranges)


def augmentation(name: str, size: int) -> Compose:
    """One of `AUGMENTATIONS` for frames of `size` rows and columns; reproducible through `set_random_state`.

    none    nothing
    light   mirrored left to right; gain and offset changed a little
    full    up to four of the public code's nine, with its ranges
    """
    if name == "none":
        return Compose([])
    if name == "light":
        return Compose(
            [
                RandFlipd(_BOTH, prob=0.5, spatial_axis=1),
                RandScaleIntensityd(_IMAGE, prob=1, factors=0.15),
                RandShiftIntensityd(_IMAGE, prob=1, offsets=0.075),
            ]
        )
    degrees = math.pi / 180
    return Compose(
        [
            SomeOf(
                [
                    RandFlipd(_BOTH, prob=0.5, spatial_axis=0),
                    RandFlipd(_BOTH, prob=0.5, spatial_axis=1),
                    RandGaussianNoised(_IMAGE, prob=1, std=0.005, sample_std=False),
                    RandGaussianSmoothd(_IMAGE, prob=1, sigma_x=(1, 1), sigma_y=(1, 1)),
                    RandContrastd((0.5, 1.5)),
                    # MONAI's ranges are of the map from output to input: a scale of 0.5 to 2 is one of 2 to 0.5.
                    _affine(scale_range=((-0.5, 1.0), (-0.5, 1.0))),
                    _affine(rotate_range=40 * degrees),
                    _affine(shear_range=(math.tan(16 * degrees), math.tan(16 * degrees))),
                    # The public code moves the knots of a 4 x 4 grid by 0.8 to 3 % of the size.
                    Rand2DElasticd(
                        _BOTH,
                        spacing=(size / 3, size / 3),
                        magnitude_range=(0.008 * size, 0.03 * size),
                        prob=1,
                        mode=("bilinear", "nearest"),
                        padding_mode="zeros",
                    ),
                    _affine(translate_range=(0.2 * size, 0.2 * size)),
                ],
                num_transforms=(0, 4),
            )
        ]
    )
