"""Secrets of the environment appear in no address, message or record."""

import pytest

from sft_pipeline.secret_text import HIDDEN, holds_secret, public_address, redacted

SECRETS = ("p@ss-word", "t0ken-in-query", "hf_abcdefgh", "tracking-secret")
ADDRESS = "https://mara:p%40ss-word@mlflow.example:8443/base?key=t0ken-in-query#part"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESS)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "tracking-secret")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (ADDRESS, "https://mlflow.example:8443/base"),
        ("postgresql://u:p@db:5432/mlflow", "postgresql://db:5432/mlflow"),
        ("http://user@127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("http://a:b@c@host/x", "http://host/x"),
        ("http://user:p/ss@host/x", "http://host/x"),
        ("http://user:p#s?s@host:1/x?y=z", "http://host:1/x"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("file:///tmp/mlruns", "file:///tmp/mlruns"),
        ("databricks", "databricks"),
        ("", ""),
    ],
)
def test_an_address_is_shown_without_user_password_and_query(address: str, public: str) -> None:
    assert public_address(address) == public


@pytest.mark.parametrize(
    "text",
    [
        f"cannot reach {ADDRESS}",
        "auth failed for mara:p%40ss-word",
        "password p@ss-word is wrong",
        "Max retries exceeded with url: /base/api?key=t0ken-in-query (Caused by ...)",
        "401 for token hf_abcdefgh, then tracking-secret",
    ],
)
def test_no_secret_can_be_read_in_a_message(text: str) -> None:
    found = redacted(text)
    assert HIDDEN in found
    assert not any(secret in found for secret in (*SECRETS, "p%40ss-word"))


@pytest.mark.parametrize("password", ["hunter2/xyz", "hunter2#xyz", "hunter2?xyz", "hunter2@xyz"])
@pytest.mark.parametrize("query", ["", "?options=a@b"])
def test_an_unescaped_password(monkeypatch: pytest.MonkeyPatch, password: str, query: str) -> None:
    address = f"http://mara:{password}@host/base{query}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for text in (
        address,
        f"wrong: {password}",
        f"no port: {password.split(password[7])[0]!r}, repr {address!r}",
    ):
        assert "hunter2" not in redacted(text)
    assert "hunter2" not in public_address(address) and "xyz" not in public_address(address)


def test_a_message_without_secrets_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redacted("nothing is secret at mlflow.example") == "nothing is secret at mlflow.example"
    for name in ("MLFLOW_TRACKING_URI", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name)
    assert redacted("hf_abcdefgh") == "hf_abcdefgh"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:abc@host")  # too short to be told from other text
    assert redacted("abc") == "abc" and public_address("http://u:abc@host") == "http://host"


@pytest.mark.parametrize(
    "address",
    ["http://mlflow@host", "postgresql://sft@db/x?sslmode=require&ssl=true", "http://host/?project=tickets"],
)
def test_words_that_are_no_secrets_stay_readable(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    text = "mlflow requires ssl: true is not require, tickets of sft"
    assert redacted(text) == text


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "SOME_DB_PASSWORD"]
)
def test_a_variable_that_is_named_like_a_secret_is_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "ab/cd+0123")
    for spelled in ("ab/cd+0123", "ab%2Fcd%2B0123", "ab/cd%2B0123"):
        assert redacted(f"given {spelled}.") == f"given {HIDDEN}."
    monkeypatch.setenv(name, "true")  # a word that messages may need
    assert redacted("it is true") == "it is true"


def test_an_address_in_a_text_loses_its_user_and_password_wherever_it_is_from() -> None:
    assert redacted("at https://x:yz@host/a, not https://host/a@b") == (
        f"at https://{HIDDEN}@host/a, not https://host/a@b"
    )
    assert redacted("ssh://git@host/x") == "ssh://git@host/x"


def test_a_secret_in_a_cause_is_a_secret_of_the_error() -> None:
    def error(said: str) -> Exception:
        found = ValueError("clean")
        found.__cause__ = ConnectionError(said)
        return found

    assert holds_secret(error(f"no answer from {ADDRESS}")) and not holds_secret(error("no answer"))


def test_a_token_in_the_place_of_a_user_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://abcdef0123456789@host")
    assert redacted("401 for abcdef0123456789") == f"401 for {HIDDEN}"
