"""From questions to a plan: the best way for each model, the options side by side, and what they cost.

    Question ─▶ candidates ─▶ best ─┬─ options A, B, C
                                    ├─ break-even against a cloud
                                    └─ engine, and what to watch for

What cannot be done is an error that says by how little, and what would do instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.core.errors import StartupError

from . import catalogue
from .advice import Advice, advise
from .candidates import TP_SIZES, Candidate, best, candidates, consider, schemes_of, smaller
from .facts import Scheme
from .hardware import Device
from .load import IDLE
from .options import Comparison, compare, profile_named
from .prices import BreakEven, break_even
from .question import Question
from .roofline import Fit, fitted


class PlanError(StartupError):
    """What is asked for cannot be had; says what comes nearest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """One model's."""

    question: Question
    chosen: Candidate
    others: tuple[Candidate, ...]
    """Everything that was considered, the chosen one among them."""
    slices: tuple[tuple[str, Candidate], ...]
    """MIG profile → the model in it, for the device that was chosen or that its slices come from."""
    break_even: BreakEven | None
    advice: Advice
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All models of a spec, or one."""

    models: tuple[ModelPlan, ...]
    comparison: Comparison
    fit: Fit

    @property
    def per_hour(self) -> int | None:
        """Nanodollars; None where a price is missing."""
        bills = [model.chosen.costs for model in self.models]
        if any(bill is None for bill in bills):
            return None
        return sum(bill.per_hour for bill in bills if bill is not None)


def plan(questions: Sequence[Question]) -> Plan:
    """Answer. Raises PlanError for the first model for which there is no way."""
    models = tuple(_one(question) for question in questions)
    comparison = compare(
        [model.question for model in models],
        [model.chosen for model in models],
        _cut(models),
    )
    return Plan(models, comparison, fitted())


def _cut(models: Sequence[ModelPlan]) -> Device:
    """The device whose slices are compared: the first chosen one that can be cut, else A100-80GB, which the
    documents cut."""
    for model in models:
        if model.chosen.device.mig:
            return model.chosen.device
    return catalogue.find_device("A100-80GB")


def _one(question: Question) -> ModelPlan:
    if question.max_model_len is not None and question.max_model_len > question.facts.context_length:
        raise PlanError(
            f"--max-model-len {question.max_model_len:,} is longer than the context of {question.name}, "
            f"{question.facts.context_length:,} tokens.",
            param="--max-model-len",
            advice=f"Use {question.facts.context_length:,} or less.",
        )
    wanted = question.workload.prompt + question.workload.output
    most = question.max_model_len or question.facts.context_length
    if wanted > most:
        raise PlanError(
            f"A prompt of {question.workload.prompt:,} and an answer of {question.workload.output:,} "
            "tokens are "
            f"{wanted:,}, and {question.name} takes {most:,}.",
            param="--prompt",
            advice="Shorten them, or take a model with a longer context.",
        )
    if question.mig is not None:
        device = question.devices[0]
        profile = profile_named(device, question.mig)
        share = replace(
            question,
            devices=(device.sliced(profile),),
            tp=1,
            price_per_hour=_slice_price(question, device, profile.compute),
        )
        found = candidates(share)
    else:
        found = candidates(question)
    chosen = best(found)
    if chosen is None:
        raise _nothing(question, found)
    load = question.workload
    even = None
    if question.cloud is not None and chosen.costs is not None:
        even = break_even(
            question.cloud,
            per_hour=chosen.costs.per_hour,
            rate=load.rate,
            usable=chosen.usable * chosen.replicas,
            prompt=load.prompt,
            output=load.output,
        )
    cut = chosen.device if chosen.device.mig else None
    slices: tuple[tuple[str, Candidate], ...] = ()
    if cut is not None:
        from .options import in_slices

        slices = tuple((profile.name, each) for profile, each in in_slices(question, cut))
    used = chosen.point.utilisation if chosen.point else 0.0
    return ModelPlan(
        question=question,
        chosen=chosen,
        others=found,
        slices=slices,
        break_even=even,
        advice=advise(
            engine=chosen.engine,
            note=chosen.engine_note,
            rate=load.rate,
            tp=chosen.tp,
            vendor=chosen.device.vendor,
            utilisation=used,
            parameters=question.facts.parameters,
        ),
        notes=_notes(question, chosen),
    )


def _slice_price(question: Question, device: Device, compute: int) -> int | None:
    """A slice's part of the device's price, by compute slices."""
    whole = question.price_per_hour
    if whole is None:
        whole = device.price.per_hour if device.price else None
    return None if whole is None else whole * compute // 7


def _notes(question: Question, chosen: Candidate) -> tuple[str, ...]:
    notes = list(question.assumed)
    space = chosen.room
    if chosen.engine_note:
        notes.append(chosen.engine_note)
    if chosen.price is not None:
        notes.append(
            f"price: {chosen.price.what}, {chosen.price.as_of.isoformat()} ({chosen.price.source})"
            + (f"; sold as {chosen.price.node} devices together" if chosen.price.node > 1 else "")
        )
    elif chosen.price_per_hour is None:
        notes.append(f"there is no dated price of {chosen.device.name} in the catalogue: give --price")
    if chosen.engine == "penstock" and chosen.device.vendor != "cpu":
        notes.append(
            "our engine has not been measured on GPUs: these speeds are what vLLM, TensorRT-LLM and gpt-fast "
            "show; take --engine vllm, or measure ours first"
        )
    if space.runtime:
        notes.append(
            f"{space.runtime / 1e9:.1f} GB for CUDA, graphs and buffers are an assumption; activations "
            "are an "
            "upper bound"
        )
    if chosen.point is not None and chosen.point.utilisation < IDLE:
        notes.append(
            f"replicas are used to {chosen.point.utilisation:.0%}; 70-85 % is what to aim at, and less "
            "pays for "
            "time in which nothing is done"
        )
    peak = chosen.peak_replicas * chosen.tp
    if question.count is not None and peak > question.count:
        notes.append(
            f"this takes {chosen.devices} devices, {peak} at the peak, and the pool has {question.count}"
        )
    if chosen.replicas == 1:
        notes.append("one replica is no high availability: a second one carries on when it fails")
    if chosen.scheme.name not in ("none", question.facts.native):
        notes.append(
            f"{chosen.scheme.name}: compare it with full precision on your own evaluation set before "
            "traffic moves"
        )
    at_risk = [
        name
        for name, value in question.targets.given().items()
        if chosen.point is not None and chosen.point.of(name) / fitted().low > value
    ]
    if at_risk:
        notes.append(
            f"{', '.join(at_risk)}: kept at the centre of the error bar, not at its slow end; measure "
            "before you "
            "promise it"
        )
    return tuple(notes)


def _nothing(question: Question, found: tuple[Candidate, ...]) -> PlanError:
    """No way: why, and what comes nearest."""
    floors = [each for each in found if each.slo_floor is not None]
    able = [each for each in found if each.slo_floor is None and each.problem]
    where = ", ".join(dict.fromkeys(device.name for device in question.devices)) or "nothing"
    if floors:
        nearest = min(floors, key=lambda each: each.slo_floor[2] / each.slo_floor[1] if each.slo_floor else 0)
        assert nearest.slo_floor is not None
        name, wanted, least = nearest.slo_floor
        bar = fitted()
        return PlanError(
            f"{question.name}: {name} of {wanted * 1000:,.0f} ms cannot be met on {where}: its floor, "
            "one request "
            f"alone on {nearest.tp} x {nearest.device.name}, is {least * 1000:,.0f} ms "
            f"({least * bar.low * 1000:,.0f} to {least / bar.low * 1000:,.0f} with the error bar).",
            param=f"--{name.replace('_', '-')}",
            advice=_faster(question, name, wanted),
        )
    if question.tp is not None and (unfit := question.facts.tp_problem(question.tp)):
        sizes = [str(size) for size in TP_SIZES if question.facts.tp_problem(size) is None]
        return PlanError(
            f"{question.name}: --tp {question.tp}: {unfit}.",
            param="--tp",
            advice=f"Use {' or '.join(sizes)}.",
        )
    largest = max(able, key=lambda each: each.tp * each.device.memory, default=None)
    why = f"{largest.tp} x {largest.device.name}: {largest.problem}" if largest else "nothing was considered"
    return PlanError(
        f"{question.name} cannot be served on {where} ({why}).",
        param="--gpu",
        advice=_nearest(question),
    )


def _faster(question: Question, name: str, wanted: float) -> str:
    """What would keep a target."""
    wider = replace(question, devices=tuple(_all()), tp=None, price_per_hour=None, count=None, mig=None)
    found = best(candidates(wider))
    if found is not None:
        return f"{found.tp} x {found.device.name} would; or relax it."
    return f"Nothing in the catalogue keeps it; relax --{name.replace('_', '-')}, or shorten the prompt."


def _nearest(question: Question) -> str:
    """The nearest thing that would do: more ranks, a smaller format, another device."""
    published = tuple(schemes_of(question))
    ways = [(devices, (*published, *smaller(question))) for devices in (list(question.devices), list(_all()))]
    for devices, scheme in ((devices, scheme) for devices, schemes in ways for scheme in schemes):
        found = _first(question, devices, (scheme,))
        if found is not None:
            how = "" if found.scheme in published else f" in {found.scheme.name}"
            flags = f"--gpu {found.device.name} --tp {found.tp}"
            flags += f" --quantization {found.scheme.name}" if how else ""
            many = "" if found.replicas == 1 else f"{found.replicas} replicas of "
            return f"The nearest that does: {many}{found.tp} x {found.device.name}{how} ({flags})."
    largest = max(_all(), key=lambda device: device.memory * device.node)
    scheme = min((*smaller(question), *schemes_of(question)), key=lambda each: each.bits)
    size = question.facts.weight_bytes(scheme)
    return (
        f"Nothing on one machine does: in {scheme.name} its weights are {size / 1e9:,.0f} GB, and "
        f"{largest.node} x {largest.name} have {largest.node * largest.memory / 1e9:,.0f} GB. That "
        "takes several "
        "machines (pipeline parallel, with vLLM)."
    )


def _first(question: Question, devices: Sequence[Device], schemes: Sequence[Scheme]) -> Candidate | None:
    """The smallest that does."""
    found = []
    for scheme in schemes:
        for device in devices:
            for tp in TP_SIZES:
                if tp <= device.node and question.facts.tp_problem(tp) is None:
                    free = replace(question, price_per_hour=None, mig=None, tp=None)
                    each = consider(free, device, tp, scheme)
                    if each.ok:
                        found.append(each)
                        break
    return min(found, key=lambda each: (each.devices * each.device.memory, -each.scheme.bits), default=None)


def _all() -> Sequence[Device]:
    return [device for device in catalogue.devices().values() if device.vendor == "nvidia"]
