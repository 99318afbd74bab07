"""Reading images, layouts, modes, batches."""

from checks import InputError

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, script, toy_images, write_tree
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet18_Weights

import data
from dataset import parts, synthetic
from dataset.augment import Augmentation
from dataset.files import CLASSES, decode, say_passed
from dataset.images import colour_statistics

ROOT = Path(data.__file__).parent


def gradient(size=24):
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    return np.stack([np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)),
                     np.full((size, size), 40, np.uint8)], 2)


def decoded(tmp_path, image, name="x.png", size=24, **save):
    image.save(tmp_path / name, **save)
    return decode(tmp_path / name, size)[0].astype(int)


# ---- modes ------------------------------------------------------------------------------------

def test_every_mode_becomes_the_right_rgb(tmp_path):
    rgb = gradient()
    image, grey = Image.fromarray(rgb), Image.fromarray(rgb[..., 0])
    wide = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    thrice = np.repeat(rgb[..., :1], 3, 2)
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(np.where(np.arange(24)[:, None] < 12, 255, 0).repeat(24, 1)
                                   .astype(np.uint8)))
    over_white = rgb.copy()
    over_white[12:] = 255
    palette = image.quantize(16)
    assert np.array_equal(decoded(tmp_path, image), rgb)
    assert np.array_equal(decoded(tmp_path, grey), thrice)
    assert wide.mode.startswith("I") and np.array_equal(decoded(tmp_path, wide), thrice)
    assert np.array_equal(decoded(tmp_path, wide, "x.tiff"), thrice)
    assert np.array_equal(decoded(tmp_path, alpha), over_white)
    assert np.array_equal(decoded(tmp_path, palette), np.asarray(palette.convert("RGB")))
    assert np.array_equal(decoded(tmp_path, grey.point(lambda v: 255 * (v > 99)).convert("1")),
                          np.where(thrice > 99, 255, 0))
    two = Image.fromarray(rgb[..., 0] // 128, "P")  # one colour of a palette is transparent
    two.putpalette([200, 0, 0, 0, 0, 90])
    assert np.array_equal(decoded(tmp_path, two, transparency=0), np.where(
        thrice < 128, 255, (0, 0, 90)))
    cmyk = decoded(tmp_path, image.convert("CMYK"), "x.jpg", quality=100)
    assert abs(cmyk - rgb).max() < 25 and abs(cmyk - rgb).mean() < 4


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 270 degrees
    turned = decoded(tmp_path, image, "x.png", exif=exif)
    assert np.array_equal(turned, np.rot90(gradient(), -1))


def test_images_are_resized_once_to_the_working_size(tmp_path):
    small = decoded(tmp_path, Image.fromarray(gradient(48)), size=24)
    expected = Image.fromarray(gradient(48)).resize((24, 24), Image.BILINEAR)
    assert np.array_equal(small, np.asarray(expected))


# ---- layouts ----------------------------------------------------------------------------------

def test_both_public_layouts_give_the_same_classes(tmp_path):
    first = write_tree(tmp_path / "a" / "Original", {"Benign": 2, "Early": 3, "Pre": 2, "Pro": 1})
    write_tree(tmp_path / "a" / "Segmented", {"Benign": 2, "Early": 3, "Pre": 2, "Pro": 1})
    write_tree(tmp_path / "b" / "Blood cell Cancer [ALL]", {
        "Benign": 2, "[Malignant] Pre-B": 2, "[Malignant] Pro-B": 1, "[Malignant] early Pre-B": 3})
    for root in (tmp_path / "a", first, tmp_path / "b"):
        images = data.read_folder(str(root), 20)
        assert images.classes == list(CLASSES)
        assert images.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 3]
        assert images.name == root.name


def test_other_names_work_as_they_are_in_imagefolder_order(tmp_path):
    write_tree(tmp_path, {"zebra": 3, "Pre": 2, "ant": 2})
    (tmp_path / "ant" / "sub").mkdir()
    Image.fromarray(gradient()).save(tmp_path / "ant" / "sub" / "deep.PNG")
    (tmp_path / "ant" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "ant" / "notes.txt").write_text("x")
    for name in ("Thumbs.db", "README"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".git").mkdir()
    images = data.read_folder(str(tmp_path), 20)
    assert images.classes == ["Pre", "ant", "zebra"]
    assert images.ignored == {".db": 1, "README": 1, ".git": 1, "hidden": 1, ".txt": 1}
    assert say_passed(Counter({".txt": 1, ".db": 3})) == "3 .db, 1 .txt"
    assert say_passed(Counter()) == "nothing"
    (tmp_path / ".git").rmdir()
    reference = ImageFolder(tmp_path, is_valid_file=lambda p: p.lower().endswith(".png")
                            and not Path(p).name.startswith("."))
    assert [str(tmp_path / p) for p in images.paths] == [p for p, _ in reference.samples]
    assert images.labels.tolist() == [y for _, y in reference.samples]


