"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text, never markup. */
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

const count = (number) => Math.round(number).toLocaleString("en-GB");
/** Characters of a policy that are shown before one asks for all. */
const LONG = 140;
const outside = "outside of the layers";

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) { number /= 1024; unit += 1; }
  return `${unit ? number.toFixed(1) : number} ${units[unit]}`;
}

function table(heads, rows, numbers = []) {
  const mark = (index) => (numbers.includes(index) ? "number" : null);
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table" },
    el("table", {},
      el("thead", {}, el("tr", {}, heads.map((head, i) => el("th", { class: mark(i), scope: "col" }, head)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => el("td", { class: mark(i) }, cell)))))));
}

// ---- overview

function showOverview() {
  document.title = `${data.model} · ${data.policy} · kvfx`;
  $("title").textContent = data.model;
  const full = data.resolved || data.policy;
  const short = data.policy.length > LONG ? `${data.policy.slice(0, LONG)} …` : data.policy;
  $("policy").append(short === full ? short : el("details", {}, el("summary", {}, short), full));
  $("versions").textContent = `Written by kvfx.${data.by}. ` +
    Object.entries(data.versions).map(([name, version]) => `${name} ${version}`).join(" · ");
  if (data.refusal) showRefusal(data.refusal);
  if (data.report) showReport(data.report);
}

function showRefusal(refusal) {
  $("refusal").hidden = false;
  $("refusal").append(el("div", { class: "refused" },
    el("h2", {}, `Refused: ${refusal.error}`),
    refusal.lines.map((line) => el("p", {}, line)),
    el("p", {}, data.steps.length
      ? "Below is every pass that ran before; nothing was compiled, so there is no graph after."
      : "No pass has run.")));
}

function showReport(report) {
  const share = (100 * report.after) / report.before;
  const proof = report.verified
    ? "verified against the model on random tokens"
    : data.by === "explain" ? "not compiled, not run: this is what compress would do" : "not verified";
  const figures = [
    ["cache bytes per token", `${count(report.before)} → ${count(report.after)}`,
      `dense → now, one row after ${count(report.length)} tokens`],
    ["of a dense cache", `${share.toFixed(share < 10 ? 1 : 0)} %`, `${bytes(report.before * report.length)} → ${bytes(report.after * report.length)}`],
    ["attention sites", String(report.sites.length), `backend ${report.backend}`],
    ["programs", String(data.programs.length), data.programs.map((program) => program.name).join(", ")],
    [data.by, `${report.seconds} s`, proof],
  ];
  $("facts").append(...[
    el("dl", { class: "figures" }, figures.map(([name, value, more]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, more))))),
    ...bars(report),
    el("h3", {}, "Policy of each site"),
    table(["site", "mask", "rope", "heads", "policy", "entries kept", "bytes/token"],
      report.rows.map((row) => [
        el("code", {}, row.names + (row.count > 1 ? `  ×${row.count}` : "")), row.mask, row.rope || "–",
        `${row.heads} / ${row.kv_heads} KV × ${row.head_dim}`, el("code", {}, row.policy),
        row.entries.length ? span(row.entries) : "–", `${count(row.before)} → ${span(row.after)}`]), [5, 6]),
    el("p", { class: "note" }, report.footnote),
    report.remarks.length ? el("ul", { class: "remarks" }, report.remarks.map((remark) => el("li", {}, remark))) : null,
    el("h3", {}, "Programs"),
    table(["program", "what it does", "nodes"],
      data.programs.map((program) => [el("code", {}, program.name), program.does, count(program.nodes)]), [2]),
  ].filter(Boolean));
}

/** The smallest and the largest of several numbers, in the order in which they come. */
const span = (numbers) => (numbers.length > 1 ? `${count(numbers[0])} … ${count(numbers[numbers.length - 1])}` : count(numbers[0]));

/** A bar per site: the bytes of its tokens and, where they differ, the entries that it keeps. */
function bars(report) {
  const { sites, length } = report;
  const kept = sites.filter((site) => site.entries != null);
  const shown = [el("h3", {}, "Cache bytes per token, site by site"),
    chart(sites, (site) => [site.before, site.after], (site) =>
      `${site.name}: ${count(site.before)} → ${count(site.after)} bytes/token; ${site.policy}`)];
  if (new Set(kept.map((site) => site.entries)).size > 1) {
    shown.push(el("h3", {}, `Entries that each KV head keeps of ${count(length)} tokens`),
      chart(kept, (site) => [length, site.entries], (site) => `${site.name}: ${count(site.entries)} of ${count(length)}`));
  }
  return [...shown, el("ul", { class: "keys" },
    el("li", {}, el("b", { style: "background:var(--line)" }), "dense"),
    el("li", {}, el("b", { style: "background:var(--accent)" }), "now"))];
}

