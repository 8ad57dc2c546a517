// What a reader chooses on the page: filters, colours, sliders. All text of models is put in as
// text, never as HTML. Every part that the data does not hold is left out.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);

// The numbers that a token can have. A signed number is blue above 0 and orange below; a log-prob
// is the more orange the less likely the token was; a share is the bluer the nearer it is to 1.
const NUMBERS = [
  { key: "token_rewards", name: "token reward", kind: "signed", words: "Blue was paid, orange was punished." },
  { key: "shift", name: "what training changed", kind: "signed", words: "Blue is likelier than before the training, orange less likely (nats)." },
  { key: "value", name: "critic's value", kind: "signed", words: "What the critic expects before each token is written." },
  { key: "logp", name: "log-prob", kind: "log", words: "The more orange, the less likely the trained model finds the token; it has read both answers." },
  { key: "sure", name: "sureness when written", kind: "share", words: "The bluer, the surer the model was when it wrote the place." },
];

// Numbers that the page does not know, as a researcher's own: their keys begin with this.
const OWN = "own:";
const OWN_LISTS = 6;

// ---- small helpers ----

// An element with attributes and children; a child that is text stays text.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// An SVG element with attributes.
function draw(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, value);
  }
  return element;
}

function list(value) {
  return Array.isArray(value) ? value : [];
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function short(value) {
  return isNumber(value) ? String(Number(value.toFixed(3))).replace("-", "−") : "none";
}

// Control characters made visible, those that turn the writing included.
function visible(text) {
  const hidden = /[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
  return String(text).replace(hidden, (character) => {
    const code = character.charCodeAt(0);
    if (character === "\n") {
      return "↵\n";
    }
    const name = code.toString(16).toUpperCase().padStart(4, "0");
    return code < 32 ? String.fromCharCode(0x2400 + code) : `⟨U+${name}⟩`;
  });
}

// A problem's text on one line of a select: its ends, if it is long.
function brief(prompt) {
  const text = visible(prompt).replaceAll("\n", " ");
  return text.length > 60 ? `${text.slice(0, 26)} … ${text.slice(-31)}` : text;
}

// A select with its label. options: pairs of a value and a text.
function choice(label, options, chosen, changed, size) {
  const select = make("select", { size });
  for (const [value, text] of options) {
    select.append(make("option", { value, selected: String(value) === String(chosen) }, text));
  }
  select.addEventListener("change", () => changed(select.value));
  return make("label", {}, label, select);
}

// A slider with its label. words: what a place of it means, for those who hear it.
function slider(label, last, at, words, changed) {
  const input = make("input", { type: "range", min: 0, max: last, step: 1, value: at });
  const say = () => input.setAttribute("aria-valuetext", words(Number(input.value)));
  input.addEventListener("input", () => {
    say();
    changed(Number(input.value));
  });
  say();
  return make("label", {}, label, input);
}

// Text of a model, isolated so that its writing direction stays its own.
function code(text) {
  return make("code", { class: "text" }, make("bdi", {}, visible(text)));
}

function verdict(right, lucky = false) {
  const words = lucky ? "✓ right by luck" : "✓ right";
  return make("b", { class: right ? "good" : "bad" }, right ? words : "✗ wrong");
}

// Whether the answer is right although a step on the way is wrong.
function isLucky(transcript) {
  return transcript?.right === true && list(transcript.steps_right).includes(false);
}

// ---- transcripts ----

// The numbers of some transcripts that the page does not know.
function ownNumbers(transcripts) {
  const keys = new Set(transcripts.flatMap((t) => Object.keys(t ?? {}).filter((key) => key.startsWith(OWN))));
  const words = "The page does not know this number; it is drawn as it was logged.";
  return [...keys]
    .slice(0, OWN_LISTS)
    .map((key) => ({ key, name: visible(key.slice(OWN.length)), kind: "signed", words }));
}

// The numbers that a transcript has for each token. `sure` goes on behind its end.
function numbersOf(transcript) {
  const count = list(transcript?.tokens).length;
  return [...NUMBERS, ...ownNumbers([transcript])].filter(({ key }) => {
    const told = list(transcript?.[key]).length;
    return told > 0 && (told === count || key === "sure");
  });
}

// The first token (or letter, without tokens) in which two transcripts differ.
function firstDifference(one, other) {
  const both = list(one?.tokens).length > 0 && list(other?.tokens).length > 0;
  const [x, y] = [one, other].map((t) => (both ? t.tokens : Array.from(t?.response ?? "")));
  const end = Math.max(x.length, y.length);
  for (let at = 0; at < end; at += 1) {
    if (x[at] !== y[at]) {
      return at;
    }
  }
  return -1;
}

// The largest number of a kind in some transcripts: the colour scale ends there.
function scaleOf(key, transcripts) {
  const found = transcripts.flatMap((t) => list(t?.[key])).filter(isNumber).map(Math.abs);
  return found.reduce((largest, x) => Math.max(largest, x), 0) || 1;
}

// Whether a number tells the tokens apart. A reward that is paid at the end alone does not.
function tellsTokensApart(key, transcripts) {
  return transcripts.some((t) => list(t?.[key]).slice(0, -1).some((x) => isNumber(x) && x !== 0));
}

// What the strongest colours stand for.
function colourWords(chosen, scale) {
  const largest = short(scale);
  const ends = { signed: `full blue ${largest}, full orange −${largest}`, log: `full orange −${largest}`, share: "full blue 1" };
  return chosen ? `${chosen.name}: ${ends[chosen.kind]}. ${chosen.words}` : "";
}

// Give an element the colour of its number.
function colour(element, value, kind, scale) {
  if (!isNumber(value)) {
    return;
  }
  const share = kind === "share" ? value : Math.abs(value) / scale;
  element.classList.add(kind === "log" || value < 0 ? "down" : "up");
  element.style.setProperty("--strength", Math.min(1, Math.max(0, share)).toFixed(3));
}

// All numbers of one token in words.
function allNumbers(transcript, at) {
  const told = numbersOf(transcript).map(({ key, name }) => `${name} ${short(transcript[key][at])}`);
  const place = `token ${at + 1} of ${transcript.tokens.length}`;
  return `${place}, “${visible(transcript.tokens[at])}”: ${told.join(", ") || "no number"}`;
}

// The tokens as a list that is one stop of the Tab key; the arrow keys move inside.
function tokenList(transcript, chosen, scale, differs, readout) {
  const items = list(transcript.tokens).map((token, at) => {
    const value = chosen ? transcript[chosen.key]?.[at] : undefined;
    const item = make("li", { tabindex: at === 0 ? 0 : -1 }, make("bdi", {}, visible(token).trimEnd() || "␣"));
    if (chosen) {
      item.append(make("small", {}, ` ${short(value)}`));
      colour(item, value, chosen.kind, scale);
    }
    if (at === differs) {
      item.classList.add("differs");
      item.append(make("span", { class: "hidden" }, " (the first that differs)"));
    }
    const tell = () => {
      readout.textContent = allNumbers(transcript, at);
    };
    item.addEventListener("mouseenter", tell);
    item.addEventListener("focus", tell);
    return item;
  });
  const box = make("ol", { class: "tokens", "aria-label": "tokens; the arrow keys move" });
  items.forEach((item, at) => {
    box.append(item);
    if (String(transcript.tokens[at]).includes("\n")) {
      box.append(make("li", { class: "break", "aria-hidden": "true" }));
    }
  });
  box.addEventListener("keydown", (event) => {
    const at = items.indexOf(document.activeElement);
    const places = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: items.length - 1 };
    const next = items[places[event.key]];
    if (at >= 0 && next) {
      event.preventDefault();
      items[at].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
  });
  return box;
}

// A table of texts and elements in a box that scrolls sideways, below its caption, which does not.
let tables = 0;
function tableOf(caption, head, rows) {
  tables += 1;
  const id = `table-made-${tables}`;
  const table = make("table", { "aria-labelledby": id });
  table.append(make("thead", {}, make("tr", {}, ...head.map((x) => make("th", { scope: "col" }, x)))));
  const lines = rows.map(([first, ...cells]) =>
    make("tr", {}, make("th", { scope: "row" }, first), ...cells.map((x) => make("td", {}, x))),
  );
  table.append(make("tbody", {}, ...lines));
  const box = make("div", { class: "scroll", role: "region", "aria-labelledby": id, tabindex: 0 }, table);
  return make("div", {}, make("p", { class: "caption", id }, caption), box);
}

// Every number of every token as a table, which is made when it is opened.
function numberTable(transcript) {
  const columns = numbersOf(transcript);
  const details = make("details", {}, make("summary", {}, "All numbers as a table"));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) {
      const rows = transcript.tokens.map((token, at) => [
        visible(token),
        ...columns.map(({ key }) => short(transcript[key][at])),
      ]);
      details.append(tableOf("Numbers of each token", ["token", ...columns.map((c) => c.name)], rows));
    }
  });
  return details;
}

