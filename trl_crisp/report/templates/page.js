"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const traces = [...document.querySelectorAll(".trace")];
  const rows = [...document.querySelectorAll("#rows tbody tr")];
  const buttons = [...document.querySelectorAll(".filter")];
  const find = byId("filter-text");
  const run = byId("filter-run");
  let kind = "";
  let fitting = traces;
  let current = traces[0];

  const fits = (element) =>
    (!kind || element.dataset.kinds.split("|").includes(kind)) &&
    (!run || !run.value || element.dataset.run === run.value) &&
    (!find || element.dataset.find.toLowerCase().includes(find.value.trim().toLowerCase()));

  const show = (trace) => {
    current = trace;
    traces.forEach((one) => { one.hidden = one !== trace; });
    if (!byId("position")) return;
    const place = fitting.indexOf(trace) + 1;
    byId("position").textContent = `${place} of ${fitting.length}`;
    byId("previous").disabled = place <= 1;
    byId("next").disabled = place >= fitting.length;
    byId("none-shown").hidden = fitting.length > 0;
  };

  const filter = () => {
    fitting = traces.filter(fits);
    rows.forEach((row) => { row.hidden = !fits(row); });
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.kind === kind)));
    show(fitting.includes(current) ? current : fitting[0]);
  };

  const step = (by) => {
    const next = fitting[fitting.indexOf(current) + by];
    if (!next) return;
    show(next);
    history.replaceState(null, "", `#${next.id}`);
  };

  const follow = () => {
    const trace = traces.find((one) => `#${one.id}` === location.hash);
    if (!trace) return;
    if (!fitting.includes(trace)) {
      kind = "";
      if (run) run.value = "";
      if (find) find.value = "";
      filter();
    }
    show(trace);
    trace.scrollIntoView();
    trace.focus({ preventScroll: true });
  };

  buttons.forEach((button) => button.addEventListener("click", () => { kind = button.dataset.kind; filter(); }));
  if (byId("filters")) byId("filters").addEventListener("submit", (event) => event.preventDefault());
  if (find) find.addEventListener("input", filter);
  if (run) run.addEventListener("change", filter);
  if (byId("previous")) {
    byId("previous").addEventListener("click", () => step(-1));
    byId("next").addEventListener("click", () => step(1));
  }
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (!by || isTyping || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    // A focused table scrolls with the arrow keys
    if (event.target.closest && event.target.closest(".scroll")) return;
    event.preventDefault();
    step(by);
  });
  byId("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([byId("report-data").textContent], { type: "application/json" }));
    link.download = "report.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  window.addEventListener("hashchange", follow);
  filter();
  follow();
})();
