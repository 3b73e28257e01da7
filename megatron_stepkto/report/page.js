
// Draws what the run has; every section that the page lacks is passed over.

const data = JSON.parse(document.getElementById("data").textContent);

function choices(parent, names, chosen, choose) {
  const buttons = names.map(({ key, label }) => {
    const button = element("button", { type: "button", "data-key": key, "aria-pressed": String(key === chosen) }, label);
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      choose(key);
    });
    return button;
  });
  parent.replaceChildren(...buttons);
}

function drawCurves(parent) {
  const methods = Object.entries(data.evaluations);
  const names = new Set(methods.flatMap(([, rows]) => rows.map((row) => row.name)));
  const models = [...names].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));  // methods may have measured others
  for (const metric of data.metrics) {
    const series = methods.map(([name, rows], index) => ({
      name: methods.length > 1 ? name : "",
      cls: `c${index % 6}`,
      dots: true,
      band: index === 0,
      runs: [rows.map((row) => ({
        x: models.indexOf(row.name),
        y: row[metric.key],
        low: row[`${metric.key}_interval`]?.[0] ?? null,
        high: row[`${metric.key}_interval`]?.[1] ?? null,
      }))],
    }));
    chart(parent, {
      title: metric.title, about: metric.about, percent: true, format: percentText, series, xName: "model",
      ticks: models.map((label, x) => ({ x, label })), describe: (x) => models[x],
    });
  }
}

function drawPositions(parent) {
  const models = Object.entries(data.positions);
  const positions = [...new Set(models.flatMap(([, rows]) => rows.map((row) => row.position)))].sort((a, b) => parseInt(a) - parseInt(b) || a.length - b.length);
  chart(parent, {
    title: "Wrong steps by position", about: "share of judged steps that are wrong, over all greedy solutions, right and wrong",
    percent: true, zero: true, format: percentText, xName: "position of the step in its solution",
    series: models.map(([name, rows], index) => ({
      name, cls: models.length > 1 && index === 0 ? "c5" : "c0", dots: true,
      runs: [rows.map((row) => ({ x: positions.indexOf(row.position), y: row.num_wrong / row.num_judged, note: ` (${row.num_wrong.toLocaleString("en")} of ${row.num_judged.toLocaleString("en")})` }))],
    })),
    ticks: positions.map((label, x) => ({ x, label })), describe: (x) => `step ${positions[x]}`,
  });
}

function drawCalibration(parent) {
  chart(parent, {
    title: "Calibration of the votes", about: "share of right answers, by the share of votes for the step of a solution that fewest judges call right",
    percent: true, zero: true, format: percentText, xName: "votes for the weakest step",
    series: [{ name: "", cls: "c0", dots: true, band: true, runs: [data.calibration.map((row, x) => ({ x, y: row.share, low: row.share_interval[0], high: row.share_interval[1], note: ` (${row.num.toLocaleString("en")} solutions)` }))] }],
    ticks: data.calibration.map((row, x) => ({ x, label: row.title })), describe: (x) => data.calibration[x].title,
  });
}

const TRAINING_CHARTS = [
  { title: "Loss", about: "and its outcome and step parts", lines: [["loss", "total", "c0"], ["loss_outcome", "outcome", "c1"], ["loss_step", "steps", "c2"]] },
  { title: "KL to the reference", about: "mean log-ratio over mismatched pairs, nats; z, the reference point of the Step-KTO family, is this clamped at 0", zero: true, lines: [["kl_outcome", "solutions", "c0", "z_outcome"], ["kl_step", "steps", "c2", "z_step"]] },
  { title: "Log-ratio of solutions", about: "nats, against the iteration’s reference; right below zero and falling is a collapse", zero: true, lines: [["log_ratio_right", "right", "right"], ["log_ratio_wrong", "wrong", "wrong"]] },
  { title: "Log-ratio of steps", about: "nats, against the iteration’s reference", zero: true, lines: [["log_ratio_right_steps", "right", "right"], ["log_ratio_wrong_steps", "wrong", "wrong"]] },
  { title: "Gradient norm", about: "before clipping", zero: true, lines: [["grad_norm", "", "c0"]] },
  { title: "Load of the busiest expert", about: "its tokens over the mean of its layer’s experts; 1 is even", lines: [["expert_load", "mean of layers", "c0"], ["expert_load_worst", "worst layer", "c1"]] },
  { title: "Held-out log-ratio of steps", about: "nats, on examples that are not trained on", zero: true, heldOut: true, lines: [["log_ratio_right_steps", "right", "right"], ["log_ratio_wrong_steps", "wrong", "wrong"]] },
  { title: "Held-out margins", about: "mean log-ratio of right minus wrong, nats", zero: true, heldOut: true, lines: [["outcome_margin", "solutions", "c0"], ["step_margin", "steps", "c2"]] },
];

