import pytest
import torch
from torch import nn

from cleave.architectures import recalibrate_batchnorm


def test_statistics_are_the_average_over_the_batches_and_nothing_else_moves():
    before = nn.BatchNorm2d(3)
    part = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    network = nn.Sequential(before, part)
    network.train()
    before.eval()
    part[2].eval()
    weights = {k: v.clone() for k, v in network.state_dict().items() if "running" not in k and "num" not in k}
    batches = [torch.randn(8, 3, 5, 5) * (i + 1) for i in range(3)]
    assert recalibrate_batchnorm(network, part, iter(batches)) == 1
    outputs = [part[0](nn.functional.batch_norm(b, torch.zeros(3), torch.ones(3))).detach() for b in batches]
    mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    variance = torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0)
    torch.testing.assert_close(part[1].running_mean, mean)
    torch.testing.assert_close(part[1].running_var, variance)
    assert before.num_batches_tracked == 0
    assert part[1].momentum == 0.1
    assert [m.training for m in (network, before, part[1], part[2])] == [True, False, True, False]
    assert all(torch.equal(network.state_dict()[k], v) for k, v in weights.items())


def test_nothing_to_measure_reads_no_batch():
    network = nn.Linear(3, 3)
    assert recalibrate_batchnorm(network, network, iter(())) == 0


def test_no_batches_are_refused():
    network = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batchnorm(network, network, [])
