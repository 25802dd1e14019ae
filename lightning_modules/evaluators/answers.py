"""What each exit answers: what a policy makes of the exits, what an ensemble does, or an exit's own logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cleave.architectures import StagedNetwork
from cleave.deployment import ExitPolicy, build_policy
from cleave.lightning_modules.evaluators.evaluator import TEST
from cleave.lightning_modules.testing import Passed


class Answers:
    """The answers of a network's exits, or of the one classifier of a network without exits.

    In testing they are what the policy makes of the exits' own logits, or else the ensemble's; in validation the
    ensemble's where that is trained, else each exit's own logits.

    Args:
        policy: An exit policy as it is, or the settings of one: ``kind``, ``thresholds`` …, of which an ensemble takes
            the network's weights as they are when testing starts; ``None``: none.
    """

    def __init__(self, policy: ExitPolicy | Mapping[str, Any] | None = None) -> None:
        self.settings = policy if isinstance(policy, Mapping) else None
        self.policy = None if isinstance(policy, Mapping) else policy
        self.trains_ensemble = False

    def bind(self, network: StagedNetwork, trained: Sequence[str]) -> None:
        """Build the policy.

        Raises:
            ValueError: The policy does not fit the network.
        """
        self.trains_ensemble = network.ensemble is not None and "ensemble" in trained
        self.start(network)
        if self.policy is not None and self.policy.exits != len(network.exits):
            raise ValueError(
                f"the policy has {self.policy.exits} exits, the network {len(network.exits)}; both count the last"
            )

    def start(self, network: StagedNetwork) -> None:
        """Give the policy what the network has learned since it was built."""
        if self.settings is not None:
            self.policy = network_policy(network, self.settings)

    def needs(self, stage: str, network: StagedNetwork) -> tuple[str, ...]:
        """Return the outputs that the answers are made of."""
        if not network.exits:
            return network.results
        return network.group("answers" if self._ensembled(stage, network) else "exits")

    def of(self, stage: str, passed: Passed) -> list[Tensor]:
        """Return the answers (B, classes) of all exits in order, the last one's last."""
        own = [passed[name].float() for name in self.needs(stage, passed.network)]
        if stage != TEST or self.policy is None:
            return own
        state, answers = self.policy.start(len(own[0]), own[0].shape[1], own[0]), []
        for i, logits in enumerate(own):
            answer, _, state = self.policy.decide(i, logits, state)
            answers.append(answer)
        return answers

    def last(self, stage: str, passed: Passed) -> Tensor:
        """Return the last exit's answer (B, classes)."""
        return self.of(stage, passed)[-1]

    def _ensembled(self, stage: str, network: StagedNetwork) -> bool:
        if stage == TEST:
            return network.ensemble is not None and self.policy is None
        return self.trains_ensemble


def network_policy(network: StagedNetwork, settings: Mapping[str, Any]) -> ExitPolicy:
    """Build an exit policy for a network from ``kind``, ``thresholds`` …; an ensemble takes the network's weights.

    Raises:
        ValueError: The policy does not fit the network.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    if not network.exits:
        raise ValueError("an exit policy has no meaning here: the network has no exits; give exits.at or exits.count")
    if settings.get("kind") == "ensemble" and network.ensemble is not None:
        learned = {"weights": network.ensemble.weights, "log_bias": network.ensemble.log_bias}
        own = {name: value.detach().tolist() for name, value in learned.items()}  # type: ignore[operator]
        settings = {**own, "last": network.ensemble.last, **settings}
    return build_policy(**settings, exits=len(network.exits))
