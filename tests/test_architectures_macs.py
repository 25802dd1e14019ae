from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cleave.architectures.macs import count_macs, count_params, counting_macs


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        # out_channels · out_h · out_w · in_channels / groups · k²
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (1, 3, 16, 16), 8 * 8 * 8 * 3 * 9),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), (1, 8, 7, 7), 8 * 7 * 7 * 25),
        # Every input value meets every weight of its channel once.
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 5 * 5 * 6 * 4),
        (nn.Linear(10, 7), (1, 10), 70),
        (nn.Linear(10, 7, bias=False), (2, 5, 10), 2 * 5 * 70),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), (1, 3, 4, 4), 4 * 16 * 3),
    ],
)
def test_layers_cost_what_their_closed_form_says(layer, shape, expected):
    assert count_macs(layer, torch.zeros(shape)) == expected


def test_multi_head_attention_counts_projections_scores_and_mixing():
    dim, heads, length = 16, 4, 9
    attention = nn.MultiheadAttention(dim, heads, batch_first=True)
    x = torch.zeros(2, length, dim)

    def closed_form(batch: int) -> int:
        return batch * (3 * length * dim * dim + 2 * length * length * dim + length * dim * dim)

    wrapped = _SelfAttention(attention)
    assert count_macs(wrapped, x) == closed_form(2)
    fused = torch.backends.mha.get_fastpath_enabled()
    assert fused  # the fused kernel, of which torch's counter knows nothing, is back on


class _SelfAttention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_counting_leaves_the_module_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    network.train()
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    count_macs(network, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in network] == [True, False, True]
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in network.parameters())


def test_modes_are_restored_when_the_forward_fails():
    network = nn.Sequential(nn.Linear(3, 4)).train()
    with pytest.raises(RuntimeError):
        count_macs(network, torch.zeros(1, 5))
    assert network.training
    assert network[0].training
    assert torch.backends.mha.get_fastpath_enabled()


SMALL = {
    "resnet18": torchvision.models.resnet18,
    "vit": lambda: torchvision.models.VisionTransformer(64, 16, 2, 2, 16, 32),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [1, 2], [7, 7]),
    "shufflenet": torchvision.models.shufflenet_v2_x0_5,
}


@pytest.mark.parametrize("name", SMALL)
def test_count_is_half_of_what_torch_counts(name):
    network = SMALL[name]().eval()
    image = torch.zeros(1, 3, 64, 64)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            network(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert 2 * count_macs(network, image) == flops.get_total_flops()


def test_a_network_whose_modules_take_parameters_is_counted():
    """Torch's counter fails here: it hooks onto gradients of what a module takes."""
    network = timm.create_model("cait_xxs24_224", depth=1, img_size=32, embed_dim=48)
    assert count_macs(network, torch.zeros(1, 3, 32, 32)) > 0


def test_running_total_grows_with_what_runs():
    layer = nn.Linear(3, 4)
    with torch.no_grad(), counting_macs() as counter:
        layer(torch.zeros(1, 3))
        first = counter.total
        layer(torch.zeros(1, 3))
    assert (first, counter.total) == (12, 24)


def test_shared_parameters_count_once_and_buffers_do_not():
    layer = nn.Linear(3, 4)
    assert count_params(layer) == 16
    assert count_params(nn.Sequential(layer, layer)) == 16
    assert count_params(nn.BatchNorm2d(5)) == 10
