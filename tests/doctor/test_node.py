"""`penstock doctor node`: answers of nvidia-smi as they were recorded (recorded/README.md), the points, the
command with an nvidia-smi in PATH that answers so."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cli.main import main
from penstock.doctor.checklist import Verdict
from penstock.doctor.node import host as hosts
from penstock.doctor.node import points, smi
from penstock.doctor.node.host import Disk, Host
from penstock.doctor.node.points import Node, Wanted
from penstock.doctor.node.smi import Gpu, Slice, Smi
from penstock.fleet.hardware import GIB

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    return (RECORDED / f"{name}.xml").read_text()


def test_an_a100_that_is_cut_into_slices() -> None:
    found = smi.read(recorded("a100-sxm4-v12"))
    assert (found.driver, found.cuda) == ("535.54.03", "12.2")
    (gpu,) = smi.with_capabilities(found, {}).gpus
    assert (gpu.name, gpu.capability) == ("NVIDIA A100-SXM4-80GB", 8.0)  # of its architecture
    assert gpu.memory == 80 * GIB
    assert (gpu.mig, gpu.mig_pending) == (True, True)
    assert gpu.slices == tuple(Slice(index=index, memory=19968 << 20, multiprocessors=14) for index in (0, 1))
    assert (gpu.temperature, gpu.persistence, gpu.uncorrectable) == (27, False, 0)
    assert (gpu.damaged, gpu.slowed) == ((), ())


def test_a_t4_with_an_old_driver() -> None:
    found = smi.read(recorded("tesla-t4"))
    told = smi.capabilities("GPU-d37e67a5-91dd-3774-a5cb-99096249601a, 7.5\nrubbish\n")
    (gpu,) = smi.with_capabilities(found, told).gpus
    assert (found.driver, gpu.capability, gpu.mig, gpu.slices) == ("515.105.01", 7.5, None, ())
    assert gpu.used == 1032 << 20


def test_the_newest_format() -> None:
    (gpu,) = smi.read(recorded("pro-6000-maxq-blackwell-v13")).gpus
    assert (gpu.architecture, gpu.persistence, gpu.temperature) == ("Blackwell", True, 24)
    assert gpu.uncorrectable == 0  # N/A
    assert (gpu.damaged, gpu.slowed) == ((), ())


@pytest.mark.parametrize(
    ("old", "new", "field", "says"),
    [
        (
            ">Not Active</clocks_throttle_reason_hw_th",
            ">Active</clocks_throttle_reason_hw_th",
            "slowed",
            "hot",
        ),
        ("<pending_retirement>No", "<pending_retirement>Yes", "damaged", "to be retired"),
        ("<gpu_temp>40", "<gpu_recovery_action>Reset</gpu_recovery_action><gpu_temp>40", "damaged", ""),
    ],
)
def test_what_is_wrong_with_a_device(old: str, new: str, field: str, says: str) -> None:
    text = recorded("tesla-t4")
    assert old in text
    (gpu,) = smi.read(text.replace(old, new)).gpus
    assert says in "".join(getattr(gpu, field))


@pytest.mark.parametrize(
    "text", ["", "Failed", "<a/>", "<!ENTITY x 'y'><nvidia_smi_log/>", "<nvidia_smi_log>"]
)
def test_what_is_no_answer_of_it(text: str) -> None:
    with pytest.raises(ValueError):
        smi.read(text)


# ---- the points ----

GPU = Gpu(
    index=0,
    name="H100",
    uuid="GPU-1",
    architecture="Hopper",
    memory=80 * GIB,
    used=0,
    capability=9.0,
    mig=False,
    mig_pending=False,
    persistence=True,
    temperature=40,
    compute_mode="Default",
)
SMI = Smi(driver="580.65.06", cuda="13.0", gpus=(GPU, replace(GPU, index=1, uuid="GPU-2")))
NONE = Smi(installed=False, problem="there is no nvidia-smi")
HOST = Host(
    cores=32,
    memory=256 * GIB,
    available=200 * GIB,
    shm=64 * GIB,
    transparent_hugepages="madvise",
    overcommit=0,
    files=1_048_576,
    locked=-1,
    sysctl={"net.core.somaxconn": 4096},
    nvidia_devices=2,
    device_files=("nvidia0", "nvidia1"),
    disk=Disk(path="/models", free=900 * 10**9, total=10**12, kind="ext4"),
    clock_synchronised=True,
    clock_error=0.01,
    ports={8000: ""},
)


def point(id: str, node: Node) -> points.Point:
    (found,) = [each for each in points.examine(node) if each.id == id]
    return found


def test_a_good_node_is_well() -> None:
    assert {each.verdict for each in points.examine(Node(SMI, HOST, Wanted(gpus=2)))} == {Verdict.OK}


def test_a_machine_without_devices_is_well_for_a_cpu() -> None:
    host = replace(HOST, nvidia_devices=0, device_files=())
    assert {each.verdict for each in points.examine(Node(NONE, host, Wanted()))} == {Verdict.OK}
    wanted = points.examine(Node(NONE, host, Wanted(gpus=1)))
    assert {each.id for each in wanted if each.verdict is Verdict.FAIL} == {
        "driver",
        "devices",
        "capability",
        "device-memory",
        "mig",
        "device-health",
    }


def gpus(**changes: object) -> Smi:
    return replace(SMI, gpus=(replace(GPU, **changes), *SMI.gpus[1:]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("id", "node", "verdict", "says"),
    [
        ("driver", Node(replace(SMI, driver="535.54.03"), HOST, Wanted()), "warn", "CUDA 12.4"),
        ("driver", Node(replace(SMI, driver="470.1"), HOST, Wanted()), "fail", "550 or later"),
        (
            "driver",
            Node(
                Smi(problem="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."),
                HOST,
                Wanted(),
            ),
            "fail",
            "modprobe nvidia",
        ),
        (
            "driver",
            Node(Smi(problem="Failed to initialize NVML: Driver/library version mismatch"), HOST, Wanted()),
            "fail",
            "reboot",
        ),
        ("driver", Node(NONE, HOST, Wanted()), "fail", "nvidia.com/gpu"),
        ("driver", Node(SMI, replace(HOST, device_files=("nvidia0",)), Wanted()), "warn", "/dev/nvidia1"),
        (
            "driver",
            Node(NONE, replace(HOST, nvidia_devices=0, amd_devices=8), Wanted()),
            "warn",
            "engine: vllm",
        ),
        ("devices", Node(SMI, HOST, Wanted(gpus=8)), "fail", "8 devices are wanted, and 2 are there"),
        ("devices", Node(gpus(name="A100"), HOST, Wanted()), "warn", "one kind"),
        ("devices", Node(SMI, replace(HOST, nvidia_devices=3), Wanted()), "warn", "Xid 79"),
        ("devices", Node(gpus(compute_mode="Prohibited"), HOST, Wanted()), "fail", "nvidia-smi -c DEFAULT"),
        ("capability", Node(gpus(capability=6.1), HOST, Wanted()), "fail", "llama.cpp"),
        ("capability", Node(gpus(capability=None), HOST, Wanted()), "unknown", "compute_cap"),
        ("device-memory", Node(gpus(used=20 * GIB), HOST, Wanted()), "warn", "end what else is on it"),
        ("device-memory", Node(gpus(memory=8 * GIB), HOST, Wanted()), "warn", "7B in 16 bits does not fit"),
        ("mig", Node(gpus(mig_pending=True), HOST, Wanted()), "warn", "changes with a reset"),
        ("mig", Node(gpus(mig=True, mig_pending=True), HOST, Wanted()), "fail", "no slices"),
        ("device-health", Node(gpus(uncorrectable=3), HOST, Wanted()), "fail", "not to be trusted"),
        (
            "device-health",
            Node(gpus(damaged=("it needs a reset",)), HOST, Wanted()),
            "fail",
            "Drain the node",
        ),
        ("device-health", Node(gpus(slowed=("it is too hot",)), HOST, Wanted()), "warn", "fans"),
        ("device-health", Node(gpus(temperature=90), HOST, Wanted()), "warn", "fans"),
        ("device-health", Node(gpus(persistence=False), HOST, Wanted()), "warn", "nvidia-persistenced"),
        ("shm", Node(SMI, replace(HOST, shm=64 << 20), Wanted()), "fail", "--shm-size=8g"),
        ("shm", Node(SMI, replace(HOST, shm=4 * GIB), Wanted()), "warn", "medium: Memory"),
        ("main-memory", Node(SMI, replace(HOST, available=8 * GIB), Wanted()), "warn", "20 GiB"),
        ("main-memory", Node(SMI, HOST, Wanted(bytes=10**12)), "warn", "page cache"),
        ("hugepages", Node(SMI, replace(HOST, hugepages=100 * GIB), Wanted()), "warn", "vm.nr_hugepages"),
        ("overcommit", Node(SMI, replace(HOST, overcommit=2), Wanted()), "warn", "0 or 1"),
        ("disk", Node(SMI, HOST, Wanted(bytes=10**12)), "fail", "1,000.0 GB are needed"),
        (
            "disk",
            Node(
                SMI, replace(HOST, disk=Disk(path="/x", free=10**12, total=10**12, kind="overlay")), Wanted()
            ),
            "warn",
            "keep weights on a volume",
        ),
        ("cores", Node(SMI, replace(HOST, cores=2), Wanted()), "warn", "S39"),
        (
            "ports",
            Node(SMI, replace(HOST, ports={8000: "address already in use"}), Wanted()),
            "fail",
            "ss -ltnp",
        ),
        ("files", Node(SMI, replace(HOST, files=1024), Wanted()), "warn", "ulimit -n"),
        ("locked-memory", Node(SMI, replace(HOST, locked=65536), Wanted()), "warn", "memlock"),
        ("kernel", Node(SMI, replace(HOST, sysctl={"net.core.somaxconn": 128}), Wanted()), "warn", "4096"),
        ("kernel", Node(SMI, replace(HOST, sysctl={"kernel.numa_balancing": 1}), Wanted()), "warn", "numa"),
        ("clock", Node(SMI, replace(HOST, clock_synchronised=False), Wanted()), "warn", "chrony"),
        ("clock", Node(SMI, replace(HOST, clock_error=9.0), Wanted()), "warn", "chronyc tracking"),
    ],
)
def test_points(id: str, node: Node, verdict: str, says: str) -> None:
    found = point(id, node)
    assert found.verdict == verdict
    assert says in found.advice


def test_slices_are_counted_as_devices() -> None:
    found = smi.read(recorded("a100-sxm4-v12"))
    host = replace(HOST, nvidia_devices=1)
    node = Node(smi.with_capabilities(found, {}), host, Wanted(gpus=2))
    assert point("devices", node).verdict is Verdict.OK
    assert "2 slices of 21 GB and 14 SMs" in point("mig", node).value
    assert "20.9 GB each" in point("device-memory", node).value


# ---- what Linux says ----


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_another_machines_files(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:  131072000 kB\nMemAvailable: 65536000 kB\n"
            "HugePages_Total:      16\nHugepagesize:       1048576 kB\n",
            "sys/fs/cgroup/memory.max": str(32 * GIB),
            "sys/fs/cgroup/memory.current": str(2 * GIB),
            "sys/fs/cgroup/cpu.max": "350000 100000",
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
            "proc/sys/vm/overcommit_memory": "2\n",
            "proc/sys/net/core/somaxconn": "128\n",
            "proc/sys/kernel/osrelease": "6.8.0\n",
            "proc/1/cgroup": "0::/kubepods/burstable/pod1\n",
            "sys/bus/pci/devices/0000:00:04.0/vendor": "0x10de\n",
            "sys/bus/pci/devices/0000:00:04.0/class": "0x030200\n",
            "sys/bus/pci/devices/0000:00:05.0/vendor": "0x10de\n",
            "sys/bus/pci/devices/0000:00:05.0/class": "0x068000\n",  # an NVSwitch
            "dev/nvidia0": "",
        },
    )
    found = hosts.look(root=root, live=False)
    assert (found.memory, found.available, found.limited) == (32 * GIB, 30 * GIB, True)
    assert (found.cores, found.hugepages, found.transparent_hugepages) == (3.5, 16 * GIB, "never")
    assert (found.overcommit, found.sysctl) == (2, {"net.core.somaxconn": 128})
    assert (found.nvidia_devices, found.device_files, found.container) == (1, ("nvidia0",), True)


def test_this_machine(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = hosts.look(weights=tmp_path / "models" / "x", ports=[port])
    assert "in use" in found.ports[port]
    assert found.memory is not None
    assert found.memory > GIB
    assert found.disk is not None
    assert 0 < found.disk.free <= found.disk.total
    assert found.kernel


# ---- the command ----

SCRIPT = """#!/bin/sh
case "$1" in
-q) cat {answer} ;;
*) echo "GPU-513536b6-7d19-9063-b049-1e69664bb298, 8.0" ;;
esac
exit {status}
"""


@pytest.fixture
def with_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(SCRIPT.format(answer=RECORDED / "a100-sxm4-v12.xml", status=0))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program


def test_the_command(with_smi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--weights", str(tmp_path), "--ports", ""]
    assert main(["doctor", "node", *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_id = {each["id"]: each for each in found["points"]}
    assert by_id["driver"]["value"] == "535.54.03, up to CUDA 12.2"
    assert by_id["capability"]["value"] == "8.0"
    assert found["seen"]["smi"]["gpus"][0]["slices"][0]["memory"] == 19968 << 20
    assert main(["doctor", "node", *flags, "--strict"]) == 1  # the driver is of before 550
    out = capsys.readouterr().out
    assert "WARN  NVIDIA's driver is 550 or later: 535.54.03" in out
    assert main(["doctor", "node", *flags, "--gpus", "4"]) == 1
    assert "4 devices and slices are wanted, and 2 are there" in capsys.readouterr().out


def test_an_nvidia_smi_that_fails(with_smi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_smi.write_text(
        "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n"
    )
    assert main(["doctor", "node", "--ports", ""]) == 1
    assert "reboot the node" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--ports", "x"], ["--ports", "70000"], ["--need", "much"]])
def test_what_cannot_be_asked(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "node", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
