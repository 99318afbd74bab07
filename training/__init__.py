"""What both trainers share around the algorithm itself."""

import checks  # noqa: F401 - before torch
