"""Running the Triton kernels on CPU tensors, for tests and for a rehearsal of `kernels.check`."""

from __future__ import annotations

import os
from typing import Any


def use_interpreter() -> None:
    """Make this process run Triton kernels in interpreter mode. Call it before anything imports triton.

    NumPy 2.4 refuses to make an int of an array of one element, which Triton 3.6's interpreter does for the bounds of
    every loop: the conversion is replaced. Does nothing more than set the variable where triton is not installed.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_convert(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_convert
