"""The one owner of what other libraries print: nothing, so that our own lines can be read."""


def quiet_diffusers() -> None:
    """Our commands show their own progress; diffusers' bars and type warnings would break it up."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def quiet_transformers() -> None:
    """Its bars over loading and saving, and its notices; downloads still show theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    silent = are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # the hub's too
    if not silent:
        enable_progress_bars()
