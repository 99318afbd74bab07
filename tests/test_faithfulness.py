"""The checks on networks whose evidence is known, and on maps made by hand."""

import numpy as np
import pytest
import torch
from helpers import BNNet

import models
from dataset import interventions
from explaining import faithfulness as ff

SIZE = 28  # cells of 2 pixels


def picture():
    pixels = torch.full((3, SIZE, SIZE), 40, dtype=torch.uint8)
    pixels[0, 4:8, 20:24] = 240  # cells (2..3, 10..11): the only evidence
    return pixels


def classify(pixels):
    """Class 1 with the share of the bright patch that is left."""
    red = (pixels[:, 0, 4:8, 20:24].float() > 200).float().mean((1, 2))
    return torch.stack([1 - red, red], 1).numpy()


def order_of(values):
    return np.argsort(-ff.cell_means(values), kind="stable")


def test_deletion_finds_the_patch_that_the_answer_hangs_on():
    right, wrong = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE))
    right[4:8, 20:24], wrong[20:24, 4:8] = 1, 1
    found = ff.deletion_area(classify, picture(), 1, order_of(right))
    # four cells go in the first of 14 steps: 1 → 0 over one of them
    assert found == pytest.approx(0.5 / 14)
    chance = ff.random_area(classify, picture(), 1, seed=0, orders=50)
    assert chance == pytest.approx(0.5, abs=0.06)
    assert ff.deletion_area(classify, picture(), 1, order_of(wrong)) > found
    last = ff.deletion_area(classify, picture(), 1, order_of(-right))
    assert last == pytest.approx(1 - 0.5 / 14)


def test_random_areas_repeat_and_follow_the_seed():
    a, b, c = (ff.random_area(classify, picture(), 1, seed) for seed in (1, 1, 2))
    assert a == b != c


def test_random_areas_are_the_mean_of_four_orders_each_of_every_cell():
    seen = []

    def watch(pixels):
        seen.append(pixels)
        return np.full((len(pixels), 2), len(seen))
    assert ff.random_area(watch, picture(), 0, seed=0) == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert len(seen) == 4 and not torch.equal(seen[0], seen[1])
    assert all(torch.equal(batch[-1], seen[0][-1]) for batch in seen)


def test_the_image_itself_is_not_painted_on():
    pixels = picture()
    before = pixels.clone()
    ff.deletion_area(classify, pixels, 1, np.arange(196))
    assert torch.equal(pixels, before)


def test_the_first_look_is_whole_and_the_last_is_paint():
    seen = []

    def watch(pixels):
        seen.append(pixels)
        return np.ones((len(pixels), 2))
    assert ff.deletion_area(watch, picture(), 0, np.arange(196)) == pytest.approx(1)
    batch, = seen
    assert len(batch) == 15 and torch.equal(batch[0], picture())
    mean = picture().float().mean((1, 2)).round().byte()
    assert torch.equal(batch[-1], mean.view(3, 1, 1).expand(3, SIZE, SIZE))
    changed = [(batch[k] != batch[0]).any(0) for k in range(15)]
    assert changed[1][0].all() and not changed[1][2:].any()  # 14 cells: the first row of cells


def test_cells_of_sides_that_14_does_not_divide():
    index = ff.cell_index((40, 30))
    assert index.max() == 195 and len(np.unique(index)) == 196
    assert ff.cell_means(np.ones((40, 30))).tolist() == [1.0] * 196
    assert ff.cell_means(np.arange(28.0 * 28).reshape(28, 28))[[0, 1, 14]].tolist() == [
        (0 + 1 + 28 + 29) / 4, (2 + 3 + 30 + 31) / 4, (56 + 57 + 84 + 85) / 4]


def test_randomisation_goes_from_the_head_down():
    net = BNNet().eval()
    fresh = BNNet(seed=9).state_dict()
    layers = ["conv", "norm", "mid", "downsample.0", "fc"]
    for share, expected in ((0.0, 1), (0.4, 2), (0.6, 3), (1.0, 5)):
        state = ff.randomised(net, fresh, share)
        new = [name for name in layers
               if all(torch.equal(state[k], fresh[k]) for k in fresh if k.startswith(name + "."))
               and not all(torch.equal(net.state_dict()[k], fresh[k]) for k in fresh
                           if k.startswith(name + "."))]
        # fresh BatchNorm equals a new one: only layers that differ can be told apart
        differing = [name for name in layers[5 - expected:] if name in ("conv", "mid", "fc")]
        assert new == differing
        assert state.keys() == net.state_dict().keys()
    everything = ff.randomised(net, fresh, 1.0)
    assert all(torch.equal(everything[k], fresh[k]) for k in fresh)


def test_weights_beside_a_module_of_its_own_are_randomised_too():
    """As those of attention, which has a layer inside and weights of its own."""
    net, fresh = (torch.nn.Sequential(torch.nn.MultiheadAttention(4, 1), torch.nn.Linear(4, 2))
                  for _ in range(2))
    state = ff.randomised(net, fresh.state_dict(), 1.0)
    assert all(torch.equal(state[k], v) for k, v in fresh.state_dict().items())
    assert not torch.equal(state["0.in_proj_weight"], net[0].in_proj_weight)


