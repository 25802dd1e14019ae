"""attribute_inference.py and membership_inference.py as a person runs them, and what they refuse."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cleave.architectures import staged_network
from cleave.architectures.attacking.classifiers import attribute_classifier
from cleave.datamodules import Digits
from cleave.lightning_modules import DPSGD, Classification, Training
from cleave.lightning_modules.attacking.training import Schooling
from cleave.reports.attacks.membership import judged, losses
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.assembly.leaks.attributes import AttributeImages, Labelled, attributes_of, inferred
from cleave.scripts.assembly.starting.terminal import quiet
from cleave.scripts.attribute_inference import attribute_inference
from cleave.scripts.export import export
from cleave.scripts.membership_inference import membership_inference
from cleave.scripts.train import train

from .training_helpers import PLAIN, quiet_trainer

NET = ["data=digits", "data.image_size=8", "data.augment=none", "backbone.name=alexnet", "backbone.in_channels=1"]
NET += ["backbone.kwargs={width: 0.1, dropout: 0.0}", "trainer.max_epochs=1", "test=false"]
SPLIT = ["split.at=features.2", "split.form=insert", "bottleneck.channels=4", "bottleneck.width=8"]
PARITY = "attribute.of_class={" + ", ".join(f"{d}: {'odd' if d % 2 else 'even'}" for d in range(10)) + "}"
BRIEF = ["attack.epochs=2", "attack.images=200", "targets.images=80", "resamples=100"]


def trained(folder, *overrides):
    quiet()
    train(compose_config("train", [*PLAIN, *NET, *overrides], folder))
    return folder / "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def half_file(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("half"), *SPLIT, "data.part=1/2")


@pytest.fixture(scope="module")
def other_file(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("other"), "data.part=2/2")


@pytest.fixture(scope="module")
def bundle(half_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    overrides = [f"ckpt_path={half_file}", "trainer=cpu", "+trainer.enable_progress_bar=false"]
    return export(compose_config("export", [*overrides, f"bundle={folder}/bundle"], folder))


def told(name, run, folder, *overrides):
    files = run(compose_config(name, list(overrides), folder))
    return json.loads(files[f"{name}.json"].read_text()), files


def attribute(folder, *overrides):
    return told("attribute_inference", attribute_inference, folder, *overrides)


def membership(folder, *overrides):
    return told("membership_inference", membership_inference, folder, *overrides)


# --- attribute inference -----------------------------------------------------------------------------------------


def test_an_attribute_is_reported_beside_the_majority_and_controls(half_file, tmp_path):
    report, files = attribute(tmp_path, f"ckpt_path={half_file}", PARITY, *BRIEF)
    assert report["attributes"] == ["even", "odd"]
    assert report["images"] == {"train": 200, "val": 179, "targets": 80, "left_out": 0}
    titles = [each["title"] for each in report["attacks"]]
    families = ("linear", "mlp", "conv")
    wanted = [f"{name}, {family}" for name in ("payload", "logits", "raw input") for family in families]
    assert titles == [*wanted[:3], "majority", *wanted[3:]]
    found = [each["accuracy"] for each in report["attacks"]]
    assert all(0 <= each["low"] <= each["value"] <= each["high"] <= 1 for each in found)
    top = max(each["accuracy"]["value"] for each in report["attacks"] if each["role"] == "attacker")
    assert report["headline"]["accuracy"]["value"] == top
    with files["attribute_inference.csv"].open(newline="") as stream:
        assert [row["attack"] for row in csv.DictReader(stream)] == titles


def test_a_bundle_leaks_what_its_checkpoint_does(half_file, bundle, tmp_path):
    cheap = [PARITY, *BRIEF, "attack.families=linear", "controls=[]"]
    ours, _ = attribute(tmp_path / "ours", f"ckpt_path={half_file}", *cheap)
    theirs, _ = attribute(tmp_path / "theirs", f"bundle={bundle}", *cheap)
    mine, other = ours["headline"]["accuracy"], theirs["headline"]["accuracy"]
    assert mine["low"] - 0.02 <= other["value"] <= mine["high"] + 0.02


def test_other_data_give_their_own_labels(half_file, tmp_path):
    more = ["data@attack.data=digits", "attack.data.part=2/2", "attack.families=linear", "controls=[]"]
    report, _ = attribute(tmp_path, f"ckpt_path={half_file}", *more, *BRIEF)
    assert report["attributes"] == [str(digit) for digit in range(10)]


class Sent:
    """What a device sends: the label itself, or noise of its own for every image."""

    def __init__(self, plain):
        self.plain = plain

    def __call__(self, images, times=1):
        if self.plain:
            return nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()
        digest = images.double().flatten(1).sum(1, keepdim=True) * torch.arange(1, 9).double()
        return (digest * 12.9898).sin().mul(43758.5453).frac().float()

    def draws(self, images):
        return False


def images_with(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    attributes = torch.multinomial(torch.tensor([0.2, 0.5, 0.3]), count, replacement=True, generator=generator)
    images[:, 0, 0, 0] = attributes.to(torch.uint8)
    return Labelled(images, attributes)


@pytest.mark.parametrize("plain", [True, False])
def test_an_attribute_in_plain_sight_is_told_and_none_behind_noise(plain):
    attack = {"releases": [1], "families": ["linear", "mlp", "conv"]}
    settings = {"attack": attack, "controls": [], "device": "cpu", "seed": 0, "resamples": 500}
    settings["schooling"] = Schooling(15, 64, 1e-2)
    images = AttributeImages(("a", "b", "c"), images_with(400, 0), images_with(200, 1), images_with(400, 2), 0)
    found = inferred(settings, SimpleNamespace(releases=Sent(plain)), images)
    (majority,) = (each for each in found if each.name == "majority")
    assert majority.accuracy.value == (images.targets.attributes == 1).double().mean()
    for each in found:
        if each.name == "majority":
            continue
        if plain:
            assert each.accuracy.value == 1.0
        else:
            assert each.accuracy.value <= majority.accuracy.high


@pytest.mark.parametrize("shape", [(5,), (3, 4, 4), (7, 6)])
@pytest.mark.parametrize("family", ["linear", "mlp", "conv"])
def test_each_classifier_begins_at_the_shares_and_learns_in_every_layer(family, shape):
    payloads, attributes = torch.randn(12, *shape), torch.arange(12) % 4 // 2 + (torch.arange(12) % 3 == 0).long()
    found = attribute_classifier(family, payloads, attributes, 3)
    shares = torch.bincount(attributes, minlength=3) / 12
    torch.testing.assert_close(found(payloads).softmax(1)[0], shares)
    for _ in range(2):  # behind a last layer of 0 nothing learns in the first step
        nn.functional.cross_entropy(found(payloads), attributes).backward()
        with torch.no_grad():
            for weight in found.parameters():
                weight -= 0.1 * weight.grad
    assert all(weight.grad.abs().sum() > 0 for weight in found.network[-1].parameters())
    first = next(found.parameters())
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"no attribute beside the classes of the task; give attribute\.of_class"),
        (["attribute.of_class={0: a, 1: b}"], r"leaves out 2, 3, 4, 5, 6, 7, 8, 9"),
        ([PARITY.replace("odd", "even")], r"says 'even' of every class"),
        ([PARITY.replace("9: odd", "9: odd, ten: odd")], r"names 'ten', which is no class"),
        (["attribute.of_class=odd"], r"maps classes to attributes.*got 'odd'"),
        ([PARITY, "attack.families=[trees]"], r"attack\.families"),
        ([PARITY, "attack.families=[]"], r"attack\.families is empty"),
        ([PARITY, "attack.releases=[0]"], r"attack\.releases must be whole numbers of at least 1, got 0"),
        ([PARITY, "attack.epochs=0"], r"epochs must be a whole number"),
        ([PARITY, "resamples=0"], r"resamples must be a whole number of at least 1, got 0"),
        ([PARITY, "bundle=somewhere"], r"give one of ckpt_path=FILE and bundle=DIR"),
        ([PARITY, "attack.images=1"], r"training images of 1 attribute\(s\)"),
    ],
)
def test_attribute_settings_are_refused_in_words(half_file, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        attribute(tmp_path, f"ckpt_path={half_file}", *overrides)


def test_a_network_that_sends_nothing_has_no_payload(other_file, tmp_path):
    with pytest.raises(ValueError, match=r"the network is not split"):
        attribute(tmp_path, f"ckpt_path={other_file}", PARITY)


def test_attributes_are_named_in_the_order_of_the_classes():
    names, places = attributes_of(["a", "b", "c"], {"c": "x", "a": "y", "b": "x"})
    assert (names, places.tolist()) == (("y", "x"), [0, 1, 1])


# --- membership inference ----------------------------------------------------------------------------------------


def test_members_are_told_from_the_rest_of_the_training_images(half_file, tmp_path):
    report, files = membership(tmp_path, f"ckpt_path={half_file}", "resamples=100")
    assert (report["members"], report["non_members"], report["source"]) == (630, 629, "rest")
    assert [each["name"] for each in report["attacks"]] == ["loss", "modified entropy"]
    for each in report["attacks"]:
        for figure in ("auc", "tpr"):
            assert 0 <= each[figure]["low"] <= each[figure]["value"] <= each[figure]["high"] <= 1
    with files["membership_inference.csv"].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["auc"] for row in rows] == [repr(each["auc"]["value"]) for each in report["attacks"]]


def test_references_judge_images_that_they_have_not_seen(half_file, other_file, tmp_path):
    more = [f"references={other_file}", "resamples=50"]
    report, _ = membership(tmp_path, f"ckpt_path={half_file}", "non_members.source=test", *more)
    names = ["loss", "modified entropy", "loss against references", "margin against references"]
    assert [each["name"] for each in report["attacks"]] == names
    assert (report["members"], report["non_members"]) == (630, 359)
    with pytest.raises(ValueError, match=r"no non-members are left that some reference has not seen.*source=test"):
        membership(tmp_path, f"ckpt_path={half_file}", *more)
    with pytest.raises(ValueError, match=r"no members are left that some reference has not seen.*data\.part=2/3"):
        membership(tmp_path, f"ckpt_path={half_file}", f"references={half_file}", "non_members.source=test")


def test_networks_that_may_have_seen_everything_are_refused(half_file, other_file, teacher_file, tmp_path):
    from cleave.scripts.assembly.leaks.members import check_origin

    with pytest.raises(ValueError, match=r"backbone\.pretrained=True: public weights may have seen members"):
        check_origin({"backbone": {"pretrained": True}}, "a.ckpt")
    with pytest.raises(ValueError, match=r"backbone\.weights=w\.pth: public weights"):
        check_origin({"backbone": {"weights": "w.pth"}}, "a.ckpt")
    data = torch.load(half_file, weights_only=True)["cleave"]["config"]["data"]
    check_origin({"data": data, "base": {"ckpt_path": str(half_file)}}, "a.ckpt")
    for key, file in (("base", other_file), ("teacher", teacher_file)):
        with pytest.raises(ValueError, match=rf"learned from {key}\.ckpt_path=.*trained on other images"):
            check_origin({"data": data, key: {"ckpt_path": str(file)}}, "a.ckpt")
    with pytest.raises(ValueError, match=r"which is gone, so nobody knows what it saw"):
        check_origin({"base": {"ckpt_path": str(tmp_path / "none.ckpt")}}, "a.ckpt")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ckpt_path=null"], r"give ckpt_path=FILE"),
        (["non_members.source=others"], r"non_members\.source must be rest, test or null, got 'others'"),
        (["members.images=0"], r"members\.images must be a whole number of at least 1, got 0; null takes all"),
        (["resamples=0"], r"resamples must be a whole number"),
        (["seed=-1"], r"seed must be a whole number of at least 0"),
    ],
)
def test_membership_settings_are_refused_in_words(half_file, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        membership(tmp_path, f"ckpt_path={half_file}", *overrides)


def test_a_network_trained_on_everything_has_no_rest(teacher_file, tmp_path):
    with pytest.raises(ValueError, match=r"trained on every training image; train one on half of them, data\.part=1/2"):
        membership(tmp_path, f"ckpt_path={teacher_file}", "non_members.source=rest")


@pytest.mark.slow
def test_an_overtrained_network_gives_its_members_away_and_dp_sgd_hides_them():
    found = {}
    for name, dp in (("plain", None), ("private", DPSGD(noise_multiplier=10.0))):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        network = staged_network(backbone, torch.zeros(2, 1, 8, 8))
        data = Digits(batch_size=30, part="1/20", augment="none", sampling="poisson")
        task = Classification(network, training=Training(dp=dp, seed=1))
        trainer = quiet_trainer(max_epochs=60, limit_val_batches=0)
        trainer.fit(task, datamodule=data)
        scores = []
        for split in ("train", "rest"):
            batch = data.sample_batch(split, 500)
            with torch.no_grad():
                logits = network.eval()(data.input.normalize(batch["images"]))
            scores.append(-losses(logits, batch["labels"]))
        found[name] = judged("loss", *scores, resamples=300)
    assert found["plain"].auc.low > 0.6
    assert found["private"].auc.high < found["plain"].auc.low
    assert found["private"].tpr.value <= found["plain"].tpr.high
