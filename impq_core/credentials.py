"""Credentials in addresses: kept out of everything that is written or printed."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote

_USERINFO = re.compile(r"(?P<scheme>\b[a-zA-Z][\w+.-]*)://(?P<userinfo>[^\s/?#]*)@")
_UNESCAPED = re.compile(r"(?P<scheme>\b[a-zA-Z][\w+.-]*)://(?P<userinfo>[^\s/?#@:\[]*:(?!\d*(?:[/?#\s]|$))\S*)@")
"""A password with an unescaped slash, question mark or hash: a port that is no number, and an ``@`` behind it."""

_QUERY = re.compile(r"(?<=[?&])[^=&\s#]*(?:pass|pwd|secret|token|key)[^=&\s#]*=[^&\s#]*&?", re.IGNORECASE)


class Address(NamedTuple):
    """An address without credentials, and the user and password that it held (empty if it held none)."""

    uri: str
    user: str
    password: str


def without_secret(text: str) -> str:
    """A URI, or a text with URIs in it, without passwords: ``postgresql://user:password@host`` becomes
    ``postgresql://user@host``. Of http addresses the user goes too, because it can be an access token."""
    text = _UNESCAPED.sub(_user_only, _USERINFO.sub(_user_only, text))
    return re.sub(r"[?&](?=$|\s|#)", "", _QUERY.sub("", text)) if _QUERY.search(text) else text


def split_credentials(uri: str) -> Address:
    """Split an http(s) address into the address and its credentials."""
    match = _USERINFO.match(uri)
    if match is None:
        return Address(uri, "", "")
    user, _, password = match["userinfo"].partition(":")
    return Address(f"{match['scheme']}://{uri[match.end():]}", unquote(user), unquote(password))


def _user_only(match: re.Match[str]) -> str:
    scheme, user = match["scheme"], match["userinfo"].partition(":")[0]
    return f"{scheme}://" if not user or scheme.lower() in ("http", "https") else f"{scheme}://{user}@"
