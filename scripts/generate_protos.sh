#!/usr/bin/env bash
# Generates keel's *_pb2*.py beside the protos. `--check` fails if the committed code differs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=protos
if [ "${1:-}" = --check ]; then out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; fi
mapfile -t files < <(cd protos && find keel -name '*.proto' | sort)
"$python" -m grpc_tools.protoc -I protos --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" "${files[@]}"
# files without a service yield a gRPC module with nothing in it
for f in types/v1/tensor types/v1/sequence weights/v1/manifest; do rm -f "$out/keel/${f}_pb2_grpc.py"; done
if [ "$out" != protos ]; then
  status=0
  while read -r f; do
    cmp -s "$out/$f" "protos/$f" || { echo "protos/$f differs from what the protos generate: run 'make protos'"; status=1; }
  done < <(cd "$out" && find . -name '*_pb2*' -printf '%P\n')
  exit $status
fi
