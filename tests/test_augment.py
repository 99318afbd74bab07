"""Batch augmentation against torchvision's functional operations on the same parameters."""

import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms import InterpolationMode

from dataset.augment import (
    Augmentation,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    augment,
    draw_parameters,
    warp,
)

N = 8
RANGES = Augmentation(translation=0.1)


def batch(height, width):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, height, width), generator=generator, dtype=torch.uint8)
    images[0] = images[0, :1]  # grey: no hue
    images[1] = 0
    images[2] = 255
    return images, draw_parameters(N, RANGES, generator)


def worst(ours, theirs):
    return (ours * 255 - torch.stack(theirs).float()).abs().max().item()


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_geometry_equals_torchvision(size):
    images, p = batch(*size)
    zero = torch.zeros(N)
    bilinear = InterpolationMode.BILINEAR
    rotated = [TF.rotate(x, -a.item(), bilinear) for x, a in zip(images, p["angle"], strict=True)]
    assert worst(warp(images / 255, p["angle"], zero, zero, zero), rotated) < 2
    flipped = [TF.hflip(x) if f else x for x, f in zip(images, p["flip"], strict=True)]
    assert worst(warp(images / 255, zero, p["flip"], zero, zero), flipped) < 2
    assert 0 < p["flip"].sum() < N
    moved = [TF.affine(x, a.item(), [dx.item() * size[1], dy.item() * size[0]], 1, [0, 0], bilinear)
             for x, a, dx, dy in zip(flipped, p["angle"], p["shift_x"], p["shift_y"], strict=True)]
    ours = warp(images / 255, p["angle"], p["flip"], p["shift_x"], p["shift_y"])
    assert worst(ours, moved) < 2


@pytest.mark.parametrize("name,ours,theirs", [
    ("brightness", adjust_brightness, TF.adjust_brightness),
    ("contrast", adjust_contrast, TF.adjust_contrast),
    ("saturation", adjust_saturation, TF.adjust_saturation), ("hue", adjust_hue, TF.adjust_hue)])
def test_jitter_equals_torchvision(name, ours, theirs):
    images, p = batch(24, 40)
    for factor in (p[name], p[name].flip(0)):
        expected = [theirs(x, f.item()) for x, f in zip(images, factor, strict=True)]
        assert worst(ours(images / 255, factor), expected) < 2


def test_draws_are_per_image_in_range_and_repeat():
    def p(seed):
        return draw_parameters(500, RANGES, torch.Generator().manual_seed(seed))
    bounds = {"angle": (-15, 15), "flip": (0, 1), "shift_x": (-0.1, 0.1), "shift_y": (-0.1, 0.1),
              "brightness": (0.8, 1.2), "contrast": (0.8, 1.2), "saturation": (0.8, 1.2),
              "hue": (-0.1, 0.1)}
    drawn = p(0)
    assert drawn.keys() == bounds.keys()
    for name, (low, high) in bounds.items():
        values = drawn[name]
        assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6
        assert values.max() - values.min() > 0.95 * (high - low)
        assert torch.equal(values, p(0)[name]) and not torch.equal(values, p(1)[name])
        if name != "flip":
            assert len(values.unique()) > 490  # one draw an image, not one a batch
    assert 0.4 < drawn["flip"].mean() < 0.6
    assert not draw_parameters(9, Augmentation(), torch.Generator())["shift_x"].any()
    # one says nothing of another: correlations of independent draws are below 5 / √500
    assert (torch.corrcoef(torch.stack(list(drawn.values()))) - torch.eye(8)).abs().max() < 0.22
    with pytest.raises(AttributeError):
        RANGES.rotation = 90.0


def test_augment_changes_each_image_its_own_way_and_keeps_its_input():
    one = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    images = one.repeat(4, 1, 1, 1)
    before = images.clone()
    out = augment(images, draw_parameters(4, RANGES, torch.Generator().manual_seed(2)))
    assert torch.equal(images, before) and out.shape == images.shape
    assert out.min() >= 0 and out.max() <= 1
    assert all(not torch.allclose(out[i], out[j]) for i in range(4) for j in range(i))
    half = augment(images[:2], {k: v[:2] for k, v in draw_parameters(
        4, RANGES, torch.Generator().manual_seed(2)).items()})
    torch.testing.assert_close(half, out[:2], rtol=0, atol=1e-6)
