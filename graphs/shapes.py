"""Types of arrays with their axes, as jaxtyping has them: `Float[ndarray, "node"]`.

Shapes are checked in tests only, and importing jaxtyping takes a tenth of the time of `trace list`. So it is used where
something else has imported it, as tests do; elsewhere the same words stand for any array.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Float64, Int, Int32, Integer, Shaped, UInt8
else:

    class _Unchecked:
        def __class_getitem__(cls, array_and_axes: tuple) -> type:
            return array_and_axes[0]

    Bool = Float = Float64 = Int = Int32 = Integer = Shaped = UInt8 = _Unchecked

__all__ = ["Bool", "Float", "Float64", "Int", "Int32", "Integer", "Shaped", "UInt8"]
