"""What tests of several files share: the toy data set on disk, a place for other users."""

import checks  # noqa: F401 - before torch

import os
import tempfile
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():  # used by test_cuda.py alone: the others assert exact numbers
    torch.cuda.init()
    torch.cuda.device_count()  # remembered before it is hidden from the processes that tests start
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.cuda.is_available = lambda: False

from helpers import train, write_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("set") / "toy",
                      {"Benign": 22, "Early": 26, "Pre": 24})


@pytest.fixture(scope="session")
def whole(tree, tmp_path_factory):
    """The run of helpers.BASE, uninterrupted: to read and to compare with, never to be changed."""
    return train(tree, tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="session")
def short(tree, tmp_path_factory):
    """The same of one round."""
    return train(tree, tmp_path_factory.mktemp("runs") / "short", "--rounds", 1)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures of this process are empty files: half of a toy run is matplotlib's. For runs that are
    only compared; every kind of run is drawn by another test."""
    monkeypatch.setattr("reporting.figures.save", lambda figure, path, dpi: path.touch())


@pytest.fixture(scope="module")
def open_place():
    """A folder that other users may pass through; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
