"use strict";
{
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const charts = [...document.querySelectorAll(".chart")];
  const drawn = new Map();

  // Colours and fonts live in the style sheet only; what a chart needs of them is read from there.
  const look = () => {
    const style = getComputedStyle(document.body);
    const value = (name) => style.getPropertyValue(name).trim();
    const [ink, muted, line, paper, panel] = ["--ink", "--muted", "--line", "--paper", "--panel"].map(value);
    const series = ["--series-1", "--series-2", "--series-3"].map(value);
    const text = {
      labelColor: muted, labelFontSize: 12, titleColor: ink, titleFontSize: 12, titleFontWeight: 500,
    };
    return {
      background: "transparent",
      font: style.fontFamily,
      padding: { left: 0, top: 4, right: 8, bottom: 6 },
      view: { stroke: null },
      axis: {
        ...text, domainColor: line, gridColor: line, tickColor: line, ticks: false,
        labelPadding: 6, labelLimit: 270, titlePadding: 10,
      },
      axisY: { titlePadding: 12 },
      legend: { ...text, symbolType: "square", symbolSize: 110, columnPadding: 18 },
      range: { category: series, heatmap: [panel, series[0]] },
      mark: { color: series[0] },
      rule: { color: series[0] },
      bar: { cornerRadius: 1 },
      line: { strokeWidth: 2 },
      style: {
        reference: { color: ink, stroke: paper, strokeWidth: 1, opacity: 1 },
        whisker: { color: ink, strokeWidth: 1.5, opacity: 0.85 },
        label: { color: ink, fontSize: 12, fontWeight: 600 },
        ring: { color: ink, filled: false, strokeWidth: 1.5, opacity: 1 },
      },
    };
  };

  const draw = async (chart) => {
    const spec = JSON.parse(chart.nextElementSibling.textContent);
    const result = await vegaEmbed(chart, spec, {
      renderer: "svg",
      actions: false,
      ast: true, // expressions are interpreted, so that the page needs no right to evaluate text
      config: look(),
      tooltip: { theme: dark.matches ? "dark" : "light" },
    });
    drawn.get(chart)?.finalize();
    drawn.set(chart, result);
  };

  const report = (message) => {
    const errors = document.getElementById("errors");
    const item = document.createElement("li");
    item.textContent = message;
    errors.querySelector("ul").append(item);
    errors.hidden = false;
  };

  const drawAll = async () => {
    const results = await Promise.allSettled(charts.map(draw));
    results.forEach((result, i) => {
      if (result.status === "rejected") report(`${charts[i].dataset.name} ${result.reason}`);
    });
    const complete = results.every((result) => result.status === "fulfilled");
    document.documentElement.dataset.ready = complete ? "1" : "0";
  };

  dark.addEventListener("change", drawAll);
  drawAll();
}
