"""Networks: build, freeze, initialise, save and load; which of their entries are BatchNorm's."""

from checks import InputError

import argparse
import copy
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch
import torchvision
from torch import Tensor, nn

State = dict[str, Tensor]
BATCHNORM = nn.modules.batchnorm._BatchNorm  # found by isinstance: names differ between networks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the network, shared by every script that builds one."""
    add = parser.add_argument_group("model").add_argument
    add("--model", default="resnet50", help="torchvision classifier (default resnet50)")
    add("--weights", default="imagenet", metavar="imagenet|none|PATH",
        help="start from torchvision's ImageNet weights, random ones, or a file (default imagenet)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    add("--train-from", metavar="MODULE", help="freeze all that comes before, e.g. layer4 or fc")


def head_name(model: nn.Module) -> str:
    """Name of the last linear layer, the head; InputError where the network ends otherwise."""
    leaves = [(name, m) for name, m in model.named_modules()
              if not list(m.children()) and not isinstance(m, (nn.Dropout, nn.Identity))]
    name, last = leaves[-1]
    if getattr(model, "aux_logits", False):
        raise InputError(f"{type(model).__name__} has auxiliary classifiers: not supported")
    if not isinstance(last, nn.Linear):
        raise InputError(f"{type(model).__name__} does not end in one linear layer")
    return name


def build(name: str, num_classes: int, weights: str = "none", seed: int = 0,
          classes: list[str] | None = None) -> nn.Module:
    """A torchvision classifier with a new head of `num_classes`, channels_last, in train mode.

    The head is one linear layer, Xavier-uniform with zero bias (section 3.3). Everything random
    comes from `seed`; the global random state is left as it was. weights: "none", "imagenet"
    (torchvision's IMAGENET1K_V1, downloaded once to torch's hub cache) or the path of a state dict
    or of a `model.pt`; a head in it that does not fit `classes` is dropped: one line says so."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(f"unknown model {name!r}; torchvision has resnet50, vgg16, "
                         "efficientnet_b0, mobilenet_v2, resnet18, ...")
    state = {} if weights == "none" else load_weights(name, weights, num_classes, classes)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's, of networks refused below
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name, weights=None)
        head = head_name(model)
        new = nn.Linear(model.get_submodule(head).in_features, num_classes)
        nn.init.xavier_uniform_(new.weight)
        nn.init.zeros_(new.bias)
        model.set_submodule(head, new)
    if state:
        load_matching(model, state, head, weights)
    return model.to(memory_format=torch.channels_last)


def load_weights(name: str, weights: str, num_classes: int, classes: list[str] | None) -> State:
    """The state dict that `--weights` names; from our own model.pt, its state."""
    if weights == "imagenet":
        try:
            entry = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
            return entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except KeyError:
            raise InputError(f"torchvision has no ImageNet weights for {name}") from None
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise InputError(f"ImageNet weights of {name} could not be had ({error}); pass a file "
                             "with --weights PATH, or --weights none for random ones") from None
    content = read_file(weights)
    if not isinstance(content.get("state"), dict):
        return content
    if content.get("local_bn"):
        raise InputError(f"--weights {weights}: made with --bn local, every client has its own")
    if content.get("model") != name:
        raise InputError(f"--weights {weights}: holds {content.get('model')}, not {name}")
    state = dict(content["state"])
    if classes is not None and content.get("classes") != list(classes):
        print(f"{weights}: its classes differ, head dropped")
        state = {k: v for k, v in state.items() if k not in content.get("head", ())}
    return state


def read_file(path: str | Path) -> dict:
    """A dictionary from a .pt file, tensors and plain values only: no code in it is ever run."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the pickle protocol
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path}: refused, it holds more than tensors and plain values "
                         "(code is never loaded) or is damaged") from None
    except Exception as error:  # noqa: BLE001 - torch's reader raises all sorts on damaged files
        reason = str(error).partition("\n")[0] or "it is too short"
        raise InputError(f"{path}: truncated or no PyTorch file ({reason})") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: holds no state dict")
    return content


