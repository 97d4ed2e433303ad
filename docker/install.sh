#!/bin/sh
# Installs Penstock with its engine into an environment of its own. Both images run this, and so does a test, where
# there is no compiler: the wheel has its kernels.
#
#   install.sh PREFIX WHEELS [TORCH_INDEX]
#
#   PREFIX        where the environment is made, as /opt/penstock
#   WHEELS        a folder with Penstock's wheel
#   TORCH_INDEX   an index of torch's own, as that of its CPU builds; PyPI's if not given
#
# Needs a Python with venv, $PYTHON or python3, and nothing else of the system. A torch that the environment can
# import already stays.
set -eu

prefix=$1
wheels=$2
index=${3:-}

"${PYTHON:-python3}" -m venv "$prefix"
python=$prefix/bin/python
for wheel in "$wheels"/penstock-*.whl; do
    [ -e "$wheel" ] || { echo "There is no wheel of Penstock in $wheels." >&2; exit 1; }
done

# torch first: it is the one large download, and the one that comes in several builds
if ! "$python" -c 'import torch' 2> /dev/null; then
    "$python" -m pip install ${index:+--index-url "$index"} 'torch>=2.11,<2.14'
fi
"$python" -m pip install "${wheel}[engine,pg,redis,otel]"
"$python" -m pip check
"$prefix/bin/penstock" --version
