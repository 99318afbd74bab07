"""The flags of local training (the paper's Table 3 and section 3.4), and the recipe they give."""

import argparse
from dataclasses import fields

import torch

import data
import models
from augment import Augmentation
from checks import InputError, integer, number
from fedavg import Recipe

# In bf16 on the CPU, the weight gradient (oneDNN, torch 2.14.1) of a convolution whose input is
# smaller than its stride holds whatever lay in memory; networks of stride 32 get there at 16.
TOO_SMALL_FOR_BF16 = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of local training, shared by both trainers."""
    add = parser.add_argument_group("local training").add_argument
    add("--batch-size", type=integer(1), default=32, help="images a step (default 32)")
    add("--optimizer", choices=("adamw", "adam", "sgd"), default="adamw")
    add("--lr", type=number(0, open_low=True), default=1e-4, help="default 1e-4; Adam's text: 1e-3")
    add("--weight-decay", type=number(0), default=1e-4)
    add("--momentum", type=number(0, 1), default=0.9, help="of --optimizer sgd")
    add("--clip", type=number(0), default=1.0, help="global gradient norm, 0 = off (default 1)")
    add("--class-weights", choices=("inverse", "none"), default="inverse", help="of eq. 3")
    add("--label-smoothing", type=number(0, 1), default=0.0)
    add("--sampler", choices=data.SAMPLERS, default="shuffle")
    add("--expand", type=integer(1), default=1, help="draws of each image per epoch")
    add("--translation", type=number(0, 1), default=0.0, help="share of the side (Table 3: 0.1)")
    add("--no-augment", action="store_true", help="train on the images as they are")
    add("--plateau", type=integer(0), default=5, help="patience of the rate's cut by 5; 0 = off")
    add("--early-stop", type=integer(0), default=10, help="patience; 0 = off (default 10)")
    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=integer(0), default=0, help="of everything but split and partition")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="auto: bf16 where the device computes it, on CUDA else fp16, else off; on the CPU off "
        f"up to {TOO_SMALL_FOR_BF16} pixels")


def make_recipe(args: argparse.Namespace, device: torch.device) -> Recipe:
    """The recipe that the flags describe, precision resolved for `device`. Raises InputError for
    `--amp bf16` where its gradients would be garbage; `auto` is float32 there."""
    given = {f.name: getattr(args, f.name) for f in fields(Recipe) if hasattr(args, f.name)}
    ranges = None if args.no_augment else Augmentation(translation=args.translation)
    dtype = models.pick_precision(args.amp, device)
    if dtype == torch.bfloat16 and device.type == "cpu" and args.image_size <= TOO_SMALL_FOR_BF16:
        if args.amp == "bf16":
            raise InputError(f"--amp bf16 needs images over {TOO_SMALL_FOR_BF16} pixels on the CPU")
        dtype = None
    return Recipe(**given, augmentation=ranges, amp_dtype=dtype)
