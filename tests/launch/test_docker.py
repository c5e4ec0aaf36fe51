"""docker/try.sh with an engine of its own, and where no image can be pulled, on a base image made here."""

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import ROOT, until
from patience import at_most

PROGRAMS = ("dockerd", "docker", "mmdebstrap")
BASE = "python:3.11-slim-bookworm"
pytestmark = [
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)), reason="needs root, dockerd, docker and mmdebstrap"
    ),
    pytest.mark.timeout(1200),
]


def run(*command: str, **options: object) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def engine() -> Iterator[dict[str, str]]:
    """The environment in which docker finds an engine that nobody else uses."""
    with tempfile.TemporaryDirectory(prefix="zad") as folder:
        places = ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/pid"]
        # No rules in this machine's firewall: the cluster needs no way out, and the build has the host's.
        network = ["--iptables=false", "--ip-forward=false", "--bridge=none"]
        socket = Path(folder) / "socket"
        with (Path(folder) / "log").open("w") as log:
            daemon = subprocess.Popen(["dockerd", *places, *network, "-H", f"unix://{socket}"], stdout=log, stderr=log)
        try:
            until(lambda: socket.exists() or daemon.poll() is not None, 60)
            if daemon.poll() is not None:
                pytest.skip("no engine can be started here: " + (Path(folder) / "log").read_text()[-1000:])
            yield {**os.environ, "DOCKER_HOST": f"unix://{socket}"}
        finally:
            daemon.terminate()
            daemon.wait(timeout=at_most(60))
            for line in Path("/proc/mounts").read_text().splitlines():
                if (mounted := line.split()[1]).startswith(folder):
                    run("umount", mounted)


def make_base(engine: dict[str, str], file: Path) -> None:
    """Debian with its own Python, under the name of the image that cannot be pulled."""
    packages = "python3,python3-venv,python3-pip,ca-certificates"
    changes = [f'ln -s /usr/bin/{name}3 "$1/usr/local/bin/{name}"' for name in ("python", "pip")]
    changes.append('rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED')
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    if bundle.exists():  # of this machine, which may have authorities of its own
        changes.append(f'cp {bundle} "$1/etc/ssl/certs"')
    options = ["--variant=minbase", f"--include={packages}", *(f"--customize-hook={change}" for change in changes)]
    environment = dict(os.environ)
    if shutil.disk_usage("/dev/shm").free > 2**30:  # twice as fast
        environment["TMPDIR"] = "/dev/shm"
    run("mmdebstrap", *options, "bookworm", str(file), "http://deb.debian.org/debian", env=environment)
    run("docker", "import", str(file), BASE, env=engine)


def served(folder: str) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_cluster_of_containers_loses_a_node_and_gets_it_back(engine: dict[str, str], tmp_path: Path) -> None:
    arguments = ["--network", "host"]
    if subprocess.run(["docker", "pull", BASE], env=engine, capture_output=True, check=False).returncode != 0:
        make_base(engine, tmp_path / "base.tar")
        (tmp_path / "base.tar").unlink()
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    if Path(wheels).is_dir():  # where pip has torch from a folder of this machine, so must the build
        port = served(wheels).server_port
        arguments += ["--build-arg", "TORCH_INDEX=", "--build-arg", f"PIP_FIND_LINKS=http://127.0.0.1:{port}/"]
    out = run(f"{ROOT}/docker/try.sh", *arguments, env=engine)
    assert [int(ranks) for ranks in re.findall(r"trains on (\d) ranks", out)] == [2, 1, 2]
    assert out.count("resumed after step") >= 2
    assert "600 steps on 2 ranks" in out
