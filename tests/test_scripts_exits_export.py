"""A network with exits from training to the bundle that a device runs, on digits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cleave.deployment import ENVELOPE_BYTES, Codec, ExitPolicy, Pipeline, build_policy, load_bundle, offline
from cleave.deployment.bundle.canonical_json import dump
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.restoring import restore, restore_data
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.evaluate import evaluate
from cleave.scripts.export import export
from cleave.scripts.infer import infer
from cleave.scripts.train import train

from .test_scripts_bundle_alone import run_alone
from .training_helpers import DIGITS, PLAIN

BOTTLENECK = ["split.at=layer2", "split.form=insert", "bottleneck={channels: 4, width: 8}", "codec={bits: 4}"]
GIVEN = ["method=exits_joint", "backbone.name=resnet20", *DIGITS, *PLAIN, "exits.at=[layer1,layer2]"]
GIVEN += ["exits.head={convs: 0}", "exits.policy.thresholds=[0.32,0.24]", "trainer.max_epochs=1", *BOTTLENECK]
GIVEN += ["+trainer.limit_train_batches=4", "export=true"]
TEST = ["trainer=cpu", "+trainer.enable_progress_bar=false"]
Tensors = dict[str, torch.Tensor]


class Ran(NamedTuple):
    folder: Path
    checkpoint: Path
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    quiet()
    folder = tmp_path_factory.mktemp("exits")
    metrics = train(compose_config("train", GIVEN, folder))
    return Ran(folder, folder / "checkpoints/best.ckpt", metrics)


def exported(ran: Ran, folder: Path, *overrides: str) -> Path:
    given = [f"ckpt_path={ran.checkpoint}", f"bundle={folder}/bundle", *TEST, *overrides]
    return export(compose_config("export", given, folder))


def policy_file(folder: Path, **settings: Any) -> Path:
    file = folder / "exit_policy.json"
    file.write_bytes(
        dump(build_policy(**{"kind": "margin", "thresholds": [0.12, 0.05], "exits": 3, **settings}).to_dict())
    )
    return file


def sent_before(policy: ExitPolicy, places: Sequence[str], feature: int, codes: int) -> list[int]:
    """Bytes sent of a sample that leaves at each exit: feature, codes, and what a policy knows of exits before."""
    found = [0]
    for exit, content in enumerate((feature, codes)):
        apart = places[exit] != places[exit + 1]
        knows = policy.carries and (exit == 0 or policy.final_needs_state)
        state = [4 * tensor.numel() for tensor in policy.state_behind(exit, 10).values()] if knows else []
        found.append(found[-1] + (sum(ENVELOPE_BYTES + length for length in (content, *state)) if apart else 0))
    return found


def check(ran: Ran, folder: Path) -> None:
    """Hold a bundle, image by image, against its checkpoint's network and the bytes of its bottleneck."""
    bundle, restored = load_bundle(folder), restore(ran.checkpoint)
    network, policy = restored.network, bundle.manifest.policy
    data = restore_data(restored, compose_config("evaluate", [f"ckpt_path={ran.checkpoint}"], Path.cwd()).data)
    data.setup("test")
    right, index, sent, metrics = [], [], [], bundle.manifest.metrics
    places, names = bundle.manifest.exit_placements, network.group("exits")
    with torch.no_grad():
        for batch in data.test_dataloader():
            images, labels = batch["images"], batch["labels"]
            result = Pipeline(bundle).run(images)
            payloads: list[bytes] = []

            def link(cut: str, codec: Codec, tensors: Tensors, payloads: list[bytes] = payloads) -> Tensors:
                assert cut == "layer2"
                payloads += codec.encode(tensors)
                return codec.decode(payloads)

            own = network.outputs(restored.image_input.normalize(images), names, link=link)
            expected = offline(policy, torch.stack([own[name] for name in names]))
            assert torch.equal(result.exits, expected.index)
            torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)
            sent_until = sent_before(policy, places, 4 * 16 * 8 * 8, len(payloads[0]))
            assert result.payload_bytes == [sent_until[left] for left in expected.index.tolist()]
            right += (result.logits.argmax(1) == labels).tolist()
            index += result.exits.tolist()
            sent += result.payload_bytes
    assert set(index) == ({1, 2} if policy.kind == "patience" else {0, 1, 2})
    assert metrics["test/policy/acc"] == pytest.approx(sum(right) / len(right), abs=1e-6)
    assert metrics["test/policy/payload_bytes"] == pytest.approx(sum(sent) / len(sent), rel=1e-6)
    assert metrics["test/payload_bytes"] == max(sent)
    for exit, item in enumerate(bundle.manifest.exits):
        assert metrics[f"test/policy/share/{item.name}"] == pytest.approx(index.count(exit) / len(index), abs=1e-6)
        assert item.accuracy == metrics[f"test/acc_exit/{item.name}"]


