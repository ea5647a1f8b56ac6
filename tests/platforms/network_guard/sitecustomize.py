"""Refuse outward connections in every Python process that has this on PYTHONPATH.

An audit hook cannot be removed and sees the calls below `socket` too. Each attempt is
also written to the file named by COURSE_BLOCKED_LOG, so that a swallowed error still
shows. Loopback stays open, except the dead proxy port to which programs that are not
Python are sent.
"""

import os
import socket
import sys

PROXY_PORT = 9
NODE = socket.gethostname()
LOCAL = {"", "localhost", "0.0.0.0", "::", "::1", "ip6-localhost"}
ADDRESSED = {"socket.connect", "socket.sendto", "socket.sendmsg"}
NAMED = {"socket.getaddrinfo", "socket.gethostbyname"}


def _is_local(host):
    host = host.decode() if isinstance(host, bytes) else host
    return host is None or host in LOCAL or host.startswith(("127.", "::ffff:127."))


def _hook(event, arguments):
    if event in ADDRESSED:
        address = arguments[1]
        if not isinstance(address, tuple) or len(address) < 2:
            return  # a Unix socket, or one that is connected already
        host, port = address[0], address[1]
    elif event in NAMED:
        host, port = arguments[0], arguments[1] if len(arguments) > 1 else None
        if host == NODE:
            return
    else:
        return
    if _is_local(host) and port != PROXY_PORT:
        return
    target = "the proxy" if _is_local(host) else f"{host}:{port}"
    message = f"outward connection blocked: {event} to {target}"
    log = os.environ.get("COURSE_BLOCKED_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(message + "\n")
    raise PermissionError(message)


sys.addaudithook(_hook)
