import copy
import itertools

import pytest
import torch
from pytorch_lightning.plugins.layer_sync import LayerSync
from timm.layers import BatchNormAct2d
from torch import nn

from cleave.architectures.inserts.switchable import SwitchableBatchNorm2d, draw_width, select, switchable
from cleave.deployment.bundle.torchscript import load_torchscript, save_torchscript
from cleave.deployment.bundle.writing.data_dependence import data_dependent_lines

WIDTHS = (2, 4, 8)


class Server(nn.Module):
    """The receiving side of a split, whose width is an input."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, x, levels):
        select(self.decoder, levels)
        return self.decoder(x)


def decoder(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU(inplace=True), nn.Sequential(norm(4)))


def batch(width):
    return torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(width)) * width + width


def trained(norm=nn.BatchNorm2d):
    """A switchable decoder whose sets differ in all they hold."""
    module = switchable(decoder(norm), WIDTHS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for width in WIDTHS:
            select(module, width)
            for _ in range(4):
                module(batch(width))
    return module.eval()


def layers_of(module):
    return [part for part in module.modules() if isinstance(part, SwitchableBatchNorm2d)]


def plain(module, width):
    """The decoder with ordinary BatchNorm that holds one width's set."""
    copied = copy.deepcopy(module)
    for name, part in list(copied.named_modules()):
        if isinstance(part, SwitchableBatchNorm2d):
            copied.set_submodule(name, part.sets[str(width)])
    return copied


def test_every_batchnorm_is_replaced_and_starts_from_what_it_was():
    module = decoder()
    module(batch(4))
    before = copy.deepcopy(module)
    assert switchable(module, (8, 2, 4)) is module
    assert len(layers_of(module)) == 2
    assert all(layer.widths == WIDTHS and list(layer.sets) == ["2", "4", "8"] for layer in layers_of(module))
    for width in WIDTHS:
        select(module, width)
        x = batch(width)
        assert torch.equal(module.eval()(x), before.eval()(x))
        expected = before.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in plain(module, width).state_dict().items())
    pointers = [p.data_ptr() for layer in layers_of(module) for p in layer.parameters()]
    assert len(set(pointers)) == 2 * 3 * 2


def test_a_single_layer_is_returned_and_a_shared_one_stays_shared():
    assert isinstance(switchable(nn.BatchNorm2d(3), WIDTHS), SwitchableBatchNorm2d)
    norm = nn.BatchNorm2d(3)
    module = switchable(nn.ModuleList([norm, nn.Sequential(norm)]), WIDTHS)
    assert module[0] is module[1][0]
    linear = nn.Linear(3, 3)
    assert switchable(linear, WIDTHS) is linear


def test_mode_frozenness_and_settings_are_kept():
    norm = nn.BatchNorm2d(3, eps=1e-2, momentum=0.4).eval().requires_grad_(False)
    layer = switchable(norm, WIDTHS)
    assert not layer.training
    assert all((s.eps, s.momentum, s.training) == (1e-2, 0.4, False) for s in layer.sets.values())
    assert not any(p.requires_grad for p in layer.parameters())


def test_training_moves_the_chosen_set_alone():
    module = switchable(decoder(), WIDTHS)
    reference = decoder()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    select(module, 4)
    module(batch(4)).square().sum().backward()
    reference(batch(4)).square().sum().backward()
    for width in (2, 8):
        for key in [k for k in before if f"sets.{width}." in k]:
            assert torch.equal(module.state_dict()[key], before[key])
        assert all(p.grad is None for layer in layers_of(module) for p in layer.sets[str(width)].parameters())
    chosen = plain(module, 4)
    assert all(torch.equal(v, chosen.state_dict()[k]) for k, v in reference.state_dict().items())
    for ours, theirs in zip(plain(module, 4).parameters(), reference.parameters(), strict=True):
        assert ours.shape == theirs.shape
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    expected = [p.grad for p in reference.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("width", WIDTHS)
def test_both_ways_to_choose_equal_an_ordinary_batchnorm(norm, width):
    module = trained(norm)
    x = batch(5)
    expected = plain(module, width)(x)
    others = [plain(module, other)(x) for other in WIDTHS if other != width]
    assert all((expected - other).abs().max() > 1e-2 for other in others)
    select(module, width)
    assert torch.equal(module(x), expected)
    select(module, torch.tensor(2**width))
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("asked", "taken"), [(2, 2), (3, 4), (4, 4), (5, 4), (6, 8), (7, 8), (9, 8), (16, 8)])
def test_an_unseen_width_takes_the_nearest_trained_one(asked, taken):
    module = trained()
    x = batch(5)
    expected = plain(module, taken)(x)
    select(module, asked)
    assert torch.equal(module(x), expected)
    select(module, torch.tensor(2**asked))
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"affine": False}, {"track_running_stats": False}, {"affine": False, "track_running_stats": False}]
)
def test_layers_without_affine_parameters_or_statistics(settings):
    layer = switchable(nn.BatchNorm2d(3, **settings), WIDTHS).eval()
    x = batch(2)
    torch.testing.assert_close(layer.select(torch.tensor(4))(x), layer.select(2)(x), rtol=0, atol=0)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_a_trace_switches_at_run_time(tmp_path, norm):
    module = trained(norm)
    server = Server(module).eval()
    x = batch(5)
    assert data_dependent_lines(server, (x, torch.tensor(16))) == []
    for again in range(2):  # what a trace leaves behind must not reach the next one
        save_torchscript(server, (x[:2], torch.tensor(2 ** (4 + again))), tmp_path / "server.pt")
        loaded = load_torchscript((tmp_path / "server.pt").read_bytes())
        for bits in range(2, 17):
            select(module, bits)
            torch.testing.assert_close(loaded(x, torch.tensor(2**bits)), module(x), rtol=1e-6, atol=1e-6)
    select(module, 2)
    assert torch.equal(module(x), plain(module, 2)(x))


