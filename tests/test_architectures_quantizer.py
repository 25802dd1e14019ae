import numpy as np
import pytest
import torch

from cleave.architectures.inserts.quantizer import RANGES, UniformQuantizer


def reference(z: np.ndarray, low: float, high: float, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and de-quantised values of the textbook formula, in float64."""
    step = (high - low) / (2**bits - 1)
    codes = np.clip(np.rint((z - low) / step), 0, 2**bits - 1)
    return codes, low + codes * step


def trained(kind: str, bits: int, z: torch.Tensor) -> UniformQuantizer:
    quantizer = UniformQuantizer(bits, kind)
    quantizer(z)
    return quantizer.eval()


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_equals_the_float64_reference(kind, bits):
    z = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(bits))
    quantizer = trained(kind, bits, z)
    codes, low, high = quantizer.encode(z, torch.tensor(2**bits))
    assert codes.dtype == torch.int32
    assert low.shape == high.shape == (4,)
    for i in range(4):
        expected, values = reference(z[i].double().numpy(), low[i].item(), high[i].item(), bits)
        differing = codes[i].numpy() != expected
        assert np.abs(codes[i].numpy() - expected).max() <= 1  # float32 noise at a rounding edge
        assert differing.mean() <= (0.02 if bits == 16 else 0)
        np.testing.assert_allclose(quantizer(z)[i].detach().numpy()[~differing], values[~differing], atol=2e-6)


@pytest.mark.parametrize("kind", RANGES)
def test_eval_output_is_what_the_codes_decode_to_and_training_agrees(kind):
    z = torch.randn(6, 10)
    quantizer = trained(kind, 4, z)
    levels = torch.tensor(16)
    codes, low, high = quantizer.encode(z, levels)
    assert torch.equal(quantizer(z), quantizer.decode(codes, low, high, levels))
    if kind != "observed":  # there a training pass moves the range first
        torch.testing.assert_close(quantizer.train()(z), quantizer.eval()(z), atol=1e-6, rtol=0)


def test_error_is_at_most_half_a_step_and_the_ends_are_kept():
    z = torch.linspace(-3, 5, 1001)[None]
    quantizer = UniformQuantizer(5, "sample").eval()
    assert (quantizer(z) - z).abs().max() <= 8 / 31 / 2 + 1e-6
    assert quantizer(z)[0, 0] == -3
    assert quantizer(z)[0, -1] == 5


def test_straight_through_passes_gradients_inside_the_range_only():
    quantizer = UniformQuantizer(4, "observed")
    quantizer(torch.tensor([[0.0, 1.0]]))
    quantizer.momentum = 1e-12  # the range stays where it is
    z = torch.tensor([[-0.5, 0.3, 0.62, 1.7]], requires_grad=True)
    quantizer(z).sum().backward()
    assert z.grad.tolist() == [[0, 1, 1, 0]]


def test_a_learned_range_follows_its_gradient_and_never_turns_inside_out():
    quantizer = UniformQuantizer(4, "learned")
    z = torch.cat([torch.randn(1, 400), torch.tensor([[40.0]])], dim=1)
    quantizer(z)
    assert quantizer.fixed_range[1] == pytest.approx(40.0, rel=1e-4)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer(z) - z)[0, :400].square().mean().backward()
        optimizer.step()
    low, high = quantizer.fixed_range
    assert low < high < 10  # shrunk towards the bulk, the outlier given up


def test_an_observed_range_is_the_moving_average_of_the_extremes():
    quantizer = UniformQuantizer(8, "observed", momentum=0.25)
    quantizer(torch.tensor([[-1.0, 3.0]]))
    assert quantizer.fixed_range == (-1.0, 3.0)
    quantizer(torch.tensor([[-3.0, 1.0]]))
    assert quantizer.fixed_range == (-1.5, 2.5)
    quantizer.eval()(torch.tensor([[-100.0, 100.0]]))
    assert quantizer.fixed_range == (-1.5, 2.5)


def test_a_sample_range_does_not_see_its_neighbours():
    quantizer = UniformQuantizer(3, "sample").eval()
    z = torch.randn(3, 8)
    alone = torch.cat([quantizer(z[i : i + 1]) for i in range(3)])
    assert torch.equal(quantizer(z * torch.tensor([[1.0], [1.0], [100.0]]))[:2], alone[:2])
    assert quantizer.fixed_range is None


def test_levels_are_a_run_time_input():
    quantizer = UniformQuantizer(8, "sample").eval()
    z = torch.randn(2, 50)
    codes, *_ = quantizer.encode(z, torch.tensor(4))
    assert set(codes.unique().tolist()) == {0, 1, 2, 3}


def test_constant_features_survive():
    quantizer = UniformQuantizer(4, "sample").eval()
    torch.testing.assert_close(quantizer(torch.full((2, 5), 3.5)), torch.full((2, 5), 3.5))


def test_autocast_does_not_reach_the_arithmetic():
    quantizer = UniformQuantizer(16, "sample").eval()
    z = torch.randn(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(z), quantizer(z.clone()))
        assert quantizer(z).dtype == torch.float32
        assert (quantizer(z) - z).abs().max() < 1e-3


@pytest.mark.parametrize("bits", [0, 1, 17, 32, 2.5, "8"])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match="bits"):
        UniformQuantizer(bits)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"range": "batch"}, "learned, observed"),
        ({"momentum": 0.0}, "momentum"),
        ({"range": "sample", "momentum": 0.1}, "no meaning"),
    ],
)
def test_other_bad_arguments_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        UniformQuantizer(8, **arguments)


@pytest.mark.parametrize("kind", RANGES)
def test_a_frozen_quantizer_hands_gradients_to_an_encoder_that_learns(kind):
    quantizer = UniformQuantizer(bits=3, range=kind).train()
    z = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    quantizer(z)
    quantizer.eval().requires_grad_(False)
    z.requires_grad_(True)
    levels = torch.tensor(8)
    assert torch.equal(quantizer(z), quantizer.decode(*quantizer.encode(z, levels), levels))
    quantizer(z).sum().backward()
    inside = (z > quantizer._range(z)[0]) & (z < quantizer._range(z)[1])
    assert torch.equal(z.grad[inside], torch.ones(int(inside.sum())))
