"""The base of split training: a split network, its teacher, its objective's terms, and the bytes it sends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from cleave.architectures.cutting.stages import LOGITS, CutError, Stages, cut
from cleave.architectures.inserts.entropy_bottleneck import EntropyBottleneck
from cleave.architectures.inserts.gaussian import GaussianEncoder
from cleave.architectures.inserts.quantizer import check_measured
from cleave.architectures.inserts.switchable import draw_width
from cleave.architectures.modes import evaluating
from cleave.architectures.naming import did_you_mean
from cleave.architectures.split import HEAD, LIKELIHOODS, PARTS, SplitNetwork
from cleave.deployment import zstd_bytes
from cleave.lightning_modules.base import Batch
from cleave.lightning_modules.taught import TaughtTask
from cleave.lightning_modules.teacher import Teacher
from cleave.lightning_modules.terms import Seen, Term

TEACHER = "teacher."
BOTTLENECK = ("encoder", "quantizer", "decoder")


class SplitTask(TaughtTask):
    """Trains a ``SplitNetwork`` on a sum of weighted terms, with or without a frozen teacher.

    Student and teacher run once a step, no further than the terms ask. Testing goes through real bytes: every sample's
    representation is encoded, decoded and then classified. It reports ``test/payload_bytes`` as sent,
    ``test/payload_zstd_bytes`` after zstd level 1, and the payload's ratio to the uint8 input, to the float32 feature
    at the cut, and to the image file (below 1 means fewer bytes); under a learned prior also ``test/estimated_bytes``,
    what the prior predicts for the bitstream; for a network of several widths also ``test/bits4/acc`` and
    ``test/bits4/payload_bytes`` of each.

    Args:
        network: The split network to train.
        *args: As of :class:`~cleave.lightning_modules.taught.TaughtTask`.
        terms: The objective's terms by name; a method says them.
        teacher: Frozen teacher that maps the same images to logits; cut at the network's own names, so that both give
            features under the same names. Left aside where no term asks for it; without one where a term does, the
            task evaluates only.
        train: Parts that learn: of ``head``, ``encoder``, ``quantizer``, ``decoder``, ``tail``, or ``bottleneck`` for
            the middle three; ``None`` takes the method's own. The others are frozen, running statistics included.
        extra_terms: More terms by name, such as a reconstruction beside distillation.
        **kwargs: As of ``TaughtTask``; what ``feature_cache`` stores are the head's
            output and the teacher's.

    Raises:
        CutError: A term names a layer that the student or the teacher lacks.
        TypeError: ``network`` is not a split network.
        ValueError: ``train`` names an unknown part, or none that learns from the terms; a term stands there twice; the
            teacher's outputs differ in shape from the student's.
    """

    trains: ClassVar[tuple[str, ...]] = BOTTLENECK
    network: SplitNetwork

    def __new__(cls, network: SplitNetwork | None = None, *args: Any, **kwargs: Any) -> SplitTask:
        """Refuse anything else than a split network before a method looks at its parts; a copy gives nothing."""
        if network is not None and not isinstance(network, SplitNetwork):
            raise TypeError(f"{cls.__name__} trains a SplitNetwork, got {type(network).__name__}")
        return super().__new__(cls)

    def __init__(
        self,
        network: SplitNetwork,
        *args: Any,
        terms: Mapping[str, Term],
        teacher: Teacher | None = None,
        train: Sequence[str] | None = None,
        extra_terms: Mapping[str, Term] | None = None,
        **kwargs: Any,
    ) -> None:
        if both := sorted(terms.keys() & (extra_terms or {}).keys()):
            raise ValueError(f"extra_terms names {both[0]!r}, which is the method's own term; name it otherwise")
        for name in extra_terms or {}:
            if not name.isidentifier() or name == "loss":  # metrics are named after terms
                raise ValueError(f"extra_terms names {name!r}; a term's name is one word, such as kd, but not loss")
        terms = {**terms, **(extra_terms or {})}
        self.__dict__["trained_parts"] = _parts(self.trains if train is None else train, network)
        super().__init__(network, *args, **kwargs)
        self.terms = nn.ModuleDict(terms)
        self.split = network.split
        self.bits = network.bits
        self.student_outputs = _union(term.student for term in terms.values())
        self.teacher_outputs = _union(term.teacher for term in terms.values())
        network.check_names(self.student_outputs)
        self._check_trained()
        self.__dict__["_teacher"] = self._matching(teacher) if self.teacher_outputs else None
        if kwargs.get("compile") and self._teacher is not None:
            self.teacher.compile()
        measured = ["payload_bytes", "payload_zstd_bytes"]
        measured += ["estimated_bytes"] if isinstance(network.quantizer, EntropyBottleneck) else []
        self.test_payload = MetricCollection({name: MeanMetric() for name in measured}, compute_groups=False)
        self.test_widths = nn.ModuleDict({f"bits{bits}": self._width_metrics() for bits in network.widths})

    # --- objective --------------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> Stages:
        """The frozen teacher, cut at the names that the terms compare."""
        if self._teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher; give teacher.ckpt_path")
        return cast(Stages, self._teacher.network)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms of the objective by name."""
        seen = self.see(batch)
        losses: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            losses |= cast(Term, term).named(name, seen)
        return losses

    def see(self, batch: Batch) -> Seen:
        """Run student and teacher on a batch, each once and no further than the terms ask."""
        cached: list[dict[str, Tensor]]
        images, labels, *cached = batch
        frozen = cached[0] if cached else {}
        student = self.network.features(images, self.student_outputs, head=frozen.get(HEAD))
        teacher = {name: frozen[TEACHER + name] for name in self.teacher_outputs} if cached else self._teach(images)
        return Seen(labels, student, teacher)

    def _teach(self, images: Tensor) -> dict[str, Tensor]:
        if not self.teacher_outputs:
            return {}
        with torch.no_grad():
            return self.teacher.features(images, self.teacher_outputs)

    def frozen_modules(self) -> list[nn.Module]:
        """The parts of the network that are not trained."""
        parts = {name: getattr(self.network, name) for name in PARTS}
        return [part for name, part in parts.items() if part is not None and name not in self.trained_parts]

    def compiled_modules(self) -> list[nn.Module]:
        """The parts that run one by one: head, encoder, decoder, the stages of the tail."""
        network = self.network
        # A stochastic encoder is asked for its distribution, not called.
        encoder = network.encoder.children() if isinstance(network.encoder, GaussianEncoder) else [network.encoder]
        return [part for part in (network.head, *encoder, network.decoder, *network.tail) if part is not None]

    def _check_trained(self) -> None:
        reached = {"head", "encoder"} if self.student_outputs else set()
        if any(name in self.student_outputs for name in (*self.network.names, LOGITS)):
            reached |= {"quantizer", "decoder"}
        if any(name in self.student_outputs for name in (*self.network.names[1:], LOGITS)):
            reached.add("tail")
        learned_prior = isinstance(self.network.quantizer, EntropyBottleneck)
        if learned_prior and LIKELIHOODS not in self.student_outputs:
            reached.discard("quantizer")
        if idle := [name for name in self.trained_parts if name not in reached]:
            fix = "leave it out, or add a term behind it"
            if idle[0] == "quantizer" and learned_prior:
                fix = "only a rate teaches its prior: add a RateTerm, use method=entropic, or leave it out"
            raise ValueError(
                f"train={list(self.trained_parts)}: no term of {type(self).__name__} reaches the {idle[0]}, which "
                f"would learn nothing; {fix}"
            )

    def _matching(self, teacher: Teacher | None) -> Teacher | None:
        """Cut the teacher where it is compared, and hold its outputs against the student's."""
        if teacher is None:
            return None
        network = self.network
        sample = torch.randn(2, *network.image_shape, generator=torch.Generator().manual_seed(0))
        at = [name for name in network.names if name in self.teacher_outputs]
        try:
            stages = cut(teacher.network, at=at, sample=sample)
        except CutError as error:
            raise CutError(f"the teacher cannot be compared at {', '.join(at)}: {error}") from error
        with torch.no_grad(), evaluating(network), evaluating(stages):
            ours = network.features(sample, self.student_outputs)
            theirs = stages.features(sample, self.teacher_outputs)
        for name, value in theirs.items():
            if name in ours and ours[name].shape != value.shape:
                what, fix = f"feature at {name!r}", "a teacher of the same family and width, or another layer"
                if name == LOGITS:
                    what, fix = "logits", "a teacher that was trained on the same classes"
                raise ValueError(
                    f"the shape of the teacher's {what} is {tuple(value.shape[1:])}, of the student's "
                    f"{tuple(ours[name].shape[1:])}: they cannot be compared; take {fix}"
                )
        stages.to(memory_format=self.memory_format)
        return Teacher(stages, teacher.path, teacher.sha256)

    # --- frozen features --------------------------------------------------------------------------------------------

    def frozen_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the terms ask for and frozen parts make of images (B, C, H, W): head's output, teacher's."""
        found = {HEAD: cast(nn.Module, self.network.head)(images)} if self._freezes_head() else {}
        return found | {TEACHER + name: value for name, value in self._teach(images).items()}

    def frozen_sources(self) -> tuple[Sequence[nn.Module], Any]:
        """The head where it is frozen, the teacher where a term asks for it."""
        modules = [cast(nn.Module, self.network.head)] if self._freezes_head() else []
        modules += [self.teacher] if self.teacher_outputs else []
        return modules, [self.network.names, self.teacher_outputs, self._freezes_head()]

    def caches_images(self) -> bool:
        """A stored head output stands for the image."""
        return not self._freezes_head()

    def _freezes_head(self) -> bool:
        return self.network.head is not None and "head" not in self.trained_parts

    # --- widths -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Reseed, and draw the step's width where one network is trained for several."""
        super().on_train_batch_start(batch, batch_idx)
        if self.network.widths:
            self.network.set_bits(draw_width(self.network.widths, self.seed, self.current_epoch, batch_idx))

    def on_validation_epoch_start(self) -> None:
        """Validate at the width that the config names."""
        if self.network.widths:
            self.network.set_bits(cast(int, self.bits))

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Reseed, so that a noisy channel does the same to the same images."""
        self.reseed("evaluation", batch_idx)

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Reseed, so that a noisy channel does the same to the same images."""
        self.reseed("evaluation", batch_idx)

    # --- bytes ------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Refuse to measure codes whose range nobody has measured.

        Raises:
            ValueError: The quantiser's range still waits for its first training batch.
        """
        check_measured(self.network.quantizer)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure accuracy and the bytes sent on a test batch, through the bytes; the encoder runs once."""
        images, labels = batch
        z = self.network.encode(images)
        for bits in (width for width in self.network.widths if width != self.bits):
            self.network.set_bits(bits)
            self._measure_width(bits, labels, *self.through_bytes(z)[:2])
        if self.network.widths:
            self.network.set_bits(cast(int, self.bits))
        logits, payloads, sent = self.through_bytes(z)
        self._measure_width(self.bits, labels, logits, payloads)
        self.measure_test(logits, labels)
        self.test_payload["payload_bytes"].update(self._lengths(payloads))
        self.test_payload["payload_zstd_bytes"].update(self._lengths(payloads, zstd_bytes))
        if isinstance(self.network.quantizer, EntropyBottleneck):
            self.test_payload["estimated_bytes"].update(self.network.quantizer.estimated_bits(sent["codes"]) / 8)

    def through_bytes(self, z: Tensor) -> tuple[Tensor, list[bytes], dict[str, Tensor]]:
        """Send a representation (B, *shape) through its bytes: logits (B, classes), payloads, and the tensors sent."""
        codec = self.network.codec
        sent = self.network.send(z, codec)
        payloads = codec.encode(sent)
        return self.network.receive(codec.decode(payloads)).float(), payloads, sent

    def _measure_width(self, bits: int | None, labels: Tensor, logits: Tensor, payloads: list[bytes]) -> None:
        if bits in self.network.widths:
            metrics = cast(nn.ModuleDict, self.test_widths[f"bits{bits}"])
            metrics["acc"].update(logits, labels)  # type: ignore[operator]
            metrics["payload_bytes"].update(self._lengths(payloads))  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        """Log accuracy, bytes and their ratios."""
        super().on_test_epoch_end()
        measured = self.test_payload.compute()
        self.test_payload.reset()
        sizes = self.network.sizes() | self._file_bytes()
        ratios: dict[str, Tensor] = {f"payload_to_{n}": measured["payload_bytes"] / size for n, size in sizes.items()}
        for width, metrics in self.test_widths.items():
            for name, metric in metrics.items():  # type: ignore[operator]
                measured[f"{width}/{name}"] = metric.compute()
                metric.reset()
        self.log_dict({f"test/{name}": value for name, value in (measured | ratios).items()}, sync_dist=True)

    def _lengths(self, payloads: Sequence[bytes], length: Any = len) -> Tensor:
        return torch.tensor([float(length(payload)) for payload in payloads], device=self.device)

    def _width_metrics(self) -> nn.ModuleDict:
        accuracy = MulticlassAccuracy(len(self.class_names), average="micro")
        return nn.ModuleDict({"acc": accuracy, "payload_bytes": MeanMetric()})

    def _file_bytes(self) -> dict[str, float]:
        data: Any = getattr(self.trainer, "datamodule", None)
        return {"file": data.image_file_bytes("test")} if hasattr(data, "image_file_bytes") else {}


def _union(names: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for group in names for name in group))


def _parts(train: Sequence[str], network: SplitNetwork) -> tuple[str, ...]:
    """Return the parts that ``train`` names, in the order in which they run."""
    if isinstance(train, str):
        raise ValueError(f"train is a list of parts, got the string {train!r}; write train=[{train}]")
    known = (*PARTS, "bottleneck")
    for name in train:
        if name not in known:
            raise ValueError(f"train names {name!r}, but the parts are {', '.join(known)}." + did_you_mean(name, known))
    wanted = {part for name in train for part in (BOTTLENECK if name == "bottleneck" else (name,))}
    parts = tuple(name for name in PARTS if name in wanted and getattr(network, name) is not None)
    learning = [name for name in parts if next(getattr(network, name).parameters(), None) is not None]
    if not learning:
        raise ValueError(f"train={list(train)} trains nothing: none of these parts has parameters in this network")
    return parts
