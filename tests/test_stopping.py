"""Signals: raised or noted, handed back in the end, and a second one that ends the process."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dsnet_jax.stopping import SAME_SIGNAL_SECONDS, SIGNALS, Stopped, deferred, raising, unhandled


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_raises_what_no_except_exception_catches(number, exit_code):
    with pytest.raises(Stopped, match=f"stopped by {number.name}") as raised, raising():
        try:
            os.kill(os.getpid(), number)
        except Exception:
            pytest.fail("caught")
    assert (raised.value.signal, raised.value.exit_code) == (number, exit_code)


def test_a_signal_that_was_made_an_error_is_a_signal_again():
    class Told:
        def __set_name__(self, owner, name):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="stopped by SIGINT"), raising():
        type("Owner", (), {"told": Told()})  # Python 3.11 raises RuntimeError in its place.


def test_an_error_without_a_signal_stays_what_it_is():
    with pytest.raises(ValueError, match="a fault"), raising():
        raise ValueError("a fault")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_deferred_signal_is_noted_and_told_and_nothing_else_happens(number, capfd):
    with deferred() as request:
        assert request.signal == 0
        os.kill(os.getpid(), number)
        assert request.signal == number
    assert capfd.readouterr().err == f"dsnet: {number.name}: saving, then stopping; once more stops at once\n"


@pytest.mark.parametrize("context", [raising, deferred, unhandled])
def test_the_old_handlers_are_back_in_the_end(context):
    before = [signal.getsignal(number) for number in SIGNALS]
    with context():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("context", ["raising", "deferred"])
@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_process_at_once(context, number, exit_code):
    program = f"""
import time
from dsnet_jax.stopping import Stopped, {context}
with {context}():
    while True:
        try:
            print("here", flush=True)
            time.sleep(60)
        except Stopped:
            pass
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    process.send_signal(number)
    if context == "raising":
        assert process.stdout.readline() == b"here\n"
    else:
        process.stderr.readline()
    time.sleep(2 * SAME_SIGNAL_SECONDS)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == exit_code


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_told_and_a_second_one_obeyed_while_the_main_thread_is_in_c(number, exit_code):
    program = """
import hashlib
from dsnet_jax.stopping import deferred
with deferred():
    print("here", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)  # A minute in C, as in a compiler: no handler is called.
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    process.send_signal(number)
    told = f"dsnet: {number.name}: saving, then stopping; once more stops at once\n"
    assert process.stderr.readline() == told.encode()
    process.send_signal(number)  # At once: the same one, as of a launcher that tells a process and its group.
    time.sleep(2 * SAME_SIGNAL_SECONDS)
    assert process.poll() is None
    process.send_signal(number)
    process.communicate()
    assert process.returncode == exit_code


def test_signals_count_also_when_nobody_reads_what_is_said_of_them():
    program = """
import hashlib
from dsnet_jax.stopping import deferred
with deferred():
    print("here", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stderr.close()
    process.stderr = None
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(2 * SAME_SIGNAL_SECONDS)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_a_closing_terminal_is_no_second_signal():
    program = """
import time
from dsnet_jax.stopping import deferred
with deferred() as request:
    print("here", flush=True)
    time.sleep(1)
    print(request.signal)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGTERM)
    process.stderr.readline()
    time.sleep(2 * SAME_SIGNAL_SECONDS)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, b"15\n")


@pytest.mark.parametrize("context", [raising, deferred, unhandled])
def test_a_closing_terminal_that_is_ignored_stays_so(context):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As by nohup.
    with context():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_other_signals_that_python_handles_are_not_counted(capfd):
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with deferred() as request:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGUSR1)
            assert request.signal == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert capfd.readouterr().err == ""


def test_the_inner_of_two_contexts_takes_the_signal_and_the_outer_one_the_next(capfd):
    with pytest.raises(Stopped), raising():
        with deferred() as request:
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err.splitlines() == [
        "dsnet: SIGTERM: saving, then stopping; once more stops at once",
        "dsnet: SIGTERM: stopping; once more stops at once",
    ]


def test_no_thread_and_no_file_is_left_behind():
    threads, files = threading.active_count(), len(os.listdir("/dev/fd"))
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with raising(), deferred():
        pass
    assert (threading.active_count(), len(os.listdir("/dev/fd"))) == (threads, files)
    assert signal.set_wakeup_fd(wakeup) == wakeup


def test_unhandled_a_signal_ends_the_process_where_python_calls_no_handler():
    program = """
import hashlib
from dsnet_jax.stopping import raising, unhandled
with raising(), unhandled():
    print("here", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)  # A minute in C.
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM


def test_in_another_thread_than_the_main_one_signals_are_left_alone():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def look():
        with deferred() as request:
            seen.append(([signal.getsignal(number) for number in SIGNALS], request.signal))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]
