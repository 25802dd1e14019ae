"""What a task makes of any terms, frozen networks and evaluators, whatever the method."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torchmetrics import MeanMetric

from cleave.architectures import CutError, StagedNetwork, staged_network
from cleave.deployment import ENVELOPE_BYTES
from cleave.lightning_modules import (
    Classification,
    CrossEntropy,
    Evaluator,
    ExitsJoint,
    Frozen,
    GeneralizedHeadDistillation,
    HeadDistillation,
    Measured,
    Reconstruction,
    Task,
    Term,
    default_evaluators,
    privates,
)
from cleave.lightning_modules.callbacks import LastCheckpoint
from cleave.losses import (
    GeneralizedHeadDistillationLoss,
    HeadDistillationLoss,
    JointExitLoss,
    KnowledgeDistillationLoss,
    ReconstructionLoss,
)

from .split_tasks import (
    NAMES,
    Logged,
    backbone,
    batch,
    batches,
    changed,
    evaluate,
    fit,
    losses,
    snapshot,
    split_network,
    teacher,
    training,
    whole,
)

LABELS = ["student/logits", "labels"]
CE = {"ce": Term(nn.CrossEntropyLoss(), LABELS)}


class Guess(nn.Module):
    """An attacker that reads the representation and guesses the mean of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 1)

    def forward(self, z: Tensor, images: Tensor) -> dict[str, Tensor]:
        guessed = self.layer(z.flatten(1)).squeeze(1)
        return {"error": (guessed - images.mean((1, 2, 3))).square().mean(), "size": 0.01 * guessed.square().mean()}


def guess(weight: float = 1.0) -> Term:
    torch.manual_seed(3)
    return Term(Guess(), ["student/layer2/sent", "images"], weight)


def everything(**settings: Any) -> StagedNetwork:
    """Exits before and behind two bottlenecks."""
    torch.manual_seed(1)
    arguments = {"split": ["layer1", "layer2"], "form": "insert", "exits": ["layer1", "layer3"], "codec": {"bits": 4}}
    arguments |= {"bottleneck": {"channels": 3, "width": 8}}
    return staged_network(backbone().eval(), torch.randn(2, 1, 8, 8), **arguments | settings)


# --- terms with parameters ------------------------------------------------------------------------------------------


