"""The two sides of a bottleneck, as they are exported."""

from __future__ import annotations

from torch import Tensor, nn

from cleave.architectures.inserts.gaussian import GaussianEncoder
from cleave.architectures.inserts.quantizer import Quantizer
from cleave.architectures.noise.noise import Noise


class Sender(nn.Module):
    """The device's half of a bottleneck: encoder [→ noise] → quantiser.

    Args:
        encoder: The encoder as a device runs it.
        quantizer: The quantiser.
        noise: What is laid over the representation, if anything is.
    """

    def __init__(self, encoder: nn.Module, quantizer: Quantizer, noise: Noise | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.quantizer = quantizer
        self.noise = noise
        self.by_encoder = len(encoder.draws(())) if isinstance(encoder, GaussianEncoder) else 0
        self.by_noise = 0 if noise is None else len(noise.draws(()))

    def forward(self, x: Tensor, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what the codec sends of a feature, for numbers drawn and settings such as the number of levels."""
        drawn = self.by_encoder + self.by_noise
        z = self.encoder(x, *given[: self.by_encoder])
        noised = z if self.noise is None else self.noise.lay(z, *given[self.by_encoder : drawn])
        return self.quantizer.send(noised, *given[drawn:])


class Receiver(nn.Module):
    """The server's half of a bottleneck: de-quantise → decoder.

    Args:
        quantizer: Says how to de-quantise; it has no state there.
        decoder: The decoder.
    """

    def __init__(self, quantizer: Quantizer, decoder: nn.Module) -> None:
        super().__init__()
        self.receive = type(quantizer).receive
        self.decoder = decoder

    def forward(self, *delivered: Tensor) -> Tensor:
        """Return the feature of what the codec delivers."""
        return self.decoder(self.receive(*delivered))
