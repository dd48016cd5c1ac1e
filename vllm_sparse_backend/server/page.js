"use strict";
// Asks ./status again and again and draws the answer. Text from the server is set as text alone.

const el = (id) => document.getElementById(id);
const POLL = Number(document.body.dataset.pollSeconds) * 1000;
const WINDOW = Number(document.body.dataset.windowSeconds) * 1000;
const KEY = "sparse_prefill key";
const whole = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const percent = (part) =>
  (100 * part).toLocaleString("en", { maximumFractionDigits: part < 0.1 ? 1 : 0 }) + "%";
const ratio = (computed, causal) => (causal > 0 ? computed / causal : null);
const fixed = (density) => (density === null ? "–" : density.toFixed(3));

let history = []; // answers of the last WINDOW and the one before, oldest first
let shown = null; // what was drawn last: layers, heads, computed, causal
let cell = null; // the cell that is told of: {layer, head}
let timer = 0;

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return; // nobody looks; visibilitychange comes back to this
  const key = sessionStorage.getItem(KEY);
  try {
    const answer = await fetch("status", {
      cache: "no-store",
      headers: key ? { Authorization: "Bearer " + key } : {},
    });
    if (answer.status === 401) {
      ask(key !== null);
      return;
    }
    if (!answer.ok) throw new Error("the server answers " + answer.status);
    const status = await answer.json();
    el("key").hidden = true;
    remember(status);
    draw(status);
  } catch (error) {
    state("No answer, trying again: " + error.message, "bad");
  }
  timer = setTimeout(poll, POLL);
}

function ask(wrong) {
  sessionStorage.removeItem(KEY);
  el("main").hidden = true;
  el("key").hidden = false;
  state(wrong ? "That is not this server's API key" : "Locked", wrong ? "bad" : "");
  el("token").focus();
}

function remember(status) {
  const now = performance.now();
  const last = history.at(-1);
  // A server that was started anew counts from 0.
  if (last && last.status.tiles.causal > status.tiles.causal) history = [];
  history.push({ now, status });
  while (history.length > 2 && history[1].now <= now - WINDOW) history.shift();
}

function state(text, kind) {
  if (el("state").textContent !== text) el("state").textContent = text;
  el("state").className = kind;
}

// What is to be shown: counters since the start, or what they grew by in the window.
function span(status) {
  const windowed = document.querySelector("input[name=span]:checked").value === "window";
  const before = windowed ? history[0].status : null;
  const less = (now, then) => (before ? now - then : now);
  const grid = (name) => {
    const then = before && before.heads.layers === status.heads.layers ? before.heads[name] : null;
    return status.heads[name].map((row, i) => row.map((n, j) => (then ? n - then[i][j] : n)));
  };
  const earlier = new Map((before ? before.paths : []).map((p) => [p.path + p.reason, p]));
  const threads = status.seconds && {
    spent: less(
      status.seconds.select + status.seconds.attend,
      before && before.seconds ? before.seconds.select + before.seconds.attend : 0,
    ),
    dense: less(status.seconds.dense_estimate, before?.seconds?.dense_estimate ?? 0),
  };
  return {
    seconds: windowed ? Math.round((history.at(-1).now - history[0].now) / 1000) : null,
    paths: status.paths
      .map((p) => ({ ...p, tokens: p.layer_tokens - (earlier.get(p.path + p.reason)?.layer_tokens ?? 0) }))
      .filter((p) => p.tokens > 0)
      .sort((a, b) => b.tokens - a.tokens),
    computed: grid("computed"),
    causal: grid("causal"),
    threads,
  };
}

