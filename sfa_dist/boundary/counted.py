"""A number of things in words."""


def counted(number: int, noun: str) -> str:
    """`1 view`, `1,200 views`. `noun` is of the kind that takes an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
