"""Running a bundle's route in one process, through the very bytes that would go over a network."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from .bundle import Bundle
from .codec import Codec
from .manifest import part_arguments
from .packing import CodecError
from .preprocess import open_image


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a batch of B samples, and what it took.

    Args:
        logits: float32 (B, classes), on the CPU.
        payloads: For each edge of the route, one payload per sample; empty for an unsplit network.
        part_seconds: Wall-clock seconds of each partition for the whole batch, by name, in the order of the route.
        encode_seconds: Seconds from tensors to bytes, for each edge.
        decode_seconds: Seconds from bytes to tensors, for each edge.
    """

    logits: Tensor
    payloads: list[list[bytes]]
    part_seconds: dict[str, float]
    encode_seconds: list[float]
    decode_seconds: list[float]

    @property
    def payload_bytes(self) -> list[int]:
        """Bytes on the wire of each sample, over all edges."""
        return [sum(len(edge[i]) for edge in self.payloads) for i in range(len(self.logits))]


class Pipeline:
    """All partitions of a bundle one after another: device part, bytes, server part.

    Args:
        bundle: A loaded bundle.
        bits: Width of the codes on every edge that has codes, 2 to 16; ``None`` keeps what the bundle says.

    Raises:
        ValueError: ``bits`` is out of range, or no edge has codes.

    Example:
        >>> pipeline = Pipeline(load_bundle("bundle"), bits=4)  # doctest: +SKIP
        >>> pipeline.run_files(["cat.jpg"]).logits.argmax(1)  # doctest: +SKIP
    """

    def __init__(self, bundle: Bundle, bits: int | None = None) -> None:
        self.bundle = bundle
        self.codecs: list[Codec] = list(bundle.manifest.codecs)
        if bits is not None:
            if not self.codecs:
                raise CodecError(f"bits={bits}: this network is not split, so it sends no codes")
            self.codecs = [codec.with_bits(bits) for codec in self.codecs]

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
        """Run a batch through every partition and every codec.

        Args:
            images: uint8 (B, C, H, W), as the bundle's ``input`` makes them; not normalised.

        Returns:
            Logits, payloads and times.

        Raises:
            BundleError: ``images`` has another dtype or shape.
            CodecError: A partition emits what its codec cannot send.
        """
        received = {"images": images}
        part_seconds: dict[str, float] = {}
        payloads, encode_seconds, decode_seconds = [], [], []
        for index, name in enumerate(self.bundle.manifest.route):
            codec = self.codecs[index] if index < len(self.codecs) else None
            start = self._now()
            outputs = self.bundle.partitions[name](part_arguments(received, codec))
            part_seconds[name] = self._now() - start
            if codec is None:
                break
            start = self._now()
            payloads.append(codec.encode(outputs))
            encode_seconds.append(self._now() - start)
            start = self._now()
            received = codec.decode(payloads[-1])
            decode_seconds.append(self._now() - start)
        return Result(outputs["logits"].cpu(), payloads, part_seconds, encode_seconds, decode_seconds)

    def _now(self) -> float:
        """Seconds, after all that was queued on an accelerator has run."""
        if self.bundle.device.type == "cuda":
            torch.cuda.synchronize(self.bundle.device)
        return time.perf_counter()