def test_fingerprint_follows_content_only(tmp_path):
    write_tree(tmp_path / "a", {"x": 3, "y": 3})
    write_tree(tmp_path / "b", {"x": 3, "y": 3})
    one, two = (data.read_folder(str(tmp_path / d), s) for d, s in (("a", 20), ("b", 10)))
    assert one.fingerprint() == two.fingerprint()
    Image.fromarray(gradient(20)).save(tmp_path / "b" / "x" / "x-001.png")
    assert data.read_folder(str(tmp_path / "b"), 10).fingerprint() != one.fingerprint()


def test_digests_are_of_pixels_not_of_files(tmp_path):
    write_tree(tmp_path, {"x": 2, "y": 2})
    image = Image.open(tmp_path / "x" / "x-001.png")
    image.save(tmp_path / "y" / "copy.bmp")
    images = data.read_folder(str(tmp_path), 8)
    assert images.digests[images.paths.index("x/x-001.png")] == \
        images.digests[images.paths.index("y/copy.bmp")]
    assert len(set(images.digests)) == 4


def test_colour_statistics_of_known_pixels_and_of_those_above_the_strip():
    """Red counts the 25 rows, green is 7, blue is 100 in the last three, 12 % of the height."""
    rows = np.arange(25)
    image = np.stack([rows, rows * 0 + 7, 100 * (rows >= 22)], 1)[None, :, None].astype(np.uint8)
    assert colour_statistics(image, "means").tolist() == [[12, 7, 12]]
    assert colour_statistics(image, "means", True).tolist() == [[10.5, 7, 0]]
    found = colour_statistics(image, "statistics")
    assert found.shape == (1, 21) and found.dtype == np.float32
    assert found.reshape(7, 3)[:, 0] == pytest.approx(  # mean, sd, and 5 quantiles of 0 to 24
        [12, 52 ** 0.5, 1.2, 6, 12, 18, 22.8])
    assert found.reshape(7, 3)[:, 1].tolist() == [7, 0, 7, 7, 7, 7, 7]
    assert colour_statistics(image, "statistics", True).reshape(7, 3)[1:, 2].tolist() == [0] * 6


# ---- batches ----------------------------------------------------------------------------------

def test_pixel_scaling_of_black_and_white():
    images = toy_images(2)
    images.pixels[0], images.pixels[1] = 0, 255
    batch = data.eval_batch(images, torch.tensor([0, 1]), CPU)
    for c in range(3):
        mean, std = data.IMAGENET_MEAN[c], data.IMAGENET_STD[c]
        assert batch[0, c].unique().item() == pytest.approx(-mean / std, abs=1e-6)
        assert batch[1, c].unique().item() == pytest.approx((1 - mean) / std, abs=1e-6)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    usual = ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert ([*data.IMAGENET_MEAN], [*data.IMAGENET_STD]) == (usual.mean, usual.std)
    with torch.inference_mode():
        assert not any(x.is_inference() for x in data.imagenet.__wrapped__(CPU))


def test_a_batch_is_made_on_the_device_that_is_asked_for(monkeypatch):
    images, index, meta = toy_images(3), torch.tensor([2, 0]), torch.device("meta")
    assert data.gather(images, index, meta).device == meta
    batch, rows = data.train_batch(images, index, None, torch.Generator(), meta)
    assert batch.device == rows.device == meta and images.pixels.device == CPU
    gather, seen = data.gather, []  # it takes indices on the device of the pixels
    monkeypatch.setattr(data, "gather", lambda *a: seen.append(a[1].device) or gather(*a))
    data.train_batch(images, index, None, torch.Generator(), meta)
    images.pixels = images.pixels.to(meta)
    data.train_batch(images, index, None, torch.Generator(), meta)
    assert seen == [CPU, meta]


