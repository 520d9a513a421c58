"""The XML of a domain: its definition, or XML made from what QEMU reports."""

from qmpvcpu.lazy import lazy

# Type checkers treat this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from qmpvcpu.domain.dump.document import check_dump, dump
    from qmpvcpu.domain.dump.from_qemu import DescribedXml, describe

__all__ = ["DescribedXml", "check_dump", "describe", "dump"]

__getattr__ = lazy(
    __name__,
    {
        "from_qemu": ("DescribedXml", "describe"),
        "document": ("check_dump", "dump"),
    },
)
