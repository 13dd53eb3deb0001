"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ditq")
except PackageNotFoundError:  # run from a source tree
    __version__ = "source"
