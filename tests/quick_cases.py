"""Which cases of a test `make test` runs: one for each path through the code; `make test-full` runs them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def some_quick(cases: Iterable[Any], quick: Callable[[Any], bool]) -> list[Any]:
    """The cases of a test, of which those that are not ``quick`` are marked slow."""
    return [case if quick(case) else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)


# Of each of these families `make test` runs every second or third case that is not slow anyway, `make test-full` all.
# They take long, and their cases go through the same code with other names or numbers.
EVERY = {
    "test_architectures_faithful_cuts.py::test_a_cut_equals_the_network_seed_by_seed": 2,
    "test_architectures_faithful_cuts.py::test_a_listed_point_is_accepted_and_copies_compute_the_same": 2,
    "test_architectures_faithful_cuts.py::test_what_a_cut_would_lose_is_refused_with_its_line_and_a_way_out": 2,
    "test_architectures_network.py::test_an_output_alone_equals_the_same_beside_all_others": 3,
    "test_architectures_node_graph.py::test_steps_of_training_alone_go_with_the_nodes_they_serve": 3,
    "test_architectures_stages.py::test_refusals_say_why_in_one_sentence_and_leave_the_backbone_alone": 2,
    "test_architectures_train_parts.py::test_every_weight_is_in_one_part": 3,
    "test_architectures_train_parts.py::test_what_frozen_parts_give_is_stored_once_and_for_all": 3,
    "test_composition.py::test_combinations_train_test_export_and_run": 2,
    "test_datamodules_resume.py::test_resuming_at_any_step_is_exact": 2,
    "test_deployment_feature_codecs.py::test_a_bundle_passes_the_gate_and_runs": 2,
    "test_deployment_robust.py::test_a_manifest_of_too_much_is_refused_at_once": 3,
    "test_deployment_sample_errors.py::test_one_bad_payload_leaves_the_others_alone": 2,
    "test_lightning_modules_resuming.py::test_a_resumed_run_has_the_rates_and_weights_of_an_uninterrupted_one": 2,
    "test_scripts_exits.py::test_each_method_trains_tests_and_is_rebuilt_from_its_checkpoint": 2,
    "test_scripts_exits_report.py::test_what_cannot_be_reported_is_refused_before_anything_is_written": 2,
    "test_scripts_experiments.py::test_each_experiment_runs_tests_and_is_rebuilt_from_its_checkpoint": 2,
    "test_scripts_links.py::test_a_path_that_cannot_be_is_refused": 2,
    "test_scripts_methods.py::test_every_width_runs_with_its_own_batchnorm_at_the_accuracy_in_the_manifest": 3,
    "test_scripts_methods.py::test_the_checkpoint_alone_gives_the_same_numbers": 2,
    "test_scripts_privacy.py::test_attackers_and_bounds_go_over_any_objective": 2,
    "test_scripts_privacy.py::test_learned_noise_grows_and_is_exported": 2,
    "test_scripts_privacy.py::test_mistakes_are_told_before_training": 2,
    "test_scripts_recipe.py::test_a_mistake_in_any_step_is_told_before_the_first_is_trained": 2,
}


def leave_out(items: Iterable[pytest.Item]) -> None:
    """Mark those slow that the table leaves out."""
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            families.setdefault(f"{item.path.name}::{getattr(item, 'originalname', item.name)}", []).append(item)
    for name, each in EVERY.items():
        for number, item in enumerate(families.get(name, [])):
            if number % each:
                item.add_marker(pytest.mark.slow)
