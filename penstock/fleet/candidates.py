"""One way to serve a model: devices, ranks, format; what fits, how fast it is, how many it takes, what it
costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import schemes
from .facts import SCHEMES, ModelFacts, Scheme
from .hardware import Device, Price, gb
from .load import Point, Replica, Targets
from .prices import Costs, costs
from .question import Engine, Question, engine_for
from .roofline import Machine
from .sizing import Room, room, sequences_of

TP_SIZES = (1, 2, 4, 8)
MAX_BATCHED = 8192
"""Default of --max-num-batched-tokens on CUDA, of both engines."""
MAX_SEQS = 256
"""Default of --max-num-seqs on CUDA."""
CPU_SEQS, CPU_BATCHED = 64, 256
"""(max_num_seqs, max_num_batched_tokens) of our engine on a CPU."""
CAPACITY = "capacity"
"""What bounds a replica's rate where no target does: BUSY of what it can do."""
_SMALLER = ((128, 4096), (64, 2048), (32, 1024), (32, 512))
"""(max_num_seqs, max_num_batched_tokens) where memory is scarce: what a step takes is in proportion."""
MOST_REPLICAS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way, and what becomes of it. `problem` says why it does not do."""

    device: Device
    tp: int
    stages: int
    """Parts of the layers, each on `tp` devices."""
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
        return self.replicas * self.each

    @property
    def each(self) -> int:
        """Devices of a replica."""
        return self.tp * self.stages

    @property
    def burst(self) -> int:
        """Replicas beyond those of the average rate, at the busiest."""
        return self.peak_replicas - self.replicas

    def burst_per_hour(self, question: Question) -> int | None:
        """Nanodollars of what runs beyond the average rate at the busiest, by the price of the pool that it
        is on; None where that is not known."""
        burst = question.decided.burst
        price = self.price_per_hour if burst is None else burst.price_per_hour
        return None if price is None else price * self.each * self.burst

    @property
    def ok(self) -> bool:
        return self.problem is None

    def bound(self, targets: Targets) -> str:
        """What keeps a replica from a higher rate: the target that breaks first, or CAPACITY."""
        alone = {
            name: self.replica.usable(Targets(**{name: value})) for name, value in targets.given().items()
        }
        first = min(alone, key=lambda name: alone[name], default=CAPACITY)
        return first if first in alone and alone[first] < self.replica.usable(Targets()) else CAPACITY


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
        efficiency=question.fit.efficiency,
    )


def context_of(question: Question) -> int:
    """--max-model-len: as given, else the power of two that holds the longest request."""
    if question.max_model_len is not None:
        return question.max_model_len
    wanted = question.longest or question.workload.prompt + question.workload.output
    return max(1, min(question.facts.context_length, 1 << max(0, wanted - 1).bit_length()))


def consider(question: Question, device: Device, tp: int, scheme: Scheme) -> Candidate:
    """Work out one way."""
    load, targets = question.workload, question.targets
    machine, stages = machine_of(question, device, tp, scheme), question.stages
    engine, note = engine_for(question, device, tp * stages, scheme)
    if engine == "penstock" and device.vendor != "cpu":
        machine = replace(machine, expanded=True)
    stage = replace(machine, facts=part(machine.facts, stages))
    space = _room(question, stage, engine)
    seqs = space.max_num_seqs
    whole = load.prompt + load.output
    fitting = sequences_of(stage, space.kv_cache, whole) if question.facts.kv else seqs
    output = load.output if question.facts.kv else 0
    replica = Replica(machine, min(fitting, seqs), load.prompt, output, stages)
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
            replicas = max(question.decided.replicas or 1, math.ceil(load.rate / usable - 1e-9))
            peak = max(replicas, math.ceil(load.peak / usable - 1e-9))
            point = replica.at(load.rate / replicas)
            if replicas > MOST_REPLICAS:
                problem = f"it would take {replicas:,} replicas"
    bill = None
    if per_device is not None and problem is None:
        bill = costs(
            per_hour=per_device * tp * stages * replicas,
            rate=load.rate,
            usable=usable * replicas,
            prompt=load.prompt,
            output=load.output,
        )
    return Candidate(
        device=device,
        tp=tp,
        stages=stages,
        scheme=scheme,
        engine=engine,
        engine_note=note,
        machine=machine,
        room=space,
        sequences=fitting,
        max_num_seqs=question.decided.max_num_seqs or _seqs(question, replica, usable, seqs),
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
        limits: tuple[tuple[int, int], ...] = ((CPU_SEQS, CPU_BATCHED),)
    else:
        most = _batched(question, machine)
        limits = ((MAX_SEQS, most), *((seqs, min(most, tokens)) for seqs, tokens in _SMALLER))
    length = context_of(question)
    decided = question.decided
    if decided.max_num_seqs is not None or decided.max_num_batched_tokens is not None:
        seqs, tokens = limits[0]
        limits = ((decided.max_num_seqs or seqs, decided.max_num_batched_tokens or tokens),)
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
    if decided.kv_cache is not None:
        spaces = [replace(each, kv_cache=min(each.kv_cache, decided.kv_cache)) for each in spaces]
    roomy = (each for each in spaces if each.fits and (each.tokens >= 4 * length or not question.facts.kv))
    return next(roomy, spaces[-1])


def _seqs(question: Question, replica: Replica, usable: float, most: int) -> int:
    """--max-num-seqs: what the cache holds; with targets at most what is under way where the rate is the
    highest that keeps them, in steps of eight. More would run, and each too slowly; they wait in the queue.
    It does not hang on the rate: what is right for little load must be right for much."""
    most = max(1, min(most, replica.most))
    point = replica.at(usable) if usable > 0 and question.facts.kv and question.targets.given() else None
    return most if point is None else min(most, 8 * math.ceil(point.sequences / 8))


def part(facts: ModelFacts, stages: int) -> ModelFacts:
    """What one of several stages holds: its share of the layers, rounded up; embeddings and head count for
    each."""
    if stages == 1:
        return facts
    return replace(
        facts,
        num_layers=math.ceil(facts.num_layers / stages),
        weights=tuple(replace(each, copies=math.ceil(each.copies / stages)) for each in facts.weights),
        kv=tuple(replace(each, layers=math.ceil(each.layers / stages)) for each in facts.kv),
    )


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
    node = question.decided.node_devices or device.node
    if tp * question.stages > node * question.decided.nodes:
        machines = "a machine" if question.decided.nodes == 1 else f"{question.decided.nodes} machines"
        stages = f" in {question.stages} stages" if question.stages > 1 else ""
        return (
            f"tensor parallel {tp}{stages} is more than the {node * question.decided.nodes} devices of "
            f"{machines}"
        )
    if engine is None:
        return note
    if not space.fits:
        if space.limit < space.weights:
            return f"its weights alone take {gb(space.weights)} of the {gb(space.limit)} that may be used"
        if space.kv_cache <= 0:
            return (
                f"weights ({gb(space.weights)}), a step ({gb(space.step)}) and CUDA ({gb(space.runtime)}) "
                f"take all of the {gb(space.limit)} that may be used"
            )
        would = f"; {question.names.setting(max_model_len=space.tokens)} would fit" if space.tokens else ""
        return (
            f"{gb(space.kv_cache)} stay for the KV cache, which holds {space.tokens:,} tokens, and one "
            f"request may have {space.max_model_len:,}{would}"
        )
    return None


def _impossible(floor: tuple[str, float, float] | None) -> str:
    if floor is None:
        return "its targets cannot be kept at any rate"
    name, wanted, least = floor
    return f"{name} of {wanted * 1000:,.0f} ms cannot be met: a request alone takes {least * 1000:,.0f} ms"


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
        formats = [*schemes_of(question)]
        if question.auto and question.facts.native == "none":
            formats.append(SCHEMES[schemes.suited(device)])
        for scheme in formats:
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
