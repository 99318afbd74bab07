"""Averaging, the local loop and the round, against hand-computed numbers and an oracle."""

from checks import InputError

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import CPU, PLAIN, BNNet, average, clone, equal, plain_net, run_round, toy_images
from torch import nn

import data
import fedavg
import models
from dataset.augment import Augmentation
from fedavg import Recipe
from training import evaluation
from training.recipe import TOO_SMALL_FOR_BF16

# ---- the oracle: E = 1, full batch, plain SGD, no BatchNorm ------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_oracle_one_round_equals_one_central_step(weighted):
    """Partial participation, unequal sizes that are no multiple of anything."""
    images = toy_images(23)
    clients = [np.arange(0, 7), np.arange(7, 10), np.arange(10, 23)]
    weights = torch.tensor([0.5, 1.0, 2.5]) if weighted else None
    model = plain_net()
    start = clone(model.state_dict())
    state, _, records = run_round(model, start, clients, images, chosen=[0, 2],
                                  class_weights=weights)

    union = torch.from_numpy(np.concatenate([clients[0], clients[2]]))  # the full batch, explicitly
    central = plain_net()
    batch = data.eval_batch(images, union, CPU)
    log_p = torch.log_softmax(central(batch), 1)
    losses = -log_p[torch.arange(20), images.labels[union]]
    if weighted:
        losses = losses * weights[images.labels[union]]
    (losses.sum() / 20).backward()
    for name, parameter in central.named_parameters():
        expected = start[name] - 0.1 * parameter.grad
        torch.testing.assert_close(state[name], expected, rtol=0, atol=2e-7)
    assert [r["num_examples"] for r in records] == [7, 13]
    moved = max((state[k] - start[k]).abs().max().item() for k in state)
    assert moved > 1e-3  # an oracle of no movement would prove nothing


def test_one_client_equals_central_training_bit_for_bit():
    images = toy_images(12)
    indices = np.arange(12)
    recipe = Recipe(batch_size=5)
    model = BNNet()
    start = clone(model.state_dict())
    state, _, _ = run_round(model, start, [indices], images, recipe, local_epochs=3, lr=0.01)
    central = BNNet()
    trainer = fedavg.make_optimizer(central, replace(recipe, lr=0.01))
    for epoch in range(3):  # epoch by epoch, one lasting optimiser, as train_central does
        fedavg.train_local(central, images, indices, recipe, *trainer, range(epoch, epoch + 1),
                           (0, 1, 0))
    assert equal(state, central.state_dict())


# ---- weighted averaging -------------------------------------------------------------------------

def test_average_is_weighted_by_images():
    assert average([({"w": torch.tensor([0.0])}, 1),
                             ({"w": torch.tensor([4.0])}, 3)])["w"].item() == 3.0


def test_average_hand_computed_with_buffers_and_dtypes():
    def state(x, count):
        return {"w": torch.full((2, 2), x), "running_mean": torch.tensor([x, 2 * x]),
                "half": torch.tensor([x], dtype=torch.float16), "scalar": torch.tensor(x),
                "double": torch.tensor([x], dtype=torch.float64),  # summed in a copy
                "num_batches_tracked": torch.tensor(count)}
    states = [(state(1.0, 7), 2), (state(2.0, 3), 3), (state(6.0, 5), 5)]
    before = [clone(s) for s, _ in states]
    mean = average(states)
    value = (1 * 2 + 2 * 3 + 6 * 5) / 10
    assert torch.equal(mean["w"], torch.full((2, 2), value))
    assert torch.equal(mean["running_mean"], torch.tensor([value, 2 * value]))
    assert mean["num_batches_tracked"].item() == 7  # maximum, not mean, not last
    for key, source in states[0][0].items():
        assert mean[key].dtype == source.dtype and mean[key].shape == source.shape, key
    assert all(equal(s, b) for (s, _), b in zip(states, before, strict=True))  # inputs survive
    assert equal(average(states), mean)  # nothing is left over from the first call


def test_average_does_not_depend_on_order_to_float32():
    """Nor on who is first. The sum is float64, so that order reaches no bit of a float32 result."""
    torch.manual_seed(0)
    states = [({"w": torch.randn(5000)}, n) for n in (1, 10, 100)]
    results = [average(p)["w"] for p in itertools.permutations(states)]
    assert all(torch.equal(r, results[0]) for r in results)
    exact = [sum(Fraction(float(s["w"][i])) * n for s, n in states) / 111 for i in range(200)]
    assert results[0][:200].tolist() == [np.float32(float(x)) for x in exact]


