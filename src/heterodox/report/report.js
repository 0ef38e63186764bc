"use strict";
// Draws the charts into the page and redraws them when a control, or the reader's colour scheme, changes.
(() => {
  const page = JSON.parse(document.getElementById("page").textContent);
  const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");
  const views = new Map();
  const turns = new Map();

  // One change of a chart at a time, in the order in which they were asked for.
  function inTurn(id, change) {
    const turn = (turns.get(id) ?? Promise.resolve()).then(change);
    turns.set(id, turn);
    return turn;
  }

  // The style sheet is the one place where colours are written.
  function config() {
    const style = getComputedStyle(document.documentElement);
    const css = (name) => style.getPropertyValue(name).trim();
    const font = getComputedStyle(document.body).fontFamily;
    const [ink, muted, line] = ["--ink", "--muted", "--line"].map(css);
    const axis = { domainColor: line, gridColor: line, tickColor: line, labelColor: muted, titleColor: muted };
    return {
      background: "transparent", font,
      view: { stroke: null },
      axis: { ...axis, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400, titlePadding: 10, gridOpacity: 0.7 },
      axisY: { labelLimit: window.innerWidth < 640 ? 140 : 240 },
      legend: { labelColor: muted, titleColor: muted, titleFontWeight: 400, labelFontSize: 12, titleFontSize: 12 },
      text: { color: muted, fontSize: 11 },
      rule: { color: muted },
      rect: { stroke: css("--card"), strokeWidth: 0.4 },
      mark: { color: ink },
      range: {
        category: page.recipes.map((_, index) => css(`--recipe-${index}`)),
        diverging: [css("--negative"), css("--middle"), css("--positive")],
      },
    };
  }

  function draw(id, name, datasets, params = {}, changes = {}, renderer = "svg") {
    const spec = { ...page.charts[name], ...changes, datasets };
    spec.params = (spec.params ?? []).map((p) => (p.name in params ? { ...p, value: params[p.name] } : p));
    const options = { mode: "vega-lite", actions: false, renderer, config: config(), tooltip: { theme: darkScheme.matches ? "dark" : "light" } };
    return inTurn(id, async () => {
      views.get(id)?.finalize();
      views.set(id, await window.vegaEmbed(document.getElementById(id), spec, options));
    });
  }

  function lossState() {
    const form = new FormData(document.querySelector("#curves form"));
    return { cost: form.get("cost"), scale: form.has("log") ? "log" : "linear", shown: form.getAll("shown"), zoom: form.has("zoom") };
  }

  function drawLoss() {
    if (!document.getElementById("chart-loss")) return;
    const { cost, scale, shown, zoom } = lossState();
    const { means, seeds, ends, references } = page.data;
    const drawn = [draw("chart-loss", `loss/${cost}/${scale}`, { means, seeds, ends, references }, { shown, zoom })];
    if (document.getElementById("chart-gap")) drawn.push(draw("chart-gap", `gap/${cost}/${scale}`, { gaps: page.data.gaps }, { shown }));
    return Promise.all(drawn);
  }

  function drawAlignment() {
    if (!document.getElementById("chart-alignment")) return;
    const form = new FormData(document.querySelector("#alignment form"));
    const found = page.alignment[form.get("recipe")];
    const measure = form.get("measure");
    const starts = new Set(found.starts);
    const cells = found.parameters.flatMap((parameter, row) =>
      found.steps.map((step, column) => ({
        parameter, row, step, value: found[measure][row][column], first: column === 0 && starts.has(parameter),
      })));
    return draw("chart-alignment", `alignment/${measure}`, { cells }, {}, { height: 15 * found.parameters.length }, "canvas");
  }

  function drawMonitor() {
    if (!document.getElementById("chart-monitor")) return;
    const { rows } = page.monitored[new FormData(document.querySelector("#monitor form")).get("index")];
    return draw("chart-monitor", "monitor", { monitor: rows });
  }

  function drawMasks() {
    if (!document.getElementById("chart-density")) return;
    const form = new FormData(document.querySelector("#masks form"));
    const found = page.masks[form.get("recipe")];
    const cells = found.layers.flatMap((layer, row) =>
      found.steps.map((step, column) => ({ layer, row, step, density: found.density[row][column] })));
    const { courses, decisions, zero } = page.data;
    const drawn = [
      draw("chart-density", "masks/layers", { cells }, {}, { height: 15 * found.layers.length }, "canvas"),
      draw("chart-course", `masks/${form.get("measure")}`, { courses }),
    ];
    if (document.getElementById("chart-decisions")) drawn.push(draw("chart-decisions", "masks/decisions", { decisions, zero }));
    return Promise.all(drawn);
  }

  function drawFinal() {
    if (!document.getElementById("chart-final")) return;
    const { finals, singles, references } = page.data;
    return draw("chart-final", "final", { finals, singles, references });
  }

  function drawPareto() {
    if (!document.getElementById("chart-pareto")) return;
    const cost = new FormData(document.getElementById("pareto")).get("cost");
    return draw("chart-pareto", `pareto/${cost}`, { pareto: page.data.pareto });
  }

  function drawRaters() {
    const { aucs, scores } = page.data;
    return Promise.all([
      document.getElementById("chart-auc") && draw("chart-auc", "rater/auc", { aucs }),
      document.getElementById("chart-scores") && draw("chart-scores", "rater/scores", { scores }),
    ]);
  }

  async function drawAll() {
    await Promise.all([drawFinal(), drawPareto(), drawLoss(), drawAlignment(), drawMonitor(), drawMasks(), drawRaters()]);
    document.documentElement.dataset.ready = "true";
  }

  // Which recipes and how much of the loss axis: signals of the view that is there. Anything else is another chart.
  document.querySelector("#curves form")?.addEventListener("change", (event) => {
    const name = event.target.name;
    if (name !== "shown" && name !== "zoom") return drawLoss();
    const value = lossState()[name];
    const charts = name === "shown" ? ["chart-loss", "chart-gap"] : ["chart-loss"];
    return Promise.all(charts.filter((id) => views.has(id)).map((id) =>
      inTurn(id, () => views.get(id).view.signal(name, value).runAsync())));
  });
  document.getElementById("pareto")?.addEventListener("change", drawPareto);
  document.querySelector("#alignment form")?.addEventListener("change", drawAlignment);
  document.querySelector("#monitor form")?.addEventListener("change", drawMonitor);
  document.querySelector("#masks form")?.addEventListener("change", drawMasks);
  document.querySelectorAll("form").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
  darkScheme.addEventListener("change", drawAll);
  drawAll();
})();
