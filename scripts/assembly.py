"""From a config, or from a checkpoint alone, to data, networks and tasks."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from cleave.architectures import Backbone, MultiExitNetwork, SplitNetwork
from cleave.datamodules import ImageDataModule
from cleave.deployment import FLOAT_BITS, ImageInput, check_bits
from cleave.lightning_modules import Task, Teacher
from cleave.lightning_modules.callbacks.metadata import KEY, SCHEMA
from cleave.scripts.terminal import CONF
from cleave.scripts.trust import check_targets
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn


def compose_config(name: str, overrides: Sequence[str], output_dir: Path) -> DictConfig:
    """Compose a script's config outside of Hydra's own launcher, as the demonstration and the tests do."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(name, list(overrides))
    # Set afterwards: a folder's name may hold what an override's grammar gives a meaning.
    cfg.paths.output_dir, cfg.paths.root_dir = str(output_dir), str(Path.cwd())
    return cfg


class Restored(NamedTuple):
    """A network rebuilt from a checkpoint, with what the checkpoint says of it."""

    config: DictConfig
    network: nn.Module
    image_input: ImageInput
    class_names: list[str]
    sha256: str
    other_bits: bool


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


def build_network(cfg: DictConfig, backbone: nn.Module, image_input: ImageInput) -> nn.Module:
    """Inject what ``cfg.network`` describes into the backbone; the backbone itself where it describes nothing."""
    if cfg.network is None:
        return backbone
    # A partial takes the modules as they are; instantiate would hand over copies of them.
    build = instantiate(cfg.network, _partial_=True, _convert_="all")
    return build(backbone=backbone, sample=_sample(image_input))


def build_task(cfg: DictConfig, network: nn.Module, class_names: list[str], **kwargs: Any) -> Task:
    """Build the task of ``cfg.method`` around a network."""
    build = instantiate(cfg.method, _partial_=True, _convert_="all")
    return build(network=network, class_names=class_names, **kwargs)


def restore(path: str | Path, bits: int | None = None, trusted: bool = False) -> Restored:
    """Rebuild a network from a checkpoint of ``train.py``, with neither teacher nor pretrained files.

    Args:
        path: The checkpoint.
        bits: Another code width than the one trained with.
        trusted: Whether the file may name code of the user's own, such as a custom backbone.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is no checkpoint of Cleave, names code that is not Cleave's, or does not fit
            its own config.
    """
    checkpoint = read_checkpoint(path)
    metadata = checkpoint[KEY]
    parts = {key: metadata["config"].get(key) for key in ("backbone", "network", "data", "method")}
    check_targets(parts, str(path), trusted)
    config = OmegaConf.create(metadata["config"])
    image_input = ImageInput.from_dict(metadata["image_input"])
    config.backbone.pretrained, config.backbone.weights = False, None
    backbone = instantiate(config.backbone, num_classes=len(metadata["class_names"])).network
    network = build_network(config, backbone, image_input)
    load_strictly(network, network_state(checkpoint), f"the checkpoint {path}")
    if bits is not None and isinstance(network, MultiExitNetwork):
        raise ValueError(
            f"codec.bits={bits} cannot be changed for a network with exits such as {path}; train it at that width, or "
            "give infer.py bits="
        )
    if bits is not None and not isinstance(network, SplitNetwork):
        raise ValueError(f"codec.bits={bits} has no meaning for {path}: its network is not split")
    other_bits = False
    if isinstance(network, SplitNetwork) and bits is not None and bits != network.bits:
        if network.bits != FLOAT_BITS or check_bits(bits) == FLOAT_BITS:
            network.set_bits(bits)  # else `bundling.recalibrate` finds a range first
        config.codec.bits = config.network.codec.bits = bits
        other_bits = True
    return Restored(config, network.eval(), image_input, metadata["class_names"], file_sha256(path), other_bits)


def restore_data(restored: Restored, overrides: DictConfig) -> ImageDataModule:
    """Build the data module a checkpoint was trained with; overrides that are not null replace its settings.

    Raises:
        ValueError: The data lacks an overridden setting, or has other classes than the checkpoint.
    """
    config = copy.deepcopy(restored.config.data)
    for key, value in overrides.items():
        if value is None:
            continue
        if key not in config:
            raise ValueError(
                f"data.{key!s}={value} has no meaning for {config._target_}, which the checkpoint was made with"
            )
        config[key] = value
        if key == "batch_size":
            config.eval_batch_size = None  # else the checkpoint's would go on ruling
    data = instantiate(config)
    data.configure_input(restored.image_input)
    if data.class_names != restored.class_names:
        raise ValueError(f"the data has the classes {data.class_names}, the checkpoint {restored.class_names}")
    return data


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ``train.py`` with ``weights_only=True``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged, or was not written by Cleave.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}; train.py prints the path of what it saved")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        whole = zipfile.is_zipfile(path)
        raise ValueError(
            f"the checkpoint {path} cannot be read: "
            + (f"it holds what weights_only=True refuses ({error})" if whole else "it is truncated or no checkpoint")
            + "; use another save, such as last.ckpt beside it"
        ) from error
    if not isinstance(checkpoint, dict) or KEY not in checkpoint or checkpoint[KEY].get("schema") != SCHEMA:
        raise ValueError(
            f"{path} was not written by this version of Cleave's train.py: its network cannot be rebuilt from it; "
            "weights from elsewhere go in by backbone.weights=FILE"
        )
    return checkpoint


def network_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the network's part of a checkpoint's state dict, under the network's own names."""
    prefix = "network."
    return {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}


def load_strictly(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        ValueError: Names or shapes differ; the message lists them.
    """
    own = network.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(
            f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
            for k in own.keys() & state.keys()
            if own[k].shape != state[k].shape
        ),
    }
    if any(problems.values()):
        told = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            for what, names in problems.items()
            if names
        )
        raise ValueError(f"{source} is of another architecture than {type(network).__name__}: {told}")
    network.load_state_dict(state)


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _sample(image_input: ImageInput) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *image_input.shape, generator=generator)
