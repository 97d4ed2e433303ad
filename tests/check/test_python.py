"""Python that calls models: what is found, and what is not."""

from __future__ import annotations

import json
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.check import python

from .finding import in_code, places

MESSAGES = '[{"role": "user", "content": "hi"}]'
HEAD = """\
import os, requests, httpx, aiohttp, litellm
from openai import OpenAI
client = OpenAI(api_key=os.environ["KEY"], default_headers={"x-penstock-feature": "chat"})
"""


def found(body: str, head: str = HEAD) -> set[tuple[str, int]]:
    """Rules and lines of what is found in a body behind the head; lines are the body's."""
    shift = head.count("\n")
    return {(rule, line - shift) for rule, line in places(in_code(head + textwrap.dedent(body), "app.py"))}


@pytest.mark.parametrize(
    "call",
    [
        f"client.chat.completions.create(model='m', messages={MESSAGES})",
        f"client.beta.chat.completions.parse(model='m', messages={MESSAGES})",
        f"client.with_options(timeout=3).chat.completions.create(model='m', messages={MESSAGES})",
        "self.client.responses.create(model='m', input='hi')",
        f"litellm.completion(model='m', messages={MESSAGES})",
        f"client.chat.completions.create(model='m', messages={MESSAGES}, max_tokens=None)",
        f"client.chat.completions.create(model='m', messages={MESSAGES}, max_tokens=-1)",
        f"client.chat.completions.create(model='m', messages={MESSAGES}, max_completion_tokens=128_000)",
        "client.messages.create(model='m', messages=[], max_tokens=1024 * 1024)",
        f"requests.post(URL + '/v1/chat/completions', json={{'messages': {MESSAGES}}}, headers=HEADERS)",
        f"httpx.post(f'{{URL}}/v1/chat/completions', json=dict(messages={MESSAGES}), auth=a)",
        "session.post(url='http://x/v1/responses', json={'input': 'hi', 'max_output_tokens': None})",
        "ChatOpenAI(model='m', temperature=0)",
        "openai.ChatCompletion.create(model='m')",
    ],
)
def test_calls_without_a_bound(call: str) -> None:
    assert found(f"x = {call}\n") == {("call-unbounded", 1)}


@pytest.mark.parametrize(
    "call",
    [
        f"client.chat.completions.create(model='m', messages={MESSAGES}, max_tokens=100)",
        f"client.chat.completions.create(model='m', messages={MESSAGES}, max_tokens=limit)",
        f"client.chat.completions.create(model='m', messages={MESSAGES}, **options)",
        "client.chat.completions.create(**request)",
        f"client.chat.completions.create(messages={MESSAGES}, extra_body={{'max_tokens': 5}})",
        f"client.chat.completions.create(messages={MESSAGES}, extra_body=body)",
        "client.completions.create(model='m', prompt='a')",  # 16 tokens
        "client.messages.create(model='m', messages=[])",  # refused without
        "client.responses.create(input='hi', max_output_tokens=64)",
        f"litellm.completion(model='m', messages={MESSAGES}, max_tokens=9)",
        "completion(prompt)",
        "requests.post(f'{URL}/v1/chat/completions', json=payload, headers=HEADERS)",
        "requests.post(f'{URL}/v1/chat/completions', json={**payload, 'n': 1}, headers=HEADERS)",
        "requests.post(f'{URL}/v1/chat/completions', json={'max_tokens': limit}, headers=HEADERS)",
        "requests.post('https://chat.example.com/messages', json={'text': 'hi'})",
        "requests.get('http://x/v1/chat/completions')",
        "ChatOpenAI(model='m', max_tokens=200)",
        "db.responses.create",
    ],
)
def test_calls_that_are_right_or_not_known(call: str) -> None:
    assert found(f"x = {call}\n") == set()


