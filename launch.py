"""One process of a torchrun job: how it starts, starts again, and says that it ends."""

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

import checks
import distributed
import run_folder

# Seconds for the first process of a machine to say what another would have to: mostly it fails too.
PATIENCE = 5


def continued(argv: list[str]) -> list[str]:
    """After a restart rank 0 resumes the folder that this very launcher began."""
    if not distributed.restarts() or "--resume" in argv:
        return argv
    out = argv[argv.index("--out") + 1:argv.index("--out") + 2] if "--out" in argv else []
    if out and Path(out[0]).is_dir() and not any(Path(out[0]).iterdir()):
        Path(out[0]).rmdir()  # killed between making it and writing in it
    places = [Path(x) for x in out] or sorted(
        (p.parent for p in Path("runs").glob("*/run.json")), key=lambda p: p.stat().st_mtime)
    mine = [p for p in places if (p / "run.json").exists()
            and run_folder.read_json(p / "run.json").get("launcher") == run_folder.launcher()]
    return [*run_folder.without(argv, "--out"), "--resume", str(mine[-1])] if mine else argv


def launch(main: Callable[[list[str], distributed.Team], None]) -> None:
    """Run a script's `main` as one process of a job and leave the process; whatever cuts the job
    short, one process says so. Nothing runs after it."""
    team, argv = distributed.Team(), sys.argv[1:]
    if team.rank == 0:
        argv = continued(argv)
    else:
        sys.stdout = io.StringIO()
    if team.local_rank:
        sys.stderr = io.StringIO()  # until the processes have met, one a machine speaks

    def end(reason: str, code: int) -> None:
        if team.claim():
            print(f"{Path(sys.argv[0]).name}: {team.name}: {reason}; the last checkpoint is whole, "
                  "go on with --resume and the run folder", file=sys.__stderr__, flush=True)
        os._exit(code)

    signal.signal(signal.SIGTERM, lambda *_: end("stopped, as the job lost a process", 143))
    code = 0
    try:
        checks.guard(lambda: main(argv, team))
    except distributed.LostProcess as error:
        end(f"another process is gone or silent ({error})", 1)
    except SystemExit as error:
        code = error.code
    if code and sys.stderr is not sys.__stderr__:  # failed before it may speak
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(PATIENCE)
        sys.__stderr__.write(sys.stderr.getvalue())
    if code == 0 and team.device.type == "cuda":
        dist.destroy_process_group()  # waits for what the device still sends
    # Out at once: gloo's destructor joins threads that may wait for the GIL, which its caller holds
    for stream in (sys.stdout, sys.__stderr__):
        stream.flush()
    os._exit(code)
