import math

import pytest
import torch

from cleave.architectures.inserts.channels import BitErrors, GaussianNoise, PacketLoss
from cleave.architectures.inserts.quantizer import RANGES, UniformQuantizer


def quantized(shape=(4, 3, 8, 8), bits=4, kind="observed"):
    quantizer = UniformQuantizer(bits, kind)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantizer(z)
    return quantizer.eval()(z), quantizer


def codes_of(z, quantizer):
    return quantizer.encode(z, torch.tensor(2**quantizer.bits))[0]


def within(measured, probability, trials, deviations=4.5):
    """Whether a frequency agrees with a binomial's within so many standard errors; 4.5 is missed once in 150,000."""
    return abs(measured - probability) <= deviations * math.sqrt(probability * (1 - probability) / trials)


EACH = [
    PacketLoss(0.4, packet_elements=4),
    PacketLoss([0.1, 0.7], packet_bytes=8, interleave=True),
    GaussianNoise(10),
    GaussianNoise([0, 20]),
    BitErrors(0.1),
    BitErrors([0.0, 0.5]),
]


# --- packet loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize(("count", "elements"), [(64, 8), (50, 8), (7, 100)])
def test_packets_are_lost_whole_and_independently_at_the_rate(interleave, count, elements):
    torch.manual_seed(0)
    channel = PacketLoss(0.3, packet_elements=elements, interleave=interleave)
    batch = 4000
    lost = channel(torch.ones(batch, count)) == 0
    order = channel._place_of_each(count)
    assert sorted(order.tolist()) == list(range(count))
    sent = torch.empty_like(lost)
    sent[:, order] = lost  # in the order of transmission
    packets = sent.split(elements, dim=1)
    assert all((packet == packet[:, :1]).all() for packet in packets)
    fates = torch.stack([packet[:, 0] for packet in packets], 1).double()
    assert within(fates.mean().item(), 0.3, fates.numel())
    for i in range(fates.shape[1] - 1):  # both of two neighbours: p² where they are independent
        assert within((fates[:, i] * fates[:, i + 1]).mean().item(), 0.09, batch)


def test_without_interleaving_a_packet_is_a_contiguous_piece_of_the_payload():
    torch.manual_seed(1)
    lost = PacketLoss(0.5, packet_elements=16)(torch.ones(8, 2, 4, 8)).flatten(1) == 0
    assert (lost.view(8, 4, 16).float().mean(2) % 1 == 0).all()
    assert 0 < lost.float().mean() < 1


def test_interleaving_spreads_a_packet_over_the_channels():
    torch.manual_seed(0)
    z = torch.ones(64, 8, 8, 8)
    whole = PacketLoss(0.3, packet_elements=64)(z) == 0
    spread = PacketLoss(0.3, packet_elements=64, interleave=True)(z) == 0
    assert whole.flatten(2).all(2).any()
    assert not spread.flatten(2).all(2).any()


def test_a_packet_holds_whole_codes_of_the_present_width():
    torch.manual_seed(0)
    z, quantizer = quantized((500, 60), bits=3)
    channel = PacketLoss(0.5, packet_bytes=2)  # 16 bits: five codes of 3 bits
    lost = channel(torch.ones_like(z), quantizer) == 0
    assert (lost.view(500, 12, 5).float().mean(2) % 1 == 0).all()
    quantizer.bits = 8  # two codes of 8 bits, which five no longer share
    lost = channel(torch.ones_like(z), quantizer) == 0
    assert (lost.view(500, 30, 2).float().mean(2) % 1 == 0).all()
    assert (lost.view(500, 12, 5).float().mean(2) % 1 != 0).any()
    lost = PacketLoss(0.5, packet_bytes=12)(z) == 0  # float32: three elements
    assert (lost.view(500, 20, 3).float().mean(2) % 1 == 0).all()


