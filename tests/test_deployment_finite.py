"""Payloads and answers that are no numbers are an error of their request, with and without a policy."""

import math
import struct

import pytest
import torch

from cleave.deployment import CodecError, Message, PayloadError, Side, UniformCodec, code_codec, load_bundle

from .deployment_networks import images, make_bundle

TOO_FAR = [(-3e38, 3e38), (0.0, 3e38), (-3e38, 0.0), (math.nan, 1.0), (0.0, math.inf), (-math.inf, 0.0)]


@pytest.mark.parametrize("coding", ["packed", "sparse"])
@pytest.mark.parametrize("ends", TOO_FAR)
def test_a_payload_whose_range_float32_cannot_span_is_refused(coding, ends):
    codec = code_codec(coding, (4,), 4, None, None)
    sent = {"codes": torch.arange(4, dtype=torch.int32)[None], "low": torch.zeros(1), "high": torch.ones(1)}
    (payload,) = codec.encode(sent)
    with pytest.raises(CodecError, match="the range of sample 0 must be finite, within"):
        codec.decode([struct.pack("<ff", *ends) + payload[8:]])
    with pytest.raises(CodecError, match="the range of sample 0 must be finite, within"):
        codec.encode(sent | {"low": torch.tensor([ends[0]]), "high": torch.tensor([ends[1]])})


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_all_that_a_range_decodes_to_is_finite(bits):
    codec = UniformCodec((2,), bits)
    codes = torch.tensor([[0, 2**bits - 1]], dtype=torch.int32)
    far = torch.tensor([2.0**126])
    found = codec.decode(codec.encode({"codes": codes, "low": -far, "high": far}))
    step = (found["high"] - found["low"]) / (found["levels"] - 1)
    assert (found["low"] + found["codes"] * step).isfinite().all()


def test_an_answer_that_is_not_finite_is_an_error_of_its_request_alone(tmp_path):
    make_bundle(tmp_path / "bundle", "float")
    device, server = (
        Side(load_bundle(tmp_path / "bundle", placement=place), place, envelope=False) for place in ("device", "server")
    )
    message = device.run(images(), request="a").messages["server"]
    ((name, payloads),) = message.payloads.items()
    damaged = [*payloads]
    damaged[3] = struct.pack("<ff", 3e38, math.nan) + damaged[3][8:]
    with pytest.raises(PayloadError, match="rows 3; .* Row 3: logits holds NaN or infinity") as caught:
        server.run(Message(message.rows, {name: damaged}), request="a")
    others = [row for row in message.rows if row != 3]
    whole = server.run(message, request="b").outputs["logits"]
    assert whole.isfinite().all()
    assert caught.value.outcome.rows == tuple(others)
    assert torch.equal(caught.value.outcome.outputs["logits"], whole[others])
