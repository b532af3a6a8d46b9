"Install fastswa into .venv, once, and run demo, tests or checks: `python3 tools/bootstrap.py demo|test|lint [options]`"
# Runs before anything is installed: only the standard library, in syntax that a Python too old for fastswa can read.
import configparser,hashlib,os,re,subprocess,sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
venv = root/'.venv'
bins = venv/('Scripts' if os.name=='nt' else 'bin')
python = bins/('python.exe' if os.name=='nt' else 'python')
stamp = venv/'fastswa-installed'   # what the last install that finished put there: 'demo <hash>', 'test <hash>', ...
what = dict(demo='.', test='.[dev]', lint='.[dev]')

def check_python(cmd, version=None):
    ini = configparser.ConfigParser(delimiters=['='], interpolation=None)
    ini.read(str(root/'settings.ini'))
    need,have = ini['DEFAULT']['min_python'],'%d.%d'%tuple(version or sys.version_info[:2])
    def num(v): return [int(o) for o in v.split('.')]
    if num(have)<num(need):
        sys.exit('fastswa needs Python >= %s, this is %s: try PYTHON=python3.11 make %s '
                 '(without make: python3.11 tools/bootstrap.py %s)' % (need,have,cmd,cmd))

def wanted():
    "Changes whenever an install would: with the metadata, and with the place that an editable install points to"
    h = hashlib.sha256(str(root).encode())
    for o in 'settings.ini','setup.py','pyproject.toml': h.update((root/o).read_bytes())
    return h.hexdigest()

def installed(cmd):
    if not (python.exists() and stamp.exists()): return False
    has,key = stamp.read_text().split()
    return key==wanted() and what.get(has) in (what[cmd],'.[dev]')   # an install for the tests has what the demo needs

def make_venv():
    try: import ensurepip,venv as _    # noqa: F401 (only whether they are there)
    except ImportError:
        sys.exit('This Python cannot make an environment: '
                 '`apt install python3-venv` (Debian, Ubuntu) brings what is missing')
    print('Making .venv with Python %d.%d' % sys.version_info[:2], flush=True)
    # a .venv whose Python is gone is of no use; one without pip only needs pip
    clear = [] if python.exists() else ['--clear']
    if subprocess.call([sys.executable,'-m','venv']+clear+[str(venv)]):
        sys.exit('Making .venv failed: the reason stands above')

def install(cmd):
    if not python.exists() or subprocess.call([str(python),'-c','import pip'], stderr=subprocess.DEVNULL): make_venv()
    if stamp.exists():
        print('Bringing .venv up to date', flush=True)
        stamp.unlink()   # an install that is interrupted must not count as done
    else:
        print('Installing fastswa into .venv, only this once: about 4 minutes and 6 GB, '
              "because torch's default build comes with CUDA", flush=True)
    if subprocess.call([str(python),'-m','pip','install','-e',what[cmd]], cwd=str(root)):
        sys.exit('Installing failed: the reason stands above. The same command tries again')
    stamp.write_text('%s %s' % (cmd,wanted()))

def note_python():
    "Say so where .venv's Python is not the one asked for: a .venv stays as it was made"
    has = re.search(r'^version\w* *= *(\d+\.\d+)', (venv/'pyvenv.cfg').read_text(), re.M)
    now = '%d.%d' % sys.version_info[:2]
    if has and has.group(1)!=now:
        print('.venv has Python %s: remove it to have it made anew with %s' % (has.group(1),now), flush=True)

def run(cmd, args):
    env = dict(os.environ)
    env.setdefault('PYTHONWARNINGS', 'ignore::FutureWarning')   # torch warns about fastai's torch.jit at every import
    if cmd=='demo': line = [str(bins/'fastswa_demo')]
    elif cmd=='lint': line = [str(python),str(root/'tools/limits.py')]
    else:
        line = [str(python),'-m','pytest','-n','2','--dist','loadfile']   # two files at a time
        env.setdefault('OMP_NUM_THREADS', '1')                  # tiny models train several times faster on one thread
        os.chdir(str(root))
    if os.name=='nt': sys.exit(subprocess.call(line+args, env=env))
    os.execve(line[0], line+args, env)   # not a child: its exit code and Ctrl-C are its own

def main(cmd=None, *args):
    if cmd not in what: sys.exit(__doc__)
    check_python(cmd)
    try:
        if not installed(cmd): install(cmd)
    except KeyboardInterrupt: sys.exit('\nInterrupted: the same command takes it up again')
    note_python()
    run(cmd, list(args))

if __name__=='__main__': main(*sys.argv[1:])
