// The page at `/`: puts what the server sends into its place, and sends what its owner asks for.
// Whatever comes from the server as HTML was escaped there; whatever comes as text stays text.

const $ = (id) => document.getElementById(id);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

// --- Talking to the server -------------------------------------------------------------------

const needsKey = "keys" in document.body.dataset;

/** Asks for the key until there is one. It stays in this tab. */
async function key() {
  while (needsKey && !sessionStorage.getItem("key")) {
    const login = $("login");
    if (!login.open) login.showModal();
    await new Promise((done) => login.addEventListener("close", done, { once: true }));
    sessionStorage.setItem("key", $("key").value.trim());
    $("key").value = "";
  }
  return sessionStorage.getItem("key");
}

/** A request. Throws an error in the server's own words when it is refused. */
async function call(path, { body, ...options } = {}) {
  const bearer = await key();
  const headers = new Headers(bearer ? { authorization: `Bearer ${bearer}` } : {});
  const request = { ...options, headers };
  if (body instanceof FormData) {
    // The browser itself says that it is a form, and where its parts end.
    Object.assign(request, { method: "POST", body });
  } else if (body !== undefined) {
    headers.set("content-type", "application/json");
    Object.assign(request, { method: "POST", body: JSON.stringify(body) });
  }
  const answer = await fetch(path, request);
  if (answer.status === 401 && needsKey) {
    if (sessionStorage.getItem("key") === bearer) sessionStorage.removeItem("key");
    $("login-why").textContent = "That is not one of this server's keys.";
    return call(path, { body, ...options });
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
}

/** What a stream brings. Not every browser lets one loop over it. Whoever stops reading ends it. */
async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) yield piece.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The events of an answer, as `{event, data}`. */
async function* events(answer) {
  let text = "";
  for await (const piece of pieces(answer.body.pipeThrough(new TextDecoderStream()))) {
    text += piece;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.data !== undefined) yield fields;
    }
  }
}

// --- What is live ----------------------------------------------------------------------------

/** Puts a region in its place; what was open, chosen or focused in it stays so. */
function place(name, html) {
  const region = $(name);
  if (!region?.hasAttribute("data-live")) return;
  const open = [...region.querySelectorAll("details[open][id]")].map((details) => details.id);
  const scrolled = [...region.querySelectorAll(".generations, .scroll")].map((list) => [list.scrollTop, list.scrollLeft]);
  const focused = region.contains(document.activeElement) ? document.activeElement : null;
  const inside = focused?.closest("details[id]")?.id;
  const chosen = region.value;
  region.innerHTML = html;
  if (chosen !== undefined && [...region.options].some((option) => option.value === chosen)) region.value = chosen;
  for (const id of open) if ($(id)) $(id).open = true;
  region.querySelectorAll(".generations, .scroll").forEach((list, n) => list.scrollTo(scrolled[n]?.[1] ?? 0, scrolled[n]?.[0] ?? 0));
  if (focused?.id) $(focused.id)?.focus();
  else if (inside) $(inside)?.querySelector("summary").focus();
  tellTimes(region);
}

/** Writes moments as people here would: the time today, the date before. */
function tellTimes(region) {
  for (const time of region.querySelectorAll("time[data-ms]")) {
    const date = new Date(Number(time.dataset.ms));
    const today = date.toDateString() === new Date().toDateString();
    time.dateTime = date.toISOString();
    time.title = date.toLocaleString();
    time.textContent = today ? date.toLocaleTimeString() : date.toLocaleDateString();
  }
}

async function follow() {
  for (;;) {
    try {
      for await (const { event, data } of events(await call("/events"))) {
        $("trouble").hidden = true;
        if (event === "documents") listed(JSON.parse(data));
        else place(event, JSON.parse(data));
      }
      throw new Error("the server ended the connection");
    } catch (error) {
      $("trouble").textContent = `What is below may be old: ${error.message}. Trying again.`;
      $("trouble").hidden = false;
      await wait(1500);
    }
  }
}

// --- Finding documents -----------------------------------------------------------------------

let newest = $("documents").innerHTML;
let searches = 0;

