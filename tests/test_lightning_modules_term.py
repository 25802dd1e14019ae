from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cleave.architectures import CutError, multi_exit_network
from cleave.lightning_modules import Term
from cleave.losses import (
    GeneralizedHeadDistillationLoss,
    HeadDistillationLoss,
    InformationBottleneckLoss,
    JointExitLoss,
    KnowledgeDistillationLoss,
    RateLoss,
    ReconstructionLoss,
)

from .split_tasks import backbone

VALUES: dict[str, Any] = {
    "labels": torch.tensor([1, 0]),
    "progress": 0.25,
    "student/logits": torch.tensor([[1.0, 0.0], [2.0, 0.0]]),
    "student/layer2": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "student/layer3": torch.ones(2, 3),
    "student/layer2/input": torch.tensor([[4.0, 6.0], [3.0, 4.0]]),
    "student/layer2/likelihoods": torch.full((2, 8), 0.25),
    "student/layer2/mean": torch.ones(2, 4),
    "student/layer2/log_variance": torch.zeros(2, 4),
    "teacher/logits": torch.zeros(2, 2),
    "teacher/layer2": torch.tensor([[1.0, 0.0], [0.0, 4.0]]),
    "teacher/layer3": torch.zeros(2, 3),
}
CROSS_ENTROPY = (math.log(1 + math.e) + math.log(1 + math.exp(-2))) / 2

# each loss, what its arguments are, and its unweighted value by hand
TERMS: dict[str, tuple[Any, list[str], float]] = {
    "label": (nn.CrossEntropyLoss, ["student/logits", "labels"], CROSS_ENTROPY),
    "logits": (
        lambda: KnowledgeDistillationLoss(1.0),
        ["student/logits", "teacher/logits", "labels"],
        CROSS_ENTROPY,
    ),
    "feature": (HeadDistillationLoss, ["student/layer2", "teacher/layer2"], (4 + 9) / 2),
    "reconstruction": (lambda: ReconstructionLoss(epsilon=0), ["student/layer2", "student/layer2/input"], (5 + 0) / 2),
    "rate": (lambda: RateLoss(pixels=16), ["student/layer2/likelihoods"], 8 * 2 / 16),
    "gaussian": (InformationBottleneckLoss, ["student/layer2/mean", "student/layer2/log_variance"], 4 * 0.5),
}


def outputs(of: list[str], owner: str) -> set[str]:
    return {name.removeprefix(f"{owner}/") for name in of if name.startswith(owner)}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
def test_a_term_asks_for_what_it_needs_and_weighs_its_loss(name: str, weight: float) -> None:
    make, of, expected = TERMS[name]
    term = Term(make(), of, weight)
    assert set(term.asks("student")) == outputs(of, "student")
    assert set(term.asks("teacher")) == outputs(of, "teacher")
    needed = {key: VALUES[key] for key in of}
    assert term(needed).item() == pytest.approx(expected, rel=1e-6)
    named = term.losses("x", needed)
    assert named.keys() == {"x"}
    assert named["x"].item() == pytest.approx(weight * expected, rel=1e-6)


def test_a_list_in_the_list_is_a_mapping_by_name() -> None:
    loss = GeneralizedHeadDistillationLoss({"layer3": 2.0, "layer2": 1.0, "layer1": 0.0})
    layers = list(loss.weights)
    assert layers == ["layer3", "layer2"]  # a layer of weight 0 is not even computed
    of = [[f"{owner}/{layer}" for layer in layers] for owner in ("student", "teacher")]
    term = Term(loss, of, weight=0.5)
    assert term.asks("student") == term.asks("teacher") == ("layer3", "layer2")
    named = {name: value.item() for name, value in term.losses("head", VALUES).items()}
    assert named == {"head/layer3": pytest.approx(0.5 * 2 * 3), "head/layer2": pytest.approx(0.5 * 6.5)}


def test_parts_of_the_batch_and_the_progress_are_arguments_too() -> None:
    class Loss(nn.Module):
        def forward(self, both: Mapping[str, Tensor], progress: float, labels: Tensor) -> Tensor:
            assert list(both) == ["layer2/input", "labels"]
            assert both["labels"] is labels
            return progress * both["layer2/input"].sum()

    term = Term(Loss(), [["student/layer2/input", "labels"], "progress", "labels"])
    assert term.owners == ("student",)
    assert term.follows_progress()
    assert term(VALUES).item() == pytest.approx(0.25 * 17)


def test_a_group_is_a_list_in_the_order_of_the_exits() -> None:
    network = multi_exit_network(backbone(), torch.randn(2, 1, 8, 8), at=["layer1", "layer2"])
    term = Term(JointExitLoss("linear"), ["student/exits", "labels", "progress"])
    term.bind(network)
    assert term.asks("student") == ("layer1/logits", "layer2/logits", "logits")
    values = {f"student/{name}": torch.full((2, 10), float(i)) for i, name in enumerate(term.asks("student"))}
    found = term.losses("exit", values | {"labels": torch.zeros(2, dtype=torch.int64), "progress": 1.0})
    assert {name: value.item() for name, value in found.items()} == {
        f"exit/{name}": pytest.approx(share * math.log(10), rel=1e-6)
        for name, share in {"layer1": 1 / 6, "layer2": 2 / 6, "final": 3 / 6}.items()
    }
    with pytest.raises(CutError, match="no ensemble"):
        Term(JointExitLoss(), ["student/answers", "labels"]).bind(network)


def test_a_term_holds_its_loss_as_a_module() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(2))
    assert [*Term(loss, ["student/logits", "labels"]).buffers()] == [loss.weight]


def test_half_precision_reaches_a_loss_without_parameters_in_single() -> None:
    half = VALUES | {"student/logits": VALUES["student/logits"].bfloat16()}
    loss = Term(nn.CrossEntropyLoss(), ["student/logits", "labels"])(half)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(CROSS_ENTROPY, rel=1e-6)

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, logits: Tensor) -> Tensor:
            return (self.scale * logits).sum()

    assert Term(Learned(), ["student/logits"])(half).dtype == torch.bfloat16


@pytest.mark.parametrize("weight", [-1.0, -1e-9, math.inf, math.nan])
@pytest.mark.parametrize("name", TERMS)
def test_weights_are_checked(name: str, weight: float) -> None:
    with pytest.raises(ValueError, match="the weight of a term must be a number of at least 0, got"):
        Term(TERMS[name][0](), TERMS[name][1], weight)


def test_what_is_no_list_of_names_is_refused() -> None:
    for of in ("student/logits", []):
        with pytest.raises(ValueError, match="of is a list of names, one for each argument of the loss"):
            Term(nn.CrossEntropyLoss(), of)
    with pytest.raises(ValueError, match=r"a term reads 'labls', which no batch has: it has labels, progress"):
        Term(nn.CrossEntropyLoss(), ["student/logits", "labls"])(VALUES)
