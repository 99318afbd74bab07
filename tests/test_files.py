"""What is on disk is read in one way only where no other reading is possible."""

from checks import InputError

import struct
import zlib

import numpy as np
import pytest
from helpers import train, write_tree
from PIL import Image, PngImagePlugin

import data
import predict
from dataset import files
from dataset.files import class_names, decode_all, find_class_folders

NEARLY_BLACK = "16-bit pixels, nearly black: scale them to 16 bits, or save them with 8"


def picture(path, seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "VALID", "Testing"),
                                   ("Dev", "test", "train"), ("TRAIN", "Test")])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_tree_that_is_split_already_gives_its_split(tmp_path, names, wrapped):
    root = tmp_path / "set" / "inner" if wrapped else tmp_path / "set"
    for name in names:
        write_tree(root / name, {"x": 3, "y": 2})
    images = data.read_folder(str(tmp_path / "set"), 20)
    assert images.classes == ["x", "y"] and images.class_counts(
        np.arange(len(images.paths))) == [3 * len(names), 2 * len(names)]
    words = {"train": "train", "training": "train", "test": "test", "testing": "test"}
    assert images.known["split"].tolist() == [
        words.get(path.split("/")[0].lower(), "val") for path in images.paths]


@pytest.mark.parametrize("names", [("train", "a"), ("TEST", "b", "c"), ("val", "eval")])
@pytest.mark.parametrize("wrapped", [False, True])
def test_parts_of_a_given_split_are_never_classes(tmp_path, names, wrapped):
    root = tmp_path / "set" / "inner" if wrapped else tmp_path / "set"
    for name in names:
        write_tree(root / name, {"x": 3, "y": 3})
    with pytest.raises(InputError, match="parts of a given split, but not the other folders"):
        data.read_folder(str(tmp_path / "set"), 20)


def test_a_given_split_needs_one_folder_of_each_kind_with_the_same_classes(tmp_path):
    for name in ("train", "test"):
        write_tree(tmp_path / "a" / name, {"x": 2, "y": 2, "z" + name: 2})
    with pytest.raises(InputError, match="not one of each kind with the same class folders"):
        data.read_folder(str(tmp_path / "a"), 20)
    for name in ("train", "test", "val", "valid"):
        write_tree(tmp_path / "b" / name, {"x": 2, "y": 2})
    with pytest.raises(InputError, match="not one of each kind"):
        data.read_folder(str(tmp_path / "b"), 20)
    write_tree(tmp_path / "c" / "train", {"x": 2, "y": 2})
    picture(tmp_path / "c" / "test" / "1.png")  # a competition's test part, without labels
    with pytest.raises(InputError, match="test: no class folder"):
        data.read_folder(str(tmp_path / "c"), 20)


def test_a_hospital_may_lack_a_class_in_a_part_and_have_one_class_with_folders_in_it(tmp_path):
    write_tree(tmp_path / "a" / "train", {"x": 2, "y": 2})
    write_tree(tmp_path / "a" / "test", {"x": 1, "z": 1})
    found = files.find_images(tmp_path / "a", ["x", "y", "z"])
    assert found.labels == ["x", "z", "x", "x", "y", "y"]
    assert found.known["split"] == ["test"] * 2 + ["train"] * 4
    write_tree(tmp_path / "b" / "[Malignant] Pro-B", {"slide1": 1, "slide2": 1})
    assert list(find_class_folders(tmp_path / "b", ["Benign", "Pro"])) == ["Pro"]
    assert list(find_class_folders(tmp_path / "b")) == ["slide1", "slide2"]
    with pytest.raises(InputError, match="unknown class slide1; the federation has c, d"):
        find_class_folders(tmp_path / "b", ["c", "d"])


def test_folders_of_equal_names_in_every_class_are_told(tmp_path, capsys):
    for fold in ("fold_0", "fold_1"):
        write_tree(tmp_path / "c" / fold, {"all": 1, "hem": 1})
    assert list(find_class_folders(tmp_path / "c")) == ["fold_0", "fold_1"]
    assert "all, hem in each class are not taken for classes" in capsys.readouterr().err
    write_tree(tmp_path / "c" / "fold_1", {"other": 1})
    find_class_folders(tmp_path / "c")
    assert capsys.readouterr().err == ""


def test_names_of_the_public_set_are_translated_only_where_all_are_and_no_two_fall_together(
        capsys):
    def mean(*given, classes=None):
        return list(class_names(list(given), classes, "x").values())
    assert mean("benign", "[Malignant] Pro-B") == ["Benign", "Pro"]
    assert mean("benign", "EARLY", "pre", "pro") == ["Benign", "Early", "Pre", "Pro"]
    assert mean("benign", "zebra") == ["benign", "zebra"]
    assert mean("a\u0308", "b") == ["ä", "b"]  # as one sign, whoever wrote it
    assert mean("Pro", "[Malignant] Pro-B") == ["Pro", "[Malignant] Pro-B"]
    assert mean("pro", classes=["Benign", "Pro"]) == ["Pro"]
    assert capsys.readouterr().err == ""
    assert mean("Pro", "pro", "Pre") == ["Pro", "pro", "Pre"]
    assert "note: x: classes that differ by case alone: Pro, pro" in capsys.readouterr().err
    with pytest.raises(InputError, match="x: one class only .a., nothing to tell apart"):
        mean("a")
    with pytest.raises(InputError, match="x: unknown class q; the federation has a, b"):
        mean("q", "a", classes=["a", "b"])


