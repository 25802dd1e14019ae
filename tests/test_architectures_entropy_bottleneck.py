import copy
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cleave.architectures.inserts.entropy_bottleneck import LIKELIHOOD_BOUND, TAIL_MASS, EntropyBottleneck
from cleave.deployment import Edge, EntropyCodec, Part, Pipeline, Transfer, export_bundle
from cleave.deployment.bundle.writing.data_dependence import data_dependent_lines
from cleave.deployment.codecs.entropy_codec import CHECK_BYTES, MAX_SYMBOLS, TOTAL

from .deployment_networks import INPUT, OUTPUTS, SHAPE, Encoder, Server, images

ROOT = Path(__file__).resolve().parent.parent


def scrambled(channels=3, seed=0, **settings):
    """A prior with every parameter somewhere else than where training begins."""
    torch.manual_seed(seed)
    prior = EntropyBottleneck(channels, **settings)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return prior


def cumulative(prior, channel, x):
    """The cumulative of appendix 6.1 for one channel at one place, sum by sum in float64."""

    def values(parameters):
        return [p.detach().double().numpy()[channel] for p in parameters]

    layer_input = [x]
    factors = [*values(prior.factors), None]
    for matrix, bias, factor in zip(values(prior.matrices), values(prior.biases), factors, strict=True):
        found = []
        for row in range(len(matrix)):
            value = bias[row, 0] + sum(
                math.log1p(math.exp(w)) * v for w, v in zip(matrix[row], layer_input, strict=True)
            )
            if factor is not None:
                value += math.tanh(factor[row, 0]) * math.tanh(value)
            found.append(value)
        layer_input = found
    return 1 / (1 + math.exp(-layer_input[0]))


