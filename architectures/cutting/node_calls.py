"""The nodes of a backbone as calls, each alone, for measuring them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from cleave.architectures.cutting.contexts import within
from cleave.architectures.cutting.cut_points import checked_trace
from cleave.architectures.cutting.reference import Reference
from cleave.architectures.cutting.slicing import Run
from cleave.architectures.cutting.tracing import Trace, preserved


def visit_nodes(
    backbone: nn.Module, sample: Tensor, visit: Callable[[str, Callable[[], Any]], None], depth: int | None = None
) -> None:
    """Run a backbone's graph in eval mode and show each of its nodes as a call that can be repeated.

    Args:
        backbone: Network whose ``forward`` takes one tensor, a batch.
        sample: A batch (B, …) on the backbone's device.
        visit: Takes a node's name as :func:`trace_graph` lists it, and a call that computes it from its inputs. What a
            call alters in place is a copy.
        depth: As given to :func:`trace_graph`.

    Raises:
        CutError: The backbone cannot be traced at this depth, or does not run on the sample.
    """
    with preserved(backbone) as rewind:
        traced = checked_trace(backbone, Reference(backbone, sample[:1], rewind), depth)[False]
        rewind()
        for module in backbone.modules():
            module.training = False
        with torch.no_grad():
            _Visiting(backbone, traced, visit).run(sample.clone())


class _Visiting(Run):
    """Runs a graph and shows each node before its value goes on."""

    def __init__(self, backbone: nn.Module, traced: Trace, visit: Callable[[str, Callable[[], Any]], None]) -> None:
        super().__init__(backbone, graph=traced.graph)
        self.traced, self.visit = traced, visit

    def run_node(self, n: fx.Node) -> Any:
        """Show a node, then run it."""
        if n.op.startswith("call") and n not in self.traced.constant:
            args, kwargs = tree_map(_copied, self.fetch_args_kwargs_from_env(n))
            call = getattr(self, n.op)

            def compute() -> Any:
                with within(n.meta.get("context", ())):
                    return call(n.target, args, kwargs)

            self.visit(self.traced.names[n], compute)
        return super().run_node(n)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value