// The steps of a draft with what the reward models say of them and the truth.
function stepTable(transcript) {
  const ends = list(transcript.step_ends);
  const count = Math.max(list(transcript.orm).length, list(transcript.sorm).length);
  const blamed = list(transcript.sorm).findIndex((p) => isNumber(p) && p < 0.5);
  const rows = [];
  for (let at = 0; at < count; at += 1) {
    const tokens = list(transcript.tokens).slice(ends[at - 1] ?? 0, ends[at]);
    const whole = at === count - 1;
    const text = ends.length > at ? visible(tokens.join("")) : whole ? "whole response" : `step ${at + 1}`;
    const truth = whole ? transcript.right : transcript.steps_right?.[at];
    const known = typeof truth === "boolean";
    const lucky = whole && isLucky(transcript);
    const sorm = make("span", {}, short(transcript.sorm?.[at]));
    if (at === blamed) {
      sorm.prepend(make("b", { class: "bad" }, "blamed ▶ "));
    }
    rows.push([text, short(transcript.orm?.[at]), sorm, known ? verdict(truth, lucky) : "not known"]);
  }
  const words = "Up to each step: the reward models' probability that it can still end right. Blamed: the first step below 0.5";
  const table = tableOf(words, ["step", "ORM", "SORM", "truth"], rows);
  table.classList.add("steps");
  return table;
}

