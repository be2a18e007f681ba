"""How a report looks: light and dark, narrow and wide, on paper. Fonts are the reader's own."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root {
  color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1b1c1e; --soft: #5c6066;
  --line: #dedfdc; --faint: #eeeeeb; --accent: #1f5fbf; --good: #0a7145; --bad: #b3261e;
  --band: #1b1c1e14; --shade: #0000001f; --ceiling: #8a5a00; --c0: #2a6fd6; --c1: #d9541a; --c2: #12936a;
  --c3: #7a45c4; --c4: #c23b7e; --c5: #8a6d00; --c6: #0e8ba3; --c7: #6b7075;
}
@media screen and (prefers-color-scheme:dark) {
  :root {
    --page: #131416; --card: #1c1e21; --ink: #ececea; --soft: #a2a6ac; --line: #34373c; --faint: #26292d;
    --accent: #86b4ff; --good: #5fd3a0; --bad: #ff8f86; --band: #ffffff1c; --shade: #00000080;
    --ceiling: #e0b050; --c0: #6ea8ff; --c1: #ff8a55; --c2: #3fcf9d; --c3: #b895ff; --c4: #ff86bd;
    --c5: #d9bc3f; --c6: #4ccbe3; --c7: #a9aeb4;
  }
}
* { box-sizing: border-box }
html { font: 16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere }
header,main { max-width: 78rem; margin: 0 auto; padding: 0 1rem }
header { padding-top: 2rem }
h1,h2,h3 { line-height: 1.2; text-wrap: balance; margin: 0 }
h1 { font-size: clamp(1.6rem,1.1rem + 2.2vw,2.5rem); letter-spacing: -.02em }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin-bottom: .5rem }
h3 { font-size: 1rem }
p { margin: .25rem 0 .75rem; max-width: 46rem }
a { color: var(--accent) }
.kicker { color: var(--soft); font-size: .85rem; margin: 0 0 .3rem }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 1.1rem 0 0 }
.facts dt { color: var(--soft); font-size: .8rem }
.facts dd { margin: 0; font-weight: 600 }
nav { margin: 1.25rem 0 0; border-block: 1px solid var(--line) }
nav ul {
  display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; list-style: none; margin: 0; padding: .5rem 0;
  font-size: .9rem;
}
nav a { text-decoration: none }
nav a:hover { text-decoration: underline }
main>section { padding: 2.2rem 0 .5rem }
.note,.meaning { color: var(--soft); font-size: .9rem }
.note { margin: .6rem 0 }
.unseen {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap;
}
.scroll {
  position: relative; overflow-x: auto;
  background: linear-gradient(to left, var(--card) 1rem,transparent 2.5rem) right/3rem 100% no-repeat
    local, linear-gradient(to left, var(--shade),transparent) right/1.1rem 100% no-repeat scroll,
    var(--card);
  border: 1px solid var(--line); border-radius: 10px;
}
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th,td {
  padding: .5rem .75rem; text-align: right; vertical-align: baseline;
  border-bottom: 1px solid var(--faint); overflow-wrap: normal;
}
th { font-weight: 600 }
thead th { vertical-align: bottom; border-bottom-color: var(--line); line-height: 1.25 }
tbody tr:last-child>* { border-bottom: 0 }
tr>:first-child,.words { text-align: left }
td.words { min-width: 7rem; max-width: 16rem }
table:not(.pictures) tr>:first-child { position: sticky; left: 0; z-index: 1; background: var(--card) }
tbody th { font-weight: 500; min-width: 9.2rem; max-width: 18rem; overflow-wrap: anywhere }
bdi { overflow-wrap: anywhere }
thead bdi {
  display: inline-block; vertical-align: bottom; min-width: 3.2rem; max-width: 12rem; max-height: 3.75em;
  overflow: hidden;
}
.direction { display: block; font-weight: 400; font-size: .75rem; color: var(--soft); white-space: nowrap }
.figure>data { font-weight: 600 }
.range { color: var(--soft); font-size: .8rem; white-space: nowrap }
td .range { display: block }
td.range { font-size: inherit }
.missing { color: var(--soft); font-style: italic; font-size: .85rem }
.ceiling-row>* { border-top: 1px solid var(--line); color: var(--soft) }
.least data { font-weight: 700; text-decoration: underline; text-underline-offset: .2em }
.verdict { white-space: nowrap; color: var(--soft) }
.verdict.good { color: var(--good); font-weight: 600 }
.verdict.bad { color: var(--bad); font-weight: 600 }
td.plot,tfoot td.plot { min-width: 11rem; width: 34%; padding-inline: 1.2rem }
td.plot { vertical-align: middle }
tfoot td { border-bottom: 0; padding-block: 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fill,minmax(min(100%,21rem),1fr)); gap: 1rem }
.card {
  display: grid; grid-template-rows: subgrid; grid-row: span 5; row-gap: 0; margin: 0;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.25rem;
}
.card.split { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: center }
.split svg.scatter { flex: 1 1 20rem; max-width: 34rem }
.split figcaption { flex: 1 1 15rem; max-width: 26rem; font-size: .9rem; color: var(--soft) }
.split .legend { flex-direction: column }
.meaning { margin: .25rem 0 .8rem }
.meaning strong { color: var(--ink); font-weight: 600 }
.rows { list-style: none; margin: 0; padding: 0 }
.row-head {
  display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .75rem; font-size: .9rem;
  padding-top: .35rem; font-variant-numeric: tabular-nums;
}
.lines,.legend {
  display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: .5rem 0 0; font-size: .8rem;
  color: var(--soft); list-style: none; padding: 0;
}
.legend { margin: .25rem 0 .75rem; font-size: .85rem }
svg { display: block; overflow: visible }
svg.strip { width: 100% }
svg.scatter { width: 100%; height: auto }
.scatter text { font-size: 9.5px }
svg.key { display: inline-block; width: .9rem; height: .9rem; margin-right: .35rem; vertical-align: -.1em }
.key-line {
  display: inline-block; width: .95rem; margin-right: .35rem; vertical-align: .28em;
  border-top: 2px dashed var(--ceiling);
}
.key-line.base { border-top: 2px solid var(--soft) }
svg text { fill: var(--soft); font-size: 11px }
.strip text { font-size: .72rem }
svg .axis-label { fill: var(--ink); font-size: 10.5px }
.middle { text-anchor: middle }
.end { text-anchor: end }
.track,svg .grid { stroke: var(--faint) }
svg .axis { stroke: var(--line) }
.rule { stroke-width: 1.5 }
.rule.base { stroke: var(--soft) }
.rule.zero { stroke: var(--soft); stroke-dasharray: 2 2 }
.rule.ceiling { stroke: var(--ceiling); stroke-dasharray: 5 3 }
.band { fill: var(--band) }
.interval { stroke-width: 3; stroke-linecap: round; stroke-opacity: .5 }
.scatter .interval { stroke-width: 2 }
.mark { stroke: var(--card); stroke-width: 1 }
.mark.base { fill: var(--card); stroke: var(--soft); stroke-width: 2 }
.interval.base { stroke: var(--soft) }
.color0 { --c: var(--c0) }
.color1 { --c: var(--c1) }
.color2 { --c: var(--c2) }
.color3 { --c: var(--c3) }
.color4 { --c: var(--c4) }
.color5 { --c: var(--c5) }
.color6 { --c: var(--c6) }
.color7 { --c: var(--c7) }
[class*=color] { stroke: var(--c) }
.mark[class*=color] { fill: var(--c); stroke: var(--card) }
#prompts h3 { margin: 1.1rem 0 .5rem }
img { display: block; height: auto; max-width: 100%; border-radius: 3px; background: var(--faint) }
img.pixels { image-rendering: pixelated }
.photographs {
  position: sticky; top: 0; z-index: 2; display: flex; align-items: center; gap: .75rem; margin: 0 0 1rem;
  padding: .5rem .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 0 0 10px 10px; box-shadow: 0 4px 12px #00000014;
}
.photographs figcaption { font-size: .85rem; font-weight: 600 }
.film { display: flex; gap: .4rem; overflow-x: auto; min-width: 0 }
.film img { flex: none; width: auto; height: clamp(2.75rem,9vw,4.75rem) }
.models {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(min(100%,30rem),1fr)); gap: 1.25rem;
  align-items: start;
}
.model { min-width: 0 }
.model h3,#nearest h3 { margin: .4rem 0 .5rem }
#nearest h3 { margin-top: 1.2rem }
table.pictures th,table.pictures td { padding: .25rem .3rem; vertical-align: middle }
table.pictures thead th {
  text-align: center; font-weight: 400; color: var(--soft); font-size: .8rem; padding-top: .5rem;
}
table.pictures thead th:first-child { text-align: left }
.images { padding: 0 .5rem .5rem .45rem }
table.pictures tbody th {
  font-weight: 400; font-size: .85rem; line-height: 1.3; width: 11rem; min-width: 6.5rem;
  max-width: 11rem;
}
table.pictures tr>* { border-bottom: 0 }
table.pictures td img { width: 100%; min-width: 4.5rem; max-width: 14rem }
table.compare thead th { font-size: .9rem; color: var(--ink); font-weight: 600 }
table.compare td+td { padding-left: .9rem }
.run { display: flex; gap: .25rem }
table.compare .run img { flex: 1 1 0; min-width: 3.75rem; width: 0 }
details { margin-top: 1rem; max-width: 38rem }
summary { cursor: pointer; padding: .35rem 0; color: var(--accent) }
.panels { display: grid; grid-template-columns: repeat(auto-fit,minmax(min(100%,10rem),1fr)); gap: 1rem }
.panel { margin: 0; min-width: 0 }
.panel figcaption {
  display: flex; flex-wrap: wrap; gap: 0 .9rem; font-size: .85rem; color: var(--soft);
  margin-bottom: .5rem; align-content: end;
}
.panel strong { flex-basis: 100%; color: var(--ink) }
.tiles { display: grid; grid-template-columns: repeat(auto-fill,minmax(3.4rem,1fr)); gap: .25rem }
.tiles img { width: 100% }
.pairs {
  display: grid; grid-template-columns: repeat(auto-fill,minmax(min(100%,10.5rem),1fr)); gap: .75rem;
  list-style: none; margin: 0; padding: 0;
}
.pair {
  display: grid; grid-template-columns: 1fr 1fr; gap: .25rem; margin: 0; padding: .5rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; height: 100%;
  align-content: start;
}
.pair img { width: 100% }
.pair figcaption {
  grid-column: 1/-1; display: flex; flex-direction: column; font-size: .8rem; line-height: 1.35;
  color: var(--soft); padding: .15rem .1rem 0; font-variant-numeric: tabular-nums;
}
.pair strong { color: var(--ink); font-size: .95rem }
table.settings th { color: var(--soft); width: 18rem }
table.settings th,table.settings td { padding-block: .3rem }
table.settings td { text-align: left }
.columns {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(min(100%,20rem),1fr)); gap: 1rem 2rem;
  margin-top: 1.25rem;
}
.columns ol { margin: .4rem 0 0; padding-left: 2rem; font-size: .9rem }
code { font-size: .9em }
@media (max-width:40rem) {
  .photographs { flex-direction: column; align-items: flex-start; gap: .3rem }
  .photographs .film { max-width: 100% }
  svg.scatter text { font-size: 13.5px }
  th,td { padding: .45rem .6rem }
  table.settings th { width: auto }
  table.compare tbody th { width: 5rem; min-width: 5rem }
  table.compare td+td { padding-left: .5rem }
  table.compare .run img { min-width: 2.6rem }
}
@media print {
  :root { color-scheme: light; --page: #fff; --ink: #000; --soft: #444; --line: #ccc }
  html { font-size: 11px }
  nav { display: none }
  .scroll { overflow: visible; border: 0; background: none }
  details:not([open]) { display: none }
  .photographs { position: static; box-shadow: none }
  .card,.pair,.panel,tr { break-inside: avoid }
  h2,h3 { break-after: avoid }
  main>section { padding-top: 1.2rem }
  * { print-color-adjust: exact }
}
"""
