"""The page of commands/demo: the report's style, one script, nothing from elsewhere."""

from minilora.report.page_style import STYLE

OWN_STYLE = """
form { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr)); gap:16px 28px }
label { display:block; font-weight:600; margin-bottom:8px }
input, textarea, button { font:inherit; font-weight:400; color:inherit; background:var(--card); max-width:100%;
  border:1px solid var(--soft); border-radius:6px; padding:6px 10px }
#question, textarea { width:100% }
.drop { border:2px dashed var(--rule); border-radius:8px; padding:14px; text-align:center; background:var(--card) }
.drop.over, .drop:focus-within { border-color:var(--accent) }
#shown { display:block; margin:10px auto 0; max-width:100%; height:220px; object-fit:contain }
#samples { display:flex; flex-wrap:wrap; gap:6px; line-height:0 }
#samples button { padding:3px }
#samples img { width:64px; height:64px; object-fit:cover; border-radius:4px }
#runs { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr)); gap:0 32px }
#runs .two { grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr)); gap:6px 28px }
#runs img, [type=range] { margin-top:8px; width:100%; max-width:240px; display:block }
:focus-visible { outline:2px solid var(--accent); outline-offset:2px }
[hidden] { display:none !important }
"""
SCRIPT = """
const at = id => document.getElementById(id), set = Object.assign, texts = ["question", "choices", "classes"]
const make = (tag, known, ...kids) => { const e = set(document.createElement(tag), known); e.append(...kids); return e }
const lines = id => at(id).value.split("\\n").filter(line => line.trim()), say = text => at("note").textContent = text
let runs = [], picture = null, turn = 0
function take(file) {
  if (!file) return say("That is no picture file: drop or paste the picture itself.")
  picture = file
  URL.revokeObjectURL(at("shown").src)
  set(at("shown"), {src: URL.createObjectURL(file), hidden: false, alt: file.name || "the picture"})
  const empty = texts.slice(0, 2).find(id => !at(id).parentNode.hidden && !lines(id).length)
  if (!empty) return ask()
  say("Now ask.")
  at(empty).focus()
}
async function ask() {
  const mine = ++turn
  if (!picture) return say("Choose a picture first.")
  say("Asking ...")
  const errors = await Promise.all(runs.map(async run => {
    const query = new URLSearchParams({run: run.name, attention: 1, base: run.lora ? 1 : 0})
    for (const id of run.takes) for (const text of lines(id)) query.append(id, text)
    const found = await fetch("/api/answer?" + query, {method: "POST", body: picture}).then(reply => reply.json())
      .catch(() => ({error: "No answer: is the server still running, and the picture still there?"}))
    if (mine == turn) show(run, found)
    return found.error
  }))
  if (mine == turn) say(errors.find(error => error) || "Answered.")
}
function show(run, found) {
  if (found.error) return run.place.replaceChildren(make("p", {className: "bad"}, found.error))
  const names = Object.keys(found.attention), parts = [found, found.base].filter(part => part)
  const bar = ([text, p]) => make("div", {className: "bar"}, make("span", {className: "name", title: text}, text),
    make("span", {className: "track"}, make("i", {style: `width:${100 * p}%`})),
    make("span", {className: "value"}, (100 * p).toFixed(1) + " %"))
  const both = make("div", {className: "two"}, ...parts.map((part, i) => make("div", {},
    make("h3", {}, `${i ? "Base (LoRA off)" : run.lora ? "With LoRA" : "The run"}, ${part.milliseconds} ms`),
    make("div", {className: "bars"}, ...part.answers.map(bar)), ...names.slice(0, 1).map(() => make("img", {})))))
  const slider = make("input", {type: "range", max: names.length - 1, value: run.layer ?? names.length - 1})
  const label = make("label", {hidden: !names.length}, " ", slider)
  slider.oninput = () => {
    const name = names[run.layer = slider.value], alt = label.firstChild.data = "Attention: " + name
    slider.setAttribute("aria-valuetext", name)
    both.querySelectorAll("img").forEach((img, i) => set(img, {src: parts[i].attention[name], alt}))
  }
  if (names.length) slider.oninput()
  run.place.replaceChildren(both, label)
}
async function start() {
  runs = await (await fetch("/api/runs")).json()
  for (const id of texts) at(id).parentNode.hidden = !runs.some(run => run.takes.includes(id))
  for (const run of runs) {
    const head = [make("h2", {}, run.name), make("p", {className: "sub"}, run.about), run.place = make("div", {})]
    at("runs").append(make("section", {}, ...head))
    for (const one of run.samples) at("samples").append(make("button", {type: "button", title: one.title,
      onclick: async () => {
        for (const id of texts) if (one[id]) at(id).value = [one[id]].flat().join("\\n")
        take(await (await fetch(one.image)).blob())
      }}, make("img", {src: one.image, alt: "sample: " + one.title})))
  }
}
at("file").onchange = () => at("file").files.length && take(at("file").files[0])
at("ask").onsubmit = event => { event.preventDefault(); ask() }
document.onpaste = event => event.clipboardData.files.length && take(event.clipboardData.files[0])
for (const name of ["dragover", "dragleave", "drop"]) document.addEventListener(name, event => {
  event.preventDefault()
  at("drop").classList.toggle("over", name == "dragover")
  if (name == "drop") take(event.dataTransfer.files[0])
})
start().catch(() => say("The server does not answer."))
"""
PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ask</title><link rel="icon" href="data:,"><style>{STYLE}{OWN_STYLE}</style></head><body>
<h1>Ask about a picture</h1><form id="ask">
<div><label class="drop" id="drop">Drop, paste or choose a picture<br><input type="file" id="file" accept="image/*">
<img id="shown" alt="" hidden></label><div id="samples"></div></div>
<div><label hidden>Question <input id="question" autocomplete="off"></label>
<label hidden>Choices, one per line <textarea id="choices" rows="4"></textarea></label>
<label hidden>Classes, one per line; empty: the run's own <textarea id="classes" rows="4"></textarea></label>
<button>Ask</button> <span id="note" role="status" class="soft"></span>
<p class="note">Base: the same model with LoRA switched off; a trained head stays.</p></div></form>
<div id="runs"></div><script>{SCRIPT}</script></body></html>
"""
