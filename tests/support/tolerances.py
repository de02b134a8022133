"""Absolute tolerances, each with its reason; the same everywhere."""

# float64 against float64 in another order of summation: values of order 10, a few hundred additions.
FLOAT64 = 1e-9
# float32 against float64 through a whole tiny model.
FLOAT32_MODEL = 2e-3
# float32 against float64 in one operation on values of order 1.
FLOAT32_OP = 1e-4
# bfloat16 keeps 8 bits: relative error of one operation, in the Frobenius norm.
BFLOAT16_RELATIVE = 2e-2
