"""Tiny split networks, tasks and training runs, shared by the tests of split training."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cleave.architectures import EntropyBottleneck, GaussianEncoder, SplitNetwork
from cleave.architectures.backbones.zoo import CifarResNet
from cleave.lightning_modules import (
    CrossEntropy,
    Entropic,
    GeneralizedHeadDistillation,
    HeadDistillation,
    InformationBottleneck,
    KnowledgeDistillation,
    Reconstruction,
    SplitTask,
    Teacher,
)
from cleave.losses import (
    GeneralizedHeadDistillationLoss,
    HeadDistillationLoss,
    InformationBottleneckLoss,
    KnowledgeDistillationLoss,
    ReconstructionLoss,
)

NAMES = [str(i) for i in range(10)]
ADAM = functools.partial(torch.optim.AdamW, lr=1e-2)
LAYERS = {"layer2": 1.0, "layer3": 0.5}
VARIANCE = {"bottleneck": {"channels": 3, "width": 8, "variance": "learned"}}
ENTROPY = {"codec": {"kind": "entropy"}}

OBJECTIVES: dict[type[SplitTask], Callable[[], dict[str, Any]]] = {
    CrossEntropy: lambda: {"objective": nn.CrossEntropyLoss()},
    KnowledgeDistillation: lambda: {"objective": KnowledgeDistillationLoss(alpha=0.3, temperature=2.0)},
    Reconstruction: lambda: {"objective": ReconstructionLoss()},
    HeadDistillation: lambda: {"objective": HeadDistillationLoss()},
    GeneralizedHeadDistillation: lambda: {"objective": GeneralizedHeadDistillationLoss(LAYERS)},
    InformationBottleneck: lambda: {
        "objective": nn.CrossEntropyLoss(),
        "rate": InformationBottleneckLoss(),
        "beta": 1e-2,
    },
    Entropic: lambda: {"objective": GeneralizedHeadDistillationLoss({"layer2": 1.0}), "beta": 0.3},
}


def without_prior(network: dict[str, Any]) -> dict[str, Any]:
    """Settings that leave a learned prior out of what learns, where no rate teaches it."""
    learned = network.get("codec", {}).get("kind") == "entropy"
    return {"train": ["encoder", "decoder", "tail"]} if learned else {}


TEACHERLESS = (CrossEntropy, Reconstruction, InformationBottleneck)


def batches(n: int = 24, batch_size: int = 8) -> DataLoader:
    """Grey noise with random labels."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator))
    return DataLoader(data, batch_size=batch_size)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The first of :func:`batches`."""
    images, labels = next(iter(batches()))
    return images.to(dtype), labels


def backbone(classes: int = 10, seed: int = 0) -> nn.Module:
    """The smallest of the CIFAR ResNets: a block a stage."""
    torch.manual_seed(seed)
    return CifarResNet(8, classes, in_channels=1)


def teacher(network: nn.Module | None = None) -> Teacher:
    """The backbone that the student is cut from, unless another is given."""
    return Teacher(backbone() if network is None else copy.deepcopy(network), "teacher.ckpt", "0" * 64)


def split_network(**settings: Any) -> SplitNetwork:
    """Cut at layer2, layer3 observed, 3x4x4 codes of 4 bits; cut from eval mode, which leaves nothing to chance."""
    bottleneck = None if settings.get("form") == "none" else {"channels": 3, "width": 8}
    defaults = {"bottleneck": bottleneck, "codec": {"bits": 4}, "observe": ["layer3"]}
    network = SplitNetwork(backbone().eval(), "layer2", torch.randn(2, 1, 8, 8), **defaults | settings)
    if isinstance(network.quantizer, EntropyBottleneck) and bottleneck is not None:
        with torch.no_grad():  # untrained, all codes would be 0
            network.encoder[-1].weight.mul_(20)
    return network


def build(method: type[SplitTask], network: dict[str, Any] | None = None, **settings: Any) -> SplitTask:
    """A task of a method with its objective of :data:`OBJECTIVES`, and with a teacher where it needs one."""
    if network is None:
        network = {Reconstruction: {"form": "insert"}, InformationBottleneck: VARIANCE, Entropic: ENTROPY}.get(
            method, {}
        )
    if method not in TEACHERLESS:
        settings = {"teacher": teacher()} | settings
    return method(split_network(**network), NAMES, ADAM, **OBJECTIVES[method]() | settings)


def trainer_of(callbacks: Iterable[pl.Callback] = (), epochs: int = 2, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=list(callbacks), **settings,
    )  # fmt: skip


def fit(task: SplitTask, callbacks: Iterable[pl.Callback] = (), epochs: int = 2, **settings: Any) -> pl.Trainer:
    trainer = trainer_of(callbacks, epochs, **settings)
    trainer.fit(task, batches(), batches())
    return trainer


def evaluate(task: SplitTask, data: Any = None) -> dict[str, float]:
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


def double(task: SplitTask) -> SplitTask:
    """The task and its teacher in float64, every part in the mode of training."""
    task.double()
    if task._teacher is not None:
        task._teacher.network.double()
    task.set_modes()
    return task


def by_hand(network: SplitNetwork, images: Tensor) -> dict[str, Tensor]:
    """All that a copy of a network makes of a batch, its parts called one after the other; z is what is sent."""
    twin = copy.deepcopy(network)
    found = {"head": images if twin.head is None else twin.head(images)}
    if isinstance(twin.encoder, GaussianEncoder):
        hidden = twin.encoder.body(found["head"])
        found["mean"] = twin.encoder.mean(hidden)
        spread = twin.encoder.log_variance
        found["log_variance"] = spread(hidden) if callable(spread) else torch.full_like(found["mean"], spread)
        noise = torch.randn_like(found["mean"])
        found["z"] = found["mean"] + torch.exp(found["log_variance"] / 2) * noise
    else:
        found["z"] = twin.encoder(found["head"])
    found["z_hat"] = twin.quantizer(found["z"])
    found["layer2"] = twin.decoder(found["z_hat"].to(images.dtype))
    found["layer3"] = twin.tail[0](found["layer2"].clone())
    found["logits"] = twin.tail[1](found["layer3"].clone())
    return {name: value.detach() for name, value in found.items()}


def taught(images: Tensor, network: nn.Module | None = None) -> dict[str, Tensor]:
    """What the teacher makes of a batch, seen by hooks on the whole backbone."""
    network = (backbone() if network is None else network).to(images.dtype).eval()
    found: dict[str, Tensor] = {}
    for name in ("layer2", "layer3"):
        network.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.__setitem__(name, output.clone())
        )
    with torch.no_grad():
        found["logits"] = network(images)
    return found


def terms_of(task: SplitTask, images: Tensor, labels: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The task's terms and all that :func:`by_hand` finds, drawn with the same noise."""
    torch.manual_seed(7)
    found = by_hand(task.network, images)
    torch.manual_seed(7)
    return {name: value.item() for name, value in task.training_loss((images, labels)).items()}, found


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
