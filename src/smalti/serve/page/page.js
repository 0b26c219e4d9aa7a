// The page: draws through the same API that programs use. No library, no build; everything comes from this server.

const at = (id) => document.getElementById(id);
const EXAMPLES = {
  digits: ["dark green eight on bright cyan", "plain red two on light gray", "bright orange five on dark blue"],
  emoji: ["woman astronaut, dark skin tone", "red heart", "cat face with tears of joy"],
};
const state = { models: {}, pictures: [], shown: null, running: null, marked: new Set(), chosen: null, looking: 0 };

// ---- the API ----

function headers(more = {}) {
  const key = at("key").value;
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers) });
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  if (response.status === 401) at("key-field").hidden = false;
  throw new Error(told.error?.message ?? `The server answered ${response.status}.`);
}

const post = (path, body, signal) =>
  call(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal });

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    waiting += value;
    const whole = waiting.split("\n\n");
    waiting = whole.pop();
    for (const event of whole) {
      const data = JSON.parse(event.slice(event.indexOf("data: ") + 6));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

// ---- what is asked for ----

const model = () => state.models[at("model").value];

function examples(name) {
  const { class_names, num_classes } = state.models[name];
  return EXAMPLES[name] ?? class_names?.slice(0, 10) ?? (num_classes ? ["0"] : []);
}

function asked(number) {
  return {
    model: at("model").value, prompt: at("prompt").value, seed: Number(at("seed").value) + number,
    guidance_scale: Number(at("guidance").value), temperature: Number(at("temperature").value),
    stream: true, output_format: "png",
  };
}

function showModel() {
  const { temperature, guidance_scale, grid, width, height } = model();
  setRange("guidance", guidance_scale);
  setRange("temperature", temperature);
  at("frame").style.aspectRatio = `${width} / ${height}`;
  buildCells(grid);
  at("examples").replaceChildren(...examples(at("model").value).map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.onclick = () => { at("prompt").value = text; at("prompt").focus(); };
    return button;
  }));
  if (!at("prompt").value || Object.keys(state.models).flatMap(examples).includes(at("prompt").value)) {
    at("prompt").value = examples(at("model").value)[0] ?? "";
  }
}

function setRange(id, value) {
  at(id).value = value;
  at(`${id}-shown`).value = Number(at(id).value);
}

// ---- drawing ----

async function draw(event) {
  event?.preventDefault();
  if (state.running) return;
  const n = Math.max(1, Math.min(10, Number(at("n").value) || 1));
  const { grid } = model();
  const partial_images = n === 1 ? grid[0] * grid[1] - 1 : grid[0] - 1;
  const pictures = Array.from({ length: n }, () => ({ grid, src: "", receipt: null }));
  state.pictures = pictures;
  show(pictures[0]);
  await run(n === 1 ? "Drawing…" : `Drawing ${n} pictures…`, (signal) => Promise.all(pictures.map(async (picture, i) => {
    const response = await post("v1/images/generations", { ...asked(i), partial_images }, signal);
    await paint(picture, response);
  })));
}

async function redraw() {
  const picture = state.shown;
  if (state.running || !picture?.receipt || !state.marked.size) return;
  const marked = new Set(state.marked);
  const form = new FormData();
  const seed = crypto.getRandomValues(new Uint32Array(1))[0];
  const { guidance_scale, temperature } = asked(0);
  const fields = {
    model: picture.receipt.bundle, prompt: at("prompt").value, seed, guidance_scale, temperature, stream: true,
    partial_images: marked.size,
  };
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  const bytes = Uint8Array.from(atob(picture.src.split(",")[1]), (letter) => letter.charCodeAt(0));
  form.append("image", new Blob([bytes], { type: "image/png" }), "picture.png");
  form.append("mask", await mask(picture, marked), "mask.png");
  const next = { grid: picture.grid, src: picture.src, receipt: null };
  state.pictures.push(next);
  await run(`Redrawing ${marked.size} cells…`, async (signal) => {
    show(next);
    await paint(next, await call("v1/images/edits", { method: "POST", body: form, signal }));
  });
}

