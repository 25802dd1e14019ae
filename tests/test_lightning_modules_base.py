import functools

import pytest
import pytorch_lightning as pl
import torch
from timm import create_model
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cleave.architectures import staged_network
from cleave.lightning_modules import Classification, Training, default_evaluators

from .split_tasks import Pairs

NAMES = [f"class {i}" for i in range(7)]
SGD = functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.01)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 36, 7))


def build(network=None, class_names=NAMES, kind=Classification, label_smoothing=0.0, channels=1, **settings):
    network = net() if network is None else network
    sample = torch.randn(2, channels, 8, 8, dtype=next(network.parameters()).dtype)
    network = staged_network(network, sample)
    return kind(
        network,
        label_smoothing=label_smoothing,
        training=Training(**{"optimizer": SGD} | settings),
        evaluators=default_evaluators(network, class_names),
    )


def batch(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(7, (n,), generator=generator)


def trainer(**settings) -> pl.Trainer:
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | settings
    return pl.Trainer(enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **settings)


def loader(n=40) -> DataLoader:
    return DataLoader(Pairs(*batch(n)), batch_size=16)


def test_norms_and_biases_do_not_decay():
    decayed, spared = build().parameter_groups()
    assert "weight_decay" not in decayed
    assert all(p.ndim > 1 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0
    assert all(p.ndim <= 1 for p in spared["params"])
    assert len(build(decay_norms_and_biases=True).parameter_groups()) == 1


def test_layer_wise_rates_take_the_longest_prefix():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = net(), net()

        def forward(self, x):
            return self.a(x) + self.b(x)

    task = build(Two(), lr_scales={"a": 0.1, "a.3": 0.5})
    rates = {id(p): group["lr"] for group in task.parameter_groups() for p in group["params"]}
    measured = {name: rates[id(p)] for name, p in task.network.named_weights()}
    assert measured["a.0.weight"] == pytest.approx(0.01)
    assert measured["a.3.weight"] == measured["a.3.bias"] == pytest.approx(0.05)
    assert measured["b.3.weight"] == 0.1


def test_rates_decay_over_the_layers_as_in_timm():
    backbone = create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, depth=3)
    expected = {}
    for group in param_groups_layer_decay(backbone, layer_decay=0.5):
        expected |= {id(parameter): 0.1 * group["lr_scale"] for parameter in group["params"]}
    expected = {name: expected[id(parameter)] for name, parameter in backbone.named_parameters()}
    assert len(set(expected.values())) == 5
    network = staged_network(backbone, torch.randn(2, 3, 32, 32), split="blocks.0", form="insert")
    task = Classification(network, training=Training(SGD, layer_decay=0.5), train=["backbone", "bottleneck"])
    rates = {id(p): group["lr"] for group in task.parameter_groups() for p in group["params"]}
    measured = {name: rates[id(parameter)] for name, parameter in task.network.named_weights()}
    new = set(measured) - set(expected)
    assert new
    assert {measured[name] for name in new} == {0.1}
    assert {name: measured[name] for name in expected} == pytest.approx(expected)


def test_rates_cannot_decay_over_layers_that_nobody_grouped():
    with pytest.raises(ValueError, match=r"layer_decay=0\.5 needs a backbone that groups its layers"):
        build(net(), layer_decay=0.5)
    with pytest.raises(ValueError, match=r"layer_decay must lie in \(0, 1\], got 1\.5"):
        Training(layer_decay=1.5)


def test_channels_last_changes_the_memory_of_maps_alone():
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 7)).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = network(images)
    task = build(network, channels=3, channels_last=True)
    network = task.network.stages[0]
    assert all(network[i].weight.is_contiguous(memory_format=torch.channels_last) for i in (0, 1))
    assert network[:2](images).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(task(images), expected)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr_scales": {"layer": 0.1}}, "lr_scales names 'layer'"),
        ({"lr_scales": {"0": -1}}, "must be positive"),
        ({"scheduler_interval": "batch"}, "'epoch' or 'step'"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"class_names": ["one"]}, "two classes"),
        ({"class_names": ["one", "two"]}, r"gives \(7,\) a sample, which are not logits of 2 classes"),
    ],
)
def test_bad_arguments_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        build(**settings)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        build(net().requires_grad_(False)).parameter_groups()


