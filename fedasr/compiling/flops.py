"""Counts the products of matrices in a traced program, alike for every platform."""

import math
from collections.abc import Iterator
from typing import Any


def matrix_flops(jaxpr: Any) -> int:
    """Multiplications and additions of all `dot_general` and convolutions in a jaxpr.

    A scan counts as often as it turns, a kernel for each of its blocks, a loop whose turns nobody
    knows once, of a choice the costliest branch.

    Args:
      jaxpr: such as `jax.jit(f).trace(*arguments).jaxpr`.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        features = equation.params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(out) * math.prod(kernel) // kernel[features]
    inner = [matrix_flops(sub) for sub in _inner(equation.params)]
    if name == "cond":
        return max(inner, default=0)
    if name == "pallas_call":
        return sum(inner) * math.prod(equation.params["grid_mapping"].grid)
    return sum(inner) * (equation.params["length"] if name == "scan" else 1)


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation calls."""
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                yield item
