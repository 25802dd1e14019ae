"""Images with an attribute that the task does not use, and the classifiers that tell it from what is sent."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

from cleave.architectures.attacking.classifiers import CLASSIFIERS, attribute_classifier
from cleave.architectures.macs import count_params
from cleave.architectures.naming import did_you_mean
from cleave.datamodules import ImageDataModule
from cleave.lightning_modules.attacking.training import Schooling, rebuilt, school
from cleave.reports.attacks.attributes import Inference
from cleave.reports.attacks.metrics import mean_interval
from cleave.reports.attacks.results import ATTACKER, CONTROL
from cleave.reports.terminal import say
from cleave.scripts.assembly.attacking.checks import check_device, listed, one_source, releases, whole
from cleave.scripts.assembly.attacking.images import EVERY, own_data, unseen
from cleave.scripts.assembly.attacking.settings import LOGITS, RAW
from cleave.scripts.assembly.attacking.victim import Victim
from cleave.scripts.assembly.building import plain
from cleave.scripts.assembly.networks import keyed

CONTROLS = (RAW, LOGITS)
Sent = Callable[[Tensor], Tensor]


class Labelled(NamedTuple):
    """uint8 images (N, C, H, W) as the device takes them, with the place of each one's attribute, int64 (N,)."""

    images: Tensor
    attributes: Tensor


class AttributeImages(NamedTuple):
    """The images of an attack.

    Attributes:
        names: The attributes.
        train: What the adversary trains on.
        val: What chooses epochs and classifiers.
        targets: Whose attribute is to be told.
        left_out: How many targets were left out, as they had been seen.
    """

    names: tuple[str, ...]
    train: Labelled
    val: Labelled
    targets: Labelled
    left_out: int


