"""Audits: planted duplicates and shortcuts are found, and nothing where nothing is."""

from checks import InputError

import argparse
import csv
import io
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from helpers import script, toy_images, train, write_tree
from PIL import Image, PngImagePlugin
from PIL.TiffImagePlugin import IFDRational

import audit
import data
import models
import predict
from auditing import duplicates, probes
from dataset import interventions, splits
from reporting import metrics, run_folder


@pytest.fixture(scope="module")
def fields():
    """Twelve unrelated fields of many cells, uint8 [12, 160, 160, 3]."""
    rng, (rows, columns) = np.random.default_rng(3), np.mgrid[:160, :160]
    out = np.full((12, 160, 160, 3), 230.0)
    for field in out:
        for _ in range(70):
            y, x, radius = *rng.uniform(0, 160, 2), rng.uniform(4, 10)
            inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            field[inside] = rng.uniform(60, 200, 3)
    return (out + rng.normal(0, 2, out.shape)).clip(0, 255).astype(np.uint8)


def stack(arrays):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def recompressed(array, quality):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


# ---- duplicates -------------------------------------------------------------------------------

def test_unrelated_images_are_no_duplicates(fields):
    assert duplicates.near_duplicates(stack([f[:128, :128] for f in fields])) == []


def test_planted_copies_shifts_and_recompressions_are_found_and_nothing_else(fields):
    base = [f[:128, :128] for f in fields]
    planted = [fields[0][:128, :128], recompressed(fields[1][:128, :128], 30),
               fields[2][20:148, 12:140], fields[3][0:128, 32:160],
               recompressed(fields[4][32:160, 30:158], 60)]
    pairs = duplicates.near_duplicates(stack(base + planted))
    assert [(p.i, p.j) for p in pairs] == [(k, 12 + k) for k in range(5)]
    assert [p.shift for p in pairs] == [(0, 0), (0, 0), (20, 12), (0, 32), (32, 30)]
    assert all(p.correlation > 0.9 for p in pairs)
    assert pairs[3].overlap == pytest.approx(96 / 128)


def test_the_strip_of_the_scale_bar_makes_no_pair(fields):
    marked = [f[:128, :128].copy() for f in fields]
    for image in marked:
        image[116:, 80:] = 0
    assert duplicates.near_duplicates(stack(marked)) == []
    assert duplicates.grey(torch.zeros(2, 3, 100, 9, dtype=torch.uint8)).shape == (2, 88, 9)


def test_registration_of_a_known_shift_in_either_sense(fields):
    grey = fields[5].astype(float).mean(2)
    for rows, columns in ((0, 0), (10, 5), (-12, 7), (30, -28)):
        a = grey[32:128, 32:128]
        b = grey[32 + rows:128 + rows, 32 + columns:128 + columns]
        shift, overlap, r = duplicates.register(a, b)
        assert shift == (rows, columns) and r > 0.999
        assert overlap == pytest.approx((96 - abs(rows)) * (96 - abs(columns)) / 96**2)


@pytest.mark.parametrize(("told", "moved"), [
    ((0, -3), (0, 7)), ((0, 7), (0, 7)), ((3, 0), (-7, 0)), ((-3, 2), (7, 2)), ((0, 0), (0, 0))])
def test_a_shift_is_taken_in_either_sense_where_a_fair_share_overlaps(monkeypatch, told, moved):
    """Axes wrap: a shift of 7 of 10 pixels looks like one of -3."""
    monkeypatch.setattr(duplicates, "phase_cross_correlation",
                        lambda a, b: (np.array(told, dtype=float), 0.0, 0.0))
    monkeypatch.setattr(duplicates, "OVERLAP", 0.3 if 0 in moved else 0.24)
    plane = np.random.default_rng(0).normal(size=(30, 30))
    rows, columns = moved
    a, b = plane[10:20, 10:20], plane[10 + rows:20 + rows, 10 + columns:20 + columns]
    shift, overlap, r = duplicates.register(a, b)
    assert shift == moved and r == pytest.approx(1)
    assert overlap == (10 - abs(rows)) * (10 - abs(columns)) / 100
    monkeypatch.setattr(duplicates, "OVERLAP", overlap + 0.01)
    assert duplicates.register(a, b)[0] != moved or overlap == 1


