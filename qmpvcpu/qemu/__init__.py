"""The edge to QEMU: the monitor (QMP), the guest agent, QEMUs that we start."""

from qmpvcpu.lazy import lazy

# Type checkers read this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from qmpvcpu.qemu.agent import AgentClient
    from qmpvcpu.qemu.monitor import connect_monitor

__all__ = ["AgentClient", "connect_monitor"]

__getattr__ = lazy(
    __name__,
    {
        "agent": ("AgentClient",),
        "monitor": ("connect_monitor",),
    },
)
