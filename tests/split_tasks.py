"""Tiny networks with a bottleneck, tasks and training runs, shared by the tests of training."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cleave.architectures import Bottleneck, GaussianEncoder, StagedNetwork, entropy_codec
from cleave.architectures import split_network as build_network
from cleave.architectures.backbones.zoo import CifarResNet
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
    Training,
    default_evaluators,
)
from cleave.losses import (
    GeneralizedHeadDistillationLoss,
    HeadDistillationLoss,
    InformationBottleneckLoss,
    KnowledgeDistillationLoss,
    ReconstructionLoss,
)

from .tiny_networks import made_once

NAMES = [str(i) for i in range(10)]
ADAM = functools.partial(torch.optim.AdamW, lr=1e-2)
LAYERS = {"layer2": 1.0, "layer3": 0.5}
VARIANCE = {"bottleneck": {"channels": 3, "width": 8, "variance": "learned"}}
ENTROPY = {"codec": entropy_codec}

LOSSES: dict[type[Task], Callable[[], dict[str, Any]]] = {
    CrossEntropy: lambda: {"loss": nn.CrossEntropyLoss()},
    KnowledgeDistillation: lambda: {"loss": KnowledgeDistillationLoss(alpha=0.3, temperature=2.0)},
    Reconstruction: lambda: {"loss": ReconstructionLoss()},
    HeadDistillation: lambda: {"loss": HeadDistillationLoss()},
    GeneralizedHeadDistillation: lambda: {"loss": GeneralizedHeadDistillationLoss(LAYERS)},
    InformationBottleneck: lambda: {
        "loss": nn.CrossEntropyLoss(),
        "rate": InformationBottleneckLoss(),
        "beta": 1e-2,
    },
    Entropic: lambda: {"loss": GeneralizedHeadDistillationLoss({"layer2": 1.0}), "beta": 0.3},
}


def without_prior(network: dict[str, Any]) -> dict[str, Any]:
    """Settings that leave a learned prior out of what learns, where no rate teaches it."""
    return {"train": ["encoder", "decoder", "tail"]} if network.get("codec") is entropy_codec else {}


TEACHERLESS = (CrossEntropy, Reconstruction, InformationBottleneck)


class Pairs(Dataset[dict[str, Tensor]]):
    """Images and labels as batches name them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}


def batches(n: int = 24, batch_size: int = 8) -> DataLoader:
    """Grey noise with random labels."""
    generator = torch.Generator().manual_seed(0)
    data = Pairs(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator))
    return DataLoader(data, batch_size=batch_size)


def whole() -> tuple[Tensor, Tensor]:
    """All images and labels of :func:`batches`."""
    found = list(batches())
    return torch.cat([batch["images"] for batch in found]), torch.cat([batch["labels"] for batch in found])


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images and labels of the first of :func:`batches`."""
    first = next(iter(batches()))
    return first["images"].to(dtype), first["labels"]


def losses(task: Task, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The terms of a task for a batch."""
    return task.training_loss({"images": images, "labels": labels})


def backbone(classes: int = 10, seed: int = 0) -> nn.Module:
    """The smallest of the CIFAR ResNets: a block a stage."""
    torch.manual_seed(seed)
    return CifarResNet(8, classes, in_channels=1)


def teacher(network: nn.Module | None = None) -> dict[str, Frozen]:
    """The backbone that the student is cut from, unless another is given, as a task takes it."""
    return {"teacher": Frozen(backbone() if network is None else copy.deepcopy(network), "teacher.ckpt", "0" * 64)}


def split_network(**settings: Any) -> StagedNetwork:
    """Split at layer2, cut at layer3 too, 3x4x4 codes of 4 bits; cut from eval mode, which leaves nothing to chance."""
    return made_once(_split_network, settings)


def _split_network(settings: dict[str, Any]) -> StagedNetwork:
    coders = None if settings.get("form") == "none" else {"channels": 3, "width": 8}
    defaults = {"bottleneck": coders, "codec": {"bits": 4}, "cuts": ["layer3"]}
    network = build_network(backbone().eval(), "layer2", torch.randn(2, 1, 8, 8), **defaults | settings)
    bottleneck = bottleneck_of(network)
    if bottleneck.has_prior and coders is not None:
        with torch.no_grad():  # untrained, all codes would be 0
            bottleneck.encoder[-1].weight.mul_(20)
    return network


def bottleneck_of(network: StagedNetwork) -> Bottleneck:
    """The bottleneck at layer2."""
    return network.bottlenecks["layer2"]


def parts_of(network: StagedNetwork) -> dict[str, nn.ModuleList]:
    """The parts of a network by their names without the layer."""
    return {name.partition("/")[0]: nn.ModuleList(modules) for name, modules in network.parts().items()}


def codes(network: StagedNetwork, images: Tensor) -> dict[str, Tensor]:
    """What the bottleneck at layer2 sends of images."""
    return bottleneck_of(network).send(network.outputs(images, ["layer2/z"])["layer2/z"])


