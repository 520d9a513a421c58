"""The public object `Domain`: query the vCPUs of one guest and switch them."""

import logging

from qmpvcpu.domain.domain import Domain, Options
from qmpvcpu.domain.event_bus import Events

# A library logs only for applications that configure logging.
logging.getLogger("qmpvcpu").addHandler(logging.NullHandler())

__all__ = ["Domain", "Events", "Options"]
