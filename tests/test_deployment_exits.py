"""Bundles with early exits: what they say of themselves, how they run, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from cleave.deployment import (
    ENVELOPE_BYTES,
    Bundle,
    BundleError,
    ExitPolicy,
    FloatCodec,
    ParityError,
    Part,
    Pipeline,
    build_policy,
    check_parts,
    load_bundle,
    offline,
    policy_from_dict,
    read_manifest,
    read_policy,
)
from cleave.deployment.bundle.canonical_json import dump
from cleave.deployment.bundle.writing import export

from .deployment_networks import (
    CLASSES,
    EXIT_INPUT,
    MAP,
    OUTPUTS,
    edge,
    exit_bundle,
    exit_images,
    exit_outputs,
    exit_parts,
    make_bundle,
)
from .test_deployment_bundle import edit, remove, replace_file, set_in
from .test_deployment_export import Shifted

DEVICE, SPLIT = ("device",) * 3, ("device", "device", "server")
TIERS, RETURNING = ("device", "edge", "cloud"), ("device", "server", "device")
# Where the partitions run, what else is said of the chain, and its policy's kind.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "device": ({"placements": DEVICE}, "confidence"),
    "cascade": ({"placements": DEVICE, "cascade": True}, "entropy"),
    "ensemble": ({"placements": DEVICE}, "ensemble"),
    "split": ({"placements": SPLIT, "split": "layer2"}, "margin"),
    "split_before_an_exit": ({"placements": ("device", "server", "server"), "split": "layer1"}, "confidence"),
    "split_where_no_exit_is": ({"placements": SPLIT, "exits": ("layer1", "final")}, "confidence"),
    "cascade_before_the_split": ({"placements": SPLIT, "split": "layer2", "cascade": True, "seed": 112}, "patience"),
    "tiers": ({"placements": TIERS, "split": "layer2"}, "confidence"),
    "tiers_of_floats": ({"placements": TIERS}, "confidence"),
    # What a decision needs of the exits before crosses placements.
    "patience_in_tiers": ({"placements": TIERS, "seed": 3}, "patience"),
    "ensemble_over_a_split": ({"placements": SPLIT, "split": "layer2"}, "ensemble"),
    "ensemble_in_tiers": ({"placements": TIERS}, "ensemble"),
    "ensemble_past_a_placement": ({"placements": TIERS, "exits": ("layer1", "final")}, "ensemble"),
    "cascade_in_tiers": ({"placements": TIERS, "cascade": True}, "margin"),
    "cascade_and_ensemble_in_tiers": ({"placements": TIERS, "cascade": True, "split": "layer1"}, "ensemble"),
    "returning": ({"placements": RETURNING}, "ensemble"),
    "ensemble_waits_at_home": ({"placements": RETURNING, "exits": ("layer1", "final")}, "ensemble"),
}
Made = Callable[[str], tuple[Bundle, list[Part], ExitPolicy]]


def own_logits(parts: list[Part], batch: Tensor) -> Tensor:
    """Every exit's own logits (E, B, C)."""
    found = exit_outputs(parts, batch)
    return torch.stack([tensor for name, tensor in found.items() if name.endswith("logits")])


