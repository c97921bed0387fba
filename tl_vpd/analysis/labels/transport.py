"""One question over HTTP with its retries, from any thread.

What comes back is data: its size and the time it takes are limited, and what is quoted of it is one short line without the key.
"""

from __future__ import annotations

import http.client
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from tl_vpd.analysis.labels.asking import Question
from tl_vpd.analysis.labels.limits import Budget, FailedError, Pace, StoppedError
from tl_vpd.files.json_files import json_text, parse_json

if TYPE_CHECKING:
    from tl_vpd.analysis.labels.endpoint import Endpoint

LIMIT = 4 << 20
"""Bytes of an answer."""


@dataclass
class _Again(Exception):
    """Another try may succeed.

    Attributes:
        reason: why this one did not.
        pause: seconds that the server asks for (None: it says nothing).
    """

    reason: str
    pause: float | None = None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


class Transport:
    """Asks one endpoint.

    Args:
        key: goes into the header of each request alone (None: there is none).
        endpoint: timeouts, retries and pace.
        budget: what may be spent.
        pace: of all requests.
    """

    def __init__(self, key: str | None, endpoint: Endpoint, budget: Budget, pace: Pace) -> None:
        self._key, self.endpoint, self._budget, self._pace = key, endpoint, budget, pace
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._answered = False

    def stop(self) -> None:
        """Ends all pauses, and all questions that have not been sent."""
        self._pace.stop()

    def ask(self, question: Question) -> str:
        """The text of an answer that the question can parse.

        Raises:
            FailedError: it has none after all retries.
            StoppedError: no question can be asked.
        """
        body, pause = json_text(self.endpoint.request(question)).encode(), self.endpoint.first_pause
        for attempt in range(self.endpoint.retries + 1):
            self._pace.wait()
            try:
                return self._once(question, body)
            except _Again as again:
                longer = pause if again.pause is None else again.pause
                if attempt == self.endpoint.retries or longer > self.endpoint.longest_pause:
                    wished = "" if again.pause is None else f", and asks for a pause of {again.pause:g} seconds"
                    raise FailedError(f"{again.reason}{wished}") from again
                self._pace.hold(longer) if again.pause is not None else self._pace.sleep(longer)
                pause *= 2
        raise AssertionError("the loop returns or raises")

    def _once(self, question: Question, body: bytes) -> str:
        reserved = self._budget.reserve(question)
        sent = answered = 0
        try:
            content = self._sent(body)
            sent, answered = _usage(content, question)
        finally:
            self._budget.settle(reserved, sent, answered)
        try:
            text = self._text(content)
            question.parse(text)
        except ValueError as error:
            raise _Again(self._quoted(str(error))) from error
        return text

    def _text(self, content: Any) -> str:
        """The text in a reply."""
        try:
            text = content["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            message = content.get("error") if isinstance(content, dict) else None
            raise _Again(f"the endpoint's answer has no text ({self._quoted(message or 'no choices')})") from error
        if not isinstance(text, str):
            raise _Again("the endpoint's answer has no text (a refusal, or a call of a tool)")
        self._answered = True
        return text

    def _sent(self, body: bytes) -> Any:
        """The body of the reply to one request, as JSON."""
        url, timeout = f"{self.endpoint.base_url}/chat/completions", self.endpoint.timeout
        headers = {"Content-Type": "application/json", "User-Agent": "tl_vpd"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            request = urllib.request.Request(url, data=body, headers=headers, method="POST")
            with self._opener.open(request, timeout=timeout) as response:
                return parse_json(_body(response, time.monotonic() + timeout), "The endpoint's answer")
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            unreachable = isinstance(reason, socket.gaierror | ConnectionRefusedError)
            if unreachable and not self._answered:
                raise StoppedError(f"{self.endpoint.base_url} cannot be reached: {self._quoted(reason)}.") from None
            late = isinstance(reason, TimeoutError)
            raise _Again(
                f"no answer within {timeout:g} seconds" if late else f"the connection broke ({self._quoted(reason)})"
            ) from None
        except ValueError as error:
            raise _Again(self._quoted(error).rstrip(".")) from error

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status means."""
        try:
            said = parse_json(_body(error, time.monotonic() + 5), "The answer")
            said = said.get("error", said) if isinstance(said, dict) else said
            said = said.get("message", said) if isinstance(said, dict) else said
        except (OSError, ValueError, http.client.HTTPException):
            said = error.reason
        status, message = error.code, self._quoted(said)
        where = f"{self.endpoint.base_url} answers {status} ({message})"
        if status in (401, 403):
            variable = self.endpoint.key_variable
            return StoppedError(f"{where}: check the key in the environment variable {variable} and its rights.")
        if status in (404, 405) or 300 <= status < 400:
            return StoppedError(f"{where}: check base_url and model={self.endpoint.model!r}.")
        if status in (408, 409, 425, 429) or status >= 500:
            return _Again(f"the endpoint answers {status} ({message})", _seconds(error.headers.get("Retry-After")))
        return FailedError(f"the endpoint answers {status} ({message})")

    def _quoted(self, text: Any) -> str:
        """A text of the server or system for a message: one short line of plain characters, without the key."""
        plain = str(text).replace(self._key, "…") if self._key else str(text)
        line = " ".join("".join(c if c.isprintable() else " " for c in plain[:2000]).split())
        return (line if len(line) <= 200 else f"{line[:197]}...").rstrip(".")


def _usage(content: Any, question: Question) -> tuple[int, int]:
    """How many tokens were sent and answered, by the reply's own count or else by ours."""
    usage = content.get("usage") if isinstance(content, dict) else None
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    sent, answered = (n if isinstance(n, int) and n >= 0 else None for n in counts)
    return question.tokens if sent is None else sent, question.answer_tokens if answered is None else answered


def _body(response: Any, deadline: float) -> bytes:
    """The bytes of an answer; raises TimeoutError or ValueError for one that takes too long or is too large."""
    content = b""
    while chunk := response.read1(1 << 16):
        content += chunk
        if len(content) > LIMIT:
            raise ValueError(f"The endpoint's answer is larger than {LIMIT:,} bytes.")
        if time.monotonic() > deadline:
            raise TimeoutError
    return content


def _seconds(header: str | None) -> float | None:
    """The pause that a Retry-After header asks for: seconds, or a date."""
    if header is None:
        return None
    try:
        return max(0.0, min(float(header), 1e6))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
