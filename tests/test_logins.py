"""Logins in addresses are shown nowhere: not in messages, not in manifests."""

from __future__ import annotations

import pytest

from keepstep.checkpoint.place.objects import _hidden
from keepstep.checkpoint.saving.environment import without_secrets


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://ghp_0123456789abcdef@github.com/me/code.git", "https://***@github.com/me/code.git"),
        ("git+https://x-token:glpat@gitlab.com/me/code.git", "git+https://***@gitlab.com/me/code.git"),
        ("https://:password@host/it", "https://***@host/it"),
        ("http://0123token@host:8080/it", "http://***@host:8080/it"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("https://host#me@example.com", "https://host#me@example.com"),
        (
            "abfss://container@account.dfs.core.windows.net/run",
            "abfss://container@account.dfs.core.windows.net/run",
        ),
        ("ssh://git@github.com/me/code.git", "ssh://git@github.com/me/code.git"),
        ("git+ssh://me:password@host/code.git", "git+ssh://***@host/code.git"),
    ],
)
def test_a_token_before_a_host_is_hidden_as_a_password_is(given: str, shown: str) -> None:
    assert without_secrets(["train.py", given]) == ["train.py", shown]
    assert _hidden(f"no answer from ({given})", ()) == f"no answer from ({shown})"