def middling(parts: list[Part], kind: str) -> ExitPolicy:
    """A policy by which about half of the samples that reach an exit leave there."""
    logits = own_logits(parts, exit_images(64, seed=9))
    if kind == "patience":
        return build_policy("patience", 1, exits=len(logits))
    never = build_policy(kind, None, exits=len(logits))
    return never.with_thresholds([float(row.quantile(0.5)) for row in never.scores(logits)[:-1]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    found: dict[str, tuple[Bundle, list[Part], ExitPolicy]] = {}

    def make(name: str) -> tuple[Bundle, list[Part], ExitPolicy]:
        if name not in found:
            settings, kind = CASES[name]
            parts, _, _ = exit_parts(**settings)
            policy = middling(parts, kind)
            found[name] = exit_bundle(tmp_path_factory.mktemp(name) / "bundle", policy, **settings), parts, policy
        return found[name]

    return make


@pytest.mark.parametrize("name", CASES)
def test_each_sample_leaves_where_the_module_says_with_its_answer_and_its_bytes(made: Made, name: str) -> None:
    bundle, parts, policy = made(name)
    batch = exit_images(40, seed=4)
    result = Pipeline(bundle, envelope=False).run(batch)
    expected = offline(policy, own_logits(parts, batch))
    known = exit_outputs(parts, batch)
    assert torch.equal(result.exits, expected.index)
    torch.testing.assert_close(result.logits, expected.logits)
    assert len(result.exits.unique()) == (2 if policy.kind == "patience" else policy.exits)
    places = [part.placement for part in parts]
    exits = [item.partition for item in bundle.manifest.exits]
    sizes = torch.zeros(len(batch), dtype=torch.int64)
    for index, part in enumerate(parts[:-1]):
        layer = part.name.removeprefix("to_")
        # Of the exits that stand at or before this edge, the last: who leaves there or earlier does not pass.
        passed = sum(before.name in exits for before in parts[: index + 1]) - 1
        goes = expected.index > passed
        if places[index] == places[index + 1]:
            assert layer not in result.payloads
            continue
        codec = bundle.manifest.route.codecs[layer]
        sent = codec.encode({own: known[name] for own, name in codec.sent(layer).items()})
        found = result.payloads[layer]
        assert [len(x) for x in found] == [len(x) * go for x, go in zip(sent, goes.tolist(), strict=True)]
        arrived = codec.decode([x for x in found if x])
        wanted = codec.decode([x for x, go in zip(sent, goes.tolist(), strict=True) if go])
        torch.testing.assert_close(arrived["z" if "z" in arrived else "low"], wanted["z" if "z" in wanted else "low"])
        sizes += torch.tensor([len(x) for x in found])
        for key, extra in result.payloads.items():
            at = key.partition("@")[2]
            if key.startswith(f"{layer}/") and at in ("", places[index + 1]):
                # Raw float32 of what the next decision or exit needs, of whoever goes on.
                assert all((len(x) > 0) == go for x, go in zip(extra, goes.tolist(), strict=True))
    others = [key for key in result.payloads if "/" in key]
    sizes += torch.tensor([[len(x) for x in result.payloads[key]] for key in others] or [[0] * len(batch)]).sum(0)
    assert result.payload_bytes == sizes.tolist()
    enveloped = Pipeline(bundle).run(batch)
    sent = torch.tensor([[len(x) > 0 for x in payloads] for payloads in result.payloads.values()]).sum(0)
    assert enveloped.payload_bytes == (sizes + ENVELOPE_BYTES * sent).tolist()


@pytest.mark.parametrize(
    "name",
    [
        "patience_in_tiers",
        "ensemble_in_tiers",
        "cascade_in_tiers",
        "returning",
        "ensemble_past_a_placement",
        "ensemble_waits_at_home",
    ],
)
def test_placements_change_bytes_alone(made: Made, name: str, tmp_path: Path) -> None:
    bundle, _, policy = made(name)
    settings = CASES[name][0] | {"placements": DEVICE}
    alone = Pipeline(exit_bundle(tmp_path / "bundle", policy, **settings)).run(exit_images(40, seed=4))
    spread = Pipeline(bundle).run(exit_images(40, seed=4))
    assert torch.equal(spread.exits, alone.exits)
    assert torch.equal(spread.logits, alone.logits)
    assert (alone.payloads, set(alone.payload_bytes)) == ({}, {0})
    assert sum(spread.payload_bytes) > 0


def test_what_a_policy_must_know_is_sent_as_float32_and_counted(made: Made) -> None:
    batch = exit_images(40, seed=4)
    result = Pipeline(made("patience_in_tiers")[0], envelope=False).run(batch)
    # The last exit answers whatever was agreed, so nothing of it goes there.
    assert list(result.payloads) == ["layer1", "layer2", "layer1/answered", "layer1/agreed"]
    assert {len(x) for key in ("layer1/answered", "layer1/agreed") for x in result.payloads[key]} == {4}
    answers = own_logits(made("patience_in_tiers")[1], batch)[0].argmax(1).float()
    found = FloatCodec((1,)).decode(result.payloads["layer1/answered"])["z"]
    assert torch.equal(found.squeeze(1), answers)
    result = Pipeline(made("ensemble_in_tiers")[0], envelope=False).run(batch)
    assert [key for key in result.payloads if "/" in key] == ["layer1/log_p", "layer2/log_p"]
    assert {len(x) for x in result.payloads["layer1/log_p"]} == {0, 4 * len(CLASSES)}
    assert {len(x) for x in result.payloads["layer2/log_p"]} == {0, 4 * 2 * len(CLASSES)}
    result = Pipeline(made("ensemble_past_a_placement")[0], envelope=False).run(batch)
    assert [key for key in result.payloads if "/" in key] == ["layer1/log_p@edge", "layer1/log_p@cloud"]
    assert list(Pipeline(made("ensemble_waits_at_home")[0], envelope=False).run(batch).payloads) == ["layer1", "layer2"]
    result = Pipeline(made("cascade_in_tiers")[0], envelope=False).run(batch)
    assert {len(x) for x in result.payloads["layer1/logits"]} == {0, 4 * len(CLASSES)}
    none = Pipeline(made("patience_in_tiers")[0], policy=build_policy("confidence", 0.9, exits=3)).run(batch)
    assert list(none.payloads) == ["layer1", "layer2"]


@pytest.mark.parametrize("name", CASES)
def test_a_bundle_says_what_it_is_and_tests_itself(made: Made, name: str) -> None:
    bundle, _, policy = made(name)
    manifest = read_manifest(bundle.directory)
    assert manifest == bundle.manifest
    assert manifest.policy == policy
    assert manifest.exits == tuple(exit_parts(**CASES[name][0])[2])
    assert manifest.parity["max_difference"] <= 1e-5
    assert bundle.self_test().max_difference <= 1e-5


def test_partitions_that_no_sample_reaches_do_not_run(made: Made) -> None:
    bundle, _, policy = made("split")
    result = Pipeline(bundle, policy=policy.with_thresholds(0.0)).run(exit_images(5))
    assert result.exits.tolist() == [0] * 5
    assert result.part_seconds["to_layer1"] > 0
    assert [result.part_seconds[part] for part in ("to_layer2", "to_final")] == [0.0, 0.0]
    assert result.payloads == {"layer2": [b""] * 5}
    assert result.encode_seconds == result.decode_seconds == {"layer2": 0.0}


@pytest.mark.parametrize("name", ["tiers", "cascade", "split_where_no_exit_is", "patience_in_tiers"])
def test_another_policy_overrides_the_bundles(made: Made, name: str, tmp_path: Path) -> None:
    bundle, _, _ = made(name)
    never = build_policy("confidence", None, exits=len(bundle.manifest.exits))
    result = Pipeline(bundle, policy=never).run(exit_images(5))
    assert result.exits.tolist() == [len(bundle.manifest.exits) - 1] * 5
    folder = Path(shutil.copytree(bundle.directory, tmp_path / "bundle"))
    edit(folder, set_in("policy", value=None))
    alone = Pipeline(load_bundle(folder)).run(exit_images(5))
    assert torch.equal(alone.exits, result.exits)
    assert torch.equal(alone.logits, result.logits)
    assert alone.payload_bytes == result.payload_bytes


def test_costs_follow_the_policy_that_runs(made: Made) -> None:
    bundle = made("device")[0]
    costs = [item.macs for item in bundle.manifest.exits]
    assert Pipeline(bundle).exit_macs == costs
    ensemble = build_policy("ensemble", 0.5, exits=3)
    own = [len(CLASSES), 3 * len(CLASSES), 6 * len(CLASSES)]
    assert Pipeline(bundle, policy=ensemble).exit_macs == [cost + more for cost, more in zip(costs, own, strict=True)]
    confident = build_policy("confidence", 0.5, exits=3)
    found = Pipeline(made("ensemble")[0], policy=confident).exit_macs
    assert found == [cost - more for cost, more in zip(costs, own, strict=True)]


def test_bits_are_those_of_the_edges_that_have_codes(made: Made) -> None:
    bundle, parts, policy = made("tiers")
    batch, never = exit_images(5), policy.with_thresholds(None)
    result = Pipeline(bundle, bits=2, policy=never).run(batch)
    size = MAP[0] * MAP[1] * MAP[2]
    assert result.payload_bytes == [2 * ENVELOPE_BYTES + 4 * size + 8 + size * 2 // 8] * 5
    torch.testing.assert_close(result.logits, exit_outputs(parts, batch, levels=4)["logits"])
    with pytest.raises(ValueError, match="bits must stay 32"):
        Pipeline(made("tiers_of_floats")[0], bits=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("name", ["tiers", "cascade_before_the_split", "ensemble", "ensemble_in_tiers"])
def test_samples_leave_a_gpu_as_they_leave_the_cpu(made: Made, name: str) -> None:
    bundle, _, _ = made(name)
    batch = exit_images(40, seed=4)
    expected = Pipeline(bundle).run(batch)
    found = Pipeline(load_bundle(bundle.directory, device="cuda")).run(batch)
    assert (found.exits.device.type, found.logits.device.type) == ("cpu", "cpu")
    # A score beside its threshold may fall to the other side there.
    assert int((found.exits != expected.exits).sum()) <= 2


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_policy_for_other_exits_is_refused_at_export(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the policy confidence is for 4 exits, but this network has 3"):
        exit_bundle(tmp_path / "bundle", build_policy("confidence", 0.5, exits=4))
    assert list(tmp_path.iterdir()) == []


def test_parts_without_their_exits_are_refused() -> None:
    parts, edges, specs = exit_parts(SPLIT, split="layer2")
    policy = build_policy("patience", 1, exits=3)
    check_parts(parts, edges, input=EXIT_INPUT, outputs=OUTPUTS, exits=specs, policy=policy)
    with pytest.raises(BundleError, match="has nothing to decide"):
        check_parts(*exit_parts(exits=("final",))[:2], input=EXIT_INPUT, outputs=OUTPUTS, policy=policy)
    with pytest.raises(BundleError, match="to_layer1 emits layer1/logits, which no edge, exit or output"):
        check_parts(parts, edges, input=EXIT_INPUT, outputs=OUTPUTS)


def test_nothing_runs_beside_an_exit() -> None:
    parts, edges, specs = exit_parts()
    aside = Part("aside", "device", torch.nn.Identity(), ("images",), ("extra",))
    last = Part("to_final", "device", parts[2].module, ("layer2", "extra"), ("logits",))
    with pytest.raises(BundleError, match="partition aside runs beside the exit layer1 and takes nothing of to_layer1"):
        check_parts(
            [*parts[:2], aside, last],
            [edges[0], edges[1], edge("aside", "to_final", extra=None)],
            input=EXIT_INPUT,
            outputs=OUTPUTS,
            exits=specs,
        )


def test_a_policy_that_the_bundle_cannot_run_is_refused(made: Made) -> None:
    with pytest.raises(BundleError, match="is for 2 exits, but this network has 3"):
        Pipeline(made("tiers")[0], policy=build_policy("confidence", 0.5, exits=2))
    rows = [[0.0] * 7] * 3
    with pytest.raises(ValueError, match="have 4 classes, the ensemble's log_bias 7"):
        Pipeline(made("tiers")[0], policy=build_policy("ensemble", 0.5, exits=3, log_bias=rows))


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
        (set_in("exits", 2, "name", value="layer1"), "each exit needs a name of its own"),
        (set_in("exits", 0, "partition", value="to_layer9"), "which is no partition"),
        (set_in("exits", 0, "partition", value="to_layer2"), "in the order of the route"),
        (remove("exits", 2), "the policy margin is for 3 exits, but this network has 2"),
        (set_in("exits", 2, "partition", value="to_layer1"), "the last at its end"),
        (
            both(remove("exits", 1), remove("policy", "thresholds", 1)),
            "to_layer2 emits layer2/logits, which no edge, exit or output",
        ),
        (remove("policy"), "the manifest lacks policy"),
        (set_in("policy", value=[]), "policy has the wrong type"),
        (set_in("policy", "kind", value="margins"), "Did you mean 'margin'"),
        (set_in("policy", "thresholds", value=[0.5]), "the policy margin is for 2 exits, but this network has 3"),
        (set_in("policy", "thresholds", 0, value=1.5), r"1\.5"),
        (set_in("policy", "more", value=1), "takes the keys"),
        (
            set_in("partitions", 0, "outputs", 1, "shape", value=[-1, 3]),
            "the layer1/logits have shape .*but there are 4 class names",
        ),
        (set_in("partitions", 0, "outputs", 1, "name", value="logits"), "logits is emitted by to_layer1 and by to_fi"),
        (set_in("exits", 0, "name", value="layer0"), "no partition emits the output layer0/logits"),
        (set_in("outputs", 0, "name", value="layer2/logits"), "exits answer with logits alone"),
    ],
)
def test_a_manifest_that_contradicts_its_exits_is_refused(made: Made, change: Any, words: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("split")[0].directory, tmp_path / "bundle"))
    edit(folder, change)
    with pytest.raises(BundleError, match=words):
        read_manifest(folder)


def test_the_self_test_finds_exits_that_compute_something_else(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("cascade")[0].directory, tmp_path / "bundle"))
    sample = safetensors.torch.load_file(folder / "sample.device.safetensors")
    sample["layer2/logits"] = sample["layer2/logits"].flip(0).contiguous()
    replace_file(folder, "sample.device.safetensors", safetensors.torch.save(sample))
    with pytest.raises(ParityError, match="partition to_layer2: layer2/logits differs"):
        load_bundle(folder).self_test()


def test_the_gate_holds_exits_against_their_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = export.save_torchscript

    def save_changed(module: Any, inputs: Any, path: Path) -> None:
        changed = Shifted(module, lambda outputs: (*outputs[:-1], outputs[-1] * 1.01)).eval()
        save(changed if path.stem == "to_layer1" else module, inputs, path)

    monkeypatch.setattr(export, "save_torchscript", save_changed)
    with pytest.raises(ParityError, match="partition to_layer1 with a batch of 6: layer1/logits differs"):
        exit_bundle(tmp_path / "bundle", build_policy("confidence", 0.5, exits=3))
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
