"""How the report page looks."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #faf9f7; --card: #fff; --ink: #1a1a1f; --muted: #67676f; --line: #e3e1dc; --bar: #3d5afe; --soft: #9fb0ff;
  --stuff: #0f8a7e; --alarm: #8c1d18; --alarm-card: #fdf0ee;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121214; --card: #1c1c20; --ink: #ededf1; --muted: #a0a0aa; --line: #303036; --bar: #8aa8ff;
    --soft: #4a5aa0; --stuff: #4cc3b5; --alarm: #ff9d94; --alarm-card: #2d1816;
  }
}
* { box-sizing: border-box; }
body {
  max-width: 1180px; margin: 0 auto; padding: 40px clamp(16px, 3vw, 40px) 64px;
  background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif;
}
h1 { margin: 0 0 4px; font-size: 28px; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 52px 0 4px; font-size: 20px; letter-spacing: -0.01em; }
h3 { margin: 28px 0 10px; font-size: 15px; }
p { margin: 0 0 14px; max-width: 76ch; }
.muted, small, caption { color: var(--muted); }
.facts { margin: 0; color: var(--muted); }
.alarm {
  margin: 20px 0 0; padding: 12px 16px; border-radius: 10px; background: var(--alarm-card); color: var(--alarm);
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin-top: 28px; }
.tile { padding: 16px 18px 18px; border: 1px solid var(--line); border-radius: 12px; background: var(--card); }
.tile b { display: block; font-size: 30px; font-weight: 650; line-height: 1.25; letter-spacing: -0.02em; }
.tile span { color: var(--muted); font-size: 13px; }
.scale { position: relative; height: 6px; margin-top: 12px; border-radius: 3px; background: var(--line); }
.scale i, .scale u { position: absolute; top: 0; bottom: 0; border-radius: 3px; }
.scale i { background: var(--soft); min-width: 2px; }
.scale u { width: 3px; margin-left: -1.5px; top: -3px; bottom: -3px; background: var(--bar); }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px 8px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--muted); font-size: 13px; font-weight: 500; }
td small { display: block; font-size: 12px; }
td.left, th.left { text-align: left; }
.classes { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 0 48px; }
.class {
  display: grid; grid-template-columns: minmax(0, 150px) 1fr 46px; align-items: center; gap: 2px 12px; padding: 6px 0;
}
.class > span { grid-row: span 2; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.class em { color: var(--muted); font-size: 12px; font-style: normal; text-align: right;
  font-variant-numeric: tabular-nums; line-height: 1.2; }
.bar { height: 7px; border-radius: 4px; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: 4px; background: var(--bar); }
.bar.pale i { background: var(--stuff); }
td .bar { display: inline-block; width: 90px; margin-right: 10px; vertical-align: middle; }
.key { display: inline-block; width: 18px; height: 7px; margin: 0 6px 1px 0; border-radius: 4px; }
.key { background: var(--bar); }
.key.pale { margin-left: 16px; background: var(--stuff); }
.chip { display: inline-block; width: 11px; height: 11px; margin-right: 7px; border-radius: 3px; vertical-align: -1px; }
.exhibit { margin: 0 0 26px; }
.exhibit div { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; }
.exhibit img { display: block; max-width: 100%; max-height: 300px; border-radius: 8px; }
.exhibit figcaption { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-top: 8px; font-size: 13px; }
.heads { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; color: var(--muted); font-size: 13px; }
details summary { cursor: pointer; margin: 8px 0 14px; color: var(--muted); }
code { font-size: 12px; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; } .exhibit, .tile { break-inside: avoid; } }
"""
