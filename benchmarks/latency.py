"""Milliseconds per image at inference, ours over plain eager float32; and what LIME costs.

    python benchmarks/latency.py                             # ResNet50 at 224: a few minutes
    python benchmarks/latency.py --model resnet18 --image-size 64 --repeats 3 --samples 64
    python benchmarks/latency.py --run runs/NAME             # a trained network

All in one run on the same drawn images, in alternating blocks, medians over the blocks. plain = the
torchvision network as built, contiguous, float32; ours = `inference.fast`; each from uint8 pixels.
Random weights bear no half precision; without --run ours takes it nevertheless, for its speed.
lime_over_forward = one LIME explanation over the network's forward passes on as many images. The
paper states 15 ms an image on a Tesla P100. Last line: JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from checks import guard, integer, make_parser

import copy
import json
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
import torchvision

import data
import models
from dataset import synthetic
from explaining import attribution
from reporting import inference


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--run", metavar="RUN", help="its network, image size and precision instead of those below")
    add("--model", default="resnet50")
    add("--image-size", type=integer(16), default=224)
    add("--repeats", type=integer(1), default=5, help="blocks, medians are taken over them")
    add("--samples", type=integer(10), default=256, help="of LIME")
    add("--device", default="auto")
    args = parser.parse_args(argv)
    device = models.pick_device(args.device)
    if args.run:
        exact = inference.load(Path(args.run), device)
        ours = inference.fast(exact)
        args.model, args.image_size = exact.name, exact.image_size
    else:
        network = models.build(args.model, 4).to(device).eval()
        exact = inference.Trained(network, args.model, list("abcd"), args.image_size, device)
        ours = inference.fast(exact, limit=float("inf"))
    eager = copy.deepcopy(exact.model).to(memory_format=torch.contiguous_format)
    normalise = torchvision.transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)

    @torch.inference_mode()
    def plain(pixels: torch.Tensor) -> torch.Tensor:
        return eager(normalise(pixels.to(device).float().div(255))).cpu()

    def fast(pixels: torch.Tensor) -> torch.Tensor:
        return inference.logits(ours, pixels)
    drawn = np.stack([synthetic.draw_one("Pre", args.image_size, np.random.default_rng(i))
                      for i in range(32)])
    pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2)
    print(f"{args.model} at {args.image_size}, {device}, {torch.get_num_threads()} threads, "
          f"{torch.backends.cpu.get_cpu_capability()}, ours in {ours.dtype}")
    out = {}
    for batch in (1, 32):
        times = {"plain": [], "ours": []}
        for block in range(args.repeats + 1):
            for name, work in (("plain", plain), ("ours", fast)):
                repeats = 8 if batch == 1 else 1
                spent = seconds(lambda w=work, n=repeats, b=batch: [
                    w(pixels[:b]) for _ in range(n)], device)
                if block:  # the first warms up
                    times[name].append(spent / repeats / batch * 1000)
        for name, values in times.items():
            out[f"{name}_ms_batch{batch}"] = round(median(values), 3)
        out[f"speedup_batch{batch}"] = round(median(times["plain"]) / median(times["ours"]), 3)
        print(f"batch {batch}: plain {out[f'plain_ms_batch{batch}']} ms, ours "
              f"{out[f'ours_ms_batch{batch}']} ms an image")
    many = pixels[torch.arange(args.samples) % 32]
    lime, forward = [], []
    for block in range(min(args.repeats, 3) + 1):
        spent = [seconds(work, device) for work in (
            lambda: inference.probabilities(exact, many),
            lambda: attribution.lime(lambda x: inference.probabilities(exact, x),
                                     pixels[0], [0], args.samples, 0))]
        if block:
            forward.append(spent[0])
            lime.append(spent[1])
    out["lime_over_forward"] = round(median(lime) / median(forward), 3)
    print(f"LIME, {args.samples} samples: {median(lime):.1f} s, the passes alone "
          f"{median(forward):.1f} s")
    print(json.dumps(out))


if __name__ == "__main__":
    guard(main)