def test_bodies_that_have_a_name() -> None:
    send = "requests.post(f'{URL}/v1/chat/completions', json=body, headers=HEADERS)\n"
    assert found("body = {'messages': []}\n" + send) == {("call-unbounded", 2)}
    assert found("body = {'messages': []}\nbody['max_tokens'] = 5\n" + send) == set()
    assert found("body = {'messages': []}\nbody.update(more)\n" + send) == set()
    assert found("body = {'messages': []}\nbody = other()\n" + send) == set()
    assert found("LIMIT = 200\nbody = {'max_tokens': LIMIT}\n" + send) == set()
    assert found("LIMIT = 0\nbody = {'max_tokens': LIMIT}\n" + send) == {("call-unbounded", 3)}


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("'sk-aB3dE5fG7hJ9kL1mN3pQ5rS7'", "key-in-text"),
        ("'EMPTY'", "client-keyless"),
        ("'not-needed'", "client-keyless"),
        ("'vllm'", "client-keyless"),
        ("''", "client-keyless"),
        ("'YOUR_API_KEY'", None),
        ("'sk-...'", None),
        ("os.environ['KEY']", None),
        ("settings.key", None),
        ("None", None),
    ],
)
def test_keys_of_clients(key: str, rule: str | None) -> None:
    body = f"from openai import OpenAI\nclient = OpenAI(api_key={key})\n"
    assert found(body, "") == ({(rule, 2)} if rule else set())


def test_plain_http_without_a_key() -> None:
    url = "'http://llm/v1/completions'"
    assert found(f"requests.post({url}, json=body)\n") == {("client-keyless", 1)}
    assert found(f"requests.post({url}, json=body, headers={{'Accept': 'x'}})\n") == {("client-keyless", 1)}
    assert found(f"requests.post({url}, json=body, headers={{'Authorization': key}})\n") == set()
    assert found(f"requests.post({url}, json=body, headers={{**common}})\n") == set()
    assert found(f"requests.post({url}, json=body, headers=headers)\n") == set()
    assert found(f"requests.post({url}, json=body, auth=me)\n") == set()
    bare = (
        "async with aiohttp.ClientSession() as session:\n    async with session.post({}, json=b) as r: pass\n"
    )
    assert found("async def f():\n" + textwrap.indent(bare.format(url), "    ")) == {("client-keyless", 3)}
    kept = bare.replace("ClientSession()", "ClientSession(headers=h)")
    assert found("async def f():\n" + textwrap.indent(kept.format(url), "    ")) == set()
    assert found(f"s = requests.Session()\ns.headers['Authorization'] = k\ns.post({url}, json=b)\n") == set()
    assert found(f"def f(session):\n    session.post({url}, json=b)\n") == set()


def test_clients_of_ours_send_a_feature_tag() -> None:
    make = "from openai import OpenAI\nclient = OpenAI(base_url=URL, api_key=KEY{})\n"
    assert found(make.format(""), "") == {("call-untagged", 2)}
    assert found(make.format(", default_headers={'x-penstock-feature': 'chat'}"), "") == set()
    assert found(make.format(", default_headers=HEADERS"), "") == set()
    assert found(make.format(", **options"), "") == set()
    assert found("from openai import OpenAI\nclient = OpenAI()\n", "") == set()  # a cloud's
    call = "client.chat.completions.create(max_tokens=5, extra_headers={'X-Penstock-Feature': f})\n"
    assert found(make.format("") + call, "") == set()


SYSTEM = "You are a helpful assistant. Answer briefly, and name your sources."


@pytest.mark.parametrize(
    "prompt",
    [
        f'f"Today is {{datetime.now()}}. {SYSTEM}"',
        f'f"{{user.name}} asks. {SYSTEM}"',
        f'f"Context: {{context}}\\n{SYSTEM}"',
        f'"Today is {{}}. {SYSTEM}".format(date.today())',
        f'"Session {{id}}. {SYSTEM}".format(id=uuid.uuid4())',
        f'str(time.time()) + " " + "{SYSTEM}"',
        f'f"It is {{now}}. {SYSTEM}"',
    ],
)
def test_what_changes_before_what_stays(prompt: str) -> None:
    head = "def ask(user, context):\n    now = datetime.now()\n"
    body = f'    m = [{{"role": "system", "content": {prompt}}}]\n'
    assert found(head + body, "") == {("prompt-dynamic-first", 3)}
    assert found(head + f"    agent(system={prompt})\n", "") == {("prompt-dynamic-first", 3)}