def load_matching(model: nn.Module, state: State, head: str, source: str) -> None:
    """Load `state` into `model` in place. The head may be absent or of another size; the classifier
    that it is the last layer of (VGG's three) may be absent as a whole, and one line says so."""
    own = model.state_dict()
    head_keys = {f"{head}.weight", f"{head}.bias"}
    if any(k in state and getattr(state[k], "shape", None) != own[k].shape for k in head_keys):
        rows = len(state[f"{head}.weight"]) if f"{head}.weight" in state else "?"
        print(f"{source}: head of {rows} classes dropped, a new one of {len(own[f'{head}.bias'])}")
        state = {k: v for k, v in state.items() if k not in head_keys}
    classifier = {key for key in own if key.startswith(head.partition(".")[0] + ".")}
    if head_keys < classifier and not classifier & set(state):
        print(f"{source}: has no layer of the classifier, which begins at random values")
        head_keys = classifier
    # torchvision files from before 2018 lack the BatchNorm counters; nothing else may be absent
    missing = sorted(key for key in set(own) - set(state) - head_keys
                     if not key.endswith("num_batches_tracked"))
    extra = sorted(set(state) - set(own))
    if missing or extra:
        raise InputError(f"{source}: another architecture: {len(missing)} entries missing, "
                         f"{len(extra)} unknown, first {(missing + extra)[0]}")
    for key, value in state.items():
        kind = own[key].shape, own[key].is_floating_point()
        if not isinstance(value, Tensor) or (value.shape, value.is_floating_point()) != kind:
            raise InputError(f"{source}: wrong shape or type of {key}: "
                             f"{getattr(value, 'shape', value)}, expected {tuple(own[key].shape)}")
    model.load_state_dict(state, strict=False)


def moved(state: State, device: torch.device | str) -> State:
    """A copy of `state` on `device`, sharing no memory with it."""
    return {key: value.to(device, copy=True) for key, value in state.items()}


def pack(state: State) -> list[Tensor]:
    """One flat copy on the CPU for each dtype, in the order in which dtypes first occur."""
    dtypes = dict.fromkeys(value.dtype for value in state.values())
    return [torch.cat([v.detach().reshape(-1).cpu() for v in state.values() if v.dtype == dtype])
            for dtype in dtypes]


def unpack(flat: list[Tensor], like: State) -> State:
    """The state that `pack` packed, in the memory layout of `like`: torch.save writes the layout
    too, so with another one equal values would give different files."""
    rest, state = {tensor.dtype: tensor for tensor in flat}, {}
    for key, value in like.items():
        part, rest[value.dtype] = rest[value.dtype].tensor_split([value.numel()])
        state[key] = torch.empty_like(value).copy_(part.view(value.shape))
    return state


def is_finite(state: State) -> bool:
    """Whether no entry holds a NaN or an infinity: its sum in float64 would be one too."""
    sums = [value.sum(dtype=torch.float64) for value in state.values()]
    return bool(torch.stack(sums).isfinite().all())


def batchnorm_keys(model: nn.Module) -> list[str]:
    """State entries (affine, running statistics, counters) that belong to BatchNorm layers."""
    return [f"{name}.{key}" for name, module in model.named_modules()
            if isinstance(module, BATCHNORM) for key in module.state_dict()]


def freeze(model: nn.Module, train_from: str | None = None, batchnorm: bool = False) -> None:
    """Switch off gradients before module `train_from`, and of BatchNorm if asked, in place. Frozen
    BatchNorm also needs `train_mode`: its running statistics would move without a gradient."""
    if train_from is not None:
        names = [name for name, _ in model.named_parameters()]
        first = next((i for i, name in enumerate(names) if name.startswith(train_from + ".")), None)
        if first is None:
            raise InputError(f"--train-from {train_from}: no such module with parameters; this "
                             f"network has {', '.join(dict(model.named_children()))}")
        for name, parameter in list(model.named_parameters())[:first]:
            parameter.requires_grad_(False)
    if batchnorm:
        for module in model.modules():
            if isinstance(module, BATCHNORM):
                module.requires_grad_(False)


