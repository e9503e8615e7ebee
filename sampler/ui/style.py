"""Theme and style sheet: gradio's base theme with system fonts."""

from __future__ import annotations

from gradio.themes import Base

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container{width:100%;max-width:1560px!important;margin:0 auto!important;
overflow:clip!important} /* hidden would keep #actions from sticking */
#head h1{font-size:1.35rem;font-weight:600;margin:0}
#head p{margin:.15rem 0 0;color:var(--body-text-color-subdued);font-size:.9rem}
#form{align-self:flex-start}
#actions{position:sticky;bottom:0;z-index:5;padding:.6rem 0;background:var(--body-background-fill)}
.html-container{padding:0!important}
[id$=problem]:not(:has(p)),[id$=note]:not(:has(p)),[id$=-saved]:not(:has(p)){display:none}
.controls .form{display:grid!important;width:100%;min-width:0!important;border:0;
grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));background:none;gap:.6rem;align-items:end}
.strategy .controls .form{grid-template-columns:repeat(auto-fill,minmax(11rem,1fr))}
.controls .block{min-width:0!important;border:0!important;padding:.2rem 0!important}
.controls label.block{display:flex;flex-direction:column}
.strategy{gap:.6rem!important}
[id$=-save]{align-self:flex-start;width:auto}
.title{margin:0;font-size:1rem;color:var(--body-text-color-subdued)}
.title b{color:var(--body-text-color);font-weight:600;margin-right:.35rem}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:1rem}
.pictures.few{grid-template-columns:repeat(auto-fit,minmax(9rem,1fr))}
.pictures.few figure{max-width:20rem}
.pictures figure{margin:0;min-width:0}
.pictures img,.pictures .frame{display:block;width:100%;aspect-ratio:1;object-fit:contain;
border-radius:.5rem;background:var(--background-fill-secondary)}
.pictures .frame{display:grid;place-items:center;padding:1rem;text-align:center;
font-size:.8rem;border:1px dashed var(--border-color-primary)}
.stale-A #A-results .pictures img,.stale-B #B-results .pictures img{opacity:.4}
.stale-A #A-results:has(.made) .title::after,.stale-B #B-results:has(.made) .title::after{
content:"settings changed since";font-size:.8rem;margin-left:.5rem}
[id$=-drafts] .pictures{grid-template-columns:repeat(auto-fill,minmax(5.5rem,1fr));padding:.2rem}
#report{overflow-x:auto}
#maps .grid-wrap{max-height:none}
.vote img{width:100%;height:100%;object-fit:contain}
#report th,#report td{white-space:nowrap;padding:.3rem .6rem}
.pictures .chosen img{outline:3px solid var(--color-accent);outline-offset:2px}
.pictures video,.pictures audio{display:block;width:100%}
.pictures .at-work img{opacity:.85}
.pictures figcaption{display:flex;flex-direction:column;gap:.1rem;margin-top:.4rem;
font-size:.85rem;line-height:1.35}
.pictures figcaption b{font-weight:600;font-variant-numeric:tabular-nums}
.pictures figcaption span{color:var(--body-text-color-subdued);overflow-wrap:anywhere;
font-size:.8rem}
.nothing{display:grid;place-items:center;min-height:14rem;margin:0;border-radius:.5rem;
border:1px dashed var(--border-color-primary);color:var(--body-text-color-subdued)}
.problem{margin:0;padding:.7rem .9rem;border-radius:.5rem;overflow-wrap:anywhere;
border:1px solid var(--error-border-color);background:var(--error-background-fill);
color:var(--error-text-color)}
.note{margin:0;font-size:.85rem;color:var(--body-text-color-subdued);overflow-wrap:anywhere}
@media(max-width:767px){#results{min-height:100vh}} /* so that scrolling to it shows its top */
.copied textarea{font-family:var(--font-mono)!important;font-size:.8rem!important}
"""


def theme() -> Base:
    """Theme with system fonts only, so that no font is fetched."""
    return Base(
        primary_hue="blue", neutral_hue="slate", radius_size="md", font=FONTS, font_mono=MONO
    )