def sources(count, seed):
    """Samples (count, 4) of four channels: Laplace, two modes, all but constant, and far from zero."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, 4, generator=generator)
    uniform = torch.rand(count, 2, generator=generator)
    sign = uniform[:, 0] - 0.5
    laplace = 0.3 - 1.5 * sign.sign() * torch.log1p(-2 * sign.abs())
    modes = torch.where(uniform[:, 1] < 0.4, normal[:, 1] - 6, 2 * normal[:, 1] + 5)
    return torch.stack([laplace, modes, 0.2 + 0.3 * normal[:, 2], 20 + 4 * normal[:, 3]], 1)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    prior = EntropyBottleneck(4)
    optimizer = torch.optim.Adam(prior.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=300)
    for step in range(300):
        optimizer.zero_grad()
        prior.estimated_bits(prior(sources(512, 1000 + step))).mean().backward()
        optimizer.step()
        schedule.step()
    return prior.eval()


# --- the prior ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [(3, 3, 3), (2,), (4, 1)])
def test_likelihoods_equal_the_float64_reference(filters):
    prior = scrambled(filters=filters)
    z = torch.linspace(-15, 15, 61).repeat(3, 1)[None]
    expected = [
        [cumulative(prior, c, x + 0.5) - cumulative(prior, c, x - 0.5) for x in z[0, c].tolist()] for c in range(3)
    ]
    np.testing.assert_allclose(prior.double().likelihoods(z.double())[0].detach(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(prior.float().likelihoods(z)[0].detach(), expected, rtol=1e-3, atol=1e-6)


def test_the_cumulative_is_monotone_and_reaches_both_ends():
    for seed in range(5):
        prior = scrambled(seed=seed)
        for channel in range(3):
            values = [cumulative(prior, channel, float(x)) for x in np.linspace(-60, 60, 241)]
            assert np.all(np.diff(values) >= 0)
            assert cumulative(prior, channel, -500.0) < 1e-4
            assert cumulative(prior, channel, 500.0) > 1 - 1e-4


def test_training_begins_with_a_density_as_wide_as_init_scale():
    torch.manual_seed(0)
    for scale in (1.0, 10.0, 40.0):
        prior = EntropyBottleneck(8, init_scale=scale).eval()
        quartiles = scale * math.log(3)  # of a logistic density of that scale
        inside = [cumulative(prior, c, quartiles) - cumulative(prior, c, -quartiles) for c in range(8)]
        assert np.mean(inside) == pytest.approx(0.5, abs=0.15)


def test_tails_keep_their_digits():
    torch.manual_seed(0)
    prior = EntropyBottleneck(1, init_scale=1.0)
    z = torch.tensor([[[-14.0, 14.0, -15.0, 15.0]]])
    exact = copy.deepcopy(prior).double().likelihoods(z.double())
    assert exact.min() < 1e-6
    torch.testing.assert_close(prior.likelihoods(z).double(), exact, rtol=1e-4, atol=0)


def test_where_the_logits_cancel_a_code_keeps_its_probability():
    prior = EntropyBottleneck(1, filters=(1,), init_scale=1.0)
    with torch.no_grad():
        for bias in prior.biases:
            bias.zero_()
    probability = 2 / (1 + math.exp(-0.5)) - 1
    assert prior.likelihoods(torch.zeros(1, 1)).item() == pytest.approx(probability, rel=1e-5)


def test_gradients_of_the_likelihoods():
    prior = scrambled(channels=2).double()
    z = torch.linspace(-3, 3, 8, dtype=torch.float64).reshape(2, 2, 2).requires_grad_()
    parameters = list(prior.parameters())

    def likelihoods(values, *_):
        return prior.likelihoods(values)

    assert prior.likelihoods(z).min() > 1e-4
    assert torch.autograd.gradcheck(likelihoods, (z, *parameters))


def test_below_the_bound_only_a_gradient_that_raises_the_likelihood_passes():
    prior = scrambled(channels=1, init_scale=1.0)
    far = torch.tensor([[300.0]], requires_grad=True)
    assert prior.double().likelihoods(far).item() == LIKELIHOOD_BOUND
    from cleave.architectures.inserts.entropy_bottleneck import _LowerBound

    for x, downhill, passes in ((0.1, 1.0, True), (0.1, -1.0, True), (1e-12, 1.0, False), (1e-12, -1.0, True)):
        value = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        (downhill * 3 * _LowerBound.apply(value, LIKELIHOOD_BOUND)).backward()
        assert value.grad.item() == (downhill * 3 if passes else 0)


def test_estimated_bits_are_summed_per_sample():
    prior = scrambled()
    z_hat = torch.randn(4, 3, 2, 2).round()
    expected = -torch.log2(prior.likelihoods(z_hat)).reshape(4, -1).sum(1)
    torch.testing.assert_close(prior.estimated_bits(z_hat), expected)


def test_channels_stand_where_axis_says():
    maps, tokens = scrambled(axis=0), scrambled(axis=-1)
    z = 5 * torch.randn(2, 3, 7)
    torch.testing.assert_close(tokens.likelihoods(z.mT), maps.likelihoods(z).mT)
    assert torch.equal(tokens.eval().encode(z.mT), maps.eval().encode(z).mT)
    flat = z[..., 0]
    torch.testing.assert_close(tokens.likelihoods(flat), maps.likelihoods(flat))
    assert torch.equal(tokens(flat), maps(flat))
    assert tokens.codec((7, 3)) == EntropyCodec((7, 3), maps.codec((3,)).lows, maps.codec((3,)).frequencies, axis=-1)


# --- codes -------------------------------------------------------------------------------------------------------


def test_training_adds_uniform_noise_and_passes_gradients():
    prior = EntropyBottleneck(2)
    z = torch.randn(64, 2, 16, 16, requires_grad=True)
    noise = (prior(z) - z).detach()
    assert noise.min() >= -0.5 - 1e-5
    assert noise.max() <= 0.5 + 1e-5
    assert noise.mean().abs() < 0.01
    assert noise.var().item() == pytest.approx(1 / 12, rel=0.02)
    torch.manual_seed(1)
    first = prior(z)
    torch.manual_seed(1)
    assert torch.equal(prior(z), first)
    first.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_eval_output_is_what_the_codes_decode_to():
    prior = scrambled().eval()
    z = torch.cat([4 * torch.randn(8, 3, 50), torch.full((8, 3, 1), 1e6), torch.full((8, 3, 1), -1e6)], 2)
    codes = prior.encode(z)
    assert codes.dtype == torch.int32
    assert torch.equal(prior(z), prior.decode(codes))
    low, high = prior.low.view(3, 1), prior.high.view(3, 1)
    assert torch.equal(codes.long(), z.round().long().clamp(low, high))
    codec = prior.codec((3, 52))
    assert torch.equal(codec.decode(codec.encode({"codes": codes}))["codes"], codes)


@pytest.mark.parametrize("seed", range(4))
def test_the_support_leaves_the_tails_it_says_and_no_less(seed):
    prior = scrambled(seed=seed).eval()
    for channel, (low, high) in enumerate(zip(prior.low.tolist(), prior.high.tolist(), strict=True)):
        assert high - low + 1 < MAX_SYMBOLS
        assert cumulative(prior, channel, low - 0.5) <= TAIL_MASS * (1 + 1e-6) < cumulative(prior, channel, low + 0.5)
        below, above = cumulative(prior, channel, high - 0.5), cumulative(prior, channel, high + 0.5)
        assert 1 - above <= TAIL_MASS * (1 + 1e-6) < 1 - below


def test_the_support_of_a_flat_prior_is_cut_around_its_median():
    torch.manual_seed(0)
    prior = EntropyBottleneck(2, init_scale=1e5).eval()
    assert (prior.high - prior.low + 1).tolist() == [MAX_SYMBOLS] * 2
    for channel in range(2):
        middle = (prior.low[channel].item() + prior.high[channel].item()) / 2
        assert cumulative(prior, channel, middle) == pytest.approx(0.5, abs=1e-3)
    assert prior.codec((2,)).frequencies[0][0] > TOTAL // 3  # the tail is where values beyond are clamped to


def test_tables_are_the_probabilities_of_the_clamped_codes():
    prior = scrambled().eval()
    for channel, (low, probabilities) in enumerate(prior.tables()):
        assert low == prior.low[channel]
        assert len(probabilities) == prior.high[channel] - low + 1
        assert probabilities.dtype == np.float64
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)
        edges = [0.0, *(cumulative(prior, channel, low + n + 0.5) for n in range(len(probabilities) - 1)), 1.0]
        np.testing.assert_allclose(probabilities, np.diff(edges), rtol=1e-6, atol=1e-12)


def test_a_prior_narrower_than_a_step_has_one_code():
    prior = EntropyBottleneck(1, init_scale=0.1)
    with torch.no_grad():
        prior.matrices[0].add_(200)
        prior.biases[0].zero_()
    prior.eval()
    assert prior.low == prior.high
    ((low, probabilities),) = prior.tables()
    assert probabilities.tolist() == [1.0]
    codec = prior.codec((1, 3))
    assert codec.frequencies == ((TOTAL,),)
    assert codec.lows == (low,)


# --- the support is never an old one -----------------------------------------------------------------------------


def moved(prior):
    with torch.no_grad():
        prior.biases[-1].sub_(3)
    return prior


def test_entering_eval_mode_finds_the_support_again():
    network = nn.Sequential(EntropyBottleneck(3), nn.Identity())
    prior = network.eval()[0]
    before = prior.low.clone()
    moved(network.train()[0])
    assert torch.equal(prior.low, before)
    network.eval()
    assert torch.all(prior.low > before)
    expected = scrambled()
    prior.load_state_dict(expected.state_dict())
    assert torch.equal(prior.low, expected.eval().low)


def test_a_state_saved_in_training_restores_in_eval_mode():
    trained = scrambled()
    moved(trained)
    state = copy.deepcopy(trained).state_dict()
    fresh = EntropyBottleneck(3).eval()
    fresh.load_state_dict(state)
    z = 30 * torch.randn(16, 3, 9)
    trained.eval()
    assert torch.equal(fresh(z), trained(z))
    assert fresh.codec((3, 9)) == trained.codec((3, 9))
    assert torch.equal(fresh.likelihoods(fresh(z)), trained.likelihoods(trained(z)))


def test_tables_asked_for_in_training_are_those_of_eval_mode():
    prior = moved(scrambled())
    codec = prior.codec((3,))
    assert prior.training
    assert codec == prior.eval().codec((3,))


def test_update_follows_parameters_changed_in_eval_mode():
    prior = scrambled().eval()
    before = prior.low.clone()
    moved(prior).update()
    assert torch.all(prior.low > before)


# --- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_to_half_precision_changes_nothing(dtype):
    prior, reference = scrambled().eval(), scrambled().eval()
    prior.to(dtype)
    z = (5 * torch.randn(2, 3, 8)).to(dtype)
    assert prior(z).dtype == torch.float32
    assert torch.equal(prior.likelihoods(prior(z)), reference.likelihoods(reference(z.float())))


def test_autocast_changes_nothing():
    prior = scrambled()
    z = 5 * torch.randn(2, 3, 8)
    expected = prior.likelihoods(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prior.likelihoods(z)
        assert prior(z).dtype == prior(z.bfloat16()).dtype == torch.float32
        prior.eval()
    assert torch.equal(found, expected)
    reference = scrambled().eval()
    assert torch.equal(prior.low, reference.low)
    assert torch.equal(prior.high, reference.high)


# --- rate --------------------------------------------------------------------------------------------------------


def test_the_estimated_rate_is_the_entropy_of_what_it_was_fitted_to(fitted):
    codes = fitted.encode(sources(20_000, 1))
    estimated = -fitted.likelihoods(codes).log2().mean(0)
    for channel in range(4):
        counts = np.unique(codes[:, channel].numpy(), return_counts=True)[1]
        shares = counts / counts.sum()
        assert estimated[channel].item() == pytest.approx(-(shares * np.log2(shares)).sum(), rel=0.03)


def test_bitstreams_are_as_long_as_estimated(fitted):
    z = sources(300 * 64, 2).reshape(300, 64, 4).mT.reshape(300, 4, 8, 8)
    codes = fitted.encode(z)
    codec = fitted.codec((4, 8, 8))
    payloads = codec.encode({"codes": codes})
    assert torch.equal(codec.decode(payloads)["codes"], codes)
    estimated = fitted.estimated_bits(codes).mean().item()
    tables = codec.estimated_bits(codes).mean().item()
    mean_bits = 8 * float(np.mean([len(payload) for payload in payloads]))
    assert tables == pytest.approx(estimated, rel=2e-3)
    assert mean_bits - 8 * CHECK_BYTES == pytest.approx(estimated, rel=0.01)
    assert mean_bits == pytest.approx(estimated + 8 * CHECK_BYTES, rel=0.01)


# --- deployment --------------------------------------------------------------------------------------------------


class Device(Encoder):
    """An encoder whose representation is rounded under a prior."""

    def __init__(self):
        super().__init__()
        self.prior = scrambled(channels=SHAPE[0])

    def forward(self, images):
        return self.prior.encode(6 * super().forward(images))


class Receiver(Server):
    def forward(self, codes):
        return super().forward(EntropyBottleneck.decode(codes))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    device, server = Device().eval(), Receiver().eval()
    parts = [
        Part("head", "device", device, ("images",), ("cut.codes",)),
        Part("tail", "server", server, ("cut.codes",), ("logits",)),
    ]
    directory = tmp_path_factory.mktemp("entropy") / "bundle"
    edges = [Edge("head", "tail", (Transfer("cut", device.prior.codec(SHAPE)),))]
    bundle = export_bundle(directory, parts, edges, input=INPUT, outputs=OUTPUTS, images=images())
    return bundle, device, server


def test_encode_is_traced_and_steers_by_no_value():
    prior = scrambled(axis=-1).eval()
    assert data_dependent_lines(_Encode(prior), [torch.randn(2, 5, 3)]) == []


class _Encode(nn.Module):
    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, z):
        return self.prior.encode(z)


def test_a_bundle_with_a_prior_passes_the_gate_and_tests_itself(bundle):
    loaded, device, server = bundle
    batch = images(count=7, seed=3)
    result = Pipeline(loaded, envelope=False).run(batch)
    with torch.no_grad():
        codes = device(batch)
        torch.testing.assert_close(result.logits, server(codes), rtol=1e-5, atol=1e-5)
    assert len(codes.unique()) > 8
    assert result.payloads["cut"] == device.prior.codec(SHAPE).encode({"codes": codes})
    assert len(set(result.payload_bytes)) > 1
    loaded.self_test()
    assert loaded.manifest.parity["codes_differing"] <= 1e-4


RUNNER = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
sys.path.insert(0, {alone!r})
import deployment
assert deployment.__file__.startswith({alone!r})
bundle = deployment.load_bundle({bundle!r})
bundle.self_test()
result = deployment.Pipeline(bundle, envelope=False).run(bundle.samples["device"]["images"])
print(json.dumps([payload.hex() for payload in result.payloads["cut"]]))
"""


