from __future__ import annotations

import itertools

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cleave.architectures import (
    CutError,
    Feature,
    Insert,
    Link,
    PacketLoss,
    build_link,
    cut_blocks,
    link_blocks,
    linked_network,
    read_path,
)
from cleave.architectures.linking.feature import describe_feature

from .linked_networks import (
    CLASSES,
    HOST_BLOCKS,
    HOST_SAMPLE,
    LOCAL_BLOCKS,
    LOCAL_SAMPLE,
    Host,
    Local,
    host_blocks,
    images,
    local_blocks,
    seeded,
)

FEATURES = {
    "map": Feature((6, 8, 8), "NCHW", (8, 8), signed=False),
    "odd map": Feature((4, 5, 3), "NCHW", (5, 3)),
    "wide": Feature((2, 16, 4), "NCHW", (16, 4)),
    "channels last": Feature((4, 4, 6), "NHWC", (4, 4)),
    "tokens": Feature((18, 8), "NLC", (4, 4), prefix=2),
    "vector": Feature((8,), "NC", (1, 1)),
}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FEATURES, FEATURES)))
def test_a_link_fits_any_feature_to_any_other(source, target):
    source, target = FEATURES[source], FEATURES[target]
    ways = (("stride", "nearest"), ("max", "bilinear"), ("average", "nearest"))
    for style, (down, up) in itertools.product(("full", "reduced", "separable", "low_rank"), ways):
        link = Link(build_link(source, target, style=style, down=down, up=up), source, target, "host", "host/b")
        x = torch.randn(3, *source.shape, requires_grad=True)
        made = link(x)
        assert made.shape == (3, *target.shape)
        made.square().sum().backward()
        assert all(weight.grad is not None for weight in link.parameters())
        # Of the feature's own tokens only the grid is read.
        read = x.grad[:, source.prefix :] if source.prefix else x.grad
        assert read.abs().sum() > 0
        assert not source.prefix or not x.grad[:, : source.prefix].any()
        # What stands for a feature without negative values has none; the others are not clipped.
        assert bool((made < 0).any()) == target.signed


def test_styles_have_the_layers_that_they_are_named_for():
    source, target = FEATURES["map"], Feature((10, 4, 4), "NCHW", (4, 4))

    def convs(**settings):
        module = build_link(source, target, norm="none", **settings)
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        return [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.groups) for c in layers]

    assert convs() == [(6, 10, 3, 2, 1)]
    assert convs(kernel=5, down="max") == [(6, 10, 5, 1, 1)]
    assert convs(style="reduced") == [(6, 25, 3, 2, 1), (25, 10, 3, 1, 1)]
    assert convs(style="reduced", channels=5) == [(6, 5, 3, 2, 1), (5, 10, 3, 1, 1)]
    assert convs(style="separable") == [(6, 6, 3, 2, 6), (6, 10, 1, 1, 1)]
    assert convs(style="low_rank", channels=2) == [(6, 2, 3, 2, 1), (2, 10, 1, 1, 1)]
    skip = link_blocks(local_blocks(), None, [0, None, None, 4], {"style": "reduced", "channels": 5}).links["local/b0"]
    pooled, first, *_ = skip.module.body
    assert (pooled.output_size, first.stride, type(pooled)) == ((4, 4), (1, 1), nn.AdaptiveMaxPool2d)
    over = link_blocks(local_blocks(), host_blocks(), [0, 4, 4, 4], {"style": "reduced"}).links["local/b0"]
    assert over.module.body[0].stride == (2, 2)
    kinds = [type(layer) for layer in build_link(source, FEATURES["map"], norm="group", activation="gelu").body]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.GELU]


def test_a_low_rank_link_is_one_convolution_of_low_rank():
    link = build_link(FEATURES["map"], FEATURES["odd map"], style="low_rank", channels=2, norm="none").double()
    first, second = [layer for layer in link.body if isinstance(layer, nn.Conv2d)]
    kernel = torch.einsum("or,rikl->oikl", second.weight[:, :, 0, 0], first.weight)
    assert int(torch.linalg.matrix_rank(kernel.flatten(1))) == 2
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    bias = second.bias + second.weight[:, :, 0, 0] @ first.bias
    whole = nn.functional.conv2d(x, kernel, bias, first.stride, first.padding)
    assert torch.allclose(second(first(x)), whole)


@pytest.mark.parametrize(
    ("length", "image", "prefix", "grid"),
    [
        (17, (3, 32, 32), 1, (4, 4)),
        (16, (3, 8, 8), 0, (4, 4)),
        (26, (3, 32, 48), 2, (4, 6)),
        (21, (3, 8, 8), 5, (4, 4)),
    ],
)
def test_tokens_in_front_of_a_grid_are_found(length, image, prefix, grid):
    found = describe_feature(torch.randn(2, length, 4), "NLC", image, "local", "b", None)
    assert (found.prefix, found.size) == (prefix, grid)