def test_validation_is_never_augmented_and_the_source_survives():
    images = toy_images(6)
    before = images.pixels.clone()
    index = torch.tensor([3, 3, 1])
    first, second = (data.eval_batch(images, index, CPU) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first[0], first[1])
    train, rows = data.train_batch(images, index, Augmentation(), torch.Generator(), CPU)
    assert torch.equal(rows, index)
    assert not torch.equal(train, first) and not torch.equal(train[0], train[1])
    assert torch.equal(data.train_batch(images, index, None, torch.Generator(), CPU)[0], first)
    assert torch.equal(images.pixels, before)
    expected = images.pixels[[3, 3, 1]].float() / 255
    torch.testing.assert_close(data.gather(images, index, CPU), expected, rtol=0, atol=1e-7)


def test_samplers():
    labels = torch.tensor([0] * 90 + [1] * 10)

    def order(sampler, expand=1, seed=0):
        return data.epoch_order(labels, sampler, expand, torch.Generator().manual_seed(seed), 20)
    assert sorted(order("shuffle").tolist()) == list(range(100))
    assert not torch.equal(order("shuffle"), order("shuffle", seed=1))
    twice = torch.bincount(order("shuffle", expand=2))
    assert twice.tolist() == [2] * 100
    share = np.mean([(labels[order("balanced", seed=s)] == 1).float().mean() for s in range(20)])
    assert 0.47 < share < 0.53
    natural, drawn = [], []
    for seed in range(20):
        batches = labels[order("dual", seed=seed)].view(-1, 20)
        natural.append((batches[:, :10] == 1).float().mean())
        drawn.append((batches[:, 10:] == 1).float().mean())
    assert 0.07 < np.mean(natural) < 0.13 and 0.45 < np.mean(drawn) < 0.55
    for sampler in data.SAMPLERS:
        assert len(order(sampler, expand=3)) == 300
    first = torch.arange(100) % 20 < 10  # of each batch
    assert torch.equal(order("dual"), torch.where(first, order("shuffle"), order("balanced")))


def test_last_batch_of_one_is_dropped():
    assert [len(b) for b in data.batch_slices(torch.arange(9), 4)] == [4, 4]
    assert [len(b) for b in data.batch_slices(torch.arange(10), 4)] == [4, 4, 2]
    assert [len(b) for b in data.batch_slices(torch.arange(3), 1)] == [1, 1, 1]
    assert [len(b) for b in data.batch_slices(torch.arange(1), 4)] == [1]


# ---- the embedded set, the script -------------------------------------------------------------

def test_synthetic_set_is_fixed_and_uneven():
    pixels, names, paths = synthetic.draw(24)
    again = synthetic.draw(24)
    assert np.array_equal(pixels, again[0]) and len(set(paths)) == 320
    assert {n: names.count(n) for n in names} == synthetic.COUNTS
    assert not np.array_equal(pixels, synthetic.draw(24, seed=1)[0])
    assert len({p.tobytes() for p in pixels}) == 320


def test_colours_beyond_black_and_white_are_cut_off(monkeypatch):
    for stain, end in ((-1000, 0), (1000, 255)):
        monkeypatch.setitem(synthetic.SHAPES, "Pro", synthetic.SHAPES["Pro"] | {
            "stain": (stain,) * 3, "contrast": 0})
        picture = synthetic.draw_one("Pro", 24, np.random.default_rng(0))
        assert (picture == end).all(2).sum() > 40  # a nucleus
        assert not (picture == 255 - end).any()


def test_describe_names_what_it_finds(tmp_path):
    write_tree(tmp_path / "set", {"x": 30, "y": 30})
    (tmp_path / "set" / "x" / "bad.png").write_text("no picture")
    Image.open(tmp_path / "set" / "x" / "x-001.png").save(tmp_path / "set" / "y" / "twin.png")
    done = script("--data", tmp_path / "set", "--clients", "2", "--sheet", tmp_path / "sheet.png",
                  name="data.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "set: 61 images" in done.stdout and "61 of 20x20 RGB" in done.stdout
    assert "unreadable: x/bad.png" in done.stdout and "1 copies of another" in done.stdout
    assert "client 1" in done.stdout and re.search("fingerprint [0-9a-f]{16}\n", done.stdout)
    assert Image.open(tmp_path / "sheet.png").size == (8 * 224, 2 * 224)


def flags(*given):
    parser = data.make_parser("x")
    data.add_arguments(parser)
    parts.add_client_arguments(parser)
    return parser.parse_args(given)


def test_images_are_of_224_pixels_unless_said_and_of_8_at_least():
    assert flags().image_size == 224 and flags("--image-size", "8").image_size == 8
    assert flags().remove == [] and not flags().skip_bad
    with pytest.raises(SystemExit):
        flags("--image-size", "7")


def test_a_client_named_like_a_part_has_a_line_of_its_own(capsys):
    images = toy_images(60)
    images.known = {"client": np.array(["test", "B"] * 30)}
    data.describe(flags(), images)
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-6:]]
    assert [name for name, _ in lines] == ["all", "train", "val", "test", "B", "test"]
    assert int(lines[4][1]) + int(lines[5][1]) == int(lines[1][1]) == 48 and lines[3][1] == "6"


