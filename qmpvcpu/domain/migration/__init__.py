"""The object behind `domain.migration`, loaded on first use because most commands never migrate."""

from qmpvcpu.lazy import lazy

# Type checkers treat this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from qmpvcpu.domain.migration.migration import Access, Migration
    from qmpvcpu.domain.migration.picture import read_picture
    from qmpvcpu.domain.migration.saving import SaveTarget
    from qmpvcpu.domain.migration.sides import Transfer

__all__ = ["Access", "Migration", "SaveTarget", "Transfer", "read_picture"]

__getattr__ = lazy(
    __name__,
    {
        "migration": ("Access", "Migration"),
        "picture": ("read_picture",),
        "saving": ("SaveTarget",),
        "sides": ("Transfer",),
    },
)