def train_mode(model: nn.Module) -> None:
    """`model.train()`, except that frozen BatchNorm layers stay in eval mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, BATCHNORM) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


def needs_batch(model: nn.Module) -> bool:
    """Whether a BatchNorm layer will use the statistics of a batch, which one image cannot give."""
    return any(isinstance(m, BATCHNORM) and any(p.requires_grad for p in m.parameters())
               for m in model.modules())


def pick_device(name: str) -> torch.device:
    """`--device` as a torch device. Raises InputError for one that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu")
                              if name == "auto" else name)
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError, TypeError):
        raise InputError(f"--device {name}: not there, or without float64") from None
    torch.backends.cudnn.deterministic = True  # a repeated run on CUDA takes the same kernels
    torch.backends.cudnn.allow_tf32 = False  # evaluation is float32, also on CUDA
    return torch.empty(0, device=device).device  # with its number, as tensors name it


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype of `--amp`; None is plain float32. For training: `recipe.make_recipe`."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":  # emulated bf16 would be ten times slower than float32
        native = any(getattr(torch.cpu, f"_is_{f}_supported", lambda: False)()
                     for f in ("avx512_bf16", "amx_tile"))
        amp = "bf16" if device.type == "cpu" and native else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


@torch.no_grad()
def batchnorm_moments(model: nn.Module, state: State, batches: Iterable[Tensor]) -> State:
    """Mean and mean square of the input of each BatchNorm layer under `state`, float64, over all
    images of `batches`: a client's own training images, unaugmented and in mixed order. They have
    the keys of running_mean and running_var."""
    model, sums, n = copy.deepcopy(model).eval(), {}, 0
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BATCHNORM)}
    model.load_state_dict(state)
    for layer in layers.values():
        layer.momentum = 1.0  # the running statistics are then those of the latest batch
        layer.train()
    for batch in batches:
        model(batch)
        n += len(batch)
        for name, layer in layers.items():
            mean = layer.running_mean.double()
            square = layer.running_var.double() + mean.square()
            for key, value in ((f"{name}.running_mean", mean), (f"{name}.running_var", square)):
                sums[key] = sums.get(key, 0) + len(batch) * value
    return {key: value / n for key, value in sums.items()}


def pooled_batchnorm(state: State, moments: State) -> State:
    """The running statistics to replace in `state`: μ = Σ w_k μ_k, σ² = Σ w_k (σ_k² + μ_k²) - μ².
    moments: the weighted average over clients of `batchnorm_moments`."""
    pooled = {}
    for key, mean in moments.items():
        if key.endswith("running_mean"):
            variance = key.removesuffix("mean") + "var"
            pooled[key] = mean.to(state[key].dtype)
            pooled[variance] = (moments[variance] - mean.square()).to(state[variance].dtype)
    return pooled


def check_size(model: nn.Module, size: int, batch_size: int = 2) -> None:
    """Raise InputError where the network cannot take, or not train on, images of size × size.
    Shapes alone are computed, on a copy: no size needs memory."""
    model, image = copy.deepcopy(model).to("meta"), torch.zeros(1, 3, size, size, device="meta")
    name = type(model).__name__
    try:
        with torch.no_grad():
            model.eval()(image)
            if batch_size == 1 and needs_batch(model):
                train_mode(model)
                model(image)
    except ValueError:  # of BatchNorm in training: one value a channel has no variance
        raise InputError(f"--batch-size 1 does not suit BatchNorm in {name} at {size} pixels: "
                         "larger batches, or larger images") from None
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--image-size {size} does not suit {name}: {reason}") from None


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Fill a file by `write` so that a kill or an error, such as a full disk, leaves the old file
    or the new one, whole: it is written beside the old one, flushed to disk, and renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # a full disk, behind an error of torch's writer
            raise error.__context__ from None
        raise


def save(content: dict, path: Path) -> None:
    """Write a .pt file, whole or not at all."""
    write_whole(path, lambda file: torch.save(_interned(content), file))


def _interned(content: object) -> object:
    """The content with equal keys as one object. Pickle writes an object that it has seen before in
    a shorter way, so that otherwise the bytes would depend on where a key came from."""
    if not isinstance(content, dict):
        return content
    return {sys.intern(key) if isinstance(key, str) else key: _interned(value)
            for key, value in content.items()}
