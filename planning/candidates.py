"""Trained networks as plans: what runs on the device, real payload bytes, what the server adds, accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field

from cleave.planning.graphs.layer_graph import LayerGraph
from cleave.planning.planners.options import PlanOptions
from cleave.planning.planners.plan import Plan, Sent, Stages
from cleave.planning.planners.problem import Problem
from cleave.planning.profiles.checks import not_negative, positive
from cleave.planning.profiles.link import Link
from cleave.planning.profiles.profile import Profile


@dataclass(frozen=True)
class Candidate:
    """A trained network, with a bottleneck, with exits, or with both.

    Attributes:
        name: What it is called.
        device_macs: Multiply-accumulates on the device for a sample in the mean: encoder, and exits before the split.
        server_macs: Those on the server in the mean: decoder and tail; ``None``: not known, at most those of the whole
            network.
        payload: Mean bytes of the real payload, over all samples.
        accuracy: Share of right answers, if it was measured.
        sent_share: Share of the samples that send anything; the others leave at an exit on the device.
        shares: Shares of the samples by the exit at which they leave; empty without exits.
        source: The file.

    Raises:
        ValueError: A number is out of its range.
    """

    name: str
    device_macs: float
    server_macs: float | None
    payload: float
    accuracy: float | None = None
    sent_share: float = 1.0
    shares: dict[str, float] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        not_negative("device_macs", self.device_macs, "multiply-accumulates", of=self.name)
        if self.server_macs is not None:
            not_negative("server_macs", self.server_macs, "multiply-accumulates", of=self.name)
        not_negative("payload", self.payload, "bytes", of=self.name)
        for name, share in {"sent_share": self.sent_share, **self.shares}.items():
            if not_negative(name, share, "a share of the samples", of=self.name) > 1:
                raise ValueError(f"{name} of {self.name} is a share of the samples, at most 1; got {share!r}")


def candidate_plan(
    candidate: Candidate, graph: LayerGraph, device: Profile, link: Link, server: Profile, options: PlanOptions
) -> Plan:
    """Return the plan of a trained network, its parts timed at the pace of each machine.

    A machine's pace is the seconds of the whole planned network over its multiply-accumulates: starts, memory and all
    that costs none are spread over them.

    Args:
        candidate: The trained network.
        graph: The network that is planned, of whose kind it is.
        device: Seconds of its nodes on the device.
        link: What lies between.
        server: Seconds of its nodes on the server.
        options: The options.

    Raises:
        ValueError: A profile is of another network, or the network has no multiply-accumulates to tell a pace by.
    """
    problem = Problem(graph, device, link, server, options)
    macs = positive("the network's work", sum(node.macs for node in graph.nodes.nodes), "multiply-accumulates")
    known = candidate.server_macs is not None
    work = candidate.server_macs if candidate.server_macs is not None else candidate.sent_share * macs
    back = sum(problem.answer_bytes(value) for value in graph.values if value.answer)
    share = candidate.sent_share
    stages = Stages(
        device.total * candidate.device_macs / macs,
        link.up_seconds(candidate.payload),
        server.total * work / macs,
        share * link.down_seconds(back),
    )
    delay = share * link.delay * (2 if back else 1)
    power = device.power
    energy = None if power is None else power.energy(stages.device, stages.uplink, sum(stages[2:]) + delay)
    sent = (Sent("payload", round(candidate.payload), 0),)
    leaving = "; ".join(f"{share:.0%} leave at {name}" for name, share in candidate.shares.items())
    why = "; ".join(
        filter(
            None,
            [
                f"trained: {candidate.source}",
                leaving,
                "" if known else "the server at most as long as the whole network",
            ],
        )
    )
    return Plan(
        candidate.name, (), (), sent, (), stages, delay, energy, exact=False, why=why, accuracy=candidate.accuracy
    )
