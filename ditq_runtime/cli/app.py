"""`ditq`: collects the registered subcommands, and turns every failure into one line and an exit code.

Exit codes: 0 ok, 1 failed, 2 misuse.
"""

from __future__ import annotations

import sys
import traceback
from importlib.metadata import entry_points
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

GROUP = "ditq.commands"
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[
    1
]  # UsageError, of the click that typer runs on
INTERRUPTED = "interrupted; the same command resumes where it can"
ORDER = ("demo", "inspect", "calibrate", "convert", "sample", "eval", "bench", "tune", "doctor")
HELP = """Low-bit runtime for Diffusion Transformers: convert once, sample in integers.

Start with `ditq demo`. Every command has --help with an example; --debug anywhere shows tracebacks.
"""


class Ordered(TyperGroup):
    """Lists commands and groups of commands in one order."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order a user meets them."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))


def make_app() -> typer.Typer:
    """The application with every registered subcommand."""
    app = typer.Typer(
        cls=Ordered, help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None
    )
    for entry in entry_points(group=GROUP):
        command = entry.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)
    return app


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _quiet_diffusers()
    try:
        result = make_app()(arguments, prog_name="ditq", standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say(INTERRUPTED)
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, USAGE_ERROR):
            _say_misuse(error)
            return 2
        _say(_sentence(error))
        return 1
    if result == 130:  # how typer reports Ctrl-C
        _say(INTERRUPTED)
        return 1
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the `ditq` script."""
    sys.exit(run(sys.argv[1:]))


def _quiet_diffusers() -> None:
    """Our commands show their own progress; diffusers' bars and type warnings would break it up."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    expected = (ValueError, OSError, RuntimeError, NotImplementedError, ImportError)
    if isinstance(error, expected) and text:
        return text
    return f"unexpected {type(error).__name__}: {text}; run again with --debug and report the traceback"


def _say_misuse(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":
        _console().print(error.format_message())
        return
    command = error.ctx.command_path if error.ctx else "ditq"
    _say(f"{command}: {error.format_message()} See `{command} --help`.")


def _say(text: str) -> None:
    _console().print(f"ditq: {text}")


def _console() -> Console:
    return Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
