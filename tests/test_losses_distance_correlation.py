from __future__ import annotations

import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import distributed

from cleave.losses import DistanceCorrelationLoss, distance_correlation

BOTH = [False, True]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_loops(x, z, bias_corrected):
    """The definitions, sample by sample, in float64."""
    x, z = (np.asarray(each.double()).reshape(len(each), -1) for each in (x, z))
    n = len(x)

    def centred(points):
        a = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                a[i, j] = math.sqrt(sum((p - q) ** 2 for p, q in zip(points[i], points[j], strict=True)))
        out = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if not bias_corrected:
                    out[i, j] = a[i, j] - a[i].mean() - a[:, j].mean() + a.mean()
                elif i != j:
                    out[i, j] = a[i, j] - (a[i].sum() + a[:, j].sum()) / (n - 2) + a.sum() / ((n - 1) * (n - 2))
        return out

    def product(a, b):
        total = sum(a[i, j] * b[i, j] for i in range(n) for j in range(n) if i != j or not bias_corrected)
        return total / (n * (n - 3) if bias_corrected else n * n)

    a, b = centred(x), centred(z)
    ratio = product(a, b) / math.sqrt(product(a, a) * product(b, b))
    return ratio if bias_corrected else math.sqrt(ratio)


@pytest.mark.parametrize("bias_corrected", BOTH)
@pytest.mark.parametrize(("n", "shape", "other"), [(4, (3,), (2, 2)), (9, (2, 3, 3), (5,)), (17, (1,), (1,))])
def test_it_is_the_double_loop(n, shape, other, bias_corrected):
    x = drawn(n, *shape)
    z = drawn(n, *other, seed=1) + x.flatten(1).sum(1).reshape(-1, *[1] * len(other))
    expected = by_loops(x, z, bias_corrected)
    assert distance_correlation(x, z, bias_corrected=bias_corrected).item() == pytest.approx(expected, abs=1e-10)
    single = distance_correlation(x.float(), z.float(), bias_corrected=bias_corrected)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bias_corrected", BOTH)
def test_it_is_the_one_of_dcor(bias_corrected):
    dcor = pytest.importorskip("dcor")
    x, z = drawn(20, 5), drawn(20, 3, seed=1)
    theirs = (
        dcor.u_distance_correlation_sqr(x.numpy(), z.numpy())
        if bias_corrected
        else dcor.distance_correlation(x.numpy(), z.numpy())
    )
    ours = distance_correlation(x, z, bias_corrected=bias_corrected).item()
    assert ours == pytest.approx(theirs, abs=1e-10)


@pytest.mark.parametrize("bias_corrected", BOTH)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 7.0, 1e30])
def test_shift_scale_and_rotation_change_nothing(scale, bias_corrected):
    x, z = drawn(12, 6), drawn(12, 6, seed=1)
    rotation = torch.linalg.qr(drawn(6, 6, seed=2)).Q
    expected = distance_correlation(x, z, bias_corrected=bias_corrected)
    moved = distance_correlation(scale * (x @ rotation + 3), -scale * z, bias_corrected=bias_corrected)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-10)
    # Single precision keeps what stands far from 0, as far as its numbers do.
    single = distance_correlation((x + 100).float(), z.float() * scale, bias_corrected=bias_corrected)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-5)


def test_independent_data_of_many_dimensions():
    """The plain statistic says 0.9 of noise; the bias-corrected one is 0 within three standard errors."""
    values = {False: [], True: []}
    for seed in range(20):
        x, z = drawn(64, 3072, seed=seed), drawn(64, 512, seed=1000 + seed)
        for bias_corrected, found in values.items():
            found.append(distance_correlation(x, z, bias_corrected=bias_corrected).item())
    plain, unbiased = np.array(values[False]), np.array(values[True])
    assert plain.min() > 0.9
    assert abs(unbiased.mean()) < 3 * unbiased.std(ddof=1) / math.sqrt(len(unbiased))
    assert unbiased.min() < 0


@pytest.mark.parametrize("bias_corrected", BOTH)
def test_gradients_are_those_of_differences(bias_corrected):
    x, z = drawn(6, 4), drawn(6, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: distance_correlation(x, z, bias_corrected=bias_corrected), [z])


