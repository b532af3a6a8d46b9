"What the repository promises about itself: generated files in step, an install that happens once, nothing of one machine in what is stored"
import ast,importlib,importlib.util,json,os,re,runpy,shutil,signal,subprocess,sys,tarfile,time,types,zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from fastcore.test import test_eq   # never collected, unless conftest.py no longer sees to that
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from packaging.requirements import Requirement
from packaging.version import Version

root = Path(__file__).resolve().parent.parent
nbs = sorted(nbglob(get_config(root).nbs_path, as_path=True))
by_hand = {'__init__.py', 'all.py'}   # all else in fastswa/ is exported

def load(path):
    "A script as a module"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m

def python(*args, cwd=root, **env): return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env={**os.environ, **env}, text=True, capture_output=True)

@pytest.fixture
def copy(tmp_path):
    "A copy of the checkout to break, with a space in its path as people have them"
    dst = tmp_path/'a copy'
    for o in 'nbs','fastswa','tools': shutil.copytree(root/o, dst/o, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for o in 'settings.ini','setup.py','pyproject.toml','README.md': shutil.copy(root/o, dst/o)
    return dst

def py_files(d): return {o.name:o.read_text() for o in (d/'fastswa').glob('*.py')}

def edit_nb(p, cell_type, source):
    "Put `source` at the end of the first cell of `cell_type` in the notebook at `p`"
    nb = json.loads(p.read_text())
    c = next(o for o in nb['cells'] if o['cell_type']==cell_type)
    c['source'] = ''.join(c['source'])+source
    p.write_text(json.dumps(nb))

# Notebooks and what is made of them

def test_modules_match_notebooks(copy):
    was = py_files(root)
    for o in was.keys()-by_hand: (copy/'fastswa'/o).unlink()   # so that a module whose notebook is gone shows too
    r = python('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=copy)
    assert r.returncode==0, r.stderr
    now = py_files(copy)
    assert was.keys()==now.keys()
    for o in was: assert was[o]==now[o], f'fastswa/{o} is not what its notebook exports: run nbdev-export'

def test_notebooks_clean(copy):
    r = python('-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()', cwd=copy)
    assert r.returncode==0, r.stderr
    for o in nbs: assert o.read_bytes()==(copy/'nbs'/o.name).read_bytes(), f'{o.name} is not clean: run nbdev-clean'

def test_all_has_every_name():
    import fastswa.all
    mods = [o.stem for o in (root/'fastswa').glob('*.py') if o.name not in by_hand|{'_modidx.py', 'demo.py', 'cifar.py', 'commands.py', 'testing.py'}]
    assert len(mods)>=4
    for o in mods:
        missing = set(importlib.import_module(f'fastswa.{o}').__all__)-set(dir(fastswa.all))
        assert not missing, f'fastswa/all.py lacks {missing}'

starred = '''EMA Ensemble FGE LAWA Plane Ray Resume SWA SWAG SnapshotEnsemble Snapshots WeightAverage Width average_files cycle_lr ece fge_cycles fge_lr group_lrs nll plot_plane plot_ray
    plot_reliability plot_swa_sched
    plot_width sched_authors snapshot_cycles snapshot_lr swa_cycles swa_lrs update_bn'''.split()     # what people type; the rest is in its module

def test_the_star_brings_these_names():
    had = {}
    exec('from fastswa.all import *', had)
    assert sorted(o for o in had if not o.startswith('_'))==sorted(starred)
    from fastswa.landscape import plane,ray,width
    from fastswa.schedule import Cycles
    assert all(map(callable, (plane,ray,width,Cycles)))

def stored(p):
    "All the text of the notebook at `p`, outputs included, pictures not"
    for c in json.loads(p.read_text())['cells']:
        yield ''.join(c['source'])
        for o in c.get('outputs', []):
            yield ''.join(o.get('text', ''))
            for k,v in o.get('data', {}).items():
                if k.startswith('text/'): yield ''.join(v)

machine = re.compile(r'/home/|/root/|/tmp/|/Users/|site-packages[/\\]|\\Users\\')

@pytest.mark.parametrize('p', [*nbs, root/'README.md'], ids=lambda o: o.name)
def test_nothing_of_one_machine(p):
    for o in stored(p) if p.suffix=='.ipynb' else [p.read_text()]: assert not machine.search(o)

@pytest.mark.parametrize('p', nbs, ids=lambda o: o.name)
def test_no_stored_errors(p):
    outs = [o for c in json.loads(p.read_text())['cells'] for o in c.get('outputs', [])]
    assert not [o for o in outs if o['output_type']=='error']

# README

def check_readme(d): return python('tools/readme.py', '--check', cwd=d)

def test_readme_in_step():
    r = check_readme(root)
    assert r.returncode==0, r.stderr

def test_readme_check_sees_changes(copy):
    assert check_readme(copy).returncode==0
    orphan = copy/'nbs/images/index_gone.png'
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b'')
    r = check_readme(copy)
    assert r.returncode==1 and 'index_gone.png' in r.stderr and r.stderr.count('\n')==1
    assert python('tools/readme.py', cwd=copy).returncode==0 and not orphan.exists()
    edit_nb(copy/'nbs/index.ipynb', 'markdown', '\n\nOne more line')
    r = check_readme(copy)
    assert r.returncode==1 and 'README.md. Run `python tools/readme.py`' in r.stderr and r.stderr.count('\n')==1
    assert python('tools/readme.py', cwd=copy).returncode==0 and check_readme(copy).returncode==0
    assert 'One more line' in (copy/'README.md').read_text()

def test_readme_links_lead_somewhere():
    md = re.sub(r'^```.*?^```|`[^`\n]+`', '', (root/'README.md').read_text(), flags=re.M|re.S)
    for o in re.findall(r'\]\(([^)\s]+)', md):
        if not re.match(r'https?:|#', o): assert (root/o.split('#')[0]).exists(), f'README.md links to {o}'

def blocks(lang): return re.findall(rf'^```{lang}\n(.*?)^```', (root/'README.md').read_text(), re.M|re.S)

def test_first_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    "Copied into an empty folder, with fewer epochs and weights: nothing in it is undefined"
    code = blocks('python')[0]
    assert code.startswith('from fastai') and code.count('\n')<=10 and 'learn.fit(60' in code
    (tmp_path/'try.py').write_text(code.replace('fit(60', 'fit(4'))
    monkeypatch.chdir(tmp_path)
    runpy.run_path('try.py', run_name='__main__')                      # with no names but those of the example
    assert 'last weights' in capsys.readouterr().out                   # the table at its end

def test_commands_of_the_readme_exist():
    from importlib.metadata import entry_points
    lines = [o.split('#')[0].strip() for b in blocks('sh') for o in b.splitlines()]
    assert lines==['pip install .', 'make demo', 'make test']      # another one: try it by hand in a fresh clone, and then list it here
    for o in 'fastswa_demo','fastswa_cifar','fastswa_average': assert entry_points(group='console_scripts', name=o)

def test_no_wide_tables():
    "At 900 pixels GitHub has room for about 115 characters in a table, of which a cell that can wrap needs 30"
    for line in (root/'README.md').read_text().splitlines():
        if not line.startswith('|') or set(line)<=set('|-: '): continue
        cells = [o.strip().replace('`', '') for o in line.strip('|').split(' | ')]
        assert sum(max(min(len(o), 30), *map(len, o.split() or [''])) for o in cells)+3*len(cells)<=115, line

readme = load(root/'tools/readme.py')

@pytest.mark.parametrize('nb,md', [
    ('[a](00_x.ipynb#Top)',       '[a](nbs/00_x.ipynb#Top)'),
    ('![p](images/p.png "t")',    '![p](nbs/images/p.png "t")'),
    ('[c](../CHANGELOG.md)',      '[c](CHANGELOG.md)'),
    ('[![b](b.svg)](c.ipynb)',    '[![b](nbs/b.svg)](nbs/c.ipynb)'),
    ('<img src="images/p.png">',  '<img src="nbs/images/p.png">'),
    ('[r]: 00_x.ipynb',           '[r]: nbs/00_x.ipynb'),
    *[(o,o) for o in ('[w](https://a.b/c.ipynb)', '[t](#top)', '`[a](b.ipynb)`', '```\n[a](b.ipynb)\n```')]])
def test_relink(nb, md): assert readme.relink(nb)==md

@pytest.mark.parametrize('md,alt', [('## How *it* falls\nText', 'How it falls'), ('See [this](x.ipynb) `plot`. More.', 'See this plot'),
                                    ('The loss\nfalls:\n\nThen', 'The loss falls')])
def test_caption(md, alt): assert readme.caption(md)==alt

def test_pipe_table():
    row = '<tr><th>{}</th><td>{}</td></tr>'
    html = '<table border="1" class="dataframe">'+row.format('', 'a|b')+row.format(0, '&lt;x')+'</table><p>1 rows × 1 columns</p>'
    html = f'<div><style scoped>td {{}}</style>{html}</div>'
    assert readme.html_md(html)=='|  | a\\|b |\n| ---: | --- |\n| 0 | <x |'
    for o in html.replace('<td', '<td colspan="2"', 1),'words '+html: assert '<table' in readme.html_md(o)
    html = '<table>'+''.join('<tr>'+''.join(f'<td>{o}</td>' for o in r)+'</tr>' for r in (('epoch','swa_loss','who'), ('0','nan','nan'), ('1','0.45','nanny')))+'</table>'
    assert readme.html_md(html).splitlines()[1]=='| ---: | ---: | --- |'      # nan is a number where no average is there yet
    assert readme.html_md('<style>x</style>\n')==''

# Metadata

def test_version():
    import fastswa
    r = python('setup.py', '--version')
    assert r.stdout.split()[-1]==fastswa.__version__ and str(Version(fastswa.__version__))==fastswa.__version__
    assert f'## {fastswa.__version__}' in (root/'CHANGELOG.md').read_text()

def test_importing_the_package_is_cheap():
    r = python('-c', 'import sys,fastswa; print(fastswa.__version__, "torch" in sys.modules)', PYTHONPATH=str(root))
    assert r.stdout.split()[1:]==['False'], r.stderr

def test_what_is_packed(copy):
    "All of the package and none of the tests and benchmarks, which need the whole repository"
    for o in 'MANIFEST.in','LICENSE': shutil.copy(root/o, copy/o)
    for o in 'tests','benchmarks': shutil.copytree(root/o, copy/o, ignore=shutil.ignore_patterns('__pycache__'))
    r = python('setup.py', '-q', 'sdist', '-d', 'out', cwd=copy)
    assert r.returncode==0, r.stderr
    archive, = (copy/'out').glob('*.tar.gz')
    with tarfile.open(archive) as f: f.extractall(copy/'out', filter='data')
    unpacked, = (o for o in (copy/'out').iterdir() if o.is_dir())
    modules = {o.name for o in (root/'fastswa').iterdir() if o.is_file()}
    assert 'py.typed' in modules and {o.name for o in (unpacked/'fastswa').iterdir()}==modules
    has = {o.name for o in unpacked.iterdir()}
    assert {'LICENSE','README.md','settings.ini','setup.py','pyproject.toml'}<=has and not has&{'tests','benchmarks'}
    r = python('setup.py', '-q', 'bdist_wheel', '-d', 'wheel', cwd=unpacked)
    assert r.returncode==0, r.stderr
    wheel, = (unpacked/'wheel').glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    assert {o.removeprefix('fastswa/') for o in names if '.dist-info/' not in o}==modules
    entry, = (o for o in names if o.endswith('entry_points.txt'))
    assert 'fastswa_demo = fastswa.commands:demo' in zipfile.ZipFile(wheel).read(entry).decode()

# Commands

commands = 'demo','cifar'

def command(name, *args, env=None, **kw):
    "The command, begun as the script that pip makes for it, with what it prints in pipes"
    code = f'import sys; from fastswa.commands import {name}; sys.exit({name}())'
    env = {**os.environ, 'PYTHONPATH':str(root), 'PYTHONUNBUFFERED':'', **(env or {})}
    return subprocess.Popen([sys.executable, '-c', code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8', env=env, **kw)

def test_commands_import_lightly():
    r = python('-c', 'import sys,fastswa.commands; print([o for o in ("torch","numpy","fastcore") if o in sys.modules])', PYTHONPATH=str(root))
    assert r.stdout=='[]\n', r.stderr

@pytest.mark.skipif(os.name=='nt', reason='signals are sent otherwise there')
@pytest.mark.parametrize('name', commands)
def test_ctrl_c_during_the_import(name):
    p = command(name)
    time.sleep(.5)             # Python is up, torch is not
    p.send_signal(signal.SIGINT)
    out,err = p.communicate(timeout=60)
    assert (p.returncode,out,err.strip())==(130,'',f'fastswa_{name}: interrupted')

def test_ctrl_c_that_an_import_swallows(tmp_path):
    (tmp_path/'small.py').write_text('import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt: raise ImportError("a module is missing")')
    code = f'import fastswa,sys; fastswa.__path__.append({str(tmp_path)!r}); from fastswa.commands import run_command; sys.exit(run_command("small"))'
    r = python('-c', code, PYTHONPATH=str(root))
    assert (r.returncode,r.stdout,r.stderr.strip())==(130,'','fastswa_small: interrupted')

@pytest.fixture
def small_command(monkeypatch):
    "Runs a module with this `main` as a command"
    def _inner(main):
        m = types.ModuleType('fastswa.small')
        m.main = main
        monkeypatch.setitem(sys.modules, 'fastswa.small', m)
        from fastswa.commands import run_command
        return run_command('small')
    return _inner

def test_how_commands_end(small_command, capsys):
    handler = signal.getsignal(signal.SIGINT)
    seen = []
    def stop():
        seen.append(signal.getsignal(signal.SIGINT))
        raise KeyboardInterrupt
    assert small_command(stop)==130 and capsys.readouterr().err.strip()=='fastswa_small: interrupted'
    assert seen==[handler] and signal.getsignal(signal.SIGINT) is handler
    assert [small_command(lambda code=code: code) for code in (None,0,130)]==[None,0,130]
    with pytest.raises(SystemExit): small_command(lambda: sys.exit(2))
    with pytest.raises(ZeroDivisionError): small_command(lambda: 1/0)

@pytest.mark.skipif(os.name=='nt', reason='no such pipes')
def test_a_reader_that_has_gone(tmp_path):
    code = """if True:
        import sys, types
        m = sys.modules['fastswa.small'] = types.ModuleType('fastswa.small')
        def main():
            for i in range(100000): print(i)
        m.main = main
        from fastswa.commands import run_command
        sys.exit(run_command('small'))"""
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH':str(root)})
    assert p.stdout.readline()=='0\n'
    p.stdout.close()
    assert p.stderr.read()=='' and p.wait()==141
    p.stderr.close()

@pytest.mark.parametrize('name', commands)
def test_help_and_version(name, monkeypatch, capsys):
    "On narrow screens too, of which each line keeps to its columns; and by the name of the module"
    import fastswa
    main = importlib.import_module(f'fastswa.{name}').main
    for columns in 40,60,80,120:
        monkeypatch.setenv('COLUMNS', str(columns))
        with pytest.raises(SystemExit) as e: main(['--help'])
        out = capsys.readouterr().out
        assert not e.value.code and '%%' not in out and max(map(len, out.splitlines()))<=columns and out.split()[1]==f'fastswa_{name}'
    monkeypatch.setattr(sys, 'argv', ['x', '--version'])
    for f in lambda: main(['--version']),lambda: runpy.run_module(f'fastswa.{name}', run_name='__main__', alter_sys=True):
        with pytest.raises(SystemExit) as e: f()
        assert not e.value.code and capsys.readouterr().out==f'fastswa {fastswa.__version__}\n'

boot = load(root/'tools/bootstrap.py')
ini = boot.configparser.ConfigParser(delimiters=['='], interpolation=None)
ini.read(root/'settings.ini')

@pytest.mark.parametrize('req', (ini['DEFAULT']['requirements']+' '+ini['DEFAULT']['dev_requirements']).split())
def test_requirement_is_here(req):
    r = Requirement(req)
    assert r.specifier.contains(version(r.name), prereleases=True)
    importlib.import_module({'scikit-learn':'sklearn', 'pytest-xdist':'xdist'}.get(r.name, r.name))

# What it works with

def rows(heading):
    "What is listed under a heading of CONTRIBUTING, item by item"
    text = (root/'CONTRIBUTING.md').read_text().split(f'## {heading}\n')[1].split('\n## ')[0]
    return [o[2:] for o in text.splitlines() if o.startswith('- ')]

@pytest.mark.parametrize('row', rows('What it works with, and the test of each'), ids=lambda o: re.sub(r'\W+', '_', o.split('**')[1]))
def test_what_it_works_with_is_tested(row):
    tests = re.findall(r'`(test_\w+\.py)::(test_\w+)`', row)
    assert tests and len(tests)==row.count('::')
    for file,name in tests: assert re.search(rf'^def {name}\(', (root/'tests'/file).read_text(), re.M), f'{file} has no {name}'

# tools/run_nbs.py

def test_run_nbs(copy):
    p,cells = copy/'nbs/00_try.ipynb',['import matplotlib.pyplot as plt\nprint(1+1)', '#| slow\n1/0', '#| eval: false\n1/0', 'plt.plot([1,2]);']
    def write(*srcs):
        cs = [dict(cell_type='code', id=f'c{i}', metadata={}, source=s, execution_count=None, outputs=[]) for i,s in enumerate(srcs)]
        p.write_text(json.dumps(dict(cells=cs, metadata={}, nbformat=4, nbformat_minor=5)))
    write(*cells)
    r = python('tools/run_nbs.py', p, cwd=copy)
    assert r.returncode==0 and not r.stderr, r.stderr
    outs = [o['outputs'] for o in json.loads(p.read_text())['cells']]
    assert outs[0][0]['text']==['2\n'] and outs[1]==outs[2]==[] and [*outs[3][0]['data']][0]=='image/png'
    write('print(1)', '1/0')
    was = p.read_bytes()
    r = python('tools/run_nbs.py', p, cwd=copy)
    assert r.returncode==1 and 'ZeroDivisionError' in r.stderr and 'Left as they were, because a cell failed: 00_try.ipynb' in r.stderr
    assert p.read_bytes()==was

# tools/bootstrap.py

def test_bootstrap_reads_in_old_python(): ast.parse((root/'tools/bootstrap.py').read_text(), feature_version=(3,6))

def bootstrap_after(code, copy, *args):
    "Run bootstrap as a script in `copy`, in a Python that `code` has changed"
    code = f'import sys,runpy; {code}; sys.argv[1:] = {list(args)}; runpy.run_path("tools/bootstrap.py", run_name="__main__")'
    return python('-c', code, cwd=copy, PIP_NO_INDEX='1')   # where the test fails it must not go on to a real install

def test_bootstrap_old_python(copy):
    r = bootstrap_after('sys.version_info = (3,6,9)', copy, 'test')
    assert r.returncode==1 and r.stderr.count('\n')==1
    assert r.stderr.startswith('fastswa needs Python >= 3.10, this is 3.6: try PYTHON=python3.11 make test')
    for v in (3,10),(3,12),(4,0): boot.check_python('test', v)
    for v in (2,7),(3,9):
        with pytest.raises(SystemExit): boot.check_python('test', v)

@pytest.mark.parametrize('missing', ['venv', 'ensurepip'])
def test_bootstrap_no_venv(copy, missing):
    r = bootstrap_after(f'sys.modules["{missing}"] = None', copy, 'demo')
    assert r.returncode==1 and 'apt install python3-venv' in r.stderr and r.stderr.count('\n')==1

def test_bootstrap_usage(copy):
    for o in [],['tset']: assert 'demo|test' in bootstrap_after('0', copy, *o).stderr

@pytest.fixture
def fake(copy, monkeypatch):
    "Bootstrap in `copy`, with programs that are noted in `.calls` instead of run, and `.rc` for pip's exit code"
    m = load(copy/'tools/bootstrap.py')
    m.calls,m.rc = [],0
    def call(line, **kwargs):
        if '-m' not in line: return 0   # has it got pip? Yes
        m.calls.append(line[2])
        if line[2]=='venv':
            m.bins.mkdir(parents=True)
            m.python.write_text('')
            (m.venv/'pyvenv.cfg').write_text('version = %d.%d.1\n' % sys.version_info[:2])
        if line[2]=='pip':
            m.calls[-1] = 'pip '+line[-1]
            if isinstance(m.rc, type): raise m.rc
            return m.rc
        return 0
    def execve(file, line, env): m.ran = Path(file).name,line[1:],env
    monkeypatch.setattr(m.subprocess, 'call', call)
    monkeypatch.setattr(m.os, 'execve', execve)
    monkeypatch.chdir(copy)
    for o in 'OMP_NUM_THREADS','PYTHONWARNINGS': monkeypatch.delenv(o, raising=False)
    def calls(*args):
        m.calls.clear()
        m.main(*args)
        return [*m.calls]
    m.after = calls
    return m

def test_bootstrap_installs_once(fake):
    assert fake.after('demo')==['venv', 'pip .']
    assert fake.after('demo')==[]
    assert fake.after('test')==['pip .[dev]']   # more than the demo has
    assert fake.after('test')==[]
    assert fake.after('demo')==[]               # less than the tests have
    assert fake.after('lint')==[]               # no more than they have
    for o in 'settings.ini','setup.py','pyproject.toml':
        with (fake.root/o).open('a') as f: f.write('\n')
        assert fake.after('test')==['pip .[dev]']
        assert fake.after('test')==[]
    fake.python.unlink()                        # the Python that .venv was made with is gone
    shutil.rmtree(fake.bins)
    assert fake.after('demo')==['venv', 'pip .']

def test_bootstrap_lint_installs_what_tests_need(fake):
    assert fake.after('lint')==['venv', 'pip .[dev]']
    for o in 'lint','test','demo': assert fake.after(o)==[]

@pytest.mark.parametrize('rc', [1, KeyboardInterrupt])
def test_bootstrap_interrupted(fake, rc):
    fake.after('demo')
    fake.rc = rc
    with pytest.raises(SystemExit): fake.after('test')
    assert not fake.stamp.exists()
    fake.rc = 0
    assert fake.after('test')==['pip .[dev]']

def test_bootstrap_says_what_it_does(fake, capsys):
    fake.after('demo')
    assert '4 minutes and 6 GB' in capsys.readouterr().out
    fake.after('demo')
    assert capsys.readouterr().out==''
    (fake.venv/'pyvenv.cfg').write_text('version = 3.1.4\n')
    fake.after('demo')
    assert '.venv has Python 3.1: remove it' in capsys.readouterr().out

def test_bootstrap_runs(fake, monkeypatch):
    fake.after('demo', '--seeds', '1')
    name,args,env = fake.ran
    assert name=='fastswa_demo' and args==['--seeds', '1'] and env['PYTHONWARNINGS']=='ignore::FutureWarning'
    fake.after('test', '-k', 'a or b')
    name,args,env = fake.ran
    assert args==['-m', 'pytest', '-n', '2', '--dist', 'loadfile', '-k', 'a or b'] and env['OMP_NUM_THREADS']=='1' and env['PYTHONWARNINGS']=='ignore::FutureWarning'
    fake.after('lint')
    name,args,env = fake.ran
    assert name.startswith('python') and args==[str(fake.root/'tools/limits.py')]
    for o in 'OMP_NUM_THREADS','PYTHONWARNINGS': monkeypatch.setenv(o, 'mine')
    fake.after('test')
    assert fake.ran[2]['OMP_NUM_THREADS']==fake.ran[2]['PYTHONWARNINGS']=='mine'

@pytest.mark.skipif(os.name=='nt', reason='the stand-in is a shell script')
@pytest.mark.parametrize('line', [[sys.executable, 'tools/bootstrap.py', 'demo', 'x y'], ['make', '-s', 'demo', 'ARGS="x y"']], ids=['script', 'make'])
def test_bootstrap_exit_code(copy, line):
    if not shutil.which(line[0]): pytest.skip('no make')
    shutil.copy(root/'Makefile', copy)
    m = load(copy/'tools/bootstrap.py')
    m.bins.mkdir(parents=True)
    for o,s in (m.python,''),(m.bins/'fastswa_demo','#!/bin/sh\necho "got $1"; exit 7\n'):
        o.write_text(s)
        o.chmod(0o755)
    (m.venv/'pyvenv.cfg').write_text('')
    m.stamp.write_text('demo '+m.wanted())
    r = subprocess.run(line, cwd=copy, text=True, capture_output=True, env={**os.environ, 'PYTHON':sys.executable})
    assert r.stdout=='got x y\n'
    assert r.returncode==(7 if line[0]!='make' else 2)   # make has a code of its own for any failure
