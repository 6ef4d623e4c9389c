"""The command `hermes4`: one subcommand for each step, in the order of the flow.

Every command imports what it needs when it runs, so that `--help` is instant.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hermes_pipeline.cli.answering import complete, evaluate
from hermes_pipeline.cli.data import pack, show, tokenize
from hermes_pipeline.cli.options import FLAG
from hermes_pipeline.cli.serving import route, sandbox, serve
from hermes_pipeline.cli.training import demo, export, init, train
from hermes_pipeline.errors import UserError
from hermes_pipeline.exits import (
    EXIT_CODES,
    INTERRUPTED,
    MISTAKEN,
    STOPPED,
    STOPPING,
    hearing_signals,
    open_closed_streams,
    say,
    unread,
)
from hermes_pipeline.services.folders import explain

UsageError: Any = typer.BadParameter.__base__  # its home has moved from click into typer


class _Quiet:
    """A command whose help shows no kind of value for --help, as for no other flag."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = FLAG
        return option


class _Command(_Quiet, TyperCommand):
    """One subcommand."""


class _Group(_Quiet, TyperGroup):
    """All of them."""


app = typer.Typer(
    cls=_Group,
    name="hermes4",
    help="From conversations to a trained, served and scored model.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from hermes_core import __version__

        typer.echo(f"hermes4 {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version.",
            metavar=FLAG,
        ),
    ] = False,
) -> None:
    """From conversations to a trained, served and scored model."""


COMMANDS = (
    complete,
    show,
    tokenize,
    pack,
    init,
    train,
    export,
    serve,
    route,
    sandbox,
    evaluate,
    demo,
)
for _command in COMMANDS:
    app.command(cls=_Command)(_command)


def main() -> None:
    """Run `hermes4`; ends the process with one of `EXIT_CODES`."""
    open_closed_streams()
    with hearing_signals() as is_told_to_stop:
        code = _run(is_told_to_stop)
    if code == INTERRUPTED:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)  # another one changes nothing any more
        code = STOPPED if is_told_to_stop() else INTERRUPTED
    raise SystemExit(code)


def _run(is_told_to_stop: Callable[[], bool]) -> Any:
    """Run the command; a user's mistake is one line on standard error. The exit code."""
    try:
        code = app(prog_name="hermes4", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer keeps Ctrl-C to itself
            raise KeyboardInterrupt
    except SystemExit as end:
        # Typer makes 1 of a broken pipe.
        return unread() if isinstance(end.__context__, BrokenPipeError) else end.code
    except UsageError as error:
        # Without any argument the help has been printed, and nothing is left to say.
        if message := error.format_message():
            command = error.ctx.command_path if error.ctx else "hermes4"
            say(f"hermes4: error: {message.rstrip('.')} (see {command} --help)")
        return MISTAKEN
    except BrokenPipeError:
        return unread()
    except (UserError, OSError) as error:  # files and disks, too, are the user's
        if isinstance(error, OSError) and is_told_to_stop():  # of a terminal that is gone
            return INTERRUPTED
        if os.environ.get("HERMES4_TRACEBACK"):
            raise
        say(f"hermes4: error: {explain(error) if isinstance(error, OSError) else error}")
        return MISTAKEN
    except KeyboardInterrupt:
        say("hermes4: interrupted")
        return INTERRUPTED
    return 0
