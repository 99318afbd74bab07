"""--table: what one CSV file says of each image, and what follows from it."""

import checks
from checks import InputError

import argparse
import csv
import json

import numpy as np
import pytest
import torch
from helpers import SMALL, history, same_run, toy_images, train, write_tree
from scipy.stats import binom, t

import audit
import compare
import data
import predict
import train_central
import train_federated
from dataset import parts, splits, table
from reporting import metrics, run_folder


def put(path, header, *rows, delimiter=",", encoding="utf-8", bom=""):
    """Write a CSV file; rows are lists of fields."""
    with open(path, "w", encoding=encoding, newline="", errors="surrogateescape") as file:
        file.write(bom)
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return str(path)


def look(root, csv_path=None, columns=None, skip=False, size=8):
    listed = None if csv_path is None else table.read(str(csv_path), columns)
    return data.read_folder(str(root), size, listed=listed, skip_unlisted=skip)


@pytest.fixture
def flat(tmp_path):
    """Eight pictures in one folder, labels in no folder's name."""
    root = write_tree(tmp_path / "flat", {"scans": 8}, 8)
    return root, [f"scans/scans-{i:03d}.png" for i in range(1, 9)]


# ---- reading -----------------------------------------------------------------------------------

@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_table_is_read_with_any_separator_and_byte_order_mark(tmp_path, delimiter, bom):
    path = put(tmp_path / "t.csv", ["path", "label", "patient"], ["a,;\t\"b\n.png", "x y", " 7 "],
               ["", "", " "], ["é.png", "", "8"], delimiter=delimiter, bom=bom)  # one is blank
    read = table.read(path)
    assert read.columns == ("path", "label", "patient")
    assert read.rows == {"a,;\t\"b\n.png": {"label": "x y", "patient": "7"},
                         "é.png": {"label": "", "patient": "8"}}


def test_what_r_pandas_and_excel_write_is_read(tmp_path):
    """Words for unknown, a blank before a quote, UTF-16; and 8-bit letters are refused."""
    path = put(tmp_path / "t.csv", ["path", "label", "patient"], ["NA", "NaN", "<NA>"],
               ["b", "None", "na"])
    assert table.read(path).rows == {"NA": {"label": "", "patient": ""},
                                     "b": {"label": "None", "patient": "na"}}
    (tmp_path / "t.csv").write_bytes('path, "label"\na, "x, y"\n'.encode("utf-16"))
    assert table.read(path).rows == {"a": {"label": "x, y"}}
    (tmp_path / "t.csv").write_bytes("path;label\nä;x\nb;ä\n".encode("cp1252"))
    with pytest.raises(InputError, match="row 3 is not Unicode; save the table as CSV UTF-8"):
        table.read(path)
    (tmp_path / "t.csv").write_bytes("path,label\n".encode("utf-16")[:-1])  # cut in a letter
    with pytest.raises(InputError, match="not a CSV file"):
        table.read(path)


def test_letters_of_two_signs_are_letters_of_one(tmp_path, capsys):
    """macOS writes ä as a and two dots; and names that differ by case alone are told."""
    root = write_tree(tmp_path / "d", {"a\u0308": 2, "b": 2}, 8)
    (root / "b" / "b-001.png").rename(root / "b" / "o\u0308.png")
    listed = put(tmp_path / "t.csv", ["path", "patient"], ["b/b-002.png", "p"], ["ö.png", "P"],
                 ["ä/a\u0308-001.png", "q"], ["ä\\ä-002.png", "r"])
    images = look(root, listed)
    assert images.classes == ["b", "ä"] and images.known["patient"].tolist() == ["p", "P", "q", "r"]
    assert "patients whose names differ by case alone" in capsys.readouterr().err


def test_labels_need_no_folders_and_order_changes_nothing(flat, tmp_path):
    root, paths = flat
    rows = [[p, "ab"[i % 2], f"P{i // 2}"] for i, p in enumerate(paths)]
    one = look(root, put(tmp_path / "1.csv", ["path", "label", "patient"], *rows))
    two = look(root, put(tmp_path / "2.csv", ["patient", "path", "label"],
                         *[[c, a, b] for a, b, c in reversed(rows)]))
    assert one.classes == ["a", "b"] and one.labels.tolist() == [0] * 4 + [1] * 4
    assert one.paths == paths[::2] + paths[1::2] == two.paths
    assert one.known["patient"].tolist() == ["P0", "P1", "P2", "P3"] * 2
    assert one.fingerprint() == two.fingerprint() and one.pixels.equal(two.pixels)
    assert one.units()["patient"].tolist() == [0, 1, 2, 3] * 2


