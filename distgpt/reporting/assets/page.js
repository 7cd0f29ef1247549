"use strict";
// Draw the charts of the page with uPlot. Colors come from page.css, so that they follow the scheme of the browser.
const charts = JSON.parse(document.getElementById("data").textContent);
// The share of a run that may be above the top of a chart.
const FIRST_STEPS = 0.02;
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function number(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1e4) return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 }).replace("K", "k");
  if (size !== 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(5)));
}

function axis(options) {
  return {
    stroke: () => color("quiet"), grid: { stroke: () => color("grid"), width: 1 }, ticks: { show: false },
    font: "12px system-ui, sans-serif", ...options,
  };
}

function series(curve) {
  const stroke = () => color(`run-${curve.run % 6}`) + (curve.style === "faint" ? "55" : "");
  const isDots = curve.style === "points" || curve.x.length === 1;
  return {
    label: curve.label, class: curve.style, stroke, spanGaps: true, value: (_, value) => number(value),
    width: curve.style === "line" ? 2 : 1, dash: curve.style === "points" ? [5, 4] : undefined,
    points: { show: isDots, size: 6, fill: stroke },
  };
}

// The nearest place of a series that has a value, since not every curve has one at every step.
function nearest(values, place) {
  for (let distance = 0; distance < values.length; distance++) {
    if (values[place - distance] != null) return place - distance;
    if (values[place + distance] != null) return place + distance;
  }
  return place;
}

// Without a cursor, the legend has the last values.
function showLast(plot) {
  if (plot.cursor.left >= 0) return;
  const end = plot.data[0].length - 1;
  plot.setLegend({ idxs: plot.data.map((values) => nearest(values, end)) }, false);
}

// Until a reader zooms in, the first steps do not stretch a chart: a loss falls from far above the rest.
function rangeOf(plot, low, high) {
  const [steps, ...curves] = plot.data, begin = steps[0], end = steps[steps.length - 1];
  if (low == null || begin === end) return uPlot.rangeNum(low ?? 0, high ?? 1, 0.1, true);
  const [first, last] = plot.series[0].idxs;
  if (first > 0 || last < steps.length - 1) return uPlot.rangeNum(low, high, 0.1, true);
  let top = low;
  for (const curve of curves)
    curve.forEach((value, place) => {
      if (value != null && steps[place] > begin + FIRST_STEPS * (end - begin)) top = Math.max(top, value);
    });
  return uPlot.rangeNum(low, top, 0.1, true);
}

function draw(chart) {
  const card = document.createElement("div");
  card.className = chart.tall ? "chart tall" : "chart";
  const title = card.appendChild(document.createElement("h3"));
  title.append(chart.title, " ");
  const unit = title.appendChild(document.createElement("span"));
  unit.className = "quiet";
  unit.textContent = chart.curves.length ? chart.unit : "nothing is logged yet";
  document.getElementById("charts").append(card);
  if (!chart.curves.length) return null;

  const width = () => card.clientWidth - 24;
  const height = chart.tall ? 320 : 190;
  const plot = new uPlot({
    width: width(), height,
    scales: { x: { time: false }, y: { range: (plot, low, high) => rangeOf(plot, low, high) } },
    axes: [
      axis({ size: 32, values: (_, ticks) => ticks.map((tick) => Number.isInteger(tick) ? number(tick) : "") }),
      axis({ size: 58, values: (_, ticks) => ticks.map(number) }),
    ],
    series: [{ label: "step", value: (_, value) => value == null ? "–" : value.toLocaleString("en") },
      ...chart.curves.map(series)],
    cursor: { sync: { key: "steps" }, dataIdx: (plot, index, place) => nearest(plot.data[index], place), y: false },
    hooks: { ready: [showLast], setCursor: [showLast] },
  }, uPlot.join(chart.curves.map((curve) => [curve.x, curve.y])), card);
  new ResizeObserver(() => plot.setSize({ width: width(), height })).observe(card);
  return plot;
}

const plots = charts.map(draw).filter((plot) => plot);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((plot) => plot.redraw()));