@pytest.mark.parametrize("bias_corrected", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["constant", "duplicated rows", "one apart", "huge", "a simplex"])
def test_degenerate_batches_are_finite(kind, dtype, bias_corrected):
    z = drawn(8, 8, seed=1)
    z = {
        "constant": torch.full((8, 8), 3.0, dtype=torch.float64),
        "duplicated rows": z[[0, 1, 2, 3] * 2],
        "one apart": torch.cat([torch.zeros(7, 8, dtype=torch.float64), torch.ones(1, 8, dtype=torch.float64)]),
        "huge": z / z.abs().max() * 6e4,
        "a simplex": torch.eye(8, dtype=torch.float64),
    }[kind]
    z = z.to(dtype).requires_grad_()
    for x in (drawn(8, 3, dtype=dtype), z.detach(), torch.zeros(8, 2, dtype=dtype)):
        found = distance_correlation(x, z, bias_corrected=bias_corrected)
        (grad,) = torch.autograd.grad(found, z)
        assert found.isfinite()
        assert grad.isfinite().all()
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        if kind == "constant" or not x.any() or (kind == "a simplex" and bias_corrected):
            assert found == 0
            assert not grad.any()


def test_autocast_does_not_reach_it():
    x, z = drawn(8, 64, dtype=torch.float32), drawn(8, 32, seed=1, dtype=torch.float32)
    expected = distance_correlation(x, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance_correlation(x, z), expected)


def test_images_of_whole_numbers_are_taken():
    images = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    z = drawn(8, 5, dtype=torch.float32)
    torch.testing.assert_close(distance_correlation(images, z), distance_correlation(images / 255, z))


@pytest.mark.parametrize(("bias_corrected", "n"), [(False, 1), (True, 3), (True, 1), (False, 0)])
def test_too_few_samples_are_refused(bias_corrected, n):
    with pytest.raises(ValueError, match=f"at least {4 if bias_corrected else 2} samples, got {n}"):
        distance_correlation(torch.zeros(n, 3), torch.zeros(n, 2), bias_corrected=bias_corrected)
    with pytest.raises(ValueError, match="x has 4 samples and z 5"):
        distance_correlation(torch.zeros(4, 3), torch.zeros(5, 3), bias_corrected=bias_corrected)


def test_no_gradient_reaches_the_images():
    images, z = drawn(6, 4).requires_grad_(), drawn(6, 3, seed=1).requires_grad_()
    DistanceCorrelationLoss()(images, z).backward()
    assert images.grad is None
    assert z.grad.abs().sum() > 0


def run_rank(rank, meeting, out):
    """One of two processes with every second row of a batch; it writes what it finds."""
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    x, z = torch.load(out + ".in", weights_only=True)
    mine = z[rank::2].requires_grad_()
    for gather in (True, False):
        mine.grad = None
        found = DistanceCorrelationLoss(gather=gather)(x[rank::2], mine)
        found.backward()
        torch.save((found.detach(), mine.grad), f"{out}.{rank}.{gather}")
    distributed.destroy_process_group()


OTHER_RANK = """
import sys, torch
from torch import distributed
from cleave.losses import DistanceCorrelationLoss
"""


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather is deprecated:FutureWarning")
def test_two_ranks_are_one_batch_or_two(tmp_path):
    x, z = drawn(10, 6), drawn(10, 4, seed=1)
    torch.save((x, z), tmp_path / "out.in")
    paths = [str(tmp_path / "meeting"), str(tmp_path / "out")]
    code = OTHER_RANK + inspect.getsource(run_rank) + "run_rank(1, *sys.argv[1:])"
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, *paths]) as other:
        run_rank(0, *paths)
    assert other.returncode == 0
    for gather in (True, False):
        found = [torch.load(tmp_path / f"out.{rank}.{gather}", weights_only=True) for rank in range(2)]
        whole = z.clone().requires_grad_()
        if gather:
            order = torch.cat([torch.arange(0, 10, 2), torch.arange(1, 10, 2)])
            expected = [distance_correlation(x[order], whole[order])] * 2
        else:
            expected = [distance_correlation(x[rank::2], whole[rank::2]) for rank in range(2)]
        # DDP takes the mean over ranks of the gradients.
        (torch.stack(expected).mean()).backward()
        for rank, (value, grad) in enumerate(found):
            torch.testing.assert_close(value, expected[rank].detach())
            torch.testing.assert_close(grad / 2, whole.grad[rank::2])