def test_headings_are_named_and_never_guessed(flat, tmp_path, capsys):
    root, paths = flat
    rows = [[p.rsplit("/")[-1].removesuffix(".png"), "ab"[i % 2], "x"]
            for i, p in enumerate(paths)]  # a file's name without suffix, as in HAM10000
    path = put(tmp_path / "t.csv", ["image_id", "dx", "age"], *rows)
    with pytest.raises(InputError, match="no column path; its headings are image_id, dx, age"):
        look(root, path)
    images = look(root, path, ["path=image_id", "label=dx"])
    assert images.classes == ["a", "b"] and images.paths == paths[::2] + paths[1::2]
    assert "columns that are not used: age" in capsys.readouterr().err
    for wrong, message in ((["path=image"], "has the headings image_id, dx, age"),
                           (["way=dx"], "must be NAME=HEADING"), (["path="], "must be NAME=HEAD")):
        with pytest.raises(InputError, match=message):
            look(root, path, wrong)
    path = put(tmp_path / "u.csv", ["Path", "label", "Label"], *rows)  # Label: there is a label
    assert look(root, path, ["path=Path"]).classes == ["a", "b"]
    assert "columns that are not used: Label" in capsys.readouterr().err


def test_a_path_is_also_tried_as_a_name_where_one_file_fits(tmp_path, capsys):
    root = write_tree(tmp_path / "d", {"a": 2, "b": 2}, 8)
    listed = put(tmp_path / "1.csv", ["path", "patient"], ["a\\a-001.png", 1], ["./a/a-002.png", 2],
                 ["old/place/b-001.dcm", 3], [str(root / "b" / "b-002.png"), 4])
    assert look(root, listed).known["patient"].tolist() == ["1", "2", "3", "4"]
    assert (f"note: --table {listed}: 1 path(s) are no file and were met by their name alone, such "
            "as old/place/b-001.dcm\n") in capsys.readouterr().err
    (root / "b" / "b-001.png").rename(root / "b" / "a-001.png")
    listed = put(tmp_path / "2.csv", ["path"], ["a-001"], ["a-002"], ["b-002"], ["b-003"])
    with pytest.raises(InputError, match="1 path.s. are no image under .*: b-003"):
        look(root, listed)
    listed = put(tmp_path / "3.csv", ["path"], ["a-001"], ["a-002"], ["b-002"])
    with pytest.raises(InputError, match=r"as names fit several: a-001 \(2 files\)"):
        look(root, listed)
    listed = put(tmp_path / "one.csv", ["path"], ["a/a-001.png"], ["a/a-002.png"])
    with pytest.raises(InputError, match="it leaves one class only"):
        look(root, listed, skip=True)
    listed = put(tmp_path / "4.csv", ["path"], ["a/a-002.png"], ["a-002"], ["b-002"])
    with pytest.raises(InputError, match="1 file.s. are named by several rows: .*a-002.png"):
        look(root, listed)


def test_paths_may_begin_at_the_class_folders_inside_a_wrapping_one(tmp_path):
    root = tmp_path / "set"
    for name in "AB":
        write_tree(root / "Original", {name: 2}, 8)
        for file in (root / "Original" / name).iterdir():
            file.rename(file.with_name(file.name[2:]))  # the same names in both
    listed = put(tmp_path / "split.csv", ["path", "label", "split"], *(
        [f"{name}/00{i}.png", name, "train"] for name in "AB" for i in (1, 2)))
    images = look(root, listed)
    assert images.paths == ["A/001.png", "A/002.png", "B/001.png", "B/002.png"]
    assert images.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("header, rows, message", [
    (["label"], [["a"]], "no column path; its headings are label"),
    (["path", "split"], [["a/a-001.png", "train"], ["a/a-002.png", "fit"]],
     "1 row.s. with an unknown split, not train, val or test: a/a-002.png .'fit'."),
    (["path"], [["a/a-001.png"], ["a/a-001.png"]], "1 path.s. are named twice: a/a-001.png"),
    (["path"], [["x1"], ["x2"], ["x3"], ["x4"]], "4 path.s. are no image .*: x1, x2, x3, ..."),
    (["path"], [["x1"], ["x2"], ["x3"]], "3 path.s. are no image under .*: x1, x2, x3$"),
    (["path"], [["a/a-001.png"]], "3 image.s. are not in it .--skip-unlisted"),
    (["path", "label"], [["a/a-001.png"]], "row 2 .blank lines not counted. has 1 f"),
    (["path", "label"], [["a/a-001.png", "x", "y"]], "row 2 .* has 3 fields, the header has 2"),
    (["path", "path"], [["a", "b"]], "the heading path stands there twice"),
    (["path", "Patient"], [["a/a-001.png", 1]], "Patient is not quite patient; .*--columns 'pat"),
    (["path"], [], "no row under the header"),
    (["path", "label"], [[f"{c}/{c}-00{i}.png", "x"] for c in "ab" for i in (1, 2)],
     "one class only .x., nothing to tell apart"),
    (["path", "split"], [["a/a-001.png", "fold1"]], "name one of them: .*fold1/split.csv"),
])
def test_bad_tables_end_in_one_line(tmp_path, header, rows, message):
    root = write_tree(tmp_path / "d", {"a": 2, "b": 2}, 8)
    with pytest.raises(InputError, match=message):
        look(root, put(tmp_path / "t.csv", header, *rows))


