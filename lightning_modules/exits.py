"""The base of early-exit training: a multi-exit network, what it learns from, and what each exit is measured by."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from cleave.architectures.inserts.quantizer import check_measured
from cleave.architectures.multi_exit import MultiExitNetwork
from cleave.architectures.naming import did_you_mean
from cleave.deployment import ExitPolicy, build_policy, offline, zstd_bytes
from cleave.lightning_modules.base import Batch, CalibrationError
from cleave.lightning_modules.taught import TaughtTask
from cleave.lightning_modules.teacher import Teacher
from cleave.losses.exit_weights import WeightedExits

TEACHER = "teacher logits"


@dataclasses.dataclass(frozen=True)
class SeenExits:
    """What a multi-exit network and the teacher made of a batch.

    Args:
        labels: (B,), int64.
        own: Every exit's own logits, (B, classes) each.
        teacher: The teacher's logits (B, classes), where there is one.
    """

    labels: Tensor
    own: list[Tensor]
    teacher: Tensor | None


class ExitTask(TaughtTask):
    """Trains a :class:`~cleave.architectures.multi_exit.MultiExitNetwork`; a subclass states the objective's terms.

    The backbone runs once a step; where it is frozen, ``feature_cache.use`` runs it once in all, and stores what the
    exits read of it. Besides the last exit's figures (``val/acc`` …) it reports ``val/acc_exit/NAME`` and
    ``val/ece_exit/NAME`` of every exit and their mean ``val/acc_exits``. Testing also reports what ``policy`` makes of
    them: ``test/policy/acc``, the mean MACs, their share of the backbone's, and the share of samples that leaves at
    each exit; what the exits are then measured by is what they answer under it. With a bottleneck it goes through real
    bytes, of which ``test/payload_bytes`` is what a sample sends that goes on behind the split, and
    ``test/policy/payload_bytes`` the mean over all samples.

    Args:
        network: The multi-exit network to train.
        *args: As of :class:`~cleave.lightning_modules.taught.TaughtTask`.
        train: Parts that learn: of ``backbone``, ``bottleneck``, ``heads``, ``ensemble``, and ``exit1`` to ``exitN``
            for single heads; ``None`` takes the method's own. The others are frozen, running statistics included.
        teacher: A frozen teacher; left aside by a method that needs none.
        policy: Settings of an exit policy, ``kind`` and ``thresholds``, to test with; ``None`` tests none. An ensemble
            takes the network's weights as they are when testing starts.
        **kwargs: As of :class:`~cleave.lightning_modules.taught.TaughtTask`.

    Raises:
        TypeError: ``network`` has no exits.
        ValueError: ``train`` names an unknown part or none that has parameters, or the policy does not fit the exits.
    """

    trains: ClassVar[tuple[str, ...]] = ("backbone", "bottleneck", "heads")
    network: MultiExitNetwork
    needs_teacher = False

    def __new__(cls, network: MultiExitNetwork | None = None, *args: Any, **kwargs: Any) -> ExitTask:
        """Refuse anything else than a multi-exit network; a copy gives nothing."""
        if network is not None and not isinstance(network, MultiExitNetwork):
            raise TypeError(f"{cls.__name__} trains a MultiExitNetwork, got {type(network).__name__}")
        return super().__new__(cls)

    def __init__(
        self,
        network: MultiExitNetwork,
        *args: Any,
        train: Sequence[str] | None = None,
        teacher: Teacher | None = None,
        policy: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.__dict__["trained_parts"] = self._trained(self.trains if train is None else train, network)
        super().__init__(network, *args, **kwargs)
        self.__dict__["_teacher"] = teacher if self.needs_teacher else None
        self.backbone_macs = network.backbone_macs
        self.use_policy(None if policy is None else network_policy(network, policy))
        self.policy_settings = policy
        self.val_exits = self._exit_metrics()
        self.test_exits = self._exit_metrics()
        names = ["acc", *(f"share{i}" for i in range(len(network.exit_names))), "payload_bytes"]
        self.test_policy = nn.ModuleDict({name: MeanMetric() for name in names})
        self.test_payload = nn.ModuleDict({"payload_bytes": MeanMetric(), "payload_zstd_bytes": MeanMetric()})

    def use_policy(self, policy: ExitPolicy | None) -> None:
        """Test with a policy as it is given; ``None`` tests none."""
        self.policy, self.policy_settings = policy, None
        self.exit_costs = self.network.exit_costs(policy)

    # --- objective --------------------------------------------------------------------------------------------------

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return each exit's term of the objective; those that nothing trained reaches are left out."""
        terms = self.exit_terms(self.see(batch))
        named = zip(self.network.exit_names, terms, strict=True)
        return {f"exit/{name}": term for name, term in named if term.requires_grad}

    @abc.abstractmethod
    def exit_terms(self, seen: SeenExits) -> list[Tensor]:
        """Return the weighted loss of each exit."""

    def see(self, batch: Batch) -> SeenExits:
        """Run the network on a batch, or what is stored of its frozen parts, and the teacher."""
        cached: list[dict[str, Tensor]]
        images, labels, *cached = batch
        if not cached:
            reduced = self.network.reduced(images, **self.reducing())
            return SeenExits(labels, self.network.classify(reduced), self._teach(images))
        return SeenExits(labels, self.network.classify(cached[0]), cached[0].get(TEACHER))

    def reducing(self) -> dict[str, Any]:
        """Further arguments of :meth:`cleave.architectures.MultiExitNetwork.reduced` in training."""
        return {}

    def _teach(self, images: Tensor) -> Tensor | None:
        if self._teacher is None:
            return None
        with torch.no_grad():
            return self._teacher.network(images)

    def progress(self) -> float:
        """How much of the training has passed, 0 to 1."""
        if self._trainer is None:
            return 1.0
        total = float(self.trainer.estimated_stepping_batches)
        return min(1.0, self.trainer.global_step / max(1.0, total - 1))

    # --- parts ------------------------------------------------------------------------------------------------------

    def leave_out_weightless(self, objective: WeightedExits) -> None:
        """Freeze the heads that the objective gives no weight: no gradient reaches them, which DDP would refuse.

        Raises:
            ValueError: Nothing is left to train.
        """
        never = objective.weightless(len(self.network.exit_names))
        without = {f"exit{number}" for number, weightless in enumerate(never, 1) if weightless}
        left = tuple(part for part in self.trained_parts if part not in without)
        if not left:
            raise ValueError(
                f"weights={objective.weights!r} leave nothing to train of {', '.join(self.trained_parts)}; give "
                "these exits a weight above 0, or train other parts"
            )
        self.__dict__["trained_parts"] = left

    @staticmethod
    def parts(network: MultiExitNetwork) -> dict[str, nn.Module]:
        """The parts that can be trained or frozen, by name."""
        parts: dict[str, Any] = {"backbone": network.stages, "bottleneck": network.bottleneck}
        parts |= {f"exit{i + 1}": head for i, head in enumerate(network.heads)}
        parts["ensemble"] = network.ensemble
        return {name: part for name, part in parts.items() if part is not None}

    @classmethod
    def _trained(cls, train: Sequence[str], network: MultiExitNetwork) -> tuple[str, ...]:
        if isinstance(train, str):
            raise ValueError(f"train is a list of parts, got the string {train!r}; write train=[{train}]")
        parts = cls.parts(network)
        heads = [name for name in parts if name.startswith("exit")]
        known = ("backbone", "bottleneck", "heads", "ensemble", *heads)
        for name in train:
            if name not in known:
                raise ValueError(
                    f"train names {name!r}, but the parts are {', '.join(known)}." + did_you_mean(name, known)
                )
        if "ensemble" in train and "ensemble" not in cls.trains:
            raise ValueError(
                f"train names 'ensemble', which {cls.__name__}'s objective does not reach; use method=zero_time_waste"
            )
        wanted = {part for name in train for part in (heads if name == "heads" else (name,))}
        if not (found := tuple(name for name in parts if name in wanted)):
            raise ValueError(f"train={list(train)} trains nothing: this network has the parts {', '.join(parts)}")
        return found

    def frozen_modules(self) -> list[nn.Module]:
        """The parts of the network that are not trained."""
        return [part for name, part in self.parts(self.network).items() if name not in self.trained_parts]

    def compiled_modules(self) -> list[nn.Module]:
        """The stages, which run one by one."""
        return list(self.network.stages)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group trainable parameters; weights of the exits that the objective itself learns do not decay."""
        learned = [p for p in getattr(self, "objective", nn.Module()).parameters() if p.requires_grad]
        groups = super().parameter_groups()
        return [*groups, {"params": learned, "weight_decay": 0.0}] if learned else groups

    def on_fit_start(self) -> None:
        """Refuse what would train for nothing, before anything is stored.

        Raises:
            ValueError: The bottleneck is frozen, and the range of its codes was never measured; or the weights of the
                exits grow along a run without an end.
        """
        endless = self.trainer.max_epochs == -1 and self.trainer.max_steps == -1
        if endless and getattr(self.objective, "weights", None) == "shallow_deep":
            raise ValueError("weights='shallow_deep' grow until the end of the run, which has none; set max_epochs")
        if self.network.bottleneck is not None and "bottleneck" not in self.trained_parts:
            check_measured(self.network.bottleneck.quantizer)
        super().on_fit_start()

    # --- frozen features --------------------------------------------------------------------------------------------

    def frozen_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the exits read of images (B, C, H, W), and what the teacher says of them."""
        taught = self._teach(images)
        return self.network.reduced(images) | ({} if taught is None else {TEACHER: taught})

    def frozen_sources(self) -> tuple[Sequence[nn.Module], Any]:
        """Backbone and bottleneck where both are frozen, with what of the exits has no parameters, and the teacher."""
        if {"backbone", "bottleneck"} & set(self.trained_parts):
            return [], []
        network = self.network
        modules: list[Any] = [network.stages, network.bottleneck, *(head.reduce for head in network.heads)]
        modules.append(None if self._teacher is None else self._teacher.network)
        return [module for module in modules if module is not None], [network.names, network.exit_names, network.split]

    def caches_images(self) -> bool:
        """What is stored stands for the image."""
        return False

    # --- evaluation -------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure every exit on a validation batch: its ensemble where that is trained, else its own logits."""
        images, labels = batch
        network = self.network
        exits = network.exits(images) if "ensemble" in self.trained_parts else network.classify(network.reduced(images))
        answers = [logits.float() for logits in exits]
        self.val_metrics.update(answers[-1], labels)
        _update(self.val_exits, answers, labels)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured; the mean accuracy of the exits also shows in the progress bar."""
        super().on_validation_epoch_end()
        values = self._exit_values("val", self.val_exits)
        self.log("val/acc_exits", values.pop("val/acc_exits"), prog_bar=True, sync_dist=True)
        self.log_dict(values, sync_dist=True)

    def on_test_start(self) -> None:
        """Give the policy what the network has learned since it was built.

        Raises:
            ValueError: The range of the codes was never measured.
        """
        if self.network.bottleneck is not None:
            check_measured(self.network.bottleneck.quantizer)
        if self.policy_settings is not None:
            self.policy = network_policy(self.network, self.policy_settings)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure every exit on a test batch, and the policy; what passes the split goes through its bytes."""
        images, labels = batch
        payloads: list[bytes] = []

        def link(feature: Tensor) -> Tensor:
            nonlocal payloads
            arrived, payloads = send(self.network, feature)
            return arrived

        own = self.network.classify(self.network.reduced(images, link=link))
        answers = [logits.float() for logits in self._answers(own)]
        self.measure_test(answers[-1], labels)
        _update(self.test_exits, answers, labels)
        lengths = torch.tensor([float(len(payload)) for payload in payloads], device=self.device)
        if payloads:
            compressed = torch.tensor([float(zstd_bytes(payload)) for payload in payloads], device=self.device)
            _meter(self.test_payload, "payload_bytes").update(lengths)
            _meter(self.test_payload, "payload_zstd_bytes").update(compressed)
        if self.policy is not None:
            self._measure_policy(self.policy, torch.stack([logits.float() for logits in own]), labels, lengths)

    def _answers(self, own: list[Tensor]) -> list[Tensor]:
        """What each exit answers: what the policy makes of the exits' own logits, or else the network's ensemble."""
        if self.policy is None:
            return own if self.network.ensemble is None else list(self.network.ensemble(own))
        state, answers = self.policy.start(len(own[0]), own[0].shape[1], own[0]), []
        for i, logits in enumerate(own):
            answer, _, state = self.policy.decide(i, logits, state)
            answers.append(answer)
        return answers

    def _measure_policy(self, policy: ExitPolicy, own: Tensor, labels: Tensor, lengths: Tensor) -> None:
        left = offline(policy, own)
        _meter(self.test_policy, "acc").update((left.logits.argmax(1) == labels).float())
        for i in range(policy.exits):
            _meter(self.test_policy, f"share{i}").update((left.index == i).float())
        if self.network.split is not None:
            goes_on = left.index >= exits_on_device(self.network)
            _meter(self.test_policy, "payload_bytes").update(lengths * goes_on)

    def on_test_epoch_end(self) -> None:
        """Log what was measured, of every exit and of the policy."""
        super().on_test_epoch_end()
        values: dict[str, Any] = self._exit_values("test", self.test_exits)
        if self.network.split is not None:
            values |= {f"test/{name}": _finish(metric) for name, metric in self.test_payload.items()}
        if self.policy is not None:
            values |= {f"test/policy/{name}": value for name, value in self._policy_values().items()}
        self.log_dict({name: torch.as_tensor(value).float() for name, value in values.items()}, sync_dist=True)

    def _policy_values(self) -> dict[str, Any]:
        found: dict[str, Any] = {"acc": _finish(self.test_policy["acc"])}
        shares = [_finish(self.test_policy[f"share{i}"]) for i in range(len(self.network.exit_names))]
        found["macs"] = sum(share * cost for share, cost in zip(shares, self.exit_costs, strict=True))
        found["macs_to_backbone"] = found["macs"] / self.backbone_macs
        found |= {f"share/{name}": share for name, share in zip(self.network.exit_names, shares, strict=True)}
        if self.network.split is not None:
            found["payload_bytes"] = _finish(self.test_policy["payload_bytes"])
        return found

    def _exit_metrics(self) -> nn.ModuleList:
        classes = len(self.class_names)
        return nn.ModuleList(
            nn.ModuleDict(
                {"acc": MulticlassAccuracy(classes, average="micro"), "ece": CalibrationError(classes, n_bins=15)}
            )
            for _ in self.network.exit_names
        )

    def _exit_values(self, stage: str, metrics: nn.ModuleList) -> dict[str, Tensor]:
        values = {}
        for name, group in zip(self.network.exit_names, metrics, strict=True):
            for metric, value in cast(nn.ModuleDict, group).items():
                values[f"{stage}/{metric}_exit/{name}"] = _finish(value)
        accuracies = [values[f"{stage}/acc_exit/{name}"] for name in self.network.exit_names]
        return values | {f"{stage}/acc_exits": torch.stack(accuracies).mean()}


