"""Requests to a HashiCorp Vault or OpenBao server: the only place that imports hvac.

A connection logs in (token, AppRole or client certificate), renews its token at half of its life, repeats what failed
for want of an answer, and tells failures apart by what the caller should do: Unavailable after a few tries, NotFound,
Untrusted for a refused access or refused input. Messages name the path and the status; they never quote an answer or a
request, which may hold secrets. Redirects are not followed: the token would go along.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import hvac
import hvac.exceptions

from model_delta.errors import Malformed, NotFound, Unavailable, Untrusted

CONNECT_S = 3.0
TIMEOUT_S = 10.0
"""For the next bytes of an answer; 2,000 rewrapped keys take a busy server less than a second."""

TRIES = 4
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

Answer = dict[str, Any]


class AccessDenied(Untrusted):
    """The server knows this login and refuses it what it asked for."""


class Login(Protocol):
    """How a connection gets its token."""

    def request(self) -> tuple[str, Mapping[str, str]] | None:
        """The path to log in at and what to send; None when there is nothing to ask for: the token is at hand."""

    def token(self) -> str:
        """The token at hand, or an empty text."""

    def certificate(self) -> tuple[str, str] | None:
        """Files of the client certificate and its key, PEM, or None."""


@dataclass(frozen=True)
class TokenLogin:
    """A token that somebody else keeps alive: an operator's own."""

    secret: str = field(repr=False)

    def request(self) -> None:
        """Nothing to ask for."""

    def token(self) -> str:
        """The token."""
        return self.secret

    def certificate(self) -> None:
        """None."""


@dataclass(frozen=True)
class AppRoleLogin:
    """A role's id and its secret id, at the auth method mounted at `mount`."""

    mount: str
    role_id: str
    secret_id: str = field(repr=False)

    def request(self) -> tuple[str, Mapping[str, str]]:
        """AppRole's login."""
        return f"auth/{self.mount}/login", {"role_id": self.role_id, "secret_id": self.secret_id}

    def token(self) -> str:
        """None at hand."""
        return ""

    def certificate(self) -> None:
        """None."""


@dataclass(frozen=True)
class CertificateLogin:
    """A TLS client certificate, at the auth method mounted at `mount`, as the role `role`."""

    mount: str
    role: str
    certificate_path: Path
    key_path: Path

    def request(self) -> tuple[str, Mapping[str, str]]:
        """The certificate method's login; the certificate itself is shown by TLS."""
        return f"auth/{self.mount}/login", {"name": self.role}

    def token(self) -> str:
        """None at hand."""
        return ""

    def certificate(self) -> tuple[str, str]:
        """The two files."""
        return str(self.certificate_path), str(self.key_path)


