"""The defaults are those that README, docs/readings.md and the paper's Table 3 name."""

import checks  # noqa: F401 - before torch

import inspect

import pytest

import fedavg
import models
import train_central
import train_federated
from auditing import duplicates, membership
from dataset import files, interventions, splits
from dataset.augment import Augmentation
from explaining import attribution, faithfulness
from reporting import baselines, inference, metrics, run_folder
from training import evaluation, recipe

TRAINING = {
    "amp": "auto", "augment": "paper", "batch_size": 32, "cache": None, "class_weights": "inverse",
    "clip": 1, "columns": None, "data": "DIR", "device": "auto", "early_stop": 10, "expand": 1,
    "image_size": 224, "inner_val": 0.1, "label_smoothing": 0, "lr": 1e-4, "model": "resnet50",
    "optimizer": "adamw", "out": None, "plateau": 5, "remove": [], "resume": None,
    "sampler": "shuffle", "seed": 0, "skip_bad": False, "skip_unlisted": False, "split": None,
    "split_seed": 42, "table": None, "train_from": None, "weight_decay": 1e-4,
    "weights": "imagenet"}
FEDERATED = TRAINING | {
    "alpha": 0.3, "bn": "average", "classes": None, "classes_per_client": 2, "clients": None,
    "folds": 1, "fraction": 1, "local_epochs": 5, "mu": 0, "partition": None, "rounds": 10,
    "site_data": None, "timeout": 1800}
CENTRAL = TRAINING | {"bn": "train", "epochs": 40, "folds": 5, "like": None, "local_only": False,
                      "period": 1}
SMEARS = {"model": "resnet18", "weights": "none", "image_size": 40, "batch_size": 16, "lr": 1e-3,
          "plateau": 1, "data": None}  # what the demonstration sets


def parsed(script, *argv):
    found = vars(run_folder.parse(script.__doc__, script.GROUPS, script.defaults, list(argv)))
    return {key: value for key, value in found.items() if key != "argv"}


@pytest.mark.parametrize(("script", "expected", "demonstration"), [
    (train_federated, FEDERATED, {}), (train_central, CENTRAL, {"epochs": 20, "early_stop": 5})],
    ids=["federated", "central"])
def test_flags_default_to_the_recipe_of_the_paper(script, expected, demonstration):
    assert parsed(script, "--data", "DIR") == expected
    assert parsed(script) == expected | SMEARS | demonstration


def test_augmentation_is_table_2_and_translation_table_3():
    paper = {"rotation": 15, "flip": 0.5, "translation": 0, "brightness": 0.2, "contrast": 0.2,
             "saturation": 0.2, "hue": 0.1}
    assert vars(Augmentation()) == vars(recipe.AUGMENTATIONS["paper"]) == paper
    assert vars(recipe.AUGMENTATIONS["translate"]) == paper | {"translation": 0.1}
    assert recipe.AUGMENTATIONS["none"] is None


def test_the_words_of_a_command_are_recorded_without_the_name_of_its_script(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_federated.py", "--data", "DIR"])
    args = run_folder.parse("", train_federated.GROUPS, train_federated.defaults, None)
    assert args.argv == ["--data", "DIR"] and args.data == "DIR"


@pytest.mark.parametrize(("function", "expected"), [
    (splits.make_folds, {"inner_val": 0.1}),
    (splits.partition, {"alpha": 0.3, "classes_per_client": 2}),
    (evaluation.plateau_lr, {"factor": 0.2, "patience": 5, "min_lr": 1e-6}),
    (fedavg.weighted_cross_entropy, {"label_smoothing": 0}),
    (models.build, {"seed": 0}), (models.freeze, {"batchnorm": False}),
    (attribution.integrated_gradients, {"steps": 32}),
    (faithfulness.random_area, {"orders": 4}), (faithfulness.jaccard, {"top": 5}),
    (membership.attack, {"seed": 0}), (membership.of_nobody, {"seed": 0}),
    (membership.sources, {"seed": 0}), (metrics.bootstrap, {"seed": 0})])
def test_functions_default_to_what_the_texts_say(function, expected):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in expected} == expected


def test_constants_are_those_that_the_texts_name():
    assert (metrics.BOOTSTRAP, metrics.BINS) == (1000, 15)
    assert (metrics.LEAST, metrics.LEAST_WRONG) == (30, 10)
    assert (splits.EMBARGO, baselines.MOST, inference.LIMIT) == (30, 10_000, 0.02)
    assert (duplicates.SIDE, duplicates.PEAK, duplicates.OVERLAP, duplicates.CORRELATION) == (
        64, 0.12, 0.3, 0.6)
    assert (faithfulness.GRID, faithfulness.PER_STEP) == (14, 14)
    assert (interventions.MARGIN, interventions.CORNER) == (0.1, (0.7, 0.85, 1, 1))
    assert (membership.POWER, membership.PERMUTATIONS) == (2.80, 1000)
    assert files.CLASSES == ("Benign", "Early", "Pre", "Pro")
