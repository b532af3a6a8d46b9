"The limits of CONTRIBUTING.md: each rule of tools/limits.py and of [tool.ruff] is red on a bad example and green on a good one"
import importlib.util, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('limits', root/'tools/limits.py')
limits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(limits)

def block(head, n):
    "`n` lines of code that begin with `head`"
    at = ' '*(4+len(head.split('\n')[-1])-len(head.split('\n')[-1].lstrip()))
    return head+'\n'+f'{at}pass\n'*(n-head.count('\n')-1)

@pytest.mark.parametrize('bad,line,says,good', [
    (block('def f():', 41), 1, 'f has 41 lines, at most 40', block('def f():', 40)),
    (block('x = 1\n@a(1,\n   2)\ndef f():', 42), 2, 'f has 41 lines', block('x = 1\n@a(1,\n   2)\ndef f():', 41)),
    (block('class A:\n    def f(self):', 42), 2, 'f has 41 lines', block('class A:\n    def f(self):', 41)),
    (block('class A:', 121), 1, 'A has 121 lines, at most 120', block('class A:', 120)),
    ('def f(): pass\ndef f(): pass', 2, 'a second f hides the first', 'def f(): pass\nclass A:\n    def f(self): pass'),
    ('class A: pass\n@x\ndef A(): pass', 2, 'a second A', 'if x:\n    def f(): pass\nelse:\n    def f(): pass'),
    ('class A:\n    def f(self): pass\n    def f(self): pass', 3, 'a second f',
     'class A:\n    @property\n    def f(self): pass\n    @f.setter\n    def f(self, v): pass'),
    ('@patch\ndef f(self:SWA): pass', 1, "f is patched, and not onto fastai's Learner", '@patch\ndef f(self:Learner): pass'),
    ('@patch(as_prop=True)\ndef f(self:SWA): pass', 1, 'f is patched', '@patch(as_prop=True)\n@delegates(g)\ndef f(self:Learner): pass'),
    ('@patch_to(SWA)\ndef f(self): pass', 1, 'f is patched', '@patch_to(Learner)\ndef f(self): pass'),
    ('import sys\nf = sys._getframe()', 2, '_getframe looks at the stack', 'import sys\nf = sys.argv'),
    ('from sys import _getframe', 1, '_getframe', 'from sys import argv'),
    ('from inspect import currentframe as c', 1, 'currentframe', 'from inspect import signature'),
    ('f.f_back', 1, 'f_back looks at the stack', 'f.back'),
    ("f.f_locals['self']", 1, 'f_locals looks at the stack', "locals()['self']"),
    ("x = type(o).__module__.startswith('fastai.')", 1, '__module__ decides', 'o.__module__ = __name__\nx = isinstance(o, A)'),
    ('a,b,c,d = f()', 1, '4 targets in one assignment, at most 3', 'a,b,c = f()'),
    ('a,(b,*c),d = f()', 1, '4 targets', 'a,(b,*c) = f()'),
    ('a = b = c = d = 0', 1, '4 targets', 'a = b = c = 0'),
    ('self.a,self.b,self.c[i],d = f()', 1, '4 targets', 'self.a.b.c.d,self.b,self.c[i] = 1,2,3\nfor a,b,c,d in f(): pass'),
    ('from .average import mean,_sum', 1, '_sum is private to fastswa.average', 'from .average import mean\nfrom torch import _foreach_add_'),
    ('def f():\n    from fastswa.average import _sum', 2, '_sum is private', 'from fastswa import __version__\nfrom fastswax import _f'),
    ('from . import _x', 1, '_x is private', 'from . import average'),
])
def test_rules(bad, line, says, good):
    (at,text), = limits.breaches(bad)
    assert at==line and text.startswith(says) and ': ' in text
    assert limits.breaches(good)==[]

@pytest.mark.parametrize('bad,line,says,good', [
    ('x = 1\n\na; b', 3, 'a semicolon', "x = ';'    # this; and that"),
    ('plot();', 1, 'a semicolon', '_ = plot()'),
    ('#| export\nx;', 2, 'a semicolon', '#| export\na,b,c,d = f()    # its module shows this'),
    ('%time f()\na,b,c,d = f()', 2, '4 targets', '%time f();\n!ls; pwd'),
    ('x = '+'1'*117, 1, '121 columns, at most 120', '#| fig-cap: '+'a'*120+'\nx = '+'1'*116),
])
def test_cells(bad, line, says, good):
    (at,text), = limits.cell_breaches(bad)
    assert at==line and text.startswith(says)
    assert [*limits.cell_breaches(good)]==[]

