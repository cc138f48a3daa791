"""The variables that say where an object store is and who asks, as obstore reads them.

obstore documents more (a cloud's own machines need none of them); those here are looked at before it reads them, as a
slip in one ends it with a stack trace instead of an error.
"""

import os
import re

from common.errors import InputError, shown

ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
"""Where a provider's own servers are not meant."""
SIGNED = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
    )
}
"""What goes into the head of a request."""
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (~/.aws is not read)",
    "gs": "GOOGLE_SERVICE_ACCOUNT, or run gcloud auth application-default login",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""What to set where there are none."""


def plain_http(url: str) -> bool:
    """Whether the server behind an address is asked without encryption.

    Raises `InputError` where a variable of its provider cannot be what it should.
    """
    scheme = url.partition("://")[0]
    for name in SIGNED.get(scheme, ()):
        if re.search(r"\s", value := os.environ.get(name, "")):
            secret = "" if "REGION" in name else " (not shown)"
            raise InputError(f"{name}: its value{secret} contains a space or a line break; remove that")
    endpoints = [url] if scheme == "http" else []
    for name in ENDPOINTS.get(scheme, ()):
        if (value := os.environ.get(name)) is not None:
            if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", value):
                raise InputError(
                    f"{name}: expected https://host or http://host:port, found {shown(value)}; correct or unset it"
                )
            endpoints.append(value)
    return any(each.startswith("http://") for each in endpoints)