// Iterations stand side by side on one axis: each has its own reference, so lines start anew at every divider.
function timeline(trainings) {
  const starts = [];
  let end = 0;
  for (const training of trainings) {
    starts.push(end);
    end += Math.max(...training.updates.update, ...training.held_out.update, 1);
  }
  const single = trainings.length === 1;
  const middles = starts.map((start, i) => ({ x: (start + (starts[i + 1] ?? end)) / 2, label: trainings[i].label.replace("Iteration ", "M") }));
  const whole = niceTicks(0, end, 4).ticks.filter((x) => x <= end && Number.isInteger(x)).map((x) => ({ x, label: x.toLocaleString("en") }));
  for (const middle of middles) middle.label = `→ ${middle.label}`;
  return {
    starts, dividers: single ? [0] : starts, ticks: single ? whole : middles,
    xName: single ? "update" : `updates, iteration by iteration (${trainings.map((t) => t.num_updates.toLocaleString("en")).join(" + ")})`,
    describe: (x) => {
      const i = starts.findLastIndex((start) => x > start);
      const update = Math.round(x - starts[Math.max(0, i)]);
      return `${trainings[Math.max(0, i)].label}, update ${update.toLocaleString("en")}`;
    },
  };
}

const zText = (z) => (typeof z === "number" ? ` (z ${z === 0 ? "0" : numberText(z)})` : "");

function drawTraining(parent, trainings, charts) {
  const axis = timeline(trainings);
  for (const { title, about, zero, heldOut, lines } of charts) {
    chart(parent, {
      title, about, zero, format: numberText, ...axis,
      series: lines.map(([key, name, cls, z]) => ({
        name, cls,
        runs: trainings.map((training, i) => {
          const columns = heldOut ? training.held_out : training.updates;
          return columns.update.map((update, j) => ({ x: axis.starts[i] + update, y: columns[key][j], note: zText(z && columns[z][j]) }));
        }),
      })),
    });
  }
}

function showTraining(method) {
  const parent = document.getElementById("training-charts");
  const trainings = data.trainings[method] ?? [];
  parent.replaceChildren();
  const total = (key) => trainings.reduce((sum, training) => sum + training.totals[key], 0);
  const sum = (key) => total(key).toLocaleString("en");
  const thinned = trainings.some((training) => training.num_updates > training.updates.update.length);
  const seen = total("num_right") + total("num_wrong")
    ? `Trained on ${sum("num_right")} right and ${sum("num_wrong")} wrong solutions, with ${sum("num_right_steps")} right and ${sum("num_wrong_steps")} wrong steps. `
    : "";
  document.getElementById("training-totals").textContent = seen + (thinned ? "There are more updates than a chart has room for: each point is the mean of several." : "");
  if (trainings.length) drawTraining(parent, trainings, TRAINING_CHARTS);
  if (data.warm_up) drawTraining(parent, [data.warm_up], [{ title: "Warm-up loss", about: "next-token loss of M0’s training, nats per token", zero: true, lines: [["loss", "", "c0"]] }]);
}

if (document.getElementById("curves")) drawCurves(document.getElementById("curves"));
if (document.getElementById("position-chart")) drawPositions(document.getElementById("position-chart"));
if (data.calibration.length) drawCalibration(document.getElementById("calibration-chart"));
if (document.getElementById("training-charts")) {
  const methods = Object.keys(data.trainings);
  if (methods.length > 1) choices(document.getElementById("training-method"), methods.map((key) => ({ key, label: key })), methods[0], showTraining);
  showTraining(methods[0]);
}
if (document.getElementById("list")) startBrowser(data.browser);
