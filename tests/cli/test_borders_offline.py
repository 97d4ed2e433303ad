"""The engine without a server, on an executor that says the prompt again: what goes in and what comes out."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock import LLM, SamplingParams, offline
from penstock.core.errors import ContextLengthExceeded, DeviceOutOfMemory, InvalidRequest, StartupError
from penstock.engine.config import EngineConfig
from penstock.engine.messages import ModelInfo
from penstock.offline import CompletionOutput, Logprob, RequestOutput, _logprobs, _Progress, _prompts
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer
from tests.engine.fake import FakeExecutor, spec
from tests.engine.test_loop import make_loop
from tests.server.tiny import make_tokenizer

CONTEXT = 40
TOKENIZER = make_tokenizer()


def make(policy: str = "fcfs", failing: dict[str, Exception] | None = None, **defaults: Any) -> LLM:
    executor = FakeExecutor(vocab_size=300, failing=failing)
    loop = make_loop(executor, max_model_len=CONTEXT, policy=policy)
    info = ModelInfo("/m", "A", "float32", "fake", 300, CONTEXT, (), 4, 64, 4, 0)
    llm = LLM.__new__(LLM)
    llm._policy = policy
    llm._engine = SimpleNamespace(loop=loop, info=info, close=executor.close)  # type: ignore[assignment]
    llm._tokenizer = TOKENIZER
    llm._template = ChatTemplate.from_tokenizer(TOKENIZER)
    llm._defaults = defaults
    llm._numbers = itertools.count()
    return llm


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


FIVE = SamplingParams(max_tokens=5, temperature=0.0)


# ---- prompts ----


@pytest.mark.parametrize(
    ("given", "every"),
    [
        ("a", ["a"]),
        ({"prompt": "a"}, [{"prompt": "a"}]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [1]], ["a", [1]]),
        ((text for text in "ab"), ["a", "b"]),
        ([], []),
        (range(3), [[0, 1, 2]]),
        ([1, "a"], [1, "a"]),
    ],
)
def test_one_prompt_or_several(given: Any, every: list[Any]) -> None:
    assert _prompts(given) == every


@pytest.mark.parametrize(
    ("prompt", "text", "tokens", "salt"),
    [
        ("ab", "ab", ids("ab"), ""),
        ([5, 6], None, [5, 6], ""),
        ({"prompt": "ab", "cache_salt": "s"}, "ab", ids("ab"), "s"),
        ({"prompt_token_ids": [5], "prompt": "shown"}, "shown", [5], ""),
        ({"prompt_token_ids": (5, 6), "cache_salt": None}, None, [5, 6], ""),
    ],
)
def test_prompts_in_all_forms(prompt: Any, text: str | None, tokens: list[int], salt: str) -> None:
    llm = make()
    assert llm._encode(prompt) == (text, tokens, salt)
    [output] = llm.generate([prompt], FIVE)
    assert (output.prompt, output.prompt_token_ids) == (text, tokens)
    said = [tokens[place % len(tokens)] for place in range(5)]
    assert output.outputs[0].token_ids == said
    assert output.outputs[0].text == TOKENIZER.decode(said)


@pytest.mark.parametrize("prompt", [{}, {"cache_salt": "s"}, {"prompt": "a", "other": 1}])
def test_dictionaries_that_are_no_prompts(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"needs 'prompt' or 'prompt_token_ids'.*got \[") as caught:
        make().generate(prompt, FIVE)
    assert caught.value.param == "prompts"


# ---- parameters ----


def test_parameters_are_for_all_for_each_or_the_models() -> None:
    llm = make(max_tokens=2, temperature=0.0)
    assert llm.get_default_sampling_params() == SamplingParams(max_tokens=2, temperature=0.0)
    assert [len(output.outputs[0].token_ids) for output in llm.generate(["a", "b"])] == [2, 2]
    assert [len(output.outputs[0].token_ids) for output in llm.generate(["a", "b"], FIVE)] == [5, 5]
    each = [FIVE, FIVE.with_(max_tokens=3)]
    assert [len(output.outputs[0].token_ids) for output in llm.generate(["a", "b"], each)] == [5, 3]
    with pytest.raises(InvalidRequest, match="2 prompts need as many sampling_params, got 1"):
        llm.generate(["a", "b"], [FIVE])
    assert llm.generate([]) == []
    assert llm.get_tokenizer() is TOKENIZER


def test_priorities_need_their_policy_and_are_one_for_each() -> None:
    llm = make()
    assert len(llm.generate(["a", "b"], FIVE, priority=[0, 0])) == 2
    with pytest.raises(
        InvalidRequest, match="priority has no effect under scheduling_policy='fcfs'"
    ) as caught:
        llm.generate(["a", "b"], FIVE, priority=[0, 1])
    assert caught.value.param == "priority"
    assert caught.value.advice == 'Make the LLM with scheduling_policy="priority".'
    with pytest.raises(InvalidRequest, match="2 prompts need as many priorities, got 1"):
        llm.generate(["a", "b"], FIVE, priority=[0])
    ranked = make("priority")
    added: list[tuple[int, str]] = []
    add = ranked._engine.loop.scheduler.add

    def noted(spec: Any, now: float) -> Any:
        added.append((spec.priority, spec.cache_salt))
        return add(spec, now)

    ranked._engine.loop.scheduler.add = noted  # type: ignore[method-assign]
    ranked.generate(["a", {"prompt": "b", "cache_salt": "s"}], FIVE, priority=[3, -1])
    assert added == [(3, ""), (-1, "s")]


def test_a_prompt_leaves_room_for_a_token() -> None:
    llm = make()
    many = FIVE.with_(max_tokens=None, ignore_eos=True)
    [output] = llm.generate([[7] * (CONTEXT - 1)], many)
    assert len(output.outputs[0].token_ids) == 1
    [output] = llm.generate([[7] * (CONTEXT - 3)], many)
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (3, "length")
    [output] = llm.generate([[7] * (CONTEXT - 3)], many.with_(max_tokens=100))
    assert len(output.outputs[0].token_ids) == 3
    for length in (CONTEXT, CONTEXT + 5):
        with pytest.raises(ContextLengthExceeded, match=f"has {length} tokens; the context, .* is {CONTEXT}"):
            llm.generate([[7] * length], many)
    for token in (-1, 300):
        with pytest.raises(
            InvalidRequest, match=f"contains token id {token}; the vocabulary has ids 0 to 299"
        ):
            llm.generate([[7, token, -5]], FIVE)
    assert len(llm.generate([[0, 299]], FIVE)[0].outputs[0].token_ids) == 5
    with pytest.raises(InvalidRequest):
        llm.generate(["a"], FIVE.with_(logit_bias={300: 1.0}))


# ---- outputs ----


def test_choices_bills_and_cached_tokens() -> None:
    llm = make()
    [output] = llm.generate(["abcdefgh"], FIVE.with_(n=3, temperature=1.0, logprobs=1, prompt_logprobs=0))
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert output.request_id == "0"
    assert output.finished
    assert {choice.text for choice in output.outputs} == {"abcde"}
    assert {choice.finish_reason for choice in output.outputs} == {"length"}
    assert {choice.cumulative_logprob for choice in output.outputs} == {0.0}
    first, *_ = ids("a")
    assert output.outputs[0].logprobs is not None
    assert output.outputs[0].logprobs[0] == {first: Logprob(0.0, 1, "a")}
    assert len(output.outputs[0].logprobs) == 5
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == 8
    assert output.prompt_logprobs[1] == {ids("b")[0]: Logprob(0.0, 1, "b")}
    assert output.num_cached_tokens == 0
    assert output.device_seconds == pytest.approx(llm._engine.loop.meter.busy)
    [again] = llm.generate(["abcdefgh"], FIVE)
    assert again.request_id == "1"
    assert again.num_cached_tokens == 4
    assert again.outputs[0].logprobs is None
    assert again.outputs[0].cumulative_logprob is None
    assert again.prompt_logprobs is None
    llm._engine.loop.scheduler.check()


def test_a_stop_string_ends_a_sequence_and_its_bill_comes() -> None:
    llm = make()
    [stopped, whole] = llm.generate(
        ["abcdef", "uvwxyz"], SamplingParams(max_tokens=9, temperature=0.0, stop=("cd",))
    )
    assert (stopped.outputs[0].text, stopped.outputs[0].finish_reason) == ("ab", "stop")
    assert stopped.outputs[0].stop_reason == "cd"
    assert whole.outputs[0].text == "uvwxyzuvw"
    assert stopped.device_seconds + whole.device_seconds == pytest.approx(llm._engine.loop.meter.busy)
    assert not llm._engine.loop.has_work


def test_a_failure_is_its_callers_and_leaves_nothing_behind() -> None:
    llm = make(failing={"1": DeviceOutOfMemory("no room")})
    with pytest.raises(DeviceOutOfMemory, match="request 1 failed: "):
        llm.generate(["a", "b", "c"], FIVE)
    assert not llm._engine.loop.has_work
    assert len(llm.generate(["d"], FIVE)) == 1


def test_an_interrupt_forgets_what_ran() -> None:
    llm = make()
    loop = llm._engine.loop
    step, calls = loop.step, []

    def interrupted() -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step()

    loop.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], FIVE)
    assert not loop.has_work
    assert len(llm.generate(["c"], FIVE)[0].outputs[0].token_ids) == 5


def test_conversations_go_through_the_template() -> None:
    llm = make()
    hi = [{"role": "user", "content": "Hi"}]
    one = FIVE.with_(max_tokens=1)
    plain = "<|start|>user\nHi<|end|>\n"
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, plain + "<|start|>assistant\n"),
        ({"add_generation_prompt": False}, plain),
        ({"chat_template_kwargs": {"mood": "!"}}, plain + "<|start|>assistant\n!"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, plain),
        ({"chat_template": "{{ messages[0].content }}?"}, "Hi?"),
    ]
    for options, text in cases:
        [output] = llm.chat(hi, one, **options)
        assert output.prompt_token_ids == TOKENIZER.encode(text, add_special_tokens=False), options
    two = llm.chat([hi, hi], one, use_tqdm=False)
    assert len(two) == 2
    ended = [*hi, {"role": "assistant", "content": "We"}]
    [output] = llm.chat(ended, one, add_generation_prompt=False, continue_final_message=True)
    assert TOKENIZER.decode(output.prompt_token_ids, False).endswith("assistant\nWe")


# ---- small things ----


def test_options_that_do_not_exist_are_named() -> None:
    with pytest.raises(StartupError, match=r"LLM has no option 'a_b'\.") as caught:
        LLM("demo", z=1, a_b=2)
    assert caught.value.param == "a_b"
    assert caught.value.advice.startswith("Options are the engine flags of penstock serve --help")


def test_a_request_is_finished_when_all_of_it_is() -> None:
    output = RequestOutput("0", None, [], [CompletionOutput(0), CompletionOutput(1, finish_reason="stop")])
    assert not output.finished
    output.outputs[0].finish_reason = "length"
    assert output.finished


def test_entries_without_a_position_are_left_out() -> None:
    entry = {"logprob": -0.5, "rank": 2, "decoded_token": "a"}
    assert _logprobs([None, {5: entry}]) == [{5: Logprob(-0.5, 2, "a")}]
    assert Logprob(-1.0) == Logprob(-1.0, None, None)


def test_a_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = SimpleNamespace(isatty=lambda: True, write=lambda text: None, flush=lambda: None)
    monkeypatch.setattr("penstock.offline.sys", SimpleNamespace(stderr=terminal))
    assert _Progress(0, True)._bar is None
    assert _Progress(3, False)._bar is None
    bar = _Progress(3, True)
    assert bar._bar is not None
    bar.advance()
    [task] = bar._bar.tasks
    assert (task.total, task.completed) == (3, 1)
    with bar:
        assert bar._bar.live.is_started
    assert not bar._bar.live.is_started
    monkeypatch.setattr("penstock.offline.sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: False)))
    with _Progress(3, True) as quiet:
        quiet.advance()
    assert quiet._bar is None


def test_what_is_built_and_that_it_is_freed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: list[EngineConfig] = []
    done: list[str] = []
    info = ModelInfo(str(tmp_path), "A", "float32", "fake", 300, CONTEXT, (), 4, 64, 4, 0)

    def build(config: EngineConfig) -> Any:
        built.append(config)
        done.append("built")
        return SimpleNamespace(loop=None, info=info, close=lambda: done.append("closed"))

    monkeypatch.setattr(offline, "build_engine", build)
    monkeypatch.setattr(offline, "prepare", lambda environment: done.append(f"{environment is os.environ}"))
    monkeypatch.setattr(Tokenizer, "from_directory", lambda path: TOKENIZER)
    LLM("m", block_size=8).close()
    assert done == ["True", "built", "closed"]
    assert built == [EngineConfig(model="m", block_size=8, max_num_mixed_prefill_tokens=0)]
    LLM(max_num_mixed_prefill_tokens=7)
    assert built[1] == EngineConfig(model="demo", max_num_mixed_prefill_tokens=7)


def test_a_request_without_a_priority_has_none() -> None:
    llm = make("priority")
    loop, seen = llm._engine.loop, []
    handle = loop.handle

    def handled(message: Any) -> Any:
        seen.append(message)
        return handle(message)

    loop.handle = handled  # type: ignore[method-assign]
    llm.generate(["a", "b"], FIVE)
    assert [message.spec.priority for message in seen] == [0, 0]
    llm.generate(["a", "b"], FIVE, priority=[2, -1])
    assert [message.spec.priority for message in seen[2:]] == [2, -1]


def test_what_nobody_wants_any_more_is_not_computed() -> None:
    llm = make()
    loop, steps = llm._engine.loop, []
    step = loop.step

    def counted() -> Any:
        steps.append(1)
        return step()

    loop.step = counted  # type: ignore[method-assign]
    events = llm._run([spec("a", (1, 2, 3), max_tokens=30), spec("b", (4, 5), max_tokens=30)])
    next(events)
    before = len(steps)
    events.close()  # type: ignore[attr-defined]
    assert not loop.has_work
    assert len(steps) <= before + 2


def test_the_bar_is_on_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = SimpleNamespace(isatty=lambda: True, write=lambda text: None, flush=lambda: None)
    monkeypatch.setattr("penstock.offline.sys", SimpleNamespace(stderr=terminal))
    assert _Progress(3, True)._bar.live.console.stderr
