"""Who was in a network's training and who was not, and what the network's answers say of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from cleave.architectures.network.outputs import LOGITS
from cleave.datamodules import ImageDataModule
from cleave.datamodules.contents import contents, contents_of
from cleave.datamodules.parts import REST
from cleave.lightning_modules.callbacks.metadata import read_metadata
from cleave.lightning_modules.checkpoints.loading import read_checkpoint
from cleave.reports.attacks.membership import Membership, judged, losses, margins, modified_entropies
from cleave.reports.terminal import say
from cleave.scripts.assembly.attacking.checks import check_device, each, whole
from cleave.scripts.assembly.attacking.images import EVERY
from cleave.scripts.assembly.building import plain
from cleave.scripts.assembly.restoring import Restored, restore, restore_data

SOURCES = (REST, "test")
_BATCH = 256


class Suspects(NamedTuple):
    """Images of one kind.

    Attributes:
        images: uint8 (N, C, H, W), as the network takes them.
        labels: int64 (N,).
        unseen: Which reference networks have not seen them, bool (N, references).
    """

    images: Tensor
    labels: Tensor
    unseen: Tensor


class Party(NamedTuple):
    """The network that is attacked, the references, and the images.

    Attributes:
        network: The attacked one.
        references: Networks of the adversary's own.
        members: Images that the attacked network was trained on.
        others: Images that it was not.
        source: Where these come from: ``rest`` of the training images, or ``test``.
        config: The config of the attacked network's run.
        private: What its training spent under DP-SGD, ``None`` where it was not private.
    """

    network: Restored
    references: list[Restored]
    members: Suspects
    others: Suspects
    source: str
    config: dict[str, Any]
    private: dict[str, Any] | None


def checked(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings as plain values.

    Raises:
        ValueError: A value is none of those that it may be.
    """
    settings = plain(cfg)
    if settings["ckpt_path"] is None:
        raise ValueError("give ckpt_path=FILE, a checkpoint of train.py: who was in training is asked of its answers")
    references = settings["references"]
    settings["references"] = [] if references is None else each(references)
    for key in ("members.images", "non_members.images"):
        whole(settings, key, nullable=True)
    whole(settings, "resamples")
    whole(settings, "seed", least=0)
    source = settings["non_members"]["source"]
    if source not in (None, *SOURCES):
        raise ValueError(f"non_members.source must be rest, test or null, got {source!r}")
    check_device(settings["device"])
    return settings


def party_of(cfg: DictConfig, settings: dict[str, Any]) -> Party:
    """Load the networks and take the images.

    Raises:
        ValueError: A network began with weights that have seen others' images, there are no non-members, or every
            image was seen by all references.
    """
    checkpoint = read_checkpoint(cfg.ckpt_path)
    trained = read_metadata(checkpoint, cfg.ckpt_path)["config"]
    check_origin(trained, str(cfg.ckpt_path))
    network = restore(cfg.ckpt_path, trusted=cfg.trust_checkpoint)
    data = restore_data(network, cfg.data)
    data.prepare_data()
    if network.network.results != (LOGITS,) or "labels" not in data.parts:
        raise ValueError(f"{cfg.ckpt_path} is no classifier: members are told by what it answers to labelled images")
    source = settings["non_members"]["source"] or (REST if data.part else "test")
    if source == REST and not data.part:
        raise ValueError(
            f"non_members.source=rest: {cfg.ckpt_path} was trained on every training image; train one on half of them, "
            "data.part=1/2, or take non_members.source=test"
        )
    references, seen = [], []
    for file in settings["references"]:
        found, digests = _reference(str(file), network, cfg)
        references.append(found)
        seen.append(digests)
    known = contents_of(data, "train")
    members = _suspects(data, "train", settings["members"]["images"], seen, set())
    others = _suspects(data, source, settings["non_members"]["images"], seen, known)
    _check_left("members", members, "on another part, such as data.part=2/3")
    _check_left("non-members", others, "on other parts, or take non_members.source=test")
    return Party(network, references, members, others, source, trained, checkpoint.get("dp"))


def _check_left(who: str, some: Suspects, how: str) -> None:
    if len(some.images):
        return
    if some.unseen.shape[1]:
        raise ValueError(f"no {who} are left that some reference has not seen; give references trained {how}")
    raise ValueError(f"no {who} are left: each of these images is among the training images")


