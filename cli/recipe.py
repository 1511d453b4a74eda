"""``shoal recipe ls``, ``show``, ``run``: ways of learning together, and whether their claims hold here."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from shoal.cli.common import AsJson, console, hyperparameters, print_json
from shoal.cli.school import MAX_PEERS, School, school
from shoal.node.api.requests import CreateSwarm
from shoal.node.api.schemas import SwarmDetail
from shoal.protocol.errors import ShoalError

if TYPE_CHECKING:
    from rich.console import Console

    from shoal.training.recipes.recipe import Recipe, Report

recipe_app = typer.Typer(help="Ways of learning together, each with a claim.", no_args_is_help=True)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Its name; `shoal recipe ls` shows all.")]
NOT_FOR_EVER: Final = 2**50
"""Environment steps that no run of a recipe comes to: it is left when its epochs are over."""


@recipe_app.command("ls")
def ls(as_json: AsJson = False) -> None:
    """Those that are installed."""
    from shoal.training.recipes.installed import load_recipe, recipe_names  # NumPy comes with them

    found = [load_recipe(name) for name in recipe_names()]
    if as_json:
        print_json([{"name": each.name, "summary": each.summary, "paper": each.paper} for each in found])
        return
    table = Table("recipe", "what it is", "paper", box=None)
    for each in found:
        table.add_row(each.name, each.summary, each.paper)
    console().print(table)


@recipe_app.command("show")
def show(name: RecipeName, as_json: AsJson = False) -> None:
    """One of them: its claim, its policies, and all that can be set."""
    from shoal.training.recipes.installed import load_recipe

    recipe = load_recipe(name)
    settings = _settings(recipe)
    if as_json:
        words = {each: getattr(recipe, each) for each in ("name", "summary", "paper", "claim", "version")}
        policies = {
            each: {"model": policy.model, "objective": policy.objective, "owner": policy.owner}
            for each, policy in recipe.policies.items()
        }
        print_json({**words, "policies": policies, "settings": settings})
        return
    out = console()
    out.print(f"[bold]{recipe.name}[/]  {recipe.summary} ({recipe.paper})\n\nclaim: {recipe.claim}\n", soft_wrap=True)
    table = Table("setting", "value", box=None)
    for path, value in settings.items():
        table.add_row(path, str(value))
    out.print(table)


@recipe_app.command("run")
def run(  # the options of one command; Typer wants them as arguments
    name: RecipeName,
    peers: Annotated[int, typer.Option(min=1, max=MAX_PEERS, help="How many nodes, on this machine.")] = 3,
    seed: Annotated[int, typer.Option(help="From which every node derives its own.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="How many; the recipe's own number, if left out.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="What `recipe show` lists; repeat for more.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Of the run, and of the baseline.")] = 1800.0,
    keep: Annotated[bool, typer.Option(help="Keep the nodes' folders.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run it with real nodes on this machine, then all that it is held against, and say whether its claim holds.

    Progress goes to stderr with --json, and one line of JSON to stdout at the end. Exit code: 0, if the claim holds; 1,
    if it does not, or if there is no verdict, as the message says then.
    """
    from shoal.training.recipes.installed import load_recipe
    from shoal.training.recipes.overriding import overridden

    given = hyperparameters(setting or ())
    recipe = overridden(load_recipe(name), given)
    out = console(stderr=as_json)
    wanted = epochs or recipe.epochs
    began = time.monotonic()
    reports = []
    for noun, settings, number in (
        ("run", given, wanted),
        *(
            ("baseline", {**given, **each}, recipe.epochs_of_baseline(wanted))
            for each in (recipe.baseline, *recipe.further)
        ),
    ):
        out.print(f"[bold]{noun}[/] of {recipe.name}: {number} epochs on {peers} nodes")
        say = partial(out.print, soft_wrap=True)
        with school("recipe", peers, say, timeout, keep=keep, seed=seed) as nodes:
            reports.append(_report(nodes, recipe, settings, seed, number, out))
    verdict = recipe.verdict(*reports)
    word = "[green]holds[/]" if verdict.holds else "[red]does not hold here[/]"
    out.print(f"\n{recipe.claim}: {word}\n{verdict.text}", soft_wrap=True)
    if as_json:
        print_json(
            {
                "recipe": recipe.name,
                "verdict": verdict.text,
                "holds": verdict.holds,
                "figure": verdict.figure,
                "baseline": verdict.baseline,
                "seconds": round(time.monotonic() - began, 1),
                "peers": peers,
                "seed": seed,
                "epochs": [each.epochs for each in reports],
            }
        )
    if not verdict.holds:
        raise typer.Exit(1)


