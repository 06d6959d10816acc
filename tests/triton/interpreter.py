"""What Triton's interpreter (3.6) does otherwise than devices do, put right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def interpreter_as_a_device() -> Iterator[None]:
    """Infinite results are no warnings, a bfloat16 is the nearest one and multiplied as a number, any number may bound
    a loop, and calls are quick."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_convert_float", _rounding_to_nearest(interpreter._convert_float))
        builder = interpreter.InterpreterBuilder
        patch.setattr(builder, "create_dot", _widening(builder.create_dot))
        patch.setattr(interpreter, "_patch_lang_tensor", _indexing(interpreter._patch_lang_tensor))
        patch.setattr(interpreter.InterpretedFunction, "__call__", _called_quickly(interpreter.InterpretedFunction))
        # what it works out for overflow checks nobody reads, since it runs without debugging
        options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        yield


def _rounding_to_nearest(convert: Any) -> Any:
    """The interpreter cuts off."""

    def converted(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(values, source, target, rounding)
        wide = torch.from_numpy(np.array(values).view(np.float32))
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)

    return converted


def _widening(dot: Any) -> Any:
    """It multiplies the bits of a bfloat16."""

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(_as_float32(each) if each.dtype.scalar == tl.bfloat16 else each for each in (a, b)), *rest)

    return product


def _as_float32(handle: Any) -> Any:
    bits = np.array(handle.data).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _indexing(patch_tensor: Any) -> Any:
    """Its scalars are arrays of one element, which numpy from 2.4 on takes for none."""

    def patched(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


def _called_quickly(function: type) -> Any:
    """Every call of one kernel's function by another patches the language again, which takes a millisecond."""
    patching_call = function.__call__

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        languages = [each for each in self.fn.__globals__.values() if each is tl or each is tl.core]
        # ranges are classes of the language, and functions of the interpreter
        is_patched = not any(isinstance(language.range, type) for language in languages)
        return self.rewrite()(*args, **kwargs) if is_patched else patching_call(self, *args, **kwargs)

    return called