function draw(status) {
  const now = span(status);
  el("main").hidden = status.served === null;
  state(
    status.active
      ? `Active, ${status.workers} ${status.workers === 1 ? "worker" : "workers"}` +
        (status.unreadable ? `; counters of ${status.unreadable} could not be read` : "")
      : "Not active: " + status.why_not,
    status.active ? "on" : "bad",
  );
  if (status.served === null) return;
  el("model").textContent = status.served.model;
  el("runs").textContent = status.served.runs;
  el("warnings").hidden = !status.served.warnings.length;
  fill(el("warnings"), status.served.warnings.map((text) => make("li", text)));
  figures(now);
  shown = { ...status.heads, computed: now.computed, causal: now.causal };
  heatMap(now);
  tell();
  table();
  paths(now);
  profile(status);
}

function figures(now) {
  const prompt = now.paths.filter((p) => p.reason !== "decode");
  const all = prompt.reduce((sum, p) => sum + p.tokens, 0);
  const sparse = prompt.filter((p) => p.path === "sparse").reduce((sum, p) => sum + p.tokens, 0);
  el("share").textContent = all ? percent(sparse / all) : "–";
  const total = (grid) => grid.flat().reduce((sum, n) => sum + n, 0);
  el("density").textContent = fixed(ratio(total(now.computed), total(now.causal)));
  el("density-of").textContent = "density: computed tiles of those dense would compute";
  const took = now.threads;
  const ran = took !== null && took.spent > 0;
  el("faster").textContent = ran ? (took.dense / took.spent).toFixed(2) + "x" : "–";
  el("faster-of").textContent = "attention faster than dense, by the cost model";
  el("saved").textContent = ran ? duration(took.dense - took.spent) : "–";
  el("saved-of").textContent = took
    ? `of thread time saved: ${duration(took.spent)} spent, ${duration(took.dense)} dense, estimated`
    : "of thread time saved; not taken so far, on GPUs never";
}

function duration(seconds) {
  const sign = seconds < 0 ? "−" : "";
  const s = Math.abs(seconds);
  if (s < 60) return sign + s.toFixed(1) + " s";
  if (s < 3600) return sign + (s / 60).toFixed(1) + " min";
  return sign + (s / 3600).toFixed(1) + " h";
}

// A column for each layer, a row for each head. One pixel a cell, enlarged by whole numbers: a
// thousand layers are as quick as two.
function heatMap(now) {
  const { layers, heads, computed, causal } = shown;
  const any = layers * heads > 0;
  el("map").parentElement.parentElement.hidden = !any;
  el("map-note").textContent = any
    ? `${layers} layers of ${heads} query heads; sparse requests alone` +
      (now.seconds === null ? "." : `, of the last ${now.seconds} seconds.`)
    : "The sizes of this model are not known.";
  if (!any) return;
  const colours = ramp();
  const none = rgb(getComputedStyle(document.body).getPropertyValue("--none"));
  const image = new ImageData(layers, heads);
  for (let i = 0; i < layers; i++) {
    for (let j = 0; j < heads; j++) {
      const density = ratio(computed[i][j], causal[i][j]);
      const colour = density === null ? none : colours[Math.round(255 * Math.min(1, density))];
      image.data.set([...colour, 255], 4 * (j * layers + i));
    }
  }
  const canvas = el("map");
  if (canvas.width !== layers || canvas.height !== heads) {
    canvas.width = layers;
    canvas.height = heads;
  }
  const wide = Math.max(3, Math.min(40, Math.floor((document.body.clientWidth - 80) / layers)));
  const high = Math.max(3, Math.min(24, Math.floor(520 / heads)));
  canvas.style.width = layers * wide + "px";
  canvas.style.height = heads * high + "px";
  el("columns").textContent = `layers 0 to ${layers - 1}`;
  el("rows").textContent = `heads 0 to ${heads - 1}`;
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.setAttribute("aria-label", `Density of ${layers} layers of ${heads} heads`);
}

let ramped = ["", []];
function ramp() {
  const text = getComputedStyle(document.body).getPropertyValue("--ramp");
  if (ramped[0] === text) return ramped[1];
  const stops = text.split(",").map(rgb);
  const colours = Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map((n, c) => Math.round(n + (stops[low + 1][c] - n) * (at - low)));
  });
  const image = new ImageData(256, 1);
  colours.forEach((colour, i) => image.data.set([...colour, 255], 4 * i));
  el("ramp").getContext("2d").putImageData(image, 0, 0);
  ramped = [text, colours];
  return colours;
}

