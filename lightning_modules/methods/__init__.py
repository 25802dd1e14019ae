"""Published methods, each a task of a few lines: its terms, and what it trains."""

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

__all__ = [
    "Classification",
    "CrossEntropy",
    "Entropic",
    "ExitsDistilled",
    "ExitsJoint",
    "ExitsSeparate",
    "GeneralizedHeadDistillation",
    "HeadDistillation",
    "InformationBottleneck",
    "KnowledgeDistillation",
    "Reconstruction",
    "ZeroTimeWaste",
]
