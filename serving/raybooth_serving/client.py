"""A small client of the endpoint in the standard library; `openai`'s own client works as well."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raybooth.errors import ServingError

ROUTE = "/v1/images/generations"


class Client:
    """Calls the endpoint at `url`, for example http://127.0.0.1:8000, with an API key if given."""

    def __init__(self, url: str, timeout_s: float = 600.0, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def generate(self, model: str, prompt: str, **parameters: Any) -> list[bytes]:
        """PNG images of `prompt`; parameters are those of POST /v1/images/generations.

        Raises ServingError with the endpoint's own words.
        """
        body = {"model": model, "prompt": prompt, **parameters, "response_format": "b64_json"}
        answer = self._call(ROUTE, {**body, "stream": False})
        return [base64.b64decode(image["b64_json"]) for image in answer["data"]]

    def stream(self, model: str, prompt: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """The events of `prompt` as they come: previews (`partial_images`), then each image.

        Each is OpenAI's, its picture in `b64_json`. Raises ServingError with the endpoint's own
        words, also in the middle; leaving the iterator ends the work.
        """
        body = {"model": model, "prompt": prompt, **parameters, "stream": True}
        with self._opened(ROUTE, body) as response:
            for line in response:
                name, _, data = line.decode().strip().partition(": ")
                if name != "data" or data == "[DONE]":
                    continue
                event: dict[str, Any] = json.loads(data)
                if "error" in event:
                    raise ServingError(f"{ROUTE} failed", event["error"]["message"])
                yield event

    def models(self) -> list[str]:
        """Names that can be asked for."""
        return [card["id"] for card in self._call("/v1/models")["data"]]

    def metrics(self) -> dict[str, float]:
        """Counters of one engine replica."""
        counted: dict[str, float] = self._call("/metrics.json")
        return counted

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        with self._opened(path, body) as response:
            return json.load(response)

    @contextmanager
    def _opened(self, path: str, body: dict[str, Any] | None) -> Iterator[Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                yield response
        except urllib.error.HTTPError as error:
            found = _message(error.read()) or error.reason
            raise ServingError(f"{path} answered {error.code}", found) from error
        except OSError as error:
            do = "is `raybooth serve` running?"
            raise ServingError(f"{self.url} does not answer", str(error), do) from error


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")
