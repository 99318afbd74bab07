"""The paper's Table 3 for any torchvision classifier.

    python -m reporting.architecture resnet50          # 23,516,228 parameters, four-class head
    python -m reporting.architecture resnet50 --train-from layer4
"""

from checks import guard, integer, make_parser

import torch
from torch import nn

import models


def table(model: nn.Module, size: int) -> list[tuple[str, str, int, int]]:
    """(module, output shape, parameters, trainable parameters) of each top-level module.
    Shapes alone are computed: `model` is left without its weights."""
    shapes: dict[nn.Module, tuple] = {}
    def keep(module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        shapes[module] = tuple(output.shape[1:])
    for module in model.children():
        module.register_forward_hook(keep)
    with torch.no_grad():
        model.eval().to("meta")(torch.zeros(1, 3, size, size, device="meta"))
    return [(name, str(shapes.get(module, "-")), sum(p.numel() for p in module.parameters()),
             sum(p.numel() for p in module.parameters() if p.requires_grad))
            for name, module in model.named_children()]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--classes", type=integer(2), default=4)
    parser.add_argument("--image-size", type=integer(8), default=224)
    parser.add_argument("--train-from", metavar="MODULE")
    args = parser.parse_args()
    model = models.build(args.model, args.classes)
    models.freeze(model, args.train_from)
    models.check_size(model, args.image_size)
    rows = table(model, args.image_size)
    parameters = list(model.parameters())  # a few networks hold some of their own, in no module
    total, trainable = (sum(p.numel() for p in some) for some in
                        (parameters, (p for p in parameters if p.requires_grad)))
    print(f"{'module':<14}{'output shape':<20}{'parameters':>14}{'trainable':>14}")
    for name, shape, parameters, free in [*rows, ("all", "", total, trainable)]:
        print(f"{name:<14}{shape:<20}{parameters:>14,}{free:>14,}")
    layers = sum(isinstance(m, models.BATCHNORM) for m in model.modules())
    print(f"head: {models.head_name(model)}; BatchNorm layers: {layers}; "
          f"state entries: {len(model.state_dict())}")


if __name__ == "__main__":
    guard(main)