def test_a_grid_that_is_not_the_fewest_tokens_can_be_said():
    found = describe_feature(torch.randn(2, 16, 4), "NLC", (3, 8, 8), "local", "b", 7)
    assert (found.prefix, found.size) == (7, (3, 3))
    with pytest.raises(ValueError, match="16 tokens and prefix=8 leave no grid of the form 1:1"):
        describe_feature(torch.randn(2, 16, 4), "NLC", (3, 8, 8), "local", "b", 8)


# --- networks of other kinds -----------------------------------------------------------------------------------------


def vit() -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=CLASSES).eval()


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=32,
        patch_size=2,
        embed_dim=8,
        depths=(1, 1, 1),
        num_heads=(2, 2, 2),
        window_size=4,
        num_classes=CLASSES,
    ).eval()


KINDS = {
    "map": (Local, 8, ["b0", "b2", "b5"]),
    "vit": (vit, 16, ["blocks.0", "blocks.1", "blocks.2"]),
    "swin": (swin, 32, ["layers.0", "layers.1", "layers.2"]),
}


@pytest.mark.parametrize(("local", "host"), [("map", "vit"), ("vit", "map"), ("map", "swin"), ("swin", "map")])
def test_maps_and_tokens_lead_into_each_other(local, host):
    torch.manual_seed(0)
    blocks = []
    for owner, (kind, size, names) in zip(("local", "host"), (KINDS[local], KINDS[host]), strict=True):
        blocks.append(cut_blocks(kind(), torch.randn(2, 3, size, size), names, owner))
    x = torch.randn(2, *blocks[0].sample.shape[1:])
    for path in ([0, 1, 2, 2], [0, 0, 0, 1], [0, 2, 2, 1]):
        network = link_blocks(*blocks, path)
        for name, weight in network.named_weights():
            weight.requires_grad_(".link." in name)
        logits = network(x)
        assert logits.shape == (2, CLASSES)
        logits.sum().backward()
        assert all(weight.grad is not None for weight in network.parameters() if weight.requires_grad)
        entered, left = network.links.values()
        assert (entered.target.prefix > 0) == (host == "vit" and path[1] > 0)
        assert (left.target.prefix > 0) == (local == "vit")
        for link in (entered, left):
            assert (link.module.prefix is not None) == (link.target.prefix > 0)


# --- what a path is made of -------------------------------------------------------------------------------------------


def test_a_path_runs_the_blocks_that_it_names_and_no_others():
    network = link_blocks(local_blocks(), host_blocks(), [1, 2, 3, 5])
    assert network.cuts == ("local/b0", "local/b1", "host/layer2", "host/layer3", "local/b5")
    assert [cost.name for cost in network.left_out] == ["local/b2", "local/b3", "local/b4"]
    names = {name for name, _ in network.named_weights()}
    assert "local.b1.0.weight" in names
    assert not any(name.startswith(("local.b2", "host.layer1", "host.head")) for name in names)
    x = images()
    features = network.outputs(x, ["local/b1/input", "host/layer3/input", "host/layer3", "logits"])
    front = local_blocks().stages.features(x, ["b1"])["b1"]
    assert torch.equal(features["local/b1/input"], front)
    entered = network.links["local/b1"](front)
    middle = host_blocks().stages[3](host_blocks().stages[2](entered.clone()))
    assert torch.equal(features["host/layer3/input"], middle)
    left = network.links["host/layer3"](middle)
    assert torch.equal(features["logits"], local_blocks().stages[6](local_blocks().stages[5](left)))
    assert network.resolve(["links"]) == ("links/local/b1", "links/host/layer3")
    assert set(network.parts()) >= {"local", "host"}


def test_a_path_from_the_images_of_the_host_and_one_of_links_alone():
    network = link_blocks(local_blocks(), host_blocks(), [0, 0, 2, 1])
    assert network.links["local/b0"].target.shape == (3, 12, 12)
    assert network.links["local/b0"].stands_for == "host/images"
    alone = link_blocks(local_blocks(), host_blocks(), [0, 1, 4, 5], use_host=False)
    used = link_blocks(local_blocks(), host_blocks(), [0, 1, 4, 5])
    assert tuple(alone.links) == tuple(used.links) == ("local/b0", "host/layer4")
    assert not any(name.startswith("host") for name, _ in alone.named_weights())
    assert alone(images()).shape == (4, CLASSES)


