"""The processes of one run under torchrun, and everything that crosses between them.

    torchrun --nproc-per-node 2 train_federated.py ...            # clients spread over processes
    torchrun --nproc-per-node 2 train_federated.py --site-data NORTH=DIR SOUTH=DIR --out DIR

Without torchrun a run is a job of one process, in which nothing is opened and nothing crosses.
Rank 0 is the server: updates reach it in client order, whoever trained them, so that any number of
processes gives the same bytes. With --site-data every process is a hospital with its own images,
and only what `ALLOWED` lists leaves it (SECURITY.md). Numbers and JSON cross by gloo, no pickle.
"""

import checks
from checks import InputError

import argparse
import hashlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import models
from dataset.files import CLASSES
from fedavg import Update
from models import State
from reporting import provenance, run_folder

ALLOWED = {"agreement", "counts", "header", "update", "state", "records", "tally", "confusion"}
SHARED = ("images", "steps", "loss")  # what a site tells of its training; the rest stays there
UNCOMPARED = {*run_folder.UNRECORDED, "data", "site_data", "device"}  # one's own
HEADER = 2**16  # bytes of the JSON beside an update


class LostProcess(Exception):
    """Another process of the job is gone, or did not answer within --timeout."""


class Job:
    """The processes of a run, of which this is number `rank` of `world`."""

    def __init__(self) -> None:
        self.rank, self.world, self.local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.sites: list[str] = []  # names of the hospitals, with --site-data
        self.folder: Path | None = None  # this hospital's own folder
        self.store: dist.Store | None = None

    def join(self, args: argparse.Namespace) -> None:
        """Meet the other processes. Changes `args` in place where this process is a hospital."""
        if self.world == 1 and (args.site_data or args.classes):
            raise InputError("--site-data and --classes need torchrun: one process a hospital")
        if self.world == 1:
            return
        name = self._take_site(args) if args.site_data else None
        limit = timedelta(seconds=args.timeout)
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=limit))
            # After a restart the store may still hold addresses of dead processes.
            self.store = dist.PrefixStore(f"attempt{provenance.restarts()}", store)
            dist.init_process_group("gloo", timeout=limit, store=self.store, rank=rank,
                                    world_size=world)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"the processes did not meet ({str(error).splitlines()[0]})") from None
        sys.stderr = sys.__stderr__
        checks.quiet = self.rank > 0 and name is None  # rank 0 warns of the same
        names = self.exchange("agreement", name)
        if any(names) and (None in names or len(set(names)) < len(names)):
            self._stop(f"--site-data: every process needs a name of its own, not {names}")
        self.sites = names if any(names) else []

    def _take_site(self, args: argparse.Namespace) -> str:
        """The name and folder of this process among the NAME=DIR of --site-data."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        name, _, folder = args.site_data[self.local_rank % len(args.site_data)].partition("=")
        self.folder = Path(args.out or args.resume or "") / name
        for wrong, message in (
                (len(args.site_data) != local,
                 f"{len(args.site_data)} folder(s) for {local} process(es) of this machine"),
                (not folder or name in ("", ".", "..") or "/" in name, "must be NAME=DIR"),
                (not (args.out or args.resume), "needs --out, where every site writes a folder"),
                (args.folds > 1, "a hospital with images of its own has one split: --folds 1"),
                (not args.resume and (args.data or args.clients or args.partition),
                 "takes the place of --data, --clients and --partition"),
                (args.table, "a --table belongs to --data, not to the folders of hospitals"),
                (args.bn == "local", "the server would keep a state of every site with --bn local"),
                (self.folder.exists() and not (args.resume or provenance.restarts()),
                 f"--out: {self.folder} exists already")):
            if wrong:
                raise InputError(f"--site-data: {message}")
        args.data, args.clients = folder, self.world
        args.classes = args.classes or list(CLASSES)
        return name

    @property
    def name(self) -> str:
        return f"rank {self.rank}" + (f" (site {self.sites[self.rank]})" if self.sites else "")

    @contextmanager
    def preparing(self, args: argparse.Namespace) -> Iterator[dict]:
        """Surrounds all preparation; yields a dictionary for facts that must be equal everywhere.
        Then every process goes on, or all stop and one line (an InputError) says what failed, or
        which flag, fact or code differs. Only digests cross."""
        facts, error = {}, None
        try:
            yield facts
        except (InputError, OSError) as caught:
            error = caught
        facts = {"code": provenance.code()} | facts | {
            f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in UNCOMPARED}
        told = self.exchange("agreement", {"failed": error is not None} | {
            key: hashlib.sha256(repr(value).encode()).hexdigest() for key, value in facts.items()})
        if error is not None and (self.sites or self.rank == 0 or not told[0]["failed"]):
            raise InputError(f"{self.name}: {error}" if self.sites else str(error))
        if failed := [self.sites[k] if self.sites else f"rank {k}"
                      for k, one in enumerate(told) if one["failed"]]:
            self._stop(f"{', '.join(failed)} cannot take part (its own line says why)")
        for key in facts:  # the code first: with equal code, all know the same flags
            if others := [str(k) for k, one in enumerate(told) if one.get(key) != told[0].get(key)]:
                self._stop(f"{key} of rank {', '.join(others)} differs from rank 0's")

    def _stop(self, message: str) -> None:
        """End this process; every other one comes here too, and rank 0 prints the message."""
        raise InputError(message) if self.rank == 0 else SystemExit(2)

    def claim(self) -> bool:
        """True for the first process that reports the end of the job, so that one line is printed;
        False before all have joined: then the process that failed prints the reason."""
        try:
            return self.store is not None and self.store.add("reported", 1) == 1
        except RuntimeError:  # the process that held the store is dead: better twice than never
            return True

    def mine(self, chosen: list[int]) -> list[int]:
        """The clients that this process trains; a hospital is the client of its own number."""
        return [k for k in chosen if k % self.world == self.rank]

    def part(self, indices: np.ndarray) -> np.ndarray:
        """What this process measures: a hospital its own, else rank 0 all and others nothing."""
        return indices if self.rank == 0 or self.sites else indices[:0]

    def exchange(self, kind: str, value: object) -> list:
        """Tell all processes this one's value (JSON types); returns all values in rank order."""
        values = []
        for source in range(self.world):
            text = as_bytes(value)
            if self.world > 1:
                length = torch.tensor([len(text)])
                self._cross(kind, dist.broadcast, length, source)
                text = text if self.rank == source else torch.empty(int(length), dtype=torch.uint8)
                self._cross(kind, dist.broadcast, text, source)
            values.append(json.loads(text.numpy().tobytes()))
        return values

    def total(self, kind: str, numbers: list) -> list:
        """Sums over all processes, number by number, in rank order."""
        return [sum(column) for column in zip(*self.exchange(kind, numbers), strict=True)]

    def share(self, kind: str, state: State) -> State:
        """Give every process rank 0's tensors, which have the entries and the layout of `state`."""
        if self.world == 1:
            return state
        flat = models.pack(state)
        for tensor in flat:
            self._cross(kind, dist.broadcast, tensor, 0)
        return models.unpack(flat, state)

    def collect(self, chosen: list[int], train: Callable[[int], Update],
                like: State) -> Iterator[Update]:
        """At the server every chosen client's update, in client order; a client trains when its
        turn comes. Elsewhere one's own clients train, their updates travel, and nothing is yielded.
        like: a state with the entries and layout of an update. While an update travels its process
        trains the next client, so at most two updates are alive in a process."""
        if self.world == 1:
            yield from map(train, chosen)
            return
        updates = map(train, self.mine(chosen))
        if self.rank > 0:
            pending: list[tuple] = []
            for update in updates:
                self._arrive(pending)  # the update before, which travelled during this training
                pending = self._send(self._public(update))
            self._arrive(pending)
            return
        own = next(updates, None)
        for k in chosen:
            if own is not None and own.client_id == k:
                yield self._public(own)
                own = next(updates, None)  # trained before waiting for the others
            else:
                yield self._receive(k % self.world, like)

    def _public(self, update: Update) -> Update:
        """The update without what a hospital keeps to itself, and with the hospital's name."""
        if not self.sites:
            return update
        record = {key: value if key in SHARED else None for key, value in update.record.items()}
        return update._replace(record={"site": self.sites[update.client_id]} | record)

    def _send(self, update: Update) -> list[tuple]:
        """Begin to send an update to rank 0. Returns what `_arrive` must wait for."""
        header = as_bytes([update.client_id, update.num_examples, update.record], HEADER)
        parcels = [("header", header), *(("update", flat) for flat in models.pack(update.state))]
        return [(tensor, self._cross(kind, dist.isend, tensor, 0))
                for kind, tensor in parcels]  # a tensor must live until it has arrived

    def _arrive(self, pending: list[tuple]) -> None:
        for _, work in pending:
            self._cross("update", work.wait)

    def _receive(self, source: int, like: State) -> Update:
        header, flat = torch.empty(HEADER, dtype=torch.uint8), models.pack(like)
        self._cross("header", dist.recv, header, source)
        for tensor in flat:
            self._cross("update", dist.recv, tensor, source)
        client_id, num_examples, record = json.loads(header.numpy().tobytes())
        return Update(client_id, num_examples, models.unpack(flat, like), record)

    def _cross(self, kind: str, operation: Callable, *arguments) -> object:
        """The one place where anything crosses: checks the kind."""
        if self.sites and kind not in ALLOWED:
            raise RuntimeError(f"{kind} may not leave a site")
        try:
            return operation(*arguments)
        except RuntimeError as error:
            raise LostProcess(str(error).partition("] ")[2].partition(". ")[0]) from None

    def share_round(self, state: State, local_bn: dict[int, State], records: list[dict],
                    ) -> tuple[State, dict[int, State], list[dict]]:
        """Give every process the memory that the server has after a round, or at the start."""
        names = [sorted(local_bn), list(next(iter(local_bn.values()), {})), records]
        clients, keys, records = self.exchange("records", names)[0]
        empty = {key: state[key] for key in keys}
        return (self.share("state", state),
                {k: self.share("state", local_bn.get(k, empty)) for k in clients}, records)


