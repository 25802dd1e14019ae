"""The commands that follow from a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cleave.architectures import CutError, cut
from cleave.planning import Plan
from cleave.planning.planners.problem import Problem
from cleave.reports.terminal import say
from cleave.scripts.assembly.hints import next_command
from cleave.scripts.assembly.planning.problem import Planned, Settings

TRIES = 5  # cuts that are tried before none is named


def say_what_follows(cfg: DictConfig, settings: Settings, planned: Planned, best: Plan, shape: Iterable[int]) -> None:
    """Print what to type next for a plan: training at its layer, or export of the network as it is.

    Args:
        cfg: The config.
        settings: What it says.
        planned: The network that was planned.
        best: The plan.
        shape: Per-sample shape of the network's input.
    """
    if not best.sent or [each.name for each in best.sent] == ["input"]:
        where = "on the server, which is sent images" if best.sent else "on the device"
        say(f"The whole network runs {where}: train it unsplit, and export the checkpoint")
        next_command("train", {"method": "classification", "export": True}, chosen_backbone(cfg))
        next_command("export", {"ckpt_path": "FILE"})
        return
    layer = trainable_layer(settings, planned, best, shape)
    if layer is None:
        say("No layer alone passes on near this cut, so that no bottleneck can stand there; partition makes its parts")
        return
    if len(best.sent) > 1:
        say(f"{len(best.sent)} tensors pass this cut, which partition makes; the best cut of a single layer is {layer}")
    next_command("train", {"method": "cross_entropy", "split.at": layer}, chosen_backbone(cfg))


def trainable_layer(settings: Settings, planned: Planned, best: Plan, shape: Iterable[int]) -> str | None:
    """Return the layer that alone passes on at the plan's cut, or at the best cut that ``split.at`` accepts."""
    problem = Problem(planned.graph, planned.device, settings.link, planned.server, settings.options)
    layers = {node.name: node.layer for node in planned.graph.nodes.nodes}
    sets = planned.graph.single_cuts()
    if not sets.size:
        return None
    worth = problem.costs(sets).of(settings.options.objective)
    names = [layers[planned.graph.sent(members)[0].name] for members in sets.T]
    own = {layers[each.name] for each in best.sent} if len(best.sent) == 1 else set()
    order = sorted(np.flatnonzero([bool(name) for name in names]), key=lambda i: (names[i] not in own, worth[i]))
    sample = torch.zeros(1, *shape)
    for i in order[:TRIES]:
        try:
            cut(planned.network, [names[i]], sample)
        except CutError:
            continue
        return names[i]
    return None


def chosen_backbone(cfg: DictConfig) -> str:
    """Return the words of the command line that chose the network, quoted; those of Python, where there are none."""
    from cleave.lightning_modules.command_line import quoted

    if HydraConfig.initialized():
        words = HydraConfig.get().overrides.task
        kept: Mapping[str, Any] = dict(word.split("=", 1) for word in words if word.lstrip("+").startswith("backbone"))
        return quoted(kept)
    return quoted({"backbone.name": OmegaConf.select(cfg, "backbone.name")})