SIZES = [(10, 10), (9, 20), (50, 3), (30, 4), (13, 13), (12, 11)]  # by area: 1 6 4 2 5 3


@pytest.mark.parametrize("kinds", [5, 6])
def test_five_sizes_are_listed_and_of_more_three_by_area(kinds, capsys):
    images = toy_images(30)
    images.found = Counter({(*size, "RGB"): 5 for size in SIZES[:kinds]})
    data.describe(flags(), images)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith("RGB")] == [
        f"  5 of {w}x{h} RGB" for w, h in SIZES[:5]]
    assert [line for line in lines if "more" in line] == [
        "  and 1 more sizes; smallest 10x10, median 50x3, largest 9x20"][:kinds - 5]
    assert "part          images  c0  c1  c2" in lines
    assert "all               30  10  10  10" in lines


def test_a_contact_sheet_begins_each_row_with_the_first_image_of_the_class(tmp_path):
    images, path = toy_images(9, size=16), tmp_path / "new" / "folder" / "sheet.png"
    data.contact_sheet(images, path, columns=4)
    data.contact_sheet(images, path, columns=3)  # the folder is there
    sheet = np.asarray(Image.open(path)).reshape(3, 16, 3, 16, 3).swapaxes(1, 2)  # class, column
    assert np.array_equal(sheet[:, 0], images.array()[:3])
    for row in sheet.astype(int):
        mirrored = [[np.abs(row[0] - x).mean(), np.abs(row[0][:, ::-1] - x).mean()] for x in row]
        assert mirrored[0][0] == 0 and min(map(min, mirrored[1:])) > 1  # a draw of its own each
        assert np.abs(row[1] - row[2]).mean() > 1


def test_unreadable_files_are_all_named_at_once(tmp_path):
    write_tree(tmp_path, {"x": 12, "y": 12})
    (tmp_path / "x" / "text.jpg").write_text("no picture")
    (tmp_path / "y" / "zero.png").write_bytes(b"")
    whole = (tmp_path / "x" / "x-001.png").read_bytes()
    (tmp_path / "y" / "cut.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError) as error:
        data.read_folder(str(tmp_path), 20)
    assert str(error.value).startswith("3 unreadable")
    assert all(n in str(error.value) for n in ("x/text.jpg", "y/zero.png", "y/cut.png"))
    images = data.read_folder(str(tmp_path), 20, skip_bad=True)
    assert len(images.paths) == 24 and [p for p, _ in images.bad] == [
        "x/text.jpg", "y/cut.png", "y/zero.png"]
    pure = data.read_folder(str(write_tree(tmp_path / "pure", {"x": 12, "y": 12})), 20)
    assert torch.equal(images.pixels, pure.pixels) and images.digests == pure.digests


DRAWN = {"Benign": [[204, 207, 111, 195], [220, 214, 123, 217]],
         "Early": [[210, 193, 142, 215], [185, 184, 222, 210]],
         "Pre": [[171, 187, 183, 188], [205, 136, 184, 192]],
         "Pro": [[223, 227, 78, 81], [76, 69, 203, 205]]}
MEANS = {"Benign": [205.979, 184.451, 198.078],
         "Early": [198.687, 178.089, 197.525],
         "Pre": [197.263, 172.881, 190.606],
         "Pro": [189.186, 164.603, 188.327]}  # of red, green, blue


def test_the_drawn_smears_are_these():
    """A row of the green channel of four pictures; by one at most, as machines may round."""
    drawn = {name: [synthetic.draw_one(name, 12, np.random.default_rng([7, i, seed]))[5, 1::3, 1]
                    .tolist() for seed in (0, 1)] for i, name in enumerate(CLASSES)}
    assert {k: np.array(v) for k, v in drawn.items()} == {
        k: pytest.approx(np.array(v), abs=1) for k, v in DRAWN.items()}
    pixels, names, _ = synthetic.draw(12)
    for name, mean in MEANS.items():
        own = pixels[[n == name for n in names]]
        assert own.mean((0, 1, 2)) == pytest.approx(mean, abs=0.005)
