from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from cleave.architectures.cutting.layouts import DimTracker, layout_of
from cleave.architectures.cutting.stages import cut

tv = torchvision.models

NETWORKS = {
    "resnet": (tv.resnet18, 64, {"conv1": "NCHW", "layer2.0": "NCHW", "layer4": "NCHW", "avgpool": "NCHW", "fc": "NC"}),
    "swin of torchvision": (
        lambda: tv.SwinTransformer([4, 4], 24, [2, 2], [1, 2], [7, 7]),
        56,
        {"features.0.0": "NCHW", "features.0": "NHWC", "features.1.1": "NHWC", "features.2": "NHWC", "permute": "NCHW"},
    ),
    "swin of timm": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), img_size=64, window_size=4),
        64,
        {"patch_embed": "NHWC", "layers.0": "NHWC", "layers.3": "NHWC", "norm": "NHWC", "head.global_pool": "NC"},
    ),
    "vit of torchvision": (
        lambda: tv.VisionTransformer(32, 8, 2, 2, 16, 32),
        32,
        {"encoder.layers.encoder_layer_0": "NLC", "encoder": "NLC"},
    ),
    "vit of timm": (
        # 16 tokens and 16 channels: shapes say nothing
        lambda: timm.create_model(
            "vit_tiny_patch16_224",
            img_size=64,
            embed_dim=16,
            num_heads=2,
            depth=2,
            class_token=False,
            global_pool="avg",
        ),
        64,
        {"patch_embed.proj": "NCHW", "patch_embed": "NLC", "blocks.0": "NLC", "norm": "NLC", "fc_norm": "NC"},
    ),
    "convnext": (
        lambda: tv.ConvNeXt([tv.convnext.CNBlockConfig(8, 16, 1), tv.convnext.CNBlockConfig(16, None, 1)]),
        32,
        {"features.0": "NCHW", "features.1.0": "NCHW", "features.2": "NCHW", "features.3": "NCHW", "avgpool": "NCHW"},
    ),
    "maxvit": (
        lambda: tv.MaxVit((56, 56), 16, 7, [16, 32], [1, 1], 16, 0.2),
        56,
        {
            "stem": "NCHW",
            "blocks.0.layers.0.layers.MBconv": "NCHW",
            "blocks.0.layers.0.layers.window_attention.partition_op": "other",
            "blocks.0.layers.0.layers.grid_attention.partition_swap": "other",
            "blocks.0.layers.0": "NCHW",
            "blocks.1": "NCHW",
        },
    ),
    "poolformer": (
        lambda: timm.create_model("poolformer_s12"),
        64,
        {"stem": "NCHW", "stages.0": "NCHW", "stages.2": "NCHW"},
    ),
    "mixer": (
        # square in tokens and channels again; its first layers mix tokens
        lambda: timm.models.mlp_mixer.MlpMixer(img_size=128, patch_size=32, embed_dim=16, num_blocks=2),
        128,
        {"stem": "NLC", "blocks.0": "NLC", "blocks.1": "NLC", "norm": "NLC"},
    ),
    "pvt": (
        lambda: timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)),
        64,
        {"patch_embed": "NHWC", "stages.0": "NCHW", "stages.2": "NCHW"},
    ),
    "xcit": (
        lambda: timm.create_model("xcit_nano_12_p16_224", depth=2, img_size=64),
        64,
        {"blocks.1": "NLC", "norm": "NLC"},
    ),
}


@pytest.mark.parametrize("family", NETWORKS)
def test_layouts_of_networks(family):
    build, size, expected = NETWORKS[family]
    torch.manual_seed(0)
    sample = torch.randn(1, 3, size, size)
    stages = cut(build(), expected, sample)
    assert dict(zip(stages.names, stages.layouts, strict=True)) == expected


def follow(function, *shape: int) -> str:
    x = torch.zeros(shape)
    with torch.no_grad(), DimTracker() as channels:
        channels.start(x)
        return layout_of(function(x), channels, batch=shape[0])


