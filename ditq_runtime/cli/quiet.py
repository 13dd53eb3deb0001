"""The one owner of what other libraries print: nothing, so that our own lines can be read."""


def quiet_diffusers() -> None:
    """Our commands show their own progress; diffusers' bars and type warnings would break it up."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
