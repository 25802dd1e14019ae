"""What holds for every method of split training, whatever its objective."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zstandard
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.architectures import (
    BitErrors,
    CutError,
    EntropyBottleneck,
    GaussianNoise,
    PacketLoss,
    StagedNetwork,
    SwitchableBatchNorm2d,
    create_backbone,
    entropy_codec,
    staged_network,
)
from cleave.architectures.backbones.zoo import CifarVGG
from cleave.architectures.inserts.switchable import draw_width
from cleave.datamodules import Digits
from cleave.datamodules.sources import ImageSource
from cleave.deployment import ENVELOPE_BYTES
from cleave.lightning_modules import (
    CrossEntropy,
    Entropic,
    Frozen,
    GeneralizedHeadDistillation,
    HeadDistillation,
    InformationBottleneck,
    KnowledgeDistillation,
    Reconstruction,
    Task,
    Term,
)
from cleave.losses import (
    GeneralizedHeadDistillationLoss,
    HeadDistillationLoss,
    KnowledgeDistillationLoss,
    RateLoss,
    ReconstructionLoss,
)

from .split_tasks import (
    ENTROPY,
    LOSSES,
    VARIANCE,
    Logged,
    backbone,
    batch,
    batches,
    bottleneck_of,
    build,
    changed,
    codes,
    evaluate,
    fit,
    losses,
    parts_of,
    snapshot,
    split_network,
    teacher,
    through_bytes,
    trainer_of,
    whole,
    without_prior,
)

PARTS = ("head", "encoder", "quantizer", "decoder", "tail")
BOTTLENECK = ("encoder", "quantizer", "decoder")
INSERT: dict[str, Any] = {"form": "insert"}
NONE = {"form": "none"}
WIDTHS = {"codec": {"bits": 4, "widths": [2, 4]}}
NOISY = {"channel": GaussianNoise(snr_db=10)}
CONSTANT = {"bottleneck": {"channels": 3, "width": 8, "variance": 0.01}}


LABELS = ["student/logits", "labels"]
DISTILLATION = ["student/logits", "teacher/logits", "labels"]


def feature(layer: str, weight: float = 1.0) -> Term:
    return Term(HeadDistillationLoss(), [f"student/{layer}", f"teacher/{layer}"], weight)


def ranged(kind: str) -> dict[str, Any]:
    return {"codec": {"bits": 4, "range": kind}}


# method, network, train (None: the method's own), and the parts that must then learn
CASES: dict[str, tuple[type[Task], dict[str, Any], list[str] | None, tuple[str, ...]]] = {
    "ce_replace": (CrossEntropy, {}, None, PARTS),
    "ce_insert": (CrossEntropy, INSERT, None, PARTS),
    "ce_none": (CrossEntropy, NONE | ranged("learned"), None, PARTS),
    "ce_bottleneck": (CrossEntropy, INSERT, ["bottleneck"], BOTTLENECK),
    "ce_bottleneck_replace": (CrossEntropy, ranged("learned"), ["bottleneck"], BOTTLENECK),
    "ce_tail": (CrossEntropy, INSERT | ranged("sample"), ["tail"], ("tail",)),
    "ce_float": (CrossEntropy, {"codec": {"bits": 32}}, ["encoder", "decoder"], ("encoder", "decoder")),
    "ce_frozen_range": (CrossEntropy, ranged("learned"), ["encoder", "decoder"], ("encoder", "decoder")),
    "ce_frozen_prior": (CrossEntropy, ENTROPY, ["encoder", "decoder"], ("encoder", "decoder")),
    "ce_widths": (CrossEntropy, WIDTHS, None, PARTS),
    "ce_noisy_link": (CrossEntropy, INSERT | NOISY, ["bottleneck"], BOTTLENECK),
    "kd_replace": (KnowledgeDistillation, {}, None, PARTS),
    "kd_insert": (KnowledgeDistillation, INSERT, None, PARTS),
    "kd_server": (KnowledgeDistillation, ranged("learned"), ["decoder", "tail"], ("decoder", "tail")),
    "kd_server_entropy": (KnowledgeDistillation, ENTROPY, ["decoder", "tail"], ("decoder", "tail")),
    "kd_server_variance": (KnowledgeDistillation, VARIANCE, ["decoder", "tail"], ("decoder", "tail")),
    "reconstruction": (Reconstruction, INSERT, None, BOTTLENECK),
    "reconstruction_learned": (Reconstruction, INSERT | ranged("learned"), None, BOTTLENECK),
    "reconstruction_variance": (Reconstruction, INSERT | VARIANCE, None, BOTTLENECK),
    "hnd_replace": (HeadDistillation, {}, None, BOTTLENECK),
    "hnd_insert": (HeadDistillation, INSERT, None, BOTTLENECK),
    "hnd_sample": (HeadDistillation, ranged("sample"), None, BOTTLENECK),
    "hnd_decoder": (HeadDistillation, ranged("learned"), ["decoder"], ("decoder",)),
    "hnd_widths": (HeadDistillation, WIDTHS, None, BOTTLENECK),
    "ghnd_replace": (GeneralizedHeadDistillation, {}, None, BOTTLENECK),
    "ghnd_insert": (GeneralizedHeadDistillation, INSERT, None, BOTTLENECK),
    "ghnd_widths": (GeneralizedHeadDistillation, WIDTHS, None, BOTTLENECK),
    "vib_replace": (InformationBottleneck, VARIANCE, None, PARTS),
    "vib_insert": (InformationBottleneck, INSERT | VARIANCE, None, PARTS),
    "vib_constant": (InformationBottleneck, INSERT | CONSTANT, ["bottleneck"], BOTTLENECK),
    "entropic_replace": (Entropic, ENTROPY, None, BOTTLENECK),
    "entropic_insert": (Entropic, INSERT | ENTROPY, None, BOTTLENECK),
}
# What `make test` leaves out: other pairs of a method and a network, each of which it runs in another pair.
SLOW = {
    *("ce_insert", "ce_bottleneck_replace", "ce_frozen_prior", "kd_replace", "kd_server", "kd_server_variance"),
    *("reconstruction", "reconstruction_variance", "hnd_insert", "hnd_sample", "hnd_widths"),
    *("ghnd_replace", "ghnd_widths", "vib_insert", "entropic_replace"),
}


def cases(names: Iterable[str], slow: set[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in names]


class Modes(pl.Callback):
    """Whether every part had its mode, at the first step of each epoch."""

    def __init__(self, learning: tuple[str, ...]) -> None:
        self.learning = learning
        self.right: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            parts = module.network.parts().items()
            modes = [(name.partition("/")[0], {m.training for p in part for m in p.modules()}) for name, part in parts]
            right = all(found == {name in self.learning} for name, found in modes)
            others = [frozen.network for frozen in module.others.values()]
            frozen = not any(m.training for other in others for m in other.modules())
            self.right.append(right and frozen)


def teacher_of(task: Task) -> StagedNetwork:
    return task.network_of("teacher")


def learnable(part: nn.Module) -> set[str]:
    """Names of the parameters and running statistics of a part; a prior's support follows from its parameters."""
    support = {
        f"{n}.{b}".lstrip(".")
        for n, m in part.named_modules()
        if isinstance(m, EntropyBottleneck)
        for b in ("low", "high")
    }
    return set(part.state_dict()) - support


