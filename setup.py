"Hands settings.ini (metadata) and fastswa/__init__.py (version) to setuptools: change those, not this"
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup,find_packages

here = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
# read, not imported: a build must not need torch
version = re.search(r'^__version__\s*=\s*"(.+)"', (here/'fastswa/__init__.py').read_text(encoding='utf-8'), re.M)[1]
readme = here/'README.md'

setup(
    name=cfg['lib_name'], version=version, description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], license=cfg['license'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
    packages=find_packages(include=['fastswa', 'fastswa.*']), package_data=dict(fastswa=['py.typed']), zip_safe=False,
    python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(), extras_require={k:cfg[f'{k}_requirements'].split() for k in ('dev','bench')},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=['fastswa=fastswa._modidx:d']))
