"""Processes and clients: wall time, bytes sent and peak memory, one process against torchrun.

    python benchmarks/scaling.py                                # ResNet18 at 64: some minutes
    python benchmarks/scaling.py --model shufflenet_v2_x0_5 --image-size 20 --clients 2 4 --blocks 1

The same synthetic images are dealt to 4, 16 and 64 clients. One process has as many threads as
torchrun has processes of one thread. Blocks alternate; a round's seconds are the median over blocks
and rounds, without the first round. Memory is the peak resident set of a process; MB sent are the
updates of the busiest process, one model for each of its clients. Draws runs/scaling.png; last
line: JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from checks import guard, integer, make_parser


def work(place: Path, argv: list[str]) -> None:
    """One process of a measured run; leaves its bytes and memory in `place`."""
    import train_federated
    from training import processes
    sys.argv = ["train_federated.py", *argv]
    cross, sent = processes.Job._cross, []

    def count(job: processes.Job, kind: str, operation: Callable, *arguments) -> object:
        if kind == "update" and operation is processes.dist.isend:
            sent.append(arguments[0].numel() * arguments[0].element_size())
        return cross(job, kind, operation, *arguments)
    processes.Job._cross = count

    def main(argv: list[str], job: processes.Job) -> None:
        train_federated.main(argv, job)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        (place / f"rank{job.rank}.json").write_text(
            json.dumps({"bytes": sum(sent), "peak_mb": memory}))
    processes.start(main)


def measure(args: argparse.Namespace, processes: int, clients: int) -> dict:
    """One run in processes of its own: seconds a round, and the most of any process."""
    threads = args.processes if processes == 1 else 1
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        launch = [sys.executable] if processes == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        subprocess.run(
            [*launch, __file__, "--work", folder, "--model", args.model, "--image-size",
             str(args.image_size), "--rounds", str(args.rounds), "--local-epochs", "1",
             "--batch-size", "4", "--clients", str(clients), "--early-stop", "0",
             "--out", str(place / "run")],
            check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True)
        history = [json.loads(x) for x in (place / "run/history.jsonl").read_text().splitlines()]
        ranks = [json.loads(p.read_text()) for p in place.glob("rank*.json")]
    return {"seconds": [r["seconds"] for r in history[1:]],
            "bytes": max(r["bytes"] for r in ranks) / len(history),
            "peak_mb": max(r["peak_mb"] for r in ranks)}


def draw(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9, 3))
    axes = figure.subplots(1, 3)
    for axis, key in zip(axes, ("seconds a round", "peak MB a process", "MB sent a round"),
                         strict=True):
        for processes in sorted({r["processes"] for r in rows}):
            mine = [r for r in rows if r["processes"] == processes]
            axis.plot([r["clients"] for r in mine], [r[key] for r in mine], "o-",
                      label=f"{processes} process(es)")
        axis.set(xlabel="clients", ylabel=key, xscale="log", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    if "--work" in sys.argv:
        work(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", default="resnet18")
    add("--image-size", type=integer(8), default=64)
    add("--clients", type=integer(1), nargs="+", default=[4, 16, 64])
    add("--processes", type=integer(2), default=2, help="of torchrun, and threads of one process")
    add("--rounds", type=integer(2), default=3)
    add("--blocks", type=integer(1), default=2)
    add("--figure", default="runs/scaling.png")
    args = parser.parse_args()
    rows = []
    for clients in args.clients:
        runs = {p: [] for p in (1, args.processes)}
        for _ in range(args.blocks):
            for processes, done in runs.items():
                done.append(measure(args, processes, clients))
        for processes, done in runs.items():
            rows.append({"processes": processes, "clients": clients,
                         "seconds a round": median(s for d in done for s in d["seconds"]),
                         "peak MB a process": max(d["peak_mb"] for d in done),
                         "MB sent a round": max(d["bytes"] for d in done) / 1e6})
            print(", ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
    draw(rows, Path(args.figure))
    time, memory = ({(r["processes"], r["clients"]): r[key] for r in rows}
                    for key in ("seconds a round", "peak MB a process"))
    first, last = args.clients[0], args.clients[-1]
    print(json.dumps({
        "speedup": {c: time[1, c] / time[args.processes, c] for c in args.clients},
        "memory_most_over_fewest_clients": {
            p: memory[p, last] / memory[p, first] for p in (1, args.processes)},
        "updates_mb_a_round": {r["clients"]: r["MB sent a round"] for r in rows
                            if r["processes"] > 1}}))


if __name__ == "__main__":
    guard(main)
