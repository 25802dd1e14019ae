"""From a config to the network, the machines and the link that planners take."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig
from torch import nn

from cleave.architectures import CutError, NodeGraph, count_macs, count_params, cut_points, trace_graph
from cleave.architectures.naming import whole_number
from cleave.planning import (
    LayerGraph,
    Link,
    Machine,
    PlanOptions,
    Profile,
    layer_graph,
    read_profile,
    roofline,
    write_profile,
)
from cleave.planning.graphs.chain import chain_graph
from cleave.planning.profiles.checks import of_type, positive
from cleave.planning.profiles.measured import measure_profile
from cleave.reports.terminal import say
from cleave.scripts.assembly.networks import build_backbone, keyed

HERE = "here"
GROUPS = ("device", "server", "link", "options")


class Settings(NamedTuple):
    """What a config says beside the network, checked before anything takes time.

    Attributes:
        device: The device's data sheet.
        server: The server's.
        link: What lies between.
        options: The planners' options.
        rates: Mbit/s up of the plot.
        given: Measured profiles that were read, by side.
    """

    device: Machine
    server: Machine
    link: Link
    options: PlanOptions
    rates: tuple[float, ...]
    given: dict[str, Profile]


class Planned(NamedTuple):
    """A network with its graph and its times.

    Attributes:
        network: The network.
        graph: Its layers.
        device: Seconds of its nodes on the device.
        server: Seconds of its nodes on the server.
    """

    network: nn.Module
    graph: LayerGraph
    device: Profile
    server: Profile


def read_settings(cfg: DictConfig) -> Settings:
    """Read and check the machines, the link, the options and the profiles.

    Raises:
        ValueError: A setting is out of range; the message names its key.
        FileNotFoundError: There is no such profile or trace.
    """
    built = {}
    _check_counts(cfg)
    for key in GROUPS:
        with keyed(key, dict.fromkeys(_names(cfg[key]))):
            built[key] = instantiate(cfg[key], _convert_="all")
    rates = tuple(positive("rates", rate, "Mbit/s up, each of them") for rate in _listed("rates", cfg.rates))
    given = {}
    for side in ("device", "server"):
        file = cfg[f"{side}_profile"]
        if file is not None and file != HERE:
            of_type(f"{side}_profile", file, str, f"the JSON file of a profile, {HERE}, or null")
            if not Path(file).is_file():
                raise FileNotFoundError(f"{side}_profile={file} does not exist; give a JSON file of seconds, or {HERE}")
            given[side] = read_profile(file)
        elif file is None:
            _check_rates(side, built[side])
    if built["options"].objective == "energy":
        if "device" in given and given["device"].power is None:
            raise ValueError(
                f"options.objective=energy needs the watts of the device, and device_profile={cfg.device_profile} has "
                "none; give its power idle, compute and send in watts"
            )
        if "device" not in given and built["device"].power is None:
            raise ValueError("options.objective=energy needs the watts of the device; set device.power, or another one")
    return Settings(**built, rates=rates, given=given)


def _check_counts(cfg: DictConfig) -> None:
    for key in GROUPS:
        of_type(key, cfg[key], DictConfig, f"a group of settings, as {key}.NAME=VALUE; not null")
    whole_number("num_classes", cfg.num_classes)
    if cfg.image_size is not None:
        whole_number("image_size", cfg.image_size)
    if cfg.depth is not None:
        whole_number("depth", cfg.depth, least=0)


def _listed(key: str, values: Any) -> list[Any]:
    """Return the entries of a list; null has none."""
    if values is None:
        return []
    of_type(key, values, ListConfig | list, f"a list; write {key}=[{values}]")
    return list(values)


def _names(group: DictConfig) -> list[str]:
    """Return the names of a group's settings, and of those in groups within."""
    found = list(map(str, group))
    for name in list(found):
        if isinstance(group[name], DictConfig):
            found += [f"{name}.{inner!s}" for inner in group[name]]
    return found


def _check_rates(side: str, machine: Machine) -> None:
    for name in ("rate", "bandwidth"):
        if getattr(machine, name) is None:
            raise ValueError(
                f"{side}.{name} of {machine.name} is missing: set {side}.{name}, or give {side}_profile=FILE"
            )


def plan_problem(cfg: DictConfig, settings: Settings, folder: Path) -> Planned:
    """Build the network, open it, and time it on both machines; profiles that are measured are written to the folder.

    Raises:
        CutError: The network cannot be opened at all, and has no cut points either.
        ValueError: A profile is of another network.
    """
    side = cfg.image_size
    backbone = build_backbone(cfg.backbone, cfg.num_classes, None if side is None else (side, side))
    image_input = backbone.input
    if side is not None:
        image_input = dataclasses.replace(image_input, height=side, width=side, resize=None)
    sample = torch.randn(2, *image_input.shape, generator=torch.Generator().manual_seed(0))
    network = backbone.network.eval()
    nodes = open_network(network, sample, cfg.depth)
    profiles = {side: _profile(side, cfg, settings, network, nodes, sample, folder) for side in ("device", "server")}
    return Planned(network, layer_graph(nodes), profiles["device"], profiles["server"])


def open_network(network: nn.Module, sample: torch.Tensor, depth: int | None) -> NodeGraph:
    """Return the graph of a network; of one that cannot be opened, the chain of its cut points.

    Raises:
        CutError: It has none.
    """
    try:
        return trace_graph(network, sample, depth)
    except CutError as error:
        try:
            points = cut_points(network, sample)
        except CutError:
            points = []
        if not points:
            raise CutError(
                f"{error} It has no cut point either, so that there is nothing to plan but all on the device or all on "
                "the server"
            ) from error
        say(f"The network cannot be opened ({error}); only its {len(points)} cut points are planned, as a chain")
        with torch.no_grad():
            answers = network(sample[:1])
        shape = tuple(answers.shape) if isinstance(answers, torch.Tensor) else ()
        whole = (count_macs(network, sample[:1]), count_params(network), math.prod(shape))
        return chain_graph(points, tuple(sample.shape[1:]), *whole)


def _profile(
    side: str, cfg: DictConfig, settings: Settings, network: nn.Module, nodes: NodeGraph, sample: Any, folder: Path
) -> Profile:
    machine: Machine = getattr(settings, side)
    if side in settings.given:
        with keyed(f"{side}_profile", {}):
            return settings.given[side].check(nodes)
    if cfg[f"{side}_profile"] != HERE:
        with keyed(side, cfg[side]):
            return roofline(nodes, machine)
    profile = measure_profile(network, nodes, sample[:1], depth=cfg.depth, power=machine.power)
    file = folder / f"{side}_profile.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_profile(file, profile)
    assert profile.whole is not None
    say(
        f"Measured for the {side}: {1e3 * profile.total:.4g} ms node by node, {1e3 * profile.whole:.4g} ms as a whole, "
        f"a ratio of {profile.total / profile.whole:.3f}; {profile.threads} threads, batch {profile.batch}; {file}"
    )
    if machine.power is not None:
        say(f"Its watts are those of {side}={machine.name}, as nothing here measures them")
    return profile
