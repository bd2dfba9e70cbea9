"""What looks like a secret. A sweep file is copied into the run directory, the card and W&B: none may be in it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lora_search.errors import InputError

MASK = "***"

ADVICE = (
    "it would be copied into the run directory; allowed: in the environment (WANDB_API_KEY, HF_TOKEN, "
    "AWS_SECRET_ACCESS_KEY, ...), which your platform's secret store fills"
)

NAMES = frozenset(
    "token password passwd passphrase secret secrets credential credentials apikey authkey privatekey".split()
)

QUERY_NAMES = NAMES | frozenset("sig signature key accesskey secretkey accountkey".split())
"""Of a URL's parameters: Azure's `sig` and the signatures of presigned URLs let in whoever shows them."""

VALUES = {
    "a W&B API key": re.compile(r"^((local-)?[0-9a-f]{40}|wandb_v\d_\S{20,})$", re.IGNORECASE),
    "a Hugging Face token": re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}"),
    "an AWS access key": re.compile(r"(?<![A-Z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    "an API key": re.compile(r"^sk-[\w-]{20,}$"),
    "a GitHub token": re.compile(r"(?<![A-Za-z0-9])(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "a GitLab token": re.compile(r"(?<![A-Za-z0-9])glpat-[\w-]{20,}"),
    "a Google API key": re.compile(r"(?<![A-Za-z0-9])AIza[\w-]{35}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a URL with a password": re.compile(r"\w://[^/@\s]*:[^/@\s]+@"),
}
"""Whole values where a name or a path may hold the like by chance, as a cache's path holds a commit."""

COMMITS = (("base", "revision"),)
"""Keys whose value may be 40 hex digits, as a commit is."""

Keys = tuple[str | int, ...]


def find_secrets(raw: Any, path: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Where in a sweep file something looks like a secret, and why; never the secret itself."""
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            if is_secret_name(str(key)):
                yield (*path, str(key)), f"looks like the name of a secret (found {MASK}); {ADVICE}"
            else:
                yield from find_secrets(value, (*path, str(key)))
    elif isinstance(raw, list):
        for index, value in enumerate(raw):
            yield from find_secrets(value, (*path, index))
    elif (kind := secret_kind(str(raw))) and not (path in COMMITS and kind == "a W&B API key"):
        yield path, f"found {MASK}, which looks like {kind}; {ADVICE}"


def refuse_secret(key: str, value: str) -> None:
    """
    Raises:
        InputError: what was given as `key` looks like a secret.
    """
    if (kind := secret_kind(value)) is not None:
        raise InputError(f"{key}: found {MASK}, which looks like {kind}; {ADVICE}")


def is_secret_name(key: str, names: Collection[str] = NAMES) -> bool:
    """Whether a key is called as secrets are: api_key, hf-token, AWS_SECRET_ACCESS_KEY, accessToken."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).lower().replace("-", "_").strip("_").split("_")
    return words[-1] in names or "secret" in words or ("key" in words and len(words) > 1)


def secret_kind(value: str) -> str | None:
    """What kind of secret a value looks like; None where it looks like none."""
    for kind, pattern in VALUES.items():
        if pattern.search(value.strip()):
            return kind
    parameters = re.findall(r"[?&]([^=&\s]+)=[^&]", value)
    return "a URL with a secret" if any(is_secret_name(name, QUERY_NAMES) for name in parameters) else None


def masked(override: str) -> str:
    """A `key.path=value` as it may be shown."""
    key, equals, value = override.partition("=")
    names = key.strip().split(".")
    hidden = any(map(is_secret_name, names)) or secret_kind(value.strip().strip("'\"")) is not None
    return f"{key}={MASK}" if equals and hidden else override
