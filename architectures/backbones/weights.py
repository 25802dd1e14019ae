"""Read a checkpoint file safely and load it into a network, or say in one error what does not fit."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cleave.architectures.backbones.surgery import find_classifier
from cleave.architectures.kinds import kind_of

logger = logging.getLogger(__name__)

#: Keys under which a checkpoint may hold its state dict; the first one found is taken.
STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "network",
    "net",
    "model_ema",
    "state_dict_ema",
)
LISTED = 8  # names shown of each kind of mismatch; a list of hundreds hides what is wrong


class WeightsError(ValueError):
    """Weights that cannot be had, read, or that do not fit the network."""


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What was done to make a checkpoint fit.

    Attributes:
        path: The file.
        classifier: Parameters of the classifier that were left at their initial values, because the file has another
            number of classes.
        summed: The input convolutions whose RGB kernels were summed for grey images.
        ignored: Keys of the file that were left out as asked.
    """

    path: Path
    classifier: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def load_weights(
    network: nn.Module,
    path: str | Path,
    *,
    classifier: str | Sequence[str] | None = None,
    architecture: str | None = None,
    ignore: Sequence[str] = (),
    rename: Callable[[str], str] | None = None,
) -> LoadReport:
    """Load a checkpoint file into a network; only the classifier and the input's colours may differ.

    The file is a state dict alone or under one of :data:`STATE_KEYS`; prefixes that all its keys share (``module.``,
    ``model.``, ``network.``, ``_orig_mod.`` …) and the network's do not are stripped. A classifier of another class
    count keeps the network's initial values, and the kernels of an RGB input convolution are summed when the network
    takes grey images (the response to a grey picture stays the same). Both are logged and reported. Everything else
    must fit: missing, unexpected and misshapen parameters raise one error. A network is to be thrown away after an
    error, since a part of the weights may have been loaded.

    Args:
        network: Network to load into, in place.
        path: A ``torch.save`` file, read with ``weights_only=True``, or a ``.safetensors`` file.
        classifier: Module name or names of the classifier; by default what
            :func:`cleave.architectures.backbones.surgery.find_classifier` finds.
        architecture: How error messages call the network; by default its class name.
        ignore: Prefixes of keys to leave out, such as auxiliary heads the network was built without.
        rename: Translates a key of the file, its prefix stripped, into the network's.

    Returns:
        What was adapted.

    Raises:
        WeightsError: The file is missing, cannot be read as a checkpoint, or holds another architecture.
    """
    path = Path(path)
    architecture = architecture or type(network).__name__
    expected = network.state_dict()
    content = read_checkpoint(path)
    state, metadata = strip_prefix(*find_state(content, path), expected)
    ignored = tuple(key for key in state if key.startswith(tuple(ignore)))
    state = {rename(key) if rename else key: value for key, value in state.items() if key not in ignored}

    names = (find_classifier(network),) if classifier is None else classifier
    reset = _other_classes(state, expected, (names,) if isinstance(names, str) else names)
    summed = _sum_colours(state, network)
    loadable = {key: value for key, value in state.items() if key not in reset}
    missing, unexpected, wrong = _load(network, loadable, metadata, f"{path} does not fit {architecture}")
    try:
        _refuse_mismatch(path, architecture, [key for key in missing if key not in reset], unexpected, wrong)
    except WeightsError as error:
        if (kind := _kind_of_ours(content)) is None:
            raise
        raise WeightsError(
            f"{path} is {kind} checkpoint of Cleave's; give it by base.ckpt_path=FILE, without weights ({error})"
        ) from error
    if reset:
        logger.info("%s: classifier %s has another class count and was initialised anew", path, ", ".join(reset))
    if summed:
        logger.info("%s: the RGB kernels of %s were summed for grey images", path, ", ".join(summed))
    return LoadReport(path, reset, summed, ignored)


def _kind_of_ours(content: Any) -> str | None:
    """Say what kind a checkpoint of train.py is of, ``None`` for any other file."""
    metadata = content.get("cleave") if isinstance(content, Mapping) else None
    config = metadata.get("config") if isinstance(metadata, Mapping) else None
    return kind_of(config) if isinstance(config, Mapping) and {"split", "exits"} <= config.keys() else None


