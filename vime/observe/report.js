"use strict";
// Search in the samples of a report. Texts reach the page through textContent only.
(() => {
  const HITS = 200;
  const root = document.getElementById("browse");
  if (!root) return;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const rows = read("samples-index");
  const form = root.querySelector("form"), list = root.querySelector("tbody");
  const count = root.querySelector("output"), view = root.querySelector(".view");
  const texts = new Map();

  const unpack = async (rollout) => {
    if (!texts.has(rollout)) {
      const bytes = Uint8Array.from(atob(document.getElementById(`texts-${rollout}`).textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      texts.set(rollout, JSON.parse(await new Response(stream).text()));
    }
    return texts.get(rollout);
  };

  const told = ([role, text]) => {
    const item = document.createElement("li"), tag = document.createElement("span"), block = document.createElement("pre");
    item.className = role === "model" ? "said" : "told";
    tag.className = "tag";
    tag.textContent = role;
    block.textContent = text;
    block.tabIndex = 0;
    block.setAttribute("aria-label", `Turn of ${role}`);
    item.append(tag, block);
    return item;
  };

  const show = async (row) => {
    const [prompt, response, turns = []] = (await unpack(row.rollout))[row.place];
    view.hidden = false;
    view.querySelector("h4").textContent =
      `Rollout ${row.rollout}, sample ${row.index}: reward ${row.reward}, ${row.tokens} tokens, ${row.status}`;
    view.querySelector("code").textContent = row.label;
    const [answer, question] = view.querySelectorAll(":scope > pre");
    answer.textContent = response;
    answer.hidden = turns.length > 0;
    view.querySelector(".turns").replaceChildren(...turns.map(told));
    question.textContent = prompt;
    view.scrollIntoView({ block: "nearest" });
  };

  const line = (row) => {
    const tr = document.createElement("tr");
    for (const name of ["rollout", "index", "reward", "tokens", "status"]) {
      const td = document.createElement("td");
      td.textContent = row[name];
      if (name !== "status") td.className = "num";
      tr.append(td);
    }
    const td = document.createElement("td"), button = document.createElement("button");
    button.type = "button";
    button.textContent = row.start || "(empty)";
    button.addEventListener("click", () => show(row));
    td.append(button);
    tr.append(td);
    return tr;
  };

  let turn = 0;
  const search = async () => {
    const mine = ++turn;
    const wanted = form.elements.text.value.toLowerCase();
    const low = parseFloat(form.elements.low.value), high = parseFloat(form.elements.high.value);
    const status = form.elements.status.value;
    const found = [];
    let looked = 0;
    for (const row of rows) {
      if (row.reward < low || row.reward > high || (status && row.status !== status)) continue;
      looked += 1;
      if (wanted) {
        const whole = (await unpack(row.rollout))[row.place];
        if (mine !== turn) return;
        if (!whole.flat(2).some((text) => text.toLowerCase().includes(wanted))) continue;
      }
      found.push(row);
    }
    if (mine !== turn) return;
    list.replaceChildren(...found.slice(0, HITS).map(line));
    const more = found.length > HITS ? `, the first ${HITS} shown` : "";
    count.textContent = `${found.length} of ${rows.length} samples${more}`;
    root.dataset.found = found.length;
  };

  let waiting = 0;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 150);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  root.hidden = false;
  const asked = new URLSearchParams(location.hash.slice(1)).get("search");
  if (asked) form.elements.text.value = asked;
  search();
})();
