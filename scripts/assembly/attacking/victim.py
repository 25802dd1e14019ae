"""What is attacked: a checkpoint's network or a bundle, and the images that it was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cleave.datamodules import ImageDataModule
from cleave.deployment import ImageInput, load_bundle
from cleave.lightning_modules.attacking.releases import BundleReleases, NetworkReleases, Releases
from cleave.lightning_modules.checkpoints.trust import check_targets
from cleave.scripts.assembly.restoring import Restored, known_data, restore, restore_data


@dataclasses.dataclass(frozen=True)
class Victim:
    """What is attacked.

    Attributes:
        name: The file or folder.
        releases: The deployed path.
        unaware: The path without the device's noise; ``None`` where there is none, or none can be left out.
        image_input: What the network takes.
        data: The network's own images; ``None`` where a bundle does not say which.
        trained: The config of the run that it is of, as far as it is known.
    """

    name: str
    releases: Releases
    unaware: Releases | None
    image_input: ImageInput
    data: ImageDataModule | None
    trained: dict[str, Any]

    @property
    def network(self) -> NetworkReleases | None:
        """The path with its gradients, where it has some."""
        return self.releases if isinstance(self.releases, NetworkReleases) else None


def victim_of(cfg: DictConfig, settings: dict[str, Any]) -> Victim:
    """Load what a config attacks.

    Raises:
        ValueError: It sends nothing, or takes no images.
    """
    if settings["bundle"] is not None:
        return _bundle(cfg, settings)
    restored = restore(cfg.ckpt_path, trusted=cfg.trust_checkpoint)
    network = restored.network.to(settings["device"]).eval()
    network.set_channel(None)  # whoever is near the device has what it sends, before anything is lost
    named = {"network": network, "image_input": restored.image_input, "at": settings["at"]}
    try:
        releases = NetworkReleases(**named)
    except ValueError as error:
        raise ValueError(f"ckpt_path={cfg.ckpt_path}: {error}") from error
    hides = releases.bottleneck.sampled or releases.bottleneck.noise is not None
    return Victim(
        name=str(cfg.ckpt_path),
        releases=releases,
        unaware=NetworkReleases(**named, noise=False) if hides else None,
        image_input=restored.image_input,
        data=restore_data(restored, cfg.data),
        trained=_plain(restored.config),
    )


def _bundle(cfg: DictConfig, settings: dict[str, Any]) -> Victim:
    bundle = load_bundle(cfg.bundle, device=settings["device"])
    try:
        releases = BundleReleases(bundle, settings["at"])
    except ValueError as error:
        raise ValueError(f"bundle={cfg.bundle}: {error}") from error
    image_input = bundle.input
    assert isinstance(image_input, ImageInput)
    trained = bundle.manifest.config
    described, data = trained.get("data"), None
    if described:
        described = {name: value for name, value in described.items() if name != "transforms"}
        check_targets({"data": described}, str(cfg.bundle), cfg.trust_checkpoint)
        data = known_data(OmegaConf.create(described), image_input, bundle.class_names, cfg.data, "bundle")
    return Victim(str(cfg.bundle), releases, None, image_input, data, trained)


def judge_of(settings: dict[str, Any], victim: Victim) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return a name of the features by which images are compared, and what maps images from 0 to 1 to them.

    Raises:
        ValueError: The judge takes images of another shape.
    """
    own = settings["judge"]

    def answers(images: Tensor) -> Tensor:
        return victim.releases.answers(as_bytes(images))

    if own["ckpt_path"] is None:
        return "the attacked network's answer", answers
    layer = own["layer"]
    key = "judge.trust_checkpoint"
    cuts = [] if layer is None else [layer]
    judge: Restored = restore(own["ckpt_path"], trusted=own["trust_checkpoint"], cuts=cuts, key=key, further=())
    if judge.image_input.shape != victim.image_input.shape:
        raise ValueError(
            f"judge.ckpt_path={own['ckpt_path']} takes images {judge.image_input.shape}, the attacked network "
            f"{victim.image_input.shape}; give a judge of the same images"
        )
    network = judge.network.to(settings["device"]).eval()
    name = layer or network.results[0]

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return network.outputs(judge.image_input.normalize(as_bytes(images)), [name])[name]

    return f"{name} of {own['ckpt_path']}", features


def as_bytes(images: Tensor) -> Tensor:
    """Return images from 0 to 1 as a device takes them, uint8."""
    return (255 * images).round().clamp(0, 255).to(torch.uint8)


def _plain(config: DictConfig) -> dict[str, Any]:
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}
