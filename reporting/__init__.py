"""What a run leaves behind: the run folder, its figures, and the trained network as a function."""

import checks  # noqa: F401 - before torch
