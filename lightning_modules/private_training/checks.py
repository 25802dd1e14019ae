"""What would break the promise of differentially private training, refused before a step is taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.private_training.sample_gradients import Gradients
from cleave.lightning_modules.term import STUDENT, Term

if TYPE_CHECKING:
    from cleave.lightning_modules.task import Task

PRECISIONS = ("32-true", "64-true")
FEW = 4
_CLOSE = 1e-3


def check_parts(network: StagedNetwork, parts: Sequence[str], terms: Mapping[str, Term], compiled: bool) -> None:
    """Refuse parts and terms that do not treat each sample by itself.

    Args:
        network: The network.
        parts: Its parts that are trained.
        terms: The terms whose parameters are trained, by name.
        compiled: Whether its modules are compiled.

    Raises:
        ValueError: A part that learns has statistics of the batch or a learned prior, or a term learns; or layers are
            compiled, whose gradients cannot be watched.
    """
    if compiled:
        raise ValueError(
            "DP-SGD watches single layers, which a compiled network has none of; set training.compile=false"
        )
    modules = network.parts()
    trained = {each for part in parts for module in modules[part] for each in module.modules()}
    names = [
        name.removeprefix("at:")
        for name, module in network.named_modules()
        if module in trained and _measures_batches(module)
    ]
    if names:
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"DP-SGD knows no gradient of a single sample behind BatchNorm, and these would train: {listed}. Take "
            "GroupNorm (bottleneck.norm=group, exits.head.norm=group, 'backbone.kwargs={norm: group}' for Cleave's "
            "ResNets), a backbone without BatchNorm, or freeze that part, such as method.train=[bottleneck]"
        )
    for cut, bottleneck in network.bottlenecks.items():
        if bottleneck.has_prior and f"quantizer/{cut}" in parts:
            raise ValueError(f"DP-SGD trains no learned prior, which {cut} has; take codec=uniform")
        if getattr(bottleneck.noise, "adaptive", False):
            raise ValueError(
                f"the noise at {cut} follows the norms of training images, which DP-SGD would not cover; give "
                "noise.bound a number"
            )
        noise = [] if bottleneck.noise is None else list(bottleneck.noise.parameters())
        if noise and f"noise/{cut}" in parts:
            raise ValueError(f"DP-SGD trains no noise or mask that is learned, which {cut} has; freeze or leave it out")
    for name, term in terms.items():
        if any(weight.requires_grad for weight in term.parameters()):
            raise ValueError(
                f"DP-SGD trains the network alone, but the term {name!r} has parameters of its own; leave it out"
            )


def _measures_batches(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.track_running_stats)


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse a trainer that would not keep the promise.

    Raises:
        ValueError: It has several devices, gathers gradients over batches, rounds, or chooses by training images.
    """
    if trainer.world_size > 1:
        raise ValueError(f"DP-SGD trains on one device, got {trainer.world_size}; set trainer.devices=1")
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"DP-SGD adds noise once for each batch drawn, got accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}; set it to 1 and raise data.batch_size"
        )
    if trainer.precision not in PRECISIONS:
        raise ValueError(
            f"DP-SGD clips gradients in full precision, got trainer.precision={trainer.precision}; set 32-true"
        )
    watched = [(type(each).__name__, getattr(each, "monitor", None)) for each in cast(Any, trainer).callbacks]
    watched += [(type(each.scheduler).__name__, each.monitor) for each in _plateaus(trainer)]
    for name, metric in watched:
        if isinstance(metric, str) and metric.startswith("train/"):
            raise ValueError(
                f"{name} follows {metric}, which tells of training images what DP-SGD does not cover; let it watch a "
                "metric of validation, such as training.monitor=val/acc"
            )


def _plateaus(trainer: pl.Trainer) -> list[Any]:
    return [each for each in trainer.lr_scheduler_configs if each.reduce_on_plateau]


def check_batch(task: Task, batch: Mapping[str, Any]) -> None:
    """Refuse networks and terms that couple the samples of a batch, tried on a few of a first one.

    Raises:
        ValueError: A sample changes what another one gives, a term is no mean over samples, or one of them remembers
            what it saw.
    """
    few = cast(dict[str, Any], rows_of(batch, 0, FEW))
    with _unmoved(task.network, "the network", "freeze that part, or leave it out"):
        values = _check_network(task, few)
    for name, term in task.named_terms():
        with torch.no_grad():
            with _unmoved(term, f"the term {name!r}", "leave it out"):
                whole = sum_of(term, name, values)
            _check_term(name, term, values, whole)


