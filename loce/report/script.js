"use strict";
// Draws the charts of the page as SVG, moves them through time, names what is under the pointer; the class table.
const data = JSON.parse(document.getElementById("data").textContent);
const LEFT = 48, TOP = 10, PLOT = 150, BAND = 20; // pixels of a chart
const NAMED = 11, NAMES = 104, LETTERS = 15; // pixels of a class from which on it is named below its bar, and for that; letters
let time = 1; // share of each training

const escaped = text => String(text).replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})[c]);
const short = v => v === null || v === undefined ? "-" : String(Number.isInteger(v) ? v : +v.toPrecision(3));
const shown = (kind, v) => v !== null && data.kinds[kind].percent ? (100 * v >= 10 ? (100 * v).toFixed(1) : short(100 * v)) + "%" : short(v);
const tip = document.getElementById("tip");

function ticks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(m => m * power >= rough);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) found.push(+v.toPrecision(6));
  return found;
}

function frame(width, low, high, name) { // the axis on the left; y(value) in pixels
  const y = v => TOP + PLOT * (1 - (v - low) / (high - low));
  const lines = ticks(low, high).map(v => `<path class="tick" d="M${LEFT} ${y(v).toFixed(1)}H${width}"/>` +
    `<text x="${LEFT - 6}" y="${(y(v) + 4).toFixed(1)}" text-anchor="end">${name(v)}</text>`);
  return [y, lines.join("")];
}

const svg = (width, height, content) =>
  `<svg width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" aria-hidden="true">${content}</svg>`;

const absent = (run, name) => name === "memory" && !run.memory ? "no feature memory" : "not known of this run";

// A bar for each class

function limits(kind) { // shared by all runs and times, so that heights can be compared
  let low = 0, high = 0;
  for (const run of data.runs) for (const [, values] of run.states[kind] || []) for (const v of values)
    if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); }
  return high > low ? [low, high] : [0, 1];
}
const limitsOf = Object.fromEntries(Object.keys(data.kinds).map(kind => [kind, limits(kind)]));

function stateOf(run, kind) { // the newest of the chosen time: [iteration, values]
  const states = run.states[kind] || [];
  return states.filter(([at]) => at <= time * run.last + 0.5).pop() || [states.length ? states[0][0] : null, null];
}

function bars(element) {
  const run = data.runs[element.dataset.run], kind = element.dataset.name, width = element.clientWidth;
  const [at, values] = stateOf(run, kind), percent = data.kinds[kind].percent, [low, high] = limitsOf[kind];
  const [y, axis] = frame(width, low, high, v => percent ? `${short(100 * v)}%` : short(v));
  if (!values) {
    const words = at === null ? absent(run, kind) : `not before iteration ${at}`;
    element.innerHTML = svg(width, TOP + PLOT + BAND, axis + `<text x="${LEFT + 12}" y="${TOP + 20}">${words}</text>`);
    return;
  }
  const count = values.length, step = (width - LEFT) / count, x = place => LEFT + place * step;
  let content = axis;
  for (const group of Object.keys(data.groups)) {
    const places = [...values.keys()].filter(place => run.groups[place] === group);
    if (!places.length) continue;
    const known = places.filter(place => values[place] !== null);
    const path = known.filter(place => values[place]).map(place =>
      `M${x(place + 0.5).toFixed(2)} ${y(0).toFixed(1)}V${y(values[place]).toFixed(1)}`).join("");
    content += `<path class="bar ${group}" stroke-width="${Math.max(step * 0.86, 0.7).toFixed(2)}" d="${path}"/>`;
    const band = places.map(place => `M${x(place).toFixed(2)} ${TOP + PLOT + 4}h${step.toFixed(2)}`).join("");
    content += `<path class="bar ${group}" stroke-width="4" d="${band}"/>`;
    const middle = x(places[places.length >> 1] + 0.5);
    content += `<text x="${middle.toFixed(0)}" y="${TOP + PLOT + BAND}" text-anchor="middle">${places.length} ${data.groups[group]}</text>`;
    if (!known.length) continue;
    const mean = known.reduce((sum, place) => sum + values[place], 0) / known.length;
    const height = y(mean), from = x(places[0]), to = x(places[places.length - 1] + 1);
    content += `<path class="mean" d="M${from.toFixed(1)} ${height.toFixed(1)}H${to.toFixed(1)}"/>` +
      `<text class="meantext" x="${Math.max(middle, LEFT + 20).toFixed(0)}" y="${(height < TOP + 16 ? height + 15 : height - 5).toFixed(1)}" text-anchor="middle">` +
      `${shown(kind, mean)}</text>`;
  }
  if (low < 0) content += `<path class="zero" d="M${LEFT} ${y(0).toFixed(1)}H${width}"/>`;
  const named = step >= NAMED ? NAMES : 0;
  if (named) content += run.names.map((name, place) => `<text transform="translate(${(x(place + 0.5) - 4).toFixed(1)} ` +
    `${TOP + PLOT + BAND + 8}) rotate(90)">${escaped(name.length > LETTERS ? name.slice(0, LETTERS - 1) + "\u2026" : name)}</text>`).join("");
  element.innerHTML = svg(width, TOP + PLOT + BAND + 4 + named, content);
}

function tipOfBars(element, x) {
  const run = data.runs[element.dataset.run], kind = element.dataset.name, values = stateOf(run, kind)[1];
  const place = Math.floor((x - LEFT) / (element.clientWidth - LEFT) * run.names.length);
  if (!values || !(place >= 0 && place < values.length)) return "";
  return `${run.names[place]}: ${shown(kind, values[place])} (${data.groups[run.groups[place]]}, ${run.counts[place]} instances)`;
}

// Lines over iterations