def send(network: MultiExitNetwork, feature: Tensor) -> tuple[Tensor, list[bytes]]:
    """Send a feature (B, *shape) over the split in real bytes; return what arrives and the payloads."""
    bottleneck = network.bottleneck
    assert bottleneck is not None
    codec = bottleneck.codec
    payloads = codec.encode(bottleneck.send(feature))
    received = [tensor.to(feature.device) for tensor in codec.decode(payloads).values()]
    z = bottleneck.quantizer.receive(*received)
    return bottleneck.decoder(z.to(feature.dtype)), payloads


def exits_on_device(network: MultiExitNetwork) -> int:
    """How many exits stand before anything is sent: those up to and at the split."""
    assert network.split is not None
    before = network.names[: network.names.index(network.split) + 1]
    return sum(name in network.exit_names for name in before)


def network_policy(network: MultiExitNetwork, settings: Mapping[str, Any]) -> ExitPolicy:
    """Build an exit policy for a network from ``kind``, ``thresholds`` …; an ensemble takes the network's weights.

    Raises:
        ValueError: The policy does not fit the network.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    if settings.get("kind") == "ensemble" and network.ensemble is not None:
        learned = {"weights": network.ensemble.weights, "log_bias": network.ensemble.log_bias}
        settings = {name: value.detach().tolist() for name, value in learned.items()} | settings
    return build_policy(**settings, exits=len(network.exit_names))


def _update(metrics: nn.ModuleList, answers: Sequence[Tensor], labels: Tensor) -> None:
    for group, logits in zip(metrics, answers, strict=True):
        for metric in cast(nn.ModuleDict, group).values():
            metric.update(logits, labels)  # type: ignore[operator]


def _meter(group: nn.ModuleDict, name: str) -> MeanMetric:
    return cast(MeanMetric, group[name])


def _finish(metric: Any) -> Tensor:
    value = metric.compute()
    metric.reset()
    return value