def read_checkpoint(path: Path) -> Any:
    """Read a ``.safetensors`` file or a ``torch.save`` file without running any code it may contain.

    Raises:
        WeightsError: The file is missing, truncated, not a checkpoint, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}" + (" (it is a folder)" if path.is_dir() else ""))
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            # torch announces a TorchScript archive with a warning before it refuses it.
            warnings.filterwarnings("ignore", message=".*TorchScript archive.*", category=UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is not a plain checkpoint: it is corrupt, no checkpoint at all, or holds Python objects, which "
            f"are refused because loading them can run code. If you trust its source, save the state dict alone "
            f"with torch.save(network.state_dict(), FILE). ({_first_line(error)})"
        ) from error
    except Exception as error:  # damaged bytes raise anything from EOFError and KeyError to RuntimeError
        raise WeightsError(
            f"{path} cannot be read as a checkpoint ({path.stat().st_size} bytes; truncated or another format): "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def find_state(checkpoint: Any, path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Find the state dict in a checkpoint: itself, or under one of :data:`STATE_KEYS`.

    Returns:
        The state dict and its version metadata by module name (empty where the file has none).

    Raises:
        WeightsError: There is none.
    """
    candidates = [checkpoint]
    if isinstance(checkpoint, Mapping):
        candidates += [checkpoint[key] for key in STATE_KEYS if key in checkpoint]
    for candidate in candidates:
        if (
            isinstance(candidate, Mapping)
            and candidate
            and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items())
        ):
            return dict(candidate), getattr(candidate, "_metadata", {})
    held = f"a {type(checkpoint).__name__}"
    if isinstance(checkpoint, Mapping):
        held = f"the keys {_bounded([str(key) for key in checkpoint])}"
    raise WeightsError(
        f"{path} holds no state dict: looked for tensors by name, alone or under {', '.join(STATE_KEYS)}; found {held}"
    )


def strip_prefix(
    state: Mapping[str, Tensor], metadata: Mapping[str, Any], expected: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Strip the leading names that all keys share and that the network's own keys do not have.

    Args:
        state: State dict of a file.
        metadata: Its version metadata by module name.
        expected: Keys of the network.

    Returns:
        State dict and metadata without the prefix.
    """
    wanted = set(expected)
    prefix = ""
    while not any(key.removeprefix(prefix) in wanted for key in state):
        heads = {head for head, dot, _ in (key.removeprefix(prefix).partition(".") for key in state) if dot}
        plain = [key for key in state if "." not in key.removeprefix(prefix)]
        if len(heads) != 1 or plain:
            return dict(state), dict(metadata)
        prefix += heads.pop() + "."
    stripped = {key.removeprefix(prefix): value for key, value in state.items()}
    inner = {f"{name}.".removeprefix(prefix).rstrip("."): v for name, v in metadata.items()}
    return stripped, inner


def _other_classes(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], classifier: Sequence[str | None]
) -> tuple[str, ...]:
    """Keys of the classifier that differ from the network's in the number of classes and in nothing else."""
    return tuple(
        key
        for key, value in state.items()
        if key.rpartition(".")[0] in classifier
        and key in expected
        and value.ndim == expected[key].ndim > 0
        and value.shape[0] != expected[key].shape[0]
        and value.shape[1:] == expected[key].shape[1:]
    )


def _sum_colours(state: dict[str, Tensor], network: nn.Module) -> tuple[str, ...]:
    """Sum the RGB kernels in place of convolutions that read a grey image: theirs alone have one channel in all."""
    summed = []
    for name, module in network.named_modules():
        value = state.get(f"{name}.weight")
        if value is None or not isinstance(module, nn.Conv2d) or module.in_channels != 1:
            continue
        out_channels, _, *kernel = module.weight.shape
        if value.shape == (out_channels, 3, *kernel):
            state[f"{name}.weight"] = value.sum(dim=1, keepdim=True)
            summed.append(name)
    return tuple(summed)


def _load(
    network: nn.Module, state: Mapping[str, Tensor], metadata: Mapping[str, Any], complaint: str
) -> tuple[list[str], list[str], list[str]]:
    """Load what fits; return the names that are missing, unexpected, and of the wrong shape (with both shapes)."""
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    wrong = {
        key: f"{key}: file {tuple(value.shape)}, network {shapes[key]}"
        for key, value in state.items()
        if key in shapes and tuple(value.shape) != shapes[key]
    }
    fitting = {key: value for key, value in state.items() if key not in wrong}
    try:
        result = network.load_state_dict(_with_metadata(fitting, metadata, network), strict=False)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{complaint}: {error}") from error
    # The counter is read only by a BatchNorm without momentum; files of old versions lack it.
    missing = [key for key in result.missing_keys if key not in wrong and not key.endswith("num_batches_tracked")]
    return missing, list(result.unexpected_keys), list(wrong.values())


def _with_metadata(
    state: Mapping[str, Tensor], metadata: Mapping[str, Any], network: nn.Module
) -> OrderedDict[str, Tensor]:
    """Attach version metadata, which networks read to translate the names of old files."""
    versioned = OrderedDict(state)
    # Without any, the network itself counts as current (MNASNet asks for its version), its modules as old.
    versioned._metadata = metadata or {"": {"version": network._version}}  # type: ignore[attr-defined]
    return versioned


def _refuse_mismatch(
    path: Path, architecture: str, missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str]
) -> None:
    """Raise one error that lists every kind of mismatch; do nothing where there is none."""
    kinds = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    parts = [f"{len(names)} {kind}: {_bounded(names)}" for kind, names in kinds.items() if names]
    if parts:
        raise WeightsError(f"{path} is not a checkpoint of {architecture}; parameters\n  " + "\n  ".join(parts))


def _bounded(names: Sequence[str]) -> str:
    """Join the first few names and count the rest."""
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _first_line(error: Exception) -> str:
    """First line of an error's message, cut to a readable length."""
    return (str(error).strip().splitlines() or ["no details"])[0][:200]
