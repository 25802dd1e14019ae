import math

import numpy as np
import pytest
import torch

from cleave.losses import ReconstructionLoss

CHOI = {}
JANKOWSKI = {"power": 1, "norm": 1, "epsilon": 0}


def reference(reconstruction, feature, power=1, norm=2, epsilon=1e-6):
    """Eq. 5 in float64, written out."""
    difference = np.abs(feature.double().numpy() - reconstruction.double().numpy() + epsilon).reshape(len(feature), -1)
    return ((difference**norm).sum(1) ** (power / norm)).mean()


@pytest.mark.parametrize(
    "settings",
    [
        CHOI,
        JANKOWSKI,
        {"power": 2, "norm": 2, "epsilon": 0},
        {"power": 0.5, "norm": 3, "epsilon": 0.1},
        {"power": 2.5, "norm": 0.5, "epsilon": 0},
    ],
)
def test_equals_the_float64_reference_and_its_gradient_is_exact(settings):
    generator = torch.Generator().manual_seed(0)
    reconstruction, feature = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    loss = ReconstructionLoss(**settings)
    expected = reference(reconstruction, feature, **settings)
    assert loss(reconstruction, feature).item() == pytest.approx(expected, rel=1e-10)
    assert loss(reconstruction.float(), feature.float()).item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(lambda z: loss(z, feature), reconstruction.requires_grad_())


def test_epsilon_is_added_to_the_feature_minus_its_reconstruction():
    loss = ReconstructionLoss(power=1, norm=1, epsilon=1)
    one, three = torch.tensor([[1.0]]), torch.tensor([[3.0]])
    assert loss(one, three) == 3
    assert loss(three, one) == 1


def test_a_perfect_reconstruction_costs_the_norm_of_epsilon_and_has_a_finite_gradient():
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    loss = ReconstructionLoss()(z, z.detach().clone())
    loss.backward()
    assert loss.item() == pytest.approx(1e-6 * math.sqrt(36), rel=1e-6)
    # Every element pulls alike: the unit vector of a constant difference, shared by a batch of two.
    torch.testing.assert_close(z.grad, torch.full_like(z, -1 / 6 / 2))


@pytest.mark.parametrize(
    "settings", [JANKOWSKI, {"epsilon": 0}, {"power": 2, "epsilon": 0}, {"power": 0.5, "epsilon": 0}]
)
def test_a_perfect_reconstruction_without_epsilon_has_no_gradient(settings):
    z = torch.randn(2, 5, requires_grad=True)
    loss = ReconstructionLoss(**settings)(z, z.detach().clone())
    loss.backward()
    assert loss == 0
    assert (z.grad == 0).all()


def test_no_gradient_flows_into_the_feature():
    z, feature = torch.randn(2, 4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    ReconstructionLoss()(z[0], feature).backward()
    assert feature.grad is None
    assert z.grad[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    reconstruction, feature = 8 * torch.randn(2, 2, 64, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = reference(reconstruction, feature, **JANKOWSKI)
    assert expected > torch.finfo(torch.half).max
    loss = ReconstructionLoss(**JANKOWSKI)(reconstruction, feature)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_keeps_epsilon():
    z = torch.ones(1, 4).half()
    assert ReconstructionLoss()(z, z).item() == pytest.approx(2e-6, rel=1e-5)


@pytest.mark.parametrize("name", ["power", "norm"])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_powers_and_norms_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive finite number, got {value}"):
        ReconstructionLoss(**{name: value})


@pytest.mark.parametrize("value", [-1e-6, math.inf, math.nan])
def test_an_epsilon_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=f"epsilon must be .*got {value}"):
        ReconstructionLoss(epsilon=value)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\).*at the split"):
        ReconstructionLoss()(torch.zeros(2, 3), torch.zeros(2, 1))
