"""When a sample may leave at an early exit: policies that decide the same on a device, on a server and offline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ..checks import is_finite, is_whole
from ..naming import did_you_mean
from .policy import ExitPolicy, Thresholds, at_least_single, sequence, shared


class ConfidencePolicy(ExitPolicy):
    r"""Leave where the largest probability is at least the threshold, in [0, 1].

    .. math:: \max_k \, \mathrm{softmax}(s)_k \ge t

    The rule of Kaya, Hong and Dumitras, "Shallow-Deep Networks: Understanding and Mitigating Network Overthinking",
    2019.

    Example:
        >>> policy = ConfidencePolicy(thresholds=(0.9,))
        >>> policy.decide(0, torch.tensor([[3.0, 0.0], [1.0, 0.0]]), {}).leave
        tensor([ True, False])
    """

    kind = "confidence"
    scored = "the largest probability"

    def _score(self, answer: Tensor, state: dict[str, Tensor]) -> Tensor:
        return at_least_single(answer).softmax(1).amax(1)


class EntropyPolicy(ExitPolicy):
    r"""Leave where the entropy, as a share of the largest possible, is at most the threshold, in [0, 1].

    .. math:: -\frac{1}{\log C} \sum_{k=1}^{C} p_k \log p_k \le t, \qquad p = \mathrm{softmax}(s)

    The rule of Teerapittayanon, McDanel and Kung, "BranchyNet: Fast Inference via Early Exiting from Deep Neural
    Networks", 2016, whose thresholds are in nats: divide them by log C.

    Example:
        >>> policy = EntropyPolicy(thresholds=(0.5,))
        >>> policy.decide(0, torch.tensor([[3.0, 0.0], [1.0, 0.0]]), {}).leave
        tensor([ True, False])
    """

    kind = "entropy"
    scored = "the entropy divided by log C"
    rising = False

    def _score(self, answer: Tensor, state: dict[str, Tensor]) -> Tensor:
        p = at_least_single(answer).softmax(1)
        # Rounding may take a uniform distribution beyond 1, where no threshold could follow.
        return (torch.special.entr(p).sum(1) / math.log(p.shape[1])).clamp(max=1)


class MarginPolicy(ExitPolicy):
    r"""Leave where the largest probability exceeds the second largest by at least the threshold, in [0, 1].

    .. math:: p_{(1)} - p_{(2)} \ge t, \qquad p = \mathrm{softmax}(s)

    The score margin of Park et al., "Big/Little Deep Neural Network for Ultra Low Power
    Inference", 2015.

    Example:
        >>> policy = MarginPolicy(thresholds=(0.8,))
        >>> policy.decide(0, torch.tensor([[3.0, 0.0], [1.0, 0.0]]), {}).leave
        tensor([ True, False])
    """

    kind = "margin"
    scored = "the margin between two probabilities"

    def _score(self, answer: Tensor, state: dict[str, Tensor]) -> Tensor:
        first, second = at_least_single(answer).softmax(1).topk(2, dim=1).values.unbind(1)
        return first - second


class PatiencePolicy(ExitPolicy):
    r"""Leave where t exits one after another agreed with the one before them; the threshold t is a whole number.

    .. math:: n_1 = 0, \qquad n_m = \begin{cases} n_{m-1} + 1 & \arg\max s_m = \arg\max s_{m-1} \\
        0 & \text{else} \end{cases}, \qquad n_m \ge t

    The rule for classification of Zhou, Xu, Ge, McAuley, Xu and Wei, "BERT Loses Patience: Fast and Robust Inference
    with Early Exit", 2020, section 3. All early exits share one t: at 0 all leave at the first exit, and from E - 1 on
    none leaves early. A search for t begins at 1.

    Example:
        >>> policy = PatiencePolicy(thresholds=(1, 1))
        >>> first, second = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> state = policy.decide(0, first, policy.start(2, 2, first)).state
        >>> policy.decide(1, second, state).leave
        tensor([ True, False])
    """

    kind = "patience"
    scored = "the number of agreements"
    per_exit = False
    carries = True

    def candidates(self) -> range:
        """Return the whole numbers from 1 to E - 1, which no count of agreements reaches before the last exit."""
        return range(1, self.exits)

    def with_certainties(self, certainties: Sequence[float]) -> Self:
        """Return this policy with the number of agreements that all early exits share."""
        return self.with_thresholds([int(value) for value in certainties])

    def start(self, batch: int, classes: int, like: Tensor) -> dict[str, Tensor]:
        """Return no answer yet, -1, and no agreement for B samples."""
        return {
            "answered": torch.full((batch,), -1, device=like.device),
            "agreed": torch.zeros(batch, dtype=torch.int64, device=like.device),
        }

    def _answer(self, exit: int, logits: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if "agreed" not in state or len(state["agreed"]) != len(logits):
            raise ValueError(f"a patience policy needs the state of the exit before exit {exit}, for the same samples")
        if exit == 0 and bool((state["answered"] >= 0).any()):
            raise ValueError("at exit 0 a patience policy needs the state of start(), got that of a later exit")
        answered = logits.argmax(1)
        agreed = torch.where(answered == state["answered"], state["agreed"] + 1, 0)
        return logits, {"answered": answered, "agreed": agreed}

    def _score(self, answer: Tensor, state: dict[str, Tensor]) -> Tensor:
        return state["agreed"]

    def _checked_thresholds(self, thresholds: Sequence[Any]) -> tuple[float | None, ...]:
        for value in thresholds:
            if value is not None and not (is_whole(value) and value >= 0):
                raise ValueError(f"a patience must be a whole number of at least 0, or None, got {value!r}")
        if len(set(thresholds)) > 1:
            raise ValueError(f"all early exits share one patience, got {list(thresholds)}; give one number")
        return tuple(None if value is None else int(value) for value in thresholds)


@dataclasses.dataclass(frozen=True)
class EnsemblePolicy(ConfidencePolicy):
    r"""Answer with the weighted geometric mean of all exits so far; leave where that is confident enough.

    .. math:: q_m^k \propto b_m^k \prod_{i \le m} (p_i^k)^{w_{mi}}, \qquad \max_k q_m^k \ge t

    The eq. of geometric ensembling in section 3 of Wołczyk et al., "Zero Time Waste: Recycling Predictions in Early
    Exit Neural Networks", 2021. Answers are log q up to a constant of the sample.

    Args:
        thresholds: One number in [0, 1] for each of the E - 1 early exits; ``None``: none leaves there.
        temperatures: One for each of the E exits, or ``None``.
        latest: The exit at which all leave that still remain, or ``None``.
        weights: w > 0, E rows of E; row m weighs the exits up to m. What stands above the diagonal is not looked at.
            ``None`` is the plain geometric mean, 1 / m each.
        log_bias: log b, E rows of one number for each class; ``None`` is 0.
        last: Whether the last exit answers with its ensemble, as the paper has it; else with its own logits, as the
            authors' code does.

    Raises:
        ValueError: An argument is out of range; the message names it and its value.

    Example:
        >>> policy = EnsemblePolicy(thresholds=(0.95,))
        >>> first, second = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.4, 0.6]]).log()
        >>> state = policy.decide(0, first, policy.start(1, 2, first)).state
        >>> policy.decide(1, second, state).answer.softmax(1)
        tensor([[0.7101, 0.2899]])
    """

    kind = "ensemble"
    scored = "the ensemble's largest probability"
    carries = True
    final_needs_state = True

    weights: tuple[tuple[float, ...], ...] | None = None
    log_bias: tuple[tuple[float, ...], ...] | None = None
    last: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.last, bool):
            raise ValueError(f"last must be true or false, got {self.last!r}")
        object.__setattr__(self, "final_needs_state", self.last)
        if self.weights is not None:
            object.__setattr__(self, "weights", self._checked_weights(self._rows("weights")))
        if self.log_bias is not None:
            rows = self._rows("log_bias")
            if len({len(row) for row in rows}) > 1 or not all(is_finite(value) for row in rows for value in row):
                raise ValueError("log_bias must be as many finite numbers for each exit as there are classes")
            object.__setattr__(self, "log_bias", tuple(tuple(map(float, row)) for row in rows))

    def with_ensemble(self, weights: Sequence[Sequence[float]], log_bias: Sequence[Sequence[float]]) -> Self:
        """Return this policy with other weights and biases."""
        rows, biases = tuple(map(tuple, weights)), tuple(map(tuple, log_bias))
        return dataclasses.replace(self, weights=rows, log_bias=biases)

    def start(self, batch: int, classes: int, like: Tensor) -> dict[str, Tensor]:
        """Return room for the log-probabilities of B samples, (B, 0, C)."""
        return {"log_p": at_least_single(like.new_empty(batch, 0, classes))}

    def macs(self, exit: int, classes: int) -> int:
        """One for each class of each exit so far."""
        return 0 if exit == self.exits - 1 and not self.last else (exit + 1) * classes

    def _answer(self, exit: int, logits: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        batch, classes = logits.shape
        if "log_p" not in state or state["log_p"].shape != (batch, exit, classes):
            raise ValueError(
                f"an ensemble needs the answers of all {exit} exits before exit {exit}, for the same {batch} samples "
                f"and {classes} classes"
            )
        if self.log_bias is not None and len(self.log_bias[exit]) != classes:
            raise ValueError(
                f"logits of exit {exit} have {classes} classes, the ensemble's log_bias {len(self.log_bias[exit])}"
            )
        log_p = torch.cat([state["log_p"], at_least_single(logits).log_softmax(1).unsqueeze(1)], 1)
        weights = [1 / (exit + 1)] * (exit + 1) if self.weights is None else self.weights[exit]
        # One after another, not as a product of matrices, whose rounding would depend on the size of the batch.
        answer = weights[0] * log_p[:, 0]
        for i in range(1, exit + 1):
            answer = answer + weights[i] * log_p[:, i]
        if self.log_bias is not None:
            answer = answer + torch.tensor(self.log_bias[exit], dtype=answer.dtype, device=answer.device)
        return answer, {"log_p": log_p}

    def _rows(self, name: str) -> list[tuple[Any, ...]]:
        rows = [sequence(row, f"a row of {name}") for row in sequence(getattr(self, name), name)]
        if len(rows) != self.exits:
            raise ValueError(f"{name} must have {self.exits} rows, one for each exit and the last, got {len(rows)}")
        return rows

    def _checked_weights(self, rows: Sequence[tuple[Any, ...]]) -> tuple[tuple[float, ...], ...]:
        for exit, row in enumerate(rows):
            if len(row) != self.exits:
                raise ValueError(
                    f"row {exit} of weights must have {self.exits} numbers, one for each exit, got {len(row)}"
                )
            if wrong := [value for value in row[: exit + 1] if not (is_finite(value) and value > 0)]:
                raise ValueError(f"row {exit} of weights must be positive finite numbers, got {wrong[0]!r}")
        return tuple((*map(float, row[: exit + 1]), *[0.0] * (self.exits - 1 - exit)) for exit, row in enumerate(rows))


POLICIES: dict[str, type[ExitPolicy]] = {
    policy.kind: policy for policy in (ConfidencePolicy, EntropyPolicy, MarginPolicy, PatiencePolicy, EnsemblePolicy)
}


def build_policy(
    kind: str,
    thresholds: Thresholds = None,
    *,
    exits: int,
    temperatures: float | Sequence[float] | None = None,
    **more: Any,
) -> ExitPolicy:
    """Build a policy for a network of so many exits.

    Args:
        kind: One of :data:`POLICIES`: ``confidence``, ``entropy``, ``margin``, ``patience`` or ``ensemble``.
        thresholds: One for each of the E - 1 early exits, or one that all share; ``None``: none leaves there.
        exits: Number of exits E, the final classifier among them.
        temperatures: One for each of the E exits, or one that all share.
        more: What else the kind takes, such as the ensemble's ``weights`` and ``log_bias``.

    Raises:
        ValueError: The kind or an argument's name is unknown, a count is wrong, or a value is out of range.

    Example:
        >>> build_policy("confidence", 0.9, exits=3).thresholds
        (0.9, 0.9)
    """
    policy = _known(kind)
    if not is_whole(exits) or exits < 1:
        raise ValueError(f"exits must be a whole number of at least 1, the final classifier counts; got {exits!r}")
    if unknown := sorted(more.keys() - (names := {field.name for field in dataclasses.fields(policy)})):
        raise ValueError(f"a {kind} policy takes no {', '.join(unknown)}; it takes {', '.join(sorted(names))}")
    given = None if temperatures is None else shared(temperatures, exits, "temperatures")
    return policy(shared(thresholds, exits - 1, "thresholds"), given, **more)


def policy_from_dict(values: Mapping[str, Any]) -> ExitPolicy:
    """Build a policy from :meth:`ExitPolicy.to_dict`'s values.

    Raises:
        ValueError: The kind is unknown, a key is missing or unknown, or a value is out of range.

    Example:
        >>> policy = build_policy("margin", [0.5, None], exits=3)
        >>> policy_from_dict(policy.to_dict()) == policy
        True
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("kind"), str):
        raise ValueError(f"a policy needs a kind, one of {', '.join(POLICIES)}, got {values!r}")
    policy = _known(values["kind"])
    arguments = {key: value for key, value in values.items() if key != "kind"}
    if arguments.keys() != (names := {field.name for field in dataclasses.fields(policy)}):
        raise ValueError(f"a {policy.kind} policy takes the keys {sorted(names)}, got {sorted(map(str, arguments))}")
    return policy(**arguments)


def _known(kind: str) -> type[ExitPolicy]:
    if not isinstance(kind, str) or kind not in POLICIES:
        raise ValueError(f"kind must be one of {', '.join(POLICIES)}, got {kind!r}.{did_you_mean(kind, POLICIES)}")
    return POLICIES[kind]
