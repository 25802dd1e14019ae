import itertools
import math

import numpy as np
import pytest
import torch

from cleave.architectures.inserts.calibrating.calibration import METHODS, _collect, calibrate_range
from cleave.architectures.inserts.quantizer import UniformQuantizer


def draw(kind, count=4000, seed=0):
    rng = np.random.default_rng(seed)
    values = {
        "gaussian": lambda: rng.normal(size=count),
        "heavy": lambda: rng.standard_t(1.5, size=count),
        "relu": lambda: np.maximum(rng.normal(-0.5, 2, size=count), 0),
        "skewed": lambda: rng.exponential(size=count) - 3,
        "outlier": lambda: np.append(rng.normal(size=count - 1), 500.0),
        "shifted": lambda: rng.uniform(1000, 1001, size=count),
    }[kind]()
    return torch.tensor(values, dtype=torch.float32)


KINDS = ("gaussian", "heavy", "relu", "skewed", "outlier", "shifted")


def error(values, low, high, bits):
    """Mean squared error of nearest levels, searched among all of them, in float64."""
    levels = np.linspace(low, high, 2**bits)
    distance = np.abs(values.double().numpy()[:, None] - levels[None]).min(1)
    return np.square(distance).mean()


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_as_good_as_brute_force(kind, bits):
    z = draw(kind, 500)
    low, high = calibrate_range([z], bits)
    found = error(z, low, high, bits)
    median, least, most = z.median().item(), z.min().item(), z.max().item()
    shares = 2.0 ** -np.arange(0, 10.01, 0.25)  # a grid of clippings on either side of the median
    lows, highs = {median - s * (median - least) for s in shares}, {median + s * (most - median) for s in shares}
    best = min(error(z, a, b, bits) for a, b in itertools.product(lows, highs) if a < b)
    assert found <= best * 1.001
    assert found <= error(z, least, most, bits) * (1 + 1e-6)
    assert least <= low < high <= most


@pytest.mark.parametrize("kind", KINDS)
def test_no_small_change_of_an_end_is_better(kind):
    z = draw(kind)
    low, high = calibrate_range([z], 4)
    width = high - low
    nearby = [(low + a * width, high + b * width) for a in (-0.1, 0, 0.1) for b in (-0.1, 0, 0.1)]
    assert min(error(z, a, b, 4) for a, b in nearby) >= 0.97 * error(z, low, high, 4)


@pytest.mark.parametrize(
    ("bits", "step", "distortion"), [(2, 0.9957, 0.1188), (3, 0.5860, 0.03744), (4, 0.3352, 0.01154)]
)
def test_mse_finds_the_optimal_uniform_quantiser_of_a_gaussian(bits, step, distortion):
    """Table II of Max, "Quantizing for minimum distortion", 1960: N levels with an equal spacing."""
    z = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    low, high = calibrate_range([z], bits)
    assert (high - low) / (2**bits - 1) == pytest.approx(step, rel=0.03)
    assert low == pytest.approx(-high, rel=0.05)
    assert error(z, low, high, bits) == pytest.approx(distortion, rel=0.02)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["heavy", "outlier"])
def test_mse_beats_the_extremes_where_tails_are_heavy(kind, bits):
    z = draw(kind)
    quantizer = UniformQuantizer(bits)
    errors = {}
    for method in ("mse", "minmax"):
        quantizer.set_range(*calibrate_range([z], bits, method))
        errors[method] = (quantizer.eval()(z[None]) - z).double().square().mean()
    assert errors["mse"] < 0.8 * errors["minmax"]


def test_more_bits_clip_less():
    z = draw("heavy")
    widths = [high - low for low, high in (calibrate_range([z], bits) for bits in (2, 4, 8, 16))]
    assert widths == sorted(widths)
    assert widths[-1] == pytest.approx((z.max() - z.min()).item(), rel=1e-6)


def test_the_floor_of_a_rectified_representation_is_kept():
    z = draw("relu")
    assert (z == 0).float().mean() > 0.5
    low, high = calibrate_range([z], 3)
    assert low == 0
    assert 0 < high < z.max()


