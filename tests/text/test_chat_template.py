"""Chat templates against transformers' apply_chat_template, and what the sandbox refuses."""

import pytest
from transformers import PreTrainedTokenizerFast

from penstock.core.errors import InvalidRequest, ModelLoadError
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Qwen3's way with reasoning: only after the last question
THINKING = """\
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- generation %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if date_string is not defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{#- a comment -#}
{% for message in messages %}
    {%- if message.content is string %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- for part in message['content'] %}{{- part.text | trim }}{%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
    {%- if loop.index > 8 %}{% break %}{% endif %}
{%- endfor %}
Today: {{ date_string }}
{% if documents %}{{ documents | map(attribute='title') | join(', ') }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ message['content'] + eos_token }}{% else %}\
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

INDENTED = """
  {% for m in messages %}
    {% if m.role == 'user' %}
  <{{ m.content | tojson(indent=2) }}>
    {% endif %}
  {% endfor %}
{{ {'b': 'ünï<&>', 'a': [1, true, none]} | tojson(sort_keys=true, separators=(',', ':')) }}{{ dict(x=1) }}
"""

TEMPLATES = {
    "chatml": CHATML,
    "thinking": THINKING,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "indented": INDENTED,
}

USER = {"role": "user", "content": "What is a <Pod> & why? ünï"}
SYSTEM = {"role": "system", "content": " Be brief. "}
ASSISTANT = {"role": "assistant", "content": "A group of containers.  "}
TOOL_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "get", "arguments": {"a": "<é>", "b": 1.5}}}],
}
REASONED = {"role": "assistant", "content": "42", "reasoning": "six times seven"}
CHATS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ASSISTANT, USER],
    "ends with assistant": [USER, ASSISTANT],
    "tool call": [USER, TOOL_CALL, {"role": "tool", "content": "5"}],
    "reasoning": [USER, REASONED, USER, REASONED],
    "thought": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
}
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def oracle(directories):
    return PreTrainedTokenizerFast.from_pretrained(directories["byte_level"])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, "enable_thinking": False},
        {"add_generation_prompt": True, "tools": TOOLS},
        {"documents": [{"title": "T", "text": "x"}], "date_string": "1 Jan 2026"},
        {"continue_final_message": True},
        {"bos_token": "<other>"},
    ],
    ids=str,
)
def test_equals_transformers(tokenizers, oracle, template, chat, arguments):
    text = TEMPLATES[template]
    ours = ChatTemplate({"default": text}, tokenizers["byte_level"].special_tokens)
    arguments = {"add_generation_prompt": False, **arguments}
    try:
        wanted = oracle.apply_chat_template(CHATS[chat], chat_template=text, tokenize=False, **arguments)
    except Exception:  # templates refuse or fail in their own ways: then ours must be a 400
        with pytest.raises(InvalidRequest):
            ours.render(CHATS[chat], **arguments)
    else:
        assert ours.render(CHATS[chat], **arguments) == wanted


def test_most_cases_render(tokenizers):
    """The comparison above is not a comparison of failures."""
    rendered = 0
    for text in TEMPLATES.values():
        for chat in CHATS.values():
            try:
                ChatTemplate({"default": text}, tokenizers["byte_level"].special_tokens).render(chat)
                rendered += 1
            except InvalidRequest:
                pass
    assert rendered > 0.6 * len(TEMPLATES) * len(CHATS)


def test_messages_are_not_changed():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
    before = repr(messages)
    ChatTemplate({"default": LLAMA3}, {"bos_token": "<s>"}).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert repr(messages) == before


def test_the_templates_own_words_reach_the_client():
    template = ChatTemplate({"default": MISTRAL}, {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(InvalidRequest, match="Only user and assistant roles are supported!") as caught:
        template.render([SYSTEM, USER])
    assert (caught.value.status, caught.value.param) == (400, "messages")
    with pytest.raises(InvalidRequest, match="fails on these messages: TypeError"):
        template.render([{"role": "user", "content": 5}])


def test_a_syntax_error_is_found_at_start():
    with pytest.raises(ModelLoadError, match=r"the model's template has a syntax error in line 2"):
        ChatTemplate({"default": "fine\n{% for %}"}, source="the model's template")


def test_a_syntax_error_in_a_request_is_the_clients_fault():
    with pytest.raises(InvalidRequest, match="chat_template has a syntax error in line 1"):
        ChatTemplate({}).render([USER], chat_template="{% for %}")


def test_no_template_says_how_to_give_one(tokenizers):
    template = ChatTemplate.from_tokenizer(tokenizers["byte_level"])
    assert not template.available
    with pytest.raises(InvalidRequest, match=r"no chat template.*--chat-template FILE"):
        template.render([USER])


def test_named_templates():
    template = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "rag"})
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=TOOLS) == "tools"
    assert template.render([USER], chat_template="rag") == "rag"
    assert template.render([USER], chat_template="{{ messages[0].role }}") == "user"
    with pytest.raises(InvalidRequest, match=r"several chat templates \(a, b\) and no default"):
        ChatTemplate({"a": "", "b": ""}).render([USER])


def test_override_by_file_or_text(tokenizers, tmp_path):
    tokenizer = tokenizers["byte_level"]
    file = tmp_path / "mine.jinja"
    file.write_text("<{{ bos_token }}>")
    assert ChatTemplate.from_tokenizer(tokenizer, str(file)).render([USER]) == "<<s>>"
    assert ChatTemplate.from_tokenizer(tokenizer, "{{ eos_token }}").render([USER]) == "</s>"
    with pytest.raises(ModelLoadError, match=r"--chat-template .*missing\.jinja"):
        ChatTemplate.from_tokenizer(tokenizer, str(tmp_path / "missing.jinja"))


def test_the_models_template_is_used(model_directory):
    (model_directory / "chat_template.jinja").write_text("{{ messages[0].content }}{{ bos_token }}")
    template = ChatTemplate.from_tokenizer(Tokenizer.from_directory(model_directory))
    assert template.render([{"role": "user", "content": "hi"}]) == "hi<s>"


@pytest.mark.parametrize(
    ("messages", "arguments", "cause"),
    [
        ([], {}, "messages must not be empty"),
        ([USER], {"add_generation_prompt": True, "continue_final_message": True}, "exclude each other"),
        ([TOOL_CALL], {"continue_final_message": True}, "no content to continue"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            {"continue_final_message": True},
            "no text part",
        ),
        ([ASSISTANT, USER], {"continue_final_message": True, "chat_template": "content"}, "drops or changes"),
    ],
)
def test_arguments_that_cannot_work(messages, arguments, cause):
    arguments = {"add_generation_prompt": False, **arguments}
    with pytest.raises(InvalidRequest, match=cause):
        ChatTemplate({"default": CHATML}).render(messages, **arguments)


def test_reserved_names_cannot_be_smuggled_in():
    with pytest.raises(InvalidRequest, match="must not contain 'messages'"):
        ChatTemplate({"default": ""}).render([USER], messages=[])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['sys'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__class__.__bases__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ ('{0.__class__}').format(messages) ~ (messages|attr('__class__')).x }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_the_sandbox_holds(attack):
    with pytest.raises(InvalidRequest):
        ChatTemplate({"default": attack}).render([USER])


def test_templates_see_plain_data_only():
    class Loud(str):
        def leak(self):
            return "leaked"

    with pytest.raises(InvalidRequest):
        ChatTemplate({"default": "{{ messages[0].content.leak() }}"}).render(
            [{"role": "user", "content": Loud("x")}]
        )


def test_strftime_now_is_a_date():
    assert ChatTemplate({"default": "{{ strftime_now('%Y') | length }}"}).render([USER]) == "4"


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("chatml", "string"),
        ("llama2", "string"),
        ("llama3", "openai"),
        ("mistral", "string"),
    ],
)
def test_content_format_is_read_off_the_template(template, wanted):
    assert ChatTemplate({"default": TEMPLATES[template]}).content_format == wanted