/** The newest documents; while some are looked for, these instead, as they stand now. */
function listed(html) {
  newest = html;
  if ($("says").value.trim()) find();
  else place("documents", html);
}

async function find() {
  const says = $("says").value.trim();
  const search = ++searches;
  if (!says) return place("documents", newest);
  try {
    const html = await (await call(`/found?says=${encodeURIComponent(says)}`)).text();
    // What was asked for since has another answer.
    if (search === searches) place("documents", html);
  } catch (error) {
    if (search === searches) $("documents").textContent = error.message;
  }
}

function watchFinding() {
  $("find").addEventListener("submit", (event) => {
    event.preventDefault();
    find();
  });
  $("talk").addEventListener("click", async ({ target }) => {
    if (!target.dataset.shows) return;
    $("says").value = target.dataset.shows;
    await find();
    $("documents").scrollIntoView({ block: "center" });
  });
  $("says").addEventListener("input", async () => {
    const said = $("says").value;
    await wait(250);
    if (said === $("says").value) find();
  });
}

// --- Teaching --------------------------------------------------------------------------------

function taught(message, failed = false) {
  $("taught").textContent = message;
  $("taught").classList.toggle("failed", failed);
}

/** Submits documents, or files as a form; gives what the server says of each document. */
async function submit(body) {
  const answer = await call("/v1/documents", { body });
  return (await answer.json()).documents;
}

const domain = () => $("domain").value.trim() || "general";

/** Files are read by the server, which knows more forms of them, and cuts what is too long for one document. */
function form(file) {
  const form = new FormData();
  form.set("domain", domain());
  form.set("file", file);
  return form;
}

async function teachFiles(files) {
  const told = [];
  let failed = false;
  for (const file of files) {
    taught(`Reading ${file.name} …`);
    try {
      const documents = await submit(form(file));
      told.push(`${file.name}: ${documents.length === 1 ? "1 document" : `${documents.length} documents`} accepted`);
    } catch (error) {
      failed = true;
      told.push(error.message.includes(file.name) ? error.message : `${file.name}: ${error.message}`);
    }
    taught(`${told.join(". ")}.`, failed);
  }
}

function watchTeaching() {
  const isPair = () => new FormData($("submit")).get("kind") === "pair";
  const show = () => {
    $("pair").hidden = !isPair();
    $("plain").hidden = isPair();
  };
  show();
  $("submit").addEventListener("change", show);
  $("submit").addEventListener("submit", async (event) => {
    event.preventDefault();
    // An answer continues its question, so a space stands between them.
    const document = isPair()
      ? { prompt: $("prompt").value.trim(), completion: ` ${$("completion").value.trim()}`, source: "page" }
      : { text: $("text").value, source: "page" };
    try {
      await submit({ documents: [{ domain: domain(), ...document }] });
      taught("Accepted: it is on disk. See below how it is learned.");
      for (const id of ["prompt", "completion", "text"]) $(id).value = "";
    } catch (error) {
      taught(`Not accepted: ${error.message}`, true);
    }
  });
  $("files").addEventListener("change", async () => {
    await teachFiles($("files").files);
    $("files").value = "";
  });
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0;
  const count = (by) => (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    depth += by;
    $("drop").hidden = depth <= 0;
  };
  addEventListener("dragenter", count(1));
  addEventListener("dragleave", count(-1));
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    depth = 0;
    $("drop").hidden = true;
    teachFiles(event.dataTransfer.files);
  });
}

// --- Asking ----------------------------------------------------------------------------------

let messages = [];
let asking = null;

function turn(role, text) {
  $("talk").querySelector(".empty")?.remove();
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  turn.textContent = text;
  $("talk").append(turn);
  $("talk").scrollTop = $("talk").scrollHeight;
  return turn;
}

