"""What the terminal shows of figures, epochs and rounds, to the letter."""

import checks  # noqa: F401 - before torch

import pytest

from reporting import terminal


@pytest.mark.parametrize(("figure", "text"), [
    (None, "–"), (0.12345, "0.1235"), (2, "2.0000"),
    ({"value": None, "low": None, "high": None}, "–"), ({"mean": None, "sd": None}, "–"),
    ({"value": 0.5, "low": None, "high": None}, "0.5000 (no interval)"),
    ({"value": 0.5, "low": 0.25, "high": 0.75}, "0.5000 (0.2500–0.7500)"),
    ({"mean": 0.5, "sd": 0.125}, "0.5000 ± 0.1250"), ({"mean": 0.5, "sd": None}, "0.5000")])
def test_a_figure_is_shown_with_what_is_known_of_its_spread(figure, text):
    assert terminal.show(figure) == text


def test_a_table_is_aligned_and_has_no_blanks_at_its_ends(capsys):
    terminal.print_table(["a", "long", "b"], [["wide", 1, ""], ["x", None, 22]])
    assert capsys.readouterr().out == "a     long  b\nwide  1\nx     None  22\n"


def test_a_round_is_a_line_for_each_client_and_one_for_all(capsys):
    client = {"num_examples": 7, "steps": 3, "loss": 0.25, "accuracy": 0.5, "skipped_steps": 2}
    record = {"round": 4, "train_loss": 0.5, "val_loss": None, "val_accuracy": 0.75, "lr": 1e-4,
              "images_per_second": 12.34, "clients": [
                  {"client": 1, "left_out": False, "update_norm": 1.23456, **client},
                  {"client": 0, "left_out": True, "update_norm": None, "site": "NORTH", **client}]}
    terminal.print_round(record, 10, ["A", "B"])
    rest = "7 images, 3 steps, loss 0.2500, accuracy 0.500, update norm"
    assert capsys.readouterr().out.splitlines() == [
        f"  B: {rest} 1.235, skipped 2",
        f"  NORTH: {rest} not finite, left out, skipped 2",
        "round 4/10: train loss 0.5000, val loss –, val accuracy 0.7500, lr 0.0001, 12.3 images/s"]


def test_an_epoch_is_named_as_one(capsys):
    terminal.print_epoch({"epoch": 1, "train_loss": 1, "val_loss": 2, "val_accuracy": 0,
                          "lr": 0.5, "images_per_second": 100}, 40)
    assert capsys.readouterr().out == (
        "epoch 1/40: train loss 1.0000, val loss 2.0000, val accuracy 0.0000, lr 0.5, "
        "100.0 images/s\n")
