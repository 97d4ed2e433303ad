"""What users import, and what importing it must not need."""

from __future__ import annotations

import subprocess
import sys

import penstock


def run(code: str) -> str:
    """Run Python code in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_names() -> None:
    assert penstock.__all__ == [
        "LLM",
        "BeamSearchParams",
        "ClassificationRequestOutput",
        "CompletionOutput",
        "EmbeddingRequestOutput",
        "Logprob",
        "PoolingParams",
        "PoolingRequestOutput",
        "RequestOutput",
        "SamplingParams",
        "ScoringRequestOutput",
        "__version__",
    ]
    for name in penstock.__all__:
        assert getattr(penstock, name) is not None


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert version("penstock") == penstock.__version__


def test_the_core_install_needs_no_engine() -> None:
    """With torch and its company out of reach, everything but serving and LLM imports."""
    run(
        "import sys\n"
        "for name in ('torch', 'numpy', 'tokenizers', 'safetensors', 'huggingface_hub', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import penstock, penstock.core.scheduler, penstock.observe.metrics, penstock.bench.serve\n"
        "import penstock.bench.startup, penstock.cli.main, penstock.cli.bench, penstock.cli.chat\n"
        "import penstock.cli.evaluate, penstock.evaluate.run, penstock.evaluate.page\n"
        "import penstock.engine.config, penstock.engine.replay, penstock.core.simulated\n"
        "from penstock import SamplingParams\n"
        "SamplingParams(temperature=0.5)\n"
    )


def test_serving_without_the_engine_says_what_to_install() -> None:
    out = run(
        "import sys, importlib.util as util\n"
        "real = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else real(name, *rest)\n"
        "from penstock.cli.main import main\n"
        "sys.stderr = sys.stdout\n"
        "print(main(['serve', 'demo']))\n"
    )
    assert "torch, which is not installed" in out
    assert 'pip install "penstock[engine]"' in out
    assert out.endswith("2")


def test_the_api_process_never_imports_torch() -> None:
    loaded = run(
        "import sys, penstock.cli.serve, penstock.engine.remote, penstock.server.app, penstock.http.serve\n"
        "import penstock.text.tokenizer, penstock.text.chat_template\n"
        "import penstock.model.hub, penstock.model.generation\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])\n"
    )
    assert loaded == "[]"


def test_plain_imports_are_light() -> None:
    loaded = run(
        "import sys, penstock, penstock.cli.main\n"
        "heavy = ('torch', 'starlette', 'uvicorn', 'aiohttp', 'rich', 'zmq')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    assert loaded == "[]"