def test_what_arrives_is_rescaled_so_that_the_mean_stays():
    torch.manual_seed(0)
    z = torch.randn(1, 32).expand(20000, -1)
    arrived = PacketLoss(0.6, packet_elements=4)(z)
    assert torch.equal(arrived[arrived != 0], (z / 0.4)[arrived != 0])
    standard_error = z[0].abs() * math.sqrt(0.6 / 0.4 / 20000)
    assert ((arrived.mean(0) - z[0]).abs() <= 4.5 * standard_error).all()
    plain = PacketLoss(0.6, packet_elements=4, rescale=False)(z)
    assert torch.equal(plain[plain != 0], z[plain != 0])


def test_packets_of_one_element_are_dropout():
    torch.manual_seed(0)
    z = torch.randn(64, 100)
    ours = PacketLoss(0.25, packet_elements=1)(z)
    theirs = torch.nn.functional.dropout(z, 0.25)
    assert torch.equal(ours[ours != 0], (z / 0.75)[ours != 0])
    both = (ours != 0) & (theirs != 0)
    torch.testing.assert_close(ours[both], theirs[both])


def test_a_range_of_rates_gives_each_batch_its_own():
    torch.manual_seed(0)
    channel = PacketLoss([0.2, 0.6], packet_elements=1)
    rates = torch.tensor([(channel(torch.ones(100, 100)) == 0).float().mean() for _ in range(200)])
    assert rates.min() < 0.25
    assert rates.max() > 0.55
    assert 0.18 < rates.min() < rates.max() < 0.62
    assert abs(rates.mean() - 0.4) < 4.5 * 0.4 / math.sqrt(12 * 200)
    z = channel(torch.ones(100, 100))
    assert z.unique().numel() == 2
    assert z.max().item() == pytest.approx(1 / (1 - (z == 0).float().mean().item()), rel=0.05)


# --- Gaussian noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr_db", [-5, 0, 12.5, 30])
def test_each_sample_has_the_ratio_it_was_given(snr_db):
    torch.manual_seed(0)
    z = torch.randn(8, 4, 50, 50) * torch.logspace(-3, 3, 8).view(-1, 1, 1, 1) + 0.5
    noise = (GaussianNoise(snr_db)(z) - z).double().flatten(1)
    expected = z.double().flatten(1).square().mean(1) / 10 ** (snr_db / 10)
    measured = noise.square().mean(1)
    assert ((measured / expected - 1).abs() < 4.5 * math.sqrt(2 / 10000)).all()
    standard = noise / expected.sqrt()[:, None]
    assert (standard.mean(1).abs() < 4.5 / math.sqrt(10000)).all()
    assert ((standard**4).mean(1) - 3).abs().max() < 4.5 * math.sqrt(96 / 10000)  # the kurtosis of a Gaussian


def test_a_range_of_ratios_gives_each_batch_its_own():
    torch.manual_seed(0)
    channel = GaussianNoise([0, 20])
    z = torch.ones(4, 5000)
    ratios = torch.stack([-10 * (channel(z) - z).square().mean().log10() for _ in range(200)])
    assert -0.5 < ratios.min() < 1
    assert 19 < ratios.max() < 20.5
    assert abs(ratios.mean() - 10) < 4.5 * 20 / math.sqrt(12 * 200)


def test_zeros_stay_finite_and_so_does_their_gradient():
    z = torch.zeros(2, 8, requires_grad=True)
    noisy = GaussianNoise(0)(z)
    noisy.sum().backward()
    assert noisy.abs().max() < 1e-15
    assert torch.isfinite(z.grad).all()


