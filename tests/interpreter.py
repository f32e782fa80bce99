"""Import it first in a process with TRITON_INTERPRET=1: what Triton 3.6's interpreter cannot do, mended.

Bounds of a loop that were loaded are arrays of one element, which NumPy 2.4 does not take for an index; the
operands of `tl.dot` in bf16, which NumPy does not know, went in as the integers that hold their bits; fp32
became bf16 by cutting bits off, where a GPU rounds to the nearest.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_patch_tensor, _dot = interpreter._patch_lang_tensor, InterpreterBuilder.create_dot
_convert = interpreter._convert_float


def _with_index(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _wide(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(data, source, target, mode):
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(data, source, target, mode)
    bits = np.ascontiguousarray(data).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


interpreter._convert_float = _rounded
interpreter._patch_lang_tensor = _with_index
InterpreterBuilder.create_dot = lambda self, a, b, *rest: _dot(self, _wide(a), _wide(b), *rest)
