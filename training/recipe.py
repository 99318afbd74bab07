"""The flags of local training (the paper's Table 3 and section 3.4), and the recipe they give."""

from checks import InputError, integer, number

import argparse
from dataclasses import fields

import torch

import data
import models
from dataset.augment import Augmentation
from fedavg import Recipe

# What the demonstration on drawn smears sets where --data is not given; a flag still overrides it.
DEMONSTRATION = {"model": "resnet18", "weights": "none", "image_size": 40, "batch_size": 16,
                 "lr": 1e-3, "plateau": 1}
AUGMENTATIONS = {"paper": Augmentation(), "translate": Augmentation(translation=0.1), "none": None}
# On the CPU, oneDNN leaves part of a bf16 weight gradient unwritten where the input of a
# convolution is smaller than its stride (torch 2.14.1). Networks of stride 32 get there at 16.
TOO_SMALL_FOR_BF16 = 16


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of local training, shared by both trainers."""
    add = parser.add_argument_group("local training").add_argument
    add("--batch-size", type=integer(1), default=32, help="images a step (default 32)")
    add("--optimizer", choices=("adamw", "adam", "sgd"), default="adamw",
        help="default adamw; sgd has momentum 0.9")
    add("--lr", type=number(0, open_low=True), default=1e-4,
        help="learning rate (default 1e-4; section 3.4 says 1e-3 for Adam)")
    add("--weight-decay", type=number(0), default=1e-4, help="default 1e-4")
    add("--clip", type=number(0), default=1.0,
        help="largest global norm of the gradient, 0 = no clipping (default 1)")
    add("--class-weights", choices=("inverse", "none"), default="inverse", help="w_c of eq. 3")
    add("--label-smoothing", type=number(0, 1), default=0.0, help="share (default 0)")
    add("--sampler", choices=data.SAMPLERS, default="shuffle", help="how an epoch draws images")
    add("--expand", type=integer(1), default=1, help="an epoch draws this times n images")
    add("--augment", choices=AUGMENTATIONS, default="paper", help="paper: Table 2; translate: with "
        "shifts by up to 10 %% of the side as well (Table 3); none: images as they are")
    add("--plateau", type=integer(0), default=5,
        help="the rate is divided by 5 after more validations without a better one; 0 = never")
    add("--early-stop", type=integer(0), default=10,
        help="stop after so many validations without a better one; 0 = never")
    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=integer(0), default=0, help="of everything but split and partition")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="auto: bf16 where the device computes it natively, else fp16 on CUDA, else off; also "
        f"off on the CPU for images of up to {TOO_SMALL_FOR_BF16} pixels")


def make_recipe(args: argparse.Namespace, device: torch.device) -> Recipe:
    """The recipe that the flags describe, precision resolved for `device`; its class weights are
    filled in later. InputError where `--amp bf16` has wrong gradients; `auto` is float32 there."""
    given = {f.name: getattr(args, f.name) for f in fields(Recipe) if hasattr(args, f.name)}
    dtype = models.pick_precision(args.amp, device)
    if dtype == torch.bfloat16 and device.type == "cpu" and args.image_size <= TOO_SMALL_FOR_BF16:
        if args.amp == "bf16":
            raise InputError(f"--amp bf16 needs images over {TOO_SMALL_FOR_BF16} pixels on the CPU")
        dtype = None
    return Recipe(**given | {"class_weights": None, "amp_dtype": dtype,
                             "augmentation": AUGMENTATIONS[args.augment]})