// What the judge wrote about a response, and the mean of its scores.
function judgements(transcript) {
  const scores = list(transcript.scores).filter(isNumber);
  const mean = scores.reduce((sum, x) => sum + x, 0) / scores.length;
  const told = list(transcript.judgements).join("   ");
  const count = `${scores.length} of ${list(transcript.scores).length} could be read`;
  const words = scores.length > 0 ? `mean score ${short(mean)} (${count})` : "no score could be read";
  return make("p", {}, "The judge wrote ", code(told), `: ${words}.`);
}

// What right and wrong steps mean, below cards that tell of steps.
function stepWords(transcripts) {
  if (!transcripts.some((t) => list(t?.steps_right).length > 0)) {
    return "";
  }
  const luck = "Right by luck: the answer is right although a step is wrong. ";
  const words =
    "The reward looks only at the final answer. A step counts as right only if it is that of the true way.";
  return make("p", { class: "quiet" }, (transcripts.some(isLucky) ? luck : "") + words);
}

// A response as a card: its tokens or its text, and all that the reward says of it.
function card(title, transcript, chosen, scale, differs) {
  const box = make("article", { class: "side" }, make("h4", {}, title));
  if (typeof transcript?.right === "boolean") {
    box.firstChild.append(" ", verdict(transcript.right, isLucky(transcript)));
  }
  if (list(transcript?.tokens).length > 0) {
    const readout = make("p", { class: "readout", "aria-live": "polite" });
    readout.textContent = "Point at a token, or move to it with Tab and the arrow keys.";
    box.append(tokenList(transcript, chosen, scale, differs, readout), readout);
    box.append(numbersOf(transcript).length > 0 ? numberTable(transcript) : "");
  } else {
    const letters = Array.from(transcript?.response ?? "");
    const text = make("p", { class: "text" });
    if (letters.length === 0) {
      text.append(make("span", { class: "quiet" }, "(an empty response)"));
    } else if (differs >= 0) {
      text.append(visible(letters.slice(0, differs).join("")));
      text.append(make("span", { class: "differs" }, visible(letters[differs] ?? "(nothing)")));
      text.append(visible(letters.slice(differs + 1).join("")));
    } else {
      text.append(visible(letters.join("")));
    }
    box.append(text);
  }
  if (list(transcript?.sorm).length > 0 || list(transcript?.orm).length > 0) {
    box.append(stepTable(transcript));
  } else if (list(transcript?.steps_right).length > 0) {
    const told = transcript.steps_right.map((right, at) => `${at + 1} ${right ? "✓ right" : "✗ wrong"}`);
    box.append(make("p", { class: "quiet" }, `Its steps: ${told.join(", ")}.`));
  }
  if (list(transcript?.judgements).length > 0) {
    box.append(judgements(transcript));
  }
  return box;
}

