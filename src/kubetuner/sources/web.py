"""Reading files over HTTP: whole or in part, and again when it failed for a passing reason.

Proxies of the environment (``HTTPS_PROXY``, ``NO_PROXY``) are used. Messages never show an address's query, which may
hold a signature.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from kubetuner import __version__
from kubetuner.errors import DatasetError
from kubetuner.sources.base import PassingError, retrying

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

MAX_BYTES = 512 << 20
"""A longer answer is refused: it would be held in memory."""
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 60.0
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_BLOCK = 1 << 20


class RefusedError(DatasetError):
    """The server's answer is final: ``status`` is the HTTP status, 0 where there was no sensible answer."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


class Web:
    """A pool of connections.

    Args:
        readers: Connections kept open.
        token: Sent as a bearer token; left out when a redirect leads to another host.
    """

    def __init__(self, readers: int, token: str = "") -> None:
        import requests
        from requests.adapters import HTTPAdapter

        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_connections=readers, pool_maxsize=readers))
        self._session.headers.update({"User-Agent": f"kubetuner/{__version__}", "Accept-Encoding": "identity"})
        self._auth = _bearer(token) if token else None

    def get(
        self, what: str, url: str, *, start: int = 0, stop: int | None = None, check: Callable[[bytes], bytes] = bytes
    ) -> bytes:
        """The bytes ``start`` to ``stop`` of ``url``, fewer where it is shorter.

        Args:
            what: What is being done, for messages.
            url: ``http://`` or ``https://``.
            start: First byte.
            stop: Byte after the last; the end by default.
            check: Raises PassingError for bytes that arrived damaged.

        Raises:
            RefusedError: The answer is final, such as 404.
            DatasetError: It failed for passing reasons, and again each time.
        """
        return retrying(what, lambda: check(self._once(url, start, stop)))

    def close(self) -> None:
        """Close all connections."""
        self._session.close()

    def _once(self, url: str, start: int, stop: int | None) -> bytes:
        from requests.exceptions import ChunkedEncodingError as Cut
        from requests.exceptions import ConnectionError as Unconnected
        from requests.exceptions import ContentDecodingError, RequestException, Timeout

        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
        timeout = (_CONNECT_SECONDS, _READ_SECONDS)
        try:
            with self._session.get(url, headers=headers, auth=self._auth, stream=True, timeout=timeout) as answer:
                return _body(answer, start, stop)
        except (Unconnected, Cut, Timeout, ContentDecodingError) as error:
            raise PassingError(f"{type(error).__name__}") from error
        except RequestException as error:
            raise RefusedError(f"the address cannot be used ({type(error).__name__})") from error


def _bearer(token: str) -> Callable[["PreparedRequest"], "PreparedRequest"]:
    def add(request: "PreparedRequest") -> "PreparedRequest":
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return add


def _body(answer: "Response", start: int, stop: int | None) -> bytes:
    status = answer.status_code
    if status in _PASSING:
        asked = answer.headers.get("Retry-After", "")
        raise PassingError(f"status {status}", float(asked) if asked.isdigit() else 0.0)
    if status not in (200, 206):
        raise RefusedError(f"status {status}", status)
    skipped = start if status == 200 else 0  # the server does not know ranges and sends everything
    wanted = MAX_BYTES + 1 if stop is None else stop - start
    parts, have = [], 0
    for block in answer.iter_content(_BLOCK):
        parts.append(block)
        have += len(block)
        if have >= skipped + wanted:
            break
    data = b"".join(parts)[skipped : skipped + wanted]
    if len(data) > MAX_BYTES:
        raise RefusedError(f"more than {MAX_BYTES >> 20} MiB")
    return data
