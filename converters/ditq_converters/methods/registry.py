"""Which methods there are: a method is imported when it is first used."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

from ditq_converters.methods.base import Method
from ditq_converters.plugins import BUILT_IN, GROUP, found_methods


class Registry(MutableMapping[str, Method]):
    """Name -> method. Packages are searched at every question, so that one installed later is found."""

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._loaded: dict[str, Method] = {}

    def __getitem__(self, name: str) -> Method:
        """The method of that name.

        Raises:
            KeyError: there is none.
            ValueError: the entry point of that name gives no `Method`, or one of another name.
        """
        if name not in self._loaded:
            point = BUILT_IN.get(name) or found_methods()[name]
            method = point.load()
            if not isinstance(method, Method) or method.name != name:
                raise ValueError(
                    f"{GROUP}: {point.value} should be a Method named {name!r}, it is {method!r}"
                )
            self._loaded[name] = method
        return self._loaded[name]

    def __setitem__(self, name: str, method: Method) -> None:
        """Add a method for this process."""
        self._loaded[name] = method

    def __delitem__(self, name: str) -> None:
        """Take an added one away."""
        del self._loaded[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is a method of that name; nothing is loaded."""
        return name in BUILT_IN or name in self._loaded or name in found_methods()

    def __iter__(self) -> Iterator[str]:
        """Built-in names, then those of packages."""
        return iter(dict.fromkeys([*found_methods(), *self._loaded]))

    def __len__(self) -> int:
        """How many there are."""
        return len(list(iter(self)))