def test_what_is_left_out_is_counted(tmp_path, capsys):
    root = write_tree(tmp_path / "d", {"a": 4, "b": 4}, 8)
    rows = [[f"{c}/{c}-00{i}.png", c, p] for c in "ab" for i, p in ((1, "P"), (2, "P"), (3, ""))]
    rows[0][1], rows[4][2] = "", "Q"
    images = look(root, put(tmp_path / "t.csv", ["path", "label", "patient"], *rows), skip=True)
    assert images.paths == [row[0] for row in rows[1:]]
    said = capsys.readouterr().err
    assert ": 2 image(s) not in it are left out" in said
    assert ": 1 image(s) without a label are left out" in said
    assert ": 1 patient(s) with images of several classes, such as P\n" in said
    with pytest.raises(FileNotFoundError):  # checks.guard makes it one line
        look(root, tmp_path / "none.csv")


def test_a_table_with_labels_names_paths_from_the_class_folders_unless_one_is_elsewhere(tmp_path):
    root = tmp_path / "d"
    write_tree(root / "wrap", {"a": 2, "b": 2}, 8)
    write_tree(root, {"loose": 1}, 8)
    (root / "loose" / "loose-001.png").rename(root / "c.png")
    (root / "loose").rmdir()
    inside = [f"{c}/{c}-00{i}.png" for c in "ab" for i in (1, 2)]
    rows = [[f"wrap/{path}", "vwvw"[i]] for i, path in enumerate(inside)]
    images = look(root, put(tmp_path / "1.csv", ["path", "label"], *rows))
    assert images.paths == [inside[i] for i in (0, 2, 1, 3)] and images.classes == ["v", "w"]
    images = look(root, put(tmp_path / "2.csv", ["path", "label"], *rows, ["c.png", "v"]))
    assert sorted(images.paths) == ["c.png", *(f"wrap/{path}" for path in inside)]


# ---- split and clients -------------------------------------------------------------------------

def settled(images, **flags):
    args = argparse.Namespace(**{"split": None, "partition": None, "clients": None, "folds": 1,
                                 "split_seed": 42, "inner_val": 0.1} | flags)
    parts.settle(args, images)
    return args


@pytest.fixture
def known(tmp_path):
    """Twelve images of six patients, three clients and a given split."""
    root = write_tree(tmp_path / "d", {"a": 12, "b": 12}, 8)
    rows = [[f"{c}/{c}-{i:03d}.png", f"{c}{i // 2}", f"{'train' if i < 9 else 'val'}" if i < 11
             else "test", ("10", "9", "N")[i % 3] if i < 11 else ""]
            for c in "ab" for i in range(1, 13)]
    header = ["path", "patient", "split", "client"]
    return root, rows, lambda *drop: look(root, put(
        tmp_path / "t.csv", [h for h in header if h not in drop],
        *[[v for h, v in zip(header, row, strict=True) if h not in drop] for row in rows]))


