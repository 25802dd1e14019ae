"""Tiny partitions and the bundles made of them, shared by the tests of the deployment room."""

import torch
from torch import nn

from cleave.deployment import (
    Codec,
    Edge,
    EntropyCodec,
    ExitSpec,
    FloatCodec,
    ImageInput,
    OutputSpec,
    Part,
    TensorInput,
    Transfer,
    UniformCodec,
    export_bundle,
)

INPUT = ImageInput(height=8, width=8, color_mode="RGB", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), resize=10)
SHAPE = (4, 4, 4)
CLASSES = ("ant", "bee", "cat", "dog")
OUTPUTS = (OutputSpec("logits", "logits", (4,), CLASSES),)


def sends(tensor):
    return tuple(f"{tensor}.{name}" for name in ("codes", "low", "high"))


def delivers(tensor):
    return (*sends(tensor), f"{tensor}.levels")


SENDS, DELIVERS = sends("cut"), delivers("cut")


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


class Rounding(Encoder):
    """Emits whole numbers, which a learned prior codes."""

    def forward(self, images):
        return (super().forward(images) * 7).round().to(torch.int32)


class Received(Server):
    """Takes whole numbers."""

    def forward(self, codes):
        return super().forward(codes.float())


def entropy_codec():
    """A learned prior under which all of 16 codes are alike."""
    return EntropyCodec(SHAPE, (-8,) * 4, ((4096,) * 16,) * 4)


def entropy_parts():
    return [
        Part("head", "device", Rounding(), ("images",), ("cut.codes",)),
        Part("tail", "server", Received(), ("cut.codes",), ("logits",)),
    ]


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
    return Part("head", "device", module, ("images", "cut.levels"), outputs, macs=1728)


def server_part(inputs=DELIVERS):
    return Part("tail", "server", Server(), inputs, ("logits",))


def edge(producer, consumer, **codecs):
    """An edge of tensors by name; ``None`` hands one over."""
    return Edge(producer, consumer, tuple(Transfer(tensor, codec) for tensor, codec in codecs.items()))


def make_parts(kind):
    """Parts and edges of a route: ``fixed``, ``sample``, ``float``, ``whole`` or ``three``."""
    torch.manual_seed(1)
    if kind == "fixed":
        return [device_part(FixedDevice()), server_part()], [edge("head", "tail", cut=UniformCodec(SHAPE, 4, -1, 1))]
    if kind == "sample":
        return [device_part(SampleDevice()), server_part()], [edge("head", "tail", cut=UniformCodec(SHAPE, 5))]
    if kind == "float":
        head = Part("head", "device", Encoder(), ("images",), ("cut",))
        return [head, server_part(("cut",))], [edge("head", "tail", cut=FloatCodec(SHAPE))]
    if kind == "whole":
        return [Part("all", "device", Whole(), ("images",), ("logits",))], []
    middle = Part("middle", "edge", Middle(), (*DELIVERS, "next.levels"), sends("next"))
    return [device_part(FixedDevice()), middle, server_part(delivers("next"))], [
        edge("head", "middle", cut=UniformCodec(SHAPE, 4, -1, 1)),
        edge("middle", "tail", next=UniformCodec(SHAPE, 6)),
    ]


def codecs_of(edges) -> list[Codec]:
    return [transfer.codec for each in edges for transfer in each.transfers]


def make_bundle(directory, kind="fixed", **settings):
    parts, edges = make_parts(kind)
    arguments = {"input": INPUT, "outputs": OUTPUTS, "images": images(), **settings}
    return export_bundle(directory, parts, edges, **arguments)


# A service that is entered twice


class Finish(nn.Module):
    """Takes what came back, and what stayed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, len(CLASSES))

    def forward(self, back, kept):
        return self.layer((back + kept).mean((2, 3)))


def returning_parts():
    """Local → host → local: the encoder's map stays on the local side, and its sum with what comes back is answered."""
    torch.manual_seed(2)
    parts = [
        Part("begin", "local", Twice(), ("images",), ("kept", "there")),
        Part("help", "host", nn.Conv2d(4, 4, 1), ("there",), ("back",)),
        Part("end", "local", Finish(), ("back", "kept"), ("logits",)),
    ]
    edges = [
        edge("begin", "help", there=FloatCodec(SHAPE)),
        edge("begin", "end", kept=None),
        edge("help", "end", back=FloatCodec(SHAPE)),
    ]
    return parts, edges


class Twice(Encoder):
    def forward(self, images):
        x = super().forward(images)
        return x, 2 * x


# Other inputs and outputs than images and logits

TOKENS = TensorInput(shape=(6,), dtype="int64", name="tokens")


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(16, 4)

    def forward(self, tokens):
        return self.layer(tokens)