@pytest.mark.parametrize(
    "prompt",
    [
        f'"{SYSTEM}"',
        f'f"{SYSTEM} Today is {{datetime.now()}}."',
        f'f"{{COMPANY}}: {SYSTEM}"',
        f'f"{{language}}: {SYSTEM}"',
        f'f"{{tool_name}} {SYSTEM}"',
        'f"Today is {datetime.now()}."',
        "prompt",
        f'f"{{NAME}} {SYSTEM}"',
    ],
)
def test_what_stays_first(prompt: str) -> None:
    body = f'def ask(user, tool_name):\n    m = [{{"role": "system", "content": {prompt}}}]\n'
    assert found("NAME = 'Penny'\nlanguage = 'German'\n" + body, "") == set()


def test_a_system_prompt_behind_the_users_message() -> None:
    body = 'm = [{"role": "user", "content": q}, {"role": "system", "content": "Be brief."}]\n'
    assert found(body, "") == {("prompt-dynamic-first", 1)}


CALL = "client.chat.completions.create(model='m', messages=messages, max_tokens=5)"


@pytest.mark.parametrize(
    "loop",
    [
        f"while True:\n    r = {CALL}\n    if r.done:\n        break\n",
        f"while 1:\n    r = {CALL}\n    messages.append(r)\n",
        f"while not done:\n    r = {CALL}\n    done = r.done\n",
        f"while r.tool_calls:\n    r = {CALL}\n",
        f"for step in itertools.count():\n    r = {CALL}\n    if r.done: break\n",
        f"def ask():\n    return {CALL}\nwhile True:\n    r = ask()\n    if not r.tools: break\n",
    ],
)
def test_loops_without_an_end(loop: str) -> None:
    line = 3 if loop.startswith("def") else 1
    assert found(loop) == {("loop-unbounded", line)}


@pytest.mark.parametrize(
    "loop",
    [
        f"for turn in range(8):\n    r = {CALL}\n",
        f"while turns < 8:\n    r = {CALL}\n    turns += 1\n",
        f"while budget.left():\n    r = {CALL}\n",
        f"while True:\n    r = {CALL}\n    turns += 1\n    if turns >= MAX: break\n",
        f"while True:\n    if time.monotonic() > deadline: raise TimeoutError\n    r = {CALL}\n",
        f"while True:\n    q = input('you: ')\n    r = {CALL}\n",
        f"while True:\n    job = await queue.get()\n    r = {CALL}\n",
        f"while True:\n    text = await websocket.receive_text()\n    r = {CALL}\n",
        f"while True:\n    try:\n        return {CALL}\n    except RateLimitError:\n        sleep(1)\n",
        f"while True:\n    def later():\n        return {CALL}\n    register(later)\n    wait()\n",
        "while True:\n    tick()\n",
    ],
)
def test_loops_with_an_end(loop: str) -> None:
    if "await" in loop or "return" in loop:
        loop = "async def f():\n" + textwrap.indent(loop, "    ")
    assert found(loop) == set()


@pytest.mark.parametrize("value", ["None", "-1", "10_000"])
def test_frameworks_without_a_bound(value: str) -> None:
    assert found(f"AgentExecutor(agent=a, tools=t, max_iterations={value})\n", "") == {("loop-unbounded", 1)}
    assert found(f"Runner.run(agent, x, max_turns={value})\n", "") == {("loop-unbounded", 1)}
    assert found("AgentExecutor(agent=a, tools=t, max_iterations=8)\n", "") == set()


def test_the_offline_engine_has_flags_too() -> None:
    body = """\
        from vllm import LLM
        a = LLM(model="m", gpu_memory_utilisation=0.9)
        b = LLM(model="m", gpu_memory_utilization=90, trust_remote_code=True)
        c = LLM(model="m", max_model_len=131072)
        d = LLM(model="m", max_model_len=8192, tensor_parallel_size=4, dtype="auto")
        """
    assert found(body, "") == {
        ("flag-unknown", 2),
        ("flag-value", 3),
        ("trust-remote-code", 3),
        ("context-just-in-case", 4),
    }
    assert found("from mine import LLM\nLLM(gpu_memory_utilisation=0.9)\n", "") == set()
    assert found("AutoModel.from_pretrained('m', trust_remote_code=True)\n", "") == {("trust-remote-code", 1)}


