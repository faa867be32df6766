"""The style sheet of the report page: light and dark, narrow and wide screens, no outside font."""

STYLE = """
:root { --paper:#fbfbf9; --card:#ffffff; --ink:#1f242c; --soft:#5b6470; --rule:#dfe2e6; --accent:#3563c9;
  --good:#1f7a4d; --bad:#b83a2b; --c0:#3563c9; --c1:#c8562b; --c2:#2a8a5f; --c3:#8a4fbf; --c4:#a07c14;
  --c5:#b8326d; --c6:#3b8ea5; --c7:#6b6b6b }
@media (prefers-color-scheme: dark) {
  :root { --paper:#15181d; --card:#1c2027; --ink:#e6e8eb; --soft:#9aa3af; --rule:#333944; --accent:#7fa4f5;
    --good:#5cc08c; --bad:#ef8474; --c0:#7fa4f5; --c1:#ef8f66; --c2:#5cc08c; --c3:#bd92ea; --c4:#d8b44a;
    --c5:#ec7fae; --c6:#6cc3d9; --c7:#a8a8a8 }
}
* { box-sizing:border-box }
html { color-scheme:light dark; -webkit-text-size-adjust:100% }
body { margin:0 auto; max-width:1280px; padding:20px clamp(12px,3vw,40px) 60px; background:var(--paper);
  color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif }
h1 { font-size:clamp(22px,4vw,30px); line-height:1.2; margin:8px 0 4px; overflow-wrap:anywhere }
h2 { font-size:19px; margin:38px 0 10px; padding-top:14px; border-top:1px solid var(--rule) }
h2.run { font-size:24px; margin-top:60px; padding-top:20px; border-top:3px solid var(--accent);
  overflow-wrap:anywhere }
.whose { color:var(--soft); font-weight:400; overflow-wrap:anywhere }
h2 .whose { margin-left:10px; font-size:15px }
h3 { font-size:15px; margin:18px 0 6px }
p, .note { max-width:75ch; margin:6px 0 }
.note, .sub { color:var(--soft) }
nav { display:flex; flex-wrap:wrap; gap:4px 16px; margin:12px 0 }
nav a { color:var(--accent) }
.facts { display:grid; grid-template-columns:repeat(auto-fill,minmax(165px,1fr)); gap:10px; margin:18px 0 }
.facts div { background:var(--card); border:1px solid var(--rule); border-radius:8px; padding:9px 12px;
  min-width:0 }
.facts b { display:block; font-size:19px; line-height:1.3; overflow-wrap:anywhere;
  font-variant-numeric:tabular-nums }
.facts span { color:var(--soft); font-size:13px }
.wide { overflow-x:auto; margin:10px 0 }
table { border-collapse:collapse; font-size:14px; font-variant-numeric:tabular-nums }
tr.best td { font-weight:600; background:color-mix(in srgb,var(--good) 12%,transparent) }
th, td { padding:4px 12px 4px 0; border-bottom:1px solid var(--rule); text-align:left; vertical-align:top }
th { font-weight:600; color:var(--soft); vertical-align:bottom }
.n { text-align:right; padding-left:8px }
td.n { white-space:nowrap }
td:first-child { overflow-wrap:anywhere; min-width:8em }
.heat { border-collapse:separate; border-spacing:2px; font-size:12px }
.heat th, .heat td { border:0; padding:3px 6px }
.heat td { text-align:center; min-width:30px; border-radius:3px }
.heat tbody th { text-align:right; white-space:nowrap; position:sticky; left:0; background:var(--paper) }
.heat .up { vertical-align:bottom; height:1px; padding:0 3px }
.heat .up span { writing-mode:vertical-rl; transform:rotate(180deg); white-space:nowrap; max-height:18em;
  overflow:hidden }
.hit { background:color-mix(in srgb,var(--good) calc(8% + var(--v)*.5),var(--card)) }
.miss { background:color-mix(in srgb,var(--bad) calc(7% + var(--v)*1.5),var(--card)) }
.legend { display:flex; flex-wrap:wrap; gap:2px 18px; list-style:none; padding:0; margin:6px 0; font-size:14px
  }
.legend li { display:flex; align-items:center; gap:7px; overflow-wrap:anywhere }
.key { width:22px; height:0; border-top:3px solid var(--c); flex:none }
.solid, .dashed { --c:var(--soft) }
.dashed { border-top-style:dashed }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr)); gap:14px }
figure { margin:0; min-width:0 }
figcaption { font-weight:600; font-size:14px; margin-bottom:2px }
svg { width:100%; height:auto; display:block; max-width:560px }
svg text { fill:var(--soft); font-size:11.5px }
.grid { stroke:var(--rule) }
.line { fill:none; stroke:var(--c); stroke-width:2; stroke-linejoin:round }
.dash { stroke-dasharray:5 4; stroke-width:1.6 }
.dot { fill:var(--c) }
.ring { fill:none; stroke:var(--c); stroke-width:2 }
.round { width:12px; height:12px; border:2px solid var(--soft); border-radius:50%; flex:none }
.c0{--c:var(--c0)}
.c1{--c:var(--c1)}
.c2{--c:var(--c2)}
.c3{--c:var(--c3)}
.c4{--c:var(--c4)}
.c5{--c:var(--c5)}
.c6{--c:var(--c6)}
.c7{--c:var(--c7)}
.bars { max-width:720px; font-size:14px }
.bar { display:grid; grid-template-columns:minmax(80px,36%) 1fr auto; gap:10px; align-items:center;
  padding:1px 0 }
.bar .name { overflow:hidden; text-overflow:ellipsis; white-space:nowrap; text-align:right }
.track { background:color-mix(in srgb,var(--rule) 60%,transparent); border-radius:3px; height:12px }
.track i { display:block; height:100%; background:var(--accent); border-radius:3px }
.bar .value { color:var(--soft); font-variant-numeric:tabular-nums; min-width:7ch; text-align:right }
.cards { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,190px),1fr)); gap:14px }
.cards.long { grid-template-columns:repeat(auto-fill,minmax(min(100%,280px),1fr)) }
.sure { color:var(--soft); white-space:nowrap }
.card { background:var(--card); border:1px solid var(--rule); border-radius:8px; overflow:hidden;
  font-size:13px; min-width:0 }
.card img { width:100%; aspect-ratio:1; object-fit:cover; display:block; image-rendering:auto }
.card img.tiny, .strip img.tiny { image-rendering:pixelated }
.card > div { padding:7px 10px 9px; overflow-wrap:anywhere }
.card p { margin:2px 0 }
.card .q { font-weight:600 }
.card .file { font-size:11.5px; color:var(--soft) }
.good { color:var(--good) }
.bad { color:var(--bad) }
.soft { color:var(--soft) }
.choice { display:grid; grid-template-columns:1fr auto; gap:8px; padding:1px 6px; margin:1px -6px;
  border-radius:3px; background:linear-gradient(to right,color-mix(in srgb,var(--accent) 22%,transparent)
  var(--v),transparent var(--v)) }
.strip { display:grid; grid-template-columns:minmax(90px,150px) 1fr; gap:6px 12px; align-items:center;
  margin:4px 0 }
.strip .name { overflow-wrap:anywhere }
.strip .row { display:flex; gap:5px; overflow-x:auto }
.strip img { width:84px; height:84px; object-fit:cover; border-radius:4px; flex:none }
.figure { overflow-x:auto }
.figure img { max-width:none; border-radius:6px; background:#fff }
@media (min-width:900px) {
  .figure img { max-width:100% }
}
.two { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr)); gap:10px 40px;
  align-items:start }
.config { columns:300px auto; column-gap:36px; font-size:13px; margin:8px 0 }
.config div { display:flex; justify-content:space-between; gap:12px; border-bottom:1px solid var(--rule);
  padding:2px 0; break-inside:avoid }
.config dt { color:var(--soft) }
.config dd { margin:0; text-align:right; overflow-wrap:anywhere }
pre { overflow-x:auto; font-size:13px }
@media (max-width:560px) {
  .short { white-space:nowrap }
  table { font-size:12.5px }
  th, td { padding-right:8px }
  .n { padding-left:2px }
}
@media print {
  body { max-width:none }
  .card, tr { break-inside:avoid }
}
"""
