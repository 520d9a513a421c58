"""The machine of a guest: -smp, -numa, layouts, boot arguments, devices. Pure."""

from qmpvcpu.lazy import lazy

# Type checkers read this name as true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from qmpvcpu.core.machine.boot_arguments import located

__all__ = ["located"]

__getattr__ = lazy(
    __name__,
    {
        "boot_arguments": ("located",),
    },
)
