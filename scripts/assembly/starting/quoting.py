"""Words of a command line that Hydra's grammar does not know, such as a path with a space and an umlaut."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException

_SETTING = re.compile(r"([+~]{0,2}[\w./@-]+)=(.*)", re.DOTALL)


def unreadable(error: BaseException, words: Sequence[str]) -> str | None:
    """Return how to write the first word that Hydra cannot read; ``None`` where an error is of something else.

    Args:
        error: What Hydra raised.
        words: The command line.
    """
    if not isinstance(error, OverrideParseException):
        return None
    # Hydra's own options and what belongs to them are no overrides, and nothing that it has read begins with a dash.
    word = next((each for each in words if not each.startswith("-") and not _readable(each)), None)
    if word is None:
        return None
    found = _SETTING.fullmatch(word)
    if found is None:
        return f"{word} cannot be read: a setting is written KEY=VALUE"
    key, value = found.groups()
    if value[:1] in "[{" and value[-1:] in "]}":
        return (
            f"{word} cannot be read: put quotation marks around each text with spaces or other signs in it, within the "
            f"shell's quotes, as in 'key=[\"a b.png\",c.png]'"
        )
    return f"{word} cannot be read: quote the value within the shell's quotes, {_quoted(key, value)}"


def _readable(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _quoted(key: str, value: str) -> str:
    inner = value[1:] if value[:1] in "'\"" and value[:1] not in value[1:] else value
    if not re.search(r"[\"\\]|\$\{", inner):
        return shlex.quote(f'{key}="{inner}"')
    from cleave.lightning_modules.command_line import quoted

    return quoted({key: inner})
