// Does things with the official TypeScript SDK and prints what came of each as a line of JSON.
// Usage: node client.mjs BASE_URL, and on standard input lines of SCENARIO MODEL
import readline from "node:readline";

import Anthropic, * as sdk from "@anthropic-ai/sdk";

const [baseURL] = process.argv.slice(2);
const client = new Anthropic({ baseURL, apiKey: "sk-test-typescript", maxRetries: 0 });
const asking = { max_tokens: 100, messages: [{ role: "user", content: "Hi" }] };

const getWeather = {
  type: "custom",
  name: "get_weather",
  description: "Say what the weather will be.",
  input_schema: { type: "object", properties: { city: { type: "string" }, days: { type: "integer" } } },
  parse: (input) => input,
  run: async () => "sunny",
};

const scenarios = {
  create: async (ask) => await client.messages.create(ask),

  stream: async (ask) => {
    const arrivals = [];
    const stream = client.messages.stream(ask);
    stream.on("text", (text) => arrivals.push([text, performance.now()]));
    return { message: await stream.finalMessage(), arrivals };
  },

  events: async (ask) => {
    const names = [];
    for await (const event of await client.messages.create({ ...ask, stream: true })) names.push(event.type);
    return names;
  },

  tools: async (ask) => {
    const runner = client.beta.messages.toolRunner({ ...ask, tools: [getWeather] });
    return await runner.runUntilDone();
  },

  models: async () => {
    const names = [];
    for await (const model of client.models.list({ limit: 1 })) names.push(model.id);
    return { names, one: await client.models.retrieve(names[0]) };
  },

  countTokens: async (ask) => await client.messages.countTokens({ model: ask.model, messages: ask.messages }),
};

for await (const line of readline.createInterface({ input: process.stdin })) {
  const [scenario, model] = line.split(" ");
  try {
    console.log(JSON.stringify({ done: await scenarios[scenario]({ ...asking, model }) }));
  } catch (error) {
    const { status, type, message, requestID, error: body } = error;
    const known = Object.keys(sdk).find((name) => error?.constructor === sdk[name]);
    const kind = known ?? error?.constructor?.name;
    console.log(JSON.stringify({ failed: { kind, status, type, message, requestID, body } }));
  }
}