// ---- the parts of a method ----

// Problems before and after, with a filter. `view` holds what the whole method has chosen.
function answersPart(job, view) {
  const part = make("div", { class: "answers" }, make("h3", {}, "Answers before and after"));
  const total = Object.values(job.counts).reduce((sum, x) => sum + x, 0);
  if (total === 0) {
    part.append(make("p", {}, "No answers are logged for this method yet."));
    return part;
  }
  const filters = [["all", `all (${total})`]];
  for (const [kind, words] of Object.entries(job.kinds)) {
    filters.push([kind, `${words} (${job.counts[kind]})`]);
  }
  const below = make("div");
  const show = (kind) => {
    const some = job.answers.filter((answer) => kind === "all" || answer.kind === kind);
    const counted = kind === "all" ? total : job.counts[kind];
    const left = counted - some.length;
    const words = left > 0 ? `; ${left} more are left out of this page and are in answers.jsonl` : "";
    const marks = "◆: with its tokens and their numbers; ◇: only its texts.";
    const count = `${some.length} of ${counted} are here${words}. ${marks}`;
    const note = make("p", { class: "quiet", role: "status" }, count);
    const detail = make("div", { class: "detail" });
    const pick = (at) => detail.replaceChildren(...oneAnswer(some[at], view));
    view.redraw.answers = () => some.length > 0 && pick(chooser.querySelector("select").value);
    const options = some.map((answer, at) => {
      const mark = list(answer.after?.tokens).length > 0 ? "◆" : "◇";
      const way = `${answer.before?.right ? "✓" : "✗"}→${answer.after?.right ? "✓" : "✗"}`;
      return [at, `${mark} ${way} ${brief(answer.prompt)}`];
    });
    const chooser = choice("problem", options, 0, pick, Math.min(12, Math.max(2, some.length)));
    below.replaceChildren(note, make("div", { class: "chooser" }, chooser, detail));
    if (some.length > 0) {
      pick(0);
    }
  };
  const first = job.counts.mended > 0 ? "mended" : "all";
  part.append(make("div", { class: "controls" }, choice("show", filters, first, show)), below);
  show(first);
  return part;
}

