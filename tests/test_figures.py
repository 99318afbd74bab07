"""Every figure shows the numbers that it was given, at the places that its axes say."""

import checks  # noqa: F401 - before torch

import numpy as np
import pytest
import torch
from helpers import toy_images

import explain
from auditing.duplicates import Pair
from dataset import interventions
from reporting import figures


@pytest.fixture
def axes(monkeypatch, tmp_path):
    """The axes of the figure that a function of figures.py draws."""
    def draw(plot, *arguments, **more):
        drawn = []
        monkeypatch.setattr(figures, "save", lambda figure, path, dpi: drawn.append(figure))
        plot(*arguments, tmp_path / "x.png", **more)
        (figure,) = drawn
        return figure.axes
    return draw


def lines(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.lines}


def texts(axis):
    return [text.get_text() for text in axis.texts]


def ticks(axis, which):
    return [text.get_text() for text in getattr(axis, f"get_{which}ticklabels")()]


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_curves_are_means_over_folds_and_skip_what_is_undefined(axes):
    def record(i, loss, accuracy):
        return {"epoch": i, "train_loss": loss, "val_loss": None, "train_accuracy": accuracy,
                "val_accuracy": 0.5}
    folds = [[record(1, 2.0, 0.2), record(2, 1.0, 0.4)], [record(1, 4.0, 0.6)]]
    loss, accuracy = axes(figures.plot_curves, folds, best=2)
    train, val = (f"{name}, mean of 2 ± sd" for name in
                  ("training (augmented batches)", "validation"))
    assert lines(loss) == {train: [[1, 3], [2, 1]], val: [], "best epoch": [[2, 0], [2, 1]]}
    assert lines(accuracy)[train] == [[1, 0.4], [2, 0.4]]
    assert lines(accuracy)[val] == [[1, 0.5], [2, 0.5]]
    band = loss.collections[0].get_paths()[0].vertices
    assert sorted(set(band[band[:, 0] == 1, 1])) == pytest.approx([3 - 2**0.5, 3 + 2**0.5])
    assert set(band[band[:, 0] == 2, 1]) == {1}  # of one fold there is no deviation
    assert (loss.get_xlabel(), loss.get_ylabel(), accuracy.get_ylabel()) == (
        "epoch", "loss", "accuracy")
    assert not (loss.get_xticks() % 1).any()  # there is no half an epoch
    assert legend(loss) == [train, val, "best epoch"] and accuracy.get_legend() is None
    one, _ = axes(figures.plot_curves, folds[1:], unit="epoch")
    assert list(lines(one)) == ["training (augmented batches)", "validation"]


def test_confusion_is_counts_shaded_by_the_share_of_the_true_class(axes):
    (axis,) = axes(figures.plot_confusion, [[3, 1, 0], [5, 5, 0], [0, 0, 0]], list("abc"), "title")
    assert axis.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0.5, 0.5, 0], [0, 0, 0]]
    assert axis.images[0].get_clim() == (0, 1)
    assert texts(axis) == list("310550000")
    assert [t.get_position() for t in axis.texts[:4]] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert [t.get_color() for t in axis.texts] == ["white"] + ["black"] * 8
    assert ticks(axis, "x") == ticks(axis, "y") == list("abc")
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == (
        "predicted", "true", "title")
    (axis,) = axes(figures.plot_confusion, [[0, 1], [0, 2]], list("ab"), "title")
    assert axis.images[0].get_array().tolist() == [[0, 1], [0, 1]]  # of one image, too


def test_roc_has_a_curve_for_each_class_that_is_there(axes):
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1]]))
    per_class = {"a": {"auc": 0.5}, "b": {"auc": 1.0}, "c": {"auc": None}}
    (axis,) = axes(figures.plot_roc, logits, np.array([0, 1, 1]), list("abc"), per_class)
    found = lines(axis)
    assert legend(axis) == ["a, AUC 0.5000", "b, AUC 1.0000", "chance"] and len(found) == 3
    assert found["a, AUC 0.5000"] == [[0, 0], [0, 1], [1, 1]]  # the first is above both others
    assert found["b, AUC 1.0000"][-1] == [1, 1] and [0, 1] in found["b, AUC 1.0000"]
    assert axis.lines[2].get_xydata().tolist() == [[0, 0], [1, 1]]
    (axis,) = axes(figures.plot_roc, logits, np.array([0, 0, 0]), list("abc"),
                   {name: {"auc": None} for name in "abc"})
    assert legend(axis) == ["chance"]


