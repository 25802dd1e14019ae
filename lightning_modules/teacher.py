"""A frozen teacher that travels beside a task without becoming part of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(eq=False)
class Teacher:
    """A teacher network, held where neither ``state_dict`` nor a deep copy of the task (EMA's) can see it.

    Lightning and torch find sub-modules by attribute; inside this plain object the teacher stays out of the task's
    parameters, checkpoints and averaged copies. It is frozen for good: no gradients, eval mode.

    Args:
        network: The teacher; frozen in place.
        path: Checkpoint it came from, empty where it is the pretrained backbone itself.
        sha256: Digest of that file, recorded in the student's checkpoints and compared when a run resumes.
    """

    network: nn.Module
    path: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        self.network.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Share instead of copying: a frozen network has no state of its own to part from."""
        return self

    def to(self, device: torch.device) -> None:
        """Move the teacher to the device of its student."""
        self.network.to(device)

    def record(self) -> dict[str, str]:
        """What a checkpoint says of the teacher."""
        return {"path": self.path, "sha256": self.sha256}

    def check(self, recorded: dict[str, str]) -> None:
        """Compare with what the checkpoint of an interrupted run recorded.

        Raises:
            ValueError: The run was started with another teacher.
        """
        if recorded["sha256"] != self.sha256:
            raise ValueError(
                f"this run was trained with the teacher {recorded['path'] or 'of the pretrained backbone'!r} "
                f"(sha256 {recorded['sha256'][:12] or 'none'}…) and cannot resume with "
                f"{self.path or 'the pretrained backbone'!r} (sha256 {self.sha256[:12] or 'none'}…); "
                "give the same file as teacher.ckpt_path"
            )
