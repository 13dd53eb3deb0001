"""Which methods there are: a method is imported when it is first used."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator

from ditq_converters.methods.base import Method
from ditq_converters.plugins import BUILT_IN, GROUP, found_methods


class Registry(UserDict[str, Method]):
    """Name -> method. Packages are searched at every question, so that one installed later is found."""

    def __missing__(self, name: str) -> Method:
        """The method of that name, loaded.

        Raises:
            KeyError: there is none.
            ValueError: the entry point of that name gives no `Method`, or one of another name.
        """
        point = BUILT_IN.get(name) or found_methods()[name]
        method = point.load()
        if not isinstance(method, Method) or method.name != name:
            raise ValueError(
                f"{GROUP}: {point.value} should be a Method named {name!r}, it is {method!r}"
            )
        self[name] = method
        return method

    def __contains__(self, name: object) -> bool:
        """Whether there is a method of that name; nothing is loaded."""
        return name in BUILT_IN or name in self.data or name in found_methods()

    def __iter__(self) -> Iterator[str]:
        """Built-in names, then those of packages."""
        return iter(dict.fromkeys([*found_methods(), *self.data]))

    def __len__(self) -> int:
        """How many there are."""
        return len(list(iter(self)))