def test_blocks_are_called_by_any_name_of_their_last_tensor():
    inner = [f"b{i}.2" for i in range(6)]
    network = linked_network(
        seeded(Local), seeded(Host), (LOCAL_SAMPLE, HOST_SAMPLE), (inner, HOST_BLOCKS), ["b1", "layer2", 3, "b4"],
        exits=["local/b0"],
    )  # fmt: skip
    assert network.cuts[:2] == ("local/b0.2", "local/b1.2")
    assert network.exits == ("local/b0.2", "final")
    spread_out = cut_blocks(seeded(Local), LOCAL_SAMPLE, 3, "local")
    assert len(spread_out.names) == 3


def test_two_services_share_a_host_that_neither_changes():
    services = [link_blocks(cut_blocks(seeded(Local), LOCAL_SAMPLE, LOCAL_BLOCKS, "local"), host_blocks(), path)
                for path in ([0, 1, 4, 5], [1, 1, 3, 3])]  # fmt: skip
    assert services[0].stages[1].host is services[1].stages[2].host
    first, second = services
    for network in services:
        for part in ("local", "host"):
            for module in network.parts()[part]:
                module.requires_grad_(False).eval()
    expected = first.eval()(images())
    second.train()
    for part in ("local", "host"):
        for module in second.parts()[part]:
            module.eval()
    optimizer = torch.optim.SGD([w for w in second.parameters() if w.requires_grad], lr=0.5)
    second(images()).square().sum().backward()
    optimizer.step()
    assert torch.equal(first(images()), expected)


class Noise(Insert):
    kind = "noise"

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


def test_whatever_stands_behind_a_layer_stands_on_a_crossing_too():
    torch.manual_seed(0)
    network = linked_network(
        seeded(Local),
        seeded(Host),
        (LOCAL_SAMPLE, HOST_SAMPLE),
        (LOCAL_BLOCKS, HOST_BLOCKS),
        [0, 1, 4, 5],
        {"style": "reduced", "channels": 5},
        split=["local/b0", "host/layer4"],
        bottleneck={"channels": 2, "width": 4},
        codec={"bits": 4},
        channel=PacketLoss(0.3, packet_elements=4),
        exits=["local/b0", "host/layer2", "host/layer4", "local/b5"],
        exit_head={"convs": 0, "grid": 2},
        cascade=True,
        inserts={"host/layer2": [Noise()], "local/b0": [Noise()]},
    ).train()  # fmt: skip
    assert network.exits == ("local/b0", "host/layer2", "host/layer4", "local/b5", "final")
    # On the local side the encoder, on the host the decoder and both links, on the local side again the decoder.
    sides = {(op.cut, op.step.kind or op.step.method): op.side for op in network.ops}
    assert [sides["local/b0", kind] for kind in ("encoder", "decoder", "link")] == ["local", "host", "host"]
    assert [sides["host/layer4", kind] for kind in ("link", "encoder", "decoder")] == ["host", "host", "local"]
    assert sides["host/layer4", "exit"] == "host"
    names = [*network.group("exits"), "local/b0/received"]
    found = network.outputs(images(8), names)
    sum(value.square().sum() for value in found.values()).backward()
    for part in ("encoder/local/b0", "decoder/local/b0", "links", "encoder/host/layer4", "exits/host/layer2"):
        for name in network.resolve([part]):
            assert all(w.grad is not None for module in network.parts()[name] for w in module.parameters()), name
    assert network.bits("local/b0") == 4


def test_a_crossing_that_nothing_is_said_of_sends_its_feature_and_can_be_given_codes():
    network = link_blocks(local_blocks(), host_blocks(), [0, 1, 4, 5]).eval()
    plain = network(images())
    assert {cut: bottleneck.bits for cut, bottleneck in network.bottlenecks.items()} == {
        "local/b0": 32,
        "host/layer4": 32,
    }
    assert network.bottlenecks["host/layer4"].shape == tuple(local_blocks().features["b4"].shape[1:])
    for cut in network.bottlenecks:
        network.calibrate([images()], cut, 8)
    coded = network(images())
    assert not torch.equal(plain, coded)
    assert torch.allclose(plain, coded, atol=0.05 * float(plain.detach().abs().max()))


