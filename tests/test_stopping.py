"""Signals: raised or noted, handed back in the end, and a second one that ends the process."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from dsnet_jax.stopping import SIGNALS, Stopped, deferred, raising, unhandled


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
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
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == exit_code


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
