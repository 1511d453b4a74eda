"""``shoal``: the commands, and how every failure ends: one clear line on stderr and an exit code (docs/cli.md)."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperGroup

from shoal import __version__
from shoal.cli.common import INTERRUPTED, print_json
from shoal.node.profile import default_home
from shoal.protocol.errors import ShoalError, UsageError

FAILED: Final = 1
# The base of all that the parser raises; Typer brings its parser along under a name that changes with its version.
_ParserError: Final[type[Exception]] = typer.BadParameter.__mro__[2]

_COMMANDS: Final = {
    "up": "node",
    "down": "node",
    "status": "node",
    "peers": "node",
    "nat": "node",
    "doctor": "node",
    "ping": "node",
    "swarm": "swarm",
    "join": "swarm",
    "leave": "swarm",
    "watch": "swarm",
    "sit": "sit",
    "recipe": "recipe",
    "play": "policy",
    "export": "policy",
    "task": "task",
    "new": "new",
    "algorithm": "algorithm",
    "demo": "demo",
    "sim": "sim",
    "model": "model",
    "bench": "bench",
}
"""Each command and the module it is in, in the order in which help lists them."""


class _LateCommands(TyperGroup):
    """Imports a command when it is asked for: all of them together take longer than most of them run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all."""
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One of them; None if there is none of that name."""
        if cmd_name not in _COMMANDS:
            return None
        found = self.commands.get(cmd_name)
        if found is None:
            found = self.commands[cmd_name] = _load(cmd_name)
        return found


def _load(name: str) -> Any:
    module = import_module(f"shoal.cli.{_COMMANDS[name]}")
    group = getattr(module, f"{name}_app", None)
    if group is not None:
        return typer.main.get_group(group)
    alone = typer.Typer(add_completion=False)
    alone.command(name)(getattr(module, name))
    return typer.main.get_command(alone)


app = typer.Typer(
    name="shoal",
    cls=_LateCommands,
    help="Pool unequal machines in unequal places to train one reinforcement-learning policy, with no server.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before a command."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line; gives the exit code. Every failure has been said by then."""
    as_json = "--json" in arguments
    try:
        command = typer.main.get_command(app)
        code = command.main(args=list(arguments), prog_name="shoal", standalone_mode=False)
        sys.stdout.flush()
    except ShoalError as error:
        return _fail(error.exit_code, str(error), as_json=as_json)
    except _ParserError as error:
        return _fail_parsing(error, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # `shoal … | head`: nobody reads on, which is no failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if os.environ.get("SHOAL_DEBUG") == "1":
            raise
        message = f"unexpected {type(error).__name__}: {error}; SHOAL_DEBUG=1 shows where{_where_logs_are()}"
        return _fail(FAILED, message, as_json=as_json)
    return code if isinstance(code, int) else 0


def _where_logs_are() -> str:
    try:
        return f", logs are in {default_home()}"
    except UsageError:
        return ""


def main() -> NoReturn:
    """The entry point of the ``shoal`` command."""
    _end(run(sys.argv[1:]))


def _end(code: int) -> NoReturn:
    """End the process. To take the interpreter apart takes a quarter of the time of a command."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(code)  # which waits for them
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads on, or the disk is full
        code = code or FAILED
    os._exit(code)


def _fail(code: int, message: str, *, as_json: bool) -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"shoal: {line}\n")
    if as_json:
        print_json({"error": {"code": code, "message": line}})
    return code


def _fail_parsing(error: Exception, *, as_json: bool) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(getattr(error, "message", ""))
        return 0
    describe = getattr(error, "format_message", error.__str__)
    context = getattr(error, "ctx", None)
    hint = f"; see `{context.command_path} --help`" if context is not None else ""
    return _fail(UsageError.exit_code, f"{describe().rstrip('.')}{hint}", as_json=as_json)


if __name__ == "__main__":
    main()
