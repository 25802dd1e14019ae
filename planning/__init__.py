"""Where to leave, cut and place: pure functions over what was measured. Never Lightning, never Hydra."""

from cleave.planning.candidates import Candidate, candidate_plan
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
from cleave.planning.graphs.chain import chain_graph
from cleave.planning.graphs.closed_sets import TooManySetsError, closed_sets
from cleave.planning.graphs.layer_graph import Layer, LayerGraph, Value, graph_digest, layer_graph
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
from cleave.planning.planners.dads import dads_heavy, dads_light
from cleave.planning.planners.every import PLANNERS, Planner, every_plan
from cleave.planning.planners.jps import jps
from cleave.planning.planners.local import local
from cleave.planning.planners.neurosurgeon import neurosurgeon
from cleave.planning.planners.optimum import optima, optimum
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.pareto import pareto
from cleave.planning.planners.plan import Plan, Sent, Stages, write_plan
from cleave.planning.planners.server import server
from cleave.planning.profiles.link import Link, RateTrace, read_trace
from cleave.planning.profiles.machine import Machine, Power
from cleave.planning.profiles.measured import measure_profile
from cleave.planning.profiles.profile import Profile, read_profile, write_profile
from cleave.planning.profiles.regression import HeldOut, LayerRegression, fit_regression, held_out_error
from cleave.planning.profiles.roofline import roofline
from cleave.planning.record_folder import RecordFolder, write_whole
from cleave.planning.simulation.arrivals import every, poisson, read_arrivals
from cleave.planning.simulation.flow_shop import completions, johnson_order, makespan
from cleave.planning.simulation.report import Simulation, Span
from cleave.planning.simulation.simulate import simulate
from cleave.planning.simulation.work import Operation, Task, Work, plan_work, stage_work
from cleave.planning.temperature import fit_temperatures

__all__ = [
    "PLANNERS",
    "BlockTimes",
    "Calibrated",
    "Candidate",
    "CurvePoint",
    "Excess",
    "GaussianProcess",
    "HeldOut",
    "Layer",
    "LayerGraph",
    "LayerRegression",
    "Link",
    "Logistic",
    "Machine",
    "Operation",
    "Overthinking",
    "PathCost",
    "PathLoad",
    "PathOption",
    "PathProblem",
    "PathRecord",
    "PathReward",
    "PathValue",
    "Placement",
    "Plan",
    "PlanOptions",
    "Planner",
    "Power",
    "Profile",
    "RateTrace",
    "RecordFolder",
    "SearchFolder",
    "SearchResult",
    "SearchSettings",
    "Sent",
    "Simulation",
    "Span",
    "Stages",
    "Task",
    "Throughput",
    "TooManySetsError",
    "TrainedPath",
    "Value",
    "Work",
    "accuracy_at",
    "budgeted_batch",
    "calibrate_accuracy_drop",
    "calibrate_budget",
    "calibration_error",
    "candidate_paths",
    "candidate_plan",
    "chain_graph",
    "closed_sets",
    "completions",
    "cost_curve",
    "cost_value",
    "crossings",
    "dads_heavy",
    "dads_light",
    "every",
    "every_plan",
    "exhaustive_search",
    "exit_accuracy",
    "exit_bits",
    "expected_excess",
    "fit_ensemble",
    "fit_regression",
    "fit_temperatures",
    "graph_digest",
    "held_out_error",
    "johnson_order",
    "jps",
    "layer_graph",
    "local",
    "makespan",
    "measure",
    "measure_chain",
    "measure_profile",
    "neurosurgeon",
    "optima",
    "optimum",
    "original_throughput",
    "overthinking",
    "pareto",
    "path_counts",
    "path_features",
    "path_loads",
    "path_name",
    "path_problem",
    "path_throughput",
    "place_exits",
    "plan_work",
    "poisson",
    "printed_algorithm",
    "random_search",
    "read_arrivals",
    "read_block_times",
    "read_profile",
    "read_trace",
    "reward_value",
    "roofline",
    "search_paths",
    "server",
    "simulate",
    "stage_work",
    "worse_than_exits",
    "write_block_times",
    "write_plan",
    "write_profile",
    "write_whole",
]
