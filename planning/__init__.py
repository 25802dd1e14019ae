"""Where to leave, cut and place: pure functions over what was measured. Never Lightning, never Hydra."""

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
    Overthinking,
    accuracy_at,
    calibration_error,
    exit_accuracy,
    measure,
    overthinking,
)
from cleave.planning.temperature import fit_temperatures

__all__ = [
    "Calibrated",
    "CurvePoint",
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
    "fit_temperatures",
    "measure",
    "overthinking",
    "place_exits",
]
