// OpenAI's client for JavaScript. A check is a pair: what it calls, and a function that asserts and
// returns what it saw.
import assert from "node:assert/strict";
import OpenAI from "openai";

const { SERVER, TIGHT_SERVER, KEYED_SERVER, PICTURE, BROKEN_PICTURE } = process.env;
const MIN_IMAGE_TOKENS = 15;
const QUESTION = "Describe the image.";

const client = (baseURL = SERVER) => new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const chat = (urls, more = {}) => ({
  model: "demo",
  temperature: 0,
  max_tokens: 40,
  messages: [
    {
      role: "user",
      content: [
        ...urls.map((url) => ({ type: "image_url", image_url: { url } })),
        { type: "text", text: QUESTION },
      ],
    },
  ],
  ...more,
});
const response = (urls, more = {}) => ({
  model: "demo",
  temperature: 0,
  max_output_tokens: 40,
  input: [
    {
      role: "user",
      content: [
        ...urls.map((image_url) => ({ type: "input_image", image_url, detail: "auto" })),
        { type: "input_text", text: QUESTION },
      ],
    },
  ],
  ...more,
});

async function raised(kind, promise) {
  try {
    await promise;
  } catch (error) {
    assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
    return `${error.constructor.name}: ${JSON.stringify(error.error)}`;
  }
  throw new assert.AssertionError({ message: `no ${kind.name}` });
}

const ANIMAL = {
  type: "object",
  properties: { legs: { type: "integer", minimum: 0, maximum: 9 }, kind: { enum: ["cat", "dog"] } },
  required: ["legs", "kind"],
  additionalProperties: false,
};
function isAnimal(text) {
  const animal = JSON.parse(text);
  assert.deepEqual(Object.keys(animal).sort(), ["kind", "legs"]);
  assert.ok(Number.isInteger(animal.legs) && ["cat", "dog"].includes(animal.kind));
  return text;
}

