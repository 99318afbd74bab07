"""The six exercises of docs/lessons.md at toy size: the change applies, and does what it says."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BASE, CPU, BNNet, clone, equal, history, plain_net, run_round, toy_images

import data
import fedavg
import train_federated
from dataset import splits
from training import evaluation

ROOT = Path(__file__).parent.parent
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "docs/lessons.md").read_text("utf-8").splitlines()
        if re.match(r"\| \d\. ", line)]


def broken(number):
    """The module of lesson `number` with its line broken; the repository is left alone."""
    _, file, old, new, *_ = ROWS[number - 1]
    source = (ROOT / file.strip("`")).read_text("utf-8")
    assert source.count(old.strip("`")) == 1, old
    module = types.ModuleType(f"broken_{number}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    code = compile(source.replace(old.strip("`"), new.strip("`")), module.__name__, "exec")
    exec(code, module.__dict__)  # noqa: S102 - our own source, one line changed
    return module


def one_round(module, model, chosen=(0, 1)):
    images, clients = toy_images(12), [np.arange(3), np.arange(3, 12)]
    return run_round(model, clone(model.state_dict()), clients, images, chosen=chosen,
                     module=module)[0]


def test_there_are_six_and_the_tests_they_name_exist():
    assert [row[0][0] for row in ROWS] == list("123456")
    tests = "".join(f.read_text("utf-8") for f in (ROOT / "tests").glob("test_*.py"))
    for row in ROWS:
        assert f"def {row[-1].strip('`')}(" in tests, row[-1]


def test_lesson_1_small_clients_count_as_much_as_large_ones():
    right, wrong = (one_round(m, plain_net()) for m in (fedavg, broken(1)))
    alone = [one_round(fedavg, plain_net(), [k]) for k in (0, 1)]
    for key, value in right.items():
        a, b = (s[key].double() for s in alone)
        torch.testing.assert_close(value.double(), (3 * a + 9 * b) / 12, rtol=0, atol=1e-7)
        torch.testing.assert_close(wrong[key].double(), (a + b) / 2, rtol=0, atol=1e-7)
    assert not equal(right, wrong)


def test_lesson_2_the_running_statistics_stay_at_their_first_day():
    start = clone(BNNet().state_dict())
    right, wrong = (one_round(m, BNNet()) for m in (fedavg, broken(2)))
    for key in ("norm.running_mean", "norm.running_var", "downsample.0.running_mean"):
        assert torch.equal(wrong[key], start[key]) and not torch.equal(right[key], start[key])
    assert torch.equal(wrong["conv.weight"], right["conv.weight"])  # so the loss looks fine


def test_lesson_3_predictions_depend_on_the_batch_and_change_the_model():
    images = toy_images(8)
    for module, spoilt in ((evaluation, False), (broken(3), True)):
        model = BNNet()
        before = clone(model.state_dict())
        torch.manual_seed(0)
        together = module.predict(model, images, np.arange(8))[:4]
        assert equal(before, clone(model.state_dict())) != spoilt
        fewer = module.predict(model, images, np.arange(4))
        assert torch.allclose(together, fewer, atol=1e-6) != spoilt


def test_lesson_4_the_test_part_chooses_the_model(tree, tmp_path):
    for module, spoilt in ((train_federated, False), (broken(4), True)):
        out = tmp_path / str(spoilt)
        module.main(["--data", str(tree), *BASE, "--out", str(out)])
        last = json.loads((out / "results.json").read_text())["last"]
        chosen_by = history(out)[-1]["val_loss"]
        assert (chosen_by == pytest.approx(last["test"]["loss"])) == spoilt
        assert (chosen_by == pytest.approx(last["val"]["loss"])) != spoilt


def test_lesson_5_the_same_validation_image_comes_out_different():
    images, rows = toy_images(6), torch.arange(6)
    for module, spoilt in ((data, False), (broken(5), True)):
        once, again = (module.eval_batch(images, rows, CPU) for _ in range(2))
        assert torch.equal(once, again) != spoilt


@pytest.mark.parametrize(("kind", "leaks"), [("random", True), ("grouped", False)])
def test_lesson_6_a_random_split_puts_copies_on_both_sides(kind, leaks):
    digests = [str(i // 3) for i in range(90)]  # every picture three times
    split = splits.make_split(kind, np.arange(90) % 2, 42, groups=digests)
    assert (splits.count_twins(digests, split["test"], split["train"]) > 0) == leaks
    assert kind in ROWS[5][2 if kind == "grouped" else 3]
