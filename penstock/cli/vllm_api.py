"""Every endpoint of vLLM 0.32 and every field of its requests, and what happens with each here.

    FIELDS, ELSEWHERE ── with the types that requests are decoded to ──▶ a section of docs/api.md

    python -m penstock.cli.vllm_api

Names are of vLLM's own types (`protocol.py` of each family). What becomes of one is not said here: it is
looked up where requests are checked.
"""

from __future__ import annotations

import sys

from penstock.server import protocol, protocol_pooling
from penstock.server.chat_batch import ALONE
from penstock.server.fields import HARMLESS, IGNORED, OTHERS, REPLACED
from penstock.server.messages.shapes import CountTokensRequest, MessagesRequest
from penstock.server.responses.shapes import ResponsesRequest

#: Path → the fields of its requests, in all of their forms.
FIELDS: dict[str, str] = {
    "/v1/chat/completions": (
        "add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template "
        "chat_template_kwargs continue_final_message documents ec_transfer_params echo frequency_penalty "
        "ignore_eos include_reasoning include_stop_str_in_output kv_transfer_params length_penalty "
        "logit_bias logprob_token_ids logprobs max_completion_tokens max_tokens media_io_kwargs messages "
        "min_p min_tokens mm_payload mm_processor_kwargs model n parallel_tool_calls presence_penalty "
        "priority prompt_logprobs reasoning_effort repetition_detection repetition_penalty request_id "
        "response_format return_mm_kwargs return_prompt_text return_token_ids return_token_offsets "
        "return_tokens_as_token_ids routed_experts_prompt_start seed session_id skip_special_tokens "
        "spaces_between_special_tokens stop stop_token_ids stream stream_interval stream_options "
        "structured_outputs temperature thinking_token_budget tool_choice tools top_k top_logprobs top_p "
        "truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking"
    ),
    "/v1/completions": (
        "add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params echo "
        "frequency_penalty ignore_eos include_stop_str_in_output kv_transfer_params length_penalty "
        "logit_bias logprob_token_ids logprobs max_tokens min_p min_tokens mm_payload model n "
        "presence_penalty priority prompt prompt_embeds prompt_logprobs repetition_detection "
        "repetition_penalty request_id response_format return_mm_kwargs return_token_ids "
        "return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start seed session_id "
        "skip_special_tokens spaces_between_special_tokens stop stop_token_ids stream stream_interval "
        "stream_options structured_outputs suffix temperature thinking_token_budget top_k top_p "
        "truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking"
    ),
    "/v1/responses": (
        "background cache_salt chat_template_kwargs ec_transfer_params enable_response_messages "
        "frequency_penalty ignore_eos include include_reasoning include_stop_str_in_output input "
        "instructions kv_transfer_params logit_bias max_output_tokens max_tool_calls media_io_kwargs "
        "metadata min_p mm_payload mm_processor_kwargs model parallel_tool_calls presence_penalty "
        "previous_input_messages previous_response_id priority prompt prompt_cache_key reasoning "
        "repetition_penalty request_id return_mm_kwargs seed service_tier session_id skip_special_tokens "
        "stop stop_token_ids store stream structured_outputs temperature text tool_choice tools top_k "
        "top_logprobs top_p truncation user vllm_xargs watermarking"
    ),
    "/v1/messages": (
        "cache_salt chat_template_kwargs ec_transfer_params kv_transfer_params max_tokens messages "
        "metadata mm_payload model output_config return_mm_kwargs stop_sequences stream system "
        "temperature thinking tool_choice tools top_k top_p vllm_xargs watermarking"
    ),
    "/v1/messages/count_tokens": (
        "chat_template_kwargs messages model output_config system thinking tool_choice tools"
    ),
    "/v1/embeddings": (
        "add_generation_prompt add_special_tokens cache_salt chat_template chat_template_kwargs "
        "continue_final_message dimensions embed_dtype encoding_format endianness input media_io_kwargs "
        "messages mm_processor_kwargs model padding priority request_id truncate_prompt_tokens "
        "truncation_side use_activation user"
    ),
    "/pooling": (
        "add_generation_prompt add_special_tokens cache_salt chat_template chat_template_kwargs "
        "continue_final_message dimensions embed_dtype encoding_format endianness input "
        "media_io_kwargs messages mm_processor_kwargs model padding priority request_id task "
        "truncate_prompt_tokens truncation_side use_activation user"
    ),
    "/classify": (
        "add_generation_prompt add_special_tokens cache_salt chat_template chat_template_kwargs "
        "continue_final_message input media_io_kwargs messages mm_processor_kwargs model padding priority "
        "request_id truncate_prompt_tokens truncation_side use_activation user"
    ),
    "/score": (
        "cache_salt chat_template_kwargs data_1 data_2 documents instruction items max_tokens_per_doc "
        "max_tokens_per_query mm_processor_kwargs model padding priority queries request_id text_1 text_2 "
        "truncate_prompt_tokens truncation_side use_activation user"
    ),
    "/rerank": (
        "cache_salt chat_template_kwargs documents instruction max_tokens_per_doc max_tokens_per_query "
        "mm_processor_kwargs model padding priority query request_id top_n truncate_prompt_tokens "
        "truncation_side use_activation user"
    ),
    "/v1/chat/completions/batch": (
        "add_generation_prompt best_of cache_salt chat_template chat_template_kwargs "
        "continue_final_message early_stopping echo frequency_penalty guided_decoding_backend "
        "include_reasoning include_stop_str_in_output length_penalty logit_bias logprob_token_ids logprobs "
        "max_completion_tokens max_tokens media_io_kwargs messages min_p mm_processor_kwargs model n "
        "presence_penalty priority repetition_penalty request_id response_format return_token_ids "
        "return_tokens_as_token_ids seed stop structured_outputs temperature tool_choice top_k "
        "top_logprobs top_p use_beam_search user watermarking"
    ),
    "/v2/embed": (
        "embedding_types images input_type inputs max_tokens model output_dimension priority texts truncate"
    ),
    "/tokenize": (
        "add_generation_prompt add_special_tokens chat_template chat_template_kwargs "
        "continue_final_message media_io_kwargs messages mm_processor_kwargs model prompt "
        "return_token_strs tools"
    ),
    "/detokenize": ("model tokens"),
}

