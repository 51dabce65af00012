"""Secrets and control characters are removed from shown, logged and recorded text, which is otherwise unchanged."""

import copy
import html
import json
import random
import re
import subprocess
import sys
from urllib.parse import quote, quote_plus

from pipeline.config import redaction
from pipeline.config.errors import MomeError
from pipeline.config.redaction import describe_error, password_of, printable, redact
from tests.support.fuzz import fuzz_rounds

PASSWORDS = [
    "hunter2", "a/b+c", "a/b+c@d", "p@ss", "p@ss/w@rd", "x#y", "x?y", "?x", "#x", "/x", "a:b", "a:b/c", "1/2", "//x",
    "a/?#@b", "%2Fenc%40", "ends@", "wörd", "a\\b", "a&b=c", "[x]", "a;b",
]  # fmt: skip


def test_passwords_are_removed_completely():
    for password in PASSWORDS:
        for scheme in ("postgresql", "postgresql+psycopg2", "mysql+pymysql", "mssql+pyodbc"):
            url = f"{scheme}://mlflow:{password}@db.example:5432/store"
            assert redact(url) == f"{scheme}://db.example:5432/store"
            assert redact(f"failed ({url}): no route") == f"failed ({scheme}://db.example:5432/store): no route"
            assert password_of(url) == password
        if password != "1/2":
            assert redact(f"http://alice:{password}@server:5000/base") == "http://server:5000/base"
    rng = random.Random(1)
    letters = "abcXYZ019-._~!$&*+=%:/?#@[]()|^"
    for _ in range(fuzz_rounds(3000)):
        password = "Q" + "".join(rng.choice(letters) for _ in range(rng.randint(1, 20))) + "Q"
        for scheme in ("http", "https", "postgresql"):
            assert redact(f"{scheme}://u:{password}@host:1/x") == f"{scheme}://host:1/x", password


URLS = {
    "https://server/api?token=abc": "https://server/api", "https://store/x?sig=abc&sv=2020": "https://store/x?sv=2020",
    "https://s3/x?X-Amz-Credential=AK%2F1&X-Amz-Date=1&X-Amz-Signature=ff": "https://s3/x?X-Amz-Date=1",
    "https://s/x?page=2&access_token=abc#top": "https://s/x?page=2#top", "https://s/#access_token=abc": "https://s/",
    "postgresql://db/x?password=abc&sslmode=require": "postgresql://db/x?sslmode=require",
    "postgresql://db/x?sslpassword=abc": "postgresql://db/x", "https://s/x?api_key=abc": "https://s/x",
    "https://s/x?api%5Fkey=abc": "https://s/x", "https://user@server/x": "https://server/x",
    "https://u:p@[::1]:5000/x": "https://[::1]:5000/x",
}  # fmt: skip
PLAIN = [
    "http://mlflow:5000", "http://mlflow:5000/#/experiments/1", "http://[::1]:5000/team@vision",
    "http://mlflow:5000/team@vision", "s3://bucket/team@vision/run?version=3", "sqlite:////home/me@work/mlflow.db",
    "postgresql://db:5432/mlflow", "write to alice@example.com, see https://example.com/a.html.",
    "the tokenizer has 30522 tokens; token 5 is [MASK]", "storage.secret=env:AWS_SECRET_ACCESS_KEY",
    "storage.key=file:/run/secrets/key", "key=000123 is bad",
    "secret 'env:TOKEN': the environment variable TOKEN is not set",
    "{'key': 'env:MY_KEY', 'secret': 'env:MY_SECRET', 'max_tokens': '5', 'monkey': 'x'}",
    "sigma=0.5, design=new, config=x, tokens=40, key='000123', cookies, authorization was refused",
    "databricks://profile", "optimizer.lr=0.1", "",
]  # fmt: skip
WITH_SECRETS = [
    "API request to http://alice:S3CRET@h/api failed: HTTPConnectionPool(host='h'): /api?token=S3CRET",
    "connection to server failed: user=x password=S3CRET host=db", "header Authorization: Basic S3CRET= refused",
    "{'Authorization': 'Bearer S3CRETS3CRET'}", "http://a:S3CRET@h1,http://b:S3CRET@h2",
    "see https://proxy/?url=http://u:S3CRET@h/x", "MLFLOW_TRACKING_PASSWORD=S3CRET", "AWS_SECRET_ACCESS_KEY=S3CRET",
    "{'Authorization': b'Basic S3CRET='}", '{"authorization": "Negotiate S3CRET"}', "Authorization: Token S3CRET",
    "headers: X-Api-Key: S3CRET", "x-amz-security-token: S3CRET", "Set-Cookie: session=S3CRET; Path=/",
    "connect(host='db', password='S3CRET')", "{'user': 'a', 'password': 'S3CRET with blanks'}",
    '{"secret_key": "S3CRET"}', "aws_secret_access_key='S3CRET'",
    "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=S3CRET==;EndpointSuffix=core",
    "https://host/?sessionToken=S3CRET&clientSecret=S3CRET", "sessionToken=S3CRET",
]  # fmt: skip


