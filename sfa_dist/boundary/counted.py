"""A number with its noun, as text."""


def counted(number: int, noun: str) -> str:
    """The number and its noun: `1 view`, `1,200 views`. `noun` must form its plural with an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
