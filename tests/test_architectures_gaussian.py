import math

import pytest
import torch
from torch import nn

from cleave.architectures.inserts.coders import build_bottleneck
from cleave.architectures.inserts.gaussian import GaussianEncoder, make_gaussian

LAYOUTS = {
    "NCHW": ((3, 16, 16), (32, 8, 8), "replace"),
    "NHWC": ((6, 6, 12), (6, 6, 12), "insert"),
    "NLC": ((9, 24), (9, 24), "insert"),
    "NC": ((24,), (24,), "insert"),
}


def built(layout="NCHW"):
    source, target, form = LAYOUTS[layout]
    torch.manual_seed(0)
    return build_bottleneck(source, target, layout, form=form, channels=4), torch.randn(2, *source)


@pytest.mark.parametrize("variance", ["learned", 0.04])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bottleneck_becomes_stochastic_without_changing_its_mean(layout, variance):
    bottleneck, x = built(layout)
    expected = bottleneck.encoder.eval()(x)
    encoder = make_gaussian(bottleneck.encoder, variance).eval()
    assert torch.equal(encoder(x), expected)
    mean, log_variance = encoder.distribution(x)
    assert torch.equal(mean, expected)
    assert mean.shape == log_variance.shape == (2, *bottleneck.shape)
    start = -5.0 if variance == "learned" else math.log(variance)
    torch.testing.assert_close(log_variance, torch.full_like(mean, start))


@pytest.mark.parametrize("variance", ["learned", 0.25])
def test_samples_follow_the_distribution(variance):
    encoder = make_gaussian(nn.Linear(3, 2), variance)
    if variance == "learned":
        nn.init.normal_(encoder.log_variance.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(encoder.log_variance.bias)
    x = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.3, -0.7]])
    mean, log_variance = encoder.distribution(x)
    torch.manual_seed(0)
    count = 8_000
    z = torch.stack([encoder(x) for _ in range(20)] + [encoder.sample(mean, log_variance) for _ in range(count - 20)])
    std = (0.5 * log_variance).exp()
    # Five standard errors of the mean, and of the variance.
    assert ((z.mean(0) - mean).abs() < 5 * std / math.sqrt(count)).all()
    assert ((z.var(0) / std.square() - 1).abs() < 5 * math.sqrt(2 / count)).all()
    assert torch.corrcoef(z.flatten(1).T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(count)


def test_train_mode_samples_by_the_seed_and_eval_mode_never():
    bottleneck, x = built()
    encoder = make_gaussian(bottleneck.encoder)
    torch.manual_seed(1)
    first = encoder(x)
    torch.manual_seed(1)
    assert torch.equal(encoder(x), first)
    assert not torch.equal(encoder(x), first)
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


def test_eval_mode_does_not_compute_the_variance():
    encoder = make_gaussian(nn.Linear(3, 2))
    calls = []
    encoder.log_variance.register_forward_hook(lambda *_: calls.append(1))
    encoder.eval()(torch.zeros(1, 3))
    assert not calls
    encoder.train()(torch.zeros(1, 3))
    assert calls


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_device_runs_is_the_very_encoder_without_the_variance(layout):
    bottleneck, x = built(layout)
    names = dict(bottleneck.encoder.named_parameters())
    encoder = make_gaussian(bottleneck.encoder)
    device = encoder.on_device()
    assert [id(p) for p in device.parameters()] == [id(p) for p in names.values()]
    variance = {id(p) for p in encoder.log_variance.parameters()}
    assert len(variance) == 2
    assert not variance & {id(p) for p in device.parameters()}
    assert torch.equal(encoder.eval()(x), device(x))  # its modules follow the encoder's mode
    if isinstance(bottleneck.encoder, nn.Sequential):
        assert list(dict(device.named_parameters())) == list(names)


def test_the_variance_has_the_projections_geometry():
    projection = nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), groups=2, bias=False, padding_mode="reflect")
    encoder = make_gaussian(nn.Sequential(nn.ReLU(), projection))
    mean, log_variance = encoder.distribution(torch.randn(2, 4, 8, 8))
    assert mean.shape == log_variance.shape
    assert (log_variance == -5).all()
    assert projection.bias is None
    assert encoder.log_variance.weight.data_ptr() != projection.weight.data_ptr()


def test_gradients_reach_both_heads_and_the_body():
    bottleneck, x = built()
    encoder = make_gaussian(bottleneck.encoder)
    nn.init.normal_(encoder.log_variance.weight)
    encoder(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_the_gradient_of_a_sample_is_that_of_its_formula():
    mean = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    log_variance = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def seeded(*distribution):
        torch.manual_seed(0)
        return GaussianEncoder.sample(*distribution)

    assert torch.autograd.gradcheck(seeded, (mean, log_variance))


def test_the_learned_log_variance_is_clamped():
    encoder = make_gaussian(nn.Linear(1, 2))
    with torch.no_grad():
        encoder.log_variance.bias.copy_(torch.tensor([-500.0, 500.0]))
    assert encoder.distribution(torch.zeros(1, 1))[1].tolist() == [[-20, 10]]
    assert encoder(torch.zeros(1, 1)).isfinite().all()


@pytest.mark.parametrize("variance", ["learned", 0.01])
def test_works_under_autocast(variance):
    bottleneck, x = built()
    encoder = make_gaussian(bottleneck.encoder, variance)
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = encoder.distribution(x)
        z = encoder(x)
    assert mean.dtype == z.dtype == torch.bfloat16
    assert log_variance.dtype == torch.float32
    if variance != "learned":
        torch.testing.assert_close(log_variance, torch.full_like(log_variance, math.log(variance)))
    z.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("variance", ["learned", 0.01])
def test_casts_with_its_network(variance):
    encoder = make_gaussian(nn.Linear(3, 2), variance).bfloat16()
    assert encoder(torch.zeros(4, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("variance", ["learnt", 0, -0.1, math.inf, math.nan, True, "0.1"])
def test_a_variance_that_is_none_is_refused(variance):
    with pytest.raises(ValueError, match=f"variance must be 'learned' or a positive finite number, got '?{variance}"):
        make_gaussian(nn.Linear(3, 2), variance)


@pytest.mark.parametrize("encoder", [nn.ReLU(), nn.Sequential(), nn.Sequential(nn.Linear(3, 2), nn.ReLU())])
def test_an_encoder_without_a_projection_is_refused(encoder):
    with pytest.raises(TypeError, match="ends in a Conv2d or Linear, got (ReLU|NoneType) last"):
        make_gaussian(encoder)


def test_a_constant_log_variance_must_be_finite():
    with pytest.raises(ValueError, match="log_variance must be a module or a finite number, got inf"):
        GaussianEncoder(nn.Sequential(), nn.Linear(3, 2), math.inf)
