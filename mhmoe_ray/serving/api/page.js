// Functions that all pages of the server share.
const element = id => document.getElementById(id);
const base = location.pathname.replace(/PAGE_PATH\/?$/, "/");

function headers() {
  const key = element("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function showStatus(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

async function errorMessage(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the server answered ${response.status}`;
}

// Sends an object as JSON, or with nothing a GET; a route that the model lacks gives null.
async function ask(route, body) {
  const response = await fetch(base + route, {
    method: body ? "POST" : "GET",
    headers: headers(),
    body: body && JSON.stringify(body),
  });
  if (response.status === 404 || response.status === 405) return null;
  if (!response.ok) throw new Error(await errorMessage(response));
  return response.json();
}

function addText(parent, tag, text, className = "") {
  const child = document.createElement(tag);
  child.textContent = text;
  if (className) child.className = className;
  parent.append(child);
  return child;
}

function count(number) {
  for (const [unit, size] of [["B", 1e9], ["M", 1e6], ["K", 1e3]])
    if (number >= size) return `${(number / size).toPrecision(3)} ${unit}`;
  return `${number}`;
}

function facts(model) {
  const d = model.details, labels = [`${count(d.parameters)} parameters`, `${d.layers} layers`];
  if (d.experts) {
    labels.push(`${count(d.active_parameters)} active per token`, `${d.experts} experts, top-${d.top_k}`);
    labels.push(d.heads > 1 ? `MH-MoE, ${d.heads} heads` : "sparse mixture of experts");
  } else labels.push("dense");
  if (model.max_model_len) labels.push(`${model.max_model_len.toLocaleString("en")} tokens of context`);
  return [...labels, `checkpoint ${d.checkpoint}`];
}

function showFacts(model) {
  element("model").textContent = document.title = model.id;
  element("facts").replaceChildren();
  facts(model).forEach(fact => addText(element("facts"), "li", fact));
}

async function describe(route) {
  element("url").textContent = `${location.origin}${base}${route}`;
  const response = await fetch(`${base}v1/models`, {headers: headers()});
  if (!response.ok) {
    element("model").textContent = "mhmoe-ray";
    if (response.status === 401) showStatus("this server asks for an API key", true);
    return null;
  }
  const model = (await response.json()).data[0];
  showFacts(model);
  showStatus("");
  return model;
}

// Returns the sampling parameters that the user has set.
function settings() {
  const ids = ["max_tokens", "temperature", "top_p"].filter(id => element(id).value);
  return Object.fromEntries(ids.map(id => [id, Number(element(id).value)]));
}

async function* streamedEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "";;) {
    const {value, done} = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) yield text.slice(6, end);
  }
}

let abortController = null;

// Streams an answer, calls add(choice) for each part, and shows the speed. Returns the usage if the answer is complete.
async function stream(route, body, add) {
  abortController = new AbortController();
  element("go").disabled = true;
  element("stop").disabled = false;
  const startTime = performance.now();
  let isCut = false;
  showStatus("generating…");
  try {
    const response = await fetch(base + route, {
      method: "POST", headers: headers(), signal: abortController.signal,
      body: JSON.stringify({...body, stream: true, stream_options: {include_usage: true}}),
    });
    if (!response.ok) { showStatus(await errorMessage(response), true); return null; }
    for await (const data of streamedEvents(response)) {
      if (data === "[DONE]") return null;
      const chunk = JSON.parse(data);
      if (chunk.error) { showStatus(chunk.error.message, true); return null; }
      chunk.choices.forEach(choice => { add(choice); isCut ||= choice.finish_reason === "length"; });
      if (chunk.usage) {
        const seconds = (performance.now() - startTime) / 1000, tokens = chunk.usage.completion_tokens;
        const speed = `${tokens} tokens in ${seconds.toFixed(1)} s, ${(tokens / seconds).toFixed(0)} tokens/s`;
        showStatus(isCut ? `${speed}; the answer is cut` : speed);
        return chunk.usage;
      }
    }
    return null;
  } catch (error) {
    showStatus(error.name === "AbortError" ? "stopped" : `no answer: ${error.message}`, error.name !== "AbortError");
    return null;
  } finally {
    abortController = null;
    element("go").disabled = false;
    element("stop").disabled = true;
  }
}

const readFile = file => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

const colour = (number, count) => `hsl(${Math.round(360 * number / Math.max(1, count))} 65% 55%)`;

function addLegend(parent, entries) {
  parent.replaceChildren();
  for (const [label, entryColour] of entries) {
    const item = document.createElement("li"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.backgroundColor = entryColour;
    item.append(swatch, label);
    parent.append(item);
  }
}

// Returns a figure with a square image below a grid of cells, of which fill(cell) returns the colour.
function gridFigure(image, square, cellsPerSide, fill, caption) {
  const figure = document.createElement("figure"), canvas = document.createElement("canvas");
  canvas.width = canvas.height = 240;
  const context = canvas.getContext("2d"), cell = canvas.width / cellsPerSide;
  context.drawImage(image, square[0], square[1], square[2] - square[0], square[3] - square[1], 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 0.6;
  for (let number = 0; number < cellsPerSide ** 2; number++) {
    context.fillStyle = fill(number);
    context.fillRect(number % cellsPerSide * cell, Math.floor(number / cellsPerSide) * cell, cell, cell);
  }
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption);
  figure.append(canvas);
  addText(figure, "figcaption", caption);
  return figure;
}