function oneAnswer(answer, view) {
  const problem = make("p", {}, "Problem: ", code(answer.prompt));
  const shown = [problem];
  if (answer.solution) {
    shown.push(make("p", {}, "A right way: ", code(answer.solution)));
  }
  const both = [answer.before, answer.after];
  const differs = firstDifference(...both);
  const scale = view.chosen ? scaleOf(view.chosen.key, both) : 1;
  const cards = both.map((t, at) => card(at ? "after" : "before", t, view.chosen, scale, differs));
  shown.push(make("div", { class: "sides" }, ...cards), stepWords(both));
  const words = list(answer.after?.tokens).length
    ? colourWords(view.chosen, scale)
    : "Only the texts were kept of this problem, no numbers.";
  shown.push(make("p", { class: "quiet" }, `Underlined: the first difference. ${words}`));
  return shown;
}

// The same problem at every look, by a slider.
function followedPart(job, view) {
  const followed = list(job.followed).filter((problem) => list(problem.looks).length > 1);
  if (followed.length === 0) {
    return null;
  }
  const below = make("div");
  const show = (at) => {
    const { looks } = followed[at];
    const place = make("div");
    const strip = looks.map((look) => `${look.step} ${look.right ? "✓" : "✗"}`).join("   ");
    const move = (look) => {
      const scale = view.chosen ? scaleOf(view.chosen.key, looks) : 1;
      const title = `update ${looks[look].step}`;
      const shown = card(title, looks[look], view.chosen, scale, firstDifference(looks[0], looks[look]));
      place.replaceChildren(shown, stepWords([looks[look]]));
    };
    const last = looks.length - 1;
    const right = (look) => (isLucky(look) ? "right by luck" : look.right ? "right" : "wrong");
    const tell = (at) => `update ${looks[at].step}, ${right(looks[at])}`;
    const label = slider("look, from before training to the end", last, last, tell, move);
    view.redraw.followed = () => move(Number(label.querySelector("input").value));
    const words = `Updates: ${strip}. Underlined: the first difference from the first look.`;
    below.replaceChildren(label, make("p", { class: "quiet" }, words), place);
    move(last);
  };
  const options = followed.map((problem, at) => [at, brief(problem.prompt)]);
  const controls = make("div", { class: "controls" }, choice("problem", options, 0, show));
  show(0);
  const left = job.left_out?.followed ? ` ${job.left_out.followed} more are left out of this page.` : "";
  const count = followed.length === 1 ? "problem was" : `${followed.length} problems were`;
  const words =
    `The same ${count} asked before training and at every look at dev since.${left} ` +
    "At a look training pauses, and the model answers problems of dev greedily.";
  const title = make("h3", {}, "A few problems, look by look");
  return make("div", { class: "followed" }, title, make("p", {}, words), controls, below);
}

// Pairs that were learned from, with the margin between them.
function pairsPart(job, view) {
  const pairs = list(job.pairs).filter((pair) => pair.chosen && pair.rejected);
  if (pairs.length === 0) {
    return null;
  }
  const widest = pairs.reduce((most, pair) => Math.max(most, Math.abs(pair.margin ?? 0)), 0) || 1;
  const chosen = NUMBERS.find(({ key }) => key === "logp");
  const below = make("div");
  const show = (at) => {
    const pair = pairs[at];
    const both = [pair.chosen, pair.rejected];
    const scale = scaleOf("logp", both);
    const differs = firstDifference(...both);
    const cards = both.map((side, i) => {
      const box = card(i ? "rejected" : "chosen", side, chosen, scale, differs);
      box.append(make("p", {}, `Gain over the round's first model: ${short(side.gain)} nats.`));
      return box;
    });
    const bar = make("span", { class: pair.margin < 0 ? "bar bad" : "bar", "aria-hidden": "true" });
    bar.style.width = `${(40 * Math.abs(pair.margin ?? 0)) / widest}%`;
    const words = pair.margin > 0 ? "it has moved towards the chosen one" : "it has not moved towards the chosen one";
    below.replaceChildren(
      make("p", {}, "Problem: ", code(pair.prompt)),
      make("p", { class: "margin" }, `Margin ${short(pair.margin)}: ${words}. `, bar),
      make("div", { class: "sides" }, ...cards),
    );
  };
  const options = pairs.map((pair, at) => [
    at,
    `update ${pair.step}, margin ${short(pair.margin)}: ${brief(pair.prompt)}`,
  ]);
  const left = job.left_out?.pairs ? ` ${job.left_out.pairs} more are left out of this page.` : "";
  const note = make("p", { class: "quiet" }, `Coloured by log-prob under the policy at that update.${left}`);
  const controls = make("div", { class: "controls" }, choice("pair", options, 0, show));
  show(0);
  return make("div", { class: "pairs" }, make("h3", {}, "Pairs it learned from"), note, controls, below);
}

