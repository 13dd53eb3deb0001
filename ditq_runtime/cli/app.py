"""`ditq`: collects the registered subcommands, and turns every failure into one line and an exit code.

Exit codes: 0 ok, 1 failed, 2 misuse.
"""

from __future__ import annotations

import sys
import traceback
from importlib.metadata import entry_points

import click
import typer
from rich.console import Console

GROUP = "ditq.commands"
ORDER = ("demo", "inspect", "calibrate", "convert", "sample", "bench", "doctor")
HELP = """Low-bit runtime for Diffusion Transformers: convert once, sample in integers.

Start with `ditq demo`. Every command has --help with an example; --debug anywhere shows tracebacks.
"""


def make_app() -> typer.Typer:
    """The application with every registered subcommand, in the order a user meets them."""
    app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    for name in sorted(commands, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n)):
        command = commands[name].load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _quiet_diffusers()
    try:
        result = make_app()(arguments, prog_name="ditq", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "ditq"
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            Console(stderr=True).print(error.format_message(), markup=False, highlight=False)
        else:
            _say(f"{command}: {error.format_message()} See `{command} --help`.")
        return 2
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted; the same command resumes where it can")
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        _say(_sentence(error))
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


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"ditq: {text}", markup=False, highlight=False)
