"""Sides of a bundle: a device that encodes and stops, a server that goes on, tiers, and a service entered twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from cleave.deployment import (
    ENVELOPE_BYTES,
    BundleError,
    CodecError,
    FloatCodec,
    Message,
    OutputSpec,
    Part,
    Pipeline,
    Side,
    TensorInput,
    UniformCodec,
    build_policy,
    export_bundle,
    load_bundle,
)

from .deployment_networks import (
    CLASSES,
    INPUT,
    OUTPUTS,
    SHAPE,
    TOKENS,
    Embed,
    Encoder,
    FixedDevice,
    Server,
    Tag,
    device_part,
    edge,
    exit_bundle,
    exit_images,
    images,
    make_bundle,
    returning_parts,
    sends,
    server_part,
    tokens,
)


def only(folder: Path, target: Path, placement: str) -> Path:
    """Copy the manifest and one side's files."""
    manifest = load_bundle(folder).manifest
    target.mkdir()
    names = [spec.file.file for spec in manifest.at(placement)]
    for name in ("manifest.json", manifest.samples[placement].file, *names):
        shutil.copy(folder / name, target / name)
    return target


# --- loading one side -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fixed", "sample", "float", "three"])
def test_each_side_loads_and_tests_itself_from_its_own_files(tmp_path, kind):
    bundle = make_bundle(tmp_path / "bundle", kind)
    for placement in bundle.manifest.route.placements:
        folder = only(tmp_path / "bundle", tmp_path / placement, placement)
        side = load_bundle(folder, placement=placement)
        assert side.placements == (placement,)
        assert set(side.partitions) == {spec.name for spec in side.manifest.at(placement)}
        assert ("images" in side.samples[placement]) == (placement == "device")
        assert side.self_test().max_difference == 0
        with pytest.raises(BundleError, match="is missing"):
            load_bundle(folder)
        with pytest.raises(BundleError, match="a pipeline needs all placements, but .* was not loaded; take a Side"):
            Pipeline(side)


def test_another_sides_files_are_not_looked_at(tmp_path):
    make_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "tail.pt").write_bytes(b"damaged")
    assert load_bundle(tmp_path / "bundle", placement="device").placements == ("device",)
    with pytest.raises(BundleError, match="tail.pt has 7 bytes"):
        load_bundle(tmp_path / "bundle", placement="server")


