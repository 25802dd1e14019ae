"""The commands that follow from a plan."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cleave.architectures import CutError, staged_network
from cleave.deployment.codecs.packing import MAX_BITS, MIN_BITS
from cleave.lightning_modules.command_line import quoted
from cleave.planning import Plan
from cleave.planning.planners.problem import Problem
from cleave.reports.terminal import say
from cleave.scripts.assembly.hints import next_command
from cleave.scripts.assembly.planning.problem import Planned, Settings

FORMS = ("replace", "insert")
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
        whole = {"method": "classification", **_image_size(cfg), "export": True}
        next_command("train", whole, chosen_backbone(cfg))
        next_command("export", {"ckpt_path": "FILE"})
        return
    found = trainable_split(settings, planned, best, shape)
    if found is None:
        say("No layer alone passes on near this cut, so that no bottleneck can stand there; partition makes its parts")
        return
    layer, form = found
    if len(best.sent) > 1:
        say(f"{len(best.sent)} tensors pass this cut, which partition makes; of single layers the best is {layer}")
    elif layer != {node.name: node.layer for node in planned.graph.nodes.nodes}[best.sent[0].name]:
        say(f"No bottleneck can stand where {best.sent[0].name} passes on; of the other layers the best is {layer}")
    chosen: dict[str, Any] = {"method": "cross_entropy", "split.at": layer, **_image_size(cfg)}
    chosen |= {} if form == FORMS[0] else {"split.form": form}
    if MIN_BITS <= settings.options.bits <= MAX_BITS:
        chosen["codec.bits"] = settings.options.bits
    next_command("train", chosen, chosen_backbone(cfg))


def _image_size(cfg: DictConfig) -> dict[str, int]:
    return {} if cfg.image_size is None else {"data.image_size": cfg.image_size}


def trainable_split(settings: Settings, planned: Planned, best: Plan, shape: Iterable[int]) -> tuple[str, str] | None:
    """Return the layer that alone passes on at the plan's cut, or at the best where a bottleneck fits, and its form.

    Maps take one in place of the head, tokens one behind it.
    """
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
        for form in FORMS:
            with contextlib.suppress(CutError, ValueError):
                staged_network(planned.network, sample, split=names[i], form=form)
                return names[i], form
    return None


def chosen_backbone(cfg: DictConfig) -> str:
    """Return the words of the command line that chose the network, or those that would have where there is none."""
    if HydraConfig.initialized():
        words = [str(word) for word in HydraConfig.get().overrides.task]
        return " ".join(shlex.quote(word) for word in words if re.match(r"[+~]{0,2}backbone\b", word))
    chosen = {"backbone": cfg.backbone.source}
    if cfg.backbone.source == "custom":
        return quoted(chosen | {"backbone.network._target_": cfg.backbone.network._target_})
    return quoted(chosen | {"backbone.name": cfg.backbone.name})
