// OpenAI's client for Node: models, completions, chats, streams, errors.
import OpenAI from "openai";
import { readFileSync } from "node:fs";

const model = process.env.FATHOM_MODEL ?? "judged";
const client = new OpenAI({ baseURL: `${process.env.FATHOM_URL}/v1`, apiKey: "none", maxRetries: 0 });
let held = 0, failed = 0;
const check = (what, ok, shown) => {
  console.log(`  ${ok ? "ok  " : "FAIL"} ${what}${shown === undefined ? "" : `: ${shown}`}`);
  ok ? held++ : failed++;
};
const messages = [{ role: "user", content: "Who are the people?" }];

const listed = [];
for await (const each of client.models.list()) listed.push(each.id);
check("models.list", listed.length === 1 && listed[0] === model, listed);
const greedy = { model, max_tokens: 12, temperature: 0 };
const one = await client.completions.create({ ...greedy, prompt: "The state of", logprobs: 2 });
check("completions", one.choices[0].text.length > 0 && one.choices[0].logprobs.tokens.length <= 12, JSON.stringify(one.choices[0].text));
let text = "";
for await (const chunk of await client.completions.create({ ...greedy, prompt: "The state of", stream: true })) {
  text += chunk.choices[0].text;
}
check("a stream is the whole", text === one.choices[0].text);
const chat = await client.chat.completions.create({ model, messages, max_completion_tokens: 12, temperature: 0 });
check("chat", chat.choices[0].message.role === "assistant", JSON.stringify(chat.choices[0].message.content));
const runner = client.chat.completions.stream({ model, messages, max_completion_tokens: 12, temperature: 0, stream_options: { include_usage: true } });
let deltas = "";
runner.on("content", (delta) => { deltas += delta; });
const final = await runner.finalChatCompletion();
check("chat.completions.stream", deltas === chat.choices[0].message.content && final.choices[0].message.content === deltas);
check("its usage", (await runner.totalUsage()).total_tokens === chat.usage.total_tokens);
const leaving = await client.completions.create({ model, prompt: "a", max_tokens: 128, stream: true });
for await (const _ of leaving) break;
check("a stream may be left", leaving.controller.signal.aborted);

for (const [what, kind, body] of [
  ["an unknown model", OpenAI.NotFoundError, { model: "gpt", prompt: "a" }],
  ["an impossible option", OpenAI.BadRequestError, { model, prompt: "a", temperature: -1 }],
  ["an unknown option", OpenAI.BadRequestError, { model, prompt: "a", tempratur: 1 }],
]) {
  try {
    await client.completions.create(body);
    check(what, false, "was accepted");
  } catch (error) {
    check(what, error instanceof kind && error.code !== null, `${error.status} ${error.param} ${error.code}`);
  }
}
try {
  await new OpenAI({ baseURL: `${process.env.FATHOM_KEYED_URL}/v1`, apiKey: "wrong", maxRetries: 0 }).models.list();
  check("a wrong key", false);
} catch (error) {
  check("a wrong key", error instanceof OpenAI.AuthenticationError, error.status);
}
const version = JSON.parse(readFileSync(new URL("node_modules/openai/package.json", import.meta.url))).version;
console.log(`SEEN openai ${version} (Node ${process.version}); ${held} checks held, ${failed} failed`);
process.exit(failed ? 1 : 0);
