"""Refusal of what should hide the images and could not: without an encoder, frozen, or on too few samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import nn

from cleave.architectures import StagedNetwork
from cleave.lightning_modules.term import STUDENT, Term


def check_encoders(network: StagedNetwork, terms: Mapping[str, Term]) -> None:
    """Refuse terms that teach an encoder to hide the images where a feature is sent as it is.

    Args:
        network: The network.
        terms: The terms by name, bound to it; those whose loss ``defends`` should change what the device sends.

    Raises:
        ValueError: The network is not split, or has no encoder where such a defence learns.
    """
    defences: dict[str, str] = {}
    for name, term in _defending(terms).items():
        defences |= {output.partition("/")[0]: f"the term {name!r}" for output in term.asks(STUDENT) if "/" in output}
    if not network.bottlenecks and not network.links and (unsplit := next(iter(_defending(terms)), None)) is not None:
        raise ValueError(
            f"the term {unsplit!r} should hide images from whoever reads what is sent, but the network is not split; "
            "set split.at=LAYER, or leave it out"
        )
    for cut, bottleneck in network.bottlenecks.items():
        if cut in defences and isinstance(bottleneck.encoder, nn.Identity):
            raise ValueError(
                f"form=none sends the feature of {cut} itself, without an encoder, but {defences[cut]} is a defence "
                "that is learned; set form=insert or replace, or leave the defence out"
            )


def check_frozen(network: StagedNetwork, terms: Mapping[str, Term], parts: Sequence[str], learning: set[str]) -> None:
    """Refuse terms that should hide the images where all before what they read is frozen.

    Args:
        network: The network.
        terms: The terms by name, bound to it.
        parts: The parts that are trained.
        learning: Those of them with parameters.

    Raises:
        ValueError: Nothing would learn of such a term but its own parameters, and ``parts`` does not say so.
    """
    if not parts:
        return  # attackers that learn beside a network that stays as it is
    for name, term in _defending(terms).items():
        outputs = term.asks(STUDENT)
        if not learning.intersection(network.needed(outputs)):
            raise ValueError(
                f"the term {name!r} should hide the images in {', '.join(outputs)}, but train={list(parts)} leaves all "
                "before it frozen, and its decoders would learn alone; train the encoder too, or set the loss's "
                "strength=0"
            )


def _defending(terms: Mapping[str, Term]) -> dict[str, Term]:
    return {name: term for name, term in terms.items() if term.weight and getattr(term.loss, "defends", False)}


def check_batches(terms: Mapping[str, Term], trainer: pl.Trainer, data: Any, last: bool = True) -> None:
    """Refuse batches that are smaller than a term's statistic needs.

    Args:
        terms: The terms by name; a loss may say by ``least_batch`` how many samples it needs, and by
            ``gather`` that those of all ranks count.
        trainer: The trainer.
        data: The data module; one that does not say its ``batch_size`` is left to the loss.
        last: Whether to count the images, for the last batch of an epoch.

    Raises:
        ValueError: A whole batch is too small, or the last one of an epoch.
    """
    size = getattr(data, "batch_size", None)
    if not isinstance(size, int):
        return
    for name, term in terms.items():
        least = getattr(term.loss, "least_batch", 0)
        ranks = trainer.world_size if getattr(term.loss, "gather", False) else 1
        if size * ranks < least:
            raise ValueError(f"the term {name!r} needs batches of at least {least} samples, got data.batch_size={size}")
        if not last or getattr(data, "drop_last", True) or trainer.limit_train_batches != 1.0:
            continue
        share = -(-len(data.dataset("train")) // trainer.world_size)
        if 0 < (rest := share % size * ranks) < least:
            raise ValueError(
                f"the term {name!r} needs batches of at least {least} samples, but the last of an epoch would have "
                f"{rest} with data.batch_size={size} and data.drop_last=false; set data.drop_last=true, or another size"
            )
