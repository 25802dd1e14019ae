"""Running a bundle's route in one process, through the very bytes that would go over a network."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..bundle.files import BundleError
from ..bundle.loading import Bundle
from ..codecs.codec import Codec
from ..codecs.packing import PayloadError
from ..exits.policy import ExitPolicy
from .gathering import Gathered, Result, named
from .inputs import read_input
from .side import Side
from .walk import follow


class Pipeline:
    """All sides of a bundle in one process: device part, bytes, server part.

    At early exits samples leave as the policy says; only those that go on are encoded and sent.

    Args:
        bundle: A loaded bundle, all placements of it.
        bits: Width of all codes, 2 to 16; ``None`` keeps what the bundle says.
        policy: Another exit policy than the bundle's.
        codecs: Other codecs by tensor, such as one that tries a lossy link.
        envelope: Whether payloads have an :class:`~cleave.deployment.Envelope`; ``None``: as the bundle says.

    Attributes:
        sides: The sides by placement.
        route: The bundle's route, at that width and with those codecs.
        crossings: All that is sent, by the names of :attr:`Result.payloads`.
        policy: Who decides at the exits, or ``None``.

    Raises:
        ValueError: ``bits`` is out of range, or no codes are sent; or the policy does not fit the bundle's exits.

    Example:
        >>> pipeline = Pipeline(load_bundle("bundle"), bits=4)  # doctest: +SKIP
        >>> pipeline.run_files(["cat.jpg"]).logits.argmax(1)  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: Bundle,
        bits: int | None = None,
        policy: ExitPolicy | None = None,
        codecs: Mapping[str, Codec] | None = None,
        envelope: bool | None = None,
    ) -> None:
        self.bundle = bundle
        placements = bundle.manifest.route.placements
        if missing := [placement for placement in placements if placement not in bundle.placements]:
            raise BundleError(f"a pipeline needs all placements, but {', '.join(missing)} was not loaded; take a Side")
        self.sides = {place: Side(bundle, place, bits, policy, codecs, envelope=envelope) for place in placements}
        first = self.sides[placements[0]]
        self.route, self.policy = first.route, first.policy
        self.crossings = named([*self.route.crossings, *first.states])

    @property
    def codecs(self) -> dict[str, Codec]:
        """The codec of each tensor of the network that is sent between placements."""
        return dict(self.route.codecs)

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
            BundleError: The network takes no images.
        """
        return read_input(self.bundle.input, path)

    def run_files(self, paths: Sequence[str | os.PathLike[str]]) -> Result:
        """Run image files as one batch; see :meth:`run`."""
        if not paths:
            raise ValueError("paths is empty: name at least one image file")
        return self.run(torch.stack([self.preprocess(path) for path in paths]))

    def run(self, inputs: Tensor) -> Result:
        """Run a batch through every partition and every codec, each sample as far as it goes.

        Args:
            inputs: (B, …), as the bundle's ``input`` makes them: images uint8 (B, C, H, W), not normalised.

        Returns:
            Outputs, payloads and times.

        Raises:
            BundleError: ``inputs`` is no tensor, or has another dtype or shape; or a partition cannot compute with it.
            PayloadError: Some samples could not be sent. The others' result is the error's ``outcome``, in which the
                outputs of those that failed are NaN, or 0 where they are whole numbers, and their exit is -1.
        """
        message = self.sides[self.route.entry].message(inputs)
        if not isinstance(inputs, Tensor):
            raise BundleError(f"a pipeline takes the network's input as a tensor, got {type(inputs).__name__}")
        gathered = Gathered(self.bundle.manifest, self.crossings, inputs.shape[0])
        request = object()
        steps = {
            place: gathered.step(functools.partial(side.run, request=request)) for place, side in self.sides.items()
        }
        try:
            # Once for the whole route: what leaves it is copied outside.
            with torch.inference_mode():
                follow(steps, self.route.entry, message)
        finally:
            for side in self.sides.values():
                side.forget(request)
        if gathered.errors:
            raise PayloadError(gathered.errors, gathered.result())
        return gathered.result()
