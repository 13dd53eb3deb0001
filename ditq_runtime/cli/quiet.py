"""The one owner of what other libraries print: nothing, so that our own lines can be read."""

import logging


def quiet_diffusers() -> None:
    """Our commands show their own progress; diffusers' bars and type warnings would break it up."""
    from diffusers.utils import logging as of_diffusers

    of_diffusers.set_verbosity_error()
    of_diffusers.disable_progress_bar()


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
