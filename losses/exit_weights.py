"""The weights of several exits' losses: given, a preset, along a schedule, or learned."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

PRESETS = ("equal", "branchynet", "linear", "final", "shallow_deep", "learned")


class WeightedExits(nn.Module):
    """Base of the losses that sum over the exits of a network; ``JointExitLoss`` describes the weights.

    A subclass says what the loss of one exit is and leaves the weights to :meth:`weigh`.

    Args:
        weights: One of ``PRESETS``, or one weight per exit, the final classifier last.
        start: What an early exit weighs at first with ``"shallow_deep"``.
    """

    def __init__(self, weights: str | Sequence[float] = "equal", start: float = 0.01) -> None:
        super().__init__()
        if not 0 <= start <= 1:
            raise ValueError(f"start must lie in [0, 1], got {start}; it is what an early exit weighs at first")
        self.weights = _checked(weights)
        self.start = start
        self.names: tuple[str, ...] | None = None
        self.costs: tuple[float, ...] | None = None
        self.log_scales: nn.Parameter | None
        self.register_parameter("log_scales", None)

    @property
    def follows_progress(self) -> bool:
        """Whether the weights change along the training, which must then have an end."""
        return self.weights == "shallow_deep"

    def bind(self, exits: Sequence[str], costs: Sequence[float] | None = None) -> None:
        """Fit the weights to a network, once, before an optimizer is made or a state is loaded.

        Only ``"shallow_deep"``, which needs the costs, and ``"learned"``, whose parameter is made here, must be bound;
        for the others it names the exits, and finds a wrong number of weights before training. Binding again keeps what
        was learned.

        Args:
            exits: Names of the exits, the final classifier included.
            costs: Cost of leaving at each exit as a share of the whole network's MACs: in (0, 1], cumulative, so
                that none falls below the one before, and 1 for the last.

        Raises:
            ValueError: The numbers do not fit each other or the weights, or costs are missing or out of range.
        """
        names = checked_names(exits)
        self._check_count(len(names))
        if costs is not None:
            _check_costs(costs, len(names))
            self.costs = tuple(costs)
        elif self.weights == "shallow_deep" and self.costs is None:
            raise ValueError(
                "weights='shallow_deep' needs costs, got None; give the share of the network's MACs spent by each exit"
            )
        self.names = names
        if self.weights == "learned" and self.log_scales is None:
            self.log_scales = nn.Parameter(torch.zeros(len(names)))

    def weights_at(self, exits: int, progress: float) -> Tensor:
        """Return the weight of every exit at a moment of the training, to be read or logged; no gradient flows.

        Args:
            exits: Number of exits, the final classifier included.
            progress: Share of the training that is done, in [0, 1].

        Returns:
            λ, of shape (exits,), float32.

        Raises:
            ValueError: ``progress`` is out of range, or the weights are of another number of exits or not bound.
        """
        self._check_moment(exits, progress)
        if self.log_scales is not None:
            return torch.exp(-self.log_scales.detach().float())
        return torch.tensor(self._numbers(exits, progress), dtype=torch.float32)

    def weigh(self, logits: Sequence[Tensor], loss: Callable[[int], Tensor], progress: float) -> dict[str, Tensor]:
        """Return the weighted loss of each exit by its name; an exit that never has a weight is not computed.

        Args:
            logits: The exits' outputs, each (B, K).
            loss: Computes the loss of an exit, a scalar, from its position.
            progress: Share of the training that is done, in [0, 1].
        """
        check_exits(logits)
        self._check_moment(len(logits), progress)
        names = exit_names(self.names, len(logits))
        if self.log_scales is not None:
            return {
                name: torch.exp(-s) * loss(j) + s
                for j, (name, s) in enumerate(zip(names, self.log_scales, strict=True))
            }
        nothing = at_least_single(logits[0].new_zeros(()))
        weights = self._numbers(len(logits), progress)
        never = self.weightless(len(logits))
        terms = [nothing if never[j] else weight * loss(j) for j, weight in enumerate(weights)]
        return dict(zip(names, terms, strict=True))

    def weightless(self, exits: int) -> list[bool]:
        """Say of each exit whether its weight is 0 all along the training.

        Args:
            exits: Number of exits, the final classifier included.
        """
        if self.weights in ("shallow_deep", "learned"):
            return [False] * exits
        return [weight == 0 for weight in self._numbers(exits, 1.0)]

    def _numbers(self, exits: int, progress: float) -> list[float]:
        if not isinstance(self.weights, str):
            return list(self.weights)
        if self.weights == "branchynet":
            return [1.0] * (exits - 1) + [0.3]
        if self.weights == "final":
            return [0.0] * (exits - 1) + [1.0]
        if self.weights == "linear":
            return [2 * j / (exits * (exits + 1)) for j in range(1, exits + 1)]
        if self.weights == "shallow_deep" and self.costs is not None:
            # Written so that both ends are met exactly.
            return [(1 - progress) * self.start + progress * cost for cost in self.costs[:-1]] + [1.0]
        return [1.0] * exits

    def _check_moment(self, exits: int, progress: float) -> None:
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1], got {progress}; it is the share of the training done")
        self._check_count(exits)
        if self.names is None and self.weights in ("shallow_deep", "learned"):
            raise ValueError(f"weights={self.weights!r} is not bound to a network; call bind(exits, costs) first")

    def _check_count(self, exits: int) -> None:
        if not isinstance(self.weights, str) and len(self.weights) != exits:
            raise ValueError(
                f"weights has {len(self.weights)} numbers, but there are {exits} exits; "
                "give one weight per exit, the final classifier last"
            )
        check_bound(self.names, exits)

    def extra_repr(self) -> str:
        """Show the settings in the printed module."""
        return f"weights={self.weights!r}" + (f", start={self.start}" if self.weights == "shallow_deep" else "")


def checked_names(exits: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a network's exits; refuse what is no list of different names."""
    names = () if isinstance(exits, str) or not isinstance(exits, Sequence) else tuple(exits)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"exits must be the names of all exits, the final classifier last, got {exits!r}")
    return names


