from __future__ import annotations

import pytest

from cleave.architectures.naming import did_you_mean, whole_number


def test_near_names_are_listed_nearest_first():
    hint = did_you_mean("layr2", ["conv1", "layer1", "layer2", "fc"])
    assert hint == " Did you mean 'layer2', 'layer1'?"


def test_nothing_near_gives_no_hint():
    assert did_you_mean("encoder", ["x", "y"]) == ""
    assert did_you_mean("encoder", []) == ""


def test_case_does_not_matter_and_the_option_is_listed_as_it_is():
    assert did_you_mean("ADAMW", ["AdamW", "sgd"]) == " Did you mean 'AdamW'?"


def test_limit_bounds_the_list_and_duplicates_count_once():
    options = ["layer1", "layer1", "layer2", "layer3", "layer4"]
    assert did_you_mean("layer", options, limit=2).count("'layer") == 2
    assert did_you_mean("layer1", options).count("'layer1'") == 1


def test_any_iterable_of_names_will_do():
    assert "'layer1'" in did_you_mean("layer_1", (name for name in ("layer1", "fc")))


@pytest.mark.parametrize("value", [True, 2.0, "3", None, 0])
def test_what_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(ValueError, match=f"width must be a whole number of at least 1, got {value!r}"):
        whole_number("width", value)


def test_a_whole_number_is_returned():
    assert whole_number("depth", 0, least=0) == 0
