"""Text that is safe to show, log and record: no secrets, and no characters that control a terminal.

Never `redact` serialized text, such as JSON or YAML, whose quotes and commas could also be parts of a password.
"""

import json
import logging
import re
import sys
import traceback
from html import escape
from types import TracebackType
from typing import Any
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
_SHORTEST_KNOWN = 6  # a shorter secret would match parts of ordinary words
_DEEPEST = 5  # nested URLs in a path or query
_known: set[str] = set()

_URL = re.compile(r"""\b(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,40})://(?P<rest>[^\s"'<>`]+)""")
_DATABASES = ("postgres", "mysql", "mariadb", "mssql", "oracle", "mongodb", "redis", "amqp")
_CLOSING = ")]},.;:!?"  # punctuation after a URL in a sentence
_WORDS = (
    r"(?:[\w.-]{0,40}(?:password|passwd|passphrase|secret|token|signature|credentials?)"
    r"|(?:[\w-]{0,40}[._-])?(?:ssl|db|user|auth|access|bearer)?(?:pwd|sig|(?:api|access|account|secret|private)[_-]?key))"
    r"(?:[_-]?(?:id|key))?"
)
_SECRET_PAIR = re.compile(
    rf"""(?P<name>\b{_WORDS})(?:
        =(?!(?:env|file):|b?["'])[^\s&"',;)\]]+
        |(?P<sign>["']?\s*[:=]\s*)b?(?:"(?!(?:env|file):)[^"]+"|'(?!(?:env|file):)[^']+'))""",  # as in a repr
    re.IGNORECASE | re.VERBOSE,
)
_SECRET_NAME = re.compile(
    rf"{_WORDS}|(?:.*[._-])?(?:ssl|db|user|auth|access|bearer)?(?:key|auth|authorization|pass|pw|jwt|code)",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(
    r"""(?P<name>\b(?:(?:proxy-)?authorization|x-[\w-]{0,40}(?:token|key)|(?:set-)?cookie)["']?\s*[:=]\s*)
        (?:b?"[^"]*"|b?'[^']*'|(?:(?:basic|bearer|digest|token|negotiate|aws4-hmac-sha256)\s+)?[^\s"',]+)""",
    re.IGNORECASE | re.VERBOSE,
)
_BEARER = re.compile(r"(?P<name>\bbearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)

# Characters that are escaped: C0 and C1 controls except newline and tab, DEL, line separators, bidirectional overrides
# and isolates, and lone surrogates, which no UTF-8 stream accepts.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def redact(text: str) -> str:
    """Return `text` without secrets: user and password of URLs, and values named as a token or password."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _redact_urls(text)
    text = _AUTHORIZATION.sub(rf"\g<name>{HIDDEN}", text)
    text = _BEARER.sub(rf"\g<name>{HIDDEN}", text)
    return _SECRET_PAIR.sub(lambda match: f"{match['name']}{match['sign'] or '='}{HIDDEN}", text)


def redact_values(values: Any) -> Any:
    """Return nested mappings and lists with every string redacted."""
    if isinstance(values, dict):
        return {key: redact_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [redact_values(value) for value in values]
    return redact(values) if isinstance(values, str) else values


def remember(secret: str) -> None:
    """Register a secret, or the password in a URL, that `redact` removes wherever it appears in this process."""
    if "://" in secret:
        secret = password_of(secret) or ""
    urls = (quote(secret, safe=""), quote(secret), unquote(secret), quote_plus(secret))
    texts = (json.dumps(secret)[1:-1], repr(secret)[1:-1], repr(secret.encode(errors="replace"))[2:-1], escape(secret))
    for form in (secret, *urls, *texts):  # the forms in which a message may quote it
        if len(form) >= _SHORTEST_KNOWN:
            _known.add(form)


def password_of(url: str) -> str | None:
    """Return the password in a URL as it is written, or None."""
    if (match := _URL.match(url)) is None:
        return None
    end = _end_of_user(match["scheme"], match["rest"])
    return match["rest"][: max(end - 1, 0)].partition(":")[2] or None


def describe_error(error: BaseException) -> str:
    """Return the type and redacted message of an error: libraries quote the URLs they were given."""
    message = redact(str(error))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def printable(text: str) -> str:
    r"""Return `text` with every character that could control a terminal escaped as in JSON, such as `\u001b`."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


class _PrintableRecord(logging.LogRecord):
    """A log record whose message and traceback are printable and redacted for every handler."""

    def getMessage(self) -> str:  # formatters call it before they use the traceback
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = printable(redact("".join(traceback.format_exception(*self.exc_info)).rstrip("\n")))
        return printable(redact(super().getMessage()))


def show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception that ends the process, printable and redacted; a replacement of `sys.excepthook`."""
    sys.stderr.write(printable(redact("".join(traceback.format_exception(kind, error, trace)))))


def configure_logging() -> None:
    """Send warnings and fatal exceptions to standard error, printable and redacted. Call it once per process."""
    sys.excepthook = show_exception
    logging.setLogRecordFactory(_PrintableRecord)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


def _redact_urls(text: str, depth: int = 0) -> str:
    """Return `text` without users, passwords and secret query parameters of its URLs, and of URLs nested in them."""
    if depth > _DEEPEST:
        return HIDDEN if "://" in text else text
    pieces, end = [], 0
    for match in _URL.finditer(text):
        whole = match["rest"].rstrip(_CLOSING)
        closing = match["rest"][len(whole) :]
        url = _redact_urls(whole[_end_of_user(match["scheme"], whole) :], depth + 1)
        base, *parts = re.findall(r"^[^?#]*|[?#][^?#]*", url)
        for part in parts:
            pairs = []
            for pair in re.split(r"[&;]", part[1:]):
                name, equals, _ = pair.partition("=")
                if not equals or _SECRET_NAME.fullmatch(unquote(name)) is None:
                    pairs.append(pair)
            base += part[0] + "&".join(pairs) if pairs else ""
        pieces += [text[end : match.start()], f"{match['scheme']}://{base}{closing}"]
        end = match.end()
    return "".join([*pieces, text[end:]])


def _end_of_user(scheme: str, rest: str) -> int:
    """Return the end of `user:password@` in the part of a URL after its scheme, or 0; if in doubt, more is removed.

    A password may contain '/', '?', '#' and '@' that should have been percent-encoded, as SQLAlchemy accepts them.
    """
    authority = re.match(r"[^/?#\\]*", rest).group()  # type: ignore[union-attr]
    if "@" in authority:
        return rest.rfind("@") + 1
    if "@" not in rest or authority.startswith("[") or ":" not in authority:
        return 0
    is_host = re.fullmatch(r"[^:]*:[0-9]+", authority) is not None
    is_web = not scheme.lower().startswith(_DATABASES)  # paths of the web may contain '@'
    return 0 if is_web and is_host else rest.rfind("@") + 1
