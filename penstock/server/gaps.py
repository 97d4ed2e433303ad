"""`suffix` of completions: prompts of which the model is to write what stands between them and the suffix.

It knows requests and texts; how a family of models is asked is `penstock.text.infill`'s.
"""

from __future__ import annotations

from penstock.core.errors import InvalidRequest, UnsupportedParameter
from penstock.core.sampling_params import SamplingParams
from penstock.text.infill import Infill

from .protocol import CompletionRequest
from .state import State
from .tokens import Usable, encode_texts

_NOT_WITH = ("echo", "truncate_prompt_tokens", "generated_token_ids")


async def gaps(
    state: State, request: CompletionRequest, inputs: list[str | list[int]], params: SamplingParams
) -> tuple[list[str | list[int]], SamplingParams]:
    """The prompts as token ids, with the suffix in each, and parameters that end where a gap is filled.

    Raises UnsupportedParameter where the model was not trained to fill gaps, and InvalidRequest.
    """
    infill = Infill.of(state.tokenizer.token_id)
    if infill is None:
        raise UnsupportedParameter(
            "suffix is not supported: the model has no tokens for what stands before and behind a gap.",
            param="suffix",
            advice="Serve one that was trained to fill in the middle, such as Qwen2.5-Coder.",
        )
    for name in _NOT_WITH:
        if getattr(request, name):
            raise InvalidRequest(f"{name} is not possible with suffix.", param=name)
    texts = [given for given in inputs if isinstance(given, str)]
    if len(texts) < len(inputs):
        raise InvalidRequest("suffix needs prompts that are texts.", param="prompt")
    usable = Usable(state.engine.info.max_model_len, None, "prompt")
    suffix, *prefixes = await encode_texts(state, [request.suffix, *texts], False, usable)
    begin = state.tokenizer.encode("") if request.add_special_tokens else []
    stops = dict.fromkeys((*params.stop_token_ids, *infill.ends))
    return [infill.prompt(prefix, suffix, begin) for prefix in prefixes], params.with_(
        stop_token_ids=tuple(stops)
    )
