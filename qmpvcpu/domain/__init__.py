"""The public object: connect to a domain, ask about its vCPUs, switch them."""

import logging

from qmpvcpu.domain.domain import Domain, Options, connect
from qmpvcpu.domain.event_bus import Events

# What a library says is for those who ask for it.
logging.getLogger("qmpvcpu").addHandler(logging.NullHandler())

__all__ = ["Domain", "Events", "Options", "connect"]
