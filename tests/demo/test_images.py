"""Images are turned about their centers, and nothing else happens to them."""

import pytest
import torch

from kronlaplace.demo.images import turned


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("quarters", range(3))
def test_quarter_turns_only_move_pixels(size, quarters):
    images = torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(0))
    expected = images.rot90(quarters, dims=(2, 3))
    torch.testing.assert_close(turned(images, 90.0 * quarters, 0.0), expected, atol=1e-5, rtol=0)


def test_corners_come_from_the_background():
    picture = turned(torch.ones(1, 1, 9, 9), 45.0, -2.0)[0, 0]
    assert picture[0, 0] == picture[-1, -1] == -2
    assert picture[4, 4] == 1
    assert -2 <= picture.min() <= picture.max() <= 1
