"""What a user can mend: the error that ends in one line, and the disk's errors that count as such."""

import errno
import re
from typing import Any


class InputError(ValueError):
    """The user's input or environment is wrong: one line on standard error, exit code 2."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its type where it says nothing, the next line too after a colon."""
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def shown(value: Any) -> str:
    """A value in an error's line: a digest by its first twelve digits, what is long by its beginning."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"{value[:12]}..."
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


ENVIRONMENT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ENOTCONN, errno.ESTALE),  # a mounted drive that has gone
    *(errno.ENODEV, errno.ENOTSUP),  # one that cannot do it: map files, for example
    *(errno.EMFILE, errno.ENFILE),  # ulimit -n
}
"""Errors of the disk that the user can mend: not defects of the program."""
