"""`raybooth serve`: every published subject behind one OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
import signal
import socket
import time
from pathlib import Path
from typing import Any

from raybooth.config import ServeConfig, ServedBase
from raybooth.errors import InputError


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("serve", help="serve every published subject over HTTP")
    parser.add_argument("--config", metavar="FILE", help="a file of configs/serve (name or path)")
    parser.add_argument("--host", help="address to listen at (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen at (default 8000; 0: any free)")
    parser.add_argument("--base", help="`pocket`, a folder in diffusers' layout, or a Hub id")
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from raybooth.config import find_config, load_config, parse_config
    from raybooth.home import home
    from raybooth_serving.access.auth import open_keyring

    given = {"host": arguments.host, "port": arguments.port}
    overrides = {key: value for key, value in given.items() if value is not None}
    if arguments.config is None:
        config = parse_config(ServeConfig, overrides, "the command line")
    else:
        config = load_config(ServeConfig, find_config("serve", arguments.config), overrides)
    if arguments.base is not None:
        config = _with_base(config, arguments.base)
    root = home()

    port = free_port(config.host, config.port)
    open_keyring(config.auth, config.host, root)  # refuse here what the gateway would refuse
    folders = [_base_folder(served.base, served.revision) for served in config.bases]
    bases = tuple(map(_absolute, config.bases, folders))
    config = config.model_copy(update={"port": port, "bases": bases})

    from raybooth.model.fingerprint import fingerprint_base
    from raybooth.store import Store
    from raybooth_serving.app import check_running, deployed
    from raybooth_serving.names.catalog import Catalog, KnownBase

    names = [served.base for served in bases]
    known = tuple(map(KnownBase, names, map(fingerprint_base, folders)))
    store, serves_full = Store(root / "models"), config.full is not None
    catalog = Catalog(store, known, serves_full=serves_full)
    print(f"starting Ray Serve with {', '.join(names)} ...", flush=True)
    with deployed(config, root) as url:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set its own
        count = catalog.count_subjects()
        noun = "subject" if count == 1 else "subjects"
        print(f"RayBooth serves {count} {noun} at {url}", flush=True)
        while True:
            time.sleep(5)
            check_running()


def _with_base(config: ServeConfig, base: str) -> ServeConfig:
    """`config` with another base in the place of its only one."""
    if len(config.bases) > 1:
        found, do = ", ".join(served.base for served in config.bases), "leave one of the two out"
        raise InputError("--base names one base, the config several", found, do)
    served = config.bases[0].model_copy(update={"base": base, "revision": None})
    return config.model_copy(update={"bases": (served,)})


def _absolute(served: ServedBase, folder: Path) -> ServedBase:
    """A base by its whole path, where it is one: replicas run in folders of their own."""
    is_path = served.base != "pocket" and Path(served.base).expanduser().is_dir()
    return served.model_copy(update={"base": str(folder)}) if is_path else served


def _base_folder(base: str, revision: str | None) -> Path:
    """The folder of a base; torch and diffusers are only imported to ask the Hub."""
    if base == "pocket":
        from raybooth import pocket

        return pocket.path()
    folder = Path(base).expanduser().resolve()
    if folder.is_dir() and revision is None:
        return folder
    from raybooth.model.source import resolve_base

    return resolve_base(base, revision)


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0; raises InputError when it cannot be listened at."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            found = error.strerror or str(error)
            do = "choose another with --port, or stop what listens there"
            raise InputError(f"cannot listen at {host}:{port}", found, do) from error
        free: int = probe.getsockname()[1]
        return free
