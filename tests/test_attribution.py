"""Maps on networks whose answer is known by hand, and what must hold on any network."""

from checks import InputError

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import BNNet, clone, equal
from lime.lime_image import LimeImageExplainer
from lime.wrappers.scikit_image import SegmentationAlgorithm
from torch import nn

import models
from explaining import attribution


class Linear(nn.Module):
    """logits = W · pixels, so that every gradient is known."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


def image(size=8, seed=0):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_saliency_of_a_linear_network_is_its_weight():
    weight = torch.randn(2, 3 * 16, generator=torch.Generator().manual_seed(0))
    net = Linear(weight)
    for target in (0, 1):
        expected = weight[target].detach().view(3, 4, 4).abs().amax(0)
        assert np.array_equal(attribution.saliency(net, image(4), target), expected.numpy())
    assert net.weight.grad is None


def test_saliency_equals_finite_differences():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 2)).double()
    x = image().double()
    found = attribution.input_gradient(net, x, 1)[0]
    for c, i, j in ((0, 0, 0), (1, 3, 5), (2, 7, 7)):
        step = torch.zeros_like(x)
        step[0, c, i, j] = 1e-5
        with torch.no_grad():
            slope = (net(x + step)[0, 1] - net(x - step)[0, 1]) / 2e-5
        assert found[c, i, j].item() == pytest.approx(slope.item(), abs=1e-8)


def test_integrated_gradients_are_complete():
    """Their sum is the logit less that of the baseline: exactly for a linear network, nearly for
    any other."""
    weight = torch.randn(2, 3 * 64, generator=torch.Generator().manual_seed(0))
    found = attribution.integrated_gradients(Linear(weight), image(), 0, steps=3)
    expected = (weight[0] * image().flatten()).view(3, 8, 8).sum(0)
    assert np.allclose(found, expected.detach().numpy(), atol=1e-5)
    net = BNNet().eval()
    with torch.no_grad():
        rise = (net(image(16))[0] - net(torch.zeros(1, 3, 16, 16))[0]).tolist()
    for target in range(3):
        total = attribution.integrated_gradients(net, image(16), target, steps=400).sum()
        assert total == pytest.approx(rise[target], abs=2e-3)
    coarse, fine = (attribution.integrated_gradients(net, image(16), 1, steps=s) for s in (40, 41))
    assert np.allclose(coarse, fine, atol=5e-3)  # 16 + 16 + 8 and 16 + 16 + 9: no step lost


class Power(nn.Module):
    """logit = Σ x^n, the same for every class."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        return (x**self.n).flatten(1).sum(1, keepdim=True)


def test_integrated_gradients_take_the_midpoints_of_so_many_steps():
    """∂ Σ x² = 2x is linear along the path, so that one midpoint is exact: x². Of x³ the rule with
    n steps gives x³ (1 - 1 / 4n²); 32 of them by default."""
    x = image().double()
    found = attribution.integrated_gradients(Power(2), x, 0, steps=1)
    assert np.allclose(found, x.square()[0].sum(0).numpy(), rtol=1e-12)
    cubes = x.pow(3)[0].sum(0).numpy()
    for n, steps in ((2, {"steps": 2}), (32, {})):
        found = attribution.integrated_gradients(Power(3), x, 0, **steps)
        assert np.allclose(found, cubes * (1 - 1 / (4 * n * n)), rtol=1e-6)


