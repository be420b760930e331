"""Prometheus metrics of a service over HTTP, for those services that serve no HTTP otherwise."""

from __future__ import annotations

import logging
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from keel.errors import InvalidField

log = logging.getLogger(__name__)

FLAG = "--metrics"
HELP = (
    "serve Prometheus metrics at http://HOST:PORT/metrics; port 0 takes a free one. There is no "
    "authentication: keep it on loopback, or in a network that you trust"
)


def serve_metrics(address: str, registry: CollectorRegistry = REGISTRY) -> WSGIServer | None:
    """Serves `registry` on "HOST:PORT" from a thread of its own until `shutdown()`.

    An empty address serves nothing and returns None. Process CPU, memory and open files are in the
    default registry.

    Errors: InvalidField for an address that is none, or is taken.
    """
    if not address:
        return None
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise InvalidField(FLAG, address, "HOST:PORT, such as 127.0.0.1:9090")
    try:
        server, _ = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise InvalidField(FLAG, address, f"an address to listen on ({error.strerror})") from error
    log.info("metrics at http://%s:%d/metrics", host, server.server_port)
    return server
