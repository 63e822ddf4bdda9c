"""A process that runs test files in Triton's interpreter, one after another: their paths come on its input, and after each one's output a line with END and
the exit status. What takes longest, importing torch and Triton, is done once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest

END = "--- this file ended with"


def save_time() -> None:
    """Leave out what Triton's interpreter does in vain, more than half of the time of kernels that are made of helpers: it looks through its whole language for
    what to replace at a launch, which needs it, and again at every call of a helper inside it, which finds everything replaced; it computes whether each sum
    of integers overflows, and then tells it only where `debug` is set; it makes the table of numpy's types anew for each look into it, and type and shape of
    each tensor; it works out the shape of two tensors that have the same; and a reduction by a function of ours, which knows no place, takes one number at a time,
    where slices give the same bits."""
    from triton import language
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    needed = ("_patch_lang", "_get_np_dtype", "GridExecutor", "ReduceOps", "interpreter_builder")
    if not all(hasattr(interpreter, name) for name in needed) or not hasattr(TritonSemantic, "broadcast_impl_value"):
        return  # another Triton, which takes the time that it takes
    patch, launch, numpy_type = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    parts: dict[Callable[..., Any], frozenset[str]] = {}
    patched: set[frozenset[str]] = set()
    types: dict[str, Any] = {}
    reduce_numbers = interpreter.ReduceOps.generic_reduce

    def patch_once(fn: Callable[..., Any]) -> Any:
        if fn not in parts:
            parts[fn] = frozenset(part.__name__ for part in (language, language.core) if any(part is value for value in fn.__globals__.values()))
        if parts[fn] in patched:
            return None
        patched.add(parts[fn])
        return patch(fn)

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **options)

    def known_type(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, language.block_type) else kind
        if isinstance(element, language.pointer_type):
            return numpy_type(element)
        if element.name not in types:
            types[element.name] = numpy_type(element)
        return types[element.name]

    make = language.tensor.__init__
    shapes: dict[tuple[int, ...], dict[str, Any]] = {}

    def make_tensor(self: Any, handle: Any, kind: Any) -> None:
        """All of it but what depends on the shape alone, which is made once."""
        shape = tuple(kind.shape.values) if kind.is_block() else ()
        if shape not in shapes:
            make(self, handle, kind)
            shapes[shape] = {name: value for name, value in vars(self).items() if name in ("shape", "numel")}
            return
        vars(self).update(shapes[shape], handle=handle, type=kind, dtype=kind.scalar)

    broadcast = TritonSemantic.broadcast_impl_value
    blocks: dict[tuple[Any, ...], Any] = {}

    def block_of(scalar: Any, shape: Any) -> Any:
        if isinstance(scalar, language.pointer_type):
            return language.block_type(scalar, shape)
        key = scalar.name, *getattr(shape, "values", shape)
        if key not in blocks:
            blocks[key] = language.block_type(scalar, shape)
        return blocks[key]

    def broadcast_others(self: Any, left: Any, right: Any) -> Any:
        same = left.type.is_block() and right.type.is_block() and left.handle.data.shape == right.handle.data.shape
        return (left, right) if same else broadcast(self, left, right)

    def reduce_slices(self: Any, parts: tuple[Any, ...]) -> Any:
        if self.axis is None or len(parts[0].shape) < 2:
            return reduce_numbers(self, parts)
        slices = [numpy.moveaxis(part.handle.data, self.axis, 0) for part in parts]
        found = tuple(self.to_tensor(rows[0], part.dtype) for rows, part in zip(slices, parts, strict=True))
        for place in range(1, len(slices[0])):
            more = (self.to_tensor(rows[place], part.dtype) for rows, part in zip(slices, parts, strict=True))
            both = self.combine_fn.fn(*found, *more)
            both = both if isinstance(both, tuple) else (both,)
            found = tuple(self.to_tensor(one.handle.data, part.dtype) for one, part in zip(both, parts, strict=True))
        return [self.to_tensor(numpy.expand_dims(one.handle.data, self.axis), one.dtype) if self.keep_dims else one for one in found]

    interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype = patch_once, launch_anew, known_type
    interpreter.ReduceOps.generic_reduce, TritonSemantic.broadcast_impl_value = reduce_slices, broadcast_others
    language.block_type.with_element_ty = lambda self, scalar: block_of(scalar, self.shape)
    interpreter.InterpreterBuilder.get_block_ty = lambda self, scalar, shape: block_of(scalar, shape)
    if set(vars(language.tensor(None, language.int32))) == {"handle", "shape", "numel", "type", "dtype"}:
        language.tensor.__init__ = make_tensor
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


if __name__ == "__main__":
    save_time()
    for line in sys.stdin:
        status = pytest.main([line.strip(), "-q", "-p", "no:cacheprovider"])
        print(f"\n{END} {int(status)}", flush=True)
