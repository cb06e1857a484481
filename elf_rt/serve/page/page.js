"use strict";

const $ = (id) => document.getElementById(id);
const NAMES = ["A", "B"];
const SLIDER = "input[type=range]";
let card = null; // of the model
let running = null; // an AbortController while texts are being written
let sides = []; // of each setting: its card, and the drafts it has seen

async function start() {
  try {
    const answer = await fetch("v1/models", { headers: headers() });
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.error.message);
    card = body.data[0];
  } catch (error) {
    $("status").textContent = error.message;
    return;
  }
  document.title = `${card.id} · elf-rt`;
  $("model").textContent = `${card.id} · ${card.engine} · ${card.max_length} tokens`;
  $("prompt-row").hidden = !card.conditional;
  $("status").textContent = "ready";
  arrange();
}

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

// One or two settings, and as many texts.
function arrange() {
  const count = $("compare").checked ? 2 : 1;
  while (sides.length > count) sides.pop().output.remove();
  while (sides.length < count) sides.push(makeSide(NAMES[sides.length]));
  for (const side of sides) {
    side.output.querySelector("legend").textContent = count > 1 ? `Setting ${side.name}` : "Setting";
  }
}

function makeSide(name) {
  const output = $("side").content.firstElementChild.cloneNode(true);
  const { elements } = output.querySelector("fieldset");
  const side = { name, output, drafts: [], field: (key) => elements[key] };
  options(side.field("preset"), Object.keys(card.presets));
  options(side.field("sampler"), card.samplers);
  const presets = Object.keys(card.presets);
  side.field("preset").value = name === "B" && presets.includes("fast") ? "fast" : presets[0];
  side.field("preset").addEventListener("change", () => fill(side));
  output.querySelector(SLIDER).addEventListener("input", (event) => show(side, Number(event.target.value)));
  fill(side);
  $("outputs").append(output);
  return side;
}

function options(select, values) {
  select.replaceChildren(...values.map((value) => new Option(value, value)));
}

function fill(side) {
  const preset = card.presets[side.field("preset").value];
  for (const key of ["steps", "sampler", "guidance_scale"]) side.field(key).value = preset[key];
}

// What is asked for a setting, without what is the preset's own.
function request(side) {
  const body = { model: card.id };
  if (card.conditional && $("prompt").value.trim()) body.prompt = $("prompt").value;
  if ($("template").value.trim()) body.template = $("template").value;
  const preset = card.presets[side.field("preset").value];
  if (side.field("preset").value !== "default") body.preset = side.field("preset").value;
  if (Number(side.field("steps").value) !== preset.steps) body.steps = Number(side.field("steps").value);
  if (side.field("sampler").value !== preset.sampler) body.sampler = side.field("sampler").value;
  const guidance = Number(side.field("guidance_scale").value);
  if (guidance !== preset.guidance_scale) body.guidance_scale = guidance;
  body.seed = Number($("seed").value);
  return body;
}

async function write() {
  if (running || !$("form").reportValidity()) return;
  running = new AbortController();
  $("write").disabled = true;
  $("cancel").disabled = false;
  $("status").textContent = "writing";
  for (const side of sides) clear(side);
  try {
    for (const side of sides) await writeOne(side, running.signal); // one after the other, so that times compare
    const texts = sides.map((side) => side.drafts.at(-1)?.text ?? "");
    $("said").textContent = `Written: ${texts.join(". ")}`;
    $("status").textContent = "ready";
  } catch (error) {
    $("status").textContent = error.name === "AbortError" ? "cancelled" : "failed";
  } finally {
    running = null;
    $("write").disabled = false;
    $("cancel").disabled = true;
  }
}

async function writeOne(side, signal) {
  const body = JSON.stringify({ ...request(side), stream: true, diffusing: true });
  try {
    const answer = await fetch("v1/completions", { method: "POST", headers: headers(), body, signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      take(side, event);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      side.output.querySelector(".problem").textContent = error.message;
      side.output.querySelector(".problem").hidden = false;
    }
    throw error;
  }
}

// The objects of a stream of server-sent events.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (left + value).split("\n\n");
    left = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice("data: ".length));
    }
  }
}

function clear(side) {
  side.drafts = [];
  side.output.querySelector(".text").replaceChildren();
  side.output.querySelector(".problem").hidden = true;
  side.output.querySelector(".step").textContent = "No steps yet";
  side.output.querySelector(SLIDER).disabled = true;
  for (const dd of side.output.querySelectorAll("dd")) dd.textContent = "–";
}