def test_a_column_that_is_there_is_used(known, capsys):
    images = known[2]()
    args = settled(images)
    assert (args.split, args.partition, args.clients) == ("given", "given", 3)
    assert capsys.readouterr().out == ("given with the images: patient used, split used, client "
                                       "used; --split given, --partition given\n")
    split = parts.make_splits(args, images)[""]
    assert [len(split[p]) for p in ("train", "val", "test")] == [16, 4, 4]
    clients = parts.make_clients(args, images, split)
    assert images.client_names(clients) == ["9", "10", "N"]  # numbers as numbers, then words
    assert images.titles(clients) == ["client 9", "client 10", "N"]
    assert np.array_equal(np.sort(np.concatenate(clients)), split["train"])
    # validation images that the table gives to a client go to it, and the others are dealt
    shares = parts.deal_part(args, images, split["val"], clients)
    assert [images.known["client"][s].tolist() for s in shares] == [["9"] * 2, ["10"] * 2, []]
    dealt = parts.deal_part(args, images, split["test"], clients)
    assert np.array_equal(np.sort(np.concatenate(dealt)), split["test"])


def test_flags_of_split_folds_and_clients_have_these_defaults_and_edges():
    parser = checks.make_parser("x")
    for add in (parts.add_arguments, parts.add_fold_arguments, parts.add_client_arguments):
        add(parser)
    assert vars(parser.parse_args([])) == {
        "split": None, "split_seed": 42, "folds": None, "inner_val": 0.1, "clients": None,
        "partition": None, "alpha": 0.3, "classes_per_client": 2}
    line = ["--split-seed", "0", "--folds", "1", "--clients", "1", "--classes-per-client", "1"]
    given = parser.parse_args([*line, "--inner-val", "0"])
    assert (given.split_seed, given.folds, given.clients, given.classes_per_client) == (0, 1, 1, 1)
    assert given.inner_val == 0 and parser.parse_args(["--inner-val", "0.5"]).inner_val == 0.5
    assert parser.parse_args(["--alpha", "0.001"]).alpha == 0.001
    for wrong in (["--inner-val", "0.51"], ["--alpha", "0"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


def test_what_is_neither_given_nor_flagged_is_random_and_of_four_equal_clients(known, capsys):
    args = settled(known[2]("split", "patient", "client"))
    assert (args.split, args.partition, args.clients) == ("random", "iid", 4)
    assert capsys.readouterr().out == ""
    central = argparse.Namespace(split=None)  # neither folds nor clients
    images = known[2]()
    parts.settle(central, images)
    assert vars(central) == {"split": "given"} and list(images.known) == ["patient", "split"]
    assert capsys.readouterr().out == ("given with the images: patient used, split used, client "
                                       "not used; --split given\n")
    assert settled(known[2](), clients=3).clients == 3  # as many as the column has


def test_a_flag_wins_over_a_column(known, capsys):
    images = known[2]()
    args = settled(images, split="stratified", partition="iid", clients=2)
    assert set(images.known) == {"patient"} and args.clients == 2
    assert "split not used, client not used" in capsys.readouterr().out
    images = known[2]()
    with pytest.raises(InputError, match="--clients 4: the column client has 3"):
        settled(images, clients=4)
    assert settled(known[2](), folds=3).split == "grouped"  # k-fold sets a split aside
    assert settled(known[2]("split", "patient"), folds=3).split == "stratified"
    assert settled(known[2]("split")).split == "grouped"
    for flag in ({"split": "given"}, {"partition": "given"}):
        with pytest.raises(InputError, match="given: neither table nor folders have a column"):
            settled(known[2]("split", "client"), **flag)


def test_patients_are_never_cut_and_those_on_both_sides_are_a_loud_warning(known, capsys):
    images = known[2]("split", "client")
    patients = images.known["patient"]
    for folds in (1, 3):
        several = list(parts.make_splits(settled(images, folds=folds), images).values())
        for split in several:
            owners = [set(patients[split[p]].tolist()) for p in ("train", "val", "test")]
            assert not owners[0] & owners[1] and not owners[0] & owners[2]
            assert not owners[1] & owners[2]
    assert "WARNING" not in capsys.readouterr().err
    split = parts.make_splits(settled(images, split="random"), images)[""]
    shared = set(patients[split["train"]].tolist()) & set(patients[split["test"]].tolist())
    assert shared and f"WARNING: {len(shared)} patient(s) have images in" in capsys.readouterr().err


def test_twins_and_patients_on_both_sides_are_counted(capsys):
    images = toy_images(10, classes=2)
    images.digests = list("aabbcccdec")  # five copies, three of them beside another image
    words = ["train", "train", "val", "train", "test", "train", "test", "val", "train", "test"]
    images.known = {"split": np.array(words), "patient": np.array(list("0123456789"))}
    images.known["patient"][[4, 6]] = "5"
    split = parts.make_splits(settled(images, split="given"), images)[""]
    assert split["train"].tolist() == [0, 1, 3, 5, 8]
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == (
        "identical images: 5 copies of another; with a twin in training: 1 of 2 validation, "
        "3 of 3 test images")
    assert printed.err == ("WARNING: 1 patient(s) have images in the training part and in the test "
                           "part, so that the test figures are not those of new patients\n")
    # over several splits each is counted once
    assert "1 patient(s)" in parts.both_sides(images, [split, split])[0]
    images.known["split"][[0, 8]] = "dropped"  # the only ones of class 0 in training
    with pytest.raises(InputError, match="class c0 is too small for the given split"):
        parts.make_splits(settled(images, split="given"), images)[""]


def test_without_a_table_identical_images_stay_together():
    images = toy_images(40, classes=2)
    images.digests = [str(i // 4) for i in range(40)]
    split = parts.make_splits(settled(images, split="grouped"), images)[""]
    for part in split.values():
        assert len(part) >= 4 and set(np.bincount(part // 4).tolist()) <= {0, 4}


def test_hospitals_by_stain_are_told_by_their_mean_red(capsys):
    images = toy_images(4, classes=2)
    images.labels = torch.tensor([0, 0, 1, 1])
    images.pixels[:] = torch.tensor([[10, 1, 0], [31, 2, 0], [50, 1, 0], [71, 2, 0]],
                                    dtype=torch.uint8)[..., None, None]
    split = {"train": np.arange(4), "val": np.arange(0), "test": np.arange(0)}
    clients = parts.make_clients(settled(images, partition="stain", clients=2), images, split)
    assert [own.tolist() for own in clients] == [[0, 2], [1, 3]]
    shares = parts.deal_part(settled(images, partition="stain", clients=2), images,
                             np.array([0, 2, 3]), clients)
    assert [share.tolist() for share in shares] == [[0, 2], [3]]
    assert capsys.readouterr().out == (
        "mean red of the hospitals 30.0, 51.0; of the classes 20.5, 60.5\n")
    with pytest.raises(InputError, match="stain: no class has images for 9 clients"):
        parts.make_clients(settled(images, partition="stain", clients=9), images, split)


def test_the_parts_that_are_not_given(known, capsys):
    rows = known[1]
    words, labels = np.array([r[2] for r in rows]), np.repeat([0, 1], 12)
    words[words == "val"] = "train"
    split = splits.given(words, labels, 42)
    assert [len(split[p]) for p in ("train", "val", "test")] == [18, 2, 4]
    assert labels[split["val"]].tolist() == [0, 1]
    assert "no val part: 2 images of its training part validate, stratified" in (
        capsys.readouterr().err)
    groups = [r[1] for r in rows]
    split = splits.given(words, labels, 42, groups)
    assert {groups[i] for i in split["val"]}.isdisjoint(groups[i] for i in split["train"])
    assert len(split["val"]) == 2 and "whole groups" in capsys.readouterr().err
    five = [str(i % 5) for i in range(24)]  # none is as small as a tenth: the smallest validates
    split = splits.given(words, labels, 42, five)
    assert len({five[i] for i in split["val"]}) == 1 and len(split["val"]) == min(
        np.unique(np.array(five)[words == "train"], return_counts=True)[1])
    images = toy_images(24, classes=2)
    images.known = {"split": words, "patient": np.array(["one"] * 24)}
    with pytest.raises(InputError, match="given split: the training part has none of it"):
        parts.make_splits(settled(images, split="given"), images)[""]
    with pytest.raises(InputError, match="no test part; give one, or name another split"):
        splits.given(np.array(["train"] * 24), labels, 42)
    both = splits.given(np.array(["train"] * 20 + ["val+test"] * 3 + ["dropped"]), labels, 42)
    assert both["val"].tolist() == both["test"].tolist() == [20, 21, 22]


def test_owners_are_checked():
    split = {"train": np.arange(4), "val": np.arange(4, 6), "test": np.arange(6, 8)}
    names = np.array(["b", "a", "b", "a", "", "", "", ""])
    assert {k: v.tolist() for k, v in splits.owned(names, split).items()} == {
        "a": [1, 3], "b": [0, 2]}
    with pytest.raises(InputError, match="the column client is empty for 1 training image"):
        splits.owned(np.where(np.arange(8) == 0, "", names), split)
    with pytest.raises(InputError, match="client c of the column client has no training image"):
        splits.owned(np.where(np.arange(8) == 7, "c", names), split)


def test_units_join_over_patients_and_groups():
    a, b = splits.numbered(np.array(["x", "y", "", "", "x"])), np.array([0, 1, 1, 2, 3])
    assert a.tolist() == [0, 1, 2, 3, 0]  # the known in order, then each unknown in its turn
    joined = splits.joined([a, b])
    assert joined[1] == joined[2] and joined[0] == joined[4] and len(set(joined.tolist())) == 3


# ---- round trips: a run's split.csv is a table ---------------------------------------------------

NAMES = ['a,b.png', 'q"t.png', "line\nbreak.png", "é早.png", "tab\t;.png"]


@pytest.fixture(scope="module")
def odd_tree(tmp_path_factory):
    root = write_tree(tmp_path_factory.mktemp("odd") / "toy", {"Benign": 24, "Early": 24})
    for name in NAMES:
        for folder in ("Benign", "Early"):
            first = min((root / folder).glob("*-0*.png"))
            first.rename(root / folder / name)
    return root


@pytest.mark.parametrize("flags", [
    [], ["--partition", "dirichlet", "--clients", 3, "--alpha", 1, "--bn", "local"],
    ["--split", "stratified80", "--clients", 12], ["--split", "grouped"]])
def test_a_run_is_repeated_from_its_split_to_the_byte(odd_tree, tmp_path, flags):
    one = train(odd_tree, tmp_path / "one", "--rounds", 2, *flags)
    more = [x for x in flags if x not in ("--partition", "dirichlet", "--alpha", 1, "--split",
                                          "stratified80", "grouped", "--clients", 12, 3)]
    two = train(odd_tree, tmp_path / "two", "--rounds", 2, "--table", one / "split.csv", *more)
    assert same_run(one, two)
    (tmp_path / "moved.csv").write_bytes((one / "split.csv").read_bytes())
    assert json.loads((two / "run.json").read_text())["arguments"]["split"] == "given"


def test_named_clients_are_named_everywhere_and_the_run_stands_alone(odd_tree, tmp_path, capsys):
    images = look(odd_tree, size=20)
    rows = [[p, ("NORTH", "SOUTH")[i % 2], f"P{i // 2}"] for i, p in enumerate(images.paths)]
    path = put(tmp_path / "t.csv", ["path", "client", "patient"], *rows)
    out = train(odd_tree, tmp_path / "run", "--rounds", 2, "--table", path)
    assert "\n  NORTH: " in capsys.readouterr().out
    with open(out / "split.csv", **run_folder.CSV) as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == ["path", "label", "split", "client", "patient"]
    assert [[r["path"], r["client"], r["patient"]] for r in written] == rows
    assert "### By patient: intervals that count patients" in (out / "report.md").read_text()
    (tmp_path / "t.csv").unlink()  # what the table said stands in split.csv
    audit.main(["run", str(out)])
    probes = json.loads((out / "audit" / "audit.json").read_text("utf-8"))["probes"]
    assert {p["mcnemar"] for p in probes.values()} == {None}  # it would count images, not patients
    alone = tmp_path / "alone"
    train_central.main(["--like", str(out), "--local-only", "--table", str(out / "split.csv"),
                        "--out", str(alone)])
    members = json.loads((alone / "results.json").read_text())["members"]
    assert [m["client"] for m in members] == ["NORTH", "SOUTH"]
    assert "| NORTH |" in (alone / "report.md").read_text()
    other = train(odd_tree, tmp_path / "b", "--rounds", 1, "--table", out / "split.csv", "--seed",
                  1)
    capsys.readouterr()
    compare.main([str(out), str(other), "--out", str(tmp_path / "c")])
    (test,) = json.loads((tmp_path / "c" / "comparison.json").read_text())["tests"]
    assert test["unit"] == "patient" and test["mcnemar"] == []
    assert "images of a patient are alike" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_split(odd_tree, tmp_path):
    images = look(odd_tree, size=20)
    def write(word):
        return put(tmp_path / "t.csv", ["path", "split"], *[
            [p, ("train", "train", "val", word)[i % 4]] for i, p in enumerate(images.paths)])
    out = train(odd_tree, tmp_path / "run", "--rounds", 2, "--table", write("test"))
    (tmp_path / "moved.csv").write_bytes((tmp_path / "t.csv").read_bytes())
    before = history(out)
    train_federated.main(["--resume", str(out), "--table", str(tmp_path / "moved.csv")])
    assert history(out) == before
    rows = (tmp_path / "t.csv").read_text().replace("val", "x").replace("test", "val").replace(
        "x", "test")
    (tmp_path / "t.csv").write_text(rows)
    with pytest.raises((InputError, SystemExit), match="do not give its split"):
        train_federated.main(["--resume", str(out)])


def test_the_demonstration_takes_a_table_too(tmp_path):
    args = argparse.Namespace(data=None, table=None, columns=None, skip_unlisted=False,
                              image_size=8, remove=[])
    whole = data.load(args)
    args.table = put(tmp_path / "t.csv", ["path", "patient"], *[[p, p[:6]] for p in whole.paths])
    again = data.load(args)
    assert again.fingerprint() == whole.fingerprint() and again.pixels.equal(whole.pixels)
    assert len(set(again.known["patient"].tolist())) == 4


def test_predict_and_audit_take_a_table(odd_tree, tmp_path, capsys):
    out = train(odd_tree, tmp_path / "run", "--rounds", 1)
    images = look(odd_tree, size=20)
    label = {0: "early", 1: "Benign"}  # against the folders, so that the table must have decided
    rows = [[p, label[y]] for p, y in zip(images.paths, images.labels.tolist(), strict=True)]
    rows[0][1], rows[1][1] = "", "unheard of"
    path = put(tmp_path / "t.csv", ["path", "label"], *rows)
    predict.main([str(out), str(odd_tree), "--table", path, "--exact", "--out",
                  str(tmp_path / "p.csv")])
    figures = json.loads((tmp_path / "p.json").read_text())
    assert figures["n"] == 46 and figures["per_class"]["Early"]["support"] == 22
    assert "label(s) that the run does not know: unheard of" in capsys.readouterr().err
    for wrong in ([str(odd_tree / "Benign"), str(odd_tree / "Early")], [str(tmp_path / "p.csv")]):
        with pytest.raises(InputError, match="one folder that its paths belong to"):
            predict.main([str(out), *wrong, "--table", path])
    groups = put(tmp_path / "g.csv", ["path", "group"], *[[p, i // 4] for i, p in
                                                           enumerate(images.paths)])
    audit.main(["run", str(out), "--table", groups, "--out", str(tmp_path / "audit")])
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert found["groups"] == "groups of the table" and 1 < found["groups_in_test"] <= 4
    with pytest.raises(InputError, match="neither a column patient nor a column group"):
        audit.main(["run", str(out), "--table", path])


def test_the_folds_of_a_run_are_no_table(odd_tree, tmp_path):
    out = tmp_path / "folds"
    train_central.main(["--data", str(odd_tree), *SMALL, "--folds", "2", "--epochs", "1", "--out",
                        str(out)])
    with pytest.raises(InputError, match=r"the folds of a cross-validation.*fold\d/split.csv"):
        table.read(str(out / "split.csv"))
    assert set(table.read(str(out / "fold1" / "split.csv")).columns) == {
        "path", "label", "split", "client"}


# ---- intervals that hold for patients ------------------------------------------------------------

@pytest.mark.parametrize("patients", [9, 30, 89])
@pytest.mark.parametrize("alike", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("accuracy", [0.90, 0.98])
def test_the_interval_by_patient_covers_the_truth(patients, alike, accuracy):
    """37 images a patient; the accuracy of each is drawn, with this correlation within a patient.
    The interval that takes images as independent covers in 0.17 to 0.69 of the cases."""
    rng = np.random.default_rng([patients, int(10 * alike), int(100 * accuracy)])
    members, covered, image = np.repeat(np.arange(patients), 37), 0, 0
    scale = (1 - alike) / alike
    for _ in range(150):
        own = rng.beta(accuracy * scale, (1 - accuracy) * scale, patients)
        hit = rng.random(len(members)) < own[members]
        c, w = metrics.clustered(hit, members), metrics.wilson(int(hit.sum()), len(hit))
        covered += c["low"] <= accuracy <= c["high"]
        image += w["low"] <= accuracy <= w["high"]
        assert c["effective_n"] <= len(hit)
    assert covered / 150 >= 0.88 and image / 150 < 0.8


def test_a_patient_counts_once_until_ten_hold_an_error():
    members = np.repeat(np.arange(40), 5)
    hit = np.ones(200, bool)
    whole = metrics.clustered(hit, members)  # Clopper-Pearson of 40 of 40
    assert whole == {"value": 1.0, "low": pytest.approx(0.025 ** (1 / 40)), "high": 1.0,
                     "effective_n": 40.0}
    hit[::20] = False  # an error each in ten patients
    found = metrics.clustered(hit, members)
    hits = np.bincount(members, hit)
    variance = 40 / 39 * ((hits - 0.95 * 5) ** 2).sum() / 200**2
    expected = 0.95 * 0.05 / variance * (t.ppf(0.975, 199) / t.ppf(0.975, 39)) ** 2
    assert found["effective_n"] == pytest.approx(min(expected, 200))
    hit[0] = True
    assert metrics.clustered(hit, members)["effective_n"] == 40
    assert metrics.clustered(~hit, members)["effective_n"] == 40  # fewer than ten hold a hit


def test_patients_of_equal_shares_count_as_their_images(recwarn):
    found = metrics.clustered(np.tile([True, False], 20), np.repeat(np.arange(20), 2))
    assert (found["value"], found["effective_n"]) == (0.5, 40) and not recwarn.list


def test_patients_that_count_once_have_the_interval_of_clopper_and_pearson():
    """Five of forty patients are wrong: each limit leaves 2.5 % in its tail. At the ends, and for
    no image at all, the limit is known."""
    members = np.repeat(np.arange(40), 5)
    found = metrics.clustered(members >= 5, members)
    assert (found["value"], found["effective_n"]) == (0.875, 40)
    assert binom.sf(34, 40, found["low"]) == pytest.approx(0.025)
    assert binom.cdf(35, 40, found["high"]) == pytest.approx(0.025)
    never = metrics.clustered(np.zeros(200, bool), members)
    assert never == {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 40)),
                     "effective_n": 40}
    uneven = metrics.clustered(np.array([1, 1, 1, 0], bool), np.array([0, 0, 0, 1]))
    assert uneven["effective_n"] == 16 / 10  # less than the two that they are
    assert metrics.clustered(np.ones(1, bool), np.zeros(1, int)) == {
        "value": 1.0, "low": pytest.approx(0.025), "high": 1.0, "effective_n": 1}
    assert metrics.clustered(np.ones(0, bool), np.ones(0, int)) == {
        "value": None, "low": None, "high": None, "effective_n": None}


def test_bootstraps_need_thirty_units_of_which_ten_hold_an_error():
    labels = np.arange(160) % 2
    p = np.eye(2)[labels] * 0.8 + 0.1
    for k, wrong, none in ((40, 10, False), (40, 9, True), (30, 10, False), (29, 10, True)):
        members, predicted = np.arange(160) % k, labels.copy()
        predicted[:wrong] = 1 - predicted[:wrong]
        out = metrics.bootstrap(labels, predicted, p, 2, members, "patient")
        assert (out["reason"] is not None) == none == (out["macro_f1"]["low"] is None)
        if not none:
            assert out["macro_f1"]["low"] < out["macro_f1"]["high"]
    assert out["reason"] == ("no interval: 10 of 29 patients hold an error; a bootstrap needs 10 "
                             "of at least 30")
    logits = np.log(np.eye(4)[np.arange(32) % 4] * 0.9 + 0.025)
    m = metrics.measure(logits, np.arange(32) % 4, list("abcd"), {"patient": np.arange(32) // 4})
    assert m["macro_f1"] == 1 and m["intervals"]["macro_f1"] == {"low": None, "high": None}
    assert m["intervals"]["reason"].startswith("no interval: 0 of 32 images")
    assert m["by_patient"]["n"] == 8 and m["by_patient"]["accuracy"]["effective_n"] == 8


def test_a_planted_effect_of_patients_is_missed_by_images_and_not_by_patients():
    """Two of thirty patients are always wrong for A and right for B: images call that a sure
    difference, patients do not."""
    members = np.repeat(np.arange(30), 20)
    a, b = members >= 2, np.ones(600, bool)
    images = metrics.paired_difference(a, b)
    assert images["high"] < 0
    whole = metrics.paired_difference(a, b, members, "patient")
    assert whole["low"] is None and whole["value"] == pytest.approx(-40 / 600)
    assert whole["reason"].startswith("no interval: 2 of 30 patients hold a discordant image")




def test_the_effective_number_is_less_where_patients_are_alike():
    """Twelve of forty patients always wrong: design effect about 5."""
    members, hit = np.repeat(np.arange(40), 5), np.repeat(np.arange(40) >= 12, 5)
    found = metrics.clustered(hit, members)
    variance = 40 / 39 * ((np.bincount(members, hit) - 0.7 * 5) ** 2).sum() / 200**2
    expected = 0.7 * 0.3 / variance * (t.ppf(0.975, 199) / t.ppf(0.975, 39)) ** 2
    assert expected < 45 and found["effective_n"] == pytest.approx(expected)