def test_probes_stand_with_their_intervals_beside_the_largest_class(axes):
    rows = {"means": {"default": {"value": 0.5, "low": 0.3, "high": 0.8},
                      "grouped": {"value": 0.6, "low": 0.5, "high": 0.7}},
            "frame": {"default": {"value": 0.9, "low": 0.8, "high": 1.0},
                      "grouped": {"value": 0.4, "low": 0.2, "high": 0.5}}}
    (axis,) = axes(figures.plot_probes, rows, 0.25)
    marks = [bars.lines[0].get_xydata() for bars in axis.containers]
    assert [m[:, 0].tolist() for m in marks] == [[0.5, 0.9], [0.6, 0.4]]
    assert [m[:, 1].tolist() for m in marks] == [[0, 1], [0.18, 1.18]]
    bars = [bar for one in axis.containers for bar in one.lines[2][0].get_segments()]
    assert np.array(bars)[:, :, 0].tolist() == [
        pytest.approx(x) for x in ([0.3, 0.8], [0.8, 1.0], [0.5, 0.7], [0.2, 0.5])]
    assert lines(axis)["largest class"] == [[0.25, 0], [0.25, 1]]
    assert ticks(axis, "y") == ["means", "frame"] and axis.yaxis_inverted()
    assert axis.get_xlim() == (0, 1.02)
    assert sorted(legend(axis)) == ["default", "grouped", "largest class"]


def test_split_seeds_are_a_histogram_with_seed_42_marked(axes):
    (axis,) = axes(figures.plot_seeds, {"values": [0.5, 0.5, 0.9], "seed_42": 0.7})
    heights = [patch.get_height() for patch in axis.patches]
    assert len(heights) == 20 and sum(heights) == 3 and (heights[0], heights[-1]) == (2, 1)
    assert lines(axis) == {"seed 42": [[0.7, 0], [0.7, 1]]} and legend(axis) == ["seed 42"]


def test_reliability_is_accuracy_over_confidence_in_ten_bins(axes):
    p = np.array([[1.0, 0.0], [0.95, 0.05], [0.65, 0.35], [0.39, 0.61], [0.85, 0.15]])
    (axis,) = axes(figures.plot_reliability, p, np.array([0, 0, 0, 0, 1]))
    dots = axis.collections[0]
    assert np.array(dots.get_offsets()) == pytest.approx(
        np.array([[0.63, 0.5], [0.85, 0], [0.975, 1]]))
    assert dots.get_sizes().tolist() == [100, 60, 100]  # a marker's area grows with its images
    assert axis.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]
    assert axis.get_title() == "n = 5" and axis.get_xlim() == axis.get_ylim() == (0, 1.02)


def test_clients_are_bars_of_their_classes_ending_in_their_colour(axes):
    images = toy_images(7)  # classes 0 1 2 0 1 2 0
    colour = np.repeat(np.arange(7)[:, None] * 30.0, 3, axis=1)
    (axis,) = axes(figures.plot_clients, images, [np.array([0, 1, 3]), np.array([2, 4])], colour)
    bars = np.array([[p.get_y() + p.get_height() / 2, p.get_x(), p.get_width()]
                     for p in axis.patches])
    assert bars == pytest.approx(np.array(
        [[0, 0, 2], [1, 0, 0], [0, 2, 1], [1, 0, 1], [0, 3, 0], [1, 1, 1],
         [0, 3.06, 0.12], [1, 2.06, 0.12]]))
    assert [p.get_facecolor()[0] for p in axis.patches[-2:]] == pytest.approx([40 / 255, 90 / 255])
    assert legend(axis) == ["c0", "c1", "c2"] and axis.yaxis_inverted()
    assert ticks(axis, "y") == images.client_names([[0], [0]])


def subject(path, p, truth):
    pixels = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    return explain.Subject(path, pixels, truth, np.array(p), "given")


def test_maps_stand_beside_and_over_their_image(axes):
    signed, plain = np.linspace(-2, 1, 16).reshape(4, 4), np.linspace(0, 3, 16).reshape(4, 4)
    one, other = subject("x/a.png", [0.25, 0.75], 0), subject("b.png", [0.6, 0.4], None)
    found = axes(figures.plot_maps, [(one, 0, signed), (other, 0, plain)], "Grad-CAM", ["p", "q"])
    assert [axis.get_title() for axis in found] == ["image", "Grad-CAM", "overlay", "", "", ""]
    assert [axis.get_ylabel() for axis in found[::3]] == [
        "a.png\npredicted q 0.750, truth p\nexplained: p 0.250",
        "b.png\npredicted p 0.600\nexplained: p 0.600"]
    pictures = [[(image.get_array().tolist(), image.get_alpha(), image.get_clim())
                 for image in axis.images] for axis in found]
    shown, top = one.pixels.permute(1, 2, 0).tolist(), figures.scale(signed)
    assert [image[0] for image in (pictures[0][0], pictures[2][0])] == [shown, shown]
    assert pictures[1] == [(signed.tolist(), 1.0, (-top, top))]
    assert pictures[2][1] == (signed.tolist(), 0.5, (-top, top))
    assert pictures[4] == [(plain.tolist(), 1.0, (0, figures.scale(plain)))]
    assert [found[i].images[0].get_cmap().name for i in (1, 4)] == ["RdBu_r", "inferno"]


