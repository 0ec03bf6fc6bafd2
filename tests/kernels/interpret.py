"""A mend of Triton's interpreter, which needs one: numpy 2.4 makes no int of an array of one element. For the tests and for bench.gpu --dry-run."""

from typing import Any


def mended(interpreter: Any) -> Any:
    """`_patch_lang_tensor` for the module triton.runtime.interpreter."""
    patch = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return with_index