def checked(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings as plain values, lists where one stands alone.

    Raises:
        ValueError: A value is none of those that it may be.
    """
    settings = plain(cfg)
    one_source(settings)
    attack = settings["attack"]
    attack["families"] = listed("attack.families", attack["families"], CLASSIFIERS)
    settings["controls"] = listed("controls", settings["controls"], CONTROLS, empty=True)
    for key, nullable in (("targets.images", True), ("attack.images", True), ("resamples", False)):
        whole(settings, key, nullable=nullable)
    attack["releases"] = releases(attack["releases"])
    whole(settings, "seed", least=0)
    mapping = settings["attribute"]["of_class"]
    if mapping is not None and not isinstance(mapping, dict):
        raise ValueError(f"attribute.of_class maps classes to attributes, such as {{cat: animal}}, got {mapping!r}")
    if mapping is None and attack.get("data") is None:
        raise ValueError(
            "there is no attribute beside the classes of the task; give attribute.of_class={CLASS: WORD, …}, or data "
            "with other labels by data@attack.data=GROUP"
        )
    check_device(settings["device"])
    with keyed("attack", attack):
        settings["schooling"] = Schooling(attack["epochs"], attack["batch_size"], attack["lr"], settings["seed"])
    return settings


def labelled_images(cfg: DictConfig, settings: dict[str, Any], victim: Victim) -> AttributeImages:
    """Take the images of the adversary's data, with the attribute of each: of its class, or its label itself.

    Raises:
        ValueError: There are none, the mapping does not fit the classes, or targets have been seen.
    """
    data = own_data(cfg, victim)
    data.prepare_data()
    if "labels" not in data.parts:
        raise ValueError("these images have no labels that an attribute follows from; give others by data@attack.data")
    names, places = attributes_of(data.class_names, settings["attribute"]["of_class"])
    limits = {"train": settings["attack"]["images"], "val": settings["attack"]["images"]}
    limits["test"] = settings["targets"]["images"]
    train, val, targets = (_labelled(data, split, limits[split], places) for split in ("train", "val", "test"))
    present = train.attributes.unique()
    if len(present) < 2 or not len(val.images):
        raise ValueError(
            f"the adversary has {len(train.images)} training images of {len(present)} attribute(s) and "
            f"{len(val.images)} validation images; it needs 2 attributes and 1 image at least"
        )
    where = "data" if data is victim.data else "data@attack.data"
    fresh = unseen(train.images, val.images, targets.images, data, where, settings["targets"]["leave_out_seen"])
    kept = Labelled(targets.images[fresh], targets.attributes[fresh])
    return AttributeImages(names, train, val, kept, len(targets.images) - len(fresh))


def attributes_of(classes: Sequence[str], mapping: Mapping[Any, Any] | None) -> tuple[tuple[str, ...], Tensor]:
    """Return the attributes' names, and the place of each class's one among them, int64 (classes,).

    Args:
        classes: Names of the classes.
        mapping: The attribute by the name of a class; ``None``: the classes themselves.

    Raises:
        ValueError: The mapping leaves a class out, names one that is none, or has a single attribute.
    """
    if mapping is None:
        return tuple(classes), torch.arange(len(classes))
    found = {str(name): str(word) for name, word in mapping.items()}
    for name in found:
        if name not in classes:
            raise ValueError(f"attribute.of_class names {name!r}, which is no class." + did_you_mean(name, classes))
    if missing := [name for name in classes if name not in found]:
        raise ValueError(f"attribute.of_class leaves out {', '.join(missing)}; give the attribute of every class")
    names = tuple(dict.fromkeys(found[name] for name in classes))
    if len(names) < 2:
        raise ValueError(f"attribute.of_class says {names[0]!r} of every class, so there is nothing to tell apart")
    return names, torch.tensor([names.index(found[name]) for name in classes])


def _labelled(data: ImageDataModule, split: str, limit: int | None, places: Tensor) -> Labelled:
    batch = data.sample_batch(split, limit or EVERY)
    return Labelled(batch["images"], places[batch["labels"]])


def inferred(settings: dict[str, Any], victim: Victim, images: AttributeImages) -> list[Inference]:
    """Train classifiers on the payload, on its mean over releases and on the controls, and have them tell the targets'.

    Returns:
        Each attack, and the majority, which takes no payload.
    """
    device = torch.device(settings["device"])
    train, val, targets = (Labelled(*(each.to(device) for each in some)) for some in images[1:4])
    draws = victim.releases.draws(train.images)
    common = torch.bincount(train.attributes).argmax()
    attack = functools.partial(_attack, settings, len(images.names), train, val, targets)
    found = []
    for times in settings["attack"]["releases"] if draws else [1]:
        found += attack("payload", ATTACKER, functools.partial(victim.releases, times=times), draws, times)
    found.append(_told("majority", CONTROL, common.expand(len(targets.images)), targets, settings))
    if LOGITS in settings["controls"]:
        found += attack("logits", CONTROL, victim.releases.answers, draws)
    if RAW in settings["controls"]:
        found += attack("raw input", CONTROL, lambda some: some.float() / 255, False)
    return found


def _attack(
    settings: dict[str, Any],
    count: int,
    train: Labelled,
    val: Labelled,
    targets: Labelled,
    name: str,
    role: str,
    sent: Sent,
    draws: bool,
    times: int = 1,
) -> list[Inference]:
    """Train a classifier of each family on what is sent, and have it tell the targets' attribute."""
    first = sent(train.images)
    families = settings["attack"]["families"]
    torch.manual_seed(settings["seed"])
    found = [attribute_classifier(family, first, train.attributes, count).to(first.device) for family in families]
    say(f"{name}{f', mean of {times} releases' if times > 1 else ''}: {len(found)} classifiers learn …")
    redrawn = (lambda: sent(train.images)) if draws else (lambda: first)
    known = sent(val.images), val.attributes
    pupils = school(found, redrawn, train.attributes, *known, settings["schooling"], F.cross_entropy)
    payloads = sent(targets.images)
    attacks = []
    for family, pupil in zip(families, pupils, strict=True):
        answers = rebuilt(pupil.decoder, payloads).argmax(1)
        told = _told(name, role, answers, targets, settings)._replace(family=family, releases=times)
        size = count_params(pupil.decoder)
        attacks.append(told._replace(epoch=pupil.epoch, val_loss=pupil.val_mse, parameters=size))
    return attacks


def _told(name: str, role: str, answers: Tensor, targets: Labelled, settings: dict[str, Any]) -> Inference:
    right = (answers == targets.attributes).double()
    return Inference(name, role, mean_interval(right, settings["resamples"], settings["seed"]))
