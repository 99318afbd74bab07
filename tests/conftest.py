"""What tests of several files share: the toy data set on disk, a place for other users."""

import checks  # noqa: F401 - before torch

import os
import tempfile
from pathlib import Path

import pytest
from helpers import write_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("set") / "toy",
                      {"Benign": 22, "Early": 26, "Pre": 24})


@pytest.fixture(scope="module")
def open_place():
    """A folder that other users may pass through; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