def test_average_of_one_update_is_that_state_bit_for_bit():
    """n θ / n is exact in float64 for every whole n that fits 29 bits."""
    torch.manual_seed(0)
    state = {"w": torch.randn(5000) * 10.0 ** torch.randint(-30, 30, (5000,)),
             "count": torch.tensor(3)}
    for n in (1, 3, 651, 653, 2**29 - 1):
        assert equal(average([(state, n)]), state)


def test_average_of_nothing_is_nothing():
    assert average([]) == {}


def test_average_of_running_variances_is_not_the_pooled_variance():
    """Documented: σ² is averaged as it is; the pooled one would add the spread of the means."""
    states = [({"running_mean": torch.tensor(m), "running_var": torch.tensor(1.0)}, 1)
              for m in (-3.0, 3.0)]
    assert average(states)["running_var"].item() == 1.0  # pooled: 10


def test_average_of_resnet50_has_all_320_entries_and_returns_equal_states_unchanged():
    model = models.build("resnet50", 4)
    state = model.state_dict()
    mean = average([(state, 651), (state, 653)])
    assert len(mean) == 320 and mean.keys() == state.keys()
    assert sum(v.dtype == torch.int64 for v in mean.values()) == 53
    assert equal(mean, state)


def test_average_reads_a_live_state_once_and_streams():
    """Two clients may share one live tensor, one after the other: nothing is aliased."""
    live = {"w": torch.zeros(3)}

    def updates():
        for value in (1.0, 5.0):
            live["w"].fill_(value)
            yield live, 1
    assert torch.equal(average(updates())["w"], torch.full((3,), 3.0))


@pytest.mark.parametrize("updates", [
    [({"w": torch.zeros(1)}, 0)], [({"w": torch.zeros(1)}, -1)], [({"w": torch.zeros(1)}, 0.5)],
    [({"w": torch.zeros(1)}, 1), ({"v": torch.zeros(1)}, 1)],
    [({"w": torch.zeros(1)}, 1), ({"w": torch.zeros(2)}, 1)]])
def test_average_refuses_nonsense(updates):
    with pytest.raises(ValueError):
        average(updates)


# ---- the round ------------------------------------------------------------------------------

def test_every_client_starts_from_the_global_state(monkeypatch):
    images, seen = toy_images(12), []
    clients = [np.arange(0, 4), np.arange(4, 8), np.arange(8, 12)]
    original = fedavg.train_local

    def spy(model, *args, **kwargs):
        seen.append(clone(model.state_dict()))
        return original(model, *args, **kwargs)
    monkeypatch.setattr(fedavg, "train_local", spy)
    model = BNNet(seed=1)
    start = clone(BNNet(seed=2).state_dict())  # not what the working model happens to hold
    given = clone(start)
    state, _, _ = run_round(model, start, clients, images, Recipe(batch_size=2))
    assert len(seen) == 3 and all(equal(s, start) for s in seen)
    assert equal(start, given) and not equal(state, start)


def test_running_statistics_of_the_average_are_the_weighted_mean():
    images = toy_images(10)
    clients = [np.arange(0, 3), np.arange(3, 10)]
    model = BNNet()
    start = clone(model.state_dict())
    single = [run_round(model, start, clients, images, Recipe(batch_size=4), chosen=[k])[0]
              for k in (0, 1)]
    both, _, _ = run_round(model, start, clients, images, Recipe(batch_size=4))
    for key in ("norm.running_mean", "downsample.0.running_var", "fc.weight"):
        expected = (3 * single[0][key].double() + 7 * single[1][key].double()) / 10
        torch.testing.assert_close(both[key].double(), expected, rtol=1e-6, atol=1e-8)
    assert both["norm.num_batches_tracked"].item() == 2  # ceil(7/4), the larger of 1 and 2


@pytest.mark.parametrize("n,batch,epochs,expand,steps", [
    (7, 3, 2, 1, 4), (8, 3, 2, 1, 6), (9, 3, 1, 1, 3), (5, 8, 3, 1, 3), (4, 1, 1, 1, 4),
    (7, 4, 1, 3, 5), (2, 32, 1, 1, 1)])
def test_number_of_optimizer_steps(n, batch, epochs, expand, steps):
    """E·(⌈n/B⌉ - [n mod B = 1]), n counting expanded draws; the weight stays n."""
    images, model = toy_images(n), BNNet()
    _, _, (record,) = run_round(model, clone(model.state_dict()), [np.arange(n)], images,
                                Recipe(batch_size=batch, expand=expand), local_epochs=epochs)
    dropped = epochs if (n * expand) % batch == 1 and batch > 1 else 0
    assert record["steps"] == steps
    assert record["images"] == epochs * n * expand - dropped
    assert record["num_examples"] == n


