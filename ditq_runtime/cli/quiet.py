"""The one owner of what other libraries print: nothing, so that our own lines can be read."""

import logging

from ditq_runtime.cli.progress import note


def quiet_diffusers() -> None:
    """Our commands show their own progress; diffusers' bars and type warnings would break it up."""
    from diffusers.utils import logging as of_diffusers

    of_diffusers.set_verbosity_error()
    of_diffusers.disable_progress_bar()


class _Retries(logging.Filter):
    """One line for all that the hub's client says while it tries again."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep errors; of warnings, tell the first in our words."""
        if record.levelno < logging.ERROR and not self.told:
            self.told = True
            note(
                "the hub does not answer, trying again for half a minute; HF_HUB_OFFLINE=1 asks the cache alone"
            )
        return record.levelno >= logging.ERROR


def quiet_huggingface_hub() -> None:
    """Its twelve lines about retries."""
    logging.getLogger("huggingface_hub.utils._http").addFilter(_Retries())


def quiet_inductor() -> None:
    """Its warning about folders that it keeps where we stop a compilation half way."""
    logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)


def quiet_transformers() -> None:
    """Its bars over loading and saving, and its notices; downloads still show theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as of_transformers

    silent = are_progress_bars_disabled()
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()  # the hub's too
    if not silent:
        enable_progress_bars()
