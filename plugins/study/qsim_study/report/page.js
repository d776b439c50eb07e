"use strict";

const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");

/** The same data with the style sheet's values in place of `var(--name)`. */
function coloured(value, style) {
  if (Array.isArray(value)) return value.map((one) => coloured(one, style));
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, coloured(one, style)]));
  }
  const name = typeof value === "string" && value.match(/^var\((--[a-z0-9-]+)\)$/);
  return name ? style.getPropertyValue(name[1]).trim() : value;
}

const AXIS = {
  gridcolor: "var(--line)",
  linecolor: "var(--line)",
  zerolinecolor: "var(--line)",
  automargin: true,
  title: { standoff: 10, font: { size: 13 } },
};

/** The layout that all charts have in common, under a chart's own. */
function layoutOf(own) {
  const axes = Object.keys(own).filter((key) => /^[xy]axis/.test(key));
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "var(--font)", color: "var(--ink)", size: 13 },
    hoverlabel: { bgcolor: "var(--raised)", bordercolor: "var(--line)", font: { color: "var(--ink)" }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: "var(--soft)", activecolor: "var(--ink)" },
    margin: { l: 48, r: 16, t: 48, b: 48 },
    ...own,
  };
  for (const axis of axes) {
    layout[axis] = { ...AXIS, ...own[axis], title: { ...AXIS.title, ...own[axis].title } };
  }
  return layout;
}

function draw(chart) {
  const key = [...chart.parentElement.querySelectorAll("select")].map((menu) => menu.value).join(",");
  const figure = figures[chart.dataset.chart][key];
  chart.hidden = figure === undefined;
  chart.nextElementSibling.hidden = figure !== undefined;
  if (figure === undefined) return;
  const style = getComputedStyle(document.documentElement);
  const data = figure.data.map((trace) => (trace.type === "heatmap" ? { ...trace, showscale: !narrow.matches } : trace));
  chart.style.height = `${figure.layout.height}px`;
  Plotly.react(chart, coloured(data, style), coloured(layoutOf(figure.layout), style), {
    responsive: true,
    displaylogo: false,
    displayModeBar: narrow.matches ? false : "hover",
    modeBarButtons: [["toImage", "resetScale2d"]],
  });
}

const charts = [...document.querySelectorAll("[data-chart]")];
const drawAll = () => charts.forEach(draw);
for (const chart of charts) {
  chart.parentElement.addEventListener("change", () => draw(chart));
}
dark.addEventListener("change", drawAll);
narrow.addEventListener("change", drawAll);
addEventListener("beforeprint", drawAll);
drawAll();

/** The number or the text by which a cell is sorted; null where it is empty. */
function keyOf(row, column) {
  const cell = row.cells[column];
  if ("value" in cell.dataset) return Number(cell.dataset.value);
  return cell.textContent === "" ? null : cell.textContent;
}

function compared(one, other) {
  if (typeof one === "number" && typeof other === "number") return one - other;
  return String(one).localeCompare(String(other), "en", { numeric: true });
}

/** Sorts the rows by a column, those with equal values in their order, and those without a value last. */
function sort(table, column, descending) {
  const keyed = [...table.tBodies[0].rows].map((row) => [keyOf(row, column), row]);
  const usable = (key) => key !== null && !Number.isNaN(key);
  const known = keyed.filter(([key]) => usable(key));
  known.sort(([one], [other]) => (descending ? compared(other, one) : compared(one, other)));
  const empty = keyed.filter(([key]) => !usable(key));
  table.tBodies[0].append(...[...known, ...empty].map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      headers.forEach((one) => one.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(table, column, descending);
    });
  });
}