@pytest.mark.parametrize("case", cases(CASES, SLOW))
def test_what_is_frozen_stays_bitwise_and_what_is_trained_changes(case: str) -> None:
    method, settings, train, learning = CASES[case]
    task = build(method, settings, train=train)
    parts = parts_of(task.network)
    before = {name: snapshot(part) for name, part in parts.items()}
    taught = snapshot(teacher_of(task)) if task.others else None
    modes = Modes(learning)
    # Two further epochs where each width must be drawn.
    trainer = fit(task, [modes], epochs=4 if task.network.widths else 2)
    assert set(modes.right) == {True}
    assert len(modes.right) == trainer.max_epochs
    for name, part in parts.items():
        moved = changed(before[name], part)
        if name in learning:
            assert moved >= learnable(part), name
        else:
            assert moved == set(), name
            assert not any(p.requires_grad or p.grad is not None for p in part.parameters()), name
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for name in learning if name in parts for p in parts[name].parameters()}
    if taught is not None:
        assert changed(taught, teacher_of(task)) == set()
        assert not any(p.requires_grad or p.grad is not None for p in teacher_of(task).parameters())


def test_every_method_has_its_cases() -> None:
    assert {case[0] for name, case in CASES.items() if name not in SLOW} == set(LOSSES)


def test_a_second_stage_thaws_what_the_first_froze() -> None:
    first = build(HeadDistillation)
    second = CrossEntropy(first.network, loss=nn.CrossEntropyLoss(), training=first.settings)
    first.freeze_parts()
    behind = parts_of(first.network)["tail"]
    tail = snapshot(behind)
    fit(first, epochs=1)
    assert changed(tail, behind) == set()
    fit(second, epochs=1)
    assert changed(tail, behind) == set(tail)


# --- what runs ----------------------------------------------------------------------------------------------------


def counted(task: Task) -> dict[str, int]:
    """Calls of each part in one training step; ``tail0`` and ``teacher0`` are stages."""
    network, calls = bottleneck_of(task.network), {}
    encoder = network.encoder.mean if hasattr(network.encoder, "mean") else network.encoder
    watched = {"encoder": encoder, "quantizer": network.quantizer, "decoder": network.decoder}
    watched |= dict(zip(("head", "tail0", "tail1"), task.network.stages, strict=True))
    if task.others:
        watched |= {f"teacher{i}": stage for i, stage in enumerate(teacher_of(task).stages)}
    for name, part in watched.items():
        part.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1))
    task.set_modes()
    losses(task, *batch())
    return calls


