"""Saving and loading partitions as TorchScript: the only file that calls ``torch.jit``.

PyTorch marks TorchScript as deprecated, yet it is what device and server runtimes load today, so its deprecation
warnings are silenced here, around the calls themselves, and nowhere else. Python can silence warnings for a whole
process only, so this happens while a bundle is written, never while one is loaded or runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import autocast_off
from .archive import check_archive
from .files import BundleError
from .writing.functions import inlined

FORMAT = "torchscript"
ScriptError = torch.jit.Error
_DEPRECATION = r"`torch\.jit\.\w+` is deprecated"


@contextlib.contextmanager
def _deprecation_silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", _DEPRECATION, category)
        yield


def save_torchscript(module: nn.Module, example_inputs: Sequence[Tensor], path: str | os.PathLike[str]) -> None:
    """Trace a module on example inputs and save the trace.

    A trace records what ran, once: whether it also holds for other batches is the parity gate's to say. The tracer's
    own warnings are not shown, because it cannot tell a shape's value, which is fixed in a bundle, from an image's.

    Args:
        module: In eval mode, taking its inputs by position.
        example_inputs: Inputs with a batch of at least 2, which an accidental squeeze does not survive.
        path: File to write.

    Raises:
        ValueError: Part of the module is in training mode.
        RuntimeError: The module cannot be traced, for one because it leaves torch for NumPy or a list on the way.
    """
    if training := [name or type(part).__name__ for name, part in module.named_modules() if part.training]:
        raise ValueError(f"only a module in eval mode is saved; in training mode are {', '.join(training[:5])}")
    # Recorded, not raised: raising in the middle of a trace, in C++, kills it with an unrelated message.
    recorded = warnings.catch_warnings(record=True)
    with recorded as caught, torch.no_grad(), inlined(), autocast_off(torch.device("cpu")):
        warnings.simplefilter("always")
        traced = torch.jit.trace(module, tuple(example_inputs), check_trace=False)
    for warning in caught:
        text = str(warning.message)
        if re.search(r"Converting a tensor to a (NumPy array|Python list)", text):
            raise RuntimeError(f"it would freeze what it computes there: {text}")
        if not re.match(_DEPRECATION, text) and not issubclass(warning.category, torch.jit.TracerWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    with _deprecation_silenced():
        torch.jit.save(traced, os.fspath(path))


def load_torchscript(content: bytes, device: torch.device | str = "cpu", what: str = "the file") -> nn.Module:
    """Load a trace, in eval mode and without gradients.

    Args:
        content: Bytes of the file, so that what was verified is what is loaded.
        device: Where to put it.
        what: Whose file it is, for messages.

    Raises:
        BundleError: The bytes are no TorchScript, damaged, of a version that this PyTorch cannot read, or would unpack
            to more than they are.
    """
    device = torch.device(device)
    check_archive(content, what)
    try:
        # torch.jit.load without its deprecation warning, which could be silenced for the whole process only.
        reader: Any = torch._C.import_ir_module_from_buffer
        found = reader(torch._C.CompilationUnit(), content, device, {}, False)
        module = torch.jit._recursive.wrap_cpp_module(found)
        if device.type != "cpu":
            _replace_devices(module, device)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module.eval()
    except torch.OutOfMemoryError:
        raise
    # PyTorch's reader answers broken files with almost any exception: RuntimeError, IndexError, UnicodeDecodeError, …
    except Exception as error:
        raise BundleError(f"{what} cannot be loaded by torch {torch.__version__}: {error}") from error


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is TorchScript already."""
    return isinstance(module, torch.jit.ScriptModule)


def _replace_devices(module: Any, device: torch.device) -> None:
    """Let tensors that are created on the way follow the module: a trace made on the CPU names the CPU for them."""
    # The graph must outlive its node.
    graph: Any = torch._C.parse_ir(f'graph():\n  %d : Device = prim::Constant[value="{device}"]()\n  return (%d)')
    (wanted,) = graph.findAllNodes("prim::Constant")
    for part in module.modules():
        # Containers without a forward have no graph.
        own = getattr(part, "graph", None) if hasattr(part, "forward") else None
        for node in own.findAllNodes("prim::Constant") if own is not None else ():
            if _is_device(node):
                node.copyAttributes(wanted)


def _is_device(node: Any) -> bool:
    return node.output().type().kind() == "DeviceObjType"
