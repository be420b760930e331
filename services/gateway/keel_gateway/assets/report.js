"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches; // a drag must scroll the page there

  const decades = (chart) => {
    const values = chart.traces.flatMap((trace) => trace.y);
    return Math.log10(values.reduce((a, b) => Math.max(a, b)) / values.reduce((a, b) => Math.min(a, b)));
  };

  const draw = () => {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    charts.forEach((chart, index) => {
      const traces = chart.traces.map(({ colour: number, faint, ...trace }) => ({
        ...trace,
        line: { ...trace.line, color: colour(`--c${number}`), width: trace.stackgroup ? 0.5 : faint ? 1 : 2 },
        marker: { size: 6, color: colour(`--c${number}`) },
        opacity: faint ? 0.45 : 1,
      }));
      const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true };
      Plotly.react(`plot-${index}`, traces, {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: colour("--soft"), size: 12, family: "system-ui, sans-serif" },
        margin: { l: 8, r: 8, t: 10, b: 34 },
        showlegend: false, hovermode: "x unified", dragmode: touch ? false : "zoom",
        hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text"), size: 12 }, align: "left" },
        xaxis: { ...axis, title: { text: "step", standoff: 6 }, rangemode: "tozero", hoverformat: "d", unifiedhovertitle: { text: "step %{x}" }, spikecolor: colour("--soft"), spikethickness: -1 },
        yaxis: {
          ...axis, type: chart.log ? "log" : "linear", title: { text: chart.unit, standoff: 4 },
          tickformat: chart.share ? "~%" : undefined, exponentformat: "power",
          nticks: 7, dtick: chart.log && decades(chart) > 1.3 ? 1 : undefined,
        },
      }, { responsive: true, displayModeBar: false, displaylogo: false });
    });
  };
  draw();
  dark.addEventListener("change", draw);
})();