def _check_network(task: Task, batch: dict[str, Any]) -> dict[str, Any]:
    """Return what a step makes of a batch, in which no sample may feel another."""
    watched: list[Tensor] = []

    def watch(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: watch(part) for name, part in value.items()}
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        watched.append(value.detach().clone().requires_grad_())
        return watched[-1].clone()  # a layer may change it in place, which a leaf does not allow

    with torch.enable_grad():
        read = {name: watch(batch[name]) for name in (task.reads, "given") if name in batch}
        values = task.values(batch | read)
        mine = [value for name, value in values.items() if name.startswith(f"{STUDENT}/") and value.requires_grad]
        generator = torch.Generator().manual_seed(0)
        first = [(each[0] * torch.rand(each[0].shape, generator=generator).to(each)).sum() for each in mine]
        found = torch.autograd.grad(torch.stack(first).sum(), watched, allow_unused=True) if first else ()
    if any(each is not None and each[1:].count_nonzero() for each in found):
        raise ValueError(
            "DP-SGD: a sample changes what the network makes of another one of its batch, so that no gradient belongs "
            "to one sample; take layers without statistics of the batch, or freeze that part"
        )
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}


def _check_term(name: str, term: Term, values: Mapping[str, Any], whole: Tensor) -> None:
    try:
        alone = [sum_of(term, name, rows_of(values, row, row + 1)) for row in range(count_of(values))]
    except ValueError as error:  # as of a statistic that takes several samples
        raise ValueError(_couples(name, term)) from error
    mean = torch.stack(alone).mean()
    if (whole - mean).abs() > _CLOSE * torch.stack([whole.abs(), mean.abs()]).max() + 1e-6:
        raise ValueError(_couples(name, term))


def _couples(name: str, term: Term) -> str:
    return (
        f"DP-SGD needs losses that are means over samples, but the term {name!r} ({type(term.loss).__name__}) couples "
        "the samples of a batch; leave it out, or train without training.dp"
    )


def sum_of(term: Term, name: str, values: Mapping[str, Any]) -> Tensor:
    """Return the sum of a term's values, float64."""
    return torch.stack([value.double() for value in term.losses(name, values).values()]).sum()


@contextmanager
def _unmoved(module: nn.Module, what: str, fix: str) -> Iterator[None]:
    """Refuse a module that keeps something of what it saw."""
    before = {name: value.clone() for name, value in module.named_buffers()}
    yield
    moved = [name for name, value in module.named_buffers() if name in before and not torch.equal(before[name], value)]
    for name in moved:
        module.get_buffer(name).copy_(before[name])
    if moved:
        raise ValueError(
            f"DP-SGD: {what} keeps what it measures of training images in {moved[0]}, which would not be covered; {fix}"
        )


def check_sums(network: StagedNetwork, found: Gradients, private: Sequence[nn.Parameter]) -> None:
    """Refuse gradients that single samples' do not add up to, as where a layer is not called by itself.

    Args:
        network: The network, behind a backward pass.
        found: Gradients of single samples by parameter.
        private: The parameters that learn.

    Raises:
        ValueError: They do not; the message names the parameter.
    """
    names = {weight: name for name, weight in network.named_weights()}
    for weight in private:
        whole = torch.zeros_like(weight) if weight.grad is None else weight.grad
        mean = found[weight].mean(0) if weight in found else torch.zeros_like(weight)
        if (whole - mean).norm() > _CLOSE * torch.maximum(whole.norm(), mean.norm()) + 1e-6:
            raise ValueError(
                f"DP-SGD cannot tell what single samples add to the gradient of {names[weight]}, whose layer is not "
                "called by itself; freeze that part, or take another network"
            )


def rows_of(value: Any, start: int, end: int) -> Any:
    """Return some rows of all tensors of a step, whatever holds them; other values stay as they are."""
    if isinstance(value, Mapping):
        return {name: rows_of(part, start, end) for name, part in value.items()}
    if isinstance(value, list):
        return value[start:end]
    return value[start:end] if isinstance(value, Tensor) and value.ndim else value


def count_of(batch: Any) -> int:
    """Return how many samples a batch has; 1 where it holds no tensor."""
    for value in batch.values():
        if isinstance(value, Mapping) and value:
            return count_of(value)
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    return 1
