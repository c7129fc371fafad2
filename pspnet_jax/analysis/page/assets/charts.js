"use strict";

// Draws the charts when they come near the screen, in the colors of the light or dark theme.
const CHARTS = [...document.querySelectorAll("[data-chart]")];

// The images to which a point of a chart leads, as parameters of the hash.
const TARGETS = {
  class_scores: (point) => ({ class: point.customdata }),
  class_differences: (point) => ({ class: point.customdata, order: "better" }),
  image_differences: (point) => ({ image: point.customdata }),
  confusion_matrix: ({ pointIndex: [truth, predicted] }) => ({ truth, predicted }),
};

function template() {
  const style = getComputedStyle(document.documentElement);
  const [text, line, surface] = ["--text", "--line", "--surface"].map((name) => style.getPropertyValue(name));
  const axis = { gridcolor: line, zerolinecolor: line, automargin: true, ticks: "", title: { standoff: 8 }, fixedrange: true };
  return {
    layout: {
      font: { color: text, family: style.fontFamily, size: 12 },
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      colorway: ["#3f83c8", "#d9782d", "#3b9b6c", "#8d6cc9"],
      hoverlabel: { bgcolor: surface, bordercolor: line, font: { color: text, family: style.fontFamily } },
      margin: { l: 48, r: 12, t: 12, b: 44 },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
      bargap: 0.25,
      xaxis: axis,
      yaxis: axis,
    },
  };
}

async function draw(element) {
  const name = element.dataset.chart;
  const { data, layout } = REPORT.charts[name];
  await Plotly.newPlot(element, data, { ...layout, template: template() }, { responsive: true, displayModeBar: false });
  element.dataset.drawn = "";
  if (!TARGETS[name]) return;
  element.on("plotly_click", ({ points: [point] }) => {
    location.hash = hashWith(TARGETS[name](point), new URLSearchParams());
    if (!viewer.open) document.getElementById("images").scrollIntoView();
  });
}

const near = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      draw(target);
    }
  },
  { rootMargin: "600px" },
);
CHARTS.forEach((element) => near.observe(element));

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  const drawn = CHARTS.filter((element) => "drawn" in element.dataset);
  drawn.forEach((element) => Plotly.relayout(element, { template: template() }));
});
