"""Workers find each other in any order, say whom they miss, and end at signals. Without TensorFlow."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import cli
import workers
from errors import UserError
from tests.commands import free_ports

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def addresses():
    return tuple(f"localhost:{port}" for port in free_ports(3))


class Meeting(threading.Thread):
    """One worker of several, in a thread: what came of it is in `error` once it has ended."""

    def __init__(self, addresses, number, seconds=20):
        super().__init__(daemon=True)
        self.arguments = workers.Cluster(addresses, number), seconds
        self.error = None
        self.start()

    def run(self):
        try:
            workers.meet(*self.arguments)
        except UserError as error:
            self.error = str(error)

    def ended(self):
        self.join(10)
        assert not self.is_alive()
        return self.error


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_workers_that_start_in_any_order_go_on_together(addresses, order, capsys):
    first, second = (Meeting(addresses, k) for k in order[:2])
    time.sleep(0.5)
    assert first.is_alive()
    assert second.is_alive()
    last = Meeting(addresses, order[2])
    assert [m.ended() for m in (first, second, last)] == [None] * 3
    said = capsys.readouterr().err  # by three threads, of which one may still wait when another does not
    together = "All 3 workers are here; TensorFlow connects them, within 120 s"
    assert said.count(together) == 3
    waiting = said.replace(together, "")
    assert all(line.startswith("Waiting for the workers localhost:") for line in waiting.split("\n") if line)
    assert addresses[order[2]] in waiting
    socket.create_server(("", int(addresses[0].rpartition(":")[2]))).close()  # free again, for TensorFlow


def test_a_worker_says_for_whom_it_waits_and_for_how_long(addresses, capsys):
    first, second = Meeting(addresses, 0, 1), Meeting(addresses, 1, 2)
    assert f"waited 1 s for the workers {addresses[2]} of TF_CONFIG" in first.ended()
    assert "wait longer with --wait" in second.ended()
    said = capsys.readouterr().err
    assert f"Waiting for the workers {addresses[1]}, {addresses[2]}, at most 1 s\n" in said
    assert f"Waiting for the workers {addresses[2]}, at most 2 s\n" in said
    assert f"for the workers {addresses[0]} of" in (Meeting(addresses, 2, 0.5).ended())


def test_a_worker_that_ended_while_it_waited_is_waited_for_again(addresses):
    pair = addresses[:2]
    host, _, port = pair[0].rpartition(":")
    three = Meeting(addresses, 0)
    time.sleep(0.3)
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(json.dumps([addresses, 1]).encode() + b"\n")
        gone.recv(1)
    third = Meeting(addresses, 2)
    time.sleep(0.7)
    assert three.is_alive()
    assert third.is_alive()
    second = Meeting(addresses, 1)
    assert [m.ended() for m in (three, second, third)] == [None] * 3


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"\n", b"7\n", b'["a", {}]\n', b'[["a"], "b"]\n', b""])
def test_a_stranger_at_the_port_disturbs_nobody(addresses, sent):
    pair = addresses[:2]
    first = Meeting(pair, 0)
    time.sleep(0.2)
    with socket.create_connection(("localhost", int(pair[0].rpartition(":")[2]))) as stranger:
        stranger.sendall(sent)
        stranger.shutdown(socket.SHUT_WR)
        second = Meeting(pair, 1)
        assert [first.ended(), second.ended()] == [None, None]


def test_workers_that_disagree(addresses):
    first, second = Meeting(addresses, 0, 1.5), Meeting(addresses, 1, 1.5)
    time.sleep(0.3)
    other = Meeting((*addresses[:2], "elsewhere:1"), 2)
    assert f"it names the workers {', '.join(addresses)}; give all workers the same list" in other.ended()
    assert "another process is worker 1 already" in Meeting(addresses, 1).ended()
    assert "cannot start as this worker (" in Meeting(addresses, 0).ended()
    first.ended()
    second.ended()


def python(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_that_waits_ends_at_a_signal(addresses, number, index):
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    code = "import cli, signal, sys, workers; [signal.signal(n, signal.default_int_handler) for n in (1, 2)]\n"
    code += "sys.exit(cli.run(lambda _: workers.meet(workers.cluster(), 600)))"
    process = python(code, TF_CONFIG=json.dumps(config))
    assert process.stderr.readline().startswith("Waiting for the workers localhost:")
    process.send_signal(number)
    assert process.communicate(timeout=10)[1] == "error: stopped\n"
    assert process.returncode == cli.STOPPED


DEAF = """
import ctypes, signal, sys, workers
workers._END_SECONDS = 0.1
signal.signal(signal.SIGTERM, lambda *_: None)
watch = workers.Watch()
watch.spared = {spared}
print("ready", file=sys.stderr, flush=True)
mutex = (ctypes.c_char * 64)()
[ctypes.CDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]  # for ever, as TensorFlow waits for a lost worker
"""


@pytest.mark.parametrize("spared", [0, 1])
def test_a_process_that_waits_in_c_ends_at_a_signal(spared):
    process = python(DEAF.format(spared=spared))
    assert process.stderr.readline() == "ready\n"
    for _ in range(spared):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[1] == "error: stopped\n"
    assert process.returncode == cli.STOPPED


@pytest.mark.parametrize("ends", [True, False])
def test_connecting_ends_at_a_signal_or_when_the_time_is_over(ends):
    # ctypes.PyDLL keeps Python's lock, as TensorFlow does there.
    code = """if True:
        import cli, ctypes, signal, sys, workers
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        def main(_):
            workers._CONNECT_SECONDS = %d
            with workers.connecting():
                print("ready", file=sys.stderr, flush=True)
                mutex = (ctypes.c_char * 64)()
                [ctypes.PyDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]
        sys.exit(cli.run(main))"""
    process = python(code % (1 if ends else 600))
    assert process.stderr.readline() == "ready\n"
    if not ends:
        process.send_signal(signal.SIGHUP)
    process.communicate(timeout=10)
    assert process.returncode == -(signal.SIGALRM if ends else signal.SIGHUP)


def test_connecting_says_what_tensorflow_says_and_restores_the_signals(monkeypatch):
    class OpError(Exception):
        error_code = 14

    monkeypatch.setenv("TF_CONFIG", "x")
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with pytest.raises(UserError, match=r"cannot start as this worker \(no port\)"), workers.connecting():
        raise OpError("no port\nmore")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before
    assert signal.alarm(0) == 0