function rgb(text) {
  const number = parseInt(text.trim().slice(1), 16);
  return [number >> 16, (number >> 8) & 255, number & 255];
}

function tell() {
  if (!cell || cell.layer >= shown.layers || cell.head >= shown.heads) return;
  const { layer, head } = cell;
  const computed = shown.computed[layer][head];
  const causal = shown.causal[layer][head];
  el("cell").textContent =
    `layer ${layer}, head ${head}: ` +
    (causal > 0
      ? `density ${fixed(computed / causal)}, ${whole.format(computed)} of ${whole.format(causal)} tiles`
      : "nothing sparse");
}

function table() {
  if (!el("details").open) return;
  fill(
    el("layers"),
    shown.causal.map((causal, layer) => {
      const each = causal.map((n, head) => ratio(shown.computed[layer][head], n));
      const known = each.filter((density) => density !== null);
      const sum = (row) => row.reduce((total, n) => total + n, 0);
      const most = (best) => {
        if (!known.length) return "–";
        const density = best(...known);
        return `${each.indexOf(density)} (${fixed(density)})`;
      };
      const density = ratio(sum(shown.computed[layer]), sum(causal));
      return row(layer, fixed(density), most(Math.min), most(Math.max));
    }),
  );
}

function paths(now) {
  const all = now.paths.reduce((sum, p) => sum + p.tokens, 0);
  el("no-paths").hidden = all > 0;
  el("no-paths").textContent =
    now.seconds === null ? "No tokens yet." : `No tokens in the last ${now.seconds} seconds.`;
  fill(
    el("paths"),
    now.paths.map((p) => {
      const why = make("td", p.reason || "–");
      why.append(make("small", p.meaning));
      const made = row(p.path, "", whole.format(p.tokens), percent(p.tokens / all));
      made.children[1].replaceWith(why);
      return made;
    }),
  );
}

function profile(status) {
  const { served, expected } = status;
  const lengths = expected.map((e) => `${fixed(e.density)} at ${e.tokens.toLocaleString("en")} tokens`);
  const facts = {
    name: served.profile + (served.shipped ? " (shipped)" : ""),
    digest: served.digest || "–",
    "calibrated to a density of": lengths.join(", ") || "not said",
    "sparse from": `${served.min_prompt_tokens.toLocaleString("en")} tokens of context`,
    "and a step of": `${served.min_query_tokens.toLocaleString("en")} tokens`,
    "computed with": `${served.isa} on ${served.platform}`,
  };
  fill(
    el("profile"),
    Object.entries(facts).flatMap(([name, text]) => [make("dt", name), make("dd", text)]),
  );
}

function make(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function row(...cells) {
  const made = document.createElement("tr");
  made.append(...cells.map((text) => make("td", text)));
  return made;
}

function fill(parent, children) {
  parent.replaceChildren(...children);
}

el("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, el("token").value);
  el("token").value = "";
  poll();
});
el("map").addEventListener("pointermove", (event) => {
  const box = el("map").getBoundingClientRect();
  cell = {
    layer: Math.floor(((event.clientX - box.left) / box.width) * shown.layers),
    head: Math.floor(((event.clientY - box.top) / box.height) * shown.heads),
  };
  tell();
});
el("map").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const by = step[event.key];
  if (!by) return;
  event.preventDefault();
  const inside = (n, count) => Math.max(0, Math.min(count - 1, n));
  cell = cell
    ? { layer: inside(cell.layer + by[0], shown.layers), head: inside(cell.head + by[1], shown.heads) }
    : { layer: 0, head: 0 };
  tell();
});
const again = () => history.length && draw(history.at(-1).status);
document.querySelectorAll("input[name=span]").forEach((i) => i.addEventListener("change", again));
el("details").addEventListener("toggle", again);
window.addEventListener("resize", again);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();