def test_minmax_and_percentile():
    z = draw("skewed")
    assert calibrate_range([z], 8, "minmax") == (z.min().item(), z.max().item())
    for percentile in (None, 97.5, 100.0):
        percent = percentile or 99.9
        expected = np.percentile(z.double().numpy(), [100 - percent, percent])
        assert calibrate_range([z], 8, "percentile", percentile) == pytest.approx(tuple(expected), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_their_order_do_not_matter_as_long_as_all_is_kept(method):
    z = draw("gaussian")
    whole = calibrate_range([z], 4, method)
    assert calibrate_range(iter(z.view(8, 5, 10, 10).flip(0)), 4, method) == pytest.approx(whole, rel=1e-6)
    assert calibrate_range((piece for piece in z.split(7)), 4, method) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_long_stream_is_sampled_and_repeats(method):
    z = draw("gaussian", 100_000)
    z[12345], z[54321] = 9.0, -8.0
    ends = calibrate_range(z.split(1000), 3, method, samples=5000)
    assert ends == calibrate_range(z.split(1000), 3, method, samples=5000)
    if method == "minmax":
        assert ends == (-8.0, 9.0)  # exact, whether or not they were drawn
    else:
        assert ends == pytest.approx(calibrate_range([z], 3, method), rel=0.1)


def test_the_draw_is_bounded_even_and_without_replacement():
    kept, low, high = _collect((torch.arange(200 * i, 200 * (i + 1)) for i in range(50)), 1000)
    assert len(kept) == 1000
    assert (low, high) == (0, 9999)
    assert len(np.unique(kept)) == 1000
    counts = np.histogram(kept, bins=10, range=(0, 10_000))[0]
    assert np.abs(counts - 100).max() < 4.5 * math.sqrt(100 * 0.9 * 0.9)


def test_gradients_and_half_precision_do_not_disturb():
    z = draw("gaussian").bfloat16().requires_grad_()
    low, high = calibrate_range([z * 1], 4, "minmax")
    assert (low, high) == (z.float().min().item(), z.float().max().item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 32}, "bits=32 means float"),
        ({"bits": 1}, "bits must be 2 to 16"),
        ({"method": "max"}, "method must be one of mse, minmax, percentile, got 'max'"),
        ({"percentile": 99.0}, "percentile=99.0 has no meaning for method='mse'"),
        ({"method": "percentile", "percentile": 50}, "percentile must be above 50"),
        ({"method": "percentile", "percentile": 100.1}, "percentile must be above 50"),
        ({"samples": 1}, "samples must be a whole number of at least 2"),
        ({"samples": 2.5}, "samples must be a whole number"),
        ({"values": []}, "at least one batch"),
        ({"values": [torch.empty(0)]}, "at least one batch"),
        ({"values": [torch.tensor([1.0, math.nan])]}, "NaN or infinity"),
        ({"values": [torch.tensor([1.0]), torch.tensor([-math.inf])]}, "NaN or infinity"),
        ({"values": [torch.full((4, 4), 2.5)]}, "2.5 everywhere: its encoder is dead"),
        (
            {"values": [torch.cat([torch.zeros(9999), torch.ones(1)])], "method": "percentile"},
            "percentile=99.9 leaves the single value 0",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate_range(**({"values": [torch.randn(10)], "bits": 4} | arguments))


# --- UniformQuantizer.set_range --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["observed", "learned"])
def test_a_set_range_is_used_and_survives_training_and_saving(kind):
    quantizer = UniformQuantizer(4, kind)
    quantizer.set_range(-1.5, 3.0)
    assert quantizer.fixed_range == pytest.approx((-1.5, 3.0), rel=1e-6)
    z = torch.tensor([[-9.0, 0.12, 7.0]])
    step = 4.5 / 15
    torch.testing.assert_close(quantizer.eval()(z), torch.tensor([[-1.5, -1.5 + round(1.62 / step) * step, 3.0]]))
    loaded = UniformQuantizer(4, kind)
    loaded.load_state_dict(quantizer.state_dict())
    assert loaded.fixed_range == quantizer.fixed_range
    quantizer.train()(z)  # the first batch in training no longer sets the range
    expected = {"observed": (-1.5 * 0.9 - 9 * 0.1, 3 * 0.9 + 7 * 0.1), "learned": (-1.5, 3.0)}[kind]
    assert quantizer.fixed_range == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, -2.0), (0.0, math.inf), (math.nan, 1.0), (1.0, 1.0 + 1e-12)])
def test_a_range_that_is_none_is_refused(ends):
    with pytest.raises(ValueError, match="two finite numbers"):
        UniformQuantizer(4).set_range(*ends)


def test_a_sample_range_cannot_be_set():
    with pytest.raises(ValueError, match="range=sample"):
        UniformQuantizer(4, "sample").set_range(0, 1)
