"""A real server of files: nginx, with ranges and without."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

import modelctl
from modelctl.errors import ModelctlError, UnreadableError

from . import made

CONF = """
daemon off; master_process off; pid {root}/pid; error_log stderr crit;
events {{ }}
http {{
  access_log off;
  client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
  uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
  server {{
    listen 127.0.0.1:{port}; root {root}/www; keepalive_requests 3;
    location /whole/ {{ alias {root}/www/; max_ranges 0; }}
    location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
    location /secret/ {{ return 403; }}
  }}
}}
"""


@pytest.fixture(scope="module")
def nginx(tmp_path_factory):
    path = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip("nginx is not installed")
    root = tmp_path_factory.mktemp("nginx")
    root.chmod(0o755)
    www = root / "www"
    www.mkdir()
    made.pt(www)
    (www / "made.safetensors").write_bytes(made.safetensors())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (root / "conf").write_text(CONF.format(root=root, port=port))
    server = subprocess.Popen(
        [path, "-c", str(root / "conf"), "-p", str(root)], stderr=subprocess.PIPE
    )
    try:
        until = time.monotonic() + 20
        while time.monotonic() < until and server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.02)
        if server.poll() is not None:
            pytest.fail(f"nginx: {server.stderr.read().decode() if server.stderr else ''}")
        yield f"http://127.0.0.1:{port}", root
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
        if server.stderr:
            server.stderr.close()


@pytest.mark.parametrize("name", ["made.pt", "made.safetensors", "moved/made.pt"])
def test_reading(nginx, name: str) -> None:
    url, _ = nginx
    with modelctl.open(f"{url}/{name}") as ckpt:
        found = ckpt.state_dict()
        assert sum(source.bytes_read for source in ckpt.resources) < 650_000
        wanted = made.state_dict()
        assert found.keys() == wanted.keys()
        assert all(made.torch.equal(found[key].torch(), wanted[key]) for key in list(wanted)[::17])


def test_converting(nginx, tmp_path) -> None:
    url, _ = nginx
    with modelctl.open(f"{url}/made.pt") as ckpt:
        modelctl.save(ckpt, tmp_path / "x.safetensors")
    with modelctl.open(tmp_path / "x.safetensors") as ckpt:
        wanted = made.state_dict()
        found = ckpt.state_dict()
        assert all(made.torch.equal(found[name].torch(), wanted[name]) for name in wanted)


def test_without_ranges(nginx) -> None:
    url, _ = nginx
    with pytest.raises(UnreadableError, match="only whole, 6"):
        modelctl.open(f"{url}/whole/made.pt")


@pytest.mark.parametrize(
    ("name", "says"), [("nothing.pt", "no such file there"), ("secret/x.pt", "may not be read")]
)
def test_nothing_to_read(nginx, name: str, says: str) -> None:
    url, _ = nginx
    with pytest.raises(ModelctlError, match=says):
        modelctl.open(f"{url}/{name}")


def test_it_changes(nginx) -> None:
    url, root = nginx
    path = Path(root, "www", "changing.pt")
    shutil.copy(Path(root, "www", "made.pt"), path)
    with modelctl.open(f"{url}/changing.pt") as ckpt:
        ref = ckpt.state_dict()["layer9.conv0.weight"]
        os.utime(path, (1, 1))
        with pytest.raises(UnreadableError, match="it changed while it was read"):
            ref.tobytes()
