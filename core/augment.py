"""Augmentation of training frames, from MONAI's transforms: `augmentation(NAME)`.

Works on a dictionary of "image" (C, H, W) float32 in [0, 1] and "label" (1, H, W) float32 class indices.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import (
    Compose,
    MapTransform,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandGridDistortiond,
    RandomizableTransform,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandZoomd,
    SomeOf,
)

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
    return Compose([SomeOf(list(_public(size).values()), num_transforms=(0, 4))])


def _public(size: int) -> dict[str, Any]:
    """The public code's transforms by name. MONAI's affine ranges are of the map from output to input, so the scale is
    a zoom of its own; the other ranges are symmetric.
    """
    degrees = math.pi / 180
    modes = ("bilinear", "nearest")
    shear = math.tan(16 * degrees)
    return {
        "flip rows": RandFlipd(_BOTH, prob=0.5, spatial_axis=0),
        "flip columns": RandFlipd(_BOTH, prob=0.5, spatial_axis=1),
        "noise": RandGaussianNoised(_IMAGE, prob=1, std=0.005, sample_std=False),
        "blur": RandGaussianSmoothd(_IMAGE, prob=1, sigma_x=(1, 1), sigma_y=(1, 1)),
        "contrast": RandContrastd((0.5, 1.5)),
        "scale": RandZoomd(_BOTH, prob=1, min_zoom=0.5, max_zoom=2, mode=modes, padding_mode="constant"),
        "rotation": RandAffined(_BOTH, prob=1, rotate_range=40 * degrees, mode=modes, padding_mode="zeros"),
        "shear": RandAffined(_BOTH, prob=1, shear_range=((-shear, shear), 0), mode=modes, padding_mode="zeros"),
        # Lines of a 4 x 4 grid move by up to 3 % of the size.
        "piecewise": RandGridDistortiond(
            _BOTH,
            num_cells=4,
            prob=1,
            distort_limit=0.04,
            mode=modes,  # type: ignore[arg-type]  # one a key, as of the others
            padding_mode="zeros",
        ),
        "shift": RandAffined(_BOTH, prob=1, translate_range=(0.2 * size, 0.2 * size), mode=modes, padding_mode="zeros"),
    }
