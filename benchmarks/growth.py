"""How a round grows with images, clients and the size of the network: seconds, memory, shares.

    python benchmarks/growth.py                                  # two cores: some ten minutes
    python benchmarks/growth.py --model shufflenet_v2_x0_5 --image-size 32 --resnet-images 0

Images: a round of four clients over 1, 4 and 16 times --base images. Clients: the same 4,000 images
dealt to 4, 64 and 1,000 clients at batch 4, so that all take the same steps. Each is a process of
its own; seconds are the second of two rounds, memory the peak resident set. Network: what averaging
a client, evaluating and writing a checkpoint cost for a ResNet50 at 224 pixels, as shares of the
paper's round (13,030 passes, 325 validation images). Nothing else may run. Draws runs/growth.png;
last line: JSON.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from checks import InputError, guard, integer, make_parser

import json
import resource
import subprocess
import tempfile
import time

PASSES, VALIDATION = 13030, 325  # of a round of the paper: 5 x 2,606 training images


def noise(n: int, size: int):
    """n images of random pixels, four classes."""
    import torch

    import data
    names = list(map(str, range(n)))
    pixels = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return data.Images(pixels, torch.arange(n) % 4, names, list("abcd"), names, "noise")


def work(name: str, size: int, n: int, clients: int, batch: int) -> dict:
    """The second of two rounds of a network, client by client as train_federated has it."""
    import numpy as np

    import fedavg
    import models
    from dataset.augment import Augmentation
    images, model = noise(n, size), models.build(name, 4)
    owned = np.array_split(np.arange(n), clients)
    recipe = fedavg.Recipe(batch_size=batch, local_epochs=1, augmentation=Augmentation())
    state = models.moved(model.state_dict(), "cpu")
    for round_index in (1, 2):
        began, averaging = time.perf_counter(), 0.0
        average, records = fedavg.WeightedAverage(), []
        for k in range(clients):
            update = fedavg.train_client(model, state, images, owned[k], recipe,
                                         (0, round_index, k))
            entered = time.perf_counter()
            average.add(fedavg.accept(update, records, {}, []), update.num_examples)
            averaging += time.perf_counter() - entered
        state = state | average.result()
        seconds = time.perf_counter() - began
    return {"images": n, "clients": clients, "seconds": seconds, "averaging": averaging / seconds,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def shares(n: int) -> dict:
    """Seconds of a ResNet50's parts at 224 pixels, and their shares of the paper's round."""
    import numpy as np
    import torch

    import fedavg
    import models
    from dataset.augment import Augmentation
    from training import evaluation
    images, model = noise(n, 224), models.build("resnet50", 4)
    recipe = fedavg.Recipe(local_epochs=1, augmentation=Augmentation(),
                           amp_dtype=models.pick_precision("auto", torch.device("cpu")))
    state, average = models.moved(model.state_dict(), "cpu"), fedavg.WeightedAverage()
    found = {}

    def timed(name, call, count):
        call()  # warm
        began = time.perf_counter()
        call()
        found[name] = (time.perf_counter() - began) / count
    timed("step_an_image", lambda: fedavg.train_client(model, state, images, np.arange(n), recipe,
                                                       (0, 1, 0)), n)
    timed("average_a_client", lambda: average.add(state, 651), 1)
    timed("evaluate_an_image", lambda: evaluation.predict(model, images, np.arange(n)), n)
    with tempfile.TemporaryDirectory() as folder:
        timed("checkpoint", lambda: models.save({"state": state}, Path(folder) / "last.pt"), 1)
    whole = PASSES * found["step_an_image"]
    return found | {"averaging_share": 4 * found["average_a_client"] / whole,
                    "evaluation_share": VALIDATION * found["evaluate_an_image"] / whole,
                    "checkpoint_share": found["checkpoint"] / whole}


def run(*arguments: int | str) -> dict:
    """One measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--work", *map(str, arguments)], check=True,
                          stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def draw(rows: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 3))
    for axis, (key, found) in zip(figure.subplots(1, 2), rows.items(), strict=True):
        axis.plot([r[key] for r in found], [r["seconds"] for r in found], "o-", label="s a round")
        axis.plot([r[key] for r in found], [r["peak_mb"] / 100 for r in found], "s--",
                  label="100 MB at the peak")
        axis.set(xlabel=key, xscale="log", ylim=(0, None))
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    if "--work" in sys.argv:
        name, *numbers = sys.argv[2:]
        print(json.dumps(work(name, *map(int, numbers)) if numbers else shares(int(name))))
        return
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--base", type=integer(8), default=250, help="images of the smallest set (default 250)")
    add("--model", default="mobilenet_v2", help="of the rounds (default mobilenet_v2)")
    add("--image-size", type=integer(8), default=64, help="of the rounds (default 64)")
    add("--clients", nargs="+", type=integer(1), default=[4, 64, 1000])
    add("--resnet-images", type=integer(0), default=64, help="for the ResNet50; 0 leaves it out")
    add("--out", metavar="PNG", default="runs/growth.png")
    args = parser.parse_args()
    if 2 * max(args.clients) > 16 * args.base:
        raise InputError(f"--clients {max(args.clients)}: more than half of 16 x --base images")
    network = args.model, args.image_size
    rows = {"images": [run(*network, args.base * k, 4, 32) for k in (1, 4, 16)],
            "clients": [run(*network, 16 * args.base, k, 4) for k in args.clients]}
    for row in (r for found in rows.values() for r in found):
        print(", ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    draw(rows, Path(args.out))
    few, many = rows["clients"][0], rows["clients"][-1]
    out = {"images": rows["images"], "clients": rows["clients"],
           "time_16_times_the_images": rows["images"][-1]["seconds"] / rows["images"][0]["seconds"],
           "time_many_clients_over_few": many["seconds"] / few["seconds"],
           "memory_many_clients_over_few": many["peak_mb"] / few["peak_mb"]}
    if args.resnet_images:
        out["resnet50"] = run(args.resnet_images)
    print(json.dumps(out))


if __name__ == "__main__":
    guard(main)
