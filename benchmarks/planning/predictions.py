"""Predicted against measured: three cuts of two CIFAR networks, both sides run from a bundle by ``deployment``.

Three ways to know a node's time stand beside each other: a roofline of this machine, whose rates are measured by one
large matrix product and one large copy; a regression by layer type, fitted to other networks measured here; and the
measured profile of the network itself. All seconds are those that the CPU spent on this process (one thread), so that
others on the machine count less. The error is predicted over measured seconds of each side, less 1.

    python benchmarks/planning/predictions.py [--rounds 60]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.benchmark import Timer

from cleave.architectures import create_backbone, staged_network, trace_graph
from cleave.architectures.partitions import network_partitions
from cleave.deployment import OutputSpec, TensorInput, export_bundle
from cleave.planning import Machine, Profile, layer_graph, roofline
from cleave.planning.profiles.measured import measure_profile
from cleave.planning.profiles.regression import fit_regression, held_out_error
from cleave.reports.terminal import say, table
from cleave.scripts.assembly.starting.terminal import quiet

CUTS = ("layer1", "layer2", "layer3")
NETWORKS = {"resnet20": ("cifar", "resnet20"), "resnet18": ("torchvision", "resnet18")}
FITTED_TO = (("cifar", "resnet32"), ("cifar", "vgg11_bn"), ("torchvision", "resnet34"))
SHAPE = (3, 32, 32)
CLOCK = time.process_time
PASSES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    machine = this_machine()
    fitted = []
    for source, name in FITTED_TO:
        network = backbone(source, name)
        graph = trace_graph(network, torch.zeros(1, *SHAPE))
        fitted.append((graph, measure_profile(network, graph, torch.rand(1, *SHAPE), threads=1, clock=CLOCK)))
    held = held_out_error(fitted)
    say(
        f"Regression: {held.layers} layers held out; median relative error {held.median:.3f}, "
        f"of their sum {held.total:+.3f}"
    )
    regression = fit_regression(fitted)
    rows = []
    for label, (source, name) in NETWORKS.items():
        network = backbone(source, name)
        graph = trace_graph(network, torch.zeros(1, *SHAPE))
        # In turns, so that a slow moment of the machine meets both sides of the comparison.
        passes, deployed = [], dict[str, list[tuple[float, float]]]({cut: [] for cut in CUTS})
        for _ in range(PASSES):
            passes.append(measure_profile(network, graph, torch.rand(1, *SHAPE), threads=1, clock=CLOCK))
            for cut in CUTS:
                deployed[cut].append(as_deployed(network, cut, args.rounds))
        own = middle(passes)
        assert own.whole is not None
        say(f"{label}: nodes alone take {own.total / own.whole:.3f} of the whole network's time")
        ways = {"roofline": roofline(graph, machine), "regression": regression.predict(graph), "measured": own}
        for cut in CUTS:
            measured = [statistics.median(column) for column in zip(*deployed[cut], strict=True)]
            sides = layer_graph(graph).sides(layer_graph(graph).closure([ends(graph, cut)]))
            for side, names, seconds in zip(("device", "server"), sides, measured, strict=True):
                errors = [f"{sum_of(way, names) / seconds - 1:+.3f}" for way in ways.values()]
                rows.append((f"{label}, {cut}, {side}", f"{1e3 * seconds:.3f}", *errors))
    for i, way in enumerate(ways):
        errors = [abs(float(row[2 + i])) for row in rows]
        say(f"{way}: median of the absolute errors {statistics.median(errors):.3f}")
    table(
        "Relative error of a side's predicted seconds",
        rows,
        ("side", "measured ms", "roofline", "regression", "measured"),
    )


def backbone(source: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    return create_backbone(source, name, num_classes=10, image_size=SHAPE[1:]).network.eval()


def middle(passes: list[Profile]) -> Profile:
    """The medians of some profiles of one network."""
    seconds = {name: statistics.median(each.seconds[name] for each in passes) for name in passes[0].seconds}
    whole = statistics.median(each.whole or 0.0 for each in passes)
    return dataclasses.replace(passes[0], seconds=seconds, whole=whole)


def ends(graph: object, cut: str) -> int:
    layers = layer_graph(graph).layers  # type: ignore[arg-type]
    node = next(node.name for node in graph.nodes if node.layer == cut)  # type: ignore[attr-defined]
    return next(i for i, layer in enumerate(layers) if node in layer.nodes)


def sum_of(profile: Profile, names: tuple[str, ...]) -> float:
    return sum(profile.seconds[name] for name in names)


def this_machine() -> Machine:
    """What one matrix product, one copy and one tiny operation say of this machine."""
    a = torch.rand(1024, 1024)
    product = Timer("a @ a", globals={"a": a}, timer=CLOCK).blocked_autorange(min_run_time=0.5).median
    big, target, one = torch.rand(2**24), torch.empty(2**24), torch.rand(1)
    copy = Timer("t.copy_(b)", globals={"t": target, "b": big}, timer=CLOCK).blocked_autorange(min_run_time=0.5).median
    tiny = Timer("r(x)", globals={"r": torch.relu, "x": one}, timer=CLOCK).blocked_autorange(min_run_time=0.2).median
    machine = Machine("this machine", 2 * 1024**3 / product, 1.0, 2 * 4 * 2**24 / copy, tiny)
    say(f"This machine: {machine.rate:.3g} FLOP/s, {machine.bandwidth:.3g} bytes/s, {1e6 * tiny:.2f} µs an operation")
    return machine


def as_deployed(network: nn.Module, cut: str, rounds: int) -> tuple[float, float]:
    """Median seconds of both partitions of a bundle, loaded as deployment loads them, an image at a time."""
    images = torch.rand(8, *SHAPE)
    split = staged_network(network, images, split=cut, form="none", codec={"bits": 8}).train()
    with torch.no_grad():
        split(images)
    taken = TensorInput(SHAPE, name="images")
    found = network_partitions(split.eval(), taken)
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_bundle(
            Path(folder) / "bundle", found.parts, found.edges, input=taken,
            outputs=[OutputSpec("logits", "logits", (10,), tuple(map(str, range(10))))], images=images,
            draws=found.draws,
        )  # fmt: skip
        route, rows = bundle.manifest.route, []
        for _ in range(rounds):
            known, row = {**route.settings, route.input: images[:1]}, []
            with torch.inference_mode():
                for name in route.order:
                    partition = bundle.partitions[name]
                    inputs = [known[item.name] for item in partition.spec.inputs]
                    begin = CLOCK()
                    result = partition.module(*inputs)
                    row.append(CLOCK() - begin)
                    results = result if isinstance(result, tuple) else (result,)
                    known.update(zip([item.name for item in partition.spec.outputs], results, strict=True))
            rows.append(row)
    device, server = (statistics.median(column) for column in zip(*rows[5:], strict=True))
    return device, server


if __name__ == "__main__":
    main()
