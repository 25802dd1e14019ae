import logging
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from cleave.architectures.backbones.weights import STATE_KEYS, WeightsError, load_weights, strip_prefix
from cleave.architectures.backbones.zoo import CifarResNet


class Net(nn.Module):
    def __init__(self, num_classes: int = 4, channels: int = 3, width: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bn(self.stem(x)).mean((2, 3)))


def same(a: nn.Module, b: nn.Module, but: tuple[str, ...] = ()) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[key], right[key]) for key in left if key not in but)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.pt"


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "network.", "_orig_mod.", "module._orig_mod.", "a.b.c."])
@pytest.mark.parametrize("key", [None, *STATE_KEYS])
def test_finds_the_state_dict_and_strips_the_prefix(file, prefix, key):
    source, network = Net(), Net()
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save(state if key is None else {"epoch": 3, key: state, "best": 0.5}, file)
    report = load_weights(network, file)
    assert same(source, network)
    assert (report.path, report.classifier, report.summed, report.ignored) == (file, (), (), ())


def test_data_parallel_file_keeps_version_metadata(file):
    # MNASNet refuses a state dict without its version, which DataParallel files keep one level down.
    source, network = torchvision.models.mnasnet0_5(num_classes=3), torchvision.models.mnasnet0_5(num_classes=3)
    torch.save(nn.DataParallel(source).state_dict(), file)
    load_weights(network, file)
    assert same(source, network)
    torch.save(dict(source.state_dict()), file)
    load_weights(network, file)


def test_old_names_are_translated_by_the_network(file):
    # Vision transformers saved before version 2 call their layers linear_1 and linear_2.
    def build() -> nn.Module:
        return torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=3)

    source, network = build(), build()
    old = OrderedDict(
        (k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."), v)
        for k, v in source.state_dict().items()
    )
    assert any("linear_1" in key for key in old)
    torch.save(old, file)
    load_weights(network, file)
    assert same(source, network)


def test_a_prefix_that_the_network_has_itself_stays(file):
    source, network = nn.Sequential(OrderedDict(model=Net())), nn.Sequential(OrderedDict(model=Net()))
    torch.save({"module." + name: value for name, value in source.state_dict().items()}, file)
    load_weights(network, file)
    assert same(source, network)


def test_strip_prefix_leaves_strangers_alone():
    state = {"a.x": torch.zeros(1), "b.x": torch.zeros(1)}
    assert strip_prefix(state, {}, ["c.x"])[0].keys() == state.keys()
    assert strip_prefix({"x": torch.zeros(1)}, {}, ["y"])[0].keys() == {"x"}


def test_safetensors(tmp_path):
    source, network = Net(), Net()
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"module." + k: v for k, v in source.state_dict().items()}, path)
    load_weights(network, path)
    assert same(source, network)


def test_files_without_batchnorm_counters_load(file):
    source, network = CifarResNet(8), CifarResNet(8)
    state = {f"module.{k}": v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"state_dict": state, "best_prec1": 91.7}, file)
    load_weights(network, file)
    assert same(source, network)


def test_classifier_of_another_class_count_keeps_its_initial_values(file, caplog):
    source, network = Net(num_classes=7), Net(num_classes=4)
    initial = network.head.weight.detach().clone()
    torch.save(source.state_dict(), file)
    with caplog.at_level(logging.INFO, logger="cleave.architectures.backbones.weights"):
        report = load_weights(network, file)
    assert report.classifier == ("head.weight", "head.bias")
    assert "head.weight, head.bias has another class count" in caplog.text
    assert torch.equal(network.head.weight, initial)
    assert same(source, network, but=report.classifier)


def test_only_the_classifier_may_have_another_size(file):
    torch.save(Net(width=6).state_dict(), file)
    with pytest.raises(WeightsError) as error:
        load_weights(Net(), file, architecture="timm netty")
    text = str(error.value)
    assert f"{file} is not a checkpoint of timm netty" in text
    assert "stem.weight: file (6, 3, 3, 3), network (5, 3, 3, 3)" in text
    assert "head.weight: file (4, 6), network (4, 5)" in text
    torch.save({**Net().state_dict(), "stem.bias": torch.zeros(9)}, file)
    with pytest.raises(WeightsError, match=r"1 of the wrong shape: stem.bias: file \(9,\), network \(5,\)"):
        load_weights(Net(), file)


