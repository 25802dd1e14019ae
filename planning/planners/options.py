"""What every planner is told beside the network, the machines and the link."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cleave.architectures.naming import did_you_mean, whole_number
from cleave.planning.graphs.layer_graph import LIMIT
from cleave.planning.profiles.checks import of_type, positive

OBJECTIVES = ("latency", "throughput", "energy", "bytes")
# JPEG: mean bytes of an image in table 2 of Matsubara, Levorato and Restuccia, "Split Computing and Early Exiting for
# Deep Learning Applications: Survey and Research Challenges", ACM Computing Surveys 2022, at 1 KB = 1000 bytes.
IMAGE_CODECS = {"jpeg_imagenet": 44_770, "jpeg_cifar10": 1_790, "jpeg_mnist": 966}
VALUE_BYTES = {"float32": 4, "uint8": 1}


@dataclass(frozen=True)
class PlanOptions:
    """Options of all planners.

    Attributes:
        bits: Bits of each number that is sent of a feature, 1 to 32; 32 as published. What a planner gains by its bits
            and by its cut can so be told apart.
        image: How images are sent: ``float32``, ``uint8``, the mean JPEG of a data set (``jpeg_imagenet``,
            ``jpeg_cifar10``, ``jpeg_mnist``), or a number of bytes.
        objective: What :func:`optimum` and :func:`neurosurgeon` optimise: ``latency``, ``throughput``, ``energy`` or
            ``bytes``.
        answer: Bytes of each output that comes back; ``None``: those of its numbers in float32. 0 leaves the way back
            out, as the published planners do.
        limit: The most closed sets to enumerate.
        exact: Whether a planner that would enumerate must; beyond the limit it is then refused.
        jobs: Tasks that :func:`jps` schedules together.

    Raises:
        ValueError: One of them is out of its range; the message names it.
    """

    bits: int = 32
    image: str | float = "uint8"
    objective: str = "latency"
    answer: int | None = None
    limit: int = LIMIT
    exact: bool = False
    jobs: int = 16

    def __post_init__(self) -> None:
        if whole_number("bits", self.bits) > 32:
            raise ValueError(f"bits must be a whole number of 1 to 32, got {self.bits!r}")
        if self.objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ValueError(
                f"objective must be one of {known}; got {self.objective!r}."
                f"{did_you_mean(str(self.objective), OBJECTIVES)}"
            )
        if isinstance(self.image, str):
            if self.image not in (known_images := (*VALUE_BYTES, *IMAGE_CODECS)):
                raise ValueError(
                    f"image must be a number of bytes or one of {', '.join(known_images)}; got {self.image!r}."
                    f"{did_you_mean(self.image, known_images)}"
                )
        else:
            positive("image", self.image, "bytes of an image, or the name of a codec")
        if self.answer is not None:
            whole_number("answer", self.answer, least=0)
        of_type("exact", self.exact, bool, "true or false")
        whole_number("limit", self.limit)
        whole_number("jobs", self.jobs)

    def image_bytes(self, values: int) -> int:
        """Return the bytes of an image of some numbers.

        Example:
            >>> PlanOptions().image_bytes(150_528), PlanOptions(image="jpeg_imagenet").image_bytes(150_528)
            (150528, 44770)
        """
        if isinstance(self.image, str):
            return IMAGE_CODECS[self.image] if self.image in IMAGE_CODECS else VALUE_BYTES[self.image] * values
        return math.ceil(self.image)

    def value_bytes(self, count: int) -> int:
        """Return the bytes of some numbers of a feature, packed at ``bits`` each."""
        return -(-count * self.bits // 8)