SIDE = 8  # images (2, 8, 8, 8) and tokens (2, 64, 8): nothing can be told from lengths
OPERATIONS = {
    "nothing": (lambda x: x, "NCHW"),
    "elementwise": (lambda x: (x + 1).relu_() * x.sigmoid(), "NCHW"),
    "convolution": (nn.Conv2d(8, 8, 3, padding=1), "NCHW"),
    "pooling": (nn.AvgPool2d(3, 1, 1), "NCHW"),
    "concatenation": (lambda x: torch.cat([x, x], 1), "NCHW"),
    "interpolation": (lambda x: F.interpolate(x, scale_factor=2), "NCHW"),
    "padding and slicing": (lambda x: F.pad(x, (1, 1, 1, 1))[:, :, 2:, ::2], "NCHW"),
    "permute": (lambda x: x.permute(0, 2, 3, 1), "NHWC"),
    "permute with negative dims": (lambda x: x.permute(0, -2, -1, -3), "NHWC"),
    "back and forth": (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), "NCHW"),
    "columns before rows": (lambda x: x.transpose(1, 3), "other"),
    "width first": (lambda x: x.transpose(1, 2), "other"),
    "tokens": (lambda x: x.flatten(2).transpose(1, 2), "NLC"),
    "tokens behind channels": (lambda x: x.flatten(2), "other"),
    "tokens with a class token": (lambda x: torch.cat([torch.zeros(2, 1, 8), x.flatten(2).mT], 1), "NLC"),
    "tokens to a map": (lambda x: x.flatten(2).mT.mT.reshape(2, 8, 8, 8), "NCHW"),
    "channels last through linear": (lambda x: nn.Linear(8, 8)(x.permute(0, 2, 3, 1)), "NHWC"),
    "mixing positions by linear": (lambda x: nn.Linear(8, 8)(x), "NCHW"),
    "mixing tokens by linear": (lambda x: nn.Linear(64, 64)(x.flatten(2)).mT, "NLC"),
    "layer norm": (lambda x: nn.LayerNorm(8)(x.permute(0, 2, 3, 1)), "NHWC"),
    "windows": (lambda x: x.view(2, 8, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(8, 8, 4, 4), "other"),
    "windows beside samples": (
        lambda x: x.view(2, 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 4, 16, 8),
        "other",
    ),
    "windows and a shortcut": (
        lambda x: x.permute(0, 2, 3, 1) + x.view(2, 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 8, 8, 8),
        "NHWC",
    ),
    "class token there and gone": (
        lambda x: F.pad(x.flatten(2).mT, (0, 0, 1, 0))[:, 1:].mT.reshape(2, 8, 8, 8),
        "NCHW",
    ),
    "patch merging": (
        lambda x: nn.Linear(32, 16)(x.view(2, 8, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 4, 4, 32)),
        "NHWC",
    ),
    "patch merging before the linear layer": (
        lambda x: x.view(2, 8, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 4, 4, 32),
        "NHWC",
    ),
    "windows there and back": (
        lambda x: (
            x.view(2, 8, 2, 4, 2, 4)
            .permute(0, 2, 4, 3, 5, 1)
            .reshape(8, 16, 8)
            .view(2, 2, 2, 4, 4, 8)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(2, 8, 8, 8)
        ),
        "NHWC",
    ),
    "attention in windows and back": (
        lambda x: (
            _attention(x.view(2, 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(8, 16, 8))
            .view(2, 2, 2, 4, 4, 8)
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(2, 8, 8, 8)
        ),
        "NCHW",
    ),
    "one token": (lambda x: x.flatten(2).mT[:, 0], "NC"),
    "pooled": (lambda x: x.mean((2, 3)), "NC"),
    "pooled, dims kept": (lambda x: x.mean((2, 3), keepdim=True), "NCHW"),
    "attention": (lambda x: _attention(x.flatten(2).mT), "NLC"),
    "five dimensions": (lambda x: x.unsqueeze(2), "other"),
}


def _attention(x: Tensor) -> Tensor:
    """Two heads, by the fused kernel and by products."""
    q, k, v = nn.Linear(8, 24)(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    fused = F.scaled_dot_product_attention(q, k, v)
    mixed = fused + (q @ k.mT).softmax(-1) @ v
    return nn.Linear(8, 8)(mixed.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_channels_are_followed_through_operations_where_lengths_tell_nothing(operation):
    function, expected = OPERATIONS[operation]
    assert follow(function, 2, SIDE, SIDE, SIDE) == expected


def test_a_tensor_of_unknown_origin_has_no_layout():
    with DimTracker() as channels:
        assert layout_of(torch.zeros(2, 8, 8, 8), channels, batch=2) == "other"
        assert layout_of(torch.zeros(2, 8), channels, batch=2) == "NC"
        assert layout_of(torch.zeros(8), channels, batch=8) == "other"