def test_training_writes_a_bundle_with_the_policy_it_was_tested_with(ran: Ran) -> None:
    manifest = load_bundle(ran.folder / "bundle").manifest
    assert manifest.policy == build_policy("confidence", [0.32, 0.24], exits=3)
    assert manifest.exit_placements == ("device", "device", "server")
    tested = {name: value for name, value in ran.metrics.items() if name.startswith("test/")}
    assert {name: manifest.metrics[name] for name in tested} == pytest.approx(tested, abs=1e-6)
    check(ran, ran.folder / "bundle")


def test_three_tiers_by_a_policy_from_a_file_send_what_was_measured(ran: Ran, tmp_path: Path, capsys: Any) -> None:
    file = policy_file(tmp_path)
    bundle = exported(ran, tmp_path, f"exits.policy_file={file}", "exits.placements=[device,edge,cloud]")
    printed = capsys.readouterr().out
    manifest = load_bundle(bundle).manifest
    assert manifest.exit_placements == ("device", "edge", "cloud")
    assert manifest.policy.to_dict() == json.loads(file.read_text())
    rows = printed.partition("Exits by margin")[2].splitlines()
    for item, placement in zip(manifest.exits, manifest.exit_placements, strict=True):
        (row,) = [row for row in rows if f" {item.partition} " in row]
        for cell in (item.name, placement, f"{item.macs:,}", f"{item.accuracy:.4f}"):
            assert cell in row
    assert "test/payload_zstd_bytes" not in manifest.metrics
    check(ran, bundle)


def test_a_bundle_with_exits_runs_without_the_training_code(ran: Ran, tmp_path: Path) -> None:
    ((accuracy, payload, lengths),) = run_alone(tmp_path, ran.folder / "bundle", None)
    assert accuracy == pytest.approx(ran.metrics["test/policy/acc"], abs=1e-6)
    assert payload == pytest.approx(ran.metrics["test/policy/payload_bytes"], rel=1e-6)
    assert lengths == 2  # nothing, or the codes


