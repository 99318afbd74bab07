"""Two ways to take a shortcut away from the pixels, for training and for audits: uint8 to uint8."""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CORNER = (0.7, 0.85, 1.0, 1.0)  # left, top, right, bottom, shares: where the scale bar is
MARGIN = 0.1  # of the side: how far around it the local background is looked for


def chosen(args: argparse.Namespace) -> list[str]:
    """The interventions that the flags ask for, in the order of application."""
    return [name for name in INTERVENTIONS if name in args.remove]


def apply(pixels: Tensor, names: Sequence[str]) -> Tensor:
    """Pixels uint8 [n, 3, H, W] after the interventions; the input itself where there is none."""
    result = pixels.clone() if names else pixels  # a clone keeps the memory layout
    for name in names:
        for i, image in enumerate(result):
            result[i] = INTERVENTIONS[name](image)
    return result


def mask_corner(image: Tensor) -> Tensor:
    """The image with its corner in one colour: the median of the brighter half of what is near."""
    _, height, width = image.shape
    left, top, right, bottom = (round(x * side) for x, side in zip(CORNER, (width, height) * 2))
    around = torch.zeros(height, width, dtype=torch.bool)
    margin = max(1, round(MARGIN * width))
    around[max(top - margin, 0):bottom, max(left - margin, 0):right] = True
    around[top:bottom, left:right] = False
    near = image[:, around]
    brightness = near.float().mean(0)
    paint = near[:, brightness >= brightness.median()].float().median(1).values.round()
    masked = image.clone()
    masked[:, top:bottom, left:right] = paint.to(image.dtype)[:, None, None]
    return masked


def grey_world(image: Tensor) -> Tensor:
    """All channels scaled to one mean (Buchsbaum 1980), so that stain says less; at most 255."""
    values = image.float()
    means = values.mean((1, 2), keepdim=True).clamp_min(1e-6)
    return (values * means.mean() / means).round().clamp(0, 255).to(image.dtype)


INTERVENTIONS = {"scale-bar": mask_corner, "colour": grey_world}  # in the order of application


def background(pixels: Tensor) -> np.ndarray:
    """bool [H, W]: the brightest quarter of the pixels by luminance (ties included)."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    luminance = (pixels.float() * weights).sum(0).numpy()
    return luminance >= np.quantile(luminance, 0.75)