function chart(sites, values, text) {
  const most = Math.max(...sites.flatMap(values));
  return el("div", { class: "chart", style: `max-width:${3.2 * sites.length}rem` },
    el("ol", { class: "bars" }, sites.map((site) => {
      const [before, after] = values(site);
      return el("li", { style: `--before:${before / most};--after:${after / most}`, title: text(site), "aria-label": text(site) },
        el("i", { class: "dense" }), el("i", { class: "now" }));
    })),
    el("p", { class: "axis" }, el("span", {}, "first"), el("span", {}, "last")));
}

// ---- layers

const chosen = { program: null, kind: 0 };

function showLayers() {
  if (!data.kinds.length) return;
  $("layers").hidden = false;
  const programs = data.programs.map((program) => program.name);
  chosen.program = programs.includes("decode") ? "decode" : programs[0] ?? null;
  choices("programs", programs.map((name) => [name, name]), chosen.program, (value) => { chosen.program = value; draw(); });
  choices("kinds", data.kinds.map((kind, i) => [String(i), kindName(kind)]), "0", (value) => { chosen.kind = Number(value); draw(); });
  $("programs").hidden = !programs.length;
  for (const id of ["before", "after"]) {
    $(id).addEventListener("click", open);
    $(id).addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") open(event);
    });
  }
  draw();
}

const kindName = (kind) => (kind.name || outside) + (kind.count > 1 ? ` ×${kind.count}` : "");

function choices(id, options, checked, choose) {
  $(id).append(...options.map(([value, label]) => el("label", {},
    el("input", { type: "radio", name: id, value, checked: value === checked, onchange: () => choose(value) }),
    el("span", {}, label))));
}

function draw() {
  const program = data.programs.find((one) => one.name === chosen.program);
  $("does").textContent = program ? `${program.name} ${program.does}.` : "";
  $("after-caption").textContent = program ? `lowered: the ${program.name} program` : "";
  put("before", `before/${chosen.kind}`, "This part has nothing to draw.");
  put("after", `${chosen.program}/${chosen.kind}`, data.refusal
    ? "There is no graph after: the model was refused."
    : "This program has nothing to do here.");
  const { differences } = data.kinds[chosen.kind];
  $("differences").replaceChildren(...(differences.length ? [
    el("h3", {}, "Where these layers differ"),
    table(["op", "attribute", "values"], differences.map((one) => [
      el("code", {}, one.op || "–"), el("code", {}, one.attribute),
      one.values.map(([value, layers]) => el("div", {}, el("code", {}, value), ` ${layers}`))])),
  ] : []));
}

function put(id, key, otherwise) {
  const drawing = data.drawings[key];
  $(id).dataset.key = key;
  if (drawing) {
    $(id).innerHTML = drawing;
    // drawings shrink to fit, as far as their words can be read; wider ones scroll in their frame
    const svg = $(id).firstElementChild;
    svg.style.minWidth = `${0.72 * svg.getAttribute("width")}px`;
  } else $(id).replaceChildren(el("p", { class: "note" }, otherwise));
}

function open(event) {
  const box = event.target.closest("[data-box]");
  if (!box) return;
  event.preventDefault();
  const key = `${event.currentTarget.dataset.key}/${box.dataset.box}`;
  showDetail(data.details[key]);
}

// ---- details of a node

