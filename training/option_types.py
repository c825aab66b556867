"""Types of options with a range, which the command line checks and names in its help."""

from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from cyclopts.validators import Number

__all__ = ["Fraction", "NonNegativeFloat", "NonNegativeInt", "PositiveFloat", "PositiveInt"]

Fraction = Annotated[float, Parameter(validator=Number(gte=0.0, lte=1.0))]
"""0..1."""
