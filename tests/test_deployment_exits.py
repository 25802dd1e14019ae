"""Bundles with early exits: what they say of themselves, how they run, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cleave.architectures import MultiExitNetwork, export_parts
from cleave.architectures.exit_partitions import exit_specs
from cleave.deployment import (
    Bundle,
    BundleError,
    ExitPolicy,
    FloatCodec,
    ParityError,
    Pipeline,
    build_policy,
    check_parts,
    load_bundle,
    policy_from_dict,
    read_manifest,
    read_policy,
)
from cleave.deployment.bundle import export
from cleave.deployment.bundle.canonical_json import dump

from .deployment_networks import make_bundle
from .exit_networks import INPUT, SPLIT, TIERS, exit_bundle, images, middling, multi_exit
from .test_deployment_bundle import edit, remove, replace_file, set_in
from .test_deployment_export import Shifted

# A network, where its partitions run, and its policy's kind.
CASES: dict[str, tuple[dict[str, Any], list[str] | None, str]] = {
    "device": ({}, None, "confidence"),
    "cascade": ({"cascade": True}, None, "entropy"),
    "ensemble": ({"ensemble": True}, None, "ensemble"),
    "split": (SPLIT, None, "margin"),
    "split_before_an_exit": (SPLIT | {"split": "layer1"}, None, "confidence"),
    "split_where_no_exit_is": (SPLIT | {"at": ["layer1"], "codec": {"bits": 32}}, None, "confidence"),
    "cascade_before_the_split": (SPLIT | {"cascade": True}, None, "patience"),
    "tiers": (SPLIT, TIERS, "confidence"),
    "tiers_of_floats": ({}, TIERS, "confidence"),
}
Made = Callable[[str], tuple[Bundle, MultiExitNetwork, ExitPolicy]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    found: dict[str, tuple[Bundle, MultiExitNetwork, ExitPolicy]] = {}

    def make(name: str) -> tuple[Bundle, MultiExitNetwork, ExitPolicy]:
        if name not in found:
            settings, placements, kind = CASES[name]
            network = multi_exit(**settings)
            policy = build_policy("patience", 1, exits=3) if kind == "patience" else middling(network, kind)
            folder = tmp_path_factory.mktemp(name) / "bundle"
            found[name] = exit_bundle(folder, network, policy, placements), network, policy
        return found[name]

    return make


@pytest.mark.parametrize("name", CASES)
def test_each_sample_leaves_where_the_module_says_with_its_answer_and_its_bytes(made: Made, name: str) -> None:
    bundle, network, policy = made(name)
    batch = images(40, seed=4)
    result = Pipeline(bundle).run(batch)
    with torch.no_grad():
        expected = network.run(INPUT.normalize(batch), policy)
        features = network.stages.features(INPUT.normalize(batch), at=network.names)
    assert torch.equal(result.exits, expected.index)
    torch.testing.assert_close(result.logits, expected.logits)
    assert len(result.exits.unique()) == (2 if policy.kind == "patience" else len(network.exit_names))
    placements = [bundle.manifest.partition(part).placement for part in bundle.manifest.route]
    for index, (end, codec) in enumerate(zip(network.names, bundle.manifest.codecs, strict=True)):
        # Of the exits that stand at or before this edge, the last: who leaves there or earlier does not pass.
        passed = sum(item in network.exit_names for item in network.names[: index + 1]) - 1
        if placements[index] == placements[index + 1]:
            assert set(result.payloads[index]) == {b""}
        elif end == network.split:
            with torch.no_grad():
                sent = codec.encode(network.bottleneck.send(features[end]))
            goes = (expected.index > passed).tolist()
            assert [len(x) for x in result.payloads[index]] == [len(x) * g for x, g in zip(sent, goes, strict=True)]
            found = codec.decode([x for x in result.payloads[index] if x])
            wanted = codec.decode([x for x, g in zip(sent, goes, strict=True) if g])
            torch.testing.assert_close(found["z" if "z" in found else "low"], wanted["z" if "z" in wanted else "low"])
        else:
            for payload, feature, left in zip(result.payloads[index], features[end], expected.index, strict=True):
                assert len(payload) == (4 * feature.numel() if left > passed else 0)
                if payload:
                    torch.testing.assert_close(FloatCodec(tuple(feature.shape)).decode([payload])["z"][0], feature)
    on_device = sum(bundle.manifest.placements[bundle.manifest.route.index(e.partition)] == "device"
                    for e in bundle.manifest.exits)  # fmt: skip
    assert all((sent == 0) == (left < on_device) for sent, left in zip(result.payload_bytes, result.exits, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_bundle_says_what_it_is_and_tests_itself(made: Made, name: str) -> None:
    bundle, network, policy = made(name)
    manifest = read_manifest(bundle.directory)
    assert manifest == bundle.manifest
    assert manifest.policy == policy
    assert manifest.exits == tuple(exit_specs(network, export_parts(network, INPUT)[0], policy))
    assert manifest.parity["max_difference"] <= 1e-5
    assert bundle.self_test().max_difference <= 1e-5


def test_partitions_that_no_sample_reaches_do_not_run(made: Made) -> None:
    bundle, _, policy = made("split")
    result = Pipeline(bundle, policy=policy.with_thresholds(0.0)).run(images(5))
    assert result.exits.tolist() == [0] * 5
    assert result.part_seconds["to_layer1"] > 0
    assert [result.part_seconds[part] for part in ("to_layer2", "to_final")] == [0.0, 0.0]
    assert result.payloads == [[b""] * 5] * 2
    assert result.encode_seconds == result.decode_seconds == [0.0, 0.0]


@pytest.mark.parametrize("name", ["tiers", "cascade", "split_where_no_exit_is"])
def test_another_policy_overrides_the_bundles(made: Made, name: str, tmp_path: Path) -> None:
    bundle, network, policy = made(name)
    never = policy.with_thresholds(None)
    result = Pipeline(bundle, policy=never).run(images(5))
    assert result.exits.tolist() == [len(network.exit_names) - 1] * 5
    folder = Path(shutil.copytree(bundle.directory, tmp_path / "bundle"))
    edit(folder, set_in("policy", value=None))
    alone = Pipeline(load_bundle(folder)).run(images(5))
    assert torch.equal(alone.exits, result.exits)
    assert torch.equal(alone.logits, result.logits)
    assert alone.payload_bytes == result.payload_bytes


def test_costs_follow_the_policy_that_runs(made: Made) -> None:
    bundle, network, _ = made("device")
    costs = [item.macs for item in bundle.manifest.exits]
    assert Pipeline(bundle).exit_macs == costs == network.exit_costs()
    ensemble = build_policy("ensemble", 0.5, exits=3)
    assert Pipeline(bundle, policy=ensemble).exit_macs == network.exit_costs(ensemble)
    ensembles = made("ensemble")[0]
    confident = build_policy("confidence", 0.5, exits=3)
    assert Pipeline(ensembles, policy=confident).exit_macs == costs


def test_bits_are_those_of_the_edges_that_have_codes(made: Made) -> None:
    bundle, network, policy = made("tiers")
    batch, never = images(5), policy.with_thresholds(None)
    result = Pipeline(bundle, bits=2, policy=never).run(batch)
    assert result.payload_bytes == [4 * 8 * 8 * 8 + 8 + 3 * 4 * 4 * 2 // 8] * 5
    network = multi_exit(**SPLIT | {"codec": {"bits": 2, "range": "sample"}})
    with torch.no_grad():
        torch.testing.assert_close(result.logits, network(INPUT.normalize(batch)))
    with pytest.raises(ValueError, match="bits must stay 32"):
        Pipeline(made("tiers_of_floats")[0], bits=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("name", ["tiers", "cascade_before_the_split", "ensemble"])
def test_samples_leave_a_gpu_as_they_leave_the_cpu(made: Made, name: str) -> None:
    bundle, _, _ = made(name)
    batch = images(40, seed=4)
    expected = Pipeline(bundle).run(batch)
    found = Pipeline(load_bundle(bundle.directory, device="cuda")).run(batch)
    assert (found.exits.device.type, found.logits.device.type) == ("cpu", "cpu")
    # A score beside its threshold may fall to the other side there.
    assert int((found.exits != expected.exits).sum()) <= 2


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "placements", "policy", "words"),
    [
        ({}, ["device", "server", "device"], ("margin", 0.5, 3), "returns to the placement device at to_final"),
        ({}, TIERS, ("patience", 1, 3), "policy that needs state on a stateless partition: patience.*device, edge"),
        (SPLIT, None, ("ensemble", 0.5, 3), "policy that needs state on a stateless partition: ensemble"),
        ({"cascade": True}, TIERS, ("margin", 0.5, 3), "to_layer2 on edge reads the logits of the exit before"),
        ({}, None, ("confidence", 0.5, 4), "the policy confidence is for 4 exits, but this network has 3"),
    ],
)
def test_what_cannot_run_in_its_placements_is_refused_at_export(
    settings: dict[str, Any], placements: list[str] | None, policy: tuple[str, float, int], words: str, tmp_path: Path
) -> None:
    kind, threshold, exits = policy
    with pytest.raises(BundleError, match=words):
        exit_bundle(tmp_path / "bundle", multi_exit(**settings), build_policy(kind, threshold, exits=exits), placements)
    assert list(tmp_path.iterdir()) == []


def test_patience_may_end_in_another_placement() -> None:
    network = multi_exit(**SPLIT)
    parts, codecs = export_parts(network, INPUT)
    policy = build_policy("patience", 1, exits=3)
    check_parts(parts, codecs, exit_specs(network, parts, policy), policy)
    with pytest.raises(BundleError, match="has nothing to decide"):
        check_parts(parts, codecs, [], policy)
    with pytest.raises(BundleError, match=r"returns \(z, exit_logits\)"):
        check_parts(parts, codecs)


@pytest.mark.parametrize(
    ("name", "policy", "words"),
    [
        ("tiers", build_policy("confidence", 0.5, exits=2), "is for 2 exits, but this network has 3"),
        ("tiers", build_policy("patience", 1, exits=3), "needs state on a stateless partition"),
        ("split", build_policy("ensemble", 0.5, exits=3), "needs state on a stateless partition"),
    ],
)
def test_a_policy_that_the_bundle_cannot_run_is_refused(made: Made, name: str, policy: Any, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        Pipeline(made(name)[0], policy=policy)


def test_a_bundle_without_exits_takes_no_policy(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    assert (bundle.manifest.exits, bundle.manifest.policy) == ((), None)
    with pytest.raises(BundleError, match="this bundle has no exits"):
        Pipeline(bundle, policy=build_policy("confidence", 0.5, exits=2))


def both(*changes: Callable[[Any], None]) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        for each in changes:
            each(values)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in("exits", value=[]), "the policy margin has nothing to decide"),
        (set_in("exits", 0, "extra", value=1), "an exit has the unknown keys extra"),
        (remove("exits", 0, "macs"), "an exit lacks macs"),
        (set_in("exits", 0, "macs", value=1.5), "macs has the wrong type"),
        (set_in("exits", 0, "macs", value=10**9), "do not fall"),
        (set_in("exits", 0, "accuracy", value=2.0), "accuracy=2.0"),
        (set_in("exits", 0, "name", value="final"), "each exit needs a name of its own"),
        (set_in("exits", 0, "partition", value="to_layer9"), "which is no partition"),
        (set_in("exits", 0, "partition", value="to_layer2"), "in the order of the route"),
        (remove("exits", 2), "the last at its end"),
        (both(remove("exits", 1), remove("policy", "thresholds", 1)), "to_layer2, number 2 of the route, returns"),
        (remove("policy"), "the manifest lacks policy"),
        (set_in("policy", value=[]), "policy has the wrong type"),
        (set_in("policy", "kind", value="margins"), "Did you mean 'margin'"),
        (set_in("policy", "thresholds", value=[0.5]), "the policy margin is for 2 exits, but this network has 3"),
        (set_in("policy", "thresholds", 0, value=1.5), r"1\.5"),
        (set_in("policy", "more", value=1), "takes the keys"),
        (
            both(
                set_in("partitions", 1, "placement", value="edge"), set_in("partitions", 2, "placement", value="device")
            ),
            "returns to the placement device at to_final",
        ),
        (set_in("partitions", 0, "outputs", 1, "shape", value=[-1, 3]), "the exit_logits of to_layer1 have shape"),
        (set_in("partitions", 0, "outputs", 1, "name", value="logits"), r"it must be \(z, exit_logits\)"),
    ],
)
def test_a_manifest_that_contradicts_its_exits_is_refused(made: Made, change: Any, words: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("split")[0].directory, tmp_path / "bundle"))
    edit(folder, change)
    with pytest.raises(BundleError, match=words):
        read_manifest(folder)


def test_the_self_test_finds_exits_that_compute_something_else(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("cascade")[0].directory, tmp_path / "bundle"))
    sample = safetensors.torch.load_file(folder / "sample.safetensors")
    sample["to_layer2.exit_logits"] = sample["to_layer2.exit_logits"].flip(0).contiguous()
    replace_file(folder, "sample.safetensors", safetensors.torch.save(sample))
    with pytest.raises(ParityError, match="partition to_layer2: exit_logits differs"):
        load_bundle(folder).self_test()


def test_the_gate_holds_exits_against_their_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = export.save_torchscript

    def save_changed(module: Any, inputs: Any, path: Path) -> None:
        changed = Shifted(module, lambda outputs: (*outputs[:-1], outputs[-1] * 1.01)).eval()
        save(changed if path.stem == "to_layer1" else module, inputs, path)

    monkeypatch.setattr(export, "save_torchscript", save_changed)
    with pytest.raises(ParityError, match="partition to_layer1 with a batch of 6: exit_logits differs"):
        exit_bundle(tmp_path / "bundle", multi_exit(), build_policy("confidence", 0.5, exits=3))
    assert list(tmp_path.iterdir()) == []


def test_a_policy_is_read_from_a_file_or_refused(tmp_path: Path) -> None:
    policy = build_policy("ensemble", [0.5, None], exits=3, temperatures=[1.0, 2.0, 3.0])
    file = tmp_path / "policy.json"
    file.write_bytes(dump(policy.to_dict()))
    assert read_policy(file) == policy == policy_from_dict(policy.to_dict())
    for content, words in (
        (file.read_bytes()[:-9], "it is not JSON"),
        (b"\xff", "it is not UTF-8"),
        (b"[]", "kind"),
        (file.read_bytes().replace(b"ensemble", b"ensembl"), "Did you mean 'ensemble'"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"the exit policy .*policy\.json cannot be read: .*{words}"):
            read_policy(file)
    with pytest.raises(FileNotFoundError, match="there is no exit policy at"):
        read_policy(tmp_path / "none.json")
