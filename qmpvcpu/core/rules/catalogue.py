"""One row for each reason to refuse: code, text, hint and libvirt error name, by topic. Pure.

Calling a row makes the refusal: `catalogue.RANGE(ids, most=3)` returns the `Refusal`, and
`catalogue.INACTIVE.error(name=name)` the `VcpuRefused` that has only this one. `{ids}` is the list
of the vCPUs that the refusal is about. Every other field is an argument of the same name, and a
list of numbers is written as virsh writes CPU lists.

To add a reason, add a row under its topic and call it from the rule of that topic (`core.rules`),
or from where the environment fails (a file, a socket, a cgroup). A code belongs to one topic and is
stable; several rows may share it. All faults of one kind of document share one row, and its reader
fills in `{what}`. The rows of QEMU's defects are in `core.quirks`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from qmpvcpu.core.model import format_ids
from qmpvcpu.errors import Refusal, VcpuRefused

_INVALID: Final = "VIR_ERR_OPERATION_INVALID"
_DENIED: Final = "VIR_ERR_OPERATION_DENIED"
_FAILED: Final = "VIR_ERR_OPERATION_FAILED"
_UNSUPPORTED: Final = "VIR_ERR_OPERATION_UNSUPPORTED"
_CONFIG: Final = "VIR_ERR_CONFIG_UNSUPPORTED"
_AS_THE_SOURCE: Final = "start the destination as the source was started"


class Reason(NamedTuple):
    """Why a request can be refused; `text` and `hint` are `str.format` templates.

    Attributes:
        code: as `Refusal.code`.
        text: what happened.
        hint: what to type or to do.
        libvirt: the libvirt error name.
        forceable: whether `force=True` overrides it.
    """

    code: str
    text: str
    hint: str | None = None
    libvirt: str = "VIR_ERR_INVALID_ARG"
    forceable: bool = False

    def __call__(self, ids: Iterable[int] = (), /, **facts: Any) -> Refusal:
        """The refusal about these vCPUs; `facts` are the fields of the templates."""
        about = tuple(ids)
        words = {
            name: format_ids(it) if isinstance(it, list | tuple) else it
            for name, it in facts.items()
        }
        words["ids"] = format_ids(about)
        hint = self.hint.format_map(words) if self.hint is not None else None
        return Refusal(
            self.code, self.text.format_map(words), about, hint, self.libvirt, self.forceable
        )

    def error(self, ids: Iterable[int] = (), /, **facts: Any) -> VcpuRefused:
        """The error that has this one refusal."""
        return VcpuRefused([self(ids, **facts)])


# -- Flags and options: flags

UNKNOWN_FLAGS = Reason(
    "flags", "unknown flags: {flags:#x}", "use only the flags of qmpvcpu.VcpuFlag"
)
ENABLE_AND_DISABLE = Reason(
    "flags", "--enable (ENABLE) and --disable (DISABLE) exclude each other", "give only one of them"
)
GUEST_AND_ANOTHER = Reason(
    "flags", "GUEST and {flag} exclude each other: {why}", "leave out {flag} or GUEST"
)
QUERY_OF_BOTH = Reason("flags", "LIVE and CONFIG exclude each other in a query", "make two queries")
LIVE_AND_CONFIG = Reason(
    "flags", "--live and --config exclude each other in a query", "make two queries"
)
MAXIMUM_AND_ACTIVE = Reason(
    "flags", "--maximum and --active exclude each other", "make two queries"
)
ATOMIC_AND_ASYNC = Reason(
    "flags",
    "--atomic and --async exclude each other: a call that does not wait cannot undo what fails"
    " later",
    "give only one of them",
)

# -- vCPU ids and how many: range, count, listed, maximum, maxcpus, vcpus

RANGE = Reason(
    "range",
    "vCPU {ids} is not in this domain: its ids are 0 to {most}",
    "`qmpvcpu vcpuinfo` lists the ids",
)
NEGATIVE_ID = Reason(
    "range", "a vCPU id cannot be negative: {numbers}", "`qmpvcpu vcpuinfo` lists the ids"
)
GUEST_RANGE = Reason("range", "the guest has no CPU {ids}", "`qmpvcpu guestvcpus` lists its CPUs")
COUNT_WITHOUT_NODE = Reason(
    "count", "a count needs a NUMA node", "add --numa-node, or give the vCPU ids"
)
NODE_COUNT = Reason("count", "{count} is not a number of vCPUs or cores", "give 1 or more")
NO_VCPUS = Reason("count", "a guest cannot have {total} vCPUs", "give 1 or more")
OVER_MAXIMUM = Reason(
    "count",
    "{total} vCPUs were requested, but this domain can have {most} (maxcpus)",
    "the maximum can change only in the persistent definition: --maximum --config",
)
OVER_DEFINED_MAXIMUM = Reason(
    "count",
    "{total} vCPUs were requested, but the definition can have 1 to {most}",
    "--maximum --config changes the maximum",
)
OVER_LIBVIRT_MAXIMUM = Reason(
    "count", "{total} vCPUs were requested, but the domain has at most {most}", "give 1 to {most}"
)
WHOLE_CORES = Reason(
    "count",
    "the domain cannot have {total} vCPUs: QEMU plugs and unplugs cores of {size}",
    "request {below} or {above}",
    _CONFIG,
)
DEFINED_WHOLE_CORES = Reason(
    "count",
    "the definition cannot have {total} vCPUs: QEMU plugs and unplugs cores of {size}",
    "request {below} or {above}",
    _CONFIG,
)
FEWEST = Reason(
    "count",
    "the domain cannot have {total} vCPUs: at least {fewest} remain, because no more can be"
    " unplugged now",
    "`qmpvcpu vcpuinfo` shows which vCPUs are hotpluggable",
    _CONFIG,
)
GUEST_TOTAL = Reason(
    "count",
    "the guest cannot have {total} vCPUs online: {most} are plugged and known",
    "give 1 to {most}, or plug more, without --guest",
)
GUEST_FEWEST = Reason(
    "count",
    "the guest cannot have {total} vCPUs online: it can take only {loose} offline",
    "`qmpvcpu guestvcpus` shows which CPUs it can take offline",
    _CONFIG,
)
GUEST_CPUS_TOTAL = Reason(
    "count",
    "the guest cannot have {total} CPUs online: it can have {least} to {most}",
    "`qmpvcpu guestvcpus` shows which CPUs it can take offline",
)
LISTED = Reason(
    "listed",
    "{place} lists {count} vCPUs, but this domain has {maxcpus}",
    "list all {maxcpus} vCPUs, and change only which of them are enabled",
)
MAXIMUM_IS_CONFIG = Reason(
    "maximum",
    "the maximum of vCPUs cannot change while the guest runs",
    "use --maximum with --config (config=True), and without --live",
)
MAXIMUM_WITHOUT_CONFIG = Reason(
    "maximum", "--maximum changes only the definition, for the next boot", "add --config"
)
MAXIMUM = Reason("maximum", "a domain cannot have a maximum of {maximum} vCPUs", "give 1 to {most}")
MAXIMUM_OF_TOPOLOGY = Reason(
    "maximum",
    "<cpu><topology> makes {made} vCPUs, not {maximum}",
    "change <topology> and <vcpu> in the XML first, and define it again",
)
MAXIMUM_OF_CELL = Reason(
    "maximum",
    "NUMA cell {cell} has vCPU {ids}, which would not exist any more",
    "change <cpu><numa> in the XML, and define it again",
)
OTHER_MAXCPUS = Reason(
    "maxcpus",
    "maximum of vCPUs: {there} at the source, {now} at the destination",
    _AS_THE_SOURCE,
    _INVALID,
)
OTHER_MAXIMUM = Reason(
    "vcpus", "maximum of vCPUs: {there} at the source, {now} at the destination", _AS_THE_SOURCE
)
OTHER_VCPUS = Reason(
    "vcpus", "vCPUs: {there} at the source, {now} at the destination", _AS_THE_SOURCE
)

# -- Whole entities and cores: entity

PART_OF_ENTITY = Reason(
    "entity",
    "vCPU {ids} is a part of {label}, which QEMU plugs and unplugs only together",
    "{verb} {whole}, or give --core (CORE) for the whole core",
)
LISTED_PART = Reason(
    "entity",
    "{label} can only be enabled and disabled together, but {place} gives them different states",
    "give all of them the same state",
)
BOOT_PART = Reason(
    "entity",
    "vCPUs {ids} are one core, but differ in whether they are enabled or hotpluggable",
    "write the same state and hotpluggable for each of them",
    _CONFIG,
)
OTHER_ENTITY = Reason(
    "entity",
    "the entity of vCPU {ids}: {there} vCPUs at the source, {now} vCPUs at the destination",
    _AS_THE_SOURCE,
    _INVALID,
)
OTHER_DRIVER = Reason(
    "entity",
    "the driver of vCPU {ids}: {there} at the source, {now} at the destination",
    _AS_THE_SOURCE,
    _INVALID,
)

# -- NUMA nodes: node

ONE_NODE = Reason("node", "NUMA_NODE takes one node", "name one node")
NO_NODES = Reason("node", "this machine has no NUMA nodes", "name vCPU ids instead")
EMPTY_NODE = Reason(
    "node",
    "no vCPU is on NUMA node {node}: nodes are {nodes}",
    "`qmpvcpu vcpuinfo` shows the node of each vCPU",
)
NODE_TOO_SMALL = Reason(
    "node",
    "NUMA node {node} has {found} {kind}, {count} requested",
    "`qmpvcpu vcpuinfo` shows other nodes",
)
OTHER_NODE = Reason(
    "node",
    "NUMA node of vCPU {ids}: {there} at the source, {now} at the destination",
    _AS_THE_SOURCE,
    _INVALID,
)

# -- Plugging and unplugging: no-hotplug, no-unplug, unseen, boot-cpu, not-hotpluggable

NO_HOTPLUG = Reason(
    "no-hotplug",
    "this machine has no CPU hotplug: on {machine} ({arch}) no CPU can be {done} while the guest"
    " runs",
    "change the number of CPUs it starts with (-smp), or its machine type",
    _UNSUPPORTED,
)
NO_HOTPLUG_AT_BOOT = Reason(
    "no-hotplug",
    "{machine} ({arch}) has no CPU hotplug: it cannot boot with vCPU {ids} while a lower one is"
    " disabled",
    "enable vCPUs from 0 on, without a gap",
    _CONFIG,
)
NO_UNPLUG = Reason(
    "no-unplug",
    "{machine} ({arch}) can plug CPUs, but never unplug them",
    "the guest agent can take the CPU offline: --guest --disable",
    _UNSUPPORTED,
)
UNSEEN = Reason(
    "unseen",
    "vCPU {ids} was unplugged, but libvirt did not notice",
    "plug it through QEMU's monitor: --via monitor (via='monitor')",
    _INVALID,
)
BOOT_CPU = Reason(
    "boot-cpu",
    "{label} {verb} the boot CPU, which QEMU never unplugs",
    "leave it enabled",
    _UNSUPPORTED,
)
NOT_A_DEVICE = Reason(
    "not-hotpluggable",
    "{label}: libvirt did not plug it as a device (hotpluggable='no'), and cannot unplug it",
    "use --via monitor, or write hotpluggable='yes' in the definition for the next boot",
    _UNSUPPORTED,
)

# -- The guest and its agent: not-plugged, guest-cpu, guest-fixed, guest-offline, no-agent,
# agent-disabled

NOT_PLUGGED = Reason(
    "not-plugged",
    "vCPU {ids} is not plugged, so the guest does not have it",
    "enable it first, without --guest",
)
GUEST_CPU = Reason(
    "guest-cpu",
    "it is not known which of the guest's CPUs vCPU {ids} is",
    "allow the agent guest-file-open, or use guestvcpus with the guest's own ids",
    _UNSUPPORTED,
)
GUEST_CPUS_UNCOUNTED = Reason(
    "guest-cpu",
    "it is not known which vCPUs {count} of the guest's online CPUs are, so a count cannot be"
    " reached",
    "allow the agent guest-file-open, or use guestvcpus with the guest's own ids",
    _UNSUPPORTED,
)
GUEST_FIXED = Reason("guest-fixed", "the guest cannot take vCPU {ids} offline", "leave it online")
GUEST_CPU_FIXED = Reason(
    "guest-fixed", "the guest cannot take its CPU {ids} offline", "leave it online"
)
ONLY_THE_AGENT = Reason(
    "guest-offline",
    "vCPU {ids} is plugged and offline in the guest, which only the guest agent can change",
    "leave out --no-fallback (fallback=False), or take it online in the guest",
    _INVALID,
)
NO_AGENT = Reason(
    "no-agent",
    "no guest agent of this domain is known",
    "name its socket: --agent ADDR (agent=), or leave out --guest (GUEST)",
    "VIR_ERR_ARGUMENT_UNSUPPORTED",
)
AGENT_DISABLED = Reason(
    "agent-disabled",
    "the guest agent does not carry out '{command}': {error}",
    "allow {command} in the guest's qemu-ga configuration (block-rpcs, allow-rpcs)",
    _UNSUPPORTED,
)

# -- Whether the domain runs: inactive, active, destroy, locked, runtime

INACTIVE = Reason("inactive", "the domain '{name}' is not running", "start it first", _INVALID)
INACTIVE_LIVE = Reason(
    "inactive",
    "the domain '{name}' is not running",
    "leave out --live (LIVE) to change its definition, or start it",
    _INVALID,
)
NOTHING_TO_END = Reason(
    "inactive", "'{name}' is not running", "`qmpvcpu list` shows the running domains", _INVALID
)
ACTIVE = Reason(
    "active", "'{name}' is already running (QEMU {pid})", "`qmpvcpu destroy` ends it", _INVALID
)
ACTIVE_ELSEWHERE = Reason(
    "active",
    "'{name}' is already running: its QMP socket answers",
    "end it with the program that started it",
    _INVALID,
)
ACTIVE_WITH_OTHER_SOCKETS = Reason(
    "active",
    "'{name}' is running (QEMU {pid}), and that QEMU has other sockets",
    "destroy it first, or define the other guest under another name",
    _INVALID,
)
ACTIVE_DEFINITION = Reason(
    "active",
    "'{name}' is running (QEMU {pid}): undefining a running guest leaves no way to end it",
    "destroy it first",
    _INVALID,
)
NOT_STARTED_BY_US = Reason(
    "destroy",
    "'{name}' is running, but qmpvcpu did not start it",
    "end it with the program that started it",
    _INVALID,
)
LOCKED = Reason("locked", "another process is starting or ending this guest", "try again", _INVALID)
RUNTIME_NOT_MADE = Reason(
    "runtime",
    "the folder '{folder}' cannot be created: {error.strerror}",
    "check the permissions of the folder above it",
    _INVALID,
)
RUNTIME_NOT_USED = Reason(
    "runtime",
    "the folder '{folder}' cannot be used: {error.strerror}",
    "check its permissions, or set QMPVCPU_STATE",
    _INVALID,
)

# -- Definitions: no-definition, config-vcpu-0, config-order, unreadable, definition, name, folder

NO_DEFINITION = Reason(
    "no-definition",
    "no persistent definition of this domain is known",
    "leave out --config (CONFIG), or define it: `qmpvcpu define NAME --qmp ADDR`",
    _INVALID,
)
CONFIG_VCPU_0 = Reason(
    "config-vcpu-0", "vCPU 0 must be enabled in a definition", "leave 0 out: 1-3 or ^0"
)
CONFIG_ORDER = Reason(
    "config-order",
    "vCPU {ids} cannot change in the definition: vCPU {behind}, which is enabled and not"
    " hotpluggable, comes after it",
    "change {behind} with it, or give it hotpluggable='yes' in <vcpus>",
)
UNREADABLE = Reason(
    "unreadable",
    "the changed definition could not be read: {why}",
    "change that in the XML, and define it again",
)
NO_FILE = Reason("definition", "there is no file '{path}'", "name a file with domain XML")
NO_FILE_OR_DOMAIN = Reason(
    "definition",
    "there is no file '{word}'{also}",
    "name a file with domain XML, or a domain that `qmpvcpu list` shows",
    "VIR_ERR_NO_DOMAIN",
)
NOT_DEFINED = Reason(
    "definition",
    "no domain '{name}' is defined",
    "`qmpvcpu list` shows what is defined",
    "VIR_ERR_NO_DOMAIN",
)
NOT_DEFINED_TO_START = Reason(
    "definition",
    "no domain '{name}' is defined",
    "define it first: `qmpvcpu define FILE`",
    "VIR_ERR_NO_DOMAIN",
)
DEFINITION_REMOVED = Reason(
    "definition",
    "there is no definition '{path}'",
    "`qmpvcpu list` shows what is defined",
    "VIR_ERR_NO_DOMAIN",
)
DEFINITION_NOT_READ = Reason("definition", "'{path}' cannot be read: {why}", "{cure}", _INVALID)
SOCKETS_NOT_READ = Reason(
    "definition",
    "the sockets of '{name}' cannot be read from '{path}': {error}",
    "define it again: `qmpvcpu define NAME --qmp ADDR`",
    _INVALID,
)
DEFINITION_NOT_WRITTEN = Reason(
    "definition",
    "the definition '{place}' cannot be written: {why}",
    "check the free space and the permissions of its folder",
    _FAILED,
)
DEFINITION_LOCKED = Reason(
    "definition",
    "the definition '{place}' cannot be written: another process is writing it",
    "try again",
    _FAILED,
)
SOURCE_NOT_DESCRIBED = Reason(
    "definition",
    "the source has no definition, and QEMU does not report all of its hardware",
    "start '{name}' as the source was started, with -incoming defer, and name its QMP socket",
    _UNSUPPORTED,
)
ANOTHER_DOMAIN = Reason(
    "definition",
    "'{name}' is defined, but is another domain: its uuid is {defined}, and the guest's is {uuid}",
    "name another destination, or undefine that one",
)
SAME_NAME = Reason(
    "definition",
    "source and destination have the same name, '{name}'",
    "give the destination another name",
)
NOTHING_TO_UNDEFINE = Reason(
    "definition",
    "the source has no definition that could be removed",
    "leave out --undefine-source",
)
NAME = Reason("name", "{name!r} is not a domain name: {what}", "choose another name")
FOLDER_NOT_OURS = Reason(
    "folder", "the {what} '{folder}' is not trusted: {error.strerror}", "{error.cure}", _DENIED
)

# -- Where threads run: place, cgroup, not-enabled, shared-thread

_NO_PLACE: Final = "--no-place (place=False) leaves it where the kernel puts it"
PLACE_ELSEWHERE = Reason(
    "place",
    "vCPU {ids} cannot be placed: QEMU's process is not found on this host",
    _NO_PLACE,
    _UNSUPPORTED,
)
PLACE_NOT_OWNER = Reason(
    "place",
    "vCPU {ids} cannot be placed: QEMU belongs to another user, or has capabilities that qmpvcpu"
    " lacks, and CAP_SYS_NICE is missing",
    f"run as root or as QEMU's user; {_NO_PLACE}",
    _DENIED,
)
PLACE_OFFLINE = Reason(
    "place",
    "vCPU {ids} is {how} {missing}: host CPU {missing} is not online (online: {there})",
    f"correct {{element}}; {_NO_PLACE}",
)
PLACE_OUTSIDE = Reason(
    "place",
    "vCPU {ids} is {how} {missing}: the cpuset of '{path}' has {there}",
    f"correct {{element}}; {_NO_PLACE}",
)
PRIORITY = Reason(
    "place",
    "vCPU {ids} cannot be {scheduler}: priorities are 1 to 99",
    f"correct <vcpusched priority>; {_NO_PLACE}",
)
REAL_TIME_DENIED = Reason(
    "place",
    "vCPU {ids} cannot be {scheduler}: CAP_SYS_NICE is missing",
    f"run as root, or raise QEMU's RLIMIT_RTPRIO (it is {{most}}); {_NO_PLACE}",
    _DENIED,
)
NO_REAL_TIME = Reason(
    "place",
    "vCPU {ids} cannot be {scheduler}: its cgroup '{path}' has no real-time budget",
    f"give that cgroup a budget (cpu.rt_runtime_us); {_NO_PLACE}",
    _DENIED,
)
REAL_TIME_SPLIT = Reason(
    "place",
    "vCPU {ids} cannot be {scheduler} and have <quota> or <shares>: on this kernel a cgroup of"
    " its own has no real-time budget (cpu.rt_runtime_us)",
    f"take out one of them; {_NO_PLACE}",
    _DENIED,
)
NO_CONTROLLER = Reason(
    "cgroup",
    "vCPU {ids} needs a cgroup for {element}: {trouble}",
    f"mount and enable that controller; {_NO_PLACE}",
    _UNSUPPORTED,
)
CONTROLLER_DENIED = Reason(
    "cgroup",
    "vCPU {ids} needs a cgroup for {element}: {trouble}",
    f"run as root, or have that cgroup delegated to you; {_NO_PLACE}",
    _DENIED,
)
SHARES = Reason(
    "cgroup",
    "vCPU {ids}: <shares> is {shares}, but cgroups take {least} to {most}",
    f"correct <shares>; {_NO_PLACE}",
)
NO_CGROUP = Reason(
    "cgroup",
    "the cgroup of vCPU {ids} cannot be used: {why}",
    "check that cgroup, or leave the thread where the kernel puts it: --no-place (place=False)",
    _FAILED,
)
CGROUP_DENIED = Reason(
    "cgroup",
    "the cgroup of vCPU {ids} cannot be used: {why}",
    "check that cgroup, or leave the thread where the kernel puts it: --no-place (place=False)",
    _DENIED,
)
NO_THREAD = Reason(
    "not-enabled",
    "vCPU {ids} is not enabled: it has no thread",
    "--config pins it for when it is plugged",
    _INVALID,
)
SHARED_THREAD = Reason(
    "shared-thread",
    "vCPU {ids} has no thread of its own: QEMU runs every vCPU on one (-accel tcg,thread=single)",
    "start QEMU with thread=multi or with KVM",
)

# -- Machines, QEMU programs and features: machine, topology, arch, emulator, probe, feature, boot

NO_MACHINE_TYPE = Reason(
    "machine",
    "QEMU {version} for {arch} has no machine type '{machine}'",
    "name another machine type",
    _CONFIG,
)
OLD_MACHINE_TYPE = Reason(
    "machine",
    "QEMU {version} for {arch} has no machine type '{machine}'",
    "use {newest}, the newest of that family in this QEMU",
    _CONFIG,
)
NO_MACHINE_TYPE_HERE = Reason(
    "machine",
    "QEMU {version} ('{program}') has no machine type '{machine}' (unsupported machine type)",
    "`{program} -machine help` lists its machine types",
    _CONFIG,
)
OLD_MACHINE_TYPE_HERE = Reason(
    "machine",
    "QEMU {version} ('{program}') has no machine type '{machine}' (unsupported machine type)",
    "use {newest}, the newest of that family in this QEMU",
    _CONFIG,
)
MACHINE_SWITCH = Reason(
    "machine",
    "-machine {key}='{value}': QEMU expects 'on' or 'off'",
    "write {key}=on or {key}=off",
    _CONFIG,
)
OTHER_MACHINE_TYPE = Reason(
    "machine",
    "machine type: {there} at the source, {now} at the destination",
    _AS_THE_SOURCE,
    _INVALID,
)
TOPOLOGY = Reason(
    "topology",
    "the machine has room for {maxcpus} vCPUs, but <vcpu> says {defined}",
    "correct <topology>",
    _CONFIG,
)
OTHER_TOPOLOGY = Reason(
    "topology",
    "topology: {there} at the source, {now} at the destination",
    _AS_THE_SOURCE,
    _INVALID,
)
OTHER_ARCH = Reason(
    "arch",
    "architecture: {there} at the source, {now} at the destination",
    _AS_THE_SOURCE,
    _INVALID,
)
NO_EMULATOR = Reason(
    "emulator",
    "<emulator> '{emulator}' is not on this host",
    "name one that `qmpvcpu doctor` lists, or take <emulator> out of the definition",
    _CONFIG,
)
NO_PROGRAM = Reason(
    "emulator",
    "there is no QEMU program '{emulator}'",
    "give its full path: `qmpvcpu doctor` lists the QEMUs of this host",
    _CONFIG,
)
NO_PROGRAM_TO_START = Reason(
    "emulator", "{messages}", "name an <emulator> that `qmpvcpu doctor` lists", _INVALID
)
NO_PROGRAM_TO_COMPARE = Reason(
    "emulator", "{messages}", "name an <emulator> that `qmpvcpu doctor` lists"
)
PROGRAM_OF_ANOTHER_ARCH = Reason(
    "emulator",
    "'{emulator}' is a QEMU for {runs}, but {arch} was requested",
    "name another program",
    _CONFIG,
)
PROBED_ANOTHER_ARCH = Reason(
    "emulator",
    "'{emulator}' is a QEMU for {runs}, but {arch} was requested",
    "name another program",
)
PROBE_NEVER = Reason(
    "probe",
    "what '{machine}' ({arch}) makes of '-smp {smp}' cannot be known without starting QEMU",
    "--probe auto starts one",
    _CONFIG,
)
NOTHING_TO_PROBE = Reason(
    "probe",
    "what '{machine}' ({arch}) makes of '-smp {smp}' cannot be known without starting QEMU",
    "install qemu-system-{arch}, or name one with --emulator",
    _CONFIG,
)
NO_CPU_FEATURE = Reason(
    "feature",
    "'{program}' has no CPU feature {features}",
    "take <feature> out of <cpu>, or start the guest with a newer QEMU",
    _CONFIG,
)
NO_ARCH = Reason(
    "boot",
    "the domain's XML names no architecture",
    "write <os><type arch='…'>hvm</type></os>",
    _CONFIG,
)
BOOT_VCPU_0 = Reason(
    "boot",
    "vCPU 0 must be enabled and not hotpluggable: no guest boots without it",
    "write enabled='yes' and hotpluggable='no' for vCPU 0",
    _CONFIG,
)
NO_MEMORY = Reason(
    "boot",
    "the memory devices take all of the guest's memory",
    "correct <memory>: it is the sum of the cells and of all memory devices",
    _CONFIG,
)
CELL_WITHOUT_MEMORY = Reason(
    "boot", "NUMA cell {cells} has no memory", "write <cell … memory='262144' unit='KiB'/>", _CONFIG
)

# -- What QEMU says to -smp and -numa: smp

SMP_REFUSED = Reason(
    "smp",
    "QEMU refuses this machine: {error}",
    "correct the machine: '{binary}' refused it",
    _CONFIG,
)
#: QEMU's own rules, in its words: `core.machine.smp` and `core.machine.numa` fill them in
#: (`core.machine.words.refuse_smp`).
SMP = Reason("smp", "{what}", "{hint}", _CONFIG)


# -- Domain XML: xml, protection, trust

NOT_XML = Reason(
    "xml",
    "{where}{what}",
    "give the XML of one domain, as `virsh dumpxml` writes it",
    "VIR_ERR_XML_ERROR",
)
XML = Reason("xml", "line {line}: {what}", "correct the domain's XML", "VIR_ERR_XML_DETAIL")
XML_NOT_A_DOMAIN = Reason(
    "xml",
    "line {line}: the document is a <{element}>, not a <domain>",
    "give what `virsh dumpxml NAME` prints",
    "VIR_ERR_XML_ERROR",
)
XML_NO_NAME = Reason(
    "xml", "line {line}: the domain has no <name>", "correct the domain's XML", "VIR_ERR_NO_NAME"
)
XML_TOPOLOGY = Reason(
    "xml",
    "line {line}: <topology> has room for {made} vCPUs, but <vcpu> says {maximum}",
    "correct the domain's XML",
    _CONFIG,
)
XML_DISK = Reason(
    "xml",
    "line {line}: a <disk> needs <source file='…'/> or <source dev='…'/>, and must be disk or"
    " cdrom",
    "take it out, or write it in <qemu:commandline>",
)
PROTECTION = Reason(
    "protection",
    "line {line}: <launchSecurity type='{kind}'>: qmpvcpu cannot protect a guest from its host",
    "start it with libvirt, or take the element out",
    _CONFIG,
)
TRUST = Reason(
    "trust",
    "{parts}: a file must not supply what belongs to a host",
    "`qmpvcpu define FILE` with the XML of '{name}', and try again: that definition supplies the"
    " devices",
    _UNSUPPORTED,
)

# -- Another QEMU as this machine: difference, not-held, twin, temporary, read-only-memory, slot,
# place, extra, missing, uuid

DIFFERENCE = Reason("difference", "{difference}", "{hint}", _INVALID)
#: Also the hint of other errors about a guest without a definition, or with that of another
#: machine.
DEFINE_IT: Final = "`qmpvcpu define NAME --qmp ADDR` makes a definition of the guest as it runs"
NOT_IN_DEFINITION = Reason(
    "not-held",
    "the guest was started with '{words}', which the definition does not have",
    "start the guest without it, or write its counterpart into the definition",
    _INVALID,
)
FOLDER_UNKNOWN = Reason(
    "not-held",
    "the folder of the file in '{words}' is not known",
    "start the guest without it, or write its counterpart into the definition",
    _INVALID,
)
TWIN_FAILED = Reason("twin", "no QEMU starts from its definition: {why}", DEFINE_IT, _INVALID)
NO_TWIN = Reason(
    "twin",
    "no second QEMU can be started for comparison, because two cannot share this of the host:"
    " {words}",
    "take it out of the guest first",
    _INVALID,
)
TEMPORARY = Reason(
    "temporary",
    "disk '{disk}' is a temporary overlay (-snapshot, or snapshot=on), which is lost when QEMU"
    " ends",
    "start the guest without it",
    _INVALID,
)
READ_ONLY_MEMORY = Reason("read-only-memory", "{effect}: {backends}", "{hint}", _INVALID)
NO_SUCH_SLOT = Reason(
    "slot", "vCPU {ids}: the destination has no such slot", _AS_THE_SOURCE, _INVALID
)
OTHER_PLACE = Reason(
    "place",
    "vCPU {ids} has another slot at the destination (socket, core or thread)",
    _AS_THE_SOURCE,
    _INVALID,
)
EXTRA = Reason(
    "extra",
    "vCPU {ids} is plugged at the destination, but not at the source",
    "start the destination without it",
    _INVALID,
)
MISSING = Reason(
    "missing",
    "vCPU {ids} is plugged at the source, but not at the destination",
    "migrate-prepare plugs it",
    _INVALID,
)
OTHER_UUID = Reason(
    "uuid",
    "the guest's uuid is {uuid}, but the destination's is {there}",
    "start it with -uuid {uuid}",
    _INVALID,
)

# -- Migration: pending, migrating, run-state, blocked, feature, uri, cookie, arrived, arrival,
# destination, handed-over, shared

PENDING = Reason(
    "pending",
    "vCPU {ids}: its unplug is pending, and could end during the migration",
    "wait for its end (--wait), or enable it again",
    _INVALID,
)
UNDER_WAY = Reason(
    "migrating", "a migration is under way ({status})", "`qmpvcpu migrate-cancel` ends it", _INVALID
)
MIGRATING = Reason(
    "migrating",
    "the guest is being migrated ({status})",
    "wait for its end, or cancel it: `qmpvcpu migrate-cancel`",
    _INVALID,
)
MIGRATED = Reason(
    "migrating",
    "the guest has migrated to its destination",
    "name its destination; `qmpvcpu migrate-cancel` lets it run at the source",
    _INVALID,
)
NOTHING_UNDER_WAY = Reason(
    "migrating", "no migration is under way", "`qmpvcpu migrate-begin` begins one", _INVALID
)
RUN_STATE = Reason(
    "run-state", "the guest is '{state}'", "look at the log of its QEMU first", _INVALID
)
SHUT_DOWN = Reason(
    "run-state",
    "the guest is '{state}': it has shut down, and runs again only after a reset",
    "end its QEMU, or reset it first",
    _INVALID,
)
PANICKED = Reason(
    "run-state",
    "the guest is '{state}': its kernel has crashed, and would not run at the destination either",
    "end its QEMU, or reset it first",
    _INVALID,
)
INTERNAL_ERROR = Reason(
    "run-state",
    "the guest is '{state}': QEMU cannot run it any further",
    "look at the log of its QEMU, and reset it",
    _INVALID,
)
IO_ERROR = Reason(
    "run-state",
    "the guest is '{state}': a disk has failed, and QEMU stopped the guest",
    "repair the disk, and let the guest run first",
    _INVALID,
)
WAITS_FOR_A_GUEST = Reason(
    "run-state",
    "the guest is '{state}': it waits for an incoming migration",
    "`qmpvcpu migrate-cancel` ends it",
    _INVALID,
)
WAS_MIGRATED = Reason(
    "run-state",
    "the guest is '{state}': it has been migrated, or a save failed while it was paused: QEMU"
    " migrates it again only after it has run",
    "`qmpvcpu migrate-cancel` lets it run in this QEMU",
    _INVALID,
)
RUNS_ALREADY = Reason(
    "run-state",
    "the destination '{name}' does not wait for a migration: it is already running",
    "destroy it first, or name another destination; one that waits is started with -incoming defer",
    _INVALID,
)
DOES_NOT_WAIT = Reason(
    "run-state",
    "the destination '{name}' does not wait for a migration (it is '{state}')",
    "destroy it first, or name another destination; one that waits is started with -incoming defer",
    _INVALID,
)
_BEGIN_AGAIN: Final = (
    "begin again: `migrate-begin`, and `migrate-prepare` a destination with its cookie"
)
RUNS_NO_MORE = Reason(
    "run-state",
    "the guest was {was} when the migration was begun, and is no longer {was}",
    _BEGIN_AGAIN,
    _INVALID,
)
CHANGED_WHILE_SAVING = Reason(
    "run-state", "the guest was {done} after this save began", "save again"
)
BLOCKED = Reason(
    "blocked",
    "QEMU cannot migrate the guest: {why}",
    "unplug or end what QEMU names, and try again",
    _INVALID,
)
COOKIE_FEATURES = Reason(
    "feature",
    "the migration needs features that this side does not know: {features}",
    "install a newer qmpvcpu on this side",
    _UNSUPPORTED,
)
NO_WAY = Reason(
    "uri", "'{uri}' is not an address for a migration", "give unix:PATH or tcp:HOST:PORT", _INVALID
)
NO_URI = Reason(
    "uri",
    "the destination has no address to listen at",
    "give --uri unix:PATH or tcp:HOST:PORT",
    _INVALID,
)
LISTENS_ELSEWHERE = Reason(
    "uri", "the destination already listens at {there}", "leave out --uri", _INVALID
)
COOKIE = Reason(
    "cookie",
    "line {line}: {what}",
    "give what `migrate-begin` printed, or what `save` wrote",
    "VIR_ERR_XML_DETAIL",
)
COOKIE_NOT_READ = Reason(
    "cookie", "'{path}' cannot be read: {why}", "name a file with the output of `migrate-begin`"
)
COOKIE_TOO_LONG = Reason(
    "cookie",
    "'{path}' is not a cookie: it has more than {most} bytes",
    "name a file with the output of `migrate-begin`",
)
COOKIE_UNKNOWN = Reason(
    "cookie",
    "the cookie with which this destination was prepared is not known",
    "give the cookie that `migrate-begin` printed",
)
ARRIVED = Reason(
    "arrived",
    "the guest has arrived in this QEMU, but has never run in it",
    "`qmpvcpu migrate-finish` lets it run, `qmpvcpu migrate-cancel` ends it",
    _INVALID,
)
NOTHING_ARRIVED = Reason(
    "arrival",
    "no guest has migrated to this QEMU (it is '{state}')",
    "name the destination",
    _INVALID,
)
NOT_ALL_ARRIVED = Reason("arrival", "{why}", "look at the log of the destination's QEMU", _INVALID)
DESTINATION_LOST = Reason(
    "destination", "{why}", "look at the log of the destination's QEMU", _INVALID
)
COOKIE_USED = Reason("handed-over", "this cookie has been used", _BEGIN_AGAIN, _INVALID)
RUNS_AT_DESTINATION = Reason(
    "handed-over",
    "the guest already runs at the destination, and would run twice",
    "end the source's QEMU; if the destination has ended for good, --force lets the guest run at"
    " the source",
    _INVALID,
)
RUNS_AT_SOURCE = Reason(
    "handed-over",
    "another side has claimed the guest (the source runs it), and it would run twice",
    "`qmpvcpu migrate-cancel` ends this side; if there is no other side any more, --force lets it"
    " run",
)
SOURCE_UNKNOWN = Reason(
    "handed-over",
    "all of the guest has arrived, and it is not known whether the source still has it",
    "`qmpvcpu migrate-finish` lets it run (with --force, if it refuses); if the source runs it,"
    " --force ends it",
    _INVALID,
)
SHARED_MEMORY = Reason(
    "shared",
    "the destination would write to the memory of the running guest: {what}",
    "start '{name}' yourself with other memory and -incoming defer, and name its QMP socket",
    _UNSUPPORTED,
)

# -- Saving and restoring: saving, descriptor, verify, file, disk, memory, saved, still-here

SAVING = Reason(
    "saving",
    "process {pid} is saving this guest",
    "wait for it, or cancel it: `qmpvcpu migrate-cancel`",
)
NO_DESCRIPTOR = Reason(
    "descriptor",
    "QEMU can receive an open file only over a unix socket",
    "connect to its QMP socket on its own host",
)
VERIFY_UNDEFINED = Reason(
    "verify",
    "the guest has no definition, and a second QEMU can be started only from one",
    "`qmpvcpu define NAME --qmp ADDR` makes one",
)
VERIFY_NETWORK = Reason(
    "verify",
    "a second QEMU cannot have the network of '{device}', and does not read the guest's state"
    " without it",
    "save without --verify",
    _UNSUPPORTED,
)
FILE_NOT_WRITTEN = Reason(
    "file",
    "'{file}' cannot be written: {error.strerror}",
    "name a file in a folder that has room and can be written",
)
NO_DISK = Reason(
    "disk",
    "'{file}' may take {size} MiB, but its file system has {left} MiB left",
    "name a file in a folder with room",
    _FAILED,
)
NO_MEMORY_TO_COMPARE = Reason(
    "memory",
    "the second QEMU, with which it is compared, may take {size} MiB, but {left} MiB are free",
    "end other programs that take memory",
    _FAILED,
)
NO_MEMORY_TO_VERIFY = Reason(
    "memory",
    "the second QEMU, with which it is compared, may take {size} MiB, but {left} MiB are free",
    "save without --verify",
    _FAILED,
)
NOT_SAVED = Reason("saved", "'{path}' {what}", "name a file that `save` has written")
DAMAGED = Reason(
    "saved",
    "'{path}' is damaged: its SHA-256 digest differs from that of the saved guest",
    "use a copy of the file, if there is one",
)
STILL_EXISTS = Reason(
    "still-here",
    "the guest in '{file}' still exists in QEMU (process {pid})",
    "any command on that guest, such as vcpuinfo, ends it or lets it run; then restore the file",
)

# -- libvirt: libvirt, counts-only

LIBVIRT = Reason("libvirt", "{error}")
LIBVIRT_NOT_STARTED = Reason("libvirt", "libvirt does not start the domain: {error}")
NO_LIBVIRT = Reason(
    "libvirt",
    "libvirt-python is not installed: {error}",
    "pip install 'qmpvcpu[libvirt]' (it is built against libvirt's headers: libvirt-dev,"
    " pkg-config, gcc)",
    "VIR_ERR_NO_SUPPORT",
)
COUNTS_ONLY = Reason(
    "counts-only",
    "this driver of libvirt's knows only the number of vCPUs",
    "use `setvcpus DOMAIN COUNT` (set_vcpus)",
    "VIR_ERR_NO_SUPPORT",
)

# -- This host, and the lab's tools: descriptors, no-guest, no-qemu, libvirtd

FEW_DESCRIPTORS = Reason(
    "descriptors",
    "only {more} more files can be opened, and a command needs {needed} ({error.strerror})",
    "raise the limit of open files: ulimit -n 1024",
    "VIR_ERR_SYSTEM_ERROR",
)
NO_GUEST = Reason(
    "no-guest", "there is no {arch} guest in {folder}", "run scripts/build-guest {arch}"
)
NO_QEMU = Reason(
    "no-qemu", "there is no qemu-system-{arch} on this host", "run scripts/demo, or scripts/setup"
)
NO_LIBVIRTD = Reason(
    "libvirtd",
    "the program 'libvirtd' is not installed",
    "install libvirt-daemon, libvirt-daemon-driver-qemu and a QEMU (Debian: `apt-get install"
    " --no-install-recommends libvirt-daemon libvirt-daemon-driver-qemu`)",
)
NO_MOUNTS = Reason(
    "libvirtd",
    "libvirtd cannot have folders of its own: {why}",
    "run it as an ordinary user, or give root the right to mount (CAP_SYS_ADMIN)",
)
