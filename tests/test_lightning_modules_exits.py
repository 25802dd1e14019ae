from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from cleave.architectures import MultiExitNetwork
from cleave.datamodules import Digits
from cleave.deployment import build_policy, offline
from cleave.lightning_modules import ExitsDistilled, ExitsJoint, ExitsSeparate, ExitTask, Teacher, ZeroTimeWaste
from cleave.losses import ExitDistillationLoss, GeometricEnsembleLoss, JointExitLoss, geometric_ensemble

from .split_tasks import ADAM, NAMES, Logged, backbone, batch, batches, changed, fit, snapshot, trainer_of

SPLIT = {"split": "layer2", "bottleneck": {"channels": 3, "width": 8}, "codec": {"bits": 4}}
OBJECTIVES: dict[type[ExitTask], Any] = {
    ExitsJoint: JointExitLoss,
    ExitsSeparate: JointExitLoss,
    ExitsDistilled: ExitDistillationLoss,
    ZeroTimeWaste: GeometricEnsembleLoss,
}


def multi_exit(**settings: Any) -> MultiExitNetwork:
    torch.manual_seed(1)
    return MultiExitNetwork(backbone(), torch.randn(2, 1, 8, 8), **{"at": ["layer1", "layer2"]} | settings)


def build(method: type[ExitTask], network: dict[str, Any] | None = None, **settings: Any) -> ExitTask:
    """A task of a method, with its objective's defaults."""
    needs = {"cascade": True, "ensemble": True} if method is ZeroTimeWaste else {}
    settings = {"objective": OBJECTIVES[method]()} | settings
    return method(multi_exit(**needs | (network or {})), NAMES, ADAM, **settings)


def logits_of(task: ExitTask, images: Tensor) -> list[Tensor]:
    return task.network.classify(task.network.reduced(images))


@pytest.mark.parametrize("weights", ["equal", "branchynet", "linear", "shallow_deep", "learned", [0.2, 0.5, 1.0]])
def test_joint_training_weighs_each_exits_cross_entropy(weights: Any) -> None:
    task = build(ExitsJoint, objective=JointExitLoss(weights)).double()
    task.set_modes()
    images, labels = batch(torch.float64)
    expected = [torch.nn.functional.cross_entropy(logits, labels) for logits in logits_of(task, images)]
    found = task.training_loss((images, labels))
    factors = task.objective.weights_at(3, 1.0).tolist()
    assert list(found) == ["exit/layer1", "exit/layer2", "exit/final"]
    for value, loss, factor in zip(found.values(), expected, factors, strict=True):
        torch.testing.assert_close(value, factor * loss, rtol=1e-6, atol=1e-9)


def test_the_gradient_of_the_total_is_the_weighted_sum_of_single_gradients() -> None:
    task = build(ExitsJoint, objective=JointExitLoss([0.2, 0.5, 1.0])).double()
    task.set_modes()
    images, labels = batch(torch.float64)
    stem = next(task.network.stages.parameters())

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, stem, retain_graph=True)[0]

    total = gradient(torch.stack(list(task.training_loss((images, labels)).values())).sum())
    single = [gradient(torch.nn.functional.cross_entropy(own, labels)) for own in logits_of(task, images)]
    torch.testing.assert_close(total, 0.2 * single[0] + 0.5 * single[1] + single[2])


def test_growing_weights_follow_the_training() -> None:
    task, seen = build(ExitsJoint, objective=JointExitLoss("shallow_deep")), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(task.objective.weights_at(3, task.progress()).tolist())

    fit(task, [Watch()], epochs=2)
    shares = task.network.cost_shares()
    assert seen[0] == pytest.approx([0.01, 0.01, 1.0])
    assert seen[-1] == pytest.approx([shares[0], shares[1], 1.0])
    assert [weights[0] for weights in seen] == sorted({weights[0] for weights in seen})


def test_learned_weights_learn() -> None:
    task = build(ExitsJoint, objective=JointExitLoss("learned"))
    fit(task, epochs=2)
    assert (task.objective.weights_at(3, 1.0) != 1).all()