// ---- denoise ----

// Whether a text is right, if the data tells; null if not. It may have been graded elsewhere, or
// its last # ends as the solution's. If that is no number, others may be right as well.
function gradeOf(text, answer) {
  for (const t of [answer.before, answer.after]) {
    if (t?.response === text) {
      return t.right;
    }
    const drawn = list(t?.branches).flatMap((_, pass) => branchesAt(t, pass));
    const branch = drawn.find(([words]) => words === text);
    if (branch) {
      return branch[1];
    }
  }
  const ending = (x) => String(x ?? "").replace("<eos>", "").split("#").slice(1).at(-1);
  const wanted = ending(answer.solution);
  if (wanted !== undefined && ending(text) === wanted && String(text).endsWith("<eos>")) {
    return true;
  }
  const isPlain = (x) => x === undefined || /^-?\d*$/.test(x);
  return wanted !== undefined && isPlain(wanted) && isPlain(ending(text)) ? false : null;
}

// What was drawn from the canvas of a pass: pairs of a text and whether it is right.
function branchesAt(path, pass) {
  return list(list(path?.branches)[pass]).filter((branch) => list(branch).length > 1);
}

// V(x_t) over the passes, with the branches as dots and the current pass as a line.
function valueCurve(path, passes) {
  const title = "V: the share of branches from each canvas that end right";
  const svg = draw("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": title });
  const x = (pass) => (100 * pass) / Math.max(1, passes);
  const y = (share) => 85 - 70 * share;
  const given = list(path.prospects).map((v, pass) => [pass, v]).filter(([, v]) => isNumber(v));
  for (const share of [0, 0.5, 1]) {
    svg.append(draw("path", { class: "level", d: `M0 ${y(share)}H100` }));
  }
  svg.append(draw("path", { class: "line hue-0", d: `M${given.map(([pass, v]) => `${x(pass)} ${y(v)}`).join("L") || "0 0"}` }));
  list(path.branches).forEach((_, pass) => {
    const branches = branchesAt(path, pass);
    const right = branches.filter(([, good]) => good).length;
    for (let at = 0; at < branches.length; at += 1) {
      const good = at < right;
      const place = good ? 1 + 4 * at : 99 - 4 * (at - right);
      svg.append(draw("path", { class: good ? "right-dot" : "wrong-dot", d: `M${x(pass)} ${place}h${good ? 0 : 0.6}` }));
    }
  });
  const now = draw("path", { class: "now" });
  svg.append(now);
  const plot = make("div", { class: "plot" }, svg);
  for (const share of [0, 0.5, 1]) {
    plot.append(make("span", { class: "y", style: `top:${y(share)}%`, "aria-hidden": "true" }, String(share)));
  }
  for (const pass of [0, passes]) {
    plot.append(make("span", { class: "x", style: `left:${x(pass)}%`, "aria-hidden": "true" }, `pass ${pass}`));
  }
  const move = (pass) => now.setAttribute("d", `M${x(pass)} 0V100`);
  const rows = given.map(([pass, v]) => [String(pass), short(v)]);
  const numbers = make("details", {}, make("summary", {}, "The curve in numbers"), tableOf(title, ["passes done", "V"], rows));
  const dots = "Round blue dots above: branches that end right. Square orange dots below: wrong ones.";
  const words = list(path.branches).length > 0 ? dots : "The branches themselves were not kept.";
  const figure = make("figure", {}, make("figcaption", {}, title), plot, make("p", { class: "quiet" }, words), numbers);
  return { figure, move };
}

