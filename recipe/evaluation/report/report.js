"use strict";
// The page of page.py. What models wrote reaches the page by textContent only, never as markup.

const PAGE_SIZE = 25;
const CLAMP = 600; // characters of a long text that are shown first
const DIFF_CELLS = 250000; // largest table of a word diff: 500 x 500 words
const STOPS = new Map([["eos", "stopped"], ["length", "hit the cap"], ["context", "out of context"], ["refused", "refused by the server"]]);
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]/gu;

startThemeEarly();
document.addEventListener("DOMContentLoaded", () => {
  startTheme();
  startCopy();
  startBrowser(JSON.parse(document.getElementById("data").textContent));
});

// --- theme: follows the system until the button is used --------------------------------------------------------

function startThemeEarly() {
  try {
    const theme = localStorage.getItem("report-theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch { /* storage may be off; the choice then lasts for this visit */ }
}

function startTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  document.getElementById("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
    if (isDark === system.matches) root.dataset.theme = isDark ? "light" : "dark";
    else delete root.dataset.theme; // follow the system again
    try {
      if (root.dataset.theme) localStorage.setItem("report-theme", root.dataset.theme);
      else localStorage.removeItem("report-theme");
    } catch { /* as above */ }
  });
}

function startCopy() {
  const button = document.getElementById("copy");
  if (!button) return;
  button.addEventListener("click", async () => {
    const command = document.getElementById("command");
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command); // no access to the clipboard: the user can copy the selection
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

// --- small parts of the page ------------------------------------------------------------------------------------------

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) addText(element, text);
  return element;
}

/** Adds a text with its invisible characters shown, like `visible` in recipe/console.py. */
function addText(parent, text) {
  let end = 0;
  for (const found of text.matchAll(UNSEEN)) {
    parent.append(text.slice(end, found.index));
    const span = document.createElement("span");
    span.className = "unseen";
    span.textContent = picture(found[0].charCodeAt(0));
    parent.append(span);
    end = found.index + found[0].length;
  }
  parent.append(text.slice(end));
}

