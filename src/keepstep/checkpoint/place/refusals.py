"""What the server of a bucket said, in words: what it refuses, and what to do. Pure."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["in_words", "in_words_at_opening", "says_no_bucket", "status_of"]

_STATUS: Final = re.compile(r"status code: (\d{3})\b")
_CODE: Final = re.compile(r"<Code>([^<]{1,100})</Code>|\"(?:code|reason)\": ?\"([^\"]{1,100})\"")
_MESSAGE: Final = re.compile(r"<Message>([^<]{1,300})</Message>|\"message\": ?\"([^\"]{1,300})\"")
_NO_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound", "specified bucket does not exist")
_NO_CREDENTIALS: Final = (
    "169.254.169.254",  # where a machine of a cloud asks for credentials when it was given none
    "169.254.170.2",
    "metadata.google.internal",
    "computeMetadata",
    "/latest/api/token",
    "/latest/meta-data",
    "NoAuthenticationInformation",
    "CredentialsError",
)
_AZURE: Final = "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY"
_WHERE: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SERVICE_ACCOUNT: the path of a file",
    "az": _AZURE,
    "azure": _AZURE,
    "abfs": _AZURE,
    "abfss": _AZURE,
}
_UNKNOWN_CREDENTIALS: Final = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "AuthenticationFailed",
    "InvalidAuthenticationInfo",
)
_OTHER_REGION: Final = ("PermanentRedirect", "AuthorizationHeaderMalformed", "without LOCATION")
_UNANSWERED: Final = "error sending request"
_MORE_TIME: Final = "give it more time (storage_options timeout_s, max_retries, retry_timeout_s)"


def status_of(said: str) -> str:
    """The HTTP status that the server answered with; "" if it is not told."""
    found = _STATUS.search(said)
    return found[1] if found else ""


def says_no_bucket(said: str) -> bool:
    """Whether it is the bucket that is missing, and not an object in it."""
    return any(sign in said for sign in _NO_BUCKET)


def in_words(address: str, doing: str, said: str) -> str:
    """The message of a refusal.

    Args:
        address: what was asked for, as "s3://bucket/run".
        doing: what was under way, as "list *".
        said: the client's text, without secrets.
    """
    bucket = "://".join([address.partition("://")[0], address.partition("://")[2].partition("/")[0]])
    what, to_do = _judged(said, bucket)
    return f"{address}: could not {doing}: {what}. Older checkpoints are whole. {to_do}"


def in_words_at_opening(address: str, said: str) -> str:
    """The message where the client refuses what it was given, before any request.

    Args:
        address: what was asked for.
        said: the client's text, without secrets.
    """
    what = said.rstrip(".")
    if "Account must be specified" in said:
        what = f"no account is named. Set {_AZURE}, or account_name in storage_options"
    return f"{address} can't be opened: {what}. See docs/object-stores.md for addresses and options"


def _judged(said: str, bucket: str) -> tuple[str, str]:
    """What happened, and what to do."""
    status = status_of(said)
    reason = _first(_CODE, said) or (f"HTTP {status}" if status else "")
    if says_no_bucket(said):
        return (
            f"there is no bucket {bucket} ({reason or 'not found'})",
            "keepstep makes no buckets: make it, or correct the address",
        )
    if any(sign in said for sign in _NO_CREDENTIALS):
        return (
            f"no credentials for {bucket} were found, and this machine was asked for some in vain",
            (
                f"Set them in the environment ({_WHERE.get(bucket.partition('://')[0], _WHERE['s3'])}) or in "
                "storage_options; see docs/object-stores.md"
            ),
        )
    if status == "401" or any(sign in said for sign in _UNKNOWN_CREDENTIALS):
        return (
            f"the server does not accept the credentials for {bucket} ({reason})",
            "Check the key and the secret (or the profile), that they have not expired, and the endpoint",
        )
    if any(sign in said for sign in _OTHER_REGION):
        return (
            f"{bucket} lies in another region than was asked ({reason or 'redirected'})",
            'Give the right one: storage_options={"region": ...}, or AWS_REGION',
        )
    if status == "403":
        return (
            f"permission denied on {bucket} ({reason})",
            "Let these credentials list, read, write and delete there, or use others",
        )
    if _UNANSWERED in said:
        return (
            f"the server can't be reached: {_plain(said)}",
            f"Check the endpoint and the network, or {_MORE_TIME}",
        )
    return _plain(said), f"Check the address, the credentials and the network, or {_MORE_TIME}"


def _first(pattern: re.Pattern[str], said: str) -> str:
    found = pattern.search(said)
    return next((group for group in found.groups() if group), "") if found else ""


def _plain(said: str) -> str:
    """The text without the document that the server sent along."""
    code, message = _first(_CODE, said), _first(_MESSAGE, said)
    cut = re.split(r"<\?xml|<Error|<html|\{\s*\"", said, maxsplit=1)[0].rstrip(" :")
    told = f"{code}: {message}" if code and message else code or message
    return f"{cut} ({told.rstrip('.')})" if told else cut
