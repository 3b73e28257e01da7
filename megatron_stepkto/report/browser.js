
// The solution browser: filter and search on the left, one problem on the right, its solutions model by model.

const PAGE = 100; // list entries drawn at once
const isLucky = (solution) => solution.outcome === 1 && solution.steps.some(([label]) => label === 0);

const FILTERS = [
  ["all", "All", () => true],
  ["lucky", "Wrong step in a right answer", isLucky],
  ["right", "Right", (solution) => solution.outcome === 1],
  ["wrong", "Wrong", (solution) => solution.outcome === 0],
  ["undecided", "Undecided", (solution) => solution.outcome === null],
  ["truncated", "Cut at the limit", (solution) => solution.truncated],
];

function verdict(solution) {
  if (!solution) return { mark: "", text: "no solution", cls: "unjudged" };
  if (isLucky(solution)) return { mark: "✓✗", text: "right answer, wrong step", cls: "lucky" };
  if (solution.outcome === 1) return { mark: "✓", text: "right answer", cls: "right" };
  if (solution.outcome === 0) return { mark: "✗", text: "wrong answer", cls: "wrong" };
  return { mark: "?", text: "undecided", cls: "unjudged" };
}

function startBrowser(browser) {
  const byId = (id) => document.getElementById(id);
  const texts = new Map();
  const state = { model: browser.selected, filter: "all", query: "", shown: PAGE, problem: null, open: null };

  function haystack(problem, solution) {
    if (!texts.has(solution)) {
      texts.set(solution, [problem.problem_id, problem.problem, problem.answer, solution.answer, ...solution.steps.map(([, text]) => text)].join("\n").toLowerCase());
    }
    return texts.get(solution);
  }

  function matches(filter) {
    const [, , keep] = FILTERS.find(([key]) => key === filter);
    const found = browser.problems.filter((problem) => {
      const solution = problem.solutions[state.model];
      return solution && keep(solution) && haystack(problem, solution).includes(state.query);
    });
    const late = (problem) => (isLucky(problem.solutions[state.model]) ? 0 : 1);
    return found.sort((a, b) => late(a) - late(b)); // right over a wrong step comes first
  }

  function drawFilters() {
    const names = FILTERS.map(([key, label]) => ({ key, label, count: matches(key).length }));
    const used = names.filter(({ key, count }) => count || ["all", "lucky", "right", "wrong", state.filter].includes(key));
    choices(byId("filter"), used.map(({ key, label, count }) => ({ key, label: `${label} ${count.toLocaleString("en")}` })), state.filter, (key) => {
      Object.assign(state, { filter: key, shown: PAGE });
      drawList(true);
    });
  }

  function drawList(select) {
    const found = matches(state.filter);
    byId("found").textContent = found.length === 1 ? "1 solution" : `${found.length.toLocaleString("en")} solutions`;
    byId("list").replaceChildren(...found.slice(0, state.shown).map(entry));
    byId("more").hidden = found.length <= state.shown;
    if (select && !found.includes(state.problem)) open(found[0] ?? null, state.model);
    else if (select) open(state.problem, state.model);
  }

  function entry(problem) {
    const { mark, text, cls } = verdict(problem.solutions[state.model]);
    const button = element("button", { type: "button", "data-problem": problem.problem_id, "aria-current": String(problem === state.problem) },
      element("span", { class: `mark ${cls}`, title: text, role: "img", "aria-label": text }, mark),
      element("span", { class: "excerpt" }, problem.problem ?? problem.problem_id));
    button.addEventListener("click", () => {
      open(problem, state.model);
      if (matchMedia("(max-width: 760px)").matches) byId("detail").scrollIntoView({ block: "start" });
    });
    return element("li", {}, button);
  }

  function open(problem, model) {
    Object.assign(state, { problem, open: model });
    for (const button of byId("list").querySelectorAll("button")) {
      button.setAttribute("aria-current", String(button.dataset.problem === problem?.problem_id));
    }
    if (problem) byId("detail").replaceChildren(...detail(problem, model));
    else byId("detail").replaceChildren(element("p", { class: "small" }, "No solution matches."));
  }

  function detail(problem, model) {
    const tabs = element("div", { class: "choices tabs", role: "group", "aria-label": "The same problem, solved by" });
    for (const name of browser.models) {
      const { mark, text } = verdict(problem.solutions[name]);
      const tab = element("button", { type: "button", "data-model": name, "aria-pressed": String(name === model), "aria-label": `${name}: ${text}` }, `${name} ${mark}`);
      tab.addEventListener("click", () => {
        open(problem, name);
        byId("detail").querySelector(`.tabs [aria-pressed="true"]`).focus({ preventScroll: true });
      });
      tabs.append(tab);
    }
    const solution = problem.solutions[model];
    const parts = [
      element("p", { class: "small" }, problem.problem_id),
      element("p", { class: "problem" }, problem.problem ?? "The text of this problem is not in the run."),
      tabs,
    ];
    if (!solution) return [...parts, element("p", { class: "small" }, `${model} has no solution of this problem.`)];
    const { text, cls } = verdict(solution);
    const fact = (name, value) => element("div", {}, element("dt", {}, name), element("dd", {}, value));
    return [
      ...parts,
      element("ol", { class: "steps" }, ...solution.steps.map(stepLine)),
      element("dl", { class: "facts" },
        element("div", { class: `verdict ${cls}` }, element("dt", {}, "verdict"), element("dd", {}, text)),
        fact("answer given", solution.answer ?? "none found"),
        fact("gold answer", problem.answer ?? "–"),
        ...(solution.truncated ? [fact("ended", "cut at the token limit")] : [])),
    ];
  }

  function stepLine([label, text]) {
    const [cls, mark, name] = label === 1 ? ["right", "✓", "right step"] : label === 0 ? ["wrong", "✗", "wrong step"] : ["unjudged", "·", "step not judged"];
    return element("li", { class: cls }, element("span", { class: "mark", role: "img", "aria-label": name, title: name }, mark), element("span", { class: "text" }, text || "(empty)"));
  }

  choices(byId("model"), browser.models.map((key) => ({ key, label: key })), state.model, (key) => {
    Object.assign(state, { model: key, shown: PAGE });
    drawFilters();
    drawList(true);
  });
  byId("search").addEventListener("input", (event) => {
    Object.assign(state, { query: event.target.value.trim().toLowerCase(), shown: PAGE });
    drawFilters();
    drawList(true);
  });
  byId("more").addEventListener("click", () => {
    state.shown += PAGE;
    drawList(false);
  });
  byId("list").addEventListener("keydown", (event) => {
    const move = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    const next = move && document.activeElement.closest("li")?.[move]?.querySelector("button");
    if (!next) return;
    event.preventDefault();
    next.focus();
    open(browser.problems.find((problem) => problem.problem_id === next.dataset.problem), state.model);
  });
  drawFilters();
  drawList(true);
}
