"""Machines: how fast they compute, and what they draw."""

from __future__ import annotations

from dataclasses import dataclass

from cleave.planning.profiles.checks import not_negative, of_type, positive


@dataclass(frozen=True)
class Power:
    """What a device draws, in watts.

    Attributes:
        idle: While it waits.
        compute: While it computes.
        send: While it sends.

    Raises:
        ValueError: One of them is negative or no number.
    """

    idle: float
    compute: float
    send: float

    def __post_init__(self) -> None:
        for name in ("idle", "compute", "send"):
            not_negative(f"power.{name}", getattr(self, name), "watts")

    def energy(self, compute: float, send: float, idle: float) -> float:
        """Return the joules of some seconds of each."""
        return self.compute * compute + self.send * send + self.idle * idle


@dataclass(frozen=True)
class Machine:
    """A machine as its data sheet describes it, for :func:`roofline`.

    Attributes:
        name: Its name.
        rate: Floating-point operations per second at best; one multiply-accumulate is two. ``None``: not known, as of
            a machine that only a measured profile describes.
        efficiency: Share of the rate that networks reach.
        bandwidth: Bytes per second of its memory.
        launch: Seconds that starting one operation takes.
        power: What it draws; ``None``: not known, so that no energy is told.

    Raises:
        ValueError: A number is out of its range; the message names it.
    """

    name: str
    rate: float | None = None
    efficiency: float = 1.0
    bandwidth: float | None = None
    launch: float = 0.0
    power: Power | None = None

    def __post_init__(self) -> None:
        of_type("name", self.name, str, "a text, what the machine is called")
        if self.rate is not None:
            positive("rate", self.rate, "floating-point operations per second", of=self.name)
        if self.bandwidth is not None:
            positive("bandwidth", self.bandwidth, "bytes of memory per second", of=self.name)
        if positive("efficiency", self.efficiency, "a share of the rate", of=self.name) > 1:
            raise ValueError(f"efficiency of {self.name} is a share of its rate, at most 1; got {self.efficiency!r}")
        if self.power is not None:
            of_type("power", self.power, Power, "a Power with idle, compute and send in watts, or None", of=self.name)
        not_negative("launch", self.launch, "seconds for each operation", of=self.name)
