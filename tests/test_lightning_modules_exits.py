from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from cleave.architectures import StagedNetwork, multi_exit_network
from cleave.datamodules import Digits
from cleave.deployment import ENVELOPE_BYTES, build_policy, offline
from cleave.lightning_modules import (
    ExitsDistilled,
    ExitsJoint,
    ExitsSeparate,
    Frozen,
    Task,
    ZeroTimeWaste,
    default_evaluators,
)
from cleave.losses import (
    ExitDistillationLoss,
    GeometricEnsembleLoss,
    JointExitLoss,
    fit_geometric_ensemble,
    geometric_ensemble,
)

from .split_tasks import (
    NAMES,
    Logged,
    backbone,
    batch,
    batches,
    changed,
    fit,
    losses,
    snapshot,
    trainer_of,
    training,
    whole,
)
from .tiny_networks import made_once

SPLIT = {"split": "layer2", "bottleneck": {"channels": 3, "width": 8}, "codec": {"bits": 4}}
LOSSES: dict[type[Task], Any] = {
    ExitsJoint: JointExitLoss,
    ExitsSeparate: JointExitLoss,
    ExitsDistilled: ExitDistillationLoss,
    ZeroTimeWaste: GeometricEnsembleLoss,
}


def multi_exit(**settings: Any) -> StagedNetwork:
    return made_once(_multi_exit, settings)


def _multi_exit(settings: dict[str, Any]) -> StagedNetwork:
    torch.manual_seed(1)
    return multi_exit_network(backbone(), torch.randn(2, 1, 8, 8), **{"at": ["layer1", "layer2"]} | settings)


def build(method: type[Task], network: dict[str, Any] | None = None, policy: Any = None, **settings: Any) -> Task:
    """A task of a method, with its loss's defaults."""
    needs = {"cascade": True, "ensemble": True} if method is ZeroTimeWaste else {}
    made = multi_exit(**needs | (network or {}))
    defaults = {
        "loss": LOSSES[method](),
        "training": training(),
        "evaluators": default_evaluators(made, NAMES, policy),
    }
    return method(made, **defaults | settings)  # type: ignore[call-arg]


def logits_of(task: Task, images: Tensor) -> list[Tensor]:
    names = task.network.group("exits")
    found = task.network.outputs(images, names)
    return [found[name] for name in names]


@pytest.mark.parametrize("weights", ["equal", "branchynet", "linear", "shallow_deep", "learned", [0.2, 0.5, 1.0]])
def test_joint_training_weighs_each_exits_cross_entropy(weights: Any) -> None:
    task = build(ExitsJoint, loss=JointExitLoss(weights)).double()
    task.set_modes()
    images, labels = batch(torch.float64)
    expected = [torch.nn.functional.cross_entropy(logits, labels) for logits in logits_of(task, images)]
    found = losses(task, images, labels)
    factors = task.terms["exit"].loss.weights_at(3, 1.0).tolist()
    assert list(found) == ["exit/layer1", "exit/layer2", "exit/final"]
    for value, loss, factor in zip(found.values(), expected, factors, strict=True):
        torch.testing.assert_close(value, factor * loss, rtol=1e-6, atol=1e-9)


def test_the_gradient_of_the_total_is_the_weighted_sum_of_single_gradients() -> None:
    task = build(ExitsJoint, loss=JointExitLoss([0.2, 0.5, 1.0])).double()
    task.set_modes()
    images, labels = batch(torch.float64)
    stem = next(task.network.stages.parameters())

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, stem, retain_graph=True)[0]

    total = gradient(torch.stack(list(losses(task, images, labels).values())).sum())
    single = [gradient(torch.nn.functional.cross_entropy(own, labels)) for own in logits_of(task, images)]
    torch.testing.assert_close(total, 0.2 * single[0] + 0.5 * single[1] + single[2])


def test_growing_weights_follow_the_training() -> None:
    task, seen = build(ExitsJoint, loss=JointExitLoss("shallow_deep")), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(task.terms["exit"].loss.weights_at(3, task.progress()).tolist())

    fit(task, [Watch()], epochs=2)
    shares = task.network.cost_shares()
    assert seen[0] == pytest.approx([0.01, 0.01, 1.0])
    assert seen[-1] == pytest.approx([shares[0], shares[1], 1.0])
    assert [weights[0] for weights in seen] == sorted({weights[0] for weights in seen})


