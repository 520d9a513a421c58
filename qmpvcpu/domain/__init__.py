"""The public object: ask about the vCPUs of a domain, switch them."""

import logging

from qmpvcpu.domain.domain import Domain, Options
from qmpvcpu.domain.event_bus import Events

# What a library says is for those who ask for it.
logging.getLogger("qmpvcpu").addHandler(logging.NullHandler())

__all__ = ["Domain", "Events", "Options"]
