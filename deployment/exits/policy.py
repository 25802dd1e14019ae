"""What every exit policy shares: thresholds, temperatures, a deadline, and decisions exit by exit."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..checks import is_finite, is_whole

Thresholds = float | None | Sequence[float | None]


class Decision(NamedTuple):
    """What a policy says of B samples at one exit.

    Attributes:
        answer: Logits (B, C) that are returned for those that leave.
        leave: Which of them leave, bool (B,).
        state: What the next exit's decision needs, tensors whose first dimension is B.
    """

    answer: Tensor
    leave: Tensor
    state: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class ExitPolicy(abc.ABC):
    """Decides exit by exit who leaves: those whose score reaches the exit's threshold, and at the last exit all.

    A sample's decision never depends on the other samples of its batch. Exits count from 0; the final classifier is the
    last of E.

    Args:
        thresholds: One number for each of the E - 1 early exits; ``None``: none leaves there.
        temperatures: One positive number for each of the E exits, by which its logits are divided before all else;
            ``None``: all are 1.
        latest: The exit at which all leave that still remain; ``None``: the last. :meth:`with_deadline` finds it.

    Attributes:
        kind: The name under which :data:`~cleave.deployment.POLICIES` knows the class.
        rising: Whether a sample leaves at a score of at least the threshold; else at a score of at most that.
        per_exit: Whether each exit may have a threshold of its own, which can be any number.
        carries: Whether state passes from exit to exit; between placements it is sent, see :meth:`state_behind`.
        final_needs_state: Whether the last exit's answer depends on that state.

    Raises:
        ValueError: An argument is out of range; the message names it and its value.
    """

    kind: ClassVar[str]
    rising: ClassVar[bool] = True
    per_exit: ClassVar[bool] = True
    carries: ClassVar[bool] = False
    final_needs_state: ClassVar[bool] = False
    scored: ClassVar[str]

    thresholds: tuple[float | None, ...]
    temperatures: tuple[float, ...] | None = None
    latest: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", self._checked_thresholds(sequence(self.thresholds, "thresholds")))
        if self.temperatures is not None:
            object.__setattr__(self, "temperatures", self._checked_temperatures(self.temperatures))
        if self.latest is not None:
            if not (is_whole(self.latest) and 0 <= self.latest < self.exits):
                raise ValueError(f"latest must be an exit, 0 to {self.exits - 1}, or None, got {self.latest!r}")
            object.__setattr__(self, "latest", int(self.latest))

    @property
    def exits(self) -> int:
        """Number of exits E, the final classifier among them."""
        return len(self.thresholds) + 1

    def start(self, batch: int, classes: int, like: Tensor) -> dict[str, Tensor]:
        """Return the state of B samples before the first exit; ``like`` is a tensor of the logits' dtype and device."""
        return {}

    def decide(self, exit: int, logits: Tensor, state: dict[str, Tensor]) -> Decision:
        """Decide who leaves at an exit.

        Args:
            exit: Which exit, 0 to E - 1.
            logits: The exit's own logits (B, C).
            state: What :meth:`start` or the decision at the exit before returned, for these samples.

        Raises:
            ValueError: There is no such exit, the logits are not finite floats (B, C) of at least 2 classes, or the
                state is not that of this exit.
        """
        scaled = self._scaled(exit, logits)
        everyone = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        if exit == self.exits - 1 and not self.final_needs_state:
            return Decision(scaled, everyone, state)
        answer, state = self._answer(exit, scaled, state)
        if exit >= (self.exits - 1 if self.latest is None else self.latest):
            leave = everyone
        elif (threshold := self.thresholds[exit]) is None:
            leave = ~everyone
        else:
            score = self._score(answer, state)
            leave = score >= threshold if self.rising else score <= threshold
        return Decision(answer.to(logits.dtype), leave, state)

    def scores(self, logits: Tensor) -> Tensor:
        """Return the scores (E, B) that thresholds are compared with, as if no sample of logits (E, B, C) had left.

        Raises:
            ValueError: The logits are not finite floats (E, B, C) of this policy's exits.
        """
        self.check(logits)
        _, batch, classes = logits.shape
        state, found = self.start(batch, classes, logits[0]), []
        for exit, own in enumerate(logits):
            answer, state = self._answer(exit, self._scaled(exit, own), state)
            found.append(self._score(answer, state))
        return torch.stack(found)

    def certainties(self, logits: Tensor) -> Tensor:
        """Return the scores (E, B), turned so that they rise with certainty: what a search for thresholds works on."""
        scores = self.scores(logits)
        return scores if self.rising else -scores

    def candidates(self) -> Sequence[float] | None:
        """Return the certainties that a threshold may ask for, from the loosest; ``None``: any number."""
        return None

    def with_certainties(self, certainties: Sequence[float]) -> Self:
        """Return this policy with a threshold for each early exit on the scale of :meth:`certainties`.

        Example:
            >>> from cleave.deployment import build_policy
            >>> build_policy("entropy", 1.0, exits=3).with_certainties([-0.25, math.inf]).thresholds
            (0.25, None)
        """
        sign = 1 if self.rising else -1
        return self.with_thresholds([None if math.isinf(value) else sign * float(value) for value in certainties])

    def threshold_words(self, exit: int) -> str:
        """Return an exit's threshold for a person; empty where none leaves there but for the last exit."""
        value = None if exit >= len(self.thresholds) else self.thresholds[exit]
        return "" if value is None else f"{value:g}"

    def state_behind(self, exit: int, classes: int) -> dict[str, Tensor]:
        """Return the state of one sample behind an exit, as an example of its names, shapes and dtypes.

        Example:
            >>> from cleave.deployment import build_policy
            >>> {name: tuple(x.shape) for name, x in build_policy("ensemble", exits=3).state_behind(1, 10).items()}
            {'log_p': (1, 2, 10)}
        """
        logits = torch.zeros(1, classes, dtype=torch.float32)
        state = self.start(1, classes, logits)
        for earlier in range(exit + 1):
            state = self.decide(earlier, logits, state).state
        return state

    def macs(self, exit: int, classes: int) -> int:
        """Multiply-accumulates of the policy's own work at an exit, where it is not negligible."""
        return 0

    def check(self, logits: Tensor) -> None:
        """Raise :class:`ValueError` unless stored logits are (E, B, C) of as many exits as the policy has."""
        if logits.ndim != 3:
            raise ValueError(f"logits must be (E, B, C): exits, samples, classes; got {tuple(logits.shape)}")
        if len(logits) != self.exits:
            raise ValueError(
                f"the policy has {self.exits} exits, the last one among them, but logits hold {len(logits)}; "
                f"give {len(logits) - 1} thresholds"
            )

    def with_thresholds(self, thresholds: Thresholds) -> Self:
        """Return this policy with other thresholds, one for each early exit or one number that all share."""
        return dataclasses.replace(self, thresholds=shared(thresholds, self.exits - 1, "thresholds"))

    def with_temperatures(self, temperatures: float | Sequence[float] | None) -> Self:
        """Return this policy with other temperatures, one for each exit or one number that all share."""
        given = None if temperatures is None else shared(temperatures, self.exits, "temperatures")
        return dataclasses.replace(self, temperatures=given)

    def with_deadline(self, deadline: float, costs: Sequence[float]) -> Self:
        """Return this policy such that no sample costs more than a deadline: the best answer until then is returned.

        Args:
            deadline: Most that a sample may cost, in the unit of the costs.
            costs: Cumulative cost of leaving at each exit, E numbers: MACs, seconds or any other unit.

        Raises:
            ValueError: Not even the first exit can be reached, or the costs are not positive and rising.

        Example:
            >>> from cleave.deployment import build_policy
            >>> build_policy("confidence", 0.9, exits=3).with_deadline(5.5, costs=[1, 5, 9]).latest
            1
        """
        values = checked_costs(costs, self.exits)
        if not (is_finite(deadline) or deadline == math.inf):
            raise ValueError(f"deadline must be a number in the unit of the costs, got {deadline!r}")
        if deadline < values[0]:
            raise ValueError(f"deadline={deadline} cannot be kept: the least possible is {values[0]}, the first exit's")
        return dataclasses.replace(self, latest=sum(cost <= deadline for cost in values) - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values with ``kind`` among them; ``policy_from_dict`` reads them back."""
        return {"kind": self.kind} | {
            field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }

    def _answer(self, exit: int, logits: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what the exit answers, given its scaled logits, and the state behind it."""
        return logits, state

    @abc.abstractmethod
    def _score(self, answer: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return the score (B,) of an answer and the state behind the exit."""

    def _scaled(self, exit: int, logits: Tensor) -> Tensor:
        if not 0 <= exit < self.exits:
            raise ValueError(f"exit must be 0 to {self.exits - 1}, the policy's exits, got {exit}")
        if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
            raise ValueError(
                f"logits of exit {exit} must be floats (B, C) of at least 2 classes, got "
                f"{tuple(logits.shape)} of {logits.dtype}"
            )
        scaled = logits if self.temperatures is None else logits / self.temperatures[exit]
        if not scaled.isfinite().all():
            divided = "" if self.temperatures is None else f" divided by its temperature {self.temperatures[exit]}"
            raise ValueError(f"logits of exit {exit}{divided} hold NaN or infinity: the network has diverged there")
        return scaled

    def _checked_thresholds(self, thresholds: Sequence[Any]) -> tuple[float | None, ...]:
        for exit, value in enumerate(thresholds):
            if value is not None and not (is_finite(value) and 0 <= value <= 1):
                raise ValueError(
                    f"the threshold of exit {exit} must be from 0 to 1, as {self.scored} is, or None to let none "
                    f"leave there, got {value!r}"
                )
        return tuple(None if value is None else float(value) for value in thresholds)

    def _checked_temperatures(self, temperatures: Any) -> tuple[float, ...]:
        if len(sequence(temperatures, "temperatures")) != self.exits:
            raise ValueError(
                f"temperatures must be {self.exits} numbers, one for each exit and the last, got {len(temperatures)}"
            )
        for exit, value in enumerate(temperatures):
            if not (is_finite(value) and value > 0):
                raise ValueError(f"the temperature of exit {exit} must be a positive finite number, got {value!r}")
        return tuple(float(value) for value in temperatures)


def shared(values: Any, count: int, name: str) -> tuple[Any, ...]:
    """Return ``count`` values: those of a sequence of that length, or one number or ``None`` for all.

    Raises:
        ValueError: The sequence has another length.
    """
    if values is None or isinstance(values, numbers.Real):
        return (values,) * count
    if len(values := sequence(values, name)) != count:
        raise ValueError(f"{name} must be {count} numbers in the exits' order, or one for all, got {len(values)}")
    return values


def sequence(values: Any, name: str) -> tuple[Any, ...]:
    """Return a sequence as a tuple; :class:`ValueError` if it is none."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise ValueError(f"{name} must be a list of numbers, got {values!r}")
    return tuple(values)


def checked_costs(costs: Sequence[float], exits: int) -> list[float]:
    """Return the cumulative costs of leaving at each exit.

    Raises:
        ValueError: There is not one for each exit, or they are not positive, finite and rising.
    """
    values = list(costs)
    if len(values) != exits:
        raise ValueError(
            f"costs must be {exits} numbers, the cumulative cost of leaving at each exit; got {len(values)}"
        )
    if not all(map(is_finite, values)) or values[0] <= 0 or any(a >= b for a, b in itertools.pairwise(values)):
        raise ValueError(f"costs are cumulative, so they must be positive and rise from exit to exit, got {values}")
    return values


def at_least_single(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 where it was half precision, else as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
