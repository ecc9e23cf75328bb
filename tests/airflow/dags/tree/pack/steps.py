from pack.helper import FACTOR


def scale(value: float) -> float:
    return FACTOR * value