function showDetail(detail) {
  const op = data.ops[detail.op];
  const kind = data.kinds[chosen.kind];
  const alike = kind.count > 1 ? ` and ${kind.count - 1} like it` : "";
  $("detail-title").textContent = detail.op ? `kvfx.${detail.op}` : detail.cache;
  const facts = [
    ["site", detail.site ? detail.site + alike : "–"], ["rule", detail.rule || "–"], ["pass", detail.pass],
    ["backend", detail.backend === "default" ? "none chosen yet" : detail.backend], ["result", detail.result],
  ];
  const buffers = detail.operands.filter((one) => one.buffer);
  const values = detail.operands.filter((one) => !one.buffer);
  $("detail-body").replaceChildren(
    el("dl", { class: "facts" }, facts.filter(([, value]) => value).flatMap(([name, value]) =>
      [el("dt", {}, name), el("dd", {}, el("code", {}, value))])),
    ...(buffers.length ? [
      el("h3", {}, "Buffers"),
      table(["buffer", "dtype and shape", detail.op ? "access" : "", "bytes*"],
        buffers.map((one) => [el("code", {}, one.name), el("code", {}, one.type),
          detail.op ? (one.written ? "written" : "read") : "",
          el("span", { title: one.formula }, bytes(one.bytes))]), [3]),
      el("p", { class: "note" }, "* of one row after a prompt of 4,096 tokens, as allocated: " +
        `${bytes(buffers.reduce((sum, one) => sum + one.bytes, 0))} together. B is the batch, C grows with the capacity.`),
    ] : []),
    ...(values.length ? [
      el("h3", {}, "Operands"),
      table(["operand", "value", "dtype and shape"],
        values.map((one) => [el("code", {}, one.name), el("code", {}, one.value), el("code", {}, one.type ?? "")])),
    ] : []),
    ...(op ? [
      el("h3", {}, "In the graph"), code(detail.line, "boxed wrap"),
      el("h3", {}, "Schema"), code(op.schema, "boxed wrap"),
      el("h3", {}, "Reference definition"),
      el("p", { class: "note" }, el("code", {}, op.definition), op.triton ? el("span", {}, "; Triton: ", el("code", {}, op.triton)) : "",
        op.traced ? "; compilers see through it" : "; opaque to compilers"),
      code(op.source, "boxed"),
    ] : []));
  $("detail").showModal();
  $("detail").scrollTop = 0;
}

const code = (text, kind) => el("pre", { class: kind, tabindex: 0 }, text);

// ---- passes

let current = 0;

function showPasses() {
  if (!data.steps.length) return;
  $("passes").hidden = false;
  let group = null;
  data.steps.forEach((step, index) => {
    if (step.program !== group) {
      group = step.program;
      $("steps").append(el("h3", {}, group || "model"));
    }
    $("steps").append(el("button", { type: "button", class: step.parts.length ? null : "idle", onclick: () => go(index) }, step.name));
  });
  go(0, false);
}

function go(index, reveal = true) {
  current = Math.max(0, Math.min(index, data.steps.length - 1));
  const buttons = [...$("steps").querySelectorAll("button")];
  buttons.forEach((button, i) => (i === current ? button.setAttribute("aria-current", "step") : button.removeAttribute("aria-current")));
  if (reveal) buttons[current].scrollIntoView({ block: "nearest", inline: "nearest" });
  const focused = document.activeElement?.dataset?.walk;
  $("step").replaceChildren(...stepView(data.steps[current]));
  if (focused) ($("step").querySelector(`[data-walk="${focused}"]:enabled`) ?? $("step")).focus({ preventScroll: true });
}

function stepView(step) {
  const hits = step.hits.map(([rule, number]) => `${rule} ${count(number)}`).join(", ");
  const walk = (name, to, label) => el("button",
    { type: "button", "data-walk": name, "aria-label": label, disabled: to < 0 || to >= data.steps.length, onclick: () => go(to) },
    name === "previous" ? "←" : "→");
  return [
    el("div", { class: "step-bar" },
      el("h3", {}, step.name, step.program ? el("span", {}, ` · ${step.program}`) : null),
      walk("previous", current - 1, "Previous pass"),
      el("span", {}, `${current + 1} of ${data.steps.length}`),
      walk("next", current + 1, "Next pass")),
    el("p", {}, step.summary),
    el("ul", { class: "stats" },
      step.levels.length ? el("li", {}, el("b", {}, step.levels.join(" → "))) : null,
      el("li", {}, el("b", {}, `${count(step.nodes[0])} → ${count(step.nodes[1])}`), " nodes"),
      el("li", {}, el("b", {}, `${step.milliseconds} ms`)),
      el("li", {}, hits ? "hits: " : "no hits", el("b", {}, hits))),
    step.misses.length ? el("ul", { class: "misses", "aria-label": "Misses" }, step.misses.map((miss) =>
      el("li", {}, el("b", {}, `miss${miss.count > 1 ? ` ×${miss.count}` : ""}: `), miss.at ? el("code", {}, `${miss.at}: `) : null, miss.reason))) : null,
    step.doc ? el("details", {}, el("summary", {}, "What this pass does"), code(step.doc, "doc")) : null,
    ...(step.parts.length ? step.parts.map(partView) : [el("p", { class: "note" }, "This pass left the text of the graph as it was.")]),
    step.unchanged ? el("p", { class: "note" }, `${step.unchanged} more parts of the graph are unchanged.`) : null,
  ].filter(Boolean);
}

