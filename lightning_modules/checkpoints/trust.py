"""What a checkpoint's config may build: it comes from a file, and Hydra would call whatever it names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cleave.architectures.described import located

# A class by its own name, at the end of lower-case modules; and the functions that make backbones, encoders and
# quantisers.
ROOMS = ("architectures", "datamodules", "lightning_modules", "losses")
OURS = re.compile(rf"cleave\.({'|'.join(ROOMS)})(\.[a-z]\w*)*\.[A-Z]\w*")
TORCH = re.compile(r"torch\.(optim(\.lr_scheduler)?\.[A-Z]\w*|nn\.[A-Z]\w*Loss)|torchvision\.datasets\.[A-Z]\w*")
FACTORIES = (
    "cleave.architectures.backbones.create_backbone",
    "cleave.architectures.build_bottleneck",
    "cleave.architectures.build_link",
    "cleave.architectures.entropy_codec",
    "cleave.architectures.uniform_codec",
)


def check_targets(config: Any, path: str, trusted: bool, key: str = "trust_checkpoint") -> None:
    """Refuse a checkpoint whose config names other code than Cleave and what torch has for optimizers, losses and data.

    ``weights_only=True`` keeps a file's tensors from running code; this keeps its config from it.

    Args:
        config: The checkpoint's config as plain containers.
        path: The checkpoint, for the message.
        trusted: The user vouches for the file, as a backbone of their own needs it.
        key: The setting by which they do.

    Raises:
        ValueError: A ``_target_`` is not allowed; the message names it.
    """
    if trusted:
        return
    if (target := next(foreign(config), None)) is not None:
        raise ValueError(
            f"the checkpoint {path} names {target}, which is not part of Cleave; if you know where the file comes "
            f"from, add {key}=true to run that code"
        )


def foreign(config: Any) -> Iterator[str]:
    """Every ``_target_`` in plain containers that is code of somebody else's."""
    for target in targets(config):
        known = target in FACTORIES or TORCH.fullmatch(target) or (OURS.fullmatch(target) and _is_ours(target))
        if not known:
            yield target


def targets(config: Any) -> Iterator[str]:
    """Every ``_target_`` in plain containers."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "_target_" and value is not None:
                yield str(value)
            yield from targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from targets(value)


def _is_ours(target: str) -> bool:
    """Whether a class was defined in a room: modules also hold names that they imported."""
    return str(getattr(located(target), "__module__", "")).startswith(tuple(f"cleave.{room}." for room in ROOMS))
