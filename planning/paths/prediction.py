"""The accuracy of paths that were not trained, from those that were: a Gaussian process on path features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cleave.architectures.linking.path import Path
from cleave.architectures.naming import whole_number
from cleave.planning.paths.candidates import Floats, path_features

Predictor = Callable[[Sequence[Path], Sequence[float], Sequence[Path]], tuple[Floats, Floats]]
"""From trained paths, their accuracies and other paths to the mean and the standard deviation of theirs."""


@dataclass(frozen=True)
class GaussianProcess:
    r"""scikit-learn's Gaussian process, with a Matérn 5/2 kernel on :func:`path_features`, and noise.

    A few accuracies say little of a kernel, and a search for its best parameters often ends at a border of what is
    allowed. So of some length scales and noises those are taken under which the accuracies seen are most likely, the
    first where two are alike.

    Args:
        local: Number of the local network's blocks.
        host: Number of the host's.
        length_scales: Lengths to choose from, in units of the features, which lie between 0 and 1.
        noises: Variances of the noise to choose from, in shares of the accuracies' own variance.

    Raises:
        ValueError: A number is not above 0.
    """

    local: int
    host: int
    length_scales: tuple[float, ...] = (2.0, 1.0)
    noises: tuple[float, ...] = (0.01,)

    def __post_init__(self) -> None:
        whole_number("local", self.local)
        whole_number("host", self.host, least=0)
        for name in ("length_scales", "noises"):
            values = getattr(self, name)
            if not values or not all(value > 0 for value in values):
                raise ValueError(f"{name} must be numbers above 0, got {list(values)}")

    def __call__(
        self, paths: Sequence[Path], accuracies: Sequence[float], others: Sequence[Path]
    ) -> tuple[Floats, Floats]:
        """Predict the accuracies of other paths.

        Args:
            paths: Those that were trained, at least one.
            accuracies: Their accuracies.
            others: Those to predict.

        Returns:
            Mean and standard deviation of each.

        Raises:
            ValueError: No path was trained.
            ImportError: scikit-learn is missing.
        """
        if not paths or len(paths) != len(accuracies):
            raise ValueError(f"there must be an accuracy for each trained path, got {len(accuracies)} for {len(paths)}")
        known, asked = (path_features(some, self.local, self.host) for some in (paths, others))
        values = np.asarray(accuracies, dtype=np.float64)
        grid = itertools.product(self.length_scales, self.noises)
        fitted = [self._fit(known, values, length, noise) for length, noise in grid]
        best = max(fitted, key=lambda model: round(model.log_marginal_likelihood_value_, 9))
        mean, deviation = best.predict(asked, return_std=True)
        return mean, deviation

    def _fit(self, features: Floats, values: Floats, length: float, noise: float) -> Any:
        try:
            from sklearn.gaussian_process import GaussianProcessRegressor
            from sklearn.gaussian_process.kernels import Matern
        except ImportError as error:
            raise ImportError(
                "the Gaussian process needs scikit-learn, which the extra `search` brings: pip install scikit-learn"
            ) from error
        kernel = Matern(length_scale=length, length_scale_bounds="fixed", nu=2.5)
        return GaussianProcessRegressor(kernel, alpha=noise, optimizer=None, normalize_y=True).fit(features, values)
