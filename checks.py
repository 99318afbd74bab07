"""Bad input becomes one clear line on stderr and exit code 2: the error, the flag types, the guard.

This file imports no other file of the project, and every other file may import it. Every script
imports it first, so that what it sets for the threads stands before torch is loaded.
"""

import argparse
import errno
import math
import os
import re
import sys
from collections.abc import Callable
from typing import TextIO

# torch's threads wait for each other at every layer. libgomp lets them spin long meanwhile, and
# beside other work a step takes many times as long. A short spin costs nothing on an idle machine
# (measured: docs/log.md). libgomp reads this once, when torch is loaded.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"


class InputError(Exception):
    """What the user gave cannot be used. The message is one line that says what and why."""


def make_parser(description: str) -> argparse.ArgumentParser:
    """A strict argument parser whose --help shows the description as it is written."""
    return strict(argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter))


def strict(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, with errors of a single line (argparse would print the usage first) and without
    abbreviated flags (a flag that is added later could give them another meaning)."""
    parser.allow_abbrev = False
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    return parser


def number(low: float, high: float = math.inf, open_low: bool = False,
           kind: type = float) -> Callable[[str], float]:
    """Flag type: a finite number in [low, high], or in (low, high] with `open_low`."""
    end = "∞)" if high == math.inf else f"{high:.10g}]"
    interval = f"{'(' if open_low else '['}{low:g}, {end}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name}") from None
        if not low <= value <= high or (open_low and value == low) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is outside {interval}")
        return value
    return parse


def integer(low: int) -> Callable[[str], int]:
    """Flag type: a whole number from `low` to the largest that every generator takes as a seed."""
    return number(low, 2**32 - 1, kind=int)


quiet = False  # True in a process of a torchrun job whose rank 0 prints the same warnings


def warn(message: str) -> None:
    """Print one line on stderr, at once."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


class Quiet:
    """A stream that never ends the work: what a closed pipe or a closed terminal does not take is
    dropped, and letters that its encoding lacks are written as escapes."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._do("write", text)
        return len(text)

    def flush(self) -> None:
        self._do("flush")

    def _do(self, name: str, *arguments: str) -> None:
        try:
            getattr(self.stream, name)(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # of a closed pipe or terminal
                raise  # else: from now on to nowhere, or Python would complain at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except (ValueError, AttributeError):  # closed, or never there
            pass

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def guard(main: Callable[[], None]) -> None:
    """Run a script's `main`. Bad input, errors of the operating system and lack of memory become
    one line and exit code 2; Ctrl-C where nothing is kept becomes one line and exit code 130."""
    if "RANK" not in os.environ:  # torchrun reads what its processes print
        sys.stdout, sys.stderr = Quiet(sys.stdout), Quiet(sys.stderr)
    try:
        main()
    except KeyboardInterrupt:
        warn("stopped; nothing was kept, go on with the same command")
        sys.exit(130)
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        words = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not re.search("(of|allocate|enough) memory", words):
            raise
        if isinstance(error, MemoryError | RuntimeError):  # the latter are PyTorch's
            words = f"not enough memory ({words}); a smaller --batch-size or --image-size may do"
        name = sys.argv[0].rsplit("/", 1)[-1]
        print(f"{name}: error: {words}", file=sys.stderr, flush=True)
        sys.exit(2)
