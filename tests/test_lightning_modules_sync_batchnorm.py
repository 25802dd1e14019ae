import copy

import torch
from torch import nn

from cleave.architectures import create_backbone
from cleave.lightning_modules.sync_batchnorm import SyncBatchNorm


def test_fused_activations_survive_the_conversion_and_back():
    torch.manual_seed(0)
    network = create_backbone("timm", "efficientnet_b0", num_classes=10).network.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
    kinds = [type(m) for m in network.modules()]
    layers = SyncBatchNorm()
    converted = layers.apply(copy.deepcopy(network))
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())
    with torch.no_grad():
        torch.testing.assert_close(converted(images), expected)
        for buffer in converted.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1.5)
        learned = converted(images)
    restored = layers.revert(converted)
    assert [type(m) for m in restored.modules()] == kinds
    with torch.no_grad():
        torch.testing.assert_close(restored(images), learned)
