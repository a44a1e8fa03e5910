"""Commands as processes of their own, and two of them as the workers of one run."""

import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def start(home, script, *flags, worker=None, ports=()):
    """Start a script in the folder `home`, all that it prints in its output; perhaps as one of several workers."""
    frugal = ("MALLOC_", "TF_ONEDNN_USE_SYSTEM")  # settings of a long process, which slow a short one down
    environment = {name: value for name, value in os.environ.items() if not name.startswith(frugal)}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    if worker is not None:
        addresses = [f"localhost:{port}" for port in ports]
        task = {"type": "worker", "index": worker}
        environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    command = [sys.executable, str(ROOT / script), *flags]
    return subprocess.Popen(
        command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )


def finish(*processes, status=0):
    """What the processes print until they end with this status."""
    outputs = [process.communicate(timeout=1200)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output
    return outputs


def free_ports(n):
    """Ports of this machine that nobody listens at."""
    sockets = [socket.create_server(("", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def two_workers(home, *flags):
    """Start train.py as both workers of one run."""
    ports = free_ports(2)
    return [start(home, "train.py", "-g", "-1", *flags, worker=k, ports=ports) for k in range(2)]


def run_named(home, name):
    """The folder of the one run of that name."""
    (found,) = (home / "weights").glob(f"*_{name}")
    return found
