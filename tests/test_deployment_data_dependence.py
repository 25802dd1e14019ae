import pytest
import torch
from torch import nn

from cleave.deployment.bundle.writing.data_dependence import data_dependent_lines


class Reads(nn.Module):
    """Calls a function in its forward, beside buffers that no input reaches."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, x, levels):
        return self.function(self, x, levels)


def through_a_buffer(m, x, n):
    buffer = torch.zeros(4)
    buffer[1:2] = x.sum()
    return x if buffer.max() > 0 else -x


HARMFUL = {
    "branch": lambda m, x, n: x if x.mean() > 0 else -x,
    "item": lambda m, x, n: x * x.max().item(),
    "int": lambda m, x, n: x * int(n),
    "equal": lambda m, x, n: x if torch.equal(x, x.abs()) else -x,
    "shape of a copy": lambda m, x, n: torch.zeros(int(x.sum().clone().detach())),
    "buffer": through_a_buffer,
}
HARMLESS = {
    "shape": lambda m, x, n: x.view(x.shape[0], -1) if x.shape[2] > 4 else x.flatten(1),
    "size": lambda m, x, n: x * int(torch.tensor(x.shape[1])),
    "parameter": lambda m, x, n: x if m.flag else -x,
    "counter": lambda m, x, n: m.norm(x) * m.norm.num_batches_tracked.item(),
    "tensor": lambda m, x, n: torch.where(x.mean() > 0, x, -x) * n,
    "constant": lambda m, x, n: x * torch.arange(4).sum().item(),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_reading_a_value_is_found(name):
    lines = data_dependent_lines(Reads(HARMFUL[name]).eval(), [torch.rand(2, 3, 8, 8), torch.tensor(4)])
    assert len(lines) == 1
    assert "test_deployment_data_dependence.py" in lines[0]


@pytest.mark.parametrize("name", HARMLESS)
def test_reading_shapes_parameters_and_constants_is_harmless(name):
    assert data_dependent_lines(Reads(HARMLESS[name]).eval(), [torch.rand(2, 3, 8, 8), torch.tensor(4)]) == []
