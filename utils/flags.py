"""Types of flags."""

import math


def number(kind: type, zero: bool = False, most: float = math.inf):
    """An argparse type: a finite int (that fits 63 bits) or float above zero (or zero, if allowed), at most `most`."""

    def convert(text: str):
        value = kind(text)
        if not 0 <= value < (2**63 if kind is int else math.inf) or (value == 0 and not zero) or value > most:
            raise ValueError
        return value

    convert.__name__ = f"{'whole ' if kind is int else ''}number {'of 0 or more' if zero else 'above 0'}"
    convert.__name__ += f" and at most {most:,}" if most < math.inf else ""
    return convert
