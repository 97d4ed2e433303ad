"""LLM: what people write after vLLM's examples."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
import pytest

from penstock import LLM, BeamSearchParams, SamplingParams
from penstock.core.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelLoadError,
    StartupError,
    UnsupportedParameter,
)
from penstock.core.sampling_params import Sampling, ThoughtLimit
from penstock.kernels.cpu.library import available
from penstock.kernels.cpu.linear import has_amx
from penstock.kernels.quantization import SCHEMES
from penstock.text.parsers.families import TOOL_PARSERS
from penstock.text.parsers.pieces import Message

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM("demo", dtype="float32", kv_cache_memory_bytes=32 << 20, threads=1)
    yield made
    made.close()


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["A Pod is", "PagedAttention keeps", "The KV cache"] * 5
    outputs = llm.generate(prompts, [SamplingParams(temperature=0, max_tokens=3 + i) for i in range(15)])
    assert [output.prompt for output in outputs] == prompts
    assert all(output.finished for output in outputs)
    assert [
        len(output.outputs[0].token_ids) for output in outputs if output.outputs[0].finish_reason == "length"
    ]
    assert outputs[12].outputs[0].text.startswith(outputs[0].outputs[0].text)


def test_a_single_prompt_token_ids_and_dictionaries(llm: LLM) -> None:
    (whole,) = llm.generate("A Pod is", GREEDY, use_tqdm=False)
    ids = llm.get_tokenizer().encode("A Pod is")
    assert whole.prompt_token_ids == ids
    for prompt in (ids, [ids], {"prompt_token_ids": ids}, [{"prompt": "A Pod is"}]):
        (output,) = llm.generate(prompt, GREEDY)  # type: ignore[arg-type]
        assert output.outputs[0].text == whole.outputs[0].text


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is a Pod?"}]
    (one,) = llm.chat(messages, GREEDY.with_(max_tokens=120))
    assert len(llm.chat(messages)[0].outputs[0].token_ids) == 16  # vLLM's default
    assert "container" in one.outputs[0].text
    assert one.outputs[0].finish_reason == "stop"
    two = llm.chat([messages, [{"role": "user", "content": "hello"}]], GREEDY)
    assert two[0].outputs[0].text == one.outputs[0].text[: len(two[0].outputs[0].text)]
    (variant,) = llm.chat(messages, chat_template_kwargs={"add_generation_prompt": False})
    assert len(variant.prompt_token_ids) < len(one.prompt_token_ids)


def test_chat_with_tools(llm: LLM) -> None:
    """The template tells the model of them, and a parser finds what it makes of them."""
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_weather", "description": "The weather in a city.", "parameters": city}
    tools = [{"type": "function", "function": function}]
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked, plain = (llm.chat(messages, GREEDY.with_(max_tokens=60), tools=given) for given in (tools, None))
    prompts = [llm.get_tokenizer().decode(each[0].prompt_token_ids) for each in (asked, plain)]
    assert ["get_weather(city)" in prompt for prompt in prompts] == [True, False]
    parser = TOOL_PARSERS["hermes"]()
    answer = Message.of([*parser.push(asked[0].outputs[0].text), *parser.finish()])
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [
        ("get_weather", {"city": "Paris"})
    ]
    assert not answer.content


def test_a_thought_ends_with_its_budget_and_the_answer_goes_on(llm: LLM) -> None:
    """Of each of n choices, in whatever chunks the prompt comes; and it travels whole."""
    end = llm.get_tokenizer().encode("!")[-1]
    limit = ThoughtLimit(3, end, (end, end), begun=True)
    params = SamplingParams(temperature=1.0, seed=1, n=3, max_tokens=8, thought=limit, ignore_eos=True)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params.sampling), type=Sampling) == params.sampling
    held, free = (llm.generate("A Pod is", each)[0].outputs for each in (params, params.with_(thought=None)))
    for one, other in zip(held, free, strict=True):
        assert end not in one.token_ids[:3]
        assert one.token_ids[:3] == other.token_ids[:3]
        assert one.token_ids[3:5] == [end, end]
        assert len(one.token_ids) == 8


def test_a_budget_for_thoughts_needs_a_model_that_marks_them(llm: LLM) -> None:
    with pytest.raises(UnsupportedParameter, match="</think> is no token of the model"):
        llm.generate("x", SamplingParams(thinking_token_budget=3))


def test_n_logprobs_stop_and_the_bill(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=2.0, seed=5, max_tokens=6, logprobs=2, prompt_logprobs=0)
    (output,) = llm.generate("zq#! 77", params)
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    for choice in output.outputs:
        assert choice.logprobs is not None
        assert len(choice.logprobs) == len(choice.token_ids)
        own = [entry[token] for entry, token in zip(choice.logprobs, choice.token_ids, strict=True)]
        assert choice.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in own))
        assert all({1, 2} <= {one.rank for one in entry.values()} for entry in choice.logprobs)
        assert own[0].decoded_token is not None
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.device_seconds > 0
    (again,) = llm.generate("zq#! 77", params)
    assert [choice.token_ids for choice in again.outputs] == [choice.token_ids for choice in output.outputs]
    (plain,) = llm.generate("A Pod is", GREEDY)
    stop = plain.outputs[0].text[5:9]
    (stopped,) = llm.generate("A Pod is", GREEDY.with_(stop=(stop,)))
    assert stopped.outputs[0].text == plain.outputs[0].text[: plain.outputs[0].text.index(stop)]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)


def test_the_second_time_hits_the_cache(llm: LLM) -> None:
    prompt = "one shared prefix, long enough for several blocks of the cache. " * 4
    llm.generate(prompt, GREEDY)
    (output,) = llm.generate(prompt + "and more", GREEDY)
    assert output.num_cached_tokens >= 32


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("", GREEDY, "empty"),
        (["a", "b"], [GREEDY], "as many sampling_params"),
        ([[5, 10**6]], GREEDY, "token id 1000000"),
        ({"text": "x"}, GREEDY, "'prompt'"),
        ({"prompt": "x", "multi_modal_data": {}}, GREEDY, "multi_modal_data"),
        ("x", SamplingParams(logit_bias={10**6: 1.0}), "logit_bias"),
    ],
)
def test_bad_input_is_refused_and_leaves_the_engine_as_it_was(
    llm: LLM, prompts: object, params: object, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompts, params)  # type: ignore[arg-type]
    assert llm.generate("A Pod is", GREEDY)[0].outputs[0].text
    assert not llm._engine.loop.has_work


def test_any_iterable_of_prompts_and_numpy_ids(llm: LLM) -> None:
    import numpy as np

    texts = ["A Pod is", "The KV cache"]
    listed = llm.generate(texts, GREEDY)
    made = llm.generate((text for text in texts), GREEDY)
    assert [one.outputs[0].text for one in made] == [one.outputs[0].text for one in listed]
    ids = np.array(llm.get_tokenizer().encode("A Pod is"))
    assert llm.generate([ids], GREEDY)[0].outputs[0].text == listed[0].outputs[0].text  # type: ignore[list-item]


def test_salts_isolate(llm: LLM) -> None:
    text = "a prompt of some length that fills at least one block of the cache, or two. " * 2
    llm.generate({"prompt": text, "cache_salt": "one"}, GREEDY)
    assert llm.generate({"prompt": text, "cache_salt": "two"}, GREEDY)[0].num_cached_tokens == 0
    assert llm.generate({"prompt": text, "cache_salt": "one"}, GREEDY)[0].num_cached_tokens > 0


def test_options_that_do_not_exist_are_named(llm: LLM) -> None:
    with pytest.raises(StartupError, match="no option 'swap_space'"):
        LLM("demo", swap_space=4)
    with pytest.raises(InvalidRequest, match="priority"):
        llm.generate("x", GREEDY, priority=[1])


def test_a_prompt_over_the_context_says_both_lengths(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"2100 tokens.*2048"):
        llm.generate([[7] * 2100], GREEDY)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ModelLoadError, match="does not exist"):
        LLM("./no such model")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "fp8"])  # of GPUs
def test_quantised_weights_give_the_same_answer_in_less_memory(llm: LLM, scheme: str, dtype: str) -> None:
    """Whatever the batch: company and chunks change no bit of a quantised row."""
    if available() is None:
        pytest.skip("no C++ compiler, or PENSTOCK_CPU_KERNELS=0")
    questions = ["What is a Pod?", "What is PagedAttention?", "What is continuous batching?"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    want = [output.outputs[0].text for output in llm.chat(chats, GREEDY)]
    quantised = LLM("demo", quantization=scheme, dtype=dtype, kv_cache_memory_bytes=32 << 20, threads=1)
    try:
        together = quantised.chat(chats, GREEDY.with_(logprobs=0))
        assert [output.outputs[0].text for output in together] == want
        alone = [quantised.chat(chat, GREEDY.with_(logprobs=0))[0] for chat in chats]
        if dtype == "float32" or not has_amx():
            assert [each.outputs[0].logprobs for each in alone] == [
                each.outputs[0].logprobs for each in together
            ]
        model = quantised._engine.loop.executor._model  # type: ignore[attr-defined]
        assert model.read_bytes < 1.4 * model.num_parameters  # 8 bits, and what rounds 192 inputs up to 256
        assert model.weight_bytes < (4 if dtype == "float32" else 2) * model.num_parameters
    finally:
        quantised.close()


def test_beam_search_finds_at_least_what_greedy_finds(llm: LLM) -> None:
    prompts = ["A Pod is", "PagedAttention is"]
    found = llm.beam_search(prompts, BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True))
    greedy = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0))
    for output, plain in zip(found, greedy, strict=True):
        assert len(output.sequences) == 3
        sums = [beam.cum_logprob for beam in output.sequences]
        assert sums == sorted(sums, reverse=True)  # all of one length
        assert sums[0] >= (plain.outputs[0].cumulative_logprob or 0) - 1e-4
        for beam in output.sequences:  # the sum is what the model says of these tokens as a prompt
            params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
            (again,) = llm.generate([beam.tokens], params)
            told = again.prompt_logprobs or []
            own = zip(beam.tokens[-6:], told[-6:], strict=True)
            assert sum(position[token].logprob for token, position in own if position) == pytest.approx(
                beam.cum_logprob, abs=1e-3
            )
            assert beam.finish_reason == "length"
            assert beam.text.startswith(plain.prompt or "")
