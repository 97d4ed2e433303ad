"""What `penstock up` decides before it starts anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.cli.flags import Parser, make_config
from penstock.cli.local_models import LocalPlan, plan, warnings
from penstock.cli.serve import add_arguments
from penstock.cli.up import without_secrets
from penstock.core.errors import StartupError
from penstock.engine.config import EngineConfig
from penstock.gateway.local.command import Command
from penstock.server.config import ServerConfig
from penstock.spec import loads


def planned(models: str, pools: str = "{here: {}}", **environment: str) -> LocalPlan:
    spec = loads(f"pools: {pools}\nmodels: {models}")
    return plan(spec, "sk-engine", {"PATH": os.environ["PATH"], **environment})


def command(made: LocalPlan, model: str = "m", replica: int = 0) -> Command:
    return made.parts[model].commands[replica](4321)


def understood(made: Command) -> tuple[EngineConfig, ServerConfig]:
    """What `penstock serve` makes of a command."""
    parser = Parser(prog="penstock serve")
    add_arguments(parser)
    args = parser.parse_args(list(made.arguments[4:]))
    return make_config(EngineConfig, args), make_config(ServerConfig, args)


def test_a_command_says_what_the_spec_says() -> None:
    made = planned(
        "{m: {weights: demo, pool: here, max_model_len: 512, quantization: int8, memory: 8MiB, "
        "flags: {max-num-seqs: 7, enable_prefix_caching: false, default-chat-template-kwargs: {a: true}}}}"
    )
    engine, server = understood(command(made))
    assert (engine.model, engine.device, engine.max_model_len) == ("demo", "cpu", 512)
    assert (engine.quantization, engine.kv_cache_memory_bytes) == ("int8", 8 << 20)
    assert (engine.max_num_seqs, engine.enable_prefix_caching) == (7, False)
    assert (server.host, server.port, server.served_model_name) == ("127.0.0.1", 4321, ("m",))
    assert server.default_chat_template_kwargs == {"a": True}


@pytest.mark.parametrize(("flags", "policy"), [("{}", "priority"), ("{scheduling_policy: fcfs}", "fcfs")])
def test_engines_heed_the_class_that_the_gateway_tells_unless_the_spec_says_otherwise(
    flags: str, policy: str
) -> None:
    engine, _ = understood(command(planned(f"{{m: {{weights: demo, pool: here, flags: {flags}}}}}")))
    assert engine.scheduling_policy == policy


def test_the_key_is_in_the_environment_and_nowhere_else() -> None:
    made = command(planned("{m: {weights: demo, pool: here}}"))
    assert made.environment["PENSTOCK_GATEWAY_KEY"] == "sk-engine"
    assert made.environment["VLLM_API_KEY"] == ""
    assert "sk-engine" not in " ".join(made.arguments)


def test_several_engines_share_memory_and_cores() -> None:
    made = planned(
        "{m: {weights: demo, pool: here, replicas: 2}, n: {weights: demo, pool: here, memory: 9MiB}}"
    )
    (table,) = made.tables
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["m", "n", "all", "free"]
    engine, _ = understood(command(made))
    assert engine.kv_cache_memory_bytes is not None
    assert engine.threads is not None
    assert understood(command(made, "n"))[0].kv_cache_memory_bytes == 9 << 20
    alone, _ = understood(command(planned("{m: {weights: demo, pool: here}}")))
    assert alone.threads is None
    asked, _ = understood(
        command(planned("{m: {weights: demo, pool: here, replicas: 2, flags: {threads: 3}}}"))
    )
    assert asked.threads == 3


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("{m: {weights: /nonexistent, pool: here}}", "models.m: '/nonexistent' does not exist"),
        (
            "{m: {weights: demo, pool: here, max_model_len: 99999}}",
            "models.m: --max-model-len 99999 is longer",
        ),
        (
            "{m: {weights: demo, pool: here, quantization: int4, flags: {max-num-seqs: 0}}}",
            "--max-num-seqs must be",
        ),
        (
            "{m: {weights: demo, pool: here, devices: 2}}",
            "models.m: --tensor-parallel-size 2 is not implemented",
        ),
        (
            "{m: {weights: demo, pool: here, flags: {gpu-memory-utilization: 0.9}}}",
            "all models share what is free",
        ),
        ("{m: {weights: demo, pool: here, flags: {chat-template: /nonexistent.jinja}}}", "models.m: "),
        ("{m: {weights: demo, pool: here, memory: 1TiB}}", "The models do not fit together"),
        ("{m: {weights: demo, pool: here, engine: vllm}}", "models.m: engine: vllm needs the command vllm"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(models: str, message: str) -> None:
    with pytest.raises(StartupError) as caught:
        planned(models, PATH="/nonexistent")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("{max-num-seks: 1}", "unknown flag --max-num-seks. Did you mean --max-num-seqs?"),
        ("{port-x: 1}", "unknown"),
    ],
)
def test_a_flag_that_no_engine_knows(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        planned(f"{{m: {{weights: demo, pool: here, flags: {flags}}}}}")
    assert caught.value.code == 2
    assert f"penstock up: models.m: {message}" in capsys.readouterr().err


def tool(folder: Path, name: str, script: str) -> str:
    """PATH with a command of this name."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_vllm_is_started_by_its_own_command(tmp_path: Path) -> None:
    path = tool(tmp_path, "vllm", "")
    made = planned(
        "{m: {weights: demo, pool: here, engine: vllm, max_model_len: 256, flags: {max-num-seqs: 4}}}",
        PATH=path,
    )
    arguments = command(made).arguments
    assert arguments[:2] == (str(tmp_path / "vllm"), "serve")
    assert arguments[2].endswith("/assets/demo")  # it does not know ours by its name
    assert "--kv-cache-memory-bytes" in arguments  # or it would take most of the memory
    assert "--max-num-seqs=4" in arguments
    assert "--device" not in arguments
    assert "--scheduling-policy" not in arguments
    assert command(made).environment == {"VLLM_API_KEY": "sk-engine"}
    assert command(made).probe == "/health"


