"""Do something right after a package has been imported, without importing it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def after_import(package: str, function: str) -> None:
    """Call `MODULE:NAME` when `package` has been imported: now if it is loaded, else once it is.

    Args:
        package: a package or module, such as `diffusers`.
        function: what to call, without arguments; its module is imported then, not before.
    """
    if package in sys.modules:
        _call(function)
        return
    for finder in sys.meta_path:
        if isinstance(finder, _Watch) and finder.package == package:
            finder.functions.append(function)
            return
    sys.meta_path.insert(0, _Watch(package, function))


class _Watch(MetaPathFinder):
    """Finds one package as Python would, once, and has its loader call back; all that wait for it share one."""

    def __init__(self, package: str, function: str) -> None:
        self.package, self.functions = package, [function]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The package's spec with our loader around its own; None for every other name."""
        if fullname != self.package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Calling(spec.loader, self)
        return spec


class _Calling(Loader):
    """The package's own loader, which calls back when the package is complete."""

    def __init__(self, own: Loader, watch: _Watch) -> None:
        self.own, self.watch = own, watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the package's own loader does it."""
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the package, then the functions, first come first; whatever looks at the module finds its own loader."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        if self.watch in sys.meta_path:
            sys.meta_path.remove(self.watch)
            for function in self.watch.functions:
                _call(function)


def _call(function: str) -> None:
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)()
