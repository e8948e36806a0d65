"""A service behind real sockets, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from raybooth_serving.commands.serve import free_port
from raybooth_serving.service import Service


@contextmanager
def listening(app: FastAPI, service: Service) -> Iterator[str]:
    """The URL of `app`; its service is closed at the end."""
    port = free_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", ws="none"))

    async def run() -> None:
        await server.serve()
        await service.engine.close()

    thread = threading.Thread(target=asyncio.run, args=[run()])
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
