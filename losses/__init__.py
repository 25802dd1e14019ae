"""Pure objectives: tensors in, a scalar or several named ones out."""

from cleave.losses.exit_distillation import ExitDistillationLoss
from cleave.losses.generalized_head_distillation import GeneralizedHeadDistillationLoss
from cleave.losses.geometric_ensemble import GeometricEnsembleLoss, geometric_ensemble
from cleave.losses.geometric_ensemble_fit import fit_geometric_ensemble
from cleave.losses.head_distillation import HeadDistillationLoss
from cleave.losses.information_bottleneck import InformationBottleneckLoss
from cleave.losses.joint_exit import JointExitLoss
from cleave.losses.knowledge_distillation import KnowledgeDistillationLoss
from cleave.losses.privacy.adversarial_reconstruction import AdversarialReconstructionLoss
from cleave.losses.privacy.constrained import BoundedLoss
from cleave.losses.privacy.distance_correlation import DistanceCorrelationLoss, distance_correlation
from cleave.losses.privacy.info_nce import InfoNCELoss, information_below
from cleave.losses.privacy.noise_scale import NoiseScaleLoss
from cleave.losses.privacy.ssim import structural_similarity
from cleave.losses.rate import RateLoss
from cleave.losses.reconstruction import ReconstructionLoss

__all__ = [
    "AdversarialReconstructionLoss",
    "BoundedLoss",
    "DistanceCorrelationLoss",
    "ExitDistillationLoss",
    "GeneralizedHeadDistillationLoss",
    "GeometricEnsembleLoss",
    "HeadDistillationLoss",
    "InfoNCELoss",
    "InformationBottleneckLoss",
    "JointExitLoss",
    "KnowledgeDistillationLoss",
    "NoiseScaleLoss",
    "RateLoss",
    "ReconstructionLoss",
    "distance_correlation",
    "fit_geometric_ensemble",
    "geometric_ensemble",
    "information_below",
    "structural_similarity",
]
