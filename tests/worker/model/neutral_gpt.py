"""Fields of a Spec set to what they would be without the architecture that needs them: (field, case, change)."""

from __future__ import annotations

from collections.abc import Callable

from worker.model.spec import Spec

NEUTRALISED: list[tuple[str, str, Callable[[Spec], Spec]]] = []
