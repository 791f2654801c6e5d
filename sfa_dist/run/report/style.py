"""How report.html looks: from 320 pixels of width on, in the light, in the dark and in print."""

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1b1f24; --muted: #57606a; --line: #d0d7de; --box: #f6f8fa;
--link: #0550ae; --good: #116329; --bad: #a40e26; --cell: 9, 105, 218;
--s0: #0550ae; --s1: #b35900; --s2: #116329; --s3: #a0246b; --s4: #6639ba; --s5: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ground: #0d1117; --text: #e6edf3; --muted: #9aa4af; --line: #3d444d;
--box: #161b22; --link: #79c0ff; --good: #56d364; --bad: #ff7b72; --cell: 56, 139, 253;
--s0: #79c0ff; --s1: #ffa657; --s2: #56d364; --s3: #ff9bce; --s4: #d2a8ff; --s5: #b1bac4; } }
* { box-sizing: border-box; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 74rem; margin: 0 auto; padding: 1rem; background: var(--ground);
color: var(--text); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, ul { max-width: 46rem; } .headline { font-size: 1.15rem; margin: .3rem 0 1rem; }
a { color: var(--link); } :focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0; margin: 0; max-width: none; }
nav a { display: inline-block; padding: .15rem 0; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; white-space: nowrap; }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; font-variant-numeric: tabular-nums;
max-width: 32rem; }
:is(td, th):last-child { padding-right: 0; }
thead th { border-bottom: 1px solid var(--line); color: var(--muted); font-weight: 600; }
tbody th { font-weight: 500; } tbody tr + tr > * { border-top: 1px solid var(--line); }
td, tbody th, .whole { white-space: nowrap; } .wide { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
.plots, .clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem;
margin: .6rem 0; } figure { margin: 0; min-width: 0; } figcaption { font-size: .9rem; font-weight: 600; }
.plots svg { display: block; width: 100%; max-width: 30rem; height: auto; } .plots text { font: 12.5px system-ui,
sans-serif; fill: var(--text); } .grid { stroke: var(--line); fill: none; } .line { fill: none; stroke-width: 2;
stroke-linejoin: round; } .dots { fill: none; stroke-width: 6; stroke-linecap: round; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); } .s3 { stroke: var(--s3); }
.s4 { stroke: var(--s4); } .s5 { stroke: var(--s5); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1rem; padding: 0; margin: 0; font-size: .85rem; }
.plots .legend svg, .legend svg { display: inline-block; width: 26px; height: 10px; margin-right: .4rem; }
.matrix td, .matrix td:last-child { text-align: right; min-width: 2.6rem; padding: .3rem .5rem; }
.matrix tbody th { white-space: nowrap;
padding-right: .8rem; position: sticky; left: 0; background: var(--ground); }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: .4rem .5rem;
white-space: nowrap; vertical-align: bottom; border: 0; } .matrix thead td { border: 0; }
.clips img { display: block; width: 100%; height: auto; max-width: 30rem; background: var(--box); }
.clips figcaption { font-weight: 400; } .right b { color: var(--good); } .wrong b { color: var(--bad); }
.key { color: var(--muted); font-size: .85rem; }
summary { cursor: pointer; padding: .3rem 0; color: var(--link); }
pre { background: var(--box); padding: .8rem; overflow-x: auto; font-size: .82rem; overflow-wrap: normal; }
.copied { user-select: all; margin: .3rem 0 0; }
@media print { :root { color-scheme: light; --ground: #fff; --text: #000; --muted: #444; --line: #bbb; --box: #fff;
--link: #000; --s0: #0550ae; --s1: #b35900; --s2: #116329; --s3: #a0246b; --s4: #6639ba; --s5: #57606a; }
body { font-size: 10pt; max-width: none; padding: 0; } nav, .skip { display: none; } .scroll { overflow: visible; }
figure, tr { break-inside: avoid; } h2, h3, caption { break-after: avoid; } pre { white-space: pre-wrap; }
.plots { grid-template-columns: 1fr 1fr; } details::details-content { content-visibility: visible; block-size: auto; }
.matrix td { print-color-adjust: exact; } }
"""