// The canvas after some passes: what is hidden, what is written and how sure the model was.
function canvas(path, pass) {
  const cells = path.order.map((written, place) => {
    const isWritten = isNumber(written) && written < pass;
    const padding = place >= list(path.tokens).length;
    const text = isWritten ? (padding ? "pad" : visible(path.tokens[place])) : "·";
    const cell = make("span", { class: "cell", role: "listitem" }, make("bdi", {}, text));
    if (!isWritten) {
      cell.classList.add("masked");
      cell.append(make("span", { class: "hidden" }, "hidden"));
      return cell;
    }
    colour(cell, path.sure?.[place], "share", 1);
    cell.append(make("small", {}, ` ${short(path.sure?.[place])}`));
    cell.title = `place ${place + 1}, written in pass ${written + 1}, sureness ${short(path.sure?.[place])}`;
    if (written === pass - 1) {
      cell.classList.add("fresh");
      cell.append(make("span", { class: "hidden" }, " written now"));
    }
    return cell;
  });
  return make("div", { class: "canvas", role: "list", "aria-label": "the canvas" }, ...cells);
}

// One way through the passes, with its slider and its play button.
function pathView(path, answer, view) {
  const passes = Math.max(list(path.said).length, 1 + Math.max(...path.order.filter(isNumber), 0));
  const curve = list(path.prospects).some(isNumber) ? valueCurve(path, passes) : null;
  const state = make("p", { class: "state", role: "status" });
  const place = make("div");
  const said = make("p", { class: "said" });
  const branches = make("ul", { class: "branches" });
  const show = (pass) => {
    state.textContent = `After ${pass} of ${passes} passes.`;
    place.replaceChildren(canvas(path, pass));
    const last = pass >= passes;
    const text = last ? path.response : path.said?.[pass];
    const right = last ? path.right : gradeOf(text, answer);
    said.replaceChildren();
    if (text !== undefined) {
      const words = last ? "It has written: " : "If it had to answer now it would write: ";
      said.append(words, code(text), " ", right === null ? "(not graded)" : verdict(right, last && isLucky(path)));
    }
    const prospect = path.prospects?.[pass];
    state.append(isNumber(prospect) ? ` V(x_t) = ${short(prospect)}.` : "");
    const drawn = branchesAt(path, pass).map(([words, good]) => make("li", {}, verdict(good), " ", code(words)));
    branches.replaceChildren(...drawn);
    curve?.move(pass);
  };
  const tell = (pass) => `after ${pass} of ${passes} passes`;
  const label = slider("passes done", passes, 0, tell, show);
  const input = label.querySelector("input");
  const button = make("button", { type: "button" }, "Play");
  const go = (pass) => {
    input.value = pass;
    input.dispatchEvent(new Event("input"));
  };
  const stop = () => {
    clearInterval(view.playing);
    view.playing = undefined;
    button.textContent = "Play";
  };
  const advance = () => {
    if (!button.isConnected || Number(input.value) >= passes) {
      stop();
      return;
    }
    go(Number(input.value) + 1);
  };
  button.addEventListener("click", () => {
    if (view.playing !== undefined) {
      stop();
      return;
    }
    if (Number(input.value) >= passes) {
      go(0);
    }
    const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    view.playing = setInterval(advance, calm ? 1500 : 500);
    button.textContent = "Pause";
  });
  show(0);
  const heading = list(path.branches).length > 0 ? make("h4", {}, "Branches drawn from this canvas") : null;
  const key = make("p", { class: "quiet" }, "A dot is a hidden place; outlined: written in this pass; the bluer, the surer.");
  const shown = [make("div", { class: "player" }, button, label), state, place, key, said, curve?.figure, heading, branches];
  return shown.filter(Boolean);
}