def test_mismatch_lists_missing_and_unexpected_bounded(file):
    state = Net().state_dict()
    del state["bn.weight"]
    torch.save({**state, "extra.weight": torch.zeros(2)}, file)
    with pytest.raises(WeightsError, match=r"1 missing: bn.weight\n  1 unexpected: extra.weight$"):
        load_weights(Net(), file)
    torch.save(CifarResNet(20).state_dict(), file)
    with pytest.raises(WeightsError, match=r"8 missing: stem.weight, .*\n  \d+ unexpected: .* and \d+ more$") as error:
        load_weights(Net(), file)
    assert len(str(error.value)) < 1200
    assert "Net" in str(error.value)


def test_missing_classifier_is_a_mismatch(file):
    torch.save({k: v for k, v in Net().state_dict().items() if not k.startswith("head")}, file)
    with pytest.raises(WeightsError, match=r"2 missing: head.weight, head.bias"):
        load_weights(Net(), file)


def test_named_classifiers(file):
    source, network = Net(num_classes=7), Net(num_classes=4)
    torch.save(source.state_dict(), file)
    assert load_weights(network, file, classifier=["head"]).classifier == ("head.weight", "head.bias")
    with pytest.raises(WeightsError, match="2 of the wrong shape"):
        load_weights(network, file, classifier="bn")


def test_rgb_kernels_are_summed_for_grey_images(file, caplog):
    source, network = Net(channels=3).eval(), Net(channels=1).eval()
    torch.save(source.state_dict(), file)
    with caplog.at_level(logging.INFO, logger="cleave.architectures.backbones.weights"):
        assert load_weights(network, file).summed == ("stem",)
    assert "summed for grey" in caplog.text
    grey = torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(network(grey), source(grey.expand(-1, 3, -1, -1)))
    torch.save(Net(channels=1).state_dict(), file)  # a grey file in an RGB network stays an error
    with pytest.raises(WeightsError, match=r"stem.weight: file \(5, 1, 3, 3\), network \(5, 3, 3, 3\)"):
        load_weights(Net(), file)


def test_ignored_and_renamed_keys(file):
    source, network = Net(), Net()
    state = {k.replace("stem", "steem"): v for k, v in source.state_dict().items()}
    torch.save({**state, "aux.weight": torch.zeros(3)}, file)
    report = load_weights(network, file, ignore=["aux."], rename=lambda key: key.replace("steem", "stem"))
    assert report.ignored == ("aux.weight",)
    assert same(source, network)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("hacked"),))


def write_truncated(path: Path) -> None:
    torch.save(CifarResNet(8).state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_torchscript(path: Path) -> None:
    torch.jit.script(nn.ReLU()).save(str(path))


@pytest.mark.parametrize(
    "write",
    [
        write_truncated,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("epoch,acc\n1,0.5\n"),
        lambda path: path.write_bytes(b"\x80\x04N."),
        lambda path: path.write_bytes(pickle.dumps({"state_dict": Evil()})),
        lambda path: torch.save({"state_dict": Net().state_dict(), "args": Evil()}, path),
        lambda path: torch.save(Net(), path),
        write_torchscript,
    ],
    ids=["truncated", "empty", "text", "no-tensors", "pickle-code", "zip-code", "whole-module", "torchscript"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_bad_files_name_the_file_and_run_no_code(file, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(file)
    with pytest.raises(WeightsError, match=r"weights\.pt (cannot be read|is not a plain checkpoint|holds no state)"):
        load_weights(Net(), file)
    assert not (tmp_path / "hacked").exists()


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(Net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"w\.safetensors cannot be read as a checkpoint"):
        load_weights(Net(), path)


@pytest.mark.parametrize(
    "checkpoint", [{}, {"epoch": 1, "weights": {"a": torch.zeros(1)}}, [torch.zeros(1)], {"state_dict": {}}, {3: 4}]
)
def test_files_without_a_state_dict(file, checkpoint):
    torch.save(checkpoint, file)
    with pytest.raises(WeightsError, match=r"weights\.pt holds no state dict: looked for .*model_state_dict.*; found"):
        load_weights(Net(), file)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(WeightsError, match=r"no weights file at .*nowhere\.pt$"):
        load_weights(Net(), tmp_path / "nowhere.pt")
    with pytest.raises(WeightsError, match=r"it is a folder"):
        load_weights(Net(), tmp_path)


def test_a_network_that_refuses_is_named(file):
    class Stubborn(Net):
        def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
            raise ValueError("not today")

    torch.save(Net().state_dict(), file)
    with pytest.raises(WeightsError, match=r"weights\.pt does not fit Stubborn: not today"):
        load_weights(Stubborn(), file)