function mask(picture, marked) {
  const [rows, columns] = picture.grid;
  const image = at("picture");
  const canvas = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d");
  const [width, height] = [canvas.width / columns, canvas.height / rows];
  context.fillRect(0, 0, canvas.width, canvas.height);
  for (const cell of marked) context.clearRect((cell % columns) * width, Math.floor(cell / columns) * height, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

async function paint(picture, response) {
  for await (const event of events(response)) {
    picture.src = `data:image/png;base64,${event.b64_json}`;
    if (event.smalti) picture.receipt = event.smalti;
    refresh(picture);
  }
}

async function run(text, work) {
  const started = performance.now();
  state.running = new AbortController();
  at("error").hidden = true;
  busy(true, text);
  try {
    await work(state.running.signal);
    at("status").textContent = `Done in ${((performance.now() - started) / 1000).toFixed(1)} s. ${at("status").dataset.note ?? ""}`;
  } catch (error) {
    const stopped = error.name === "AbortError";
    at("status").textContent = stopped ? "Stopped." : "";
    if (!stopped) complain(error);
    state.running.abort(); // one of several that failed ends the others
    state.pictures = state.pictures.filter((picture) => picture.src);
    if (!state.pictures.includes(state.shown)) show(state.pictures[0] ?? null);
  } finally {
    delete at("status").dataset.note;
    state.running = null;
    busy(false);
    refresh(state.shown);
  }
}

function busy(is, text) {
  if (text) at("status").textContent = text;
  at("draw").disabled = is;
  at("stop").hidden = !is;
  document.body.setAttribute("aria-busy", String(is));
}

function complain(error) {
  at("error").textContent = error.message;
  at("error").hidden = false;
}

// ---- showing ----

function show(picture) {
  if (state.shown !== picture) {
    state.marked.clear();
    forget();
    if (picture && String(picture.grid) !== String([at("cells").dataset.rows, at("cells").dataset.columns])) buildCells(picture.grid);
  }
  state.shown = picture;
  refresh(picture);
}

function refresh(picture) {
  const strip = at("strip");
  while (strip.children.length > state.pictures.length) strip.lastChild.remove();
  state.pictures.forEach((one, i) => {
    const button = strip.children[i] ?? strip.appendChild(document.createElement("button"));
    button.type = "button";
    button.onclick = () => show(one);
    button.setAttribute("aria-pressed", String(one === state.shown));
    button.setAttribute("aria-label", `Picture ${i + 1}${one.receipt ? `, seed ${one.receipt.seed}` : ""}`);
    const image = button.firstChild ?? button.appendChild(Object.assign(new Image(), { alt: "" }));
    image.hidden = !one.src;
    if (one.src && image.src !== one.src) image.src = one.src;
  });
  strip.hidden = state.pictures.length < 2;
  if (picture !== state.shown) return;
  const done = Boolean(picture?.receipt) && !state.running;
  at("frame").classList.toggle("empty", !picture?.src);
  at("picture").hidden = !picture?.src;
  if (picture?.src) at("picture").src = picture.src;
  at("picture").alt = picture?.receipt ? `Drawn for: ${picture.receipt.prompt ?? picture.receipt.class_name ?? "no caption"}` : "A picture on its way";
  for (const cell of at("cells").children) cell.disabled = !done || !model().can_edit;
  at("download").hidden = !picture?.receipt;
  if (picture?.receipt) {
    at("download").href = picture.src;
    at("download").download = `${(picture.receipt.prompt ?? picture.receipt.class_name ?? "picture").replace(/[^\w]+/g, "-").slice(0, 60)}-${picture.receipt.seed}.png`;
    at("receipt").textContent = JSON.stringify(picture.receipt);
  }
  at("receipt-box").hidden = !picture?.receipt;
  at("redraw").disabled = !done || !state.marked.size;
}

function buildCells([rows, columns]) {
  const box = at("cells");
  Object.assign(box.dataset, { rows, columns });
  box.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  box.replaceChildren(...Array.from({ length: rows * columns }, (_, cell) => {
    const button = Object.assign(document.createElement("button"), { type: "button", disabled: true, tabIndex: cell ? -1 : 0 });
    button.setAttribute("aria-label", `Row ${Math.floor(cell / columns) + 1}, column ${(cell % columns) + 1}`);
    button.onclick = () => (mode() === "mark" ? mark(cell) : look(cell));
    button.onkeydown = (event) => move(event, cell, rows, columns);
    button.onpointerenter = (event) => { if (event.buttons === 1 && mode() === "mark") mark(cell, true); };
    return button;
  }));
}

function move(event, cell, rows, columns) {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const next = cell + step;
  if (step === undefined || next < 0 || next >= rows * columns) return;
  event.preventDefault();
  const cells = at("cells").children;
  cells[cell].tabIndex = -1;
  cells[next].tabIndex = 0;
  cells[next].focus();
}

const mode = () => document.querySelector("input[name=mode]:checked").value;

function mark(cell, only = false) {
  if (!state.shown?.receipt || state.running) return;
  if (state.marked.has(cell) && !only) state.marked.delete(cell);
  else state.marked.add(cell);
  at("cells").children[cell].setAttribute("aria-pressed", String(state.marked.has(cell)));
  at("redraw").disabled = !state.marked.size;
  at("status").textContent = state.marked.size ? `${state.marked.size} marked; the others are kept.` : "";
}

function forget() {
  state.chosen = null;
  at("found").hidden = true;
  at("hint").hidden = false;
  at("frame").classList.remove("looking");
  for (const cell of at("cells").children) {
    cell.classList.remove("chosen");
    cell.removeAttribute("aria-pressed");
    cell.style.removeProperty("--weight");
  }
}

// ---- looking inside ----

async function look(cell) {
  const picture = state.shown;
  if (!picture?.receipt || state.running) return;
  const turn = ++state.looking;
  const { bundle, prompt, codes, negative_prompt, sampling } = picture.receipt;
  const { temperature, guidance_scale, top_k, top_p } = sampling;
  try {
    const response = await post("v1/choices", {
      model: bundle, prompt: prompt ?? "", codes, cell, negative_prompt, temperature, guidance_scale, top_k, top_p,
    });
    const found = await response.json();
    if (turn === state.looking && picture === state.shown) showInside(found, cell);
  } catch (error) {
    complain(error);
  }
}

function showInside(found, cell) {
  forget();
  state.marked.clear();
  state.chosen = cell;
  at("redraw").disabled = true;
  at("found").hidden = false;
  at("hint").hidden = true;
  const cells = at("cells").children;
  at("where").textContent = `What could stand in ${cells[cell].getAttribute("aria-label").toLowerCase()}`;
  at("alternatives").replaceChildren(...found.alternatives.map((one) => {
    const item = document.createElement("li");
    item.className = one.drawn ? "drawn" : "";
    const image = Object.assign(new Image(), { alt: `Code ${one.code}${one.drawn ? ", the one that was drawn" : ""}` });
    image.src = `data:image/png;base64,${one.patch}`;
    image.title = image.alt;
    const bar = Object.assign(document.createElement("meter"), { value: one.probability, min: 0, max: 1 });
    bar.setAttribute("aria-label", `Probability of code ${one.code}`);
    const amount = Object.assign(document.createElement("span"), { className: "amount", textContent: percent(one.probability) });
    item.append(image, bar, amount);
    return item;
  }));
  const { cells: weights, words, text } = found.attention;
  const most = Math.max(...weights, 1e-9);
  weights.forEach((weight, i) => cells[i].style.setProperty("--weight", (weight / most).toFixed(3)));
  cells[cell].classList.add("chosen");
  at("frame").classList.add("looking");
  const loudest = Math.max(...text, 1e-9);
  at("words").replaceChildren(...words.flatMap((word, i) => {
    const span = Object.assign(document.createElement("span"), { textContent: word, title: percent(text[i]) });
    span.style.setProperty("--weight", (0.75 * text[i] / loudest).toFixed(3));
    return [span, " "];
  }));
}

function percent(share) {
  return share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : `${(100 * share).toPrecision(2)} %`;
}

// ---- replay ----

async function replay(file) {
  if (!file || state.running) return;
  await run("Drawing it again from its receipt…", async (signal) => {
    const bytes = new Uint8Array(await file.arrayBuffer());
    let text = "";
    for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
    const found = await (await post("v1/replay", { image: btoa(text) }, signal)).json();
    at("model").value = found.model;
    showModel();
    state.pictures = found.data.map((one) => ({
      grid: state.models[found.model].grid, src: `data:image/png;base64,${one.b64_json}`, receipt: one.smalti,
    }));
    const { prompt, seed, sampling } = found.data[0].smalti;
    if (prompt) at("prompt").value = prompt;
    at("seed").value = seed;
    setRange("guidance", sampling.guidance_scale);
    setRange("temperature", sampling.temperature);
    const other = found.same_executor ? "" : ` (drawn by another executor than ${found.executor})`;
    at("status").dataset.note = found.identical ? "Identical, code by code and pixel by pixel." : `Not the same: ${found.difference}${other}.`;
    show(state.pictures[0]);
  });
}

// ---- start ----

async function start() {
  const { data } = await (await call("v1/models")).json();
  state.models = Object.fromEntries(data.map((one) => [one.id, one.smalti]));
  at("model").replaceChildren(...data.map((one) => new Option(one.id, one.id)));
  at("error").hidden = true;
  showModel();
  refresh(null);
}

at("form").onsubmit = draw;
at("stop").onclick = () => state.running?.abort();
at("redraw").onclick = redraw;
at("model").onchange = showModel;
at("dice").onclick = () => { at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; };
at("key").onchange = () => start().catch(complain);
at("file").onchange = () => { replay(at("file").files[0]); at("file").value = ""; };
for (const id of ["guidance", "temperature"]) at(id).oninput = () => setRange(id, at(id).value);
for (const input of document.querySelectorAll("input[name=mode]")) input.onchange = () => { state.marked.clear(); forget(); refresh(state.shown); };
document.onkeydown = (event) => {
  if (event.key === "Escape") state.running ? state.running.abort() : forget();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw();
};
at("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); draw(); }
};
document.ondragover = (event) => { event.preventDefault(); document.body.classList.add("dragging"); };
document.ondragleave = (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); };
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  replay(event.dataTransfer.files[0]);
};
start().catch(complain);