SHAPES: dict[str, tuple[type[protocol.Body], ...]] = {
    "/v1/chat/completions": (protocol.ChatRequest,),
    "/v1/completions": (protocol.CompletionRequest,),
    "/v1/responses": (ResponsesRequest,),
    "/v1/messages": (MessagesRequest,),
    "/v1/messages/count_tokens": (CountTokensRequest,),
    "/v1/embeddings": (protocol_pooling.EmbeddingRequest,),
    "/pooling": (protocol_pooling.PoolingRequest,),
    "/classify": (protocol_pooling.ClassifyRequest,),
    "/score": (protocol_pooling.ScoreRequest,),
    "/rerank": (protocol_pooling.RerankRequest,),
    "/v1/chat/completions/batch": (protocol.ChatBatchRequest,),
    "/v2/embed": (protocol_pooling.CohereEmbedRequest,),
    "/tokenize": (protocol.TokenizeCompletionRequest, protocol.TokenizeChatRequest),
    "/detokenize": (protocol.DetokenizeRequest,),
}
"""What they are decoded to here."""

ALIKE = {"/score": ("/v1/score",), "/rerank": ("/v1/rerank", "/v2/rerank")}
"""Paths that take the same fields."""

SERVED = (
    *("/health", "/ping", "/load", "/version", "/metrics", "/v1/models", "/invocations", "/tokenizer_info"),
    *("/v1/chat/completions/render", "/v1/completions/render", "/v1/responses/{response_id}"),
    *("/v1/responses/{response_id}/cancel", "/v1/messages/render", "/v1/responses/render"),
)
"""Without fields of their own."""