def attacked(**settings: Any) -> CrossEntropy:
    extra = {"privacy": guess()}
    return CrossEntropy(split_network(), loss=nn.CrossEntropyLoss(), extra_terms=extra, training=training(), **settings)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_term_with_parameters_learns_is_saved_and_resumes_exactly(tmp_path: Path) -> None:
    task, logged = attacked(), Logged()
    before = snapshot(task.terms["privacy"])
    whole_run = fit(task, [logged], epochs=2)
    assert changed(before, task.terms["privacy"]) == set(before)
    assert logged.steps[0].keys() == {"loss", "returned", "cross_entropy", "privacy/error", "privacy/size"}
    groups = whole_run.optimizers[0].param_groups
    assert [p.shape for p in groups[-1]["params"]] == [(1, 48), (1,)]
    assert groups[-1]["weight_decay"] == 0.0

    first, saved = attacked(), ModelCheckpoint(tmp_path, filename="x")
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[saved]
    ).fit(first, batches(), batches())  # fmt: skip
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {name for name in state if name.startswith("terms.")} == {
        "terms.privacy.loss.layer.weight",
        "terms.privacy.loss.layer.bias",
    }
    resumed = attacked()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[saved]
    )  # fmt: skip
    trainer.fit(resumed, batches(), batches(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert not changed(snapshot(task), resumed)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_term_of_weight_0_changes_nothing_of_the_network(clip: float | None) -> None:
    found = []
    for extra in ({}, {"privacy": guess(weight=0.0)}):
        task = CrossEntropy(split_network(), loss=nn.CrossEntropyLoss(), extra_terms=extra, training=training())
        fit(task, gradient_clip_val=clip)
        found.append(snapshot(task.network))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_terms_that_train_does_not_name_are_frozen() -> None:
    extra = {"one": guess(), "two": guess()}
    task = CrossEntropy(
        split_network(),
        loss=nn.CrossEntropyLoss(),
        extra_terms=extra,
        train=["bottleneck", "terms/one"],
        training=training(),
    )
    before = snapshot(task.terms)
    fit(task, epochs=1)
    assert changed(before, task.terms) == {"one.loss.layer.weight", "one.loss.layer.bias"}


def test_a_next_step_takes_over_terms_of_the_same_name_and_shape() -> None:
    first, second = attacked(), attacked()
    with torch.no_grad():
        first.terms["privacy"].loss.layer.bias.fill_(3.0)
    state = first.state_dict() | {"terms.privacy.loss.layer.weight": torch.zeros(1, 7)}
    assert second.take_over_terms(state) == ["terms.privacy.loss.layer.bias"]
    assert second.terms["privacy"].loss.layer.bias.item() == 3.0


def test_a_term_may_learn_alone_on_a_frozen_network() -> None:
    task = Task(split_network(codec={"bits": 4, "range": "sample"}), {"p": guess()}, train=["terms/p"])
    before = snapshot(task.network)
    fit(task, epochs=1)
    assert not changed(before, task.network)


# --- families compose -----------------------------------------------------------------------------------------------


def test_extra_terms_stand_on_exits_and_train_them() -> None:
    extra = {"early": Term(nn.CrossEntropyLoss(), ["student/layer1/logits", "labels"])}
    common: dict[str, Any] = {"loss": HeadDistillationLoss(), "others": teacher(), "training": training()}
    plain = HeadDistillation(everything(), **common)
    assert "exits/layer1" not in plain.trained_parts
    task, logged = HeadDistillation(everything(), extra_terms=extra, **common), Logged()
    assert task.trained_parts[-1] == "exits/layer1"
    before = {name: snapshot(nn.ModuleList(modules)) for name, modules in task.network.parts().items()}
    fit(task, [logged], epochs=1)
    after = {name: nn.ModuleList(modules) for name, modules in task.network.parts().items()}
    assert {name for name in before if changed(before[name], after[name])} == set(task.trained_parts)
    assert logged.steps[0].keys() == {"loss", "returned", "head/layer1", "head/layer2", "early"}


def test_exits_learn_from_features_a_teacher_and_a_reconstruction_at_once() -> None:
    extra = {
        "kd": Term(KnowledgeDistillationLoss(), ["student/logits", "teacher/logits", "labels"], 0.5),
        "ghnd": Term(GeneralizedHeadDistillationLoss({"layer3": 1.0}), [["student/layer3"], ["teacher/layer3"]], 0.1),
        "r": Term(ReconstructionLoss(), ["student/layer2", "student/layer2/input"], 0.1),
    }
    task, logged = ExitsJoint(everything(), loss=JointExitLoss(), others=teacher(), extra_terms=extra), Logged()
    fit(task, [logged], epochs=1)
    names = {"exit/layer1", "exit/layer3", "exit/final", "kd", "ghnd/layer3", "r"}
    assert logged.steps[0].keys() == names | {"loss", "returned"}


def test_of_several_bottlenecks_each_is_compared_and_measured() -> None:
    task = Reconstruction(everything(), loss=ReconstructionLoss(), training=training())
    assert list(losses(task, *batch())) == ["reconstruction/layer1", "reconstruction/layer2"]
    fit(task, epochs=1)
    found = evaluate(task)
    sent = {cut: ENVELOPE_BYTES + b.shape[1] * b.shape[2] * 3 // 2 for cut, b in task.network.bottlenecks.items()}
    assert found["test/payload_bytes"] == sum(sent.values())
    assert {cut: found[f"test/payload_bytes/{cut}"] for cut in sent} == sent
    assert "test/payload_to_input" in found
    assert "test/payload_to_feature" not in found  # of which of the two?
    assert task.measured().payload_bytes == sent


def test_a_policy_counts_the_bytes_of_each_bottleneck_behind_the_exit() -> None:
    network = everything()
    task = ExitsJoint(network, loss=JointExitLoss(), training=training())
    fit(task, epochs=1)
    with torch.no_grad():
        sure = network.eval().outputs(whole()[0], ["layer1/logits"])["layer1/logits"].softmax(1).amax(1)
    settings = {"kind": "confidence", "thresholds": sure.median().item()}
    task.evaluate_with(default_evaluators(network, NAMES, settings))
    found = evaluate(task)
    at_first = found["test/policy/share/layer1"]
    assert 0 < at_first < 1
    expected = found["test/payload_bytes"] * (1 - at_first)  # an exit stands before both
    assert found["test/policy/payload_bytes"] == pytest.approx(expected)


def test_exits_around_codes_of_several_widths_are_measured_at_each() -> None:
    network = everything(split="layer2", codec={"bits": 4, "widths": [2, 4]})
    task = ExitsJoint(network, loss=JointExitLoss(), training=training())
    fit(task, epochs=3)
    runs: list[int] = []
    task.network.stages[0].register_forward_hook(lambda *_: runs.append(1))
    found = evaluate(task)
    assert len(runs) == 3  # once a batch, whatever the widths
    network.eval()
    images, labels = whole()
    for bits in (2, 4):
        network.set_bits(bits)
        with torch.no_grad():
            accuracy = (network(images).argmax(1) == labels).double().mean().item()
        assert found[f"test/bits{bits}/acc"] == pytest.approx(accuracy)
    measured = task.measured()
    assert [(width.bits, width.payload_bytes) for width in measured.widths] == [
        (bits, found[f"test/bits{bits}/payload_bytes"]) for bits in (2, 4)
    ]
    assert [width.accuracy for width in measured.widths] == [found[f"test/bits{bits}/acc"] for bits in (2, 4)]
    assert list(measured.exits) == ["layer1", "layer3", "final"]


def test_what_a_test_measured_is_plain_and_comes_back_from_logged_values() -> None:
    network = everything()
    evaluators = default_evaluators(network, NAMES, {"kind": "confidence", "thresholds": 0.12})
    task = ExitsJoint(network, loss=JointExitLoss(), evaluators=evaluators, training=training())
    fit(task, epochs=1)
    found = evaluate(task)
    measured = task.measured()
    assert measured == task.measured(json.loads(json.dumps(found)))
    assert measured.accuracy == found["test/acc"]
    (width,) = measured.widths
    assert (width.bits, width.accuracy, width.payload_bytes) == (4, found["test/acc"], found["test/payload_bytes"])
    assert measured.policy is not None
    assert sum(measured.policy.shares.values()) == pytest.approx(1)
    assert json.loads(json.dumps(measured.to_dict()))["policy"]["macs"] == found["test/policy/macs"]
    assert task.measured({}) == Measured()


# --- other networks -------------------------------------------------------------------------------------------------


def test_any_frozen_network_is_run_by_its_name_and_recorded(tmp_path: Path) -> None:
    host = Frozen(backbone(seed=4), "host.ckpt", "1" * 64)
    extra = {"like": Term(HeadDistillationLoss(), ["student/layer3", "host/layer3"])}
    arguments: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "extra_terms": extra}
    task = CrossEntropy(split_network(), others={"host": host, "teacher": teacher()["teacher"]}, **arguments)
    assert list(task.others) == ["host"]
    task.set_modes()
    images, labels = batch()
    features: list[Tensor] = []
    host.network.layer3.register_forward_hook(lambda *found: features.append(found[-1].clone()))
    with torch.no_grad():
        host.network(images)
    twin = copy.deepcopy(task.network)
    expected = (twin.outputs(images, ["layer3"])["layer3"] - features[0]).square().sum() / len(images)
    assert losses(task, images, labels)["like"].item() == pytest.approx(expected.item(), rel=1e-5)
    checkpoint: dict[str, Any] = {}
    task.on_save_checkpoint(checkpoint)
    assert checkpoint == {"others": {"host": {"path": "host.ckpt", "sha256": "1" * 64}}}
    checkpoint["others"]["host"]["sha256"] = "2" * 64
    with pytest.raises(ValueError, match=r"trained with the host 'host.ckpt'.*same file as host\.ckpt_path"):
        task.on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"CrossEntropy needs a host; give host\.ckpt_path"):
        fit(CrossEntropy(split_network(), **arguments))


def test_a_teacher_of_ours_teaches_as_it_is_and_uncut_where_logits_alone_are_asked() -> None:
    plain = staged_network(backbone(), torch.randn(2, 1, 8, 8))
    logits = {"kd": Term(KnowledgeDistillationLoss(), ["student/logits", "teacher/logits", "labels"])}
    task = Task(split_network(), logits, others={"teacher": Frozen(plain)})
    assert task.network_of("teacher") is plain
    task = Task(split_network(), logits, others={"teacher": Frozen(backbone())})
    assert task.network_of("teacher").cuts == ()
    task = HeadDistillation(split_network(), loss=HeadDistillationLoss(), others={"teacher": Frozen(plain)})
    assert task.network_of("teacher").cuts == ("layer2",)
    split = split_network(form="insert")
    task = HeadDistillation(split_network(), loss=HeadDistillationLoss(), others={"teacher": Frozen(split)})
    assert task.network_of("teacher") is split


# --- refusals -------------------------------------------------------------------------------------------------------


def ce(**settings: Any) -> CrossEntropy:
    return CrossEntropy(split_network(), loss=nn.CrossEntropyLoss(), **settings)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "output_that_is_not_there": (
        lambda: Task(split_network(), {"x": Term(nn.CrossEntropyLoss(), ["student/logit", "labels"])}),
        CutError,
        "no output 'logit'.*Did you mean 'logits'",
    ),
    "exits_of_a_network_without": (
        lambda: ExitsJoint(split_network(), loss=JointExitLoss()),
        CutError,
        "this network has no exits",
    ),
    "term_that_reads_nothing_trained": (
        lambda: ce(train=["tail"], extra_terms={"r": Term(HeadDistillationLoss(), ["student/layer2", "images"])}),
        ValueError,
        r"the term 'r' reads student/layer2, images, of which nothing is trained by train=\['tail'\]",
    ),
    "term_of_frozen_networks": (
        lambda: ce(others=teacher(), extra_terms={"t": Term(nn.CrossEntropyLoss(), ["teacher/logits", "labels"])}),
        ValueError,
        "the term 't' reads teacher/logits, labels, of which nothing is trained",
    ),
    "term_whose_parameters_are_frozen_too": (
        lambda: Task(split_network(), CE | {"p": guess()}, train=["tail", "terms/ce"]),
        ValueError,
        "the term 'p' reads student/layer2/sent, images, of which nothing is trained",
    ),
    "unknown_term_in_train": (
        lambda: ce(train=["tail", "terms/cross_entrpy"]),
        ValueError,
        "train names 'terms/cross_entrpy', but there are .*Did you mean 'terms/cross_entropy'",
    ),
    "part_of_another_kind_of_network": (
        lambda: ce(train=["exits"]),
        ValueError,
        "train names 'exits', which this network lacks: its parts are ",
    ),
    "no_term": (lambda: Task(split_network(), {}), ValueError, "a task needs at least one term"),
    "policy_without_exits": (
        lambda: ce(evaluators=default_evaluators(split_network(), NAMES, {"kind": "confidence"})),
        ValueError,
        "an exit policy has no meaning here: the network has no exits",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_training(case: str) -> None:
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


def test_a_loss_that_follows_the_progress_needs_an_end() -> None:
    class Growing(nn.Module):
        def forward(self, logits: Tensor, labels: Tensor, progress: float) -> Tensor:
            seen.append(progress)
            return (1 + progress) * nn.functional.cross_entropy(logits, labels)

    def task() -> Task:
        return Task(split_network(), {"grow": Term(Growing(), [*LABELS, "progress"])})

    seen: list[float] = []
    fit(task(), epochs=2)
    assert seen == pytest.approx([i / 5 for i in range(6)])
    with pytest.raises(ValueError, match="term 'grow' grow until the end of the run, which has none; set max_epochs"):
        fit(task(), epochs=-1)


def test_several_processes_are_told_what_widths_need(monkeypatch: pytest.MonkeyPatch) -> None:
    task = CrossEntropy(split_network(codec={"bits": 4, "widths": [2, 4]}), loss=nn.CrossEntropyLoss())
    monkeypatch.setattr(privates, "misses_unused", lambda trainer: True)
    with pytest.raises(ValueError, match="strategy=ddp_find_unused_parameters_true"):
        fit(task)


# --- evaluators -----------------------------------------------------------------------------------------------------


class Power(Evaluator):
    """Mean square of what is sent, at every width."""

    every_width = True
    shown = ("power",)

    def __init__(self) -> None:
        super().__init__()
        self.power = MeanMetric()
        self.widths: list[int | None] = []

    def monitor(self, trained: Any) -> str:
        return "val/power"

    def needs(self, stage: str, network: StagedNetwork) -> list[str]:
        return ["layer2/sent"]

    def update(self, stage: str, passed: Any) -> None:
        self.widths.append(passed.bits)
        self.power.update(passed["layer2/sent"].square())

    def compute(self, stage: str) -> dict[str, Tensor]:
        return {"power": self.power.compute()}


def test_an_evaluator_of_ones_own_measures_what_it_asks_for_and_nothing_else_runs() -> None:
    network = split_network(codec={"bits": 4, "widths": [2, 4]})
    task = CrossEntropy(network, loss=nn.CrossEntropyLoss(), evaluators=[Power()])
    assert task.monitor == "val/power"
    trainer = fit(task, epochs=1)
    assert trainer.callback_metrics["val/power"] > 0
    tails: list[int] = []
    network.stages[-1].register_forward_hook(lambda *_: tails.append(1))
    task.evaluators[0].widths.clear()
    assert set(evaluate(task)) == {"test/power"}
    assert task.evaluators[0].widths == [2, 4] * 3
    assert tails == []


def test_the_best_weights_are_chosen_by_what_is_trained() -> None:
    assert ce().monitor == "val/acc"
    assert ExitsJoint(everything(), loss=JointExitLoss()).monitor == "val/acc_exits"
    assert ExitsJoint(everything(), loss=JointExitLoss(), train=["backbone"]).monitor == "val/acc"
    assert ce(training=training(monitor="val/loss")).monitor == "val/loss"


# --- layers, before a network exists --------------------------------------------------------------------------------


def test_the_layers_of_a_configs_terms() -> None:
    like = {"of": ["student/layer3", "teacher/layer4"]}
    nested = {"of": [["student/layer1/input", "student/logits"], ["teacher/layer1"], "labels"]}
    settings = {"extra_terms": {"a": like, "b": nested}, "loss": {"weights": {"layer2": 1.0, "layer5": 0, "logits": 1}}}
    assert CrossEntropy.layers(["layer2"], settings) == ["layer3", "layer1"]
    assert CrossEntropy.layers(["layer2"], settings, "teacher") == ["layer4", "layer1"]
    assert HeadDistillation.layers(["layer9"], settings) == ["layer9", "layer3", "layer1"]
    assert GeneralizedHeadDistillation.layers(["layer9"], settings) == ["layer2", "layer3", "layer1"]
    assert Task.layers([], {"terms": {"a": like}}) == ["layer3"]
    assert Classification.layers([], {"label_smoothing": 0.1}) == []
    assert ExitsJoint.layers([], {"extra_terms": {"x": {"of": ["student/exits", "student/layer2/z"]}}}) == ["layer2"]


# --- reaches into Lightning -----------------------------------------------------------------------------------------


def test_reaches_into_lightning(tmp_path: Path) -> None:
    last = LastCheckpoint(str(tmp_path), every_n_train_steps=2)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=0, callbacks=[last]
    )  # fmt: skip
    trainer.fit(ce(), batches(), batches())
    assert (tmp_path / "last.ckpt").is_file()
    assert privates.logged_steps(trainer) == 3
    privates.set_logged_steps(trainer, 7)
    assert privates.logged_steps(trainer) == 7
    assert not privates.misses_unused(trainer)

    class Two:
        world_size = 2

        def __init__(self, strategy: Any) -> None:
            self.strategy = strategy

    assert privates.misses_unused(Two(DDPStrategy()))  # type: ignore[arg-type]
    assert not privates.misses_unused(Two(DDPStrategy(find_unused_parameters=True)))  # type: ignore[arg-type]