def as_bytes(value: object, size: int = 0) -> Tensor:
    """JSON as uint8, filled up with spaces to `size`, which it may not exceed (ValueError)."""
    text = json.dumps(value).encode().ljust(size)
    if len(text) > (size or len(text)):
        raise ValueError(f"{len(text)} bytes of JSON beside an update, at most {size} may travel")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def start(main: Callable) -> None:
    """Run a script's `main(argv, job)`, as the only process or as one of torchrun's. There,
    whatever cuts the job short, one process says so, and nothing runs after it."""
    job, argv = Job(), sys.argv[1:]
    if "RANK" not in os.environ:
        checks.guard(lambda: main(argv, job))
        return
    argv = run_folder.continued(argv) if job.rank == 0 else argv
    if job.rank:
        sys.stdout = io.StringIO()
    if job.local_rank:
        sys.stderr = io.StringIO()  # until the processes have met, one of each machine prints

    def end(reason: str, code: int) -> None:
        if job.claim():
            print(f"{Path(sys.argv[0]).name}: {job.name}: {reason}; the last checkpoint is whole, "
                  "go on with --resume and the run folder", file=sys.__stderr__, flush=True)
        os._exit(code)

    signal.signal(signal.SIGTERM, lambda *_: end("stopped, as the job lost a process", 143))
    code = 0
    try:
        checks.guard(lambda: main(argv, job))
    except LostProcess as error:
        end(f"another process is gone or silent ({error})", 1)
    except SystemExit as error:
        code = error.code
    if code and sys.stderr is not sys.__stderr__:  # failed before the processes met
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(5)  # the first process of this machine usually prints the same reason
        sys.__stderr__.write(sys.stderr.getvalue())
    # Out at once: gloo's destructor holds the GIL and joins threads that may be waiting for it.
    for stream in (sys.stdout, sys.__stderr__):
        stream.flush()
    os._exit(code)
