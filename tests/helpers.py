"""Toy images, toy networks and files on disk for the tests; nothing here is downloaded or real."""

import checks  # noqa: F401 - before torch

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn

import data
import fedavg
import models
import train_central  # noqa: F401  (for the processes forked from here)
import train_federated
from training.processes import Job

CPU = torch.device("cpu")
ROOT = Path(data.__file__).parent
BASE = ["--model", "toynet", "--weights", "none", "--image-size", "20", "--rounds", "3",
        "--local-epochs", "1", "--batch-size", "8", "--lr", "0.01"]
SMALL = [x for x in BASE if x not in ("--rounds", "3", "--local-epochs", "1")]  # for the centre
PLAIN = fedavg.Recipe(batch_size=1000, optimizer="sgd", weight_decay=0, momentum=0, clip=0)


def toy_images(n: int, classes: int = 3, size: int = 8, seed: int = 0) -> data.Images:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    pixels = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    pixels[..., 0] = np.clip(pixels[..., 0] // 2 + 60 * labels[:, None, None], 0, 255)
    return data.Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels),
                       [f"c{y}/{i:03d}.png" for i, y in enumerate(labels)],
                       [f"c{c}" for c in range(classes)], [str(i) for i in range(n)], "toy")


def plain_net(classes: int = 3, seed: int = 0) -> nn.Module:
    """No BatchNorm, no dropout: for the oracle."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(),
                         nn.Linear(36, classes))


class BNNet(nn.Module):
    """Two BatchNorm layers, one with a name that does not say so, and dropout."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.mid = nn.Conv2d(4, 4, 1)
        self.downsample = nn.Sequential(nn.BatchNorm2d(4))
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.downsample(self.mid(x)))
        return self.fc(self.drop(x.mean((2, 3))))


@torchvision.models._api.register_model()
def toynet(weights: None = None, num_classes: int = 1000) -> nn.Module:
    """The network of whole runs whose subject is not the network: a hundredth of torchvision's
    smallest. BatchNorm, also under another name, and dropout: whatever averaging, resuming and
    several processes could get wrong. Registered like torchvision's own, so --model finds it."""
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, 16, 3, stride=2, bias=False), norm=nn.BatchNorm2d(16), relu1=nn.ReLU(),
        conv2=nn.Conv2d(16, 24, 3, stride=2, bias=False),
        downsample=nn.Sequential(nn.BatchNorm2d(24)), relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), drop=nn.Dropout(0.1),
        fc=nn.Linear(24, num_classes)))


toynet.__module__ = "torchvision.models.toynet"  # models.build looks through torchvision.models


def clone(state: dict) -> dict:
    return {key: value.clone() for key, value in state.items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def average(updates):
    """Σ n_k θ_k / Σ n_k over (state, n_k) pairs."""
    total = fedavg.WeightedAverage()
    for state, num_examples in updates:
        total.add(state, num_examples)
    return total.result()


def run_round(model, state, clients, images, recipe=PLAIN, chosen=None, bn="average", local_bn=None,
              seed=0, round_index=1, module=fedavg, **fields):
    """One round as train_federated.train composes it: (state, local_bn, records)."""
    recipe = replace(recipe, **({"lr": 0.1, "local_epochs": 1} | fields))
    local_bn, records, total = dict(local_bn or {}), [], module.WeightedAverage()
    for k in range(len(clients)) if chosen is None else chosen:
        update = module.train_client(model, state | local_bn.get(k, {}), images, clients[k], recipe,
                                     (seed, round_index, k))
        entries = module.accept(update, records, local_bn,
                                models.batchnorm_keys(model) if bn == "local" else [])
        if entries is not None:
            total.add(entries, update.num_examples)
    state, kept = state | total.result(), module.kept(records)
    if bn == "recalibrate":
        state = train_federated.recalibrate(Job(), model, state, images, clients, kept)
    return state, local_bn, records


def write_tree(root: Path, counts: dict[str, int], size: int = 20, seed: int = 0) -> Path:
    """A class-per-folder tree of small PNG files, the red channel telling the class."""
    rng = np.random.default_rng(seed)
    for c, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[..., 0] += np.uint8(40 * c)
            Image.fromarray(pixels).save(root / name / f"{name}-{i + 1:03d}.png")
    return root


# ---- whole runs --------------------------------------------------------------------------------

# A process of a test is forked from a server that has imported everything and run nothing: a real
# process, to be killed or measured, without six seconds of imports.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "helpers", "audit", "compare", "explain", "predict", "reporting.report",
    "sklearn.model_selection", "matplotlib.backends.backend_agg"])  # what scripts load late, too
