"""Running a bundle's route in one process, through the very bytes that would go over a network."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ..bundle.files import BundleError
from ..bundle.loading import Bundle
from ..bundle.signatures import BEFORE, EXIT_LOGITS, part_arguments
from ..codecs.codec import Codec
from ..codecs.packing import CodecError
from ..exits.early_exit import leave_early
from ..exits.policy import ExitPolicy
from ..exits.specs import check_policy, is_local
from .preprocess import open_image

_SAMPLE = "sample"


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a batch of B samples, and what it took.

    Args:
        logits: float32 (B, classes), on the CPU.
        payloads: For each edge of the route, one payload per sample; empty for an unsplit network. Nothing is sent,
            ``b""``, of a sample that left before the edge, and on an edge inside one placement.
        part_seconds: Wall-clock seconds of each partition for the whole batch, by name, in the order of the route; 0
            for one that no sample reached.
        encode_seconds: Seconds from tensors to bytes, for each edge.
        decode_seconds: Seconds from bytes to tensors, for each edge.
        exits: Which exit each sample left at, int64 (B,), from 0 in the order of the manifest's exits; ``None`` for a
            network without early exits.
    """

    logits: Tensor
    payloads: list[list[bytes]]
    part_seconds: dict[str, float]
    encode_seconds: list[float]
    decode_seconds: list[float]
    exits: Tensor | None = None

    @property
    def payload_bytes(self) -> list[int]:
        """Bytes on the wire of each sample, over all edges."""
        return [sum(len(edge[i]) for edge in self.payloads) for i in range(len(self.logits))]


class Pipeline:
    """All partitions of a bundle one after another: device part, bytes, server part.

    At early exits samples leave as the policy says; only those that go on are encoded and sent.

    Args:
        bundle: A loaded bundle.
        bits: Width of the codes on every edge that has codes, 2 to 16; ``None`` keeps what the bundle says.
        policy: Another exit policy than the bundle's.

    Attributes:
        codecs: One for each edge of the route.
        local: For each edge, whether it stays inside one placement, where tensors are handed over and nothing is sent.
        policy: Who decides at the exits, or ``None``.

    Raises:
        ValueError: ``bits`` is out of range, or no edge has codes; or the policy does not fit the bundle's exits.

    Example:
        >>> pipeline = Pipeline(load_bundle("bundle"), bits=4)  # doctest: +SKIP
        >>> pipeline.run_files(["cat.jpg"]).logits.argmax(1)  # doctest: +SKIP
    """

    def __init__(self, bundle: Bundle, bits: int | None = None, policy: ExitPolicy | None = None) -> None:
        self.bundle = bundle
        manifest = bundle.manifest
        self.codecs: list[Codec] = list(manifest.codecs)
        if bits is not None:
            if not self.codecs:
                raise CodecError(f"bits={bits}: this network is not split, so it sends no codes")
            some = any(codec.levels for codec in self.codecs)
            self.codecs = [codec.with_bits(bits) if codec.levels or not some else codec for codec in self.codecs]
        if policy is not None and not manifest.exits:
            raise BundleError(f"the policy {policy.kind} has nothing to decide: this bundle has no exits")
        if policy is not None:
            check_policy(policy, manifest.exit_placements)
        self.policy = manifest.policy if policy is None else policy
        places = manifest.placements
        self.local = [is_local(*edge) for edge in zip(self.codecs, places, places[1:], strict=False)]

    @property
    def exit_macs(self) -> list[int]:
        """MACs per sample of leaving at each exit, by this policy."""
        manifest, classes = self.bundle.manifest, len(self.bundle.class_names)
        found, extra = [], 0
        for index, item in enumerate(manifest.exits):
            extra += self.policy.macs(index, classes) if self.policy is not None else 0
            extra -= manifest.policy.macs(index, classes) if manifest.policy is not None else 0
            found.append(item.macs + extra)
        return found

    def preprocess(self, path: str | os.PathLike[str]) -> Tensor:
        """Read an image file as the network takes it: uint8 (C, H, W).

        Raises:
            ImageError: It cannot be used; the message names the path.
        """
        return self.bundle.input(open_image(path))

    def run_files(self, paths: Sequence[str | os.PathLike[str]]) -> Result:
        """Run image files as one batch; see :meth:`run`."""
        if not paths:
            raise ValueError("paths is empty: name at least one image file")
        return self.run(torch.stack([self.preprocess(path) for path in paths]))

    def run(self, images: Tensor) -> Result:
        """Run a batch through every partition and every codec, each sample as far as it goes.

        Args:
            images: uint8 (B, C, H, W), as the bundle's ``input`` makes them; not normalised.

        Returns:
            Logits, payloads and times.

        Raises:
            BundleError: ``images`` has another dtype or shape.
            CodecError: A partition emits what its codec cannot send.
        """
        batch, edges = len(images), len(self.codecs)
        taken = Result(
            logits=torch.empty(0),
            payloads=[[b""] * batch for _ in range(edges)],
            part_seconds=dict.fromkeys(self.bundle.manifest.route, 0.0),
            encode_seconds=[0.0] * edges,
            decode_seconds=[0.0] * edges,
        )
        steps = [functools.partial(self._step, taken, index) for index in range(edges + 1)]
        carried = {"images": images, _SAMPLE: torch.arange(batch, device=self.bundle.device)}
        if self.policy is not None:
            logits, exits = leave_early(steps, carried, self.policy)
            return dataclasses.replace(taken, logits=logits.cpu(), exits=exits.cpu())
        logits = torch.empty(0)
        for step in steps:
            found, carried = step(carried)
            logits = logits if found is None else found
        known = self.bundle.manifest.exits
        return dataclasses.replace(
            taken, logits=logits.cpu(), exits=torch.full((batch,), len(known) - 1) if known else None
        )

    def _step(self, taken: Result, index: int, carried: dict[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Run a partition on the samples that are left, and note in ``taken`` what that took.

        What is carried on are the tensors that its codec would send: whoever leaves here is not encoded.
        """
        received = dict(carried)
        sample, before = received.pop(_SAMPLE), received.pop(BEFORE, None)
        if index > 0 and not self.local[index - 1]:
            received = self._send(taken, index - 1, received, sample.tolist())
        partition = self.bundle.partitions[self.bundle.manifest.route[index]]
        codec = self.codecs[index] if index < len(self.codecs) else None
        start = self._now()
        outputs = partition(part_arguments(partition.spec.signature.inputs, received, codec, before))
        taken.part_seconds[partition.spec.name] = self._now() - start
        if codec is None:
            return outputs["logits"], {}
        going = {name: outputs[name] for name in codec.sends} | {_SAMPLE: sample}
        before = outputs.get(EXIT_LOGITS, before)
        return outputs.get(EXIT_LOGITS), going if before is None else going | {BEFORE: before}

    def _send(self, taken: Result, edge: int, tensors: dict[str, Tensor], samples: list[int]) -> dict[str, Tensor]:
        """Send tensors over an edge and return what arrives."""
        codec = self.codecs[edge]
        start = self._now()
        payloads = codec.encode(tensors)
        taken.encode_seconds[edge] = self._now() - start
        for sample, payload in zip(samples, payloads, strict=True):
            taken.payloads[edge][sample] = payload
        start = self._now()
        received = codec.decode(payloads)
        taken.decode_seconds[edge] = self._now() - start
        return received

    def _now(self) -> float:
        """Seconds, after all that was queued on an accelerator has run."""
        if self.bundle.device.type == "cuda":
            torch.cuda.synchronize(self.bundle.device)
        return time.perf_counter()
