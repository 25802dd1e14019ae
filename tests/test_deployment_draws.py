from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from cleave.deployment import (
    BundleError,
    Draw,
    Edge,
    FloatCodec,
    OutputSpec,
    Part,
    Pipeline,
    Side,
    TensorInput,
    Transfer,
    export_bundle,
    load_bundle,
)

LAWS = {"uniform": stats.uniform(), "normal": stats.norm(), "laplace": stats.laplace()}
pytestmark = pytest.mark.usefixtures("same_draws")


@pytest.mark.parametrize("distribution", LAWS)
def test_numbers_have_their_distribution_fresh_or_fixed(distribution):
    draw = Draw("layer.noise", distribution, (40, 25))
    for numbers in (draw.fresh(20), draw.fixed(range(20))):
        assert (numbers.shape, numbers.dtype) == ((20, 40, 25), torch.float32)
        assert numbers.isfinite().all()
        assert stats.kstest(numbers.double().flatten().numpy(), LAWS[distribution].cdf).pvalue > 1e-4
        assert abs(np.corrcoef(numbers[0].flatten(), numbers[1].flatten())[0, 1]) < 5 / math.sqrt(1000)
    assert not torch.equal(draw.fresh(2), draw.fresh(2))
    torch.testing.assert_close(draw.fixed([3, 1])[1], draw.fixed([1])[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"distribution": "lapalce"}, "distribution of n must be .*got 'lapalce'.*Did you mean 'laplace'"),
        ({"shape": (0,)}, r"shape of n .* got \[0\]"),
        ({"shape": (2**20, 2**20)}, "shape of n"),
        ({"shape": (1.5,)}, "shape of n"),
        ({"name": ""}, "a draw must be a name"),
    ],
)
def test_what_is_no_draw_is_refused(change, told):
    with pytest.raises(BundleError, match=told):
        Draw(**{"name": "n", "distribution": "normal", "shape": (2,), **change})


class Sender(nn.Module):
    def forward(self, x, noise):
        return x + noise


def export(folder, draws, inputs=("x", "noise")):
    parts = [Part("device", "device", Sender(), inputs, ["z"]), Part("server", "server", nn.Identity(), ["z"], ["y"])]
    edges = [Edge("device", "server", (Transfer("z", FloatCodec((4,))),))]
    images = torch.arange(20.0).reshape(5, 4)
    outputs = [OutputSpec("y", "tensor", (4,))]
    spec = TensorInput((4,), "float32", "x")
    return export_bundle(folder, parts, edges, input=spec, outputs=outputs, images=images, draws=draws)


def test_a_side_draws_anew_for_each_sample_of_each_request(tmp_path):
    bundle = export(tmp_path / "bundle", [Draw("noise", "laplace", (4,))])
    bundle.self_test()
    assert load_bundle(tmp_path / "bundle").manifest.draws == (Draw("noise", "laplace", (4,)),)
    images = torch.zeros(300, 4)
    first, second = (Pipeline(bundle).run(images).outputs["y"] for _ in range(2))
    for found in (first, second):
        assert stats.kstest(found.double().flatten().numpy(), stats.laplace().cdf).pvalue > 1e-4
    assert not (first == second).any()
    assert len(first.unique()) > 1000
    sent = (
        Side(load_bundle(tmp_path / "bundle", placement="device"), "device").run(images, request=1).messages["server"]
    )
    answered = Side(load_bundle(tmp_path / "bundle", placement="server"), "server").run(sent, request=1)
    assert answered.outputs["y"].abs().max() > 1
    # Nothing from outside takes the place of the device's own numbers.
    with pytest.raises(BundleError, match="nothing on device takes noise"):
        Side(bundle, "device").run(sent._replace(payloads={"x": images, "noise": images}), request=2)


@pytest.mark.parametrize(
    ("draws", "inputs", "told"),
    [
        ([], ("x", "noise"), "takes noise, which nothing gives"),
        ([("noise", (4,)), ("noise", (4,))], ("x", "noise"), "noise is drawn twice"),
        ([("noise", (4,)), ("other", (4,))], ("x", "noise"), "other is drawn for one partition, .* are: none"),
        ([("z", (4,))], ("x", "noise"), "z is drawn, and given otherwise too"),
    ],
)
def test_draws_that_do_not_fit_are_refused(draws, inputs, told, tmp_path):
    with pytest.raises(BundleError, match=told):
        export(tmp_path / "bundle", [Draw(name, "normal", shape) for name, shape in draws], inputs)
