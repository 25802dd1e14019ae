"""A deep copy of a backbone, cut in the order in which it runs its layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures.cutting.stages import LOGITS, CutError, Stages, cut
from cleave.architectures.modes import evaluating
from cleave.architectures.naming import did_you_mean
from cleave.deployment.bundle.torchscript import is_scripted


def cut_copy(backbone: nn.Module, names: Sequence[str], sample: Tensor) -> tuple[Stages, dict[str, Any]]:
    """Cut a copy of the backbone in the order in which it runs its layers; return it in train mode, with its features.

    Without names the backbone is the only stage, and nothing is known of its features.
    """
    if not names:
        return Stages([backbone], ()).train(), {LOGITS: None}
    backbone = copy.deepcopy(unscripted(backbone))
    stages = cut(backbone, at=in_order(backbone, names, sample), sample=sample)
    with torch.no_grad(), evaluating(stages):
        features: dict[str, Any] = stages.features(sample[:1].clone(), at=[*names, LOGITS])
    return stages.train(), features


def unscripted(backbone: nn.Module) -> nn.Module:
    """Return a backbone, unless some of it is scripted.

    Raises:
        CutError: A layer is scripted: a copy of it computes with weights that no optimizer reaches.
    """
    for name, layer in backbone.named_modules():
        if is_scripted(layer):
            raise CutError(
                f"layer {name!r} of {type(backbone).__name__} is scripted, and a copy of it would not learn; build it "
                "without scripting"
            )
    return backbone


def in_order(backbone: nn.Module, names: Sequence[str], sample: Tensor) -> list[str]:
    """Return the names of some layers in the order in which a backbone runs them.

    Raises:
        CutError: There is no layer of a name.
    """
    layers = dict(backbone.named_modules())
    for name in names:
        if not name or name not in layers:
            raise CutError(f"{type(backbone).__name__} has no layer {name!r}.{did_you_mean(name, layers)}")
    if len(names) < 2:
        return list(names)
    order: list[str] = []
    hooks = [layers[name].register_forward_hook(lambda *_, name=name: order.append(name)) for name in names]
    with torch.no_grad(), evaluating(backbone):
        backbone(sample[:1].clone())  # it may work in place
    for hook in hooks:
        hook.remove()
    last_call = {name: i for i, name in enumerate(order)}
    return sorted(names, key=lambda name: last_call.get(name, -1))