const CHECKS = [
  [
    "chat.completions.parse and responses.create with a JSON schema",
    async () => {
      const json_schema = { name: "animal", schema: ANIMAL, strict: true };
      const parsed = await client().chat.completions.parse(
        chat([PICTURE], { max_tokens: 200, response_format: { type: "json_schema", json_schema } }),
      );
      const format = { type: "json_schema", ...json_schema };
      const made = await client().responses.create(
        response([PICTURE], { max_output_tokens: 200, text: { format } }),
      );
      isAnimal(made.output_text);
      return isAnimal(parsed.choices[0].message.content);
    },
  ],
  [
    "tools, called by chat.completions.create and .stream",
    async () => {
      const tools = [{ type: "function", function: { name: "show", parameters: ANIMAL } }];
      const body = chat([PICTURE], {
        max_tokens: 200,
        tools,
        tool_choice: "required",
        parallel_tool_calls: false,
      });
      const whole = await client().chat.completions.create(body);
      const [call] = whole.choices[0].message.tool_calls;
      const final = await client().chat.completions.stream(body).finalMessage();
      assert.equal(final.tool_calls[0].function.arguments, call.function.arguments);
      assert.equal(whole.choices[0].finish_reason, "tool_calls");
      return `${call.function.name} ${isAnimal(call.function.arguments)}`;
    },
  ],
  [
    "chat.completions.create, streamed and not: text, image, usage",
    async () => {
      const create = (body) => client().chat.completions.create(body);
      const without = await create(chat([]));
      const whole = await create(chat([PICTURE]));
      const text = whole.choices[0].message.content;
      let streamed = "";
      let usage = null;
      const options = { stream: true, stream_options: { include_usage: true } };
      for await (const chunk of await create(chat([PICTURE], options))) {
        streamed += chunk.choices[0]?.delta.content ?? "";
        usage = chunk.usage ?? usage;
      }
      assert.ok(text);
      assert.equal(streamed, text);
      assert.equal(usage.total_tokens, whole.usage.total_tokens);
      assert.ok(whole.usage.prompt_tokens > without.usage.prompt_tokens + MIN_IMAGE_TOKENS);
      return `'${text}', ${usage.prompt_tokens} + ${usage.completion_tokens} tokens`;
    },
  ],
  [
    "chat.completions.stream (the helper)",
    async () => {
      const final = await client().chat.completions.stream(chat([PICTURE])).finalChatCompletion();
      assert.ok(final.choices[0].message.content);
      return final.choices[0].finish_reason;
    },
  ],
  [
    "responses.create, streamed and not: text, image, usage",
    async () => {
      const create = (body) => client().responses.create(body);
      const without = await create(response([]));
      const whole = await create(response([PICTURE]));
      const types = new Set();
      let streamed = "";
      let last = null;
      for await (const event of await create(response([PICTURE], { stream: true }))) {
        types.add(event.type);
        if (event.type === "response.output_text.delta") streamed += event.delta;
        last = event;
      }
      assert.ok(whole.output_text);
      assert.equal(streamed, whole.output_text);
      assert.equal(last.type, `response.${whole.status}`);
      assert.equal(types.size, 9);
      assert.equal(last.response.usage.total_tokens, whole.usage.total_tokens);
      assert.ok(whole.usage.input_tokens > without.usage.input_tokens + MIN_IMAGE_TOKENS);
      return `'${streamed}', ${whole.usage.input_tokens} + ${whole.usage.output_tokens} tokens`;
    },
  ],
  [
    "responses.stream (the helper)",
    async () => {
      const final = await client().responses.stream(response([PICTURE])).finalResponse();
      assert.ok(final.output_text);
      return final.status;
    },
  ],
  [
    "logprobs of a chat and of a response",
    async () => {
      const asked = chat([PICTURE], { logprobs: true, top_logprobs: 2 });
      const { choices, usage } = await client().chat.completions.create(asked);
      assert.equal(choices[0].logprobs.content.length, usage.completion_tokens);
      const include = ["message.output_text.logprobs"];
      const own = await client().responses.create(
        response([PICTURE], { include, top_logprobs: 2 }),
      );
      const { logprobs } = own.output[0].content[0];
      assert.equal(logprobs.length, own.usage.output_tokens);
      assert.equal(logprobs[0].top_logprobs.length, 2);
      return `${logprobs.length} tokens`;
    },
  ],
  [
    "models.list",
    async () => {
      const names = [];
      for await (const model of client().models.list()) names.push(model.id);
      assert.deepEqual(names, ["demo"]);
      return names.join();
    },
  ],
  [
    "a broken image, chat",
    () =>
      raised(
        OpenAI.BadRequestError,
        client().chat.completions.create(chat([BROKEN_PICTURE])),
      ),
  ],
  [
    "a broken image, responses",
    () =>
      raised(OpenAI.BadRequestError, client().responses.create(response([BROKEN_PICTURE]))),
  ],
  [
    "no key",
    () =>
      raised(
        OpenAI.AuthenticationError,
        client(KEYED_SERVER).chat.completions.create(chat([])),
      ),
  ],
  [
    "a second request where one is allowed",
    async () => {
      const tight = client(TIGHT_SERVER);
      const long = { max_tokens: 3000, ignore_eos: true, stream: true };
      const running = await tight.chat.completions.create(chat([], long));
      const said = await raised(
        OpenAI.RateLimitError,
        tight.chat.completions.create(chat([])),
      );
      running.controller.abort();
      return said;
    },
  ],
  [
    "embeddings.create",
    () =>
      raised(OpenAI.NotFoundError, client().embeddings.create({ model: "demo", input: "x" })),
  ],
  [
    "responses.retrieve",
    () => raised(OpenAI.NotFoundError, client().responses.retrieve("resp_1")),
  ],
];

for (const [called, run] of CHECKS) {
  let line;
  try {
    line = { called, saw: await run(), passed: true };
  } catch (error) {
    line = { called, saw: `${error.constructor.name}: ${error.message}`, passed: false };
  }
  console.log(JSON.stringify(line));
}
