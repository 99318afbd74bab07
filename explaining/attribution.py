"""Which pixels a network's answer depends on: input gradients, Grad-CAM, LIME.

Every function takes one image and one class and returns a float32 map [H, W]; the network must be
in eval mode and is left as it was: no gradient kept, no hook left behind.
"""

from checks import InputError

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from lime.lime_image import LimeImageExplainer
from lime.wrappers.scikit_image import SegmentationAlgorithm
from torch import Tensor, nn

Classify = Callable[[Tensor], np.ndarray]  # uint8 [n, 3, H, W] → probabilities [n, C]
CHUNK = 16  # images of one backward pass


def input_gradient(model: nn.Module, batch: Tensor, target: int) -> Tensor:
    """∂ logit / ∂ input, [n, 3, H, W]; batch: normalised [n, 3, H, W]."""
    batch = batch.detach().requires_grad_()
    score = model(batch)[:, target].sum()
    return torch.autograd.grad(score, batch)[0]


def saliency(model: nn.Module, image: Tensor, target: int) -> np.ndarray:
    """Absolute input gradient, largest over channels (Simonyan et al. 2014). image: [1, 3, H, W]"""
    return input_gradient(model, image, target)[0].abs().amax(0).cpu().numpy()


def integrated_gradients(model: nn.Module, image: Tensor, target: int,
                         steps: int = 32) -> np.ndarray:
    """Signed, summed over channels (Sundararajan et al. 2017), along the straight line from the
    ImageNet mean colour (0 after normalisation), midpoint rule: its sum is nearly the logit of the
    image less that of the baseline."""
    positions = (torch.arange(steps, device=image.device) + 0.5) / steps
    total = torch.zeros_like(image)
    for part in positions.split(CHUNK):
        total += input_gradient(model, image * part.view(-1, 1, 1, 1), target).sum(0, keepdim=True)
    return (image * total / steps)[0].sum(0).detach().cpu().numpy()


def find_layer(model: nn.Module, name: str | None = None) -> nn.Module:
    """The module of that name, by default the last convolution. Raises InputError for none."""
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            raise InputError(f"--layer {name}: no such module; for example "
                             f"{', '.join(n for n, _ in model.named_children())}")
        return modules[name]
    convolutions = [m for m in modules.values() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        raise InputError("the network has no convolution: name a --layer")
    return convolutions[-1]


def grad_cam(model: nn.Module, image: Tensor, target: int, layer: nn.Module) -> np.ndarray:
    """ReLU(Σ_k α_k A_k), α_k the mean gradient of channel k (Selvaraju et al. 2017, eq. 1 and 2),
    resized to the image. Raises InputError for a layer whose output is no feature map."""
    kept = []

    def keep(_module: nn.Module, _inputs: tuple, output: object) -> object:
        kept.append(output)
        return output.clone() if isinstance(output, Tensor) else output  # others may work in place
    handle = layer.register_forward_hook(keep)
    try:
        score = model(image.detach().requires_grad_())[0, target]
        if not kept or not isinstance(kept[0], Tensor) or kept[0].dim() != 4 or (
                kept[0].shape[2] != kept[0].shape[3]):  # of square images: channels stand last
            raise InputError("--layer: its output is no feature map [n, channels, h, w]")
        gradient, = torch.autograd.grad(score, kept[0])
    finally:
        handle.remove()
    weights = gradient.mean((2, 3), keepdim=True)
    cam = F.relu((weights * kept[0].detach()).sum(1, keepdim=True))
    cam = F.interpolate(cam, image.shape[2:], mode="bilinear", align_corners=False)
    return cam[0, 0].cpu().numpy()


def lime(classify: Classify, pixels: Tensor, targets: list[int], samples: int,
         seed: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Superpixels int [H, W] and per class their weights [S] (Ribeiro et al. 2016; lime package).
    pixels: uint8 [3, H, W]. Superpixels are the package's default at 224 pixels (quickshift, its
    kernel in proportion to the side), the same for every seed; what is perturbed comes from `seed`.
    The package's own loop, which copies and masks one image at a time, is replaced by the same
    draws masked a batch at a time."""
    explainer = LimeImageExplainer(random_state=seed)

    def data_labels(image: np.ndarray, fudged: np.ndarray, segments: np.ndarray, _classify: object,
                    num_samples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = explainer.random_state.randint(0, 2, (num_samples, segments.max() + 1))
        drawn[0] = 1  # the image itself
        on, off = (torch.from_numpy(x).permute(2, 0, 1) for x in (image, fudged))
        where = torch.from_numpy(segments)
        labels = [classify(torch.where(rows[:, where].unsqueeze(1), on, off))
                  for rows in torch.from_numpy(drawn).bool().split(batch_size)]
        return drawn, np.concatenate(labels)
    explainer.data_labels = data_labels
    explanation = explainer.explain_instance(
        pixels.permute(1, 2, 0).contiguous().numpy(), None, labels=targets, top_labels=None,
        num_samples=samples, batch_size=64, random_seed=0, segmentation_fn=SegmentationAlgorithm(
            "quickshift", kernel_size=max(1.0, 4 * pixels.shape[-1] / 224), max_dist=200,
            ratio=0.2, random_seed=0))
    weights = {target: np.array([weight for _, weight in sorted(explanation.local_exp[target])])
               for target in targets}  # in the order of the superpixels
    return explanation.segments, weights
