"""Read and write domain XML as bytes."""

from qmpvcpu.lazy import lazy

# Type checkers read this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from qmpvcpu.xml.changes import unified_diff
    from qmpvcpu.xml.document import read_domain, read_listed
    from qmpvcpu.xml.minimal import minimal_domain
    from qmpvcpu.xml.vcpus import write_vcpus

__all__ = ["minimal_domain", "read_domain", "read_listed", "unified_diff", "write_vcpus"]

__getattr__ = lazy(
    __name__,
    {
        "changes": ("unified_diff",),
        "document": ("read_domain", "read_listed"),
        "minimal": ("minimal_domain",),
        "vcpus": ("write_vcpus",),
    },
)
