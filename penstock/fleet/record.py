"""A plan as plain data: what `--json` prints, and what table and page are drawn from.

Bytes and seconds are numbers, money is dollars as decimal text (whole nanodollars), rates are per second.
Every estimate stands as {"expected", "low", "high"}: the error bar of the back-test.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from . import schemes
from .advice import ENGINES
from .candidates import Candidate, best
from .facts import SCHEMES
from .options import Comparison, Option
from .plan import ModelPlan, Plan
from .prices import BreakEven
from .question import Question

VERSION = 1
_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def record(plan: Plan) -> dict[str, Any]:
    """The whole plan."""
    fit = plan.fit
    return {
        "version": VERSION,
        "units": {"GB": "10^9 bytes", "GiB": "2^30 bytes", "money": "US dollars", "time": "seconds"},
        "models": [_model(model, plan) for model in plan.models],
        "options": _comparison(plan.comparison),
        "dollars_per_hour": dollars(plan.per_hour),
        "roofline": {
            "memory_efficiency": fit.memory,
            "compute_efficiency": fit.compute,
            "step_seconds": fit.step,
            "all_reduce_seconds": fit.all_reduce,
            "error_bar": {
                "low": fit.low,
                "high": fit.high,
                "of": "measured / predicted, all of them, each left out once"
                if plan.models[0].question.measured
                else "measured / predicted, 10th to 90th percentile",
            },
            "measurements": fit.count,
            "measured": "here" if plan.models[0].question.measured else "published",
        },
        "engines": [{"name": each.name, "choose_it_for": each.choose} for each in ENGINES],
    }


def dollars(amount: int | None) -> str | None:
    """Nanodollars → "3.99"."""
    if amount is None:
        return None
    text = f"{Decimal(amount) / 10**9:.9f}".rstrip("0").rstrip(".")
    return text or "0"


def _model(model: ModelPlan, plan: Plan) -> dict[str, Any]:
    question, chosen = model.question, model.chosen
    facts, load = question.facts, question.workload
    low, high = plan.fit.low, plan.fit.high
    point = chosen.point

    def slower(seconds: float | None) -> dict[str, float] | None:
        """A time, whose high end is the slow one."""
        if seconds is None:
            return None
        return {"expected": _r(seconds), "low": _r(seconds / high), "high": _r(seconds / low)}

    best_rate = chosen.usable * chosen.replicas
    return {
        "name": question.name,
        "model": {
            "id": facts.name,
            "architecture": facts.architecture,
            "kind": facts.kind,
            "parameters": facts.parameters,
            "active_parameters": facts.active_parameters,
            "experts": facts.experts,
            "experts_used": facts.experts_used,
            "context_length": facts.context_length,
            "kv_bytes_per_token": facts.kv_bytes_per_token(chosen.machine.kv_width),
            "weight_bytes": {
                name: facts.weight_bytes(scheme, width=chosen.machine.width)
                for name, scheme in SCHEMES.items()
                if name in ("none", "int8", "fp8", "awq", facts.native)
            },
            "published_as": facts.native,
        },
        "workload": {
            "requests_per_second": load.rate,
            "peak_requests_per_second": load.peak,
            "prompt_tokens": load.prompt,
            "output_tokens": load.output,
            "longest_request_tokens": question.longest or load.prompt + load.output,
            "targets": question.targets.given(),
        },
        "engine": {
            "name": chosen.engine,
            "advice": model.advice.engine,
            "reasons": list(model.advice.reasons),
            "warnings": list(model.advice.warnings),
        },
        "devices": {
            "kind": chosen.device.name,
            "tensor_parallel": chosen.tp,
            "pipeline_parallel": chosen.stages,
            "quantization": chosen.scheme.name,
            "replicas": chosen.replicas,
            "replicas_driven_by": driver(question, chosen),
            "replica_bound_by": chosen.bound(question.targets),
            "requests_per_second_of_a_replica": _r(chosen.usable),
            "on_demand_replicas": chosen.replicas,
            "spot_burst_replicas": chosen.burst,
            "burst_pool": question.decided.burst.pool if question.decided.burst else None,
            "count": chosen.devices,
        },
        "memory_per_device": _memory(chosen),
        "capacity": {
            "kv_tokens": chosen.room.tokens,
            "sequences": chosen.sequences,
            "sequences_at_max_model_len": chosen.room.tokens // chosen.room.max_model_len
            if chosen.room.max_model_len
            else 0,
            "by_context": {
                str(length): chosen.room.tokens // length
                for length in _CONTEXTS
                if length <= facts.context_length and facts.kv
            },
        },
        "flags": flags(chosen, question.decided.kv_cache),
        "expected": {
            "ttft_p50": slower(point.ttft_p50 if point else None),
            "ttft_p95": slower(point.ttft_p95 if point else None),
            "ttft_p99": slower(point.ttft_p99 if point else None),
            "tpot": slower(point.tpot if point else None),
            "e2e_p50": slower(point.e2e_p50 if point else None),
            "e2e_p99": slower(point.e2e_p99 if point else None),
            "sequences_under_way": _r(point.sequences) if point else None,
            "utilisation": _r(point.utilisation) if point else None,
            "output_tokens_per_second": _r(load.rate * load.output),
            "most_requests_per_second": {
                "expected": _r(best_rate),
                "low": _r(best_rate * low),
                "high": _r(best_rate * high),
            },
        },
        "price": _price(chosen),
        "costs": {
            "dollars_per_hour": dollars(chosen.costs.per_hour),
            "dollars_per_hour_of_burst": dollars(chosen.burst_per_hour(question)),
            "dollars_per_month": dollars(chosen.costs.per_month),
            "dollars_per_million_tokens": dollars(chosen.costs.per_million_tokens),
            "dollars_per_million_output_tokens": dollars(chosen.costs.per_million_output),
            "dollars_per_thousand_requests": dollars(chosen.costs.per_thousand_requests),
            "dollars_per_thousand_requests_when_full": dollars(chosen.costs.full_per_thousand_requests),
        }
        if chosen.costs
        else None,
        "against_cloud": _even(model.break_even),
        "alternatives": [_alternative(each) for each in model.others],
        "mig": [_slice(name, each) for name, each in model.slices],
        "notes": list(model.notes),
        "chosen_because": "cheapest that keeps every target"
        if best(model.others) is chosen and chosen.costs
        else "fewest devices that keep every target",
    }


def driver(question: Question, chosen: Candidate) -> str:
    """What the number of replicas comes from: a target, CAPACITY, `spec` where it names more than the load
    takes, or `least` where one carries it."""
    if chosen.replicas == 1 and question.decided.replicas in (None, 1):
        return "least"
    if question.decided.replicas == chosen.replicas:
        return "spec"
    return chosen.bound(question.targets)


def flags(candidate: Candidate, kv_cache: int | None = None) -> dict[str, Any]:
    """Of `penstock serve` or `vllm serve`. `kv_cache`: bytes, where they are decided."""
    space = candidate.room
    result: dict[str, Any] = {
        "--max-model-len": space.max_model_len,
        "--max-num-seqs": candidate.max_num_seqs,
        "--max-num-batched-tokens": space.max_num_batched_tokens,
    }
    if kv_cache is not None:
        result["--kv-cache-memory-bytes"] = kv_cache
    else:
        result["--gpu-memory-utilization"] = space.utilization
    if candidate.tp > 1:
        result["--tensor-parallel-size"] = candidate.tp
    if candidate.stages > 1:
        result["--pipeline-parallel-size"] = candidate.stages
    if candidate.scheme.name not in ("none", candidate.machine.facts.native):
        value = schemes.flag(candidate.engine or "vllm", candidate.scheme.name)
        if value is not None:
            result["--quantization"] = value
    if candidate.machine.kv_width == 1:
        result["--kv-cache-dtype"] = "fp8"
    return result


def _memory(candidate: Candidate) -> dict[str, Any]:
    space = candidate.room
    return {
        "total": space.device.memory,
        "limit": space.limit,
        "weights": space.weights,
        "activations_at_most": space.step,
        "activations_as_a_rule": space.usual_step,
        "peak_as_a_rule": space.peak,
        "runtime_assumed": space.runtime,
        "kv_cache": max(0, space.kv_cache),
        "kv_bytes_per_token": space.kv_bytes_per_token,
    }


def _price(candidate: Candidate) -> dict[str, Any] | None:
    if candidate.price_per_hour is None:
        return None
    price = candidate.price
    return {
        "dollars_per_device_hour": dollars(candidate.price_per_hour),
        "as_of": price.as_of.isoformat() if price else None,
        "source": price.source if price else "as given",
        "offer": price.what if price else "as given",
    }


def _alternative(candidate: Candidate) -> dict[str, Any]:
    return {
        "device": candidate.device.name,
        "tensor_parallel": candidate.tp,
        "quantization": candidate.scheme.name,
        "engine": candidate.engine,
        "replicas": candidate.replicas,
        "devices": candidate.devices,
        "dollars_per_hour": dollars(candidate.costs.per_hour) if candidate.costs else None,
        "weights_per_device": candidate.room.weights,
        "kv_tokens": candidate.room.tokens,
        "sequences": candidate.sequences,
        "problem": candidate.problem,
    }


def _slice(name: str, candidate: Candidate) -> dict[str, Any]:
    return {
        "profile": name,
        "resource": f"nvidia.com/mig-{name}",
        "memory": candidate.device.memory,
        "weights": candidate.room.weights,
        "kv_cache": max(0, candidate.room.kv_cache),
        "kv_tokens": candidate.room.tokens,
        "problem": candidate.problem,
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "recommended": comparison.recommended,
        "reason": comparison.reason,
        "move_from_b_to_a_above_requests_per_second": {
            name: _r(rate) for name, rate in comparison.move_at.items()
        },
        "options": [_option(option) for option in comparison.options],
    }


def _option(option: Option) -> dict[str, Any]:
    return {
        "option": option.letter,
        "title": option.title,
        "device": option.device.name if option.device else None,
        "devices": option.devices,
        "dollars_per_hour": dollars(option.per_hour),
        "requests_per_second": {name: _r(rate) for name, rate in option.usable.items()},
        "throughput": option.throughput,
        "isolation": option.isolation,
        "production": option.production,
        "independent_scaling": option.independent_scaling,
        "complexity": option.complexity,
        "why_not": option.why or None,
        "layout": [list(device) for device in option.layout],
        "slices": [
            {
                "model": each.model,
                "profile": each.profile.name,
                "count": each.count,
                "kv_tokens": each.kv_tokens,
            }
            for each in option.slices
        ],
    }


def _even(even: BreakEven | None) -> dict[str, Any] | None:
    if even is None:
        return None
    return {
        "cloud": even.cloud.name,
        "cloud_as_of": even.cloud.as_of or None,
        "cloud_source": even.cloud.source or None,
        "cloud_dollars_per_thousand_requests": dollars(even.cloud_per_thousand),
        "break_even_utilisation": _r(even.utilisation),
        "break_even_requests_per_second": _r(even.rate),
        "saving": _r(even.saving),
    }


def _r(value: float) -> float:
    """Six digits: the rest is not known."""
    return float(f"{value:.6g}")