ALONE = ("encoder", "quantizer", "decoder")
TAILS = ("tail0", "tail1")


@pytest.mark.parametrize(
    ("method", "extra", "expected"),
    [
        (CrossEntropy, {}, (*ALONE, *TAILS)),
        (KnowledgeDistillation, {}, (*ALONE, *TAILS, "teacher0")),
        (Reconstruction, {}, ("head", *ALONE)),
        (HeadDistillation, {}, (*ALONE, "teacher0")),
        (GeneralizedHeadDistillation, {}, (*ALONE, "tail0", "teacher0", "teacher1")),
        (InformationBottleneck, {}, (*ALONE, *TAILS)),
        (Entropic, {}, (*ALONE, "teacher0")),
        (CrossEntropy, {"l2": lambda: feature("layer3")}, (*ALONE, *TAILS, "teacher0")),
        (
            HeadDistillation,
            {"kd": lambda: Term(KnowledgeDistillationLoss(), DISTILLATION)},
            (*ALONE, *TAILS, "teacher0", "teacher1"),
        ),
        (Reconstruction, {"ce": lambda: Term(nn.CrossEntropyLoss(), LABELS)}, ("head", *ALONE, *TAILS)),
    ],
)
def test_nothing_runs_twice_nor_further_than_a_term_needs(
    method: type[Task], extra: dict[str, Any], expected: tuple[str, ...]
) -> None:
    settings = {"extra_terms": {name: term() for name, term in extra.items()}, "others": teacher()}
    assert counted(build(method, **settings)) == dict.fromkeys(expected, 1)


def test_a_teacher_that_no_term_asks_for_is_left_aside() -> None:
    task = build(CrossEntropy, others=teacher())
    assert task.others == {}
    checkpoint: dict[str, Any] = {}
    task.on_save_checkpoint(checkpoint)
    assert checkpoint == {}


# --- terms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LOSSES)
def test_the_loss_that_is_minimised_is_the_sum_of_what_is_logged(method: type[Task]) -> None:
    extra = {
        "labels": Term(nn.CrossEntropyLoss(), LABELS, 0.3),
        "far": feature("layer3", 0.01),
    }
    task, logged = build(method, others=teacher(), extra_terms=extra), Logged()
    task.set_modes()
    terms = set(losses(copy.deepcopy(task), *batch()))
    fit(task, [logged])
    assert len(logged.steps) == 6
    assert terms > {"labels", "far"}
    for step in logged.steps:
        assert step["loss"] == step["returned"]
        assert step.keys() == terms | {"loss", "returned"}
        assert step["loss"] == pytest.approx(sum(step[name] for name in terms), rel=1e-5)


def test_a_single_term_is_logged_once() -> None:
    logged = Logged()
    fit(build(HeadDistillation), [logged], epochs=1)
    assert all(step.keys() == {"loss", "returned"} for step in logged.steps)


