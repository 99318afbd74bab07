"""A decoded data set: pixels, labels, and what else is known of each image."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from dataset import splits

STRIP = 0.12  # share of the height cut off below: the burnt-in scale bar stands there
UNITS = ("patient", "group")  # what a table may know of images that are alike


@dataclass(eq=False)  # compared by identity, so that lru_cache can hold features computed from it
class Images:
    """A decoded data set. pixels: uint8 [N, 3, H, W], stored channels last; labels: int64 [N]."""
    pixels: Tensor
    labels: Tensor
    paths: list[str]  # relative to the data folder, "/" between parts
    classes: list[str]
    digests: list[str]  # sha256 of each image's decoded RGB pixels and size, before resizing
    name: str
    root: Path | None = None  # the folder that the paths are relative to
    ignored: Counter = field(default_factory=Counter)  # files that were passed over, by suffix
    bad: list[tuple[str, str]] = field(default_factory=list)  # (path, reason), with --skip-bad
    found: Counter = field(default_factory=Counter)  # (width, height, mode) as found on disk
    known: dict[str, np.ndarray] = field(default_factory=dict)  # patient, group, split, client: str
    # [N], from the table or from a tree that is split already; "" for an image of which it is not

    def array(self) -> np.ndarray:
        """The pixels as uint8 [N, H, W, 3] on the CPU."""
        return self.pixels.permute(0, 2, 3, 1).cpu().numpy()

    def class_counts(self, indices: np.ndarray) -> list[int]:
        """How many of these images each class has."""
        return np.bincount(self.labels.numpy()[indices], minlength=len(self.classes)).tolist()

    def units(self) -> dict[str, np.ndarray]:
        """Patients and groups, where a table has them: int64 [N] each. Unknown ones all differ."""
        return {unit: splits.numbered(self.known[unit]) for unit in UNITS if unit in self.known}

    def client_names(self, clients: list[np.ndarray]) -> list[str]:
        """The names that a table gives to these clients, or their numbers."""
        names = self.known.get("client")
        return [str(k) if names is None else str(names[own[0]]) for k, own in enumerate(clients)]

    def titles(self, clients: list[np.ndarray]) -> list[str]:
        """The same to be read: a number becomes `client 0`."""
        return [f"client {n}" if n.isdecimal() else n for n in self.client_names(clients)]

    def fingerprint(self) -> str:
        """sha256 over class list, paths, labels and pixel digests: equal for equal data only."""
        lines = [repr(self.classes)] + [f"{p}\t{y}\t{d}" for p, y, d in zip(
            self.paths, self.labels.tolist(), self.digests, strict=True)]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def colour_statistics(pixels: np.ndarray, kind: str, cut_strip: bool = False) -> np.ndarray:
    """float32 [n, 3] (`means` of R, G, B) or [n, 21] (`statistics`: of each channel the mean,
    the standard deviation and the 5, 25, 50, 75, 95 % quantiles). pixels: uint8 [n, H, W, 3]."""
    height = pixels.shape[1] - round(STRIP * pixels.shape[1]) * cut_strip
    rows = []
    for image in pixels[:, :height]:
        flat = image.reshape(-1, 3).astype(np.float32)
        row = [flat.mean(0)]
        if kind == "statistics":
            row += [flat.std(0), *np.percentile(flat, (5, 25, 50, 75, 95), axis=0)]
        rows.append(np.concatenate(row))
    return np.array(rows, dtype=np.float32)
