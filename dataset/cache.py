"""Decoded once: the pixels of a set as one memory-mapped file, which later starts read instead.

A cache is named by all that its pixels follow from: path, size and time of change of every file,
image size, interventions, Pillow's version and this code. A set may be larger than memory.
"""

from checks import warn

import atexit
import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
import PIL


class Cache:
    """The cache of one set in a folder of caches; several processes may read and write it."""

    def __init__(self, folder: str, files: list[Path], size: int, removed: list[str]) -> None:
        stats = [os.stat(f, follow_symlinks=f.exists()) for f in files]  # of a broken link, its own
        described = [[os.path.abspath(f), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats)]
        code = [Path(__file__).with_name(f"{name}.py").read_bytes().hex()
                for name in ("files", "interventions")]
        key = json.dumps([described, size, removed, PIL.__version__, PIL.Image.MAX_IMAGE_PIXELS,
                          code])
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.pixels, self.facts = (Path(folder) / f"{name}.{end}" for end in ("pixels", "json"))
        self.own, self.beside = (self.pixels.with_suffix(f".{os.getpid()}.{end}")
                                 for end in ("tmp", "facts"))
        self.shape = len(files), size, size, 3

    def read(self) -> tuple[np.ndarray, dict] | None:
        """(pixels uint8 [n, size, size, 3], what was noted of them), or None where there is no
        whole and undamaged cache. The pixels stay on disk and are read-only."""
        if not self.facts.exists():
            return None
        try:
            checksum, facts = json.loads(self.facts.read_text("utf-8"))
            pixels = np.memmap(self.pixels, np.uint8, "r", shape=(facts["n"], *self.shape[1:]))
            if checksum == zlib.crc32(json.dumps(facts).encode(), zlib.crc32(pixels)):
                return pixels, facts
        except (OSError, ValueError, KeyError, TypeError):
            pass
        warn(f"--cache: {self.pixels} is damaged, so that the images are decoded again")
        return None

    def create(self) -> np.ndarray:
        """Room for the pixels on disk. In memory, with one line, where the disk has none."""
        for path in (self.own, self.beside):  # half of a cache is no use to anybody
            atexit.register(path.unlink, missing_ok=True)
        try:
            with open(self.own, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # notices a full disk now, not while writing
                    os.posix_fallocate(file.fileno(), 0, int(np.prod(self.shape)))
                file.truncate(int(np.prod(self.shape)))
            return np.memmap(self.own, np.uint8, "r+", shape=self.shape)
        except OSError as error:
            self.own.unlink(missing_ok=True)
            warn(f"--cache: {error.strerror}: goes on without a cache")
            return np.empty(self.shape, np.uint8)

    def finish(self, pixels: np.ndarray, n: int, facts: dict) -> np.ndarray:
        """Keep the first n pixels and the notes; it is whole once both files have their names."""
        if not isinstance(pixels, np.memmap):
            return pixels[:n]
        try:
            pixels.flush()
            noted = facts | {"n": n}
            checksum = zlib.crc32(json.dumps(noted).encode(), zlib.crc32(pixels[:n]))
            self.beside.write_text(json.dumps([checksum, noted]), "utf-8")
            self.facts.unlink(missing_ok=True)  # of a damaged one
            os.replace(self.own, self.pixels)
            os.replace(self.beside, self.facts)
        except OSError as error:
            warn(f"--cache: {error.strerror}: goes on without a cache")
        return pixels[:n]
