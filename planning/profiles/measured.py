"""Profiles measured here: every node of a network alone, and the network as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cleave.architectures import NodeGraph, visit_nodes
from cleave.architectures.modes import evaluating
from cleave.architectures.naming import whole_number
from cleave.planning.graphs.layer_graph import graph_digest
from cleave.planning.profiles.checks import positive
from cleave.planning.profiles.machine import Power
from cleave.planning.profiles.profile import Profile


def measure_profile(
    backbone: nn.Module,
    graph: NodeGraph,
    images: Tensor,
    *,
    machine: str = "this machine",
    threads: int | None = None,
    node_seconds: float = 0.02,
    depth: int | None = None,
    power: Power | None = None,
    clock: Callable[[], float] | None = None,
) -> Profile:
    """Measure the seconds per image of every node on this machine.

    Each node of the traced graph runs alone, warm, again and again for ``node_seconds``; the median of
    ``torch.utils.benchmark`` counts. Compare ``total``, their sum, with ``whole``, the seconds of the whole network:
    alone, nodes miss what is fused between them and pay for being started one by one.

    Args:
        backbone: The network, on the device to measure.
        graph: Its graph, of images of the same size.
        images: A batch (B, C, H, W) of the size that the machine will see.
        machine: What the profile calls the machine.
        threads: Threads of torch; ``None``: as many as it has now.
        node_seconds: How long each node is measured.
        depth: As given to :func:`cleave.architectures.trace_graph`.
        power: What the machine draws.
        clock: Reads seconds; ``None``: the wall clock, once a GPU is done. ``time.process_time`` counts a CPU's seconds
            of this process alone, where others keep it busy.

    Raises:
        CutError: The network cannot be traced.
        ValueError: An argument is out of its range, or the images are of another size than the graph's.
    """
    positive("node_seconds", node_seconds, "seconds of measuring each node")
    threads = torch.get_num_threads() if threads is None else whole_number("threads", threads)
    if tuple(images.shape[1:]) != graph.input_shape:
        raise ValueError(
            f"images are {tuple(images.shape[1:])}, the graph is one of {graph.input_shape}; trace it anew"
        )
    if not len(images):
        raise ValueError("images is an empty batch; give at least one image")
    from torch.utils.benchmark import Timer  # which looks for compilers, and is needed here alone

    own_clock: dict[str, Any] = {} if clock is None else {"timer": clock}
    batch, seconds = len(images), dict[str, float]()

    def median(call: Callable[[], Any]) -> float:
        timer = Timer("call()", globals={"call": call}, num_threads=threads, **own_clock)
        return timer.blocked_autorange(min_run_time=node_seconds).median / batch

    def visit(name: str, call: Callable[[], Any]) -> None:
        seconds[name] = median(call)

    with evaluating(backbone), torch.no_grad():
        visit_nodes(backbone, images, visit, depth)
        whole = median(lambda: backbone(images))
    # Numbers that follow from the input's size are no work of the network.
    own = {node.name: 0.0 if node.crosses == "folded" else seconds[node.name] for node in graph.nodes}
    return Profile(machine, graph_digest(graph), own, "measured", power, threads, batch, whole)