def test_original_is_entered_only_where_nothing_else_could_be_meant(tmp_path):
    write_tree(tmp_path / "public" / "Original", {"Benign": 2, "Early": 2})
    write_tree(tmp_path / "public" / "Segmented", {"Benign": 2, "Early": 2})
    assert list(find_class_folders(tmp_path / "public")) == ["Benign", "Early"]
    write_tree(tmp_path / "both", {"Benign": 2, "Early": 2})
    write_tree(tmp_path / "both" / "Original", {"slide1": 2, "slide2": 2})
    with pytest.raises(InputError, match="folders here or those in Original"):
        find_class_folders(tmp_path / "both")
    write_tree(tmp_path / "flat", {"Original": 3, "Copy": 3})  # a class of that name
    assert list(find_class_folders(tmp_path / "flat")) == ["Copy", "Original"]


def test_runs_and_other_run_folders_are_no_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path, {"Benign": 2, "Early": 2, "runs": 2, "elsewhere": 2})
    (tmp_path / "elsewhere" / "run.json").write_text("{}")
    assert list(find_class_folders(tmp_path)) == ["Benign", "Early"]
    monkeypatch.chdir("/")
    assert list(find_class_folders(tmp_path)) == ["Benign", "Early", "runs"]  # of another place


def test_class_folders_of_one_name_in_two_unicode_forms_are_refused(tmp_path):
    write_tree(tmp_path, {"b": 2, "\u00e9": 2, "e\u0301": 2})
    with pytest.raises(InputError, match="two Unicode forms"):
        find_class_folders(tmp_path)
    with pytest.raises(InputError, match="one class only"):
        class_names(["\u00e9", "e\u0301"], None, "x")


def test_what_lies_beside_a_wrapping_folder_is_counted_and_the_folder_is_not(tmp_path):
    root = tmp_path / "set"
    for part in ("train", "test"):
        write_tree(root / "inner" / part / "wrap", {"a": 3, "b": 3})
    for place in (root, root / "inner", root / "inner" / "train"):
        picture(place / "loose.png")
    images = data.read_folder(str(root), 20)
    assert len(images.paths) == 12 and images.ignored == {".png": 3}


def test_service_folders_are_passed_over_and_counted(tmp_path, capsys):
    root = write_tree(tmp_path / "set", {"a": 12, "b": 12})
    for place in ("@eaDir", "a/@eaDir", "b/__MACOSX", "__MACOSX/a", "a/.cache"):
        picture(root / place / "copy.png")
    (root / "a" / "notes.txt").write_text("x")
    images = data.read_folder(str(root), 20)
    assert images.classes == ["a", "b"] and len(images.paths) == 24
    assert images.ignored == {"hidden or service folder": 3, "@eaDir": 1, "__MACOSX": 1, ".txt": 1}
    out = train(root, tmp_path / "run", "--rounds", 1)
    assert "passed over 3 hidden or service folder, 1 " in capsys.readouterr().err
    assert "Passed over: 3 hidden or service folder, 1 " in (out / "report.md").read_text()


@pytest.mark.parametrize("target", ["..", "../b", "."])
def test_a_folder_is_visited_once(tmp_path, target):
    root = write_tree(tmp_path / "set", {"a": 12, "b": 12})
    (root / "a" / "up").symlink_to(target)
    images = data.read_folder(str(root), 20)
    assert len(images.paths) == 24 and images.labels.tolist() == [0] * 12 + [1] * 12
    assert images.ignored["folder that was read already"] == 1
    (root / "c").symlink_to("b")
    with pytest.raises(InputError, match="one folder under two names"):
        data.read_folder(str(root), 20)


def test_every_format_that_pillow_opens_is_read_and_the_rest_is_counted(tmp_path):
    for suffix in ("gif", "jp2", "jfif", "jpe", "tga", "TIF", "png"):
        for name in "ab":
            picture(tmp_path / name / f"1.{suffix}")
    for name in ("a/raw.dcm", "b/README", "a/page.pdf", "a/cells.h5"):  # Pillow only writes PDF
        (tmp_path / name).write_text("x")
    images = data.read_folder(str(tmp_path), 20)
    assert len(images.paths) == 14
    assert images.ignored == {".dcm": 1, "no suffix": 1, ".pdf": 1, ".h5": 1}
    assert [str(f) for f, _ in predict.find([str(tmp_path)])] == sorted(
        str(tmp_path / p) for p in images.paths)