function picture(code) {
  if (code === 0x7f) return "␡";
  if (code < 0x20) return String.fromCharCode(0x2400 + code);
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

function isolated(text, className) {
  const element = make("bdi", className, text);
  element.dir = "auto";
  return element;
}

function option(value, text) {
  const element = document.createElement("option");
  element.value = value;
  element.textContent = text.replace(UNSEEN, character => picture(character.charCodeAt(0)));
  return element;
}

/** What an object has under a name, undefined if nothing: names may come from the address or the data ("constructor"). */
const own = (object, name) => object && Object.hasOwn(object, name) ? object[name] : undefined;
/** An object without what every other one has. */
const table = entries => Object.assign(Object.create(null), entries);

const count = number => number.toLocaleString("en-US");

// --- word diff --------------------------------------------------------------------------------------------------------

/**
 * Runs of words from reference to response: [[kind, words]], kind "same", "del" or "ins"; null if the texts are too
 * long, the same, or share less than a third of the words of the longer one.
 */
function diffWords(reference, response) {
  const [a, b] = [reference, response].map(text => text.split(/\s+/).filter(Boolean));
  if (!a.length || !b.length) return null;
  let head = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  let tail = 0;
  while (tail < a.length - head && tail < b.length - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail++;
  const [x, y] = [a.slice(head, a.length - tail), b.slice(head, b.length - tail)];
  if ((!x.length && !y.length) || x.length * y.length > DIFF_CELLS) return null;
  const width = y.length + 1;
  const lengths = new Uint16Array((x.length + 1) * width); // longest common subsequence from i and j on
  for (let i = x.length - 1; i >= 0; i--) {
    for (let j = y.length - 1; j >= 0; j--) {
      const here = i * width + j;
      lengths[here] = x[i] === y[j] ? lengths[here + width + 1] + 1 : Math.max(lengths[here + width], lengths[here + 1]);
    }
  }
  if (3 * (head + tail + lengths[0]) < Math.max(a.length, b.length)) return null;
  const runs = [];
  const add = (kind, words) => {
    if (!words.length) return;
    if (runs.length && runs[runs.length - 1][0] === kind) runs[runs.length - 1][1].push(...words);
    else runs.push([kind, words]);
  };
  add("same", a.slice(0, head));
  for (let i = 0, j = 0; i < x.length || j < y.length;) {
    if (i < x.length && j < y.length && x[i] === y[j]) { add("same", [x[i]]); i++; j++; }
    else if (j >= y.length || (i < x.length && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) add("del", [x[i++]]);
    else add("ins", [y[j++]]);
  }
  add("same", a.slice(a.length - tail));
  return runs;
}

// --- the example browser ----------------------------------------------------------------------------------------------

function startBrowser(data) {
  const form = document.getElementById("controls");
  const list = document.getElementById("list");
  const names = new Map(data.models);
  const labels = [...names.keys()];
  const base = labels.includes("baseline") ? "baseline" : null;
  const compared = labels.filter(label => label !== "baseline");
  const total = data.id.length;
  const rowOf = new Map(data.id.map((id, row) => [id, row]));
  const scores = table(); // name → {title, value(label, row)}, null where missing
  for (const [name, title] of Object.entries(data.scores)) {
    scores[name] = { title, unit: 100, value: (label, row) => data.answers[label].scores[name][row] };
  }
  for (const prompt of Object.keys(data.judge_scales)) {
    scores[`judge:${prompt}`] = {
      title: `Judge, ${prompt}`, unit: 1, value: (label, row) => own(data.answers[label].judge, prompt)?.[row]?.[1] ?? null,
    };
  }

  const initial = {
    show: "all", model: compared[0], score: Object.keys(scores)[0], sort: "original", family: "", split: "", q: "",
    diff: "on", page: 1,
  };
  let state = { ...initial };
  let rows = []; // of the data, as shown
  let linked = null; // the row of a permalink

  // the filters: the chosen model against base, by the chosen score
  const text = (label, row) => data.answers[label].text[row];
  const change = row => {
    if (!base) return null;
    const [tuned, before] = [state.model, base].map(label => scores[state.score].value(label, row));
    return tuned === null || before === null ? null : tuned - before;
  };
  const right = (label, row) => data.answers[label].scores.exact_match[row] === 1;
  const judgements = [...labels.flatMap(label => Object.values(data.answers[label].judge)), ...(data.pairwise ? [data.pairwise] : [])];
  const judgedSplits = new Set(data.split.filter((_, row) => judgements.some(column => column[row])));
  const settled = status => ["scored", "empty", "identical"].includes(status);
  const unscored = row => judgedSplits.has(data.split[row]) && (
    labels.some(label => Object.values(data.answers[label].judge).some(column => !column[row] || !settled(column[row][0])))
    || Boolean(data.pairwise) && !(data.pairwise[row] ?? [[null, "not asked"]]).every(([, status]) => settled(status)));
  const cut = label => row => ["length", "context"].includes(data.answers[label].stop_reason[row]);
  const name = () => state.model === "tuned" ? "tuned" : names.get(state.model);
  const shows = table({
    all: ["all", () => true],
    ...(base ? {
      better: [() => `${name()} better`, row => change(row) > 0],
      worse: [() => `${name()} worse`, row => change(row) < 0],
      right: ["both right", row => right(base, row) && right(state.model, row)],
      wrong: ["both wrong", row => !right(base, row) && !right(state.model, row)],
    } : {
      right: ["right", row => right(state.model, row)],
      wrong: ["wrong", row => !right(state.model, row)],
    }),
    cut: [() => `${name()} hit the cap`, row => cut(state.model)(row)],
    empty: [() => `${name()} empty`, row => !text(state.model, row).trim()],
    ...(judgements.length ? { unscored: ["unscored", unscored] } : {}),
  });
  const byChange = sign => (a, b) => {
    const [x, y] = [change(a), change(b)];
    if (x === null || y === null) return (x === null) - (y === null); // examples without a change go last
    return sign * (y - x) || a - b;
  };
  const sorts = table({
    original: ["original order", null],
    ...(base ? { win: ["biggest win", byChange(1)], regression: ["biggest regression", byChange(-1)] } : {}),
    longest: ["longest response", (a, b) => text(state.model, b).length - text(state.model, a).length || a - b],
  });

  // --- controls

  const fields = form.elements;
  const radios = table();
  for (const key of Object.keys(shows)) {
    const label = make("label");
    const radio = document.createElement("input");
    Object.assign(radio, { type: "radio", name: "show", value: key });
    const words = document.createTextNode("");
    const number = make("small");
    const span = make("span");
    span.append(words, " ", number);
    label.append(radio, span);
    document.getElementById("show").append(label);
    radios[key] = { radio, words, number };
  }
  const fill = (field, options) => fields[field]?.append(...options.map(([value, title]) => option(value, title)));
  const distinct = column => [...new Set(column)].filter(value => value !== null).map(value => [value, value]);
  fill("model", compared.map(label => [label, names.get(label)]));
  fill("score", Object.entries(scores).map(([key, { title }]) => [key, title]));
  fill("sort", Object.entries(sorts).map(([key, [title]]) => [key, title]));
  fill("family", [["", "all families"], ...distinct(data.family)]);
  fill("split", [["", "all splits"], ...distinct(data.split)]);

  const allowed = table({
    show: value => Object.hasOwn(radios, value), model: value => compared.includes(value), score: value => Object.hasOwn(scores, value),
    sort: value => Object.hasOwn(sorts, value), family: value => data.family.includes(value),
    split: value => data.split.includes(value), q: () => true, diff: value => value === "off", page: value => Number.isSafeInteger(Number(value)) && Number(value) > 0,
  });

  // --- state in the address, so that a view can be shared

  const encode = value => encodeURIComponent(String(value).toWellFormed()).replaceAll("%2F", "/");

  function writeAddress() {
    const parts = Object.keys(initial).filter(key => state[key] !== initial[key]).map(key => `${key}=${encode(state[key])}`);
    history.replaceState(null, "", parts.length ? `#${parts.join("&")}` : location.pathname + location.search);
  }

  function readAddress() {
    const hash = location.hash.slice(1);
    const given = table();
    for (const part of hash.split("&")) {
      const [key, value] = part.split(/=(.*)/s);
      try { given[key] = decodeURIComponent(value ?? ""); } catch { /* not a part of ours: ignore it */ }
    }
    const keys = Object.keys(initial).filter(key => given[key] !== undefined && allowed[key](given[key]));
    linked = rowOf.get(given.id) ?? null;
    // a link to one example does not change the list, if the example is in it
    if (linked === null || keys.length) {
      state = { ...initial };
      for (const key of keys) state[key] = key === "page" ? Number(given[key]) : given[key];
    }
    select();
    if (linked !== null) {
      if (!rows.includes(linked)) { state = { ...initial }; select(); }
      state.page = Math.floor(rows.indexOf(linked) / PAGE_SIZE) + 1;
    }
    render();
    if (linked !== null) reveal(list.querySelector(".linked"));
    else if (keys.length) reveal(document.getElementById("examples"));
  }

  function reveal(element) {
    element.scrollIntoView({ block: "start" });
    if (element.tabIndex === -1) element.focus({ preventScroll: true });
  }

  // --- selection

  let haystacks = null; // lower-case texts, built at the first search

  function select() {
    const query = state.q.trim().toLowerCase();
    if (query && !haystacks) {
      haystacks = data.id.map((id, row) => [
        id, data.split[row], data.family[row], data.history[row], data.instruction[row], data.input[row], data.output[row],
        ...labels.map(label => text(label, row)),
        ...labels.flatMap(label => Object.values(data.answers[label].judge).map(column => column[row]?.[2])),
        ...(data.pairwise?.[row] ?? []).map(([, , , reason]) => reason),
      ].join("\n").toLowerCase());
    }
    const candidates = [];
    for (let row = 0; row < total; row++) {
      if (state.family && data.family[row] !== state.family) continue;
      if (state.split && data.split[row] !== state.split) continue;
      if (query && !haystacks[row].includes(query)) continue;
      candidates.push(row);
    }
    for (const [key, [title, matches]] of Object.entries(shows)) {
      const chosen = candidates.filter(matches);
      radios[key].words.data = typeof title === "string" ? title : title();
      radios[key].number.textContent = count(chosen.length);
      if (key === state.show) rows = chosen;
    }
    const order = sorts[state.sort][1];
    if (order) rows.sort(order);
    state.page = Math.min(state.page, Math.max(1, Math.ceil(rows.length / PAGE_SIZE)));
  }

  // --- rendering

  function render() {
    radios[state.show].radio.checked = true;
    for (const field of ["model", "score", "sort", "family", "split"]) if (fields[field]) fields[field].value = state[field];
    if (fields.q.value.trim() !== state.q) fields.q.value = state.q;
    fields.diff.checked = state.diff === "on";
    const start = (state.page - 1) * PAGE_SIZE;
    const page = rows.slice(start, start + PAGE_SIZE);
    list.replaceChildren(...page.map(card));
    document.getElementById("shown").textContent =
      rows.length === total ? `${count(total)} example${total === 1 ? "" : "s"}` : `${count(rows.length)} of ${count(total)}`;
    document.getElementById("reset").hidden = rows.length === total && !state.q;
    document.getElementById("pages").hidden = rows.length <= PAGE_SIZE;
    document.getElementById("range").textContent = `${count(start + 1)}–${count(start + page.length)} of ${count(rows.length)}`;
    document.getElementById("previous").disabled = start === 0;
    document.getElementById("next").disabled = start + PAGE_SIZE >= rows.length;
    highlight();
  }

  function card(row) {
    const article = make("article", row === linked ? "example linked" : "example");
    article.tabIndex = -1;
    article.setAttribute("aria-label", `Example ${data.id[row]}`);
    const asked = make("div", "asked");
    const tags = make("div", "tags");
    const link = document.createElement("a");
    link.href = `#id=${encode(data.id[row])}`;
    link.title = "Link to this example";
    link.append(isolated(data.id[row], "id"));
    tags.append(link);
    if (data.family[row] !== null) tags.append(isolated(data.family[row], "family"));
    const difference = change(row);
    if (difference) {
      const { title, unit } = scores[state.score];
      const sign = difference > 0 ? "▲ +" : "▼ −";
      const points = Math.abs(unit * difference).toFixed(unit === 1 ? 0 : 1).replace(/\.0$/, "");
      tags.append(make("span", `change ${difference > 0 ? "better" : "worse"}`, `${sign}${points} ${title}`));
    }
    asked.append(tags);
    if (data.history[row]) asked.append(block(data.history[row], "text input history"));
    asked.append(block(data.instruction[row], "text instruction"));
    if (data.input[row]) asked.append(block(data.input[row], "text input"));
    const answers = make("div", "answers");
    const reference = make("section", "answer reference");
    reference.append(make("h4", "", "Reference"), block(data.output[row], "text"));
    answers.append(reference, ...labels.map(label => answer(label, row)));
    article.append(asked, answers);
    if (data.pairwise?.[row]) article.append(pair(data.pairwise[row]));
    return article;
  }

  /** A text; if it is very long, only its start is shown until a button is pressed. */
  function block(value, className) {
    const element = make("div", className);
    element.dir = "auto";
    if (value.length <= CLAMP) {
      addText(element, value);
      return element;
    }
    const cutAt = /[\ud800-\udbff]/.test(value[CLAMP - 1]) ? CLAMP - 1 : CLAMP; // not inside a surrogate pair
    addText(element, `${value.slice(0, cutAt)}…`);
    const more = make("button", "more", `Show all ${count(value.length)} characters`);
    more.type = "button";
    more.addEventListener("click", () => {
      element.replaceChildren();
      addText(element, value);
      more.remove();
      highlight();
    });
    const both = document.createDocumentFragment();
    both.append(element, more);
    return both;
  }

  function answer(label, row) {
    const { tokens, stop_reason: stops, reasoning, error, judge } = data.answers[label];
    const section = make("section", "answer");
    section.dataset.label = label;
    const heading = make("h4");
    heading.append(make("span", `dot ${label === "baseline" || label === "tuned" ? label : ""}`), isolated(names.get(label)));
    const stop = STOPS.get(stops[row]);
    const badge = [stop, tokens[row] === null ? null : `${count(tokens[row])} token${tokens[row] === 1 ? "" : "s"}`].filter(Boolean).join(" · ");
    if (badge) heading.append(make("span", stop && stops[row] !== "eos" ? "badge alert" : "badge", badge));
    section.append(heading);
    const response = text(label, row);
    const runs = state.diff === "on" ? diffWords(data.output[row], response) : null;
    if (!response) section.append(make("p", "none", "empty"));
    else if (runs) section.append(marked(runs));
    else section.append(block(response, "text response"));
    if (error[row]) section.append(isolated(error[row], "alert"));
    if (reasoning[row]) {
      const details = make("details");
      details.append(make("summary", "", "Reasoning, not scored"), block(reasoning[row], "text"));
      section.append(details);
    }
    const points = make("dl", "points");
    for (const [key, title] of Object.entries(data.scores)) {
      const value = data.answers[label].scores[key][row];
      const pair = make("div");
      const shown = key === "exact_match" ? (value === 1 ? "yes" : "no") : (100 * value).toFixed(0);
      pair.append(make("dt", "", title), make("dd", "", shown));
      points.append(pair);
    }
    section.append(points);
    for (const [prompt, column] of Object.entries(judgedSplits.has(data.split[row]) ? judge : {})) {
      const [status, score, reason] = column[row] ?? ["not asked", null, null];
      const line = make("p", "judged");
      line.append(isolated(prompt), " ");
      if (score === null) line.append(isolated(status, "alert"));
      else line.append(make("b", "", `${score} of ${data.judge_scales[prompt][1]}`));
      if (score !== null && status !== "scored") line.append(" (", isolated(status), ")");
      if (reason) line.append(" ", isolated(reason, "reason"));
      section.append(line);
    }
    return section;
  }

  function marked(runs) {
    const element = make("div", "text response marked");
    element.dir = "auto";
    runs.forEach(([kind, words], index) => {
      if (index) element.append(" ");
      if (kind === "same") addText(element, words.join(" "));
      else element.append(make(kind, "", words.join(" ")));
    });
    return element;
  }

  function pair(asked) {
    const element = make("div", "judged pair");
    for (const [order, status, winner, reason] of asked) {
      const line = make("p", "", `Judge, ${order === "baseline_first" ? "base" : "tuned"} first → `);
      if (winner === null) line.append(isolated(status, "alert"));
      else line.append(make("b", "", winner === "baseline" ? "base" : winner));
      if (reason) line.append(" ", isolated(reason, "reason"));
      element.append(line);
    }
    return element;
  }

  /** Marks the searched words without changing the texts. */
  function highlight() {
    if (!CSS.highlights) return;
    CSS.highlights.delete("found");
    const query = state.q.trim().toLowerCase();
    if (!query) return;
    const ranges = [];
    const walker = document.createTreeWalker(list, NodeFilter.SHOW_TEXT);
    while (walker.nextNode() && ranges.length < 2000) {
      const node = walker.currentNode;
      const words = node.data.toLowerCase();
      if (words.length !== node.data.length) continue; // lower case has another length, so positions would differ
      for (let at = words.indexOf(query); at >= 0; at = words.indexOf(query, at + query.length)) {
        const range = new Range();
        range.setStart(node, at);
        range.setEnd(node, at + query.length);
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  // --- events

  function update(changes) {
    linked = null;
    state = { ...state, page: 1, ...changes };
    select();
    render();
    writeAddress();
  }

  let waiting = 0;
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", event => {
    const { name: field, value, checked } = event.target;
    clearTimeout(waiting);
    if (field === "q") waiting = setTimeout(() => update({ q: value.trim() }), 120);
    else update({ [field]: field === "diff" ? (checked ? "on" : "off") : value });
  });
  document.getElementById("reset").addEventListener("click", () => update({ show: "all", family: "", split: "", q: "" }));
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    document.getElementById(id).addEventListener("click", () => {
      update({ page: state.page + step });
      reveal(document.getElementById("examples"));
    });
  }
  addEventListener("hashchange", () => {
    if (!location.hash || location.hash.includes("=")) readAddress(); // otherwise it is a section of the page
  });
  // following the same link again does not change the address, but should scroll there again
  document.addEventListener("click", event => {
    const anchor = event.target.closest?.("a[href^='#']");
    if (anchor && anchor.hash === location.hash && anchor.hash.includes("=")) readAddress();
  });
  readAddress();
}