TRAINED = [
    (ExitsJoint, {}, None, {"backbone", "heads"}),
    (ExitsJoint, SPLIT, None, {"backbone", "bottleneck", "heads"}),
    (ExitsJoint, SPLIT, ["bottleneck"], {"bottleneck"}),
    (ExitsJoint, {}, ["backbone"], {"backbone"}),
    (ExitsSeparate, {}, None, {"heads"}),
    (ExitsSeparate, {"cascade": True}, ["exit2"], {"heads.1"}),
    (ExitsDistilled, {}, None, {"backbone", "heads"}),
    (ExitsDistilled, {}, ["heads"], {"heads"}),
    (ZeroTimeWaste, {}, None, {"ensemble"}),
]


@pytest.mark.parametrize(("method", "network", "train", "learns"), TRAINED)
def test_frozen_parts_stay_equal_in_every_bit(
    method: type[ExitTask], network: dict[str, Any], train: list[str] | None, learns: set[str]
) -> None:
    task, modes = build(method, network, train=train), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
            if index == 0:
                modes.append({name: part.training for name, part in ExitTask.parts(task.network).items()})

    before = snapshot(task.network)
    fit(task, [Watch()], epochs=2)
    moved = changed(before, task.network)
    prefixes = {"backbone": "stages."}
    allowed = tuple(prefixes.get(part, part if "." in part else f"{part}.") for part in learns)
    assert moved
    assert all(name.startswith(allowed) for name in moved)
    assert all(any(name.startswith(prefix) for name in moved) for prefix in allowed)
    expected = {name: name in task.trained_parts for name in ExitTask.parts(task.network)}
    assert modes == [expected, expected]


@pytest.mark.parametrize("source", ["final", "next", "teacher"])
def test_distillation_learns_from_whom_it_says(source: str) -> None:
    other = backbone(seed=5)
    objective = ExitDistillationLoss(source=source, alpha=0.3, temperature=2.0)
    task = build(ExitsDistilled, objective=objective, teacher=Teacher(other)).double()
    assert (task._teacher is None) == (source != "teacher")
    other.double()
    task.set_modes()
    images, labels = batch(torch.float64)
    own = logits_of(task, images)
    found = list(task.training_loss((images, labels)).values())
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
    torch.testing.assert_close(list(task.training_loss((images, labels)).values()), expected)


# --- frozen features ------------------------------------------------------------------------------------------------