def through_bytes(network: StagedNetwork, images: Tensor) -> tuple[Tensor, list[bytes]]:
    """Logits of what arrives as bytes, and the bytes."""
    sent: list[bytes] = []

    def link(cut: str, codec: Any, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        sent.extend(codec.encode(tensors))
        return codec.decode(sent)

    return network.outputs(images, ["logits"], link=link)["logits"], sent


def training(**settings: Any) -> Training:
    """The settings of a training, of a fast rate unless another optimizer is given."""
    return dataclasses.replace(Training(optimizer=ADAM), **settings)


def build(
    method: type[Task],
    network: dict[str, Any] | None = None,
    how: dict[str, Any] | None = None,
    **settings: Any,
) -> Task:
    """A task of a method with its loss of :data:`LOSSES`, and with a teacher where it needs one."""
    if network is None:
        network = {Reconstruction: {"form": "insert"}, InformationBottleneck: VARIANCE, Entropic: ENTROPY}.get(
            method, {}
        )
    if method not in TEACHERLESS:
        settings = {"others": teacher()} | settings
    made = split_network(**network)
    settings = {"training": training(**(how or {})), "evaluators": default_evaluators(made, NAMES)} | settings
    return method(made, **LOSSES[method]() | settings)  # type: ignore[call-arg]


def trainer_of(callbacks: Iterable[pl.Callback] = (), epochs: int = 2, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=list(callbacks), **settings,
    )  # fmt: skip


def fit(task: Task, callbacks: Iterable[pl.Callback] = (), epochs: int = 2, **settings: Any) -> pl.Trainer:
    trainer = trainer_of(callbacks, epochs, **settings)
    trainer.fit(task, batches(), batches())
    return trainer


def evaluate(task: Task, data: Any = None) -> dict[str, float]:
    """Test a task on what it was trained on and return what was measured."""
    trainer = trainer_of()
    trainer.test(task, batches() if data is None else data, verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


class Logged(pl.Callback):
    """Keeps what each training step logged, and what it returned under ``returned``."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        logged = {k.removeprefix("train/"): v.item() for k, v in trainer.callback_metrics.items() if "train/" in k}
        self.steps.append(logged | {"returned": outputs["loss"].item()})

    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]


def double(task: Task) -> Task:
    """The task and its frozen networks in float64, every part in the mode of training."""
    task.double()
    for frozen in task.others.values():
        frozen.network.double()
    task.set_modes()
    return task


def by_hand(network: StagedNetwork, images: Tensor) -> dict[str, Tensor]:
    """All that a copy of a network makes of a batch, its parts called one after the other; z is what is sent."""
    twin = copy.deepcopy(network)
    bottleneck = bottleneck_of(twin)
    found = {"head": images if twin.replaced else twin.stages[0](images)}
    if isinstance(bottleneck.encoder, GaussianEncoder):
        hidden = bottleneck.encoder.body(found["head"])
        found["mean"] = bottleneck.encoder.mean(hidden)
        spread = bottleneck.encoder.log_variance
        found["log_variance"] = spread(hidden) if callable(spread) else torch.full_like(found["mean"], spread)
        noise = torch.randn_like(found["mean"])
        found["z"] = found["mean"] + torch.exp(found["log_variance"] / 2) * noise
    else:
        found["z"] = bottleneck.encoder(found["head"])
    found["z_hat"] = bottleneck.quantizer(found["z"])
    found["layer2"] = bottleneck.decoder(found["z_hat"].to(images.dtype))
    found["layer3"] = twin.stages[1](found["layer2"].clone())
    found["logits"] = twin.stages[2](found["layer3"].clone())
    return {name: value.detach() for name, value in found.items()}


def taught(images: Tensor, network: nn.Module | None = None) -> dict[str, Tensor]:
    """What the teacher makes of a batch, seen by hooks on the whole backbone."""
    network = copy.deepcopy(backbone() if network is None else network).to(images.dtype).eval()
    found: dict[str, Tensor] = {}
    for name in ("layer2", "layer3"):
        network.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.__setitem__(name, output.clone())
        )
    with torch.no_grad():
        found["logits"] = network(images)
    return found


def terms_of(task: Task, images: Tensor, labels: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The task's terms and all that :func:`by_hand` finds, drawn with the same noise."""
    torch.manual_seed(7)
    found = by_hand(task.network, images)
    torch.manual_seed(7)
    return {name: value.item() for name, value in losses(task, images, labels).items()}, found


def squared_error(one: Tensor, other: Tensor) -> float:
    """Summed per sample, averaged over the batch."""
    return float(np.square(one.numpy() - other.numpy()).sum() / len(one))


def log_softmax(logits: Tensor) -> npt.NDArray[np.float64]:
    values = logits.double().numpy()
    return values - np.log(np.exp(values).sum(1, keepdims=True))


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return float(-log_softmax(logits)[np.arange(len(labels)), labels.numpy()].mean())


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """Names of parameters and buffers that are no longer the same in every bit."""
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
