"""Training images per second: ours, the ceiling of the machine, and a plain newcomer's loop.

    python benchmarks/throughput.py                              # ResNet50 at 224, drawn images
    python benchmarks/throughput.py --model resnet18 --image-size 64 --steps 4    # a minute

All in one run on the same images, in alternating blocks, medians over the blocks: the machine may
be shared, so only the ratios count. ours = `fedavg.train_local` (gather, augment, normalise, step);
ceiling = `fedavg.train_step` on one ready batch in memory; plain = ImageFolder, DataLoader with 0
and with 2 workers (the faster counts), float32, per-image torchvision transforms. Last line: JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from checks import guard, integer, make_parser

import json
import tempfile
import time
from itertools import islice
from statistics import median

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import data
import fedavg
import models
from dataset import synthetic
from dataset.augment import Augmentation
from dataset.files import CLASSES

CLIENTS, ROUND_STEPS = 4, 20  # of the round that averaging is a share of


def draw_folder(folder: Path, count: int, size: int) -> Path:
    """`count` synthetic smears as JPEG files in ImageFolder's layout."""
    for i in range(count):
        name = CLASSES[i % 4]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = synthetic.draw_one(name, size, np.random.default_rng(i))
        Image.fromarray(pixels).save(folder / name / f"{i}.jpg", quality=90)
    return folder


def plain_loop(folder: Path, args, workers: int, device: torch.device):
    """What a first script does: endless optimiser steps, one yielded at a time."""
    transform = T.Compose([
        T.Resize((args.image_size, args.image_size)), T.RandomRotation(15),
        T.RandomHorizontalFlip(), T.ColorJitter(0.2, 0.2, 0.2, 0.1), T.ToTensor(),
        T.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)])
    loader = DataLoader(ImageFolder(folder, transform), args.batch_size, shuffle=True,
                        num_workers=workers, drop_last=True, persistent_workers=workers > 0)
    model = models.build(args.model, 4).to(device, memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    criterion = torch.nn.CrossEntropyLoss()
    while True:
        for batch, targets in loader:
            loss = criterion(model(batch.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()
            yield


def timed(steps, count: int, batch_size: int, device: torch.device) -> float:
    """Images per second of `count` steps of an iterator."""
    began = time.perf_counter()
    for _ in islice(steps, count):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count * batch_size / (time.perf_counter() - began)


def ceiling_loop(images, args, recipe, device):
    model = models.build(args.model, 4).to(device)
    trainer = fedavg.make_optimizer(model, recipe)
    models.train_mode(model)
    batch = data.eval_batch(images, torch.arange(args.batch_size), device)
    targets = images.labels[:args.batch_size].to(device)
    while True:
        yield fedavg.train_step(model, batch, targets, recipe, *trainer, [])


def our_rate(model, images, args, recipe, device) -> float:
    """Images per second of the whole local training, `--steps` batches long."""
    trainer = fedavg.make_optimizer(model, recipe)
    began = time.perf_counter()
    record = fedavg.train_local(model, images, np.arange(args.steps * args.batch_size), recipe,
                                *trainer, range(1), (0, 1, 0))
    return record["images"] / (time.perf_counter() - began)


def average_seconds(model) -> float:
    """Seconds of one weighted average over the clients of a round, best of three."""
    state, best = model.state_dict(), float("inf")
    for _ in range(3):
        began = time.perf_counter()
        average = fedavg.WeightedAverage()
        for k in range(CLIENTS):
            average.add(state, 651 + k)
        next(iter(average.result().values())).cpu()
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=integer(8), default=224)
    parser.add_argument("--batch-size", type=integer(2), default=32)
    parser.add_argument("--steps", type=integer(1), default=4, help="optimiser steps a block")
    parser.add_argument("--blocks", type=integer(1), default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto")
    args = parser.parse_args()
    device = models.pick_device(args.device)
    recipe = fedavg.Recipe(batch_size=args.batch_size, augmentation=Augmentation(),
                           amp_dtype=models.pick_precision(args.amp, device))
    rates = {"ours": [], "ceiling": [], "plain0": [], "plain2": []}
    with tempfile.TemporaryDirectory() as folder:
        count = args.steps * args.batch_size
        images = data.read_folder(str(draw_folder(Path(folder), count, args.image_size)),
                                  args.image_size)
        images.pixels = images.pixels.to(device)
        model = models.build(args.model, 4).to(device)
        loops = {"ceiling": ceiling_loop(images, args, recipe, device),
                 **{f"plain{w}": plain_loop(Path(folder), args, w, device) for w in (0, 2)}}
        for loop in loops.values():
            timed(loop, 1, 1, device)  # warm: workers started, kernels chosen
        for _ in range(args.blocks):
            rates["ours"].append(our_rate(model, images, args, recipe, device))
            for name, loop in loops.items():
                rates[name].append(timed(loop, args.steps, args.batch_size, device))
            print("  ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items()),
                  "images/s", flush=True)
        for loop in loops.values():
            loop.close()
    ours, ceiling, plain = (median(rates["ours"]), median(rates["ceiling"]),
                            max(median(rates["plain0"]), median(rates["plain2"])))
    seconds = CLIENTS * ROUND_STEPS * args.batch_size / ours  # of training in the round
    average = average_seconds(model)
    print(f"{args.model}, {args.image_size} pixels, batch {args.batch_size}, {device}, "
          f"{recipe.amp_dtype or 'float32'}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print(json.dumps({"ours": ours, "ceiling": ceiling, "plain": plain,
                      "ours_over_ceiling": median(np.divide(rates["ours"], rates["ceiling"])),
                      "ours_over_plain": ours / plain,
                      "average_share_of_round": average / (seconds + average)}))


if __name__ == "__main__":
    guard(main)
