"use strict";

// Line charts as plain SVG: few grid lines, lines named at their end, a read-out that follows pointer and arrow keys.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function shape(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG_NAMESPACE, name), attributes, children);
}

// Text goes in as text nodes only: nothing that a model wrote is ever parsed as HTML.
function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

const ruler = document.createElement("canvas").getContext("2d");

// Width in px of the widest of these chart texts, as the page's own font sets them.
function widest(texts, weight) {
  ruler.font = `${weight} 12px ${getComputedStyle(document.body).fontFamily}`;
  return Math.max(...texts.map((text) => ruler.measureText(text).width));
}

function niceTicks(low, high, wanted = 4) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let i = Math.floor(low / step + 1e-9); i * step < high + step * (1 - 1e-9); i++) ticks.push(i * step);
  if (ticks.length === 1) ticks.push(ticks[0] + step); // all values are one and the same
  return { ticks, step };
}

function decimals(step) {
  let digits = 0;
  while (digits < 6 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6) digits++;
  return digits;
}

const minus = (text) => text.replace("-", "−");
const percentText = (value) => minus((100 * value).toFixed(1)) + "%";
const numberText = (value) => minus(value.toPrecision(3).includes("e") ? value.toExponential(2) : value.toPrecision(3));

/* One chart. spec: {title, about, format, percent, series, xName, ticks: [{x, label}], dividers: [x], describe(x)}
   series: {name, cls, dots, band, runs: [[{x, y, low, high, note}, ...], ...]}; a line breaks
   between runs and at a null y, a note stands in the read-out only. */
function chart(parent, spec) {
  const series = spec.series.filter((line) => line.runs.flat().some((point) => point.y !== null));
  if (!series.length) return;
  const readout = element("p", { class: "readout" });
  const drawing = element("div", { class: "drawing" });
  parent.append(element("figure", {}, element("figcaption", {}, element("h3", {}, spec.title), element("p", { class: "small" }, spec.about)), readout, drawing));
  const xs = [...new Set(series.flatMap((line) => line.runs.flat().filter((p) => p.y !== null).map((p) => p.x)))].sort((a, b) => a - b);
  let current = null;
  let scene = null;

  function show(x) {
    const at = x === null ? xs[xs.length - 1] : x;
    readout.replaceChildren(element("span", { class: "where" }, spec.describe(at)));
    for (const line of series) {
      const point = line.runs.flat().find((p) => p.x === at && p.y !== null);
      if (!point) continue;
      const range = point.low === undefined || point.low === null ? "" : ` (${spec.format(point.low).replace("%", "")} – ${spec.format(point.high)})`;
      readout.append(element("span", { class: `item ${line.cls}` }, element("b", {}, line.name), ` ${spec.format(point.y)}${range}${point.note ?? ""}`));
    }
    readout.style.minHeight = `${readout.offsetHeight}px`; // it may grow, never shrink: the chart must not jump
    current = x;
    scene.cursor.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x !== null) fill(scene.cursor, { x1: scene.px(x), x2: scene.px(x) }, []);
  }

  function draw() {
    const width = drawing.clientWidth;
    if (!width) return;
    scene = plot(width, series, spec);
    drawing.replaceChildren(scene.svg);
    const nearest = (event) => {
      const box = scene.svg.getBoundingClientRect();
      const target = ((event.clientX - box.left) * width) / box.width;
      return xs.reduce((best, x) => (Math.abs(scene.px(x) - target) < Math.abs(scene.px(best) - target) ? x : best));
    };
    scene.svg.addEventListener("pointermove", (event) => show(nearest(event)));
    scene.svg.addEventListener("pointerdown", (event) => show(nearest(event)));
    scene.svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(null));
    scene.svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const index = current === null ? xs.length - 1 : xs.indexOf(current) + move;
      show(xs[Math.max(0, Math.min(xs.length - 1, index))]);
    });
    show(current);
  }
  draw();
  new ResizeObserver(() => scene?.width !== drawing.clientWidth && draw()).observe(drawing);
}

