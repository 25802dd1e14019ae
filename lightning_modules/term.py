"""One weighted term of an objective: a loss, and what of a step it reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures import StagedNetwork

STUDENT, TEACHER, PROGRESS = "student", "teacher", "progress"
PIXELS = "pixels"


class Term(nn.Module):
    """A loss, the names of what it reads, and its weight.

    The names stand in the order of the loss's arguments:

    - ``images`` as the network takes them, normalised; ``pixels``, the same as uint8; ``labels`` or any other part of
      the batch;
    - ``progress``, how much of the training has passed, a float from 0 to 1;
    - ``student/NAME``, an output of the network that is trained; ``teacher/NAME`` of the teacher, ``OTHER/NAME`` of any
      other frozen network;
    - ``student/exits``, a list of the own logits of all exits in order, the final one last; ``student/answers``, what
      they answer in an ensemble;
    - a list of names, which the loss gets as a mapping by name, without the owner.

    The loss returns a scalar, or several by name; it may have parameters of its own, which are trained, saved and
    resumed with the task and are no part of the network. One without parameters gets half precision as float32. One
    with a method ``build`` is given the shapes of its arguments for a sample, in order, to make its parameters by;
    ``None`` of what has none.

    Args:
        loss: The loss.
        of: The names of its arguments.
        weight: Factor on the loss, at least 0.

    Raises:
        ValueError: ``weight`` is negative or not finite, or ``of`` names nothing.

    Example:
        >>> from cleave.losses import HeadDistillationLoss
        >>> term = Term(HeadDistillationLoss(), of=["student/layer2", "teacher/layer2"], weight=0.5)
        >>> values = {"student/layer2": torch.ones(2, 3), "teacher/layer2": torch.zeros(2, 3)}
        >>> term.losses("head", values)
        {'head': tensor(1.5000)}
    """

    def __init__(self, loss: nn.Module, of: Sequence[str | Sequence[str]], weight: float = 1.0) -> None:
        super().__init__()
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the weight of a term must be a number of at least 0, got {weight}")
        if isinstance(of, str) or not of:
            raise ValueError(f"of is a list of names, one for each argument of the loss, got {of!r}")
        self.loss = loss
        self.of = tuple(name if isinstance(name, str) else tuple(name) for name in of)
        self.weight = weight
        self._groups: dict[str, tuple[str, ...]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names that it reads."""
        return tuple(dict.fromkeys(_flat(self.of)))

    @property
    def owners(self) -> tuple[str, ...]:
        """The networks whose outputs it reads."""
        return tuple(dict.fromkeys(name.partition("/")[0] for name in self.names if "/" in name))

    def bind(self, network: StagedNetwork, owner: str = STUDENT) -> None:
        """Look up what its groups stand for in a network, and tell the loss the exits and their costs, if it asks.

        Called once before the optimizer exists, for the student and for every other network.

        Raises:
            CutError: The network has no such group.
            ValueError: The loss does not fit the network.
        """
        for name in self.names:
            whose, _, output = name.partition("/")
            if whose == owner and (members := network.group(output)) != (output,):
                self._groups[name] = tuple(f"{owner}/{member}" for member in members)
        if owner == STUDENT and hasattr(self.loss, "build"):
            shapes = {"images": network.input_shape, PIXELS: network.input_shape}
            shapes |= {f"{STUDENT}/{name}": shape for name, shape in network.shapes.items()}
            self.loss.build([shapes.get(name) if isinstance(name, str) else None for name in self.of])  # type: ignore[operator]
        if owner == STUDENT and hasattr(self.loss, "bind"):
            self.loss.bind(network.exits, network.cost_shares() if network.exits else ())  # type: ignore[operator]

    def asks(self, owner: str) -> tuple[str, ...]:
        """Return the outputs of one network that it reads."""
        names = (member for name in self.names for member in self._groups.get(name, (name,)))
        mine = (name.partition("/") for name in names if name.startswith(f"{owner}/"))
        return tuple(dict.fromkeys(output for _, _, output in mine))

    def weightless(self, exits: Sequence[str]) -> set[str]:
        """Return the exits of a network that the loss gives no weight all along the training."""
        if not hasattr(self.loss, "weightless"):
            return set()
        never = self.loss.weightless(len(exits))  # type: ignore[operator]
        return {name for name, weightless in zip(exits, never, strict=True) if weightless}

    def follows_progress(self) -> bool:
        """Whether the loss changes along the training, which must then have an end."""
        return PROGRESS in self.names and bool(getattr(self.loss, "follows_progress", True))

    def forward(self, values: Mapping[str, Any]) -> Tensor | dict[str, Tensor]:
        """Return the unweighted loss of a step's values, by their names."""
        return self.loss(*(self._argument(name, values) for name in self.of))

    def losses(self, name: str, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the weighted loss under the term's name; of several, each under its own behind it."""
        found = self(values)
        if isinstance(found, Tensor):
            return {name: self.weight * found}
        return {f"{name}/{part}": self.weight * value for part, value in found.items()}

    def _argument(self, name: str | tuple[str, ...], values: Mapping[str, Any]) -> Any:
        if isinstance(name, tuple):
            return {each.partition("/")[2] or each: self._argument(each, values) for each in name}
        if name in self._groups:
            return [self._value(member, values) for member in self._groups[name]]
        return self._value(name, values)

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        if name not in values:
            parts = ", ".join(known for known in values if "/" not in known)
            raise ValueError(
                f"a term reads {name!r}, which no batch has: it has {parts}; outputs of the network are named "
                f"student/NAME"
            )
        value = values[name]
        half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if half and next(self.loss.parameters(), None) is None else value

    def extra_repr(self) -> str:
        """Show what it reads in the printed module."""
        return f"of={list(self.of)}, weight={self.weight}"


def _flat(of: Sequence[str | Sequence[str]]) -> Iterator[str]:
    for name in of:
        if isinstance(name, str):
            yield name
        else:
            yield from name


def together(terms: Mapping[str, Term], extra: Mapping[str, Term]) -> dict[str, Term]:
    """Return a method's terms with a user's own.

    Raises:
        ValueError: There is none, a name stands there twice, or one cannot be logged.
    """
    if both := sorted(terms.keys() & extra.keys()):
        raise ValueError(f"extra_terms names {both[0]!r}, which is the method's own term; name it otherwise")
    for name in extra:
        if not name.isidentifier() or name == "loss":  # metrics are named after terms
            raise ValueError(f"extra_terms names {name!r}; a term's name is one word, such as kd, but not loss")
    if not terms and not extra:
        raise ValueError("a task needs at least one term; give terms={NAME: Term(…)}")
    return {**terms, **extra}


def asked_outputs(terms: Iterable[Term]) -> dict[str, tuple[str, ...]]:
    """Return the outputs that terms read, by network; the student's first."""
    found: dict[str, dict[str, None]] = {STUDENT: {}}
    for term in terms:
        for owner in term.owners:
            found.setdefault(owner, {}).update(dict.fromkeys(term.asks(owner)))
    return {owner: tuple(names) for owner, names in found.items()}


def take_over(terms: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load the weights of terms that a task's state dict holds under the same names and in the same shapes.

    Returns:
        Their names.
    """
    own = {f"terms.{name}": value for name, value in terms.state_dict().items()}
    shared = {name for name, value in own.items() if name in state and state[name].shape == value.shape}
    with torch.no_grad():
        for name in shared:
            own[name].copy_(state[name])
    return sorted(shared)
