"""``shoal model``: folders published under a name, found on other nodes, fetched and kept."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shoal.cli import render_models as render
from shoal.cli.common import AsJson, Profile, connect, console, print_json, profile_paths
from shoal.node.api.requests import GetModel, PublishModel
from shoal.protocol.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.node.api.schemas import ContentInfo, FetchInfo

model_app = typer.Typer(name="model", help="Publish folders, and fetch those of others.", no_args_is_help=True)

PROGRESS_S: Final = 0.5

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Its name or CID here, or the beginning of it; or OWNER/NAME[@VERSION].")
]


@model_app.command("publish")
def publish(
    what: Annotated[
        str, typer.Argument(metavar="PATH|SWARM", help="A folder, one file, or a run of this profile that is done.")
    ],
    name: Annotated[str, typer.Option(help="What others find it by, after this node's own name.")],
    tag: Annotated[list[str] | None, typer.Option(help="A word to find it by; repeat for more.")] = None,
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Take a folder in, and give it to whoever asks; under a name that is there, as its next version.

    Of a run it is the policy, which is found by its task, too: `shoal play OWNER/NAME` plays it elsewhere.
    """
    path, tags = Path(what), list(tag or [])
    if not path.exists() and "/" not in what:
        from shoal.training.trained import find_trained, task_of  # loads all that learning needs

        path = find_trained(what, profile_paths(profile).root / "swarms")
        tags.append(task_of(path))
    with connect(profile) as client, nullcontext() if as_json else console().status("reading …"):
        info = client.publish_model(PublishModel(path=str(path.absolute()), name=name, tags=tags))
    if as_json:
        print_json(info)
    else:
        console().print(render.published(info))


@model_app.command("ls")
def ls(profile: Profile = "default", as_json: AsJson = False) -> None:
    """List the models of this node."""
    with connect(profile) as client:
        found = client.models()
    if as_json:
        print_json(found)
    else:
        console().print(render.models(found))


@model_app.command("search")
def search(
    word: Annotated[str, typer.Argument(metavar="WORD", help="A tag, or a name.")],
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Look for models of all nodes by a tag or a name. What is found is what their owners say."""
    with connect(profile) as client:
        found = client.search_models(word)
    if as_json:
        print_json(found)
    else:
        console().print(render.found(word, found))


@model_app.command("show")
def show(model: ModelArgument, profile: Profile = "default", as_json: AsJson = False) -> None:
    """Show one, with its files; or one of another node, by its owner's name, with its versions and who has it."""
    with connect(profile) as client:
        found = client.model(model)
    if as_json:
        print_json(found)
    else:
        console().print(render.model(found))


@model_app.command("get")
def get(
    model: ModelArgument,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A folder that is made; without it: only kept.")
    ] = None,
    name: Annotated[str, typer.Option(help="What it is to be called on this node.")] = "",
    pin: Annotated[bool, typer.Option("--pin", help="Let it stay on this node.")] = False,
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Fetch one from all who have some of it. What came before a failure is not fetched again."""
    request = GetModel(model=model, out="" if out is None else str(out.absolute()), name=name, is_pinned=pin)
    with connect(profile) as client, nullcontext() if as_json else _progress(profile):
        fetched = client.get_model(request)
    if as_json:
        print_json(fetched)
    else:
        console().print(render.fetched(fetched, out))


@model_app.command("pin")
def pin(model: ModelArgument, profile: Profile = "default", as_json: AsJson = False) -> None:
    """Let one stay, whatever else needs room."""
    _set_pinned(model, profile, is_pinned=True, as_json=as_json)


@model_app.command("unpin")
def unpin(model: ModelArgument, profile: Profile = "default", as_json: AsJson = False) -> None:
    """Let one go when its room is needed, or by `shoal model gc`."""
    _set_pinned(model, profile, is_pinned=False, as_json=as_json)


@model_app.command("rm")
def rm(model: ModelArgument, profile: Profile = "default", as_json: AsJson = False) -> None:
    """Forget one, pinned or not. Folders that were made of it stay."""
    with connect(profile) as client:
        _tell_freed(client.remove_model(model), as_json=as_json)


@model_app.command("gc")
def gc(profile: Profile = "default", as_json: AsJson = False) -> None:
    """Forget all that are not pinned."""
    with connect(profile) as client:
        _tell_freed(client.collect_models(), as_json=as_json)


@model_app.command("du")
def du(profile: Profile = "default", as_json: AsJson = False) -> None:
    """Show what contents take on disk, and what is on its way."""
    with connect(profile) as client:
        found = client.content()
    if as_json:
        print_json(found)
    else:
        console().print(render.content(found))


def _set_pinned(model: str, profile: str, *, is_pinned: bool, as_json: bool) -> None:
    with connect(profile) as client:
        info = client.pin_model(model, is_pinned=is_pinned)
    if as_json:
        print_json(info)
    else:
        console().print(f"{info.name or info.cid} {'stays' if is_pinned else 'may go'}")


def _tell_freed(info: ContentInfo, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
    else:
        console().print(f"{render.size(info.freed_bytes)} freed")


@contextmanager
def _progress(profile: str) -> Iterator[None]:
    """While in it, show how far the fetches of the node are."""
    is_over = threading.Event()
    with console(stderr=True).status("looking for it …") as status:

        def follow() -> None:
            while not is_over.wait(PROGRESS_S):
                try:
                    with connect(profile) as client:
                        fetching: list[FetchInfo] = client.content().fetching
                except ShoalError:  # the command itself will say so
                    continue
                if fetching:
                    status.update(render.fetching(fetching[-1]))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
