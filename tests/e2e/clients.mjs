// The official clients of OpenAI and Anthropic for JavaScript against a server of the demo model.
//
//     node clients.mjs URL FOLDER     where FOLDER/node_modules has both packages
//
// Prints a line of JSON for each check: {"name": …, "error": null or what went wrong}.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [, , url, folder] = process.argv;
const require = createRequire(pathToFileURL(`${folder}/`));
const OpenAI = require("openai").default;
const Anthropic = require("@anthropic-ai/sdk").default;

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0, timeout: 60000 });
const claude = new Anthropic({ baseURL: url, apiKey: "unused", maxRetries: 0, timeout: 60000 });
const model = "demo";
const question = [{ role: "user", content: "What is a Pod?" }];
const sum = [{ role: "user", content: "What is 12 plus 30?" }];
const parameters = {
  type: "object",
  properties: { a: { type: "integer" }, b: { type: "integer" } },
  required: ["a", "b"],
};
const add = { name: "add", description: "The sum of two numbers." };
const schema = {
  type: "object",
  properties: { unit: { enum: ["C", "F"] } },
  required: ["unit"],
  additionalProperties: false,
};
const format = { type: "json_schema", name: "report", schema, strict: true };

async function all(stream) {
  const found = [];
  for await (const each of stream) found.push(each);
  return found;
}

