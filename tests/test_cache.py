"""--cache: decoded once, read by later starts, never believed when it may be wrong."""

from checks import InputError

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import history, same_run, train, write_tree
from PIL import Image

import data
from dataset import cache, files

ROOT = Path(data.__file__).parent


@pytest.fixture
def root(tmp_path):
    return write_tree(tmp_path / "set", {"a": 6, "b": 6}, 24)


def load(root, store, size=16, **more):
    return data.read_folder(str(root), size, cache=str(store), **more)


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded since the list was cleared."""
    seen, original = [], files.decode
    monkeypatch.setattr(files, "decode", lambda path, size: seen.append(path) or original(path,
                                                                                        size))
    return seen


def same(a, b):
    return (a.pixels.equal(b.pixels) and a.fingerprint() == b.fingerprint() and a.found == b.found
            and a.labels.equal(b.labels) and a.bad == b.bad and a.paths == b.paths)


@pytest.mark.parametrize("removed", [(), ("scale-bar",), ("scale-bar", "colour")])
def test_a_second_start_decodes_nothing_and_reads_the_same(root, tmp_path, decoded, removed):
    plain = data.read_folder(str(root), 16, removed=removed)
    decoded.clear()
    first = load(root, tmp_path / "new" / "c", removed=removed)
    assert len(decoded) == 12 and same(first, plain)
    decoded.clear()
    again = load(root, tmp_path / "new" / "c", removed=removed)
    assert not decoded and same(again, plain)
    facts, pixels = sorted((tmp_path / "new" / "c").iterdir())  # nothing half written is left
    assert (facts.suffix, pixels.suffix) == (".json", ".pixels")
    assert facts.stem == pixels.stem and pixels.stat().st_size == 12 * 16 * 16 * 3


def test_the_same_bytes_with_and_without(tmp_path):
    tree = write_tree(tmp_path / "toy", {"Benign": 24, "Early": 24})
    one = train(tree, tmp_path / "one", "--rounds", 1)
    for name in ("two", "three"):
        other = train(tree, tmp_path / name, "--rounds", 1, "--cache", tmp_path / "c")
        assert same_run(one, other) and len(history(other)) == 1


@pytest.mark.parametrize("change", ["pixels", "time", "size", "new", "image size", "intervention"])
def test_a_changed_set_is_decoded_anew(root, tmp_path, decoded, change):
    load(root, tmp_path / "c")
    decoded.clear()
    path, more = root / "a" / "a-001.png", {}
    if change == "pixels":
        Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(path)
    if change == "time":
        os.utime(path, ns=(0, 1))
    if change == "size":
        path.write_bytes(path.read_bytes() + b"x")
    if change == "new":
        path.with_name("a-007.png").write_bytes(path.read_bytes())
    if change == "image size":
        more = {"size": 17}
    if change == "intervention":
        more = {"removed": ("colour",)}
    found = load(root, tmp_path / "c", **more)
    assert len(decoded) == len(found.paths) == 12 + (change == "new")
    assert same(found, data.read_folder(str(root), more.pop("size", 16), **more))


@pytest.mark.parametrize("damage", ["pixel", "short", "facts", "no facts", "digest", "no pixels"])
def test_damage_is_noticed_and_never_believed(root, tmp_path, decoded, damage, capsys):
    plain = load(root, tmp_path / "c")
    (pixels,), (facts,) = ((tmp_path / "c").glob(f"*.{end}") for end in ("pixels", "json"))
    content = bytearray(pixels.read_bytes())
    decoded.clear()
    if damage == "pixel":
        content[1000] ^= 1
        pixels.write_bytes(content)
    if damage == "short":
        pixels.write_bytes(content[:-1])
    if damage == "facts":
        facts.write_text(facts.read_text()[:-20])
    if damage == "no facts":
        facts.write_text("[]")
    if damage == "digest":
        facts.write_text(facts.read_text().replace(plain.digests[3], plain.digests[4]))
    if damage == "no pixels":
        pixels.unlink()
    expected = data.read_folder(str(root), 16)
    decoded.clear()
    assert same(load(root, tmp_path / "c"), expected) and len(decoded) == 12
    assert "is damaged, so that the images are decoded again" in capsys.readouterr().err
    decoded.clear()
    assert same(load(root, tmp_path / "c"), expected) and not decoded  # and is whole again
    del plain


def test_unreadable_images_are_remembered_and_still_an_error(root, tmp_path, decoded):
    (root / "a" / "a-002.png").write_bytes(b"no image")
    whole = load(root, tmp_path / "c", skip_bad=True)
    decoded.clear()
    again = load(root, tmp_path / "c", skip_bad=True)
    assert not decoded and same(whole, again) and again.bad[0][0] == "a/a-002.png"
    assert len(again.paths) == 11
    with pytest.raises(InputError, match="1 unreadable image"):
        load(root, tmp_path / "c")


@pytest.mark.parametrize("place, point", [(os, "posix_fallocate"), (os, "replace"),
                                          (cache, "open")])
def test_a_full_disk_is_one_line_and_work_goes_on(root, tmp_path, monkeypatch, capsys, place,
                                                  point):
    def full(*a):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(place, point, full, raising=False)
    found = load(root, tmp_path / "c")
    monkeypatch.undo()
    assert same(found, data.read_folder(str(root), 16))
    assert capsys.readouterr().err.splitlines() == [
        "--cache: No space left on device: goes on without a cache"]
    assert not list((tmp_path / "c").glob("*.json"))


def test_a_system_without_fallocate_and_a_broken_link_do_no_harm(root, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # as on Windows and macOS
    (root / "a" / "a-002.png").unlink()
    (root / "a" / "a-002.png").symlink_to(tmp_path / "nowhere.png")
    found = [load(root, tmp_path / "c", skip_bad=True) for _ in range(2)]
    plain = data.read_folder(str(root), 16, skip_bad=True)
    assert same(found[0], plain) and same(found[1], plain) and len(plain.bad) == 1


STOPPED = """
import data, os, signal, sys
from dataset import files
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
decode = files.decode
def stop(path, size):
    if path.stem == "b-006":
        os.kill(os.getpid(), signal.SIGINT)
    return decode(path, size)
