"""Which variables of the environment name an Azure account: those that obstore reads, and no others."""

from __future__ import annotations

import pytest

from keepstep import Store
from keepstep.checkpoint.place.profile import settings_of_azure

KEY = "c2VjcmV0IG9mIGFuIGFjY291bnQ="


@pytest.fixture(autouse=True)
def the_variables_of_az(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONNECTION_STRING", "ACCOUNT_NAME", "ACCOUNT_KEY", "USE_EMULATOR"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "acct")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)


@pytest.mark.parametrize(
    "name", ["ACCOUNT_NAME", "STORAGE_ACCOUNT_NAME", "AZURE_ACCOUNT_NAME", "USE_EMULATOR", "account_name"]
)
def test_what_obstore_does_not_read_hides_no_account(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "an-applications-own")
    assert settings_of_azure({}) == {"account_name": "acct", "account_key": KEY}
    Store("az://container/run")


@pytest.mark.parametrize("name", ["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR"])
def test_what_it_reads_counts_before_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    assert settings_of_azure({}) == {}


@pytest.mark.parametrize("name", ["account_name", "AZURE_STORAGE_ACCOUNT_NAME", "azure_storage_use_emulator"])
def test_an_option_counts_before_both_in_any_of_its_spellings(name: str) -> None:
    assert settings_of_azure({name: "true"}) == {}