def test_learned_weights_learn() -> None:
    task = build(ExitsJoint, loss=JointExitLoss("learned"))
    fit(task, epochs=2)
    assert (task.terms["exit"].loss.weights_at(3, 1.0) != 1).all()


ALIASES = {"encoder": "bottleneck", "quantizer": "bottleneck", "decoder": "bottleneck", "exits": "exits"}
TRAINED = [
    (ExitsJoint, {}, None, {"backbone", "exits"}),
    (ExitsJoint, SPLIT, None, {"head", "tail", "bottleneck", "exits"}),
    (ExitsJoint, SPLIT, ["bottleneck"], {"bottleneck"}),
    (ExitsJoint, {}, ["backbone"], {"backbone"}),
    (ExitsSeparate, {}, None, {"exits"}),
    (ExitsSeparate, {"cascade": True}, ["exits/layer2"], {"exits/layer2"}),
    (ExitsDistilled, {}, None, {"backbone", "exits"}),
    (ExitsDistilled, {}, ["exits"], {"exits"}),
    (ZeroTimeWaste, {}, None, {"ensemble"}),
]


@pytest.mark.parametrize(("method", "network", "train", "learns"), TRAINED)
def test_frozen_parts_stay_equal_in_every_bit(
    method: type[Task], network: dict[str, Any], train: list[str] | None, learns: set[str]
) -> None:
    task, modes = build(method, network, train=train), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
            if index == 0:
                parts = task.network.parts().items()
                modes.append({name: modules[0].training for name, modules in parts})

    before = {name: snapshot(torch.nn.ModuleList(modules)) for name, modules in task.network.parts().items()}
    fit(task, [Watch()], epochs=2)
    after = task.network.parts()
    moved = {name for name in before if changed(before[name], torch.nn.ModuleList(after[name]))}
    assert moved == {name for name in before if name in learns or ALIASES.get(name.partition("/")[0]) in learns}
    expected = {name: name in task.trained_parts for name in after}
    assert modes == [expected, expected]


@pytest.mark.parametrize("source", ["final", "next", "teacher"])
def test_distillation_learns_from_whom_it_says(source: str) -> None:
    other = backbone(seed=5)
    loss = ExitDistillationLoss(source=source, alpha=0.3, temperature=2.0)
    task = build(ExitsDistilled, loss=loss, others={"teacher": Frozen(other)}).double()
    assert (task.others == {}) == (source != "teacher")
    other.double()
    task.set_modes()
    images, labels = batch(torch.float64)
    own = logits_of(task, images)
    found = list(losses(task, images, labels).values())
    with torch.no_grad():
        sources = {"final": [own[2], own[2], None], "next": [own[1], own[2], None], "teacher": [other(images)] * 3}
    for value, logits, target in zip(found, own, sources[source], strict=True):
        expected = torch.nn.functional.cross_entropy(logits, labels)
        if target is not None:
            p, q = (target / 2).softmax(1), (logits / 2).softmax(1)
            expected = 0.3 * expected + 0.7 * 4 * (p * (p / q).log()).sum(1).mean()
        torch.testing.assert_close(value, expected)


def test_zero_time_waste_learns_the_ensembles_of_frozen_exits() -> None:
    task = build(ZeroTimeWaste).double()
    task.set_modes()
    images, labels = batch(torch.float64)
    ensemble = task.network.ensemble
    log_q = geometric_ensemble(logits_of(task, images), ensemble.weights, ensemble.log_bias)
    expected = [torch.nn.functional.nll_loss(row, labels) for row in log_q]
    torch.testing.assert_close(list(losses(task, images, labels).values()), expected)


