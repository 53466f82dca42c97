"""Types of options on the command line: no value passes that the option cannot mean. Knows no command."""

from __future__ import annotations

import math
from typing import Any

import click

STEPS = click.IntRange(1, 10_000)
PIXELS = click.IntRange(16, 16_384)
SEED = click.IntRange(-(2**63), 2**64 - 1)
"""What torch takes."""


class FiniteNumber(click.FloatRange):
    """A number in a range, and a number at all: NaN is in every range of click's."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


class PrintableText(click.types.StringParamType):
    """Text that can be written as UTF-8; Python passes on other bytes of a command line as lone surrogates."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            str(value).encode()
        except UnicodeEncodeError:
            self.fail("it is not written in UTF-8.", param, ctx)
        return str(value)


SECONDS = FiniteNumber(min=0.1, max=86_400)
