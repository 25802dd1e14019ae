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
from cleave.planning.paths.candidates import candidate_paths, path_counts, path_features
from cleave.planning.paths.prediction import GaussianProcess
from cleave.planning.paths.problem import (
    PathOption,
    PathProblem,
    PathValue,
    cost_value,
    path_loads,
    path_problem,
    reward_value,
)
from cleave.planning.paths.records import PathRecord, SearchFolder, path_name
from cleave.planning.paths.rewards import Logistic, PathCost, PathLoad, PathReward
from cleave.planning.paths.search import (
    SearchResult,
    SearchSettings,
    TrainedPath,
    exhaustive_search,
    printed_algorithm,
    random_search,
    search_paths,
)
from cleave.planning.paths.throughput import Throughput, original_throughput, path_throughput
from cleave.planning.paths.times import (
    BlockTimes,
    crossings,
    measure_chain,
    read_block_times,
    write_block_times,
)
from cleave.planning.record_folder import RecordFolder, write_whole
from cleave.planning.temperature import fit_temperatures

__all__ = [
    "BlockTimes",
    "Calibrated",
    "CurvePoint",
    "Excess",
    "GaussianProcess",
    "Logistic",
    "Overthinking",
    "PathCost",
    "PathLoad",
    "PathOption",
    "PathProblem",
    "PathRecord",
    "PathReward",
    "PathValue",
    "Placement",
    "RecordFolder",
    "SearchFolder",
    "SearchResult",
    "SearchSettings",
    "Throughput",
    "TrainedPath",
    "accuracy_at",
    "budgeted_batch",
    "calibrate_accuracy_drop",
    "calibrate_budget",
    "calibration_error",
    "candidate_paths",
    "cost_curve",
    "cost_value",
    "crossings",
    "exhaustive_search",
    "exit_accuracy",
    "exit_bits",
    "expected_excess",
    "fit_ensemble",
    "fit_temperatures",
    "measure",
    "measure_chain",
    "original_throughput",
    "overthinking",
    "path_counts",
    "path_features",
    "path_loads",
    "path_name",
    "path_problem",
    "path_throughput",
    "place_exits",
    "printed_algorithm",
    "random_search",
    "read_block_times",
    "reward_value",
    "search_paths",
    "worse_than_exits",
    "write_block_times",
    "write_whole",
]
