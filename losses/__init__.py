"""Pure objectives: tensors in, scalar out."""

from losses.exit_distillation import ExitDistillationLoss
from losses.generalized_head_distillation import GeneralizedHeadDistillationLoss
from losses.geometric_ensemble import GeometricEnsembleLoss, geometric_ensemble
from losses.head_distillation import HeadDistillationLoss
from losses.information_bottleneck import InformationBottleneckLoss
from losses.joint_exit import JointExitLoss
from losses.knowledge_distillation import KnowledgeDistillationLoss
from losses.rate import RateLoss
from losses.reconstruction import ReconstructionLoss

__all__ = [
    "ExitDistillationLoss",
    "GeneralizedHeadDistillationLoss",
    "GeometricEnsembleLoss",
    "HeadDistillationLoss",
    "InformationBottleneckLoss",
    "JointExitLoss",
    "KnowledgeDistillationLoss",
    "RateLoss",
    "ReconstructionLoss",
    "geometric_ensemble",
]