def _suspects(
    data: ImageDataModule, split: str, limit: int | None, seen: Sequence[set[bytes]], known: set[bytes]
) -> Suspects:
    """Take images of a split that are not known, and that some reference has not seen where there are any."""
    batch = data.sample_batch(split, limit or EVERY)
    digests = contents(batch["images"])
    unseen = torch.tensor([[digest not in each for each in seen] for digest in digests], dtype=torch.bool)
    unseen = unseen.reshape(len(digests), len(seen))
    fits = torch.tensor([digest not in known for digest in digests], dtype=torch.bool)
    if double := int((~fits).sum()):
        say(f"{double:,} of {len(digests):,} {split} images left out: they are among the training images")
    if seen:
        alone = fits & ~unseen.any(1)
        if lost := int(alone.sum()):
            say(f"{lost:,} of {len(digests):,} {split} images left out: every reference has seen them")
        fits &= unseen.any(1)
    return Suspects(batch["images"][fits], batch["labels"][fits], unseen[fits])


def _reference(file: str, network: Restored, cfg: DictConfig) -> tuple[Restored, set[bytes]]:
    """Load a network of the adversary's own, and return what it has seen."""
    check_origin(read_metadata(read_checkpoint(file), file)["config"], file)
    found = restore(file, trusted=cfg.trust_checkpoint)
    for what, theirs, ours in (
        ("classes", found.class_names, network.class_names),
        ("input", found.image_input, network.image_input),
    ):
        if theirs != ours:
            raise ValueError(f"the reference {file} has the {what} {theirs}, the attacked network {ours}; give another")
    data = restore_data(found, cfg.data)
    data.prepare_data()
    return found, contents_of(data, "train")


def check_origin(config: Mapping[str, Any], file: str) -> None:
    """Refuse networks that did not begin with random weights, or learned from one that saw other images.

    A base or teacher that was trained from scratch on the same part of the same images is none of those.

    Raises:
        ValueError: The weights, or what they learned from, may have seen any image.
    """
    backbone = config.get("backbone") or {}
    for key in ("pretrained", "weights"):
        if backbone.get(key):
            raise ValueError(
                f"{file} began with backbone.{key}={backbone[key]}: public weights may have seen members and "
                "non-members alike; train a network from scratch on half of the images, data.part=1/2"
            )
    for key in ("base", "teacher", "host"):
        path = (config.get(key) or {}).get("ckpt_path")
        if path is None:
            continue
        if not Path(path).is_file():
            raise ValueError(f"{file} learned from {key}.ckpt_path={path}, which is gone, so nobody knows what it saw")
        theirs = read_metadata(read_checkpoint(path), path)["config"]
        if _images(theirs) != _images(config):
            raise ValueError(
                f"{file} learned from {key}.ckpt_path={path}, which was trained on other images ({_words(theirs)} "
                f"instead of {_words(config)}), so that non-members are known to it; train that on the same part"
            )
        check_origin(theirs, path)


def _images(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what says which images a run was trained on."""
    served = {*inspect.signature(ImageDataModule.__init__).parameters, "download"} - {"part", "part_seed"}
    found = config.get("data") or {}
    return {key: value for key, value in found.items() if key not in served and value is not None}


def _words(config: Mapping[str, Any]) -> str:
    data = config.get("data") or {}
    return f"{data.get('_target_')}, part {data.get('part') or 'all'}"


@torch.no_grad()
def answers(restored: Restored, images: Tensor, device: str) -> Tensor:
    """Return a network's logits on uint8 images, (N, classes)."""
    network = restored.network.to(device).eval()
    network.set_channel(None)
    found = [network(restored.image_input.normalize(some.to(device))) for some in images.split(_BATCH)]
    return torch.cat(found).cpu()


def attacks_of(party: Party, settings: dict[str, Any]) -> tuple[list[Membership], tuple[float, float]]:
    """Return what each attack came to, and the accuracy on members and on non-members."""
    device = settings["device"]
    scores: dict[str, list[Tensor]] = {}
    accuracies = []
    for some in (party.members, party.others):
        logits = answers(party.network, some.images, device)
        accuracies.append((logits.argmax(1) == some.labels).double().mean().item())
        loss, margin = -losses(logits, some.labels), margins(logits, some.labels)
        found = {"loss": loss, "modified entropy": -modified_entropies(logits, some.labels)}
        if party.references:
            typical = _typical(party.references, some, device)
            found |= {"loss against references": loss - typical[0], "margin against references": margin - typical[1]}
        for name, values in found.items():
            scores.setdefault(name, []).append(values)
    resamples, seed = settings["resamples"], settings["seed"]
    judgements = [judged(name, members, others, resamples, seed) for name, (members, others) in scores.items()]
    return judgements, (accuracies[0], accuracies[1])


def _typical(references: Sequence[Restored], some: Suspects, device: str) -> tuple[Tensor, Tensor]:
    """Return the mean negative loss and margin of each image, over the references that have not seen it."""
    found = [answers(each, some.images, device) for each in references]
    weights = some.unseen.double() / some.unseen.sum(1, keepdim=True)
    values = [torch.stack([figure(each, some.labels) for each in found], 1) for figure in (losses, margins)]
    return -(weights * values[0]).sum(1), (weights * values[1]).sum(1)