files.decode = stop
data.read_folder(sys.argv[1], 16, cache=sys.argv[2])
"""


def test_stopped_in_between_it_leaves_nothing(root, tmp_path):
    done = subprocess.run([sys.executable, "-c", STOPPED, str(root), str(tmp_path / "c")], cwd=ROOT,
                          check=False, capture_output=True, text=True)
    assert done.stderr.endswith("KeyboardInterrupt\n") and not list((tmp_path / "c").iterdir())


LIMITED = """
import resource, sys
import torch
import data
from torch import nn
import fedavg
size, cache, limit = int(sys.argv[2]), sys.argv[3] or None, int(sys.argv[4])
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
images = data.read_folder(sys.argv[1], size, cache=cache)
model = nn.Sequential(nn.AvgPool2d(size // 4), nn.Flatten(), nn.Linear(48, 2))
recipe = fedavg.Recipe(batch_size=2, local_epochs=1, augmentation=None)
import numpy as np
update = fedavg.train_client(model, dict(model.state_dict()), images, np.arange(384), recipe,
                             (0, 1, 0))
print(update.record["images"])
"""


def test_a_set_larger_than_memory_trains_from_its_cache(tmp_path):
    """384 images of 512 x 512 are 288 MiB; the process may take 200 MiB more than it has."""
    root = write_tree(tmp_path / "set", {"a": 192, "b": 192}, 16)
    def run(cache):
        arguments = [str(root), "512", cache, str(200 * 2**20)]
        return subprocess.run([sys.executable, "-c", LIMITED, *arguments], cwd=ROOT, check=False,
                              capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run(str(tmp_path / "c")).stdout.split() == ["384"]
    without = run("")
    assert without.returncode != 0 and "MemoryError" in without.stderr