def test_loss_and_accuracy_of_a_client_are_means_over_the_images_it_saw():
    """At a rate of 0 the network stays: 7 images in batches of 4 and 3, twice, told as they go."""
    images, model, told = toy_images(7), plain_net(), []
    with torch.no_grad():
        logits = model(data.eval_batch(images, torch.arange(7), CPU))
    recipe = replace(PLAIN, batch_size=4, local_epochs=2, lr=0.0)
    found = fedavg.train_client(model, clone(model.state_dict()), images, np.arange(7), recipe,
                                (0, 1, 5), told.append)
    assert (found.client_id, found.num_examples, told) == (5, 7, [4, 3, 4, 3])
    loss = nn.functional.cross_entropy(logits, images.labels).item()
    accuracy = (logits.argmax(1) == images.labels).double().mean().item()
    assert found.record == {"images": 14, "steps": 4, "loss": pytest.approx(loss, rel=1e-6),
                            "accuracy": pytest.approx(accuracy), "skipped_steps": 0,
                            "update_norm": 0.0}


def test_client_of_one_image_is_refused_under_batchnorm_and_trains_without():
    images = toy_images(6)
    with pytest.raises(InputError, match="client 0 owns one image"):
        run_round(BNNet(), clone(BNNet().state_dict()), [np.array([0])], images)
    _, _, (record,) = run_round(plain_net(), clone(plain_net().state_dict()), [np.array([0])],
                                images)
    assert record["steps"] == 1


@pytest.mark.parametrize("bn", ["average", "recalibrate", "local"])
def test_non_finite_update_is_left_out_and_weights_renormalised(monkeypatch, capsys, bn):
    images = toy_images(12)
    clients = [np.arange(0, 4), np.arange(4, 6), np.arange(6, 12)]
    model = BNNet()
    start = clone(model.state_dict())
    expected, expected_bn, _ = run_round(model, start, clients, images, chosen=[0, 2], bn=bn)
    original = fedavg.train_local

    def poisoned(model, *args):
        record = original(model, *args)
        if args[6][2] == 1:  # the client of the key
            next(model.parameters()).data.view(-1)[0] = float("nan")
        return record
    monkeypatch.setattr(fedavg, "train_local", poisoned)
    state, local_bn, records = run_round(model, start, clients, images, bn=bn)
    assert equal(state, expected)
    assert list(local_bn) == ([0, 2] if bn == "local" else [])
    assert all(equal(local_bn[k], expected_bn[k]) for k in local_bn)
    assert [r["left_out"] for r in records] == [False, True, False]
    assert records[1]["update_norm"] is None
    assert "client 1 is not finite" in capsys.readouterr().err
    with pytest.raises(FloatingPointError, match="no client"):
        run_round(model, start, clients, images, chosen=[1], bn=bn)


