"""Training and evaluation logic: one thin module per family of methods."""

from cleave.lightning_modules.base import Task
from cleave.lightning_modules.exits import ExitTask
from cleave.lightning_modules.methods.classification import Classification
from cleave.lightning_modules.methods.cross_entropy import CrossEntropy
from cleave.lightning_modules.methods.entropic import Entropic
from cleave.lightning_modules.methods.exits_distilled import ExitsDistilled
from cleave.lightning_modules.methods.exits_joint import ExitsJoint
from cleave.lightning_modules.methods.exits_separate import ExitsSeparate
from cleave.lightning_modules.methods.generalized_head_distillation import GeneralizedHeadDistillation
from cleave.lightning_modules.methods.head_distillation import HeadDistillation
from cleave.lightning_modules.methods.information_bottleneck import InformationBottleneck
from cleave.lightning_modules.methods.knowledge_distillation import KnowledgeDistillation
from cleave.lightning_modules.methods.reconstruction import Reconstruction
from cleave.lightning_modules.methods.zero_time_waste import ZeroTimeWaste
from cleave.lightning_modules.split import SplitTask
from cleave.lightning_modules.teacher import Teacher
from cleave.lightning_modules.terms import (
    FeaturesTerm,
    FeatureTerm,
    GaussianTerm,
    LabelTerm,
    LogitsTerm,
    RateTerm,
    ReconstructionTerm,
    Term,
)

__all__ = [
    "Classification",
    "CrossEntropy",
    "Entropic",
    "ExitTask",
    "ExitsDistilled",
    "ExitsJoint",
    "ExitsSeparate",
    "FeatureTerm",
    "FeaturesTerm",
    "GaussianTerm",
    "GeneralizedHeadDistillation",
    "HeadDistillation",
    "InformationBottleneck",
    "KnowledgeDistillation",
    "LabelTerm",
    "LogitsTerm",
    "RateTerm",
    "Reconstruction",
    "ReconstructionTerm",
    "SplitTask",
    "Task",
    "Teacher",
    "Term",
    "ZeroTimeWaste",
]
