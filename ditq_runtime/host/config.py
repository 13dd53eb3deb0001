"""The `quantization_config` of a transformer, as diffusers reads and writes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ditq_runtime.errors import CheckpointError
from ditq_runtime.format import checkpoint, version1
from ditq_runtime.format.digests import read_digests
from ditq_runtime.format.rules import Rule, check_value
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.format.version1 import Version1
from ditq_runtime.host.on_the_fly import Choice, substrings

RECIPE = Rule(dict, nullable=True)


class DitqMethod(str, Enum):  # noqa: UP042  as the methods of diffusers
    """The one quantization method; diffusers reads its `.value` and uses it as a dictionary key."""

    DITQ = "ditq"

    def __str__(self) -> str:
        """As written in config.json."""
        return self.value


class DitqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a transformer: of a packed one, or a choice for quantizing a float one as it loads.

    Args:
        scheme: what the checkpoint is (`ditq_runtime.format.scheme.Scheme` or its dictionary); None for a choice. That
            of version 1 gets its sites when a model is loaded with it, and is of version 2 then.
        recipe: how it was made; never read by the runtime.
        format_version: of the checkpoint.
        weights: quantize a float checkpoint on the fly: `w8`, `w4p` or `w4g`. This and the fields below are those of
            `ditq_runtime.host.on_the_fly.Choice`, and belong to a choice only.
        activations: `token` or `token_asym`.
        group_size: inputs per `w4p` or `w4g` group.
        modulation: weights of the modulation linears; None: the same as `weights`.
        keep: glob patterns of layers and attentions that stay float.
        modules_to_not_convert: as other backends call `keep`: parts of names; a layer stays float whose name holds one.
        attention: `int8` or `bf16`: type of P and V where attention runs quantized, with token scales; `none`: float.
        digests: name of a stored tensor -> its digest; those of a file, compared while it is loaded, then forgotten.

    Raises:
        CheckpointError: another format version, a malformed scheme or an unknown key.
        ValueError: neither or both of scheme and weights; a choice out of range.
    """

    def __init__(
        self,
        scheme: Scheme | dict[str, Any] | None = None,
        recipe: dict[str, Any] | None = None,
        format_version: int = checkpoint.FORMAT_VERSION,
        weights: str | None = None,
        activations: str = "token",
        group_size: int = 64,
        modulation: str | None = None,
        keep: tuple[str, ...] = (),
        attention: str = "none",
        digests: dict[str, str] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        **unknown: Any,
    ) -> None:
        """Validate and keep; diffusers calls this with the stored dictionary's entries."""
        unknown.pop("quant_method", None)
        checkpoint.check_version(format_version)
        if unknown:
            raise CheckpointError(f"quantization_config: unknown keys {sorted(unknown)}")
        if (scheme is None) == (weights is None):
            raise ValueError(
                "DitqConfig: give weights='w8', 'w4p' or 'w4g' to quantize a float checkpoint, or the scheme of a "
                "packed one; "
                f"got {'neither' if scheme is None else 'both'}"
            )
        self.quant_method = DitqMethod.DITQ
        self.format_version = format_version
        self.choice = None
        if weights is not None:
            if not isinstance(keep, Iterable):
                raise ValueError(f"DitqConfig: keep must be a tuple of patterns, got {keep!r}")
            kept = keep if isinstance(keep, str) else tuple(keep)
            if modules_to_not_convert is not None and not isinstance(kept, str):
                kept += substrings(modules_to_not_convert)
            self.choice = Choice(weights, activations, group_size, modulation, kept, attention)
        self.version1 = None
        if scheme is not None and not isinstance(scheme, Scheme):
            if format_version == version1.VERSION:
                self.version1 = Version1.read(scheme)
            scheme = Scheme.from_dict(scheme) if self.version1 is None else self.version1.scheme
        self._scheme = scheme
        self.digests = read_digests(digests)
        check_value("quantization_config: recipe", recipe, RECIPE)
        self.recipe: dict[str, Any] = recipe or {}

    @property
    def is_open(self) -> bool:
        """It is a choice that no model was loaded with yet."""
        return self._scheme is None

    @property
    def scheme(self) -> Scheme:
        """What the checkpoint is; of a choice there is none before a model is loaded with it."""
        if self._scheme is None:
            raise AttributeError(
                "DitqConfig: a choice has no scheme before a model is loaded with it; "
                "read model.config.quantization_config"
            )
        return self._scheme

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> DitqConfig | tuple[DitqConfig, dict[str, Any]]:
        """Read `config.json`; a missing scheme or version is refused by name."""
        checkpoint.check_stored(config_dict)
        if config_dict["scheme"] is None:  # only a choice has none, and that is not stored
            raise CheckpointError(
                "quantization_config: scheme: expected an object, got null; the config.json is damaged"
            )
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, as stored; a choice lists its fields."""
        if self._scheme is None:
            assert self.choice is not None
            return {"quant_method": self.quant_method.value, **asdict(self.choice)}
        return {
            "quant_method": self.quant_method.value,
            "format_version": self.format_version,
            "scheme": self._scheme.to_dict() if self.version1 is None else self.version1.stored,
            "recipe": self.recipe,
            **({"digests": self.digests} if self.digests else {}),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What `repr(config)` prints; diffusers calls it without defining it."""
        return self.to_dict()