class VaultConnection:
    """One logged-in connection. May be used from several threads. `clock` gives seconds, `pause` waits that many."""

    def __init__(
        self,
        url: str,
        login: Login,
        *,
        ca_path: Path | None = None,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is sent yet. Raises Malformed for an address without TLS that is not this machine's own."""
        parts = urlsplit(url)
        if parts.scheme not in ("https", "http") or not parts.hostname or parts.username or parts.password:
            raise Malformed(f"Vault address: expected https://HOST:PORT, found {url[:80]!r}")
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise Malformed(f"Vault address {url}: expected https, since keys travel there; http only to 127.0.0.1")
        self.url = url.rstrip("/")
        self._login = login
        self._clock = clock
        self._pause = pause
        self._lock = threading.Lock()
        self._renew_at = 0.0
        self._logged_in = bool(login.token())
        self._client = hvac.Client(
            url=self.url,
            token=login.token(),  # an empty text keeps hvac from reading the environment and the home folder
            cert=login.certificate(),
            verify=str(ca_path) if ca_path is not None else True,
            timeout=(CONNECT_S, timeout_s),
            allow_redirects=False,
        )

    def read(self, path: str) -> Answer:
        """What is at `path`. Raises NotFound, Untrusted, Unavailable."""
        return self._ask("get", path, None)

    def write(self, path: str, data: Mapping[str, Any] | None = None) -> Answer:
        """Post `data` to `path`; the answer's data, empty when there are none. Raises NotFound, Untrusted (refused
        access or refused input), Unavailable."""
        return self._ask("post", path, dict(data or {}))

    def delete(self, path: str) -> None:
        """Delete what is at `path`. Raises Untrusted, Unavailable."""
        self._ask("delete", path, None)

    def _ask(self, method: str, path: str, data: dict[str, Any] | None) -> Answer:
        def send() -> Any:
            arguments = {} if data is None else {"json": data}
            return self._client.adapter.request(method, f"/v1/{path}", **arguments)

        answer = self._try(path, send)
        if not isinstance(answer, dict):
            return {}
        found = answer.get("data")
        return found if isinstance(found, dict) else answer

    def _try(self, path: str, send: Callable[[], Any]) -> Any:
        fresh_login = self._ensure_token()
        for attempt in range(TRIES):
            try:
                return send()
            except (hvac.exceptions.Forbidden, hvac.exceptions.Unauthorized):
                # The token may have been revoked before its time; a new one tells a dead token from a closed door.
                if fresh_login or self._login.request() is None:
                    raise AccessDenied(
                        f"Vault {self.url}: {path}: access denied to this login; see its policy"
                    ) from None
                self._log_in()
                fresh_login = True
            except hvac.exceptions.InvalidPath:
                raise NotFound(f"Vault {self.url}: {path}: nothing there; run `atoll vault setup`") from None
            except (
                hvac.exceptions.InvalidRequest,
                hvac.exceptions.ParamValidationError,
                hvac.exceptions.UnsupportedOperation,
            ) as error:
                raise Untrusted(f"Vault {self.url}: {path}: request refused ({type(error).__name__})") from None
            except (hvac.exceptions.VaultError, OSError) as error:  # the HTTP library's errors are OSErrors
                if attempt == TRIES - 1:
                    raise self._unavailable(path, error) from None
                self._pause(0.1 * 2**attempt)
        raise Unavailable(f"Vault {self.url}: {path}: no answer in {TRIES} tries")

    def _unavailable(self, path: str, error: Exception) -> Unavailable:
        return Unavailable(f"Vault {self.url}: {path}: no answer in {TRIES} tries ({type(error).__name__})")

    def _ensure_token(self) -> bool:
        """Have a token that is not past half of its life; whether it was asked for just now."""
        with self._lock:
            if self._login.request() is None or (self._logged_in and self._clock() < self._renew_at):
                return False
            if self._logged_in and self._renewed():
                return False
        self._log_in()
        return True

    def _renewed(self) -> bool:
        try:
            self._accept(self._client.adapter.post("/v1/auth/token/renew-self", json={}))
        except (hvac.exceptions.VaultError, OSError):
            return False
        return True

    def _log_in(self) -> None:
        asked = self._login.request()
        if asked is None:
            return
        path, data = asked
        with self._lock:
            for attempt in range(TRIES):
                self._client.token = ""
                try:
                    self._accept(self._client.adapter.post(f"/v1/{path}", json=dict(data)))
                except (
                    hvac.exceptions.Forbidden,
                    hvac.exceptions.Unauthorized,
                    hvac.exceptions.InvalidRequest,
                    hvac.exceptions.InvalidPath,
                ):
                    raise Untrusted(f"Vault {self.url}: {path}: login refused; check the role and its secret") from None
                except (hvac.exceptions.VaultError, OSError) as error:
                    if attempt == TRIES - 1:
                        raise self._unavailable(path, error) from None
                    self._pause(0.1 * 2**attempt)
                else:
                    return

    def _accept(self, answer: Any) -> None:
        auth = answer.get("auth") if isinstance(answer, dict) else None
        if not isinstance(auth, dict) or not isinstance(auth.get("client_token"), str):
            raise Unavailable(f"Vault {self.url}: login: expected a token in the answer, found none")
        self._client.token = auth["client_token"]
        self._logged_in = True
        self._renew_at = self._clock() + float(auth.get("lease_duration") or "inf") / 2  # 0: never ends