# --- bit errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(("bits", "rate"), [(2, 0.2), (5, 0.01), (8, 0.5), (16, 0.05)])
def test_every_bit_flips_at_the_rate(kind, bits, rate):
    torch.manual_seed(0)
    z, quantizer = quantized((64, 8, 8, 8), bits, kind)
    codes, low, high = quantizer.encode(z, torch.tensor(2**bits))
    received = BitErrors(rate)(z, quantizer)
    step = ((high - low) / (2**bits - 1)).view(-1, 1, 1, 1)
    arrived = ((received.double() - low.view_as(step)) / step).round().int()
    flips = codes ^ arrived
    for bit in range(bits):
        assert within(((flips >> bit) & 1).double().mean().item(), rate, codes.numel())
    untouched = (1 - rate) ** bits
    assert within((flips == 0).double().mean().item(), untouched, codes.numel())
    decoded = quantizer.decode(arrived, low, high, torch.tensor(2**bits))
    assert torch.equal(received, decoded)


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_no_errors_give_back_what_was_sent(kind, bits):
    z, quantizer = quantized(bits=bits, kind=kind)
    torch.testing.assert_close(BitErrors(0)(z, quantizer), z, rtol=0, atol=1e-6 * z.abs().max().item())


def test_the_gradient_passes_straight_through_bit_errors():
    z, quantizer = quantized()
    z = z.requires_grad_()
    weights = torch.randn_like(z)
    received = BitErrors(0.3)(z, quantizer)
    assert not torch.equal(received, z)
    (received * weights).sum().backward()
    assert torch.equal(z.grad, weights)


def test_a_learned_range_still_learns_behind_bit_errors():
    quantizer = UniformQuantizer(4, "learned")
    z = torch.randn(4, 64)
    BitErrors(0.1)(quantizer(z), quantizer).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs() > 0 for p in quantizer.parameters())


def test_bit_errors_refuse_float():
    with pytest.raises(ValueError, match=r"bit errors .* 32 bits send float32 .* choose bits"):
        BitErrors(0.1)(torch.randn(2, 4))


