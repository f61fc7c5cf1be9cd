for (const root of document.querySelectorAll(".ta-slider:not([data-ready])")) {
  root.dataset.ready = "";
  const one = (name) => root.querySelector(".ta-" + name);
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const [filter, score, range, mark, tick] = ["filter", "score", "range", "mark", "tick"].map(one);
  const rows = [...root.querySelectorAll("tbody tr")];
  let curves, timer;

  const at = (runs, i) => runs[runs.findIndex((end, k) => k % 2 === 1 && i < end) - 1];
  const label = (share, low, high) =>
    low < 0 ? share + " % [no interval]" : share + " % [" + low + ", " + high + "]";
  const threshold = (i) => (curves.thresholds[i] + " " + curves.unit).trim();

  function draw() {
    const i = Number(range.value);
    const shares = curves.groups.map((runs) => runs.map((part) => at(part, i)));
    rows.forEach((row, g) => {
      const [share, low, high] = shares[g];
      row.querySelector("i").style.width = share + "%";
      const whisker = row.querySelector("b").style;
      whisker.left = Math.max(low, 0) + "%";
      whisker.width = (low < 0 ? 0 : high - low) + "%";
      row.querySelector(".ta-share").textContent = label(share, low, high);
    });
    one("value").textContent = threshold(i);
    range.setAttribute("aria-valuetext", threshold(i));
    clearTimeout(timer);
    // A screen reader hears where the slider rests, not every step on the way.
    timer = setTimeout(() => { one("live").textContent = summary(i, shares); }, 250);
  }

  function summary(i, shares) {
    const [positive, ...benign] = data.groups;
    const worst = shares.slice(1).reduce((best, s, g) => (s[0] > shares[best + 1][0] ? g : best), 0);
    const hit = shares[worst + 1][0] > 0
      ? "The harmless group hit hardest is " + benign[worst] + ", " + label(...shares[worst + 1]) + "."
      : "Of every harmless group it refuses 0 %.";
    return "Above " + threshold(i) + ", a shield refuses " + label(...shares[0]) + " of " + positive + ". " + hit;
  }

  function choose() {
    curves = data.curves[filter.selectedIndex][score.selectedIndex];
    const last = curves.thresholds.length - 1;
    const marked = curves.marked;
    range.max = last;
    mark.hidden = tick.hidden = marked === null;
    if (marked !== null) {
      mark.textContent = "Back to the paper's τ = " + threshold(marked);
      tick.textContent = "▲ τ";
      // The thumb's centre travels between half a thumb from either end.
      tick.style.left = "calc(8px + (100% - 16px) * " + marked / last + ")";
    }
    range.value = marked === null ? Math.floor(last / 2) : marked;
    one("shown-filter").textContent = filter.value;
    one("shown-score").textContent = score.value;
    draw();
  }

  filter.addEventListener("change", choose);
  score.addEventListener("change", choose);
  range.addEventListener("input", draw);
  mark.addEventListener("click", () => { range.value = curves.marked; draw(); });
  [filter.selectedIndex, score.selectedIndex] = data.start;
  one("controls").hidden = false;
  choose();
}
