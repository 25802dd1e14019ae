"""The images of an attack: the adversary's, those that choose among what it learned, and the targets."""

from __future__ import annotations

from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from cleave.datamodules import ImageDataModule
from cleave.datamodules.contents import contents, contents_of
from cleave.reports.terminal import say
from cleave.scripts.assembly.attacking.victim import Victim

EVERY = 10**9
_OWN = "data@attack.data"


class AttackImages(NamedTuple):
    """uint8 images (N, C, H, W) as the device takes them.

    Attributes:
        train: What the adversary trains on.
        val: What chooses epochs and decoders.
        targets: What is to be rebuilt.
        left_out: How many targets were left out, as they had been seen.
    """

    train: Tensor
    val: Tensor
    targets: Tensor
    left_out: int


def images_of(cfg: DictConfig, settings: dict[str, Any], victim: Victim) -> AttackImages:
    """Take the adversary's images of ``train`` and ``val``, and the targets of the network's ``test``.

    Raises:
        ValueError: There are no images, or some are both target and known to the adversary or the network.
    """
    own = own_data(cfg, victim)
    known = victim.data or own
    for data in dict.fromkeys([own, known]):
        data.prepare_data()
    limit = settings["attack"]["images"] or EVERY
    train, val = (own.sample_batch(split, limit)["images"] for split in ("train", "val"))
    if len(train) < 2 or len(val) < 1:
        raise ValueError(
            f"the adversary has {len(train)} training and {len(val)} validation images; it needs 2 and 1 at least"
        )
    targets = known.sample_batch("test", settings["targets"]["images"] or EVERY)["images"]
    where = _OWN if victim.data is not None and own is not victim.data else "data"
    fresh = unseen(train, val, targets, known, where, settings["targets"]["leave_out_seen"])
    return AttackImages(train, val, targets[fresh], len(targets) - len(fresh))


def own_data(cfg: DictConfig, victim: Victim) -> ImageDataModule:
    """Return the data of the adversary, in the input of the network; the network's where it has no other.

    Raises:
        ValueError: There are none, or they make another input.
    """
    described = cfg.attack.get("data")
    if described is None and victim.data is not None:
        return victim.data
    if described is None:
        raise ValueError(
            f"bundle={victim.name} does not say which images it was trained on, so there is nothing to attack with; "
            f"give {_OWN}=GROUP: its test images are then the targets"
        )
    data: ImageDataModule = instantiate(described)
    data.configure_input(victim.image_input)
    if data.input != victim.image_input:
        raise ValueError(
            f"{_OWN} makes the input {data.input}, but the network takes {victim.image_input}; leave image_size, "
            "mean, std and interpolation of attack.data at null"
        )
    return data


def unseen(
    train: Tensor, val: Tensor, targets: Tensor, known: ImageDataModule, where: str, leave_out: bool
) -> list[int]:
    """Return which targets nobody has seen.

    Raises:
        ValueError: Somebody has seen some, and they are not to be left out; or none is left.
    """
    digests = contents(targets)
    attackers, networks = {*contents(train), *contents(val)}, contents_of(known, "train")
    by = {"the adversary's": attackers, "the network's training": networks}
    counts = {who: sum(digest in seen for digest in digests) for who, seen in by.items()}
    fresh = [place for place, digest in enumerate(digests) if digest not in attackers | networks]
    if len(fresh) < len(digests) and not leave_out:
        told = " and ".join(f"{count:,} are among {who} images" for who, count in counts.items() if count)
        raise ValueError(
            f"{where}: of {len(digests):,} targets {told}, so that the attack would look stronger than it is; give "
            "other images, or leave these targets out by targets.leave_out_seen=true"
        )
    if not fresh:
        raise ValueError(f"{where}: every target was seen in training, so none is left; give other images")
    if left_out := len(digests) - len(fresh):
        say(f"{left_out:,} of {len(digests):,} targets left out: they were seen in training")
    return fresh
