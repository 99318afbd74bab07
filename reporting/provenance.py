"""What made a run: the machine, the versions, the code, and the torchrun that started it."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from models import pick_precision

ROOT = Path(__file__).parent.parent
ROOMS = ("auditing", "dataset", "explaining", "reporting", "training")


def launcher() -> str | None:
    """Names the torchrun that started this process, also after a restart; None without torchrun."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    return job and f"{platform.node()} {os.getppid()} {job}"


def machine(device: torch.device) -> dict:
    """Versions and hardware that a figure depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    packages = ("torch", "torchvision", "numpy", "scikit-learn", "pillow")
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "amp_auto": str(pick_precision("auto", device)),  # None: float32
            "python": platform.python_version(), **{p: version(p) for p in packages}}


def code() -> list[bytes]:
    """Every source file that a run can depend on (a virtual environment may stand beside them)."""
    return [p.read_bytes() for room in ("", *ROOMS) for p in sorted((ROOT / room).glob("*.py"))]


def git_commit() -> str | None:
    """The commit of this code, with "+changes" where the checkout differs; None outside git."""
    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *command], check=True,
                              capture_output=True, text=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def restarts() -> int:
    """How often torchrun --max-restarts has started this job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
