"use strict";
// Makes the static pictures answer: the slider moves the map of loads, pointing reads values off.
const runs = JSON.parse(document.getElementById("data").textContent);
document.documentElement.classList.add("moving");

for (const run of runs) {
  const loads = decode(run.loads);
  run.load = (frame, row, column) => loadOf(loads[(frame * run.layers.length + row) * run.experts + column]);
  run.frame = run.frames.length - 1;
  if (run.shown) {
    run.layer = run.shown.layers.length - 1;
    for (const key of ["expert", "weight", "likely", "probability"]) run.shown[key] = new Int16Array(decode(run.shown[key]).buffer);
  }
  for (const table of Object.values(run.tables || {})) {
    const codes = decode(table.codes), rows = table.rows.length;
    table.value = (row, column) => loadOf(codes[(run.layer * rows + row) * run.experts + column]);
  }
}

function decode(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function loadOf(code) {
  return code === 0 ? 0 : 2 ** ((code - 128) / 24);
}

function colour(load) {
  return load < 0.01 ? 0 : Math.min(11, Math.max(1, Math.round(6 + 2.5 * Math.log2(load))));
}

function drawCells(svg, rows, columns, colourOf) {
  const paths = new Map();
  for (let row = 0; row < rows; row++) {
    for (let begin = 0, end; begin < columns; begin = end) {
      const here = colourOf(row, begin);
      for (end = begin + 1; end < columns && colourOf(row, end) === here; end++);
      paths.set(here, (paths.get(here) || "") + `M${begin} ${row}h${end - begin}v1h${begin - end}z`);
    }
  }
  svg.innerHTML = [...paths].map(([number, boxes]) => `<path class="c${number}" d="${boxes}"/>`).join("");
}

function read(element, text) {
  element.closest("figure").querySelector(".reading").textContent = text;
}

// The point of a picture at which somebody points, in shares of its width and height.
function onPoint(svg, act) {
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = (at, start, length) => Math.min(0.99999, Math.max(0, (at - start) / length));
    act(share(event.clientX, box.left, box.width), share(event.clientY, box.top, box.height));
  });
}

const readings = {
  load: (run, row, column) =>
    `layer ${run.layers[row]}, expert ${column}: ${run.load(run.frame, row, column).toFixed(2)} times the mean`,
  time: (run, row, column) => {
    let most = 0;
    for (let expert = 0; expert < run.experts; expert++) most = Math.max(most, run.load(column, row, expert));
    return `step ${run.frames[column].toLocaleString("en")}, layer ${run.layers[row]}: ${most.toFixed(2)} times the mean`;
  },
  kinds: (run, row, column) => share(run.tables.kinds, row, column),
  files: (run, row, column) => share(run.tables.files, row, column),
  pairs: (run, row, column) => row === column ? `expert ${row}` :
    `experts ${row} and ${column}: ${run.tables.pairs.value(row, column).toFixed(2)} times as often`,
};

function share(table, row, column) {
  return `${table.rows[row]}, expert ${column}: ${table.value(row, column).toFixed(2)} times an even share`;
}

for (const map of document.querySelectorAll(".map")) {
  const svg = map.querySelector("svg"), { width, height } = svg.viewBox.baseVal;
  const kind = map.dataset.readings, run = runs[Number(map.dataset.map.replace(/\D/g, ""))];
  const values = kind in readings ? null : kind.split("\n").map((line) => line.split(" "));
  onPoint(svg, (x, y) => {
    const row = Math.floor(y * height), column = Math.floor(x * width);
    read(map, values ? `${row} to ${column}: ${values[row][column]}` : readings[kind](run, row, column));
  });
}

for (const slider of document.querySelectorAll("input[type=range]")) {
  const run = runs[slider.dataset.run], map = document.querySelector(`[data-map=load${slider.dataset.run}] svg`);
  slider.addEventListener("input", () => {
    run.frame = Number(slider.value);
    slider.parentElement.querySelector("output").textContent = run.frames[run.frame].toLocaleString("en");
    drawCells(map, run.layers.length, run.experts, (row, column) => colour(run.load(run.frame, row, column)));
  });
}

// Experts of a shown token in the chosen layer, each with a number: those that it got, or those that are likely.
function expertsOf(run, token, expert, value) {
  const numbers = run.shown[expert], all = numbers.length / run.shown.layers.length;
  const each = all / run.shown.tokens, begin = run.layer * all + token * each;
  return [...numbers.slice(begin, begin + each)].map((number, place) => [number, run.shown[value][begin + place]])
    .filter(([number]) => number >= 0);
}

for (const text of document.querySelectorAll(".text")) {
  const run = runs[text.dataset.run], spans = [...text.children];
  const say = (token) => {
    const got = expertsOf(run, token, "expert", "weight").map(([number, weight]) => `expert ${number} ${(weight / 100).toFixed(2)}`);
    const likely = expertsOf(run, token, "likely", "probability").map(([number, share]) => `${number} ${(share / 10).toFixed(1)}%`);
    return `${got.join(", ") || "no expert"}; probabilities ${likely.join(", ")}`;
  };
  text.addEventListener("pointerover", (event) => {
    const token = spans.indexOf(event.target);
    if (token >= 0) read(text, `${JSON.stringify(event.target.textContent)}: ${say(token)}`);
  });
  const select = document.querySelector(`select[data-run="${text.dataset.run}"]`);
  select.addEventListener("change", () => {
    run.layer = Number(select.value);
    text.closest("section").querySelector("b").textContent = run.shown.layers[run.layer];
    spans.forEach((span, token) => {
      const [best] = expertsOf(run, token, "expert", "weight");
      span.className = best ? "" : "none";
      if (best) span.style.setProperty("--hue", Math.round(best[0] * 137.508) % 360);
      span.title = say(token);
    });
    for (const [key, table] of Object.entries(run.tables)) {
      const map = document.querySelector(`[data-map=${key}${text.dataset.run}] svg`);
      drawCells(map, table.rows.length, run.experts, (row, column) => colour(table.value(row, column)));
    }
  });
}

for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg"), cursor = svg.querySelector(".cursor"), width = svg.viewBox.baseVal.width;
  const lines = [...svg.querySelectorAll("polyline")].map((line) => line.getAttribute("points").split(" ").map(
    (point) => point.split(",").map(Number)));
  if (!lines.length) continue;
  const axis = JSON.parse(chart.dataset.axis), latest = chart.querySelector(".reading").textContent;
  onPoint(svg, (share) => {
    const near = lines.map((line) => line.reduce((best, point) =>
      Math.abs(point[0] - share * width) < Math.abs(best[0] - share * width) ? point : best));
    const scale = ([low, high, start, end], at) => low + ((at - start) * (high - low)) / (end - start);
    const value = (y) => Number(scale(axis.y, y).toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
    cursor.setAttribute("d", `M${near[0][0]} ${axis.y[3]}V${axis.y[2]}`);
    read(svg, `step ${Math.round(scale(axis.x, near[0][0])).toLocaleString("en")}: ${near.map((p) => value(p[1])).join("; ")}`);
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("d", "");
    read(svg, latest);
  });
}
