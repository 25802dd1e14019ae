"""What learns from the terms of an objective, and the refusal of what would learn nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
from torch import nn

from cleave.architectures import StagedNetwork
from cleave.architectures.naming import did_you_mean
from cleave.architectures.network.train_parts import part_names
from cleave.lightning_modules import privates
from cleave.lightning_modules.defending import check_batches, check_encoders, check_frozen
from cleave.lightning_modules.term import STUDENT, Term

TERMS = "terms"
_FIXES = {
    "prior": "only a rate teaches its prior: add a term with RateLoss, use method=entropic, or leave it out",
    "ensemble": "use method=zero_time_waste, or leave it out",
}


class Learning(NamedTuple):
    """What is trained.

    Attributes:
        parts: Parts of the network, by the names of :meth:`~cleave.architectures.StagedNetwork.parts`, in order.
        terms: Terms whose parameters are trained.
    """

    parts: tuple[str, ...]
    terms: tuple[str, ...]


def what_learns(
    network: StagedNetwork, terms: Mapping[str, Term], train: Sequence[str] | None, method: str
) -> Learning:
    """Return what ``train`` names, without the exits that the terms give no weight.

    Args:
        network: The network.
        terms: The terms by name, bound to it.
        train: Names of parts, and ``terms/NAME`` for terms; ``None`` takes every part that a term reads, and all terms.
        method: Name of the task's class, for the messages.

    Raises:
        ValueError: ``train`` names what is not there, a part that no term reaches, or nothing that learns; or a term
            reads nothing trained and has no parameters to train, or should hide images where nothing can learn it.
    """
    check_encoders(network, terms)
    if isinstance(train, str):
        raise ValueError(f"train is a list of parts, got the string {train!r}; write train=[{train}]")
    reached = {name: network.needed(term.asks(STUDENT)) for name, term in terms.items()}
    everywhere = frozenset[str]().union(*reached.values())
    if train is None:
        parts, learning = tuple(part for part in network.parts() if part in everywhere), tuple(terms)
    else:
        learning = _terms(train, terms)
        rest = [name for name in train if name.partition("/")[0] != TERMS]
        parts = network.resolve(rest) if rest or not train else ()
    parts = _weighted(network, terms, parts)
    if idle := [part for part in parts if part not in everywhere]:
        raise ValueError(
            f"train={list(parts)}: no term of {method} reaches the {idle[0]}, which would learn nothing; "
            + _fix(network, idle[0])
        )
    for name, term in terms.items():
        teaches = reached[name].intersection(_with_parameters(network, parts))
        if not teaches and not (name in learning and any(weight.requires_grad for weight in term.parameters())):
            raise ValueError(
                f"the term {name!r} reads {', '.join(term.names)}, of which nothing is trained by train={list(parts)}, "
                "and has no parameters of its own to train; leave it out, or train a part before what it reads"
            )
    check_frozen(network, terms, parts, _with_parameters(network, parts))
    return Learning(parts, learning)


def default_parts(network: StagedNetwork, trains: Sequence[str], extra: Sequence[Term]) -> list[str]:
    """Return what a method trains by default: its own parts as far as the network has them, and exits that are read.

    Args:
        network: The network.
        trains: The method's own parts.
        extra: A user's terms, bound to the network, which may read exits that the method itself leaves alone.
    """
    found = [name for name in trains if name in part_names(network.parts())]
    outputs = [name for term in extra for name in term.asks(STUDENT)]
    return found + sorted(part for part in network.needed(outputs) if part.partition("/")[0] == "exits")


def _terms(train: Sequence[str], terms: Mapping[str, Term]) -> tuple[str, ...]:
    named = [name for name in train if name.partition("/")[0] == TERMS]
    known = [TERMS, *(f"{TERMS}/{name}" for name in terms)]
    for name in named:
        if name not in known:
            raise ValueError(f"train names {name!r}, but there are {', '.join(known)}." + did_you_mean(name, known))
    return tuple(name for name in terms if not named or TERMS in named or f"{TERMS}/{name}" in named)


def _weighted(network: StagedNetwork, terms: Mapping[str, Term], parts: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out the exits that get no weight: no gradient reaches them, which DDP would refuse."""
    without: set[str] = set()
    own = network.group("exits") if network.exits else ()
    asked = {output for term in terms.values() for output in term.asks(STUDENT)}
    elsewhere = network.needed(asked.difference(own))
    for name, output in zip(network.exits, own, strict=True):
        readers = [term for term in terms.values() if output in term.asks(STUDENT)]
        if readers and all(name in term.weightless(network.exits) for term in readers):
            without.update({f"exits/{name}"}.difference(elsewhere))
    left = tuple(part for part in parts if part not in without)
    if parts and not left:
        weights = next(w for term in terms.values() if (w := getattr(term.loss, "weights", None)) is not None)
        raise ValueError(
            f"weights={weights!r} leave nothing to train of {', '.join(parts)}; give these exits a weight above 0, or "
            "train other parts"
        )
    return left