const colourOf = (name, place) => Object.keys(data.groups).find(g => data.groups[g] === name) || "s" + place;

function curve(element) {
  const run = data.runs[element.dataset.run], {at, series} = run.curves[element.dataset.name];
  const names = Object.keys(series), log = element.dataset.name === "losses", width = element.clientWidth;
  if (!names.length) { element.innerHTML = `<p class="note">${absent(run, element.dataset.name)}</p>`; return; }
  const scale = v => log ? Math.log10(v) : v, usable = v => v !== null && (!log || v > 0);
  const all = data.runs.flatMap(r => Object.values(r.curves[element.dataset.name].series)).flat().filter(usable).map(scale);
  const low = log ? Math.min(...all) : Math.min(0, ...all), top = Math.max(...all), high = top > low ? top : low + 1;
  const [y, axis] = frame(width, low, high, v => short(log ? 10 ** v : v));
  const x = i => (LEFT + at[i] / at[at.length - 1] * (width - LEFT - 4)).toFixed(1);
  let content = axis + `<text x="${width}" y="${TOP + PLOT + BAND}" text-anchor="end">iteration ${at[at.length - 1]}</text>`;
  names.forEach((name, place) => {
    let path = "", last = false;
    series[name].forEach((v, i) => {
      if (usable(v)) path += `${last ? "L" : "M"}${x(i)} ${y(scale(v)).toFixed(1)}`;
      last = usable(v);
    });
    content += `<path class="line ${colourOf(name, place)}" d="${path}"/>`;
    if (at.length === 1 && usable(series[name][0])) content += `<circle class="dot ${colourOf(name, place)}" cx="${x(0)}" cy="${y(scale(series[name][0])).toFixed(1)}" r="3"/>`;
  });
  const keys = names.map((name, place) => `<span class="key ${colourOf(name, place)}">${escaped(name)}</span>`);
  element.innerHTML = svg(width, TOP + PLOT + BAND + 4, content) + `<p class="legend">${keys.join("")}</p>`;
}

function tipOfCurve(element, x) {
  const {at, series} = data.runs[element.dataset.run].curves[element.dataset.name];
  if (!at.length || x < LEFT) return "";
  const wanted = (x - LEFT) / (element.clientWidth - LEFT - 4) * at[at.length - 1];
  const near = at.reduce((best, value, i) => Math.abs(value - wanted) < Math.abs(at[best] - wanted) ? i : best, 0);
  return `iteration ${at[near]}: ` + Object.entries(series).map(([name, values]) => `${name} ${short(values[near])}`).join(", ");
}

// Together

const charts = [...document.querySelectorAll(".bars")], curves = [...document.querySelectorAll(".curve")];
const drawAll = () => { charts.forEach(bars); curves.forEach(curve); };
let wide = 0;
addEventListener("resize", () => { if (innerWidth !== wide) { wide = innerWidth; drawAll(); } });

for (const [elements, text] of [[charts, tipOfBars], [curves, tipOfCurve]]) for (const element of elements) {
  const tell = event => {
    tip.textContent = text(element, event.clientX - element.getBoundingClientRect().left);
    tip.hidden = !tip.textContent;
    tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 10) + "px";
  };
  element.addEventListener("pointermove", tell);
  element.addEventListener("pointerdown", tell);
  element.addEventListener("pointerleave", event => { tip.hidden ||= event.pointerType === "mouse"; });
}
// A finger leaves as it lifts: what it was told stays until it scrolls or taps elsewhere.
addEventListener("pointerdown", event => { tip.hidden ||= !event.target.closest(".bars, .curve"); });
addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});

const slider = document.getElementById("time"), play = document.getElementById("play");
function moveTo(share) {
  time = share;
  slider.value = 1000 * share;
  const at = [...new Set(data.runs.map(run => `${Math.round(share * run.last)} of ${run.last}`))];
  document.getElementById("at").textContent = "iteration " + at.join(" / ");
  charts.forEach(bars);
}
if (slider) {
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "\u25b6"; };
  slider.addEventListener("input", () => { stop(); moveTo(slider.value / 1000); });
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    let share = time < 1 ? time : 0;
    play.textContent = "\u275a\u275a";
    timer = setInterval(() => {
      moveTo(Math.min(1, share += 0.02));
      if (share >= 1) stop();
    }, 120);
  });
  moveTo(1);
}
drawAll();
wide = innerWidth;

// The class table

const body = document.querySelector("#classes tbody"), rows = [...body.rows];
document.getElementById("search").addEventListener("input", event => {
  const word = event.target.value.trim().toLowerCase();
  for (const row of rows) {
    const name = row.cells[0].textContent.toLowerCase(), group = row.cells[1].textContent;
    row.hidden = !(word in data.groups ? group === word : name.includes(word));
  }
  document.getElementById("found").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} classes`;
});

const buttons = [...document.querySelectorAll("#classes button")];
buttons.forEach((button, column) => button.addEventListener("click", () => {
  const before = button.parentElement.ariaSort; // names rise at the first click, numbers fall
  const falling = column < 2 ? before === "ascending" : before !== "descending";
  buttons.forEach(other => { other.parentElement.ariaSort = null; });
  button.parentElement.ariaSort = falling ? "descending" : "ascending";
  const cell = row => row.cells[column].textContent, known = rows.filter(row => cell(row) !== "-");
  const compare = (a, b) => cell(a).localeCompare(cell(b), "en", {numeric: true});
  const numbers = known.every(row => !isNaN(cell(row)));
  known.sort((a, b) => (numbers ? cell(a) - cell(b) : compare(a, b)) * (falling ? -1 : 1));
  body.append(...known, ...rows.filter(row => cell(row) === "-"));
}));
