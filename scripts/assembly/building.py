"""From a config to data, networks, teachers and tasks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from cleave.architectures import Backbone, StagedNetwork, staged_network
from cleave.architectures.described import sample_of
from cleave.architectures.linking.described import is_linked
from cleave.datamodules import ImageDataModule
from cleave.deployment import ExitPolicy, ImageInput
from cleave.lightning_modules import Evaluator, Frozen, Task, Training
from cleave.lightning_modules.evaluators import default_evaluators
from cleave.lightning_modules.measuring import MeasuredModule
from cleave.lightning_modules.optimization.training import prepare
from cleave.reports.terminal import console
from cleave.scripts.assembly.given.paths import settle
from cleave.scripts.assembly.linking.lending import lend
from cleave.scripts.assembly.networks import build_backbone, build_network, keyed, plain_value
from cleave.scripts.assembly.restoring import Restored, restore
from cleave.scripts.assembly.starting.terminal import CONF
from cleave.scripts.assembly.taking_over import check_taken, take_over

TEACHER = "teacher"
_INSTEAD = {
    "logger": "choose by logger=csv, logger=none and the like",
    "callbacks": "add one by +callbacks.NAME._target_=…",
    "enable_checkpointing": "nothing is trained here; leave it out",
}


def compose_config(name: str, overrides: Sequence[str], output_dir: Path) -> DictConfig:
    """Compose a script's config outside of Hydra's own launcher, as the demonstration and the tests do."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(name, list(overrides))
    # Set afterwards: a folder's name may hold what an override's grammar gives a meaning.
    cfg.paths.output_dir, cfg.paths.root_dir = str(output_dir), str(Path.cwd())
    settle(cfg)
    return cfg


class Assembly(NamedTuple):
    """What a training run is made of, but for its tasks.

    Attributes:
        data: The images.
        network: What is trained.
        others: Frozen networks beside it by name: the ``teacher``, if there is one that could teach.
        from_scratch: Whether the backbone has random weights.
        host: What a run writes down of the network that lends its blocks to a path, if there is one.
    """

    data: ImageDataModule
    network: StagedNetwork
    others: dict[str, Frozen]
    from_scratch: bool
    host: dict[str, Any] | None = None


def assemble(cfg: DictConfig, methods: Sequence[DictConfig]) -> Assembly:
    """Build data → base → network → teacher from a composed config.

    Args:
        cfg: The run's config.
        methods: The ``method`` of each step, whose terms name layers.

    Raises:
        ValueError: The parts do not fit each other; the message says which and how to mend it.
    """
    data = instantiate(cfg.data)
    taught = [*layers_of(methods, cfg, TEACHER), *compared_block(methods, cfg)]
    base = _restored_base(cfg, data, taught)
    size = size_of(data, base.image_input if base else None)
    backbone = build_backbone(_untrained(cfg) if base else cfg.backbone, data.num_classes, size)
    _configure_input(data, base, backbone)
    # Before the network is cut from the backbone, of which the teacher is a copy.
    pretrained = None if base or backbone.pretrained is None else copy.deepcopy(backbone.network)
    taken = take_over(backbone.network, base.network.state_dict()) if base else set()
    lent = lend(cfg, base.sha256 if base else None)
    network = build_network(
        cfg, backbone.network, data.input, layers_of(methods, cfg), None if lent is None else lent.host
    )
    if base:
        whole = backbone.network if is_linked(cfg) else network
        check_taken(whole, base.network.state_dict(), taken, str(cfg.base.ckpt_path), console)
    teacher = _teacher(cfg, data, base, pretrained, taught)
    others = {} if teacher is None else {TEACHER: teacher}
    from_scratch = base is None and backbone.pretrained is None
    return Assembly(data, network, others, from_scratch, None if lent is None else lent.config)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a config into plain containers."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def instantiate_each(group: DictConfig | None) -> list[Any]:
    """Instantiate the entries of a group such as ``callbacks``; an entry set to null is left out."""
    return [instantiate(entry) for entry in (group or {}).values() if entry is not None]


def build_trainer(cfg: DictConfig, **own: Any) -> pl.Trainer:
    """Build the trainer of ``cfg.trainer`` with what the script sets itself.

    Raises:
        ValueError: The config sets one of these, too.
    """
    for key, value in own.items():
        given = cfg.trainer.get(key)
        if given is not None and given != value:
            instead = _INSTEAD.get(key, "leave it out") if key != "callbacks" or key in cfg else "leave it out"
            raise ValueError(f"trainer.{key}={given} would be ignored: {instead}")
    trainer: pl.Trainer = instantiate(cfg.trainer, _partial_=True)(**own)
    return trainer


def build_task(
    cfg: DictConfig,
    network: StagedNetwork,
    class_names: list[str],
    others: Mapping[str, Frozen] | None = None,
) -> Task:
    """Build the task of ``cfg.method`` around a network, trained as ``cfg.training`` says.

    Args:
        cfg: A run's config.
        network: The network.
        class_names: Names of the classes in the order of the logits.
        others: Frozen networks beside it by name.
    """
    build = instantiate(cfg.method, _partial_=True, _convert_="all")
    with keyed("training", cfg.training):
        training: Training = instantiate(cfg.training, _convert_="all")
    with keyed("method", cfg.method):
        return build(
            network=network,
            others=dict(others or {}),
            evaluators=_evaluators(cfg, network, class_names),
            training=training,
            feature_cache=plain(cfg.feature_cache),
        )