def test_messages_contain_no_secret_and_other_text_is_unchanged():
    assert {url: redact(url) for url in URLS} == URLS
    assert [redact(text) for text in PLAIN] == PLAIN
    for text in WITH_SECRETS:
        assert "S3CRET" not in redact(text) + describe_error(RuntimeError(text))
    for piece in ("http://", "http://u:S3CRET@", "a-", "a.", "x@", "token", "authorization ", "?a=b&", "'", "x-"):
        assert "S3CRET" not in redact(piece * 3000), piece
    for kind in (MomeError, *MomeError.__subclasses__()):
        error = kind("http://me:S3CRET@server refused: token=S3CRET")
        assert [str(error), str(copy.copy(error))] == ["http://server refused: token=***"] * 2


def test_known_secret_is_removed_however_it_is_quoted(monkeypatch):
    quotings = [str, repr, json.dumps, html.escape, quote, quote_plus, lambda text: repr(text.encode())]
    for letter in ("\"'<>&%+", "\\/#@:", " ", "ö日"):
        monkeypatch.setattr(redaction, "_known", set())
        secret = f"Zq{letter}hidden{letter}7"
        redaction.remember(secret)
        assert not [quoted for quoted in quotings if "hidden" in redact(f"login failed for {quoted(secret)} at db")]
        assert redact(f"login failed for '{secret}' ({quote(secret)})") == "login failed for '***' (***)"


def test_control_characters_are_escaped():
    # Clear the screen, write the clipboard, C1 introducer, bidirectional override and isolate, lone surrogate, …
    for text in (
        "\x1b[2J", "\x1b]52;c;ZXZpbA==\x07", "\x9b2J", "abc\u202egpj.exe", "\u2066x\u2069", "all is well\rerror",
        "no\b\bok", "a\x7f", "cat \ud83d", "a\u2028b",
    ):  # fmt: skip
        shown = printable(text)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown)
        assert b"\\" in shown.encode("utf-8")
    for plain in ("plain", "a\tb\nc", "größe 猫 🐈", "عربى \u200f", "[bold]\\[/bold]"):
        assert printable(plain) == plain


def test_messages_and_tracebacks_of_any_handler_are_printable_and_hold_no_secret():
    program = (
        "import logging\nfrom pipeline.config.redaction import configure_logging\nconfigure_logging()\n"
        "logging.getLogger('x').warning('key %s at %s', '\\x1b[2J', 'http://me:hunter2@server/')\n"
        "try:\n    raise ValueError('\\x1b]52;c;\\x07 postgresql://me:a/hunter2@db/x')\n"
        "except ValueError:\n    logging.getLogger('x').exception('failed')\n"
        "raise RuntimeError('https://me:hunter2@other')\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    shown = (rb"key \u001b[2J at http://server/", rb"ValueError: \u001b]52;c;\u0007", b"RuntimeError: https://other")
    assert finished.returncode == 1
    assert [text in finished.stderr for text in (*shown, b"\x1b", b"hunter2")] == [True, True, True, False, False]