@pytest.mark.parametrize('modules,found', [
    (dict(a='from .b import x', b='from fastswa.c import y', c=''), None),
    (dict(a='from .b import x', b='from .a import y'), {'a -> b -> a', 'b -> a -> b'}),
    (dict(a='from .b import x', b='def f():\n    from fastswa.c import y', c='from . import a'), {'a -> b -> c -> a', 'b -> c -> a -> b', 'c -> a -> b -> c'}),
])
def test_circles(modules, found):
    got = limits.circle(modules)
    assert got is None if found is None else got in found

def ruff(path, source):
    "What ruff says of a file with this `source`: [(place, rule)]"
    r = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise', '--stdin-filename', path, '-'],
                       input=source, cwd=root, text=True, capture_output=True)
    assert r.returncode in (0,1), r.stderr
    return re.findall(rf'^{path}:(.*): ([A-Z]+[0-9]+|invalid-syntax)\b', r.stdout, re.M)

@pytest.mark.parametrize('code,bad,good', [
    ('E501', 'x = '+'[1, '*40+']'*40, 'x = 1'),
    ('E702', 'x = 1; y = 2', 'for x in (): x'),
    ('E703', 'x = 1;', 'x = 1'),
    ('E741', 'l = 1', 'def f(): return 1'),
    ('F401', 'import os', 'import os\nos'),
    ('F811', 'import os\nimport os\nos', 'f = lambda: 1'),
    ('F821', 'y', 'y = 1'),
    ('F841', 'def f(): x = 1', 'def f():\n    global x\n    x = 1'),
])
def test_ruff(code, bad, good, path='fastswa/x.py'):
    assert [o for _,o in ruff(path, bad+'\n')]==[code] and ruff(path, good+'\n')==[]

def test_ruff_knows_the_oldest_python():
    "The one that settings.ini admits: quotes within the same quotes are an error there"
    assert ruff('fastswa/x.py', "d = {}\nx = f'{d['a']}'\n") and not ruff('fastswa/x.py', "d = {}\nx = f'{d[\"a\"]}'\n")
    assert 'min_python = 3.10\n' in (root/'settings.ini').read_text() and 'target-version = "py310"' in (root/'pyproject.toml').read_text()

def notebook(*cells):
    return json.dumps(dict(cells=[dict(cell_type='code', id=f'c{i}', metadata={}, source=o, outputs=[], execution_count=None) for i,o in enumerate(cells)],
                           metadata={}, nbformat=4, nbformat_minor=5))

def test_ruff_reads_notebooks():
    assert ruff('nbs/x.ipynb', notebook('from a import *\nimport os', 'os\nx;'))==[]
    assert ruff('nbs/x.ipynb', notebook('import os', 'y'))==[('cell 1:1:8','F401'), ('cell 2:1:1','F821')]

@pytest.fixture
def small(tmp_path):
    "A checkout with one module, one benchmark and one notebook that keep all limits"
    for o in 'tools/limits.py','pyproject.toml','fastswa/_modidx.py':
        (tmp_path/o).parent.mkdir(exist_ok=True)
        shutil.copy(root/o, tmp_path/o)
    for o,source in {'fastswa/a.py':'x = 1\n', 'benchmarks/b.py':'from fastswa.a import *\nx\n', 'nbs/c.ipynb':notebook('x = 1', '#| eval: false\nx')}.items():
        (tmp_path/o).parent.mkdir(exist_ok=True)
        (tmp_path/o).write_text(source)
    return tmp_path

def run(d):
    r = subprocess.run([sys.executable, d/'tools/limits.py'], text=True, capture_output=True, cwd=d.parent)
    assert not r.stderr
    return r.returncode,r.stdout.splitlines()

def test_command(small):
    "From any folder; places as an editor reads them; generated files are not looked at"
    assert run(small)==(0,[])
    (small/'fastswa/a.py').write_text('import os\na,b,c,d = 1,2,3,4\nfrom .e import y\ny\n')
    (small/'fastswa/e.py').write_text('from .a import b\nb\n')
    (small/'nbs/c.ipynb').write_text(notebook('x = 1', 'x;'))
    rc,lines = run(small)
    assert rc==1 and len(lines)==4
    for o in 'fastswa/a.py:1:8: F401','fastswa/a.py:2: 4 targets','nbs/c.ipynb:c1:1: a semicolon','fastswa:1: ': assert any(line.startswith(o) for line in lines), o
    assert 'a -> e -> a' in lines[-1] or 'e -> a -> e' in lines[-1]

def test_command_is_red_where_only_ruff_is(small):
    (small/'benchmarks/b.py').write_text('y\n')
    rc,lines = run(small)
    assert rc==1 and len(lines)==1 and 'F821' in lines[0]

def test_the_package_keeps_its_limits():
    r = subprocess.run([sys.executable, root/'tools/limits.py'], text=True, capture_output=True)
    assert not r.stderr
    assert r.returncode==0, r.stdout
