"""Long work shows what is done: the commands' own progress, under the name that the workshop uses."""

from ditq_runtime.cli.progress import note, progress_bar

__all__ = ["note", "progress_bar"]
