"""Training beside other work: the speed of a step next to a busy process, and of two trainings.

    python benchmarks/contention.py                                       # two cores: an hour
    python benchmarks/contention.py --networks demonstration --steps 10   # some minutes

idle = one training alone, busy = beside a process that never rests, two = two trainings at once,
of which the slower counts. Each as a ratio to idle in the same environment: scripts = as every
script sets it, libgomp = nothing set, passive = OMP_WAIT_POLICY=PASSIVE, spinN = GOMP_SPINCOUNT=N.
idle_over_libgomp is what the setting costs on an idle machine. Networks, environments and kinds
alternate within a block; medians over the blocks. Nothing else may run. Last line: JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from checks import guard, integer, make_parser

import json
import os
import subprocess
from contextlib import ExitStack
from statistics import median

NETWORKS = {"demonstration": (), "mobilenet_v2": ("mobilenet_v2", 112, 32),
            "resnet50": ("resnet50", 224, 32)}  # model, pixels, batch
ENVIRONMENTS = {"scripts": {}, "libgomp": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
                **{f"spin{n}": {"GOMP_SPINCOUNT": str(n)} for n in (0, 100, 1000, 10000, 100000)}}
BUSY = [sys.executable, "-c", "while True: pass"]


def work(network: str, environment: str, most: int) -> None:
    """One training: each line on stdin is a number of steps, answered by the seconds of one."""
    if environment == "libgomp":
        os.environ.pop("GOMP_SPINCOUNT", None)  # of checks.py; torch is not loaded yet
    import time

    import numpy as np
    import torch

    import data
    import fedavg
    import models
    from dataset.augment import Augmentation
    from training.recipe import DEMONSTRATION
    model, size, batch = NETWORKS[network] or (
        DEMONSTRATION[key] for key in ("model", "image_size", "batch_size"))
    n = most * batch
    labels, names = torch.arange(n) % 4, list(map(str, range(n)))
    pixels = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    images = data.Images(pixels, labels, names, list("abcd"), names, "noise")
    device = models.pick_device("cpu")
    recipe = fedavg.Recipe(batch_size=batch, augmentation=Augmentation(),
                           amp_dtype=models.pick_precision("auto", device))
    net = models.build(model, 4)
    trainer = fedavg.make_optimizer(net, recipe)
    for line in sys.stdin:
        began = time.perf_counter()
        fedavg.train_local(net, images, np.arange(int(line) * batch), recipe, *trainer, range(1),
                           (0, 1, 0))
        print((time.perf_counter() - began) / int(line), flush=True)


def ask(trainings: list[subprocess.Popen], steps: int) -> float:
    """Let these trainings go `steps` steps at the same time; the slowest's seconds of a step."""
    for training in trainings:
        print(steps, file=training.stdin, flush=True)
    return max(float(training.stdout.readline()) for training in trainings)


def measure(network: str, environment: str, steps: int) -> dict[str, float]:
    """Seconds of a step, alone, beside a busy process and beside another training."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    with ExitStack() as ending:
        trainings = []
        for _ in range(2):
            trainings.append(ending.enter_context(subprocess.Popen(
                [sys.executable, __file__, "--work", network, environment, str(steps)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=clean | ENVIRONMENTS[environment])))
            ending.callback(trainings[-1].kill)
        ask(trainings, 1)  # warm
        found = {"idle": ask(trainings[:1], steps), "two": ask(trainings, steps)}
        busy = ending.enter_context(subprocess.Popen(BUSY))
        ending.callback(busy.kill)
        return found | {"busy": ask(trainings[:1], steps)}


def main() -> None:
    if "--work" in sys.argv:
        work(*sys.argv[2:4], int(sys.argv[4]))
        return
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--environments", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS)[:3])
    add("--steps", type=integer(1), default=10, help="optimiser steps of each kind in a block")
    add("--blocks", type=integer(1), default=3)
    args = parser.parse_args()
    runs = {(n, e): [] for n in args.networks for e in args.environments}
    for _ in range(args.blocks):
        for key, found in runs.items():
            found.append(measure(*key, args.steps))
            print(*key, ", ".join(f"{kind} {s:.3f} s" for kind, s in found[-1].items()), flush=True)
    seconds = {key: {kind: median(one[kind] for one in found) for kind in found[0]}
               for key, found in runs.items()}
    out = {n: {} for n in args.networks}
    for (n, e), s in seconds.items():
        out[n][e] = {"idle_steps_per_second": 1 / s["idle"],
                     **{f"{kind}_over_idle": s["idle"] / s[kind] for kind in ("busy", "two")}}
        if (n, "libgomp") in seconds:
            out[n][e]["idle_over_libgomp"] = seconds[n, "libgomp"]["idle"] / s["idle"]
    print(f"{os.cpu_count()} processors, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS')}")
    print(json.dumps(out))


if __name__ == "__main__":
    guard(main)
