"""Selection, schedule and stopping as functions of the history, and the tally that they rest on."""

import checks  # noqa: F401 - before torch

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import plain_net, toy_images

import data
from training import evaluation


def losses(*values):
    return [{"val_loss": value} for value in values]


def test_validation_is_a_mean_over_images():
    for tally, loss, accuracy in (([4, 3, 2.0], 0.5, 0.75), ([0, 0, 0.0], None, None)):
        assert evaluation.make_record({"round": 1}, tally, {"images": 6}, 3.0) == {
            "round": 1, "val_loss": loss, "val_accuracy": accuracy, "images": 6, "seconds": 3.0,
            "images_per_second": 2}


def test_a_tally_is_the_number_the_hits_and_the_sum_of_losses():
    images, model = toy_images(9), plain_net()
    split = {"val": np.array([0, 1, 3, 4, 5]), "test": np.array([2])}
    with torch.no_grad():
        logits = model.eval()(data.eval_batch(images, torch.arange(9), torch.device("cpu")))
    p = logits.double().softmax(1)[split["val"], images.labels[split["val"]]]
    n, hits, loss = evaluation.Evaluation(model, images, split).tally("val", model.state_dict())
    assert (n, hits) == (5, int((logits.argmax(1) == images.labels)[split["val"]].sum()))
    assert hits == 4  # and one that is wrong, so that a hit differs from a miss
    assert loss == pytest.approx(float(-p.log().sum()), rel=1e-6)


def test_the_best_round_has_the_lowest_defined_loss():
    assert evaluation.best_index(losses(3, 1, 2)) == 1
    assert evaluation.best_index(losses(3, 1, 1)) == 1  # the earliest of equals
    assert evaluation.best_index(losses(None, 5, None)) == 1
    assert evaluation.best_index(losses(None, None)) == 1  # where none is defined, the last
    assert evaluation.val_losses(losses(1, None)) == [1, math.inf]


@pytest.mark.parametrize(("history", "patience", "stale"), [
    ((), 1, False), ((1,), 1, False), ((1, 2), 1, True), ((1, 2), 2, False),
    ((1, 2, None), 2, True), ((2, 1, 2), 2, False), ((1, 2, 2, 2), 0, False), ((1, 1), 1, True)])
def test_training_stops_after_so_many_validations_that_were_not_better(history, patience, stale):
    assert evaluation.is_stale(losses(*history), patience) == stale


def test_the_rate_falls_after_more_than_patience_bad_rounds_and_no_lower_than_its_least():
    def rate(*history, **more):
        return evaluation.plateau_lr(losses(*history), 1.0, **({"patience": 1} | more))
    assert rate(1, 1) == 1 and rate(1, 1, 1) == 0.2
    assert rate(1, 1, 1, 1) == 0.2 and rate(1, 1, 1, 1, 1) == pytest.approx(0.04)
    edge = 1 - 1e-4  # better by a ten-thousandth or less is not better
    assert rate(1, edge, edge) == rate(1, None, None) == 0.2 and rate(1, 0.9998, 0.9998) == 1
    assert rate(1, 0.5, 0.5) == 1 and rate(1, 1, 1, min_lr=0.5) == 0.5
    assert evaluation.plateau_lr(losses(1, 1, 1), 1e-7, 1) == 1e-7  # never raised
    # without a validation part no loss is ever defined, and nothing says that the rate is too high
    assert rate(*[None] * 9) == rate(*[None] * 9, 1, 1) == 1 and rate(None, 1, 1, 1) == 0.2


def test_figures_that_are_not_finite_are_null():
    assert evaluation.without_nan({"a": float("nan"), "b": float("inf"), "c": 1.5, "d": 3,
                                   "e": "x"}) == {"a": None, "b": None, "c": 1.5, "d": 3, "e": "x"}


def test_a_tally_counts_what_is_right_and_sums_the_losses(monkeypatch):
    """Of images of the classes 0, 1, 2 and 1 only the second is right; the others lie on either
    side of their class."""
    p = np.array([[0.25, 0.5, 0.25], [0.125, 0.75, 0.125], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])
    measured = evaluation.Evaluation(None, SimpleNamespace(labels=torch.tensor([9, 0, 1, 2, 1])),
                                     {"val": np.arange(1, 5)})
    monkeypatch.setattr(measured, "logits", lambda part, state, local_bn: np.log(p))
    n, correct, loss = measured.tally("val", {})
    assert (n, correct) == (4, 1) and loss == pytest.approx(-np.log([0.25, 0.75, 0.25, 0.25]).sum())
