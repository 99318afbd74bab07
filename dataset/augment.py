"""Batch augmentation on the training device: every image its own draw, one pass over the batch.

The paper's Table 2 (rotation ±15°, horizontal flip, colour jitter) and, as a flag, its translation.
Each operation equals torchvision's functional counterpart on the same parameters (tests/). Geometry
is one bilinear resampling with black beyond the border, as torchvision's default fill; jitter is
brightness, contrast, saturation, hue in this order (torchvision shuffles the order per image).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the draws (the paper's Table 2; translation as a share of the side)."""
    rotation: float = 15.0  # degrees, either way
    flip: float = 0.5  # probability
    translation: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.1  # of the full circle


def draw_parameters(n: int, ranges: Augmentation, generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters of n images, float32 [n] each, on the CPU: the same whatever the device."""
    u = torch.rand(8, n, generator=generator)
    signed = 2 * u - 1
    return {"angle": signed[0] * ranges.rotation, "flip": (u[1] < ranges.flip).float(),
            "shift_x": signed[2] * ranges.translation, "shift_y": signed[3] * ranges.translation,
            "brightness": 1 + signed[4] * ranges.brightness,
            "contrast": 1 + signed[5] * ranges.contrast,
            "saturation": 1 + signed[6] * ranges.saturation,
            "hue": signed[7] * ranges.hue}


def augment(images: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Float images [n, 3, H, W] in 0..1 → such images again. p: [n] each, on their device."""
    images = warp(images, p["angle"], p["flip"], p["shift_x"], p["shift_y"])
    images = adjust_brightness(images, p["brightness"])
    images = adjust_contrast(images, p["contrast"])
    images = adjust_saturation(images, p["saturation"])
    return adjust_hue(images, p["hue"])


def warp(images: Tensor, angle: Tensor, flip: Tensor, shift_x: Tensor, shift_y: Tensor) -> Tensor:
    """Flip (0 or 1), then turn by `angle` degrees clockwise, then shift by a share of the sides.
    All [n]. torchvision: affine(hflip(x), angle, [shift_x·W, shift_y·H], 1, [0, 0], BILINEAR),
    which without flip and shift is rotate(x, -angle, BILINEAR)."""
    n, _, height, width = images.shape
    radians = angle * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    # affine_grid works in units of half sides, so the off-diagonal terms carry the aspect ratio
    theta = torch.stack([cos, sin * (height / width), -2 * (cos * shift_x + sin * shift_y *
                                                            (height / width)),
                         -sin * (width / height), cos, 2 * (sin * shift_x * (width / height) -
                                                            cos * shift_y)], 1).view(n, 2, 3)
    theta[:, 0] *= (1 - 2 * flip)[:, None]
    grid = F.affine_grid(theta, [n, 3, height, width], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blend(a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    """factor·a + (1 - factor)·b, clamped to 0..1; factor [n]."""
    return torch.lerp(b, a, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)  # as torchvision


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` [n] of the full circle; largest channel and chroma stay."""
    red, green, blue = images.unbind(1)
    largest, smallest = images.amax(1), images.amin(1)
    chroma = largest - smallest
    safe = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(largest == red, (green - blue) / safe, torch.where(
        largest == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
    sixth = sixth.add_(6 * shift.view(-1, 1, 1)).remainder_(6)  # hue in sixths of the circle

    def near(centre: int) -> Tensor:  # 1 within one sixth of `centre`, falling to 0 at two
        return (sixth - centre).abs_().neg_().add_(2).clamp_(0, 1)
    return torch.stack([torch.addcmul(largest, chroma, near(3), value=-1),
                        torch.addcmul(smallest, chroma, near(2)),
                        torch.addcmul(smallest, chroma, near(4))], 1)
