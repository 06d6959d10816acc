"""How the process of an engine imports torch."""

from __future__ import annotations

import gc
import sys


def import_torch() -> None:
    """Import torch, unless somebody has, without looking for garbage again and again among half a million new objects
    that stay: it took a sixth of the time."""
    if "torch" in sys.modules:
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        if was_enabled:
            gc.enable()
    gc.freeze()
