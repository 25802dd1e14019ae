"""What a run's result depends on, so that records of it are told from those of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from cleave.datamodules import ImageDataModule
from cleave.datamodules.caching.precompute import fingerprint
from cleave.lightning_modules.checkpoints.loading import file_sha256
from cleave.scripts.assembly.building import plain
from cleave.scripts.assembly.given.resumed import weighty

FILES = ("base", "host", "teacher")
"""Groups whose ``ckpt_path`` names a network."""


def identity(
    cfg: DictConfig, data: ImageDataModule, own: Sequence[str] = (), splits: Sequence[str] = ("train", "val")
) -> dict[str, Any]:
    """Return all that the result of a run depends on: the networks, the images, and how it is trained.

    Args:
        cfg: The run's config.
        data: Its images.
        own: Keys that are another script's, not the run's.
        splits: Whose images count.
    """
    values = weighty({name: value for name, value in plain(cfg).items() if name not in own})
    networks = {}
    for group in FILES:
        settings = values.pop(group, {})
        path = settings.pop("ckpt_path", None)
        settings.pop("trust_checkpoint", None)
        networks[group] = {**settings, "file": None if path is None else file_sha256(path)}
    networks["backbone"] = values.pop("backbone")
    described = {**plain_data(values.pop("data")), "images": image_digests(data, splits)}
    return {"networks": networks, "data": described, "settings": values}


def plain_data(described: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of data without where they lie, as they may be moved."""
    return {key: value for key, value in described.items() if key != "root"}


def image_digests(data: ImageDataModule, splits: Sequence[str]) -> dict[str, str]:
    """Return a digest of the images of each split."""
    data.prepare_data()
    sets = {split: data.dataset(split) for split in splits}
    return {split: fingerprint(dataset.source, dataset.further) for split, dataset in sets.items()}
