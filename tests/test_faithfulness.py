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
    assert ff.rank_correlation(a, np.zeros((3, 4))) == 0.0


def test_jaccard_of_the_top_superpixels():
    a = np.array([9, 8, 7, 0, 0, 0.0])
    b = np.array([9, 8, 0, 7, 0, 0.0])
    assert ff.jaccard([a, a], top=3) == 1
    assert ff.jaccard([a, b], top=3) == pytest.approx(2 / 4)
    assert ff.jaccard([a, a, b], top=3) == pytest.approx((1 + 0.5 + 0.5) / 3)


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


def test_the_background_is_the_brightest_quarter():
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    pixels[:, 1] = 200
    bright = interventions.background(pixels).tolist()
    assert bright == [[False] * 4, [True] * 4, [False] * 4, [False] * 4]
