"""`--config FILE`: vLLM's YAML of flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.cli.flags import Parser, make_config
from penstock.cli.serve import add_arguments
from penstock.engine.config import EngineConfig
from penstock.server.config import ServerConfig


class File:
    """A YAML file, and what comes of it."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self._capsys = capsys

    def read(self, text: str, *more: str) -> tuple[Any, Any]:
        """(EngineConfig, ServerConfig) of the file and more flags."""
        self.path.write_text(text, encoding="utf-8")
        parser = Parser(prog="penstock serve")
        add_arguments(parser)
        args = parser.parse_args([*more, "--config", str(self.path)])
        return make_config(EngineConfig, args), make_config(ServerConfig, args)

    def refused(self, text: str, *more: str) -> str:
        """The message that ends the start."""
        with pytest.raises(SystemExit) as caught:
            self.read(text, *more)
        assert caught.value.code == 2
        return self._capsys.readouterr().err


@pytest.fixture
def file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> File:
    return File(tmp_path / "serve.yaml", capsys)


def test_what_a_file_may_hold(file: File) -> None:
    engine, server = file.read(
        """
        model: models/x
        max_model_len: 8K
        max-num-seqs: 4
        gpu-memory-utilization: 0.5
        enable-prefix-caching: false
        enforce-eager: true
        revision: null
        seed: -1
        served-model-name: [a, b]
        api-key: 0123
        allowed-origins: ["http://a"]
        default-chat-template-kwargs: {enable_thinking: false}
        """
    )
    assert engine == EngineConfig(
        model="models/x",
        max_model_len=8192,
        max_num_seqs=4,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        enforce_eager=True,
        seed=-1,
    )
    assert server == ServerConfig(
        served_model_name=("a", "b"),
        api_key=("83",),  # as in vLLM, YAML's own reading of 0123
        allowed_origins=("http://a",),
        default_chat_template_kwargs={"enable_thinking": False},
    )


def test_a_switch_may_be_switched_off_by_its_own_name(file: File) -> None:
    """As vLLM's parser has it: `no-x: true` is `--no-x`."""
    engine, _ = file.read("no-enable-prefix-caching: true")
    assert engine.enable_prefix_caching is False
    assert file.read("no_enable_prefix_caching: true")[0].enable_prefix_caching is False


def test_the_command_line_wins(file: File) -> None:
    text = """
        model: models/x
        port: 1
        served-model-name: [a, b]
        enable-prefix-caching: false
        pipeline-parallel-size: 2
        max-num-seqs: 4
    """
    more = ("models/y", "--port", "2", "--served-model-name", "c", "--enable-prefix-caching", "-pp", "1")
    engine, server = file.read(text, *more)
    assert engine == EngineConfig(model="models/y", max_num_seqs=4)
    assert server == ServerConfig(port=2, served_model_name=("c",))


def test_parts_of_json_are_joined(file: File) -> None:
    _, server = file.read(
        "default_chat_template_kwargs.some_key: 1\ndefault-chat-template-kwargs.a.b: [x, y]\n"
    )
    assert server.default_chat_template_kwargs == {"some_key": 1, "a": {"b": ["x", "y"]}}


@pytest.mark.parametrize("text", ["", "# nothing\n", "disable-log-stats: false\nheadless: false\n"])
def test_files_that_ask_for_nothing(file: File, text: str) -> None:
    assert file.read(text) == (EngineConfig(), ServerConfig())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-model-lenn: 5", "max-model-lenn: unknown flag --max-model-lenn. Did you mean --max-model-len?"),
        ("swap-space: 4", "swap-space: --swap-space is not a flag here: vLLM removed it"),
        ("kv-cache-dtype: fp8", "kv-cache-dtype: --kv-cache-dtype fp8 is vLLM's, and needs"),
        ("compilation-config: {mode: 3}", 'compilation-config: --compilation-config {"mode": 3} is vLLM\'s'),
        ("enable-lora: true", "enable-lora: --enable-lora is vLLM's, and needs"),
        ("port: many", "port: argument --port: invalid int value: 'many'"),
        ("port: false", "port: argument --port: invalid int value: 'false'"),
        ("port: null", "port: argument --port: invalid int value: 'None'"),
        ("dtype: int3", "dtype: argument --dtype: invalid choice: 'int3'"),
        ("max-model-len: 8KB", "8KiB"),
        ("port: 1\nport: 2", "line 2: port stands there twice"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "max_num_seqs stands there twice"),
        ("api-key: [a", "line 1"),
        ("- port", "one flag a line"),
        ("just text", "one flag a line"),
        ("8000: port", "8000 is not the name of a flag"),
        ("--port: 8000", "'--port' is not the name of a flag"),
        ("config: other.yaml", "a file cannot name another"),
        ("compilation-config: 3\ncompilation-config.mode: 3", "given in one piece already"),
        ("port: !!python/object/apply:os.system ['true']", "line 1"),
    ],
)
def test_errors_name_file_and_key(file: File, text: str, message: str) -> None:
    shown = file.refused(text)
    assert str(file.path) in shown
    assert message in shown


def test_all_unknown_keys_are_told_at_once(file: File) -> None:
    shown = file.refused("swap-space: 4\nxyzzy: 1\nenable-lora: true\n", "--grpc-port", "1")
    assert all(name in shown for name in ("--swap-space", "--xyzzy", "--enable-lora", "--grpc-port"))


def test_a_file_that_cannot_be_read(file: File, tmp_path: Path) -> None:
    file.path = tmp_path / "x"
    file.path.mkdir()
    with pytest.raises(OSError):
        file.read("")
    parser = Parser(prog="penstock serve")
    add_arguments(parser)
    for path, word in ((tmp_path / "no.yaml", "No such file"), (tmp_path / "x", "Is a directory")):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--config={path}"])
        assert f"--config {path}: {word}" in file._capsys.readouterr().err
