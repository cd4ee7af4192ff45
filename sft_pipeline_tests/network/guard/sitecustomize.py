"""Put on PYTHONPATH: writes down every look-up and connection of a Python that leaves the machine.

Python imports this module at its start, in every process that inherits the environment. It refuses nothing: a
library that swallows a refused connection would look like one that made none.
"""

import ipaddress
import json
import os
import socket
import sys
import traceback

LOG = os.environ.get("SFT_TEST_NETWORK_LOG")
LOOK_UPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
SENDS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
OWN = {"localhost", "localhost.localdomain", "ip6-localhost", ""}


def leaves(event, arguments):
    """Whether what a process is about to do concerns another machine; the address with it."""
    if event in SENDS:
        if getattr(arguments[0], "family", None) not in (socket.AF_INET, socket.AF_INET6):
            return None  # a socket file, or the kernel itself
        address = arguments[1]
        if not address:
            return None  # of a connected socket: its connect has been seen
        host = address[0]
    elif event in LOOK_UPS:
        host = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
        address = host
    else:
        return None
    host = host.decode("utf-8", "replace") if isinstance(host, bytes | bytearray) else (host or "")
    if host.lower() in OWN:
        return None
    try:
        number = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return address  # a name: to find its number, a server is asked
    if number.is_loopback:
        return None
    # The form of a number is looked at without asking anybody; a name for one is asked for.
    return None if event == "socket.getaddrinfo" else address


def watch(event, arguments):
    if not event.startswith("socket."):
        return
    address = leaves(event, arguments)
    if address is not None:
        stack = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_stack()[:-1]]
        command = getattr(sys, "orig_argv", [])
        found = {"event": event, "address": str(address), "pid": os.getpid(), "argv": command, "stack": stack}
        append({"found": found})


def append(value):
    # One write of O_APPEND for a line: those of several processes do not mix.
    handle = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(handle, (json.dumps(value) + "\n").encode())
    finally:
        os.close(handle)


if LOG:
    append({"watched": getattr(sys, "orig_argv", []), "pid": os.getpid()})
    sys.addaudithook(watch)