def test_an_error_of_training_is_not_taken_for_a_lost_update():
    """BatchNorm refuses a batch of one value a channel; that is no update that is not finite."""
    images, model = toy_images(3), nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4),
                                                 nn.Linear(4, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run_round(model, clone(model.state_dict()), [np.arange(3)], images, Recipe(batch_size=1))


def test_sampling_is_uniform_over_clients_ordered_and_a_function_of_the_round():
    draws = [fedavg.sample_clients(10, 0.3, 0, r) for r in range(2000)]
    assert all(len(d) == 3 and d == sorted(set(d)) for d in draws)
    counts = np.bincount(np.concatenate(draws), minlength=10)
    assert abs(counts - 600).max() < 100  # 5 sigma; nothing about sizes enters
    assert draws[5] == fedavg.sample_clients(10, 0.3, 0, 5)
    assert draws != [fedavg.sample_clients(10, 0.3, 1, r) for r in range(2000)]
    assert fedavg.sample_clients(4, 1.0, 0, 1) == [0, 1, 2, 3]
    assert len(fedavg.sample_clients(4, 0.01, 0, 1)) == 1


def test_proximal_term_by_hand_and_its_effect():
    value = fedavg.proximal_term([torch.tensor([1.0, 2.0]), torch.tensor([3.0])],
                                 [torch.tensor([0.0, 0.0]), torch.tensor([1.0])], mu=0.5)
    assert value.item() == 0.25 * (1 + 4 + 4)
    images, model = toy_images(8), plain_net()
    start = clone(model.state_dict())
    norms = []
    for mu in (0.0, 5.0):
        recipe = Recipe(batch_size=2, optimizer="sgd", momentum=0, weight_decay=0, mu=mu)
        _, _, (record,) = run_round(model, start, [np.arange(8)], images, recipe, local_epochs=3)
        norms.append(record["update_norm"])
    assert norms[1] < 0.8 * norms[0]  # a reference that moves along would change nothing


def test_update_norm_is_over_parameters():
    images, model = toy_images(8), BNNet()
    start = clone(model.state_dict())
    state, _, (record,) = run_round(model, start, [np.arange(8)], images)
    names = [name for name, _ in model.named_parameters()]
    expected = sum((state[n] - start[n]).double().square().sum() for n in names).sqrt().item()
    assert record["update_norm"] == pytest.approx(expected, rel=1e-6)


# ---- BatchNorm policies -----------------------------------------------------------------------

def test_bn_local_keeps_each_clients_batchnorm_and_shares_the_rest():
    images, model = toy_images(12), BNNet()
    clients = [np.arange(0, 4), np.arange(4, 12)]
    start = clone(model.state_dict())
    recipe = Recipe(batch_size=4)
    state, local, _ = run_round(model, start, clients, images, recipe, bn="local")
    keys = set(models.batchnorm_keys(model))
    assert len(keys) == 10 and set(local) == {0, 1} and all(set(s) == keys for s in local.values())
    assert all(torch.equal(state[k], start[k]) for k in keys)  # the server's stay out of it
    assert not torch.equal(state["fc.weight"], start["fc.weight"])
    assert not equal(local[0], local[1])
    again, _, _ = run_round(model, state, clients, images, recipe, bn="local", local_bn=local,
                            round_index=2)
    without, _, _ = run_round(model, state, clients, images, recipe, bn="local", round_index=2)
    assert not torch.equal(again["fc.weight"], without["fc.weight"])  # round 2 starts from them


def test_bn_recalibrate_gives_the_pooled_moments_of_the_averaged_model():
    """First layer by hand: the convolution's outputs over all clients' unaugmented images."""
    images, model = toy_images(14), BNNet()
    clients = [np.arange(0, 4), np.arange(4, 14)]
    recipe = Recipe(batch_size=4, augmentation=Augmentation())
    state, _, _ = run_round(model, clone(model.state_dict()), clients, images, recipe,
                            bn="recalibrate")
    plain, _, _ = run_round(model, clone(BNNet().state_dict()), clients, images, recipe)
    assert all(torch.equal(state[k], plain[k]) for k, _ in model.named_parameters())
    model.load_state_dict(state)
    with torch.no_grad():
        out = model.conv(data.eval_batch(images, torch.arange(14), CPU)).double()
    out = out.permute(1, 0, 2, 3)
    mean = out.flatten(1).mean(1)
    torch.testing.assert_close(state["norm.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
    second = sum(len(c) / 14 * (out[:, c].flatten(1).var(1) + out[:, c].flatten(1).mean(1) ** 2)
                 for c in clients)
    torch.testing.assert_close(state["norm.running_var"].double(), second - mean**2, rtol=1e-5,
                               atol=1e-6)
    assert model.norm.momentum == 0.1


def test_moments_are_over_all_images_however_they_fall_into_batches():
    """By hand: 4 black and 12 white images. The mean of batch variances would be 0, and batches of
    unequal size would weigh alike."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    batches = [torch.zeros(4, 3, 2, 2), torch.ones(12, 3, 2, 2)]
    found = models.batchnorm_moments(model, model.state_dict(), batches)
    running = [key for key in models.batchnorm_keys(model) if "running" in key]
    assert list(found) == running == ["0.running_mean", "0.running_var"]
    for value in found.values():
        assert value.tolist() == [0.75] * 3
    pooled = models.pooled_batchnorm(model.state_dict(), found)
    assert pooled["0.running_var"].tolist() == [0.1875] * 3  # 0.75 - 0.75²


def test_frozen_layers_do_not_move_and_their_batchnorm_stays_in_eval():
    images, model = toy_images(8), BNNet()
    models.freeze(model, "downsample")
    start = clone(model.state_dict())
    state, _, _ = run_round(model, start, [np.arange(8)], images, Recipe(batch_size=4))
    for key in start:
        frozen = key.split(".")[0] in ("conv", "norm", "mid")
        assert torch.equal(state[key], start[key]) == frozen, key
    assert not model.norm.training and model.downsample[0].training and model.drop.training


def test_bn_freeze_fixes_all_batchnorm_entries_and_nothing_else():
    images, model = toy_images(8), BNNet()
    models.freeze(model, batchnorm=True)
    start = clone(model.state_dict())
    state, _, _ = run_round(model, start, [np.arange(8)], images, Recipe(batch_size=4))
    keys = set(models.batchnorm_keys(model))
    assert {k for k in start if torch.equal(state[k], start[k])} == keys


# ---- randomness -------------------------------------------------------------------------------

def orders(seed, round_index, client_id, monkeypatch):
    seen = []
    images, model = toy_images(16), plain_net()
    original = data.train_batch

    def spy(images, indices, *rest):
        seen.append(indices.tolist())
        return original(images, indices, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(data, "train_batch", spy)
        trainer = fedavg.make_optimizer(model, PLAIN)
        fedavg.train_local(model, images, np.arange(16), Recipe(batch_size=4), *trainer, range(2),
                           (seed, round_index, client_id))
    return seen


def test_orders_differ_by_seed_round_client_and_epoch_and_repeat(monkeypatch):
    runs = [orders(*key, monkeypatch) for key in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1))]
    assert all(a != b for a, b in itertools.combinations(runs, 2))
    assert runs[0][:4] != runs[0][4:]  # epoch 0, epoch 1
    assert sorted(itertools.chain(*runs[0][:4])) == list(range(16))
    assert runs[0] == orders(0, 1, 0, monkeypatch)


def test_seeds_have_63_bits_and_each_part_counts():
    keys = [fedavg.random_keys(*parts) for parts in itertools.product(range(4), repeat=3)]
    assert all(max(column).bit_length() == 63 for column in zip(*keys, strict=True))
    assert len(set(itertools.chain(*keys))) == 2 * 64


def test_training_leaves_the_callers_random_state_and_dropout_comes_from_the_key():
    images, model = toy_images(8), BNNet()
    start = clone(model.state_dict())
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        results.append(run_round(model, start, [np.arange(8)], images, Recipe(batch_size=4))[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(*results)
    other = run_round(model, start, [np.arange(8)], images, Recipe(batch_size=4), seed=1)[0]
    assert not equal(other, results[0])


def test_evaluation_changes_nothing_and_does_not_depend_on_the_batch_size(monkeypatch):
    images, model = toy_images(13), BNNet()
    model.train()
    start = clone(model.state_dict())
    before = torch.get_rng_state()
    logits = {}
    for size in (1, 4, 64):
        monkeypatch.setattr(data, "EVAL_BATCH", size)
        logits[size] = evaluation.predict(model, images, np.arange(13))
    assert equal(model.state_dict(), start) and torch.equal(torch.get_rng_state(), before)
    for size in (4, 64):
        torch.testing.assert_close(logits[size], logits[1], rtol=0, atol=1e-6)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(data.eval_batch(images, torch.arange(13), CPU)),
                                   logits[64], rtol=0, atol=1e-6)


# ---- loss, clipping, precision, schedule ------------------------------------------------------

def test_loss_is_equation_3_divided_by_the_batch_size():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    targets, weights = torch.tensor([0, 2]), torch.tensor([0.5, 1.0, 3.0])
    ce = -torch.log_softmax(logits, 1)
    expected = (0.5 * ce[0, 0] + 3.0 * ce[1, 2]) / 2  # PyTorch's mean would divide by 3.5
    got = fedavg.weighted_cross_entropy(logits, targets, weights)
    assert got.item() == pytest.approx(expected.item(), abs=1e-7)
    smooth = fedavg.weighted_cross_entropy(logits, targets, None, label_smoothing=0.3)
    uniform = 0.7 * (ce[0, 0] + ce[1, 2]) + 0.1 * ce.sum()
    assert smooth.item() == pytest.approx(uniform.item() / 2, abs=1e-6)


def test_class_weights_are_inverse_frequencies():
    weights = fedavg.class_weights(np.array([3, 1]), CPU)
    assert weights.tolist() == pytest.approx([4 / 6, 2.0])
    assert fedavg.class_weights(np.array([3, 0]), CPU)[1] == 0
    paper = (389, 782, 782, 653)
    assert fedavg.class_weights(np.array(paper), CPU).tolist() == pytest.approx(
        [2606 / (4 * n) for n in paper])


class Recorder(torch.optim.SGD):
    """SGD that notes the gradient norm it is given."""
    norms: list

    def step(self, closure=None):
        grads = [p.grad for g in self.param_groups for p in g["params"]]
        self.norms.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt().item())
        return super().step(closure)


def recorded_norms(clip, dtype, scale):
    model, images = plain_net(), toy_images(8)
    for p in model.parameters():
        p.data *= 10  # gradients well above the threshold
    optimizer = Recorder(model.parameters(), lr=0.01)
    optimizer.norms = []
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16)
    recipe = Recipe(batch_size=4, clip=clip, amp_dtype=dtype)
    record = fedavg.train_local(model, images, np.arange(8), recipe, optimizer, scaler, range(2),
                                (0, 1, 0))
    return optimizer.norms, record


def test_gradient_norm_is_clipped_after_unscaling():
    plain, _ = recorded_norms(0, None, 1.0)
    assert min(plain) > 0.5  # so that clipping at 0.1 does something
    for dtype, scale in ((None, 1.0), (torch.float16, 1024.0)):
        norms, record = recorded_norms(0.1, dtype, scale)
        assert norms == pytest.approx([0.1] * 4, rel=1e-3)
        assert record["skipped_steps"] == 0


def test_overflowing_float16_steps_are_skipped_and_counted():
    norms, record = recorded_norms(1.0, torch.float16, 2.0**60)
    assert record["skipped_steps"] == 4 - len(norms) > 0
    assert record["steps"] == 4


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_an_overflowing_step_of_a_fused_optimizer_changes_nothing(name):
    images, model = toy_images(4), plain_net()
    recipe = Recipe(optimizer=name, lr=0.1, amp_dtype=torch.float16)
    optimizer, scaler = fedavg.make_optimizer(model, recipe)
    assert scaler.is_enabled() and optimizer.param_groups[0]["fused"]
    batch, targets = data.eval_batch(images, torch.arange(4), CPU), images.labels
    start = clone(model.state_dict())
    taken = {}
    for scale in (2.0**60, 2.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        *_, taken[scale] = fedavg.train_step(model, batch, targets, recipe, optimizer, scaler, [])
        assert equal(model.state_dict(), start) != taken[scale]
    assert taken == {2.0**60: False, 2.0: True}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_bf16_steps_repeat_whatever_lay_in_memory(name):
    """At the smallest size allowed. At one pixel less the weight gradients of the last strided
    convolutions are not written on an AVX512-bf16 machine, and this fails there."""
    size = TOO_SMALL_FOR_BF16 + 1
    batch = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    batch = batch.contiguous(memory_format=torch.channels_last)
    recipe = Recipe(batch_size=4, lr=1e-3, amp_dtype=torch.bfloat16)
    states = []
    for _ in range(4):
        torch.manual_seed(0)  # dropout
        model = models.build(name, 4)
        trainer = fedavg.make_optimizer(model, recipe)
        for _ in range(2):
            junk = [torch.full((2**k,), float("nan")) for k in range(6, 22)]
            del junk  # what is allocated next lies there
            fedavg.train_step(model, batch, torch.arange(4), recipe, *trainer, [])
        states.append(model.state_dict())
    assert models.is_finite(states[0]) and all(equal(states[0], s) for s in states[1:])


def test_bf16_training_runs_and_keeps_float32_weights():
    images, model = toy_images(8), BNNet()
    state, _, (record,) = run_round(model, clone(model.state_dict()), [np.arange(8)], images,
                                    Recipe(batch_size=4, amp_dtype=torch.bfloat16))
    assert all(v.dtype in (torch.float32, torch.int64) for v in state.values())
    assert np.isfinite(record["loss"])


def test_learning_rate_equals_reduce_on_plateau_as_a_function_of_the_losses():
    rng = np.random.default_rng(0)
    losses = (np.abs(rng.normal(size=60)) + np.linspace(1, 0.8, 60)).tolist()
    history = [{"val_loss": loss} for loss in losses]
    for patience in (1, 5):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
        reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.2, patience=patience, min_lr=1e-6)
        seen = set()
        for i, loss in enumerate(losses):
            assert evaluation.plateau_lr(history[:i], 1e-4, patience) == pytest.approx(
                optimizer.param_groups[0]["lr"], rel=1e-12)
            seen.add(optimizer.param_groups[0]["lr"])
            reference.step(loss)
        assert len(seen) > 2
    assert evaluation.plateau_lr([{"val_loss": 1.0}] * 50, 1e-4, patience=0) == 1e-4  # off
