"""One way to serve a model: devices, ranks, format; what fits, how fast it is, how many it takes, what it
costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .facts import SCHEMES, Scheme
from .hardware import Device, Price
from .load import Point, Replica
from .prices import Costs, costs
from .question import Engine, Question, engine_for
from .roofline import Machine, fitted
from .sizing import BLOCK, Room, room, sequences_of

TP_SIZES = (1, 2, 4, 8)
MAX_BATCHED = 8192
"""Default of --max-num-batched-tokens on CUDA, of both engines."""
MAX_SEQS = 256
"""Default of --max-num-seqs on CUDA."""
_CPU_LIMITS = (64, 256)
"""(max_num_seqs, max_num_batched_tokens) of our engine on a CPU."""
_SMALLER = ((128, 4096), (64, 2048), (32, 1024), (32, 512))
"""(max_num_seqs, max_num_batched_tokens) where memory is scarce: what a step takes is in proportion."""
MOST_REPLICAS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way, and what becomes of it. `problem` says why it does not do."""

    device: Device
    tp: int
    scheme: Scheme
    engine: Engine | None
    engine_note: str
    machine: Machine
    room: Room
    sequences: int
    """Requests of the workload's length that the cache holds."""
    max_num_seqs: int
    replica: Replica
    usable: float
    """Requests a second of one replica, with every target kept."""
    replicas: int
    """For the average rate."""
    peak_replicas: int
    point: Point | None
    """Each replica at the average rate."""
    price: Price | None
    price_per_hour: int | None
    """Nanodollars of a device."""
    costs: Costs | None
    problem: str | None
    slo_floor: tuple[str, float, float] | None = None
    """(target, wanted, floor) where a target cannot be met whatever the number."""

    @property
    def devices(self) -> int:
        """Of all replicas at the average rate."""
        return self.replicas * self.tp

    @property
    def burst(self) -> int:
        """Replicas beyond those of the average rate, at the busiest."""
        return self.peak_replicas - self.replicas

    @property
    def ok(self) -> bool:
        return self.problem is None


def machine_of(question: Question, device: Device, tp: int, scheme: Scheme) -> Machine:
    """A replica of the question's model."""
    width = 4 if question.float32 else 2
    return Machine(
        facts=question.facts,
        device=device,
        tp=tp,
        scheme=scheme,
        width=width,
        kv_width=1 if question.kv_fp8 else width,
        efficiency=fitted().efficiency,
    )


def context_of(question: Question) -> int:
    """--max-model-len: as given, else the power of two that holds a request of the workload."""
    if question.max_model_len is not None:
        return question.max_model_len
    wanted = question.workload.prompt + question.workload.output
    return max(1, min(question.facts.context_length, 1 << max(0, wanted - 1).bit_length()))


def consider(question: Question, device: Device, tp: int, scheme: Scheme) -> Candidate:
    """Work out one way."""
    load, targets = question.workload, question.targets
    machine = machine_of(question, device, tp, scheme)
    engine, note = engine_for(question, device, tp, scheme)
    space = _room(question, machine, engine)
    seqs = space.max_num_seqs
    whole = load.prompt + load.output
    fitting = sequences_of(machine, space.kv_cache, whole) if question.facts.kv else seqs
    replica = Replica(machine, min(fitting, seqs), load.prompt, load.output if question.facts.kv else 0)
    price, per_device = _price(question, device)
    problem = _problem(question, machine, space, engine, note)
    usable, replicas, peak, point, floor = 0.0, 0, 0, None, None
    if problem is None:
        floor = next(
            (
                (name, wanted, replica.floor(name))
                for name, wanted in targets.given().items()
                if replica.floor(name) > wanted
            ),
            None,
        )
        usable = 0.0 if floor else replica.usable(targets)
        if usable <= 0:
            problem = _impossible(floor)
        else:
            replicas = max(1, math.ceil(load.rate / usable - 1e-9))
            peak = max(replicas, math.ceil(load.peak / usable - 1e-9))
            point = replica.at(load.rate / replicas)
            if replicas > MOST_REPLICAS:
                problem = f"it would take {replicas:,} replicas"
    bill = None
    if per_device is not None and problem is None:
        bill = costs(
            per_hour=per_device * tp * replicas,
            rate=load.rate,
            usable=usable * replicas,
            prompt=load.prompt,
            output=load.output,
        )
    return Candidate(
        device=device,
        tp=tp,
        scheme=scheme,
        engine=engine,
        engine_note=note,
        machine=machine,
        room=space,
        sequences=fitting,
        max_num_seqs=_seqs(replica, point, seqs),
        replica=replica,
        usable=usable,
        replicas=replicas,
        peak_replicas=peak,
        point=point,
        price=price,
        price_per_hour=per_device,
        costs=bill,
        problem=problem,
        slo_floor=floor,
    )


