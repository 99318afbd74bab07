"""From files on disk to pixels, parts and clients; knows no network."""

import checks  # noqa: F401 - before torch
