"""Parameter groups, learning rates and schedules."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import Optimizer

from cleave.architectures import StagedNetwork
from cleave.architectures.layer_depths import depth_scales
from cleave.architectures.naming import did_you_mean
from cleave.lightning_modules.optimization.training import Training


def check_rates(network: StagedNetwork, settings: Training) -> None:
    """Check what scales the rates of single layers.

    Raises:
        ValueError: A prefix of ``lr_scales`` is that of no weight of the network; or rates should decay over layers,
            but the backbone does not say which it has.
    """
    names = [name.split(".") for name, _ in network.named_weights()]
    known = list(dict.fromkeys(".".join(name[: i + 1]) for name in names for i in range(len(name))))
    for prefix in settings.lr_scales:
        if prefix not in known:
            raise ValueError(f"lr_scales names {prefix!r}, which the network lacks." + did_you_mean(prefix, known))
    if settings.layer_decay is not None and not network.layer_depths:
        raise ValueError(
            f"layer_decay={settings.layer_decay} needs a backbone that groups its layers, as timm's do "
            "(group_matcher); use lr_scales, such as +training.lr_scales.layer1=0.1"
        )


def parameter_groups(network: StagedNetwork, terms: nn.Module, settings: Training) -> list[dict[str, Any]]:
    """Group trainable parameters by their rate and by whether they decay; those of terms come last and do not.

    Raises:
        ValueError: Nothing is trainable, or rates are scaled with an optimizer that names none.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    spared = _undecayed(network)
    scaled = bool(settings.lr_scales) or settings.layer_decay is not None
    depths = depth_scales(network.layer_depths, settings.layer_decay or 1.0)
    for name, parameter in _in_order(network):
        decays = settings.decay_norms_and_biases or (parameter.ndim > 1 and parameter not in spared)
        scale = _scale(name, settings.lr_scales) * depths.get(name, 1.0)
        groups.setdefault((scale, decays), []).append(parameter)
    learned = [parameter for parameter in terms.parameters() if parameter.requires_grad]
    if not groups and not learned:
        raise ValueError("there is nothing to train: every parameter of the network is frozen")
    base = base_rate(settings.optimizer) if scaled else 1.0
    found: list[dict[str, Any]] = []
    for (scale, decays), parameters in groups.items():
        found.append({"params": parameters})
        if scaled:
            found[-1]["lr"] = base * scale
        if not decays:
            found[-1]["weight_decay"] = 0.0
    return [*found, {"params": learned, "weight_decay": 0.0}] if learned else found


def _in_order(network: StagedNetwork) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable weights in the order of the parts, a range or prior behind the coders that it serves.

    A norm over all gradients is summed in this order.
    """
    names = {parameter: name for name, parameter in network.named_weights()}
    parts = network.parts()
    order = [part for part in parts if part.partition("/")[0] != "quantizer"]
    for cut in network.bottlenecks:
        order.insert(order.index(f"decoder/{cut}") + 1, f"quantizer/{cut}")
    weights = (module.parameters() for part in order for module in parts[part])
    for parameter in dict.fromkeys(itertools.chain(*weights, names)):
        if parameter.requires_grad:
            yield names[parameter], parameter


def _undecayed(network: nn.Module) -> set[nn.Parameter]:
    modules = (module for module in network.modules() if not getattr(module, "decays", True))
    return {parameter for module in modules for parameter in module.parameters()}


def _scale(name: str, scales: Mapping[str, float]) -> float:
    prefixes = [prefix for prefix in scales if name == prefix or name.startswith(prefix + ".")]
    return scales[max(prefixes, key=len)] if prefixes else 1.0


def base_rate(optimizer: Callable[..., Optimizer]) -> float:
    """Return the learning rate that an optimizer's factory names.

    Raises:
        ValueError: It names none.
    """
    keywords = getattr(optimizer, "keywords", {})
    factory = getattr(optimizer, "func", optimizer)
    rate = keywords.get("lr", getattr(inspect.signature(factory).parameters.get("lr"), "default", None))
    if not isinstance(rate, int | float):
        raise ValueError("lr_scales and layer_decay need a learning rate to scale: give the optimizer's lr as a number")
    return float(rate)


def optimizers_of(settings: Training, groups: list[dict[str, Any]], trainer: pl.Trainer, monitor: str) -> Any:
    """Return the optimizer over some groups, with its scheduler where there is one, as Lightning takes them."""
    optimizer = settings.optimizer(groups)
    if settings.scheduler is None:
        return optimizer
    scheduler = {
        "scheduler": scheduler_of(settings.scheduler, optimizer, trainer),
        "interval": settings.scheduler_interval,
        "monitor": monitor,
    }
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def scheduler_of(factory: Callable[..., Any], optimizer: Optimizer, trainer: pl.Trainer) -> Any:
    """Build a scheduler; ``"total_steps"`` among its arguments becomes the optimizer steps of the run.

    Raises:
        ValueError: It asks for the number of steps of a run without an end.
    """
    keywords = getattr(factory, "keywords", {})
    if "total_steps" not in keywords.values():
        return factory(optimizer)
    total = trainer.estimated_stepping_batches
    if not math.isfinite(total):
        raise ValueError("the scheduler needs the number of steps, but the run has no end; set trainer.max_epochs")
    steps = {key: int(total) for key, value in keywords.items() if value == "total_steps"}
    return functools.partial(factory, **steps)(optimizer)


def clip_apart(optimizer: Optimizer, terms: nn.Module, value: float, algorithm: str | None) -> None:
    """Clip the gradients of terms and those of the network each by themselves, by their norm or by value."""
    own = set(terms.parameters())
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameters in ([p for p in every if p not in own], [p for p in every if p in own]):
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, value)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, value)
