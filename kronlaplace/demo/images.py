"""Images for the demo: standardized pixels, and images turned about their centers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from kronlaplace.demo.data import ClassificationData

__all__ = ["digit_images", "turned"]

Array = npt.NDArray[np.generic]


def digit_images(
    name: str, title: str, train_x: Array, train_y: Array, test_x: Array, test_y: Array
) -> ClassificationData:
    """Digits standardized by the mean and standard deviation of the training pixels.

    The out-of-distribution inputs are the test images turned by 90 degrees.

    Args:
        name: Name of the data set.
        title: Name for readers.
        train_x: Training images, `(N, 1, H, W)`.
        train_y: Training labels from 0 to 9, `(N,)`.
        test_x: Test images.
        test_y: Test labels.
    """
    mean, std = train_x.mean(), train_x.std()

    def pixels(x: Array) -> Tensor:
        return torch.from_numpy(x.astype(np.float32)).sub_(float(mean)).div_(float(std))

    def classes(y: Array) -> Tensor:
        return torch.from_numpy(y.astype(np.int64))

    inside = pixels(test_x)
    foreign = inside.rot90(dims=(2, 3)).contiguous()
    return ClassificationData(
        name,
        title,
        10,
        pixels(train_x),
        classes(train_y),
        inside,
        classes(test_y),
        foreign,
        "test images turned by 90 degrees",
    )


def turned(images: Tensor, degrees: float, background: float) -> Tensor:
    """Turn images `(N, 1, H, W)` counterclockwise about their centers, with bilinear interpolation.

    Args:
        images: Images on the CPU.
        degrees: Angle.
        background: Value of the pixels that come from outside an image.
    """
    arrays = ndimage.rotate(images.numpy(), degrees, axes=(3, 2), reshape=False, order=1, cval=background)
    return torch.from_numpy(np.ascontiguousarray(arrays))