# --- every channel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", EACH[:4], ids=str)
def test_gradients_are_exact_in_float64(channel):
    def run(z):
        torch.manual_seed(3)
        return channel(z)

    assert torch.autograd.gradcheck(run, torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("channel", EACH, ids=str)
def test_a_seeded_run_repeats_and_another_differs(channel):
    z, quantizer = quantized((32, 64))

    def run(seed):
        torch.manual_seed(seed)
        return channel(z, quantizer)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("channel", EACH, ids=str)
def test_a_sample_does_not_see_its_neighbours(channel):
    z, quantizer = quantized((6, 64))
    others = z.clone()
    others[3:] = z[3:].flip(1)
    torch.manual_seed(0)
    first = channel(z, quantizer)
    torch.manual_seed(0)
    assert torch.equal(channel(others, quantizer)[:3], first[:3])
    torch.manual_seed(0)
    twins = channel(z[:1].expand(50, -1), quantizer)
    assert len(twins.unique(dim=0)) > 10  # equal samples meet different fates


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channel", EACH, ids=str)
def test_shape_and_dtype_stay(channel, dtype):
    z, quantizer = quantized()
    z = z.to(dtype)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        received = channel(z, quantizer)
    assert received.dtype == dtype
    assert received.shape == z.shape
    assert torch.isfinite(received).all()
    torch.manual_seed(0)
    assert torch.equal(channel(z, quantizer), received)  # autocast changes nothing
    assert channel(z[:0], quantizer).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("channel", EACH, ids=str)
def test_the_input_is_never_written_to(channel):
    z, quantizer = quantized()
    before = z.clone()
    channel(z, quantizer)
    assert torch.equal(z, before)


@pytest.mark.parametrize(
    ("when", "in_train", "in_eval"),
    [("train", True, False), ("eval", False, True), ("always", True, True), ("never", False, False)],
)
@pytest.mark.parametrize("channel", EACH, ids=str)
def test_an_inactive_channel_returns_its_input(channel, when, in_train, in_eval):
    z, quantizer = quantized()
    channel.when = when
    try:
        assert (channel.train()(z, quantizer) is not z) == in_train
        assert (channel.eval()(z, quantizer) is not z) == in_eval
    finally:
        channel.train().when = "always"


def test_a_channel_has_nothing_to_save():
    assert all(not channel.state_dict() for channel in EACH)


@pytest.mark.parametrize(
    ("channel", "attributes"),
    [
        (
            PacketLoss(rate=[0, 0.5], packet_bytes=32, interleave=True, when="train"),
            {"rate": (0.0, 0.5), "packet_bytes": 32, "interleave": True, "when": "train"},
        ),
        (GaussianNoise(snr_db=10), {"snr_db": (10.0, 10.0), "when": "always"}),
        (BitErrors(rate=0.5, when="eval"), {"rate": (0.5, 0.5), "when": "eval"}),
    ],
)
def test_a_channel_is_what_its_arguments_say(channel, attributes):
    assert {name: getattr(channel, name) for name in attributes} == attributes
    assert all(f"{name}=" in repr(channel) for name in ("when", "snr_db" if "snr_db" in attributes else "rate"))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PacketLoss, {"rate": 0.1}, r"packet_bytes and packet_elements: give one of the two, got None and None"),
        (PacketLoss, {"rate": 0.1, "packet_bytes": 1, "packet_elements": 1}, r"give one of the two"),
        (PacketLoss, {"rate": None, "packet_bytes": 3}, r"rate must be a number or \[low, high\], got None"),
        (PacketLoss, {"rate": 1, "packet_bytes": 3}, r"rate must lie in \[0, 1\), .* got 1"),
        (PacketLoss, {"rate": [0.5, 0.2], "packet_bytes": 3}, r"low before high, got \[0.5, 0.2\]"),
        (PacketLoss, {"rate": 0.1, "packet_bytes": 0}, r"packet_bytes must be a whole number of at least 1, got 0"),
        (PacketLoss, {"rate": 0.1, "packet_elements": 2.5}, r"packet_elements must be a whole number"),
        (PacketLoss, {"rate": 0.1, "packet_elements": True}, r"packet_elements must be a whole number"),
        (PacketLoss, {"rate": 0.1, "packet_bytes": 3, "interleave": 1}, r"interleave must be true or false"),
        (PacketLoss, {"rate": 0.1, "packet_bytes": 3, "rescale": "no"}, r"rescale must be true or false"),
        (BitErrors, {"rate": -0.1}, r"rate must lie in \[0, 0.5\], .* got -0.1"),
        (BitErrors, {"rate": 0.6}, r"rate must lie in \[0, 0.5\]"),
        (BitErrors, {"rate": "high"}, r"rate must be a number or \[low, high\], got 'high'"),
        (BitErrors, {"rate": [0.1, 0.2, 0.3]}, r"rate must be a number or \[low, high\]"),
        (BitErrors, {"rate": True}, r"rate must be a number"),
        (GaussianNoise, {"snr_db": math.inf}, r"snr_db must be finite"),
        (GaussianNoise, {"snr_db": math.nan}, r"snr_db must be finite"),
        (GaussianNoise, {"snr_db": 3, "when": "evl"}, r"when .* got 'evl'. Did you mean 'eval'"),
    ],
)
def test_bad_arguments_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [(BitErrors, {"rte": 0.1}, "rte"), (BitErrors, {"rate": 0.1, "packet_bytes": 3}, "packet_bytes"),
     (GaussianNoise, {}, "snr_db"), (PacketLoss, {"packet_bytes": 3}, "rate")],
)  # fmt: skip
def test_missing_and_unknown_arguments_are_named(kind, settings, name):
    with pytest.raises(TypeError, match=name):
        kind(**settings)


def test_a_packet_too_short_for_one_code_is_refused():
    channel = PacketLoss(0.1, packet_bytes=3)
    with pytest.raises(ValueError, match=r"packet_bytes=3 .* one code of 32 bits; use at least 4"):
        channel.check(None)
    _, quantizer = quantized(bits=16)
    channel.check(quantizer)
    with pytest.raises(ValueError, match=r"one code of 16 bits; use at least 2"):
        PacketLoss(0.1, packet_bytes=1)(torch.randn(2, 3), quantizer)
