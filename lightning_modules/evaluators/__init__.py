"""What measures a network: evaluators, each of one aspect, all of the same pass of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cleave.architectures import StagedNetwork
from cleave.deployment import ExitPolicy
from cleave.lightning_modules.evaluators.answers import Answers, network_policy
from cleave.lightning_modules.evaluators.classification import Classifier, MeanCrossEntropy
from cleave.lightning_modules.evaluators.evaluator import Evaluator, Measured, PolicyFigures, Width
from cleave.lightning_modules.evaluators.exits import Exits, Policy, exits_before
from cleave.lightning_modules.evaluators.payload import PayloadBytes
from cleave.lightning_modules.testing import Passed

__all__ = [
    "Answers",
    "Classifier",
    "Evaluator",
    "Exits",
    "MeanCrossEntropy",
    "Measured",
    "Passed",
    "PayloadBytes",
    "Policy",
    "PolicyFigures",
    "Width",
    "default_evaluators",
    "exits_before",
    "network_policy",
]


def default_evaluators(
    network: StagedNetwork,
    class_names: Sequence[str] | None = None,
    policy: ExitPolicy | Mapping[str, Any] | None = None,
) -> list[Evaluator]:
    """Return the evaluators of what a network has: a classifier, bottlenecks, exits, a policy.

    Args:
        network: The network.
        class_names: Names of the classes in the order of the logits; ``None`` numbers them.
        policy: An exit policy as it is, or the settings of one, ``kind``, ``thresholds`` …

    Raises:
        ValueError: A policy is given for a network without exits.
    """
    if policy is not None and not network.exits:
        raise ValueError("an exit policy has no meaning here: the network has no exits; give exits.at or exits.count")
    answers = Answers(policy)
    found: list[Evaluator] = [PayloadBytes()] if network.bottlenecks else []
    shape = network.shapes[network.results[0]]
    if class_names is not None or (network.results == ("logits",) and len(shape) == 1):
        names = [str(number) for number in range(shape[0])] if class_names is None else class_names
        found.append(Classifier(names, answers))
    if network.exits:
        found.append(Exits(answers))
    if policy is not None:
        found.append(Policy(answers))
    return found
