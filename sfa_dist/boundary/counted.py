"""A number with its noun, as text."""


def counted(number: int, noun: str) -> str:
    """The number and its noun: `1 view`, `1,200 views`. The plural of `noun` must be formed by an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
