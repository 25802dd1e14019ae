import itertools

import numpy as np
import pytest

from cleave.architectures.linking.path import Path
from cleave.planning import candidate_paths, path_counts, path_features


def brute_force(local, host):
    """Every four blocks of which the definition holds, looked at one by one."""
    cross = [
        Path(*blocks)
        for blocks in itertools.product(range(local), range(host), range(host), range(local))
        if blocks[0] < blocks[3] and blocks[1] <= blocks[2]
    ]
    skips = [Path(lout, None, None, lin) for lout in range(local) for lin in range(local) if lin > lout + 1]
    return cross, skips


@pytest.mark.parametrize(("local", "host"), [(1, 1), (1, 3), (2, 1), (2, 5), (3, 0), (4, 2), (6, 6), (7, 3)])
def test_all_paths_are_those_of_brute_force_and_as_many_as_the_formula_says(local, host):
    cross, skips = brute_force(local, host)
    assert path_counts(local, host) == (len(cross), len(skips))
    for some, options in ((cross, {"skips": False}), (skips, {"cross": False}), (cross + skips, {})):
        if some:
            found = candidate_paths(local, host, **options)
            assert len(set(found)) == len(found)
            assert set(found) == set(some)
        else:
            with pytest.raises(ValueError, match="no path is left to choose from"):
                candidate_paths(local, host, **options)


def test_the_papers_pair_has_315_cross_connections_and_10_skips():
    assert path_counts(6, 6) == (315, 10)


def test_limits_leave_those_paths_that_keep_to_them():
    cross, skips = brute_force(6, 5)
    limits = {"lout": {0, 2}, "hin": {1}, "hout": {1, 3, 4}, "lin": {3, 5}}
    kept = [p for p in cross if all(block in limits[name] for name, block in p._asdict().items())]
    kept += [p for p in skips if p.lout in limits["lout"] and p.lin in limits["lin"]]
    assert set(candidate_paths(6, 5, **{name: sorted(blocks) for name, blocks in limits.items()})) == set(kept)
    assert len(candidate_paths(6, 6, lout=[0], hin=[1], skips=False)) == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local": 0, "host": 2}, "local must be a whole number of at least 1, got 0"),
        ({"local": 3, "host": -1}, "host must be a whole number of at least 0, got -1"),
        ({"local": 3, "host": 2, "lout": [3]}, "lout has 3, which is no local block; they are 0 to 2"),
        ({"local": 3, "host": 2, "hin": [-1]}, "hin has -1, which is no host block; they are 0 to 1"),
        ({"local": 3, "host": 2, "hout": ["layer1"]}, "hout has 'layer1', which is no host block"),
        ({"local": 3, "host": 2, "lin": [True]}, "lin has True, which is no local block"),
        ({"local": 3, "host": 2, "lin": "12"}, "lin must be a list of blocks"),
        ({"local": 3, "host": 2, "lout": 0}, "lout must be a list of blocks"),
        ({"local": 3, "host": 2, "lin": [0]}, r"no path is left .* 3 local and 2 host blocks .*lin=\[0\]"),
        ({"local": 3, "host": 2, "cross": False, "skips": False}, "cross=False, skips=False; allow more"),
    ],
)
def test_limits_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        candidate_paths(**arguments)


def test_features_tell_all_paths_apart_within_0_to_1():
    paths = candidate_paths(6, 6)
    features = path_features(paths, 6, 6)
    assert features.shape == (325, 7)
    assert features.min() == 0
    assert features.max() == 1
    assert len(np.unique(features, axis=0)) == 325
    skip, cross = path_features([Path(1, None, None, 5), Path(1, 2, 3, 5)], 6, 6)
    np.testing.assert_allclose(skip, [0.2, 0, 0, 1, 0.5, 0, 1])
    np.testing.assert_allclose(cross, [0.2, 0.4, 0.6, 1, 0.5, 2 / 6, 0])


def test_features_of_networks_of_one_block_are_finite():
    assert np.isfinite(path_features(candidate_paths(2, 1), 2, 1)).all()
    assert np.isfinite(path_features(candidate_paths(3, 0), 3, 0)).all()


@pytest.mark.parametrize(
    "path", [Path(0, 1, 6, 5), Path(0, 1, 4, 6), Path(3, 1, 4, 3), Path(0, 4, 1, 5), Path(-1, 0, 0, 1)]
)
def test_a_path_of_other_networks_has_no_features(path):
    with pytest.raises(ValueError, match="does not lead through 6 local and 6 host blocks"):
        path_features([path], 6, 6)