def test_layers_without_weights_are_no_layers_to_randomise():
    net, fresh = (torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(4)), torch.nn.Linear(2, 2),
                                      torch.nn.Linear(2, 2)) for _ in range(2))
    state = ff.randomised(net, fresh.state_dict(), 0.5)  # one of two
    assert torch.equal(state["4.weight"], net[4].weight)
    assert torch.equal(state["5.weight"], fresh[5].weight)
    head = ff.randomised(net, fresh.state_dict(), 0.0)  # never none
    assert torch.equal(head["4.weight"], net[4].weight)
    assert torch.equal(head["5.weight"], fresh[5].weight)


def test_randomised_resnet_keeps_every_entry():
    net, fresh = models.build("resnet18", 4, seed=0), models.build("resnet18", 4, seed=1)
    state = ff.randomised(net, fresh.state_dict(), 0.0)
    changed = {k for k, v in state.items() if not torch.equal(v, net.state_dict()[k])}
    assert changed == {"fc.weight"}  # its bias is zero in both


def test_rank_correlation():
    a = np.arange(12.0).reshape(3, 4)
    assert ff.rank_correlation(a, a**3) == pytest.approx(1)
    assert ff.rank_correlation(a, -a) == pytest.approx(1)  # magnitudes
    assert ff.rank_correlation(a, a.max() - a) == pytest.approx(-1)
    assert ff.rank_correlation(a, np.zeros((3, 4))) is None  # shows nothing, so tells nothing
    assert ff.rank_correlation(np.ones((3, 4)), a) is None


def test_a_map_is_flat_up_to_the_rounding_of_float32():
    values = np.full((7, 7), 0.5, np.float32)
    assert ff.is_flat(values) and ff.is_flat(np.zeros((7, 7)))
    values[0, 0] += 1e-6  # as interpolation leaves it
    assert ff.is_flat(values) and ff.rank_correlation(np.eye(7), values) is None
    assert ff.rank_correlation(values, np.eye(7)) is None
    values[0, 0] += 1e-4
    assert not ff.is_flat(values) and ff.is_flat(-np.ones((2, 2)))


def test_jaccard_of_the_top_superpixels():
    a = np.array([9, 8, 7, 0, 0, 0.0])
    b = np.array([9, 8, 0, 7, 0, 0.0])
    assert ff.jaccard([a, a], top=3) == 1
    assert ff.jaccard([a, b], top=3) == pytest.approx(2 / 4)
    assert ff.jaccard([a, a, b], top=3) == pytest.approx((1 + 0.5 + 0.5) / 3)
    tens = np.arange(10.0)  # by default five: {5..9} and {0..4}; {5..9} and {4..8}
    assert ff.jaccard([tens, -tens]) == 0
    assert ff.jaccard([tens, np.where(tens == 9, -1, tens)]) == pytest.approx(4 / 6)


def test_shares_inside_a_region():
    values = np.zeros((10, 20))
    values[9, 19], values[0, 0] = -3, 1
    corner = ff.rectangle((10, 20), (0.7, 0.9, 1.0, 1.0))
    assert corner.sum() == 1 * 6 and corner[9, 14:].all()
    assert ff.share_inside(values, corner) == 0.75
    assert ff.share_inside(np.zeros((10, 20)), corner) is None
    assert ff.rectangle((10, 20), (0, 0, 1, 1)).all()
    edges = ff.rectangle((10, 10), (0.05, 0.05, 0.95, 0.95))  # first and last pixel's centre
    assert edges[:9, :9].all() and edges.sum() == 81


def test_a_rectangle_holds_pixels_whose_centres_are_on_its_left_or_upper_edge():
    """Of 2 × 2 pixels the centres are at 1/4 and 3/4; the other edges are outside."""
    assert ff.rectangle((2, 2), (0.25, 0.25, 0.75, 0.75)).tolist() == [[True, False], [False] * 2]
    assert ff.rectangle((2, 2), (0.3, 0.25, 1, 1)).tolist() == [[False, True]] * 2
    assert ff.rectangle((2, 2), (0.25, 0.3, 1, 1)).tolist() == [[False] * 2, [True] * 2]
    assert ff.rectangle((2, 2), (0, 0, 0.5, 1)).tolist() == [[True, False]] * 2
    assert ff.rectangle((2, 2), (0, 0, 1, 0.5)).tolist() == [[True] * 2, [False] * 2]


def test_intervals_of_means_are_students():
    """By hand: 1 and 3 have the standard error 1, and t(0.975, 1 degree of freedom) = 12.7062."""
    found = ff.mean_interval([1.0, None, 3.0])
    assert (found["n"], found["value"]) == (2, 2.0)
    assert found["high"] - 2 == 2 - found["low"] == pytest.approx(12.7062, abs=1e-4)
    three = ff.mean_interval([1.0, 2.0, 3.0])  # t(0.975, 2) = 4.3027
    assert three["high"] == pytest.approx(2 + 4.3027 / 3**0.5, abs=1e-4)
    assert ff.mean_interval([None, 0.25]) == {"n": 1, "value": 0.25, "low": None, "high": None}
    assert ff.mean_interval([None]) == {"n": 0, "value": None, "low": None, "high": None}


def test_the_background_is_the_brightest_quarter():
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    pixels[:, 1] = 200
    bright = interventions.background(pixels).tolist()
    assert bright == [[False] * 4, [True] * 4, [False] * 4, [False] * 4]
