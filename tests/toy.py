"""A program that knows the toy network: python tests/toy.py PROGRAM ARGUMENTS."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import helpers  # noqa: F401 - registers it

del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