def digits(tmp_path: Path, method: type[ExitTask], use: bool, network: dict[str, Any], **settings: Any) -> ExitTask:
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
        (ExitsDistilled, {"train": ["heads"]}),
        (ZeroTimeWaste, {}),
    ],
)
def test_a_frozen_backbone_runs_once_and_gives_equal_losses(
    method: type[ExitTask], settings: dict[str, Any], tmp_path: Path
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
    for network in ({}, {"at": ["layer1", "layer3"]}, {"heads": {"size": 4}}, {"cascade": True}):
        digests.add(build(ExitsSeparate, network).frozen_digest())
    assert len(digests) == 3  # a cascade reads the same features
    task = build(ExitsSeparate)
    with torch.no_grad():
        next(task.network.stages.parameters()).add_(1e-3)
    assert task.frozen_digest() not in digests


# --- evaluation -----------------------------------------------------------------------------------------------------


def measured(task: ExitTask) -> dict[str, float]:
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
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    task.network.eval()
    with torch.no_grad():
        logits = torch.stack(logits_of(task, images))
    answers = logits
    if kind == "ensemble":
        means = torch.arange(1, 4).reciprocal().unsqueeze(1).expand(3, 3).tril()
        answers = geometric_ensemble(list(logits), means, torch.zeros(3, 10))
    accuracies = (answers.argmax(2) == labels).double().mean(1)
    for name, accuracy in zip(task.network.exit_names, accuracies, strict=True):
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
        sent = 3 * task.network.bottleneck.shape[1] * task.network.bottleneck.shape[2] // 2  # 4 bits a value
        assert found["test/payload_bytes"] == sent
        assert found["test/policy/payload_bytes"] == pytest.approx(sent * (left.index > 0).double().mean().item())
    else:
        assert not any("payload" in name for name in found)


def test_an_ensemble_is_tested_with_what_it_has_learned() -> None:
    task = build(ZeroTimeWaste, policy={"kind": "ensemble"})
    with torch.no_grad():
        task.network.ensemble.log_bias[:, 3] = 5.0  # as if it had learned that all is class 3
    found = measured(task)
    labels = torch.cat([labels for _, labels in batches()])
    assert found["test/policy/acc"] == pytest.approx((labels == 3).double().mean().item())
    assert found["test/policy/acc"] == found["test/acc"]
    task.use_policy(build_policy("confidence", None, exits=3))
    own = torch.cat([logits_of(task.eval(), images)[-1] for images, _ in batches()])
    assert measured(task)["test/acc"] == pytest.approx((own.argmax(1) == labels).double().mean().item())


@pytest.mark.parametrize("method", [ExitsSeparate, ZeroTimeWaste])
def test_validation_measures_ensembles_only_where_they_are_trained(method: type[ExitTask]) -> None:
    task = build(method, {"ensemble": True})
    with torch.no_grad():
        task.network.ensemble.log_bias[:, 3] = 50.0
    trainer = trainer_of()
    trainer.validate(task, batches(), verbose=False)
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    own = logits_of(task.eval(), images)[-1].argmax(1)
    expected = torch.full_like(labels, 3) if method is ZeroTimeWaste else own
    assert trainer.callback_metrics["val/acc"].item() == pytest.approx((expected == labels).double().mean().item())


@pytest.mark.parametrize(
    ("method", "network", "objective"),
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
    method: type[ExitTask], network: dict[str, Any], objective: Any
) -> None:
    task = build(method, network, objective=objective)
    task.setup("fit")
    task.set_modes()
    task.progress = lambda: 0.0  # type: ignore[method-assign]
    torch.stack(list(task.training_loss(batch()).values())).sum().backward()
    assert not [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]


def test_the_scales_of_an_ensemble_do_not_decay() -> None:
    task = build(ZeroTimeWaste)
    task.setup("fit")
    assert [group["weight_decay"] for group in task.parameter_groups()] == [0.0]


@pytest.mark.parametrize("codec", [{"bits": 32}, {"bits": 4, "range": "sample"}])
def test_a_frozen_bottleneck_whose_range_is_not_measured_may_have_been_trained(codec: dict[str, Any]) -> None:
    task = build(ExitsSeparate, SPLIT | {"codec": codec})
    before = snapshot(task.network.bottleneck)
    fit(task, epochs=1)
    assert not changed(before, task.network.bottleneck)


def test_what_would_train_for_nothing_is_told_before_training() -> None:
    for run in (fit, measured):
        with pytest.raises(ValueError, match="codec.range=.* which this network's bottleneck has not seen; train it"):
            run(build(ExitsSeparate, SPLIT))
    with pytest.raises(ValueError, match="grow until the end of the run, which has none; set max_epochs"):
        fit(build(ExitsJoint, objective=JointExitLoss("shallow_deep")), epochs=-1)


@pytest.mark.parametrize(
    ("method", "network", "settings", "words"),
    [
        (ExitsSeparate, {}, {"objective": JointExitLoss("final")}, "leave nothing to train of exit1, exit2"),
        (ExitsJoint, {}, {"train": ["head"]}, "train names 'head'.*Did you mean 'heads'"),
        (ExitsJoint, {}, {"train": "heads"}, r"write train=\[heads\]"),
        (ExitsJoint, {}, {"train": ["bottleneck"]}, "trains nothing"),
        (ExitsJoint, {"ensemble": True}, {"train": ["ensemble"]}, "objective does not reach; use method=zero_time"),
        (ExitsJoint, {}, {"objective": JointExitLoss([1.0, 1.0])}, "weights has 2 numbers, but there are 3 exits"),
        (ExitsJoint, {}, {"policy": {"kind": "confidence", "thresholds": [0.5] * 3}}, "thresholds"),
        (ExitsJoint, {}, {"policy": {"kind": "confidence", "thresholds": 1.5}}, r"1\.5"),
        (ExitsSeparate, {}, {"train": ["backbone"]}, "separate training keeps frozen"),
        (ZeroTimeWaste, {"ensemble": False}, {}, "exits.ensemble=true"),
        (
            ExitsDistilled,
            {},
            {"objective": ExitDistillationLoss(source="teacher"), "teacher": Teacher(backbone(classes=3))},
            "the teacher knows 3 classes",
        ),
    ],
)
def test_bad_input_is_told_before_training(
    method: type[ExitTask], network: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build(method, network, **settings)


def test_a_source_that_is_not_there_is_told() -> None:
    task = build(ExitsDistilled, objective=ExitDistillationLoss(source="teacher"))
    with pytest.raises(ValueError, match=re.escape("give teacher.ckpt_path")):
        fit(task, epochs=1)
