"""What a data set gives away, with or without a network."""

import checks  # noqa: F401 - before torch
