"""A server on loopback that speaks S3: moto's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def serving_s3() -> Iterator[Any]:
    """s3fs at such a server, which the environment names; in it is ``bucket``."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    import fsspec

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = {
        "AWS_ACCESS_KEY_ID": "hunter",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, text in said.items():
            patch.setenv(name, text)
        argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(
            argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ.copy()
        )
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            fs = fsspec.filesystem("s3")
            fs.mkdir("bucket")
            fs.server = server
            yield fs
        finally:
            server.terminate()
            server.wait(20)
            fsspec.get_filesystem_class("s3").clear_instance_cache()
