"""What servers of buckets refuse, in words; the texts are what obstore makes of their answers."""

from __future__ import annotations

import pytest

from keepstep.checkpoint.place.refusals import in_words

S3 = (
    "Generic S3 error: Error performing list request: Error performing GET https://s3.example/b?*** in 2ms - "
    "Server returned non-2xx status code: {status}: {body}"
)
XML = '<?xml version="1.0" encoding="UTF-8"?> <Error><Code>{code}</Code><Message>{message}</Message></Error>'
GOOGLE = (
    'Generic GCS error: Server returned non-2xx status code: 403 Forbidden: { "error": { "code": 403, '
    '"message": "me does not have storage.objects.list access.", "errors": [ { "reason": "forbidden" } ] } }'
)
AZURE = (
    "Generic MicrosoftAzure error: Error performing GET https://x.example/b?*** in 9ms - Server returned "
    "non-2xx status code: 404 Not Found: <?xml version='1.0'?><Error><Code>ContainerNotFound</Code>"
    "<Message>The specified container does not exist.</Message></Error>"
)


def s3(status: str, code: str, message: str = "No.") -> str:
    return S3.format(status=status, body=XML.format(code=code, message=message))


@pytest.mark.parametrize(
    ("said", "happened", "to_do"),
    [
        (
            s3("404 Not Found", "NoSuchBucket"),
            "there is no bucket s3://b (NoSuchBucket)",
            "correct the address",
        ),
        (AZURE, "there is no bucket s3://b (ContainerNotFound)", "keepstep makes no buckets"),
        (
            s3("403 Forbidden", "AccessDenied"),
            "permission denied on s3://b (AccessDenied)",
            "list, read, write",
        ),
        (GOOGLE, "permission denied on s3://b (forbidden)", "use others"),
        (
            s3("400 Bad Request", "ExpiredToken"),
            "accept the credentials for s3://b (ExpiredToken)",
            "not expired",
        ),
        (s3("401 Unauthorized", "Odd"), "accept the credentials for s3://b (Odd)", "Check the key"),
        (s3("301 Moved", "PermanentRedirect"), "in another region than was asked (Perm", "AWS_REGION"),
        (
            "Generic S3 error: PUT http://169.254.169.254/latest/api/token in 1s - HTTP error",
            "no credentials for s3://b were found",
            "AWS_ACCESS_KEY_ID",
        ),
        (
            "Generic S3 error: Error performing GET http://x/b in 1s - HTTP error: error sending request",
            "the server can't be reached: Generic S3 error",
            "Check the endpoint",
        ),
        (
            s3("503 Slow Down", "SlowDown", "Reduce your request rate."),
            "503 Slow Down (SlowDown: Reduce your request rate).",
            "max_retries",
        ),
    ],
)
def test_a_refusal_says_what_happened_to_which_bucket_and_what_to_do(
    said: str, happened: str, to_do: str
) -> None:
    told = in_words("s3://b/run/1", "list *", said)
    assert told.startswith("s3://b/run/1: could not list *: ")
    assert happened in told
    assert to_do in told
    assert "<" not in told
    assert "{ " not in told