def test_a_picture_of_one_grey_correlates_with_nothing(monkeypatch):
    monkeypatch.setattr(duplicates, "phase_cross_correlation",
                        lambda a, b: (np.zeros(2), 0.0, 0.0))
    flat, other = np.ones((6, 6)), np.tile([0.0, 2.0], (6, 3))  # the other's deviation is 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is divided by a deviation of 0
        for a, b in ((flat, other), (other, flat), (flat, flat)):
            assert duplicates.register(a, b) == ((0, 0), 0.0, -1.0)
    assert duplicates.register(other, other) == ((0, 0), 1.0, pytest.approx(1))


@pytest.mark.parametrize("block", [1, 2, 256])
def test_every_pair_is_compared_whatever_the_block(fields, monkeypatch, block):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    a, b = fields[0][:128, :128], fields[1][:128, :128]
    found = duplicates.candidates(stack([a, b, a, b, b]))
    assert [pair[:2] for pair in found] == [(0, 2), (1, 3), (1, 4), (3, 4)]
    assert all(peak == pytest.approx(1, abs=0.01) for _, _, peak in found)
    (pair,) = duplicates.candidates(stack([a, a]))
    assert pair[:2] == (0, 1)
    for more, kept in ((0, True), (1e-6, False)):  # the threshold itself is reached
        monkeypatch.setattr(duplicates, "PEAK", pair[2] + more)
        assert (duplicates.candidates(stack([a, a])) == [pair]) == kept


def test_a_pair_correlates_by_the_threshold_at_least(monkeypatch):
    monkeypatch.setattr(duplicates, "candidates", lambda pixels: [(0, 1, 0.5), (0, 2, 1)])
    found = iter([((1, 2), 0.75, 0.6), ((0, 0), 1.0, 0.5999)])
    monkeypatch.setattr(duplicates, "register", lambda a, b: next(found))
    assert duplicates.near_duplicates(toy_images(3).pixels) == [
        duplicates.Pair(0, 1, 0.5, (1, 2), 0.75, 0.6)]


def test_faint_pictures_are_whitened_too():
    pixels = torch.zeros(1, 3, 73, 64, dtype=torch.uint8)  # 64 rows without the scale bar's strip
    pixels[0, 0, 32, 32] = 1
    size = duplicates.spectra(pixels)[0, 8:56, 8:].abs()
    assert size.numpy() == pytest.approx(np.ones((48, 25)), abs=1e-4)


def test_spectra_are_of_pictures_that_fade_to_their_edges():
    """Half a cosine over 9 of the 64 pixels at each side: as many as 15 % hold."""
    pixels = toy_images(3, size=80).pixels
    fade = 0.5 - 0.5 * np.cos(np.pi * (np.arange(9) + 0.5) / 9)
    window = np.concatenate([fade, np.ones(46), fade[::-1]])
    small = torch.nn.functional.interpolate(duplicates.grey(pixels)[:, None], (64, 64),
                                            mode="area")[:, 0].numpy()
    for picture, found in zip(small, duplicates.spectra(pixels).numpy(), strict=True):
        whole = np.fft.rfft2((picture - picture.mean()) * np.outer(window, window))
        assert found == pytest.approx(whole / np.abs(whole), abs=1e-3)


def test_groups_are_connected_components():
    assert duplicates.exact_pairs(["a", "b", "a", "c", "a"]) == [(0, 2), (0, 4)]
    assert duplicates.group(6, [(1, 2), (4, 2), (3, 5)]).tolist() == [0, 1, 1, 3, 1, 3]


# ---- probes -----------------------------------------------------------------------------------

def square(pixel, n=1, size=50):
    images = toy_images(n, size=size)
    images.pixels[:] = torch.tensor(pixel, dtype=torch.uint8)[:, None, None]
    return images


