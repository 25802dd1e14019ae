"""From a checkpoint alone back to its network and its data."""

from __future__ import annotations

import copy
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from cleave.architectures import StagedNetwork
from cleave.architectures.inserts.finite import check_learned
from cleave.datamodules import ImageDataModule
from cleave.deployment import FLOAT_BITS, ImageInput, check_bits
from cleave.lightning_modules.callbacks.metadata import KEY, read_metadata
from cleave.scripts.assembly.networks import NETWORK, build_backbone, build_network, keyed
from cleave.scripts.assembly.trust import check_targets


class Restored(NamedTuple):
    """A network rebuilt from a checkpoint, with what the checkpoint says of it."""

    config: DictConfig
    network: StagedNetwork
    image_input: ImageInput
    class_names: list[str]
    sha256: str
    other_bits: bool


def restore(path: str | Path, bits: int | None = None, trusted: bool = False, cuts: Sequence[str] = ()) -> Restored:
    """Rebuild a network from a checkpoint of ``train.py``, with neither teacher nor pretrained files.

    Args:
        path: The checkpoint.
        bits: Another code width than the one trained with, of every bottleneck.
        trusted: Whether the file may name code of the user's own, such as a custom backbone.
        cuts: Further layers whose features are outputs; no further cut renames a weight.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is no checkpoint of Cleave, names code that is not Cleave's, or does not fit
            its own config.
    """
    checkpoint = read_checkpoint(path)
    metadata = checkpoint[KEY]
    parts = {key: metadata["config"].get(key) for key in (*NETWORK, "data", "method", "training")}
    check_targets(parts, str(path), trusted)
    config = OmegaConf.create(metadata["config"])
    image_input = ImageInput.from_dict(metadata["image_input"])
    config.backbone.pretrained, config.backbone.weights = False, None
    size = (image_input.height, image_input.width)
    backbone = build_backbone(config.backbone, len(metadata["class_names"]), size).network
    network = build_network(config, backbone, image_input, [*config.get("cuts", []), *cuts])
    load_strictly(network.eval(), network_state(checkpoint), f"the checkpoint {path}")
    if bits is not None and not network.bottlenecks:
        raise ValueError(f"codec.bits={bits} has no meaning for {path}: its network is not split")
    other_bits = False
    for cut, bottleneck in network.bottlenecks.items():
        if bits is None or bits == bottleneck.bits:
            continue
        with keyed("codec", {"bits": bits}):
            if bottleneck.bits != FLOAT_BITS or check_bits(bits) == FLOAT_BITS:
                network.set_bits(bits, cut)  # else `bundling.recalibrate` finds a range first
        config.codec.bits = bits
        other_bits = True
    return Restored(config, network, image_input, metadata["class_names"], file_sha256(path), other_bits)


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
        config[key] = OmegaConf.merge(config[key], value) if isinstance(value, DictConfig) else value
        if key == "batch_size":
            config.eval_batch_size = None  # else the checkpoint's would go on ruling
    _check_place(config)
    data = instantiate(config)
    data.configure_input(restored.image_input)
    if data.class_names != restored.class_names:
        raise ValueError(f"the data has the classes {data.class_names}, the checkpoint {restored.class_names}")
    return data


def _check_place(config: DictConfig) -> None:
    """Say what to give where the images are no longer where they were in training.

    Raises:
        ValueError: The folder or file is gone.
    """
    for key in ("root", "table", "dataset.root"):
        place = OmegaConf.select(config, key)
        if isinstance(place, str) and not Path(place).exists() and not config.get("download"):
            option = f"data.{key}={'FILE' if key == 'table' else 'DIR'}"
            raise ValueError(
                f"the images of the checkpoint lay in {place}, which is gone; say where they are: "
                f"{'' if key == 'root' else '+'}{option}"
            )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ``train.py`` with ``weights_only=True``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged, or was not written by this version of Cleave.
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
    read_metadata(checkpoint, str(path))
    return checkpoint


def network_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the network's part of a checkpoint's state dict, under the network's own names."""
    prefix = "network."
    return {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}


def load_strictly(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        NumberError: A weight or a running statistic is not finite.
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
    check_learned(network, source)


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