def test_cross_entropy_with_label_smoothing_equals_its_definition():
    task = build(label_smoothing=0.2).eval()
    images, labels = batch()
    smooth = F.one_hot(labels, 7) * 0.8 + 0.2 / 7
    expected = -(smooth * task(images).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task.training_loss({"images": images, "labels": labels})["ce"], expected)


def test_metrics_equal_their_definitions():
    task = build()
    run = trainer()
    run.test(task, loader(), verbose=False)
    images, labels = batch()
    with torch.no_grad():
        logits = task.eval()(images)
    measured = run.callback_metrics
    assert measured["test/acc"].item() == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean()
    assert measured["test/acc_top5"].item() == pytest.approx(top5.item())
    assert measured["test/loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    for i, name in enumerate(NAMES):
        right = (logits.argmax(1) == labels)[labels == i].double().mean()
        assert measured[f"test/acc_class/{name}"].item() == pytest.approx(right.item())
    confidence, guess = logits.softmax(1).max(1)
    bins = torch.bucketize(confidence, torch.linspace(0, 1, 16)[1:-1])
    gaps = [
        (bins == b).double().mean()
        * (confidence[bins == b].mean() - (guess == labels)[bins == b].double().mean()).abs()
        for b in bins.unique()
    ]
    assert measured["test/ece"].item() == pytest.approx(sum(gaps).item(), abs=1e-5)


def test_total_steps_stands_for_the_steps_of_the_run():
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max="total_steps")
    task = build(scheduler=cosine, scheduler_interval="step")
    run = trainer(max_epochs=2, accumulate_grad_batches=2)
    run.fit(task, loader(), loader())
    assert task.lr_schedulers().T_max == 4
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_total_steps_of_an_endless_run_are_refused():
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max="total_steps")
    with pytest.raises(ValueError, match=r"trainer\.max_epochs"):
        trainer(max_epochs=-1).fit(build(scheduler=cosine), loader(), loader())


def test_a_step_draws_from_seed_epoch_and_batch_alone():
    draws = {}

    class Draws(Classification):
        def training_step(self, batch, batch_idx):
            draws.setdefault(self.seed, {})[self.current_epoch, batch_idx] = torch.rand(3).tolist()
            return super().training_step(batch, batch_idx)

    def run(seed, disturb):
        torch.manual_seed(disturb)
        trainer(max_epochs=2).fit(build(kind=Draws, seed=seed), loader(), loader())
        return draws.pop(seed)

    first, again, other = run(1, 5), run(1, 6), run(2, 5)
    assert first == again
    assert len({tuple(v) for v in first.values()}) == len(first) == 6
    assert all(first[key] != other[key] for key in first)


def test_gradient_clipping_and_accumulation_are_the_trainers():
    def weights(batch_size, **settings):
        torch.manual_seed(0)
        linear = nn.Linear(64, 7, bias=False)
        task = build(nn.Sequential(nn.Flatten(), linear))
        before = linear.weight.detach().clone()
        data = DataLoader(Pairs(*batch(32)), batch_size=batch_size)
        trainer(**settings).fit(task, data, data)
        return before, linear.weight.detach()

    before, after = weights(32)
    assert (after - before).norm() > 0.05
    before, clipped = weights(32, gradient_clip_val=1e-6)
    torch.testing.assert_close(clipped, before * (1 - 0.1 * 0.01), atol=1e-6, rtol=0)  # weight decay alone
    torch.testing.assert_close(weights(16, accumulate_grad_batches=2)[1], after)