@pytest.mark.parametrize("last", [True, False])
def test_zero_time_waste_fits_the_ensembles_to_convergence(last: bool) -> None:
    task = build(ZeroTimeWaste, {"ensemble_last": last}, fit="lbfgs")
    before = snapshot(task)
    data = batches()
    names = task.network.group("exits")
    task.set_modes()
    with torch.no_grad():
        found = [task.network.outputs(each["images"], names) for each in data]
    logits = [torch.cat([each[name] for each in found]) for name in names]
    weights, log_bias = fit_geometric_ensemble(logits, torch.cat([each["labels"] for each in data]))
    trainer_of(epochs=1).fit(task, data, data)
    torch.testing.assert_close(task.network.ensemble.weights.double(), weights, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(task.network.ensemble.log_bias.double(), log_bias, atol=1e-3, rtol=1e-3)
    assert all("ensemble" in name for name in changed(before, task))
    images = next(iter(data))["images"]
    answers = task.network.eval().outputs(images, task.network.group("answers"))
    own = task.network.outputs(images, names)[names[-1]]
    assert torch.allclose(list(answers.values())[-1], own.log_softmax(1), atol=1e-6) is not last


def test_a_fit_interrupted_inside_an_epoch_is_of_the_whole_epoch() -> None:
    whole, half, resumed = (build(ZeroTimeWaste, fit="lbfgs") for _ in range(3))
    first, *rest = batches()
    checkpoint: dict[str, Any] = {}
    half.set_modes()
    half.training_loss(first)
    half.on_save_checkpoint(checkpoint)
    resumed.on_load_checkpoint(checkpoint)
    for task, seen in ((whole, [first, *rest]), (resumed, rest)):
        task.set_modes()
        for each in seen:
            task.training_loss(each)
    trainer = trainer_of(epochs=1)
    for task in (whole, resumed):
        task.trainer = trainer
        trainer.fit_loop.epoch_loop.batch_progress.current.ready = 3
        trainer.fit_loop.max_batches = 3
        task.on_train_batch_end(None, {}, 2)
    assert torch.equal(whole.network.ensemble.log_weights, resumed.network.ensemble.log_weights)
    assert not torch.equal(whole.network.ensemble.log_weights, half.network.ensemble.log_weights)


def test_an_ensemble_worse_than_its_exit_is_warned_of() -> None:
    task = build(ZeroTimeWaste, training=training(optimizer=functools.partial(torch.optim.SGD, lr=0.0)))
    data = batches()
    labels = torch.cat([each["labels"] for each in data])
    with torch.no_grad():
        task.network.ensemble.log_bias[-1, labels.bincount(minlength=10).argmin()] = 1e3  # all are of the rarest class
    with pytest.warns(UserWarning, match=r"the ensemble at \S+ is worse than its exit .*method.fit=lbfgs"):
        trainer_of(epochs=1).fit(task, data, data)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"fit": "lbfg"}, "fit must be one of gradients, lbfgs, got 'lbfg'. Did you mean 'lbfgs'"),
        ({"fit": "lbfgs", "train": ["ensemble", "exits"]}, "trains nothing else"),
    ],
)
def test_what_an_ensembles_fit_cannot_do_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build(ZeroTimeWaste, **settings)


def test_the_last_exit_answers_by_itself_only_beside_an_ensemble() -> None:
    with pytest.raises(ValueError, match="ensemble_last=False has no meaning without an ensemble"):
        multi_exit(ensemble_last=False)


# --- frozen features ------------------------------------------------------------------------------------------------


def digits(tmp_path: Path, method: type[Task], use: bool, network: dict[str, Any], **settings: Any) -> Task:
    data = Digits(batch_size=64, augment="none", image_size=8)
    cache = {"use": use, "directory": tmp_path / "cache", "dtype": "float32"}
    task, logged = build(method, network, feature_cache=cache, **settings), Logged()
    trainer = trainer_of([logged], epochs=1, limit_train_batches=4, limit_val_batches=0)
    data.configure_input(data.native_input.__class__(**vars(data.native_input) | {"height": 8, "width": 8}))
    runs: list[int] = []
    task.network.stages[0].register_forward_hook(lambda *_: runs.append(1))
    trainer.fit(task, datamodule=data)
    task.losses = logged.losses()  # type: ignore[attr-defined]
    task.runs = len(runs)  # type: ignore[attr-defined]
    return task


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (ExitsSeparate, {}),
        (ExitsDistilled, {"train": ["exits"]}),
        (ZeroTimeWaste, {}),
    ],
)
def test_a_frozen_backbone_runs_once_and_gives_equal_losses(
    method: type[Task], settings: dict[str, Any], tmp_path: Path
) -> None:
    plain = digits(tmp_path, method, False, {}, **settings)
    filled = digits(tmp_path, method, True, {}, **settings)
    again = digits(tmp_path, method, True, {}, **settings)
    assert plain.losses == pytest.approx(filled.losses, rel=1e-5)
    assert filled.losses == again.losses
    assert again.runs == 1  # the sample that the cache is held against


def test_nothing_is_stored_of_a_backbone_that_learns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no frozen part before what it trains"):
        digits(tmp_path, ExitsJoint, True, {})