#: Endpoints that are not here: a 404. (what they are for, the paths)
ELSEWHERE: tuple[tuple[str, str], ...] = (
    (
        "prompts and answers made apart from the engine",
        "/v1/chat/completions/derender /v1/completions/derender "
        "/inference/v1/generate /inference/v1/abort_requests",
    ),
    (
        "Cohere's chats; `/v2/embed` and `/v2/rerank` are here",
        "/cohere/v2/chat /cohere/v2/chat/render",
    ),
    ("scores by generation, decisions", "/generative_scoring /v1/systemone"),
    (
        "sound: models here read text",
        "/v1/audio/transcriptions /v1/audio/translations /v1/realtime",
    ),
    ("LoRA", "/v1/load_lora_adapter /v1/unload_lora_adapter"),
    (
        "with VLLM_SERVER_DEV_MODE; `penstock up` lets models sleep",
        "/reset_prefix_cache /reset_mm_cache /reset_encoder_cache /sleep /wake_up /is_sleeping "
        "/release_kv_cache_memory /collective_rpc /server_info",
    ),
    (
        "training that shares the engine",
        "/pause /resume /is_paused /abort_requests /init_weight_transfer_engine "
        "/shutdown_weight_transfer_engine /start_weight_update /start_draft_weight_update /update_weights "
        "/finish_weight_update /update_weight_version /weight_info /weight_checker /get_world_size",
    ),
    (
        "several engines behind one server",
        "/scale_elastic_ep /is_scaling_elastic_ep /fault_tolerance/apply /fault_tolerance/status "
        "/kv_event_sources",
    ),
    ("profiles by torch", "/start_profile /stop_profile"),
)

_HEAD = """\
## Every endpoint and field of vLLM 0.32

<!-- made by `python -m penstock.cli.vllm_api`; a test compares them -->

Done: it does what it does there, but for [what differs](#different-from-vllm-032-and-why). Named: served,
without effect, and in `X-Penstock-Ignored`. Refused: a 400 that names it, unless its value changes nothing
(`false`, `{}`, …).

"""


def fate(path: str, name: str) -> str:
    """What becomes of a field of vLLM's: done, named or refused."""
    if protocol.ChatBatchRequest in SHAPES[path] and name in ALONE:
        return "refused"
    if any(name in shape.__struct_fields__ for shape in SHAPES[path]):
        return "done"
    rule = any(name in shape.neutral for shape in SHAPES[path])
    if name in IGNORED or (name in HARMLESS and rule):
        return "named"
    if rule or name in REPLACED:
        return "refused"
    return "named" if name in OTHERS else "unknown"


def section() -> str:
    """The section of docs/api.md."""
    lines = ["| endpoint | done | named | refused |", "|---|---|---|---|"]
    for path, names in FIELDS.items():
        found: dict[str, list[str]] = {"done": [], "named": [], "refused": [], "unknown": []}
        for name in names.split():
            found[fate(path, name)].append(name)
        paths = ", ".join(f"`{each}`" for each in (path, *ALIKE.get(path, ())))
        # a name that nobody has heard of is served and named
        cells = (found["done"], found["named"] + found["unknown"], found["refused"])
        lines.append(
            f"| {paths} | " + " | ".join(f"`{' '.join(cell)}`" if cell else "" for cell in cells) + " |"
        )
    lines += [
        "",
        "Here as well, with no fields of their own: " + ", ".join(f"`{path}`" for path in SERVED) + ".",
    ]
    lines += ["", "`/pooling` takes no `data` for plugins."]
    lines += ["", "| not here, a 404 | |", "|---|---|"]
    lines += [
        "| " + " ".join(f"`{path}`" for path in paths.split()) + f" | {what} |" for what, paths in ELSEWHERE
    ]
    return _HEAD + "\n".join(lines) + "\n"


def main() -> None:
    """Print it."""
    sys.stdout.write(section())


if __name__ == "__main__":
    main()
