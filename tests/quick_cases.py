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
    "test_architectures_inserts.py::test_inserts_that_cannot_stand_together_are_refused": 2,
    "test_architectures_layouts.py::test_layouts_of_networks": 2,
    "test_architectures_network.py::test_an_output_alone_equals_the_same_beside_all_others": 3,
    "test_architectures_network.py::test_nothing_alters_what_was_returned_or_given": 3,
    "test_architectures_node_graph.py::test_steps_of_training_alone_go_with_the_nodes_they_serve": 3,
    "test_architectures_stages.py::test_refusals_say_why_in_one_sentence_and_leave_the_backbone_alone": 2,
    "test_architectures_stages.py::test_stages_reproduce_the_backbone_in_both_modes": 2,
    "test_architectures_train_parts.py::test_every_weight_is_in_one_part": 3,
    "test_architectures_train_parts.py::test_what_frozen_parts_give_is_stored_once_and_for_all": 3,
    "test_composition.py::test_combinations_go_on_exactly": 2,
    "test_composition.py::test_combinations_train_test_export_and_run": 2,
    "test_datamodules_resume.py::test_resuming_at_any_step_is_exact": 2,
    "test_deployment_exits.py::test_each_sample_leaves_where_the_module_says_with_its_answer_and_its_bytes": 2,
    "test_deployment_feature_codecs.py::test_a_bundle_passes_the_gate_and_runs": 2,
    "test_deployment_robust.py::test_a_manifest_of_too_much_is_refused_at_once": 3,
    "test_deployment_sample_errors.py::test_one_bad_payload_leaves_the_others_alone": 2,
    "test_docs_library.py::test_an_exif_orientation_is_treated_alike_in_training_and_on_the_device": 2,
    "test_lightning_modules_cross_entropy.py::test_the_loss_is_the_labels_cross_entropy": 3,
    "test_lightning_modules_links.py::test_two_parties_learn_what_one_process_learns_in_every_bit": 2,
    "test_lightning_modules_resuming.py::test_a_resumed_run_has_the_rates_and_weights_of_an_uninterrupted_one": 2,
    "test_lightning_modules_split.py::test_cached_features_change_no_loss": 2,
    "test_lightning_modules_split.py::test_same_seed_same_numbers": 2,
    "test_lightning_modules_split.py::test_testing_goes_through_the_bytes": 2,
    "test_scripts_compare.py::test_plots_have_their_size_and_nothing_is_cut_off": 2,
    "test_scripts_evaluate.py::test_what_cannot_be_evaluated_is_refused": 2,
    "test_scripts_exits.py::test_each_method_trains_tests_and_is_rebuilt_from_its_checkpoint": 2,
    "test_scripts_exits.py::test_mistakes_are_told_before_training": 2,
    "test_scripts_exits_export.py::test_a_policys_state_crosses_placements_and_is_counted": 2,
    "test_scripts_exits_report.py::test_what_cannot_be_reported_is_refused_before_anything_is_written": 2,
    "test_scripts_experiments.py::test_each_experiment_runs_tests_and_is_rebuilt_from_its_checkpoint": 2,
    "test_scripts_given.py::test_a_value_of_another_type_names_its_key": 3,
    "test_scripts_guard.py::test_a_dead_encoder_is_named_with_its_layer": 2,
    "test_scripts_guard.py::test_without_the_guard_testing_and_export_say_that_it_diverged": 2,
    "test_scripts_hints.py::test_a_group_set_to_null_is_one_sentence_with_the_keys_to_set": 2,
    "test_scripts_links.py::test_a_path_that_cannot_be_is_refused": 2,
    "test_scripts_methods.py::test_every_width_runs_with_its_own_batchnorm_at_the_accuracy_in_the_manifest": 3,
    "test_scripts_methods.py::test_the_bundle_gives_each_image_the_modules_logits_through_the_modules_bytes": 2,
    "test_scripts_methods.py::test_the_checkpoint_alone_gives_the_same_numbers": 2,
    "test_scripts_numbers.py::test_what_has_no_effect_is_named_with_what_gives_it_one": 2,
    "test_scripts_plan.py::test_mistakes_are_told_before_the_network_is_built": 2,
    "test_scripts_privacy.py::test_attackers_and_bounds_go_over_any_objective": 2,
    "test_scripts_privacy.py::test_learned_noise_grows_and_is_exported": 2,
    "test_scripts_privacy.py::test_mistakes_are_told_before_training": 2,
    "test_scripts_private_training.py::test_what_would_break_the_promise_is_refused_in_words": 2,
    "test_scripts_recipe.py::test_a_mistake_in_any_step_is_told_before_the_first_is_trained": 2,
    "test_scripts_start_up.py::test_help_shows_examples_that_compose": 2,
    "test_scripts_tracking.py::test_the_log_of_a_resumed_run_leaves_what_is_there": 2,
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
