"""From the command to the first step: imports, decoding, cache, colour baselines, network.

    python benchmarks/start.py                  # 3,256 drawn images at 224 pixels: some minutes
    python benchmarks/start.py --images 64 --image-size 32 --model resnet18

Imports are CPU seconds of whole processes, as a ratio to `import torch, torchvision` of the same
run; the other parts are wall seconds in one process. Nothing else may run. Last line: JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from checks import guard, integer, make_parser

import json
import resource
import subprocess
import tempfile
import time

import numpy as np

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_federated", "train_central", "data", "predict", "explain", "compare", "audit")


def cpu_seconds(*arguments: str) -> float:
    """The least of three runs of Python with these arguments."""
    best = np.inf
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return best


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--images", type=integer(8), default=3256)
    add("--image-size", type=integer(8), default=224)
    add("--model", default="resnet50")
    args = parser.parse_args()
    torch_alone = cpu_seconds("-c", "import torch, torchvision")
    found = {"import_torch_seconds": torch_alone, "help_over_import_torch": {
        name: cpu_seconds(f"{name}.py", "--help") / torch_alone for name in SCRIPTS}}
    from throughput import draw_folder

    import data
    import models
    from dataset import splits
    from reporting.baselines import colour_only

    def timed(name, call):
        began = time.perf_counter()
        result = call()
        found[f"{name}_seconds"] = time.perf_counter() - began
        return result
    with tempfile.TemporaryDirectory() as folder:
        tree, cache = draw_folder(Path(folder) / "set", args.images, args.image_size), folder + "/c"
        images = timed("decode", lambda: data.read_folder(str(tree), args.image_size))
        timed("decode_and_write_cache",
              lambda: data.read_folder(str(tree), args.image_size, cache=cache))
        timed("read_cache", lambda: data.read_folder(str(tree), args.image_size, cache=cache))
        timed("network", lambda: models.build(args.model, 4, seed=0))
        split = splits.make_split("random", images.labels.numpy(), 42)
        timed("colour_baselines_at_the_end", lambda: colour_only(images, split))
    before = ("read_cache_seconds", "network_seconds")
    found["start_without_decoding_over_import_torch"] = (
        found["help_over_import_torch"]["train_federated"]
        + sum(found[key] for key in before) / torch_alone)
    print(json.dumps(found))


if __name__ == "__main__":
    guard(main)