def test_memory_of_an_architecture_that_only_vllm_knows(tmp_path: Path) -> None:
    path = tool(tmp_path, "vllm", "")
    weights = tmp_path / "model"
    weights.mkdir()
    (weights / "config.json").write_text('{"architectures": ["NewModel"], "model_type": "new"}')
    (weights / "model.safetensors").write_bytes(b"\0" * 1000)
    model = f"weights: {weights}, pool: here, engine: vllm"
    with pytest.raises(StartupError, match=r"models\.m: how much memory it takes cannot be reckoned"):
        planned(f"{{m: {{{model}}}}}", PATH=path)
    (table,) = planned(f"{{m: {{{model}, memory: 64MiB}}}}", PATH=path).tables
    assert table.splitlines()[2].split()[:9] == "m 2.00 GiB 1000 B 0 B 64.00 MiB".split()


def test_replicas_on_accelerators_get_devices_of_their_own(tmp_path: Path) -> None:
    path = tool(tmp_path, "nvidia-smi", "for n in 0 1 2 3; do echo $n, NVIDIA L4, 22000, 23034; done")
    pools = "{a: {hardware: L4, count: 2}, b: {hardware: L4, count: 2}, here: {}}"
    made = planned(
        "{m: {weights: demo, pool: a, replicas: 2}, n: {weights: demo, pool: b}, "
        "o: {weights: demo, pool: here}}",
        pools,
        PATH=path,
    )
    seen = [
        command(made, *at).environment.get("CUDA_VISIBLE_DEVICES") for at in (("m", 0), ("m", 1), ("n", 0))
    ]
    assert seen == ["0", "1", "2"]
    assert "CUDA_VISIBLE_DEVICES" not in command(made, "o").environment
    assert understood(command(made))[0].device == "cuda"
    assert understood(command(made, "o"))[0].device == "cpu"
    with pytest.raises(StartupError, match="have 5 accelerators; this machine has 4"):
        planned("{m: {weights: demo, pool: a}}", "{a: {hardware: L4, count: 5}}", PATH=path)


def test_engines_that_share_one_device_are_named() -> None:
    models = "models: {m: {weights: demo, pool: here, replicas: 2}}"
    (said,) = warnings(loads(f"pools: {{here: {{}}}}\n{models}"))
    assert "pools.here: 2 engines share 1 device(s)" in said
    assert warnings(loads(f"pools: {{here: {{count: 2}}}}\n{models}")) == []


def test_engines_do_not_get_the_secrets_of_the_gateway() -> None:
    spec = loads(
        "upstreams: {c: {url: 'http://c', api_key_env: CLOUD_KEY, models: {m: {}}}}\n"
        "gateway: {admin: {key_env: ADMIN_KEY}}"
    )
    environment = {"CLOUD_KEY": "1", "ADMIN_KEY": "2", "PENSTOCK_LEDGER_PASSWORD": "3", "HOME": "/root"}
    assert without_secrets(spec, environment) == {"HOME": "/root"}