function plot(width, series, spec) {
  const points = series.flatMap((line) => line.runs.flat().filter((p) => p.y !== null));
  const values = points.flatMap((p) => [p.y, p.low ?? p.y, p.high ?? p.y]);
  let [low, high] = [Math.min(...values, ...(spec.zero ? [0] : [])), Math.max(...values, ...(spec.zero ? [0] : []))];
  if (spec.percent && low < high / 2) low = 0;
  const { ticks, step } = niceTicks(low, high);
  [low, high] = [ticks[0], ticks[ticks.length - 1]];
  const tickText = (v) => minus(spec.percent ? (100 * v).toFixed(decimals(100 * step)) + "%" : v.toFixed(decimals(step)));
  const ends = series.map((line) => {
    const last = line.runs.flat().filter((p) => p.y !== null).at(-1);
    return { line, last, text: line.dots ? `${line.name ? line.name + " " : ""}${spec.format(last.y)}` : line.name };
  });
  const height = 210;
  const frame = { left: 9 + widest(ticks.map(tickText), 400), right: Math.max(22, 12 + widest(ends.map((e) => e.text), 600)), top: 10, bottom: 40 };
  const [firstX, lastX] = [Math.min(...points.map((p) => p.x), ...spec.dividers ?? []), Math.max(...points.map((p) => p.x))];
  const px = (x) => frame.left + (lastX === firstX ? 0.5 : (x - firstX) / (lastX - firstX)) * (width - frame.left - frame.right);
  const py = (y) => frame.top + ((high - y) / (high - low)) * (height - frame.top - frame.bottom);
  const label = `${spec.title}. ` + ends.map((e) => `${e.line.name}: ${spec.format(e.last.y)} at the end`).join("; ") + ". Arrow keys read values.";
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", tabindex: 0, "aria-label": label });

  for (const tick of ticks) {
    const zero = spec.zero && Math.abs(tick) < step / 1e6;
    svg.append(shape("line", { class: zero ? "zero" : "grid", x1: frame.left, x2: width - frame.right, y1: py(tick), y2: py(tick) }));
    svg.append(shape("text", { class: "tick", x: frame.left - 7, y: py(tick) + 4, "text-anchor": "end" }, tickText(tick)));
  }
  const base = height - frame.bottom;
  for (const x of spec.dividers ?? []) svg.append(shape("line", { class: "divider", x1: px(x), x2: px(x), y1: frame.top, y2: base }));
  for (const tick of spec.ticks) svg.append(shape("text", { class: "tick", x: px(tick.x), y: base + 17, "text-anchor": "middle" }, tick.label));
  svg.append(shape("text", { class: "tick axis", x: (frame.left + width - frame.right) / 2, y: base + 34, "text-anchor": "middle" }, spec.xName));

  for (const line of series) {
    for (const run of line.runs.flatMap(unbroken)) {
      if (line.band && run.every((p) => p.low !== null)) {
        const outline = [...run.map((p) => [p.x, p.high]), ...run.toReversed().map((p) => [p.x, p.low])];
        if (run.length === 1) svg.append(shape("line", { class: `line ${line.cls}`, x1: px(run[0].x), x2: px(run[0].x), y1: py(run[0].low), y2: py(run[0].high) }));
        svg.append(shape("path", { class: `band ${line.cls}`, d: path(outline.map(([x, y]) => [px(x), py(y)])) + "Z" }));
      }
      svg.append(shape("path", { class: `line ${line.cls}`, d: path(run.map((p) => [px(p.x), py(p.y)])) }));
      if (line.dots || run.length === 1) for (const p of run) svg.append(shape("circle", { class: line.cls, cx: px(p.x), cy: py(p.y), r: 3.2 }));
    }
  }
  for (const { x, y, text, cls } of spread(ends.map((e) => ({ x: px(e.last.x) + 8, y: py(e.last.y) + 4, text: e.text, cls: e.line.cls })), base)) {
    svg.append(shape("text", { class: `name ${cls}`, x, y }, text));
  }
  const cursor = shape("line", { class: "cursor", y1: frame.top, y2: base, visibility: "hidden" });
  svg.append(cursor);
  return { svg, px, cursor, width };
}

function unbroken(run) {
  const parts = [[]];
  for (const point of run) {
    if (point.y !== null) parts.at(-1).push(point);
    else if (parts.at(-1).length) parts.push([]);
  }
  return parts.filter((part) => part.length);
}

function path(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
}

// Names at line ends, pushed apart so that none covers another.
function spread(names, base) {
  const gap = 14;
  const sorted = names.toSorted((a, b) => a.y - b.y);
  for (let i = 1; i < sorted.length; i++) sorted[i].y = Math.max(sorted[i].y, sorted[i - 1].y + gap);
  const over = Math.max(0, (sorted.at(-1)?.y ?? 0) - (base + 4));
  for (let i = sorted.length - 1, limit = base + 4; over && i >= 0; i--, limit -= gap) sorted[i].y = Math.min(sorted[i].y, limit);
  return sorted;
}