def test_the_scale_of_a_map_is_not_that_of_one_pixel():
    values = np.zeros(1000)
    assert figures.scale(values) == 1  # nothing to draw, nothing to divide by
    values[0] = -8
    assert figures.scale(values) == 8
    assert figures.scale(np.append(np.full(1000, -2.0), 50)) == 2


def test_lime_shows_the_heaviest_superpixels_for_and_against(axes):
    segments, one = np.arange(16).reshape(4, 4) // 2, subject("a.png", [0.25, 0.75], 1)
    weights = np.array([3.0, -1, 2, -2, 1, -3, 0, 0.5])
    _, positive, negative, all_of_it = axes(
        figures.plot_lime, [(one, 1, segments, weights)], ["p", "q"], top=2)
    shown = one.pixels.permute(1, 2, 0).numpy()
    for axis, chosen in ((positive, [0, 2]), (negative, [5, 3])):
        inside = np.isin(segments, chosen)[..., None]
        assert np.array_equal(axis.images[0].get_array(), np.where(inside, shown, shown // 4))
        assert len(axis.collections) == 1  # the outline
    assert np.array_equal(all_of_it.images[0].get_array(), weights[segments])
    _, positive, negative, _ = axes(figures.plot_lime, [(one, 1, segments, np.zeros(8))],
                                    ["p", "q"])
    assert not positive.collections and not negative.collections
    weights = np.arange(8) + 1.0  # all for the class: the five heaviest are shown
    _, positive, negative, _ = axes(figures.plot_lime, [(one, 1, segments, weights)], ["p", "q"])
    assert np.array_equal(positive.images[0].get_array(), np.where(
        segments[..., None] > 2, shown, shown // 4))
    assert not negative.collections


def test_pages_hold_eight_rows_each(monkeypatch, tmp_path):
    pages = []
    monkeypatch.setattr(figures, "plot_maps", lambda entries, method, classes, path: pages.append(
        (path.name, [s.path for s, _, _ in entries])))
    monkeypatch.setattr(figures, "plot_lime", lambda *arguments: None)
    subjects = [subject(str(i), [0.25, 0.75], 1) for i in range(9)]
    found = {"maps": {("cam", 1): 0}, "segments": 0, "lime": [{1: 0}]}
    figures.write(tmp_path, subjects, [found] * 9, ["Benign", "Early"], ("cam",))
    assert pages == [("cam-1.png", list("01234567")), ("cam-2.png", ["8"])]


def test_rightly_predicted_images_are_shown_before_wrong_ones(monkeypatch, tmp_path):
    shown, found = [], {"maps": {}, "segments": 0, "lime": [{0: 0, 1: 0}]}
    monkeypatch.setattr(figures, "plot_lime", lambda entries, classes, path: shown.extend(
        s.path for s, *_ in entries))
    subjects = [subject("wrong", [0.9, 0.1], 1), subject("right", [0.2, 0.8], 1),
                subject("later", [0.1, 0.9], 1), subject("wrong, but alone", [0.3, 0.7], 0)]
    figures.write(tmp_path, subjects, [found] * 4, ["Benign", "Early"], ())
    assert shown == ["right", "wrong, but alone"]


def test_near_duplicates_are_shown_from_the_weakest_pair_to_the_strongest(axes):
    images = toy_images(8)
    pairs = [Pair(i, i + 1, 1.0, (i, 0), 0.5, 1 - i / 10) for i in range(5)]
    found = axes(figures.plot_pairs, images, pairs, count=2)
    assert [axis.get_ylabel() for axis in found[::2]] == [
        "c1/004.png\nc2/005.png\noverlap 0.50, r 0.60, shift (4, 0)",
        "c0/000.png\nc1/001.png\noverlap 0.50, r 1.00, shift (0, 0)"]
    assert np.array_equal(found[1].images[0].get_array(), images.pixels[5].permute(1, 2, 0))
    assert len(axes(figures.plot_pairs, images, [])) == 2  # no pair: an empty row
    assert len(axes(figures.plot_pairs, images, pairs * 2)) == 2 * 6  # six rows at most


def test_interventions_are_shown_on_the_first_image_of_each_class(axes):
    images = toy_images(6, size=24)
    found = axes(figures.plot_interventions, images)
    names = list(interventions.INTERVENTIONS)
    width = 1 + len(names)
    assert [axis.get_title() for axis in found[:width]] == ["as read"] + [
        f"without {name}" for name in names]
    assert [axis.get_ylabel() for axis in found[::width]] == ["c0", "c1", "c2"]
    for c in range(3):
        for axis, removed in zip(found[c * width:], [[]] + [[name] for name in names],
                                 strict=False):
            expected = interventions.apply(images.pixels[c:c + 1], removed)[0].permute(1, 2, 0)
            assert np.array_equal(axis.images[0].get_array(), expected)
