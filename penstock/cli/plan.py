"""`penstock plan`: how many of which device, at what price, for which targets. Plans; starts and buys
nothing."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock import writing
from penstock.cli.values import duration
from penstock.core.errors import StartupError

if TYPE_CHECKING:
    from penstock.fleet.decided import Decided
    from penstock.fleet.hardware import Device
    from penstock.fleet.measured import Measured
    from penstock.fleet.prices import Cloud
    from penstock.fleet.question import Question
    from penstock.spec import Spec

_TARGETS = ("ttft_p95", "ttft_p99", "itl_p95", "itl_p99", "e2e_p95", "e2e_p99")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is planned, the load, and what is decided already."""
    parser.add_argument(
        "what",
        nargs="?",
        metavar="SPEC|MODEL",
        help="a penstock.yaml, a model's folder, a Hugging Face id, or a name of the catalogue, as qwen3-32b "
        "(default: penstock.yaml)",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--rate", type=float, metavar="N", help="requests a second (default: the spec's, else 1)"
    )
    load.add_argument(
        "--peak", type=float, metavar="N", help="requests a second at the busiest (default: twice --rate)"
    )
    load.add_argument(
        "--prompt", type=int, metavar="TOKENS", help="of a request (default: the spec's, else 1000)"
    )
    load.add_argument(
        "--output", type=int, metavar="TOKENS", help="of an answer (default: the spec's, else 200)"
    )
    targets = parser.add_argument_group(
        "targets, as 500ms or 2s (default: the spec's; --ttft-p99 1s for a MODEL)"
    )
    for name in _TARGETS:
        targets.add_argument(f"--{name.replace('_', '-')}", metavar="TIME")
    decided = parser.add_argument_group("what is decided already")
    decided.add_argument("--gpu", metavar="NAME", help="as A100-80GB, L4, H100, cpu; several with commas")
    decided.add_argument("--tp", type=int, metavar="N", help="devices of a replica (tensor parallel)")
    decided.add_argument(
        "--quantization",
        metavar="SCHEME",
        help="none, int8, fp8, awq, gptq, …; auto: what suits the device, where it costs less; as published "
        "if not given",
    )
    decided.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="default: auto")
    decided.add_argument("--mig", metavar="PROFILE", help="run in such slices, as 3g.40gb")
    decided.add_argument(
        "--engine", choices=("penstock", "vllm"), help="default: penstock where it can, else vllm"
    )
    decided.add_argument(
        "--max-model-len", type=int, metavar="TOKENS", help="default: the power of two that holds a request"
    )
    decided.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="default: 0.92")
    decided.add_argument(
        "--dtype", choices=("auto", "float32"), default="auto", help="default: auto (16 bits)"
    )
    parser.add_argument(
        "--measured",
        nargs="+",
        metavar="FILE",
        help="results of `penstock bench serve` with this model on this device, at a concurrency of 1 and at "
        "others: speeds and their error bar are then yours",
    )
    money = parser.add_argument_group("money, in US dollars")
    money.add_argument(
        "--price", metavar="DOLLARS", help="of a device and hour; the catalogue's if not given"
    )
    money.add_argument(
        "--cloud-input", metavar="DOLLARS", help="what a cloud takes for a million input tokens"
    )
    money.add_argument("--cloud-output", metavar="DOLLARS", help="and for a million output tokens")
    machine = parser.add_argument_group("a machine that is not in the catalogue (with --gpu cpu)")
    machine.add_argument("--memory", metavar="SIZE", help="as 64GiB; this machine's if not given")
    machine.add_argument("--bandwidth", metavar="SIZE", help="of its memory, each second, as 200GB")
    machine.add_argument("--flops", type=float, metavar="N", help="at 16 bits, each second, as 2e12")
    out = parser.add_argument_group("what is shown")
    out.add_argument("--json", action="store_true", help="as JSON")
    out.add_argument("--html", metavar="FILE", help="write a page with charts, too; it needs nothing else")
    out.add_argument("--models", action="store_true", help="list the catalogue's models, and end")
    out.add_argument("--hardware", action="store_true", help="list the catalogue's hardware, and end")
    out.add_argument(
        "--figures", action="store_true", help="compare well-known rules of thumb with the truth, and end"
    )


def run(args: argparse.Namespace) -> int:
    """Plan and print. Raises StartupError subclasses for what cannot be done."""
    for list_ in ("models", "hardware", "figures"):
        if getattr(args, list_):
            from penstock.fleet import lists

            print(getattr(lists, list_)(as_json=args.json))
            return 0
    from penstock.fleet.plan import plan
    from penstock.fleet.record import record
    from penstock.fleet.table import render

    found = record(plan(_questions(args)))
    if args.html is not None:
        from penstock.fleet.page import page

        writing.write(Path(args.html), page(found), param="--html")
        print(f"penstock plan: {args.html} is written.", file=sys.stderr)
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else render(found))
    return 0