def _with_parameters(network: StagedNetwork, parts: Sequence[str]) -> set[str]:
    modules = network.parts()
    return {part for part in parts if any(True for module in modules[part] for _ in module.parameters())}


def _fix(network: StagedNetwork, part: str) -> str:
    kind, _, cut = part.partition("/")
    if kind == "quantizer" and network.bottlenecks[cut].has_prior:
        return _FIXES["prior"]
    return _FIXES.get(kind, "leave it out, or add a term behind it")


def frozen_modules(network: StagedNetwork, parts: Sequence[str]) -> list[nn.Module]:
    """Return the modules of all parts that are not trained."""
    return [module for name, modules in network.parts().items() if name not in parts for module in modules]


def freeze(network: StagedNetwork, frozen: Sequence[nn.Module], terms: nn.ModuleDict, learning: Sequence[str]) -> None:
    """Leave gradients to what learns; what the network itself keeps fixed stays so.

    Args:
        network: The network.
        frozen: Its modules that are not trained.
        terms: The terms.
        learning: Names of those whose parameters are trained.
    """
    for name, parameter in network.named_weights():
        parameter.requires_grad_(name in network.learnable)
    trained = {child_name(name) for name in learning}
    for module in [*frozen, *(term for name, term in terms.items() if name not in trained)]:
        module.requires_grad_(False)


def child_name(term: str) -> str:
    """Return a term's name as that of a child module, which holds no dot."""
    return term.replace(".", "|")


def check_network(network: Any, task: str) -> None:
    """Raise TypeError unless a network is made of stages."""
    if not isinstance(network, nn.Module) or not hasattr(network, "outputs"):
        raise TypeError(
            f"{task} trains a StagedNetwork, got {type(network).__name__}; build it by staged_network(backbone, sample)"
        )


def check_codes(network: StagedNetwork, asked: Sequence[str], parts: Sequence[str]) -> None:
    """Refuse codes of a bottleneck that nothing trains and whose range nobody has measured, where they are run.

    Args:
        network: The network.
        asked: The outputs that are computed in training.
        parts: The parts that are trained.

    Raises:
        ValueError: Such a range would be needed.
    """
    for cut, bottleneck in network.bottlenecks.items():
        sent, own = f"{cut}/sent", {f"{name}/{cut}" for name in bottleneck.parts()}
        runs = sent in asked or network.needed(asked) != network.needed(asked, [sent])
        if runs and not own.intersection(parts):
            bottleneck.check_measured()
        if runs and bottleneck.noise is not None and f"noise/{cut}" not in parts:
            bottleneck.noise.check_measured()


def check_run(trainer: pl.Trainer, network: StagedNetwork, terms: Mapping[str, Term]) -> None:
    """Refuse a run that cannot train what it should.

    Raises:
        ValueError: A loss follows a run without an end, a batch is too small for a statistic, or several processes
            would wait for gradients that a step of a network of several widths does not give.
    """
    check_batches(terms, trainer, getattr(trainer, "datamodule", None))
    endless = trainer.max_epochs == -1 and trainer.max_steps == -1
    for name, term in terms.items():
        if endless and term.follows_progress():
            raise ValueError(
                f"the weights of the term {name!r} grow until the end of the run, which has none; set max_epochs"
            )
    if network.widths and privates.misses_unused(trainer):
        raise ValueError(
            "a step of a network of several widths uses the BatchNorm of one of them, and several processes would "
            "wait for the gradients of the others; set trainer.strategy=ddp_find_unused_parameters_true"
        )