function take(side, event) {
  const [choice] = event.choices;
  const steps = event.steps ?? Number(side.field("steps").value);
  const name = event.diffusing ? `Step ${event.step} of ${steps}, t = ${event.t.toFixed(3)}` : `Written in ${steps} steps`;
  const slider = side.output.querySelector(SLIDER);
  const follows = Number(slider.value) >= side.drafts.length - 1;
  side.drafts.push({ text: choice.text, name, final: !event.diffusing });
  slider.max = side.drafts.length - 1;
  slider.disabled = side.drafts.length < 2;
  if (follows) show(side, side.drafts.length - 1);
  if (!choice.timings) return;
  const { total_ms, network_ms, predicted_ms, calls } = choice.timings;
  const put = (name, value) => (side.output.querySelector(name).textContent = value);
  put(".ms", milliseconds(total_ms));
  put(".network", milliseconds(network_ms));
  put(".predicted", predicted_ms === null ? "–" : milliseconds(predicted_ms));
  put(".calls", calls);
}

function milliseconds(ms) {
  return `${ms < 100 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

// A draft, with what changed since the one before it marked.
function show(side, index) {
  const slider = side.output.querySelector(SLIDER);
  const { text, name, final } = side.drafts[index];
  const before = index ? words(side.drafts[index - 1].text) : [];
  const now = words(text);
  const kept = common(before, now);
  const nodes = now.map((word, i) => {
    if (!index || final || kept.has(i) || !word.trim()) return document.createTextNode(word);
    const mark = document.createElement("mark");
    mark.textContent = word;
    return mark;
  });
  side.output.querySelector(".text").replaceChildren(...nodes);
  side.output.querySelector(".step").textContent = name;
  slider.value = index;
  slider.setAttribute("aria-valuetext", name);
}

function words(text) {
  return text.match(/\s+|[\p{L}\p{N}']+|[^\s\p{L}\p{N}']/gu) ?? [];
}

// Which words of `now` are in a longest common subsequence with those of `before`.
function common(before, now) {
  const kept = new Set();
  let head = 0;
  while (head < before.length && head < now.length && before[head] === now[head]) kept.add(head++);
  const a = before.slice(head), b = now.slice(head);
  const width = b.length + 1, best = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      best[i * width + j] = a[i] === b[j] ? 1 + best[(i + 1) * width + j + 1]
        : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) kept.add(head + j++), i++;
    else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i++;
    else j++;
  }
  return kept;
}

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function asCurl() {
  const url = new URL("v1/completions", location.href).href;
  const key = $("key").value ? ` -H "Authorization: Bearer $ELF_RT_API_KEY"` : "";
  const call = (side) => `curl ${url} -H 'Content-Type: application/json'${key} -d ${quoted(JSON.stringify(request(side)))}`;
  return sides.map(call).join("\n");
}

function asPython() {
  const key = $("key").value ? `os.environ["ELF_RT_API_KEY"]` : `"none"`;
  const lines = [
    ...($("key").value ? ["import os", ""] : []),
    "from openai import OpenAI", "",
    `client = OpenAI(base_url=${JSON.stringify(new URL("v1", location.href).href)}, api_key=${key})`,
  ];
  for (const side of sides) {
    const { model, prompt, seed, ...ours } = request(side);
    const value = prompt === undefined ? "None" : JSON.stringify(prompt);
    const extra = Object.keys(ours).length ? `, extra_body=${JSON.stringify(ours)}` : "";
    lines.push(`answer = client.completions.create(model=${JSON.stringify(model)}, prompt=${value}, seed=${seed}${extra})`);
    lines.push("print(answer.choices[0].text)");
  }
  return lines.join("\n");
}

async function copy(button, text) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  $("said").textContent = button.textContent;
  setTimeout(() => (button.textContent = label), 1500);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
$("compare").addEventListener("change", arrange);
$("dice").addEventListener("click", () => ($("seed").value = Math.floor(Math.random() * 2 ** 32)));
$("cancel").addEventListener("click", () => running?.abort());
$("copy-curl").addEventListener("click", (event) => copy(event.target, asCurl()));
$("copy-python").addEventListener("click", (event) => copy(event.target, asPython()));
$("key").addEventListener("change", start);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write();
});
start();
