"""Maps of what an answer depends on, and whether to believe them."""

import checks  # noqa: F401 - before torch