def _report(nodes: School, recipe: Recipe, settings: Mapping[str, Any], seed: int, epochs: int, out: Console) -> Report:
    from shoal.training.recipes.placing import parts_of
    from shoal.training.recipes.recipe import Report

    request = CreateSwarm(
        task=f"recipe:{recipe.name}",
        algorithm="recipe",
        hyperparameters=dict(settings),
        seed=seed,
        min_learners=len(nodes.pupils),
        max_env_steps=NOT_FOR_EVER,
        batch_per_learner=recipe.turns,
        eval_interval=min(recipe.eval_interval, epochs),
    )
    created = nodes.begin(request, parts_of(len(nodes.pupils), recipe.parts))
    last = epochs - epochs % request.eval_interval
    began, shown = time.monotonic(), 0
    wanted = len(nodes.pupils) if recipe.is_by_all else 1

    def is_over(detail: SwarmDetail) -> bool:
        nonlocal shown
        for epoch, heard in sorted(_authors(detail).items()):
            newer = len(_authors(detail, since=epoch + 1))
            if shown < epoch <= last and (len(heard) >= wanted or newer):
                shown = epoch
                took = timedelta(seconds=round(time.monotonic() - began))
                of = "" if len(heard) >= wanted else f" ({len(heard)} of {wanted} nodes)"
                words = ", ".join(f"{name} {score:.3f}" for name, score in _probed(detail, epoch).items())
                out.print(f"epoch {epoch} of {last}, after {took}: {words}{of}", soft_wrap=True)
        heard = {author for authors in _authors(detail, since=last).values() for author in authors}
        return len(heard) >= wanted  # who was late probes the next time

    detail = nodes.follow(nodes.pupils[0], created.swarm, is_over)
    if not is_over(detail):
        why = detail.error or "its nodes' logs say why: see them with --keep"
        raise ShoalError(f"the run ended as {detail.phase} in epoch {detail.epoch} of {last}, with no verdict: {why}")
    scores = {name: tuple(points) for name, points in _points(detail).items()}
    return Report(scores, last, detail.env_steps, time.monotonic() - began, len(nodes.pupils))


def _authors(detail: SwarmDetail, since: int = 0) -> dict[int, set[str]]:
    """Who probed, by epoch."""
    found: defaultdict[int, set[str]] = defaultdict(set)
    for each in detail.scores:
        if each.epoch >= since:
            found[each.epoch].add(each.author)
    return found


def _probed(detail: SwarmDetail, epoch: int) -> dict[str, float]:
    """What probes found at an epoch, by name; what updates say of themselves is left out."""
    points = {name: dict(of) for name, of in sorted(_points(detail).items()) if "." not in name}
    return {name: of[epoch] for name, of in points.items() if epoch in of}


def _points(detail: SwarmDetail) -> dict[str, list[tuple[int, float]]]:
    """By score, its mean over the nodes at each epoch."""
    found: defaultdict[str, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in detail.scores:
        for name, score in each.scores.items():
            found[name][each.epoch].append(score)
    return {
        name: [(epoch, statistics.fmean(values)) for epoch, values in sorted(by_epoch.items())]
        for name, by_epoch in found.items()
    }


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What can be set, by its path."""
    found: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, each in value.items():
                walk(f"{path}.{name}", each)
        elif isinstance(value, tuple) and value and all(hasattr(each, "name") for each in value):
            for each in value:
                walk(f"{path}.{each.name}", each)
        elif is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                walk(f"{path}.{field.name}" if path else field.name, getattr(value, field.name))
        elif isinstance(value, bool | int | float | str) or (isinstance(value, tuple) and value):
            found[path] = str(value) if isinstance(value, str) else value

    for field in fields(recipe):
        if field.name not in (
            "name",
            "version",
            "summary",
            "paper",
            "claim",
            "objectives",
            "baseline",
            "further",
            "verdict",
        ):
            walk(field.name, getattr(recipe, field.name))
    return found