def test_a_bundle_with_a_prior_runs_with_deployment_alone(tmp_path, bundle):
    loaded, _, _ = bundle
    shutil.copytree(ROOT / "deployment", tmp_path / "deployment")
    blocked = ["pytorch_lightning", "timm", "torchvision", "hydra", "cleave"]
    code = RUNNER.format(blocked=blocked, alone=str(tmp_path), bundle=str(loaded.directory))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    codes = loaded.samples["device"]["cut.codes"]
    assert found == [payload.hex() for payload in loaded.manifest.route.codecs["cut"].encode({"codes": codes})]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        ({"channels": 2.0}, "channels must be a whole number"),
        ({"axis": 1}, "axis must be 0"),
        ({"axis": True}, "axis must be 0"),
        ({"filters": ()}, "filters must be a list of whole numbers"),
        ({"filters": (3, 0)}, r"filters\[1\] must be a whole number of at least 1, got 0"),
        ({"filters": 3}, "filters must be a list of whole numbers, got 3"),
        ({"init_scale": 0.0}, "init_scale must be a number of at least 0.1"),
        ({"init_scale": math.nan}, "init_scale must be a number"),
        ({"init_scale": "10"}, "init_scale must be a number"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EntropyBottleneck(**({"channels": 3} | arguments))


def test_another_number_of_channels_is_refused():
    for training, axis in itertools.product((True, False), (0, -1)):
        prior = EntropyBottleneck(3, axis=axis).train(training)
        with pytest.raises(ValueError, match="must have 3 channels along dimension .*got shape"):
            prior(torch.zeros(2, 1, 1))


def test_there_is_no_width_to_choose():
    with pytest.raises(ValueError, match="bits=4: a learned prior has no width of codes"):
        EntropyBottleneck(3).with_bits(4)


def test_a_frozen_prior_hands_gradients_to_an_encoder_that_learns():
    prior = EntropyBottleneck(channels=2).eval().requires_grad_(False)
    z = (3 * torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    assert torch.equal(prior(z), prior.decode(prior.encode(z)))
    prior(z).sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
