"""What an object store, or obstore, says when it refuses, in one line: with the status, the code and what to do."""

import json
import re
from urllib.parse import urlsplit

from common.errors import first_line
from shards.objects.environment import CREDENTIALS

METADATA = "://169.254.169.254/"
"""Where a cloud's own machines ask for their credentials: obstore does so where the environment has none."""


def reason(error: BaseException, url: str) -> str:
    """What `error` of obstore says about a request to a store at `url`."""
    said = str(error).partition("\n\nDebug source:")[0]
    names = CREDENTIALS.get(url.partition("://")[0])
    tries = f" (after {found[1]} retries)" if (found := re.search(r"after (\d+) retries", said)) else ""
    if names and METADATA in said:
        return f"no credentials; set {names}"
    if "Account must be specified" in said:
        return f"no account; set {CREDENTIALS['az']}"
    if names and "redirect without LOCATION" in said:
        return "the bucket is in another region; set AWS_REGION"
    if found := re.search(r"Error performing \w+ (\S+) .*error sending request", said):
        server = urlsplit(found[1])
        return f"no answer from {server.scheme}://{server.netloc}{tries}"
    answer = re.search(
        r"Server returned (?:non-2xx status code|error response): (\d{3}) ?([\w -]*):?\s*(.*)",
        said,
        re.DOTALL,
    )
    if not answer:
        return first_line(error)[:300]
    number, status, body = answer.groups()
    line = ", ".join(part for part in (f"{number} {status}".strip(), _message(body)) if part)
    return f"{line}{tries}" + (f"; check {names}" if names and number in ("401", "403") else "")


def _message(body: str) -> str:
    """Code and message in the XML of S3 and Azure or the JSON of Google; nothing of a page of HTML."""
    parts = [
        found[1].strip() for tag in ("Code", "Message") if (found := re.search(f"<{tag}>([^<]*)<", body))
    ]
    if body.startswith("{"):
        try:
            error = json.loads(body).get("error")
        except ValueError:
            error = None
        parts = [str(error["message"])] if isinstance(error, dict) and "message" in error else []
    return ": ".join(" ".join(part.split()) for part in parts)[:200]
