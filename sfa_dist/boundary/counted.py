"""A number of things in words."""


def counted(number: int, noun: str) -> str:
    """`1 view`, `1,200 views`. `noun` is a noun whose plural adds an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
