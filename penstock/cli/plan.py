"""`penstock plan`: how many of which device, at what price, for which targets. Plans; starts and buys
nothing."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import StartupError

if TYPE_CHECKING:
    from penstock.fleet.facts import ModelFacts
    from penstock.fleet.hardware import Device
    from penstock.fleet.prices import Cloud
    from penstock.fleet.question import Question
    from penstock.spec import Spec
    from penstock.spec.model import Model as SpecModel

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
    load.add_argument("--rate", type=float, metavar="N", help="requests a second (default: 1)")
    load.add_argument(
        "--peak", type=float, metavar="N", help="requests a second at the busiest (default: twice --rate)"
    )
    load.add_argument("--prompt", type=int, metavar="TOKENS", help="of a request (default: 1000)")
    load.add_argument("--output", type=int, metavar="TOKENS", help="of an answer (default: 200)")
    targets = parser.add_argument_group(
        "targets, as 500ms or 2s (default: --ttft-p99 1s, where the spec has none)"
    )
    for name in _TARGETS:
        targets.add_argument(f"--{name.replace('_', '-')}", metavar="TIME")
    decided = parser.add_argument_group("what is decided already")
    decided.add_argument("--gpu", metavar="NAME", help="as A100-80GB, L4, H100, cpu; several with commas")
    decided.add_argument("--tp", type=int, metavar="N", help="devices of a replica (tensor parallel)")
    decided.add_argument(
        "--quantization", metavar="SCHEME", help="none, int8, fp8, awq, gptq, …; as published if not given"
    )
    decided.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="default: auto")
    decided.add_argument("--mig", metavar="PROFILE", help="run in such slices, as 3g.40gb")
    decided.add_argument(
        "--engine", choices=("penstock", "vllm"), help="default: penstock where it can, else vllm"
    )
    decided.add_argument(
        "--max-model-len", type=int, metavar="TOKENS", help="default: the power of two that holds a request"
    )
    decided.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, metavar="SHARE", help="default: 0.92"
    )
    decided.add_argument(
        "--dtype", choices=("auto", "float32"), default="auto", help="default: auto (16 bits)"
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
    from penstock.fleet import lists

    for wanted, show in (
        (args.models, lists.models),
        (args.hardware, lists.hardware),
        (args.figures, lists.figures),
    ):
        if wanted:
            print(show(as_json=args.json))
            return 0
    from penstock.fleet.plan import plan
    from penstock.fleet.record import record
    from penstock.fleet.table import render

    found = record(plan(_questions(args)))
    if args.html is not None:
        from penstock.fleet.page import page

        _write(Path(args.html), page(found))
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
        return [_of_spec(args, spec, name, model) for name, model in spec.models.items()]
    return [_of_model(args, what)]


def _of_model(args: argparse.Namespace, what: str) -> Question:
    """From flags alone."""
    from penstock.fleet import catalogue

    if args.gpu is not None:
        devices = [_device(args, name.strip()) for name in args.gpu.split(",")]
        if args.mig is not None and len(devices) > 1:
            raise _one_for_mig()
        assumed = []
    elif args.mig is not None:
        raise _one_for_mig()
    else:
        devices = [each for each in catalogue.devices().values() if each.vendor == "nvidia" and each.price]
        assumed = ["assumed: any NVIDIA device with a dated price (--gpu decides)"]
    return _question(args, what, _facts(what), devices, assumed)


def _one_for_mig() -> StartupError:
    return StartupError("--mig needs one --gpu, whose slices they are.", param="--mig")


def _of_spec(args: argparse.Namespace, spec: Spec, name: str, model: SpecModel) -> Question:
    """From a model of a spec; flags win."""
    pool = spec.pools[model.pool]
    kind = args.gpu or pool.hardware
    return _question(
        args,
        name,
        _facts(model.weights),
        [_device(args, each.strip()) for each in kind.split(",")],
        [],
        spec=spec,
        model=model,
    )


def _question(
    args: argparse.Namespace,
    name: str,
    facts: ModelFacts,
    devices: list[Device],
    assumed: list[str],
    *,
    spec: Spec | None = None,
    model: SpecModel | None = None,
) -> Question:
    from penstock.fleet import question as q
    from penstock.fleet.load import Targets, Workload

    def given(value: object, default: float, flag: str, unit: str) -> float:
        if value is None:
            assumed.append(f"assumed: {default:g} {unit} ({flag})")
            return default
        number = float(value)  # type: ignore[arg-type]
        if not 0 < number < 1e9:
            raise StartupError(f"{flag} {value} must be a positive number.", param=flag)
        return number

    rate = given(args.rate, q.DEFAULT_RATE, "--rate", "requests a second")
    prompt = int(given(args.prompt, q.DEFAULT_PROMPT, "--prompt", "prompt tokens"))
    output = 0  # of an embedding
    if facts.kind != "embedding":
        output = int(given(args.output, q.DEFAULT_OUTPUT, "--output", "output tokens"))
    peak = given(args.peak, 2 * rate, "--peak", "requests a second at the peak")
    if peak < rate:
        raise StartupError(f"--peak {peak:g} is less than --rate {rate:g}.", param="--peak")
    slo = model.slo if model else None
    wanted = {
        each: _seconds(getattr(args, each), each)
        if getattr(args, each) is not None
        else getattr(slo, each, None)
        for each in _TARGETS
    }
    if not any(value is not None for value in wanted.values()):
        wanted["ttft_p99"] = q.DEFAULT_TTFT
        assumed.append("assumed: TTFT of 1 s for 99 of 100 requests (--ttft-p99)")
    pool = spec.pools[model.pool] if spec and model else None
    price = _money(args.price, "--price")
    if price is None and pool is not None and not args.gpu:
        price = pool.price_per_hour
    tp = args.tp if args.tp is not None else (model.devices if model and model.devices > 1 else None)
    if tp is not None and not 1 <= tp <= 64:
        raise StartupError(f"--tp {tp} must be from 1 to 64.", param="--tp")
    scheme = args.quantization or (model.quantization if model else None)
    if not 0.1 <= args.gpu_memory_utilization <= 1:
        raise StartupError(
            f"--gpu-memory-utilization {args.gpu_memory_utilization} must be from 0.1 to 1.",
            param="--gpu-memory-utilization",
        )
    length = (
        args.max_model_len if args.max_model_len is not None else (model.max_model_len if model else None)
    )
    if length is not None and length < 1:
        raise StartupError(f"--max-model-len {length} must be positive.", param="--max-model-len")
    return q.Question(
        name=name,
        facts=facts,
        workload=Workload(rate=rate, prompt=prompt, output=output, peak=peak),
        targets=Targets(**wanted),
        devices=devices,
        tp=tp,
        scheme=q.scheme_named(scheme) if scheme else None,
        kv_fp8=args.kv_cache_dtype == "fp8",
        mig=args.mig,
        engine=args.engine or (model.engine if model else None),
        max_model_len=length,
        utilization=args.gpu_memory_utilization,
        price_per_hour=price,
        count=pool.count if pool is not None and not args.gpu else None,
        cloud=_cloud(args, spec),
        assumed=tuple(assumed),
        float32=args.dtype == "float32",
    )


def _facts(weights: str) -> ModelFacts:
    """Facts of a folder, of a model that the hub's cache has, or of the catalogue; `demo` is the bundled
    one."""
    from penstock.fleet import catalogue

    if weights == "demo":
        from importlib import resources

        import penstock.assets

        return catalogue.find_model(str(resources.files(penstock.assets).joinpath("demo")))
    if not Path(weights).is_dir() and (cached := _cached(weights)) is not None:
        return catalogue.find_model(str(cached))
    return catalogue.find_model(weights)


def _cached(name: str) -> Path | None:
    """The newest snapshot of a model in the hub's cache; nothing is downloaded."""
    if name.count("/") != 1 or ".." in name or name.startswith(("/", ".")):
        return None
    home = os.environ.get("HF_HUB_CACHE")
    folder = (
        Path(home) if home else Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    )
    snapshots = folder / f"models--{name.replace('/', '--')}" / "snapshots"
    with contextlib.suppress(OSError):
        found = [each for each in snapshots.iterdir() if (each / "config.json").is_file()]
        return max(found, key=lambda each: each.stat().st_mtime, default=None)
    return None


