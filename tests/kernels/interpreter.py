"""Repairs to Triton's CPU interpreter, applied to the tests' process only.

Triton 3.6 to 3.9 hold a bf16 block as the 16-bit words of memory and compute on those words:
products, sums, comparisons and dots are wrong, and conversions from float32 truncate. Here a bf16
block is held as the float32 values it stands for: loads widen, stores narrow, and whatever
produces a bf16 block rounds it to nearest even, which is what a GPU does. Also mended: with
numpy >= 2.4, triton 3.6 cannot turn a scalar block into an int, which every `range` needs; and a
scalar comparison loses its type when it is spread over a block, which triton 3.9 then refuses.

Not mended, and refused: atomics on bf16. Rounding to fp8 still truncates.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


def round_bf16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest bf16 (ties to even), still held as float32."""
    return widen(narrow(values))


def narrow(values: np.ndarray) -> np.ndarray:
    """The 16-bit words of the bf16 numbers nearest to `values`; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    words = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), words).reshape(np.shape(values))


def widen(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32)


def is_bf16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.get_element_ty() == tl.bfloat16


def as_float32(handle: Any) -> Any:
    return Handle(handle.data, tl.float32) if is_bf16(handle) else handle


def _round_result(name: str) -> None:
    original = getattr(interpreter.InterpreterBuilder, name)

    def rounded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            result = original(self, *args, **kwargs)
        if is_bf16(result) and result.data.dtype != np.bool_:
            result.data = round_bf16(result.data)
        return result

    setattr(interpreter.InterpreterBuilder, name, rounded)


def _repair_storage() -> None:
    numpy_dtype, fits = interpreter._get_np_dtype, interpreter._validate_np_data_size

    def held_as(dtype: Any) -> np.dtype:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return np.dtype(np.float32) if scalar == tl.bfloat16 else numpy_dtype(dtype)

    interpreter._get_np_dtype = held_as
    interpreter._validate_np_data_size = lambda data, dtype: (
        dtype.scalar == tl.bfloat16 or fits(data, dtype)
    )


def _repair_memory(builder: type) -> None:
    load, store, rmw = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *args: Any, **kw: Any) -> Any:
        if pointers.get_element_ty() != tl.bfloat16:
            return load(self, pointers, mask, other, *args, **kw)
        fill = np.zeros(pointers.data.shape, np.float32) if other is None else other.data
        words = interpreter._interpreter.load(
            pointers.data, mask.data, narrow(fill), np.dtype(np.uint16)
        )
        return Handle(widen(words), tl.bfloat16)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kw: Any) -> Any:
        if pointers.get_element_ty() == tl.bfloat16:
            value = Handle(narrow(value.data), tl.uint16)
        return store(self, pointers, value, mask, *args, **kw)

    def atomic_rmw(self: Any, op: Any, pointers: Any, *args: Any, **kw: Any) -> Any:
        if pointers.get_element_ty() == tl.bfloat16:
            raise TypeError("the interpreter has no atomics on bf16")
        return rmw(self, op, pointers, *args, **kw)

    builder.create_masked_load = masked_load
    builder.create_masked_store = masked_store
    builder.create_atomic_rmw = atomic_rmw


def _repair_conversions(builder: type) -> None:
    cast, between_floats, bitcast = (
        builder.cast_impl,
        builder.create_fp_to_fp,
        builder.create_bitcast,
    )

    def convert(original: Any) -> Any:
        def converted(self: Any, source: Any, dtype: Any, *args: Any) -> Any:
            if source.dtype.scalar.primitive_bitwidth == 8 or dtype.scalar.primitive_bitwidth == 8:
                if dtype.scalar != tl.bfloat16:
                    return original(self, as_float32(source), dtype, *args)
                source = original(self, source, tl.float32, *args)
            with np.errstate(invalid="ignore"):  # NaN to an integer, where a mask discards it
                data = source.data.astype(interpreter._get_np_dtype(dtype))
            if dtype.scalar == tl.bfloat16 and not is_bf16(source):
                data = round_bf16(data)
            return Handle(data, dtype.scalar)

        return converted

    def reinterpret(self: Any, source: Any, dtype: Any) -> Any:
        if is_bf16(source) and dtype.scalar != tl.bfloat16:
            source = Handle(narrow(source.data), tl.uint16)
        elif dtype.scalar == tl.bfloat16 and not is_bf16(source):
            return Handle(widen(source.data.view(np.uint16)), tl.bfloat16)
        return bitcast(self, source, dtype)

    builder.cast_impl = convert(cast)
    builder.create_fp_to_fp = convert(between_floats)
    builder.create_bitcast = reinterpret
    builder.get_bf16 = lambda self, value: Handle(
        round_bf16(np.array([value], np.float32)), tl.bfloat16
    )


def _widen_dot(builder: type) -> None:
    """Products are added in float64 and rounded once: on some CPUs (Zen 5) the order in which BLAS
    adds depends on where in its block a row lies, and no kernel here has a say in that."""
    dot = builder.create_dot

    def widened(self: Any, a: Any, b: Any, sums: Any, *args: Any) -> Any:
        if sums.data.dtype != np.float32 or a.data.itemsize == 1:  # whole numbers, or fp8
            return dot(self, a, b, sums, *args)
        products = np.matmul(a.data, b.data, dtype=np.float64)
        return Handle(products.astype(np.float32) + sums.data, sums.dtype.scalar)

    builder.create_dot = widened


def _keep_truth(builder: type) -> None:
    """A comparison's handle names its operands' type: splat it as the truth values it holds."""
    splat = builder.create_splat

    def kept(self: Any, shape: Any, value: Any) -> Any:
        if value.data.dtype == np.bool_:
            value = Handle(value.data, tl.int1)
        return splat(self, shape, value)

    builder.create_splat = kept


def _repair_arithmetic(builder: type) -> None:
    _widen_dot(builder)
    _keep_truth(builder)
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_dot"):
        _round_result(name)
    absolute = builder.create_fabs
    builder.create_fabs = lambda self, x: (
        Handle(np.abs(x.data), tl.bfloat16) if is_bf16(x) else absolute(self, x)
    )


def _repair_index() -> None:
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def repair() -> None:
    """Mend the interpreter of this process. To be called once, before any kernel runs."""
    builder = interpreter.InterpreterBuilder
    _repair_storage()
    _repair_memory(builder)
    _repair_conversions(builder)
    _repair_arithmetic(builder)
    _repair_index()
