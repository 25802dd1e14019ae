"""Pure objectives: tensors in, scalar out."""

from losses.generalized_head_distillation import GeneralizedHeadDistillationLoss
from losses.head_distillation import HeadDistillationLoss
from losses.information_bottleneck import InformationBottleneckLoss
from losses.knowledge_distillation import KnowledgeDistillationLoss
from losses.rate import RateLoss
from losses.reconstruction import ReconstructionLoss

__all__ = [
    "GeneralizedHeadDistillationLoss",
    "HeadDistillationLoss",
    "InformationBottleneckLoss",
    "KnowledgeDistillationLoss",
    "RateLoss",
    "ReconstructionLoss",
]
