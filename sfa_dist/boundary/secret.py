"""Passwords, tokens and signatures become `***` in everything shown or written; host and path stay readable.

A URL loses its user, its password and the values of its query. Other text, commands included, loses what follows the
usual names (`--token`, `PASSWORD=`, `Authorization:`) and tokens of well-known shapes. The process remembers the
secrets in a recipe's URLs and environment variables, and masks them where a server or a library repeats them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"
MIN_REMEMBERED = 6  # Characters: shorter ones also occur inside ordinary words.
# Query parameters that name what is read and grant no access.
OPEN_PARAMETERS = ("versionid", "version", "revision", "download")

_WORDS = (
    r"passw(?:or)?d|passphrase|pwd|secret|token(?!s|iz)|signature|credential|bearer"
    r"|(?:api|access|account|private|shared|subscription)[_-]?key(?:[_-]?id)?"
)
_SHORT_WORDS = r"auth|authorization|cookie|sig|sas|(?:ssh)?pass|j?session(?:_?id)?"
_REST = r"[\w.-]{0,99}"  # Rest of a name; without the bound, one long word takes minutes.
_NAME = rf"(?:{_REST}(?:{_WORDS}){_REST}|(?:{_REST}[_.-])?(?:{_SHORT_WORDS})(?:[_.-]{_REST})?)"
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_SECRET_VARIABLE = re.compile(rf"{_NAME}|(?:.*_)?(?:KEY|PW|PASS|PIN)(?:_.*)?", re.IGNORECASE)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s'\"<>|\\]+")
_URL_END = ":;,.)]}"
_USER = re.compile(r"[^/?#]*@|[^/?#@]*:(?!\d*(?:[/?#]|$)).*@", re.DOTALL)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"'&,;(){}\[\]]+)"""
_IN_TEXT = (
    re.compile(r"""((?:authorization|cookie)["']?\s*[:=]\s*["']?)[^"'\r\n]+""", re.IGNORECASE),
    re.compile(rf"""((?<![\w.-]){_NAME}["']?\s*[:=]\s*){_VALUE}""", re.IGNORECASE),
    re.compile(rf"((?<!\S)--?{_NAME}\s+){_VALUE}", re.IGNORECASE),
    re.compile(r"((?<!\S)(?:-[uU]|--(?:proxy-)?user)[\s=]*['\"]?)[^\s:'\"]+:[^\s'\"]+"),
    re.compile(r"""((?<!\S)(?:-[uU]|--(?:proxy-)?user)[\s=]*)(?:'[^':%]*[:%][^']*'|"[^":%]*[:%][^"]*")"""),
    re.compile(r"""((?<!\S)-b[\s=]*['"]?)[^\s'"=]+=[^'"]+"""),
    re.compile(r"""(//|:/)[^\s/:@'"]+:[^\s/@'"]+(?=@)"""),  # in malformed URLs
    re.compile(r"(\bbearer\s+)[\w.~+/=-]{6,}", re.IGNORECASE),
    re.compile(r"(\bsshpass\s+-p\s*)\S+"),
    # Tokens of AWS, GitHub, Hugging Face, GitLab, Slack, OpenAI, and any JSON Web Token.
    re.compile(
        r"()(?:\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bgh[pousr]_\w{16,}|\bhf_\w{16,}|\bglpat-[\w-]{16,}"
        r"|\bxox[a-z]-[\w-]{10,}|\bsk-[\w-]{20,}|(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
    ),
)

_remembered: set[str] = set()


def is_secret_name(key: str) -> bool:
    """Whether the name of this key, or its last part (`a.b.token`), is that of a secret."""
    return _SECRET_NAME.fullmatch(key.rpartition(".")[2]) is not None


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return _SECRET_VARIABLE.fullmatch(name) is not None


def remember(secret: str) -> None:
    """From now on `without_secrets` masks this secret, as it is and in its URL-encoded and decoded forms."""
    for text in (secret, unquote(secret), quote(secret, safe="")):
        if len(text) >= MIN_REMEMBERED:
            _remembered.add(text)


def remember_source(source: str) -> None:
    """Remembers the secrets in a URL; other texts are ignored."""
    if is_url(source):
        for secret in _parts(source)[1]:
            remember(secret)


def is_url(text: str) -> bool:
    """Whether a text starts like a URL, with `scheme://`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def is_masked(source: str) -> bool:
    """Whether a source has been through `shown_source` and lost a secret, so that it cannot be read any more."""
    if not is_url(source):
        return source.startswith("pipe:") and MASK in source
    return f"://{MASK}@" in source or re.search(rf"[?&#;][^/]*{re.escape(MASK)}", source) is not None


def shown_source(source: str) -> str:
    """The name of a shard, a pipe or a file, with its secrets masked."""
    return without_secrets(_parts(source)[0] if is_url(source) else source)


def without_secrets(text: str) -> str:
    """The text with every secret masked that is remembered or looks like one. Masking twice equals masking once."""
    for secret in sorted(_remembered, key=len, reverse=True):
        text = text.replace(secret, MASK)
    text = _URL.sub(_shown_url, text)
    for pattern in _IN_TEXT:
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return text


def without_secrets_in(tree: Any, key: str = "") -> Any:
    """`tree` with the secrets masked in all text of its lists and mappings, and with every value of a secret name."""
    if isinstance(tree, Mapping):
        return {name: without_secrets_in(child, str(name)) for name, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_secrets_in(child, key) for child in tree]
    if key and tree is not None and not isinstance(tree, bool) and is_secret_name(key):
        return MASK
    return shown_source(tree) if isinstance(tree, str) else tree


def _shown_url(match: re.Match[str]) -> str:
    url = match[0].rstrip(_URL_END)
    return _parts(url)[0] + match[0][len(url) :]


def _parts(url: str) -> tuple[str, list[str]]:
    """The URL with its secrets masked, and the secrets."""
    scheme, _, rest = url.partition("://")
    secrets: list[str] = []
    shown = f"{scheme}://"
    if "@" in rest and (user := _USER.match(rest)):
        secrets += [user[0][:-1], *user[0][:-1].split(":", 1)]
        shown, rest = f"{shown}{MASK}@", rest[user.end() :]
    in_store = scheme.lower() == "s3"  # There ? may belong to a glob and # to a name, unless an = follows.
    before, mark, behind = rest.partition("?")
    if not mark and not in_store:
        before, mark, behind = rest.partition("#")
    if not mark or (in_store and "=" not in behind):
        return shown + rest, secrets
    pieces = re.split("([&;#])", behind)
    pieces[::2] = [_shown_parameter(piece, secrets) for piece in pieces[::2]]
    return f"{shown}{before}{mark}{''.join(pieces)}", secrets


def _shown_parameter(text: str, secrets: list[str]) -> str:
    name, equals, value = text.partition("=")
    if not text or (equals and (not value or name.lower() in OPEN_PARAMETERS)):
        return text
    secrets.append(value if equals else name)
    return f"{name}={MASK}" if equals else MASK
