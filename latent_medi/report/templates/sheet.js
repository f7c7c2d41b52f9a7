"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const main = document.querySelector("main");
  const pictures = [...document.querySelectorAll("#pictures li")];
  const asks = main.dataset.confidence === "yes";
  const place = "reading-sheet-" + main.dataset.sheet;
  let state = { reader: "", at: 0, answers: {} };
  let since = Date.now();

  try {
    state = Object.assign(state, JSON.parse(localStorage.getItem(place) || "{}"));
  } catch (error) {
    $("kept").textContent = "This browser keeps nothing: download the answers before you close the page.";
  }
  const keep = () => {
    try { localStorage.setItem(place, JSON.stringify(state)); } catch (error) { /* said above */ }
  };
  const name = (i) => pictures[i].dataset.image;
  const answer = (i) => state.answers[name(i)] || {};
  const answered = () => pictures.filter((_, i) => answer(i).answer).length;

  function show(i) {
    state.at = Math.max(0, Math.min(pictures.length - 1, i));
    since = Date.now();
    pictures.forEach((p, k) => { p.hidden = k !== state.at; });
    const now = answer(state.at);
    for (const button of document.querySelectorAll("[data-answer]")) {
      button.setAttribute("aria-pressed", String(button.dataset.answer === now.answer));
    }
    for (const button of document.querySelectorAll("[data-confidence]")) {
      button.setAttribute("aria-pressed", String(button.dataset.confidence === now.confidence));
      button.disabled = !now.answer;
    }
    $("previous").disabled = state.at === 0;
    $("next").disabled = state.at === pictures.length - 1;
    const done = answered();
    $("progress").value = done;
    $("where").textContent = `Picture ${state.at + 1} of ${pictures.length}, ${done} answered`;
    $("done").hidden = done < pictures.length;
    $("open").hidden = done === pictures.length;
    keep();
  }
  function say(word) {
    const old = answer(state.at);
    const seconds = (old.seconds || 0) + (Date.now() - since) / 1000;
    state.answers[name(state.at)] = { answer: word, confidence: old.confidence || "", seconds };
    if (asks) show(state.at); else forward();
  }
  function sure(level) {
    if (!answer(state.at).answer) return;
    state.answers[name(state.at)].confidence = level;
    forward();
  }
  function forward() { show(state.at + 1); }
  function nextOpen() {
    for (let k = 1; k <= pictures.length; k++) {
      const i = (state.at + k) % pictures.length;
      if (!answer(i).answer) { show(i); return; }
    }
  }
  const quoted = (text) => `"${String(text).replace(/"/g, '""')}"`;
  function csv() {
    const rows = pictures.map((_, i) => {
      const a = answer(i);
      return [main.dataset.sheet, quoted(state.reader), name(i), a.answer || "", a.confidence || "",
        a.seconds === undefined ? "" : a.seconds.toFixed(1)].join(",");
    });
    return ["sheet,reader,image,answer,confidence,seconds", ...rows, ""].join("\r\n");
  }
  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = `answers-${main.dataset.sheet}${state.reader ? "-" + state.reader.replace(/[^A-Za-z0-9_-]+/g, "_") : ""}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  for (const button of document.querySelectorAll("[data-answer]")) {
    button.addEventListener("click", () => say(button.dataset.answer));
  }
  for (const button of document.querySelectorAll("[data-confidence]")) {
    button.addEventListener("click", () => sure(button.dataset.confidence));
  }
  $("previous").addEventListener("click", () => show(state.at - 1));
  $("next").addEventListener("click", forward);
  $("open").addEventListener("click", nextOpen);
  $("download").addEventListener("click", download);
  $("reader").value = state.reader;
  $("reader").addEventListener("input", () => { state.reader = $("reader").value.trim(); keep(); });
  document.addEventListener("keydown", (event) => {
    if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    if (key === "r") say("real");
    else if (key === "s") say("synthetic");
    else if (asks && ["1", "2", "3"].includes(key)) sure(key);
    else if (key === "arrowright") forward();
    else if (key === "arrowleft") show(state.at - 1);
    else if (key === "n") nextOpen();
    else return;
    event.preventDefault();
  });
  $("tools").hidden = false;
  show(state.at);
})();
