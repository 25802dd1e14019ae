"""Networks as users write them: what their forwards do beyond calling one layer after the other.

Each is cut after ``a`` and ``b`` unless it says otherwise in ``at``. ``refused`` is what the refusal of a cut says;
where it is ``None`` a cut equals the network in outputs, gradients, buffers and random draws, seed by seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.utils.checkpoint as cp
from torch import Tensor, nn
from torch.distributions import Bernoulli
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

NETWORKS: dict[str, Callable[[], nn.Module]] = {}


def block(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())


class Plain(nn.Module):
    """Three blocks and a classifier of 8 × 8 pixels."""

    at: ClassVar[list[str]] = ["a", "b"]
    refused: ClassVar[str | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 8), block(8, 8), block(8, 8)
        self.fc = nn.Linear(8, 5)

    def __init_subclass__(cls) -> None:
        NETWORKS[cls.__name__] = cls

    def sample(self) -> Tensor:
        return torch.randn(2, 3, 8, 8)

    def end(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.end(self.c(self.b(self.a(x))))


class RoundFunction(torch.autograd.Function):
    """Rounds; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class ReverseFunction(torch.autograd.Function):
    """Passes values on and turns gradients round, with a context of its own."""

    @staticmethod
    def forward(x: Tensor, strength: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.strength = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


straight_through = RoundFunction.apply


@torch.jit.script
def scripted_swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


# --- gradients


class StraightThrough(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.c(straight_through(self.b(straight_through(self.a(x) * 4)))))


class GradientReversal(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.c(ReverseFunction.apply(self.b(self.a(x)), 0.3)))


class FrozenStem(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x) * 2
        return self.end(self.c(self.b(x)))


class FrozenMiddle(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.set_grad_enabled(not self.training):
            x = self.b(x)
        return self.end(self.c(x))


class Detached(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        return self.end(self.c(x.detach()) + 0 * self.c(x).detach() + x)


class MixedPrecision(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.b(x)
        with torch.autocast("cpu", enabled=False):
            return self.end(self.c(x.float()))


class ByGradMode(Plain):
    refused = r"user_networks\.py:\d+ `x = x \* 2` .* takes another way"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if torch.is_grad_enabled():
            x = x * 2
        return self.end(self.c(self.b(x)))


class TensorHook(Plain):
    refused = r"`x\.register_hook\(.*` .* hands a function to another one"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x.register_hook(lambda gradient: gradient * 0.5)
        return self.end(self.c(self.b(x)))


# --- random draws


class DroppedLayer(Plain):
    refused = r"`if self\.training and torch\.rand\(1\)\.item\(\) < 0\.5:` .* branches on a random draw"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for layer in (self.b, self.c):
            if self.training and torch.rand(1).item() < 0.5:
                continue
            x = x + layer(x)
        return self.end(x)


class DroppedByPython(Plain):
    refused = r"`if not \(self\.training and random\.random\(\) < 0\.5\):` .* draws random numbers"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if not (self.training and random.random() < 0.5):
            x = x + self.b(x)
        return self.end(self.c(x))


class DroppedByItsOwn(Plain):
    refused = r"`if not \(self\.training and self\.dice\.random\(\) < 0\.5\):` .* draws random numbers"

    def __init__(self) -> None:
        super().__init__()
        self.dice = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if not (self.training and self.dice.random() < 0.5):
            x = x + self.b(x)
        return self.end(self.c(x))


class OwnDice(nn.Module):
    """A block that draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dice = nn.Conv2d(8, 8, 1), random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.training and self.dice.random() < 0.5 else x


class DiceInABlock(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Sequential(OwnDice(), block(8, 8))


class ScaledByNumPy(Plain):
    refused = r"np\.random\.rand\(\).* draws random numbers"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * (np.random.rand() if self.training else 0.5)  # noqa: NPY002 as users write it
        return self.end(self.c(self.b(x)))


class StochasticDepth(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.b(x) * (Bernoulli(0.5).sample() if self.training else 0.5)
        return self.end(self.c(x))

    at = ["a"]  # noqa: RUF012


class GaussianNoise(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x = x + 0.1 * torch.randn(1) + 0.1 * torch.randn_like(x)
        return self.end(F.dropout(self.c(self.b(x)), 0.3, self.training))


class Gumbel(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        return self.end(self.c(x * F.gumbel_softmax(x, dim=1)))


# --- checkpoints, hooks, scripts


class Checkpointed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.c(checkpoint(self.b, self.a(x), use_reentrant=False)))


class CheckpointedTwice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = cp.checkpoint(self.b, self.a(x), use_reentrant=True)
        return self.end(cp.checkpoint(self.c, x, use_reentrant=True))


class CheckpointedLambda(Plain):
    refused = r"checkpoints a function\. Give checkpoint a module"

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.c(checkpoint(lambda y: self.b(y), self.a(x), use_reentrant=False)))


class CutInCheckpoint(Checkpointed):
    at = ["b.0"]  # noqa: RUF012
    refused = "layer 'b.0' lies in 'b', which is checkpointed"


class HookOnLayer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.b.register_forward_hook(lambda module, inputs, output: output * 2)


class HookOnOpened(HookOnLayer):
    at = ["b.0"]  # noqa: RUF012
    refused = "the forward of 'b' has a forward hook, which would no longer run"


class KeepsItsMode(Plain):
    refused = r"the forward of KeepsItsMode has a train\(\) of its own, which would no longer run"

    def train(self, mode: bool = True) -> KeepsItsMode:
        super().train(mode)
        self.a.eval()
        return self


class ScriptedFunction(Plain):
    refused = r"calls a scripted function"

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.c(self.b(scripted_swish(self.a(x)))))


class ScriptedLayer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.c = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()))


# --- state


class StepCounter(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return self.end(self.c(self.b(self.a(x) / (1 + self.steps))))


class MovingAverage(StepCounter):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            with torch.no_grad():
                self.steps.lerp_(x.mean(), 0.1)
        return self.end(self.c(self.b(x - self.steps)))


class AssignedBuffer(StepCounter):
    refused = r"puts a new value into the buffer 'steps'\. Write self\.steps\.copy_"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.steps = 0.9 * self.steps + 0.1 * x.detach().mean()
        return self.end(self.c(self.b(x - self.steps)))


class PythonCounter(Plain):
    refused = "takes another way when it is called once more|changes self.calls from call to call"
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.end(self.c(self.b(self.a(x) / self.calls)))


class Remembering(Plain):
    refused = "uses what an earlier call has left behind"
    memory: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.memory is not None:
            x = x + self.memory.mean()
        self.memory = x.detach()
        return self.end(self.c(self.b(x)))


# --- values and sizes


class BranchOnValue(Plain):
    refused = r"`if x\.mean\(\) > 0:` .* branches on the values of a tensor"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.mean() > 0:
            x = x * 2
        return self.end(self.c(self.b(x)))


class BranchOnSize(Plain):
    refused = r"`if x\.shape\[-1\] < 4:` .* branches on the size of a tensor"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.shape[-1] < 4:
            x = F.interpolate(x, scale_factor=2)
        return self.end(self.c(self.b(x)))


class AssertsSize(Plain):
    refused = r"asserts something of a tensor\. Write torch\._assert"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        assert x.shape[1] == 8
        return self.end(self.c(self.b(x)))


class AssignsItems(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).clone()
        x[:, 0] = 0
        x[:, 1:3] += 1
        return self.end(self.c(self.b(x)))


class WritesIntoZeros(Plain):
    refused = "writes into a tensor that does not come from the input"

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        mask = torch.zeros(1, 8, 8, 8)
        mask[:, :4] = x[:1, :4]
        return self.end(self.c(self.b(x * mask)))


# --- layers in other ways


class Residuals(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for layer in (self.b, self.c, self.b):
            x = F.relu(x + layer(x), inplace=True)
        return self.end(x)

    at = ["a"]  # noqa: RUF012


class Dense(Plain):
    at = ["a", "b", "join"]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.a(x)]
        for layer in (self.b, self.c):
            features.append(layer(features[-1]))
        return self.end(self.join(torch.cat(features, 1)))

    refused = "the cut after 'b' is crossed by 2 tensors"


class Functional(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.a(x), self.weight.softmax(1)) * self.scales[0]
        return self.end(self.c(self.b(x))) * self.scales[1]


class Tied(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.c[0].weight = self.b[0].weight


class Normalised(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.b = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.c = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))


class Recurrent(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True, dropout=0.3, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        tokens, _ = self.lstm(self.b(self.a(x)).flatten(2).transpose(1, 2))
        return self.fc(tokens[:, -1])


class ReturnsDict(Plain):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.b(self.a(x))
        return {"logits": self.end(self.c(x)), "feature": x}


class ReturnsPair(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.c(self.b(self.a(x)))
        return self.end(x), x


class Derived(Plain):
    refused = "computed from parameters or buffers out of sight"

    def forward(self, x: Tensor) -> Tensor:
        norm = sum(weight.square().sum() for weight in self.fc.parameters())
        return self.end(self.c(self.b(self.a(x)))) / norm


class Tokens(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Embedding(11, 8), nn.GELU(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.place = nn.Parameter(torch.zeros(6, 8))

    def sample(self) -> Tensor:
        return torch.randint(11, (2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(self.b(self.a(x) + self.place)).mean(1))
