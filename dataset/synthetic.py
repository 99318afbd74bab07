"""The embedded demonstration: small synthetic blood smears, drawn from a fixed seed.

Four classes that differ in cell size, nucleus ratio, chromatin texture and, weakly, in stain.
Stain and brightness vary from image to image by more than they do between classes, and the number
of cells varies too, so that colour means alone do not solve the task. None of it is medical data.
"""

import numpy as np

COUNTS = {"Benign": 56, "Early": 94, "Pre": 90, "Pro": 80}  # 320, uneven as the real set

# radius: of the cell, as a share of the image side; ratio: nucleus radius / cell radius; grain:
# chromatin clumps per image side; contrast: of the chromatin; cells: fewest and most, so that the
# stained area says little; stain: added to the nucleus' RGB
SHAPES = {
    "Benign": {"radius": (0.09, 0.13), "ratio": 0.84, "grain": 10, "contrast": 0.05,
               "cells": (3, 6), "stain": (-6, 0, 0)},
    "Early": {"radius": (0.18, 0.22), "ratio": 0.54, "grain": 14, "contrast": 0.10,
              "cells": (2, 4), "stain": (6, 0, 4)},
    "Pre": {"radius": (0.18, 0.22), "ratio": 0.88, "grain": 10, "contrast": 0.36,
            "cells": (1, 3), "stain": (0, 0, -4)},
    "Pro": {"radius": (0.26, 0.31), "ratio": 0.86, "grain": 24, "contrast": 0.12,
            "cells": (1, 2), "stain": (0, 4, 0)},
}


def _disc(grid: np.ndarray, x: float, y: float, radius: float, size: int) -> np.ndarray:
    """Coverage [size, size] in 0..1 of an anti-aliased disc; x, y, radius in image sides."""
    distance = np.hypot(grid[None, :] - x, grid[:, None] - y)
    return np.clip((radius - distance) * size + 0.5, 0, 1)[..., None]


def _texture(rng: np.random.Generator, grid: np.ndarray, grain: int) -> np.ndarray:
    """Smooth noise [size, size, 1] in about -1..1, `grain` clumps along each side (bilinear)."""
    knots = rng.uniform(-1, 1, (grain + 1, grain + 1))
    low = (grid * grain).astype(int)
    part = grid * grain - low
    rows = knots[low] * (1 - part)[:, None] + knots[low + 1] * part[:, None]
    return (rows[:, low] * (1 - part) + rows[:, low + 1] * part)[..., None]


def draw_one(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """One picture of class `name`, uint8 [size, size, 3]."""
    shape = SHAPES[name]
    grid = (np.arange(size) + 0.5) / size
    brightness, tint = rng.uniform(0.88, 1.06), rng.normal(0, 5, 3)  # of the whole picture
    image = np.ones((size, size, 3)) * (226, 208, 214)
    for _ in range(rng.integers(2, 9)):  # red cells: pale discs with a paler centre
        x, y, radius = *rng.uniform(0, 1, 2), rng.uniform(0.06, 0.10)
        red = _disc(grid, x, y, radius, size) - 0.4 * _disc(grid, x, y, radius * 0.5, size)
        image += 0.55 * red * (np.array((214, 156, 158)) - image)
    nucleus_colour = np.array((112, 66, 138)) + rng.normal(0, 8, 3) + shape["stain"]
    for _ in range(rng.integers(*shape["cells"], endpoint=True)):  # white cells: cytoplasm, then
        # a nucleus a little off centre
        radius = rng.uniform(*shape["radius"])
        x, y = rng.uniform(0.2, 0.8, 2)
        cytoplasm = _disc(grid, x, y, radius, size)
        image += 0.8 * cytoplasm * (np.array((176, 168, 212)) - image)
        angle, room = rng.uniform(0, 2 * np.pi), radius * (1 - shape["ratio"]) * 0.8
        nucleus = _disc(grid, x + room * np.cos(angle), y + room * np.sin(angle),
                        radius * shape["ratio"], size)
        chromatin = 1 + shape["contrast"] * 1.6 * _texture(rng, grid, shape["grain"])
        image += 0.95 * nucleus * (nucleus_colour * chromatin - image)
    image = image * brightness + tint + rng.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def draw(size: int, seed: int = 0) -> tuple[np.ndarray, list[str], list[str]]:
    """Pixels uint8 [320, size, size, 3], class names, paths; picture i depends on (seed, i)."""
    names = [(name, i) for name, count in COUNTS.items() for i in range(1, count + 1)]
    pixels = np.stack([draw_one(name, size, np.random.default_rng([seed, i]))
                       for i, (name, _) in enumerate(names)])
    return (pixels, [name for name, _ in names],
            [f"{name}/synthetic-{name}-{i:03d}.png" for name, i in names])
