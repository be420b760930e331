"""`python -m keel_gateway.main`: serves the gateway until it is told to stop."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Sequence

import uvicorn

from keel.errors import InvalidField
from keel_gateway.app import create_app
from keel_gateway.feeds import Feeds
from keel_gateway.settings import parse_settings

log = logging.getLogger(__name__)


class GatewayServer(uvicorn.Server):
    """Ends streams of events before it waits for connections: they would hold it up."""

    def __init__(self, config: uvicorn.Config, feeds: Feeds) -> None:
        super().__init__(config)
        self._feeds = feeds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn when it is to end."""
        await self._feeds.stop()
        await super().shutdown(sockets)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, binds, serves. Exits with 2 and one sentence where a setting is wrong."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        settings = parse_settings(arguments)
        app = create_app(settings)
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family)
    except (InvalidField, OSError) as error:
        sys.stderr.write(f"keel gateway: {error}\n")
        raise SystemExit(2) from error
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if family is socket.AF_INET6 else host, port)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    GatewayServer(config, app.state.feeds).run(sockets=[listener])


if __name__ == "__main__":
    main()
