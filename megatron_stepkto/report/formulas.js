
// Formulas in the texts of problems and solutions, as MathML (KaTeX parses, the browser draws: no fonts to carry).

// A single dollar sign opens before a non-space and closes behind a non-space, not before a digit: "$5 and $6" is money.
// With a space on both sides it counts where a command stands between: "$ x = \boxed{3} $".
const FORMULA = /\$\$([^]+?)\$\$|\\\[([^]+?)\\\]|\\\(([^]+?)\\\)|\$(?=\S)((?:\\[^]|[^$\\])*?(?:[^\s\\$]|\\[^]))\$(?!\d)|\$ ((?:\\[^]|[^$\\])*?\\[a-z](?:\\[^]|[^$\\])*?) ?\$(?!\d)|(\\begin\{(align|aligned|alignat|equation|gather|gathered|eqnarray|array|cases|[pbvBV]?matrix)(\*?)\}[^]+?\\end\{\7\8\})/g;
const COLUMN_GAPS = /@\{(?:[^{}]|\{[^{}]*\})*\}/g; // of \begin{array}{@{}c@{}}: KaTeX knows no such column
const MAX_FORMULA = 5000; // characters: what is longer stays text

// Nodes for a text: text nodes, and <math> for what KaTeX can read. A formula that it cannot read stays text.
function typeset(text, inline = false) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(FORMULA)) {
    const [whole, dollars, brackets, parens, dollar, spaced, environment] = match;
    const within = parens ?? dollar ?? spaced;
    const drawn = formula(within ?? dollars ?? brackets ?? environment, !inline && within === undefined);
    if (!drawn) continue;
    if (match.index > end) nodes.push(text.slice(end, match.index));
    nodes.push(drawn);
    end = match.index + whole.length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

function formula(source, displayMode) {
  if (source.length > MAX_FORMULA) return null;
  const holder = document.createElement("span");
  try {
    katex.render(source.replace(COLUMN_GAPS, ""), holder, { output: "mathml", displayMode, throwOnError: true, strict: "ignore", trust: false, maxExpand: 100, maxSize: 20, macros: { "\\mbox": "\\text{#1}" } });
  } catch {
    return null;
  }
  const drawn = holder.querySelector("math");
  drawn.querySelector("annotation")?.remove(); // the source once more: it would be found twice by the browser's search
  drawn.setAttribute("title", source);
  return drawn;
}
