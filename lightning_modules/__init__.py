"""Training and evaluation: one task of terms and evaluators, and the published methods as thin classes of it."""

from cleave.lightning_modules.checkpoints.loading import LoadedCheckpoint, load_checkpoint
from cleave.lightning_modules.evaluators import Evaluator, Measured, Passed, default_evaluators
from cleave.lightning_modules.frozen import Frozen
from cleave.lightning_modules.linking.links import Links
from cleave.lightning_modules.linking.parties import Crossing, TwoParties
from cleave.lightning_modules.methods import (
    Classification,
    CrossEntropy,
    Entropic,
    ExitsDistilled,
    ExitsJoint,
    ExitsSeparate,
    GeneralizedHeadDistillation,
    HeadDistillation,
    InformationBottleneck,
    KnowledgeDistillation,
    Reconstruction,
    ZeroTimeWaste,
)
from cleave.lightning_modules.optimization.training import Training
from cleave.lightning_modules.private_training.settings import DPSGD
from cleave.lightning_modules.task import Task
from cleave.lightning_modules.term import Term

__all__ = [
    "DPSGD",
    "Classification",
    "CrossEntropy",
    "Crossing",
    "Entropic",
    "Evaluator",
    "ExitsDistilled",
    "ExitsJoint",
    "ExitsSeparate",
    "Frozen",
    "GeneralizedHeadDistillation",
    "HeadDistillation",
    "InformationBottleneck",
    "KnowledgeDistillation",
    "Links",
    "LoadedCheckpoint",
    "Measured",
    "Passed",
    "Reconstruction",
    "Task",
    "Term",
    "Training",
    "TwoParties",
    "ZeroTimeWaste",
    "default_evaluators",
    "load_checkpoint",
]