SEES = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}  # the server, at its start


class Process:
    """A program, a file or its text, run as __main__ in a process of its own; output in files."""

    def __init__(self, program: Path | str, arguments, env=None, cwd=None, threads=None) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.output = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        if isinstance(program, str):
            text, program = program, Path(self.folder.name) / "program.py"
            program.write_text(text)
        self.process = SERVER.Process(target=_run, args=(
            program, list(map(str, arguments)), self.output, env or {}, cwd, threads))
        with mock.patch.dict(os.environ, SEES):
            self.process.start()

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess:
        self.process.join(timeout)
        code = self.process.exitcode  # None: it hung
        self.process.kill()
        with self.folder:
            return subprocess.CompletedProcess([], code, *(
                f.read_text(errors="replace") for f in self.output))


def _run(program, arguments, output, env, cwd, threads):
    for target, file in enumerate(output, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), target)
    os.environ.update(env)
    os.chdir(cwd or os.getcwd())
    if threads:
        torch.set_num_threads(threads)
    sys.argv[1:] = arguments
    runpy.run_path(str(program), run_name="__main__")


def script(*arguments, name="train_federated.py", **options):
    return Process(ROOT / name, arguments, **options).wait()


def ranks(count, arguments, users=None, program=ROOT / "train_federated.py", together=False):
    """The processes of a job without torchrun, each with arguments (and a user) of its own; each
    on a machine of its own, or `together` on one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = [Process(program, arguments[rank], cwd="/", threads=1, env={
        "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank * together),
        "LOCAL_WORLD_SIZE": str(count if together else 1), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "HOME": "/nonexistent",
        "SITE_USER": str(users[rank]) if users else ""}) for rank in range(count)]
    return [job.wait() for job in jobs]


TORCHRUN = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"


def torchrun(count, *arguments):
    """Begin a job under torchrun. Torchrun itself is forked; what it starts are commands."""
    return Process(TORCHRUN, ["--nproc-per-node", count, *arguments], env={"OMP_NUM_THREADS": "1"})


def train(tree, out, *arguments):
    train_federated.main(["--data", str(tree), *BASE, "--out", str(out), *map(str, arguments)])
    return out


def history(folder):
    """history.jsonl without its timings."""
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    timings = ("seconds", "images_per_second")
    return [{k: v for k, v in r.items() if k not in timings} for r in lines]


def same_run(a, b):
    one, two = (torch.load(f / "model.pt", weights_only=True) for f in (a, b))
    last = [torch.load(f / "last.pt", weights_only=True)["state"] for f in (a, b)]
    return (equal(one["state"], two["state"]) and equal(*last) and history(a) == history(b)
            and (a / "predictions.csv").read_bytes() == (b / "predictions.csv").read_bytes()
            and (a / "split.csv").read_bytes() == (b / "split.csv").read_bytes())


KILLER = """
import os, signal, sys
import torch
import fedavg, models, train_central, train_federated
from reporting import finished, run_folder
from training import evaluation
point, count, script = sys.argv[1], int(sys.argv[2]), sys.argv[3]
calls = 0
def maybe(name):
    global calls
    calls += name == point
    if name == point and calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
save = torch.save
def half_saved(content, file):
    global calls
    calls += point == 'half-written'
    if point == 'half-written' and calls == count:
        save(content, file)
        file.flush()
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, file)
torch.save = half_saved
for module, function in ((fedavg, 'train_step'), (run_folder, 'append_history'), (os, 'replace'),
                         (evaluation, 'finish'), (finished, 'write_predictions')):
    def wrapped(*a, original=getattr(module, function), name=function, **k):
        maybe(name)
        return original(*a, **k)
    setattr(module, function, wrapped)
{"train_central": train_central, "train_federated": train_federated}[script].main(sys.argv[4:])
"""


def kill(point, count, name, *arguments):
    """Run a script in a process of its own that kills itself at the count-th call of `point`."""
    killed = Process(KILLER, [point, count, name, *arguments]).wait()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
