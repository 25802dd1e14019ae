"""Finding code that steers by the values of its input, which a trace would freeze at those of the example."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TORCH = str(Path(torch.__file__).parent)
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


def data_dependent_lines(module: nn.Module, inputs: Sequence[Tensor]) -> list[str]:
    """Run a module once and list the places where Python reads a value computed from the inputs.

    ``if x.mean() > 0``, ``int(levels)`` or ``x.max().item()`` are such places. Reading shapes, parameters and constants
    is harmless and not listed.

    Args:
        module: Any module; it runs without gradients, in the mode it is in.
        inputs: Its positional inputs.

    Returns:
        ``file:line: code`` of each place, without repetition; empty if a trace is faithful.
    """
    follow = _Follow(inputs)
    with torch.no_grad(), follow:
        module(*inputs)
    return list(dict.fromkeys(follow.places))


class _Follow(TorchDispatchMode):
    """Follows what is computed from the inputs from operator to operator, storage by storage."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.places: list[str] = []
        self._storages: set[int] = set()
        self._alive: list[Tensor] = []
        self._mark(inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        depends = any(_storage(leaf) in self._storages for leaf in tree_leaves((args, kwargs)) if _is_plain(leaf))
        if depends and func in _READS:
            self.places.append(_caller())
        result = func(*args, **kwargs)
        if depends:
            written = [
                args[i] for i, argument in enumerate(func._schema.arguments) if argument.is_write and i < len(args)
            ]
            self._mark(tree_leaves((result, written)))
        return result

    def _mark(self, values: Iterable[Any]) -> None:
        for value in values:
            if _is_plain(value):
                self._storages.add(_storage(value))
                # A freed storage's address would be given to another one.
                self._alive.append(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _caller() -> str:
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_TORCH) and frame.filename != __file__:
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "unknown place"
