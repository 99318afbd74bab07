"""The toy data set on disk that the tests of whole runs share."""

import pytest
from helpers import write_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("set") / "toy",
                      {"Benign": 22, "Early": 26, "Pre": 24})
