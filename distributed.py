"""The processes of one torchrun job: who trains which clients, and all that crosses between them.

    torchrun --nproc-per-node 2 train_federated.py ...                   # clients over processes
    torchrun --nproc-per-node 2 train_federated.py --site-data A B --out DIR   # hospitals' own data

Imported under torchrun only. Every process runs the same round loop; rank 0 alone writes, prints
and draws. Sums travel down the ranks to rank 0 and their mean back to all: per round and process a
fixed number of model sizes, whatever the number of clients. With --site-data, what may leave a
process is `ALLOWED` and nothing else. See SECURITY.md.
"""

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import checks
import data
import evaluation
import fedavg
import metrics
import models
import run_folder
import splits
from checks import InputError
from files import CLASSES

ALLOWED = {"state", "n", "class counts", "confusion", "loss sums", "fingerprint", "scores"}
UNCOMPARED = {"data", "site_data", "out", "resume", "device", "timeout"}  # each process's own
FIGURES = ("images", "steps", "loss", "accuracy", "skipped_steps", "update_norm", "left_out")


class LostProcess(Exception):
    """Another process of the job is gone, or did not answer within --timeout."""


class Team:
    """This process among those of the job; `sent` counts the bytes it sent, by kind."""

    def __init__(self) -> None:
        self.rank, self.world, self.local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.sites: list[str] = []  # names, with --site-data
        self.share_scores = False
        self.device = torch.device("cpu")
        self.store: dist.Store | None = None
        self.folder: Path | None = None
        self.sent: Counter = Counter()

    # ---- joining, agreeing, ending --------------------------------------------------------------

    def join(self, args: argparse.Namespace) -> None:
        """Meet the other processes; settle device, site and folder. Changes `args` in place."""
        for flag in ("local_only", "seeds"):
            if getattr(args, flag):
                raise InputError(f"--{flag.replace('_', '-')} is for one process, not torchrun")
        if args.site_data is not None:
            self._take_site(args)
        if self.rank == 0 and args.out is not None and Path(args.out).exists():
            raise InputError(f"--out {args.out}: exists already (--resume continues a run)")
        device = args.device
        if torch.cuda.is_available() and device in ("auto", "cuda"):  # one each
            device = f"cuda:{self.local_rank % torch.cuda.device_count()}"
        self.device = models.pick_device(device)
        limit = timedelta(seconds=args.timeout)
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=limit))
            # a restart may find the store as it was: the addresses of the dead stay behind
            self.store = dist.PrefixStore(f"attempt{restarts()}", store)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                    timeout=limit, store=self.store, rank=rank, world_size=world)
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"the processes of the job did not meet ({reason})") from None
        sys.stderr = sys.__stderr__
        checks.quiet = self.rank > 0 and not self.sites  # rank 0 warns of the same

    def _take_site(self, args: argparse.Namespace) -> None:
        """This process's own folder of those that --site-data names on this machine."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        if len(args.site_data) != local:
            raise InputError(f"--site-data: {len(args.site_data)} folder(s) for the {local} "
                             "process(es) of this machine")
        if args.out is None and args.resume is None:
            raise InputError("--site-data needs --out: every site writes its own folder in it")
        if args.bn == "local":
            raise InputError("--bn local with --site-data: not supported, a site keeps no state "
                             "between rounds")
        self.sites = args.site_names or [f"site{k}" for k in range(self.world)]
        if len(set(self.sites)) != self.world or len(self.sites) != self.world:
            raise InputError(f"--site-names: {self.world} different names are needed")
        self.folder = Path(args.out or args.resume) / self.sites[self.rank]
        if self.folder.exists() and not (args.resume or restarts()):
            raise InputError(f"--out: {self.folder} exists already")
        self.share_scores = args.share_scores
        args.data, args.clients = args.site_data[self.local_rank], self.world
        args.classes = args.classes or list(CLASSES)

    @property
    def name(self) -> str:
        return f"rank {self.rank}" + (f" (site {self.sites[self.rank]})" if self.sites else "")

    @contextmanager
    def agreement(self, args: argparse.Namespace) -> Iterator[dict]:
        """Around all preparation: yields facts to fill in; then either every process goes on, or
        all stop, the differing argument, class list or code named.

        Sends digests only. Raises InputError where this process has something to say.
        """
        facts: dict = {}
        error = None
        try:
            yield facts
        except (InputError, OSError) as caught:
            error = caught
        facts |= {f"--{key.replace('_', '-')}": value for key, value in vars(args).items()
                  if key not in UNCOMPARED}
        code = [p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))]
        first = self._table("fingerprint", [error is not None, digest(code), digest([*facts])])
        failed = first[:, 0].astype(bool)
        if error is not None and (self.sites or self.rank == 0 or not failed[0]):
            raise InputError(f"{self.name}: {error}" if self.sites else str(error))
        if failed.any():
            ranks = [self.sites[k] if self.sites else f"rank {k}" for k in np.flatnonzero(failed)]
            self._stop(f"{', '.join(ranks)} cannot take part (its own line says why)")
        self._compare(first[:, 1:2], ["code"])
        self._compare(first[:, 2:], ["flags"])
        self._compare(self._table("fingerprint", [digest(v) for v in facts.values()]), list(facts))

    def _compare(self, table: np.ndarray, names: list[str]) -> None:
        for name, column in zip(names, table.T, strict=True):
            others = np.flatnonzero(column != column[0])
            if len(others):
                self._stop(f"{name} of rank {', '.join(map(str, others))} differs from rank 0's")

    def _stop(self, message: str) -> None:
        """All stop; one says why."""
        if self.rank == 0:
            raise InputError(message)
        raise SystemExit(2)

    def claim(self) -> bool:
        """Whether this process is the first to report the end of the job. Before they have met
        nothing has begun, and torchrun ends one because another failed, which says why."""
        try:
            return self.store is not None and self.store.add("reported", 1) == 1
        except RuntimeError:  # the store went down with its process: better twice than never
            return True

    # ---- what crosses ---------------------------------------------------------------------------

    def _cross(self, kind: str, operation: Callable, tensor: Tensor, *peer, sends: bool) -> None:
        if self.sites and kind not in ALLOWED:
            raise RuntimeError(f"{kind} may not leave a site")
        if sends:
            self.sent[kind] += tensor.numel() * tensor.element_size()
        try:
            operation(tensor, *peer)
        except RuntimeError as error:
            raise LostProcess(str(error).partition("] ")[2].partition(". ")[0]) from None

    def _table(self, kind: str, row: list) -> np.ndarray:
        """One row of numbers from every process, float64 [world, len(row)]; exact, zeros added."""
        table = torch.zeros(self.world, len(row), dtype=torch.float64, device=self.device)
        table[self.rank] = torch.tensor(row, dtype=torch.float64)
        self._cross(kind, dist.all_reduce, table, sends=True)
        return table.cpu().numpy()

    def _broadcast(self, kind: str, value: Tensor, source: int = 0) -> Tensor:
        """The source's tensor, in the shape, dtype and strides of `value`."""
        buffer = value.to(self.device, copy=True, memory_format=torch.contiguous_format)
        self._cross(kind, dist.broadcast, buffer, source, sends=self.rank == source)
        return torch.empty_like(value, device=self.device).copy_(buffer)

    def mean(self, partial: fedavg.WeightedSum, like: fedavg.State) -> fedavg.State:
        """Σ n_k θ_k / Σ n_k over all processes: from the last rank down, each adds its own."""
        count = torch.tensor([partial.num_examples], device=self.device)
        if self.rank + 1 < self.world:
            other = torch.zeros_like(count)
            self._cross("n", dist.recv, other, self.rank + 1, sends=False)
            partial.num_examples += int(other)
            for key, value in like.items() if other else ():
                partial.add(key, *self._receive(value))
            partial.dtypes = {key: value.dtype for key, value in like.items()}
        if self.rank > 0:
            self._cross("n", dist.send, torch.full_like(count, partial.num_examples),
                        self.rank - 1, sends=True)
            for key in like if partial.num_examples else ():
                parts = [partial.high[key]]
                parts += [partial.low[key]] if like[key].is_floating_point() else []
                for part in parts:
                    self._cross("state", dist.send, part.contiguous(), self.rank - 1, sends=True)
        total = self._broadcast("n", torch.tensor([partial.num_examples]))
        if not total:
            raise ValueError("no update to average")
        result = partial.mean() if self.rank == 0 else like
        return {key: self._broadcast("state", result[key]) for key in like}

    def _receive(self, like: Tensor) -> list[Tensor]:
        dtype = torch.float64 if like.is_floating_point() else like.dtype
        parts = []
        for _ in range(2 if like.is_floating_point() else 1):
            buffer = torch.empty(like.shape, dtype=dtype, device=self.device)
            self._cross("state", dist.recv, buffer, self.rank + 1, sends=False)
            parts.append(torch.empty_like(like, dtype=dtype, device=self.device).copy_(buffer))
        return parts

    # ---- the run --------------------------------------------------------------------------------

    def owner(self, chosen: list[int], client_id: int) -> int:
        """The rank that trains a client: its own site, else dealt in turn."""
        return client_id if self.sites else chosen.index(client_id) % self.world

    def mine(self, chosen: list[int]) -> list[int]:
        return [k for k in chosen if self.owner(chosen, k) == self.rank]

    def own_clients(self, split: splits.Split) -> list[np.ndarray]:
        """With --site-data: this site's training part, and nothing of the others."""
        nothing = np.empty(0, np.int64)
        return [split["train"] if k == self.rank else nothing for k in range(self.world)]

    def all_labels(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Labels of the training part of all sites together, from their class counts."""
        if not self.sites:
            return labels
        counts = self._table("class counts", np.bincount(labels, minlength=num_classes).tolist())
        return np.arange(num_classes).repeat(counts.sum(0).astype(int))

    def facts(self, images: data.Images) -> dict:
        """What must be equal everywhere beside the flags."""
        if not self.sites:
            return {"the class list": images.classes, "the data": images.fingerprint()}
        run = self.folder / "run.json"
        if run.exists() and run_folder.read_json(run)["fingerprint"] != images.fingerprint():
            raise InputError(f"{self.folder}: the images are not those of the run")
        return {"the class list": images.classes}

    def begin_site(self, args: argparse.Namespace, images: data.Images, split: splits.Split,
                   argv: list[str]) -> None:
        """A site's own folder in the run folder, which on a machine without rank 0 is its alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder, whole in ((self.folder.parent, None), (self.folder, self.folder.parent.name)):
            if not (folder / "run.json").exists():
                run_folder.write_run(folder, args, "federated", images, self.device, argv,
                                     part_of=whole)
        run_folder.write_split(self.folder, images, split, self.own_clients(split))

    def begin(self, checkpoint: dict | None, model: torch.nn.Module, bn: str) -> dict:
        """Rank 0's checkpoint, on every rank: round, state, validation losses, local BatchNorm."""
        like = models.moved(model.state_dict(), "cpu")
        bn_keys = models.batchnorm_keys(model) if bn == "local" else []
        lead = checkpoint or {"round": 0, "state": like, "history": [], "local_bn": {}}
        stands = self._table("n", [lead["round"], len(lead["history"])])[0].astype(int)
        losses = torch.full((int(stands[1]),), np.inf, dtype=torch.float64)
        if self.rank == 0:
            losses[:] = torch.tensor(evaluation.val_losses(lead["history"]))
        losses = self._broadcast("loss sums", losses).tolist()
        state = self.share(lead["state"])
        local_bn = {}
        if bn_keys:
            clients = self._table("record", [len(lead["local_bn"])])[0].astype(int)
            ids = self._broadcast("record", torch.tensor(
                sorted(lead["local_bn"]) if self.rank == 0 else [0] * int(clients[0]),
                dtype=torch.int64))
            local_bn = {k: {key: self._broadcast("record", lead["local_bn"].get(k, like)[key])
                            for key in bn_keys} for k in ids.tolist()}
        if self.rank == 0:
            return lead
        history = [{"val_loss": x} for x in losses]
        return {"round": int(stands[0]), "state": state, "history": history, "local_bn": local_bn}

    def share(self, state: fedavg.State) -> fedavg.State:
        """Rank 0's state, on every rank."""
        return {key: self._broadcast("state", value) for key, value in state.items()}

    def run_round(self, model: torch.nn.Module, global_state: fedavg.State, local_bn: dict,
                  chosen: list[int], clients: list[np.ndarray], images: data.Images, recipe,
                  **settings) -> tuple[fedavg.State, dict, list[dict]]:
        """`fedavg.run_round` with the chosen clients spread over the ranks; the same everywhere."""
        state, local_bn, records = fedavg.run_round(
            model, global_state, local_bn, self.mine(chosen), clients, images, recipe,
            mean=self.mean, **settings)
        own = {r["client"]: r for r in records}
        if self.sites:
            return state, local_bn, self._site_records(own, chosen, recipe, settings)
        rows = [[np.nan if x is None else float(x) for x in (own[k][f] for f in FIGURES)]
                if k in own else [0.0] * len(FIGURES) for k in chosen]
        table = self._table("record", np.ravel(rows).tolist()).sum(0).reshape(len(chosen), -1)
        records = [{"client": k, "num_examples": len(clients[k]),
                    **{f: kind(x) for f, kind, x in zip(
                        FIGURES, (int, int, float, float, int, float, bool), row, strict=True)}}
                   for k, row in zip(chosen, table, strict=True)]
        for r in records:
            r["update_norm"] = None if r["left_out"] else r["update_norm"]
            if settings["bn"] == "local" and not r["left_out"]:
                source = self.owner(chosen, r["client"])
                bn = local_bn.get(r["client"], global_state)
                local_bn[r["client"]] = {key: self._broadcast("record", bn[key], source)
                                         for key in models.batchnorm_keys(model)}
        return state, dict(sorted(local_bn.items())), records

    def _site_records(self, own: dict, chosen: list[int], recipe, settings: dict) -> list[dict]:
        """What rank 0 may know of each site's training: n and the sum of losses."""
        r = own.get(self.rank)
        kept = r is not None and not r["left_out"]
        n = self._table("n", [r["num_examples"] if r else 0])[:, 0].astype(int)
        losses = self._table("loss sums", [r["loss"] * r["images"] if kept else 0.0])[:, 0]
        taken = self._table("n", [r["num_examples"] if kept else 0])[:, 0] > 0
        records = []
        for k in chosen:
            sizes = [len(b) for b in data.batch_slices(torch.arange(n[k] * recipe.expand),
                                                       recipe.batch_size)]
            images = settings["local_epochs"] * sum(sizes)
            records.append({
                "client": k, "site": self.sites[k], "num_examples": int(n[k]), "images": images,
                "steps": settings["local_epochs"] * len(sizes),
                "loss": float(losses[k]) / images if taken[k] else None, "accuracy": None,
                "skipped_steps": None, "update_norm": None, "left_out": not bool(taken[k])})
        return records

    def validate(self, parts: evaluation.Evaluation, state: fedavg.State, local_bn: dict) -> dict:
        """Validation figures, on every rank: rank 0's own, or pooled over sites."""
        if self.sites:
            return self.pool(parts, "val", parts.logits("val", state))
        m = {"loss": None, "accuracy": {"value": None}}
        if self.rank == 0:
            m = parts.measure("val", parts.logits("val", state, local_bn))
        loss = self._table("loss sums", [np.nan if m["loss"] is None else m["loss"]])[0, 0]
        return m | {"loss": float(loss) if np.isfinite(loss) else None}

    def pool(self, parts: evaluation.Evaluation, part: str, logits: np.ndarray) -> dict:
        """Figures of a part over all sites, and of each under "clients"; on every rank."""
        labels = parts.images.labels.numpy()[parts.split[part]]
        classes = parts.images.classes
        own = metrics.measure(logits, labels, classes)
        n = self._table("n", [own["n"]])[:, 0].astype(int)
        loss = np.nan if own["loss"] is None else own["loss"] * own["n"]
        losses = self._table("loss sums", [loss])[:, 0]
        tables = self._table("confusion", np.ravel(own["confusion"]).tolist()).astype(np.int64)
        tables = tables.reshape(-1, len(classes), len(classes))
        sites = [metrics.measure_counts(c, x, classes)
                 for c, x in zip(tables, losses, strict=True)]
        pooled = metrics.measure_counts(tables.sum(0), losses.sum(), classes)
        if self.share_scores and part == "test":
            scores = np.zeros((n.sum(), len(classes) + 1))
            first = n[:self.rank].sum()
            scores[first:first + n[self.rank]] = np.column_stack([logits, labels])
            scores = self._table("scores", scores.ravel().tolist()).sum(0).reshape(scores.shape)
            pooled = metrics.measure(scores[:, :-1], scores[:, -1].astype(int), classes)
        return pooled | {"clients": sites}


def digest(value: object) -> int:
    """52 bits of sha256: exact in float64."""
    return int(hashlib.sha256(repr(value).encode()).hexdigest()[:13], 16)


def restarts() -> int:
    """How often torchrun --max-restarts has started this job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