@pytest.mark.parametrize(("size", "width"), [(50, 2), (12, 1)])
def test_the_frame_is_4_percent_of_the_side_and_a_pixel_at_least(size, width):
    images = square([10, 20, 30], size=size)
    images.pixels[:, :, width:-width, width:-width] = 200
    colour = [10, 20, 30]  # mean, no deviation, five quantiles
    assert probes.frame(images)[0].tolist() == [*colour, 0, 0, 0, *colour * 5]
    images.pixels[:, 0, width - 1, width:-width] = 11
    assert probes.frame(images)[0, 0] > 10


def test_a_header_is_eleven_numbers(tmp_path):
    images = square([0, 0, 0], n=3)
    images.root, images.paths = tmp_path, ["plain.png", "grey.jpg", "colour.jpg"]
    tables, exif = [[2] * 64, [3] * 32 + [5] * 32], Image.Exif()
    exif[0x010E] = "words"
    Image.new("RGBA", (7, 5)).save(tmp_path / "plain.png")
    Image.new("L", (8, 9)).save(tmp_path / "grey.jpg", qtables=tables[:1], dpi=(72, 96))
    Image.new("RGB", (6, 4)).save(tmp_path / "colour.jpg", qtables=tables, progressive=True,
                                  exif=exif, icc_profile=b"x" * 20)
    sizes = [(tmp_path / path).stat().st_size for path in images.paths]
    rows = probes.header(images).tolist()
    assert rows[0] == [sizes[0], 7, 5, 4, 0, 0, 0, 0, 0, 0, 0]
    assert rows[1] == [sizes[1], 8, 9, 1, 1, 2, 0, 0, 72, 0, 0]
    assert rows[2][:8] == [sizes[2], 6, 4, 3, 2, 2, 4, 1]
    assert rows[2][9] == len(exif.tobytes()) and rows[2][10] == 20
    # a resolution of 0/0, and a colour profile that is broken
    images.paths, info = ["odd.tif", "odd.png"], PngImagePlugin.PngInfo()
    Image.new("L", (8, 9)).save(tmp_path / "odd.tif", tiffinfo={282: IFDRational(0, 0),
                                                                283: IFDRational(0, 0), 296: 2})
    info.add(b"iCCP", b"name\0\0no zlib stream")
    Image.new("L", (8, 9)).save(tmp_path / "odd.png", pnginfo=info)
    rows = probes.header(images)
    assert np.isfinite(rows).all() and rows[0, 8] == rows[1, 10] == 0


def test_a_probe_is_scored_over_the_test_parts_of_all_folds():
    x, labels = np.array([[0.0], [1], [0], [1], [1], [0]]), np.array([0, 1, 0, 1, 0, 1])
    several = [{"train": np.array([0, 1]), "test": np.array(test)} for test in ([2, 3, 4], [5])]
    assert probes.score(x, labels, several, "1-nn")["value"] == 2 / 4


