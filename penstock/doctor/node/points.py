"""The checklist of a node. Each point is a pure function of what was seen and what is wanted.

Numbers are the documents' (S9, S15, S30, S98, S100) unless a comment says whose they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.doctor.checklist import Checklist, Found, Verdict
from penstock.fleet.hardware import GIB

from .host import Host
from .smi import Gpu, Smi

OK, WARN, FAIL, UNKNOWN = Verdict.OK, Verdict.WARN, Verdict.FAIL, Verdict.UNKNOWN
DRIVER = 550
"""For CUDA 12.4 (S15)."""
OLDEST_DRIVER = 525
"""For CUDA 12.0, below which no engine of today starts (docs.nvidia.com/deploy/cuda-compatibility)."""
CAPABILITY = 7.0
MEMORY = 16_000_000_000
"""Of a device, bytes: what 7-8B take (S9); cards of 16 GB tell 15 to 16 GiB."""
CELSIUS = 85
"""Of S78's alert."""
SHM = 8 * GIB
FILES = 65_536
"""Open files: a connection is one, and so is each file of weights (nginx' and vLLM's own guides)."""
MAPS = 65_530
"""Linux' default; weights are mapped piece by piece."""
BACKLOG = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the machine shall be good for."""

    gpus: int | None = None
    """Devices, or slices where they are cut; None takes what there is."""
    bytes: int | None = None
    """Of the weights that come onto its disk."""
    ports: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """All that was seen."""

    smi: Smi
    host: Host
    wanted: Wanted

    @property
    def has_gpus(self) -> bool:
        """Whether engines on GPUs are its work."""
        return bool(self.smi.gpus or self.wanted.gpus or self.host.nvidia_devices)


HEADINGS = {"devices": "Devices", "node-memory": "Memory", "disk": "Disk", "system": "System"}


CHECKLIST: Checklist[Node] = Checklist()
_point, examine = CHECKLIST.point, CHECKLIST.examine


# ---- devices ----


@_point("driver", "devices", f"NVIDIA's driver is {DRIVER} or later")
def _driver(it: Node) -> Found:
    smi, host = it.smi, it.host
    if smi.problem:
        return _no_driver(it)
    said = f"{smi.driver or 'of unknown version'}, up to CUDA {smi.cuda or '?'}"
    major = int(smi.driver.split(".")[0]) if smi.driver.split(".")[0].isdigit() else None
    if major is None:
        return said, UNKNOWN, "Look at nvidia-smi."
    if major < OLDEST_DRIVER:
        return said, FAIL, f"Install driver {DRIVER} or later: no engine of today starts with this one."
    if major < DRIVER:
        return said, WARN, f"Engines for CUDA 12.4 and later need {DRIVER}: update the driver."
    missing = [gpu.index for gpu in smi.gpus if f"nvidia{gpu.index}" not in host.device_files]
    if missing and host.device_files:
        which = ", ".join(f"/dev/nvidia{index}" for index in missing)
        return said, WARN, f"This user may not open {which}: is it given to this container?"
    return said, OK, ""


def _no_driver(it: Node) -> Found:
    smi, host = it.smi, it.host
    if "version mismatch" in smi.problem:
        return smi.problem, FAIL, "The driver was updated under a running kernel module: reboot the node."
    if "communicate with the NVIDIA driver" in smi.problem:
        advice = "The kernel module is not loaded: `modprobe nvidia`, or install it for this kernel."
        return smi.problem, FAIL, advice
    if host.nvidia_devices:
        said = f"{smi.problem}; {host.nvidia_devices} of NVIDIA's devices are on the bus"
        advice = (
            "Install the driver; in a container, run it with --gpus (docker) or a limit of nvidia.com/gpu, "
            "and the NVIDIA container toolkit on the node."
        )
        return said, FAIL, advice
    if it.wanted.gpus:
        return smi.problem, FAIL, f"{it.wanted.gpus} devices are wanted, and there is none of NVIDIA's."
    if host.amd_devices:
        said = f"{smi.problem}; {host.amd_devices} of AMD's devices are on the bus"
        return said, WARN, "On ROCm only vLLM runs: `engine: vllm`."
    return f"{smi.problem}, and no device of NVIDIA's: engines run on the CPU", OK, ""


@_point("devices", "devices", "The devices are there, and of one kind")
def _devices(it: Node) -> Found:
    gpus = it.smi.gpus
    if not gpus:
        return _none(it)
    kinds = {(gpu.name, gpu.memory) for gpu in gpus}
    said = ", ".join(_named(gpus))
    slices = sum(len(gpu.slices) for gpu in gpus)
    there = slices + sum(not gpu.mig for gpu in gpus)
    if it.wanted.gpus is not None and there < it.wanted.gpus:
        what = "devices and slices" if slices else "devices"
        return said, FAIL, f"{it.wanted.gpus} {what} are wanted, and {there} are there."
    if it.host.nvidia_devices > len(gpus):
        lost = it.host.nvidia_devices - len(gpus)
        return (
            said,
            WARN,
            f"{lost} more are on the bus: fallen off it (dmesg: Xid 79), or not given to this one.",
        )
    if len(kinds) > 1:
        return said, WARN, "A pool has one kind of device: tensor parallel waits for the slowest (S32)."
    exclusive = [gpu.index for gpu in gpus if gpu.compute_mode == "Prohibited"]
    if exclusive:
        return (
            said,
            FAIL,
            f"Device {exclusive[0]} is closed to programs: nvidia-smi -c DEFAULT -i {exclusive[0]}.",
        )
    return said, OK, ""


@_point("capability", "devices", f"Their compute capability is {CAPABILITY:g} or more")
def _capability(it: Node) -> Found:
    if not it.smi.gpus:
        return _none(it)
    known = [gpu.capability for gpu in it.smi.gpus if gpu.capability is not None]
    said = ", ".join(f"{each:.1f}" for each in sorted(set(known))) or "not told"
    if len(known) < len(it.smi.gpus):
        return said, UNKNOWN, "nvidia-smi --query-gpu=compute_cap does not say it; look the model up."
    if min(known) < CAPABILITY:
        return said, FAIL, f"Engines have no kernels below {CAPABILITY:g}: llama.cpp has some."
    return said, OK, ""


@_point("device-memory", "devices", "They have 16 GB or more, and nobody uses it")
def _device_memory(it: Node) -> Found:
    gpus = [gpu for gpu in it.smi.gpus if gpu.memory]
    if not gpus:
        return _none(it)
    sizes = [each.memory for gpu in gpus for each in gpu.slices] or [gpu.memory or 0 for gpu in gpus]
    used = [
        (gpu, gpu.used or 0) for gpu in gpus if not gpu.mig and (gpu.used or 0) > 0.02 * (gpu.memory or 1)
    ]
    said = (
        f"{min(sizes) / 1e9:.1f} GB each" if len(set(sizes)) == 1 else f"{min(sizes) / 1e9:.1f} GB at least"
    )
    if used:
        gpu, taken = max(used, key=lambda each: each[1])
        said += f"; {taken / 1e9:.1f} GB of device {gpu.index} are taken"
        advice = (
            "An engine takes its share of what is there at its start: end what else is on it (nvidia-smi)."
        )
        return said, WARN, advice
    if min(sizes) < 0.94 * MEMORY:  # what the driver keeps of 16 GB
        return said, WARN, "7B in 16 bits does not fit: a smaller or quantised model (`penstock plan`)."
    return said, OK, ""


@_point("mig", "devices", "MIG is as it was set, and cut")
def _mig(it: Node) -> Found:
    able = [gpu for gpu in it.smi.gpus if gpu.mig is not None]
    if not able:
        return ("these devices have none", OK, "") if it.smi.gpus else _none(it)
    on = [gpu for gpu in able if gpu.mig]
    said = f"on {len(on)} of {len(able)}"
    if on:
        cut = ", ".join(f"device {gpu.index}: {_profiles(gpu)}" for gpu in on)
        said += f" ({cut})"
    pending = [gpu.index for gpu in able if gpu.mig_pending is not None and gpu.mig_pending != gpu.mig]
    if pending:
        return said, WARN, f"Device {pending[0]} changes with a reset: nvidia-smi --gpu-reset, or a reboot."
    if empty := [gpu.index for gpu in on if not gpu.slices]:
        advice = (
            f"Device {empty[0]} has no slices, and can be used by nobody: nvidia-mig-parted apply, or -mig 0."
        )
        return said, FAIL, advice
    if on and len(on) < len(able):
        return said, WARN, "Whole devices and slices on one node need the device plugin's strategy `mixed`."
    return said, OK, ""


@_point("device-health", "devices", "They are well")
def _health(it: Node) -> Found:
    if not it.smi.gpus:
        return _none(it)
    for gpu in it.smi.gpus:
        if gpu.damaged:
            advice = "Drain the node and reset the device; if that does not help, have it replaced."
            return f"device {gpu.index}: {gpu.damaged[0]}", FAIL, advice
        if gpu.uncorrectable:
            said = f"device {gpu.index}: {gpu.uncorrectable:,} uncorrectable memory errors"
            return said, FAIL, "What it computed is not to be trusted: drain the node and reset the device."
    for gpu in it.smi.gpus:
        if gpu.slowed:
            return f"device {gpu.index}: {gpu.slowed[0]}", WARN, "Look at fans, air and power of the node."
        if gpu.temperature is not None and gpu.temperature > CELSIUS:
            return f"device {gpu.index} has {gpu.temperature} °C", WARN, "Look at fans and air of the node."
    hottest = max((gpu.temperature for gpu in it.smi.gpus if gpu.temperature is not None), default=None)
    said = "no errors" + (f", {hottest} °C at most" if hottest is not None else "")
    if any(gpu.persistence is False for gpu in it.smi.gpus):
        advice = (
            "Each first use loads the driver anew, for seconds: nvidia-persistenced, or nvidia-smi -pm 1."
        )
        return f"{said}; persistence mode is off", WARN, advice
    return said, OK, ""


# ---- memory ----


@_point("shm", "node-memory", "/dev/shm has 8 GiB or more")
def _shm(it: Node) -> Found:
    size = it.host.shm
    if size is None:
        return (
            "there is none",
            WARN if it.has_gpus else UNKNOWN,
            "Mount an emptyDir with medium: Memory there.",
        )
    said = f"{size / GIB:.1f} GiB"
    if size >= SHM:
        return said, OK, ""
    several = len(it.smi.gpus) > 1 or (it.wanted.gpus or 0) > 1
    advice = (
        "docker: --shm-size=8g; in a pod an emptyDir with medium: Memory, which `penstock compile` writes."
    )
    if not several:
        return said, OK, "" if size >= GIB or not it.has_gpus else advice
    return said, FAIL if size < GIB else WARN, advice


@_point("main-memory", "node-memory", "There is main memory to load weights through")
def _memory(it: Node) -> Found:
    host = it.host
    if host.memory is None:
        return "not told", UNKNOWN, ""
    whose = "the container's limit" if host.limited else "of the machine"
    free = host.available if host.available is not None else host.memory
    said = f"{host.memory / GIB:.1f} GiB {whose}, {free / GIB:.1f} GiB free"
    if it.wanted.bytes is not None and free < it.wanted.bytes and not it.has_gpus:
        return (
            said,
            FAIL,
            f"Weights of {it.wanted.bytes / 1e9:.1f} GB do not fit: engines on a CPU hold them there.",
        )
    if it.wanted.bytes is not None and free < it.wanted.bytes:
        advice = "Loading goes through the page cache, and is slow where it does not hold the weights."
        return said, WARN, advice
    if free < 16 * GIB:
        return (
            said,
            WARN,
            "Pods of 7B take 20 GiB, of 70B 80 GiB (S98): `penstock plan` says what yours takes.",
        )
    return said, OK, ""


@_point("hugepages", "node-memory", "Huge pages leave memory to others")
def _hugepages(it: Node) -> Found:
    host = it.host
    said = (
        f"transparent: {host.transparent_hugepages or 'not told'}; set aside: {host.hugepages / GIB:.1f} GiB"
    )
    if host.memory and host.hugepages > 0.1 * host.memory:
        return said, WARN, "No engine uses those set aside: vm.nr_hugepages = 0 gives them back."
    if host.transparent_hugepages == "never" and not it.has_gpus:
        return (
            said,
            WARN,
            "On a CPU, weights are read faster from huge pages: transparent_hugepage/enabled = madvise.",
        )
    return said, OK, ""


@_point("overcommit", "node-memory", "Memory may be mapped before it is there")
def _overcommit(it: Node) -> Found:
    mode = it.host.overcommit
    if mode is None:
        return "not told", UNKNOWN, ""
    said = f"vm.overcommit_memory = {mode}"
    if mode == 2:
        return (
            said,
            WARN,
            "Engines map far more than they use, and may be refused: vm.overcommit_memory = 0 or 1.",
        )
    return said, OK, ""


# ---- disk ----


@_point("disk", "disk", "There is room for weights")
def _disk(it: Node) -> Found:
    disk = it.host.disk
    if disk is None:
        return "not looked at", UNKNOWN, "Name where weights are kept: --weights DIR."
    said = f"{disk.path}: {disk.free / 1e9:,.0f} of {disk.total / 1e9:,.0f} GB free, {disk.kind or 'unknown'}"
    if disk.read_only:
        return f"{said}, read-only", OK, ""  # served from, filled elsewhere
    need = it.wanted.bytes
    if need is not None and disk.free < need:
        return said, FAIL, f"{need / 1e9:,.1f} GB are needed: a larger disk, or `penstock models prune`."
    if need is None and disk.free < 50e9:
        return said, WARN, "70B takes 140 GB in 16 bits; --need SIZE compares with yours."
    if disk.kind in ("tmpfs", "overlay", "ramfs"):
        advice = "What is there is gone with the container or the boot: keep weights on a volume."
        return said, WARN, advice
    return said, OK, ""


# ---- system ----


@_point("cores", "system", "There are cores enough")
def _cores(it: Node) -> Found:
    cores = it.host.cores
    if cores is None:
        return "not told", UNKNOWN, ""
    if cores < (4 if it.has_gpus else 2):
        return (
            f"{cores:g}",
            WARN,
            "Server and engine are two processes, each with a core's work: give it four (S39).",
        )
    return f"{cores:g}", OK, ""


@_point("ports", "system", "The ports are free")
def _ports(it: Node) -> Found:
    if not it.host.ports:
        return "none was asked for", UNKNOWN, "--ports 8000,8080"
    taken = {port: why for port, why in it.host.ports.items() if why}
    said = ", ".join(f"{port} {why or 'free'}" for port, why in it.host.ports.items())
    if taken:
        port = next(iter(taken))
        return (
            said,
            FAIL,
            f"Something has port {port} (ss -ltnp 'sport = :{port}'): end it, or choose another.",
        )
    return said, OK, ""


@_point("files", "system", f"{FILES:,} files may be open")
def _files(it: Node) -> Found:
    most = it.host.files
    if most is None:
        return "not told", UNKNOWN, ""
    if most != -1 and most < FILES:
        advice = (
            f"Each connection is one: ulimit -n {FILES}, LimitNOFILE in systemd, --ulimit nofile in docker."
        )
        return f"{most:,}", WARN if most >= 1024 else FAIL, advice
    return "no limit" if most == -1 else f"{most:,}", OK, ""


@_point("locked-memory", "system", "Memory may be locked for transfers")
def _locked(it: Node) -> Found:
    most = it.host.locked
    if most is None:
        return "not told", UNKNOWN, ""
    said = "no limit" if most == -1 else f"{most / GIB:.2f} GiB"
    if most != -1 and len(it.smi.gpus) > 1:
        return (
            said,
            WARN,
            "NCCL over InfiniBand pins memory: ulimit -l unlimited (--ulimit memlock=-1 in docker).",
        )
    return said, OK, ""


@_point("kernel", "system", "Kernel parameters suit a server")
def _kernel(it: Node) -> Found:
    values = it.host.sysctl
    if not values:
        return "not told", UNKNOWN, ""
    said = ", ".join(f"{name} = {value}" for name, value in values.items())
    if (value := values.get("net.core.somaxconn", BACKLOG)) < BACKLOG:
        return said, WARN, f"Bursts of connections are refused at {value}: net.core.somaxconn = 4096."
    if values.get("vm.max_map_count", MAPS) < MAPS:
        return said, WARN, f"Large checkpoints are mapped in many pieces: vm.max_map_count = {MAPS} or more."
    if values.get("kernel.numa_balancing") and len(it.smi.gpus) > 1:
        return said, WARN, "Moving pages between sockets stalls launches: kernel.numa_balancing = 0."
    return said, OK, ""


@_point("clock", "system", "The clock is set by somebody")
def _clock(it: Node) -> Found:
    host = it.host
    if host.clock_synchronised is None:
        return "not told", UNKNOWN, "timedatectl"
    error = "" if host.clock_error is None else f", off by {host.clock_error:.3f} s at most"
    if not host.clock_synchronised:
        advice = (
            "Budgets, TLS and traces go by it: chrony or systemd-timesyncd. In a virtual machine that takes "
            "its host's time, the kernel does not know."
        )
        return "not synchronised, as the kernel sees it", WARN, advice
    if host.clock_error is not None and host.clock_error > 1.0:
        return f"synchronised{error}", WARN, "Look at chronyc tracking."
    return f"synchronised{error}", OK, ""


def _none(it: Node) -> Found:
    """A point about devices, where there are none."""
    if it.wanted.gpus:
        return "there are none", FAIL, f"{it.wanted.gpus} are wanted."
    if it.host.nvidia_devices:
        return "nvidia-smi shows none", UNKNOWN, "See the driver, above."
    return "none; engines run on the CPU", OK, ""


def _named(gpus: Sequence[Gpu]) -> list[str]:
    counts: dict[tuple[str, int | None], int] = {}
    for gpu in gpus:
        counts[gpu.name, gpu.memory] = counts.get((gpu.name, gpu.memory), 0) + 1
    return [
        f"{count} × {name}" + (f" ({memory / 1e9:.0f} GB)" if memory else "")
        for (name, memory), count in counts.items()
    ]


def _profiles(gpu: Gpu) -> str:
    counts: dict[tuple[int, int], int] = {}
    for each in gpu.slices:
        key = (each.multiprocessors, each.memory)
        counts[key] = counts.get(key, 0) + 1
    return (
        ", ".join(
            f"{count} slices of {memory / 1e9:.0f} GB and {units} SMs"
            for (units, memory), count in counts.items()
        )
        or "no slices"
    )
