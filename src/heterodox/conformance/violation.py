"""How a check says no."""


class Violation(AssertionError):
    """A part does not do what it must."""


def require(holds: bool, problem: str) -> None:
    """Raise `Violation(problem)` unless `holds`. Not an `assert`, which `python -O` would leave out."""
    if not holds:
        raise Violation(problem)