// How the diffusion model fills its canvas, before and after training.
function denoisePart(job, view) {
  const some = list(job.answers).filter((a) => list(a.before?.order).length || list(a.after?.order).length);
  if (some.length === 0) {
    return null;
  }
  const below = make("div");
  let problem = 0;
  let when = "after";
  const show = () => {
    clearInterval(view.playing);
    view.playing = undefined;
    const path = some[problem][when];
    const missing = [make("p", {}, `The way of this canvas ${when} training was not kept.`)];
    below.replaceChildren(...(list(path?.order).length ? pathView(path, some[problem], view) : missing));
  };
  const problems = some.map((answer, at) => [at, brief(answer.prompt)]);
  const times = [["after", "after training"], ["before", "before training"]];
  const controls = make(
    "div",
    { class: "controls" },
    choice("problem", problems, 0, (value) => {
      problem = Number(value);
      show();
    }),
    choice("model", times, when, (value) => {
      when = value;
      show();
    }),
  );
  show();
  return make("div", { class: "denoise" }, make("h3", {}, "How it fills the canvas"), controls, below);
}

// ---- a method ----

// Everything that moves in one method's section.
function methodPart(root, jobs) {
  const view = { job: 0, chosen: null, playing: undefined, redraw: {} };
  const colourBy = (chosen) => {
    view.chosen = chosen;
    Object.values(view.redraw).forEach((redraw) => redraw());
  };
  const render = () => {
    clearInterval(view.playing);
    view.playing = undefined;
    view.redraw = {};
    const job = jobs[view.job];
    const transcripts = [
      ...list(job.answers).flatMap((answer) => [answer.before, answer.after]),
      ...list(job.followed).flatMap((problem) => list(problem.looks)),
    ];
    const has = (t, key) => numbersOf(t).some((n) => n.key === key);
    const possible = [...NUMBERS, ...ownNumbers(transcripts)];
    const found = possible.filter(({ key }) => transcripts.some((t) => has(t, key)));
    const telling = found.find(({ key }) => tellsTokensApart(key, transcripts));
    colourBy(found.find(({ key }) => key === view.chosen?.key) ?? telling ?? found[0] ?? null);
    const controls = make("div", { class: "controls", role: "group", "aria-label": "what the transcripts show" });
    if (jobs.length > 1) {
      const options = jobs.map(({ name }, at) => [at, name]);
      const label = jobs.some(({ name }) => name.includes(",")) ? "run and seed" : "seed";
      controls.append(
        choice(label, options, view.job, (value) => {
          view.job = Number(value);
          render();
        }),
      );
    }
    if (found.length > 0) {
      const options = found.map(({ key, name }) => [key, name]);
      controls.append(
        choice("colour tokens by", options, view.chosen.key, (value) => {
          colourBy(found.find(({ key }) => key === value));
        }),
      );
    }
    if (found.length > 0) {
      const box = make("input", { type: "checkbox", checked: root.classList.contains("numbers") });
      box.addEventListener("change", () => root.classList.toggle("numbers", box.checked));
      controls.append(make("label", { class: "check" }, box, "write the numbers"));
    }
    const parts = [denoisePart, answersPart, followedPart, pairsPart].map((part) => part(job, view));
    root.replaceChildren(...[controls, ...parts].filter(Boolean));
  };
  render();
}

for (const root of document.querySelectorAll(".moving")) {
  const jobs = list(DATA[root.dataset.method]);
  if (jobs.length > 0) {
    methodPart(root, jobs);
  } else {
    root.replaceChildren(make("p", {}, "No transcript is logged for this method yet."));
  }
}