def _room(question: Question, machine: Machine, engine: Engine | None) -> Room:
    """The memory with the largest steps that leave the cache four requests of the longest context; where none
    do, with those that leave it most."""
    if machine.device.vendor == "cpu":
        limits: tuple[tuple[int, int], ...] = (_CPU_LIMITS,)
    else:
        most = _batched(question, machine)
        limits = ((MAX_SEQS, most), *((seqs, min(most, tokens)) for seqs, tokens in _SMALLER))
    length = context_of(question)
    spaces = [
        room(
            machine,
            utilization=question.utilization,
            max_num_batched_tokens=tokens,
            max_num_seqs=seqs,
            max_model_len=length,
            engine=engine or "vllm",
        )
        for seqs, tokens in limits
    ]
    roomy = (each for each in spaces if each.fits and (each.tokens >= 4 * length or not question.facts.kv))
    return next(roomy, spaces[-1])


def _seqs(replica: Replica, point: Point | None, most: int) -> int:
    """--max-num-seqs: twice what is under way, in steps of eight, at most what the cache holds."""
    wanted = most if point is None else 8 * math.ceil(2 * point.sequences / 8)
    return max(1, min(wanted, replica.most, most))


def _batched(question: Question, machine: Machine) -> int:
    """--max-num-batched-tokens: the largest power of two, from 512 to the default, of which a step's prompts
    keep those that decode within the target for the time between tokens."""
    limits = [value for name, value in question.targets.given().items() if name.startswith("itl")]
    tokens = MAX_BATCHED
    while limits and tokens > 512 and machine.prefill(tokens) > min(limits):
        tokens //= 2
    return tokens


def _price(question: Question, device: Device) -> tuple[Price | None, int | None]:
    if question.price_per_hour is not None:
        return None, question.price_per_hour
    price = device.price
    return price, price.per_hour if price else None


def _problem(
    question: Question, machine: Machine, space: Room, engine: Engine | None, note: str
) -> str | None:
    """Why it does not do, before any speed is considered."""
    facts, tp, device = machine.facts, machine.tp, machine.device
    if (unfit := facts.tp_problem(tp)) is not None:
        return f"tensor parallel {tp}: {unfit}"
    if tp > device.node:
        return f"tensor parallel {tp} is more than the {device.node} devices of a machine"
    if engine is None:
        return note
    if not space.fits:
        if space.limit < space.weights:
            return f"its weights alone take {_gb(space.weights)} of the {_gb(space.limit)} that may be used"
        if space.kv_cache <= 0:
            return (
                f"weights ({_gb(space.weights)}), a step ({_gb(space.step)}) and CUDA "
                f"({_gb(space.runtime)}) take "
                f"all of the {_gb(space.limit)} that may be used"
            )
        return (
            f"{_gb(space.kv_cache)} stay for the KV cache, and one request of {space.max_model_len:,} "
            "tokens takes "
            f"{_gb(math.ceil(space.max_model_len / BLOCK) * BLOCK * space.kv_bytes_per_token)}"
        )
    return None


def _impossible(floor: tuple[str, float, float] | None) -> str:
    if floor is None:
        return "its targets cannot be kept at any rate"
    name, wanted, least = floor
    return f"{name} of {wanted * 1000:,.0f} ms cannot be met: a request alone takes {least * 1000:,.0f} ms"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def schemes_of(question: Question) -> Iterator[Scheme]:
    """The format that is decided, else the published one."""
    yield question.scheme or SCHEMES[question.facts.native]


def smaller(question: Question) -> tuple[Scheme, ...]:
    """What would take less: formats to be told of where the published one does not fit."""
    now = next(schemes_of(question))
    names = ("fp8", "int8", "awq")
    return tuple(SCHEMES[name] for name in names if SCHEMES[name].bits < now.bits)


def candidates(question: Question) -> tuple[Candidate, ...]:
    """Every device, and every number of ranks that is not decided."""
    sizes = (question.tp,) if question.tp is not None else TP_SIZES
    found = []
    for device in question.devices:
        for scheme in schemes_of(question):
            for tp in sizes:
                if question.tp is None and (tp > device.node or question.facts.tp_problem(tp)):
                    continue
                found.append(consider(question, device, tp, scheme))
    return tuple(found)


def best(found: tuple[Candidate, ...]) -> Candidate | None:
    """The cheapest that does; without prices, the fewest devices; then the smallest."""
    able = [each for each in found if each.ok]

    def rank(each: Candidate) -> tuple[bool, float, int, float]:
        cost = each.costs.per_hour if each.costs else 0
        return (each.costs is None, cost, each.devices, each.device.memory * each.tp)

    return min(able, key=rank, default=None)