class Tag(nn.Module):
    """A map over the tokens, and their scores."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, z):
        scores = self.layer(z)
        return scores.argmax(2), scores.mean(1)


def tokens(count=5):
    return torch.randint(0, 16, (count, 6), generator=torch.Generator().manual_seed(3))


# Early exits: a chain of three layers, with exits behind the first two


class Layer(nn.Module):
    """One layer, the exit behind it, and what is made of codes before and after it.

    Args:
        first: Whether it takes images.
        head: Whether an exit stands behind it; ``cascade``: one that reads the logits of the exit before.
        received: Whether it takes codes.
        sent: Whether it emits codes.
    """

    def __init__(self, first=False, head=True, cascade=False, received=False, sent=False):
        super().__init__()
        self.first, self.cascade, self.received, self.sent = first, cascade, received, sent
        self.layer = nn.Conv2d(1 if first else 4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4 + (len(CLASSES) if cascade else 0), len(CLASSES), bias=False) if head else None

    def forward(self, *tensors):
        tensors = list(tensors)
        before = tensors.pop() if self.cascade else None
        x = dequantize(*tensors[:4]) if self.received else tensors[0]
        x = torch.tanh(3 * self.layer(x.float() / 255 - 0.4 if self.first else x))
        found = quantize(x, x.flatten(1).amin(1), x.flatten(1).amax(1), tensors[-1]) if self.sent else (x,)
        if self.head is None:
            return found
        pooled = x.mean((2, 3))
        return (*found, 30 * self.head(pooled if before is None else torch.cat([pooled, before], 1)))


class Last(nn.Module):
    def __init__(self, cascade=False, received=False):
        super().__init__()
        self.body = Layer(head=True, cascade=cascade, received=received)

    def forward(self, *tensors):
        return self.body(*tensors)[-1]


EXIT_INPUT = ImageInput(height=6, width=6, color_mode="L", mean=(0.4,), std=(0.3,))
EXITS, MAP = ("layer1", "layer2", "final"), (4, 6, 6)


def exit_parts(placements=("device",) * 3, cascade=False, split=None, seed=0, exits=EXITS):
    """Parts, edges and exits of the chain; ``split`` names the layer whose map is sent as codes."""
    torch.manual_seed(seed)
    parts, edges, takes = [], [], ("images",)
    for i, (name, place) in enumerate(zip(EXITS, placements, strict=True)):
        last, has_exit = name == "final", name in exits
        cascades = cascade and i > 0 and has_exit
        codes, coded = name == split, i > 0 and EXITS[i - 1] == split
        module = Last(cascades, coded) if last else Layer(i == 0, has_exit, cascades, received=coded, sent=codes)
        inputs = (*takes, *([f"{name}.levels"] if codes else []))
        earlier = [each for each in EXITS[:i] if each in exits]
        if cascades:
            inputs = (*inputs, f"{earlier[-1]}/logits")
            edges.append((earlier[-1], i, Transfer(f"{earlier[-1]}/logits", FloatCodec((len(CLASSES),)))))
        outputs = () if last else (sends(name) if codes else (name,))
        outputs = (*outputs, *([f"{name}/logits" if not last else "logits"] if has_exit else []))
        parts.append(Part(f"to_{name}", place, module.eval(), inputs, outputs, macs=100))
        if i > 0:
            before = EXITS[i - 1]
            edges.append((before, i, Transfer(before, UniformCodec(MAP, 4) if coded else FloatCodec(MAP))))
        takes = delivers(name) if codes else (name,)
    joined = {}
    for producer, i, transfer in edges:
        joined.setdefault((f"to_{producer}", f"to_{EXITS[i]}"), []).append(transfer)
    specs = [ExitSpec(name, f"to_{name}", 100 * (EXITS.index(name) + 1)) for name in exits]
    return parts, [Edge(*ends, tuple(items)) for ends, items in joined.items()], specs


def exit_images(count=6, seed=0):
    """Noise of differing brightness, so that the exits have something to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, *EXIT_INPUT.shape, generator=generator)
    return (255 * noise * torch.rand(count, 1, 1, 1, generator=generator)).to(torch.uint8)


@torch.no_grad()
def exit_outputs(parts, batch, levels=16):
    """All tensors of the chain by name, no sample leaving."""
    known = {"images": batch}
    for part in parts:
        settings = {name: torch.tensor(levels) for name in part.inputs if name.endswith(".levels")}
        result = part.module(*({**known, **settings}[name] for name in part.inputs))
        results = result if isinstance(result, tuple) else (result,)
        known |= dict(zip(part.outputs, results, strict=True))
    return known


def exit_bundle(directory, policy=None, **settings):
    parts, edges, specs = exit_parts(**settings)
    arguments = {"input": EXIT_INPUT, "outputs": OUTPUTS, "exits": specs, "policy": policy, "images": exit_images()}
    return export_bundle(directory, parts, edges, **arguments)