class Cam(nn.Module):
    """One 1×1 convolution with two channels, mean pooling, a linear head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.head = nn.Linear(2, 2, bias=False)
        self.conv.weight.data = torch.tensor([[1., 0, 0], [0, 1, 0]]).view(2, 3, 1, 1)
        self.head.weight.data = torch.tensor([[3., -1], [-2, 4]])

    def forward(self, x):
        return self.head(F.relu(self.conv(x), inplace=True).mean((2, 3)))


def test_grad_cam_by_hand():
    """A_1 = red, A_2 = green; α_k = w_k / n · [A_k > 0] averaged over the n pixels."""
    net, x = Cam().eval(), image(4)
    red, green = x[0, 0], x[0, 1]
    n = 16
    for target, (w1, w2) in enumerate(((3, -1), (-2, 4))):
        a1, a2 = (w / n * (a > 0).float().mean() for w, a in ((w1, red), (w2, green)))
        expected = F.relu(a1 * red + a2 * green)
        found = attribution.grad_cam(net, x, target, net.conv)
        assert np.allclose(found, expected.numpy(), atol=1e-6)
    assert not np.allclose(attribution.grad_cam(net, x, 0, net.conv), found)


def test_grad_cam_of_a_small_map_is_drawn_out_between_the_centres_of_its_cells():
    """Two cells 0 and 1 over four pixels: 0, 1/4, 3/4, 1, along either side."""
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.AvgPool2d(2)

        def forward(self, x):
            return 4 * self.pool(x).mean((2, 3))[:, :1]
    net, line = Pooled(), torch.tensor([0.0, 0, 1, 1])
    for x in (line.expand(4, 4), line[:, None].expand(4, 4)):
        found = attribution.grad_cam(net, torch.stack([x, 0 * x, 0 * x])[None], 0, net.pool)
        smooth = torch.tensor([0, 0.25, 0.75, 1])
        expected = smooth.expand(4, 4) if x[0, 3] != x[0, 0] else smooth[:, None].expand(4, 4)
        assert np.allclose(found, expected.numpy(), atol=1e-6)


def test_a_layer_without_a_feature_map_is_refused():
    """One that the image never reaches, one with several outputs, one with no sides, and one with
    its channels last."""
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.pair, self.flat = nn.Conv2d(3, 1, 1), Pair(), nn.Flatten()
            self.last = Last()

        def forward(self, x):
            return self.flat(self.last(self.pair(x)[0]))

    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    class Pair(nn.Module):
        def forward(self, x):
            return x * 2, x
    net = Odd()
    for layer in (net.idle, net.pair, net.flat, net.last):
        with pytest.raises(InputError, match="no feature map"):
            attribution.grad_cam(net, image(4), 0, layer)
    assert hooks(net) == 0


def test_the_last_convolution_by_default_and_any_by_name():
    net = models.build("resnet18", 4).eval()
    assert attribution.find_layer(net) is net.layer4[1].conv2
    assert attribution.find_layer(net, "layer3") is net.layer3
    with pytest.raises(InputError, match="no such module; for example conv1, bn1"):
        attribution.find_layer(net, "layer9")
    with pytest.raises(InputError, match="no convolution"):
        attribution.find_layer(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no feature map"):
        attribution.grad_cam(net, image(32), 0, net.fc)
    assert hooks(net) == 0


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "efficientnet_b0", "mobilenet_v2"])
def test_networks_are_left_as_they_were(name):
    net = models.build(name, 4).eval()
    before, x = clone(net.state_dict()), image(32)
    modes = [m.training for m in net.modules()]
    maps = [attribution.saliency(net, x, 1), attribution.integrated_gradients(net, x, 1, 2),
            attribution.grad_cam(net, x, 1, attribution.find_layer(net))]
    for values in maps:
        assert values.shape == (32, 32) and values.dtype == np.float32 and np.isfinite(values).all()
    assert equal(before, net.state_dict()) and hooks(net) == 0
    assert modes == [m.training for m in net.modules()] and not any(modes)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    again = attribution.grad_cam(net, x, 1, attribution.find_layer(net))
    assert np.array_equal(maps[2], again)


# ---- LIME ---------------------------------------------------------------------------------------

def smear(size=24):
    pixels = np.random.default_rng(0).integers(0, 60, (size, size, 3), dtype=np.uint8)
    pixels[4:12, 4:12, 0] += 180
    pixels[14:20, 12:22, 1] += 180
    return torch.from_numpy(pixels).permute(2, 0, 1)


def classify(pixels):
    """Class 1 by the red of one corner alone."""
    red = pixels[:, 0, 4:12, 4:12].float().mean((1, 2)) / 255
    return torch.stack([1 - red, red], 1).numpy()


def test_lime_twice_is_one_mask_and_another_seed_another():
    first, second, third = (attribution.lime(classify, smear(), [1], 60, s) for s in (0, 0, 1))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1][1], second[1][1])
    assert np.array_equal(first[0], third[0]) and not np.array_equal(first[1][1], third[1][1])


def test_lime_finds_the_evidence_and_its_sign():
    segments, weights = attribution.lime(classify, smear(), [1, 0], 300, 0)
    owner = np.bincount(segments[4:12, 4:12].ravel()).argmax()
    assert weights[1].argmax() == owner and weights[0].argmin() == owner
    assert np.allclose(weights[0], -weights[1], atol=1e-6)
    assert len(weights[1]) == segments.max() + 1 > 3


def test_lime_is_the_packages_own_only_faster(monkeypatch):
    """The same draws, images and predictions as LimeImageExplainer's own loop."""
    batches = []

    def watched(pixels):
        batches.append(pixels.clone())
        return classify(pixels)
    segments, weights = attribution.lime(watched, smear(), [1], 70, 3)
    own = []

    def for_lime(images):
        own.append(torch.from_numpy(images).permute(0, 3, 1, 2))
        return classify(own[-1])
    explained = LimeImageExplainer(random_state=3).explain_instance(
        smear().permute(1, 2, 0).contiguous().numpy(), for_lime, labels=[1], top_labels=None,
        num_samples=70, random_seed=0, segmentation_fn=SegmentationAlgorithm(
            "quickshift", kernel_size=1.0, max_dist=200, ratio=0.2, random_seed=0))
    assert np.array_equal(segments, explained.segments)
    assert torch.equal(torch.cat(batches), torch.cat(own))
    assert dict(explained.local_exp[1]) == pytest.approx(dict(enumerate(weights[1])), abs=1e-9)


@pytest.mark.parametrize("side,kernel", [(224, 4), (112, 2), (336, 6), (56, 1), (28, 1)])
def test_superpixels_are_the_packages_default_with_its_kernel_in_proportion(monkeypatch, side,
                                                                            kernel):
    """LimeImageExplainer's own default: quickshift, kernel 4, distance 200, ratio 0.2."""
    asked = []

    def fake(*args, **kwargs):
        asked.append((args, kwargs))
        return lambda pixels: np.arange(pixels.shape[1])[None].repeat(2, 0) // (side // 2)
    monkeypatch.setattr(attribution, "SegmentationAlgorithm", fake)
    pixels = torch.zeros(3, 2, side, dtype=torch.uint8)
    segments, weights = attribution.lime(lambda p: np.ones((len(p), 2)), pixels, [0], 10, seed=5)
    assert asked == [(("quickshift",), {"kernel_size": kernel, "max_dist": 200, "ratio": 0.2,
                                        "random_seed": 0})]
    assert segments.shape == (2, side) and weights[0].tolist() == pytest.approx([0, 0])


def test_lime_prints_no_bar_of_its_own(capsys):
    attribution.lime(classify, smear(), [1], 30, 0)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_copies_are_not_needed_for_gradients():
    """A map does not depend on the maps before it."""
    net, x = BNNet().eval(), image(16)
    alone = attribution.integrated_gradients(copy.deepcopy(net), x, 2, 4)
    attribution.grad_cam(net, x, 0, net.conv)
    attribution.saliency(net, x, 1)
    assert np.array_equal(alone, attribution.integrated_gradients(net, x, 2, 4))
