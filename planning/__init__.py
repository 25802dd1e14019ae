"""Where to leave, cut and place: pure functions over what was measured. Never Lightning, never Hydra."""

from cleave.planning.ensemble_fit import fit_ensemble, worse_than_exits
from cleave.planning.exit_calibration import (
    Calibrated,
    budgeted_batch,
    calibrate_accuracy_drop,
    calibrate_budget,
    cost_curve,
)
from cleave.planning.exit_placement import Placement, exit_bits, place_exits
from cleave.planning.exit_statistics import (
    CurvePoint,
    Excess,
    Overthinking,
    accuracy_at,
    calibration_error,
    exit_accuracy,
    expected_excess,
    measure,
    overthinking,
)
from cleave.planning.temperature import fit_temperatures

__all__ = [
    "Calibrated",
    "CurvePoint",
    "Excess",
    "Overthinking",
    "Placement",
    "accuracy_at",
    "budgeted_batch",
    "calibrate_accuracy_drop",
    "calibrate_budget",
    "calibration_error",
    "cost_curve",
    "exit_accuracy",
    "exit_bits",
    "expected_excess",
    "fit_ensemble",
    "fit_temperatures",
    "measure",
    "overthinking",
    "place_exits",
    "worse_than_exits",
]
