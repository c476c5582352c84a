"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

// --- plots -------------------------------------------------------------------------------------
// A string "--name" anywhere in a plot stands for the CSS variable of the current theme.
function themed(value, style) {
  if (typeof value === "string") {
    return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
  }
  if (Array.isArray(value)) {
    return value.length < 100 ? value.map((item) => themed(item, style)) : value;
  }
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
}

function drawn(plot, width) {
  const style = getComputedStyle(document.documentElement);
  const traces = plot.data.map((trace) => {
    const themedTrace = themed(trace, style);
    if (trace.customdata && trace.hovertemplate && trace.hovertemplate.includes("%{text}")) {
      themedTrace.text = trace.customdata.map((trial) => (trial === null ? "" : data.hover[trial]));
    }
    return themedTrace;
  });
  const text = style.getPropertyValue("--text").trim();
  const muted = style.getPropertyValue("--muted").trim();
  const rule = style.getPropertyValue("--rule").trim();
  const own = themed(plot.layout, style);
  const axis = {
    gridcolor: rule, zeroline: false, linecolor: rule, tickfont: { color: muted }, automargin: true,
  };
  const names = (name) => ({
    ...axis, ...own[name], title: { font: { color: muted, size: 13 }, ...(own[name] || {}).title },
  });
  const layout = {
    ...own,
    width: Math.max(width, own.minimum_width || 0),
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: text },
    margin: { l: 48, r: 12, t: 12, b: 44 },
    hovermode: "closest",
    hoverlabel: {
      bgcolor: style.getPropertyValue("--card").trim(), bordercolor: rule, align: "left",
      font: { color: text, size: 13 },
    },
    // A finger scrolls the page; only a mouse zooms by dragging.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    legend: { orientation: "h", yanchor: "bottom", y: 1.01, x: 0, font: { color: muted } },
    xaxis: names("xaxis"),
    yaxis: names("yaxis"),
  };
  delete layout.minimum_width;
  return { traces, layout };
}

function draw(plot) {
  const place = document.getElementById("plot-" + plot.id);
  const width = Math.min(place.parentElement.clientWidth, printing ? SHEET : Infinity);
  const { traces, layout } = drawn(plot, width);
  // On a phone a legend is as many lines as it has entries, which must not eat up the plot.
  const entries = layout.showlegend ? traces.filter((t) => t.showlegend !== false).length : 0;
  const above = width < 500 ? 21 * Math.max(0, entries - 2) : 0;
  place.style.height = (plot.layout.height || 380) + above + "px";
  layout.height = place.clientHeight;
  return Plotly.react(place, traces, layout, { displayModeBar: false, responsive: false });
}

// Plots wait until they are about to be seen, so that the answer is readable at once.
const waiting = new Map(data.plots.map((plot) => ["plot-" + plot.id, plot]));
const seen = new Set();
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((item) => item.isIntersecting)) show(entry.target);
}, { rootMargin: "600px" });

function show(place) {
  watcher.unobserve(place);
  const plot = waiting.get(place.id);
  seen.add(plot);
  draw(plot).then(() => place.setAttribute("data-drawn", ""));
}

function redraw() {
  seen.forEach(draw);
}

// Paper has no scrolling: all plots are drawn, as wide as a sheet shows them.
const SHEET = 680;
let printing = false;
function setPrinting(now) {
  printing = now;
  redraw();
  if (!now) return;
  for (const [id, plot] of waiting) {
    if (!seen.has(plot)) show(document.getElementById(id));
  }
}

async function startPlots() {
  if (!data.plots.length) return;
  const packed = atob(document.getElementById("plotly").textContent);
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  for (const id of waiting.keys()) watcher.observe(document.getElementById(id));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => setPrinting(true));
  addEventListener("afterprint", () => setPrinting(false));
  let timer = 0;
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width || printing) return; // a phone's address bar coming and going
    width = innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 150);
  });
}
startPlots();

// --- the table of all trials -------------------------------------------------------------------
const table = document.getElementById("table");
if (table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  const filter = document.getElementById("filter");
  const status = document.getElementById("status");
  const haystacks = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  // What a reader has set survives the page's own reload while the search runs.
  const key = "tune_app:" + location.pathname;
  const keep = () => {
    const sorted = headers.findIndex((cell) => cell.ariaSort !== "none");
    const state = [filter.value, status.value, sorted, sorted < 0 ? "" : headers[sorted].ariaSort];
    try { sessionStorage.setItem(key, JSON.stringify(state)); } catch { /* not allowed here */ }
  };

  const sort = (column, direction) => {
    const cell = (row) => row.cells[column];
    const compare = headers[column].classList.contains("n")
      ? (a, b) => missing(a) - missing(b) || direction * (value(a) - value(b))
      : (a, b) => direction * cell(a).textContent.localeCompare(cell(b).textContent);
    const value = (row) => Number(cell(row).dataset.v);
    const missing = (row) => cell(row).dataset.v === "inf" ? 1 : 0; // last, whatever the direction
    body.append(...rows.toSorted((a, b) => compare(a, b) || 0));
    headers.forEach((header) => { header.ariaSort = "none"; });
    headers[column].ariaSort = direction > 0 ? "ascending" : "descending";
  };
  const select = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits = words.every((word) => haystacks.get(row).includes(word))
        && (!status.value || row.dataset.kind === status.value);
      row.hidden = !fits;
      shown += fits;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length}`;
  };

  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      sort(column, header.ariaSort === "ascending" ? -1 : 1);
      keep();
    });
  });
  for (const control of [filter, status]) {
    control.addEventListener("input", () => { select(); keep(); });
  }
  try {
    const [text, chosen, column, direction] = JSON.parse(sessionStorage.getItem(key) || "[]");
    if (text || chosen) {
      filter.value = text;
      status.value = chosen;
      select();
    }
    if (column >= 0) sort(column, direction === "ascending" ? 1 : -1);
  } catch { /* nothing kept */ }
}
