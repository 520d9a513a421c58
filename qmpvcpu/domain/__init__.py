"""The public object: connect to a domain, ask about its vCPUs, switch them."""

from qmpvcpu.domain.domain import Domain, connect

__all__ = ["Domain", "connect"]
