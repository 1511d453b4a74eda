"""``shoal swarm create``, ``ls``, ``show``; ``shoal join``, ``leave``, ``watch``: training runs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from shoal.cli import render
from shoal.cli.common import (
    INTERRUPTED,
    AsJson,
    EnvSet,
    OptionalSwarm,
    Profile,
    SwarmArgument,
    connect,
    console,
    env_arguments,
    hyperparameters,
    print_json,
)
from shoal.cli.spawn import BackgroundNode
from shoal.node.api.client import Client
from shoal.node.api.requests import CreateSwarm, JoinSwarm
from shoal.node.api.schemas import SwarmDetail
from shoal.node.config import NodeConfig
from shoal.protocol.errors import NoDaemonError, NoPeersError, ShoalError, UsageError
from shoal.training.exchange.rules import Codec
from shoal.training.manifest import LOOP_ALGORITHM, LOOP_SCHEME, RECIPE_SCHEME, Mode
from shoal.training.ticket import Ticket

swarm_app = typer.Typer(help="Training runs.", no_args_is_help=True)


class RoleChoice(StrEnum):
    """What a node may be asked to do in a swarm; ``auto`` lets it choose by what is installed."""

    AUTO = "auto"
    LEARNER = "learner"
    ACTOR = "actor"
    EVALUATOR = "evaluator"
    STORAGE = "storage"


PartOption = Annotated[
    str,
    typer.Option(
        metavar="PART", help="What this node is in a recipe, see `shoal recipe show`; what is wanted most, if left out."
    ),
]
RoleOption = Annotated[RoleChoice, typer.Option(help="What this node does in it.")]


@swarm_app.command("create")
def create(  # the options of one command; Typer wants them as arguments
    task: Annotated[
        str,
        typer.Option(
            help="For a Gymnasium environment: gym:NAME. For a way of learning together: recipe:NAME. For training "
            "loops of your own: loop:NAME."
        ),
    ],
    algorithm: Annotated[
        str | None, typer.Option(help="How to learn it. Default: ppo; of recipes: recipe; of loops: average.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="For people; the run's real name is a CID.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="What peers exchange.")] = None,
    aggregator: Annotated[
        str | None, typer.Option(help="What makes one of many contributions: mean, nnm+trimmed_mean, … Default: mean.")
    ] = None,
    codec: Annotated[
        Codec | None, typer.Option(help="What contributions travel as; auto is for loops. Default: fp32.")
    ] = None,
    batch_per_learner: Annotated[
        int | None,
        typer.Option(help="Environment steps of the fastest learner per epoch. Default: 2048; 256 with dqn and sac."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Environment steps of all learners together per epoch, at most.")
    ] = None,
    max_staleness: Annotated[
        int | None, typer.Option(help="Mode rollouts: how many policy versions old what others collected may be.")
    ] = None,
    foreign_ratio: Annotated[
        float | None, typer.Option(help="Likewise: the most of an update that others may have collected, 0 to 1.")
    ] = None,
    check_rate: Annotated[
        float | None, typer.Option(help="Likewise: the part of others' shards that is replayed to see if it is true.")
    ] = None,
    min_learners: Annotated[int | None, typer.Option(help="The first epoch waits for so many learners.")] = None,
    target_return: Annotated[
        float | None, typer.Option(help="Done when the mean evaluation return reaches it. Default: the task's own.")
    ] = None,
    eval_episodes: Annotated[int | None, typer.Option(help="Episodes per evaluation.")] = None,
    eval_interval: Annotated[int | None, typer.Option(help="Epochs between evaluations.")] = None,
    max_env_steps: Annotated[int | None, typer.Option(help="Give up after so many steps of all together.")] = None,
    seed: Annotated[int | None, typer.Option(help="From which every member derives its own.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A hyperparameter; repeat for more.")
    ] = None,
    env_set: EnvSet = None,
    role: RoleOption = RoleChoice.AUTO,
    part: PartOption = "",
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Start a training run and take part in it. Prints the ticket that others join with."""
    chosen: dict[str, Any] = {
        "name": name,
        "mode": mode,
        "aggregator": aggregator,
        "codec": codec,
        "batch_per_learner": batch_per_learner,
        "batch_size": batch_size,
        "max_staleness": max_staleness,
        "foreign_ratio": foreign_ratio,
        "check_rate": check_rate,
        "min_learners": min_learners,
        "target_return": target_return,
        "eval_episodes": eval_episodes,
        "eval_interval": eval_interval,
        "max_env_steps": max_env_steps,
        "seed": seed,
        "part": part or None,
    }
    given = {key: value for key, value in chosen.items() if value is not None}
    scheme = task.partition(":")[0]
    is_loop = scheme == LOOP_SCHEME
    if algorithm is None:
        algorithm = {LOOP_SCHEME: LOOP_ALGORITHM, RECIPE_SCHEME: RECIPE_SCHEME}.get(scheme, "ppo")
    try:
        request = CreateSwarm(
            task=task,
            algorithm=algorithm,
            hyperparameters=hyperparameters(setting or ()),
            env_arguments=env_arguments(env_set or ()),
            role=role.value,
            **given,
        )
    except ValidationError as error:
        raise UsageError(error.errors()[0]["msg"]) from error
    with connect(profile) as client:
        created = client.create_swarm(request)
    if as_json:
        print_json(created)
    else:
        out = console()
        out.print(f"swarm  {created.swarm}\n\nOthers join with:\n")
        out.print(f"shoal join {created.ticket}", soft_wrap=True, style="bold")
        if is_loop:
            out.print("\nAttach your training loop with: Averager(model)   (docs/averager.md)", markup=False)
        out.print(f"\nFollow it with: shoal watch {render.short_swarm(created.swarm)}")