def test_the_choice_is_not_saved_and_copies_choose_alone():
    module = trained()
    keys = set(module.state_dict())
    select(module, torch.tensor(4))
    assert set(module.state_dict()) == keys
    assert not any("_bits" in key or "_selected" in key for key in keys)
    other = copy.deepcopy(module)
    select(other, 8)
    x = batch(3)
    torch.testing.assert_close(module(x), plain(module, 2)(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(other(x), plain(module, 8)(x))
    fresh = switchable(decoder(), WIDTHS)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh.eval()(x), plain(module, 8)(x))  # the largest width until another is chosen


def test_half_precision_and_autocast():
    module = trained().bfloat16()
    x = batch(3).bfloat16()
    select(module, 4)
    expected = module(x)
    select(module, torch.tensor(16))
    torch.testing.assert_close(module(x), expected)
    module.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        looked_up = module(x.float())
        select(module, 4)
        torch.testing.assert_close(looked_up, module(x.float()))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_conversion_to_synchronised_batchnorm_and_back(norm):
    from cleave.lightning_modules.sync_batchnorm import SyncBatchNorm

    module = trained(norm)
    x = batch(3)
    select(module, 2)
    expected = module(x)
    sync: LayerSync = SyncBatchNorm()
    converted = sync.apply(module)
    assert all(isinstance(s, nn.SyncBatchNorm) for layer in layers_of(converted) for s in layer.sets.values())
    torch.testing.assert_close(converted(x), expected)
    select(converted, 4)
    restored = sync.revert(converted)
    assert all(type(s) is norm for layer in layers_of(restored) for s in layer.sets.values())
    select(restored, 2)
    assert torch.equal(restored(x), expected)


def test_training_refuses_a_tensor_and_a_width_it_does_not_have():
    module = switchable(decoder(), WIDTHS)
    with pytest.raises(ValueError, match=r"one of its widths \(2, 4, 8\) in bits, got 3; select one"):
        select(module, 3)
    with pytest.raises(ValueError, match=r"got the tensor torch.int64"):
        select(module, torch.tensor(16))
    select(module.eval(), torch.tensor(16))
    with pytest.raises(ValueError, match=r"in training .* got a tensor"):
        module.train()(batch(2))


@pytest.mark.parametrize("widths", [(), (4,), (2, 2, 8), (1, 4), (4, 17), (4, 32), (2.0, 4), ("2", "4"), (True, 4)])
def test_bad_widths_are_refused(widths):
    with pytest.raises(ValueError, match="bits"):
        switchable(nn.Linear(2, 2), widths)


def test_other_refusals():
    module = switchable(decoder(), WIDTHS)
    with pytest.raises(ValueError, match="switchable already"):
        switchable(module, (2, 3))
    with pytest.raises(ValueError, match="bits"):
        select(module, 1)

    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="got Scaled"):
        switchable(nn.Sequential(Scaled(3)), WIDTHS)


def test_widths_are_drawn_evenly_by_step_and_move_no_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = [draw_width(WIDTHS, 0, epoch, step) for epoch in range(3) for step in range(1000)]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn == [draw_width(WIDTHS, 0, epoch, step) for epoch in range(3) for step in range(1000)]
    assert drawn != [draw_width(WIDTHS, 1, epoch, step) for epoch in range(3) for step in range(1000)]
    expected, deviation = 1000, (3000 * 2 / 9) ** 0.5
    assert all(abs(drawn.count(width) - expected) < 4.5 * deviation for width in WIDTHS)
    following = sum(a == b for a, b in itertools.pairwise(drawn))
    assert abs(following - 3000 / 3) < 4.5 * deviation  # no memory of the step before