/** Who answered: the adapters with their generations and weights, how well the question fitted, and the documents that it is from. */
function by({ adapters, confidence, sources }) {
  const line = document.createElement("span");
  line.className = "by";
  const name = document.createElement("b");
  const each = ({ domain, generation, weight }) =>
    domain + (generation ? `@${generation.slice(0, 8)}` : "") + (weight === 1 ? "" : `:${weight.toFixed(2)}`);
  name.textContent = adapters.length ? adapters.map(each).join(" + ") : "the base";
  line.append("by ", name, typeof confidence === "number" ? `, confidence ${confidence.toFixed(2)}` : "");
  sources.forEach(({ document: id, source, likely }, n) => {
    const link = document.createElement("button");
    link.type = "button";
    link.className = "link";
    link.dataset.shows = id;
    link.textContent = source ?? id.slice(0, 8);
    link.title = `Show the document ${id}`;
    line.append(n ? ", " : ", from ", link, likely < 0.995 ? ` (${(100 * likely).toFixed(0)} %)` : "");
  });
  return line;
}

async function answer(question) {
  messages.push({ role: "user", content: question });
  turn("user", question);
  const place = turn("assistant", "…");
  asking = new AbortController();
  $("send").textContent = "Stop";
  let text = "";
  let provenance = null;
  try {
    const body = { model: $("model").value, messages, stream: true, temperature: Number($("temperature").value) };
    const request = { body, signal: asking.signal };
    for await (const { data } of events(await call("/v1/chat/completions", request))) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      text += chunk.choices[0]?.delta.content ?? "";
      provenance = chunk.engram ?? provenance;
      place.textContent = text.trimStart() || "…";
      $("talk").scrollTop = $("talk").scrollHeight;
    }
    place.textContent = text.trim() || "(it said nothing)";
    if (provenance) place.append(by(provenance));
  } catch (error) {
    place.textContent = text.trim();
    const why = document.createElement("span");
    why.className = "by failed";
    why.textContent = error.name === "AbortError" ? "stopped" : error.message;
    place.append(why);
  }
  // A question without an answer would only confuse the next one.
  if (text) messages.push({ role: "assistant", content: text });
  else messages.pop();
  asking = null;
  $("send").textContent = "Ask";
  $("talk").scrollTop = $("talk").scrollHeight;
}

function watchAsking() {
  $("chat").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (asking) return asking.abort();
    if (!question) return $("question").focus();
    $("question").value = "";
    answer(question);
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!asking) $("chat").requestSubmit();
    }
  });
  $("fresh").addEventListener("click", () => {
    asking?.abort();
    messages = [];
    $("talk").replaceChildren();
    $("question").focus();
  });
}

// --- Rolling back and forgetting -------------------------------------------------------------

const acts = {
  rollback: {
    title: ({ domain }) => `Roll ${domain} back?`,
    what: ({ to }) =>
      `${to ? `Generation ${to.slice(0, 8)} is` : "The base alone is"} served again. Documents learned since are set aside, ` +
      "and are learned again when they are given again.",
    yes: "Roll back",
    run: ({ domain, from, to }) =>
      call(`/v1/adapters/${encodeURIComponent(domain)}/rollback`, { body: { to: to ?? null, expected_generation: from } }),
  },
  forget: {
    title: () => "Forget this document?",
    what: ({ what }) => `“${what}” is taken out, with everything that learned from it. What else was learned there is learned again without it.`,
    yes: "Forget",
    run: ({ id }) => call(`/v1/documents/${encodeURIComponent(id)}`, { method: "DELETE" }),
  },
};

function watchActs() {
  const confirm = $("confirm");
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-act]");
    if (!button) return;
    const data = { ...button.dataset };
    const act = acts[data.act];
    $("h-confirm").textContent = act.title(data);
    $("confirm-what").textContent = act.what(data);
    $("confirm-yes").textContent = act.yes;
    confirm.returnValue = "no";
    confirm.showModal();
    const closed = async () => {
      if (confirm.returnValue !== "yes") return;
      try {
        await act.run(data);
        taught(`${act.title(data).replace("?", "")}: done.`);
        if ($("says").value.trim()) find();
      } catch (error) {
        taught(error.message, true);
        $("taught").scrollIntoView({ block: "center" });
      }
    };
    confirm.addEventListener("close", closed, { once: true });
  });
}

tellTimes(document);
watchFinding();
watchTeaching();
watchAsking();
watchActs();
follow();