@pytest.mark.parametrize("method", LOSSES)
def test_a_copy_of_a_task_computes_the_same_with_the_same_teacher(method: type[Task]) -> None:
    task = build(method)
    task.set_modes()
    twin = copy.deepcopy(task)
    found = []
    for each in (task, twin):
        torch.manual_seed(0)
        found.append({name: value.item() for name, value in losses(each, *batch()).items()})
    assert found[0] == found[1]
    assert twin.others == task.others
    assert not {p.data_ptr() for p in task.parameters()} & {p.data_ptr() for p in twin.parameters()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.parametrize("method", [pytest.param(CrossEntropy, marks=pytest.mark.slow), GeneralizedHeadDistillation])
def test_compiled_parts_give_the_same_losses(
    method: type[Task], monkeypatch: pytest.MonkeyPatch, take_probes: Callable[[], None]
) -> None:
    plain, compiled = Logged(), Logged()
    fit(build(method), [plain], epochs=1)
    take_probes()
    compile_module = nn.Module.compile
    parts: list[nn.Module] = []
    graphs: list[int] = []

    def eagerly(module: nn.Module) -> None:
        parts.append(module)
        number = len(parts) - 1

        def backend(graph: Any, inputs: Any) -> Any:  # the default one takes a C++ compiler and minutes
            def run(*values: Any) -> Any:
                graphs.append(number)
                return graph.forward(*values)

            return run

        compile_module(module, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", eagerly)
    task = build(method, how={"compile": True})
    keys = set(task.state_dict())
    fit(task, [compiled], epochs=1, limit_val_batches=0)
    assert compiled.losses() == pytest.approx(plain.losses(), rel=1e-4)
    taught = list(teacher_of(task).stages) if task.others else []
    bottleneck = bottleneck_of(task.network)
    first, *behind = task.network.stages
    assert parts == [first, *behind, bottleneck.encoder, bottleneck.decoder, *taught]
    far = method is CrossEntropy  # the other one runs no further than layer3
    run = [bottleneck.encoder, bottleneck.decoder, *(behind if far else behind[:1]), *taught[:2]]
    assert {number: graphs.count(number) for number in graphs} == {parts.index(module): 3 for module in run}
    assert set(task.state_dict()) == keys
    assert not [name for name in keys if "_orig_mod" in name]


# --- same seed, same numbers --------------------------------------------------------------------------------------

STOCHASTIC: dict[str, tuple[type[Task], dict[str, Any]]] = {
    "vib": (InformationBottleneck, VARIANCE),
    "entropic": (Entropic, ENTROPY),
    "packet_loss": (CrossEntropy, {"channel": PacketLoss(rate=[0.1, 0.5], packet_bytes=4)}),
    "gaussian_noise": (HeadDistillation, NOISY),
    "bit_errors": (CrossEntropy, {"channel": BitErrors(rate=0.1)}),
    "widths": (GeneralizedHeadDistillation, WIDTHS),
}


def run(method: type[Task], network: dict[str, Any], disturb: int) -> tuple[Any, ...]:
    task, logged = build(method, network, {"seed": 3}), Logged()
    torch.manual_seed(disturb)  # whatever ran before must not matter
    trainer = fit(task, [logged])
    measured = {name: value.item() for name, value in trainer.callback_metrics.items()}
    torch.manual_seed(disturb)
    return logged.steps, measured, snapshot(task.network), evaluate(task)


@pytest.mark.parametrize("case", STOCHASTIC)
def test_same_seed_same_numbers(case: str) -> None:
    (steps, measured, weights, tested), again = (run(*STOCHASTIC[case], disturb) for disturb in (1, 2))
    assert again[0] == steps
    assert again[1] == measured
    assert again[3] == tested
    assert all(torch.equal(value, again[2][name]) for name, value in weights.items())
    logged, (method, network) = Logged(), STOCHASTIC[case]
    fit(build(method, network, {"seed": 4}), [logged], epochs=1, limit_val_batches=0)
    assert logged.steps != steps[:3]


# --- several widths -----------------------------------------------------------------------------------------------


class Bits(pl.Callback):
    """The width at each training step and each validation batch."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.validated: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Task, *_: Any) -> None:
        self.trained.append(module.network.bits())

    def on_validation_batch_end(self, trainer: pl.Trainer, module: Task, *_: Any) -> None:
        self.validated.append(module.network.bits())


@pytest.mark.parametrize("method", [CrossEntropy, GeneralizedHeadDistillation])
def test_each_step_trains_one_width_and_its_batchnorm_alone(method: type[Task]) -> None:
    task, bits = build(method, WIDTHS, {"seed": 5}), Bits()
    fit(task, [bits], epochs=4)
    expected = [draw_width((2, 4), 5, epoch, step) for epoch in range(4) for step in range(3)]
    assert bits.trained == expected
    assert {2, 4} == set(expected)
    assert set(bits.validated) == {4}
    decoder, tail = bottleneck_of(task.network).decoder, parts_of(task.network)["tail"]
    for part in (decoder, tail):
        norms = [m for m in part.modules() if isinstance(m, SwitchableBatchNorm2d)]
        assert len(norms) >= 2
        for norm in norms:
            seen = {int(width): layer.num_batches_tracked.item() for width, layer in norm.sets.items()}
            trained = part is decoder or method is CrossEntropy
            assert seen == {width: expected.count(width) if trained else 0 for width in (2, 4)}
    assert not any(isinstance(m, SwitchableBatchNorm2d) for m in bottleneck_of(task.network).encoder.modules())


@pytest.mark.parametrize("coding", [{}, {"coding": "tiled_jpeg", "quality": 20}], ids=["packed", "jpeg"])
def test_every_width_is_tested_through_its_own_bytes(coding: dict[str, Any]) -> None:
    task = build(CrossEntropy, {"codec": {"bits": 4, "widths": [2, 4, 6]} | coding})
    fit(task, epochs=6)
    encoded: list[int] = []
    bottleneck_of(task.network).encoder.register_forward_hook(lambda encoder, inputs, z: encoded.append(len(z)))
    measured = evaluate(task)
    assert encoded == [len(batch["labels"]) for batch in batches()]  # once, whatever the widths
    assert task.network.bits() == 4
    network = task.network.eval()
    images, labels = whole()
    logits = {}
    for bits in (2, 4, 6):
        network.set_bits(bits)
        with torch.no_grad():
            logits[bits], payloads = through_bytes(network, images)
            assert torch.equal(logits[bits], network(images)) == (coding == {})
        accuracy = (logits[bits].argmax(1) == labels).double().mean().item()
        assert measured[f"test/bits{bits}/acc"] == pytest.approx(accuracy)
        assert measured[f"test/bits{bits}/payload_bytes"] == pytest.approx(
            ENVELOPE_BYTES + np.mean([len(p) for p in payloads])
        )
        assert coding or {len(p) for p in payloads} == {3 * 4 * 4 * bits // 8}
    assert len({tuple(value.flatten().tolist()) for value in logits.values()}) == 3
    assert measured["test/acc"] == measured["test/bits4/acc"]
    assert measured["test/payload_bytes"] == measured["test/bits4/payload_bytes"]
    assert measured["test/loss"] == pytest.approx(F.cross_entropy(logits[4], labels).item(), rel=1e-5)


# --- bytes --------------------------------------------------------------------------------------------------------

CODINGS: dict[str, Any] = {
    "packed": {"bits": 4},
    "sample": {"bits": 3, "range": "sample"},
    "learned": {"bits": 5, "range": "learned"},
    "packed_zstd": {"bits": 4, "coding": "packed_zstd"},
    "sparse": {"bits": 4, "coding": "sparse"},
    "tiled_png": {"bits": 4, "coding": "tiled_png"},
    "tiled_jpeg": {"bits": 8, "coding": "tiled_jpeg", "quality": 30},
    "tiled_webp": {"bits": 8, "coding": "tiled_webp", "quality": 30},
    "float": {"bits": 32},
    "entropy": entropy_codec,
}
FIXED = {"packed": 24, "sample": 18 + 8, "learned": 30, "float": 4 * 48}


def received(delivered: Mapping[str, Tensor]) -> Tensor:
    """De-quantise what a codec delivers, from the definition."""
    if "codes" not in delivered:
        return next(iter(delivered.values())).double()
    codes = delivered["codes"].double()
    if "levels" not in delivered:
        return codes
    low, high = (delivered[end].double().view(-1, 1, 1, 1) for end in ("low", "high"))
    return low + codes * (high - low) / (delivered["levels"].item() - 1)


@pytest.mark.parametrize("coding", CODINGS)
def test_testing_goes_through_the_bytes(coding: str) -> None:
    network = {"codec": CODINGS[coding]}
    task = build(CrossEntropy, network, **without_prior(network))
    fit(task, epochs=1)
    measured = evaluate(task)
    network, logits, exact, payloads = task.network.eval(), [], [], []
    bottleneck = bottleneck_of(network)
    with torch.no_grad():
        for each in batches():
            images = each["images"]
            sent = bottleneck.codec.encode(codes(network, images))
            payloads += sent
            # One payload at a time: none may lean on its neighbours.
            z = torch.cat([received(bottleneck.codec.decode([payload])) for payload in sent])
            feature = bottleneck.decoder(z.float())
            logits.append(network.outputs(None, ["logits"], given={"layer2": feature})["logits"])
            exact.append(network(images))
            torch.testing.assert_close(through_bytes(network, images)[0], logits[-1], rtol=1e-4, atol=1e-5)
    labels = whole()[1]
    found, unharmed = torch.cat(logits), torch.cat(exact)
    assert measured["test/acc"] == pytest.approx((found.argmax(1) == labels).double().mean().item())
    assert measured["test/loss"] == pytest.approx(F.cross_entropy(found, labels).item(), rel=1e-4)
    assert ((found - unharmed).abs().max() > 1e-2) == (coding in ("tiled_jpeg", "tiled_webp"))
    lengths = [ENVELOPE_BYTES + len(payload) for payload in payloads]
    assert len(lengths) == len(labels)
    assert measured["test/payload_bytes"] == pytest.approx(np.mean(lengths))
    zstd = [len(zstandard.ZstdCompressor(level=1).compress(payload)) for payload in payloads]
    assert measured["test/payload_zstd_bytes"] == pytest.approx(ENVELOPE_BYTES + np.mean(zstd))
    assert measured["test/payload_to_input"] == pytest.approx(np.mean(lengths) / 64)
    assert measured["test/payload_to_feature"] == pytest.approx(np.mean(lengths) / (4 * 32 * 4 * 4))
    if coding in FIXED:
        assert set(lengths) == {ENVELOPE_BYTES + FIXED[coding]}
    elif coding != "packed_zstd":  # so short that zstd only frames it
        assert len(set(lengths)) > 1


def test_the_link_also_harms_what_is_tested() -> None:
    lossy = {"channel": PacketLoss(rate=0.9, packet_bytes=4, when="eval")}
    task = build(CrossEntropy, lossy)
    fit(task, epochs=1)
    harmed = evaluate(task)
    task.network.set_channel(None)
    unharmed = evaluate(task)
    assert harmed["test/loss"] != unharmed["test/loss"]
    assert harmed["test/payload_bytes"] == unharmed["test/payload_bytes"]
    images, labels = whole()
    with torch.no_grad():
        logits = task.network.eval()(images)
    assert unharmed["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


# --- frozen features ----------------------------------------------------------------------------------------------


class Few(Digits):
    """The first few digits alone: four batches of training."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"batch_size": 16, "augment": "none"} | options)

    def load_splits(self) -> dict[str, ImageSource]:
        return {name: source.subset(np.arange(64)) for name, source in super().load_splits().items()}


class Calls(pl.Callback):
    """How often head and teacher ran within training steps, and whether each batch held images."""

    def __init__(self) -> None:
        self.count = 0
        self.training = False
        self.images: list[bool] = []

    def _count(self, *_: Any) -> None:
        self.count += self.training

    def on_train_start(self, trainer: pl.Trainer, module: Task) -> None:
        frozen = [] if module.network.replaced else [module.network.stages[0]]
        frozen += [teacher_of(module).stages[0]] if module.others else []
        for part in frozen:
            part.register_forward_hook(self._count)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Task, batch: Any, batch_idx: int) -> None:
        self.training = True
        self.images.append(batch.get("images") is not None)

    def on_train_batch_end(self, *_: Any) -> None:
        self.training = False


def fit_digits(task: Task, data: Digits | None = None, epochs: int = 2) -> tuple[list[float], Calls]:
    logged, calls = Logged(), Calls()
    trainer_of([logged, calls], epochs, limit_val_batches=0).fit(task, datamodule=Few() if data is None else data)
    return logged.losses(), calls


def cached(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"feature_cache": {"use": True, "directory": str(folder / "cache")} | settings}


# What of a batch is frozen: a head's output makes the images needless, a teacher's alone does not.
CACHED: dict[str, tuple[type[Task], dict[str, Any], list[str] | None, bool]] = {
    "reconstruction": (Reconstruction, INSERT, None, False),
    "reconstruction_variance": (Reconstruction, INSERT | VARIANCE, None, False),
    "hnd": (HeadDistillation, {}, None, True),
    "hnd_insert": (HeadDistillation, INSERT, None, False),
    "ghnd": (GeneralizedHeadDistillation, {}, None, True),
    "kd": (KnowledgeDistillation, INSERT, None, True),
    "kd_server": (KnowledgeDistillation, INSERT, ["decoder", "tail"], False),
    "ce_bottleneck": (CrossEntropy, INSERT, ["bottleneck"], False),
    "entropic": (Entropic, ENTROPY, None, True),
    "entropic_prior": (Entropic, INSERT | ENTROPY, ["quantizer", "decoder"], False),
    "kd_received": (KnowledgeDistillation, INSERT | VARIANCE | ranged("sample"), ["decoder", "tail"], False),
}


@pytest.mark.parametrize("case", cases(CACHED, {"hnd_insert", "ghnd", "entropic"}))
def test_cached_features_change_no_loss(case: str, tmp_path: Path) -> None:
    method, network, train, with_images = CACHED[case]
    expected, plain = fit_digits(build(method, network, train=train))
    losses, calls = fit_digits(build(method, network, train=train, **cached(tmp_path)))
    assert len(losses) == 8
    assert losses == pytest.approx(expected, rel=1e-6)
    assert plain.count >= 8
    assert calls.count == (8 if case == "kd" else 0)  # there the head learns
    assert set(calls.images) == {with_images}


@pytest.mark.parametrize("method", [Reconstruction, HeadDistillation])
def test_half_precision_features_are_close(method: type[Task], tmp_path: Path) -> None:
    def losses(**settings: Any) -> list[float]:
        # In float, as the smallest difference may round to another code; slowly, as runs drift apart of themselves.
        slow = {"optimizer": functools.partial(torch.optim.AdamW, lr=1e-3)}
        task = build(method, {"form": "insert", "codec": {"bits": 32}}, slow, **settings)
        return fit_digits(task)[0]

    single, half = losses(), losses(**cached(tmp_path, dtype="float16"))
    assert half != single
    assert half == pytest.approx(single, rel=1e-3)


@pytest.mark.parametrize("method", [Reconstruction, HeadDistillation])
def test_views_serve_the_augmented_images_of_the_first_epochs(method: type[Task], tmp_path: Path) -> None:
    def data() -> Few:
        return Few(augment="crop", seed=1)

    expected, _ = fit_digits(build(method), data(), epochs=3)
    losses, calls = fit_digits(build(method, **cached(tmp_path, views=2)), data(), epochs=3)
    assert losses[:8] == pytest.approx(expected[:8], rel=1e-6)
    assert losses[8] != pytest.approx(expected[8], rel=1e-3)
    assert calls.count == 0
    with pytest.raises(ValueError, match="give views=k"):
        fit_digits(build(method, **cached(tmp_path)), data())


@pytest.mark.parametrize("case", ["reconstruction", "hnd"])
def test_a_changed_weight_or_statistic_never_meets_old_features(case: str, tmp_path: Path) -> None:
    method, network, train, _ = CACHED[case]

    def entries() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    def task(change: str | None = None, **settings: Any) -> Task:
        made = build(method, network, train=train, **settings)
        frozen = made.network.stages[0] if method is Reconstruction else teacher_of(made)
        names = {"weight": frozen.parameters(), "statistic": (b for n, b in frozen.named_buffers() if "mean" in n)}
        with torch.no_grad():
            if change is not None:
                next(iter(names[change])).flatten()[0].add_(0.5)
        return made

    fit_digits(task(**cached(tmp_path)), epochs=1)
    assert entries() == 1
    fit_digits(task(**cached(tmp_path)), epochs=1)
    assert entries() == 1
    for number, change in enumerate(("weight", "statistic"), start=2):
        losses, _ = fit_digits(task(change, **cached(tmp_path)), epochs=1)
        assert entries() == number
        assert losses == pytest.approx(fit_digits(task(change), epochs=1)[0], rel=1e-6)


def test_trained_parts_do_not_make_the_cache_stale(tmp_path: Path) -> None:
    task = build(Reconstruction, **cached(tmp_path))
    for _ in range(2):
        fit_digits(task, epochs=1)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(("network", "train"), [({}, None), (INSERT, None), ({}, ["bottleneck"])])
def test_a_cache_without_anything_frozen_is_refused(
    network: dict[str, Any], train: list[str] | None, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"feature_cache\.use=true: CrossEntropy .* has no frozen part"):
        fit_digits(build(CrossEntropy, network, train=train, **cached(tmp_path)))
    assert not (tmp_path / "cache").exists()


def test_a_cache_takes_a_data_module(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"feature_cache\.use=true needs a data module"):
        fit(build(Reconstruction, **cached(tmp_path)))


# --- bad input ----------------------------------------------------------------------------------------------------


def whole_network() -> StagedNetwork:
    return staged_network(backbone(), torch.randn(2, 1, 8, 8))


def ghnd(**weights: float) -> dict[str, Any]:
    return {"loss": GeneralizedHeadDistillationLoss(weights)}


def wide_teacher() -> dict[str, Frozen]:
    """Layers of the same names as the student's, with features of other shapes."""
    torch.manual_seed(0)
    return {"teacher": Frozen(create_backbone("timm", "resnet10t", num_classes=10, in_channels=1).network)}


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "layer_unknown_to_the_student": (
        lambda: build(GeneralizedHeadDistillation, **ghnd(layer2=1.0, layer33=1.0)),
        CutError,
        r"no output 'layer33'; it has .*layer2, layer3.* Did you mean 'layer3'",
    ),
    "layer_unknown_to_the_backbone": (
        lambda: split_network(cuts=["layer33"]),
        CutError,
        "no layer 'layer33'.*Did you mean 'layer3'",
    ),
    "layer_unknown_to_the_teacher": (
        lambda: build(HeadDistillation, others=teacher(CifarVGG(11, in_channels=1))),
        CutError,
        "the teacher cannot be compared at layer2: .*no layer 'layer2'",
    ),
    "layer_before_the_split": (
        lambda: split_network(cuts=["layer1"]),
        CutError,
        r"\(layer1\) must stand behind the split at 'layer2'",
    ),
    "extra_layer_unknown": (
        lambda: build(CrossEntropy, extra_terms={"l2": feature("layer4")}),
        CutError,
        "no output 'layer4'",
    ),
    "features_of_other_shapes": (
        lambda: build(HeadDistillation, others=wide_teacher()),
        ValueError,
        r"the teacher's feature at 'layer2' is \(\d+, 1, 1\), of the student's \(32, 4, 4\)",
    ),
    "features_of_other_shapes_further_on": (
        lambda: build(GeneralizedHeadDistillation, **ghnd(layer3=1.0), others=wide_teacher()),
        ValueError,
        "teacher's feature at 'layer3'",
    ),
    "other_classes": (
        lambda: build(KnowledgeDistillation, others=teacher(backbone(classes=5))),
        ValueError,
        r"the teacher's logits is \(5,\), of the student's \(10,\).*trained on the same classes",
    ),
    "other_classes_in_an_extra_term": (
        lambda: build(
            HeadDistillation,
            others=teacher(backbone(classes=5)),
            extra_terms={"kd": Term(KnowledgeDistillationLoss(), DISTILLATION)},
        ),
        ValueError,
        "trained on the same classes",
    ),
    "train_nothing": (lambda: build(HeadDistillation, train=[]), ValueError, r"train=\[\] trains nothing"),
    "train_what_has_no_parameters": (
        lambda: build(CrossEntropy, train=["quantizer"]),
        ValueError,
        r"train=\['quantizer'\] trains nothing",
    ),
    "train_an_absent_head": (
        lambda: build(CrossEntropy, train=["head"]),
        ValueError,
        "train names 'head', which this network lacks",
    ),
    "train_behind_the_last_term": (
        lambda: build(HeadDistillation, train=["tail"]),
        ValueError,
        r"train=\['tail'\]: no term of HeadDistillation reaches the tail",
    ),
    "train_the_tail_of_a_reconstruction": (
        lambda: build(Reconstruction, train=["bottleneck", "tail"]),
        ValueError,
        "reaches the tail",
    ),
    "train_an_unknown_part": (
        lambda: build(CrossEntropy, train=["decodr"]),
        ValueError,
        "train names 'decodr', which this network lacks: its parts are .*Did you mean 'decoder'",
    ),
    "train_a_string": (
        lambda: build(CrossEntropy, train="decoder"),
        ValueError,
        r"list of parts, got the string 'decoder'; write train=\[decoder\]",
    ),
    "extra_term_of_the_methods_name": (
        lambda: build(CrossEntropy, extra_terms={"cross_entropy": Term(nn.CrossEntropyLoss(), LABELS)}),
        ValueError,
        "extra_terms names 'cross_entropy', which is the method's own term",
    ),
    "extra_term_of_a_layers_name": (
        lambda: build(GeneralizedHeadDistillation, extra_terms={"head/layer2": Term(nn.CrossEntropyLoss(), LABELS)}),
        ValueError,
        "extra_terms names 'head/layer2'; a term's name is one word",
    ),
    "extra_term_of_the_sums_name": (
        lambda: build(CrossEntropy, extra_terms={"loss": Term(nn.CrossEntropyLoss(), LABELS)}),
        ValueError,
        "extra_terms names 'loss'.*but not loss",
    ),
    "negative_weight": (lambda: Term(nn.CrossEntropyLoss(), LABELS, weight=-0.5), ValueError, "at least 0, got -0.5"),
    "infinite_weight": (lambda: Term(nn.CrossEntropyLoss(), LABELS, float("inf")), ValueError, "at least 0, got inf"),
    "negative_beta": (lambda: build(Entropic, beta=-1.0), ValueError, "at least 0, got -1.0"),
    "reconstruction_without_a_head": (
        lambda: build(Reconstruction, {}),
        ValueError,
        r"split\.form=insert, or method=head_distillation",
    ),
    "extra_reconstruction_without_a_head": (
        lambda: build(
            CrossEntropy, extra_terms={"r": Term(ReconstructionLoss(), ["student/layer2", "student/layer2/input"])}
        ),
        CutError,
        r"no output 'layer2/input'.*form='insert' keeps",
    ),
    "reconstruction_without_a_bottleneck": (lambda: build(Reconstruction, NONE), ValueError, "trains nothing"),
    "entropic_without_a_prior": (
        lambda: build(Entropic, {}),
        CutError,
        "no output 'layer2/likelihoods'.*codec=entropy",
    ),
    "rate_without_a_prior": (
        lambda: build(CrossEntropy, extra_terms={"rate": Term(RateLoss(64), ["student/layer2/likelihoods"], 0.1)}),
        CutError,
        "codec=entropy",
    ),
    "vib_without_variance": (
        lambda: build(InformationBottleneck, {}),
        CutError,
        "no output 'layer2/mean'.*variance='learned'",
    ),
    "whole_network": (
        lambda: CrossEntropy(backbone(), loss=nn.CrossEntropyLoss()),
        TypeError,
        "CrossEntropy trains a StagedNetwork, got CifarResNet",
    ),
    "network_without_a_bottleneck": (
        lambda: HeadDistillation(whole_network(), loss=HeadDistillationLoss(), others=teacher()),
        ValueError,
        r"HeadDistillation trains a bottleneck, which this network lacks; set split\.at",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_told_before_training(case: str) -> None:
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make()


def test_head_distillation_does_not_mind_a_teacher_of_other_classes() -> None:
    task, logged = build(HeadDistillation, others=teacher(backbone(classes=5))), Logged()
    fit(task, [logged], epochs=1, limit_train_batches=1)
    assert logged.losses()[0] > 0


def test_a_prior_that_no_rate_teaches_is_refused() -> None:
    with pytest.raises(ValueError, match="only a rate teaches its prior"):
        build(CrossEntropy, ENTROPY)
    build(CrossEntropy, ENTROPY, train=["encoder", "decoder"])


def test_codes_without_a_measured_range_are_not_tested_in_silence() -> None:
    task = build(CrossEntropy, {"codec": {"bits": 4}})
    with pytest.raises(ValueError, match="range=observed is measured in training"):
        evaluate(task)
    assert evaluate(build(CrossEntropy, {"codec": {"bits": 4, "range": "sample"}}))["test/payload_bytes"] > 0
