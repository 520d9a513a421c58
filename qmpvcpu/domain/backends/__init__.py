"""How a domain is reached: over QMP, or through libvirt."""

from qmpvcpu.lazy import lazy

# Type checkers treat this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from qmpvcpu.domain.backends.libvirt import TAINTED, LibvirtBackend, list_libvirt
    from qmpvcpu.domain.backends.qmp import QmpBackend

__all__ = ["TAINTED", "LibvirtBackend", "QmpBackend", "list_libvirt"]

__getattr__ = lazy(
    __name__,
    {
        "libvirt": ("LibvirtBackend", "TAINTED", "list_libvirt"),
        "qmp": ("QmpBackend",),
    },
)
