"""The bottleneck: an insert that makes of a feature what is sent, and of what arrives a feature again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from cleave.architectures.inserts.calibrating.calibration import calibrate_range
from cleave.architectures.inserts.channels import Channel
from cleave.architectures.inserts.finite import check_finite, named
from cleave.architectures.inserts.gaussian import GaussianEncoder
from cleave.architectures.inserts.insert import IN, OUT, Half, Halves, Insert, Step
from cleave.architectures.inserts.quantizer import Quantizer, UniformQuantizer
from cleave.architectures.inserts.sides import Receiver, Sender
from cleave.architectures.inserts.switchable import select, switchable
from cleave.architectures.noise.noise import LearnedNoise, Noise
from cleave.deployment import FLOAT_BITS, Codec, Draw, check_bits

Carrier = Callable[[str, Codec, dict[str, Tensor]], Mapping[str, Tensor]]
LEVELS = "levels"


class Bottleneck(Insert):
    """encoder [→ noise] → quantiser or learned prior → channel → decoder.

    It emits ``z``, the representation (B, *shape); ``noised``, what is laid over it included, where a device does that,
    and of learned noise ``noise_scale``;
    ``sent``, the same quantised and de-quantised; ``received``, what is
    left of it behind the channel; of a learned prior ``likelihoods``, of a stochastic encoder ``mean`` and
    ``log_variance``.

    Args:
        encoder: Maps the feature, or the image where it replaces the head, to the representation.
        quantizer: A :class:`~cleave.architectures.UniformQuantizer`, an
            :class:`~cleave.architectures.EntropyBottleneck`, or :class:`Unquantized`.
        decoder: Maps the representation to the feature at the cut.
        shape: Per-sample shape of the representation.
        channel: What the link does; ``None``: nothing.
        noise: What the device lays over the representation; ``None``: nothing. It is built for the shape here.
        axis: The representation's axis of channels, for noise that has some by channel.

    Attributes:
        at: The cut it stands at; the network says it.
        behind: Modules whose BatchNorm follows the width of its codes; the network says them.

    Raises:
        ValueError: The quantiser cannot code such a representation, or the channel cannot carry it.
    """

    kind = "bottleneck"

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: Quantizer,
        decoder: nn.Module,
        *,
        shape: Sequence[int],
        channel: Channel | None = None,
        noise: Noise | None = None,
        axis: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.noise = noise
        if noise is not None:
            noise.build(shape, axis)
        self.quantizer = quantizer
        self.decoder = decoder
        self.shape = tuple(shape)
        self.at = ""
        self.behind: list[nn.Module] = []
        self.channel: Channel | None = None
        self.codec  # noqa: B018 what cannot be coded is refused here
        self.emits = tuple(name for step in self.steps() for name in step.gives if name != OUT)
        self.set_channel(channel)

    @property
    def stochastic(self) -> bool:
        """Whether the encoder draws its representation in training."""
        return isinstance(self.encoder, GaussianEncoder)

    @property
    def sampled(self) -> bool:
        """Whether the encoder draws its representation in inference too."""
        return isinstance(self.encoder, GaussianEncoder) and self.encoder.sampled

    @property
    def plain(self) -> bool:
        """Whether it sends the feature itself as float32 over a perfect link, so that all it makes is that feature."""
        coders = isinstance(self.encoder, nn.Identity) and isinstance(self.decoder, nn.Identity)
        return coders and self.bits == FLOAT_BITS and self.channel is None and self.noise is None

    @property
    def has_prior(self) -> bool:
        """Whether a learned prior codes the representation."""
        return not isinstance(self.quantizer, UniformQuantizer) and hasattr(self.quantizer, "likelihoods")

    # --- what it computes -------------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """Return its computations: encode, disguise, quantise, judge, transmit, decode."""
        plain, distribution = self.plain, ("mean", "log_variance") if self.stochastic else ()
        # In training a prior adds noise, of which nothing is learned.
        learned, noisy = ((), ("quantizer",)) if self.has_prior else (("quantizer",), ())
        encode = Step("encode", (IN,), ("z", *distribution), ("encoder",), kind="encoder", selective=True, same=plain)
        steps = [dataclasses.replace(encode, random=self.sampled)]
        if self.noise is not None:
            told = ("noise_scale",) if isinstance(self.noise, LearnedNoise) else ()
            steps.append(Step("disguise", ("z",), ("noised", *told), ("noise",), random=True))
        steps.append(
            Step("quantise", (self.quantised,), ("sent",), learned, noisy_with=noisy, linked="deliver", same=plain)
        )
        if self.has_prior:
            steps.append(Step("judge", ("sent",), ("likelihoods",), ("quantizer",)))
        lossy = self.channel is not None
        arrive = Step("transmit", ("sent",), ("received",), random=lossy, receives=True, same=plain)
        decode = Step("decode", ("received",), (OUT,), ("decoder",), ("z",), "decoder", receives=True, same=plain)
        return [*steps, arrive, decode]

    def encode(self, x: Tensor, wanted: frozenset[str] = frozenset()) -> Tensor | tuple[Tensor | None, ...]:
        """Return the representation (B, *shape); of a stochastic encoder with its mean and log-variance, if wanted."""
        if not isinstance(self.encoder, GaussianEncoder):
            return self.encoder(x)
        if not self.encoder.draws_now and not wanted & {"mean", "log_variance"}:
            return self.encoder(x), None, None
        mean, log_variance = self.encoder.distribution(x)
        z = self.encoder.sample(mean, log_variance) if self.encoder.draws_now else mean
        return z, mean, log_variance

    @property
    def quantised(self) -> str:
        """The output that is quantised: ``z``, or ``noised`` where the device lays something over it."""
        return "z" if self.noise is None else "noised"

    def disguise(self, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the representation with the device's noise over it; of learned noise with its scale."""
        assert self.noise is not None
        noised = self.noise(z)
        return (noised, self.noise.magnitude(z)) if isinstance(self.noise, LearnedNoise) else noised

    def quantise(self, z: Tensor) -> Tensor:
        """Return the representation quantised and de-quantised, or with the noise that stands for it in training."""
        return self.quantizer(z)

    def deliver(self, z: Tensor, link: Carrier) -> Tensor:
        """Return what a link delivers of a representation, de-quantised: the way of real bytes."""
        delivered = link(self.at, self.codec, self.send(z))
        return self.receive({name: tensor.to(z.device) for name, tensor in delivered.items()})

    def judge(self, sent: Tensor) -> Tensor:
        """Return the probability of each element under the learned prior."""
        return self.quantizer.likelihoods(sent)  # type: ignore[operator]

    def transmit(self, sent: Tensor) -> Tensor:
        """Return what arrives over the channel."""
        return sent if self.channel is None else self.channel(sent, self.quantizer)

    def decode(self, received: Tensor, z: Tensor | None = None) -> Tensor:
        """Map what arrived to the feature at the cut, in the dtype of the representation, or else of the decoder."""
        # Cast behind the channel: half precision no longer tells fine codes apart.
        if z is not None:
            received = received.to(z.dtype)
        elif (weight := next(self.decoder.parameters(), None)) is not None:
            received = received.to(weight.dtype)
        if self.widths:
            self.select(self.bits)  # type: ignore[arg-type]
        return self.decoder(received)

    def forward(self, x: Tensor) -> Tensor:
        """Map the feature that arrives to the one that goes on."""
        encoded = self.encode(x)
        z = encoded[0] if isinstance(encoded, tuple) else encoded
        assert z is not None
        return self.decode(self.transmit(self.quantise(z if self.noise is None else self.noise(z))), z)

    # --- what the network asks --------------------------------------------------------------------------------------

    def place(self, at: str, behind: Sequence[nn.Module]) -> None:
        """Take a place in a network.

        Args:
            at: The cut.
            behind: Modules that read what it decodes, up to the next bottleneck's quantiser: where it knows several
                widths, their BatchNorm gets a set of statistics for each, and follows the width in use.
        """
        self.at, self.behind = at, list(behind)
        if self.widths:
            self.decoder = switchable(self.decoder, self.widths)
            for module in self.behind:
                switchable(module, self.widths)

    def parts(self) -> dict[str, nn.Module]:
        """Return encoder, noise where there is one, quantiser and decoder."""
        noise = {} if self.noise is None else {"noise": self.noise}
        return {"encoder": self.encoder, **noise, "quantizer": self.quantizer, "decoder": self.decoder}

    def leaves(self) -> list[nn.Module]:
        """Return encoder and decoder; a stochastic encoder is asked for its distribution, so its layers stand alone."""
        encoder = list(self.encoder.children()) if self.stochastic else [self.encoder]
        return [*encoder, self.decoder]

    def device_encoder(self) -> nn.Module:
        """The encoder as a device runs it: the mean alone where it is stochastic in training only."""
        return self.encoder.on_device() if isinstance(self.encoder, GaussianEncoder) else self.encoder

    def costed(self, kind: str) -> nn.Module:
        """Return the encoder as a device runs it, or the decoder."""
        return self.device_encoder() if kind == "encoder" else self.decoder

    def halves(self) -> Halves:
        """Return encoder, noise and quantiser, and the decoder; a channel disturbs the link and is in neither."""
        codec = self.codec
        sender = Sender(self.device_encoder(), self.quantizer, self.noise)
        device = Half(sender, (IN, *self.draws(), *codec.settings), codec.sends)
        return Halves(device, codec, Half(Receiver(self.quantizer, self.decoder), codec.delivers, (OUT,)))

    def draws(self) -> dict[str, Draw]:
        """Return what the device draws, for a sampled representation and for its noise."""
        drawn = self.encoder.draws(self.shape) if isinstance(self.encoder, GaussianEncoder) else {}
        return drawn if self.noise is None else drawn | self.noise.draws(self.shape)

    # --- bytes ------------------------------------------------------------------------------------------------------

    @property
    def codec(self) -> Codec:
        """How the representation becomes bytes, with the present bits, range or prior.

        Raises:
            NumberError: The network has diverged, or its encoder is dead.
        """
        with named(self.at):
            return self.quantizer.codec(self.shape)

    def send(self, z: Tensor) -> dict[str, Tensor]:
        """Return what the device sends of a representation (B, *shape), as the tensors that ``codec.encode`` takes.

        Raises:
            NumberError: The network has diverged, or its encoder is dead.
        """
        codec = self.codec
        with named(self.at):
            check_finite(z, "the representation")
        sent = self.quantizer.send(z, *(value.to(z.device) for value in codec.settings.values()))
        return dict(zip(codec.sends, sent if isinstance(sent, tuple) else (sent,), strict=True))

    def receive(self, delivered: Mapping[str, Tensor]) -> Tensor:
        """De-quantise what ``codec.decode`` delivers, on the device where it is."""
        return self.quantizer.receive(*delivered.values())

    def check_measured(self) -> None:
        """Refuse codes whose range nobody has measured.

        Raises:
            NumberError: The network has diverged, or its encoder is dead.
            ValueError: The quantiser's range still waits for its first training batch.
        """
        with named(self.at):
            self.quantizer.check_measured()
        if self.noise is not None:
            self.noise.check_measured()

    # --- width, range and link ------------------------------------------------------------------------------------

    @property
    def bits(self) -> int | None:
        """Width of a code at present; 32 where nothing is quantised, ``None`` under a learned prior."""
        return self.quantizer.bits

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths in bits that one network is trained for; empty where it knows one."""
        return self.quantizer.widths

    def select(self, width: int | Tensor) -> None:
        """Choose the BatchNorm of a width, in bits or as a tensor of levels, in the decoder and behind it."""
        for module in (self.decoder, *self.behind):
            select(module, width)

    def set_bits(self, bits: int) -> None:
        """Change the width of the codes after training; 32 leaves the quantiser out.

        The decoder's BatchNorm statistics are those of the old width, unless the network was trained for several
        widths: see :func:`~cleave.architectures.recalibrate_batchnorm`.

        Raises:
            ValueError: ``bits`` is out of range, the bottleneck was built without a quantiser, which has no range, its
                prior knows no widths, or ``bits`` is 32 and it was trained for several widths.
        """
        if self.widths and check_bits(bits) == FLOAT_BITS:
            raise ValueError(
                f"bits={bits}: this bottleneck was trained for widths={list(self.widths)} and has no BatchNorm for "
                "float; choose 2 to 16"
            )
        if self.widths:
            self.select(bits)  # what stands behind may run on what was decoded before; in training it may refuse
        self.quantizer = self.quantizer.with_bits(bits)

    def calibrate(self, representations: Iterable[Tensor], bits: int, method: str = "mse") -> tuple[float, float]:
        """Give a bottleneck that was trained in float codes of some width, their range chosen on what it makes.

        Codes that it has already keep their coding and the widths that they were trained for.

        Args:
            representations: Representations (B, *shape) each.
            bits: Width of the codes, 2 to 16.
            method: As of :func:`~cleave.architectures.calibrate_range`.

        Returns:
            The range (low, high).

        Raises:
            NumberError: The network has diverged, or its encoder is dead.
            ValueError: ``bits`` or ``method`` is out of range, nothing is there to measure, or a prior codes it.
        """
        if self.has_prior:
            self.quantizer.with_bits(bits)
        device = torch.device("cpu")

        def measured() -> Iterator[Tensor]:
            nonlocal device
            for z in representations:
                device = z.device
                yield z

        with named(self.at):
            low, high = calibrate_range(measured(), bits, method)
        old = self.quantizer if isinstance(self.quantizer, UniformQuantizer) else UniformQuantizer(bits)
        quantizer = UniformQuantizer(bits, coding=old.coding, quality=old.quality)
        quantizer.widths = old.widths
        quantizer.set_range(low, high)
        self.quantizer = quantizer.to(device).train(self.training)
        if self.channel is not None:
            self.channel.check(self.quantizer)
        return low, high

    def set_channel(self, channel: Channel | None) -> None:
        """Put another link between the halves, or none.

        Raises:
            ValueError: The link cannot carry what the quantiser makes.
        """
        if channel is not None:
            channel.check(self.quantizer)
        self.channel = channel
