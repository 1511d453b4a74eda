"""``shoal sim``: how a swarm of so many members would do, without any: the real cores on a simulated network."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from shoal.cli import render
from shoal.cli.common import AsJson, console, print_json

SHOWN: Final = {
    "peers": "members",
    "epochs": "that most honest learners were through",
    "agreed": "part of the epochs after which all honest members held the same policy",
    "epochs_per_hour": "by the simulated clock",
    "wait_ratio": "longest mean wait of an honest learner in rounds, to the mean wait in a swarm without faults",
    "messages_per_announcement": "sent by each member for one thing that one member says",
    "bytes_per_peer_per_epoch": "sent by each member, contributions included",
    "lost_s_per_kill": "seconds by which an epoch with a kill was longer than the usual one",
    "seconds": "simulated",
}
"""What is told of a simulated swarm, and what it means."""


def sim(
    peers: Annotated[int, typer.Option("--peers", help="Members; up to 128 learn, more of them only follow.")],
    epochs: Annotated[int, typer.Option("--epochs", help="After which it ends.")] = 100,
    rtt_ms: Annotated[float, typer.Option("--rtt-ms", help="Median round trip between two members.")] = 50.0,
    loss: Annotated[float, typer.Option("--loss", help="Part of the messages that is lost at the first try.")] = 0.0,
    kills_per_hour: Annotated[
        float, typer.Option("--kills-per-hour", help="Members that lose power, in all; each comes back.")
    ] = 0.0,
    late: Annotated[int, typer.Option("--late", help="Members that are late every time.")] = 0,
    liars: Annotated[float, typer.Option("--liars", help="Part of the members that lie, in ten ways.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same run.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Simulate a swarm: the real cores, a seeded network, models of machines and liars. Needs no node."""
    from shoal.training.sim import SimConfig, simulate  # no other command needs the cores

    config = SimConfig(
        peers=peers,
        epochs=epochs,
        rtt_ms=rtt_ms,
        loss=loss,
        kills_per_hour=kills_per_hour,
        late=late,
        liars=liars,
        seed=seed,
    )
    report = simulate(config)
    told: dict[str, Any] = {name: getattr(report, name) for name in SHOWN}
    if as_json:
        print_json(told)
    else:
        console().print(render.explained([(name, told[name], meaning) for name, meaning in SHOWN.items()]))
