"""Write README.md and its pictures from nbs/index.ipynb: `python tools/readme.py [--check]`

With --check, only say whether they are in step."""
# Renders the outputs that are stored and executes nothing, so that the same notebook gives the same bytes everywhere.
import argparse,posixpath,re,sys
from base64 import b64decode
from html import unescape
from pathlib import Path

from nbdev.process import NBProcessor
from nbdev.processors import populate_language,strip_ansi,hide_line,hide_,rm_export

root = Path(__file__).resolve().parent.parent
prefix = 'index_'   # pictures in nbs/images/ that begin so are ours: written here, and deleted once nothing makes them
mimes = {'image/png':'png', 'image/jpeg':'jpg', 'image/svg+xml':'svg'}

# Markdown

def relink(md):
    "Links as they are written in nbs/, seen from the folder above"
    def fix(m):
        pre,url,post = m.groups()
        return m[0] if re.match(r'[a-z][a-z+.-]*:|[/#]', url, re.I) else pre+posixpath.normpath('nbs/'+url)+post
    parts = re.split(r'(^```.*?^```|`[^`\n]+`)', md, flags=re.M|re.S)   # code, at the odd places, has no links
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r'(\]\()([^)\s]+)(.*?\))', fix, parts[i])
        parts[i] = re.sub(r'(^\[[^\]]+\]:\s*)(\S+)()', fix, parts[i], flags=re.M)
        parts[i] = re.sub(r'(<(?:img|a)\b[^>]*?\b(?:src|href)=")([^"]+)(")', fix, parts[i])
    return ''.join(parts)

def caption(md):
    "The heading or first sentence of `md`, without its markup"
    para = md.strip().split('\n\n')[0]
    if para.startswith('#'): para = para.split('\n')[0]
    para = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', para)                # a link's text
    para = ' '.join(re.sub(r'^[#>*+\s-]+|[`*<>|\[\]]', '', para).split())
    return re.split(r'(?<=[.!?:])\s', para)[0].rstrip('.:')

def fence(text, lang=''):
    ticks = '`'*max(3, *(len(o)+1 for o in re.findall('`{3,}', text)), 0)
    return f'{ticks}{lang}\n{text.strip(chr(10))}\n{ticks}'

def pipe_table(html):
    "A plain HTML table as a pipe table; None where it is more than that"
    rows = re.findall(r'<tr\b[^>]*>(.*?)</tr>', html, re.S)
    rows = [[unescape(re.sub(r'<[^>]+>', '', o)).strip().replace('|', r'\|').replace('\n', ' ')
             for o in re.findall(r'<t[hd]\b[^>]*>(.*?)</t[hd]>', r, re.S)] for r in rows]
    around = re.sub(r'<table.*</table>|<p>\d+ rows × \d+ columns</p>|</?div[^>]*>|\s+', '', html, flags=re.S)
    if around or html.count('<table')!=1 or re.search(r'(row|col)span|<img|<a ', html): return
    if len({len(o) for o in rows})!=1: return
    num = [all(re.fullmatch(r'nan|[\d.,:%+e-]*', r[i]) for r in rows[1:]) for i in range(len(rows[0]))]
    def line(r): return '| '+' | '.join(r)+' |'
    return '\n'.join([line(rows[0]), line(['---:' if o else '---' for o in num]), *map(line, rows[1:])])

def html_md(html):
    html = re.sub(r'<style.*?</style>\s*', '', html, flags=re.S).strip()
    return pipe_table(html) or html

# Outputs

def output_md(o, name, alt, imgs):
    "One stored output as markdown; a picture goes into `imgs` under `name`"
    def text(x): return ''.join(x)
    if o.output_type=='error': sys.exit('nbs/index.ipynb stores an error: run tools/run_nbs.py nbs/index.ipynb')
    if o.output_type=='stream': return fence(text(o.text)) if text(o.text).strip() else ''
    data = o.data
    for mime,ext in mimes.items():
        if mime not in data: continue
        raw = text(data[mime])
        imgs[f'{name}.{ext}'] = raw.encode() if ext=='svg' else b64decode(raw)
        return f'![{alt}](nbs/images/{name}.{ext})'
    # before markdown: fastai's tables say it with HTML in a code block
    if 'text/html'     in data: return html_md(text(data['text/html']))
    if 'text/markdown' in data: return relink(text(data['text/markdown']))
    return fence(text(data.get('text/plain', ''))) if 'text/plain' in data else ''

def render():
    "README's text, and its pictures as a dict from file name to bytes"
    procs = [populate_language, strip_ansi, hide_line, hide_, rm_export]
    p = NBProcessor(root/'nbs/index.ipynb', procs=procs, rm_directives=True)
    p.process()
    blocks,imgs,above = ['<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook -->'],{},''
    for c in p.nb.cells:
        if c.cell_type=='markdown':
            above = caption(c.source) or above
            blocks.append(relink(c.source.strip()))
        if c.cell_type!='code': continue
        d = c.directives_
        if d.get('echo')!='false' and c.source.strip():
            blocks.append(fence(c.source, c.metadata.get('language', 'python')))
        alt = next((d[o].strip('"\'') for o in ('alt', 'fig-alt', 'fig-cap') if d.get(o)), above)
        if d.get('output')=='false': continue
        for i,o in enumerate(c.outputs):
            blocks.append(output_md(o, f'{prefix}{c.id}'+(f'_{i}' if i else ''), alt, imgs))
    md = '\n\n'.join(filter(None, blocks))
    return re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', md, flags=re.M)).strip()+'\n',imgs

def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true',
                        help='write nothing; exit with 1 where README.md or a picture is not what the notebook gives')
    check = parser.parse_args(args).check
    md,imgs = render()
    folder = root/'nbs/images'
    want = {root/'README.md':md.encode(), **{folder/k:v for k,v in imgs.items()}}
    extra = [o for o in folder.glob(prefix+'*') if o not in want]
    stale = [k for k,v in want.items() if not k.exists() or k.read_bytes()!=v]
    if check:
        if not stale+extra: return
        first = (stale+extra)[0].relative_to(root)
        sys.exit(f'Out of step with nbs/index.ipynb: {first}. Run `python tools/readme.py`')
    if imgs: folder.mkdir(exist_ok=True)
    for o in stale: o.write_bytes(want[o])
    for o in extra: o.unlink()

if __name__=='__main__': main()
