
// The solution browser: filter and search on the left, one problem on the right, all its solutions behind tabs.

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
  if (isLucky(solution)) return { mark: "✓✗", text: "right answer, wrong step", cls: "lucky" };
  if (solution.outcome === 1) return { mark: "✓", text: "right answer", cls: "right" };
  if (solution.outcome === 0) return { mark: "✗", text: "wrong answer", cls: "wrong" };
  return { mark: "?", text: "undecided", cls: "unjudged" };
}

function startBrowser(browser) {
  const byId = (id) => document.getElementById(id);
  const texts = new Map();
  // One entry per solution; models solve a problem once, an iteration samples it several times.
  const entries = browser.problems.flatMap((problem) => Object.entries(problem.solutions).flatMap(([source, rows]) =>
    rows.map((solution, index) => ({ problem, source, solution, index, name: rows.length > 1 ? `${source} · ${index + 1}` : source }))));
  const state = { source: browser.selected, filter: "all", query: "", shown: PAGE, entry: null };

  function haystack({ problem, solution }) {
    if (!texts.has(solution)) {
      texts.set(solution, [problem.problem_id, problem.problem, problem.answer, solution.answer, ...solution.steps.map(([, text]) => text)].join("\n").toLowerCase());
    }
    return texts.get(solution);
  }

  function matches(filter) {
    const [, , keep] = FILTERS.find(([key]) => key === filter);
    const found = entries.filter((entry) => entry.source === state.source && keep(entry.solution) && haystack(entry).includes(state.query));
    const late = ({ solution }) => (isLucky(solution) ? 0 : 1);
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
    byId("list").replaceChildren(...found.slice(0, state.shown).map(listed));
    byId("more").hidden = found.length <= state.shown;
    // Another model keeps the problem that is open, when it solved that too.
    if (select) open(found.includes(state.entry) ? state.entry : found.find(({ problem }) => problem === state.entry?.problem) ?? found[0] ?? null);
  }

  function listed(entry) {
    const { mark, text, cls } = verdict(entry.solution);
    const button = element("button", { type: "button", "data-problem": entry.problem.problem_id, "aria-current": String(entry === state.entry) },
      element("span", { class: `mark ${cls}`, title: text, role: "img", "aria-label": text }, mark),
      element("span", { class: "excerpt" }, ...typeset(entry.problem.problem ?? entry.problem.problem_id, true)));
    button.entry = entry;
    button.addEventListener("click", () => {
      open(entry);
      if (matchMedia("(max-width: 760px)").matches) byId("detail").scrollIntoView({ block: "start" });
    });
    return element("li", {}, button);
  }

  function open(entry) {
    state.entry = entry;
    for (const button of byId("list").querySelectorAll("button")) button.setAttribute("aria-current", String(button.entry === entry));
    if (entry) byId("detail").replaceChildren(...detail(entry));
    else byId("detail").replaceChildren(element("p", { class: "small" }, "No solution matches."));
  }

  function detail({ problem, solution, ...opened }) {
    const tabs = element("div", { class: "choices tabs", role: "group", "aria-label": "Solutions of the same problem" });
    for (const entry of entries.filter((other) => other.problem === problem)) {
      const { mark, text } = verdict(entry.solution);
      const tab = element("button", { type: "button", "data-source": entry.name, "aria-pressed": String(entry.solution === solution), "aria-label": `${entry.name}: ${text}` }, `${entry.name} ${mark}`);
      tab.addEventListener("click", () => {
        open(entry);
        byId("detail").querySelector(`.tabs [aria-pressed="true"]`).focus({ preventScroll: true });
      });
      tabs.append(tab);
    }
    const { text, cls } = verdict(solution);
    const fact = (name, ...value) => element("div", {}, element("dt", {}, name), element("dd", {}, ...value));
    const answer = (value) => typeset(/^[^$]*\\[a-zA-Z]/.test(value) ? `$${value}$` : value, true); // a bare \frac{1}{2} too
    return [
      element("p", { class: "small" }, `${problem.problem_id} · ${opened.name}`),
      element("p", { class: "problem" }, ...typeset(problem.problem ?? "The text of this problem is not in the run.")),
      tabs,
      element("ol", { class: "steps" }, ...solution.steps.map(stepLine)),
      element("dl", { class: "facts" },
        element("div", { class: `verdict ${cls}` }, element("dt", {}, "verdict"), element("dd", {}, text)),
        fact("answer given", ...answer(solution.answer ?? "none found")),
        fact("gold answer", ...answer(problem.answer ?? "–")),
        ...(solution.truncated ? [fact("ended", "cut at the token limit")] : [])),
    ];
  }

  function stepLine([label, text, rightVotes, votes, logRatio, members]) {
    const [cls, mark, name] = label === 1 ? ["right", "✓", "right step"] : label === 0 ? ["wrong", "✗", "wrong step"] : ["unjudged", "·", "step not judged"];
    const notes = [];
    if (votes) notes.push(element("span", { class: "votes", title: "votes that call the step right" }, `${rightVotes} of ${votes} votes`));
    for (const [name, [opinion, score]] of Object.entries(members ?? {})) {
      const shown = score === null ? "" : ` ${score.toFixed(2)}`;
      notes.push(element("span", { class: "votes", title: "label and score of one judge" }, `${name} ${opinion === 1 ? "✓" : opinion === 0 ? "✗" : "·"}${shown}`));
    }
    if (logRatio != null) {
      const grew = logRatio > 0.05 ? "grew" : logRatio < -0.05 ? "fell" : "stayed";
      const shown = logRatio.toFixed(2).replace(/^-(?=0\.00$)/, "");
      notes.push(element("span", { class: `ratio ${grew}`, title: "log-ratio of the step after training, nats" }, `${logRatio >= 0.005 ? "+" : ""}${minus(shown)}`));
    }
    return element("li", { class: cls },
      element("span", { class: "mark", role: "img", "aria-label": name, title: name }, mark),
      element("span", { class: "text" }, ...(text ? typeset(text) : ["(empty)"])),
      ...(notes.length ? [element("span", { class: "notes" }, ...notes)] : []));
  }

  choices(byId("model"), [...browser.models, ...browser.iterations].map((key) => ({ key, label: key })), state.source, (key) => {
    Object.assign(state, { source: key, shown: PAGE });
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
    open(next.entry);
  });
  drawFilters();
  drawList(true);
}
