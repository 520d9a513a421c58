"""The public object: connect to a domain, ask about its vCPUs, switch them."""

from qmpvcpu.domain.domain import Domain, Options, connect
from qmpvcpu.domain.listen import Events

__all__ = ["Domain", "Events", "Options", "connect"]
