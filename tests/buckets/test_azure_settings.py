"""What of an Azure account is read from a connection string, from `az`'s variables and from options."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from keepstep import Store
from keepstep.checkpoint.place import objects
from keepstep.checkpoint.place.profile import secrets_in_environment, settings_of_azure
from keepstep.errors import UsageError

KEY = "c2VjcmV0IG9mIGFuIGFjY291bnQ="
NAMES = ("CONNECTION_STRING", "ACCOUNT", "KEY", "ACCOUNT_NAME", "ACCOUNT_KEY", "USE_EMULATOR")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            f"DefaultEndpointsProtocol=https;AccountName=acct;AccountKey={KEY};EndpointSuffix=core.windows.net",
            {
                "account_name": "acct",
                "account_key": f"{KEY}",
                "endpoint": "https://acct.blob.core.windows.net",
            },
        ),
        (f"accountname=acct; accountkey={KEY};", {"account_name": "acct", "account_key": KEY}),
        (
            "BlobEndpoint=https://acct.blob.core.windows.net/;SharedAccessSignature=?sv=2024&sig=a%3D",
            {
                "account_name": "acct",
                "sas_token": "sv=2024&sig=a%3D",
                "endpoint": "https://acct.blob.core.windows.net",
            },
        ),
        (
            f"AccountName=acct;AccountKey={KEY};BlobEndpoint=http://127.0.0.1:10000/acct;",
            {"account_name": "acct", "account_key": KEY, "endpoint": "http://127.0.0.1:10000/acct"},
        ),
        ("UseDevelopmentStorage=true", {"use_emulator": "true"}),
    ],
)
def test_connection_strings(text: str, told: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of_azure({"connection_string": text}) == told
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    assert settings_of_azure({}) == told
    assert settings_of_azure({"account_name": "other", "account_key": "k"}) == {}
    Store("az://container/run")
    if "account_key" in told:
        assert told["account_key"] in secrets_in_environment()


def test_the_variables_of_az(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "acct")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    assert settings_of_azure({}) == {"account_name": "acct", "account_key": KEY}
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "obstores-own")
    assert settings_of_azure({}) == {}


def test_what_is_no_connection_string_is_refused_without_showing_it() -> None:
    with pytest.raises(UsageError, match="names no account") as caught:
        Store("az://container/run", storage_options={"connection_string": f"AccountKey={KEY}"})
    assert KEY not in str(caught.value)


def test_no_account_at_all_says_where_to_put_it() -> None:
    with pytest.raises(UsageError, match=re.escape("AZURE_STORAGE_CONNECTION_STRING")):
        Store("az://container/run")


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Whether a store of an address and options may talk without encryption."""
    for cloud in ("AWS", "AZURE", "GOOGLE"):
        monkeypatch.delenv(f"{cloud}_ALLOW_HTTP", raising=False)
    told: list[bool] = []
    real = objects.from_url

    def from_url(address: str, *, client_options: Any, **options: Any) -> Any:
        told.append(client_options["allow_http"])
        return real(address, client_options=client_options, **options)

    monkeypatch.setattr(objects, "from_url", from_url)

    def ask(scheme: str, **options: str) -> bool:
        account = {"account_name": "a", "account_key": KEY} if scheme == "az" else {}
        Store(f"{scheme}://bucket/run", storage_options={**options, **account})
        return told.pop()

    return ask


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_http_may_be_allowed_by_the_names_of_each_cloud(scheme: str, allowed: Callable[..., bool]) -> None:
    for name in ("allow_http", "aws_allow_http", "azure_allow_http", "google_allow_http"):
        assert allowed(scheme, **{name: "true"})
        assert not allowed(scheme, **{name: "false"})


def test_http_is_allowed_where_a_server_is_named_so(
    allowed: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not allowed("s3")
    assert not allowed("s3", endpoint="https://127.0.0.1:9")
    assert allowed("s3", endpoint="http://127.0.0.1:9")
    assert allowed("gs")  # the file of a service account may name one
    for name, value in (("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("AWS_ALLOW_HTTP", "true")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert allowed("s3")
