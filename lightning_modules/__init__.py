"""Training and evaluation logic: one thin module per family of methods."""

from lightning_modules.base import Task
from lightning_modules.classification import Classification
from lightning_modules.cross_entropy import CrossEntropy
from lightning_modules.entropic import Entropic
from lightning_modules.exits import ExitTask
from lightning_modules.exits_distilled import ExitsDistilled
from lightning_modules.exits_joint import ExitsJoint
from lightning_modules.exits_separate import ExitsSeparate
from lightning_modules.generalized_head_distillation import GeneralizedHeadDistillation
from lightning_modules.head_distillation import HeadDistillation
from lightning_modules.information_bottleneck import InformationBottleneck
from lightning_modules.knowledge_distillation import KnowledgeDistillation
from lightning_modules.reconstruction import Reconstruction
from lightning_modules.split import SplitTask
from lightning_modules.teacher import Teacher
from lightning_modules.terms import (
    FeaturesTerm,
    FeatureTerm,
    GaussianTerm,
    LabelTerm,
    LogitsTerm,
    RateTerm,
    ReconstructionTerm,
    Term,
)
from lightning_modules.zero_time_waste import ZeroTimeWaste

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