function partView(part) {
  const notes = [
    part.count > 1 ? `×${part.count}, shown: ${part.shown}` : "",
    part.differs.length ? `differ in ${part.differs.join(", ")}` : "",
  ].filter(Boolean).join("; ");
  return el("section", { class: "part", "aria-label": part.title },
    el("h4", {}, part.title, notes ? el("span", {}, ` ${notes}`) : null),
    el("div", { class: "diff", tabindex: 0, role: "region", "aria-label": `Diff of ${part.title}` }, diffView(part.lines)));
}

const CONTEXT = 2;

/** The lines of a diff, with longer runs of unchanged ones behind a button. */
function diffView(lines) {
  const box = el("div");
  for (let i = 0; i < lines.length;) {
    let end = i;
    while (end < lines.length && (lines[end][0] === " ") === (lines[i][0] === " ")) end += 1;
    const run = lines.slice(i, end);
    if (lines[i][0] !== " ") box.append(...run.map(lineView));
    else {
      const head = i === 0 ? 0 : CONTEXT;
      const tail = end === lines.length ? 0 : CONTEXT;
      const hidden = run.slice(head, run.length - tail);
      if (hidden.length < 3) box.append(...run.map(lineView));
      else {
        const more = el("button", { type: "button", onclick: () => more.replaceWith(...hidden.map(lineView)) },
          `… ${hidden.length} unchanged lines`);
        box.append(...run.slice(0, head).map(lineView), more, ...run.slice(run.length - tail).map(lineView));
      }
    }
    i = end;
  }
  return box;
}

const lineView = (line) => el("p", { class: { "+": "add", "-": "del", " ": "same" }[line[0]] }, line);

// ---- the cache over time

function showTrace() {
  if (!data.trace) return;
  $("cache").hidden = false;
  const { prompt, new: decoded, steps, statuses, pictures } = data.trace;
  const canvas = el("div", { class: "canvas", tabindex: 0, role: "region", "aria-label": "The cache over time" });
  const show = (head) => { canvas.innerHTML = pictures[head]; };
  $("trace").append(
    el("p", { class: "lead" }, `A prompt of ${count(prompt)} tokens and ${count(decoded)} decoded ones, in ${count(steps)} program runs. ` +
      "Each panel is a site: tokens from left to right, time downwards."),
    el("fieldset", { id: "heads" }, el("legend", {}, "KV head")),
    canvas,
    el("dl", { class: "facts" }, Object.entries(statuses).flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)])));
  choices("heads", pictures.map((_, head) => [String(head), String(head)]), "0", (head) => show(Number(head)));
  show(0);
}

// ---- the whole

function showSections() {
  const names = { overview: "Overview", layers: "Layers", passes: "Passes", cache: "Cache" };
  $("sections").append(...Object.entries(names).filter(([id]) => !$(id).hidden).map(([id, name]) => el("a", { href: `#${id}` }, name)));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("kvfx-theme", theme); } catch { /* a file may have no storage */ }
}

function startTheme() {
  try {
    const stored = localStorage.getItem("kvfx-theme");
    if (stored) document.documentElement.dataset.theme = stored;
  } catch { /* as above */ }
  $("theme").addEventListener("click", () => {
    const dark = document.documentElement.dataset.theme
      ? document.documentElement.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    setTheme(dark ? "light" : "dark");
  });
}

/** Arrow keys walk the passes while these are on the screen and nothing else needs the keys. */
function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || $("detail").open) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || !data.steps.length || event.target.closest("input, .diff, .scroll, .canvas, pre")) return;
  const place = $("passes").getBoundingClientRect();
  if (place.top > innerHeight * 0.7 || place.bottom < innerHeight * 0.3) return;
  event.preventDefault();
  go(current + step);
}

startTheme();
showOverview();
showLayers();
showPasses();
showTrace();
showSections();
document.addEventListener("keydown", onKey);
$("close").addEventListener("click", () => $("detail").close());
$("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
