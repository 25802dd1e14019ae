"""Stand-ins for the values of a forward that is recorded, and what its steps do to each other."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx

_IN_PLACE = {
    getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
}
_IN_PLACE |= {operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.setitem}


class StageProxy(fx.Proxy):
    """A value of a forward that is recorded, with what is assigned to its items and done to it in place."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Record the assignment."""
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class StateProxy(StageProxy):
    """A parameter or buffer, whose shape a forward may look at."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor = tensor
        self.shape, self.ndim = tensor.shape, tensor.ndim
        self.dim, self.numel, self.nelement = tensor.dim, tensor.numel, tensor.nelement

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one length of it."""
        return self.tensor.shape if dim is None else self.tensor.shape[dim]

    def __len__(self) -> int:
        return len(self.tensor)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))  # type: ignore[index]


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    # fx records ``x += y`` as ``x = x + y``, which would leave the buffer as it was.
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in _IN_PLACE - {operator.setitem}:
    setattr(StateProxy, f"__{_function.__name__}__", _in_place(_function))


def written_by(node: fx.Node) -> fx.Node | None:
    """Return the node whose value a step alters in place, or ``None``."""
    if not node.op.startswith("call_") or node.op == "call_module":
        return None
    written = node.kwargs.get("out")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if node.args and (node.target in _IN_PLACE or named or node.kwargs.get("inplace") is True):
        written = node.args[0]
    return written if isinstance(written, fx.Node) else None


def origin(node: fx.Node) -> str:
    """Say what a number or a truth value follows from."""
    todo, seen, size = [node], set(), False
    while todo:
        each = todo.pop()
        if each.meta.get("draw"):
            return "a random draw"
        size = size or each.target == "size" or (each.target is getattr and each.args[1] in ("shape", "ndim"))
        if each not in seen:
            seen.add(each)
            todo.extend(each.all_input_nodes)
    return "the size of a tensor" if size else "the values of a tensor"
