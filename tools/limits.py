"""Hold the limits that CONTRIBUTING.md names: `python tools/limits.py`

Prints each breach as file:line, what it is and what to do, and ends with 1 if there is one. ruff comes first, with
what pyproject.toml selects; here is what it does not have. A rule gives (line, text) for each breach in a tree."""
import ast, json, re, subprocess, sys, tokenize
from graphlib import CycleError, TopologicalSorter
from io import StringIO
from pathlib import Path

root = Path(__file__).resolve().parent.parent
max_columns,max_targets = 120,3
max_lines = {ast.ClassDef:120, ast.FunctionDef:40}      # from the first decorator on, docstring included
stack = 'looks at the stack: let the caller say what is going on, in an argument'
unwanted = dict(_getframe=stack, currentframe=stack, f_back=stack, f_locals=stack,
                __module__="decides by a module's name: ask for a class or an attribute")

def nodes(tree, *kinds): return [o for o in ast.walk(tree) if isinstance(o, kinds)]
def first_line(o): return min(d.lineno for d in [o, *o.decorator_list])
def decorators(o): return [ast.unparse(d) for d in o.decorator_list]

def too_long(tree):
    for o in nodes(tree, *max_lines):
        n,most = o.end_lineno-first_line(o)+1,max_lines[type(o)]
        if n>most: yield first_line(o),f'{o.name} has {n} lines, at most {most}: split what it is responsible for'

def defined_twice(tree):
    for place in tree,*nodes(tree, ast.ClassDef):
        seen = set()
        for o in place.body:
            if not isinstance(o, tuple(max_lines)): continue
            setter = any(d.startswith(f'{o.name}.') for d in decorators(o))
            if o.name in seen and not setter: yield first_line(o),f'a second {o.name} hides the first: rename one'
            seen.add(o.name)

def patched(tree):
    for o in nodes(tree, ast.FunctionDef):
        by = [d for d in decorators(o) if d.startswith('patch')]
        to = [ast.unparse(a.annotation) for a in o.args.args[:1] if a.annotation]
        if by and 'patch_to(Learner)' not in by and to!=['Learner']:
            yield first_line(o),f"{o.name} is patched, and not onto fastai's Learner: write it into its class"

def unwanted_names(tree):
    for o in nodes(tree, ast.Attribute, ast.alias):
        name = o.name if isinstance(o, ast.alias) else o.attr if isinstance(o.ctx, ast.Load) else ''
        if name in unwanted: yield o.lineno,f'{name} {unwanted[name]}'

def wide_assignments(tree):
    for o in nodes(tree, ast.Assign):
        names = [k for t in o.targets for k in nodes(t, ast.Name, ast.Attribute, ast.Subscript)]
        n = sum(isinstance(k.ctx, ast.Store) for k in names)
        if n>max_targets: yield o.lineno,f'{n} targets in one assignment, at most {max_targets}: write several'

def imports(tree):
    "(line, module of fastswa, name) of all that is imported from it"
    for o in nodes(tree, ast.ImportFrom):
        own = re.fullmatch(r'(?:fastswa$|fastswa\.|\.)(\w*)', '.'*o.level+(o.module or ''))
        if own: yield from ((o.lineno, own[1] or a.name, a.name) for a in o.names)

def private_imports(tree):
    for line,module,name in imports(tree):
        if re.match('_(?!_)', name): yield line,f'{name} is private to fastswa.{module}: give it a public name there'

rules = too_long,defined_twice,patched,unwanted_names,wide_assignments,private_imports

def breaches(source): return sorted(o for rule in rules for o in rule(ast.parse(source)))

def cell_breaches(source):
    "Of a notebook's cell; of an exported one what its module does not show. A directive is one line of any length"
    source = re.sub(r'^[%!].*', '', source, flags=re.M)
    for i,o in enumerate(source.splitlines(), 1):
        if len(o)>max_columns and not o.startswith('#|'): yield i,f'{len(o)} columns, at most {max_columns}: break it'
    for t in tokenize.generate_tokens(StringIO(source).readline):
        if (t.type,t.string)==(tokenize.OP,';'): yield t.start[0],'a semicolon: a line for each; `_ = ` hides a value'
    if not re.search(r'^#\| *export', source, re.M): yield from breaches(source)

def circle(sources):
    "Modules (a dict from name to source) that import each other, as text; None where each imports only lower ones"
    below = {k:{module for _,module,_ in imports(ast.parse(v))} for k,v in sources.items()}
    try: TopologicalSorter(below).prepare()
    except CycleError as e: return ' -> '.join(e.args[1][::-1])

def all_breaches():
    "Each as (place, line, text)"
    for p in [*root.glob('fastswa/[!_]*.py'), *root.glob('benchmarks/*.py'), *root.glob('tools/*.py')]:
        yield from ((p, *o) for o in breaches(p.read_text(encoding='utf-8')))
    for p in root.glob('nbs/*.ipynb'):
        for c in json.loads(p.read_text(encoding='utf-8'))['cells']:
            source = ''.join(c['source'])
            if c['cell_type']!='code' or re.search('^%%', source, re.M): continue
            yield from ((f'{p}:{c["id"]}', *o) for o in cell_breaches(source))
    found = circle({p.stem:p.read_text(encoding='utf-8') for p in root.glob('fastswa/[!_]*.py')})
    if found: yield root/'fastswa',1,f'{found} import each other: move what they share below them'

def main():
    ruff = subprocess.run([sys.executable,'-m','ruff','check','--quiet','--output-format','concise'], cwd=root)
    found = [f'{place}:{line}: {text}'.removeprefix(f'{root}/') for place,line,text in all_breaches()]
    for o in found: print(o)
    return 1 if found or ruff.returncode else 0

if __name__=='__main__': sys.exit(main())
