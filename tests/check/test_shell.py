"""Shell: words with their places, and texts that are none."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.check import code, dockerfile, grammars, markdown, plain, shell, systemd

from .finding import in_code, places


def words(text: str) -> list[tuple[str, int, int]]:
    (found, *_) = shell._commands(text, 1, 1)
    return [(word.text, word.line, word.column) for word in found]


def test_words_have_their_places_and_no_quotes() -> None:
    text = 'echo "a b" \'c d\' e\\ f \\\n  é="x $y z" $\'t\' -x="1"2 # no'
    assert words(text) == [
        ("echo", 1, 1),
        ("a b", 1, 7),
        ("c d", 1, 13),
        ("e f", 1, 18),
        ("é=x $y z", 2, 3),
        ("t", 2, 14),
        ("-x=12", 2, 19),
    ]


def test_columns_are_characters_not_bytes() -> None:
    assert words("écho 'ü' x")[2] == ("x", 1, 10)


@pytest.mark.parametrize("behind", [" ", "\t", " # four GPUs", "   # a  "])
def test_a_backslash_that_continues_nothing(behind: str) -> None:
    """What follows was meant: its flags are looked at, too."""
    text = (
        f"vllm serve m --uds x --max-model-len 8K \\{behind}\n  --swap-space 4 \\{behind}\n  --dtype auto\n"
    )
    assert places(in_code(text, "run.sh")) == {("continuation-broken", 1), ("flag-removed", 2)}


def test_line_breaks_that_were_lost() -> None:
    """As a page has it that was saved as text."""
    text = "vllm serve m \\ --uds x \\ --max-model-len 8192 \\ --swap-space 4\n"
    found = in_code(text, "run.sh")
    assert {each.rule.id for each in found} == {"continuation-broken", "flag-removed"}
    assert [each.column for each in found] == [14, 49]


def test_a_backslash_that_continues() -> None:
    text = "vllm serve m \\\n  --uds x \\\n  --max-model-len 8192\necho '\\ # x'\nls \\ \n"
    assert in_code(text, "run.sh") == []


def test_sessions_have_prompts_and_output() -> None:
    text = """\
$ vllm serve m --uds x --max-model-len 8K \\
    --swap-space 4
hey -z 1s http://output/v1/completions
user@host:~$ curl http://llm/v1/chat/completions -d '{
  "model": "m"
}'
{"vllm serve": "--num-scheduler-steps"}
"""
    block = f"```console\n{text}```\n"
    assert places(in_code(block, "guide.md")) == {("flag-removed", 3), ("call-unbounded", 5)}


def test_placeholders_are_unknown() -> None:
    text = "vllm serve <model> --uds x --max-model-len <tokens> --swap-space <int>\n"
    assert places(in_code(text, "run.sh")) == {("flag-removed", 1)}


PIECES = st.sampled_from(
    "vllm serve docker run -e A=b -p 8000:8000 vllm/vllm-openai:latest --model m --swap-space hey "
    "curl -d penstock python -m vllm.entrypoints.openai.api_server sh -c bash $( ) ` ' \" \\ "
    "\n \t ; | & && < > << EOF <<EOF # { } [ "
    "]] ${ }} $'x' http://x/v1/chat/completions {\"a\":1} --flag= =x -- - ``` FROM RUN "
    'CMD [" ENV ExecStart= env: '
    "- name: MAX_NUM_SEQS é \x00 \ud800 sudo env timeout kubectl exec helm install".split(" ")
)
TEXTS = st.one_of(
    st.lists(PIECES, max_size=40).map(" ".join),
    st.lists(PIECES, max_size=40).map("".join),
    st.text(max_size=200),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    TEXTS,
    st.sampled_from(
        ["x.sh", "x.md", "x.txt", "Dockerfile", "x.service", "x.py", "x.ts", "x.toml", "x.jsonl"]
    ),
)
def test_no_text_breaks_the_checker(text: str, path: str) -> None:
    lines = text.count("\n") + 1
    for finding in code.examine(path, text):
        assert 1 <= finding.line <= lines + 1
        assert finding.column >= 1


@pytest.mark.parametrize("module", [shell, plain, dockerfile, systemd])
@pytest.mark.parametrize(
    "text", ["(" * 5000, "$(" * 3000, "'" * 3001, "\\\n" * 3000, "sh -c '" * 500, "a=" * 4000]
)
def test_deep_texts_end(module: Any, text: str) -> None:
    list(module.examine(text, "x"))


def test_commands_in_commands_are_bounded() -> None:
    text = "vllm serve m --uds x --max-model-len 8K --swap-space 4"
    for _ in range(3):
        text = 'sh -c "' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    assert [each.rule.id for each in in_code(text, "x.sh")] == ["flag-removed"]


def test_without_a_grammar_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("tree_sitter"):
            raise ImportError(name=name)
        return real(name, *args, **kwargs)

    grammars.parser.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    (found,) = in_code("vllm serve m --swap-space 4\n", "x.sh")
    assert found.rule.id == "grammar-missing"
    assert "penstock[check]" in found.rule.fix
    (found,) = in_code("const a = new OpenAI({})\n", "x.ts")
    assert found.rule.id == "grammar-missing"
    monkeypatch.undo()
    grammars.parser.cache_clear()


def test_blocks_know_their_lines() -> None:
    text = "a\n\n- b\n\n  ~~~Bash title=x\n  c\n\n  d\n  ~~~\n\n    e\n\n> ```{.py}\n> f\n> ```\n"
    found = [(each.language, each.text, each.line, each.indent) for each in markdown.blocks(text)]
    assert found == [("bash", "c\n\nd\n", 6, 2), ("", "e\n", 11, 4), ("py", "f\n", 14, 2)] or found == [
        ("bash", "c\n\nd\n", 6, 2),
        ("py", "f\n", 14, 2),
    ]