def test_a_placement_that_the_bundle_lacks_is_named_with_those_it_has(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    message = "this bundle has no placement 'sever'; it has device, server. Did you mean 'server'"
    with pytest.raises(BundleError, match=message):
        load_bundle(tmp_path / "bundle", placement="sever")
    with pytest.raises(BundleError, match=message):
        Side(bundle, "sever")
    with pytest.raises(BundleError, match="server was not loaded; loaded is device"):
        Side(load_bundle(tmp_path / "bundle", placement="device"), "server")


# --- a device and a server ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 7])
@pytest.mark.parametrize("kind", ["fixed", "sample"])
def test_a_device_encodes_and_stops_and_a_server_goes_on(tmp_path, kind, bits):
    bundle = make_bundle(tmp_path / "bundle", kind)
    expected = Pipeline(bundle, bits=bits).run(images())
    device, server = (
        Side(load_bundle(only(tmp_path / "bundle", tmp_path / place, place), placement=place), place, bits=bits)
        for place in ("device", "server")
    )
    sent = device.run(images(), request="a")
    assert list(sent.messages) == ["server"]
    assert (sent.rows, sent.outputs, device.waiting) == ((), {}, ())
    message = sent.messages["server"]
    assert message.rows == (0, 1, 2, 3, 4)
    assert message.payloads == expected.payloads
    answered = server.run(message, request="a")
    assert answered.rows == message.rows
    assert torch.equal(answered.outputs["logits"], expected.logits)
    assert (answered.messages, server.waiting) == ({}, ())
    assert list(sent.part_seconds) == ["head"]
    assert list(answered.decode_seconds) == [("cut", "server")]


def test_what_a_side_does_not_take_is_named(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    device, server = Side(bundle, "device"), Side(bundle, "server")
    message = device.run(images(2), request=1).messages["server"]
    with pytest.raises(BundleError, match="nothing on server takes images; it takes cut"):
        server.run(images(2), request=1)
    with pytest.raises(BundleError, match="nothing on device takes cut; it takes images"):
        device.run(message, request=2)
    with pytest.raises(CodecError, match="payload 1 of 43 bytes is damaged"):
        server.run(message._replace(payloads={"cut": [message.payloads["cut"][0], message.payloads["cut"][1][1:]]}), 1)
    with pytest.raises(BundleError, match="cut has 1 payloads for 2 samples"):
        server.run(message._replace(payloads={"cut": message.payloads["cut"][:1]}), 1)
    with pytest.raises(BundleError, match="rows must rise"):
        server.run(message._replace(rows=(1, 0)), 1)
    with pytest.raises(ValueError, match="limit must be a whole number of at least 1, got 0"):
        Side(bundle, "server", limit=0)
    assert server.waiting == ()
    assert server.run(message, 1).rows == (0, 1)


def test_a_lossy_link_can_be_tried(tmp_path):
    class Damaging(UniformCodec):
        def decode(self, payloads):
            return {name: 0 * x if name == "codes" else x for name, x in super().decode(payloads).items()}

    bundle = make_bundle(tmp_path / "bundle")
    damaged = Pipeline(bundle, codecs={"cut": Damaging(SHAPE, 4, -1.0, 1.0)}).run(images())
    assert len(damaged.logits.unique(dim=0)) == 1
    assert damaged.payloads == Pipeline(bundle).run(images()).payloads
    with pytest.raises(BundleError, match="no tensor 'cat' is sent; sent are cut. Did you mean 'cut'"):
        Pipeline(bundle, codecs={"cat": FloatCodec(SHAPE)})


# --- tiers with exits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["confidence", "patience", "ensemble"])
@pytest.mark.parametrize("cascade", [False, True])
def test_three_tiers_in_three_folders_answer_as_one_pipeline(tmp_path, kind, cascade):
    policy = build_policy(kind, 1 if kind == "patience" else 0.6, exits=3)
    placements = ("device", "edge", "cloud")
    settings = {"placements": placements, "cascade": cascade, "split": "layer1", "seed": 112 if cascade else 3}
    bundle = exit_bundle(tmp_path / "bundle", policy, **settings)
    batch = exit_images(40, seed=4)
    expected = Pipeline(bundle).run(batch)
    assert len(expected.exits.unique()) > 1
    sides = {
        place: Side(load_bundle(only(tmp_path / "bundle", tmp_path / place, place), placement=place), place)
        for place in placements
    }
    logits, exits, sent = torch.zeros_like(expected.logits), torch.zeros(40, dtype=torch.int64), [0] * 40
    waiting = [("device", batch)]
    while waiting:
        place, arrived = waiting.pop()
        outcome = sides[place].run(arrived, request=5)
        for row, answer, left in zip(outcome.rows, outcome.outputs.get("logits", ()), outcome.exits, strict=True):
            logits[row], exits[row] = answer, left
        for message in outcome.messages.values():
            for payloads in message.payloads.values():
                for row, payload in zip(message.rows, payloads, strict=True):
                    sent[row] += len(payload)
        waiting += outcome.messages.items()
    assert torch.equal(logits, expected.logits)
    assert torch.equal(exits, expected.exits)
    assert sent == expected.payload_bytes
    assert all(side.waiting == () for side in sides.values())


def test_nothing_leaves_where_all_are_answered(tmp_path):
    bundle = exit_bundle(tmp_path / "bundle", build_policy("confidence", 0.0, exits=3), placements=("a", "b", "c"))
    outcome = Side(bundle, "a").run(exit_images(4), request=0)
    assert (outcome.rows, outcome.exits, outcome.messages) == ((0, 1, 2, 3), (0, 0, 0, 0), {})


# --- a service that is entered twice --------------------------------------------------------------------------------


@pytest.fixture
def returning(tmp_path):
    parts, edges = returning_parts()
    bundle = export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    return bundle, [part.module.eval() for part in parts]


def test_a_service_is_entered_twice(returning, tmp_path):
    bundle, (begin, help_, end) = returning
    assert bundle.manifest.route.placements == ("local", "host")
    with torch.no_grad():
        kept, there = begin(images())
        expected = end(help_(there), kept)
    result = Pipeline(bundle).run(images())
    torch.testing.assert_close(result.logits, expected)
    assert result.payload_bytes == [2 * (ENVELOPE_BYTES + 4 * 64)] * 5
    assert list(result.payloads) == ["there", "back"]
    local, host = (
        Side(load_bundle(only(bundle.directory, tmp_path / place, place), placement=place), place)
        for place in ("local", "host")
    )
    first = {name: local.run(images(seed=i), request=name).messages["host"] for i, name in enumerate("ab")}
    assert local.waiting == ("a", "b")
    back = host.run(first["a"], request="a").messages["local"]
    assert host.waiting == ()
    answered = local.run(back, request="a")
    assert torch.equal(answered.outputs["logits"], result.logits)
    assert local.waiting == ("b",)
    with pytest.raises(BundleError, match="nothing on local takes there; it takes images, back"):
        local.run(first["b"], request="b")


def test_samples_that_do_not_come_back_are_dropped_from_what_waits(returning):
    bundle, _ = returning
    local, host = Side(bundle, "local"), Side(bundle, "host")
    sent = local.run(images(), request=1).messages["host"]
    rows, places = (0, 3), [0, 3]
    fewer = Message(rows, {"there": [sent.payloads["there"][place] for place in places]})
    answered = local.run(host.run(fewer, request=1).messages["local"], request=1)
    assert answered.rows == rows
    torch.testing.assert_close(answered.outputs["logits"], Pipeline(bundle).run(images()).logits[places])


def test_a_request_is_not_answered_twice_and_waits_in_bounded_number(returning):
    bundle, _ = returning
    local = Side(bundle, "local", limit=2)
    for request in range(4):
        local.run(images(1), request=request)
    assert local.waiting == (2, 3)
    with pytest.raises(BundleError, match="images has come to local before for this request"):
        local.run(images(1), request=3)
    assert local.waiting == (2, 3)
    local.forget(2)
    local.forget("unknown")
    assert local.waiting == (3,)


def test_each_side_of_a_returning_route_tests_itself(returning):
    bundle, _ = returning
    for placement in ("local", "host"):
        assert load_bundle(bundle.directory, placement=placement).self_test().max_difference == 0
    assert set(bundle.samples["local"]) == {"images", "kept", "there", "back", "logits"}
    assert set(bundle.samples["host"]) == {"there", "back"}


# --- several consumers ----------------------------------------------------------------------------------------------


class Count(nn.Module):
    """Means of maps."""

    def __init__(self, inputs):
        super().__init__()
        self.layer = nn.Linear(4 * inputs, len(CLASSES))

    def forward(self, *maps):
        return self.layer(torch.cat([x.mean((2, 3)) for x in maps], 1))


def test_a_tensor_with_several_consumers_in_a_placement_is_sent_once(tmp_path):
    torch.manual_seed(0)
    parts = [
        Part("head", "device", Encoder(), ("images",), ("x",)),
        Part("one", "server", nn.Conv2d(4, 4, 1), ("x",), ("y",)),
        Part("aside", "edge", nn.Conv2d(4, 4, 1), ("x",), ("w",)),
        Part("two", "server", Count(3), ("x", "y", "w"), ("logits",)),
    ]
    float_x = FloatCodec(SHAPE)
    edges = [
        edge("head", "one", x=float_x),
        edge("head", "two", x=float_x),
        edge("head", "aside", x=float_x),
        edge("one", "two", y=float_x),
        edge("aside", "two", w=float_x),
    ]
    bundle = export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    result = Pipeline(bundle).run(images())
    assert list(result.payloads) == ["x@server", "x@edge", "w"]
    assert result.payload_bytes == [3 * (ENVELOPE_BYTES + 4 * 64)] * 5
    with torch.no_grad():
        x = parts[0].module.eval()(images())
        expected = parts[3].module(x, parts[1].module(x), parts[2].module(x))
    torch.testing.assert_close(result.logits, expected)
    edges[1] = edge("head", "two", x=FloatCodec((4, 4, 5)))
    with pytest.raises(BundleError, match="x is sent by two different codecs"):
        export_bundle(tmp_path / "other", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())


def test_an_earlier_partition_reaches_past_the_next(tmp_path):
    """Codes and the device's own map both go to the server, the map around the edge."""

    class Both(FixedDevice):
        def forward(self, images, levels):
            return (*super().forward(images, levels), Encoder.forward(self, images))

    class End(Server):
        def forward(self, y, z):
            return super().forward(y + z)

    class Middle(nn.Module):
        def forward(self, codes, low, high, levels):
            return codes.float() / (levels - 1)

    torch.manual_seed(0)
    parts = [
        Part("head", "device", Both(), ("images", "cut.levels"), (*sends("cut"), "z")),
        Part("middle", "edge", Middle(), ("cut.codes", "cut.low", "cut.high", "cut.levels"), ("y",)),
        Part("tail", "server", End(), ("y", "z"), ("logits",)),
    ]
    edges = [
        edge("head", "middle", cut=UniformCodec(SHAPE, 4, -1, 1)),
        edge("middle", "tail", y=FloatCodec(SHAPE)),
        edge("head", "tail", z=FloatCodec(SHAPE)),
    ]
    bundle = export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    result = Pipeline(bundle).run(images())
    assert result.payload_bytes == [3 * ENVELOPE_BYTES + 32 + 256 + 256] * 5
    assert bundle.self_test().max_difference == 0
    server = Side(bundle, "server")
    sent = Side(bundle, "device").run(images(), request=0).messages
    assert server.run(sent["server"], request=0).rows == ()
    assert server.waiting == (0,)
    onward = Side(bundle, "edge").run(sent["edge"], request=0).messages["server"]
    assert torch.equal(server.run(onward, request=0).outputs["logits"], result.logits)


def test_later_partitions_may_take_a_codecs_levels(tmp_path):
    """What changes with the number of levels behind the decoder takes it from the codec that its side knows."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, len(CLASSES))

        def forward(self, x, levels):
            return self.layer(x.flatten(1)) * levels

    class Decode(nn.Module):
        def forward(self, codes, low, high, levels):
            return codes.float() / (levels - 1)

    torch.manual_seed(0)
    parts = [
        device_part(FixedDevice()),
        Part("middle", "edge", Decode(), ("cut.codes", "cut.low", "cut.high", "cut.levels"), ("y",)),
        Part("tail", "server", Scaled(), ("y", "cut.levels"), ("logits",)),
    ]
    edges = [edge("head", "middle", cut=UniformCodec(SHAPE, 4, -1, 1)), edge("middle", "tail", y=FloatCodec(SHAPE))]
    bundle = export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    for bits in (2, 4, 8):
        result = Pipeline(bundle, bits=bits).run(images())
        with torch.no_grad():
            codes, low, high = parts[0].module.eval()(images(), torch.tensor(2**bits))
            y = parts[1].module(codes, low, high, torch.tensor(2**bits))
            expected = parts[2].module(y, torch.tensor(2**bits))
        torch.testing.assert_close(result.logits, expected)


# --- other inputs and outputs than images and logits ----------------------------------------------------------------


def test_a_network_on_token_ids_with_several_outputs(tmp_path):
    torch.manual_seed(0)
    embed, tag = Embed(), Tag()
    parts = [
        Part("embed", "device", embed, ("tokens",), ("z",)),
        Part("tag", "server", tag, ("z",), ("output/tags", "output/scores")),
    ]
    outputs = [OutputSpec("output/tags", "tokens", ("length",)), OutputSpec("output/scores", "logits", (3,), "abc")]
    edges = [edge("embed", "tag", z=FloatCodec((6, 4)))]
    bundle = export_bundle(tmp_path / "bundle", parts, edges, input=TOKENS, outputs=outputs, images=tokens())
    assert load_bundle(tmp_path / "bundle").input == TOKENS
    assert bundle.manifest.outputs[1].class_names == bundle.class_names == ("a", "b", "c")
    assert bundle.manifest.partitions[1].outputs[0].shape == (-1, -1)
    assert bundle.self_test().max_difference == 0
    result = Pipeline(bundle).run(tokens(3))
    with torch.no_grad():
        tags, scores = tag(embed(tokens(3)))
    assert torch.equal(result.outputs["output/tags"], tags)
    torch.testing.assert_close(result.outputs["output/scores"], scores)
    assert result.payload_bytes == [ENVELOPE_BYTES + 4 * 24] * 3
    with pytest.raises(BundleError, match="this network has no logits; its outputs are output/tags, output/scores"):
        _ = result.logits
    with pytest.raises(BundleError, match=r"takes tokens, int64 \[6\], not image files"):
        Pipeline(bundle).run_files(["cat.jpg"])
    with pytest.raises(BundleError, match="tokens must be int64"):
        Pipeline(bundle).run(tokens(3).int())


def test_a_dense_map_runs_through_the_pipeline(tmp_path):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(4, 3, 1)

        def forward(self, z):
            return nn.functional.interpolate(self.layer(z), scale_factor=2.0)

    torch.manual_seed(0)
    parts = [
        Part("head", "device", Encoder(), ("images",), ("z",)),
        Part("tail", "server", Dense(), ("z",), ("logits",)),
    ]
    outputs = [OutputSpec("logits", "map", (3, 8, 8), ("sky", "road", "tree"))]
    edges = [edge("head", "tail", z=FloatCodec(SHAPE))]
    bundle = export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=outputs, images=images())
    result = Pipeline(bundle).run(images())
    assert result.logits.shape == (5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(result.logits, parts[1].module(parts[0].module.eval()(images())))
    assert bundle.class_names == ("sky", "road", "tree")


def test_outputs_in_several_placements(tmp_path):
    torch.manual_seed(0)

    class Two(Encoder):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, images):
            x = super().forward(images)
            return x, self.head(x.mean((2, 3)))

    parts = [Part("head", "device", Two(), ("images",), ("cut", "output/quick")), server_part(("cut",))]
    outputs = [*OUTPUTS, OutputSpec("output/quick", "tensor", (2,))]
    edges = [edge("head", "tail", cut=FloatCodec(SHAPE))]
    bundle = export_bundle(tmp_path / "bundle", parts, edges, input=INPUT, outputs=outputs, images=images())
    result = Pipeline(bundle).run(images())
    assert {name: tuple(x.shape) for name, x in result.outputs.items()} == {"logits": (5, 4), "output/quick": (5, 2)}
    first = Side(bundle, "device").run(images(), request=1)
    assert (first.rows, list(first.outputs), list(first.messages)) == ((0, 1, 2, 3, 4), ["output/quick"], ["server"])


def test_no_samples_give_empty_outputs(tmp_path):
    result = Pipeline(make_bundle(tmp_path / "bundle")).run(images(0))
    assert (tuple(result.logits.shape), result.payloads, result.payload_bytes) == ((0, 4), {"cut": []}, [])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OutputSpec("logits", "score", (3,)), "must be one of logits, map, boxes, tokens, tensor, got 'score'"),
        (lambda: OutputSpec("logits", "logits", (3,)), "class_names of at least one name"),
        (lambda: OutputSpec("logits", "logits", (3, 2), "abc"), "one number a class"),
        (lambda: OutputSpec("logits", "map", (3, 8, 8), "ab"), "but there are 2 class names"),
        (lambda: OutputSpec("", "tensor", (3,)), "needs a name and a shape"),
        (lambda: OutputSpec("x", "tensor", (0,)), "needs a name and a shape"),
        (lambda: TensorInput((0,)), "shape must be positive whole numbers"),
        (lambda: TensorInput((3,), dtype="float16"), "dtype must be one of uint8, int32, int64, float32"),
        (lambda: TensorInput((3,), name=""), "name must be the name of the input"),
        (lambda: TensorInput.from_dict({"shape": [3]}), "takes the keys"),
    ],
)
def test_inputs_and_outputs_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
