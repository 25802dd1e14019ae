"""From a checkpoint alone back to its network and its data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cleave.architectures import StagedNetwork
from cleave.datamodules import ImageDataModule
from cleave.deployment import FLOAT_BITS, ImageInput, check_bits
from cleave.lightning_modules.checkpoints.loading import load_checkpoint, read_checkpoint
from cleave.lightning_modules.checkpoints.trust import check_targets
from cleave.lightning_modules.resuming import KEY as RESUMING
from cleave.scripts.assembly.networks import keyed


class Restored(NamedTuple):
    """A network rebuilt from a checkpoint, with what the checkpoint says of it."""

    config: DictConfig
    network: StagedNetwork
    image_input: ImageInput
    class_names: list[str]
    sha256: str
    other_bits: bool


def restore(
    path: str | Path,
    bits: int | None = None,
    trusted: bool = False,
    cuts: Sequence[str] = (),
    key: str = "trust_checkpoint",
    further: Sequence[str] = ("data",),
) -> Restored:
    """Rebuild a network from a checkpoint of ``train.py``, with neither teacher nor pretrained files.

    Args:
        path: The checkpoint.
        bits: Another code width than the one trained with, of every bottleneck.
        trusted: Whether the file may name code of the user's own, such as a custom backbone.
        cuts: Further layers whose features are outputs; no further cut renames a weight.
        key: The setting by which a user vouches for the file.
        further: What else of its config will be built, beside the network.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is no checkpoint of Cleave, names code that is not Cleave's, or does not fit
            its own config.
    """
    loaded = load_checkpoint(path, trusted=trusted, cuts=cuts, key=key)
    # What is built besides the network: such as the data, but for transforms of training images.
    built = {part: loaded.config.get(part) for part in further}
    if data := built.get("data"):
        built["data"] = {name: value for name, value in data.items() if name != "transforms"}
    check_targets(built, str(path), trusted, key)
    config, network = OmegaConf.create(dict(loaded.config)), loaded.network
    config.backbone.pretrained, config.backbone.weights = False, None
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
    return Restored(config, network, loaded.image_input, loaded.class_names, loaded.sha256, other_bits)


def restore_data(restored: Restored, overrides: DictConfig) -> ImageDataModule:
    """Build the data module a checkpoint was trained with; see :func:`known_data`."""
    return known_data(restored.config.data, restored.image_input, restored.class_names, overrides)


def known_data(
    trained: DictConfig,
    image_input: ImageInput,
    class_names: Sequence[str],
    overrides: DictConfig,
    source: str = "checkpoint",
) -> ImageDataModule:
    """Build the data module that a network was trained with; overrides that are not null replace its settings.

    Args:
        trained: The config of the data in training.
        image_input: What the network takes.
        class_names: Names of the classes that it knows.
        overrides: Other settings.
        source: What says all this, for messages: a checkpoint or a bundle.

    Raises:
        ValueError: The data lacks an overridden setting, or has other classes than the network.
    """
    config = copy.deepcopy(trained)
    config.transforms = []
    for key, value in overrides.items():
        if value is None:
            continue
        if key not in config:
            raise ValueError(
                f"data.{key!s}={value} has no meaning for {config._target_}, which the {source} was made with"
            )
        config[key] = OmegaConf.merge(config[key], value) if isinstance(value, DictConfig) else value
        if key == "batch_size":
            config.eval_batch_size = None  # else the checkpoint's would go on ruling
    _check_place(config, source)
    data = instantiate(config)
    data.configure_input(image_input)
    if data.class_names != list(class_names):
        raise ValueError(f"the data has the classes {data.class_names}, the {source} {list(class_names)}")
    return data


def _check_place(config: DictConfig, source: str) -> None:
    """Say what to give where the images are no longer where they were in training.

    Raises:
        ValueError: The folder or file is gone.
    """
    for key in ("root", "table", "dataset.root"):
        place = OmegaConf.select(config, key)
        if isinstance(place, str) and not Path(place).exists() and not config.get("download"):
            option = f"data.{key}={'FILE' if key == 'table' else 'DIR'}"
            raise ValueError(
                f"the images of the {source} lay in {place}, which is gone; say where they are: "
                f"{'' if key == 'root' else '+'}{option}"
            )


def validated(path: str | Path) -> dict[str, Tensor]:
    """Return what the last validation before a checkpoint of ``train.py`` measured: ``val/acc`` and others by name."""
    measured = read_checkpoint(path).get(RESUMING, {}).get("measured", {})
    return {name: value for name, value in measured.items() if name.startswith("val/")}