def test_commands_that_python_starts() -> None:
    body = """\
        import subprocess
        subprocess.run(["vllm", "serve", model, "--swap-space", "4", "--uds", "x", "--max-model-len", "8K"])
        subprocess.Popen(f"vllm serve {model} --uds x --max-model-len 8K --num-scheduler-steps 8", shell=True)
        await asyncio.create_subprocess_exec("penstock", "serve", "--prot", "1")
        subprocess.run([*base, "--swap-space"])
        command = ["vllm", "serve", model, "--disable-log-requests"]
        command += ["--host", host]
        start([sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--num-scheduler-steps", "8"])
        subprocess.run([sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--max-model-len", "8K"])
        """
    assert found(body, "") == {
        ("flag-removed", 2),
        ("flag-removed", 3),
        ("flag-unknown", 4),
        ("flag-removed", 6),
        ("flag-removed", 8),
        ("engine-open", 9),
    }


def test_tests_call_doubles() -> None:
    text = f"r = client.chat.completions.create(messages={MESSAGES})\n"
    for path in ("tests/test_app.py", "app_test.py", "conftest.py", "tests/helpers.py"):
        assert in_code(text, path) == []
    assert places(in_code(text, "src/latest.py")) == {("call-unbounded", 1)}


def test_code_blocks_have_the_lines_of_the_document() -> None:
    text = (
        f"Text\n\n- a list\n\n  ```python\n  x = client.chat.completions.create(messages={MESSAGES})\n  ```\n"
    )
    (finding,) = in_code(text, "guide.md")
    assert (finding.rule.id, finding.line, finding.column) == ("call-unbounded", 6, 7)


def test_excerpts_and_other_pythons_are_left_alone() -> None:
    for text in ("print 'openai'", "openai(", "x = openai[\n...", "\0openai", "openai" + "(" * 5000):
        assert in_code(text, "app.py") == []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_module_breaks_it(data: st.DataObject) -> None:
    """Pieces of calls in all combinations."""
    atom = st.sampled_from(
        [
            "x",
            "None",
            "1",
            "-1",
            "'a'",
            "f'{x}a'",
            "{}",
            "{'role': 'system', 'content': f'{now()} a'}",
            "{**x}",
            "[]",
        ]
    )
    key = st.sampled_from(
        ["max_tokens", "messages", "json", "headers", "api_key", "system", "url", "*x", "**"]
    )
    name = st.sampled_from(
        [
            "client.chat.completions.create",
            "requests.post",
            "OpenAI",
            "LLM",
            "x().responses.create",
            "subprocess.run",
            "()",
        ]
    )
    call = st.builds(
        lambda name, parts: f"{name}({', '.join(parts)})",
        name,
        st.lists(
            st.builds(
                lambda key, value: f"**{value}" if key == "**" else f"{key}={value}",
                key.filter(lambda k: k != "*x"),
                atom,
            ),
            max_size=4,
            unique_by=lambda part: part.partition("=")[0],
        ),
    )
    lines = data.draw(
        st.lists(st.sampled_from(["x = {}", "while True: {}", "def f(x): return {}", "x += {}"]), max_size=4)
    )
    text = "from vllm import LLM\nimport requests\n" + "\n".join(
        line.format(data.draw(call)) for line in lines
    )
    list(python.examine(text, "app.py"))


def test_notebooks_have_the_lines_of_their_file() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# openai"]},
        {
            "cell_type": "code",
            "source": ["!vllm serve m --uds x --max-model-len 8K --swap-space 4\n", "%env A=1\n", "b = {}"],
        },
        {"cell_type": "code", "source": ["x = 1\n", "r = client.chat.completions.create(messages=[])\n"]},
        {"cell_type": "code", "source": "client.responses.create(input='a')"},
    ]
    text = json.dumps({"cells": cells, "nbformat": 4}, indent=1)
    found = in_code(text, "try.ipynb")
    rows = text.split("\n")
    assert [each.rule.id for each in found] == ["flag-removed", "call-unbounded", "call-unbounded"]
    assert rows[found[0].line - 1][found[0].column - 1 :].startswith("--swap-space")
    assert rows[found[1].line - 1][found[1].column - 1 :].startswith("client.chat")
    assert "client.responses" in rows[found[2].line - 1]
    assert in_code("{", "try.ipynb") == in_code("[]", "try.ipynb") == []
