"""The command line. Help and ``impq plugins`` import neither torch nor mlflow."""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from typing import Any, NoReturn

import click

from impq_core.commands import curve, maintenance, measuring, planning, running
from impq_core.commands.completion import complete_names
from impq_core.commands.output import JSON
from impq_core.documents.base import ErrorDocument, envelope
from impq_core.errors import ImpqError, Terminated, UsageError, nearest, one_line
from impq_core.plugins import Plugins, responsible
from impq_core.signals import stoppable


class _Commands(click.Group):
    """The commands of impq and of plugins; an unknown name is reported with the nearest one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *Plugins().commands()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or Plugins().commands().get(cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"unknown command '{args[0]}'{nearest(args[0], self.list_commands(ctx))}") from error


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"impq {version('impq')}")
        ctx.exit()


@click.group(cls=_Commands, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, callback=_version, expose_value=False, is_eager=True, help="Show the version.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Squeeze a language model below 4 bits a weight, with a plan that knows how layers interact."""


for _command in (running.run, running.estimate, running.sweep, running.export, running.evaluate, running.rotate,
                 measuring.ask, curve.curve, planning.fit, planning.allocate, planning.import_file, planning.compare,
                 planning.show,
                 maintenance.plugins, maintenance.cache, maintenance.doctor, maintenance.ui):
    cli.add_command(_command)
complete_names(cli)


def _warn(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    if category is RuntimeWarning:
        click.echo(f"warning: {message}", err=True)


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


def main(arguments: list[str] | None = None) -> None:
    """The ``impq`` command. Exit codes: 0; 1 for an error that the user can correct; 2 for usage; 130 for Ctrl-C; 143
    for SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug, as_json = "--debug" in arguments, JSON in arguments
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _warn
    try:
        with stoppable():
            code = cli.main([a for a in arguments if a != "--debug"], prog_name="impq", standalone_mode=False)
        if code:  # click returns the code of an Exit that a command raised
            sys.exit(code)
    except (click.Abort, KeyboardInterrupt) as error:
        _fail(ErrorDocument("stopped", "stopped", 143 if isinstance(error, Terminated) else 130), as_json)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        see = f" (see '{context.command_path} --help')" if context else ""
        _fail(ErrorDocument("usage", f"{' '.join(error.format_message().split())}{see}", error.exit_code), as_json)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _fail(_described(error), as_json)


def _described(error: Exception) -> ErrorDocument:
    if isinstance(error, ImpqError):
        return ErrorDocument("usage" if isinstance(error, UsageError) else "error", str(error), error.exit_code)
    if isinstance(error, OSError) and error.strerror:  # the disk or its permissions
        return ErrorDocument("system", f"{error.filename or 'a file'} cannot be read or written: {error.strerror}; "
                             "correct that and try again (impq run --resume RUN continues a run)", 1)
    return ErrorDocument("bug", f"{one_line(error, 300)} (this is a bug of {responsible(error)}; --debug shows where)",
                         1)


def _fail(error: ErrorDocument, as_json: bool) -> NoReturn:
    """End with a line on stderr, and with ``--json`` a document on stdout too."""
    click.echo(f"impq: {error.message}", err=True)
    if as_json:
        click.echo(envelope(error))
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