def _questions(args: argparse.Namespace) -> list[Question]:
    what = args.what or "penstock.yaml"
    path = Path(what)
    if path.suffix in (".yaml", ".yml"):
        from penstock.spec import load

        spec = load(path)
        if not spec.models:
            raise StartupError(f"{what}: there is nothing under models: to plan.")
        return [_with_flags(args, _of_spec(args, spec, name)) for name in spec.models]
    return [_with_flags(args, _of_model(args, what))]


def _of_model(args: argparse.Namespace, what: str) -> Question:
    """A model alone: what nobody says is assumed, and said."""
    from penstock.fleet import asked, catalogue
    from penstock.fleet import question as q
    from penstock.fleet.load import Targets, Workload

    if args.mig is not None and (args.gpu is None or "," in args.gpu):
        raise StartupError("--mig needs one --gpu, whose slices they are.", param="--mig")
    facts = asked.facts_of(what)
    rate = args.rate if args.rate is not None else q.DEFAULT_RATE
    most = args.max_model_len or facts.context_length
    output = 0 if facts.kind == "embedding" else min(q.DEFAULT_OUTPUT, max(1, most // 2))
    prompt = max(1, min(q.DEFAULT_PROMPT, most - (args.output or output)))
    assumed = {
        "rate": f"assumed: {rate:g} requests a second (--rate)",
        "prompt": f"assumed: {prompt} prompt tokens (--prompt)",
        "output": f"assumed: {output} output tokens (--output)",
        "peak": f"assumed: {2 * rate:g} requests a second at the peak (--peak)",
        "targets": "assumed: TTFT of 1 s for 99 of 100 requests (--ttft-p99)",
        "gpu": "assumed: any NVIDIA device with a dated price (--gpu decides)",
    }
    if facts.kind == "embedding":
        del assumed["output"]
    devices = [each for each in catalogue.devices().values() if each.vendor == "nvidia" and each.price]
    return q.Question(
        name=what,
        facts=facts,
        workload=Workload(rate=rate, prompt=prompt, output=output, peak=2 * rate),
        targets=Targets(ttft_p99=q.DEFAULT_TTFT),
        devices=devices,
        assumed=assumed,
    )


def _of_spec(args: argparse.Namespace, spec: Spec, name: str) -> Question:
    """A model of a spec, as `penstock compile` reads it; on other devices, without what it says of its own
    ones."""
    import dataclasses

    from penstock.fleet import asked

    what_if = any((args.gpu, args.engine, args.quantization))
    question = asked.of_spec(spec, name, what_if=what_if)
    if not args.gpu:
        return question
    model = spec.models[name]
    said = dataclasses.replace(
        question.decided, mig=None, burst=None, time_slicing=None, node_devices=None, nodes=1, stages=1
    )
    if spec.pools[model.pool].hardware == "cpu" and model.memory is None:
        said = dataclasses.replace(said, kv_cache=None)
        question = question.without("memory")
    tp = question.tp if "devices" in model.model_fields_set else None
    return dataclasses.replace(
        question, decided=said, mig=None, price_per_hour=None, count=None, tp=tp, utilization=_share(said)
    )


def _share(said: Decided) -> float:
    from penstock.fleet.sizing import UTILIZATION

    return said.utilization or UTILIZATION


def _with_flags(args: argparse.Namespace, question: Question) -> Question:
    """With what flags say in place of it."""
    import dataclasses

    from penstock.fleet import question as q
    from penstock.fleet.load import Targets

    changes: dict[str, Any] = {}
    load, targets, names = question.workload, question.targets, question.names
    for what in ("rate", "prompt", "output", "peak"):
        if (value := getattr(args, what)) is not None:
            said: dict[str, Any] = {what: _number(value, f"--{what}")}
            load = dataclasses.replace(load, **said)
    if args.output is not None and question.facts.kind == "embedding":
        raise StartupError(
            f"--output {args.output}: {question.name} makes vectors, no answers.", param="--output"
        )
    if args.peak is None and args.rate is not None:
        load = dataclasses.replace(load, peak=2 * load.rate)
        changes["assumed"] = {
            **question.assumed,
            "peak": f"assumed: {load.peak:g} requests a second at the peak (--peak)",
        }
    if load.peak < load.rate:
        raise StartupError(f"--peak {load.peak:g} is less than --rate {load.rate:g}.", param="--peak")
    given = {
        each: duration(getattr(args, each), f"--{each.replace('_', '-')}", above_zero=True)
        for each in _TARGETS
        if getattr(args, each) is not None
    }
    if given:
        kept = {} if "targets" in question.assumed else {each: getattr(targets, each) for each in _TARGETS}
        targets = Targets(**{**kept, **given})
    if args.prompt is not None or args.output is not None:
        whole = load.prompt + load.output
        changes["longest"] = None if question.longest is None else max(whole, question.longest)
    if args.gpu:
        changes["devices"] = [_device(args, name.strip()) for name in args.gpu.split(",")]
    elif len(question.devices) == 1:
        changes["devices"] = [_flagged(args, question.devices[0])]
    price = _money(args.price, "--price")
    cloud = _cloud(args)
    for what, value in (
        ("tp", args.tp),
        ("mig", args.mig),
        ("price_per_hour", price),
        ("cloud", cloud),
        ("engine", args.engine),
        ("max_model_len", args.max_model_len),
        ("utilization", args.gpu_memory_utilization),
    ):
        if value is not None:
            changes[what] = value
    if args.tp is not None:
        if not 1 <= args.tp <= 64:
            raise StartupError(f"--tp {args.tp} must be from 1 to 64.", param="--tp")
        changes["decided"] = dataclasses.replace(question.decided, stages=1)
    share = changes.get("utilization", question.utilization)
    if not 0.1 <= share <= 1:
        raise StartupError(
            f"--gpu-memory-utilization {share} must be from 0.1 to 1.", param="--gpu-memory-utilization"
        )
    if args.max_model_len is not None and args.max_model_len < 1:
        raise StartupError(f"--max-model-len {args.max_model_len} must be positive.", param="--max-model-len")
    if args.quantization is not None:
        auto = args.quantization == "auto"
        changes |= {"auto": auto, "scheme": None if auto else q.scheme_named(args.quantization)}
    if args.kv_cache_dtype == "fp8":
        changes["kv_fp8"] = True
    if args.dtype == "float32":
        changes["float32"] = True
    if args.measured is not None:
        changes["measured"] = _measured(args, dataclasses.replace(question, **changes))
    flags = [what for what in vars(args) if getattr(args, what) not in (None, False, "auto")]
    changed = dataclasses.replace(question, **{"workload": load, "targets": targets, **changes})
    changed = dataclasses.replace(changed, names=names.flags(*flags))
    return changed.without(*flags, *(["targets"] if given else []))


def _measured(args: argparse.Namespace, question: Question) -> Measured:
    """What was measured on the one device of a question."""
    from penstock.fleet.asked import whole
    from penstock.fleet.candidates import machine_of, schemes_of
    from penstock.fleet.measured import calibrate, read

    if len(question.devices) != 1:
        raise StartupError(
            "--measured is of one device: --gpu says which.", param="--measured", advice="Give one --gpu."
        )
    share = whole(question)
    machine = machine_of(share, share.devices[0], share.tp or 1, next(schemes_of(share)))
    return calibrate(machine, read([Path(each) for each in args.measured]))


def _number(value: float, flag: str) -> float:
    if not 0 < value < 1e9:
        raise StartupError(f"{flag} {value} must be a positive number below 1e9.", param=flag)
    return value


def _device(args: argparse.Namespace, name: str) -> Device:
    """From the catalogue; a CPU's memory is this machine's."""
    import dataclasses

    from penstock.fleet import catalogue

    device = catalogue.find_device(name)
    if device.vendor == "cpu":
        with contextlib.suppress(OSError, ValueError):
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            device = dataclasses.replace(device, memory=memory)
    return _flagged(args, device)


def _flagged(args: argparse.Namespace, device: Device) -> Device:
    """A CPU with what flags say of it."""
    import dataclasses

    changes: dict[str, Any] = {}
    if device.vendor != "cpu":
        return device
    if args.memory is not None:
        changes["memory"] = _size(args.memory, "--memory")
    if args.bandwidth is not None:
        changes["bandwidth"] = float(_size(args.bandwidth, "--bandwidth"))
    if args.flops is not None:
        factor = args.flops / device.rate
        changes["flops"] = {kind: rate * factor for kind, rate in device.flops.items()}
    return dataclasses.replace(device, **changes)


def _cloud(args: argparse.Namespace) -> Cloud | None:
    """What a cloud takes, as flags say."""
    from penstock.fleet.prices import Cloud

    put_in = _money(args.cloud_input, "--cloud-input")
    got_out = _money(args.cloud_output, "--cloud-output")
    if put_in is not None and got_out is not None:
        return Cloud(put_in, got_out, name="the cloud")
    if put_in is not None or got_out is not None:
        raise StartupError("--cloud-input and --cloud-output are given together.", param="--cloud-input")
    return None


def _money(value: str | None, flag: str) -> int | None:
    if value is None:
        return None
    from penstock.spec.units import nanodollars

    try:
        found = nanodollars(value)
    except ValueError as error:
        raise StartupError(f"{flag} {value}: {error}.", param=flag) from None
    if found < 0:
        raise StartupError(f"{flag} {value} must not be negative.", param=flag)
    return found


def _size(value: str, flag: str) -> int:
    from penstock.spec.units import size

    try:
        return size(value)
    except ValueError as error:
        raise StartupError(f"{flag} {value}: {error}.", param=flag) from None