@swarm_app.command("ls")
def ls(profile: Profile = "default", as_json: AsJson = False) -> None:
    """The swarms that this node is in."""
    with connect(profile) as client:
        found = client.swarms()
    print_json(found) if as_json else console().print(render.swarms(found))


@swarm_app.command("show")
def show(swarm: OptionalSwarm = None, profile: Profile = "default", as_json: AsJson = False) -> None:
    """One swarm: how far it is, and who does what."""
    with connect(profile) as client:
        detail = client.swarm(client.the_swarm(swarm))
    if as_json:
        print_json(detail)
    else:
        out = console()
        out.print(render.swarm(detail))
        if detail.results:
            out.print(f"results in {detail.results}", soft_wrap=True, markup=False)
        out.print(f"ticket {detail.ticket}", soft_wrap=True, style="dim")


@swarm_app.command("ticket")
def ticket(swarm: OptionalSwarm = None, profile: Profile = "default", as_json: AsJson = False) -> None:
    """A ticket for a swarm, as things are now: with where its members are reached today."""
    with connect(profile) as client:
        detail = client.swarm(client.the_swarm(swarm))
    if as_json:
        print_json({"swarm": detail.swarm, "ticket": detail.ticket})
    else:
        console().print(detail.ticket, soft_wrap=True, markup=False, highlight=False)


def join(
    ticket: Annotated[str, typer.Argument(help="What `shoal swarm create` printed.")],
    role: RoleOption = RoleChoice.AUTO,
    part: PartOption = "",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return as soon as the node has joined.")] = False,
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Take part in a training run. Starts the node in the background if none runs, then watches."""
    Ticket.parse(ticket)  # before a node is started for it
    request = JoinSwarm(ticket=ticket.strip(), role=role.value, part=part)
    with _connect_or_start(profile, as_json=as_json) as client:
        joined = client.join_swarm(request)
        if detach or as_json:
            print_json(joined) if as_json else console().print(f"joined {joined.swarm} as {joined.role}")
        if not detach:
            _follow(client, joined.swarm, as_json=as_json)


def _connect_or_start(profile: str, *, as_json: bool) -> Client:
    try:
        return connect(profile)
    except NoDaemonError:
        ready = BackgroundNode(NodeConfig(profile=profile)).wait_ready()
        if not as_json:
            console(stderr=True).print(f"started a node in the background (pid {ready['pid']})", style="dim")
        return connect(profile)


def leave(swarm: SwarmArgument, profile: Profile = "default", as_json: AsJson = False) -> None:
    """Leave a swarm. The run goes on without this node."""
    with connect(profile) as client:
        left = client.leave_swarm(swarm)
    print_json({"swarm": left, "left": True}) if as_json else console().print(f"left {left}")


def watch(swarm: OptionalSwarm = None, profile: Profile = "default", as_json: AsJson = False) -> None:
    """Follow a swarm live, until it is done."""
    with connect(profile) as client:
        _follow(client, client.the_swarm(swarm), as_json=as_json)


def _follow(client: Client, swarm: str, *, as_json: bool) -> None:
    """Show a swarm until it has ended, and end as it did.

    Raises:
        ShoalError: if the run failed.
        NoPeersError: if nobody else took part in it.
    """
    try:
        detail = _print_lines(client, swarm) if as_json else render.live(client.watch_swarm(swarm), console())
    except KeyboardInterrupt:
        console(stderr=True).print("\nstopped watching; the node goes on (`shoal leave`, `shoal down` end that)")
        raise typer.Exit(INTERRUPTED) from None
    if detail.results and not as_json:
        console().print(f"results in {detail.results}", soft_wrap=True, markup=False)
    if detail.phase == "failed":
        raise ShoalError(f"the run failed: {detail.error or 'the log of the node says why'}")
    if detail.phase == "done" and detail.trained_alone:
        raise NoPeersError("this node trained ALONE: nobody else put anything into the run; share its ticket earlier")


def _print_lines(client: Client, swarm: str) -> SwarmDetail:
    last = None
    for detail in client.watch_swarm(swarm):
        now = detail.model_dump(exclude={"elapsed_s"})
        if now != last:
            print_json(detail)
            last = now
        if detail.phase in render.ENDED:
            return detail
    raise AssertionError("watching ends with the run or with an error")
