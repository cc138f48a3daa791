"""What a user can mend: the error that ends in one line, and the disk's errors that count as such."""

import errno


class InputError(ValueError):
    """The user's input or environment is wrong: one line on standard error, exit code 2."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


ENVIRONMENT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ENOTCONN, errno.ESTALE),  # a mounted drive that has gone
}
"""Errors of the disk that the user can mend: not defects of the program."""