def _device(args: argparse.Namespace, name: str) -> Device:
    """From the catalogue; a CPU's memory is this machine's, and what flags say wins."""
    import dataclasses

    from penstock.fleet import catalogue

    device = catalogue.find_device(name)
    if device.vendor != "cpu":
        return device
    changes: dict[str, object] = {}
    if args.memory is not None:
        changes["memory"] = _size(args.memory, "--memory")
    else:
        with contextlib.suppress(OSError, ValueError):
            changes["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.bandwidth is not None:
        changes["bandwidth"] = float(_size(args.bandwidth, "--bandwidth"))
    if args.flops is not None:
        factor = args.flops / device.rate
        changes["flops"] = {kind: rate * factor for kind, rate in device.flops.items()}
    return dataclasses.replace(device, **changes)  # type: ignore[arg-type]


def _cloud(args: argparse.Namespace, spec: Spec | None) -> Cloud | None:
    """What a cloud takes: as flags say, else the first priced upstream of the spec."""
    from penstock.fleet.prices import Cloud

    put_in = _money(args.cloud_input, "--cloud-input")
    got_out = _money(args.cloud_output, "--cloud-output")
    if put_in is not None and got_out is not None:
        return Cloud(put_in, got_out, name="the cloud")
    if put_in is not None or got_out is not None:
        raise StartupError("--cloud-input and --cloud-output are given together.", param="--cloud-input")
    for upstream in spec.upstreams.values() if spec else ():
        for name, model in upstream.models.items():
            if model.price is not None and not upstream.in_house:
                price = model.price
                return Cloud(
                    price.input * 1_000_000 // price.per,
                    price.output * 1_000_000 // price.per,
                    name=name,
                    as_of=price.as_of.isoformat(),
                    source=price.source,
                )
    return None


def _seconds(value: str, name: str) -> float:
    from penstock.spec.units import seconds

    flag = f"--{name.replace('_', '-')}"
    try:
        found = seconds(value)
    except ValueError as error:
        raise StartupError(f"{flag} {value}: {error}.", param=flag) from None
    if found <= 0:
        raise StartupError(f"{flag} {value} must be more than 0.", param=flag)
    return found


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


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror or error}.", param="--html") from None