const checks = {
  async models() {
    assert.deepEqual((await all(openai.models.list())).map((each) => each.id), [model]);
    assert.equal((await openai.models.retrieve(model)).id, model);
  },

  async "chat, whole and streamed"() {
    const asked = { model, messages: question, temperature: 0 };
    const whole = await openai.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 2 });
    const text = whole.choices[0].message.content;
    assert.match(text, /container/);
    const tokens = whole.choices[0].logprobs.content.map((each) => each.token);
    assert.equal(tokens.slice(0, -1).join(""), text); // the last one ends it
    const stream = { ...asked, stream: true, stream_options: { include_usage: true } };
    const chunks = await all(await openai.chat.completions.create(stream));
    assert.equal(chunks.map((each) => each.choices[0]?.delta.content ?? "").join(""), text);
    assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
    const helper = openai.chat.completions.stream(asked);
    assert.equal(await helper.finalContent(), text);
  },

  async "chat, a form"() {
    const { name, strict } = format;
    const answer = await openai.chat.completions.parse({
      model,
      messages: question,
      temperature: 2,
      response_format: { type: "json_schema", json_schema: { name, strict, schema } },
    });
    assert.ok(["C", "F"].includes(JSON.parse(answer.choices[0].message.content).unit));
  },

  async "chat, tools"() {
    const called = [];
    const tools = [{
      type: "function",
      function: { ...add, parameters, parse: JSON.parse, function: ({ a, b }) => (called.push([a, b]), `${a + b}`) },
    }];
    for (const stream of [false, true]) {
      const runner = openai.chat.completions.runTools({ model, messages: sum, tools, temperature: 0, stream });
      assert.match(await runner.finalContent(), /42/);
    }
    assert.deepEqual(called, [[12, 30], [12, 30]]);
  },

  async completions() {
    const asked = { model, prompt: ["A Pod is", "vLLM is"], max_tokens: 5, temperature: 0 };
    const whole = await openai.completions.create(asked);
    const parts = await all(await openai.completions.create({ ...asked, stream: true }));
    for (const choice of whole.choices) {
      const texts = parts.flatMap((each) => each.choices).filter((each) => each.index === choice.index);
      assert.equal(texts.map((each) => each.text).join(""), choice.text);
    }
  },

  async "responses, whole and streamed"() {
    const asked = { model, input: "What is a Pod?", temperature: 0 };
    const whole = await openai.responses.create(asked);
    assert.match(whole.output_text, /container/);
    const events = await all(await openai.responses.create({ ...asked, stream: true }));
    assert.deepEqual(events.map((each) => each.sequence_number), events.map((_, index) => index));
    const deltas = events.filter((each) => each.type === "response.output_text.delta");
    assert.equal(deltas.map((each) => each.delta).join(""), whole.output_text);
    assert.equal(events.at(-1).type, "response.completed");
    const helper = openai.responses.stream(asked);
    assert.equal((await helper.finalResponse()).output_text, whole.output_text);
    assert.equal((await openai.responses.retrieve(whole.id)).output_text, whole.output_text);
    const items = await all(openai.responses.inputItems.list(whole.id));
    assert.equal(items[0].content[0].text, asked.input);
    const more = { ...asked, previous_response_id: whole.id, input: "What is a Deployment?" };
    assert.ok((await openai.responses.create(more)).output_text);
    await openai.responses.delete(whole.id);
    await assert.rejects(openai.responses.retrieve(whole.id), OpenAI.NotFoundError);
  },

  async "responses, in the background"() {
    const asked = { model, input: "What is a Pod?", temperature: 0, background: true };
    const events = await all(await openai.responses.create({ ...asked, stream: true }));
    const { id } = events.at(-1).response;
    const deltas = events.filter((each) => each.type === "response.output_text.delta");
    const text = deltas.map((each) => each.delta).join("");
    const again = await openai.responses.retrieve(id, { stream: true, starting_after: 3 });
    assert.deepEqual(await all(again), events.slice(4));
    assert.equal((await openai.responses.retrieve(id)).output_text, text);
    assert.equal((await openai.responses.cancel(id)).status, "completed");
  },

  async "responses, tools and a form"() {
    const tools = [{ type: "function", ...add, parameters, strict: false }];
    const input = [...sum];
    const first = await openai.responses.create({ model, input, tools, temperature: 0 });
    const call = first.output.find((each) => each.type === "function_call");
    assert.deepEqual(JSON.parse(call.arguments), { a: 12, b: 30 });
    input.push(...first.output, { type: "function_call_output", call_id: call.call_id, output: "42" });
    assert.match((await openai.responses.create({ model, input, tools, temperature: 0 })).output_text, /42/);
    const formed = await openai.responses.parse({ model, input: "x", temperature: 2, text: { format } });
    assert.ok(["C", "F"].includes(JSON.parse(formed.output_text).unit));
  },

  async "openai's errors"() {
    const asked = { model, messages: question };
    await assert.rejects(openai.chat.completions.create({ ...asked, temperature: -1 }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.param, "temperature");
      return true;
    });
    await assert.rejects(openai.chat.completions.create({ ...asked, model: "gpt" }), OpenAI.NotFoundError);
  },

  async "messages, whole and streamed"() {
    const asked = { model, max_tokens: 200, messages: question, temperature: 0 };
    const whole = await claude.messages.create(asked);
    assert.match(whole.content[0].text, /container/);
    assert.equal(whole.stop_reason, "end_turn");
    const helper = claude.messages.stream(asked);
    let text = "";
    helper.on("text", (more) => (text += more));
    const message = await helper.finalMessage();
    assert.equal(text, whole.content[0].text);
    assert.equal(message.usage.output_tokens, whole.usage.output_tokens);
    const events = await all(await claude.messages.create({ ...asked, stream: true }));
    assert.equal(events[0].type, "message_start");
    assert.equal(events.at(-1).type, "message_stop");
    const { input_tokens: counted } = await claude.messages.countTokens({ model, messages: question });
    assert.equal(counted, whole.usage.input_tokens + whole.usage.cache_read_input_tokens);
  },

  async "messages, tools"() {
    const tools = [{ ...add, input_schema: parameters }];
    for (const streamed of [false, true]) {
      const messages = [...sum];
      const asked = () => ({ model, max_tokens: 200, messages, tools, temperature: 0 });
      const ask = () =>
        streamed ? claude.messages.stream(asked()).finalMessage() : claude.messages.create(asked());
      const first = await ask();
      assert.equal(first.stop_reason, "tool_use");
      const call = first.content.find((each) => each.type === "tool_use");
      assert.match(call.id, /^toolu_/);
      assert.deepEqual(call.input, { a: 12, b: 30 });
      const result = { type: "tool_result", tool_use_id: call.id, content: "42" };
      messages.push({ role: "assistant", content: first.content }, { role: "user", content: [result] });
      const second = await ask();
      assert.equal(second.stop_reason, "end_turn");
      assert.match(second.content[0].text, /42/);
    }
  },

  async "anthropic's errors"() {
    const asked = { model, max_tokens: 0, messages: question };
    await assert.rejects(claude.messages.create(asked), (error) => {
      assert.ok(error instanceof Anthropic.BadRequestError);
      assert.equal(error.error.error.type, "invalid_request_error");
      return true;
    });
  },
};

for (const [name, check] of Object.entries(checks)) {
  let error = null;
  try {
    await check();
  } catch (caught) {
    error = String(caught?.stack ?? caught);
  }
  console.log(JSON.stringify({ name, error }));
}