def test_stored_features_are_those_of_these_weights_and_exits() -> None:
    digests = set()
    for network in ({}, {"at": ["layer1", "layer3"]}, {"head": {"size": 4}}, {"cascade": True}):
        digests.add(build(ExitsSeparate, network).frozen_digest())
    assert len(digests) == 3  # a cascade reads the same features
    task = build(ExitsSeparate)
    with torch.no_grad():
        next(task.network.stages.parameters()).add_(1e-3)
    assert task.frozen_digest() not in digests


# --- evaluation -----------------------------------------------------------------------------------------------------


def measured(task: Task) -> dict[str, float]:
    trainer = trainer_of()
    trainer.test(task, batches(), verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("network", [{}, SPLIT | {"split": "layer1"}])
@pytest.mark.parametrize("kind", ["confidence", "patience", "ensemble"])
def test_testing_measures_every_exit_and_the_policy(kind: str, network: dict[str, Any]) -> None:
    settings = {"kind": kind, "thresholds": {"patience": 1}.get(kind, 0.12)}
    task = build(ExitsJoint, network, policy=settings)
    if network:
        fit(task, epochs=1)  # measures the range of the codes
    found = measured(task)
    images, labels = whole()
    task.network.eval()
    with torch.no_grad():
        logits = torch.stack(logits_of(task, images))
    answers = logits
    if kind == "ensemble":
        means = torch.arange(1, 4).reciprocal().unsqueeze(1).expand(3, 3).tril()
        answers = geometric_ensemble(list(logits), means, torch.zeros(3, 10))
    accuracies = (answers.argmax(2) == labels).double().mean(1)
    for name, accuracy in zip(task.network.exits, accuracies, strict=True):
        assert found[f"test/acc_exit/{name}"] == pytest.approx(accuracy.item())
    assert found["test/acc"] == found["test/acc_exit/final"]
    assert found["test/acc_exits"] == pytest.approx(accuracies.mean().item())
    policy = build_policy(**settings, exits=3)
    left = offline(policy, logits)
    assert found["test/policy/acc"] == pytest.approx((left.logits.argmax(1) == labels).double().mean().item())
    costs = torch.tensor(task.network.exit_costs(policy), dtype=torch.float64)
    assert found["test/policy/macs"] == pytest.approx(costs[left.index].mean().item(), rel=1e-6)
    assert found["test/policy/share/layer1"] == pytest.approx((left.index == 0).double().mean().item())
    if network:
        _, height, width = task.network.bottlenecks["layer1"].shape
        sent = ENVELOPE_BYTES + 3 * height * width // 2  # 4 bits a value
        assert found["test/payload_bytes"] == sent
        assert found["test/payload_to_input"] == pytest.approx(sent / 64)
        channels, rows, columns = task.network.shapes["layer1"]
        assert found["test/payload_to_feature"] == pytest.approx(sent / (4 * channels * rows * columns))
        assert found["test/policy/payload_bytes"] == pytest.approx(sent * (left.index > 0).double().mean().item())
    else:
        assert not any("payload" in name for name in found)


def test_an_ensemble_is_tested_with_what_it_has_learned() -> None:
    task = build(ZeroTimeWaste, policy={"kind": "ensemble"})
    with torch.no_grad():
        task.network.ensemble.log_bias[:, 3] = 5.0  # as if it had learned that all is class 3
    found = measured(task)
    labels = whole()[1]
    assert found["test/policy/acc"] == pytest.approx((labels == 3).double().mean().item())
    assert found["test/policy/acc"] == found["test/acc"]
    task.evaluate_with(default_evaluators(task.network, NAMES, build_policy("confidence", None, exits=3)))
    own = logits_of(task.eval(), whole()[0])[-1]
    assert measured(task)["test/acc"] == pytest.approx((own.argmax(1) == labels).double().mean().item())


@pytest.mark.parametrize("method", [ExitsSeparate, ZeroTimeWaste])
def test_validation_measures_ensembles_only_where_they_are_trained(method: type[Task]) -> None:
    task = build(method, {"ensemble": True})
    with torch.no_grad():
        task.network.ensemble.log_bias[:, 3] = 50.0
    trainer = trainer_of()
    trainer.validate(task, batches(), verbose=False)
    images, labels = whole()
    own = logits_of(task.eval(), images)[-1].argmax(1)
    expected = torch.full_like(labels, 3) if method is ZeroTimeWaste else own
    assert trainer.callback_metrics["val/acc"].item() == pytest.approx((expected == labels).double().mean().item())


@pytest.mark.parametrize(
    ("method", "network", "loss"),
    [
        (ExitsJoint, {}, JointExitLoss("final")),
        (ExitsJoint, {}, JointExitLoss([0.0, 1.0, 1.0])),
        (ExitsJoint, {}, JointExitLoss("shallow_deep", start=0.0)),
        (ExitsJoint, {"ensemble": True}, JointExitLoss()),
        (ExitsDistilled, {}, ExitDistillationLoss(weights=[1.0, 0.0, 1.0])),
        (ExitsSeparate, {"cascade": True, "ensemble": True}, JointExitLoss("learned")),
    ],
)
def test_a_gradient_reaches_all_that_is_trained_as_ddp_asks(
    method: type[Task], network: dict[str, Any], loss: Any
) -> None:
    task = build(method, network, loss=loss)
    task.setup("fit")
    task.set_modes()
    task.progress = lambda: 0.0  # type: ignore[method-assign]
    torch.stack(list(losses(task, *batch()).values())).sum().backward()
    assert not [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]


def test_the_scales_of_an_ensemble_do_not_decay() -> None:
    task = build(ZeroTimeWaste)
    task.setup("fit")
    assert [group["weight_decay"] for group in task.parameter_groups()] == [0.0]


@pytest.mark.parametrize("codec", [{"bits": 32}, {"bits": 4, "range": "sample"}])
def test_a_frozen_bottleneck_whose_range_is_not_measured_may_have_been_trained(codec: dict[str, Any]) -> None:
    task = build(ExitsSeparate, SPLIT | {"codec": codec})
    before = snapshot(task.network.bottlenecks["layer2"])
    fit(task, epochs=1)
    assert not changed(before, task.network.bottlenecks["layer2"])


def test_what_would_train_for_nothing_is_told_before_training() -> None:
    for run in (fit, measured):
        with pytest.raises(ValueError, match="range=.* which this network's bottleneck has not seen; train it"):
            run(build(ExitsSeparate, SPLIT))
    with pytest.raises(ValueError, match="grow until the end of the run, which has none; set max_epochs"):
        fit(build(ExitsJoint, loss=JointExitLoss("shallow_deep")), epochs=-1)


@pytest.mark.parametrize(
    ("method", "network", "settings", "words"),
    [
        (ExitsSeparate, {}, {"loss": JointExitLoss("final")}, "leave nothing to train of exits/layer1, exits/layer2"),
        (ExitsJoint, {}, {"train": ["exit"]}, "train names 'exit'.*Did you mean 'exits'"),
        (ExitsJoint, {}, {"train": "exits"}, r"write train=\[exits\]"),
        (ExitsJoint, {}, {"train": ["bottleneck"]}, "train names 'bottleneck', which this network lacks"),
        (
            ExitsJoint,
            {"ensemble": True},
            {"train": ["ensemble"]},
            "no term of ExitsJoint reaches the ensemble.*use method=zero_time",
        ),
        (ExitsJoint, {}, {"loss": JointExitLoss([1.0, 1.0])}, "weights has 2 numbers, but there are 3 exits"),
        (ExitsJoint, {}, {"policy": {"kind": "confidence", "thresholds": [0.5] * 3}}, "thresholds"),
        (ExitsJoint, {}, {"policy": {"kind": "confidence", "thresholds": 1.5}}, r"1\.5"),
        (ExitsSeparate, {}, {"train": ["backbone"]}, "separate training keeps frozen"),
        (ZeroTimeWaste, {"ensemble": False}, {}, "exits.ensemble=true"),
        (
            ExitsDistilled,
            {},
            {"loss": ExitDistillationLoss(source="teacher"), "others": {"teacher": Frozen(backbone(classes=3))}},
            r"the teacher's logits is \(3,\), of the student's \(10,\).*trained on the same classes",
        ),
    ],
)
def test_bad_input_is_told_before_training(
    method: type[Task], network: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build(method, network, **settings)


def test_a_source_that_is_not_there_is_told() -> None:
    task = build(ExitsDistilled, loss=ExitDistillationLoss(source="teacher"))
    with pytest.raises(ValueError, match=re.escape("give teacher.ckpt_path")):
        fit(task, epochs=1)
