"""Secrets are found, and the rest of their text stays."""

from __future__ import annotations

import pytest

from vime.system.redact import has_secret, is_secret, redact, redacted

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "password", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY",
     "AWS_ACCESS_KEY_ID", "api-key", "GITLAB_CREDENTIALS", "SSH_PASSPHRASE", "apiKey", "authToken", "client_secret"],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)
    assert redacted({name: SECRET}) == {name: "***"}
    assert redacted({"env": {name: SECRET}}) == {"env": {name: "***"}}


@pytest.mark.parametrize(
    "name",
    ["max_tokens_per_gpu", "TOKENIZERS_PARALLELISM", "num_tokens", "prompt_key", "label_key", "apply_chat_template",
     "NCCL_SOCKET_IFNAME", "keys", "monkey", "tokens"],
)  # fmt: skip
def test_names_that_only_sound_like_secrets(name: str) -> None:
    assert not is_secret(name)
    assert redacted({name: "8192"}) == {name: "8192"}


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@reward.example:8443/score",
        f"proxy is http://{SECRET}@proxy, which is away",
        f"GET https://host/score?model=a&api_key={SECRET}&n=1 answered 500",
        f"https://bucket/x?X-Amz-Signature={SECRET}&sig={SECRET}",
        f"export WANDB_API_KEY={SECRET}",
        f"env HF_TOKEN: '{SECRET}'",
        f'{{"HF_TOKEN": "{SECRET}"}}',
        f"&quot;HF_TOKEN&quot;: &quot;{SECRET}&quot;",
        f"HF_TOKEN=&#x27;{SECRET}&#x27;",
        f"Authorization: Bearer {SECRET}",
        f"PASSWORD={SECRET} python train.py",
    ],
)
def test_no_secret_is_left_in_a_text(text: str) -> None:
    assert SECRET not in redact(text)
    assert "***" in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens_per_gpu=8192 and --rollout-max-response-len 8192",
        "https://example.org/a@b?c=d#e",
        "mail to someone@example.org",
        "the token is 5 and the secret of the answer",
        "TOKENS=5",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_values_keep_their_shape() -> None:
    value = {"lr": 1e-6, "names": ["a", None, True], "rm_url": f"http://u:{SECRET}@h/", "env": {}}
    assert redacted(value) == {"lr": 1e-6, "names": ["a", None, True], "rm_url": "http://***@h/", "env": {}}
    assert has_secret("http_proxy", f"http://u:{SECRET}@h/")
    assert not has_secret("http_proxy", "http://h/")