def test_exits_stand_at_even_shares_of_a_path():
    given = ((LOCAL_SAMPLE, HOST_SAMPLE), (LOCAL_BLOCKS, HOST_BLOCKS), [0, 1, 4, 5])
    network = linked_network(seeded(Local), seeded(Host), *given, exits_count=2, exit_head={"convs": 0, "grid": 1})
    stages = [cost for cost in network.costs() if cost.kind == "stage"][:-1]
    work = dict(zip((cost.name for cost in stages), itertools.accumulate(cost.macs for cost in stages), strict=True))
    total = work["local/b5"]

    def distance(names):
        return sum(abs(work[name] - total * share / 3) for share, name in enumerate(names, 1))

    best = min(itertools.combinations(work, 2), key=distance)
    assert network.exits == (*best, "final")
    with pytest.raises(ValueError, match="give either exits or exits_count"):
        linked(exits=["local/b0"], exits_count=2)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ([2, 0, 0, 2], "lin=2, which must come behind lout=2"),
        ([3, 0, 0, 1], "lin=1, which must come behind lout=3"),
        ([0, 3, 2, 4], "hin=3 behind hout=2"),
        ([0, 1, 2, 6], "lin=6, which is no local block"),
        ([-1, 1, 2, 5], "lout=-1, which is no local block"),
        ([0, 1, 9, 5], "hout=9, which is no host block"),
        ([0, True, 2, 5], "hin=True, which is no host block"),
        ([0, 1.0, 2, 5], "hin=1.0, which is no host block"),
        (["b9", 1, 2, 5], "lout='b9', which is no local block; they are 0 b0, 1 b1"),
        ([1, None, None, 2], "skips nothing"),
        ([2, None, None, 1], "lin=1, which must come behind lout=2"),
        ([0, None, 2, 5], "hin and hout both, or neither"),
        ([None, 1, 2, 5], "must name lout and lin"),
        ([0, 1, 5], "must be four blocks"),
        ("0115", "must be four blocks"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path, told):
    with pytest.raises(ValueError, match=told):
        read_path(path, LOCAL_BLOCKS, HOST_BLOCKS)
    with pytest.raises(ValueError, match=told):
        link_blocks(local_blocks(), host_blocks(), path)


def linked(**changes):
    given = {
        "local": seeded(Local),
        "host": seeded(Host),
        "samples": (LOCAL_SAMPLE, HOST_SAMPLE),
        "blocks": (LOCAL_BLOCKS, HOST_BLOCKS),
        "path": [0, 1, 2, 3],
    }
    return linked_network(**(given | changes))


def test_what_cannot_be_linked_is_refused_in_words():
    one = seeded(Local)
    with pytest.raises(ValueError, match="local and host are one network"):
        linked(local=one, host=one, blocks=(LOCAL_BLOCKS, LOCAL_BLOCKS))
    with pytest.raises(ValueError, match="local and host are one network"):
        link_blocks(local_blocks(), local_blocks(), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="leads over a host, but there is none"):
        linked(host=None)
    with pytest.raises(ValueError, match="use_host=False has no meaning for path=\\[0, -, -, 3\\], a skip-connection"):
        linked(host=None, path=[0, None, None, 3], use_host=False)
    with pytest.raises(ValueError, match=r"path=\[0, None, None, 3\] is a skip-connection, on which no host runs"):
        linked(path=[0, None, None, 3])
    with pytest.raises((CutError, ValueError), match="host network cannot be cut .* images of 12×12.*host.image_size"):
        linked(host=vit(), blocks=(LOCAL_BLOCKS, ["blocks.0", "blocks.1"]), path=[0, 1, 1, 3])
    with pytest.raises(ValueError, match="'b0' must say whose layer it is, such as local/b0"):
        linked(exits=["b0"])
    with pytest.raises(ValueError, match="'local/b2' is not on the path \\[0, 1, 2, 3\\], whose layers are local/b0"):
        linked(exits=["local/b2"])
    with pytest.raises(ValueError, match="local blocks must be a list of layers or their number, got"):
        linked(blocks=("b0", HOST_BLOCKS))
    with pytest.raises(ValueError, match="blocks must be two"):
        linked(blocks=LOCAL_BLOCKS)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"style": "fulls"}, "style must be one of full.*Did you mean 'full'"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"down": "conv"}, "down must be one of"),
        ({"up": "deconv"}, "up must be one of"),
        ({"kernel": 2}, "kernel must be odd"),
        ({"kernel": 0}, "kernel must be a whole number"),
        ({"channels": 5}, "channels=5 has no meaning for style=full"),
        ({"style": "reduced", "channels": 0}, "channels must be a whole number"),
        (lambda source, target: nn.Identity(), "nothing to learn: Identity has no trainable"),
        (lambda source, target: nn.Conv2d(3, 3, 1), "must make .* of .*, but makes"),
    ],
)
def test_links_that_cannot_be_built_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        link_blocks(local_blocks(), host_blocks(), [0, 1, 2, 3], settings)


class Folded(nn.Module):
    """Its features have samples and time steps in one dimension, which no link can tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 6)
        self.back = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.unflatten(1, (1, 3)).permute(0, 3, 2, 1, 4))
        return self.back(x.mean((1, 2, 3)))


def test_a_feature_that_no_link_fits_is_refused():
    with pytest.raises(ValueError, match=r"no link fits the feature of host/stem, .* of layout 'other'"):
        linked(host=Folded(), blocks=(LOCAL_BLOCKS, ["stem"]), path=[0, 0, 0, 3])