def toy_split(n):
    order = np.random.default_rng(0).permutation(n)
    return {"train": order[: n * 2 // 3], "val": order[:0], "test": order[n * 2 // 3:]}


@pytest.mark.parametrize(("name", "area"), [
    ("border frame only", np.s_[0:1]), ("scale-bar corner only", np.s_[-3:]),
    ("background only", np.s_[:])])
def test_a_probe_finds_its_planted_shortcut_and_chance_without(name, area):
    rng = np.random.default_rng(1)
    n = 120
    labels = rng.integers(0, 3, n)
    noise = rng.integers(0, 200, (n, 32, 32, 3), dtype=np.uint8)

    def score(pixels):
        images = toy_images(n, size=32)
        images.pixels, images.labels = stack(pixels), torch.from_numpy(labels)
        return probes.score(probes.features(images)[name], labels, [toy_split(n)])
    clean = score(noise)
    assert clean["low"] < 1 / 3 < clean["high"]
    marked = noise.copy()
    for image, y in zip(marked, labels, strict=True):
        if name == "scale-bar corner only":
            image[-3:, -6:] = 80 * y
        elif name == "border frame only":
            image[area] = 80 * y
        else:
            image[..., 2][image.astype(int).sum(2) > 380] = 150 + 50 * y
    assert score(marked)["low"] > 0.8


def test_the_header_probe_reads_no_pixel(tmp_path):
    """Two classes with the same pictures, saved at two qualities."""
    rng = np.random.default_rng(0)
    for i in range(30):
        picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        for name, quality in (("a", 60), ("b", 90)):
            (tmp_path / name).mkdir(exist_ok=True)
            picture.save(tmp_path / name / f"{i}.jpg", quality=quality)
    images = data.read_folder(str(tmp_path), 24)
    x = probes.features(images)["file size and header only"]
    assert probes.score(x, images.labels.numpy(), [toy_split(60)])["value"] == 1.0


# ---- interventions ----------------------------------------------------------------------------

def test_mask_corner_paints_the_local_background_and_nothing_else():
    image = torch.full((3, 100, 100), 200, dtype=torch.uint8)
    image[:, :50] = 90  # far from the corner
    image[:, 85:, 70:] = 5  # a scale bar
    image[:, 80:85, 60:80] = 30  # a dark cell beside it: not background
    masked = interventions.mask_corner(image)
    assert (masked[:, 85:, 70:] == 200).all()
    outside = torch.ones(100, 100, dtype=torch.bool)
    outside[85:, 70:] = False
    assert torch.equal(masked[:, outside], image[:, outside])
    assert (image[:, 85:, 70:] == 5).all()  # the input survives


def test_the_paint_is_the_median_of_the_brighter_half_of_one_pixel_around_at_least():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[:, 3, 3] = 255  # the corner
    image[:, 2, 2], image[:, 2, 3], image[:, 3, 2] = 50, 100, 200  # what is around it
    assert interventions.mask_corner(image)[:, 3, 3].tolist() == [100] * 3
    wide = torch.full((3, 4, 40), 10, dtype=torch.uint8)
    wide[:, 0, 24:], wide[:, 1, 24:] = 90, 60  # the first row is within 4 pixels, too
    assert interventions.mask_corner(wide)[0, 3, 39] == 60
    tall = torch.full((3, 20, 2), 200, dtype=torch.uint8)
    tall[:, 16, 1] = 10  # above the corner; its left is the first column
    assert interventions.mask_corner(tall)[0, 19, 1] == 200


def test_grey_world_gives_equal_channel_means():
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(20, 100, (3, 40, 40), generator=rng).to(torch.uint8)
    image[2] += 60
    means = interventions.grey_world(image).float().mean((1, 2))
    assert means.max() - means.min() < 0.1 and image.float().mean((1, 2)).max() > 110
    dark = torch.zeros(3, 2, 2, dtype=torch.uint8)
    dark[0, 0, 0], dark[1:] = 200, 100  # red: mean 50, in scale 1⅔ times 200, which is no uint8
    assert interventions.grey_world(dark)[:, 0, 0].tolist() == [255, 83, 83]
    assert interventions.grey_world(dark)[:, 0, 1].tolist() == [0, 83, 83]
    dark[0] = torch.tensor([[1, 0], [1, 0]])  # hardly any red: 1 becomes 200.5 / 3 / 0.5
    assert interventions.grey_world(dark)[0].tolist() == [[134, 0], [134, 0]]


def test_interventions_have_an_order():
    def chosen(*names):
        return interventions.chosen(argparse.Namespace(remove=names))
    assert chosen("colour", "scale-bar") == ["scale-bar", "colour"]
    assert chosen("colour") == ["colour"] and chosen() == []


def test_interventions_change_training_and_follow_the_model(tree, whole, tmp_path):
    masked = train(tree, tmp_path / "masked", "--remove", "colour", "scale-bar")
    states = [models.read_file(f / "model.pt") for f in (whole, masked)]
    assert states[0]["interventions"] == []
    assert states[1]["interventions"] == ["scale-bar", "colour"]
    assert not torch.equal(*(next(iter(s["state"].values())) for s in states))
    predict.main([str(masked), str(tree), "--exact", "--out", str(tmp_path / "p.csv")])
    with open(tmp_path / "p.csv", encoding="utf-8") as file:
        here = {r["path"]: r for r in csv.DictReader(file)}
    with open(masked / "predictions.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            other = next(v for k, v in here.items() if k.endswith(row["path"]))
            assert float(other["p_Pre"]) == pytest.approx(float(row["p_Pre"]), abs=1e-5)


# ---- the script -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def doubled(tmp_path_factory):
    """A set where class a holds five pictures twice."""
    root = write_tree(tmp_path_factory.mktemp("doubled") / "set", {"a": 40, "b": 40}, size=32)
    for i in range(5):
        shutil.copy(root / "a" / f"a-{i + 1:03d}.png", root / "a" / f"again-{i}.png")
    return root


def test_audit_of_data_writes_all_of_it_and_the_trainer_takes_its_groups(doubled, tmp_path):
    out = tmp_path / "audit"
    audit.main(["data", str(doubled), "--out", str(out), "--image-size", "32",
                "--split-seeds", "5"])
    found = json.loads((out / "audit.json").read_text())
    assert found["duplicates"]["identical_copies"] == 5
    assert found["duplicates"]["groups"] == 80 and found["duplicates"]["images"] == 85
    assert found["test_images_with_partner"]["grouped, these groups"]["partners"] == 0
    images = data.read_folder(str(doubled), 32)
    split = splits.make_split("random", images.labels.numpy(), 42)
    twins = sum(images.digests[i] in {images.digests[j] for j in split["train"]}
                for i in split["test"])
    assert twins > 0 and found["test_images_with_partner"]["random"] == {
        "n": len(split["test"]), "partners": twins, "identical": twins}
    assert found["majority_class"] == 45 / 85
    assert set(found["probes"]) == {
        "colour means", "colour statistics", "background only", "scale-bar corner only",
        "border frame only", "file size and header only"}
    assert set(found["probes"]["colour means"]) == {"default", "grouped"}  # too small for blocked
    assert found["probes"]["colour means"]["grouped"]["value"] > 0.9  # red tells the class here
    assert len(found["split_seeds"]["values"]) == 5
    names = {p.name for p in out.iterdir()}
    assert names == {"audit.json", "report.md", "groups.csv", "probes.png", "split-seeds.png",
                     "near-duplicates.png", "interventions.png"}
    run = train(doubled, tmp_path / "run", "--table", out / "groups.csv")
    with open(run / "split.csv", encoding="utf-8") as file:
        parts = {row["path"]: row["split"] for row in csv.DictReader(file)}
    assert all(parts[f"a/again-{i}.png"] == parts[f"a/a-{i + 1:03d}.png"] for i in range(5))


def test_audit_of_a_run_agrees_with_the_run(doubled, tmp_path):
    run = train(doubled, tmp_path / "run")
    audit.main(["run", str(run)])
    found = json.loads((run / "audit" / "audit.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert found["accuracy"] == results["best"]["test"]["accuracy"]
    assert found["ece"] == pytest.approx(results["best"]["test"]["ece"], abs=1e-6)
    images = data.read_folder(str(doubled), 20)
    split = run_folder.read_split(run, images)[0]
    partners = sum(images.digests[i] in {images.digests[j] for j in split["train"]}
                   for i in split["test"])
    hits = [round((found[k]["value"] or 0) * n) for k, n in
            (("with_partner", partners), ("without_partner", len(split["test"]) - partners))]
    assert sum(hits) == round(found["accuracy"]["value"] * len(split["test"]))
    assert found["called_benign"] is None and set(found["under_interventions"]) == {
        "scale-bar", "colour"}
    probe = found["probes"]["colour means"]
    assert probe["difference"]["value"] == pytest.approx(
        found["accuracy"]["value"] - probe["accuracy"]["value"])
    assert (run / "audit" / "reliability.png").stat().st_size > 1000


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "data|run"), (["what"], "data|run"), (["run", "nowhere"], "run.json"),
    (["data", "nowhere"], "no such folder"), (["run"], "the following arguments are required: RUN"),
    (["data", "nowhere", "--image-size", "1"], "1 is outside [32, 4294967295]"),
    (["privacy", "nowhere", "--al", "x"], "unrecognized arguments: --al x")])
def test_bad_input_is_one_line(arguments, words, tmp_path):
    done = script(*arguments, name="audit.py", cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_an_existing_folder_is_not_overwritten(doubled, tmp_path):
    with pytest.raises(InputError, match="exists"):
        audit.main(["data", str(doubled), "--out", str(tmp_path), "--image-size", "32"])


def test_the_corner_is_a_grey_thumbnail(fields):
    pixels = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    pixels[0, :, 34:, 28:] = torch.tensor([30, 60, 90], dtype=torch.uint8)[:, None, None]
    images = data.Images(pixels, torch.zeros(1, dtype=torch.int64), ["a"], ["a"], ["a"], "x")
    assert probes.corner(images).shape == (1, 128) and set(probes.corner(images)[0]) == {60.0}


def test_everything_about_duplicates_is_counted(monkeypatch):
    """Classes 0 1 0 1 0 1 0 1; 0 = 2 = 5 = 6, near 3 ~ 7, and 1 ~ 2 of two classes."""
    pairs = [duplicates.Pair(i, j, 1.0, (0, 0), 1.0, 1.0) for i, j in ((0, 2), (3, 7), (1, 2))]
    monkeypatch.setattr(duplicates, "near_duplicates", lambda pixels: pairs)
    images = toy_images(8, classes=2)
    images.digests = list("abacdaag")
    groups, counts, near = duplicates.find_groups(images)
    assert groups.tolist() == [0, 1, 0, 3, 4, 0, 0, 3]
    assert counts == {
        "images": 8, "identical_copies": 3, "identical_across_classes": 1, "near_pairs": 2,
        "near_pairs_across_classes": 1, "groups": 4, "groups_of_several": 2, "images_in_them": 6,
        "largest_group": 4}
    assert near == pairs[1:]  # the first is no near pair: it is the same picture


def test_matches_across_classes_are_counted_and_join_nothing(monkeypatch):
    pairs = [duplicates.Pair(i, j, 1.0, (0, 0), 1.0, 1.0) for i, j in ((0, 2), (0, 1), (3, 5))]
    monkeypatch.setattr(duplicates, "near_duplicates", lambda pixels: pairs)
    groups, counts, near = duplicates.find_groups(toy_images(6, classes=2))
    assert (counts["near_pairs"], counts["near_pairs_across_classes"]) == (3, 1)
    assert groups.tolist() == [0, 1, 0, 3, 4, 3] and len(near) == 3


def test_leukaemias_called_benign_are_named(tmp_path, monkeypatch):
    classes = ["Benign", "Early", "Pre", "Pro"]
    tree = write_tree(tmp_path / "set", dict.fromkeys(classes, 20))
    run = train(tree, tmp_path / "run", "--rounds", 1)
    with open(run / "predictions.csv", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    test = [r for r in rows if r[2] == "test"]
    for row in test:  # all wrong: Benign and Early change places, and Pre and Pro
        wrong = classes.index(row[1]) ^ 1
        row[3:] = [classes[wrong], *(("0.7" if c == wrong else "0.1") for c in range(4))]
    assert {"Early", "Pre"} <= {row[1] for row in test}
    with open(run / "predictions.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    audit.main(["run", str(run)])
    found = json.loads((run / "audit" / "audit.json").read_text())
    assert found["called_benign"] == [r[0] for r in test if r[1] == "Early"]
    assert "none" not in audit.run_page(found) and "none" in audit.run_page(
        found | {"called_benign": []})
    monkeypatch.setattr(metrics, "CLASSES", ("Benign", "Early"))  # others may be no leukaemias
    audit.main(["run", str(run), "--out", str(tmp_path / "other")])
    other = json.loads((tmp_path / "other" / "audit.json").read_text())
    assert other["called_benign"] is None and "called benign" not in " ".join(audit.run_page(other))
