"""Tiny partitions and the bundles made of them, shared by the tests of the deployment room."""

import torch
from torch import nn

from cleave.deployment import FloatCodec, ImageInput, Part, UniformCodec, export_bundle

INPUT = ImageInput(height=8, width=8, color_mode="RGB", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), resize=10)
SHAPE = (4, 4, 4)
CLASSES = ("ant", "bee", "cat", "ant")
SENDS, DELIVERS = ("codes", "low", "high"), ("codes", "low", "high", "levels")


def quantize(z, low, high, levels):
    shape = (-1, *[1] * (z.ndim - 1))
    step = (high - low) / (levels - 1)
    codes = ((z - low.view(shape)) / step.view(shape)).round().clamp_min(0)
    return torch.minimum(codes, (levels - 1).float()).to(torch.int32), low, high


def dequantize(codes, low, high, levels):
    shape = (-1, *[1] * (codes.ndim - 1))
    return low.view(shape) + codes.float() * ((high - low) / (levels - 1)).view(shape)


class Encoder(nn.Module):
    """Normalise and encode: what device partitions have in common."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(INPUT.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(INPUT.std).view(-1, 1, 1))
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Tanh())

    def forward(self, images):
        return self.layers((images.float() / 255 - self.mean) / self.std)


class FixedDevice(Encoder):
    """One range for all samples."""

    def __init__(self, low=-1.0, high=1.0):
        super().__init__()
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    def forward(self, images, levels):
        z = super().forward(images)
        row = z.flatten(1)[:, 0]
        return quantize(z, self.low.expand_as(row), self.high.expand_as(row), levels)


class SampleDevice(Encoder):
    """Each sample's own range."""

    def forward(self, images, levels):
        z = super().forward(images)
        return quantize(z, z.flatten(1).amin(1), z.flatten(1).amax(1), levels)


class Server(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, len(CLASSES)))

    def forward(self, *received):
        return self.layers(dequantize(*received) if len(received) > 1 else received[0])


class Middle(nn.Module):
    """Takes codes and emits codes of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, codes, low, high, levels, next_levels):
        z = self.layer(dequantize(codes, low, high, levels))
        return quantize(z, z.flatten(1).amin(1), z.flatten(1).amax(1), next_levels)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.server = Encoder(), Server()

    def forward(self, images):
        return self.server(self.encoder(images))


def images(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *INPUT.shape), dtype=torch.uint8, generator=generator)


def device_part(module, outputs=SENDS):
    return Part("head", "device", module, ("images", "levels"), outputs, macs=1728)


def server_part(inputs=DELIVERS):
    return Part("tail", "server", Server(), inputs, ("logits",))


def make_parts(kind):
    """Parts and codecs of a route: ``fixed``, ``sample``, ``float``, ``whole`` or ``three``."""
    torch.manual_seed(1)
    if kind == "fixed":
        return [device_part(FixedDevice()), server_part()], [UniformCodec(SHAPE, 4, -1.0, 1.0)]
    if kind == "sample":
        return [device_part(SampleDevice()), server_part()], [UniformCodec(SHAPE, 5)]
    if kind == "float":
        return [Part("head", "device", Encoder(), ("images",), ("z",)), server_part(("z",))], [FloatCodec(SHAPE)]
    if kind == "whole":
        return [Part("all", "device", Whole(), ("images",), ("logits",))], []
    middle = Part("middle", "edge", Middle(), (*DELIVERS, "next_levels"), SENDS)
    return [device_part(FixedDevice()), middle, server_part()], [UniformCodec(SHAPE, 4, -1, 1), UniformCodec(SHAPE, 6)]


def make_bundle(directory, kind="fixed", **settings):
    parts, codecs = make_parts(kind)
    arguments = {"image_input": INPUT, "class_names": CLASSES, "images": images(), **settings}
    return export_bundle(directory, parts, codecs, **arguments)
