"""From a config to data, networks, teachers and tasks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from cleave.architectures import Backbone
from cleave.datamodules import ImageDataModule
from cleave.deployment import ImageInput
from cleave.lightning_modules import Task, Teacher
from cleave.scripts.assembly.networks import build_network
from cleave.scripts.assembly.restoring import load_strictly, restore
from cleave.scripts.assembly.terminal import CONF


def compose_config(name: str, overrides: Sequence[str], output_dir: Path) -> DictConfig:
    """Compose a script's config outside of Hydra's own launcher, as the demonstration and the tests do."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(name, list(overrides))
    # Set afterwards: a folder's name may hold what an override's grammar gives a meaning.
    cfg.paths.output_dir, cfg.paths.root_dir = str(output_dir), str(Path.cwd())
    return cfg


class Assembly(NamedTuple):
    """What a training run is made of, but for its tasks.

    Attributes:
        data: The images.
        network: What is trained.
        teaching: Further arguments of every task: the ``teacher`` of a split network, or nothing.
    """

    data: ImageDataModule
    network: nn.Module
    teaching: dict[str, Any]


def assemble(cfg: DictConfig) -> Assembly:
    """Build data → backbone → teacher → network from a composed config.

    Raises:
        ValueError: The parts do not fit each other; the message says which and how to mend it.
    """
    data = instantiate(cfg.data)
    if "teacher" not in cfg or ("exits" in cfg and cfg.teacher.ckpt_path is None):
        backbone = instantiate(cfg.backbone, num_classes=data.num_classes)
        data.configure_input(_with_native_statistics(backbone, data))
        teaching = {"teacher": _external_teacher(cfg, data, None)} if "exits" in cfg else {}
        return Assembly(data, build_network(cfg, backbone.network, data.input), teaching)
    backbone, teacher, image_input = _student_and_teacher(cfg, data)
    data.configure_input(image_input)
    if data.input != image_input:
        raise ValueError(
            f"the teacher was trained on the input {image_input}, but the data overrides make it {data.input}; "
            "leave data.image_size, mean, std and interpolation as the teacher had them"
        )
    teaching = {"teacher": _external_teacher(cfg, data, teacher) if "exits" in cfg else teacher}
    return Assembly(data, build_network(cfg, backbone, image_input), teaching)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a config into plain containers."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def instantiate_each(group: DictConfig | None) -> list[Any]:
    """Instantiate the entries of a group such as ``callbacks``; an entry set to null is left out."""
    return [instantiate(entry) for entry in (group or {}).values() if entry is not None]


def build_task(cfg: DictConfig, network: nn.Module, class_names: list[str], **kwargs: Any) -> Task:
    """Build the task of ``cfg.method`` around a network."""
    build = instantiate(cfg.method, _partial_=True, _convert_="all")
    return build(network=network, class_names=class_names, **kwargs)


def _student_and_teacher(cfg: DictConfig, data: ImageDataModule) -> tuple[nn.Module, Teacher, ImageInput]:
    """Return the student's backbone with the teacher's weights, the teacher, and the input both take."""
    if cfg.teacher.ckpt_path is None:
        backbone: Backbone = instantiate(cfg.backbone, num_classes=data.num_classes)
        if not backbone.pretrained:
            raise ValueError(
                "without teacher.ckpt_path the pretrained backbone is the teacher, but it has random weights; "
                "give teacher.ckpt_path=FILE, backbone.weights=FILE or backbone.pretrained=true"
            )
        if backbone.reinitialised:
            raise ValueError(
                f"without teacher.ckpt_path the pretrained backbone is the teacher, but its classifier "
                f"({', '.join(backbone.reinitialised)}) was made for other classes and is random now; train it first "
                "with method=classification and give teacher.ckpt_path=FILE"
            )
        return backbone.network, Teacher(copy.deepcopy(backbone.network)), backbone.input
    for key in ("weights", "pretrained"):
        if cfg.backbone.get(key):
            raise ValueError(
                f"backbone.{key}={cfg.backbone[key]} has no meaning beside teacher.ckpt_path: the student starts from "
                "the teacher's weights; leave one of the two out"
            )
    restored = restore(cfg.teacher.ckpt_path, trusted=cfg.teacher.trust_checkpoint)
    if restored.class_names != data.class_names:
        raise ValueError(
            f"the teacher {cfg.teacher.ckpt_path} knows the classes {restored.class_names}, "
            f"the data has {data.class_names}"
        )
    untrained = OmegaConf.merge(cfg.backbone, {"pretrained": False, "weights": None})
    student = instantiate(untrained, num_classes=data.num_classes).network
    load_strictly(student, restored.network.state_dict(), f"the teacher {cfg.teacher.ckpt_path}")
    return student, Teacher(restored.network, str(cfg.teacher.ckpt_path), restored.sha256), restored.image_input


def _external_teacher(cfg: DictConfig, data: ImageDataModule, own: Teacher | None) -> Teacher | None:
    """Return the teacher that ``distil_from`` names, of any architecture, or else the network that gets exits."""
    if cfg.distil_from.ckpt_path is None:
        return own
    methods = [cfg.method, *(stage.get("method", {}) for stage in (cfg.get("stages") or {}).values())]
    if not any(method.get("objective", {}).get("source") == "teacher" for method in methods):
        raise ValueError(
            f"distil_from.ckpt_path={cfg.distil_from.ckpt_path} would be ignored: nothing learns from that teacher; "
            "set method=exits_distilled method.objective.source=teacher, or leave it out"
        )
    restored = restore(cfg.distil_from.ckpt_path, trusted=cfg.distil_from.trust_checkpoint)
    for what, theirs, ours in (
        ("classes", restored.class_names, data.class_names),
        ("input", restored.image_input, data.input),
    ):
        if theirs != ours:
            raise ValueError(
                f"the teacher {cfg.distil_from.ckpt_path} was trained on the {what} {theirs}, the exits are on {ours}; "
                "take a teacher of the same images"
            )
    return Teacher(restored.network, str(cfg.distil_from.ckpt_path), restored.sha256)


def _with_native_statistics(backbone: Backbone, data: ImageDataModule) -> ImageInput:
    """The backbone's input; where its weights are random, mean and std are those of the data instead of its own."""
    native = data.native_input
    if backbone.pretrained is not None or native.color_mode != backbone.input.color_mode:
        return backbone.input
    return dataclasses.replace(backbone.input, mean=native.mean, std=native.std)