def test_infer_says_where_each_image_left_and_what_that_took(ran: Ran, tmp_path: Path, capsys: Any) -> None:
    capsys.readouterr()
    given = [f"bundle={ran.folder}/bundle", "input=digits", "limit=30", "batch_size=12"]
    predicted = infer(compose_config("infer", given, tmp_path))
    printed = capsys.readouterr().out
    bundle = load_bundle(ran.folder / "bundle")
    data = restore_data(restore(ran.checkpoint), compose_config("evaluate", ["ckpt_path=x"], tmp_path).data)
    result = Pipeline(bundle).run(data.sample_batch("test", 30)["images"])
    assert predicted == [bundle.class_names[i] for i in result.logits.argmax(1).tolist()]
    names = [item.name for item in bundle.manifest.exits]
    rows = [line.split() for line in printed.splitlines() if "│ digit " in line]
    assert [row[-2] for row in rows] == [names[left] for left in result.exits.tolist()]
    costs = torch.tensor([item.macs for item in bundle.manifest.exits], dtype=torch.float64)
    mean = float(costs[result.exits].mean())
    assert f"Per image: {mean:,.0f} MACs ({mean / float(costs[-1]):.1%} of all), " in printed
    assert f"{sum(result.payload_bytes) / 30:,.1f} bytes" in printed
    for exit, name in enumerate(names):
        (row,) = [line for line in printed.splitlines() if f" {name} " in line and "%" in line and "Per" not in line]
        assert f"{float((result.exits == exit).double().mean()):.1%}" in row
    file = policy_file(tmp_path, kind="confidence", thresholds=0.0)
    infer(compose_config("infer", [*given, f"exits.policy_file={file}"], tmp_path))
    assert "100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["exits.placements=[device,server]"],
            "2 names, but there are 3 partitions, which end at layer1, layer2, final",
        ),
        (["exits.placements=[device,server,server]"], "nothing is sent at the split layer2"),
        (["exits.policy_file={folder}/none.json"], "there is no exit policy at"),
        (["exits.policy_file={folder}/damaged.json"], r"damaged\.json cannot be read"),
        (["exits.policy_file={folder}/four/exit_policy.json"], "is for 4 exits, but this network has 3"),
    ],
)
def test_what_cannot_be_exported_is_told_before_any_test(
    ran: Ran, overrides: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damaged.json").write_bytes(policy_file(tmp_path).read_bytes()[:-20])
    (tmp_path / "four").mkdir()
    policy_file(tmp_path / "four", exits=4, thresholds=0.5)
    monkeypatch.setattr("cleave.scripts.export.build_measured", lambda *_, **__: pytest.fail("it went on"))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        exported(ran, tmp_path, *(each.format(folder=tmp_path) for each in overrides))
    assert not (tmp_path / "bundle").exists()


def test_a_route_may_come_back_to_where_it_began(ran: Ran, tmp_path: Path) -> None:
    bundle = exported(ran, tmp_path, "exits.placements=[device,server,device]")
    assert load_bundle(bundle).manifest.exit_placements == ("device", "server", "device")
    check(ran, bundle)


@pytest.mark.parametrize(
    ("kind", "thresholds", "places"),
    [
        ("patience", 1, ["device", "device", "server"]),
        ("ensemble", [0.32, 0.24], ["device", "edge", "cloud"]),
        pytest.param("patience", 1, ["device", "edge", "cloud"], marks=pytest.mark.slow),
        pytest.param("ensemble", [0.32, 0.24], ["device", "device", "server"], marks=pytest.mark.slow),
    ],
)
def test_a_policys_state_crosses_placements_and_is_counted(
    ran: Ran, places: list[str], kind: str, thresholds: Any, tmp_path: Path
) -> None:
    file = policy_file(tmp_path, kind=kind, thresholds=thresholds)
    bundle = exported(ran, tmp_path, f"exits.policy_file={file}", f"exits.placements=[{','.join(places)}]")
    assert load_bundle(bundle).manifest.policy.kind == kind
    check(ran, bundle)


def test_codes_of_another_width_around_exits_are_measured_and_exported(ran: Ran, tmp_path: Path) -> None:
    given = [f"ckpt_path={ran.checkpoint}", "codec.bits=3", *TEST]
    found = evaluate(compose_config("evaluate", given, tmp_path / "evaluate"))
    assert found["test/payload_bytes"] == ENVELOPE_BYTES + 4 * 4 * 4 * 3 / 8
    assert found["test/acc_exit/layer2"] == pytest.approx(ran.metrics["test/acc_exit/layer2"], abs=1e-6)
    assert found["test/loss"] != ran.metrics["test/loss"]
    manifest = load_bundle(exported(ran, tmp_path, "codec.bits=3")).manifest
    assert {name: manifest.metrics[name] for name in found} == pytest.approx(found, abs=1e-6)
    assert manifest.route.codecs["layer2"].bits == 3


def test_ensembled_exits_without_a_policy_are_exported_as_the_network_answers(tmp_path: Path) -> None:
    given = [
        *GIVEN[: GIVEN.index(BOTTLENECK[0])],
        "trainer.max_epochs=1",
        "+trainer.limit_train_batches=4",
        "export=true",
    ]
    given += ["exits.ensemble=true", "exits.policy=null"]
    metrics = train(compose_config("train", given, tmp_path))
    bundle, network = load_bundle(tmp_path / "bundle"), restore(tmp_path / "checkpoints/best.ckpt").network
    assert bundle.manifest.policy.kind == "ensemble"
    images = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
    result = Pipeline(bundle).run(images)
    assert (result.exits == 2).all()
    with torch.no_grad():
        expected = network(bundle.input.normalize(images))
    torch.testing.assert_close(result.logits.log_softmax(1), expected.log_softmax(1), rtol=1e-4, atol=1e-4)
    assert bundle.manifest.metrics["test/acc"] == pytest.approx(metrics["test/acc"])


def test_a_network_without_exits_takes_no_policy(tmp_path: Path, teacher_file: Path) -> None:
    given = [f"ckpt_path={teacher_file}", f"bundle={tmp_path}/bundle", *TEST]
    with pytest.raises(ValueError, match=r"exits\.policy_file=.* the checkpoint's network has no exits"):
        export(compose_config("export", [*given, "exits.policy_file=policy.json"], tmp_path))
    with pytest.raises(ValueError, match=r"placements has 2 names, but there are 1 partitions"):
        export(compose_config("export", [*given, "exits.placements=[device,server]"], tmp_path))
    bundle = export(compose_config("export", [*given, "exits.placements=[phone]"], tmp_path))
    assert [part.placement for part in load_bundle(bundle).manifest.partitions] == ["phone"]
