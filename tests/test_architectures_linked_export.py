"""A path as partitions on two sides, through real bytes."""

from __future__ import annotations

import pytest
import torch

from cleave.architectures import link_blocks, linked_network, path_costs
from cleave.architectures.partitions import network_partitions
from cleave.deployment import ImageInput, OutputSpec, Pipeline, Side, export_bundle, load_bundle

from .linked_networks import (
    CLASSES,
    HOST_BLOCKS,
    HOST_SAMPLE,
    LOCAL_BLOCKS,
    LOCAL_SAMPLE,
    Host,
    Local,
    host_blocks,
    local_blocks,
    seeded,
)
from .tiny_networks import made_once

INPUT = ImageInput(height=8, width=8, mean=(0.5,) * 3, std=(0.25,) * 3)
CODERS = {"bottleneck": {"channels": 2, "width": 4}, "codec": {"bits": 8, "range": "sample"}}
CROSSING = {"split": ["local/b0", "host/layer4"], **CODERS}
EXITS = {"exits": ["local/b0", "host/layer2", "local/b5"], "exit_head": {"convs": 0, "grid": 1}}


def images(count=6):
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def service(**changes):
    return made_once(linked, changes)


def linked(changes):
    torch.manual_seed(3)
    samples = (LOCAL_SAMPLE, HOST_SAMPLE)
    changes = {"path": [0, 1, 4, 5]} | changes
    path = changes.pop("path")
    host = None if path[1] is None else seeded(Host)
    network = linked_network(seeded(Local), host, samples, (LOCAL_BLOCKS, HOST_BLOCKS), path, **changes)
    return network.train().eval()


def exported(network, folder, placements=None):
    found = network_partitions(network, INPUT, placements)
    names = tuple(f"class {number}" for number in range(CLASSES))
    outputs = [OutputSpec("logits", "logits", (CLASSES,), names)]
    return export_bundle(
        folder, found.parts, found.edges, input=INPUT, outputs=outputs, images=images(), config={}, exits=found.exits
    )


@pytest.mark.parametrize("bits", [32, 8])
def test_the_route_gives_the_networks_logits_through_bytes(bits, tmp_path):
    network = service()
    if bits != 32:
        for cut in network.bottlenecks:
            network.calibrate([INPUT.normalize(images(32))], cut, bits)
    exported(network, tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    bundle.self_test()
    manifest = bundle.manifest
    assert [part.name for part in manifest.partitions] == ["local_front", "host_middle", "local_back"]
    assert [part.placement for part in manifest.partitions] == ["local", "host", "local"]
    result = Pipeline(bundle).run(images(5))
    with torch.no_grad():
        expected = network(INPUT.normalize(images(5)))
    assert torch.allclose(torch.as_tensor(result.logits), expected, atol=1e-4)
    up, down = (network.bottlenecks[cut].shape for cut in network.bottlenecks)
    elements = torch.Size(up).numel() + torch.Size(down).numel()
    assert set(result.payload_bytes) == {2 * 12 + elements * bits // 8}


def test_neither_sides_files_hold_the_others_tensors(tmp_path):
    network = service()
    exported(network, tmp_path / "bundle")
    manifest = load_bundle(tmp_path / "bundle").manifest
    files = {side: [tmp_path / "bundle" / part.file.file for part in manifest.at(side)] for side in ("local", "host")}
    # The archives hold their tensors as they are.
    content = {side: b"".join(file.read_bytes() for file in found) for side, found in files.items()}
    held = {"local": 0, "host": 0}
    for name, value in network.state_dict().items():
        if value.numel() < 4 or value.unique().numel() < 3:  # would be found anywhere
            continue
        own, other = ("local", "host") if name.startswith("local.") else ("host", "local")
        assert value.numpy().tobytes() in content[own], name
        assert value.numpy().tobytes() not in content[other], name
        held[own] += 1
    assert min(held.values()) > 5
    for own, other in (("local", "host"), ("host", "local")):
        for file in files[other]:
            file.rename(tmp_path / file.name)
        load_bundle(tmp_path / "bundle", placement=own).self_test()
        for file in files[other]:
            (tmp_path / file.name).rename(file)


def test_two_sides_answer_with_their_own_files_and_the_local_one_is_entered_twice(tmp_path):
    network = service(**CROSSING)
    exported(network, tmp_path / "bundle")
    expected = Pipeline(load_bundle(tmp_path / "bundle")).run(images(5))
    local, host = (Side(load_bundle(tmp_path / "bundle", placement=side), side) for side in ("local", "host"))
    up = local.run(images(5), request=1)
    assert list(up.messages) == ["host"]
    assert not up.rows
    down = host.run(up.messages["host"], request=1)
    assert list(down.messages) == ["local"]
    answer = local.run(down.messages["local"], request=1)
    assert answer.rows == (0, 1, 2, 3, 4)
    assert torch.equal(answer.outputs["logits"], torch.as_tensor(expected.logits))


@pytest.mark.parametrize(
    ("changes", "names", "places"),
    [
        ({"path": [0, None, None, 3]}, ["whole"], ["local"]),
        ({"use_host": False}, ["local_front", "host_middle", "local_back"], ["local", "host", "local"]),
        (CROSSING, ["local_front", "host_middle", "local_back"], ["local", "host", "local"]),
        (EXITS, ["to_local_b0", "to_host_layer2", "to_host_layer4", "to_local_b5", "to_final"],
         ["local", "host", "host", "local", "local"]),
    ],
)  # fmt: skip
def test_whatever_stands_on_a_path_is_exported(changes, names, places, tmp_path):
    network = service(**changes)
    exported(network, tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    bundle.self_test()
    assert [part.name for part in bundle.manifest.partitions] == names
    assert [part.placement for part in bundle.manifest.partitions] == places


def test_placements_are_free_and_must_keep_the_sides_apart(tmp_path):
    network = service()
    found = network_partitions(network, INPUT, ["phone", "cloud", "edge"])
    assert [part.placement for part in found.parts] == ["phone", "cloud", "edge"]
    assert [part.name for part in found.parts] == ["phone", "cloud", "edge"]
    with pytest.raises(ValueError, match="both on a: nothing is sent at the split local/b0"):
        network_partitions(network, INPUT, ["a", "a", "b"])
    with pytest.raises(ValueError, match="placements has 2 names, but there are 3 partitions"):
        network_partitions(network, INPUT, ["a", "b"])


def test_costs_of_a_path_are_those_of_its_parts():
    network = link_blocks(local_blocks(), host_blocks(), [1, 2, 3, 4])
    costs = path_costs(network)
    whole = local_blocks().costs(range(7))
    assert costs.kept.macs + costs.skipped.macs == sum(cost.macs for cost in whole)
    assert costs.kept.params + costs.skipped.params == sum(weight.numel() for weight in seeded(Local).parameters())
    assert costs.skipped.params == sum(cost.params for cost in whole[2:4])
    assert costs.host.params == sum(w.numel() for n in (2, 3) for w in host_blocks().stages[n].parameters())
    assert costs.links.params == sum(w.numel() for link in network.links.values() for w in link.parameters())
    assert (costs.inserts.macs, costs.inserts.params) == (0, 0)
    total = network.costs()
    assert sum(cost.macs for cost in total) == costs.kept.macs + costs.host.macs + costs.links.macs
    assert path_costs(service(path=[0, None, None, 3])).host.macs == 0