def check_bound(names: tuple[str, ...] | None, exits: int) -> None:
    """Refuse another number of exits than a loss is bound to."""
    if names is not None and len(names) != exits:
        raise ValueError(f"the loss is bound to {len(names)} exits, got {exits}; each network needs a loss of its own")


def exit_names(names: tuple[str, ...] | None, exits: int) -> tuple[str, ...]:
    """Return the names that a loss is bound to, or else the numbers of the exits, of which the last is ``final``."""
    return names or (*(str(number) for number in range(1, exits)), "final")


def check_exits(logits: Sequence[Tensor]) -> None:
    """Refuse outputs of exits that are not of one shape (B, K)."""
    shapes = [tuple(output.shape) for output in logits]
    if not shapes or len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise ValueError(
            f"logits must be one (B, K) for each exit, from the same images and over the same classes, got {shapes}"
        )


def at_least_single(x: Tensor) -> Tensor:
    """Return half precision as float32, and float32 or float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _checked(weights: str | Sequence[float]) -> str | tuple[float, ...]:
    options = f"one of {', '.join(PRESETS)}, or one number per exit"
    if isinstance(weights, str):
        if weights not in PRESETS:
            close = difflib.get_close_matches(weights, PRESETS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"weights must be {options}; got {weights!r}.{hint}")
        return weights
    try:
        numbers = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError):
        raise ValueError(f"weights must be {options}; got {weights!r}") from None
    for position, weight in enumerate(numbers, 1):
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights: exit {position} must have a finite weight of at least 0, got {weight}")
    if not any(numbers):
        raise ValueError(f"weights must give at least one exit a weight above 0, got {list(numbers)}")
    return numbers


def _check_costs(costs: Sequence[float], exits: int) -> None:
    costs = list(costs)
    fix = "give the share of the network's MACs that is spent when a sample leaves there, 1 for the last exit"
    if len(costs) != exits:
        raise ValueError(f"costs has {len(costs)} numbers, but there are {exits} exits; {fix}")
    if not all(0 < cost <= 1 for cost in costs) or costs != sorted(costs) or costs[-1] != 1:
        raise ValueError(f"costs must rise within (0, 1] and end at 1, got {costs}; {fix}")
