"""Checkpoints of train.py, and the networks that they hold."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cleave.architectures import StagedNetwork
from cleave.architectures.described import GROUPS, network_from
from cleave.architectures.inserts.finite import check_learned
from cleave.architectures.kinds import kind_of, kind_words
from cleave.deployment import ImageInput
from cleave.lightning_modules.callbacks.metadata import KEY, read_metadata
from cleave.lightning_modules.checkpoints.trust import check_targets

MANIFEST = "manifest.json"
_RUNS_BUNDLES = "cleave.deployment.load_bundle and infer.py bundle=DIR run it"


class LoadedCheckpoint(NamedTuple):
    """A network rebuilt from a checkpoint, with what the checkpoint says of it.

    Attributes:
        network: The network in eval mode, on the CPU.
        image_input: How a picture becomes its input.
        class_names: Names of the classes in the order of the logits.
        config: The resolved config of the run, as plain containers.
        sha256: Of the file.
    """

    network: StagedNetwork
    image_input: ImageInput
    class_names: list[str]
    config: Mapping[str, Any]
    sha256: str


def load_checkpoint(
    path: str | Path, *, trusted: bool = False, cuts: Sequence[str] = (), key: str = "trust_checkpoint"
) -> LoadedCheckpoint:
    """Rebuild the network of a checkpoint of ``train.py``, with neither its teacher nor pretrained files.

    Args:
        path: The checkpoint.
        trusted: Whether the file may name code of the user's own, such as a custom backbone, which is then run.
        cuts: Further layers whose features are outputs; no further cut renames a weight.
        key: The setting by which a command's user says ``trusted``, for the message.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is no checkpoint of Cleave, names code that is not Cleave's, or does not fit
            its own config.

    Example:
        >>> loaded = load_checkpoint("logs/train/runs/…/checkpoints/best.ckpt")  # doctest: +SKIP
        >>> loaded.network(loaded.image_input.normalize(images)).argmax(1)  # doctest: +SKIP
    """
    checkpoint = read_checkpoint(path)
    metadata = checkpoint[KEY]
    config, class_names = metadata["config"], list(metadata["class_names"])
    check_targets({part: config.get(part) for part in GROUPS}, str(path), trusted, key)
    image_input = ImageInput.from_dict(metadata["image_input"])
    described = {**config, "cuts": [*config.get("cuts", []), *cuts]}
    network = network_from(described, len(class_names), image_input)
    load_strictly(network.eval(), network_state(checkpoint), f"the checkpoint {path}")
    return LoadedCheckpoint(network, image_input, class_names, config, file_sha256(path))


def check_kind(checkpoint: Mapping[str, Any], network: StagedNetwork, path: str | Path) -> None:
    """Raise a ValueError unless a checkpoint is of the kind of a network: split or not, with early exits or without."""
    theirs, ours = kind_of(checkpoint[KEY]["config"]), kind_words(bool(network.bottlenecks), bool(network.exits))
    if theirs != ours:
        raise ValueError(f"{path} is {theirs} checkpoint, but the network of this run is {ours} one")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ``train.py`` with ``weights_only=True``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged, or was not written by this version of Cleave.
    """
    if not Path(path).is_file():
        if Path(path, MANIFEST).is_file():
            raise ValueError(f"{path} is a bundle, which no checkpoint can be read from; {_RUNS_BUNDLES}")
        raise FileNotFoundError(f"there is no checkpoint at {path}; train.py prints the path of what it saved")
    if found := other_kind(Path(path)):
        raise ValueError(f"{path} is {found}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        whole = zipfile.is_zipfile(path)
        raise ValueError(
            f"the checkpoint {path} cannot be read: "
            + (f"it holds what weights_only=True refuses ({error})" if whole else "it is truncated or no checkpoint")
            + "; use another save, such as last.ckpt beside it"
        ) from error
    read_metadata(checkpoint, str(path))
    return checkpoint


def other_kind(path: Path) -> str | None:
    """Say what a file is that is no checkpoint, and where it goes; ``None`` where it may be one."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if path.suffix == ".safetensors":
        return "a file of weights alone, which goes in by backbone.weights=FILE"
    if start[:1] in (b"{", b"[") or path.suffix in (".yaml", ".yml", ".csv"):
        return (
            "a text file; checkpoints end in .ckpt, and a policy of exits_report.py goes in by exits.policy_file=FILE"
        )
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return f"a TorchScript file, as bundles hold them; {_RUNS_BUNDLES}"
    return None


def network_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the network's part of a checkpoint's state dict, under the network's own names."""
    prefix = "network."
    return {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}


def load_strictly(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        NumberError: A weight or a running statistic is not finite.
        ValueError: Names or shapes differ; the message lists them.
    """
    own = network.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(
            f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
            for k in own.keys() & state.keys()
            if own[k].shape != state[k].shape
        ),
    }
    if any(problems.values()):
        told = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            for what, names in problems.items()
            if names
        )
        raise ValueError(f"{source} is of another architecture than {type(network).__name__}: {told}")
    network.load_state_dict(state)
    check_learned(network, source)


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
