"""Vectors of float32 in LLVM's terms, for the loops that numba's compiler would not put into full registers.

What is here builds code inside of numba's intrinsics: arguments are LLVM's builder and values. Sixteen lanes are one
register of AVX-512 and two of AVX2, with the same bits: nothing is summed across lanes, and a multiply-add is rounded
once on every processor.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
FLOAT, LONG = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
ZEROS = ir.Constant(VECTOR, [0.0] * LANES)
typed_intrinsic: Any = intrinsic
"""numba's decorator; its own types are of what generates code, not of what is called."""


def element(context: Any, builder: Any, kind: Any, value: Any, offset: Any) -> Any:
    """Address of an element of an array, counted in elements from its first."""
    return builder.gep(context.make_array(kind)(context, builder, value).data, [offset])


def load(builder: Any, first: Any, line: int) -> Any:
    """A vector, so many vectors behind an address, which need not be aligned."""
    address = builder.gep(first, [LONG(line * LANES)])
    return builder.load(builder.bitcast(address, VECTOR.as_pointer()), align=4)


def store(builder: Any, value: Any, first: Any, line: int) -> None:
    """Write a vector where :func:`load` reads one."""
    address = builder.gep(first, [LONG(line * LANES)])
    builder.store(value, builder.bitcast(address, VECTOR.as_pointer()), align=4)


def spread(builder: Any, value: Any) -> Any:
    """A number in every lane."""
    none, first = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined), ir.IntType(32)
    one = builder.insert_element(none, value, first(0))
    return builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(first, LANES), [0] * LANES))


def flags(builder: Any, mask: Any) -> Any:
    """A bit for each lane of a mask, as int64."""
    return builder.zext(builder.bitcast(mask, ir.IntType(LANES)), LONG)


def has_avx512(context: Any) -> bool:
    """Whether code is generated for AVX-512."""
    return "+avx512f" in context.codegen().magic_tuple()[2]


def compressed(builder: Any, vector: Any, mask: Any) -> Any:
    """The lanes of a vector of 32 bits that a mask names, side by side from the first; on AVX-512 alone."""
    kind = vector.type
    name = f"llvm.x86.avx512.mask.compress.v16{'f32' if kind == VECTOR else 'i32'}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind, kind, mask.type]), name)
    return builder.call(function, [vector, ir.Constant(kind, ir.Undefined), mask])


def looked_up(builder: Any, table: Any, places: Any, mask: Any) -> Any:
    """The int32 of a table at each of some places, int32, that a mask names, and -1 elsewhere; on AVX-512 alone."""
    kind, number, pointer = places.type, ir.IntType(32), ir.IntType(8).as_pointer()
    signature = ir.FunctionType(kind, [kind, pointer, kind, mask.type, number])
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.x86.avx512.mask.gather.dpi.512")
    none = ir.Constant(kind, [-1] * LANES)
    return builder.call(function, [none, builder.bitcast(table, pointer), places, mask, number(4)])


def multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """``x * y + z``, rounded once."""
    name = "llvm.fma.v16f32" if x.type == VECTOR else "llvm.fma.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(x.type, [x.type] * 3), name)
    return builder.call(function, [x, y, z])


@typed_intrinsic
def fma(_typing: Any, x: Any, y: Any, z: Any) -> Any:
    """``x * y + z`` of numbers, rounded once: as a lane computes it."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return multiply_add(builder, *args)

    return types.float32(x, y, z), generate


@typed_intrinsic
def bits_of(_typing: Any, value: Any) -> Any:
    """The bits of a float32, as int32: of positive numbers they ascend as the numbers do."""
    return types.int32(value), lambda _context, builder, _signature, args: builder.bitcast(args[0], ir.IntType(32))


@typed_intrinsic
def number_of(_typing: Any, bits: Any) -> Any:
    """The float32 of some bits, int32."""
    return types.float32(bits), lambda _context, builder, _signature, args: builder.bitcast(args[0], FLOAT)


@typed_intrinsic
def lowest(_typing: Any, bits: Any) -> Any:
    """Which is the lowest of some bits that is set; one must be."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(LONG, [LONG, ir.IntType(1)])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.cttz.i64")
        return builder.call(function, [args[0], ir.IntType(1)(1)])

    return types.int64(bits), generate
