"""Which of diffusers' tests do not apply to a model in integers, and why."""

from __future__ import annotations

NOT_APPLICABLE: tuple[tuple[str, str], ...] = ()