def build_measured(
    cfg: DictConfig, network: StagedNetwork, class_names: list[str], policy: ExitPolicy | None = None
) -> MeasuredModule:
    """Build what measures a trained network; neither its method nor its optimizer are needed for that.

    Args:
        cfg: The config that it was trained with.
        network: The network.
        class_names: Names of the classes in the order of the logits.
        policy: An exit policy to test with; ``None`` takes that of the config.
    """
    evaluators = _evaluators(cfg, network, class_names, policy)
    layout = {key: cfg.training.get(key, False) for key in ("channels_last", "compile")}
    training = Training(seed=cfg.training.seed, **layout)
    measured = MeasuredModule(network, evaluators, cfg.get("trained", []), "images", training.seed)
    prepare([network], training)
    return measured


def _evaluators(
    cfg: DictConfig, network: StagedNetwork, class_names: list[str], policy: ExitPolicy | None = None
) -> list[Evaluator]:
    own = plain_value(cfg.exits.policy) if policy is None and network.exits else policy
    return default_evaluators(network, class_names, own)


def layers_of(methods: Sequence[DictConfig], cfg: DictConfig, owner: str = "student") -> list[str]:
    """Return the layers that the terms of all steps read of a network, before there is one."""
    split = plain_value(cfg.split.at)
    splits = [] if split is None else [split] if isinstance(split, str) else split
    found = (get_class(method._target_).layers(splits, plain(method), owner) for method in methods)
    names = dict.fromkeys(layer for layers in found for layer in layers)
    if split is None and "None" in names:  # as ${split.at} of a preset
        raise ValueError(f"a term reads {owner}/None/z, but the network is not split; set split.at=LAYER")
    return list(names) if is_linked(cfg) else list(dict.fromkeys(name.partition("/")[0] for name in names))


def compared_block(methods: Sequence[DictConfig], cfg: DictConfig) -> list[str]:
    """Return the local layer before block lin where a method compares with its feature, as far as the config says it.

    Where blocks are a number, a base without cuts is cut there later.
    """
    if not is_linked(cfg) or not any(method.get("feature") for method in methods):
        return []
    blocks, lin = plain_value(cfg.links.local_blocks), plain_value(cfg.links.path)[-1]
    if not isinstance(blocks, list):
        return []
    number = blocks.index(lin) if lin in blocks else lin
    return [blocks[number - 1]] if isinstance(number, int) and 0 < number < len(blocks) else []


def _restored_base(cfg: DictConfig, data: ImageDataModule, cuts: Sequence[str]) -> Restored | None:
    """Return the network that training starts from, if a checkpoint says it."""
    path = cfg.base.ckpt_path
    if path is None:
        return None
    for key in ("weights", "pretrained"):
        if cfg.backbone.get(key):
            raise ValueError(
                f"backbone.{key}={cfg.backbone[key]} has no meaning beside base.ckpt_path: training starts from the "
                "base's weights; leave one of the two out"
            )
    restored = restore(path, trusted=cfg.base.trust_checkpoint, cuts=cuts, key="base.trust_checkpoint", further=())
    if is_linked(restored.config):
        raise ValueError(f"base.ckpt_path={path} is a path of two networks; give the checkpoint of its local network")
    if restored.class_names != data.class_names:
        raise ValueError(f"the base {path} knows the classes {restored.class_names}, the data has {data.class_names}")
    return restored


def size_of(data: ImageDataModule, base: ImageInput | None) -> tuple[int, int] | None:
    """Return the size that the images will have, (height, width); ``None`` where the backbone says it."""
    own = (base.height, base.width) if base else None
    asked = getattr(data, "overrides", {})
    return (asked["height"], asked["width"]) if "height" in asked else own


def _untrained(cfg: DictConfig) -> Any:
    return OmegaConf.merge(cfg.backbone, {"pretrained": False, "weights": None})


def _configure_input(data: ImageDataModule, base: Restored | None, backbone: Backbone) -> None:
    """Tell the data what input the network takes."""
    data.configure_input(base.image_input if base else _with_native_statistics(backbone, data))
    if base and data.input != base.image_input:
        raise ValueError(
            f"the base was trained on the input {base.image_input}, but the data overrides make it {data.input}; "
            "leave data.image_size, mean, std and interpolation as the base had them"
        )


def _teacher(
    cfg: DictConfig, data: ImageDataModule, base: Restored | None, pretrained: nn.Module | None, cuts: Sequence[str]
) -> Frozen | None:
    """Return the network that can teach: that of ``teacher.ckpt_path``, or else the base or the pretrained backbone."""
    if cfg.teacher.ckpt_path is not None:
        return _other_teacher(cfg, data, cuts)
    if base is not None:
        return Frozen(base.network, str(cfg.base.ckpt_path), base.sha256)
    if pretrained is None:
        return None
    return Frozen(staged_network(pretrained, sample_of(data.input), cuts=cuts))


def _other_teacher(cfg: DictConfig, data: ImageDataModule, cuts: Sequence[str]) -> Frozen:
    path = cfg.teacher.ckpt_path
    trusted = cfg.teacher.trust_checkpoint
    restored = restore(path, trusted=trusted, cuts=cuts, key="teacher.trust_checkpoint", further=())
    for what, theirs, ours in (
        ("classes", restored.class_names, data.class_names),
        ("input", restored.image_input, data.input),
    ):
        if theirs != ours:
            raise ValueError(
                f"the teacher {path} was trained on the {what} {theirs}, its student is on {ours}; take a teacher of "
                "the same images"
            )
    return Frozen(restored.network, str(path), restored.sha256)


def _with_native_statistics(backbone: Backbone, data: ImageDataModule) -> ImageInput:
    """The backbone's input; where its weights are random, mean and std are those of the data instead of its own."""
    native = data.native_input
    if backbone.pretrained is not None or native.color_mode != backbone.input.color_mode:
        return backbone.input
    return dataclasses.replace(backbone.input, mean=native.mean, std=native.std)
