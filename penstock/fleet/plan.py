"""From questions to a plan: the best way for each model, the options side by side, and what they cost.

    Question ─▶ candidates ─▶ best ─┬─ options A, B, C
                                    ├─ break-even against a cloud
                                    └─ engine, and what to watch for

What cannot be done is an error that says by how little, and what would do instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.core.errors import StartupError

from . import catalogue, schemes
from .advice import Advice, advise
from .asked import whole
from .candidates import TP_SIZES, Candidate, best, candidates, consider, schemes_of, smaller
from .facts import SCHEMES, Scheme
from .hardware import Device
from .load import IDLE
from .options import Comparison, compare
from .prices import BreakEven, break_even
from .question import Question
from .roofline import Fit

_TRICKLE = 1e-6
"""Requests a second that any replica carries."""


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
    models = _counted(tuple(_one(question) for question in questions))
    comparison = compare(
        [model.question for model in models],
        [model.chosen for model in models],
        _cut(models),
    )
    return Plan(models, comparison, questions[0].fit)


def _counted(models: tuple[ModelPlan, ...]) -> tuple[ModelPlan, ...]:
    """With a note where a pool has fewer devices than its models take together."""
    counts: dict[str, int] = {}
    takes: dict[str, list[tuple[str, int, int]]] = {}
    for model in models:
        question, chosen = model.question, model.chosen
        decided, tp = question.decided, chosen.each
        if question.count is None:
            continue
        counts[decided.pool] = question.count
        beyond = chosen.burst * tp
        if decided.burst is not None:
            counts[decided.burst.pool] = decided.burst.count
            takes.setdefault(decided.burst.pool, []).append((question.name, 0, beyond))
            beyond = 0
        takes.setdefault(decided.pool, []).append((question.name, chosen.devices, chosen.devices + beyond))
    notes: dict[str, list[str]] = {}
    for pool, some in takes.items():
        average, peak = sum(each[1] for each in some), sum(each[2] for each in some)
        if peak > counts[pool]:
            who = "this takes" if len(some) == 1 else f"{', '.join(each[0] for each in some)} together take"
            name = f"pool {pool}" if pool else "the pool"
            text = f"{who} {average} devices, {peak} at the peak, and {name} has {counts[pool]}"
            if not average:
                text = f"at the peak {who} {peak} devices of pool {pool}, which has {counts[pool]}"
            for model_name, _, _ in some:
                notes.setdefault(model_name, []).append(text)
    return tuple(
        replace(model, notes=(*model.notes, *notes.get(model.question.name, ()))) for model in models
    )


def _cut(models: Sequence[ModelPlan]) -> Device:
    """The device whose slices are compared: the first chosen one that can be cut, else A100-80GB, which the
    documents cut."""
    for model in models:
        if model.chosen.device.mig:
            return model.chosen.device
    return catalogue.find_device("A100-80GB")


def _checked(question: Question) -> None:
    """Raises PlanError for contexts that the model does not have, and requests that it does not hold."""
    names, load, facts = question.names, question.workload, question.facts
    length = question.max_model_len
    if length is not None and length > facts.context_length:
        raise PlanError(
            f"{names.setting(max_model_len=f'{length:,}')} is longer than the context of {question.name}, "
            f"{facts.context_length:,} tokens.",
            param=names["max_model_len"],
            advice=f"Use {facts.context_length} or less.",
        )
    wanted = load.prompt + load.output
    if length is not None and wanted > length:
        raise PlanError(
            f"{names.setting(max_model_len=f'{length:,}')} does not hold a prompt of {load.prompt:,} and "
            f"an answer of {load.output:,} tokens, which are {wanted:,}.",
            param=names["max_model_len"],
            advice=f"Use {wanted} or more, or shorten them ({names['prompt']}, {names['output']}).",
        )
    if wanted > facts.context_length:
        raise PlanError(
            f"A prompt of {load.prompt:,} and an answer of {load.output:,} tokens are {wanted:,}, and "
            f"{question.name} takes {facts.context_length:,}.",
            param=names["prompt"],
            advice="Shorten them, or take a model with a longer context.",
        )


def _carried(question: Question) -> Question:
    """Where nobody says how many requests come, no more than the replicas carry that a spec has decided."""
    replicas, load = question.decided.replicas, question.workload
    if "rate" not in question.assumed or replicas is None:
        return question
    trickle = replace(load, rate=_TRICKLE, peak=_TRICKLE)
    alone = best(candidates(whole(replace(question, workload=trickle))))
    if alone is None or (carried := _floor(alone.usable * replicas)) >= load.rate:
        return question
    assumed = dict(question.assumed)
    assumed["rate"] = (
        f"assumed: {carried:g} requests a second, the most that "
        f"{'1 replica carries' if replicas == 1 else f'{replicas} replicas carry'} ({question.names['rate']})"
    )
    peak = load.peak
    if "peak" in assumed:
        peak = min(2 * carried, _floor(alone.usable * (question.decided.most or replicas)))
        assumed["peak"] = f"assumed: {peak:g} requests a second at the peak ({question.names['peak']})"
    return replace(question, workload=replace(load, rate=carried, peak=peak), assumed=assumed)


def _floor(rate: float) -> float:
    """Three digits, rounded down."""
    unit = 10.0 ** (math.floor(math.log10(rate)) - 2) if rate > 0 else 1.0
    return float(f"{math.floor(rate / unit * (1 - 1e-9)) * unit:.3g}")


def _one(question: Question) -> ModelPlan:
    _checked(question)
    question = _carried(question)
    found = candidates(whole(question))
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
            tp=chosen.each,
            vendor=chosen.device.vendor,
            utilisation=used,
            parameters=question.facts.parameters,
        ),
        notes=_notes(question, chosen),
    )


def _notes(question: Question, chosen: Candidate) -> tuple[str, ...]:
    notes = [*question.decided.words, *question.assumed.values()]
    space = chosen.room
    if not catalogue.compared(question.facts.name):
        notes.append(
            f"the catalogue's config of {question.facts.name} was written from memory and compared with no "
            "other copy; a folder with the model's own config.json, named in its place, is sure"
        )
    if chosen.engine_note:
        notes.append(chosen.engine_note)
    if chosen.price is not None:
        notes.append(
            f"price: {chosen.price.what}, {chosen.price.as_of.isoformat()} ({chosen.price.source})"
            + (f"; sold as {chosen.price.node} devices together" if chosen.price.node > 1 else "")
        )
    elif chosen.price_per_hour is None:
        notes.append(
            f"there is no dated price of {chosen.device.name} in the catalogue: give "
            f"{question.names['price']}"
        )
    if chosen.engine == "penstock" and chosen.device.vendor != "cpu":
        notes.append(
            "our engine has not been measured on GPUs: these speeds are what vLLM, TensorRT-LLM and gpt-fast "
            f"show; take {question.names.setting(engine='vllm')}, or measure ours first"
        )
    if space.runtime:
        notes.append(
            f"{space.runtime / 1e9:.1f} GB for CUDA, graphs and buffers are an assumption; activations are "
            "an upper bound"
        )
    if chosen.point is not None and chosen.point.utilisation < IDLE:
        notes.append(
            f"replicas are used to {chosen.point.utilisation:.0%}; 70-85 % is what to aim at, and less pays "
            "for time in which nothing is done"
        )
    notes += beyond(question, chosen)
    notes += _unmeasured(question, chosen)
    notes += longer(question, chosen)
    if chosen.replicas == 1:
        notes.append("one replica is no high availability: a second one carries on when it fails")
    if chosen.scheme.name not in ("none", question.facts.native):
        notes.append(
            f"{chosen.scheme.name}: compare it with full precision on your own evaluation set before "
            "traffic moves"
        )
    if (other := _format(question, chosen)) is not None:
        notes.append(other)
    needed = schemes.missing(chosen.engine or "vllm", chosen.scheme.name, question.facts.native)
    if needed is not None:
        notes.append(
            f"{chosen.scheme.name}: {chosen.engine} does not quantise to it at load, so there is no flag for "
            f"it; give it {needed}"
        )
    at_risk = [
        name
        for name, value in question.targets.given().items()
        if chosen.point is not None and chosen.point.of(name) / question.fit.low > value
    ]
    if at_risk:
        notes.append(
            f"{', '.join(at_risk)}: kept at the centre of the error bar, not at its slow end; measure before "
            "you promise it"
        )
    return tuple(notes)


def _format(question: Question, chosen: Candidate) -> str | None:
    """What the scheme that suits the device would be worth, where nobody has decided one."""
    facts, name = question.facts, schemes.suited(chosen.device)
    if question.scheme is not None or question.auto or facts.native != "none" or facts.kind == "embedding":
        return None
    devices = (chosen.device,)
    tried = replace(whole(question), devices=devices, scheme=SCHEMES[name], mig=None)
    found = best(candidates(tried))
    if found is None:
        return None
    now, then = (facts.weight_bytes(each.scheme) / 1e9 for each in (chosen, found))
    worth = f"{then:.1f} GB of weights for {now:.1f}, "
    if found.devices < chosen.devices:
        worth += f"and {found.devices} devices would do in place of {chosen.devices}"
    else:
        worth += f"{found.usable:.3g} requests/s of each replica for {chosen.usable:.3g}"
    how, needed = (
        question.names.setting(quantization=name),
        schemes.missing(found.engine or "vllm", name, "none"),
    )
    if needed is not None and "weights" in question.names.of:
        how = f"{question.names['weights']}: {needed}"
    return f"{name} suits {chosen.device.name}: {worth} ({how})"


def _unmeasured(question: Question, chosen: Candidate) -> list[str]:
    """Where a plan goes beyond what was measured: its error bar says nothing there."""
    measured, load, notes = question.measured, question.workload, []
    if measured is None:
        return []
    if chosen.point is not None and chosen.point.sequences > 1.5 * measured.batch:
        notes.append(
            f"{chosen.point.sequences:.0f} requests are under way in a replica, and {measured.batch:.0f} "
            "were measured: the error bar does not reach there (--measured)"
        )
    if load.prompt + load.output > 1.5 * measured.tokens:
        notes.append(
            f"requests have {load.prompt + load.output} tokens, and {measured.tokens} were measured: the "
            "error bar does not reach there (--measured)"
        )
    return notes


def longer(question: Question, chosen: Candidate) -> list[str]:
    """Where nobody has said how long prompts are, and routes let far longer ones through than are assumed, as
    where documents are retrieved into them: what the longest does to the targets. Compiling tells it, too."""
    load, targets = question.workload, question.targets.given()
    if "prompt" not in question.assumed or question.longest is None or not targets:
        return []
    prompt = question.longest - load.output
    if question.longest < 2 * (load.prompt + load.output):
        return []
    alone = replace(chosen.replica, prompt=prompt)
    first = alone.floor("ttft_p50")
    missed = [name for name, value in targets.items() if alone.floor(name) > value]
    held = "within its targets" if not missed else f"which misses {', '.join(missed)}"
    return [
        f"targets are judged at prompts of {load.prompt:,} tokens, which is assumed; one of {prompt:,}, "
        f"which is let through, takes {first:.3g} s to its first token if it is alone, {held}. "
        f"{question.names['prompt']} says how long they are"
    ]


def beyond(question: Question, chosen: Candidate) -> list[str]:
    """Where the load takes more replicas than a spec has decided; for `penstock compile`, too."""
    decided, notes, rate = question.decided, [], question.names["rate"]
    if decided.replicas is not None and chosen.replicas > decided.replicas:
        notes.append(
            f"models.{question.name}.replicas is {decided.replicas}, and the average rate takes "
            f"{chosen.replicas} ({rate}): planned with those"
        )
    if decided.most is not None and chosen.peak_replicas > decided.most:
        notes.append(
            f"models.{question.name}.scale.max is {decided.most}, and the peak takes {chosen.peak_replicas}"
        )
    if decided.fixed and chosen.burst:
        notes.append(
            f"there are always {chosen.replicas} replicas, and the peak takes {chosen.peak_replicas}: "
            f"models.{question.name}.scale would start them"
        )
    if decided.burst is not None and decided.burst.price_per_hour is None and chosen.burst:
        notes.append(f"pool {decided.burst.pool} has no price: what runs there at the peak is in no dollars")
    if decided.nodes > 1:
        notes.append(
            f"each replica is on {decided.nodes} nodes: what the network between them takes is not in these "
            "speeds"
        )
    return notes


def _nothing(question: Question, found: tuple[Candidate, ...]) -> PlanError:
    """No way: why, and what comes nearest."""
    floors = [each for each in found if each.slo_floor is not None]
    able = [each for each in found if each.slo_floor is None and each.problem]
    where = ", ".join(dict.fromkeys(device.name for device in question.devices)) or "nothing"
    if floors:
        nearest = min(floors, key=lambda each: each.slo_floor[2] / each.slo_floor[1] if each.slo_floor else 0)
        assert nearest.slo_floor is not None
        name, wanted, least = nearest.slo_floor
        bar = question.fit
        return PlanError(
            f"{question.name}: {name} of {wanted * 1000:,.0f} ms cannot be met on {where}: its floor, one "
            f"request alone on {nearest.each} x {nearest.device.name}, is {least * 1000:,.0f} ms "
            f"({least * bar.low * 1000:,.0f} to {least / bar.low * 1000:,.0f} with the error bar).",
            param=question.names[name],
            advice=_faster(question, name, wanted),
        )
    if question.tp is not None and (unfit := question.facts.tp_problem(question.tp)):
        sizes = [str(size) for size in TP_SIZES if question.facts.tp_problem(size) is None]
        return PlanError(
            f"{question.name}: {question.names.setting(tp=question.tp)}: {unfit}.",
            param=question.names["tp"],
            advice=f"Use {' or '.join(sizes)}.",
        )
    largest = max(able, key=lambda each: each.tp * each.device.memory, default=None)
    why = (
        f"{largest.each} x {largest.device.name}: {largest.problem}" if largest else "nothing was considered"
    )
    return PlanError(
        f"{question.name} cannot be served on {where} ({why}).",
        param=question.names["gpu"],
        advice=_nearest(question),
    )


def _faster(question: Question, name: str, wanted: float) -> str:
    """What would keep a target."""
    found = best(candidates(_free(question, _all())))
    if found is not None:
        how = question.names.setting(gpu=found.device.name, tp=found.tp)
        return f"{found.tp} x {found.device.name} would ({how}); or relax it."
    return f"Nothing in the catalogue keeps it; relax {question.names[name]}, or shorten the prompt."


def _free(question: Question, devices: Sequence[Device]) -> Question:
    """On any of these devices, in any number on one machine."""
    decided = replace(question.decided, stages=1, nodes=1, node_devices=None, kv_cache=None)
    load = question.workload
    if "rate" in question.assumed and decided.replicas is not None:
        load = replace(load, rate=_TRICKLE, peak=_TRICKLE)
    return replace(
        question,
        workload=load,
        devices=devices,
        tp=None,
        price_per_hour=None,
        count=None,
        mig=None,
        decided=decided,
    )


def _nearest(question: Question) -> str:
    """The nearest thing that would do: more ranks, a smaller format, another device."""
    published = tuple(schemes_of(question))
    ways = [(devices, (*published, *smaller(question))) for devices in (list(question.devices), list(_all()))]
    for devices, scheme in ((devices, scheme) for devices, formats in ways for scheme in formats):
        found = _first(question, devices, (scheme,))
        if found is not None:
            many = "" if found.replicas == 1 else f"{found.replicas} replicas of "
            return f"The nearest that does: {many}{found.tp} x {found.device.name}{_how(question, found)}."
    largest = max(_all(), key=lambda device: device.memory * device.node)
    scheme = min((*smaller(question), *schemes_of(question)), key=lambda each: each.bits)
    size = question.facts.weight_bytes(scheme)
    return (
        f"Nothing on one machine does: in {scheme.name} its weights are {size / 1e9:,.0f} GB, and "
        f"{largest.node} x {largest.name} have {largest.node * largest.memory / 1e9:,.0f} GB. That takes "
        "several machines (pipeline parallel, with vLLM)."
    )


def _how(question: Question, found: Candidate) -> str:
    """In which format, and how that is written."""
    names, native = question.names, question.facts.native
    where = names.setting(gpu=found.device.name, tp=found.tp)
    gone = ((question.mig, "mig"), (question.decided.nodes > 1, "nodes"))
    where += "".join(f", no {names.of[what]}" for given, what in gone if given and what in names.of)
    if found.scheme in schemes_of(question):
        return f" ({where})"
    needed = schemes.missing(found.engine or "vllm", found.scheme.name, native)
    if needed is None or "quantization" not in question.names.of:
        flags = " " if where.startswith("--") else ", "
        return f" in {found.scheme.name} ({where}{flags}{names.setting(quantization=found.scheme.name)})"
    return f" in {found.scheme.name} ({where}, {names['weights']}: {needed})"


def _first(question: Question, devices: Sequence[Device], formats: Sequence[Scheme]) -> Candidate | None:
    """The smallest that does."""
    found = []
    for scheme in formats:
        for device in devices:
            for tp in TP_SIZES:
                if tp <= device.node and question.facts.tp_problem(tp) is None:
                    each = consider(_free(question, devices), device, tp, scheme)
                    if each.ok:
                        found.append(each)
                        break
    return min(found, key=lambda each: (each.devices * each.device.memory, -each.scheme.bits), default=None)


def _all() -> Sequence[Device]:
    return [device for device in catalogue.devices().values() if device.vendor == "nvidia"]