def test_a_camera_with_12_bits_in_16_is_refused_and_not_read_as_black(tmp_path):
    wide = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    for name, pixels in (("wide.png", wide), ("camera.tif", wide // 16), ("black.png", wide * 0)):
        Image.fromarray(pixels).save(tmp_path / name)
    read, camera, black = decode_all(
        [tmp_path / name for name in ("wide.png", "camera.tif", "black.png")], 20)
    assert read[0].max() == 255 and black[0].max() == 0
    assert camera == NEARLY_BLACK


def colours_of_16_bits(path, largest):
    """A PNG of 8 x 8 pixels, three channels of 16 bits each, which Pillow cannot write."""
    rows = np.full((8, 8, 3), largest, ">u2")
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(
        ">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"".join(
            b"\0" + row.tobytes() for row in rows))) + chunk(b"IEND", b""))


def test_colours_of_12_bits_in_16_and_grey_of_32_are_refused_too(tmp_path):
    for largest in (4095, 65535):
        colours_of_16_bits(tmp_path / f"{largest}.png", largest)
    Image.fromarray(np.full((8, 8), 70000, np.int32)).save(tmp_path / "32.tif")
    camera, whole, grey = decode_all([tmp_path / n for n in ("4095.png", "65535.png", "32.tif")], 8)
    assert camera == NEARLY_BLACK and whole[0].min() == 255
    assert grey == "pixels of more than 16 bits have no defined white"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name, more", [("a.png", {}), ("a.tif", {"compression": "tiff_deflate"}),
                                        ("a.tif", {"compression": "tiff_lzw"}), ("a.jp2", {})])
def test_a_damaged_file_is_no_image(tmp_path, name, more):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name, **more)
    whole = (tmp_path / name).read_bytes()
    third, half, shown = len(whole) // 3, len(whole) // 2, 0
    for broken in (whole[:third], whole[:half] + b"\xff" * 200 + whole[half + 200:]):
        (tmp_path / name).write_bytes(broken)
        try:
            with Image.open(tmp_path / name) as image:
                image.load()
        except OSError:  # no format shows every damage
            (decoded,) = decode_all([tmp_path / name], 64)
            assert isinstance(decoded, str)
            shown += 1
    assert shown


def test_16_bits_are_rounded_to_8_where_the_largest_is_32_of_255_at_least(tmp_path):
    """A step of 8 bits is 257 of 16: 128 is nearer to none, 129 to the first."""
    steps = np.array([[0, 128, 129, 385, 386, 8095, 8096, 65535]], np.uint16)
    for name, grey in (("all.png", steps), ("13.png", np.minimum(steps, 8095)),
                       ("14.png", np.minimum(steps, 8096)), ("1.png", np.minimum(steps, 129))):
        Image.fromarray(np.repeat(grey, 8, 0)).save(tmp_path / name)
    every, small, enough, black = decode_all(
        [tmp_path / name for name in ("all.png", "13.png", "14.png", "1.png")], 8)
    assert every[0][3].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 2, 31, 32, 255)]
    assert enough[0].max() == 32
    assert small == black == NEARLY_BLACK


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_may_say_that_white_is_zero(tmp_path, bits):
    grey = np.full((8, 8), 60, np.uint8) if bits == 8 else np.full((8, 8), 60 * 257, np.uint16)
    for kind, mean in ((0, 195), (1, 60)):
        path = tmp_path / f"{kind}.tif"
        Image.fromarray(grey).save(path, tiffinfo={262: kind})
        with Image.open(path) as image:
            assert image.tag_v2[262] == kind
        if bits == 8 and kind == 0:  # Pillow turns such pixels over when it writes, and reads
            mean = 60
        (read,) = decode_all([path], 8)
        assert np.unique(read[0]).tolist() == [mean]


def test_only_so_many_images_are_decoded_ahead_that_their_pixels_fill_16_mib(monkeypatch):
    """Five of 1024 x 1024, of 3 MiB each; but one for every processor at least."""
    class Asked(list):
        def __getitem__(self, part):
            asked.append(super().__getitem__(part))
            return asked[-1]
    monkeypatch.setattr(files, "decode", lambda path, size: path)
    for processors, size, ahead in ((1, 1024, 5), (7, 1024, 7), (None, 4096, 1)):
        asked = []
        monkeypatch.setattr(files.os, "cpu_count", lambda count=processors: count)
        decoded = files.decode_all(Asked(range(20)), size)
        assert next(decoded) == 0 and asked == [list(range(ahead))]
        assert list(decoded) == list(range(1, 20)) and max(map(len, asked)) == ahead


def test_a_broken_exif_block_leaves_the_pixels_whole(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add(b"eXIf", b"no TIFF header at all")
    pixels = np.arange(1200, dtype=np.uint8).reshape(20, 20, 3)
    for name, more in (("a.png", {"pnginfo": info}), ("a.jpg", {"exif": b"Exif\0\0nothing"}),
                       ("a.webp", {"exif": b"broken", "lossless": True})):
        Image.fromarray(pixels).save(tmp_path / name, **more)
        (decoded,) = decode_all([tmp_path / name], 20)
        assert not isinstance(decoded, str), decoded
        if name != "a.jpg":
            assert np.array_equal(decoded[0], pixels)
