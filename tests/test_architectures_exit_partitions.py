from __future__ import annotations

from typing import Any

import pytest
import torch

from cleave.architectures import MultiExitNetwork, export_parts
from cleave.architectures.exit_partitions import exit_specs
from cleave.deployment import FloatCodec, build_policy
from cleave.deployment.bundle.signatures import EXIT_LOGITS, part_arguments
from cleave.lightning_modules.exits import send

from .exit_networks import INPUT, SPLIT, TIERS, Tiny, images, multi_exit

CODES = ("codes", "low", "high")
NETWORKS: dict[str, dict[str, Any]] = {
    "exits alone": {},
    "split at the last exit": SPLIT,
    "split before the last exit": SPLIT | {"split": "layer1"},
    "split where no exit is": SPLIT | {"at": ["layer1"]},
    "float": SPLIT | {"codec": {"bits": 32}},
    "nothing but codes": SPLIT | {"bottleneck": None},
    "cascade": SPLIT | {"cascade": True},
}


@pytest.fixture(scope="module", params=NETWORKS.values(), ids=NETWORKS)
def network(request: pytest.FixtureRequest) -> MultiExitNetwork:
    return multi_exit(**request.param)


def test_a_partition_ends_at_each_exit_and_at_the_split() -> None:
    parts, codecs = export_parts(multi_exit(**SPLIT, cascade=True), INPUT)
    assert [(part.name, part.placement) for part in parts] == [
        ("to_layer1", "device"),
        ("to_layer2", "device"),
        ("to_final", "server"),
    ]
    assert [part.inputs for part in parts] == [("images",), ("z", "levels", "before"), (*CODES, "levels")]
    assert [part.outputs for part in parts] == [("z", EXIT_LOGITS), (*CODES, EXIT_LOGITS), ("logits",)]
    assert codecs[0] == FloatCodec((8, 8, 8))
    assert (codecs[1].kind, codecs[1].bits, codecs[1].shape) == ("uniform", 4, (3, 4, 4))


def test_partitions_run_where_they_are_placed() -> None:
    def places(network: dict[str, Any], placements: list[str] | None = None) -> list[str]:
        return [part.placement for part in export_parts(multi_exit(**network), INPUT, placements)[0]]

    assert places({}) == ["device", "device", "device"]
    assert places(SPLIT | {"split": "layer1"}) == ["device", "server", "server"]
    assert places(SPLIT | {"at": ["layer1"]}) == ["device", "device", "server"]
    assert places(SPLIT, TIERS) == TIERS


def test_partitions_through_codecs_are_the_network_and_leave_their_inputs_alone(network: MultiExitNetwork) -> None:
    parts, codecs = export_parts(network, INPUT)
    batch, found, before = images(5, seed=3), [], None
    received = {"images": batch}
    with torch.no_grad():
        link = None if network.split is None else lambda feature: send(network, feature)[0]
        expected = network.classify(network.reduced(INPUT.normalize(batch), link=link))
        for part, codec in zip(parts, [*codecs, None], strict=True):
            arguments = part_arguments(part.inputs, received, codec, before)
            assert tuple(arguments) == part.inputs
            kept = [tensor.clone() for tensor in arguments.values()]
            result = part.module.eval()(*arguments.values())
            assert all(torch.equal(*pair) for pair in zip(arguments.values(), kept, strict=True))
            results = result if isinstance(result, tuple) else (result,)
            outputs = dict(zip(part.outputs, results, strict=True))
            before = outputs.get(EXIT_LOGITS, before)
            found += [outputs[name] for name in (EXIT_LOGITS, "logits") if name in outputs]
            received = codec.decode(codec.encode(outputs)) if codec is not None else {}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["confidence", "ensemble"])
def test_costs_are_those_of_all_that_runs(network: MultiExitNetwork, kind: str) -> None:
    parts, _ = export_parts(network, INPUT)
    policy = build_policy(kind, 0.5, exits=len(network.exit_names))
    specs = exit_specs(network, parts, policy, {"layer1": 0.25})
    assert [spec.name for spec in specs] == list(network.exit_names)
    assert [spec.partition for spec in specs] == [f"to_{name}" for name in network.exit_names]
    assert [spec.accuracy for spec in specs] == [0.25, *[None] * (len(specs) - 1)]
    assert sum(part.macs for part in parts) == network.exit_costs()[-1]
    expected = dict(zip(network.exit_names, network.exit_costs(policy), strict=True))
    if network.split in expected:
        expected[network.split] += network.profile()["encoder"]["macs"]  # beside the exit, in the same partition
    assert [spec.macs for spec in specs] == list(expected.values())


@pytest.mark.parametrize(
    ("settings", "placements", "words"),
    [
        ({}, ["device", "server"], "2 names, but there are 3 partitions, to_layer1, to_layer2, to_final"),
        ({}, "device", r"write exits.placements=\[device,server\]"),
        ({}, ["device", "", "server"], "are a list of names"),
        (SPLIT, ["device", "server", "server"], "to_layer2 and to_final both on server: nothing is sent at the split"),
    ],
)
def test_placements_that_do_not_fit_are_told(settings: dict[str, Any], placements: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        export_parts(multi_exit(**settings), INPUT, placements)


def test_other_networks_take_no_placements() -> None:
    with pytest.raises(ValueError, match="are for networks with exits"):
        export_parts(Tiny(), INPUT, TIERS)
