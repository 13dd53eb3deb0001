"""`ditq`: collects the registered subcommands, and turns every failure into one line and an exit code.

Exit codes: 0 ok, 1 failed, 2 misuse, 130 interrupted.
"""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ditq_runtime.cli.checked import Checked
from ditq_runtime.cli.output import complain
from ditq_runtime.cli.sentences import misuse, sentence
from ditq_runtime.cli.voice import Voice, voice
from ditq_runtime.host.on_import import after_import

GROUP = "ditq.commands"
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[
    1
]  # UsageError, of the click that typer runs on
OK, FAILED, MISUSE, INTERRUPTED = 0, 1, 2, 130
KEEPS = (  # commands that go on where they were
    "calibrate", "convert", "eval", "bench methods", "bench flow", "bench profiles", "bench papers", "bench jitter",
    "bench auto",
)  # fmt: skip
TABLES = ("demo", "inspect", "convert", "plan", "eval", "bench", "tune", "doctor")
ORDER = (
    "demo", "inspect", "calibrate", "plan", "convert", "sample", "eval", "bench", "tune", "doctor",
)  # fmt: skip
HELP = """Low-bit runtime for Diffusion Transformers: convert once, sample in integers.

Start with `ditq demo`. Every command has --help with an example; --quiet, --verbose, --csv and --debug may stand
anywhere in a line.
"""


class Ordered(TyperGroup):
    """Lists commands and groups of commands in one order, each with its whole first sentence."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order a user meets them."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda n: ORDER.index(n) if n in ORDER else len(ORDER))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands; typer's own cuts sentences to the width of the terminal."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, _first_sentence(command.help or "")) for name, command in found if command]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _first_sentence(text: str) -> str:
    """Of a help text."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".") + "."


def make_app(wanted: str = "") -> typer.Typer:
    """The application: the subcommand `wanted` if it is registered, else all of them."""
    app = typer.Typer(cls=Ordered, help=HELP, no_args_is_help=True, rich_markup_mode=None)
    app.callback()(_options)
    found = list(entry_points(group=GROUP))
    for entry in [entry for entry in found if entry.name == wanted] or found:
        command = entry.load()
        if isinstance(command, typer.Typer):
            for inside in command.registered_commands:
                inside.cls = Checked
            app.add_typer(command, name=entry.name, cls=Ordered)
        else:
            app.command(entry.name, cls=Checked)(command)
    return app


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    debug, begin = "--debug" in arguments, time.monotonic()
    arguments = _hear(arguments)
    if not voice.verbose:
        for package in ("huggingface_hub", "diffusers", "transformers"):
            after_import(package, f"ditq_runtime.cli.quiet:quiet_{package}")
    code = _run(arguments, debug)
    if voice.verbose:
        _tell_cost(time.monotonic() - begin)
    return code


def _run(arguments: list[str], debug: bool) -> int:
    try:
        app = make_app(arguments[0] if arguments else "")
        result = app(arguments, prog_name="ditq", standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{error.format_message()}\n")  # type: ignore[attr-defined]
            return MISUSE
        if debug:
            traceback.print_exc()
        if isinstance(error, USAGE_ERROR):
            complain(misuse(error, _typed(arguments)))
            return MISUSE
        complain(sentence(error))
        return FAILED
    if result == INTERRUPTED:  # also how typer reports Ctrl-C
        kept = " ".join(arguments).startswith(KEEPS)
        told = (
            "what is finished is kept, go on with" if kept else "nothing is kept, start again with"
        )
        complain(f"interrupted; {told}: {voice.line}")
    return result if isinstance(result, int) else OK


def _typed(arguments: list[str]) -> str:
    """The command of a line, as far as it is one."""
    inner = {"bench": 2}.get(arguments[0], 1) if arguments and arguments[0] in ORDER else 0
    return " ".join(["ditq", *(word for word in arguments[:inner] if not word.startswith("-"))])


def _hear(arguments: list[str]) -> list[str]:
    """Take the options that may stand anywhere out of a command line, and set the voice by them."""
    line = shlex.join(["ditq", *arguments])
    command = next((word for word in arguments if not word.startswith("-")), "")
    flags = ("--debug", "--quiet", "--verbose", *(("--csv",) if command in TABLES else ()))
    said = {flag: flag in arguments for flag in flags}
    vars(voice).update(
        vars(Voice(said["--quiet"], said["--verbose"], said.get("--csv", False), line))
    )
    return [argument for argument in arguments if argument not in flags]


def _tell_cost(seconds: float) -> None:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    complain(f"{seconds:.1f} s, at most {peak / 2**20:.0f} MiB of main memory")


def main() -> None:
    """Entry point of the `ditq` script."""
    sys.exit(run(sys.argv[1:]))


def _show_version(asked: bool) -> None:
    if asked:
        from ditq_runtime.cli.output import say
        from ditq_runtime.version import __version__

        say(f"ditq {__version__}")
        raise typer.Exit


def _options(
    quiet: Annotated[bool, typer.Option("--quiet", help="Results and errors only.")] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Also what other libraries say, and what a command took."),
    ] = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="Tables as CSV; sentences go to stderr.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")
    ] = False,
) -> None:
    """What stands before a command; see HELP. All but the version are heard by `_hear`."""


_options.__doc__ = HELP
