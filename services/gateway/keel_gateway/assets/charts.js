"use strict";
// Draws each figure into the box before it, in the colours of the reader's scheme.
(() => {
  const plots = [...document.querySelectorAll(".plot")].map((box) => ({
    box, figure: JSON.parse(box.nextElementSibling.textContent),
  }));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches; // a drag must scroll the page there
  const css = getComputedStyle(document.documentElement); // live: follows the scheme
  const colour = (name) => css.getPropertyValue(name).trim();

  const axis = () => ({
    gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true,
  });
  const layout = (narrow) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--soft"), size: narrow ? 11 : 12, family: "system-ui, sans-serif" },
    margin: { l: 8, r: 8, t: 10, b: 34 },
    showlegend: false, dragmode: touch ? false : "zoom",
    hoverlabel: {
      bgcolor: colour("--card"), bordercolor: colour("--line"), align: "left",
      font: { color: colour("--text"), size: 12 },
    },
    xaxis: { ...axis(), title: { text: "step", standoff: 6 }, nticks: narrow ? 5 : 8 },
  });

  const decades = (figure) => {
    const values = figure.traces.flatMap((trace) => trace.y);
    return Math.log10(values.reduce((a, b) => Math.max(a, b)) / values.reduce((a, b) => Math.min(a, b)));
  };
  // powers of ten; 1, 2, 5 of each where there are few; plotly's own where there is none
  const logTicks = (figure) => {
    const span = decades(figure);
    return span > 1.3 ? { dtick: 1 } : span > 0.7 ? { dtick: "D2", tickformat: "~g" } : { tickformat: "~g" };
  };
  const lines = (figure, base) => [
    figure.traces.map(({ colour: number, faint, ...trace }) => ({
      ...trace,
      line: { ...trace.line, color: colour(`--c${number}`), width: trace.stackgroup ? 0.5 : faint ? 1 : 2 },
      marker: { size: 6, color: colour(`--c${number}`) },
      opacity: faint ? 0.45 : 1,
    })),
    {
      ...base, hovermode: "x unified",
      xaxis: {
        ...base.xaxis, rangemode: "tozero", hoverformat: "d", unifiedhovertitle: { text: "step %{x}" },
        spikecolor: colour("--soft"), spikethickness: -1,
      },
      yaxis: {
        ...axis(), type: figure.log ? "log" : "linear", title: { text: figure.unit, standoff: 4 },
        tickformat: figure.share ? "~%" : undefined, exponentformat: "power",
        nticks: 7, ...(figure.log ? logTicks(figure) : {}),
      },
    },
  ];
  const heat = (figure, base) => [
    [{
      type: "heatmap", x: figure.x, y: figure.y, z: figure.z, text: figure.y.map(() => figure.steps),
      hovertemplate: "<b>%{z:.2%}</b> of tokens<br>layer %{y}, %{text}<extra></extra>",
      zmin: 0, zmax: figure.most || 1, colorscale: [0, 1, 2, 3].map((place) => [place / 3, colour(`--h${place}`)]),
      colorbar: { thickness: 10, outlinewidth: 0, tickformat: "~%", nticks: 5, xpad: 6 },
    }],
    {
      ...base,
      yaxis: { ...axis(), type: "category", title: { text: "MoE layer", standoff: 4 }, nticks: 14, showgrid: false },
      xaxis: { ...base.xaxis, showgrid: false },
    },
  ];

  const draw = () => {
    for (const { box, figure } of plots) {
      const base = layout(box.clientWidth < 340);
      const [traces, full] = figure.kind === "heat" ? heat(figure, base) : lines(figure, base);
      Plotly.react(box, traces, full, { responsive: true, displayModeBar: false, displaylogo: false });
    }
  };
  draw();
  dark.addEventListener("change", draw);
})();
